"""Optimizer steps on what a client trains, through blocks that others hold.

A step: embed a batch behind the soft prompt; forward through the chain; norm, head and loss here;
backward through the chain; AdamW (arXiv 1711.05101) on what came back. The learning rate rises
over the first tenth of the steps, a hundred at most, and then falls in a line to nothing.
Gradients longer than 1 are shortened to 1. No dropout: a step draws no random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from petalnode.compute import Compute
from petalnode.errors import PetalnodeError, UsageError
from petalnode.models.client import ClientParts
from petalnode.models.config import ModelConfig
from petalnode.models.sampling import MAX_SEED
from petalnode.models.tuning.check import check_rank
from petalnode.models.tuning.sites import ALL_LINEAR, lora_sites, match_targets
from petalnode.models.tuning.tuning import Tuning
from petalnode.training.encoding import Row
from petalnode.training.loss import RowBatch, make_batch, mean_loss_and_gradient, summed_loss
from petalnode.training.modules import DeepPrompts, LoraParameters, SoftPrompt, TrainedParameters

METHODS = ("prompt", "deep-prompt", "lora")
LEARNING_RATES = {"prompt": 0.03, "deep-prompt": 0.01, "lora": 0.001}
"""By method, where none is asked for."""
USUAL_TARGETS = ("q_proj", "v_proj", "query_key_value", "qkv_proj")
"""What LoRA adapts where nothing is asked for: attention's queries and values, fused or not."""
MAX_BATCH_SIZE = 1 << 16
"""Examples; all hidden states of a batch are held at once."""
MAX_WARM_UP = 100
LONGEST_GRADIENT = 1.0
WEIGHT_DECAY = 0.01
ALPHA = 2
"""LoRA's alpha, in ranks: the matrices' product counts twice."""

Hearing = Callable[[int, int], None]
"""Hears how many rows are computed, and how many there are."""


