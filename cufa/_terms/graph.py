"""Expressions of scores and of places: what a traced function computes, as a graph.

A node is an operation on nodes before it. Equal nodes are one, constants are folded, and what no result needs is left
out. The graph is evaluated on NumPy arrays, differentiated, and written down as C++ (`cufa/_terms/emission.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .term import Array, Point

FLOAT, INT, BOOL = "float", "int", "bool"
"""Kinds of numbers: float32, or on the CPU the dtype of scores; int32; bool."""

PLACES = ("batch", "head", "query", "key", "distance")
"""Inputs that are integers."""

INT_LIMIT = 1 << 31
EXACT_INTS = 1 << 24
"""Integers below it are numbers of float32."""


class Node(NamedTuple):
    """An operation, the numbers of the nodes that it is applied to, the kind of what it gives, and a value.

    The value is that of a constant, or the place of a scalar or of an array.
    """

    op: str
    args: tuple[int, ...]
    kind: str
    value: Any = None


class Graph(NamedTuple):
    """Nodes that `results` need, each behind those that it is applied to.

    Attributes
    ----------
    nodes : tuple of Node
    results : tuple of int
        Numbers of nodes.
    arrays : tuple of (str, str, int)
        Name, kind and number of dimensions of the arrays that are read.
    scalars : tuple of (str, str)
        Name and kind of numbers that a call gives.
    """

    nodes: tuple[Node, ...]
    results: tuple[int, ...]
    arrays: tuple[tuple[str, str, int], ...] = ()
    scalars: tuple[tuple[str, str], ...] = ()

    def uses(self, *ops: str) -> bool:
        """Whether one of the operations is among its nodes."""
        return any(node.op in ops for node in self.nodes)

    def needed(self, results: Sequence[int]) -> list[int]:
        """The nodes that some need, in order."""
        found, stack = set[int](), [*results]
        while stack:
            number = stack.pop()
            if number not in found:
                found.add(number)
                stack += self.nodes[number].args
        return sorted(found)

    def uniform(self) -> list[bool]:
        """Whether each node is the same for all scores of a sequence and head."""
        found: list[bool] = []
        for node in self.nodes:
            own = node.op not in ("score", "query", "key", "distance", "float_distance")
            found.append(own and all(found[each] for each in node.args))
        return found

    def evaluate(self, results: Sequence[int], score: Array | None, at: Point, given: Mapping[str, Any]) -> list[Any]:
        """What nodes are on NumPy arrays, in the dtype of scores; `given` are arrays and scalars, by name."""
        dtype = np.dtype(np.float64 if score is None else score.dtype)
        values: dict[int, Any] = {}
        with np.errstate(all="ignore"):
            for number in self.needed(results):
                node = self.nodes[number]
                operands = [values[each] for each in node.args]
                values[number] = self._value(node, operands, dtype, score, at, given)
        return [values[number] for number in results]

    def _value(
        self,
        node: Node,
        operands: list[Any],
        dtype: np.dtype[Any],
        score: Array | None,
        at: Point,
        given: Mapping[str, Any],
    ) -> Any:
        if node.op == "score":
            return score
        if node.op in PLACES:
            return getattr(at, node.op)
        if node.op == "float_distance":
            return at.distance.astype(dtype)
        if node.op in ("constant", "scalar"):
            value = node.value if node.op == "constant" else given[self.scalars[node.value][0]]
            return dtype.type(value) if node.kind == FLOAT else value
        if node.op == "read":
            array = given[self.arrays[node.value][0]]
            read = array[clamped(operands, array.shape)]
            return read.astype(dtype) if node.kind == FLOAT else read
        if node.op == "to_float":
            return np.asarray(operands[0]).astype(dtype)
        return OPERATIONS[node.op](*operands)


def clamped(indices: Sequence[Any], shape: Sequence[int]) -> tuple[Any, ...]:
    """Indices into an array of a shape, those outside of it become the nearest ones inside."""
    return tuple(np.clip(index, 0, extent - 1) for index, extent in zip(indices, shape, strict=True))


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "floordiv": np.floor_divide,
    "mod": np.mod,
    "pow": np.power,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.minimum,
    "max": np.maximum,
    "exp": np.exp,
    "exp2": np.exp2,
    "log": np.log,
    "log2": np.log2,
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "sqrt": np.sqrt,
    "floor": np.floor,
    "ceil": np.ceil,
    "lt": np.less,
    "le": np.less_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "lshift": np.left_shift,
    "rshift": np.right_shift,
    "where": np.where,
    "to_int": lambda x: np.asarray(x).astype(np.int64),
    "stop": lambda x: x,
}
"""What operations do to NumPy arrays. Reading, inputs and ``to_float`` are told apart before."""

COMPARISONS = ("lt", "le", "eq", "ne")
COMMUTATIVE = ("add", "mul", "eq", "ne", "and", "or", "xor")
SIGNED = ("abs", "neg", "min", "max", "add", "sub")
"""Operations that small integers can go through as floats."""


class Builder:
    """A graph that grows."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._numbers: dict[tuple[Any, ...], int] = {}

    def node(self, op: str, args: tuple[int, ...], kind: str, value: Any = None) -> int:
        # 0.0 and -0.0, and 1 and True, are equal but not the same.
        key = op, args, kind, repr(value)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self.nodes)
            self.nodes.append(Node(op, args, kind, value))
        return number

    def constant(self, value: Any) -> int:
        """A Python number."""
        if isinstance(value, bool):
            return self.node("constant", (), BOOL, value)
        if isinstance(value, int):
            return self.node("constant", (), INT, value)
        return self.node("constant", (), FLOAT, float(value))

    def value(self, number: int) -> Any:
        """The value of a constant; None for any other node."""
        node = self.nodes[number]
        return node.value if node.op == "constant" else None

    def kind(self, number: int) -> str:
        return self.nodes[number].kind

    def uniform(self, number: int) -> bool:
        """Whether a node is the same for all scores of a sequence and head."""
        return Graph(tuple(self.nodes[: number + 1]), (number,)).uniform()[number]

    def to_float(self, number: int) -> int:
        """As a float; integers that are made of the distance alone are made of it as a float."""
        node = self.nodes[number]
        if node.kind == FLOAT:
            return number
        if node.op == "constant":
            return self.constant(float(node.value))
        if self._of_distance(number):
            if node.op == "distance":
                return self.node("float_distance", (), FLOAT)
            return self.apply(node.op, *map(self.to_float, node.args))
        return self.node("to_float", (number,), FLOAT)

    def to_int(self, number: int) -> int:
        """As an integer; the fraction is dropped."""
        value = self.value(number)
        if self.kind(number) == INT:
            return number
        return self.constant(int(value)) if value is not None else self.node("to_int", (number,), INT)

    def _of_distance(self, number: int) -> bool:
        """Whether an integer is made of the distance and of small constants, without a product."""
        node = self.nodes[number]
        if node.op == "distance":
            return True
        if node.kind != INT or node.op not in SIGNED:
            return False
        others = [each for each in node.args if not self._of_distance(each)]
        small = (self.value(each) is not None and abs(self.value(each)) < EXACT_INTS for each in others)
        return len(others) < len(node.args) and all(small)

    def apply(self, op: str, *args: int) -> int:
        """An operation on nodes: kinds are brought together, constants folded, and what does nothing is left out."""
        args = self._together(op, args)
        if op in COMMUTATIVE:
            args = tuple(sorted(args, key=lambda each: (self.value(each) is not None, each)))
        kind = self._result_kind(op, args)
        constants = [self.value(each) for each in args]
        if all(each is not None for each in constants):
            folded = self._folded(op, kind, constants)
            if folded is not None:
                return folded
        simpler = self._simpler(op, args)
        return self.node(op, args, kind) if simpler is None else simpler

    def _together(self, op: str, args: tuple[int, ...]) -> tuple[int, ...]:
        """Operands of the kind that an operation is carried out in."""
        kinds = {self.kind(each) for each in args}
        if op in ("stop", "not"):
            return args
        if op == "where":
            branches = args[1:]
            if {*map(self.kind, branches)} != {BOOL}:
                branches = self._together("add", branches)
            return args[0], *branches
        if op in ("and", "or", "xor", "eq", "ne") and kinds == {BOOL}:
            return args
        if op in ("exp", "exp2", "log", "log2", "tanh", "sigmoid", "sqrt", "floor", "ceil", "div"):
            return tuple(map(self.to_float, args))
        if op in ("lt", "le", "eq", "ne") and kinds == {INT} and any(map(self._of_distance, args)):
            values = [self.value(each) for each in args if not self._of_distance(each)]
            if all(each is not None and abs(each) < EXACT_INTS for each in values):
                return tuple(map(self.to_float, args))
        if FLOAT in kinds:
            return tuple(map(self.to_float, args))
        return tuple(each if self.kind(each) == INT else self.to_int(each) for each in args)

    def _result_kind(self, op: str, args: tuple[int, ...]) -> str:
        return BOOL if op in COMPARISONS else self.kind(args[-1])

    def _folded(self, op: str, kind: str, constants: list[Any]) -> int | None:
        """The constant that an operation makes of constants, if it is a number."""
        if op == "stop":
            return None
        try:
            with np.errstate(all="raise"):
                found = OPERATIONS[op](*(np.float64(x) if isinstance(x, float) else x for x in constants))
        except (FloatingPointError, ZeroDivisionError, ValueError, OverflowError):
            return None
        return self.constant({FLOAT: float, INT: int, BOOL: bool}[kind](found))

    def _simpler(self, op: str, args: tuple[int, ...]) -> int | None:
        """An operand, or a simpler operation, that gives the same."""
        values = [self.value(each) for each in args]
        first = args[0]
        if op == "not" and self.nodes[first].op == "not":
            return self.nodes[first].args[0]
        if op == "neg" and self.nodes[first].op == "neg":
            return self.nodes[first].args[0]
        if op == "where":
            if values[0] is not None:
                return args[1] if values[0] else args[2]
            return args[1] if args[1] == args[2] else None
        if len(args) != 2:
            return None
        second = args[1]
        if op in ("and", "or") and self.kind(first) == BOOL:
            for value, other in ((values[0], second), (values[1], first)):
                if value is not None:
                    return other if value == (op == "and") else self.constant(value)
        if op == "mul" and -1.0 in values:
            return self.apply("neg", second if values[0] == -1.0 else first)
        if op in ("add", "mul") and values[0] is not None and values[0] == (op == "mul"):
            return second
        if op in ("add", "sub", "mul", "div") and values[1] is not None and values[1] == (op in ("mul", "div")):
            return first
        if op == "sub" and self.kind(first) == INT:  # the position less the key is the distance
            for one, other, sign in ((first, second, 1), (second, first, -1)):
                node = self.nodes[one]
                if node.op == "add" and other in node.args:
                    rest = node.args[1 - node.args.index(other)]
                    return rest if sign == 1 else self.apply("neg", rest)
        if op == "div" and (values[1] is not None or self.uniform(second)) and values[0] != 1.0:
            if values[1] == 0.0:
                return None
            return self.apply("mul", first, self.apply("div", self.constant(1.0), second))
        return None

    def graph(
        self, results: Sequence[int], arrays: Sequence[tuple[str, str, int]], scalars: Sequence[tuple[str, str]]
    ) -> Graph:
        """What the results need; arrays and scalars that they do not read are left out."""
        needed = Graph(tuple(self.nodes), ()).needed(results)
        numbers = {old: new for new, old in enumerate(needed)}
        chosen = {
            op: sorted({self.nodes[each].value for each in needed if self.nodes[each].op == op})
            for op in ("read", "scalar")
        }
        nodes = []
        for old in needed:
            node = self.nodes[old]
            value = chosen[node.op].index(node.value) if node.op in chosen else node.value
            nodes.append(node._replace(args=tuple(numbers[each] for each in node.args), value=value))
        return Graph(
            tuple(nodes),
            tuple(numbers[each] for each in results),
            tuple(arrays[index] for index in chosen["read"]),
            tuple(scalars[index] for index in chosen["scalar"]),
        )


