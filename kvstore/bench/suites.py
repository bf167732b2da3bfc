"""The suites: which cases are compared with which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from kvstore.bench.cases import Case, Group, Line, Shapes, System
from kvstore.bench.models import MODELS

COPY, LOOP = "copy", "bare pyzmq"
PEERS = {"MXNet": "MXNet", "gloo": "gloo"}
QUICK_SIZES = (4, 64 << 10, 1 << 20)
SIZES = (4, 1 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20, 1 << 30)
SMALL = 64 << 10
KVSTORE, MXNET, GLOO, PYZMQ, NUMPY = (
    System("kvstore"),
    System("mxnet", type="dist_sync"),
    System("gloo", servers=0),
    System("pyzmq"),
    System("numpy", workers=1, servers=0),
)


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line said."""

    max_bytes: int = 256 << 20
    quick: bool = False

    @property
    def sizes(self) -> list[int]:
        return [size for size in (QUICK_SIZES if self.quick else SIZES) if size <= self.max_bytes]


def size_name(size: int) -> str:
    """4 B, 64 KB, 1 MB ..."""
    for power, unit in ((30, "GB"), (20, "MB"), (10, "KB")):
        if size >= 1 << power:
            return f"{size / (1 << power):g} {unit}"
    return f"{size} B"


def one(size: int) -> Shapes:
    return ((size // 4,),)


def sizes(options: Options) -> list[Group]:
    """One key: what is done with it, over its size."""
    groups = []
    for size in options.sizes:
        shapes, label = one(size), size_name(size)
        cases = {
            "pushpull": Case(KVSTORE, "pushpull", shapes),
            "MXNet": Case(MXNET, "pushpull", shapes),
            "gloo": Case(GLOO, "all_reduce", shapes),
            LOOP: Case(PYZMQ, "loop", shapes),
            COPY: Case(NUMPY, "copy", shapes),
            "pushpull in place": Case(KVSTORE, "in place", shapes),
            "pushpull, tcp": Case(replace(KVSTORE, tcp=True), "pushpull", shapes),
            "push": Case(KVSTORE, "push", shapes),
            "MXNet push": Case(MXNET, "push", shapes),
            "pull": Case(KVSTORE, "pull", shapes),
            "MXNet pull": Case(MXNET, "pull", shapes),
            "add": Case(NUMPY, "add", shapes),
            "add, 2 threads": Case(NUMPY, "add, 2 threads", shapes),
        }
        names = ["pushpull", "pushpull in place", "pushpull, tcp"]
        lines = [
            Line(f"{name}, {label}", name, LOOP, {COPY: COPY, **PEERS}, {"curve": name, "bytes": size})
            for name in names
        ]
        lines += [
            Line(f"push, {label}", "push", COPY, {"MXNet": "MXNet push"}),
            Line(f"pull, {label}", "pull", COPY, {"MXNet": "MXNet pull"}),
            Line(f"np.add, {label}", "add", COPY, {"2 threads": "add, 2 threads"}),
        ]
        if size <= SMALL:
            for name, plain in (("spinning", "pushpull"), ("MXNet spinning", "MXNet"), ("gloo spinning", "gloo")):
                cases[name] = replace(cases[plain], spinning=True)
            beside = {"MXNet": "MXNet spinning", "gloo": "gloo spinning"}
            lines.append(Line(f"pushpull while the caller spins, {label}", "spinning", LOOP, beside))
        groups.append(Group(cases, lines))
    return groups


SUITES: dict[str, Callable[[Options], list[Group]]] = {"sizes": sizes}
