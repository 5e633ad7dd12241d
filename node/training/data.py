"""What a model is tuned on: a file of JSON lines as token ids, and the order of its rows.

Every line is an object of one kind, the same in the whole file: ``{"text": …}``, ``{"prompt": …,
"completion": …}``, or ``{"messages": [{"role": …, "content": …}, …]}``. Other keys are ignored.
"""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from petalnode.errors import UsageError
from petalnode.training.encoding import Encoder, Row, Unusable, json_name

MAX_LINE_BYTES = 1 << 24
"""Of a file of JSON lines. A longer one is no example, but another format or a torn file."""
KINDS = (("text",), ("prompt", "completion"), ("messages",))
KINDS_IN_WORDS = '"text", or "prompt" and "completion", or "messages"'

Reading = Callable[[int, int], None]
"""Hears how many bytes are read, and how many there are."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """The rows of a file, in its order. ``cut``: how many of them were shortened to the context;
    ``dropped``: how many more had nothing left to learn from then; ``digest`` tells whether two
    data sets are the same tokens."""

    rows: Sequence[Row]
    cut: int
    dropped: int
    digest: str

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def learned(self) -> int:
        """How many of the tokens a loss is computed for."""
        return sum(sum(row.learned) for row in self.rows)


def read_dataset(
    path: Path, encoder: Encoder, max_tokens: int, reading: Reading | None = None
) -> Dataset:
    """Read a file. Raises ``UsageError`` that names the file, and the line that is to blame."""
    rows: list[Row] = []
    digest, cut, dropped = hashlib.sha256(), 0, 0
    for number, kind, example in _examples(path, reading):
        try:
            whole = encoder.encode(kind, example)
        except Unusable as error:
            raise bad_line(path, number, error.why) from error
        row = shortened(whole, max_tokens)
        if any(row.learned):
            cut += len(whole.ids) > max_tokens
            digest.update(len(row.ids).to_bytes(8, "little") + row.ids.tobytes() + row.learned)
            rows.append(row)
        else:
            dropped += 1
    if not rows:
        raise _nothing_in(path, dropped, max_tokens)
    return Dataset(rows, cut, dropped, digest.hexdigest()[:32])


def _nothing_in(path: Path, dropped: int, max_tokens: int) -> UsageError:
    if not dropped:
        how = f"Give one JSON object a line, with {KINDS_IN_WORDS}."
        return UsageError(f"{path} has no examples.", how)
    return UsageError(
        f"{path} has nothing to learn within the context: the prompts alone fill it.",
        f"Shorten them, so that prompt and answer have {max_tokens} tokens at most.",
    )


def shortened(row: Row, max_tokens: int) -> Row:
    """The row cut to so many tokens, and behind the last that is learned: the rest does nothing."""
    ids, learned = row.ids[:max_tokens], row.learned[:max_tokens]
    if len(ids) < len(row.ids):
        return replace(row, ids=ids, learned=learned)
    end = learned.rfind(1) + 1
    return row if end == 0 else Row(ids[:end], learned[:end])


class Shuffle:
    """Endless epochs over ``count`` rows, each in an order of its own that ``seed`` gives.

    Without a state: batch ``n`` is the same whenever it is asked for, so that a run which is taken
    up again sees what it would have seen.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self._epoch, self._order = -1, array("q")

    def batch(self, number: int, size: int) -> list[int]:
        """The rows' numbers of batch ``number``; an epoch may end within it."""
        return [self._at(place) for place in range(number * size, (number + 1) * size)]

    def _at(self, place: int) -> int:
        epoch, offset = divmod(place, self._count)
        if epoch != self._epoch:
            order = list(range(self._count))
            random.Random(f"petalnode {self._seed} {epoch}").shuffle(order)
            self._epoch, self._order = epoch, array("q", order)
        return self._order[offset]


def _examples(
    path: Path, reading: Reading | None
) -> Iterator[tuple[int, tuple[str, ...], dict[str, Any]]]:
    """Yield the number, kind and object of each line that is not blank."""
    first: tuple[int, tuple[str, ...]] | None = None
    try:
        with path.open("rb") as file:
            for number, line in _lines(path, file, reading):
                if not line.strip():
                    continue
                example = _parsed(path, number, line)
                kind = _kind(path, number, example)
                first = first or (number, kind)
                if kind != first[1]:
                    raise bad_line(
                        path,
                        number,
                        f"it has {_words(kind)}, but line {first[0]} has {_words(first[1])}",
                    )
                yield number, kind, example
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror or error}.", "Check the path."
        ) from error


def _lines(path: Path, file: BinaryIO, reading: Reading | None) -> Iterator[tuple[int, bytes]]:
    total, done, number = path.stat().st_size, 0, 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise bad_line(path, number, f"it is longer than {MAX_LINE_BYTES >> 20} MiB")
        yield number, line
        done += len(line)
        if reading is not None:
            reading(done, total)


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise bad_line(path, number, f"byte {error.start + 1} is not UTF-8") from error
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except Unusable as error:
        raise bad_line(path, number, error.why) from None
    except RecursionError:
        raise bad_line(path, number, "it is nested too deeply") from None
    except ValueError as error:
        raise bad_line(path, number, _why_not_json(text, error)) from error
    if not isinstance(value, dict):
        raise bad_line(path, number, f"it is a JSON {json_name(value)}, not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; two of one key would hide what the first says."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise Unusable(f"it has the key {json.dumps(twice[:100])} twice in one object")
    return found


def _kind(path: Path, number: int, example: dict[str, Any]) -> tuple[str, ...]:
    """Which kind of example it is, its values being what they must be."""
    known = {key for kind in KINDS for key in kind if key in example}
    kinds = [kind for kind in KINDS if known == set(kind)]
    if not kinds:
        has = _words(tuple(sorted(known))) if known else "none of them"
        raise bad_line(path, number, f"it must have {KINDS_IN_WORDS}, and has {has}")
    for key in kinds[0]:
        if key != "messages" and not isinstance(example[key], str):
            raise bad_line(path, number, f'"{key}" is a JSON {json_name(example[key])}, no text')
    return kinds[0]


def bad_line(path: Path, number: int, why: str) -> UsageError:
    """The error for a line that cannot be learned from."""
    return UsageError(f"{path}, line {number}: {why}.", "Mend or remove that line.")


def _why_not_json(text: str, error: ValueError) -> str:
    """What is wrong with a line, named by what most likely made it so."""
    if not isinstance(error, json.JSONDecodeError):
        return "it is not JSON (a number in it is too long)"
    if "\0" in text:
        return f"it has a NUL at column {text.index(chr(0)) + 1}, as a torn or a binary file has"
    if error.msg == "Extra data":
        if "\r" in text[: error.pos]:
            return "carriage returns alone end its lines; they must end with line feeds"
        return f"it goes on behind its object, at column {error.pos + 1}: one object a line"
    if not text.endswith("\n") and _ends_within(text, error):
        return "the file ends within it: it is torn"
    return f"it is not JSON ({error.msg.removesuffix(' at')} at column {error.pos + 1})"


def _ends_within(text: str, error: json.JSONDecodeError) -> bool:
    """Whether more text might have made JSON of it."""
    rest = text[error.pos :].strip()
    if error.msg.startswith("Invalid \\uXXXX"):
        return len(rest) < len("uXXXX") and '"' not in rest
    if error.msg == "Expecting value":
        return any(whole.startswith(rest) for whole in ("true", "false", "null", "-"))
    return not rest or error.msg.startswith("Unterminated string")


def _words(keys: Sequence[str]) -> str:
    return " and ".join(f'"{key}"' for key in keys)
