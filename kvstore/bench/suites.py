"""The suites: which cases are compared with which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from kvstore.bench import beginning, footprint
from kvstore.bench.cases import Case, Group, Line, Shapes, System
from kvstore.bench.driver import Driver
from kvstore.bench.models import MODELS
from kvstore.bench.statistic import Rows
from kvstore.bench.systems import SCRIPTS
from kvstore.errors import KVStoreError

COPY, LOOP = "copy", "bare pyzmq"
BOTH = {"MXNet": "MXNet", "gloo": "gloo"}
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
TCP = replace(KVSTORE, tcp=True)
ROUND_SYSTEMS = {"shared memory": KVSTORE, "tcp": TCP, "MXNet": MXNET, "gloo": GLOO}
OPTIMIZER_NAMES = {"none": "no optimizer", "sgd": "SGD momentum", "adam": "Adam"}
DEVICES = 4


Step = Group | Callable[[Driver], Rows]


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line said."""

    max_bytes: int = 256 << 20
    quick: bool = False
    trace: str | None = None  # a file

    @property
    def sizes(self) -> list[int]:
        return [size for size in (QUICK_SIZES if self.quick else SIZES) if size <= self.max_bytes]

    def some(self, *sizes: int) -> list[int]:
        """Those of ``sizes`` that are small enough; at least the first."""
        largest = min(self.max_bytes, QUICK_SIZES[-1] if self.quick else self.max_bytes)
        return [sizes[0], *(size for size in sizes[1:] if size <= largest)]


def size_name(size: int) -> str:
    """4 B, 64 KB, 1 MB ..."""
    for power, unit in ((30, "GB"), (20, "MB"), (10, "KB")):
        if size >= 1 << power:
            return f"{size / (1 << power):g} {unit}"
    return f"{size} B"


def many(count: int, thing: str) -> str:
    """1 key, 2 keys."""
    return f"{count} {thing}" if count == 1 else f"{count:,} {thing}s"


def one(size: int) -> Shapes:
    return ((size // 4,),)


def sizes(options: Options) -> list[Step]:
    """One key: what is done with it, over its size."""
    groups: list[Step] = []
    for size in options.sizes:
        shapes, label = one(size), size_name(size)
        cases = {
            "pushpull": Case(KVSTORE, "pushpull", shapes),
            "MXNet": Case(MXNET, "pushpull", shapes),
            "gloo": Case(GLOO, "all_reduce", shapes),
            LOOP: Case(PYZMQ, "loop", shapes),
            COPY: Case(NUMPY, "copy", shapes),
            "pushpull in place": Case(KVSTORE, "in place", shapes),
            "pushpull, tcp": Case(TCP, "pushpull", shapes),
            "push": Case(KVSTORE, "push", shapes),
            "MXNet push": Case(MXNET, "push", shapes),
            "pull": Case(KVSTORE, "pull", shapes),
            "MXNet pull": Case(MXNET, "pull", shapes),
            "add": Case(NUMPY, "add", shapes),
            "add, 2 threads": Case(NUMPY, "add, 2 threads", shapes),
        }
        names = ["pushpull", "pushpull in place", "pushpull, tcp"]
        lines = [
            Line(f"{name}, {label}", name, LOOP, beside={COPY: COPY, **BOTH}, more={"curve": name}) for name in names
        ]
        lines += [
            Line(f"push, {label}", "push", COPY, beside={"MXNet": "MXNet push"}),
            Line(f"pull, {label}", "pull", COPY, beside={"MXNet": "MXNet pull"}),
            Line(f"np.add, {label}", "add", COPY, beside={"2 threads": "add, 2 threads"}),
        ]
        if size <= SMALL:
            for name, plain in (("spinning", "pushpull"), ("MXNet spinning", "MXNet"), ("gloo spinning", "gloo")):
                cases[name] = replace(cases[plain], spinning=True)
            beside = {"MXNet": "MXNet spinning", "gloo": "gloo spinning"}
            lines.append(Line(f"pushpull while the caller spins, {label}", "spinning", LOOP, beside=beside))
        groups.append(Group(cases, lines))
    return groups


SCALE = ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2))  # workers, servers


