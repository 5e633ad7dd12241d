"""Beams, batches and hidden states from ``open_node``, over real connections on loopback."""

import pytest
import torch

from petalnode.errors import UsageError
from petalnode.node import open_node
from petalnode.session.session import GenerateOptions

from .test_beams import expected
from .test_chain import prompt
from .test_node import checkpoint, joining, open_nodes, own_data_home

__all__ = ["checkpoint", "own_data_home"]


async def test_a_client_searches_and_feeds_hidden_states(checkpoint):
    async with (
        open_nodes(checkpoint, (0, 2), (2, 4)) as (founder, _),
        open_node(checkpoint, joining(founder)) as client,
    ):
        async with client.open_session(rows=2) as session:
            session.tokenizer.eos_ids = frozenset()
            found = session.generate(prompt(9), GenerateOptions(8, num_beams=2))
            tokens = [token.id async for token in found]
            assert tokens == expected(checkpoint, prompt(9), 2, 8, ())
        hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
        async with client.open_hidden(1, 3) as part:
            whole = await part.forward(hidden)
            part.rollback(2)
            again = await part.forward(hidden[2:])
        torch.testing.assert_close(again, whole[2:], atol=1e-4, rtol=0)
        with pytest.raises(UsageError, match="rows"):
            await client.open_session(rows=65).__aenter__()
        with pytest.raises(UsageError, match="0:4"):
            await client.open_hidden(3, 5).__aenter__()
