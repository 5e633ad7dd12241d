"""Sampling against transformers' logits processors, and its promises about seeds."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petalnode.errors import ModelError, UsageError
from petalnode.models.sampling import Sampler, SamplingConfig, pick, warp


def reference(logits: torch.Tensor, previous: list[int], config: SamplingConfig) -> torch.Tensor:
    """Return the scores of transformers' processors in its own order."""
    from transformers.generation.logits_process import (
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    ids, scores = torch.tensor([previous], dtype=torch.int64), logits[None]
    chain: list[Any] = [RepetitionPenaltyLogitsProcessor(config.repetition_penalty)]
    chain.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        chain.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1.0:
        chain.append(TopPLogitsWarper(config.top_p))
    for processor in chain:
        scores = processor(ids, scores)
    return scores[0]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 1000),
    previous=st.lists(st.integers(0, 49), min_size=1, max_size=20),
    config=st.builds(
        SamplingConfig,
        temperature=st.floats(0.1, 3.0),
        top_k=st.integers(0, 60),
        top_p=st.floats(0.05, 1.0),
        repetition_penalty=st.floats(0.5, 2.0),
    ),
)
def test_same_scores_as_transformers(
    seed: int, previous: list[int], config: SamplingConfig
) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 3
    ours, theirs = warp(logits, previous, config), reference(logits, previous, config)
    torch.testing.assert_close(ours, theirs)


def test_greedy_takes_the_lowest_of_equals() -> None:
    sampler = Sampler(SamplingConfig())
    assert sampler.sample(torch.tensor([0.0, 2.0, 1.0, 2.0]), []) == 1


def test_greedy_with_a_penalty() -> None:
    sampler = Sampler(SamplingConfig(repetition_penalty=2.0))
    assert sampler.sample(torch.tensor([3.0, 2.0, -1.0]), [0]) == 1
    assert sampler.sample(torch.tensor([-1.0, -1.5]), [0, 0, 0]) == 1, "once, however often it was"


def test_a_seed_repeats_itself() -> None:
    logits = torch.randn(200, 100, generator=torch.Generator().manual_seed(1))
    config = SamplingConfig(temperature=1.0, top_p=0.95, seed=7)

    def draw(config: SamplingConfig) -> list[int]:
        sampler = Sampler(config)
        torch.rand(3)  # the global generator plays no part
        return [sampler.sample(row, []) for row in logits]

    assert draw(config) == draw(config)
    assert draw(config) != draw(SamplingConfig(temperature=1.0, top_p=0.95, seed=8))
    unseeded = SamplingConfig(temperature=1.0)
    assert draw(unseeded) != draw(unseeded)


def test_tiny_differences_rarely_matter() -> None:
    """Another chain gives logits that differ in the last bits: the text must be the same."""
    logits = torch.randn(500, 2000, generator=torch.Generator().manual_seed(1)) * 4
    noise = torch.randn(500, 2000, generator=torch.Generator().manual_seed(2)) * 1e-6
    config = SamplingConfig(temperature=0.8, seed=7)
    a, b = Sampler(config), Sampler(config)
    assert [a.sample(x, []) for x in logits] == [b.sample(x, []) for x in logits + noise]


def test_frequencies_follow_the_probabilities() -> None:
    wanted = torch.tensor([0.5, 0.3, 0.15, 0.05])
    sampler = Sampler(SamplingConfig(temperature=1.0, seed=0))
    drawn = Counter(sampler.sample(wanted.log(), []) for _ in range(4000))
    for token, probability in enumerate(wanted.tolist()):
        assert abs(drawn[token] / 4000 - probability) < 0.03


def test_what_is_cut_is_never_drawn() -> None:
    logits = torch.tensor([0.0, 5.0, -torch.inf, 4.9, 0.1, -torch.inf])
    sampler = Sampler(SamplingConfig(temperature=100.0, top_k=3, seed=0))
    assert {sampler.sample(logits, []) for _ in range(300)} == {1, 3, 4}


def test_the_ends_of_the_cumulative_sum() -> None:
    """Ids without any weight are not drawn by 0 or by what rounding makes 1."""
    scores = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    assert [pick(scores, u) for u in (0.0, 0.49, 0.51, 1.0)] == [1, 1, 3, 3]


def test_a_tiny_top_p_keeps_the_best() -> None:
    sampler = Sampler(SamplingConfig(temperature=1.0, top_p=1e-9, seed=0))
    assert sampler.sample(torch.tensor([1.0, 3.0, 2.0]), []) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_output_that_is_not_a_number(temperature: float, bad: float) -> None:
    sampler = Sampler(SamplingConfig(temperature=temperature, seed=0))
    with pytest.raises(ModelError, match="not a number"):
        sampler.sample(torch.tensor([1.0, bad, 2.0]), [])


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("nan")},
        {"seed": -1},
        {"seed": 1 << 63},
    ],
)
def test_values_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="out of range"):
        SamplingConfig(**values)
