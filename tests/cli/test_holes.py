"""Real processes that chose their blocks themselves: one is killed, another takes its place."""

from .test_processes import (  # noqa: F401 - a fixture
    PROMPT,
    environment,
    following,
    generate_here,
    local_tokens,
    serving,
)

TOKENS = 20
LIVE_TOKENS = 200


def test_a_hole_is_filled_by_one_that_can_be_spared(environment):  # noqa: F811
    """SIGKILL to the only node with its blocks, in the middle of somebody's text."""
    first = ["--num-blocks", "4"]  # it begins with 0:4
    with serving(environment, *first) as spare:
        invite = spare.wait_for("listening")["invite"]
        by_invite = ["--join", invite]
        with (
            serving(environment, "--blocks", "0:4", *by_invite),
            serving(environment, "--blocks", "4:8", *by_invite) as victim,
        ):
            spare.wait_for("ready")
            victim.wait_for("ready")
            verb = ["generate", "demo", PROMPT, "--json", "--max-new-tokens", str(LIVE_TOKENS)]
            with following(environment, *verb, *by_invite) as (_, said):
                while next(said)["event"] != "token":
                    pass
                victim.process.kill()
                events = list(said)
            while spare.wait_for("ready")["blocks"] != [4, 8]:
                pass
            text = generate_here(invite, "--max-new-tokens", str(TOKENS))[-1]
    assert "recovered" in [event["event"] for event in events]
    assert events[-1]["tokens"] == local_tokens(LIVE_TOKENS)
    assert text["tokens"] == local_tokens(TOKENS)
