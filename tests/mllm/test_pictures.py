"""Models of pictures alone: what `transformers`' own classes compute, and masks that belong to rows."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEDecoder

from mllm.chance import block_masks, chosen, noise, seeds_of_tiles
from mllm.classify import Classifier, LeNet5, ResNet, ViT
from mllm.cnn import VGG, AlexNet
from mllm.dual import Layers
from mllm.masked import MAE, BEiT, Codebook, MaskedAutoencoder, MaskedImage, MaskedPredictor
from mllm.objectives import Classification, MaskedCodes, MaskedPixels
from ops.images import normalize
from pipelines.tiling import Pad, Resize
from pipelines.types import Batch, Cut, Image, Pack, Picture, RowId, Sample

TINY = Layers(hidden_size=32, layers=2, heads=2, intermediate_size=64)


def pack_of(side: int, rows: list[int], labels: list[int | None]) -> Pack:
    """A pack of one picture a row; a row's number is what its picture shows."""
    import numpy as np

    samples, tiles = [], []
    for row, label in zip(rows, labels, strict=True):
        cut = Cut(height=side, width=side, rows=1, cols=1, canvas=(side, side))
        samples.append(
            Sample(
                id=RowId(corpus="c", shard="s", epoch=0, row=row),
                source=0,
                input_ids=np.full(4, -200, np.int32),
                labels=np.full(4, -100, np.int32),
                lengths=(4,),
                pictures=(Picture(of=Image(data=b""), cut=cut),),
                visual=(4,),
                rows=(),
                label=label,
            )
        )
        tiles.append(np.random.default_rng(row).integers(0, 256, (3, side, side), np.uint8))
    return Pack.of_samples(samples, np.stack(tiles))


