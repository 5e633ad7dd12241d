"""How a node takes part in a swarm, as its owner wants it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from petalnode.errors import UsageError
from petalnode.routing.announcement import MAX_KV_TOKENS, MAX_NAME_BYTES


@dataclass(frozen=True)
class NodeOptions:
    """How a node takes part. By default it is a client: holds no blocks, listens nowhere.

    ``blocks`` pins the span; ``num_blocks`` chooses the least covered span of that size, ``None``
    of as many blocks as fit the free memory. ``identity`` is a key file; a serving node without one
    uses the default file, a client a fresh key. ``port`` 0 takes any free one. Replay logs keep
    ``replay_log_tokens`` hidden states for all sessions together, by default one for each token of
    the attention cache, at most ``serving.server.DEFAULT_LOG_TOKENS``. ``adapters`` are offered to
    everybody's sessions: directories or hub repos of LoRA files as ``peft`` saves them. Adapters of
    the hub are kept in ``cache_dir``, by default in the hub's own cache.
    """

    join: tuple[str, ...] = ()
    blocks: tuple[int, int] | None = None
    num_blocks: int | None = 0
    device: str = "auto"
    dtype: str = "auto"
    quant: str = "none"
    kv_tokens: int | None = None
    replay_log_tokens: int | None = None
    host: str = "0.0.0.0"
    port: int = 0
    announce: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    cache_dir: Path | None = None
    name: str = ""
    identity: Path | None = None

    def __post_init__(self) -> None:
        """Raises ``UsageError`` for what no node can do."""
        if self.blocks is not None and not 0 <= self.blocks[0] < self.blocks[1]:
            raise UsageError(f"{self.blocks} is not a range of blocks.", "Give start < end.")
        tokens = [1 if n is None else n for n in (self.kv_tokens, self.replay_log_tokens)]
        if (self.num_blocks or 0) < 0 or not 1 <= min(tokens) <= max(tokens) <= MAX_KV_TOKENS:
            raise UsageError("A number of blocks or tokens is out of range.", "Check the options.")
        if len(self.name.encode()) > MAX_NAME_BYTES or not self.name.isprintable():
            raise UsageError(
                f"The name is not printable text of at most {MAX_NAME_BYTES} bytes.",
                "Choose a shorter, plainer one.",
            )
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            raise UsageError(
                f"The host {self.host!r} is not an IP address.",
                "Use one of this machine, such as 127.0.0.1, or 0.0.0.0 for all of them.",
            ) from None

    @property
    def serves(self) -> bool:
        """Whether the node holds blocks."""
        return self.blocks is not None or self.num_blocks != 0

    @property
    def listen(self) -> tuple[str, ...]:
        """Multiaddrs to listen on: none for a client, which only dials."""
        if not self.serves:
            return ()
        kind = "ip6" if ":" in self.host else "ip4"
        return (f"/{kind}/{self.host}/tcp/{self.port}",)
