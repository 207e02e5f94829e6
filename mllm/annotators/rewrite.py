"""Rows that a model leaves out or writes anew: filters by likeness, captions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from mllm.annotators.readers import Captioner, Matcher, TwoTowers, kind_of
from mllm.annotators.shown import Shown, by_pictures, is_pair, pictures_with_text, text_of, without
from pipelines.annotate import Folder, Rows
from pipelines.types import Document, Reason, Rejected, RowId, Text, spec


@spec
class ScoreFilter:
    """Leaves out what does not belong together: cosine similarity of a picture and the text after it, by CLIP or SigLIP.

    BLIP's filter (CapFilt, arXiv:2201.12086, 3.3) says instead how sure it is that they match, 0 to 1; BLIP's own takes 0.5.

    A picture below `at_least` is taken out of its document, with nothing else but its regions (MMC4, arXiv:2304.06939, 3); a row
    of which no picture is left, as of a pair, is dropped (LAION, arXiv:2111.02114, 2). The text is the next one that is not
    blank, or the one before where none follows, as far as the model reads. Videos and rows without pictures or text pass.
    """

    kind: Literal["score_filter"] = "score_filter"
    weights: str
    at_least: Annotated[float, Field(ge=-1, le=1)]

    def documents(self, folder: Folder) -> Callable[[Rows], Rows]:
        """Load the model. Raises ValueError when the folder holds none of the kind."""
        place = folder(self.weights)
        likeness = (Matcher if kind_of(place, ("clip", "siglip", "blip")) == "blip" else TwoTowers)(place)

        def ask(shown: list[Shown], tiles: Tensor) -> list[float]:
            return likeness(tiles, [text_of(row, place) for row, place in shown])

        return lambda rows: by_pictures(rows, pictures_with_text, likeness.preprocess.tiling, ask, self._kept)

    def _kept(self, row: Document, scores: dict[int, list[float]]) -> Document | Rejected:
        low = {place for place, (score,) in scores.items() if score < self.at_least}
        if not low:
            return row
        if len(low) == sum(not isinstance(segment, Text) for segment in row.segments):
            best = max(score for (score,) in scores.values())
            words = f"similarity {best:.3f}; the recipe asks for {self.at_least:g}"
            return Rejected(row=row.id, reason=Reason.FILTERED, detail=words)
        return without(row, low)


@spec
class Recaption:
    """Captions written by BLIP's captioner, greedily (CapFilt, arXiv:2201.12086, 3.3); a `ScoreFilter` after it is the filter.

    Of rows that are a picture and its caption; all others pass. "replace" takes the new caption, "add" sets it on a line of its
    own after the old, "either" takes one of the two by the row's name, so that half of the rows keep theirs.
    """

    kind: Literal["recaption"] = "recaption"
    weights: str
    mode: Literal["replace", "add", "either"] = "either"
    tokens: Annotated[int, Field(gt=0)] = 30

    def documents(self, folder: Folder) -> Callable[[Rows], Rows]:
        """Load the captioner. Raises ValueError when the folder holds none."""
        write = Captioner(folder(self.weights), self.tokens)

        def wanted(row: Document) -> list[int]:
            return [0] if is_pair(row) and self._wanted(row.id) else []

        def ask(_: list[Shown], tiles: Tensor) -> list[str]:
            return write(tiles)

        return lambda rows: by_pictures(rows, wanted, write.preprocess.tiling, ask, self._captioned)

    def _wanted(self, row: RowId) -> bool:
        name = f"{row.corpus}/{row.shard}/{row.row}".encode()
        return self.mode != "either" or bool(hashlib.sha256(name).digest()[0] & 1)

    def _captioned(self, row: Document, captions: dict[int, list[str]]) -> Document:
        picture, old = row.segments
        (caption,) = captions[0]
        if not caption:
            return row
        assert isinstance(old, Text)  # as `is_pair` found
        text = f"{old.text}\n{caption}" if self.mode == "add" else f"\n{caption}"
        return replace(row, segments=(picture, replace(old, text=text)))
