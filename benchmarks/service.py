"""Writes bundles of random weights to a folder; starts `cca serve` on one, reads its processes and its metrics."""

from __future__ import annotations

import os
import platform
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import psutil
import torch

from benchmarks.sampling import build
from cca_core.bundle import BundleInfo, Part, bundle_files
from cca_core.models.llamagen.tokenizer import VQSpec, VQTokenizer
from deploy.release import APPLICATION, deploy, deployment, details, present, wait_running

ROOT = Path(__file__).parents[1]
STOP_S, CHANGE_S, SCRAPE_S = 90, 120, 60
#: Beginnings of the names of processes, and how tables call them; the first that fits counts.
KINDS = {
    "ray::ServeReplica:cca:Generator": "generators",
    "ray::ServeReplica:cca:Ingress": "ingress",
    "ray::ProxyActor": "HTTP proxy",
    "ray::ServeController": "Serve controller",
    "": "the rest of Ray",
}


def decoder(vocab_size: int) -> VQTokenizer:
    """A small one, so that tokens are the work: two pixels a token."""
    spec = VQSpec(
        width=32,
        width_multipliers=(1, 1),
        num_res_blocks=1,
        latent_channels=32,
        codebook_size=vocab_size,
        codebook_dim=8,
    )
    torch.manual_seed(0)
    return VQTokenizer(spec).eval()


def write_bundle(folder: Path, shape: str) -> Path:
    """A bundle of a shape of benchmarks/sampling.py, random weights, sampled without guidance."""
    model = build(shape)
    tokenizer = decoder(model.spec.vocab_size)
    info = BundleInfo(
        model=Part("llamagen", asdict(model.spec)),
        tokenizer=Part("llamagen", asdict(tokenizer.spec)),
        image_size=tokenizer.spec.downsample * round(model.spec.num_tokens**0.5),
        sampling={"temperature": 1.0, "top_k": 0, "top_p": 1.0, "cfg_scale": 1.0},
    )
    bundle = folder / shape
    bundle.mkdir()
    for name, data in bundle_files(info, model.state_dict(), tokenizer.state_dict()).items():
        (bundle / name).write_bytes(data)
    return bundle


@dataclass(frozen=True)
class Service:
    """A running `cca serve`."""

    pid: int
    api: str
    dashboard: str

    def processes(self) -> list[tuple[str, psutil.Process]]:
        """All processes of the service, each with its kind."""
        found = []
        for process in psutil.Process(self.pid).children(recursive=True):
            try:
                name = (process.cmdline() or [""])[0]
            except psutil.NoSuchProcess:
                continue
            found.append((next(kind for start, kind in KINDS.items() if name.startswith(start)), process))
        return found

    def memory(self) -> dict[str, float]:
        """Resident memory in MiB, by kind of process."""
        total: dict[str, float] = defaultdict(float)
        for kind, process in self.processes():
            try:
                total[kind] += process.memory_info().rss / 2**20
            except psutil.NoSuchProcess:
                continue
        return dict(total)

    def cpu_seconds(self) -> dict[str, float]:
        """Processor time since the start, by kind of process."""
        total: dict[str, float] = defaultdict(float)
        for kind, process in self.processes():
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total[kind] += times.user + times.system
        return dict(total)

    def gauges(self, *names: str) -> dict[str, float]:
        """Sums of metrics over processes, as GET /metrics has them; what the service does not have is left out."""
        total: dict[str, float] = {}
        for line in httpx.get(f"{self.api}/metrics", timeout=SCRAPE_S).raise_for_status().text.splitlines():
            name = re.split(r"[{ ]", line, maxsplit=1)[0]
            if name in names:
                total[name] = total.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
        return total

    def generators(self) -> int:
        """Generator replicas that run."""
        replicas = details(self.dashboard)["applications"][APPLICATION]["deployments"]["Generator"]["replicas"]
        return sum(replica["state"] == "RUNNING" for replica in replicas)

    def set_autoscaling(self, **settings: float) -> None:
        """Change the generators' autoscaling_config in place."""
        config = present(self.dashboard)
        deployment(config, "Generator")["autoscaling_config"] |= settings
        deploy(self.dashboard, config)
        wait_running(self.dashboard, timeout_s=CHANGE_S)


@contextmanager
def serving(bundle: Path, *, max_replicas: int) -> Iterator[Service]:
    """`cca serve` on this machine, from its first answer on; ended afterwards."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    verb = ["serve", "--model", str(bundle), "--port", str(port), "--max-replicas", str(max_replicas)]
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true", "COLUMNS": "200"}
    process = subprocess.Popen(
        [sys.executable, "-c", "from pipelines.cli import main; main()", *verb],
        cwd=bundle.parent,
        env={**os.environ, **quiet, "PYTHONPATH": search},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C reaches this script, which then ends it
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("ready: "):
                break
        else:
            sys.exit(f"`cca serve` did not come up:\n{''.join(said)}")
        dashboard = re.search(r"Ray dashboard ([^\s)]+)", "".join(said))
        assert dashboard, said
        yield Service(process.pid, f"http://127.0.0.1:{port}", dashboard[1])
    finally:
        tree = [process, *psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:  # what was measured counts all the same
            for one in tree:
                with suppress(psutil.NoSuchProcess):
                    one.kill()


def provenance(script: str) -> str:
    """Command, commit and hardware of a run."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    command = shlex.join(["python", "-m", f"benchmarks.{script}", *sys.argv[1:]])
    return f"`{command}`, commit {commit.strip()}, {platform.machine()}, {os.cpu_count()} CPU cores"
