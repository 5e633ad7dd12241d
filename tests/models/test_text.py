"""Streamed text: pieces join to the full decode, for three kinds of tokenizer."""

import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from petalnode.errors import UsageError
from petalnode.models.families import read_config
from petalnode.models.text import WINDOW_TOKENS, TextStream
from petalnode.models.tokenizer import Tokenizer

from ..checkpoints import tiny_tokenizer

CONFIG = read_config(
    {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 1, "bos_token_id": 0}
    | {"num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 400, "eos_token_id": 1}
)
TEXTS = st.text(st.sampled_from("ab \n▁<0x é好한👩‍👩‍👧🏽\u0301\ufffd"), max_size=120)
KINDS = ["byte level", "byte fallback", "metaspace"]


def byte_fallback() -> tokenizers.Tokenizer:
    """The shape of Llama 2's tokenizer: pieces with ▁ for a space, bytes for what has no piece."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "▁a", "ab", "é", "▁▁"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "b"), ("▁", "▁")]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    """Words that begin with ▁, as in older SentencePiece exports."""
    pieces = ["<unk>", "</s>", "▁", "▁a", "a", "b", "é", "好", "👩", "\u0301"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    made = zip(KINDS, (tiny_tokenizer(), byte_fallback(), metaspace()), strict=True)
    opened = {}
    for kind, tokenizer in made:
        path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
        tokenizer.save(str(path))
        opened[kind] = Tokenizer(path, {}, CONFIG)
    return opened


def stream(tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...] = ()) -> list[str]:
    text = TextStream(tokenizer, stops)
    return [*(text.push(one) for one in ids), text.finish()]


def cut(text: str, stops: tuple[str, ...]) -> str:
    """Return the text before the stop string that is complete first."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_pieces_of_text_join(all_kinds: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = all_kinds[kind]
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_of_any_ids_join(all_kinds: dict[str, Tokenizer], kind: str, data: Any) -> None:
    """Also ids that no text has: cut characters, special tokens in the middle, lone bytes."""
    tokenizer = all_kinds[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.size - 1), max_size=3 * WINDOW_TOKENS))
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS, stops=st.lists(st.text("ab é好\n", min_size=1, max_size=4), max_size=3))
def test_stops_cut_exactly(
    all_kinds: dict[str, Tokenizer], kind: str, text: str, stops: list[str]
) -> None:
    tokenizer = all_kinds[kind]
    ids = tokenizer.encode(text)
    out = TextStream(tokenizer, tuple(stops))
    pieces = [*(out.push(one) for one in ids), out.finish()]
    full = tokenizer.decode(ids)
    assert "".join(pieces) == cut(full, tuple(stops))
    assert out.stopped == any(stop in full for stop in stops)


def test_a_character_is_never_split(all_kinds: dict[str, Tokenizer]) -> None:
    tokenizer = all_kinds["byte level"]
    ids = tokenizer.encode("a👩‍👩‍👧é好", add_special=False)
    assert len(ids) > 12
    pieces = stream(tokenizer, ids)
    assert pieces[0] == "a"
    assert [p for p in pieces if p] == list("a👩‍👩‍👧é好")


def test_text_comes_as_soon_as_it_is_decided(all_kinds: dict[str, Tokenizer]) -> None:
    tokenizer = all_kinds["byte level"]
    ids = tokenizer.encode("abaab", add_special=False)
    assert stream(tokenizer, ids) == ["a", "b", "a", "a", "b", ""]
    assert stream(tokenizer, ids, ("bb",)) == ["a", "", "ba", "a", "", "b"]
    assert stream(tokenizer, ids, ("aab",)) == ["", "ab", "", "", "", ""]


def test_long_texts_stay_exact_and_cheap(all_kinds: dict[str, Tokenizer]) -> None:
    """The window of ids that are decoded again stays small."""
    rng = random.Random(3)
    for kind in KINDS:
        tokenizer = all_kinds[kind]
        words = [rng.choice(["a", "ab", " a", "é", "b"]) for _ in range(2000)]
        ids = tokenizer.encode("".join(words))
        out, longest = TextStream(tokenizer), 0
        pieces = []
        for one in ids:
            pieces.append(out.push(one))
            longest = max(longest, len(out._window))
        assert "".join([*pieces, out.finish()]) == tokenizer.decode(ids)
        assert longest <= 2 * WINDOW_TOKENS


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_silence_keeps_the_next_space(all_kinds: dict[str, Tokenizer], kind: str) -> None:
    """Ids without text fill the window; the space of the word behind them must stay."""
    tokenizer = all_kinds[kind]
    word = tokenizer.encode("a a", add_special=False)
    ids = word + [1] * (WINDOW_TOKENS + 10) + word
    assert tokenizer.decode([1]) == ""
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_special_token_does_not_end_a_run_of_bytes(all_kinds: dict[str, Tokenizer]) -> None:
    """The decoder judges the bytes around it as one run, here an invalid one."""
    tokenizer = all_kinds["byte fallback"]
    ids = [2 + 0x41, 1, 2 + 0xFF, 399, 2 + 0x42]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) == "\ufffd" * 3


def test_a_run_of_bytes_is_judged_as_a_whole(all_kinds: dict[str, Tokenizer]) -> None:
    """Why whole characters of a run are not given out before it ends: a later byte undoes them."""
    tokenizer = all_kinds["byte fallback"]
    good, bad = [2 + 0xC3, 2 + 0xA9], 2 + 0xFF
    assert tokenizer.decode(good) == "é"
    assert tokenizer.decode([*good, bad]) == "\ufffd" * 3
    letter = tokenizer.encode("ab", add_special=False)[-1]  # "b"
    assert stream(tokenizer, [*good, letter]) == ["", "", "éb", ""]


@pytest.mark.parametrize("stops", [("",), ("a",) * 65])
def test_stops_that_make_no_sense(all_kinds: dict[str, Tokenizer], stops: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        TextStream(all_kinds["metaspace"], stops)


def test_first_token(all_kinds: dict[str, Tokenizer]) -> None:
    processed = all_kinds["byte level"]
    assert processed.encode("a")[0] == 0
    assert processed.encode("a", add_special=False)[0] != 0


def test_saved_truncation_and_padding_are_ignored(tmp_path: Path) -> None:
    tokenizer = metaspace()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    opened = Tokenizer(path, {}, CONFIG)
    assert len(opened.encode("b")) == 2
    assert len(opened.encode("ab" * 9)) == 18


@pytest.mark.parametrize(
    "text", ["def f(x):\n    return x\n", "", " ", "é👩‍👧 好\t\r\n", "<|bos|>"]
)
def test_same_ids_as_transformers(tmp_path: Path, text: str) -> None:
    from transformers import PreTrainedTokenizerFast

    path = tmp_path / "tokenizer.json"
    tiny_tokenizer().save(str(path))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path))
    ours = Tokenizer(path, {}, CONFIG)
    assert ours.encode(text) == theirs(text)["input_ids"]
    ids = ours.encode(text)
    assert ours.decode(ids) == theirs.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
