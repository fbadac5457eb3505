"""Reads and writes nothing: requests come and go while others are drawn, and none of it shows in a request's tokens."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
import torch
from torch import Tensor

from cca_core.config import ConfigError
from cca_core.generate import Engine, Sampling
from cca_core.models import packed
from cca_core.models.base import ARImageModel
from cca_core.models.llamagen import attention
from cca_core.models.llamagen import slots as llamagen_slots
from cca_core.models.llamagen.network import LlamaGen
from tests.unit.test_memory import small_var

SAMPLINGS = (
    Sampling(),
    Sampling(cfg_scale=2.0),
    Sampling(temperature=0.8, top_k=10),
    Sampling(cfg_scale=3.0, cfg_interval=3, top_p=0.9),
    Sampling(temperature=0),
)
SLOTS = 6


@pytest.fixture(autouse=True)
def as_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack the small models' weights and compile their attention as those of wide ones are."""
    monkeypatch.setattr(packed, "MIN_PRODUCTS", 0)
    monkeypatch.setattr(attention, "MIN_CACHED", 0)


@pytest.fixture(scope="module")
def long(random_llamagen: Callable[..., LlamaGen]) -> LlamaGen:
    """144 tokens: its cache has three buckets."""
    return random_llamagen(seed=5, num_tokens=144)


@pytest.fixture(scope="module")
def short(random_llamagen: Callable[..., LlamaGen]) -> LlamaGen:
    return random_llamagen(seed=6)


@pytest.fixture(scope="module")
def half(random_llamagen: Callable[..., LlamaGen]) -> LlamaGen:
    """It computes in bfloat16."""
    return random_llamagen(seed=5, num_tokens=144).to(torch.bfloat16)


def one(engine: Engine, class_id: int, sampling: Sampling, seed: int) -> int:
    (ticket,) = engine.submit(torch.tensor([class_id]), sampling, torch.tensor([seed]))
    return ticket


def alone(model: ARImageModel, class_id: int, sampling: Sampling, seed: int) -> Tensor:
    """The tokens of a request that nobody else is drawn with."""
    engine = Engine(model, SLOTS)
    one(engine, class_id, sampling, seed)
    while engine.busy:
        drawn = engine.step()
    return drawn[0].tokens_N


def crowded(model: ARImageModel, requests: int, seed: int) -> tuple[Engine, dict[int, tuple], dict[int, Tensor]]:
    """Requests that come at any step, some of which are cancelled; what was asked and what was drawn."""
    random, engine = Random(seed), Engine(model, SLOTS)
    asked: dict[int, tuple] = {}
    drawn: dict[int, Tensor] = {}
    left = requests
    while left or engine.busy:
        for _ in range(random.choice((0, 0, 0, 1, 2))):
            if left:
                request = random.randrange(3), random.choice(SAMPLINGS), random.randrange(1 << 40)
                asked[one(engine, *request)] = request
                left -= 1
        if asked and random.random() < 0.8 / model.spec.num_tokens:
            ticket = random.choice(list(asked))
            assert engine.cancel(ticket) == (ticket not in drawn)
            if ticket not in drawn:
                del asked[ticket]
        before = engine.used_slots
        drawn |= {done.ticket: done.tokens_N for done in engine.step()}
        assert 0 <= before <= SLOTS
        assert 0 <= engine.used_slots <= SLOTS
    return engine, asked, drawn


@pytest.mark.parametrize("name", ["short", "long", "half"])
def test_the_load_leaves_no_trace(name, request):
    model = request.getfixturevalue(name)
    engine, asked, drawn = crowded(model, 24, seed=1)
    assert drawn.keys() == asked.keys()
    assert len(asked) > 15
    assert {sampling for _, sampling, _ in asked.values()} == set(SAMPLINGS)
    for ticket, request_ in asked.items():
        assert torch.equal(drawn[ticket], alone(model, *request_)), request_
    assert (engine.used_slots, engine.waiting) == (0, 0)


def test_neighbours_at_other_positions_are_in_other_runs(long, monkeypatch):
    seen: list[int] = []
    attend = llamagen_slots.LlamaGenSlots._runs

    def noted(self, at_S: Tensor) -> list:
        runs = attend(self, at_S)
        seen.append(len(runs))
        assert [row for rows, _, _ in runs for row in range(SLOTS)[rows]] == list(range(SLOTS))
        return runs

    monkeypatch.setattr(llamagen_slots.LlamaGenSlots, "_runs", noted)
    crowded(long, 12, seed=2)
    assert max(seen) > 1, "all rows were in one bucket: nothing was tested"


def test_many_random_schedules_leave_no_slot_behind(short):
    for seed in range(15):
        engine, asked, drawn = crowded(short, 10, seed)
        assert drawn.keys() == asked.keys()
        assert (engine.used_slots, engine.waiting, engine.busy) == (0, 0, False)


