"""petalnode: language models far larger than your machine, on a swarm of everyone's machines.

``open_node`` and what belongs to it are loaded on first use, so that ``import petalnode`` takes no
time and loads neither torch nor libp2p.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from petalnode.errors import PetalnodeError

if TYPE_CHECKING:
    from petalnode.blocking import open_blocking
    from petalnode.models.sampling import SamplingConfig
    from petalnode.node import Node, NodeOptions, open_node
    from petalnode.session.session import GenerateOptions, Session, Token

__version__ = "0.1.0"

_HOMES = {
    "GenerateOptions": "petalnode.session.session",
    "Node": "petalnode.node",
    "NodeOptions": "petalnode.node",
    "SamplingConfig": "petalnode.models.sampling",
    "Session": "petalnode.session.session",
    "Token": "petalnode.session.session",
    "open_blocking": "petalnode.blocking",
    "open_node": "petalnode.node",
}

__all__ = [
    "GenerateOptions",
    "Node",
    "NodeOptions",
    "PetalnodeError",
    "SamplingConfig",
    "Session",
    "Token",
    "open_blocking",
    "open_node",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'petalnode' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
