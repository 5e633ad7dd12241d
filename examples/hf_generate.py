"""petalnode under transformers: its ``generate``, with its tokenizer, beams and samplers.

    python examples/hf_generate.py [INVITE]

Without an invite the node that is opened here holds the whole demo model itself.
"""

import sys

from petalnode import NodeOptions
from petalnode.hf import PetalnodeForCausalLM

PROMPTS = ["def read_file(path):", "import os\nimport"]


def main(invite: str = "") -> list[str]:
    """Continue two prompts of unequal length with beams, and return the texts."""
    options = NodeOptions(host="127.0.0.1", blocks=(0, 8))
    if invite:
        options = NodeOptions(join=(invite,))
    with PetalnodeForCausalLM.from_pretrained("demo", options=options) as model:
        tokenizer = model.load_tokenizer()
        tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
        inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
        outputs = model.generate(
            **inputs, max_new_tokens=24, num_beams=3, pad_token_id=tokenizer.pad_token_id
        )
        texts: list[str] = tokenizer.batch_decode(outputs, skip_special_tokens=True)
    return texts


if __name__ == "__main__":
    for text in main(*sys.argv[1:]):
        print(text, end="\n\n")
