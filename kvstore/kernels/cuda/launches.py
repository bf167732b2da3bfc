"""Which CUDA kernels do what a name of :mod:`kvstore.kernels` says, and on what.

Everything is put in the queue of the current stream, and nothing waits for it, but :meth:`Launches.gather` and
:meth:`Launches.scatter_add` for row ids on the device: whether one is no row has to be known before they may return,
since nobody could raise the error later. Of row ids in host memory it is. :meth:`Launches.deduplicate` returns arrays
as large as there are different ids.
Arrays that kernels cannot take as they lie (with holes, or at an odd address) are copied before, and back.

What this file does not know: CuPy. Where the arrays are, and how a kernel is started there, is a :class:`Processor`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from kvstore.kernels import formats, reference
from kvstore.kernels.reference import LANES, Array, Change, States

NEAR = 64  # addresses that are passed with a kernel; more lie in memory
THREADS = 256  # of a block
PACK_BYTES = 16  # the most that one instruction loads
TILE_BYTES = THREADS * PACK_BYTES * 4  # of one of many arrays, for a block
TILES_MAX = 16 << 10  # about; of more bytes, tiles are larger
WORK = struct.Struct(f"6q 2Q 3Q 3Q 3d 8d Q {NEAR}Q")  # as `struct Work` in kernels.cu
SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.cu", "compression.cu"))
OPTIONS = (  # of the compiler: the same bits as NumPy
    *("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true"),
    *(f"-DNEAR={NEAR}", f"-DLANES={LANES}", f"-DWORK_BYTES={WORK.size}"),
)

_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
_BOOL, _INT64 = np.dtype(np.bool_), np.dtype(np.int64)
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_KINDS = {  # how kernels call the type, and the bytes of what they add up
    np.dtype(np.bool_): ("flag", 1),
    np.dtype(np.float16): ("half", 2),
    _BFLOAT16: ("brain", 2),
    _FLOAT32: ("f4", 4),
    _FLOAT64: ("f8", 8),
    np.dtype(np.complex64): ("f4", 4),
    np.dtype(np.complex128): ("f8", 8),
    **{np.dtype(f"{sign}{size}"): (f"u{size}", size) for sign in "iu" for size in (1, 2, 4, 8)},  # they wrap
}
_PUSHED = {(_FLOAT32, _FLOAT32), (_FLOAT64, _FLOAT64), *((_FLOAT32, half) for half in reference.HALVES)}
_CASTS = {(_FLOAT32, half) for half in reference.HALVES} | {(half, _FLOAT32) for half in reference.HALVES}


def source() -> str:
    """All of it, for one compiler's run."""
    return "".join(path.read_text() for path in SOURCES)


class Processor(Protocol):
    """Where arrays are, and how a kernel is started there."""

    def blocks(self) -> int:
        """How many blocks of threads are useful at once."""

    def start(self, kernel: str, blocks: int, work: bytes) -> None:
        """Put the kernel in the queue, with so many blocks of :data:`THREADS` threads."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """A new array there."""

    def upload(self, array: Array) -> Array:
        """What is in host memory, there."""

    def download(self, array: Array) -> Array:
        """What is there, in host memory. Waits for it."""

    def address(self, array: Array) -> int:
        """Of its first element."""

    def copy(self, source: Array, target: Array) -> None:
        """Into the target's strides and dtype."""

    def as_bytes(self, array: Array) -> Array:
        """The same memory, with one dimension more for the bytes of an element."""

    def order(self, ids: Array) -> Array:
        """The positions that sort them, int64; equal ones stay in order."""

    def positions(self, mask: Array) -> Array:
        """Where it is true, int64. Waits for it."""

    def is_here(self, array: Array) -> bool:
        """Is it in host memory instead?"""