class Training(Protocol):
    """What a tuner needs of a session: see ``Node.open_training``."""

    async def forward(
        self, hidden: Tensor, lengths: Sequence[int], *, tuning: Tuning = ..., backward: bool = ...
    ) -> tuple[Tensor, Any]:
        """Outputs [T, H] of rows one after the other, and the record that ``backward`` needs, if
        that is to follow."""

    async def backward(self, record: Any, grad: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients [T, H] of the inputs, and of the tuning's tensors by name."""


@dataclass(frozen=True)
class TuneOptions:
    """What is trained and how. ``learning_rate`` None and no ``targets``: the usual ones.

    ``prompt_tokens`` count for prompts, ``rank`` and ``targets`` for LoRA. The same seed, data and
    model give the same losses. Raises ``UsageError`` for what cannot be trained.
    """

    method: str = "lora"
    prompt_tokens: int = 16
    rank: int = 8
    targets: tuple[str, ...] = ()
    steps: int = 100
    batch_size: int = 8
    learning_rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(
                f"There is no method {self.method!r}.", f"Choose one of {', '.join(METHODS)}."
            )
        if min(self.prompt_tokens, self.rank, self.steps, self.batch_size) < 1:
            raise UsageError("A number of tokens, ranks, steps or rows is below 1.", "Raise it.")
        if self.batch_size > MAX_BATCH_SIZE:
            raise UsageError(
                f"A batch of {self.batch_size} examples is too large.",
                f"A step takes {MAX_BATCH_SIZE} at most; a few dozen do.",
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise UsageError(f"A seed of {self.seed} is none.", f"Choose one from 0 to {MAX_SEED}.")
        if self.targets and self.method != "lora":
            raise UsageError(
                f"The method {self.method} adapts no layers, so that there is nothing to target.",
                "Leave --target out, or choose --method lora.",
            )
        if not 0.0 < self.rate < 1e3:  # also for NaN
            raise UsageError(f"A learning rate of {self.learning_rate} is none.", "Try 0.001, say.")

    @property
    def rate(self) -> float:
        """The highest learning rate of the run."""
        return LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate

    @property
    def virtual_tokens(self) -> int:
        """How many positions of each row the soft prompt takes."""
        return 0 if self.method == "lora" else self.prompt_tokens

    def rate_at(self, step: int) -> float:
        """The learning rate of step ``step``, from 0 on."""
        warm = min(MAX_WARM_UP, self.steps // 10) + 1
        rising = (step + 1) / warm
        falling = (self.steps - step) / max(1, self.steps - warm + 1)
        return self.rate * max(0.0, min(1.0, rising, falling))

    def to_json(self) -> dict[str, Any]:
        """Plain values; they decide the run."""
        return asdict(self) | {"targets": list(self.targets), "learning_rate": self.rate}


def new_parameters(
    options: TuneOptions, config: ModelConfig, client: ClientParts, rows: Sequence[Row]
) -> TrainedParameters:
    """What the options ask for, at its beginning, drawn by the seed.

    Prompts begin as embeddings of tokens of the data. Raises ``UsageError`` for targets that the
    model does not have.
    """
    check_options(options, config)
    if options.method == "lora":
        targets, alpha = targets_of(options, config), ALPHA * options.rank
        return LoraParameters(
            config, rank=options.rank, alpha=alpha, targets=targets, seed=options.seed
        )
    rng = torch.Generator().manual_seed(options.seed)
    drawn = [rows[_below(len(rows), rng)].ids for _ in range(options.prompt_tokens)]
    words = torch.tensor([ids[_below(len(ids), rng)] for ids in drawn])
    start = client.embed_trainable(words, torch.arange(len(words))).float().cpu()
    kind = SoftPrompt if options.method == "prompt" else DeepPrompts
    return kind(config, options.prompt_tokens, start=start, seed=options.seed)


def _below(count: int, rng: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=rng))


def check_options(options: TuneOptions, config: ModelConfig) -> None:
    """Raise ``UsageError`` for what the model does not have, before anything is waited for."""
    if options.method == "lora":
        match_targets(config, targets_of(options, config))
        check_rank(options.rank, "The adapter")


def targets_of(options: TuneOptions, config: ModelConfig) -> list[str]:
    """What was asked for, or those of ``USUAL_TARGETS`` that the model has, or all its sites."""
    there = {site.rpartition(".")[2] for site in lora_sites(config, 0)}
    usual = [target for target in USUAL_TARGETS if target in there]
    return list(options.targets) or usual or [ALL_LINEAR]


@dataclass(frozen=True)
class StepResult:
    """Mean loss over the learned tokens before the update; ``positions`` went through the chain."""

    loss: float
    positions: int


class Tuner:
    """Trains ``parameters`` through ``training``; ``done`` steps are behind it.

    One user at a time. A step that is cancelled, or raises, changes nothing. A step that ended well
    may still have led to where no loss is finite: that is known after the next forward pass, and
    until then the state before it is kept, for ``step_back``.
    """

    def __init__(
        self,
        training: Training,
        client: ClientParts,
        compute: Compute,
        options: TuneOptions,
        parameters: TrainedParameters,
    ) -> None:
        self.options, self.parameters, self.done = options, parameters, 0
        self._training, self._client, self._compute = training, client, compute
        self._named = dict(parameters.named_parameters())
        self._before: dict[str, Tensor] | None = None
        self._optimizer = torch.optim.AdamW(
            self._named.values(), lr=options.rate, weight_decay=WEIGHT_DECAY, foreach=False
        )

    async def step(self, rows: Sequence[Row]) -> StepResult:
        """One update from these rows.

        Raises ``StepFailed`` for a loss or gradient that is not finite, or numbers that the chain
        cannot compute with, and what else the chain raises.
        """
        number = self.done + 1
        batch, hidden, tuning = await self._compute.run(partial(self._begin, rows))
        with _naming(f"Step {number}"):
            output, record = await self._training.forward(hidden, batch.lengths, tuning=tuning)
        head = partial(mean_loss_and_gradient, self._client, batch, output)
        loss, grad = await self._compute.run(head)
        _check(loss, f"loss of step {number}")
        self._before = None
        with _naming(f"Step {number}"):
            grad_in, grads = await self._training.backward(record, grad)
        await self._compute.run(partial(self._update, batch, grad_in, grads))
        return StepResult(loss, sum(batch.lengths))

    async def evaluate(
        self, rows: Sequence[Row], kind: str = "validation", hear: Hearing | None = None
    ) -> float:
        """The mean loss over the learned tokens of all rows, some at a time; ``kind`` is what an
        error calls it. Raises as ``step``."""
        what = f"{kind} loss after step {self.done}"
        total, tokens, size = 0.0, 0, self.options.batch_size
        for first in range(0, len(rows), size):
            begin = partial(self._begin, rows[first : first + size])
            batch, hidden, tuning = await self._compute.run(begin)
            with _naming(what.capitalize()):
                output, _ = await self._training.forward(
                    hidden, batch.lengths, tuning=tuning, backward=False
                )
            total += await self._compute.run(partial(summed_loss, self._client, batch, output))
            tokens += len(batch.targets_L)
            if hear is not None:
                hear(min(first + size, len(rows)), len(rows))
        _check(total, what)
        self._before = None
        return total / tokens

    def step_back(self) -> None:
        """Undo the last step, unless a loss after it was finite."""
        if self._before is not None:
            self.restore(self.done - 1, self._before)

    def state(self) -> dict[str, Tensor]:
        """Copies of what a later run goes on from: parameters, and AdamW's means of each."""
        found: dict[str, Tensor] = {}
        for name, parameter in self._named.items():
            found[f"parameter.{name}"] = parameter.detach().clone()
            for mean in ("exp_avg", "exp_avg_sq"):
                moments = self._optimizer.state[parameter]
                found[f"{mean}.{name}"] = moments.get(mean, torch.zeros_like(parameter)).clone()
        return found

    def restore(self, done: int, state: Mapping[str, Tensor]) -> None:
        """Go on after ``done`` steps from what ``state`` gave then. Raises ``UsageError``."""
        expected = {name: tensor.shape for name, tensor in self.state().items()}
        if expected != {name: tensor.shape for name, tensor in state.items()}:
            raise UsageError(
                "The saved training state holds other tensors than these flags make.",
                "Resume with the flags that it was begun with.",
            )
        for name, parameter in self._named.items():
            parameter.data.copy_(state[f"parameter.{name}"])
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(done)),
                "exp_avg": state[f"exp_avg.{name}"].clone(),
                "exp_avg_sq": state[f"exp_avg_sq.{name}"].clone(),
            }
        self.done, self._before = done, None

    def _begin(self, rows: Sequence[Row]) -> tuple[RowBatch, Tensor, Tuning]:
        batch = make_batch(rows, self.options.virtual_tokens)
        hidden = batch.hidden(self._client, self.parameters.prompt)
        return batch, hidden, self.parameters.tuning()

    def _update(self, batch: RowBatch, grad_in: Tensor, grads: Mapping[str, Tensor]) -> None:
        named = self.parameters.named()
        for name, parameter in named.items():
            parameter.grad = grads[name].to(parameter)
        if self.parameters.prompt is not None:
            self.parameters.prompt.grad = batch.prompt_gradient(grad_in)
        self._optimizer.param_groups[0]["lr"] = self.options.rate_at(self.done)
        length = torch.nn.utils.clip_grad_norm_(self._named.values(), LONGEST_GRADIENT)
        _check(float(length), f"gradient of step {self.done + 1}")
        self._before = self.state()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.done += 1


class StepFailed(PetalnodeError):
    """A step or a validation that would fail again; the parameters are as before it."""


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Say where it was that the chain could not compute with what it was given."""
    try:
        yield
    except UsageError as error:
        raise StepFailed(f"{what}: {error.cause}", error.remedy) from error


def _check(value: float, what: str) -> None:
    if not math.isfinite(value):
        raise StepFailed(
            f"The {what} is {value}: no number to learn from.",
            "Begin again with a lower learning rate (--lr), or look for what is odd in the data.",
        )
