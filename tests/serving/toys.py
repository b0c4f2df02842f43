"""A toy project, the trainer as a child process, and real servers on free ports."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pyarrow as pa

from serving.contract import (
    CompileRequest,
    Limits,
    Manifest,
    Request,
    Result,
    SnapshotRequest,
    TrainRequest,
)

REPOSITORY = Path(__file__).resolve().parents[2]
RELEASE_ID = "toy-0123456789ab"

PACKAGE = """
import numpy as np
import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

COLUMNS = ["distance", "delay", "carrier", "weekend", "hour"]


def load_data(as_of):
    random = np.random.default_rng(7)
    n = 500
    frame = pd.DataFrame({
        "id": np.arange(n),
        "time": pd.date_range("2013-01-01", periods=n, freq="h"),
        "distance": random.integers(100, 3000, n),
        "delay": np.where(random.random(n) < 0.1, np.nan, random.normal(5, 10, n)),
        "carrier": random.choice(["AA", "UA", "DL"], n),
        "weekend": random.random(n) < 0.3,
        "hour": pd.array(np.where(random.random(n) < 0.1, None, random.integers(0, 24, n)), dtype="Int64"),
        "planned": pd.date_range("2013-01-01", periods=n, freq="h", tz="UTC"),
    })
    frame["late"] = ((frame.distance / 3000 + frame.weekend + random.random(n)) > 1.2).astype(int)
    return frame.set_index("id", drop=False)


class Model:
    def produce_model(self, data):
        self.dtypes = {name: str(dtype) for name, dtype in data.dtypes.items()}
        encode = make_column_transformer(
            (OneHotEncoder(handle_unknown="ignore"), ["carrier"]),
            (StandardScaler(), ["distance", "delay", "hour"]),
            remainder="drop",
        )
        self.pipeline = make_pipeline(encode, LogisticRegression(C=0.5))
        self.pipeline.fit(self._filled(data), data["late"])

    def predict(self, rows):
        different = {n: str(t) for n, t in rows.dtypes.items() if str(t) != self.dtypes[n]}
        if different:
            raise TypeError(f"dtypes differ from training: {different}")
        return self.pipeline.predict_proba(self._filled(rows))[:, 1]

    def _filled(self, rows):
        return rows.assign(delay=rows.delay.fillna(0.0), hour=rows.hour.fillna(12.0))
"""
# The same, with nothing around its estimator: what can be compiled.
COMPILABLE = (
    PACKAGE[: PACKAGE.index("class Model")]
    + """
class Model:
    def produce_model(self, data):
        encode = make_column_transformer(
            (OneHotEncoder(handle_unknown="ignore"), ["carrier", "weekend"]),
            (make_pipeline(SimpleImputer(), StandardScaler()), ["distance", "delay", "hour"]),
            remainder="drop",
        )
        self.pipeline = make_pipeline(encode, LogisticRegression(C=0.5))
        self.pipeline.fit(data, data["late"])

    def predict(self, rows):
        return self.pipeline.predict_proba(rows)[:, 1]
"""
).replace("from sklearn.linear_model", "from sklearn.impute import SimpleImputer\nfrom sklearn.linear_model")
FEATURES = ("distance", "delay", "carrier", "weekend", "hour", "planned")
ROW: dict[str, Any] = {
    "distance": 1200,
    "delay": 3.5,
    "carrier": "UA",
    "weekend": False,
    "hour": 7,
    "planned": "2013-01-05T07:00:00+00:00",
}


def child_environment(**more: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def write_package(source: Path, code: str = PACKAGE, name: str = "toy") -> Path:
    (source / name).mkdir(parents=True, exist_ok=True)
    (source / name / "__init__.py").write_text(code)
    return source


def run_trainer(request: Request, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "request.json"
    path.write_bytes(msgspec.json.encode(request))
    return subprocess.run(
        [sys.executable, "-m", "serving.trainer", str(path)],
        cwd=folder,
        env=child_environment(**environment),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def result_of(path: str) -> Result:
    return msgspec.json.decode(Path(path).read_bytes(), type=Result)


def snapshot_request(source: Path, folder: Path) -> SnapshotRequest:
    return SnapshotRequest(
        source=str(source),
        package="toy",
        as_of="2013-02-01",
        parquet_path=str(folder / "snapshot.parquet"),
        result_path=str(folder / "snapshot.json"),
    )


def compile_request(source: Path, toy: Path, snapshot: Path, **changes: Any) -> CompileRequest:
    """Of what a train_request with `output=toy` wrote."""
    request = CompileRequest(
        source=str(source),
        package="toy",
        trained=str(toy),
        parquet_path=str(snapshot),
        time_column="time",
        holdout_start="2013-01-18T00:00:00",
        holdout_rows=None,
        compile=True,
        tolerance=1e-9,
        seed=3,
        output=str(toy / "serving"),
        result_path=str(toy / "compile.json"),
    )
    return msgspec.structs.replace(request, **changes)


def train_request(source: Path, snapshot: Path, folder: Path, **changes: Any) -> TrainRequest:
    request = TrainRequest(
        source=str(source),
        package="toy",
        parquet_path=str(snapshot),
        target="late",
        time_column="time",
        holdout_start="2013-01-18T00:00:00",
        holdout_rows=None,
        keys=("id",),
        features=FEATURES,
        carry=("carrier",),
        seed=3,
        golden_rows=20,
        output=str(folder / "output"),
        result_path=str(folder / "result.json"),
    )
    return msgspec.structs.replace(request, **changes)


# No scikit-learn, its own format, and inputs that make it slow or fail.
MOODY = """
import json
import time


