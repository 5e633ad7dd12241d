"""Gossip: what one message costs, measured, and what that makes of large swarms, modelled."""

from __future__ import annotations

import statistics

from benchmarks.gossip_cost import MESSAGES, TRANSPORT_BYTES, Measured, measure
from benchmarks.report import Result, Table, Target
from petalnode.p2p.gossip import PUSHES_PER_S
from petalnode.simnet.swarm.gossip import Costs, Spread, load, longest_life_over, spread

SIZES = (100, 1000, 10_000)
SEEDS, QUICK_SEEDS = 10, 2
LIFE_S = 3600.0
DEATH_LIMIT_S, BYTES_LIMIT, CPU_LIMIT = 30.0, 5000.0, 0.05


def run(quick: bool) -> Result:
    """All sizes; of the largest fewer seeds, as it takes seconds each."""
    measured = measure(MESSAGES // 3 if quick else MESSAGES)
    costs = costs_of(measured)
    spreads = {size: _spreads(size, quick or size > 1000) for size in SIZES}
    return Result(
        "Gossip: one message measured, large swarms modelled",
        tables=[_message_table(measured), _spread_table(spreads), _load_table(spreads, costs)],
        targets=[target for size in SIZES for target in _targets(size, *spreads[size], costs)],
        notes=_notes(measured),
        values={"message": measured, "spread": {str(size): spreads[size] for size in SIZES}},
    )


def costs_of(measured: Measured) -> Costs:
    """The model's costs, as measured."""
    return Costs(
        measured.cpu_s,
        measured.copy_cpu_s,
        measured.message_bytes,
        measured.id_bytes,
        measured.rpc_bytes,
    )


def _spreads(size: int, few: bool) -> tuple[Spread, Spread]:
    """Pushed, and offered: the slowest of all seeds, the mean of copies and ids."""
    seeds = range(QUICK_SEEDS if few else SEEDS)
    return (
        _worst([spread(size, seed, pushed=True) for seed in seeds]),
        _worst([spread(size, seed, pushed=False) for seed in seeds]),
    )


def _worst(each: list[Spread]) -> Spread:
    return Spread(
        max(s.news_s for s in each),
        max(s.death_s for s in each),
        statistics.mean(s.copies for s in each),
        statistics.mean(s.ids for s in each),
    )


def _message_table(measured: Measured) -> Table:
    rows = [
        ["CPU, a message that is new", f"{1000 * measured.cpu_s:.2f} ms"],
        ["CPU, a further copy of it", f"{1000 * measured.copy_cpu_s:.2f} ms"],
        ["CPU, stock GossipSub, new", f"{1000 * measured.stock_cpu_s:.2f} ms"],
        ["a record, signed", f"{measured.record_bytes} B"],
        ["a message with it", f"{measured.message_bytes} B"],
        ["its id, offered", f"{measured.id_bytes} B"],
        ["around each RPC", f"{measured.rpc_bytes} B"],
    ]
    rows += [[f"CPU: {part}", f"{share:.0%}"] for part, share in measured.parts.items()]
    return Table(["one message", "cost"], rows, "what one message costs a node")


def _spread_table(spreads: dict[int, tuple[Spread, Spread]]) -> Table:
    rows = [
        [
            f"{size:,}, {how}",
            f"{each.news_s:.2f}",
            f"{each.death_s:.1f}",
            f"{each.copies:.1f}",
            f"{each.ids:.1f}",
        ]
        for size, both in spreads.items()
        for how, each in zip(("pushed", "offered"), both, strict=True)
    ]
    return Table(
        ["nodes", "news s", "death s", "copies", "ids"], rows, "until all views agree, slowest seed"
    )


def _load_table(spreads: dict[int, tuple[Spread, Spread]], costs: Costs) -> Table:
    rows = []
    for size, both in spreads.items():
        calm, busy = load(size, *both, costs=costs), load(size, *both, LIFE_S, costs)
        limit_h = longest_life_over(size, *both, BYTES_LIMIT, costs) / 3600
        cells = [f"{size:,}"]
        for each in (calm, busy):
            cells += [f"{each.messages:.2f}", f"{each.bytes / 1000:.1f}", f"{each.cpu:.2%}"]
        rows.append([*cells, f"{limit_h:.1f}"])
    head = ["nodes", "msg/s", "KB/s", "CPU", "msg/s, 1 h", "KB/s, 1 h", "CPU, 1 h", "5 KB/s at h"]
    return Table(head, rows, "each node, calm and with churn")


def _targets(size: int, pushed: Spread, offered: Spread, costs: Costs) -> list[Target]:
    calm = load(size, pushed, offered, costs=costs)
    busy = load(size, pushed, offered, LIFE_S, costs)
    who = f"{size:,} nodes"
    return [
        Target(f"{who}, a death known to all, offered", offered.death_s, DEATH_LIMIT_S, " s"),
        Target(f"{who}, sent and received, calm", calm.bytes, BYTES_LIMIT, " B/s"),
        Target(f"{who}, sent and received, lives of 1 h", busy.bytes, BYTES_LIMIT, " B/s"),
        Target(f"{who}, CPU, lives of 1 h", 100 * busy.cpu, 100 * CPU_LIMIT, " %"),
    ]


def _notes(measured: Measured) -> list[str]:
    return [
        "News (a join, a goodbye): until the last view has it. A death without a word: until the "
        f"last view has dropped it. A node pushes {PUSHES_PER_S:g} messages/s in the long run and "
        "offers the rest. Calm: beats alone; 1 h: nodes stay an hour in the mean; the last column "
        "is the mean stay, in hours, from which on a node stays within 5 KB/s.",
        "Bytes are those sent and received together, with the headers of yamux, Noise, TCP and IP "
        f"({TRANSPORT_BYTES} B an RPC); the pings of connections come on top. CPU of a message "
        "includes what the peers in the same process spend on sending and hearing it; its parts "
        "are of a profile, which takes longer.",
        f"Stock GossipSub beside ours, the same messages: "
        f"{measured.stock_cpu_s / measured.cpu_s:.1f} × the CPU.",
    ]
