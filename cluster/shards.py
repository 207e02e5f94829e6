"""Tensors of many ranks as files that any number of ranks reads: storage for torch's distributed checkpoints, on a disk or S3.

    __0_0.bin     what rank 0 wrote: blobs end to end, each a rank's shard of one tensor, row-major, little-endian
    index.json    of each tensor its dtype, shape and blobs: where each lies, and a digest (XXH3) of each `PIECE` bytes of it

Nothing is pickled: values that are no tensors (an optimiser's rates and names) lie in the index as JSON, and what is neither is
refused. DCP plans who writes and who reads what, so a checkpoint of any world size is read by any other. A piece is the least
that is read: its digest is checked on the way, and no second pass is needed. XXH3 is as fast as memory, where SHA-256 would halve
a disk's bandwidth; it finds what a disk or a network did to the bytes, and nobody's forgery, which no digest beside them would.
"""

from __future__ import annotations

import io
import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem, SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult

from cluster.checkpoint import INDEX, CorruptCheckpoint, Digest, digest
from pipelines import storage
from pipelines.place import Place
from pipelines.types import spec

PIECE = 16 * 2**20
"""Bytes that have a digest of their own: who wants a tenth of a blob reads a tenth of it, and a little."""

RUN = 32 * 2**20
"""Bytes of one request, at most, where pieces lie side by side: small blobs are not worth one each."""

READS_AT_ONCE = 8

FILE = 64 * 2**30
"""Bytes after which a rank begins another file."""


@spec
class Blob:
    """A shard of a tensor: the box of `sizes` at `offsets`, in `file` from byte `start` on. `digests` has one of each piece."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    digests: tuple[str, ...]


@spec
class Stored:
    """A whole tensor; its blobs cover it."""

    dtype: str
    shape: tuple[int, ...]
    blobs: tuple[Blob, ...]


@spec
class Index:
    """What lies where. `values` are JSON by their names in the state; `piece` is the bytes of a piece."""

    format: Literal["mllm-shards-2"] = "mllm-shards-2"
    piece: int
    tensors: dict[str, Stored]
    values: dict[str, str]

    def metadata(self) -> Metadata:
        """The same in DCP's words."""
        found: dict[str, Any] = {name: BytesStorageMetadata() for name in self.values}
        for name, stored in self.tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(b.offsets), torch.Size(b.sizes)) for b in stored.blobs]
            properties = TensorProperties(dtype=dtype_of(stored.dtype))
            found[name] = TensorStorageMetadata(properties, torch.Size(stored.shape), chunks)
        return Metadata(found)


@cache
def _indices() -> TypeAdapter[Index]:
    return TypeAdapter(Index)


def parse_index(data: bytes) -> Index:
    """Raises pydantic's ValidationError, a ValueError."""
    return _indices().validate_json(data)


def dtype_of(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"torch {torch.__version__} knows no numbers of type {name!r}")
    return found


def to_json(name: str, value: Any) -> str:
    """A value that is no tensor, as text that `from_json` reads. Raises TypeError, naming it, for what JSON cannot hold."""

    def plain(value: Any) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if type(value) is list:
            return [plain(each) for each in value]
        if type(value) is tuple:
            return {"tuple": [plain(each) for each in value]}
        if type(value) is dict and all(type(key) is str for key in value):
            return {"dict": {key: plain(each) for key, each in value.items()}}
        raise TypeError(
            f"{name} is a {type(value).__module__}.{type(value).__qualname__}, and a checkpoint keeps tensors, numbers, words "
            "and lists of these, never pickles; make it one of them before it enters the state"
        )

    return json.dumps(plain(value))


def from_json(text: str | bytes) -> Any:
    def full(value: Any) -> Any:
        if isinstance(value, list):
            return [full(each) for each in value]
        if isinstance(value, dict):
            ((kind, inner),) = value.items()
            return tuple(map(full, inner)) if kind == "tuple" else {key: full(each) for key, each in inner.items()}
        return value

    return full(json.loads(text))


