"""An export is released once it has been read back and has computed what the trained model computes: `released.json` says so.

Whoever deploys a folder can ask for that file: without it the folder was not checked, or did not pass. Models that predict tokens
are compared by their logits on a row that was held out (or on a made-up one, where none is); transformers' own class reads the
folder where it has one. Other kinds are compared weight by weight.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from mllm.adapters import ADAPTER, put_on
from mllm.export import read_back
from mllm.folders import idefics
from mllm.folders.wholes import TAGS, Form, form_of
from mllm.model import Model
from mllm.recipe import Recipe
from mllm.vlm import VLM, VisionLanguageModel
from ops.images import normalize
from pipelines.types import IMAGE_TOKEN, NOT_LEARNED, Batch, Image, Pack, Picture, RowId, Sample, spec

RELEASED = "released.json"

TOLERANCE = 1e-3
"""The most that a logit may differ, in standard deviations of all logits: float32 leaves about a hundredth of it."""


class NotReleased(ValueError):
    """The folder does not compute what was trained; the message says by how much."""


@spec
class Released:
    """What was checked. `read_by` is the class that read the folder; `on` the row that both computed, `tokens` and `pictures`
    its size; `greatest` the greatest difference of two logits (of two weights, where there are no logits) and `allowed` the
    most that it might be; `agree` the share of positions at which the same token is likeliest.

    `stage` and `fingerprint` name the trained stage; `files` are the SHA-256 of all files of the folder.
    """

    read_by: str
    compared: Literal["logits", "weights"]
    on: str
    tokens: int
    pictures: int
    greatest: float
    allowed: float
    agree: float
    recipe: str
    stage: str
    fingerprint: str
    files: dict[str, str]
    versions: dict[str, str]


@spec
class Seen:
    """What the trained model computes, kept while it makes room: `logits` (T, C) of `batch`, or weights by name."""

    batch: Batch | None
    logits: Tensor | None
    weights: dict[str, Tensor]
    on: str


@torch.no_grad()
def seen(recipe: Recipe, model: Model, samples: Sequence[Sample], tiles: Any) -> Seen:
    """What `model` computes of the first of `samples` that has pictures; of a made-up row where there is none.

    `tiles` gives the tiles of a sequence of samples, as `PackWindows.pixels` does.
    """
    if not isinstance(model, VisionLanguageModel):
        return Seen(batch=None, logits=None, weights=dict(model.state_dict()), on="every weight")
    shown = sorted((sample for sample in samples if sample.pictures), key=lambda s: (len(s.pictures), -s.tiles))
    if shown:
        pack, on = Pack.of_samples(shown[:1], tiles(shown[:1])), f"held-out row {shown[0].id.label()}"
    else:
        pack, on = made_up(recipe), "a made-up row"
    batch = Batch.of(pack)
    return Seen(batch=batch, logits=_logits(model.eval(), batch), weights={}, on=on)


def made_up(recipe: Recipe, seed: int = 0) -> Pack:
    """A row of noise: one picture and some tokens of the vocabulary."""
    chance = np.random.default_rng(seed)
    tiling, layout = recipe.tiling, recipe.model.layout(recipe.tiling)
    cut = tiling.cut(tiling.size, 2 * tiling.size, limit=tiling.share(1))
    words = chance.integers(0, min(recipe.model.words.vocabulary, 1000), 32).astype(np.int32)
    ids = np.concatenate([words[:4], np.full(layout.tokens(cut), IMAGE_TOKEN, np.int32), words[4:]])
    row = RowId(corpus="made-up", shard="", epoch=0, row=0)
    sample = Sample(
        id=row,
        source=0,
        input_ids=ids,
        labels=np.full(len(ids), NOT_LEARNED, np.int32),
        lengths=(len(ids),),
        pictures=(Picture(of=Image(data=b""), cut=cut),),
        visual=(layout.tokens(cut),),
        rows=(row,),
    )
    return Pack.of_samples([sample], chance.integers(0, 256, (cut.tiles, *tiling.shape), np.uint8))


@torch.no_grad()
def release(recipe: Recipe, folder: Path, before: Seen, stage: str, fingerprint: str) -> Released:
    """Read `folder` back, compare it with what was seen `before`, and mark it released.

    Raises NotReleased where it differs, and leaves no mark.
    """
    (folder / RELEASED).unlink(missing_ok=True)
    reader, compared, greatest, allowed, agree = _compared(recipe, folder, before)
    if not greatest <= allowed:
        raise NotReleased(
            f"export {folder} was read back by {reader} and is not what was trained: on {before.on} {compared} differ by up to "
            f"{greatest:.3g}, and {allowed:.3g} is allowed. It stays there without {RELEASED}; do not deploy it. A version of "
            "transformers that reads weights otherwise does this, and so does a disk that loses bytes: export again"
        )
    batch = before.batch
    told = Released(
        read_by=reader,
        compared=compared,
        on=before.on,
        tokens=0 if batch is None else len(batch.input_ids),
        pictures=0 if batch is None else len(batch.cuts),
        greatest=greatest,
        allowed=allowed,
        agree=agree,
        recipe=recipe.name,
        stage=stage,
        fingerprint=fingerprint,
        files=digests(folder),
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("mllm", "torch", "transformers", "safetensors", "peft")},
        },
    )
    (folder / RELEASED).write_bytes(_adapter().dump_json(told, indent=1))
    return told


def read_release(folder: Path) -> Released | None:
    """What was checked of `folder`; None where it is not released. Raises NotReleased where files are not those checked."""
    file = folder / RELEASED
    if not file.is_file():
        return None
    told = _adapter().validate_json(file.read_bytes())
    if changed := sorted(set(told.files.items()) ^ set(digests(folder).items())):
        raise NotReleased(f"export {folder}: {changed[0][0]} is not the file that was checked; export again")
    return told


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the folder's files by their names within it, without the mark itself."""
    found: dict[str, str] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RELEASED):
        with path.open("rb") as file:
            found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _adapter() -> TypeAdapter[Released]:
    return TypeAdapter(Released)


