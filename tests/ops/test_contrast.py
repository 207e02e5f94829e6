"""Pairs spread over ranks, unevenly, contrast as they do on one rank: the same loss, the same gradients."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import on_ranks
from ops.contrast import contrastive_loss, sigmoid_loss

PAIRS = 7


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(PAIRS, 5, dtype=torch.float64), dim=1) for _ in range(2))
    return images, texts, torch.tensor(3.0, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)


def written_out() -> tuple[Tensor, Tensor]:
    """Both losses pair by pair."""
    images, texts, scale, bias = (x.requires_grad_() for x in inputs())
    softmax, sigmoid = images.new_zeros(()), images.new_zeros(())
    for i in range(PAIRS):
        of_image = [(scale * images[i] @ texts[j]).exp() for j in range(PAIRS)]
        of_text = [(scale * images[j] @ texts[i]).exp() for j in range(PAIRS)]
        softmax = softmax - (of_image[i] / sum(of_image)).log() / 2 - (of_text[i] / sum(of_text)).log() / 2
        for j in range(PAIRS):
            sign = 1 if i == j else -1
            sigmoid = sigmoid + (1 + (-sign * (scale * images[i] @ texts[j] + bias)).exp()).log()
    return softmax, sigmoid


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def test_alone_they_are_their_formulas() -> None:
    images, texts, scale, bias = inputs()
    softmax, sigmoid = written_out()
    assert contrastive_loss(images, texts, scale).item() == pytest.approx(softmax.item())
    assert sigmoid_loss(images, texts, scale, bias).item() == pytest.approx(sigmoid.item())


def spread(sizes: list[int], kind: str) -> list[float]:
    """The loss summed over ranks, and every gradient: those of rows from the rank that has them, others summed."""
    group = dist.group.WORLD
    assert group is not None
    images, texts, scale, bias = inputs()
    first = sum(sizes[: dist.get_rank()])
    mine = slice(first, first + sizes[dist.get_rank()])
    leaves = [x.clone().requires_grad_() for x in (images[mine], texts[mine], scale, bias)]
    softmax = kind == "softmax"
    a, b, c, d = leaves
    loss = contrastive_loss(a, b, c, group) if softmax else sigmoid_loss(a, b, c, d, group)
    found = gradients(loss, leaves)
    whole = [torch.zeros_like(x) for x in (images, texts, scale, bias)]
    whole[0][mine], whole[1][mine], whole[2], whole[3] = found
    for x in (loss := loss.detach(), *whole):
        dist.all_reduce(x)
    return [loss.item(), *torch.cat([x.flatten() for x in whole]).tolist()]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("sizes", [[7], [4, 3], [5, 0, 2]])
def test_spread_over_ranks_they_are_what_they_are_on_one(sizes: list[int], kind: str) -> None:
    images, texts, scale, bias = leaves = [x.requires_grad_() for x in inputs()]
    softmax = kind == "softmax"
    loss = contrastive_loss(images, texts, scale) if softmax else sigmoid_loss(images, texts, scale, bias)
    expected = [loss.item(), *torch.cat([g.flatten() for g in gradients(loss, leaves)]).tolist()]
    for found in on_ranks(len(sizes), spread, sizes, kind):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)  # softmaxes are taken in float32
