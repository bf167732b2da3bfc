"""The seam to array libraries: what is taken for an array, and whose memory is seen."""

from __future__ import annotations

import ctypes
import re

import ml_dtypes
import numpy as np
import pytest

from kvstore import arrays
from kvstore.errors import DtypeError, ReadOnlyError

BITS = np.array([0x3F80, 0x4000, 0xC040], np.uint16)  # 1, 2 and -3


class Tensor:
    """What another library's tensor shows: DLPack, here with a type that is not NumPy's."""

    def __init__(self, memory: np.ndarray, code: int) -> None:
        self.memory, self.code = memory, code

    def __dlpack_device__(self):
        return self.memory.__dlpack_device__()

    def __dlpack__(self, **options):
        capsule = self.memory.__dlpack__(**options)
        name = ctypes.pythonapi.PyCapsule_GetName(capsule)
        tensor = ctypes.pythonapi.PyCapsule_GetPointer(capsule, name) + (32 if name.endswith(b"versioned") else 0)
        ctypes.c_uint8.from_address(tensor + 20).value = self.code
        return capsule


def test_bfloat16_comes_through_dlpack():
    memory = BITS.copy()
    seen = arrays.view(Tensor(memory, 4), "it")
    assert seen.dtype == ml_dtypes.bfloat16
    assert seen.tolist() == [1, 2, -3]
    memory[0] = 0x4080
    assert seen[0] == 4


def test_types_that_no_store_holds_do_not():
    with pytest.raises(DtypeError, match="it: expected an array in host memory"):
        arrays.view(Tensor(BITS.copy(), 3), "it")


def test_an_out_that_repeats_its_elements_is_none():
    row = np.zeros(3, np.float32)
    repeated = np.lib.stride_tricks.as_strided(row, (2, 3), (0, 4))
    assert repeated.flags.writeable
    with pytest.raises(ReadOnlyError, match="repeats"):
        arrays.writable_view(repeated, "out")
    for shape in ((0, 3), (1, 3), (3, 1), ()):
        arrays.writable_view(np.zeros(shape), "out")


class OnGpu:
    """What an array of a GPU shows."""

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **options):
        raise AssertionError("nobody could use it")


def test_an_array_of_a_gpu_where_there_is_none_is_refused_with_the_reason():
    if (reason := arrays.gpu.missing()) is None:
        pytest.skip("there is a GPU")
    assert arrays.is_array(OnGpu())
    with pytest.raises(
        DtypeError, match=re.escape(f"it: expected an array in host memory, got one of a GPU, {reason}")
    ):
        arrays.view(OnGpu(), "it")
    assert not arrays.is_writable(OnGpu())


def test_the_memory_of_the_host():
    array = np.arange(6.0).reshape(2, 3)
    assert arrays.memory_of(array) == arrays.memory_of(array[:, 1]) == arrays.HOST
    assert arrays.to_host(array) is array
    like = arrays.empty_like(array.T)
    assert (like.shape, like.dtype, like.flags.c_contiguous) == ((3, 2), array.dtype, True)
    arrays.copy_to(array.T, like)
    assert np.array_equal(like, array.T)
