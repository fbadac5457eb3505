"""Writes bundles below a temporary folder: what was written comes back, all else is refused, nothing is a pickle."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from cca_core.bundle import (
    INFO_NAME,
    MODEL_NAME,
    TOKENIZER_NAME,
    BundleInfo,
    Part,
    bundle_files,
    encode_tensors,
    is_bundle,
    read_bundle,
    read_info,
)
from cca_core.config import ConfigError
from cca_core.models import load_model, load_to_draw, load_tokenizer
from cca_core.models.llamagen.tokenizer import VQSpec, VQTokenizer
from cca_core.parse import as_dict
from cca_core.stages.inputs import file_sha256
from cca_core.store import Store


def tokenizer_of(seed: int = 0) -> VQTokenizer:
    spec = VQSpec(
        width=32, width_multipliers=(1, 1), num_res_blocks=1, latent_channels=32, codebook_size=24, codebook_dim=4
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VQTokenizer(spec).eval()


def info_of(model: nn.Module | None, tokenizer: nn.Module | None) -> BundleInfo:
    return BundleInfo(
        model=Part("llamagen", as_dict(model.spec)) if model else None,
        tokenizer=Part("llamagen", as_dict(tokenizer.spec)) if tokenizer else None,
        image_size=8,
        class_names=("ant", "bee", "cat"),
        sampling={"cfg_scale": 1.5, "top_k": 0},
        digests={"base": "d" * 64},
        metrics={"distance": 0.1},
    )


def write(root: Path | str, model: nn.Module | None, tokenizer: nn.Module | None) -> str:
    tensors = [part.state_dict() if part else None for part in (model, tokenizer)]
    store = Store(str(root))
    for name, data in bundle_files(info_of(model, tokenizer), *tensors).items():
        store.write_bytes(f"{store.root}/{name}", data)
    return store.uri


def edit_info(root: str, **changes: object) -> None:
    path = Path(root) / INFO_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def parts(random_llamagen):
    return random_llamagen(), tokenizer_of()


@pytest.fixture
def bundle(tmp_path, parts) -> str:
    return write(tmp_path / "bundle", *parts)


@pytest.mark.parametrize("remote", [False, True], ids=["folder", "memory"])
def test_round_trip(tmp_path, parts, remote):
    model, tokenizer = parts
    uri = write(f"memory://{tmp_path.name}/bundle" if remote else tmp_path, *parts)
    assert is_bundle(uri)
    assert is_bundle(uri + "/")
    read = read_bundle(uri)
    assert read.info == read_info(uri) == info_of(*parts)
    for tensors, part in ((read.model_tensors, model), (read.tokenizer_tensors, tokenizer)):
        assert tensors.keys() == part.state_dict().keys()
        assert all(torch.equal(tensors[name], value) for name, value in part.state_dict().items())


def test_a_loaded_model_and_tokenizer_compute_the_same(bundle, parts):
    model, tokenizer = parts
    loaded, loaded_tokenizer = load_model(bundle), load_tokenizer(bundle)
    assert not loaded.training
    assert not loaded_tokenizer.training
    assert (loaded.spec, loaded_tokenizer.spec) == (model.spec, tokenizer.spec)
    generator = torch.Generator().manual_seed(0)
    tokens, cond = torch.randint(24, (3, 16), generator=generator), torch.tensor([0, 2, 3])
    images = torch.rand(3, 3, 8, 8, generator=generator) * 2 - 1
    with torch.no_grad():
        assert torch.equal(loaded(tokens, cond), model(tokens, cond))
        assert torch.equal(loaded_tokenizer.encode(images), tokenizer.encode(images))
        assert torch.equal(loaded_tokenizer.decode(tokens), tokenizer.decode(tokens))
    assert next(load_model(bundle, dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16


def test_equal_weights_give_equal_bytes_whatever_their_order_and_layout(random_llamagen):
    model, tokenizer = random_llamagen(), tokenizer_of()
    files = bundle_files(info_of(model, tokenizer), model.state_dict(), tokenizer.state_dict())
    assert list(files) == [MODEL_NAME, TOKENIZER_NAME, INFO_NAME], "bundle.json says that the rest is there"
    again = tokenizer_of().to(memory_format=torch.channels_last)
    reordered = dict(reversed(random_llamagen().state_dict().items()))
    assert bundle_files(info_of(model, again), reordered, again.state_dict()) == files
    other = encode_tensors(random_llamagen(seed=1).state_dict())
    assert other != files[MODEL_NAME]


def test_the_digest_of_a_bundle_is_that_of_its_content(tmp_path, parts):
    first, copy = write(tmp_path / "a", *parts), write(tmp_path / "b", *parts)
    assert file_sha256(first) == file_sha256(copy)
    edit_info(copy, image_size=9)
    assert file_sha256(first) != file_sha256(copy)
    with pytest.raises(ConfigError, match=r"no checkpoint at .*nowhere"):
        file_sha256(str(tmp_path / "nowhere"))


def test_another_format_version_is_refused(bundle):
    edit_info(bundle, format_version=3)
    for read in (read_info, read_bundle, load_model, load_tokenizer):
        with pytest.raises(ConfigError, match=r"bundle format 3, this release reads 1 and 2: use the release that"):
            read(bundle)


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_pickle_in_the_place_of_tensors_is_refused_and_does_not_run(tmp_path, bundle, form):
    content = {"output.weight": Trap(tmp_path / "sprung")}
    if form == "torch":
        torch.save(content, Path(bundle) / MODEL_NAME)
    else:
        (Path(bundle) / MODEL_NAME).write_bytes(pickle.dumps(content))
    with pytest.raises(SafetensorError):
        load_model(bundle)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("load", "spec", "message"),
    [
        (load_model, {"num_tokens": 64}, r"num_tokens=64 contradicts it \(16\)"),
        (load_model, {"patch_nums": 3}, r"patch_nums=3 contradicts it \(no such field\)"),
        (load_tokenizer, {"codebook_size": 7}, r"codebook_size=7 contradicts it \(24\)"),
    ],
)
def test_a_spec_that_contradicts_the_bundle_is_refused(bundle, load, spec, message):
    with pytest.raises(ConfigError, match=message):
        load(bundle, **spec)


def test_a_spec_that_agrees_is_taken(bundle):
    assert load_model(bundle, num_tokens=16, num_heads=2).spec.num_tokens == 16
    assert load_tokenizer(bundle, codebook_size=24, width_multipliers=(1, 1)).spec.codebook_size == 24


def test_a_bundle_without_the_part_asked_for_says_so(tmp_path, parts):
    model, tokenizer = parts
    with pytest.raises(ConfigError, match="holds no model"):
        load_model(write(tmp_path / "tokenizer", None, tokenizer))
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load_tokenizer(write(tmp_path / "model", model, None))
    with pytest.raises(ConfigError, match=r"no bundle at .*: it has no bundle\.json"):
        read_info(str(tmp_path))


def test_tensors_that_do_not_fit_the_spec_are_named(bundle, parts):
    tensors = dict(parts[0].state_dict())
    tensors["surplus"] = tensors.pop("norm.weight")
    tensors["output.weight"] = tensors["output.weight"][:5]
    (Path(bundle) / MODEL_NAME).write_bytes(encode_tensors(tensors))
    with pytest.raises(ConfigError, match=r"missing keys: norm\.weight; unexpected keys: surplus; shapes: output\."):
        load_model(bundle)


def test_a_family_of_another_release_is_refused_by_name(bundle):
    edit_info(bundle, model=asdict(replace(read_info(bundle).model, family="later")))
    with pytest.raises(ConfigError, match="unknown model family 'later'; this release knows llamagen"):
        load_model(bundle)


def test_a_model_draws_in_the_precision_that_its_bundle_names(bundle, parts):
    assert "precision" not in json.loads((Path(bundle) / INFO_NAME).read_text()), "as older releases write and read it"
    assert load_to_draw(bundle).output.weight.dtype == torch.float32
    edit_info(bundle, precision="bfloat16")
    drawing = load_to_draw(bundle)
    assert torch.equal(drawing.output.weight, parts[0].output.weight.bfloat16())
    assert load_model(bundle).output.weight.dtype == torch.float32, "training goes on from what was kept"
    edit_info(bundle, precision="float8")
    with pytest.raises(ConfigError, match="draws in float8: this release draws in float32 or bfloat16"):
        load_to_draw(bundle)
