"""The search itself, on bare arrays: equal to trying everything, whatever the numbers are."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petalnode.routing import bulk, search
from petalnode.routing.bulk import solve_bulk
from petalnode.routing.costs import Prices
from petalnode.routing.delays import Delays
from petalnode.routing.explain import cost_through
from petalnode.routing.graph import Graph
from petalnode.routing.search import Found, Problem, Visit, solve

NUM_BLOCKS = 5


def make_problem(rng: np.random.Generator, peers: int, *, limited: bool = True) -> Problem:
    """Costs of a few ticks, so that ties, detours through a third peer and returns are common."""
    start = rng.integers(0, NUM_BLOCKS, peers)
    end = np.array([rng.integers(s + 1, NUM_BLOCKS + 1) for s in start], dtype=np.intp)
    between = rng.choice([0.0, 1.0, 2.0, 9.0], (peers, peers))
    here = rng.choice([0.0, 1.0, 5.0], (2, peers))
    delays = Delays(between, here[0], {})
    enter = np.where(rng.random(peers) < 0.1, np.inf, rng.choice([0.0, 1.0], peers))
    cap = rng.integers(1, NUM_BLOCKS + 1, peers) if limited else end - start
    prices = Prices(enter, rng.choice([0.0, 1.0], peers), rng.choice([1.0, 2.0, 8.0], peers), cap)
    first, last = sorted(rng.choice(NUM_BLOCKS + 1, 2, replace=False))
    barred = {
        int(block): np.where(rng.random(peers) < 0.3, np.inf, 0.0)
        for block in rng.choice(NUM_BLOCKS, rng.integers(0, 3), replace=False)
    }
    graph = Graph(start, end, NUM_BLOCKS, delays)
    return Problem(graph, prices, int(first), int(last), here[0], here[1], barred)


def all_chains(problem: Problem) -> list[Found]:
    graph, prices = problem.graph, problem.prices
    found = []

    def extend(visits: tuple[Visit, ...], cost: float) -> None:
        block = visits[-1].end if visits else problem.first
        if block == problem.last:
            found.append(Found(cost + problem.receiver[visits[-1].peer], visits))
            return
        for peer in range(len(prices.enter)):
            if not graph.start[peer] <= block < graph.end[peer]:
                continue
            if any(visit.peer == peer for visit in visits):
                continue
            leg = graph.delays.between[visits[-1].peer, peer] if visits else problem.sender[peer]
            for blocks in range(1, int(prices.cap[peer]) + 1):
                end = block + blocks
                shut = any(
                    problem.barred[b][peer] for b in range(block, end) if b in problem.barred
                )
                if end <= min(graph.end[peer], problem.last) and not shut:
                    own = prices.enter[peer] + prices.leave[peer] + blocks * prices.block_s[peer]
                    extend((*visits, Visit(peer, block, end)), cost + leg + own)

    extend((), 0.0)
    return [chain for chain in found if np.isfinite(chain.cost_s)]


def stage_of(problem: Problem, chain: Found) -> float:
    return max(
        float(problem.prices.stage_s(visit.end - visit.start)[visit.peer]) for visit in chain.visits
    )


seeds = st.integers(0, 1 << 32)
thorough = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@thorough
@given(seed=seeds, peers=st.integers(0, 6), limited=st.booleans())
def test_no_chain_is_cheaper(seed: int, peers: int, limited: bool) -> None:
    problem = make_problem(np.random.default_rng(seed), peers, limited=limited)
    chains = all_chains(problem)
    found = solve(problem)
    if found is None:
        assert chains == []
        return
    costs = {chain.visits: chain.cost_s for chain in chains}
    assert found.cost_s == pytest.approx(costs[found.visits])
    assert found.cost_s == pytest.approx(min(costs.values()))


@thorough
@given(seed=seeds, peers=st.integers(0, 5))
def test_bulk_work_takes_no_less_time_in_any_chain(seed: int, peers: int) -> None:
    rng = np.random.default_rng(seed)
    problem = make_problem(rng, peers)
    tokens = int(rng.integers(1, 10))
    times = [chain.cost_s + tokens * stage_of(problem, chain) for chain in all_chains(problem)]
    found = solve_bulk(problem, tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bulk, "MAX_BRANCHES", 10_000)
        patch.setattr(bulk, "MAX_LIMITS", 10_000)
        near = solve_bulk(problem, tokens)
        patch.setattr(bulk, "STEP", 1e-6)
        exact = solve_bulk(problem, tokens)
    if found is None or near is None or exact is None:
        assert times == []
        return
    assert found.cost_s >= min(times) - 1e-9
    assert exact.cost_s == pytest.approx(min(times))
    assert min(times) - 1e-9 <= near.cost_s <= min(times) / (1 - bulk.STEP) + 1e-9


@thorough
@given(seed=seeds, peers=st.integers(1, 5))
def test_the_cost_through_a_peer_is_a_bound_and_its_least_is_the_best_walk(
    seed: int, peers: int
) -> None:
    problem = replace(make_problem(np.random.default_rng(seed), peers), barred={})
    costs = cost_through(problem)
    best = search.best_walk(problem)
    assert costs.min() == pytest.approx(best.cost_s if best else np.inf)
    chains = all_chains(problem)
    for peer in range(peers):
        through = [c.cost_s for c in chains if any(v.peer == peer for v in c.visits)]
        assert costs[peer] <= min(through, default=np.inf) + 1e-9
        if not any(returns(problem, c) for c in (best,) if c) and through:
            assert np.isfinite(costs[peer])


def returns(problem: Problem, found: Found) -> bool:
    return len({visit.peer for visit in found.visits}) < len(found.visits)


def slow_with_a_fast_one_inside() -> Problem:
    """The cheapest walk is 0, 1, 0: a session cannot do that."""
    delays = Delays(np.zeros((3, 3)), np.zeros(3), {})
    graph = Graph(np.array([0, 1, 0]), np.array([5, 4, 5]), 5, delays)
    prices = Prices(np.zeros(3), np.zeros(3), np.array([2.0, 1.0, 3.0]), np.array([5, 3, 5]))
    return Problem(graph, prices, 0, 5, np.zeros(3), np.zeros(3))


def test_a_peer_never_comes_twice() -> None:
    problem = slow_with_a_fast_one_inside()
    walk = search.best_walk(problem)
    assert walk is not None
    assert [visit.peer for visit in walk.visits] == [0, 1, 0]
    found = solve(problem)
    assert found is not None
    assert sorted(visit.peer for visit in found.visits) == [0, 1, 2]
    assert found.cost_s == 3 * 1.0 + 2.0 + 3.0


@pytest.mark.parametrize(("third", "order"), [((4, 5), [0, 1, 2]), ((0, 1), [2, 1, 0])])
def test_a_peer_keeps_the_one_visit_that_nobody_else_can_make(
    third: tuple[int, int], order: list[int]
) -> None:
    problem = slow_with_a_fast_one_inside()
    graph, prices = problem.graph, problem.prices
    start, end = np.array([0, 1, third[0]]), np.array([5, 4, third[1]])
    prices = replace(prices, cap=np.array([5, 3, 1]))
    found = solve(replace(problem, graph=Graph(start, end, 5, graph.delays), prices=prices))
    assert found is not None
    assert [visit.peer for visit in found.visits] == order
    assert found.cost_s == 8.0


def test_a_peer_that_would_come_twice_may_be_the_best_all_the_way() -> None:
    delays = Delays(np.zeros((2, 2)), np.zeros(2), {})
    graph = Graph(np.array([0, 1]), np.array([5, 4]), 5, delays)
    prices = Prices(np.zeros(2), np.zeros(2), np.array([2.0, 1.0]), np.array([5, 3]))
    found = solve(Problem(graph, prices, 0, 5, np.zeros(2), np.zeros(2)))
    assert found == Found(10.0, (Visit(0, 0, 5),))


def test_a_hard_case_ends_with_some_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "MAX_BRANCHES", 1)
    found = solve(slow_with_a_fast_one_inside())
    assert found is not None
    assert len({visit.peer for visit in found.visits}) == len(found.visits)
    assert found.visits[0].start == 0
    assert found.visits[-1].end == 5
    assert all(a.end == b.start for a, b in itertools.pairwise(found.visits))


def test_without_holders_there_is_no_chain() -> None:
    problem = make_problem(np.random.default_rng(0), 0)
    assert solve(problem) is None
    assert solve_bulk(problem, 9) is None
    shut = slow_with_a_fast_one_inside()
    shut = replace(shut, prices=replace(shut.prices, enter=np.full(3, np.inf)))
    assert solve(shut) is None
    assert solve_bulk(shut, 9) is None
