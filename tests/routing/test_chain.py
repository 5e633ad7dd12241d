import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petalnode.errors import NoRoute
from petalnode.routing.announcement import Announcement
from petalnode.routing.chain import UNKNOWN_RTT_S, Hop, choose_chain

from .records import record


def test_fewest_hops_come_before_round_trips() -> None:
    swarm = [record("far", 0, 8), record("near1", 0, 4), record("near2", 4, 8)]
    rtts = {"far": 1.0, "near1": 0.001, "near2": 0.001}
    assert choose_chain(swarm, 8, rtts=rtts) == (Hop("far", 0, 8, 1.0),)


def test_equal_hops_go_by_round_trips() -> None:
    swarm = [record("a", 0, 4), record("b", 0, 4), record("c", 4, 8)]
    chain = choose_chain(swarm, 8, rtts={"a": 0.2, "b": 0.1})
    assert chain == (Hop("b", 0, 4, 0.1), Hop("c", 4, 8, None))


def test_a_hop_may_serve_a_part_of_its_span() -> None:
    chain = choose_chain([record("a", 0, 5), record("b", 2, 8)], 8, rtts={})
    assert chain == (Hop("a", 0, 5), Hop("b", 5, 8))


def test_an_unmeasured_peer_is_pessimistic_not_excluded() -> None:
    swarm = [record("a"), record("b")]
    assert choose_chain(swarm, 4, rtts={"b": UNKNOWN_RTT_S / 2})[0].peer_id == "b"
    assert choose_chain(swarm, 4, rtts={"b": UNKNOWN_RTT_S * 2})[0].peer_id == "a"


def test_ties_go_to_the_smaller_peer_id_in_any_order() -> None:
    swarm = [record("c"), record("a"), record("b")]
    for order in itertools.permutations(swarm):
        assert choose_chain(order, 4, rtts={})[0].peer_id == "a"


@pytest.mark.parametrize("state", ["joining", "draining", "offline"])
def test_only_peers_that_are_online_are_used(state: str) -> None:
    with pytest.raises(NoRoute):
        choose_chain([record(state=state)], 4, rtts={})


def test_excluded_peers_are_not_used() -> None:
    swarm = [record("a"), record("b")]
    assert choose_chain(swarm, 4, rtts={}, exclude={"a"})[0].peer_id == "b"


def test_a_span_beyond_the_model_is_not_used() -> None:
    with pytest.raises(NoRoute):
        choose_chain([record(end=5)], 4, rtts={})


@pytest.mark.parametrize(
    ("spans", "missing", "words"),
    [
        ([], (0, 1, 2, 3, 4, 5), "Blocks 0 to 5 are served by nobody."),
        ([(0, 3)], (3, 4, 5), "Blocks 3 to 5 are served by nobody."),
        ([(0, 3), (4, 6)], (3,), "Block 3 is served by nobody."),
        ([(1, 2), (3, 5)], (0, 2, 5), "Block 0, block 2 and block 5 are served by nobody."),
    ],
)
def test_no_route_names_the_blocks(
    spans: list[tuple[int, int]], missing: tuple[int, ...], words: str
) -> None:
    swarm = [record(f"p{i}", *span) for i, span in enumerate(spans)]
    with pytest.raises(NoRoute) as caught:
        choose_chain(swarm, 6, rtts={})
    assert caught.value.missing == missing
    assert caught.value.cause == words


def cheapest_by_trying_everything(
    swarm: list[Announcement], num_blocks: int, rtts: dict[str, float]
) -> tuple[int, float] | None:
    found = []

    def extend(block: int, hops: int, rtt_s: float) -> None:
        if block == num_blocks:
            found.append((hops, rtt_s))
        for a in swarm:
            if a.start <= block < a.end:
                for end in range(block + 1, a.end + 1):
                    extend(end, hops + 1, rtt_s + rtts.get(a.peer_id, UNKNOWN_RTT_S))

    extend(0, 0, 0.0)
    return min(found, default=None)


NUM_BLOCKS = 5
spans = st.tuples(st.integers(0, NUM_BLOCKS), st.integers(0, NUM_BLOCKS)).filter(
    lambda s: s[0] < s[1]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), taken=st.lists(spans, max_size=5))
def test_equal_to_trying_every_chain(data: st.DataObject, taken: list[tuple[int, int]]) -> None:
    swarm = [record(f"p{i}", *span) for i, span in enumerate(taken)]
    # Multiples of 1/64 s add up without rounding.
    measured = data.draw(
        st.dictionaries(st.sampled_from([f"p{i}" for i in range(6)]), st.integers(1, 64))
    )
    rtts = {peer_id: ticks / 64 for peer_id, ticks in measured.items()}
    expected = cheapest_by_trying_everything(swarm, NUM_BLOCKS, rtts)
    if expected is None:
        with pytest.raises(NoRoute):
            choose_chain(swarm, NUM_BLOCKS, rtts=rtts)
        return
    chain = choose_chain(swarm, NUM_BLOCKS, rtts=rtts)
    assert [hop.start for hop in chain] == [0, *(hop.end for hop in chain[:-1])]
    assert chain[-1].end == NUM_BLOCKS
    by_id = {a.peer_id: a for a in swarm}
    for hop in chain:
        assert by_id[hop.peer_id].start <= hop.start < hop.end <= by_id[hop.peer_id].end
    assert (len(chain), sum(UNKNOWN_RTT_S if h.rtt_s is None else h.rtt_s for h in chain)) == (
        expected
    )
