"""Writes a small bundle: what a generator draws with one model, without Ray."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from cca_core.generate import Sampling
from deploy import drawing as drawing_module
from deploy.generator import Loaded, load
from tests.driver import until
from tests.service import bundle


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Loaded:
    folder = tmp_path_factory.mktemp("bundle")
    for name, data in bundle(0).items():
        (folder / name).write_bytes(data)
    return load(str(folder), "", "cpu")


ASKED = [(i % 3, i, Sampling(cfg_scale=1.5) if i % 2 else Sampling(temperature=0.9)) for i in range(40)]


async def gathered(loaded: Loaded, asked: list) -> list[np.ndarray]:
    return await asyncio.gather(*(loaded.drawing.draw(*one) for one in asked))


def test_an_image_is_the_same_alone_and_among_many(loaded):
    together = asyncio.run(gathered(loaded, ASKED))
    for index in (0, 1, 17, 38, 39):
        (alone,) = asyncio.run(gathered(loaded, ASKED[index : index + 1]))
        assert np.array_equal(alone, together[index])
    assert len({image.tobytes() for image in together}) > 20


def test_many_are_drawn_in_few_steps(loaded):
    before = loaded.drawing.engine.steps
    asyncio.run(gathered(loaded, [(0, seed, Sampling()) for seed in range(4 * drawing_module.SLOTS)]))
    # The first may begin before the others have come.
    assert loaded.drawing.engine.steps - before <= 5 * loaded.model.spec.num_tokens


def test_a_request_that_is_given_up_leaves_its_slots(loaded):
    async def give_up() -> np.ndarray:
        tasks = [asyncio.create_task(loaded.drawing.draw(*one)) for one in ASKED]
        await asyncio.sleep(0)  # they begin
        for task in tasks[1:]:
            task.cancel()
        return await tasks[0]

    expected = asyncio.run(gathered(loaded, ASKED[:1]))[0]
    before = loaded.drawing.engine.steps
    assert np.array_equal(asyncio.run(give_up()), expected)
    assert loaded.drawing.engine.steps - before <= 2 * loaded.model.spec.num_tokens, (
        "the others were drawn all the same"
    )
    assert (loaded.drawing.engine.used_slots, loaded.drawing.engine.waiting) == (0, 0)


def test_it_tells_how_full_it_is(loaded, monkeypatch):
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(loaded.drawing, "report", lambda used, waiting: told.append((used, waiting)))
    before = loaded.drawing.engine.steps
    asyncio.run(gathered(loaded, ASKED))
    assert max(used for used, _ in told) == drawing_module.SLOTS
    assert max(waiting for _, waiting in told) > 0
    assert until(lambda: told[-1] == (0, 0))
    assert len(told) < (loaded.drawing.engine.steps - before) / 2, "not at every step"


@pytest.mark.parametrize("where", ["step", "decode"])
def test_a_failure_is_told_and_the_next_request_is_drawn(loaded, where, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("out of memory")

    expected = asyncio.run(gathered(loaded, ASKED[:1]))[0]
    with monkeypatch.context() as patch:
        if where == "step":
            patch.setattr(drawing_module.Engine, "step", fails)
        else:
            patch.setattr(drawing_module, "decode_images", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            asyncio.run(gathered(loaded, ASKED[:3]))
    assert np.array_equal(asyncio.run(gathered(loaded, ASKED[:1]))[0], expected)


def test_no_thread_is_left_when_there_is_nothing_to_draw(loaded):
    asyncio.run(gathered(loaded, ASKED[:4]))
    for thread in threading.enumerate():
        if thread.name.endswith("(_run)"):
            thread.join(10)
            assert not thread.is_alive()


def test_a_worker_whose_work_breaks_works_on_what_comes_next(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # pytest would warn of the thread's end
    broken, done = threading.Event(), threading.Event()

    def work(tasks: list[str]) -> bool:
        if "break" in tasks:
            broken.set()
            raise SystemExit
        done.set()
        return False

    worker = drawing_module.Worker(work)
    worker.put("break")
    assert broken.wait(10)
    assert until(lambda: worker.put("go on") or done.wait(0.1), 10)
