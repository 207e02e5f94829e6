"""The command line. It parses and calls; about place, size and output -- what is learned stands in the recipe."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional, UseAppendAction, arg, subcommand

if TYPE_CHECKING:
    from rich.console import Console

    from cluster.site import Site
    from mllm.recipe import Recipe

Change = Annotated[UseAppendAction[tuple[str, ...]], arg(name="s", aliases=["-s"], metavar="KEY=VALUE")]
SiteFile = Annotated[str | None, arg(metavar="FILE")]
Name = Annotated[str, arg(metavar="NAME")]
Corpus = Annotated[Positional[str], arg(metavar="CORPUS")]
Kind = Annotated[
    str | None,
    arg(metavar="KIND", help="pairs, interleaved, conversations, ...; by default the first row tells it."),
]
Option = Annotated[Change, arg(help="Change an option of the corpus: -s max_images=4 -s images=s3://bucket/pictures")]


@dataclass
class Recipes:
    """List the recipes, or print one."""

    name: Positional[str | None] = None
    json: bool = False
    """Print it as JSON, every default written out."""
    tree: bool = False
    """Print its model along its axes, and its stages: data, trained parts, token budget."""

    def __call__(self) -> None:
        from rich.console import Console

        from cluster import catalogue
        from mllm.recipe import dump
        from mllm.recipes import by_name

        console = Console()
        if self.name is None:
            console.print(catalogue.table())
            return
        recipe = by_name(self.name)
        if self.json:
            print(dump(recipe))
            return
        if self.tree:
            console.print(catalogue.tree(recipe))
            return
        from rich.pretty import Pretty

        console.print(Pretty(recipe, expand_all=False))


@dataclass
class Plan:
    """Tell what a run would be: mixture, trained parts, FLOPs, memory, steps. Needs no GPU and no data."""

    recipe: Positional[str]
    s: Change = ()
    """Change the recipe, stages by name: -s stages.pretrain.tune.lm.lr=3e-5"""
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.live import flop_words
        from cluster.plan import plan
        from cluster.stats import bytes_words

        result = plan(_recipe(self.recipe, self.s), _site(self.site))
        print(f"{result.recipe}: {result.tokens_per_image}")
        for stage in result.stages:
            print(f"\n{stage.name}: {stage.steps}, {stage.packs_per_step} packs a step")
            print(stage.mixture)
            for part in stage.parts:
                print(f"  {part.line()}")
            whole = f", {flop_words(stage.total_flops)} in all" if stage.total_flops is not None else ""
            if stage.flops is not None:
                print(f"  {flop_words(stage.flops)} a full step{whole}")
            if stage.unknown:
                print(f"  {stage.unknown}")
            print(f"  {'workers':>10} {'packs each':>11} {'memory a GPU (estimate)':>25}")
            for world, packs in stage.accumulation.items():
                bytes_ = stage.memory.get(world)
                words = ("not predicted" if stage.unknown else "cannot be") if bytes_ is None else bytes_words(bytes_)
                print(f"  {world:>10} {packs:>11} {words:>25}")
        for why in result.refused:
            print(f"\nnot here: {why}")


@dataclass
class Trained:
    """What `train` and `submit` are told of a run."""

    recipe: Positional[str]
    """A recipe's name, or a recipe.json."""
    s: Change = ()
    """Change the recipe, stages by name: -s stages.pretrain.tune.lm.lr=3e-5"""
    workers: Annotated[tuple[int, ...] | None, arg(metavar="N [MOST]")] = None
    """Training workers, or the fewest and the most: the run grows and shrinks with the cluster. The site's by default."""
    run: str | None = None
    """The run's name; the recipe's by default."""
    site: SiteFile = None
    tiny: bool = False
    """The same structure at toy size, two steps a stage over the example corpora: whether a recipe's parts fit together."""


@dataclass
class Train(Trained):
    """Train a recipe here, or on the Ray cluster that the site names; go on where it stopped."""

    def __call__(self) -> None:
        from cluster.supervisor import die_with_parent, is_driver, supervise

        if not is_driver():
            sys.exit(supervise(_WORDS))
        die_with_parent()
        from rich.console import Console

        from cluster.run import train

        recipe = _recipe(self.recipe, self.s, self.tiny)
        train(recipe, _site(self.site, self.workers), self.run, Console(highlight=False))


@dataclass
class Submit(Trained):
    """Train a recipe as a job of the cluster whose job server the site names; given again, the run goes on."""

    def __call__(self) -> None:
        from cluster.jobs import submit

        recipe = _recipe(self.recipe, self.s, self.tiny)
        submit(recipe, _site(self.site, self.workers), self.run or recipe.name, _console(), self.site)


