"""Real processes on loopback: founder, joiners by invite and by multiaddr, clients, goodbye."""

import fcntl
import io
import json
import mmap
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, redirect_stdout
from threading import Timer

import pytest
import torch
import trio

from petalnode.cli.main import main

PROMPT = "def main():\n"
DEADLINE_S = 600
"""For all that one process shall do; it only bounds what hangs. Times: ``benchmarks promises``."""
ALL_TESTS_S = 3600
"""For what serves all tests of a file."""


def command(*arguments):
    return [sys.executable, "-m", "petalnode", *arguments]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    return {**os.environ, "XDG_DATA_HOME": str(home), "OMP_NUM_THREADS": "1"}


class Serving:
    """A ``petalnode run demo`` process; events are read as they are waited for."""

    def __init__(self, environment, *arguments, deadline_s):
        verb = command("run", "demo", "--json", "--host", "127.0.0.1", *arguments)
        self.process = subprocess.Popen(verb, stdout=subprocess.PIPE, env=environment, text=True)
        self.watchdog = Timer(deadline_s, self.process.kill)
        self.watchdog.start()

    def wait_for(self, kind):
        for line in self.process.stdout:
            event = json.loads(line)
            if event["event"] == kind:
                return event
        pytest.fail(f"the node ended without {kind}")

    def stop(self):
        """First Ctrl-C: drain, say goodbye, exit with 0."""
        self.process.send_signal(signal.SIGINT)
        kinds = [json.loads(line)["event"] for line in self.process.stdout]
        return kinds, self.process.wait()


def narrow_pipe():
    """A pipe that takes one event more only once the last one was read, where Linux has such."""
    try:
        ends = os.pipe2(os.O_DIRECT)
        fcntl.fcntl(ends[0], fcntl.F_SETPIPE_SZ, mmap.PAGESIZE)
    except (AttributeError, OSError):
        return os.pipe()
    return ends


@contextmanager
def following(environment, *arguments, **options):
    """A process and its events as they come. It is at most two ahead of what was read.

    So it cannot have ended when something is done to it on an event, however late we read that.
    """
    ours, theirs = narrow_pipe()
    with open(ours) as lines:
        verb = command(*arguments)
        process = subprocess.Popen(verb, stdout=theirs, env=environment, text=True, **options)
        os.close(theirs)
        watchdog = Timer(DEADLINE_S, process.kill)
        watchdog.start()
        try:
            yield process, map(json.loads, lines)
        finally:
            watchdog.cancel()
            process.kill()
            process.wait()


@contextmanager
def serving(environment, *arguments, deadline_s=DEADLINE_S):
    node = Serving(environment, *arguments, deadline_s=deadline_s)
    try:
        yield node
    finally:
        node.watchdog.cancel()
        node.process.kill()
        node.process.wait()
        node.process.stdout.close()


@pytest.fixture(scope="module")
def swarm(environment):
    """Two nodes with half of the model each; the value has the founder's events."""
    with serving(environment, "--blocks", "0:4", deadline_s=ALL_TESTS_S) as founder:
        listening = founder.wait_for("listening")
        second = ["--blocks", "4:8", "--join", listening["invite"]]
        with serving(environment, *second, deadline_s=ALL_TESTS_S) as joiner:
            joiner.wait_for("ready")
            founder.wait_for("ready")
            yield listening


def generate(environment, join, *flags):
    """The events of one ``petalnode generate``, a process of its own."""
    verb = command("generate", "demo", PROMPT, "--json", "--join", join, *flags)
    done = subprocess.run(verb, capture_output=True, env=environment, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def generate_here(join, *flags):
    """The same from a client in this process, which has imported torch already."""
    with redirect_stdout(io.StringIO()) as out:
        assert main(["generate", "demo", PROMPT, "--json", "--join", join, *flags]) == 0
    return [json.loads(line) for line in out.getvalue().splitlines()]


def local_tokens(new_tokens):
    """What transformers makes of the prompt, in float32."""
    from pathlib import Path

    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    import petalnode.demo

    folder = Path(petalnode.demo.__file__).parent
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT).ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    output = model.generate(torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False)
    return output[0, len(ids) :].tolist()


def test_greedy_text_of_a_real_swarm_equals_transformers(swarm, environment):
    events = generate(environment, swarm["invite"], "--max-new-tokens", "200")
    route, *tokens, done = events
    assert route["event"] == "route"
    assert [hop["blocks"] for hop in route["hops"]] == [[0, 4], [4, 8]]
    assert all(hop["rtt_ms"] > 0 for hop in route["hops"])
    assert [token["id"] for token in tokens] == done["tokens"] == local_tokens(200)
    assert "".join(token["text"] for token in tokens) == done["text"]
    assert done["finish_reason"] in ("stop", "length")
    assert done["ttft_ms"] > 0


def status_of(environment, invite):
    """The one object of ``petalnode status --json``."""
    verb = command("status", "demo", "--json", "--join", invite)
    done = subprocess.run(verb, capture_output=True, env=environment, text=True, timeout=DEADLINE_S)
    (seen,) = [json.loads(line) for line in done.stdout.splitlines()]
    return seen


