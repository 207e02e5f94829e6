"""What a worker needs to train a stage, and how its work may end."""

from __future__ import annotations

from collections.abc import Callable

from cluster import checkpoint
from cluster.checkpoint import PassedOver
from cluster.journal import Journal
from cluster.metrics import RunFolder
from cluster.policy import Watch
from mllm.recipe import LoRA, Recipe, Stage
from pipelines.place import Place
from pipelines.types import spec
from pipelines.windows import Stream


@spec
class StageJob:
    """All that a worker needs to train a stage: values and paths, no handles."""

    recipe: Recipe
    stage: Stage
    stream: Stream
    held_out: Stream | None
    run: str
    token: int
    watch: Watch
    fingerprint: str
    previous: str | None
    weights: dict[str, str]
    versions: dict[str, str]

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.run)

    @property
    def journal(self) -> Journal:
        """The run's journal, to be written under the token of the controller that made this job."""
        return Journal(self.folder.root, self.token)

    @property
    def before(self) -> Stage | None:
        """The stage that this one follows."""
        return self.recipe.before(self.stage)

    @property
    def adapted(self) -> bool:
        """Whether this stage or the one before has adapters, so that their checkpoints have other names."""
        stages = [stage for stage in (self.before, self.stage) if stage]
        return any(isinstance(how, LoRA) for stage in stages for how in stage.tune.values())

    def place(self, name: str) -> str:
        """The folder (or hub id) of weights by their name in the recipe."""
        return self.weights.get(name, name)

    @property
    def checkpoints(self) -> Place:
        return self.folder.checkpoints(self.stage.name)

    def resume_from(self, tell: Callable[[PassedOver], object] = lambda _: None) -> Place | None:
        """The checkpoint to go on from, or None at the stage's beginning; `tell` hears of those that are passed over."""
        found = checkpoint.newest(self.checkpoints, self.fingerprint, self.stream.order.fingerprint, tell)
        return found.folder if found else None


class StopRun(RuntimeError):
    """A fault that trying again cannot mend: the stage ends at once, with these words."""


class TooManyBadRows(StopRun):
    """A shard's share of dropped rows exceeds what its source declares."""


class Leave(RuntimeError):
    """The group ends so that Ray starts another from the checkpoint: trying again is the mend."""