def test_what_waits_is_drawn_in_the_fewest_steps(short):
    engine = Engine(short, SLOTS)
    tickets = engine.submit(torch.arange(3 * SLOTS) % 3, Sampling(), torch.arange(3 * SLOTS))
    drawn = []
    while engine.busy:
        drawn += [done.ticket for done in engine.step()]
    assert drawn == tickets
    assert engine.steps == 3 * short.spec.num_tokens


def test_a_request_enters_as_soon_as_a_slot_is_free(short):
    engine = Engine(short, 2)
    first = one(engine, 0, Sampling(), 1)
    for _ in range(5):
        engine.step()
    second, third = one(engine, 1, Sampling(), 2), one(engine, 2, Sampling(), 3)
    ends = {}
    while engine.busy:
        for done in engine.step():
            ends[done.ticket] = engine.steps
    assert ends == {first: 16, second: 5 + 16, third: 16 + 16}


def test_a_cancelled_request_makes_room_at_the_next_step(short):
    engine = Engine(short, 2)
    guided = one(engine, 0, Sampling(cfg_scale=2.0), 1)
    waits = one(engine, 1, Sampling(cfg_scale=2.0), 2)
    engine.step()
    assert (engine.used_slots, engine.waiting) == (2, 1)
    assert engine.cancel(guided)
    assert engine.used_slots == 0
    assert not engine.cancel(guided), "it is gone"
    engine.step()
    assert (engine.used_slots, engine.waiting) == (2, 0)
    assert engine.cancel(waits)
    assert not engine.busy


def test_a_guided_request_is_not_overtaken(short):
    engine = Engine(short, 2)
    one(engine, 0, Sampling(), 1)
    engine.step()
    guided = one(engine, 0, Sampling(cfg_scale=2.0), 2)
    late = one(engine, 0, Sampling(), 3)
    order = []
    while engine.busy:
        order += [done.ticket for done in engine.step()]
    assert order[1:] == [guided, late]


def test_guidance_needs_two_slots(short):
    with pytest.raises(ConfigError, match="two slots"):
        Engine(short, 1).submit(torch.tensor([0]), Sampling(cfg_scale=2.0), torch.tensor([0]))


def test_scales_go_together_and_leave_no_trace():
    model = small_var().eval()
    with torch.no_grad():
        model.head.weight.mul_(50)  # official initialisation makes every token about as likely
    engine, asked, drawn = crowded(model, 20, seed=4)
    assert drawn.keys() == asked.keys()
    for ticket, request in asked.items():
        assert torch.equal(drawn[ticket], alone(model, *request))
    assert engine.used_slots == 0


def test_packed_weights_are_those_of_the_model_as_it_is_now(random_llamagen):
    model = random_llamagen(seed=7)
    before = alone(model, 1, Sampling(), 3)
    with torch.no_grad():
        model.layers[0].attention.wqkv.weight.mul_(-3)
        model.output.weight.mul_(4)
    after = alone(model, 1, Sampling(), 3)
    fresh = random_llamagen(seed=7)
    fresh.load_state_dict(model.state_dict())
    assert not torch.equal(after, before)
    assert torch.equal(after, alone(fresh, 1, Sampling(), 3))


def test_packed_maps_are_the_maps(random_llamagen):
    block = random_llamagen(seed=8).layers[0].feed_forward
    x = torch.randn(4, 1, block.w1.in_features, generator=torch.Generator().manual_seed(0))
    both = packed.packed_linear(block.w1, block.w3, rows=4)(x)
    expected = torch.cat([block.w1(x), block.w3(x)], dim=-1)
    torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("heads", "cached"), [(4, 4), (8, 2), (2, 1)])
def test_compiled_attention_is_attention_and_the_same_bits_for_fewer_rows(heads, cached):
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    # As the engine hands them over: parts of the cache, queries transposed.
    q, keys, values = some(5, 1, heads, 32).transpose(1, 2), some(5, cached, 100, 32), some(5, cached, 100, 32)
    assert attention.compiles(keys)
    for length in (7, 64, 100):
        unseen = torch.arange(length) > torch.tensor([1, 3, 6, 5, 2])[:, None, None, None]
        mask = torch.zeros(unseen.shape, dtype=torch.bfloat16).masked_fill_(unseen, -torch.inf)

        def attend(rows: slice, *, compiled: bool, length: int = length, mask: Tensor = mask) -> Tensor:
            return attention.attend(
                q[rows], keys[rows, :, :length], values[rows, :, :length], mask[rows], compiled=compiled
            )

        whole = attend(slice(5), compiled=True)
        torch.testing.assert_close(whole, attend(slice(5), compiled=False), rtol=0.02, atol=0.02)
        for rows in (slice(0, 1), slice(4, 5), slice(1, 4)):
            assert torch.equal(attend(rows, compiled=True), whole[rows])
