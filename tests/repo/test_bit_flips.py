"""One flipped bit anywhere in a real archive makes verification fail, with one of our errors."""

from __future__ import annotations

import mmap
import random
from typing import Any

import pytest

from indexer.errors import BadInput, CarError, MissingBlock
from indexer.repo.walker import index_repo
from tests.repo.repos import sample, session_cars, session_truth


class Flipper:
    """One archive in a buffer of its own, in which single bits are flipped and flipped back."""

    def __init__(self, car: bytes, truth: dict[str, Any]) -> None:
        self.did: str = truth["did"]
        self.key: str = truth["signingKey"]
        self.size = len(car)
        self._buffer = mmap.mmap(-1, len(car))
        self._buffer[:] = car

    def flip(self, position: int, bit: int) -> type[BadInput]:
        """The kind of error that one flipped bit causes."""
        self._buffer[position] ^= 1 << bit
        kind: type[BadInput] | None = None
        message = "unnoticed"
        # Not `pytest.raises`: what it keeps is a cycle that holds the whole index of a large archive.
        try:
            index_repo(self._buffer, did=self.did, key=self.key)
        except BadInput as error:
            kind, message = type(error), str(error)
        self._buffer[position] ^= 1 << bit
        assert message
        assert kind is not None, f"bit {bit} of byte {position} can be flipped unnoticed"
        return kind


@pytest.mark.parametrize("name", ["empty", "ten"])
def test_every_byte_of_a_small_archive(name: str) -> None:
    flipper = Flipper(sample(name).car, sample(name).truth)
    source = random.Random(name)
    for position in range(flipper.size):
        flipper.flip(position, source.randrange(8))


def test_every_bit_of_the_smallest_archive() -> None:
    flipper = Flipper(sample("empty").car, sample("empty").truth)
    for position in range(flipper.size * 8):
        assert flipper.flip(position // 8, position % 8) in (CarError, MissingBlock)


@pytest.mark.slow
@pytest.mark.limit(600)
@pytest.mark.parametrize(("name", "places"), [("kilo", 2000), ("big24k", 500)])
def test_many_places_of_a_larger_archive(name: str, places: int) -> None:
    flipper = Flipper(sample(name).car, sample(name).truth)
    source = random.Random(name)
    for _ in range(places):
        flipper.flip(source.randrange(flipper.size), source.randrange(8))


@pytest.mark.slow
@pytest.mark.limit(300)
def test_two_thousand_places_of_the_archives_of_the_session() -> None:
    truth = session_truth()
    source = random.Random("session")
    flippers = []
    for path in session_cars():
        car = path.read_bytes()
        flippers.append(Flipper(car, truth[index_repo(car).commit.did]))
    for _ in range(2000):
        flipper = source.choice(flippers)
        flipper.flip(source.randrange(flipper.size), source.randrange(8))
