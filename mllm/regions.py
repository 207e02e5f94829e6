"""Regions of pictures as a model reads them: rows of bytes to numbers, boxes to geometry, both to a transformer's width.

Shape letters: V regions of a pack end to end, F features of one, C classes, A attributes, D width of the transformer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from mllm.pairs import shown, texts_of
from mllm.streams import Paired, laid_out
from pipelines.objects import RegionRow
from pipelines.types import Batch


@dataclass(slots=True)
class Seen:
    """Regions as they were found, float32: `features` (V, F), `classes` (V, C), `attributes` (V, A), `boxes` (V, 4) in shares."""

    features: Float[Tensor, "V F"]
    classes: Float[Tensor, "V C"]
    attributes: Float[Tensor, "V A"]
    boxes: Float[Tensor, "V 4"]


def regions_of(rows: UInt8[Tensor, "V bytes"], row: RegionRow) -> Seen:
    """What `pipelines.objects.Objects` wrote. Raises ValueError for rows of another make."""
    if rows.shape[1:] != (row.bytes,):
        raise ValueError(
            f"regions of {tuple(rows.shape[1:])} bytes, and the model reads {row.bytes}; give the tiling the model's `row`"
        )
    halves = rows[:, : 2 * row.halves].contiguous().view(torch.float16).float()
    features, classes, attributes = halves.split([row.features, row.classes, row.attributes], dim=1)
    return Seen(features, classes, attributes, rows[:, 2 * row.halves :].contiguous().view(torch.float32))


def geometry(boxes: Float[Tensor, "V 4"]) -> Float[Tensor, "V 7"]:
    """Left, top, right, bottom, width, height and area, in shares (UNITER, arXiv:1909.11740, 3.1)."""
    sides = boxes[:, 2:] - boxes[:, :2]
    return torch.cat([boxes, sides, sides.prod(1, keepdim=True)], dim=1)


def waves(boxes: Float[Tensor, "V 4"], width: int) -> Float[Tensor, "V width"]:
    """Sines and cosines of the four sides, at `width` / 8 wave lengths between 1 and 1,000 (Relation Networks,
    arXiv:1711.11575, 4.1, as VL-BERT has it, arXiv:1908.08530, 3.2). Raises ValueError unless 8 divides `width`.
    """
    if width % 8:
        raise ValueError(f"geometry of four sides in sines and cosines needs a width that 8 divides, and it is {width}")
    rates = 1000.0 ** -(torch.arange(width // 8, device=boxes.device, dtype=torch.float32) / (width // 8))
    angles = 100.0 * boxes[:, :, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)


@dataclass(slots=True)
class PairedRegions(Paired):
    """Pairs whose pictures are runs of rows: `tiles` int64 (V,), the rows of all pairs end to end; `counts` int64 (P,) of each.

    P is the number of texts, the blank one too, whose picture is the batch's first row. `hidden` bool (V,) are regions that a
    model must not see.
    """

    counts: Int[Tensor, " P"]
    hidden: Bool[Tensor, " V"] | None = None

    @property
    def unseen(self) -> Bool[Tensor, " V"]:
        """Which regions are hidden."""
        return torch.zeros_like(self.tiles, dtype=torch.bool) if self.hidden is None else self.hidden

    @property
    def owner(self) -> Int[Tensor, " V"]:
        """Which pair each region is of."""
        return torch.arange(len(self.counts), device=self.counts.device).repeat_interleave(self.counts)

    @property
    def place(self) -> Int[Tensor, " V"]:
        """Which region of its picture each is."""
        starts = self.counts.cumsum(0) - self.counts
        return torch.arange(len(self.tiles), device=self.tiles.device) - starts[self.owner]


def paired_regions(batch: Batch, longest: int, alone: bool = False) -> PairedRegions:
    """The pairs of a batch: documents with text and a picture, whose first is taken; with `alone` those without a picture too."""
    every, texts = shown(batch), texts_of(batch, longest)
    new = torch.ones_like(every.documents, dtype=torch.bool)
    new[1:] = every.documents[1:] != every.documents[:-1]
    counts = torch.zeros(len(batch.sources), dtype=torch.long, device=new.device)
    first = torch.zeros_like(counts)
    counts[every.documents[new]] = batch.cuts[:, 0].long()[new]
    first[every.documents[new]] = every.tiles[new]
    kept = torch.ones_like(texts.documents, dtype=torch.bool) if alone else counts[texts.documents] > 0
    if not kept.any():
        blank = torch.zeros(1, dtype=torch.long, device=new.device)
        none = texts.documents[:0]
        return PairedRegions(laid_out(texts.ids[:1], texts.positions[:1], none, none, none), blank, blank + 1)
    words = kept[texts.owner]
    lengths, documents = texts.cu_seqlens.diff()[kept], texts.documents[kept]
    of_texts = laid_out(texts.ids[words], texts.positions[words], lengths, documents, texts.at[words])
    counts, first = counts[documents], first[documents]
    starts = counts.cumsum(0) - counts
    run = torch.arange(int(counts.sum()), device=counts.device)
    rows = (first - starts).repeat_interleave(counts) + run
    return PairedRegions(of_texts, rows, counts)


class BoxAndFeatures(nn.Module):
    """UNITER's (section 3.1): features and the seven numbers of a box, each through a matrix and a norm, added, a norm.

    To the features of a hidden region, which are zeros, a learned vector is added.
    """

    def __init__(self, row: RegionRow, width: int) -> None:
        super().__init__()
        self.features = nn.Linear(row.features, width)
        self.features_norm = nn.LayerNorm(width, eps=1e-12)
        self.boxes = nn.Linear(7, width)
        self.boxes_norm = nn.LayerNorm(width, eps=1e-12)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.mask = nn.Parameter(torch.zeros(row.features))

    def forward(self, seen: Seen, hidden: Bool[Tensor, " V"], kind: Float[Tensor, " D"]) -> Float[Tensor, "V D"]:
        """`kind` is the vector of a picture's positions."""
        weight = self.features.weight
        features = torch.where(hidden[:, None], self.mask, seen.features.to(weight.dtype))
        boxes = geometry(seen.boxes).to(weight.dtype)
        x = self.features_norm(self.features(features)) + self.boxes_norm(self.boxes(boxes))
        return self.norm(x + kind)


def head(width: int, wide: int) -> nn.Sequential:
    """A matrix, GELU, a norm and a matrix of `wide` scores, as BERT's head of masked words."""
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=1e-12), nn.Linear(width, wide))


class RegionHeads(nn.Module):
    """What a masked region was: scores of its classes and, where `tied`, its features by the matrix that read them, turned round.

    That matrix is another module's: it is given with each call (UNITER, 3.2; VL-BERT, arXiv:1908.08530, 3.3, has classes alone).
    """

    def __init__(self, row: RegionRow, width: int, tied: bool) -> None:
        super().__init__()
        self.classes = head(width, row.classes) if row.classes else None
        self.features = head(width, width)[:3] if tied else None
        self.bias = nn.Parameter(torch.zeros(row.features)) if tied else None

    def forward(
        self, hidden: Float[Tensor, "M D"], what: str, matrix: Float[Tensor, "D F"] | None = None
    ) -> Float[Tensor, "M K"]:
        if what == "classes" and self.classes is not None:
            return self.classes(hidden)
        if what == "features" and self.features is not None and self.bias is not None and matrix is not None:
            return self.features(hidden) @ matrix + self.bias
        raise ValueError(f"this model does not tell the {what} of masked regions; ask for what its paper asks for")
