"""CrossAttention: gated layers before those of a frozen language model look at the image that a text follows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
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

    `first` is the layer that the first block precedes, the last of the first `every` if nothing is said. `block` is the form of
    the blocks: OpenFlamingo's LayerNorm and GELU, or those of Idefics (arXiv:2306.16527; transformers), which are of the same
    form as the language model's own layers: RMSNorm and a SwiGLU, both of its sizes. `qk_norm` norms each head's queries and
    keys in the same way; `gates` are one number for a branch, or one for each of its channels. With `around` another learned mark
    stands before and behind each image, and one between neighbours (Idefics' `<fake_token_around_image>`); an image is seen from
    its own mark on.
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
    first: Annotated[int, Field(ge=0)] | None = None
    block: Literal["flamingo", "idefics"] = "flamingo"
    qk_norm: bool = False
    gates: Literal["scalar", "vector"] = "scalar"
    around: bool = False

    def __post_init__(self) -> None:
        if self.first is not None and self.first >= self.every:
            raise ValueError(
                f"fusion.first={self.first}: every {self.every} layers have a block, so the first precedes layer 0 to "
                f"{self.every - 1}; take one of those"
            )

    @property
    def period(self) -> int:
        """Layers after which the pattern repeats."""
        return self.every

    def width(self, encoder: int, lm: int) -> int:  # noqa: ARG002 -- one signature for all fusions
        """Width of the visual tokens that it takes."""
        return self.visual_width or encoder

    def positions(self, tokens: int) -> int:  # noqa: ARG002 -- one signature for all fusions
        """Positions that a tile takes: its mark. Those around an image are the layout's."""
        return 1

    def tiny(self) -> CrossAttention:
        """The same structure in a toy's size."""
        every = min(self.every, 2)
        first = None if self.first is None else min(self.first, every - 1)
        if self.block == "idefics":  # heads are the language model's, of which a toy has four
            return replace(self, every=every, first=first, heads=4, head_size=16)
        return replace(self, every=every, first=first, heads=2, head_size=16)

    def build(self, lm: CausalLM, vision_width: int) -> CrossAttended:
        return CrossAttended(self, lm, vision_width)


