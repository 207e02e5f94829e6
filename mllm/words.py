"""Which tokens continue a word, for what masks words whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

MARKS = ("Ġ", "▁")
"""What stands before a token that begins a word: byte-level vocabularies (GPT-2), SentencePiece."""


def continuing(folder: str, vocabulary: int) -> UInt8[Tensor, " C"]:
    """For each of `vocabulary` ids 1 where the token continues the word of the one before, by the `tokenizer.json` in `folder`.

    WordPiece writes "##" before such a token; other vocabularies mark the token that begins a word, and one that is no letter
    or digit continues none. Without the file, as where a model is built for its shapes alone, no token does.
    """
    file = Path(folder) / "tokenizer.json"
    found = torch.zeros(vocabulary, dtype=torch.uint8)
    if not folder or not file.is_file() or found.is_meta:
        return found
    said: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    model = said["model"]
    tokens: dict[str, int] = (
        model["vocab"] if isinstance(model["vocab"], dict) else {v[0]: n for n, v in enumerate(model["vocab"])}
    )
    special = {one["id"] for one in said.get("added_tokens", ())}
    if model.get("type") == "WordPiece":
        prefix = model.get("continuing_subword_prefix") or "##"
        ids = [number for token, number in tokens.items() if token.startswith(prefix)]
    else:
        mark = max(MARKS, key=lambda mark: sum(token.startswith(mark) for token in tokens))
        ids = [n for token, n in tokens.items() if not token.startswith(mark) and token[:1].isalnum()]
    found[[number for number in ids if number < vocabulary and number not in special]] = 1
    return found
