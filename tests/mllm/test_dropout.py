"""What is left out of hidden states: a share that rows alone decide, whoever trains them, and how often it is computed."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluster.recompute import named, recompute
from cluster.site import Site
from mllm.bert import CrossEncoder
from mllm.dropout import RowDropout, draws, kept
from mllm.objectives import MaskedTokens, Matching, Sum, Term
from mllm.recipe import Recipe, dump, load
from mllm.recipes import by_name
from mllm.streams import PairEncoder
from mllm.tiny import tiny
from pipelines.types import Batch, Pack, Sample
from pipelines.windows import PackWindows

NAMES = ("uniter_base", "vl_bert_base", "pixel_bert_r50", "lxmert", "vilt_b32")


def model_of(recipe: Recipe) -> CrossEncoder | PairEncoder:
    torch.manual_seed(0)
    model = recipe.model.build()
    assert isinstance(model, CrossEncoder | PairEncoder)
    return model.train()


def samples_of(site: Site, recipe: Recipe) -> tuple[PackWindows, list[Sample]]:
    windows = PackWindows(site.stream(recipe, recipe.stages[0]))
    samples, _ = windows.samples(windows.rows(0))
    return windows, [sample for sample in samples if sample.tiles][:4]


def batch_of(windows: PackWindows, samples: list[Sample]) -> Batch:
    return Batch.of(Pack.of_samples(samples, windows.pixels(samples)))


def hidden(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        fused = model.fuse(batch, model.pairs(batch))
    return fused.texts, fused.pictures, fused.pooled


@pytest.mark.parametrize("name", NAMES)
def test_a_rows_dropout_is_its_own_wherever_it_lies(site: Site, name: str) -> None:
    recipe = tiny(by_name(name))
    model = model_of(recipe)
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
    assert load(dump(recipe)) == recipe
    dry = model_of(without(recipe))
    dry.load_state_dict(model.state_dict())  # it has no weights of its own
    assert all(map(torch.equal, hidden(dry, together), still))


def without(recipe: Recipe) -> Recipe:
    model: Any = recipe.model
    return replace(recipe, model=replace(model, dropout=0.0))


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


@pytest.mark.parametrize("name", ["uniter_base", "lxmert", "vilt_b32"])
def test_what_is_computed_again_leaves_out_the_same(site: Site, name: str) -> None:
    """Two forward passes of other texts lie before one backward: each layer must find the chance of its own again."""
    recipe = tiny(by_name(name))
    windows, samples = samples_of(site, recipe)
    batch = batch_of(windows, samples)
    objective = Sum(terms=(Term(objective=MaskedTokens(share=0.4)), Term(objective=Matching())))
    gradients = []
    for again in (False, True):
        model = model_of(recipe)
        if again:
            for unit in model.units():
                recompute(model, unit, "full")
        objective(model, batch).sum.backward()
        gradients.append({name: p.grad for name, p in named(model).items()})
    once, twice = gradients
    assert once.keys() == twice.keys()
    for key, gradient in once.items():
        torch.testing.assert_close(gradient, twice[key], rtol=1e-5, atol=1e-6)


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
