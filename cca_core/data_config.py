"""Reads nothing, writes nothing: where images come from and how they become tokens, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

#: Read by pydantic when a recipe is validated at the edge; plain data, so that the core needs no pydantic.
STRICT: dict[str, Any] = {"extra": "forbid"}


class ConfigError(ValueError):
    """A configuration, an input or a store that cannot be used, said in one sentence with the remedy."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the images come from, on local disk, ``s3://`` or any other fsspec URI. ``digits`` needs no ``uri``.

    ``folder`` has one directory per class. ``parquet`` has a column of image bytes (plain, or Hugging Face's
    struct<bytes, path>) and a label column. ``tar`` has WebDataset shards: an image and a ``.cls`` or ``.json`` of the
    same key. ``list`` is a CSV or JSONL file of addresses and labels. ``codes`` has no images but what the official
    LlamaGen extraction made of them, ``<name>_codes/`` and ``<name>_labels/`` with one ``.npy`` per image (or ``uri``
    is the folder of codes itself): nothing is tokenized again, and wherever a real image is needed its reconstruction
    stands in, decoded by the recipe's tokenizer."""

    __pydantic_config__: ClassVar = STRICT
    kind: Literal["digits", "folder", "parquet", "tar", "list", "codes"] = "digits"
    uri: str = ""
    #: Column of image bytes (parquet).
    image_column: str = "image"
    #: Column of addresses, absolute or relative to the file that lists them (list).
    uri_column: str = "uri"
    #: Column (parquet, list) or key in the .json (tar) of the label: an integer, or the name of a class.
    label_column: str = "label"
    #: Column that holds the image id (parquet, list); empty: the path in the image struct or the address, else
    #: file:row. Shards are ranges of sorted ids: for Parquet files whose paths are in random order, ``file:row`` asks
    #: for ids in the order of the rows.
    id_column: str = ""
    #: Names of the classes by index; empty: those in ``class_map``, else those in the data.
    class_names: tuple[str, ...] = ()
    #: JSON file of the classes in order: a list of names, an object {folder or label in the data: name}, or
    #: ImageNet's {"0": ["n01440764", "tench"], ...}.
    class_map: str = ""
    #: Take these classes only, by name or as the data calls them; empty: all. Numbers stay those of ``class_names`` or
    #: ``class_map`` where one is given.
    classes: tuple[str, ...] = ()
    #: Globs over file paths below ``uri`` (images, Parquet files, tar shards; addresses in a list), where * crosses
    #: folders too: take only files that match one; empty: all.
    include: tuple[str, ...] = ()
    #: Leave out files that match one of these.
    exclude: tuple[str, ...] = ()
    #: Take this many images only, drawn by a hash of the id, for a first try; 0 takes all.
    limit: int = 0
    #: Take this share of them only, drawn in the same way.
    fraction: float = 1.0
    #: Share of the images, drawn by a hash of the id, that training never sees.
    held_out_fraction: float = 0.2
    #: More bad images than this share of all end the run.
    max_bad_fraction: float = 0.5

    def __post_init__(self) -> None:
        require(0 < self.held_out_fraction < 1, "source.held_out_fraction must lie between 0 and 1")
        require(self.limit >= 0, "source.limit must not be negative: 0 takes all images")
        require(0 < self.fraction <= 1, "source.fraction must lie above 0 and at most at 1, which takes all images")
        require(0 <= self.max_bad_fraction <= 1, "source.max_bad_fraction must lie in [0, 1]")
        require(
            not (self.class_names and self.class_map),
            "source.class_names and source.class_map both name the classes: remove one",
        )
        kinds = "folder, parquet, tar, list or codes"
        if self.kind == "digits":
            require(not self.uri, f"source.kind=digits reads no uri: remove source.uri, or set source.kind to {kinds}")
        else:
            require(
                bool(self.uri),
                f"source.kind={self.kind} needs source.uri: a folder, a file, or s3://bucket/prefix",
            )


#: Views of an image where their number is not free.
FIXED_VIEWS = {"centre": 1, "centre_flip": 2, "ten_crop": 10}


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """How images become tokens. ``batch_size`` is here and not in ``execution`` because it is the one fixed batch
    shape that makes the tokens independent of the number of workers."""

    __pydantic_config__: ClassVar = STRICT
    #: Side of the square image in pixels.
    image_size: int = 8
    #: ``centre``: ADM centre crop, 1 view. ``centre_flip``: and its mirror, 2. ``ten_crop``: 10 (architectures
    #: section 4). ``resize_crop``: VAR's; the shorter side becomes image_size * crop_range pixels, the first view is
    #: its centre, the others lie where a hash of the image's id puts them.
    views: Literal["centre", "centre_flip", "ten_crop", "resize_crop"] = "centre"
    #: Views of an image; 0: as many as ``views`` has, and 1 for ``resize_crop``, which may have any number.
    views_per_image: int = 0
    #: Side of what is cropped over image_size (ten_crop, resize_crop).
    crop_range: float = 1.1
    #: Images per shard: the unit of work, of retry and of resume.
    rows_per_shard: int = 512
    #: Views that the encoder is given at once; 0: as many as its device has room for.
    batch_size: int = 128

    def __post_init__(self) -> None:
        require(
            self.views_per_image in (0, FIXED_VIEWS.get(self.views, self.views_per_image)),
            f"tokens.views={self.views} has {FIXED_VIEWS.get(self.views)} views: leave tokens.views_per_image at 0, or "
            "set tokens.views=resize_crop",
        )
        require(0 <= self.views_per_image <= 255, "tokens.views_per_image must lie between 0 and 255")
        require(
            self.crop_range >= 1 or self.views not in ("ten_crop", "resize_crop"),
            f"tokens.crop_range={self.crop_range} is below 1: {self.views} crops from a margin",
        )
        require(self.batch_size >= 0, "tokens.batch_size must not be negative: 0 is as many as the device has room for")
        require(self.rows_per_shard > 0, "tokens.rows_per_shard must be positive")

    @property
    def num_views(self) -> int:
        return FIXED_VIEWS.get(self.views) or max(1, self.views_per_image)

    @property
    def centre_view(self) -> int:
        """The view that shows the middle of the image, not mirrored."""
        return 4 if self.views == "ten_crop" else 0
