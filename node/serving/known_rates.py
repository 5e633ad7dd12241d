"""How fast this machine was lately, kept in $XDG_CACHE_HOME/petalnode/rates.json.

What a node announces is measured on the blocks that it has loaded. While it still loads, and when
it chooses which blocks, the last measurement stands in: by device, dtype, quantization and the
shape of a block. Best effort: a file that cannot be read or written costs a guess, nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch

from petalnode.models.config import ModelConfig

MAX_ENTRIES = 64
"""The one written longest ago makes room."""
MAX_BYTES = 1 << 16
MAX_RATE = 1e12
"""No machine is faster; what says so is no measurement."""
_NOT_SHAPE = {
    *("num_blocks", "vocab_size", "max_positions", "tie_embeddings", "bos_id", "eos_ids", "dtype")
}


class Rates(NamedTuple):
    """Tokens/s through one block: one row at a time, and many tokens at once."""

    decode: float
    forward: float


class KnownRates:
    """See the module. Without a ``path`` nothing is known, and nothing is kept."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path

    def get(self, key: str) -> Rates | None:
        """What was measured under ``key``, None if nothing was."""
        return self._read().get(key)

    def put(self, key: str, rates: Rates) -> None:
        """Remember a measurement."""
        if self._path is None:
            return
        known = self._read()
        known.pop(key, None)
        known[key] = rates
        text = json.dumps(dict(list(known.items())[-MAX_ENTRIES:]), indent=1)
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._path.parent) as folder:
                whole = Path(folder) / self._path.name  # others never see half a file
                whole.write_text(text)
                os.replace(whole, self._path)

    def _read(self) -> dict[str, Rates]:
        if self._path is None:
            return {}
        try:
            with self._path.open("rb") as file:
                stored = json.loads(file.read(MAX_BYTES))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(stored, dict):
            return {}
        return {key: Rates(*value) for key, value in stored.items() if _is_rates(value)}


def rates_path() -> Path:
    """Where the real program keeps them."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "petalnode" / "rates.json"


def rates_key(config: ModelConfig, device: torch.device, dtype: str, quant: str) -> str:
    """What a block's speed depends on."""
    shape = {name: value for name, value in asdict(config).items() if name not in _NOT_SHAPE}
    digest = sha256(repr(sorted(shape.items())).encode()).hexdigest()[:16]
    return f"{device_name(device)} {dtype} {quant} {config.family} {digest}"


def device_name(device: torch.device) -> str:
    """The device as far as its speed goes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    kind = platform.processor() or platform.machine()
    return f"{device.type} {kind} {torch.get_num_threads()} threads"


def _is_rates(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(one) in (int, float) and 0 < one <= MAX_RATE for one in value)
    )
