"""linear_cross_entropy against torch's own over the full logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.losses import IGNORED, Fused, fused_by, linear_cross_entropy


def full(hidden: Tensor, weight: Tensor, labels: Tensor, counts: Tensor, z: float) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.T
    learned = labels != IGNORED
    each = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
    each = each + z * logits.logsumexp(1) ** 2 * learned
    return (each * counts).sum(), each


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-1, 16), min_size=1, max_size=12),
    st.integers(1, 12),
    st.sampled_from([0.0, 1e-2]),
    st.booleans(),
    st.booleans(),
)
def test_equals_the_loss_of_full_logits_and_its_gradients(
    targets: list[int], chunk: int, z: float, body: bool, head: bool
) -> None:
    torch.manual_seed(len(targets))
    hidden = torch.randn(len(targets), 6, dtype=torch.float64, requires_grad=body)
    weight = torch.randn(17, 6, dtype=torch.float64, requires_grad=head)
    counts = torch.rand(len(targets), dtype=torch.float64)
    labels = torch.tensor([t if t >= 0 else IGNORED for t in targets])
    ours = linear_cross_entropy(hidden, weight, labels, counts, z, chunk)
    total, each = full(hidden, weight, labels, counts, z)
    torch.testing.assert_close(ours.sum, total)
    torch.testing.assert_close(ours.each, each.detach())
    right = ((hidden @ weight.T).argmax(1) == labels) & (labels != IGNORED)
    assert ours.correct.tolist() == right.tolist()
    trained = [x for x in (hidden, weight) if x.requires_grad]
    if trained:
        mine = torch.autograd.grad(3 * ours.sum, trained)
        for a, b in zip(mine, torch.autograd.grad(3 * total, trained), strict=True):
            torch.testing.assert_close(a, b)


def test_in_bfloat16_it_is_as_near_as_full_logits_are() -> None:
    torch.manual_seed(0)
    exact = [torch.randn(64, 32, dtype=torch.float64), torch.randn(200, 32, dtype=torch.float64)]
    labels, counts = torch.randint(0, 200, (64,)), torch.ones(64, dtype=torch.float64)
    hidden, weight = (x.bfloat16().requires_grad_() for x in exact)
    ours = linear_cross_entropy(hidden, weight, labels, chunk=7)
    plain = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    total, _ = full(plain[0], plain[1], labels, counts, 0.0)
    torch.testing.assert_close(ours.sum.double(), total, rtol=1e-2, atol=0)
    mine = torch.autograd.grad(ours.sum, (hidden, weight))
    for a, b in zip(mine, torch.autograd.grad(total, plain), strict=True):
        assert (a.double() - b).norm() < 0.01 * b.norm()


@pytest.mark.parametrize("labels", [[], [IGNORED] * 3])
def test_nothing_learned_costs_nothing_and_still_has_gradients(labels: list[int]) -> None:
    hidden = torch.randn(len(labels), 4, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)
    losses = linear_cross_entropy(hidden, weight, torch.tensor(labels, dtype=torch.long))
    losses.sum.backward()
    assert losses.sum == 0
    assert not losses.correct.any()
    for x in (hidden, weight):
        assert x.grad is not None
        assert x.grad.abs().sum() == 0


def test_without_gradients_none_are_made() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 4])).sum.requires_grad


@pytest.mark.parametrize(
    ("device", "dtype", "installed", "by", "why"),
    [
        ("cuda", torch.bfloat16, True, "liger", ""),
        ("cuda", torch.float32, True, "liger", ""),
        ("cuda", torch.float64, True, "torch", "the hidden states are float64"),
        ("cuda", torch.bfloat16, False, "torch", "pip install 'mllm[liger]'"),
        ("cpu", torch.bfloat16, True, "torch", "needs CUDA, and the tensors are on cpu"),
    ],
)
def test_liger_takes_the_loss_where_it_is_installed_and_on_gpus_alone(
    device: str, dtype: torch.dtype, installed: bool, by: Fused, why: str
) -> None:
    taken, reason = fused_by(device, dtype, installed)
    assert taken == by
    assert why in reason
    assert (reason == "") == (by == "liger")