class Differential(NamedTuple):
    """A graph with derivatives of its first result.

    Attributes
    ----------
    graph : Graph
    slope : int
        The node of the derivative by the score.
    reads : tuple of (int, int)
        Nodes that read floats, and the nodes of the derivatives by them.
    """

    graph: Graph
    slope: int
    reads: tuple[tuple[int, int], ...]

    @property
    def result(self) -> int:
        return self.graph.results[0]


def differentiate(builder: Builder, result: int, arrays: Any, scalars: Any) -> Differential:
    """Derivatives of a node by the score and by what is read, in reverse mode: the graph grows by their nodes."""
    adjoints = {result: builder.constant(1.0)}
    slope, reads = builder.constant(0.0), []
    for number in reversed(range(result + 1)):
        adjoint = adjoints.get(number)
        if adjoint is None:
            continue
        node = builder.nodes[number]
        if node.op == "score":
            slope = adjoint
        elif node.op == "read":
            reads.append((number, adjoint))
        for operand, share in _shares(builder, number, node, adjoint):
            if builder.kind(operand) == FLOAT and builder.value(share) != 0.0:
                known = adjoints.get(operand)
                adjoints[operand] = share if known is None else builder.apply("add", known, share)
    reads.reverse()
    graph = builder.graph((result, slope, *(each for pair in reads for each in pair)), arrays, scalars)
    _, slope, *pairs = graph.results
    return Differential(graph, slope, tuple(zip(pairs[::2], pairs[1::2], strict=True)))


