"""Lies that no lane keeps: what is done to open sockets (row 0), and numbering that begins anew.

Owns those kinds. A frame of these is sent once, to whoever is connected; a replay does not repeat it.
One thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from indexer.simulator.account import ActionError
from indexer.simulator.cbor import encode
from indexer.simulator.framelog import Lane, Turn
from indexer.simulator.lie_base import Kind, Tell, one_create, shadow
from indexer.simulator.wire import FrameHalves, error_frame, frame, info_frame, timestamp

if TYPE_CHECKING:
    from indexer.simulator.lies import Telling

#: How long a socket stays silent; longer than a test waits, shorter than anybody's patience.
SILENT_S = 2.5
_HUGE = 5_000_001


def _lane(telling: Telling) -> Lane:
    name, *more = sorted(telling.lanes)
    if more:
        raise ActionError(f"{telling.kind.name} is told on one lane at a time")
    return telling.network.lanes[name]


def _turn(*turns: Turn) -> Tell:
    return lambda telling: telling.play(*turns)


def _bytes(make: Callable[[bytes], bytes]) -> Tell:
    """The frame that would come next, tampered with."""

    def tell(telling: Telling) -> None:
        draft, _ = shadow(telling, one_create(telling))
        telling.play(Turn(make(draft.halves().numbered(_lane(telling).head + 1))))

    return tell


def _again(back: int) -> Tell:
    """A frame that the socket has had, the newest or one before it."""

    def tell(telling: Telling) -> None:
        lane = _lane(telling)
        if lane.end <= lane.floor() + back:
            raise ActionError(f"{telling.kind.name}: {lane.name} has sent too little")
        telling.play(Turn(lane.read(lane.end - 1 - back, 1)[0]))

    return tell


def _seqless(**seq: object) -> Tell:
    """An #identity whose seq is not there, or no seq."""

    def tell(telling: Telling) -> None:
        payload = {"did": telling.account.did, "time": timestamp(telling.world.clock())} | seq
        telling.play(Turn(encode({"op": 1, "t": "#identity"}) + encode(payload)))

    return tell


def _stuck(telling: Telling) -> None:
    """Not a frame at all, and it stays in the replay; the truth goes on behind it."""
    telling.say("noise", FrameHalves(b"\xa2\x62op\x01\x61t\xff", b""))
    telling.true_commit()


def _overlap(telling: Telling) -> None:
    """A word on an account's status; then the connection ends, and the replay begins with that word again."""
    lane = _lane(telling)
    payload = {"did": telling.account.did, "time": timestamp(telling.world.clock()), "active": True}
    lane.overlap = 1
    telling.say("#account", frame("#account", payload))
    lane.play(Turn(cut=True))


def _reset(*, mute: bool) -> Tell:
    def tell(telling: Telling) -> None:
        lane = _lane(telling)
        if lane.head < 2:
            raise ActionError(f"{telling.kind.name}: {lane.name} has sent too little")
        telling.network.reset(lane.name, 0, mute=mute)
        telling.enter()

    return tell


def kinds() -> Iterator[Kind]:
    bad = ("connection/frame",)
    frames: tuple[tuple[str, str, Tell], ...] = (
        ("frame_noise", "noise", _turn(Turn(b"\xff\x00\xfe noise"))),
        ("frame_cut", "half of a frame", _bytes(lambda data: data[: len(data) // 2])),
        ("frame_half", "a header without a payload", _bytes(lambda data: encode({"op": 1, "t": "#commit"}))),
        ("frame_tail", "a byte behind the payload", _bytes(lambda data: data + b"\0")),
        ("frame_form", "an integer in more bytes than it needs",
         _bytes(lambda data: data.replace(b"bop\x01", b"bop\x18\x01", 1))),
        ("frame_empty", "an empty message header", _turn(Turn(encode({}) + encode({})))),
        ("frame_list", "lists instead of maps", _turn(Turn(encode([1]) + encode([])))),
    )  # fmt: skip
    for name, about, tell in frames:
        yield Kind(name, "0", about, bad, tell)
    yield from _of_frames()
    yield from _of_connections()
    yield from _of_words()


def _of_frames() -> Iterator[Kind]:
    yield Kind(
        "frame_text", "0", "a text frame", ("connection/text_frame",), _turn(Turn(b"hello", text=True))
    )
    yield Kind("frame_huge", "0", "a frame of more than 5,000,000 bytes", ("connection/closed",),
               _turn(Turn(bytes(_HUGE))))  # fmt: skip
    yield Kind("frame_stuck", "0", "not a frame, and the replay repeats it", ("reject/frame",), _stuck,
               chance=False)  # fmt: skip
    order = ("connection/seq_order",)
    yield Kind("seq_repeated", "§1", "a seq twice on one socket", order, _again(0))
    yield Kind("seq_lower", "§1", "a lower seq on one socket", order, _again(1))
    yield Kind("seq_missing", "1", "a message without a seq", ("reject/fields",), _seqless())
    yield Kind("seq_type", "1", "a seq below 1", ("reject/fields",), _seqless(seq=-1))


def _of_connections() -> Iterator[Kind]:
    yield Kind(
        "cut", "§1", "the connection ends without a word", ("connection/closed",), _turn(Turn(cut=True))
    )
    yield Kind("close", "§1", "the connection is closed", ("connection/closed",), _turn(Turn(close=True)))
    yield Kind("quiet", "§1", "legal: nothing to tell, but pings are answered", (),
               _turn(Turn(silent_s=SILENT_S)), chance=False)  # fmt: skip
    yield Kind("stalled", "§1", "the socket is dead, but open", ("connection/closed",),
               _turn(Turn(silent_s=SILENT_S, deaf=True)), chance=False)  # fmt: skip
    yield Kind("reset_told", "§1", "numbering begins anew; the old cursor is refused",
               ("error/FutureCursor", "connection/FutureCursor"), _reset(mute=False), "nobody",
               chance=False)  # fmt: skip
    yield Kind("reset_silent", "§1", "numbering begins anew, and nobody says so", ("note/stream_reset",),
               _reset(mute=True), "nobody", chance=False)  # fmt: skip


def _of_words() -> Iterator[Kind]:
    info = info_frame("OutdatedCursor", "Requested cursor exceeded limit.")
    yield Kind("info_outdated", "#info", "the cursor is too old", ("info/OutdatedCursor",), _turn(Turn(info)))
    yield Kind("info_unknown", "#info", "an info of no known name", ("info/other",),
               _turn(Turn(info_frame("Greetings", "x" * 4096))))  # fmt: skip
    yield Kind("error_slow", "error", "the reader is too slow",
               ("error/ConsumerTooSlow", "connection/ConsumerTooSlow"),
               _turn(Turn(error_frame("ConsumerTooSlow", "x"), close=True)))  # fmt: skip
    yield Kind("error_future", "error", "the cursor is said to lie in the future",
               ("error/FutureCursor", "connection/FutureCursor"),
               _turn(Turn(error_frame("FutureCursor", "x"), close=True)), chance=False)  # fmt: skip
    yield Kind("error_unknown", "error", "an error of no known name", ("error/other", "connection/other"),
               _turn(Turn(error_frame("Oops" * 999, "x"), close=True)))  # fmt: skip
    yield Kind("word_repeated", "#account", "a replay repeats a word on an account's status",
               ("drop/stale_word",), _overlap)  # fmt: skip
