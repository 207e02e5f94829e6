"""A picture as one token or a few, made of its tower's first feature alone, and found by what a language model says (FROMAGe)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from pipelines.types import spec


@spec
class FirstFeature:
    """FROMAGe's mappings (arXiv:2301.13823, 3.2, 3.3): a tower's CLS, normed, through a matrix to `queries` tokens.

    Two more matrices lead pictures, and the state of a language model at its token for retrieval, into one space of `retrieval`
    numbers; `temperature` is where the learned one begins there. Ask the encoder for cls="keep".
    """

    kind: Literal["first_feature"] = "first_feature"
    queries: Annotated[int, Field(gt=0)] = 1
    retrieval: Annotated[int, Field(gt=0)] = 256
    temperature: Annotated[float, Field(gt=0)] = 0.07

    def tokens(self, patches: int) -> int:  # noqa: ARG002 -- as many as there are queries
        """Visual tokens of a tile."""
        return self.queries

    def tiny(self) -> Self:
        return replace(self, retrieval=16)

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return Mappings(self, d_in, d_out)


class Found(NamedTuple):
    """Embeddings of unit length, of pictures (N, E) and of texts (S, E), and what logits are multiplied by (1,)."""

    pictures: Float[Tensor, "N E"]
    texts: Float[Tensor, "S E"]
    scale: Float[Tensor, " 1"]


class Mappings(nn.Module):
    """`FirstFeature`. With `said`, states of texts, it gives no tokens but what is compared."""

    def __init__(self, spec: FirstFeature, d_in: int, d_out: int) -> None:
        super().__init__()
        self.queries = spec.queries
        self.project = nn.Linear(d_in, spec.queries * d_out)
        self.picture = nn.Linear(d_in, spec.retrieval)
        self.text = nn.Linear(d_out, spec.retrieval)
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / spec.temperature)))

    def forward(self, features: Float[Tensor, "N P Dv"], said: Float[Tensor, "S D"] | None = None) -> Tensor | Found:
        first = features[:, 0]
        if said is None:
            return self.project(first).unflatten(1, (self.queries, -1)).clone()
        pictures, texts = F.normalize(self.picture(first), dim=-1), F.normalize(self.text(said), dim=-1)
        return Found(pictures, texts, self.logit_scale.exp())
