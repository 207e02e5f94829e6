"""Several tasks of pairs, all read off one forward pass (LXMERT)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mllm.classify import Scores
from mllm.objectives.base import Collected, Gathered, LossOutput
from mllm.objectives.fused import MaskedTokens, Matching
from mllm.objectives.pictures import Classification
from mllm.objectives.regions import MaskedRegions
from mllm.objectives.sums import Term, added, factors
from mllm.regions import PairedRegions
from mllm.streams import with_texts, written
from pipelines.types import Batch, spec

Kind = TypeVar("Kind")
Told = tuple[list[float], list[tuple[list[int], bool]]]
"""What each term's sum is multiplied by; of each pair the text that is shown with its picture, and whether it belongs there."""


@dataclass(slots=True)
class Known:
    """What is known of a pack's pairs before any is shown: `matching` as `Matching` collects it, what each pair counts (P,) and
    whether it has an answer (P,), what all hidden regions count (), and which tokens are no word's first (C,).
    """

    matching: Collected
    often: Float[Tensor, " P"]
    answered: Bool[Tensor, " P"]
    regions: Float[Tensor, ""]
    continues: Int[Tensor, " C"] | None


@spec
class AtOnce(Gathered):
    """Tasks of one forward pass, and the sum of their means as in `Sum` (LXMERT, arXiv:1908.07490, 3.1).

    Of the kinds matching, masked_tokens, masked_regions and classification each may come once. Pairs are torn apart as matching
    says; masked are words of the text that is shown then, and regions of the picture; all is read off the same hidden states. A
    torn pair is asked for no answer, and its words and regions count like any other's (`convert_example_to_features`,
    airsplay/lxmert `src/pretrain/lxmert_pretrain.py`). It costs what one term of a `Sum` does; what it loses is that words are
    guessed with regions hidden, and some beside a picture that has nothing to say of them.
    """

    kind: Literal["at_once"] = "at_once"
    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        known = (Matching, MaskedTokens, MaskedRegions, Classification)
        kinds = [type(term.objective) for term in self.terms]
        if not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(known):
            raise ValueError(
                f"at_once: terms are {list(self.kinds)}; give each of matching, masked_tokens, masked_regions and classification "
                "at most once, and others as a sum"
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of its terms."""
        return tuple(term.objective.kind for term in self.terms)

    def collect(self, model: Any, batch: Batch) -> Any:
        documents = model.pairs(batch).texts.documents
        regions = self._of(MaskedRegions)
        ids, rows, torn = (self._of(Matching) or Matching()).collect(model, batch)
        return Known(
            matching=(ids, rows, torn if self._of(Matching) else torch.zeros_like(torn)),
            often=batch.weights[documents],
            answered=batch.classes[documents] >= 0,
            regions=batch.weights.new_zeros(()) if regions is None else regions.counted(model, batch),
            continues=model.continues,
        )

    def whole(self, packs: Sequence[Known], group: dist.ProcessGroup | None) -> list[Told]:
        shown = (self._of(Matching) or Matching()).whole([pack.matching for pack in packs], group)
        weights = [[self._counted(term, *pair) for term in self.terms] for pair in zip(packs, shown, strict=True)]
        totals = torch.tensor(weights, dtype=torch.float64, device=packs[0].often.device).sum(0)
        if group is not None:
            dist.all_reduce(totals, group=group)
        shares = factors(self.terms, totals)
        return [(shares, texts) for texts in shown]

    def again(self, model: Any, batch: Batch, told: Told) -> LossOutput:
        shares, texts = told
        paired: PairedRegions = model.pairs(batch)
        torn = seen = with_texts(paired, [words for words, _ in texts])
        words, regions = self._of(MaskedTokens), self._of(MaskedRegions)
        masked = hidden = torch.zeros(0, dtype=torch.bool)
        if words is not None:
            seen, masked = words.hide(model, batch, seen)
        if regions is not None:
            seen, hidden = regions.hide(batch, seen)
        fused = model.fuse(batch, seen)
        outputs = []
        for term in self.terms:
            match term.objective:
                case Matching() as one:
                    outputs.append(one.read(model, batch, paired, texts, fused))
                case MaskedTokens() as one:
                    outputs.append(one.read(model, batch, torn, masked, fused))
                case MaskedRegions() as one:
                    outputs.append(one.read(model, batch, paired, hidden, fused))
                case Classification() as one:
                    scores = Scores(model.answers()(fused.pooled[: len(texts)]), paired.texts.documents)
                    outputs.append(one.read(batch, scores, _belongs(texts, paired.texts.documents)))
        return added(shares, outputs)

    def _counted(self, term: Term, pack: Known, shown: list[tuple[list[int], bool]]) -> float:
        """What a term weighs in a pack whose pairs are shown so."""
        match term.objective:
            case MaskedTokens() as one if shown:
                _, rows, _ = pack.matching
                texts = written([words for words, _ in shown], torch.arange(len(shown), device=rows.device))
                return float(pack.often[texts.owner[one.drawn(rows, texts, pack.continues)]].sum())
            case Classification():
                return float((pack.often * pack.answered * _belongs(shown, pack.often)).sum())
            case MaskedRegions():
                return float(pack.regions)
            case _:
                return float(pack.often.sum())

    def _of(self, kind: type[Kind]) -> Kind | None:
        """Its term of a kind, if there is one."""
        return next((term.objective for term in self.terms if isinstance(term.objective, kind)), None)


def _belongs(texts: list[tuple[list[int], bool]], like: Tensor) -> Bool[Tensor, " P"]:
    """Which pairs were left together."""
    return torch.tensor([right for _, right in texts], dtype=torch.bool, device=like.device)
