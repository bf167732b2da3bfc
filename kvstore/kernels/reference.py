"""The kernels in plain NumPy: the oracle for every other form of the same names, and what runs where there is none.

The order of the operations on one element is part of the contract, so that another form gives the same bits.
What is not said here: when an update happens, and with which numbers; see :mod:`kvstore.optim`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from kvstore.kernels import formats

Array = npt.NDArray[Any]
States = tuple[Array | None, ...]

BLOCK = 32 << 10  # elements: a few blocks fit the second-level cache
LANES = 1024  # of a sum of squares; divides BLOCK
HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


class Change(NamedTuple):
    """What every optimizer's kernel begins with: a value, and the pushes whose sum changes it.

    ``target`` becomes ``value`` changed by ``clip(scale * sum(pushes))``, element by element.

    Args:
        value: float32 or float64 (others where plain NumPy can do it).
        target: of its shape and dtype; it may be ``value``, else it overlaps nothing here.
        pushes: at least one, of its shape, of its dtype or of float16 or bfloat16 beside float32.
    """

    value: Array
    target: Array
    pushes: Sequence[Array]
    scale: float = 1.0
    clip: float = math.inf


# --- sums ---------------------------------------------------------------------------------------


def merge(arrays: Sequence[Array], out: Array) -> None:
    """``out`` = the sum of ``arrays``, folded left to right.

    Args:
        arrays: at least one, all of ``out``'s shape and dtype, with any strides.
        out: may be ``arrays[0]``, may overlap no other.

    float16 and bfloat16 are accumulated in float32 and rounded once; integers wrap in their own
    dtype; bool is the logical or.
    """
    if len(arrays) == 1:
        if arrays[0] is not out:
            np.copyto(out, arrays[0])
        return
    with np.errstate(all="ignore"):
        if out.dtype in HALVES:
            _merge_halves(arrays, out)
            return
        np.add(arrays[0], arrays[1], out=out)
        for array in arrays[2:]:
            np.add(out, array, out=out)


def merge_nontemporal(arrays: Sequence[Array], out: Array) -> None:
    """:func:`merge` for what is long enough to push out of the caches what is needed sooner, and itself as well.

    Stores that do not go through the caches spare them that, and memory is not read before it is overwritten.
    """
    merge(arrays, out)


def allreduce(arrays: Sequence[Array], out: Array, others: Sequence[Array]) -> None:
    """``out`` and each of ``others`` = the sum of ``arrays``, as :func:`merge` adds them up.

    Args:
        arrays, out: as there.
        others: of ``out``'s shape and dtype, with any strides; they may overlap the arrays, not ``out`` nor each other.
    """
    merge(arrays, out)
    for other in others:
        np.copyto(other, out)


def merge_many(groups: Sequence[Sequence[Array]], out: Array) -> None:
    """The sums of many small groups of arrays, one behind the other in ``out``, each as :func:`merge` adds it up.

    Args:
        groups: at least one; as many arrays in each, of any shape, which is the same within a group.
        out: of one dimension, with as many elements as the sums have; overlaps none of the arrays.
    """
    start = 0
    for arrays in groups:
        stop = start + arrays[0].size
        merge(arrays, out[start:stop].reshape(arrays[0].shape))
        start = stop


def _merge_halves(arrays: Sequence[Array], out: Array) -> None:
    if out.ndim != 1 or not all(array.flags.c_contiguous for array in (*arrays, out)):
        total = arrays[0].astype(np.float32)
        for array in arrays[1:]:
            total += array.astype(np.float32)
        out[...] = total.astype(out.dtype)
        return
    scratch = np.empty(min(BLOCK, out.size), np.float32)
    for start in range(0, out.size, BLOCK):
        stop = min(out.size, start + BLOCK)
        total = scratch[: stop - start]
        np.copyto(total, arrays[0][start:stop])
        for array in arrays[1:]:
            total += array[start:stop].astype(np.float32)
        out[start:stop] = total


def norm(arrays: Sequence[Array]) -> float:
    """The Euclidean norm of the sum of ``arrays`` (as :func:`merge` rounds it), in float64.

    The squares of the elements i, i + 1024, i + 2048 ... are added up in this order, then the 1024 sums.
    """
    lanes = np.zeros(LANES)
    for gradient in _sums(arrays, arrays[0].dtype):
        _add_squares(lanes, gradient)
    return _root(lanes)


def _add_squares(lanes: Array, block: Array) -> None:
    squares = block.astype(np.float64)
    squares *= squares
    whole = squares.size - squares.size % LANES
    for row in squares[:whole].reshape(-1, LANES):
        lanes += row
    lanes[: squares.size - whole] += squares[whole:]


def _root(lanes: Array) -> float:
    return math.sqrt(np.add.accumulate(lanes)[-1])


# --- optimizers ---------------------------------------------------------------------------------


def accumulate(change: Change, states: States) -> None:
    """value += gradient. Takes every dtype."""
    for w, g, _ in _blocks(change, states):
        np.add(w, g, out=w)


def sgd(
    change: Change,
    states: States,
    lr: float,
    decay: float,
    momentum: float,
    gain: float,
    nesterov: float,
    begin: float,
) -> None:
    """Gradient descent.

    Args:
        states: (momentum,) or (None,) if ``momentum`` is 0.
        decay: of the weights, added to the gradient.
        gain: of the gradient, on its way into the momentum.
        nesterov, begin: 0 or 1; ``begin``: the momentum is to begin as the gradient.
    """
    for w, g, (m,) in _blocks(change, states, decay):
        if m is not None:
            if begin:
                m[...] = g
            else:
                m *= momentum
                m += gain * g
            g = g + momentum * m if nesterov else m
        w -= lr * g


def adam(
    change: Change,
    states: States,
    rate: float,
    root: float,
    first: float,
    second: float,
    eps: float,
    decay: float,
    shrink: float,
) -> None:
    """Adam, AMSGrad and AdamW.

    Args:
        states: (mean, square, square_max), the last one None without AMSGrad.
        rate: the learning rate, corrected for the bias of the mean.
        root: what the root of ``square`` is divided by, which corrects its bias.
        first, second: the betas.
        decay: of the weights, added to the gradient.
        shrink: what the weights are multiplied by first.
    """
    for w, g, (mean, square, square_max) in _blocks(change, states, decay):
        assert mean is not None and square is not None
        w *= shrink
        mean *= first
        mean += (1 - first) * g
        square *= second
        g *= g
        g *= 1 - second
        square += g
        if square_max is not None:
            square = np.maximum(square_max, square, out=square_max)
        np.sqrt(square, out=g)
        g /= root
        g += eps
        np.divide(mean, g, out=g)
        g *= rate
        w -= g


def adagrad(change: Change, states: States, rate: float, eps: float, decay: float) -> None:
    """Adagrad. ``states``: (sum of squares,)."""
    for w, g, (total,) in _blocks(change, states, decay):
        assert total is not None
        total += g * g
        w -= rate * g / (np.sqrt(total) + eps)


def rmsprop(change: Change, states: States, lr: float, alpha: float, eps: float, decay: float, momentum: float) -> None:
    """RMSProp. ``states``: (square, momentum, mean), without momentum and if not centered with None there."""
    for w, g, (square, m, mean) in _blocks(change, states, decay):
        assert square is not None
        square *= alpha
        square += (1 - alpha) * g * g
        if mean is not None:
            mean += (1 - alpha) * (g - mean)
            square = square - mean * mean
        g /= np.sqrt(square) + eps
        if m is not None:
            m *= momentum
            m += g
            g = m
        w -= lr * g


def adadelta(change: Change, states: States, lr: float, rho: float, eps: float, decay: float) -> None:
    """Adadelta. ``states``: (square, delta)."""
    for w, g, (square, delta) in _blocks(change, states, decay):
        assert square is not None and delta is not None
        square *= rho
        square += (1 - rho) * g * g
        g *= np.sqrt(delta + eps) / np.sqrt(square + eps)
        delta *= rho
        delta += (1 - rho) * g * g
        w -= lr * g


def ftrl(change: Change, states: States, lr: float, beta: float, l1: float, l2: float) -> None:
    """FTRL-Proximal. ``states``: (z, n)."""
    for w, g, (z, n) in _blocks(change, states):
        assert z is not None and n is not None
        before = np.sqrt(n)
        n += g * g
        after = np.sqrt(n)
        z += g - (after - before) / lr * w
        shrunk = np.sign(z) * np.maximum(np.abs(z) - l1, 0)
        w[...] = -shrunk / ((beta + after) / lr + l2)


def lars(change: Change, states: States, lr: float, trust: float, eps: float, decay: float, momentum: float) -> None:
    """LARS, whose rate depends on the norms of value and gradient. ``states``: (momentum,)."""
    weights, slopes = np.zeros(LANES), np.zeros(LANES)
    for w, g, _ in _blocks(change, states):
        _add_squares(weights, w)
        _add_squares(slopes, g)
    length, slope = _root(weights), _root(slopes)
    if length > 0 and slope > 0:
        lr *= trust * length / (slope + decay * length + eps)
    for w, g, (m,) in _blocks(change, states, decay):
        assert m is not None
        m *= momentum
        m += lr * g
        w -= m


def lamb(
    change: Change,
    states: States,
    lr: float,
    unbias: float,
    root: float,
    first: float,
    second: float,
    eps: float,
    decay: float,
) -> None:
    """LAMB, whose rate depends on the norms of value and step. ``states``: (mean, square).

    Args:
        unbias, root: what the mean and the root of the square are divided by.
        first, second: the betas.
    """

    def step(w: Array, mean: Array, square: Array) -> Array:
        u: Array = mean / unbias / (np.sqrt(square) / root + eps)
        u += decay * w
        return u

    weights, steps = np.zeros(LANES), np.zeros(LANES)
    for w, g, (mean, square) in _blocks(change, states):
        assert mean is not None and square is not None
        mean *= first
        mean += (1 - first) * g
        square *= second
        square += (1 - second) * g * g
        _add_squares(weights, w)
        _add_squares(steps, step(w, mean, square))
    length, way = _root(weights), _root(steps)
    if length > 0 and way > 0:
        lr *= length / way
    for w, _, (mean, square) in _blocks(change, states):
        assert mean is not None and square is not None
        w -= lr * step(w, mean, square)


def _blocks(change: Change, states: States, decay: float = 0.0) -> Iterator[tuple[Array, Array, States]]:
    """Block by block: the target (which holds the value), the gradient (which is scratch), the states."""
    with np.errstate(all="ignore"):
        target = _flat(change.target)
        values = target if change.value is change.target else _flat(change.value)
        flats = [state if state is None else _flat(state) for state in states]
        start = 0
        for g in _sums(change.pushes, target.dtype):
            part = slice(start, start + g.size)
            start += g.size
            w = target[part]
            if values is not target:
                w[...] = values[part]
            if change.scale != 1.0:
                g *= change.scale
            if change.clip != math.inf:
                np.clip(g, -change.clip, change.clip, out=g)
            if decay:
                g += decay * w
            yield w, g, tuple([flat if flat is None else flat[part] for flat in flats])
        for array, flat in zip((change.target, *states), (target, *flats), strict=True):
            if array is not None and flat is not None and not np.may_share_memory(array, flat):
                array[...] = flat.reshape(array.shape)


def _sums(pushes: Sequence[Array], dtype: np.dtype[Any]) -> Iterator[Array]:
    """The sum of the pushes as :func:`merge` rounds it, then in ``dtype``, in blocks that the caller may change."""
    flats = [_flat(push) for push in pushes]
    for start in range(0, flats[0].size, BLOCK):
        blocks = [flat[start : start + BLOCK] for flat in flats]
        merged = np.empty_like(blocks[0])
        merge(blocks, merged)
        yield merged.astype(dtype, copy=False)


def _flat(array: Array) -> Array:
    """Its elements in C order; a copy if they do not lie so."""
    return array.reshape(-1)


# --- other --------------------------------------------------------------------------------------


def cast(source: Array, target: Array) -> None:
    """``target`` = ``source`` in its dtype, rounded to nearest even; of one shape."""
    with np.errstate(all="ignore"):
        np.copyto(target, source, casting="unsafe")


def broadcast(source: Array, outs: Sequence[Array]) -> None:
    """Each of ``outs`` = ``source``, in C order; all of as many elements, of one dtype, overlapping nothing."""
    for out in outs:
        np.copyto(out, source.reshape(out.shape))


def concatenate(arrays: Sequence[Array], out: Array) -> None:
    """``out`` = the elements of ``arrays``, each in C order, one array behind the other.

    Args:
        arrays: at least one, of any shapes and strides, all of ``out``'s dtype.
        out: of one dimension, with as many elements as all of them; overlaps none.
    """
    np.concatenate(arrays, axis=None, out=out)


def split(source: Array, outs: Sequence[Array]) -> None:
    """The reverse of :func:`concatenate`: each of ``outs`` = the next elements of ``source``, of one dimension."""
    start = 0
    for out in outs:
        stop = start + out.size
        np.copyto(out, source[start:stop].reshape(out.shape))
        start = stop


def gather(source: Array, row_ids: Array, out: Array) -> None:
    """``out[i] = source[row_ids[i]]``.

    Args:
        source: rows of any shape.
        row_ids: int64.
        out: as many rows as ids; overlaps nothing.

    Raises:
        IndexError: an id that is no row; nothing is written.
    """
    check_rows(source, row_ids)
    np.take(source, row_ids, axis=0, out=out, mode="clip")


def scatter_add(target: Array, row_ids: Array, rows: Array) -> None:
    """``target[row_ids[i]] += rows[i]``, one after the other: an id that comes twice is added twice.

    Args:
        target: rows of any shape; float16 and bfloat16 are rounded at every addition.
        row_ids: int64, in any order.
        rows: one per id, of ``target``'s dtype.

    Raises:
        IndexError: an id that is no row; nothing is written.
    """
    check_rows(target, row_ids)
    with np.errstate(all="ignore"):
        np.add.at(target, row_ids, rows)


def deduplicate(row_ids: Array, rows: Array) -> tuple[Array, Array]:
    """The different ``row_ids``, ascending, and for each the sum of its rows, in new arrays.

    Args:
        row_ids: int64, in any order.
        rows: of any shape, one per id. Those of one id are added up one after the other, as :func:`scatter_add` does.
    """
    order = np.argsort(row_ids, kind="stable")
    ids = row_ids[order]
    first = np.ones(ids.size, np.bool_)
    np.not_equal(ids[1:], ids[:-1], out=first[1:])
    sums = rows[order[first]]
    with np.errstate(all="ignore"):
        np.add.at(sums, (np.cumsum(first) - 1)[~first], rows[order[~first]])
    return ids[first], sums


def check_rows(array: Array, row_ids: Array) -> None:
    """Raises IndexError when an id is no row of ``array``."""
    if row_ids.size and (row_ids.min() < 0 or row_ids.max() >= len(array)):
        wrong = row_ids[(row_ids < 0) | (row_ids >= len(array))][0]
        raise IndexError(f"row ids: expected 0..{len(array) - 1}, got {wrong}")


# --- compression --------------------------------------------------------------------------------
#
# What is sent is a gradient with few bits per element; what that loses stays in a residual, and is added to the next
# one. `gradient`: float32, float16 or bfloat16, of any shape. `residual`: float32, as large, begins with zeros. `out`
# and `codes`: uint8, of as many bytes as the format says. What is no number in a gradient is none after decompression.


def quantize_2bit(gradient: Array, residual: Array, threshold: float, out: Array) -> None:
    """Elements of at least ``threshold`` become that, with their sign; others zero. With error feedback.

    MXNet's scheme; Strom, "Scalable distributed DNN training using commodity GPU cloud computing", Interspeech 2015.
    """
    if not threshold > 0:
        raise ValueError(f"quantize_2bit: expected a threshold above 0, got {threshold}")
    high = np.float32(threshold)
    for values, rest, words in _compensated(formats.TWO_BIT, gradient, residual, out):
        some, minus = (values >= high) | (values <= -high), ~(values > -high)
        words[:, 0], words[:, 1] = _packed(some)[:, 0], _packed(minus)[:, 0]
        rest[...] = values - np.where(some, np.where(minus, -high, high), np.float32(0))


def dequantize_2bit(codes: Array, threshold: float, out: Array) -> None:
    """The reverse of :func:`quantize_2bit`; ``out``: float32."""
    high = np.float32(threshold)
    words = _words(formats.TWO_BIT, codes, out)
    some, minus = _unpacked(words[:, :1]), _unpacked(words[:, 1:])
    values = np.where(some, np.where(minus, -high, high), np.where(minus, np.float32(np.nan), np.float32(0)))
    _put(values, out)


def quantize_1bit(gradient: Array, residual: Array, out: Array) -> None:
    """The sign of each element, and for each block the mean of their magnitudes. With error feedback.

    Seide et al., "1-bit stochastic gradient descent", Interspeech 2014, which has two means per column; one mean of the
    magnitudes is from Karimireddy et al., "Error feedback fixes SignSGD", ICML 2019, algorithm 1, here per block. The
    magnitudes of its elements i, i + 32, i + 64 ... are added up in this order; then the second half of the 32 sums to
    the first, until one is left.
    """
    block, at = formats.ONE_BIT.block, 0
    for values, rest, words in _compensated(formats.ONE_BIT, gradient, residual, out):
        sums = np.zeros((len(values), 32), np.float32)
        for row in np.abs(values).reshape(len(values), -1, 32).swapaxes(0, 1):
            sums += row
        while sums.shape[1] > 1:
            half = sums.shape[1] // 2
            sums = sums[:, :half] + sums[:, half:]
        counts = np.minimum(block, residual.size - at - block * np.arange(len(values)))
        scale = sums / counts.astype(np.float32)[:, None]
        minus = values < 0
        words[:, :1], words[:, 1:] = _number_bits(scale), _packed(minus)
        rest[...] = values - np.where(minus, -scale, scale)
        at += values.size


def dequantize_1bit(codes: Array, out: Array) -> None:
    """The reverse of :func:`quantize_1bit`; ``out``: float32."""
    words = _words(formats.ONE_BIT, codes, out)
    scale = words[:, :1].view(np.float32)
    _put(np.where(_unpacked(words[:, 1:]), -scale, scale), out)


def quantize_int8(gradient: Array, residual: Array, out: Array) -> None:
    """Each element as a multiple, -127 to 127, of its block's scale. With error feedback.

    The scale is the largest magnitude by 127. An element times 127 by that magnitude is rounded to nearest even.
    """
    for values, rest, words in _compensated(formats.INT8, gradient, residual, out):
        largest = (values.view(np.uint32) & 0x7FFFFFFF).max(1, keepdims=True).view(np.float32)  # what is no number wins
        scale, inverse = largest / np.float32(127), np.float32(127) / largest
        scale[inverse == math.inf] = 0  # of what is nearly nothing
        scale[~np.isfinite(scale)] = np.nan
        steps = np.rint(values * inverse) + np.float32(0)  # no zero below zero, since a byte has none
        steps = np.where(scale > 0, steps, np.float32(0))
        words[:, :1], words[:, 1:] = _number_bits(scale), steps.astype(np.int8).view(np.uint32)
        rest[...] = values - steps * scale


def dequantize_int8(codes: Array, out: Array) -> None:
    """The reverse of :func:`quantize_int8`; ``out``: float32."""
    words = _words(formats.INT8, codes, out)
    steps = words[:, 1:].copy().view(np.int8).astype(np.float32)
    with np.errstate(all="ignore"):
        _put(steps * words[:, :1].view(np.float32), out)


def _compensated(
    format: formats.Format, gradient: Array, residual: Array, out: Array
) -> Iterator[tuple[Array, Array, Array]]:
    """Some blocks, in rows: gradient and residual together, room for the rest, and for the words of the codes.

    The last block is padded with zeros.
    """
    check_compensated(format, gradient, residual)
    with np.errstate(all="ignore"):
        g, r = _flat(gradient), _flat(residual)
        for start in range(0, r.size, BLOCK):
            part = slice(start, min(start + BLOCK, r.size))
            size = part.stop - start
            rows = -(-size // format.block)
            values, rest = np.zeros((2, rows * format.block), np.float32)
            np.add(g[part].astype(np.float32), r[part], out=values[:size])
            words = np.empty((rows, format.block_words), np.uint32)
            yield values.reshape(rows, -1), rest.reshape(rows, -1), words
            r[part] = rest[:size]
            begin = format.nbytes(start)
            out[begin : begin + format.nbytes(size)] = words.view(np.uint8).reshape(-1)[: format.nbytes(size)]
        if not np.may_share_memory(r, residual):
            residual[...] = r.reshape(residual.shape)


def _packed(mask: Array) -> Array:
    """Bit i of a word says whether the i-th of 32 is true."""
    return np.packbits(mask, axis=1, bitorder="little").view(np.uint32)


def _unpacked(words: Array) -> Array:
    return np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little").view(np.bool_)


def _number_bits(scale: Array) -> Array:
    """Of float32; of what is no number always the same."""
    bits: Array = np.where(np.isnan(scale), np.uint32(0x7FC00000), scale.view(np.uint32))
    return bits


def _words(format: formats.Format, codes: Array, out: Array) -> Array:
    """The words of the codes, a row for each block, padded."""
    check_decompressed(format, out)
    rows = -(-out.size // format.block)
    words = np.zeros((rows, format.block_words), np.uint32)
    words.view(np.uint8).reshape(-1)[: codes.size] = codes
    return words


def _put(values: Array, out: Array) -> None:
    out[...] = values.reshape(-1)[: out.size].reshape(out.shape)


def check_compensated(format: formats.Format, gradient: Array, residual: Array) -> None:
    """Raises TypeError if these are not compressed."""
    if gradient.dtype not in (np.float32, *HALVES) or residual.dtype != np.float32:
        raise TypeError(
            f"{format.name}: expected gradients of float32, float16 or bfloat16 and float32 residuals, "
            f"got {gradient.dtype} and {residual.dtype}"
        )


def check_decompressed(format: formats.Format, out: Array) -> None:
    """Raises TypeError if that is not what comes out."""
    if out.dtype != np.float32:
        raise TypeError(f"{format.name}: expected to decompress into float32, got {out.dtype}")
