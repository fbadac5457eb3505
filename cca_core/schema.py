"""Reads and writes nothing: the Arrow schemas of every data set a stage writes (design section 3.1)."""

from __future__ import annotations

import pyarrow as pa

#: Rows of one Arrow record batch inside a shard; fixed, so that equal rows give equal bytes.
RECORD_BATCH_ROWS = 1024

CONDITIONS = pa.schema([pa.field("index", pa.int32(), nullable=False), pa.field("name", pa.string(), nullable=False)])

QUARANTINE = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
    ]
)

#: What came in: one row per image of tokens/, in their order, as the file had it before any crop.
IMAGES = pa.schema(
    [
        pa.field("format", pa.string(), nullable=False),
        pa.field("mode", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
    ]
)

#: What the decoding pool says of each row of a part of the listing.
FOUND = pa.schema([*QUARANTINE, pa.field("label", pa.int32(), nullable=False), *IMAGES])

#: One row per image, in the order of the images; nulls for held-out rows, which alignment never reads.
REFERENCE = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("view", pa.uint8(), nullable=False),
        pa.field("cond_neg", pa.int32(), nullable=False),
        pa.field("ref_logp_pos", pa.float32()),
        pa.field("ref_logp_neg", pa.float32()),
        pa.field("ref_logp_null", pa.float32()),
    ]
)

#: What the content filter says of samples; ``label`` is the condition that the sample was drawn for.
SCORES = pa.schema([pa.field("label", pa.int32(), nullable=False), pa.field("score", pa.float32(), nullable=False)])


def token_dtype(codebook_size: int) -> pa.DataType:
    """uint16 unless the codebook is larger."""
    return pa.uint16() if codebook_size <= 1 << 16 else pa.uint32()


def tokens_schema(num_tokens: int, codebook_size: int) -> pa.Schema:
    """The token data set: one row per (image, view), sorted by both."""
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("view", pa.uint8(), nullable=False),
            pa.field("label", pa.int32(), nullable=False),
            pa.field("held_out", pa.bool_(), nullable=False),
            pa.field("tokens", pa.list_(token_dtype(codebook_size), num_tokens), nullable=False),
        ]
    )


def features_schema(dims: dict[str, int]) -> pa.Schema:
    """What a feature network says of images, real or sampled; ``label`` is the condition the image was drawn for.

    ``dims`` has the columns beside it and their widths: features and logits (of the data's classes); score_logits (of
    the inception score) and spatial where the network makes them.
    """
    columns = [pa.field(name, pa.list_(pa.float32(), dim), nullable=False) for name, dim in dims.items()]
    return pa.schema([pa.field("label", pa.int32(), nullable=False), *columns])
