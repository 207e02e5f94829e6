"""ALBEF and BLIP: BERT's layers, some of which look at the picture. The layers are those of `transformers`' BLIP."""
# ruff: noqa: ARG002 -- one signature for all kinds

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import deepcopy
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from mllm.aligned.rows import Rows
from mllm.aligned.twin import unit
from mllm.dropout import Dropout, RowDropout, among, draws_of_rows, within
from mllm.dual import Layers
from pipelines.types import spec


def text_config(shape: Layers, vocab_size: int, positions: int, vision: int, crosses: bool) -> Any:
    """transformers' configuration of BERT as BLIP has it, without dropout; if it `crosses`, its layers can look at a picture."""
    from transformers import BlipTextConfig

    plain: dict[str, Any] = {"attn_implementation": "eager"}  # the only attention that its layers have
    return BlipTextConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        encoder_hidden_size=vision,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=positions,
        is_decoder=crosses,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        sep_token_id=None,
        **plain,
    )


@spec
class ALBEF:
    """ALBEF (arXiv:2107.07651, 3.1): BERT's lower layers read text, its last `fusion` look at the picture too, in every layer.

    Without BERT's segment embeddings, of which ALBEF's texts have but one. `context` is the longest text, its first and last
    mark with it; `mask` the id that stands for a masked token; `width` that of the embeddings of a pair. `dropout` is the share
    of a text's hidden states that is left out in training, `attention_dropout` that of attention's weights (`mllm.dropout`).
    """

    learns: ClassVar[tuple[str, ...]] = ("contrastive", "momentum_contrast", "hard_matching", "distilled_tokens")
    kind: Literal["albef"] = "albef"
    text: Layers
    fusion: Annotated[int, Field(gt=0)] = 6
    vocab_size: int = 30_522
    positions: int = 512
    context: int = 30
    mask: int = 103
    width: int = 256
    dropout: Dropout = 0.0
    attention_dropout: Dropout = 0.0

    def tiny(self) -> Self:
        shape = Layers(hidden_size=32, layers=2, heads=2, intermediate_size=64)
        return replace(self, text=shape, fusion=1, vocab_size=2048, positions=32, context=24, mask=3, width=16)

    def build(self, vision: int) -> Aligning:
        return ALBEFNet(self, vision)


@spec
class BLIP:
    """BLIP (arXiv:2201.12086, 3.1): BERT as encoder of text, of text with the picture, and as decoder, by one set of weights.

    The decoder has its self-attention for itself; all else is shared. A text that begins with `enc` is to be looked at with its
    picture, one that begins with `dec` to be written; `context` is the longest text, its first and last mark with it.
    `dropout` and `attention_dropout` are ALBEF's.
    """

    learns: ClassVar[tuple[str, ...]] = ("contrastive", "momentum_contrast", "hard_matching", "captioning")
    kind: Literal["blip"] = "blip"
    text: Layers
    vocab_size: int = 30_524
    positions: int = 512
    context: int = 30
    dec: int = 30_522
    enc: int = 30_523
    width: int = 256
    dropout: Dropout = 0.0
    attention_dropout: Dropout = 0.0

    def tiny(self) -> Self:
        shape = Layers(hidden_size=32, layers=2, heads=2, intermediate_size=64)
        return replace(self, text=shape, vocab_size=2048, positions=32, context=24, dec=4, enc=5, width=16)

    def build(self, vision: int) -> Aligning:
        return BLIPNet(self, vision)


