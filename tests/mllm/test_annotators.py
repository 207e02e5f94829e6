"""Models in the pipeline, small and of random weights: what they change, what they leave, and that they repeat themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mllm.annotators import (
    Annotator,
    DiscreteCodes,
    FrozenFeatures,
    GridRegions,
    Recaption,
    ReferenceLogProbs,
    ScoreFilter,
)
from mllm.encoders import Encoder
from mllm.export import export
from mllm.objectives import NextToken
from mllm.recipe import Recipe, RecipeError, dump, fingerprint, load, override
from mllm.vlm import VisionLanguageModel
from ops import images
from pipelines import pictures
from pipelines.annotate import OfDocuments, OfPacks, Rows
from pipelines.corpora import Pairs
from pipelines.manifest import index
from pipelines.objects import Objects, RegionRow, grid, unpacked
from pipelines.tiling import Resize
from pipelines.types import (
    Batch,
    Chunk,
    Codes,
    Document,
    Frames,
    Image,
    Pack,
    Picture,
    Reason,
    Region,
    Rejected,
    RowId,
    Text,
    Video,
)
from pipelines.windows import PackWindows, Stream
from tests.conftest import CORPUS, ROOT

MEAN, STD = (Encoder.__dataclass_fields__[name].default for name in ("mean", "std"))
TOKENIZER = str(ROOT / "examples" / "tokenizer")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Document | Rejected]:
    """Eight real pairs, a row that was dropped before, one with a broken picture, and one without pictures."""
    corpus = Pairs(name="pairs")
    (shard,) = index(corpus, [str(CORPUS / "pairs/00000.tar")], str(tmp_path_factory.mktemp("cache"))).shards
    read = list(corpus.read(shard, Chunk(source=0, shard=0, epoch=0, start=0, stop=8)))
    at = RowId(corpus="pairs", shard="x", epoch=0, row=0)
    broken = Document(id=at, source=0, segments=(Image(data=b"no picture"), Text(text="\nbroken")))
    words = Document(id=replace(at, row=1), source=0, segments=(Text(text="words alone"),))
    return [*read, Rejected(row=at, reason=Reason.EMPTY), broken, words]


def tokenizer_into(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    text = {
        "vocab_size": len(AutoTokenizer.from_pretrained(TOKENIZER)),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 24,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    tokenizer_into(folder)
    return str(folder)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import BlipConfig, BlipForConditionalGeneration

    folder = tmp_path_factory.mktemp("blip")
    text = {
        "vocab_size": 2048,
        "hidden_size": 32,
        "encoder_hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "bos_token_id": 5,
        "sep_token_id": 6,
        "eos_token_id": 6,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    torch.manual_seed(3)
    BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    tokenizer_into(folder)
    return str(folder)


@pytest.fixture(scope="module")
def codebook(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

    folder = tmp_path_factory.mktemp("codes")
    torch.manual_seed(0)
    config = ChameleonVQVAEConfig(
        embed_dim=8,
        num_embeddings=64,
        latent_channels=8,
        resolution=32,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
    )
    ChameleonVQVAE(config).save_pretrained(folder)
    return str(folder)


def annotated(annotator: OfDocuments, rows: Rows) -> list[Document | Rejected]:
    return list(annotator.documents(str)(rows))


def untouched(before: list[Document | Rejected], after: list[Document | Rejected]) -> None:
    """Rows that no annotator may change: the one dropped before, and the one without pictures."""
    assert len(after) == len(before)
    assert after[8] == before[8]
    assert after[10] == before[10]
    broken = after[9]
    assert isinstance(broken, Rejected)
    assert broken.reason is Reason.NOT_AN_IMAGE


def test_a_filter_drops_the_pairs_below_and_says_both_numbers(clip: str, rows: list[Document | Rejected]) -> None:
    everything = annotated(ScoreFilter(weights=clip, at_least=-1), rows)
    untouched(rows, everything)
    assert everything[:8] == rows[:8]
    nothing = annotated(ScoreFilter(weights=clip, at_least=1), rows)
    scores = []
    for row in nothing[:8]:
        assert isinstance(row, Rejected)
        assert row.reason is Reason.FILTERED
        scores.append(float(row.detail.split()[1].rstrip(";")))
    middle = sorted(scores)[4] + 5e-4
    half = annotated(ScoreFilter(weights=clip, at_least=middle), rows)
    assert [isinstance(row, Document) for row in half[:8]] == [score >= middle for score in scores]
    assert 0 < sum(isinstance(row, Document) for row in half[:8]) < 8


def test_a_filter_takes_pictures_out_of_a_page_and_keeps_the_page(clip: str, rows: list[Document | Rejected]) -> None:
    pairs = [row for row in rows[:8] if isinstance(row, Document)]
    page = replace(pairs[0], segments=tuple(segment for pair in pairs for segment in pair.segments))
    alone = annotated(ScoreFilter(weights=clip, at_least=1), list(rows))
    scores = [float(row.detail.split()[1].rstrip(";")) for row in alone[:8] if isinstance(row, Rejected)]
    middle = sorted(scores)[4] + 5e-4
    (kept,) = annotated(ScoreFilter(weights=clip, at_least=middle), [page])
    assert isinstance(kept, Document)
    shown = [segment for segment in kept.segments if isinstance(segment, Image)]
    assert shown == [pair.segments[0] for pair, score in zip(pairs, scores, strict=True) if score >= middle]
    assert [s for s in kept.segments if isinstance(s, Text)] == [pair.segments[1] for pair in pairs]


def test_boxes_stay_with_their_pictures(clip: str, rows: list[Document | Rejected]) -> None:
    pairs = [row for row in rows[:8] if isinstance(row, Document)]
    boxes = tuple(Region(image=n, box=(0, 0, 1, 1), label=str(n)) for n in range(8))
    page = replace(pairs[0], segments=tuple(s for pair in pairs for s in pair.segments), regions=boxes)
    scores = [
        float(r.detail.split()[1][:-1])
        for r in annotated(ScoreFilter(weights=clip, at_least=1), pairs)
        if isinstance(r, Rejected)
    ]
    middle = sorted(scores)[4] + 5e-4
    (kept,) = annotated(ScoreFilter(weights=clip, at_least=middle), [page])
    assert isinstance(kept, Document)
    above = [str(n) for n, score in enumerate(scores) if score >= middle]
    assert [(box.image, box.label) for box in kept.regions] == list(enumerate(above))


def test_its_similarity_is_that_of_transformers_own_processor(clip: str, rows: list[Document | Rejected]) -> None:
    import io

    from PIL import Image as PILImage
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    prepare = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for before, after in zip(rows[:8], annotated(ScoreFilter(weights=clip, at_least=1), rows)[:8], strict=True):
        assert isinstance(before, Document)
        assert isinstance(after, Rejected)
        picture, text = before.segments
        assert isinstance(picture, Image)
        assert isinstance(text, Text)
        shown = prepare(PILImage.open(io.BytesIO(picture.data)).convert("RGB"), return_tensors="pt")
        words = tokenizer([text.text.strip()], truncation=True, max_length=24, return_tensors="pt")
        with torch.no_grad():
            out = model(**shown, input_ids=words["input_ids"], attention_mask=words["attention_mask"])
        expected = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds).item()
        assert float(after.detail.split()[1][:-1]) == pytest.approx(expected, abs=1e-2)


def test_a_window_of_large_pictures_is_not_held_decoded(
    clip: str, rows: list[Document | Rejected], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[int] = []
    pixels = pictures.pixels

    def counting(*arguments: object) -> object:
        tiles = pixels(*arguments)  # type: ignore[arg-type]  # else the test fails
        shown.append(tiles.nbytes)
        return tiles

    monkeypatch.setattr(pictures, "pixels", counting)
    many = [row for row in rows[:8] if isinstance(row, Document)] * 10
    assert len(annotated(ScoreFilter(weights=clip, at_least=-1), many)) == 80
    assert set(shown) == {3 * 32 * 32}


@pytest.mark.parametrize("mode", ["replace", "add", "either"])
def test_captions_are_written_greedily_and_the_same_each_time(
    blip: str, rows: list[Document | Rejected], mode: str
) -> None:
    annotator = replace(Recaption(weights=blip, tokens=6), mode=mode)
    once, again = annotated(annotator, rows), annotated(annotator, list(reversed(rows)))
    assert once == list(reversed(again))
    changed = 0
    for before, after in zip(rows[:8], once[:8], strict=True):
        assert isinstance(before, Document)
        assert isinstance(after, Document)
        old, new = before.segments[1], after.segments[1]
        assert isinstance(old, Text)
        assert isinstance(new, Text)
        changed += old != new
        assert new.text.startswith(old.text) or mode != "add"
    assert changed == 8 if mode != "either" else 0 < changed < 8
    assert once[8] == rows[8]
    assert once[10] == rows[10]


def test_pictures_become_codes_of_the_vocabulary(codebook: str, rows: list[Document | Rejected]) -> None:
    annotator = DiscreteCodes(weights=codebook, size=32, first=1000, codes=64, before=(7,), after=(8,))
    coded = annotated(annotator, rows)
    untouched(rows, coded)
    found = set()
    for before, after in zip(rows[:8], coded[:8], strict=True):
        assert isinstance(before, Document)
        assert isinstance(after, Document)
        picture, caption = after.segments
        assert caption == before.segments[1]
        assert isinstance(picture, Codes)
        assert (picture.ids[0], picture.ids[-1]) == (7, 8)
        assert len(picture.ids) == 2 + 16 * 16
        assert all(1000 <= code < 1064 for code in picture.ids[1:-1])
        found.add(picture.ids)
    assert len(found) > 1
    assert annotated(annotator, rows) == coded


def janus(folder: Path) -> None:
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

    small = {
        "embed_dim": 8,
        "latent_channels": 8,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
    }
    JanusVQVAE(JanusVQVAEConfig(num_embeddings=64, num_patches=16, **small)).save_pretrained(folder)


def emu3(folder: Path) -> None:
    from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig
    from transformers.models.emu3.modeling_emu3 import Emu3VQVAE

    small = {
        "embed_dim": 4,
        "latent_channels": 4,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
    }
    config = Emu3VQVAEConfig(codebook_size=64, attn_resolutions=[], hidden_size=32, **small)
    Emu3VQVAE(config).save_pretrained(folder)


@pytest.mark.parametrize("saved", [janus, emu3])
def test_other_codebooks_code_too_and_one_of_another_size_is_refused(
    saved: Callable[[Path], None], tmp_path: Path, rows: list[Document | Rejected]
) -> None:
    torch.manual_seed(0)
    saved(tmp_path)
    annotator = DiscreteCodes(weights=str(tmp_path), size=32, first=1000, codes=64)
    coded = annotated(annotator, rows)
    untouched(rows, coded)
    ids = [row.segments[0].ids for row in coded[:8] if isinstance(row, Document) and isinstance(row.segments[0], Codes)]
    assert {len(some) for some in ids} == {16 * 16}
    assert {code for some in ids for code in some} <= set(range(1000, 1064))
    assert len(set(ids)) > 1
    with pytest.raises(ValueError, match=r"codebook of 64 and the recipe says codes=8192"):
        replace(annotator, codes=8192).documents(str)


def test_a_video_becomes_the_codes_of_its_frames(codebook: str, rows: list[Document | Rejected]) -> None:
    clip = (CORPUS / "video" / "bigbuckbunny.mp4").read_bytes()
    video, text = Video(data=clip, frames=Frames(count=3)), Text(text="\na rabbit")
    (_, *pair) = [row for row in rows[:2] if isinstance(row, Document)]
    row = replace(pair[0], segments=(video, text, *pair[0].segments))
    (coded,) = annotated(DiscreteCodes(weights=codebook, size=32, first=0, codes=64, after=(99,)), [row])
    assert isinstance(coded, Document)
    assert [type(segment) for segment in coded.segments] == [Codes, Codes, Codes, Text, Codes, Text]
    assert all(
        isinstance(s, Text) or (len(s.ids) == 257 and s.ids[-1] == 99)
        for s in coded.segments
        if isinstance(s, (Text, Codes))
    )
    broken = replace(row, segments=(Video(data=b"no video"), text))
    (rejected,) = annotated(DiscreteCodes(weights=codebook, size=32, first=0, codes=64), [broken])
    assert isinstance(rejected, Rejected)
    assert rejected.reason is Reason.NOT_A_VIDEO


def test_codes_are_learned_as_tokens(codebook: str, stream: Stream) -> None:
    coded = DiscreteCodes(weights=codebook, size=32, first=1000, codes=64)
    packs = list(PackWindows(replace(stream, annotators=(coded,), budget=replace(stream.budget, tokens=1024))).packs(0))
    assert not any(len(pack.tiles) for pack in packs)
    assert any(((pack.labels >= 1000) & (pack.labels < 1064)).sum() >= 256 for pack in packs)


@pytest.mark.parametrize("annotator", [ScoreFilter(weights="?", at_least=0), Recaption(weights="?")])
def test_weights_of_another_kind_are_refused_in_words(annotator: OfDocuments, codebook: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a model of type 'chameleon_vqgan'; this annotator reads"):
        annotator.documents(lambda _: codebook)
    with pytest.raises(FileNotFoundError, match=r"no .*config\.json"):
        annotator.documents(lambda _: str(tmp_path))


@pytest.fixture(scope="module")
def frozen(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, VisionLanguageModel]:
    """The recipe with an encoder that has weights, and its model."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tower")
    recipe.vlm.build().encoder.tower.tower.save_pretrained(folder)  # type: ignore[union-attr]  # a CLIP tower here
    with_weights = replace(recipe, model=replace(recipe.vlm, encoder=replace(recipe.vlm.encoder, weights=str(folder))))
    torch.manual_seed(0)
    return with_weights, with_weights.vlm.build()


