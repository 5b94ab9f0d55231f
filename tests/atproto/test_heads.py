"""Counting CBOR items by their heads."""

from __future__ import annotations

from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexer.atproto.heads import has_more_items

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64 - 1) | st.floats() | st.binary() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=40,
)


def items_of(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + sum(1 + items_of(item) for item in value.values())
    return 1 + sum(map(items_of, value)) if isinstance(value, list) else 1


@given(values)
def test_every_item_counts_once_whatever_the_nesting(value: Any) -> None:
    data, items = cbor2.dumps(value), items_of(value)
    assert has_more_items(data, items - 1)
    assert not has_more_items(data, items)


@pytest.mark.parametrize("length", [24, 256, 65_536])
def test_what_lies_in_a_string_is_no_item(length: int) -> None:
    assert not has_more_items(cbor2.dumps([b"\x80" * length, "x" * length]), 3)


@pytest.mark.parametrize("head", [b"\x9f", b"\x5f", b"\x1c"])
def test_the_count_ends_where_the_decoder_does(head: bytes) -> None:
    assert not has_more_items(head + b"\x80" * 100, 10)
