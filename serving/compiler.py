"""From a trained model to the plan of how it is served: compiled where that is proven to say the same.

1. passthrough.py: which estimator Model.predict passes its rows to, and which of its outputs it returns.
2. steps.py, tabulate.py, estimators.py, trees.py: that estimator as one ONNX graph in float64.
3. edges.py, parity.py: the graph says what Model.predict says, on the holdout, single rows and edge rows.
4. leafmasks.py: its trees in a faster form for many rows, which says what the graph says, to the last bit.
Whatever fails becomes the plan's reason, and the original serves.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from serving.compiled import CompiledModel
from serving.constants import constants_of
from serving.contract import ONNX_FILE, PLAN_FILE, TREES_FILE, CompileRequest, InputSchema, Lookup, Plan
from serving.edges import Data
from serving.errors import ContractError
from serving.estimators import predicted
from serving.graph import Graph, Inputs, NotCompilable, Raw, Source
from serving.leafmasks import leaf_masks
from serving.parity import Original, check_parity, check_row_wise, one_thread
from serving.passthrough import Output, find_output

PASSES = 4  # over a model, until its graph's inputs are complete
MOST_FEW = 100  # rows: a form that only pays beyond them would be loaded in vain
SPLIT_ROWS = 2_000  # of the holdout and of the edge rows each, that are asked for in small calls too
LAST_BITS = 1e-15  # by fewer, onnxruntime's own exp and sigmoid differ with a row's place in its call
SWITCHED_OFF = "switched off by compiled = never"


def compile_model(
    model: Any, schema: InputSchema, request: CompileRequest, say: Callable[[str], None]
) -> Plan:
    """Write `plan.json`, and `model.onnx` and `trees.npz` where they serve, to the request's output."""
    data = Data(request, schema, constants_of(model))
    output = Path(request.output)
    output.mkdir(parents=True, exist_ok=True)
    for name in (ONNX_FILE, TREES_FILE):
        (output / name).unlink(missing_ok=True)
    original = Original(model, schema.features)
    with one_thread():
        plan = _plan(model, original, data, request, output, say)
    say(f"requests {'may' if plan.batching else 'may not'} share a call: {plan.batching_reason}")
    (output / PLAN_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(plan), indent=2))
    return plan


def _plan(
    model: Any,
    original: Original,
    data: Data,
    request: CompileRequest,
    output: Path,
    say: Callable[[str], None],
) -> Plan:
    reason = SWITCHED_OFF
    if request.compile:
        try:
            return _compiled(model, original, data, request, output, say)
        except NotCompilable as error:
            reason = " ".join(str(error).split())
        except Exception as error:  # an odd model must serve as it is, whatever it does to the converters
            reason = f"compiling it failed with {type(error).__name__}: {' '.join(str(error).split())}"[:400]
    say(f"the original serves: {reason}")
    return Plan("original", reason, *_row_wise(original, data, request))


def _row_wise(original: Original, data: Data, request: CompileRequest) -> tuple[bool, str]:
    try:
        edges = data.edge_frame({}, request.seed)
        return check_row_wise(original, data.holdout, edges, request.tolerance, request.seed, data.sizes())
    except Exception as error:  # a model that fails now and then must serve one request at a time
        return False, f"Model.predict failed with {type(error).__name__}: {' '.join(str(error).split())}"[
            :300
        ]


