"""What every form of the kernels must do, each against something dumber: on any memory, and to the bit."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from kvstore import kernels
from kvstore.kernels import Change, compiled, reference
from tests.kernels.forms import Form, form

__all__ = ["form"]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HALVES = (np.dtype(np.float16), BFLOAT16)
DTYPES = [
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128", BFLOAT16),
]
BY_NUMPY_ALWAYS = ("bool", "int16", "uint16")
SHAPES = [(), (0,), (1,), (7,), (4096,), (100_003,), (3, 5), (2, 0), (5, 41, 43)]
LARGE_BYTES = 1_300_013  # enough to go past the caches

OPTIMIZERS = {  # name -> how many states, and sets of numbers; a state whose number is in the set is left out
    "accumulate": (0, [((), set())]),
    "sgd": (1, [
        ((0.1, 0.0, 0.0, 1.0, 0.0, 0.0), {0}),
        ((0.1, 0.01, 0.0, 1.0, 0.0, 0.0), {0}),
        ((0.1, 0.0, 0.9, 1.0, 0.0, 1.0), set()),
        ((0.1, 0.01, 0.9, 0.7, 0.0, 0.0), set()),
        ((0.1, 0.01, 0.9, 1.0, 1.0, 1.0), set()),
        ((0.1, 0.01, 0.9, 1.0, 1.0, 0.0), set()),
    ]),
    "adam": (3, [
        ((0.01, 0.3, 0.9, 0.999, 1e-8, 0.01, 1.0), {2}),
        ((0.01, 0.3, 0.8, 0.95, 1e-6, 0.0, 0.99), set()),
    ]),
    "adagrad": (1, [((0.01, 1e-10, 0.0), set()), ((0.1, 1e-8, 0.1), set())]),
    "rmsprop": (3, [
        ((0.01, 0.99, 1e-8, 0.0, 0.0), {1, 2}),
        ((0.01, 0.99, 1e-8, 0.1, 0.9), {2}),
        ((0.01, 0.9, 1e-8, 0.0, 0.5), set()),
    ]),
    "adadelta": (2, [((1.0, 0.9, 1e-6, 0.0), set()), ((0.5, 0.8, 1e-6, 0.1), set())]),
    "ftrl": (2, [((0.1, 1.0, 0.01, 0.0), set()), ((0.2, 0.7, 0.6, 0.1), set())]),
    "lars": (1, [((0.1, 1e-3, 1e-8, 0.0, 0.9), set()), ((0.5, 0.02, 1e-8, 0.01, 0.8), set())]),
    "lamb": (2, [((0.01, 0.1, 0.3, 0.9, 0.999, 1e-6, 0.01), set())]),
}  # fmt: skip
CASES = [(name, numbers, absent) for name, (_, sets) in OPTIMIZERS.items() for numbers, absent in sets]


def numbers(rng, shape, dtype):
    """Numbers of any sign, whole for integers."""
    wide = rng.standard_normal(shape) * 100
    with np.errstate(invalid="ignore"):
        return np.asarray(wide).astype(np.float32 if np.dtype(dtype) in HALVES else np.int64).astype(dtype)


def unaligned(array):
    """The same at an odd address, read-only."""
    copy = np.frombuffer(b"\0" + array.tobytes(), array.dtype, offset=1).reshape(array.shape)
    assert not copy.size or not copy.flags.writeable
    return copy


def strided(array):
    """The same in memory with holes."""
    if not array.ndim:
        return array.copy()
    spread = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)[..., ::2]
    spread[...] = array
    return spread


LAYOUTS = [np.copy, unaligned, strided]


def bits(array):
    """What is compared: NaNs of any bits are equal, zeros of different signs are not."""
    array = np.ascontiguousarray(array)
    if array.dtype in HALVES or array.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            wide = array.astype(np.float64)
        return [np.isnan(wide), np.signbit(wide) & ~np.isnan(wide), np.nan_to_num(wide, nan=0.0)]
    return [array]


def same(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    for one, other in zip(bits(actual), bits(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_names():
    for name in kernels.NAMES:
        assert callable(getattr(kernels, name))
        assert getattr(reference, name).__doc__


# --- sums ---------------------------------------------------------------------------------------


def dumb_sum(arrays):
    dtype = arrays[0].dtype
    wide = np.dtype(np.float32) if dtype in HALVES else dtype
    total = arrays[0].astype(wide)
    with np.errstate(all="ignore"):
        for array in arrays[1:]:
            total = np.asarray(total + array.astype(wide)).astype(wide)
        return total.astype(dtype)


def check_sums(merge, shapes, dtype, count):
    rng = np.random.default_rng(count)
    for shape in shapes:
        arrays = [numbers(rng, shape, dtype) for _ in range(count)]
        expected = dumb_sum(arrays)
        for layout in LAYOUTS:
            out = np.zeros(shape, dtype)
            merge([layout(array) for array in arrays], out)
            same(out, expected)
        out = strided(np.zeros(shape, dtype))
        merge(arrays, out)
        same(out, expected)
        merge(arrays, arrays[0])
        same(arrays[0], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_merge(form: Form, dtype, count):
    check_sums(kernels.merge, SHAPES, dtype, count)
    assert ("merge" in form.used) == (form.name == "numba" and count > 1 and dtype not in BY_NUMPY_ALWAYS)
    assert ("add" in form.used) == (form.name == "numba" and count == 2 and dtype not in BY_NUMPY_ALWAYS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_allreduce(form: Form, dtype, count):
    rng = np.random.default_rng(count)
    large = [(LARGE_BYTES // np.dtype(dtype).itemsize,)] if form.name in ("numba", "cuda") else []
    for shape in SHAPES + large:
        arrays = [numbers(rng, shape, dtype) for _ in range(count)]
        expected = dumb_sum(arrays)
        buffer = np.empty(expected.nbytes + 1, np.uint8)
        for layout in LAYOUTS:
            out, others = np.zeros(shape, dtype), [buffer[1:].view(dtype).reshape(shape), np.zeros(shape, dtype)]
            kernels.allreduce([layout(array) for array in arrays], out, others)
            for each in (out, *others):
                same(each, expected)
        out, others = np.zeros(shape, dtype), [strided(np.zeros(shape, dtype))]
        kernels.allreduce(arrays, out, others)
        same(others[0], expected)
        kernels.allreduce(arrays, out, list(reversed(arrays)))  # in place, in any order
        for each in (out, *arrays):
            same(each, expected)
        if shape and shape[0] > 1000:
            shifted = numbers(rng, shape[0] + 7, dtype)
            expected = dumb_sum([shifted[:-7], arrays[0]])
            kernels.allreduce([shifted[:-7], arrays[0]], out, [shifted[7:]])
            same(shifted[7:], expected)
    assert ("allreduce" in form.used) == (form.name == "numba" and dtype not in BY_NUMPY_ALWAYS)


PARTS = [(), (0,), (1,), (7,), (4096,), (3, 5), (2, 0), (20_000,), (5, 41, 43), (64,), (16, 16)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_merge_many(form: Form, dtype, count):
    rng = np.random.default_rng(count)
    groups = [[numbers(rng, shape, dtype) for _ in range(count)] for shape in PARTS]
    expected = np.concatenate([dumb_sum(arrays).ravel() for arrays in groups])
    buffer = np.empty(expected.nbytes + 1, np.uint8)
    for layout in LAYOUTS:
        for out in (np.zeros_like(expected), strided(expected), buffer[1:].view(expected.dtype)):
            out.fill(0)
            kernels.merge_many([[layout(array) for array in arrays] for arrays in groups], out)
            same(out, expected)
        flat = [[layout(array.ravel()) for array in arrays] for arrays in groups]
        kernels.merge_many(flat, out)
        same(out, expected)
    assert ("merge_many" in form.used) == (form.name == "numba" and count > 1 and dtype not in BY_NUMPY_ALWAYS)


def test_halves_are_rounded_once(form: Form):
    """1 + 2^-11 twice: rounding after each sum would lose both."""
    small = np.full(3, 2.0**-11, np.float16)
    out = np.empty(3, np.float16)
    kernels.merge([np.ones(3, np.float16), small, small], out)
    assert out.tolist() == [1 + 2.0**-10] * 3


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", BFLOAT16], ids=str)
def test_norm(form: Form, dtype):
    rng = np.random.default_rng(5)
    for shape in SHAPES:
        for count in (1, 3):
            arrays = [np.asarray(numbers(rng, shape, dtype) / np.dtype(dtype).type(64)) for _ in range(count)]
            expected = math.sqrt(math.fsum(dumb_sum(arrays).astype(np.float64).reshape(-1) ** 2))
            assert kernels.norm(arrays) == pytest.approx(expected, rel=1e-13)
            assert kernels.norm([strided(array) for array in arrays]) == reference.norm(arrays)
            assert kernels.norm(arrays) == reference.norm(arrays)
    assert form.name != "numba" or form.used >= {"norm", "locate"}


# --- optimizers ---------------------------------------------------------------------------------


def begin(rng, name, absent, shape, dtype, pushed, count):
    value = np.asarray(rng.standard_normal(shape), dtype)
    pushes = [np.asarray(rng.standard_normal(shape)).astype(pushed) for _ in range(count)]
    states = tuple(
        None if number in absent else np.asarray(np.abs(rng.standard_normal(shape)), dtype)
        for number in range(OPTIMIZERS[name][0])
    )
    return value, pushes, states


def copies(states):
    return tuple(None if state is None else state.copy() for state in states)


@pytest.mark.parametrize(("name", "values", "absent"), CASES, ids=lambda case: str(case)[:40])
@pytest.mark.parametrize(
    ("dtype", "pushed"),
    [("float32", "float32"), ("float64", "float64"), ("float32", "float16"), ("float32", BFLOAT16)],
    ids=str,
)
def test_optimizers(form: Form, name, values, absent, dtype, pushed):
    """Updates by one and by several pushes, in place and into other memory, are those by their sum, in place."""
    rng = np.random.default_rng(len(name))
    update = getattr(kernels, name)
    for shape in [(), (0,), (5,), (4097,), (40_001,), (3, 5)]:
        for count, scale, clip in ((1, 1.0, math.inf), (2, 1.0, math.inf), (5, 0.7, 0.5)):
            value, pushes, states = begin(rng, name, absent, shape, dtype, pushed, count)
            expected, expected_states = value.copy(), copies(states)
            total = np.asarray(dumb_sum(pushes)).astype(dtype)
            getattr(reference, name)(Change(expected, expected, [total], scale, clip), expected_states, *values)
            for layout in LAYOUTS:
                own = copies(states)
                before, target = layout(value), np.full(shape, np.nan, dtype)
                update(Change(before, target, [layout(push) for push in pushes], scale, clip), own, *values)
                same(target, expected)
                same(before, value)
                for one, other in zip(own, expected_states, strict=True):
                    assert one is other is None or same(one, other) is None
            own, target = tuple(None if state is None else strided(state) for state in states), strided(value)
            update(Change(target, target, pushes, scale, clip), own, *values)
            same(target, expected)
            for one, other in zip(own, expected_states, strict=True):
                assert one is other is None or same(one, other) is None
    assert form.name != "numba" or form.used >= {name, "locate"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_merge_nontemporal(form: Form, dtype, count, monkeypatch):
    monkeypatch.setattr(compiled, "NONTEMPORAL_BYTES", 1)
    shapes = (*SHAPES, (300_007,))  # the last one is long enough for the kernels, too
    check_sums(kernels.merge_nontemporal, shapes, dtype, count)
    assert ("allreduce" in form.used) == (form.name == "numba" and count > 1 and dtype not in BY_NUMPY_ALWAYS)


@pytest.mark.parametrize("late", ["locate", "sgd", "merge"])
def test_while_a_part_is_not_there_yet(form: Form, late):
    form.late.add(late)
    value, pushes = np.zeros(9, np.float32), [np.full(9, k, np.float32) for k in (1, 2, 3, 4)]
    kernels.sgd(Change(value, value, pushes), (None,), 1.0, 0.0, 0.0, 1.0, 0.0, 0.0)
    assert (value == -10).all()
    kernels.merge(pushes, value)
    assert (value == 10).all()


@pytest.mark.parametrize(("name", "values", "absent"), CASES, ids=lambda case: str(case)[:40])
def test_what_is_no_number(form: Form, name, values, absent):
    """Infinities, NaNs, zeros of both signs and the smallest numbers end as they do in NumPy."""
    odd = np.array([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-45, -1e-39, 3e38, -3e38, 1.0], np.float32)
    value, push = (part.ravel() for part in np.meshgrid(odd, odd))
    if name in ("lars", "lamb"):  # their norms would not be numbers
        value, push = (np.where(np.isfinite(part), part, 2.0).astype(np.float32) for part in (value, push))
    states = tuple(None if n in absent else np.tile(np.abs(odd), 10) for n in range(OPTIMIZERS[name][0]))
    expected, expected_states = value.copy(), copies(states)
    getattr(reference, name)(Change(expected, expected, [push], 1.0, 2.0), expected_states, *values)
    getattr(kernels, name)(Change(value, value, [push], 1.0, 2.0), states, *values)
    same(value, expected)
    for one, other in zip(states, expected_states, strict=True):
        assert one is other is None or same(one, other) is None


@pytest.mark.parametrize("dtype", ["int8", "uint64", "float16", BFLOAT16, "complex64", "bool"], ids=str)
def test_accumulate_takes_every_dtype(form: Form, dtype):
    rng = np.random.default_rng(1)
    value, pushes = numbers(rng, 9, dtype), [numbers(rng, 9, dtype) for _ in range(3)]
    with np.errstate(all="ignore"):
        expected = value + dumb_sum(pushes)
    kernels.accumulate(Change(value, value, pushes), ())
    same(value, expected)


# --- casts and rows -----------------------------------------------------------------------------


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_cast(form: Form, half):
    every = np.arange(1 << 16, dtype=np.uint16).view(half)
    for layout in LAYOUTS:
        wide = np.empty(every.shape, np.float32)
        kernels.cast(layout(every), wide)
        with np.errstate(invalid="ignore"):
            expected = every.astype(np.float32)
        same(wide, expected)
    pattern = np.arange(0, 1 << 32, 65_521, dtype=np.uint64).astype(np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        expected = pattern.astype(half)
        ties = (wide[:-1] + (wide[1:] - wide[:-1]) / 2).astype(np.float32)
        expected_ties = ties.astype(half)
    for source, target in ((pattern, expected), (ties, expected_ties), (strided(ties), expected_ties)):
        back = np.empty(source.shape, half)
        kernels.cast(source, back)
        same(back, target)
    other = np.empty(3, np.int32)
    kernels.cast(np.array([1.7, -2.0, 3.0]), other)
    assert other.tolist() == [1, -2, 3]
    assert form.name != "numba" or form.used >= {"widen", "narrow"}


@pytest.mark.parametrize("shape", [(), (0,), (7,), (1000,), (3, 700), (300_007,)], ids=str)
def test_broadcast(form: Form, shape):
    source = numbers(np.random.default_rng(3), shape, "float32")
    room = np.zeros((5, source.size + 32), np.float32)
    outs = [row[at : at + source.size].reshape(shape) for at, row in zip((0, 1, 15, 16, 31), room, strict=True)]
    for layout in LAYOUTS:
        room[:] = -1
        kernels.broadcast(layout(source), outs)
        for out in outs:
            same(out, source)
        assert np.count_nonzero(room == -1) == 5 * 32 + 5 * np.count_nonzero(source == -1)  # nothing beside them
    holes = [strided(np.zeros(shape, np.float32)) for _ in range(3)]
    kernels.broadcast(source, holes)
    for out in holes:
        same(out, source)
    assert ("broadcast" in form.used) == (form.name == "numba" and source.size >= 1000)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_concatenate_and_split(form: Form, dtype):
    rng = np.random.default_rng(4)
    arrays = [numbers(rng, shape, dtype) for shape in PARTS]
    expected = np.concatenate([array.ravel() for array in arrays])
    buffer = np.empty(expected.nbytes + 1, np.uint8)
    for layout in LAYOUTS:
        for out in (np.zeros_like(expected), strided(expected), buffer[1:].view(expected.dtype)):
            out.fill(0)
            kernels.concatenate([layout(array) for array in arrays], out)
            same(out, expected)
            outs = [layout(array).copy() if layout is not strided else strided(array) for array in arrays]
            for part in outs:
                part.fill(0)
            kernels.split(out, outs)
            for part, array in zip(outs, arrays, strict=True):
                same(part, array)
        flats = [np.zeros(array.size, dtype) for array in arrays]
        kernels.split(layout(expected), flats)
        for part, array in zip(flats, arrays, strict=True):
            same(part, array.ravel())
    assert ("split" in form.used) == (form.name == "numba" and dtype not in BY_NUMPY_ALWAYS)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", BFLOAT16, "int16", "complex64"], ids=str)
@pytest.mark.parametrize("row", [(), (1,), (3,), (2, 8)], ids=str)
def test_rows(form: Form, dtype, row):
    rng = np.random.default_rng(2)
    table = numbers(rng, (50, *row), dtype)
    for count in (0, 1, 200):  # ids come twice
        ids = rng.integers(0, 50, count)
        for layout in LAYOUTS:
            out = np.zeros((count, *row), dtype)
            kernels.gather(layout(table), ids, out)
            same(out, table[ids])
            rows, target, expected = numbers(rng, (count, *row), dtype), table.copy(), table.copy()
            with np.errstate(all="ignore"):
                for number, one in zip(ids, rows, strict=True):
                    expected[number] += one
            kernels.scatter_add(target, ids, layout(rows))
            same(target, expected)
    assert form.name != "numba" or "gather" in form.used
    assert ("scatter_add" in form.used) == (form.name == "numba" and dtype in ("float32", "float64"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", [(), (3,), (2, 8), (0,)], ids=str)
def test_deduplicate(form: Form, dtype, row):
    rng = np.random.default_rng(6)
    for count, low, high in [(0, 0, 9), (1, 5, 6), (200, -30, 30), (300, -(1 << 62), 1 << 62), (5000, 0, 3)]:
        ids = rng.integers(low, high, count)
        for order in (ids, np.sort(ids), np.arange(low, low + count)):
            rows = numbers(rng, (count, *row), dtype)
            expected: dict[int, np.ndarray] = {}
            with np.errstate(all="ignore"):
                for number, one in zip(order.tolist(), rows, strict=True):
                    expected[number] = np.asarray(expected[number] + one, dtype) if number in expected else one
            for layout in LAYOUTS:
                found, sums = kernels.deduplicate(layout(order), layout(rows))
                assert found.dtype == np.int64
                assert found.tolist() == sorted(expected)
                wanted = [expected[number] for number in sorted(expected)]
                same(sums, np.array(wanted, dtype).reshape(len(wanted), *row))
    assert ("deduplicate" in form.used) == (form.name == "numba" and dtype in ("float32", "float64") and row != (0,))


@pytest.mark.parametrize("wrong", [-1, 50, 1 << 40])
def test_rows_that_are_none_change_nothing(form: Form, wrong):
    table, ids = np.ones((50, 4), np.float32), np.array([3, wrong, 4])
    before, out = table.copy(), np.zeros((3, 4), np.float32)
    with pytest.raises(IndexError, match=rf"0\.\.49, got {wrong}"):
        kernels.gather(table, ids, out)
    with pytest.raises(IndexError, match=rf"0\.\.49, got {wrong}"):
        kernels.scatter_add(table, ids, np.ones((3, 4), np.float32))
    assert not out.any()
    same(table, before)
