"""What is left out of hidden states and of attention: rows alone decide, whoever trains them and however often."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluster.recompute import named, recompute
from cluster.site import Site
from mllm.aligned import Aligner
from mllm.bert import CrossEncoder
from mllm.dropout import RowDropout, WeightDropout, draws, draws_of_rows, kept, kept_weights
from mllm.objectives import MaskedTokens, Matching, Sum, Term
from mllm.recipe import Recipe, dump, load
from mllm.recipes import by_name
from mllm.streams import PairEncoder
from mllm.tiny import tiny
from pipelines.types import Batch, Pack, Sample
from pipelines.windows import PackWindows

NAMES = ("uniter_base", "vl_bert_base", "pixel_bert_r50", "lxmert", "vilt_b32")
ALIGNED = ("albef", "blip_base", "blip2_stage1")


def model_of(recipe: Recipe) -> CrossEncoder | PairEncoder | Aligner:
    torch.manual_seed(0)
    model = recipe.model.build()
    assert isinstance(model, CrossEncoder | PairEncoder | Aligner)
    return model.train()


def samples_of(site: Site, recipe: Recipe) -> tuple[PackWindows, list[Sample]]:
    windows = PackWindows(site.stream(recipe, recipe.stages[0]))
    samples, _ = windows.samples(windows.rows(0))
    return windows, [sample for sample in samples if sample.tiles][:4]


def batch_of(windows: PackWindows, samples: list[Sample]) -> Batch:
    return Batch.of(Pack.of_samples(samples, windows.pixels(samples)))


@torch.no_grad()
def hidden(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    fused = model.fuse(batch, model.pairs(batch))
    return fused.texts, fused.pictures, fused.pooled


@torch.no_grad()
def passes(model: Any, batch: Batch) -> list[Tensor]:
    """What each pass over a batch's pairs gives, a row of each for a pair: of pictures, of texts, of both."""
    known, own = model.given(batch), model.embedded(batch)
    found = [own.images, own.texts, model.matched(batch, torch.arange(len(known.documents)), known.rows)]
    if model.mask:  # it knows masked words
        at = torch.zeros_like(known.rows.there)
        at[:, 1] = True
        return [*found, model.masked(batch, known.rows, at)]
    return [*found, model.caption(batch)[:, :4]]  # texts have as many tokens at the least


def said(model: Any, batch: Batch) -> list[Tensor]:
    return passes(model, batch) if isinstance(model, Aligner) else list(hidden(model, batch))


