"""Calls of many rows go through masks of the trees' leaves: faster, and not another prediction."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from sklearn.compose import make_column_transformer
from sklearn.ensemble import (
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestRegressor,
)
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OrdinalEncoder

from serving import leafmasks
from serving.compiled import CompiledModel
from serving.compiler import MOST_FEW, compile_model
from serving.contract import ONNX_FILE, PLAN_FILE, TREES_FILE, Column, Plan
from serving.errors import ContractError
from serving.estimators import predicted
from serving.graph import Graph, Inputs, NotCompilable, Raw
from serving.parity import one_thread
from serving.passthrough import Output
from serving.quickscorer import MOST_ROWS
from tests.serving.small_models import (
    NUMBERS,
    ROW,
    Model,
    Workbench,
    compile_request,
    number,
    probability,
    tuples,
    workbench,
)

MISSING = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=np.nan)
CATEGORIES = ["carrier", "town"]
FULL = ["distance", "speed", "kind"]


@pytest.fixture(scope="module", autouse=True)
def trained_by_one_thread() -> Iterator[None]:
    """On busy cores, more of them wait for each other."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return workbench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def boosted(bench: Workbench) -> tuple[Model, Plan]:
    """Categories, nulls, a sigmoid; its files are in `bench.folder / "boosted"`."""
    trees = HistGradientBoostingClassifier(max_iter=60, categorical_features=[0, 1], random_state=0)
    encode = make_column_transformer((MISSING, CATEGORIES), ("passthrough", [*NUMBERS, "weekend"]))
    pipeline = make_pipeline(encode, trees).fit(bench.training, bench.late)
    model = Model(pipeline, probability)
    return model, bench.compile(model, "boosted")


def compiled_and_said(bench: Workbench, model: Model, output: str) -> tuple[Plan, str]:
    said: list[str] = []
    request = compile_request(bench.folder, output=str(bench.folder / output))
    plan = compile_model(model, bench.schema, request, said.append)
    assert plan.path == "compiled", plan.reason
    assert (plan.trees_from_rows is not None) == (bench.folder / output / TREES_FILE).exists()
    return plan, "\n".join(said)


def graph_alone(bench: Workbench, plan: Plan, output: str) -> CompiledModel:
    return bench.compiled(msgspec.structs.replace(plan, trees_from_rows=None), output)


def odd_rows(count: int) -> list[dict[str, Any]]:
    changes = [
        {},
        {"town": None, "delay": None},
        {"town": "nowhere", "hour": None},
        {"delay": -0.0, "speed": 1e300},
        {"delay": float("inf"), "weekend": True},
        {"delay": float("-inf"), "kind": 2**62},
    ]
    return [{**ROW, **changes[i % len(changes)], "distance": 100 + 7 * i} for i in range(count)]


def test_a_call_of_any_size_says_what_the_graph_says(bench: Workbench, boosted: tuple[Model, Plan]) -> None:
    _, plan = boosted
    assert plan.trees_from_rows is not None
    assert 2 <= plan.trees_from_rows <= MOST_FEW
    trees, graph = bench.compiled(plan, "boosted"), graph_alone(bench, plan, "boosted")
    from_two = bench.compiled(msgspec.structs.replace(plan, trees_from_rows=2), "boosted")
    rows = tuples(plan, odd_rows(2 * MOST_ROWS + 1))
    meant = graph.predict(rows)
    assert len(set(meant)) > 20
    at = plan.trees_from_rows
    for count in (1, 2, 3, at - 1, at, at + 1, MOST_ROWS, MOST_ROWS + 1, 2 * MOST_ROWS, 2 * MOST_ROWS + 1):
        for form in (trees, from_two):
            said = form.predict(rows[:count])
            assert said.shape == (count,)
            np.testing.assert_allclose(said, meant[:count], rtol=0, atol=2.3e-16)  # of the sigmoid


