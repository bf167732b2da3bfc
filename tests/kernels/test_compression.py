"""What the kernels of compression must do, each against the format's description, bit by bit, in slow Python."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from kvstore import kernels
from kvstore.kernels import FORMATS
from tests.kernels.forms import Form, form
from tests.kernels.test_contract import LAYOUTS, same, strided, unaligned

__all__ = ["form"]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NAMES = list(FORMATS)
SIZES = [0, 1, 5, 31, 32, 33, 255, 256, 257, 1000, 1023, 1024, 1025, 2100]
THRESHOLD = 0.5
f = np.float32


def compress(name, gradient, residual, out):
    extra = (THRESHOLD,) if name == "2bit" else ()
    getattr(kernels, f"quantize_{name}")(gradient, residual, *extra, out)


def decompress(name, codes, out):
    extra = (THRESHOLD,) if name == "2bit" else ()
    getattr(kernels, f"dequantize_{name}")(codes, *extra, out)


def room(name, size, fill=0xAA):
    return np.full(FORMATS[name].nbytes(size), fill, np.uint8)


# --- the oracle: numbers one by one ---------------------------------------------------------------


def float_bits(number):
    return np.array([number], "<f4").tobytes() if number == number else bytes([0, 0, 0xC0, 0x7F])


def bits_of(flags):
    """32 to a word, the first in its lowest bit."""
    padded = list(flags) + [False] * (-len(flags) % 32)
    return b"".join(
        sum(bool(flag) << i for i, flag in enumerate(padded[at : at + 32])).to_bytes(4, "little")
        for at in range(0, len(padded), 32)
    )


def dumb(name, values):
    """The codes of one block of numbers, and what they stand for."""
    if name == "2bit":
        far = [abs(x) >= THRESHOLD for x in values]
        below = [not x > -THRESHOLD for x in values]
        meaning = {(False, False): 0.0, (True, False): THRESHOLD, (True, True): -THRESHOLD, (False, True): math.nan}
        return bits_of(far) + bits_of(below), [f(meaning[pair]) for pair in zip(far, below, strict=True)]
    if name == "1bit":
        sums = [f(0)] * 32
        for i, x in enumerate(values):
            sums[i % 32] = sums[i % 32] + abs(x)
        while len(sums) > 1:
            half = len(sums) // 2
            sums = [one + other for one, other in zip(sums[:half], sums[half:], strict=True)]
        scale = sums[0] / f(len(values))
        below = [x < 0 for x in values]
        return float_bits(scale) + bits_of(below), [-scale if minus else scale for minus in below]
    largest = max((abs(x) for x in values), key=lambda x: (x != x, x))
    scale, inverse = largest / f(127), f(127) / largest
    if not math.isfinite(largest):
        scale, steps = f(math.nan), [0] * len(values)
    elif not math.isfinite(inverse):
        scale, steps = f(0), [0] * len(values)
    else:
        steps = [np.rint(x * inverse) for x in values]
    codes = bytes(int(step) % 256 for step in steps)
    return float_bits(scale) + codes + bytes(-len(codes) % 4), [f(int(step)) * scale for step in steps]


def dumb_blocks(name, gradient, residual):
    """Codes, what they stand for, and the new residual."""
    with np.errstate(all="ignore"):
        values = [f(one) + other for one, other in zip(gradient, residual, strict=True)]
        codes, meant = b"", []
        for start in range(0, len(values), FORMATS[name].block):
            own, stands_for = dumb(name, values[start : start + FORMATS[name].block])
            codes += own
            meant += stands_for
        rest = [x - y for x, y in zip(values, meant, strict=True)]
    return np.frombuffer(codes, np.uint8), np.array(meant, f), np.array(rest, f)


# --- the contract -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "float16", BFLOAT16], ids=str)
def test_every_bit(form: Form, name, dtype):
    rng = np.random.default_rng(8)
    for size in SIZES:
        gradient = rng.standard_normal(size).astype(dtype)
        residual = (rng.standard_normal(size) / 4).astype(f)
        codes, meant, rest = dumb_blocks(name, gradient, residual)
        own, out, result = residual.copy(), room(name, size), np.zeros(size, f)
        assert out.size == codes.size
        compress(name, gradient, own, out)
        assert out.tobytes() == codes.tobytes()
        same(own, rest)
        decompress(name, out, result)
        same(result, meant)
    assert form.name != "numba" or form.used >= {f"quantize_{name}", f"dequantize_{name}"}


@pytest.mark.parametrize("name", NAMES)
def test_any_memory(form: Form, name):
    rng = np.random.default_rng(9)
    for shape in [(7,), (3, 50), (41, 43), (3, 1024)]:
        gradient = rng.standard_normal(shape).astype(f)
        size = gradient.size
        codes, meant, rest = dumb_blocks(name, gradient.ravel(), np.zeros(size, f))
        buffer = np.zeros(codes.size + 1, np.uint8)
        for layout in LAYOUTS:
            for out in (room(name, size), buffer[1:], strided(room(name, size))):
                for residual in (np.zeros(shape, f), strided(np.zeros(shape, f))):
                    compress(name, layout(gradient), residual, out)
                    assert out.tobytes() == codes.tobytes()
                    same(residual, rest.reshape(shape))
                result = strided(np.zeros(shape, f))
                decompress(name, out, result)
                same(result, meant.reshape(shape))
        odd = np.zeros(gradient.nbytes + 1, np.uint8)[1:].view(f).reshape(shape)
        decompress(name, unaligned(codes), odd)
        same(odd, meant.reshape(shape))


@pytest.mark.parametrize("name", NAMES)
def test_odd_numbers(form: Form, name):
    odd = [math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-45, -3e-44, 3e38, -3e38, 1.0, THRESHOLD, -THRESHOLD]
    with np.errstate(all="ignore"):
        pairs = [np.array(pair, f) for pair in zip(*[(x, y) for x in odd for y in odd], strict=True)]
        tiny = [(np.array([x, -x / 3, 0], f), np.zeros(3, f)) for x in (1e-44, 9e-40, 3.7e-37, 3.8e-37)]
        alone = [(np.full(3, x, f), np.zeros(3, f)) for x in odd]
    for gradient, residual in [pairs, *alone, *tiny]:
        codes, meant, rest = dumb_blocks(name, gradient, residual)
        own, out, result = residual.copy(), room(name, gradient.size), np.zeros(gradient.size, f)
        compress(name, gradient, own, out)
        assert out.tobytes() == codes.tobytes()
        same(own, rest)
        decompress(name, out, result)
        same(result, meant)
    assert np.isnan(result).any() == np.isnan(meant).any()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_number_stays_none(form: Form, name):
    gradient = np.ones(40, f)
    gradient[7] = math.nan
    out, result = room(name, 40), np.zeros(40, f)
    compress(name, gradient, np.zeros(40, f), out)
    decompress(name, out, result)
    assert np.isnan(result[7])


@pytest.mark.parametrize("name", NAMES)
def test_a_piece_is_compressed_as_in_the_whole(form: Form, name):
    """Wherever a multiple of the block is cut; so is its length in bytes."""
    rng, size, each = np.random.default_rng(10), 9_000, FORMATS[name]
    gradient, residual = rng.standard_normal(size).astype(f), rng.standard_normal(size).astype(f)
    own, whole = residual.copy(), room(name, size)
    compress(name, gradient, own, whole)
    for cut in (each.block, 1024, 3 * 1024, 8 * 1024):
        rest, first, second = residual.copy(), room(name, cut), room(name, size - cut)
        compress(name, gradient[:cut], rest[:cut], first)
        compress(name, gradient[cut:], rest[cut:], second)
        assert first.tobytes() + second.tobytes() == whole.tobytes()
        same(rest, own)
        result, part = np.zeros(size, f), np.zeros(size - cut, f)
        decompress(name, whole, result)
        decompress(name, whole[each.nbytes(cut) :], part)
        same(part, result[cut:])


@pytest.mark.parametrize("name", NAMES)
def test_large_ones(form: Form, name):
    """More than one block of any loop, against the plain form."""
    from kvstore.kernels import reference

    extra = (THRESHOLD,) if name == "2bit" else ()
    rng, size = np.random.default_rng(11), 100_003
    gradient, residual = rng.standard_normal(size).astype(f), rng.standard_normal(size).astype(f)
    expected, codes = residual.copy(), room(name, size)
    getattr(reference, f"quantize_{name}")(gradient, expected, *extra, codes)
    out = room(name, size)
    compress(name, gradient, residual, out)
    assert out.tobytes() == codes.tobytes()
    same(residual, expected)


@pytest.mark.parametrize(("name", "error"), [("2bit", 0.51), ("1bit", 60.0), ("int8", 0.03)])
def test_nothing_is_lost(form: Form, name, error):
    """What was sent and the residual are the sum of the gradients; so what is missing does not grow."""
    rng, size = np.random.default_rng(12), 2000
    total, sent, residual = np.zeros(size), np.zeros(size), np.zeros(size, f)
    out, result = room(name, size), np.zeros(size, f)
    for _ in range(200):
        gradient = (rng.standard_normal(size) / 8).astype(f)
        compress(name, gradient, residual, out)
        decompress(name, out, result)
        total += gradient
        sent += result
    np.testing.assert_allclose(sent + residual, total, atol=1e-3)
    assert np.abs(residual).max() < error


def test_thresholds_are_above_zero(form: Form):
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="expected a threshold above 0"):
            kernels.quantize_2bit(np.ones(3, f), np.zeros(3, f), wrong, room("2bit", 3))


@pytest.mark.parametrize("name", NAMES)
def test_other_dtypes_are_refused(form: Form, name):
    with pytest.raises(TypeError, match=f"{name}: expected gradients of float32"):
        compress(name, np.ones(3), np.zeros(3, f), room(name, 3))
    with pytest.raises(TypeError, match=f"{name}: expected gradients of float32"):
        compress(name, np.ones(3, f), np.zeros(3), room(name, 3))
    with pytest.raises(TypeError, match=f"{name}: expected to decompress into float32"):
        decompress(name, room(name, 3, 0), np.zeros(3))


def test_sizes():
    assert [FORMATS["2bit"].nbytes(n) for n in (0, 1, 32, 33)] == [0, 8, 8, 16]
    assert [FORMATS["1bit"].nbytes(n) for n in (0, 1, 32, 33, 1024, 1025)] == [0, 8, 8, 12, 132, 140]
    assert [FORMATS["int8"].nbytes(n) for n in (0, 1, 4, 5, 256, 257)] == [0, 8, 8, 12, 260, 268]
