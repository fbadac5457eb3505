"""A real S3 server on loopback (Linux): OpenStack Swift with its s3api, four processes.

Reads nothing; writes the configuration, the rings, the objects and one log per process under a
state directory, and ends only the processes it started, by their pid. Swift lives in an
environment of its own (`make .venv-swift/.installed`), so this file imports the stdlib and
botocore only. To look around by hand: `python tests/s3/swift_server.py STATE_DIR`.
"""

from __future__ import annotations

import configparser
import contextlib
import ctypes
import http.client
import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

ACCESS_KEY = "test:tester"
SECRET_KEY = "testsecret"
REGION = "us-east-1"
BACKENDS = ("account", "container", "object")
SWIFT_BIN = Path(__file__).resolve().parents[2] / ".venv-swift" / "bin"
C_LIBRARY = ctypes.CDLL(None)

# One replica on a busy two-core machine: Swift's half-second timeouts would read a slow answer
# as a dead node, and a listing updated late stays wrong, for no updater daemon runs here.
PATIENCE = {
    "conn_timeout": "30",
    "node_timeout": "60",
    "container_update_timeout": "60",
    "error_suppression_limit": "1000000",
}
# No cache filter: with signed S3 requests nothing in this pipeline needs memcached.
PROXY_FILTERS = (
    *("catch_errors", "gatekeeper", "proxy-logging", "listing_formats", "bulk", "s3api"),
    *("tempauth", "copy", "slo", "dlo", "versioned_writes", "symlink"),
)
# Listings come in short pages, as those of large buckets do.
FILTER_OPTIONS = {
    "s3api": {
        "location": REGION,
        "s3_acl": "false",
        "check_bucket_owner": "false",
        "max_bucket_listing": "50",
    },
    "tempauth": {"user_" + ACCESS_KEY.replace(":", "_"): f"{SECRET_KEY} .admin"},
    "versioned_writes": {"allow_object_versioning": "true"},
}
# Run by Swift's own interpreter: argv is the folder, then one name and port per backend.
BUILD_RINGS = """
import sys
from swift.common.ring import RingBuilder
folder, *pairs = sys.argv[1:]
for name, port in zip(pairs[::2], map(int, pairs[1::2])):
    ring = RingBuilder(4, 1, 1)
    ring.add_dev(dict(region=1, zone=1, weight=1.0, ip="127.0.0.1", port=port, device="d1",
                      replication_ip="127.0.0.1", replication_port=port, meta=""))
    ring.rebalance(seed=0)
    ring.get_ring().save(f"{folder}/{name}.ring.gz")
"""


@dataclass(frozen=True)
class Endpoint:
    """Where the server answers, and with which keys."""

    url: str
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY
    region: str = REGION


class ServerFailed(RuntimeError):
    """The server did not come up; the message ends with the tails of its logs."""


@contextlib.contextmanager
def running_swift(state_dir: Path, swift_bin: Path, *, deadline_s: float = 90) -> Iterator[Endpoint]:
    """Start Swift with its state under the empty `state_dir`; yield once it answers S3 requests."""
    if not (swift_bin / "swift-proxy-server").exists():
        raise ServerFailed(f"no Swift in {swift_bin}: run `make test-s3`, which installs it")
    state_dir = state_dir.resolve()
    check_extended_attributes(state_dir)
    ports = dict(zip((*BACKENDS, "proxy"), free_ports(4), strict=True))
    endpoint = Endpoint(f"http://127.0.0.1:{ports['proxy']}")
    write_configuration(state_dir, ports)
    command = [swift_bin / "python", "-c", BUILD_RINGS, state_dir / "etc"]
    command += [str(word) for name in BACKENDS for word in (name, ports[name])]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=deadline_s)

    processes: dict[str, subprocess.Popen[bytes]] = {}
    ends_at = time.monotonic() + deadline_s
    try:
        for name in ports:
            processes[name] = start(name, state_dir, swift_bin)
        # The proxy must not be asked before the backends answer: it would write them off.
        for name in BACKENDS:
            until(lambda port=ports[name]: speaks_http(port), ends_at, processes, state_dir)
        until(lambda: lists_buckets(endpoint), ends_at, processes, state_dir)
        yield endpoint
    finally:
        stop(processes.values())


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago: held together, so that they differ, then released."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def check_extended_attributes(folder: Path) -> None:
    """Fail early where Swift could not keep an object's metadata."""
    try:
        os.setxattr(folder, "user.cca", b"1")
    except OSError as error:
        raise ServerFailed(
            f"the file system of {folder} keeps no extended attributes, which Swift needs: "
            "point TMPDIR at one that does"
        ) from error


