"""The training protocol: what a client and one hop say to each other. No I/O here.

A client opens one stream to every hop that it trains through, and keeps it as long as it trains:

    client → hop   open(fingerprint, blocks)               → opened(max_tokens) | refused(code, why)
    client → hop   tuning(version)  + matrices             add these to the blocks from now on
    client → hop   forward(id, blocks, lengths, version, keep)    + x  → output(id) + x
    client → hop   backward(id, blocks, lengths, version, of)     + g  → grads(id)  + x and more
    client → hop   backward(id, blocks, lengths, version, 0)   + x, g  → grads(id)  + x and more
    hop → client   error(id, code, why)                    that job came to nothing
    hop → client   alive(done)                             now and then; ``done`` grows with work
    hop → client   draining()                              it is about to leave: send no more jobs

A **job** is a micro-batch: whole rows from position 0 on, one behind the other and nothing padded:
x [T, H], ``lengths`` [n0, n1, …] of sum T, through ``blocks`` [a, b) within those opened. Forward
gives the output of block b - 1. Backward gets the same x and the gradient g [T, H] of that output,
computes the blocks again, and gives the gradients of x and, in float32, of every matrix of the
tuning for these blocks, under the names of ``Tuning.named()``. Weights never change.

Whoever has x can go back anywhere. A hop that went forward with ``keep`` may still have the inputs
of its blocks, and activations that it computed meanwhile: ``backward`` with that job's id in ``of``
needs no x then, and no second forward pass. It may have forgotten them (``forgotten``): the next
tuning, another session that needs the room, one use, end them.

``version`` is the client's count of its tunings and says which one a job is for: the last one sent,
or 0 for none. One that a hop does not take (``tuning``, ``busy``) makes the jobs fail that need it.
Messages with tensors are cut into frames by ``petalnode.tensor_frames``. A hop reads on while it
has room for another job: who sends more waits. The client asks for no more than ``max_tokens`` and
``MAX_ROWS`` a job, and breaks the protocol otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from petalnode.protocol import MAX_BLOCKS, MAX_SEQ, BadMessage, text, whole, wholes

TRAIN_PROTOCOL = "/petalnode/train/1"

MAX_FRAME_BYTES = 1 << 20
"""Of tensors in a frame: small enough that what is said beside them does not wait long."""
MAX_MICRO_TOKENS = 2048
"""The most tokens of a job that any hop takes: this bounds a step's time, and a graph's memory."""
MAX_ROWS = 256
"""Of a job: each row has nodes of its own in a graph."""
MAX_QUEUED = 4
"""Jobs of one stream that a hop has at once."""

Kind = Literal["forward", "backward"]
KINDS: Mapping[str, Kind] = {"forward": "forward", "backward": "backward"}
ANSWERS: Mapping[Kind, str] = {"forward": "output", "backward": "grads"}


@dataclass(frozen=True)
class OpenTraining:
    """Train through blocks ``[start, end)`` of the model with that fingerprint."""

    fingerprint: str
    start: int
    end: int

    def to_wire(self) -> dict[str, Any]:
        blocks = [self.start, self.end]
        return {"type": "open", "fingerprint": self.fingerprint, "blocks": blocks}

    @classmethod
    def parse(cls, header: Mapping[str, Any]) -> OpenTraining:
        start, end = block_pair(header, 0, MAX_BLOCKS)
        return cls(text(header.get("fingerprint")), start, end)


@dataclass(frozen=True)
class Job:
    """One micro-batch through blocks ``[start, end)``; its tensors come beside it.

    ``keep``: a backward job may follow. ``of``: it goes back through that forward job, or 0.
    """

    kind: Kind
    id: int
    start: int
    end: int
    lengths: tuple[int, ...]
    version: int
    keep: bool = False
    of: int = 0

    @property
    def tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The tensors [T, H] that come with it."""
        if self.kind == "forward":
            return ("x",)
        return ("g",) if self.of else ("x", "g")

    def to_wire(self) -> dict[str, Any]:
        return {
            "type": self.kind,
            "id": self.id,
            "blocks": [self.start, self.end],
            "lengths": list(self.lengths),
            "version": self.version,
            **({"keep": self.keep} if self.kind == "forward" else {"of": self.of}),
        }

    @classmethod
    def parse(
        cls, header: Mapping[str, Any], opened: OpenTraining, max_tokens: int, max_positions: int
    ) -> Job:
        """A job within what was opened, of at most ``max_tokens`` tokens, or ``BadMessage``."""
        start, end = block_pair(header, opened.start, opened.end)
        lengths = wholes(header.get("lengths"), min(max_tokens, MAX_ROWS), max_positions)
        if not lengths or 0 in lengths or sum(lengths) > max_tokens:
            raise BadMessage(f"the rows of a job are none, empty, or over {max_tokens} tokens")
        kind = KINDS[text(header.get("type"))]
        number, version, of = (
            whole(header.get(name, 0), low, MAX_SEQ)
            for name, low in (("id", 1), ("version", 0), ("of", 0))
        )
        keep = header.get("keep", False)
        if not isinstance(keep, bool) or (keep if kind == "backward" else of):
            raise BadMessage("a forward job may keep its way, a backward job may go back one")
        return cls(kind, number, start, end, lengths, version, keep, of)


def block_pair(header: Mapping[str, Any], low: int, high: int) -> tuple[int, int]:
    """The range of blocks of a message, within ``[low, high)``, or ``BadMessage``."""
    start, *rest = wholes(header.get("blocks"), 2, MAX_BLOCKS) or (0,)
    if len(rest) != 1 or not low <= start < rest[0] <= high:
        raise BadMessage(f"blocks is not a range within {low}:{high}")
    return start, rest[0]


def job_error_wire(number: int, code: str, why: str) -> dict[str, Any]:
    """What became of a job that came to nothing."""
    return {"type": "error", "id": number, "code": code, "why": why}
