"""Multiway transformers: one attention for all modalities, feed-forward layers for each (VLMo, VL-BEiT, BEiT-3).

A sequence is a text, a picture or both, and many of them lie end to end in a stream; which of its experts a position goes
through depends on what it is and on what else its sequence holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mllm.aligned.rows import Rows
from mllm.depth import DropPath, branch_factors
from mllm.dual import LARGEST_SCALE
from mllm.encoders import Folder
from mllm.layers import TOY, Layers, Patched
from mllm.masked import Codebook, codes_of
from mllm.model import HALF, RGB, Model, ModelSpec, Words, check_mask, check_tiles
from mllm.pairs import Pairs, Texts, first_pictures, texts_of
from mllm.routes import Ways
from mllm.streams import Fused, Paired, laid_out, pairs_of
from ops.attention import Backend, varlen_attention
from ops.images import normalize
from pipelines.tiling import Tiling
from pipelines.types import NOT_LEARNED, Batch, VisionLayout, spec

EPS = 1e-6
"""Of LayerNorm, as in ViT."""


@spec
class Multiway(Patched, ModelSpec):
    """A Multiway transformer (VLMo, arXiv:2111.02358, 2.1; BEiT-3, arXiv:2208.10442, 2.1).

    In each layer pictures and texts share attention, and each has a feed-forward layer of its own. In the `fused` layers at the
    top positions of pairs go through a third one. `layer_scale` is where the gains of branches begin, None for none. `drop_path`
    is the share of branches left out in the last layer. `context` is the longest text, `mask` the id of a masked word. `codebook`
    names what is to be guessed of masked patches; None is a model that learns no masked data. `mean` and `std` normalise RGB.
    """

    kind: Literal["multiway"] = "multiway"
    shape: Layers
    fused: int
    tokenizer: str
    codebook: Codebook | None = None
    patch: int = 16
    vocab_size: int = 30_522
    context: int = 196
    layer_scale: float | None = 0.1
    drop_path: DropPath = 0.0
    temperature: float = 0.07
    bos: str = "[CLS]"
    eos: str = "[SEP]"
    mask: int = 103
    mean: RGB = HALF
    std: RGB = HALF

    def __post_init__(self) -> None:
        if not 0 <= self.fused <= self.shape.layers:
            raise ValueError(f"fused={self.fused} layers at the top of {self.shape.layers}; lower it")
        check_mask(self.mask, self.vocab_size)

    @property
    def words(self) -> Words:
        return Words(tokenizer=self.tokenizer, bos=self.bos, eos=self.eos, vocabulary=self.vocab_size)

    @property
    def reads(self) -> tuple[str, ...]:
        name = self.codebook.weights if self.codebook else None
        return (name,) if name else ()

    @property
    def learns(self) -> tuple[str, ...]:
        alike = ("masked_tokens", "matching", "hard_matching", "contrastive")
        return ("masked_data", *alike) if self.codebook else alike

    @property
    def side(self) -> int:
        return self.image

    def tiny(self) -> Self:
        codebook = self.codebook and Codebook(codes=64, channels=32)
        small = replace(self, shape=TOY, fused=min(self.fused, 1), codebook=codebook, patch=16, image=96, context=24)
        return replace(small, vocab_size=2048, tokenizer="example-bpe", bos="<|im_start|>", eos="<|im_end|>", mask=3)

    def layout(self, tiling: Tiling) -> VisionLayout:
        check_tiles(tiling, self.image, "the multiway transformer")
        return VisionLayout(shape=tiling.shape, tokens_per_tile=self.cells)

    def build(self, folder: Folder = str) -> MultiwayEncoder:
        return MultiwayEncoder(self, folder)

    def bare(self) -> Self:
        return replace(self, codebook=self.codebook and replace(self.codebook, weights=None))


@dataclass(slots=True)
class Laid:
    """Sequences end to end, in each its text, then CLS and the patches of its picture, whichever it has.

    `words` int64 (T,) and `pictures` int64 (K, 1 + P) are where each lies; `below` and `above` say which expert a position goes
    through, in most layers and in the fused ones. `kept` float (n, branches) is what each sequence's branches are multiplied by.
    """

    words: Int[Tensor, " T"]
    pictures: Int[Tensor, "K P"]
    bounds: Int[Tensor, " bounds"]
    longest: int
    owner: Int[Tensor, " L"]
    below: Ways
    above: Ways
    kept: Float[Tensor, "n branches"] | None
    backend: Backend | None


def lay(texts: Texts, of_text: Int[Tensor, " S"], of_picture: Int[Tensor, " K"], count: int, each: int) -> Laid:
    """Texts and pictures of `each` positions as `count` sequences; `of_text` and `of_picture` say whose each is."""
    lengths = texts.cu_seqlens.diff().long()
    spoken = lengths.new_zeros(count).index_add_(0, of_text, lengths)
    shown = lengths.new_zeros(count).index_fill_(0, of_picture, each)
    bounds = F.pad((spoken + shown).cumsum(0), (1, 0))
    words = bounds[of_text][texts.owner] + texts.positions
    pictures = (bounds[:-1] + spoken)[of_picture][:, None] + torch.arange(each, device=bounds.device)
    length = len(words) + pictures.numel()
    owner = torch.arange(count, device=bounds.device).repeat_interleave(spoken + shown, output_size=length)
    below = torch.zeros_like(owner).index_fill_(0, words, 1)
    above = torch.where(((spoken > 0) & (shown > 0))[owner], 2, below)
    return Laid(
        words=words,
        pictures=pictures,
        bounds=bounds.to(torch.int32),
        longest=texts.max_seqlen + each,
        owner=owner,
        below=Ways.of(below, 2),
        above=Ways.of(above, 3),
        kept=None,
        backend=None,
    )


class FeedForward(nn.Module):
    """An expert: LayerNorm, two matrices with GELU between them."""

    def __init__(self, shape: Layers) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape.hidden_size, eps=EPS)
        self.up = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.down = nn.Linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return self.down(F.gelu(self.up(self.norm(x))))


class MultiwayLayer(nn.Module):
    """Attention of all, then each position's own expert; keys have no bias, as in BEiT (arXiv:2106.08254)."""

    def __init__(self, shape: Layers, fused: bool, scale: float | None) -> None:
        super().__init__()
        width = shape.hidden_size
        self.heads = shape.heads
        self.attention_norm = nn.LayerNorm(width, eps=EPS)
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)
        self.vision, self.language = FeedForward(shape), FeedForward(shape)
        self.both = FeedForward(shape) if fused else None
        self.scales = None if scale is None else nn.Parameter(torch.full((2, width), scale))

    def forward(self, x: Float[Tensor, "T D"], laid: Laid, number: int) -> Float[Tensor, "T D"]:
        y = self.attention_norm(x)
        q, k, v = (part(y).unflatten(-1, (self.heads, -1)) for part in (self.query, self.key, self.value))
        seen = varlen_attention(q, k, v, laid.bounds, laid.longest, causal=False, backend=laid.backend)
        x = x + self._branch(self.out(seen.flatten(1)), 0, laid, number)
        if self.both is None:
            y = laid.below(x, self.vision, self.language)
        else:
            y = laid.above(x, self.vision, self.language, self.both)
        return x + self._branch(y, 1, laid, number)

    def _branch(self, x: Float[Tensor, "T D"], which: int, laid: Laid, number: int) -> Float[Tensor, "T D"]:
        if self.scales is not None:
            x = x * self.scales[which]
        if laid.kept is not None:
            x = x * laid.kept[:, 2 * number + which].to(x.dtype)[laid.owner][:, None]
        return x


