"""What a recipe asks of a machine, asked before any worker starts: engines, precisions, kernels, numbers of ranks."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator

import torch

from cluster.mesh import context_of, mesh_shape
from cluster.site import Site
from mllm.annotators import DiscreteCodes, GridRegions, Recaption, ScoreFilter
from mllm.recipe import DDP, FSDP, AdamW, Recipe, Stage, ZeRO
from mllm.weights import refusal, refusal_by_annotator
from ops.attention import Backend, available, chosen
from pipelines.types import spec


@spec
class Machine:
    """What decides whether a stage can run. `gpu` is the compute capability, None without a GPU. `unseen` means that trainers run
    on GPUs of other machines, of which nothing is known here: what only those can say is then left to the workers.
    """

    gpu: tuple[int, int] | None
    packages: frozenset[str]
    compiler: bool
    attention: dict[Backend, str]
    unseen: bool = False


def this_machine(gpus: bool | None = None) -> Machine:
    """This machine, or, where the site says that trainers have `gpus` and there are none here, one that trainers run on."""
    names = ("deepspeed", "torchao")
    gpu = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    unseen = bool(gpus) and gpu is None
    return Machine(
        gpu=gpu,
        packages=frozenset(name for name in names if importlib.util.find_spec(name)),
        compiler=gpu is not None or unseen or shutil.which("g++") is not None or shutil.which("clang++") is not None,
        attention=dict.fromkeys(available(), "") if unseen else available(),
        unseen=unseen,
    )


def refusals(recipe: Recipe, world: int, machine: Machine) -> tuple[str, ...]:
    """Why `recipe` cannot be trained by `world` such machines: what is missing, and the nearest choice. Empty if it can."""
    return tuple(f"stage {stage.name!r} {why}" for stage in recipe.stages for why in _refused(stage, world, machine))


def untrusted(recipe: Recipe, site: Site, fetch: bool = True) -> tuple[str, ...]:
    """Why weights of `recipe` are not loaded on `site`: they want to run code that it does not trust. Empty if all are.

    Nothing of them is run here. With `fetch` the configs of hub ids that are not on this machine are fetched, else passed over.
    """
    model = recipe.model
    parts = dict.fromkeys(model.reads)
    annotators = (annotator for stage in recipe.stages for annotator in stage.annotators)
    theirs = dict.fromkeys(
        a.weights for a in annotators if isinstance(a, ScoreFilter | Recaption | DiscreteCodes | GridRegions)
    )
    whys = [refusal(site.folder(name), site.trust_remote_code, fetch) for name in parts]
    whys += [refusal_by_annotator(site.folder(name), fetch) for name in theirs]
    return tuple(why for why in whys if why)


def _refused(stage: Stage, world: int, machine: Machine) -> Iterator[str]:
    parallel = stage.parallel
    if isinstance(parallel, ZeRO) and "deepspeed" not in machine.packages:
        yield "asks for ZeRO, and DeepSpeed is not installed; pip install 'mllm[zero]', or take FSDP, which shards alike"
    if isinstance(parallel, FSDP | DDP):
        try:
            mesh_shape(parallel, world)
        except ValueError as error:
            yield f"cannot be laid out: {error}"
    if world % context_of(parallel):
        yield f"cannot share packs: {world} workers are no groups of context={context_of(parallel)}; take a multiple"
    if isinstance(parallel, FSDP) and parallel.float8:
        if not machine.unseen and (machine.gpu is None or machine.gpu < (8, 9)):
            yield f"asks for float8, which needs a GPU of compute capability 8.9, and {_has(machine)}; take bfloat16"
        elif "torchao" not in machine.packages:
            yield "asks for float8, and torchao is not installed; pip install 'mllm[float8]', or take bfloat16"
    if parallel.dtype == "bfloat16" and machine.gpu is not None and machine.gpu < (8, 0):
        yield f"computes in bfloat16, which needs compute capability 8.0, and {_has(machine)}; take dtype float32"
    if isinstance(parallel, FSDP | DDP) and parallel.compile and not machine.compiler:
        yield "asks for compile, and there is no C++ compiler; install g++, or leave compile away"
    if isinstance(stage.optimizer, AdamW) and stage.optimizer.bits == 8 and "torchao" not in machine.packages:
        yield "keeps moments in 8 bits, and torchao is not installed; pip install 'mllm[float8]', or take 32"
    if stage.attention is not None and (reason := machine.attention[stage.attention]):
        device = torch.device("cpu" if machine.gpu is None else "cuda")
        nearest = chosen(device, torch.bfloat16 if parallel.dtype == "bfloat16" else torch.float32)
        yield f"asks for attention by {stage.attention}, which {reason}; {nearest} is the best here"


def _has(machine: Machine) -> str:
    return "there is none" if machine.gpu is None else f"this one has {machine.gpu[0]}.{machine.gpu[1]}"