def test_a_late_node_is_used_and_one_that_says_goodbye_is_gone(environment):
    with serving(environment, "--blocks", "0:4") as founder:
        listening = founder.wait_for("listening")
        by_multiaddr = ["--join", listening["addrs"][0], "--name", "late"]
        with serving(environment, "--blocks", "4:8", *by_multiaddr) as late:
            peers = [node.wait_for("ready")["peer_id"] for node in (founder, late)]
            route = generate_here(listening["invite"], "--max-new-tokens", "3")[0]
            assert [hop["peer_id"] for hop in route["hops"]] == peers

            seen = status_of(environment, listening["invite"])
            assert seen["event"] == "swarm"
            assert (seen["blocks"], seen["covered"], seen["not_used"]) == (8, True, [])
            assert {peer["name"] for peer in seen["peers"]} == {"", "late"}

            assert late.stop() == (["draining", "stopped"], 0)
        while len((seen := status_of(environment, listening["invite"]))["peers"]) > 1:
            pass  # the goodbye is on its way
    assert (seen["covered"], [peer["peer_id"] for peer in seen["peers"]]) == (False, peers[:1])


def test_sampling_with_a_seed_repeats(swarm, environment):
    flags = ["--temperature", "0.8", "--top-k", "40", "--seed", "5", "--max-new-tokens", "20"]
    here = generate_here(swarm["invite"], *flags)[-1]
    there = generate(environment, swarm["invite"], *flags)[-1]
    assert here["text"] == there["text"]


def test_a_prompt_longer_than_the_context_exits_with_1(swarm, environment):
    verb = command("generate", "demo", "-", "--join", swarm["invite"])
    failed = subprocess.run(
        verb,
        input="x = 1\n" * 3000,
        capture_output=True,
        env=environment,
        text=True,
        timeout=DEADLINE_S,
    )
    assert failed.returncode == 1
    assert "context is 2048" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_hop_killed_in_mid_text_changes_nothing(environment):
    """Of two nodes that hold everything one is killed; the other takes over, the text goes on."""
    new, events, lost = 80, [], None
    with serving(environment, "--blocks", "0:8") as one:
        by_invite = ["--join", one.wait_for("listening")["invite"]]
        with serving(environment, "--blocks", "0:8", *by_invite) as two:
            nodes = {node.wait_for("ready")["peer_id"]: node for node in (one, two)}
            verb = ["generate", "demo", PROMPT, "--json", "--max-new-tokens", str(new), *by_invite]
            with following(environment, *verb, stderr=subprocess.PIPE) as (client, said):
                for event in said:
                    events.append(event)
                    if event["event"] == "token" and event["position"] == 20:
                        lost = events[0]["hops"][-1]["peer_id"]
                        nodes[lost].process.kill()
                _, error = client.communicate()
    assert (client.returncode, error) == (0, "")
    recovered = [event for event in events if event["event"] == "recovered"]
    assert [event["lost"] for event in recovered] == [[lost]]
    assert recovered[0]["replayed_tokens"] >= recovered[0]["position"] - 1
    assert events[-1]["tokens"] == local_tokens(new)


def test_the_demo_ends_by_itself(swarm, environment):
    """It kills a node in mid-sentence; the text is the one that an undisturbed swarm gives."""
    from petalnode.cli.demo import KILL_AFTER_TOKENS, NEW_TOKENS, SAMPLING

    done = subprocess.run(
        command("demo", "--json", "--prompt", PROMPT),
        capture_output=True,
        env=environment | {"PETALNODE_PORT": "1"},
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    kinds = [event["event"] for event in events]
    assert [hop["blocks"] for hop in events[0]["hops"]] == [[0, 3], [3, 6], [6, 8]]
    killed = events[0]["hops"][1]["peer_id"]
    recovered = events[kinds.index("recovered")]
    assert recovered["lost"] == [killed]
    assert kinds[1 : KILL_AFTER_TOKENS + 1] == ["token"] * KILL_AFTER_TOKENS
    flags = [*SAMPLING.split(), "--max-new-tokens", NEW_TOKENS]
    undisturbed = generate_here(swarm["invite"], *flags)[-1]
    assert (events[-1]["event"], events[-1]["text"]) == ("done", undisturbed["text"])
    assert len(undisturbed["tokens"]) > KILL_AFTER_TOKENS


async def test_a_stopped_process_is_noticed(environment):
    """SIGSTOP: the process stays, its connections too, but nothing comes any more."""
    from petalnode.p2p.host import open_host
    from petalnode.p2p.identity import new_identity

    with serving(environment, "--blocks", "0:1") as node:
        listening = node.wait_for("listening")
        async with open_host(new_identity(), listen=()) as host:
            lost = trio.Event()
            host.on_disconnect(lambda peer_id: lost.set())
            await host.connect(listening["addrs"][0])
            node.process.send_signal(signal.SIGSTOP)
            with trio.fail_after(DEADLINE_S):
                await lost.wait()
            assert host.connected_peers() == []
