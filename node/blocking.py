"""A node for an ordinary, synchronous script: its loop runs in a background thread.

    with open_blocking("demo", NodeOptions(join=("pn1:…",))) as node:
        for token in node.generate("def fibonacci(n):"):
            print(token.text, end="")

This is the one place where we start a thread of our own. A torch training loop, a notebook and an
asyncio program have no trio loop to lend, and a node cannot stand still between their calls: it
answers pings, reads gossip and feeds pipelines. So one thread runs one trio loop, as any node does,
and calls are carried into it and waited for.

A call blocks its thread until its result is there; exceptions come out as they were raised in the
loop. Ctrl-C while a call is waited for cancels that call, and then goes on as KeyboardInterrupt,
which leaves the ``with`` block and so closes the node. Several threads may call at once. A process
that was forked off has no such thread: there every call says so, instead of waiting for ever.
What trio itself keeps are idle worker threads, which end by themselves after ten seconds.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from types import TracebackType
from typing import Any, Generic, NoReturn, Self, SupportsIndex, TypeVar

import outcome
import trio

from petalnode.errors import LocalProtocolError, PetalnodeError, UsageError
from petalnode.events import Report, ignore
from petalnode.models.checkpoint import Checkpoint
from petalnode.node import Node, open_node
from petalnode.nurseries import plain_errors
from petalnode.options import NodeOptions
from petalnode.session.session import GenerateOptions, Session, Token

T = TypeVar("T")
U = TypeVar("U")

LOOK_S = 1.0
"""How often whoever waits for the loop looks whether its thread is still there."""


class Held(Generic[T]):
    """An async context that is open in the loop, and calls into it from other threads.

    ``value`` is what the context gave; use it inside calls alone. Calls run within the context:
    where it ends, they are cancelled and raise why it ended. Made by ``open_held`` or ``hold``.
    """

    value: T

    def __init__(
        self, thread: LoopThread, manager: AbstractAsyncContextManager[T], *, root: bool = False
    ) -> None:
        self._thread, self._manager, self._root = thread, manager, root
        self._nursery: trio.Nursery | None = None
        self._leaving = trio.Event()
        self._ended = threading.Event()
        self._outcome: outcome.Outcome[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise UsageError(
            "An open node, or what is open in it, cannot be copied or pickled.",
            "Copy or save what is trained, and open a node where it is needed.",
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.leave()
        if error is None:
            self._raise_failure()

    def close(self) -> None:
        """Leave the context; wait until it is left. Raises what it failed with; may be repeated."""
        self.__exit__(None, None, None)

    def leave(self) -> None:
        """Leave the context and wait until it is left, whatever it failed with."""
        self.release()
        self._thread.wait(self._ended)
        if self._root:
            self._thread.join()
            atexit.unregister(self.leave)

    def release(self) -> None:
        """Leave the context, some time soon. From any thread, also while it collects garbage."""
        self._thread.soon(self._leaving.set)

    def run(self, function: Callable[..., Awaitable[U]], *args: Any) -> U:
        """Await ``function(*args)`` in the loop and return its result, or raise what it raised.

        Raises ``UsageError`` once the context was left, and what ended it where something did.
        """
        self._thread.check_caller()
        call = _Call(partial(function, *args))
        try:
            if self._thread.soon(partial(self._begin, call)):
                self._thread.wait(call.done)
        except BaseException:  # Ctrl-C
            self._thread.soon(call.scope.cancel)
            self._thread.wait(call.done)
            raise
        if call.outcome is None or call.was_cancelled:
            self._thread.wait(self._ended)
            self._raise_failure()
            raise UsageError("The node, or its session, was closed.", "Open it again.")
        result: U = call.outcome.unwrap()
        return result

    def hold(self, manager: AbstractAsyncContextManager[U]) -> Held[U]:
        """Open another async context within this one; it is left with this one at the latest."""
        held = Held(self._thread, manager)
        self.run(self._start, held.keep)
        return held

    async def keep(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """In the loop: have the context open until it is to be left. What ends it is kept."""
        self._outcome = await outcome.acapture(self._keep_open, task_status)
        opened, self._nursery = self._nursery is not None, None
        self._ended.set()
        if not opened:
            self._outcome.unwrap()

    async def _keep_open(self, task_status: Any) -> None:
        with plain_errors():
            async with self._manager as self.value, trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await self._leaving.wait()
                nursery.cancel_scope.cancel()

    async def _start(self, task: Callable[..., Awaitable[None]]) -> None:
        assert self._nursery is not None
        await self._nursery.start(task)

    def _begin(self, call: _Call) -> None:
        if self._nursery is None or self._leaving.is_set():
            call.done.set()
        else:
            self._nursery.start_soon(call.go)

    def _raise_failure(self) -> None:
        """Raise what ended the context, if it was not left on purpose."""
        ended = self._outcome or self._thread.outcome
        error = ended.error if isinstance(ended, outcome.Error) else None
        if isinstance(error, PetalnodeError):
            raise error
        if error is not None and not isinstance(error, trio.Cancelled):
            raise LocalProtocolError(
                f"The node stopped: {type(error).__name__}: {error}."
            ) from error


class _Call:
    """One call on its way through the loop. ``outcome`` is None where it was not even begun."""

    def __init__(self, function: Callable[[], Awaitable[Any]]) -> None:
        self.done = threading.Event()
        self.scope = trio.CancelScope()
        self.outcome: outcome.Outcome[Any] | None = None
        self._function = function

    @property
    def was_cancelled(self) -> bool:
        return isinstance(self.outcome, outcome.Error) and isinstance(
            self.outcome.error, trio.Cancelled
        )

    async def go(self) -> None:
        self.outcome = await outcome.acapture(self._in_scope)
        self.done.set()

    async def _in_scope(self) -> Any:
        with plain_errors(), self.scope:
            return await self._function()


class LoopThread:
    """A thread that runs one trio loop for one ``Held``, and how others reach it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._pid = os.getpid()
        self._running, self._up = threading.Event(), threading.Event()
        self._scope = trio.CancelScope()
        self.outcome: outcome.Outcome[None] | None = None

    def start(self, root: Held[Any]) -> None:
        """Run the loop until the root's context is left. Raises what it cannot be opened for."""
        self._thread = threading.Thread(target=self._run, args=(root,), name="petalnode loop")
        self._thread.daemon = True  # else the interpreter waits for it before atexit closes it
        try:
            self._thread.start()
            self.wait(self._up)
        except BaseException:  # Ctrl-C
            self.wait(self._running)
            self.soon(self._scope.cancel)
            self.join()
            raise
        if isinstance(self.outcome, outcome.Error):
            self.outcome.unwrap()
        atexit.register(root.leave)

    def soon(self, function: Callable[[], object]) -> bool:
        """Have the loop call it; False where the loop is over, or in a forked process."""
        if self._token is None or os.getpid() != self._pid:
            return False
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(function)
            return True
        return False

    def wait(self, event: threading.Event) -> None:
        """Until something happened in the loop, or its thread is gone."""
        assert self._thread is not None
        while not event.wait(LOOK_S):
            if not self._thread.is_alive() or os.getpid() != self._pid:
                return

    def join(self) -> None:
        """Until the thread is gone."""
        if self._thread is not None and self._thread.is_alive() and os.getpid() == self._pid:
            self._thread.join()

    def check_caller(self) -> None:
        """Raise ``UsageError`` for a caller that would wait for ever."""
        if os.getpid() != self._pid:
            raise UsageError(
                "This process was forked off the one that runs the node.",
                "Call from that one, or start processes by spawn and open a node in each.",
            )
        if threading.current_thread() is self._thread:
            raise UsageError(
                "The node's own loop cannot wait for itself.",
                "Call from the script's thread; in a report, only look at what it is given.",
            )

    def _run(self, root: Held[Any]) -> None:
        self.outcome = outcome.capture(trio.run, self._main, root)
        self._running.set()
        self._up.set()

    async def _main(self, root: Held[Any]) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._running.set()
        with plain_errors(), self._scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(root.keep)
                self._up.set()


