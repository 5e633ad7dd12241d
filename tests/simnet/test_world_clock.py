"""Virtual time and the seeded scheduler; and that trio still has what the seeding rests on."""

import pytest
import trio
import trio._core._run as scheduler

from petalnode.errors import UsageError
from petalnode.simnet import clock
from petalnode.simnet.clock import run_virtual, seeded_scheduler
from petalnode.simnet.world import open_world


async def order_of_ten() -> list[int]:
    """In which order ten tasks ran that all became ready at once."""
    order: list[int] = []
    go = trio.Event()

    async def one(number: int) -> None:
        await go.wait()
        order.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(one, number)
        await trio.sleep(1)
        go.set()
    return order


def test_the_seed_alone_decides_the_order_of_tasks():
    """Fails when a new trio no longer obeys its private flag: then simulations are not repeatable,
    and simnet/clock.py needs another way."""
    runs = [run_virtual(order_of_ten, seed) for seed in (1, 1, 2, 3)]
    assert runs[0] == runs[1]
    assert len({tuple(run) for run in runs}) == 3
    assert sorted(runs[0]) == list(range(10))


def test_trio_is_left_as_it_was():
    before = scheduler._r.getstate(), scheduler._ALLOW_DETERMINISTIC_SCHEDULING
    with seeded_scheduler(5):
        assert scheduler._ALLOW_DETERMINISTIC_SCHEDULING is True
        scheduler._r.random()
    assert (scheduler._r.getstate(), scheduler._ALLOW_DETERMINISTIC_SCHEDULING) == before


@pytest.mark.parametrize("name", [clock.FLAG, clock.GENERATOR])
def test_a_trio_that_cannot_be_seeded_is_refused(monkeypatch, name):
    monkeypatch.delattr(scheduler, name)
    with pytest.raises(UsageError, match="cannot be seeded"), seeded_scheduler(1):
        pytest.fail("it went on unseeded")


def test_an_hour_passes_at_once():
    async def hour() -> float:
        started = trio.current_time()
        await trio.sleep(3600)
        return trio.current_time() - started

    assert run_virtual(hour) == 3600


async def test_a_world_in_real_time_is_refused():
    with pytest.raises(UsageError, match="virtual clock"):
        async with open_world(1, "demo"):
            pytest.fail("it opened")
