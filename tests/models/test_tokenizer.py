"""The same ids and the same text as transformers, for the kinds of tokenizer that models have."""

import importlib.util
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from petalnode.errors import ModelError
from petalnode.models.families import read_config
from petalnode.models.sources import Directory
from petalnode.models.text import TextStream
from petalnode.models.tokenizer import Tokenizer, open_tokenizer

RAW: dict[str, Any] = {
    **{"model_type": "llama", "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 1000},
    **{"num_hidden_layers": 1, "intermediate_size": 8, "bos_token_id": 1, "eos_token_id": 2},
}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CORPUS = [
    "",
    " ",
    "Hello, world! It's 12345 o'clock.",
    " leading, trailing ",
    "  two  spaces   three\n\n\nlines\r\n",
    "def f(x: int) -> str:\n\tif x:\n\t\treturn f'{x!r:>{10}}'\n    # ünïcode\n",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 🇩🇪 letters, 👍🏽 tone, 🫠",
    "你好，世界。こんにちは　世界 안녕하세요",
    "e\u0301 n\u0303 o\u0308\u0323 \u0e01\u0e33 हिन्दी Z\u0351\u036b\u0343",
    "שלום \u202bמעורב abc\u202c مرحبا ١٢٣",
    "\u200b\u200d\ufeff\u00ad\x00\x07\x7f",
    "ﬁ ² Ⅷ ﾊﾝｶｸ Å",
    "\ufffd ▁ ▁▁x <0x41> \U0001f600\U0010ffff",
    "a</s>b",
    "a</s> b <s> c</s></s> d",
    "<s>[INST] hi [/INST] yes</s><s>[INST] x [/INST]",
    "tabs\tand\ttabs\t\t end\t",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa     b",
]
SOURCE = Path(__file__).read_text().splitlines()
PLAIN = [line for line in SOURCE if line.isascii()]


def trained(
    tokenizer: tokenizers.Tokenizer, lines: list[str], special: list[str], **more: Any
) -> dict[str, Any]:
    """Train a BPE and return it as its file's object, with only `special` as added tokens."""
    trainer = trainers.BpeTrainer(vocab_size=900, show_progress=False, **more)
    tokenizer.train_from_iterator(lines, trainer)
    raw: dict[str, Any] = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [one for one in raw["added_tokens"] if one["content"] in special]
    return raw


def gpt2() -> dict[str, Any]:
    """Bytes as letters; the space belongs to the word behind it."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(
        tokenizer, CORPUS + SOURCE, special, special_tokens=special, initial_alphabet=alphabet
    )


def llama3() -> dict[str, Any]:
    """The same with an own pattern of words and a first token from the post-processor."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    pattern = Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw = trained(
        tokenizer, CORPUS + SOURCE, special, special_tokens=special, initial_alphabet=alphabet
    )
    return with_bos(raw)


def llama2() -> dict[str, Any]:
    """SentencePiece's BPE with bytes for what has no piece, as it was converted at the time."""
    tokenizer = tokenizers.Tokenizer(
        models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special = ["<unk>", "<s>", "</s>"]
    raw = trained(tokenizer, PLAIN, special, special_tokens=special + BYTES)
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    raw["decoder"] = {"type": "Sequence", "decoders": [*UNDO, strip]}
    return with_bos(raw)


UNDO = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]


