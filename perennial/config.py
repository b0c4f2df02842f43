"""[tool.perennial] of a model project: one pydantic model, and an error that names what is wrong with it."""

from __future__ import annotations

import difflib
import tomllib
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from packaging.utils import canonicalize_name
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from perennial.errors import ProjectError
from perennial.values import ProjectName, Rollouts, ServiceLimits

Task = Literal["binary", "regression"]
METRICS: dict[Task, tuple[str, ...]] = {
    "binary": ("roc_auc", "log_loss", "brier"),
    "regression": ("rmse", "mae", "r2"),
}


Margin = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Threshold(_Section):
    """An absolute gate: the confidence bound on the pessimistic side must lie within."""

    min: float | None = Field(default=None, allow_inf_nan=False)
    max: float | None = Field(default=None, allow_inf_nan=False)

    @model_validator(mode="after")
    def _bounds_something(self) -> Threshold:
        if self.min is None and self.max is None:
            raise ValueError("a gate needs min or max, or it would hold nothing back")
        return self


class Data(_Section):
    """Where rows come from. `replay_year` replays a year of history: as-of keeps its month and day."""

    replay_year: int | None = None


class Schedule(_Section):
    """When the project retrains by itself."""

    retrain: str = "0 6 * * *"
    timezone: str = "UTC"

    @field_validator("timezone")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise ValueError(f"{name!r} is not a timezone; expected a name such as Europe/Madrid") from error
        return name


class Limits(_Section):
    """How long each step that runs the project's code may take."""

    load_data_seconds: float = Field(default=600, gt=0)
    tests_seconds: float = Field(default=600, gt=0)
    train_seconds: float = Field(default=3600, gt=0)
    compile_seconds: float = Field(default=900, gt=0)


class ProjectConfig(_Section):
    """[tool.perennial], as its developer writes it."""

    task: Task
    target: str
    time_column: str | None = None
    entity_id: tuple[str, ...] = ()
    features: tuple[str, ...] | None = None
    holdout_days: int = Field(default=28, ge=2)
    seed: int = Field(default=0, ge=0, lt=2**32)
    slices: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    data: Data = Data()
    gates: dict[str, Threshold] = Field(default_factory=dict)
    champion_margin: dict[str, Margin] = Field(default_factory=dict)
    compare_with_champion: bool = True
    schedule: Schedule = Schedule()
    service: ServiceLimits = ServiceLimits()
    rollout: Rollouts = Rollouts()
    limits: Limits = Limits()

    def as_of(self, today: date) -> date:
        """The day that `today` stands for in the project's data."""
        if self.data.replay_year is None:
            return today
        day = 28 if (today.month, today.day) == (2, 29) else today.day
        return today.replace(year=self.data.replay_year, day=day)


class Project(_Section):
    """A checkout that keeps the contract, as far as it can be read without running it."""

    name: ProjectName
    package: str
    version: str
    requires: tuple[str, ...]
    config: ProjectConfig


def read_project(folder: Path) -> Project:
    """Read pyproject.toml of a model project. Raises ProjectError naming the file, found and expected."""
    path = folder / "pyproject.toml"
    if not path.is_file():
        raise ProjectError(
            f"{folder.name}/ has no pyproject.toml",
            "a model project: pyproject.toml, src/NAME/, requirements.lock",
        )
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ProjectError(f"pyproject.toml is not TOML: {error}", "a file that tomllib reads") from error
    table, tool = _table(document, "project"), _table(document, "tool")
    section = tool.get("perennial")
    if section is None:
        raise ProjectError(
            "pyproject.toml has no [tool.perennial]", "[tool.perennial] with at least task and target"
        )
    for key in ("name", "version"):
        if not isinstance(table.get(key), str):
            raise ProjectError(f"pyproject.toml has no project.{key}", f'[project] with {key} = "…"')
    try:
        config = ProjectConfig.model_validate(section)
    except ValidationError as error:
        raise ProjectError(*_explain(error)) from error
    _check_metrics(config)
    _check_features(config)
    name = canonicalize_name(table["name"])
    try:
        return Project(
            name=name,
            package=name.replace("-", "_"),
            version=table["version"],
            requires=table.get("dependencies", ()),
            config=config,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = "dependencies" if first["loc"][0] == "requires" else str(first["loc"][0])
        raise ProjectError(f"pyproject.toml: [project] {key} = {table[key]!r}", str(first["msg"])) from error


def _table(document: dict[str, Any], name: str) -> dict[str, Any]:
    table = document.get(name, {})
    if not isinstance(table, dict):
        raise ProjectError(f"pyproject.toml: {name} = {table!r}", f"a table, [{name}]")
    return table


def _check_features(config: ProjectConfig) -> None:
    """What a model must not see is no feature: the answer, when it was, and whose it is."""
    if config.features is None:
        return
    where, expected = "pyproject.toml: [tool.perennial] features", "each column that predict gets, once"
    if not config.features:
        raise ProjectError(f"{where} is empty", f"{expected}; without the key, all other columns")
    hidden = dict.fromkeys(config.entity_id, "an entity_id column")
    if config.time_column is not None:
        hidden[config.time_column] = "the time_column"
    hidden[config.target] = "the target"
    for position, name in enumerate(config.features):
        if name in hidden:
            raise ProjectError(f"{where} names {hidden[name]} {name!r}", f"{expected}, without {name!r}")
        if name in config.features[:position]:
            raise ProjectError(f"{where} names {name!r} twice", expected)


def _check_metrics(config: ProjectConfig) -> None:
    known = METRICS[config.task]
    for where, names in (
        ("metrics", config.metrics),
        ("gates", config.gates),
        ("champion_margin", config.champion_margin),
    ):
        for name in names:
            if name not in known:
                raise ProjectError(
                    f"pyproject.toml: [tool.perennial] {where} names {name!r}",
                    f"one of {', '.join(known)} for task {config.task!r}",
                )


def _explain(error: ValidationError) -> tuple[str, str]:
    """(found, expected) of the first thing wrong, with the nearest known key for an unknown one."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _keys_at(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}? Known keys: " if near else "one of "
        return f"pyproject.toml: [tool.perennial] has an unknown key {where!r}", hint + ", ".join(
            sorted(known)
        )
    if first["type"] == "missing":
        return f"pyproject.toml: [tool.perennial] has no {where!r}", f"{where} = …"
    return f"pyproject.toml: [tool.perennial] {where} = {first['input']!r}", str(first["msg"])


def _keys_at(location: tuple[Any, ...]) -> list[str]:
    model: Any = ProjectConfig
    for part in location:
        field = (
            model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        )
        if field is None:
            model = Threshold  # the only sections below a free name are gates
            continue
        model = field.annotation
    return (
        list(model.model_fields)
        if isinstance(model, type) and issubclass(model, BaseModel)
        else list(Threshold.model_fields)
    )
