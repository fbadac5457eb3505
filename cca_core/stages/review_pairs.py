"""Reads the base and the aligned bundle, writes pairs/: two images of the same class and seed, one of each model."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from cca_core.dataset import class_names, classes_with_images
from cca_core.generate import BATCH_SIZE, Sampling, decode_images, generate
from cca_core.manifest import FileEntry, Manifest, stage_digest
from cca_core.models import load_model, load_tokenizer, to_uint8
from cca_core.stages.evaluate import best_cfg, best_evaluated, candidate_samplers, load_results
from cca_core.stages.graph import candidates, rank_of, ranked
from cca_core.stages.run import Context, OnLog
from cca_core.store import StageDirectory, Store
from cca_core.train.distributed import pick_device
from cca_core.workers.ranges import split_range
from cca_core.workers.sample import Sampler, sample_seeds

#: Goes up when the same models would be compared on other images.
CODE_VERSION = 1
#: Sampling seed of the pairs: none of those of an evaluation, whose images the gate has seen already.
PAIRS_SEED = 2_000_003
PAIRS_NAME = "pairs.json"
#: Folder of each side's images in pairs/.
SIDES = ("guided", "aligned")


@dataclass(frozen=True)
class Comparison:
    """What reviewers compare: the base with its best CFG and the aligned model, guidance-free."""

    guided: Sampler
    aligned: Sampler
    #: Digests of the stages that made the two models.
    models: dict[str, str]
    #: Indices and names of the classes that have images, in the order in which pairs take turns.
    classes: tuple[tuple[int, str], ...]

    @property
    def digest(self) -> str:
        """Identity of what is compared, and of the votes on it; the number of pairs does not enter."""
        return stage_digest("votes", CODE_VERSION, self._section, self.models)

    def directory(self, store: Store, num_pairs: int) -> StageDirectory:
        config = {**self._section, "num_pairs": num_pairs}
        return store.directory("pairs", stage_digest("pairs", CODE_VERSION, config, self.models))

    @property
    def _section(self) -> dict[str, Any]:
        return {
            "guided": asdict(self.guided.sampling),
            "aligned": asdict(self.aligned.sampling),
            "seed": PAIRS_SEED,
            "classes": [name for _, name in self.classes],
        }

    def manifest(self, directory: StageDirectory, num_pairs: int, files: dict[str, FileEntry]) -> Manifest:
        return Manifest(
            stage=directory.stage,
            code_version=CODE_VERSION,
            digest=directory.digest,
            config={**self._section, "num_pairs": num_pairs},
            upstream=self.models,
            files=files,
        )


def comparison(context: Context) -> Comparison:
    """The comparison of a finished evaluation: its best CFG, and the candidate that the gate judges."""
    evaluated = {name: load_results(context.directory(name)) for name in candidates(context.recipe, "evaluate")}
    rank = rank_of(best_evaluated(evaluated))
    guided = best_cfg(load_results(context.directory("baseline"))["rows"])
    align, tokens = ranked("align", rank), context.directory("tokens")
    names = class_names(tokens)
    return Comparison(
        guided=Sampler(guided["label"], context.directory("base").uri, Sampling(**guided["sampling"])),
        aligned=candidate_samplers(context, rank)[0],
        models={"base": context.digests["base"], "align": context.digests[align]},
        classes=tuple((index, names[index]) for index in _mixed(classes_with_images(tokens))),
    )


@dataclass(frozen=True)
class Pair:
    """Two images of the same class, drawn with the same seed, as PNG files."""

    class_name: str
    guided: bytes
    aligned: bytes


def draw_pairs(*, on_log: OnLog, compared: Comparison, store: Store, num_pairs: int, device: str) -> None:
    """Write pairs/, in one process. Pair i is the same however many there are."""
    directory = compared.directory(store, num_pairs)
    turns = [compared.classes[i % len(compared.classes)] for i in range(num_pairs)]
    seeds = sample_seeds(PAIRS_SEED, 0, num_pairs)
    files: dict[str, FileEntry] = {}
    ranges = split_range(num_pairs, BATCH_SIZE)
    for side, sampler in zip(SIDES, (compared.guided, compared.aligned), strict=True):
        draw = _drawer(sampler, str(pick_device(device)))
        for start, stop in ranges:
            classes = torch.tensor([index for index, _ in turns[start:stop]])
            for i, pixels in enumerate(draw(classes, seeds[start:stop]), start=start):
                name = pair_file(side, i)
                files[name] = directory.write_bytes(name, _png(pixels))
            on_log({"images": len(files), "share_done": len(files) / (2 * num_pairs)})
    pairs = [
        {"class": index, "class_name": name, "seed": seed}
        for (index, name), seed in zip(turns, seeds.tolist(), strict=True)
    ]
    files[PAIRS_NAME] = directory.write_json(PAIRS_NAME, pairs)
    directory.commit(compared.manifest(directory, num_pairs, files))


def read_pairs(directory: StageDirectory) -> list[Pair]:
    """All pairs of a finished directory, in memory."""
    described = directory.read_json(PAIRS_NAME)
    files = {side: [directory.read_bytes(pair_file(side, i)) for i in range(len(described))] for side in SIDES}
    return [
        Pair(pair["class_name"], guided, aligned)
        for pair, guided, aligned in zip(described, files["guided"], files["aligned"], strict=True)
    ]


def pair_file(side: str, pair: int) -> str:
    return f"{side}/{pair:06d}.png"


def _mixed(classes: Sequence[int]) -> list[int]:
    """Classes in an order of no meaning: fewer pairs than classes are then spread over all of them."""
    return sorted(classes, key=lambda index: hashlib.sha256(str(index).encode()).digest())


def _drawer(sampler: Sampler, device: str) -> Callable[[torch.Tensor, torch.Tensor], np.ndarray]:
    model, tokenizer = (load(sampler.bundle_uri, device=device) for load in (load_model, load_tokenizer))

    def draw(classes: torch.Tensor, seeds: torch.Tensor) -> np.ndarray:
        tokens = generate(model, classes, sampler.sampling, seeds, batch_size=BATCH_SIZE)
        return to_uint8(decode_images(tokenizer, tokens, batch_size=BATCH_SIZE)).numpy()

    return draw


def _png(pixels_HW3: np.ndarray) -> bytes:
    """Lossless, and without a word on where it comes from."""
    out = io.BytesIO()
    Image.fromarray(pixels_HW3).save(out, format="PNG")
    return out.getvalue()
