"""Text through `transformers` encoders over packs: attention within documents, one way or both."""

from __future__ import annotations

from torch import Tensor, nn

from mllm.dropout import WeightDropout
from ops.attention import Backend, varlen_attention
from ops.cross import Runs

DOCUMENTS = "mllm_documents"


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 -- documents stand in `documents`
    scaling: float | None = None,
    *,
    documents: Tensor,
    longest: int,
    causal: bool = False,
    backend: Backend | None = None,
    lengths: tuple[int, ...] = (),
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention call, (1, H, T, E), over the documents of a pack.

    `lengths` are the documents', which attention needs that leaves out some of its weights.
    """
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    left_out = getattr(module, "left_out", None)
    if isinstance(left_out, WeightDropout) and left_out.active:
        assert not causal  # no model here leaves out weights of a view that is causal
        attended = left_out.attention(q, k, v, Runs(lengths, lengths), scaling)
    else:
        attended = varlen_attention(q, k, v, documents, longest, scale=scaling, causal=causal, backend=backend)
    return attended.unsqueeze(0), None


def register_documents() -> None:
    """Make attention over documents known to transformers under the name `DOCUMENTS`."""
    from transformers import AttentionInterface

    AttentionInterface.register(DOCUMENTS, _attend)
