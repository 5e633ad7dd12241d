"""``petalnode tune`` in a real swarm: events, Ctrl-C, SIGKILL, and a sentence for bad input."""

import json
import re
import signal
import sys
from pathlib import Path

import pytest

from petalnode.cli import tune
from petalnode.cli.arguments import build_parser, parse_arguments
from petalnode.cli.main import main
from petalnode.cli.tune import Reporter, duration, hanging_up
from petalnode.events import (
    Draining,
    HopLost,
    Moving,
    TuningData,
    TuningDone,
    TuningEval,
    TuningStep,
    TuningValidating,
    Waiting,
)
from petalnode.training.checkpoints import claimed

from .test_processes import ALL_TESTS_S, environment, following, serving

__all__ = ["environment"]

PEER = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo"
TEXTS = [f"Return the {n}th item of the list, or None." for n in range(12)]


@pytest.fixture(scope="module")
def swarm(environment):
    """A node that holds the whole model, for as long as all tests here take."""
    with serving(environment, "--blocks", "0:8", deadline_s=ALL_TESTS_S) as node:
        listening = node.wait_for("listening")
        node.wait_for("ready")
        yield listening


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def tuning(swarm, data, out, *flags):
    small = ["--steps", "16", "--batch-size", "2", "--save-every", "4", "--lr", "0.01"]
    small += ["--rank", "2"]
    files = ["--data", str(data), "--eval", str(data), "--out", str(out)]
    return ["tune", "demo", "--join", swarm["invite"], "--json", *files, *small, *flags]


def finished(capsys, verb):
    """The events of a verb, run in this process: it has imported torch already."""
    code = main(verb)
    out, err = capsys.readouterr()
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


def of(events, kind):
    return [event for event in events if event["event"] == kind]


def stopped_at(verb, environment, step, how):
    """Runs until an event of that step, then sends the signal; the events and the exit code."""
    events = []
    with following(environment, *verb) as (process, said):
        for event in said:
            events.append(event)
            if (event["event"], event.get("step")) == ("step", step):
                process.send_signal(how)
        return events, process.wait()


def test_a_run_an_interrupted_one_a_killed_one(swarm, environment, data, tmp_path, capsys):
    """The two that are stopped are processes of their own."""
    whole = finished(capsys, tuning(swarm, data, tmp_path / "whole"))
    losses = [event["loss"] for event in of(whole, "step")]
    assert [event["step"] for event in of(whole, "step")] == list(range(1, 17))
    assert [event["step"] for event in of(whole, "eval")] == [0, 4, 8, 12, 16]
    assert [event["step"] for event in of(whole, "saved")] == [4, 8, 12, 16]
    assert all(event["tokens_per_s"] > 0 for event in of(whole, "step"))
    assert whole[-1]["event"] == "done"
    assert whole[-1]["loss"] == losses[-1]
    assert of(whole, "eval")[-1]["loss"] < of(whole, "eval")[0]["loss"]
    assert of(whole, "saved")[0]["dir"] == str(tmp_path / "whole")

    out = tmp_path / "stopped"
    seldom = ["--save-every", "100"]
    events, code = stopped_at(tuning(swarm, data, out, *seldom), environment, 3, signal.SIGINT)
    assert code == 130
    assert of(events, "saved")[-1]["step"] >= 2
    events, code = stopped_at(tuning(swarm, data, out, "--resume"), environment, 9, signal.SIGKILL)
    assert code == -signal.SIGKILL
    at = of(events, "resumed")[0]["step"]
    assert of(events, "step")[0]["loss"] == losses[at]
    verb = tuning(swarm, data, out, "--resume", *seldom)
    events, code = stopped_at(verb, environment, 10, signal.SIGHUP)
    assert code == 130
    assert of(events, "resumed")[0]["step"] == 8
    assert of(events, "saved")[-1]["step"] >= 9
    rest = finished(capsys, tuning(swarm, data, out, "--resume"))
    at = of(rest, "resumed")[0]["step"]
    assert [event["loss"] for event in of(rest, "step")] == losses[at:]
    assert rest[-1]["loss"] == whole[-1]["loss"]
    assert rest[-1]["eval_loss"] == whole[-1]["eval_loss"]

    verb = ["generate", "demo", "Return", "--join", swarm["invite"], "--json"]
    verb += ["--max-new-tokens", "8"]
    plain = finished(capsys, verb)[-1]
    tuned = finished(capsys, [*verb, "--adapter", str(out)])[-1]
    assert (plain["event"], tuned["event"]) == ("done", "done")
    assert tuned["tokens"] != plain["tokens"]


