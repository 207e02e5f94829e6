"""Liger's kernel against our own loss: on a GPU, or on any machine by Triton's interpreter (`make test-extras`)."""

import os
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from ops.losses import IGNORED, Fused, liger_is_there, linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.skipif(
    not (liger_is_there() and find_spec("triton") and (DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET"))),
    reason="needs liger-kernel, and a GPU or TRITON_INTERPRET=1: `make test-extras` has them",
)


def taken(by: Fused, dtype: torch.dtype, labels: Tensor, z: float, body: bool, head: bool) -> list[Tensor]:
    """Sum, losses, right ones and gradients of some rows of unequal weight."""
    torch.manual_seed(0)
    hidden = torch.randn(len(labels), 16).to(DEVICE, dtype).requires_grad_(body)
    weight = torch.randn(50, 16).to(DEVICE, dtype).requires_grad_(head)
    counts = torch.rand(len(labels)).to(DEVICE)
    losses = linear_cross_entropy(hidden, weight, labels.to(DEVICE), counts, z, chunk=7, by=by)
    trained = [x for x in (hidden, weight) if x.requires_grad]
    gradients = torch.autograd.grad(3 * losses.sum, trained) if trained else ()
    return [losses.sum.detach(), losses.each, losses.correct, *gradients]


@pytest.mark.parametrize(("dtype", "far"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("z", [0.0, 1e-2])
@pytest.mark.parametrize(("body", "head"), [(True, True), (True, False), (False, True), (False, False)])
def test_rows_have_the_losses_and_gradients_of_our_own_code(
    dtype: torch.dtype, far: float, z: float, body: bool, head: bool
) -> None:
    labels = torch.randint(50, (33,), generator=torch.Generator().manual_seed(1))
    labels[::4] = IGNORED
    ours, theirs = (taken(by, dtype, labels, z, body, head) for by in ("torch", "liger"))
    for a, b in zip(ours, theirs, strict=True):
        assert (a.double() - b.double()).norm() <= far * a.double().norm()


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_learned_gives_zeros(rows: int) -> None:
    for found in taken("liger", torch.float32, torch.full((rows,), IGNORED), 0.0, True, True):
        assert not found.any()
