"""Reads a range of a source's listing (images or recorded codes); makes decoded pixels of it, then tokens. Writes
nothing: the stage gathers the parts of a shard."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from cca_core.config import Recipe
from cca_core.dataset import read_source
from cca_core.generate import pad_rows, padded_batches
from cca_core.models import load_tokenizer
from cca_core.models.load import read_spec
from cca_core.sources import open_source
from cca_core.store import StageDirectory
from cca_core.train.distributed import pick_device
from cca_core.workers.codes import read_codes
from cca_core.workers.decode import found_bytes
from cca_core.workers.ranges import RangeWorker

#: A batch of the encoder where the recipe leaves it to the device.
MAX_BATCH = 256
CPU_BATCH_PIXELS = 1 << 18
GPU_MEMORY_SHARE = 0.5


class EncodePart(RangeWorker):
    """Encodes what ``DecodePart`` made: the tokens int64 [n V, L] in its place."""

    def __init__(self, recipe: Recipe, source: StageDirectory, tokenizer_uri: str, num_threads: int) -> None:
        del source
        self.config = recipe.tokens
        torch.set_num_threads(num_threads)
        self.device = pick_device(recipe.execution.device)
        # On a GPU the encoder runs at half the bytes; nearest codes are searched in float32 either way.
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.tokenizer = load_tokenizer(tokenizer_uri, device=str(self.device), dtype=dtype)
        self.dtype = dtype
        self.batch_size = self.config.batch_size or self._fitting_batch()

    @torch.inference_mode()
    def _fitting_batch(self) -> int:
        """The largest power of two that the device has room for; on a CPU, where more is not faster, a few pixels."""
        side = self.config.image_size
        fitting = CPU_BATCH_PIXELS / side**2
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.tokenizer.encode(torch.zeros(1, 3, side, side, device=self.device, dtype=self.dtype))
            one = torch.cuda.max_memory_allocated(self.device) - before
            fitting = GPU_MEMORY_SHARE * torch.cuda.mem_get_info(self.device)[0] / one
        return 2 ** int(math.log2(min(max(fitting, 1), MAX_BATCH)))

    @torch.inference_mode()
    def run(self, *, start: int, stop: int, found: bytes, pixels: bytes) -> dict[str, Any]:
        """In padded batches of one shape: the same images give the same tokens in any company."""
        side, size, parts = self.config.image_size, self.batch_size, []
        # A copy: torch warns of memory that it may not write to.
        pixels_NCHW = (
            torch.from_numpy(np.frombuffer(pixels, np.uint8).copy()).view(-1, side, side, 3).permute(0, 3, 1, 2)
        )
        for rows in padded_batches(len(pixels_NCHW), size):
            batch = (pad_rows(pixels_NCHW[rows], size).to(self.device).float() / 255 - 0.5) / 0.5
            parts.append(self.tokenizer.encode(batch.to(self.dtype))[: rows.stop - rows.start].cpu().numpy())
        tokens = np.concatenate(parts).tobytes() if parts else b""
        return {"start": start, "stop": stop, "found": found, "tokens": tokens}


class ReadCodesPart(RangeWorker):
    """Takes over recorded codes. Of the tokenizer only the spec is read: no network runs."""

    runs_model = False

    def __init__(self, recipe: Recipe, source: StageDirectory, tokenizer_uri: str, num_threads: int) -> None:
        del num_threads
        self.recipe, self.source = recipe, open_source(recipe.source)
        self.listing, _ = read_source(source)
        self.spec = read_spec(tokenizer_uri, "tokenizer")

    def run(self, *, start: int, stop: int) -> dict[str, Any]:
        side = self.recipe.tokens.image_size
        images = list(
            read_codes(
                self.source,
                self.listing.slice(start, stop - start),
                num_views=self.recipe.tokens.num_views,
                num_tokens=self.spec.num_tokens(side),
                codebook_size=self.spec.codebook_size,
            )
        )
        tokens = b"".join(image.tokens_VL.tobytes() for image in images)
        return {
            "start": start,
            "stop": stop,
            "found": found_bytes(images, [("codes", "", side, side)] * len(images)),
            "tokens": tokens,
        }