@pytest.mark.parametrize("arch", [ViT(shape=TINY, image=32), ResNet(norm="batch").tiny()], ids=["vit", "resnet"])
def test_a_classifier_is_transformers_own(arch: ViT | ResNet) -> None:
    torch.manual_seed(0)
    model = Classifier(arch=arch, classes=5).build().train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics that were loaded, and must stay
            module.running_mean = torch.randn(module.num_features)
            module.running_var = torch.rand(module.num_features) + 0.5
    batch = Batch.of(pack_of(arch.image, [1, 2, 3], [4, None, 0]))
    scores = model.scores(batch)
    theirs = model.net.eval()(normalize(batch.tiles, model.mean, model.std), labels=torch.tensor([4, 1, 0]))
    torch.testing.assert_close(scores.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    output = Classification()(model, batch)
    each = torch.nn.functional.cross_entropy(theirs.logits[[0, 2]], torch.tensor([4, 0]), reduction="sum")
    assert output.sum.item() == pytest.approx(each.item(), rel=1e-5)
    assert float(output.weight) == 2
    assert output.documents[:, 1].tolist() == [1, 0, 1]


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_pictures_scores_do_not_know_its_neighbours(norm: str) -> None:
    model = Classifier(arch=replace(ResNet().tiny(), norm=norm), classes=5).build().train()
    together = model.scores(Batch.of(pack_of(64, [1, 2, 3], [0, 1, 2]))).logits
    alone = model.scores(Batch.of(pack_of(64, [2], [1]))).logits
    torch.testing.assert_close(together[1], alone[0], rtol=1e-4, atol=1e-5)


def test_old_networks_have_the_grids_of_their_papers() -> None:
    assert Classifier(arch=LeNet5(), classes=10).build()(Batch.of(pack_of(32, [1], [0]))).shape == (1, 10)
    with torch.device("meta"):
        assert AlexNet(1000)(torch.zeros(2, 3, 227, 227)).shape == (2, 1000)
        assert VGG(1000, (2, 2, 3, 3, 3))(torch.zeros(2, 3, 224, 224)).shape == (2, 1000)


def test_a_class_that_has_no_score_is_told() -> None:
    model = Classifier(arch=LeNet5(), classes=3).build()
    with pytest.raises(ValueError, match=r"class 7 and the model scores of 3; raise model\.classes"):
        Classification()(model, Batch.of(pack_of(32, [1], [7])))


def mae() -> MaskedAutoencoder:
    torch.manual_seed(0)
    shape = replace(TINY, hidden_size=16)
    model = MaskedImage(arch=MAE(encoder=TINY, decoder=shape, patch=8, image=32)).build()
    assert isinstance(model, MaskedAutoencoder)
    return model


def test_mae_is_transformers_own() -> None:
    model = mae()
    batch = Batch.of(pack_of(32, [1, 2, 3], [None] * 3))
    output = MaskedPixels()(model, batch)
    pixels = normalize(batch.tiles, model.mean, model.std)
    theirs = model.net(pixels, noise=noise(seeds_of_tiles(batch), 16))
    assert (output.sum / output.weight).item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    assert float(output.weight) == 3 * 12
    hidden = model.hidden(batch)
    torch.testing.assert_close(hidden.predicted, theirs.logits, rtol=1e-5, atol=1e-5)
    assert hidden.masked.equal(theirs.mask.bool())


def test_mae_tells_patches_apart_by_where_they_are() -> None:
    """Its tables are those of transformers' decoder by itself; within the whole model transformers makes zeros of them."""
    net: Any = mae().net
    wide = deepcopy(net.config)
    wide.decoder_hidden_size = wide.hidden_size
    tables = net.vit.embeddings.position_embeddings, net.decoder.decoder_pos_embed
    for table, config in zip(tables, (wide, net.config), strict=True):
        assert len(table[0].unique(dim=0)) == 17
        torch.testing.assert_close(table, ViTMAEDecoder(config, 16).decoder_pos_embed)


def test_beit_is_transformers_own() -> None:
    torch.manual_seed(0)
    arch = BEiT(encoder=TINY, codebook=Codebook(codes=64, channels=32), image=96, masked=14)
    model = MaskedImage(arch=arch).build()
    assert isinstance(model, MaskedPredictor)
    batch = Batch.of(pack_of(96, [1, 2, 3], [None] * 3))
    output = MaskedCodes()(model, batch)
    hidden = model.hidden(batch)
    pixels = normalize(batch.tiles, model.mean, model.std)
    theirs = model.net(pixels, bool_masked_pos=hidden.masked, labels=hidden.target[hidden.masked])
    assert (output.sum / output.weight).item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    assert int(hidden.target.max()) < 64
    assert len(hidden.target.unique()) > 1
    output.sum.backward()
    assert all(p.grad is None for p in model.codebook.parameters())


def test_masks_belong_to_rows_and_not_to_packs() -> None:
    model = mae()
    together = model.hidden(Batch.of(pack_of(32, [1, 2, 3], [None] * 3)))
    alone = model.hidden(Batch.of(pack_of(32, [3], [None])))
    assert together.masked[2].equal(alone.masked[0])
    assert not together.masked[0].equal(together.masked[1])
    torch.testing.assert_close(together.predicted[2], alone.predicted[0], rtol=1e-5, atol=1e-5)
    pack = pack_of(32, [1, 2, 3], [None] * 3)
    later = replace(pack, ids=tuple(replace(row, epoch=1) for row in pack.ids))
    assert not model.hidden(Batch.of(later)).masked.equal(together.masked)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40), st.integers(6, 16), st.floats(0.1, 0.5))
def test_a_block_mask_has_as_many_patches_as_asked_for_or_a_few_less(seed: int, side: int, share: float) -> None:
    wanted = max(1, int(side * side * share))
    (mask,) = block_masks([seed], side, wanted, least=4)
    assert 0.5 * wanted <= int(mask.sum()) <= wanted
    assert mask.equal(block_masks([seed], side, wanted, least=4)[0])


def test_tokens_are_chosen_evenly_and_by_their_place_alone() -> None:
    seeds = torch.tensor([11, 2**32 - 1])
    owner, place = torch.arange(2).repeat_interleave(20_000), torch.arange(20_000).repeat(2)
    drawn = chosen(seeds, owner, place, 0)
    assert 0 <= float(drawn.min()) <= float(drawn.max()) < 1
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.01)
    assert float((drawn < 0.15).float().mean()) == pytest.approx(0.15, abs=0.01)
    assert float(torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]))[0, 1]) == pytest.approx(0, abs=0.03)
    assert chosen(seeds, owner[5:9], place[5:9], 0).equal(drawn[5:9])
    assert not chosen(seeds, owner, place, 1).equal(drawn)


def test_a_tiling_that_does_not_fit_is_refused() -> None:
    spec = Classifier(arch=LeNet5())
    assert spec.layout(Resize(size=32)).tokens_per_tile == 25
    with pytest.raises(ValueError, match="takes whole pictures of 32"):
        spec.layout(Pad(size=64))
