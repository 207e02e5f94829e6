"""Attention over packs: every backend that runs here against the definition, in float64, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.attention import BACKENDS, WITH_BLOCKS, Backend, available, chosen, varlen_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTH = 16

alike = st.builds(lambda length, count: [length] * count, st.integers(1, 12), st.integers(2, 5))
documents = st.lists(st.integers(1, 12), min_size=1, max_size=5) | alike
groups = st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 3), (2, 2)])


def written_out(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], view: list[Tensor], scale: float) -> Tensor:
    """One document after the other, one query head after the other."""
    out = torch.zeros_like(q)
    start = 0
    for n, see in zip(lengths, view, strict=True):
        for head in range(q.shape[1]):
            shared = head * k.shape[1] // q.shape[1]
            a, b, c = q[start : start + n, head], k[start : start + n, shared], v[start : start + n, shared]
            weights = (a @ b.T * scale).masked_fill(~see.to(a.device), -torch.inf).softmax(-1)
            out[start : start + n, head] = weights @ c
        start += n
    return out


Inputs = tuple[Tensor, Tensor, Tensor]


def qkv(total: int, heads: int, shared: int, dtype: torch.dtype = torch.float64, width: int = WIDTH) -> Inputs:
    torch.manual_seed(total)

    def fresh(count: int) -> Tensor:
        return torch.randn((total, count, width), dtype=dtype, device=DEVICE, requires_grad=True)

    return fresh(heads), fresh(shared), fresh(shared)


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def assert_agree(ours: Tensor, theirs: Tensor, inputs: Inputs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weight = torch.randn(theirs.shape, dtype=torch.float64, device=DEVICE)
    mine = torch.autograd.grad((ours.double() * weight).sum(), inputs)
    plain = torch.autograd.grad((theirs.double() * weight).sum(), inputs)
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(documents, groups, st.booleans(), st.sampled_from([None, 0.3]))
@pytest.mark.parametrize("backend", ["plain", "sdpa"])
def test_a_document_sees_itself_alone(
    backend: Backend, lengths: list[int], heads: tuple[int, int], causal: bool, scale: float | None
) -> None:
    inputs = qkv(sum(lengths), *heads)
    view = [torch.ones(n, n).tril().bool() if causal else torch.ones(n, n).bool() for n in lengths]
    theirs = written_out(*inputs, lengths, view, WIDTH**-0.5 if scale is None else scale)
    ours = varlen_attention(*inputs, bounds(lengths), max(lengths), scale=scale, causal=causal, backend=backend)
    assert_agree(ours, theirs, inputs)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(-1, 2), min_size=1, max_size=9), min_size=1, max_size=4), groups)
@pytest.mark.parametrize("backend", ["plain", "sdpa"])
def test_a_block_sees_all_of_itself_and_what_comes_before(
    backend: Backend, numbers: list[list[int]], heads: tuple[int, int]
) -> None:
    lengths = [len(of) for of in numbers]
    inputs = qkv(sum(lengths), *heads)
    view = [
        torch.tensor([[j <= i or (of[i] == of[j] >= 0) for j in range(len(of))] for i in range(len(of))])
        for of in numbers
    ]
    theirs = written_out(*inputs, lengths, view, WIDTH**-0.5)
    blocks = torch.tensor([number for of in numbers for number in of], device=DEVICE)
    ours = varlen_attention(*inputs, bounds(lengths), max(lengths), blocks=blocks, backend=backend)
    assert_agree(ours, theirs, inputs)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b not in ("plain", "sdpa")])
def test_kernels_for_gpus_give_what_the_definition_gives(
    backend: Backend, heads: tuple[int, int], blocks: bool
) -> None:
    if reason := available()[backend]:
        pytest.skip(f"{backend} {reason}")
    if blocks and backend not in WITH_BLOCKS:
        pytest.skip(f"{backend} knows no blocks, and says so: see below")
    lengths = [1, 70, 1, 130, 33]
    inputs = qkv(sum(lengths), *heads, torch.bfloat16, 64)
    numbers = torch.randint(-1, 3, (sum(lengths),), device=DEVICE) if blocks else None
    ours = varlen_attention(*inputs, bounds(lengths), max(lengths), blocks=numbers, backend=backend)
    q, k, v = (x.detach().double().requires_grad_() for x in inputs)
    theirs = varlen_attention(q, k, v, bounds(lengths), max(lengths), blocks=numbers, backend="plain")
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=0.02)
    weight = torch.randn(theirs.shape, dtype=torch.float64, device=DEVICE)
    mine = torch.autograd.grad((ours.double() * weight).sum(), inputs)
    for a, b in zip(mine, torch.autograd.grad((theirs * weight).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("backend", ["plain", "sdpa", None])
def test_an_empty_pack_has_an_output_and_gradients_for_all_three(backend: Backend | None) -> None:
    inputs = qkv(0, 4, 2)
    out = varlen_attention(*inputs, bounds([]), 0, backend=backend)
    assert out.shape == (0, 4, WIDTH)
    assert [g.shape for g in torch.autograd.grad(out.sum(), inputs)] == [x.shape for x in inputs]


def test_without_a_gpu_sdpa_is_taken_and_a_kernel_for_gpus_is_refused_with_its_reason() -> None:
    assert chosen(torch.device("cpu"), torch.bfloat16) == "sdpa"
    if torch.cuda.is_available():
        return
    q, k, v = qkv(4, 2, 2)
    with pytest.raises(ValueError, match="'flash2' needs a GPU; leave the backend away for 'sdpa'"):
        varlen_attention(q, k, v, bounds([4]), 4, backend="flash2")


def test_lengths_of_another_pack_and_blocks_without_causality_are_refused() -> None:
    q, k, v = qkv(4, 2, 2)
    with pytest.raises(ValueError, match="describe 5 positions and q has 4"):
        varlen_attention(q, k, v, bounds([5]), 5, backend="sdpa")
    with pytest.raises(ValueError, match="widen a causal view"):
        varlen_attention(q, k, v, bounds([4]), 4, causal=False, blocks=torch.zeros(4, device=DEVICE).int())


@settings(max_examples=20, deadline=None)
@given(documents, groups)
@pytest.mark.parametrize("backend", ["plain", "sdpa"])
def test_slopes_let_scores_fall_with_the_distance_within_a_document(
    backend: Backend, lengths: list[int], heads: tuple[int, int]
) -> None:
    q, k, v = inputs = qkv(sum(lengths), *heads)
    slopes = 0.5 ** torch.arange(1, heads[0] + 1, device=DEVICE, dtype=torch.float64)
    ours = varlen_attention(q, k, v, bounds(lengths), max(lengths), slopes=slopes, backend=backend)
    expected, start = [], 0
    for n in lengths:
        a, b, c = (x[start : start + n] for x in inputs)
        b, c = (x.repeat_interleave(heads[0] // heads[1], 1) for x in (b, c))
        scores = torch.einsum("ihe,jhe->hij", a, b) / WIDTH**0.5
        for i in range(n):
            for j in range(n):
                far = torch.full_like(slopes, torch.inf) if j > i else slopes * (i - j)
                scores = scores.index_put(
                    (torch.arange(heads[0]), torch.tensor(i), torch.tensor(j)), scores[:, i, j] - far
                )
        expected.append(torch.einsum("hij,jhe->ihe", scores.softmax(-1), c))
        start += n
    assert_agree(ours, torch.cat(expected), inputs)


def test_kernels_that_know_no_slopes_are_not_taken() -> None:
    q, k, v = qkv(4, 2, 2)
    with pytest.raises(ValueError, match=r"attention by '.*' (knows no slopes|needs)"):
        varlen_attention(q, k, v, bounds([4]), 4, slopes=torch.ones(2), backend="varlen")
