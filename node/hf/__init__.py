"""The classes of transformers over a swarm: needs the ``hf`` extra.

from petalnode.hf import PetalnodeForCausalLM

model = PetalnodeForCausalLM.from_pretrained(MODEL, join="pn1:…")
"""

from importlib.util import find_spec

from petalnode.errors import UsageError

if find_spec("transformers") is None:
    raise UsageError(
        "petalnode.hf needs transformers, which is not installed.",
        "Install it with: pip install 'petalnode[hf]'.",
    )

from petalnode.hf.causal_lm import PetalnodeForCausalLM
from petalnode.hf.classification import PetalnodeForSequenceClassification
from petalnode.hf.local import freeze, unfreeze

__all__ = [
    "PetalnodeForCausalLM",
    "PetalnodeForSequenceClassification",
    "freeze",
    "unfreeze",
]
