"""Ranges of elements of an array as blocks of it. Pure."""

from __future__ import annotations

from collections.abc import Iterator


def blocks(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[slice, ...]]:
    """The elements ``start`` to ``stop``, counted in C order, as blocks of an array of that shape, in this order."""
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    row = 1
    for length in shape[1:]:
        row *= length
    first, last = -(-start // row), stop // row  # the rows that are in it whole
    if first > last:  # it is within one row
        yield from _within(shape, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _within(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (slice(first, last), *[slice(None)] * (len(shape) - 1))
    if last * row < stop:
        yield from _within(shape, last, 0, stop - last * row)


def _within(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[tuple[slice, ...]]:
    for index in blocks(shape[1:], start, stop):
        yield (slice(row, row + 1), *index)
