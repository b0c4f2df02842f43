"""`python -m serving.server --release DIR …`: one release behind HTTP, in several worker processes.

The parent only forks workers, starts those again that die, and passes signals on. Exits 0 after SIGTERM: no
longer ready, in-flight requests answered, prediction log flushed. Exits 3 with a message when the release
cannot be served or the port is taken.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from serving.compiled import onnxruntime, read_plan
from serving.contract import EXPLAINED_FAILURE
from serving.errors import ContractError
from serving.metrics import Shared
from serving.release import read_manifest, read_schema
from serving.worker import Options, work
from serving.workers import Workers

logger = logging.getLogger("perennial.server")


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal; the exit code of the process."""
    given = _parser().parse_args(arguments)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        manifest, schema = read_manifest(given.release), read_schema(given.release)
        plan = read_plan(given.release)
        given.spool.mkdir(parents=True, exist_ok=True)
        reserved = _reserve(given.host, given.port)
    except ContractError as error:
        sys.stderr.write(f"{error}\n")
        return EXPLAINED_FAILURE
    except OSError as error:
        sys.stderr.write(f"no folder for the prediction log's spool: {error}\nExpected: --spool, writable\n")
        return EXPLAINED_FAILURE
    host, port = reserved.getsockname()[:2]
    workers = given.workers or manifest.limits.workers or usable_cpus()
    options = Options(
        release=given.release,
        manifest=manifest,
        schema=schema,
        plan=plan,
        host=host,
        port=port,
        environment=given.environment,
        prediction_log=given.prediction_log,
        spool=given.spool,
    )
    # Once, for all workers: they share its memory and start at once.
    importlib.import_module("serving.prediction_log")
    if plan is not None and plan.path == "compiled":
        onnxruntime()

    group = Workers(
        workers, Shared(workers), lambda shared, index, again: work(options, shared, index, again)
    )
    code = group.run(manifest.limits.drain_seconds)
    logger.info("%s has stopped", manifest.release_id)
    return code


def usable_cpus(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs that this process may use: of its affinity, and of its control group's quota (version 2 or 1)."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((groups / file).read_text() for file in files).split()
            if int(quota) > 0:
                return max(1, min(cpus, round(int(quota) / int(period))))
        except (OSError, ValueError):  # no such control group, or no limit ("max")
            continue
    return cpus


def _reserve(host: str, port: int) -> socket.socket:
    """A socket that holds the port for the workers, whichever of them live; it takes no connections.

    Bound once without SO_REUSEPORT: another service on this port is an error, not a companion.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as alone:
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind((host, port))
            port = alone.getsockname()[1]
        reserved = socket.socket(family, socket.SOCK_STREAM)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind((host, port))
    except OSError as error:
        raise ContractError(
            f"cannot listen on {host}:{port}: {error.strerror}", "a free port", "--port"
        ) from error
    return reserved


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serving.server", description="Serve one release over HTTP."
    )
    parser.add_argument("--release", type=Path, required=True, help="the release directory")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True, help="0: any free one, named in the log")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: what the release says")
    parser.add_argument("--environment", required=True, help="test or production, as the log records it")
    parser.add_argument("--prediction-log", required=True, help="file:///… or s3://bucket/prefix")
    parser.add_argument(
        "--spool",
        type=Path,
        default=Path(tempfile.gettempdir()) / "perennial-spool",
        help="where predictions wait for the store; the next service with this directory ships what is left",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
