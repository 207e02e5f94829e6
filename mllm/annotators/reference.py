"""What a frozen reference says to the answers that DPO compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import torch
from torch import nn

from mllm.annotators.readers import chosen_device, settle
from ops.losses import linear_cross_entropy
from pipelines import storage
from pipelines.annotate import Folder
from pipelines.answers import changed_tokens
from pipelines.place import Place
from pipelines.types import Batch, Pack, spec


@spec
class ReferenceLogProbs:
    """Log-probabilities of each document under a frozen reference, as `Pack.references` holds them: what DPO compares with.

    `checkpoint` is an exported run: its recipe, which lies beside the weights, says what model it is. None is the model that the
    stage begins with, which a run exports before the stage. It computes as trainers do, in bfloat16 on a GPU and in float32
    elsewhere; what it says of a pack is the same however often it is asked.
    """

    kind: Literal["reference_log_probs"] = "reference_log_probs"
    checkpoint: str | None = None

    def packs(self, folder: Folder) -> Callable[[Pack], Pack]:
        """Load the reference. Raises FileNotFoundError when the folder is no export, ValueError when there is none yet."""
        from mllm.vlm import VisionLanguageModel

        if self.checkpoint is None:
            raise ValueError(
                "reference_log_probs: the reference is the model that the stage begins with, which is there once a run has come "
                "to it; name an export with `checkpoint` to have references before"
            )
        device = chosen_device()
        model = _exported(folder(self.checkpoint))
        if not isinstance(model, VisionLanguageModel):
            raise ValueError(f"reference_log_probs: the export {self.checkpoint!r} is no model with a language model")
        settle(model, device)

        @torch.no_grad()
        def annotate(pack: Pack) -> Pack:
            batch = Batch.of(pack, device)
            each = -linear_cross_entropy(model(batch), model.lm.head, batch.labels).each
            changed = changed_tokens(batch.labels.cpu().numpy(), batch.cu_seqlens.tolist(), batch.branches.tolist())
            columns = torch.stack([each, each * torch.from_numpy(changed).to(device)], dim=1)
            sums = each.new_zeros(len(batch.sources), 2).index_add_(0, batch.document_of_token(), columns)
            return replace(pack, references=sums.float().cpu().numpy()[: len(pack.sources)])

        return annotate

    def empty(self, pack: Pack) -> Pack:
        return replace(pack, references=np.zeros((0, 2), np.float32))


def _exported(place: str) -> nn.Module:
    """The model of an export, fetched to this machine's disk first where it lies on S3."""
    from mllm.export import read_back

    home = Place(place)
    if home.local:
        return read_back(home.path)
    with TemporaryDirectory() as scratch:
        for file in storage.glob(f"{home.uri}/**"):
            copy = Path(scratch) / file.removeprefix(f"{home.uri}/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(storage.read(file))
        return read_back(Path(scratch))
