import itertools
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petalnode.errors import NoRoute
from petalnode.routing import chain
from petalnode.routing.announcement import MIN_RATE, Announcement, InvalidAnnouncement
from petalnode.routing.chain import (
    MAX_CANDIDATES,
    SPREAD,
    Gap,
    Hop,
    Route,
    Router,
    shortlist,
)
from petalnode.routing.costs import QUEUE_SHARE, SUSPECT_S, VISIT_S, Knowledge, Workload
from petalnode.routing.delays import UNKNOWN_RTT_S, Delays, estimate_delays

from .records import record


def peers_of(route: Route) -> list[str]:
    return [hop.peer_id for hop in route.hops]


def find(swarm: list[Announcement], blocks: int = 4, **options: object) -> Route:
    known = options.pop("known", Knowledge())
    return Router(blocks).find(swarm, known, **options)  # type: ignore[arg-type]


def hops(
    swarm: list[Announcement], blocks: int, rtts: dict[str, float], **options: object
) -> tuple[Hop, ...]:
    """Of a node that knows nothing but round trips."""
    return find(swarm, blocks, known=Knowledge(rtts=rtts), **options).hops


def test_one_far_hop_against_two_near_ones_is_a_matter_of_time() -> None:
    swarm = [record("far", 0, 8), record("near1", 0, 4), record("near2", 4, 8)]
    for a, b in itertools.permutations(("near1", "near2")):
        swarm = [
            record(p.peer_id, p.start, p.end, rtts={b: 0.001}) if p.peer_id == a else p
            for p in swarm
        ]
    rtts = {"near1": 0.001, "near2": 0.001}
    # Spans of 8 and of 4 blocks at 10 tokens/s: 100 ms in the one, 200 ms in the two together.
    assert hops(swarm, 8, rtts=rtts | {"far": 0.09}) == (Hop("far", 0, 8, 0.09),)
    assert [hop.peer_id for hop in hops(swarm, 8, rtts=rtts | {"far": 0.11})] == [
        "near1",
        "near2",
    ]


def test_the_cost_is_the_sum_of_its_terms() -> None:
    swarm = [
        record("a", 0, 2, decode_tps=50.0, queue_depth=3, rtts={"b": 0.03}, bandwidth=1e6),
        record("b", 2, 4, decode_tps=100.0, rtts={"a": 0.02}, bandwidth=2e6),
    ]
    known = Knowledge(rtts={"a": 0.01, "b": 0.05})
    route = find(swarm, known=known, workload=Workload(token_bytes=1000))
    delays_s = (0.01 + 0.03 + 0.05) / 2
    compute_s = (1 + 3 * QUEUE_SHARE) / 50 + 1 / 100
    links_s = 2 * (1000 / 1e6 + 1000 / 2e6)
    assert route.hops == (Hop("a", 0, 2, 0.01), Hop("b", 2, 4, 0.05))
    assert route.cost_s == pytest.approx(delays_s + 2 * VISIT_S + compute_s + links_s)
    assert route.stage_s == pytest.approx((1 + 3 * QUEUE_SHARE) / 50)


def test_a_hop_may_serve_a_part_of_its_span() -> None:
    slow, fast = record("a", 0, 5, decode_tps=1.0), record("b", 2, 8, decode_tps=100.0)
    assert hops([slow, fast], 8, rtts={}) == (Hop("a", 0, 2), Hop("b", 2, 8))
    slow, fast = record("a", 0, 5, decode_tps=100.0), record("b", 2, 8, decode_tps=1.0)
    assert hops([slow, fast], 8, rtts={}) == (Hop("a", 0, 5), Hop("b", 5, 8))


def test_an_unmeasured_peer_is_pessimistic_not_excluded() -> None:
    swarm = [record("a"), record("b")]
    assert hops(swarm, 4, rtts={"b": UNKNOWN_RTT_S / 2})[0].peer_id == "b"
    assert hops(swarm, 4, rtts={"b": UNKNOWN_RTT_S * 2})[0].peer_id == "a"


