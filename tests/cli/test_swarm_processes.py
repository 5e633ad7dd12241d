"""How real processes keep track of each other: a death in every view, blocks shared out."""

from contextlib import AsyncExitStack, ExitStack

import pytest
import trio

from petalnode.joining import parse_joins
from petalnode.survey import open_survey

from .test_processes import DEADLINE_S, environment, serving, status_of

__all__ = ["environment"]


def start_others(stack, environment, founder, *flags):
    """A node for each of ``flags``, all at once; the ``listening`` events, the founder's first."""
    listening = [founder.wait_for("listening")]
    join = ("--join", listening[0]["invite"])
    others = [stack.enter_context(serving(environment, *own, *join)) for own in flags]
    listening += [node.wait_for("listening") for node in others]
    for node in (founder, *others):
        node.wait_for("ready")
    return others, listening


async def until(survey, is_so):
    """Ask a contact again and again, as ``status`` does, until it shows a swarm that is so."""
    while not is_so(await survey.look()):
        pass


async def test_a_killed_node_leaves_the_view_of_every_other_one(environment):
    async with AsyncExitStack() as stack:
        founder = stack.enter_context(serving(environment, "--blocks", "0:2"))
        rest = [("--blocks", blocks) for blocks in ("2:4", "4:6", "6:8")]
        others, listening = start_others(stack, environment, founder, *rest)
        *left, dead = [one["peer_id"] for one in listening]
        surveys = [
            await stack.enter_async_context(open_survey(parse_joins([one["invite"]]), None))
            for one in listening[:-1]
        ]
        for count in (4, 3):
            with trio.fail_after(DEADLINE_S):
                async with trio.open_nursery() as nursery:
                    for survey in surveys:
                        nursery.start_soon(until, survey, lambda s, n=count: len(s.peers) == n)
            if count == 4:
                others[-1].process.kill()
        seen = status_of(environment, listening[0]["invite"])
        assert {peer["peer_id"] for peer in seen["peers"]} == set(left)
        assert dead not in left
        assert (seen["covered"], seen["copies"]) == (False, [1] * 6 + [0] * 2)


@pytest.mark.parametrize("sizes", [("3", "2", "4", "2")])
async def test_nodes_of_uneven_sizes_that_start_at_once_cover_the_model(environment, sizes):
    with ExitStack() as stack:
        founder = stack.enter_context(serving(environment, "--num-blocks", sizes[0]))
        rest = [("--num-blocks", size) for size in sizes[1:]]
        _, listening = start_others(stack, environment, founder, *rest)
        async with open_survey(parse_joins([listening[0]["invite"]]), None) as survey:
            with trio.fail_after(DEADLINE_S):
                await until(survey, lambda swarm: swarm.covered)
