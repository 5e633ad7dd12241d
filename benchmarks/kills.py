"""Random kills at random steps, with real processes: the text must be exact every time.

python -m benchmarks.kills [--kills 100] [--seed 0] [--replay-log-tokens N] [--json]

Six nodes hold the bundled model twice; a client generates, and at a random step one or more of the
nodes that it uses get SIGKILL. Every text is compared with what ``transformers`` makes of the same
prompt in float32. Exit code 1 if one differs or is lost.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from random import Random
from statistics import median
from typing import Any

import trio

from benchmarks.casualties import (
    PROMPT_TOKENS,
    Casualty,
    Ward,
    local_tokens,
    open_ward,
    progress,
    prompt,
)
from petalnode.errors import PetalnodeError
from petalnode.events import Event, Recovered, Waiting
from petalnode.node import Node, NodeOptions, open_node
from petalnode.session.session import GenerateOptions, Session

NEW_TOKENS = 40
GENERATION_DEADLINE_S = 150.0
PREFILL_S = 0.15  # within so long after a prompt is sent, a kill hits its prefill
SOON_S = 0.1  # and a second kill so soon after the first hits the replay
CASES = {
    "head": 2,
    "middle": 2,
    "tail": 2,
    "neighbours": 2,
    "all": 1,
    "prefill": 2,
    "replay": 2,
    "rollback": 1,
}
"""What is struck, and how often relative to the others."""


@dataclass(frozen=True)
class Outcome:
    """One generation. ``stall_ms``: from the kill to the next token."""

    case: str
    killed: int
    prefix: int
    step: int
    stall_ms: float
    replayed: int
    exact: bool
    waited: str = ""
    error: str = ""


class Trial:
    """One generation in which something is killed."""

    def __init__(self, ward: Ward, node: Node, rng: Random, case: str, want: list[list[int]]):
        self._ward, self._node, self._rng, self._case = ward, node, rng, case
        self._number = rng.randrange(len(PROMPT_TOKENS))
        self._want = want[self._number]
        self._step = 0 if case == "prefill" else rng.randrange(2, NEW_TOKENS - 2)
        self._events: list[Event] = []
        self._killed: list[Casualty] = []
        self._killed_at = self._next_at = 0.0

    async def run(self) -> Outcome:
        """Generate, kill, compare. Errors are an outcome."""
        tokens: list[int] = []
        error = ""
        try:
            with trio.fail_after(GENERATION_DEADLINE_S):
                async with self._node.open_session(self._events.append) as session:
                    await self._generate(session, tokens)
        except (PetalnodeError, trio.TooSlowError) as lost:
            error = str(lost) or "too slow"
        recovered = [event for event in self._events if isinstance(event, Recovered)]
        return Outcome(
            self._case,
            len(self._killed),
            PROMPT_TOKENS[self._number],
            self._step,
            round((self._next_at - self._killed_at) * 1000, 1),
            sum(event.replayed_tokens for event in recovered),
            tokens == self._want[:NEW_TOKENS] and bool(self._killed) and bool(recovered),
            "; ".join(event.why for event in self._events if isinstance(event, Waiting)),
            error or ("" if recovered else "nothing was lost"),
        )

    async def _generate(self, session: Session, tokens: list[int]) -> None:
        session.tokenizer.eos_ids = frozenset()
        ids = prompt(self._number)
        async with trio.open_nursery() as nursery:
            if self._case == "prefill":
                nursery.start_soon(self._strike_later, session)
            async for token in session.generate(ids, GenerateOptions(NEW_TOKENS)):
                tokens.append(token.id)
                self._note_time()
                if len(tokens) != self._step:
                    continue
                if self._case == "rollback":
                    break
                self._strike(session)
                if self._case == "replay":
                    nursery.start_soon(self._strike_again, session)
            if self._case == "rollback":
                await self._roll_back(session, tokens)
            nursery.cancel_scope.cancel()

    async def _roll_back(self, session: Session, tokens: list[int]) -> None:
        """Forget some tokens, kill, and generate them again."""
        keep = self._rng.randrange(1, len(tokens))
        del tokens[keep:]
        last = tokens[-1]
        session.rollback(PROMPT_TOKENS[self._number] + keep - 1)
        self._strike(session)
        async for token in session.generate([last], GenerateOptions(NEW_TOKENS - keep)):
            tokens.append(token.id)
            self._note_time()

    def _note_time(self) -> None:
        if self._killed_at and not self._next_at:
            self._next_at = time.monotonic()

    async def _strike_later(self, session: Session) -> None:
        await trio.sleep(self._rng.uniform(0, PREFILL_S))
        self._strike(session)

    async def _strike_again(self, session: Session) -> None:
        """Somebody else, while the first loss is being mended."""
        await trio.sleep(self._rng.uniform(0, SOON_S))
        hops = [self._ward.by_peer(hop.peer_id) for hop in session.chain.hops]
        alive = [hop for hop in hops if hop.is_ready and self._ward.may_die([hop])]
        if alive:
            self._kill([self._rng.choice(alive)])

    def _strike(self, session: Session) -> None:
        hops = [self._ward.by_peer(hop.peer_id) for hop in session.chain.hops]
        last = len(hops) - 1
        place = {"head": 0, "tail": last, "middle": last // 2 or last}.get(self._case)
        if place is None:
            place = self._rng.randrange(last + 1)
        victims = [hops[place]]
        if self._case == "neighbours":
            victims = hops[max(0, place - 1) :][:2]
        elif self._case == "all":
            victims = hops
        self._kill([victim for victim in dict.fromkeys(victims) if victim.is_ready])

    def _kill(self, victims: list[Casualty]) -> None:
        self._killed_at = self._killed_at or time.monotonic()
        for victim in victims:
            if self._ward.may_die([victim]):
                self._ward.kill(victim)
                self._killed.append(victim)


async def run(kills: int, seed: int, log_tokens: int | None) -> list[Outcome]:
    """Generation after generation, until so many nodes were killed."""
    arguments = ["--replay-log-tokens", str(log_tokens)] if log_tokens is not None else []
    rng, outcomes = Random(seed), list[Outcome]()
    progress("transformers computes the texts to compare with")
    want = await trio.to_thread.run_sync(local_tokens, NEW_TOKENS)
    async with (
        open_ward(lambda text: None, arguments) as ward,
        open_node("demo", NodeOptions(join=(ward.invite,))) as node,
    ):
        progress("the nodes are ready")
        while (done := sum(outcome.killed for outcome in outcomes)) < kills:
            await ward.all_ready()
            await until_seen(node, {one.peer_id for one in ward.nodes})
            (case,) = rng.choices(list(CASES), list(CASES.values()))
            outcomes.append(await Trial(ward, node, rng, case, want).run())
            progress(line(done + outcomes[-1].killed, outcomes[-1]))
    return outcomes


async def until_seen(node: Node, peers: set[str]) -> None:
    """Until the client's view has all of these online."""
    with trio.fail_after(60):
        while not peers <= {a.peer_id for a in node.swarm.live() if a.state == "online"}:
            with trio.move_on_after(1.0):
                await node.swarm.wait_changed()


