"""Teach a model by a soft prompt through a swarm: two serving nodes and a client in one process.

    python examples/tune_prompt.py

Eight virtual tokens before the text are all that is trained, and they stay here. Afterwards the
directory is what ``petalnode generate demo PROMPT --adapter DIR`` takes.
"""

import json
import tempfile
from pathlib import Path

import trio

from petalnode import GenerateOptions, Node, NodeOptions, open_node
from petalnode.events import Event, TuningStep
from petalnode.training.tuner import TuneOptions
from petalnode.training.tuning_run import TuneJob, read_examples, tune

NAMES = ("apple", "bridge", "candle", "door", "engine", "forest", "garden", "house")
TEXTS = [f"Return the {name} of the given {other}." for name in NAMES for other in NAMES]
OPTIONS = TuneOptions(
    method="prompt", prompt_tokens=8, steps=40, batch_size=8, learning_rate=0.1, seed=1
)


def show(event: Event) -> None:
    """What happens, now and then."""
    if isinstance(event, TuningStep) and event.step % 10 == 0:
        print(f"step {event.step}: loss {event.loss:.2f}, {event.tokens_per_s:.0f} tokens/s")


async def train(client: Node, directory: Path) -> None:
    """Write the examples as JSON lines, and train on them."""
    data = directory / "examples.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    examples = read_examples(client.checkpoint, OPTIONS, data)
    job = TuneJob(client.checkpoint, OPTIONS, examples, out=directory / "prompt")
    async with client.open_training() as training:
        await tune(job, training, await client.client_parts(), training.compute, show)


async def complete(client: Node, adapter: str) -> str:
    """What the model goes on with, greedily."""
    async with client.open_session(adapter=adapter) as session:
        generation = session.generate("Return the ", GenerateOptions(max_new_tokens=12))
        async for _ in generation:
            pass
        return generation.text


async def main() -> tuple[str, str]:
    """Found a swarm, train through it, and return a completion from before and from after."""
    first = NodeOptions(host="127.0.0.1", blocks=(0, 4))
    async with open_node("demo", first) as founder:
        second = NodeOptions(host="127.0.0.1", blocks=(4, 8), join=(founder.invite,))
        async with (
            open_node("demo", second),
            open_node("demo", NodeOptions(join=(founder.invite,))) as client,
        ):
            before = await complete(client, "")
            with tempfile.TemporaryDirectory() as directory:
                await train(client, Path(directory))
                after = await complete(client, f"{directory}/prompt")
    print(f"before: Return the {before!r}")
    print(f"after:  Return the {after!r}")
    return before, after


if __name__ == "__main__":
    trio.run(main)