class SavePlanner(DefaultSavePlanner):
    """DCP's planner, with JSON in place of pickles."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:  # noqa: A002 -- DCP's name
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(to_json(write_item.index.fqn, object).encode())
        return object


class LoadPlanner(DefaultLoadPlanner):
    """DCP's planner, with JSON in place of pickles. `finish` ends the loading."""

    def __init__(self) -> None:
        super().__init__()
        self.packed: dict[MetadataIndex, tuple[Tensor, Tensor]] = {}

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        inner: Any = self.original_state_dict
        *way, last = self.mappings[read_item.dest_index.fqn]
        for key in way:
            inner = inner[key]
        inner[last] = from_json(value.getvalue())

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Where a tensor is to be loaded; one that keeps its numbers packed (moments in 8 bits) is filled at the end."""
        found = super().lookup_tensor(index)
        if type(found.detach()) is Tensor:
            return found
        if index not in self.packed:
            self.packed[index] = found, torch.empty(found.shape, dtype=found.dtype, device=found.device)
        return self.packed[index][1]

    def finish(self) -> None:
        for packed, plain in self.packed.values():
            packed.detach().copy_(plain)


def plain(tensor: Tensor) -> Tensor:
    """The numbers of a tensor, as a tensor of torch's own; those that an optimiser keeps packed are unpacked."""
    tensor = tensor.detach()
    return tensor if type(tensor) is Tensor else tensor.dequantize()


