"""Examples as token ids, and which of them are to be learned.

The loss counts what the model shall say: all of a text; of a prompt and its completion, the
completion; of a conversation, what the assistant says. Each is cut into tokens where generation
cuts it too: what is learned follows the ids that a prompt alone would have.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from petalnode.errors import ModelError, UsageError
from petalnode.models.config import ModelConfig
from petalnode.models.tokenizer import HALF_PAIR, Tokenizer

if TYPE_CHECKING:
    from petalnode.models.chat_template import ChatTemplate

ASSISTANT = "assistant"


class Unusable(Exception):
    """An example cannot be learned from; ``why``: half a sentence, without a full stop."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


@dataclass(frozen=True, eq=False)
class Row:
    """Token ids (32 bits each) of one example; ``learned`` has a 1 for each that has a loss."""

    ids: array[int]
    learned: bytes


class Encoder:
    """Makes rows of examples with a model's tokenizer, and chats with its template.

    ``template`` is called when the first chat is seen. ``clock`` is for templates that name the
    date: a run that is taken up again must see the same.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        template: Callable[[], ChatTemplate],
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._vocab, self._eos = config.vocab_size, config.eos_ids
        self._tokenizer, self._open_template, self._clock = tokenizer, template, clock

    def encode(self, kind: Sequence[str], example: Mapping[str, Any]) -> Row:
        """The row of an example of such a kind. Raises ``Unusable``; ``ModelError`` for a model
        without a chat template, if it needs one."""
        for key in kind:
            if isinstance(example[key], str) and HALF_PAIR.search(example[key]):
                raise Unusable(f'"{key}" holds half a surrogate pair, which no tokenizer takes')
        if kind[0] == "messages":
            writing = self._chat(example["messages"])
        elif kind[0] == "prompt":
            writing = self._completion(example["prompt"], example["completion"])
        else:
            writing = self._text(example["text"])
        if not writing.ids:
            raise Unusable("the tokenizer makes no tokens of it")
        if any(not 0 <= token < self._vocab for token in writing.ids):
            raise Unusable("its tokens are not all in the model's vocabulary")
        writing.learned[0] = 0  # nothing precedes it that could foretell it
        if not any(writing.learned):
            raise Unusable("it is one token, which nothing precedes that could foretell it")
        return Row(array("i", writing.ids), bytes(writing.learned))

    def _text(self, text: str) -> _Writing:
        if not text:
            raise Unusable('"text" is empty')
        writing = _Writing(self._tokenizer, special=True)
        writing.go_on(text, learned=True)
        writing.end(self._eos)
        return writing

    def _completion(self, prompt: str, completion: str) -> _Writing:
        if not completion:
            raise Unusable('"completion" is empty')
        writing = _Writing(self._tokenizer, special=True)
        writing.go_on(prompt, learned=False)
        writing.go_on(prompt + completion, learned=True)
        writing.end(self._eos)
        return writing

    def _chat(self, messages: object) -> _Writing:
        turns = _checked_messages(messages)
        whole = self._render(turns)
        writing = _Writing(self._tokenizer, special=False)
        for index, turn in enumerate(turns):
            if turn["role"] != ASSISTANT:
                continue
            said = self._render(turns[: index + 1])
            asked = self._render(turns[:index], ask=True) if index else self._header(said)
            if writing.text_begins(asked) and whole.startswith(said) and said.startswith(asked):
                writing.go_on(asked, learned=False)
                writing.go_on(said, learned=True)
        if not any(writing.learned):
            raise Unusable("the chat template does not show where what the assistant says begins")
        return writing

    def _header(self, said: str) -> str:
        """What the template writes before an answer to nothing, as far as it shows that."""
        try:
            header = self._render((), ask=True)
        except Unusable:
            return ""
        return header if said.startswith(header) else ""

    def _render(self, turns: Sequence[Mapping[str, Any]], *, ask: bool = False) -> str:
        template = self._template
        try:
            return template.render(turns, add_generation_prompt=ask, clock=self._clock)
        except (UsageError, ModelError) as error:
            raise Unusable(error.cause.rstrip(".")) from error

    @cached_property
    def _template(self) -> ChatTemplate:
        return self._open_template()


class _Writing:
    """A text that grows, its ids, and which of them are learned.

    A piece's ids are those that the whole text has where the ids before it stay what they were,
    and else its own: what came before is never cut anew.
    """

    def __init__(self, tokenizer: Tokenizer, *, special: bool) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._text = ""
        self.ids: list[int] = []
        self.learned = bytearray()

    def text_begins(self, longer: str) -> bool:
        """Whether ``longer`` goes on from what is there."""
        return longer.startswith(self._text)

    def go_on(self, text: str, *, learned: bool) -> None:
        """Let the text grow to ``text``."""
        whole = self._tokenizer.encode(text, add_special=self._special)
        if whole[: len(self.ids)] == self.ids:
            new = whole[len(self.ids) :]
        else:
            new = self._tokenizer.encode(text[len(self._text) :], add_special=False)
        self._text = text
        self._add(new, learned)

    def end(self, eos: Sequence[int]) -> None:
        """The token that ends a text is learned too, if the model has one."""
        if eos and (not self.ids or self.ids[-1] not in eos):
            self._add([eos[0]], learned=True)

    def _add(self, ids: Sequence[int], learned: bool) -> None:
        self.ids += ids
        self.learned += bytes([learned]) * len(ids)


def _checked_messages(messages: object) -> list[Mapping[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise Unusable('"messages" is not a list of messages')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Unusable(f'message {number} is not an object with a "role"')
        _check_content(number, message)
    if not any(message["role"] == ASSISTANT for message in messages):
        raise Unusable("no message of it is the assistant's, so that there is nothing to learn")
    return messages


def _check_content(number: int, message: Mapping[str, Any]) -> None:
    """Templates write down whatever they get: a list as Python shows it, null as "None"."""
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return
    if "content" not in message:
        raise Unusable(f'message {number} has no "content"')
    if not isinstance(content, str):
        raise Unusable(f'"content" of message {number} is a JSON {json_name(content)}, no text')


def json_name(value: object) -> str:
    """What JSON calls a value's type."""
    names = {list: "array", dict: "object", str: "text", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
