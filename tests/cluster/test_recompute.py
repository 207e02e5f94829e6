"""Every structure computes the same whether activations are kept or computed again, as nearly all full-size stages have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.recompute import named, recompute
from mllm.recipe import Recompute
from tests.mllm.test_overfit import four_of
from tests.structures import learners, small


@pytest.mark.parametrize("name", learners())
def test_what_is_computed_again_is_the_same(name: str, tmp_path: Path) -> None:
    recipe = small(name)
    stage = recipe.stages[-1]
    objective: Any = stage.objective

    def learned(how: Recompute) -> tuple[float, dict[str, torch.Tensor]]:
        """The loss of four samples, and each weight's gradient."""
        torch.manual_seed(0)
        model = recipe.model_of(stage).build()
        batch = four_of(recipe, stage, model, tmp_path / how)
        model.train()
        if how != "none":
            for unit in model.units():
                recompute(model, unit, how)
        output = objective(model, batch)
        output.sum.backward()
        return output.sum.item(), {key: weight.grad for key, weight in named(model).items() if weight.grad is not None}

    kept, gradients = learned("none")
    again, same = learned("full")
    assert again == pytest.approx(kept, rel=1e-6)
    assert same.keys() == gradients.keys()
    assert gradients
    for key, gradient in gradients.items():
        torch.testing.assert_close(same[key], gradient, rtol=1e-4, atol=1e-6)