@pytest.mark.parametrize(("leaves", "bits"), [(16, 16), (17, 32), (32, 32), (33, 64), (64, 64)])
def test_words_are_as_wide_as_trees_have_leaves(tmp_path: Path, leaves: int, bits: int) -> None:
    """The last leaf of a full word is the one that a wrong shift or a signed number loses."""
    graph, x, model = grown(tmp_path, leaves)
    content, _ = leafmasks.leaf_masks(graph)
    (tmp_path / TREES_FILE).write_bytes(content)
    with np.load(tmp_path / TREES_FILE, allow_pickle=False) as arrays:
        assert arrays["masks"].dtype.itemsize * 8 == bits
        assert (arrays["leaves"][:, leaves - 1] != 0).any()
    plan = Plan("compiled", "", True, "", ("x0", "x1"), trees_from_rows=2)
    said = CompiledModel(tmp_path, plan).predict([tuple(row) for row in x.tolist()])
    assert np.array_equal(said, model.predict(x))


def test_a_threshold_that_is_no_number_is_below_nothing(tmp_path: Path) -> None:
    """HistGradientBoosting halves the way between two infinities at NaN: only what is missing goes left."""
    random = np.random.default_rng(1)
    x = random.normal(size=(400, 1))
    model = HistGradientBoostingRegressor(max_iter=9).fit(x, np.sin(3 * x[:, 0]))
    for (predictor,) in model._predictors[::2]:
        predictor.nodes["num_threshold"][0] = np.nan
        predictor.nodes["missing_go_to_left"][0] = True
    graph = graph_of(tmp_path, model, ["x0"])
    (tmp_path / TREES_FILE).write_bytes(leafmasks.leaf_masks(graph)[0])
    values = [-math.inf, math.inf, math.nan, *x[:50, 0].tolist()]
    compiled = CompiledModel(tmp_path, Plan("compiled", "", True, "", ("x0",), trees_from_rows=2))
    said = compiled.predict([(value,) for value in values])
    assert np.array_equal(said, model.predict(np.array(values)[:, None]))


def test_values_beside_thresholds_and_odd_ones_find_the_same_leaf(tmp_path: Path) -> None:
    """To the last bit: of 64-bit and of 32-bit trees, in calls on both sides of a pass's length."""
    random = np.random.default_rng(7)
    x = random.normal(size=(400, 3))
    x[:, 1] = random.choice([0.0, -0.0, 5e-324, -5e-324, 1e-310, 1.0], 400)
    y = x.sum(axis=1) + random.normal(size=400)
    names = ["x0", "x1", "x2"]
    for model in (
        HistGradientBoostingRegressor(max_iter=30, min_samples_leaf=2),
        GradientBoostingRegressor(n_estimators=30),
        RandomForestRegressor(10, max_leaf_nodes=40),
    ):
        graph = graph_of(tmp_path, model.fit(x, y), names)
        (tmp_path / TREES_FILE).write_bytes(leafmasks.leaf_masks(graph)[0])
        plan = Plan("compiled", "", True, "", tuple(names), trees_from_rows=2)
        fast = CompiledModel(tmp_path, plan)
        slow = CompiledModel(tmp_path, msgspec.structs.replace(plan, trees_from_rows=None))
        at = random.choice(graph.trees[0].ensemble.splits, (600, 3))
        single = at.astype(np.float32)
        beside = [at, np.nextafter(at, np.inf), np.nextafter(at, -np.inf), single]
        beside += [np.nextafter(single, np.float32(np.inf)).astype(float)]
        odd = [np.full(at.shape, value) for value in (0.0, -0.0, 5e-324, -1e-310, 1e308, np.inf, np.nan)]
        values = np.choose(random.integers(0, len(beside + odd), at.shape), [*beside, *odd])
        rows = [tuple(row) for row in values.tolist()]
        for count in (2, 3, 50, 51, MOST_ROWS + 1, 600):
            assert np.array_equal(fast.predict(rows[:count]), slow.predict(rows[:count]), equal_nan=True)


def test_trees_of_categories_alone_have_masks(bench: Workbench) -> None:
    trees = HistGradientBoostingRegressor(max_iter=60, categorical_features=[0, 1])
    pipeline = make_pipeline(make_column_transformer((MISSING, CATEGORIES)), trees)
    plan, said = compiled_and_said(bench, Model(pipeline.fit(bench.training, bench.minutes), number), "codes")
    assert not plan.numbers
    assert plan.trees_from_rows is not None, said
    rows = tuples(plan, odd_rows(100))
    meant = graph_alone(bench, plan, "codes").predict(rows)
    assert np.array_equal(bench.compiled(plan, "codes").predict(rows), meant)


