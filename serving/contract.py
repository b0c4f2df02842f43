"""What Perennial and a process in a model's environment say to each other: files and requests, nothing else.

Perennial starts `python -m serving.trainer REQUEST.json` in the project's environment. The process writes
`Result` as JSON to `result_path` and exits 0, or writes a `Result` with `error` and exits 3 when it can
explain what is wrong. Any other exit is a crash; the traceback is on its standard error.
"""

from __future__ import annotations

from typing import Literal

import msgspec

ColumnType = Literal["integer", "number", "string", "boolean", "timestamp"]

# The files of a release directory, as the server and the trainer see it on disk.
MANIFEST_FILE = "manifest.json"
SCHEMA_FILE = "schema.json"
GOLDEN_FILE = "golden.json"
MODEL_DIRECTORY = "model"
SERVING_DIRECTORY = "serving"  # how the model is served: the plan, and the compiled model where there is one
PLAN_FILE = "plan.json"
ONNX_FILE = "model.onnx"
TREES_FILE = "trees.npz"  # the trees of a compiled model once more, for calls of many rows
SITE_DIRECTORY = "site"  # the project's wheel, unpacked

EXPLAINED_FAILURE = 3  # exit code of a process whose Result holds an error

RELEASE_HEADER = "x-perennial-release"


class Column(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One column: `timestamp` travels as an ISO 8601 string, everything else as its JSON type."""

    name: str
    type: ColumnType
    nullable: bool
    utc: bool = False  # a timestamp with an offset; without, wall-clock time


class InputSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a request's row may hold: every feature, and any of the keys (logged, not for the model)."""

    features: tuple[Column, ...]
    keys: tuple[Column, ...] = ()


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a service accepts and how it ends."""

    max_rows: int = 1000
    max_body_bytes: int = 8_388_608
    max_concurrent_requests: int = 256
    drain_seconds: float = 30.0
    workers: int = 0  # processes; 0: one per CPU that the service may use


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a server has to know of the release it serves."""

    release_id: str
    project: str
    package: str  # import name of the model package
    task: str
    git_sha: str
    data_fingerprint: str
    as_of: str
    model_sha256: str
    limits: Limits = msgspec.field(default_factory=Limits)


class Lookup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A column of few values, of which the compiled model is given codes.

    The code of `values[i]` is i, of any other value `len(values)`, of null `len(values) + 1`.
    """

    column: str
    values: tuple[str | float | bool, ...]


class Parity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far the compiled model was from the original, on all rows that both predicted.

    The difference is absolute for predictions up to 1, relative to the original's above.
    """

    rows: int
    edge_rows: int
    max_abs_difference: float
    tolerance: float


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a release is served: by the compiled model or by the original, and whether requests may be batched.

    The compiled model is an ONNX graph with the inputs `numbers` (float64, [rows, len(numbers)], null is NaN)
    and `codes` (int64, [rows, len(lookups)]; see `Lookup`) and the output `prediction` (float64, [rows]). An
    input of no columns is left out of the graph. With `trees_from_rows` its trees are in `trees.npz` as well,
    in a form that is faster for calls of so many rows or more.
    """

    path: Literal["compiled", "original"]
    reason: str  # why this path, one sentence
    batching: bool  # rows of several requests may be predicted by one call
    batching_reason: str
    numbers: tuple[str, ...] = ()
    lookups: tuple[Lookup, ...] = ()
    trees_from_rows: int | None = None
    parity: Parity | None = None

    @property
    def columns(self) -> list[str]:
        """What a row of the compiled model holds."""
        return [*self.numbers, *(lookup.column for lookup in self.lookups)]


class Golden(msgspec.Struct, frozen=True):
    """Rows of the holdout and what the model said of them in the process that trained it."""

    rows: list[dict[str, object]]
    predictions: list[object]


class SnapshotRequest(msgspec.Struct, frozen=True, tag="snapshot", forbid_unknown_fields=True):
    """Call `load_data(as_of)` of the package and write what it returns to `parquet_path`."""

    source: str  # the folder that holds the package, put first on sys.path
    package: str
    as_of: str  # ISO date
    parquet_path: str
    result_path: str


class TrainRequest(msgspec.Struct, frozen=True, tag="train", forbid_unknown_fields=True):
    """Train on the rows before `holdout_start`, save, reload, predict the holdout with the reloaded model.

    Writes to `output`: `model/`, `schema.json`, `golden.json`, `holdout.parquet` (the target, keys, time
    column and slice columns of the holdout's rows in snapshot order, and `prediction`). The model is handed
    the holdout without its target, and only after it has been trained and saved.
    """

    source: str
    package: str
    parquet_path: str
    target: str
    time_column: str | None
    holdout_start: str | None  # ISO timestamp; without a time column the last `holdout_rows` rows
    holdout_rows: int | None
    keys: tuple[str, ...]
    features: tuple[str, ...]
    carry: tuple[str, ...]  # further columns that holdout.parquet carries (slices)
    seed: int
    golden_rows: int
    output: str
    result_path: str


class PredictRequest(msgspec.Struct, frozen=True, tag="predict", forbid_unknown_fields=True):
    """Predict rows of a snapshot with a release on disk; writes one column, `prediction`, in row order."""

    release: str
    parquet_path: str
    time_column: str | None
    from_time: str | None
    last_rows: int | None
    predictions_path: str
    result_path: str


class CompileRequest(msgspec.Struct, frozen=True, tag="compile", forbid_unknown_fields=True):
    """Find the fastest form of a trained model that says what the model says; write it to `output`.

    `trained` is what a `TrainRequest` wrote. `output` gets `plan.json`, and of a compiled model `model.onnx`
    and, where they are faster, `trees.npz`. Parity is checked on the holdout, on its single rows, and on edge
    rows. Without `compile` the model serves as it is, and only whether its requests may be batched is found
    out.
    """

    source: str
    package: str
    trained: str
    parquet_path: str
    time_column: str | None
    holdout_start: str | None
    holdout_rows: int | None
    compile: bool
    tolerance: float  # absolute, of a prediction
    seed: int
    output: str
    result_path: str


Request = SnapshotRequest | TrainRequest | PredictRequest | CompileRequest


class Explained(msgspec.Struct, frozen=True):
    """An error that its reader can act on."""

    found: str
    expected: str = ""
    where: str = ""


class Result(msgspec.Struct, frozen=True):
    """What a process of the project says when it is done."""

    error: Explained | None = None
    rows: int = 0
    training_rows: int = 0
    holdout_rows: int = 0
    train_seconds: float = 0.0
    format: str = ""  # how the model was saved: "skops" or "own"
    parameters: dict[str, str] = {}


class ChildRequest(msgspec.Struct, frozen=True):
    """To `serving.warm`: run `module` as `python -m module *arguments` would, with exactly `environment`."""

    module: str
    arguments: tuple[str, ...]
    cwd: str
    environment: dict[str, str]


class ChildStarted(msgspec.Struct, frozen=True):
    """From `serving.warm`: the child's process id, which is its process group too."""

    pid: int


class ChildEnded(msgspec.Struct, frozen=True):
    """From `serving.warm`: the child's exit code; −N when signal N ended it."""

    code: int
