"""Floating-point operations of a step, counted on the model itself.

    cost = cost_of(model, objective, layout, "full")     one forward and backward on tensors without memory
    cost.model_flops(work_of(pack))                       what the mathematics of a pack asks
    cost.hardware_flops(work_of(pack))                    what is computed for it

Model FLOPs are those of PaLM's MFU (arXiv:2204.02311, B): nothing that is computed again counts, nor what a mask hides. Which
of a product's three parts -- forward, gradient by input, gradient by weight -- are needed is not reckoned but seen: autograd
runs them, under the model's own `requires_grad`. Only products of matrices and convolutions count, a multiplication and an
addition being two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mllm.counting import Shapes
from mllm.objectives import DPO, Objective, language
from mllm.recipe import Recompute
from mllm.vlm import VisionLanguageModel
from ops.losses import TokenLosses, linear_cross_entropy
from pipelines.types import IMAGE_TOKEN, NOT_LEARNED, Batch, Branch, Cut, Pack, VisionLayout, spec

TOKENS, TILES, LEARNED, DOCUMENTS = (1_000_003, 1_000_033), (1009, 1013), (101, 103, 107, 109), (13, 17, 19, 23, 29)
"""Sizes of the pack that is counted: primes, the first of each that divides no size of the model. A size that only comes about on
the way, such as a tile's features and a connector's queries together, may be a multiple all the same: then others are tried.
"""

TURNS = 3
"""How often."""


Grows = Literal["tiles", "tokens", "pairs", "learned", "shown", "documents", "text", "image"]
"""`shown`: positions times the tiles that they look at beside their own document. `text` and `image`: positions that a fusion
leads through weights of their own."""


@spec
class Work:
    """What a pack asks of a model: tiles, positions, pairs of positions that see each other, positions with loss.

    `shown` are pairs of a position and a tile of the latest picture before it in its document. `blanks` are tiles that no pack
    has and the model sees all the same: one in each pack without pictures.
    """

    tiles: int = 0
    tokens: int = 0
    pairs: int = 0
    learned: int = 0
    blanks: int = 0
    shown: int = 0
    documents: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            tiles=self.tiles + other.tiles,
            tokens=self.tokens + other.tokens,
            pairs=self.pairs + other.pairs,
            learned=self.learned + other.learned,
            blanks=self.blanks + other.blanks,
            shown=self.shown + other.shown,
            documents=self.documents + other.documents,
        )


def work_of(pack: Pack) -> Work:
    """A pack's work under a causal mask: of a document of n positions, n (n + 1) / 2 pairs are seen."""
    lengths = np.diff(pack.cu_seqlens.astype(np.int64))
    tiles = len(pack.tiles if pack.features is None else pack.features)
    return Work(
        tiles=tiles,
        tokens=len(pack.input_ids),
        pairs=int((lengths * (lengths + 1) // 2).sum()),
        learned=pack.learned,
        blanks=int(tiles == 0),
        shown=_shown(pack),
        documents=len(lengths),
    )


def _shown(pack: Pack) -> int:
    """Positions from each picture's first on to the next picture or its document's end, times its tiles."""
    places = np.flatnonzero(pack.input_ids == IMAGE_TOKEN)
    if not len(places):
        return 0
    cuts = pack.cuts[pack.cuts[:, 1] > 0]  # frames that are read together with others are seen with them
    counts = cuts[:, 1].astype(np.int64)
    starts = places[np.cumsum(counts) - counts]
    stops = pack.cu_seqlens[np.searchsorted(pack.cu_seqlens, starts, side="right")]
    following = np.append(starts[1:], len(pack.input_ids))
    return int(((np.minimum(following, stops) - starts) * cuts[:, 0]).sum())


@spec
class Flops:
    """FLOPs of one tile, one position, one pair of positions that see each other, one position with loss, ..."""

    per_tile: float
    per_token: float
    per_pair: float
    per_learned: float
    per_shown: float = 0.0
    per_document: float = 0.0

    def of(self, work: Work) -> float:
        """FLOPs of `work`, without its blanks."""
        return (
            self.per_tile * work.tiles
            + self.per_token * work.tokens
            + self.per_pair * work.pairs
            + self.per_learned * work.learned
            + self.per_shown * work.shown
            + self.per_document * work.documents
        )

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            per_tile=self.per_tile + other.per_tile,
            per_token=self.per_token + other.per_token,
            per_pair=self.per_pair + other.per_pair,
            per_learned=self.per_learned + other.per_learned,
            per_shown=self.per_shown + other.per_shown,
            per_document=self.per_document + other.per_document,
        )


@spec
class Cost:
    """FLOPs of training on a pack: what the mathematics needs, and what is computed."""

    model: Flops
    hardware: Flops

    def model_flops(self, work: Work) -> float:
        return self.model.of(work)

    def hardware_flops(self, work: Work) -> float:
        return self.hardware.of(work) + max(0.0, self.hardware.per_tile) * work.blanks

    def __add__(self, other: Cost) -> Cost:
        return Cost(model=self.model + other.model, hardware=self.hardware + other.hardware)


def cost_of(
    model: VisionLanguageModel,
    objective: Objective,
    layout: VisionLayout,
    recompute: Recompute = "none",
    patches: int | None = None,
    cut: Cut | None = None,
) -> Cost:
    """Count a forward and a backward of `model`, a module on the meta device whose `requires_grad` says what is trained.

    `patches` are those of a tile where its features come with the pack, and the encoder does not run. `cut` is how a picture
    lies in tiles, one tile each if it is not told. Hardware FLOPs have
    each unit's forward again where `recompute` is "full"; "selective" keeps all that is counted here. They also have the
    scores that attention's backward computes again (arXiv:2205.14135, 3: five products for four). Both take an attention
    kernel for one that passes over what is masked. Raises ValueError where a product grows with something else than tiles,
    positions, pairs or learned positions.
    """
    return _tried(partial(_counted, model, objective, layout, recompute, patches, _cut(cut, layout)))


def reference_cost(
    model: VisionLanguageModel, layout: VisionLayout, patches: int | None = None, cut: Cut | None = None
) -> Cost:
    """The same of a forward alone, which tells the loss of each learned position: what a reference like `model` is asked."""
    return _tried(partial(_counted, model, None, layout, "none", patches, _cut(cut, layout)))


def _cut(cut: Cut | None, layout: VisionLayout) -> Cut:
    return cut or Cut(height=layout.tile, width=layout.tile, rows=1, cols=1, canvas=(layout.tile, layout.tile))


def _tried(count: Callable[[int], Cost]) -> Cost:
    for turn in range(TURNS - 1):
        with suppress(_UnplacedError):
            return count(turn)
    return count(TURNS - 1)


class _UnplacedError(ValueError):
    """A product that grows with what no size tells, or seems to."""


def _counted(
    model: VisionLanguageModel,
    objective: Objective | None,
    layout: VisionLayout,
    recompute: Recompute,
    patches: int | None,
    cut: Cut,
    turn: int,
) -> Cost:
    """One turn; without an objective, of a forward that nobody learns from."""
    sizes = {size for parameter in model.parameters() for size in parameter.shape}
    tokens, tiles = (_free(primes, sizes) for primes in (TOKENS, TILES))
    routed = model.fusion.routed(_batch(model, layout, tokens, tiles, LEARNED[0], DOCUMENTS[0], patches, cut))
    sizes |= set(routed)
    learned, documents = (_free(primes[turn:] + primes[:turn], sizes) for primes in (LEARNED, DOCUMENTS))
    batch = _batch(model, layout, tokens, tiles, learned, documents, patches, cut)
    count = _Count(tokens, tiles, learned, documents, cut.tiles, routed)
    with _computed_again(model, count) if recompute == "full" else ExitStack(), _read_again(count), count:
        if objective is None:
            with torch.no_grad():
                linear_cross_entropy(model(batch), model.lm.head, batch.labels)
        else:
            learned_by: Any = objective
            sum_ = learned_by(model, _compared(batch) if isinstance(objective, DPO) else batch).sum
            count.backward = True
            sum_.backward()
    for parameter in model.parameters():
        parameter.grad = None
    a_tile = layout.tokens(cut) / cut.tiles
    return Cost(model=count.needed.flops(a_tile), hardware=count.computed.flops(a_tile))


def _compared(batch: Batch) -> Batch:
    """The batch's first two documents as a pair of answers, of which a reference has said something."""
    branches = torch.zeros_like(batch.branches)
    branches[0], branches[1] = Branch.PREFERRED, Branch.REJECTED
    return replace(batch, branches=branches, references=torch.zeros(len(branches), 2))


def _free(primes: tuple[int, ...], sizes: set[int]) -> int:
    return next(prime for prime in primes if all(size % prime for size in sizes if size))


def _batch(
    model: VisionLanguageModel,
    layout: VisionLayout,
    tokens: int,
    pictures: int,
    learned: int,
    documents: int,
    patches: int | None,
    cut: Cut,
) -> Batch:
    """One document and some that are empty, every number of it of its own size. Whole numbers are real; what is large is on the
    meta device. Where a fusion tells pictures apart, they are one picture of many tiles."""
    each, tiles = layout.tokens(cut), pictures * cut.tiles
    positions = pictures * each
    cuts = [(cut.tiles, each, *cut.numbers)] * pictures
    if model.fusion.sees_pictures:
        positions -= (2 * pictures - 1) * layout.around  # as if one stood before it, so that every position sees it
        cuts = [(tiles, positions, *cut.numbers)]
    visual = min(positions, tokens)
    labels = torch.full((tokens,), NOT_LEARNED)
    labels[:learned] = 0
    features = None
    if patches is not None:
        assert isinstance(model.feature_width, int)  # features come with a pack from one tower
        features = torch.zeros(tiles, patches, model.feature_width, dtype=torch.bfloat16, device="meta")
    return Batch(
        input_ids=torch.zeros(tokens, dtype=torch.long),
        labels=labels,
        positions=torch.arange(tokens),
        visual=torch.arange(tokens) < visual,
        visual_count=positions,
        cu_seqlens=torch.tensor([0, *[tokens] * documents], dtype=torch.int32),
        max_seqlen=tokens,
        sources=torch.zeros(documents, dtype=torch.long),
        branches=torch.zeros(documents, dtype=torch.int8),
        classes=torch.full((documents,), -1),
        weights=torch.ones(documents),
        pictured=torch.ones(documents, dtype=torch.bool),
        tiles=torch.zeros(tiles, *layout.shape, dtype=torch.uint8, device="meta"),
        cuts=torch.tensor(cuts, dtype=torch.int32),
        features=features,
    )


class _Sums:
    """FLOPs by what they grow with."""

    def __init__(self, sizes: dict[Grows, int]) -> None:
        self.sizes = sizes
        self.sums: dict[Grows, float] = dict.fromkeys(get_args(Grows), 0.0)

    def flops(self, a_tile: float) -> Flops:
        """By one of each; a tile has `a_tile` positions, and each of them is no text."""
        one = {what: self.sums[what] / size if size else 0.0 for what, size in self.sizes.items()}
        return Flops(
            per_tile=one["tiles"] + a_tile * (one["image"] - one["text"]),
            per_token=one["tokens"] + one["text"],
            per_pair=one["pairs"],
            per_learned=one["learned"],
            per_shown=one["shown"],
            per_document=one["documents"],
        )


class _Count(TorchDispatchMode):
    """Counts products as torch's own formulas do, with what they grow with: a prime size shows in their number.

    What is on the meta device stays there and draws the rest after it; whole numbers alone are computed for real.
    """

    def __init__(
        self, tokens: int, pictures: int, learned: int, documents: int, each: int, routed: tuple[int, int]
    ) -> None:
        super().__init__()
        self.shapes = Shapes()
        self.primes = {"tokens": tokens, "tiles": pictures, "learned": learned, "documents": documents}
        self.routed: dict[Grows, int] = {"text": routed[0], "image": routed[1]}
        sizes: dict[Grows, int] = {
            "tiles": pictures * each,
            "tokens": tokens,
            "pairs": tokens**2,
            "learned": learned,
            "shown": tokens * pictures * each,
            "documents": documents,
            **self.routed,
        }
        self.needed, self.computed = _Sums(sizes), _Sums(sizes)
        self.backward = False
        self.again = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, flops = self.shapes(func, args, kwargs or {})
        if flops:
            self._add(func, flops, self._grows_with(func, flops))
        return result

    def _add(self, func: Any, flops: int, what: Grows) -> None:
        if not self.again:
            self.needed.sums[what] += flops
        # Products of activations by activations are attention's; its backward makes the scores once more.
        scores = self.backward and not self.again and func._overloadpacket is torch.ops.aten.bmm
        self.computed.sums[what] += flops * 5 / 4 if scores else flops

    def _grows_with(self, func: Any, flops: int) -> Grows:
        powers = {name: _power(flops, prime) for name, prime in self.primes.items()}
        match tuple(powers.values()):
            case (0, 1, 0, 0):
                return "tiles"
            case (1, 0, 0, 0):
                return "tokens"
            case (2, 0, 0, 0):
                return "pairs"
            case (0, 0, 1, 0):
                return "learned"
            case (1, 1, 0, 0):
                return "shown"
            case (0, 0, 0, 1):
                return "documents"
        for what, rows in self.routed.items():
            if rows and flops % rows == 0:
                return what
        grown = ", ".join(f"{name} to the power of {power}" for name, power in powers.items() if power) or "nothing"
        raise _UnplacedError(
            f"{func} makes {flops:,} operations that grow with {grown}; this counter knows products that grow with tiles, "
            "tokens, pairs of tokens, learned tokens or documents, so give it a place for this one"
        )


def _power(number: int, prime: int) -> int:
    power = 0
    while number and number % prime == 0:
        number //= prime
        power += 1
    return power


@contextmanager
def _computed_again(model: VisionLanguageModel, count: _Count) -> Iterator[None]:
    """Each unit's forward runs again in the backward, as the engine's recomputation does, and is marked there."""

    @contextmanager
    def marked() -> Iterator[None]:
        count.again = True
        try:
            yield
        finally:
            count.again = False

    def again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (ExitStack(), marked()), **kwargs)

    with ExitStack() as stack:
        for unit in model.units():
            stack.enter_context(patch.object(unit, "forward", partial(again, unit.forward)))
        yield


@contextmanager
def _read_again(count: _Count) -> Iterator[None]:
    """Logits that DPO reads to know how its answers compare, before it learns from the same, are no need of the mathematics."""

    def read(*args: Any) -> TokenLosses:
        count.again = not torch.is_grad_enabled()
        try:
            return linear_cross_entropy(*args)
        finally:
            count.again = False

    with patch.object(language, "linear_cross_entropy", read):
        yield
