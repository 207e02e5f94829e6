"""What can learn can learn four samples by heart: every kind of model and every fusion, on real rows."""

from typing import Any

import pytest
import torch

from cluster.site import load_site
from mllm.fusion import UnifiedVocabulary
from mllm.objectives import TwoVocabularies
from mllm.recipes import by_name
from mllm.tiny import tiny
from pipelines.types import Batch, Pack
from pipelines.windows import PackWindows
from tests.conftest import ROOT
from tests.mllm.toys import PICTURE, built, packed, toy

SITE = load_site(str(ROOT / "examples" / "site.toml"))

SYSTEMS = {
    # name: what is left of the first step's loss after so many steps
    "llava_7b": (0.3, 30),
    "openflamingo_9b": (0.4, 40),
    "llama_adapter_7b": (0.3, 30),
    "cogvlm_17b": (0.3, 30),
    "crome_7b": (0.3, 30),
    "crome_flan_t5_xxl": (0.1, 20),
    "mini_gemini_7b": (0.3, 30),
    "clip_b32": (0.2, 20),
    "siglip_b16": (0.2, 20),
    "vit_b16": (0.3, 30),
    "resnet50": (0.4, 30),
    "mae_b16": (0.9, 30),  # its toy decoder is 16 wide, and a patch has 768 numbers
    "beit_b16": (0.75, 24),
    "vilt_b32": (0.5, 30),
}


def left(model: Any, objective: Any, batch: Batch, steps: int, lr: float = 3e-3) -> float:
    """The share of its first loss that a model has after some steps with all of its weights."""
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
    return losses[-1] / losses[0]


@pytest.mark.parametrize("name", SYSTEMS)
def test_four_samples_are_learned_by_heart(name: str) -> None:
    recipe = tiny(by_name(name))
    stage = recipe.stages[-1]
    windows = PackWindows(SITE.stream(recipe, stage))
    samples, _ = windows.samples(windows.rows(0))
    four = [sample for sample in samples if sample.tiles][:4]
    assert len(four) == 4
    torch.manual_seed(0)
    share, steps = SYSTEMS[name]
    found = left(recipe.model.build(), stage.objective, Batch.of(Pack.of_samples(four, windows.pixels(four))), steps)
    assert found < share


def test_codes_and_words_are_learned_by_heart() -> None:
    vlm = toy(UnifiedVocabulary(rows=40))
    docs = [[3, PICTURE, 10 + n, 130 + n, 150, 131 + n, 11, 12] for n in range(4)]
    assert left(built(vlm), TwoVocabularies(), packed(vlm, docs, learn_from=5), 20) < 0.2
