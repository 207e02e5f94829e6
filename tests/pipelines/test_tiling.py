"""Tilings: planned from the size alone, cut as planned, and alike to the papers' own programs."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from pydantic import TypeAdapter, ValidationError

from ops import images
from pipelines.pictures import measure, pixels
from pipelines.tiling import (
    AnyRes,
    AnyTiling,
    DynamicTiles,
    MultiScale,
    Native,
    Pad,
    Resize,
    Slices,
    Tiling,
)
from pipelines.types import (
    Cut,
    Document,
    Frames,
    Image,
    Limits,
    Measured,
    Picture,
    Reason,
    RowId,
    Separators,
    SkipSample,
    Text,
    Video,
    VisionLayout,
)
from tests.conftest import CORPUS

ID = RowId(corpus="c", shard="s", epoch=0, row=0)
PHOTO = sorted((CORPUS / "instruct" / "images").glob("*.jpg"))[0].read_bytes()
CLIP = (CORPUS / "video" / "bigbuckbunny.mp4").read_bytes()
SIDES = st.integers(1, 3000)
SMALL: tuple[AnyTiling, ...] = (
    Resize(size=28),
    Resize(size=28, mode="squash"),
    Pad(size=28),
    AnyRes(size=28),
    DynamicTiles(size=28, max_tiles=6),
    DynamicTiles(size=28, max_tiles=4, thumbnail=False),
    Slices(size=28, patch=4, max_tiles=5),
    Slices(size=28, patch=4, rounding="floor"),
    MultiScale(size=28, scales=(1, 2, 3)),
    Native(size=28, patch=4, min_pixels=16 * 16, max_pixels=64 * 64),
)


def noise(height: int, width: int) -> torch.Tensor:
    """A smooth picture, so that resizing by two programs may be compared."""
    rng = np.random.default_rng(height * 10_000 + width)
    small = PILImage.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    return torch.from_numpy(np.array(small.resize((width, height), PILImage.Resampling.BICUBIC))).permute(2, 0, 1)


def encoded(height: int, width: int, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(noise(height, width).permute(1, 2, 0).numpy()).save(buffer, form)
    return buffer.getvalue()


def document(*segments: Text | Image | Video) -> Document:
    return Document(id=ID, source=0, segments=segments)


def pictures(measured: Measured) -> list[Picture]:
    return [segment for segment in measured.segments if isinstance(segment, Picture)]


def assert_close(ours: torch.Tensor, theirs: np.ndarray, worst: int = 6) -> None:
    gap = np.abs(ours.numpy().astype(int) - np.asarray(theirs).astype(int))
    assert gap.max() <= worst
    assert gap.mean() < 0.6


# -- the papers' numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "most", "cols", "rows"),
    [
        (800, 1300, 12, 2, 3),
        (800, 1300, 40, 5, 8),
        (640, 480, 12, 4, 3),
        (896, 896, 12, 2, 2),
        (1344, 1344, 12, 3, 3),
        (3840, 2160, 12, 4, 2),
        (3840, 2160, 40, 7, 4),
    ],
)
def test_internvls_grids(width: int, height: int, most: int, cols: int, rows: int) -> None:
    cut = DynamicTiles(size=448, max_tiles=most).cut(height, width)
    assert (cut.cols, cut.rows) == (cols, rows)
    assert cut.tiles == rows * cols + 1


def test_internvls_portrait_takes_1792_tokens() -> None:
    layout = VisionLayout(shape=(3, 448, 448), tokens_per_tile=256)
    assert layout.tokens(DynamicTiles(size=448).cut(1300, 800)) == 1792
    assert layout.tokens(DynamicTiles(size=448).cut(448, 448)) == 256


@pytest.mark.parametrize(
    ("height", "width", "canvas", "tokens"),
    [(336, 336, (336, 672), 1176), (672, 672, (672, 672), 2928), (480, 640, None, 2340), (300, 1000, None, 2182)],
)
def test_llava_nexts_tokens(height: int, width: int, canvas: tuple[int, int] | None, tokens: int) -> None:
    cut = AnyRes(size=336).cut(height, width)
    layout = VisionLayout(shape=(3, 336, 336), tokens_per_tile=576, join="unpad")
    assert canvas in (None, cut.canvas)
    assert layout.tokens(cut) == tokens


def test_minicpms_slices() -> None:
    tiling = Slices(size=448)
    square, portrait = tiling.cut(1344, 1344), tiling.cut(1300, 800)
    assert (square.rows, square.cols, square.canvas) == (3, 3, (1344, 1344))
    assert (portrait.cols, portrait.rows) == (2, 3)
    assert portrait.canvas == (1386, 868)
    assert portrait.overview == (574, 350)
    minicpm = VisionLayout(
        shape=(588,), tokens_per_tile=64, join="slices", separators=Separators(slice=2, group=2, row=1)
    )
    assert minicpm.tokens(portrait) == 7 * 66 + 2 + 2
    assert minicpm.tokens(tiling.cut(1300, 800, single=True)) == 66
    uhd = VisionLayout(shape=(588,), tokens_per_tile=144, join="slices", separators=Separators(column=1, row=1))
    assert uhd.tokens(Slices(size=336, max_tiles=6, rounding="floor").cut(1088, 672)) == 7 * 144 + 3 * 1 + 2


def test_llava_uhds_slices_hold_no_more_patches_than_its_encoder() -> None:
    tiling = Slices(size=336, max_tiles=6, rounding="floor")
    for height, width in ((1088, 672), (500, 3000), (337, 337), (100, 90)):
        cut = tiling.cut(height, width)
        assert cut.canvas[0] // cut.rows * (cut.canvas[1] // cut.cols) <= 336**2


def test_scales_take_the_tokens_of_one_tile_and_qwens_marks_are_counted() -> None:
    cut = MultiScale(size=384).cut(500, 700)
    assert cut.tiles == 5
    assert VisionLayout(shape=(3, 384, 384), tokens_per_tile=196, join="scales").tokens(cut) == 196
    qwen = VisionLayout(shape=(3, 448, 448), tokens_per_tile=256, separators=Separators(picture=2))
    assert qwen.tokens(Resize(size=448).cut(10, 10)) == 258


# -- other programs as oracles -----------------------------------------------------------------------------------------


@given(SIDES, SIDES, st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_grids_are_those_of_the_published_internvl_processor(height: int, width: int, most: int) -> None:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    cut = DynamicTiles(size=448, max_tiles=most).cut(height, width)
    assert (cut.cols, cut.rows) == get_optimal_tiled_canvas((height, width), (448, 448), 1, most)


@given(SIDES, SIDES)
@settings(max_examples=150, deadline=None)
def test_canvases_and_tokens_are_those_of_the_published_llava_next(height: int, width: int) -> None:
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    tiling = AnyRes(size=336)
    cut = tiling.cut(height, width)
    assert cut.canvas == select_best_resolution((height, width), [(r * 336, c * 336) for r, c in tiling.canvases])
    features = torch.zeros(1, cut.rows * 24, cut.cols * 24)
    assert cut.unpadded(24)[2:] == unpad_image(features, (height, width)).shape[1:]


@given(SIDES, SIDES, st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_slices_are_those_of_the_published_minicpm_processor(height: int, width: int, most: int) -> None:
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

    theirs: Any = MiniCPMV4_6ImageProcessorPil()
    cut = Slices(size=448, patch=56, max_tiles=most).cut(height, width)  # it merges 4 x 4 patches of 14
    grid = theirs.get_sliced_grid((height, width), most, 448)
    assert (cut.rows, cut.cols) == tuple(grid or (1, 1))
    whole = theirs.find_best_resize((height, width), 448, 14, "16x", allow_upscale=grid is None)
    if grid is None:
        assert cut.canvas == whole
    else:
        assert cut.overview == whole
        assert cut.canvas == theirs.get_refine_size((height, width), grid, 448, 14, "16x", allow_upscale=True)


@given(st.integers(16, 3000), st.integers(16, 3000))
@settings(max_examples=150, deadline=None)
def test_native_sizes_are_those_of_the_published_qwen2_vl(height: int, width: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    assert Native(size=448).cut(height, width).canvas == smart_resize(height, width, 28, 56 * 56, 28 * 28 * 1280)


@pytest.mark.parametrize(("height", "width"), [(300, 401), (700, 351), (97, 640)])
def test_tiles_are_those_of_the_published_processors(height: int, width: int) -> None:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    picture = noise(height, width)
    plain = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
    side = {"height": 112, "width": 112}
    anyres = AnyRes(size=112)
    theirs: Any = LlavaNextImageProcessorPil(
        size=side, crop_size=side, image_grid_pinpoints=[[r * 112, c * 112] for r, c in anyres.canvases]
    )
    assert_close(
        anyres.tile(picture, anyres.cut(height, width)), theirs(picture.numpy(), do_pad=False, **plain).pixel_values[0]
    )
    dynamic = DynamicTiles(size=112, max_tiles=6)
    theirs = GotOcr2ImageProcessorPil(size=side, crop_to_patches=True, max_patches=6)
    assert_close(dynamic.tile(picture, dynamic.cut(height, width)), theirs(picture.numpy(), **plain).pixel_values)


def test_patches_are_qwens_in_rows() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    picture, tiling = noise(200, 333), Native(size=224, min_pixels=28 * 28, max_pixels=28 * 28 * 40)
    cut = tiling.cut(200, 333)
    theirs: Any = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 40, temporal_patch_size=1)
    found = theirs(picture.numpy(), do_rescale=False, do_normalize=False, return_tensors="np").pixel_values
    high, wide = cut.canvas[0] // 14, cut.canvas[1] // 14
    rows = found.reshape(high // 2, wide // 2, 2, 2, -1).transpose(0, 2, 1, 3, 4).reshape(cut.tiles, -1)
    assert_close(tiling.tile(picture, cut), rows)


# -- what holds for every tiling ---------------------------------------------------------------------------------------


def layout(tiling: AnyTiling) -> VisionLayout:
    return VisionLayout(shape=tiling.shape, tokens_per_tile=16, join=tiling.join, merge=getattr(tiling, "merge", 1))


@given(st.sampled_from(SMALL), st.integers(1, 120), st.integers(1, 120), st.booleans(), st.none() | st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_a_cut_foretells_the_tiles(tiling: AnyTiling, height: int, width: int, single: bool, limit: int | None) -> None:
    cut = tiling.cut(height, width, single, limit)
    tiles = tiling.tile(noise(height, width), cut)
    assert (cut.height, cut.width) == (height, width)
    assert tiles.shape == (cut.tiles, *tiling.shape)
    assert tiles.is_contiguous()
    assert layout(tiling).tokens(cut) > 0
    assert min(tiling.target(cut)) >= 1
    assert cut.canvas[0] % cut.rows == cut.canvas[1] % cut.cols == 0


@given(st.sampled_from(SMALL), st.integers(1, 100_000), st.integers(1, 100_000))
@settings(max_examples=200, deadline=None)
def test_no_picture_of_any_size_costs_more_than_the_tiling_says(tiling: AnyTiling, height: int, width: int) -> None:
    cut = tiling.cut(height, width)
    if isinstance(tiling, Native):
        most = tiling.max_pixels // tiling.patch**2
    elif isinstance(tiling, Slices):
        # A side is raised to one patch, and rounding adds half a patch at most to each.
        assert cut.rows * cut.cols <= tiling.max_tiles
        most = cut.tiles
    elif isinstance(tiling, MultiScale):
        most = 14
    else:
        most = getattr(tiling, "max_tiles", 0) + 1
    assert 1 <= cut.tiles <= most
    assert layout(tiling).tokens(cut) <= most * (16 + 12)


@pytest.mark.parametrize("tiling", [t for t in SMALL if getattr(t, "mode", "") != "crop"])
@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 35), (40, 40)])
def test_every_region_of_the_picture_is_shown(tiling: AnyTiling, height: int, width: int) -> None:
    cut = tiling.cut(height, width)
    base = torch.full((3, height, width), 100, dtype=torch.uint8)
    before = tiling.tile(base, cut).int()
    for top in range(0, height - 8, 16):
        for left in range(0, width - 8, 16):
            marked = base.clone()
            marked[:, top : top + 8, left : left + 8] = 255
            assert (tiling.tile(marked, cut).int() - before).abs().max() > 20


@pytest.mark.parametrize("tiling", SMALL)
def test_a_picture_decoded_at_half_size_is_cut_alike(tiling: AnyTiling) -> None:
    cut = tiling.cut(800, 1000)
    full, half = tiling.tile(noise(800, 1000), cut), tiling.tile(images.resize(noise(800, 1000), 400, 500), cut)
    assert full.shape == half.shape
    assert (full.int() - half.int()).abs().float().mean() < 2


def test_tiles_lie_row_by_row_and_the_overview_where_the_paper_has_it() -> None:
    quarters = torch.zeros(3, 80, 80, dtype=torch.uint8)
    for k, (top, left) in enumerate(((0, 0), (0, 40), (40, 0), (40, 40))):
        quarters[:, top : top + 40, left : left + 40] = 50 * (k + 1)
    dynamic = DynamicTiles(size=40, max_tiles=4)
    means = dynamic.tile(quarters, dynamic.cut(80, 80)).float().mean((1, 2, 3)).round().tolist()
    assert means[:4] == pytest.approx([50, 100, 150, 200], abs=3)
    assert means[4] == pytest.approx(125, abs=3)
    anyres = AnyRes(size=40)
    means = anyres.tile(quarters, anyres.cut(80, 80)).float().mean((1, 2, 3)).round().tolist()
    assert means == pytest.approx([125, 50, 100, 150, 200], abs=3)
    slices = Slices(size=40, patch=4, max_tiles=4)
    cut = slices.cut(80, 80)
    means = slices.tile(quarters, cut).float().mean(1).unflatten(0, (5, 100)).mean(1).round().tolist()
    assert means == pytest.approx([125, 50, 100, 150, 200], abs=3)


def test_a_patch_holds_its_channels_first() -> None:
    picture = torch.arange(3 * 8 * 12, dtype=torch.uint8).view(3, 8, 12)
    tiling = Native(size=8, patch=4, merge=1, min_pixels=16, max_pixels=10_000)
    tiles = tiling.tile(picture, tiling.cut(8, 12))
    assert tiles[4].view(3, 4, 4).equal(picture[:, 4:8, 4:8])


def test_room_of_the_wrong_shape_is_refused() -> None:
    tiling = Pad(size=28)
    with pytest.raises(ValueError, match="out is"):
        tiling.tile(noise(9, 9), tiling.cut(9, 9), torch.empty(2, 3, 28, 28, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: AnyRes(size=336, canvases=()), "canvases"),
        (lambda: DynamicTiles(size=448, max_tiles=0), "max_tiles"),
        (lambda: Slices(size=7), "patch"),
        (lambda: MultiScale(size=384, scales=(2, 1)), "grow"),
        (lambda: Native(size=448, max_pixels=100, min_pixels=50), "max_pixels"),
        (lambda: VisionLayout(shape=(3, 8, 8), tokens_per_tile=65, join="unpad"), "square"),
    ],
)
def test_numbers_that_contradict_one_another_are_refused(make: Callable[[], object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make()


def test_tilings_survive_json() -> None:
    adapter: TypeAdapter[AnyTiling] = TypeAdapter(Tiling)
    for tiling in SMALL:
        assert adapter.validate_json(adapter.dump_json(tiling)) == tiling
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": "native", "size": 448, "max_pixel": 3})


# -- documents ---------------------------------------------------------------------------------------------------------


def test_a_document_is_measured_without_decoding() -> None:
    cut_short = encoded(300, 500, "JPEG")[:900]
    found = pictures(measure(document(Text(text="a"), Image(data=cut_short, role="user")), Pad(size=28)))
    assert [(p.cut.height, p.cut.width, p.role) for p in found] == [(300, 500, "user")]
    with pytest.raises(SkipSample, match="truncated"):
        pixels(found, Pad(size=28))


def test_pictures_of_one_document_share_its_tiles() -> None:
    image = Image(data=encoded(90, 120))
    for tiling, shares in ((DynamicTiles(size=28, max_tiles=12), (13, 7, 1)), (AnyRes(size=28), (5, 3, 1))):
        for count, tiles in zip((1, 2, 6), shares, strict=True):
            found = pictures(measure(document(*[image] * count), tiling))
            assert [picture.cut.tiles for picture in found] == [tiles] * count


@pytest.mark.parametrize(
    ("data", "limits", "reason"),
    [
        (b"<html>", Limits(), Reason.NOT_AN_IMAGE),
        (b"\xff\xd8\xff\xe0", Limits(), Reason.TRUNCATED_IMAGE),
        (encoded(20, 20), Limits(pixels=399), Reason.HUGE_IMAGE),
        (encoded(4, 20), Limits(ratio=4.9), Reason.EXTREME_RATIO),
        (encoded(4, 20), Limits(bytes=20), Reason.HUGE_FILE),
    ],
)
def test_pictures_beyond_use_are_dropped_by_their_headers(data: bytes, limits: Limits, reason: Reason) -> None:
    with pytest.raises(SkipSample) as skip:
        measure(document(Image(data=data)), Pad(size=28), limits)
    assert skip.value.reason == reason


def test_pixels_are_the_tiles_in_order_and_go_where_they_are_told() -> None:
    tiling = DynamicTiles(size=28, max_tiles=6)
    row = document(Image(data=encoded(60, 90)), Text(text="and"), Image(data=PHOTO), Image(data=encoded(90, 30)))
    found = pictures(measure(row, tiling))
    whole = pixels(found, tiling)
    assert whole.shape == (sum(p.cut.tiles for p in found), 3, 28, 28)
    parts = [
        tiling.tile(images.decode(p.of.data, tiling.target(p.cut)), p.cut) for p in found if isinstance(p.of, Image)
    ]
    assert np.array_equal(whole, torch.cat(parts).numpy())
    room = np.zeros((len(whole) + 1, 3, 28, 28), np.uint8)
    assert pixels(found, tiling, room[1:]).base is not None
    assert np.array_equal(room[1:], whole)
    assert not room[0].any()
    with pytest.raises(ValueError, match="out is"):
        pixels(found, tiling, room)


def test_a_body_that_is_not_what_its_header_told_is_dropped() -> None:
    image = Image(data=encoded(60, 90))
    wrong = Picture(of=image, cut=Pad(size=28).cut(61, 90))
    with pytest.raises(SkipSample, match="header says 90 x 61, body is 90 x 60"):
        pixels([wrong], Pad(size=28))


def test_frames_of_a_video_and_of_a_folder_are_single_tiles() -> None:
    tiling = DynamicTiles(size=28, max_tiles=6)
    folder = Video(data=tuple(encoded(40, 60 + n) for n in range(5)), frames=Frames(count=3))
    clip = Video(data=CLIP, frames=Frames(count=4), role="user")
    found = pictures(measure(document(Text(text="a"), folder, clip), tiling))
    assert [p.frame for p in found] == [0, 2, 4, 0, 43, 87, 131]
    assert [p.cut.tiles for p in found] == [1] * 7
    assert [(p.cut.height, p.cut.width) for p in found[2:4]] == [(40, 64), (720, 1280)]
    tiles = pixels(found, tiling)
    assert np.array_equal(tiles[1], tiling.tile(images.decode(folder.data[2]), found[1].cut)[0])  # type: ignore[arg-type]  # else the test fails
    backwards = pixels(found[::-1], tiling)
    assert np.array_equal(backwards[::-1], tiles)


def test_a_file_that_is_no_video_is_dropped() -> None:
    with pytest.raises(SkipSample) as skip:
        measure(document(Video(data=b"#EXTM3U\nfile:///etc/hostname\n")), Pad(size=28))
    assert skip.value.reason == Reason.NOT_A_VIDEO


def test_a_cut_is_a_plain_value() -> None:
    assert Native(size=448).cut(280, 560) == Cut(
        height=280, width=560, rows=1, cols=1, canvas=(280, 560), overview=None, patch=14
    )
