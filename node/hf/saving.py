"""What was trained, as files: an adapter's (PEFT's where PEFT has such), and local modules'."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_NAME

from petalnode.errors import UsageError
from petalnode.hf.local import unfreeze
from petalnode.models.tuning.peft_files import (
    Adapter,
    adapter_files,
    load_adapter,
    save_adapter,
)
from petalnode.training.modules import TrainedParameters

if TYPE_CHECKING:
    from petalnode.hf.model import RemoteModel

LOCAL_FILE = "local_modules.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


def save_trained(model: RemoteModel, directory: Path, *, for_trainer: bool = False) -> None:
    """Write what a model trains, ``for_trainer`` also as the one file that ``Trainer`` goes on
    from. Raises ``UsageError`` where that is nothing."""
    every = {
        name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()
    }
    own = {name: tensor for name, tensor in every.items() if not name.startswith("trained.")}
    if not own and model.trained is None:
        raise UsageError("Nothing is trained here.", "Enable an adapter or unfreeze a module.")
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file.", "Name a directory, which may be a new one.")
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint = model.node.value.checkpoint
    if model.trained is not None:
        prompt = model.trained.prompt
        adapter = Adapter(model.trained.tuning(), None if prompt is None else prompt.detach().cpu())
        save_adapter(directory, adapter, checkpoint.config, checkpoint.name)
    if own:
        save_file(own, directory / LOCAL_FILE)
    if for_trainer:
        save_file(every, directory / SAFE_WEIGHTS_NAME)


def load_trained(model: RemoteModel, place: str | Path) -> None:
    """Take what a directory has, or a hub repo with an adapter.

    Raises ``UsageError`` for what is not this model's, ``ModelError`` for what is not there.
    """
    directory = Path(place) if Path(place).is_dir() else adapter_files(str(place))
    adapter, local = directory / ADAPTER_CONFIG, directory / LOCAL_FILE
    if not adapter.is_file() and not local.is_file():
        raise UsageError(
            f"{directory} has neither {ADAPTER_CONFIG} nor {LOCAL_FILE}.",
            "Give a directory that save_pretrained, petalnode tune or peft wrote.",
        )
    own = _read_local(model, local) if local.is_file() else []
    if adapter.is_file():
        loaded = load_adapter(directory, model.node.value.checkpoint.config)
        model.enable(TrainedParameters(loaded.tuning, loaded.prompt))
    for module, name, tensor in own:
        if name in module._buffers:
            unfreeze(module)
        module.get_parameter(name).data.copy_(tensor)


def _read_local(model: nn.Module, path: Path) -> list[tuple[nn.Module, str, Tensor]]:
    """The tensors in a file, and the modules of which they are parameters, or are to be."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UsageError(f"{path} is damaged: {error}.", "Write it again.") from None
    found, modules = [], dict(model.named_modules())
    for name, tensor in tensors.items():
        where, _, last = name.rpartition(".")
        module = modules.get(where)
        own = {} if module is None else module._parameters | module._buffers
        known = own.get(last)
        if module is None or known is None or known.shape != tensor.shape:
            raise UsageError(
                f"{path} has {name!r} of shape {tuple(tensor.shape)}, which is not this model's.",
                "Load it into the class and model that it was saved from.",
            )
        found.append((module, last, tensor))
    return found
