"""Nobody waits for a compiler: kernels come in the background, or never, and the sums are right all the time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from kvstore.kernels.loader import Loader

BITS = np.dtype(np.int16)  # of bfloat16

SUMS = """
import logging, sys
logging.basicConfig(level=logging.INFO)
import numpy as np
from kvstore import kernels, optim
from kvstore.kernels.loader import LOADER
assert "numba" not in sys.modules
def check():
    out = np.empty(1000, np.float32)
    kernels.merge([np.ones(1000, np.float32)] * 3, out)
    assert (out == 3).all()
    rule, value = optim.SGD(lr=1.0), np.zeros(1000)
    rule.update(value, [np.ones(1000)] * 2, rule.create_state(value), 1)
    assert (value == -2).all()
check()
assert kernels.wait(60)
check()
print(LOADER)
"""


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )


def test_a_kernel_comes_after_it_was_asked_for():
    loader = Loader()
    assert loader["widen", BITS, BITS] is None
    assert loader.wait(60)
    kernel = loader["widen", BITS, BITS]
    assert kernel is not None
    out = np.zeros(2, np.float32)
    kernel(np.array([0x3F80, 0x4000], np.int16), out)
    assert out.tolist() == [1, 2]
    assert repr(loader) == "<Loader: 2 kernels, 0 to come>"


def test_a_kernel_that_cannot_be_had(caplog):
    loader = Loader()
    assert loader["no such", BITS, BITS] is None
    assert loader.wait(60)
    assert loader["no such", BITS, BITS] is None
    assert "no such" in caplog.text


def test_numba_is_imported_by_the_first_kernel():
    assert run(SUMS).stdout == "<Loader: 4 kernels, 0 to come>\n"


def test_without_numba():
    done = run("import sys; sys.modules['numba'] = None\n" + SUMS.replace('"numba" not in', '"n" not in'))
    assert done.stdout == "<Loader: 0 kernels, 0 to come>\n"
    assert "Numba cannot be imported" in done.stderr


def test_without_a_place_for_the_cache(tmp_path: Path):
    """An installed package that cannot be written, and no home: compiled for this process alone."""
    package = tmp_path / "site"
    for source in ("kvstore", "engine"):
        (package / source).parent.mkdir(exist_ok=True)
        subprocess.run(["cp", "-r", Path(__file__).parents[2] / source, package / source], check=True)
    (package / "kvstore/kernels/__pycache__").mkdir(exist_ok=True)
    locators = "import numba.core.caching as c; c.CacheImpl._locator_classes = []\n"
    program = SUMS.replace("check()\nassert kernels", locators + "check()\nassert kernels", 1)
    assert run(program, PYTHONPATH=str(package)).stdout == "<Loader: 4 kernels, 0 to come>\n"


def test_a_forked_child_uses_what_was_there():
    program = SUMS + (
        "import os, warnings; warnings.simplefilter('ignore')\n"
        "kernels.merge([np.ones(3)] * 2, np.ones(3))\n"  # starts to load
        "child = os.fork()\n"
        "if child == 0:\n"
        "    check(); assert kernels.wait(1); os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert run(program).stdout.endswith("\n7\n")
