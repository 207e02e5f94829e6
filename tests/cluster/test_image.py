"""The image's recipe. None is built here: what it copies is there, what it installs is pinned, and no secret stands in it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from tests.conftest import ROOT

HERE = ROOT / "cluster" / "manifests"
TEXT = (HERE / "Dockerfile").read_text()
STEPS = [
    (match[1], " ".join(match[2].split()))
    for line in re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines()
    if (match := re.match(r"([A-Z]+) (.*)", line))
]


def of(word: str) -> list[str]:
    return [rest for step, rest in STEPS if step == word]


def test_every_line_is_a_step() -> None:
    words = {step for step, _ in STEPS}
    assert words == {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "CMD"}  # and no ADD, no SHELL


def test_what_is_copied_is_there_and_sent() -> None:
    ignore = (HERE / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignore[1] == "*"
    for step in of("COPY"):
        *sources, _ = step.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignore
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    copied = {source for step in of("COPY") for source in step.split()[:-1]}
    assert {name.removesuffix("*") for name in packages} <= copied


def test_each_device_has_a_stage_and_both_are_pinned_by_the_constraints() -> None:
    stages = {one.split(" AS ")[1]: one.split(" AS ")[0] for one in of("FROM")}
    assert {"torch-cpu", "torch-cuda", "mllm"} <= stages.keys()
    assert stages["mllm"] == "torch-${DEVICE}"
    assert "DEVICE=cpu" in of("ARG")
    installs = [run for run in of("RUN") if "pip install" in run]
    assert len(installs) == 3
    for run in installs:
        assert "-c constraints.txt" in run
        assert "==" not in run  # versions stand in one place
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {"torch", "ray", "transformers", "s3fs"} <= pinned
    assert [run for run in installs if "whl/cpu" in run] == [installs[0]]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = next(one.partition("=")[2] for one in of("ARG") if one.startswith("EXTRAS"))
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    python = next(one.partition("=")[2] for one in of("ARG") if one.startswith("PYTHON"))
    assert project["requires-python"] == f">={python}"


def test_it_is_built_as_images_should_be() -> None:
    """hadolint's rules that matter here: tags, package lists, no sudo, no root at the end, one pipe-less shell a step."""
    for one in of("FROM"):
        assert ":latest" not in one
        assert ":" in one or one.split()[0] in ("base", "torch-${DEVICE}")
    for run in of("RUN"):
        assert "sudo" not in run
        assert "|" not in run
        if "apt-get install" in run:
            assert "apt-get update &&" in run
            assert "--no-install-recommends" in run
            assert "--yes" in run
            assert run.endswith("rm -rf /var/lib/apt/lists/*")
            names = run.partition("--no-install-recommends")[2].partition("&&")[0].split()
            assert names == sorted(names)
    assert of("USER")[-1] == "ray"
    assert [step for step, _ in STEPS].index("USER") > max(n for n, (step, _) in enumerate(STEPS) if step == "RUN")
    assert all(Path(place).is_absolute() for place in of("WORKDIR"))
    assert of("CMD")[-1].startswith("[")
    assert not re.search(r"(TOKEN|SECRET|PASSWORD|KEY)=", TEXT)


def test_it_has_what_manifests_call() -> None:
    """bash and coreutils are Debian's own."""
    apt = next(run for run in of("RUN") if "apt-get install" in run)
    written = "".join(path.read_text() for path in HERE.glob("*.py"))
    for program, package in (("pkill", "procps"), ("curl", "curl")):
        assert f"{program} -" in written
        assert f" {package} " in apt