def fails(capsys, *arguments):
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


def test_bad_input_before_anybody_is_asked(capsys, data, tmp_path):
    verb = ["tune", "demo", "--data", str(data), "--out", str(tmp_path / "out")]
    assert "--join" in fails(capsys, *verb)
    verb += ["--join", PEER]
    assert "no training run to resume" in fails(capsys, *verb, "--resume")
    assert "q_porj" in fails(capsys, *verb, "--target", "q_porj")
    assert "learning rate" in fails(capsys, *verb, "--lr", "nan")
    assert "seed of" in fails(capsys, *verb, "--seed", str(1 << 63))
    assert "too large" in fails(capsys, *verb, "--batch-size", "99999999999")
    assert "no name" in fails(capsys, *verb, "--out", "")
    assert "Nothing can be saved" in fails(capsys, *verb, "--out", str(data / "below"))
    prompt = ["--method", "prompt"]
    assert "nothing to target" in fails(capsys, *verb, *prompt, "--target", "q_proj")
    assert "no room" in fails(capsys, *verb, *prompt, "--prompt-tokens", "2048")
    for method in ("prompt", "deep-prompt"):
        said = fails(capsys, *verb, "--method", method, "--rank", "8")
        assert f"The method {method} trains no matrices" in said
    assert "lora trains no prompt" in fails(capsys, *verb, "--prompt-tokens", "16")
    assert "gone.jsonl" in fails(capsys, *verb, "--eval", str(tmp_path / "gone.jsonl"))
    with data.open("a") as file:
        file.write('{"text": "torn')
    assert "line 13" in fails(capsys, *verb)
    data.write_text('{"messages": [{"role": "assistant", "content": "a"}]}\n')
    assert "no chat template" in fails(capsys, *verb)
    assert not (tmp_path / "out").exists()
    (tmp_path / "adapter_config.json").touch()
    assert "already" in fails(capsys, *verb, "--out", str(tmp_path))


@pytest.mark.parametrize("missing", ["--data", "--out"])
def test_flags_that_must_be_there(capsys, missing):
    given = [("--data", "x"), ("--out", "y")]
    flags = [word for pair in given if pair[0] != missing for word in pair]
    with pytest.raises(SystemExit) as caught:
        main(["tune", "demo", *flags])
    assert caught.value.code == 2
    assert missing in capsys.readouterr().err


def test_the_environment_gives_flags_that_must_be_there():
    environ = {"PETALNODE_DATA": "x", "PETALNODE_OUT": "y", "PETALNODE_TARGET": "q_proj v_proj"}
    parsed = parse_arguments(["tune", "demo"], environ)
    assert (parsed.data, parsed.out, parsed.target) == ("x", "y", ["q_proj", "v_proj"])


def test_sentences_for_a_person(capsys):
    arguments = parse_arguments(["tune", "demo", "--data", "x", "--out", "y"], {})
    report = Reporter(arguments)
    report(TuningData("x", 1200, 5000, 4000, 3, 2))
    for step in (9, 10):
        report(TuningStep(step, 20, 2.5, 812.4, 0.01, 75.0))
    report(TuningEval(10, 3.25))
    report(TuningDone(2.0, 3.0, 20))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "x: 1,200 examples, 4,000 of 5,000 tokens to learn; 3 cut to the context; 2 dropped, "
        "their prompts alone fill it",
        "step 10/20: loss 2.500, 812 tokens/s, 75 s left",
        "step 10: validation loss 3.2500",
        "20 steps done: last loss 2.0000, validation loss 3.0000",
        "use it: petalnode generate demo PROMPT --adapter y --join JOIN",
    ]


