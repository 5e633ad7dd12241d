"""What interrupts do to the verbs, and what ``generate`` tells of its node."""

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from petalnode import node
from petalnode.cli import demo, generate, run, signals, status
from petalnode.cli.arguments import parse_arguments
from petalnode.cli.main import main
from petalnode.errors import UsageError
from petalnode.models.checkpoint import open_checkpoint


@pytest.mark.parametrize(("serves", "count"), [(False, 1), (True, 2)])
async def test_after_the_last_word_a_signal_kills(serves, count, monkeypatch):
    """A thread that waits for a hub that does not answer must not hold the process."""
    restored = []
    # Not the module's own function: trio gives its handler back with it.
    fake = SimpleNamespace(**vars(signal) | {"signal": lambda *one: restored.append(one)})
    monkeypatch.setattr(signals, "signal", fake)
    serving, drain, scope = trio.Event(), trio.Event(), trio.CancelScope()
    if serves:
        serving.set()
    sent, received = trio.open_memory_channel(8)
    for _ in range(count):
        sent.send_nowait(signal.SIGINT)
    with trio.fail_after(60):
        await run.watch_signals(received, serving, drain, scope)
    assert drain.is_set() == serves
    assert scope.cancel_called
    assert restored == [(one, signal.SIG_DFL) for one in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("ignored", [False, True])
def test_a_background_job_is_not_asked_by_ctrl_c(ignored):
    """A shell starts it so that SIGINT is ignored: that of the job in front is not for it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        heeded = signals.asking_to_end()
    finally:
        signal.signal(signal.SIGINT, before)
    assert heeded == ((signal.SIGTERM,) if ignored else (signal.SIGINT, signal.SIGTERM))


class Interrupted:
    """Ctrl-C while a module is imported: put into ``sys.meta_path``."""

    def __init__(self, module):
        self.module = module

    def find_spec(self, name, *_):
        if name == self.module:
            raise KeyboardInterrupt


@pytest.mark.parametrize("module", ["arguments", "status"])
def test_an_interrupt_while_modules_are_imported_is_one(module, monkeypatch, capsys):
    name = f"petalnode.cli.{module}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(name), *sys.meta_path])
    assert main(["status", "--join", "x"]) == 130
    assert capsys.readouterr() == ("", "")


def test_what_is_imported_before_an_interrupt_is_heeded_is_little():
    code = "import petalnode.cli.main, sys; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"argparse", "logging", "trio", "torch", "libp2p", "petalnode.cli.arguments"}
    assert heavy.isdisjoint(out.stdout.split())


async def test_generate_tells_what_its_node_does(monkeypatch):
    """Its node downloads the client's part: nobody shall wait for that in silence."""
    told = []

    def open_node(checkpoint, options, report):
        told.append((report, options.cache_dir))
        raise UsageError("Far enough.")

    monkeypatch.setattr(node, "open_node", open_node)
    for flags, place in (([], None), (["--cache-dir", "x"], Path("x"))):
        arguments = parse_arguments(["generate", "demo", "a", *flags], {})
        with pytest.raises(UsageError):
            await generate.generate(open_checkpoint("demo"), arguments, print)
        assert told.pop() == (print, place)


def test_downloaded_adapters_go_where_it_is_said():
    for flags, place in (([], None), (["--cache-dir", "x"], Path("x"))):
        assert run.node_options(parse_arguments(["run", "demo", *flags], {})).cache_dir == place


def test_an_interrupt_that_comes_with_other_errors_is_one(monkeypatch, capsys):
    """Tasks that end because of it may fail in ways of their own."""

    def verb(arguments):
        raise BaseExceptionGroup("", [ExceptionGroup("", [ValueError(), OSError()]), *interrupts])

    monkeypatch.setattr(status, "main", verb)
    interrupts = [BaseExceptionGroup("", [KeyboardInterrupt(), UsageError("Ended.")])]
    assert main(["status"]) == 130
    assert capsys.readouterr() == ("", "")
    interrupts.clear()
    with pytest.raises(ExceptionGroup):
        main(["status"])


class Process:
    """A node of the demo that says nothing, until it is told to end."""

    def __init__(self, told):
        self.stdout, self._told, self._ended = self, told, trio.Event()

    def __aiter__(self):
        return self

    async def __anext__(self):
        await self._ended.wait()
        raise StopAsyncIteration

    async def wait(self):
        await self._ended.wait()
        await trio.testing.wait_all_tasks_blocked()  # it takes its time
        return -15

    def terminate(self):
        self._told("terminate")
        self._ended.set()

    def kill(self):
        self._told("kill")
        self._ended.set()


@pytest.fixture
def heeding_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("again", [False, True])
def test_an_interrupt_while_the_demo_starts_stops_its_nodes(
    again, heeding_ctrl_c, monkeypatch, tmp_path
):
    """How they end then is no error, and another interrupt leaves none of them behind."""
    told = []

    def tell(what):
        told.append(what)
        if again and what == "terminate":
            signal.raise_signal(signal.SIGINT)

    async def open_process(*_, **__):
        await trio.lowlevel.checkpoint()
        signal.raise_signal(signal.SIGINT)
        return Process(tell)

    async def start():
        async with demo.open_processes(tmp_path, print):
            pytest.fail("they are not ready")

    monkeypatch.setattr(trio.lowlevel, "open_process", open_process)
    with pytest.raises(KeyboardInterrupt):
        trio.run(start)
    assert told == ["terminate", "kill"]


def test_the_demo_takes_a_sigterm_as_ctrl_c(heeding_ctrl_c):
    told = []
    signal.signal(signal.SIGINT, lambda *given: told.append(given))
    demo.as_ctrl_c(signal.SIGTERM, None)
    assert told == [(signal.SIGINT, None)]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with pytest.raises(KeyboardInterrupt):
        demo.as_ctrl_c(signal.SIGTERM, None)
