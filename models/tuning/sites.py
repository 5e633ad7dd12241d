"""Which linear layers of a block can be adapted, asked of the block itself. No torch.

A site is a layer that quantization may shrink and that is no expert: the projections of attention
and the dense feed-forwards. Routers, experts, embeddings and heads are none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from petalnode.errors import UsageError
from petalnode.models.config import ModelConfig
from petalnode.models.families import family_of
from petalnode.models.layers.parts import ShapeParts, named_sizes

if TYPE_CHECKING:
    from petalnode.models.layers.parts import Grouped, Layer

ALL_LINEAR = "all-linear"
"""PEFT's word for every site."""


class _SiteParts(ShapeParts):
    """Writes down the sites only."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, tuple[int, int]] = {}

    def linear(
        self,
        names: str | Sequence[str],
        outputs: int | Sequence[int],
        inputs: int,
        *,
        dense: bool = False,
        **rest: Any,
    ) -> Layer:
        """See `Parts.linear`."""
        if not dense:
            self.sites |= {name: (size, inputs) for name, size in named_sizes(names, outputs)}
        return super().linear(names, outputs, inputs, dense=dense, **rest)

    def experts(
        self, names: str | Sequence[str], experts: int, outputs: int | Sequence[int], inputs: int
    ) -> Grouped:
        """See `Parts.experts`: each is a linear layer, and no site."""
        return super().stacked_experts(names[0], experts, 1, inputs)


def lora_sites(config: ModelConfig, index: int) -> dict[str, tuple[int, int]]:
    """Return the sites of block `index`: (outputs, inputs) by name within the block."""
    return dict(_sites(config, index))


@lru_cache(maxsize=256)
def _sites(config: ModelConfig, index: int) -> dict[str, tuple[int, int]]:
    parts = _SiteParts()
    family_of(config).block(parts, config, index)
    return parts.sites


def is_target(site: str, target: str) -> bool:
    """Return whether a target, by PEFT's rule, names a site: as a whole or by its last words."""
    return target == ALL_LINEAR or site == target or site.endswith("." + target)


def match_targets(config: ModelConfig, targets: str | Sequence[str]) -> dict[int, list[str]]:
    """Return the sites that the targets name, by block; blocks without one are left out.

    A string is one target. Raises `UsageError` for a target that names nothing, and for none.
    """
    targets = [targets] if isinstance(targets, str) else targets
    blocks = {index: lora_sites(config, index) for index in range(config.num_blocks)}
    there = sorted({site for sites in blocks.values() for site in sites})
    if not targets:
        raise UsageError("No target modules are named.", _there_are(there))
    for target in targets:
        if not isinstance(target, str) or not any(is_target(site, target) for site in there):
            raise unknown_target(str(target), there)
    found = {
        index: [site for site in sites if any(is_target(site, one) for one in targets)]
        for index, sites in blocks.items()
    }
    return {index: sites for index, sites in found.items() if sites}


def unknown_target(target: str, there: Sequence[str]) -> UsageError:
    """Return the error for a module that is no site."""
    return UsageError(
        f"The model has no module {target[:100]!r} that can be adapted.", _there_are(there)
    )


def _there_are(there: Sequence[str]) -> str:
    return f"Name some of {', '.join(there)}."
