"""What Ray Train's controller calls, in its own process, when a group of workers has failed or is about to be changed."""

from __future__ import annotations

import time
from typing import Any

from cluster.journal import Decision, Fault, Journal
from pipelines import storage
from pipelines.place import Place
from pipelines.storage import Storage
from pipelines.value import spec


@spec
class Stage:
    """What is told of a stage to who writes of it in another process, which then need not know what is learned."""

    name: str
    run: str
    token: int
    storage: Storage

    def journal(self) -> Journal:
        """The run's journal, to be written under the token of the stage's controller, with its storage in use here."""
        storage.use(self.storage)
        return Journal(Place(self.run), self.token)


def failures(stage: Stage, pulse: Any) -> Any:
    """What Ray Train calls, in its controller's process, when workers have failed: it goes into the journal."""
    from ray.train import UserCallback

    class Failures(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002 -- Ray's
            pulse.disband.remote()
            journal = stage.journal()
            state = journal.state()
            step = state.groups[-1].step if state.groups else 0
            some = sorted(worker_exceptions.items())[:4]  # one is the cause, the others lost their neighbour
            for rank, error in some:
                told = {"stage": stage.name, "step": step, "rank": rank, "detail": root_of(error)}
                journal.append(Fault(time=time.time(), what="workers", **told))

    return Failures()


LEAVE = 60.0
"""Seconds that a group has to save before another takes its place."""


def resizing(stage: Stage, pulse: Any) -> Any:
    """Has the group save before Ray starts one of another size in its place, which then does nothing twice."""
    import ray
    from ray.train.v2._internal.execution.callback import ControllerCallback  # a developers' interface of Ray's

    class Resizing(ControllerCallback):
        def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
            ranks, _ = ray.get(pulse.look.remote())
            if not ranks:
                return  # none trains: this is a beginning
            why = f"{len(ranks)} workers train and {resize_decision.num_workers} can be had: saved now, nothing is done twice"
            stage.journal().append(Decision(time=time.time(), what="save_and_leave", stage=stage.name, why=why))
            pulse.ask.remote("save_and_leave")
            deadline = time.monotonic() + LEAVE
            while time.monotonic() < deadline and ray.get(pulse.look.remote())[0]:
                time.sleep(0.2)
            ray.get(pulse.ask.remote(""))

    return Resizing()


def root_of(error: BaseException) -> str:
    """The words of the innermost cause: Ray wraps a worker's exception several times over."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, cause = next(iter(failures.items()))
        return f"rank {rank}: {root_of(cause)}"
    inner = error.__cause__ or getattr(error, "cause", None)
    if isinstance(inner, BaseException) and inner is not error:
        return root_of(inner)
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].partition(" Some common causes")[0] if lines else type(error).__name__
