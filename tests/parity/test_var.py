"""Reads data/var: our VAR and its tokenizer against values recorded from the official code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cca_core.generate import Sampling, calls_per_image, decode_images, draw, generate
from cca_core.models import ARImageModel, ImageTokenizer, load_model, load_tokenizer, to_uint8
from cca_core.models.var.network import VAR, SelfAttention, VARSpec
from cca_core.models.var.residual import phi_index

DATA = Path(__file__).parent / "data"
FILE = str(DATA / "var" / "var.pth")
CONFIG = json.loads((DATA / "var" / "config.json").read_text())
SIZES = [size for size in json.loads((DATA / "full_size" / "var.json").read_text()).values() if "depth" in size]
SCALES = CONFIG["begin_ends"]
#: The official label -1 means the null condition.
LABELS = {run["key"]: [10, 10] if run["label"] == -1 else run["label"] for run in CONFIG["infer"]}


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    tensors = load_file(DATA / "var" / "reference.safetensors")
    return {**tensors, "image": tensors["image_int8"].float() / 64}


@pytest.fixture(scope="module")
def tokenizer(var_tokenizer_file: str) -> ImageTokenizer:
    return load_tokenizer(var_tokenizer_file, patch_nums=(1, 2, 3, 4))


@pytest.fixture
def model(tokenizer: ImageTokenizer) -> ARImageModel:
    return load_model(FILE, tokenizer=tokenizer)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=tolerance)


def by_scale(tokens_BL: torch.Tensor) -> list[torch.Tensor]:
    return [tokens_BL[:, start:stop] for start, stop in SCALES]


def test_the_specs_are_read_off_the_tensors(model, tokenizer):
    spec, official = model.spec, CONFIG["var"]
    assert (spec.num_layers, spec.dim, spec.num_heads) == (official["depth"], official["embed_dim"], 2)
    assert (spec.shared_adaln, spec.qk_norm) == (official["shared_aln"], official["attn_l2_norm"])
    assert (spec.num_classes, spec.vocab_size, spec.codebook_dim) == (10, 64, 8)
    assert (list(spec.patch_nums), spec.num_tokens, spec.null_label) == (official["patch_nums"], 30, 10)
    assert [name for name, _ in model.named_parameters()] == CONFIG["var_parameters"]
    assert not model.training
    found, official = tokenizer.spec, CONFIG["vae"]
    assert (found.width, list(found.width_multipliers)) == (official["ch"], official["ch_mult"])
    assert (found.codebook_size, found.codebook_dim) == (official["vocab_size"], official["z_channels"])
    assert (found.num_res_blocks, found.num_phis) == (official["num_res_blocks"], official["share_quant_resi"])
    assert (found.downsample, found.image_size, found.num_tokens(64)) == (16, official["image_size"], 30)
    shapes = {name: list(tensor.shape) for name, tensor in tokenizer.state_dict().items()}
    assert shapes == CONFIG["vae_state_dict"]


def test_the_phi_of_each_scale():
    # V6: scales 2 and 7 of ten lie between two ticks on paper.
    assert phi_index(4, 4) == CONFIG["phi_index_per_scale"]
    assert len(SIZES) == 5
    for size in SIZES:
        assert phi_index(len(size["patch_nums"]), 4) == size["phi_index_per_scale"]
    # An exact tie, which no released file has: the official argmin takes the first.
    assert phi_index(3, 2) == [0, 0, 1]


# The tokenizer.


def test_latents_before_quantisation(tokenizer, golden):
    close(tokenizer.latents(golden["image"]), golden["pre_quant"], 1e-4)


def test_tokens_are_exact(tokenizer, golden):
    tokens = tokenizer.encode(golden["image"])
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, golden["idx"])


def test_what_the_transformer_reads(tokenizer, golden):
    close(tokenizer.residual().inputs(golden["idx"]), golden["var_input"], 1e-5)


def test_partial_sums_end_at_the_quantised_latents(tokenizer, golden):
    sums = list(tokenizer.residual().partial_sums(golden["idx"]))
    assert len(sums) == len(SCALES)
    close(sums[-1], golden["f_hat"], 1e-5)


def test_images_of_tokens(tokenizer, golden):
    images = tokenizer.decode(golden["idx"][:2])
    close(images, golden["recon_from_idx"], 2e-4)
    assert images.abs().max() <= 1


def test_the_step_of_the_trainer_codes_alike(tokenizer, golden):
    step = tokenizer.code_step(golden["image"])
    assert torch.equal(step.tokens_N, golden["idx"].flatten())
    close(step.decoded_BCHW[:2].clamp(-1, 1), golden["recon_from_idx"], 2e-4)


def test_departure_m4_official_pixels_are_darker_by_half_a_grey_level(tokenizer):
    # M4: the official VAR scripts truncate 255 x of x in [0, 1], the LlamaGen scripts and ours 127.5 x + 128 of x in
    # [-1, 1]: the same number rounded.
    infer = load_file(DATA / "var" / "infer.safetensors")
    levels = 255 * infer["cfg1.5.image"].permute(0, 2, 3, 1)
    ours = to_uint8(decode_images(tokenizer, infer["cfg1.5.idx"])).int()
    official = levels.to(torch.uint8).int()
    assert set((ours - official).unique().tolist()) == {0, 1}
    assert (ours - levels).abs().max() < 0.51
    assert (ours - levels).mean().abs() < 0.01
    assert (official - levels).mean().item() == pytest.approx(-0.5, abs=0.01)


# The transformer.


@pytest.mark.parametrize("train", [False, True])
def test_token_logps(model, golden, train):
    model.train(train)
    token_logp = model(golden["idx"], golden["label"])
    assert token_logp.dtype == torch.float32
    close(token_logp, golden["logp_tokens"], 1e-3)
    close(token_logp.sum(-1), golden["logp_seq"], 1e-3)
    assert torch.equal(token_logp, model.train(not train)(golden["idx"], golden["label"]))


def test_logits(model, golden):
    logits = model.head(model.hidden(golden["idx"], golden["label"]))
    close(logits, golden["logits"], 1e-4)
    # V5: the fixture has a head whose scale is clamped before the exponential.
    assert max(block.attn.scale_mul_1H11.max() for block in model.blocks()) > 4.61


def test_logits_of_the_kv_cache_teacher_forced(model, golden):
    decoder = model.decoder(golden["label"])
    steps = [decoder.step(previous) for previous in (None, *by_scale(golden["idx"])[:-1])]
    assert [step.shape[1] for step in steps] == list(model.spec.step_sizes)
    close(torch.cat(steps, dim=1), golden["logits"], 1e-4)


def test_stochastic_depth_acts_in_training_only(model, golden):
    exact = model(golden["idx"], golden["label"])
    model.set_dropout(0.9)
    assert torch.equal(model(golden["idx"], golden["label"]), exact)
    assert [block.drop_path for block in model.blocks()] == [0.0, 0.9]
    torch.manual_seed(0)
    assert (model.train()(golden["idx"], golden["label"]) - exact).abs().max() > 0.1


def test_attention_without_normalised_queries_by_hand(model):
    """V5: no recording has it; the scale is then 0.25 / sqrt(head_dim)."""
    spec = VARSpec(**{**vars(model.spec), "qk_norm": False})
    attention, levels = SelfAttention(spec), torch.arange(4).repeat_interleave(torch.tensor(spec.step_sizes))
    x = torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attention.q_bias.fill_(0.5)
        q, k, v = (attention.mat_qkv(x) + torch.cat([attention.q_bias, torch.zeros(128)])).chunk(3, dim=-1)
        out = torch.empty(2, 30, 64)
        for head in (slice(0, 32), slice(32, 64)):
            scores = 0.25 / 32**0.5 * q[..., head] @ k[..., head].mT
            out[..., head] = scores.masked_fill(levels[:, None] < levels, -torch.inf).softmax(-1) @ v[..., head]
        close(attention(x, None), attention.proj(out), 1e-5)


def test_shared_modulation_is_own_modulation_with_equal_weights(model, golden):
    """No recording has the 512 px layout (``shared_ada_lin`` and ``ada_gss``); it must say the same as this one."""
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weight, bias = own["blocks.0.ada_lin.1.weight"], own["blocks.0.ada_lin.1.bias"]
    gains = [torch.randn(1, 1, 6, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    shared = {name: value for name, value in own.items() if ".ada_lin." not in name or name.startswith("head_nm")}
    shared |= {"shared_ada_lin.1.weight": weight, "shared_ada_lin.1.bias": bias}
    for i, gain in enumerate(gains):
        shared[f"blocks.{i}.ada_gss"] = gain
        own[f"blocks.{i}.ada_lin.1.weight"] = weight
        own[f"blocks.{i}.ada_lin.1.bias"] = bias + gain.flatten()
    model.load_state_dict(own)
    other = VAR(VARSpec(**{**vars(model.spec), "shared_adaln": True}))
    other.load_state_dict(shared)
    other.codebook, other.phi_weight, other.phi_bias = model.codebook, model.phi_weight, model.phi_bias
    expected = model(golden["idx"], golden["label"])
    close(other(golden["idx"], golden["label"]), expected.detach(), 1e-4)
    assert (expected - golden["logp_tokens"]).abs().max() > 0.1


# Generation.


@pytest.mark.parametrize("run", CONFIG["infer"], ids=lambda run: run["key"])
def test_greedy_generation(model, tokenizer, run, monkeypatch):
    golden, key = load_file(DATA / "var" / "infer.safetensors"), run["key"]
    logits: list[torch.Tensor] = []

    def watched(logits_RV: torch.Tensor, uniforms_R: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        logits.append(logits_RV.unflatten(0, (2, -1)))
        return draw(logits_RV, uniforms_R, sampling)

    monkeypatch.setattr("cca_core.generate.engine.draw", watched)
    labels = torch.tensor(LABELS[key]).expand(2)
    # V3: the official 0 is off, our 1.
    sampling = Sampling(temperature=0, cfg_scale=1 + run["cfg"])
    tokens = generate(model, labels, sampling, torch.arange(2), batch_size=2)
    assert torch.equal(tokens, golden[f"{key}.idx"])
    close(torch.cat(logits, dim=1), golden[f"{key}.logits"], 3e-4)
    *_, f_hat = tokenizer.residual().partial_sums(tokens)
    close(f_hat, golden[f"{key}.f_hat"], 1e-5)
    if f"{key}.image" in golden:
        close((decode_images(tokenizer, tokens) + 1) / 2, golden[f"{key}.image"], 1e-4)


@pytest.mark.parametrize("key", ["cfg1.5", "cfg4"])
def test_guidance_by_hand(model, key):
    """Both halves teacher-forced with the recorded tokens: t rises with the scale, and is 0 at the first."""
    golden = load_file(DATA / "var" / "infer.safetensors")
    (cfg,) = (run["cfg"] for run in CONFIG["infer"] if run["key"] == key)
    tokens, labels = golden[f"{key}.idx"], torch.tensor(LABELS[key])
    rows = torch.cat([labels, model.null_cond(labels).ids_B])
    decoder = model.decoder(rows)
    for step, previous in enumerate([None, *by_scale(tokens)[:-1]]):
        t = cfg * step / 3
        assert model.guidance_scale(1 + cfg, -1, step) == pytest.approx(1 + t)
        cond, null = decoder.step(previous if previous is None else previous.repeat(2, 1)).chunk(2)
        start, stop = SCALES[step]
        close((1 + t) * cond - t * null, golden[f"{key}.logits"][:, start:stop], 3e-4)


def test_an_interval_guides_the_first_scales_only(model):
    assert [model.guidance_scale(4.0, 1, step) for step in range(4)] == pytest.approx([1, 2, 1, 1])
    assert [model.guidance_scale(1.0, -1, step) for step in range(4)] == [1] * 4


@pytest.mark.parametrize(("cfg_scale", "calls"), [(0.5, 4), (1.0, 4), (2.5, 8)])
def test_sampling_without_guidance_runs_no_null_rows(model, cfg_scale, calls):
    # PARITY: the official sampler runs the null half even where its scale is off.
    rows: list[int] = []
    model.blocks()[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    sampling = Sampling(cfg_scale=cfg_scale, top_k=20)
    tokens = generate(model, torch.tensor([1, 9, 4]), sampling, torch.arange(3), batch_size=3)
    assert tokens.shape == (3, 30)
    assert rows == [3 * calls // 4] * 4
    assert calls_per_image(model, sampling) == calls
