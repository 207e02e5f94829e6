"""Two answers to one question: which of their tokens are the same, and which one of them alone has."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

import numpy as np
from numpy.typing import NDArray

from pipelines.types import NOT_LEARNED, Branch

LEAST = 3
"""Tokens in a row that both answers must have to be the same piece of text: fewer are alike by chance (RLAIF-V's code)."""


def changed_tokens(
    labels: NDArray[np.integer], bounds: Sequence[int], branches: Sequence[int], least: int = LEAST
) -> NDArray[np.bool_]:
    """Which learned positions of a preferred or a rejected answer the other of the two has not, bool (T,).

    `labels` (T,) are a pack's, `bounds` its `cu_seqlens` and `branches` those of its documents; a rejected answer follows its
    preferred one. Runs of `least` tokens and more that both have, in the same order, are no changes, nor is what both begin
    with, however short: the question before it is the same. Documents that are no answers have no changes. So RLHF-V
    (arXiv:2312.00849, 3.2) tells corrected segments from the text around them.
    """
    changed = np.zeros(len(labels), np.bool_)
    for document, branch in enumerate(branches):
        if branch != Branch.PREFERRED:
            continue
        one, other = (_learned(labels, bounds, at) for at in (document, document + 1))
        matcher = SequenceMatcher(None, labels[one].tolist(), labels[other].tolist(), autojunk=False)
        changed[one] = changed[other] = True
        for at, beside, length in matcher.get_matching_blocks():
            if length >= least or at == beside == 0:
                changed[one[at : at + length]] = False
                changed[other[beside : beside + length]] = False
    return changed


def _learned(labels: NDArray[np.integer], bounds: Sequence[int], document: int) -> NDArray[np.intp]:
    """Places in the pack of a document's learned positions."""
    first, last = bounds[document], bounds[document + 1]
    return first + np.flatnonzero(labels[first:last] != NOT_LEARNED)
