"""Which folder is meant by CHECKPOINT: one that `mllm export` wrote, or a run's name, whose export it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from cluster.controller import RunError
from cluster.run import open_run
from cluster.site import Site
from pipelines.place import Place
from pipelines.types import spec


@spec
class Found:
    """An export on this machine's disk, and the name that its model goes by."""

    folder: Path
    name: str


@contextmanager
def found(site: Site, checkpoint: str) -> Iterator[Found]:
    """The export that `checkpoint` means; what lies on S3 is on this machine's disk as long as this lasts.

    Raises RunError where there is none.
    """
    place = Place(checkpoint)
    if is_export(place):
        name = _name(place)
    else:
        run, _, _ = open_run(site, checkpoint)
        place, name = run.export, run.name
        if not is_export(place):
            raise RunError(f"run {run.name!r} has no export yet; write one with: mllm export {run.name}")
    if place.local:
        yield Found(folder=place.path, name=name)
        return
    with TemporaryDirectory() as scratch:
        fetch(place, Path(scratch))
        yield Found(folder=Path(scratch), name=name)


def is_export(place: Place) -> bool:
    """Whether `mllm export` wrote the folder; a run has a recipe too, and a journal beside it."""
    weights = ("config.json", "connector.safetensors", "model.safetensors")
    return (place / "recipe.json").is_file() and any((place / name).is_file() for name in weights)


def _name(export: Place) -> str:
    """The run's that the folder lies in, or the folder's own."""
    export = Place(export.path.resolve()) if export.local else export
    return export.parent.name if (export.parent / "recipe.json").is_file() else export.name


def fetch(place: Place, to: Path) -> None:
    """Copy a folder's files to the disk."""
    to.mkdir(exist_ok=True)
    files = place.sizes()
    for name in place.names():
        if name in files:
            (to / name).write_bytes((place / name).read_bytes())
        else:
            fetch(place / name, to / name)
