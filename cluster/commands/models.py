"""What was trained: scored, handed on, talked to and served."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from cluster.commands.words import Checkpoint, FilePath, Flag, Number, RunName, SiteFile, plain_console, site_of


@dataclass
class Evaluate:
    """Evaluate a run's last checkpoint on held-out corpora (loss, accuracy, few-shot probe) or a benchmark's questions."""

    run: RunName
    shots: Annotated[tuple[int, ...], arg(metavar="K", help_behavior_hint="")] = ()
    """Examples before each question of the probe, as 0 1 2 4 8; the recipe's by default."""
    text: Annotated[tuple[str, ...], arg(metavar="CORPUS", help_behavior_hint="")] = ()
    """Corpora of text alone, besides those held out, whose loss is held against that before the first stage."""
    task: Literal["textvqa", "vqav2", "mme", "mmmu", "mmbench", "pope", "exact"] | None = None
    """A benchmark whose questions are in --file."""
    file: FilePath = None
    """The questions: a JSON object a line, or MMBench's table (docs/serving.md says which fields)."""
    images: FilePath = None
    """The folder of the pictures that the questions name; the file's own by default."""
    most: Number = None
    """Ask so many questions only."""
    out: FilePath = None
    """Write the scores to this file too, as JSON."""
    site: SiteFile = None

    def __call__(self) -> None:
        if (self.task is None) != (self.file is None):
            raise ValueError("--task and --file go together: the benchmark, and the file of its questions")
        if self.shots and min(self.shots) < 0:
            raise ValueError(f"--shots {min(self.shots)}: give how many examples stand before a question, 0 or more")
        from cluster.evaluating import evaluate_run, evaluate_task

        site, console = site_of(self.site), plain_console()
        if self.task is None or self.file is None:
            scores = evaluate_run(site, self.run, console, self.shots, self.text)
        else:
            scores = evaluate_task(site, self.run, self.task, self.file, self.images, self.most, console)
        if self.out is not None:
            scores.write(self.out)


@dataclass
class Export:
    """Write a run's last checkpoint as a folder that transformers loads, read it back, and release it if it is the same."""

    run: RunName
    out: FilePath = None
    """Where to; the run's own export/ by default."""
    adapter: Flag = False
    """Keep the last stage's LoRA adapters apart, in adapter/ as peft reads them, beside the weights they were trained on."""
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.exporting import export_run

        made = export_run(site_of(self.site), self.run, self.out, self.adapter)
        print(made.place, made.words, sep="\n")


@dataclass
class Chat:
    """Talk to a model in the terminal: a line is a question, /image FILE shows a picture with it."""

    checkpoint: Checkpoint
    say: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")] = None
    """Ask this one question and end."""
    image: Annotated[tuple[str, ...], arg(metavar="FILE", help_behavior_hint="")] = ()
    """Pictures that are shown with the first question."""
    system: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")] = None
    """What the system says first."""
    max_tokens: Number = None
    """Of an answer; by default 256, or what the context has room for."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; 1 draws as the model says."""
    top_p: float = 1.0
    """Draw of the likeliest tokens that hold this share of the probability."""
    stop: Annotated[tuple[str, ...], arg(metavar="TEXT", help_behavior_hint="")] = ()
    """End the answer before any of these."""
    seed: Number = None
    """Of what is drawn: the same seed, the same answer."""
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.serving.talk import chat
        from mllm.generate import Sampling

        how = Sampling(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stop=self.stop,
            seed=self.seed,
        )
        chat(site_of(self.site), self.checkpoint, how, self.say, self.image, self.system)


@dataclass
class Serve:
    """Serve a model over OpenAI's chat API (/v1/chat/completions, /v1/models) on Ray Serve, to this machine alone."""

    checkpoint: Checkpoint
    port: Number = None
    """The site's by default, 8000. The address to listen at is the site's too: [serve] host."""
    replicas: Number = None
    """Processes that hold the model each; the site's by default, 1."""
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.serving.serve import serve

        serve(site_of(self.site), self.checkpoint, self.port, self.replicas)