def bytes_of(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A plain tensor's bytes, row-major; the tensor's own memory where it lies so on the CPU."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


class ShardWriter(StorageWriter):
    """Writes what DCP plans for one rank into `folder`; the coordinator writes the index. `files` are those with their bytes,
    `digests` the threads that compute digests.
    """

    def __init__(self, folder: Place, rank: int, digests: ThreadPoolExecutor) -> None:
        self.folder = folder
        self.rank = rank
        self.digests = digests
        self.files: dict[str, int] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003 -- DCP's
        return True

    def write_data(self, plan: SavePlan, planner: Any) -> torch.futures.Future[list[WriteResult]]:
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result(self.write([(item, planner.resolve_data(item)) for item in plan.items]))
        return done

    def write(self, items: Sequence[tuple[WriteItem, Tensor | io.BytesIO]]) -> list[WriteResult]:
        """Write tensors into files of `FILE` bytes each, a little more at most; values are left to the index."""
        results: list[WriteResult] = []
        tensors: list[tuple[WriteItem, Tensor]] = []
        for item, value in items:
            if isinstance(value, Tensor):
                tensors.append((item, plain(value)))
            else:
                text = value.getvalue().decode()
                results.append(WriteResult(item.index, len(text), text))
        for number, some in enumerate(_filling(tensors)):
            results += self._file(f"__{self.rank}_{number}.bin", some)
        return results

    def _file(self, name: str, tensors: Sequence[tuple[WriteItem, Tensor]]) -> Iterator[WriteResult]:
        """Write one file; digests are computed beside the writing."""
        at = 0
        written: list[tuple[WriteItem, int, int, list[Future[str]]]] = []
        pending: deque[Future[str]] = deque()
        with storage.open_write((self.folder / name).uri) as out:
            for item, tensor in tensors:
                data = bytes_of(tensor)
                digests: list[Future[str]] = []
                for start in range(0, len(data), PIECE):
                    piece = data[start : start + PIECE]
                    digests.append(self.digests.submit(digest, piece.data))
                    out.write(piece.data)
                    pending.append(digests[-1])
                    if len(pending) > 8:  # what waits for its digest is kept in memory
                        pending.popleft().result()
                written.append((item, at, len(data), digests))
                at += len(data)
        for item, start, length, digests in written:
            assert item.tensor_data is not None
            chunk = item.tensor_data.chunk
            found = tuple(each.result() for each in digests)
            blob = Blob(offsets=tuple(chunk.offsets), sizes=tuple(chunk.sizes), file=name, start=start, digests=found)
            yield WriteResult(item.index, length, blob)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index of what all ranks wrote."""
        values: dict[str, str] = {}
        blobs: dict[str, list[Blob]] = {name: [] for name in metadata.state_dict_metadata}
        self.files = {}
        for result in (result for rank in results for result in rank):
            match result.storage_data:
                case Blob() as blob:
                    self.files[blob.file] = max(self.files.get(blob.file, 0), blob.start + result.size_in_bytes)
                    if result.size_in_bytes:  # ranks that have no row of a tensor have nothing to give
                        blobs[result.index.fqn].append(blob)
                case str() as text:
                    values[result.index.fqn] = text
        tensors: dict[str, Stored] = {}
        for name, told in metadata.state_dict_metadata.items():
            if isinstance(told, TensorStorageMetadata):
                dtype = str(told.properties.dtype).removeprefix("torch.")
                tensors[name] = Stored(dtype=dtype, shape=tuple(told.size), blobs=tuple(blobs[name]))
        data = _indices().dump_json(Index(piece=PIECE, tensors=tensors, values=values))
        (self.folder / INDEX).write(data)
        self.files[INDEX] = len(data)
        self.index_digest = digest(data)


def _filling(tensors: Sequence[tuple[WriteItem, Tensor]]) -> Iterator[list[tuple[WriteItem, Tensor]]]:
    """Tensors file by file."""
    some: list[tuple[WriteItem, Tensor]] = []
    size = 0
    for item, tensor in tensors:
        some.append((item, tensor))
        size += tensor.nbytes
        if size >= FILE:
            yield some
            some, size = [], 0
    if some:
        yield some


@dataclass
class _Landing:
    """Where the bytes `[first, last)` of a blob go. `buffer` is the target's own memory, or some to be copied from at the end."""

    item: ReadItem
    target: Tensor
    first: int
    last: int
    direct: bool
    left: int
    buffer: np.ndarray[Any, np.dtype[np.uint8]] | None = None


@dataclass
class _Piece:
    """Bytes of a file with a digest of their own, which are `[begin, begin + length)` of a blob."""

    tensor: str
    file: str
    start: int
    begin: int
    length: int
    digest: str
    landings: list[_Landing] = field(default_factory=list)

    def home(self) -> memoryview | None:
        """Where it can be read to at once: its place in what it is for, where it is for one alone that wants all of it."""
        if len(self.landings) > 1:
            return None
        (landing,) = self.landings
        low, high = self.begin - landing.first, self.begin + self.length - landing.first
        assert landing.buffer is not None
        return landing.buffer[low:high].data if low >= 0 and high <= len(landing.buffer) else None

    def share(self, numbers: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Copy what each landing wants of it."""
        for landing in self.landings:
            assert landing.buffer is not None
            low, high = max(landing.first, self.begin), min(landing.last, self.begin + self.length)
            landing.buffer[low - landing.first : high - landing.first] = numbers[low - self.begin : high - self.begin]


class ShardReader(StorageReader):
    """Reads what DCP plans for one rank from `folder`, whose index `read_index` gives.

    `read_data` raises CorruptCheckpoint where bytes are missing or have another digest; what was to be filled may hold some of
    them then.
    """

    def __init__(self, folder: Place, read_index: Callable[[], Index]) -> None:
        self.folder = folder
        self.read_index = read_index
        self.failure: Exception | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def read_metadata(self) -> Metadata:
        """DCP logs what is raised here and makes other words of it: `set_up_storage_reader` raises it instead."""
        try:
            self.index = self.read_index()
            return self.index.metadata()
        except Exception as error:
            self.failure = error
            return Metadata({})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:  # noqa: ARG002 -- DCP's
        if self.failure is not None:
            raise self.failure

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003 -- DCP's
        return True

    def read_data(self, plan: LoadPlan, planner: Any) -> torch.futures.Future[None]:
        pieces: dict[tuple[str, int], _Piece] = {}
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(self.index.values[item.storage_index.fqn].encode()))
            else:
                self._wanted(item, planner.resolve_tensor(item).detach(), pieces)
        runs = list(_runs(sorted(pieces.values(), key=lambda piece: (piece.file, piece.start))))
        for run in storage.ahead(self._requests(runs), READS_AT_ONCE):
            for piece in run:
                for landing in piece.landings:
                    landing.left -= 1
                    if not landing.left:
                        self._land(landing)
                        planner.commit_tensor(landing.item, landing.target)
        done: torch.futures.Future[None] = torch.futures.Future()
        done.set_result(None)
        return done

    def _blob(self, index: MetadataIndex) -> tuple[Stored, Blob]:
        stored = self.index.tensors[index.fqn]
        offsets = tuple(index.offset or ())
        if index.index is not None and stored.blobs[index.index].offsets == offsets:
            return stored, stored.blobs[index.index]
        return stored, next(blob for blob in stored.blobs if blob.offsets == offsets)

    def _wanted(self, item: ReadItem, target: Tensor, pieces: dict[tuple[str, int], _Piece]) -> None:
        """Note the pieces that an item needs: those which its first number lies in, its last, and all between."""
        stored, blob = self._blob(item.storage_index)
        dtype = dtype_of(stored.dtype)
        strides = [math.prod(blob.sizes[d + 1 :]) for d in range(len(blob.sizes))]
        corners = zip(item.storage_offsets, item.lengths, strides, strict=True)
        spans = [(offset * stride, (offset + length - 1) * stride) for offset, length, stride in corners]
        first = sum(low for low, _ in spans) * dtype.itemsize
        last = (sum(high for _, high in spans) + 1) * dtype.itemsize
        unbroken = last - first == math.prod(item.lengths) * dtype.itemsize
        same = target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous()
        length = math.prod(blob.sizes) * dtype.itemsize
        size = self.index.piece
        numbers = range(first // size, -(-last // size))
        landing = _Landing(item, target, first, last, unbroken and same, len(numbers))
        for number in numbers:
            begin = number * size
            at = (blob.file, blob.start + begin)
            if at not in pieces:
                here = min(size, length - begin)
                pieces[at] = _Piece(item.storage_index.fqn, *at, begin, here, blob.digests[number])
            pieces[at].landings.append(landing)

    def _requests(self, runs: Iterable[list[_Piece]]) -> Iterator[Callable[[], list[_Piece]]]:
        for run in runs:
            for landing in (landing for piece in run for landing in piece.landings):
                if landing.buffer is None:  # as late as can be: only what is under way takes memory
                    room = np.empty(0 if landing.direct else landing.last - landing.first, np.uint8)
                    landing.buffer = bytes_of(landing.target) if landing.direct else room
            yield partial(self._fetch, run)

    def _fetch(self, run: list[_Piece]) -> list[_Piece]:
        """Read pieces that lie side by side, each to where it belongs, and check them."""
        file, start = run[0].file, run[0].start
        room = _buffer(sum(piece.length for piece in run if piece.home() is None))
        places: list[memoryview] = []
        for piece in run:
            home = piece.home()
            if home is None:
                home, room = room[: piece.length], room[piece.length :]
            places.append(home)
        try:
            length, digests = storage.read_into((self.folder / file).uri, start, places, Digest)
        except FileNotFoundError:
            raise CorruptCheckpoint(self.folder.uri, file, run[0].tensor, "is not there") from None
        for piece, found, told in zip(run, places, digests, strict=True):
            if piece.start + piece.length > start + length:
                why = f"ends at byte {start + length:,}, before byte {piece.start + piece.length:,}"
                raise CorruptCheckpoint(self.folder.uri, file, piece.tensor, why)
            if told.hexdigest() != piece.digest:
                why = f"has other bytes from {piece.start:,} to {piece.start + piece.length:,} than were written"
                raise CorruptCheckpoint(self.folder.uri, file, piece.tensor, why)
            if piece.home() is None:
                piece.share(np.frombuffer(found, np.uint8))
        return run

    def _land(self, landing: _Landing) -> None:
        """Copy what has arrived to where it could not be read at once: another device, or a part that is not in one piece."""
        if landing.direct:
            return
        item, buffer = landing.item, landing.buffer
        assert buffer is not None
        stored, blob = self._blob(item.storage_index)
        dtype = dtype_of(stored.dtype)
        strides = [math.prod(blob.sizes[d + 1 :]) for d in range(len(blob.sizes))]
        landing.target.copy_(torch.from_numpy(buffer).view(dtype).as_strided(item.lengths, strides))
        landing.buffer = None


_ROOM = threading.local()


def _buffer(size: int) -> memoryview:
    """Room for what this thread reads, the same each time: memory that is new costs as much as a copy."""
    room: bytearray = getattr(_ROOM, "bytes", bytearray())
    if len(room) < size:
        room = _ROOM.bytes = bytearray(size)
    return memoryview(room)[:size]


def _runs(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces that lie side by side in a file, together, up to `RUN` bytes."""
    run: list[_Piece] = list(pieces[:1])
    for before, piece in pairwise(pieces):
        joined = piece.file == before.file and piece.start == before.start + before.length
        if not joined or piece.start + piece.length - run[0].start > RUN:
            yield run
            run = []
        run.append(piece)
    if run:
        yield run
