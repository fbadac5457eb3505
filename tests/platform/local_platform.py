"""Writes below a folder: a platform on this machine as a team has it, started and stopped as one (Linux, root).

    .venv/bin/python tests/platform/local_platform.py      (prints what a user sets; until Ctrl-C)

An S3 server (Swift), Postgres, an MLflow server on both (clients hold no storage keys of its artifacts), and a Ray
cluster with token authentication: a head without work and three nodes, each in a mount namespace of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import s3fs

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.mlflow_server import MlflowServer
from tests.platform.isolated import HOME
from tests.s3.swift_server import SWIFT_BIN, Endpoint, free_ports, running_swift

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
NODES, NODE_CPUS = 3, 2
OBJECT_STORE_BYTES = 256 * 1024**2
BUCKET = "platform"
USER, PASSWORD, DATABASE = "mlflow", "mlflow", "mlflow"
START_S = 300.0


@dataclass
class Platform:
    """What runs, and how a user reaches it."""

    folder: Path
    s3: Endpoint
    mlflow: MlflowServer
    token: str
    gcs_port: int
    dashboard_port: int
    environment: dict[str, str]
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """Of Ray's dashboard: what `cca submit --address` takes."""
        return f"http://{HOST}:{self.dashboard_port}"

    @property
    def gcs(self) -> str:
        """Of the cluster itself: what RAY_ADDRESS takes on its nodes."""
        return f"{HOST}:{self.gcs_port}"

    @property
    def user(self) -> dict[str, str]:
        """The variables that a user of the platform sets."""
        return {
            "RAY_API_SERVER_ADDRESS": self.address,
            "RAY_AUTH_TOKEN": self.token,
            "RAY_AUTH_MODE": "token",
            "MLFLOW_TRACKING_URI": self.mlflow.uri,
            "CCA_STORAGE": f"s3://{BUCKET}/cca",
            **s3_variables(self.s3),
        }

    def start_head(self) -> None:
        self._start(
            "head",
            *("--head", "--num-cpus", "0", "--port", str(self.gcs_port), "--include-dashboard", "true"),
            *("--dashboard-host", HOST, "--dashboard-port", str(self.dashboard_port)),
        )
        until(lambda: answers(f"{self.address}/api/version", self.token), "the head")

    def start_node(self, name: str) -> None:
        self._start(name, "--address", self.gcs, "--num-cpus", str(NODE_CPUS))

    def alive(self) -> int:
        """Nodes that the head knows and hears from."""
        request = urllib.request.Request(f"{self.address}/nodes?view=summary", headers=bearer(self.token))
        with urllib.request.urlopen(request, timeout=30) as answer:
            found = json.load(answer)["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in found)

    def kill(self, name: str) -> None:
        """kill -9 of a node and all that runs on it, as a machine that is lost."""
        process = self.nodes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def inside(self, node: str) -> tuple[str, ...]:
        """The command that runs another one on a node, in the home there."""
        return ("nsenter", f"--mount=/proc/{self.nodes[node].pid}/ns/mnt", "env", f"--chdir={HOME}")

    def files(self, node: str) -> Path:
        """The temporary files of a node, Ray's logs among them."""
        return Path(f"/proc/{self.nodes[node].pid}/root/tmp")

    def _start(self, name: str, *options: str) -> None:
        agent, grpc, runtime_env, metrics = free_ports(4)
        command = ["unshare", "--mount", sys.executable, str(Path(__file__).with_name("isolated.py"))]
        command += [str(Path(sys.executable).with_name("ray")), "start", "--block", "--node-ip-address", HOST, *options]
        command += ["--min-worker-port", "0", "--max-worker-port", "0", "--disable-usage-stats"]
        command += ["--dashboard-agent-listen-port", str(agent), "--dashboard-agent-grpc-port", str(grpc)]
        command += ["--runtime-env-agent-port", str(runtime_env), "--metrics-export-port", str(metrics)]
        command += ["--object-store-memory", str(OBJECT_STORE_BYTES)]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.nodes[name] = subprocess.Popen(
                command,
                env={**self.environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


@contextlib.contextmanager
def running_platform(folder: Path) -> Iterator[Platform]:
    """All of it, with its logs and data below the empty ``folder``; ends what it started, and nothing else."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CCA_", "MLFLOW_", "RAY_", "AWS_"))}
    environment |= {"RAY_raylet_start_wait_time_s": "120"}  # a busy machine
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": str(ROOT)}
    # As in an image: `python` has the dependencies.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    with contextlib.ExitStack() as stack:
        (folder / "swift").mkdir()
        endpoint = stack.enter_context(running_swift(folder / "swift", SWIFT_BIN))
        make_bucket(endpoint)
        database = stack.enter_context(running_postgres(folder, environment))
        mlflow = stack.enter_context(running_mlflow(folder, database, endpoint, environment))
        gcs, dashboard = free_ports(2)
        platform = Platform(folder, endpoint, mlflow, secrets.token_hex(16), gcs, dashboard, environment)
        stack.callback(lambda: [platform.kill(name) for name in list(platform.nodes)])
        platform.start_head()
        for number in range(NODES):
            platform.start_node(f"node-{number}")
        until(lambda: platform.alive() == 1 + NODES, "a node")
        yield platform


@contextlib.contextmanager
def running_postgres(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """A database of its own, as Debian's package brings it; its address."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not found:
        raise RuntimeError("no Postgres here: apt-get install postgresql")
    (port,) = free_ports(1)
    data = Path(tempfile.mkdtemp(prefix="cca-postgres-"))  # where the user postgres may go
    owner = pwd.getpwnam("postgres")
    os.chown(data, owner.pw_uid, owner.pw_gid)
    identity = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": [], "cwd": data, "env": environment}
    binaries = found[-1].parent
    try:
        (data / "password").write_text(PASSWORD)
        os.chown(data / "password", owner.pw_uid, owner.pw_gid)
        initdb = [binaries / "initdb", "-D", data / "db", "-U", USER, "-A", "scram-sha-256", "--no-sync"]
        subprocess.run([*initdb, "--pwfile", data / "password"], check=True, capture_output=True, **identity)
        command = [binaries / "postgres", "-D", data / "db", "-h", HOST, "-p", str(port), "-k", data]
        with (folder / "postgres.log").open("wb") as log, started(command, log, **identity):
            ready = [binaries / "pg_isready", "-h", HOST, "-p", str(port)]
            until(lambda: subprocess.run(ready, capture_output=True, check=False).returncode == 0, "Postgres")
            create = [binaries / "createdb", "-h", HOST, "-p", str(port), "-U", USER, DATABASE]
            subprocess.run(create, check=True, capture_output=True, env={**environment, "PGPASSWORD": PASSWORD})
            yield f"postgresql+psycopg://{USER}:{PASSWORD}@{HOST}:{port}/{DATABASE}"
    finally:
        shutil.rmtree(data, ignore_errors=True)


@contextlib.contextmanager
def running_mlflow(
    folder: Path, database: str, endpoint: Endpoint, environment: dict[str, str]
) -> Iterator[MlflowServer]:
    """An MLflow server on Postgres that hands artifacts on to S3."""
    env = {**environment, **s3_variables(endpoint), "MLFLOW_S3_ENDPOINT_URL": endpoint.url}
    (port,) = free_ports(1)
    server = MlflowServer(folder, port, env, store=database, artifacts=f"s3://{BUCKET}/mlflow")
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def started(command: list[object], log: object, **options: object) -> Iterator[None]:
    """A process group that ends with the context."""
    process = subprocess.Popen(
        list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, start_new_session=True, **options
    )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def s3_variables(endpoint: Endpoint) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint.url,
        "AWS_ACCESS_KEY_ID": endpoint.access_key,
        "AWS_SECRET_ACCESS_KEY": endpoint.secret_key,
        "AWS_DEFAULT_REGION": endpoint.region,
        "AWS_REGION": endpoint.region,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def make_bucket(endpoint: Endpoint) -> None:
    s3fs.S3FileSystem(
        key=endpoint.access_key,
        secret=endpoint.secret_key,
        client_kwargs={"endpoint_url": endpoint.url, "region_name": endpoint.region},
    ).mkdir(BUCKET)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def answers(url: str, token: str = "") -> bool:
    request = urllib.request.Request(url, headers=bearer(token))
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not start within {START_S:.0f} s: see its log")
        time.sleep(0.2)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background ignores the first
        signal.signal(number, interrupt)
    with tempfile.TemporaryDirectory(prefix="cca-platform-") as folder, running_platform(Path(folder)) as platform:
        print(f"logs: {folder}\ncluster: {platform.address}\n")  # noqa: T201
        for name, value in platform.user.items():
            print(f"export {name}={value}", flush=True)  # noqa: T201
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
