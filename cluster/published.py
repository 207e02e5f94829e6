"""How large public corpora are, for a plan of a run whose data is not here yet.

Rows and pictures are as their authors publish them, with the source; where they do not, the range says what is not known. Text is
counted in tokens of a language model's vocabulary, about four for three words.
"""

from __future__ import annotations

from pipelines.types import spec

Range = tuple[float, float]
"""From the least to the most that a number may be."""


@spec
class Published:
    """A corpus by the name that recipes give it: `rows` in all, `text` tokens and `pictures` of a row, each a mean."""

    name: str
    rows: Range
    text: Range
    pictures: Range
    source: str


CORPORA = (
    Published(
        name="llava-cc3m-595k",
        rows=(595_375, 595_375),
        text=(20, 40),
        pictures=(1, 1),
        source="LLaVA, arXiv:2304.08485, 4.1",
    ),
    Published(
        name="llava-lcs-558k",
        rows=(558_128, 558_128),
        text=(25, 50),
        pictures=(1, 1),
        source="LLaVA-1.5, arXiv:2310.03744; its README",
    ),
    Published(
        name="llava-mix-665k",
        rows=(624_610, 665_298),
        text=(250, 450),
        pictures=(0.94, 1),
        source="LLaVA-1.5, arXiv:2310.03744, table 7, with or without the 40,688 rows of text alone",
    ),
    Published(
        name="sharegpt-40k",
        rows=(40_688, 40_688),
        text=(600, 1500),
        pictures=(0, 0),
        source="LLaVA-1.5, arXiv:2310.03744, table 7; how long its conversations are is not said",
    ),
    Published(
        name="mmc4-core",
        rows=(7_300_000, 7_300_000),
        text=(300, 450),
        pictures=(3.4, 4.1),
        source="MMC4, its README (v1.1): 7.3M documents, 29.9M pictures, 2.4B tokens; a document's first six are read",
    ),
    Published(
        name="coyo-25m",
        rows=(25_000_000, 25_000_000),
        text=(15, 40),
        pictures=(1, 1),
        source="VILA, arXiv:2312.07533, 3.1: 25M pairs chosen of COYO-700M",
    ),
    Published(
        name="sharegpt4v",
        rows=(665_000, 740_000),
        text=(250, 450),
        pictures=(0.9, 1),
        source="ShareGPT4V, arXiv:2311.12793: LLaVA's mixture, captions replaced; VILA's list has 738K",
    ),
    Published(
        name="flan-text-1m",
        rows=(1_000_000, 1_000_000),
        text=(150, 400),
        pictures=(0, 0),
        source="VILA, arXiv:2312.07533, 3.3: 1M rows of FLAN",
    ),
    Published(
        name="vflan-images",
        rows=(400_000, 1_000_000),
        text=(50, 150),
        pictures=(1, 1.2),
        source="VILA, arXiv:2312.07533: pictures of 14 of M3IT's sets; how many rows is not said",
    ),
)


def published(name: str) -> Published | None:
    """What is published of a corpus, if it is listed here."""
    return next((corpus for corpus in CORPORA if corpus.name == name), None)