def test_larger_trees_are_left_to_the_graph(tmp_path: Path) -> None:
    graph, _, _ = grown(tmp_path, 65)
    with pytest.raises(NotCompilable, match="more than 64 leaves"):
        leafmasks.leaf_masks(graph)


def grown(folder: Path, leaves: int) -> tuple[Graph, np.ndarray, Any]:
    """Trees of so many leaves over two columns, as a graph in the folder."""
    random = np.random.default_rng(leaves)
    x = random.normal(size=(2000, 2))
    x[random.random(x.shape) < 0.05] = np.nan
    y = np.nansum(np.sin(5 * x), axis=1) + random.normal(size=2000)
    model = HistGradientBoostingRegressor(max_iter=5, max_leaf_nodes=leaves, min_samples_leaf=2).fit(x, y)
    assert max(predictor.get_n_leaf_nodes() for (predictor,) in model._predictors) == leaves
    return graph_of(folder, model, ["x0", "x1"]), x, model


def graph_of(folder: Path, model: Any, names: list[str]) -> Graph:
    graph = Graph(Inputs(numbers=list(names)))
    sources = [Raw(Column(name, "number", True)) for name in names]
    prediction = predicted(graph, model, Output("trees", "predict", None, ()), list(sources), None)  # type: ignore[arg-type]
    (folder / ONNX_FILE).write_bytes(graph.model(prediction))
    return graph


def test_what_the_original_refuses_is_refused_in_a_large_call(bench: Workbench) -> None:
    """Of 32-bit numbers without nulls: the row that is too large is NaN, those beside it are answered."""
    trees = GradientBoostingClassifier(n_estimators=100, random_state=0)
    pipeline = make_pipeline(make_column_transformer(("passthrough", FULL)), trees)
    model = Model(pipeline.fit(bench.training, bench.late), probability)
    plan = bench.compile(model, "narrow")
    assert plan.trees_from_rows is not None
    rows = [{**ROW, "distance": 100 + 7 * i} for i in range(plan.trees_from_rows)]
    meant = model.predict(bench.frame(rows))
    rows[3] = {**ROW, "speed": 1e39}
    said = bench.compiled(plan, "narrow").predict(tuples(plan, rows))
    assert np.flatnonzero(np.isnan(said)).tolist() == [3]
    np.testing.assert_allclose(np.delete(said, 3), np.delete(meant, 3), rtol=0, atol=1e-15)


def test_two_compilations_are_byte_equal(bench: Workbench, boosted: tuple[Model, Plan]) -> None:
    model, plan = boosted
    assert bench.compile(model, "again") == plan
    for name in (PLAN_FILE, ONNX_FILE, TREES_FILE):
        assert (bench.folder / "boosted" / name).read_bytes() == (bench.folder / "again" / name).read_bytes()


