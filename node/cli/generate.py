"""``petalnode generate``: stream one completion through the swarm."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from petalnode.cli.output import SearchDone, end_progress, reporter
from petalnode.errors import UsageError
from petalnode.events import Done, Report, TokenEvent
from petalnode.joining import parse_joins
from petalnode.models.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from petalnode.session.generation import Completion

NOT_UTF8 = "The prompt is not UTF-8 text."


def main(arguments: Namespace) -> int:
    """Check what can be checked before torch is loaded, then generate."""
    if arguments.prompt == "-":
        arguments.prompt = read_stdin()
    check_text(arguments.prompt)
    if not arguments.join:
        raise UsageError(
            "There is no swarm to ask: no --join was given.",
            f"Start one with `petalnode run {arguments.model}` and pass the invite that it prints.",
        )
    parse_joins(arguments.join)
    checkpoint = open_checkpoint(
        arguments.model, revision=arguments.revision, cache_dir=arguments.cache_dir
    )
    _ = checkpoint.fingerprint  # large files take a while: here an interrupt ends it
    try:
        trio.run(generate, checkpoint, arguments, reporter(arguments.json))
    finally:
        end_progress()
    return 0


def read_stdin() -> str:
    """All of stdin, as UTF-8. Raises ``UsageError``."""
    if sys.stdin is None:
        raise UsageError("There is no stdin to read the prompt from.", "Give it as PROMPT.")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise UsageError(NOT_UTF8, "Convert it first, for example with iconv.") from None


def check_text(prompt: str) -> None:
    """Raise ``UsageError`` for what the shell passed on although it is no text."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UsageError(NOT_UTF8, "Convert it first, for example with iconv.") from None


async def generate(checkpoint: Checkpoint, arguments: Namespace, report: Report) -> None:
    """Join as a client, generate, and report every token.

    A beam search reports tokens when all beams agree on them, the last ones at its end.
    """
    from petalnode.demand import demand
    from petalnode.models.sampling import SamplingConfig
    from petalnode.node import NodeOptions, open_node
    from petalnode.session.session import GenerateOptions

    options = GenerateOptions(
        max_new_tokens=arguments.max_new_tokens,
        sampling=SamplingConfig(
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            repetition_penalty=arguments.repetition_penalty,
            seed=arguments.seed,
        ),
        stop=tuple(arguments.stop),
        num_beams=arguments.num_beams,
    )
    node_options = NodeOptions(
        join=tuple(arguments.join),
        dtype=arguments.dtype,
        cache_dir=Path(arguments.cache_dir) if arguments.cache_dir else None,
    )
    prompt = checkpoint.tokenizer().encode(arguments.prompt)
    workload = demand(len(prompt), options, checkpoint.config.max_positions)
    async with (
        open_node(checkpoint, node_options, report) as node,
        node.open_session(
            report, workload, rows=options.num_beams, adapter=arguments.adapter or ""
        ) as session,
    ):
        started = trio.current_time()
        generation = session.generate(prompt, options)
        async for token in generation:
            report(TokenEvent(token.id, token.text, token.position, round(token.ms, 3)))
        report(done(generation, trio.current_time() - started))


def done(generation: Completion, seconds: float) -> Done:
    """What there is to say of a generation that took so long."""
    searched = generation.options.num_beams > 1
    in_all = len(generation.tokens) / max(seconds, 1e-9)
    return (SearchDone if searched else Done)(
        tokens=generation.tokens,
        text=generation.text,
        ttft_ms=round((generation.ttft_s or 0.0) * 1000, 3),
        tokens_per_s=round(in_all if searched else generation.tokens_per_s, 3),
        finish_reason=generation.finish_reason or "length",
    )
