"""varlen_attention against attention written out in full, one document at a time."""

import pytest
import torch

from ops.attention import varlen_attention


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    repeat = q.shape[1] // k.shape[1]
    out = []
    for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        b, c = b.repeat_interleave(repeat, 1), c.repeat_interleave(repeat, 1)
        scores = torch.einsum("ihe,jhe->hij", a, b) * q.shape[-1] ** -0.5
        hidden = torch.ones(len(a), len(a), dtype=torch.bool).triu(1)
        out.append(torch.einsum("hij,jhe->ihe", scores.masked_fill(hidden, -torch.inf).softmax(-1), c))
    return torch.cat(out)


@pytest.mark.parametrize("lengths", [[7], [1, 1, 1], [5, 1, 9, 2], [1, 30]])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_the_plain_formula_forward_and_backward(lengths: list[int], kv_heads: int) -> None:
    torch.manual_seed(0)
    total = sum(lengths)
    q = torch.randn(total, 4, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(total, kv_heads, 8, dtype=torch.float64, requires_grad=True)
    v = torch.randn(total, kv_heads, 8, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    ours = varlen_attention(q, k, v, cu_seqlens, max(lengths))
    theirs = reference(q, k, v, lengths)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    for mine, plain in zip(
        torch.autograd.grad((ours * weight).sum(), (q, k, v)),
        torch.autograd.grad((theirs * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, plain)


def test_lengths_of_another_pack_are_refused() -> None:
    q = torch.randn(4, 2, 8)
    with pytest.raises(ValueError, match="describe 5 positions and q has 4"):
        varlen_attention(q, q, q, torch.tensor([0, 5], dtype=torch.int32), 5)