def test_ties_go_to_the_smaller_peer_id_in_any_order() -> None:
    swarm = [record("c"), record("a"), record("b")]
    for order in itertools.permutations(swarm):
        assert hops(order, 4, rtts={})[0].peer_id == "a"


def test_of_two_records_of_one_peer_the_newer_counts() -> None:
    swarm = [record("a", 0, 4, seq=2), record("a", 0, 2, seq=3), record("b", 2, 4)]
    for order in itertools.permutations(swarm):
        assert hops(order, 4, rtts={}) == (Hop("a", 0, 2), Hop("b", 2, 4))


@pytest.mark.parametrize("state", ["joining", "draining", "offline"])
def test_only_peers_that_are_online_are_used(state: str) -> None:
    with pytest.raises(NoRoute):
        hops([record(state=state)], 4, rtts={})


def test_excluded_peers_are_not_used() -> None:
    swarm = [record("a"), record("b")]
    assert hops(swarm, 4, rtts={}, exclude={"a"})[0].peer_id == "b"


def test_a_span_beyond_the_model_is_not_used() -> None:
    with pytest.raises(NoRoute):
        hops([record(end=5)], 4, rtts={})


@pytest.mark.parametrize(
    ("changes", "workload"),
    [
        ({"kv_tokens_free": 10}, Workload(kv_tokens=2048)),
        ({"max_context": 100}, Workload(context=101)),
        ({"adapters": ("org/b",)}, Workload(adapters=("org/a", "org/b"))),
        ({"quant": "int8"}, Workload(exact=True)),
    ],
)
def test_peers_that_do_not_fit_the_session_are_left_out(
    changes: dict[str, object], workload: Workload
) -> None:
    unfit = record("a", decode_tps=1000.0, **changes)
    assert peers_of(find([unfit])) == ["a"]
    fit = record("b", adapters=("org/a", "org/b"))
    assert peers_of(find([unfit, fit], workload=workload)) == ["b"]
    with pytest.raises(NoRoute) as caught:
        find([unfit], workload=workload)
    assert "served only by peers that cannot take this session; of a:" in caught.value.cause
    assert caught.value.missing == (0, 1, 2, 3)


def test_a_hop_is_no_longer_than_its_room_for_the_cache() -> None:
    # Room for 512 tokens in each of 4 blocks is room for 1024 in 2 of them.
    swarm = [record("a", decode_tps=100.0, kv_tokens_free=512), record("b", 0, 4)]
    route = find(swarm, known=Knowledge(rtts={"a": 0.01, "b": 0.01}), workload=Workload(1024))
    assert sum(hop.end - hop.start for hop in route.hops if hop.peer_id == "a") <= 2
    with pytest.raises(NoRoute) as caught:
        find(swarm[:1], workload=Workload(1024))
    assert caught.value.cause == "The peers have no chain with room for 1024 tokens."


def test_banned_peers_are_not_used_and_suspected_ones_last() -> None:
    swarm = [record("a"), record("b")]
    banned = Knowledge(banned={"a": "banned for 3 s more: its connection was lost"})
    assert peers_of(find(swarm, known=banned)) == ["b"]
    with pytest.raises(NoRoute) as caught:
        find(swarm[:1], known=banned)
    assert caught.value.cause.endswith("of a: banned for 3 s more: its connection was lost.")
    suspected = Knowledge(suspected={"a"})
    assert peers_of(find(swarm, known=suspected)) == ["b"]
    assert find(swarm[:1], known=suspected).cost_s == pytest.approx(
        find(swarm[:1]).cost_s + SUSPECT_S
    )


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
        hops(swarm, 6, rtts={})
    assert caught.value.missing == missing
    assert caught.value.cause == words


