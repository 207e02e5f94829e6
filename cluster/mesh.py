"""How ranks are laid out, in numbers: what a driver asks before there are any, without what shards a model."""

from __future__ import annotations

from mllm.recipe import DDP, FSDP, Parallel


def context_of(parallel: Parallel) -> int:
    """How many ranks share each pack."""
    return parallel.context if isinstance(parallel, FSDP) else 1


def mesh_shape(parallel: FSDP | DDP, world: int) -> tuple[int, ...]:
    """Ranks as (copies, ranks that share a copy); as one number where there is one copy. Raises ValueError."""
    if isinstance(parallel, DDP):
        return world, 1
    shard = parallel.shard
    if shard is None:
        return (world,)
    if world % shard:
        raise ValueError(f"{world} ranks cannot be groups of shard={shard}; take a divisor, or None for one copy")
    return world // shard, shard