@dataclass
class Logs:
    """Print what a run's newest job has printed."""

    run: Positional[str]
    follow: bool = False
    """Go on until the job ends."""
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.jobs import logs

        logs(_site(self.site), self.run, self.follow, _console())


@dataclass
class Stop:
    """Have a run save and stop, and wait until it has; the command that began it goes on with it."""

    run: Positional[str]
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.jobs import stop

        stop(_site(self.site), self.run, _console())


@dataclass
class Status:
    """Show where a run stands: stages, losses, dropped rows. Without a name, list the runs."""

    run: Positional[str | None] = None
    site: SiteFile = None

    def __call__(self) -> None:
        from rich.console import Console

        from cluster.run import show_status

        show_status(_site(self.site), self.run, Console(highlight=False))


@dataclass
class Index:
    """Scan a corpus's shards: rows, byte ranges, sizes, checksums. `train` does it by itself where it is missing."""

    corpus: Corpus
    """A corpus's name, as a recipe or the site spells it, or an address, in quotes: 's3://bucket/x/{00000..00009}.tar'"""
    kind: Kind = None
    s: Option = ()
    beside: bool = False
    """Keep the index in the corpus's own folder, for all who read it."""
    verify: bool = False
    """Read every shard again and name those whose contents have changed."""
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.datacheck import index
        from cluster.naming import find_corpus

        corpus, site = find_corpus(self.corpus, _site(self.site), self.kind, self.s)
        sys.exit(index(corpus, site, _console(), self.beside, self.verify))


@dataclass
class Check:
    """Read every row of a corpus, decode its pictures and videos, and name the bad rows; ends with 1 when there are some."""

    corpus: Corpus
    """A corpus's name, as a recipe or the site spells it, or an address, in quotes: 's3://bucket/x/{00000..00009}.tar'"""
    kind: Kind = None
    s: Option = ()
    sample: int | None = None
    """Read only about so many rows, in random chunks."""
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.datacheck import check
        from cluster.naming import find_corpus

        corpus, site = find_corpus(self.corpus, _site(self.site), self.kind, self.s)
        sys.exit(check(corpus, site, _console(), self.sample))


@dataclass
class Stats:
    """Tell what a corpus is made of, or what a recipe's mixtures become when packed; as a table and as a page."""

    corpus: Corpus
    """A corpus's name or address, or a recipe's name (or recipe.json)."""
    kind: Kind = None
    s: Annotated[Change, arg(help="Change an option of the corpus (-s max_images=4), or the recipe.")] = ()
    sample: int = 2000
    """Read about so many rows, at random; of a recipe, so many of each stage."""
    tokenizer: Annotated[str | None, arg(metavar="NAME")] = None
    """Measure text in tokens: a recipe's name, a name under [weights] or a tokenizer's folder."""
    out: Path = Path("stats.html")
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.mixture import write_mixture
        from cluster.naming import find_corpus, is_recipe, tokenizer_folder
        from cluster.stats import write_stats

        site = _site(self.site)
        if self.kind is None and is_recipe(self.corpus):
            write_mixture(_recipe(self.corpus, self.s), site, _console(), self.out, self.sample)
            return
        tokenizer = None if self.tokenizer is None else tokenizer_folder(self.tokenizer, site)
        corpus, site = find_corpus(self.corpus, site, self.kind, self.s)
        write_stats(corpus, site, _console(), self.out, self.sample, tokenizer)


@dataclass
class Quarantine:
    """Show the rows that a run dropped, by corpus and reason."""

    run: Positional[str]
    rows: bool = False
    """Every row by name."""
    site: SiteFile = None

    def __call__(self) -> None:
        from rich.console import Console

        from cluster import quarantine
        from cluster.run import open_run

        folder, _, _ = open_run(_site(self.site), self.run)
        sys.exit(quarantine.show(folder, Console(highlight=False), self.rows))