def test_a_remedy_for_an_adapter_that_part_of_the_chain_lacks() -> None:
    swarm = [record("p", 0, 3, adapters=("law@1",)), record("q", 3, 6)]
    with pytest.raises(NoRoute) as caught:
        find(swarm, 6, workload=Workload(adapters=("law@1",)))
    assert caught.value.missing == (3, 4, 5)
    assert caught.value.cause.endswith("; of q: it lacks adapter law@1.")
    assert caught.value.remedy.startswith("Offer it there with `petalnode run --adapter`")
    with pytest.raises(NoRoute) as caught:  # with the adapter it would not do either
        find(swarm, 6, workload=Workload(adapters=("law@1",), context=1 << 40))
    assert caught.value.remedy.startswith("Start a node")


def test_a_lost_range_is_replaced_next_to_its_neighbours() -> None:
    near = {"s": 0.002, "r": 0.002, "far": 0.2}
    far = {"s": 0.2, "r": 0.2, "near1": 0.2, "near2": 0.2}
    swarm = [
        record("far", 2, 6, rtts=far),
        record("near1", 0, 4, rtts=near | {"near2": 0.002}),
        record("near2", 4, 8, rtts=near | {"near1": 0.002}),
        record("r", 6, 8, rtts={"far": 0.2, "near1": 0.002, "near2": 0.002}),
        record("s", 0, 2, rtts={"far": 0.2, "near1": 0.002, "near2": 0.002}),
    ]
    known = Knowledge(rtts={"far": 0.001, "near1": 0.3, "near2": 0.3})
    gap = Gap(2, 6, sender="s", receiver="r")
    route = Router(8).find(swarm, known, gap=gap)
    assert route.hops == (Hop("near1", 2, 4, 0.3), Hop("near2", 4, 6, 0.3))
    others = {"r", "s", "near1"}
    assert peers_of(Router(8).find(swarm, known, gap=gap, exclude=others)) == ["far"]
    assert peers_of(Router(8).find(swarm, known, gap=Gap(2, 6), exclude=others)) == ["far"]


def test_a_replacement_is_none_of_the_peers_beside_the_gap() -> None:
    swarm = [record("r", 0, 8, decode_tps=1e3), record("s", 0, 8, decode_tps=1e3)]
    with pytest.raises(NoRoute) as caught:
        Router(8).find(swarm, Knowledge(), gap=Gap(2, 4, sender="s", receiver="r"))
    assert caught.value.missing == (2, 3)
    swarm.append(record("t", 0, 8))
    route = Router(8).find(swarm, Knowledge(), gap=Gap(2, 4, sender="gone", receiver="r"))
    assert route.hops[0].peer_id in "st"


def test_bulk_work_goes_by_the_busiest_stage() -> None:
    rtts = {"one": 0.001, "b1": 0.3, "b2": 0.3}
    swarm = [
        record("b1", 0, 2, forward_tps=200.0, decode_tps=1.0),
        record("b2", 2, 4, forward_tps=200.0, decode_tps=1.0),
        record("one", 0, 4, forward_tps=80.0, decode_tps=1.0),
    ]
    known = Knowledge(rtts=rtts)
    assert peers_of(find(swarm, known=known)) == ["one"]
    route = find(swarm, known=known, workload=Workload(bulk_tokens=10_000))
    assert peers_of(route) == ["b1", "b2"]
    assert route.stage_s == pytest.approx(1 / 200)


def test_bulk_work_avoids_slow_links() -> None:
    fast = record("fast", forward_tps=1000.0, bandwidth=1e5)
    slow = record("slow", forward_tps=500.0, bandwidth=1e9)
    bulk = Workload(token_bytes=1000, bulk_tokens=10_000)
    assert peers_of(find([fast, slow], workload=bulk)) == ["slow"]
    assert "fast" in peers_of(find([fast, slow], workload=Workload(bulk_tokens=10_000)))


