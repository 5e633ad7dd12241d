"""A conversation as the text that a model was trained to continue: its repo's own jinja template.

Found where transformers looks: `chat_template.jinja` (and `additional_chat_templates/`), else the
key "chat_template" of tokenizer_config.json, else `chat_template.json`. The text holds the special
tokens already: encode it with `add_special=False`.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from petalnode.errors import ModelError, UsageError
from petalnode.models.sources import Source, read_json
from petalnode.models.template_sandbox import FAILURES, WIDE, Refused, Sandbox
from petalnode.models.tokenizer import HALF_PAIR, NAMED_TOKENS, text_of

MAX_TEMPLATE_CHARACTERS = 1 << 17
MAX_CONFIG_BYTES = 1 << 24
"""Of tokenizer_config.json and its like."""
JINJA_FILE, JSON_FILE = "chat_template.jinja", "chat_template.json"
TOOL_FILE = "additional_chat_templates/tool_use.jinja"
CONFIG_FILE, TOKENS_FILE = "tokenizer_config.json", "special_tokens_map.json"

Message = Mapping[str, Any]
Clock = Callable[[], datetime]


class ChatTemplate:
    """Templates by name, compiled; at least "default" or "tool_use" is there."""

    def __init__(self, templates: Mapping[str, str], tokens: Mapping[str, str]) -> None:
        """`tokens`: special tokens by name, such as "bos_token". Raises `ModelError`."""
        self._sandbox, self._tokens = Sandbox(), dict(tokens)
        self._templates = {}
        for name, text in templates.items():
            if len(text) > MAX_TEMPLATE_CHARACTERS:
                raise ModelError(
                    f"The model's chat template has {len(text)} characters, more than allowed.",
                    "Use an unmodified checkpoint.",
                )
            try:
                self._templates[name] = self._sandbox.load(text)
            except FAILURES as error:
                raise _failed(error) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        clock: Clock = datetime.now,
    ) -> str:
        """Return the conversation as text, by default with the beginning of the model's answer.

        `messages`: objects with "role" and "content"; `tools`: JSON schemas of functions; `clock`:
        for templates that name the date. Raises `UsageError` when the template refuses the
        messages, `ModelError` when it fails.
        """
        template = self._templates[self._choose(tools is not None)]
        variables: dict[str, Any] = {**self._tokens, "messages": list(messages), "documents": None}
        variables["tools"] = None if tools is None else list(tools)
        variables["add_generation_prompt"] = add_generation_prompt
        variables["strftime_now"] = lambda format: _strftime(clock(), format)
        try:
            text = self._sandbox.render(template, variables)
        except Refused as error:
            raise UsageError(
                f"The model's chat template refuses these messages: {_line(error)}.",
                "Change the messages; many models want user and assistant to take turns.",
            ) from error
        except FAILURES as error:
            raise _failed(error) from error
        if HALF_PAIR.search(text):
            raise UsageError(
                "The conversation holds half a surrogate pair, which no tokenizer takes.",
                "Change the messages: what was read was not UTF-8 text.",
            )
        return text

    def _choose(self, with_tools: bool) -> str:
        if with_tools and "tool_use" in self._templates:
            return "tool_use"
        if "default" not in self._templates:
            raise ModelError(
                f"The model has chat templates for {', '.join(sorted(self._templates))[:200]}, "
                "and no default.",
                'Name one of them "default" in a copy of the model\'s files.',
            )
        return "default"


def read_chat_template(source: Source) -> ChatTemplate:
    """Read a model's template and special tokens. Raises `ModelError` where there is none."""
    config = _object(source, CONFIG_FILE)
    tokens = config
    if "added_tokens_decoder" not in config:  # written before the config held all of them
        tokens = config | _object(source, TOKENS_FILE)
    templates = _jinja_files(source)
    if not templates:
        templates = _templates(config.get("chat_template"))
    if not templates:
        templates = _templates(_object(source, JSON_FILE).get("chat_template"))
    if not templates:
        raise ModelError(
            f"{source} has no chat template.",
            "Use a model that was tuned for chat (often named Chat or Instruct), or complete plain "
            "text instead.",
        )
    return ChatTemplate(templates, _special_tokens(tokens))


def _jinja_files(source: Source) -> dict[str, str]:
    found = {}
    for name, file in (("default", JINJA_FILE), ("tool_use", TOOL_FILE)):
        path = source.optional(file)
        if path is not None:
            try:
                found[name] = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ModelError(f"{path} cannot be read: {error}.", "Copy it again.") from error
    return found


def _templates(value: object) -> dict[str, str]:
    """Return templates by name: `value` is one text, or a list of names and texts."""
    if isinstance(value, str):
        return {"default": value}
    if not isinstance(value, list):
        return {}
    return {
        one["name"]: one["template"]
        for one in value
        if isinstance(one, dict)
        and isinstance(one.get("name"), str)
        and isinstance(one.get("template"), str)
    }


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the named tokens: a text each, or an object with the text as its "content"."""
    found = {}
    for name in NAMED_TOKENS:
        text = text_of(config.get(name))
        if text is not None:
            found[name] = text
    return found


def _object(source: Source, file: str) -> dict[str, Any]:
    path = source.optional(file)
    return {} if path is None else read_json(path, MAX_CONFIG_BYTES)


def _strftime(now: datetime, format: str) -> str:
    if WIDE.search(format):
        raise ValueError("it asks for a very wide date")
    return now.strftime(format)


def _failed(error: BaseException) -> ModelError:
    return ModelError(
        f"The model's chat template fails: {_line(error)}.",
        "Check that the messages are what the model's card shows, or use another model.",
    )


def _line(error: BaseException) -> str:
    """The error in one line of bounded length, without a full stop."""
    words = " ".join((str(error) or type(error).__name__).split())
    return words[:200].rstrip(".")
