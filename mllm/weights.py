"""Folders of weights that bring Python of their own, and what becomes of it: nothing, unless the site trusts it.

Such a folder's `config.json` has an `auto_map`, from classes of transformers to those in the folder's files (or in another
repository's, `owner/name--file.Class`). transformers would ask on the terminal or leave it away, as the class that loads it
happens to; here it is refused before anything is loaded, and with `trust_remote_code = true` in the site file it is run for the
encoder and the language model. What is exported are the weights: code that computes otherwise has to be kept beside them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipelines import trust


class UntrustedCode(ValueError):
    """Weights want to run Python that the site does not trust."""


def own_code(folder: str, fetch: bool = True) -> dict[str, str]:
    """What weights want to run: their class in place of each of transformers'. `folder` may be a hub id, whose config is fetched
    where it is not on this machine yet, unless `fetch` says not to.
    """
    file = _config(folder, fetch)
    said = json.loads(file.read_text(encoding="utf-8")).get("auto_map") if file else None
    return {str(name): str(theirs) for name, theirs in said.items()} if isinstance(said, dict) else {}


def refusal(folder: str, trusted: bool, fetch: bool = True) -> str | None:
    """Why weights cannot be loaded: they want to run code that is not trusted. None if they can."""
    code = own_code(folder, fetch)
    if not code or trusted:
        return None
    return (
        f"the weights in {folder} want to run Python of their own, {_listed(code)} (auto_map in config.json), and the site does "
        "not trust it; read that code and set trust_remote_code = true in the site file, or take auto_map out of a copy of the "
        "folder where transformers' own class reads the weights as well"
    )


def refusal_by_annotator(folder: str, fetch: bool = True) -> str | None:
    """The same of an annotator's weights, whose code no word of the site lets run. None if they bring none."""
    code = own_code(folder, fetch)
    if not code:
        return None
    return (
        f"the weights in {folder} want to run Python of their own, {_listed(code)} (auto_map in config.json), and annotators run "
        "transformers' own models alone; take auto_map out of a copy of the folder where its own class reads the weights as well"
    )


def load(base: Any, auto: str, folder: str, **options: Any) -> Any:
    """The model in `folder`: a `base` of transformers, or where the site trusts it the class that stands for `auto`.

    Raises UntrustedCode, and ValueError for a class of their own that is no `base`, whose parts this project would not know.
    """
    if why := refusal(folder, trust.in_use()):
        raise UntrustedCode(why)
    theirs = own_code(folder).get(auto)
    kind = base if theirs is None else _their_class(base, theirs, folder)
    model = kind.from_pretrained(folder, trust_remote_code=theirs is not None, **options)
    if hasattr(model.config, "auto_map"):
        del model.config.auto_map  # an export holds no code, so it must not name any
    return model


TOWER_FIELDS = ("hidden_size", "num_hidden_layers", "patch_size", "image_size")
"""What says the shape of a vision transformer in the configurations of `transformers`."""


def agree(weights: str, expected: Any, found: Any, fields: tuple[str, ...]) -> None:
    """Raise ValueError when downloaded weights are not of the shape that the recipe plans with."""
    for field in fields:
        wanted, has = getattr(expected, field), getattr(found, field)
        if _plain(wanted) != _plain(has):
            raise ValueError(
                f"weights {weights!r} have {field}={has} and the recipe's arch says {wanted}; mend the arch"
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _their_class(base: Any, name: str, folder: str) -> Any:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    kind = get_class_from_dynamic_module(name, folder)
    if not issubclass(kind, base):
        raise ValueError(
            f"{name} of the weights in {folder} is no {base.__name__}, as which the recipe's arch reads them; mend the arch"
        )
    return kind


def _config(folder: str, fetch: bool) -> Path | None:
    file = Path(folder) / "config.json"
    if file.is_file():
        return file
    if Path(folder).is_absolute():
        return None
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(folder, "config.json", local_files_only=not fetch)
    except (OSError, ValueError):
        return None  # loading says what is wrong, and runs nothing
    return None if found is None else Path(found)


def _listed(code: dict[str, str]) -> str:
    return ", ".join(sorted(set(code.values())))
