"""Adapters as files: PEFT's directories, both ways, and deep prompts in the same two files.

A LoRA is what the package peft saves and loads: adapter_config.json and adapter_model.safetensors.
A soft prompt is peft's prompt tuning, where a prompt beside the embeddings is one before the first
block; what peft has no files for, deep prompts above all, is saved under a peft_type of our own.
Files may come from strangers: headers are checked before a tensor is read, nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from petalnode.errors import ModelError, UsageError
from petalnode.models.config import ModelConfig
from petalnode.models.digests import file_sha256
from petalnode.models.families import family_of
from petalnode.models.shards import FLOATS, damaged, read_header
from petalnode.models.sources import HUB_ID, Directory, Source, local_directory, read_json
from petalnode.models.tuning import peft_config
from petalnode.models.tuning.check import OTHER_MODEL, check_prompt, check_shapes, check_tuning
from petalnode.models.tuning.sites import lora_sites, unknown_target
from petalnode.models.tuning.tuning import BlockTuning, LowRank, Tuning

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
Kind = Literal["lora", "prompt", "deep-prompt"]
LORA_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
PEFT_ROOT = "base_model.model."
SOFT_PROMPT = "prompt_embeddings"
BLOCK_PROMPT = "blocks.{}.prompt"
BLOCK_PROMPT_NAME = re.compile(r"blocks\.(?P<index>\d{1,5})\.prompt")


@dataclass(frozen=True, eq=False)
class Adapter:
    """What was trained: `tuning` for the blocks, and a soft `prompt` [P, H] before the text.

    `name` is the directory's; `base_model` says which model it was trained for, as far as known.
    """

    tuning: Tuning
    prompt: Tensor | None = None
    name: str = ""
    base_model: str = ""

    @property
    def kind(self) -> Kind:
        """What it is made of."""
        if any(block.lora for block in self.tuning.blocks.values()):
            return "lora"
        return "deep-prompt" if self.tuning.blocks else "prompt"


def adapter_files(place: str, cache_dir: str | Path | None = None) -> Path:
    """Return the directory of an adapter: `place` itself, or a hub repo's, fetched where need be.

    Raises `UsageError` or `ModelError` where there is none, or one without safetensors.
    """
    try:
        source = _find(place, cache_dir)
        _check_complete(source)
        source.fetch([CONFIG, WEIGHTS])
        return source.path(WEIGHTS).parent
    except ModelError as error:  # a hub's remedies are for whoever wants a model
        remedy = error.remedy.replace("a model directory", "the directory of an adapter")
        raise ModelError(error.cause, remedy) from error


def is_hub_id(place: str) -> bool:
    """Return whether an adapter of that name would be asked of the hub."""
    here = place.startswith(".") or os.path.exists(os.path.expanduser(place))
    return not here and HUB_ID.fullmatch(place) is not None


def _find(place: str, cache_dir: str | Path | None) -> Source:
    if (path := local_directory(place)) is not None:
        return Directory(path)
    if os.path.isfile(os.path.expanduser(place)):
        raise UsageError(
            f"{place[:200]!r} is a file.", f"Give the directory that holds {CONFIG} and {WEIGHTS}."
        )
    match = HUB_ID.fullmatch(place)
    if match is None or not is_hub_id(place):
        raise UsageError(
            f"There is no adapter {place[:200]!r}.",
            'Give the directory of an adapter, or a Hugging Face repo as "org/name".',
        )
    from petalnode.models.hub import HubRepo

    return HubRepo(match["repo"], match["revision"], cache_dir, first=CONFIG)


def _check_complete(source: Source) -> None:
    try:
        lacks = _lacks(source)
    except OSError as error:
        raise UsageError(
            f"{source} cannot be read: {error.strerror}.", "Check its permissions."
        ) from error
    if lacks is not None:
        raise lacks


def _lacks(source: Source) -> UsageError | None:
    if not source.has(CONFIG):
        return UsageError(
            f"{source} has no {CONFIG}.", f"Give an adapter: {CONFIG} and {WEIGHTS}, as peft saves."
        )
    if source.has(WEIGHTS):
        return None
    pickled = source.pickled_weights()
    if pickled is not None:
        return UsageError(
            f"{source} has only pickled weights ({pickled}), which could run any code.",
            "Save the adapter with peft's save_pretrained as safetensors.",
        )
    return UsageError(f"{source} has no {WEIGHTS}.", "Use a complete adapter.")


def adapter_digest(place: Path) -> str:
    """Return 8 hexadecimal digits that tell an adapter's files from others."""
    both = file_sha256(place / CONFIG) + file_sha256(place / WEIGHTS)
    return hashlib.sha256(both.encode()).hexdigest()[:8]


