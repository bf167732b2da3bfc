"""The keys of one store, and what may be given for them.

What this file decides: what an argument means and whether it is right: which keys, how many devices, which arrays.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import engine
from kvstore import plain
from kvstore.arrays import HOST, Array, empty, found_in, gpu, is_array, is_writable, memory_of, view, writable_view
from kvstore.devices import Entry
from kvstore.errors import DeviceCountError, DtypeError, KeyKindError, ShapeError, UnknownKeyError
from kvstore.lists import Arrays, listed
from kvstore.protocol import wire
from kvstore.protocol.pieces import Key

Keys = Key | Sequence[Key]
Push = tuple[Entry, dict[int, list[Array]]]  # by device the arrays whose sum it pushes; none: it is only pulled
Target = tuple[list[Array] | None, Any]  # the arrays to write (None: in place), and the result

IN_PLACE = object()  # as ``out``: the value is not copied, the handle's result is the store's view of it
ITSELF = object()  # as ``out`` of a pushpull: what is pushed, which can be written


@dataclass(frozen=True, slots=True)
class Anew:
    """As ``out``: a new array in this memory."""

    memory: int


class Entries(dict[Key, Entry]):
    """The initialised keys of one store.

    Args:
        runtime: is told of GPUs with the first array of one.
        devices: how many each key is pushed by; None: the first push says.
    """

    def __init__(self, runtime: engine.Engine, devices: int | None) -> None:
        super().__init__()
        self.devices = devices
        self.gpus: set[int] = set()  # whose arrays have come
        self.kind = ""  # of the keys: "str" or "int", from the first one on
        self._engine = runtime
        self._declared = devices is not None
        self._lock = threading.Lock()

    @property
    def num_devices(self) -> int:
        """1 as long as nobody has said."""
        return self.devices or 1

    def add(self, entry: Entry) -> None:
        """One more key."""
        if self.devices is not None:
            entry.count(self.devices)
        with self._lock:
            self[entry.key] = entry
            self.kind = type_of(entry.key)

    def now(self) -> list[Entry]:
        """All of them, as of now."""
        with self._lock:
            return list(self.values())

    # --- keys -----------------------------------------------------------------------------------

    def checked(self, key: Keys) -> list[Key]:
        """The keys that a call names, which may be new ones.

        Raises:
            KeyKindError: not of the kind of the keys here, or no key at all.
        """
        if isinstance(key, str | int) and type(key) in (str, int) and key in self:
            return [key]
        keys = list(key) if isinstance(key, list | tuple) else [key]
        checked: list[Key] = []
        for one in keys:
            if isinstance(one, np.integer | np.str_):
                one = one.item()
            try:
                checked.append(wire.key(one))
            except ValueError as error:
                raise KeyKindError(f"key {one!r}: expected {error}, got {type(one).__name__}") from None
        kind = self.kind or (type_of(checked[0]) if checked else "")
        for one in checked:
            if type_of(one) != kind:
                raise KeyKindError(f"key {one!r}: expected {kind}, the kind of this store's keys; got {type_of(one)}")
        return checked

    def known(self, keys: list[Key]) -> list[Entry]:
        """What is kept of these keys; an error of theirs that nobody looked at is raised."""
        entries = []
        for key in keys:
            entry = self.get(key)
            if entry is None:
                raise UnknownKeyError(f"key {key!r}: expected an initialised key; init has not been called for it")
            self.raise_unseen(entry)
            entries.append(entry)
        return entries

    def one(self, key: Key, what: str) -> Entry:
        """:meth:`known` of what shall be one key."""
        if isinstance(key, list | tuple):
            raise KeyKindError(f"{what}: expected one key, got a list of {len(key)}")
        (entry,) = self.known(self.checked(key))
        return entry

    def raise_unseen(self, entry: Entry) -> None:
        """An error nobody looked at is raised by the next call on that key."""
        if not entry.failed:
            return
        with entry.lock:
            unseen = [handle for handle in entry.failed if not handle.observed]
            entry.failed.clear()
        for handle in unseen:
            error = handle.exception(0)
            if error is not None:
                raise error

    # --- devices and arrays ---------------------------------------------------------------------

    def array(self, given: Any, what: str, *, written: bool = False) -> Array:
        """What the caller gives as an array, as the engine can use it. Raises DtypeError, ReadOnlyError."""
        array = writable_view(given, what) if written else view(given, what)
        memory = memory_of(array)
        if memory != HOST and memory not in self.gpus:
            self._engine.use(gpu.devices())
            self.gpus.add(memory)
        return array

    @property
    def memories(self) -> str:
        """Where the arrays lie that have come, for people."""
        if self.gpus:
            return f"GPU{'s' * (len(self.gpus) > 1)} {', '.join(map(str, sorted(self.gpus)))}"
        reason = gpu.unlikely()
        return "host memory" if reason is None else f"host memory: {reason}"

    def device(self, device: int | None) -> int | None:
        """One device that a call is for; None: all."""
        if device is None:
            return None
        if not self._declared:
            raise DeviceCountError(f"device={device!r}: expected a store created with devices=; it was not")
        assert self.devices is not None
        number = plain.whole(device)
        if number is None or not 0 <= number < self.devices:
            raise DeviceCountError(f"device={device!r}: expected 0..{self.devices - 1}")
        return number

    def push(self, key: Key, value: Any, device: int | None) -> Push:
        """:meth:`pushes` of one key."""
        entry = self.get(key)
        if (
            device is None and self.devices == 1 and entry is not None and entry.level is not None
            and not entry.failed and _is_exactly(value, entry)
        ):  # fmt: skip
            return entry, {0: [value]}
        return self.pushes([key], [value], device)[0]

    def pushes(self, keys: list[Key], values: list[Any], device: int | None) -> list[Push]:
        """The whole call, checked: per entry and device the arrays to be summed."""
        entries = self.known(keys)
        device = self.device(device)
        devices: Sequence[int]
        if device is None:
            arrays, devices = self.arrays(entries, values), range(self.num_devices)
        else:
            devices = [device]
            arrays = [self._of_one_device(entry, given, device) for entry, given in zip(entries, values, strict=True)]
        pushes: dict[Key, Push] = {}
        for entry, some in zip(entries, arrays, strict=True):
            per_device = pushes.setdefault(entry.key, (entry, {}))[1]
            for d, array in zip(devices, listed(some), strict=True):
                per_device.setdefault(d, []).append(array)
        return list(pushes.values())

    def arrays(self, entries: Sequence[Entry], values: list[Any]) -> list[Arrays]:
        """For each key what each device pushes, checked; the first push says how many devices there are."""
        if not entries:
            return []
        count = self.devices
        if count is None:
            count = len(values[0]) if isinstance(values[0], list | tuple) else 1
        arrays: list[Arrays] = []
        for entry, value in zip(entries, values, strict=True):
            some = self._of_devices(entry, value, count)
            arrays.append(some[0] if count == 1 else some)
        self._fix_devices(count)
        for entry in entries:
            if entry.level is None:
                with entry.lock:
                    if entry.level is None:
                        entry.count(self.num_devices)
        return arrays

    def _of_one_device(self, entry: Entry, given: Any, device: int) -> Arrays:
        if isinstance(given, list | tuple):
            raise DeviceCountError(f"push of key {entry.key!r} by device {device}: expected one array, got a list")
        return self._of_devices(entry, given, 1)

    def _of_devices(self, entry: Entry, given: Any, count: int) -> list[Array]:
        """What each of ``count`` devices pushes, checked."""
        if count == 1 and _is_exactly(given, entry):
            return [given]
        arrays = list(given) if isinstance(given, list | tuple) else [given]
        if len(arrays) != count or not arrays:
            raise DeviceCountError(
                f"push of key {entry.key!r}: expected {count} arrays, one per device; got {len(arrays)}"
            )
        return [self._fits(entry, self.array(array, f"push of key {entry.key!r}"), "push") for array in arrays]

    def _fix_devices(self, count: int) -> None:
        if self.devices is None:
            with self._lock:
                if self.devices is None:
                    self.devices = count

    def _fits(self, entry: Entry, array: Array, what: str) -> Array:
        if array.shape != entry.shape:
            raise ShapeError(f"{what} of key {entry.key!r}: expected shape {entry.shape}, got {array.shape}")
        if array.dtype != entry.dtype:
            raise DtypeError(f"{what} of key {entry.key!r}: expected dtype {entry.dtype.name}, got {array.dtype.name}")
        return array

    def target(self, entry: Entry, out: Any, device: int | None) -> Target:
        """The arrays to write (None: in place), and what the handle's result is."""
        if out is IN_PLACE:
            return None, None
        if _is_exactly(out, entry) and out.flags.writeable:
            return [out], out
        what = f"out for key {entry.key!r}"
        if out is None or isinstance(out, Anew):
            fresh = empty(entry.shape, entry.dtype, entry.memory if out is None else out.memory)
            return [fresh], fresh
        outs = list(out) if isinstance(out, list | tuple) else [out]
        if device is not None and isinstance(out, list | tuple):
            raise DeviceCountError(f"pull of key {entry.key!r} by device {device}: expected one array, got a list")
        if isinstance(out, list | tuple) and self.devices is not None and len(outs) != self.devices:
            raise DeviceCountError(f"{what}: expected {self.devices} arrays, one per device; got {len(outs)}")
        arrays = [self._fits(entry, self.array(o, what, written=True), "pull") for o in outs]
        if isinstance(out, list | tuple):
            return arrays, out
        return arrays, out if is_array(out) else arrays[0]


def own_out(entry: Entry | None, value: Any) -> Any:
    """Where a pushpull without ``out`` puts the value."""
    if entry is not None and any(value is lent for lent in entry.lent):
        return IN_PLACE
    arrays = value if isinstance(value, list) else [value]
    return ITSELF if all(map(is_writable, arrays)) else Anew(found_in(arrays[0]))


def as_many(keys: Sequence[Any], values: Any, what: str) -> list[Any]:
    if values is None:
        return [None] * len(keys)
    if not isinstance(values, list | tuple) or len(values) != len(keys):
        came = len(values) if isinstance(values, list | tuple) else type(values).__name__
        raise ShapeError(f"a list call: expected {len(keys)} {what}, one per key; got {came}")
    return list(values)


def _is_exactly(array: Any, entry: Entry) -> bool:
    """Is it an ordinary array as the key has them?"""
    return type(array) is np.ndarray and array.shape == entry.shape and array.dtype == entry.dtype


def type_of(key: Key) -> str:
    """The kind of a key."""
    return "str" if isinstance(key, str) else "int"
