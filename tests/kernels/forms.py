"""The forms of the kernels that must all do the same; a test that takes ``form`` is run with each."""

from __future__ import annotations

import functools

import pytest

from kvstore import kernels
from kvstore.kernels import compiled
from tests.kernels import on_cpu


class Form:
    """How kernels are done at the moment, and by which of Numba's machine code they were done."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.used: set[str] = set()
        self.late: set[str] = set()  # what is not there yet

    def __getitem__(self, wanted):
        """In place of the loader's: at once, or never."""
        name, dtype, pushed = wanted
        if self.name != "numba" or name in self.late:
            return None

        def kernel(*arguments):
            self.used.add(name)
            return built(name, dtype, pushed)(*arguments)

        return kernel


@functools.cache
def built(name: str, dtype, pushed):
    from kvstore.kernels import jitted

    return jitted.build(name, dtype, pushed)


cuda_on_cpu = functools.cache(on_cpu.launches)


@pytest.fixture(
    params=[
        "numpy",
        "numba",
        pytest.param("cuda on cpu", marks=pytest.mark.skipif(not on_cpu.COMPILER, reason="there is no g++")),
    ]
)
def form(request, monkeypatch) -> Form:
    chosen = Form(request.param)
    monkeypatch.setattr(compiled, "LOADER", chosen)
    if chosen.name == "cuda on cpu":
        for name in kernels.NAMES:
            monkeypatch.setattr(kernels, name, getattr(cuda_on_cpu(), name))
    return chosen
