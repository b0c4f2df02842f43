"""The nouns: frozen, small, JSON-serialisable. The only thing that passes between tasks."""

from __future__ import annotations

import hashlib
import json
import re
from datetime import date, datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
ProjectName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,39}$")]
ReleaseId = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,39}-[0-9a-f]{12}$")]
Environment = Literal["test", "production"]
ENVIRONMENTS: tuple[Environment, ...] = ("test", "production")
ColumnType = Literal["integer", "number", "string", "boolean", "timestamp"]


class Value(BaseModel):
    """A frozen noun."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def digest(self) -> str:
        """SHA-256 over the canonical JSON of this value."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


class Artifact(Value):
    """Bytes in the store, named by what they are.

    The digest of a directory covers its files' names and digests.
    """

    uri: str
    sha256: Sha256
    bytes: int


class Source(Value):
    """Which code: one commit of one project."""

    project: ProjectName
    repository: str
    git_sha: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]
    subdirectory: str = ""


class ModelEnvironment(Value):
    """The isolated environment that a project's lock and a serving wheel make; the store holds both."""

    fingerprint: Sha256
    lock: Artifact
    serving: Artifact
    python: str  # major.minor


class Column(Value):
    """One column of a dataset."""

    name: str
    type: ColumnType
    nullable: bool


class Dataset(Value):
    """Which data: an immutable snapshot in Parquet."""

    uri: str
    fingerprint: Sha256
    rows: int
    columns: tuple[Column, ...]
    as_of: date
    first_time: datetime | None
    last_time: datetime | None


class TestReport(Value):
    """What the developer's own tests said."""

    __test__ = False  # pytest would collect it by its name

    passed: int
    skipped: int
    report: Artifact


class TrainedModel(Value):
    """A model came out: the artifact, and the predictions it made on rows it has never seen."""

    artifact: Artifact
    input_schema: Artifact
    golden: Artifact
    holdout_predictions: Artifact
    environment: Sha256
    seed: int
    training_rows: int
    holdout_rows: int
    holdout_start: datetime | None
    train_seconds: float
    parameters: dict[str, str]


class Metric(Value):
    """A point estimate with its confidence interval; `slice` is empty for the whole holdout."""

    name: str
    slice: str = ""
    value: float | None
    low: float | None
    high: float | None
    rows: int
    clusters: int


class Evaluation(Value):
    """How good: metrics with intervals, overall and per slice, and against the champion on the same rows."""

    metrics: tuple[Metric, ...]
    champion: ReleaseId | None = None
    champion_differences: tuple[Metric, ...] = ()
    report: Artifact | None = None

    def metric(self, name: str, slice_: str = "") -> Metric | None:
        return next((m for m in self.metrics if (m.name, m.slice) == (name, slice_)), None)


class Verdict(StrEnum):
    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    INSUFFICIENT = "insufficient evidence"


class Gate(Value):
    """One decision: what was measured, against which threshold, and why the verdict."""

    name: str
    verdict: Verdict
    measured: float | None
    threshold: float | None
    interval: tuple[float, float] | None = None
    reason: str


class GateReport(Value):
    """Good enough, or not, and why. Only an all-`pass` report opens the way."""

    gates: tuple[Gate, ...]

    @property
    def passed(self) -> bool:
        return bool(self.gates) and all(g.verdict is Verdict.PASS for g in self.gates)

    @property
    def summary(self) -> str:
        """One line per gate that did not pass, or how many did."""
        bad = [g for g in self.gates if g.verdict is not Verdict.PASS]
        if not bad:
            return f"{len(self.gates)} gates passed"
        return "; ".join(f"{g.name}: {g.verdict.value}, {g.reason}" for g in bad)


class Package(Value):
    """What was published to the package index."""

    name: str
    version: str
    sha256: Sha256
    filename: str
    index: str


class ServingForm(Value):
    """How a release is served, as its build found out: compiled or as it was trained, and how exactly."""

    path: Literal["compiled", "original"]
    reason: str
    batching: bool  # rows of several requests may be predicted by one call
    batching_reason: str
    max_abs_difference: float | None = None  # of the compiled model from the original, on all rows compared
    rows: int = 0
    edge_rows: int = 0
    tolerance: float | None = None  # of a compiled model: absolute up to 1, above it relative
    artifact: Artifact

    @property
    def parity(self) -> str:
        """How exactly what is served was found to be what was trained, in one line."""
        if self.max_abs_difference is None:
            return "nothing compiled was compared with the original"
        within = f", within a tolerance of {self.tolerance:g}" if self.tolerance is not None else ""
        return (
            f"largest difference from the original {self.max_abs_difference:.3g} on {self.rows:,} rows "
            f"of the holdout and {self.edge_rows:,} edge rows{within}"
        )


DEFAULT_TOLERANCE = 1e-9
DEFAULT_MEMORY_MB = 1024
DEFAULT_CPUS = 1.0


