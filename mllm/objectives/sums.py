"""Several objectives: all at once, each divided by its own weight over the whole step, or one of them in each step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from mllm.objectives.aligned import Captioning, DistilledTokens, HardMatching, MomentumContrast
from mllm.objectives.base import Gathered, LossOutput
from mllm.objectives.contrast import Contrastive
from mllm.objectives.fused import MaskedTokens, Matching
from mllm.objectives.language import NextToken
from mllm.objectives.pictures import Classification
from mllm.objectives.regions import MaskedRegions
from mllm.objectives.retrieval import RetrievalToken
from pipelines.types import Batch, spec

Single = Annotated[
    NextToken
    | Contrastive
    | Matching
    | MaskedTokens
    | MaskedRegions
    | Classification
    | MomentumContrast
    | HardMatching
    | DistilledTokens
    | Captioning
    | RetrievalToken,
    Field(discriminator="kind"),
]


def once(model: Any) -> AbstractContextManager[None]:
    """Within it a model that can see a batch once for all terms does."""
    can = getattr(model, "once", None)
    return nullcontext() if can is None else can()


@spec
class Term:
    """An objective of a sum, and how often its mean counts."""

    objective: Single
    weight: Annotated[float, Field(gt=0)] = 1.0


def factors(terms: Sequence[Term], totals: Sequence[Tensor] | Tensor) -> list[float]:
    """What each term's sum is multiplied by, so that all divided by the first's weight are their means; `totals` are weights."""
    base = totals[0].clamp(min=1)
    return [term.weight * float(base / total.clamp(min=1)) for term, total in zip(terms, totals, strict=True)]


def added(shares: Sequence[float], outputs: Sequence[LossOutput]) -> LossOutput:
    """The sum of losses, each so many times; weight, learned and right positions are those of the first."""
    losses: list[Tensor] = [share * output.sum for share, output in zip(shares, outputs, strict=True)]
    documents = outputs[0].documents.clone()
    documents[:, 0] = sum(share * output.documents[:, 0] for share, output in zip(shares, outputs, strict=True))
    return LossOutput(sum=torch.stack(losses).sum(), weight=outputs[0].weight, documents=documents)


@spec
class Sum(Gathered):
    """The sum of the means of several objectives: each one's sum by its own weight, both over the whole step, times `weight`.

    Its own weight is the first term's, and so are learned and right positions in its table; losses there are the sum's.
    """

    kind: Literal["sum"] = "sum"
    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("a sum of no objectives teaches nothing; give it terms")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of its terms."""
        return tuple(term.objective.kind for term in self.terms)

    def collect(self, model: Any, batch: Batch) -> Any:
        """Of each term its weight in the pack, and what it collects itself."""
        found = []
        with once(model):
            for term in self.terms:
                own = term.objective.collect(model, batch) if isinstance(term.objective, Gathered) else ()
                found.append((term.objective.counted(model, batch).double(), own))
        return tuple(found)

    def whole(self, packs: Sequence[Any], group: dist.ProcessGroup | None) -> list[Any]:
        totals = torch.stack(
            [torch.stack([pack[place][0] for pack in packs]).sum() for place in range(len(self.terms))]
        )
        if group is not None:
            dist.all_reduce(totals, group=group)
        told: list[list[Any]] = []
        for place, term in enumerate(self.terms):
            if isinstance(term.objective, Gathered):
                told.append(term.objective.whole([pack[place][1] for pack in packs], group))
            else:
                told.append([None] * len(packs))
        shares = factors(self.terms, totals)
        return [(shares, [each[number] for each in told]) for number in range(len(packs))]

    def again(self, model: Any, batch: Batch, told: tuple[list[float], list[Any]]) -> LossOutput:
        outputs = []
        with once(model):
            for term, own in zip(self.terms, told[1], strict=True):
                one = term.objective
                outputs.append(one.again(model, batch, own) if isinstance(one, Gathered) else one(model, batch))
        return added(told[0], outputs)

    def settle(self, model: Any, told: Sequence[tuple[list[float], list[Any]]]) -> None:
        for place, term in enumerate(self.terms):
            if isinstance(term.objective, Gathered):
                term.objective.settle(model, [own[place] for _, own in told])


@spec
class OneOf(Gathered):
    """One of several objectives in each step, drawn by the terms' weights (UNITER, arXiv:1909.11740, 3.2).

    Which one is a function of the step's rows and their epoch, so that neither packs nor ranks nor restarts matter; a step of no
    rows takes the first. Scored by itself, a batch is a step. A step's loss is that of its objective.
    """

    kind: Literal["one_of"] = "one_of"
    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("one of no objectives teaches nothing; give it terms")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of its terms."""
        return tuple(term.objective.kind for term in self.terms)

    def collect(self, model: Any, batch: Batch) -> Any:
        """The sum of the rows' seeds, and what each term that must see the step collects."""
        rows = batch.weights.new_zeros((), dtype=torch.long) if batch.seeds is None else batch.seeds.sum()
        return rows, [one.collect(model, batch) if isinstance(one, Gathered) else () for one in self._objectives]

    def whole(self, packs: Sequence[Any], group: dist.ProcessGroup | None) -> list[Any]:
        rows = torch.stack([pack[0] for pack in packs]).sum()
        if group is not None:
            dist.all_reduce(rows, group=group)
        number = self.drawn(int(rows))
        one = self._objectives[number]
        if not isinstance(one, Gathered):
            return [(number, None)] * len(packs)
        return [(number, own) for own in one.whole([pack[1][number] for pack in packs], group)]

    def again(self, model: Any, batch: Batch, told: tuple[int, Any]) -> LossOutput:
        one: Any = self._objectives[told[0]]
        return one.again(model, batch, told[1]) if isinstance(one, Gathered) else one(model, batch)

    def settle(self, model: Any, told: Sequence[tuple[int, Any]]) -> None:
        number = told[0][0] if told else 0
        one = self._objectives[number]
        if told and isinstance(one, Gathered):
            one.settle(model, [own for _, own in told])

    def drawn(self, rows: int) -> int:
        """Which term a step has whose rows' seeds add up to `rows`."""
        dice = random.Random(rows).random() * sum(term.weight for term in self.terms) if rows else 0.0
        for number, term in enumerate(self.terms):
            dice -= term.weight
            if dice < 0:
                return number
        return len(self.terms) - 1

    @property
    def _objectives(self) -> list[Any]:
        return [term.objective for term in self.terms]
