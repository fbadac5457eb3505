"""Reads and writes nothing: every knob of every stage, as frozen dataclasses with their units.

The defaults are the embedded example: scikit-learn's 1,797 real handwritten digits. A recipe file states what
differs (``pipelines/recipes/``). Whatever stands in ``execution`` says how a stage is run, never what it computes,
and enters no digest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from cca_core.cost_config import CostConfig
from cca_core.data_config import STRICT, ConfigError, SourceConfig, TokensConfig, require
from cca_core.evaluate_config import PUBLISHED_INCEPTION, EvaluateConfig, InputRange, check_network
from cca_core.pilot_config import PilotConfig
from cca_core.report_config import ReportConfig
from cca_core.safety_config import SafetyConfig
from cca_core.sweep_config import SweepConfig, numbers

__all__ = [
    "ConfigError",
    "EvaluateConfig",
    "ExecutionConfig",
    "Recipe",
    "SourceConfig",
    "SweepConfig",
    "TokensConfig",
]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and a constant or cosine schedule; decay acts on tensors of two or more dimensions."""

    __pydantic_config__: ClassVar = STRICT
    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    #: Global gradient norm is clipped at this value; 0 switches clipping off.
    clip_norm: float = 1.0
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    #: The cosine ends at this share of ``lr``.
    final_lr_share: float = 0.05


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer: a checkpoint (official file or bundle), or the spec and training of a small one."""

    __pydantic_config__: ClassVar = STRICT
    checkpoint: str = ""
    width: int = 32
    width_multipliers: tuple[int, ...] = (1, 1)
    num_res_blocks: int = 1
    #: LlamaGen: channels of the latents before they become code vectors; 0 is the width of the lowest level.
    latent_channels: int = 0
    codebook_size: int = 64
    codebook_dim: int = 8
    #: VAR: sides of its token grids, coarse to fine; an official file needs them too.
    patch_nums: tuple[int, ...] = ()
    epochs: int = 30
    batch_size: int = 64
    #: Training images are shifted by up to this many pixels: on small images a code would otherwise tell of the whole
    #: image instead of its place, and such tokens are hard to predict.
    max_shift: int = 1
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=3e-3, warmup_steps=30, schedule="cosine", final_lr_share=0.01)
    )

    @property
    def downsample(self) -> int:
        """Pixels per token along one side."""
        return 2 ** (len(self.width_multipliers) - 1)


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """The network whose features carry the distances: a TorchScript file, or the embedded classifier, which is trained
    on the images (its distance is never to be called FID) and says of which class an image is."""

    __pydantic_config__: ClassVar = STRICT
    #: TorchScript file (``cca_core.metrics.network`` says what it takes and gives); empty: the embedded classifier.
    network: str = ""
    #: sha256 of that file: it is code, so another file is refused. FID is called what the published Inception makes.
    sha256: str = ""
    #: Side in pixels to which images are resized before the network (bicubic, antialiased); 0: it takes any size.
    input_size: int = 0
    #: What it takes: ``uint8`` 0..255, ``unit`` 0..1, ``symmetric`` -1..1, ``imagenet`` (mean 0, sd 1 of its pixels).
    input_range: InputRange = "uint8"
    #: The network's logits are those of the data's classes, in their order: class consistency is by them, and no
    #: classifier is trained.
    class_logits: bool = False
    width: int = 32
    feature_dim: int = 64
    epochs: int = 30
    batch_size: int = 128
    #: Training images are shifted by up to this many pixels.
    max_shift: int = 1
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=2e-3,
            betas=(0.9, 0.999),
            weight_decay=0.05,
            warmup_steps=60,
            schedule="cosine",
            final_lr_share=0.001,
        )
    )

    def __post_init__(self) -> None:
        check_network(self.network, self.sha256, self.input_size, self.input_range, self.class_logits)

    @property
    def published(self) -> bool:
        """Whether it is the published Inception: only then is a distance FID."""
        return self.sha256 in PUBLISHED_INCEPTION


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The pretrained model: a checkpoint (official file or bundle), or the spec and training of a small one."""

    __pydantic_config__: ClassVar = STRICT
    checkpoint: str = ""
    #: Which tensors of an official file: ``model``, or ``ema`` where the file has them.
    weights: Literal["model", "ema"] = "model"
    dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    dropout: float = 0.1
    #: Share of rows trained under the null condition, so that guidance works.
    label_dropout: float = 0.1
    epochs: int = 27
    global_batch_size: int = 64
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=2e-3, weight_decay=0.05, warmup_steps=30, schedule="cosine")
    )


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Log-probs of the frozen base: ``cached`` columns written once, or ``online`` from the frozen model in the
    loop."""

    __pydantic_config__: ClassVar = STRICT
    mode: Literal["cached", "online"] = "cached"
    #: The null column is stored for rows whose draw lies below this; every null_share up to it shares one reference.
    null_share_max: float = 0.2


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """The alignment: objective and its weights (paper equation 12 for CCA), epochs, optimiser."""

    __pydantic_config__: ClassVar = STRICT
    objective: Literal["cca", "dpo", "unlearning"] = "cca"
    beta: float = 0.1
    #: Weight of the wrong conditions. ``auto`` follows the training: it starts at 1 and keeps the mean log-ratio of
    #: right conditions at ``log_ratio_target``.
    lambda_: float | Literal["auto"] = 1.5
    #: In nats per token, counted from what dropout makes of it before the first step: the further below 0, the more
    #: likelihood the right conditions may lose to contrast.
    log_ratio_target: float = -0.05
    #: Share of rows trained under the null condition (the official ``uncond_ratio``). ``auto`` starts at half of
    #: ``reference.null_share_max`` and follows the training, up to that, so that the null condition stays as likely as
    #: it was (guidance needs it).
    null_share: float | Literal["auto"] = 0.1
    #: Dropout of the policy; the reference has none. On few images it keeps the alignment from going too far.
    dropout: float = 0.1
    epochs: int = 12
    #: Times that the model is measured on the way, evenly over its steps, against the held-out images. The best
    #: weights win, and training ends after two measurements in a row that found no better ones; 0 trains to the end.
    evaluations: int = 0
    #: Samples of each of them.
    evaluation_samples: int = 1000
    global_batch_size: int = 128
    #: A gradient that is not finite ends the run, or is left out and counted (``skipped_steps``).
    non_finite: Literal["stop", "skip"] = "stop"
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-5))

    def __post_init__(self) -> None:
        require(self.beta > 0, "align.beta must be positive")
        require(self.evaluations >= 0, "align.evaluations must not be negative: 0 trains to the end")
        require(self.evaluation_samples > 0, "align.evaluation_samples must be positive")
        auto = "auto"
        require(self.lambda_ == auto or self.lambda_ >= 0, "align.lambda_ must not be negative")
        require(self.null_share == auto or 0 <= self.null_share < 1, "align.null_share must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class DecideConfig:
    """The gate. Every rule compares means over the sampling seeds; the first that fails is reported with its
    distance."""

    __pydantic_config__: ClassVar = STRICT
    #: Distance of the aligned model, guidance-free, over that of the base, guidance-free.
    max_distance_vs_base: float = 0.7
    #: The same over the base with its best CFG scale.
    max_distance_vs_best_cfg: float = 1.3
    #: Recall of the aligned model over that of the base with its best CFG.
    min_recall_share: float = 0.9
    #: How much class consistency the worst class may lose against the base, guidance-free (absolute).
    max_class_drop: float = 0.1
    #: The base's temperature curve, read at the aligned model's recall, must lie below it in class consistency.
    beat_temperature: bool = True
    #: Distance over that of the present champion, where it was measured on the same real images.
    max_distance_vs_champion: float = 1.05
    #: Votes of people (``cca review``) without which an aligned model that passes all other rules is not promoted: the
    #: run waits for them. 0 asks nobody.
    min_votes: int = 0
    #: With that many votes: the share that prefers the aligned model to the base with its best CFG, an equal counting
    #: half. A little below 0.5, since it costs half of the model calls.
    min_win_rate: float = 0.45

    def __post_init__(self) -> None:
        require(self.min_votes >= 0, "decide.min_votes must not be negative: 0 asks nobody")
        require(0 <= self.min_win_rate <= 1, "decide.min_win_rate is a share of votes: it must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class ExpectConfig:
    """What the files that the recipe names hold, so that a plan needs none of them. It computes nothing and enters no
    digest; a checkpoint that turns out to be another is refused when it is read."""

    __pydantic_config__: ClassVar = STRICT
    #: Official name of the released model in ``base.checkpoint``, such as GPT-L or d16; empty: anything.
    model: str = ""
    #: Official name of the released tokenizer in ``tokenizer.checkpoint``: VQ-16, VQ-8 or vae_ch160v4096z32.
    tokenizer: str = ""
    #: Images of the source, for as long as they cannot be counted; 0: unknown.
    images: int = 0

    def __post_init__(self) -> None:
        require(self.images >= 0, "expect.images must not be negative: 0 is an unknown number")


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How stages are run. Changing any of it changes no result beyond rounding, and retrains nothing."""

    __pydantic_config__: ClassVar = STRICT
    device: Literal["auto", "cpu", "cuda"] = "auto"
    #: Ray Data actors that run a network: the encoder in tokens, the models in reference and evaluation. With GPUs, as
    #: many as there are.
    num_actors: int = 2
    #: Ray Data actors that read and decode images, one CPU each.
    num_readers: int = 2
    #: Ray Train workers of base and alignment; [min, max] takes as many as the cluster has room for, and follows it.
    num_workers: int | tuple[int, int] = 2
    #: Images per forward pass on one worker; memory grows with it.
    micro_batch_size: int = 32
    #: How training is spread over workers: a whole copy of the model on each (ddp), or its state in shards (fsdp2).
    sharding: Literal["ddp", "fsdp2"] = "ddp"
    #: Compile the blocks of the model in training; costs a minute at the start, and a C++ compiler where they run.
    compile: bool = False
    #: Compute activations again in the backward pass: a third more work, far less memory.
    activation_checkpointing: bool = False
    checkpoint_every_steps: int = 100
    log_every_steps: int = 5
    #: A stage that takes longer than this is ended and reported, in seconds.
    stage_timeout_s: float = 24 * 3600.0
    #: Attempts after an infrastructure error (a lost node, a dropped connection).
    max_retries: int = 2

    def __post_init__(self) -> None:
        require(
            min(self.num_actors, self.num_readers, self.min_workers) > 0,
            "execution.num_actors, num_readers and num_workers must be positive",
        )
        require(
            self.min_workers <= self.max_workers,
            f"execution.num_workers=[{self.min_workers}, {self.max_workers}] is the smallest and the largest number: "
            "turn them round",
        )
        require(self.micro_batch_size > 0, "execution.micro_batch_size must be positive")

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, from images to a served champion."""

    __pydantic_config__: ClassVar = STRICT
    name: str = "digits"
    #: Model family of the tokenizer and the model: ``llamagen`` or ``var``.
    family: str = "llamagen"
    #: ``pilot``: first on a share of the images, with a go or no-go at the end; ``full``: all of them, once the pilot
    #: of this recipe has passed; empty: all of them, without a pilot.
    profile: Literal["", "pilot", "full"] = ""
    seed: int = 0
    #: What the model computes in while it is trained and scored; weights, updates and log-probs are float32 in both.
    #: bfloat16 is what GPUs are fast in.
    precision: Literal["float32", "bfloat16"] = "float32"
    source: SourceConfig = field(default_factory=SourceConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    decide: DecideConfig = field(default_factory=DecideConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    pilot: PilotConfig = field(default_factory=PilotConfig)
    expect: ExpectConfig = field(default_factory=ExpectConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)

    def __post_init__(self) -> None:
        require(
            self.tokens.image_size % self.tokenizer.downsample == 0 or bool(self.tokenizer.checkpoint),
            f"tokens.image_size={self.tokens.image_size} is no multiple of the tokenizer's "
            f"{self.tokenizer.downsample} pixels per token",
        )
        require(
            self.source.kind != "codes" or bool(self.tokenizer.checkpoint),
            "source.kind=codes has no images to train a tokenizer on: set tokenizer.checkpoint to the one that made "
            "the codes",
        )
        for name, key, checkpoint in (
            (self.expect.model, "expect.model", self.base.checkpoint),
            (self.expect.tokenizer, "expect.tokenizer", self.tokenizer.checkpoint),
        ):
            require(
                not name or bool(checkpoint),
                f"{key}={name} names a released file, but the recipe trains its own: name the checkpoint too, or "
                f"remove {key}",
            )
        require(
            not self.evaluate.real_statistics or bool(self.features.network),
            "evaluate.real_statistics are of some published feature network: name it in features.network",
        )
        require(
            self.align.null_share == "auto" or self.align.null_share <= self.reference.null_share_max,
            f"align.null_share={self.align.null_share} exceeds "
            f"reference.null_share_max={self.reference.null_share_max}, "
            "so the reference would lack rows: raise reference.null_share_max",
        )
        if self.sweep.enabled:
            largest = max(numbers(self.sweep.null_shares), default=0.0)
            require(
                largest <= self.reference.null_share_max,
                f"sweep.null_shares has {largest}, above "
                f"reference.null_share_max={self.reference.null_share_max}, so the reference would lack rows: raise "
                "reference.null_share_max",
            )
            require(
                self.sweep.epochs <= self.align.epochs,
                f"sweep.epochs={self.sweep.epochs} exceeds align.epochs={self.align.epochs}, whose reference the "
                "trials read: lower it, or leave it at 0 for as many",
            )