class Model:
    def produce_model(self, data):
        self.mean = float(data["late"].mean())

    def predict(self, rows):
        if (rows.distance == 666).any():
            raise RuntimeError("the secret reason")
        if (rows.distance == 777).any():
            return [float("nan")] * len(rows)
        if len(rows) < 10:
            time.sleep(rows.distance.max() / 1000)
        return [self.mean] * len(rows)

    def save(self, path):
        path.write_text(json.dumps(self.mean))

    @classmethod
    def load(cls, path):
        model = cls()
        model.mean = json.loads(path.read_text())
        return model
"""


@dataclass(frozen=True)
class Toy:
    """The toy project, its snapshot, what the trainer made of it, and a release directory."""

    source: Path
    snapshot: Path
    output: Path
    release: Path
    result: Result
    said: str

    def with_limits(self, folder: Path, **limits: Any) -> Path:
        """The same release with other limits."""
        for part in ("schema.json", "golden.json", "model", "serving"):
            if (self.release / part).exists():
                (folder / part).symlink_to(self.release / part)
        (folder / "site").symlink_to(self.source)
        manifest = msgspec.structs.replace(MANIFEST, limits=Limits(**limits))
        (folder / "manifest.json").write_bytes(msgspec.json.encode(manifest))
        return folder


MANIFEST = Manifest(
    release_id=RELEASE_ID,
    project="toy",
    package="toy",
    task="binary",
    git_sha="0" * 40,
    data_fingerprint="0" * 64,
    as_of="2013-02-01",
    model_sha256="0" * 64,
)


@dataclass
class Service:
    """A server process on a port of its own."""

    process: subprocess.Popen[str]
    url: str
    store: Path
    spool: Path
    lines: list[str] = field(default_factory=list)

    @property
    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20)

    def records(self) -> list[dict[str, Any]]:
        """Every row that the store holds, as a dict of its columns, by request and row."""
        rows: list[dict[str, Any]] = []
        for file in sorted(self.store.glob("predictions/*/*/*/*.arrows")):
            with pa.ipc.open_stream(file) as stream:
                metadata = {k.decode(): v.decode() for k, v in stream.schema.metadata.items()}
                rows += [metadata | row for batch in stream for row in batch.to_pylist()]
        return sorted(rows, key=lambda row: (row["request_id"], row["row"]))

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(30)


@contextlib.contextmanager
def serve(
    release: Path, folder: Path, wait: bool = True, url: str = "", **environment: str
) -> Iterator[Service]:
    store, spool = folder / "store", folder / "spool"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "serving.server", "--release", str(release), "--host", "127.0.0.1"),
            *("--port", "0", "--environment", "test", "--prediction-log", url or store.as_uri()),
            *("--spool", str(spool)),
        ],
        cwd=folder,
        env=child_environment(**environment),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    service = Service(process, "", store, spool)
    listening = threading.Event()

    def read() -> None:
        for line in process.stderr or ():
            service.lines.append(line)
            if match := re.search(r"listens on (\S+)", line):
                service.url = match[1]
                listening.set()
        listening.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert listening.wait(20) and service.url, service.lines
        if wait:
            until_ready(service)
        yield service
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)
        reader.join(5)


def until_ready(service: Service) -> None:
    deadline = time.monotonic() + 20
    with service.client as client:
        while client.get("/health/ready").status_code != 200:
            assert time.monotonic() < deadline and service.process.poll() is None, service.lines
            time.sleep(0.02)


def eventually(holds: Callable[[], object], seconds: float = 20.0) -> bool:
    """Whether something becomes true in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def compiled_release(toy: Toy, folder: Path, code: str) -> Toy:
    """A release of the toy's data by another model, which went through the compiler."""
    source = write_package(folder / "site", code)
    train = train_request(source, toy.snapshot, folder, output=str(folder))
    done = run_trainer(train, folder)
    assert done.returncode == 0, done.stderr
    request = compile_request(source, folder, toy.snapshot)
    done = run_trainer(request, folder)
    assert done.returncode == 0, done.stderr
    (folder / "manifest.json").write_bytes(msgspec.json.encode(MANIFEST))
    return Toy(source, toy.snapshot, folder, folder, result_of(request.result_path), done.stdout)
