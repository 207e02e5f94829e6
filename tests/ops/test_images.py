"""Pictures as a person sees them, whatever the file says."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ops import images
from tests.conftest import CORPUS


def encoded(picture: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def photo() -> bytes:
    return (sorted((CORPUS / "instruct" / "images").glob("*.jpg"))[0]).read_bytes()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, ((a.astype(float) - b.astype(float)) ** 2).mean())))


def test_a_jpeg_decodes_as_in_pillow_and_resizes_within_40_db() -> None:
    pixels = images.decode(photo())
    plain = Image.open(io.BytesIO(photo())).convert("RGB")
    assert psnr(pixels.permute(1, 2, 0).numpy(), np.asarray(plain)) > 45
    ours = images.resize(pixels, 64, 48).permute(1, 2, 0).numpy()
    assert psnr(ours, np.asarray(plain.resize((48, 64), Image.Resampling.BICUBIC))) > 40


def test_half_size_decoding_keeps_twice_the_target() -> None:
    big = encoded(Image.open(io.BytesIO(photo())).resize((900, 800)), "JPEG")
    assert images.decode(big, target=200).shape == (3, 400, 450)
    assert images.decode(big, target=201).shape == (3, 800, 900)


def test_rotated_transparent_palette_and_cmyk_pictures() -> None:
    left_red = Image.new("RGB", (40, 20), "blue")
    left_red.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to view
    turned = images.decode(encoded(left_red, "JPEG", exif=exif, quality=95))
    assert turned.shape == (3, 40, 20)
    assert turned[0, 5, 10] > 200 > 60 > turned[2, 5, 10]
    clear = images.decode(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG"))
    assert clear.float().mean() == 255
    palette = images.decode(encoded(left_red.convert("P"), "GIF"))
    assert palette[0, 5, 5] > 200
    cmyk = images.decode(encoded(left_red.convert("CMYK"), "JPEG"))
    assert cmyk[0, 5, 5] > 200 > 80 > cmyk[1, 5, 5]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"<html>404</html>", images.NotAnImage),
        (b"", images.NotAnImage),
        (photo()[:2000], images.TruncatedImage),
        (encoded(Image.effect_noise((64, 64), 90), "PNG")[:900], images.TruncatedImage),
    ],
)
def test_files_that_are_no_pictures_are_named_for_what_they_are(data: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        images.decode(data)


def test_padding_keeps_the_aspect_and_centres() -> None:
    white = torch.full((3, 20, 40), 255, dtype=torch.uint8)
    square = images.pad_to_square(white, 40, (1, 2, 3))
    assert square[:, 0, 0].tolist() == [1, 2, 3]
    assert square[:, 10:30].min() == 255
    assert images.centre_crop(white, 16).shape == (3, 16, 16)


def test_normalisation_is_clips() -> None:
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.2, 0.1])
    tile = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert images.normalize(tile, mean, std)[0, :, 0, 0].tolist() == pytest.approx([2.5, 3.0, 7.0])
