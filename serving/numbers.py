"""Steps of numbers that need no converter: imputing, scaling, polynomials, plain functions. Each in float64.

They are written out because skl2onnx's converters of some have no float64 form, or round differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from serving.graph import Graph, NotCompilable

if TYPE_CHECKING:
    import numpy as np

DOUBLE = 11  # onnx.TensorProto.DOUBLE
FUNCTIONS: dict[str, Callable[[Graph, str], str]] = {  # by the name of a numpy ufunc
    "log": lambda graph, x: graph.node("Log", x),
    "log1p": lambda graph, x: graph.node("Log", _plus(graph, x, 1.0)),
    "exp": lambda graph, x: graph.node("Exp", x),
    "expm1": lambda graph, x: _plus(graph, graph.node("Exp", x), -1.0),
    "sqrt": lambda graph, x: graph.node("Sqrt", x),
    "square": lambda graph, x: graph.node("Mul", x, x),
    "absolute": lambda graph, x: graph.node("Abs", x),
}
LARGEST_POLYNOMIAL = 10_000


def written_out(transformer: Any) -> Callable[[Graph, str], tuple[str, int]] | None:
    """The function that writes a fitted transformer out: from a tensor to a tensor and its width."""
    kind = type(transformer).__name__
    writer = {
        "SimpleImputer": _imputer,
        "MissingIndicator": _indicator,
        "StandardScaler": _standard,
        "MinMaxScaler": _min_max,
        "MaxAbsScaler": _max_abs,
        "RobustScaler": _robust,
        "PolynomialFeatures": _polynomial,
        "PowerTransformer": _power,
        "FunctionTransformer": _function,
    }.get(kind)
    if writer is None:
        return None
    return lambda graph, tensor: writer(transformer, graph, tensor)


def _imputer(imputer: Any, graph: Graph, tensor: str) -> tuple[str, int]:
    import numpy as np

    statistics = np.asarray(imputer.statistics_, np.float64)
    _only_nan(imputer)
    kept = np.flatnonzero(~np.isnan(statistics))
    if imputer.keep_empty_features and len(kept) < len(statistics):
        raise NotCompilable("its SimpleImputer keeps columns that training saw no value of")
    values = tensor
    if len(kept) < len(statistics):
        values = graph.node("Gather", tensor, graph.constant(kept.astype(np.int64)), axis=1)
    filled = graph.node("Where", graph.node("IsNaN", values), graph.constant(statistics[kept]), values)
    if imputer.indicator_ is None:
        return filled, len(kept)
    flags, width = _indicator(imputer.indicator_, graph, tensor)
    return (graph.node("Concat", filled, flags, axis=1) if width else filled), len(kept) + width


def _indicator(indicator: Any, graph: Graph, tensor: str) -> tuple[str, int]:
    import numpy as np

    _only_nan(indicator)
    chosen = np.asarray(indicator.features_, np.int64)
    flags = graph.node("Cast", graph.node("IsNaN", tensor), to=DOUBLE)
    return graph.node("Gather", flags, graph.constant(chosen), axis=1), len(chosen)


def _only_nan(imputer: Any) -> None:
    if not isinstance(imputer.missing_values, float) or not math.isnan(imputer.missing_values):
        raise NotCompilable(f"its {type(imputer).__name__} calls {imputer.missing_values!r} missing")


def _standard(scaler: Any, graph: Graph, tensor: str) -> tuple[str, int]:
    if scaler.with_mean:
        tensor = _with(graph, "Sub", tensor, scaler.mean_)
    return _with(graph, "Div", tensor, scaler.scale_), scaler.n_features_in_


def _robust(scaler: Any, graph: Graph, tensor: str) -> tuple[str, int]:
    if scaler.with_centering:
        tensor = _with(graph, "Sub", tensor, scaler.center_)
    return _with(graph, "Div", tensor, scaler.scale_ if scaler.with_scaling else None), scaler.n_features_in_


def _max_abs(scaler: Any, graph: Graph, tensor: str) -> tuple[str, int]:
    if getattr(scaler, "clip", False):
        raise NotCompilable("its MaxAbsScaler clips")
    return _with(graph, "Div", tensor, scaler.scale_), scaler.n_features_in_


def _min_max(scaler: Any, graph: Graph, tensor: str) -> tuple[str, int]:
    import numpy as np

    tensor = _with(graph, "Add", _with(graph, "Mul", tensor, scaler.scale_), scaler.min_)
    if scaler.clip:
        low, high = (graph.constant(np.array(float(limit))) for limit in scaler.feature_range)
        tensor = graph.node("Clip", tensor, low, high)
    return tensor, scaler.n_features_in_


def _power(power: Any, graph: Graph, tensor: str) -> tuple[str, int]:
    """Box and Cox's transformation, or Yeo and Johnson's (Biometrika 87:4, 2000), with a power per column."""
    import numpy as np

    powers, zero = np.asarray(power.lambdas_, np.float64), graph.constant(np.array(0.0))
    if np.isnan(powers).any():
        raise NotCompilable("its PowerTransformer was fitted on a column without values")
    if power.method == "box-cox":
        made = _raised(graph, tensor, powers)
    else:
        positive = _raised(graph, _plus(graph, graph.node("Max", tensor, zero), 1.0), powers)
        turned = graph.node("Neg", graph.node("Min", tensor, zero))
        negative = graph.node("Neg", _raised(graph, _plus(graph, turned, 1.0), 2.0 - powers))
        made = graph.node("Where", graph.node("GreaterOrEqual", tensor, zero), positive, negative)
    return _standard(power._scaler, graph, made) if power.standardize else (made, len(powers))


def _raised(graph: Graph, base: str, powers: np.ndarray) -> str:
    """(base ** power - 1) / power, or the logarithm where the power is 0."""
    import numpy as np

    flat = np.abs(powers) < np.spacing(1.0)
    exponents = np.where(flat, 1.0, powers)
    raised = _plus(graph, graph.node("Pow", base, graph.constant(exponents)), -1.0)
    curved = _with(graph, "Div", raised, exponents)
    return (
        graph.node("Where", graph.constant(flat), graph.node("Log", base), curved) if flat.any() else curved
    )


def _polynomial(polynomial: Any, graph: Graph, tensor: str) -> tuple[str, int]:
    import numpy as np

    powers = np.asarray(polynomial.powers_)
    width, degree = powers.shape[1], int(powers.sum(axis=1).max(initial=1))
    if powers.shape[0] > LARGEST_POLYNOMIAL:
        raise NotCompilable(f"its PolynomialFeatures make {powers.shape[0]:,} columns")
    factors = np.full((powers.shape[0], degree), width, np.int64)  # the column `width` is one
    for row, counts in enumerate(powers):
        chosen = np.repeat(np.arange(width), counts)
        factors[row, : len(chosen)] = chosen
    first = graph.node("Gather", tensor, graph.constant(np.array([0], np.int64)), axis=1)
    one = graph.node(
        "Add", graph.node("Mul", first, graph.constant(np.array(0.0))), graph.constant(np.array(1.0))
    )
    wide = graph.node("Concat", tensor, one, axis=1)
    made = graph.node("Gather", wide, graph.constant(factors[:, 0]), axis=1)
    for column in range(1, degree):
        made = graph.node("Mul", made, graph.node("Gather", wide, graph.constant(factors[:, column]), axis=1))
    return made, powers.shape[0]


def _function(transformer: Any, graph: Graph, tensor: str) -> tuple[str, int]:
    name = getattr(transformer.func, "__name__", "?")
    if type(transformer.func).__name__ != "ufunc" or name not in FUNCTIONS or transformer.kw_args:
        raise NotCompilable(
            f"its FunctionTransformer calls {name}; these are compiled: {', '.join(FUNCTIONS)}"
        )
    return FUNCTIONS[name](graph, tensor), transformer.n_features_in_


def _with(graph: Graph, operator: str, tensor: str, numbers: np.ndarray | None) -> str:
    import numpy as np

    if numbers is None:
        return tensor
    return graph.node(operator, tensor, graph.constant(np.asarray(numbers, np.float64)))


def _plus(graph: Graph, tensor: str, number: float) -> str:
    import numpy as np

    return graph.node("Add", tensor, graph.constant(np.array(number)))