def test_masks_that_are_wrong_at_a_threshold_do_not_serve(
    bench: Workbench, boosted: tuple[Model, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The edge rows hold values at thresholds: `<` for `<=` is found out, and the graph serves all calls."""
    right = leafmasks._failed

    def wrong(ensemble: Any, branch: Any, thresholds: np.ndarray) -> np.ndarray:
        failed = right(ensemble, branch, thresholds)
        failed[:-1] = thresholds >= ensemble.splits[branch.node]
        return failed

    monkeypatch.setattr(leafmasks, "_failed", wrong)
    plan, said = compiled_and_said(bench, boosted[0], "wrong")
    assert plan.trees_from_rows is None
    assert "no masks of leaves for calls of many rows: of row" in said


def test_masks_that_would_be_large_are_not_made(
    bench: Workbench, boosted: tuple[Model, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leafmasks, "LARGEST_MASKS", 1000)
    plan, said = compiled_and_said(bench, boosted[0], "large")
    assert plan.trees_from_rows is None
    assert "the limit is 1,000" in said


OTHERS = {
    "0 ensembles": lambda: chain(LinearRegression(), ("passthrough", FULL)),
    "would pay from": lambda: chain(HistGradientBoostingRegressor(max_iter=1), ("passthrough", FULL)),
    "an earlier step computed": lambda: chain(
        HistGradientBoostingRegressor(max_iter=60), (SimpleImputer(), NUMBERS)
    ),
}


def chain(estimator: Any, *columns: Any) -> Any:
    return make_pipeline(make_column_transformer(*columns), estimator)


@pytest.mark.parametrize("reason", OTHERS)
def test_a_model_of_another_kind_leaves_no_trees_behind(bench: Workbench, reason: str) -> None:
    """Compiled into the folder of an earlier model, whose trees would answer for this one."""
    (bench.folder / "other").mkdir(exist_ok=True)
    (bench.folder / "other" / TREES_FILE).write_bytes(b"of another model")
    model = Model(OTHERS[reason]().fit(bench.training, bench.minutes), number)
    plan, said = compiled_and_said(bench, model, "other")
    assert plan.trees_from_rows is None
    assert reason in said


def test_a_corrupt_file_is_refused(bench: Workbench, boosted: tuple[Model, Plan], tmp_path: Path) -> None:
    folder, plan = bench.folder / "boosted", boosted[1]
    whole = (folder / TREES_FILE).read_bytes()
    (tmp_path / ONNX_FILE).write_bytes((folder / ONNX_FILE).read_bytes())
    for broken in (b"", whole[:-40], whole[: len(whole) // 2], b"x" * 200):
        (tmp_path / TREES_FILE).write_bytes(broken)
        with pytest.raises(ContractError, match="build the release again"):
            CompiledModel(tmp_path, plan)
    (tmp_path / TREES_FILE).unlink()
    with pytest.raises(ContractError, match="build the release again"):
        CompiledModel(tmp_path, plan)


def test_trees_of_another_plan_are_refused(
    bench: Workbench, boosted: tuple[Model, Plan], tmp_path: Path
) -> None:
    """The same graph, but masks of a model that knows fewer towns."""
    folder, plan = bench.folder / "boosted", boosted[1]
    with np.load(folder / TREES_FILE, allow_pickle=False) as arrays:
        fewer = {**arrays, "masks": arrays["masks"][:-1]}
    np.savez(tmp_path / TREES_FILE, **fewer)
    (tmp_path / ONNX_FILE).write_bytes((folder / ONNX_FILE).read_bytes())
    with pytest.raises(ContractError, match="fewer masks than values"):
        CompiledModel(tmp_path, plan)


def test_a_forged_file_is_refused(bench: Workbench, boosted: tuple[Model, Plan], tmp_path: Path) -> None:
    """What would take all memory, be unpickled, or fail in a user's request."""
    folder, plan = bench.folder / "boosted", boosted[1]
    (tmp_path / ONNX_FILE).write_bytes((folder / ONNX_FILE).read_bytes())
    with np.load(folder / TREES_FILE, allow_pickle=False) as arrays:
        right = dict(arrays)
    forged: list[dict[str, Any]] = [
        {"numbers": right["numbers"] - 1},
        {"lookups": right["lookups"] - 1},
        {"thresholds": np.append(right["thresholds"], 1.0)},
        {"thresholds": right["thresholds"].astype(str)},
        {"thresholds": right["thresholds"].astype(object)},
        {"masks": right["masks"].astype(np.int64)},
        {"rest": np.frombuffer((folder / ONNX_FILE).read_bytes(), np.uint8)},
        {"more": np.zeros(3)},
    ]
    for changes in forged:
        np.savez(tmp_path / TREES_FILE, **{**right, **changes})
        with pytest.raises(ContractError, match="build the release again"):
            CompiledModel(tmp_path, plan)
    np.savez_compressed(tmp_path / TREES_FILE, **right, more=np.zeros(10**6))
    with pytest.raises(ContractError, match="compressed"):
        CompiledModel(tmp_path, plan)
    np.savez(tmp_path / TREES_FILE, **right)
    CompiledModel(tmp_path, plan)
    with pytest.raises(ContractError, match="2 or more"):
        CompiledModel(tmp_path, msgspec.structs.replace(plan, trees_from_rows=1))
