"""linear_cross_entropy against torch's own over the full logits."""

import pytest
import torch
import torch.nn.functional as F

from ops.losses import linear_cross_entropy


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_equals_cross_entropy_of_full_logits(chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(10, 6, requires_grad=True)
    weight = torch.randn(17, 6, requires_grad=True)
    labels = torch.randint(0, 17, (10,))
    labels[[0, 4, 9]] = -100
    losses, correct = linear_cross_entropy(hidden, weight, labels, chunk)
    logits = hidden @ weight.T
    plain = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses, plain)
    assert correct.tolist() == ((logits.argmax(-1) == labels) & (labels != -100)).tolist()
    for ours, theirs in zip(
        torch.autograd.grad(losses.sum(), (hidden, weight), retain_graph=True),
        torch.autograd.grad(plain.sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_nothing_learned_costs_nothing_and_still_has_a_gradient() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)
    losses, correct = linear_cross_entropy(hidden, weight, torch.full((3,), -100))
    losses.sum().backward()
    assert losses.sum() == 0
    assert not correct.any()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() == 0
