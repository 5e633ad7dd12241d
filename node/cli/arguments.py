"""The command line: verbs, flags, environment. Imports nothing heavy, so that --help is instant.

Every flag can also be set as ``PETALNODE_<FLAG>``. A flag on the command line wins, except that
repeatable ones (``PETALNODE_JOIN`` takes values separated by blanks) add up.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from petalnode.errors import UsageError

EXAMPLES = {
    "run": "petalnode run meta-llama/Llama-3.1-8B --num-blocks 8 --join pn1:…",
    "generate": "petalnode generate demo 'def fibonacci(n):' --join pn1:… --max-new-tokens 64",
    "status": "petalnode status --join pn1:…",
    "tune": "petalnode tune demo --data examples.jsonl --method lora --out adapter --join pn1:…",
    "demo": "petalnode demo",
}
JOIN_HELP = "invite (pn1:…) or multiaddr ending in /p2p/<peer id>; repeats"


def parse_arguments(
    argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None
) -> argparse.Namespace:
    """The verb and its flags; defaults come from ``environ`` (``os.environ`` if not given)."""
    argv = sys.argv[1:] if argv is None else argv
    values = os.environ if environ is None else environ
    arguments = build_parser(argv[0] if argv else "", values).parse_args(argv)
    blocks, num_blocks = getattr(arguments, "blocks", None), getattr(arguments, "num_blocks", None)
    if blocks is not None and num_blocks is not None:  # one is from the environment: it yields
        setattr(arguments, "blocks" if "PETALNODE_BLOCKS" in values else "num_blocks", None)
    return arguments


def build_parser(verb: str, environ: Mapping[str, str]) -> argparse.ArgumentParser:
    """The whole parser; ``environ`` gives defaults to the flags of ``verb`` alone."""
    parser = argparse.ArgumentParser(
        prog="petalnode",
        description="Run language models far larger than your machine on a swarm of machines.",
        epilog="Try `petalnode demo` first: a whole swarm on this machine.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _run(_verb(verbs, "run", "serve: join or found a swarm, hold a span of a model's blocks"))
    _generate(_verb(verbs, "generate", "stream a completion to stdout"))
    _status(_verb(verbs, "status", "who serves which blocks, health, coverage"))
    _tune(_verb(verbs, "tune", "train prompts or LoRA through the swarm"))
    _demo(_verb(verbs, "demo", "a whole swarm on this machine with the bundled model"))
    if verb in verbs.choices:
        _apply_environment(verbs.choices[verb], environ)
    return parser


def _verb(verbs: Any, name: str, summary: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="Example: " + EXAMPLES[name],
    )
    verb.add_argument("--json", action="store_true", help="JSON objects on stdout, one a line")
    return verb


def _run(verb: argparse.ArgumentParser) -> None:
    add = verb.add_argument
    add("model", metavar="MODEL", help="hub id (org/name[@revision]), directory, or demo")
    add("--join", action="append", default=[], metavar="JOIN", help=JOIN_HELP)
    span = verb.add_mutually_exclusive_group()
    span.add_argument("--blocks", type=block_range, metavar="A:B", help="serve exactly [A, B)")
    span.add_argument("--num-blocks", type=positive, metavar="N", help="how many blocks to hold")
    add("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda[:i] or mps")
    add("--dtype", default="auto", choices=DTYPES, help="of weights and computation")
    add("--quant", default="none", choices=QUANTS, help=QUANT_HELP)
    add("--kv-tokens", type=positive, metavar="N", help="tokens of attention cache to offer")
    add("--replay-log-tokens", type=positive, metavar="N", help=REPLAY_LOG_HELP)
    add("--host", default="0.0.0.0", help="listening address (default: all interfaces)")
    add("--port", type=port, default=0, help="listening port (default 0: any free one)")
    add("--announce", action="append", default=[], metavar="MULTIADDR", help=ANNOUNCE_HELP)
    add("--name", default="", help="shown to others in status")
    add("--identity", metavar="FILE", help="key file, made on first use")
    add("--adapter", action="append", default=[], metavar="ID", help=OFFER_HELP)
    add("--api-port", type=port, metavar="P", help="not built yet")
    _add_checkpoint(verb)


def _generate(verb: argparse.ArgumentParser) -> None:
    add = verb.add_argument
    add("model", metavar="MODEL", help="hub id (org/name[@revision]), directory, or demo")
    add("prompt", metavar="PROMPT", help="the text to go on from; - reads it from stdin")
    add("--join", action="append", default=[], metavar="JOIN", help=JOIN_HELP)
    add("--max-new-tokens", type=positive, default=128, metavar="N", help="default 128")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    add("--top-k", type=int, default=0, metavar="N", help="sample from the N likeliest; 0: all")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from this mass; 1: all")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="default 1: none")
    add("--seed", type=int, metavar="N", help="the same seed gives the same text")
    add("--num-beams", type=positive, default=1, metavar="N", help="beam search; 1: none")
    add("--adapter", action=Once, default="", metavar="ID", help=ADAPTER_HELP)
    add("--stop", action="append", default=[], metavar="TEXT", help="ends the text; repeats")
    add("--dtype", default="auto", choices=DTYPES, help="of embeddings and head")
    _add_checkpoint(verb)


def _status(verb: argparse.ArgumentParser) -> None:
    add = verb.add_argument
    add("model", metavar="MODEL", nargs="?", help="only if the swarm serves this model")
    add("--join", action="append", default=[], metavar="JOIN", help=JOIN_HELP)
    add("--watch", action="store_true", help="again every few seconds until interrupted")
    _add_checkpoint(verb)


def _tune(verb: argparse.ArgumentParser) -> None:
    add = verb.add_argument
    add("model", metavar="MODEL", help="hub id (org/name[@revision]), directory, or demo")
    add("--join", action="append", default=[], metavar="JOIN", help=JOIN_HELP)
    add("--data", required=True, metavar="FILE", help=DATA_HELP)
    add("--eval", metavar="FILE", help="JSON lines to take a validation loss of")
    add("--method", default="lora", choices=METHODS, help="what is trained (default lora)")
    add("--prompt-tokens", type=positive, metavar="N", help="of a prompt; default 16")
    add("--rank", type=positive, metavar="N", help="of LoRA's matrices; default 8")
    add("--target", action="append", default=[], metavar="NAME", help=TARGET_HELP)
    add("--steps", type=positive, default=100, metavar="N", help="of the optimizer; default 100")
    add("--batch-size", type=positive, default=8, metavar="N", help="examples a step; default 8")
    add("--lr", type=float, metavar="X", help="the highest learning rate (default: the method's)")
    add("--seed", type=int, default=0, metavar="N", help="the same seed gives the same run")
    add("--out", required=True, metavar="DIR", help="where the adapter goes, and the run's state")
    add("--resume", action="store_true", help="go on with the run that DIR has")
    add("--save-every", type=positive, default=25, metavar="N", help=SAVE_HELP)
    add("--dtype", default="auto", choices=DTYPES, help="of embeddings and head")
    _add_checkpoint(verb)


def _demo(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--prompt", default="", help="what to complete instead of the usual text")


def _add_checkpoint(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub repo")
    verb.add_argument("--cache-dir", metavar="DIR", help="where downloads go (default: HF_HOME)")


UNBUILT: Mapping[str, Any] = {"api_port": None}
OFFER_HELP = "LoRA files to offer by name: a directory or hub repo; repeats"
ADAPTER_HELP = "a directory or hub repo of your own, or the name of one that nodes offer"
METHODS = ("prompt", "deep-prompt", "lora")
DATA_HELP = (
    'JSON lines, each with "text", with "prompt" and "completion", or with "messages" for the '
    "model's chat template"
)
TARGET_HELP = (
    "layer to adapt by LoRA, such as q_proj, or all-linear; repeats (default: attention's queries "
    "and values)"
)
SAVE_HELP = "evaluate and save every N steps and at the end; default 25"
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTS = ("none", "int8", "nf4")
REPLAY_LOG_HELP = (
    "hidden states of sent tokens to remember, so that a session survives the loss of the next "
    "node (default: as many as --kv-tokens, at most 65536)"
)
QUANT_HELP = "of weights: int8 and nf4 take a quarter and an eighth of float32 (default none)"
ANNOUNCE_HELP = "an address that others should dial, if this machine cannot see it; repeats"


def refuse_unbuilt(arguments: argparse.Namespace) -> None:
    """Raise ``UsageError`` for a flag of the command-line contract that does nothing yet."""
    for name, harmless in UNBUILT.items():
        if getattr(arguments, name, harmless) != harmless:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} is not built yet.", "Leave it out.")


class Once(argparse.Action):
    """Keeps a value, and refuses another: for a flag that repeats elsewhere."""

    given = False

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if self.given:
            raise argparse.ArgumentError(self, "can be given only once here")
        self.given = True
        setattr(namespace, self.dest, values)


def block_range(text: str) -> tuple[int, int]:
    """``A:B`` with A < B."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a range of blocks such as 0:8")
    return int(first), int(last)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def port(text: str) -> int:
    """A TCP port, or 0."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def _apply_environment(verb: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    for action in verb._actions:
        if not action.option_strings or action.dest == "help":
            continue
        name = "PETALNODE_" + action.dest.upper()
        if name in environ:
            action.default = _environment_value(verb, action, name, environ[name])
            action.required = False


def _environment_value(
    verb: argparse.ArgumentParser, action: argparse.Action, name: str, text: str
) -> Any:
    if isinstance(action.default, list):
        return text.split()
    if isinstance(action.default, bool):
        return text.lower() not in ("", "0", "false", "no")
    convert: Callable[[str], Any] = action.type if callable(action.type) else str
    try:
        value = convert(text)
    except (ValueError, argparse.ArgumentTypeError) as error:
        verb.error(f"environment variable {name}: {error}")
    if action.choices is not None and value not in action.choices:
        verb.error(f"environment variable {name}: {text!r} is not one of {list(action.choices)}")
    return value
