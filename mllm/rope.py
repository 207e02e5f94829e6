"""Rotary positions beyond the context that a decoder was trained for, as values on its architecture.

Each becomes the `rope_parameters` of transformers. Scaling that looks at how long the sequence at hand is (dynamic NTK) is
left out on purpose: in a pack it would look at the longest document, so that a document would change with its company.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from pipelines.types import spec

Factor = Annotated[float, Field(gt=1)]


@spec
class LinearRope:
    """Positions divided by `factor` (position interpolation, arXiv:2306.15595; LLaVA-NeXT-Video has 2)."""

    kind: Literal["linear"] = "linear"
    factor: Factor

    def parameters(self, theta: float, head: int) -> dict[str, Any]:  # noqa: ARG002 -- one signature for all
        """`rope_parameters` for a decoder of base `theta` and heads `head` wide."""
        return {"rope_type": "linear", "rope_theta": theta, "factor": self.factor}


@spec
class NTK:
    """The base raised so that the slowest frequency reaches `factor` times as far (NTK-aware, fixed; YaRN's paper, 3.1).

    theta * factor ** (d / (d - 2)) for heads d wide.
    """

    kind: Literal["ntk"] = "ntk"
    factor: Factor

    def parameters(self, theta: float, head: int) -> dict[str, Any]:
        """`rope_parameters` for a decoder of base `theta` and heads `head` wide."""
        return {"rope_type": "default", "rope_theta": theta * self.factor ** (head / (head - 2))}


@spec
class YaRN:
    """YaRN (arXiv:2309.00071): slow frequencies interpolated, fast ones kept, and the scores' temperature changed.

    `original` is the context that the weights were trained for.
    """

    kind: Literal["yarn"] = "yarn"
    factor: Factor
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def parameters(self, theta: float, head: int) -> dict[str, Any]:  # noqa: ARG002 -- one signature for all
        """`rope_parameters` for a decoder of base `theta` and heads `head` wide."""
        return {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": self.factor,
            "original_max_position_embeddings": self.original,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
        }


@spec
class Llama3Rope:
    """Llama 3.1's: wavelengths beyond `original` / `low` divided by `factor`, those within `original` / `high` kept."""

    kind: Literal["llama3"] = "llama3"
    factor: Factor = 8.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def parameters(self, theta: float, head: int) -> dict[str, Any]:  # noqa: ARG002 -- one signature for all
        """`rope_parameters` for a decoder of base `theta` and heads `head` wide."""
        return {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": self.factor,
            "low_freq_factor": self.low,
            "high_freq_factor": self.high,
            "original_max_position_embeddings": self.original,
        }


RopeScaling = Annotated[LinearRope | NTK | YaRN | Llama3Rope, Field(discriminator="kind")]


def rope_parameters(theta: float, scaling: RopeScaling | None, head: int) -> dict[str, Any]:
    """What transformers calls `rope_parameters`; plain rotary positions of base `theta` without `scaling`."""
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    return scaling.parameters(theta, head)
