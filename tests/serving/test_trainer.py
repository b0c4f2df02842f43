"""The trainer as a child process: what it writes, and how it explains what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving.contract import Golden, PredictRequest
from serving.scorer import Scorer
from serving.trainer import _golden_indices
from tests.serving.toys import (
    PACKAGE,
    ROW,
    Toy,
    result_of,
    run_trainer,
    snapshot_request,
    train_request,
    write_package,
)

LOAD = "import pandas as pd\nimport numpy as np\nimport datetime as dt\ndef load_data(as_of):\n    return "
METHODS = "class Model:\n    def produce_model(self, data): {}\n    def predict(self, rows): {}\n"
SAVES = "    def save(self, path): path.touch()\n    @classmethod\n    def load(cls, path): return cls()\n"


def test_a_training_writes_what_the_contract_says_and_tells_its_steps(toy: Toy) -> None:
    assert (toy.result.rows, toy.result.training_rows, toy.result.holdout_rows) == (500, 408, 92)
    assert toy.result.train_seconds > 0
    assert toy.result.parameters["C"] == "0.5"
    assert "training on 408 rows, 6 features" in toy.said
    holdout = pq.read_table(toy.output / "holdout.parquet")
    assert holdout.column_names == ["late", "id", "time", "carrier", "prediction"]
    assert holdout.num_rows == 92
    assert holdout.column("id").to_pylist() == list(range(408, 500))
    golden = msgspec.json.decode((toy.output / "golden.json").read_bytes(), type=Golden)
    assert golden.predictions == Scorer(toy.release).predict(golden.rows)


def test_a_snapshot_has_plain_types_and_equal_bytes(toy: Toy, tmp_path: Path) -> None:
    request = snapshot_request(toy.source, tmp_path)
    assert run_trainer(request, tmp_path, PYTHONHASHSEED="9").returncode == 0
    assert Path(request.parquet_path).read_bytes() == toy.snapshot.read_bytes()
    assert result_of(request.result_path).rows == 500
    schema = pq.read_schema(toy.snapshot)
    types = {field.name: str(field.type) for field in schema}
    assert types == {
        "id": "int64",
        "time": "timestamp[us]",
        "distance": "int64",
        "delay": "double",
        "carrier": "string",
        "weekend": "bool",
        "hour": "int64",
        "planned": "timestamp[us, tz=UTC]",
        "late": "int64",
    }
    assert not schema.metadata


def test_columns_of_unusual_dtypes_become_plain_ones(tmp_path: Path) -> None:
    code = LOAD + (
        "pd.DataFrame({'category': pd.Categorical(['a', 'b']), 'small': np.array([1, 2], 'int8'),"
        " 'half': np.array([1, 2], 'float32'), 'day': [dt.date(2013, 1, 1), None],"
        " 'zone': pd.to_datetime(['2013-01-01', '2013-01-02']).tz_localize('America/New_York'),"
        " 'nothing': [None, None], 'maybe': [True, None],"
        " 'text': pd.array(['a', None], 'string')}, index=[5, 5])\n"
    )
    request = snapshot_request(write_package(tmp_path / "src", code), tmp_path)
    done = run_trainer(request, tmp_path)
    assert done.returncode == 0, done.stderr
    table = pq.read_table(request.parquet_path)
    assert [str(field.type) for field in table.schema] == [
        *("string", "int64", "double", "timestamp[us]", "timestamp[us, tz=UTC]", "string", "bool", "string"),
    ]
    assert table.column("zone")[0].as_py().hour == 5


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("", "exports no function load_data"),
        ("load_data = 3", "exports no function load_data"),
        (LOAD + "[1]", "returned a list"),
        (LOAD + "pd.DataFrame({1: [1]})", "a column named 1"),
        (LOAD + "pd.DataFrame([[1, 2]], columns=['a', 'a'])", "'a' more than once"),
        (LOAD + "pd.DataFrame({'a': [1, 'x']})", "column 'a' cannot be stored"),
        (LOAD + "pd.DataFrame({'a': [[1], [2]]})", "column 'a' has type list"),
        (LOAD + "pd.DataFrame({'a': [b'1']})", "column 'a' has type binary"),
        (LOAD + "pd.DataFrame({'a': np.array([2**64 - 1], 'uint64')})", "column 'a' cannot be stored"),
    ],
)
def test_a_snapshot_that_breaks_the_contract_is_explained(tmp_path: Path, code: str, found: str) -> None:
    request = snapshot_request(write_package(tmp_path / "src", code), tmp_path)
    done = run_trainer(request, tmp_path)
    assert done.returncode == 3, done.stderr
    error = result_of(request.result_path).error
    assert error is not None
    assert found in error.found
    assert not Path(request.parquet_path).exists()


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("", "exports no class Model"),
        ("Model = 3", "exports no class Model"),
        ("class Model:\n    def predict(self, rows): pass\n", "no method produce_model"),
        ("class Model:\n    def produce_model(self, data): pass\n", "no method predict"),
        (METHODS.format("pass", "return [0.5]") + SAVES, "predict returned shape (1,) for"),
        (METHODS.format("pass", "return rows") + SAVES, "predict returned shape"),
        (METHODS.format("pass", "return None") + SAVES, "predict returned shape ()"),
        (METHODS.format("pass", "return ['x'] * len(rows)") + SAVES, "such as "),
        (METHODS.format("pass", "return [float('nan')] * len(rows)") + SAVES, "predict returned nan"),
        (
            METHODS.format("pass", "return [0.0] * len(rows)") + SAVES.replace("path.touch()", "0"),
            "wrote nothing",
        ),
        (METHODS.format("self.b = lambda: 0", "return [0.0] * len(rows)"), "lambda"),
        (
            METHODS.format("self.a = 1", "return [getattr(self, 'a', 2)] * len(rows)") + SAVES,
            "reloaded model",
        ),
    ],
)
def test_a_model_that_breaks_the_contract_is_explained(
    toy: Toy, tmp_path: Path, code: str, found: str
) -> None:
    request = train_request(write_package(tmp_path / "src", code), toy.snapshot, tmp_path)
    done = run_trainer(request, tmp_path)
    assert done.returncode == 3, done.stderr
    error = result_of(request.result_path).error
    assert error is not None
    assert found in error.found, error
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "found", "expected"),
    [
        ({"target": "lat"}, "no column 'lat'", "'late'?"),
        ({"features": ("distance", "delays")}, "no column 'delays'", "'delay'?"),
        ({"time_column": "carrier"}, "type string", "timestamps"),
        ({"holdout_start": "2012-01-01"}, "no rows to train on", ""),
        ({"holdout_start": "2014-01-01"}, "the holdout has no rows", ""),
        ({"time_column": None, "holdout_start": None, "holdout_rows": 500}, "no rows to train on", ""),
        ({"package": "absent"}, "no package absent", "src/absent"),
    ],
)
def test_a_request_that_does_not_fit_the_snapshot_is_explained(
    toy: Toy, moody: Toy, tmp_path: Path, changes: dict[str, Any], found: str, expected: str
) -> None:
    request = train_request(moody.source, toy.snapshot, tmp_path, **changes)
    done = run_trainer(request, tmp_path)
    assert done.returncode == 3, done.stderr
    error = result_of(request.result_path).error
    assert error is not None
    assert found in error.found
    assert expected in error.expected


def test_the_developers_own_exception_keeps_its_traceback(toy: Toy, tmp_path: Path) -> None:
    code = METHODS.format("raise KeyError('my column')", "pass")
    request = train_request(write_package(tmp_path / "src", code), toy.snapshot, tmp_path)
    done = run_trainer(request, tmp_path)
    assert done.returncode == 1
    assert "KeyError: 'my column'" in done.stderr
    assert 'toy/__init__.py", line 2, in produce_model' in done.stderr
    assert not Path(request.result_path).exists()


def test_the_model_is_trained_on_older_rows_and_never_given_the_holdouts_target(
    toy: Toy, tmp_path: Path
) -> None:
    code = (
        "import json\n"
        + METHODS.format(
            "self.saw = [str(data.time.max()), *sorted(data.columns)]",
            "self.asked = list(rows.columns); return [0.5] * len(rows)",
        )
        + "    def save(self, path): path.write_text(json.dumps(self.saw))\n"
        "    @classmethod\n    def load(cls, path): return cls()\n"
    )
    request = train_request(write_package(tmp_path / "src", code), toy.snapshot, tmp_path)
    assert run_trainer(request, tmp_path).returncode == 0
    latest, *columns = json.loads((Path(request.output) / "model" / "own").read_text())
    assert latest == "2013-01-17 23:00:00"
    assert "late" in columns
    assert set(request.features) < set(columns)


def test_without_a_time_column_the_last_rows_are_held_out(moody: Toy, tmp_path: Path) -> None:
    by_position = {"time_column": None, "holdout_start": None, "holdout_rows": 40}
    request = train_request(
        moody.source, moody.snapshot, tmp_path, features=("distance",), golden_rows=0, **by_position
    )
    done = run_trainer(request, tmp_path)
    assert done.returncode == 0, done.stderr
    holdout = pq.read_table(Path(request.output) / "holdout.parquet")
    assert holdout.column("id").to_pylist() == list(range(460, 500))
    assert result_of(request.result_path).training_rows == 460


def test_a_null_that_training_never_saw_is_predicted_but_never_golden(toy: Toy, tmp_path: Path) -> None:
    table = pq.read_table(toy.snapshot)
    for name in ("distance", "weekend", "carrier"):
        values = table.column(name).to_pylist()
        values[450] = None
        position = table.schema.get_field_index(name)
        table = table.set_column(position, name, pa.array(values, table.schema.field(name).type))
    pq.write_table(table, tmp_path / "odd.parquet")
    code = PACKAGE.replace("raise TypeError", "(lambda text: None)").replace(
        "rows.assign(", "rows.fillna({'distance': 0, 'carrier': '?'}).assign("
    )
    source = write_package(tmp_path / "src", code)
    request = train_request(source, tmp_path / "odd.parquet", tmp_path, golden_rows=92)
    done = run_trainer(request, tmp_path)
    assert done.returncode == 0, done.stderr
    golden = msgspec.json.decode((Path(request.output) / "golden.json").read_bytes(), type=Golden)
    assert len(golden.rows) == 91
    assert result_of(request.result_path).holdout_rows == 92


def test_rows_of_a_snapshot_are_predicted_with_a_release_on_disk(
    toy: Toy, moody: Toy, tmp_path: Path
) -> None:
    request = PredictRequest(
        release=str(toy.release),
        parquet_path=str(toy.snapshot),
        time_column="time",
        from_time="2013-01-18T00:00:00+00:00",
        last_rows=None,
        predictions_path=str(tmp_path / "predictions.parquet"),
        result_path=str(tmp_path / "result.json"),
    )
    done = run_trainer(request, tmp_path)
    assert done.returncode == 0, done.stderr
    predicted = pq.read_table(request.predictions_path)
    assert predicted.column_names == ["prediction"]
    held_out = pq.read_table(toy.output / "holdout.parquet").column("prediction")
    assert predicted.column("prediction").to_pylist() == held_out.to_pylist()

    last = msgspec.structs.replace(
        request, release=str(moody.release), time_column=None, from_time=None, last_rows=15
    )
    assert run_trainer(last, tmp_path).returncode == 0
    assert pq.read_table(request.predictions_path).num_rows == 15


def test_served_rows_have_the_dtypes_that_training_saw(toy: Toy) -> None:
    # The toy's predict raises where they differ.
    scorer = Scorer(toy.release)
    full = scorer.predict([ROW])
    assert (
        scorer.predict([{**ROW, "hour": 7.0, "distance": 1200.0, "planned": "2013-01-05T02:00-05:00"}])
        == full
    )
    assert scorer.predict([{**ROW, "hour": None, "delay": None}, ROW])[1] == full[0]


@pytest.mark.parametrize("count", [1, 2, 5, 13, 50])
def test_golden_rows_are_never_more_than_asked_for_nulls_included(count: int) -> None:
    rows = 400
    table = pa.table(
        {f"x{i}": [None if n % (40 + i) == 3 else float(n) for n in range(rows)] for i in range(12)}
    )
    indices = _golden_indices(table, count)
    assert len(set(indices)) == len(indices) == count
    assert all(0 <= index < rows for index in indices)
    if count >= 5:
        assert any(None in row.values() for row in table.take(indices).to_pylist())
        assert max(indices) == rows - 1, "spread over all of the holdout"


def test_a_holdout_of_which_no_row_could_be_asked_is_explained(toy: Toy, tmp_path: Path) -> None:
    table = pq.read_table(toy.snapshot)
    weekend = table.column("weekend").to_pylist()[:408] + [None] * 92
    position = table.schema.get_field_index("weekend")
    table = table.set_column(position, "weekend", pa.array(weekend, pa.bool_()))
    pq.write_table(table, tmp_path / "odd.parquet")
    code = PACKAGE.replace("raise TypeError", "(lambda text: None)")
    request = train_request(write_package(tmp_path / "src", code), tmp_path / "odd.parquet", tmp_path)
    done = run_trainer(request, tmp_path)
    assert done.returncode == 3, done.stderr
    error = result_of(request.result_path).error
    assert error is not None
    assert "20 rows of the holdout" in error.found
    assert "nulls where training saw none" in error.found