class WordHead(nn.Module):
    """BERT's head for masked words (arXiv:1810.04805): a matrix, GELU and LayerNorm before the scores."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.scores = nn.Linear(width, vocabulary)

    def forward(self, x: Float[Tensor, "M D"]) -> Float[Tensor, "M C"]:
        return self.scores(self.norm(F.gelu(self.dense(x))))


def texts_where(texts: Texts, kept: Bool[Tensor, " S"]) -> Texts:
    """Those of the texts that are `kept`; one blank token that is no document's where none is."""
    lengths = texts.cu_seqlens.diff()
    if not kept.any():
        return laid_out(texts.ids[:1], texts.positions[:1], lengths[:0], texts.documents[:0], texts.at[:0])
    words = kept[texts.owner]
    return laid_out(texts.ids[words], texts.positions[words], lengths[kept], texts.documents[kept], texts.at[words])


@dataclass(slots=True)
class Whole:
    """All that a batch tells, each document as what it has: texts that say something, and first pictures.

    `tiles` and `documents` int64 (K,) are the pictures' tiles and documents; `paired` bool (S,), of the batch's documents, those
    that have both.
    """

    texts: Texts
    tiles: Int[Tensor, " K"]
    documents: Int[Tensor, " K"]
    paired: Bool[Tensor, " S"]


