"""Two streams and layers across (LXMERT, arXiv:1908.07490): `transformers`' own, over packs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mllm.bert import CrossEncoder
from mllm.crossmodal import LXMERT, CrossModal
from mllm.encoders import Folder
from mllm.regions import PairedRegions, Seen, regions_of
from mllm.streams import Fused
from ops.attention import Backend, varlen_attention
from ops.cross import Runs, cross_attention
from pipelines.types import Batch


@dataclass(slots=True)
class Side:
    """Where a stream's pairs begin, int32 (P+1,), and the lengths of its pairs' runs and of the other stream's."""

    bounds: Int[Tensor, " bounds"]
    lengths: tuple[int, ...]
    others: tuple[int, ...]
    backend: Backend | None


class Lxmert(CrossEncoder):
    """LXMERT over packs. Hidden regions are zeros, as in the released code."""

    def __init__(self, spec: CrossModal, arch: LXMERT, folder: Folder) -> None:
        super().__init__(spec, folder)
        self.net = arch.build(folder(spec.weights) if spec.weights else None, spec.answers)
        self.row = arch.row
        encoder = self.net.lxmert.encoder
        for layer in (*encoder.layer, *encoder.r_layers):
            layer.attention.self = _Attention(layer.attention.self)
        for layer in encoder.x_layers:
            layer.visual_attention.att = _Attention(layer.visual_attention.att)
            for own in (layer.lang_self_att, layer.visn_self_att):
                own.self = _Attention(own.self)

    def fuse(self, batch: Batch, paired: PairedRegions) -> Fused:
        """Layers of words, layers of regions, and layers in which each reads the other and then itself."""
        texts, lxmert = paired.texts, self.net.lxmert
        of_words, of_regions = self._sides(paired)
        look = lxmert.embeddings
        kind = look.token_type_embeddings.weight[0]
        words = look.LayerNorm(look.word_embeddings(texts.ids) + look.position_embeddings(texts.positions) + kind)
        seen = self.rows_of(batch, paired)
        features = seen.features.masked_fill(paired.unseen[:, None], 0.0).to(words.dtype)
        encoder = lxmert.encoder
        x, y = words[None], encoder.visn_fc(features, seen.boxes.to(words.dtype))[None]
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

    def _sides(self, paired: PairedRegions) -> tuple[Side, Side]:
        bounds = paired.texts.cu_seqlens
        words, regions = tuple(bounds.diff().tolist()), tuple(paired.counts.tolist())
        other = nn.functional.pad(paired.counts.cumsum(0), (1, 0)).to(torch.int32)
        return Side(bounds, words, regions, self.backend), Side(other, regions, words, self.backend)

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


class _Attention(nn.Module):
    """LXMERT's attention with its own matrices, over packed pairs; in the place of the context's mask it is told its `Side`."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.query, self.key, self.value = whole.query, whole.key, whole.value
        self.heads = whole.num_attention_heads

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
        if context is hidden_states:
            out = varlen_attention(q, k, v, of.bounds, max(of.lengths), causal=False, backend=of.backend)
        else:
            out = cross_attention(q, k, v, Runs(of.others, of.lengths), backend=of.backend)
        return (out.flatten(1)[None],)
