"""The first word between two peers: which swarm are you, and who else is in it?

One stream, one exchange. The asker sends ``{network, fingerprint, record}``: the swarm it means
(None: whichever) and its own signed record if it has one. The answer is ``{network, model,
fingerprint}``, and, if that is the swarm asked for, frames of ``{records, ages}`` until the clean
end: signed records with the seconds since each arrived, freshest first. Records prove themselves;
an age can only shorten a life.
"""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import trio

from petalnode.errors import PeerError, PeerGone, PeerMisbehaved, SwarmMismatch
from petalnode.p2p.envelope import MAX_RECORD_BYTES
from petalnode.p2p.frames import FrameStream
from petalnode.routing.announcement import MAX_BLOCKS
from petalnode.routing.view import Sighting

HELLO_PROTOCOL = "/petalnode/hello/1"
ASK_DEADLINE_S = 10.0
ANSWER_DEADLINE_S = 10.0
MAX_SNAPSHOT_BYTES = 4 * 1024 * 1024
BATCH_BYTES = 64 * 1024
MAX_TEXT_CHARS = 256
MIN_RECORD_BYTES = 128  # a signature alone has 64
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class About:
    """Which swarm a peer belongs to."""

    network: str
    model: str
    fingerprint: str
    blocks: int


@dataclass(frozen=True)
class Hello(About):
    """A contact's answer: its swarm, and the records it knows (``Gossip.absorb`` checks them)."""

    records: tuple[Sighting, ...] = ()


class Dialler(Protocol):
    """What asking needs of a host."""

    async def open_stream(self, peer_id: str, protocol: str) -> FrameStream:
        """A stream to a peer."""


async def ask(
    host: Dialler,
    peer_id: str,
    *,
    network: str | None = None,
    fingerprint: str | None = None,
    record: bytes | None = None,
) -> Hello:
    """Say hello to a peer and return what it says.

    ``network`` and ``fingerprint`` are what we expect of it, None for whatever it has; ``record``
    is our own sealed announcement. Raises SwarmMismatch if it belongs elsewhere, PeerUnreachable,
    PeerGone, PeerMisbehaved, PeerRefused.
    """
    request = {"network": network, "fingerprint": fingerprint, "record": record}
    try:
        with trio.fail_after(ASK_DEADLINE_S):
            stream = await host.open_stream(peer_id, HELLO_PROTOCOL)
            stream.max_payload = 0
            try:
                return await _ask(stream, request)
            finally:
                stream.reset()
    except trio.TooSlowError:
        raise PeerGone(
            f"Peer {peer_id} did not answer within {ASK_DEADLINE_S:.0f} s.",
            "Try again, or join through another peer.",
            peer_id,
        ) from None


async def _ask(stream: FrameStream, request: dict[str, Any]) -> Hello:
    await stream.send(request)
    about = _about(await _answer(stream), stream.peer_id)
    _expect(about, request["network"], request["fingerprint"], stream.peer_id)
    records: list[Sighting] = []
    size = 0
    while (frame := await stream.receive()) is not None:
        batch = list(_sightings(frame.header, stream.peer_id))
        size += sum(len(sighting.raw) for sighting in batch)
        if not batch or size > MAX_SNAPSHOT_BYTES:
            raise _misbehaved(stream.peer_id, "sent records without end")
        records += batch
    await stream.aclose()
    return Hello(about.network, about.model, about.fingerprint, about.blocks, tuple(records))


async def _answer(stream: FrameStream) -> dict[str, Any]:
    frame = await stream.receive()
    if frame is None:
        raise PeerGone(
            f"Peer {stream.peer_id} ended the stream instead of saying hello.",
            "Join through another peer.",
            stream.peer_id,
        )
    return frame.header


def _about(answer: dict[str, Any], peer_id: str) -> About:
    texts = [answer.get(name) for name in ("network", "model", "fingerprint")]
    if not all(_is_text(text) for text in texts) or not _FINGERPRINT.fullmatch(texts[2] or ""):
        raise _misbehaved(peer_id, "does not say which swarm it belongs to")
    blocks = answer.get("blocks")
    if type(blocks) is not int or not 1 <= blocks <= MAX_BLOCKS:
        raise _misbehaved(peer_id, "does not say how many blocks its model has")
    network, model, fingerprint = map(str, texts)
    return About(network, model, fingerprint, blocks)


def _is_text(value: object) -> bool:
    # What a peer calls its model ends on our terminal: no control characters.
    return isinstance(value, str) and len(value) <= MAX_TEXT_CHARS and value.isprintable()


