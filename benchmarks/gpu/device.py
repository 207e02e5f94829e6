"""The device that everything is measured on: its types, and what cannot be had there."""

from __future__ import annotations

import torch

from mllm.recipe import Dtype
from ops.losses import fused_by, liger_is_there

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
GROUP = "cpu:gloo,cuda:nccl" if CUDA else "gloo"
"""What process groups there talk by."""

HALF, DOUBLE = torch.bfloat16, torch.float64
DTYPE: Dtype = "bfloat16" if CUDA else "float32"
COMPUTED = torch.bfloat16 if CUDA else torch.float32
"""What is computed in where times are taken: in a recipe's words, and in torch's."""


def without_liger(dtype: torch.dtype) -> str:
    """Why Liger's kernel cannot take a loss here; nothing where it can."""
    return fused_by(DEVICE.type, dtype, liger_is_there())[1]
