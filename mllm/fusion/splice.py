"""Splice: visual tokens stand in the sequence where the image stood."""

from __future__ import annotations

from typing import ClassVar, Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mllm.lm import CausalLM, LanguageModel
from pipelines.types import Batch, spec


@spec
class Splice:
    """Visual tokens stand in the sequence where the image stood (LLaVA and most since). Nothing of its own is trained."""

    shares: ClassVar[bool] = True
    sees_pictures: ClassVar[bool] = False
    period: ClassVar[int] = 1
    kind: Literal["splice"] = "splice"

    def width(self, encoder: int, lm: int) -> int:  # noqa: ARG002 -- one signature for all fusions
        """Width of the visual tokens that it takes: the language model's."""
        return lm

    def positions(self, tokens: int) -> int:
        """Positions that a tile of `tokens` visual tokens takes: one each."""
        return tokens

    def build(self, lm: CausalLM, vision_width: int) -> Spliced:  # noqa: ARG002 -- one signature for all fusions
        return Spliced()


class Fused(nn.Module):
    """What fusions have in common: nothing attached, no parts but the whole, no units."""

    sees_pictures = False

    def attach(self, lm: LanguageModel) -> None:
        """Put into the language model what must live in its layers."""

    def parts(self, lm: LanguageModel) -> dict[str, list[nn.Parameter]]:  # noqa: ARG002 -- for what was attached
        """Parameters by the names that `Stage.tune` uses; none where nothing is trained."""
        own = list(self.parameters())
        return {"fusion": own} if own else {}

    def units(self) -> list[nn.Module]:
        """Modules to be sharded (and recomputed) one by one."""
        return []

    def words(self, ids: Int[Tensor, " T"]) -> Int[Tensor, " T"]:
        """`ids` as the language model's table knows them."""
        return ids

    def routed(self, batch: Batch) -> tuple[int, int]:  # noqa: ARG002 -- for fusions that route
        """How many positions of `batch` go through the language model's weights and through others; 0 where none chooses."""
        return 0, 0


class Spliced(Fused):
    """Merges and calls the language model."""

    def forward(
        self, lm: LanguageModel, text: Float[Tensor, "T D"], visual: Float[Tensor, "V D"], batch: Batch
    ) -> Float[Tensor, "T D"]:
        return lm(spliced(text, visual, batch.visual, batch.visual_count), batch)


def spliced(
    text: Float[Tensor, "T D"], visual: Float[Tensor, "V D"], at: Bool[Tensor, " T"], count: int
) -> Float[Tensor, "T D"]:
    """`text` with the rows marked by `at` replaced, in order, by `visual`; `count` is how many are marked.

    Without images the one blank tile's features enter times zero: the modules run on every rank, and change nothing.
    Raises ValueError when features and places do not match, since scattering anyway would misplace every later image.
    """
    if count == 0:
        return text + 0 * visual.sum()
    if count != len(visual):
        raise ValueError(
            f"the pack has {count} image positions and the encoder gave {len(visual)} visual tokens; "
            "the pipeline was planned with another model: its VisionLayout must come from this model's layout()"
        )
    return text.masked_scatter(at.unsqueeze(1), visual.to(text.dtype))
