"""What the pages say holds: commands are ones there are, snippets run, links lead somewhere, the site has every page."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
import tyro
import yaml

from cluster import cli, supervisor
from cluster.commands import Command
from cluster.commands.words import recipe_of
from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]

COMMANDS = {get_args(one)[1].name: get_args(one)[0] for one in get_args(Command)}
"""The class of each command by its name."""


def blocks(page: Path) -> list[str]:
    """Lines of a page that are typed or written into a file: those that four spaces stand before, a shell's `$` taken away."""
    found = [line.removeprefix("    ") for line in page.read_text().splitlines() if re.match(r"    \S", line)]
    return [line.removeprefix("$ ") for line in found]


def said(page: Path, program: str) -> list[list[str]]:
    """The words behind `program` wherever a page has it typed."""
    lines = [line for line in blocks(page) if line.startswith(program + " ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


TYPED = [(page, words) for page in PAGES for words in said(page, "mllm")]


@pytest.mark.parametrize(
    ("page", "words"), TYPED, ids=[f"{page.name}: {' '.join(words)[:60]}" for page, words in TYPED]
)
def test_every_command_is_read(page: Path, words: list[str]) -> None:  # noqa: ARG001 -- the page is for the test's name
    name, *rest = cli.spread([word for word in words if word != cli.DEBUG])
    told = tyro.cli(
        COMMANDS[name],
        args=rest,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    assert type(told) is COMMANDS[name]


def test_commands_that_pages_name_are_there() -> None:
    """Also in the midst of a sentence, where a command may lack what it needs to be given."""
    for page in PAGES:
        for command in re.findall(r"`mllm ([a-z]+(?: [a-z]+)?)", page.read_text()):
            assert command in COMMANDS or command.split()[0] in COMMANDS, f"{page.name}: mllm {command}"


def test_every_command_stands_in_some_page() -> None:
    shown = {cli.spread(list(words))[0] for _, words in TYPED}
    named = {name for page in PAGES for name in COMMANDS if f"`mllm {name}" in page.read_text()}
    assert shown | named >= set(COMMANDS)


def test_targets_of_make_are_there() -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    for page in PAGES:
        typed = [words[0] for words in said(page, "make")] + re.findall(r"`make ([a-z-]+)", page.read_text())
        assert set(typed) <= targets, page.name


def test_snippets_of_python_compile_and_those_for_beginners_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = []
    for page in PAGES:
        if page.name == "adding.md":  # whose snippets are parts of files, put there by a test of its own
            continue
        for number, snippet in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
            code = compile(snippet, f"{page.name}, snippet {number}", "exec")
            if page.name in ("own-model.md", "own-data.md"):
                exec(code, {"__name__": "snippet"})
                ran.append(page.name)
    assert ran == ["own-model.md"]
    words = next(words for page, words in TYPED if page.name == "own-model.md" and words[:2] == ["plan", "mine.json"])
    assert Path(words[1]).is_file(), "the next command takes what the snippet has written"


def test_changes_that_pages_make_to_recipes_fit() -> None:
    """`-s` of the pages for beginners, on the recipes that they name."""
    seen = 0
    for page, words in TYPED:
        if page.name not in ("quickstart.md", "own-data.md", "own-model.md") or "-s" not in words:
            continue
        command = tyro.cli(
            COMMANDS[words[0]],
            args=cli.spread(words)[1:],
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
        assert recipe_of(command.recipe, command.s).name == words[1]  # type: ignore[attr-defined]  # all that take `-s` here have both
        seen += 1
    assert seen >= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        address, _, anchor = target.partition("#")
        if address.startswith(("http://", "https://")):
            continue
        file = page.parent / address if address else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor and file.suffix == ".md":
            heads = re.findall(r"(?m)^#+ (.+)$", file.read_text())
            assert anchor in {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads}, target


def test_the_site_has_every_page() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def pages(nav: object) -> list[str]:
        if isinstance(nav, str):
            return [nav]
        inside = nav.values() if isinstance(nav, dict) else nav
        assert not isinstance(inside, type(None))
        return [name for one in inside for name in pages(one)]  # type: ignore[union-attr]  # YAML's own lists

    assert sorted(pages(settings["nav"])) == sorted(page.name for page in DOCS.glob("*.md"))


def test_every_exit_code_is_told() -> None:
    table = (DOCS / "failures.md").read_text().partition("## Exit codes")[2].partition("\n## ")[0]
    told = {int(code) for code in re.findall(r"(?m)^\| (\d+) \|", table)}
    assert told == {*supervisor.ENDS, 1}
