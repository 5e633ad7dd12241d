"""A model's files opened: configuration, fingerprint, and exactly the tensors that are asked for.

`open_checkpoint` reads only small files. Weights are read by `load_block_span` and `load_client`,
tensor by tensor through a memory map that is closed after each block, so that the peak is the
span's own size plus one block. torch is imported inside those two, because it takes a second.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petalnode.errors import ModelError, UsageError
from petalnode.models import layout
from petalnode.models.config import DTYPES, ModelConfig
from petalnode.models.shards import FLOATS, TensorInfo, damaged, read_header
from petalnode.models.sources import Source, find_source, read_json
from petalnode.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from petalnode.models.client import ClientParts
    from petalnode.models.span import Span

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_CONFIG_BYTES = 1 << 22
MAX_INDEX_BYTES = 1 << 26
NOT_FINGERPRINTED = {
    *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"),
}
"""Keys of config.json that change nothing about what the model computes."""

Progress = Callable[[int, int], None]


class Checkpoint:
    """The files of one model. `name` is the MODEL that was asked for."""

    def __init__(self, name: str, source: Source) -> None:
        self.name = name
        self._source = source
        self._raw = read_json(source.path("config.json"), MAX_CONFIG_BYTES)
        generation = self._json("generation_config.json", MAX_CONFIG_BYTES)
        self.config = ModelConfig.from_hf(self._raw, generation)
        self._index = self._read_index()
        self._headers: dict[str, dict[str, TensorInfo]] = {}
        if source.is_local:
            self.verify()

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits, the same on every machine for the same config.json and weights."""
        digest = hashlib.sha256(b"petalnode model 1\n")
        config = {k: v for k, v in self._raw.items() if k not in NOT_FINGERPRINTED}
        digest.update(json.dumps(config, sort_keys=True).encode())
        shards = sorted(set(self._index.values())) if self._index else [SINGLE]
        for shard, sha256 in zip(shards, self._source.digests(shards), strict=True):
            digest.update(f"\n{shard} {sha256}".encode())
        return digest.hexdigest()[:32]

    def tokenizer(self) -> Tokenizer:
        """Open tokenizer.json. Raises `ModelError` where there is none or it cannot be used."""
        path = self._source.path("tokenizer.json")
        options = self._json("tokenizer_config.json", MAX_CONFIG_BYTES)
        return Tokenizer(path, options or {}, self.config)

    def verify(self) -> None:
        """Check every shard's size, and all tensors' names and shapes; read headers only.

        Raises `ModelError` that names the file or tensor. Of a hub repo it would fetch all shards:
        there, each shard is checked when it is first used.
        """
        for shard in sorted(set(self._weight_map.values())):
            self._header(shard)

    def block_tensors(self, index: int) -> Iterator[tuple[str, "torch.Tensor"]]:
        """Yield (name, tensor) of one block; names without the block's prefix. See `tensors`."""
        prefix = layout.block_prefix(index)
        names = [prefix + name for name in layout.block_shapes(self.config)]
        for name, tensor in self.tensors(names):
            yield name.removeprefix(prefix), tensor

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, "torch.Tensor"]]:
        """Yield (name, tensor) for each name, shard by shard, in the checkpoint's dtype.

        Each tensor is a view of a memory map: copy what shall stay, keep no view.
        """
        from safetensors import SafetensorError, safe_open

        weight_map = self._weight_map
        for shard, group in groupby(sorted(names, key=weight_map.__getitem__), weight_map.get):
            assert shard is not None
            self._header(shard)
            path = self._source.path(shard)
            try:
                with safe_open(path, framework="pt") as file:
                    for name in group:
                        yield name, file.get_tensor(name)
            except SafetensorError as error:
                raise damaged(path, str(error)) from error

    @cached_property
    def _weight_map(self) -> dict[str, str]:
        """Which shard holds each tensor of the model; all names are checked here."""
        names = self._index
        if names is None:
            names = dict.fromkeys(read_header(self._source.path(SINGLE)), SINGLE)
        expected = self._expected
        for name in names:
            if name not in expected and not layout.is_ignored(self.config, name):
                raise ModelError(
                    f"{self._source} holds the tensor {name!r}, unknown to its config.json.",
                    "Use config.json and weights of the same model.",
                )
        for name in expected:
            if name not in names:
                raise ModelError(
                    f"{self._source} lacks the tensor {name!r} that its config.json asks for.",
                    "Use config.json and weights of the same model.",
                )
        return {name: shard for name, shard in names.items() if name in expected}

    def _read_index(self) -> dict[str, str] | None:
        """Return which shard holds each tensor, or None where all are in one file."""
        index = self._json(INDEX, MAX_INDEX_BYTES)
        if index is not None:
            return _index_map(index)
        pickled = None if self._source.has(SINGLE) else self._source.pickled_weights()
        if pickled is not None:
            raise ModelError(
                f"{self._source} has only pickled weights ({pickled}), which could run any code.",
                "Use a safetensors version, or convert it with transformers' save_pretrained.",
            )
        return None

    def _header(self, shard: str) -> dict[str, TensorInfo]:
        """Return a shard's header, after checking it against the configuration."""
        if shard in self._headers:
            return self._headers[shard]
        path = self._source.path(shard)
        header = read_header(path)
        expected = self._expected
        for name in (name for name, where in self._weight_map.items() if where == shard):
            if name not in header:
                raise ModelError(f"{path} lacks the tensor {name!r}.", "Download it again.")
            if header[name].shape != expected[name]:
                raise ModelError(
                    f"The tensor {name!r} has the shape {list(header[name].shape)}, "
                    f"but config.json asks for {list(expected[name])}.",
                    "Use config.json and weights of the same model.",
                )
            if header[name].dtype not in FLOATS:
                raise ModelError(
                    f"The tensor {name!r} has the dtype {header[name].dtype}.",
                    f"Use a checkpoint in one of {', '.join(FLOATS)}.",
                )
        self._headers[shard] = header
        return header

    @cached_property
    def _expected(self) -> layout.Shapes:
        return layout.expected_shapes(self.config)

    def _json(self, file: str, limit: int) -> dict[str, Any] | None:
        path = self._source.optional(file)
        return None if path is None else read_json(path, limit)


