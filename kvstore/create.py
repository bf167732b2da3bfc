"""From the name of a store's type to a store."""

from __future__ import annotations

import math
import os

import engine
from kvstore import comm, consistency, environment, plain
from kvstore.cluster import keys as key_files
from kvstore.cluster.client import ClusterHome
from kvstore.cluster.near import Neighbourhood
from kvstore.cluster.session import Session
from kvstore.consistency import Eventual, Model, Sequential
from kvstore.errors import DeviceCountError, OptionError
from kvstore.home import Home
from kvstore.local import LocalHome
from kvstore.protocol.messages import ON_LOSS, SAMPLES_MAX
from kvstore.protocol.sampling import check_model
from kvstore.store import KVStore
from kvstore.transport.network import HEARTBEAT_S, Network
from kvstore.transport.zeromq import NETWORK

_LOCAL = ("local", "device", "nccl")
_CLUSTER: dict[str, tuple[Model, Model]] = {  # type -> models of the device level and the cluster level
    "dist": (Sequential(), Sequential()),
    "dist_sync": (Sequential(), Sequential()),
    "dist_sync_device": (Sequential(), Sequential()),
    "dist_device_sync": (Sequential(), Sequential()),
    "dist_async": (Sequential(), Eventual()),
    "dist_async_device": (Sequential(), Eventual()),
}


def create(
    type: str = "local",
    *,
    devices: int | None = None,
    device_consistency: str | Model | None = None,
    cluster_consistency: str | Model | None = None,
    samples_per_round: int | None = None,
    device_merge: str | None = None,
    address: str | None = None,
    rank: int | None = None,
    timeout: float = 300.0,
    connect_timeout: float = 30.0,
    shared_memory: bool | None = None,
    on_worker_loss: str | None = None,
    heartbeat: float | None = None,
    keys: str | os.PathLike[str] | None = None,
) -> KVStore:
    """Make a store.

    >>> import numpy as np, kvstore
    >>> with kvstore.create("local", devices=2) as kv:
    ...     kv.init("w", np.zeros(3))
    ...     kv.pushpull("w", [np.ones(3), np.ones(3)], out=np.empty(3)).result()
    array([2., 2., 2.])

    Args:
        type: ``local``, ``device`` or ``nccl`` (this process alone), ``dist``, ``dist_sync``, ``dist_async`` (a
            cluster), and MXNet's other names for these. In a ``local`` store the values are in the host's memory; in
            the other two those that are pushed from GPUs live there, and are updated there. Without a GPU the
            ``device`` types and ``nccl`` equal the plain ones.
        devices: how many devices this worker has; None: the first push says.
        device_consistency, cluster_consistency: ``sequential``, ``bounded(s)`` or ``eventual``.
        samples_per_round: every update shall be that of a sum over so many samples: each push says how many it holds
            (``samples=``), and a round's sum is multiplied by what makes it that of so many, whoever was in it. For
            models that merge rounds, which ``sequential`` is; all workers must agree. None: sums stay as they are.
        device_merge: how the arrays of several GPUs come together: ``auto`` (the default: the quicker of the next two,
            measured once), ``direct`` (one kernel reads them all), ``copy`` (they are copied to one GPU first); these
            sum in the order of the devices, and so give the same bits as on the host. ``tree`` (pair by pair) and
            ``nccl`` (by NVIDIA's library; the default of that type) have their own order.
        address: the scheduler's, ``tcp://host:port``; None: from ``KVSTORE_ADDRESS``.
        rank: the rank wanted; None: from ``KVSTORE_RANK``, else any.
        timeout: seconds that a wait may take when the call does not say.
        connect_timeout: seconds within which the scheduler must answer.
        shared_memory: exchange values with servers of this host through shared memory; None: as
            ``KVSTORE_SHARED_MEMORY`` says (0: no), else yes.
        on_worker_loss: what becomes of rounds that wait for a worker which is lost: ``fail`` (they raise
            :class:`~kvstore.WorkerLostError`), ``wait`` (for it to come back under its rank) or ``continue``
            (without it). All workers must agree. None: as ``KVSTORE_ON_WORKER_LOSS`` says, else ``fail``.
        heartbeat: seconds after which a scheduler that shows no sign of life is taken for gone; None: as
            ``KVSTORE_HEARTBEAT`` says, else 3. For how long a worker may be silent the scheduler is told the same way.
        keys: the directory of this process's keys, for a protected cluster (``kvstore keygen``); None: as
            ``KVSTORE_KEYS`` says, else there are none.

    Raises:
        OptionError: an unknown type or model, no address, an option that the type has not, or an environment
            that is ill-formed or meant for a server or scheduler.
        UnreachableError: nobody answers at the address.
        AuthenticationError: somebody does, but the two do not accept each other's keys.
        DeadlineError: the cluster was not complete within ``timeout``.
    """
    if type in _LOCAL and keys is not None:
        raise OptionError(f"create({type!r}): expected no keys, which is for clusters; got {keys!r}")
    return create_on(
        NETWORK if type in _LOCAL else key_files.network(keys or environment.read().keys),
        engine.default(),
        type,
        devices=devices,
        device_consistency=device_consistency,
        cluster_consistency=cluster_consistency,
        samples_per_round=samples_per_round,
        device_merge=device_merge,
        address=address,
        rank=rank,
        timeout=timeout,
        connect_timeout=connect_timeout,
        shared_memory=shared_memory,
        on_worker_loss=on_worker_loss,
        heartbeat=heartbeat,
    )


