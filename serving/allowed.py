"""What a saved model may be made of.

skops builds the objects that a file names, so the file must only be able to name harmless things. Every node
is checked here before any is built: which loader, for which type. A prefix alone never opens the door: a name
under `sklearn.` must turn out to be an estimator class defined in that very module, a name under the
project's package a class or function defined there, so that a re-exported `os.system` is out of reach.
"""

from __future__ import annotations

import importlib
import json
import types
from typing import Any

from serving.canonical import nodes
from serving.errors import ArtifactRefused

SKOPS_PROTOCOL = 2
MAKE_IT_OWN = "plain estimators, or classes of the project's own package; or Model.save and Model.load"

BUILTIN_TYPES = frozenset(
    f"builtins.{name}"
    for name in (
        "str",
        "int",
        "float",
        "bool",
        "bytes",
        "list",
        "tuple",
        "dict",
        "set",
        "frozenset",
        "object",
    )
) | {"builtins.NoneType"}
KEY_TYPES = frozenset(f"builtins.{name}" for name in ("str", "int", "float", "bool"))
BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")


def _under(module: str, *names: str) -> frozenset[str]:
    return frozenset(f"{module}.{name}" for name in names)


# Loaders that build exactly these types.
FIXED: dict[str, frozenset[str]] = {
    "ListNode": _under("builtins", "list"),
    "SetNode": _under("builtins", "set"),
    "TupleNode": _under("builtins", "tuple"),
    "DictNode": _under("builtins", "dict") | _under("collections", "OrderedDict", "Counter"),
    "DefaultDictNode": _under("collections", "defaultdict"),
    "BytesNode": _under("builtins", "bytes"),
    "BytearrayNode": _under("builtins", "bytearray"),
    "SliceNode": _under("builtins", "slice"),
    "PartialNode": _under("functools", "partial"),  # its function is a node of its own
    "DTypeNode": _under("numpy", "dtype"),
    "MaskedArrayNode": _under("numpy.ma", "MaskedArray") | _under("numpy.ma.core", "MaskedArray"),
    "RandomStateNode": _under("numpy.random.mtrand", "RandomState"),
    "RandomGeneratorNode": _under("numpy.random._generator", "Generator"),
    "TreeNode": _under("sklearn.tree._tree", "Tree"),
    "ConstructorFromReduceNode": _under("builtins", "frozenset", "range")
    | _under("datetime", "date", "datetime", "time", "timedelta", "timezone")
    | _under("zoneinfo", "ZoneInfo")
    | _under("decimal", "Decimal"),
    "SparseMatrixNode": frozenset(
        f"scipy.sparse._{kind}.{kind}_{form}"
        for kind in ("csr", "csc", "coo", "bsr", "dia")
        for form in ("matrix", "array")
    ),
    "LossNode": _under(
        "sklearn._loss._loss",
        *(
            f"Cy{name}"
            for name in (
                "AbsoluteError",
                "ExponentialLoss",
                "HalfBinomialLoss",
                "HalfGammaLoss",
                "HalfMultinomialLoss",
                "HalfPoissonLoss",
                "HalfSquaredError",
                "HalfTweedieLoss",
                "HalfTweedieLossIdentity",
                "HuberLoss",
                "PinballLoss",
            )
        ),
    )
    | _under(
        "sklearn.linear_model._sgd_fast",
        "EpsilonInsensitive",
        "Hinge",
        "Huber",
        "Log",
        "ModifiedHuber",
        "SquaredEpsilonInsensitive",
        "SquaredHinge",
        "SquaredLoss",
    ),
}

