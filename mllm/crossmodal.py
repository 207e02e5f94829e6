"""Encoders of a text with the regions of its picture: one stream (UNITER, VL-BERT), one over a grid (Pixel-BERT), two (LXMERT).

    row of `tiles` -> regions -> vectors \\
                                           one transformer over both, or one each and layers across -> words, regions, the pair
    tokens                    -> vectors /

The transformers are `transformers`' own, over packs. What is learned from them are the objectives of pairs (`objectives.fused`)
and those of regions (`objectives.regions`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field
from torch import nn

from mllm.convnets import ResNet, ResNeXt
from mllm.dropout import Dropout
from mllm.dual import Layers
from mllm.encoders import Folder
from mllm.model import Model, ModelSpec, Words, check_tiles
from mllm.text import DOCUMENTS, register_documents
from mllm.weights import load
from pipelines.objects import Objects, RegionRow
from pipelines.tiling import Tiling
from pipelines.types import VisionLayout, spec

SMALL = Layers(hidden_size=32, layers=2, heads=2, intermediate_size=64)
SMALL_ROW = RegionRow(features=16, classes=8, attributes=0)
"""Of the example corpora's regions."""


def _bert(shape: Layers, vocab_size: int, positions: int, pooled: bool, weights: str | None) -> Any:
    """BERT (arXiv:1810.04805) with its head of masked words, `pooled` with its second task's too; no dropout of its own."""
    from transformers import BertConfig, BertForMaskedLM, BertForPreTraining

    register_documents()
    kind, auto = (
        (BertForPreTraining, "AutoModelForPreTraining") if pooled else (BertForMaskedLM, "AutoModelForMaskedLM")
    )
    still: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if weights is not None:
        return load(kind, auto, weights, attn_implementation=DOCUMENTS, dtype=torch.float32, **still)
    config = BertConfig(**shape.words(), vocab_size=vocab_size, max_position_embeddings=positions, **still)
    return kind._from_config(config, attn_implementation=DOCUMENTS)


class _OfRegions:
    """What architectures that read regions have in common."""

    __slots__ = ()

    row: RegionRow

    def layout(self, tiling: Tiling) -> VisionLayout:
        """Raises ValueError for a tiling of pixels, or of regions of other numbers."""
        if not isinstance(tiling, Objects) or tiling.row != self.row:
            has = tiling.row if isinstance(tiling, Objects) else f"tiling {tiling.kind!r}"
            raise ValueError(
                f"the model reads regions, {self.row}, and the recipe gives it {has}; take objects with that row"
            )
        return VisionLayout(shape=tiling.shape, tokens_per_tile=1)

    def tiling(self, tiling: Any) -> Any:
        """The same tiling for this architecture's rows."""
        return replace(tiling, row=self.row)


@spec
class UNITER(_OfRegions):
    """UNITER (arXiv:1909.11740): BERT over words and regions, each region its features and seven numbers of its box.

    `context` is the longest text, `positions` those of BERT's table.
    """

    kind: Literal["uniter"] = "uniter"
    shape: Layers
    row: RegionRow
    vocab_size: int = 30_522
    positions: int = 512
    context: int = 60

    @property
    def learns(self) -> tuple[str, ...]:
        return ("masked_tokens", "matching", "masked_regions")

    def tiny(self) -> Self:
        return replace(self, shape=SMALL, row=SMALL_ROW, vocab_size=2048, positions=64, context=24)

    def build(self, weights: str | None) -> Any:
        return _bert(self.shape, self.vocab_size, self.positions, True, weights)

    def model(self, spec: CrossModal, folder: Folder) -> Model:
        from mllm.bert import Uniter

        return Uniter(spec, self, folder)


