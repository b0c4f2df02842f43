"""Final estimators as a graph: trees and linear models by hand, others by skl2onnx."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from serving.graph import Computed, Graph, NotCompilable, Raw, Source, Table, Trees
from serving.indicators import Indicators, affordable
from serving.numbers import FUNCTIONS
from serving.steps import numeric, own_kind, skl2onnx_model, transformed
from serving.tabulate import Values
from serving.trees import LESS_OR_EQUAL, Ensemble, members

if TYPE_CHECKING:
    from serving.passthrough import Output

FLOAT, DOUBLE = 1, 11  # onnx.TensorProto
HISTOGRAM = ("HistGradientBoostingClassifier", "HistGradientBoostingRegressor")
BOOSTED = ("GradientBoostingClassifier", "GradientBoostingRegressor")
FORESTS = ("RandomForest", "ExtraTrees")
TREES = ("DecisionTree", "ExtraTree")


def predicted(graph: Graph, estimator: Any, output: Output, sources: list[Source], values: Values) -> str:
    """The tensor, [rows] or [rows, 1], of one output of a fitted estimator. Raises `NotCompilable`."""
    kind = own_kind(estimator)
    if kind == "Pipeline":
        for _, step in estimator.steps[:-1]:
            sources = transformed(graph, step, sources, values)
        return predicted(graph, estimator.steps[-1][1], output, sources, values)
    classes = getattr(estimator, "classes_", None)
    if classes is not None and len(classes) != 2:
        raise NotCompilable(f"{kind} tells {len(classes)} classes apart; only two are compiled")
    if kind == "TransformedTargetRegressor":
        return _transformed_target(graph, estimator, output, sources, values)
    if kind in ("VotingRegressor", "VotingClassifier"):
        return _voted(graph, estimator, output, sources, values)
    if kind in HISTOGRAM:
        return _histogram(graph, estimator, output, sources, values)
    if kind in BOOSTED:
        return _boosted(graph, estimator, output, sources)
    if kind.startswith(FORESTS + TREES):
        return _forest(graph, estimator, output, sources)
    if _is_linear(estimator, output):
        return _linear(graph, estimator, output, sources)
    return _by_skl2onnx(graph, estimator, output, sources)


def _transformed_target(
    graph: Graph, regressor: Any, output: Output, sources: list[Source], values: Values
) -> str:
    """A regressor of a target that a plain function or a fitted scaler turned: the inverse turns it back."""
    said = predicted(graph, regressor.regressor_, output, sources, values)
    transformer = regressor.transformer_
    if type(transformer).__name__ != "FunctionTransformer":
        raise NotCompilable(f"its target is turned by a {type(transformer).__name__}")
    name = getattr(transformer.inverse_func, "__name__", "nothing")
    if type(transformer.inverse_func).__name__ != "ufunc" or name not in FUNCTIONS:
        raise NotCompilable(
            f"its target is turned back by {name}; these are compiled: {', '.join(FUNCTIONS)}"
        )
    return FUNCTIONS[name](graph, said)


def _voted(graph: Graph, voting: Any, output: Output, sources: list[Source], values: Values) -> str:
    """The weighted mean of several estimators."""
    import numpy as np

    if output.method not in ("predict", "predict_proba"):
        raise NotCompilable(f"{output.method} of its {type(voting).__name__}")
    weights = voting._weights_not_none
    weights = np.ones(len(voting.estimators_)) if weights is None else np.asarray(weights, np.float64)
    shape = graph.constant(np.array([-1, 1], np.int64))
    columns = [
        graph.node("Reshape", predicted(graph, estimator, output, list(sources), values), shape)
        for estimator in voting.estimators_
    ]
    joined = graph.node("Concat", *columns, axis=1)
    return graph.node("MatMul", joined, graph.constant((weights / weights.sum()).reshape(-1, 1)))


def _histogram(graph: Graph, trees: Any, output: Output, sources: list[Source], values: Values) -> str:
    if trees._preprocessor is not None:
        sources = transformed(graph, trees._preprocessor, sources, values)
    bitsets, _ = trees._bin_mapper.make_known_categories_bitsets()
    categorical = (
        [] if trees._is_categorical_remapped is None else trees._is_categorical_remapped.nonzero()[0]
    )
    known = {int(feature): members(bitsets[index]) for index, feature in enumerate(categorical)}
    for feature in known:
        if not isinstance(sources[feature], Table):
            raise NotCompilable("a category of its trees is what an earlier step computed")
    ensemble = Ensemble()
    ensemble.constant(float(trees._baseline_prediction.ravel()[0]))
    columns = Indicators(sources)
    indicator = columns if affordable(trees._predictors, sources) else None
    for (predictor,) in trees._predictors:
        ensemble.histogram(predictor, known, indicator)
    sources = columns.used(ensemble)
    _note_thresholds(graph, ensemble, sources)
    raw = _trees(graph, ensemble, sources, numeric(graph, sources), narrow=False)
    if output.method == "decision_function":
        return raw
    return _linked(graph, raw, trees._loss, output)


def _boosted(graph: Graph, trees: Any, output: Output, sources: list[Source]) -> str:
    import numpy as np

    ensemble = Ensemble()
    if trees.init_ != "zero":
        if not type(trees.init_).__name__.startswith("Dummy"):
            raise NotCompilable("its boosting starts from an estimator of its own")
        start = trees._raw_predict_init(np.zeros((1, trees.n_features_in_), np.float32))
        ensemble.constant(float(start[0, 0]))
    for (tree,) in trees.estimators_:
        ensemble.plain(tree.tree_, trees.learning_rate * tree.tree_.value[:, 0, 0])
    _note_thresholds(graph, ensemble, sources)
    narrow = graph.node("Cast", numeric(graph, sources), to=FLOAT)
    raw = _trees(graph, ensemble, sources, narrow)
    if output.method != "decision_function":
        raw = _linked(graph, raw, trees._loss, output)
    return _guarded(graph, raw, narrow, trees.n_features_in_, missing=False)


def _forest(graph: Graph, forest: Any, output: Output, sources: list[Source]) -> str:
    import numpy as np

    trees = getattr(forest, "estimators_", None) or [forest]
    if forest.n_outputs_ != 1:
        raise NotCompilable(f"{type(forest).__name__} predicts {forest.n_outputs_} targets")
    ensemble = Ensemble()
    for tree in trees:
        ensemble.plain(tree.tree_, tree.tree_.value[:, 0, output.index or 0])
    _note_thresholds(graph, ensemble, sources)
    narrow = graph.node("Cast", numeric(graph, sources), to=FLOAT)
    said = _trees(graph, ensemble, sources, narrow)
    if len(trees) > 1:
        said = graph.node("Div", said, graph.constant(np.array(float(len(trees)))))
    missing = bool(trees[0]._support_missing_values(np.zeros((1, 1))))
    return _guarded(graph, said, narrow, forest.n_features_in_, missing)


def _note_thresholds(graph: Graph, ensemble: Ensemble, sources: Sequence[Source]) -> None:
    for feature, split, mode in zip(ensemble.features, ensemble.splits, ensemble.modes, strict=True):
        source = sources[feature]
        if mode == LESS_OR_EQUAL and isinstance(source, Raw):
            graph.thresholds.setdefault(source.column.name, set()).add(split)


def _trees(
    graph: Graph, ensemble: Ensemble, sources: Sequence[Source], values: str, narrow: bool = True
) -> str:
    """The sums of trees. Plain trees of scikit-learn compare 32-bit values with 64-bit thresholds."""
    if narrow:
        values = graph.node("Cast", values, to=DOUBLE)
    sums = graph.node("TreeEnsemble", values, domain="ai.onnx.ml", **ensemble.attributes())
    graph.trees.append(Trees(sums, ensemble, sources, narrow))
    return sums


def _linked(graph: Graph, raw: str, loss: Any, output: Output) -> str:
    """From a raw prediction to what predict or predict_proba says, by the loss's link."""
    import numpy as np

    match type(loss.link).__name__:
        case "IdentityLink":
            return raw
        case "LogLink":
            return graph.node("Exp", raw)
        case "LogitLink":
            said = graph.node("Sigmoid", raw)
        case "HalfLogitLink":
            said = graph.node("Sigmoid", graph.node("Mul", raw, graph.constant(np.array(2.0))))
        case link:
            raise NotCompilable(f"its trees have a link {link}")
    return said if output.index else graph.node("Sub", graph.constant(np.array(1.0)), said)


