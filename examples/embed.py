"""petalnode inside your own trio program: two serving nodes and a client, all in one process.

    python examples/embed.py

Elsewhere each node runs on a machine of its own; only the invite travels between them.
"""

import trio

from petalnode import GenerateOptions, NodeOptions, SamplingConfig, open_node

PROMPT = "def read_file(path):\n    "


async def main() -> str:
    """Found a swarm, join it twice, generate, and return the text."""
    first = NodeOptions(host="127.0.0.1", blocks=(0, 4))
    async with open_node("demo", first) as founder:
        second = NodeOptions(host="127.0.0.1", blocks=(4, 8), join=(founder.invite,))
        async with (
            open_node("demo", second),
            open_node("demo", NodeOptions(join=(founder.invite,))) as client,
            client.open_session() as session,
        ):
            sampling = SamplingConfig(temperature=0.7, top_p=0.9, seed=1)
            options = GenerateOptions(max_new_tokens=40, sampling=sampling)
            generation = session.generate(PROMPT, options)
            async for token in generation:
                print(token.text, end="", flush=True)
            print()
            return generation.text


if __name__ == "__main__":
    trio.run(main)
