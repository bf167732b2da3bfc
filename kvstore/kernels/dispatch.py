"""Which form of a kernel does the work: the one for the memory in which its arrays lie.

The only place that asks where that is. A kernel is decorated once, and its table of forms is keyed on the arrays'
type, so that a NumPy array costs one look into a dict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy import ndarray

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


class Forms(dict[type, Callable[..., Any]]):
    """The forms of one kernel, by the type of an array. A list's or a tuple's form is that of its first."""

    def __init__(self, host: Callable[..., Any]) -> None:
        super().__init__({ndarray: host})
        self._name = host.__name__

    def __repr__(self) -> str:
        return f"<Forms of {self._name} for {', '.join(kind.__name__ for kind in self)}>"

    def __missing__(self, kind: type) -> Callable[..., Any]:
        form = self[kind] = self._find(kind)
        return form

    def _find(self, kind: type) -> Callable[..., Any]:
        if issubclass(kind, list | tuple):
            return lambda arrays, *rest: self[type(arrays[0])](arrays, *rest)
        if issubclass(kind, ndarray | np.generic):
            return self[ndarray]
        if kind.__module__.partition(".")[0] != "cupy":
            raise TypeError(f"kernels: expected arrays of NumPy or CuPy, got {kind.__module__}.{kind.__qualname__}")
        from kvstore.kernels.cuda import gpu

        form: Callable[..., Any] = getattr(gpu.KERNELS, self._name)
        return form


def by_memory(decides: int) -> Callable[[Kernel], Kernel]:
    """The decorated kernel is for host memory. Its argument number ``decides`` says in which memory they all lie."""

    def decorate(host: Kernel) -> Kernel:
        forms = Forms(host)
        kernel: Any
        match host.__code__.co_argcount:  # a call with so many costs a tenth of one with any number
            case 1:

                def kernel(a: Any) -> Any:
                    return forms[type(a)](a)
            case 2:

                def kernel(a: Any, b: Any) -> Any:
                    return forms[type((a, b)[decides])](a, b)
            case 3:

                def kernel(a: Any, b: Any, c: Any) -> Any:
                    return forms[type((a, b, c)[decides])](a, b, c)
            case 4:

                def kernel(a: Any, b: Any, c: Any, d: Any) -> Any:
                    return forms[type((a, b, c, d)[decides])](a, b, c, d)

        kernel.__name__, kernel.__qualname__, kernel.__doc__ = host.__name__, host.__qualname__, host.__doc__
        decorated: Kernel = kernel
        return decorated

    return decorate
