"""What a node and a generation report while they work: one dataclass an event.

``to_json`` gives the object that ``--json`` prints, under the names of the command-line contract;
people get sentences instead (``cli.output``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Event:
    """Base: ``event`` is the name on the wire."""

    event: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """Plain values, ``event`` first."""
        return {"event": self.event, **asdict(self)}


@dataclass(frozen=True)
class Listening(Event):
    """The port is bound. ``invite`` lets another machine join."""

    event = "listening"
    peer_id: str
    addrs: Sequence[str]
    invite: str


@dataclass(frozen=True)
class Memory(Event):
    """How many blocks the free memory holds, and why; sizes in bytes.

    ``free`` on the device; ``loading`` is kept for one block while it is read, ``kv`` for attention
    caches and activations; a ``block`` takes at most so much; ``fits`` of the model's ``of`` blocks
    go into the rest, and ``blocks`` are chosen, or were asked for. ``left_dense``: matrices of a
    block that cannot be quantized, because their rows are no multiple of 64 numbers. ``adapters``:
    what the offered adapters add to a block, counted in its size.
    """

    event = "memory"
    device: str
    dtype: str
    quant: str
    free: int
    loading: int
    kv: int
    block: int
    fits: int
    blocks: int
    of: int
    left_dense: Sequence[str] = ()
    adapters: int = 0


@dataclass(frozen=True)
class Loading(Event):
    """``done`` of ``total`` blocks are loaded."""

    event = "loading"
    blocks: tuple[int, int]
    done: int
    total: int


@dataclass(frozen=True)
class Downloading(Event):
    """``done`` of ``total`` bytes that are missing here are downloaded; ``file`` is under way."""

    event = "downloading"
    file: str
    done: int
    total: int


@dataclass(frozen=True)
class Ready(Event):
    """The node serves its blocks, and offers ``adapters``. ``throughput``: tokens/s of the span,
    decode and forward."""

    event = "ready"
    peer_id: str
    blocks: tuple[int, int]
    model: str
    throughput: Mapping[str, float]
    memory: Mapping[str, int]
    adapters: Sequence[str] = ()


@dataclass(frozen=True)
class Draining(Event):
    """The node takes no new sessions; ``sessions`` are still open."""

    event = "draining"
    sessions: int


@dataclass(frozen=True)
class Moving(Event):
    """The node will hold the blocks ``to`` instead, where the swarm needs it more. First it waits
    until its ``sessions`` have ended; if they do not, it stays. ``ready`` follows."""

    event = "moving"
    blocks: tuple[int, int]
    to: tuple[int, int]
    sessions: int


@dataclass(frozen=True)
class Refused(Event):
    """Gossip that this node has refused since it started, by reason."""

    event = "refused"
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Stopped(Event):
    """The node has said goodbye."""

    event = "stopped"


@dataclass(frozen=True)
class Waiting(Event):
    """Nothing happens because of ``why``; ``for_s`` more seconds at most."""

    event = "waiting"
    why: str
    for_s: float

    def to_json(self) -> dict[str, Any]:
        """See ``Event.to_json``; to a tenth of a second."""
        return super().to_json() | {"for_s": round(self.for_s, 1)}


@dataclass(frozen=True)
class HopInfo:
    """One hop of a route; ``rtt_ms`` is None while unmeasured."""

    peer_id: str
    blocks: tuple[int, int]
    rtt_ms: float | None


@dataclass(frozen=True)
class Route(Event):
    """The chain that a session uses from now on."""

    event = "route"
    hops: Sequence[HopInfo]


@dataclass(frozen=True)
class Recovered(Event):
    """Hops were lost, others took over, and the text goes on. ``position``: of the next token."""

    event = "recovered"
    position: int
    lost: Sequence[str]
    stall_ms: float
    replayed_tokens: int


@dataclass(frozen=True)
class HopLost(Event):
    """A hop that trained ``blocks`` failed, as ``why`` says: others compute that part again."""

    event = "lost"
    peer_id: str
    blocks: tuple[int, int]
    why: str


@dataclass(frozen=True)
class TokenEvent(Event):
    """One generated token."""

    event = "token"
    id: int
    text: str
    position: int
    ms: float


@dataclass(frozen=True)
class Done(Event):
    """The generation is over. ``tokens`` are the new ids only."""

    event = "done"
    tokens: Sequence[int]
    text: str
    ttft_ms: float
    tokens_per_s: float
    finish_reason: str


@dataclass(frozen=True)
class PeerInfo:
    """One peer as ``status`` shows it. ``throughput`` and ``forward`` are tokens/s of its span, one
    at a time and many at once; ``use`` says which of its blocks a session would use now, or why
    none."""

    peer_id: str
    name: str
    state: str
    blocks: tuple[int, int]
    rtt_ms: float | None
    throughput: float
    kv_tokens_free: int
    quant: str
    forward: float = 0.0
    queue_depth: int = 0
    dtype: str = ""
    max_context: int = 0
    adapters: Sequence[str] = ()
    moving_to: tuple[int, int] | None = None
    pinned: bool = False
    use: str = ""


@dataclass(frozen=True)
class Unused:
    """A peer that a chain would not use now, and why."""

    peer_id: str
    why: str


@dataclass(frozen=True)
class Swarm(Event):
    """Who serves a model. ``copies``: how many peers serve each block, online. ``refused``: what
    the contact passed on about others and is not shown, by reason."""

    event = "swarm"
    model: str
    blocks: int
    covered: bool
    peers: Sequence[PeerInfo]
    not_used: Sequence[Unused] = field(default_factory=tuple)
    copies: Sequence[int] = ()
    refused: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading(Event):
    """``done`` of a file's ``total`` bytes are read."""

    event = "reading"
    file: str
    done: int
    total: int


@dataclass(frozen=True)
class TuningData(Event):
    """A file of examples is read. ``cut`` of its ``rows`` were too long for the context and lost
    their ends; ``dropped`` more had nothing left to learn then, and are not counted."""

    event = "data"
    file: str
    rows: int
    tokens: int
    learned: int
    cut: int
    dropped: int


@dataclass(frozen=True)
class TuningResumed(Event):
    """The run in ``dir`` goes on after ``step``."""

    event = "resumed"
    dir: str
    step: int


@dataclass(frozen=True)
class TuningStep(Event):
    """``step`` of ``steps`` is done. ``loss``: of its batch before it, nats a token."""

    event = "step"
    step: int
    steps: int
    loss: float
    tokens_per_s: float
    learning_rate: float
    seconds_left: float


@dataclass(frozen=True)
class TuningValidating(Event):
    """``done`` of ``total`` examples have their share in the validation after ``step``."""

    event = "validating"
    step: int
    done: int
    total: int


@dataclass(frozen=True)
class TuningEval(Event):
    """The validation loss after ``step``, nats a token; 0 is before the first."""

    event = "eval"
    step: int
    loss: float


@dataclass(frozen=True)
class TuningSaved(Event):
    """``dir`` has the adapter and the run as of ``step``."""

    event = "saved"
    dir: str
    step: int


@dataclass(frozen=True)
class TuningDone(Event):
    """All steps are done. ``loss``: of the last batch; ``eval_loss``: the validation loss
    after the last step, of the file given now; None without one."""

    event = "done"
    loss: float | None
    eval_loss: float | None
    steps: int


Report = Callable[[Event], None]
"""Takes events as they happen. Must not block."""


def ignore(event: Event) -> None:
    """A ``Report`` for those who do not care."""
