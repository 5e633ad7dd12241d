"""What interrupts do to ``petalnode run``, and what ``generate`` tells of its node."""

import signal
from types import SimpleNamespace

import pytest
import trio

from petalnode import node
from petalnode.cli import generate, run
from petalnode.cli.arguments import parse_arguments
from petalnode.errors import UsageError
from petalnode.models.checkpoint import open_checkpoint


@pytest.mark.parametrize(("serves", "signals"), [(False, 1), (True, 2)])
async def test_after_the_last_word_a_signal_kills(serves, signals, monkeypatch):
    """A thread that waits for a hub that does not answer must not hold the process."""
    restored = []
    # Not the module's own function: trio gives its handler back with it.
    fake = SimpleNamespace(signal=lambda *one: restored.append(one), SIG_DFL=signal.SIG_DFL)
    monkeypatch.setattr(run, "signal", fake)
    serving, drain, scope = trio.Event(), trio.Event(), trio.CancelScope()
    if serves:
        serving.set()
    sent, received = trio.open_memory_channel(8)
    for _ in range(signals):
        sent.send_nowait(signal.SIGINT)
    with trio.fail_after(1):
        await run.watch_signals(received, serving, drain, scope)
    assert drain.is_set() == serves
    assert scope.cancel_called
    assert restored == [(one, signal.SIG_DFL) for one in (signal.SIGINT, signal.SIGTERM)]


async def test_generate_tells_what_its_node_does(monkeypatch):
    """Its node downloads the client's part: nobody shall wait for that in silence."""
    told = []

    def open_node(checkpoint, options, report):
        told.append(report)
        raise UsageError("Far enough.")

    monkeypatch.setattr(node, "open_node", open_node)
    arguments = parse_arguments(["generate", "demo", "a"], {})
    with pytest.raises(UsageError):
        await generate.generate(open_checkpoint("demo"), arguments, print)
    assert told == [print]
