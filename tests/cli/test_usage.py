"""The command line without a swarm: usage, help, and one clear sentence for each bad input."""

import json
import subprocess
import sys

import pytest

from petalnode.cli import run
from petalnode.cli.arguments import EXAMPLES, parse_arguments
from petalnode.cli.main import main


def fails(capsys, *arguments):
    """The two lines on stderr of a run that exits with 1 and shows no traceback."""
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("verb", EXAMPLES)
def test_help_is_complete_and_shows_an_example(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "Example: petalnode " + verb in out
    assert "--json" in out


@pytest.mark.parametrize("arguments", [[], ["dance"], ["run"], ["run", "demo", "--blocks", "5:2"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_a_text_has_one_adapter(capsys):
    """The last of several would count, and nobody would know."""
    given = ["generate", "demo", "a", "--adapter", "x"]
    assert parse_arguments(given, {"PETALNODE_ADAPTER": "y"}).adapter == "x"
    with pytest.raises(SystemExit) as caught:
        main([*given, "--adapter", "x"])
    assert caught.value.code == 2
    assert "--adapter: can be given only once here" in capsys.readouterr().err
    assert parse_arguments(["run", "demo", "--adapter", "x", "--adapter", "y"], {}).adapter == [
        "x",
        "y",
    ]


@pytest.mark.parametrize(
    ("adapters", "words"),
    [
        (["org/none", "."], "has no adapter_config.json"),
        (["./none"], "There is no adapter './none'"),
        (["mine/adapter_model.safetensors"], "is a file"),
        (["mine"], "The adapter mine is empty"),
        (["org/none"] * 9, "9 adapters are too many"),
    ],
)
def test_adapters_are_checked_before_a_swarm_is_founded(
    capsys, monkeypatch, tmp_path, adapters, words
):
    """Those that are here; no hub is asked."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapter_config.json").write_text("{}")
    (tmp_path / "mine" / "adapter_model.safetensors").write_bytes(b"\2" + b"\0" * 7 + b"{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "serve", None)
    flags = [flag for name in adapters for flag in ("--adapter", name)]
    assert words in fails(capsys, "run", "demo", *flags)


def test_import_and_help_load_neither_torch_nor_libp2p():
    code = (
        "import sys, petalnode\n"
        "from petalnode.cli.main import main\n"
        "try: main(['run', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'libp2p', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_environment_mirrors_flags_and_the_command_line_wins():
    environ = {"PETALNODE_JOIN": "one two", "PETALNODE_PORT": "4001", "PETALNODE_JSON": "1"}
    parsed = parse_arguments(["run", "demo", "--port", "5"], environ)
    assert (parsed.join, parsed.port, parsed.json) == (["one", "two"], 5, True)


def test_bad_environment_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["run", "demo"], {"PETALNODE_PORT": "many"})
    assert caught.value.code == 2
    assert "PETALNODE_PORT" in capsys.readouterr().err


def test_the_environment_of_other_verbs_does_no_harm():
    parsed = parse_arguments(["run", "demo"], {"PETALNODE_SEED": "x"})
    assert parsed.verb == "run"


@pytest.mark.parametrize(
    ("name", "flag"),
    [("PETALNODE_BLOCKS", ["--num-blocks", "2"]), ("PETALNODE_NUM_BLOCKS", ["--blocks", "0:4"])],
)
def test_the_command_line_wins_over_the_other_way_to_choose_a_span(name, flag):
    environ = {name: "0:4" if name == "PETALNODE_BLOCKS" else "2"}
    parsed = parse_arguments(["run", "demo", *flag], environ)
    assert (parsed.blocks, parsed.num_blocks) in ((None, 2), ((0, 4), None))
    assert (parsed.blocks is None) == (flag[0] == "--num-blocks")


@pytest.mark.parametrize(
    "flags",
    [
        ["--host", "localhost"],
        ["--name", "x" * 65],
        ["--kv-tokens", str(1 << 60)],
        ["--device", "abacus"],
        ["--blocks", "0:9"],
        ["--num-blocks", "99"],
    ],
)
def test_bad_options_are_refused_before_anything_listens(capsys, flags):
    assert fails(capsys, "run", "demo", *flags)


def test_a_prompt_that_is_not_text(capsys):
    assert "UTF-8" in fails(capsys, "generate", "demo", "a\udcff", "--join", "pn1:x")


def test_no_such_directory(capsys):
    assert "/no/such/model" in fails(capsys, "run", "/no/such/model")


def test_no_swarm_given(capsys):
    assert "--join" in fails(capsys, "generate", "demo", "hello")
    assert "--join" in fails(capsys, "status")


@pytest.mark.parametrize("join", ["pn1:nonsense", "hello", "/ip4/127.0.0.1/tcp/1"])
def test_a_garbled_join(capsys, join):
    assert fails(capsys, "generate", "demo", "hello", "--join", join)
    assert fails(capsys, "status", "--join", join)


def test_an_unsupported_family_names_the_supported_ones(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    error = fails(capsys, "run", str(tmp_path))
    assert "mamba" in error
    assert "llama" in error


@pytest.mark.parametrize("flags", [["--api-port", "8000"]])
def test_what_is_not_built_yet_says_so(capsys, flags):
    assert "not built yet" in fails(capsys, "run", "demo", *flags)


@pytest.mark.parametrize("flags", [["65"], ["2", "--temperature", "1"], ["2", "--stop", "x"]])
def test_beams_that_cannot_be_are_refused_before_joining(capsys, flags):
    peer = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo"
    beams = ["--join", peer, "--num-beams", *flags]
    assert "eam" in fails(capsys, "generate", "demo", "hello", *beams)
