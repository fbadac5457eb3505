"""Reads a finished evaluation, writes pairs/ and votes/: the review page on this machine until Ctrl-C or SIGTERM."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NoReturn

import uvicorn

from cca_core.config import ConfigError
from cca_core.metrics.votes import summarize
from cca_core.stages import Context
from cca_core.stages.graph import candidates
from cca_core.stages.review_pairs import Comparison, Pair, comparison, draw_pairs, read_pairs
from cca_core.stages.run import LocalExecutor
from cca_core.votes import VoteStore
from pipelines.progress import Progress
from pipelines.ray_executor import RayExecutor
from pipelines.review.publish import Publisher, summary_lines
from pipelines.review.server import review_api
from pipelines.settings import Settings
from pipelines.tracking import Tracker
from pipelines.workflow import Plan

SIGNALS = (signal.SIGINT, signal.SIGTERM)
#: Requests that are still being answered have this long when the page ends.
CLOSE_S = 5


def review_here(
    plan: Plan,
    settings: Settings,
    progress: Progress,
    *,
    num_pairs: int,
    host: str,
    port: int,
    say: Callable[[str], None],
    run_command: str,
) -> None:
    """Make the pairs unless they are there, and serve the page until a signal ends it; then say what people chose.

    Raises ConfigError where the evaluation has not finished, or nothing can listen on that address.
    """
    compared = finished_comparison(plan, run_command)
    listener = listen(host, port)
    _on_signals(_interrupt)
    with listener:
        pairs = made_pairs(plan, settings, progress, compared, num_pairs)
        votes = VoteStore(plan.store, compared.digest)
        tracker = Tracker(settings)
        parent = tracker.find_parent(plan.run_key)
        if parent is None:
            say("no MLflow run belongs to this evaluation yet: the win rate will stand in the storage alone")
        publisher = Publisher(votes, tracker, parent.info.run_id) if parent else None
        with publisher or nullcontext():
            _say_summary(votes, say)
            address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
            say(f"Review {len(pairs)} pairs at {address} (Ctrl-C ends it; votes are kept, and it can go on later)")
            serve(listener, pairs, votes, publisher.changed if publisher else lambda: None)
    say("\nended; every vote is stored")
    _say_summary(votes, say)
    say(f"Go on with: {run_command}")


def finished_comparison(plan: Plan, run_command: str) -> Comparison:
    """What is compared; ConfigError where that is not known yet, since the evaluation has not finished."""
    needed = {"baseline", *candidates(plan.recipe, "evaluate")}
    missing = [stage.spec.name for stage in plan.stages if stage.spec.name in needed and not stage.done]
    if missing:
        raise ConfigError(
            f"there is nothing to review before {' and '.join(missing)} of {plan.recipe.name} have finished: "
            f"run it first with: {run_command}"
        )
    nothing = LocalExecutor(lambda _: None, lambda *_: None)
    return comparison(Context(plan.recipe, plan.store, plan.digests, nothing))


def made_pairs(plan: Plan, settings: Settings, progress: Progress, compared: Comparison, num_pairs: int) -> list[Pair]:
    """The pairs from the storage, drawn first where they are not there: on the Ray cluster, or without one here."""
    directory = compared.directory(plan.store, num_pairs)
    if directory.manifest() is None:
        execution = plan.recipe.execution
        arguments = {"compared": compared, "store": plan.store, "num_pairs": num_pairs, "device": execution.device}
        progress.start_stage("pairs", f"{num_pairs} pairs of images, one of each model")
        if settings.ray_address:
            executor = RayExecutor(plan.store, execution, settings.ray_address, progress.record, progress.units)
            try:
                executor.start()
                executor.call(draw_pairs, arguments)
            finally:
                executor.stop()
        else:
            LocalExecutor(progress.record, progress.units, execution.device).call(draw_pairs, arguments)
        progress.end_stage("pairs", directory.uri)
    return read_pairs(directory)


def serve(listener: socket.socket, pairs: list[Pair], votes: VoteStore, on_vote: Callable[[], None]) -> None:
    """Serve the page on an open socket until a signal."""
    config = uvicorn.Config(
        review_api(pairs, votes, on_vote),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=CLOSE_S,
    )
    # uvicorn ends on these signals, and then raises them once more.
    _on_signals(lambda *_: None)
    uvicorn.Server(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on ``host:port``; ConfigError where nothing can."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"nothing can listen on {host}:{port} ({reason.lower()}): choose with --host and --port"
        ) from error


def _say_summary(votes: VoteStore, say: Callable[[str], None]) -> None:
    for line in summary_lines(summarize(votes.read())):
        say(line)


def _on_signals(handler: Any) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt
