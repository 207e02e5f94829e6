"""What can learn can learn four samples by heart: every model with every objective that a recipe ends with, on real rows.

All weights are trained that can be, whatever the recipe's last stage trains. Masks, torn pairs and hard negatives are functions
of the rows, so that a sample asks the same in every step; a twin and its queue stay as they are, since each sample would soon be
its own negative.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.site import load_site
from mllm.annotators import ReferenceLogProbs
from mllm.export import export
from mllm.fusion import UnifiedVocabulary
from mllm.model import Model
from mllm.objectives import TwoVocabularies
from mllm.recipe import Recipe, Stage
from pipelines.types import Batch, Pack
from pipelines.windows import PackWindows
from tests.conftest import ROOT
from tests.mllm.toys import PICTURE, built, packed, toy
from tests.structures import learners, small

SITE = load_site(str(ROOT / "examples" / "site.toml"))

SHARE, STEPS = 0.3, 40
"""What may be left of the first step's loss after so many steps."""

MORE = {
    # steps of those that need more, and why
    "openflamingo_3b": 60,  # pictures come in through gates that begin shut
    "coca_base": 60,  # a contrast and captions, each by tokens of their own
    "blip_base": 100,  # hard negatives are drawn by what the model finds alike, so they change, and the loss leaps
    "blip2_stage1": 150,  # likewise; and contrast and captions have smooth labels, a seventh of the first loss at the least
    "mae_b16": 150,  # not words, but 192 numbers of each of 48 patches
    "beit_b16": 150,  # codes of patches that no input tells: all by heart
}


def left(model: Any, objective: Any, batch: Batch, steps: int, lr: float = 3e-3) -> float:
    """The share of its first loss that is left, at the least, within some steps with all of a model's weights."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        output = objective(model, batch)
        loss = output.sum / output.weight
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return min(losses) / losses[0]


def four_of(recipe: Recipe, stage: Stage, model: Model, folder: Path) -> Batch:
    """Four samples of the stage's data, with pictures where it has any; a reference, if it asks for one, is `model` as it is."""
    if any(isinstance(one, ReferenceLogProbs) for one in stage.annotators):
        reference = export(recipe, model, str(ROOT / "examples" / "tokenizer"), folder / "export")
        stage = replace(stage, annotators=(ReferenceLogProbs(checkpoint=str(reference)),))
    windows = PackWindows(SITE.stream(recipe, stage))
    samples, _ = windows.samples(windows.rows(0))
    four = ([sample for sample in samples if sample.tiles] or samples)[:4]
    assert len(four) == 4
    return Batch.of(windows.annotated(Pack.of_samples(four, windows.pixels(four))))


@pytest.mark.parametrize("name", learners())
def test_four_samples_are_learned_by_heart(name: str, tmp_path: Path) -> None:
    recipe = small(name)
    stage = recipe.stages[-1]
    torch.manual_seed(0)
    model = recipe.model_of(stage).build()
    batch = four_of(recipe, stage, model, tmp_path)
    assert left(model, stage.objective, batch, MORE.get(name, STEPS)) < SHARE


def test_codes_and_words_are_learned_by_heart() -> None:
    vlm = toy(UnifiedVocabulary(rows=40))
    docs = [[3, PICTURE, 10 + n, 130 + n, 150, 131 + n, 11, 12] for n in range(4)]
    assert left(built(vlm), TwoVocabularies(), packed(vlm, docs, learn_from=5), 20) < 0.2
