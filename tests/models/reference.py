"""What the parity tests compare: transformers, and a plain driver for petalnode's own parts."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.loading import load_block_span, load_client
from petalnode.models.span import RowSlice, Span


def load_reference(path: Path, dtype: str = "float32") -> Any:
    """Return transformers' model; with its own attention where the usual one leaves caps out."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    if getattr(config, "attn_logit_softcapping", None) is not None:
        config._attn_implementation = "eager"
    which = getattr(torch, dtype)
    return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=which).eval()


@torch.inference_mode()
def reference_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """Return transformers' logits [T, V] for one row."""
    return model(input_ids=torch.tensor([list(ids)])).logits[0].float()


def reference_generate(model: Any, ids: Sequence[int], new_tokens: int) -> list[int]:
    """Return what transformers generates greedily, past any end-of-sequence."""
    out = model.generate(
        torch.tensor([list(ids)]),
        attention_mask=torch.ones((1, len(ids)), dtype=torch.int64),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [int(one) for one in out[0, len(ids) :]]


class Local:
    """A whole model in this process, cut into spans at `cuts`; rows are lists of caches."""

    def __init__(self, path: Path, cuts: Sequence[int] = (), dtype: str = "float32") -> None:
        self.checkpoint = open_checkpoint(str(path))
        config = self.checkpoint.config
        bounds = [0, *cuts, config.num_blocks]
        which: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": torch.device("cpu")}
        self.spans: list[Span] = [
            load_block_span(self.checkpoint, a, b, **which) for a, b in pairwise(bounds)
        ]
        self.client = load_client(self.checkpoint, **which)

    def row(self) -> list[Any]:
        """Return the caches of one new row, one a span."""
        return [span.new_row(span.start, span.end) for span in self.spans]

    def step(self, rows: Sequence[list[Any]], new: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens `new[i]` to `rows[i]` in one ragged batch; return all logits [T, V]."""
        begins = [row[0].length for row in rows]
        positions = [at + i for at, ids in zip(begins, new, strict=True) for i in range(len(ids))]
        flat = [one for ids in new for one in ids]
        x = self.client.embed(torch.tensor(flat), torch.tensor(positions))
        for at, span in enumerate(self.spans):
            slices = [
                RowSlice(row[at], row[at].length, len(ids))
                for row, ids in zip(rows, new, strict=True)
            ]
            x = span.forward(x, slices, span.start, span.end)
        return self.client.logits(x)

    def generate(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """Return greedy tokens after the prompt `ids`."""
        row, out = self.row(), list[int]()
        feed = list(ids)
        for _ in range(new_tokens):
            feed = [int(self.step([row], [feed])[-1].argmax())]
            out += feed
        return out
