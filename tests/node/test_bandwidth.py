"""Bandwidth as measured on what is sent anyway."""

import pytest
import trio

from petalnode.bandwidth import FULL_S, LARGE_BYTES, MEMORY_S, BandwidthMeter
from petalnode.p2p.frames import FrameStream, encode

from ..simnet.test_network_hosts import open_pair

MB = 1_000_000


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def meter(clock):
    return BandwidthMeter(clock)


def test_small_messages_say_nothing(meter):
    meter.sent(LARGE_BYTES - 1, 1.0)
    assert meter.bytes_per_s == 0.0


def test_what_vanishes_in_a_buffer_says_nothing(meter):
    for _ in range(100):
        meter.sent(64 * MB, 0.0)
        meter.sent(64 * MB, FULL_S * 0.99)
    assert meter.bytes_per_s == 0.0


def test_a_hiccup_hardly_counts_and_a_lasting_change_does(meter):
    meter.sent(4 * MB, 1.0)
    assert meter.bytes_per_s == 4e6
    meter.sent(MB, 1.0)
    assert meter.bytes_per_s == 3.7e6
    for _ in range(60):
        meter.sent(MB, 1.0)
    assert meter.bytes_per_s < 1.01e6


def test_what_left_at_once_proves_that_a_slow_estimate_was_a_hiccup(meter):
    meter.sent(MB, 10.0)
    meter.sent(LARGE_BYTES, 0.0)
    assert meter.bytes_per_s == LARGE_BYTES / FULL_S
    meter.sent(4 * MB, 0.0)
    assert meter.bytes_per_s == 4 * MB / FULL_S
    meter.sent(MB, 0.0)
    assert meter.bytes_per_s == 4 * MB / FULL_S


def test_a_measurement_is_forgotten_in_time_and_a_guess_does_not_prolong_it(meter, clock):
    meter.sent(MB, 1.0)
    clock.now = MEMORY_S - 1
    meter.sent(4 * MB, 0.0)
    assert meter.bytes_per_s == 4 * MB / FULL_S
    clock.now = MEMORY_S
    assert meter.bytes_per_s == 0.0
    meter.sent(MB, 1.0)
    assert meter.bytes_per_s == MB


@pytest.mark.parametrize(
    ("bandwidth", "least", "most"), [(1e6, 0.9e6, 1.2e6), (12.5e6, 11e6, 15e6), (1e9, 0, 0)]
)
async def test_a_link_is_measured_through_all_buffers(bandwidth, least, most, autojump_clock):
    """Noise, yamux with its windows, and 50 ms each way."""
    async with open_pair() as pair:
        for link in pair.network.between("a", "b", oneway=False):
            link.bandwidth = bandwidth

        async def sink(stream: FrameStream) -> None:
            while await stream.receive() is not None:
                pass

        pair.b.serve("/test/sink/1", sink)
        meter = BandwidthMeter()
        pair.a._tap = meter.tap
        stream = await pair.a.open_stream(pair.b.peer_id, "/test/sink/1")
        (frame,) = encode({"filler": bytes(200_000)}, ())
        for _ in range(160):  # small ones, until windows have grown
            await stream._raw.write(frame)
        assert meter.bytes_per_s == 0.0
        for _ in range(8):
            await trio.sleep(1)  # what is under way arrives
            await stream._raw.write(*[frame] * 20)
        assert least <= meter.bytes_per_s <= most
