"""Real hosts on loopback with gossip on top, for tests."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from petalnode.p2p.gossip import Gossip, open_gossip
from petalnode.p2p.host import Host, open_host
from petalnode.p2p.identity import Identity
from petalnode.routing.view import SwarmView

from .records import FINGERPRINT, WALL, identity

NETWORK = "home"


@dataclass
class Member:
    who: Identity
    host: Host
    gossip: Gossip
    view: SwarmView


@asynccontextmanager
async def open_member(
    number: int,
    *,
    contacts: Sequence[Host] = (),
    fingerprint: str = FINGERPRINT,
    wall: float = WALL,
) -> AsyncIterator[Member]:
    """One host with gossip, connected to ``contacts`` before its gossip starts."""
    who, view = identity(number), SwarmView()
    async with AsyncExitStack() as stack:
        host = await stack.enter_async_context(open_host(who, listen=["/ip4/127.0.0.1/tcp/0"]))
        for contact in contacts:
            await host.connect(contact.addrs[0])
        gossip = await stack.enter_async_context(
            open_gossip(
                host,
                who,
                network=NETWORK,
                fingerprint=fingerprint,
                view=view,
                wall_clock=lambda: wall,
            )
        )
        yield Member(who, host, gossip, view)


@asynccontextmanager
async def open_line(count: int) -> AsyncIterator[list[Member]]:
    """Members 1 to ``count``, each connected to the one before it only."""
    async with AsyncExitStack() as stack:
        members: list[Member] = []
        for number in range(1, count + 1):
            contacts = [members[-1].host] if members else []
            members.append(await stack.enter_async_context(open_member(number, contacts=contacts)))
        yield members