@dataclass
class Preview:
    """Write a page that shows rows of a corpus, or a recipe's packs, as a person would read them."""

    corpus: Corpus
    """A corpus's name or address: its rows; or a recipe's name: its packs, tiles and learned tokens."""
    kind: Kind = None
    s: Annotated[Change, arg(help="Change an option of the corpus (-s max_images=4), or the recipe.")] = ()
    rows: int = 20
    """Rows of a corpus, drawn at random."""
    stage: str | None = None
    """The stage of a recipe whose packs are shown; the first by default."""
    packs: int = 10
    """Packs of a recipe's stage."""
    out: Path = Path("preview.html")
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.browse import write_rows
        from cluster.naming import find_corpus, is_recipe
        from cluster.preview import write_preview

        if self.kind is not None or not is_recipe(self.corpus):
            if self.stage is not None:
                raise ValueError(f"--stage {self.stage} is one of a recipe, and {self.corpus!r} is no recipe's name")
            corpus, site = find_corpus(self.corpus, _site(self.site), self.kind, self.s)
            print(write_rows(corpus, site, _console(), self.rows, self.out))
            return
        recipe = _recipe(self.corpus, self.s)
        names = [stage.name for stage in recipe.stages]
        if self.stage is not None and self.stage not in names:
            raise ValueError(f"recipe {recipe.name!r} has no stage {self.stage!r}; its stages are {names}")
        stage = recipe.stage(self.stage) if self.stage else recipe.stages[0]
        print(write_preview(_site(self.site).stream(recipe, stage), self.packs, self.out))


@dataclass
class Convert:
    """Bring HTML and Markdown pages with local pictures to a corpus of interleaved documents, in MMC4's layout."""

    pages: Positional[tuple[str, ...]]
    """Pages, folders of pages, or patterns."""
    out: str
    """The folder, local or s3://, that the shards go to."""
    rows_per_shard: int = 1000
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.conversion import convert_pages

        _site(self.site)  # which says how storage is reached
        convert_pages(self.pages, self.out, self.rows_per_shard, _console())


@dataclass
class Evaluate:
    """Evaluate a run's last checkpoint on the held-out corpora: loss, accuracy, 0- and few-shot probe."""

    run: Positional[str]
    site: SiteFile = None

    def __call__(self) -> None:
        from rich.console import Console

        from cluster.run import evaluate_run

        evaluate_run(_site(self.site), self.run, Console(highlight=False))


@dataclass
class Export:
    """Write a run's last checkpoint as a folder that transformers loads."""

    run: Positional[str]
    out: Path | None = None
    """Where to; the run's own export/ by default."""
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.run import export_run

        print(export_run(_site(self.site), self.run, self.out))


@dataclass
class Report:
    """Write a run's report again."""

    run: Positional[str]
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.report import write_report
        from cluster.run import open_run

        folder, recipe, state = open_run(_site(self.site), self.run)
        print(write_report(folder, recipe, state))


@dataclass
class Watch:
    """Serve a run's report to a browser while it goes: losses, throughput, workers, faults, dropped rows, what it writes."""

    run: Positional[str]
    host: str = "127.0.0.1"
    """The address to listen at; others than this machine reach it only where this says so."""
    port: int = 8266
    site: SiteFile = None

    def __call__(self) -> None:
        import time

        from cluster.watch import Pages, serving

        pages = Pages(_site(self.site), self.run)
        try:
            with serving(pages, self.host, self.port) as address:
                print(f"{self.run} at {address} (Ctrl-C ends)", flush=True)
                while True:
                    time.sleep(3600)
        except OSError as error:
            raise ValueError(f"cannot listen at {self.host}:{self.port}: {error}; take another --port") from error


@dataclass
class Compare:
    """Lay runs over each other: losses and throughput by stage on one page, and in what their recipes differ."""

    runs: Positional[tuple[str, ...]]
    out: Path = Path("compare.html")
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.compare import compare, show

        page = compare(_site(self.site), self.runs)
        show(page, _console())
        print(f"page: {page.write(self.out)}")


@dataclass
class Dashboard:
    """Write a Grafana dashboard of what runs export to Prometheus, and alert rules, to be laid beside Ray's own."""

    out: Path = Path("grafana")

    def __call__(self) -> None:
        from cluster.grafana import write

        print(*write(self.out), sep="\n")


@dataclass
class Manifest:
    """Write what Kubernetes, AWS, machines by ssh or Slurm are asked for to run a recipe: [deploy] of the site says of nodes."""

    recipe: Positional[str]
    """A recipe's name, or a recipe.json."""
    target: Annotated[str, arg(name="for", metavar="TARGET")]
    """rayjob, raycluster (KubeRay), aws, onprem (Ray's cluster launcher) or slurm."""
    s: Change = ()
    """Change the recipe, stages by name: -s stages.pretrain.tune.lm.lr=3e-5"""
    workers: Annotated[tuple[int, ...] | None, arg(metavar="N [MOST]")] = None
    """Training workers, or the fewest and the most. The site's by default."""
    run: str | None = None
    """The run's name; the recipe's by default."""
    out: Path | None = None
    """The folder that the files go to; manifests/RUN-TARGET by default."""
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.manifests.write import manifest, write

        recipe = _recipe(self.recipe, self.s)
        run = self.run or recipe.name
        found = manifest(recipe, _site(self.site, self.workers), self.target, run)
        out = self.out or Path("manifests") / f"{run}-{self.target}"
        for path in write(found, out):
            print(path)
        print(f"\nthen, in {out}:\n")
        for command in found.commands:
            print(f"    {command}")


