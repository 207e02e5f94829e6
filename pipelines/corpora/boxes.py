"""Pictures with boxes, and how a box is spelled."""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from pipelines import storage
from pipelines.corpora.cells import awaited, web_text
from pipelines.manifest import Shard, ShardIndex
from pipelines.reading import LIMITS, Draft, Opener, Read, folder_of, string
from pipelines.rows import Row, read_rows, scan_rows
from pipelines.types import Chunk, Limits, Reason, Region, SkipSample, Text, spec


@spec
class Shares:
    """Boxes as Shikra spells them, in shares of the sides, after the phrase: `a kite[0.123,0.456,0.789,0.987]`; several are
    separated by `;` (arXiv:2306.15195)."""

    kind: Literal["shares"] = "shares"
    digits: int = 3

    def spell(self, phrase: str, boxes: list[Box]) -> str:
        return f"{phrase}[{';'.join(','.join(f'{share:.{self.digits}f}' for share in box) for box in boxes)}]"


@spec
class Thousandths:
    """Boxes as Qwen-VL spells them, in whole thousandths below 1000:
    `<ref>a kite</ref><box>(123,456),(789,987)</box>` (arXiv:2308.12966)."""

    kind: Literal["thousandths"] = "thousandths"

    def spell(self, phrase: str, boxes: list[Box]) -> str:
        def box(corners: Box) -> str:
            x0, y0, x1, y1 = (min(int(share * 1000), 999) for share in corners)
            return f"<box>({x0},{y0}),({x1},{y1})</box>"

        return f"<ref>{phrase}</ref>{''.join(map(box, boxes))}"


@spec
class Patches:
    """Boxes as Kosmos-2 spells them, by the numbers of the corner patches of a `bins` x `bins` grid:
    `<phrase>a kite</phrase><object><patch_index_0044><patch_index_0863></object>` (arXiv:2306.14824)."""

    kind: Literal["patches"] = "patches"
    bins: int = 32

    def spell(self, phrase: str, boxes: list[Box]) -> str:
        def corner(x: float, y: float) -> str:
            column, row = (min(int(share * self.bins), self.bins - 1) for share in (x, y))
            return f"<patch_index_{row * self.bins + column:04d}>"

        spelled = "</delimiter_of_multi_objects/>".join(corner(*box[:2]) + corner(*box[2:]) for box in boxes)
        return f"<phrase>{phrase}</phrase><object>{spelled}</object>"


Box = tuple[float, float, float, float]
Spelling = Annotated[Shares | Thousandths | Patches, Field(discriminator="kind")]


@spec
class Regions:
    """Pictures with boxes and what they show, one jsonl schema to which RefCOCO, Visual Genome and GRIT are easily brought:

        {"image": "a.jpg", "width": 640, "height": 480, "text": "a kite over a lake",
         "regions": [{"box": [10, 20, 300, 200], "phrase": "a kite"}]}

    `image` is a path below `images`; a box is left, top, right, bottom, in pixels where the row has `width` and `height` and
    otherwise in shares of the sides; `phrase` may be called `label`, `text` (or `caption`) may be absent. `boxes` says how a box
    is spelled after its phrase in the text: those of one phrase stand together at its first mention, and a phrase that is
    not in the text gets a line of its own. With None the text stays as it is, and phrases are in `Document.regions` alone.
    """

    kind: Literal["regions"] = "regions"
    name: str
    images: str = ""
    boxes: Spelling | None = Shares()

    def files(self, uri: str) -> tuple[str, ...]:
        return (uri,)

    def scan(self, uri: str, opener: Opener = storage.open_file) -> ShardIndex:
        return scan_rows(uri, opener, partial(self._draft, folder_of(uri, self.images))).index()

    def read(self, shard: Shard, chunk: Chunk, limits: Limits = LIMITS) -> Read:
        """Documents of rows `[chunk.start, chunk.stop)`, in order."""
        return read_rows(self.name, shard, chunk, limits, partial(self._draft, folder_of(shard.uri, self.images)))

    def _draft(self, folder: str, row: Row) -> Draft:
        image = awaited(folder, string(row, "image"))
        listed = row.get("regions")
        if not isinstance(listed, list):
            raise SkipSample(Reason.MISSING_FIELD, "regions")
        sides = (row["width"], row["height"]) if "width" in row and "height" in row else (1, 1)
        regions = tuple(_region(region, sides) for region in listed)
        caption = row.get("text", row.get("caption")) or ""
        if not isinstance(caption, str):
            raise SkipSample(Reason.MISSING_FIELD, f"text is {type(caption).__name__}")
        text = self._spelled(web_text(caption.strip()), regions)
        if not text and not regions:
            raise SkipSample(Reason.EMPTY)
        return Draft(segments=(image, Text(text="\n" + text)) if text else (image,), regions=regions)

    def _spelled(self, text: str, regions: tuple[Region, ...]) -> str:
        if self.boxes is None:
            return text
        phrases: dict[str, list[Box]] = {}
        for region in regions:
            phrases.setdefault(region.label, []).append(region.box)
        places: dict[int, str] = {}
        taken = bytearray(len(text))
        own_lines: list[str] = []
        # The longest phrase takes its place first, so that "dog" is not found inside "dog house".
        for phrase in sorted(phrases, key=len, reverse=True):
            at = next(
                (
                    m.start()
                    for m in re.finditer(re.escape(phrase), text)
                    if phrase and not any(taken[m.start() : m.end()])
                ),
                None,
            )
            if at is None:
                own_lines.append(phrase)
                continue
            places[at] = phrase
            taken[at : at + len(phrase)] = b"\1" * len(phrase)
        spelled, end = "", 0
        for at, phrase in sorted(places.items()):
            spelled += text[end:at] + self.boxes.spell(phrase, phrases[phrase])
            end = at + len(phrase)
        lines = [self.boxes.spell(phrase, phrases[phrase]) for phrase in phrases if phrase in own_lines]
        return "\n".join(filter(None, [spelled + text[end:], *lines]))


def _region(region: object, sides: tuple[Any, Any]) -> Region:
    row = region if isinstance(region, dict) else {}
    box = row.get("box")
    size = f"{sides[0]} x {sides[1]}"
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(n) for n in (*box, *sides)):
        raise SkipSample(Reason.BAD_BOX, f"{str(box)[:80]} of {size}; expected left, top, right, bottom")
    left, top, right, bottom = box
    if not (0 <= left < right <= sides[0] and 0 <= top < bottom <= sides[1]):
        raise SkipSample(Reason.BAD_BOX, f"{str(box)[:80]} is empty, inverted or outside {size}")
    label = row.get("phrase", row.get("label")) or ""
    if not isinstance(label, str):
        raise SkipSample(Reason.MISSING_FIELD, f"phrase is {type(label).__name__}")
    shares = (left / sides[0], top / sides[1], right / sides[0], bottom / sides[1])
    return Region(image=0, box=shares, label=web_text(label.strip()))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9
