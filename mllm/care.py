"""What a stage asks before it begins, and what it does with steps that go wrong; values only, which `cluster` acts upon."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipelines.types import spec

Positive = Annotated[int, Field(ge=1)]


@spec
class Gate:
    """What the stage before must have come to: a held-out `loss` at most, an `accuracy` at least, so many `tokens` trained.

    `source` is the held-out corpus that is looked at; None means all, weighted by their learned tokens.
    """

    loss: float | None = None
    accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    tokens: Positive | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        if self.loss is None and self.accuracy is None and self.tokens is None:
            raise ValueError(
                "a gate that asks for nothing is always open; give it a loss, an accuracy or tokens, or none"
            )


@spec
class Guard:
    """What is done with a step whose loss or gradient norm is no number or leaps.

    A *spike* is a gradient norm, or a rise of the loss over its median, more than `spike` times what was usual in the last
    `window` steps (its median; for the loss, the median distance from the median); None looks only for what is no number.
    Such a step is first done again on the same packs with the same weights. If it then comes out well, the machine was at
    fault, and it is taken. If it comes out the same, the data was: it is left out (`skip`) or the run stops (`stop`), its rows
    named either way. More than `most` steps left out in a row stop the run.
    """

    spike: Annotated[float, Field(gt=1)] | None = None
    window: Annotated[int, Field(ge=8)] = 64
    bad: Literal["skip", "stop"] = "skip"
    most: Positive = 10