def _index_map(index: dict[str, Any]) -> dict[str, str]:
    """Return the checked weight_map of a parsed index: shards are plain file names."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{INDEX} has no weight_map.", "Download the file again.")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and Path(shard).name == shard
        if not plain or not shard.endswith(".safetensors"):
            raise ModelError(
                f"{INDEX} puts the tensor {name[:100]!r} into {str(shard)[:100]!r}, "
                "which is not the name of a safetensors file.",
                "Use an unmodified checkpoint.",
            )
    return weight_map


def open_checkpoint(
    model: str, *, revision: str | None = None, cache_dir: str | Path | None = None
) -> Checkpoint:
    """Open MODEL: "demo", a directory, or a hub repo `org/name[@revision]`.

    `cache_dir` replaces the hub's cache directory. Raises `ModelError` or `UsageError`; for a
    directory, every shard's header is checked at once.
    """
    return Checkpoint(model, find_source(model, revision, cache_dir))


def as_dtype(dtype: "torch.dtype | str") -> "torch.dtype":
    """Return the torch dtype of one of the names in `DTYPES`."""
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UsageError(f"There is no dtype {dtype!r}.", f"Choose one of {', '.join(DTYPES)}.")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def load_block_span(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    *,
    dtype: "torch.dtype | str" = "float32",
    device: "torch.device | str" = "cpu",
    progress: Progress | None = None,
) -> "Span":
    """Read the blocks [start, end), block by block.

    `progress` is called with (blocks done, blocks in all), first with 0. Raises `UsageError` for a
    range outside the model, `ModelError` for weights that do not fit the configuration.
    """
    import torch

    from petalnode.models.llama import LlamaBlock
    from petalnode.models.span import Span

    config, total = checkpoint.config, end - start
    if not 0 <= start < end <= config.num_blocks:
        raise UsageError(
            f"The blocks {start}:{end} are out of range.",
            f"{checkpoint.name} has the blocks 0:{config.num_blocks}.",
        )
    blocks: list[LlamaBlock] = []
    with torch.inference_mode():
        for index in range(start, end):
            if progress is not None:
                progress(index - start, total)
            block = LlamaBlock(config, index, as_dtype(dtype), torch.device(device))
            targets = dict(block.targets())
            for name, tensor in checkpoint.block_tensors(index):
                targets[name].copy_(tensor)
            blocks.append(block)
    if progress is not None:
        progress(total, total)
    return Span(config, start, end, blocks)


def load_client(
    checkpoint: Checkpoint,
    *,
    dtype: "torch.dtype | str" = "float32",
    device: "torch.device | str" = "cpu",
) -> "ClientParts":
    """Read embeddings, final norm and head; a tied head shares the embeddings' memory."""
    import torch

    from petalnode.models.client import ClientParts

    config = checkpoint.config
    kept: dict[str, torch.Tensor] = {}
    for name, tensor in checkpoint.tensors(layout.client_shapes(config)):
        kept[name] = torch.empty(tensor.shape, dtype=as_dtype(dtype), device=device)
        kept[name].copy_(tensor)
    embed = kept[layout.EMBED]
    return ClientParts(config, embed, kept[layout.NORM], kept.get(layout.HEAD, embed))
