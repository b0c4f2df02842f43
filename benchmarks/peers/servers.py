"""Every server of the comparison: how it is started, when it is ready, how it is asked."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

from benchmarks.measure import processes, tree, tree_cpu_seconds
from benchmarks.peers import venvs
from benchmarks.peers.flights import Flights, environment
from perennial import process

HERE = Path(__file__).parent
CPUS = len(os.sched_getaffinity(0))
READY_SECONDS = 120.0
STOP_SECONDS = 10.0
Rows = Sequence[Mapping[str, object]]


class Server(NamedTuple):
    """One of them, not started."""

    name: str
    label: str
    setting: str
    argv: tuple[str, ...]  # {port} stands for the port
    environment: dict[str, str]
    ready_path: str
    path: str = "/predict"
    logs: bool = False  # keeps a prediction log
    body: Callable[[Rows], bytes] = lambda rows: json.dumps({"rows": list(rows)}).encode()


class Running:
    """A server of ours to end, in a session of its own, its output in a log beside the others'."""

    def __init__(self, server: Server, folder: Path, logs: Path) -> None:
        self.server = server
        self.port = _free_port()
        self.log = logs / f"{server.name}.log"
        argv = [part.format(port=self.port) for part in server.argv]
        began = time.perf_counter()
        with self.log.open("ab") as sink:
            self._popen = subprocess.Popen(
                argv,
                cwd=folder,
                env=server.environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait(began + READY_SECONDS)
        except BaseException:
            self.stop()
            raise
        self.ready_seconds = time.perf_counter() - began

    def _wait(self, until: float) -> None:
        request = f"GET {self.server.ready_path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        while time.perf_counter() < until:
            if self._popen.poll() is not None:
                break
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=2) as client:
                client.sendall(request.encode())
                if client.recv(64)[9:12] == b"200":
                    return
            time.sleep(0.005)
        tail = self.log.read_text(errors="replace").strip().splitlines()[-3:]
        raise RuntimeError(f"{self.server.label} did not become ready: {' | '.join(tail)} (see {self.log})")

    def cpu_seconds(self) -> float:
        """Of all its processes since its start."""
        return tree_cpu_seconds(self._popen.pid, processes())

    def rss_mb(self) -> list[float]:
        """Of each of its processes, the largest first."""
        sizes = []
        for pid in tree(self._popen.pid, processes()):
            with suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text()
                sizes += [int(line.split()[1]) / 1024 for line in status.splitlines() if "VmRSS" in line]
        return sorted(sizes, reverse=True)

    def log_counts(self) -> tuple[int, int]:
        """Rows that our server's prediction log accepted and dropped since its start; a peer has none."""
        if not self.server.logs:
            return 0, 0
        with urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        accepted, dropped = (
            re.search(rf"^perennial_predictions_{name}_total{{.*}} (\S+)$", text, re.MULTILINE)
            for name in ("logged", "dropped")
        )
        assert accepted and dropped, text
        return int(float(accepted[1])), int(float(dropped[1]))

    def stop(self) -> None:
        """SIGTERM, and SIGKILL to whatever of it is left."""
        self._popen.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


def ours(flights: Flights, work: Path) -> list[Server]:
    """Our server with the compiled model and with the original, and its protocol with no work to do."""

    def serve(name: str, label: str, release: Path) -> Server:
        argv = [
            str(flights.python),
            *("-m", "serving.server", "--release", str(release), "--port", "{port}"),
            *("--environment", "test", "--prediction-log", f"file://{work / name / 'log'}"),
            *("--spool", str(work / name / "spool")),
        ]
        setting = f"{CPUS} workers, validation, prediction log and metrics on"
        return Server(name, label, setting, tuple(argv), environment(), "/health/ready", logs=True)

    empty = (str(flights.python), str(HERE / "empty.py"), "{port}")
    return [
        serve("ours", "Perennial", flights.compiled),
        # Right after ours: they are compared, and are the fastest to feel what else the machine does.
        Server("empty", "empty handler", f"{CPUS} workers, our protocol", empty, environment(), "/"),
        serve("ours_original", "Perennial, not compiled", flights.original),
    ]