def _compiled(
    model: Any,
    original: Original,
    data: Data,
    request: CompileRequest,
    output: Path,
    say: Callable[[str], None],
) -> Plan:
    edges = data.edge_frame({}, request.seed)
    for module in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(module) is None:
            raise NotCompilable(f"{module} is not installed; perennial-serving[sklearn] brings it")
    frames = [data.holdout, edges, *data.calls(edges)]
    estimator, passed = find_output(model, frames)
    say(f"Model.predict is {passed.method} of its {passed.attribute!r}, a {type(estimator).__name__}")
    content, graph = build_graph(estimator, passed, data)
    inputs = graph.inputs
    plan = Plan(
        path="compiled",
        reason="",
        batching=True,
        batching_reason="the compiled model predicts each row by itself",
        numbers=tuple(inputs.numbers),
        lookups=tuple(Lookup(name, values) for name, values in inputs.lookups.items()),
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / ONNX_FILE).write_bytes(content)
        try:
            compiled = CompiledModel(Path(folder), plan)
        except ContractError as error:
            raise NotCompilable(f"its graph: {error.found}") from error
        edges = data.edge_frame(graph.thresholds, request.seed)
        parity = check_parity(original, compiled, plan, data.holdout, edges, request.tolerance)
        reason = (
            f"says what the original says within {parity.max_abs_difference:.3g} on {parity.rows:,} rows of "
            f"the holdout and {parity.edge_rows:,} edge rows"
        )
        say(f"the compiled model serves: it {reason}")
        asked = [original.tuples(frame, plan.columns) for frame in (data.holdout, edges)]
        plan = _with_trees(Path(folder), graph, plan, compiled, asked, say)
        for written in sorted(Path(folder).iterdir()):
            partial = output / f"{written.name}.partial"
            partial.write_bytes(written.read_bytes())
            partial.replace(output / written.name)
    return msgspec.structs.replace(plan, reason=reason, parity=parity)


def _with_trees(
    folder: Path,
    graph: Graph,
    plan: Plan,
    compiled: CompiledModel,
    frames: Sequence[list[tuple[Any, ...]]],
    say: Callable[[str], None],
) -> Plan:
    """The plan of many rows by the trees' masks, which are written to the folder if they say the same."""
    try:
        content, from_rows = leaf_masks(graph)
        if from_rows > MOST_FEW:
            raise NotCompilable(f"they would pay from {from_rows:,} rows on")
        (folder / TREES_FILE).write_bytes(content)
        faster = msgspec.structs.replace(plan, trees_from_rows=from_rows)
        _check_equal(compiled, CompiledModel(folder, faster), frames, from_rows)
    except (NotCompilable, ContractError) as error:
        (folder / TREES_FILE).unlink(missing_ok=True)
        say(f"no masks of leaves for calls of many rows: {error}")
        return plan
    say(f"calls of {from_rows} rows or more go through masks of the trees' leaves, to equal predictions")
    return faster


def _check_equal(
    graph: CompiledModel, trees: CompiledModel, frames: Sequence[list[tuple[Any, ...]]], from_rows: int
) -> None:
    """Raises `NotCompilable` unless the trees' masks say what their graph says, in calls of any size."""
    import numpy as np

    for rows in frames:
        expected = graph.predict(rows)
        for size in (len(rows), from_rows, from_rows + 1):
            for begin in range(0, len(rows) if size == len(rows) else min(len(rows), SPLIT_ROWS), size):
                said, meant = trees.predict(rows[begin : begin + size]), expected[begin : begin + size]
                alike = np.isclose(said, meant, rtol=LAST_BITS, atol=LAST_BITS, equal_nan=True)
                if not alike.all():
                    at = int(np.argmin(alike))
                    raise NotCompilable(f"of row {begin + at} they say {said[at]!r}, the graph {meant[at]!r}")


def build_graph(estimator: Any, passed: Output, data: Data) -> tuple[bytes, Graph]:
    """The model of one output of a fitted estimator, and the graph that it was written from.

    Raises `NotCompilable`. A pass may find more inputs than the ones before knew of: then once more.
    """
    columns = {feature.name: feature for feature in data.features}
    inputs = Inputs()
    for _ in range(PASSES):
        before = inputs.sizes()
        graph = Graph(copy.deepcopy(inputs))
        sources: list[Source] = [Raw(columns[name]) for name in passed.columns]
        prediction = predicted(graph, estimator, passed, sources, data)
        content = graph.model(prediction)
        inputs = graph.inputs
        if inputs.sizes() == before:
            return content, graph
    raise NotCompilable("its inputs could not be settled")
