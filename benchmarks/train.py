"""Training steps and their memory: the engine beside a bare torch loop, accelerate, transformers' Trainer and full logits.

**Beside bare torch.** The limit is what a person writes without an engine: the same model class from the same seed, the same
objective, packs and fused AdamW, backward for each pack, gradients divided by the learned tokens and clipped. Fair because
both live in one process with the same threads and take turns step by step; the losses of the last step tell whether they did
the same work. With one rank, all that the engine adds is overhead.

**Beside accelerate and Trainer.** The same samples of the example mixture, once as our packs and once as those libraries are
used by default: random batches, padded on the right to their longest, `LlamaForCausalLM` with sdpa and a mask, transformers'
own loss over full logits. Fair because all three start from the same weights and differ in nothing else: connector and
language model trained, frozen tower without activations, AdamW (fused) with the same two groups and constant rates, the loss
of a step divided by its learned tokens, gradients clipped at 1, the same threads, float32. A step has two backwards, of a pack
of 2,048 tokens or of as many samples as such packs have on average; the three take turns step by step, ours and accelerate's
within the callback that ends a step of Trainer. Samples are in memory, tokenised, their pictures decoded; packing is the
pipeline's work and not in the times, padding a batch is in theirs and making a batch of a pack in ours. What counts is useful
tokens, those of samples; that padding and logits that nobody needs cost time is what is compared.

**Full logits.** `ops.losses.linear_cross_entropy` beside `F.cross_entropy(hidden @ weight.T, labels)`, forward and backward,
every position learned, so that nothing is saved by skipping some. Memory is the allocator's, above what is there before.

**Ranks that share a pack.** One document on n ranks (`FSDP(context=n)`), no recomputation: the most that the fullest rank's
allocator holds during a second step above what it held before it, beside one rank that has the whole pack. 1 / n would be
perfect; weights that are gathered and gradients do not shrink with n.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Section, alone, cores, in_child, on_ranks, peak_bytes, ratios, scratch
from cluster.engines import Engine, build_engine
from cluster.fullest import fullest
from cluster.site import EXAMPLE, load_site
from mllm.objectives import NextToken
from mllm.recipe import FSDP, Full, Recipe, Stage
from mllm.recipes import by_name
from mllm.tune import apply_tuning
from mllm.vlm import VisionLanguageModel
from ops.context import ContextBy
from ops.losses import linear_cross_entropy
from pipelines.types import IMAGE_TOKEN, NOT_LEARNED, Batch, Pack
from pipelines.windows import PackWindows

WARM_UP = 3

CPU = torch.device("cpu")


def measure(section: Section, quick: bool) -> None:
    beside_torch(section, quick)
    beside_padding(section, quick)
    beside_full_logits(section, quick)
    shared_packs(section)
    section.facts.append(
        f"vila_smoke's own stages and packs, float32, {cores()} threads; the first {WARM_UP} steps (one beside padding) left out"
    )


def wider(recipe: Recipe) -> Recipe:
    """The smoke recipe with a language model of 11 million parameters and packs of 1,024 tokens."""
    lm = recipe.vlm.lm
    arch = replace(lm.arch, hidden_size=384, layers=6, heads=6, kv_heads=2, intermediate_size=1024)
    stages = tuple(replace(stage, context=1024) for stage in recipe.stages)
    return replace(recipe, model=replace(recipe.vlm, lm=replace(lm, arch=arch)), stages=stages)


def model_of(recipe: Recipe) -> VisionLanguageModel:
    torch.manual_seed(0)
    return recipe.vlm.build()


def packs_of(recipe: Recipe, stage: Stage, count: int, cache: str) -> list[Pack]:
    """The first packs of a stage."""
    windows = PackWindows(replace(load_site(str(EXAMPLE)), cache=cache).stream(recipe, stage))
    packs: list[Pack] = []
    k = 0
    while len(packs) < count:
        packs += windows.packs(k)
        k += 1
    return packs[:count]


def adamw(model: VisionLanguageModel, stage: Stage) -> torch.optim.AdamW:
    """Freeze and open parts as the stage says; its optimiser."""
    options = [
        {"params": g.parameters, "lr": g.lr, "weight_decay": g.weight_decay} for g in apply_tuning(model, stage.tune)
    ]
    return torch.optim.AdamW(options, betas=stage.optimizer.betas, eps=stage.optimizer.eps, fused=True)


class Plain:
    """The loop without an engine."""

    def __init__(self, model: VisionLanguageModel, stage: Stage) -> None:
        self.model, self.stage = model.train(), stage
        self.optimizer = adamw(model, stage)

    def step(self, packs: Sequence[Pack]) -> float:
        loss, weight = 0.0, 0.0
        for pack in packs:
            output = NextToken()(self.model, Batch.of(pack))
            output.sum.backward()
            loss += output.sum.item()
            weight += output.weight.item()
        trained = [p for p in self.model.parameters() if p.grad is not None]
        for parameter in trained:
            assert parameter.grad is not None
            parameter.grad.div_(weight)
        nn.utils.clip_grad_norm_(trained, self.stage.optimizer.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss / weight


def beside_torch(section: Section, quick: bool) -> None:
    for name, wide, steps in (("align", False, 14), ("pretrain", False, 14), ("pretrain", True, 5)):
        steps = WARM_UP + (3 if quick else steps)
        with scratch() as cache:
            ours, plain, loss, wanted, packs = in_child(engine_and_plain, name, wide, steps, str(cache))
        label = f"{name} of 11 M" if wide else name
        section.add(f"{label}: plain torch", "s", plain, f"{packs} packs a step; the limit")
        section.add(f"{label}: FSDPEngine", "s", ours)
        section.add(f"{label}: engine / plain", "ratio", ratios(ours, plain), at_most=1.01)
        difference = [abs(loss - wanted)]
        section.add(f"{label}: loss difference", "nats", difference, f"after {steps} steps, at loss {loss:.3f}")


def engine_and_plain(
    name: str, wide: bool, steps: int, cache: str
) -> tuple[list[float], list[float], float, float, int]:
    """Seconds of each step with the engine and without, the last losses, and packs of a step."""
    torch.set_num_threads(cores())
    recipe = wider(by_name("vila_smoke")) if wide else by_name("vila_smoke")
    stage = recipe.stage(name)
    packs = packs_of(recipe, stage, steps * stage.packs_per_step, cache)
    with alone():
        engine = build_engine(model_of(recipe), stage, len(stage.mixture), CPU)
        plain = Plain(model_of(recipe), stage)
        times: tuple[list[float], list[float]] = ([], [])
        losses = [0.0, 0.0]
        for step in range(steps):
            mine = packs[step * stage.packs_per_step : (step + 1) * stage.packs_per_step]
            turns = [0, 1] if step % 2 else [1, 0]
            for turn in turns:
                started = time.perf_counter()
                losses[turn] = plain.step(mine) if turn else engine.train_step(mine, 1.0).loss
                times[turn].append(time.perf_counter() - started)
    return times[0][WARM_UP:], times[1][WARM_UP:], losses[0], losses[1], stage.packs_per_step


@dataclass(frozen=True)
class Item:
    """A sample in memory: ids and labels int64 (t,), tiles uint8 (N, 3, H, W)."""

    ids: Tensor
    labels: Tensor
    tiles: Tensor


def collate(items: Sequence[Item]) -> dict[str, Tensor]:
    """Items padded on the right to the longest, ids 0 and no labels there, and their tiles end to end."""
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([item.ids for item in items], batch_first=True),
        "labels": pad([item.labels for item in items], batch_first=True, padding_value=NOT_LEARNED),
        "attention_mask": pad([torch.ones_like(item.ids) for item in items], batch_first=True),
        "tiles": torch.cat([item.tiles for item in items]),
    }


class Padded(nn.Module):
    """The model as padded trainers have it: rows of a batch, sdpa with a mask, transformers' loss over full logits."""

    def __init__(self, model: VisionLanguageModel) -> None:
        super().__init__()
        self.model = model
        self.language = model.lm.model
        self.language.set_attn_implementation("sdpa")
        self.useful = 0

    def forward(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor, tiles: Tensor, **loss: Any
    ) -> dict[str, Tensor]:
        self.useful += int(attention_mask.sum())
        embedded = self.model.lm.embed(input_ids)
        if len(tiles):
            visual = self.model.connector(self.model.encoder(tiles)).flatten(0, 1)
            embedded = embedded.masked_scatter((input_ids == IMAGE_TOKEN).unsqueeze(-1), visual)
        output = self.language(
            inputs_embeds=embedded, attention_mask=attention_mask, labels=labels, shift_labels=labels, **loss
        )
        return {"loss": output.loss}

    def since(self) -> int:
        """Useful tokens since this was asked."""
        useful, self.useful = self.useful, 0
        return useful


