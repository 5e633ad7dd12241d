"""What the engine computes next."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from petalnode.serving.scheduler import (
    DECODE_TOKENS,
    TURN_TOKENS,
    TURN_TOKENS_BESIDE_DECODE,
    TURNS_PER_TRAINING_STEP,
    plan_turn,
    training_is_due,
)


@dataclass
class Work:
    left: int
    longest: int


def decode(tokens=1):
    return Work(tokens, 1)


def prefill(tokens):
    return Work(tokens, max(tokens, DECODE_TOKENS + 1))


def shares(*queue, **options):
    return [(share.index, share.tokens) for share in plan_turn(queue, **options)]


def test_all_that_decodes_goes_first_and_together():
    assert shares(prefill(1000), decode(), decode(4)) == [
        (1, 1),
        (2, 4),
        (0, TURN_TOKENS_BESIDE_DECODE),
    ]


def test_every_other_turn_is_decode_alone():
    assert shares(prefill(1000), decode(), prefill_is_due=False) == [(1, 1)]
    assert shares(prefill(1000), prefill_is_due=False) == [(0, TURN_TOKENS)]


def test_prefill_alone_gets_a_long_turn():
    assert shares(prefill(1000)) == [(0, TURN_TOKENS)]


def test_prefill_stays_short_while_sessions_decode_between_their_turns():
    assert shares(prefill(1000), decoding=True) == [(0, TURN_TOKENS_BESIDE_DECODE)]


def test_what_one_prompt_leaves_of_the_turn_goes_to_the_next():
    assert shares(prefill(200), prefill(300)) == [(0, 200), (1, TURN_TOKENS - 200)]


@given(st.lists(st.builds(lambda n: Work(n, n), st.integers(1, 600)), max_size=20), st.booleans())
def test_every_turn_moves_on_and_keeps_its_bounds(queue, decoding):
    plan = plan_turn(queue, decoding=decoding)
    assert bool(plan) == bool(queue)
    assert len({share.index for share in plan}) == len(plan)
    assert all(0 < share.tokens <= queue[share.index].left for share in plan)
    prefilled = sum(s.tokens for s in plan if queue[s.index].longest > DECODE_TOKENS)
    assert prefilled <= TURN_TOKENS


def test_training_comes_last_but_it_comes():
    assert training_is_due(0, 1, 0)
    assert not training_is_due(0, 0, 99)
    assert not training_is_due(1, 1, TURNS_PER_TRAINING_STEP - 1)
    assert training_is_due(1, 1, TURNS_PER_TRAINING_STEP)