class Aligning(nn.Module, ABC):
    """What stands behind the picture's encoder, each kind in its own way. Rows are texts, features those of each row's picture.

    `look` and `read` give what pictures and texts are known by, of which `embed_pictures` and `embed_texts` are made.
    """

    def look(self, features: Float[Tensor, "S P D"], seeds: Int[Tensor, " S"] | None = None) -> Float[Tensor, "S N W"]:
        """What is asked of a picture without its text, `seeds` being its rows'; by default its features themselves."""
        return features

    @abstractmethod
    def read(self, rows: Rows) -> Float[Tensor, "S L W"]:
        """Hidden states of texts alone."""

    @abstractmethod
    def embed_pictures(self, looked: Float[Tensor, "S N W"]) -> Float[Tensor, "S Q E"]:
        """Of unit length, one or several a picture."""

    @abstractmethod
    def embed_texts(self, read: Float[Tensor, "S L W"]) -> Float[Tensor, "S E"]:
        """Of unit length."""

    def matched(self, features: Float[Tensor, "S P D"], rows: Rows) -> Float[Tensor, "S 2"]:
        """Scores of two answers, no and yes: does the text belong to the picture?"""
        raise ValueError(f"{type(self).__name__} does not match texts with pictures; leave hard_matching away")

    def masked(self, features: Float[Tensor, "S P D"], rows: Rows, at: Bool[Tensor, "S L"]) -> Float[Tensor, "M C"]:
        """Scores of the vocabulary at the places `at`, seen with the picture and the whole text."""
        raise ValueError(f"{type(self).__name__} knows no masked words; leave distilled_tokens away")

    def caption(
        self, features: Float[Tensor, "S P D"], rows: Rows, read: Tensor | None = None
    ) -> Float[Tensor, "S L C"]:
        """Scores of the token after each, seen with the picture and what comes before; `read` as it gave of these rows."""
        raise ValueError(f"{type(self).__name__} writes no captions; leave captioning away")

    def slow(self) -> tuple[str, ...]:
        """Names of modules that a twin has no use for."""
        return ()

    def begun_as(self, name: str) -> str | None:
        """What the language model that it begins from calls the weight that it calls `name`; None for one of its own."""
        return None

    @abstractmethod
    def units(self) -> list[nn.Module]:
        """Modules to be sharded (and recomputed) one by one."""

    @abstractmethod
    def heads(self) -> list[nn.Parameter]:
        """What stands behind the layers: projections and answers."""


def chance_of(
    net: nn.Module, seeds: Int[Tensor, " S"] | None, length: int, salt: int
) -> Int[Tensor, "S length"] | None:
    """The chance of the first positions of rows in one pass; None where nothing is left out."""
    return draws_of_rows(seeds, length, salt) if net.training and seeds is not None else None


def both_ways(there: Bool[Tensor, "S L"]) -> Bool[Tensor, "S 1 1 L"]:
    """Every token sees all of its text."""
    return there[:, None, None]


def backwards(there: Bool[Tensor, "S L"]) -> Bool[Tensor, "S 1 L L"]:
    """Every token sees itself and what comes before it."""
    places = torch.arange(there.shape[1], device=there.device)
    return there[:, None, None] & (places[:, None] >= places)


LOOKED, READ, MATCHED, MASKED, WRITTEN = range(5)
"""Salts: passes over the same rows, each of which leaves out others of their numbers."""


class BertLayer(nn.Module):
    """One layer, of the modules of transformers' `BlipTextLayer`; `own` gives it a second self-attention, a decoder's.

    Its `number` tells what it leaves out from what others do.
    """

    def __init__(self, layer: Any, of: ALBEF | BLIP, number: int, own: bool = False) -> None:
        super().__init__()
        self.attention = layer.attention
        self.decoder_attention = deepcopy(layer.attention) if own else None
        self.crossattention = getattr(layer, "crossattention", None)
        self.intermediate = layer.intermediate
        self.output = layer.output
        every: Any = (self.attention, self.decoder_attention, self.crossattention)
        attentions = [attention for attention in every if attention is not None]
        adding = (*(attention.output for attention in attentions), self.output)
        weighing = (attention.self for attention in attentions)
        self.left_out = within(adding, of.dropout, 1 + 4 * number) + among(
            weighing, of.attention_dropout, 3 * number, "dropout"
        )

    def forward(
        self,
        x: Float[Tensor, "S L W"],
        seen: Bool[Tensor, "S 1 _ L"],
        features: Tensor | None = None,
        writes: bool = False,
        drawn: Int[Tensor, "S L"] | None = None,
    ) -> Float[Tensor, "S L W"]:
        """`seen` says which keys each token sees; with `features` it looks at them, and if it `writes` by its decoder's part.

        `drawn` is the chance of positions by which something is left out, None for nothing.
        """
        self.left_out.told(drawn)
        attention: Any = self.decoder_attention if writes else self.attention
        hidden = torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)
        x, _ = attention(x, attention_mask=hidden)
        if features is not None:
            look: Any = self.crossattention
            x, _ = look(x, encoder_hidden_states=features)
        return self.output(self.intermediate(x), x)


