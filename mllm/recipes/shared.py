"""What recipes have in common."""

from __future__ import annotations

from mllm.recipe import Full, Tuning


def decayed(
    parts: tuple[str, ...], lr: float, weight_decay: float, free: tuple[str, ...] = ("*.bias", "*norm*.weight")
) -> dict[str, Tuning]:
    """All of `parts` at one rate; names that match `free` without weight decay, as biases and gains are kept since BERT."""
    tune: dict[str, Tuning] = {part: Full(lr=lr, weight_decay=weight_decay) for part in parts}
    return tune | {pattern: Full(lr=lr) for pattern in free}
