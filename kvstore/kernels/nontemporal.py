"""A copy that does not go through the caches, as machine code made from a page of LLVM's language.

Not in ``jitted.py``: a worker needs no other kernel, and llvmlite alone is loaded in 20 ms, where Numba takes half
a second and 50 MB more.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache

import numpy as np

from kvstore.kernels.reference import Array

log = logging.getLogger(__name__)

LINE = 64  # bytes that the caches handle as one

_CODE = """
define void @copy(<64 x i8>* %target, <64 x i8>* %source, i64 %lines) {
begin:
  br label %each
each:
  %at = phi i64 [0, %begin], [%next, %each]
  %from = getelementptr <64 x i8>, <64 x i8>* %source, i64 %at
  %to = getelementptr <64 x i8>, <64 x i8>* %target, i64 %at
  %line = load <64 x i8>, <64 x i8>* %from, align 1
  store <64 x i8> %line, <64 x i8>* %to, align 64, !nontemporal !0
  %next = add i64 %at, 1
  %more = icmp ult i64 %next, %lines
  br i1 %more, label %each, label %end
end:
  fence seq_cst
  ret void
}
!0 = !{i32 1}
"""


def copy(source: Array, target: Array) -> None:
    """``target`` = ``source``, both flat, of one dtype and size and in one run of memory."""
    from_, to = source.view(np.uint8), target.view(np.uint8)
    head = -to.ctypes.data % LINE
    lines = (to.size - head) // LINE
    copied = _compiled() if lines > 0 else None
    if copied is None:
        np.copyto(to, from_)
        return
    end = head + lines * LINE
    np.copyto(to[:head], from_[:head])
    copied(to.ctypes.data + head, from_.ctypes.data + head, lines)
    np.copyto(to[end:], from_[end:])


@cache
def _compiled() -> Callable[[int, int, int], None] | None:
    """What copies so many lines to an address that is a multiple of ``LINE`` from any other; without the GIL."""
    try:
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
        )
        code = llvm.create_mcjit_compiler(llvm.parse_assembly(_CODE), machine)
        code.finalize_object()
        copied = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(
            code.get_function_address("copy")
        )
    except Exception as error:
        log.info("large copies go through the caches: %r", error)
        return None
    copied.code = code  # type: ignore[attr-defined]  # which owns the memory of the instructions
    return copied
