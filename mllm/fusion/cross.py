"""CrossAttention: gated layers before those of a frozen language model look at the image that a text follows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from mllm.fusion.splice import Fused
from mllm.lm import CausalLM, LanguageModel
from ops.attention import Backend
from ops.cross import Runs, cross_attention
from pipelines.types import Batch, spec

Positive = Annotated[int, Field(gt=0)]


@spec
class CrossAttention:
    """Flamingo's gated cross-attention (arXiv:2204.14198, 2.2 and A.1.2) in the shape that OpenFlamingo trains.

    Before every `every`-th layer a block attends from the text to the visual tokens of the latest image before it in its own
    document, and passes a feed-forward layer of `feed_forward` times the width. Both enter times tanh of a gate that begins
    at 0, so that the language model begins as it was. An image takes one position a tile, which holds a learned mark.

    Where no image is seen the attention adds nothing. The published block passes such text through its feed-forward layer all
    the same (`everywhere`); without that, text alone stays what the frozen language model makes of it, for ever.
    `visual_width` is that of the visual tokens; the encoder's, if nothing is said.
    """

    shares: ClassVar[bool] = False
    sees_pictures: ClassVar[bool] = True
    kind: Literal["cross_attention"] = "cross_attention"
    every: Positive = 1
    heads: Positive = 8
    head_size: Positive = 64
    feed_forward: Positive = 4
    everywhere: bool = False
    visual_width: Positive | None = None

    @property
    def period(self) -> int:
        """Layers after which the pattern repeats."""
        return self.every

    def width(self, encoder: int, lm: int) -> int:  # noqa: ARG002 -- one signature for all fusions
        """Width of the visual tokens that it takes."""
        return self.visual_width or encoder

    def positions(self, tokens: int) -> int:  # noqa: ARG002 -- one signature for all fusions
        """Positions that a tile takes: its mark."""
        return 1

    def tiny(self) -> CrossAttention:
        """The same structure in a toy's size."""
        return replace(self, every=min(self.every, 2), heads=2, head_size=16)

    def build(self, lm: CausalLM, vision_width: int) -> CrossAttended:
        return CrossAttended(self, lm.arch.hidden_size, lm.arch.layers, vision_width)


class CrossAttended(Fused):
    """The gated blocks, by the number of the layer that each precedes, and the mark that stands for an image."""

    sees_pictures = True

    def __init__(self, spec: CrossAttention, width: int, layers: int, visual_width: int) -> None:
        super().__init__()
        self.mark = nn.Parameter(torch.randn(width) * 0.02)
        places = [number for number in range(layers) if (number + 1) % spec.every == 0]
        self.blocks = nn.ModuleDict({str(number): GatedBlock(spec, width, visual_width) for number in places})

    def forward(
        self, lm: LanguageModel, text: Float[Tensor, "T D"], visual: Float[Tensor, "V Dv"], batch: Batch
    ) -> Float[Tensor, "T D"]:
        text = torch.where(batch.visual.unsqueeze(1), self.mark.to(text.dtype), text)
        sight = sight_of(batch, len(visual))

        def before(number: int, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
            if str(number) not in self.blocks:
                return hidden, {}
            return self.blocks[str(number)](hidden, visual, sight, lm.backend), {}

        return lm(text, batch, before=before)

    def parts(self, lm: LanguageModel) -> dict[str, list[nn.Parameter]]:
        gates = [p for name, p in self.named_parameters() if name.endswith("gate")]
        return {**super().parts(lm), "fusion.gates": gates, "fusion.mark": [self.mark]}

    def units(self) -> list[nn.Module]:
        return list(self.blocks.values())


class GatedBlock(nn.Module):
    """x + tanh(gate) * attention, then x + tanh(gate) * feed-forward; no biases, LayerNorm before each."""

    def __init__(self, spec: CrossAttention, width: int, visual_width: int) -> None:
        super().__init__()
        inner = spec.heads * spec.head_size
        self.head_size = spec.head_size
        self.everywhere = spec.everywhere
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(visual_width, inner, bias=False)
        self.to_v = nn.Linear(visual_width, inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, spec.feed_forward * width, bias=False)
        self.down = nn.Linear(spec.feed_forward * width, width, bias=False)
        self.feed_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self, x: Float[Tensor, "T D"], visual: Float[Tensor, "V Dv"], sight: Sight, backend: Backend | None
    ) -> Float[Tensor, "T D"]:
        q, k, v = (
            y.unflatten(1, (-1, self.head_size))
            for y in (self.to_q(self.norm(x)), self.to_k(visual), self.to_v(visual))
        )
        attended = x + self.attention_gate.tanh() * self.to_out(told(q, k, v, sight, backend))
        fed = attended + self.feed_gate.tanh() * self.down(nn.functional.gelu(self.up(self.feed_norm(attended))))
        return fed if self.everywhere else torch.where(sight.seeing.unsqueeze(1), fed, x)