def gemma() -> dict[str, Any]:
    """The same without a space in front, and words that end with their space."""
    tokenizer = tokenizers.Tokenizer(
        models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    special = ["<unk>", "<s>", "</s>", "<pad>", "<mask>"]
    raw = trained(tokenizer, PLAIN, special, special_tokens=special + BYTES)
    raw["decoder"] = {"type": "Sequence", "decoders": UNDO}
    return with_bos(raw)


def unigram(byte_fallback: bool = False) -> dict[str, Any]:
    """SentencePiece's other model; unknown characters become <unk>, or bytes."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=600,
        special_tokens=special + BYTES * byte_fallback,
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(PLAIN if byte_fallback else CORPUS + SOURCE, trainer)
    raw: dict[str, Any] = json.loads(tokenizer.to_str())
    raw["added_tokens"] = raw["added_tokens"][: len(special)]
    if byte_fallback:
        raw["model"]["byte_fallback"] = True
        raw["decoder"] = {
            "type": "Sequence",
            "decoders": [{"type": "ByteFallback"}, raw["decoder"]],
        }
    return raw


def unigram_with_bytes() -> dict[str, Any]:
    """The same with bytes for unknown characters, which come before the words are joined."""
    return unigram(byte_fallback=True)


def with_bos(raw: dict[str, Any]) -> dict[str, Any]:
    """Let every text begin with <s>."""
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(raw))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.add_tokens([AddedToken("[INST]", special=False, normalized=False)])
    again: dict[str, Any] = json.loads(tokenizer.to_str())
    return again


NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
OBJECTS = {name: {"__type": "AddedToken", "content": text} for name, text in NAMED.items()}
FAST = {**NAMED, "tokenizer_class": "PreTrainedTokenizerFast"}
LLAMA = {**NAMED, "tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
Make = Callable[[], dict[str, Any]]
VARIANTS: dict[str, tuple[Make, dict[str, Any], dict[str, Any]]] = {
    "GPT-2": (gpt2, FAST, {}),
    "GPT-2, told to begin": (gpt2, {**FAST, "add_bos_token": True}, {}),
    "GPT-2, tokens as objects": (gpt2, {**FAST, **OBJECTS, "add_bos_token": True}, {}),
    "Llama 3": (llama3, FAST, {}),
    "Llama 3, told not to begin": (llama3, {**FAST, "add_bos_token": False}, {}),
    "Llama 3, told to end": (llama3, {**FAST, "add_eos_token": True}, {}),
    "Llama 2": (llama2, LLAMA, {}),
    "Llama 2, legacy": (llama2, {**LLAMA, "legacy": True}, {}),
    "Llama 2, not legacy": (llama2, {**LLAMA, "legacy": False}, {}),
    "Llama 2, no prefix": (llama2, {**LLAMA, "add_prefix_space": False}, {}),
    "Llama 2, fast": (llama2, {**LLAMA, "tokenizer_class": "LlamaTokenizerFast"}, {}),
    "Llama 2, the file alone": (llama2, FAST, {}),
    "Mistral": (llama2, LLAMA, {"model_type": "mistral", "num_key_value_heads": 1}),
    "Gemma": (
        gemma,
        {**NAMED, "tokenizer_class": "GemmaTokenizer", "add_bos_token": True},
        {"model_type": "gemma2", "head_dim": 8, "num_key_value_heads": 1},
    ),
    "Unigram": (unigram, FAST, {}),
    "Unigram, told to begin": (unigram, {**FAST, "add_bos_token": True}, {}),
    "Unigram with bytes": (unigram_with_bytes, FAST, {}),
}


@cache
def made(make: Make) -> str:
    return json.dumps(make())


def write(folder: Path, variant: str) -> Path:
    """Write a model's files, as far as the tokenizer is concerned."""
    make, options, raw = VARIANTS[variant]
    (folder / "tokenizer.json").write_text(made(make))
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    (folder / "config.json").write_text(json.dumps(RAW | raw))
    return folder


def ours(folder: Path) -> Tokenizer:
    config = read_config(json.loads((folder / "config.json").read_text()))
    return open_tokenizer(Directory(folder), config)


def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def assert_equal(mine: Tokenizer, reference: Any, text: str) -> list[int]:
    """Compare ids, with and without first tokens, and text; return the ids."""
    ids = mine.encode(text)
    assert ids == reference(text)["input_ids"]
    plain = mine.encode(text, add_special=False)
    assert plain == reference(text, add_special_tokens=False)["input_ids"]
    decoded = reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert mine.decode(ids) == decoded
    stream = TextStream(mine)
    assert "".join([*map(stream.push, ids), stream.finish()]) == decoded
    return ids


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_as_transformers(tmp_path: Path, variant: str) -> None:
    mine, reference = ours(write(tmp_path, variant)), theirs(tmp_path)
    used: set[int] = set()
    for text in [*CORPUS, "\n".join(CORPUS)]:
        used |= set(assert_equal(mine, reference, text))
    assert len(used) >= 100
    if "Unigram" not in variant or "bytes" in variant:
        assert not used & {mine._tokenizer.token_to_id("<unk>")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_ids_stream_to_the_same_text(tmp_path: Path, variant: str) -> None:
    """Also those that no text has: cut characters, lone bytes, special tokens in the middle."""
    mine, reference = ours(write(tmp_path, variant)), theirs(tmp_path)
    ids = [(7 * i * i + 3 * i) % mine.size for i in range(700)]
    decoded = reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    stream = TextStream(mine)
    pieces = [*map(stream.push, ids), stream.finish()]
    assert "".join(pieces) == decoded == mine.decode(ids)
    assert sum(map(bool, pieces)) >= 100


def test_bytes_are_used(tmp_path: Path) -> None:
    """The corpus reaches byte fallback: characters in several tokens, no replacement."""
    for variant in ("Llama 2", "Gemma", "Unigram with bytes"):
        mine = ours(write(tmp_path, variant))
        ids = mine.encode("x👩‍👩‍👧‍👦y")
        assert sum(map(mine.is_byte, ids)) >= 20
        assert "👩‍👩‍👧‍👦" in mine.decode(ids)


def test_named_tokens_become_special(tmp_path: Path) -> None:
    """A file may have them as plain pieces; tokenizer_config.json says what they are."""
    write(tmp_path, "GPT-2")
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    mine, reference = ours(tmp_path), theirs(tmp_path)
    ids = assert_equal(mine, reference, "a</s>b")
    assert mine.decode(ids) == "ab"


def sentencepiece_model(folder: Path, kind: str) -> None:
    """Train a tokenizer.model as published models have it: bytes, one dummy space in front."""
    import sentencepiece

    text = folder / "text"
    text.write_text("\n".join(PLAIN))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        model_type=kind,
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(LLAMA))
    (folder / "config.json").write_text(json.dumps(RAW))


needs_sentencepiece = pytest.mark.skipif(
    importlib.util.find_spec("sentencepiece") is None, reason="the hf extra is not installed"
)


@needs_sentencepiece
def test_sentencepiece_alone_is_converted(tmp_path: Path) -> None:
    sentencepiece_model(tmp_path, "bpe")
    assert not (tmp_path / "tokenizer.json").exists()
    mine, reference = ours(tmp_path), theirs(tmp_path)
    for text in CORPUS:
        ids = assert_equal(mine, reference, text)
        assert ids[0] == 1
    assert mine.size == 700


def test_vocabulary_and_merges_are_converted(tmp_path: Path) -> None:
    """OPT is published like this."""
    model = gpt2()["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges)
    options = {**NAMED, "tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    mine, reference = ours(tmp_path), theirs(tmp_path)
    for text in CORPUS:
        assert_equal(mine, reference, text)


def test_the_extra_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "Llama 2")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else find(name)
    )
    wanted = r"no tokenizer.json but tokenizer.model, and sentencepiece is not.*petalnode\[hf\]"
    with pytest.raises(ModelError, match=wanted):
        ours(tmp_path)


@needs_sentencepiece
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_sentencepiece_model(tmp_path: Path) -> None:
    write(tmp_path, "Llama 2")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"no model at all")
    with pytest.raises(ModelError, match=r"tokenizer.model cannot be converted: .*Download"):
        ours(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", '{"model": 5}', "\x00\xff"])
def test_a_damaged_file(tmp_path: Path, content: str) -> None:
    write(tmp_path, "GPT-2")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="tokenizers library can read"):
        ours(tmp_path)


def test_a_special_token_that_is_no_text(tmp_path: Path) -> None:
    write(tmp_path, "GPT-2")
    (tmp_path / "tokenizer_config.json").write_text(r'{"eos_token": {"content": "\ud800"}}')
    with pytest.raises(ModelError, match=r"special token '\\ud800' is no text.*Download"):
        ours(tmp_path)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    write(tmp_path, "GPT-2")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        ours(tmp_path)