class Words(nn.Module):
    """BERT's head: a matrix, GELU and a norm, then the table of embeddings itself and a bias for each word."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers.models.blip.modeling_blip_text import BlipTextPredictionHeadTransform

        self.transform = BlipTextPredictionHeadTransform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Float[Tensor, "... W"], table: Float[Tensor, "C W"]) -> Float[Tensor, "... C"]:
        return F.linear(self.transform(hidden), table, self.bias)


class _Bert(Aligning):
    """Word embeddings, layers, two projections and the answer whether a pair belongs together."""

    def __init__(
        self, of: ALBEF | BLIP, config: Any, layers: list[BertLayer], embeddings: nn.Module, vision: int
    ) -> None:
        super().__init__()
        width = of.width
        self.begins = RowDropout(of.dropout, 0)
        self.embeddings = embeddings
        self.layers = nn.ModuleList(layers)
        self.vision_proj = nn.Linear(vision, width)
        self.text_proj = nn.Linear(config.hidden_size, width)
        self.match = nn.Linear(config.hidden_size, 2)
        self.words = Words(config)
        for module in (self.vision_proj, self.text_proj, self.match, self.words.transform.dense):
            nn.init.normal_(module.weight, std=config.initializer_range)
            nn.init.zeros_(module.bias)

    def embed(self, rows: Rows, salt: int) -> tuple[Float[Tensor, "S L W"], Int[Tensor, "S L"] | None]:
        """What the first layer gets, and the chance by which something is left out of it in this pass, if anything is."""
        places = torch.arange(rows.ids.shape[1], device=rows.ids.device)
        table: Any = self.embeddings
        # Not by transformers' own forward, which adds positions in place.
        x = table.LayerNorm(table.word_embeddings(rows.ids) + table.position_embeddings(places[None]))
        drawn = chance_of(self, rows.seeds, len(places), salt)
        self.begins.told(drawn)
        return self.begins(x), drawn

    @property
    def table(self) -> Float[Tensor, "C W"]:
        """The word embeddings."""
        embeddings: Any = self.embeddings
        return embeddings.word_embeddings.weight

    def embed_pictures(self, looked: Tensor) -> Tensor:
        return unit(self.vision_proj(looked[:, :1]))

    def embed_texts(self, read: Tensor) -> Tensor:
        return unit(self.text_proj(read[:, 0]))

    def begun_as(self, name: str) -> str | None:
        """What BERT calls it; a decoder's self-attention begins as the encoder's."""
        part, _, rest = name.partition(".")
        match part:
            case "embeddings":
                return name
            case "layers" if "crossattention" not in rest:
                return f"encoder.layer.{rest.replace('decoder_attention', 'attention')}"
            case "words":
                return f"cls.predictions.{rest}"
        return None

    def units(self) -> list[nn.Module]:
        return list(self.layers)

    def heads(self) -> list[nn.Parameter]:
        modules = (self.vision_proj, self.text_proj, self.match, self.words)
        return [p for module in modules for p in module.parameters()]


def _made(shape: Layers, vocab_size: int, positions: int, vision: int, crosses: bool) -> Any:
    """transformers' BLIP text model of this shape, drawn anew."""
    from transformers import BlipTextModel

    return BlipTextModel(text_config(shape, vocab_size, positions, vision, crosses), add_pooling_layer=False)


