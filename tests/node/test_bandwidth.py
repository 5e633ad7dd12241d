"""Bandwidth as measured on what is sent anyway."""

import pytest
import trio

from petalnode.bandwidth import LARGE_BYTES, BandwidthMeter


def test_small_messages_say_nothing():
    meter = BandwidthMeter()
    meter.sent(LARGE_BYTES - 1, 1.0)
    assert meter.bytes_per_s == 0.0


def test_a_hiccup_hardly_counts_and_a_lasting_change_does():
    meter = BandwidthMeter()
    meter.sent(4_000_000, 1.0)
    assert meter.bytes_per_s == 4e6
    meter.sent(1_000_000, 1.0)
    assert meter.bytes_per_s == 3.7e6
    for _ in range(60):
        meter.sent(1_000_000, 1.0)
    assert meter.bytes_per_s < 1.01e6
    meter.sent(1_000_000, 0.0)
    assert meter.bytes_per_s < 1e11


class SlowStream:
    """Takes a megabyte a second."""

    peer_id = "peer"

    async def write(self, *buffers):
        await trio.sleep(sum(map(len, buffers)) / 1e6)


async def test_a_watched_stream_is_timed_by_what_is_written(autojump_clock):
    meter = BandwidthMeter()
    stream = meter.tap(SlowStream(), "/any/1")
    await stream.write(bytes(1000))
    assert meter.bytes_per_s == 0.0
    await stream.write(bytes(1000), bytes(LARGE_BYTES))
    assert meter.bytes_per_s == pytest.approx(1e6)
    assert stream.peer_id == "peer"
