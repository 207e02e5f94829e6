"""Shapes and FLOPs of operations on tensors, some of which have no memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from mllm.dispatched import makes, signs, tensors


class Shapes:
    """What operations give, on the meta device where any of their tensors is, and their FLOPs by torch's own formulas.

    Layers ask alike over and over, and what was asked before is answered from memory.
    """

    def __init__(self) -> None:
        self.known: dict[Any, tuple[Callable[[], Any], int]] = {}

    def __call__(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, int]:
        there = {x.is_meta for x in tensors(*args, *kwargs.values())}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            return False, 0  # whether a mask hides nothing: it may hide something
        if len(there) == 2:
            if func._overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
                args = (args[0], _numbered(args[1]), *args[2:])
            args, kwargs = tree_map_only(
                Tensor, lambda x: x if x.is_meta else torch.empty_like(x, device="meta"), (args, kwargs)
            )
        key = (func, signs(args), signs(kwargs.items())) if True in there and makes(func) else None
        if key in self.known:
            make, flops = self.known[key]
            return make(), flops
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        flops = formula(*args, **kwargs, out_val=result) if formula is not None else 0
        if key is not None:
            self.known[key] = _like(result), flops
        return result, flops


def _like(result: Any) -> Callable[[], Any]:
    """Makes another of the same shape."""
    if isinstance(result, Tensor):
        return partial(torch.empty_strided, result.shape, result.stride(), dtype=result.dtype, device=result.device)
    if isinstance(result, tuple):
        parts = [_like(part) for part in result]
        return lambda: tuple(part() for part in parts)
    return lambda: result


def _numbered(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices with places in place of truths, which on the meta device nobody could count."""
    found: list[Tensor | None] = []
    for index in indices:
        known = index is not None and index.dtype == torch.bool and not index.is_meta
        found += index.nonzero().unbind(1) if known and index is not None else [index]
    return found