def test_equal_choices_are_spread_and_worse_ones_are_not_taken() -> None:
    swarm = [*(record(f"p{i}") for i in range(4)), record("slow", decode_tps=7.0)]
    rng = random.Random(1)
    router = Router(4)
    chosen = Counter(peers_of(router.find(swarm, Knowledge(), rng=rng))[0] for _ in range(400))
    assert set(chosen) == {"p0", "p1", "p2", "p3"}
    assert min(chosen.values()) > 60


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_spread_choice_costs_little_more_than_the_best(seed: int) -> None:
    rng = random.Random(seed)
    swarm = [
        record(f"p{i}", start, start + 4, decode_tps=rng.uniform(5, 50))
        for i, start in enumerate([0, 0, 1, 2, 3, 4, 4, 4])
    ]
    best = find(swarm, 8)
    assert find(swarm, 8, rng=rng).cost_s <= best.cost_s * (1 + SPREAD) + 1e-12


def test_a_router_that_remembers_answers_like_a_new_one() -> None:
    rng = random.Random(3)
    router = Router(8)
    swarm: dict[str, Announcement] = {}
    rtts: dict[str, float] = {}
    for step in range(30):
        name = f"p{rng.randrange(8)}"
        start = rng.choice([0, 0, 2, 4])
        # Everybody measured by everybody: nothing is estimated, so nothing depends on the past.
        near = {f"p{i}": 0.01 * (1 + (i + int(name[1]) + step // 10) % 3) for i in range(8)}
        swarm[name] = record(name, start, start + 4, decode_tps=rng.uniform(5, 50), rtts=near)
        rtts[name] = rng.uniform(0.001, 0.1)
        known = Knowledge(rtts=dict(rtts))
        try:
            fresh = Router(8).find(swarm.values(), known)
        except NoRoute:
            with pytest.raises(NoRoute):
                router.find(swarm.values(), known)
            continue
        assert router.find(swarm.values(), known) == fresh


def test_delays_are_estimated_anew_only_when_they_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    estimates = []

    def counted(*arguments: Any) -> Delays:
        estimates.append(arguments)
        return estimate_delays(*arguments)

    monkeypatch.setattr(chain, "estimate_delays", counted)
    router = Router(4)
    mine = {"a": 0.1, "b": 0.1}
    steps = [
        ([record("a"), record("b")], mine, 1),
        ([record("a", seq=2, queue_depth=3), record("b")], mine, 1),
        ([record("a"), record("b")], mine | {"a": 0.11}, 1),
        ([record("a"), record("b")], mine | {"a": 0.13}, 2),
        ([record("a"), record("b")], {"a": 0.13}, 3),
        ([record("a", rtts={"b": 0.1}), record("b")], {"a": 0.13}, 4),
        ([record("a", 0, 4, rtts={"b": 0.1}), record("b", 0, 3)], {"a": 0.13}, 5),
        ([record("a", rtts={"b": 0.1})], {"a": 0.13}, 6),
    ]
    for swarm, rtts, count in steps:
        route = router.find(swarm, Knowledge(rtts=rtts))
        assert len(estimates) == count
        assert route.hops[0] == Hop("a", 0, 4, rtts["a"]) or "b" in rtts
        used = rtts[route.hops[0].peer_id]
        assert route.cost_s >= used  # with the latest round trip, whatever was estimated before


def test_a_sender_that_left_the_view_is_taken_for_far() -> None:
    known = Knowledge(rtts={"a": 0.1})
    near = Router(4).find([record("a")], known)
    far = Router(4).find([record("a")], known, gap=Gap(0, 4, sender="gone"))
    assert far.cost_s == pytest.approx(near.cost_s - 0.1 / 2 + UNKNOWN_RTT_S / 2)


def test_a_large_swarm_is_narrowed_to_the_near_and_fast_ones_of_every_block() -> None:
    rng = random.Random(5)
    swarm = [
        record(f"p{i:04}", start, start + 8, decode_tps=rng.uniform(1, 100))
        for i in range(3000)
        for start in [rng.randrange(73)]
    ]
    swarm.append(record("only", 79, 80, decode_tps=0.01, kv_tokens_free=1))
    rtts = {f"p{i:04}": 0.001 * (i % 300 + 1) for i in range(3000)}
    chosen = shortlist(swarm, 80, rtts)
    assert MAX_CANDIDATES / 2 <= len(chosen) <= 2 * MAX_CANDIDATES
    assert chosen == sorted(chosen, key=lambda a: a.peer_id)
    assert {b for a in chosen for b in range(a.start, a.end)} == set(range(80))
    near = sum(rtts.get(a.peer_id, 1.0) for a in chosen) / len(chosen)
    assert near < sum(rtts.values()) / len(rtts) / 2
    assert shortlist(swarm[:MAX_CANDIDATES], 80, rtts) == swarm[:MAX_CANDIDATES]


NUM_BLOCKS = 5
spans = st.tuples(st.integers(0, NUM_BLOCKS), st.integers(0, NUM_BLOCKS)).filter(
    lambda s: s[0] < s[1]
)


def cheapest_by_trying_everything(
    swarm: list[Announcement], own: dict[str, float], between: dict[frozenset[str], float]
) -> float | None:
    found = []

    def extend(block: int, last: str, used: frozenset[str], cost_s: float) -> None:
        if block == NUM_BLOCKS:
            found.append(cost_s + own[last] / 2)
        for a in swarm:
            if a.start <= block < a.end and a.peer_id not in used:
                rtt_s = between[frozenset((last, a.peer_id))] if last else own[a.peer_id]
                for end in range(block + 1, a.end + 1):
                    work_s = (end - block) / (a.decode_tps * (a.end - a.start))
                    work_s *= 1 + QUEUE_SHARE * a.queue_depth
                    spent_s = cost_s + rtt_s / 2 + VISIT_S + work_s
                    extend(end, a.peer_id, used | {a.peer_id}, spent_s)

    extend(0, "", frozenset(), 0.0)
    return min(found, default=None)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), taken=st.lists(spans, max_size=5))
def test_equal_to_trying_every_chain(data: st.DataObject, taken: list[tuple[int, int]]) -> None:
    times = st.sampled_from([0.001, 0.01, 0.05, 0.3])
    names = [f"p{i}" for i in range(len(taken))]
    own = {name: data.draw(times) for name in names}
    between = {frozenset(pair): data.draw(times) for pair in itertools.combinations(names, 2)}
    swarm = [
        record(
            name,
            *span,
            decode_tps=data.draw(st.sampled_from([5.0, 8.0, 20.0])) / (span[1] - span[0]),
            queue_depth=data.draw(st.integers(0, 2)),
            rtts={other: between[frozenset((name, other))] for other in names if other != name},
        )
        for name, span in zip(names, taken, strict=True)
    ]
    expected = cheapest_by_trying_everything(swarm, own, between)
    if expected is None:
        with pytest.raises(NoRoute):
            find(swarm, NUM_BLOCKS)
        return
    route = find(swarm, NUM_BLOCKS, known=Knowledge(rtts=own))
    assert route.cost_s == pytest.approx(expected, rel=1e-9)
    assert [hop.start for hop in route.hops] == [0, *(hop.end for hop in route.hops[:-1])]
    assert route.hops[-1].end == NUM_BLOCKS
    by_id = {a.peer_id: a for a in swarm}
    for hop in route.hops:
        assert by_id[hop.peer_id].start <= hop.start < hop.end <= by_id[hop.peer_id].end


@pytest.mark.parametrize("field", ["decode_tps", "forward_tps", "bandwidth"])
@pytest.mark.parametrize("workload", [Workload(), Workload(bulk_tokens=10, token_bytes=10)])
def test_the_least_rate_that_a_record_may_have_keeps_nobody_from_a_chain(
    field: str, workload: Workload
) -> None:
    with pytest.raises(InvalidAnnouncement):
        record("liar", 0, 4, **{field: 5e-324})  # its inverse is infinite, and 0 times that NaN
    swarm = [record("a", 0, 4), record("liar", 0, 4, **{field: MIN_RATE})]
    assert [hop.peer_id for hop in Router(4).find(swarm, Knowledge(), workload).hops] == ["a"]
