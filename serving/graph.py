"""An ONNX graph under construction, and the columns that flow through it. All numbers are float64."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from serving.contract import Column

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

    from serving.trees import Ensemble

IR_VERSION = 10
OPSET = 21
PRODUCER = "perennial"
WIDE_TABLE = 8  # tables of one lookup, from which on copying rows is faster than picking numbers
LARGEST_TABLES = 4_000_000  # numbers; 32 MB in every worker


class NotCompilable(Exception):
    """Why a model has no compiled form, in a sentence for the model's developer."""


@dataclass(frozen=True)
class Raw:
    """A column of the request, as it is."""

    column: Column


@dataclass(frozen=True, eq=False)
class Table:
    """A column of numbers that depends on the code of one column of the request only."""

    lookup: str
    values: np.ndarray  # float64 by code: the known values, then unseen, then null


@dataclass(frozen=True)
class Computed:
    """A column of a tensor that a step of the graph computed."""

    tensor: str
    index: int
    width: int


Source = Raw | Table | Computed


@dataclass(frozen=True)
class Trees:
    """An ensemble of trees in a graph, its columns, and the tensor of its sums, [rows, 1]."""

    tensor: str
    ensemble: Ensemble
    sources: Sequence[Source]
    narrow: bool  # it compares 32-bit numbers


@dataclass
class Inputs:
    """What the graph asks of a request: its order is that of first use."""

    numbers: list[str] = field(default_factory=list)
    lookups: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # known values
    refused: dict[str, np.ndarray] = field(default_factory=dict)  # codes that the original raises for

    def sizes(self) -> tuple[object, ...]:
        return len(self.numbers), {name: len(values) for name, values in self.lookups.items()}


