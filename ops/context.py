"""Context parallelism: some ranks share the positions of each pack, so that none holds the activations of all.

A pack of T positions is cut into 2n chunks, and rank r of n takes chunks r and 2n - 1 - r (zigzag; Llama 3, arXiv:2407.21783,
3.3.2): a causal view makes early chunks cheap and late ones dear, and each rank has one of each. Everything but attention
looks at positions one by one and needs nothing of the others; attention is in `ops/ring.py`, which is imported where it is
used: it brings torch's compiler with it, and a batch is known to processes that never train.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from ops.collectives import gather_rows

ContextBy = Literal["ring", "ulysses"]


@dataclass(frozen=True, slots=True)
class Context:
    """The ranks that share packs with this one."""

    group: dist.ProcessGroup
    by: ContextBy

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()

    def padded(self, length: int) -> int:
        """`length` rounded up to what the ranks can share: a multiple of two chunks each."""
        return -(-length // (2 * self.size)) * 2 * self.size

    def positions(self, length: int, rank: int | None = None) -> Int[Tensor, " t"]:
        """Which of `length` positions, already padded, are this rank's (or `rank`'s), in the order it holds them."""
        rank = self.rank if rank is None else rank
        chunk = length // (2 * self.size)
        return torch.cat([torch.arange(c * chunk, (c + 1) * chunk) for c in self.chunks(rank)])

    def chunks(self, rank: int) -> tuple[int, int]:
        """The two chunks that `rank` holds."""
        return rank, 2 * self.size - 1 - rank

    def gather(self, mine: Float[Tensor, "v D"]) -> Float[Tensor, "V D"]:
        """All ranks' rows, equally many, in the order of ranks; gradients go back to whose they are. A collective."""
        return gather_rows(mine, self.group)


@dataclass(frozen=True, slots=True)
class Share:
    """What a rank holds of one pack.

    `bounds` are the documents' of the whole pack, and of the positions that pad it: host integers, since they decide which
    products are made at all. `positions` int64 (t,) are the pack's that are here, `documents` int64 (t,) whose they are, and
    `visual` int64 (v,) which of the pack's visual tokens stand among them.
    """

    context: Context
    bounds: tuple[int, ...]
    positions: Int[Tensor, " t"]
    documents: Int[Tensor, " t"]
    visual: Int[Tensor, " v"]

    def attend(
        self,
        q: Float[Tensor, "t H E"],
        k: Float[Tensor, "t K E"],
        v: Float[Tensor, "t K E"],
        scale: float | None = None,
    ) -> Float[Tensor, "t H E"]:
        """Causal attention inside each document, of this rank's positions to all of the pack's. A collective."""
        from ops.ring import ring_attention, ulysses_attention

        factor: float = q.shape[-1] ** -0.5 if scale is None else scale
        if self.context.by == "ulysses":
            return ulysses_attention(q, k, v, self.bounds, factor, self.context)
        return ring_attention(q, k, v, self.bounds, factor, self.context)


def heads_fit(by: ContextBy, size: int, heads: int, kv_heads: int) -> str:
    """Why `size` ranks cannot share packs `by` this way, with the mend; an empty word where they can."""
    if by == "ring" or heads % size == 0:
        return ""
    return f"ulysses deals {heads} heads ({kv_heads} of keys) to {size} ranks, which do not divide them; take ring"
