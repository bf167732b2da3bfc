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


def without_a_gpu():
    return engine.Cuda(SimpleNamespace(ndarray=(), cuda=SimpleNamespace(runtime=None)))


@pytest.mark.parametrize("key", [np.s_[:], np.s_[2:5], np.s_[::2, 1:], np.s_[::-1], np.s_[:, ::-2], np.s_[3, 4]])
@pytest.mark.parametrize("contiguous_is_none", [True, False])
def test_the_range_of_an_array(key, contiguous_is_none):
    array = np.zeros((6, 8), np.float32)[key]
    array = np.asarray(array) if np.ndim(array) else np.zeros((6, 8), np.float32)[3:4, 4:5].reshape(())
    assert without_a_gpu().range_of(Foreign(array, contiguous_is_none)) == byte_bounds(array)


def test_an_empty_array_has_no_bytes():
    low, high = without_a_gpu().range_of(Foreign(np.zeros((0, 4)), True))
    assert low == high


def test_events_are_lent_again(simulated_cupy, monkeypatch):
    cupy, made = simulated_cupy(devices=2), []
    original = cupy.cuda.Event

    def event(**options):
        made.append(options)
        return original(**options)

    monkeypatch.setattr(cupy.cuda, "Event", event)
    runtime = engine.create("threaded")
    runtime.use(engine.Cuda(cupy))
    array = cupy.zeros(4)
    for _ in range(100):
        runtime.push(lambda: array.__iadd__(1), reads=[array], writes=[array]).result(30)
    assert array.tolist() == [100] * 4
    assert 0 < len(made) < 10
    runtime.close()
