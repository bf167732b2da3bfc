"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted([*ROOT.glob("engine/**/*.py"), *ROOT.glob("kvstore/**/*.py")])
PURE = [
    ROOT / "kvstore/consistency.py",
    *sorted((ROOT / "kvstore/protocol").glob("*.py")),
    ROOT / "engine/scheduler.py",
]
IMPURE = {"socket", "threading", "time", "os", "random", "secrets", "zmq", "numpy", "asyncio", "select", "subprocess"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__", "import_module", "compile"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", PURE, ids=name)
def test_pure_modules_import_nothing_impure(path):
    assert not {one.split(".")[0] for one in imports(path)} & IMPURE


def test_the_direction_of_imports():
    for path in MODULES:
        names = set(imports(path))
        if name(path).startswith("engine/"):
            assert not any(one.split(".")[0] == "kvstore" for one in names), path
        if name(path).startswith("kvstore/transport/"):
            assert not any(one.startswith(("kvstore.protocol", "kvstore.cluster", "kvstore.store")) for one in names), (
                path
            )
        if name(path).startswith("kvstore/protocol/"):
            assert not any(
                one.startswith(("kvstore.cluster", "kvstore.transport", "kvstore.store")) for one in names
            ), path


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_no_pickle_no_eval_no_import_by_name(path):
    assert not {one.split(".")[0] for one in imports(path)} & {"pickle", "marshal", "shelve", "cloudpickle", "dill"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            receiver = getattr(getattr(node.func, "value", None), "id", "")
            assert called not in FORBIDDEN_CALLS or receiver == "re", f"{called} in line {node.lineno}"
            for option in node.keywords:  # NumPy's other way to pickle
                allowed = not isinstance(option.value, ast.Constant) or option.value.value
                assert option.arg != "allow_pickle" or not allowed, f"allow_pickle in line {node.lineno}"


def test_one_module_reads_the_environment():
    readers = [name(p) for p in MODULES if "os.environ" in p.read_text() or "getenv" in p.read_text()]
    assert readers == ["kvstore/environment.py"]


def test_cupy_comes_in_through_the_seam_only():
    for path in MODULES:
        if any(one.split(".")[0] == "cupy" for one in imports(path)):
            assert name(path) == "kvstore/arrays/gpu.py" or name(path).startswith("kvstore/kernels/cuda/")


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
