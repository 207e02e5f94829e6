"""Single streams on BERT: words and regions, or words and cells of a grid, in one transformer that sees both ways.

A pair is packed as its text, then its picture; pairs do not see each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mllm.chance import noise, seeds_of_tiles
from mllm.classify import Scores
from mllm.crossmodal import UNITER, VLBERT, CrossModal, PixelBERT, answer_head
from mllm.dropout import RowDropout, among, chance, within
from mllm.encoders import Folder
from mllm.model import Model
from mllm.pairs import Texts
from mllm.regions import BoxAndFeatures, PairedRegions, RegionHeads, Seen, paired_regions, regions_of, waves
from mllm.streams import Fused
from mllm.words import continuing
from ops.attention import Backend
from ops.images import normalize
from pipelines.types import Batch


class CrossEncoder(Model):
    """`fuse(batch, paired)`; `model(batch)` gives the pooled states of a batch's own pairs, (P, D).

    Whatever an objective asks, every head enters the result times 0, so that each trained weight has its gradient in every step.
    """

    net: Any
    continues: Tensor
    alone = False
    """Whether texts without a picture are read too."""

    def __init__(self, spec: CrossModal, folder: Folder) -> None:
        super().__init__()
        self.context = spec.arch.context
        self.vocabulary = spec.arch.vocab_size
        self.mask = spec.mask
        self.backend: Backend | None = None
        self.begins = RowDropout(spec.dropout, 0)
        self.leaves_out = max(spec.dropout, spec.attention_dropout) > 0
        self.register_buffer("continues", continuing(folder(spec.words.tokenizer or ""), self.vocabulary))

    def forward(self, batch: Batch) -> Float[Tensor, "P D"]:
        paired = self.pairs(batch)
        return self.fuse(batch, paired).pooled[: len(paired.texts.documents)]

    def pairs(self, batch: Batch) -> PairedRegions:
        """The pairs of a batch, their pictures as runs of rows."""
        return paired_regions(batch, self.context, self.alone)

    def fuse(self, batch: Batch, paired: PairedRegions) -> Fused:
        """Each text with its picture, through all layers."""
        raise NotImplementedError

    def chance(
        self, batch: Batch, texts: Texts, owner: Int[Tensor, " T"], place: Int[Tensor, " T"]
    ) -> Int[Tensor, " T"] | None:
        """By which chance something is left out, each position a `place` in the pair of the `owner`-th text; None for nothing."""
        return chance(batch, texts.documents, owner, place) if self.training and self.leaves_out else None

    def words_of(self, hidden: Float[Tensor, "M D"]) -> Float[Tensor, "M C"]:
        """Scores of the vocabulary at some positions of a text."""
        return self.net.cls.predictions(hidden)

    @property
    def match(self) -> Any:
        """Scores (P, 2) that a text and a picture do not belong together, and that they do."""
        return self.net.cls.seq_relationship

    def scores(self, batch: Batch) -> Scores:
        """Scores of answers to each pair's question. Raises ValueError for a model without such a head."""
        head = self.answers()
        if head is None:
            raise ValueError("the model has no head for answers; set model.answers to the length of their list")
        return Scores(head(self(batch)), self.scored(batch))

    def scored(self, batch: Batch) -> Int[Tensor, " P"]:
        """The documents that `scores` are of."""
        return self.pairs(batch).texts.documents

    def answers(self) -> nn.Module | None:
        """The head of answers, if there is one."""
        raise NotImplementedError

    def aligned(self, fused: Fused, paired: PairedRegions) -> tuple[Tensor, Tensor]:
        """Regions float (P, most, D), filled up, and which of them are there, bool (P, most)."""
        most = int(paired.counts.max())
        places = torch.arange(most, device=paired.counts.device)
        there = places < paired.counts[:, None]
        spread = fused.pictures.new_zeros(*there.shape, fused.pictures.shape[1])
        return spread.index_put((paired.owner, paired.place), fused.pictures), there

    def rows_of(self, batch: Batch, paired: PairedRegions) -> Seen:  # noqa: ARG002 -- as those do that can
        """The regions of the pairs as they were found. Raises ValueError for a model that reads none."""
        raise ValueError(f"{type(self).__name__} reads no regions; masked_regions is for models that do")

    def predicted(self, hidden: Float[Tensor, "M D"], what: str) -> Float[Tensor, "M K"]:  # noqa: ARG002 -- as above
        """What masked regions are taken to be: their "features", scores of their "classes" or "attributes"."""
        raise ValueError(f"{type(self).__name__} reads no regions; masked_regions is for models that do")

    def heads(self) -> list[nn.Parameter]:
        """What lies behind the layers."""
        return self.parts()["head"]

    def _reached(self, fused: Fused) -> Fused:
        """The same, with every head and both halves in all of it, times 0."""
        none = torch.stack(
            [p.float().sum() for p in self.heads()] + [x.float().sum() for x in (fused.texts, fused.pictures)]
        )
        zero = (0 * none.sum()).to(fused.texts.dtype)
        return Fused(fused.texts + zero, fused.pictures + zero, fused.pooled + zero)

    def attend_by(self, backend: Backend | None) -> None:
        self.backend = backend


