"""Stochastic depth: what is left out of which tower, for whom, and when."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from cluster.engines import alone, build_engine
from cluster.memory import memory
from mllm.classify import Classifier, ViT
from mllm.encoders import Encoder, Eva02, ResNet, VisionArch
from mllm.encoders import ViT as Plain
from mllm.layers import TOY
from mllm.masked import BEiT, Codebook, MaskedImage
from mllm.objectives import Classification
from mllm.recipe import FSDP, Full, Recipe, Source, Stage, Steps
from mllm.recipes import by_name, shapes
from mllm.tiny import tiny
from mllm.towers import ViTTower
from pipelines.corpora import Labelled
from pipelines.tiling import Resize
from pipelines.types import Batch
from tests.mllm.test_pictures import pack_of
from tests.mllm.toys import PICTURE, TOWER, built, packed, toy

TOWERS: dict[str, VisionArch] = {
    "clip": TOWER,
    "siglip": shapes.SIGLIP_SO400M.tiny(),
    "dinov2": shapes.DINOV2_GIANT.tiny(),
    "intern_vit": shapes.INTERNVIT_6B.tiny(),
    "eva_clip": shapes.EVA_G.tiny(),
    "post_norm": shapes.EVA_E.tiny(),
    "vit": Plain(hidden_size=32, layers=2, heads=2, intermediate_size=48, patch=8, image=32),
    "eva02": Eva02(hidden_size=32, layers=2, heads=2, intermediate_size=48, patch=8, image=32, grid=4),
}


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_without_its_branches_is_its_embeddings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left out is all that a layer adds, of the pictures that are meant, in training alone."""
    arch: Any = TOWERS[name]
    torch.manual_seed(0)
    encoder = Encoder(arch=arch, layer=-1, drop_path=0.5).build(str).train()
    tiles = torch.randint(0, 256, (3, 3, arch.image, arch.image), dtype=torch.uint8)
    depth, tower = encoder.depth, encoder.tower
    assert isinstance(tower, ViTTower)
    assert depth is not None
    whole = encoder(tiles)
    encoder(tiles, seeds=torch.tensor([1, 2, 3]))
    assert depth.factors is not None
    assert depth.factors.shape == (3, 2 * arch.layers)
    depth.factors = torch.ones(3, 2 * arch.layers)
    depth.factors[1] = 0
    monkeypatch.setattr(depth, "draw", lambda _: None)  # what was drawn stays
    pixels = encoder._normalised(tiles)
    found = encoder(tiles, seeds=torch.tensor([1, 2, 3]))
    embedded = tower.embed(pixels)[:, tower.skip :]
    torch.testing.assert_close(found[1], embedded[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0::2], whole[0::2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder.eval()(tiles), whole, rtol=1e-5, atol=1e-5)


def test_a_picture_loses_the_same_branches_wherever_it_is() -> None:
    model = built(toy(encoder=Encoder(arch=replace(TOWER, layers=4), layer=-1, drop_path=0.6))).train()
    docs: Any = [[1, PICTURE, 2], [3, PICTURE, PICTURE, 4], [5, PICTURE]]
    batch = packed(toy(), docs)
    batch.seeds = torch.tensor([11, 12, 13])
    together = model.visual(batch)
    torch.testing.assert_close(model.visual(batch), together)
    alone_ = packed(toy(), docs[2:], tiles=batch.tiles[3:].numpy())
    alone_.seeds = batch.seeds[2:]
    torch.testing.assert_close(model.visual(alone_), together[-4:], rtol=1e-5, atol=1e-5)
    batch.seeds = torch.tensor([21, 22, 23])
    assert not torch.allclose(model.visual(batch), together)
    still = model.eval().visual(batch)
    assert not torch.allclose(still, together)
    model.train().encoder.requires_grad_(False)  # a frozen tower is read as it is
    torch.testing.assert_close(model.visual(batch), still)


def test_pictures_alone_lose_branches_by_row() -> None:
    tiny = replace(TOY, layers=4)
    beit = BEiT(encoder=tiny, codebook=Codebook(codes=64, channels=32), image=96, masked=14, drop_path=0.6)
    vit = Classifier(arch=ViT(shape=tiny, image=96, drop_path=0.6), classes=5)
    for spec in (MaskedImage(arch=beit), vit):
        torch.manual_seed(0)
        model = spec.build().train()
        if isinstance(spec, MaskedImage):  # layer scale begins so small that nobody would notice
            for layer in model.net.beit.layers:
                layer.lambda_1.data.fill_(1)
                layer.lambda_2.data.fill_(1)
        batch = Batch.of(pack_of(96, [1, 2, 3], [0, 1, 2]))
        together = model(batch)
        torch.testing.assert_close(model(Batch.of(pack_of(96, [3], [2])))[0], together[2], rtol=1e-4, atol=1e-5)
        still = model.eval()(batch)
        assert not torch.allclose(still, together, atol=1e-4)


def test_a_score_leaves_nothing_out_and_training_goes_on() -> None:
    model = Classifier(arch=ViT(shape=replace(TOY, layers=4), image=32, drop_path=0.6), classes=5)
    stage = Stage(
        name="only",
        mixture=(Source(corpus=Labelled(name="example-shapes")),),
        tune={"vision": Full(lr=1e-3), "head": Full(lr=1e-3)},
        context=64,
        tokens_per_step=64,
        duration=Steps(count=1),
        parallel=FSDP(dtype="float32", recompute="full"),
        objective=Classification(),
    )
    recipe = Recipe(name="r", model=model, tiling=Resize(size=32), stages=(stage,))
    batch = Batch.of(pack_of(32, [1, 2, 3], [0, 1, 2]))
    torch.manual_seed(0)
    with alone():
        engine = build_engine(recipe.model.build(), recipe.stages[0], 1, torch.device("cpu"))
        first = engine.score(batch).sum
        module: Any = engine
        assert module.module.training
        assert torch.equal(engine.score(batch).sum, first)
        assert not torch.allclose(module.module(batch).sum, first)
        # The gradient is that of the branches that were kept, though they are computed again.
        report = engine.train_step([pack_of(32, [1, 2, 3], [0, 1, 2])], 1.0)
        assert report.taken


def test_what_has_no_branches_is_refused() -> None:
    with pytest.raises(ValueError, match="resnet has no branches to leave out; set it to 0"):
        Encoder(arch=ResNet().tiny(), layer=-1, drop_path=0.1).build(str)


def test_a_model_names_its_one_tower() -> None:
    spec = toy()
    assert spec.tower is spec.encoder
    model = built(spec)
    assert model.tower is model.encoder
    several: Any = tiny(by_name("mini_gemini_7b")).model
    with pytest.raises(ValueError, match=r"has 2 encoders; ask `encoder\.towers`"):
        _ = several.tower
    with pytest.raises(ValueError, match=r"has 2 encoders; ask `encoder\.encoders`"):
        _ = several.build().tower


def test_plans_count_a_model_that_leaves_branches_out_as_one_that_does_not() -> None:
    recipe = tiny(by_name("internvl_12_40b"))
    assert recipe.vlm.tower.drop_path == 0.4
    whole = replace(recipe, model=replace(recipe.vlm, encoder=replace(recipe.vlm.tower, drop_path=0.0)))
    assert memory(recipe, recipe.stages[-1], (1,)) == memory(whole, whole.stages[-1], (1,))