@pytest.mark.parametrize("name", NAMES)
def test_a_rows_dropout_is_its_own_wherever_it_lies(site: Site, name: str) -> None:
    recipe = tiny(by_name(name))
    model: Any = model_of(recipe)
    windows, samples = samples_of(site, recipe)
    together = batch_of(windows, samples)
    texts, pictures, pooled = hidden(model, together)
    assert all(map(torch.equal, hidden(model, together), (texts, pictures, pooled)))  # asked twice, the same
    lengths = model.pairs(together).texts.cu_seqlens.diff().tolist()
    runs = pictures.split([len(pictures) // 4] * 4)  # of as many regions or cells
    for place, sample in enumerate(samples):
        own = hidden(model, batch_of(windows, [sample]))
        for found, expected in zip(
            (texts.split(lengths)[place], runs[place], pooled[place : place + 1]), own, strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    model.eval()
    still = hidden(model, together)
    assert (still[0] - texts).abs().max() > 1e-2
    spec: Any = recipe.model
    assert spec.dropout == 0.1
    assert name == "vilt_b32" or spec.attention_dropout == 0.1
    assert load(dump(recipe)) == recipe
    dry = model_of(without(recipe))
    dry.load_state_dict(model.state_dict())  # it has no weights of its own
    assert all(map(torch.equal, hidden(dry, together), still))


def without(recipe: Recipe) -> Recipe:
    model: Any = recipe.model
    none = {"dropout": 0.0} | ({"attention_dropout": 0.0} if hasattr(model, "attention_dropout") else {})
    return replace(recipe, model=replace(model, **none))


@pytest.mark.parametrize("name", ALIGNED)
def test_so_is_that_of_models_that_align_in_each_of_their_passes(site: Site, name: str) -> None:
    recipe = tiny(by_name(name))
    model = model_of(recipe)
    windows, samples = samples_of(site, recipe)
    together = passes(model, batch_of(windows, samples))
    for place, sample in enumerate(samples):
        own = passes(model, batch_of(windows, [sample]))
        for found, expected in zip(together, own, strict=True):
            torch.testing.assert_close(found[place], expected[0], rtol=1e-4, atol=1e-4)
    model.eval()
    still = passes(model, batch_of(windows, samples))
    seen = name != "blip2_stage1"  # pictures are asked by what leaves something out, elsewhere not
    for number, (found, expected) in enumerate(zip(together, still, strict=True)):
        assert ((found - expected).abs().max() > 1e-4) == (number > 0 or not seen)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_as_much_is_left_out_as_is_asked_for_and_made_up_for(rate: float) -> None:
    owner = torch.arange(8).repeat_interleave(64)
    chance = draws(torch.arange(8) * 7919, owner, torch.arange(512) % 64)
    module = RowDropout(rate, 3)
    x = torch.ones(1, 512, 96)
    assert torch.equal(module(x), x)  # told of no chance
    module.told(chance)
    out = module(x)[0]
    assert (out == 0).float().mean().item() == pytest.approx(rate, abs=0.005)
    assert out.mean().item() == pytest.approx(1, abs=0.01)
    for axis in (0, 1):  # no position and no channel is spared, nor hit above all
        share = (out == 0).float().mean(axis)
        assert (share - rate).abs().max() < 0.25
    neighbours = (out[1:] == 0) & (out[:-1] == 0)
    assert neighbours.float().mean().item() == pytest.approx(rate**2, abs=0.005)
    other = kept(chance, 96, 4, rate)
    both = ~other & (out == 0)
    assert both.float().mean().item() == pytest.approx(rate**2, abs=0.005)  # another layer draws by itself
    odd = kept(chance, 95, 3, rate)
    assert torch.equal(odd, (out != 0)[:, :95])
    module.eval()
    assert torch.equal(module(x), x)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_of_attentions_weights_as_many_are_left_out_each_by_itself(rate: float) -> None:
    drawn = draws_of_rows(torch.arange(8) * 7919, 48, 0)
    mask = kept_weights(drawn, 5, 64, 3, rate)
    assert mask.shape == (8, 5, 48, 64)
    gone = ~mask
    assert gone.float().mean().item() == pytest.approx(rate, abs=0.01)
    for axis in range(4):  # no row, head, query or key is spared, nor hit above all
        share = gone.float().mean([n for n in range(4) if n != axis])
        assert (share - rate).abs().max() < 0.05
        both = gone.narrow(axis, 1, gone.shape[axis] - 1) & gone.narrow(axis, 0, gone.shape[axis] - 1)
        assert both.float().mean().item() == pytest.approx(rate**2, abs=0.01)
    other = ~kept_weights(drawn, 5, 64, 4, rate)
    assert (gone & other).float().mean().item() == pytest.approx(rate**2, abs=0.01)
    assert torch.equal(kept_weights(drawn[2:3, :7], 4, 9, 3, rate), mask[2:3, :4, :7, :9])  # however much is beside it
    assert (draws_of_rows(torch.arange(8) * 7919, 48, 1) != drawn).all()


@pytest.mark.parametrize("name", [*NAMES[:4], *ALIGNED])
def test_every_attention_leaves_some_of_its_weights_out(site: Site, name: str) -> None:
    recipe = tiny(by_name(name))
    model = model_of(recipe)
    windows, samples = samples_of(site, recipe)
    batch = batch_of(windows, samples)
    states = [module for module in model.modules() if isinstance(module, RowDropout)]
    weights = [
        m for n, m in model.named_modules() if isinstance(m, WeightDropout) and not n.startswith("slow.")
    ]  # the twin leaves out nothing
    assert len({module.number for module in weights}) == len(weights) > 0
    for module in (*states, *weights):
        module.rate = 0.0
    still = said(model, batch)
    for module in weights:
        module.rate = 0.5
        assert max((a - b).abs().max() for a, b in zip(said(model, batch), still, strict=True)) > 1e-6
        module.rate = 0.0


def assert_same_gradients_when_computed_again(recipe: Recipe, objective: Any, batch: Batch) -> None:
    """Of the same model, with and without activations that are computed again in the backward pass."""
    gradients = []
    for again in (False, True):
        model = model_of(recipe)
        if again:
            for unit in model.units():
                recompute(model, unit, "full")
        objective(model, batch).sum.backward()
        gradients.append({name: p.grad for name, p in named(model).items()})
    once, twice = gradients
    assert any(gradient is not None for gradient in once.values())
    assert {name for name, gradient in once.items() if gradient is None} == {n for n, g in twice.items() if g is None}
    for name, gradient in once.items():
        if gradient is not None:
            torch.testing.assert_close(gradient, twice[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALIGNED)
def test_aligned_models_compute_again_what_they_left_out(site: Site, name: str) -> None:
    recipe = tiny(by_name(name))
    windows, samples = samples_of(site, recipe)
    batch = batch_of(windows, samples)
    objective: Any = recipe.stages[0].objective
    assert_same_gradients_when_computed_again(recipe, objective, batch)


@pytest.mark.parametrize("name", ["uniter_base", "lxmert", "vilt_b32"])
def test_what_is_computed_again_leaves_out_the_same(site: Site, name: str) -> None:
    """Two forward passes of other texts lie before one backward: each layer must find the chance of its own again."""
    recipe = tiny(by_name(name))
    windows, samples = samples_of(site, recipe)
    batch = batch_of(windows, samples)
    objective = Sum(terms=(Term(objective=MaskedTokens(share=0.4)), Term(objective=Matching())))
    assert_same_gradients_when_computed_again(recipe, objective, batch)


@pytest.mark.parametrize("name", NAMES)
def test_every_branch_of_every_layer_leaves_something_out(site: Site, name: str) -> None:
    recipe = tiny(by_name(name))
    model = model_of(recipe)
    found = [module for module in model.modules() if isinstance(module, RowDropout)]
    assert len({module.number for module in found}) == len(found) == 1 + (16 if name == "lxmert" else 4)
    assert not [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    windows, samples = samples_of(site, recipe)
    seen: dict[nn.Module, list[float]] = {}
    for module in found:
        module.register_forward_hook(
            lambda module, _, out: seen.setdefault(module, []).append((out == 0).float().mean().item())
        )
    hidden(model, batch_of(windows, samples))
    twice = 1 + (name == "lxmert")  # both streams begin, and attention across is read by both
    assert sorted(map(len, seen.values())) == [1] * (len(found) - 1 - 2 * (twice - 1)) + [twice] * (1 + 2 * (twice - 1))
    assert all(share == pytest.approx(0.1, abs=0.04) for shares in seen.values() for share in shares)
