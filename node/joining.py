"""Finding a swarm: what the JOIN arguments name, and the first word with a contact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from petalnode.errors import PeerError, PeerUnreachable, SwarmMismatch
from petalnode.events import Listening
from petalnode.models.checkpoint import Checkpoint
from petalnode.p2p.hello import Hello, ask
from petalnode.p2p.host import Host
from petalnode.p2p.invite import Invite, parse_join
from petalnode.routing.announcement import MAX_ADDRS
from petalnode.routing.view import Sighting

NETWORK_ID_BYTES = 16


@dataclass(frozen=True)
class Joined:
    """The swarm that a node belongs to, and the signed records that its contacts gave it."""

    network: str
    records: Sequence[Sighting] = ()


def public_name(checkpoint: Checkpoint) -> str:
    """What others are told: the hub id, or a directory's last part, never a whole path."""
    path = Path(checkpoint.name)
    return path.resolve().name if path.is_dir() else checkpoint.name


def parse_joins(joins: Sequence[str]) -> list[Invite | str]:
    """Invites and multiaddrs. Raises ``InviteError`` for what is neither."""
    return [parse_join(join) for join in joins]


def known_network(joins: Sequence[Invite | str], checkpoint: Checkpoint, rng: Random) -> str | None:
    """The network id if it is known without asking: a founder makes it, an invite carries it.

    Raises ``SwarmMismatch`` for an invite to another model.
    """
    if not joins:
        return rng.randbytes(NETWORK_ID_BYTES).hex()
    networks = set()
    for invite in joins:
        if isinstance(invite, Invite):
            check_invite(invite, checkpoint)
            networks.add(invite.network)
    if len(networks) > 1:
        raise SwarmMismatch("The invites belong to different swarms.", "Join one swarm at a time.")
    return networks.pop() if networks else None


def check_invite(invite: Invite, checkpoint: Checkpoint) -> None:
    """Raise ``SwarmMismatch`` unless the invite is for this checkpoint."""
    if invite.fingerprint != checkpoint.fingerprint:
        raise SwarmMismatch(
            f"The invite is for {invite.model!r} with fingerprint {invite.fingerprint[:8]}…, but "
            f"{checkpoint.name!r} here has {checkpoint.fingerprint[:8]}….",
            "Both sides need the same config.json and weights; check MODEL and its revision.",
        )


async def join_swarm(
    host: Host, joins: Sequence[Invite | str], network: str | None, fingerprint: str
) -> Joined:
    """What the first contact that answers knows; a founder has no contacts and knows nothing.

    ``network`` is None while only a contact can tell it. Raises as ``contact_swarm``.
    """
    if not joins:
        assert network is not None
        return Joined(network)
    hello = await contact_swarm(host, joins, network=network, fingerprint=fingerprint)
    return Joined(hello.network, hello.records)


async def contact_swarm(
    host: Host, joins: Sequence[Invite | str], *, network: str | None, fingerprint: str | None
) -> Hello:
    """What the first contact that answers says.

    Raises ``SwarmMismatch`` if it belongs elsewhere, ``PeerUnreachable`` if nobody answers.
    """
    failures: list[PeerError] = []
    for peer_id, addrs in contacts(joins).items():
        host.learn(peer_id, addrs)
        try:
            return await ask(host, peer_id, network=network, fingerprint=fingerprint)
        except PeerError as error:
            failures.append(error)
    raise PeerUnreachable(
        f"No contact of the swarm answered. {failures[-1].cause if failures else ''}".strip(),
        "Check that a node is running there, and that a firewall lets its port through.",
    )


def contacts(joins: Sequence[Invite | str]) -> dict[str, list[str]]:
    """The peers that JOIN arguments name, in order, each with its addresses."""
    found: dict[str, list[str]] = {}
    for join in joins:
        for addr in join.addrs if isinstance(join, Invite) else (join,):
            found.setdefault(addr.rpartition("/p2p/")[2], []).append(addr)
    return found


def make_invite(host: Host, checkpoint: Checkpoint, network: str) -> str:
    """The invite that names ``host`` as contact."""
    name, fingerprint = public_name(checkpoint), checkpoint.fingerprint
    return Invite(network, name, fingerprint, host.addrs[:MAX_ADDRS]).encode()


def listening(host: Host, checkpoint: Checkpoint, network: str) -> Listening:
    """The event that tells where this node can be reached."""
    return Listening(host.peer_id, host.addrs, make_invite(host, checkpoint, network))
