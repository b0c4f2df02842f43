"""Run the project's code in its own environment: load its data, run its tests, train, compile, predict."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from xml.etree import ElementTree

import msgspec

from perennial import process, warm
from perennial.config import Project
from perennial.errors import ChildFailed, DataError, ProjectError
from serving import contract

OnLine = Callable[[str], None]
_GOLDEN_ROWS = 50


def load_data(
    project: Project, folder: Path, python: Path, as_of: date, work: Path, on_line: OnLine | None = None
) -> Path:
    """Call the project's `load_data(as_of)`; returns the Parquet file it became."""
    parquet = work / "snapshot.parquet"
    request = contract.SnapshotRequest(
        source=str(folder / "src"),
        package=project.package,
        as_of=as_of.isoformat(),
        parquet_path=str(parquet),
        result_path=str(work / "snapshot.result.json"),
    )
    _run_trainer(
        request,
        project,
        python,
        project.config.limits.load_data_seconds,
        f"load_data({as_of})",
        work,
        on_line,
    )
    return parquet


def train(
    project: Project,
    folder: Path,
    python: Path,
    parquet: Path,
    features: tuple[str, ...],
    holdout_start: datetime | None,
    holdout_rows: int | None,
    work: Path,
    on_line: OnLine | None = None,
) -> tuple[Path, contract.Result]:
    """Train on the rows before the holdout; returns the folder with model, schema, golden rows, predictions.

    Starts from an empty folder every time: what a killed run left is never mixed with this one.
    """
    output = work / "trained"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    config = project.config
    request = contract.TrainRequest(
        source=str(folder / "src"),
        package=project.package,
        parquet_path=str(parquet),
        target=config.target,
        time_column=config.time_column,
        holdout_start=holdout_start.isoformat() if holdout_start else None,
        holdout_rows=holdout_rows,
        keys=config.entity_id,
        features=features,
        carry=config.slices,
        seed=config.seed,
        golden_rows=min(_GOLDEN_ROWS, config.service.max_rows),  # they are sent in one request
        output=str(output),
        result_path=str(work / "train.result.json"),
    )
    result = _run_trainer(request, project, python, config.limits.train_seconds, "training", work, on_line)
    return output, result


def compile_model(
    project: Project,
    folder: Path,
    python: Path,
    parquet: Path,
    trained: Path,
    holdout_start: datetime | None,
    holdout_rows: int | None,
    work: Path,
    on_line: OnLine | None = None,
) -> tuple[Path, contract.Plan]:
    """Find the fastest form of the model in `trained` that says what it says; returns the folder of the form.

    Starts from an empty folder every time, as `train` does. Raises ChildFailed when the compiler breaks: a
    model that it only cannot compile is no error, and the plan says why.
    """
    output = work / contract.SERVING_DIRECTORY
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    config = project.config
    request = contract.CompileRequest(
        source=str(folder / "src"),
        package=project.package,
        trained=str(trained),
        parquet_path=str(parquet),
        time_column=config.time_column,
        holdout_start=holdout_start.isoformat() if holdout_start else None,
        holdout_rows=holdout_rows,
        compile=config.service.compiled != "never",
        tolerance=config.service.compiled_tolerance,
        seed=config.seed,
        output=str(output),
        result_path=str(work / "compile.result.json"),
    )
    try:
        _run_trainer(request, project, python, config.limits.compile_seconds, "compiling", work, on_line)
    except ChildFailed as error:
        if not request.compile:
            raise
        without = 'set compiled = "never" under [tool.perennial.service] to serve the model as it is'
        hint = f"{error.next_command}; or {without}" if error.next_command else without
        raise ChildFailed(error.found, error.expected, hint) from error
    plan_file = output / contract.PLAN_FILE
    if not plan_file.is_file():
        raise ChildFailed(f"compiling wrote no {contract.PLAN_FILE}", "a plan, whatever the model")
    plan = msgspec.json.decode(plan_file.read_bytes(), type=contract.Plan)
    wanted = [contract.ONNX_FILE] if plan.path == "compiled" else []
    wanted += [contract.TREES_FILE] if plan.trees_from_rows else []
    for name in wanted:
        if not (output / name).is_file():
            raise ChildFailed(f"compiling wrote no {name}", "the model that its plan speaks of")
    return output, plan


