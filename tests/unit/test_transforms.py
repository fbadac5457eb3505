"""Reads images made here; checks decoding of odd images and the crops of the official extraction."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from cca_core import transforms
from cca_core.config import TokensConfig
from cca_core.transforms import adm_centre_crop, decode_image, resize_shorter, to_chw, view_crops

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, fmt: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, fmt, **options)
    return out.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_a_photo_with_a_preview_beside_it_is_a_still_image():
    photo, preview = noise(20, 10), noise(4, 2)
    assert decode_image(encoded(photo, "MPO", save_all=True, append_images=[preview])).size == (20, 10)


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds no pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


def palette(*colours: tuple[int, int, int]) -> Image.Image:
    image = Image.new("P", (len(colours), 1))
    image.putpalette([value for colour in colours for value in colour])
    image.putdata(range(len(colours)))
    return image


def rows(mode: str, *pixels) -> Image.Image:
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    return image


ODD = {
    "rgb": (encoded(rows("RGB", RED, BLUE)), [RED, BLUE]),
    "rgba over white": (
        encoded(rows("RGBA", (255, 0, 0, 255), (255, 0, 0, 128), (0, 0, 0, 0))),
        [RED, (255, 127, 127), WHITE],
    ),
    "grey with alpha": (encoded(rows("LA", (10, 255), (10, 0))), [(10, 10, 10), WHITE]),
    "palette": (encoded(palette(RED, BLUE)), [RED, BLUE]),
    "palette with a transparent colour": (
        encoded(palette(RED, BLUE), transparency=0),
        [WHITE, BLUE],
    ),
    "palette with an alpha per colour": (
        encoded(palette(RED, BLUE), transparency=b"\x80\xff"),
        [(255, 127, 127), BLUE],
    ),
    "gif with a transparent colour": (
        encoded(palette(RED, BLUE), "GIF", transparency=1),
        [RED, WHITE],
    ),
    "rgb with a transparent colour": (
        encoded(rows("RGB", RED, BLUE), transparency=RED),
        [WHITE, BLUE],
    ),
    "1 bit": (encoded(rows("1", 0, 255)), [(0, 0, 0), WHITE]),
    "grey": (encoded(rows("L", 7)), [(7, 7, 7)]),
    "16 bit png": (
        encoded(Image.fromarray(np.array([[0, 255, 32768, 65535]], np.uint16))),
        [(0, 0, 0), (1, 1, 1), (128, 128, 128), WHITE],
    ),
    "16 bit tiff, big endian": (
        encoded(Image.frombytes("I;16B", (2, 1), b"\x80\x00\xff\xff"), "TIFF"),
        [(128, 128, 128), WHITE],
    ),
    "16 bits in a 32 bit tiff": (
        encoded(Image.fromarray(np.array([[0, 32768, 65535]], np.int32)), "TIFF"),
        [(0, 0, 0), (128, 128, 128), WHITE],
    ),
}


@pytest.mark.parametrize(("data", "expected"), ODD.values(), ids=ODD.keys())
def test_every_odd_mode_becomes_the_rgb_a_viewer_shows(data, expected):
    image = decode_image(data)
    assert image.mode == "RGB"
    assert np.asarray(image).tolist() == [[list(pixel) for pixel in expected]]


ORIENTATIONS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
def test_exif_orientation_is_applied_once(fmt, orientation):
    image, exif = noise(5, 3), Image.Exif()
    exif[0x0112] = orientation
    upright = np.asarray(decode_image(encoded(image, fmt, exif=exif)))
    assert np.array_equal(upright, ORIENTATIONS[orientation](np.asarray(image)))


def test_a_phone_photo_of_several_pictures_is_its_first():
    photo = encoded(Image.new("RGB", (16, 16), RED), "MPO", save_all=True, append_images=[noise(8, 8)])
    assert decode_image(photo).size == (16, 16)


ENCODINGS = {
    "jpeg": ("JPEG", {}),
    "progressive jpeg": ("JPEG", {"progressive": True}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {}),
    "gif": ("GIF", {}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {"compression": "tiff_lzw"}),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of damaged tags
@pytest.mark.parametrize(("fmt", "options"), ENCODINGS.values(), ids=ENCODINGS.keys())
def test_a_truncated_file_is_refused_wherever_it_ends(fmt, options):
    data = encoded(noise(40, 30), fmt, **options)
    assert decode_image(data).size == (40, 30)
    for tenths in range(1, 10):
        with pytest.raises(ValueError, match=r"cannot decode|not an image|header"):
            decode_image(data[: len(data) * tenths // 10])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("fmt", "options"), ENCODINGS.values(), ids=ENCODINGS.keys())
def test_damage_raises_valueerror_and_nothing_else(fmt, options):
    data, rng, refused = encoded(noise(12, 9), fmt, **options), np.random.default_rng(0), 0
    for _ in range(60):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 8):
            damaged[place] = rng.integers(0, 256)
        try:
            decode_image(bytes(damaged))
        except ValueError:
            refused += 1
    assert refused


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>404</html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
        (encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), "CMYK.*convert it to RGB"),
        (encoded(rows("RGB", RED), "GIF", save_all=True, append_images=[rows("RGB", BLUE)]), "animated.*2 frames"),
        (encoded(rows("RGB", RED), "WEBP", save_all=True, append_images=[rows("RGB", BLUE)]), "animated.*2 frames"),
        (encoded(rows("RGB", RED), "TIFF", save_all=True, append_images=[rows("RGB", BLUE)]), "several pages"),
        (png_header(0, 5), "not an image"),
        (png_header(9000, 9000), "too large"),
        (png_header(60000, 60000), "too large"),
        (encoded(Image.new("F", (2, 2)), "TIFF"), "floating-point"),
        (encoded(Image.fromarray(np.array([[0, 70000]], np.int32)), "TIFF"), "outside 0..65535"),
    ],
    ids=["empty", "html", "eps", "cmyk", "gif", "webp", "pages", "zero size", "large", "bomb", "float", "32 bit"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bad_file_is_refused_with_the_reason(data, reason):
    with pytest.raises(ValueError, match=reason):
        decode_image(data)


@pytest.mark.parametrize("size", [(33, 47), (47, 33), (5, 9), (16, 16), (31, 200), (1, 3), (64, 64)])
@pytest.mark.parametrize("side", [16, 15])
def test_adm_crop_is_a_square_of_the_size_asked_for(size, side):
    assert adm_centre_crop(noise(*size), side).size == (side, side)


def test_adm_crop_takes_the_centre_without_touching_pixels_that_fit():
    wide = noise(21, 16)
    assert adm_centre_crop(wide, 16) == wide.crop((2, 0, 18, 16))
    tall = noise(16, 21)
    assert adm_centre_crop(tall, 16) == tall.crop((0, 2, 16, 18))


def test_adm_crop_halves_by_box_then_scales_by_bicubic():
    image = noise(67, 48)
    halved = image.resize((33, 24), Image.Resampling.BOX)
    assert adm_centre_crop(image, 16) == halved.resize((22, 16), Image.Resampling.BICUBIC).crop((3, 0, 19, 16))
    assert adm_centre_crop(image, 24) == halved.crop((4, 0, 28, 24))


def test_adm_crop_rounds_the_longer_side_half_to_even():
    image = noise(7, 6)  # 7 * 9 / 6 = 10.5 -> 10
    assert adm_centre_crop(image, 9) == image.resize((10, 9), Image.Resampling.BICUBIC).crop((0, 0, 9, 9))


def test_a_strip_that_would_explode_when_scaled_is_refused():
    with pytest.raises(ValueError, match="too narrow"):
        adm_centre_crop(Image.new("RGB", (1, 30000)), 256)


@pytest.mark.parametrize(
    ("size", "crop_range", "side"),
    [(256, 1.1, 281), (384, 1.1, 422), (512, 1.1, 563), (256, 1.05, 268), (384, 1.05, 403), (512, 1.05, 537)],
)
def test_ten_crop_of_an_image_of_the_official_side_is_its_corners_and_centre(size, crop_range, side):
    image = noise(side, side)
    crops = view_crops(image, TokensConfig(image_size=size, views="ten_crop", crop_range=crop_range))
    end, mirrored = side - size, ImageOps.mirror(image)
    centre = {25: 12, 38: 19, 51: 26, 12: 6, 19: 10}[end]  # half to even
    for left, top, view in [(0, 0, 0), (end, 0, 1), (0, end, 2), (end, end, 3), (centre, centre, 4)]:
        box = (left, top, left + size, top + size)
        assert crops[view] == image.crop(box)
        assert crops[view + 5] == mirrored.crop(box)


@pytest.mark.parametrize("side", [20, 23])
def test_ten_crop_mirror_pairs(side):
    crops = view_crops(noise(40, 31), TokensConfig(image_size=16, views="ten_crop", crop_range=side / 16))
    for mirror, original in [(5, 1), (6, 0), (7, 3), (8, 2)]:
        assert crops[mirror] == ImageOps.mirror(crops[original])
    even_margin = (side - 16) % 2 == 0
    assert (crops[9] == ImageOps.mirror(crops[4])) == even_margin


@pytest.mark.parametrize("size", [(30, 41), (41, 30), (16, 16), (7, 90)])
def test_resize_crop_is_the_centre_of_the_resized_image_and_crops_inside_it(size):
    config = TokensConfig(image_size=16, views="resize_crop", crop_range=1.125, views_per_image=40)
    image = noise(*size)
    resized = resize_shorter(image, 18)
    assert min(resized.size) == 18
    assert abs(resized.width / resized.height - size[0] / size[1]) < 0.06 * max(size) / min(size)
    crops = view_crops(image, config, "cat/a")
    left, top = round((resized.width - 16) / 2), round((resized.height - 16) / 2)
    assert crops[0] == resized.crop((left, top, left + 16, top + 16))
    whole, found = np.asarray(resized), set()
    windows = np.lib.stride_tricks.sliding_window_view(whole, (16, 16, 3))[:, :, 0]
    for crop in crops:
        (place,) = np.argwhere((windows == np.asarray(crop)).all((2, 3, 4))).tolist()
        found.add(tuple(place))
    assert len(found) >= 8, "the crops lie in different places"


def test_crops_of_an_image_depend_on_its_id_alone():
    image = noise(40, 31)
    one, more = (
        TokensConfig(image_size=16, views="resize_crop", crop_range=1.5, views_per_image=count) for count in (2, 5)
    )
    assert view_crops(image, more, "a")[:2] == view_crops(image, one, "a"), (
        "more views leave the first ones as they are"
    )
    assert view_crops(image, more, "a") != view_crops(image, more, "b")


def test_centre_views_are_the_adm_crop_and_its_mirror():
    image = noise(30, 41)
    centre, flip = view_crops(image, TokensConfig(image_size=16, views="centre_flip"))
    assert centre == adm_centre_crop(image, 16)
    assert flip == ImageOps.mirror(centre)


def test_to_chw_maps_0_to_minus_1_and_255_to_1_channels_first():
    array = to_chw(rows("RGB", RED, (0, 51, 255)))
    assert array.dtype == np.float32
    assert array.flags.c_contiguous
    assert array.shape == (3, 1, 2)
    np.testing.assert_allclose(array[:, 0, :], [[1, -1], [-1, -0.6], [-1, 1]], atol=1e-6)


def test_the_limit_on_pixels_counts_both_sides(monkeypatch):
    monkeypatch.setattr(transforms, "MAX_PIXELS", 200)
    assert decode_image(encoded(noise(20, 10))).size == (20, 10)
    with pytest.raises(ValueError, match="too large"):
        decode_image(encoded(noise(21, 10)))
