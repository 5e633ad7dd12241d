"""What a generation asks of every hop before it begins, so that chains without room are not tried.

Only a filter: no cache is reserved. Hops charge what tokens really take, and a session that cannot
grow where it is moves on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from petalnode.routing.costs import Workload

if TYPE_CHECKING:
    from petalnode.session.generation import GenerateOptions

ROOM_AHEAD_TOKENS = 64
"""New tokens that there should be room for at the start, in each row."""


def demand(prompt_tokens: int, options: GenerateOptions, max_positions: int) -> Workload:
    """The context up to the last token that may come, and room for the prompt and some more.

    ``max_positions`` is the model's context in tokens, at which a generation ends in any case.
    """
    longest = min(prompt_tokens + options.max_new_tokens, max_positions)
    soon = min(prompt_tokens + ROOM_AHEAD_TOKENS, longest)
    return Workload(kv_tokens=options.num_beams * soon, context=longest)