def _shares(builder: Builder, number: int, node: Node, adjoint: int) -> list[tuple[int, int]]:
    """Operands of a node, each with its share of the gradient by the node."""

    def times(*factors: int) -> int:
        return _product(builder, *factors)

    def chosen(condition: int, one: int, other: int) -> int:
        return builder.apply("where", condition, one, other)

    constant, apply = builder.constant, builder.apply
    op, args = node.op, node.args
    zero, one = constant(0.0), constant(1.0)
    if op == "add":
        return [(args[0], adjoint), (args[1], adjoint)]
    if op == "sub":
        return [(args[0], adjoint), (args[1], apply("neg", adjoint))]
    if op == "mul":
        return [(args[0], times(adjoint, args[1])), (args[1], times(adjoint, args[0]))]
    if op == "div":
        inverse = apply("div", one, args[1])
        return [(args[0], times(adjoint, inverse)), (args[1], apply("neg", times(adjoint, number, inverse)))]
    if op == "mod":
        whole = apply("floor", apply("div", *args))
        return [(args[0], adjoint), (args[1], apply("neg", times(adjoint, whole)))]
    if op == "pow":
        base, exponent = args
        lower = apply("pow", base, apply("sub", exponent, one))
        shares = [(base, times(adjoint, exponent, lower))]
        if builder.value(exponent) is None:
            shares.append((exponent, times(adjoint, number, apply("log", base))))
        return shares
    if op == "neg":
        return [(args[0], apply("neg", adjoint))]
    if op == "abs":
        return [(args[0], chosen(apply("lt", args[0], zero), apply("neg", adjoint), adjoint))]
    if op in ("min", "max"):
        first = apply("le", *(args if op == "min" else args[::-1]))
        return [(args[0], chosen(first, adjoint, zero)), (args[1], chosen(first, zero, adjoint))]
    if op in ("exp", "exp2"):
        base = constant(1.0 if op == "exp" else math.log(2.0))
        return [(args[0], times(base, adjoint, number))]
    if op in ("log", "log2"):
        base = constant(1.0 if op == "log" else 1 / math.log(2.0))
        return [(args[0], times(base, adjoint, apply("div", one, args[0])))]
    if op == "tanh":
        return [(args[0], times(adjoint, apply("sub", one, apply("mul", number, number))))]
    if op == "sigmoid":
        return [(args[0], times(adjoint, apply("mul", number, apply("sub", one, number))))]
    if op == "sqrt":
        return [(args[0], times(adjoint, apply("div", constant(0.5), number)))]
    if op == "where":
        return [(args[1], chosen(args[0], adjoint, zero)), (args[2], chosen(args[0], zero, adjoint))]
    return []  # inputs, steps, comparisons, integers, and what is stopped


def _product(builder: Builder, first: int, *others: int) -> int:
    """A product of derivatives, in which a factor and its inverse meet: as in c · tanh(s / c)."""
    product = first
    for other in others:
        inverse = builder.nodes[other]
        if inverse.op == "div" and builder.value(inverse.args[0]) == 1.0:
            rest = _without(builder, product, inverse.args[1])
            if rest is not None:
                product = rest
                continue
        if 0.0 in (builder.value(product), builder.value(other)):
            return builder.constant(0.0)
        product = builder.apply("mul", product, other)
    return product


def _without(builder: Builder, product: int, factor: int) -> int | None:
    """A product without one of its factors, if it has it."""
    if product == factor:
        return builder.constant(1.0)
    node = builder.nodes[product]
    if node.op != "mul":
        return None
    for index in (0, 1):
        rest = _without(builder, node.args[index], factor)
        if rest is not None:
            return builder.apply("mul", *((rest, node.args[1]) if index == 0 else (node.args[0], rest)))
    return None
