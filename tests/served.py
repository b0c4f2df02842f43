"""Release directories as a server reads them, of models too small to train."""

from __future__ import annotations

from pathlib import Path

import msgspec

from serving.contract import Column, Golden, InputSchema, Manifest, Plan

REPOSITORY = Path(__file__).resolve().parents[1]
LOCK = REPOSITORY / "examples" / "flights" / "requirements.lock"

# A model that no compiler knows.
PACKAGE = """
class Model:
    def produce_model(self, data):
        pass

    def predict(self, rows):
        return rows.x * 0.5 + rows.y.fillna(1.0)

    @classmethod
    def load(cls, path):
        return cls()
"""


def write_release(folder: Path, release_id: str, weight: float | None) -> Path:
    """A release whose graph is 1 / (1 + exp(-(weight·x - y))), or the original's without a weight."""
    (folder / "model").mkdir(parents=True)
    (folder / "site" / "toy").mkdir(parents=True)
    (folder / "site" / "toy" / "__init__.py").write_text(PACKAGE)
    (folder / "model" / "format.json").write_text('{"format": "own"}')
    manifest = Manifest(
        release_id=release_id,
        project="toy",
        package="toy",
        task="regression",
        git_sha="0" * 40,
        data_fingerprint="0" * 64,
        as_of="2026-01-01",
        model_sha256="0" * 64,
    )
    schema = InputSchema(features=(Column("x", "number", False), Column("y", "number", True)))
    golden = Golden(rows=[{"x": 1.0, "y": 2.0}], predictions=[])
    for name, value in (("manifest", manifest), ("schema", schema), ("golden", golden)):
        (folder / f"{name}.json").write_bytes(msgspec.json.encode(value))
    if weight is not None:
        write_graph(folder / "serving", weight)
    return folder


def write_graph(folder: Path, weight: float) -> None:
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir()
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["numbers", "weights"], ["sums"]),
            helper.make_node("Sigmoid", ["sums"], ["columns"]),
            helper.make_node("Reshape", ["columns", "flat"], ["prediction"]),
        ],
        "toy",
        [helper.make_tensor_value_info("numbers", TensorProto.DOUBLE, [None, 2])],
        [helper.make_tensor_value_info("prediction", TensorProto.DOUBLE, [None])],
        [
            numpy_helper.from_array(np.array([[weight], [-1.0]]), "weights"),
            numpy_helper.from_array(np.array([-1]), "flat"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    plan = Plan("compiled", "a toy", batching=True, batching_reason="row by row", numbers=("x", "y"))
    (folder / "plan.json").write_bytes(msgspec.json.encode(plan))
