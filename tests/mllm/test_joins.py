"""Joins lay exactly the positions that the layout counts, as the papers' code lays them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm.connectors import MLP, CrossPool
from mllm.encoders import Encoder, SiglipVision
from mllm.joins import Joined, Scales, Slices, Tiles, Unpad, cuts_of, slice_grids
from mllm.lm import CausalLM, Llama
from mllm.vlm import VLM
from pipelines import tiling
from pipelines.types import Cut, Pack, Picture, RowId, Sample, Separators, VisionLayout

ANY_RES = tiling.AnyRes(size=336)
MINICPM = Separators(slice=2, group=2, row=1)
UHD = Separators(column=1, row=1)


def laid(spec: Any, layout: VisionLayout, cuts: list[Cut]) -> list[int]:
    """Places of all pictures, through the numbers that a pack carries."""
    rows = [(cut.tiles, layout.tokens(cut), *cut.numbers) for cut in cuts]
    again = cuts_of(rows, layout.shape)
    return Joined(spec, 8).places(again, layout.tokens_per_tile, 10**6).tolist()


@pytest.mark.parametrize(
    ("height", "width", "tokens"), [(672, 672, 2928), (480, 640, 2340), (300, 1000, 2182), (336, 336, 1176)]
)
def test_unpadded_pictures_have_the_tokens_of_llava_next(height: int, width: int, tokens: int) -> None:
    layout = VisionLayout(shape=(3, 336, 336), tokens_per_tile=576, join="unpad")
    cut = ANY_RES.cut(height, width)
    assert layout.tokens(cut) == len(laid(Unpad(), layout, [cut])) == tokens


@pytest.mark.parametrize(("height", "width"), [(672, 672), (480, 640), (300, 1000), (1000, 300), (333, 500)])
def test_unpadded_pictures_lie_as_transformers_packs_them(height: int, width: int) -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextModel

    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=336, patch_size=14
        ),
        text_config=LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8),
        image_grid_pinpoints=[[rows * 336, cols * 336] for rows, cols in ANY_RES.canvases],
    )
    with torch.device("meta"):
        theirs = LlavaNextModel(config)
    cut = ANY_RES.cut(height, width)
    joined = Joined(Unpad(), 8)
    assert joined.marks is not None
    features = torch.randn(cut.tiles, 576, 8)
    (expected,), _ = theirs.pack_image_features(
        [features], torch.tensor([[height, width]]), "default", image_newline=joined.marks[0]
    )
    torch.testing.assert_close(joined(features.flatten(0, 1), 576, [cut]), expected)


def samples(tokens_per_tile: int) -> list[tuple[Any, Any, VisionLayout]]:
    def layout(one: Any, join: Any) -> VisionLayout:
        return VisionLayout(shape=one.shape, tokens_per_tile=tokens_per_tile, join=one.join, separators=join.separators)

    pairs = [
        (tiling.DynamicTiles(size=32), Tiles(separators=Separators(picture=2))),
        (tiling.AnyRes(size=32), Unpad()),
        (tiling.MultiScale(size=32), Scales()),
        (tiling.Slices(size=32, patch=8), Slices(separators=MINICPM)),
        (tiling.Slices(size=32, patch=8, rounding="floor", max_tiles=6), Slices(separators=UHD)),
    ]
    return [(one, join, layout(one, join)) for one, join in pairs]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(8, 300), st.integers(8, 300)), min_size=1, max_size=3), st.integers(0, 4))
def test_positions_are_those_that_the_layout_counts(sizes: list[tuple[int, int]], number: int) -> None:
    one, join, layout = samples(16)[number]
    cuts = [one.cut(height, width) for height, width in sizes]
    places = laid(join, layout, cuts)
    assert len(places) == sum(layout.tokens(cut) for cut in cuts)
    features = [place for place in places if place < 10**6]
    assert len(set(features)) == len(features)  # no feature lies twice
    if one.join == "slices":
        assert features == list(range(len(features)))


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 500), st.integers(8, 500))
def test_grids_of_slices_have_the_pictures_patches(height: int, width: int) -> None:
    cut = tiling.Slices(size=32, patch=8).cut(height, width)
    again = cuts_of([(cut.tiles, 0, *cut.numbers)], (3 * 8 * 8,))
    assert again == [cut]
    grids = slice_grids(again)
    assert len(grids) == cut.rows * cut.cols + (cut.overview is not None)
    assert sum(rows * cols for rows, cols in grids) == cut.tiles


def test_minicpm_counts_at_the_largest_size() -> None:
    cut = tiling.Slices(size=448).cut(1344, 1344)
    layout = VisionLayout(shape=(588,), tokens_per_tile=64, join="slices", separators=MINICPM)
    assert layout.tokens(cut) == 640 + 10 * 2 + 2 + 2


ENCODER = Encoder(
    arch=SiglipVision(hidden_size=32, layers=2, heads=4, intermediate_size=64, patch=8, image=32), layer=-1
)
MODEL = VLM(
    encoder=ENCODER,
    connector=MLP(),
    lm=CausalLM(
        arch=Llama(vocab_size=64, hidden_size=32, layers=1, heads=2, kv_heads=2, intermediate_size=64), tokenizer="any"
    ),
)


@pytest.mark.parametrize("number", range(5))
def test_a_model_gives_what_its_layout_counts(number: int) -> None:
    """For pictures of any size, and for none; each picture alone in company; and every mark has its gradient."""
    torch.manual_seed(0)
    one, join, _ = samples(16)[number]
    connector = CrossPool(queries=4, head_size=8) if one.join == "slices" else MLP()
    spec = replace(MODEL, connector=connector, join=join)
    layout = spec.layout(one)
    model = spec.build()
    pictures = [
        torch.randint(0, 256, (3, height, width), dtype=torch.uint8) for height, width in ((50, 90), (20, 20), (99, 30))
    ]
    batches = [batch_of(one, layout, some) for some in (pictures, *([x] for x in pictures))]
    together, *alone = [model.visual(batch) for batch in batches]
    assert [len(x) for x in alone] == [layout.tokens(one.cut(*x.shape[1:])) for x in pictures]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    for some in (pictures, []):
        model.zero_grad()
        batch = batch_of(one, layout, some)
        model(batch).sum().backward()
        read = {id(p) for part in ("connector", "encoder") for p in model.parts()[part]}
        assert all(p.grad is not None for p in model.parameters() if id(p) in read)
    if model.join.marks is not None:
        assert any(p is model.join.marks for p in model.parts()["connector"])


def batch_of(one: Any, layout: VisionLayout, pictures: list[torch.Tensor]) -> Any:
    import numpy as np

    from pipelines.types import IMAGE_TOKEN, Batch, Image

    cuts = [one.cut(*x.shape[1:]) for x in pictures]
    tiles = (
        torch.cat([one.tile(x, cut) for x, cut in zip(pictures, cuts, strict=True)])
        if cuts
        else torch.zeros(0, *one.shape)
    )
    counts = [layout.tokens(cut) for cut in cuts]
    ids = np.array([IMAGE_TOKEN] * sum(counts) + [1, 2, 3], np.int32)
    sample = Sample(
        id=RowId(corpus="any", shard="0", epoch=0, row=0),
        source=0,
        input_ids=ids,
        labels=np.full(len(ids), 1, np.int32),
        lengths=(len(ids),),
        pictures=tuple(Picture(of=Image(data=b""), cut=cut) for cut in cuts),
        visual=tuple(counts),
        rows=(),
    )
    return Batch.of(Pack.of_samples([sample], tiles.to(torch.uint8).numpy()))


@pytest.mark.parametrize(
    ("change", "one", "words"),
    [
        ({}, tiling.AnyRes(size=32), "joined as 'unpad', and this model joins 'tiles'"),
        ({"join": Scales(scales=(1, 3))}, tiling.MultiScale(size=32), r"set model.join.scales"),
        ({"join": Slices()}, tiling.Slices(size=32, patch=8), "take cross_pool"),
        (
            {"join": Slices(), "connector": CrossPool()},
            tiling.Slices(size=32, patch=16),
            "patches of 16 pixels",
        ),
        ({}, tiling.Pad(size=64), "tiles of 64 pixels and the encoder takes 32"),
    ],
)
def test_a_tiling_that_the_model_cannot_join_is_refused(change: Any, one: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(MODEL, **change).layout(one)