def keys(options: Options) -> list[Step]:
    """Many small keys in one call."""
    groups: list[Step] = []
    for count in (1, 100) if options.quick else (1, 10, 100, 1000, 10_000):
        shapes = ((100,),) * count
        cases = {
            "pushpull": Case(KVSTORE, "pushpull", shapes),
            "MXNet": Case(MXNET, "pushpull", shapes),
            "gloo": Case(GLOO, "buckets", shapes),
            LOOP: Case(PYZMQ, "loop", shapes),
            COPY: Case(NUMPY, "copy", shapes),
            "pushpull, tcp": Case(TCP, "pushpull", shapes),
        }
        lines = [
            Line(f"{name}, {many(count, 'key')} of 100 floats", name, LOOP, beside={COPY: COPY, **BOTH})
            for name in ("pushpull", "pushpull, tcp")
        ]
        groups.append(Group(cases, lines))
    return groups


def scale(options: Options) -> list[Step]:
    """The same value with other numbers of workers and servers, by shared memory and by tcp."""
    groups: list[Step] = []
    for workers, servers in ((1, 1), (2, 2)) if options.quick else SCALE:
        own, mxnet = (replace(system, workers=workers, servers=servers) for system in (KVSTORE, MXNET))
        cases: dict[str, Case] = {}
        lines = []
        for size in options.some(SMALL, 16 << 20, 64 << 20):
            shapes, label = one(size), size_name(size)
            cases |= {
                f"memory {size}": Case(own, "pushpull", shapes),
                f"MXNet {size}": Case(mxnet, "pushpull", shapes),
                f"{LOOP} {size}": Case(replace(PYZMQ, workers=workers), "loop", shapes),
                f"tcp {size}": Case(replace(own, tcp=True), "pushpull", shapes),
            }
            beside = {"MXNet": f"MXNet {size}"}
            if workers > 1:
                cases[f"gloo {size}"] = Case(replace(GLOO, workers=workers), "all_reduce", shapes)
                beside["gloo"] = f"gloo {size}"
            for way, name in (("shared memory", "memory"), ("tcp", "tcp")):
                title = f"{many(workers, 'worker')}, {many(servers, 'server')}, {way}, {label}"
                lines.append(Line(title, f"{name} {size}", f"{LOOP} {size}", LOOP, beside=beside))
        groups.append(Group(cases, lines))
    return groups


def consistency(options: Options) -> list[Step]:
    """The cluster level's models, with SGD momentum on the server."""
    groups: list[Step] = []
    own, mxnet = replace(KVSTORE, optimizer="sgd"), replace(MXNET, optimizer="sgd")
    for size in options.some(SMALL, 16 << 20):
        shapes, label = one(size), size_name(size)
        cases = {
            "sequential": Case(own, "pushpull", shapes, "sequential"),
            "MXNet dist_sync": Case(mxnet, "pushpull", shapes),
            "bounded(2)": Case(own, "pushpull", shapes, "bounded(2)"),
            "eventual": Case(own, "pushpull", shapes, "eventual"),
            "MXNet dist_async": Case(replace(mxnet, type="dist_async"), "pushpull", shapes),
            LOOP: Case(PYZMQ, "loop", shapes),
        }
        lines = [
            Line(f"sequential, {label}", "sequential", LOOP, beside={"MXNet": "MXNet dist_sync"}),
            Line(f"bounded(2), {label}", "bounded(2)", LOOP),
            Line(f"eventual, {label}", "eventual", LOOP, beside={"MXNet": "MXNet dist_async"}),
        ]
        groups.append(Group(cases, lines))
    return groups


def optimizers(options: Options) -> list[Step]:
    """Optimizers on the server."""
    groups: list[Step] = []
    for size in options.some(1 << 20, 64 << 20):
        cases = {LOOP: Case(PYZMQ, "loop", one(size)), "add": Case(NUMPY, "add", one(size))}
        lines = []
        for optimizer in ("none", "sgd", "adam"):
            cases[optimizer] = Case(replace(KVSTORE, optimizer=optimizer), "pushpull", one(size))
            cases[f"MXNet {optimizer}"] = Case(replace(MXNET, optimizer=optimizer), "pushpull", one(size))
            beside = {"MXNet": f"MXNet {optimizer}", "np.add": "add"}
            lines.append(Line(f"{OPTIMIZER_NAMES[optimizer]}, {size_name(size)}", optimizer, LOOP, beside=beside))
        groups.append(Group(cases, lines))
    return groups


