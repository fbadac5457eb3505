"""Reads nothing; writes JPEG files and stage directories below --dir, and a table: does the tokens stage keep up?

    python benchmarks/tokenize_stage.py --dir DIR > benchmarks/results/tokenize_stage_2cpu.md

Three questions, each on Ray as `cca run` asks them: images/s of the whole stage over the bare encoder (VQ-16, 256 px,
random weights) in one process at its best batch size; peak memory of all processes for 1,000 and 20,000 images with a
small encoder; images/s with one reader and with two where decoding large JPEGs is the work. Seconds of a stage are from
its call to its manifest: actors start, data tests and pictures are in them.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from cca_core.bundle import BundleInfo, Part, bundle_files
from cca_core.config import Recipe
from cca_core.models import family
from cca_core.models.llamagen.tokenizer import VQSpec
from cca_core.parse import from_dict
from cca_core.stages import Context, plan, run_stage
from cca_core.stages.inputs import input_digests
from cca_core.store import Store
from pipelines.ray_executor import RayExecutor
from pipelines.settings import quiet_libraries

BATCH_SIZES = (1, 2, 4, 8)
#: Distinct pictures; files beyond them are links, since only their number matters.
PICTURES = 40
VQ16 = VQSpec(
    width=128,
    width_multipliers=(1, 1, 2, 2, 4),
    num_res_blocks=2,
    latent_channels=256,
    codebook_size=16384,
    codebook_dim=8,
)
SMALL = VQSpec(
    width=32, width_multipliers=(1, 1, 1), num_res_blocks=1, latent_channels=32, codebook_size=64, codebook_dim=8
)


def write_images(folder: Path, count: int, width: int, height: int) -> Path:
    """``count`` JPEG files in two class folders: smooth noise, so that they compress as photographs do."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(min(count, PICTURES)):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
        out = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
        pictures.append(out.getvalue())
    for number in range(count):
        path = folder / ("even", "odd")[number % 2] / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        first = folder / ("even", "odd")[number % PICTURES % 2] / f"{number % PICTURES:06d}.jpg"
        if number < PICTURES:
            path.write_bytes(pictures[number])
        else:
            os.link(first, path)
    return folder


def write_tokenizer(folder: Path, spec: VQSpec) -> str:
    torch.manual_seed(0)
    tokenizer = family("llamagen").build_tokenizer(spec)
    info = BundleInfo(model=None, tokenizer=Part("llamagen", vars(spec)), image_size=256)
    folder.mkdir(parents=True)
    for name, data in bundle_files(info, None, tokenizer.state_dict()).items():
        (folder / name).write_bytes(data)
    return str(folder)


class PeakMemory:
    """The largest sum, over this process and all below it, of memory that is not counted twice (PSS), in GiB."""

    def __enter__(self) -> PeakMemory:
        self.peak, self.ended = 0.0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _watch(self) -> None:
        here = psutil.Process()
        while not self.ended.wait(1.0):
            total = 0
            for process in (here, *here.children(recursive=True)):
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            self.peak = max(self.peak, total / 2**30)


def stage(root: Path, images: Path, tokenizer: str, image_size: int, batch_size: int, **execution: int) -> dict:
    """Run the tokens stage on Ray; its seconds, images and the peak memory of all processes."""
    recipe = from_dict(
        Recipe,
        {
            "source": {"kind": "folder", "uri": str(images)},
            "tokens": {"image_size": image_size, "batch_size": batch_size},
            "tokenizer": {"checkpoint": tokenizer},
            "execution": execution,
        },
    )
    store = Store(str(root))
    executor = RayExecutor(store, recipe.execution, "", lambda record: None, lambda done, total: None)
    context = Context(recipe, store, plan(recipe, input_digests(recipe, store)), executor)
    executor.start()
    try:
        run_stage("tokenizer", context)
        with PeakMemory() as memory:
            started = time.perf_counter()
            facts = run_stage("tokens", context).facts
            seconds = time.perf_counter() - started
    finally:
        executor.stop()
    return {"images": facts["num_images"], "seconds": seconds, "peak": memory.peak}


@torch.inference_mode()
def bare_encoder(spec: VQSpec, image_size: int, images: int) -> tuple[float, int]:
    """Images/s of the encoder alone on all cores, and the batch size at which it is fastest."""
    torch.manual_seed(0)
    tokenizer = family("llamagen").build_tokenizer(spec).eval()
    best = (0.0, 0)
    for batch_size in BATCH_SIZES:
        pixels = torch.rand(batch_size, 3, image_size, image_size) * 2 - 1
        tokenizer.encode(pixels)
        started = time.perf_counter()
        for _ in range(-(-images // batch_size)):
            tokenizer.encode(pixels)
        rate = -(-images // batch_size) * batch_size / (time.perf_counter() - started)
        best = max(best, (rate, batch_size))
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--dir", required=True, help="empty directory for 2 GB of files")
    root = Path(parser.parse_args().dir)
    quiet_libraries()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(
        f"`python benchmarks/tokenize_stage.py --dir DIR`, commit {commit}, {platform.machine()}, {os.cpu_count()} CPU "
        "cores.\n\n| what | value | goal |\n| --- | ---: | ---: |"
    )
    held = []

    def row(what: str, value: str, goal: str = "", holds: bool = True) -> None:
        held.append(holds)
        print(f"| {what} | {value} | {goal} |", flush=True)

    images = write_images(root / "photos", 200, 320, 256)
    bare, batch_size = bare_encoder(VQ16, 256, 24)
    row("bare VQ-16 encoder, 256 px, images/s", f"{bare:.3f} (batch {batch_size}, best of {BATCH_SIZES})")
    vq16 = write_tokenizer(root / "vq16", VQ16)
    found = stage(root / "a", images, vq16, 256, batch_size)
    bare_again, _ = bare_encoder(VQ16, 256, 24)
    rate = found["images"] / found["seconds"]
    row("tokens stage, 200 images, images/s", f"{rate:.3f}")
    share = rate / ((bare + bare_again) / 2)
    row("stage over bare encoder (before and after)", f"{share:.2f}", ">= 0.9", share >= 0.9)

    small, peaks = write_tokenizer(root / "small", SMALL), []
    for count in (1000, 20000):
        found = stage(root / f"m{count}", write_images(root / f"i{count}", count, 320, 256), small, 64, 64)
        peaks.append(found["peak"])
        row(f"{count} images, small encoder: peak memory, GiB", f"{found['peak']:.2f}, {found['seconds']:.0f} s")
    growth = peaks[1] / peaks[0]
    row("peak memory, 20,000 images over 1,000", f"{growth:.2f}", "<= 1.15", growth <= 1.15)

    large, rates = write_images(root / "large", 400, 3000, 2000), []
    for readers in (1, 2):
        found = stage(root / f"r{readers}", large, small, 64, 16, num_readers=readers, num_actors=1)
        rates.append(found["images"] / found["seconds"])
        row(f"400 JPEGs of 3000 x 2000, {readers} reader(s), images/s", f"{rates[-1]:.1f}")
    row("two readers over one", f"{rates[1] / rates[0]:.2f}", "> 1", rates[1] > rates[0])
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