def beside_padding(section: Section, quick: bool) -> None:
    for name in ("pretrain", "sft"):
        with scratch() as place:
            found = in_child(padding_and_packs, name, 1 + (2 if quick else 6), str(place))
        section.add(f"{name}, one pack's samples padded: loss difference", "nats", [found["difference"]])
        section.add(f"{name}: share of padded positions", "share", found["padding"], f"{found['each']} samples a batch")
        for rival in ("ours", "accelerate", "Trainer"):
            values = [1 / seconds for seconds in found[rival]]
            section.add(f"{name}, {rival}: useful tokens", "tokens/s", values, found.get(f"{rival} is not there", ""))
        for rival in ("accelerate", "Trainer"):
            values = ratios(found["ours"], found[rival]) if found[rival] else []
            section.add(f"{name}: time of a useful token, ours / {rival}", "ratio", values, at_most=0.95)


def padding_and_packs(name: str, steps: int, place: str) -> dict[str, Any]:
    """Seconds of a useful token in each step by our packs and by padded batches of the same samples, the first step left out."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    torch.set_num_threads(cores())
    recipe = by_name("vila_smoke")
    stage = replace(recipe.stage(name), context=2048, tokens_per_step=4096, max_tiles=48)
    count = steps * stage.packs_per_step
    packs = packs_of(recipe, stage, count, place)
    items = [item for pack in packs for item in items_of(pack)]
    each = len(items) // count
    random.Random(0).shuffle(items)
    items = items[: each * count]

    with alone():
        engine = build_engine(model_of(recipe), stage, len(stage.mixture), CPU)
        padded = [Padded(model_of(recipe)).train() for _ in range(2)]
        optimizers = [adamw(module.model, stage) for module in padded]
        difference = abs(loss_of_pack(engine, packs[0]) - loss_of_items(padded[0], list(items_of(packs[0]))))
        padded[0].since()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=stage.packs_per_step)
        data: Any = items  # a list serves where a Dataset is asked for
        loader: Any = DataLoader(data, batch_size=each, shuffle=True, collate_fn=collate)
        module, optimizer, loader = accelerator.prepare(padded[0], optimizers[0], loader)
        batches = iter(loader)
        found: dict[str, Any] = {"difference": difference, "each": each, "ours": [], "accelerate": [], "Trainer": []}
        found["padding"] = [1 - sum(len(i.ids) for i in items) / positions(items, each)]
        number = 0

        def ours() -> int:
            mine = packs[number * stage.packs_per_step : (number + 1) * stage.packs_per_step]
            engine.train_step(mine, 1.0)
            return sum(len(pack.input_ids) for pack in mine)

        def accelerate() -> int:
            mine = [next(batches) for _ in range(stage.packs_per_step)]
            learned = sum(int((batch["labels"] != NOT_LEARNED).sum()) for batch in mine)
            for batch in mine:
                with accelerator.accumulate(module):
                    # it divides by the number of batches, which the number of tokens has done
                    loss = module(**batch, num_items_in_batch=learned)["loss"] * stage.packs_per_step
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(module.parameters(), stage.optimizer.clip)
                    optimizer.step()
                    optimizer.zero_grad()
            return padded[0].since()

        def others() -> None:
            nonlocal number
            turns: dict[str, Callable[[], int]] = {"ours": ours, "accelerate": accelerate}
            for rival in sorted(turns, reverse=number % 2 == 0):
                started = time.perf_counter()
                useful = turns[rival]()
                found[rival].append((time.perf_counter() - started) / useful)
            number += 1

        try:
            found["Trainer"] = trainer_steps(padded[1], optimizers[1], items, each, stage, steps, place, others)
        except ImportError as error:
            found["Trainer is not there"] = str(error).splitlines()[0]
            for _ in range(steps):
                others()
    for rival in ("ours", "accelerate", "Trainer"):
        found[rival] = found[rival][1:]
    return found


def trainer_steps(
    module: Padded,
    optimizer: torch.optim.Optimizer,
    items: list[Item],
    each: int,
    stage: Stage,
    steps: int,
    place: str,
    between: Callable[[], None],
) -> list[float]:
    """Seconds of a useful token in each step of transformers' Trainer; `between` is called after each, off the clock."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    times: list[float] = []
    started = 0.0

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            nonlocal started
            started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            nonlocal started
            times.append((time.perf_counter() - started) / module.since())
            between()
            started = time.perf_counter()

    arguments = TrainingArguments(
        output_dir=f"{place}/trainer",
        use_cpu=True,
        per_device_train_batch_size=each,
        gradient_accumulation_steps=stage.packs_per_step,
        max_steps=steps,
        max_grad_norm=stage.optimizer.clip,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        eval_strategy="no",
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    data: Any = items  # a list serves where a Dataset is asked for
    together: Any = collate
    trainer = Trainer(
        model=module,
        args=arguments,
        train_dataset=data,
        data_collator=together,
        optimizers=(optimizer, constant),
        callbacks=[Clock()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return times


def items_of(pack: Pack) -> Iterator[Item]:
    """A pack's documents one by one."""
    taken = 0
    for start, stop in zip(pack.cu_seqlens, pack.cu_seqlens[1:], strict=False):
        ids = torch.from_numpy(pack.input_ids[start:stop].astype(np.int64))
        labels = torch.from_numpy(pack.labels[start:stop].astype(np.int64))
        tiles = int(pack.cuts[pictures(pack, int(start)) : pictures(pack, int(stop)), 0].sum())
        yield Item(ids, labels, torch.from_numpy(np.array(pack.tiles[taken : taken + tiles])))
        taken += tiles


def pictures(pack: Pack, position: int) -> int:
    """How many of a pack's pictures stand before `position`."""
    before = int((pack.input_ids[:position] == IMAGE_TOKEN).sum())
    return int(np.searchsorted(np.cumsum(pack.cuts[:, 1]), before, side="right"))


def positions(items: Sequence[Item], each: int) -> int:
    """Positions of batches of `each` items, padding and all."""
    batches = [items[i : i + each] for i in range(0, len(items), each)]
    return sum(max(len(item.ids) for item in batch) * len(batch) for batch in batches)


def loss_of_pack(engine: Engine, pack: Pack) -> float:
    output = engine.score(Batch.of(pack))
    return float(output.sum / output.weight)


@torch.no_grad()
def loss_of_items(module: Padded, items: Sequence[Item]) -> float:
    return float(module(**collate(items))["loss"])


def beside_full_logits(section: Section, quick: bool) -> None:
    for tokens in (1024,) if quick else (2048, 8192):
        fused, full, times = in_child(losses, tokens, 256, 32_000, 1 if quick else 2)
        name = f"loss of {tokens:,} tokens, 32,000 words"
        section.add(f"{name}: full logits", "MB", [full / 1e6], "width 256, float32")
        section.add(f"{name}: fused", "MB", [fused / 1e6])
        section.add(f"{name}: memory, fused / full", "ratio", [fused / full], at_most=1.0)
        section.add(f"{name}: time, fused / full", "ratio", ratios(*times), at_most=1.0)


def losses(tokens: int, width: int, words: int, repetitions: int) -> tuple[int, int, tuple[list[float], list[float]]]:
    """Peak bytes of forward and backward, fused and by full logits, and the seconds of both."""
    torch.set_num_threads(cores())
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = (torch.randn(words, width) / width**0.5).requires_grad_()
    labels = torch.randint(words, (tokens,))

    def fused() -> None:
        linear_cross_entropy(hidden, weight, labels).sum.backward()
        hidden.grad = weight.grad = None

    def full() -> None:
        F.cross_entropy(hidden @ weight.T, labels, reduction="sum").backward()
        hidden.grad = weight.grad = None

    times: tuple[list[float], list[float]] = ([], [])
    peaks = peak_bytes(fused), peak_bytes(full)
    for _ in range(repetitions):
        for act, column in zip((fused, full), times, strict=True):
            started = time.perf_counter()
            act()
            column.append(time.perf_counter() - started)
    return *peaks, times


LONG = 2048
"""Tokens of the document that ranks share."""


def shared_packs(section: Section) -> None:
    ways: tuple[ContextBy, ...] = ("ring", "ulysses")
    (whole,) = on_ranks(1, step_bytes, 1, "ring")
    section.add("one rank: memory of a step", "MB", [whole / 1e6], f"one document of {LONG:,} tokens, 4 layers x 256")
    for world in (2, 4):
        for by in ways:
            fullest_rank = max(on_ranks(world, step_bytes, world, by))
            section.add(f"{by}, {world} ranks: memory of a step", "MB", [fullest_rank / 1e6])
            section.add(
                f"{by}: memory of a rank, {world} / 1",
                "ratio",
                [fullest_rank / whole],
                f"1 / {world} is {1 / world:g}",
                at_most=1.25 / world,
            )


def step_bytes(context: int, by: ContextBy) -> int:
    """Peak bytes of a second step above what lies there before it, where `context` ranks share one full pack."""
    recipe = by_name("vila_smoke")
    lm = recipe.vlm.lm
    arch = replace(lm.arch, hidden_size=256, kv_heads=4)
    recipe = replace(recipe, model=replace(recipe.vlm, lm=replace(lm, arch=arch)))
    parallel = FSDP(dtype="float32", recompute="none", context=context, context_by=by)
    tune = {"lm": Full(lr=1e-4)}
    stage = replace(recipe.stage("pretrain"), context=LONG, tokens_per_step=LONG, parallel=parallel, tune=tune)
    pack = fullest(recipe, stage)
    if dist.get_rank():
        pack = Pack.empty(pack.tiles.shape[1:])
    engine = build_engine(model_of(recipe), stage, 1, CPU)
    engine.train_step([pack], 1.0)
    return peak_bytes(lambda: engine.train_step([pack], 1.0))
