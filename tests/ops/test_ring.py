"""Ranks that share a pack attend as one rank would with the whole of it: forward and backward, in float64."""

import random

import pytest
import torch
import torch.distributed as dist

from benchmarks.common import on_ranks
from ops.attention import varlen_attention
from ops.context import Context, ContextBy, heads_fit
from ops.context import Share as RankShare

CASES = 12


def share(context: Context, bounds: tuple[int, ...]) -> RankShare:
    nothing = torch.zeros(0, dtype=torch.long)
    return RankShare(context, bounds, context.positions(bounds[-1]), nothing, nothing)


def lengths_of(dice: random.Random, size: int) -> list[int]:
    """Documents of one position, long ones and between, that fill a multiple of two chunks a rank."""
    lengths = [dice.choice([1, 1, 2, 5, 17, 40]) for _ in range(dice.randint(1, 7))]
    missing = -sum(lengths) % (2 * size)
    return lengths + [missing] * (missing > 0)


def differences(by: ContextBy, dtype: torch.dtype) -> list[float]:
    """The greatest difference, over output and gradients, of this rank's part from the whole; for each of some packs."""
    assert dist.group.WORLD is not None
    context = Context(dist.group.WORLD, by)
    dice = random.Random(7)
    found = []
    for _ in range(CASES):
        lengths = lengths_of(dice, context.size)
        heads, shared = dice.choice(
            [(4, 4), (4, 2), (12, 1), (12, 3)] if by == "ring" else [(12, 12), (12, 3), (12, 1)]
        )
        torch.manual_seed(sum(lengths))
        q, k, v = (torch.randn(sum(lengths), n, 8, dtype=dtype, requires_grad=True) for n in (heads, shared, shared))
        slope = torch.randn_like(q)
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        whole = varlen_attention(q, k, v, bounds, max(lengths), scale=0.3, backend="plain")
        expected = torch.autograd.grad(whole, (q, k, v), slope)
        held = share(context, tuple(bounds.tolist()))
        mine = [x.detach()[held.positions].requires_grad_() for x in (q, k, v)]
        out = held.attend(mine[0], mine[1], mine[2], 0.3)
        parts = torch.autograd.grad(out, mine, slope[held.positions])
        pairs = zip([out, *parts], [whole, *expected], strict=True)
        found.append(max(float((a - b[held.positions]).abs().max()) for a, b in pairs))
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("by", ["ring", "ulysses"])
def test_ranks_that_share_a_pack_attend_as_one(world: int, by: ContextBy) -> None:
    for found in on_ranks(world, differences, by, torch.float64):
        assert found == pytest.approx([0.0] * CASES, abs=1e-12)


def test_what_was_merged_from_parts_in_bfloat16_is_as_near_as_bfloat16_is() -> None:
    for found in on_ranks(2, differences, "ring", torch.bfloat16):
        assert 0 < max(found) < 0.1


def test_every_position_is_one_rank_s_and_chunks_pair_early_with_late() -> None:
    held = on_ranks(3, positions)
    assert sorted(position for rank in held for position in rank) == list(range(36))
    assert held[0] == [*range(6), *range(30, 36)]


def positions() -> list[int]:
    assert dist.group.WORLD is not None
    context = Context(dist.group.WORLD, "ring")
    assert context.padded(31) == 36
    return context.positions(36).tolist()


def test_heads_that_cannot_be_dealt_are_refused_with_the_mend() -> None:
    assert heads_fit("ring", 3, 4, 2) == ""
    assert heads_fit("ulysses", 4, 8, 2) == ""
    assert "3 ranks, which do not divide them; take ring" in heads_fit("ulysses", 3, 4, 2)
