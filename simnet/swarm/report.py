"""A finished run in words and pictures, or as one JSON object."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from petalnode.simnet.swarm.chart import WIDTH, columns_chart, sparkline, squeeze
from petalnode.simnet.swarm.measure import Meter, Summary, summarize
from petalnode.simnet.swarm.scenario import Scenario


def text_report(scenario: Scenario, policy: str, seed: int, meter: Meter) -> str:
    """What a person reads."""
    summary = summarize(meter, scenario.steady_from_s)
    samples = meter.samples
    ruler = _ruler(scenario.duration_s, min(WIDTH, len(samples)))
    return "\n".join(
        [
            scenario.title,
            f"rule {policy}, seed {seed}: {scenario.blocks} blocks, "
            f"{max(sample.present for sample in samples)} machines at most",
            "",
            "throughput (columns, tokens/s) and the bound for the machines that are there (line)",
            *columns_chart([s.tps for s in samples], [s.bound for s in samples]),
            ruler,
            *_strip("machines online", [float(sample.online) for sample in samples]),
            *_strip("copies of the least held block", [float(s.copies) for s in samples]),
            *_strip("machines on the move", [float(sample.moving) for sample in samples]),
            *_strip("copies of each block at the end", [float(n) for n in meter.replicas]),
            "",
            *_sentences(scenario, summary),
        ]
    )


def json_report(scenario: Scenario, policy: str, seed: int, meter: Meter) -> dict[str, Any]:
    """What a program reads: the same numbers."""
    return {
        "event": "simulated",
        "title": scenario.title,
        "rule": policy,
        "seed": seed,
        "blocks": scenario.blocks,
        "summary": asdict(summarize(meter, scenario.steady_from_s)),
        "samples": [asdict(sample) | {"share": sample.share} for sample in meter.samples],
        "copies": meter.replicas,
    }


def _strip(what: str, values: Sequence[float]) -> list[str]:
    means = squeeze(values, WIDTH)
    low, high = min(means), max(means)
    return ["", f"{what}: {low:.3g} to {high:.3g}", " " * 10 + sparkline(values)]


def _ruler(duration_s: float, width: int) -> str:
    """The time axis below a chart."""
    end = f"{duration_s:.0f} s"
    return " " * 9 + "└" + "0 s".ljust(width - len(end), "─") + end


def _sentences(scenario: Scenario, s: Summary) -> list[str]:
    return [
        f"From {scenario.steady_from_s:.0f} s on the swarm carries {s.share:.1%} of the bound in "
        f"the mean, {s.worst_share:.1%} at worst.",
        f"{s.moves} moves loaded {s.blocks_loaded} blocks; at most {s.most_moving:.1%} of the "
        f"machines moved at once; {s.moves_given_up} moves were given up.",
        f"{s.sessions} sessions over {s.hops:.1f} hops in the mean: {s.dropped_by_moves} dropped "
        f"by moves, {s.migrated} moved to other machines first; deaths and departures: "
        f"{s.recovered} hops replaced, {s.lost_to_deaths} sessions lost; {s.refused} found no "
        "chain.",
        f"Digest of all events: {s.digest}.",
    ]
