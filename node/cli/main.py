"""The entry point: parse, run the verb, and turn what went wrong into an exit code.

0 done · 1 failed, one sentence of cause and one of remedy on stderr · 2 wrong usage ·
130 interrupted. A bug of ours is the one thing that shows a traceback. What takes time to import is
imported within ``main``: an interrupt may come at once.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb."""
    try:
        return _main(argv)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BaseExceptionGroup as group:
        if group.subgroup(KeyboardInterrupt) is None:
            raise
        return INTERRUPTED  # what else is in it, came of that


def _main(argv: Sequence[str] | None) -> int:
    from petalnode.cli.arguments import parse_arguments
    from petalnode.errors import PetalnodeError

    arguments = parse_arguments(argv)
    try:
        return _run(arguments)
    except PetalnodeError as error:
        print(f"petalnode: {error.cause}", file=sys.stderr)
        if error.remedy:
            print(f"  {error.remedy}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read our output has read enough
        drop_stdout()
        return 1
    except OSError as error:
        drop_stdout()
        print(f"petalnode: The system refused: {error.strerror or error}.", file=sys.stderr)
        print("  Check the disk, the terminal and the limits of this process.", file=sys.stderr)
        return 1


def _run(arguments: Namespace) -> int:
    """Each verb is a module of its own, imported only when asked for."""
    import logging
    from importlib import import_module

    from petalnode.cli.arguments import refuse_unbuilt
    from petalnode.nurseries import plain_errors

    logging.basicConfig(level=logging.ERROR, format="%(name)s: %(message)s", stream=sys.stderr)
    with plain_errors():
        refuse_unbuilt(arguments)
        verb = import_module(f"petalnode.cli.{arguments.verb}")
        return int(verb.main(arguments))


def drop_stdout() -> None:
    """What is still buffered goes nowhere, instead of failing again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
