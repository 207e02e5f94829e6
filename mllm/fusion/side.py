"""SideAttention: a tower of high resolution beside the sequence, at which every layer of the language model looks."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mllm.fusion.cross import Sight, sight_of, told
from mllm.fusion.experts import Routed, RoutedExperts
from mllm.fusion.opened import copied, open_layers
from mllm.fusion.splice import Fused, spliced
from mllm.lm import CausalLM, LanguageModel
from ops.attention import Backend
from pipelines.types import Batch, spec

Positive = Annotated[int, Field(gt=0)]


@spec
class SideAttention:
    """CogAgent's high-resolution cross module (arXiv:2312.08914, 2.2): attention of `hidden` channels in every layer.

    Of two towers the first goes through the connector and stands in the sequence; between attention and feed-forward of each
    layer all positions from a picture's first on, to the next picture or the document's end, attend to the second one's
    features, with a norm of its own before. What stands before a picture, as the first token, sees nothing here; in the released
    code it does. The matrix back begins at zero, so that the model begins as it was without: this project's choice. Layers must
    be of Llama's form; `experts` are CogVLM's, on which CogAgent is built.
    """

    shares: ClassVar[bool] = False
    sees_pictures: ClassVar[bool] = True
    period: ClassVar[int] = 1
    kind: Literal["side_attention"] = "side_attention"
    hidden: Positive = 1024
    heads: Positive = 32
    experts: RoutedExperts | None = None

    def width(self, encoder: int, lm: int) -> int:  # noqa: ARG002 -- one signature for all fusions
        """Width of the visual tokens that it takes: the language model's."""
        return lm

    def positions(self, tokens: int) -> int:
        """Positions that a tile of `tokens` visual tokens takes: one each."""
        return tokens

    def tiny(self) -> SideAttention:
        """The same structure in a toy's size."""
        return replace(self, hidden=16, heads=4)

    def build(self, lm: CausalLM, vision_width: int, side_width: int) -> Sided:
        """`side_width` is that of the second tower's features."""
        return Sided(self, lm, vision_width, side_width)


class Sided(Fused):
    """Keeps no parameters itself: what it adds lies in the layers that it belongs to, and is sharded and recomputed with them."""

    sees_pictures = True

    def __init__(self, spec: SideAttention, lm: CausalLM, vision_width: int, side_width: int) -> None:
        super().__init__()
        self.spec = spec
        self.side_width = side_width
        self.experts: Routed | None = None if spec.experts is None else spec.experts.build(lm, vision_width)

    def attach(self, lm: LanguageModel) -> None:
        """Give each layer its attention aside. Raises ValueError for layers that are not of Llama's form."""
        if self.experts is None:
            open_layers(lm, "attention aside")
        else:
            self.experts.attach(lm)
        layers: Any = lm.layers
        for layer in layers:
            layer.side = Side(self.spec, lm.width, self.side_width, layer.post_attention_layernorm)

    def forward(
        self,
        lm: LanguageModel,
        text: Float[Tensor, "T D"],
        visual: Float[Tensor, "V D"],
        batch: Batch,
        beside: tuple[Tensor, ...],
    ) -> Float[Tensor, "T D"]:
        """`beside` are the second tower's features (N, P, E)."""
        fused = spliced(text, visual, batch.visual, batch.visual_count)
        features = beside[0].flatten(0, 1)
        words: dict[str, Any] = {"aside": (features, sight_of(batch, len(features), marks=False), lm.backend)}
        positions = None
        if self.experts is not None:
            positions, words["route"] = self.experts.routes(batch)
        return lm(fused, batch, positions, before=lambda _, hidden: (hidden, words))

    def routed(self, batch: Batch) -> tuple[int, int]:
        return (0, 0) if self.experts is None else self.experts.routed(batch)

    def parts(self, lm: LanguageModel) -> dict[str, list[nn.Parameter]]:
        sides: list[Any] = [getattr(layer, "side") for layer in lm.layers]  # noqa: B009 -- what attach put there
        own = [p for side in sides for p in side.parameters()]
        others = {} if self.experts is None else self.experts.parts(lm)
        return {**others, "fusion": [*others.get("fusion", []), *own], "fusion.side": own}


class Side(nn.Module):
    """One layer's attention to the side tower; no biases."""

    def __init__(self, spec: SideAttention, width: int, side_width: int, norm: nn.Module) -> None:
        super().__init__()
        self.heads = spec.heads
        self.norm = copied(norm)
        self.query = nn.Linear(width, spec.hidden, bias=False)
        self.key_value = nn.Linear(side_width, 2 * spec.hidden, bias=False)
        self.out = nn.Linear(spec.hidden, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(
        self, hidden: Float[Tensor, "1 T D"], features: Float[Tensor, "V E"], sight: Sight, backend: Backend | None
    ) -> Float[Tensor, "1 T D"]:
        q, k, v = (
            x.unflatten(1, (self.heads, -1))
            for x in (self.query(self.norm(hidden).squeeze(0)), *self.key_value(features).chunk(2, dim=1))
        )
        return self.out(told(q, k, v, sight, backend)).unsqueeze(0)
