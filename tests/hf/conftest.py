"""Tiny checkpoints of two families, each as transformers has it and as a swarm serves it."""

from dataclasses import dataclass
from typing import Any

import pytest

from ..models.reference import load_reference
from ..models.shapes import SHAPES
from .swarm_node import model_on, open_swarm_node

SHAPE = {
    "llama": {"eos_token_id": None},
    "bloom": SHAPES["bloom"]["four heads"],
    "opt": SHAPES["opt"]["350M: norms last, projected embeddings"],
    "gemma2": next(iter(SHAPES["gemma2"].values())),
}


@dataclass
class Both:
    """The same checkpoint twice. ``model`` is made anew for each test; the node is shared."""

    path: Any
    node: Any
    reference: Any
    model: Any


@pytest.fixture(scope="session")
def nodes(tiny_checkpoint):
    """Return a function of a family to (path, open node, transformers' model)."""
    made = {}

    def get(family):
        if family not in made:
            shape = {} if family == "llama" else {"family": family}
            path = tiny_checkpoint(**shape, **SHAPE[family])
            made[family] = (path, open_swarm_node(path), load_reference(path))
        return made[family]

    yield get
    for _, node, _ in made.values():
        node.close()


@pytest.fixture(params=["llama", "bloom"])
def both(nodes, request):
    path, node, reference = nodes(request.param)
    reference.zero_grad()
    reference.requires_grad_(True)
    return Both(path, node, reference, model_on(node))


@pytest.fixture(params=["llama", "bloom", "opt", "gemma2"])
def each(nodes, request):
    path, node, reference = nodes(request.param)
    reference.zero_grad()
    reference.requires_grad_(True)
    return Both(path, node, reference, model_on(node))
