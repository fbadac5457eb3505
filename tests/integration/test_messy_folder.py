"""Writes to temporary folders: `cca run` on 2,000 images of which 60 are broken, in ten ways."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest
from PIL import Image

from tests.driver import TINY, cca, manifests

IMAGES, PER_WAY = 2000, 6


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), "PNG")


def encoded(image: Image.Image, fmt: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, fmt, **options)
    return out.getvalue()


def bomb() -> bytes:
    """A PNG of some bytes that declares 60,000 x 60,000 pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


RED, BLUE = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
#: Way -> (where the file goes, its bytes, what quarantine/ says).
WAYS: dict[str, tuple[Callable[[int], str], Callable[[int], bytes], str]] = {
    "truncated": (lambda i: f"cat/bad-{i}.png", lambda i: png(i)[:120], "cannot decode this PNG image"),
    "zero bytes": (lambda i: f"cat/empty-{i}.jpg", lambda i: b"", "the file is empty"),
    "no image": (lambda i: f"dog/page-{i}.jpg", lambda i: b"<html>404</html>", "not an image in a known format"),
    "bomb": (lambda i: f"dog/bomb-{i}.png", lambda i: bomb(), "image too large"),
    "CMYK": (lambda i: f"cat/print-{i}.jpg", lambda i: encoded(RED.convert("CMYK"), "JPEG"), "CMYK"),
    "animated": (
        lambda i: f"cat/moves-{i}.gif",
        lambda i: encoded(RED, "GIF", save_all=True, append_images=[BLUE]),
        "animated, or of several pages (2 frames)",
    ),
    "float": (lambda i: f"dog/float-{i}.tif", lambda i: encoded(Image.new("F", (8, 8)), "TIFF"), "floating-point"),
    "narrow": (
        lambda i: f"dog/strip-{i}.png",
        lambda i: encoded(Image.new("L", (1, 1100000)), "PNG"),
        "image too narrow",
    ),
    "wrong label": (lambda i: f"loose-{i}.png", png, "no label: it lies in no class folder"),
    # Beside cat/0000.png and so on.
    "duplicate id": (lambda i: f"cat/{2 * i:04d}.webp", lambda i: encoded(BLUE, "WEBP"), "duplicate id"),
}
SETTINGS = ["tokens.rows_per_shard=300", "tokenizer.epochs=1", "source.kind=folder", "source.uri=images"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("messy")
    for name in ("cat", "dog"):
        (root / "images" / name).mkdir(parents=True)
    for i in range(IMAGES - PER_WAY * len(WAYS)):
        (root / "images" / ("dog" if i % 2 else "cat") / f"{i:04d}.png").write_bytes(png(i))
    for where, content, _ in WAYS.values():
        for i in range(PER_WAY):
            (root / "images" / where(i)).write_bytes(content(i))
    return root


def run(folder: Path, stage: str, *settings: str):
    chosen = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
    return cca(folder, "run", str(TINY), *chosen, "--only", stage)


@pytest.fixture(scope="module")
def tokenized(folder):
    for stage in ("tokenizer", "tokens"):
        result = run(folder, stage)
        assert result.returncode == 0, result.stdout + result.stderr
    return manifests(folder), result.stdout


def test_every_good_image_becomes_tokens_and_every_bad_one_is_named_with_its_reason(folder, tokenized):
    found, output = tokenized
    facts = found["tokens"].facts
    assert (facts["num_images"], facts["quarantined"]) == (1940, 60)
    bad = folder / ".cca" / "storage" / "quarantine" / found["quarantine"].digest
    rows = ds.dataset(str(bad), format="ipc").to_table().to_pylist()
    reasons = {row["uri"].rpartition("/images/")[2]: row["error"] for row in rows}
    assert len(reasons) == 60
    for where, _, reason in WAYS.values():
        for i in range(PER_WAY):
            assert reason in reasons[where(i)], where(i)
    assert "60 images cannot be read and are left out" in output


def test_more_bad_images_than_allowed_end_the_run_and_leave_nothing_half_written(folder, tokenized):
    before = {stage: manifest.digest for stage, manifest in tokenized[0].items()}
    result = run(folder, "tokens", "source.max_bad_fraction=0.01", "tokens.rows_per_shard=250")
    assert result.returncode == 2
    assert "more than source.max_bad_fraction=0.01 allows" in result.stderr
    assert "repair or remove them, or raise source.max_bad_fraction" in result.stderr
    assert {stage: manifest.digest for stage, manifest in manifests(folder).items()} == before
    storage = folder / ".cca" / "storage"
    begun = [path for path in (storage / "tokens").iterdir() if path.name != before["tokens"]]
    for directory in begun:
        for shard in directory.glob("rows-*"):
            assert ds.dataset(str(shard), format="ipc").count_rows() > 0, "what is there is whole"
            siblings = [storage / sibling / directory.name / shard.name for sibling in ("images", "quarantine")]
            assert all(path.exists() for path in siblings)
    assert not list(storage.rglob(".*-*")), "no file was left aside"
    again = run(folder, "tokens", "tokens.rows_per_shard=250")
    assert again.returncode == 0, "raising the limit goes on"
