"""Frames: exact round trips, and every way in which a frame can be wrong."""

import contextlib

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from petalnode.errors import LocalProtocolError, PeerGone, PeerMisbehaved
from petalnode.p2p import frames
from petalnode.p2p.frames import PREFIX, FrameStream
from petalnode.p2p.memory import memory_byte_pair, memory_frame_pair


async def test_round_trip_of_header_and_tensors():
    a, b = memory_frame_pair()
    sent = [
        torch.randn(3, 5),
        torch.randn(7).to(torch.bfloat16),
        torch.randn(2, 1, 3).to(torch.float16),
        torch.tensor([1, -(2**40)]),
        torch.empty(0, 4),
    ]
    await a.send({"type": "step", "pos": 3}, sent)
    frame = await b.receive()
    assert frame is not None
    assert frame.header == {"type": "step", "pos": 3}
    assert [t.dtype for t in frame.tensors] == [t.dtype for t in sent]
    assert all(torch.equal(x, y) for x, y in zip(frame.tensors, sent, strict=True))


async def test_a_tensor_that_is_not_contiguous_arrives_as_it_reads():
    a, b = memory_frame_pair()
    tensor = torch.arange(12.0).view(3, 4).t()
    await a.send({}, [tensor])
    frame = await b.receive()
    assert frame is not None
    assert torch.equal(frame.tensors[0], tensor)


def test_a_contiguous_tensor_is_not_copied():
    tensor = torch.zeros(4)
    view = frames.tensor_bytes(tensor)
    tensor[0] = 1.0
    assert bytes(view[:4]) == b"\x00\x00\x80\x3f"


async def test_clean_end_is_none_and_a_cut_frame_is_an_error():
    a, b = memory_frame_pair()
    await a.aclose()
    assert await b.receive() is None

    raw, other = memory_byte_pair()
    await raw.write(PREFIX.pack(10, 0), b"half")
    await raw.close_write()
    with pytest.raises(PeerGone):
        await FrameStream(other).receive()


def frame_bytes(header: object, payload: bytes = b"") -> bytes:
    packed = msgpack.packb(header)
    return PREFIX.pack(len(packed), len(payload)) + packed + payload


BAD_FRAMES = {
    "absurd header length": PREFIX.pack(2**32 - 1, 0),
    "absurd payload length": PREFIX.pack(1, 2**32 - 1) + b"\x80",
    "header not msgpack": PREFIX.pack(1, 0) + b"\xc1",
    "header deeply nested": PREFIX.pack(5000, 0) + b"\x91" * 5000,
    "header not a map": frame_bytes([1, 2]),
    "key not a string": frame_bytes({1: 2}),
    "tensors not a list": frame_bytes({"_t": 5}),
    "too many tensors": frame_bytes({"_t": [["float32", [0]]] * 17}),
    "unknown dtype": frame_bytes({"_t": [["object", [1]]]}, b"1234"),
    "dtype not a string": frame_bytes({"_t": [[["float32"], [1]]]}, b"1234"),
    "negative size": frame_bytes({"_t": [["float32", [-1]]]}, b"1234"),
    "bool size": frame_bytes({"_t": [["float32", [True]]]}, b"1234"),
    "too many dimensions": frame_bytes({"_t": [["float32", [1] * 5]]}, b"1234"),
    "huge shape": frame_bytes({"_t": [["float32", [2**40]]]}, b"1234"),
    "product beyond payload": frame_bytes({"_t": [["float32", [2**20, 2**20]]]}, b"1234"),
    "payload longer than tensors": frame_bytes({"_t": [["float32", [1]]]}, b"12345678"),
    "payload without tensors": frame_bytes({}, b"1234"),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
async def test_bad_frames_are_refused_and_reset_the_stream(name):
    raw, other = memory_byte_pair()
    await raw.write(BAD_FRAMES[name])
    with pytest.raises(PeerMisbehaved, match="alice"):
        await FrameStream(other).receive()
    with pytest.raises(PeerGone):
        await raw.write(b"more")


@given(st.binary(max_size=200))
def test_random_headers_never_raise_anything_else(data):
    with contextlib.suppress(frames.BadFrame):
        assert isinstance(frames.decode_header(data), dict)


def test_our_own_oversize_frame_is_our_own_fault():
    with pytest.raises(LocalProtocolError):
        frames.encode({}, [torch.zeros(100)], max_payload=10)