def predict(
    release: Path,
    project: Project,
    python: Path,
    parquet: Path,
    from_time: datetime | None,
    last_rows: int | None,
    work: Path,
) -> Path:
    """Predictions of a released model for the newest rows of a snapshot, in row order."""
    predictions = work / "champion.parquet"
    request = contract.PredictRequest(
        release=str(release),
        parquet_path=str(parquet),
        time_column=project.config.time_column,
        from_time=from_time.isoformat() if from_time else None,
        last_rows=last_rows,
        predictions_path=str(predictions),
        result_path=str(work / "champion.result.json"),
    )
    _run_trainer(request, project, python, project.config.limits.train_seconds, "the champion", work, None)
    return predictions


class TestOutcome(msgspec.Struct, frozen=True):
    """What pytest's JUnit report counts."""

    __test__ = False

    passed: int
    failed: tuple[str, ...]
    skipped: int
    report: Path
    tail: str


def run_tests(
    project: Project, folder: Path, python: Path, work: Path, on_line: OnLine | None = None
) -> TestOutcome:
    """Run the developer's tests with pytest in the project's environment, in a copy of the project: what
    they write must not become part of the checkout that other runs share.

    A failed test is an outcome, not an exception: its report is kept before the build stops.
    Raises ProjectError when there is nothing to run, ChildFailed when pytest itself breaks.
    """
    if not (folder / "tests").is_dir():
        raise ProjectError("the project has no tests/", "at least one test that pytest collects under tests/")
    report, log = work / "tests.xml", work / "tests.log"
    for left in (report, log):
        left.unlink(missing_ok=True)
    copy = work / "tests-copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy, symlinks=True)
    code = process.run(
        [str(python), "-m", "pytest", "tests", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"],
        cwd=copy,
        environment=_environment(project, PYTHONPATH=str(copy / "src")),
        timeout_seconds=project.config.limits.tests_seconds,
        log=log,
        what="the run of the project's tests",
        allowed_codes=(0, 1, 5),  # 1: a test failed, 5: none was collected
        on_line=on_line,
        spawn=warm.spawn,
    )
    if code == 5:
        raise ProjectError("pytest found no test under tests/", "at least one test")
    if not report.is_file():
        raise ChildFailed("pytest wrote no report", f"{report.name}; see tests.log")
    lines = log.read_text(encoding="utf-8").splitlines()
    return _read_junit(report, "\n".join(lines[-process.TAIL_LINES :]))


def _read_junit(report: Path, tail: str) -> TestOutcome:
    cases = list(
        ElementTree.parse(report).iter("testcase")  # noqa: S314, expat of today bounds entities
    )
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return TestOutcome(
        passed=len(cases) - len(failed) - skipped,
        failed=tuple(failed),
        skipped=skipped,
        report=report,
        tail=tail,
    )


def _run_trainer(
    request: contract.Request,
    project: Project,
    python: Path,
    timeout_seconds: float,
    what: str,
    work: Path,
    on_line: OnLine | None,
) -> contract.Result:
    result_path = Path(request.result_path)
    result_path.unlink(missing_ok=True)
    request_path = result_path.with_suffix("").with_suffix(".request.json")
    request_path.write_bytes(msgspec.json.encode(request))
    code = process.run(
        [str(python), "-m", "serving.trainer", str(request_path)],
        cwd=work,
        environment=_environment(project),
        timeout_seconds=timeout_seconds,
        log=result_path.with_suffix("").with_suffix(".log"),
        what=what,
        allowed_codes=(0, contract.EXPLAINED_FAILURE),
        on_line=on_line,
        spawn=warm.spawn,
    )
    if not result_path.is_file():
        raise ChildFailed(f"{what} ended with code {code} and no result", "a result file")
    result = msgspec.json.decode(result_path.read_bytes(), type=contract.Result)
    if result.error is not None:
        kind = DataError if isinstance(request, contract.SnapshotRequest) else ProjectError
        where = f"{result.error.where}: " if result.error.where else ""
        raise kind(where + result.error.found, result.error.expected)
    return result


def _environment(project: Project, **extra: str) -> dict[str, str]:
    """One thread per process: OpenMP on busy cores is many times slower, and its sums are not repeatable."""
    return extra | process.scrubbed_environment(
        OMP_NUM_THREADS="1",
        OPENBLAS_NUM_THREADS="1",
        OMP_WAIT_POLICY="PASSIVE",
        PYTHONHASHSEED=str(project.config.seed),
        PYTHONUNBUFFERED="1",
    )
