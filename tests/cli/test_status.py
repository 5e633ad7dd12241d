"""What ``petalnode status`` shows to people and programs, once and while it watches."""

import json
import time
from argparse import Namespace
from dataclasses import replace

import pytest
import trio

from petalnode.cli import status
from petalnode.cli.output import print_human, print_json
from petalnode.cli.status import CLEAR, END_LINE, END_SCREEN, HOME, Screen, report_for, watch
from petalnode.cli.swarm_table import about, bar, columns, counted, ranges, swarm_lines
from petalnode.errors import PeerUnreachable, SwarmMismatch
from petalnode.joining import parse_joins
from petalnode.node import NodeOptions, open_node
from petalnode.p2p.envelope import seal
from petalnode.p2p.hello import Hello
from petalnode.p2p.invite import Invite
from petalnode.routing.view import Sighting
from petalnode.survey import describe_swarm, open_survey, valid_records

from ..p2p.records import FINGERPRINT, WALL, identity
from ..p2p.records import record as signed
from ..routing.records import record

RECORDS = [
    record("aaaaaa", 0, 4, adapters=("poet",), kv_tokens_free=512),
    record("bbbbbb", 4, 8, name="attic"),
    record("cccccc", 4, 6, quant="nf4", decode_tps=0.1, forward_tps=0.1),
    record("dddddd", 0, 8, state="draining", moving_to=(2, 8)),
]


def described(records=RECORDS, blocks=8, rtts=None, refused=()):
    rtts = rtts or {"aaaaaa": 0.001, "bbbbbb": 0.002}
    return describe_swarm("demo", blocks, records, rtts, dict(refused))


def test_every_peer_is_used_or_told_why_not():
    swarm = described()
    assert swarm.covered
    uses = {peer.peer_id: peer.use for peer in swarm.peers}
    assert uses["aaaaaa"] == "used for blocks 0 to 3"
    assert uses["bbbbbb"] == "used for blocks 4 to 7"
    assert uses["cccccc"].startswith("slower: ")
    assert uses["dddddd"] == "it is draining"
    assert {unused.peer_id: unused.why for unused in swarm.not_used} == {
        peer_id: uses[peer_id] for peer_id in ("cccccc", "dddddd")
    }


def test_people_see_bars_copies_and_reasons(capsys):
    print_human(described())
    head, copies, *peers = capsys.readouterr().out.splitlines()
    assert head == "demo: 8 blocks, 4 peers, covered"
    assert copies.split() == ["copies", "11112211"]
    assert len(peers) == 8
    assert peers[0] == "  …aaaaaa ████···· 0:4 online   aaaaaa"
    assert peers[1].split()[:6] == ["1.0", "ms", "10.0", "tok/s", "512", "kv"]
    assert peers[1].endswith("adapter poet  used for blocks 0 to 3")
    assert peers[2].endswith("attic")
    assert peers[5].strip().startswith("? ms")
    assert "nf4  slower: " in peers[5]
    assert peers[6].split()[2:4] == ["0:8", "draining"]
    assert peers[7].endswith("moving to 2:8  it is draining")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (1000, "1.0k"), (1 << 20, "1.0M"), (3e9, "3.0G")]
)
def test_large_numbers_are_rounded(count, text):
    assert about(count) == text


def test_programs_see_the_same(capsys):
    print_json(described())
    seen = json.loads(capsys.readouterr().out)
    assert (seen["event"], seen["model"], seen["blocks"], seen["covered"]) == (
        "swarm",
        "demo",
        8,
        True,
    )
    assert seen["copies"] == [1, 1, 1, 1, 2, 2, 1, 1]
    peer = seen["peers"][0]
    assert peer["rtt_ms"] == 1.0
    assert (peer["peer_id"], peer["name"], peer["state"], peer["blocks"]) == (
        "aaaaaa",
        "aaaaaa",
        "online",
        [0, 4],
    )
    assert (peer["throughput"], peer["kv_tokens_free"], peer["quant"]) == (10.0, 512, "none")
    assert [set(unused) for unused in seen["not_used"]] == [{"peer_id", "why"}] * 2


def test_holes_are_named():
    swarm = described([record("a", 0, 3), record("b", 6, 7)])
    assert not swarm.covered
    first, copies, *_ = swarm_lines(swarm)
    assert first.endswith("NOT covered: nobody serves 3:6, 7:8")
    assert copies.split()[-1] == "11100010"
    assert "Blocks 3 to 5 and block 7" in swarm.not_used[0].why


def test_refusals_are_counted_the_most_frequent_first(capsys):
    print_human(described(refused={"size": 1, "flood": 12, "stale": 1}))
    line = capsys.readouterr().out.splitlines()[1]
    assert line == "  refused: 12 flood, 1 size, 1 stale"
    assert counted({}) == ""


def test_nobody_is_there():
    assert swarm_lines(described([record("a", 0, 1)], blocks=1))[0] == (
        "demo: 1 block, 1 peer, covered"
    )
    first, copies = swarm_lines(described([]))
    assert "0 peers, NOT covered: nobody serves 0:8" in first
    assert copies.split()[-1] == "0" * 8