@dataclass(slots=True)
class Run:
    """The pictures of pairs as a transformer reads them: `x` float (W, D), `counts` int64 (P,) of each pair's, and where in `x`
    the regions themselves stand, int64 (V,).
    """

    x: Float[Tensor, "W D"]
    counts: Int[Tensor, " P"]
    regions: Int[Tensor, " V"]


class _OneStream(CrossEncoder):
    """BERT over each pair's words and then its picture."""

    looks: Any
    answer: nn.Module | None

    def _leave_out(self, spec: CrossModal) -> None:
        """Let layers of BERT leave out a share of what they add, and of attention's weights."""
        for number, layer in enumerate(self.net.bert.encoder.layer):
            states = within((layer.attention.output, layer.output), spec.dropout, 1 + 2 * number)
            (states + among((layer.attention.self,), spec.attention_dropout, number)).told_by(layer)

    def answers(self) -> nn.Module | None:
        return self.answer

    def embedded(self, batch: Batch, paired: PairedRegions) -> tuple[Float[Tensor, "T D"], Run]:
        """Vectors of words and of pictures, before the first layer."""
        raise NotImplementedError

    def fuse(self, batch: Batch, paired: PairedRegions) -> Fused:
        texts = paired.texts
        words, run = self.embedded(batch, paired)
        lengths = texts.cu_seqlens.diff().long()
        bounds = nn.functional.pad((lengths + run.counts).cumsum(0), (1, 0))
        of_text = bounds[:-1][texts.owner] + texts.positions
        starts = bounds[:-1] + lengths - (run.counts.cumsum(0) - run.counts)
        of_picture = starts.repeat_interleave(run.counts) + torch.arange(len(run.x), device=bounds.device)
        x = torch.cat([words, run.x])[torch.cat([of_text, of_picture]).argsort()]
        owner = torch.arange(len(lengths), device=bounds.device).repeat_interleave(bounds.diff(), output_size=len(x))
        place = torch.arange(len(x), device=bounds.device) - bounds[owner]
        drawn = self.chance(batch, texts, owner, place)
        self.begins.told(drawn)
        x = self.begins(x)[None]
        pairs = tuple(bounds.diff().tolist())
        how = {"longest": max(pairs), "lengths": pairs, "causal": False, "backend": self.backend, "draws": drawn}
        for layer in self.net.bert.encoder.layer:
            x = layer(x, None, documents=bounds.to(torch.int32), **how)
        hidden = x[0]
        first = hidden[bounds[:-1]]
        pooler = self.net.bert.pooler
        pooled = first if pooler is None else pooler(first[:, None])
        return self._reached(Fused(hidden[of_text], hidden[of_picture[run.regions]], pooled))

    def _words(self, texts: Texts) -> Float[Tensor, "T D"]:
        """Tokens, places and the kind of a text added, not normed."""
        look = self.net.bert.embeddings
        kind = look.token_type_embeddings.weight[0]
        return look.word_embeddings(texts.ids) + look.position_embeddings(texts.positions) + kind

    def parts(self) -> dict[str, list[nn.Parameter]]:
        bert = self.net.bert
        text, layers, vision = (list(m.parameters()) for m in (bert.embeddings, bert.encoder, self.looks))
        inside = {id(p) for p in (*text, *layers, *vision)}
        head = [p for p in self.parameters() if id(p) not in inside]
        return {"text": text, "vision": vision, "layers": layers, "head": head}

    def units(self) -> list[nn.Module]:
        return list(self.net.bert.encoder.layer)


