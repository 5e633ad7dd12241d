"""Small training runs for tests: examples, options, and what a run reports."""

from array import array

import pytest
import torch

from petalnode.events import TuningStep
from petalnode.models.loading import load_client
from petalnode.training.data import Dataset, Shuffle
from petalnode.training.encoding import Row
from petalnode.training.tuner import TuneOptions
from petalnode.training.tuning_run import TuneJob, tune

from .local_training import LocalTraining

OPTIONS = {"steps": 6, "batch_size": 3, "prompt_tokens": 4, "rank": 2, "learning_rate": 0.02}


def row(ids, first=1):
    return Row(array("i", ids), bytes(at >= first for at in range(len(ids))))


def examples(count=10, seed=5):
    """Rows of unequal lengths; the first tokens of some are not learned."""
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        ids = torch.randint(2, 384, (5 + 3 * (index % 4),), generator=rng).tolist()
        rows.append(row(ids, first=1 + index % 3))
    return Dataset(rows, 0, 0, f"digest {count} {seed}")


@pytest.fixture
def training(tiny_checkpoint):
    return LocalTraining(tiny_checkpoint())


def job_of(training, out=None, method="lora", **changes):
    options = {name: changes.pop(name) for name in list(changes) if name in OPTIONS}
    tuned = TuneOptions(method=method, **(OPTIONS | options))
    keywords = {"data": examples(), "evaluation": examples(4, 9), "save_every": 2, **changes}
    return TuneJob(training.checkpoint, tuned, out=out, **keywords)


def rows_of_batch(job, step):
    """What step ``step``, from 0 on, is to see."""
    shuffle = Shuffle(len(job.data.rows), job.options.seed)
    return [job.data.rows[index] for index in shuffle.batch(step, job.options.batch_size)]


class Log(list):
    """Events as they come."""

    def of(self, kind):
        return [event for event in self if isinstance(event, kind)]

    @property
    def losses(self):
        return [event.loss for event in self.of(TuningStep)]


async def run(job, training):
    log = Log()
    client = load_client(job.checkpoint)
    log.done = await tune(job, training, client, training.compute, log.append)
    return log
