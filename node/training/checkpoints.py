"""A training run on disk: an adapter that others can use, and what the run needs to go on.

The directory has the adapter's two files and ``training_state.safetensors``: parameters, AdamW's
means, and as JSON in its header how far the run is and what it is a run of. A run draws random
numbers at its beginning alone and finds its data by the number of the step, so that no generator's
state is kept. All files are written aside and then renamed: whoever reads, also after a crash or on
a full disk, finds whole files. The state is the first that has its name, and what lies beside it
may be of the save before, or missing: a run that is taken up again writes the adapter anew.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from petalnode.errors import PetalnodeError, UsageError
from petalnode.models.config import ModelConfig
from petalnode.models.finite import is_finite
from petalnode.models.tuning.peft_files import CONFIG, WEIGHTS, Adapter, save_adapter

STATE = "training_state.safetensors"
ASIDE = ".saving"
"""The directory within the run's where files are written before they are renamed."""
KEY, FORMAT = "petalnode", 1
FLAGS = {
    "model": "model",
    "data": "--data",
    "learning_rate": "--lr",
    "targets": "--target",
}
"""What a setting is called on the command line, where that is not its own name."""
DIGESTS = ("model", "data")
"""Settings whose values say nothing to a person."""


@dataclass(frozen=True)
class Progress:
    """How far a run is. ``settings`` decide it: options, fingerprints of model and data.

    ``started``: the time of its beginning in ISO format, the date that chat templates see.
    ``loss``: of the last step.
    """

    settings: Mapping[str, Any]
    started: str
    step: int = 0
    loss: float | None = None


def save_run(
    directory: Path,
    progress: Progress,
    state: Mapping[str, Tensor],
    adapter: Adapter,
    config: ModelConfig,
    base_model: str,
) -> None:
    """Put the run's files in the place of those before. Raises ``PetalnodeError`` where the disk
    does not take them; then the ones before are untouched."""
    aside = directory / ASIDE
    said = json.dumps({"format": FORMAT, **asdict(progress)})
    with _unsaved_where_the_disk_refuses(directory):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            save_file(dict(state), aside / STATE, metadata={KEY: said})
            save_adapter(aside, adapter, config, base_model)
            for name in (STATE, WEIGHTS, CONFIG):
                _to_disk(aside / name)
            os.replace(aside / STATE, directory / STATE)
            _to_disk(directory)  # an adapter without its state could not be gone on with
            for name in (WEIGHTS, CONFIG):
                os.replace(aside / name, directory / name)
            _to_disk(directory)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def load_run(directory: Path) -> tuple[Progress, dict[str, Tensor]]:
    """How far the run in a directory is, and its tensors. Raises ``UsageError``."""
    path = directory / STATE
    if not path.is_file():
        raise UsageError(
            f"There is no training run to resume in {directory}.",
            "Name the --out directory of one, or leave --resume out to begin.",
        )
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {}).get(KEY, "null"))
            names = list(file.keys())
            floats = all(file.get_slice(name).get_dtype() == "F32" for name in names)
            tensors = {name: file.get_tensor(name) for name in names if floats}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise _damaged(path) from error
    progress = _progress(said)
    if progress is None or not floats or not all(_usable(*one) for one in tensors.items()):
        raise _damaged(path)
    return progress, tensors


def _progress(said: object) -> Progress | None:
    """What a state's header says, unless it is none of ours."""
    if not isinstance(said, dict) or said.pop("format", None) != FORMAT:
        return None
    try:
        progress = Progress(**said)
        datetime.fromisoformat(progress.started)
    except (TypeError, ValueError):
        return None
    step, loss, settings = progress.step, progress.loss, progress.settings
    if type(step) is not int or not isinstance(settings, dict):
        return None
    steps = settings.get("steps")
    if type(steps) is not int or not 0 <= step <= steps:
        return None
    number = loss is None or (type(loss) is float and math.isfinite(loss))
    return progress if number else None


def _usable(name: str, tensor: Tensor) -> bool:
    """Whether there is a way on from these numbers. The mean of squares has a root."""
    least = 0.0 if name.startswith("exp_avg_sq.") else -math.inf
    return is_finite(tensor) and bool((tensor >= least).all())


def check_same_run(directory: Path, progress: Progress, settings: Mapping[str, Any]) -> None:
    """Raise ``UsageError``, naming the first difference, unless the run has these settings."""
    for name, value in settings.items():
        was = progress.settings.get(name)
        if was == value:
            continue
        flag = FLAGS.get(name, "--" + name.replace("_", "-"))
        values = "" if name in DIGESTS else f": {str(was)[:100]}, not {value}"
        raise UsageError(
            f"The training run in {directory} was begun with another {flag}{values}.",
            "Resume it as it was begun, or begin another in a new directory.",
        )


def check_free(directory: Path) -> None:
    """Raise ``UsageError`` where a new run would overwrite somebody's adapter or run."""
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is not a directory.", "Choose another --out.")
    for name in (STATE, CONFIG, WEIGHTS):
        if (directory / name).exists():
            go_on = "Go on with that run by --resume, or choose" if name == STATE else "Choose"
            raise UsageError(f"{directory} has a {name} already.", f"{go_on} another --out.")


@contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Make the directory, and keep other runs out of it until the end of this one, or its death.

    The lock is the directory's own, so that it leaves no file; where the disk knows no locks,
    nobody is kept out. What was made here and is empty in the end goes again. Raises
    ``UsageError`` where another run is, or nothing can be saved.
    """
    places = (directory, *directory.parents)
    with _gone_if_empty([path for path in places if not os.path.exists(path)]):
        make_directory(directory)
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            _lock(descriptor, directory)
            yield
        finally:
            os.close(descriptor)


@contextmanager
def _gone_if_empty(made: Sequence[Path]) -> Iterator[None]:
    """Remove directories, each within the next, up to the first that holds something."""
    try:
        yield
    finally:
        with suppress(OSError):
            for directory in made:
                directory.rmdir()


def make_directory(directory: Path) -> None:
    """Make sure, before anything is trained, that a run can be saved there. Raises
    ``UsageError``."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UsageError(
            f"Nothing can be saved in {directory}: {error.strerror or error}.",
            "Choose another --out.",
        ) from error


def _lock(descriptor: int, directory: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"Another run is saving in {directory} now.",
            "Wait until it has ended, or choose another --out.",
        ) from None
    except OSError:
        pass  # some network disks have no such locks


@contextmanager
def _unsaved_where_the_disk_refuses(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _unsaved(directory, error) from error
    except UsageError as error:
        if isinstance(error.__cause__, OSError):
            raise _unsaved(directory, error.__cause__) from error
        raise


def _unsaved(directory: Path, error: Exception) -> PetalnodeError:
    why = getattr(error, "strerror", None) or str(error)
    said = f"The training run cannot be saved in {directory}: {why}"
    if not (directory / STATE).exists():
        return PetalnodeError(f"{said}.", "Make room, or begin in another directory (--out).")
    return PetalnodeError(
        f"{said}; what was saved before is still there.", "Make room, then go on by --resume."
    )


def _to_disk(path: Path) -> None:
    """Let a file's content be on the disk before its name is, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _damaged(path: Path) -> UsageError:
    return UsageError(
        f"{path} is not a training state that can be read.",
        "Begin again in a new directory; the adapter beside it may still be of use.",
    )