# Parts of fitted estimators that are not estimators themselves.
OBJECTS = (
    _under(
        "sklearn._loss.loss",
        "AbsoluteError",
        "ExponentialLoss",
        "HalfBinomialLoss",
        "HalfGammaLoss",
        "HalfMultinomialLoss",
        "HalfPoissonLoss",
        "HalfSquaredError",
        "HalfTweedieLoss",
        "HalfTweedieLossIdentity",
        "HuberLoss",
        "PinballLoss",
    )
    | _under(
        "sklearn._loss.link",
        "HalfLogitLink",
        "IdentityLink",
        "Interval",
        "LogLink",
        "LogitLink",
        "MultinomialLogit",
    )
    | _under("sklearn.ensemble._hist_gradient_boosting.binning", "_BinMapper")
    | _under("sklearn.ensemble._hist_gradient_boosting.predictor", "TreePredictor")
    | _under("sklearn.calibration", "_CalibratedClassifier", "_SigmoidCalibration")
    | _under("sklearn.compose._column_transformer", "make_column_selector")
    | _under("sklearn.neighbors._kd_tree", "KDTree", "KDTree32", "KDTree64")
    | _under("sklearn.neighbors._ball_tree", "BallTree", "BallTree32", "BallTree64")
    | _under(
        "sklearn.metrics._dist_metrics",
        *(
            f"{metric}Distance{bits}"
            for metric in ("Euclidean", "SEuclidean", "Manhattan", "Chebyshev", "Minkowski", "Haversine")
            for bits in ("", "32", "64")
        ),
    )
    | _under("sklearn.metrics._scorer", "_PassthroughScorer")
    | _under("sklearn.model_selection._split", "GroupKFold", "KFold", "StratifiedKFold", "TimeSeriesSplit")
    | _under("sklearn.neural_network._stochastic_optimizers", "AdamOptimizer", "SGDOptimizer")
    | _under(
        "sklearn.gaussian_process.kernels",
        "ConstantKernel",
        "DotProduct",
        "ExpSineSquared",
        "Exponentiation",
        "Matern",
        "Product",
        "RBF",
        "RationalQuadratic",
        "Sum",
        "WhiteKernel",
    )
    | _under("scipy.interpolate._bsplines", "BSpline")
    | _under("scipy.interpolate._interpolate", "interp1d")
)

# Functions that fitted estimators refer to: they compute on arrays and reach neither files nor processes.
FUNCTIONS = (
    _under("sklearn.utils.validation", "check_array")
    | _under(
        "sklearn.feature_selection._univariate_selection", "chi2", "f_classif", "f_oneway", "f_regression"
    )
    | _under("sklearn.feature_selection._mutual_info", "mutual_info_classif", "mutual_info_regression")
    | _under("numpy", "mean", "median")
    | _under("scipy._lib.array_api_compat.numpy._aliases", "asarray")
)
CLOSED_SKLEARN = frozenset({"conftest", "datasets", "experimental", "externals", "tests", "_testing"})


def audit(schema: dict[str, Any], package: str) -> list[str]:
    """The names in a skops schema, all of them on the list; one that is not raises `ArtifactRefused`."""
    if schema.get("protocol") != SKOPS_PROTOCOL or isinstance(schema["protocol"], bool):
        raise ArtifactRefused(
            f"the saved model has skops protocol {schema.get('protocol')!r}", f"protocol {SKOPS_PROTOCOL}"
        )
    names: set[str] = set()
    seen: dict[str, str] = {}
    for node in nodes(schema):
        identity, path = json.dumps(node.get("__id__")), f"{node.get('__module__')}.{node.get('__class__')}"
        if node["__loader__"] == "CachedNode":
            if seen.get(identity) != path:
                raise ArtifactRefused(f"the saved model refers to a {path} that is not there", MAKE_IT_OWN)
            continue
        if "__id__" in node:
            # skops takes a repeated id for the earlier node: another type must not hide behind it.
            if identity in seen:
                raise ArtifactRefused("the saved model gives two objects one id", MAKE_IT_OWN)
            seen[identity] = path
        names |= _check_node(node, package)
    return sorted(names)


