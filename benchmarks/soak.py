"""Hours in small: nodes die and come back all the time, and nothing may be lost or left behind.

python -m benchmarks.soak [--seconds 600] [--seed 0] [--json]

Six nodes as processes; every 10 s one gets SIGKILL and is started again. Four clients generate all
the time; every text is compared with what ``transformers`` makes of the prompt in float32. At the
end the caches of all nodes must be free, their sessions gone, memory what it was, and this process
must have no more tasks than at the start. Exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, field
from random import Random
from statistics import median

import psutil
import torch
import trio

from benchmarks.casualties import KV_TOKENS, Ward, local_tokens, open_ward, progress, prompt
from petalnode.errors import PetalnodeError
from petalnode.events import Event, Recovered
from petalnode.node import Node, NodeOptions, open_node
from petalnode.session.session import GenerateOptions

CLIENTS = 4
KILL_EVERY_S = 10.0
TOLD_EVERY_S = 10.0
NEW_TOKENS = 60
TEXT_DEADLINE_S = 180.0
SETTLE_S = 12.0
"""For records of free caches to come round after the last session."""
GROWTH_MIB = 64.0
"""What a process may have grown by: buffers of the allocator, code that ran for the first time."""


@dataclass
class Tally:
    """What happened."""

    texts: int = 0
    tokens: int = 0
    wrong_tokens: int = 0
    lost_sessions: int = 0
    kills: int = 0
    recoveries: int = 0
    stalls_ms: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Soak:
    """One run of it."""

    def __init__(self, ward: Ward, seed: int, want: list[list[int]]) -> None:
        self.tally = Tally()
        self.grown: dict[str, float] = {}
        self._rss: dict[str, float] = {}
        self._ward, self._rng, self._want = ward, Random(seed), want

    async def run(self, seconds: float) -> None:
        """Clients and kills for so long; then everything must be as it was."""
        await self._warm_up()
        tasks = tasks_living()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._kill_for, seconds)
            for number in range(CLIENTS):
                nursery.start_soon(self._client, number, seconds)
        await self._ward.all_ready()
        if tasks_living() > tasks:
            self.tally.wrong.append(f"{tasks_living() - tasks} tasks were left behind here")
        progress("all clients have left")
        await self._check_caches()

    async def _warm_up(self) -> None:
        """Every prompt once, so that what is allocated once does not look like growth."""
        async with open_node("demo", NodeOptions(join=(self._ward.invite,))) as node:
            for number in range(len(self._want)):
                await self._text(node, number)
        self._rss = self._memory()

    async def _client(self, number: int, seconds: float) -> None:
        rng = Random(f"{self._rng.random()} {number}")
        until = trio.current_time() + seconds
        async with open_node("demo", NodeOptions(join=(self._ward.invite,))) as node:
            while trio.current_time() < until:
                await self._text(node, rng.randrange(len(self._want)))

    async def _text(self, node: Node, number: int) -> None:
        """One session with one text."""
        events: list[Event] = []
        tokens: list[int] = []
        try:
            with trio.fail_after(TEXT_DEADLINE_S):
                async with node.open_session(events.append) as session:
                    session.tokenizer.eos_ids = frozenset()
                    generation = session.generate(prompt(number), GenerateOptions(NEW_TOKENS))
                    async for token in generation:
                        tokens += [token.id]  # at once: an error must not lose those before it
        except (PetalnodeError, trio.TooSlowError) as error:
            self.tally.lost_sessions += 1
            self.tally.wrong.append(f"a session was lost after {len(tokens)} tokens: {error}")
        recovered = [event for event in events if isinstance(event, Recovered)]
        self.tally.texts += 1
        self.tally.tokens += len(tokens)
        self.tally.wrong_tokens += sum(map(int.__ne__, tokens, self._want[number][: len(tokens)]))
        self.tally.recoveries += len(recovered)
        self.tally.stalls_ms += [event.stall_ms for event in recovered]

    async def _kill_for(self, seconds: float) -> None:
        """One node every so often; it is started again at once."""
        until = trio.current_time() + seconds
        while trio.current_time() + KILL_EVERY_S < until:
            await trio.sleep(KILL_EVERY_S)
            able = [n for n in self._ward.nodes if n.is_ready and self._ward.may_die([n])]
            if able:
                self._ward.kill(self._rng.choice(able))
                self.tally.kills += 1
            said = self.tally
            progress(
                f"{said.kills} kills, {said.texts} texts, {said.recoveries} recoveries, "
                f"{said.wrong_tokens} wrong tokens, {said.lost_sessions} lost sessions"
            )

    async def _check_caches(self) -> None:
        """What the nodes announce, and what their processes and this one hold."""
        await trio.sleep(SETTLE_S)
        async with open_node("demo", NodeOptions(join=(self._ward.invite,))) as node:
            await trio.sleep(1.0)
            for record in node.swarm.live():
                if record.kv_tokens_free != KV_TOKENS:
                    lacking = KV_TOKENS - record.kv_tokens_free
                    self.tally.wrong.append(
                        f"…{record.peer_id[-6:]} still holds {lacking} cached tokens"
                    )

    def note_memory(self) -> None:
        """Compare with the same place at the start: a node that came back must not be larger."""
        now = self._memory()
        self.grown = {name: now[name] - rss for name, rss in self._rss.items() if name in now}
        for name, grown in self.grown.items():
            if grown > GROWTH_MIB:
                self.tally.wrong.append(f"{name} has grown by {grown:.0f} MiB")

    def _memory(self) -> dict[str, float]:
        """MiB resident, of this process and of every node."""
        found = {"the clients' process": mebibytes(None)}
        for node in self._ward.nodes:
            if node.process is not None and node.is_ready:
                found[f"{node.span} …{node.peer_id[-6:]}"] = mebibytes(node.process.pid)
        return found

    def report(self) -> str:
        """The outcome in a few lines."""
        said, grown = self.tally, self.grown
        stalls = said.stalls_ms or [0.0]
        worst = max(grown, key=lambda name: grown[name])
        lines = [
            f"{said.texts} texts of {CLIENTS} clients, {said.tokens} tokens: "
            f"{said.wrong_tokens} wrong, {said.lost_sessions} sessions lost",
            f"{said.kills} kills, {said.recoveries} recoveries; mending took "
            f"{median(stalls):.0f} ms in the middle, {max(stalls):.0f} ms at worst",
            f"memory: {worst} grew most, by {grown[worst]:.1f} MiB of "
            f"{self._rss[worst]:.0f}; all processes together by {sum(grown.values()):.1f} MiB",
            *(f"WRONG: {wrong}" for wrong in said.wrong),
            "nothing was lost or left behind" if self.is_fine else "FAILED",
        ]
        return "\n".join(lines)

    @property
    def is_fine(self) -> bool:
        said = self.tally
        return not (said.wrong or said.wrong_tokens or said.lost_sessions) and said.texts > 0


def tasks_living() -> int:
    return trio.lowlevel.current_statistics().tasks_living


def mebibytes(pid: int | None) -> float:
    return float(psutil.Process(pid).memory_info().rss) / 2**20


async def soak(seconds: float, seed: int) -> Soak:
    """Run it and stop the nodes, each of which must say that no session is open."""
    progress("transformers computes the texts to compare with")
    want = await trio.to_thread.run_sync(local_tokens, NEW_TOKENS)
    async with open_ward(progress) as ward:
        run = Soak(ward, seed, want)
        await run.run(seconds)
        run.note_memory()
        run.tally.wrong += await ward.stop_all()
        for node in ward.nodes:
            left = node.said.get("draining", {}).get("sessions")
            if left != 0:
                run.tally.wrong.append(f"{node.span} …{node.peer_id[-6:]}: {left} sessions left")
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="default 600")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = trio.run(soak, arguments.seconds, arguments.seed)
    print(json.dumps(asdict(run.tally)) if arguments.json else run.report())
    return 0 if run.is_fine else 1


if __name__ == "__main__":
    sys.exit(main())
