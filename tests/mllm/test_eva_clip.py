"""EVA-CLIP: EVA's towers in the place of CLIP's."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from mllm.dual import DualEncoder, DualTower, EvaCLIP, Layers
from mllm.encoders import Eva02, EvaClip

TINY = Eva02(hidden_size=32, layers=2, heads=2, intermediate_size=48, patch=8, image=32, grid=4)


@pytest.mark.parametrize("vision", [TINY, EvaClip(hidden_size=32, layers=2, heads=2, intermediate_size=48).tiny()])
def test_eva_clip_reads_its_tower_at_cls(vision: Eva02 | EvaClip) -> None:
    shape = Layers(hidden_size=32, layers=2, heads=2, intermediate_size=64)
    arch = EvaCLIP(vision=vision, text=shape, projection=16, begins="eva", vocab_size=100, context=8)
    spec = DualTower(arch=arch, tokenizer="t")
    assert spec.reads == ("eva",)
    assert spec.bare().reads == ()
    torch.manual_seed(0)
    model = spec.bare().build()
    assert isinstance(model, DualEncoder)
    tiles = torch.randint(0, 256, (3, 3, arch.image, arch.image), dtype=torch.uint8)
    embedded = model._pictures(tiles)
    pixels = (tiles / 255 - model.mean[:, None, None]) / model.std[:, None, None]
    cls = model.towers.vision_model(pixels)[:, 0]
    expected = nn.functional.normalize(model.towers.visual_projection(cls), dim=-1)
    torch.testing.assert_close(embedded, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"name EVA's weights in model\.arch\.begins"):
        replace(spec.bare(), weights="clip").build()