def _check_node(node: dict[str, Any], package: str) -> set[str]:
    loader, module, name = node["__loader__"], node.get("__module__"), node.get("__class__")
    if not isinstance(module, str) or not isinstance(name, str):
        raise ArtifactRefused(f"the saved model has a {loader} without a type", MAKE_IT_OWN)
    path = f"{module}.{name}"
    if loader == "JsonNode":
        if isinstance(node.get("content"), str):
            return set()
        raise ArtifactRefused("the saved model has a malformed JsonNode", MAKE_IT_OWN)
    if path not in FIXED.get(loader, ()) and not _is_allowed(loader, module, name, package):
        raise ArtifactRefused(
            f"the saved model holds {path} ({loader}), which is not on the list of what may be loaded",
            MAKE_IT_OWN,
        )
    if loader == "DictNode":
        _check_keys(node, path)
    names = {path}
    if loader == "RandomGeneratorNode":
        names |= {f"numpy.random.{bit_generator}" for bit_generator in BIT_GENERATORS}
    return names


def _check_keys(node: dict[str, Any], path: str) -> None:
    """skops calls each key type with the key: only plain types may stand there."""
    key_types = node.get("key_types")
    members = key_types.get("content") if isinstance(key_types, dict) else None
    if not isinstance(members, list) or not isinstance(key_types, dict):
        raise ArtifactRefused(f"the saved model has a {path} without key types", MAKE_IT_OWN)
    for member in [key_types, *members]:
        expected = "ListNode" if member is key_types else "TypeNode"
        if not isinstance(member, dict) or member.get("__loader__") != expected:
            raise ArtifactRefused(f"the saved model has a {path} with malformed key types", MAKE_IT_OWN)
    for member in members:
        key = f"{member.get('__module__')}.{member.get('__class__')}"
        if key not in KEY_TYPES and not _is_numpy_scalar(str(member["__module__"]), str(member["__class__"])):
            raise ArtifactRefused(
                f"the saved model has a {path} with keys of type {key}", "keys that are plain"
            )


def _is_allowed(loader: str, module: str, name: str, package: str) -> bool:
    own = module == package or module.startswith(package + ".")
    match loader:
        case "NdArrayNode":
            return f"{module}.{name}" == "numpy.ndarray" or _is_numpy_scalar(module, name)
        case "TypeNode":
            return (
                f"{module}.{name}" in BUILTIN_TYPES
                or _is_numpy_scalar(module, name)
                or (own and isinstance(_defined(module, name), type))
                or _is_estimator(module, name)
            )
        case "ObjectNode":
            return (
                f"{module}.{name}" in OBJECTS
                or (own and isinstance(_defined(module, name), type))
                or _is_estimator(module, name)
            )
        case "TupleNode":
            found = _defined(module, name) if own else None
            return isinstance(found, type) and issubclass(found, tuple)
        case "FunctionNode":
            return (
                f"{module}.{name}" in FUNCTIONS
                or _is_ufunc(module, name)
                or (own and isinstance(_defined(module, name), types.FunctionType))
            )
        case _:
            return False


def _defined(module: str, name: str) -> object:
    """What `module` itself defines as `name`; None for anything it merely imported."""
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    return found if getattr(found, "__module__", None) == module else None


def _is_estimator(module: str, name: str) -> bool:
    if not module.startswith("sklearn.") or CLOSED_SKLEARN & set(module.split(".")):
        return False
    found = _defined(module, name)
    from sklearn.base import BaseEstimator

    return isinstance(found, type) and issubclass(found, BaseEstimator)


def _is_numpy_scalar(module: str, name: str) -> bool:
    import numpy as np

    found = getattr(np, name, None) if module == "numpy" else None
    return isinstance(found, type) and issubclass(found, np.generic) and not issubclass(found, np.object_)


def _is_ufunc(module: str, name: str) -> bool:
    if module not in ("numpy", "numpy._core._multiarray_umath", "scipy.special", "scipy.special._ufuncs"):
        return False
    import numpy as np

    return isinstance(getattr(importlib.import_module(module), name, None), np.ufunc)
