"""Direct preference optimisation against its formula, written out pair by pair."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from mllm.objectives import DPO
from mllm.recipe import Recipe
from mllm.vlm import VisionLanguageModel
from pipelines.types import NOT_LEARNED, Batch, Pack, Sample
from pipelines.windows import PackWindows


@pytest.fixture(scope="module")
def model(small: Recipe) -> VisionLanguageModel:
    torch.manual_seed(0)
    return small.vlm.build()


def pairs_of(packs: PackWindows) -> list[Sample]:
    """Three questions with two answers each, and a document that is no answer; of texts, cut short."""
    samples, _ = packs.samples(packs.rows(0))
    texts = [s for s in samples if not s.tiles and len(s.input_ids) > 20][:4]
    made = []
    for number, (one, other) in enumerate(pairwise(texts)):
        sides = [(s.input_ids[:n], s.labels[:n]) for s, n in ((one, 12), (other, 9 + number))]
        joined = [np.concatenate(side) for side in zip(*sides, strict=True)]
        made.append(replace(one, input_ids=joined[0], labels=joined[1], lengths=(12, 9 + number), weight=1.0 + number))
    return [made[0], texts[3], *made[1:]]


def written_out(model: VisionLanguageModel, batch: Batch, beta: float, gamma: float) -> Tensor:
    assert batch.references is not None
    logits = model(batch) @ model.lm.head.T
    chosen = logits.log_softmax(-1).gather(1, batch.labels.clamp(min=0)[:, None]).squeeze(1)
    bounds = batch.cu_seqlens.tolist()
    total = torch.zeros(())
    for d, branch in enumerate(batch.branches.tolist()):
        if branch != 1:
            continue
        logs = []
        for s in (d, d + 1):
            span = slice(bounds[s], bounds[s + 1])
            logs.append(chosen[span][batch.labels[span] != NOT_LEARNED])
        ratio = (logs[0].sum() - batch.references[d]) - (logs[1].sum() - batch.references[d + 1])
        total = total + batch.weights[d] * (-torch.log(torch.sigmoid(beta * ratio)) - gamma * logs[0].mean())
    return total


@pytest.mark.parametrize(("beta", "gamma"), [(0.1, 0.0), (0.3, 0.5)])
def test_it_is_its_formula(model: VisionLanguageModel, packs: PackWindows, beta: float, gamma: float) -> None:
    samples = pairs_of(packs)
    pack = Pack.of_samples(samples, packs.pixels(samples))
    assert pack.branches.tolist() == [1, 2, 0, 1, 2, 1, 2]
    references = np.linspace(-60, -80, 7, dtype=np.float32)
    batch = Batch.of(replace(pack, references=references))
    model.zero_grad()
    expected = written_out(model, batch, beta, gamma)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    output = DPO(beta=beta, gamma=gamma)(model, batch)
    output.sum.backward()
    assert output.sum.item() == pytest.approx(expected.item(), rel=1e-4)
    assert float(output.weight) == 6.0
    assert output.documents[:, 1].tolist() == [1, 0, 0, 1, 0, 1, 0]
    for name, p in model.named_parameters():
        if name in wanted and wanted[name].any():
            assert p.grad is not None
            torch.testing.assert_close(p.grad, wanted[name], rtol=1e-3, atol=1e-6, msg=name)


def test_it_says_what_it_lacks(model: VisionLanguageModel, packs: PackWindows) -> None:
    samples = pairs_of(packs)
    with pytest.raises(ValueError, match="add reference_log_probs"):
        DPO()(model, Batch.of(Pack.of_samples(samples, packs.pixels(samples))))
