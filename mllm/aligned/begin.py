"""Language models that what reads texts begins from: BERT for ALBEF, BLIP and BLIP-2, a LLaMA for InternVL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mllm.aligned.bert import Aligning


def begin(net: Aligning, folder: str) -> None:
    """Give `net` the layers and words of the language model in `folder` (or hub id), in the form of transformers.

    What looks at pictures stays as it is drawn, and so do words that the folder has not. Raises ValueError where it lacks a layer
    or has some in another shape.
    """
    wanted: dict[str, list[str]] = {}
    for name, _ in net.named_parameters():
        theirs = net.begun_as(name)
        if theirs is not None:
            wanted.setdefault(theirs, []).append(name)
    own, found = dict(net.named_parameters()), set[str]()
    with torch.no_grad():
        for theirs, value in _stored(folder):
            for name in wanted.get(theirs, ()):
                mine = own[name]
                rows = (
                    min(len(value), len(mine)) if value.shape[1:] == mine.shape[1:] and _of_words(name) else len(mine)
                )
                if value[:rows].shape != mine[:rows].shape:
                    raise ValueError(
                        f"weights {folder!r} have {theirs} of {tuple(value.shape)} and the recipe's arch says "
                        f"{tuple(mine.shape)}; mend the arch"
                    )
                mine[:rows] = value[:rows]
            found.add(theirs)
    missing = sorted(theirs for theirs, names in wanted.items() if theirs not in found and not _of_words(names[0]))
    if missing:
        raise ValueError(
            f"weights {folder!r} lack {', '.join(missing[:3])}; name a folder of the language model that this kind begins from"
        )


def _of_words(name: str) -> bool:
    """Whether a weight has a row for each word or position, or is of the head that writes words, which a folder may lack."""
    return "embeddings" in name.partition(".")[0] or name.startswith("words.")


def _stored(folder: str) -> Iterator[tuple[str, Tensor]]:
    """Weights by transformers' names, those of BERT without the prefix that only some of its classes have."""
    if not Path(folder).is_dir():
        from huggingface_hub import snapshot_download

        folder = snapshot_download(folder, allow_patterns="*.safetensors")
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 -- it is no dict
                yield _today(name), tensors.get_tensor(name)


def _today(name: str) -> str:
    """A name as transformers' classes have it now: BERT's own folder still says gamma and beta."""
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        name = name.replace(old, new)
    return name.removeprefix("bert.")