class ALBEFNet(_Bert):
    """`ALBEF`. The first layers read a text alone; where a picture is looked at, the rest go on from what they gave."""

    def __init__(self, spec: ALBEF, vision: int) -> None:
        shape = spec.text
        if spec.fusion >= shape.layers:
            raise ValueError(
                f"fusion={spec.fusion} of {shape.layers} layers look at pictures, and none is left for text alone; lower fusion"
            )
        lower = _made(replace(shape, layers=shape.layers - spec.fusion), spec.vocab_size, spec.positions, vision, False)
        upper = _made(replace(shape, layers=spec.fusion), 1, 1, vision, True)
        made = (*lower.encoder.layer, *upper.encoder.layer)
        layers = [BertLayer(layer, spec, number) for number, layer in enumerate(made)]
        super().__init__(spec, lower.config, layers, lower.embeddings, vision)
        self.alone = shape.layers - spec.fusion

    def read(self, rows: Rows) -> Tensor:
        return self._alone(rows, READ)[0]

    def _alone(self, rows: Rows, salt: int) -> tuple[Float[Tensor, "S L W"], Int[Tensor, "S L"] | None]:
        (x, drawn), seen = self.embed(rows, salt), both_ways(rows.there)
        for layer in self.layers[: self.alone]:
            x = layer(x, seen, drawn=drawn)
        return x, drawn

    def fused(self, features: Tensor, rows: Rows, salt: int) -> Float[Tensor, "S L W"]:
        """Texts with their pictures; another `salt` leaves out others of their numbers."""
        (x, drawn), seen = self._alone(rows, salt), both_ways(rows.there)
        for layer in self.layers[self.alone :]:
            x = layer(x, seen, features, drawn=drawn)
        return x

    def matched(self, features: Tensor, rows: Rows) -> Tensor:
        return self.match(self.fused(features, rows, MATCHED)[:, 0])

    def masked(self, features: Tensor, rows: Rows, at: Tensor) -> Tensor:
        return self.words(self.fused(features, rows, MASKED)[at], self.table)

    def slow(self) -> tuple[str, ...]:
        return ("match",)


class BLIPNet(_Bert):
    """`BLIP`. The twin has no decoder: it teaches the contrast alone."""

    def __init__(self, spec: BLIP, vision: int) -> None:
        bert = _made(spec.text, spec.vocab_size, spec.positions, vision, True)
        layers = [BertLayer(layer, spec, number, own=True) for number, layer in enumerate(bert.encoder.layer)]
        super().__init__(spec, bert.config, layers, bert.embeddings, vision)
        self.enc, self.dec = spec.enc, spec.dec

    def read(self, rows: Rows) -> Tensor:
        (x, drawn), seen = self.embed(rows, READ), both_ways(rows.there)
        for layer in self.layers:
            x = layer(x, seen, drawn=drawn)
        return x

    def matched(self, features: Tensor, rows: Rows) -> Tensor:
        rows = rows.begun_with(self.enc)
        (x, drawn), seen = self.embed(rows, MATCHED), both_ways(rows.there)
        for layer in self.layers:
            x = layer(x, seen, features, drawn=drawn)
        return self.match(x[:, 0])

    def caption(self, features: Tensor, rows: Rows, read: Tensor | None = None) -> Tensor:
        rows = rows.begun_with(self.dec)
        (x, drawn), seen = self.embed(rows, WRITTEN), backwards(rows.there)
        for layer in self.layers:
            x = layer(x, seen, features, writes=True, drawn=drawn)
        return self.words(x, self.table)

    def slow(self) -> tuple[str, ...]:
        return ("match", "words", "decoder_attention", "crossattention")
