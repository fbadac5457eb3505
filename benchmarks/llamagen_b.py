"""Reads nothing; writes random checkpoints and stage directories below --dir: does LlamaGen-B fit on this machine?

    python benchmarks/llamagen_b.py --dir DIR

Official files of LlamaGen-B (111 M parameters, vocabulary 16384) and VQ-16 with random weights go through tokens (256
tokens per image) -> reference -> 3 alignment steps -> 4 samples. Prints seconds and peak memory of each part.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cca_core.config import Recipe
from cca_core.generate import Sampling, decode_images, generate
from cca_core.models import family, load_model, load_tokenizer
from cca_core.models.llamagen.network import LlamaGenSpec, default_ffn_dim
from cca_core.models.llamagen.tokenizer import VQSpec
from cca_core.parse import from_dict
from cca_core.stages import Context, LocalExecutor, plan, run_stage
from cca_core.stages.inputs import input_digests
from cca_core.store import Store

STEPS, BATCH, SAMPLES = 3, 4, 4
#: The embedded digits, enlarged to 256 pixels; so many that training sees three batches.
IMAGES = 14


def write_checkpoints(directory: Path) -> None:
    """c2i_B_256.pt and vq_ds16_c2i.pt with random weights, in the official layout."""
    llamagen = family("llamagen")
    torch.manual_seed(0)
    model = llamagen.build_model(
        LlamaGenSpec(
            vocab_size=16384,
            num_tokens=256,
            num_classes=10,
            dim=768,
            num_layers=12,
            num_heads=12,
            num_kv_heads=12,
            ffn_dim=default_ffn_dim(768),
        )
    )
    model.init_weights(torch.Generator().manual_seed(0))
    # Official training starts at zero, where every token is as likely and the alignment would stand still.
    torch.nn.init.normal_(model.output.weight, std=0.02)
    tokenizer = llamagen.build_tokenizer(
        VQSpec(
            width=128,
            width_multipliers=(1, 1, 2, 2, 4),
            num_res_blocks=2,
            latent_channels=256,
            codebook_size=16384,
            codebook_dim=8,
        )
    )
    torch.save(llamagen.official_model(model), directory / "c2i_B_256.pt")
    torch.save(llamagen.official_tokenizer(tokenizer), directory / "vq_ds16_c2i.pt")


def recipe_for(directory: Path) -> Recipe:
    return from_dict(
        Recipe,
        {
            "name": "llamagen-b-random",
            "source": {"limit": IMAGES},
            "tokens": {"image_size": 256, "batch_size": 4},
            "tokenizer": {"checkpoint": str(directory / "vq_ds16_c2i.pt")},
            "base": {"checkpoint": str(directory / "c2i_B_256.pt")},
            "align": {"epochs": 1, "global_batch_size": BATCH, "beta": 0.02, "lambda_": 1000.0, "optim": {"lr": 1e-5}},
            "execution": {"micro_batch_size": 2, "log_every_steps": 1, "num_actors": 1, "num_workers": 1},
        },
    )


def run_part(directory: str, part: str) -> dict[str, Any]:
    """One part, in the process that calls it: what it says, its seconds, and the peak memory of the process."""
    root = Path(directory)
    recipe, started = recipe_for(root), time.perf_counter()
    said: dict[str, Any] = {}
    if part == "checkpoints":
        write_checkpoints(root)
    else:
        digests = plan(recipe, input_digests(recipe))
        executor = LocalExecutor(on_log=lambda record: said.update(record), on_progress=lambda *_: None)
        context = Context(recipe, Store(str(root / "storage")), digests, executor)
        if part == "samples":
            uri = context.directory("align").uri
            tokens = generate(load_model(uri), torch.arange(SAMPLES), Sampling(), torch.arange(SAMPLES), batch_size=4)
            images = decode_images(load_tokenizer(uri), tokens, batch_size=4)
            said = {"images": list(images.shape)}
        else:
            said |= {"rows": run_stage(part, context).rows}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    return {"part": part, "seconds": time.perf_counter() - started, "peak_gib": peak, "said": said}


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a process of its own, so that its peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--dir", required=True, help="empty directory for 0.8 GB of checkpoints and 2 GB of stages")
    arguments = parser.parse_args()
    root = Path(arguments.dir)
    root.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(
        f"LlamaGen-B, 256 tokens, vocabulary 16384, random weights, {IMAGES} images, float32.\n"
        f"`python {' '.join(sys.argv[:2])} DIR`, commit {commit}, {platform.machine()}, {os.cpu_count()} CPU cores.\n"
    )
    print("| part | seconds | peak memory (GiB) | said |\n| --- | ---: | ---: | --- |")
    steps = 0
    for part in ("checkpoints", "tokenizer", "tokens", "base", "reference", "align", "samples"):
        found = alone(run_part, str(root), part)
        steps = int(found["said"].get("step", steps))
        said = json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in found["said"].items()})
        print(f"| {part} | {found['seconds']:.1f} | {found['peak_gib']:.2f} | {said} |", flush=True)
    print(f"\n{steps} alignment steps of {BATCH} images ({2 * BATCH} rows), {SAMPLES} samples.")
    return 0 if steps == STEPS else 1


if __name__ == "__main__":
    sys.exit(main())
