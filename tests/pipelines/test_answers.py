"""Which tokens of two answers the other has not."""

from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.answers import changed_tokens
from pipelines.types import NOT_LEARNED


def marked(*documents: tuple[int, str]) -> list[str]:
    """Documents by their branch and letters (`.` is not learned), with what was changed in capitals."""
    text = "".join(letters for _, letters in documents)
    labels = np.array([NOT_LEARNED if letter == "." else ord(letter) for letter in text])
    bounds = [0, *accumulate(len(letters) for _, letters in documents)]
    changed = changed_tokens(labels, bounds, [branch for branch, _ in documents])
    told = "".join(letter.upper() if new else letter for letter, new in zip(text, changed, strict=True))
    return [told[a:b] for a, b in pairwise(bounds)]


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        ("..abcdxefgh", "..abcdyzefgh", ("..abcdXefgh", "..abcdYZefgh")),
        ("...abc", "...xyz", ("...ABC", "...XYZ")),
        ("..abxcd", "..abycd", ("..abXCD", "..abYCD")),  # two in a row are no segment, but what both begin with is
        ("..abcde", "..abc", ("..abcDE", "..abc")),
        ("..", "..a", ("..", "..A")),
    ],
)
def test_a_corrected_segment_is_told_from_what_stays(one: str, other: str, found: tuple[str, str]) -> None:
    assert tuple(marked((1, one), (2, other))) == found


def test_pairs_are_looked_at_one_by_one_and_other_documents_not_at_all() -> None:
    assert marked((0, "abc"), (1, ".xyz"), (2, ".xyw"), (0, "xyz"), (1, ".k"), (2, ".k")) == [
        "abc",
        ".xyZ",
        ".xyW",
        "xyz",
        ".k",
        ".k",
    ]


@settings(deadline=None)
@given(st.text("abcd", max_size=12), st.text("abcd", max_size=12))
def test_what_is_shared_is_the_same_text_in_both(one: str, other: str) -> None:
    shared = ["".join(c for c in side if c.islower()) for side in marked((1, one), (2, other))]
    assert shared[0] == shared[1]
    assert marked((1, one), (2, one)) == [one, one]
    if not set(one) & set(other):
        assert shared[0] == ""
