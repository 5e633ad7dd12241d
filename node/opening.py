"""Opening a chain for a session: over the best hops there are now, or others where these refuse."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, replace
from random import Random

from petalnode.errors import NoRoute, PeerError
from petalnode.events import Report
from petalnode.models.checkpoint import Checkpoint
from petalnode.p2p.host import Host
from petalnode.replacing import SessionReplacements, route_event
from petalnode.routing.chain import Gap, Hop
from petalnode.routing.costs import Workload
from petalnode.session.added import PLAIN, Added
from petalnode.session.chain import Chain, ChainSetup, open_chain
from petalnode.session.line import Opener
from petalnode.session.session import IdsSource
from petalnode.swarm import Swarm

MAX_CHAINS_TRIED = 4
"""Chains that a session tries when hops refuse or cannot be reached."""


@dataclass(frozen=True)
class Ask:
    """What a chain is opened for. ``gap``: the blocks, None being all of them."""

    workload: Workload
    report: Report
    source: IdsSource | None = None
    rows: int = 1
    gap: Gap | None = None
    added: Added = PLAIN


class ChainOpener:
    """Opens chains for one node's sessions. ``token_bytes``: hidden states of one token."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        swarm: Swarm,
        host: Host,
        streams: Opener,
        rng: Random,
        token_bytes: int,
    ) -> None:
        self._checkpoint, self._swarm, self._host = checkpoint, swarm, host
        self._streams, self._rng, self._token_bytes = streams, rng, token_bytes

    async def wait_served(self, ask: Ask) -> None:
        """Wait until somebody serves the blocks, with a reason and a deadline (``NoRoute``)."""
        await self._replacements(ask).find(self._gap(ask), {})

    async def open(self, stack: AsyncExitStack, ask: Ask) -> Chain:
        """A chain, closed with the stack. Raises ``NoRoute``, or what the last one tried failed
        with."""
        refused: dict[str, PeerError] = {}
        while True:
            try:
                workload = self._sized(ask.workload)
                hops = self._swarm.find_chain(workload, exclude=refused, gap=ask.gap)
            except NoRoute:
                if refused:  # there was a chain, but it said no: that is what to tell
                    raise next(reversed(refused.values())) from None
                # There was one a moment ago: a node drains, or moves. Wait for what comes of it.
                hops = tuple(await self._replacements(ask).find(self._gap(ask), {}))
            try:
                chain = await stack.enter_async_context(self._chain(hops, ask))
            except PeerError as error:
                self._swarm.note_failure(error)
                if error.peer_id in refused or len(refused) + 1 >= MAX_CHAINS_TRIED:
                    raise
                refused[error.peer_id] = error
                continue
            ask.report(route_event(hops))
            return chain

    def _chain(self, hops: tuple[Hop, ...], ask: Ask) -> AbstractAsyncContextManager[Chain]:
        for record in self._swarm.live():
            self._host.learn(record.peer_id, record.addrs)
        setup = ChainSetup(
            opener=self._streams,
            client=self._host.peer_id,
            fingerprint=self._checkpoint.fingerprint,
            hidden_size=self._checkpoint.config.hidden_size,
            rows=ask.rows,
            source=ask.source,
            replacements=self._replacements(ask),
            rng=self._rng,
            adapter=ask.added.served,
            tuning=ask.added.tuning,
        )
        return open_chain(setup, hops)

    def _replacements(self, ask: Ask) -> SessionReplacements:
        workload = self._sized(ask.workload)
        return SessionReplacements(self._swarm, workload, self._host.learn, ask.report)

    def _sized(self, workload: Workload) -> Workload:
        """The workload with the size of this model's hidden states."""
        return replace(workload, token_bytes=workload.token_bytes or self._token_bytes)

    def _gap(self, ask: Ask) -> Gap:
        return ask.gap or Gap(0, self._checkpoint.config.num_blocks)
