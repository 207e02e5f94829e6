"""What is trained: a recipe of one stage, its model with random weights, and a full pack."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import torch

from benchmarks.gpu.device import DEVICE, DTYPE
from benchmarks.gpu.inputs import lengths
from benchmarks.gpu.sizes import Sizes
from cluster.fullest import fullest
from mllm.connectors import MLP
from mllm.encoders import Encoder
from mllm.lm import CausalLM
from mllm.recipe import FSDP, Dtype, Full, Recipe, Recompute, Source, Stage, Steps, Tuning
from mllm.vlm import VLM, VisionLanguageModel
from pipelines.corpora import TextOnly
from pipelines.tiling import Pad
from pipelines.types import IMAGE_TOKEN, NOT_LEARNED, Pack


def recipe_of(
    sizes: Sizes, decoder: str, tuning: str, tokens: int, how: Recompute = "none", dtype: Dtype = DTYPE
) -> Recipe:
    """One stage, one pack a step, half of its tokens visual."""
    tower = sizes.tower
    tune: dict[str, Tuning] = {part: Full(lr=1e-5) for part in sizes.tunings[tuning]}
    stage = Stage(
        name="stage",
        mixture=(Source(corpus=TextOnly(name="random")),),
        tune=tune,
        context=tokens,
        tokens_per_step=tokens,
        max_tiles=max(1, tokens // 2 // tower.tokens(tower.image)),
        duration=Steps(count=1),
        parallel=FSDP(dtype=dtype, recompute=how),
    )
    return Recipe(
        name="gpu",
        model=VLM(
            encoder=Encoder(arch=tower, layer=-2),
            connector=MLP(depth=2),
            lm=CausalLM(arch=sizes.decoders[decoder], tokenizer="none"),
        ),
        tiling=Pad(size=tower.image),
        stages=(stage,),
    )


def model_of(recipe: Recipe) -> VisionLanguageModel:
    torch.manual_seed(0)
    with DEVICE:
        return recipe.vlm.build()


def pack_of(recipe: Recipe) -> Pack:
    """A full pack: documents of mixed lengths, pictures in the first ones, all text learned."""
    stage, rng = recipe.stages[0], random.Random(0)
    side, tiles, tokens = recipe.vlm.layout(recipe.tiling).tokens_per_tile, stage.max_tiles, stage.context
    texts = lengths(tokens - tiles * side, rng)
    pictures = [tiles // len(texts) + (i < tiles % len(texts)) for i in range(len(texts))]
    words = np.random.default_rng(0).integers(0, recipe.vlm.lm.arch.vocab_size, tokens, np.int32)
    each = [n * side + text for n, text in zip(pictures, texts, strict=True)]
    visual = np.concatenate([np.arange(n * side + text) < n * side for n, text in zip(pictures, texts, strict=True)])
    count = len(each)
    full = fullest(recipe, stage)
    return replace(
        full,
        input_ids=np.where(visual, np.int32(IMAGE_TOKEN), words),
        labels=np.where(visual, np.int32(NOT_LEARNED), words),
        positions=np.concatenate([np.arange(n, dtype=np.int32) for n in each]),
        cu_seqlens=np.cumsum([0, *each], dtype=np.int32),
        sources=np.zeros(count, np.int16),
        branches=np.zeros(count, np.int8),
        classes=np.full(count, -1, np.int32),
        weights=np.ones(count, np.float32),
        tiles=np.random.default_rng(1).integers(0, 256, full.tiles.shape, np.uint8),
    )