def adapter_block_bytes(source: Path, config: ModelConfig) -> int:
    """Return what a directory's adapter adds to one block at most, loaded, in bytes.

    Only headers are read. Raises as `load_adapter` does for tensors of unknown names.
    """
    return max(_Reader(source, config, range(0)).block_bytes().values(), default=0)


def load_adapter(
    source: Path, config: ModelConfig, blocks: tuple[int, int] | None = None
) -> Adapter:
    """Read an adapter from a directory, or only its part for the blocks [start, end).

    Tensors are float32. The files are checked as a whole by their header; numbers, where they are
    read. Raises `UsageError` for an adapter that is not for this model, or asks for what petalnode
    does not add, and `ModelError` for damaged files.
    """
    _check_complete(Directory(source))
    start, end = blocks or (0, config.num_blocks)
    reader = _Reader(source, config, range(start, end))
    kind, prompt = reader.settings.get("peft_type"), None
    if kind == peft_config.LORA:
        tuning = reader.lora()
    elif kind in (peft_config.PROMPT, peft_config.OWN_PROMPT):
        tuning, prompt = reader.prompts()
    else:
        raise UsageError(
            f"{reader.what} is of the kind {str(kind)[:60]!r}.",
            "Use LoRA or prompt tuning, or train one with `petalnode tune`.",
        )
    check_tuning(config, start, end, tuning)
    base = reader.settings.get("base_model_name_or_path")
    return Adapter(tuning, prompt, source.resolve().name, base if isinstance(base, str) else "")