def _compared(
    recipe: Recipe, folder: Path, before: Seen
) -> tuple[str, Literal["logits", "weights"], float, float, float]:
    if before.batch is None or before.logits is None:
        again = read_back(folder).state_dict()
        if again.keys() != before.weights.keys():
            odd = sorted(again.keys() ^ before.weights.keys())[0]
            raise NotReleased(f"export {folder}: weight {odd!r} is only in one of the trained model and the folder")
        parts = [(value, again[name]) for name, value in before.weights.items()]
        return "mllm", "weights", max((_difference(a, b) for a, b in parts), default=0.0), 0.0, 1.0
    batch = before.batch
    form = form_of(recipe.model) if isinstance(recipe.model, VLM) else None
    reader, theirs = (
        ("mllm", _by_ours(folder, batch)) if form is None else _by_transformers(form, recipe, folder, batch)
    )
    text = ~batch.visual
    ours, theirs = before.logits[text], theirs[text, : before.logits.shape[1]]
    allowed = TOLERANCE * max(float(ours.std()), torch.finfo(torch.float32).tiny)
    agree = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    return reader, "logits", _difference(ours, theirs), allowed, agree


def _difference(a: Tensor, b: Tensor) -> float:
    """The greatest of two tensors' differences; infinite where shapes differ or a number is none."""
    if a.shape != b.shape:
        return float("inf")
    greatest = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    return greatest if greatest == greatest else float("inf")  # NaN is no difference that could be small


def _logits(model: Any, batch: Batch) -> Tensor:
    hidden = model(batch)
    return hidden @ model.lm.head.to(hidden.dtype).T


def _by_ours(folder: Path, batch: Batch) -> Tensor:
    return _logits(read_back(folder).eval(), batch)


def _by_transformers(form: Form, recipe: Recipe, folder: Path, batch: Batch) -> tuple[str, Tensor]:
    """Logits by the class of transformers, from the same pixels and tokens in its own words."""
    import transformers

    family: Any = getattr(transformers, form.family).from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )
    words = asked(form, recipe, family.config, folder, batch)
    if (folder / ADAPTER).is_dir():
        family = put_on(family, folder / ADAPTER)
    return form.family, family.eval()(**words).logits[0]


def asked(form: Form, recipe: Recipe, config: Any, folder: Path, batch: Batch) -> dict[str, Tensor]:
    """A row of ours as the class of transformers is called with it."""
    from transformers import AutoTokenizer

    encoder = recipe.vlm.tower
    pixels = normalize(batch.tiles, torch.tensor(encoder.mean), torch.tensor(encoder.std))
    text = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if form.kind == "idefics":
        image, *around = text.convert_tokens_to_ids(list(form.words))
        return idefics.looked_at(idefics.as_words(batch, image, *around or [None]), image, pixels)
    place = config.video_token_id if form.kind == "llava_next_video" else config.image_token_id
    ids = torch.where(batch.visual, place, batch.input_ids)
    if len(form.words) == 3:  # tags stand around each picture
        tags = text.convert_tokens_to_ids(list(TAGS))
        for run in batch.visual.nonzero().squeeze(1).split(batch.cuts[:, 1].tolist()):
            ids[run[0]], ids[run[-1]] = tags
    match form.kind:
        case "llava_next":  # of several pictures those with fewer tiles are filled up
            rows = torch.nn.utils.rnn.pad_sequence(list(pixels.split(batch.cuts[:, 0].tolist())), batch_first=True)
            return {"input_ids": ids[None], "pixel_values": rows, "image_sizes": batch.cuts[:, 5:7]}
        case "llava_next_video":
            return {"input_ids": ids[None], "pixel_values_videos": pixels[None]}
        case _:
            return {"input_ids": ids[None], "pixel_values": pixels}
