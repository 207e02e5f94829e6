"""Fusions: text alone is what the language model makes of it, pictures are seen where they should be, packed is alone."""

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mllm.archs import OPT
from mllm.flops import cost_of, work_of
from mllm.fusion import (
    CrossAttention,
    Fusion,
    InLMSampler,
    PreLMAdapter,
    PromptAdapter,
    RoutedExperts,
    SideAttention,
    Splice,
    UnifiedVocabulary,
)
from mllm.fusion.cross import around_of, sight_of
from mllm.fusion.experts import borders, gathered_positions
from mllm.objectives import NextToken, TwoVocabularies
from mllm.recipe import FSDP, Full, RecipeError, dump, load, override
from mllm.recipes import by_name
from mllm.tune import apply_tuning, describe
from ops.cross import Runs, cross_attention
from tests.mllm.toys import PICTURE, TILING, Doc, built, logits, pack_of, packed, picture_tiles, randomize, toy

PROMPTS = PromptAdapter(prompts=4, first=1)
FUSIONS: dict[str, Fusion] = {
    "splice": Splice(),
    "cross": CrossAttention(every=1, heads=2, head_size=16),
    "every second": CrossAttention(every=2, heads=2, head_size=16, everywhere=True),
    "marks around": CrossAttention(every=1, heads=2, head_size=16, around=True),
    "adapter": PreLMAdapter(hidden=16),
    "adapter of queries": PreLMAdapter(hidden=16, text="queries", queries=1),
    "experts": RoutedExperts(),
    "feed-forward experts": RoutedExperts(experts="feed_forward", last="image", one_position=False),
    "prompts": PROMPTS,
    "samplers": InLMSampler(count=2, every=1),
    "side": SideAttention(hidden=16, heads=2),
    "side of experts": SideAttention(hidden=16, heads=2, experts=RoutedExperts(last="image")),
}
BESIDE = ("samplers", "side", "side of experts")
"""Those that look at two towers."""

ALL = FUSIONS | {"two vocabularies": UnifiedVocabulary(rows=40)}

TEXT: Doc = [5, 6, 7, 8, 9]
SHOWN: Doc = [3, PICTURE, 10, 11, 12]
TWO: Doc = [4, PICTURE, 20, 21, PICTURE, 22, 23, 24]
DOCS = [TEXT, SHOWN, TWO, [2, *TEXT]]


def fused(name: str, open_: bool = True) -> Any:
    """The model with everything that the fusion adds drawn anew, if gates are to be open."""
    model = built(toy(ALL[name]))
    if open_:
        randomize(model.parts().get("fusion", []))
    return model


@pytest.mark.parametrize("name", ALL)
def test_a_document_in_a_pack_is_as_alone(name: str) -> None:
    model, vlm = fused(name), toy(ALL[name])
    together = logits(model, packed(vlm, DOCS))
    tiles, at = picture_tiles(3), 0
    seen = 0
    for doc in DOCS:
        mine = sum(item is PICTURE for item in doc)
        alone = logits(model, packed(vlm, [doc], tiles[seen : seen + mine]))
        torch.testing.assert_close(together[at : at + len(alone)], alone, rtol=1e-4, atol=1e-4)
        at, seen = at + len(alone), seen + mine
    assert at == len(together)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("docs", [DOCS, [TEXT], []], ids=["mixed", "text", "empty"])
def test_gradients_are_where_the_stage_says_whatever_a_pack_holds(name: str, docs: list[Doc]) -> None:
    model = fused(name)
    objective = TwoVocabularies() if name == "two vocabularies" else NextToken()
    tuned = ["connector", *(["fusion"] if name != "splice" else [])]
    apply_tuning(model, dict.fromkeys(tuned, Full(lr=1.0)))
    objective(model, packed(toy(ALL[name]), docs)).sum.backward()
    wanted = {id(p) for part in tuned for p in model.parts()[part]}
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in wanted), parameter_name
    moved = sum(float(p.grad.abs().sum()) for p in model.connector.parameters() if p.grad is not None)
    assert (moved > 0) == (docs is DOCS)


@pytest.mark.parametrize("name", FUSIONS)
def test_with_pictures_everything_that_is_tuned_moves(name: str) -> None:
    model = fused(name)
    apply_tuning(model, dict.fromkeys(("connector", *(["fusion"] if name != "splice" else [])), Full(lr=1.0)))
    NextToken()(model, packed(toy(FUSIONS[name]), DOCS)).sum.backward()
    still = [n for n, p in model.named_parameters() if p.grad is not None and not float(p.grad.abs().sum())]
    # keys of attention to one thing alone would not move; a last layer's queries of pictures are read by nobody
    assert not [n for n in still if "layers.2.expert" not in n], still


