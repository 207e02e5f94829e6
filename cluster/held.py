"""What a program holds, counted while it runs on tensors that have shapes and no memory.

Every storage that comes and goes is seen where operations are dispatched. What an operation gives hangs on the shapes it is
given, and layers ask alike over and over: what was asked before is answered from memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode

from mllm.dispatched import signs, tensors

CPU = torch.device("cpu")

Course = dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
"""Bytes after each change, by the moment of the step: what a rank holds whole, and what all ranks hold of it together."""


KNOWN = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def _whole_numbers(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether what is made of no tensor is whole numbers or truths; where its type is not said, a range's ends or what fills it
    say so.
    """
    if kwargs.get("dtype") is None:
        of_range = func.overloadpacket is torch.ops.aten.arange and all(isinstance(end, int) for end in args)
        return of_range or (func is torch.ops.aten.full.default and isinstance(args[1], int))
    return kwargs["dtype"] in KNOWN


def _pictures(x: Tensor) -> bool:
    """Whether these are tiles, whose pixels say nothing of shapes, and which it takes long to resize."""
    return x.dtype == torch.uint8 and x.ndim == 4


PASSING = {torch.ops.aten.convolution: 1, torch.ops.aten.convolution_backward: 2, torch.ops.aten.logsumexp: 1}
"""Whose kernels copy so many of their first tensors for a while: into a layout of their own, or to take the exponents of."""


_Make = Callable[[FakeTensorMode, Sequence[Tensor]], Any]
"""Makes what an operation gives for tensors of shapes that it was asked for before."""

_made: dict[Any, _Make] = {}
"""By what was asked. It hangs on shapes alone, so all simulations share it; torch's own way to the same takes far longer."""


@cache
def _writes(func: Any) -> bool:
    return any(x.alias_info is not None and x.alias_info.is_write for x in func._schema.arguments)


def _like(result: Any, given: Sequence[Tensor]) -> _Make | None:
    """Makes another result of the same shapes, new or a view of the first tensor that is given; None for what is neither."""
    owners = [x.untyped_storage()._cdata for x in given]
    if isinstance(result, tuple | list):
        fresh = [cdata for x in tensors(result) if (cdata := x.untyped_storage()._cdata) not in owners]
        if len(set(fresh)) < len(fresh):  # which lie in one another's memory
            return None
        parts = [part for part in (_like(part, given) for part in result) if part is not None]
        kind = type(result)
        return (lambda mode, given: kind(part(mode, given) for part in parts)) if len(parts) == len(result) else None
    if type(result) is not FakeTensor or result.constant is not None or result.fake_device != CPU:
        return None
    storage, shape, stride, dtype = result.untyped_storage(), result.shape, result.stride(), result.dtype
    at = result.storage_offset()

    def new(mode: FakeTensorMode, _: Sequence[Tensor]) -> FakeTensor:
        with unset_fake_temporarily():
            return FakeTensor(mode, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), CPU)

    def view(mode: FakeTensorMode, given: Sequence[Tensor]) -> FakeTensor:
        with unset_fake_temporarily():
            empty = torch.empty(0, dtype=dtype, device="meta")
            # Torch's own stubs know only storages of a type, and `set_` takes this one.
            viewed = empty.set_(given[0].untyped_storage(), at, shape, stride)  # type: ignore[arg-type]  # see above
            return FakeTensor(mode, viewed, CPU)

    if storage._cdata not in owners:
        return new if new(result.fake_mode, ()).untyped_storage().nbytes() == storage.nbytes() else None
    alone = storage._cdata == owners[0] and dtype == given[0].dtype
    return view if alone and all(x is not result for x in given) else None


