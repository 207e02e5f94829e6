"""Two streams and layers across (LXMERT, arXiv:1908.07490): `transformers`' own, over packs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mllm.bert import CrossEncoder
from mllm.crossmodal import LXMERT, CrossModal
from mllm.dropout import Dropouts, WeightDropout, within
from mllm.encoders import Folder
from mllm.regions import PairedRegions, Seen, regions_of
from mllm.streams import Fused
from ops.attention import Backend, varlen_attention
from ops.cross import Runs, cross_attention
from pipelines.types import Batch


@dataclass(slots=True)
class Side:
    """Where a stream's pairs begin, int32 (P+1,), and the lengths of its pairs' runs and of the other stream's.

    `drawn` and `beside` are the chance of both streams' positions by which something is left out, None for none.
    """

    bounds: Int[Tensor, " bounds"]
    lengths: tuple[int, ...]
    others: tuple[int, ...]
    drawn: Int[Tensor, " T"] | None
    beside: Int[Tensor, " V"] | None
    backend: Backend | None


class Lxmert(CrossEncoder):
    """LXMERT over packs. Hidden regions are zeros, as in the released code."""

    def __init__(self, spec: CrossModal, arch: LXMERT, folder: Folder) -> None:
        super().__init__(spec, folder)
        self.net = arch.build(folder(spec.weights) if spec.weights else None, spec.answers)
        self.row = arch.row
        encoder = self.net.lxmert.encoder
        numbers = count()

        def attention(whole: Any) -> _Attention:
            return _Attention(whole, spec.attention_dropout, next(numbers))

        for layer in (*encoder.layer, *encoder.r_layers):
            layer.attention.self = attention(layer.attention.self)
        for layer in encoder.x_layers:
            layer.visual_attention.att = attention(layer.visual_attention.att)
            for own in (layer.lang_self_att, layer.visn_self_att):
                own.self = attention(own.self)
        self._leave_out(spec.dropout)

    def _leave_out(self, rate: float) -> None:
        """Let layers leave out a share of what they add; what reads both streams does so for both."""
        encoder, number = self.net.lxmert.encoder, 1
        for layer in (*encoder.layer, *encoder.r_layers):
            alone = within((layer.attention.output, layer.output), rate, number)
            layer.register_forward_pre_hook(_of_one(alone))
            number += 2
        for layer in encoder.x_layers:
            words = within((layer.lang_self_att.output, layer.lang_output), rate, number)
            regions = within((layer.visn_self_att.output, layer.visn_output), rate, number + 2)
            both = within((layer.visual_attention.output,), rate, number + 4)
            layer.register_forward_pre_hook(_of_both(words, regions))
            layer.visual_attention.register_forward_pre_hook(_of_reader(both), with_kwargs=True)
            number += 5

    def fuse(self, batch: Batch, paired: PairedRegions) -> Fused:
        """Layers of words, layers of regions, and layers in which each reads the other and then itself."""
        texts, lxmert = paired.texts, self.net.lxmert
        of_words, of_regions = self._sides(batch, paired)
        look = lxmert.embeddings
        kind = look.token_type_embeddings.weight[0]
        words = look.LayerNorm(look.word_embeddings(texts.ids) + look.position_embeddings(texts.positions) + kind)
        seen = self.rows_of(batch, paired)
        features = seen.features.masked_fill(paired.unseen[:, None], 0.0).to(words.dtype)
        encoder = lxmert.encoder
        self.begins.told(of_words.drawn)
        x = self.begins(words)[None]
        self.begins.told(of_regions.drawn)
        y = self.begins(encoder.visn_fc(features, seen.boxes.to(words.dtype)))[None]
        for layer in encoder.layer:
            x = layer(x, of_words)[0]
        for layer in encoder.r_layers:
            y = layer(y, of_regions)[0]
        for layer in encoder.x_layers:
            x, y = layer(x, of_words, y, of_regions)
        first = x[0][texts.cu_seqlens[:-1].long()]
        return self._reached(Fused(x[0], y[0], lxmert.pooler(first[:, None])))

    def answers(self) -> nn.Module | None:
        return getattr(self.net, "answer_head", None)

    def _sides(self, batch: Batch, paired: PairedRegions) -> tuple[Side, Side]:
        texts, bounds = paired.texts, paired.texts.cu_seqlens
        of_words = self.chance(batch, texts, texts.owner, texts.positions)
        behind = self.context + paired.place  # all words
        of_regions = self.chance(batch, texts, paired.owner, behind)
        words, regions = tuple(bounds.diff().tolist()), tuple(paired.counts.tolist())
        other = nn.functional.pad(paired.counts.cumsum(0), (1, 0)).to(torch.int32)
        return (
            Side(bounds, words, regions, of_words, of_regions, self.backend),
            Side(other, regions, words, of_regions, of_words, self.backend),
        )

    def rows_of(self, batch: Batch, paired: PairedRegions) -> Seen:
        return regions_of(batch.tiles[paired.tiles], self.row)

    def predicted(self, hidden: Float[Tensor, "M D"], what: str) -> Float[Tensor, "M K"]:
        heads = self.net.obj_predict_head
        name = {"features": "feat", "classes": "obj", "attributes": "attr"}[what]
        return heads.decoder_dict[name](heads.transform(hidden))

    def parts(self) -> dict[str, list[nn.Parameter]]:
        lxmert = self.net.lxmert
        encoder = lxmert.encoder
        text, vision = list(lxmert.embeddings.parameters()), list(encoder.visn_fc.parameters())
        layers = [p for some in (encoder.layer, encoder.r_layers, encoder.x_layers) for p in some.parameters()]
        inside = {id(p) for p in (*text, *vision, *layers)}
        return {
            "text": text,
            "vision": vision,
            "layers": layers,
            "layers.words": list(encoder.layer.parameters()),
            "layers.regions": list(encoder.r_layers.parameters()),
            "layers.cross": list(encoder.x_layers.parameters()),
            "head": [p for p in self.parameters() if id(p) not in inside],
        }

    def units(self) -> list[nn.Module]:
        encoder = self.net.lxmert.encoder
        return [*encoder.layer, *encoder.r_layers, *encoder.x_layers]


Hook = Callable[..., None]
"""What is run before a module, with what it is called with."""


def _of_one(stream: Dropouts) -> Hook:
    """Tells those of a layer of one stream."""

    def tell(_: nn.Module, args: tuple[Any, ...]) -> None:
        stream.told(args[1].drawn)

    return tell


def _of_both(words: Dropouts, regions: Dropouts) -> Hook:
    """Tells each stream's of a layer across."""

    def tell(_: nn.Module, args: tuple[Any, ...]) -> None:
        words.told(args[1].drawn)
        regions.told(args[3].drawn)

    return tell


