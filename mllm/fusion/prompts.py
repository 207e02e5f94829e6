"""PromptAdapter: learned prompts that a frozen language model attends to through gates that begin at zero."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mllm.fusion.splice import Fused
from mllm.lm import Beside, CausalLM, LanguageModel
from ops.attention import Backend
from ops.cross import Runs, cross_attention
from pipelines.types import Batch, spec


@spec
class PromptAdapter:
    """LLaMA-Adapter (arXiv:2303.16199, 3): `prompts` learned vectors in each layer from `first` on, and zero-init attention.

    A layer's own keys and values are taken of the prompts, every position of the document attends to them with a softmax of
    its own, and that is added times tanh of a gate, one a head, which begins at 0. The visual tokens -- one, or `prompts` of
    them for each tile -- are added to the prompts of their document, the mean over its tiles, so that all of it sees the
    picture. A picture takes one position a tile, which holds a learned mark: the paper's have none.
    """

    shares: ClassVar[bool] = False
    sees_pictures: ClassVar[bool] = True
    period: ClassVar[int] = 1
    kind: Literal["prompt_adapter"] = "prompt_adapter"
    prompts: Annotated[int, Field(gt=0)] = 10
    first: Annotated[int, Field(ge=0)] = 2

    def width(self, encoder: int, lm: int) -> int:  # noqa: ARG002 -- one signature for all fusions
        """Width of the visual tokens that it takes: the language model's."""
        return lm

    def positions(self, tokens: int) -> int:
        """Positions that a tile takes: its mark. Raises ValueError when its tokens cannot be added to the prompts."""
        if tokens not in (1, self.prompts):
            raise ValueError(
                f"fusion: {self.prompts} prompts take as many visual tokens of a tile, or one, and the connector makes {tokens}; "
                "set fusion.prompts or the connector's queries"
            )
        return 1

    def tiny(self) -> PromptAdapter:
        """The same structure in a toy's size, whose connectors have four queries."""
        return replace(self, prompts=4, first=1)

    def build(self, lm: CausalLM, vision_width: int) -> Prompted:  # noqa: ARG002 -- one signature for all fusions
        return Prompted(self, lm.arch.hidden_size, lm.arch.layers, lm.arch.heads)


class Prompted(Fused):
    """The prompts and gates by the number of their layer, and the mark that stands for an image."""

    def __init__(self, spec: PromptAdapter, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.mark = nn.Parameter(torch.randn(width) * 0.02)
        self.layers = nn.ModuleDict({str(n): Prompts(spec.prompts, width, heads) for n in range(spec.first, layers)})
        self.count = spec.prompts

    def attach(self, lm: LanguageModel) -> None:
        """Raises ValueError for layers that have no matrices of keys and values by themselves."""
        layer: Any = lm.layers[0]
        if not hasattr(getattr(layer, "self_attn", None), "k_proj"):
            raise ValueError(
                f"fusion: prompts go through a layer's own k_proj and v_proj, and {type(layer).__name__} has none; take another "
                "language model or fusion"
            )

    def forward(
        self, lm: LanguageModel, text: Float[Tensor, "T D"], visual: Float[Tensor, "V D"], batch: Batch
    ) -> Float[Tensor, "T D"]:
        text = torch.where(batch.visual.unsqueeze(1), self.mark.to(text.dtype), text)
        shown = self._shown(visual, batch)
        lengths = batch.cu_seqlens.diff().tolist()
        runs = Runs(tuple(lengths), (self.count,) * len(lengths))

        def before(number: int, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
            if str(number) not in self.layers:
                return hidden, {}
            prompts, gate = self.layers[str(number)](shown)
            return hidden, {"beside": _beside(prompts, gate, runs, lm.backend)}

        return lm(text, batch, before=before)

    def _shown(self, visual: Float[Tensor, "V D"], batch: Batch) -> Float[Tensor, "S n D"]:
        """What each document's prompts are given to see; nothing where it has no picture."""
        tiles = len(batch.tiles if batch.features is None else batch.features)
        each = visual.unflatten(0, (tiles, -1))
        if batch.visual_count not in (0, tiles):
            raise ValueError(
                f"the pack has {batch.visual_count} image positions and {tiles} tiles, of one position each; the pipeline was "
                "planned with another model: its VisionLayout must come from this model's layout()"
            )
        shown = each.new_zeros(len(batch.sources), *each.shape[1:])
        if batch.visual_count == 0:
            return shown + 0 * visual.sum()
        owner = batch.document_of_token().index_select(0, batch.visual.nonzero().squeeze(1))
        counts = torch.zeros(len(shown), device=owner.device).index_add_(0, owner, torch.ones_like(owner).float())
        return shown.index_add(0, owner, each) / counts.clamp(min=1).to(each.dtype)[:, None, None]

    def parts(self, lm: LanguageModel) -> dict[str, list[nn.Parameter]]:
        gates = [p for name, p in self.named_parameters() if name.endswith("gate")]
        return {**super().parts(lm), "fusion.gates": gates, "fusion.mark": [self.mark]}

    def units(self) -> list[nn.Module]:
        return list(self.layers.values())


class Prompts(nn.Module):
    """One layer's prompts, with what a document shows them, and its gates."""

    def __init__(self, count: int, width: int, heads: int) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(count, width) * 0.02)
        self.gate = nn.Parameter(torch.zeros(heads))

    def forward(self, shown: Float[Tensor, "S n D"]) -> tuple[Float[Tensor, "S p D"], Float[Tensor, " H"]]:
        return self.prompts + shown, self.gate.tanh()


def _beside(prompts: Tensor, gate: Tensor, runs: Runs, backend: Backend | None) -> Beside:
    """What attention to the prompts adds, of the layer's own keys and values, which have no positions."""

    def beside(attention: Any, q: Float[Tensor, "T H E"], scale: float) -> Float[Tensor, "T H E"]:
        rows = prompts.flatten(0, 1)
        k, v = (proj(rows).unflatten(1, (-1, q.shape[-1])) for proj in (attention.k_proj, attention.v_proj))
        return cross_attention(q, k, v, runs, scale=scale, backend=backend) * gate.unsqueeze(1)

    return beside
