"""Reads data/layouts_var and data/var: the official files of VAR, read, written and refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from cca_core.bundle import BundleInfo, bundle_files, read_bundle
from cca_core.config import ConfigError
from cca_core.convert import convert
from cca_core.inspect import describe
from cca_core.models import load_model, load_tokenizer
from cca_core.models.var.tokenizer import MultiScaleVQSpec, MultiScaleVQTokenizer

DATA = Path(__file__).parent / "data"
LAYOUTS = DATA / "layouts_var"
FILE = DATA / "var" / "var.pth"
CONFIG = json.loads((DATA / "var" / "config.json").read_text())
SCALES = (1, 2, 3, 4)
CONSTANTS = {"lvl_1L", "attn_bias_for_masking", "blocks.0.attn.zero_k_bias", "blocks.1.attn.zero_k_bias"}


def official(path: Path | str) -> dict[str, torch.Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True)


def assert_same_bits(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (ours[name], tensor))), name


@pytest.fixture(params=["flat_released.pth", "cca_ar-ckpt-last.pth", "var_train_ar-ckpt-last.pth"])
def container(request: pytest.FixtureRequest, var_training_file: str) -> str:
    """All three hold the same transformer."""
    path = LAYOUTS / request.param
    return str(path) if path.exists() else var_training_file


def test_every_official_container(container, var_training_file, monkeypatch):
    golden = load_file(LAYOUTS / "reference.safetensors")
    # The recorded tokenizer is all zeros, the recorded inputs are not: they stand in for what it would have made.
    model = load_model(container, tokenizer=var_training_file)
    monkeypatch.setattr(model, "residual", lambda: SimpleNamespace(inputs=lambda _: golden["var_input"]))
    logits = model.head(model.hidden(torch.zeros(2, 5, dtype=torch.int64), golden["label"]))
    torch.testing.assert_close(logits.detach(), golden["logits"], rtol=0, atol=1e-4)


def test_every_container_becomes_the_flat_file(container, tmp_path):
    assert convert(container, tmp_path / "bundle") == "bundle of a var model"
    convert(str(tmp_path / "bundle"), tmp_path / "official")
    assert_same_bits(official(tmp_path / "official" / "model.pt"), official(LAYOUTS / "flat_released.pth"))


def test_a_training_file_holds_both_parts(var_training_file):
    words = describe(var_training_file)
    assert words["what"] == "official checkpoint: var model, var tokenizer"
    assert words["var model"].startswith("in trainer.var_wo_ddp: 25 tensors")
    assert "in trainer.vae_local: 324 tensors" in words["var tokenizer"]
    assert "pass patch_nums=" in words["var tokenizer"]
    assert words["beside them"] == "epoch, iter, args"


def test_the_model_keeps_its_bits_there_and_back(tmp_path):
    expected = official(FILE)
    assert {name: list(tensor.shape) for name, tensor in expected.items()} == CONFIG["var_state_dict"]
    assert expected.keys() >= CONSTANTS
    convert(str(FILE), tmp_path / "bundle")
    assert read_bundle(str(tmp_path / "bundle")).model_tensors.keys() == expected.keys() - CONSTANTS
    words = convert(str(tmp_path / "bundle"), tmp_path / "official")
    assert words == "official layout: var model in model.pt"
    # V2: official scripts load strictly, the constants included.
    assert_same_bits(official(tmp_path / "official" / "model.pt"), expected)


def test_the_tokenizer_keeps_its_bits_there_and_back(var_tokenizer_file, tmp_path):
    assert convert(var_tokenizer_file, tmp_path / "bundle", patch_nums=SCALES) == "bundle of a var tokenizer"
    convert(str(tmp_path / "bundle"), tmp_path / "official")
    assert_same_bits(official(tmp_path / "official" / "tokenizer.pt"), official(var_tokenizer_file))


def test_a_bundle_of_both_needs_no_tokenizer(var_tokenizer_file, tmp_path):
    convert(str(FILE), tmp_path / "model")
    convert(var_tokenizer_file, tmp_path / "tokenizer", patch_nums=SCALES)
    one, other = read_bundle(str(tmp_path / "model")), read_bundle(str(tmp_path / "tokenizer"))
    info = BundleInfo(model=one.info.model, tokenizer=other.info.tokenizer, image_size=64)
    for name, data in bundle_files(info, one.model_tensors, other.tokenizer_tensors).items():
        (tmp_path / name).write_bytes(data)
    golden = load_file(DATA / "var" / "reference.safetensors")
    expected = golden["logp_tokens"]
    for model in (
        load_model(str(tmp_path)),
        load_model(str(tmp_path / "model"), tokenizer=str(tmp_path / "tokenizer")),
        load_model(str(tmp_path / "model"), tokenizer=var_tokenizer_file),
        load_model(str(FILE), tokenizer=load_tokenizer(str(tmp_path))),
    ):
        torch.testing.assert_close(model(golden["idx"], golden["label"]).detach(), expected, rtol=0, atol=1e-3)


def test_a_tokenizer_of_other_scales_starts_its_counts_anew(var_tokenizer_file):
    tokenizer = load_tokenizer(var_tokenizer_file, patch_nums=(1, 2, 4))
    assert tokenizer.quantize.ema_vocab_hit_SV.shape == (3, 64)
    assert tokenizer.spec.num_tokens(64) == 21


# Refusals.


def edited(tmp_path: Path, source: Path | str, **changes: torch.Tensor | None) -> str:
    """A checkpoint with tensors replaced, added, or (None) taken out."""
    tensors = {**official(source), **{name.replace("__", "."): value for name, value in changes.items()}}
    torch.save({name: value for name, value in tensors.items() if value is not None}, tmp_path / "edited.pth")
    return str(tmp_path / "edited.pth")


def test_a_file_that_does_not_fit_names_its_keys(tmp_path):
    uri = edited(
        tmp_path,
        FILE,
        blocks__1__ffn__fc1__bias=None,
        blocks__0__extra__weight=torch.zeros(2),
        head__bias=torch.zeros(3),
    )
    with pytest.raises(ConfigError) as caught:
        load_model(uri)
    message = str(caught.value)
    assert "missing keys: blocks.1.ffn.fc1.bias" in message
    assert "unexpected keys: blocks.0.extra.weight" in message
    assert "head.bias (3,) instead of (64,)" in message


@pytest.mark.parametrize("key", ["head.weight", "class_emb.weight"])
def test_a_file_without_the_tensors_that_tell_its_sizes_names_them(tmp_path, key):
    with pytest.raises(ConfigError, match=f"missing keys: {key}"):
        load_model(edited(tmp_path, FILE, **{key: None}))


def test_a_tokenizer_file_that_does_not_fit_names_its_keys(tmp_path, var_tokenizer_file):
    uri = edited(tmp_path, var_tokenizer_file, decoder__conv_in__bias=None, decoder__extra=torch.zeros(2))
    with pytest.raises(ConfigError, match=r"missing keys: decoder\.conv_in\.bias; unexpected keys: decoder\.extra"):
        load_tokenizer(uri, patch_nums=SCALES)
    uri = edited(tmp_path, var_tokenizer_file, encoder__conv_in__weight=None)
    with pytest.raises(ConfigError, match=r"missing keys: encoder\.conv_in\.weight"):
        load_tokenizer(uri, patch_nums=SCALES)


def test_a_model_without_its_tokenizer():
    with pytest.raises(
        ConfigError, match=r"var\.pth is a var model, which reads its tokenizer's codes: pass tokenizer="
    ):
        load_model(str(FILE))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"patch_nums": (1, 2, 4)}, r"tokenizer's patch_nums is \(1, 2, 4\), the model was made for \(1, 2, 3, 4\)"),
        ({"codebook_size": 32}, "tokenizer's codebook_size is 32, the model was made for 64"),
        ({"codebook_dim": 4}, "tokenizer's codebook_dim is 4, the model was made for 8"),
    ],
)
def test_the_tokenizer_of_another_model(change, problem):
    sizes = {"codebook_size": 64, "codebook_dim": 8, "patch_nums": SCALES, **change}
    tokenizer = MultiScaleVQTokenizer(MultiScaleVQSpec(width=32, width_multipliers=(1,), num_res_blocks=1, **sizes))
    with pytest.raises(ConfigError, match=problem):
        load_model(str(FILE), tokenizer=tokenizer)


def test_the_tokenizer_of_another_family():
    from cca_core.models.llamagen.tokenizer import VQSpec, VQTokenizer

    spec = VQSpec(
        width=32, width_multipliers=(1,), num_res_blocks=1, latent_channels=8, codebook_size=64, codebook_dim=8
    )
    with pytest.raises(ConfigError, match="VAR needs its multi-scale VQ tokenizer, not one of family 'llamagen'"):
        load_model(str(FILE), tokenizer=VQTokenizer(spec))


def test_a_tokenizer_bundle_of_other_scales(var_tokenizer_file, tmp_path):
    convert(var_tokenizer_file, tmp_path / "tokenizer", patch_nums=(1, 2, 4))
    with pytest.raises(ConfigError, match=r"patch_nums=\(1, 2, 3, 4\) contradicts it \(\(1, 2, 4\)\)"):
        load_model(str(FILE), tokenizer=str(tmp_path / "tokenizer"))


def test_what_the_tensors_cannot_tell_is_asked_for(var_tokenizer_file, tmp_path):
    with pytest.raises(ConfigError, match=r"pass patch_nums=\(1, 2, 3, 4, 5, 6, 8, 10, 13, 16\) for 256 px"):
        load_tokenizer(var_tokenizer_file)
    with pytest.raises(ConfigError, match="without lvl_1L does not tell its scales"):
        load_model(edited(tmp_path, FILE, lvl_1L=None))


@pytest.mark.parametrize("patch_nums", [(), (4,), (1, 2, 2, 4), (2, 1, 4)])
def test_scales_that_do_not_grow(var_tokenizer_file, patch_nums):
    with pytest.raises(ConfigError, match=r"must be sides of growing grids, as in \(1, 2, 3, 4\)"):
        load_tokenizer(var_tokenizer_file, patch_nums=patch_nums)


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({"num_tokens": 256}, "draws 30 tokens, not num_tokens=256"),
        ({"num_heads": 4}, "has 2 heads, not num_heads=4"),
    ],
)
def test_what_contradicts_the_file(spec, problem):
    with pytest.raises(ConfigError, match=problem):
        load_model(str(FILE), **spec)
    with pytest.raises(ConfigError, match=problem):
        convert(str(FILE), Path("never-written"), **spec)


def test_images_of_another_size(var_tokenizer_file):
    tokenizer = load_tokenizer(var_tokenizer_file, patch_nums=SCALES)
    with pytest.raises(ConfigError, match=r"image_size=32 does not fit scales \(1, 2, 3, 4\).*make 64"):
        tokenizer.encode(torch.zeros(1, 3, 32, 32))