class Uniter(_OneStream):
    """UNITER over packs."""

    def __init__(self, spec: CrossModal, arch: UNITER, folder: Folder) -> None:
        super().__init__(spec, folder)
        width = arch.shape.hidden_size
        self.net = arch.build(folder(spec.weights) if spec.weights else None)
        self._leave_out(spec)
        self.row = arch.row
        self.looks = BoxAndFeatures(arch.row, width)
        self.told = RegionHeads(arch.row, width, tied=True)
        self.answer = answer_head(width, spec.answers) if spec.answers else None

    def embedded(self, batch: Batch, paired: PairedRegions) -> tuple[Tensor, Run]:
        bert = self.net.bert.embeddings
        kind = bert.token_type_embeddings.weight[1]
        x = self.looks(self.rows_of(batch, paired), paired.unseen, kind)
        return bert.LayerNorm(self._words(paired.texts)), Run(x, paired.counts, torch.arange(len(x), device=x.device))

    def rows_of(self, batch: Batch, paired: PairedRegions) -> Seen:
        return regions_of(batch.tiles[paired.tiles], self.row)

    def predicted(self, hidden: Float[Tensor, "M D"], what: str) -> Float[Tensor, "M K"]:
        return self.told(hidden, what, self.looks.features.weight)


class _WithClues(nn.Module):
    """Visual features of VL-BERT (section 3.2): appearance beside the box in sines, a matrix, a norm for each kind of position.

    `mask` stands for a hidden region's appearance. Of `vectors`, `region` is the token of a picture and of its regions, `end`
    that which ends a pair, `kind` tells pictures from words, and `blank` is what words without a picture see.
    """

    def __init__(self, arch: VLBERT, width: int) -> None:
        super().__init__()
        features = arch.row.features
        self.look = nn.Linear(2 * features, width)
        self.of_words = nn.LayerNorm(width, eps=1e-12)
        self.of_regions = nn.LayerNorm(width, eps=1e-12)
        self.mask = nn.Parameter(0.02 * torch.randn(features))
        self.vectors = nn.ParameterDict(
            {name: nn.Parameter(0.02 * torch.randn(width)) for name in ("region", "end", "kind", "blank")}
        )

    def forward(self, features: Float[Tensor, "V F"], boxes: Float[Tensor, "V 4"]) -> Float[Tensor, "V D"]:
        wide = waves(boxes, features.shape[1]).to(features.dtype)
        return torch.relu(self.look(torch.cat([features, wide], dim=1)))


class VlBert(_OneStream):
    """VL-BERT over packs. A picture is the whole of it, whose features are the mean of its regions', its regions, and an end."""

    alone = True

    def __init__(self, spec: CrossModal, arch: VLBERT, folder: Folder) -> None:
        super().__init__(spec, folder)
        width = arch.shape.hidden_size
        self.net = arch.build(folder(spec.weights) if spec.weights else None)
        self._leave_out(spec)
        self.net.bert.pooler = None
        self.row = arch.row
        self.looks = _WithClues(arch, width)
        self.told = RegionHeads(arch.row, width, tied=False)
        self.answer = answer_head(width, spec.answers) if spec.answers else None

    @property
    def match(self) -> Any:
        """Raises ValueError: VL-BERT asks no such question (section 3.3)."""
        raise ValueError("VL-BERT is not trained on matching; leave it away, or take UNITER")

    def embedded(self, batch: Batch, paired: PairedRegions) -> tuple[Tensor, Run]:
        bert, looks, texts, v = self.net.bert.embeddings, self.looks, paired.texts, self.looks.vectors
        seen = self.rows_of(batch, paired)
        features = torch.where(paired.unseen[:, None], looks.mask, seen.features.to(looks.mask.dtype))
        pictured = paired.counts > 0
        # The whole picture, of pairs that have one: the mean of what is seen of its regions.
        mean = features.new_zeros(len(paired.counts), features.shape[1]).index_add(0, paired.owner, features)
        mean = mean / paired.counts.clamp(min=1)[:, None].to(mean.dtype)
        all_of_it = seen.boxes.new_tensor([0.0, 0.0, 1.0, 1.0]).expand(len(mean), 4)
        whole, regions = looks(mean, all_of_it), looks(features, seen.boxes)
        clue = torch.where(pictured[:, None], looks.of_words(whole), v["blank"])
        words = bert.LayerNorm(self._words(texts) + clue[texts.owner])
        lengths = texts.cu_seqlens.diff().long()
        places = bert.position_embeddings(lengths)  # regions stand where the text has ended, all at once
        run = torch.cat([looks.of_regions(whole[pictured]), looks.of_regions(regions)])
        owner = torch.cat([pictured.nonzero().squeeze(1), paired.owner])
        run = run + v["region"] + places[owner]
        end = v["end"] + bert.position_embeddings(lengths[pictured] + 1)
        # Whole, regions, end: pair after pair.
        counts = paired.counts + 2 * pictured
        starts = counts.cumsum(0) - counts
        at = torch.cat(
            [starts[pictured], starts[paired.owner] + 1 + paired.place, starts[pictured] + paired.counts[pictured] + 1]
        )
        x = bert.LayerNorm(torch.cat([run, end]) + v["kind"])[at.argsort()]
        return words, Run(x, counts, starts[paired.owner] + 1 + paired.place)

    def rows_of(self, batch: Batch, paired: PairedRegions) -> Seen:
        return regions_of(batch.tiles[paired.tiles], self.row)

    def predicted(self, hidden: Float[Tensor, "M D"], what: str) -> Float[Tensor, "M K"]:
        return self.told(hidden, what)


