"""What a session adds to the frozen model: an adapter that hops offer, or the client's own."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from petalnode.compute import Compute
from petalnode.errors import UsageError
from petalnode.models.client import ClientParts
from petalnode.models.config import ModelConfig
from petalnode.models.sources import local_directory
from petalnode.models.tuning.check import check_tuning
from petalnode.models.tuning.peft_files import Adapter, adapter_files, load_adapter
from petalnode.models.tuning.tuning import NOTHING, Tuning
from petalnode.routing.announcement import Announcement
from petalnode.routing.costs import Workload
from petalnode.session.soft_prompt import PromptedClient

MAX_SHOWN = 8
"""Names of adapters in one sentence."""


@dataclass(frozen=True, eq=False)
class Added:
    """``served`` is the full name of one that every hop must offer; the rest is the client's own:
    ``tuning`` for the hops, ``prompt`` [P, H] before the text."""

    served: str = ""
    tuning: Tuning = NOTHING
    prompt: Tensor | None = None

    def asked_of(self, workload: Workload, rows: int, max_positions: int) -> Workload:
        """The workload with what it needs of every hop; a prompt is in each of ``rows``."""
        if self.served:
            workload = replace(workload, adapters=(*workload.adapters, self.served))
        if self.prompt is None:
            return workload
        longer = len(self.prompt)
        return replace(
            workload,
            context=min(workload.context + longer, max_positions),
            kv_tokens=min(workload.kv_tokens + rows * longer, rows * max_positions),
        )

    def client(self, plain: ClientParts) -> ClientParts:
        """The client's part that begins with the prompt, if there is one."""
        return plain if self.prompt is None else PromptedClient(plain, self.prompt)


PLAIN = Added()
"""The model as it is."""


async def find_added(
    adapter: str | Adapter,
    config: ModelConfig,
    records: Iterable[Announcement],
    compute: Compute,
    cache_dir: Path | None = None,
) -> Added:
    """What is meant by an adapter, or by the name or place of one.

    A directory is the caller's own; else a name is looked for among those that ``records`` offer,
    then on the hub. An ``Adapter`` is copied: what becomes of it later is not the session's. Raises
    ``UsageError`` or ``ModelError`` where there is none that fits.
    """
    if isinstance(adapter, str):
        if not adapter:
            return PLAIN
        if local_directory(adapter) is None:
            offered = {name for record in records for name in record.adapters}
            served = offered_as(adapter, offered)
            if served or not _is_place(adapter):
                return Added(served=served or _nobody(adapter, offered))
        read = partial(read_adapter, adapter, config, cache_dir)
        found = await compute.run(read)
        return Added(tuning=found.tuning, prompt=found.prompt)
    added = await own_tuning(adapter.tuning, config, (0, config.num_blocks), compute)
    return replace(added, prompt=None if adapter.prompt is None else snapshot(adapter.prompt))


async def own_tuning(
    tuning: Tuning, config: ModelConfig, blocks: tuple[int, int], compute: Compute
) -> Added:
    """A copy of matrices for these blocks, as they are now: a hop that comes later gets the same.

    Raises ``UsageError``, before a node is asked, for what the blocks cannot run.
    """

    def copied() -> Tuning:
        copy = tuning.map(snapshot)
        check_tuning(config, *blocks, copy)
        return copy

    return Added(tuning=await compute.run(copied)) if tuning.blocks else PLAIN


def snapshot(tensor: Tensor) -> Tensor:
    """A copy that knows nothing of the tensor."""
    return tensor.detach().clone()


def read_adapter(place: str, config: ModelConfig, cache_dir: Path | None = None) -> Adapter:
    """The adapter of a directory or hub repo. Raises ``UsageError`` or ``ModelError``."""
    return load_adapter(adapter_files(place, cache_dir), config)


def offered_as(wanted: str, offered: Collection[str]) -> str:
    """The full name, ``name@digest``, under which an adapter is offered, "" if it is not.

    Raises ``UsageError`` where several have that name.
    """
    found = sorted(name for name in offered if wanted in (name, name.rpartition("@")[0]))
    if len(found) > 1:
        raise UsageError(
            f"Several adapters are offered as {wanted!r}: {_some(found)}.", "Name one of these."
        )
    return found[0] if found else ""


def _is_place(adapter: str) -> bool:
    """Whether it can be read, or told why not, although nobody offers it."""
    return "/" in adapter or os.path.isfile(adapter)


def _some(names: Sequence[str]) -> str:
    """Names that strangers gave: as many as one reads."""
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return ", ".join(names[:MAX_SHOWN]) + more


def _nobody(wanted: str, offered: Collection[str]) -> str:
    there = f"There are: {_some(sorted(offered))}." if offered else "Nobody offers any."
    there = f"Check the path. {there}"
    raise UsageError(f"{wanted!r} is no directory, and no node offers an adapter of it.", there)
