"""Nurseries raise groups; callers want to catch ``PeerGone`` by name. This collapses them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from petalnode.errors import PetalnodeError


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise what a group holds, if that is one error, or several that are all ours (the first).

    Where one of several is a cancellation, the others came of it, and it alone goes on.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        leaves = list(leaf_errors(group))
        strange = [e for e in leaves if not isinstance(e, PetalnodeError | trio.Cancelled)]
        if strange and len(leaves) > 1:
            raise
        cancelled = [leaf for leaf in leaves if isinstance(leaf, trio.Cancelled)]
        first, *others = cancelled[:1] or leaves
        for other in others:
            first.add_note(f"also: {other}")
        raise first from None


def leaf_errors(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    """The exceptions in a group, through all its levels."""
    for member in group.exceptions:
        if isinstance(member, BaseExceptionGroup):
            yield from leaf_errors(member)
        else:
            yield member