def peers(flights: Flights, out: Path, wanted: Callable[[str], bool]) -> list[Server]:
    """The others that can be installed here; of one that cannot, why."""
    found = []
    for name, make in PEERS.items():
        if not wanted(name):
            continue
        try:
            found.append(make(flights, venvs.make(name, out / "venvs"), out))
        except Exception as error:
            print(f"{name} cannot be measured: {error}")
    return found


def _environment(flights: Flights, python: Path, **extra: str) -> dict[str, str]:
    path = f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    schema = flights.compiled / "schema.json"
    return environment(MODEL=str(flights.pipeline), SCHEMA=str(schema), **extra) | {"PATH": path}


def _mlflow(flights: Flights, python: Path, out: Path) -> Server:
    model = flights.pipeline.with_name(f"mlflow-{python.parents[1].name}")
    if not (model / "MLmodel").is_file():
        argv = [str(python), str(HERE / "mlflow_model.py"), str(flights.pipeline), str(model)]
        process.capture(argv, cwd=out, environment=_environment(flights, python), timeout_seconds=120)
    command = ("-m", "mlflow", "models", "serve", "--env-manager", "local", "--host", "127.0.0.1")
    return Server(
        "mlflow",
        "MLflow",
        "mlflow models serve, its default of 1 worker, model without signature",
        (str(python), *command, "--model-uri", str(model), "--port", "{port}"),
        _environment(flights, python),
        "/ping",
        path="/invocations",
        body=_dataframe_split,
    )


def _dataframe_split(rows: Rows) -> bytes:
    columns = list(rows[0])
    body: dict[str, Any] = {"columns": columns, "data": [[row[name] for name in columns] for row in rows]}
    return json.dumps({"dataframe_split": body}).encode()


def _fastapi(flights: Flights, python: Path, out: Path) -> Server:
    del out
    command = ("-m", "uvicorn", "--app-dir", str(HERE), "fastapi_server:app", "--port", "{port}")
    return Server(
        "fastapi",
        "FastAPI + uvicorn",
        f"{CPUS} workers, pydantic rows, no access log",
        (str(python), *command, "--workers", str(CPUS), "--no-access-log", "--log-level", "warning"),
        _environment(flights, python),
        "/health",
    )


def _flask(flights: Flights, python: Path, out: Path) -> Server:
    del out
    command = ("-m", "gunicorn", "--chdir", str(HERE), "flask_server:app", "--bind", "127.0.0.1:{port}")
    return Server(
        "flask",
        "Flask + gunicorn",
        f"{CPUS} sync workers",
        (str(python), *command, "--workers", str(CPUS), "--log-level", "warning"),
        _environment(flights, python),
        "/health",
    )


def _bentoml(flights: Flights, python: Path, out: Path) -> Server:
    command = ("-m", "bentoml", "serve", "bentoml_server:Flights", "--working-dir", str(HERE))
    home = out / "bentoml"
    home.mkdir(exist_ok=True)
    return Server(
        "bentoml",
        "BentoML",
        f"{CPUS} workers, no batching",
        (str(python), *command, "--host", "127.0.0.1", "--port", "{port}"),
        _environment(flights, python, BENTOML_HOME=str(home), BENTOML_DO_NOT_TRACK="True"),
        "/readyz",
    )


def _litserve(flights: Flights, python: Path, out: Path) -> Server:
    del out
    return Server(
        "litserve",
        "LitServe",
        f"{CPUS} workers, no batching (its default)",
        (str(python), str(HERE / "litserve_server.py"), "{port}"),
        _environment(flights, python),
        "/health",
    )


PEERS: dict[str, Callable[[Flights, Path, Path], Server]] = {
    "mlflow": _mlflow,
    "fastapi": _fastapi,
    "flask": _flask,
    "bentoml": _bentoml,
    "litserve": _litserve,
}
