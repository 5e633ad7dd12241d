"""A model's files opened: configuration, fingerprint, and exactly the tensors that are asked for.

`open_checkpoint` reads only small files. Weights are read by `petalnode.models.loading`, tensor by
tensor through a memory map. torch is imported where tensors are read, because it takes a second.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petalnode.errors import ModelError
from petalnode.models import layout
from petalnode.models.families import family_of, read_config
from petalnode.models.layers.parts import Layout, TensorSpec
from petalnode.models.shards import FLOATS, TensorInfo, damaged, read_header
from petalnode.models.sources import Fetching, Source, find_source, read_json
from petalnode.models.tokenizer import Tokenizer, open_tokenizer

if TYPE_CHECKING:
    import torch

    from petalnode.models.chat_template import ChatTemplate

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_CONFIG_BYTES = 1 << 22
MAX_INDEX_BYTES = 1 << 26
NOT_FINGERPRINTED = {
    *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"),
}
"""Keys of config.json that change nothing about what the model computes."""


class Checkpoint:
    """The files of one model. `name` is the MODEL that was asked for."""

    def __init__(self, name: str, source: Source) -> None:
        self.name = name
        self._source = source
        self._raw = read_json(source.path("config.json"), MAX_CONFIG_BYTES)
        generation = self._json("generation_config.json", MAX_CONFIG_BYTES)
        self.config = read_config(self._raw, generation)
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
        """Open the tokenizer, once. Raises `ModelError` where there is none that can be used."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return open_tokenizer(self._source, self.config)

    def chat_template(self) -> "ChatTemplate":
        """Open the model's chat template. Raises `ModelError` where it has none."""
        from petalnode.models.chat_template import read_chat_template

        return read_chat_template(self._source)

    def fetch(
        self, *, blocks: Iterable[int] = (), client: bool = False, report: Fetching | None = None
    ) -> None:
        """See that the files of these blocks, and of the client's part, are here.

        `report` hears how far a download is. Raises `ModelError`, also when the disk has no room.
        """
        if self._index is None:  # its names are in the file itself
            self._source.fetch([SINGLE], report)
            return
        names = [
            layout.block_prefix(self.config, index) + name
            for index in blocks
            for name in layout.block_layout(self.config, index)
        ]
        names += layout.client_layout(self.config) if client else ()
        self._source.fetch(sorted({self._weight_map[name] for name in names}), report)

    def verify(self) -> None:
        """Check every shard's size, and all tensors' names and shapes; read headers only.

        Raises `ModelError` that names the file or tensor. Of a hub repo it would fetch all shards:
        there, each shard is checked when it is first used.
        """
        for shard in sorted(set(self._weight_map.values())):
            self._header(shard)

    def block_tensors(self, index: int) -> Iterator[tuple[str, "torch.Tensor"]]:
        """Yield (name, tensor) of one block; names without the block's prefix. See `tensors`."""
        prefix = layout.block_prefix(self.config, index)
        names = [prefix + name for name in layout.block_layout(self.config, index)]
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
                        yield name, file.get_tensor(self._stored_name(name))
            except SafetensorError as error:
                raise damaged(path, str(error)) from error

    @cached_property
    def _weight_map(self) -> dict[str, str]:
        """Which shard holds each tensor of the model; all names are checked here."""
        own = {self._stored_name(name): name for name in self._expected}
        names = {own.get(name, name): shard for name, shard in self._stored_map.items()}
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

    @cached_property
    def _stored_map(self) -> dict[str, str]:
        """Which shard holds each tensor, by the checkpoint's own names."""
        if self._index is not None:
            return self._index
        return dict.fromkeys(read_header(self._source.path(SINGLE)), SINGLE)

    @cached_property
    def _root(self) -> str:
        """What stands in this checkpoint where our names have the family's first root."""
        first, *others = family_of(self.config).roots
        for root in (first, *others):
            probe = next(iter(self._expected)).removeprefix(first)
            if root + probe in self._stored_map:
                return root
        return first

    def _stored_name(self, name: str) -> str:
        first = family_of(self.config).roots[0]
        if name.startswith(first):
            return self._root + name.removeprefix(first)
        beside = self._root.removesuffix("." + first) + "." + name  # a head within a larger model
        return beside if beside in self._stored_map else name

    def _read_index(self) -> dict[str, str] | None:
        """Return which shard holds each tensor, or None where all are in one file."""
        if self._source.has(SINGLE):  # which transformers too reads before an index beside it
            return None
        index = self._json(INDEX, MAX_INDEX_BYTES)
        if index is not None:
            return _index_map(index)
        pickled = self._source.pickled_weights()
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
            info = header.get(self._stored_name(name))
            if info is None:
                raise ModelError(f"{path} lacks the tensor {name!r}.", "Download it again.")
            _check_tensor(name, info, expected[name])
        self._headers[shard] = header
        return header

    @cached_property
    def _expected(self) -> Layout:
        return layout.expected_layout(self.config)

    def _json(self, file: str, limit: int) -> dict[str, Any] | None:
        path = self._source.optional(file)
        return None if path is None else read_json(path, limit)


def _check_tensor(name: str, info: TensorInfo, spec: TensorSpec) -> None:
    if info.shape != spec.shape:
        raise ModelError(
            f"The tensor {name!r} has the shape {list(info.shape)}, "
            f"but config.json asks for {list(spec.shape)}.",
            "Use config.json and weights of the same model.",
        )
    allowed = FLOATS if spec.stored is None else (spec.stored,)
    if info.dtype not in allowed:
        raise ModelError(
            f"The tensor {name!r} has the dtype {info.dtype}.",
            f"Use a checkpoint in one of {', '.join(allowed)}.",
        )


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