@dataclass
class Doctor:
    """Tell what this machine has and lacks."""

    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.doctor import doctor

        sys.exit(doctor(_site(self.site)))


Command = (
    Annotated[Recipes, subcommand("recipes")]
    | Annotated[Plan, subcommand("plan")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Submit, subcommand("submit")]
    | Annotated[Logs, subcommand("logs")]
    | Annotated[Stop, subcommand("stop")]
    | Annotated[Status, subcommand("status")]
    | Annotated[Index, subcommand("data index")]
    | Annotated[Check, subcommand("data check")]
    | Annotated[Stats, subcommand("data stats")]
    | Annotated[Preview, subcommand("data preview")]
    | Annotated[Quarantine, subcommand("data quarantine")]
    | Annotated[Convert, subcommand("data convert")]
    | Annotated[Evaluate, subcommand("eval")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Watch, subcommand("watch")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Dashboard, subcommand("dashboard")]
    | Annotated[Manifest, subcommand("manifest")]
    | Annotated[Doctor, subcommand("doctor")]
)


_WORDS: list[str] = []
"""The words of the command line, for the process that drives a run and gets the same ones."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of `mllm`. A mistake of the user's ends with one line and code 2, Ctrl-C with 130, SIGTERM with 143."""
    _WORDS[:] = sys.argv[1:] if argv is None else argv
    words = _spread(_WORDS)
    command: Callable[[], None] = tyro.cli(
        Command,  # type: ignore[arg-type]  # a union of types is no type to checkers; tyro takes it
        prog="mllm",
        description="Train multimodal language models on Ray.",
        args=words,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `mllm plan ... | head` is no mistake
        sys.stderr.close()
    except Exception as error:
        sys.exit(_told(error))


def _told(error: Exception) -> int:
    """Say what went wrong and return the exit code. Most commands end well and need not import what they might meet."""
    from cluster import supervisor
    from cluster.controller import ClusterLost, RunError, Stopped
    from cluster.jobs import JobError
    from cluster.journal import Fenced
    from cluster.local import NoCluster
    from pipelines.storage import StorageError

    if isinstance(error, Stopped):
        return 143
    # Mistakes in a site or a recipe are ValueErrors.
    mistakes = RunError | JobError | Fenced | StorageError | ValueError | FileNotFoundError | PermissionError
    if not isinstance(error, ClusterLost | NoCluster | mistakes):
        traceback.print_exception(
            error
        )  # a fault of this program's: said whole, and told apart from a process that Ray ended
        return 70
    print(f"error: {error}", file=sys.stderr)
    if isinstance(error, ClusterLost | NoCluster):
        return supervisor.LOST if isinstance(error, ClusterLost) else supervisor.NOWHERE
    return 2


def _spread(words: list[str]) -> list[str]:
    """`data check X` is one command, and `-s a=1 b=2` is `-s a=1 -s b=2`."""
    if words[:1] == ["data"] and len(words) > 1:
        words = [f"data {words[1]}", *words[2:]]
    out: list[str] = []
    after = False
    for word in words:
        if after and "=" in word and not word.startswith("-") and out[-1] != "-s":
            out.append("-s")
        elif word.startswith("-") or "=" not in word:
            after = word == "-s"
        out.append(word)
    return out


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _recipe(name: str, changes: tuple[str, ...], small: bool = False) -> Recipe:
    from mllm.recipe import RecipeError, load, override
    from mllm.recipes import by_name
    from mllm.tiny import tiny

    if name.endswith(".json"):
        if not Path(name).is_file():
            raise RecipeError(f"no recipe file {name}")
        recipe = override(load(Path(name).read_bytes()), changes)
    else:
        recipe = override(by_name(name), changes)
    if not small:
        return recipe
    recipe = tiny(recipe)
    return replace(recipe, name=f"{recipe.name}-tiny")


def _site(path: str | None, workers: tuple[int, ...] | None = None) -> Site:
    from cluster.site import load_site

    site = load_site(path)
    if workers is None:
        return site
    words = " ".join(map(str, workers))
    if not 1 <= len(workers) <= 2 or min(workers) < 1 or workers[0] > workers[-1]:
        raise ValueError(f"--workers {words}: at least one worker trains; give how many, or the fewest and the most")
    return replace(site, workers=workers[0] if len(workers) == 1 else (workers[0], workers[1]))


if __name__ == "__main__":
    main()
