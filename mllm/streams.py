"""Single-stream encoders: a text and the patches of its picture in one transformer that sees both ways (ViLT)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mllm.dropout import Dropout, Dropouts, RowDropout, chance, within
from mllm.encoders import Folder
from mllm.layers import TOY, Layers, Patched
from mllm.model import HALF, RGB, Model, PictureModel, Words, check_mask
from mllm.pairs import Texts, first_pictures, texts_of
from mllm.weights import TOWER_FIELDS, agree, load
from mllm.words import continuing
from ops.attention import Backend, varlen_attention
from ops.images import normalize
from pipelines.types import Batch, spec


@spec
class ViLT(Patched):
    """ViLT (arXiv:2102.03334): word embeddings as in BERT, patches by one matrix, a ViT over both, each marked by a vector.

    `context` is the longest text, bos and eos with it.
    """

    kind: Literal["vilt"] = "vilt"
    shape: Layers
    patch: int = 32
    image: int = 384
    vocab_size: int = 30_522
    context: int = 40

    def config(self) -> Any:
        from transformers import ViltConfig

        return ViltConfig(
            **self.shape.words(),
            **self.sizes(),
            vocab_size=self.vocab_size,
            max_position_embeddings=self.context,
        )

    def build(self, weights: str | None) -> Any:
        from transformers import ViltForMaskedLM

        if weights is None:
            return ViltForMaskedLM(self.config())
        net = load(ViltForMaskedLM, "AutoModelForMaskedLM", weights, dtype=torch.float32)
        agree(weights, self.config(), net.config, (*TOWER_FIELDS, "vocab_size"))
        return net


@spec
class SingleStream(PictureModel):
    """A pair encoder and the way text is written for it.

    A pair's picture is its document's first. `mask` is the id that stands for a masked token. `dropout` is the share of hidden
    states that is left out in training (see `mllm.dropout`).
    """

    kind: Literal["single_stream"] = "single_stream"
    arch: ViLT
    dropout: Dropout = 0.0
    tokenizer: str | None = None
    bos: str = "[CLS]"
    eos: str = "[SEP]"
    mask: int = 103
    mean: RGB = HALF
    std: RGB = HALF

    def __post_init__(self) -> None:
        if self.tokenizer is None and self.weights is None:
            raise ValueError(
                "an encoder of texts without weights needs a tokenizer; set model.tokenizer to a folder's name"
            )
        check_mask(self.mask, self.arch.vocab_size)

    @property
    def words(self) -> Words:
        name = self.tokenizer or self.weights
        return Words(tokenizer=name, bos=self.bos, eos=self.eos, vocabulary=self.arch.vocab_size)

    @property
    def learns(self) -> tuple[str, ...]:
        return ("matching", "masked_tokens")

    def tiny(self) -> Self:
        arch = replace(self.arch, shape=TOY, patch=16, image=32, vocab_size=2048, context=24)
        bos, eos = "<|im_start|>", "<|im_end|>"
        return replace(self, arch=arch, weights=None, tokenizer="example-bpe", bos=bos, eos=eos, mask=3)

    def build(self, folder: Folder = str) -> PairEncoder:
        return PairEncoder(self, folder)

    def bare(self) -> Self:
        return replace(self, weights=None, tokenizer=self.words.tokenizer)


@dataclass(slots=True)
class Paired:
    """Texts of documents that have a picture, and the tile of each, int64 (P,). Without any, one blank text that is no pair's."""

    texts: Texts
    tiles: Int[Tensor, " P"]


@dataclass(slots=True)
class Fused:
    """Hidden states of texts float (T, D) and of pictures, and the pooled first token of each text (P, D).

    Pictures are float (P, 1 + patches, D), CLS first, where all are of one size; where they are runs of regions, float (V, D).
    """

    texts: Float[Tensor, "T D"]
    pictures: Tensor
    pooled: Float[Tensor, "P D"]


P = TypeVar("P", bound=Paired)


