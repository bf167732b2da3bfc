"""The kernels for arrays in a GPU's memory: the names of :mod:`kvstore.kernels` on CuPy arrays.

``kernels.cu`` and ``compression.cu`` are the arithmetic, ``launches.py`` says which kernel is started for which arrays,
and ``gpu.py`` starts it. Only the last knows CuPy. The tests put the processor in its place, so that the others are
tested without a GPU.
"""
