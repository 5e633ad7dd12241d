"""A decode step of one session, with and without another session's prefills on the same nodes."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.checkpoints import checkpoint
from benchmarks.processes import open_swarm, open_worker
from benchmarks.report import Result, Table, figure, percentile
from benchmarks.rounds import gaps_ms

SPANS = {"tiny": ("0:4", "4:8"), "246M": ("0:8", "8:16")}
PREFIX, BULK_TOKENS = 128, 1024
STEPS = {"tiny": 100, "246M": 16}
FLOOD_S = {"tiny": 4.0, "246M": 6.0}


def run(quick: bool) -> Result:
    """Both models, the second one not in a quick run."""
    result = Result(f"Isolation: decode beside prefills of {BULK_TOKENS} tokens in a loop, 2 nodes")
    head = ("", "p50 ms alone", "p99 alone", "p50 beside", "p99 beside", "p99 ratio", "prefills/s")
    rows = [measure(name, quick, result) for name in (["tiny"] if quick else SPANS)]
    result.tables.append(Table(head, rows))
    result.notes.append(
        "The nodes take at most 64 tokens of prefill in a turn while a session decodes, and small "
        "frames go ahead of bulk on the wire. What is left: at each node the rest of a running "
        "turn, the 64 tokens that share the step's own turn, and cores that four processes share."
    )
    return result


def measure(name: str, quick: bool, result: Result) -> list[str]:
    """Alone and beside, in turns; one row of the table."""
    model = checkpoint(name)
    alone: list[float] = []
    beside: list[float] = []
    prefills, rounds = 0, 1 if quick else 2
    with ExitStack() as stack:
        swarm = stack.enter_context(open_swarm(model, SPANS[name]))
        decoder, bulk = (stack.enter_context(open_worker("swarm", model, swarm)) for _ in range(2))
        bulk.ask(do="prefill", tokens=BULK_TOKENS)
        decoder.ask(do="prefill", tokens=PREFIX)
        for _ in range(rounds):
            alone += gaps_ms(decoder.ask(do="decode", steps=STEPS[name])["at"])
            bulk.tell(do="flood", tokens=BULK_TOKENS, seconds=FLOOD_S[name])
            beside += gaps_ms(decoder.ask(do="decode", steps=STEPS[name])["at"])
            prefills += bulk.hear()["prefills"]
    shares = [percentile(taken, share) for taken in (alone, beside) for share in (0.5, 0.99)]
    result.values |= {f"{name}_p99_alone": shares[1], f"{name}_p99_beside": shares[3]}
    shown = [figure(ms) for ms in shares]
    return [name, *shown, figure(shares[3] / shares[1]), figure(prefills / rounds / FLOOD_S[name])]