class Fuser(Protocol):
    """What the objectives of pairs ask of a model that sees a text and its picture together."""

    context: int
    vocabulary: int
    mask: int
    continues: Tensor

    def pairs(self, batch: Batch) -> Paired:
        """The pairs of a batch, as the model reads them."""
        ...

    def fuse(self, batch: Batch, paired: Any) -> Fused:
        """Each text with its picture, through all layers."""
        ...

    def words_of(self, hidden: Tensor) -> Tensor:
        """Scores of the vocabulary, float (M, C), at some positions of a text."""
        ...

    @property
    def match(self) -> Any:
        """Maps pooled pairs (P, D) to scores (P, 2) that the two do not belong together, and that they do."""
        ...

    def aligned(self, fused: Fused, paired: Any) -> tuple[Tensor, Tensor]:
        """What words are moved onto, float (P, N, D), and which of it is there, bool (P, N)."""
        ...


def pairs_of(batch: Batch, longest: int) -> Paired:
    """The pairs of a batch: documents with a picture and text."""
    pictures, texts = first_pictures(batch), texts_of(batch, longest)
    kept = torch.isin(texts.documents, pictures.documents)
    tiles = pictures.tiles[torch.isin(pictures.documents, texts.documents)]
    lengths = texts.cu_seqlens.diff()
    if not kept.any():
        return Paired(
            laid_out(texts.ids[:1], texts.positions[:1], lengths[:0], texts.documents[:0], texts.at[:0]), tiles
        )
    words = kept[texts.owner]
    return Paired(
        laid_out(texts.ids[words], texts.positions[words], lengths[kept], texts.documents[kept], texts.at[words]),
        tiles,
    )


def laid_out(ids: Tensor, positions: Tensor, lengths: Tensor, documents: Tensor, at: Tensor) -> Texts:
    """Texts of `lengths` end to end; without any, the first token of `ids` as the blank one."""
    if not len(lengths):
        lengths = torch.ones(1, dtype=torch.int32, device=ids.device)
        ids, positions = torch.zeros_like(ids), torch.zeros_like(positions)
    bounds = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return Texts(ids, positions, bounds, int(lengths.max()), documents, at)


def with_texts(paired: P, words: list[list[int]]) -> P:
    """The same pictures with other texts."""
    return replace(paired, texts=written(words, paired.texts.documents)) if words else paired


def written(words: list[list[int]], documents: Int[Tensor, " S"]) -> Texts:
    """Tokens of at least one text, end to end; their places in the batch are not known."""
    device = documents.device
    lengths = torch.tensor([len(each) for each in words], dtype=torch.int32, device=device)
    ids = torch.tensor([i for each in words for i in each], device=device)
    positions = torch.tensor([n for each in words for n in range(len(each))], device=device)
    return laid_out(ids, positions, lengths, documents, torch.zeros_like(ids))


