"""A model on disk: the model's own `save` and `load` where it has both, else skops. Never a pickle."""

from __future__ import annotations

import importlib
import json
import sys
import types
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from serving.allowed import audit
from serving.canonical import SCHEMA_MEMBER, canonical
from serving.errors import ArtifactRefused, ContractError

Format = Literal["skops", "own"]

FORMAT_FILE = "format.json"
SKOPS_FILE = "model.skops"
OWN_PATH = "own"  # handed to Model.save, which makes a file or a folder of it


def save_model(model: object, directory: Path) -> Format:
    """Write `model` to `directory`, byte for byte the same for the same model, and say how.

    Raises `ContractError` if the model cannot be saved.
    """
    directory.mkdir(parents=True, exist_ok=True)
    saved_as: Format = "own" if _has_own_format(type(model)) else "skops"
    if saved_as == "own":
        model.save(directory / OWN_PATH)  # type: ignore[attr-defined]
        if not (directory / OWN_PATH).exists():
            raise ContractError("Model.save(path) wrote nothing to path", "a file or a folder at path")
    else:
        (directory / SKOPS_FILE).write_bytes(_dump(model))
    (directory / FORMAT_FILE).write_text(json.dumps({"format": saved_as}) + "\n")
    return saved_as


def load_model(directory: Path, package: str) -> Any:
    """The model of `directory`, an instance of the package's `Model`.

    Raises `ArtifactRefused` if the file names a type that is not allowed, `ContractError` if it is not a
    saved model or not one of this package.
    """
    model_class = model_class_of(package)
    try:
        saved_as = json.loads((directory / FORMAT_FILE).read_text())["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ContractError(
            f"no readable {FORMAT_FILE} ({error})", "a saved model", str(directory)
        ) from error
    match saved_as:
        case "own":
            model = model_class.load(directory / OWN_PATH)
        case "skops":
            model = _load((directory / SKOPS_FILE).read_bytes(), package)
        case _:
            raise ContractError(f"a model saved as {saved_as!r}", "skops or own", str(directory))
    if not isinstance(model, model_class):
        raise ContractError(
            f"the saved model is a {type(model).__module__}.{type(model).__qualname__}",
            f"a {model_class.__module__}.{model_class.__qualname__}",
        )
    return model


def model_class_of(package: str) -> Any:
    """The `Model` that a package exports, checked for its two methods."""
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise ContractError(
                f"no package {package}", f"src/{package}/__init__.py that exports Model"
            ) from error
        raise
    model_class = getattr(module, "Model", None)
    if not isinstance(model_class, type):
        raise ContractError(
            f"{package} exports no class Model",
            f"`from .model import Model` in {package}/__init__.py",
            package,
        )
    for method in ("produce_model", "predict"):
        if not callable(getattr(model_class, method, None)):
            raise ContractError(f"Model has no method {method}", "produce_model and predict", package)
    return model_class


def _has_own_format(model_class: type) -> bool:
    return callable(getattr(model_class, "save", None)) and callable(getattr(model_class, "load", None))


def _dump(model: object) -> bytes:
    skops_io = _skops_io()
    try:
        return canonical(skops_io.dumps(model))
    except (TypeError, ValueError, RecursionError) as error:
        raise ContractError(
            f"the model cannot be saved with skops: {type(error).__name__}: {error}",
            "attributes that are estimators, arrays and plain Python values; or Model.save and Model.load",
            type(model).__module__,
        ) from error


def _load(content: bytes, package: str) -> object:
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            schema = json.loads(archive.read(SCHEMA_MEMBER))
    except (zipfile.BadZipFile, KeyError, ValueError, RecursionError) as error:
        raise ArtifactRefused(
            f"{SKOPS_FILE} is not a skops file ({error})", "what save_model wrote"
        ) from error
    if not isinstance(schema, dict):
        raise ArtifactRefused(f"{SKOPS_FILE} has no schema", "what save_model wrote")
    skops_io = _skops_io()  # before the audit: it brings the libraries that the audit looks names up in
    return skops_io.loads(content, trusted=audit(schema, package))


def _skops_io() -> Any:
    """skops.io with an empty list of trusted types of its own: ours decides.

    Making its own list costs half a CPU second and imports all of scikit-learn, pytest included.
    """
    if "skops.io" not in sys.modules:
        name = "skops.io._trusted_types"
        sys.modules[name] = _NoTrustedTypes(name)
        try:
            return importlib.import_module("skops.io")
        except ImportError as error:
            raise ContractError(
                f"the model has no save and load of its own, and {error}",
                "skops and scikit-learn in the project's requirements, or Model.save and Model.load",
            ) from error
        finally:
            sys.modules.pop(name, None)
    return sys.modules["skops.io"]


class _NoTrustedTypes(types.ModuleType):
    def __getattr__(self, name: str) -> list[str]:
        if name.isupper():
            return []
        raise AttributeError(name)
