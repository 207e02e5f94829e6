"""The reference of a stage that compares with what it began with: the stage before, as an export beside the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from mllm.annotators import ReferenceLogProbs
from pipelines.place import Place

if TYPE_CHECKING:
    from cluster.job import StageJob
    from pipelines.windows import Stream


def with_reference(job: StageJob) -> StageJob:
    """The job with a name for the reference that is what it begins with, if its stage asks for one.

    It is written to the run's `references/`, by the name of the checkpoint that it is of, unless it is there whole. Both the
    stage's packs and the held-out ones are compared with it.
    """
    if not any(_open(annotator) for annotator in job.stream.annotators):
        return job
    assert job.before is not None  # as a recipe makes sure
    assert job.previous is not None  # its checkpoint
    previous = Place(job.previous)
    home = job.folder.root / "references" / f"{job.folder.key(job.before.name)}-{previous.name}"
    if not (home / "recipe.json").is_file():
        _write(job, previous, home)

    def named(stream: Stream) -> Stream:
        annotators = (ReferenceLogProbs(checkpoint=str(home)) if _open(a) else a for a in stream.annotators)
        return replace(stream, annotators=tuple(annotators))

    return replace(job, stream=named(job.stream), held_out=None if job.held_out is None else named(job.held_out))


def _open(annotator: object) -> bool:
    """Whether it waits for the name of a reference."""
    return isinstance(annotator, ReferenceLogProbs) and annotator.checkpoint is None


def _write(job: StageJob, previous: Place, home: Place) -> None:
    """Export the model of the checkpoint `previous` to `home`; `recipe.json` last, which says that all is there."""
    from cluster import loading
    from mllm.export import export

    before = job.before
    assert before is not None
    model = loading.read_model(job.recipe, before, previous).eval()
    recipe = replace(job.recipe, model=job.recipe.model_of(before))
    if home.local:
        export(recipe, model, job.stream.tokenizer, home.path)
        return
    with TemporaryDirectory() as scratch:
        made = export(recipe, model, job.stream.tokenizer, Path(scratch) / "reference")
        files = sorted(
            (path for path in made.rglob("*") if path.is_file()), key=lambda path: path.name == "recipe.json"
        )
        for file in files:
            (home / str(file.relative_to(made))).write(file.read_bytes())