class MultiwayEncoder(Model):
    """`fuse` pairs, have them `embedded`, `read` whatever there is; `model(batch)` gives pooled states of the batch's pairs."""

    mean: Tensor
    std: Tensor
    codebook: Any

    def __init__(self, spec: Multiway, folder: Folder) -> None:
        super().__init__()
        width = spec.shape.hidden_size
        self.spec = spec
        self.patches = nn.Conv2d(3, width, spec.patch, stride=spec.patch)
        self.cls = nn.Parameter(torch.zeros(width))
        self.picture_positions = nn.Parameter(torch.zeros(1 + spec.cells, width))
        self.picture_kind = nn.Parameter(torch.zeros(width))
        self.word_embeddings = nn.Embedding(spec.vocab_size, width)
        self.word_positions = nn.Embedding(spec.context, width)
        self.word_kind = nn.Parameter(torch.zeros(width))
        self.word_norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(
            MultiwayLayer(spec.shape, number >= spec.shape.layers - spec.fused, spec.layer_scale)
            for number in range(spec.shape.layers)
        )
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.pooler = nn.Linear(width, width)
        self.match = nn.Linear(width, 2)
        self.to_words = WordHead(width, spec.vocab_size)
        self.of_pictures = nn.Linear(width, width, bias=False)
        self.of_texts = nn.Linear(width, width, bias=False)
        self.scale = nn.Parameter(torch.full((1,), math.log(1 / spec.temperature)))
        self.hidden_patch = nn.Parameter(torch.zeros(width)) if spec.codebook else None
        self.to_codes = nn.Linear(width, spec.codebook.codes) if spec.codebook else None
        self._begin()
        self.codebook = spec.codebook.build(folder) if spec.codebook else None
        self.context = spec.context
        self.vocabulary = spec.vocab_size
        self.mask = spec.mask
        self.continues: Tensor | None = None  # words are masked token by token
        self.backend: Backend | None = None
        self.border = nn.Identity()
        self.register_buffer("mean", torch.tensor(spec.mean), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std), persistent=False)

    @torch.no_grad()
    def _begin(self) -> None:
        """Weights from N(0, 0.02), as BERT and BEiT begin."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for vector in (self.cls, self.picture_positions, self.picture_kind, self.word_kind, self.hidden_patch):
            if vector is not None:
                nn.init.trunc_normal_(vector, std=0.02)

    def train(self, mode: bool = True) -> MultiwayEncoder:
        super().train(mode)
        if self.codebook is not None:
            self.codebook.eval()
        return self

    def forward(self, batch: Batch) -> Float[Tensor, "P D"]:
        paired = self.pairs(batch)
        return self.fuse(batch, paired).pooled[: len(paired.texts.documents)]

    def pairs(self, batch: Batch) -> Paired:
        """The pairs of a batch: documents with a picture and text."""
        return pairs_of(batch, self.context)

    def whole(self, batch: Batch) -> Whole:
        """All documents of a batch, each with its text, its first picture, or both. Text is what holds something to learn."""
        texts, pictures = texts_of(batch, self.context), first_pictures(batch)
        learned = torch.zeros_like(batch.pictured)
        learned[batch.document_of_token()[batch.labels != NOT_LEARNED]] = True
        texts = texts_where(texts, learned[texts.documents])
        spoken = torch.zeros_like(batch.pictured).index_fill_(0, texts.documents, True)
        return Whole(texts, pictures.tiles, pictures.documents, spoken & batch.pictured)

    def read(
        self, batch: Batch, whole: Whole, masked: Bool[Tensor, "K P"] | None = None
    ) -> tuple[Float[Tensor, "T D"], Float[Tensor, "K P D"]]:
        """Hidden states of words and of patches, each document by itself; patches that are `masked` are not seen."""
        there = torch.zeros_like(batch.pictured).index_fill_(0, whole.texts.documents, True)
        there = there.index_fill_(0, whole.documents, True)
        place = there.long().cumsum(0) - 1
        count = int(there.sum())
        of_text = place[whole.texts.documents]
        if not len(of_text):  # the blank text is a sequence of its own, which nobody reads
            of_text, count = of_text.new_full((1,), count), count + 1
        seeds = self._seeds(batch, there.nonzero().squeeze(1), count)
        words, pictures = self._encode(
            batch, whole.texts, whole.tiles, of_text, place[whole.documents], count, seeds, masked
        )
        return words, pictures[:, 1:]

    def fuse(self, batch: Batch, paired: Paired) -> Fused:
        """Each text with its picture through the transformer."""
        texts = paired.texts
        tiles = paired.tiles if len(paired.tiles) else torch.zeros(1, dtype=torch.long, device=texts.ids.device)
        numbers = torch.arange(len(tiles), device=tiles.device)
        seeds = self._seeds(batch, texts.documents, len(tiles))
        words, pictures = self._encode(batch, texts, tiles, numbers, numbers, len(tiles), seeds)
        pooled = torch.tanh(self.pooler(words[texts.cu_seqlens[:-1].long()]))
        return Fused(words, pictures, pooled)

    def embedded(self, batch: Batch) -> Pairs:
        """Each picture by itself and each text by itself, both of unit length (VLMo, 2.2)."""
        paired = self.pairs(batch)
        texts, count = paired.texts, len(paired.texts.documents)
        of_text = torch.arange(max(count, 1), device=texts.ids.device)
        of_picture = torch.arange(count, device=texts.ids.device) + len(of_text)
        seeds = self._seeds(batch, texts.documents, len(of_text))
        if seeds is not None:
            seeds = torch.cat([seeds, seeds[:count] ^ 1])  # a text and its picture do not lose the same branches
        words, pictures = self._encode(batch, texts, paired.tiles, of_text, of_picture, len(of_text) + count, seeds)
        first = words[texts.cu_seqlens[:-1].long()][:count]
        scale = self.scale.clamp(max=math.log(LARGEST_SCALE)).exp()
        return Pairs(
            images=F.normalize(self.of_pictures(pictures[:, 0]), dim=-1),
            texts=F.normalize(self.of_texts(first), dim=-1),
            documents=texts.documents,
            scale=scale,
            bias=scale.new_zeros(1),
        )

    def matched(self, batch: Batch, pairs: Int[Tensor, " n"], rows: Rows) -> Float[Tensor, "S 2"]:
        """Whether each text belongs to the picture of the batch's pair of that number; of a blank text where n is 0."""
        own = self.pairs(batch)
        if not len(pairs):
            return self.match(self.fuse(batch, own).pooled)
        places = torch.arange(rows.ids.shape[1], device=rows.ids.device).expand_as(rows.ids)[rows.there]
        ids = rows.ids[rows.there]
        texts = laid_out(ids, places, rows.there.sum(1), own.texts.documents[pairs], torch.zeros_like(ids))
        return self.match(self.fuse(batch, Paired(texts, own.tiles[pairs])).pooled)

    def aligned(self, fused: Fused, paired: Paired) -> tuple[Tensor, Tensor]:  # noqa: ARG002 -- pictures are of one size
        """What words are moved onto: patches without CLS, all of which are there."""
        patches = fused.pictures[:, 1:]
        return patches, torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)

    def words_of(self, hidden: Float[Tensor, "M D"]) -> Float[Tensor, "M C"]:
        """Scores of the vocabulary at some positions."""
        return self.to_words(hidden)

    def codes_of(self, hidden: Float[Tensor, "M D"]) -> Float[Tensor, "M C"]:
        """Scores of the codes of some patches. Raises ValueError for a model without a codebook."""
        if self.to_codes is None:
            raise ValueError("the model has no codebook, so patches have no codes; set model.codebook")
        return self.to_codes(hidden)

    def codes(self, batch: Batch, tiles: Int[Tensor, " K"]) -> Int[Tensor, "K P"]:
        """The codes that the frozen tokenizer gives to the patches of some tiles."""
        return codes_of(self.codebook, batch.tiles, self.spec.image // self.spec.patch)[tiles]

    def _encode(
        self,
        batch: Batch,
        texts: Texts,
        tiles: Int[Tensor, " K"],
        of_text: Int[Tensor, " S"],
        of_picture: Int[Tensor, " K"],
        count: int,
        seeds: Int[Tensor, " n"] | None,
        masked: Bool[Tensor, "K P"] | None = None,
    ) -> tuple[Float[Tensor, "T D"], Float[Tensor, "K P D"]]:
        """Hidden states of `texts` and of the pictures on `tiles`, CLS first, as the sequences that they make up."""
        words, pictures = self._words(texts), self.border(self._pictures(batch.tiles, tiles, masked))
        laid = lay(texts, of_text, of_picture, count, pictures.shape[1])
        if seeds is not None:
            laid.kept = branch_factors(seeds, self.spec.shape.layers, self.spec.drop_path)
        laid.backend = self.backend
        order = torch.cat([laid.words, laid.pictures.flatten()]).argsort()
        x = torch.cat([words, pictures.flatten(0, 1)])[order]
        for number, layer in enumerate(self.layers):
            x = layer(x, laid, number)
        x = self.norm(x)
        return x[laid.words], x[laid.pictures]

    def _words(self, texts: Texts) -> Float[Tensor, "T D"]:
        x = self.word_embeddings(texts.ids) + self.word_positions(texts.positions) + self.word_kind
        return self.word_norm(x)

    def _pictures(
        self, tiles: Tensor, chosen: Int[Tensor, " K"], masked: Bool[Tensor, "K P"] | None
    ) -> Float[Tensor, "K P D"]:
        pixels = normalize(tiles, self.mean, self.std).to(self.patches.weight.dtype)
        x = self.patches(pixels).flatten(2).transpose(1, 2)[chosen]
        if masked is not None and self.hidden_patch is not None:
            x = torch.where(masked[..., None], self.hidden_patch, x)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)
        return x + self.picture_positions + self.picture_kind

    def _seeds(self, batch: Batch, documents: Int[Tensor, " S"], count: int) -> Int[Tensor, " n"] | None:
        """Seeds of `count` sequences, those of documents first; None where no branch is left out."""
        if not (self.training and self.spec.drop_path and batch.seeds is not None):
            return None
        return F.pad(batch.seeds[documents], (0, count - len(documents)))

    def parts(self) -> dict[str, list[nn.Parameter]]:
        layers: list[Any] = list(self.layers)
        vision = [*self.patches.parameters(), self.cls, self.picture_positions, self.picture_kind]
        words = [*self.word_embeddings.parameters(), *self.word_positions.parameters(), self.word_kind]
        language = [*words, *self.word_norm.parameters()]
        experts = {
            "vision": vision + [p for layer in layers for p in layer.vision.parameters()],
            "language": language + [p for layer in layers for p in layer.language.parameters()],
            "fused": [p for layer in layers if layer.both for p in layer.both.parameters()],
        }
        inside = {id(p) for part in experts.values() for p in part}
        shared = [*self.layers.parameters(), *self.norm.parameters()]
        codes = [] if self.to_codes is None else [self.hidden_patch, *self.to_codes.parameters()]
        found = {
            **experts,
            "attention": [p for p in shared if id(p) not in inside],
            "words": list(self.to_words.parameters()),
            "codes": codes,
            "matching": [*self.pooler.parameters(), *self.match.parameters()],
            "contrast": [*self.of_pictures.parameters(), *self.of_texts.parameters(), self.scale],
        }
        return {name: [p for p in part if p is not None] for name, part in found.items() if part}

    def main(self) -> dict[str, list[nn.Parameter]]:
        tokenizer = {"codebook": list(self.codebook.parameters())} if self.codebook is not None else {}
        return self.parts() | tokenizer

    def units(self) -> list[nn.Module]:
        return list(self.layers)

    def attend_by(self, backend: Backend | None) -> None:
        self.backend = backend
