"""Saved models: equal bytes for equal models, and nothing loaded that is not on the list."""

from __future__ import annotations

import importlib
import io
import json
import operator
import os
import sys
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.ensemble import (
    ExtraTreesRegressor,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge, SGDClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    OneHotEncoder,
    OrdinalEncoder,
    StandardScaler,
    TargetEncoder,
)

from serving.artifact import SKOPS_FILE, load_model, save_model
from serving.canonical import SCHEMA_MEMBER, canonical
from serving.errors import ArtifactRefused, ContractError
from tests.serving.toys import Toy, result_of, run_trainer, train_request, write_package

HOLDER = """
from os import system  # noqa: a name that the package imports and does not define


def double(rows):
    return rows * 2


class Part:
    pass


class Model:
    def produce_model(self, data):
        pass

    def predict(self, rows):
        return self.estimator.predict(rows)
"""


@pytest.fixture
def holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(write_package(tmp_path / "src", HOLDER, "holder")))
    yield importlib.import_module("holder")
    sys.modules.pop("holder")


def data() -> tuple[pd.DataFrame, np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "a": random.random(80),
            "b": np.where(random.random(80) < 0.2, np.nan, random.random(80)),
            "c": random.choice(["x", "y", "z"], 80),
            "d": random.choice(["p", "q"], 80),
        }
    )
    return frame, (frame.a > 0.5).to_numpy().astype(int)


def tabular(*encoders: Any) -> Any:
    return make_column_transformer(
        *((encoder, ["c", "d"]) for encoder in encoders),
        (make_pipeline(SimpleImputer(), StandardScaler()), make_column_selector(dtype_include=np.number)),
    )


ESTIMATORS = {
    "logistic": make_pipeline(tabular(OneHotEncoder(handle_unknown="ignore")), LogisticRegression()),
    "ridge": make_pipeline(tabular(OneHotEncoder()), Ridge()),
    "histogram": make_pipeline(
        tabular(OrdinalEncoder()), HistGradientBoostingClassifier(max_iter=5, random_state=0)
    ),
    "histogram regressor": make_pipeline(
        tabular(OrdinalEncoder()), HistGradientBoostingRegressor(max_iter=5, random_state=0)
    ),
    "forest": make_pipeline(
        tabular(TargetEncoder(random_state=0)), RandomForestClassifier(5, random_state=0)
    ),
    "extra": make_pipeline(
        tabular(OrdinalEncoder()), ExtraTreesRegressor(5, random_state=np.random.RandomState(1))
    ),
    "boosting": make_pipeline(
        tabular(OrdinalEncoder()), GradientBoostingClassifier(n_estimators=5, random_state=0)
    ),
    "neighbours": make_pipeline(tabular(OrdinalEncoder()), KNeighborsClassifier()),
    "network": make_pipeline(tabular(OrdinalEncoder()), MLPClassifier((4,), max_iter=5, random_state=0)),
    "sgd": make_pipeline(tabular(OrdinalEncoder()), SGDClassifier(random_state=0)),
    "search": make_pipeline(
        tabular(OrdinalEncoder()), GridSearchCV(LogisticRegression(), {"C": [0.1, 1.0]}, cv=2)
    ),
    "isotonic": make_pipeline(
        tabular(OrdinalEncoder()), CalibratedClassifierCV(LogisticRegression(), method="isotonic", cv=2)
    ),
    "text": make_pipeline(
        make_column_transformer((TfidfVectorizer(token_pattern=r"\w"), "c")), LogisticRegression()
    ),
    "ufunc": make_pipeline(tabular(OrdinalEncoder()), FunctionTransformer(np.tanh), LogisticRegression()),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_usual_estimators_load_and_predict_the_same(holder: ModuleType, tmp_path: Path, name: str) -> None:
    rows, target = data()
    model = holder.Model()
    model.estimator = clone(ESTIMATORS[name]).fit(rows, target)
    model.same_again = model.estimator
    model.words = {"b", "a", "c"}
    model.moods = {1: "one", 2: None}
    assert save_model(model, tmp_path / "model") == "skops"
    loaded = load_model(tmp_path / "model", "holder")
    assert np.array_equal(loaded.predict(rows), model.predict(rows))
    assert loaded.same_again is loaded.estimator
    assert (loaded.words, loaded.moods) == (model.words, model.moods)

    again = holder.Model()
    again.estimator = clone(ESTIMATORS[name]).fit(rows, target)
    again.same_again = again.estimator
    again.words = {"c", "a", "b"}
    again.moods = {1: "one", 2: None}
    save_model(again, tmp_path / "again")
    same = (tmp_path / "again" / SKOPS_FILE).read_bytes() == (tmp_path / "model" / SKOPS_FILE).read_bytes()
    assert same or name == "search"  # a search keeps how long each fit took


def test_parts_of_the_projects_own_package_load(holder: ModuleType, tmp_path: Path) -> None:
    model = holder.Model()
    model.part = holder.Part()
    model.part.size = 3
    model.estimator = FunctionTransformer(holder.double)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, "holder")
    assert loaded.part.size == 3
    assert loaded.estimator.func is holder.double


