"""Toy models and packs: what a test says in a line, without tokenizers or files."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mllm.connectors import MLP, SVA
from mllm.encoders import ClipVision, Encoder, Encoders, Eva02
from mllm.fusion import Fusion, InLMSampler, SideAttention, Splice
from mllm.lm import CausalLM, Llama, TextArch
from mllm.vlm import VLM, VisionLanguageModel
from pipelines.chat import ChatML
from pipelines.tiling import Resize
from pipelines.types import IMAGE_TOKEN, NOT_LEARNED, Batch, Pack, Position

TILING = Resize(size=32)
CUT = TILING.cut(32, 32)
LLAMA = Llama(
    vocab_size=128, hidden_size=64, layers=3, heads=4, kv_heads=2, intermediate_size=96, context=512, init_std=0.2
)
TOWER = ClipVision(hidden_size=32, layers=2, heads=2, intermediate_size=48, patch=16, image=32)

TWO_TOWERS = Encoders(
    towers=(
        Encoder(arch=TOWER, layer=-1),
        Encoder(
            arch=Eva02(hidden_size=24, layers=2, heads=2, intermediate_size=40, patch=8, image=32, grid=2), layer=-1
        ),
    ),
    sizes=(32, 32),
)
AGGREGATOR = SVA(windows=(1, 2), side=2, hidden_size=16, layers=1, heads=2)

PICTURE = None
"""Stands for a picture in a document; everything else is a token's id."""

Item = int | None
Doc = list[Item]


def toy(fusion: Fusion | None = None, arch: TextArch = LLAMA, **parts: Any) -> VLM:
    """A model of four patches a tile; of two towers where the fusion looks beside the visual tokens."""
    beside = isinstance(fusion, InLMSampler | SideAttention)
    words = {
        "encoder": TWO_TOWERS if beside else Encoder(arch=TOWER, layer=-1),
        "connector": AGGREGATOR if isinstance(fusion, InLMSampler) else MLP(depth=1),
        **parts,
    }
    return VLM(lm=CausalLM(arch=arch, tokenizer="none", chat=ChatML()), fusion=fusion or Splice(), **words)


def built(vlm: VLM, seed: int = 0) -> VisionLanguageModel:
    torch.manual_seed(seed)
    return vlm.build()


def randomize(parameters: list[torch.nn.Parameter], std: float = 0.3, seed: int = 1) -> None:
    """Draw parameters anew, so that gates are open and nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def packed(vlm: VLM, docs: list[Doc], tiles: np.ndarray | None = None, learn_from: int = 0) -> Batch:
    """Documents as a batch, see `pack_of`."""
    return Batch.of(pack_of(vlm, docs, tiles, learn_from))


def pack_of(vlm: VLM, docs: list[Doc], tiles: np.ndarray | None = None, learn_from: int = 0) -> Pack:
    """Documents as a pack; tiles are drawn by their number, so that the k-th picture of a test is always the same.

    Tokens from the `learn_from`-th of each document on are learned.
    """
    layout = vlm.layout(TILING)
    ids, labels, lengths, counts = [], [], [], []
    for doc in docs:
        flat: list[Any] = []
        for place, item in enumerate(doc):
            if item is PICTURE:
                shared = layout.around and place > 0 and doc[place - 1] is PICTURE  # a mark with the picture before
                counts.append(layout.tokens(CUT) - shared)
            flat += [IMAGE_TOKEN] * counts[-1] if item is PICTURE else [item]
        target = [NOT_LEARNED if x == IMAGE_TOKEN or n < learn_from else x for n, x in enumerate(flat)]
        ids += flat
        labels += [*target[1:], NOT_LEARNED]
        lengths.append(len(flat))
    count = len(lengths)
    return Pack(
        at=Position(),
        of=1,
        input_ids=np.array(ids, np.int32),
        labels=np.array(labels, np.int32),
        positions=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths] or [np.zeros(0, np.int32)]),
        cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
        sources=np.zeros(count, np.int16),
        branches=np.zeros(count, np.int8),
        classes=np.full(count, -1, np.int32),
        weights=np.ones(count, np.float32),
        ids=(),
        tiles=picture_tiles(len(counts), layout.shape) if tiles is None else tiles,
        cuts=np.array([[1, count, *CUT.numbers] for count in counts], np.int32).reshape(-1, 2 + len(CUT.numbers)),
        rows=(),
    )


def picture_tiles(count: int, shape: tuple[int, ...] = (3, 32, 32)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)


@torch.no_grad()
def logits(model: VisionLanguageModel, batch: Batch) -> Tensor:
    return model(batch) @ model.lm.head.T
