"""Gossip in large swarms, by the model in ``petalnode.simnet.swarm.gossip``."""

from __future__ import annotations

import statistics

from benchmarks.report import Result, Table, Target
from petalnode.simnet.swarm.gossip import Costs, load, spread

SIZES = (100, 1000, 10_000)
SEEDS, QUICK_SEEDS = 10, 2
LIFE_S = 3600.0
DEATH_LIMIT_S, BYTES_LIMIT, CPU_LIMIT = 30.0, 5000.0, 0.05


def run(quick: bool) -> Result:
    """All sizes; of the largest fewer seeds, as it takes seconds each."""
    rows, targets, values = [], [], {}
    for size in SIZES:
        seeds = QUICK_SEEDS if quick or size > 1000 else SEEDS
        spreads = [spread(size, seed) for seed in range(seeds)]
        news = max(each.news_s for each in spreads)
        death = max(each.death_s for each in spreads)
        copies = statistics.mean(each.copies for each in spreads)
        calm, busy = load(size, copies), load(size, copies, LIFE_S)
        rows.append(
            [
                f"{size:,}",
                f"{news:.2f}",
                f"{death:.1f}",
                f"{copies:.1f}",
                f"{calm.messages:.2f}",
                f"{calm.received_bytes / 1000:.1f}",
                f"{calm.cpu:.2%}",
                f"{busy.messages:.2f}",
                f"{busy.received_bytes / 1000:.1f}",
                f"{busy.cpu:.2%}",
            ]
        )
        targets += [
            Target(f"{size:,} nodes, a death known to all", death, DEATH_LIMIT_S, " s"),
            Target(f"{size:,} nodes, received, calm", calm.received_bytes, BYTES_LIMIT, " B/s"),
            Target(
                f"{size:,} nodes, received, lives of 1 h", busy.received_bytes, BYTES_LIMIT, " B/s"
            ),
            Target(f"{size:,} nodes, CPU, lives of 1 h", 100 * busy.cpu, 100 * CPU_LIMIT, " %"),
        ]
        values[str(size)] = {"news_s": news, "death_s": death, "copies": copies}
    head = ["nodes", "news s", "death s", "copies", "msg/s", "KB/s", "CPU"]
    head += ["msg/s, 1 h", "KB/s, 1 h", "CPU, 1 h"]
    costs = Costs()
    return Result(
        "Gossip: the model of large swarms",
        tables=[Table(head, rows, "the slowest of all seeds; each node, calm and with churn")],
        targets=targets,
        notes=[
            "News (a join, a goodbye): until the last view has it. A death without a word: until "
            "the last view has dropped it. Received; as much is sent. Calm: beats alone; 1 h: "
            f"nodes stay an hour in the mean. A record is taken as {costs.record_bytes} bytes, a "
            f"message as {1000 * costs.cpu_s:.1f} ms of CPU on each node, its copies included.",
        ],
        values=values,
    )