class PairEncoder(Model):
    """`fuse(batch, paired)`; `model(batch)` gives the pooled states of a batch's own pairs, (P, D)."""

    net: Any
    mean: Tensor
    std: Tensor
    continues: Tensor

    def __init__(self, spec: SingleStream, folder: Folder) -> None:
        super().__init__()
        self.net = spec.arch.build(folder(spec.weights) if spec.weights else None)
        self.begins = RowDropout(spec.dropout, 0)
        for number, layer in enumerate(self.net.vilt.encoder.layer):
            layer.attention.attention = _Attention(layer.attention.attention)
            drops = within((layer.attention.output, layer.output), spec.dropout, 1 + 2 * number)
            layer.register_forward_pre_hook(_of_layer(drops))
        self.match = nn.Linear(spec.arch.shape.hidden_size, 2)
        self.context = spec.arch.context
        self.vocabulary = spec.arch.vocab_size
        self.mask = spec.mask
        self.backend: Backend | None = None
        self.register_buffer("continues", continuing(folder(spec.words.tokenizer or ""), self.vocabulary))
        self.register_buffer("mean", torch.tensor(spec.mean), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std), persistent=False)

    def forward(self, batch: Batch) -> Float[Tensor, "P D"]:
        paired = pairs_of(batch, self.context)
        return self.fuse(batch, paired).pooled[: len(paired.texts.documents)]

    def pairs(self, batch: Batch) -> Paired:
        return pairs_of(batch, self.context)

    def fuse(self, batch: Batch, paired: Paired) -> Fused:
        """Each text with its picture through the transformer; packed as text, then CLS and patches, pair after pair."""
        texts = paired.texts
        tiles = paired.tiles if len(paired.tiles) else torch.zeros(1, dtype=torch.long, device=texts.ids.device)
        words, patches = self._words(texts), self._patches(batch.tiles)[tiles]
        count, each, width = patches.shape
        lengths = texts.cu_seqlens.diff().long()
        bounds = nn.functional.pad((lengths + each).cumsum(0), (1, 0))
        of_text = bounds[:-1][texts.owner] + texts.positions
        of_picture = (bounds[:-1] + lengths)[:, None] + torch.arange(each, device=bounds.device)
        order = torch.cat([of_text, of_picture.flatten()]).argsort()
        x = torch.cat([words, patches.reshape(count * each, width)])[order]
        owner = torch.arange(count, device=bounds.device).repeat_interleave(bounds.diff(), output_size=len(x))
        place = torch.arange(len(x), device=bounds.device) - bounds[owner]
        drawn = chance(batch, texts.documents, owner, place) if self.training and self.begins.rate else None
        self.begins.told(drawn)
        x = self.begins(x)[None]
        where = Where(bounds.to(torch.int32), texts.max_seqlen + each, drawn, self.backend)
        for layer in self.net.vilt.encoder.layer:
            x = layer(x, where)[0]
        hidden = self.net.vilt.layernorm(x[0])
        pooled = self.net.vilt.pooler(hidden[bounds[:-1]][:, None])
        return Fused(hidden[of_text], hidden[of_picture], pooled)

    def words_of(self, hidden: Float[Tensor, "M D"]) -> Float[Tensor, "M C"]:
        """Scores of the vocabulary at some positions."""
        return self.net.mlm_score(hidden)

    def aligned(self, fused: Fused, paired: Paired) -> tuple[Tensor, Tensor]:  # noqa: ARG002 -- pictures are of one size
        """Patches without CLS, all of which are there."""
        patches = fused.pictures[:, 1:]
        return patches, torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)

    def _words(self, texts: Texts) -> Float[Tensor, "T D"]:
        embed = self.net.vilt.embeddings
        look = embed.text_embeddings
        kinds = torch.zeros_like(texts.ids)
        x = look(texts.ids[None], token_type_ids=kinds[None], position_ids=texts.positions[None])[0]
        return x + embed.token_type_embeddings(kinds)

    def _patches(self, tiles: Tensor) -> Float[Tensor, "N P D"]:
        embed = self.net.vilt.embeddings
        pixels = normalize(tiles, self.mean, self.std)
        x = embed.patch_embeddings(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([embed.cls_token.expand(len(x), -1, -1), x], dim=1) + embed.position_embeddings
        return x + embed.token_type_embeddings.weight[1]

    def parts(self) -> dict[str, list[nn.Parameter]]:
        vilt = self.net.vilt
        words = list(vilt.embeddings.text_embeddings.parameters())
        layers = [*vilt.encoder.parameters(), *vilt.layernorm.parameters()]
        inside = {id(p) for p in (*vilt.embeddings.parameters(), *layers)}
        known = {id(p) for p in words}
        return {
            "text": words,
            "vision": [p for p in vilt.embeddings.parameters() if id(p) not in known],
            "layers": layers,
            "head": [p for p in self.parameters() if id(p) not in inside],
        }

    def units(self) -> list[nn.Module]:
        return list(self.net.vilt.encoder.layer)

    def attend_by(self, backend: Backend | None) -> None:
        self.backend = backend


@dataclass(slots=True)
class Where:
    """Where pairs begin in what lies end to end, int32 (P+1,), how long the longest is, and the chance of positions, if any."""

    bounds: Int[Tensor, " bounds"]
    longest: int
    drawn: Int[Tensor, " L"] | None
    backend: Backend | None


def _of_layer(drops: Dropouts) -> Callable[..., None]:
    """Tells a layer's dropout by which chance, as the layer is called."""

    def tell(_: nn.Module, args: tuple[Any, ...]) -> None:
        drops.told(args[1].drawn)

    return tell


class _Attention(nn.Module):
    """ViLT's attention with its own matrices, over packed pairs; in the place of a mask it is told where they begin."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.query, self.key, self.value = whole.query, whole.key, whole.value
        self.heads = whole.num_attention_heads

    def forward(
        self,
        hidden_states: Float[Tensor, "1 T D"],
        attention_mask: Where,
        output_attentions: bool = False,  # noqa: ARG002 -- the signature is transformers'
    ) -> tuple[Tensor]:
        where, x = attention_mask, hidden_states[0]
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)) for part in (self.query, self.key, self.value))
        out = varlen_attention(q, k, v, where.bounds, where.longest, causal=False, backend=where.backend)
        return (out.flatten(1)[None],)
