"""docs/cluster.md says what holds: its site is read, its manifests are written, its other commands are ones there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from click import Command, Group
from ray.scripts.scripts import cli as ray

from cluster.cli import main
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "cluster.md").read_text()
LINES = [line.removeprefix("    ") for line in PAGE.splitlines() if re.match(r"    \S", line)]
PROGRAMS = ("mllm ", "kubectl ", "docker ", "ray ", "cd ", "sbatch ")
SITE = "\n".join(line for line in LINES if not line.startswith(PROGRAMS))
COMMANDS = [line for line in LINES if line.startswith(PROGRAMS)]


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's site file, without the words that have the model's memory reckoned, which takes a while."""
    (tmp_path / "site.toml").write_text("".join(f"{line}\n" for line in SITE.splitlines() if "gpu_memory" not in line))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLLM_SITE", raising=False)
    return tmp_path


def test_the_page_shows_every_program() -> None:
    assert {line.split()[0] + " " for line in COMMANDS} == set(PROGRAMS)


def parsed(words: list[str]) -> list[str]:
    """Have Ray's own command line read `words`, and do nothing of it. Returns the names of the commands."""
    command: Command = ray
    names: list[str] = []
    while isinstance(command, Group):
        names.append(words[0])
        command, words = command.commands[words[0]], words[1:]
    command.make_context(names[-1], list(words))
    return names


def test_the_commands_of_the_page_hold(there: Path) -> None:
    """In the page's own order, so that files are there when they are named."""
    here = there
    for line in COMMANDS:
        words = shlex.split(line, comments=True)
        if words[0] == "mllm":
            here = there
            main(words[1:])
        elif words[0] == "cd":
            here = there / words[1]
            assert here.is_dir()
        elif words[0] == "ray":
            names = parsed(words[1:])
            if names[0] in ("up", "exec", "dashboard", "down"):
                assert (here / "cluster.yaml").is_file()
            if names[0] == "exec":
                mounted = yaml.safe_load((here / "cluster.yaml").read_text())["file_mounts"]
                assert words[-1].removeprefix("bash ") in mounted
        elif words[0] == "docker" and words[1] == "build":
            assert (ROOT / words[words.index("-f") + 1]).is_file()
            assert words[-1] == "."
        elif words[:3] == ["kubectl", "apply", "-f"] or words[0] == "sbatch":
            assert (here / words[-1]).is_file()
    assert {path.name for path in (there / "manifests").iterdir()} >= {
        "vila_7b-rayjob",
        "vila",
        "vila-aws",
        "vila-slurm",
    }


def test_secrets_that_the_page_has_made_are_those_that_manifests_name(there: Path) -> None:
    main(["manifest", "vila_7b", "--for", "rayjob", "--out", "out"])
    text = (there / "out" / "rayjob.yaml").read_text()
    made = {
        words[4]: words[5:] for line in COMMANDS if (words := shlex.split(line))[:3] == ["kubectl", "create", "secret"]
    }
    assert set(made) == {"mllm-s3", "mllm-ray-token"}
    for name, literals in made.items():
        assert f"name: {name}\n" in text or f"secretName: {name}\n" in text
        for literal in literals:
            key = literal.partition("=")[2].partition("=")[0]
            assert f"key: {key}\n" in text or key == "auth_token"  # which KubeRay asks for by itself
    name = yaml.safe_load_all(text)
    assert [one["metadata"]["name"] for one in name][1] == "vila-7b"


def test_what_manifests_have_ray_do_it_can(there: Path) -> None:
    """Each `ray` command within them is one that this Ray reads: options that it lacks would only be told on a cluster."""
    for target in ("rayjob", "aws", "onprem", "slurm"):
        main(["manifest", "vila_7b", "--for", target, "--out", target, "--workers", "8", "16"])
    found = []
    for file in there.rglob("*"):
        if file.suffix not in (".yaml", ".sh", ".sbatch"):
            continue
        text = file.read_text().replace("\\\n", " ")
        texts = [text] if file.suffix != ".yaml" else list(strings(list(yaml.safe_load_all(text))))
        for one in texts:
            found += re.findall(
                r"(?:^|[;&|(]|--exclude=\S+|--nodelist=\S+)\s*(ray (?!job)[a-z-]+[^;|&>\n]*)", one, re.MULTILINE
            )
    has = "--num-cpus=1 --num-gpus=1 --object-store-memory=1 --disable-usage-stats"
    for command in found:
        bare = (
            command.replace("$has", has).replace("$port", "6379").replace("'\"'\"'", "'").rstrip()
        )  # quoted once, not twice
        parsed(shlex.split(bare if bare.count("'") % 2 == 0 else bare.removesuffix("'"))[1:])
    assert {command.split()[1] for command in found} == {"drain-node", "start", "stop", "health-check"}


def strings(tree: object) -> list[str]:
    if isinstance(tree, dict):
        return [text for value in tree.values() for text in strings(value)]
    if isinstance(tree, list):
        return [text for value in tree for text in strings(value)]
    return [tree] if isinstance(tree, str) else []