class CrossAttended(Fused):
    """The gated blocks, by the number of the layer that each precedes, and the marks that stand for an image and around it."""

    sees_pictures = True

    def __init__(self, spec: CrossAttention, lm: CausalLM, visual_width: int) -> None:
        super().__init__()
        self.mark = nn.Parameter(torch.randn(lm.arch.hidden_size) * 0.02)
        self.around = nn.Parameter(torch.randn(lm.arch.hidden_size) * 0.02) if spec.around else None
        first = spec.every - 1 if spec.first is None else spec.first
        places = range(first, lm.arch.layers, spec.every)
        self.blocks = nn.ModuleDict({str(number): GatedBlock(spec, lm, visual_width) for number in places})

    def forward(
        self, lm: LanguageModel, text: Float[Tensor, "T D"], visual: Float[Tensor, "V Dv"], batch: Batch
    ) -> Float[Tensor, "T D"]:
        text = torch.where(batch.visual.unsqueeze(1), self.mark.to(text.dtype), text)
        if self.around is not None:
            text = torch.where(around_of(batch).unsqueeze(1), self.around.to(text.dtype), text)
        sight = sight_of(batch, len(visual), around=self.around is not None)

        def before(number: int, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
            if str(number) not in self.blocks:
                return hidden, {}
            return self.blocks[str(number)](hidden, visual, sight, lm.backend), {}

        return lm(text, batch, before=before)

    def parts(self, lm: LanguageModel) -> dict[str, list[nn.Parameter]]:
        gates = [p for name, p in self.named_parameters() if name.endswith("gate")]
        marks = [self.mark] if self.around is None else [self.mark, self.around]
        return {**super().parts(lm), "fusion.gates": gates, "fusion.mark": marks}

    def units(self) -> list[nn.Module]:
        return list(self.blocks.values())


class GatedBlock(nn.Module):
    """x + tanh(gate) * attention, then x + tanh(gate) * feed-forward; no biases, a norm before each."""

    def __init__(self, spec: CrossAttention, lm: CausalLM, visual_width: int) -> None:
        super().__init__()
        width, inner = lm.arch.hidden_size, spec.heads * spec.head_size
        gates = 1 if spec.gates == "scalar" else width
        self.head_size = spec.head_size
        self.everywhere = spec.everywhere
        self.norm = _norm(spec, lm, width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(visual_width, inner, bias=False)
        self.to_v = nn.Linear(visual_width, inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        self.norm_q, self.norm_k = (
            _norm(spec, lm, spec.head_size) if spec.qk_norm else nn.Identity() for _ in range(2)
        )
        self.attention_gate = nn.Parameter(torch.zeros(gates))
        self.feed_norm = _norm(spec, lm, width)
        hidden = lm.arch.intermediate_size if spec.block == "idefics" else spec.feed_forward * width
        self.up = nn.Linear(width, hidden, bias=False)
        self.up_gate = nn.Linear(width, hidden, bias=False) if spec.block == "idefics" else None
        self.down = nn.Linear(hidden, width, bias=False)
        self.feed_gate = nn.Parameter(torch.zeros(gates))

    def forward(
        self, x: Float[Tensor, "T D"], visual: Float[Tensor, "V Dv"], sight: Sight, backend: Backend | None
    ) -> Float[Tensor, "T D"]:
        q, k, v = (
            y.unflatten(1, (-1, self.head_size))
            for y in (self.to_q(self.norm(x)), self.to_k(visual), self.to_v(visual))
        )
        seen = told(self.norm_q(q), self.norm_k(k), v, sight, backend)
        attended = x + self.attention_gate.tanh() * self.to_out(seen)
        fed = attended + self.feed_gate.tanh() * self.down(self._fed(self.feed_norm(attended)))
        return fed if self.everywhere else torch.where(sight.seeing.unsqueeze(1), fed, x)

    def _fed(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T F"]:
        if self.up_gate is None:
            return nn.functional.gelu(self.up(x))
        return nn.functional.silu(self.up_gate(x)) * self.up(x)


def _norm(spec: CrossAttention, lm: CausalLM, width: int) -> nn.Module:
    """A norm of the block's form; RMSNorm is as careful as the language model's."""
    if spec.block == "flamingo":
        return nn.LayerNorm(width)
    return nn.RMSNorm(width, eps=getattr(lm.arch, "norm_eps", 1e-6))


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


def around_of(batch: Batch) -> Bool[Tensor, " T"]:
    """Positions of the marks around images: one behind each, and one before it where no other image ends there."""
    tiles, positions = batch.cuts[:, 0].long(), batch.cuts[:, 1].long()
    owner = torch.arange(len(positions), device=positions.device).repeat_interleave(positions)
    place = torch.arange(len(owner), device=owner.device) - (positions.cumsum(0) - positions)[owner]
    before = (positions - tiles - 1)[owner]
    marks = (place < before) | (place >= before + tiles[owner])
    return torch.zeros_like(batch.visual).masked_scatter(batch.visual, marks)


def sight_of(batch: Batch, visual_tokens: int, marks: bool = True, around: bool = False) -> Sight:
    """Who sees what in a pack of `visual_tokens`: from an image's first position on to the next image or the document's end.

    Raises ValueError when images and visual tokens do not match; with `marks`, when a tile has not one position, `around` those
    of `around_of`, the first of which sees the image before.
    """
    device, length = batch.visual.device, len(batch.visual)
    # Frames that are read together with the one before them have no positions, and no tokens of their own.
    cuts = [(tiles, positions) for tiles, positions in batch.cuts[:, :2].tolist() if positions]
    if not cuts:
        return Sight(
            torch.zeros(length, dtype=torch.bool, device=device), torch.zeros(0, dtype=torch.long, device=device), None
        )
    tiles = sum(tiles for tiles, _ in cuts)
    each, rest = divmod(visual_tokens, tiles)
    more = (1, 2) if around else (0,)
    marked = batch.visual_count == sum(positions for _, positions in cuts)
    marked = marked and all(positions - tiles in more for tiles, positions in cuts)
    if rest or (marks and not marked):
        raise ValueError(
            f"the pack's {len(cuts)} images have {tiles} tiles at {batch.visual_count} positions, and there are {visual_tokens} "
            "visual tokens; the pipeline was planned with another model: its VisionLayout must come from this model's layout()"
        )
    places = batch.visual.nonzero().squeeze(1).tolist()
    bounds = batch.cu_seqlens.tolist()
    queries, keys, rows = [], [], []
    starts, at = [], 0
    for tiles, count in cuts:
        starts.append(places[at + (count - tiles - 1 if around else 0)])
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