def gradients(model: VisionLanguageModel, pack: Pack) -> tuple[float, torch.Tensor]:
    """Loss, and the gradient of the connector."""
    model.encoder.requires_grad_(False)
    model.zero_grad()
    output = NextToken()(model, Batch.of(pack))
    output.sum.backward()
    found = [p.grad.flatten() for p in model.connector.parameters() if p.grad is not None]
    return output.sum.item(), torch.cat(found)


def test_features_from_the_pipeline_give_the_trainers_loss(
    frozen: tuple[Recipe, VisionLanguageModel], packs: PackWindows
) -> None:
    recipe, model = frozen
    add = FrozenFeatures(encoder=recipe.vlm.tower).packs(str)
    for pack in list(packs.packs(0))[:4]:
        light = add(pack)
        assert len(light.tiles) == 0
        assert light.features is not None
        assert light.features.shape == (len(pack.tiles), 36, recipe.vlm.tower.arch.width)
        (loss, slope), (other, tilt) = gradients(model, pack), gradients(model, light)
        assert other == pytest.approx(loss, rel=1e-2)
        assert torch.nn.functional.cosine_similarity(slope, tilt, dim=0) > 0.999


def test_cached_features_are_the_computed_ones_and_follow_contents(
    frozen: tuple[Recipe, VisionLanguageModel], packs: PackWindows, tmp_path: Path
) -> None:
    encoder = frozen[0].vlm.tower
    pack = next(pack for pack in packs.packs(0) if len(pack.tiles) > 1)
    cached = FrozenFeatures(encoder=encoder, cache=str(tmp_path))
    plain, first = FrozenFeatures(encoder=encoder).packs(str)(pack), cached.packs(str)(pack)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    assert len(files) == len({tile.tobytes() for tile in pack.tiles})
    second = cached.packs(str)(pack)
    assert plain.features is not None
    for other in (first, second):
        assert other.features is not None
        assert np.array_equal(other.features, plain.features)
    assert {file: file.stat().st_mtime_ns for file in files} == files
    darker = cached.packs(str)(replace(pack, tiles=pack.tiles // 2))
    assert darker.features is not None
    assert not np.array_equal(darker.features, plain.features)


def test_an_empty_pack_has_features_of_nothing(frozen: tuple[Recipe, VisionLanguageModel]) -> None:
    recipe, model = frozen
    annotator = FrozenFeatures(encoder=recipe.vlm.tower)
    told, made = annotator.empty(Pack.empty((3, 96, 96))), annotator.packs(str)(Pack.empty((3, 96, 96)))
    assert told.features is not None
    assert made.features is not None
    assert told.features.shape == made.features.shape
    assert NextToken()(model, Batch.of(told)).weight.item() == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: replace(e, weights=None), "must have the model's own encoder, with weights"),
        (lambda e: replace(e, layer=-1), "must have the model's own encoder"),
    ],
)
def test_features_of_another_encoder_are_refused(
    frozen: tuple[Recipe, VisionLanguageModel], change: Callable[[Encoder], Encoder], words: str
) -> None:
    recipe, _ = frozen
    annotator = FrozenFeatures(encoder=change(recipe.vlm.tower))
    first = replace(recipe.stages[0], annotators=(annotator,))
    with pytest.raises(ValueError, match=words):
        replace(recipe, stages=(first, *recipe.stages[1:]))


