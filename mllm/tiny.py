"""Any recipe at a size that trains two steps a stage on a laptop, in seconds: the same structure, everything small.

Towers, connectors and language models have a `tiny()` of their own; tilings keep their kind, stages what they train, and corpora
are the example ones of the same kind. What such a run proves is that a recipe's parts fit together, nothing more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mllm.annotators import ReferenceLogProbs
from mllm.crossmodal import CrossModal
from mllm.encoders import Encoder, Encoders
from mllm.instructed import Instructions
from mllm.lm import CausalLM, Llama
from mllm.objectives import DPO
from mllm.recipe import FSDP, Frozen, Full, LoRA, Recipe, Source, Stage, Steps, Tuning
from mllm.vlm import VLM
from pipelines.chat import ChatML
from pipelines.corpora import (
    CaptionList,
    Conversations,
    Corpus,
    Interleaved,
    Labelled,
    Obelics,
    Pairs,
    Preferences,
    Questions,
    Regions,
    TextOnly,
    Videos,
)
from pipelines.objects import Objects
from pipelines.tiling import AnyRes, AnyTiling, DynamicTiles, Slices
from pipelines.types import VisionLayout

VOCABULARY = 2048
"""Of the example tokenizer."""

TEXT = 192
"""Positions of a pack that are left for text beside one picture of the largest size."""


def tiny(recipe: Recipe) -> Recipe:
    """`recipe` at a size for tests: no weights are read, `example-bpe` is its tokenizer, the example corpora its data."""
    if not isinstance(recipe.model, VLM):
        return _of_another_kind(recipe)
    model = recipe.model
    encoder = model.encoder.tiny()
    fusion: Any = model.fusion
    fusion = fusion.tiny() if hasattr(fusion, "tiny") else fusion
    small = replace(
        model, encoder=encoder, connector=model.connector.tiny(), lm=_lm(model.lm), fusion=fusion, weights=None
    )
    tiling = _tiling(recipe.tiling, model.encoder, encoder)
    return replace(
        recipe,
        model=small,
        tiling=tiling,
        stages=tuple(_of_vlm(recipe, stage, small, tiling) for stage in recipe.stages),
        held_out=_held_out(recipe),
        shots=(0,),
    )


def _of_vlm(recipe: Recipe, stage: Stage, small: VLM, tiling: AnyTiling) -> Stage:
    """A stage whose pictures are cut as small as the model is; those of a tiling of its own in the same proportion."""
    own = recipe.tiling_of(stage)
    if own != recipe.tiling:
        tiling = _tiling(own, recipe.vlm.encoder, small.encoder)
    made = _stage(stage, small.layout(tiling), tiling)
    return made if stage.tiling is None else replace(made, tiling=tiling)


def _of_another_kind(recipe: Recipe) -> Recipe:
    """Of models that take whole pictures of one size, or the regions of a picture."""
    model = recipe.model.tiny()
    regions = isinstance(model, CrossModal)
    tiling = model.arch.tiling(recipe.tiling) if regions else replace(recipe.tiling, size=model.side)
    layout = model.layout(tiling)
    if isinstance(tiling, Objects):
        tiling = replace(tiling, least=4, most=9)
    cut = tiling.cut(tiling.size, tiling.size)
    context = 6 * (layout.tokens(cut) + 24)
    stages = (
        replace(_shorter(stage), context=context, tokens_per_step=2 * context, max_tiles=6 * cut.tiles, annotators=())
        for stage in recipe.stages
    )
    if isinstance(tiling, Objects):
        stages = (replace(stage, mixture=_with_regions(stage.mixture), annotators=()) for stage in stages)
    return replace(recipe, model=model, tiling=tiling, stages=tuple(stages), held_out=_held_out(recipe), shots=())


def _lm(lm: CausalLM) -> CausalLM:
    arch: Any = lm.arch
    small = _llama(arch) if isinstance(arch, Llama) else arch.tiny()
    small = replace(small, vocab_size=VOCABULARY, context=4096)
    return replace(
        lm, arch=small, weights=None, tokenizer="example-bpe", chat=ChatML(), bos="<|endoftext|>", eos="<|im_end|>"
    )


def _llama(arch: Llama) -> Llama:
    shared = arch.kv_heads < arch.heads
    return replace(arch, hidden_size=64, layers=2, heads=4, kv_heads=2 if shared else 4, intermediate_size=128)


def _tiling(tiling: AnyTiling, before: Encoder | Encoders, now: Encoder | Encoders) -> AnyTiling:
    """The same kind of cutting for the small towers; where tiles were larger than a tower, they are as much larger again."""
    if isinstance(now, Encoders) or isinstance(before, Encoders):
        size = max(now.sizes) if isinstance(now, Encoders) else 64
    else:
        side, small = getattr(before.arch, "image", None), getattr(now.arch, "image", None)
        patch = getattr(now.arch, "patch", 32)
        size = 64 if side is None or small is None else round(tiling.size / side * small / patch) * patch
        size = small if small is not None and not now.interpolate and tiling.kind != "slices" else size
    match tiling:
        case AnyRes():
            return replace(
                tiling, size=size, canvases=tuple(c for c in tiling.canvases if max(c) < 3) or ((1, 2), (2, 1))
            )
        case DynamicTiles():
            return replace(tiling, size=size, max_tiles=min(tiling.max_tiles, 4))
        case Slices():
            return replace(
                tiling, size=size, patch=getattr(now.towers[0].arch, "patch", 8), max_tiles=min(tiling.max_tiles, 4)
            )
    return replace(tiling, size=size)


def _stage(stage: Stage, layout: VisionLayout, tiling: AnyTiling) -> Stage:
    largest = tiling.cut(16 * tiling.size, 16 * tiling.size)
    answers = 2 if isinstance(stage.objective, DPO) else 1  # each of which has the picture before it
    context = -(-(answers * layout.tokens(largest) + TEXT) // 64) * 64
    return replace(
        _shorter(stage),
        tune={_key(key): _tuning(how) for key, how in stage.tune.items()},
        context=context,
        tokens_per_step=2 * context,
        max_tiles=max(2 * largest.tiles, 6),
        annotators=tuple(
            one.tiny() if isinstance(one, Instructions) else ReferenceLogProbs()
            for one in stage.annotators
            if isinstance(one, Instructions | ReferenceLogProbs)
        ),
    )


def _shorter(stage: Stage) -> Stage:
    """Two steps over the example corpora, in small windows, in float32, beginning at once."""
    return replace(
        stage,
        mixture=_mixture(stage.mixture),
        context=stage.tokens_per_step,  # any that fits until it is known
        duration=Steps(count=2),
        parallel=FSDP(dtype="float32", recompute="none"),
        entry=None,
        window=24,
        chunk=8,
        save_every=2,
        save_minutes=None,
        evaluate_every=None,
        attention=None,
    )


def _key(key: str) -> str:
    """A pattern over layers, with the numbers that the small stack has."""
    return re.sub(r"(\blayers?\.)(\d+)", lambda found: f"{found[1]}{min(int(found[2]), 1)}", key)


def _tuning(how: Tuning) -> Tuning:
    match how:
        case Full():
            return replace(how, first_row=min(how.first_row, VOCABULARY - 8))
        case LoRA():
            return replace(how, rank=min(how.rank, 4), alpha=min(how.alpha, 8))
        case Frozen():
            return how


def example_of(corpus: Corpus, suffix: str = "") -> Corpus:
    """The example corpus of the same kind, `-heldout` with that suffix; `corpus` itself where there is none."""
    match corpus:
        case Pairs() | CaptionList():
            return Pairs(name=f"example-pairs{suffix}")
        case Questions():
            return Questions(name="example-questions")
        case Interleaved() | Obelics():
            return Interleaved(name=f"example-pages{suffix}")
        case Conversations() | Videos() | Regions():
            return Conversations(name=f"example-instructions{suffix}")
        case TextOnly():
            return TextOnly(name=f"example-text{suffix}")
        case Labelled():
            return Labelled(name=f"example-shapes{suffix}")
        case Preferences() if not suffix:
            return Preferences(name="example-preferences")
    return corpus


def _mixture(sources: Sequence[Source]) -> tuple[Source, ...]:
    """One source for each example corpus that stands for some, with the weights of all those."""
    found: dict[str, Source] = {}
    for source in sources:
        corpus = example_of(source.corpus)
        before = found.get(corpus.name)
        weight = None if source.weight is None else source.weight + ((before and before.weight) or 0.0)
        found[corpus.name] = replace(source, corpus=corpus, weight=weight, cap=None, repeat=1.0)
    return tuple(found.values())


def _with_regions(sources: Sequence[Source]) -> tuple[Source, ...]:
    """The same, pairs being those that have regions beside them."""
    pairs = Pairs(name="example-regions")
    return tuple(replace(s, corpus=pairs) if isinstance(s.corpus, Pairs) else s for s in sources)


def _held_out(recipe: Recipe) -> tuple[Corpus, ...]:
    corpora = [example_of(corpus, "-heldout") for corpus in recipe.held_out]
    return tuple({corpus.name: corpus for corpus in corpora}.values())
