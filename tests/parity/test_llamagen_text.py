"""Reads data/gpt_t2i and data/gpt_t2i_120: LlamaGen with captions against values recorded from the official code."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cca_core.bundle import INFO_NAME
from cca_core.config import ConfigError
from cca_core.convert import convert
from cca_core.generate import Sampling, calls_per_image, draw, generate
from cca_core.models import ARImageModel, Captions, ClassIds, load_model
from cca_core.models.llamagen.network import LlamaGen, visible
from cca_core.objectives import Batch, Likelihood

DATA = Path(__file__).parent / "data"
CLASS_FILE = DATA / "gpt_c2i" / "ckpt.pt"
NUM_TOKENS = 16
SEEDS = torch.arange(24) * 7 + 100


@dataclass(frozen=True)
class Golden:
    """One recorded model: its file, what was recorded, and the recorded captions with or without their mask."""

    name: str

    @property
    def file(self) -> str:
        return str(DATA / self.name / "ckpt.pt")

    @cached_property
    def config(self) -> dict:
        return json.loads((DATA / self.name / "config.json").read_text())

    @cached_property
    def reference(self) -> dict[str, Tensor]:
        return load_file(DATA / self.name / "reference.safetensors")

    @cached_property
    def greedy(self) -> dict[str, Tensor]:
        return load_file(DATA / self.name / "greedy.safetensors")

    @property
    def spec(self) -> dict[str, int]:
        """What the tensors do not tell."""
        config = self.config["config"]
        stated = {"num_tokens": NUM_TOKENS, "num_heads": config["n_head"]}
        return stated if self.tokens == 120 else stated | {"num_cond_tokens": self.tokens}

    @property
    def tokens(self) -> int:
        return self.config["config"]["cls_token_num"]

    def captions(self, masked: bool) -> Captions:
        return Captions(self.reference["caption"], self.reference["emb_mask"] if masked else None)


GOLDENS = {name: Golden(name) for name in ("gpt_t2i", "gpt_t2i_120")}
RUNS = [(golden, run) for golden in GOLDENS.values() for run in golden.config["greedy"]]
with_mask = pytest.mark.parametrize("masked", [False, True], ids=["nomask", "masked"])


@pytest.fixture(params=GOLDENS)
def golden(request: pytest.FixtureRequest) -> Golden:
    return GOLDENS[request.param]


@pytest.fixture
def model(golden: Golden) -> ARImageModel:
    return load_model(golden.file, **golden.spec)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=tolerance)


def logits_of(model: ARImageModel, tokens: Tensor, cond: Captions | ClassIds) -> Tensor:
    with torch.no_grad():
        return model.output(model.hidden(tokens, cond)).float()


def test_the_spec_is_read_off_the_tensors(model, golden):
    official, spec = golden.config["config"], model.spec
    assert (spec.num_layers, spec.dim, spec.vocab_size) == (official["n_layer"], official["dim"], 96)
    assert (spec.num_cond_tokens, spec.caption_dim, spec.num_classes) == (golden.tokens, official["caption_dim"], 0)
    assert (spec.num_kv_heads, spec.ffn_dim) == (official["n_head"], golden.config["effective"]["ffn_hidden"])
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == golden.config["state_dict"]
    assert sorted(name for name, _ in model.named_parameters()) == sorted(golden.config["parameters"])
    buffers = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
    assert buffers == set(golden.config["buffers"]), "the null caption is kept and never trained (G5)"
    assert sum(p.numel() for p in model.parameters()) == golden.config["n_params"]


def test_rotary_table(model, golden):
    close(model.rotary, golden.reference["freqs_cis"], 1e-6)
    assert not model.rotary[: golden.tokens].any(), "positions of the caption have cos = sin = 0 (G1)"


def test_the_mask_of_attention():
    reference = GOLDENS["gpt_t2i"].reference
    expected, length = reference["attn_mask"].bool(), 8 + NUM_TOKENS
    assert torch.equal(visible(reference["emb_mask"], 0, length), expected)
    # Generation asks for the same rows one by one.
    for position in range(8, length):
        row = visible(reference["emb_mask"], position, position + 1)
        assert torch.equal(row, expected[:, :, position : position + 1, : position + 1])


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ["nomask", "masked", "uncond"])
def test_logits(model, golden, name, train):
    cond = golden.captions(masked=name == "masked")
    if name == "uncond":
        cond = model.null_cond(cond)
    logits = logits_of(model.train(train), golden.reference["token_ids"], cond)
    close(logits, golden.reference[f"logits_train_{name}"], 1e-4)


@with_mask
def test_sequence_logps(model, golden, masked):
    token_logp = model(golden.reference["token_ids"], golden.captions(masked))
    assert token_logp.dtype == torch.float32
    close(token_logp.sum(-1), golden.reference[f"logp_seq_{'masked' if masked else 'nomask'}"], 5e-4)


@with_mask
def test_the_loss_of_training(model, golden, masked):
    # Officially ``valid`` weighs the images, and goes with the mask.
    weight = golden.reference["valid"].float() if masked else torch.ones(3)
    cond = golden.captions(masked)
    batch = Batch(golden.reference["token_ids"], cond, cond, torch.zeros(3, dtype=torch.bool), weight)
    output = Likelihood().step(model, batch)
    expected = golden.reference["loss_train_masked_valid" if masked else "loss_train_nomask"][0]
    close(output.loss_sum / output.rows.clamp(min=1), expected, 1e-5)


@with_mask
def test_logits_of_the_kv_cache_teacher_forced(model, golden, masked):
    tokens = golden.reference["token_ids"]
    with torch.no_grad():
        decoder = model.decoder(golden.captions(masked))
        steps = [decoder.step(tokens[:, k - 1 : k] if k else None) for k in range(NUM_TOKENS)]
    close(torch.cat(steps, dim=1), golden.reference[f"logits_kv_{'masked' if masked else 'nomask'}"], 1e-4)


@pytest.mark.parametrize(("golden", "run"), RUNS, ids=[f"{g.name}-{run['key']}" for g, run in RUNS])
def test_greedy_generation(golden, run, monkeypatch):
    model = load_model(golden.file, **golden.spec)
    logits: list[Tensor] = []

    def watched(logits_RV: Tensor, uniforms_R: Tensor, sampling: Sampling) -> Tensor:
        logits.append(logits_RV[:3])
        return draw(logits_RV, uniforms_R, sampling)

    monkeypatch.setattr("cca_core.generate.engine.draw", watched)
    sampling = Sampling(temperature=0, cfg_scale=run["cfg_scale"])
    tokens = generate(model, golden.captions(run["emb_masks"]), sampling, torch.arange(3), batch_size=4)
    assert torch.equal(tokens, golden.greedy[f"{run['key']}.tokens"].long())
    if f"{run['key']}.logits" in golden.greedy:
        close(torch.stack(logits, dim=1), golden.greedy[f"{run['key']}.logits"], 3e-4)
    assert calls_per_image(model, sampling) == NUM_TOKENS * (2 if run["cfg_scale"] > 1 else 1)


def test_the_null_caption_keeps_the_mask_of_its_caption(model, golden):
    cond = golden.captions(masked=True)
    null = model.null_cond(cond)
    state = torch.load(golden.file, weights_only=True)["model"]
    for features in null.features_BTD:
        assert torch.equal(features, state["cls_embedding.uncond_embedding"][: golden.tokens])
    assert torch.equal(null.mask_BT, cond.mask_BT)
    assert model.null_cond(golden.captions(masked=False)).mask_BT is None


def test_what_a_mask_leaves_out_leaves_no_trace(model, golden):
    tokens, cond = golden.reference["token_ids"], golden.captions(masked=True)
    noise = torch.randn(cond.features_BTD.shape, generator=torch.Generator().manual_seed(0))
    noisy = replace(cond, features_BTD=torch.where(cond.mask_BT[..., None].bool(), cond.features_BTD, noise))
    assert torch.equal(logits_of(model, tokens, noisy), logits_of(model, tokens, cond))
    for kind in (torch.bool, torch.int64):
        other = replace(cond, mask_BT=cond.mask_BT.to(kind))
        assert torch.equal(logits_of(model, tokens, other), logits_of(model, tokens, cond))
    whole = replace(cond, mask_BT=torch.ones_like(cond.mask_BT))
    close(logits_of(model, tokens, whole), golden.reference["logits_train_nomask"], 1e-4)


def test_gradients_reach_the_projection_and_not_the_null_caption(model, golden):
    cond = golden.captions(masked=True)
    rows = cond.append(model.null_cond(cond))
    model(golden.reference["token_ids"].repeat(2, 1), rows).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert not model.cls_embedding.uncond_embedding.requires_grad


@with_mask
def test_a_bfloat16_model_takes_the_features_as_they_are(golden, masked):
    model = load_model(golden.file, dtype=torch.bfloat16, **golden.spec)
    tokens, cond = golden.reference["token_ids"], golden.captions(masked)
    rounded = replace(cond, features_BTD=cond.features_BTD.bfloat16())
    assert torch.equal(model(tokens, cond), model(tokens, rounded))
    guided = Sampling(cfg_scale=4.0)
    drawn = [generate(model, given, guided, torch.arange(3), batch_size=4) for given in (cond, rounded)]
    assert torch.equal(*drawn)


def test_a_bundle_and_back_keep_every_bit(golden, tmp_path):
    bundle, back = tmp_path / "bundle", tmp_path / "back"
    assert convert(golden.file, bundle, **golden.spec) == "bundle of a llamagen model"
    tokens, cond = golden.reference["token_ids"], golden.captions(masked=True)
    loaded, expected = load_model(str(bundle)), load_model(golden.file, **golden.spec)
    assert loaded.spec == expected.spec
    assert torch.equal(logits_of(loaded, tokens, cond), logits_of(expected, tokens, cond))
    assert load_model(str(bundle), num_cond_tokens=golden.tokens).spec == expected.spec
    with pytest.raises(ConfigError, match=rf"num_cond_tokens=7 contradicts it \({golden.tokens}\)"):
        load_model(str(bundle), num_cond_tokens=7)

    convert(str(bundle), back)
    before, after = (torch.load(path, weights_only=True)["model"] for path in (golden.file, back / "model.pt"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert after[name].numpy().tobytes() == tensor.numpy().tobytes(), name


def test_a_bundle_of_classes_from_before_captions_still_loads(tmp_path):
    convert(str(CLASS_FILE), tmp_path, num_tokens=NUM_TOKENS, num_heads=4)
    info = json.loads((tmp_path / INFO_NAME).read_text())
    new = {name: info["model"]["spec"].pop(name) for name in ("num_cond_tokens", "caption_dim")}
    assert new == {"num_cond_tokens": 1, "caption_dim": 0}
    (tmp_path / INFO_NAME).write_text(json.dumps(info))
    assert load_model(str(tmp_path)).spec == load_model(str(CLASS_FILE), num_tokens=NUM_TOKENS, num_heads=4).spec


def test_training_starts_as_officially(random_llamagen):
    spec = random_llamagen(num_classes=0, caption_dim=64, num_cond_tokens=8, dim=128).spec
    model = LlamaGen(spec)
    model.init_weights(torch.Generator().manual_seed(0))
    embedding = model.cls_embedding
    assert embedding.uncond_embedding.std().item() == pytest.approx(64**-0.5, rel=0.05)
    for layer in (embedding.cap_proj.fc1, embedding.cap_proj.fc2):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.output.weight.any()


@pytest.fixture(scope="module")
def small(random_llamagen) -> LlamaGen:
    # Two query heads share one key/value head, which no official model does.
    model = random_llamagen(seed=3, num_classes=0, caption_dim=12, num_cond_tokens=6, num_kv_heads=1)
    torch.nn.init.normal_(model.cls_embedding.uncond_embedding, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(scope="module")
def prompts() -> Captions:
    mask = (torch.arange(6) >= torch.arange(24)[:, None] % 6).float()
    features = torch.randn(24, 6, 12, generator=torch.Generator().manual_seed(2)) * mask[..., None]
    return Captions(features * 3, mask)


@with_mask
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_company_and_position_leave_no_trace(small, prompts, cfg_scale, masked):
    cond = prompts if masked else Captions(prompts.features_BTD)
    sampling = Sampling(cfg_scale=cfg_scale)
    expected = generate(small, cond, sampling, SEEDS, batch_size=8)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    parts = (order, torch.tensor([0]), torch.tensor([23]), torch.arange(5, 24))
    for rows in parts:
        given = cond.map(lambda tensor, rows=rows: tensor[rows])
        assert torch.equal(generate(small, given, sampling, SEEDS[rows], batch_size=8), expected[rows])
    assert len(torch.unique(expected, dim=0)) == 24


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_greedy_tokens_are_the_most_likely_ones_without_a_cache(small, prompts, cfg_scale):
    tokens = generate(small, prompts, Sampling(temperature=0, cfg_scale=cfg_scale), SEEDS)
    logits = logits_of(small, tokens, prompts)
    if cfg_scale > 1:
        null = logits_of(small, tokens, small.null_cond(prompts))
        logits = null + cfg_scale * (logits - null)
    top = logits.topk(2, dim=-1).values
    assert (top[..., 0] - top[..., 1]).min() > 1e-4, "no tie that rounding could turn"
    assert torch.equal(tokens, logits.argmax(-1))


def test_the_caption_its_mask_and_guidance_each_count(small, prompts):
    expected = generate(small, prompts, Sampling(temperature=0), SEEDS)
    others = {
        "caption": generate(small, prompts.map(lambda t: t.roll(6, 0)), Sampling(temperature=0), SEEDS),
        "mask": generate(small, Captions(prompts.features_BTD), Sampling(temperature=0), SEEDS),
        "guidance": generate(small, prompts, Sampling(temperature=0, cfg_scale=3.0), SEEDS),
    }
    # Every sixth caption is as long as the model takes: its mask leaves nothing out.
    least = {"caption": 20, "mask": 18, "guidance": 20}
    for name, tokens in others.items():
        assert (tokens != expected).any(-1).sum() >= least[name], name


@pytest.mark.parametrize("name", ["scored", "drawn", "drawn guided"])
def test_the_other_kind_of_condition_is_refused(name):
    golden, ids = GOLDENS["gpt_t2i"], torch.tensor([0, 1, 2])
    tokens, seeds, cond = golden.reference["token_ids"], torch.arange(3), golden.captions(masked=True)
    of_text = load_model(golden.file, **golden.spec)
    of_classes = load_model(str(CLASS_FILE), num_tokens=NUM_TOKENS, num_heads=4)
    run = {
        "scored": lambda model, given: model(tokens, given),
        "drawn": lambda model, given: generate(model, given, Sampling(), seeds),
        "drawn guided": lambda model, given: generate(model, given, Sampling(cfg_scale=2.0), seeds),
    }[name]
    with pytest.raises(ConfigError, match="conditioned on classes, not on captions: give it class ids"):
        run(of_classes, cond)
    for given in (ids, ClassIds(ids)):
        with pytest.raises(ConfigError, match="conditioned on captions, not on classes: give it Captions"):
            run(of_text, given)


def test_captions_of_another_shape_are_refused():
    golden = GOLDENS["gpt_t2i"]
    model, cond = load_model(golden.file, **golden.spec), golden.captions(masked=True)
    tokens, features, mask = golden.reference["token_ids"], cond.features_BTD, cond.mask_BT
    for wrong in (features[:, 1:], features[..., 1:], features.repeat(1, 2, 1)):
        with pytest.raises(ConfigError, match=r"do not fit the model's \(8, 32\): positions are padded or cut"):
            model(tokens, Captions(wrong))
    for wrong in (mask[:, 1:], mask[:2], mask[..., None]):
        with pytest.raises(ConfigError, match="is not that of their 3 rows of 8 positions"):
            model(tokens, Captions(features, wrong))
    for pair in ((cond, Captions(features)), (Captions(features), cond)):
        with pytest.raises(ConfigError, match="rows with and without mask_BT do not go into one batch"):
            pair[0].append(pair[1])


@pytest.mark.parametrize(
    ("file", "spec", "reason"),
    [
        (CLASS_FILE, {"num_cond_tokens": 8}, "num_cond_tokens=8 belongs to captions, and this LlamaGen file has class"),
        (GOLDENS["gpt_t2i"].file, {"num_cond_tokens": 121}, "121 must lie between 1 and the 120 rows"),
        (GOLDENS["gpt_t2i"].file, {"num_cond_tokens": 0}, "0 must lie between 1 and the 120 rows"),
    ],
)
def test_condition_tokens_that_the_file_cannot_have_are_refused(file, spec, reason):
    with pytest.raises(ConfigError, match=reason):
        load_model(str(file), num_tokens=NUM_TOKENS, num_heads=4, **spec)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"num_cond_tokens": 8}, "num_cond_tokens=8 needs captions: a class is one token"),
        ({"caption_dim": 8}, "on captions or on 3 classes, not on both"),
    ],
)
def test_a_contradictory_spec_is_refused(random_llamagen, sizes, reason):
    with pytest.raises(ConfigError, match=reason):
        random_llamagen(**sizes)
