"""Reads nothing, writes nothing: what is measured against what, which network makes FID, how its file is pinned."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from cca_core.data_config import STRICT, require

#: sha256 of files of the network that defines FID -> what they are. A name in a recipe could be wrong, a hash cannot:
#: another export of the same network, or one that was edited, makes a Frechet distance that is not called FID.
PUBLISHED_INCEPTION = {
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4": "NVIDIA's TorchScript of inception-2015-12-05",
}


#: What a TorchScript network takes: 0..255, 0..1, -1..1, or mean 0 and sd 1 of ImageNet's pixels.
InputRange = Literal["uint8", "unit", "symmetric", "imagenet"]


def check_pinned(uri: str, sha256: str, input_size: int, *, key: str, prefix: str) -> None:
    """Refuse a TorchScript file that is not pinned. ``key`` is the recipe's of its address, ``prefix`` what its
    settings begin with."""
    require(
        bool(uri) == bool(sha256),
        f"{key} and {prefix}sha256 belong together: a TorchScript file is code, so it is pinned (sha256sum FILE tells)",
    )
    require(
        not sha256 or re.fullmatch("[0-9a-f]{64}", sha256) is not None,
        f"{prefix}sha256={sha256} is no sha256: 64 lower-case hexadecimal digits",
    )
    require(input_size >= 0, f"{prefix}input_size must not be negative: 0 resizes nothing")


def check_network(network: str, sha256: str, input_size: int, input_range: str, class_logits: bool) -> None:
    """Refuse a feature network that is not pinned, or settings that need one."""
    check_pinned(network, sha256, input_size, key="features.network", prefix="features.")
    require(
        bool(network) or not (input_size or class_logits or input_range != "uint8"),
        "features.input_size, input_range and class_logits are of features.network: name it, or leave them out",
    )
    require(
        sha256 not in PUBLISHED_INCEPTION or (input_size == 0 and input_range == "uint8" and not class_logits),
        "the published Inception takes uint8 images, resizes them itself and has classes of its own: leave "
        "features.input_size at 0, input_range at uint8 and class_logits at false",
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Which samplers are measured, on how many samples, against which real images."""

    __pydantic_config__: ClassVar = STRICT
    #: Samples per sampler and seed, classes in turn.
    num_samples: int = 2000
    seeds: tuple[int, ...] = (0, 1, 2)
    cfg_scales: tuple[float, ...] = (1.25, 1.5, 2.0, 3.0)
    temperatures: tuple[float, ...] = (0.9, 0.8, 0.7)
    #: Temperatures of the aligned model beside 1.0.
    aligned_temperatures: tuple[float, ...] = (0.9, 1.1)
    #: Which images are the real set: ``all``, or the ``held_out`` ones where there are enough for a covariance.
    real: Literal["all", "held_out"] = "all"
    #: .npz of published real statistics (mu, sigma, and mu_s, sigma_s for the spatial distance) or images (arr_0), as
    #: the ADM reference batches have them, in the features of ``features.network``; they replace ``real``. From
    #: statistics alone come Frechet distances only: precision, recall, density, coverage and the kernel distance need
    #: real images. Empty: own images.
    real_statistics: str = ""
    #: Fixed padded batch shape of sampling and decoding.
    batch_size: int = 250
    #: Neighbour of precision and recall.
    neighbour: int = 3
    #: Images per timed run of the cost table.
    cost_images: int = 500

    def __post_init__(self) -> None:
        require(bool(self.seeds), "evaluate.seeds needs at least one seed")
        require(
            all(scale > 1 for scale in self.cfg_scales),
            "evaluate.cfg_scales are above 1: 1 means no guidance and is always measured",
        )
        require(bool(self.cfg_scales), "evaluate.cfg_scales needs at least one scale to compare with")

    @property
    def real_set(self) -> str:
        """Which real set the samples are measured against: all, held_out or imported."""
        return "imported" if self.real_statistics else self.real
