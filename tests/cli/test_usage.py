"""The command line without a swarm: usage, help, and one clear sentence for each bad input."""

import json
import subprocess
import sys

import pytest

from petalnode.cli.arguments import EXAMPLES, build_parser
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
    parsed = build_parser(environ).parse_args(["run", "demo", "--port", "5"])
    assert (parsed.join, parsed.port, parsed.json) == (["one", "two"], 5, True)


def test_bad_environment_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as caught:
        build_parser({"PETALNODE_PORT": "many"})
    assert caught.value.code == 2
    assert "PETALNODE_PORT" in capsys.readouterr().err


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


@pytest.mark.parametrize("flags", [["--quant", "int8"], ["--adapter", "x"], ["--api-port", "8000"]])
def test_what_is_not_built_yet_says_so(capsys, flags):
    assert "not built yet" in fails(capsys, "run", "demo", *flags)


def test_beams_are_not_built_yet(capsys):
    assert "not built yet" in fails(capsys, "generate", "demo", "hello", "--num-beams", "4")
