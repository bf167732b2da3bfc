"""Each name goes to the form for the memory of its arrays."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import numpy as np
import pytest

from kvstore import kernels
from kvstore.kernels import Change, dispatch

Elsewhere = type("ndarray", (), {"__module__": "cupy", "dtype": np.dtype(np.float32)})


class Recorder:
    """In place of CUDA's form: what it was asked to do."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __getattr__(self, name: str):
        return lambda *arguments: self.calls.append((name, *arguments))


@pytest.fixture
def recorder(monkeypatch):
    module = ModuleType("kvstore.kernels.cuda.gpu")
    module.KERNELS = Recorder()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("kvstore.kernels.cuda.gpu", module, raising=False)
    return module.KERNELS


def arguments_of(name: str, array) -> tuple:
    match name:
        case "merge" | "merge_nontemporal" | "concatenate":
            return [array], array
        case "allreduce":
            return [array], array, [array]
        case "merge_many":
            return [[array]], array
        case "norm":
            return ([array],)
        case "cast" | "deduplicate" | "dequantize_1bit" | "dequantize_int8":
            return array, array
        case "broadcast" | "split":
            return array, [array]
        case "gather" | "scatter_add" | "quantize_1bit" | "quantize_int8":
            return array, array, array
        case "quantize_2bit":
            return array, array, 0.5, array
        case "dequantize_2bit":
            return array, 0.5, array
    return Change(array, array, [array]), (array,), 1.0, 2.0


@pytest.mark.parametrize("name", kernels.NAMES)
def test_arrays_of_a_gpu_go_to_its_form(name, recorder):
    kernel = getattr(kernels, name)
    arguments = arguments_of(name, type("ndarray", (Elsewhere,), {"__module__": "cupy"})())  # a type not seen before
    kernel(*arguments)
    kernel(*arguments)
    assert recorder.calls == [(name, *arguments)] * 2


def test_what_numpy_has_derived_is_numpys(tmp_path):
    mapped = np.memmap(tmp_path / "values", np.float32, "w+", shape=(600,))
    mapped[:] = 2
    kernels.merge([mapped, mapped], mapped)
    assert (mapped == 4).all()
    assert kernels.norm((np.float32(3),)) == 3
    numbers = 0.5, 0.0, 0.0, 1.0, 0.0, 1.0
    kernels.sgd(Change(mapped, mapped, [mapped.copy()], 1.0, math.inf), (None,), *numbers)
    assert (mapped == 2).all()


def test_arrays_of_no_known_library():
    class Foreign:
        pass

    with pytest.raises(TypeError, match="expected arrays of NumPy or CuPy, got"):
        kernels.merge([np.zeros(3)], Foreign())


def test_the_forms_say_what_they_are():
    assert repr(dispatch.Forms(kernels.merge)) == "<Forms of merge for ndarray>"
