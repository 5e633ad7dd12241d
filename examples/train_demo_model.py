"""Train the small model that petalnode bundles in `node/demo/`.

It makes a Llama-architecture model of 3.5 million parameters that writes plausible Python, in
Hugging Face format, from the source of the standard library of the interpreter that runs this
script (10 MB without tests and data tables, 3 % of the files held out). It took 45 minutes on one
core of a server CPU with AMX. The learning rate follows the clock: a slower machine sees less text.

    python examples/train_demo_model.py --minutes 45 --out node/demo
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

Integers = NDArray[np.int64]
CONTEXT = 512
BATCH, MICRO_BATCH = 8, 4  # windows a step, and windows at once: few enough for the CPU's cache
PEAK_LR, WARMUP_STEPS, WEIGHT_DECAY = 8e-3, 40, 0.1
BOS, EOS = "<|bos|>", "<|eos|>"  # pieces 0 and 1
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
SKIPPED_FILES = {"html/entities.py", "stringprep.py", "locale.py", "lib2to3/pgen2/grammar.py"}
# Line ends are pieces of their own, and so is the whole indentation after them, so that a prompt
# that stops after either is cut into the same tokens as the training text.
PIECES = r" ?[^\W\d]+| ?\d{1,3}| ?[^\s\w]+|\n+|[^\S\n]+"
ARCHITECTURE: dict[str, Any] = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 192,
    "intermediate_size": 512,
    "max_position_embeddings": 2048,
    "num_attention_heads": 6,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "rope_theta": 10000.0,  # where readers older than transformers 5 look for it
    "tie_word_embeddings": True,
    "vocab_size": 2048,
}


@dataclass(frozen=True)
class Corpus:
    """The training tokens with the places where a window may begin, and the validation windows."""

    tokens: Integers
    starts: tuple[Integers, Integers]  # of lines, of unindented statements
    validation: torch.Tensor
    train_bytes: int
    validation_bytes: int


def read_sources() -> tuple[list[str], list[str]]:
    """Return the training files and the validation files, split by a hash of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    parts: tuple[list[str], list[str]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        skipped = SKIPPED_FOLDERS.intersection(name.split("/")) or name in SKIPPED_FILES
        if not skipped and not name.startswith(("_sysconfigdata", "config-")):
            held_out = hashlib.sha256(name.encode()).digest()[0] < 8  # of 256: about 3 %
            text = path.read_text(encoding="utf-8", errors="ignore")
            parts[held_out].append(text.expandtabs(8))
    return parts


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE that adds the first token by itself."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ARCHITECTURE["vocab_size"],
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    first = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    tokenizer.post_processor = first
    return tokenizer


def encode_files(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    """Return the files as one row of tokens, each between a first and a last token."""
    return [token for one in tokenizer.encode_batch(texts) for token in [*one.ids, 1]]


def window_starts(tokenizer: Tokenizer, tokens: list[int]) -> tuple[Integers, Integers]:
    """Return where lines begin (at their indentation) and where unindented statements begin."""
    text = [tokenizer.decode([i], skip_special_tokens=False) for i in range(max(tokens) + 1)]
    lines, statements = [0], [0]
    for at in range(1, len(tokens) - 1):
        piece, following = text[tokens[at]], text[tokens[at + 1]]
        if (piece == BOS or piece.strip("\n") == "") and not following.startswith("\n"):
            lines.append(at + 1)
            if following[:1].isalpha() or following[:1] in ("@", "_"):
                statements.append(at + 1)
    return np.array(lines), np.array(statements)


def build_corpus(tokenizer: Tokenizer) -> Corpus:
    """Encode both parts; validation becomes windows without overlap, each behind a first token."""
    train, held_out = read_sources()
    tokens = encode_files(tokenizer, train)
    held = torch.tensor(encode_files(tokenizer, held_out))
    whole = held[: len(held) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return Corpus(
        tokens=np.array(tokens),
        starts=window_starts(tokenizer, tokens),
        validation=functional.pad(whole, (1, 0), value=0),
        train_bytes=sum(len(text.encode()) for text in train),
        validation_bytes=len(tokenizer.decode(whole.flatten().tolist()).encode()),
    )


def batches(corpus: Corpus, seed: int) -> Iterator[torch.Tensor]:
    """Yield shuffled windows for ever; half of them begin at a statement, half at any line."""
    rng = np.random.default_rng(seed)
    while True:
        cuts = np.arange(rng.integers(CONTEXT), len(corpus.tokens) - CONTEXT, CONTEXT)
        lines, statements = (at[np.searchsorted(at, cuts, "right") - 1] for at in corpus.starts)
        begins = rng.permutation(np.where(rng.random(len(cuts)) < 0.5, lines, statements))
        for batch in np.split(begins, range(BATCH, len(begins), BATCH))[:-1]:
            rows = corpus.tokens[batch[:, None] + np.arange(CONTEXT)]
            yield functional.pad(torch.from_numpy(rows), (1, 0), value=0)


def window_loss(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """Return the mean loss per token of some windows, the matrix products in bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def validate(model: Any, windows: torch.Tensor) -> float:
    """Return the mean validation loss in nats per token."""
    losses = [(window_loss(model, one).item(), len(one)) for one in torch.split(windows, 4)]
    return sum(loss * rows for loss, rows in losses) / len(windows)


def build_optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for everything else."""
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n]
    table = {"params": [p for n, p in named if "embed" in n], "weight_decay": WEIGHT_DECAY}
    vectors = {"params": [p for n, p in named if p.ndim != 2], "weight_decay": 0.0}
    adam = torch.optim.AdamW([table, vectors], lr=PEAK_LR, betas=(0.9, 0.95))
    scale = "match_rms_adamw"
    muon = torch.optim.Muon(matrices, lr=PEAK_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn=scale)
    return [muon, adam]


class Training:
    """One training run: the model, its optimizers, and the clock that sets the learning rate."""

    def __init__(self, tokenizer: Tokenizer, corpus: Corpus, args: argparse.Namespace) -> None:
        self.tokenizer, self.corpus, self.args = tokenizer, corpus, args
        self.model: Any = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE))  # type: ignore[no-untyped-call]
        self.optimizers = build_optimizers(self.model)
        self.budget, self.elapsed, self.step = args.minutes * 60.0, 0.0, 0
        if args.resume is not None and args.resume.exists():
            state = torch.load(args.resume)
            self.elapsed, self.step = state["elapsed"], state["step"]
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)

    def save(self) -> None:
        """Write the model folder, and the state to resume from if that was asked for."""
        write_model(self.args.out, self.model, self.tokenizer)
        if self.args.resume is not None:
            state = {"model": self.model.state_dict(), "elapsed": self.elapsed, "step": self.step}
            state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
            torch.save(state, self.args.resume)

    def update(self, windows: torch.Tensor) -> float:
        """Take one step; the rate warms up by steps, then falls to zero with the clock."""
        rate = PEAK_LR * min(1.0, (self.step + 1) / WARMUP_STEPS)
        rate *= max(0.0, 1.0 - self.elapsed / self.budget)
        for group in [group for one in self.optimizers for group in one.param_groups]:
            group["lr"] = rate
        mean = 0.0
        for part in torch.split(windows, MICRO_BATCH):
            loss = window_loss(self.model, part) * (len(part) / len(windows))
            loss.backward()  # type: ignore[no-untyped-call]
            mean += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return mean

    def run(self) -> None:
        """Train until the time is used up, with a checkpoint and a line of progress at times."""
        source = batches(self.corpus, self.args.seed + self.step)
        began = time.monotonic() - self.elapsed
        while self.elapsed < self.budget:
            loss = self.update(next(source))
            self.elapsed = time.monotonic() - began
            if self.step % 20 == 0:
                left = (self.budget - self.elapsed) / 60
                print(f"step {self.step:5d}  loss {loss:.3f}  {left:.1f} min left", flush=True)
            if self.step % 300 == 0:
                self.save()
                print(f"validation {validate(self.model, self.corpus.validation[:32]):.3f}")
        self.save()


