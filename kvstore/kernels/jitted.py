"""The kernels as loops for Numba. Imported by :mod:`kvstore.kernels.loader` only, when it is time to.

Plain functions of flat arrays, compiled one by one for the types of :data:`SIGNATURES`. All of them release the
GIL, for the whole of an array: to take it again for every block would mean to wait for whoever computes in Python.

* No fast-math and no ``parallel=True``: same bits as :mod:`kvstore.kernels.reference`, and threads are the engine's.
* Pushes come as the first of them and a table of the addresses of all, so that one kernel serves any number;
  the table is empty when there is one.
* Work goes in blocks that fit the first-level cache (those of optimizers the second), so that memory is read and
  written once.
* Numba has no float16 and bfloat16 on CPUs: uint16 stands for the bits of one, int16 for those of the other.
* Everything is in this one file, because Numba's cache looks at the time of the file that holds the kernel.

Loops with a choice inside are written out once per choice, and count from 0: only simple loops become vector
instructions.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic, overload, register_jitable
from numba.np.numpy_support import from_dtype

BLOCK = 1024  # elements: measured, with larger ones the processor is less far ahead of the loops
UPDATE = 8 << 10  # the same where optimizers are at work, whose blocks cost more to begin
LANES = 1024  # as in the reference; divides both

LINE = 64  # bytes that the caches handle as one
STEPS = 256  # elements of a block of int8, as in formats.py; that of 1bit is BLOCK
FEW = 64  # elements that are sorted by insertion
DIGIT = 11  # bits that are sorted by at one time
DIGITS = np.uint64((1 << DIGIT) - 1)
STREAMED = 1 << 20  # bytes: smaller copies stay in the caches for whoever reads them

inlined = register_jitable(error_model="numpy")


# --- bits ---------------------------------------------------------------------------------------


@intrinsic
def _half_to_float(context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _float_to_half(context: Any, number: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def _brain_to_float(context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(arguments[0], word), word(16)), ir.FloatType())

    return types.float32(types.int16), generate


@intrinsic
def _float_to_brain(context: Any, number: Any) -> Any:
    """Add half of the last place that stays, and a little more if that one is odd; what is no number stays none."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        rounded = builder.add(bits, builder.add(odd, word(0x7FFF)))
        quiet = builder.or_(bits, word(0x400000))
        is_number = builder.fcmp_ordered("ord", arguments[0], arguments[0])
        return builder.trunc(builder.lshr(builder.select(is_number, rounded, quiet), word(16)), ir.IntType(16))

    return types.int16(types.float32), generate


