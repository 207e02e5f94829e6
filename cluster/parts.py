"""A stage's weights as safetensors files, a part of the model each: what other programs read, beside the checkpoint for us.

    connector.safetensors
    lm-00001-of-00004.safetensors ...          a part of more than `LARGEST` bytes
    model.safetensors.index.json               which file has which tensor; written last

The names are the model's own. Files are streamed, so that one process writes a model of any size to any storage.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from cluster.shards import bytes_of
from pipelines import storage
from pipelines.place import Place

INDEX = "model.safetensors.index.json"

LARGEST = 4 * 2**30
"""Bytes of tensors in one file, unless a single one has more."""

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls each type of number."""


def write_parts(folder: Place, model_state: Mapping[str, Tensor], largest: int = LARGEST) -> list[str]:
    """Write whole tensors, `loading.read_model(...).state_dict()`, to `folder`; the files' names, the index last.

    A part is what the first word of a name says: encoder, connector, lm.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model_state.items():
        parts.setdefault(name.partition(".")[0], {})[name] = tensor
    where: dict[str, str] = {}
    for part, tensors in parts.items():
        pieces = list(_cut(tensors, largest))
        for number, piece in enumerate(pieces, 1):
            count = f"-{number:05d}-of-{len(pieces):05d}" if len(pieces) > 1 else ""
            file = f"{part}{count}.safetensors"
            _write(folder / file, piece)
            where |= dict.fromkeys(piece, file)
    size = sum(tensor.nbytes for tensor in model_state.values())
    words = json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=1)
    (folder / INDEX).write(words.encode())
    return [*dict.fromkeys(where.values()), INDEX]


def _cut(tensors: dict[str, Tensor], largest: int) -> Iterator[dict[str, Tensor]]:
    piece: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if piece and size + tensor.nbytes > largest:
            yield piece
            piece, size = {}, 0
        piece[name] = tensor
        size += tensor.nbytes
    yield piece


def _write(file: Place, tensors: dict[str, Tensor]) -> None:
    """One file: eight bytes that say how long the header is, the header, the tensors end to end."""
    header: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
    at = 0
    ordered = sorted(
        tensors.items(), key=lambda row: -row[1].element_size()
    )  # so that each begins at a multiple of its own
    for name, tensor in ordered:
        stop = at + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, stop]}
        at = stop
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    with storage.open_write(file.uri) as out:
        out.write(struct.pack("<Q", len(words)) + words)
        for _, tensor in ordered:
            out.write(bytes_of(tensor.detach()).data)
