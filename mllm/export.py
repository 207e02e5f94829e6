"""A trained model as a folder that others read: `mllm.folders` says which forms there are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Protocol

from mllm.adapters import ADAPTER, merge_from
from mllm.folders import kinds, wholes
from mllm.folders.own import Own
from mllm.folders.parts import Parts
from mllm.folders.processors import copy_tokenizer
from mllm.instructed import QFORMER_TOKENIZER
from mllm.model import Model
from mllm.recipe import Recipe, dump, load
from mllm.vlm import VLM


class FolderForm(Protocol):
    """How a model lies in a folder. What `write` has written, `read` gives again: float32, on CPU."""

    @property
    def kind(self) -> str: ...

    def write(self, recipe: Recipe, model: Model, tokenizer: str | None, out: Path) -> None: ...

    def read(self, recipe: Recipe, folder: Path) -> Model: ...


def form_of(recipe: Recipe) -> FolderForm:
    """The form of a recipe's model: that of transformers' class that computes what it does, else one of ours."""
    if isinstance(recipe.model, VLM):
        return wholes.form_of(recipe.model) or Parts()
    return kinds.family_of(recipe.model) or Own()


def export(recipe: Recipe, model: Model, tokenizer: str | None, out: Path, asks: str | None = None) -> Path:
    """Write `model` to the folder `out`, with the tokenizer of the folder `tokenizer`, if any; replaces what was there.

    `asks` is the folder of the tokenizer of a Q-Former that reads instructions.
    """
    scratch = out.with_name(f".{out.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    form_of(recipe).write(recipe, model, tokenizer, scratch)
    if asks is not None:
        (scratch / QFORMER_TOKENIZER).mkdir()
        copy_tokenizer(asks, scratch / QFORMER_TOKENIZER)
    (scratch / "recipe.json").write_text(dump(recipe))
    shutil.rmtree(out, ignore_errors=True)
    scratch.rename(out)
    return out


def read_back(folder: Path) -> Model:
    """The model that `export` wrote to `folder`, float32, on CPU; adapters that lie beside it are merged into it.

    Raises FileNotFoundError when it is no export of ours.
    Transformers itself reads its files: names on disk are not those of its modules.
    """
    if not (folder / "recipe.json").is_file():
        raise FileNotFoundError(f"{folder} has no recipe.json; name a folder that `mllm export` wrote")
    recipe = load((folder / "recipe.json").read_bytes())
    model = form_of(recipe).read(recipe, folder)
    if (folder / ADAPTER).is_dir():
        merge_from(folder / ADAPTER, recipe, model)
    return model
