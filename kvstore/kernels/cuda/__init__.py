"""The kernels for arrays in a GPU's memory: the names of :mod:`kvstore.kernels` on CuPy arrays.

``kernels.cu`` is the arithmetic, ``launches.py`` says which kernel is started for which arrays, and ``gpu.py`` starts
it. Only the last knows CuPy. The tests put the processor in its place, so that the other two are tested without a GPU.
"""

from __future__ import annotations


def missing() -> str | None:
    """Why no kernel can run on a GPU here. None: it can. The first call imports CuPy, where it is installed."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported: {error}"
    try:
        cupy.cuda.runtime.getDeviceCount()  # an error where there is none
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy {cupy.__version__} finds no GPU: {error}"
    return None
