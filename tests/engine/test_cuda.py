"""What can be told of CUDA's arrays without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from numpy.lib.array_utils import byte_bounds

import engine


class Foreign:
    """An array of some library, whose memory is where NumPy's is."""

    def __init__(self, array, contiguous_is_none):
        self.__cuda_array_interface__ = {**array.__array_interface__, "version": 3}
        if not contiguous_is_none:
            self.__cuda_array_interface__["strides"] = array.strides


@pytest.mark.parametrize("key", [np.s_[:], np.s_[2:5], np.s_[::2, 1:], np.s_[::-1], np.s_[:, ::-2], np.s_[3, 4]])
@pytest.mark.parametrize("contiguous_is_none", [True, False])
def test_the_range_of_an_array(key, contiguous_is_none):
    array = np.zeros((6, 8), np.float32)[key]
    array = np.asarray(array) if np.ndim(array) else np.zeros((6, 8), np.float32)[3:4, 4:5].reshape(())
    devices = engine.Cuda(SimpleNamespace(ndarray=(), cuda=None))
    assert devices.range_of(Foreign(array, contiguous_is_none)) == byte_bounds(array)


def test_an_empty_array_has_no_bytes():
    low, high = engine.Cuda(SimpleNamespace(ndarray=(), cuda=None)).range_of(Foreign(np.zeros((0, 4)), True))
    assert low == high