class _Reader:
    """An adapter's two files, its `blocks` of them; `what` begins a sentence about it."""

    def __init__(self, source: Path, config: ModelConfig, blocks: range) -> None:
        self.what = f"The adapter {source.resolve().name}"
        self.settings = read_json(source / CONFIG, MAX_CONFIG_BYTES)
        self._weights, self._config, self._blocks = source / WEIGHTS, config, blocks
        self._header = read_header(self._weights)
        if not self._header:
            raise UsageError(f"{self.what} is empty.", "Use a complete adapter.")
        for tensor, info in self._header.items():
            if info.dtype not in FLOATS:
                raise UsageError(
                    f"{self.what} has a tensor {tensor[:100]!r} of the dtype {info.dtype}.",
                    f"Save it in one of {', '.join(FLOATS)}.",
                )

    def lora(self) -> Tuning:
        """Return the matrices."""
        settings = peft_config.read_lora(self.settings, self.what)
        pairs: dict[tuple[int, str], dict[str, str]] = {}
        for tensor in self._header:
            match = LORA_TENSOR.fullmatch(tensor)
            if match is None:
                raise self._unknown(tensor)
            sides = pairs.setdefault(self._place(match["module"]), {})
            if match["side"] in sides:
                raise UsageError(
                    f"{self.what} has one matrix twice, the second as {tensor[:100]!r}.",
                    "Use a file with one adapter.",
                )
            sides[match["side"]] = tensor
        found: dict[int, dict[str, LowRank]] = {}
        module = peft_config.modules_of(self._config)
        with self._open() as file:
            for (index, site), sides in sorted(pairs.items()):
                full = module.format(index) + site
                self._check_pair(index, site, sides, settings.rank_of(full))
                if index in self._blocks:
                    a, b = (file.get_tensor(sides[side]).float() for side in "AB")
                    found.setdefault(index, {})[site] = LowRank(a, b, settings.scale_of(full))
        return Tuning({index: BlockTuning(lora) for index, lora in found.items()})

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self._weights, framework="pt") as file:
                yield file
        except SafetensorError as error:  # it looks closer than `read_header`
            raise damaged(self._weights, f"safetensors says {str(error)[:200]!r}") from error

    def block_bytes(self) -> Counter[int]:
        """Return what the tensors of each block take as float32."""
        sizes: Counter[int] = Counter()
        for tensor, info in self._header.items():
            if match := LORA_TENSOR.fullmatch(tensor):
                index, _ = self._place(match["module"])
            elif match := BLOCK_PROMPT_NAME.fullmatch(tensor):
                index = int(match["index"])
            else:
                continue
            sizes[index] += math.prod(info.shape) * torch.float32.itemsize
        return sizes

    def _place(self, module: str) -> tuple[int, str]:
        """Return the block and the site of a module's full name."""
        family = family_of(self._config)
        path = module.removeprefix(PEFT_ROOT)
        layers = family.blocks.removeprefix(family.roots[0]).removesuffix("{}.")
        roots = "|".join(re.escape(root) for root in (*family.roots, ""))
        match = re.fullmatch(
            rf"({roots}){re.escape(layers)}(?P<index>\d{{1,5}})\.(?P<site>.+)", path
        )
        index = 0 if match is None else int(match["index"])
        if index >= self._config.num_blocks:
            raise UsageError(
                f"{self.what} has a block {index}, "
                f"but the model has {self._config.num_blocks} blocks.",
                OTHER_MODEL,
            )
        sites = lora_sites(self._config, index)
        if match is None or match["site"] not in sites:
            raise unknown_target(path if match is None else match["site"], sorted(sites))
        return index, match["site"]

    def _check_pair(self, index: int, site: str, sides: dict[str, str], rank: int) -> None:
        """Raise `UsageError` unless both matrices are there, of the layer's sizes and the rank."""
        name = f"{site} in block {index}"
        if len(sides) < 2:
            raise UsageError(
                f"{self.what} has one of two matrices for {name}.", "Use a complete adapter."
            )
        a, b = (self._header[sides[side]].shape for side in "AB")
        outputs, inputs = lora_sites(self._config, index)[site]
        if len(a) == len(b) == 2 and (a[1], b[0]) == (inputs, outputs) and a[0] != b[1]:
            raise UsageError(
                f"{self.what} has matrices of two ranks for {name}: A of {a[0]}, B of {b[1]}.",
                "Use matrices that were saved together.",
            )
        check_shapes(a, b, name, outputs, inputs)
        if a[0] != rank:
            raise UsageError(
                f"{self.what} has the rank {a[0]} for {name}, but its {CONFIG} says {rank}.",
                "Use two files that were saved together.",
            )

    def prompts(self) -> tuple[Tuning, Tensor | None]:
        """Return the prompts of blocks, and the one before the text."""
        self._check_prompts(self.settings["peft_type"] == peft_config.OWN_PROMPT)
        found: dict[int, BlockTuning] = {}
        prompt: Tensor | None = None
        with self._open() as file:
            if SOFT_PROMPT in self._header:
                prompt = file.get_tensor(SOFT_PROMPT).float()
                check_prompt(self._config, prompt, f"{self.what}'s prompt")
            for index in self._blocks:
                if (name := BLOCK_PROMPT.format(index)) in self._header:
                    found[index] = BlockTuning(prompt=file.get_tensor(name).float())
        return Tuning(found), prompt

    def _check_prompts(self, own: bool) -> None:
        """Raise `UsageError` unless the model can take prompts of these names and shapes."""
        config, settings = self._config, self.settings
        if not own and not family_of(config).plain_embeddings:
            raise UsageError(
                f"{self.what} is a prompt of peft's, which a {config.family} changes before its "
                "first block.",
                "Train one with `petalnode tune --method prompt`.",
            )
        tokens = settings.get("num_virtual_tokens")
        if type(tokens) is not int or not 0 < tokens < config.max_positions:
            raise peft_config.bad_value(self.what, "num_virtual_tokens", tokens)
        for key, ours in (("token_dim", config.hidden_size), ("num_layers", config.num_blocks)):
            if settings.get(key) not in (ours, None):
                raise UsageError(
                    f"{self.what} has {key} = {peft_config.shown(settings[key])}, "
                    f"but the model has {ours}.",
                    OTHER_MODEL,
                )
        names = {SOFT_PROMPT}
        if own:
            names |= {BLOCK_PROMPT.format(index) for index in range(config.num_blocks)}
        for tensor, info in self._header.items():
            if tensor not in names:
                raise self._unknown(tensor)
            if info.shape != (tokens, config.hidden_size):
                raise UsageError(
                    f"{self.what} has a prompt of the shape {list(info.shape)} instead of "
                    f"{[tokens, config.hidden_size]}.",
                    OTHER_MODEL,
                )

    def _unknown(self, tensor: str) -> UsageError:
        return UsageError(
            f"{self.what} has a tensor {tensor[:100]!r}, which petalnode does not know there.",
            "Train an adapter of low-rank matrices or prompts alone.",
        )


