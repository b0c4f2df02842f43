"""Is the data fit to train on? A Great Expectations suite: the contract's own checks, plus the project's.

Great Expectations is imported when a suite runs, never earlier: its import costs seconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from datetime import date, datetime, time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from perennial.config import ProjectConfig
from perennial.errors import DataError, ProjectError
from perennial.imports import deferred
from perennial.values import ColumnType, JsonObject, Value

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SUITE_FILE = "expectations.json"

# What pandas calls the types of the contract once a snapshot has been read back.
_PANDAS_TYPES = {
    "integer": ["int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"],
    "number": ["float64", "float32", "int64", "int32"],
    "boolean": ["bool", "bool_"],
    "timestamp": [
        "datetime64[ns]",
        "datetime64[us]",
        "datetime64[ms]",
        "datetime64[ns, UTC]",
        "datetime64[us, UTC]",
    ],
}
_MAX_CATEGORIES = 50


class Expectation(BaseModel):
    """One line of a suite, as Great Expectations writes it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: str
    kwargs: JsonObject


class DataCheck(Value):
    """One expectation and what was found."""

    expectation: str
    column: str
    passed: bool
    found: str


class DataReport(Value):
    """What the suite said of a snapshot."""

    checks: tuple[DataCheck, ...]
    origin: str

    @property
    def failures(self) -> tuple[DataCheck, ...]:
        return tuple(check for check in self.checks if not check.passed)

    def error(self) -> DataError:
        """The failures as the error that stops a build."""
        lines = [f"{c.column or 'table'}: {c.found} ({c.expectation})" for c in self.failures]
        return DataError(
            "the data failed its validation:\n  " + "\n  ".join(lines), f"what {self.origin} expects"
        )


def contract_suite(config: ProjectConfig, as_of: date) -> list[Expectation]:
    """What the contract itself asks of any data, whatever the project expects besides."""
    needed = dict.fromkeys([config.target, *config.entity_id, *config.slices, *(config.features or ())])
    if config.time_column:
        needed[config.time_column] = None
    suite = [_expect("expect_table_row_count_to_be_between", min_value=1)]
    suite += [_expect("expect_column_to_exist", column=name) for name in needed]
    strict = [config.target, *config.entity_id, *([config.time_column] if config.time_column else [])]
    suite += [_expect("expect_column_values_to_not_be_null", column=name) for name in strict]
    suite.append(_expect("expect_column_unique_value_count_to_be_between", column=config.target, min_value=2))
    if config.task == "binary":
        suite.append(_expect("expect_column_values_to_be_in_set", column=config.target, value_set=[0, 1]))
    if len(config.entity_id) == 1:
        suite.append(_expect("expect_column_values_to_be_unique", column=config.entity_id[0]))
    elif config.entity_id:
        suite.append(_expect("expect_compound_columns_to_be_unique", column_list=list(config.entity_id)))
    if config.time_column:
        suite.append(_type_expectation(config.time_column, "timestamp"))
        suite.append(
            _expect(
                "expect_column_values_to_be_between",
                column=config.time_column,
                max_value=datetime.combine(as_of, time.max).isoformat(),
            )
        )
    return suite


