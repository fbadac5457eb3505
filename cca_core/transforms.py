"""Reads encoded image bytes; makes RGB images, their deterministic crops and [-1, 1] arrays. Writes nothing.

The crops are those of the official extractions (ADM centre crop, flip, ten-crop; VAR's resize and crop), so that equal
bytes give equal pixels.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

from cca_core import pairs
from cca_core.config import TokensConfig

#: Larger images are refused, before they are decoded and after they are resized: 8192 x 8192.
MAX_PIXELS = 1 << 26

#: What ``decode_image`` accepts. Pillow's other readers are left out on purpose: EPS, for one, runs Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")

WHITE = (255, 255, 255, 255)


def decode_image(data: bytes) -> Image.Image:
    """The image as RGB, upright, transparency over white.

    Raises ValueError, with a short reason, for whatever is not one whole still image with known colours.
    """
    return to_rgb(open_image(data))


def open_image(data: bytes) -> Image.Image:
    """The image as the file has it, its pixels not decoded yet; raises as ``decode_image``."""
    if not data:
        raise ValueError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"image too large: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"not an image in a known format ({', '.join(FORMATS)})") from error
    except Exception as error:
        raise ValueError(f"unreadable image header: {error}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"image too large: {width} x {height} exceeds {MAX_PIXELS} pixels")
    if image.mode == "CMYK":
        raise ValueError("CMYK, whose colours depend on a profile: convert it to RGB")
    try:
        # A camera's MPO is a still JPEG with a preview beside it.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except Exception as error:
        raise ValueError(f"unreadable image header: {error}") from error
    if frames > 1:
        raise ValueError(f"animated, or of several pages ({frames} frames): keep one")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image as RGB, upright, transparency over white; raises as ``decode_image``."""
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except MemoryError:
        raise  # the machine's fault, not the image's
    except Exception as error:  # damaged data makes Pillow's decoders raise almost anything
        raise ValueError(f"cannot decode this {image.format} image: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _sixteen_to_eight_bits(image).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed white; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, WHITE), rgba).convert("RGB")
    return image.convert("RGB")


def _sixteen_to_eight_bits(image: Image.Image) -> Image.Image:
    """Pillow's own conversion clips at 255, which turns most of a 16-bit image white."""
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("pixel values outside 0..65535; convert it to 8 or 16 bits")
    return Image.fromarray(((pixels * 255 + 32767) // 65535).astype(np.uint8))


def adm_centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square of an RGB image at ``size`` pixels a side, as in ADM; small images are scaled up.

    Raises ValueError for an image so narrow that the resized strip would exceed ``MAX_PIXELS``.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise ValueError(f"image too narrow: {image.width} x {image.height} at {size} pixels")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return _square(image, (width - size) // 2, (height - size) // 2, size)


def resize_shorter(image: Image.Image, side: int) -> Image.Image:
    """The image with its shorter side at ``side`` pixels, as VAR resizes (Lanczos).

    Raises ValueError for an image so narrow that the resized strip would exceed ``MAX_PIXELS``.
    """
    short, long = sorted(image.size)
    other = int(side * long / short)
    if side * other > MAX_PIXELS:
        raise ValueError(f"image too narrow: {image.width} x {image.height} at {side} pixels")
    size = (side, other) if image.width <= image.height else (other, side)
    return image.resize(size, Image.Resampling.LANCZOS)


def view_crops(image: Image.Image, config: TokensConfig, image_id: str = "") -> list[Image.Image]:
    """All views of an RGB image by view index, for the work of one resize.

    ``centre``: 1. ``centre_flip``: the crop and its mirror. ``ten_crop``: the four corners and the centre of a crop of
    side int(image_size * crop_range), then the same five of its mirror. ``resize_crop``: of the image with its shorter
    side at round(image_size * crop_range), the centre, then crops at places drawn from the id and the view.
    """
    size = config.image_size
    if config.views == "centre":
        return [adm_centre_crop(image, size)]
    if config.views == "centre_flip":
        crop = adm_centre_crop(image, size)
        return [crop, ImageOps.mirror(crop)]
    if config.views == "ten_crop":
        crop = adm_centre_crop(image, int(size * config.crop_range))
        return _five_crops(crop, size) + _five_crops(ImageOps.mirror(crop), size)
    resized = resize_shorter(image, round(size * config.crop_range))
    margins = resized.width - size, resized.height - size
    places = [tuple(round(margin / 2) for margin in margins)]
    for view in range(1, config.num_views):
        drawn = pairs.crop_places(image_id, view)
        places.append(tuple(int(place * (margin + 1)) for place, margin in zip(drawn, margins, strict=True)))
    return [_square(resized, left, top, size) for left, top in places]


def _five_crops(image: Image.Image, size: int) -> list[Image.Image]:
    """Top-left, top-right, bottom-left, bottom-right, centre."""
    margin = image.width - size
    # Half to even: for an odd margin the centre of the mirror is not the mirror of the centre.
    centre = round(margin / 2)
    corners = ((0, 0), (margin, 0), (0, margin), (margin, margin), (centre, centre))
    return [_square(image, left, top, size) for left, top in corners]


def _square(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


def to_chw(image: Image.Image) -> np.ndarray:
    """The RGB image as float32 [3, H, W] in [-1, 1]."""
    pixels_CHW = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)
    return np.ascontiguousarray((pixels_CHW / 255 - 0.5) / 0.5)
