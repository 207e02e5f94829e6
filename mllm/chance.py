"""Chance that depends on rows alone: what is masked in a picture is the same wherever its row is trained on."""

from __future__ import annotations

import math
import random

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mllm.pairs import shown
from pipelines.types import Batch

ROUNDS = 10
"""Blocks that are tried before a mask is left as it is (BEiT's own code)."""


def row_seeds(batch: Batch) -> Int[Tensor, " S"]:
    """The seed of each document's row."""
    if batch.seeds is None:
        raise ValueError("the batch knows no seeds of its rows; make it with Batch.of")
    return batch.seeds


def tile_seeds(batch: Batch) -> Int[Tensor, " N"]:
    """A seed for each tile, of its row and its place among the row's; zero for the blank one."""
    if not len(batch.cuts):
        return torch.zeros(len(batch.tiles), dtype=torch.long, device=batch.weights.device)
    documents = shown(batch).documents.repeat_interleave(batch.cuts[:, 0].long(), output_size=len(batch.tiles))
    counts = torch.bincount(documents, minlength=len(batch.sources))
    # Tiles of one document are told apart by their place among the pack's own tiles of that document.
    place = torch.arange(len(documents), device=documents.device) - (counts.cumsum(0) - counts)[documents]
    return row_seeds(batch)[documents] * 4096 + place


def seeds_of_tiles(batch: Batch) -> list[int]:
    """`tile_seeds` as numbers."""
    return tile_seeds(batch).tolist()


def noise(seeds: list[int], numbers: int) -> Float[Tensor, "N numbers"]:
    """For each seed as many numbers in [0, 1), drawn on the CPU, so that every device has the same."""
    return torch.stack([torch.rand(numbers, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def block_masks(seeds: list[int], side: int, wanted: int, least: int = 16, ratio: float = 0.3) -> Bool[Tensor, "N P"]:
    """For each seed a mask over side x side patches of `wanted` patches at most, rectangles (BEiT, arXiv:2106.08254, alg. 1).

    A rectangle has `least` patches or more and sides between `ratio` and 1 / `ratio` of each other; those that would mask too
    many are thrown away, so that a mask may end a few patches short.
    """
    return torch.stack([_block_mask(random.Random(seed), side, wanted, least, ratio) for seed in seeds])


def _block_mask(dice: random.Random, side: int, wanted: int, least: int, ratio: float) -> Bool[Tensor, " P"]:
    mask = torch.zeros(side, side, dtype=torch.bool)
    masked, vain = 0, 0
    while masked < wanted and vain < ROUNDS:
        area = dice.uniform(min(least, wanted - masked), wanted - masked)
        aspect = math.exp(dice.uniform(math.log(ratio), -math.log(ratio)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        vain += 1
        if not (0 < height < side and 0 < width < side):
            continue
        top, left = dice.randint(0, side - height), dice.randint(0, side - width)
        block = mask[top : top + height, left : left + width]
        new = block.numel() - int(block.sum())
        if 0 < new <= wanted - masked:
            block.fill_(True)
            masked, vain = masked + new, 0
    return mask.flatten()


def chosen(
    seeds: Int[Tensor, " S"], owner: Int[Tensor, " T"], place: Int[Tensor, " T"], salt: int
) -> Float[Tensor, " T"]:
    """A number in [0, 1) for each token, of its row's seed and its place in it; another `salt`, other numbers.

    The last steps of MurmurHash3 (Appleby, 2011), whose every bit depends on every bit it is given.
    """
    return (mixed(seeds[owner] * 0x9E3779B1 + place * 0x85EBCA77 + salt * 0xC2B2AE3D) >> 8).float() / 2**24


def mixed(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """32 bits for the lowest 32 of each of `x`, in which every one of these shows."""
    x = x & MASK
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & MASK
    return x ^ (x >> 16)


MASK = 0xFFFFFFFF