@intrinsic
def _pointer(context: Any, address: Any, like: Any) -> Any:
    """``address`` as a pointer to elements of the array ``like``."""
    pointer = types.CPointer(like.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(types.int64, like), generate


@intrinsic
def _stream(context: Any, source: Any, target: Any) -> Any:
    """Copy 64 bytes past the caches: memory is not read before it is overwritten. ``target`` is a multiple of 64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line = ir.VectorType(ir.IntType(8), LINE)
        source, target = (builder.inttoptr(address, line.as_pointer()) for address in arguments)
        loaded = builder.load(source)
        loaded.align = 1
        store = builder.store(loaded, target)
        store.align = LINE
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _number_of(context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


def _mask(ordered: bool, comparison: str) -> Any:
    """Bit i says of the i-th of the 32 float32 at an address how it compares with a number."""

    @intrinsic
    def mask(context: Any, address: Any, number: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            vector = ir.VectorType(ir.FloatType(), 32)
            loaded = builder.load(builder.inttoptr(arguments[0], vector.as_pointer()))
            loaded.align = 4
            numbers = ir.Constant(vector, ir.Undefined)
            for lane in range(32):
                numbers = builder.insert_element(numbers, arguments[1], ir.Constant(ir.IntType(32), lane))
            compare = builder.fcmp_ordered if ordered else builder.fcmp_unordered
            return builder.bitcast(compare(comparison, loaded, numbers), ir.IntType(32))

        return types.uint32(types.int64, types.float32), generate

    return mask


_at_least, _at_most, _below = _mask(True, ">="), _mask(True, "<="), _mask(True, "<")
_not_above = _mask(False, "<=")  # or no number


@inlined
def _copy_past_caches(source: Any, target: Any) -> None:
    """But for what begins or ends within a line. To be followed by a :func:`_fence`."""
    size, lines_of = target.size, LINE // target.itemsize
    head = min(size, (-target.ctypes.data % LINE) // target.itemsize)
    if (target.ctypes.data + head * target.itemsize) % LINE:
        head = size  # its elements lie across lines
    lines = (size - head) // lines_of
    for i in range(head):
        target[i] = source[i]
    for line in range(lines):
        at = (head + line * lines_of) * target.itemsize
        _stream(source.ctypes.data + at, target.ctypes.data + at)
    done = head + lines * lines_of
    rest, left = source[done:], target[done:]
    for i in range(rest.size):
        left[i] = rest[i]


@intrinsic
def _fence(context: Any) -> Any:
    """What was streamed is there for all to see."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


def _wide(x: Any) -> Any:
    """An element in the type in which it is added up."""


@overload(_wide, strict=False)
def _wide_of(x: Any) -> Any:
    if x == types.uint16:
        return lambda x: _half_to_float(x)
    if x == types.int16:
        return lambda x: _brain_to_float(x)
    return lambda x: x


def _narrow(x: Any, like: Any) -> Any:
    """Back from there: rounded to the type of ``like``."""


@overload(_narrow, strict=False)
def _narrow_to(x: Any, like: Any) -> Any:
    if like == types.uint16:
        return lambda x, like: _float_to_half(x)
    if like == types.int16:
        return lambda x, like: _float_to_brain(x)
    return lambda x, like: x


def _scratch(like: Any) -> Any:
    """A block of what elements of the array ``like`` are added up in."""


@overload(_scratch, strict=False)
def _scratch_of(like: Any) -> Any:
    if like.dtype in (types.uint16, types.int16):
        return lambda like: np.empty(BLOCK, np.float32)
    return lambda like: np.empty(BLOCK, like.dtype)


# --- sums ---------------------------------------------------------------------------------------


@inlined
def _add_up(first: Any, table: Any, start: Any, total: Any) -> None:
    """``total`` = the sum of the pushes' elements from ``start`` on, not rounded yet."""
    size, count = total.size, table.size
    if count == 0:
        a = first[start : start + size]
        for i in range(size):
            total[i] = _wide(a[i])
        return
    b, c = _block(table[0], first, start, size), _block(table[1], first, start, size)
    if count < 4:
        for i in range(size):
            total[i] = _wide(b[i]) + _wide(c[i])
    else:  # fewer passes over the total, and more of the memory's banks at work at one time
        d, e = _block(table[2], first, start, size), _block(table[3], first, start, size)
        for i in range(size):
            total[i] = _wide(b[i]) + _wide(c[i]) + _wide(d[i]) + _wide(e[i])
    for k in range(4 if count >= 4 else 2, count, 2):
        f = _block(table[k], first, start, size)
        if k + 1 == count:
            for i in range(size):
                total[i] += _wide(f[i])
        else:
            g = _block(table[k + 1], first, start, size)
            for i in range(size):
                total[i] = total[i] + _wide(f[i]) + _wide(g[i])


@inlined
def _block(address: Any, first: Any, start: Any, size: Any) -> Any:
    """The elements from ``start`` on of the array at ``address``, which is one like ``first``."""
    return carray(_pointer(address + start * first.itemsize, first), size)


@inlined
def _merged(first: Any, table: Any, start: Any, total: Any) -> None:
    """``total`` = the sum, rounded to the type of the pushes."""
    _add_up(first, table, start, total)
    if table.size:
        for i in range(total.size):
            total[i] = _wide(_narrow(total[i], first[0]))


def _rounds(first: Any) -> Any:
    """Has a sum of the pushes to be rounded to their type?"""


@overload(_rounds, strict=False)
def _rounds_of(first: Any) -> Any:
    halves = first.dtype in (types.uint16, types.int16)
    return lambda first: halves


def merge(out: Any, first: Any, table: Any) -> None:
    if not _rounds(first) and table.size and table[0] != out.ctypes.data:
        for start in range(0, out.size, BLOCK):
            _add_up(first, table, start, out[start : min(out.size, start + BLOCK)])
        return
    scratch = _scratch(out)  # also for a sum in place: loops whose arrays overlap do not become vector instructions
    for start in range(0, out.size, BLOCK):
        stop = min(out.size, start + BLOCK)
        total = scratch[: stop - start]
        _add_up(first, table, start, total)
        part = out[start:stop]
        for i in range(part.size):
            part[i] = _narrow(total[i], first[0])


def add(out: Any, a: Any, b: Any) -> None:
    for i in range(out.size):
        out[i] = _narrow(_wide(a[i]) + _wide(b[i]), a[0])


def merge_many(out: Any, table: Any, sizes: Any) -> None:
    scratch, count, end = _scratch(out), table.size // sizes.size, 0
    for k in range(sizes.size):
        pushes, begin = table[k * count : (k + 1) * count], end
        end += sizes[k]
        for start in range(begin, end, BLOCK):
            total = scratch[: min(BLOCK, end - start)]
            _add_up(out, pushes, start - begin, total)
            part = out[start : start + total.size]
            for i in range(part.size):
                part[i] = _narrow(total[i], out[0])


def allreduce(targets: Any, first: Any, table: Any) -> None:
    scratch, rounded = _scratch(first), np.empty(BLOCK, first.dtype)
    streamed = first.size * first.itemsize >= STREAMED
    for start in range(0, first.size, BLOCK):
        size = min(BLOCK, first.size - start)
        total, part = scratch[:size], rounded[:size]
        _add_up(first, table, start, total)
        for i in range(size):
            part[i] = _narrow(total[i], first[0])
        for k in range(targets.size):
            target = _block(targets[k], first, start, size)
            if streamed:
                _copy_past_caches(part, target)
            else:
                for i in range(size):
                    target[i] = part[i]
    if streamed:
        _fence()


@inlined
def _add_squares(lanes: Any, block: Any) -> None:
    for start in range(0, block.size, LANES):
        row = block[start : start + LANES]
        for i in range(row.size):
            x = np.float64(row[i])
            lanes[i] += x * x


@inlined
def _root(lanes: Any, size: Any) -> Any:
    """Of the sums of the squares of ``size`` elements; one after the other takes its time."""
    total = 0.0
    for i in range(min(LANES, size)):
        total += lanes[i]
    return math.sqrt(total)


def norm(first: Any, table: Any) -> Any:
    lanes, scratch = np.zeros(LANES), _scratch(first)
    for start in range(0, first.size, BLOCK):
        block = scratch[: min(BLOCK, first.size - start)]
        _merged(first, table, start, block)
        _add_squares(lanes, block)
    return _root(lanes, first.size)


# --- optimizers ---------------------------------------------------------------------------------


@inlined
def _is_ready(target: Any, value: Any, first: Any, table: Any, scale: Any, clip: Any, decay: Any) -> Any:
    """Is the gradient the only push, as it came, and the value where it is to be?

    Pushes have the target's type or that of a half: where they are as wide, they are the same.
    """
    return (
        table.size == 0 and first.itemsize == target.itemsize and value.ctypes.data == target.ctypes.data
        and scale == 1.0 and clip == math.inf and decay == 0.0
    )  # fmt: skip


@inlined
def _begin(
    target: Any, value: Any, first: Any, table: Any, scale: Any, clip: Any, decay: Any, scratch: Any, start: Any,
    ready: Any,
) -> Any:  # fmt: skip
    """A block of the target, which holds the value, and the gradient there, to be read only."""
    real = target.dtype.type
    size = min(UPDATE, target.size - start)
    w, old = target[start : start + size], value[start : start + size]
    if ready:
        return w, _block(first.ctypes.data, scratch, start, size)
    if old.ctypes.data != w.ctypes.data:
        for i in range(size):
            w[i] = old[i]
    g = _block(scratch.ctypes.data, scratch, 0, size)
    _merged(first, table, start, g)
    if scale != 1.0:
        factor = real(scale)
        for i in range(size):
            g[i] *= factor
    if clip != math.inf:
        high = real(clip)
        low = -high
        for i in range(size):
            g[i] = high if g[i] > high else low if g[i] < low else g[i]
    if decay != 0.0:
        share = real(decay)
        for i in range(size):
            g[i] += share * w[i]
    return w, g


def accumulate(target: Any, value: Any, first: Any, table: Any, scale: Any, clip: Any) -> None:
    scratch = np.empty(UPDATE, target.dtype)
    ready = _is_ready(target, value, first, table, scale, clip, 0.0)
    for start in range(0, target.size, UPDATE):
        w, g = _begin(target, value, first, table, scale, clip, 0.0, scratch, start, ready)
        for i in range(w.size):
            w[i] += g[i]


def sgd(
    target: Any, value: Any, first: Any, table: Any, scale: Any, clip: Any,
    state: Any, lr: Any, decay: Any, momentum: Any, gain: Any, nesterov: Any, begin: Any,
) -> None:  # fmt: skip
    real, scratch = target.dtype.type, np.empty(UPDATE, target.dtype)
    rate, keep, share = real(lr), real(momentum), real(gain)
    ready = _is_ready(target, value, first, table, scale, clip, decay)
    for start in range(0, target.size, UPDATE):
        w, g = _begin(target, value, first, table, scale, clip, decay, scratch, start, ready)
        if state.size == 0:
            for i in range(w.size):
                w[i] -= rate * g[i]
            continue
        m = state[start : start + w.size]
        if begin != 0.0:
            for i in range(w.size):
                m[i] = g[i]
        if nesterov != 0.0:
            if begin == 0.0:
                for i in range(w.size):
                    m[i] = m[i] * keep + share * g[i]
            for i in range(w.size):
                w[i] -= rate * (g[i] + keep * m[i])
        elif begin != 0.0:
            for i in range(w.size):
                w[i] -= rate * m[i]
        else:
            for i in range(w.size):
                m[i] = m[i] * keep + share * g[i]
                w[i] -= rate * m[i]


def adam(
    target: Any, value: Any, first: Any, table: Any, scale: Any, clip: Any,
    mean: Any, square: Any, square_max: Any,
    rate: Any, root: Any, beta1: Any, beta2: Any, eps: Any, decay: Any, shrink: Any,
) -> None:  # fmt: skip
    real, scratch = target.dtype.type, np.empty(UPDATE, target.dtype)
    lr, divisor, small, kept = real(rate), real(root), real(eps), real(shrink)
    b1, b2, c1, c2 = real(beta1), real(beta2), real(1 - beta1), real(1 - beta2)
    ready = _is_ready(target, value, first, table, scale, clip, decay)
    for start in range(0, target.size, UPDATE):
        w, g = _begin(target, value, first, table, scale, clip, decay, scratch, start, ready)
        m, v = mean[start : start + w.size], square[start : start + w.size]
        if square_max.size == 0:
            for i in range(w.size):
                m[i] = m[i] * b1 + c1 * g[i]
                v[i] = v[i] * b2 + g[i] * g[i] * c2
                w[i] = w[i] * kept - m[i] / (math.sqrt(v[i]) / divisor + small) * lr
        else:
            top = square_max[start : start + w.size]
            for i in range(w.size):
                m[i] = m[i] * b1 + c1 * g[i]
                v[i] = v[i] * b2 + g[i] * g[i] * c2
            for i in range(w.size):
                top[i] = v[i] if v[i] > top[i] or v[i] != v[i] else top[i]
                w[i] = w[i] * kept - m[i] / (math.sqrt(top[i]) / divisor + small) * lr


def adagrad(
    target: Any, value: Any, first: Any, table: Any, scale: Any, clip: Any,
    total: Any, rate: Any, eps: Any, decay: Any,
) -> None:  # fmt: skip
    real, scratch = target.dtype.type, np.empty(UPDATE, target.dtype)
    lr, small = real(rate), real(eps)
    ready = _is_ready(target, value, first, table, scale, clip, decay)
    for start in range(0, target.size, UPDATE):
        w, g = _begin(target, value, first, table, scale, clip, decay, scratch, start, ready)
        s = total[start : start + w.size]
        for i in range(w.size):
            s[i] += g[i] * g[i]
            w[i] -= lr * g[i] / (math.sqrt(s[i]) + small)


def rmsprop(
    target: Any, value: Any, first: Any, table: Any, scale: Any, clip: Any,
    square: Any, momentum: Any, mean: Any, lr: Any, alpha: Any, eps: Any, decay: Any, keep: Any,
) -> None:  # fmt: skip
    real, scratch = target.dtype.type, np.empty(UPDATE, target.dtype)
    rate, small, mu, a, b = real(lr), real(eps), real(keep), real(alpha), real(1 - alpha)
    ways = np.empty(UPDATE, target.dtype)
    ready = _is_ready(target, value, first, table, scale, clip, decay)
    for start in range(0, target.size, UPDATE):
        w, g = _begin(target, value, first, table, scale, clip, decay, scratch, start, ready)
        s, way = square[start : start + w.size], ways[: w.size]
        if mean.size == 0:
            for i in range(w.size):
                s[i] = s[i] * a + b * g[i] * g[i]
                way[i] = g[i] / (math.sqrt(s[i]) + small)
        else:
            c = mean[start : start + w.size]
            for i in range(w.size):
                s[i] = s[i] * a + b * g[i] * g[i]
                c[i] += b * (g[i] - c[i])
                way[i] = g[i] / (math.sqrt(s[i] - c[i] * c[i]) + small)
        if momentum.size == 0:
            for i in range(w.size):
                w[i] -= rate * way[i]
        else:
            m = momentum[start : start + w.size]
            for i in range(w.size):
                m[i] = m[i] * mu + way[i]
                w[i] -= rate * m[i]


def adadelta(
    target: Any, value: Any, first: Any, table: Any, scale: Any, clip: Any,
    square: Any, delta: Any, lr: Any, rho: Any, eps: Any, decay: Any,
) -> None:  # fmt: skip
    real, scratch = target.dtype.type, np.empty(UPDATE, target.dtype)
    rate, small, a, b = real(lr), real(eps), real(rho), real(1 - rho)
    ready = _is_ready(target, value, first, table, scale, clip, decay)
    for start in range(0, target.size, UPDATE):
        w, g = _begin(target, value, first, table, scale, clip, decay, scratch, start, ready)
        s, d = square[start : start + w.size], delta[start : start + w.size]
        for i in range(w.size):
            s[i] = s[i] * a + b * g[i] * g[i]
            way = g[i] * (math.sqrt(d[i] + small) / math.sqrt(s[i] + small))
            d[i] = d[i] * a + b * way * way
            w[i] -= rate * way


def ftrl(
    target: Any, value: Any, first: Any, table: Any, scale: Any, clip: Any,
    zs: Any, ns: Any, lr: Any, beta: Any, l1: Any, l2: Any,
) -> None:  # fmt: skip
    real, scratch = target.dtype.type, np.empty(UPDATE, target.dtype)
    rate, smooth, bar, ridge, nothing, one = real(lr), real(beta), real(l1), real(l2), real(0), real(1)
    ready = _is_ready(target, value, first, table, scale, clip, 0.0)
    for start in range(0, target.size, UPDATE):
        w, g = _begin(target, value, first, table, scale, clip, 0.0, scratch, start, ready)
        z, n = zs[start : start + w.size], ns[start : start + w.size]
        for i in range(w.size):
            before = math.sqrt(n[i])
            n[i] += g[i] * g[i]
            after = math.sqrt(n[i])
            z[i] += g[i] - (after - before) / rate * w[i]
            over = abs(z[i]) - bar
            sign = one if z[i] > nothing else -one if z[i] < nothing else z[i]
            w[i] = -(sign * (nothing if over < nothing else over)) / ((smooth + after) / rate + ridge)


def lars(
    target: Any, value: Any, first: Any, table: Any, scale: Any, clip: Any,
    state: Any, lr: Any, trust: Any, eps: Any, decay: Any, momentum: Any,
) -> None:  # fmt: skip
    real, scratch = target.dtype.type, np.empty(UPDATE, target.dtype)
    weights, slopes = np.zeros(LANES), np.zeros(LANES)
    ready = _is_ready(target, value, first, table, scale, clip, 0.0)
    for start in range(0, target.size, UPDATE):
        w, g = _begin(target, value, first, table, scale, clip, 0.0, scratch, start, ready)
        _add_squares(weights, w)
        _add_squares(slopes, g)
    length, slope = _root(weights, target.size), _root(slopes, target.size)
    if length > 0 and slope > 0:
        lr = lr * (trust * length / (slope + decay * length + eps))
    rate, keep = real(lr), real(momentum)
    ready = _is_ready(target, value, first, table, scale, clip, decay)
    for start in range(0, target.size, UPDATE):
        w, g = _begin(target, value, first, table, scale, clip, decay, scratch, start, ready)
        m = state[start : start + w.size]
        for i in range(w.size):
            m[i] = m[i] * keep + rate * g[i]
            w[i] -= m[i]


def lamb(
    target: Any, value: Any, first: Any, table: Any, scale: Any, clip: Any,
    mean: Any, square: Any,
    lr: Any, unbias: Any, root: Any, beta1: Any, beta2: Any, eps: Any, decay: Any,
) -> None:  # fmt: skip
    real, scratch = target.dtype.type, np.empty(UPDATE, target.dtype)
    bias, divisor, small, share = real(unbias), real(root), real(eps), real(decay)
    b1, b2, c1, c2 = real(beta1), real(beta2), real(1 - beta1), real(1 - beta2)
    weights, steps, ways = np.zeros(LANES), np.zeros(LANES), np.empty(UPDATE, target.dtype)
    ready = _is_ready(target, value, first, table, scale, clip, 0.0)
    for start in range(0, target.size, UPDATE):
        w, g = _begin(target, value, first, table, scale, clip, 0.0, scratch, start, ready)
        m, v, u = mean[start : start + w.size], square[start : start + w.size], ways[: w.size]
        for i in range(w.size):
            m[i] = m[i] * b1 + c1 * g[i]
            v[i] = v[i] * b2 + c2 * g[i] * g[i]
            u[i] = m[i] / bias / (math.sqrt(v[i]) / divisor + small) + share * w[i]
        _add_squares(weights, w)
        _add_squares(steps, u)
    length, way = _root(weights, target.size), _root(steps, target.size)
    if length > 0 and way > 0:
        lr = lr * (length / way)
    rate = real(lr)
    for start in range(0, target.size, UPDATE):
        stop = min(target.size, start + UPDATE)
        w, m, v = target[start:stop], mean[start:stop], square[start:stop]
        for i in range(w.size):
            w[i] -= rate * (m[i] / bias / (math.sqrt(v[i]) / divisor + small) + share * w[i])


# --- other --------------------------------------------------------------------------------------


def widen(source: Any, target: Any) -> None:
    for i in range(source.size):
        target[i] = _wide(source[i])


def narrow(source: Any, target: Any) -> None:
    for i in range(source.size):
        target[i] = _narrow(source[i], target[0])


def broadcast(source: Any, table: Any) -> None:
    for k in range(table.size):
        target = _block(table[k], source, 0, source.size)
        if source.size >= STREAMED:
            _copy_past_caches(source, target)
        else:
            for i in range(target.size):
                target[i] = source[i]
    if source.size >= STREAMED:
        _fence()


def split(source: Any, table: Any, sizes: Any) -> None:
    start = 0
    for k in range(table.size):
        part, target = source[start : start + sizes[k]], _block(table[k], source, 0, sizes[k])
        for i in range(part.size):
            target[i] = part[i]
        start += sizes[k]


def locate(table: Any, at: Any, a: Any, b: Any, c: Any, d: Any) -> None:
    """The addresses of four arrays, or of as many as there is room for, into a table; NumPy needs 1 us for one."""
    left = table[at:]
    for i, array in enumerate((a, b, c, d)):
        if i < left.size:
            left[i] = array.ctypes.data


def first_wrong(row_ids: Any, rows: Any) -> Any:
    """Where the first id is that is no row; -1: nowhere."""
    wrong = False
    for i in range(row_ids.size):
        wrong |= (row_ids[i] < 0) | (row_ids[i] >= rows)
    if wrong:
        for i in range(row_ids.size):
            if row_ids[i] < 0 or row_ids[i] >= rows:
                return i
    return -1


def gather(source: Any, row_ids: Any, out: Any) -> None:
    for i in range(row_ids.size):
        from_, to = source[row_ids[i]], out[i]
        for j in range(to.size):
            to[j] = from_[j]


def scatter_add(target: Any, row_ids: Any, rows: Any) -> None:
    for i in range(row_ids.size):
        to, more = target[row_ids[i]], rows[i]
        for j in range(to.size):
            to[j] += more[j]


def order(row_ids: Any, positions: Any) -> Any:
    """The positions that sort them, equal ones in their order; returns how many are different.

    A few are inserted one by one, more are sorted by 11 bits at a time.
    """
    size, low, high, ascending = row_ids.size, row_ids[0], row_ids[0], True
    for i in range(size):
        positions[i] = i
        low, high = min(low, row_ids[i]), max(high, row_ids[i])
        ascending &= i == 0 or row_ids[i - 1] < row_ids[i]
    if ascending:
        return size
    if size <= FEW:
        for i in range(1, size):
            at, row = i, row_ids[i]
            while at > 0 and row_ids[positions[at - 1]] > row:
                positions[at] = positions[at - 1]
                at -= 1
            positions[at] = i
        different = 1
        for i in range(1, size):
            different += row_ids[positions[i - 1]] != row_ids[positions[i]]
        return different
    keys, new_keys, new_positions = np.empty(size, np.uint64), np.empty(size, np.uint64), np.empty(size, np.int64)
    for i in range(size):
        keys[i] = np.uint64(row_ids[i]) - np.uint64(low)  # wraps to what it should be
    begin, shift = np.empty(1 << DIGIT, np.int64), np.uint64(0)
    left = np.uint64(high) - np.uint64(low)
    while left:
        begin[:] = 0
        for i in range(size):
            begin[(keys[i] >> shift) & DIGITS] += 1
        start = 0
        for digit in range(begin.size):
            count = begin[digit]
            begin[digit] = start
            start += count
        for i in range(size):
            digit = (keys[i] >> shift) & DIGITS
            at = begin[digit]
            new_keys[at], new_positions[at] = keys[i], positions[i]
            begin[digit] = at + 1
        keys, new_keys = new_keys, keys
        positions[:], shift, left = new_positions, shift + np.uint64(DIGIT), left >> np.uint64(DIGIT)
    different = 1
    for i in range(1, size):
        different += keys[i - 1] != keys[i]
    return different


def deduplicate(row_ids: Any, positions: Any, rows: Any, ids: Any, sums: Any) -> None:
    count = 0
    for i in range(positions.size):
        at = positions[i]
        more = rows[at]
        if i > 0 and row_ids[at] == ids[count - 1]:
            to = sums[count - 1]
            for j in range(to.size):
                to[j] += more[j]
        else:
            ids[count] = row_ids[at]
            to = sums[count]
            for j in range(to.size):
                to[j] = more[j]
            count += 1


# --- compression --------------------------------------------------------------------------------
#
# The codes are seen as 32-bit words, as bytes, and as the float32 of the scales among them.

MAGNITUDE, INFINITE, NO_NUMBER = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000), np.uint32(0x7FC00000)


