"""Chat templates: the text of transformers' apply_chat_template, and templates that mean harm."""

import json
import tracemalloc
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from petalnode.errors import ModelError, UsageError
from petalnode.models import template_sandbox
from petalnode.models.chat_template import (
    MAX_TEMPLATE_CHARACTERS,
    ChatTemplate,
    read_chat_template,
)
from petalnode.models.sources import Directory

from ..checkpoints import tiny_tokenizer
from .chat_styles import STYLES, TURNS

TEXTS = (
    "Hello <b>&amp;</b> 'you' \"there\"",
    "  Grüße, 你好 👩‍👩‍👧 e\u0301 \u200f שלום\n\n",
    "def f(x):\n\treturn {x: '{{ x }}'}  # {% raw %}\n",
)
USER, ASSISTANT, SYSTEM = (
    {"role": role, "content": text}
    for role, text in zip(("user", "assistant", "system"), TEXTS, strict=True)
)
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "look_up", "arguments": {"word": "né <&>", "n": 2}}}],
}
CONVERSATIONS = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "long": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT, USER],
    "answered": [USER, ASSISTANT],
    "thinking": [USER, {"role": "assistant", "content": "<think>hm</think>\n\nYes"}, USER],
    "tool": [USER, CALL, {"role": "tool", "content": "ein Wort ✓"}],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks up a word — in any language",
            "parameters": {
                "type": "object",
                "properties": {
                    "word": {"type": "string", "enum": ["né", "<a>"]},
                    "n": {"type": "array", "items": {"type": "integer"}},
                },
                "required": ["word"],
            },
        },
    }
]
TOKENS: dict[str, Any] = {
    "bos_token": "<s>",
    "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False},
}


def write(folder: Path, config: dict[str, Any], **files: str) -> Directory:
    """A model's folder, as far as templates are concerned; a file's dot is written as __."""
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return Directory(folder)


def theirs(folder: Path, messages: Any, **options: Any) -> str:
    """What transformers makes of it, "" where the template refuses."""
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except TemplateError:
        return ""


def ours(template: ChatTemplate, messages: Any, **options: Any) -> str:
    try:
        return template.render(messages, **options)
    except UsageError:
        return ""


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "no prompt"])
def test_the_same_text_as_transformers(tmp_path: Path, style: str, prompt: bool) -> None:
    source = write(tmp_path, {**TOKENS, "chat_template": STYLES[style]})
    template = read_chat_template(source)
    texts = []
    for messages in CONVERSATIONS.values():
        for tools in (None, TOOLS):
            options: dict[str, Any] = {"add_generation_prompt": prompt, "tools": tools}
            texts.append(ours(template, messages, **options))
            assert texts[-1] == theirs(tmp_path, messages, **options)
    assert sum(map(bool, texts)) >= 10
    assert len(set(texts)) >= 4
    assert any(TEXTS[1].strip() in text for text in texts)


def test_parts_of_content(tmp_path: Path) -> None:
    source = write(tmp_path, {**TOKENS, "chat_template": TURNS})
    parts = [{"type": "text", "text": " a "}, {"type": "image"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": parts[:1]}, {"role": "user", "content": parts}]
    text = read_chat_template(source).render(messages)
    assert text == theirs(tmp_path, messages, add_generation_prompt=True)
    assert text == "<s><start_of_turn>user\n a \n\nab<end_of_turn>\n<start_of_turn>model\n"


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"chat_template": "config"}, {"chat_template__jinja": "file\n"}),
        ({"chat_template": "config"}, {"chat_template__json": '{"chat_template": "old"}'}),
        (
            {
                "chat_template": [
                    {"name": "default", "template": "d {{ bos_token }}{{ pad_token }}."},
                    {"name": "tool_use", "template": "t {{ unk_token }}"},
                ]
            },
            {"special_tokens_map__json": '{"unk_token": "<u>", "bos_token": "<other>"}'},
        ),
        (
            {"chat_template": "{{ bos_token }}", "added_tokens_decoder": {}},
            {"special_tokens_map__json": '{"bos_token": "<other>"}'},
        ),
    ],
)
def test_where_templates_are_found(
    tmp_path: Path, config: dict[str, Any], files: dict[str, str]
) -> None:
    source = write(tmp_path, {**TOKENS, **config}, **files)
    template = read_chat_template(source)
    for tools in (None, TOOLS):
        text = theirs(tmp_path, [USER], tools=tools)
        assert template.render([USER], tools=tools, add_generation_prompt=False) == text


def test_tool_use_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    template = read_chat_template(write(tmp_path, TOKENS, chat_template__jinja="without"))
    for tools, wanted in ((None, "without"), (TOOLS, "with tools")):
        assert template.render([USER], tools=tools) == theirs(tmp_path, [USER], tools=tools)
        assert template.render([USER], tools=tools) == wanted


def test_the_older_file_alone(tmp_path: Path) -> None:
    source = write(tmp_path, {}, chat_template__json='{"chat_template": "old"}')
    assert read_chat_template(source).render([USER]) == "old"


