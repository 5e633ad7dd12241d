"""The entry point: parse, run the verb, and turn what went wrong into an exit code.

0 done · 1 failed, one sentence of cause and one of remedy on stderr · 2 wrong usage ·
130 interrupted. A bug of ours is the one thing that shows a traceback.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence

from petalnode.cli.arguments import build_parser, refuse_unbuilt
from petalnode.errors import PetalnodeError
from petalnode.nurseries import plain_errors

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Each is a module of its own, imported only when asked for."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.ERROR, format="%(name)s: %(message)s", stream=sys.stderr)
    verb = importlib.import_module(f"petalnode.cli.{arguments.verb}")
    try:
        with plain_errors():
            refuse_unbuilt(arguments)
            return int(verb.main(arguments))
    except PetalnodeError as error:
        print(f"petalnode: {error.cause}", file=sys.stderr)
        if error.remedy:
            print(f"  {error.remedy}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