def save_adapter(path: Path, adapter: Adapter, config: ModelConfig, base_model: str) -> None:
    """Write an adapter's two files into the directory `path`, which is made where it lacks.

    `base_model` is the model as a user names it. Raises `UsageError` for an adapter that does not
    fit `config`, is empty, or has matrices and prompts at once, and where the disk refuses.
    """
    check_tuning(config, 0, config.num_blocks, adapter.tuning)
    if adapter.prompt is not None:
        check_prompt(config, adapter.prompt)
    prompts = adapter.prompt is not None or any(
        block.prompt is not None for block in adapter.tuning.blocks.values()
    )
    if prompts and adapter.kind == "lora":
        raise UsageError("An adapter is saved with matrices or with prompts, not both.")
    if not prompts and adapter.kind != "lora":
        raise UsageError("There is nothing in the adapter to save.")
    made = _prompt_files if prompts else _lora_files
    tensors, settings = made(adapter, config, base_model)
    tensors = {
        name: tensor.to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in tensors.items()
    }
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
        (path / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise UsageError(
            f"The adapter cannot be written to {path}: {error.strerror}.",
            "Choose a directory that can be written to and has room.",
        ) from error


def _lora_files(
    adapter: Adapter, config: ModelConfig, base_model: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    for index, block in adapter.tuning.blocks.items():
        for site, pair in block.lora.items():
            module = peft_config.modules_of(config).format(index) + site
            tensors[f"{PEFT_ROOT}{module}.lora_A.weight"] = pair.a
            tensors[f"{PEFT_ROOT}{module}.lora_B.weight"] = pair.b
            ranks[module], scales[module] = pair.rank, pair.scale
    return tensors, peft_config.lora_config(config, ranks, scales, base_model)


def _prompt_files(
    adapter: Adapter, config: ModelConfig, base_model: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {
        BLOCK_PROMPT.format(index): block.prompt
        for index, block in adapter.tuning.blocks.items()
        if block.prompt is not None
    }
    plain = not tensors and family_of(config).plain_embeddings
    if adapter.prompt is not None:
        tensors[SOFT_PROMPT] = adapter.prompt
    lengths = {len(tensor) for tensor in tensors.values()}
    if len(lengths) > 1:
        raise UsageError(f"The adapter's prompts differ in length: {sorted(lengths)}.")
    kind = peft_config.PROMPT if plain else peft_config.OWN_PROMPT
    return tensors, peft_config.prompt_config(config, kind, lengths.pop(), base_model)