def test_no_template(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no chat template\. Use a model that was tuned"):
        read_chat_template(write(tmp_path, TOKENS))
    with pytest.raises(ModelError, match="no chat template"):
        read_chat_template(write(tmp_path, {"chat_template": [1, {"name": "default"}, {}]}))


def test_no_default() -> None:
    template = ChatTemplate({"rag": "r", "tool_use": "t"}, {})
    assert template.render([USER], tools=TOOLS) == "t"
    with pytest.raises(ModelError, match="templates for rag, tool_use, and no default"):
        template.render([USER])


def test_the_clock_is_the_callers() -> None:
    template = ChatTemplate({"default": "{{ strftime_now('%d %B %Y') }}"}, {})
    assert template.render([USER], clock=lambda: datetime(2031, 5, 6)) == "06 May 2031"


def test_messages_stay_as_they_are() -> None:
    messages = [dict(USER)]
    template = ChatTemplate({"default": "{% set _ = messages.append(1) %}"}, {})
    with pytest.raises(ModelError, match="fails"):
        template.render(messages)
    assert messages == [USER]


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages %}",
        "{{ messages | no_such_filter }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ nobody.name }}",
        "{{ messages[7].role }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id') }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ strftime_now.__closure__[0] }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends 'x' %}",
        "{% for a in 'b' %}" * 30 + "{% endfor %}" * 30,
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ " + "(" * 9_000 + "1" + ")" * 9_000 + " }}",
    ],
)
def test_templates_that_fail(text: str) -> None:
    """Some of them reach for Python."""
    with pytest.raises(ModelError, match=r"chat template fails: .*\. Check that") as caught:
        ChatTemplate({"default": text}, {}).render([USER])
    assert "\n" not in str(caught.value)


def test_a_template_that_refuses() -> None:
    template = ChatTemplate({"default": "{{ raise_exception('no\nway.') }}"}, {})
    with pytest.raises(UsageError, match=r"refuses these messages: no way\. Change"):
        template.render([USER])


@pytest.mark.parametrize(
    "text",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(9999) if b is odd %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "{% for a in range(99999) %}{{ messages[0].content * 999 }}{% endfor %}",
        "{% set x = namespace(t='a') %}{% for i in range(50) %}{% set x.t=x.t + x.t %}{% endfor %}",
        "{% set x = namespace(t='a') %}{% for i in range(50) %}{% set x.t=x.t ~ x.t %}{% endfor %}",
        "{% set x = namespace(t=[1]) %}{% for i in range(50) %}{% set x.t=x.t + x.t %}{% endfor %}",
        "{% set x = namespace(n=9) %}{% for i in range(99) %}{% set x.n = x.n * x.n %}{% endfor %}",
        "{% set x %}{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}{% endset %}{{ x[0] }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{{ 'a' * 9999999999 }}",
        "{{ [0] * 9999999999 }}",
        "{{ 9999999999 * 'a' }}",
        "{{ 'a' | center(9999999999) }}",
        "{{ 'a'.ljust(9999999999) }}",
        "{{ 'a' | indent(9999999999, true) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%9999999999d' | format(1) }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ strftime_now('%9999999999d') }}",
        "{{ messages | tojson(indent=9999999999) }}",
        "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
        "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
        "{{ (['a' * 99999] * 9999) | join }}",
        "{{ ''.join(['a' * 99999] * 9999) | length }}",
        "{{ (['a' * 99999] * 9999) ~ '' }}",
        "{{ {'a': ['b' * 99999] * 9999} | tojson }}",
        "{{ ('{0}' * 9999).format('a' * 99999) }}",
        "{{ ('{a}' * 9999).format_map({'a': 'b' * 99999}) }}",
        "{{ ('%(a)s' * 9999) % {'a': 'b' * 99999} }}",
        "{{ ('%(a)s' * 9999) | format(a='b' * 99999) }}",
        "{{ ('a' * 9999).translate({97: 'b' * 99999}) }}",
        "{{ ('a\n' * 9999) | indent(99999) }}",
        "{{ ('a ' * 9999) | wordwrap(1, wrapstring='b' * 99999) }}",
        "{{ lipsum(n=99999) }}",
        "{% for a in (range(99999) | map('string') | list) * 999 %}{{ a }}{% endfor %}",
    ],
)
def test_templates_that_never_end(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A smaller budget, so that the test is quick; the real one ends within seconds.

    It is refused before it takes the memory: the smallest of these would be of 100 MB.
    """
    monkeypatch.setattr(template_sandbox, "MAX_WORK", 1 << 22)
    monkeypatch.setattr(template_sandbox, "MAX_LENGTH", 1 << 20)
    template = ChatTemplate({"default": text}, {})
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match="chat template fails"):
            template.render([USER])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40_000_000


def test_half_a_surrogate_pair() -> None:
    """JSON can write it; a tokenizer would fail with a traceback."""
    with pytest.raises(UsageError, match=r"half a surrogate pair.*Change the messages"):
        ChatTemplate({"default": "{{ messages[0].content }}"}, {}).render(
            [{"role": "user", "content": "a\ud83d"}]
        )


def test_a_template_that_is_too_long() -> None:
    with pytest.raises(ModelError, match="characters, more than allowed"):
        ChatTemplate({"default": "x" * (MAX_TEMPLATE_CHARACTERS + 1)}, {})


def test_long_conversations_fit_the_budget() -> None:
    messages = [{"role": role, "content": "word " * 2_000} for role in ("user", "assistant")] * 200
    for text in STYLES.values():
        rendered = ChatTemplate({"default": text}, {"bos_token": "", "eos_token": ""})
        assert len(rendered.render(messages)) > 3_900_000
