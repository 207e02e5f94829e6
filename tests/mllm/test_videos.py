"""Videos whose frames are read together: their order is seen, they take one picture's tokens, and packed is alone."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from torch import Tensor

from cluster.preview import Picture as Shown
from cluster.preview import Reader
from mllm.connectors import Branches, Linear, Perceiver
from mllm.fusion import CrossAttention, Fusion, PromptAdapter, Splice
from mllm.objectives import NextToken
from mllm.pairs import frames_of, shown
from mllm.recipe import Full, dump, load
from mllm.recipes import by_name
from mllm.resamplers import Resampler
from mllm.tune import apply_tuning
from mllm.vlm import VLM, VisionLanguageModel
from pipelines.chat import ChatML
from pipelines.encode import Encoder, TextCodec
from pipelines.pictures import measure, pixels
from pipelines.types import Batch, Budget, Document, Image, Pack, Reason, RowId, Sample, SkipSample, Text, Video
from tests.conftest import ROOT
from tests.mllm.toys import LLAMA, TILING, built, logits, randomize, toy

FUSIONS: dict[str, Fusion] = {"splice": Splice(), "cross": CrossAttention(every=1, heads=2, head_size=16)}
QUERIES = 4
CODEC = TextCodec(str(ROOT / "examples" / "tokenizer"), "<|endoftext|>", "<|im_end|>")
Row = tuple[Text | Image | Video, ...]


def still(seed: int) -> bytes:
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    Pillow.fromarray(colours).resize((32, 32)).save(file, "png")
    return file.getvalue()


def clip(*seeds: int) -> Video:
    return Video(data=tuple(map(still, seeds)))


PHRASE = Text(text="\na red shirt and a hat")
ROWS: list[Row] = [
    (PHRASE,),
    (Image(data=still(1)), PHRASE),
    (clip(2, 3, 4), PHRASE),
    (clip(5, 6), Image(data=still(7)), PHRASE, clip(8, 9, 10), Text(text=" on a chair")),
    (Text(text="as seen here:"), clip(11, 12)),
]


def model_of(fusion: str, frames: int = 4) -> tuple[VLM, VisionLanguageModel]:
    """With everything between the towers drawn anew: gates are open, times are told apart."""
    connector = replace(Perceiver().tiny(), frames=frames)
    vlm = toy(FUSIONS[fusion], arch=replace(LLAMA, vocab_size=2048), connector=connector)
    model = built(vlm)
    randomize([p for p in model.connector.parameters() if p.dim() > 1])
    randomize(model.parts().get("fusion", []))
    return vlm, model


def samples_of(vlm: VLM, rows: list[Row], budget: Budget | None = None) -> list[Sample]:
    encoder = Encoder(CODEC, ChatML(), vlm.layout(TILING), budget or Budget(tokens=512, tiles=32))
    documents = [
        Document(id=RowId(corpus="c", shard="s", epoch=0, row=number), source=0, segments=row)
        for number, row in enumerate(rows)
    ]
    return [sample for document in documents for sample in encoder.encode(measure(document, TILING))]


def batch_of(vlm: VLM, rows: list[Row]) -> Batch:
    samples = samples_of(vlm, rows)
    return Batch.of(
        Pack.of_samples(samples, pixels([p for s in samples for p in s.pictures], TILING))
        if samples
        else Pack.empty(TILING.shape)
    )


def answers(fusion: str, row: Row, frames: int = 4) -> Tensor:
    vlm, model = model_of(fusion, frames)
    return logits(model, batch_of(vlm, [row]))


@pytest.mark.parametrize(("fusion", "each"), [("splice", QUERIES), ("cross", 1)])
def test_a_video_takes_the_positions_of_one_picture(fusion: str, each: int) -> None:
    vlm, model = model_of(fusion)
    batch = batch_of(vlm, ROWS)
    assert batch.cuts[:, 1].tolist() == [each, each, 0, 0, each, 0, each, each, 0, 0, each, 0]
    assert len(batch.tiles) == 12
    assert batch.visual_count == 6 * each
    assert frames_of(batch, 12) == [1, 3, 2, 1, 3, 2]
    assert shown(batch).documents.tolist() == [1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 4, 4]
    assert model.visual(batch).shape[0] == 6 * QUERIES
    apart, _ = model_of(fusion, frames=0)
    assert batch_of(apart, ROWS).cuts[:, 1].tolist() == [each] * 12


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_order_of_frames_is_seen_by_their_times_alone(fusion: str) -> None:
    vlm, model = model_of(fusion)
    forth, back = (batch_of(vlm, [(clip(*seeds), PHRASE)]) for seeds in ((1, 2, 3), (3, 2, 1)))
    assert (logits(model, forth) - logits(model, back)).abs().max() > 1e-3
    with torch.no_grad():
        model.connector.times.zero_()  # type: ignore[union-attr]  # a Resampler
    torch.testing.assert_close(logits(model, forth), logits(model, back), rtol=1e-4, atol=1e-4)
    other = batch_of(vlm, [(clip(1, 2, 4), PHRASE)])
    assert (logits(model, forth) - logits(model, other)).abs().max() > 1e-3  # every frame is seen


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_video_of_one_frame_is_a_picture_at_the_first_time(fusion: str) -> None:
    of_video, of_picture = (answers(fusion, (one, PHRASE)) for one in (clip(5), Image(data=still(5))))
    assert torch.equal(of_video, of_picture)
    module = Resampler(replace(Perceiver().tiny(), frames=4), 16, 24)
    bare = Resampler(Perceiver().tiny(), 16, 24)
    bare.load_state_dict({name: value for name, value in module.state_dict().items() if name != "times"})
    features = torch.randn(2, 9, 16)
    assert module.times is not None
    torch.testing.assert_close(module(features), bare(features + module.times[0]))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_row_with_videos_in_a_pack_is_as_alone(fusion: str) -> None:
    vlm, model = model_of(fusion)
    together = batch_of(vlm, ROWS)
    bounds = together.cu_seqlens.tolist()
    found = logits(model, together)
    for row, start, stop in zip(ROWS, bounds, bounds[1:], strict=False):
        torch.testing.assert_close(found[start:stop], logits(model, batch_of(vlm, [row])), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], []], ids=["mixed", "text", "empty"])
def test_times_are_trained_with_the_connector(fusion: str, rows: list[Row]) -> None:
    vlm, model = model_of(fusion)
    apply_tuning(model, {"connector": Full(lr=1.0)})
    NextToken()(model, batch_of(vlm, rows)).sum.backward()
    assert all(p.grad is not None for p in model.connector.parameters())
    moved = model.connector.times.grad.abs().sum(1) > 0  # type: ignore[union-attr]  # a Resampler
    assert moved.tolist() == ([True, True, True, False] if rows == ROWS else [False] * 4)  # none has a fourth frame


def test_embeddings_of_times_are_stretched_over_a_longer_video() -> None:
    module = Resampler(replace(Perceiver().tiny(), frames=3), 16, 24)
    assert module.times is not None
    five = module._embeddings(5)
    torch.testing.assert_close(five[::2], module.times)
    torch.testing.assert_close(five[1], module.times[:2].mean(0))
    assert module(torch.randn(6, 9, 16), [5, 1]).shape == (2, QUERIES, 24)
    with pytest.raises(ValueError, match="have 4 frames, and there are 6 tiles"):
        module(torch.randn(6, 9, 16), [3, 1])


def test_a_video_is_never_torn() -> None:
    vlm, _ = model_of("splice")
    long = Text(text=" and so on" * 12)
    budget = Budget(tokens=48, tiles=4)
    samples = samples_of(vlm, [(clip(1, 2, 3), long, clip(4, 5, 6), PHRASE)], budget)
    assert len(samples) > 1
    assert sorted(sample.visual for sample in samples if sample.visual) == [(QUERIES, 0, 0)] * 2
    with pytest.raises(SkipSample, match="4 tokens and 5 tiles; a pack holds 48 and 4") as skip:
        samples_of(vlm, [(clip(1, 2, 3, 4, 5), PHRASE)], budget)
    assert skip.value.reason is Reason.IMAGE_TOO_LONG


def test_a_preview_shows_a_videos_frames_as_one_picture() -> None:
    vlm, _ = model_of("splice")
    samples = samples_of(vlm, ROWS)
    pack = Pack.of_samples(samples, pixels([p for s in samples for p in s.pictures], TILING))
    page = Reader(CODEC, TILING).pack(pack)
    found = [[len(run.views) for run in document.runs if isinstance(run, Shown)] for document in page.documents]
    assert found == [[], [1], [3], [2, 1, 3], [2]]


def test_flamingos_resampler_reads_eight_frames() -> None:
    recipe = by_name("flamingo_9b")
    assert load(dump(recipe)) == recipe
    assert isinstance(recipe.vlm.connector, Perceiver)
    assert recipe.vlm.connector.frames == 8
    assert recipe.vlm.layout(recipe.tiling).together
    assert not by_name("openflamingo_9b").vlm.layout(by_name("openflamingo_9b").tiling).together


def test_what_cannot_place_a_video_is_refused() -> None:
    with pytest.raises(ValueError, match="'prompt_adapter' does not read"):
        toy(PromptAdapter(prompts=4, first=1), connector=Perceiver(frames=4))
    with pytest.raises(ValueError, match="set its frames to 0"):
        Branches(parts=(Perceiver(frames=4), Linear()))
