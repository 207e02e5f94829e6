"""With what a run is made: this process's packages, and a word that changes with this project's own code."""

from __future__ import annotations

import importlib.metadata
import platform
from functools import cache
from pathlib import Path

import xxhash

from mllm import __version__

PACKAGES = ("cluster", "mllm", "ops", "pipelines")
"""What this project is made of."""


def versions() -> dict[str, str]:
    """Versions by name, read from what is installed: nothing is imported."""
    packages = ("torch", "transformers", "ray", "numpy", "tokenizers")
    own = {"python": platform.python_version(), "mllm": __version__}  # which on a cluster is no installed package
    return own | {name: importlib.metadata.version(name) for name in packages}


@cache
def code() -> str:
    """Eight digits that two machines share where they have the same source files of this project."""
    root = Path(__file__).resolve().parent.parent
    digest = xxhash.xxh64()
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:8]
