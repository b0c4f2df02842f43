"""The flights model, trained with the project's own machinery, as release directories that can be served."""

from __future__ import annotations

import hashlib
import json
import shutil
from datetime import date, timedelta
from pathlib import Path
from typing import NamedTuple

import msgspec

from perennial import environments, process
from perennial.installation import REPOSITORY
from perennial.store import open_store
from serving import contract

EXAMPLE = REPOSITORY / "examples" / "flights"
AS_OF = date(2013, 7, 1)
HOLDOUT_START = AS_OF - timedelta(days=28)
TARGET, TIME, KEY = "late", "scheduled", "flight_id"
TOLERANCE = 1e-9
SEED = 0


class Flights(NamedTuple):
    """Two releases of one model, compiled and as it is; the peers' pipeline; rows and their predictions."""

    python: Path  # of the model's environment
    compiled: Path
    original: Path
    pipeline: Path
    rows: list[dict[str, object]]
    predictions: list[float]
    plan: contract.Plan


def train(out: Path) -> Flights:
    """Train, compile and export; what an earlier run made of the same sources is used again."""
    store = open_store(f"file://{out / 'store'}")
    described = environments.describe(store, EXAMPLE / "requirements.lock", out / "environments")
    python = environments.make(store, described, out / "environments")
    for old in (out / "environments").glob("*/complete"):
        if old.parent != python.parents[1]:
            shutil.rmtree(old.parent)  # of another state of the serving code
    sources = sorted(
        [*(EXAMPLE / "src").rglob("*.py"), Path(__file__), Path(__file__).with_name("export.py")]
    )
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    work = out / "flights" / f"{described.fingerprint[:12]}-{digest[:12]}"
    if not (work / "flights.json").is_file():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        _make(python, work)
    found = json.loads((work / "flights.json").read_text())
    plan = (work / "compiled" / contract.SERVING_DIRECTORY / contract.PLAN_FILE).read_bytes()
    return Flights(
        python,
        work / "compiled",
        work / "original",
        work / "pipeline.joblib",
        found["rows"],
        found["predictions"],
        msgspec.json.decode(plan, type=contract.Plan),
    )


def every_flight(flights: Flights) -> tuple[int, float]:
    """Rows, and the largest difference between the original and what is served, over the whole year."""
    argv = [flights.python, Path(__file__).with_name("every_flight.py"), flights.compiled]
    said = process.capture(
        [str(part) for part in argv],
        cwd=flights.compiled.parent,
        environment=environment(),
        timeout_seconds=300,
    )
    found = json.loads(said)
    return found["rows"], found["max_abs_difference"]


def bare(flights: Flights) -> dict[str, dict[str, float]]:
    """Seconds of a call with nothing around it, by path and number of rows."""
    work = flights.compiled.parent
    argv = [flights.python, Path(__file__).with_name("bare.py"), flights.compiled, work / "flights.json"]
    said = process.capture(
        [str(part) for part in argv], cwd=work, environment=environment(), timeout_seconds=120
    )
    found: dict[str, dict[str, float]] = json.loads(said)
    return found


def _make(python: Path, work: Path) -> None:
    import pyarrow.parquet as pq

    source, parquet, trained = str(EXAMPLE / "src"), work / "snapshot.parquet", work / "trained"
    _ask(
        python,
        work,
        contract.SnapshotRequest(
            source=source,
            package="flights",
            as_of=AS_OF.isoformat(),
            parquet_path=str(parquet),
            result_path=str(work / "snapshot.json"),
        ),
    )
    apart = (TARGET, TIME, KEY)
    _ask(
        python,
        work,
        contract.TrainRequest(
            source=source,
            package="flights",
            parquet_path=str(parquet),
            target=TARGET,
            time_column=TIME,
            holdout_start=HOLDOUT_START.isoformat(),
            holdout_rows=None,
            keys=(KEY,),
            features=tuple(name for name in pq.read_schema(parquet).names if name not in apart),
            carry=(),
            seed=SEED,
            golden_rows=50,
            output=str(trained),
            result_path=str(work / "train.json"),
        ),
    )
    for name in ("compiled", "original"):
        _release(python, work, parquet, trained, name)
    export = Path(__file__).with_name("export.py")
    argv = [str(python), str(export), str(work / "compiled"), str(parquet), str(work)]
    process.capture(argv, cwd=work, environment=environment(), timeout_seconds=300)


def _release(python: Path, work: Path, parquet: Path, trained: Path, name: str) -> None:
    folder = work / name
    for part in (contract.SCHEMA_FILE, contract.GOLDEN_FILE):
        folder.mkdir(exist_ok=True)
        shutil.copy(trained / part, folder / part)
    shutil.copytree(trained / contract.MODEL_DIRECTORY, folder / contract.MODEL_DIRECTORY)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(EXAMPLE / "src", folder / contract.SITE_DIRECTORY, ignore=ignored)
    manifest = contract.Manifest(
        release_id="flights-0123456789abcdef",
        project="flights",
        package="flights",
        task="binary",
        git_sha="0" * 40,
        data_fingerprint="0" * 64,
        as_of=AS_OF.isoformat(),
        model_sha256="0" * 64,
    )
    (folder / contract.MANIFEST_FILE).write_bytes(msgspec.json.encode(manifest))
    _ask(
        python,
        work,
        contract.CompileRequest(
            source=str(EXAMPLE / "src"),
            package="flights",
            trained=str(trained),
            parquet_path=str(parquet),
            time_column=TIME,
            holdout_start=HOLDOUT_START.isoformat(),
            holdout_rows=None,
            compile=name == "compiled",
            tolerance=TOLERANCE,
            seed=SEED,
            output=str(folder / contract.SERVING_DIRECTORY),
            result_path=str(work / f"{name}.json"),
        ),
    )


def environment(**extra: str) -> dict[str, str]:
    """Of every process of this benchmark: one thread, since more slow each other down on busy cores."""
    return process.scrubbed_environment(
        OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", **extra
    )


def _ask(python: Path, work: Path, request: contract.Request) -> None:
    path = Path(request.result_path).with_suffix(".request.json")
    path.write_bytes(msgspec.json.encode(request))
    process.run(
        [str(python), "-m", "serving.trainer", str(path)],
        cwd=work,
        environment=environment(),
        timeout_seconds=600,
        log=path.with_suffix(".log"),
        what=type(request).__name__,
    )