@spec
class VLBERT(_OfRegions):
    """VL-BERT (arXiv:1908.08530): BERT whose every position has a visual feature: a region's own, a word's that of the picture.

    Texts without a picture are read as well, with a learned vector in its place.
    """

    kind: Literal["vl_bert"] = "vl_bert"
    shape: Layers
    row: RegionRow
    vocab_size: int = 30_522
    positions: int = 512
    context: int = 64

    @property
    def learns(self) -> tuple[str, ...]:
        return ("masked_tokens", "masked_regions")

    def tiny(self) -> Self:
        return replace(self, shape=SMALL, row=SMALL_ROW, vocab_size=2048, positions=64, context=24)

    def build(self, weights: str | None) -> Any:
        return _bert(self.shape, self.vocab_size, self.positions, False, weights)

    def model(self, spec: CrossModal, folder: Folder) -> Model:
        from mllm.bert import VlBert

        return VlBert(spec, self, folder)


@spec
class PixelBERT:
    """Pixel-BERT (arXiv:2004.00849): BERT over words and cells of a convolutional tower's last grid, pooled 2 x 2.

    Of the cells `sampled` are taken by chance (section 3.4), which is the row's own; None takes all, as fine-tuning does.
    """

    kind: Literal["pixel_bert"] = "pixel_bert"
    shape: Layers
    tower: Annotated[ResNet | ResNeXt, Field(discriminator="kind")] = ResNet()
    tower_weights: str | None = None
    image: int = 768
    sampled: Annotated[int, Field(gt=0)] | None = 100
    vocab_size: int = 30_522
    positions: int = 512
    context: int = 64

    @property
    def learns(self) -> tuple[str, ...]:
        return ("masked_tokens", "matching")

    @property
    def cells(self) -> int:
        """Cells of the pooled grid."""
        return (self.image // 64) ** 2

    @property
    def taken(self) -> int:
        return self.cells if self.sampled is None else min(self.sampled, self.cells)

    def tiny(self) -> Self:
        small: dict[str, Any] = {"vocab_size": 2048, "positions": 64, "context": 24}
        return replace(self, shape=SMALL, tower=self.tower.tiny(), tower_weights=None, image=192, sampled=5, **small)

    def layout(self, tiling: Tiling) -> VisionLayout:
        check_tiles(tiling, self.image, "Pixel-BERT")
        return VisionLayout(shape=tiling.shape, tokens_per_tile=self.taken)

    def tiling(self, tiling: Any) -> Any:
        """The same tiling for this architecture's pictures."""
        return replace(tiling, size=self.image)

    def build(self, weights: str | None) -> Any:
        return _bert(self.shape, self.vocab_size, self.positions, True, weights)

    def model(self, spec: CrossModal, folder: Folder) -> Model:
        from mllm.bert import PixelBert

        return PixelBert(spec, self, folder)


@spec
class LXMERT(_OfRegions):
    """LXMERT (arXiv:1908.07490): `words` layers over words, `regions` over regions, and `cross` in which each reads the other.

    `row.classes` are objects. `transformers`' LxmertForPreTraining, whose heads are those of its four tasks.
    """

    kind: Literal["lxmert"] = "lxmert"
    words: int = 9
    regions: int = 5
    cross: int = 5
    hidden_size: int = 768
    heads: int = 12
    intermediate_size: int = 3072
    row: RegionRow = RegionRow(classes=1600, attributes=400)
    vocab_size: int = 30_522
    positions: int = 512
    context: int = 20

    @property
    def learns(self) -> tuple[str, ...]:
        return ("masked_tokens", "matching", "masked_regions")

    def tiny(self) -> Self:
        small = {"words": 2, "regions": 1, "cross": 2, "hidden_size": 32, "heads": 2, "intermediate_size": 64}
        row = replace(SMALL_ROW, attributes=4)
        return replace(self, **small, row=row, vocab_size=2048, positions=64, context=24)

    def config(self, answers: int) -> Any:
        from transformers import LxmertConfig

        return LxmertConfig(
            hidden_size=self.hidden_size,
            num_attention_heads=self.heads,
            intermediate_size=self.intermediate_size,
            l_layers=self.words,
            r_layers=self.regions,
            x_layers=self.cross,
            visual_feat_dim=self.row.features,
            num_object_labels=self.row.classes,
            num_attr_labels=self.row.attributes,
            num_qa_labels=max(answers, 1),
            task_qa=answers > 0,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.positions,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )

    def build(self, weights: str | None, answers: int = 0) -> Any:
        from transformers import LxmertForPreTraining

        if weights is None:
            return LxmertForPreTraining(self.config(answers))
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return load(LxmertForPreTraining, "AutoModelForPreTraining", weights, dtype=torch.float32, **still)

    def model(self, spec: CrossModal, folder: Folder) -> Model:
        from mllm.lxmert import Lxmert

        return Lxmert(spec, self, folder)


Arch = Annotated[UNITER | VLBERT | PixelBERT | LXMERT, Field(discriminator="kind")]


@spec
class CrossModal(ModelSpec):
    """An encoder of texts with pictures, and the way text is written for it. `weights` None trains it from scratch.

    Weights of BERT begin a single stream, those of LXMERT an LXMERT. `answers` is the length of the list of answers that
    questions are answered from, 0 without such a head. A pair's picture is its document's first. `mask` is the id that
    stands for a masked token. `mean` and `std` normalise RGB in [0, 1] where the model looks at pixels. `dropout` is the share of
    hidden states that is left out in training, `attention_dropout` that of attention's weights (see `mllm.dropout`).
    """

    kind: Literal["cross_modal"] = "cross_modal"
    arch: Arch
    answers: Annotated[int, Field(ge=0)] = 0
    dropout: Dropout = 0.0
    attention_dropout: Dropout = 0.0
    weights: str | None = None
    tokenizer: str | None = None
    bos: str = "[CLS]"
    eos: str = "[SEP]"
    mask: int = 103
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.tokenizer is None and self.weights is None:
            raise ValueError(
                "an encoder of texts without weights needs a tokenizer; set model.tokenizer to a folder's name"
            )
        if self.mask >= self.arch.vocab_size:
            raise ValueError(
                f"mask={self.mask} is none of the {self.arch.vocab_size} words of the vocabulary; mend one"
            )
        if self.arch.context >= self.arch.positions:
            raise ValueError(
                f"texts of context={self.arch.context} tokens and what follows them need more than the table's "
                f"positions={self.arch.positions}; lower one or raise the other"
            )

    @property
    def words(self) -> Words:
        name = self.tokenizer or self.weights
        return Words(tokenizer=name, bos=self.bos, eos=self.eos, vocabulary=self.arch.vocab_size)

    @property
    def reads(self) -> tuple[str, ...]:
        tower = self.arch.tower_weights if isinstance(self.arch, PixelBERT) else None
        return tuple(name for name in (self.weights, tower) if name)

    @property
    def learns(self) -> tuple[str, ...]:
        return (*self.arch.learns, "classification") if self.answers else self.arch.learns

    @property
    def side(self) -> int:
        if isinstance(self.arch, PixelBERT):
            return self.arch.image
        raise ValueError("a model of regions looks at no pixels; it has no side")

    def tiny(self) -> Self:
        bos, eos = "<|im_start|>", "<|im_end|>"
        answers = min(self.answers, 4)
        words: dict[str, Any] = {"weights": None, "tokenizer": "example-bpe", "bos": bos, "eos": eos, "mask": 3}
        return replace(self, arch=self.arch.tiny(), answers=answers, **words)

    def layout(self, tiling: Tiling) -> VisionLayout:
        return self.arch.layout(tiling)

    def build(self, folder: Folder = str) -> Model:
        return self.arch.model(self, folder)

    def bare(self) -> Self:
        arch = replace(self.arch, tower_weights=None) if isinstance(self.arch, PixelBERT) else self.arch
        return replace(self, arch=arch, weights=None, tokenizer=self.words.tokenizer)


def answer_head(width: int, answers: int) -> nn.Module:
    """Scores of answers from a pooled pair: LXMERT's two matrices (arXiv:1908.07490, app.), UNITER's too."""
    return nn.Sequential(
        nn.Linear(width, 2 * width), nn.GELU(), nn.LayerNorm(2 * width, eps=1e-12), nn.Linear(2 * width, answers)
    )
