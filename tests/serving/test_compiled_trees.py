"""Random trees on random rows at, beside and far from their thresholds: equal to the last bit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.ensemble import (
    ExtraTreesRegressor,
    GradientBoostingRegressor,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
)
from sklearn.preprocessing import OrdinalEncoder
from sklearn.tree import DecisionTreeRegressor

from serving import indicators
from serving.compiled import CompiledModel
from serving.contract import ONNX_FILE, TREES_FILE, Column, Lookup, Plan
from serving.estimators import predicted
from serving.graph import Graph, Inputs, Raw, Table
from serving.leafmasks import leaf_masks
from serving.passthrough import Output
from tests.serving.small_models import Workbench, workbench

ESTIMATORS = {
    "histogram": lambda seed: HistGradientBoostingRegressor(
        max_iter=5, min_samples_leaf=3, random_state=seed
    ),
    "forest": lambda seed: RandomForestClassifier(5, random_state=seed),
    "extra": lambda seed: ExtraTreesRegressor(5, max_leaf_nodes=64, random_state=seed),
    "boosting": lambda seed: GradientBoostingRegressor(n_estimators=5, random_state=seed),
    "tree": lambda seed: DecisionTreeRegressor(max_depth=4, random_state=seed),
}
TAKES_NULL = {"histogram", "forest", "extra", "tree"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return workbench(tmp_path_factory.mktemp("bench"))


def compiled(graph: Graph, prediction: str) -> tuple[CompiledModel, CompiledModel]:
    """The graph alone, and with the masks of its trees' leaves for two rows or more."""
    content = graph.model(prediction)
    lookups = tuple(Lookup(name, values) for name, values in graph.inputs.lookups.items())
    plan = Plan("compiled", "", True, "", tuple(graph.inputs.numbers), lookups)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / ONNX_FILE).write_bytes(content)
        (Path(folder) / TREES_FILE).write_bytes(leaf_masks(graph)[0])
        masked = msgspec.structs.replace(plan, trees_from_rows=2)
        return CompiledModel(Path(folder), plan), CompiledModel(Path(folder), masked)


def beside(thresholds: np.ndarray) -> np.ndarray:
    thresholds = thresholds[np.abs(thresholds) < 1e37]  # one of a split of nulls from all else is infinite
    narrow = thresholds.astype(np.float32)
    steps = [np.nextafter(thresholds, way) for way in (-np.inf, np.inf)]
    steps += [np.nextafter(narrow, np.float32(way)).astype(float) for way in (-np.inf, np.inf)]
    return np.concatenate([thresholds, narrow.astype(float), *steps, [0.0, -0.0, 5e-324, 1e30, -1e30]])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(ESTIMATORS)),
    seed=st.integers(0, 2**31),
    columns=st.integers(1, 4),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_random_trees(bench: Workbench, kind: str, seed: int, columns: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    x = random.normal(size=(120, columns)) * scale
    if kind in TAKES_NULL:
        x[random.random(x.shape) < 0.1] = np.nan
    y = np.nansum(x, axis=1) / scale + random.normal(size=120)
    trees: Any = ESTIMATORS[kind](seed % 1000)
    classifies = hasattr(trees, "predict_proba")
    trees.fit(x, y > 0 if classifies else y)

    graph = Graph(Inputs(numbers=[f"x{i}" for i in range(columns)]))
    sources = [Raw(Column(f"x{i}", "number", True)) for i in range(columns)]
    output = Output("trees", "predict_proba" if classifies else "predict", 1 if classifies else None, ())
    forms = compiled(graph, predicted(graph, trees, output, list(sources), bench))  # type: ignore[arg-type]

    rows = np.column_stack(
        [
            random.choice(beside(np.array(sorted(graph.thresholds.get(f"x{i}", {0.0})))), 200)
            for i in range(columns)
        ]
    )
    if kind in TAKES_NULL:
        rows[random.random(rows.shape) < 0.1] = np.nan
    theirs = trees.predict_proba(rows)[:, 1] if classifies else trees.predict(rows)
    for model in forms:
        assert np.array_equal(model.predict([tuple(row) for row in rows.tolist()]), theirs)
        assert model.predict([tuple(rows[0].tolist())])[0] == theirs[0]


@pytest.mark.parametrize("most_columns", [0, 1000], ids=["as sets", "as columns"])
@pytest.mark.parametrize("count", [1, 2, 33, 64, 65, 130, 250])
def test_trees_of_many_categories(
    bench: Workbench, count: int, most_columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every known code, one that no training row had, and null: sets of any size, both ways of missing."""
    monkeypatch.setattr(indicators, "MOST_COLUMNS", most_columns)
    random = np.random.default_rng(count)
    codes = np.concatenate([np.arange(count), random.integers(0, count, 3000)]).astype(float)
    codes[random.random(len(codes)) < 0.05] = np.nan
    effect = random.normal(size=count + 1)
    x = np.column_stack([codes, random.normal(size=len(codes))])
    y = effect[np.nan_to_num(codes, nan=count).astype(int)] + x[:, 1] + random.normal(size=len(codes))
    trees = HistGradientBoostingRegressor(
        max_iter=20, categorical_features=[0], min_samples_leaf=5, random_state=count
    ).fit(x, y)
    known = tuple(float(code) for code in range(count))
    graph = Graph(Inputs(numbers=["x"], lookups={"c": known}))
    table = Table("c", np.array([*known, np.nan, np.nan]))
    sources = [table, Raw(Column("x", "number", True))]
    forms = compiled(graph, predicted(graph, trees, Output("trees", "predict", None, ()), sources, bench))  # type: ignore[arg-type]
    asked = [(value, code) for value in (-1.0, 0.3, None) for code in (*known, 999.0, None)]
    rows = np.array([[np.nan if c is None or c == 999 else c, np.nan if v is None else v] for v, c in asked])
    for model in forms:
        assert np.array_equal(model.predict(asked), trees.predict(rows))
    sets = any(branch.any() for predictor in trees._predictors for branch in _categorical(predictor))
    assert _has_sets(graph) == (sets and most_columns == 0)


def _categorical(predictors: Any) -> Any:
    return (p.nodes["is_categorical"] * (1 - p.nodes["is_leaf"]) for p in predictors)


def _has_sets(graph: Graph) -> bool:
    (trees,) = (node for node in graph._nodes if node.op_type == "TreeEnsemble")
    return any(attribute.name == "membership_values" for attribute in trees.attribute)


def test_an_encoder_is_asked_for_every_kind_of_value(bench: Workbench) -> None:
    """Its table ends with what unseen values become, and with what null becomes."""
    from serving.edges import Data
    from serving.tabulate import tabulate
    from tests.serving.small_models import compile_request

    data = Data(compile_request(bench.folder), bench.schema)
    town = next(feature for feature in bench.schema.features if feature.name == "town")
    encoder = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
    encoder.fit(bench.training[["town"]])
    graph = Graph(Inputs())
    (table,) = tabulate(graph, encoder, [Raw(town)], data)
    assert isinstance(table, Table)
    assert graph.inputs.lookups["town"] == tuple(sorted(data.known(town)))
    (null,) = encoder.transform(bench.training.loc[bench.training["town"].isna(), ["town"]].iloc[:1])[0]
    assert table.values.tolist() == [*map(float, range(len(data.known(town)))), -1.0, null]