def write_model(out: Path, model: Any, tokenizer: Tokenizer) -> None:
    """Write the model folder; the head is the embedding table, so it is not stored twice."""
    out.mkdir(parents=True, exist_ok=True)
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    names = {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
    files: dict[str, dict[str, Any]] = {
        "config.json": kind | {"torch_dtype": "bfloat16"} | ARCHITECTURE,
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 1},
        "tokenizer_config.json": names | {"model_max_length": 2048},
    }
    for name, value in files.items():
        (out / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(out / "tokenizer.json"))
    weights = {n: p.detach().to(torch.bfloat16) for n, p in model.named_parameters()}
    partial = out / "model.safetensors.partial"
    partial.write_bytes(save(weights, metadata={"format": "pt"}))
    partial.replace(out / "model.safetensors")


def write_card(training: Training) -> None:
    """Measure the weights as they are stored, in bfloat16, and write the model card."""
    model, corpus = training.model.bfloat16().float(), training.corpus
    nats = validate(model, corpus.validation)
    predicted = corpus.validation.numel() - len(corpus.validation)
    bits = nats * predicted / math.log(2) / corpus.validation_bytes
    card = f"""\
# petalnode demo model

A Llama-architecture model of {sum(p.numel() for p in model.parameters()) / 1e6:.2f} million
parameters that continues Python source: enough to see a swarm work without a download, not a
coding assistant. `examples/train_demo_model.py` made it.

- **Data:** the source of the Python {platform.python_version()} standard library without tests
  and data tables, under the PSF licence (PSF-2.0): {corpus.train_bytes / 1e6:.1f} MB,
  {len(corpus.tokens) / 1e6:.2f} million tokens. The model may repeat passages of it.
- **Training:** {training.step * BATCH * CONTEXT / 1e6:.1f} million tokens in windows of {CONTEXT},
  {training.elapsed / 60:.0f} minutes on {training.args.threads} CPU thread(s).
- **Validation:** {nats:.3f} nats per token, {bits:.3f} bits per byte, on held-out files of the same
  library ({corpus.validation_bytes / 1e3:.0f} kB), with the bfloat16 weights.
"""
    (training.args.out / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    """Parse the flags, make the data, train, and write the model with its card."""
    parser = argparse.ArgumentParser(description="Train petalnode's bundled demo model.")
    parser.add_argument("--minutes", type=float, default=45.0, help="time to train")
    parser.add_argument("--out", type=Path, default=Path("node/demo"), help="model folder")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="file to keep the state in and continue from")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(read_sources()[0])
    training = Training(tokenizer, build_corpus(tokenizer), args)
    training.save()
    training.run()
    write_card(training)


if __name__ == "__main__":
    main()
