"""Who is offered what, and who is asked, without any network."""

from petalnode.p2p.offers import ASK_S, MAX_OFFERED, MAX_REMEMBERED, REMEMBER_S, Offers

A, B, C = "abc"
ONE, TWO = b"1", b"2"


def test_each_is_offered_once_what_it_lacks() -> None:
    offers: Offers[str] = Offers()
    offers.arrived(ONE, A, 0.0)  # it is from there
    offers.add(ONE, 0.0)
    offers.add(TWO, 0.0)
    assert offers.take([A, B]) == {A: [TWO], B: [ONE, TWO]}
    assert offers.take([A, B, C]) == {}
    assert offers.lacking(ONE, [A, B, C], 0.0) == [C]


def test_who_offers_what_we_have_is_not_offered_it() -> None:
    offers: Offers[str] = Offers()
    offers.add(ONE, 0.0)
    offers.arrived(ONE, A, 0.1)
    assert offers.take([A, B]) == {B: [ONE]}


def test_who_was_gone_is_offered_everything_anew() -> None:
    offers: Offers[str] = Offers()
    offers.add(ONE, 0.0)
    offers.take([A, B])
    offers.forget(A)
    assert offers.lacking(ONE, [A, B], 1.0) == [A]


def test_one_is_asked_at_a_time_and_the_next_when_it_does_not_answer() -> None:
    offers: Offers[str] = Offers()
    assert offers.offered(ONE, A, 0.0)
    assert not offers.offered(ONE, B, 0.1)
    assert not offers.offered(ONE, C, 0.1)
    assert offers.overdue(lambda _: False, ASK_S - 0.1) == {}
    assert offers.overdue(lambda _: False, ASK_S) == {B: [ONE]}
    assert offers.overdue(lambda _: False, ASK_S) == {}
    assert offers.overdue(lambda _: False, 2 * ASK_S) == {C: [ONE]}
    assert not offers.offered(ONE, A, 2 * ASK_S)
    assert offers.overdue(lambda _: False, 3 * ASK_S) == {A: [ONE]}  # the question may be lost


def test_who_is_gone_is_not_asked_and_not_waited_for() -> None:
    offers: Offers[str] = Offers()
    for peer in (A, B, C):
        offers.offered(ONE, peer, 0.0)
    offers.forget(B)
    offers.forget(A)
    assert offers.overdue(lambda _: False, 0.1) == {C: [ONE]}
    offers.forget(C)
    assert offers.overdue(lambda _: False, 0.2) == {}
    assert offers.offered(ONE, A, 0.3)


def test_what_comes_when_its_offer_is_all_but_forgotten_is_offered_on() -> None:
    offers: Offers[str] = Offers()
    offers.offered(ONE, A, 0.0)
    offers.add(ONE, REMEMBER_S)
    assert offers.take([B]) == {B: [ONE]}


def test_what_came_is_asked_for_no_more() -> None:
    offers: Offers[str] = Offers()
    offers.offered(ONE, A, 0.0)
    offers.offered(ONE, B, 0.0)
    assert offers.overdue(lambda message_id: message_id == ONE, ASK_S) == {}
    offers.offered(TWO, A, 10.0)
    offers.offered(TWO, B, 10.0)
    offers.add(TWO, 10.1)
    assert offers.overdue(lambda _: False, 10.0 + ASK_S) == {}


def test_what_is_remembered_is_bounded_and_passes() -> None:
    offers: Offers[str] = Offers()
    for number in range(2 * MAX_REMEMBERED):
        offers.offered(number.to_bytes(4, "big"), A, 0.0)
    assert len(offers._messages) == MAX_REMEMBERED
    offers.offered(ONE, A, REMEMBER_S)
    assert list(offers._messages) == [ONE]


def test_a_flood_of_offers_keeps_nothing_of_ours_from_being_offered() -> None:
    offers: Offers[str] = Offers()
    offers.add(ONE, 0.0)
    for number in range(MAX_REMEMBERED):
        offers.offered(number.to_bytes(4, "big"), A, 0.0)
    assert offers.take([B, C]) == {B: [ONE], C: [ONE]}
    for number in range(2 * MAX_REMEMBERED):
        offers.add(number.to_bytes(4, "big"), 0.0)
    assert len(offers._fresh) == MAX_REMEMBERED


def test_a_beat_carries_so_many_and_the_next_one_the_rest() -> None:
    offers: Offers[str] = Offers()
    for number in range(MAX_OFFERED + 3):
        offers.add(number.to_bytes(4, "big"), 0.0)
    assert len(offers.take([A])[A]) == MAX_OFFERED
    assert len(offers.take([A])[A]) == 3