def test_sentences_of_one(capsys):
    report = Reporter(parse_arguments(["tune", "demo", "--data", "x", "--out", "y"], {}))
    report(TuningData("x", 1, 2, 1, 1, 1))
    report(TuningDone(2.0, None, 1))
    report(Draining(1))
    report(Moving((0, 2), (2, 4), sessions=1))
    assert capsys.readouterr().err.splitlines() == [
        "x: 1 example, 1 of 2 tokens to learn; 1 cut to the context; 1 dropped, its prompt alone "
        "fills it",
        "1 step done: last loss 2.0000",
        "use it: petalnode generate demo PROMPT --adapter y --join JOIN",
        "draining: 1 session open; Ctrl-C again to stop at once",
        "moving from blocks 0:2 to blocks 2:4, which the swarm needs more, once 1 session has "
        "ended",
    ]


def test_a_validation_is_shown_as_steps_are(capsys, monkeypatch):
    verb = ["tune", "demo", "--data", "x", "--out", "y", "--batch-size", "2"]
    report = Reporter(parse_arguments(verb, {}))
    for done in (*range(2, 60, 2), 59):
        report(TuningValidating(25, done, 59))
    said = [f"step 25: validation, {done} of 59 examples" for done in (20, 40)]
    assert capsys.readouterr().err.splitlines() == said
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    report(TuningValidating(25, 12, 1000))
    report(TuningEval(25, 3.25))
    said = f"\r{'░' * 24} step 25: validation, 12 of 1,000 examples\x1b[K"
    assert capsys.readouterr().err == f"{said}\nstep 25: validation loss 3.2500\n"
    report = Reporter(parse_arguments([*verb, "--json"], {}))
    report(TuningValidating(25, 12, 59))
    said = {"event": "validating", "step": 25, "done": 12, "total": 59}
    assert json.loads(capsys.readouterr().out) == said


def test_a_wait_is_told_to_a_tenth_of_a_second(capsys):
    report = Reporter(parse_arguments(["tune", "demo", "--data", "x", "--out", "y", "--json"], {}))
    report(Waiting("Nobody serves block 2.", 99.98765))
    assert json.loads(capsys.readouterr().out)["for_s"] == 100.0
    report(Waiting("Nobody serves block 2.", 12.3456))
    assert json.loads(capsys.readouterr().out)["for_s"] == 12.3


def test_what_was_made_for_nothing_goes_again(capsys, data, tmp_path):
    """Nobody listens at that address."""
    out = tmp_path / "new" / "out"
    verb = ["tune", "demo", "--join", PEER, "--data", str(data), "--out", str(out)]
    assert main(verb) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert not out.parent.exists()


def test_a_terminal_that_closes_ends_it_as_a_signal_does():
    heard = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert hanging_up() == (signal.SIGHUP,)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert hanging_up() == ()
    finally:
        signal.signal(signal.SIGHUP, heard)


def test_a_hop_that_is_lost_is_told(capsys):
    lost = HopLost("peer-abcdef", (2, 5), "The peer is gone.")
    verb = ["tune", "demo", "--data", "x", "--out", "y"]
    Reporter(parse_arguments(verb, {}))(lost)
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[0]) == (
        "",
        "lost …abcdef, which trained blocks 2:5: The peer is gone.",
    )
    Reporter(parse_arguments([*verb, "--json"], {}))(lost)
    out, err = capsys.readouterr()
    said = {"event": "lost", "peer_id": "peer-abcdef", "blocks": [2, 5], "why": "The peer is gone."}
    assert (json.loads(out), err) == (said, "")


def test_two_runs_do_not_share_a_directory(capsys, data, tmp_path, monkeypatch):
    out = tmp_path / "out"

    async def other_run(*_):
        with claimed(out):
            pass

    monkeypatch.setattr(tune, "train", other_run)
    verb = ["tune", "demo", "--join", PEER, "--data", str(data), "--out", str(out)]
    assert "Another run is saving in" in fails(capsys, *verb)


def test_the_guide_names_flags_that_there_are():
    guide = (Path(__file__).parents[2] / "docs" / "fine-tuning.md").read_text()
    verbs = build_parser("", {})._actions[-1].choices
    there = {flag for name in ("tune", "generate") for flag in verbs[name]._option_string_actions}
    named = set(re.findall(r"--[a-z][a-z-]+", guide)) - {"--"}
    assert {"--resume", "--target", "--save-every"} <= named <= there


@pytest.mark.parametrize(("seconds", "said"), [(0, "0 s"), (99, "99 s"), (120, "2 min")])
def test_durations(seconds, said):
    assert duration(seconds) == said
    assert duration(12_000) == "3 h 20 min"