class ServiceLimits(Value):
    """What the service of a model accepts, how long it may take to get ready and to end, and its form.

    What was added since the first release is left out of a document where it has its default, so that the
    digest of an older release, and with it its approval, stays.
    """

    max_rows: int = Field(default=1000, ge=1)
    max_body_bytes: int = Field(default=8_388_608, ge=1024)
    max_concurrent_requests: int = Field(default=256, ge=1)
    drain_seconds: float = Field(default=30.0, ge=0)
    ready_timeout_seconds: float = Field(default=60.0, gt=0)
    compiled: Literal["auto", "never", "required"] = Field(default="auto", exclude_if=lambda it: it == "auto")
    compiled_tolerance: float = Field(
        default=DEFAULT_TOLERANCE, ge=0, lt=1, exclude_if=lambda it: it == DEFAULT_TOLERANCE
    )
    workers: int = Field(default=0, ge=0, exclude_if=lambda it: it == 0)  # 0: one per CPU it may use
    # Of a container; 0: no limit.
    memory_mb: int = Field(default=DEFAULT_MEMORY_MB, ge=0, exclude_if=lambda it: it == DEFAULT_MEMORY_MB)
    cpus: float = Field(default=DEFAULT_CPUS, ge=0, exclude_if=lambda it: it == DEFAULT_CPUS)


Strategy = Literal["all-at-once", "blue-green", "canary", "shadow"]


class RolloutPolicy(Value):
    """How a release comes in front of the users of one environment.

    A step of a canary, or of a shadow before it is switched, ends when it has lasted `bake_seconds` and the
    candidate has answered `bake_requests`; the last one when the evidence says `promote`. What has not come
    to an end after `max_wait_seconds` more asks a person.
    """

    strategy: Strategy = "all-at-once"
    steps: tuple[Annotated[int, Field(ge=1, le=100)], ...] = Field(default=(10, 50), min_length=1)  # percent
    bake_seconds: float = Field(default=60.0, ge=0)
    bake_requests: int = Field(default=0, ge=0)
    max_wait_seconds: float = Field(default=900.0, ge=0)
    keep_warm_seconds: float = Field(
        default=0.0, ge=0
    )  # how long the release before stays up, for a way back
    probation_seconds: float = Field(default=0.0, ge=0)  # how long a promoted release is watched
    approval: Literal["auto", "required"] = "auto"
    approval_hours: float = Field(default=72.0, gt=0)  # how long a person's approval stays open

    @field_validator("steps")
    @classmethod
    def _ascending(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if list(steps) != sorted(set(steps)):
            raise ValueError("the steps of a rollout must rise, such as [5, 25, 50]")
        return steps

    @model_validator(mode="after")
    def _leaves_a_share(self) -> Self:
        if self.strategy == "canary" and self.steps[-1] > 99:
            raise ValueError("a canary's steps are below 100: all of the traffic is for what was promoted")
        return self


class TestPolicy(RolloutPolicy):
    """The test environment: deploys in seconds, and asks nobody."""

    __test__ = False  # pytest would collect it by its name


class ProductionPolicy(RolloutPolicy):
    """Production: a person approves, a share of the traffic proves, the last good release stays warm."""

    strategy: Strategy = "canary"
    keep_warm_seconds: float = Field(default=3600.0, ge=0)
    probation_seconds: float = Field(default=600.0, ge=0)
    approval: Literal["auto", "required"] = "required"


class Rollouts(Value):
    """The rollout policy of each environment."""

    test: TestPolicy = TestPolicy()
    production: ProductionPolicy = ProductionPolicy()

    def of(self, environment: Environment) -> RolloutPolicy:
        return self.production if environment == "production" else self.test


class Release(Value):
    """One immutable thing to deploy. The id is derived from the content; the rest is lineage."""

    release_id: ReleaseId
    project: ProjectName
    import_name: str
    task: str
    timezone: str
    service: ServiceLimits
    status: Literal["accepted", "rejected"]
    source: Source
    dataset: Dataset
    environment: ModelEnvironment
    tests: TestReport
    model: TrainedModel
    evaluation: Evaluation
    gates: GateReport
    package: Package | None = None  # of an accepted release only
    mlflow_version: str | None = None
    mlflow_run_id: str | None = None
    # Of an accepted release; without it, as in all before there was one, the original serves, unbatched.
    serving: ServingForm | None = Field(default=None, exclude_if=lambda it: it is None)
    rollout: Rollouts = Field(default=Rollouts(), exclude_if=lambda it: it == Rollouts())
    created_at: datetime


class ParityReport(Value):
    """What is served is what was trained: this many golden rows were answered alike.

    Without a `tolerance` bit for bit; else within it, absolute up to 1 and relative above.
    """

    release_id: ReleaseId
    rows: int
    tolerance: float = 0.0
    seconds: float


class Rollout(Value):
    """What runs where, after the decision at `position` of the journal."""

    project: ProjectName
    environment: Environment
    active: ReleaseId
    previous: ReleaseId | None
    url: str
    traffic_percent: int
    position: int


class Endpoint(Value):
    """Where one release of a service answers. `name` is what its target calls it.

    `standby`: gets requests only while no other endpoint is healthy. `shadow_percent`: gets a copy of this
    share of the requests, and its answers go nowhere.
    """

    name: str = ""
    host: str
    port: int
    release_id: str
    weight: Annotated[int, Field(ge=1)] = 1
    standby: bool = False
    shadow_percent: Annotated[int, Field(ge=0, le=100)] = 0


def slug(text: str) -> str:
    """`text` as lowercase words joined by dashes, the form Prefect's artifact keys take."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


JsonObject = dict[str, Any]
