"""Where readers start, what they get, when they are too slow."""

from __future__ import annotations

from urllib.parse import parse_qsl

import pytest
from multidict import MultiDict
from websockets.frames import Frame
from websockets.streams import StreamReader

from indexer.errors import RequestError
from indexer.serve import stream_format as wire
from indexer.serve.stream_rules import EventFilter, SlowRule, Start, parse_options, start_position
from indexer.serve.xrpc.params import Params


@pytest.mark.parametrize(
    ("cursor", "wanted"),
    [
        (None, Start(20, False)),
        (0, Start(10, True)),
        (9, Start(10, True)),
        (10, Start(10, False)),
        (15, Start(15, False)),
        (20, Start(20, False)),
        (21, None),
    ],
)
def test_a_cursor_is_inclusive_between_floor_and_head(cursor: int | None, wanted: Start | None) -> None:
    assert start_position(cursor, 10, 20) == wanted


def test_zero_is_everything_as_long_as_nothing_was_pruned() -> None:
    assert start_position(0, 1, 20) == Start(1, False)


def test_a_filter_of_collections_lets_other_kinds_of_events_pass() -> None:
    wanted = EventFilter(frozenset({"a.b.c", "x.y.*"}))
    assert wanted.wants(("did:web:a", "a.b.c"))
    assert wanted.wants(("did:web:a", "x.y.z"))
    assert wanted.wants(("did:web:a", ""))
    assert not wanted.wants(("did:web:a", "a.b.cd"))
    assert not wanted.wants(("did:web:a", "x.yz.z"))


def _rule() -> SlowRule:
    return SlowRule(window=60, lag=100, rate=10)


def test_far_behind_and_slow_for_a_window_is_too_slow() -> None:
    rule = _rule()
    assert not rule.is_too_slow(0, 0, 1000)
    assert not rule.is_too_slow(59, 599, 2000)
    assert rule.is_too_slow(60, 599, 2000)


def test_fast_enough_though_far_behind_is_kept() -> None:
    rule = _rule()
    for now in range(0, 600, 15):
        assert not rule.is_too_slow(now, now * 10, now * 10 + 5000)


def test_near_the_head_however_slow_is_kept() -> None:
    rule = _rule()
    assert not rule.is_too_slow(0, 0, 1000)
    assert not rule.is_too_slow(30, 900, 1000)
    assert not rule.is_too_slow(61, 900, 2000), "the window begins anew"
    assert rule.is_too_slow(121, 900, 2000)


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 70000])
def test_frames_are_what_a_websocket_parser_reads(size: int) -> None:
    payload = bytes(index % 251 for index in range(size))
    encoded = wire.frame(wire.TEXT, payload)
    assert wire.payload_of(encoded) == payload
    reader = StreamReader()
    reader.feed_data(encoded)
    parser = Frame.parse(reader.read_exact, mask=False)
    with pytest.raises(StopIteration) as stop:
        next(parser)
    frame = stop.value.value
    assert (frame.opcode, frame.data, frame.fin) == (1, payload, True)
    assert reader.buffer == b""


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("cursor=", "parameter cursor is empty"),
        ("cursor=1&wantedColections=a.b.c", "unknown parameter wantedColections"),
    ],
)
def test_what_would_silently_mean_something_else_is_refused(query: str, why: str) -> None:
    with pytest.raises(RequestError, match=why):
        parse_options(Params(MultiDict(parse_qsl(query, keep_blank_values=True))))
