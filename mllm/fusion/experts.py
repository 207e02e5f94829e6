"""RoutedExperts: image positions go through weights of their own in every layer of the language model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mllm.fusion.splice import Fused, spliced
from mllm.lm import CausalLM, LanguageModel, attend
from pipelines.types import Batch, spec

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@spec
class RoutedExperts:
    """CogVLM's visual expert (arXiv:2311.03079, 2.1): image positions have queries, keys, values, output and feed-forward of
    their own in every layer, which begin as the language model's. `experts` "feed_forward" is Multiway's (BEiT-3,
    arXiv:2208.10442, 2.1): attention shared, the feed-forward layer alone by modality.

    `last` says whose the last position of each run of image positions is: CogVLM's own code gives it, its mark of an image's
    end, to the language model. With `one_position` all patches of an image but its first and last stand at one rotary
    position (CogVLM, 2.2), since else they would push the text far away. Layers must be of Llama's form.
    """

    shares: ClassVar[bool] = False
    sees_pictures: ClassVar[bool] = False
    period: ClassVar[int] = 1
    kind: Literal["routed_experts"] = "routed_experts"
    experts: Literal["all", "feed_forward"] = "all"
    last: Literal["image", "text"] = "text"
    one_position: bool = True

    def width(self, encoder: int, lm: int) -> int:  # noqa: ARG002 -- one signature for all fusions
        """Width of the visual tokens that it takes: the language model's."""
        return lm

    def positions(self, tokens: int) -> int:
        """Positions that a tile of `tokens` visual tokens takes: one each."""
        return tokens

    def build(self, lm: CausalLM, vision_width: int) -> Routed:  # noqa: ARG002 -- one signature for all fusions
        return Routed(self)


@dataclass(frozen=True, slots=True)
class Route:
    """Positions by the weights that they go through, both int64, and where each position is found behind one another."""

    text: Int[Tensor, " t"]
    image: Int[Tensor, " v"]
    back: Int[Tensor, " T"]

    def __call__(
        self, x: Float[Tensor, "1 T D"], base: Callable[[Tensor], Tensor], expert: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "1 T F"]:
        """`base` of text positions and `expert` of image positions. Both run whatever there is: an empty part has gradients."""
        rows = x.squeeze(0)
        return torch.cat([base(rows[self.text]), expert(rows[self.image])])[self.back].unsqueeze(0)


class Expert(nn.Module):
    """What image positions go through in one layer: copies of the layer's own."""

    def __init__(self, layer: Any, all_of_it: bool) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {name: _copied(getattr(layer.self_attn, name)) for name in (PROJECTIONS if all_of_it else ())}
        )
        self.mlp = _copied(layer.mlp)


def _copied(module: nn.Module) -> nn.Module:
    """`module` with parameters of its own, which tensors without memory can have too."""
    return copy.deepcopy(module, {id(p): nn.Parameter(p.detach().clone()) for p in module.parameters()})


class Routed(Fused):
    """Keeps no parameters itself: experts lie in the layers that they belong to, and are sharded and recomputed with them."""

    def __init__(self, spec: RoutedExperts) -> None:
        super().__init__()
        self.spec = spec

    def attach(self, lm: LanguageModel) -> None:
        """Give each layer its expert. Raises ValueError for layers that are not of Llama's form."""
        for layer in lm.layers:
            if type(layer).__name__ not in ("LlamaDecoderLayer", "Qwen2DecoderLayer", "MistralDecoderLayer"):
                raise ValueError(
                    f"fusion: routed experts know layers of Llama's form, and these are {type(layer).__name__}; take a llama, "
                    "qwen2 or mistral as the language model"
                )
            layer.expert = Expert(layer, self.spec.experts == "all")
            layer.__class__ = _routed(type(layer))

    def forward(
        self, lm: LanguageModel, text: Float[Tensor, "T D"], visual: Float[Tensor, "V D"], batch: Batch
    ) -> Float[Tensor, "T D"]:
        fused = spliced(text, visual, batch.visual, batch.visual_count)
        first, last = borders(batch)
        route = route_of(self._image(batch))
        positions = batch.positions
        if self.spec.one_position:
            positions = gathered_positions(batch.visual & ~first & ~last, batch)
        return lm(fused, batch, positions, before=lambda _, hidden: (hidden, {"route": route}))

    def _image(self, batch: Batch) -> Tensor:
        return batch.visual & ~borders(batch)[1] if self.spec.last == "text" else batch.visual

    def routed(self, batch: Batch) -> tuple[int, int]:
        image = int(self._image(batch).sum())
        return len(batch.visual) - image, image

    def parts(self, lm: LanguageModel) -> dict[str, list[nn.Parameter]]:
        experts: list[Any] = [getattr(layer, "expert") for layer in lm.layers]  # noqa: B009 -- what attach put there
        own = [p for expert in experts for p in expert.parameters()]
        return {"fusion": own, "fusion.experts": own}


def route_of(image: Tensor) -> Route:
    """The route of a pack whose `image` positions, bool (T,), go through experts."""
    to_text, to_image = (~image).nonzero().squeeze(1), image.nonzero().squeeze(1)
    return Route(to_text, to_image, torch.cat([to_text, to_image]).argsort())


def borders(batch: Batch) -> tuple[Tensor, Tensor]:
    """The first and the last positions, bool (T,) each, of runs of image positions within a document.

    A run ends with its document; pictures that follow one another at once are one run, as in CogVLM's own masks.
    """
    starts = batch.positions == 0
    before = batch.visual.roll(1) & ~starts
    after = batch.visual.roll(-1) & ~starts.roll(-1)
    return batch.visual & ~before, batch.visual & ~after


def gathered_positions(inside: Tensor, batch: Batch) -> Int[Tensor, " T"]:
    """Rotary positions where those `inside` an image, bool (T,), share one: only the first of a run moves on."""
    steps = (~(inside & inside.roll(1)) | (batch.positions == 0)).long().cumsum(0)
    return steps - steps[batch.cu_seqlens.long()[batch.document_of_token()]]


@cache
def _routed(kind: type) -> type:
    """The decoder layer `kind` of transformers whose image positions go through `self.expert`."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    class RoutedLayer(kind):
        def forward(
            self,
            hidden_states: Tensor,
            position_embeddings: tuple[Tensor, Tensor],
            route: Route,
            **words: Any,
        ) -> Tensor:
            attention, expert = self.self_attn, self.expert
            x = self.input_layernorm(hidden_states)
            mine = expert.attention if len(expert.attention) else {n: getattr(attention, n) for n in PROJECTIONS}
            q, k, v = (
                route(x, getattr(attention, name), mine[name]).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                for name in PROJECTIONS[:3]
            )
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
            out, _ = attend(attention, q, k, v, scaling=attention.scaling, **words)
            hidden_states = hidden_states + route(out.flatten(2), attention.o_proj, mine["o_proj"])
            x = self.post_attention_layernorm(hidden_states)
            return hidden_states + route(x, self.mlp, expert.mlp)

    RoutedLayer.__name__ = f"Routed{kind.__name__}"
    return RoutedLayer