class Graph:
    """Nodes so far. `inputs` are those of an earlier pass over the same model, so that they are complete."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.opsets = {"": OPSET}
        self.thresholds: dict[str, set[float]] = {}  # of trees, by column of the request
        self.trees: list[Trees] = []
        self._nodes: list[NodeProto] = []
        self._constants: dict[str, TensorProto] = {}
        self._names = 0
        self._table_numbers = 0

    def name(self, prefix: str) -> str:
        self._names += 1
        return f"{prefix}_{self._names}"

    def node(self, operator: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node; the name of its output."""
        from onnx import helper

        output = self.name(operator)
        if operator == "TreeEnsemble":  # ai.onnx.ml 5 brings it, and takes the older operators of trees away
            self.opsets[domain] = 5
        self._nodes.append(helper.make_node(operator, list(inputs), [output], domain=domain, **attributes))
        return output

    def constant(self, array: np.ndarray) -> str:
        from onnx import numpy_helper

        name = self.name("constant")
        self._constants[name] = numpy_helper.from_array(array, name)
        return name

    def number(self, name: str) -> int:
        """Position of a column in the input `numbers`."""
        if name in self.inputs.lookups:
            raise NotCompilable(f"column {name!r} is used both as a number and as a category")
        if name not in self.inputs.numbers:
            self.inputs.numbers.append(name)
        return self.inputs.numbers.index(name)

    def lookup(self, name: str, values: Sequence[Any]) -> tuple[Any, ...]:
        """Known values of a column of codes: these, and those that were asked for before."""
        if name in self.inputs.numbers:
            raise NotCompilable(f"column {name!r} is used both as a number and as a category")
        known = self.inputs.lookups.get(name, ())
        if not set(values) <= set(known):
            known = tuple(sorted({*known, *values}))
        self.inputs.lookups[name] = known
        return known

    def refuse(self, lookup: str, codes: np.ndarray) -> None:
        """The original raises for these codes of a column: the compiled model must say NaN."""
        earlier = self.inputs.refused.get(lookup)
        same = earlier is not None and len(earlier) == len(codes)
        self.inputs.refused[lookup] = earlier | codes if same else codes

    def tensor(self, sources: Sequence[Source]) -> str:
        """The sources side by side: float64 [rows, len(sources)]."""
        import numpy as np

        of_lookup = Counter(source.lookup for source in sources if isinstance(source, Table))
        wide = {lookup for lookup, tables in of_lookup.items() if tables >= WIDE_TABLE}
        kinds: dict[str, list[int]] = {}
        for position, source in enumerate(sources):
            kinds.setdefault(_kind(source, wide), []).append(position)
        parts = [self._part([sources[p] for p in positions]) for positions in kinds.values()]
        joined = parts[0] if len(parts) == 1 else self.node("Concat", *parts, axis=1)
        order = [p for positions in kinds.values() for p in positions]
        return self._columns(joined, np.argsort(order).tolist(), len(order))

    def append(self, model: ModelProto, tensor: str, output: str) -> str:
        """Add another model's nodes, `tensor` as its only input; the name of its `output` here."""
        graph, renamed = model.graph, {model.graph.input[0].name: tensor, "": ""}
        for entry in model.opset_import:
            if entry.version > self.opsets.get(entry.domain, 0):
                self.opsets[entry.domain] = entry.version
        for constant in graph.initializer:
            renamed[constant.name] = self.name("constant")
            constant.name = renamed[constant.name]
            self._constants[constant.name] = constant
        for node in graph.node:
            if any(attribute.HasField("g") for attribute in node.attribute):
                raise NotCompilable(f"skl2onnx needs a {node.op_type} of sub-graphs")
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    names[index] = renamed[name] if name in renamed else self._renamed(renamed, name)
            node.name = ""
            self._nodes.append(node)
        return renamed[output]

    def model(self, prediction: str) -> bytes:
        """The finished model of a [rows] or [rows, 1] prediction: equal graphs are equal bytes."""
        import numpy as np

        flat = self.node("Reshape", prediction, self.constant(np.array([-1], np.int64)))
        if refused := [name for name, codes in self.inputs.refused.items() if codes.any()]:
            nothing = [Table(name, np.where(self.inputs.refused[name], np.nan, 0.0)) for name in refused]
            axis = self.constant(np.array([1], np.int64))
            flat = self.node("Add", flat, self.node("ReduceSum", self.tensor(nothing), axis, keepdims=0))
        self._nodes[-1].output[0] = "prediction"
        return self._model(self._nodes, self._inputs())

    def rest(self, trees: Trees) -> bytes:
        """What comes after an ensemble, once there is a `model`: the input `trees` [rows, 1] is its sums."""
        from onnx import TensorProto, helper

        wanted, nodes = {"prediction"}, []
        for node in reversed(self._nodes):
            if not wanted.isdisjoint(node.output) and trees.tensor not in node.output:
                nodes.append(copy.deepcopy(node))
                wanted |= set(node.input)
        for node in nodes:
            for index, name in enumerate(node.input):
                node.input[index] = "trees" if name == trees.tensor else name
        sums = helper.make_tensor_value_info("trees", TensorProto.DOUBLE, ["rows", 1])
        inputs = [given for given in self._inputs() if given.name in wanted]
        return self._model(nodes[::-1], [sums, *inputs])

    def _inputs(self) -> list[ValueInfoProto]:
        from onnx import TensorProto, helper

        return [
            helper.make_tensor_value_info(name, kind, ["rows", len(columns)])
            for name, kind, columns in (
                ("numbers", TensorProto.DOUBLE, self.inputs.numbers),
                ("codes", TensorProto.INT64, self.inputs.lookups),
            )
            if columns
        ]

    def _model(self, nodes: Sequence[NodeProto], inputs: Sequence[ValueInfoProto]) -> bytes:
        from onnx import TensorProto, checker, helper

        if not inputs:
            raise NotCompilable("the model uses none of its features")
        output = helper.make_tensor_value_info("prediction", TensorProto.DOUBLE, ["rows"])
        used = {name for node in nodes for name in node.input}
        constants = [constant for name, constant in self._constants.items() if name in used]
        graph = helper.make_graph(nodes, "model", inputs, [output], initializer=constants)
        imports = [helper.make_opsetid(domain, version) for domain, version in sorted(self.opsets.items())]
        model = helper.make_model(graph, opset_imports=imports, producer_name=PRODUCER)
        model.ir_version = IR_VERSION
        checker.check_model(model)
        return bytes(model.SerializeToString(deterministic=True))

    def _renamed(self, renamed: dict[str, str], name: str) -> str:
        return renamed.setdefault(name, self.name("appended"))

    def _part(self, sources: Sequence[Source]) -> str:
        """Sources of one kind, side by side."""
        match sources[0]:
            case Raw():
                names = [source.column.name for source in sources if isinstance(source, Raw)]
                indices = [self.number(name) for name in names]
                return self._columns("numbers", indices, len(self.inputs.numbers))
            case Table(lookup=lookup):
                tables = [source for source in sources if isinstance(source, Table)]
                one = len(tables) >= WIDE_TABLE and all(table.lookup == lookup for table in tables)
                return self._rows(lookup, tables) if one else self._tables(tables)
            case Computed(tensor=tensor, width=width):
                indices = [source.index for source in sources if isinstance(source, Computed)]
                return self._columns(tensor, indices, width)

    def _columns(self, tensor: str, indices: Sequence[int], width: int) -> str:
        import numpy as np

        if list(indices) == list(range(width)):
            return tensor
        return self.node("Gather", tensor, self.constant(np.array(indices, np.int64)), axis=1)

    def _rows(self, lookup: str, tables: Sequence[Table]) -> str:
        """Many tables of one lookup: a row of all of them by code, which is copied whole."""
        import numpy as np

        self._count_tables(tables)
        position = np.array(list(self.inputs.lookups).index(lookup), np.int64)
        codes = self.node("Gather", "codes", self.constant(position), axis=1)
        values = np.stack([table.values for table in tables], axis=1).astype(np.float64)
        return self.node("Gather", self.constant(values), codes, axis=0)

    def _count_tables(self, tables: Sequence[Table]) -> None:
        self._table_numbers += sum(len(table.values) for table in tables)
        if self._table_numbers > LARGEST_TABLES:
            raise NotCompilable(f"its tables of categories hold more than {LARGEST_TABLES:,} numbers")

    def _tables(self, tables: Sequence[Table]) -> str:
        """All tables in one gather, from one row of numbers: a node costs as much as a hundred numbers."""
        import numpy as np

        self._count_tables(tables)
        names = list(self.inputs.lookups)
        indices = [names.index(table.lookup) for table in tables]
        offsets = np.cumsum([0, *(len(table.values) for table in tables[:-1])]).astype(np.int64)
        codes = self._columns("codes", indices, len(names))
        places = self.node("Add", codes, self.constant(offsets)) if offsets.any() else codes
        values = np.concatenate([table.values for table in tables]).astype(np.float64)
        return self.node("Gather", self.constant(values), places, axis=0)


def _kind(source: Source, wide: set[str]) -> str:
    if isinstance(source, Table):
        return f"Table {source.lookup}" if source.lookup in wide else "Table"
    return source.tensor if isinstance(source, Computed) else "Raw"


def describe(sources: Sequence[Source]) -> str:
    """The columns of a group, for a reason."""
    raw = [
        s.column.name if isinstance(s, Raw) else s.lookup if isinstance(s, Table) else "?" for s in sources
    ]
    shown = ", ".join(repr(name) for name in dict.fromkeys(raw[:3]))
    return shown + (f" and {len(raw) - 3} more" if len(raw) > 3 else "")