def _guarded(graph: Graph, prediction: str, values: str, width: int, missing: bool, kind: str = "f4") -> str:
    """NaN where scikit-learn raises: for infinity (a number beyond 32 bits), for null if it takes none."""
    import numpy as np

    if missing:
        infinite = graph.node("Cast", graph.node("IsInf", values), to=FLOAT)
        values, kind = graph.node("Where", graph.node("IsInf", values), values, infinite), "f4"
    nothing = graph.node("MatMul", values, graph.constant(np.zeros((width, 1), kind)))
    if kind == "f4":
        nothing = graph.node("Cast", nothing, to=DOUBLE)
    column = graph.node("Reshape", prediction, graph.constant(np.array([-1, 1], np.int64)))
    return graph.node("Add", column, nothing)  # infinity times zero is NaN, and so is NaN times zero


def _is_linear(estimator: Any, output: Output) -> bool:
    coefficients = getattr(estimator, "coef_", None)
    if coefficients is None or not hasattr(estimator, "intercept_") or hasattr(estimator, "kernel"):
        return False
    if output.method == "predict_proba":
        return type(estimator).__name__ in ("LogisticRegression", "LogisticRegressionCV")
    if type(estimator).__name__ in ("LinearSVC", "LinearSVR"):
        return True
    module = type(estimator).__module__
    return module.startswith("sklearn.linear_model.") and "_glm" not in module