class Launches:
    """The kernels by name, on one kind of processor. Thread-safe.

    Whoever calls chooses the device and the stream, as CuPy's current ones.
    """

    def __init__(self, processor: Processor) -> None:
        self._processor = processor

    def __repr__(self) -> str:
        return f"<Launches on {self._processor!r}>"

    def nothing(self) -> None:
        """A kernel that does nothing, to see what that costs."""
        self._start("nothing", 1)

    # --- sums ---------------------------------------------------------------------------------

    def merge(self, arrays: Sequence[Array], out: Array) -> None:
        """See :func:`kvstore.kernels.reference.merge`."""
        if not (len(arrays) == 1 and arrays[0] is out):
            self._sum(arrays, [out])

    def merge_nontemporal(self, arrays: Sequence[Array], out: Array) -> None:
        """See :func:`kvstore.kernels.reference.merge_nontemporal`; here it is nothing else than :meth:`merge`."""
        self.merge(arrays, out)

    def allreduce(self, arrays: Sequence[Array], out: Array, others: Sequence[Array]) -> None:
        """See :func:`kvstore.kernels.reference.allreduce`."""
        if any(self._overlap_in_part(array, other) for array in arrays for other in others):
            self.merge(arrays, out)
            self.broadcast(out, others)
        else:
            self._sum(arrays, [out, *others])

    def broadcast(self, source: Array, outs: Sequence[Array]) -> None:
        """See :func:`kvstore.kernels.reference.broadcast`."""
        self._sum([source], outs)

    def _sum(self, arrays: Sequence[Array], outs: Sequence[Array]) -> None:
        kind, unit = _kind("merge", outs[0] if outs else arrays[0], *arrays, *outs)
        pushes, rooms = [self._fit(array) for array in arrays], [self._room(out) for out in outs]
        size = arrays[0].nbytes // unit
        self._each(f"merge_{kind}", size, unit, unit, [*pushes, *rooms], pushes=len(pushes), outs=len(rooms))
        self._back(rooms, outs)

    def merge_many(self, groups: Sequence[Sequence[Array]], out: Array) -> None:
        """See :func:`kvstore.kernels.reference.merge_many`. One kernel for all."""
        arrays = [array for some in groups for array in some]
        kind, unit = _kind("merge_many", out, *arrays)
        sizes, room = [some[0].nbytes for some in groups], self._room(out)
        _held, sources = self._all(arrays, self._fit)
        targets = self._processor.address(room) + _starts(sizes)
        self._tiles(f"merge_many_{kind}", unit, sizes, sources.reshape(len(groups), -1), targets)
        self._back([room], [out])

    def _tiles(self, kernel: str, unit: int, sizes: Sequence[int], sources: Array, targets: Array) -> None:
        """A kernel that makes each target of its sources, ``sizes`` bytes, a block of threads for every tile of them.

        Args:
            unit: bytes of an element.
            sources: addresses, a row for each target.
            targets: their addresses.
        """
        tile = max(TILE_BYTES, sum(sizes) // (TILES_MAX * TILE_BYTES) * TILE_BYTES)
        counts = -(-np.array(sizes) // tile)
        part = np.repeat(np.arange(len(sizes)), counts)
        if part.size:
            start = (np.arange(part.size) - np.repeat(_starts(counts), counts)) * tile
            elements = np.minimum(tile, np.array(sizes)[part] - start) // unit
            words = np.column_stack([sources[part] + start[:, None], targets[part] + start, elements])
            pushes = sources.shape[1]
            self._start(kernel, part.size * THREADS, words=words.ravel(), size=part.size, pushes=pushes, outs=1)

    def _overlap_in_part(self, one: Array, other: Array) -> bool:
        """Of what kernels take as it lies."""
        if not (self._fits(one) and self._fits(other)):
            return False
        start, begin = self._processor.address(one), self._processor.address(other)
        return start != begin and start < begin + other.nbytes and begin < start + one.nbytes

    def norm(self, arrays: Sequence[Array]) -> Array:
        """See :func:`kvstore.kernels.reference.norm`. It stays where the arrays are, without dimensions, in float64."""
        kind = _kind("norm", *arrays)[0]
        if arrays[0].dtype.kind not in "fV":
            raise TypeError(f"norm: expected numbers with a point, got {arrays[0].dtype}")
        pushes = [self._fit(array) for array in arrays]
        out, scratch = self._processor.empty((), _FLOAT64), self._processor.empty((LANES,), _FLOAT64)
        self._start(f"norm_{kind}", LANES, pushes, size=arrays[0].size, pushes=len(pushes), scratch=scratch)
        self._start("norm_end", 1, [], target=out, scratch=scratch)
        return out

    # --- optimizers ---------------------------------------------------------------------------

    def accumulate(self, change: Change, states: States) -> None:
        """See :func:`kvstore.kernels.reference.accumulate`."""
        value, target, pushes, scale, clip = change
        if (target.dtype, pushes[0].dtype) in _PUSHED:
            self._update("accumulate", change, states)
        elif scale == 1.0 and clip == math.inf:
            merged = self._processor.empty(value.shape, value.dtype)
            self.merge(pushes, merged)
            self.merge([value, merged], target)
        else:
            raise TypeError(f"accumulate: expected float32 or float64 to scale or clip, got {target.dtype}")

    def sgd(self, change: Change, states: States, *numbers: float) -> None:
        """See :func:`kvstore.kernels.reference.sgd`."""
        self._update("sgd", change, states, *numbers, decay=numbers[1])

    def adam(self, change: Change, states: States, *numbers: float) -> None:
        """See :func:`kvstore.kernels.reference.adam`."""
        self._update("adam", change, states, *numbers, decay=numbers[5])

    def adagrad(self, change: Change, states: States, *numbers: float) -> None:
        """See :func:`kvstore.kernels.reference.adagrad`."""
        self._update("adagrad", change, states, *numbers, decay=numbers[2])

    def rmsprop(self, change: Change, states: States, *numbers: float) -> None:
        """See :func:`kvstore.kernels.reference.rmsprop`."""
        self._update("rmsprop", change, states, *numbers, decay=numbers[3])

    def adadelta(self, change: Change, states: States, *numbers: float) -> None:
        """See :func:`kvstore.kernels.reference.adadelta`."""
        self._update("adadelta", change, states, *numbers, decay=numbers[3])

    def ftrl(self, change: Change, states: States, *numbers: float) -> None:
        """See :func:`kvstore.kernels.reference.ftrl`."""
        self._update("ftrl", change, states, *numbers)

    def lars(self, change: Change, states: States, *numbers: float) -> None:
        """See :func:`kvstore.kernels.reference.lars`."""
        scratch, rate = self._processor.empty((2 * LANES,), _FLOAT64), self._processor.empty((), _FLOAT64)

        def begin(pushed: str, size: int, given: list[Array], **work: Any) -> None:
            self._start(f"lars_squares_{pushed}", LANES, given, size=size, **{**work, "scratch": scratch, "decay": 0.0})
            self._start("lars_rate", 1, [], target=rate, scratch=scratch, numbers=numbers)

        self._update("lars", change, states, *numbers, decay=numbers[3], scratch=rate, before=begin)

    def lamb(self, change: Change, states: States, *numbers: float) -> None:
        """See :func:`kvstore.kernels.reference.lamb`."""
        scratch, rate = self._processor.empty((2 * LANES,), _FLOAT64), self._processor.empty((), _FLOAT64)

        def end(pushed: str, size: int, given: list[Array], **work: Any) -> None:
            kind, unit = pushed.partition("_")[0], work["target"].itemsize
            self._start(f"lamb_squares_{kind}", LANES, [], size=size, **{**work, "scratch": scratch, "pushes": 0})
            self._start("lamb_rate", 1, [], target=rate, scratch=scratch, numbers=numbers)
            self._each(f"lamb_{kind}", size, unit, unit, [], **{**work, "scratch": rate, "pushes": 0})

        self._update("lamb_moments", change, states, *numbers, after=end)

    def _update(
        self,
        kernel: str,
        change: Change,
        states: States,
        *numbers: float,
        decay: float = 0.0,
        scratch: Array | None = None,
        before: Callable[..., None] | None = None,
        after: Callable[..., None] | None = None,
    ) -> None:
        """One kernel over memory; ``before`` and ``after`` it may start more on the same work."""
        value, target, pushes, scale, clip = change
        pushed = pushes[0].dtype
        if (target.dtype, pushed) not in _PUSHED:
            raise TypeError(
                f"{kernel}: expected float32 or float64 and pushes of the same, or of 16 bits beside float32; "
                f"got {target.dtype} and {pushed}"
            )
        given, room = [self._fit(push) for push in pushes], self._room(target)
        own = tuple([state if state is None else self._fit(state) for state in states])
        work: dict[str, Any] = {
            "value": self._fit(value), "target": room, "states": own, "pushes": len(given), "scratch": scratch,
            "scale": float(scale), "clip": float(clip), "decay": decay, "numbers": numbers,
        }  # fmt: skip
        unit, name = target.itemsize, f"{_kind(kernel, target, value)[0]}_{_kind(kernel, *pushes)[0]}"
        if target.size:
            if before is not None:
                before(name, target.size, given, **work)
            self._each(f"{kernel}_{name}", target.size, unit, pushed.itemsize, given, **work)
            if after is not None:
                after(name, target.size, given, **work)
            self._back([room], [target])
            for state, fit in zip(states, own, strict=True):
                if state is not None and fit is not None:
                    self._back([fit], [state])

    # --- other --------------------------------------------------------------------------------

    def cast(self, source: Array, target: Array) -> None:
        """See :func:`kvstore.kernels.reference.cast`."""
        given, room = self._fit(source), self._room(target)
        if (source.dtype, target.dtype) in _CASTS:
            name = f"cast_{_kind('cast', source)[0]}_{_kind('cast', target)[0]}"
            packed = self._packed([given], 4 * source.itemsize) and self._packed([room], 4 * target.itemsize)
            self._spread(name, target.size, 4, packed, [given, room])
        else:
            self._processor.copy(given, room)
        self._back([room], [target])

    def concatenate(self, arrays: Sequence[Array], out: Array) -> None:
        """See :func:`kvstore.kernels.reference.concatenate`. One kernel for all."""
        self.merge_many([[array] for array in arrays], out)

    def split(self, source: Array, outs: Sequence[Array]) -> None:
        """See :func:`kvstore.kernels.reference.split`. One kernel for all."""
        kind, unit = _kind("split", source, *outs)
        sizes, given = [out.nbytes for out in outs], self._fit(source)
        rooms, targets = self._all(outs, self._room)
        sources = self._processor.address(given) + _starts(sizes)
        self._tiles(f"merge_many_{kind}", unit, sizes, sources[:, None], targets)
        self._back(rooms, outs)

    def gather(self, source: Array, row_ids: Array, out: Array) -> None:
        """See :func:`kvstore.kernels.reference.gather`."""
        ids = self._checked(source, row_ids)
        if out.size:
            given, room = self._fit(source), self._room(out)
            row_bytes = out.nbytes // len(out)
            together = math.gcd(row_bytes, self._processor.address(given), self._processor.address(room), PACK_BYTES)
            columns = row_bytes // together
            self._start(
                f"gather_{together}", out.nbytes // together, [],
                size=len(out), columns=columns, value=given, target=room, ids=ids,
            )  # fmt: skip
            self._back([room], [out])

    def scatter_add(self, target: Array, row_ids: Array, rows: Array) -> None:
        """See :func:`kvstore.kernels.reference.scatter_add`."""
        kind, unit = _kind("scatter_add", target, rows)
        ids = self._checked(target, row_ids)
        if rows.size:
            given, into = self._fit(rows), self._fit(target)
            columns = rows.nbytes // len(rows) // unit
            self._start(
                f"scatter_add_{kind}", len(rows) * columns, [],
                rows=len(rows), columns=columns, value=given, target=into, ids=ids, order=self._processor.order(ids),
            )  # fmt: skip
            self._back([into], [target])

    def deduplicate(self, row_ids: Array, rows: Array) -> tuple[Array, Array]:
        """See :func:`kvstore.kernels.reference.deduplicate`."""
        kind, unit = _kind("deduplicate", rows)
        given, ids, count = self._fit(rows), self._ids(row_ids), len(row_ids)
        if count:
            order, is_first = self._processor.order(ids), self._processor.empty((count,), _BOOL)
            self._start("find_first", count, [], rows=count, target=is_first, ids=ids, order=order)
            first = self._processor.positions(is_first)
            count = len(first)
        own, sums = self._processor.empty((count,), _INT64), self._processor.empty((count, *rows.shape[1:]), rows.dtype)
        if count:
            self._start(
                f"deduplicate_{kind}", max(count, sums.nbytes // unit), [],
                size=count, rows=len(rows), columns=sums.nbytes // count // unit,
                value=given, target=sums, states=(first, own), ids=ids, order=order,
            )  # fmt: skip
        return own, sums

    def _ids(self, row_ids: Array) -> Array:
        if row_ids.dtype != _INT64:
            raise TypeError(f"row ids: expected int64, got {row_ids.dtype}")
        return self._processor.upload(row_ids) if self._processor.is_here(row_ids) else self._fit(row_ids)

    def _checked(self, table: Array, row_ids: Array) -> Array:
        """Those in host memory are looked at there, and nothing waits."""
        ids = self._ids(row_ids)
        if self._processor.is_here(row_ids):
            reference.check_rows(table, row_ids)
        elif ids.size:
            wrong = self._processor.upload(np.zeros(1))
            self._start("find_wrong", ids.size, [], size=ids.size, rows=len(table), ids=ids, scratch=wrong)
            if self._processor.download(wrong)[0]:
                reference.check_rows(table, self._processor.download(ids))
        return ids

    # --- compression --------------------------------------------------------------------------

    def quantize_2bit(self, gradient: Array, residual: Array, threshold: float, out: Array) -> None:
        """See :func:`kvstore.kernels.reference.quantize_2bit`."""
        if not threshold > 0:
            raise ValueError(f"quantize_2bit: expected a threshold above 0, got {threshold}")
        self._quantize(formats.TWO_BIT, gradient, residual, out, 16, float(threshold))

    def dequantize_2bit(self, codes: Array, threshold: float, out: Array) -> None:
        """See :func:`kvstore.kernels.reference.dequantize_2bit`."""
        self._dequantize(formats.TWO_BIT, codes, out, float(threshold))

    def quantize_1bit(self, gradient: Array, residual: Array, out: Array) -> None:
        """See :func:`kvstore.kernels.reference.quantize_1bit`."""
        self._quantize(formats.ONE_BIT, gradient, residual, out, 32)

    def dequantize_1bit(self, codes: Array, out: Array) -> None:
        """See :func:`kvstore.kernels.reference.dequantize_1bit`."""
        self._dequantize(formats.ONE_BIT, codes, out)

    def quantize_int8(self, gradient: Array, residual: Array, out: Array) -> None:
        """See :func:`kvstore.kernels.reference.quantize_int8`."""
        self._quantize(formats.INT8, gradient, residual, out, 8)

    def dequantize_int8(self, codes: Array, out: Array) -> None:
        """See :func:`kvstore.kernels.reference.dequantize_int8`."""
        self._dequantize(formats.INT8, codes, out)

    def _quantize(
        self, format: formats.Format, gradient: Array, residual: Array, out: Array, rows: int, *numbers: float
    ) -> None:
        """A lane of a warp for ``rows`` elements."""
        reference.check_compensated(format, gradient, residual)
        given, rest, room = self._fit(gradient), self._fit(residual), self._words(out, fill=False)
        name = f"quantize_{format.name}_{_kind(format.name, gradient)[0]}"
        if residual.size:
            items = -(-residual.size // (32 * rows)) * 32
            self._start(name, items, [given], size=residual.size, value=rest, target=room, numbers=numbers)
            self._back([rest, room], [residual, out])

    def _dequantize(self, format: formats.Format, codes: Array, out: Array, *numbers: float) -> None:
        reference.check_decompressed(format, out)
        given, room = self._words(codes, fill=True), self._room(out)
        packed = self._packed([room], PACK_BYTES)
        name = f"dequantize_{format.name}"
        self._spread(name, out.size, 4, packed, [], value=given, target=room, numbers=numbers)
        self._back([room], [out])

    def _words(self, codes: Array, fill: bool) -> Array:
        """The codes, or bytes at the address of a word for them, with what is in them if asked."""
        if codes.flags.c_contiguous and self._processor.address(codes) % 4 == 0:
            return codes
        own = self._processor.empty(codes.shape, codes.dtype)
        if fill:
            self._copy(codes, own)
        return own

    # --- memory -------------------------------------------------------------------------------

    def _fits(self, array: Array) -> bool:
        """Can kernels take it as it lies?"""
        return bool(array.flags.c_contiguous) and self._aligned(array)

    def _aligned(self, array: Array) -> bool:
        return self._processor.address(array) % min(array.itemsize, 8) == 0

    def _fit(self, array: Array) -> Array:
        """It, or a copy that fits."""
        if self._fits(array):
            return array
        own = self._processor.empty(array.shape, array.dtype)
        self._copy(array, own)
        return own

    def _room(self, out: Array) -> Array:
        """It, or memory that fits for what :meth:`_back` brings there."""
        return out if self._fits(out) else self._processor.empty(out.shape, out.dtype)

    def _all(self, arrays: Sequence[Array], fit: Callable[[Array], Array]) -> tuple[Sequence[Array], Array]:
        """Many of them, of one dtype, made to fit if they do not, and their addresses: each is looked at once."""
        address = self._processor.address
        found = np.array([address(array) for array in arrays], np.int64)
        if (found % min(arrays[0].itemsize, 8)).any() or not all(array.flags.c_contiguous for array in arrays):
            arrays = [fit(array) for array in arrays]
            found = np.array([address(array) for array in arrays], np.int64)
        return arrays, found

    def _back(self, rooms: Sequence[Array], outs: Sequence[Array]) -> None:
        for room, out in zip(rooms, outs, strict=True):
            if room is not out:
                self._copy(room, out)

    def _copy(self, source: Array, target: Array) -> None:
        if not (self._aligned(source) and self._aligned(target)):
            source, target = self._processor.as_bytes(source), self._processor.as_bytes(target)
        self._processor.copy(source, target)

    # --- starting -----------------------------------------------------------------------------

    def _each(self, kernel: str, size: int, unit: int, pushed: int, arrays: Sequence[Array], **work: Any) -> None:
        """A kernel of packs of elements, of ``unit`` bytes in the values and of ``pushed`` in the other arrays."""
        elements = PACK_BYTES // unit
        values = [work.get("value"), work.get("target"), *work.get("states", ())]
        packed = self._packed(arrays, elements * pushed)
        packed = packed and self._packed([value for value in values if value is not None], PACK_BYTES)
        self._spread(kernel, size, elements, packed, arrays, **work)

    def _packed(self, arrays: Sequence[Array], multiple: int) -> bool:
        return all(self._processor.address(array) % multiple == 0 for array in arrays)

    def _spread(
        self, kernel: str, size: int, elements: int, packed: bool, arrays: Sequence[Array], **work: Any
    ) -> None:
        items = -(-size // elements) if packed else size
        if items:
            self._start(kernel, items, arrays, size=size, packed=packed, **work)

    def _start(
        self,
        kernel: str,
        items: int,
        arrays: Sequence[Array] = (),
        *,
        words: Array | None = None,
        size: int = 0,
        rows: int = 0,
        columns: int = 0,
        pushes: int = 0,
        outs: int = 0,
        packed: bool = False,
        value: Array | None = None,
        target: Array | None = None,
        states: States = (),
        scratch: Array | None = None,
        ids: Array | None = None,
        order: Array | None = None,
        scale: float = 1.0,
        clip: float = math.inf,
        decay: float = 0.0,
        numbers: Sequence[float] = (),
    ) -> None:
        """Start it with a thread for each item, or as many as are useful; on the arrays' addresses, or other words."""
        near: Sequence[int] | Array = [self._processor.address(array) for array in arrays] if words is None else words
        far = None
        if len(near) > NEAR:
            far, near = self._processor.upload(np.asarray(near, np.int64)), ()
        single = (value, target, *states, *[None] * (3 - len(states)), scratch, ids, order)
        work = WORK.pack(
            *(size, columns, pushes, outs, packed, rows),
            *[0 if array is None else self._processor.address(array) for array in single],
            *(scale, clip, decay, *numbers, *[0.0] * (8 - len(numbers))),
            *(0 if far is None else self._processor.address(far), *near, *[0] * (NEAR - len(near))),
        )
        self._processor.start(kernel, max(1, min(-(-items // THREADS), self._processor.blocks())), work)


def _starts(sizes: Sequence[int] | Array) -> Array:
    """Where each begins, if they lie one behind the other."""
    ends = np.cumsum(sizes, dtype=np.int64)
    return ends - sizes


def _kind(what: str, *arrays: Array) -> tuple[str, int]:
    """How kernels call the arrays' one type, and the bytes of what they add up. Raises TypeError if they have none."""
    dtypes = {array.dtype for array in arrays}
    if len(dtypes) != 1 or not dtypes <= _KINDS.keys():
        raise TypeError(f"{what}: expected arrays of one dtype that kernels know, got {', '.join(map(str, dtypes))}")
    return _KINDS[dtypes.pop()]
