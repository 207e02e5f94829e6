"""Models of pairs that align before they fuse (ALBEF, BLIP), while they do (CoCa), or by queries between (BLIP-2, InternVL).

`Aligned` is the kind: an encoder of pictures, an `arch` that says how texts are read and pictures looked at, and a twin where
one teaches. To add an arch: a spec with `learns`, `context`, `vocab_size`, `width`, `tiny` and `build`, whose module is an
`Aligning`, and its name in `mllm.aligned.model.Arch`.
"""

from mllm.aligned.bert import ALBEF, BLIP
from mllm.aligned.coca import CoCa
from mllm.aligned.model import Aligned, Aligner, Twin
from mllm.aligned.qllama import QLLaMAPairs
from mllm.aligned.querying import QFormerPairs
from mllm.aligned.rows import Embedded, Given, Rows, likeness, unfilled

__all__ = [
    "ALBEF",
    "BLIP",
    "Aligned",
    "Aligner",
    "CoCa",
    "Embedded",
    "Given",
    "QFormerPairs",
    "QLLaMAPairs",
    "Rows",
    "Twin",
    "likeness",
    "unfilled",
]