def project_suite(folder: Path) -> list[Expectation] | None:
    """The project's own suite, or None where it has none. Raises ProjectError when it cannot be read."""
    path = folder / SUITE_FILE
    if not path.is_file():
        return None
    try:
        return [Expectation.model_validate(line) for line in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise ProjectError(
            f"{SUITE_FILE} cannot be read: {error}", 'a list of {"type": "expect_…", "kwargs": {…}}'
        ) from error


def inferred_suite(released: pa.Table) -> list[Expectation]:
    """What the last released snapshot says that rows look like: columns, types, nulls, ranges, levels.

    Wide on purpose: it stops what is broken; drift is judged elsewhere.
    """
    import pyarrow.compute as pc
    import pyarrow.types as pt

    suite = [
        _expect(
            "expect_table_row_count_to_be_between",
            min_value=released.num_rows // 2,
            max_value=released.num_rows * 2,
        )
    ]
    for field in released.schema:
        column = released[field.name]
        suite.append(_expect("expect_column_to_exist", column=field.name))
        kind = column_type(field.type)
        suite.append(_type_expectation(field.name, kind))
        null_share = column.null_count / max(1, len(column))
        if null_share < 1:
            suite.append(
                _expect(
                    "expect_column_values_to_not_be_null",
                    column=field.name,
                    mostly=1.0 if null_share == 0 else max(0.0, 1 - 2 * null_share - 0.05),
                )
            )
        if pt.is_integer(field.type) or pt.is_floating(field.type):
            low, high = (pc.min_max(column)[side].as_py() for side in ("min", "max"))
            if low is not None:
                room = (high - low) * 0.5 or 1
                suite.append(
                    _expect(
                        "expect_column_values_to_be_between",
                        column=field.name,
                        min_value=low - room,
                        max_value=high + room,
                        mostly=0.99,
                    )
                )
        elif kind == "string":
            levels = [level for level in pc.unique(column).to_pylist() if level is not None]
            if 0 < len(levels) <= _MAX_CATEGORIES:
                suite.append(
                    _expect(
                        "expect_column_values_to_be_in_set",
                        column=field.name,
                        value_set=sorted(levels),
                        mostly=0.9,
                    )
                )
    return suite


def validate(frame: pd.DataFrame, suite: Sequence[Expectation], origin: str) -> DataReport:
    """Run a suite over a frame. An expectation that cannot run is a failed one."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")  # before the import, which reads it
    with deferred("altair", "boto3", "scipy.stats"):  # for charts, buckets and its rarer expectations
        import great_expectations as gx
        from great_expectations.core.result_format import ResultFormat
        from great_expectations.data_context.types.base import (
            DataContextConfig,
            InMemoryStoreBackendDefaults,
            ProgressBarsConfig,
        )

    # The context of its own making would leave a folder for a docs site in the temporary files, every time.
    nothing_on_disk = InMemoryStoreBackendDefaults(init_temp_docs_sites=False)
    context = gx.get_context(
        mode="ephemeral",
        project_config=DataContextConfig(
            store_backend_defaults=nothing_on_disk, progress_bars=ProgressBarsConfig(globally=False)
        ),
    )
    # An expectation about a column that is not there cannot say so clearly; the ones about existence can.
    present = set(frame.columns)
    runnable = [e for e in suite if e.type == "expect_column_to_exist" or _columns(e) <= present]
    if frame.empty:
        runnable = [e for e in runnable if e.type.startswith(("expect_table_", "expect_column_to_exist"))]
    frame = frame[_columns_needed(runnable, frame)]
    batch = (
        context.data_sources.add_pandas("snapshot")
        .add_dataframe_asset("rows")
        .add_batch_definition_whole_dataframe("all")
        .get_batch({"dataframe": frame})
    )
    try:
        expectations = [_implementation(line)(**line.kwargs) for line in runnable]
    except (TypeError, ValueError, AttributeError) as error:
        raise ProjectError(
            f"{SUITE_FILE} holds an expectation that Great Expectations refuses: {error}",
            "types and arguments of Great Expectations 1.24",
        ) from error
    outcome = batch.validate(
        gx.ExpectationSuite(name=origin, expectations=expectations), result_format=ResultFormat.SUMMARY
    )
    return DataReport(checks=tuple(_read(outcome.to_json_dict()["results"], frame)), origin=origin)


def column_type(kind: pa.DataType) -> ColumnType:
    """The contract's name of an Arrow type."""
    import pyarrow.types as pt

    if pt.is_boolean(kind):
        return "boolean"
    if pt.is_integer(kind):
        return "integer"
    if pt.is_floating(kind) or pt.is_decimal(kind):
        return "number"
    if pt.is_timestamp(kind) or pt.is_date(kind):
        return "timestamp"
    if pt.is_string(kind) or pt.is_large_string(kind) or pt.is_dictionary(kind):
        return "string"
    raise DataError(f"a column has the type {kind}", "integer, number, string, boolean or timestamp")


def _read(results: Sequence[Any], frame: pd.DataFrame) -> Iterator[DataCheck]:
    for line in results:
        kwargs = line["expectation_config"]["kwargs"]
        found = _found(line)
        if not line["success"] and {"type_", "type_list"} & kwargs.keys():
            found += f"; the column holds {_holds(frame[kwargs['column']])}"
        column = kwargs.get("column") or ", ".join(kwargs.get("column_list", ()))
        yield DataCheck(
            expectation=_sentence(line["expectation_config"]["type"], kwargs),
            column=column,
            passed=bool(line["success"]),
            found=found,
        )


def _holds(column: pd.Series[Any]) -> str:
    """The type of a column in words that its values agree with: pandas calls many things `object`."""
    from pandas.api.types import infer_dtype

    return f"{infer_dtype(column, skipna=True)} ({column.dtype})"


def _found(line: Any) -> str:
    result = line.get("result") or {}
    if message := _exception(line.get("exception_info") or {}):
        return f"could not be checked: {message}"
    if "unexpected_count" in result:
        count, rows = result["unexpected_count"], result.get("element_count", 0)
        sample = ", ".join(str(x) for x in result.get("partial_unexpected_list", [])[:3])
        return f"{count:,} of {rows:,} rows unexpected" + (f", such as {sample}" if sample and count else "")
    if "observed_value" in result:
        return f"found {result['observed_value']}"
    return "as expected" if line["success"] else "not found"


def _exception(info: Any) -> str:
    """The message of a check that could not run; Great Expectations nests it under the metric's id."""
    if isinstance(info.get("exception_message"), str):
        return str(info["exception_message"])
    nested = (_exception(value) for value in info.values() if isinstance(value, dict))
    return next((message for message in nested if message), "")


def _sentence(kind: str, kwargs: JsonObject) -> str:
    details = ", ".join(
        f"{name} {value if not isinstance(value, list) else value[:6]}"
        for name, value in sorted(kwargs.items())
        if name not in {"column", "column_list", "batch_id", "mostly"} or (name == "mostly" and value != 1.0)
    )
    return kind.removeprefix("expect_").replace("_", " ") + (f": {details}" if details else "")


def _implementation(line: Expectation) -> Any:
    from great_expectations import expectations

    classes = {name.lower(): name for name in vars(expectations)}  # ExpectColumnKLDivergenceToBeLessThan
    name = classes.get(line.type.replace("_", ""))
    if name is None:
        raise AttributeError(f"there is no {line.type}")
    return getattr(expectations, name)


def _columns(line: Expectation) -> set[str]:
    named = [line.kwargs.get(key) for key in ("column", "column_A", "column_B")]
    return {name for name in named if name} | set(line.kwargs.get("column_list", ()))


def _columns_needed(suite: Sequence[Expectation], frame: pd.DataFrame) -> list[str]:
    """The columns that a suite names: Great Expectations copies and hashes all that it is given.

    All of them for a suite that says anything of the table as such, or of the rows that meet a condition.
    """
    wide = [e for e in suite if e.type.startswith("expect_table_column") or "row_condition" in e.kwargs]
    named = set().union(*map(_columns, suite))
    unclear = [e for e in suite if not _columns(e) and not e.type.startswith("expect_table_row_count")]
    return [name for name in frame.columns if name in named or wide or unclear or not named]


def _type_expectation(column: str, kind: str) -> Expectation:
    if kind == "string":
        return _expect("expect_column_values_to_be_of_type", column=column, type_="str")
    return _expect("expect_column_values_to_be_in_type_list", column=column, type_list=_PANDAS_TYPES[kind])


def _expect(kind: str, **kwargs: Any) -> Expectation:
    return Expectation(type=kind, kwargs=kwargs)
