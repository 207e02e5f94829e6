"""Direct preference optimisation against its formula, written out pair by pair."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from mllm.objectives import DPO, NextToken
from mllm.recipe import Recipe
from mllm.vlm import VisionLanguageModel
from pipelines.answers import changed_tokens
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
        joined[1][12:14] = joined[1][:2]  # what both begin with
        made.append(replace(one, input_ids=joined[0], labels=joined[1], lengths=(12, 9 + number), weight=1.0 + number))
    return [made[0], texts[3], *made[1:]]


def written_out(model: VisionLanguageModel, batch: Batch, dpo: DPO) -> Tensor:
    assert batch.references is not None
    logits = model(batch) @ model.lm.head.T
    chosen = logits.log_softmax(-1).gather(1, batch.labels.clamp(min=0)[:, None]).squeeze(1)
    bounds = batch.cu_seqlens.tolist()
    changed = changed_tokens(batch.labels.numpy(), bounds, batch.branches.tolist())
    total = torch.zeros(())
    for d, branch in enumerate(batch.branches.tolist()):
        if branch != 1:
            continue
        scores, logs = [], []
        for s in (d, d + 1):
            learned = [t for t in range(bounds[s], bounds[s + 1]) if batch.labels[t] != NOT_LEARNED]
            weights = torch.tensor([dpo.changed_weight if changed[t] else 1.0 for t in learned])
            logs.append(chosen[learned])
            reference = batch.references[s, 0] + (dpo.changed_weight - 1) * batch.references[s, 1]
            score = (weights * chosen[learned]).sum() - reference
            scores.append(score / weights.sum() if dpo.mean else score)
        losses = -torch.log(torch.sigmoid(dpo.beta * (scores[0] - scores[1]))) - dpo.gamma * logs[0].mean()
        total = total + batch.weights[d] * losses
    return total


def compared(packs: PackWindows) -> Batch:
    samples = pairs_of(packs)
    pack = Pack.of_samples(samples, packs.pixels(samples))
    assert pack.branches.tolist() == [1, 2, 0, 1, 2, 1, 2]
    sums = np.linspace(-60, -80, 7, dtype=np.float32)
    return Batch.of(replace(pack, references=np.stack([sums, 0.7 * sums], 1)))


@pytest.mark.parametrize(
    "dpo",
    [DPO(), DPO(beta=0.3, gamma=0.5), DPO(changed_weight=3.0), DPO(changed_weight=5.0, mean=True, gamma=0.1)],
    ids=["plain", "with the answer's loss", "changes", "changes, mean"],
)
def test_it_is_its_formula(model: VisionLanguageModel, packs: PackWindows, dpo: DPO) -> None:
    batch = compared(packs)
    model.zero_grad()
    expected = written_out(model, batch, dpo)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    output = dpo(model, batch)
    output.sum.backward()
    assert output.sum.item() == pytest.approx(expected.item(), rel=1e-4)
    assert float(output.weight) == 6.0
    assert output.documents[:, 1].tolist() == [1, 0, 0, 1, 0, 1, 0]
    for name, p in model.named_parameters():
        if name in wanted and wanted[name].any():
            assert p.grad is not None
            torch.testing.assert_close(p.grad, wanted[name], rtol=1e-3, atol=1e-6, msg=name)


def test_what_was_changed_counts_more(model: VisionLanguageModel, packs: PackWindows) -> None:
    batch = compared(packs)
    assert DPO(changed_weight=3.0)(model, batch).sum.item() != pytest.approx(DPO()(model, batch).sum.item(), rel=1e-3)


def test_it_says_what_it_lacks(model: VisionLanguageModel, packs: PackWindows) -> None:
    samples = pairs_of(packs)
    with pytest.raises(ValueError, match="add reference_log_probs"):
        DPO()(model, Batch.of(Pack.of_samples(samples, packs.pixels(samples))))


def test_documents_that_are_no_answers_are_scored_as_before_it(model: VisionLanguageModel, packs: PackWindows) -> None:
    """Held-out losses before and after a stage of preferences compare."""
    batch = Batch.of(next(iter(packs.packs(0))))
    one, other = DPO()(model, batch), NextToken()(model, batch)
    assert torch.equal(one.documents, other.documents)
    assert one.sum.item() == other.sum.item() > 0
