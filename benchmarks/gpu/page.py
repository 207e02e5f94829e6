"""What is written: a table for each section, below the device that it was measured on."""

from __future__ import annotations

import platform
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.common import table
from benchmarks.gpu.device import CUDA
from benchmarks.gpu.measuring import GIB
from benchmarks.gpu.sections import SECTIONS, section_of
from benchmarks.gpu.sizes import Sizes


def markdown(saved: dict[str, Any]) -> str:
    title = ["# Benchmarks on a GPU", "", "`python -m benchmarks.gpu` writes this file.", ""]
    return "\n".join(title + [line for name in SECTIONS if name in saved for line in table(saved[name])])


def header() -> list[str]:
    """The device, versions and date. Packages that are not there are left out."""
    device = torch.cuda.get_device_name() if CUDA else "no GPU"
    memory = f", {torch.cuda.mem_get_info()[1] / GIB:.0f} GiB" if CUDA else ""
    versions = [f"python {platform.python_version()}"]
    for package in ("torch", "transformers", "triton", "liger-kernel", "flash-attn", "flash-attn-3", "flash-attn-4"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return [f"{device}{memory}", ", ".join(versions), f"{datetime.now(UTC):%Y-%m-%d}"]


def unmeasured(sizes: Sizes) -> dict[str, Any]:
    """Every section with its rows as they are before anything is run."""
    today = f"no machine with a GPU has run this yet, {datetime.now(UTC):%Y-%m-%d}"
    sections = {}
    for name, measured in SECTIONS.items():
        section = section_of(name)
        section.rows += [replace(row, note="not measured") for case in measured.cases(sizes) for row in case.rows]
        sections[name] = {"header": [today], **asdict(section)}
    return sections
