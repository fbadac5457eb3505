"""Reads data/gpt_c2i and data/layouts_llamagen: our LlamaGen against values recorded from the official code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cca_core.config import ConfigError
from cca_core.generate import Sampling, calls_per_image, draw, generate
from cca_core.models import ARImageModel, load_model
from cca_core.objectives import Batch, Likelihood

GPT = Path(__file__).parent / "data" / "gpt_c2i"
LAYOUTS = Path(__file__).parent / "data" / "layouts_llamagen"

GREEDY = json.loads((GPT / "config.json").read_text())["greedy"]
SAME_WEIGHTS = (
    "cca_ddp_model.pt",
    "cca_ddp_model_ema.pt",
    "deepspeed_module.pt",
    "fsdp_consolidated.pth",
    "llamagen_train_full.pt",
    "model_with_freqs_cis.pt",
    "state_dict.pt",
)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GPT / "reference.safetensors")


@pytest.fixture
def model() -> ARImageModel:
    return load_model(str(GPT / "ckpt.pt"), num_tokens=16, num_heads=4)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=tolerance)


def test_the_spec_is_read_off_the_tensors(model):
    config = json.loads((GPT / "config.json").read_text())
    spec = model.spec
    assert (spec.num_layers, spec.dim, spec.vocab_size, spec.num_classes) == (3, 64, 96, 10)
    assert (spec.num_kv_heads, spec.ffn_dim, spec.head_dim, spec.grid) == (4, 256, 16, 4)
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == config["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == config["n_params"]
    assert not model.training


@pytest.mark.parametrize("train", [False, True])
def test_token_logps(model, golden, train):
    # PARITY: officially only train mode gives teacher-forced logits (G3); here both modes do, and give the same.
    model.train(train)
    token_logp = model(golden["token_ids"], golden["cond_ids"])
    assert token_logp.dtype == torch.float32
    close(token_logp, golden["logp_tokens"], 5e-4)
    close(token_logp.sum(-1), golden["logp_seq"], 5e-4)


def test_logits(model, golden):
    logits = model.output(model.hidden(golden["token_ids"], golden["cond_ids"]))
    close(logits, golden["logits_train"], 1e-4)


def test_logits_of_the_kv_cache_teacher_forced(model, golden):
    decoder = model.decoder(golden["cond_ids"])
    steps = [decoder.step(golden["token_ids"][:, k - 1 : k] if k else None) for k in range(16)]
    close(torch.cat(steps, dim=1), golden["logits_kv"], 1e-4)


def test_rotary_table(model, golden):
    close(model.rotary, golden["freqs_cis"], 1e-6)
    assert not model.rotary[0].any(), "the condition's position has cos = sin = 0 (G1)"


def test_the_loss_of_training(model, golden):
    rows = len(golden["cond_ids"])
    no = torch.zeros(rows, dtype=torch.bool)
    batch = Batch(golden["token_ids"], golden["cond_ids"], golden["cond_ids"], no, torch.ones(rows))
    output = Likelihood().step(model, batch)
    close(output.loss_sum / output.rows, golden["loss_train"][0], 1e-5)


def test_gradients(model, golden):
    model(golden["token_ids"], golden["cond_ids"]).sum(-1).mean().backward()
    expected = {name.removeprefix("grad."): g for name, g in golden.items() if name.startswith("grad.")}
    assert len(expected) == 4
    parameters = dict(model.named_parameters())
    for name, gradient in expected.items():
        close(parameters[name].grad, gradient, 2e-3)


@pytest.mark.parametrize("run", GREEDY, ids=lambda run: run["key"])
def test_greedy_generation(model, run, monkeypatch):
    golden = load_file(GPT / "greedy.safetensors")
    logits: list[torch.Tensor] = []

    def watched(logits_RV: torch.Tensor, uniforms_R: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        logits.append(logits_RV[:3])
        return draw(logits_RV, uniforms_R, sampling)

    monkeypatch.setattr("cca_core.generate.engine.draw", watched)
    sampling = Sampling(temperature=0, cfg_scale=run["cfg_scale"], cfg_interval=run["cfg_interval"])
    tokens = generate(model, golden["cond_ids"], sampling, torch.arange(3), batch_size=4)
    assert torch.equal(tokens, golden[f"{run['key']}.tokens"].long())
    if run["cfg_interval"] in (-1, 3):
        close(torch.stack(logits, dim=1), golden[f"{run['key']}.logits"], 3e-4)
    # The official 0.5 equals 1.0 (G6), and neither pays for a null pass.
    assert calls_per_image(model, sampling) == (32 if run["cfg_scale"] > 1 else 16)


@pytest.mark.parametrize("name", SAME_WEIGHTS)
def test_every_official_container(name):
    golden = load_file(LAYOUTS / "reference.safetensors")
    model = load_model(str(LAYOUTS / name), num_tokens=4, num_heads=2)
    close(model.output(model.hidden(golden["token_ids"], golden["cond_ids"])), golden["logits_model"], 1e-4)


def test_ema_weights_are_a_choice():
    golden = load_file(LAYOUTS / "reference.safetensors")
    model = load_model(str(LAYOUTS / "cca_ddp_model_ema.pt"), weights="ema", num_tokens=4, num_heads=2)
    logits = model.output(model.hidden(golden["token_ids"], golden["cond_ids"]))
    close(logits, golden["logits_ema"], 1e-4)
    assert (logits - golden["logits_model"]).abs().max() > 0.01
    with pytest.raises(ConfigError, match="no EMA weights: use weights=model"):
        load_model(str(LAYOUTS / "cca_ddp_model.pt"), weights="ema", num_tokens=4, num_heads=2)


def edited(tmp_path: Path, **changes: torch.Tensor | None) -> str:
    """The small checkpoint with tensors replaced, added, or (None) taken out."""
    state = torch.load(LAYOUTS / "fsdp_consolidated.pth", weights_only=True)
    tensors = {**state, **{name.replace("__", "."): value for name, value in changes.items()}}
    torch.save({"model": {k: v for k, v in tensors.items() if v is not None}}, tmp_path / "edited.pt")
    return str(tmp_path / "edited.pt")


def test_a_file_that_does_not_fit_names_its_keys(tmp_path):
    uri = edited(
        tmp_path, norm__weight=None, layers__0__extra__weight=torch.zeros(2), output__weight=torch.zeros(3, 16)
    )
    with pytest.raises(ConfigError) as caught:
        load_model(uri, num_tokens=4, num_heads=2)
    message = str(caught.value)
    assert "missing keys: norm.weight" in message
    assert "unexpected keys: layers.0.extra.weight" in message
    assert "output.weight (3, 16) instead of (32, 16)" in message


@pytest.mark.parametrize(
    ("spec", "remedy"),
    [
        ({"num_heads": 2}, "num_tokens=256 .256 px., 576 .384 px."),
        ({"num_tokens": 4}, "pass num_heads="),
        ({"num_tokens": 4, "num_heads": 3}, "num_heads=3 does not divide the width 16"),
        ({"num_tokens": 5, "num_heads": 2}, "not a square number"),
    ],
)
def test_what_the_tensors_cannot_tell_is_asked_for(spec, remedy):
    with pytest.raises(ConfigError, match=remedy):
        load_model(str(LAYOUTS / "cca_ddp_model.pt"), **spec)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no checkpoint at .*nowhere\.pt"):
        load_model(str(tmp_path / "nowhere.pt"), num_tokens=4)
    with pytest.raises(ConfigError, match=r"is a directory without bundle.json"):
        load_model(str(tmp_path), num_tokens=4)
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(ConfigError, match="not a checkpoint that can be read safely"):
        load_model(str(tmp_path / "text.pt"), num_tokens=4)
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(
        ConfigError, match="holds no state dict: expected a plain dict of tensors, or one under model, module"
    ):
        load_model(str(tmp_path / "empty.pt"), num_tokens=4)
    torch.save({"model": {"fc.weight": torch.zeros(2, 2)}}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match=r"no model of a known family.*fc\.weight"):
        load_model(str(tmp_path / "other.pt"), num_tokens=4)


class Stranger:
    """What a pickle may bring: reading it would run its __reduce__."""

    def __reduce__(self):
        return (Path.touch, (Path("was-here"),))


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"norm.weight": torch.zeros(2)}, "args": Stranger()}, tmp_path / "stranger.pt")
    with pytest.raises(ConfigError, match="weights_only"):
        load_model(str(tmp_path / "stranger.pt"), num_tokens=4)
    assert not (tmp_path / "was-here").exists()


def test_angles_stay_float32_in_a_bfloat16_model():
    model = load_model(str(GPT / "ckpt.pt"), num_tokens=16, num_heads=4, dtype=torch.bfloat16)
    assert model.output.weight.dtype == torch.bfloat16
    assert model.rotary.dtype == torch.float32
    assert torch.equal(model.rotary, load_model(str(GPT / "ckpt.pt"), num_tokens=16, num_heads=4).rotary)


def test_a_fact_of_another_family_is_refused():
    with pytest.raises(ConfigError, match="patch_nums says nothing of this model file: it may be told num_tokens"):
        load_model(str(GPT / "ckpt.pt"), num_tokens=16, num_heads=4, patch_nums=(1, 2))
