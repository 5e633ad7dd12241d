"""Train LoRA matrices through a swarm in a loop of your own; two serving nodes in this process too.

    python examples/tune_lora.py [DIR]

The matrices, the optimizer and the loss are here; the nodes compute what they are sent. DIR gets
the files that ``peft`` loads, and ``petalnode generate --adapter``.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import trio

from petalnode import Node, NodeOptions, open_node
from petalnode.models.tuning.peft_files import Adapter, save_adapter
from petalnode.training.encoding import Encoder, Row
from petalnode.training.tuner import TuneOptions, Tuner, new_parameters

CITIES = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Peru": "Lima"}
OPTIONS = TuneOptions(
    method="lora", rank=4, targets=("q_proj", "v_proj", "down_proj"), steps=15, learning_rate=0.02
)


def examples(node: Node) -> list[Row]:
    """Prompts and completions as token ids; only the completions are learned."""
    checkpoint = node.checkpoint
    tokenizer = checkpoint.tokenizer()
    encoder = Encoder(checkpoint.config, tokenizer, checkpoint.chat_template)
    kind = ("prompt", "completion")
    return [
        encoder.encode(kind, {"prompt": f"capital_of({country!r}) == ", "completion": repr(city)})
        for country, city in CITIES.items()
    ]


async def train(client: Node, rows: Sequence[Row]) -> tuple[list[float], Adapter]:
    """Step after step; the losses, and what was trained."""
    async with client.open_training() as training:
        config, parts = client.checkpoint.config, await client.client_parts()
        parameters = new_parameters(OPTIONS, config, parts, rows)
        tuner = Tuner(training, parts, training.compute, OPTIONS, parameters)
        losses = []
        for step in range(OPTIONS.steps):
            result = await tuner.step(rows)
            print(f"step {step + 1}: loss {result.loss:.3f}")
            losses.append(result.loss)
    return losses, Adapter(parameters.tuning(), name="capitals")


async def main(directory: str = "") -> list[float]:
    """Found a swarm, train through it, save what was learned, and return the losses."""
    first = NodeOptions(host="127.0.0.1", blocks=(0, 4))
    async with open_node("demo", first) as founder:
        second = NodeOptions(host="127.0.0.1", blocks=(4, 8), join=(founder.invite,))
        async with (
            open_node("demo", second),
            open_node("demo", NodeOptions(join=(founder.invite,))) as client,
        ):
            losses, adapter = await train(client, examples(client))
            if directory:
                save_adapter(Path(directory), adapter, client.checkpoint.config, "demo")
    return losses


if __name__ == "__main__":
    for given in sys.argv[1:2]:
        Path(given).mkdir(parents=True, exist_ok=True)  # before the work, should it be refused
    trio.run(main, *sys.argv[1:2])
