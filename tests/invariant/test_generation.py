"""Reads and writes nothing: what an image is drawn as depends on its condition, seed and sampling alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from cca_core.generate import Sampling, calls_per_image, draw, filtered_probs, generate
from cca_core.generate import engine as generation
from cca_core.models.base import ARImageModel, Captions, ClassIds, SlotDecoder
from cca_core.models.llamagen.network import LlamaGen

SAMPLINGS = {
    "plain": Sampling(),
    "greedy": Sampling(temperature=0),
    "filtered": Sampling(temperature=0.9, top_k=12, top_p=0.9),
    "guided": Sampling(cfg_scale=2.0),
    "partly guided": Sampling(cfg_scale=3.0, cfg_interval=4),
}
CLASSES = torch.arange(24) % 3
SEEDS = torch.arange(24) * 7 + 100


@pytest.fixture(scope="module")
def model(random_llamagen: Callable[..., LlamaGen]) -> LlamaGen:
    return random_llamagen(seed=3)


@pytest.fixture(params=SAMPLINGS)
def sampling(request: pytest.FixtureRequest) -> Sampling:
    return SAMPLINGS[request.param]


class Watched(SlotDecoder):
    """Slots that note the rows of every model call, and its logits."""

    def __init__(self, inner: SlotDecoder, rows: list[int], logits: list[Tensor]) -> None:
        self.continuous = inner.continuous
        self.inner, self.rows, self.logits = inner, rows, logits

    def enter(self, slots: list[int], cond: ClassIds | Captions) -> None:
        self.inner.enter(slots, cond)

    def leave(self, slots: list[int]) -> None:
        self.inner.leave(slots)

    def step(self, previous_Sn: Tensor) -> Tensor:
        self.logits.append(self.inner.step(previous_Sn))
        self.rows.append(len(self.logits[-1]))
        return self.logits[-1]


def watch(model: ARImageModel, patch: pytest.MonkeyPatch) -> tuple[list[int], list[Tensor]]:
    rows: list[int] = []
    logits: list[Tensor] = []
    make = model.slots
    patch.setattr(model, "slots", lambda num_slots: Watched(make(num_slots), rows, logits))
    return rows, logits


def test_company_and_position_leave_no_trace(model, sampling):
    expected = generate(model, CLASSES, sampling, SEEDS, batch_size=8)
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(generate(model, CLASSES[shuffled], sampling, SEEDS[shuffled], batch_size=8), expected[shuffled])
    for i in (0, 7, 8, 23):
        alone = generate(model, CLASSES[i : i + 1], sampling, SEEDS[i : i + 1], batch_size=8)
        assert torch.equal(alone, expected[i : i + 1])
    tail = generate(model, CLASSES[5:], sampling, SEEDS[5:], batch_size=8)
    assert torch.equal(tail, expected[5:])


@pytest.mark.parametrize("batch_size", [1, 5, 24, 64])
def test_the_batch_size_changes_rounding_only(model, sampling, batch_size):
    expected = generate(model, CLASSES, sampling, SEEDS, batch_size=8)
    same = (generate(model, CLASSES, sampling, SEEDS, batch_size=batch_size) == expected).all(-1)
    # A different shape rounds differently: a draw that hits an edge of the distribution may fall on its other side.
    assert same.sum() >= 23


@pytest.mark.parametrize("count", [1, 8, 13])
def test_every_call_has_the_shape_of_a_full_batch(model, count, monkeypatch):
    rows, _ = watch(model, monkeypatch)
    tokens = generate(model, CLASSES[:count], Sampling(), SEEDS[:count], batch_size=8)
    assert tokens.shape == (count, 16)
    assert rows == [8] * 16 * -(-count // 8)


@pytest.mark.parametrize("other", ["seeds", "classes", "sampling"])
def test_seed_condition_and_sampling_each_count(model, other):
    expected = generate(model, CLASSES, Sampling(), SEEDS)
    changed = {
        "seeds": lambda: generate(model, CLASSES, Sampling(), SEEDS + 1),
        "classes": lambda: generate(model, (CLASSES + 1) % 3, Sampling(), SEEDS),
        "sampling": lambda: generate(model, CLASSES, Sampling(temperature=0.7), SEEDS),
    }[other]()
    assert (changed != expected).any(-1).all()


def test_a_thousand_sequences_alone_and_in_company(model):
    classes, seeds = torch.arange(1000) % 3, torch.arange(1000)
    expected = generate(model, classes, Sampling(), seeds, batch_size=50)
    back = generate(model, classes.flip(0), Sampling(), seeds.flip(0), batch_size=50).flip(0)
    assert (back == expected).all(-1).float().mean() >= 0.999
    assert len(torch.unique(expected, dim=0)) > 990


def teacher_forced(model: LlamaGen, tokens: Tensor, cond: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.output(model.hidden(tokens, cond)).float()


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_greedy_tokens_are_the_most_likely_ones_without_a_cache(model, cfg_scale):
    tokens = generate(model, CLASSES, Sampling(temperature=0, cfg_scale=cfg_scale), SEEDS)
    logits = teacher_forced(model, tokens, CLASSES)
    if cfg_scale > 1:
        null = teacher_forced(model, tokens, torch.full_like(CLASSES, model.spec.null_label))
        logits = null + cfg_scale * (logits - null)
    top = logits.topk(2, dim=-1).values
    assert (top[..., 0] - top[..., 1]).min() > 1e-4, "no tie that rounding could turn"
    assert torch.equal(tokens, logits.argmax(-1))


def test_scores_are_the_log_probs_that_tokens_were_drawn_with(model, monkeypatch):
    _, logits = watch(model, monkeypatch)
    tokens = generate(model, CLASSES, Sampling(), SEEDS, batch_size=24)
    drawn_with = torch.cat(logits, dim=1).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    with torch.inference_mode():
        scored, wrong = model(tokens, CLASSES), model(tokens, (CLASSES + 1) % 3)
    torch.testing.assert_close(scored, drawn_with, rtol=0, atol=1e-5)
    torch.testing.assert_close(scored.sum(-1), drawn_with.sum(-1), rtol=1e-6, atol=1e-5)
    assert (wrong.sum(-1) < scored.sum(-1)).float().mean() > 0.9, "an image is likelier under its own condition"


def test_without_guidance_half_the_rows_go_through_the_model(model, monkeypatch):
    rows, _ = watch(model, monkeypatch)
    counts = {}
    for cfg_scale in (1.0, 0.5, 1.5):
        rows.clear()
        sampling = Sampling(cfg_scale=cfg_scale)
        generate(model, CLASSES, sampling, SEEDS, batch_size=24)
        assert len(rows) == model.spec.num_tokens
        assert sum(rows) / 24 == calls_per_image(model, sampling)
        counts[cfg_scale] = sum(rows)
    assert counts[0.5] == counts[1.0] == counts[1.5] / 2


@pytest.mark.parametrize("name", ["plain", "greedy", "filtered"])
def test_guidance_of_scale_one_is_no_guidance(model, name, monkeypatch):
    rows, _ = watch(model, monkeypatch)
    unguided = SAMPLINGS[name]
    expected = generate(model, CLASSES, unguided, SEEDS, batch_size=24)
    # The smallest scale above 1: the guided path, with its null pass, whose logits differ by rounding.
    guided = replace(unguided, cfg_scale=1 + 2**-52)
    assert guided.guided
    assert torch.equal(generate(model, CLASSES, guided, SEEDS, batch_size=24), expected)
    assert rows == [24] * 16 + [48] * 16


def test_an_interval_guides_the_first_tokens_only(model, monkeypatch):
    seen: list[Tensor] = []

    def watched(logits_RV: Tensor, uniforms_R: Tensor, sampling: Sampling) -> Tensor:
        seen.append(logits_RV)
        return draw(logits_RV, uniforms_R, sampling)

    monkeypatch.setattr(generation, "draw", watched)
    tokens = generate(model, CLASSES, Sampling(cfg_scale=3.0, cfg_interval=4), SEEDS, batch_size=24)
    plain = teacher_forced(model, tokens, CLASSES)
    off = (torch.stack(seen, dim=1) - plain).abs().amax(dim=(0, 2))
    assert off[:6].min() > 0.1
    assert off[6:].max() < 1e-4


LOGITS = torch.randn(3, 24, generator=torch.Generator().manual_seed(4)) * 2


@pytest.mark.parametrize("name", ["plain", "filtered", "cold", "top two"])
def test_draws_follow_the_filtered_probabilities(name):
    samplings = {**SAMPLINGS, "cold": Sampling(temperature=0.5), "top two": Sampling(top_k=2)}
    sampling, n = samplings[name], 20_000
    probs = filtered_probs(LOGITS, sampling)
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for row in range(len(LOGITS)):
        drawn = draw(LOGITS[row].expand(n, -1), grid, sampling)
        # Inverse CDF: evenly spread uniforms fall on each token in proportion, but for one at each edge.
        counts = torch.bincount(drawn, minlength=24)
        assert (counts - n * probs[row].double()).abs().max() < 1.01
        assert (drawn.diff() >= 0).all()
        assert not counts[probs[row] == 0].any()


@pytest.mark.parametrize("name", ["plain", "filtered"])
def test_the_extreme_uniforms_draw_possible_tokens(name):
    sampling = SAMPLINGS[name]
    probs = filtered_probs(LOGITS, sampling)
    for uniform in (0.0, 2.0**-53, 1 - 2.0**-32, 1 - 2.0**-53):
        drawn = draw(LOGITS, torch.full((3,), uniform, dtype=torch.float64), sampling)
        assert (probs.gather(1, drawn[:, None]) > 0).all()


def test_first_tokens_over_many_seeds_follow_the_model(model):
    n = 12_000
    tokens = generate(model, torch.ones(n, dtype=torch.int64), Sampling(), torch.arange(n), batch_size=1000)
    first = teacher_forced(model, tokens[:1], torch.tensor([1]))[0, 0].softmax(-1).double().numpy()
    counts = np.bincount(tokens[:, 0].numpy(), minlength=24)
    chi_square = ((counts - n * first) ** 2 / (n * first)).sum()
    # 23 degrees of freedom: mean 23, standard deviation 6.8.
    assert n * first.min() > 5
    assert chi_square < 23 + 5 * 6.8
