"""Operating it: a served model under 200 questions at once, the first step, the report of a long run, what metrics cost a step.

*Chat*: the smoke model, not trained, on Ray Serve with one replica, and 200 clients that ask at the same moment, one in four with
a picture, for 16 tokens each; every answer must have status 200. *First step*: as in `start`, beside what Ray Train itself takes:
a script that starts a local Ray and has a TorchTrainer run a function of nothing on two workers. Fair because both are commands
timed from outside, one after the other, each with a Ray of its own. *Report*: of a run whose files hold 100,000 steps of two
sources in one stage, made from those files. *Metrics*: what rank 0 does for each step's record and gauges, by the time of a step
of the smoke recipe's pretrain on one worker; a larger model's step is longer, and the price the same.
"""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from benchmarks.common import Section, alone, in_child, ratios, scratch
from benchmarks.start import seconds_to_first_step
from cluster.local import QUIET, ray_running
from cluster.metrics import PackRecord, SourceLoss, StepRecord
from cluster.phases import Phases

CLIENTS = 200
TOKENS = 16
STEPS = 100_000

TRAINER = """
import os
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
import logging, ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
seen = {place!r}

def nothing():
    import torch
    open(seen, "a").write("up")

TorchTrainer(
    nothing,
    torch_config=TorchConfig(backend="gloo"),
    scaling_config=ScalingConfig(num_workers=2),
    run_config=RunConfig(storage_path={folder!r}, name="nothing"),
).fit()
ray.shutdown()
"""


def measure(section: Section, quick: bool) -> None:
    chat(section, 40 if quick else CLIENTS, 1 if quick else 3)
    first_step(section, 1 if quick else 5)
    report(section, STEPS // 50 if quick else STEPS, 1 if quick else 3)
    metrics(section, 20 if quick else 200)


# -- chat --------------------------------------------------------------------------------------------------------------


def chat(section: Section, clients: int, rounds: int) -> None:
    """Answers to so many who ask at once, `rounds` times."""
    seconds, errors, walls = in_child(asked_at_once, clients, rounds)
    section.add(
        f"errors among {clients} questions at once", "answers", errors, "16 tokens, 1 in 4 with a picture", at_most=0
    )
    section.add("until half of them are answered", "s", [float(np.percentile(each, 50)) for each in seconds])
    section.add("until 99 % of them are answered", "s", [float(np.percentile(each, 99)) for each in seconds])
    section.add("answers a second", "1/s", [clients / wall for wall in walls], "one replica on these cores")


def asked_at_once(clients: int, rounds: int) -> tuple[list[list[float]], list[float], list[float]]:
    """Of each round: seconds of each question, how many failed, and seconds in all."""
    import socket

    from cluster.serving.find import Found
    from cluster.serving.serve import served
    from cluster.site import EXAMPLE, Serving, load_site
    from mllm.export import export
    from mllm.recipes import by_name

    recipe = by_name("vila_smoke")
    words = load_site(str(EXAMPLE)).folder(recipe.model.words.tokenizer or "")
    seconds: list[list[float]] = []
    errors: list[float] = []
    walls: list[float] = []
    with scratch() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        place = export(recipe, recipe.model.build(), words, folder / "export")
        port = free.getsockname()[1]
        free.close()
        with ray_running(None, 2, folder / "logs"), served(Found(folder=place, name="smoke"), Serving(port=port)) as at:
            bodies = [question(number) for number in range(clients)]
            ask(f"{at}/v1/chat/completions", bodies[0])  # the first warms up
            for _ in range(rounds):
                told, wall = together(f"{at}/v1/chat/completions", bodies)
                seconds.append([each for each, _ in told])
                errors.append(float(sum(status != 200 for _, status in told)))
                walls.append(wall)
    return seconds, errors, walls


def question(number: int) -> bytes:
    """A request's body; every fourth shows a picture."""
    from PIL import Image

    parts: list[dict[str, Any]] = [{"type": "text", "text": f"What is number {number}?"}]
    if number % 4 == 0:
        file = io.BytesIO()
        noise = np.random.default_rng(number).integers(0, 256, (120, 160, 3), np.uint8)
        Image.fromarray(noise).save(file, "JPEG")
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    message = {"role": "user", "content": parts}
    return json.dumps({"model": "smoke", "messages": [message], "max_tokens": TOKENS, "temperature": 0}).encode()


def ask(url: str, body: bytes) -> tuple[float, int]:
    """Seconds until the answer is whole, and its status."""
    started = time.perf_counter()
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as reply:
            reply.read()
            status = reply.status
    except urllib.error.HTTPError as error:
        status = error.code
    except OSError:
        status = 0
    return time.perf_counter() - started, status


def together(url: str, bodies: Sequence[bytes]) -> tuple[list[tuple[float, int]], float]:
    """All bodies asked at the same moment, a thread each."""
    gate = threading.Barrier(len(bodies) + 1)

    def one(body: bytes) -> tuple[float, int]:
        gate.wait()
        return ask(url, body)

    with ThreadPoolExecutor(len(bodies)) as pool:
        waiting = [pool.submit(one, body) for body in bodies]
        gate.wait()
        started = time.perf_counter()
        told = [each.result() for each in waiting]
        return told, time.perf_counter() - started


# -- the first step ----------------------------------------------------------------------------------------------------


def first_step(section: Section, rounds: int) -> None:
    """`mllm train` to its first step beside Ray Train's own way to a function of nothing."""
    bare: list[float] = []
    ours: list[float] = []
    for _ in range(rounds):
        bare.append(seconds_of_trainer())
        with scratch() as folder:
            ours.append(seconds_to_first_step(folder))
    section.add("ray.init and a TorchTrainer of nothing", "s", bare, "2 workers that import torch")
    section.add("mllm train to its first step", "s", ours, "2 workers, 1 preprocessor, nothing held out")
    section.add("train / TorchTrainer of nothing", "ratio", ratios(ours, bare), at_most=1.3)


def seconds_of_trainer() -> float:
    """Seconds until both workers of a bare TorchTrainer are in their function."""
    with scratch() as folder:
        seen = folder / "seen"
        script = TRAINER.format(place=str(seen), folder=str(folder / "runs"))
        log = folder / "output.txt"
        started = time.perf_counter()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", script], stdout=output, stderr=subprocess.STDOUT, env={**QUIET, **os.environ}
            )
        try:
            while not (seen.is_file() and len(seen.read_text()) >= 4):
                if process.poll() not in (None, 0):
                    raise RuntimeError(f"the bare trainer ended with {process.returncode}:\n{log.read_text()[-2000:]}")
                time.sleep(0.02)
            return time.perf_counter() - started
        finally:
            process.wait(120)