def models(options: Options) -> list[Step]:
    """A model's parameters, all in one call, with SGD momentum on the server; gloo only adds up."""
    groups: list[Step] = []
    own, mxnet = replace(KVSTORE, optimizer="sgd"), replace(MXNET, optimizer="sgd")
    for model in ("mlp",) if options.quick else ("resnet50", "bert-base"):
        shapes = tuple(MODELS[model]().values())
        for title, store, peer in (
            ("shared memory", own, mxnet),
            ("tcp", replace(own, tcp=True), mxnet),
            ("2 servers", replace(own, servers=2), replace(mxnet, servers=2)),
        ):
            cases = {
                "kvstore": Case(store, "pushpull", shapes),
                "MXNet": Case(peer, "pushpull", shapes),
                "gloo": Case(GLOO, "buckets", shapes),
                "gloo each": Case(GLOO, "tensor by tensor", shapes),
                LOOP: Case(PYZMQ, "loop", shapes),
                COPY: Case(NUMPY, "copy", shapes),
            }
            beside = {COPY: COPY, **BOTH, "gloo, each tensor": "gloo each"}
            groups.append(Group(cases, [Line(f"{model}, {title}", "kvstore", LOOP, beside=beside)]))
    return groups


def staging(options: Options) -> list[Step]:
    """Rounds whose gradients are produced, and whose values are read, in the store's memory."""
    groups: list[Step] = []
    for size in options.some(1 << 20, 16 << 20, 64 << 20, 256 << 20):
        shapes = one(size)
        cases = {
            "staged": Case(KVSTORE, "staged", shapes),
            "pushpull": Case(KVSTORE, "pushpull", shapes),
            "MXNet": Case(MXNET, "pushpull", shapes),
            "gloo": Case(GLOO, "all_reduce", shapes),
            COPY: Case(NUMPY, "copy", shapes),
        }
        beside = {"pushpull": "pushpull", **BOTH}
        groups.append(Group(cases, [Line(f"staging and view, {size_name(size)}", "staged", COPY, beside=beside)]))
    return groups


def priority(options: Options) -> list[Step]:
    """Training steps with emulated compute: the first layer is needed first, and its gradient comes last."""
    groups: list[Step] = []
    shapes = ((256, 1024),) * 4 if options.quick else ((1024, 1024),) * 16 + ((8192, 1024),) * 2
    for way, system in (("shared memory", KVSTORE), ("tcp", TCP)):
        cases = {
            "with": Case(system, "step by priority", shapes),
            "without": Case(system, "step", shapes),
            "round": Case(system, "pushpull", shapes),
        }
        line = Line(f"a step by priority, {way}", "with", "round", beside={"without": "without"})
        groups.append(Group(cases, [line]))
    return groups


def local(options: Options) -> list[Step]:
    """One process with four devices."""
    model = "mlp" if options.quick else "resnet50"
    shapes = tuple(MODELS[model]().values())
    groups: list[Step] = []
    for optimizer in ("none", "sgd"):
        own = System("kvstore local", 1, 0, optimizer, devices=DEVICES)
        mxnet = System("mxnet local", 1, 0, optimizer, devices=DEVICES)
        cases = {
            "kvstore": Case(own, "pushpull", shapes),
            "MXNet local": Case(replace(mxnet, type="local"), "push, pull", shapes),
            "MXNet device": Case(replace(mxnet, type="device"), "push, pull", shapes),
            "sums and copies": Case(replace(NUMPY, devices=DEVICES), "sums and copies", shapes),
        }
        beside = {"MXNet local": "MXNet local", "MXNet device": "MXNet device"}
        title = f"{model}, {DEVICES} devices, {OPTIMIZER_NAMES[optimizer]}"
        groups.append(Group(cases, [Line(title, "kvstore", "sums and copies", beside=beside)]))
    return groups


