"""What dropped rows look like: their pictures read from their shards again, and shown as far as they can be.

A picture that was cut short is shown down to where it ends, one that is no picture is not shown. Nothing here is patient: a page
is worth less than the run it tells of.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable

from PIL import Image as Pictures
from PIL import ImageFile

from cluster.indexing import corpora_of
from cluster.quarantine import Quarantined
from cluster.site import Site
from mllm.recipe import Recipe
from pipelines import storage
from pipelines.manifest import Manifest
from pipelines.types import Chunk, Document, Image, Limits, RowId

EACH = 3
"""Pictures that are shown of a row."""

SIDE = 96
"""Pixels of a picture's longer side."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")

HASTE = 5.0
"""Seconds that storage has to answer."""


class Evidence:
    """Finds the pictures of dropped rows, each row once: a page that is made again reads nothing again."""

    def __init__(self, site: Site, recipe: Recipe) -> None:
        self.site = site
        self.corpora = {corpus.name: corpus for corpus in corpora_of(recipe)}
        self.manifests: dict[str, Manifest] = {}
        self.known: dict[RowId, tuple[str, ...]] = {}

    def of(self, rows: Iterable[Quarantined]) -> dict[str, tuple[str, ...]]:
        """Pictures as data URIs by the row's label; rows of which there is nothing to show are left out."""
        with storage.hasty(HASTE):
            for row in rows:
                if row.rejected.row not in self.known:
                    self.known[row.rejected.row] = self._pictures(row.rejected.row)
        return {row.label(): shown for row, shown in self.known.items() if shown}

    def _pictures(self, row: RowId) -> tuple[str, ...]:
        corpus = self.corpora.get(row.corpus)
        if corpus is None:
            return ()
        try:
            if row.corpus not in self.manifests:
                self.manifests[row.corpus] = self.site.manifest(corpus)
            shards = self.manifests[row.corpus].shards
            number = next(number for number, shard in enumerate(shards) if shard.name == row.shard)
            chunk = Chunk(source=0, shard=number, epoch=row.epoch, start=row.row, stop=row.row + 1)
            documents = list(corpus.read(shards[number], chunk, self.site.limits))
        except Exception:  # whatever is wrong with the row or its storage, the page is made all the same
            return ()
        images = (s for d in documents if isinstance(d, Document) for s in d.segments if isinstance(s, Image))
        shown = (thumbnail(image.data, self.site.limits) for image in list(images)[:EACH])
        return tuple(uri for uri in shown if uri)


def thumbnail(data: bytes, limits: Limits) -> str:
    """A small copy as a data URI; an empty word where there is nothing to be seen, or more than `limits` allow."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        with Pictures.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height > limits.pixels:
                return ""
            picture.draft("RGB", (SIDE, SIDE))
            small = picture.convert("RGB")
        small.thumbnail((SIDE, SIDE))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=80)
    except Exception:  # a decoder has its own word for each way in which bytes are no picture
        return ""
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
