"""What people and programs see of events."""

import json
import sys
from collections import Counter
from types import SimpleNamespace

import trio

from petalnode import events
from petalnode.cli.generate import done
from petalnode.cli.output import CLEAR_TO_END, SearchDone, end_progress, print_human, print_json
from petalnode.cli.run import REFUSALS_EVERY_S, tell_refusals

MEMORY = {"weights": 2**20, "peak": 2**21}
EVENTS = [
    events.Listening("peer-abcdef", ["/ip4/127.0.0.1/tcp/1/p2p/peer-abcdef"], "pn1:x"),
    events.Loading((0, 4), 1, 4),
    events.Ready("peer-abcdef", (0, 4), "demo", {"decode": 5.0, "forward": 9.0}, MEMORY, ["law@1"]),
    events.Draining(2),
    events.Refused({"size": 1, "flood": 7}),
    events.Stopped(),
    events.Waiting("Block 3 is served by nobody.", 20.0),
    events.Route([events.HopInfo("peer-abcdef", (0, 4), 1.5), events.HopInfo("b", (4, 8), None)]),
    events.TokenEvent(5, "def", 7, 1.5),
    events.Done([5], "def", 20.0, 50.0, "length"),
]


def test_json_is_one_object_a_line_named_by_its_event(capsys):
    for event in EVENTS:
        print_json(event)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == [event.event for event in EVENTS]
    assert lines[0]["invite"] == "pn1:x"
    assert lines[7]["hops"][0] == {"peer_id": "peer-abcdef", "blocks": [0, 4], "rtt_ms": 1.5}


def test_the_rate_of_a_search_is_over_the_whole_time(capsys):
    """Its tokens come when all beams agree on them, most of them at its end."""
    print_human(events.Done([5, 6], "def", 20.0, 50.0, "length"))
    assert capsys.readouterr().err == "2 tokens (length), first after 20 ms, then 50.0 tokens/s\n"
    for beams, kind, rate in ((1, events.Done, 50.0), (3, SearchDone, 2.0)):
        told = done(generation(beams), 2.5)
        assert (type(told), told.tokens_per_s) == (kind, rate)
        assert told.to_json()["event"] == "done"
    print_human(told)
    assert capsys.readouterr().err == (
        "5 tokens (length), first after 2500 ms, 2.0 tokens/s in all\n"
    )


def generation(beams):
    options = SimpleNamespace(num_beams=beams)
    numbers = {"ttft_s": 2.5, "tokens_per_s": 50.0}
    return SimpleNamespace(
        options=options, tokens=[1] * 5, text="", finish_reason="length", **numbers
    )


def test_only_the_text_goes_to_stdout(capsys):
    for event in EVENTS:
        print_human(event)
    out, err = capsys.readouterr()
    assert out == "def\n"
    for words in (
        "--join pn1:x",
        "…abcdef (blocks 0:4, 1.5 ms)",
        "Block 3",
        "2 sessions",
        "; offers law@1",
        "7 flood, 1 size",
    ):
        assert words in err


def test_progress_keeps_to_its_line_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    print_human(events.Downloading("a.safetensors", 1_000_000, 4_000_000))
    print_human(events.Downloading("b", 2_000_000, 4_000_000))
    print_human(events.Stopped())
    print_human(events.Loading((0, 4), 1, 4))
    end_progress()
    print_human(events.Loading((0, 4), 4, 4))
    end_progress()
    err = capsys.readouterr().err
    assert f"2 of 4 MB 50 % (b){CLEAR_TO_END}\nstopped\n\rloading" in err
    assert f"1/4{CLEAR_TO_END}\n\rloading" in err
    assert err.endswith(f"4/4{CLEAR_TO_END}\n")


def test_progress_is_for_terminals(capsys):
    print_human(events.Downloading("a.safetensors", 1, 4))
    print_human(events.Loading((0, 4), 1, 4))
    end_progress()
    assert capsys.readouterr().err == ""


async def test_what_a_node_refuses_is_told_when_there_is_more_of_it(autojump_clock):
    refused, told = Counter(), []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tell_refusals, refused, told.append)
        await trio.sleep(2.5 * REFUSALS_EVERY_S)
        assert told == []
        refused["flood"] += 3
        await trio.sleep(2 * REFUSALS_EVERY_S)
        refused["size"] += 1
        await trio.sleep(2 * REFUSALS_EVERY_S)
        nursery.cancel_scope.cancel()
    assert told == [events.Refused({"flood": 3}), events.Refused({"flood": 3, "size": 1})]