class BlockingNode(Held[Node]):
    """A node in a background thread. Made by ``open_blocking``; ``value`` is the ``Node``, and
    ``report`` is told what happens there, in that thread."""

    def __init__(
        self, thread: LoopThread, manager: AbstractAsyncContextManager[Node], report: Report
    ) -> None:
        super().__init__(thread, manager, root=True)
        self.report = report

    def generate(
        self, prompt: str, options: GenerateOptions | None = None
    ) -> Generator[Token, None, None]:
        """Generate after a prompt, token by token, over a session of its own.

        Ending the loop over it closes the session. Raises as ``Node.open_session`` and
        ``Session.generate`` do.
        """
        options = options or GenerateOptions()
        opened = self.value.open_session(self.report, rows=options.num_beams)
        with self.hold(opened) as session:
            tokens = session.run(_begin_generation, session.value, prompt, options)
            while (token := session.run(_next_token, tokens)) is not None:
                yield token


async def _begin_generation(
    session: Session, prompt: str, options: GenerateOptions
) -> AsyncIterator[Token]:
    return session.generate(prompt, options)


async def _next_token(tokens: AsyncIterator[Token]) -> Token | None:
    return await anext(tokens, None)


def open_held(manager: AbstractAsyncContextManager[T]) -> Held[T]:
    """Open any async context in a background thread of its own. Raises what opening it raises."""
    thread = LoopThread()
    held = Held(thread, manager, root=True)
    thread.start(held)
    return held


def open_blocking(
    model: str | Checkpoint, options: NodeOptions | None = None, report: Report = ignore
) -> BlockingNode:
    """Open a node in a background thread, as ``open_node`` does in a loop, and raise what it does.

    Use it in a ``with`` statement, or ``close`` it; else it is closed when the program ends.
    ``report`` is called in the background thread, also with what a call waits for. Its methods
    block; ``run`` and ``hold`` carry whatever else the ``Node`` in ``value`` can do.
    """
    thread = LoopThread()
    node = BlockingNode(thread, open_node(model, options, report), report)
    thread.start(node)
    return node
