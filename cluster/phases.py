"""Where a rank's time goes within a step: waiting for data, vision, the language model, waiting for other ranks.

A step takes as long as its slowest rank, and from outside all ranks are equally slow: the others wait for it in collectives.
So time spent there is taken out of the part that it falls into. What is left is the rank's own, and tells who is waited for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mllm.model import Model
from pipelines.types import spec

PhaseName = Literal["data", "vision", "lm", "communication"]
PHASES: tuple[PhaseName, ...] = get_args(PhaseName)


@spec
class Phases:
    """Seconds of one rank in one step.

    `vision` is encoder and connector, forward and backward. `lm` is the language model, the objective, the optimiser and
    whatever is nothing else. `communication` is waiting in collectives, with what is copied for them.
    """

    data: float = 0.0
    vision: float = 0.0
    lm: float = 0.0
    communication: float = 0.0

    @property
    def own(self) -> float:
        """Seconds that the rank itself computed."""
        return self.vision + self.lm


@spec
class Pace:
    """Means of one rank over some steps: its phases, and the tokens that it had."""

    phases: Phases
    tokens: float


class PhaseClock:
    """Measures the phases of an engine's steps, and changes nothing: `start`, what is told by hooks, `settle`, `stop`.

    On CPU marks are readings of a clock. On CUDA they are events on the current stream, read by `settle` once the host has
    waited for the device anyway; what comes after that, the optimiser above all, is told with the step that follows.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[Any, PhaseName | None]] = []
        """Moments, and the phase that begins at each."""
        self.spare: list[torch.cuda.Event] = []
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.at: PhaseName | None = None
        self.back: PhaseName | None = None
        self.queued = False

    def start(self) -> None:
        """A step begins, with what is neither vision nor waiting."""
        if self.at is not None:  # a step was left by an exception
            self.marks.clear()
        self._mark("lm")

    def enter(self, phase: PhaseName) -> None:
        """From here on it is `phase`; nothing outside of a step."""
        if self.at is not None and self.at != phase:
            self._mark(phase)

    def backward_done(self) -> None:
        self.queued = False
        self.enter("lm")

    def settle(self) -> None:
        """Add up what was marked. On CUDA the host must have waited for all of it."""
        for (since, phase), (until, _) in pairwise(self.marks):
            if phase is not None:
                self.seconds[phase] += since.elapsed_time(until) / 1e3 if self.cuda else until - since
        if self.cuda:
            self.spare += [event for event, _ in self.marks[:-1]]
        del self.marks[:-1]

    def stop(self) -> Phases:
        """The step ends: its phases, without the wait for data before it."""
        self._mark(None)
        if not self.cuda:
            self.settle()
        told = Phases(**self.seconds)
        self.seconds = dict.fromkeys(PHASES, 0.0)
        return told

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within, the rank waits for others."""
        self._wait()
        try:
            yield
        finally:
            self._go_on()

    def follow(self, model: Model) -> None:
        """Tell vision from the language model, where a model has a border between them.

        Where nothing of vision is trained, no gradient arrives there.
        """
        border = getattr(model, "border", None)
        if isinstance(border, nn.Module):
            model.register_forward_pre_hook(lambda *_: self.enter("vision"))
            border.register_forward_hook(self._seen)

    def follow_collectives(self, unit: nn.Module) -> None:
        """Time what FSDP2 does around a sharded unit: gather it, forward and backward, and reduce its gradients.

        FSDP2 hangs all of it into the unit's hooks and its tensors' hooks, so these are framed by others, before and after:
        whatever it waits for, now or in another version, lies between. To be called when the unit is sharded.
        """
        unit.register_forward_pre_hook(lambda *_: self._wait(), prepend=True)
        unit.register_forward_pre_hook(self._gathered, with_kwargs=True)
        unit.register_forward_hook(lambda _, __, output: _hang(output, self._backward_arrives), prepend=True)
        unit.register_forward_hook(lambda _, __, output: _hang(output, lambda _: self._go_on()))

    def _seen(self, _: nn.Module, __: Any, visual: Tensor) -> None:
        self.enter("lm")
        if visual.requires_grad:
            visual.register_hook(lambda _: self.enter("vision"))

    def _gathered(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self._go_on()
        # The node that FSDP2 lays under a unit's inputs reduces the unit's gradients once backward has come through.
        nodes = {tensor.grad_fn for tensor in _tensors((args, kwargs)) if tensor.grad_fn is not None}
        for node in nodes:
            if "RegisterPostBackward" in node.name():
                node.register_prehook(lambda *_: self._wait())
                node.register_hook(lambda *_: self._go_on())

    def _backward_arrives(self, _: Tensor) -> None:
        if not self.queued:  # FSDP2 queues the end of its reductions in the hook that follows: this comes before it
            self.queued = True
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._wait)
        self._wait()

    def _wait(self) -> None:
        if self.at not in (None, "communication"):
            self.back = self.at
            self._mark("communication")

    def _go_on(self) -> None:
        if self.at == "communication" and self.back is not None:
            self._mark(self.back)

    def _mark(self, phase: PhaseName | None) -> None:
        self.marks.append((self._now(), phase))
        self.at = phase

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = self.spare.pop() if self.spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _hang(output: Any, hook: Any) -> None:
    """Call `hook` when the gradient of any tensor of `output` arrives."""
    for tensor in _tensors(output):
        if tensor.requires_grad:
            tensor.register_hook(hook)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


JUDGED = 64
"""Steps after which ranks are compared: one slow step is no slow rank."""


class Paces:
    """What the steps of each rank add up to, kept by rank 0 for its group."""

    def __init__(self, world: int, steps: int = JUDGED) -> None:
        self.world = world
        self.steps = steps
        self._begin()

    def _begin(self) -> None:
        self.added = 0
        self.sums = [[0.0] * (len(PHASES) + 1) for _ in range(self.world)]

    def add(self, ranks: Sequence[tuple[Phases, int]]) -> list[Pace]:
        """Add one step's phases and tokens of every rank; the means after each `steps` steps, else nothing."""
        for total, (phases, tokens) in zip(self.sums, ranks, strict=True):
            for number, value in enumerate((*(getattr(phases, name) for name in PHASES), tokens)):
                total[number] += value
        self.added += 1
        if self.added < self.steps:
            return []
        means = [[value / self.added for value in total] for total in self.sums]
        self._begin()
        return [Pace(phases=Phases(**dict(zip(PHASES, each[:-1], strict=True))), tokens=each[-1]) for each in means]
