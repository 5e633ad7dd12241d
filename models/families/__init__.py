"""The families of models that petalnode runs, each in a file of its own.

`docs/adding-a-model.md` shows how to add one. No torch is imported to read a configuration or to
know a layout.
"""

from collections.abc import Mapping
from typing import Any

from petalnode.errors import ModelError
from petalnode.models.config import ConfigReader, ModelConfig
from petalnode.models.families.bloom import BLOOM
from petalnode.models.families.falcon import FALCON
from petalnode.models.families.family import Family
from petalnode.models.families.gemma2 import GEMMA2
from petalnode.models.families.gemma3 import GEMMA3, GEMMA3_TEXT
from petalnode.models.families.gpt_oss import GPT_OSS
from petalnode.models.families.llama import LLAMA
from petalnode.models.families.mistral import MISTRAL
from petalnode.models.families.mixtral import MIXTRAL
from petalnode.models.families.opt import OPT
from petalnode.models.families.phi3 import PHI3
from petalnode.models.families.qwen import QWEN2, QWEN3
from petalnode.models.families.qwen3_moe import QWEN3_MOE

_ALL = (
    LLAMA,
    MIXTRAL,
    QWEN3_MOE,
    GPT_OSS,
    BLOOM,
    OPT,
    FALCON,
    PHI3,
    MISTRAL,
    QWEN2,
    QWEN3,
    GEMMA2,
    GEMMA3_TEXT,
    GEMMA3,
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
"""By `model_type`."""


def read_config(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Return the model of a parsed config.json, and generation_config.json for what ends a text.

    Raises `ModelError` that names the key for a family or feature that petalnode does not run, and
    for every value that is missing, of a wrong type or out of its limits.
    """
    name = config.get("model_type")
    if name is None:
        raise ModelError("config.json lacks model_type.", "Use a Hugging Face model checkpoint.")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise ModelError(
            f"The model family {str(name)[:60]!r} is not supported.",
            f"Supported families: {', '.join(sorted(FAMILIES))}.",
        )
    reader = ConfigReader(config, generation)
    reader.quantization(family.quantized)
    return family.read(reader)


def family_of(config: ModelConfig) -> Family:
    """Return the family of a configuration that `read_config` returned."""
    return FAMILIES[config.family]