def _of_reader(both: Dropouts) -> Hook:
    """Tells those of the stream that reads, when attention across is told of the one that it reads."""

    def tell(_: nn.Module, __: tuple[Any, ...], words: dict[str, Any]) -> None:
        both.told(words["ctx_att_mask"].beside)

    return tell


class _Attention(nn.Module):
    """LXMERT's attention with its own matrices, over packed pairs; in the place of the context's mask it is told its `Side`."""

    def __init__(self, whole: Any, rate: float, number: int) -> None:
        super().__init__()
        self.query, self.key, self.value = whole.query, whole.key, whole.value
        self.heads = whole.num_attention_heads
        self.left_out = WeightDropout(rate, number)

    def forward(
        self,
        hidden_states: Float[Tensor, "1 T D"],
        context: Float[Tensor, "1 V D"],
        attention_mask: Side,
        output_attentions: bool = False,  # noqa: ARG002 -- the signature is transformers'
    ) -> tuple[Tensor]:
        of, x, y = attention_mask, hidden_states[0], context[0]
        q = self.query(x).unflatten(-1, (self.heads, -1))
        k, v = (part(y).unflatten(-1, (self.heads, -1)) for part in (self.key, self.value))
        itself = context is hidden_states
        self.left_out.told(of.drawn if itself else of.beside)
        if self.left_out.active:
            out = self.left_out.attention(q, k, v, Runs(of.lengths if itself else of.others, of.lengths))
        elif itself:
            out = varlen_attention(q, k, v, of.bounds, max(of.lengths), causal=False, backend=of.backend)
        else:
            out = cross_attention(q, k, v, Runs(of.others, of.lengths), backend=of.backend)
        return (out.flatten(1)[None],)