def test_features_after_a_stage_that_tunes_the_encoder_are_refused(
    frozen: tuple[Recipe, VisionLanguageModel],
) -> None:
    recipe, _ = frozen
    first, second, *rest = recipe.stages
    tuned = replace(first, tune={**first.tune, "encoder": next(iter(first.tune.values()))})
    light = replace(second, annotators=(FrozenFeatures(encoder=recipe.vlm.tower),))
    with pytest.raises(ValueError, match=r"takes frozen features and stage 'align' tunes the encoder"):
        replace(recipe, stages=(tuned, light, *rest))
    fine = replace(recipe, stages=(replace(first, annotators=light.annotators), second, *rest))
    assert load(dump(fine)) == fine
    with pytest.raises(RecipeError, match="at_least"):
        override(fine, ['stages.align.annotators=[{"kind": "score_filter", "weights": "x"}]'])


def test_annotators_that_do_not_fit_together_are_refused(frozen: tuple[Recipe, VisionLanguageModel]) -> None:
    recipe, _ = frozen
    features = FrozenFeatures(encoder=recipe.vlm.tower)
    reference, codes = ReferenceLogProbs(checkpoint="x"), DiscreteCodes(weights="x", size=32, first=2000)

    def having(*annotators: Annotator) -> Recipe:
        return replace(recipe, stages=(replace(recipe.stages[0], annotators=annotators), *recipe.stages[1:]))

    assert having(reference, features).stages[0].annotators == (reference, features)
    for wrong, words in [
        ((features, reference), "put it first"),
        ((features, features), "one of them twice"),
        ((codes,), "ids up to 10191 and the language model has a vocabulary of 2048"),
    ]:
        with pytest.raises(ValueError, match=words):
            having(*wrong)


