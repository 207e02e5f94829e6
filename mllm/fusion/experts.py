"""RoutedExperts: image positions go through weights of their own in every layer of the language model."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mllm.fusion.opened import PROJECTIONS, Route, copied, open_layers
from mllm.fusion.splice import Fused, spliced
from mllm.lm import CausalLM, LanguageModel
from pipelines.types import Batch, spec


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


class Expert(nn.Module):
    """What image positions go through in one layer: copies of the layer's own."""

    def __init__(self, layer: Any, all_of_it: bool) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {name: copied(getattr(layer.self_attn, name)) for name in (PROJECTIONS if all_of_it else ())}
        )
        self.mlp = copied(layer.mlp)


class Routed(Fused):
    """Keeps no parameters itself: experts lie in the layers that they belong to, and are sharded and recomputed with them."""

    def __init__(self, spec: RoutedExperts) -> None:
        super().__init__()
        self.spec = spec

    def attach(self, lm: LanguageModel) -> None:
        """Give each layer its expert. Raises ValueError for layers that are not of Llama's form."""
        open_layers(lm, "routed experts")
        for layer in lm.layers:
            layer.expert = Expert(layer, self.spec.experts == "all")

    def forward(
        self, lm: LanguageModel, text: Float[Tensor, "T D"], visual: Float[Tensor, "V D"], batch: Batch
    ) -> Float[Tensor, "T D"]:
        fused = spliced(text, visual, batch.visual, batch.visual_count)
        positions, route = self.routes(batch)
        return lm(fused, batch, positions, before=lambda _, hidden: (hidden, {"route": route}))

    def routes(self, batch: Batch) -> tuple[Int[Tensor, " T"], Route]:
        """Rotary positions of a pack, and which of its positions go through experts."""
        first, last = borders(batch)
        route = route_of(self._image(batch))
        positions = batch.positions
        if self.spec.one_position:
            positions = gathered_positions(batch.visual & ~first & ~last, batch)
        return positions, route

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
