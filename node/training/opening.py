"""Opens training sessions: hops are asked as they are needed, and all forget us on leaving."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from petalnode.events import Report
from petalnode.nurseries import plain_errors
from petalnode.training.crew import Crew
from petalnode.training.line import Opener, TrainLine, open_train_line
from petalnode.training.peers import Peers
from petalnode.training.protocol import OpenTraining
from petalnode.training.session import Desk, TrainingSession
from petalnode.training.spread import Offer, Stage


@asynccontextmanager
async def open_training(
    opener: Opener, fingerprint: str, peers: Peers, desk: Desk, span: Stage, report: Report
) -> AsyncIterator[TrainingSession]:
    """A training session over the blocks of ``span``. Its nursery has a task for every hop."""

    async def open_line(offer: Offer) -> TrainLine:
        start, end = max(offer.start, span[0]), min(offer.end, span[1])
        return await open_train_line(opener, offer.peer_id, OpenTraining(fingerprint, start, end))

    with plain_errors():
        async with trio.open_nursery() as nursery:
            crew = Crew(peers, span, open_line, nursery, report)
            try:
                yield TrainingSession(desk, span, crew)
            finally:
                crew.close()
                nursery.cancel_scope.cancel()
