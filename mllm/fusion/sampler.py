"""InLMSampler: the language model's visual positions look at the towers' features again, between its layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mllm.fusion.splice import Fused, spliced
from mllm.lm import CausalLM, LanguageModel
from mllm.mining import SVA, CellAttention
from pipelines.types import Batch, spec

Positive = Annotated[int, Field(gt=0)]


@spec
class InLMSampler:
    """Cambrian-1's samplers inside the language model (arXiv:2406.16860, 3.2), after the connector `sva`.

    After layer `start` and every `every`-th after it, `count` in all, the hidden state of each query's position attends to its
    cell of every tower, as the queries of the connector do; the towers' matrices are the connector's. Newlines pass by, and so
    does all text. A sampler after the last layer would be none.
    """

    shares: ClassVar[bool] = False
    sees_pictures: ClassVar[bool] = False
    kind: Literal["in_lm_sampler"] = "in_lm_sampler"
    count: Positive = 10
    every: Positive = 3
    start: Annotated[int, Field(ge=0)] = 0

    @property
    def period(self) -> int:
        """Layers after which the pattern repeats."""
        return self.every

    def width(self, encoder: int, lm: int) -> int:  # noqa: ARG002 -- one signature for all fusions
        """Width of the visual tokens that it takes: the language model's."""
        return lm

    def positions(self, tokens: int) -> int:
        """Positions that a tile of `tokens` visual tokens takes: one each."""
        return tokens

    def places(self, layers: int) -> tuple[int, ...]:
        """The layers after which there is a sampler, in a language model of `layers`."""
        wanted = range(self.start, self.start + self.count * self.every, self.every)
        return tuple(layer for layer in wanted if layer + 1 < layers)

    def tiny(self) -> InLMSampler:
        """The same structure in a toy's size, of two layers."""
        return replace(self, count=1, every=1, start=0)

    def build(self, lm: CausalLM, vision_width: int, connector: SVA) -> Sampled:  # noqa: ARG002 -- as other fusions
        return Sampled(self, lm, connector)


class Sampled(Fused):
    """The samplers by the number of the layer that each follows. A tile's positions are rows of queries, a newline after each."""

    def __init__(self, spec: InLMSampler, lm: CausalLM, connector: SVA) -> None:
        super().__init__()
        self.side = connector.side
        places = spec.places(lm.arch.layers)
        self.samplers = nn.ModuleDict({str(at): CellAttention(lm.arch.hidden_size, connector) for at in places})

    def forward(
        self,
        lm: LanguageModel,
        text: Float[Tensor, "T D"],
        visual: Float[Tensor, "V D"],
        batch: Batch,
        beside: tuple[Tensor, ...],
    ) -> Float[Tensor, "T D"]:
        """`beside` are the connector's means (N, E) and cells (N, Q, W, E), one of them for each tower."""
        means, *cells = beside
        at = batch.visual.nonzero().squeeze(1) if batch.visual_count else None

        def before(number: int, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
            name = str(number - 1)
            if name not in self.samplers:
                return hidden, {}
            return self._again(self.samplers[name], hidden, at, means, cells), {}

        return lm(spliced(text, visual, batch.visual, batch.visual_count), batch, before=before)

    def _again(
        self, sampler: nn.Module, hidden: Float[Tensor, "T D"], at: Tensor | None, means: Tensor, cells: list[Tensor]
    ) -> Float[Tensor, "T D"]:
        """`hidden` with what `sampler` finds for the positions `at`; without pictures it runs all the same and adds nothing."""
        if at is None:
            queries = hidden.new_zeros(len(means), self.side**2, hidden.shape[1])
            return hidden + 0 * sampler(queries, means, cells).sum()
        rows = hidden.index_select(0, at).unflatten(0, (len(means), self.side, self.side + 1))
        queries, ends = rows.split([self.side, 1], dim=2)
        found = sampler(queries.flatten(1, 2), means, cells).unflatten(1, (self.side, self.side))
        return hidden.index_copy(0, at, torch.cat([found, ends], dim=2).flatten(0, 2).to(hidden.dtype))

    def parts(self, lm: LanguageModel) -> dict[str, list[nn.Parameter]]:
        return {**super().parts(lm), "fusion.samplers": list(self.samplers.parameters())}

    def units(self) -> list[nn.Module]:
        return list(self.samplers.values())
