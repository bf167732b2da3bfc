"""What can be known of the CUDA kernels without a GPU, beside the contract: that they compile, and what is refused."""

from __future__ import annotations

import math
import shutil
import subprocess

import numpy as np
import pytest

from kvstore.kernels import Change
from kvstore.kernels.cuda.launches import NEAR, OPTIONS, TILE_BYTES, Launches, source
from tests.kernels import on_cpu
from tests.kernels.forms import cuda_on_cpu
from tests.kernels.on_cpu import OnCpu

NVCC = shutil.which("nvcc")
WANTED = ("80", "90", "100")

on_cpu_only = pytest.mark.skipif(not on_cpu.COMPILER, reason="there is no g++")


@pytest.mark.skipif(not NVCC, reason="there is no nvcc")
def test_the_source_compiles(tmp_path):
    """For every architecture that the compiler knows, in one run."""
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    codes = ",".join(f"sm_{wanted}" for wanted in WANTED if f"compute_{wanted}" in known)
    code, target = tmp_path / "kernels.cu", tmp_path / "kernels.fatbin"
    code.write_text(source())
    command = [NVCC, *OPTIONS, "-gencode", f"arch=compute_80,code=[{codes}]", "-fatbin", "-o", target, code]
    command += ["--threads", "0"]  # as many as there are cores
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert target.stat().st_size


@on_cpu_only
def test_more_arrays_than_are_passed_with_a_kernel():
    arrays = [np.full(70, k, np.float16) for k in range(NEAR + 10)]
    out, other = np.empty(70, np.float16), np.empty(70, np.float16)
    cuda_on_cpu().allreduce(arrays, out, [other])
    assert (out == sum(range(NEAR + 10))).all()
    assert (other == out).all()


@on_cpu_only
@pytest.mark.parametrize(("count", "devices"), [(1, 1), (20, 1), (1000, 1), (15, 2), (700, 3)])
def test_many_arrays_are_one_kernel(count, devices):
    """With their addresses beside the kernel, or in memory."""
    processor = OnCpu()
    launches, rng = Launches(processor), np.random.default_rng(count)
    shapes = [(int(size),) for size in rng.integers(0, 99, count - 1)] + [(3 * TILE_BYTES // 4 + 5,)]
    groups = [[np.asarray(rng.integers(0, 9, shape), np.float32) for _ in range(devices)] for shape in shapes]
    out = np.empty(sum(arrays[0].size for arrays in groups), np.float32)
    launches.merge_many(groups, out)
    assert (out == np.concatenate([sum(arrays) for arrays in groups])).all()
    launches.split(out, [arrays[0] for arrays in groups])
    assert (out == np.concatenate([arrays[0] for arrays in groups])).all()
    assert processor.started == ["merge_many_f4"] * 2


@on_cpu_only
def test_what_no_kernel_is_for():
    wrong = np.zeros(3, np.float16)
    with pytest.raises(TypeError, match="sgd: expected float32 or float64"):
        cuda_on_cpu().sgd(Change(wrong, wrong, [wrong]), (None,), 0.1, 0.0, 0.0, 1.0, 0.0, 0.0)
    with pytest.raises(TypeError, match="accumulate: expected float32 or float64 to scale"):
        cuda_on_cpu().accumulate(Change(wrong, wrong, [wrong], 0.5, math.inf), ())
    with pytest.raises(TypeError, match="row ids: expected int64, got int32"):
        cuda_on_cpu().gather(wrong, np.zeros(1, np.int32), wrong[:1])
