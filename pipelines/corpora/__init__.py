"""Corpora as the field publishes them. Each is a frozen value that can scan a shard and read rows of it.

    Pairs            webdataset tars of pictures and captions           COYO, LAION, CC (img2dataset)
    Questions        webdataset tars of pictures, questions, answers    VQA 2.0, GQA
    CaptionList      csv, tsv or jsonl of paths and captions            FROMAGe, LLaMA-Adapter
    Labelled         webdataset tars with classes, or a list of paths   ImageNet
    Interleaved      jsonl of pages, pictures in a tar or a folder      MMC4
    Obelics          parquet of pages                                   OBELICS
    Conversations    JSON list or jsonl of turns, pictures, videos      LLaVA, ShareGPT4V, InternVL, MiniCPM, Qwen-VL
    TextOnly         jsonl, JSON list or parquet                        FLAN, Alpaca
    Preferences      jsonl or parquet of two answers                    LLaVA-NeXT, RLHF-V, RLAIF-V, hh-rlhf
    Regions          jsonl of boxes and what they show                  RefCOCO, Visual Genome, GRIT
    Videos           jsonl or webdataset tars of clips and captions     WebVid

Every one has three methods. `files(uri)` are the files that one shard consists of, not those its rows merely refer to.
`scan(uri, opener)` reads them once and finds the rows. `read(shard, chunk, limits)` yields each row of a chunk in order, as a
`Document` or as a `Rejected` with its reason; it makes one request for the rows and one round of requests for all that they
refer to. Only storage errors are raised, and by `scan` ValueError for a shard that is no such file at all.

To add a format: a class with these methods, and its name in `Corpus`. Formats share `cells.py`, and beside this room
`reading.py`, `rows.py` and `tars.py`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipelines.corpora.boxes import Patches, Regions, Shares, Thousandths
from pipelines.corpora.clips import Videos
from pipelines.corpora.pages import Interleaved, Obelics
from pipelines.corpora.pairs import CaptionList, Labelled, Pairs, Questions
from pipelines.corpora.talks import Conversations, Preferences, TextOnly

Corpus = Annotated[
    Pairs
    | Questions
    | CaptionList
    | Labelled
    | Interleaved
    | Obelics
    | Conversations
    | TextOnly
    | Preferences
    | Regions
    | Videos,
    Field(discriminator="kind"),
]

__all__ = [
    "CaptionList",
    "Conversations",
    "Corpus",
    "Interleaved",
    "Labelled",
    "Obelics",
    "Pairs",
    "Patches",
    "Preferences",
    "Questions",
    "Regions",
    "Shares",
    "TextOnly",
    "Thousandths",
    "Videos",
]
