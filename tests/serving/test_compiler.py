"""What is compiled says what the original says; the original serves what cannot be proven, with a reason."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from sklearn.compose import TransformedTargetRegressor, make_column_selector, make_column_transformer
from sklearn.ensemble import (
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
    VotingRegressor,
)
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression, PoissonRegressor, Ridge
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    OneHotEncoder,
    OrdinalEncoder,
    PolynomialFeatures,
    PowerTransformer,
    StandardScaler,
    TargetEncoder,
)
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from serving.compiled import CompiledModel, read_plan
from serving.contract import ONNX_FILE, PLAN_FILE, CompileRequest, Plan
from serving.errors import ContractError
from tests.serving.small_models import (
    HOLDOUT,
    NUMBERS,
    ROW,
    TOLERANCE,
    TOWNS,
    Model,
    Workbench,
    number,
    probability,
    tuples,
    workbench,
)
from tests.serving.toys import Toy, result_of, run_trainer

FULL = ["distance", "speed"]  # no nulls
MISSING = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=np.nan)
ORDINAL = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1, encoded_missing_value=-2)
ONE_HOT = OneHotEncoder(handle_unknown="ignore")
CATEGORIES = ["carrier", "town"]
SCALED = make_pipeline(SimpleImputer(), StandardScaler())


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return workbench(tmp_path_factory.mktemp("bench"))


def chain(estimator: Any, *columns: Any) -> Any:
    return make_pipeline(make_column_transformer(*columns), estimator)


def fitted(bench: Workbench, pipeline: Any, predict: Any) -> Model:
    target = bench.late if hasattr(pipeline, "predict_proba") else bench.minutes.clip(0)
    pipeline.fit(bench.training, target)
    return Model(pipeline, predict)


CLASSIFIERS = {
    "histogram_by_index": lambda: chain(
        HistGradientBoostingClassifier(max_iter=20, categorical_features=[0, 1]),
        (MISSING, CATEGORIES),
        ("passthrough", [*NUMBERS, "weekend"]),
    ),
    "histogram_by_name": lambda: HistGradientBoostingClassifier(
        max_iter=20, categorical_features=["carrier", "town", "kind"]
    ),
    "forest": lambda: chain(RandomForestClassifier(10), (ORDINAL, CATEGORIES), ("passthrough", NUMBERS)),
    "extra_trees": lambda: chain(ExtraTreesClassifier(10), (ONE_HOT, CATEGORIES), ("passthrough", FULL)),
    "boosting": lambda: chain(
        GradientBoostingClassifier(n_estimators=10), (ORDINAL, CATEGORIES), (SimpleImputer(), NUMBERS)
    ),
    "tree": lambda: chain(DecisionTreeClassifier(max_depth=5), ("passthrough", NUMBERS)),
    "tree_of_one_leaf": lambda: chain(DecisionTreeClassifier(min_samples_leaf=700), ("passthrough", NUMBERS)),
    "logistic": lambda: chain(LogisticRegression(), (ONE_HOT, CATEGORIES), (SCALED, NUMBERS)),
    "logistic_of_integers": lambda: chain(LogisticRegression(), (ONE_HOT, ["kind", "hour", "weekend"])),
    "logistic_rare_and_missing": lambda: chain(
        LogisticRegression(),
        (
            make_pipeline(
                SimpleImputer(strategy="constant", fill_value="none"),
                OneHotEncoder(handle_unknown="infrequent_if_exist", min_frequency=12),
            ),
            CATEGORIES,
        ),
    ),
    "logistic_by_dtype": lambda: chain(
        LogisticRegression(),
        (ONE_HOT, make_column_selector(dtype_include=object)),
        (SCALED, make_column_selector(dtype_include=np.number)),
    ),
    "target_encoder": lambda: chain(
        HistGradientBoostingClassifier(max_iter=10), (TargetEncoder(), CATEGORIES), ("passthrough", NUMBERS)
    ),
    "unseen_raises": lambda: chain(
        HistGradientBoostingClassifier(max_iter=10), (OrdinalEncoder(), ["carrier"]), ("passthrough", NUMBERS)
    ),
}
REGRESSORS = {
    "ridge": lambda: chain(
        Ridge(),
        (ONE_HOT, CATEGORIES),
        (make_pipeline(SimpleImputer(add_indicator=True), StandardScaler()), NUMBERS),
    ),
    "linear": lambda: chain(LinearRegression(), ("passthrough", FULL)),
    "log_target": lambda: chain(
        TransformedTargetRegressor(LinearRegression(), func=np.log1p, inverse_func=np.expm1),
        (ONE_HOT, CATEGORIES),
        (SCALED, NUMBERS),
    ),
    "voting": lambda: chain(
        VotingRegressor([("a", Ridge()), ("b", DecisionTreeRegressor(max_depth=3))], weights=[1, 3]),
        (ONE_HOT, ["carrier"]),
        ("passthrough", FULL),
    ),
    "polynomial": lambda: chain(Ridge(), (make_pipeline(SCALED, PolynomialFeatures(3)), NUMBERS)),
    "powers": lambda: chain(Ridge(), (make_pipeline(SimpleImputer(), PowerTransformer()), NUMBERS)),
    "function": lambda: chain(Ridge(), (FunctionTransformer(np.log1p), ["distance"])),
    "poisson": lambda: chain(PoissonRegressor(), (SCALED, NUMBERS)),
    "histogram_poisson": lambda: chain(
        HistGradientBoostingRegressor(loss="poisson", max_iter=10), ("passthrough", NUMBERS)
    ),
    "forest": lambda: chain(RandomForestRegressor(10), (ORDINAL, CATEGORIES), ("passthrough", NUMBERS)),
    "boosting": lambda: chain(GradientBoostingRegressor(n_estimators=10), ("passthrough", FULL)),
    "tree": lambda: chain(DecisionTreeRegressor(max_depth=6), ("passthrough", [*FULL, "kind"])),
}
CASES = [
    *(pytest.param(make, probability, id=f"classifier-{name}") for name, make in CLASSIFIERS.items()),
    *(pytest.param(make, number, id=f"regressor-{name}") for name, make in REGRESSORS.items()),
]


@pytest.mark.parametrize(("make", "predict"), CASES)
def test_is_compiled_and_agrees(bench: Workbench, make: Any, predict: Any) -> None:
    model = fitted(bench, make(), predict)
    plan = bench.compile(model)
    assert plan.path == "compiled", plan.reason
    assert plan.batching
    assert plan.parity is not None
    assert plan.parity.rows == HOLDOUT
    assert plan.parity.edge_rows > 1000
    assert plan.parity.max_abs_difference < 1e-12
    rows = [
        {**ROW, **change}
        for change in ({}, {"town": None}, {"town": "nowhere"}, {"delay": None, "hour": None}, {"kind": 4})
    ]
    ours = bench.compiled(plan).predict(tuples(plan, rows))
    for index, row in enumerate(rows):
        try:
            theirs = model.predict(bench.frame([row]))[0]
        except ValueError:
            theirs = math.nan
        assert ours[index] == pytest.approx(theirs, abs=TOLERANCE, nan_ok=True)


def test_plain_trees_agree_to_the_last_bit(bench: Workbench) -> None:
    plan = bench.compile(fitted(bench, REGRESSORS["boosting"](), number))
    assert plan.parity is not None
    assert plan.parity.max_abs_difference == 0.0


def test_the_plan_reads_back(bench: Workbench) -> None:
    plan = bench.compile(fitted(bench, CLASSIFIERS["histogram_by_index"](), probability))
    assert read_plan(bench.folder) == plan
    assert set(plan.numbers) == {*NUMBERS, "weekend"}
    towns = next(lookup for lookup in plan.lookups if lookup.column == "town")
    assert len(towns.values) == TOWNS
    assert "within" in plan.reason


def test_two_compilations_are_byte_equal(bench: Workbench) -> None:
    model = fitted(bench, CLASSIFIERS["target_encoder"](), probability)
    bench.compile(model, "first")
    bench.compile(model, "second")
    for name in (PLAN_FILE, ONNX_FILE):
        assert (bench.folder / "first" / name).read_bytes() == (bench.folder / "second" / name).read_bytes()


def test_what_the_original_refuses_is_not_answered(bench: Workbench) -> None:
    """Beyond 32 bits a tree raises; an encoder that was told to raises for what it has never seen."""
    tree = bench.compile(fitted(bench, CLASSIFIERS["tree"](), probability))
    rows = [ROW, {**ROW, "speed": 1e39}]
    assert np.isnan(bench.compiled(tree).predict(tuples(tree, rows))).tolist() == [False, True]
    raises = bench.compile(fitted(bench, CLASSIFIERS["unseen_raises"](), probability))
    rows = [ROW, {**ROW, "carrier": "ZZ"}]
    assert np.isnan(bench.compiled(raises).predict(tuples(raises, rows))).tolist() == [False, True]


def test_a_category_that_only_the_holdout_has_is_refused_as_by_the_original(bench: Workbench) -> None:
    known = bench.training["carrier"] != "AA"
    pipeline = chain(LogisticRegression(), (OneHotEncoder(), ["carrier"]), ("passthrough", FULL))
    pipeline.fit(bench.training[known], bench.late[known])
    plan = bench.compile(Model(pipeline, probability))
    assert plan.path == "compiled", plan.reason
    rows = [ROW, {**ROW, "carrier": "AA"}, {**ROW, "carrier": "ZZ"}]
    assert np.isnan(bench.compiled(plan).predict(tuples(plan, rows))).tolist() == [False, True, True]


def test_no_rows_are_no_predictions(bench: Workbench) -> None:
    plan = bench.compile(fitted(bench, CLASSIFIERS["tree"](), probability))
    assert bench.compiled(plan).predict([]).shape == (0,)


def test_an_array_of_columns_is_followed(bench: Workbench) -> None:
    def by_array(model: Any, rows: Any) -> Any:
        return model.pipeline.predict(rows[["speed", "hour", "delay"]].to_numpy())

    pipeline = make_pipeline(SimpleImputer(), HistGradientBoostingRegressor(max_iter=5))
    pipeline.fit(bench.training[["speed", "hour", "delay"]].to_numpy(), bench.minutes)
    plan = bench.compile(Model(pipeline, by_array))
    assert plan.path == "compiled", plan.reason
    assert plan.numbers == ("speed", "hour", "delay")


def test_a_column_is_a_number_or_a_category(bench: Workbench) -> None:
    pipeline = chain(LogisticRegression(), (ONE_HOT, ["kind"]), ("passthrough", ["kind"]))
    plan = bench.compile(fitted(bench, pipeline, probability))
    assert plan.path == "original"
    assert "'kind' is used both as a number and as a category" in plan.reason


def filled(model: Model, rows: Any) -> Any:
    return model.pipeline.predict_proba(rows.assign(delay=rows.delay.fillna(0.0)))[:, 1]


def clipped(model: Model, rows: Any) -> Any:
    return np.clip(model.pipeline.predict_proba(rows)[:, 1], 0.01, 0.99)


def by_parts(model: Model, rows: Any) -> Any:
    return model.pipeline[-1].predict_proba(model.pipeline[:-1].transform(rows))[:, 1]


def branching(model: Model, rows: Any) -> Any:
    return np.where(rows.weekend, 0.5, model.pipeline.predict_proba(rows)[:, 1])


def labels(model: Model, rows: Any) -> Any:
    return model.pipeline.predict(rows)


def constant(model: Model, rows: Any) -> Any:
    return np.full(len(rows), 0.25)


@pytest.mark.parametrize(
    ("predict", "reason"),
    [
        (filled, "changes what its 'pipeline' is given in column 'delay'"),
        (clipped, "changes what predict_proba of its 'pipeline' says"),
        (by_parts, "does more with 'pipeline' than to ask it"),
        (branching, "changes what predict_proba of its 'pipeline' says"),
        (labels, "returns classes"),
        (constant, "never asks its 'pipeline'"),
    ],
)
def test_code_of_its_own_is_served_by_the_original(bench: Workbench, predict: Any, reason: str) -> None:
    plan = bench.compile(fitted(bench, CLASSIFIERS["histogram_by_index"](), predict))
    assert plan.path == "original"
    assert reason in plan.reason
    assert plan.batching, plan.batching_reason
    assert not (bench.folder / "serving" / ONNX_FILE).exists()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: chain(KNeighborsRegressor(3), (SCALED, NUMBERS)), "skl2onnx"),
        (lambda: chain(Ridge(), (FunctionTransformer(np.sin), FULL)), "FunctionTransformer calls sin"),
    ],
)
def test_what_cannot_be_converted_says_why(bench: Workbench, make: Any, reason: str) -> None:
    plan = bench.compile(fitted(bench, make(), number))
    assert plan.path == "original"
    assert reason in plan.reason
    assert str(bench.folder) not in plan.reason


def test_unseen_values_that_are_told_apart_are_not_compiled(bench: Workbench) -> None:
    def lengths(frame: Any) -> Any:
        return np.array([[len(str(value))] for value in frame["carrier"]], float)

    plan = bench.compile(fitted(bench, chain(Ridge(), (FunctionTransformer(lengths), ["carrier"])), number))
    assert plan.path == "original"
    assert "training never saw" in plan.reason


def test_switched_off(bench: Workbench) -> None:
    plan = bench.compile(fitted(bench, REGRESSORS["linear"](), number), compile=False)
    assert (plan.path, plan.reason) == ("original", "switched off by compiled = never")
    assert plan.batching


def test_rows_that_act_on_each_other_are_not_batched(bench: Workbench) -> None:
    def centred(model: Any, rows: Any) -> Any:
        said = model.pipeline.predict(rows)
        return said - said.mean()

    plan = bench.compile(fitted(bench, REGRESSORS["linear"](), centred))
    assert (plan.path, plan.batching) == ("original", False)
    assert "change each other's predictions" in plan.batching_reason


def test_a_model_that_fails_now_and_then_is_not_batched(bench: Workbench) -> None:
    calls = iter(range(1000))

    def moody(model: Any, rows: Any) -> Any:
        if next(calls) > 2:
            raise RuntimeError("not today")
        return np.zeros(len(rows))

    plan = bench.compile(Model(None, moody))
    assert (plan.path, plan.batching) == ("original", False)
    assert plan.reason == "no attribute of Model is a fitted scikit-learn estimator"
    assert "not today" in plan.batching_reason


def test_a_tolerance_that_is_not_reached(bench: Workbench) -> None:
    """Zero is beyond what a polynomial's sums in another order reach: the reason names the row."""
    plan = bench.compile(fitted(bench, REGRESSORS["polynomial"](), number), tolerance=0.0)
    assert plan.path == "original"
    assert "original" in plan.reason
    assert "'distance'" in plan.reason


