"""What travels with a manifest: recipe.json, and a site.toml of what this recipe needs there. Neither holds a secret."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from pydantic import TypeAdapter

from cluster.site import Site, SiteError
from mllm.recipe import Recipe, dump
from pipelines.types import spec

USER = r"://[^/\s\"']*@"
CREDENTIALS = re.compile(USER + r"|[?&][^=&/\s\"']+=|^[^/\s]*:[^/\s]*@")
"""An address that has a user's name and password in it, or a query, which is how signed addresses carry their signature."""


@spec
class Carried:
    """Two files beside the command that reads them."""

    recipe: str
    site: str


def carried(recipe: Recipe, site: Site, shared: Iterable[str], token_file: str | None = None) -> Carried:
    """The recipe and the site as nodes see them, which have the folders `shared`; `token_file` is where theirs has the token.

    Raises SiteError for a corpus that the site lacks, a path that only this machine has, or an address with credentials in it.
    """
    text = dump(recipe)
    corpora = {source.corpus.name for stage in recipe.stages for source in stage.mixture}
    corpora |= {corpus.name for corpus in recipe.held_out}
    for name in sorted(corpora - site.corpora.keys()):
        raise SiteError(
            f"the recipe reads corpus {name!r} and the site has {sorted(site.corpora) or 'none'}; "
            "add it under [corpora] in the site file"
        )
    there = replace(
        site,
        ray_address="auto",
        ray_token_file=token_file,
        grows=True,  # these clusters are begun together with the run, and some bring nodes as they are asked for
        gpus=site.deploy is not None and site.deploy.trainers.gpus > 0,
        storage=replace(site.storage, key=None, secret=None),
        corpora={name: site.corpora[name] for name in sorted(corpora)},
        weights={name: folder for name, folder in sorted(site.weights.items()) if json.dumps(name) in text},
        deploy=None,
    )
    for what, address in [*_addresses(there), ("storage.endpoint", there.storage.endpoint or "")]:
        if CREDENTIALS.search(address):
            raise SiteError(
                f"{what} has credentials in its address, and manifests are copied and kept; take them out of it, and give the "
                "nodes keys by a Secret, a profile or their environment"
            )
    if re.search(USER, text):
        raise SiteError(
            "the recipe names an address with credentials in it, and manifests are copied and kept; take them out"
        )
    folders = [PurePosixPath(folder) for folder in shared]
    for what, address in _addresses(there):
        address = address.removeprefix("file://")
        if "://" not in address and not any(PurePosixPath(address).is_relative_to(folder) for folder in folders):
            seen = ", ".join(map(str, folders)) or "no folder"
            raise SiteError(
                f"{what} is {address}, which is on this machine, and nodes see {seen}; take an s3:// address, or say how nodes "
                "see that folder (deploy.kubernetes.volumes, or deploy.shared for VMs and Slurm)"
            )
    return Carried(recipe=text, site=_toml(there))


def _addresses(site: Site) -> Iterator[tuple[str, str]]:
    yield "runs", site.runs
    yield "cache", site.cache
    for name, places in site.corpora.items():
        for place in [places] if isinstance(places, str) else places:
            yield f"corpus {name!r}", place
    for name, folder in site.weights.items():
        yield f"weights {name!r}", folder


@cache
def _adapter() -> TypeAdapter[Site]:
    return TypeAdapter(Site)


def _toml(site: Site) -> str:
    """What differs from the defaults, as TOML: plain values first, then tables."""
    assert site.storage == replace(site.storage, key=None, secret=None), "keys do not travel"
    found: dict[str, Any] = _adapter().dump_python(site, mode="json", exclude_defaults=True, exclude={"deploy"})
    plain = {key: value for key, value in found.items() if not isinstance(value, dict)}
    lines = [f"{key} = {_value(value)}" for key, value in plain.items()]
    for table, values in found.items():
        if isinstance(values, dict) and values:
            lines += ["", f"[{table}]", *(f"{_key(key)} = {_value(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def _value(value: Any) -> str:
    """JSON's strings, numbers, lists and booleans are TOML's too; tables within tables are written inline."""
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f"{_key(key)} = {_value(inner)}" for key, inner in value.items() if inner is not None) + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