def _expect(about: About, network: str | None, fingerprint: str | None, peer_id: str) -> None:
    if fingerprint is not None and about.fingerprint != fingerprint:
        raise SwarmMismatch(
            f"Peer {peer_id} serves {about.model!r} with other weights: fingerprint "
            f"{about.fingerprint[:8]}… there, {fingerprint[:8]}… here.",
            "Both sides need the same config.json and weights; check MODEL and its revision.",
        )
    if network is not None and about.network != network:
        raise SwarmMismatch(
            f"Peer {peer_id} belongs to another network than the invite or the other contacts.",
            "Ask a node of the network that you mean for a fresh invite.",
        )


def _sightings(header: dict[str, Any], peer_id: str) -> Iterator[Sighting]:
    records, ages = header.get("records"), header.get("ages")
    if not isinstance(records, list) or not isinstance(ages, list) or len(records) != len(ages):
        raise _misbehaved(peer_id, "sent something else than records")
    for raw, age_s in zip(records, ages, strict=True):
        if not isinstance(raw, bytes) or not MIN_RECORD_BYTES <= len(raw) <= MAX_RECORD_BYTES:
            raise _misbehaved(peer_id, "sent a record that is none")
        if not isinstance(age_s, float) or not 0 <= age_s < math.inf:
            raise _misbehaved(peer_id, "sent a record of impossible age")
        yield Sighting(raw, age_s)


def _misbehaved(peer_id: str, what: str) -> PeerMisbehaved:
    return PeerMisbehaved(f"Peer {peer_id} {what}.", "Join through another peer.", peer_id)


def hello_handler(
    about: About,
    snapshot: Callable[[], Sequence[Sighting]],
    absorb: Callable[[Iterable[Sighting]], int],
) -> Callable[[FrameStream], Awaitable[None]]:
    """The answering side, for ``Host.serve(HELLO_PROTOCOL, ...)``.

    ``snapshot`` gives the records to hand out, ``absorb`` takes the asker's own, unchecked
    (``Gossip`` has both). An asker that talks garbage, or is slow, loses its stream.
    """

    async def handle(stream: FrameStream) -> None:
        stream.max_payload = 0
        try:
            with trio.fail_after(ANSWER_DEADLINE_S):
                await _serve(stream, about, snapshot, absorb)
        except (PeerError, trio.TooSlowError):
            stream.reset()

    return handle


async def _serve(
    stream: FrameStream,
    about: About,
    snapshot: Callable[[], Sequence[Sighting]],
    absorb: Callable[[Iterable[Sighting]], int],
) -> None:
    frame = await stream.receive()
    if frame is None:
        return
    network, fingerprint, record = _request(frame.header, stream.peer_id)
    await stream.send(
        {
            "network": about.network,
            "model": about.model,
            "fingerprint": about.fingerprint,
            "blocks": about.blocks,
        }
    )
    if network in (None, about.network) and fingerprint in (None, about.fingerprint):
        for batch in _batches(snapshot()):
            raws, ages = [s.raw for s in batch], [float(s.age_s) for s in batch]
            await stream.send({"records": raws, "ages": ages})
        if record is not None:
            absorb([Sighting(record, 0.0)])
    await stream.aclose()


def _request(header: dict[str, Any], peer_id: str) -> tuple[str | None, str | None, bytes | None]:
    network, fingerprint, record = (header.get(n) for n in ("network", "fingerprint", "record"))
    if not all(text is None or _is_text(text) for text in (network, fingerprint)):
        raise _misbehaved(peer_id, "asked for no proper swarm")
    if record is not None and not (isinstance(record, bytes) and len(record) <= MAX_RECORD_BYTES):
        raise _misbehaved(peer_id, "sent a record that is none")
    return network, fingerprint, record


def _batches(sightings: Sequence[Sighting]) -> Iterator[list[Sighting]]:
    """Frames' worth of records, cut off where the asker would refuse more."""
    batch: list[Sighting] = []
    batch_bytes = total_bytes = 0
    for sighting in sightings:
        total_bytes += len(sighting.raw)
        if total_bytes > MAX_SNAPSHOT_BYTES:
            break
        if batch and batch_bytes + len(sighting.raw) > BATCH_BYTES:
            yield batch
            batch, batch_bytes = [], 0
        batch.append(sighting)
        batch_bytes += len(sighting.raw)
    if batch:
        yield batch
