"""Writes the example corpora of regions: what a toy of a detector finds in the pictures of `example-pairs`.

    python examples/make_regions.py

Of each picture a grid of nine boxes: its features are the mean and the spread of its colours, of the whole and of its four
quarters; its classes how near its mean is to eight colours; its attributes how bright it is, of four kinds. Captions are the
pairs' own. Questions ask for the colour in the middle, answered from four, or not at all.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ops import images
from pipelines.objects import Found, grid, packed

CORPUS = Path(__file__).resolve().parent / "corpus"
COLOURS = np.array([[r, g, b] for r in (0.1, 0.9) for g in (0.1, 0.9) for b in (0.1, 0.9)], np.float32)
ROWS = 32
SIDE = 96


def look(data: bytes) -> Found:
    pixels = images.resize(images.decode(data), SIDE, SIDE).numpy().astype(np.float32) / 255
    step = SIDE // 3
    crops = [pixels[:, r : r + step, c : c + step] for r in range(0, SIDE, step) for c in range(0, SIDE, step)]
    features, half = [], step // 2
    for crop in crops:
        quarters = [crop[:, r : r + half, c : c + half].mean((1, 2)) for r in (0, half) for c in (0, half)]
        features.append(np.concatenate([*quarters, crop.mean((1, 2)), [crop.std()]]))
    means = np.stack([crop.mean((1, 2)) for crop in crops])
    near = -8 * np.linalg.norm(means[:, None] - COLOURS, axis=2)
    bright = -40 * (means.mean(1)[:, None] - np.array([0.125, 0.375, 0.625, 0.875])) ** 2
    return Found(np.stack(features).astype(np.float32), likely(near), likely(bright), grid(3, 3))


def likely(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return (powers / powers.sum(1, keepdims=True)).astype(np.float32)


def write(path: Path, rows: list[dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for number, files in enumerate(rows):
            for ending, data in files.items():
                member = tarfile.TarInfo(f"{number:05}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def main() -> None:
    with tarfile.open(CORPUS / "pairs" / "00000.tar") as archive:
        read = {member.name: archive.extractfile(member) for member in archive}
        files = {name: file.read() for name, file in read.items() if file is not None}
    stems = [name[:-4] for name in files if name.endswith(".jpg")][:ROWS]
    pairs, questions = [], []
    for number, stem in enumerate(stems):
        found = look(files[f"{stem}.jpg"])
        regions = packed(found)
        pairs.append({"npz": regions, "txt": files[f"{stem}.txt"]})
        asked = {"npz": regions, "txt": b"Which colour is in the middle?"}
        colour = int(found.classes[4].argmax()) // 2
        questions.append(asked if number % 8 == 7 else asked | {"cls": str(colour).encode()})
    (CORPUS / "regions").mkdir(exist_ok=True)
    write(CORPUS / "regions" / "00000.tar", pairs)
    write(CORPUS / "regions" / "questions.tar", questions)


if __name__ == "__main__":
    main()
