"""A loop in a background thread: calls, errors, interrupts, and that nothing is left of it."""

import copy
import gc
import os
import pickle
import signal
import threading
from contextlib import asynccontextmanager

import pytest
import trio

from petalnode.blocking import open_blocking, open_held
from petalnode.errors import LocalProtocolError, ModelError, NoRoute, UsageError
from petalnode.options import NodeOptions
from petalnode.session.session import GenerateOptions


class Thing:
    """What is held: it notes what becomes of it."""

    def __init__(self, error=None):
        self.log = []
        self.crashed = trio.Event()
        self.error = error

    async def add(self, one, other):
        await trio.lowlevel.checkpoint()
        return one + other

    async def fail(self, error):
        await trio.lowlevel.checkpoint()
        raise error

    async def forever(self, then=lambda: None):
        then()
        try:
            await trio.sleep_forever()
        finally:
            self.log.append("cancelled")

    async def crash(self):
        self.crashed.set()
        await trio.sleep_forever()


@asynccontextmanager
async def a_thing(thing, before=None, after=None):
    async def crash_when_told():
        await thing.crashed.wait()
        raise thing.error

    if before is not None:
        raise before
    async with trio.open_nursery() as nursery:
        nursery.start_soon(crash_when_told)
        thing.log.append("open")
        yield thing
        nursery.cancel_scope.cancel()
    thing.log.append("closed")
    if after is not None:
        raise after


@pytest.fixture
def loops():
    """Return a function to the loops' threads that a test began, and that are still there."""
    before = threading.enumerate()

    def new():
        now = [thread for thread in threading.enumerate() if thread not in before]
        return [thread for thread in now if thread.name == "petalnode loop"]

    return new


def interrupt():
    """Ctrl-C, as the main thread gets it."""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def test_calls_give_what_they_return_and_no_thread_stays(loops):
    thing = Thing()
    with open_held(a_thing(thing)) as held:
        assert held.run(held.value.add, 1, 2) == 3
        assert len(loops()) == 1
    assert thing.log == ["open", "closed"]
    assert loops() == []
    held.close()


def test_errors_come_out_as_they_are_and_show_where():
    with open_held(a_thing(Thing())) as held:
        with pytest.raises(NoRoute, match="nobody") as caught:
            held.run(held.value.fail, NoRoute("There is nobody."))
        assert "fail" in [entry.name for entry in caught.traceback]
        with pytest.raises(ZeroDivisionError):
            held.run(held.value.fail, ExceptionGroup("", [ZeroDivisionError()]))
        assert held.run(held.value.add, 1, 1) == 2


def test_what_cannot_be_opened_says_why(loops):
    for error in (ModelError("There is none."), ZeroDivisionError("a bug")):
        with pytest.raises(type(error)):
            open_held(a_thing(Thing(), before=error))
    with open_held(a_thing(Thing())) as held:
        with pytest.raises(ModelError):
            held.hold(a_thing(Thing(), before=ModelError("There is none.")))
        assert held.run(held.value.add, 1, 1) == 2
    assert loops() == []


def test_ctrl_c_cancels_the_call_and_closes_all(loops):
    thing = Thing()
    with pytest.raises(KeyboardInterrupt), open_held(a_thing(thing)) as held:
        held.run(thing.forever, interrupt)
    assert thing.log == ["open", "cancelled", "closed"]
    assert loops() == []


def test_after_a_ctrl_c_that_was_caught_it_goes_on():
    thing = Thing()
    with open_held(a_thing(thing)) as held:
        with pytest.raises(KeyboardInterrupt):
            held.run(thing.forever, interrupt)
        assert thing.log == ["open", "cancelled"]
        assert held.run(thing.add, 1, 2) == 3


def test_ctrl_c_while_it_opens(loops):
    class Slow:
        async def __aenter__(self):
            interrupt()
            await trio.sleep_forever()

        async def __aexit__(self, *error):
            raise AssertionError("it was never open")

    with pytest.raises(KeyboardInterrupt):
        open_held(Slow())
    assert loops() == []
    with open_held(a_thing(Thing())) as held, pytest.raises(KeyboardInterrupt):
        held.hold(Slow())


def test_after_it_was_closed_every_call_says_so():
    with open_held(a_thing(Thing())) as held:
        pass
    with pytest.raises(UsageError, match="closed"):
        held.run(held.value.add, 1, 2)
    with pytest.raises(UsageError, match="closed"):
        held.hold(a_thing(Thing()))


