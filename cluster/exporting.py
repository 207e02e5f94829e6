"""What `mllm export` does: the last stage's weights as a folder, read back and compared before it counts as released."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from cluster import loading
from cluster.local import quieten
from cluster.metrics import RunFolder
from cluster.run import last_finished, open_run
from cluster.site import Site, SiteError
from mllm.adapters import ADAPTER, take_off
from mllm.export import export
from mllm.model import Model
from mllm.recipe import Recipe, Stage
from mllm.released import Released, Seen, release, seen
from pipelines.place import Place
from pipelines.types import spec
from pipelines.windows import PackWindows


@spec
class Exported:
    """Where an export lies, and what was checked of it."""

    place: Place
    released: Released

    @property
    def words(self) -> str:
        """In a sentence what was checked."""
        told = self.released
        share = f", the same likeliest token at {told.agree:.1%} of {told.tokens} positions" if told.tokens else ""
        return (
            f"released: read back by {told.read_by}, {told.compared} on {told.on} differ by at most {told.greatest:.2g} "
            f"({told.allowed:.2g} is allowed){share}"
        )


def export_run(site: Site, name: str, out: Path | None, adapter: bool = False) -> Exported:
    """Export the last finished stage of a run. Raises RunError; NotReleased where the folder computes something else."""
    folder, recipe, _ = open_run(site, name)
    quieten(folder.logs)
    return export_of(site, recipe, folder, Place(out) if out else folder.export, adapter)


def export_of(site: Site, recipe: Recipe, folder: RunFolder, out: Place, adapter: bool = False) -> Exported:
    """Export to `out`; what is meant for S3 is made on this machine's disk first, as transformers writes files.

    With `adapter` the last stage's LoRA adapters lie beside the weights they were trained on, in `adapter/`; without, they are
    merged into them.
    """
    mark = last_finished(folder)
    stage = recipe.stage(mark.stage)
    place = folder.root / mark.checkpoint
    model = loading.read_model(recipe, stage, place, merge=not adapter).eval()
    recipe = replace(recipe, model=recipe.model_of(stage))
    before = _seen(site, recipe, stage, model)
    adapters = take_off(recipe, model) if adapter else None
    with TemporaryDirectory() as scratch:
        tokenizer = recipe.model.words.tokenizer
        words = site.folder(tokenizer) if tokenizer else None
        asks = recipe.instructions
        read = site.folder(asks.tokenizer) if asks else None
        made = export(recipe, model, words, out.path if out.local else Path(scratch) / "export", read)
        del model  # two of a large one might be too many
        if adapters is not None:
            adapters.write(made / ADAPTER)
        released = release(recipe, made, before, stage.name, mark.fingerprint)
        if not out.local:
            for file in sorted(path for path in made.rglob("*") if path.is_file()):
                (out / str(file.relative_to(made))).write(file.read_bytes())
    return Exported(place=out, released=released)


def _seen(site: Site, recipe: Recipe, stage: Stage, model: Model) -> Seen:
    """What the model computes of a held-out row, or of a made-up one where the site has none."""
    try:
        held_out = site.held_out(recipe, stage)
    except SiteError:
        held_out = None
    if held_out is None:
        return seen(recipe, model, (), None)
    windows = PackWindows(replace(held_out, annotators=()))
    return seen(recipe, model, windows.samples(windows.rows(0))[0], windows.pixels)
