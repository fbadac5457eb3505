"""Reads pixels, writes image files: PNG, WebP or JPEG, whose metadata says that a model drew them, and how."""

from __future__ import annotations

import io
import json
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
from PIL import Image, PngImagePlugin

SOURCE = "AI-generated"
#: EXIF's fields for a text of what is seen and for what made it.
IMAGE_DESCRIPTION, SOFTWARE = 0x010E, 0x0131
#: DigitalSourceType is IPTC's word for images that a model drew, which content-credential readers look for.
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    'xmlns:cca="urn:cca:origin" '
    'Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"{origin}/>'
    "</rdf:RDF></x:xmpmeta>"
)


def picture(
    pixels_HW3: np.ndarray,
    *,
    enlarge: int,
    file_format: str,
    compression: int | None,
    model: str,
    name: str,
    seed: int,
    sampling: dict[str, Any],
) -> bytes:
    """The image as a file.

    Args:
        file_format: png, webp or jpeg.
        compression: quality of webp and jpeg, 0 to 100; without one, webp keeps every pixel and jpeg takes 95.
    """
    drawn_by = {"model": model, "class": name, "seed": str(seed), "sampling": json.dumps(sampling, sort_keys=True)}
    xmp = _xmp(drawn_by)
    out = io.BytesIO()
    image = Image.fromarray(pixels_HW3.repeat(enlarge, 0).repeat(enlarge, 1))
    if file_format == "png":
        image.save(out, format="PNG", pnginfo=_png_text(drawn_by, xmp))
    elif file_format == "webp":
        quality = {"lossless": True} if compression is None else {"quality": compression}
        image.save(out, format="WEBP", exif=_exif(drawn_by), xmp=xmp.encode(), **quality)
    else:
        # Colour at full resolution: a small image would lose most of it.
        quality = {"quality": 95 if compression is None else compression, "subsampling": 0}
        image.save(out, format="JPEG", exif=_exif(drawn_by), xmp=xmp.encode(), **quality)
    return out.getvalue()


def _xmp(drawn_by: dict[str, str]) -> str:
    # XML has no escape for most control characters, and a class may be named by a folder.
    said = {key: "".join(c if c.isprintable() else "?" for c in value) for key, value in drawn_by.items()}
    return XMP.format(origin="".join(f" cca:{key}={quoteattr(value)}" for key, value in said.items()))


def _png_text(drawn_by: dict[str, str], xmp: str) -> PngImagePlugin.PngInfo:
    text = PngImagePlugin.PngInfo()
    for key, value in (
        ("Source", SOURCE),
        ("Software", drawn_by["model"]),
        ("Title", drawn_by["class"]),
        ("cca.seed", drawn_by["seed"]),
        ("cca.sampling", drawn_by["sampling"]),
        ("XML:com.adobe.xmp", xmp),
    ):
        text.add_itxt(key, value)
    return text


def _exif(drawn_by: dict[str, str]) -> Image.Exif:
    """EXIF is ASCII: it has the short form, XMP the rest."""
    exif = Image.Exif()
    exif[IMAGE_DESCRIPTION] = SOURCE
    exif[SOFTWARE] = drawn_by["model"]
    return exif
