from petalnode.routing.chain import Gap, Router, no_route
from petalnode.routing.costs import Knowledge, Workload
from petalnode.routing.explain import explain

from .records import record


def test_every_peer_is_used_or_told_why_not() -> None:
    swarm = [
        record("banned"),
        record("beyond", 2, 6),
        record("best"),
        record("draining", state="draining"),
        record("equal"),
        record("excluded"),
        record("far"),
        record("full", kv_tokens_free=1),
        record("int8", quant="int8"),
        record("joining", state="joining"),
        record("short", max_context=10),
    ]
    known = Knowledge(
        rtts={a.peer_id: 0.04 for a in swarm} | {"far": 0.06, "equal": 0.04},
        banned={"banned": "banned for 14 s more: its connection was lost"},
    )
    workload = Workload(kv_tokens=2048, context=2048, exact=True)
    texts = explain(Router(4), swarm, known, workload, exclude={"excluded"})
    assert texts == {
        "banned": "banned for 14 s more: its connection was lost",
        "beyond": "its blocks 2 to 5 are not of a model of 4",
        "best": "used for blocks 0 to 3",
        "draining": "it is draining",
        "equal": "as good: 142 ms through it",
        "excluded": "excluded from this search",
        "far": "slower: 142 ms by this chain, 162 ms through it",
        "full": "no room for 2048 tokens",
        "int8": "its weights are quantized (int8)",
        "joining": "it is joining",
        "short": "its context ends at 10 tokens, 2048 are needed",
    }


def test_missing_adapters_are_named() -> None:
    texts = explain(
        Router(4),
        [record("a"), record("b", adapters=("x",))],
        Knowledge(),
        Workload(adapters=("x",)),
    )
    assert texts["a"] == "it lacks adapter x"


def test_without_a_chain_the_missing_blocks_are_told() -> None:
    swarm = [record("a", 0, 2), record("b", 0, 2, state="draining")]
    texts = explain(Router(4), swarm, Knowledge())
    assert texts == {"a": "Blocks 2 to 3 are served by nobody.", "b": "it is draining"}


def test_who_asks_for_no_room_is_not_told_that_it_lacks() -> None:
    swarm = [record("a", 0, 2), record("b", 2, 4)]
    error = no_route(swarm, 4, Gap(0, 4), Workload(), Knowledge(), ())
    assert error.cause == "No chain leads through the peers that hold the blocks."
    error = no_route(swarm, 4, Gap(0, 4), Workload(kv_tokens=9), Knowledge(), ())
    assert error.cause == "The peers have no chain with room for 9 tokens."


def test_a_peer_outside_the_gap_and_one_that_leads_nowhere() -> None:
    swarm = [
        record("all", 0, 4),
        record("before", 0, 1),
        record("nowhere", 1, 2, quant="int8"),
        record("s", 0, 4),
        record("behind", 4, 5),
    ]
    texts = explain(Router(5), swarm, Knowledge(), gap=Gap(1, 4, sender="s"))
    assert texts["all"] == "used for blocks 1 to 3"
    assert texts["before"] == texts["behind"] == "serves none of blocks 1 to 3"
    assert texts["nowhere"].startswith("slower: ")
    assert texts["s"] == "excluded from this search"
    # Nobody but "all" has blocks 2 and 3, and there is room for two blocks of it.
    swarm[0] = record("all", 0, 4, kv_tokens_free=512)
    swarm.append(record("part", 1, 2, kv_tokens_free=10_000))
    swarm[2] = record("nowhere", 0, 1)
    texts = explain(
        Router(4), swarm, Knowledge(), Workload(kv_tokens=1024), gap=Gap(1, 4), exclude={"s"}
    )
    assert texts["part"] == "used for block 1"


def test_a_route_in_use_is_explained_as_it_is() -> None:
    swarm = [record("a"), record("b")]
    router = Router(4)
    known = Knowledge(rtts={"a": 0.01, "b": 0.02})
    route = router.find(swarm, known, exclude={"a"})
    texts = explain(router, swarm, known, route=route)
    assert texts["b"] == "used for blocks 0 to 3"
    assert texts["a"] == "as good: 112 ms through it"


def test_bulk_work_is_explained_by_the_busiest_stage() -> None:
    swarm = [record("fast"), record("slow", forward_tps=1.0)]
    texts = explain(Router(4), swarm, Knowledge(), Workload(bulk_tokens=1000))
    assert texts["fast"].startswith("used for")
    assert texts["slow"] == "too slow: 250 ms a token for one block, 10 ms here for all"