# -- the report of a long run ------------------------------------------------------------------------------------------


def report(section: Section, steps: int, rounds: int) -> None:
    """Seconds and bytes of the report of a run of so many steps."""
    seconds, size = in_child(seconds_of_report, steps, rounds)
    section.add(f"report of {steps:,} steps", "s", seconds, "made from the run's files", at_most=5)
    section.add("its size", "MB", [size / 1e6], at_most=5)


def seconds_of_report(steps: int, rounds: int) -> tuple[list[float], float]:
    from cluster.journal import RunState, StageStarted
    from cluster.metrics import RunFolder
    from cluster.report import report_page
    from mllm.recipe import dump
    from mllm.recipes import by_name

    recipe = by_name("vila_smoke")
    seconds: list[float] = []
    page = ""
    with scratch() as place:
        folder = RunFolder(place / "long")
        folder.recipe.write(dump(recipe).encode())
        write = TypeAdapter(StepRecord).dump_json
        lines = [write(record_of(step, steps)) for step in range(1, steps + 1)]
        folder.steps_file("pretrain").write(b"\n".join(lines) + b"\n")
        state = RunState.replay([StageStarted(time=0.0, stage="pretrain", fingerprint="f", steps=steps, parts=())])
        for _ in range(rounds):
            begun = time.perf_counter()
            page = report_page(folder, recipe, state)
            seconds.append(time.perf_counter() - begun)
    return seconds, float(len(page.encode()))


def record_of(step: int, of: int) -> StepRecord:
    """What rank 0 tells of a step, of two sources, eight packs and two ranks."""
    loss = 2 + 4 / step**0.3 + 0.1 * np.sin(step)
    phases = Phases(data=0.01, vision=0.05, lm=0.3, communication=0.04)
    return StepRecord(
        step=step,
        progress=step / of,
        loss=loss,
        grad_norm=1.0 + 0.2 * np.cos(step),
        lr=1e-3,
        tokens=4000,
        learned=2000,
        images=40,
        rows=60,
        fill=0.98,
        imbalance=1.05,
        seconds=0.4 + 0.05 * np.sin(step / 7),
        data_wait=0.01,
        world=2,
        time=1.7e9 + 0.4 * step,
        sources=(
            SourceLoss(source="example-pages", loss=loss + 0.1, accuracy=0.4, tokens=1200),
            SourceLoss(source="example-pairs", loss=loss - 0.1, accuracy=0.5, tokens=800),
        ),
        packs=tuple(PackRecord(window=step // 10, pack=step % 10 + n, digest=12345678 + n) for n in range(8)),
        flops=1e12,
        hardware_flops=1.2e12,
        peak=1e13,
        usual=phases,
        slowest=(1, phases),
    )


# -- metrics -----------------------------------------------------------------------------------------------------------


def metrics(section: Section, steps: int) -> None:
    """What a step's record and gauges cost, by a step."""
    told, step = in_child(seconds_of_metrics, steps)
    section.add("record and gauges of a step", "ms", [1e3 * each for each in told])
    section.add("the same by a step of the smoke model", "%", [100 * each / step for each in told], at_most=0.5)


def seconds_of_metrics(steps: int) -> tuple[list[float], float]:
    """Seconds that each step's record and gauges took, and a step of the smoke recipe's pretrain on one worker."""
    import torch

    from cluster import gauges
    from cluster.engines import build_engine
    from cluster.metrics import RunFolder
    from cluster.phases import PHASES
    from cluster.site import EXAMPLE, load_site
    from mllm.recipes import by_name
    from pipelines.windows import PackWindows

    recipe = by_name("vila_smoke")
    stage = recipe.stage("pretrain")
    told: list[float] = []
    with scratch() as folder, ray_running(None, 1, folder / "logs"):
        run = RunFolder(folder / "run")
        board = gauges.Board("run", "pretrain")
        for number in range(1, steps + 6):
            record = record_of(number, steps)
            begun = time.perf_counter()
            run.write_step("pretrain", record)
            for phase in PHASES:
                board.set(gauges.PHASE, 0.1, rank="0", phase=phase)
            board.set(gauges.MEMORY, 1e9, rank="0", device="cpu")
            if number > 5:  # the first make files and gauges
                told.append(time.perf_counter() - begun)
        run.flush_steps()
    with scratch() as folder, alone():
        site = replace(load_site(str(EXAMPLE)), cache=str(folder / "cache"))
        packs = list(PackWindows(site.stream(recipe, stage)).packs(0))[: stage.packs_per_step]
        engine = build_engine(recipe.model.build(), stage, len(stage.mixture), torch.device("cpu"))
        step = min(engine.train_step(packs, 1.0).seconds for _ in range(3))
    return told, step