@inlined
def _compensated(gradient: Any, residual: Any, start: Any, scratch: Any) -> Any:
    """Gradient and residual together, in the scratch, with zeros up to a multiple of 32; and the residual to change."""
    rest = residual[start : start + BLOCK]
    g, values = gradient[start : start + rest.size], scratch[: rest.size]
    for i in range(rest.size):
        values[i] = _wide(g[i]) + rest[i]
    scratch[rest.size : -(-rest.size // 32) * 32] = 0
    return values, rest


def quantize_2bit(gradient: Any, residual: Any, words: Any, threshold: Any) -> None:
    scratch, high, nothing = np.empty(BLOCK, np.float32), np.float32(threshold), np.float32(0)
    for start in range(0, residual.size, BLOCK):
        values, rest = _compensated(gradient, residual, start, scratch)
        for i in range(rest.size):
            x = values[i]
            rest[i] = x - (high if x >= high else -high if x <= -high else nothing)
        for k in range(-(-rest.size // 32)):
            at, row = start // 16 + 2 * k, scratch.ctypes.data + 128 * k
            words[at] = _at_least(row, high) | _at_most(row, -high)
            words[at + 1] = _not_above(row, -high)


def dequantize_2bit(words: Any, out: Any, threshold: Any) -> None:
    high, zero, no_number, one = np.float32(threshold), np.float32(0), np.float32(np.nan), np.uint32(1)
    for k in range(-(-out.size // 32)):
        some, minus, to = words[2 * k], words[2 * k + 1], out[32 * k : 32 * k + 32]
        for i in range(to.size):
            far = (some >> np.uint32(i)) & one
            above, below = high if far else zero, -high if far else no_number
            to[i] = below if (minus >> np.uint32(i)) & one else above


def quantize_1bit(gradient: Any, residual: Any, words: Any, scales: Any) -> None:
    scratch, sums = np.empty(BLOCK, np.float32), np.empty(32, np.float32)
    for start in range(0, residual.size, BLOCK):
        values, rest = _compensated(gradient, residual, start, scratch)
        sums[:] = 0
        for k in range(-(-rest.size // 32)):
            row = scratch[32 * k : 32 * k + 32]
            for i in range(32):
                sums[i] += abs(row[i])
        half = 16
        while half:
            for i in range(half):
                sums[i] += sums[i + half]
            half //= 2
        scale = sums[0] / np.float32(rest.size)
        at = start // BLOCK * (1 + BLOCK // 32)
        scales[at] = scale if scale == scale else _number_of(NO_NUMBER)
        for i in range(rest.size):
            rest[i] = values[i] - (-scale if values[i] < 0 else scale)
        for k in range(-(-rest.size // 32)):
            words[at + 1 + k] = _below(scratch.ctypes.data + 128 * k, np.float32(0))


def dequantize_1bit(words: Any, scales: Any, out: Any) -> None:
    for k in range(-(-out.size // 32)):
        at = k * 32 // BLOCK * (1 + BLOCK // 32)
        scale, minus, to = scales[at], words[at + 1 + k % (BLOCK // 32)], out[32 * k : 32 * k + 32]
        for i in range(to.size):
            to[i] = -scale if (minus >> np.uint32(i)) & np.uint32(1) else scale


def quantize_int8(gradient: Any, residual: Any, codes: Any, scales: Any) -> None:
    scratch, high, zero = np.empty(BLOCK, np.float32), np.float32(127), np.float32(0)
    magnitudes = scratch.view(np.uint32)  # whose order is that of the numbers, with what is no number above all
    for start in range(0, residual.size, BLOCK):
        everything, whole = _compensated(gradient, residual, start, scratch)
        for begin in range(0, whole.size, STEPS):
            values, rest = everything[begin : begin + STEPS], whole[begin : begin + STEPS]
            largest, bits = np.uint32(0), magnitudes[begin : begin + rest.size]
            for i in range(bits.size):
                magnitude = bits[i] & MAGNITUDE
                largest = magnitude if magnitude > largest else largest
            scale, inverse = _number_of(largest) / high, high / _number_of(largest)
            at = (start + begin) // STEPS * (1 + STEPS // 4)
            to = codes[4 * at + 4 : 4 * at + 4 + rest.size]
            if largest < INFINITE and inverse < math.inf:
                for i in range(rest.size):
                    step = np.rint(values[i] * inverse) + zero
                    to[i] = np.int8(np.int32(step))
                    rest[i] = values[i] - step * scale
            else:
                scale = zero if largest < INFINITE else _number_of(NO_NUMBER)
                for i in range(rest.size):
                    to[i] = 0
                    rest[i] = values[i] - zero * scale
            scales[at] = scale
            for i in range(4 * at + 4 + rest.size, 4 * (at + 1 + -(-rest.size // 4))):
                codes[i] = 0


def dequantize_int8(codes: Any, scales: Any, out: Any) -> None:
    for start in range(0, out.size, STEPS):
        at, to = start // STEPS * (1 + STEPS // 4), out[start : start + STEPS]
        scale, steps = scales[at], codes[4 * at + 4 : 4 * at + 4 + to.size]
        for i in range(to.size):
            to[i] = np.float32(steps[i]) * scale


# --- types --------------------------------------------------------------------------------------


def _in(element: Any, dimensions: int = 1) -> Any:
    """An array that is read; also one that is writable, or aligned."""
    return types.Array(element, dimensions, "C", readonly=True, aligned=False)


def _out(element: Any, dimensions: int = 1) -> Any:
    return types.Array(element, dimensions, "C", aligned=False)


TABLE = types.Array(types.int64, 1, "C")
OPTIMIZERS: dict[str, tuple[Callable[..., Any], int, int]] = {  # the kernel; how many states and numbers it takes
    "accumulate": (accumulate, 0, 0), "sgd": (sgd, 1, 6), "adam": (adam, 3, 7), "adagrad": (adagrad, 1, 3),
    "rmsprop": (rmsprop, 3, 5), "adadelta": (adadelta, 2, 4), "ftrl": (ftrl, 2, 4), "lars": (lars, 1, 5),
    "lamb": (lamb, 2, 7),
}  # fmt: skip


def signature(name: str, dtype: np.dtype[Any], pushed: np.dtype[Any]) -> tuple[Callable[..., Any], Any]:
    """The function called ``name``, and its types for elements and for pushes of these dtypes."""
    element, push = from_dtype(dtype), from_dtype(pushed)
    number = types.float64
    if name in OPTIMIZERS:
        function, states, numbers = OPTIMIZERS[name]
        common = (_out(element), _in(element), _in(push), TABLE, number, number)
        return function, types.void(*common, *[_out(element)] * states, *[number] * numbers)
    match name:
        case "merge":
            return merge, types.void(_out(element), _in(element), TABLE)
        case "allreduce":
            return allreduce, types.void(TABLE, _in(element), TABLE)
        case "add":
            return add, types.void(_out(element), _in(element), _in(element))
        case "merge_many":
            return merge_many, types.void(_out(element), TABLE, TABLE)
        case "norm":
            return norm, number(_in(element), TABLE)
        case "widen":
            return widen, types.void(_in(element), _out(types.float32))
        case "narrow":
            return narrow, types.void(_in(types.float32), _out(element))
        case "broadcast":
            return broadcast, types.void(_in(element), TABLE)
        case "split":
            return split, types.void(_in(element), TABLE, TABLE)
        case "locate":
            return locate, types.void(TABLE, types.int64, *[_in(element)] * 4)
        case "first_wrong":
            return first_wrong, types.int64(_in(types.int64), types.int64)
        case "gather":
            return gather, types.void(_in(element, 2), _in(types.int64), _out(element, 2))
        case "order":
            return order, types.int64(_in(types.int64), TABLE)
        case "deduplicate":
            rows = _in(element, 2), TABLE, _out(element, 2)
            return deduplicate, types.void(_in(types.int64), TABLE, *rows)
        case "quantize_2bit":
            return quantize_2bit, types.void(_in(push), _out(types.float32), _out(types.uint32), number)
        case "dequantize_2bit":
            return dequantize_2bit, types.void(_in(types.uint32), _out(types.float32), number)
        case "quantize_1bit":
            codes = _out(types.uint32), _out(types.float32)
            return quantize_1bit, types.void(_in(push), _out(types.float32), *codes)
        case "dequantize_1bit":
            return dequantize_1bit, types.void(_in(types.uint32), _in(types.float32), _out(types.float32))
        case "quantize_int8":
            codes = _out(types.int8), _out(types.float32)
            return quantize_int8, types.void(_in(push), _out(types.float32), *codes)
        case "dequantize_int8":
            return dequantize_int8, types.void(_in(types.int8), _in(types.float32), _out(types.float32))
        case "scatter_add":
            return scatter_add, types.void(_out(element, 2), _in(types.int64), _in(element, 2))
    raise KeyError(name)


def build(name: str, dtype: np.dtype[Any], pushed: np.dtype[Any]) -> Callable[..., Any]:
    """The kernel as machine code: from the cache on disk, or compiled (a second) and put there.

    Raises:
        Exception: it cannot be had on this machine.
    """
    if pushed == np.uint16 and not _has_halves():
        raise NotImplementedError("no instructions for float16")
    function, types_ = signature(name, dtype, pushed)
    options: dict[str, Any] = {"nogil": name != "locate", "error_model": "numpy"}  # that one is quicker than the GIL
    try:
        compiled: Callable[..., Any] = njit(types_, cache=True, **options)(function)
    except RuntimeError:  # there is no place for the cache
        compiled = njit(types_, **options)(function)
    return compiled


def _has_halves() -> bool:
    """Does the processor convert float16? Else LLVM would call a library that need not be there."""
    return platform.machine() == "aarch64" or bool(llvmlite.binding.get_host_cpu_features().get("f16c"))