def test_where_features_are_kept_is_no_part_of_what_a_stage_learns(frozen: tuple[Recipe, VisionLanguageModel]) -> None:
    recipe, _ = frozen

    def named(*annotators: Annotator) -> str:
        stage = replace(recipe.stages[0], annotators=annotators)
        return fingerprint(replace(recipe, stages=(stage, *recipe.stages[1:])), stage, "")

    plain = FrozenFeatures(encoder=recipe.vlm.tower)
    assert named(plain) == named(replace(plain, cache="s3://somewhere"))
    assert (
        len(
            {
                named(),
                named(plain),
                named(ScoreFilter(weights="x", at_least=0)),
                named(ScoreFilter(weights="x", at_least=0.1)),
            }
        )
        == 4
    )


def test_a_damaged_cache_is_mended(
    frozen: tuple[Recipe, VisionLanguageModel], packs: PackWindows, tmp_path: Path
) -> None:
    pack = next(pack for pack in packs.packs(0) if len(pack.tiles) > 1)
    twice = replace(pack, tiles=np.concatenate([pack.tiles, pack.tiles]))
    add = FrozenFeatures(encoder=frozen[0].vlm.tower, cache=str(tmp_path)).packs(str)
    whole = add(twice).features
    assert whole is not None
    assert np.array_equal(whole[: len(pack.tiles)], whole[len(pack.tiles) :])
    files = sorted(file for file in tmp_path.rglob("*") if file.is_file())
    before = [file.read_bytes() for file in files]
    files[0].write_bytes(before[0][:-2])
    files[1].write_bytes(b"")
    again = add(twice).features
    assert again is not None
    assert np.allclose(bfloat16(again), bfloat16(whole), rtol=1e-2, atol=1e-2)
    assert [len(file.read_bytes()) for file in files] == [len(data) for data in before]


def bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_a_references_log_probabilities_are_the_models_own(recipe: Recipe, packs: PackWindows, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = recipe.vlm.build().eval()
    export(recipe, model, TOKENIZER, tmp_path / "export")
    annotator = ReferenceLogProbs(checkpoint="reference")
    assert isinstance(annotator, OfPacks)
    add = annotator.packs(lambda _: str(tmp_path / "export"))
    for pack in list(packs.packs(0))[:3]:
        output = NextToken()(model, Batch.of(pack))
        references = add(pack).references
        assert references is not None
        assert references[:, 0].tolist() == pytest.approx((-output.documents[:, 0]).tolist(), rel=1e-4)
        assert not references[:, 1].any()  # no answers, so nothing was changed
        again = add(pack).references
        assert again is not None
        assert np.array_equal(again, references)
    with pytest.raises(FileNotFoundError, match=r"no recipe\.json"):
        annotator.packs(lambda _: str(tmp_path))
    with pytest.raises(ValueError, match="which is there once a run has come to it"):
        ReferenceLogProbs().packs(str)


def test_a_grid_of_boxes_stands_for_a_detector(rows: list[Document | Rejected], tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    words: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 5}
    config = ResNetConfig(**words, layer_type="basic")
    model = ResNetForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "seer")
    annotate = GridRegions(weights="seer", rows=2, cols=3, size=32).documents(lambda name: str(tmp_path / name))
    seen = annotate(rows)
    assert annotate(seen) == seen  # what has regions keeps them
    assert [type(row) for row in seen] == [*[Document] * 8, Rejected, Rejected, Document]
    tiling = Objects(row=RegionRow(features=16, classes=5), least=6)
    for before, after in zip(rows[:8], seen[:8], strict=True):
        assert isinstance(before, Document)
        assert isinstance(after, Document)
        image = after.segments[0]
        assert isinstance(image, Image)
        found = unpacked(image.objects or b"", tiling.row)
        assert replace(image, objects=None) == before.segments[0]
        assert np.allclose(found.classes.sum(1), 1, atol=1e-2)
        assert np.array_equal(found.boxes, grid(2, 3))
    first = rows[0]
    assert isinstance(first, Document)
    measured = pictures.measure(first, Resize(size=96, mode="squash"))
    (tile,) = torch.from_numpy(
        pictures.pixels([p for p in measured.segments if isinstance(p, Picture)], Resize(size=96, mode="squash"))
    )
    corner = images.normalize(images.resize(tile, 64, 96)[None, :, 32:, 64:], torch.tensor(MEAN), torch.tensor(STD))
    with torch.no_grad():
        wanted = model.resnet(corner).pooler_output.flatten()
    (image, *_) = seen[0].segments  # type: ignore[union-attr]  # a document, see above
    assert isinstance(image, Image)
    assert np.allclose(unpacked(image.objects or b"", tiling.row).features[5], wanted, atol=1e-2)
