"""A client whose hops are lost: one session, told what to do on stdin, answering on stdout.

    python -m benchmarks.survivor MODEL INVITE      says {"event": "open"} when the session is

{"do": "prefill", "tokens": n}  → {"event": "prefilled", "s": …}
{"do": "decode", "steps": n}    → {"event": "token", "at", "id"} …, and {"event": "chain", "at",
                                  "peers"} where that changed; {"event": "end"}; back to the prefix
{"do": "hops"}                  → {"event": "hops", "peers": […]}
{"do": "await", "peers": […]}   → {"event": "there"}, when all of them are online
What happens to the session meanwhile comes as the events of ``--json``.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from typing import Any

import torch
import trio

from benchmarks.engines import OverSwarm
from petalnode.events import Event
from petalnode.node import Node, NodeOptions, open_node
from petalnode.session.session import GenerateOptions, Session

LOOK_AGAIN_S = 0.2


async def obey(node: Node, session: Session, prefix: int, order: dict[str, Any]) -> dict[str, Any]:
    """Do one thing and say how it went."""
    if order["do"] == "prefill":
        engine = OverSwarm(session, node.checkpoint.config.vocab_size)
        return {"event": "prefilled", "s": await engine.prefill(order["tokens"])}
    if order["do"] == "decode":
        await decode(session, prefix, order["steps"])
        return {"event": "end"}
    if order["do"] == "await":
        await await_online(node, set(order["peers"]))
        return {"event": "there"}
    return {"event": "hops", "peers": peers(session)}


async def decode(session: Session, prefix: int, steps: int) -> None:
    """Generate from the prefix, token by token, and forget it again."""
    last, chain = session.ids[prefix - 1], peers(session)
    session.rollback(prefix - 1)
    async for token in session.generate([last], GenerateOptions(steps)):
        at = time.monotonic()
        if chain != (chain := peers(session)):
            say({"event": "chain", "at": at, "peers": chain})
        say({"event": "token", "at": at, "id": token.id})
    session.rollback(prefix)


def peers(session: Session) -> list[str]:
    """Who serves the session now, in order."""
    return [hop.peer_id for hop in session.chain.hops]


async def await_online(node: Node, wanted: set[str]) -> None:
    """Until this client would use all of these."""
    while not wanted <= {a.peer_id for a in node.swarm.live() if a.state == "online"}:
        with trio.move_on_after(LOOK_AGAIN_S):
            await node.swarm.wait_changed()


def say(message: dict[str, Any]) -> None:
    """One line on stdout."""
    print(json.dumps(message), flush=True)


def say_event(event: Event) -> None:
    say(event.to_json())


async def work(model: str, invite: str) -> None:
    """Until stdin ends."""
    prefix = 0
    async with (
        open_node(model, NodeOptions(join=(invite,))) as node,
        node.open_session(say_event) as session,
    ):
        say({"event": "open"})
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            order = json.loads(line)
            prefix = order.get("tokens", prefix)
            say(await obey(node, session, prefix, order))


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the benchmark ends its processes itself
    trio.run(work, sys.argv[1], sys.argv[2])