@pytest.mark.parametrize("name", ["cross", "adapter", "adapter of queries", "experts", "feed-forward experts"])
def test_text_alone_is_for_ever_what_the_language_model_makes_of_it(name: str) -> None:
    vlm = toy(FUSIONS[name])
    bare = logits(built(toy()), packed(toy(), [TEXT]))
    assert torch.equal(logits(fused(name), packed(vlm, [TEXT])), bare)
    beside = logits(fused(name), packed(vlm, DOCS))[: len(TEXT)]
    torch.testing.assert_close(beside, bare, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cross", "every second", "prompts"])
def test_closed_gates_leave_the_language_model_as_it_is(name: str) -> None:
    """Q36 of the claims: with gates at zero the logits are bit for bit those of the language model on the same embeddings."""
    model, vlm = fused(name, open_=False), toy(FUSIONS[name])
    batch = packed(vlm, DOCS)
    text = model.lm.embed(batch.input_ids)
    with_marks = torch.where(batch.visual.unsqueeze(1), model.fusion.mark, text)
    with torch.no_grad():
        plain = model.lm(with_marks, batch) @ model.lm.head.T
    assert torch.equal(logits(model, batch), plain)
    randomize(model.parts()["fusion.gates"])
    assert (logits(model, batch) - plain).abs().max() > 1e-3


def test_marks_stand_around_images_and_neighbours_share_one() -> None:
    vlm = toy(FUSIONS["marks around"])
    batch = packed(vlm, [[5, PICTURE, PICTURE, 6], [7], [PICTURE, 8, PICTURE]])
    assert batch.cuts[:, 1].tolist() == [3, 2, 3, 3]
    first, second, third = (x.tolist() for x in around_of(batch).split([7, 1, 7]))
    assert first == [False, True, False, True, False, True, False]
    assert second == [False]
    assert third == [True, False, True, False, True, False, True]
    sight = sight_of(batch, 16, around=True)
    assert sight.runs == Runs((2, 3, 4, 2), (4,) * 4)  # each from its own mark on, up to the next one's
    assert sight.rows.tolist() == [2, 3, 4, 5, 6, 9, 10, 11, 12, 13, 14]
    model = fused("marks around")
    before = logits(model, batch)
    with torch.no_grad():
        model.fusion.around.add_(1.0)
    changed = (logits(model, batch) - before).abs().amax(1) > 1e-4
    assert changed.tolist() == [False, *[True] * 6, False, *[True] * 7]
    with pytest.raises(ValueError, match="the pipeline was planned with another model"):
        sight_of(packed(toy(FUSIONS["cross"]), [SHOWN]), 4, around=True)


def test_text_before_the_first_image_sees_none() -> None:
    model, vlm = fused("cross"), toy(FUSIONS["cross"])
    doc: Doc = [5, 6, 7, PICTURE, 8]
    shown = logits(model, packed(vlm, [doc]))
    bare = logits(built(toy()), packed(toy(), [[5, 6, 7]]))
    torch.testing.assert_close(shown[:3], bare, rtol=1e-5, atol=1e-5)
    assert (logits(model, packed(vlm, [doc], picture_tiles(2)[1:]))[4] - shown[4]).abs().max() > 1e-3


def test_text_sees_the_latest_image_alone() -> None:
    """In one layer: what a token is told of earlier images must have gone through the text between."""
    vlm = toy(FUSIONS["cross"])
    model: Any = built(vlm)
    randomize(model.parts()["fusion"])
    block = model.fusion.blocks["0"]
    hidden = torch.randn(8, 64)
    seen = torch.randn(2 * 4, 32)
    batch = packed(vlm, [TWO])

    def out(visual: Tensor) -> Tensor:
        with torch.no_grad():
            return block(hidden, visual, sight_of(batch, len(visual)), None)

    base = out(seen)
    first, second = seen.clone(), seen.clone()
    first[:4] += 1
    second[4:] += 1
    moved = [((out(other) - base).abs().amax(1) > 1e-6).tolist() for other in (first, second)]
    assert moved == [[False, True, True, True, False, False, False, False], [False] * 4 + [True] * 4]


def test_cross_attention_is_masked_attention() -> None:
    torch.manual_seed(0)
    runs = Runs((3, 1, 4), (5, 2, 6))
    q, k, v = torch.randn(8, 4, 16), torch.randn(13, 2, 16), torch.randn(13, 2, 16)
    owner_q = torch.arange(3).repeat_interleave(torch.tensor(runs.queries))
    owner_k = torch.arange(3).repeat_interleave(torch.tensor(runs.keys))
    scores = torch.einsum("ihe,jhe->hij", q, k.repeat_interleave(2, 1)) / 4
    mask = owner_q[:, None] != owner_k[None]
    plain = torch.einsum("hij,jhe->ihe", scores.masked_fill(mask, -torch.inf).softmax(-1), v.repeat_interleave(2, 1))
    torch.testing.assert_close(cross_attention(q, k, v, runs), plain, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="7 queries and 7 keys, and there are 8 and 13 rows"):
        cross_attention(q, k, v, Runs((3, 4), (5, 2)))
    with pytest.raises(ValueError, match="none may be empty"):
        Runs((3, 4), (5, 0))


def test_a_pack_of_another_layout_is_refused() -> None:
    model = fused("cross")
    with pytest.raises(ValueError, match="3 images have 3 tiles at 12 positions"):
        model(packed(toy(), DOCS))


def test_cromes_adapter_begins_as_the_identity_and_has_five_d_m_parameters() -> None:
    """Q12 of the claims: 5 x 4096 x 256 = 5,242,880 with the language model's width of Vicuna-7B."""
    model = fused("adapter", open_=False)
    assert torch.equal(logits(model, packed(toy(), DOCS)), logits(built(toy()), packed(toy(), DOCS)))
    recipe = by_name("vila_7b")
    assert sum(p.numel() for p in PreLMAdapter(hidden=256).build(recipe.vlm.lm, 4096).parameters()) == 5_242_880


def test_cromes_text_branch_is_given_what_is_said() -> None:
    for name, changes in (("adapter", "text"), ("adapter of queries", "visual")):
        model, vlm = fused(name), toy(FUSIONS[name])
        batch = packed(vlm, [SHOWN])
        given: list[Tensor] = []
        model.fusion.text.register_forward_hook(lambda _, inputs, __, given=given: given.append(inputs[0]))
        model(batch)
        assert given[0].shape == ((8, 64) if changes == "text" else (1, 1, 64))
    with pytest.raises(ValueError, match="first 4 visual tokens of a tile are queries, and the connector makes 4"):
        toy(PreLMAdapter(text="queries", queries=4)).layout(TILING)


@pytest.mark.parametrize("name", ["experts", "feed-forward experts"])
def test_experts_that_are_the_language_models_weights_change_nothing(name: str) -> None:
    """They begin as copies: but for rounding, the model begins as Splice, at the same rotary positions."""
    fusion = FUSIONS[name]
    assert isinstance(fusion, RoutedExperts)
    model: Any = built(toy(RoutedExperts(experts=fusion.experts, last=fusion.last, one_position=False)))
    expected = logits(built(toy()), packed(toy(), DOCS))
    torch.testing.assert_close(logits(model, packed(toy(), DOCS)), expected, rtol=1e-4, atol=1e-4)
    layer = model.lm.layers[0]
    counts = {"all": sum(p.numel() for p in layer.self_attn.parameters()), "feed_forward": 0}
    mlp = sum(p.numel() for p in layer.mlp.parameters())
    parts = model.parts()
    assert sum(p.numel() for p in parts["fusion.experts"]) == 3 * (counts[fusion.experts] + mlp)
    assert not {id(p) for p in parts["lm"]} & {id(p) for p in parts["fusion"]}
    reports = {r.part: r.trained + r.frozen for r in describe(model, {})}
    assert sum(reports.values()) == sum(p.numel() for p in model.parameters())


def test_image_positions_go_through_experts_and_the_last_through_the_language_model() -> None:
    batch = packed(toy(), [[1, PICTURE, 2], [PICTURE, PICTURE, 3], [PICTURE], [PICTURE]])
    first, last = borders(batch)
    assert first.nonzero().flatten().tolist() == [1, 6, 15, 19]
    assert last.nonzero().flatten().tolist() == [4, 13, 18, 22]
    inside = batch.visual & ~first & ~last
    # CogVLM's own rule: an image's first and last position have places of their own, all between them share one
    assert gathered_positions(inside, batch).tolist() == [
        *(0, 1, 2, 2, 3, 4),
        *(0, 1, 1, 1, 1, 1, 1, 2, 3),
        *(0, 1, 1, 2),
        *(0, 1, 1, 2),
    ]


def test_layers_of_another_form_have_no_experts() -> None:
    arch = OPT(vocab_size=128, hidden_size=64, layers=2, heads=4, intermediate_size=96, context=64)
    with pytest.raises(ValueError, match="'opt' has others; take a llama"):
        toy(RoutedExperts(), arch).meta()


def test_prompts_see_the_pictures_of_their_document_alone() -> None:
    model, vlm = fused("prompts"), toy(PROMPTS)
    tiles = picture_tiles(3)
    base = logits(model, packed(vlm, DOCS, tiles))
    tiles[2] = 255 - tiles[2]
    moved = (logits(model, packed(vlm, DOCS, tiles)) - base).abs().amax(1) > 1e-6
    starts = [0, 5, 10, 18, 24]
    assert [bool(moved[a:b].any()) for a, b in pairwise(starts)] == [False, False, True, False]
    with pytest.raises(ValueError, match="10 prompts take as many visual tokens of a tile, or one, and the connector"):
        toy(PromptAdapter()).layout(TILING)


@pytest.mark.parametrize("name", [name for name in ALL if name not in BESIDE])
def test_recipes_say_it_and_refuse_what_cannot_be(name: str) -> None:
    smoke = by_name("vila_smoke")
    fusion = ALL[name]
    if isinstance(fusion, PromptAdapter):
        fusion = PromptAdapter(prompts=36)
    recipe = replace(smoke, model=replace(smoke.model, fusion=fusion))
    assert load(dump(recipe)) == recipe
    change = "stages.sft.parallel=" + json.dumps({"kind": "fsdp", "context": 2})
    if fusion.shares:
        assert override(recipe, [change]).stage("sft").parallel == FSDP(context=2)
    else:
        with pytest.raises(RecipeError, match=r"fusion '\w+' a rank must see all of it; take context=1"):
            override(recipe, [change])


@pytest.mark.parametrize("name", FUSIONS)
def test_its_operations_are_those_that_torch_counts(name: str) -> None:
    fusion = FUSIONS[name]
    if isinstance(fusion, RoutedExperts):
        fusion = replace(fusion, last="image")  # the last position of a picture is reckoned to it
    vlm = toy(fusion)
    told, real = vlm.meta(), built(vlm)
    for model in (told, real):
        apply_tuning(model, dict.fromkeys(("connector", *(["fusion"] if name != "splice" else [])), Full(lr=1.0)))
    cost = cost_of(told, NextToken(), vlm.layout(TILING)).model
    docs = [SHOWN, TWO, [*TWO, *TEXT]]
    batch = packed(vlm, docs)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        NextToken()(real, batch).sum.backward()
    work = work_of(pack_of(vlm, docs))
    every = replace(work, pairs=int((batch.cu_seqlens.diff() ** 2).sum()))
    near = 0.01 if name == "marks around" else 1e-9  # the mark before a picture, which sees another, is counted to it
    assert cost.of(every) == pytest.approx(counter.get_total_flops(), rel=near)
    assert (cost.per_shown > 0) == isinstance(fusion, CrossAttention | SideAttention)
    assert (cost.per_document > 0) == isinstance(fusion, PromptAdapter)


CODES: list[Doc] = [[5, 128, 140, 167, 6], [7, 8, 9], [130, 131, PICTURE, 20]]
"""Ids from 128 on, the language model's vocabulary, are codes."""


def test_codes_have_a_table_and_a_head_of_their_own_and_count_half() -> None:
    vlm = toy(UnifiedVocabulary(rows=40))
    model: Any = built(vlm)
    batch = packed(vlm, CODES)
    out = TwoVocabularies()(model, batch)
    with torch.no_grad():
        hidden = model(batch)
    coded, told = batch.labels >= 128, (batch.labels >= 0) & (batch.labels < 128)
    assert (int(coded.sum()), int(told.sum())) == (4, 4)
    by_codes = F.cross_entropy(hidden[coded] @ model.fusion.head.weight.T, batch.labels[coded] - 128)
    by_words = F.cross_entropy(hidden[told] @ model.lm.head.T, batch.labels[told])
    assert (out.sum / out.weight).item() == pytest.approx(0.5 * (by_codes + by_words).item(), rel=1e-5)
    assert out.documents[:, 1].tolist() == [4, 2, 2]
    out.sum.backward()
    rows = model.fusion.embedding.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert rows == [0, 2, 3, 12, 39]
    for docs in ([TEXT], []):  # without a code every weight has its gradient all the same
        model.zero_grad()
        TwoVocabularies()(model, packed(vlm, docs)).sum.backward()
        assert all(p.grad is not None for p in model.parts()["fusion"])
    # In two packs it is the same loss of the same step, though one of them has most of the codes.
    objective, packs = TwoVocabularies(), [packed(vlm, CODES[:1]), packed(vlm, CODES[1:])]
    with torch.no_grad():
        told = objective.whole([objective.collect(model, pack) for pack in packs], None)
        parts = [objective.again(model, pack, each) for pack, each in zip(packs, told, strict=True)]
    assert sum(float(part.sum) for part in parts) == pytest.approx(out.sum.item(), rel=1e-5)
    with pytest.raises(ValueError, match="take unified_vocabulary as its fusion"):
        TwoVocabularies()(built(toy()), packed(toy(), [TEXT]))
