"""What a frozen tower computes of a pack's tiles, kept from one epoch to the next."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from mllm.annotators.readers import chosen_device, settle
from mllm.annotators.shown import AT_ONCE
from mllm.encoders import Encoder, VisionEncoder
from pipelines import storage
from pipelines.annotate import Folder
from pipelines.types import Pack, spec


@spec
class FrozenFeatures:
    """The frozen encoder run in the pipeline: packs carry features, bfloat16 (N, P, D), in place of tiles.

    With `cache`, a folder or an address (or the name of one, as weights have names), each different tile's features are kept
    there, one file of 2 P D bytes a tile under the SHA-256 of its pixels and of all that decides them: a second epoch then
    reads 1.2 MB for each tile of CLIP-L/336 instead of running the tower. Worth it where storage is nearer than the GPU is
    idle. Loading hashes the tower's weights, about a second a gigabyte.
    """

    kind: Literal["frozen_features"] = "frozen_features"
    encoder: Encoder
    cache: str | None = None

    def packs(self, folder: Folder) -> Callable[[Pack], Pack]:
        """Load the tower: in bfloat16 on a GPU, in float32 elsewhere."""
        device = chosen_device()
        tower = self.encoder.build(folder)
        settle(tower, device)
        home = None if self.cache is None else f"{folder(self.cache).rstrip('/')}/{self._fingerprint(tower)}"

        def annotate(pack: Pack) -> Pack:
            if not len(pack.tiles):
                return self.empty(pack)
            tiles = torch.from_numpy(np.array(pack.tiles))  # packs that travelled cannot be written to, as torch asks
            features = _computed(tower, tiles, device) if home is None else _cached(tower, tiles, device, home)
            return replace(pack, tiles=np.zeros((0, *pack.tiles.shape[1:]), np.uint8), features=features)

        return annotate

    def empty(self, pack: Pack) -> Pack:
        patches = self.encoder.tokens(pack.tiles.shape[-1])
        return replace(pack, features=np.zeros((0, patches, self.encoder.width), np.uint16))

    def _fingerprint(self, tower: VisionEncoder) -> str:
        """Of all that decides features: how the tower is read, the numbers it computes in, its weights (not their name)."""
        digest = hashlib.sha256(TypeAdapter(Encoder).dump_json(replace(self.encoder, weights=None)))
        for name, value in sorted(tower.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]


def _computed(tower: VisionEncoder, tiles: Tensor, device: torch.device) -> NDArray[np.uint16]:
    """Features of `tiles`, bfloat16 bits (n, P, D)."""
    found = [tower(some.to(device)).to(torch.bfloat16).cpu() for some in tiles.split(AT_ONCE)]
    return torch.cat(found).contiguous().view(torch.int16).numpy().view(np.uint16)


def _cached(tower: VisionEncoder, tiles: Tensor, device: torch.device, home: str) -> NDArray[np.uint16]:
    """The same, of which only those are computed that `home` does not hold whole; a tile that comes twice, once.

    A file is the features' P and D, two int32, and their bits.
    """
    names = [hashlib.sha256(tile.numpy().data).hexdigest() for tile in tiles]
    first = {name: number for number, name in reversed([*enumerate(names)])}
    places = {name: f"{home}/{name[:2]}/{name}" for name in first}
    stored = storage.read_many([(place, None, None) for place in places.values()])
    found = {name: _unpacked(data) for name, data in zip(places, stored, strict=True)}
    missing = [name for name, features in found.items() if features is None]
    if missing:
        fresh = _computed(tower, tiles[[first[name] for name in missing]], device)
        found |= dict(zip(missing, fresh, strict=True))
        with ThreadPoolExecutor(storage.AT_ONCE) as pool:
            list(pool.map(lambda name, one: storage.write(places[name], _packed(one)), missing, fresh))
    return np.stack([features for name in names if (features := found[name]) is not None])


def _packed(features: NDArray[np.uint16]) -> bytes:
    return np.array(features.shape, "<i4").tobytes() + features.astype("<u2").tobytes()


def _unpacked(data: bytes | None) -> NDArray[np.uint16] | None:
    """What `_packed` wrote, or None where nothing lies there or not all of it."""
    if data is None or len(data) < 8:
        return None
    patches, width = np.frombuffer(data, "<i4", 2).tolist()
    return (
        np.frombuffer(data, "<u2", offset=8).reshape(patches, width) if len(data) == 8 + 2 * patches * width else None
    )