@dataclass(frozen=True, slots=True)
class Sight:
    """Which positions see an image: bool (T,), as numbers (t,), and in runs that each see the tokens of one image.

    `runs` is None where no position sees any.
    """

    seeing: Tensor
    rows: Int[Tensor, " t"]
    runs: Runs | None


def told(
    q: Float[Tensor, "T H E"],
    k: Float[Tensor, "V H E"],
    v: Float[Tensor, "V H E"],
    sight: Sight,
    backend: Backend | None,
) -> Float[Tensor, "T I"]:
    """What each position finds in the image that it sees, all heads beside one another; nothing where it sees none."""
    if sight.runs is None:  # the blank tile's keys are part of the graph and of nothing else
        seen = q[:0] + 0 * (k.sum() + v.sum())
    else:
        seen = cross_attention(q[sight.rows], k, v, sight.runs, backend=backend)
    return torch.zeros_like(q.flatten(1)).index_copy(0, sight.rows, seen.flatten(1))


def sight_of(batch: Batch, visual_tokens: int, marks: bool = True) -> Sight:
    """Who sees what in a pack of `visual_tokens`: from an image's first position on to the next image or the document's end.

    Raises ValueError when images and visual tokens do not match; with `marks`, when a tile has not one position.
    """
    device, length = batch.visual.device, len(batch.visual)
    cuts = batch.cuts[:, :2].tolist()
    if not cuts:
        return Sight(
            torch.zeros(length, dtype=torch.bool, device=device), torch.zeros(0, dtype=torch.long, device=device), None
        )
    tiles = sum(tiles for tiles, _ in cuts)
    each, rest = divmod(visual_tokens, tiles)
    marked = batch.visual_count == tiles and all(tiles == positions for tiles, positions in cuts)
    if rest or (marks and not marked):
        raise ValueError(
            f"the pack's {len(cuts)} images have {tiles} tiles at {batch.visual_count} positions, and there are {visual_tokens} "
            "visual tokens; the pipeline was planned with another model: its VisionLayout must come from this model's layout()"
        )
    places = batch.visual.nonzero().squeeze(1).tolist()
    bounds = batch.cu_seqlens.tolist()
    queries, keys, rows = [], [], []
    starts, at = [], 0
    for _, count in cuts:
        starts.append(places[at])
        at += count
    document = 0
    for number, start in enumerate(starts):
        while bounds[document + 1] <= start:
            document += 1
        following = starts[number + 1] if number + 1 < len(starts) else length
        stop = min(following, bounds[document + 1])
        queries.append(stop - start)
        keys.append(cuts[number][0] * each)
        rows.append(torch.arange(start, stop))
    found = torch.cat(rows).to(device)
    seeing = torch.zeros(length, dtype=torch.bool, device=device)
    seeing[found] = True
    return Sight(seeing, found, Runs(tuple(queries), tuple(keys)))
