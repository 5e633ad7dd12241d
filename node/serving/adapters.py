"""The adapters that a node offers to everybody's sessions: LoRA files, by name (``--adapter``)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from petalnode.errors import ModelError, UsageError
from petalnode.models.config import ModelConfig
from petalnode.models.sources import local_directory
from petalnode.models.tuning.peft_files import (
    adapter_block_bytes,
    adapter_digest,
    adapter_files,
    is_hub_id,
    load_adapter,
)
from petalnode.models.tuning.tuning import Tuning
from petalnode.routing.announcement import MAX_ADAPTER_CHARS, MAX_ADAPTERS


@dataclass(frozen=True)
class Offered:
    """An adapter's files, and the name under which they are announced: ``name@digest``.

    The digest is that of the files, so that two adapters of one name never mix in a chain.
    """

    name: str
    place: Path
    block_bytes: int
    """What its matrices for one block take at most."""


def find_offered(
    ids: Sequence[str], config: ModelConfig, cache_dir: Path | None = None
) -> tuple[Offered, ...]:
    """Fetch what ``--adapter`` names, and see that it is for this model.

    Raises ``UsageError`` or ``ModelError`` that names the adapter.
    """
    _check_count(ids)
    found = [_find(name, config, cache_dir) for name in ids]
    return tuple({one.name: one for one in found}.values())


def check_here(ids: Sequence[str], config: ModelConfig) -> None:
    """Raise what ``find_offered`` would, as far as this machine knows without asking a hub."""
    _check_count(ids)
    find_offered([name for name in ids if not is_hub_id(name)], config)


def _check_count(ids: Sequence[str]) -> None:
    if len(ids) > MAX_ADAPTERS:
        raise UsageError(
            f"{len(ids)} adapters are too many for one node.", f"Offer at most {MAX_ADAPTERS}."
        )


def load_offered(
    offered: Sequence[Offered],
    config: ModelConfig,
    blocks: tuple[int, int],
    device: torch.device,
) -> dict[str, Tuning]:
    """Their matrices for some blocks, by name. Raises as ``find_offered`` does."""
    return {one.name: _load(one, config, blocks).to(torch.float32, device) for one in offered}


def load_remaining(
    offered: Sequence[Offered],
    config: ModelConfig,
    blocks: tuple[int, int],
    device: torch.device,
) -> dict[str, Tuning]:
    """The same without those whose files are gone, or are others than were announced."""
    loaded: dict[str, Tuning] = {}
    for one in offered:
        with suppress(UsageError, ModelError):
            loaded |= load_offered([one], config, blocks, device)
    return loaded


def _load(one: Offered, config: ModelConfig, blocks: tuple[int, int]) -> Tuning:
    tuning = load_adapter(one.place, config, blocks).tuning
    if adapter_digest(one.place) != one.name.rpartition("@")[2]:
        raise UsageError(
            f"The files of the adapter {one.name} have changed since it was announced.",
            "Start the node again to offer them.",
        )
    return tuning


def _find(wanted: str, config: ModelConfig, cache_dir: Path | None) -> Offered:
    place = adapter_files(wanted, cache_dir)
    if load_adapter(place, config, (0, 1)).prompt is not None:
        raise UsageError(
            f"The adapter {wanted} has a soft prompt, which stays with the client.",
            "Give it to `petalnode generate --adapter` instead.",
        )
    directory = local_directory(wanted)
    base = wanted if directory is None else directory.resolve().name
    name = f"{base}@{adapter_digest(place)}"
    if not (name.isascii() and name.isprintable()) or len(name) > MAX_ADAPTER_CHARS:
        raise UsageError(
            f"The adapter's name {base!r} cannot be announced.",
            f"Rename it: printable ASCII of at most {MAX_ADAPTER_CHARS - 9} characters.",
        )
    return Offered(name, place, adapter_block_bytes(place, config))
