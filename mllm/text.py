"""Text through `transformers` encoders over packs: attention within documents, one way or both."""

from __future__ import annotations

from torch import Tensor, nn

from ops.attention import Backend, varlen_attention

DOCUMENTS = "mllm_documents"


def _attend(
    module: nn.Module,  # noqa: ARG001 -- the signature is transformers'
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
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention call, (1, H, T, E), over the documents of a pack."""
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    attended = varlen_attention(q, k, v, documents, longest, scale=scaling, causal=causal, backend=backend)
    return attended.unsqueeze(0), None


def register_documents() -> None:
    """Make attention over documents known to transformers under the name `DOCUMENTS`."""
    from transformers import AttentionInterface

    AttentionInterface.register(DOCUMENTS, _attend)