def create_on(
    network: Network,
    runtime: engine.Engine,
    type: str,
    *,
    devices: int | None = None,
    device_consistency: str | Model | None = None,
    cluster_consistency: str | Model | None = None,
    samples_per_round: int | None = None,
    device_merge: str | None = None,
    address: str | None = None,
    rank: int | None = None,
    timeout: float = 300.0,
    connect_timeout: float = 30.0,
    shared_memory: bool | None = None,
    on_worker_loss: str | None = None,
    heartbeat: float | None = None,
) -> KVStore:
    """:func:`create`, on a network and an engine of the caller's choice."""
    if not isinstance(type, str) or (type not in _LOCAL and type not in _CLUSTER):
        raise OptionError(f"create: expected a type among {', '.join([*_LOCAL, *_CLUSTER])}; got {type!r}")
    if devices is not None:
        count = plain.whole(devices)
        if count is None or count < 1:
            raise DeviceCountError(f"create: expected devices >= 1, got {devices!r}")
        devices = count
    if not all(isinstance(one, int | float) and one > 0 for one in (timeout, connect_timeout)):
        raise OptionError(f"create: expected timeouts > 0 seconds, got {timeout!r} and {connect_timeout!r}")
    defaults = _CLUSTER.get(type, (Sequential(), Sequential()))
    device_model = defaults[0] if device_consistency is None else consistency.parse(device_consistency)
    cluster_model = defaults[1] if cluster_consistency is None else consistency.parse(cluster_consistency)
    way = device_merge or (comm.NCCL if type == "nccl" else comm.AUTO)
    if way not in comm.WAYS:
        raise OptionError(f"device_merge: expected one of {', '.join(comm.WAYS)}; got {device_merge!r}")
    samples_per_round = _samples_per_round(samples_per_round)
    check_model(samples_per_round, device_model, f"create({type!r}), device level")
    check_model(samples_per_round, cluster_model, f"create({type!r}), cluster level")
    if type in _LOCAL:
        for name, given in (
            ("cluster_consistency", cluster_consistency),
            ("address", address),
            ("rank", rank),
            ("on_worker_loss", on_worker_loss),
            ("heartbeat", heartbeat),
        ):
            if given is not None:
                raise OptionError(f"create({type!r}): expected no {name}, which is for clusters; got {given!r}")
        runtime.retain()
        home: Home = LocalHome(runtime, on_gpus=type != "local")
    else:
        home = _join(
            network, address, rank, runtime, timeout, connect_timeout, shared_memory, on_worker_loss, heartbeat
        )
    return KVStore(
        type,
        home,
        runtime,
        devices=devices,
        device_model=device_model,
        cluster_model=cluster_model,
        timeout=timeout,
        samples_per_round=samples_per_round,
        device_merge=way,
    )


def _samples_per_round(given: object) -> int | None:
    if given is None:
        return None
    number = plain.whole(given)
    if number is None or not 1 <= number <= SAMPLES_MAX:
        raise OptionError(f"samples_per_round: expected a whole number 1..{SAMPLES_MAX}, got {given!r}")
    return number


def _join(
    network: Network,
    address: str | None,
    rank: int | None,
    runtime: engine.Engine,
    timeout: float,
    connect_timeout: float,
    shared_memory: bool | None,
    on_worker_loss: str | None,
    heartbeat: float | None,
) -> ClusterHome:
    around = environment.read()
    address = address or around.address
    if address is None:
        raise OptionError("create('dist'): expected the scheduler's address= or KVSTORE_ADDRESS; neither is set")
    if around.role not in (None, "worker"):
        raise OptionError(f"create('dist'): the environment says that this process is a {around.role}, not a worker")
    rank = around.rank if rank is None else rank
    wanted = -1 if rank is None else plain.whole(rank)
    if wanted is None or not -1 <= wanted < 1 << 31:
        raise OptionError(f"create('dist'): expected a rank >= 0, or -1 for any; got {rank!r}")
    share = around.shared_memory if shared_memory is None else shared_memory
    neighbourhood = Neighbourhood(0 if share is False else around.shared_memory_bytes)
    on_loss = on_worker_loss or around.on_worker_loss or ON_LOSS[0]
    if on_loss not in ON_LOSS:
        raise OptionError(f"on_worker_loss: expected one of {', '.join(ON_LOSS)}; got {on_loss!r}")
    heartbeat = around.heartbeat if heartbeat is None else heartbeat
    if heartbeat is not None and not 0 < heartbeat < 1e6:
        raise OptionError(f"heartbeat: expected a number of seconds > 0, got {heartbeat!r}")
    limit = 1e9 if timeout == math.inf else timeout
    session = Session(
        address,
        "worker",
        neighbourhood=neighbourhood,
        network=network,
        on_loss=on_loss,
        heartbeat=heartbeat or HEARTBEAT_S,
    )
    try:
        session.register(wanted, "", connect_timeout, limit)
        session.connect_servers()
        if session.joins:
            session.join(limit)
    except BaseException:
        session.close(linger_s=0)
        raise
    runtime.retain()
    return ClusterHome(session, runtime)
