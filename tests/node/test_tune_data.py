"""Files of examples: what becomes of each kind, and a sentence for each way to be bad."""

import json
from array import array
from collections import Counter
from datetime import datetime
from types import SimpleNamespace

import pytest

from petalnode.errors import ModelError, UsageError
from petalnode.models.chat_template import ChatTemplate
from petalnode.models.tokenizer import Tokenizer
from petalnode.training.data import MAX_LINE_BYTES, Shuffle, read_dataset, shortened
from petalnode.training.encoding import Encoder, Row

from ..checkpoints import tiny_tokenizer

CONFIG = SimpleNamespace(vocab_size=384, eos_ids=(1,), max_positions=64, family="llama")
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def encoder(template=CHAT, config=CONFIG):
    def open_template():
        if template is None:
            raise ModelError("It has no chat template.", "Use another.")
        return ChatTemplate({"default": template}, {})

    tokenizer = Tokenizer(tiny_tokenizer(), {}, config)
    return Encoder(config, tokenizer, open_template, lambda: datetime(1999, 1, 2))


def dataset(tmp_path, content, max_tokens=64, **keywords):
    path = tmp_path / "data.jsonl"
    if isinstance(content, list):
        content = "".join(json.dumps(one) + "\n" for one in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_dataset(path, encoder(**keywords), max_tokens)


def shown(row):
    """The row's text, and the part of it that is learned."""
    tokenizer = tiny_tokenizer()
    learned = [token for token, is_learned in zip(row.ids, row.learned, strict=True) if is_learned]
    return [tokenizer.decode(ids, skip_special_tokens=False) for ids in (list(row.ids), learned)]


def test_a_text_is_learned_whole_and_ended(tmp_path):
    (row,) = dataset(tmp_path, [{"text": "the quick fox", "id": 7}]).rows
    assert shown(row) == ["<s>the quick fox</s>", "the quick fox</s>"]


def test_of_a_prompt_and_its_completion_the_completion(tmp_path):
    (row,) = dataset(tmp_path, [{"prompt": "the quick", "completion": " brown fox"}]).rows
    assert shown(row) == ["<s>the quick brown fox</s>", " brown fox</s>"]


def test_a_prompts_ids_are_those_that_it_has_alone(tmp_path):
    """ "qu" + "ick" would be one piece; a prompt that ends within it was cut otherwise."""
    (row,) = dataset(tmp_path, [{"prompt": "the qu", "completion": "ick"}]).rows
    alone = tiny_tokenizer().encode("the qu").ids
    assert list(row.ids[: len(alone)]) == alone
    assert list(row.ids) != [*tiny_tokenizer().encode("the quick").ids, 1]
    assert shown(row)[1] == "ick</s>"


def test_of_a_conversation_what_the_assistant_says(tmp_path):
    turns = [("user", "the"), ("assistant", "quick"), ("user", "brown"), ("assistant", "fox")]
    messages = [{"role": role, "content": content} for role, content in turns]
    data = dataset(tmp_path, [{"messages": [*messages, {"role": "user", "content": "so?"}]}])
    whole = "[user]the[assistant]quick</s>[user]brown[assistant]fox</s>"
    assert shown(data.rows[0]) == [whole, "quick</s>fox</s>"]


@pytest.mark.parametrize(
    ("without", "learned"),
    [
        ("", "quick</s>"),
        ("other", "assistant]quick</s>"),
        ("{{ raise_exception('Say something.') }}", "assistant]quick</s>"),
    ],
    ids=["shows it", "shows another", "refuses"],
)
def test_a_conversation_that_the_assistant_begins(tmp_path, without, learned):
    """Its header is not learned, where the template shows it without a turn before."""
    template = f"{{% if not messages %}}{without}{{% endif %}}{CHAT}"
    turns = [{"role": "assistant", "content": "quick"}, {"role": "user", "content": "a"}]
    data = dataset(tmp_path, [{"messages": turns}], template=template)
    assert shown(data.rows[0]) == ["[assistant]quick</s>", learned]


def test_a_template_that_drops_what_was_thought_before_leaves_the_last_turn(tmp_path):
    """Older answers are written otherwise than they were said: only the last can be learned."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{% if not loop.last %}{{ m.content[:1] }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    turns = [("user", "a"), ("assistant", "quick"), ("user", "b"), ("assistant", "fox")]
    messages = [{"role": role, "content": content} for role, content in turns]
    data = dataset(tmp_path, [{"messages": messages}], template=template)
    assert shown(data.rows[0]) == ["[user]a[assistant]q[user]b[assistant]fox", "fox"]


def test_long_rows_are_cut_and_those_without_anything_to_learn_then_are_dropped(tmp_path):
    rows = [
        {"prompt": "fox", "completion": "fox " * 30},
        {"prompt": "fox " * 30, "completion": "fox"},
    ]
    data = dataset(tmp_path, rows, max_tokens=16)
    assert ([len(row.ids) for row in data.rows], data.cut, data.dropped) == ([16], 1, 1)
    assert data.tokens == 16
    assert data.learned < 16


def test_the_digest_tells_data_apart_and_nothing_else(tmp_path):
    one, same, other = (
        dataset(tmp_path, rows).digest
        for rows in ([{"text": "a b"}], [{"text": "a b", "id": 1}], [{"text": "a c"}])
    )
    assert one == same != other


def test_the_digest_tells_apart_what_is_learned_of_the_same_tokens(tmp_path):
    apart, whole = {"prompt": "fox", "completion": " fox"}, {"text": "fox fox"}
    one, other = (dataset(tmp_path, [row]) for row in (apart, whole))
    assert one.rows[0].ids == other.rows[0].ids
    assert one.digest != other.digest


def test_nothing_is_computed_behind_what_is_learned_last():
    row = Row(array("i", [5, 6, 7, 8]), bytes([0, 1, 0, 0]))
    kept = shortened(row, 64)
    assert (list(kept.ids), kept.learned) == ([5, 6], bytes([0, 1]))


def test_templates_see_the_date_of_the_runs_beginning(tmp_path):
    template = "{{ strftime_now('%Y') }}" + CHAT
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    (row,) = dataset(tmp_path, [{"messages": turns}], template=template).rows
    assert shown(row)[0].startswith("1999[user]a")


def test_blank_lines_a_byte_order_mark_and_no_last_line_end(tmp_path):
    assert len(dataset(tmp_path, b'\xef\xbb\xbf{"text": "a"}\n\n \n{"text": "b"}').rows) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a"}\n{"text": "b', "line 2: the file ends within it: it is torn"),
        (b'{"text": "a"}\n{"text" "b"}\n', "line 2: it is not JSON"),
        (b'{"text": "a"}\n\xff\xfe\n', "line 2: byte 1 is not UTF-8"),
        (b'["a"]\n', "line 1: it is a JSON array, not an object"),
        (b'{"words": "a"}\n', "line 1: it must have"),
        (b'{"prompt": "a"}\n', 'and has "prompt"'),
        (b'{"text": "a", "prompt": "b", "completion": "c"}\n', "line 1: it must have"),
        (b'{"text": 3}\n', '"text" is a JSON number, no text'),
        (b'{"text": ""}\n', 'line 1: "text" is empty'),
        (b'{"prompt": "a", "completion": ""}\n', 'line 1: "completion" is empty'),
        (b'{"text": "\\ud800"}\n', "half a surrogate pair"),
        (b'{"text": ' + b"1" * 5000 + b"}\n", "a number in it is too long"),
        (b"[" * 100_000 + b"\n", "nested too deeply"),
        (b'{"text": "' + b"a" * MAX_LINE_BYTES + b'"}\n', "line 1: it is longer than 16 MiB"),
        (b'{"text": "a"}\n{"messages": []}\n', 'it has "messages", but line 1 has "text"'),
        (b'{"messages": []}\n', "not a list of messages"),
        (b'{"messages": ["hi"]}\n', "message 1 is not an object"),
        (b'{"messages": [{"role": "user"}]}\n', 'message 1 has no "content"'),
        (b'{"text": "a", "text": "b"}\n', 'line 1: it has the key "text" twice in one object'),
        (b'{"text": "a", "x": [{"y": 1, "y": 1}]}\n', 'it has the key "y" twice'),
        (b'{"text": "a"}\r{"text": "b"}\r', "line 1: carriage returns alone end its lines"),
        (b'{"text": "a"} {"text": "b"}', "line 1: it goes on behind its object, at column 15"),
        (b'{"text": "a"} {"text": "b"}\r\n', "line 1: it goes on behind its object, at column 15"),
        (b'{"text": "a"}\n\0\0\0', "line 2: it has a NUL at column 1"),
        (b"{'text': 'a'}", "line 1: it is not JSON (Expecting property name"),
        (b'{"text": "a\tb"}', "line 1: it is not JSON (Invalid control character at column 12)"),
        (b'{"text": "\\u12"}', "line 1: it is not JSON (Invalid"),
        (b'{"text": "\\u"}', "line 1: it is not JSON (Invalid"),
        (b'{"text": "a"}t', "line 1: it goes on behind its object, at column 14"),
        (b'{"text": "a" t', "line 1: it is not JSON (Expecting ',' delimiter at column 14)"),
        (b'{"text": nil', "line 1: it is not JSON (Expecting value at column 10)"),
        (b'{"text":\n', "line 1: it is not JSON (Expecting value at column"),
        (b'{"messages": [{"role": "user", "content": "a"}]}\n', "no message of it is the assist"),
        (b"", "has no examples"),
        (b"\n \n", "has no examples"),
    ],
)
def test_bad_files_get_a_sentence_that_names_the_line(tmp_path, content, said):
    with pytest.raises(UsageError) as caught:
        dataset(tmp_path, content)
    assert said in caught.value.cause
    assert "data.jsonl" in caught.value.cause
    assert caught.value.remedy


@pytest.mark.parametrize(
    "end",
    ["", "{", '{"text', '{"text"', '{"text": ', '{"text": "a', '{"text": "\\', '{"text": "a"'],
)
def test_a_last_line_that_could_go_on_is_torn(tmp_path, end):
    lines = b'{"text": "a"}\n' + end.encode()
    if not end:
        assert len(dataset(tmp_path, lines).rows) == 1
        return
    with pytest.raises(UsageError, match="line 2: the file ends within it: it is torn"):
        dataset(tmp_path, lines)


@pytest.mark.parametrize(
    "end", ['{"text": "\\u12', '{"text": "a", "x": tru', '{"text": "a", "x": -']
)
def test_torn_within_a_word_or_an_escape(tmp_path, end):
    with pytest.raises(UsageError, match="line 1: the file ends within it: it is torn"):
        dataset(tmp_path, end)


def test_rows_that_are_all_dropped_are_nothing_to_learn_from(tmp_path):
    with pytest.raises(UsageError, match="nothing to learn within the context") as caught:
        dataset(tmp_path, [{"prompt": "fox " * 30, "completion": "a"}], max_tokens=8)
    assert caught.value.remedy == "Shorten them, so that prompt and answer have 8 tokens at most."


def test_a_token_without_another_before_it_is_not_dropped_as_too_long(tmp_path):
    endless = SimpleNamespace(**{**vars(CONFIG), "eos_ids": ()})
    tokenizer = Tokenizer(tiny_tokenizer(), {}, endless)
    chat = "{{ messages[-1].content }}"
    turns = [{"role": "assistant", "content": "a"}]
    assert len(tokenizer.encode("a", add_special=False)) == 1
    with pytest.raises(UsageError, match="line 1: it is one token"):
        dataset(tmp_path, [{"messages": turns}], template=chat, config=endless)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"content": None}, "null"),
        ({"content": None, "tool_calls": []}, "null"),
        ({"content": 5}, "number"),
        ({"content": [{"type": "text", "text": "a"}]}, "array"),
        ({"content": {"text": "a"}, "tool_calls": [{}]}, "object"),
        ({"content": True}, "boolean"),
    ],
)
def test_what_is_said_is_text(tmp_path, message, said):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", **message}]
    whole = f'line 2: "content" of message 2 is a JSON {said}, no text'
    good = {"messages": [{"role": role, "content": ""} for role in ("user", "assistant")]}
    with pytest.raises(UsageError, match=whole):
        dataset(tmp_path, [good, {"messages": messages}])


@pytest.mark.parametrize("content", [{}, {"content": None}])
def test_who_calls_a_tool_need_not_say_anything(tmp_path, content):
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content or m.tool_calls[0].name }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    call = {"role": "assistant", "tool_calls": [{"name": "fox"}], **content}
    messages = [{"role": "user", "content": "a"}, call]
    (row,) = dataset(tmp_path, [{"messages": messages}], template=template).rows
    assert shown(row) == ["[user]a[assistant]fox", "fox"]


def test_what_a_template_refuses_or_lacks_names_the_line(tmp_path):
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    messages = [{"messages": turns}]
    for template, said in [
        ("{{ raise_exception('roles must alternate') }}", "line 1: .*roles must alternate"),
        ("{{ messages[0].nothing.at_all }}", "line 1: "),
        ("{{ messages | length }}", "does not show where"),
    ]:
        with pytest.raises(UsageError, match=said):
            dataset(tmp_path, messages, template=template)
    with pytest.raises(ModelError, match="no chat template"):
        dataset(tmp_path, messages, template=None)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    small = SimpleNamespace(vocab_size=5, eos_ids=(1,), family="llama")
    with pytest.raises(UsageError, match="vocabulary"):
        dataset(tmp_path, [{"text": "fox"}], config=small)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"gone\.jsonl cannot be read: No such file"):
        read_dataset(tmp_path / "gone.jsonl", encoder(), 64)
    with pytest.raises(UsageError, match="Is a directory"):
        read_dataset(tmp_path, encoder(), 64)


def test_reading_tells_how_far_it_is(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n' * 3)
    heard = []
    read_dataset(path, encoder(), 64, lambda done, total: heard.append((done, total)))
    assert heard == [(14, 42), (28, 42), (42, 42)]


def test_every_epoch_has_every_row_in_an_order_of_its_own():
    shuffle = Shuffle(10, seed=3)
    seen = [row for number in range(10) for row in shuffle.batch(number, 4)]
    epochs = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert all(Counter(epoch) == Counter(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert Shuffle(10, seed=3).batch(7, 4) == shuffle.batch(7, 4) == seen[28:32]
    assert Shuffle(10, seed=4).batch(7, 4) != seen[28:32]
