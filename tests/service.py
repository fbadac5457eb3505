"""Writes to a temporary folder: bundles of small random models, and a running `cca serve` to ask."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import torch
from PIL import Image

from cca_core.bundle import BundleInfo, Part, bundle_files
from cca_core.models.llamagen.network import LlamaGen, LlamaGenSpec
from cca_core.models.llamagen.tokenizer import VQSpec, VQTokenizer
from deploy.release import APPLICATION, details, token_header
from tests.driver import Driver, until
from tests.planted_filters import Brightness, scripted, spec_of

NAME = "cca-served"
CLASSES = ("ant", "bee", "3")
SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "cfg_scale": 1.5}
ANSWER_S = 120
#: The content filter of ``filtered_bundle`` blocks images that are at least as bright, about half of them.
BRIGHT = 0.555


def bundle(seed: int, filter_data: bytes | None = None, **filter_settings: Any) -> dict[str, bytes]:
    """The files of a small LlamaGen with its tokenizer, random weights: 8x8 images of three classes; with a content
    filter, where there is one."""
    generator = torch.Generator().manual_seed(seed)
    spec = LlamaGenSpec(
        vocab_size=64, num_tokens=16, num_classes=3, dim=32, num_layers=2, num_heads=2, num_kv_heads=2, ffn_dim=64
    )
    vq = VQSpec(
        width=32, width_multipliers=(1, 1), num_res_blocks=1, latent_channels=32, codebook_size=64, codebook_dim=8
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # biases are drawn when a module is made
        model, tokenizer = LlamaGen(spec), VQTokenizer(vq)
    for parameter in (*model.parameters(), *tokenizer.parameters()):
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    info = BundleInfo(
        model=Part("llamagen", asdict(spec)),
        tokenizer=Part("llamagen", asdict(vq)),
        image_size=8,
        class_names=CLASSES,
        sampling=SAMPLING,
        filter=spec_of(filter_data, **filter_settings) if filter_data else None,
    )
    return bundle_files(info, model.state_dict(), tokenizer.state_dict(), filter_data)


def filtered_bundle() -> dict[str, bytes]:
    """``bundle(0)`` with a content filter."""
    return bundle(0, scripted(Brightness()), threshold=BRIGHT)


@dataclass(frozen=True)
class Service:
    driver: Driver
    address: str
    dashboard: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=ANSWER_S)

    def draw(self, prompt: str, *, n: int = 1, size: str = "auto", **sampling: Any) -> list[bytes]:
        """PNG files."""
        answer = self.client.images.generate(
            prompt=prompt, n=n, size=size, response_format="b64_json", extra_body=sampling
        )
        return [base64.b64decode(image.b64_json) for image in answer.data]

    def served(self) -> str:
        return self.client.models.list().data[0].id

    def generators(self) -> list[int]:
        """Process ids of the generators that are running."""
        deployment = details(self.dashboard)["applications"][APPLICATION]["deployments"]["Generator"]
        return [replica["pid"] for replica in deployment["replicas"] if replica["state"] == "RUNNING"]

    def counted(self, *names: str) -> list[int]:
        """Totals of Ray's metrics at one time; they come every few seconds."""
        found = httpx.get(f"{self.dashboard}/api/prometheus/sd", headers=token_header(), timeout=ANSWER_S).json()
        targets = [target for group in found for target in group["targets"]]
        lines = [line for target in targets for line in _metrics(target)]

        def total(name: str) -> int:
            return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"ray_{name}{{")))

        return [total(name) for name in names]


def _metrics(target: str) -> list[str]:
    """Lines of a metrics page; none where nobody listens: clusters on a machine share some ports of Ray's, and the one
    that had them may have ended."""
    try:
        return httpx.get(f"http://{target}/metrics", timeout=ANSWER_S).text.splitlines()
    except httpx.ConnectError:
        return []


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> tuple[Driver, int]:
    port = free_port()
    return Driver(folder, *arguments, verb=("serve", "--port", str(port)), own_session=True, env=env), port


def end(driver: Driver, number: signal.Signals) -> None:
    """Send the signal, and check that it ends by itself with nothing left."""
    tree = psutil.Process(driver.process.pid).children(recursive=True)
    assert any("raylet" in process.name() for process in tree), "Ray was not running: nothing was tested"
    if number == signal.SIGINT:
        os.killpg(driver.process.pid, number)  # a terminal's Ctrl-C reaches all of its processes
    else:
        driver.process.send_signal(number)
    assert driver.finish(90) == 0, driver.output
    _, alive = psutil.wait_procs(tree, timeout=20)
    assert not alive, alive
    assert "Traceback" not in driver.output


class Asking:
    """A thread that asks for the same image again and again, and keeps what was answered."""

    def __init__(self, service: Service, asked: dict[str, Any] | None = None) -> None:
        self.service, self.ended = service, threading.Event()
        self.asked = asked or {"seed": 1}
        self.models: list[str] = []
        self.failures: list[Exception] = []
        self.thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self.ended.is_set():
            try:
                self.models.append(self.service.client.images.generate(prompt="ant", extra_body=self.asked).model)
            except openai.OpenAIError as error:
                self.failures.append(error)

    def __enter__(self) -> Asking:
        self.thread.start()
        until(lambda: self.models or self.failures)
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join(ANSWER_S)
        assert not self.thread.is_alive()


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def brightness(image: np.ndarray) -> float:
    """The mean of a uint8 image, from 0 to 1: what a filter of brightness scores."""
    return float(image.astype(np.float64).mean() / 255)
