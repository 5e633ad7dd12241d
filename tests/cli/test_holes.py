"""Real processes that chose their blocks themselves: one is killed, another takes its place."""

import json
import subprocess
import time
from contextlib import contextmanager

from .test_processes import (  # noqa: F401 - a fixture
    DEADLINE_S,
    PROMPT,
    command,
    environment,
    generate_here,
    local_tokens,
    promised,
    serving,
)

FILLED_S = 15.0
TOKENS = 20
LIVE_TOKENS = 200
ALL_S = 600
"""For the whole test; a machine may be busy."""


@contextmanager
def generating(environment, invite):  # noqa: F811
    """A ``petalnode generate`` of which the first token has come."""
    flags = ["--json", "--join", invite, "--max-new-tokens", str(LIVE_TOKENS)]
    verb = command("generate", "demo", PROMPT, *flags)
    with subprocess.Popen(verb, stdout=subprocess.PIPE, env=environment, text=True) as live:
        try:
            while json.loads(live.stdout.readline())["event"] != "token":
                pass
            yield live
        finally:
            live.kill()


def test_a_hole_is_filled_in_time_by_one_that_can_be_spared(environment):  # noqa: F811
    """SIGKILL to the only node with its blocks, in the middle of somebody's text."""
    first = ["--num-blocks", "4"]  # it begins with 0:4
    with serving(environment, *first, deadline_s=ALL_S) as spare:
        invite = spare.wait_for("listening")["invite"]
        by_invite = ["--join", invite]
        with (
            serving(environment, "--blocks", "0:4", *by_invite, deadline_s=ALL_S),
            serving(environment, "--blocks", "4:8", *by_invite, deadline_s=ALL_S) as victim,
        ):
            spare.wait_for("ready")
            victim.wait_for("ready")
            with generating(environment, invite) as live:
                killed = time.monotonic()
                victim.process.kill()
                while spare.wait_for("ready")["blocks"] != [4, 8]:
                    pass
                assert time.monotonic() - killed < promised(FILLED_S)
                rest, _ = live.communicate(timeout=DEADLINE_S)
            text = generate_here(invite, "--max-new-tokens", str(TOKENS))[-1]
    events = [json.loads(line) for line in rest.splitlines()]
    assert "recovered" in [event["event"] for event in events]
    assert events[-1]["tokens"] == local_tokens(LIVE_TOKENS)
    assert text["tokens"] == local_tokens(TOKENS)