def test_a_call_under_way_when_it_closes():
    thing, caught = Thing(), []
    held = open_held(a_thing(thing))
    begun = threading.Event()

    def call():
        with pytest.raises(UsageError, match="closed") as error:
            held.run(thing.forever, begun.set)
        caught.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    begun.wait()
    held.close()
    caller.join()
    assert len(caught) == 1
    assert thing.log == ["open", "cancelled", "closed"]


@pytest.mark.parametrize(
    ("error", "kind"), [(NoRoute("All left."), NoRoute), (KeyError("a bug"), LocalProtocolError)]
)
def test_a_crash_of_the_loop_comes_out_of_the_call_the_next_and_the_end(error, kind, loops):
    thing = Thing(error)
    held = open_held(a_thing(thing))
    for _ in range(2):
        with pytest.raises(kind, match=r"All left|KeyError"):
            held.run(thing.crash)
    with pytest.raises(kind):
        held.close()
    assert loops() == []


def test_what_the_body_raises_is_not_hidden_by_the_end():
    with pytest.raises(ZeroDivisionError), open_held(a_thing(Thing(), after=NoRoute("None."))):
        raise ZeroDivisionError
    with pytest.raises(NoRoute), open_held(a_thing(Thing(), after=NoRoute("None."))):
        pass


def test_contexts_within_it_end_with_it_and_before_it():
    outer, inner, released = Thing(), Thing(), Thing()
    with open_held(a_thing(outer)) as held:
        one = held.hold(a_thing(inner))
        with held.hold(a_thing(released)) as other:
            assert other.run(released.add, 1, 2) == 3
        assert released.log == ["open", "closed"]
        assert inner.log == ["open"]
    assert inner.log == ["open"]  # it was cancelled
    with pytest.raises(UsageError, match="closed"):
        one.run(inner.add, 1, 2)


def test_a_crash_within_costs_that_context_alone():
    outer, inner = Thing(), Thing(NoRoute("All left."))
    with open_held(a_thing(outer)) as held:
        one = held.hold(a_thing(inner))
        for _ in range(2):
            with pytest.raises(NoRoute):
                one.run(inner.crash)
        assert held.run(outer.add, 1, 2) == 3


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_what_is_open_cannot_be_copied(way):
    with open_held(a_thing(Thing())) as held, pytest.raises(UsageError, match="copied or pickled"):
        way(held)


def test_the_loop_cannot_wait_for_itself():
    with open_held(a_thing(Thing())) as held:

        async def nested():
            held.run(held.value.add, 1, 2)

        with pytest.raises(UsageError, match="wait for itself"):
            held.run(nested)


def test_many_threads_at_once():
    results = []
    with open_held(a_thing(Thing())) as held:

        def call(number):
            results.append(held.run(held.value.add, number, 0))

        callers = [threading.Thread(target=call, args=(number,)) for number in range(8)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert sorted(results) == list(range(8))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_in_a_forked_process_every_call_says_so():
    with open_held(a_thing(Thing())) as held:
        child = os.fork()
        if child == 0:
            try:
                held.run(held.value.add, 1, 2)
            except UsageError as error:
                os._exit(0 if "forked" in str(error) else 1)
            finally:
                os._exit(2)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert held.run(held.value.add, 1, 2) == 3


def test_release_by_whoever_collects_garbage():
    thing = Thing()
    with open_held(a_thing(Thing())) as held:
        inner = held.hold(a_thing(thing))

        class Owner:
            def __del__(self):
                inner.release()

        owner = Owner()
        del owner
        gc.collect()
        inner.leave()
        assert thing.log == ["open", "closed"]


async def test_it_does_not_mind_a_loop_around_it():
    with open_held(a_thing(Thing())) as held:
        assert held.run(held.value.add, 1, 2) == 3


def test_a_node_generates_and_its_errors_are_ours(tmp_path, monkeypatch, loops):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    options, events = NodeOptions(host="127.0.0.1", blocks=(0, 8)), []
    with open_blocking("demo", options, events.append) as node:
        tokens = list(node.generate("def fibonacci(n):", GenerateOptions(max_new_tokens=5)))
        assert [len(tokens), tokens[-1].text != ""] == [5, True]
        assert "route" in [event.event for event in events]
        beams = node.generate("import os", GenerateOptions(max_new_tokens=3, num_beams=2))
        assert next(beams).text
        beams.close()
        with pytest.raises(UsageError, match="context"):
            list(node.generate("word " * 5000))
    with pytest.raises(ModelError):
        open_blocking("there/is-no/such")
    assert loops() == []