def line(number: int, outcome: Outcome) -> str:
    """One generation as a line of the table."""
    verdict = "exact" if outcome.exact else f"WRONG {outcome.error}"
    return (
        f"{number:4} {outcome.case:10} killed {outcome.killed} at token {outcome.step:2} after "
        f"{outcome.prefix:4}: stall {outcome.stall_ms:7.1f} ms, {outcome.replayed:5} replayed by "
        f"the client, {verdict}" + (f" (waited: {outcome.waited})" if outcome.waited else "")
    )


def table(outcomes: list[Outcome]) -> str:
    """By case: how many, how many exact, stalls."""
    by_case: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_case[outcome.case].append(outcome)
    rows = [
        "| case | texts | kills | exact | stall ms, median | worst |",
        "|---|---|---|---|---|---|",
    ]
    for case, group in [*sorted(by_case.items()), ("all together", outcomes)]:
        stalls = [outcome.stall_ms for outcome in group]
        rows.append(
            f"| {case} | {len(group)} | {sum(o.killed for o in group)} | "
            f"{sum(o.exact for o in group)} | {median(stalls):.0f} | {max(stalls):.0f} |"
        )
    return "\n".join(rows)


def report(outcomes: list[Outcome]) -> dict[str, Any]:
    """For --json."""
    return {
        "kills": sum(outcome.killed for outcome in outcomes),
        "texts": len(outcomes),
        "exact": sum(outcome.exact for outcome in outcomes),
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="default 100")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--replay-log-tokens", type=int, help="of each node: with 1, the client replays it all"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    outcomes = trio.run(run, arguments.kills, arguments.seed, arguments.replay_log_tokens)
    print(json.dumps(report(outcomes)) if arguments.json else table(outcomes))
    return 0 if outcomes and all(outcome.exact for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
