"""Text to token ids and back, by the `tokenizers` library from a model's tokenizer.json."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from petalnode.errors import ModelError
from petalnode.models.config import ModelConfig

MAX_TOKENIZER_BYTES = 1 << 28


class Tokenizer:
    """A model's tokenizer. `eos_ids` end a text; `size` counts ids, added tokens included."""

    def __init__(self, path: Path, options: Mapping[str, Any], config: ModelConfig) -> None:
        """Read tokenizer.json; `options` is the parsed tokenizer_config.json.

        Raises `ModelError` where the file cannot be used.
        """
        self._tokenizer = _read(path)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.eos_ids = config.eos_ids
        self.size = self._tokenizer.get_vocab_size()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token for token, entry in added.items() if entry.special)
        # Files without a post-processor leave the first token to whoever encodes.
        self._bos: tuple[int, ...] = ()
        if self._tokenizer.post_processor is None and options.get("add_bos_token") is True:
            self._bos = () if config.bos_id is None else (config.bos_id,)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Return token ids; with `add_special` also the first token, if the model wants one."""
        ids = self._tokenizer.encode(text, add_special_tokens=add_special).ids
        return [*(self._bos if add_special else ()), *ids]

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