def _linear(graph: Graph, estimator: Any, output: Output, sources: Sequence[Source]) -> str:
    import numpy as np

    coefficients = np.asarray(estimator.coef_, np.float64).reshape(-1, 1)
    values = numeric(graph, sources)
    raw = graph.node("MatMul", values, graph.constant(coefficients))
    raw = graph.node("Add", raw, graph.constant(np.asarray(estimator.intercept_, np.float64).reshape(1)))
    if output.method == "predict_proba":
        if not output.index:
            raw = graph.node("Neg", raw)
        raw = graph.node("Sigmoid", raw)
    return _guarded(graph, raw, values, len(coefficients), missing=False, kind="f8")


def _by_skl2onnx(graph: Graph, estimator: Any, output: Output, sources: Sequence[Source]) -> str:
    import numpy as np

    width, values = len(sources), numeric(graph, sources)
    match output.method:
        case "predict":
            (said,) = converted_output(graph, estimator, values, width, 0, 1)
        case "predict_proba":
            said = converted_output(graph, estimator, values, width, 1, 2, zipmap=False)[output.index or 0]
        case _:
            (said,) = converted_output(graph, estimator, values, width, 1, 1, zipmap=False, raw_scores=True)
    return _guarded(graph, graph.tensor([said]), values, width, missing=False, kind=np.dtype("f8").str)


def converted_output(
    graph: Graph, estimator: Any, values: str, width: int, output: int, columns: int, **options: Any
) -> list[Source]:
    """The columns of one output of an estimator that skl2onnx converts."""
    model = skl2onnx_model(estimator, width, **options)
    if len(model.graph.output) <= output:
        raise NotCompilable(f"skl2onnx gives {type(estimator).__name__} too few outputs")
    name = graph.node("Cast", graph.append(model, values, model.graph.output[output].name), to=DOUBLE)
    return [Computed(name, index, columns) for index in range(columns)]