class _Cells(nn.Module):
    """Cells of a tower's last grid, to the transformer's width, each with the vector of its kind (section 3.2)."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.features = nn.Linear(features, width)
        self.kind = nn.Parameter(0.02 * torch.randn(width))
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, features: Float[Tensor, "N S F"]) -> Float[Tensor, "N S D"]:
        return self.norm(self.features(features) + self.kind)


class PixelBert(_OneStream):
    """Pixel-BERT over packs: the tower is trained with the rest, its batch statistics stay as they were loaded."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: CrossModal, arch: PixelBERT, folder: Folder) -> None:
        super().__init__(spec, folder)
        width = arch.shape.hidden_size
        self.net = arch.build(folder(spec.weights) if spec.weights else None)
        self._leave_out(spec)
        self.tower = arch.tower.build(folder(arch.tower_weights) if arch.tower_weights else None, -1)
        self.looks = _Cells(arch.tower.width, width)
        self.cells, self.taken = arch.cells, arch.taken
        self.answer = answer_head(width, spec.answers) if spec.answers else None
        self.register_buffer("mean", torch.tensor(spec.mean), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std), persistent=False)

    def grid(self, batch: Batch) -> Float[Tensor, "N S F"]:
        """The cells that are taken of each tile, in reading order; which ones is the row's own chance."""
        pixels = normalize(batch.tiles, self.mean, self.std).to(self.looks.features.weight.dtype)
        features = self.tower(pixels)
        side = 2 * int(self.cells**0.5)
        grid = features.transpose(1, 2).unflatten(2, (side, side))
        cells = nn.functional.max_pool2d(grid, 2).flatten(2).transpose(1, 2)
        if self.taken == self.cells:
            return cells
        drawn = noise(seeds_of_tiles(batch), self.cells).to(cells.device)
        which = drawn.argsort(1)[:, : self.taken].sort(1).values
        return cells.gather(1, which[:, :, None].expand(-1, -1, cells.shape[2]))

    def embedded(self, batch: Batch, paired: PairedRegions) -> tuple[Tensor, Run]:
        x = self.looks(self.grid(batch))[paired.tiles].flatten(0, 1)
        words = self.net.bert.embeddings.LayerNorm(self._words(paired.texts))
        return words, Run(x, paired.counts * self.taken, torch.arange(len(x), device=x.device))

    def aligned(self, fused: Fused, paired: PairedRegions) -> tuple[Tensor, Tensor]:
        cells = fused.pictures.unflatten(0, (len(paired.counts), self.taken))
        return cells, torch.ones(cells.shape[:2], dtype=torch.bool, device=cells.device)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        tower = list(self.tower.parameters())
        inside = {id(p) for p in tower}
        found = super().parts()
        return {**found, "head": [p for p in found["head"] if id(p) not in inside], "tower": tower}

    def units(self) -> list[nn.Module]:
        return [*self.tower.units(), *super().units()]
