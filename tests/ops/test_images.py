"""Pictures as a person sees them, whatever the file says."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from ops import images
from tests.conftest import CORPUS


def encoded(picture: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def photo() -> bytes:
    return (sorted((CORPUS / "instruct" / "images").glob("*.jpg"))[0]).read_bytes()


def picture(width: int = 120, height: int = 80) -> Image.Image:
    return Image.open(io.BytesIO(photo())).convert("RGB").resize((width, height))


def corners() -> Image.Image:
    """40 x 20, red at the left and blue at the right, the top darker: no turn of it looks like another."""
    found = Image.new("RGB", (40, 20), "blue")
    found.paste("red", (0, 0, 20, 20))
    found.paste((90, 0, 0), (0, 0, 20, 10))
    return found


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def shown(data: bytes) -> np.ndarray:
    """(h, w, 3), and the header agrees."""
    pixels = images.decode(data)
    assert images.header(data) == tuple(pixels.shape[1:])
    return pixels.permute(1, 2, 0).numpy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, ((a.astype(float) - b.astype(float)) ** 2).mean())))


def test_a_jpeg_decodes_as_in_pillow_and_resizes_within_40_db() -> None:
    pixels = images.decode(photo())
    plain = Image.open(io.BytesIO(photo())).convert("RGB")
    assert psnr(pixels.permute(1, 2, 0).numpy(), np.asarray(plain)) > 45
    ours = images.resize(pixels, 64, 48).permute(1, 2, 0).numpy()
    assert psnr(ours, np.asarray(plain.resize((48, 64), Image.Resampling.BICUBIC))) > 40


def test_half_size_decoding_keeps_twice_the_target_on_both_sides() -> None:
    big = encoded(picture(900, 801), "JPEG")
    assert images.decode(big, target=(200, 225)).shape == (3, 401, 450)
    assert images.decode(big, target=(201, 200)).shape == (3, 801, 900)
    assert images.decode(big, target=(200, 226)).shape == (3, 801, 900)
    sideways = encoded(picture(900, 801), "JPEG", exif=turned(6))
    assert images.decode(sideways, target=(225, 200)).shape == (3, 450, 401)
    assert images.decode(sideways, target=(226, 200)).shape == (3, 900, 801)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_turned_as_their_exif_says(form: str, orientation: int) -> None:
    options = {"lossless": True} if form == "WEBP" else {"quality": 95} if form == "JPEG" else {}
    data = encoded(corners(), form, exif=turned(orientation), **options)
    plain = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(corners(), "PNG", exif=turned(orientation)))))
    assert psnr(shown(data), np.asarray(plain)) > (25 if form == "JPEG" else 90)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_resizes_as_one_stored_upright(orientation: int) -> None:
    pixels = images.decode(encoded(picture(), "JPEG", exif=turned(orientation)))
    small = images.resize(pixels, 30, 31)
    assert (small.int() - images.resize(pixels.clone().contiguous(), 30, 31).int()).abs().max() <= 2


@pytest.mark.parametrize("value", [0, 9, 60_000])
def test_orientations_that_make_no_sense_are_ignored(value: int) -> None:
    assert images.header(encoded(corners(), "JPEG", exif=turned(value))) == (20, 40)


def test_transparency_is_laid_on_white() -> None:
    assert shown(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG")).min() == 255
    half = shown(encoded(Image.new("LA", (8, 8), (0, 128)), "PNG"))
    assert np.allclose(half, 127, atol=1)
    palette = corners().convert("P", palette=Image.Palette.ADAPTIVE)
    assert shown(encoded(palette, "PNG"))[15, 5, 0] > 200
    index = palette.getpixel((5, 15))
    assert shown(encoded(palette, "PNG", transparency=index))[15, 5].tolist() == [255, 255, 255]
    assert shown(encoded(palette, "GIF", transparency=index))[15, 5].tolist() == [255, 255, 255]


@pytest.mark.parametrize("progressive", [False, True])
def test_inverted_cmyk_is_as_in_pillow(progressive: bool) -> None:
    data = encoded(picture().convert("CMYK"), "JPEG", progressive=progressive)
    assert psnr(shown(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))) > 60


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    wanted = np.round(ramp / 257)
    for form in ("PNG", "TIFF"):
        found = shown(encoded(Image.fromarray(ramp), form))
        assert np.abs(found - wanted[..., None]).max() <= 1
    floats = Image.fromarray(np.linspace(-3, 5, 64, dtype=np.float32).reshape(8, 8))
    assert (shown(encoded(floats, "TIFF")).min(), shown(encoded(floats, "TIFF")).max()) == (0, 255)
    clear = encoded(Image.fromarray(ramp), "PNG", transparency=0)
    assert shown(clear)[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("mode", "form"),
    [("1", "PNG"), ("L", "PNG"), ("L", "JPEG"), ("1", "TIFF"), ("RGB", "BMP"), ("CMYK", "TIFF"), ("LA", "WEBP")],
)
def test_other_kinds_of_pictures_look_like_what_they_are(mode: str, form: str) -> None:
    plain = corners().convert(mode)
    options = {"lossless": True} if form == "WEBP" else {}
    assert psnr(shown(encoded(plain, form, **options)), np.asarray(plain.convert("RGB"))) > 35


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_shown(form: str) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "lime")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    assert shown(data)[5, 5].argmax() == 0
    if form == "PNG":  # a still for programs that cannot play is not part of the animation
        assert (
            shown(encoded(frames[0], form, save_all=True, append_images=frames[1:], default_image=True))[5, 5, 2] > 200
        )


def test_interlaced_and_progressive_pictures() -> None:
    assert psnr(shown(encoded(picture(), "GIF", interlace=True)), shown(encoded(picture(), "PNG"))) > 25
    assert psnr(shown(encoded(picture(), "JPEG", progressive=True)), shown(encoded(picture(), "JPEG"))) > 60


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_a_jpeg_that_lacks_only_its_end_is_whole(options: dict) -> None:
    data = encoded(picture(), "JPEG", **options)
    whole = images.decode(data)
    for damaged in (data[:-2], data + b"\0" * 100, data + data[:500]):
        assert images.decode(damaged).equal(whole)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_is_used_when_nine_of_ten_rows_could_be_read(mode: str) -> None:
    data = encoded(picture(400, 400).convert(mode), "JPEG", quality=90)
    whole = images.decode(data)
    for share, used in ((0.98, True), (0.75, False), (0.5, False), (0.1, False)):
        cut = data[: int(len(data) * share)]
        if not used:
            with pytest.raises(images.TruncatedImage):
                images.decode(cut)
            continue
        pixels = images.decode(cut)
        assert pixels.shape == whole.shape
        assert pixels[:, :340].equal(whole[:, :340])


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_a_progressive_jpeg_cut_short_is_truncated_though_all_rows_look_read(share: float) -> None:
    data = encoded(picture(400, 400), "JPEG", progressive=True)
    with pytest.raises(images.TruncatedImage):
        images.decode(data[: int(len(data) * share)])


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_a_few_bad_bytes_are_mended_alike_every_time(options: dict) -> None:
    data = bytearray(encoded(picture(400, 400), "JPEG", quality=90, **options))
    for at in (len(data) * 9 // 10, len(data) * 9 // 10 + 50):
        data[at : at + 3] = b"\x12\x34\x56"
    first = images.decode(bytes(data))
    for other in (photo(), encoded(picture(), "PNG"), photo()):
        images.decode(other)
        assert images.decode(bytes(data)).equal(first)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"<html>404</html>", images.NotAnImage),
        (b"", images.NotAnImage),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", images.NotAnImage),
        (b"\xff\xd8<html>", images.TruncatedImage),
        (photo()[:2000], images.TruncatedImage),
        (encoded(Image.effect_noise((64, 64), 90), "PNG")[:900], images.TruncatedImage),
        (encoded(Image.effect_noise((64, 64), 90), "PNG")[:20], images.TruncatedImage),
        (encoded(Image.effect_noise((64, 64), 90), "WEBP")[:900], images.TruncatedImage),
        (encoded(Image.effect_noise((64, 64), 90), "BMP")[:900], images.TruncatedImage),
    ],
    ids=["html", "empty", "eps", "jpeg-html", "jpeg", "png", "png-header", "webp", "bmp"],
)
def test_files_that_are_no_pictures_are_named_for_what_they_are(data: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        images.decode(data)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *extra: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(b"\0" * min(1_000_000, (width + 1) * height)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + rows + chunk(b"IEND", b"")


def test_bombs_are_refused_before_they_grow() -> None:
    bomb = zlib.compress(b"\0" * 50_000_000)
    with pytest.raises(images.HugeImage):
        images.header(png(60_000, 60_000))
    with pytest.raises(images.HugeImage):
        images.decode(png(10_001, 10_000))
    huge = bytearray(photo())
    at = huge.index(b"\xff\xc0") + 5
    huge[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(images.HugeImage):
        images.decode(bytes(huge))
    for extra in (chunk(b"zTXt", b"k\0\0" + bomb), chunk(b"iCCP", b"k\0\0" + bomb)):
        with pytest.raises(images.NotAnImage, match="too large"):
            images.decode(png(8, 8, extra))
    with pytest.raises(images.NotAnImage):
        images.decode(png(0, 8))


STARTS = [photo()[:3000], encoded(picture(30, 20), "PNG"), encoded(picture(30, 20), "GIF"), encoded(corners(), "TIFF")]
STARTS += [encoded(corners(), "JPEG", exif=turned(6), quality=50), encoded(picture(30, 20), "WEBP"), png(8, 8)]


@given(st.sampled_from(STARTS), st.lists(st.tuples(st.integers(0, 2999), st.integers(0, 255)), max_size=6), st.data())
@settings(max_examples=120, deadline=None)
def test_hostile_bytes_give_a_picture_or_a_named_error(start: bytes, edits: list, data: st.DataObject) -> None:
    body = bytearray(start[: data.draw(st.integers(1, len(start)))])
    for at, value in edits:
        body[at % len(body)] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow grumbles about damaged headers
        try:
            size = images.header(bytes(body))
            pixels = images.decode(bytes(body))
        except (images.NotAnImage, images.TruncatedImage, images.HugeImage):
            return
        assert pixels.shape == (3, *size)
        assert images.decode(bytes(body)).equal(pixels)


# -- resizing and cutting ----------------------------------------------------------------------------------------------


def test_a_letterbox_keeps_the_picture_in_the_middle() -> None:
    white = torch.full((3, 20, 40), 255, dtype=torch.uint8)
    room = torch.empty(3, 40, 41, dtype=torch.uint8)
    square = images.letterbox(white, (20, 40), (1, 2, 3), room)
    assert square is room
    assert square[:, 0, 0].tolist() == square[:, 39, 40].tolist() == square[:, 15, 40].tolist() == [1, 2, 3]
    assert square[:, 10:30, :40].min() == 255


def test_grids_and_patches_are_views() -> None:
    pixels = torch.arange(3 * 8 * 12, dtype=torch.uint8).view(3, 8, 12)
    tiles = images.grid(pixels, 2, 3)
    assert tiles.shape == (2, 3, 3, 4, 4)
    assert tiles[1, 2].equal(pixels[:, 4:, 8:])
    patches = images.patchify(tiles, 2)
    assert patches.shape == (2, 3, 2, 2, 3, 2, 2)
    assert patches[1, 2, 0, 1].equal(pixels[:, 4:6, 10:])
    assert patches.data_ptr() == pixels.data_ptr()


def test_normalisation_is_clips() -> None:
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.2, 0.1])
    tile = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert images.normalize(tile, mean, std)[0, :, 0, 0].tolist() == pytest.approx([2.5, 3.0, 7.0])
