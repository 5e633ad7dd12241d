"""Text to token ids and back, by the `tokenizers` library from a model's own files.

The ids are those of current transformers, which lets tokenizer_config.json overrule parts of
tokenizer.json: see `_follow_named` and `_follow_llama_class`. Which tokens a text begins and ends
with is for tokenizer.json alone to say.
"""

import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, pre_tokenizers

from petalnode.errors import ModelError
from petalnode.models.config import ModelConfig
from petalnode.models.sources import Source, read_json

MAX_TOKENIZER_BYTES = 1 << 28
MAX_OPTIONS_BYTES = 1 << 24
FILE, OPTIONS = "tokenizer.json", "tokenizer_config.json"
CONVERTIBLE = ("tokenizer.model", "spiece.model", "vocab.json")
"""Any of them makes a tokenizer in the older forms: SentencePiece, or a vocabulary and merges."""
BESIDE = ("merges.txt", OPTIONS, "special_tokens_map.json", "added_tokens.json")
NAMED_TOKENS = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
)
HALF_PAIR = re.compile("[\ud800-\udfff]")
CONVERTING = ("transformers", "sentencepiece", "google.protobuf")


class Tokenizer:
    """A model's tokenizer. `eos_ids` end a text; `size` counts ids, added tokens included."""

    def __init__(
        self, model: Path | tokenizers.Tokenizer, options: Mapping[str, Any], config: ModelConfig
    ) -> None:
        """Take a tokenizer, or read a tokenizer.json and follow `options`.

        `options` is the parsed tokenizer_config.json. Raises `ModelError` where the file cannot be
        used.
        """
        if isinstance(model, Path):
            model = _read(model)
            _follow_llama_class(model, options, config)
            _follow_named(model, options)
        self._tokenizer = model
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.eos_ids = config.eos_ids
        self.size = self._tokenizer.get_vocab_size()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token for token, entry in added.items() if entry.special)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Return token ids; with `add_special` also the first token, if the model wants one."""
        return self._tokenizer.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids without special tokens; broken UTF-8 becomes U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def is_silent(self, token: int) -> bool:
        """Return whether `decode` leaves the id out: a special token, or one without a piece."""
        return token in self._special or self._tokenizer.id_to_token(token) is None

    def is_byte(self, token: int) -> bool:
        """Return whether the id is a byte-fallback token: one raw byte, written `<0x0A>`."""
        piece = self._tokenizer.id_to_token(token) or ""
        return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def open_tokenizer(source: Source, config: ModelConfig) -> Tokenizer:
    """Open a model's tokenizer.json, or convert what it has instead with transformers.

    Raises `ModelError` where there is neither, or where the `hf` extra is needed and missing.
    """
    if source.has(FILE) or not any(map(source.has, CONVERTIBLE)):
        file = source.path(FILE)
        path = source.optional(OPTIONS)
        options = {} if path is None else read_json(path, MAX_OPTIONS_BYTES)
        return Tokenizer(file, options, config)
    return Tokenizer(_convert(source), {}, config)


def text_of(token: object) -> str | None:
    """Return the text of a special token as configuration files have it: plain or an object.

    Raises `ModelError` for half a surrogate pair, which JSON can write and no text can hold.
    """
    value = token.get("content") if isinstance(token, Mapping) else token
    if isinstance(value, str) and HALF_PAIR.search(value):
        raise ModelError(f"The special token {value!a} is no text.", f"Download {OPTIONS} again.")
    return value if isinstance(value, str) else None


def _read(path: Path) -> tokenizers.Tokenizer:
    try:
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise ModelError(f"{path} has more than {MAX_TOKENIZER_BYTES} bytes.")
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from error
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing more specific
        raise ModelError(
            f"{path} is not a tokenizer that the tokenizers library can read: {str(error)[:100]}.",
            "Download the file again, or update tokenizers.",
        ) from error


def _follow_named(tokenizer: tokenizers.Tokenizer, options: Mapping[str, Any]) -> None:
    """Make special what the options name as such; the file may have it as a plain piece."""
    added = {entry.content for entry in tokenizer.get_added_tokens_decoder().values()}
    texts = (text_of(options.get(name)) for name in NAMED_TOKENS)
    named = (text for text in texts if text and tokenizer.token_to_id(text) is not None)
    tokenizer.add_special_tokens([text for text in named if text not in added])


def _follow_llama_class(
    tokenizer: tokenizers.Tokenizer, options: Mapping[str, Any], config: ModelConfig
) -> None:
    """Put ▁ before a text as transformers 5 does, where Llama 2's class is asked for.

    It ignores the file's normalizer, which puts one before each text between special tokens too,
    and another one where a text begins with a space.
    """
    named = str(options.get("tokenizer_class", "")).removesuffix("Fast")
    if config.family != "llama" or named != "LlamaTokenizer":
        return
    normalizer = json.loads(tokenizer.to_str())["normalizer"] or {}
    if {"type": "Prepend", "prepend": "▁"} not in normalizer.get("normalizers", ()):
        return
    prefix = options.get("add_prefix_space") is not False
    scheme = ("always" if options.get("legacy") else "first") if prefix else "never"
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1)] if prefix else [])])


def _convert(source: Source) -> tokenizers.Tokenizer:
    """Let transformers make a tokenizer of the older files; nothing of the repo is executed."""
    paths = [path for name in (*CONVERTIBLE, *BESIDE) if (path := source.optional(name))]
    missing = [name for name in CONVERTING if not _installed(name)]
    if missing:
        raise ModelError(
            f"{source} has no {FILE} but {paths[0].name}, and {', '.join(missing)} is not "
            "installed to convert it.",
            "Install petalnode with its hf extra: pip install 'petalnode[hf]'.",
        )
    from transformers import AutoTokenizer

    try:
        converted = AutoTokenizer.from_pretrained(
            source.path("config.json").parent, local_files_only=True, trust_remote_code=False
        )
        backend: tokenizers.Tokenizer = converted.backend_tokenizer
    except Exception as error:  # transformers promises nothing more specific
        raise ModelError(
            f"{paths[0]} cannot be converted: {' '.join(str(error).split())[:150]}.",
            f"Download the file again, or use a repo that has {FILE}.",
        ) from error
    return backend


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False