def engine(options: Options) -> list[Step]:
    """Ops per second of the dependency engine."""
    from kvstore.bench import engine_ops

    def measure(driver: Driver) -> Rows:
        python = driver.interpreters.of.get("mxnet")
        if python is None:
            return engine_ops.measure(driver.repeats, None)
        with engine_ops.MXNetEngine(python, SCRIPTS / "engine_mxnet.py") as mxnet:
            driver.versions["mxnet"] = mxnet.version
            return engine_ops.measure(driver.repeats, mxnet)

    return [measure]


def kernels(options: Options) -> list[Step]:
    """The arithmetic alone, beside the memory's rate."""
    from kvstore.bench import kernel_rates

    elements = min(25_000_000, options.max_bytes // 4, 1_000_000 if options.quick else options.max_bytes)
    return [lambda driver: kernel_rates.measure(elements, driver.repeats)]


def gpu(options: Options) -> list[Step]:
    """Arrays in the memory of a GPU; only if named.

    Raises:
        KVStoreError: there is none.
    """
    from kvstore.arrays.gpu import missing, module
    from kvstore.bench import gpu_kernels, gpu_stores

    if reason := missing():
        raise KVStoreError(f"gpu: expected a GPU: {reason}")
    quick = options.quick
    elements = min(1 << 12 if quick else 25_000_000, options.max_bytes // 4)
    models: dict[str, Shapes] = {
        name: tuple(MODELS[name]().values()) for name in (("mlp",) if quick else ("resnet50", "bert-base"))
    }

    def on_kernels(driver: Driver) -> Rows:
        driver.versions |= {"cupy": module().__version__, "gpu": _gpu_name()}
        return gpu_kernels.measure(elements, *((64, driver.repeats, 2) if quick else (1_000_000, driver.repeats, 20)))

    return [
        on_kernels,
        lambda driver: gpu_stores.measure_staging(elements, driver.repeats),
        lambda driver: gpu_stores.measure_rounds(models, driver.repeats),
        lambda driver: gpu_stores.measure_engine(100, elements // 6, options.trace, driver.repeats),
    ]


def _gpu_name() -> str:
    from kvstore.arrays.gpu import module

    name: bytes = module().cuda.runtime.getDeviceProperties(0)["name"]
    return name.decode()


def memory(options: Options) -> list[Step]:
    """What a round needs beside time."""
    size = options.some(1 << 20, 256 << 20)[-1]
    smaller = min(size, 16 << 20)
    many_workers, rounds = (3, (5, 10)) if options.quick else (8, (100, 1_000))
    own = {"shared memory": KVSTORE, "tcp": TCP}
    return [
        lambda driver: footprint.measure(driver, one(size), size_name(size), ROUND_SYSTEMS, PYZMQ, many_workers),
        lambda driver: footprint.measure_steady(driver, one(smaller), size_name(smaller), own, rounds),
    ]


def start(options: Options) -> list[Step]:
    """The first round after the start beside the steady one."""
    size = options.some(1 << 20, 64 << 20)[-1]
    steps: list[Step] = [lambda driver: beginning.measure(driver, one(size), size_name(size), ROUND_SYSTEMS)]
    if not options.quick:
        shapes = tuple(MODELS["resnet50"]().values())
        systems = {
            name: replace(s, optimizer="none" if s.peer == "gloo" else "sgd") for name, s in ROUND_SYSTEMS.items()
        }
        steps.append(lambda driver: beginning.measure(driver, shapes, "resnet50, SGD momentum", systems))
    return steps


SUITES: dict[str, Callable[[Options], list[Step]]] = {
    "sizes": sizes,
    "keys": keys,
    "scale": scale,
    "consistency": consistency,
    "optimizers": optimizers,
    "models": models,
    "staging": staging,
    "priority": priority,
    "local": local,
    "engine": engine,
    "kernels": kernels,
    "memory": memory,
    "start": start,
    "gpu": gpu,
}
BY_NAME = ("gpu",)  # not among those that run when none is named