def write_configuration(state_dir: Path, ports: dict[str, int]) -> None:
    """Write swift.conf and the four servers' own files under `state_dir`/etc."""
    etc = state_dir / "etc"
    for folder in (etc, state_dir / "dev" / "d1", state_dir / "log"):
        folder.mkdir(parents=True)
    write_ini(
        etc / "swift.conf",
        {
            "swift-hash": {"swift_hash_path_prefix": "cca", "swift_hash_path_suffix": "cca"},
            "storage-policy:0": {"name": "Policy-0", "default": "yes"},
        },
    )
    shared = {
        "bind_ip": "127.0.0.1",
        "workers": "0",
        "user": pwd.getpwuid(os.geteuid()).pw_name,
        "swift_dir": str(etc),
        "log_level": "WARNING",
        **PATIENCE,
    }
    disk = {"devices": str(state_dir / "dev"), "mount_check": "false", "disable_fallocate": "true"}
    for name in BACKENDS:
        sections = {
            "DEFAULT": {**shared, **disk, "bind_port": str(ports[name])},
            "pipeline:main": {"pipeline": f"{name}-server"},
            f"app:{name}-server": {"use": f"egg:swift#{name}"},
        }
        write_ini(etc / f"{name}-server.conf", sections)

    proxy = {
        "DEFAULT": {**shared, "bind_port": str(ports["proxy"])},
        "pipeline:main": {"pipeline": " ".join((*PROXY_FILTERS, "proxy-logging", "proxy-server"))},
        "app:proxy-server": {
            "use": "egg:swift#proxy",
            "account_autocreate": "true",
            "allow_account_management": "true",
        },
    }
    for name in PROXY_FILTERS:
        options = FILTER_OPTIONS.get(name, {})
        proxy[f"filter:{name}"] = {"use": f"egg:swift#{name.replace('-', '_')}", **options}
    write_ini(etc / "proxy-server.conf", proxy)


def write_ini(path: Path, sections: dict[str, dict[str, str]]) -> None:
    """Write one configuration file in the form that PasteDeploy reads."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_dict(sections)
    with path.open("w") as file:
        parser.write(file)


def start(name: str, state_dir: Path, swift_bin: Path) -> subprocess.Popen[bytes]:
    """Start one of the four servers; what it says goes to log/`name`.log."""
    configuration = state_dir / "etc" / f"{name}-server.conf"
    with (state_dir / "log" / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [swift_bin / f"swift-{name}-server", configuration, "--verbose"],
            env={**os.environ, "SWIFT_DIR": str(state_dir / "etc")},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=end_with_parent,
        )


def end_with_parent() -> None:
    """In the child: have Linux end this process when the one that started it is killed."""
    pr_set_pdeathsig = 1
    C_LIBRARY.prctl(pr_set_pdeathsig, signal.SIGTERM)


def until(
    answers: Callable[[], bool],
    ends_at: float,
    processes: dict[str, subprocess.Popen[bytes]],
    state_dir: Path,
) -> None:
    """Poll `answers` until it is true; fail as soon as a process ends, or at the deadline."""
    while not answers():
        ended = [name for name, process in processes.items() if process.poll() is not None]
        if ended:
            raise ServerFailed(f"Swift's {ended[0]} server ended by itself{log_tails(state_dir)}")
        if time.monotonic() > ends_at:
            raise ServerFailed(f"Swift gave no answer in time{log_tails(state_dir)}")
        time.sleep(0.1)


def speaks_http(port: int) -> bool:
    """Whether a server on this port answers an HTTP request, with whatever status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/")
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


def lists_buckets(endpoint: Endpoint) -> bool:
    """Whether a signed ListBuckets succeeds: the proxy, the signature and the account server."""
    client = botocore.session.get_session().create_client(
        "s3",
        endpoint_url=endpoint.url,
        region_name=endpoint.region,
        aws_access_key_id=endpoint.access_key,
        aws_secret_access_key=endpoint.secret_key,
        config=Config(connect_timeout=5, read_timeout=30, retries={"max_attempts": 0}, proxies={}),
    )
    try:
        client.list_buckets()
    except (BotoCoreError, ClientError):
        return False
    finally:
        client.close()
    return True


def log_tails(state_dir: Path, lines: int = 15) -> str:
    """The last lines of each log, to stand at the end of an error message."""
    tails = ""
    for log in sorted((state_dir / "log").glob("*.log")):
        said = log.read_text(errors="replace").splitlines()[-lines:]
        tails += f"\n--- {log}\n" + "\n".join(said)
    return tails


def stop(processes: Collection[subprocess.Popen[bytes]], grace_s: float = 10) -> None:
    """Ask these processes to end, then end those that did not."""
    for process in processes:
        process.terminate()
    ends_at = time.monotonic() + grace_s
    for process in processes:
        try:
            process.wait(max(0.0, ends_at - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> None:
    """Serve until Ctrl-C, and say how to reach the server."""
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/s3/swift_server.py STATE_DIR    (an empty folder)")
    with running_swift(Path(sys.argv[1]), SWIFT_BIN) as endpoint:
        settings = (
            f"AWS_ENDPOINT_URL={endpoint.url} AWS_REGION={endpoint.region}",
            f"AWS_ACCESS_KEY_ID={endpoint.access_key}",
            f"AWS_SECRET_ACCESS_KEY={endpoint.secret_key}",
        )
        sys.stdout.writelines(f"export {setting}\n" for setting in settings)
        sys.stdout.write("Ctrl-C ends the server\n")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