def test_two_trainings_in_two_processes_give_byte_equal_files(toy: Toy, tmp_path: Path) -> None:
    outputs = []
    for number, hash_seed in enumerate(("0", "1")):
        folder = tmp_path / str(number)
        request = train_request(toy.source, toy.snapshot, folder)
        done = run_trainer(request, folder, PYTHONHASHSEED=hash_seed)
        assert done.returncode == 0, done.stderr
        assert result_of(request.result_path).format == "skops"
        outputs.append(
            {
                str(path.relative_to(request.output)): path.read_bytes()
                for path in Path(request.output).rglob("*")
                if path.is_file()
            }
        )
    assert outputs[0].keys() == {
        "model/model.skops",
        "model/format.json",
        "schema.json",
        "golden.json",
        "holdout.parquet",
    }
    assert outputs[0] == outputs[1]


class Unpickled:
    """A type that a pickle would run code for."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


def file_of(model: Any) -> bytes:
    import skops.io

    return canonical(skops.io.dumps(model))


def refusal(folder: Path, content: bytes, package: str = "holder") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "format.json").write_text('{"format": "skops"}')
    (folder / SKOPS_FILE).write_bytes(content)
    with pytest.raises(ArtifactRefused) as refused:
        load_model(folder, package)
    return str(refused.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (os.system, "posix.system"),
        (os.unlink, "posix.unlink"),
        (np.load, "numpy.load"),
        (np.frompyfunc, "frompyfunc"),
        (partial(os.system, "true"), "posix.system"),
        (partial(eval, "1"), "builtins.eval"),
        (eval, "builtins.eval"),
        (operator.methodcaller("system", "true"), "operator.methodcaller"),
        (operator.attrgetter("__class__"), "operator.attrgetter"),
        (FunctionTransformer(os.system), "posix.system"),
        ({"estimator": [np.fromfile]}, "fromfile"),
        (FunctionTransformer().transform, "FunctionTransformer"),
        (Path("/etc/passwd"), "pathlib.PosixPath"),
        (importlib.import_module, "importlib.import_module"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_names_anything_else_is_refused_by_name(
    holder: ModuleType, tmp_path: Path, content: Any, named: str
) -> None:
    model = holder.Model()
    model.estimator = content
    assert named in refusal(tmp_path / "model", file_of(model))


@pytest.mark.parametrize(
    ("loader", "module", "name"),
    [
        ("FunctionNode", "holder", "system"),
        ("TypeNode", "holder", "system"),
        ("ObjectNode", "holder", "system"),
        ("ObjectNode", "holder.nothing", "Model"),
        ("ObjectNode", "holderx", "Model"),
        ("ObjectNode", "subprocess", "Popen"),
        ("ListNode", "subprocess", "Popen"),
        ("SetNode", "os", "system"),
        ("TupleNode", "collections", "deque"),
        ("ConstructorFromReduceNode", "subprocess", "Popen"),
        ("ConstructorFromReduceNode", "holder", "Part"),
        ("ObjectNode", "sklearn.utils._joblib", "Parallel"),
        ("ObjectNode", "sklearn.datasets._base", "RemoteFileMetadata"),
        ("FunctionNode", "sklearn.datasets", "load_files"),
        ("ObjectNode", "sklearn.utils._testing", "TempMemmap"),
        ("ObjectNode", "joblib.memory", "Memory"),
        ("TypeNode", "numpy", "memmap"),
        ("NdArrayNode", "numpy", "memmap"),
        ("FunctionNode", "numpy.lib._npyio_impl", "load"),
        ("LossNode", "os", "system"),
        ("TreeNode", "os", "system"),
        ("MethodNode", "holder", "Model"),
        ("OperatorFuncNode", "operator", "methodcaller"),
        ("CachedNode", "holder", "Model"),
        ("SparseMatrixNode", "os", "system"),
        ("RandomStateNode", "os", "system"),
        ("QuantileForestNode", "quantile_forest", "QuantileForest"),
        ("NoSuchNode", "builtins", "str"),
    ],
)
def test_a_forged_node_is_refused(
    holder: ModuleType, tmp_path: Path, loader: str, module: str, name: str
) -> None:
    forged = {"__class__": name, "__module__": module, "__loader__": loader, "content": []}
    assert f"{module}.{name}" in refusal(tmp_path / "model", forge(holder, {"estimator": forged}))


def forge(holder: ModuleType, attributes: dict[str, Any], **schema: Any) -> bytes:
    """A skops file whose model has these nodes for attributes."""
    model = holder.Model()
    model.__dict__ = dict.fromkeys(attributes, "replaced")
    with zipfile.ZipFile(io.BytesIO(file_of(model))) as archive:
        document = json.loads(archive.read(SCHEMA_MEMBER))
    document["content"]["content"] = attributes
    return packed(document | schema)


def packed(document: Any) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr(SCHEMA_MEMBER, json.dumps(document))
    return target.getvalue()


def node(loader: str, path: str, **more: Any) -> dict[str, Any]:
    module, _, name = path.rpartition(".")
    return {"__class__": name, "__module__": module, "__loader__": loader, **more}


def test_an_older_protocol_is_refused(holder: ModuleType, tmp_path: Path) -> None:
    for number, protocol in enumerate((0, 1, True, None, "2", 99)):
        assert "protocol" in refusal(tmp_path / str(number), forge(holder, {}, protocol=protocol))


def test_an_id_cannot_stand_for_two_objects(holder: ModuleType, tmp_path: Path) -> None:
    two = {"a": node("TypeNode", "holder.Part", __id__=1), "b": node("TypeNode", "builtins.str", __id__=1)}
    assert "two objects one id" in refusal(tmp_path / "a", forge(holder, two))
    hidden = {
        "a": node("TypeNode", "holder.Part", __id__=1),
        "b": node("CachedNode", "builtins.str", __id__=1),
    }
    assert "not there" in refusal(tmp_path / "b", forge(holder, hidden))


def test_a_key_type_cannot_be_a_callable_of_the_files_choice(holder: ModuleType, tmp_path: Path) -> None:
    def keyed(by: dict[str, Any]) -> dict[str, Any]:
        key_types = node("ListNode", "builtins.list", content=[by])
        content = {"x": node("JsonNode", "builtins.str", content="1")}
        return {"a": node("DictNode", "builtins.dict", key_types=key_types, content=content)}

    for number, by in enumerate(
        (
            node("TypeNode", "holder.Part"),
            node("FunctionNode", "holder.double"),
            node("CachedNode", "builtins.str", __id__=1),
            node("TypeNode", "builtins.object"),
        )
    ):
        assert "key" in refusal(tmp_path / str(number), forge(holder, keyed(by)))


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04cos\nsystem\n", b"PK\x03\x04", packed([]), packed("x"), packed({})]
)
def test_bytes_that_are_no_skops_file_are_refused(holder: ModuleType, tmp_path: Path, content: bytes) -> None:
    assert refusal(tmp_path / "model", content)


def test_a_model_that_skops_cannot_save_is_explained(holder: ModuleType, tmp_path: Path) -> None:
    model = holder.Model()
    model.estimator = pd.DataFrame({"a": [1]})
    with pytest.raises(ContractError, match="cannot be saved with skops") as explained:
        save_model(model, tmp_path)
    assert "Model.save and Model.load" in explained.value.expected


def test_another_class_than_model_is_refused(holder: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "format.json").write_text('{"format": "skops"}')
    (tmp_path / SKOPS_FILE).write_bytes(file_of(holder.Part()))
    with pytest.raises(ContractError, match=r"holder\.Part"):
        load_model(tmp_path, "holder")


def test_a_model_with_save_and_load_keeps_its_own_format(moody: Toy) -> None:
    assert moody.result.format == "own"
    assert sorted(path.name for path in (moody.release / "model").iterdir()) == ["format.json", "own"]
