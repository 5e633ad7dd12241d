"""Which connections are closed, without any network."""

from petalnode.idling import (
    IDLE_S,
    MESH_PEERS,
    RING_PEERS,
    SPARE_CONNECTIONS,
    SPARE_GUESTS,
    Idleness,
    ring,
)

PEERS = [f"p{number:02}" for number in range(SPARE_CONNECTIONS + 4)]


def test_nobody_is_sent_away_who_came_a_moment_ago_or_while_there_is_room():
    idleness = Idleness()
    assert idleness.surplus(PEERS, (), (), (), 0.0) == []
    assert idleness.surplus(PEERS, (), (), (), IDLE_S - 1) == []
    assert idleness.surplus(PEERS[:SPARE_CONNECTIONS], (), (), (), 2 * IDLE_S) == []


def test_the_longest_idle_go_first_and_only_as_many_as_are_too_many():
    idleness = Idleness()
    late = [*PEERS[3:], *PEERS[:3]]
    for at, seen in enumerate((late[:-3], late[:-2], late[:-1], late)):
        idleness.surplus(seen, (), (), (), float(at))
    assert idleness.surplus(late, (), (), (), IDLE_S + 3) == sorted(late[:4])


def test_who_is_in_use_or_wanted_stays():
    idleness = Idleness()
    idleness.surplus(PEERS, (), (), (), 0.0)
    busy, kept = PEERS[0], PEERS[1]
    assert idleness.surplus(PEERS, {busy}, {kept}, (), IDLE_S) == PEERS[2:6]
    # What was in use lately may be wanted again soon.
    assert idleness.surplus(PEERS, (), PEERS[1:], (), 2 * IDLE_S - 1) == []
    assert idleness.surplus(PEERS, (), PEERS[1:], (), 2 * IDLE_S) == [busy]


def test_guests_are_counted_apart():
    guests = [f"g{number:02}" for number in range(SPARE_GUESTS + 1)]
    idleness = Idleness()
    for at, connected in enumerate((PEERS[:-4], PEERS[:-4] + guests[:-1], PEERS + guests)):
        idleness.surplus(connected, (), (), guests, float(at))
    assert idleness.surplus(PEERS[:-4] + guests[:-1], (), (), guests[:-1], IDLE_S + 1) == []
    idleness.surplus(PEERS + guests, (), (), guests, IDLE_S + 1)
    assert idleness.surplus(PEERS + guests, (), (), guests, 3 * IDLE_S) == [*PEERS[:4], guests[0]]
    assert idleness.surplus(PEERS + guests, (), PEERS, guests, 3 * IDLE_S) == guests[:1]


def test_who_left_is_forgotten():
    idleness = Idleness()
    idleness.surplus(PEERS, (), (), (), 0.0)
    idleness.surplus(PEERS[1:], (), (), (), 1.0)
    idleness.surplus(PEERS, (), (), (), 2.0)
    assert PEERS[0] not in idleness.surplus(PEERS, (), (), (), IDLE_S + 1)


def test_whoever_watches_is_known_to_the_watched():
    around = {own: ring(own, set(PEERS) - {own}) for own in PEERS}
    for own, (watched, watchers) in around.items():
        assert len(watched) == len(watchers) == RING_PEERS
        assert all(own in around[peer][1] for peer in watched)
        assert all(own in around[peer][0] for peer in watchers)
    assert ring("b", ["a", "c"]) == (["c", "a"], ["c", "a"])
    assert ring("b", []) == ([], [])
    assert 2 * RING_PEERS < MESH_PEERS  # or nobody would be met by chance