class Held(TorchDispatchMode):
    """Counts the bytes of all storages alive. Used inside a FakeTensorMode.

    Whole numbers and truths but pixels are computed for real -- lengths of documents, places of labels -- for the program asks
    for them; numbers asked of a fake tensor are one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.watched: dict[int, tuple[int, int, weakref.ref[torch.UntypedStorage]]] = {}
        self.changes: list[tuple[int, int]] = []
        self.shared: set[int] = set()
        self.moments: list[tuple[int, tuple[str, ...]]] = [(0, ())]
        self.all_shared = False
        self.paused = False
        self.stack = ExitStack()

    def moment(self, *labels: str, shared: bool = False) -> None:
        """What follows belongs to `labels`; with `shared`, what is made there are parts that ranks share."""
        self.moments.append((len(self.changes), labels))
        self.all_shared = shared

    def share(self, tensors: Sequence[Tensor]) -> None:
        """These are a rank's part of something that ranks share."""
        for tensor in tensors:
            local = tensor._local_tensor if isinstance(tensor, DTensor) else None
            if local is not None and local.untyped_storage()._cdata in self.watched:
                self.shared.add(self.watched[local.untyped_storage()._cdata][0])

    def course(self, ranks: int) -> Course:
        """What was held from the first moment on, by moment."""
        by = np.array([amount for _, amount in self.changes], np.float64)
        shared = np.array([number in self.shared for number, _ in self.changes], bool)
        whole, parts = np.cumsum(np.where(shared, 0, by)), np.cumsum(np.where(shared, by, 0)) * ranks
        ends = [begin for begin, _ in self.moments[1:]] + [len(by)]
        course: Course = {}
        for (begin, labels), end in zip(self.moments, ends, strict=True):
            span = slice(max(begin - 1, 0), end)
            for label in labels:
                while label in course:  # a layer that is asked again in the same pass, or computed again
                    label += " again"
                course[label] = whole[span], parts[span]
        return course

    def __enter__(self) -> Held:
        self.stack.enter_context(patch.object(torch.UntypedStorage, "resize_", self._resizing()))
        self.stack.enter_context(
            patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", self._unwatched())
        )
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its parts come by here one by one
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # half of all that comes by
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args, **kwargs)
        given = tensors(*args, *kwargs.values())
        kinds = {type(x) for x in given}
        if func is torch.ops.aten._local_scalar_dense.default and FakeTensor in kinds and args[0].constant is None:
            return 1.0 if args[0].is_floating_point() else 1
        if func is torch.ops.aten.nonzero.default and FakeTensor in kinds:
            return self._nonzero(args[0])
        if func is torch.ops.aten.index.Tensor and FakeTensor in kinds:
            args = (args[0], [place for index in args[1] for place in self._places(index)])
        known = FakeTensor not in kinds and not any(_pictures(x) for x in given)
        if known if kinds else _whole_numbers(func, args, kwargs):
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
        else:
            result = self._found(func, args, kwargs)
        if not self.paused:
            for x in tensors(result):
                self._watch(x.untyped_storage())
            if func.overloadpacket in PASSING:
                self._passing(sum(x.nbytes for x in args[: PASSING[func.overloadpacket]]))
        return result

    def _found(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation gives; where one was asked the same before, by what came of it then."""
        given, key = tensors(*args, *kwargs.values()), None
        fakes = [x for x in given if type(x) is FakeTensor and x.constant is None]
        if fakes and len(fakes) == len(given) and not _writes(func):
            key = func, *((x.storage_offset(), x.fake_device) for x in fakes), signs(args), signs(kwargs.items())
            try:
                if (make := _made.get(key)) is not None:
                    return make(fakes[0].fake_mode, fakes)
            except TypeError:  # such as a group of ranks, which nobody can look up
                key = None
        result = func(*args, **kwargs)
        if key is not None and (make := _like(result, given)) is not None:
            _made[key] = make
        return result

    def _nonzero(self, truths: Tensor) -> Tensor:
        """Places of what is true, int64 (n, dimensions); where nobody has the numbers that it hangs on, all places, the most."""
        with unset_fake_temporarily():
            known = torch.ones(truths.shape, dtype=torch.bool) if isinstance(truths, FakeTensor) else truths
            return known.nonzero()

    def _places(self, index: Tensor | None) -> list[Tensor | None]:
        """An index in numbers, whose count is its result's size, where it is truths."""
        if index is None or index.dtype != torch.bool:
            return [index]
        return list(self._nonzero(index).unbind(1))

    def _passing(self, size: int) -> None:
        """So many bytes are taken and given back."""
        self.changes += [(len(self.changes), size), (len(self.changes), -size)]

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.watched:
            return
        number = len(self.changes)  # an address is used again, this is not
        if self.all_shared:
            self.shared.add(number)
        self.watched[key] = (number, storage.nbytes(), weakref.ref(storage, lambda _: self._gone(key)))
        self.changes.append((number, storage.nbytes()))

    def _gone(self, key: int) -> None:
        number, size, _ = self.watched.pop(key)
        self.changes.append((number, -size))

    def _resizing(self) -> Callable[[torch.UntypedStorage, int], None]:
        """FSDP frees and takes memory by resizing storages, which no dispatch sees."""
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            if storage._cdata in self.watched:
                number, before, alive = self.watched[storage._cdata]
                self.watched[storage._cdata] = number, storage.nbytes(), alive
                self.changes.append((number, storage.nbytes() - before))

        return resized

    def _unwatched(self) -> Callable[..., Any]:
        """DTensor finds shapes by fake tensors of whole size, which are no part of the program."""
        find = ShardingPropagator._propagate_tensor_meta_non_cached

        def found(*args: Any, **kwargs: Any) -> Any:
            before, self.paused = self.paused, True
            try:
                return find(*args, **kwargs)
            finally:
                self.paused = before

        return found
