"""Fine-tuning held locally: transformers' model with LoRA and prompts hooked in, and our passes.

The hooks know nothing of petalnode's layers: they are PEFT's formula on transformers' modules.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from petalnode.models.checkpoint import open_checkpoint
from petalnode.models.config import ModelConfig
from petalnode.models.loading import load_block_span
from petalnode.models.span import Span
from petalnode.models.training import BackwardPass, ForwardPass
from petalnode.models.tuning.lora import new_lora
from petalnode.models.tuning.peft_config import modules_of
from petalnode.models.tuning.tuning import BlockTuning, Tuning

LENGTHS = (17, 1, 30, 2)
TOLERANCE = 1e-4


def noise(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Return normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def some_tuning(config: ModelConfig, *, seed: int = 1, tokens: int = 5) -> Tuning:
    """Return matrices for every site and a prompt for every block, neither of them zero."""
    generator = torch.Generator().manual_seed(seed)
    lora = new_lora(config, rank=3, alpha=4, targets=["all-linear"], rng=generator)
    lora = lora.map(lambda tensor: torch.randn(tensor.shape, generator=generator) * 0.1)
    prompts = {i: noise(tokens, config.hidden_size, seed=seed + i) for i in lora.blocks}
    return Tuning({i: BlockTuning(one.lora, prompts[i]) for i, one in lora.blocks.items()})


def load_spans(path: Path, cuts: Sequence[int] = (), **options: Any) -> list[Span]:
    """Return the spans of a model cut before the blocks `cuts`."""
    checkpoint = open_checkpoint(str(path))
    bounds = [0, *cuts, checkpoint.config.num_blocks]
    return [load_block_span(checkpoint, a, b, **options) for a, b in pairwise(bounds)]


def forward(spans: Sequence[Span], x: Tensor, lengths: Sequence[int], tuning: Tuning) -> Tensor:
    """Return what the spans make of x, by forward passes."""
    for span in spans:
        one = ForwardPass(span, span.start, span.end, x, lengths, tuning)
        finish(one)
        x = one.output
    return x


def backward(
    spans: Sequence[Span], x: Tensor, lengths: Sequence[int], tuning: Tuning, grad: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the gradients of x and of the tuning, by passes through one span after the other."""
    inputs, grads = [x], dict[str, Tensor]()
    for span in spans[:-1]:
        inputs.append(forward([span], inputs[-1], lengths, tuning))
    for span, one in zip(reversed(spans), reversed(inputs), strict=True):
        back = backward_pass(span, span.start, span.end, one, lengths, tuning, grad)
        finish(back)
        grad, grads = back.grad, grads | back.tuning_grads
    return grad, grads


def backward_pass(
    span: Span,
    start: int,
    end: int,
    x: Tensor,
    lengths: Sequence[int],
    tuning: Tuning,
    grad: Tensor,
) -> BackwardPass:
    """Return the pass back through some blocks, of which none was computed yet."""
    return BackwardPass(ForwardPass(span, start, end, x, lengths, tuning, keep=True), grad)


def finish(one: ForwardPass | BackwardPass) -> None:
    """Take all steps that are left."""
    while one.steps_left:
        one.step()


def local(
    model: Any, config: ModelConfig, x: Tensor, lengths: Sequence[int], tuning: Tuning, grad: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the output of transformers' blocks, and the gradients of x and of the tuning."""
    model.requires_grad_(False)
    leaves = tuning.leaves(torch.device("cpu"))
    x = x.detach().requires_grad_()
    with hooked(model, config, leaves), torch.enable_grad():
        y = torch.cat([_through_blocks(model, config, row) for row in x.split(list(lengths))])
    wanted = [x, *(leaf for _, leaf in leaves.named())]
    grads = torch.autograd.grad(y, wanted, grad.to(y.dtype), materialize_grads=True)
    names = [name for name, _ in leaves.named()]
    return y.detach(), grads[0], dict(zip(names, grads[1:], strict=True))


def _through_blocks(model: Any, config: ModelConfig, row: Tensor) -> Tensor:
    """Return the last block's output [n, H] where the first one's input is `row` [n, H]."""
    blocks, seen = _blocks(model, config), list[Tensor]()

    def put(module: Any, args: Any, kwargs: Any) -> Any:
        return _with_hidden(args, kwargs, row.unsqueeze(0))

    def take(module: Any, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    # The first block's other hooks come after this one, so that prompts are added to `row`.
    first = blocks[0].register_forward_pre_hook(put, with_kwargs=True, prepend=True)
    last = blocks[-1].register_forward_hook(take)
    with ExitStack() as stack:
        stack.callback(first.remove)
        stack.callback(last.remove)
        model(input_ids=torch.zeros((1, len(row)), dtype=torch.int64), use_cache=False)
    return seen[0].squeeze(0)


def _blocks(model: Any, config: ModelConfig) -> Any:
    return model.get_submodule(modules_of(config).removesuffix(".{}."))


def _with_hidden(args: Any, kwargs: Any, hidden: Tensor) -> Any:
    if args:
        return (hidden, *args[1:]), kwargs
    return args, kwargs | {"hidden_states": hidden}


@contextmanager
def hooked(model: Any, config: ModelConfig, tuning: Tuning) -> Iterator[None]:
    """Add a tuning to transformers' model."""
    with ExitStack() as stack:
        for index, block in tuning.blocks.items():
            module = _blocks(model, config)[index]
            for site, pair in block.lora.items():

                def add(module: Any, args: Any, output: Tensor, pair: Any = pair) -> Tensor:
                    wide = args[0].to(pair.a.dtype) @ pair.a.T @ pair.b.T * pair.scale
                    return (output + wide).to(output.dtype)

                stack.callback(module.get_submodule(site).register_forward_hook(add).remove)
            if block.prompt is not None:

                def prompt(module: Any, args: Any, kwargs: Any, p: Tensor = block.prompt) -> Any:
                    hidden = args[0] if args else kwargs["hidden_states"]
                    n = min(len(p), hidden.shape[1])
                    front = (hidden[:, :n] + p[:n]).to(hidden.dtype)
                    return _with_hidden(args, kwargs, torch.cat((front, hidden[:, n:]), 1))

                hook = module.register_forward_pre_hook(prompt, with_kwargs=True)
                stack.callback(hook.remove)
        yield


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Return the relative 2-norm of the difference."""
    assert float(theirs.norm()) > 0, "a gradient of nothing shows nothing"
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def worst_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest relative error of a gradient; both must have the same."""
    assert ours.keys() == theirs.keys()
    assert all(one.dtype == torch.float32 for one in ours.values())
    return max(relative_error(ours[name], theirs[name]) for name in theirs)


def weights(span: Span) -> list[torch.Tensor]:
    """Return every tensor that a span's blocks hold."""
    found: dict[int, torch.Tensor] = {}
    seen: set[int] = set()

    def walk(thing: Any) -> None:
        if isinstance(thing, torch.Tensor):
            found[id(thing)] = thing
        elif id(thing) not in seen:
            seen.add(id(thing))
            if isinstance(thing, list | tuple):
                parts: Any = thing
            elif isinstance(thing, dict):
                parts = thing.values()
            else:
                parts = [*vars(thing).values()] if hasattr(thing, "__dict__") else []
                parts += [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
            for part in parts:
                walk(part)

    walk([span.loaded(index) for index in range(span.start, span.end)])
    assert sum(one.nbytes for one in found.values()) >= span.param_bytes
    return list(found.values())