def test_a_corrupt_graph_is_refused(bench: Workbench) -> None:
    plan = bench.compile(fitted(bench, REGRESSORS["linear"](), number))
    path = bench.folder / "serving" / ONNX_FILE
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ContractError, match="build the release again"):
        CompiledModel(path.parent, plan)


def test_a_graph_of_another_plan_is_refused(bench: Workbench) -> None:
    plan = bench.compile(fitted(bench, REGRESSORS["linear"](), number))
    other: Plan = msgspec.structs.replace(plan, numbers=())
    with pytest.raises(ContractError, match="inputs"):
        CompiledModel(bench.folder / "serving", other)


def test_an_unreadable_plan_is_refused(bench: Workbench) -> None:
    bench.compile(fitted(bench, REGRESSORS["linear"](), number))
    (bench.folder / "serving" / PLAN_FILE).write_text('{"path": "guessed"}')
    with pytest.raises(ContractError, match="unreadable plan"):
        read_plan(bench.folder)
    assert read_plan(bench.folder / "nowhere") is None


def test_the_trainer_compiles_in_a_process_of_its_own(toy: Toy, tmp_path: Path) -> None:
    """The toy fills nulls in predict: its developer is told which column that changes."""
    request = CompileRequest(
        source=str(toy.source),
        package="toy",
        trained=str(toy.output),
        parquet_path=str(toy.snapshot),
        time_column="time",
        holdout_start="2013-01-18T00:00:00",
        holdout_rows=None,
        compile=True,
        tolerance=TOLERANCE,
        seed=3,
        output=str(tmp_path / "serving"),
        result_path=str(tmp_path / "result.json"),
    )
    done = run_trainer(request, tmp_path)
    assert done.returncode == 0, done.stderr
    assert result_of(request.result_path).error is None
    plan = read_plan(tmp_path)
    assert plan is not None
    assert (plan.path, plan.batching) == ("original", True)
    assert "'delay'" in plan.reason
    assert "the original serves" in done.stdout
