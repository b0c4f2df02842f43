"""Fitted preprocessing as columns of a graph: tables for categories, skl2onnx in float64 for numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serving.graph import Computed, Graph, NotCompilable, Raw, Source
from serving.numbers import written_out
from serving.tabulate import Values, tabulate

ENCODERS = frozenset({"OrdinalEncoder", "OneHotEncoder", "TargetEncoder"})
BEFORE = frozenset({"SimpleImputer"})  # what may come before an encoder: it treats unseen values all alike
AFTER = frozenset({"SimpleImputer", "StandardScaler", "MinMaxScaler", "MaxAbsScaler", "RobustScaler"})
# What jumps at a number: parity on other numbers cannot show that it jumps at the right one.
JUMPS = frozenset(
    ["Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "ArgMin", "TopK", "Floor", "Ceil", "Round"]
)
EXACT_JUMPS = frozenset({"QuantileTransformer"})  # continuous but where quantiles are equal


def transformed(graph: Graph, transformer: Any, sources: list[Source], values: Values) -> list[Source]:
    """The columns that a fitted transformer makes of `sources`. Raises `NotCompilable`."""
    if transformer is None or transformer == "passthrough":
        return sources
    if transformer == "drop":
        return []
    kind = own_kind(transformer)
    if kind == "ColumnTransformer":
        return _column_transformer(graph, transformer, sources, values)
    if kind == "FeatureUnion":
        parts = [transformed(graph, part, sources, values) for _, part in transformer.transformer_list]
        if transformer.transformer_weights:
            raise NotCompilable("its FeatureUnion has weights")
        return [source for part in parts for source in part]
    if kind == "FunctionTransformer" and (transformer.func is None or _checks_only(transformer)):
        return sources
    if _is_categorical(transformer, sources):
        return _encoded(graph, transformer, sources, values)
    if kind == "Pipeline":
        for _, step in transformer.steps:
            sources = transformed(graph, step, sources, values)
        return sources
    if callable(getattr(transformer, "get_support", None)):  # a selection of columns
        return [sources[index] for index in transformer.get_support(indices=True)]
    write = written_out(transformer)
    if write is not None:
        tensor, width = write(graph, numeric(graph, sources))
        return [Computed(tensor, index, width) for index in range(width)]
    return _converted(graph, transformer, sources)


def own_kind(estimator: Any) -> str:
    """The name of a class of scikit-learn's. Raises `NotCompilable` for another's, or replaced methods."""
    kind = type(estimator)
    if not kind.__module__.startswith("sklearn."):
        raise NotCompilable(f"{kind.__name__} is not one of scikit-learn's estimators")
    for name in ("transform", "predict", "predict_proba", "decision_function"):
        if name in vars(estimator):
            raise NotCompilable(f"{name} of its {kind.__name__} has been replaced")
    return kind.__name__


def _encoded(graph: Graph, transformer: Any, sources: list[Source], values: Values) -> list[Source]:
    """Tables of what takes each column by itself and alike all values it does not know; then the rest."""
    steps = [step for _, step in getattr(transformer, "steps", [("", transformer)])]
    kinds = ["" if _hands_through(step) else own_kind(step) for step in steps]
    encoders = [index for index, kind in enumerate(kinds) if kind in ENCODERS]
    first, after = (encoders[0], encoders[-1] + 1) if encoders else (len(steps), len(steps))
    if unknown := [kind for kind in kinds[:first] if kind and kind not in BEFORE]:
        raise NotCompilable(
            f"what {unknown[0]} makes of values that training never saw is known of encoders only"
        )
    while after < len(steps) and (not kinds[after] or kinds[after] in AFTER):
        after += 1
    if between := [kind for kind in kinds[first:after] if kind and kind not in ENCODERS | AFTER]:
        raise NotCompilable(f"a {between[0]} stands between its encoders")
    if after == len(steps):
        return tabulate(graph, transformer, sources, values)
    tables = tabulate(graph, transformer[:after], sources, values)
    for step in steps[after:]:
        tables = transformed(graph, step, tables, values)
    return tables


def _hands_through(step: Any) -> bool:
    return (
        step is None
        or isinstance(step, str)
        or (type(step).__name__ == "FunctionTransformer" and step.func is None)
    )


def _converted(graph: Graph, transformer: Any, sources: Sequence[Source]) -> list[Source]:
    """What skl2onnx makes of a fitted transformer of numbers, in float64."""
    tensor, width = numeric(graph, sources), len(sources)
    model = skl2onnx_model(transformer, width)
    name = graph.append(model, tensor, model.graph.output[0].name)
    doubled = graph.node("Cast", name, to=11)  # some converters answer in float32
    made = _width(transformer, width)
    return [Computed(doubled, index, made) for index in range(made)]


def numeric(graph: Graph, sources: Sequence[Source]) -> str:
    """The sources as one tensor. Raises `NotCompilable` for a column that is not a number."""
    for source in sources:
        if isinstance(source, Raw) and source.column.type in ("string", "timestamp"):
            raise NotCompilable(
                f"the {source.column.type} {source.column.name!r} reaches a step for numbers unencoded"
            )
    if not sources:
        raise NotCompilable("a step of it is given no columns")
    return graph.tensor(sources)


def skl2onnx_model(estimator: Any, width: int, **options: Any) -> Any:
    """An ONNX model of a fitted estimator with one float64 input of `width` columns."""
    try:
        from skl2onnx import to_onnx
        from skl2onnx.common.data_types import DoubleTensorType
    except ImportError as error:
        raise NotCompilable(f"{type(estimator).__name__} needs skl2onnx, and {error}") from error
    kind = own_kind(estimator)
    if _holds_trees(estimator):
        raise NotCompilable(f"its {kind} holds trees; forests and boosted trees are compiled by themselves")
    try:
        model = to_onnx(
            estimator,
            initial_types=[("X", DoubleTensorType([None, width]))],
            target_opset={"": 21, "ai.onnx.ml": 3},
            options={id(estimator): options} if options else None,
        )
    except Exception as error:  # skl2onnx has no exception of its own: whatever an odd model makes it raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise NotCompilable(f"skl2onnx cannot convert {type(estimator).__name__}: {first}") from error
    operators = {(node.domain, node.op_type) for node in model.graph.node}
    for domain, operator in sorted(operators):
        jumps = operator in JUMPS if not domain else operator != "ArrayFeatureExtractor"
        if jumps and kind not in EXACT_JUMPS:
            raise NotCompilable(f"skl2onnx writes its {kind} with {operator}, which may be inexact")
    return model


def _holds_trees(value: Any, depth: int = 5) -> bool:
    """Whether an estimator holds trees, which skl2onnx rounds to 32 bits, at length."""
    if type(value).__module__.startswith("sklearn.") and (hasattr(value, "tree_") or hasattr(value, "nodes")):
        return True
    held: Any = ()
    if isinstance(value, (list, tuple)):
        held = value
    elif isinstance(value, dict):
        held = value.values()
    elif type(value).__module__.startswith("sklearn."):
        held = vars(value).values() if hasattr(value, "__dict__") else ()
    return depth > 0 and any(_holds_trees(each, depth - 1) for each in held)


def _column_transformer(
    graph: Graph, transformer: Any, sources: list[Source], values: Values
) -> list[Source]:
    made: list[Source] = []
    for name, part, columns in transformer.transformers_:
        if part == "drop":
            continue
        if isinstance(columns, str):
            raise NotCompilable(
                f"{name!r} of its ColumnTransformer is given a Series, not a frame of columns"
            )
        if chosen := _chosen(columns, sources, transformer):
            made += transformed(graph, part, chosen, values)
    return made


def _chosen(columns: Any, sources: Sequence[Source], transformer: Any) -> list[Source]:
    """Columns of a ColumnTransformer, given by names, positions, a slice, or a mask."""
    import numpy as np

    names = getattr(transformer, "feature_names_in_", None)
    by_name = {source.column.name: source for source in sources if isinstance(source, Raw)}
    wanted: list[Any]
    if isinstance(columns, slice):
        if isinstance(columns.start, str) or isinstance(columns.stop, str):
            raise NotCompilable("its ColumnTransformer has a slice of names; list the names")
        wanted = list(range(transformer.n_features_in_))[columns]
    else:
        wanted = list(columns)
        if wanted and all(isinstance(column, (bool, np.bool_)) for column in wanted):
            wanted = [position for position, chosen in enumerate(wanted) if chosen]
    if names is not None and len(by_name) == len(sources):  # a frame: scikit-learn goes by names, too
        wanted = [column if isinstance(column, str) else names[column] for column in wanted]
        if unknown := [name for name in wanted if name not in by_name]:
            raise NotCompilable(f"its ColumnTransformer names a column {unknown[0]!r} of an earlier step")
        return [by_name[name] for name in wanted]
    if any(isinstance(column, str) for column in wanted):
        raise NotCompilable(f"its ColumnTransformer names columns {wanted!r} of an earlier step")
    return [sources[column] for column in wanted]


def _is_categorical(transformer: Any, sources: Sequence[Source]) -> bool:
    """Whether a transformer is one of categories: an encoder, or a chain that has one, or given text."""
    steps = [step for _, step in getattr(transformer, "steps", [("", transformer)])]
    nested = {"ColumnTransformer", "FeatureUnion", "Pipeline"} & {type(step).__name__ for step in steps}
    if nested:
        return False
    text = any(
        isinstance(s, Raw)
        and (s.column.type == "string" or (s.column.type == "boolean" and s.column.nullable))
        for s in sources
    )
    encodes = bool(ENCODERS & {type(step).__name__ for step in steps})
    return (text or encodes) and not any(isinstance(s, Computed) for s in sources)


def _checks_only(transformer: Any) -> bool:
    """HistGradientBoosting's own way to hand numbers through: a FunctionTransformer around check_array."""
    from sklearn.utils import check_array

    return getattr(transformer.func, "func", None) is check_array


def _width(transformer: Any, width: int) -> int:
    import warnings

    import numpy as np

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in (np.ones((1, width)), np.zeros((1, width))):
            try:
                return int(transformer.transform(row).shape[1])
            except ValueError:
                continue
    raise NotCompilable(f"{type(transformer).__name__} transforms neither zeros nor ones")
