"""One flipped bit anywhere in a real archive makes verification fail, with one of our errors."""

from __future__ import annotations

import random

import pytest

from indexer.errors import BadInput, CarError, MissingBlock
from indexer.repo.walker import index_repo
from tests.repo.repos import sample, session_cars, session_truth


def notices(car: bytes, position: int, bit: int, did: str, key: str) -> BadInput:
    damaged = bytearray(car)
    damaged[position] ^= 1 << bit
    with pytest.raises(BadInput) as caught:
        index_repo(bytes(damaged), did=did, key=key)
    assert str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", ["empty", "ten"])
def test_every_byte_of_a_small_archive(name: str) -> None:
    _, car, truth = sample(name)
    source = random.Random(name)
    for position in range(len(car)):
        notices(car, position, source.randrange(8), truth["did"], truth["signingKey"])


def test_every_bit_of_the_smallest_archive() -> None:
    _, car, truth = sample("empty")
    for position in range(len(car) * 8):
        error = notices(car, position // 8, position % 8, truth["did"], truth["signingKey"])
        assert isinstance(error, CarError | MissingBlock)


@pytest.mark.slow
@pytest.mark.limit(300)
def test_two_thousand_places_of_a_repository_of_a_thousand_records() -> None:
    _, car, truth = sample("kilo")
    source = random.Random("kilo")
    for _ in range(2000):
        notices(car, source.randrange(len(car)), source.randrange(8), truth["did"], truth["signingKey"])


@pytest.mark.slow
@pytest.mark.limit(600)
def test_two_thousand_places_of_a_large_repository() -> None:
    _, car, truth = sample("big24k")
    source = random.Random("big24k")
    for _ in range(2000):
        notices(car, source.randrange(len(car)), source.randrange(8), truth["did"], truth["signingKey"])


@pytest.mark.slow
@pytest.mark.limit(300)
def test_two_thousand_places_of_the_archives_of_the_session() -> None:
    truth = session_truth()
    source = random.Random("session")
    cars = [path.read_bytes() for path in session_cars()]
    dids = [index_repo(car).commit.did for car in cars]
    for _ in range(2000):
        number = source.randrange(len(cars))
        car, did = cars[number], dids[number]
        notices(car, source.randrange(len(car)), source.randrange(8), did, truth[did]["signingKey"])
