"""Held-out scores, the few-shot probe and written answers, over all ranks."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from cluster.engines import Engine
from cluster.metrics import Evaluation
from mllm import evaluate
from mllm.recipe import Recipe
from pipelines.annotate import OfPacks
from pipelines.types import Measured, Pack, Picture, Text
from pipelines.windows import PackWindows, Stream

QUESTIONS = 24
"""Pictures of the few-shot probe."""

ANSWERS_EACH = 3
"""Held-out rows of each source that the model writes an answer to."""

ANSWER_TOKENS = 24


def empty_pack(stream: Stream) -> Pack:
    """What fills up a rank's share: the same kind of pack as all others, so that every rank runs the same modules."""
    pack = Pack.empty(stream.tiling.shape)
    for annotator in stream.annotators:
        pack = annotator.empty(pack) if isinstance(annotator, OfPacks) else pack
    return pack


def evaluation_of(engine: Engine, held_out: Stream, recipe: Recipe, stage: str, when: Any) -> Evaluation:
    """Evaluate the engine's model on the held-out stream; every rank must call it together."""
    rank, world = dist.get_rank(), dist.get_world_size()
    windows = PackWindows(held_out)
    mine = [pack for k in range(rank, held_out.windows or 0, world) for pack in windows.packs(k)]
    most = torch.tensor(len(mine), device=engine.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    mine += [empty_pack(held_out)] * (int(most) - len(mine))
    sums = evaluate.source_sums(engine.score, mine, len(held_out.corpora), engine.device)
    dist.all_reduce(sums)

    documents = [
        document
        for k in range(held_out.windows or 0)
        for document in windows.documents(windows.rows(k))
        if isinstance(document, Measured)
    ]
    documents.sort(key=lambda document: (document.source, document.id.shard, document.id.row))
    # Without a language model's loss there is nothing to compare, and nothing to write.
    speaks = recipe.stage(stage).objective.kind in ("next_token", "two_vocabularies", "dpo")
    shots = recipe.shots if speaks else ()
    questions = evaluate.few_shot_questions(documents, windows.encoder, shots, QUESTIONS) if shots else []
    probe = evaluate.probe_sums(engine.score, questions, windows.pixels, shots, engine.device)
    return Evaluation(
        stage=stage,
        when=when,
        scores=evaluate.source_scores(sums, held_out.sources),
        probe=evaluate.probe_scores(probe, shots),
        answers=tuple(_answers(engine, windows, documents)) if speaks else (),
    )


def _answers(engine: Engine, windows: PackWindows, documents: list[Measured]) -> Iterator[evaluate.Answer]:
    """What the model writes about a few held-out pictures, greedily."""
    codec = windows.encoder.codec
    asked: list[tuple[str, Measured, str]] = []
    for source, name in enumerate(windows.stream.sources):
        shown = [d for d in documents if d.source == source and isinstance(d.segments[0], Picture)]
        for document in shown[:: max(1, len(shown) // ANSWERS_EACH)][:ANSWERS_EACH]:
            question, expected = evaluate.prompt_of(document)
            asked.append((name, question, expected))
    prompts = [windows.encoder.prompt(question) for _, question, _ in asked]
    stop = codec.special(codec.eos) if codec.eos else None
    written = evaluate.greedy(engine.next_logits, prompts, windows.pixels(prompts), stop, ANSWER_TOKENS, engine.device)
    for (name, question, expected), prompt, tokens in zip(asked, prompts, written, strict=True):
        yield evaluate.Answer(
            source=name,
            row=question.id.label(),
            image=_png(windows.pixels([prompt])[0]),
            prompt=" ".join(s.text.strip() for s in question.segments if isinstance(s, Text)).strip(),
            expected=expected[:400],
            written=codec.decode(tokens).strip(),
        )


def _png(tile: Any) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(tile.transpose(1, 2, 0)).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
