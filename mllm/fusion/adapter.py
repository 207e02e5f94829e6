"""PreLMAdapter: a small gated adapter before a frozen language model."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mllm.fusion.splice import Fused, spliced
from mllm.lm import CausalLM, LanguageModel
from pipelines.types import Batch, spec


@spec
class PreLMAdapter:
    """CROME's adapter (arXiv:2408.06610, 3.2): two gated branches, visual and text, with one matrix up between them.

    z = (x W_d) * SiLU(x W_g) is `hidden` wide, y = x + z W_u; W_d and W_g are each branch's own, W_u is shared and begins at
    0, so that the adapter begins as the identity. Which linear SiLU is on, and that beginning, are this project's reading.

    The paper leaves open what the text branch is given. `text` says it: "queries", the first `queries` visual tokens of each
    tile -- a Q-Former's that has read the instruction -- while the others take the visual branch; or "embeddings", the text
    of documents with pictures, while all visual tokens take the visual branch. Text without pictures passes by both.
    """

    sees_pictures: ClassVar[bool] = False
    period: ClassVar[int] = 1
    kind: Literal["pre_lm_adapter"] = "pre_lm_adapter"
    hidden: Annotated[int, Field(gt=0)] = 256
    text: Literal["queries", "embeddings"] = "embeddings"
    queries: Annotated[int, Field(gt=0)] = 32

    @property
    def shares(self) -> bool:
        """Whether ranks may share packs: not where a tile's tokens must stay together to be told apart."""
        return self.text != "queries"

    def width(self, encoder: int, lm: int) -> int:  # noqa: ARG002 -- one signature for all fusions
        """Width of the visual tokens that it takes: the language model's."""
        return lm

    def positions(self, tokens: int) -> int:
        """Positions that a tile of `tokens` visual tokens takes: one each. Raises ValueError where queries leave none over."""
        if self.text == "queries" and tokens <= self.queries:
            raise ValueError(
                f"fusion: the first {self.queries} visual tokens of a tile are queries, and the connector makes {tokens}; take "
                "one that joins queries and patches, or text='embeddings'"
            )
        return tokens

    def tiny(self) -> PreLMAdapter:
        """The same structure in a toy's size, whose connectors have four queries."""
        return replace(self, hidden=16, queries=4)

    def build(self, lm: CausalLM, vision_width: int) -> PreLMAdapted:  # noqa: ARG002 -- one signature for all fusions
        return PreLMAdapted(self, lm.arch.hidden_size)


class PreLMAdapted(Fused):
    """The adapter: 5 * width * hidden parameters."""

    def __init__(self, spec: PreLMAdapter, width: int) -> None:
        super().__init__()
        self.queries = spec.queries if spec.text == "queries" else None
        self.visual, self.text = (Branch(width, spec.hidden) for _ in range(2))
        self.up = nn.Linear(spec.hidden, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(
        self, lm: LanguageModel, text: Float[Tensor, "T D"], visual: Float[Tensor, "V D"], batch: Batch
    ) -> Float[Tensor, "T D"]:
        if self.queries is None:
            adapted = text + self.up(self.text(text))
            beside = batch.pictured[batch.document_of_token()]
            text = torch.where(beside.unsqueeze(1), adapted, text)
            visual = visual + self.up(self.visual(visual))
        else:
            tiles = len(batch.tiles if batch.features is None else batch.features)
            asked, seen = visual.unflatten(0, (tiles, -1)).tensor_split([self.queries], dim=1)
            joined = torch.cat([asked + self.up(self.text(asked)), seen + self.up(self.visual(seen))], dim=1)
            visual = joined.flatten(0, 1)
        return lm(spliced(text, visual, batch.visual, batch.visual_count), batch)

    def parts(self, lm: LanguageModel) -> dict[str, list[nn.Parameter]]:
        return {**super().parts(lm), "fusion.adapter": list(self.parameters())}


class Branch(nn.Module):
    """z = (x W_d) * SiLU(x W_g)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n M"]:
        return self.down(x) * nn.functional.silu(self.gate(x))
