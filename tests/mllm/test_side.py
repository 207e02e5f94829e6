"""Fusions that look beside the visual tokens: Cambrian-1's samplers at its towers' cells, CogAgent's layers at a second tower."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mllm.connectors import MLP, SVA
from mllm.encoders import Encoder
from mllm.fusion import InLMSampler, RoutedExperts, SideAttention
from mllm.fusion.cross import sight_of
from mllm.fusion.splice import Spliced
from mllm.joins import Tiles
from mllm.mining import CellAttention
from mllm.recipe import dump, load, override
from mllm.recipes import by_name
from pipelines.types import Separators
from tests.mllm.toys import (
    AGGREGATOR,
    PICTURE,
    TILING,
    TOWER,
    TWO_TOWERS,
    Doc,
    built,
    logits,
    packed,
    picture_tiles,
    randomize,
    toy,
)

SIDES = {
    "side": SideAttention(hidden=16, heads=2),
    "side of experts": SideAttention(hidden=16, heads=2, experts=RoutedExperts()),
}
SAMPLERS = InLMSampler(count=2, every=1)
TEXT: Doc = [5, 6, 7, 8, 9]
SHOWN: Doc = [3, PICTURE, 10, 11, 12]
TWO: Doc = [4, PICTURE, 20, 21, PICTURE, 22, 23, 24]


@torch.no_grad()
def spliced(model: Any, batch: Any) -> Tensor:
    """Logits of the same language model where nothing looks beside: what it makes of the visual tokens in their places."""
    text = model.lm.embed(batch.input_ids)
    return Spliced()(model.lm, text, model.visual(batch), batch) @ model.lm.head.T


def test_side_attention_begins_as_if_it_were_not_there() -> None:
    """Its matrix back is zero: bit for bit the language model with the tokens spliced in, until that matrix moves."""
    vlm = toy(SIDES["side"])
    model = built(vlm)
    batch = packed(vlm, [TEXT, SHOWN, TWO])
    assert torch.equal(logits(model, batch), spliced(model, batch))
    randomize(model.parts()["fusion.side"])
    assert (logits(model, batch) - spliced(model, batch)).abs().max() > 1e-3


@pytest.mark.parametrize("name", [*SIDES, "samplers"])
def test_text_alone_is_for_ever_what_the_language_model_makes_of_it(name: str) -> None:
    vlm = toy(SIDES.get(name, SAMPLERS))
    model = built(vlm)
    randomize(model.parts()["fusion"])
    alone = packed(vlm, [TEXT])
    if name == "side of experts":  # the order of rows is another, and so is rounding
        torch.testing.assert_close(logits(model, alone), spliced(model, alone), rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(logits(model, alone), spliced(model, alone))
    beside = logits(model, packed(vlm, [TEXT, SHOWN]))[: len(TEXT)]
    torch.testing.assert_close(beside, spliced(model, alone), rtol=1e-4, atol=1e-4)


def test_each_position_looks_at_the_latest_picture_of_its_document() -> None:
    vlm = toy(SIDES["side"])
    batch = packed(vlm, [TEXT, SHOWN, TWO])
    each = vlm.layout(TILING).tokens_per_tile
    sight = sight_of(batch, 3 * 16, marks=False)
    first, second = len(TEXT) + 1, len(TEXT) + len(SHOWN) - 1 + each + 1
    assert not sight.seeing[:first].any()
    assert sight.runs is not None
    assert sight.runs.keys == (16, 16, 16)
    assert sight.runs.queries == (each + 3, each + 2, each + 3)
    assert sight.rows[0] == first
    assert sight.rows[each + 3] == second
    model = built(vlm)
    randomize(model.parts()["fusion.side"])
    seen: list[Tensor] = []
    layer: Any = model.lm.layers[0]
    layer.side.register_forward_hook(lambda _, __, out: seen.append(out[0].detach()))
    base, other = picture_tiles(3), picture_tiles(3)
    other[2] = 255 - other[2]
    for tiles in (base, other):
        logits(model, packed(vlm, [TEXT, SHOWN, TWO], tiles))
    moved = (seen[0] - seen[1]).abs().amax(1) > 1e-6
    assert not moved[: len(batch.visual) - each - 3].any()
    assert moved[len(batch.visual) - each - 3 :].all()


def test_samplers_move_queries_alone_and_each_by_its_own_cell() -> None:
    """Newlines and text pass by; a query finds nothing outside its window of each tower."""
    torch.manual_seed(0)
    sampler = CellAttention(8, replace(AGGREGATOR, hidden_size=16))
    queries, means = torch.randn(2, 4, 8), torch.randn(2, 16)
    cells = [torch.randn(2, 4, 1, 16), torch.randn(2, 4, 4, 16)]
    base = sampler(queries, means, cells)
    other = [x.clone() for x in cells]
    other[1][1, 2, 3] = torch.randn(16)
    moved = (sampler(queries, means, other) - base).abs().amax(2) > 1e-6
    assert moved.nonzero().tolist() == [[1, 2]]

    vlm = toy(SAMPLERS)
    model = built(vlm)
    inside: list[Tensor] = []
    second: Any = model.lm.layers[1]
    first: Any = model.lm.layers[0]
    first.register_forward_hook(lambda _, __, out: inside.append(out[0].detach()))
    second.register_forward_pre_hook(lambda _, given: inside.append(given[0][0].detach()))
    batch = packed(vlm, [TEXT, SHOWN])
    logits(model, batch)
    moved = ((inside[0] - inside[1]).abs().amax(1) > 1e-6).nonzero().flatten().tolist()
    start = len(TEXT) + 1
    assert moved == [start, start + 1, start + 3, start + 4]  # of two rows of two queries and a newline


def test_samplers_follow_the_layers_that_the_paper_names() -> None:
    for name, layers, last in (("cambrian_1_8b", 32, 27), ("cambrian_1_13b", 40, 36), ("cambrian_1_34b", 60, 56)):
        fusion = by_name(name).vlm.fusion
        assert isinstance(fusion, InLMSampler)
        places = fusion.places(layers)
        assert (len(places), places[0], places[-1]) == (fusion.count, 0, last)
    assert InLMSampler(count=3, every=1).places(2) == (0,)  # after the last layer there is none


@pytest.mark.parametrize(
    ("fusion", "parts", "words"),
    [
        (SIDES["side"], {"encoder": Encoder(arch=TOWER, layer=-1)}, "at another, and the encoder has 1; give it two"),
        (SIDES["side"], {"connector": AGGREGATOR}, "connector 'sva' takes several towers"),
        (SAMPLERS, {"connector": MLP()}, "the cells of the connector 'sva', and it is 'mlp'"),
        (SAMPLERS, {"join": Tiles(separators=Separators(picture=2))}, "take the join 'tiles' without separators"),
    ],
)
def test_what_cannot_look_beside_is_refused(fusion: Any, parts: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        toy(fusion, **parts)


def test_recipes_say_it() -> None:
    for name in ("cambrian_1_8b", "cogagent_18b"):
        recipe = by_name(name)
        assert load(dump(recipe)) == recipe
        change = 'stages.sft.parallel={"kind": "fsdp", "context": 2}'
        with pytest.raises(ValueError, match="a rank must see all of it; take context=1"):
            override(recipe, [change])
    assert override(by_name("cogagent_18b"), ["stages.aside.tune.fusion.side.lr=1e-5"]).stages[0].tune == {
        "fusion.side": replace(by_name("cogagent_18b").stages[0].tune["fusion.side"], lr=1e-5)  # type: ignore[call-arg]  # a Full
    }


def test_the_aggregator_shows_its_cells_only_where_they_are_looked_at() -> None:
    features = (torch.randn(2, 4, 32), torch.randn(2, 16, 24))
    module: Any = SVA(windows=(1, 2), side=2, hidden_size=16, layers=1, heads=2).build((32, 24), 8)
    tokens = module(features)
    module.shows_cells = True
    again, means, *cells = module(features)
    assert torch.equal(again, tokens)
    assert means.shape == (2, 16)
    assert [tuple(x.shape) for x in cells] == [(2, 4, 1, 16), (2, 4, 4, 16)]
    assert all(x._base is None for x in (again, *cells))  # FSDP2 hangs its hooks on what is no view
    assert TWO_TOWERS.tokens(32) == (4, 16)