def test_a_deep_model_fits_the_width():
    assert columns(80, 48)[0] == (0, 1)
    assert columns(80, 48)[-1][1] == 80
    assert len(bar(0, 80, 80, 48)) == 48
    assert bar(0, 80, 80, 48) == "█" * 48
    assert bar(0, 1, 96, 48) == "▌" + "·" * 47
    assert ranges([0, 1, 5]) == "0:2, 5:6"


class Terminal:
    """Keeps what was written; so many columns and rows."""

    def __init__(self, columns=80, rows=24):
        self.text = ""
        self.size = (columns, rows)

    def write(self, text):
        self.text += text


def test_a_terminal_is_drawn_over_and_never_scrolls():
    terminal = Terminal(columns=30, rows=5)
    screen = Screen(terminal.write, lambda: terminal.size)
    assert terminal.text == CLEAR
    for _ in range(2):
        terminal.text = ""
        screen(described())
        assert terminal.text.startswith(HOME)
        assert terminal.text.endswith(END_SCREEN)
        lines = terminal.text.removeprefix(HOME).removesuffix(END_SCREEN).splitlines()
        assert len(lines) == 4
        assert all(len(line.removesuffix(END_LINE)) <= 30 for line in lines)
        assert lines[-1].startswith("… 7 more lines")


@pytest.mark.parametrize(("as_json", "expected"), [(True, print_json), (False, print_human)])
def test_what_is_no_terminal_gets_lines(as_json, expected, capsys):
    assert report_for(Namespace(watch=True, json=as_json)) is expected


async def serve(model, options, ends, task_status):
    async with open_node(model, options) as node:
        task_status.started(node)
        await ends.wait()


async def test_watching_goes_on_when_the_contact_dies(tiny_checkpoint, monkeypatch, tmp_path):
    """It asks the others, and waits when there is nobody left."""
    monkeypatch.setattr(status, "WATCH_INTERVAL_S", 0.01)
    model = str(tiny_checkpoint())
    seen = {1: trio.Event(), 2: trio.Event()}
    told, first_ends, second_ends = trio.Event(), trio.Event(), trio.Event()

    def note(text):
        assert "Asking again" in text
        told.set()

    monkeypatch.setattr(status, "note", note)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            options = [
                NodeOptions(blocks=(0, 4), host="127.0.0.1", identity=tmp_path / name)
                for name in ("first", "second")
            ]
            first = await nursery.start(serve, model, options[0], first_ends)
            joining = replace(options[1], join=(first.invite,))
            await nursery.start(serve, model, joining, second_ends)
            joins = parse_joins([first.invite])
            nursery.start_soon(watch, joins, None, lambda swarm: seen[len(swarm.peers)].set())
            await seen[2].wait()
            seen[1] = trio.Event()
            first_ends.set()
            await seen[1].wait()
            second_ends.set()
            await told.wait()
            nursery.cancel_scope.cancel()


async def test_the_first_look_fails_as_any_verb_does():
    nobody = parse_joins(
        ["/ip4/127.0.0.1/tcp/1/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"]
    )
    async with open_survey(nobody, None) as survey:
        with pytest.raises(PeerUnreachable, match="No contact"):
            await survey.look()


def told(*said):
    """What a contact answers that knows, or made up, these records; each a (number, changes)."""
    sightings = []
    for number, age_s, changes in said:
        who = identity(number)
        sightings.append(Sighting(seal(who, signed(who, **changes)), age_s))
    return Hello("home", "demo", FINGERPRINT, 8, tuple(sightings))


def test_each_peer_that_lives_is_shown_once_whatever_the_contact_says():
    hello = told(
        (1, 0.0, {"seq": 1}),
        (1, 0.0, {"seq": 3, "end": 6}),
        (1, 0.0, {"seq": 2}),
        (2, 31.0, {}),  # outlived its 30 s there
        (3, 0.0, {"state": "offline"}),
        (4, 0.0, {"end": 9}),
        (5, 0.0, {"moving_to": (0, 9)}),
        (6, 0.0, {"fingerprint": "f" * 32}),
    )
    records, refused = valid_records(hello, WALL)
    assert [(a.peer_id, a.seq) for a in records] == [(identity(1).peer_id, 3)]
    assert refused == {"stale": 1, "expired": 1, "span": 2, "fingerprint": 1}


async def test_who_has_a_wrong_clock_is_told_why_nobody_is_shown(tmp_path, capsys):
    options = NodeOptions(
        blocks=(0, 4), host="127.0.0.1", identity=tmp_path / "key", device="cpu", dtype="float32"
    )
    async with open_node("demo", options) as node:
        joins = parse_joins([node.invite])
        async with open_survey(joins, None, lambda: time.time() - 3600) as survey:
            swarm = await survey.look()
    assert (swarm.peers, swarm.refused) == ([], {"future": 1})
    print_human(swarm)
    assert "refused: 1 future (is this machine's clock right?)" in capsys.readouterr().out


async def test_a_contact_that_belongs_elsewhere_by_now_is_not_taken_for_the_swarm(tmp_path):
    options = NodeOptions(
        blocks=(0, 4), host="127.0.0.1", identity=tmp_path / "key", device="cpu", dtype="float32"
    )
    async with open_node("demo", options) as node:
        (now,) = parse_joins([node.invite])
        before = Invite("another network", now.model, now.fingerprint, now.addrs)
        async with open_survey([before], None) as survey:
            with pytest.raises(SwarmMismatch, match="another network"):
                await survey.look()
