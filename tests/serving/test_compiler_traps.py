"""Models that a holdout alone would let pass: rare branches, own classes, sizes of calls, 32-bit numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.ensemble import BaggingRegressor, RandomForestRegressor
from sklearn.impute import KNNImputer, SimpleImputer
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    KBinsDiscretizer,
    OneHotEncoder,
    OrdinalEncoder,
    StandardScaler,
)
from sklearn.tree import DecisionTreeRegressor

from serving import snapshot
from serving.constants import constants_of
from serving.contract import PLAN_FILE, Column, InputSchema, Plan
from tests.serving.small_models import ROW, Model, Workbench, data, number, tuples, workbench

FULL = ["distance", "speed"]
CODES = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
ONE_HOT = OneHotEncoder(handle_unknown="ignore")
RENAMED = {"QX": "AA"}
LONG_HAUL = [9000, 5000]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return workbench(tmp_path_factory.mktemp("bench"))


def plan_of(bench: Workbench, estimator: Any, *columns: Any, predict: Any = number, **changes: Any) -> Plan:
    pipeline = make_pipeline(make_column_transformer(*columns), estimator)
    return bench.compile(Model(pipeline.fit(bench.training, bench.minutes), predict), **changes)


def between(model: Any, rows: Any) -> Any:
    return np.where(rows.distance.between(5000, 9000), 0.5, model.pipeline.predict(rows))


def one_category(model: Any, rows: Any) -> Any:
    return np.where(rows.carrier == "ZZ", 0.5, model.pipeline.predict(rows))


def renamed(model: Any, rows: Any) -> Any:
    return model.pipeline.predict(rows.assign(carrier=rows.carrier.replace(RENAMED)))


def _long(rows: Any) -> Any:
    return (rows.distance < LONG_HAUL[0]) & (rows.distance > LONG_HAUL[1])


def by_helper(model: Any, rows: Any) -> Any:
    return np.where(_long(rows), 0.5, model.pipeline.predict(rows))


def narrow_band(model: Any, rows: Any) -> Any:
    return model.pipeline.predict(rows) + (rows.speed > 812.25) * (rows.speed < 812.26)


def a_size(model: Any, rows: Any) -> Any:
    return model.pipeline.predict(rows) if len(rows) != 217 else np.zeros(217)


def twice(model: Any, rows: Any) -> Any:
    return np.where(rows.duplicated(), 0.0, model.pipeline.predict(rows))


@pytest.mark.parametrize(
    ("predict", "row_wise"),
    [
        (between, True),
        (one_category, True),
        (renamed, True),
        (by_helper, True),
        (narrow_band, True),
        (a_size, False),
        (twice, False),
    ],
)
def test_a_branch_that_no_row_of_the_data_takes(bench: Workbench, predict: Any, row_wise: bool) -> None:
    columns = ((ONE_HOT, ["carrier"]), ("passthrough", FULL))
    plan = plan_of(bench, LinearRegression(), *columns, predict=predict)
    assert (plan.path, plan.batching) == ("original", row_wise), plan.batching_reason


def test_constants_are_found_where_the_code_holds_them() -> None:
    model = Model(None, by_helper)
    model.pipeline = {"limit": 77, "names": ["a", "b"], "flag": True, "never": float("nan"), "huge": 10**400}
    assert {77, 9000, 5000, 0.5, "a", "b"} <= set(constants_of(model))
    assert not {True, 10**400} & {c for c in constants_of(model) if c != 1}


def test_a_long_table_does_not_crowd_out_the_code() -> None:
    model = Model({str(index): index + 0.25 for index in range(10_000)}, by_helper)
    model.nested = {index: {f"{index} {n}": n for n in range(200)} for index in range(200)}
    assert {9000, 5000, 0.5} <= set(constants_of(_WithCode(model)))


class _WithCode:
    def __init__(self, table: Any) -> None:
        self.table = vars(table)

    def predict(self, rows: Any) -> Any:
        return by_helper(self, rows)


def banded(values: Any) -> Any:
    return np.where((np.asarray(values) > 600.05) & (np.asarray(values) < 600.06), 0.0, values)


class Scaler(StandardScaler):
    def transform(self, X: Any, copy: Any = None) -> Any:
        return super().transform(banded(X))


class Chain(Pipeline):
    def predict(self, X: Any, **parameters: Any) -> Any:
        return super().predict(X.assign(speed=banded(X["speed"])))


class Selection(StandardScaler):
    def get_support(self, indices: bool = False) -> Any:
        return np.arange(2)

    def transform(self, X: Any, copy: Any = None) -> Any:
        return banded(X)


Scaler.__name__, Chain.__name__ = "StandardScaler", "Pipeline"


@pytest.mark.parametrize("step", [Scaler, Selection])
def test_a_class_is_known_by_its_module_and_not_by_its_name(bench: Workbench, step: Any) -> None:
    plan = plan_of(bench, LinearRegression(), (step(), FULL))
    assert plan.path == "original"
    assert "scikit-learn's" in plan.reason


def test_a_replaced_method_is_not_compiled(bench: Workbench) -> None:
    linear = LinearRegression().fit(bench.training[FULL], bench.minutes)
    linear.predict = lambda rows: rows["speed"].to_numpy()
    plan = bench.compile(Model(linear, lambda model, rows: model.pipeline.predict(rows[FULL])))
    assert (plan.path, plan.reason) == ("original", "predict of its LinearRegression has been replaced")


def test_a_pipeline_of_ones_own_is_not_compiled(bench: Workbench) -> None:
    chain = Chain(
        [("columns", make_column_transformer(("passthrough", FULL))), ("trees", LinearRegression())]
    )
    plan = bench.compile(Model(chain.fit(bench.training, bench.minutes), number))
    assert plan.path == "original"
    assert "scikit-learn's" in plan.reason


def moved(values: Any) -> Any:
    return np.where(np.asarray(values) == "Zurich", "AA", np.asarray(values))


def test_a_function_of_text_is_not_tabulated(bench: Workbench) -> None:
    plan = plan_of(bench, Ridge(), (make_pipeline(FunctionTransformer(moved), ONE_HOT), ["carrier"]))
    assert plan.path == "original"
    assert "training never saw" in plan.reason


@pytest.mark.parametrize(("column", "value"), [("carrier", "?"), ("kind", -77)])
def test_what_an_imputer_replaces_is_a_value_of_its_own(bench: Workbench, column: str, value: Any) -> None:
    imputer = SimpleImputer(missing_values=value, strategy="most_frequent")
    pipeline = make_pipeline(make_column_transformer((make_pipeline(imputer, ONE_HOT), [column])), Ridge())
    model = Model(pipeline.fit(bench.training, bench.minutes), number)
    plan = bench.compile(model)
    assert plan.path == "compiled", plan.reason
    rows = [{**ROW, column: value}]
    assert bench.compiled(plan).predict(tuples(plan, rows)) == pytest.approx(model.predict(bench.frame(rows)))


def test_steps_after_an_encoder_that_mix_columns_are_not_tabulated(bench: Workbench) -> None:
    plan = plan_of(bench, Ridge(), (make_pipeline(CODES, KNNImputer(n_neighbors=3)), ["town", "carrier"]))
    assert plan.path == "original"
    assert "KNNImputer" in plan.reason


def test_what_jumps_is_not_left_to_a_converter(bench: Workbench) -> None:
    plan = plan_of(bench, Ridge(), (KBinsDiscretizer(5, encode="ordinal"), FULL))
    assert (plan.path, "KBinsDiscretizer with Less" in plan.reason) == ("original", True)
    plan = plan_of(bench, BaggingRegressor(n_estimators=2), ("passthrough", FULL))
    assert (plan.path, "BaggingRegressor holds trees" in plan.reason) == ("original", True)


def test_an_array_of_32_bits_is_not_followed(bench: Workbench) -> None:
    def narrow(model: Any, rows: Any) -> Any:
        return model.pipeline.predict(rows[["distance", "kind"]].to_numpy(np.float32))

    linear = LinearRegression().fit(bench.training[["distance", "kind"]].to_numpy(), bench.minutes)
    assert bench.compile(Model(linear, narrow)).path == "original"


def test_integers_beside_a_tie_of_32_bits(bench: Workbench, tmp_path: Path) -> None:
    """scikit-learn rounds an int64 to 32 bits at once, a graph by way of 64 bits: another side of a split."""
    random = np.random.default_rng(0)
    frame = pd.DataFrame({"t": 2**60 + random.integers(0, 40, 900) * 2**37, "k": random.integers(0, 5, 900)})
    frame["y"] = random.normal(size=900) + (frame["t"] // 2**37) % 7
    snapshot.write(frame, tmp_path / "snapshot.parquet")
    tree = DecisionTreeRegressor(max_depth=12).fit(frame[["t", "k"]], frame["y"])
    schema = InputSchema((Column("t", "integer", False), Column("k", "integer", False)))
    plan = bench.compile(Model(tree, number), schema=schema, parquet_path=str(tmp_path / "snapshot.parquet"))
    assert plan.path == "original"
    assert "edge row" in plan.reason


def test_rows_of_one_call_are_compared_though_most_extremes_are_refused(
    bench: Workbench, tmp_path: Path
) -> None:
    """A forest refuses numbers beyond 32 bits; the nulls that `predict` fills are not in the holdout."""

    def filled(model: Any, rows: Any) -> Any:
        return model.pipeline.predict(rows.assign(hour=rows.hour.fillna(rows.hour.median())))

    frame = data().sort_values("hour", na_position="first")
    snapshot.write(frame, tmp_path / "snapshot.parquet")
    columns = ("passthrough", ["distance", "speed", "hour"])
    changes = {"parquet_path": str(tmp_path / "snapshot.parquet")}
    plan = plan_of(bench, RandomForestRegressor(3), columns, predict=filled, **changes)
    assert not plan.batching, plan.batching_reason


def test_plans_of_a_forest_with_threads_are_byte_equal(bench: Workbench) -> None:
    plan = plan_of(bench, RandomForestRegressor(30, n_jobs=4), ("passthrough", FULL))
    assert plan.parity is not None
    assert plan.parity.max_abs_difference == 0.0  # of sums in the order of the trees
    assert (bench.folder / "serving" / PLAN_FILE).exists()


def test_categories_by_the_thousand_do_not_become_one_dense_array(bench: Workbench, tmp_path: Path) -> None:
    frame = pd.concat([data()] * 7, ignore_index=True)
    frame["town"] = [f"v{index % 6000}" for index in range(len(frame))]
    snapshot.write(frame, tmp_path / "snapshot.parquet")
    pipeline = make_pipeline(make_column_transformer((ONE_HOT, ["town"]), ("passthrough", FULL)), Ridge())
    model = Model(pipeline.fit(frame, frame["minutes"]), number)
    plan = bench.compile(model, parquet_path=str(tmp_path / "snapshot.parquet"))
    assert plan.path == "original"
    assert "makes 6,000 columns of" in plan.reason
