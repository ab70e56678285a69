"""Merging of streams."""

from __future__ import annotations

import asyncio

import pytest

from server.generation import merge


async def count(items, log, *, error=None):
    try:
        for item in items:
            await asyncio.sleep(0)
            yield item
        if error is not None:
            raise error
        log.append("ended")
    except asyncio.CancelledError:
        log.append("cancelled")
        raise


async def forever(log):
    try:
        while True:
            await asyncio.sleep(0)
            yield 0
    finally:
        log.append("closed")


async def test_all_items_come_and_each_stream_keeps_its_order():
    log = []
    items = [item async for item in merge([count("abc", log), count("xyz", log), count("", log)])]
    assert sorted(items) == list("abcxyz")
    assert [item for item in items if item < "d"] == list("abc")
    assert log == ["ended"] * 3


async def test_the_first_error_is_raised_after_the_items_before_it_and_ends_the_rest():
    log = []
    items = []

    async def read():
        async for item in merge([count("ab", log, error=LookupError()), forever(log)]):
            items.append(item)

    with pytest.raises(LookupError):
        await read()
    assert [item for item in items if item] == list("ab")
    assert log == ["closed"]


async def test_closing_ends_every_stream():
    log = []
    merged = merge([forever(log), forever(log)])
    await anext(merged)
    await merged.aclose()
    assert log == ["closed", "closed"]
