"""Reads folders of images and bundles made here: how large a run will be, and whether its files are what it expects."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pytest

from cca_core.bundle import BundleInfo, Part, bundle_files
from cca_core.config import ConfigError, Recipe
from cca_core.models import family
from cca_core.models.llamagen.official import released_tokenizer_spec
from cca_core.parse import from_dict
from cca_core.schema import REFERENCE, tokens_schema
from cca_core.stages.expected import check_expected, missing_files
from cca_core.stages.graph import plan
from cca_core.stages.inputs import check_checkpoints
from cca_core.stages.sizes import ID_BYTES, plan_sizes, reference_row_bytes, token_row_bytes
from cca_core.store import Store, table_bytes

GPU_BYTES = 80_000_000_000
ROWS = 4096
OFFICIAL = {
    "source": {"kind": "folder", "uri": "nowhere/train"},
    "tokens": {"image_size": 384, "views": "ten_crop"},
    "tokenizer": {"checkpoint": "nowhere/vq_ds16_c2i.pt"},
    "base": {"checkpoint": "nowhere/c2i_B_384.pt"},
    "expect": {"model": "GPT-B", "tokenizer": "VQ-16", "images": 1000},
}


def recipe(**sections: dict) -> Recipe:
    return from_dict(Recipe, sections)


def official(**changes: dict) -> Recipe:
    return recipe(**{name: {**section, **changes.get(name, {})} for name, section in {**OFFICIAL}.items()})


def test_sizes_need_no_file():
    made = official()
    missing = missing_files(made)
    assert set(missing) == {"source.uri", "tokenizer.checkpoint", "base.checkpoint"}
    sizes = plan_sizes(made, gpu_bytes=GPU_BYTES, missing=missing)
    assert (sizes.num_images, sizes.counted, sizes.num_views, sizes.num_tokens) == (1000, False, 10, 576)
    assert (sizes.model_parameters, sizes.tokenizer_parameters) == (110_888_448, 71_883_403)
    assert (sizes.calls_guided, sizes.calls_free) == (1152, 576)
    assert sizes.tokens_bytes == pytest.approx(1000 * 10 * (576 * 2 + ID_BYTES), rel=0.02)
    assert sizes.reference_bytes == round(1000 * made.align.epochs * 25.375)
    assert sizes.decoded_bytes == 1000 * 384 * 384 * 3
    assert sizes.spread.kind == "DDP"


def test_an_unknown_number_of_images_leaves_the_rest():
    sizes = plan_sizes(official(expect={"images": 0}), gpu_bytes=GPU_BYTES, missing=missing_files(official()))
    assert (sizes.num_images, sizes.tokens_bytes, sizes.num_tokens) == (0, 0, 576)


def test_a_limit_holds_for_images_that_are_not_there():
    sizes = plan_sizes(official(source={"limit": 30}), gpu_bytes=GPU_BYTES, missing={"source.uri"})
    assert sizes.num_images == 30


def test_images_that_are_there_are_counted(tmp_path, write_images):
    images = write_images(tmp_path / "images")
    made = official(source={"uri": str(images)})
    assert "source.uri" not in missing_files(made)
    sizes = plan_sizes(made, gpu_bytes=GPU_BYTES, missing=missing_files(made))
    assert (sizes.num_images, sizes.counted) == (40, True)


def test_an_online_reference_costs_a_model_and_no_columns():
    cached, online = (
        plan_sizes(
            replace(official(), reference=replace(Recipe().reference, mode=mode)), gpu_bytes=GPU_BYTES, missing=m
        )
        for m in [missing_files(official())]
        for mode in ("cached", "online")
    )
    assert online.reference_bytes == 0 < cached.reference_bytes
    assert online.spread.memory.total_bytes - cached.spread.memory.total_bytes == 4 * cached.model_parameters


def test_the_default_tells_its_sizes():
    sizes = plan_sizes(Recipe(), gpu_bytes=GPU_BYTES, missing=missing_files(Recipe()))
    assert (sizes.num_images, sizes.num_tokens, sizes.calls_guided, sizes.calls_free) == (1797, 16, 32, 16)
    assert (sizes.micro_batch_size, sizes.micro_batches) == (32, 2)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"expect": {"tokenizer": ""}}, "size of the tokenizer is unknown: .* set expect.tokenizer"),
        ({"expect": {"model": ""}}, "size of the model is unknown: base.checkpoint is not there.* set expect.model"),
        ({"expect": {"model": "GPT-S"}}, "no released LlamaGen model is called GPT-S"),
        ({"base": {"checkpoint": ""}, "expect": {"model": ""}}, "depends on the number of classes"),
    ],
)
def test_what_the_recipe_does_not_tell_is_said_with_the_remedy(changes, says):
    made = official(**changes)
    with pytest.raises(ConfigError, match=says):
        plan_sizes(made, gpu_bytes=GPU_BYTES, missing=missing_files(made))


def test_a_released_name_without_a_checkpoint_is_refused():
    with pytest.raises(ConfigError, match=r"expect\.model=GPT-B names a released file, but the recipe trains its own"):
        recipe(expect={"model": "GPT-B"})
    with pytest.raises(ConfigError, match=r"expect\.tokenizer=VQ-16 names a released file"):
        recipe(expect={"tokenizer": "VQ-16"})
    with pytest.raises(ConfigError, match=r"expect\.images must not be negative"):
        recipe(expect={"images": -1})


def test_what_is_expected_enters_no_digest():
    inputs = {"source": "5" * 64, "tokenizer_checkpoint": "6" * 64, "base_checkpoint": "7" * 64}
    nothing = {"model": "", "tokenizer": "", "images": 0}
    assert plan(official(), inputs) == plan(official(expect=nothing), inputs)


def test_rows_of_tokens_have_the_bytes_of_the_files():
    ids = [f"n01440764/n01440764_{i:05d}" for i in range(ROWS)]
    table = pa.table(
        {
            "image_id": ids,
            "view": np.zeros(ROWS, np.uint8),
            "label": np.zeros(ROWS, np.int32),
            "held_out": np.zeros(ROWS, bool),
            "tokens": pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(ROWS * 16, np.uint16)), 16),
        },
        schema=tokens_schema(16, 16384),
    )
    vq = released_tokenizer_spec("VQ-16", ())
    size = len(table_bytes(table))
    assert ROWS * token_row_bytes(16, vq) == pytest.approx(size, rel=0.03)
    assert token_row_bytes(16, vq, table) == token_row_bytes(16, vq), "ids as long as ImageNet's"


def test_rows_of_the_reference_have_the_bytes_of_the_files():
    held_out = np.arange(ROWS) % 5 == 0
    logp = pa.array(np.zeros(ROWS, np.float32), mask=held_out)
    table = pa.table(
        {
            "row": np.arange(ROWS),
            "view": np.zeros(ROWS, np.uint8),
            "cond_neg": np.zeros(ROWS, np.int32),
            **{name: logp for name in ("ref_logp_pos", "ref_logp_neg", "ref_logp_null")},
        },
        schema=REFERENCE,
    )
    assert ROWS * reference_row_bytes() == pytest.approx(len(table_bytes(table)), rel=0.05)


def test_a_checkpoint_of_another_size_is_refused():
    gpt_l = family("llamagen").released.model_spec("GPT-L", 576)
    with pytest.raises(ConfigError, match=r"c2i_B_384.pt is not the released GPT-B .* dim 1024 instead of 768"):
        check_expected(official(), "model", gpt_l, num_tokens=576)
    vq_8 = released_tokenizer_spec("VQ-8", ())
    with pytest.raises(ConfigError, match=r"vq_ds16_c2i.pt is not the released VQ-16 that expect.tokenizer names"):
        check_expected(official(), "tokenizer", vq_8)
    check_expected(official(), "model", family("llamagen").released.model_spec("GPT-B", 576), num_tokens=576)
    check_expected(official(expect={"model": ""}), "model", gpt_l, num_tokens=576)


def test_checkpoints_are_compared_before_anything_runs(tmp_path, random_llamagen):
    model = random_llamagen(vocab_size=64, num_tokens=16, num_classes=10)
    info = BundleInfo(model=Part("llamagen", asdict(model.spec)), tokenizer=None, image_size=8)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for name, data in bundle_files(info, model.state_dict(), None).items():
        (bundle / name).write_bytes(data)
    base = Store(str(tmp_path / "storage")).directory("base", "0" * 64)
    check_checkpoints(recipe(base={"checkpoint": str(bundle)}), base)
    with pytest.raises(
        ConfigError, match=r"bundle is not the released GPT-B that expect.model names: .*dim 16 instead"
    ):
        check_checkpoints(recipe(base={"checkpoint": str(bundle)}, expect={"model": "GPT-B"}), base)
