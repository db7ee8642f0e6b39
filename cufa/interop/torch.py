"""torch: operations as operators, which autograd differentiates, and torch.compile, export and vmap see through.

Each operation becomes an operator of the library ``cufa`` when one of these first meets it. All of it follows from the
record: the schema takes the arrays that are not written and the options, results are a list, and the gradients are
those of `gradients_of`. What computes is the ordinary way of a call, which plain tensors go without any of this.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, combinations, compress
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from .._call import arrays as _arrays
from .._call import options as _options
from .._call import problem as _problem
from .._call.arrays import CPU, Arrays, Spec, contiguous
from .._call.options import MAX_SEQLEN, Options
from .._call.problem import Problem
from .._operations import call as _call
from .._operations.features import having, wanting
from .._operations.forward import ATTENTION, ATTENTION_VARLEN
from .._operations.operation import Operation, by_key, gradients_of
from .._operations.repeated import Repeated
from .._operations.rotary import ROTARY
from .._operations.states import MERGE_STATES
from .._terms import TERMS
from .._terms.bias import BIAS
from .._terms.constant import Constant
from .._terms.dropout import SeededDropout
from .._terms.mask_array import MASK_ARRAY
from .._terms.rel_bias import REL_BIAS
from .._terms.term import Term
from ..errors import UnsupportedError

LIBRARY = torch.library.Library("cufa", "FRAGMENT")
PLAIN = (bool, int, float, type(None))
"""Types of numbers, symbolic ones too, that an operator takes as they are."""

MEMORY = {torch.Tensor, torch.nn.Parameter, type(None)}
"""Types of which there is no more to know."""

OF_TENSORS = {"bias": BIAS, "rel_bias": REL_BIAS, "mask": MASK_ARRAY, "dropout": SeededDropout()}
"""Terms that follow from what a tensor is for, in the order in which they are applied."""

MAX_KNOWN = 256
"""Calls of an operator of which it is remembered what gradients they have."""

_is_none = partial(operator.is_, None)
_below_autograd = torch._C._AutoDispatchBelowAutograd
_after_autograd = torch._C._after_autograd_keyset
_requires_grad = torch._C._any_requires_grad
_transforms = torch._C._are_functorch_transforms_active
_len_modes = torch._C._len_torch_dispatch_stack
_len_functions = torch._C._len_torch_function_stack
_key_included = torch._C._dispatch_tls_is_dispatch_key_included
_autocasts = torch._C._is_any_autocast_enabled


class Operator:
    """An operation as torch's dispatcher knows it.

    Its arguments are `inputs`, then the options in their order, with the sides of the window one by one.

    Attributes
    ----------
    operation : Operation
    gradients : Operation or None
        Those of it.
    name : str
        In the library.
    inputs : tuple of str
        Arrays that are not written.
    overload : OpOverload
    function : type
        The `torch.autograd.Function` of it.
    """

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self.gradients = gradients_of(operation)
        self.inputs = tuple(name for name in operation.arrays if name not in operation.written)
        self._nones = (None,) * (len(operation.gives) + 1)  # behind what there is, for all that there may be
        self._given = _picked(operation.arrays, self.inputs)
        self._inputs = _picked(self.inputs, operation.arrays)
        if self.gradients is not None:
            read, gives = self.gradients.arrays, operation.gives
            kept = tuple(name for name in (*self.inputs, *gives) if name in read)
            self._kept = _picked(kept, (*self.inputs, *gives))
            self._backward = _picked(read, (*kept, *(f"d{name}" for name in gives)))
            self._of_terms = any(term.has_gradient for term in self.gradients.terms)
        self._ways: dict[Any, Ways] = {}
        self.name = name = _free_name(operation)
        LIBRARY.define(name + self.schema(), tags=(torch.Tag.pt2_compliant_tag,))
        qualified = f"cufa::{name}"
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, self.compute, key)
        torch.library.register_fake(qualified, self.fake, lib=LIBRARY)
        torch.library.register_vmap(qualified, self.vmap, lib=LIBRARY)
        LIBRARY.impl(name, self.autograd, "Autograd", with_keyset=True)
        for device in ("cpu", "cuda") if self.gradients else ():
            LIBRARY.impl(name, self.autocast(device), f"Autocast{device.upper()}")
        self.overload = getattr(torch.ops.cufa, name).default
        self.function = _function_of(self)
        # The base class's, since that of their own binds arguments to a signature on every call, and looks for
        # transforms and wrappers, which are not there.
        self._apply, self.apply_in_memory = (
            super(torch.autograd.Function, each).apply  # type: ignore[misc]
            for each in (self.function, _function_in_memory_of(self))
        )

    def schema(self) -> str:
        arrays = [f"Tensor{'?' if index else ''} {name}" for index, name in enumerate(self.inputs)]
        options = ["bool causal", "int? window_left", "int? window_right", "float? softmax_scale", "float softcap"]
        more = [f"Scalar? {name}" for name in self.operation.owned.names]
        return f"({', '.join([*arrays, *options, 'bool return_lse', 'bool deterministic', *more])}) -> Tensor[]"

    def flat(self, given: tuple[Any, ...], options: Options) -> tuple[Any, ...]:
        """The operator's arguments, from those of `call` with plain options."""
        causal, window, *others, _, _ = options
        left, right = (None, None) if window is None else (_bounded(side) for side in window)
        return (*self.inputs_of(given), causal, left, right, *others, *self.operation.owned.given(options))

    def unflat(self, flat: tuple[Any, ...]) -> tuple[tuple[Any, ...], Options]:
        """The arrays and options of `call`, from the operator's arguments."""
        count = len(self.inputs)
        causal, left, right, *others = flat[count:]
        window = None if left is None and right is None else (left, right)
        asked = (causal, window, *others)
        return self.given_of(flat[:count]), _options.of(self.operation.name, asked, self.operation.owned)

    def given_of(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arrays of `call`, none of which is to be written, from those that are read."""
        return self._given((*inputs, None))

    def inputs_of(self, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return self._inputs((*given, None))

    def compute(self, *flat: Any) -> list[Any]:
        """Of tensors in memory."""
        given, options = self.unflat(flat)
        try:
            arrays = _viewed(self.operation, given)
        except _arrays.Recorded:  # by what has been seen to: this is below autograd
            with torch.no_grad():
                arrays = _viewed(self.operation, given)
        return _computed(self.operation, arrays, options)

    def fake(self, *flat: Any) -> list[Any]:
        """Of tensors that have shapes only, which may be symbols."""
        problem = self.sketch(flat)
        return [flat[0].new_empty(each.shape, dtype=getattr(torch, each.dtype)) for each in problem.results]

    def sketch(self, flat: tuple[Any, ...]) -> Problem:
        return sketch(self.operation, *self.unflat(flat))

    def autocast(self, device: str) -> Callable[..., list[Any]]:
        """The operator's function where autocast is enabled for a type of device."""

        def cast(*flat: Any) -> list[Any]:
            given, options = self.unflat(flat)
            with torch._C._DisableAutocast():
                given = cast_to(self.operation, given, torch.get_autocast_dtype(device))
                found: list[Any] = self.overload(*self.flat(given, options))
            return found

        return cast

    def autograd(self, keyset: Any, *flat: Any) -> list[Any]:
        """Record the call for autograd, if it is to be differentiated, and go on below."""
        if torch.autograd.forward_ad._current_level >= 0:
            _refuse_tangents(self.operation.name, flat)
        if torch.is_grad_enabled() and _requires_grad(*flat):
            given, options = self.unflat(flat)
            with enable_single_level_autograd_function():
                return self.recorded(keyset, given, options)
        with _below_autograd():
            found: list[Any] = self.overload.redispatch(keyset & _after_autograd, *flat)
        return found

    def recorded(self, keyset: Any, given: tuple[Any, ...], options: Options) -> list[Any]:
        """The results, with a history; `keyset` is where to go on, or None for tensors in memory."""
        if keyset is None:
            return [*self.apply_in_memory(None, options, *self.inputs_of(given))]
        whole = self.whole(options)
        results = self._apply(keyset, whole, *self.inputs_of(given))
        return [*results] if whole is options else [*results[:-1]]

    def whole(self, options: Options) -> Options:
        """The options of a call that has all results which the gradients read."""
        if options.return_lse or self.gradients is None or "lse" not in self.gradients.arrays:
            return options
        return options.with_lse()

    def forward(self, keyset: Any, options: Options, *inputs: Any) -> tuple[Any, ...]:
        flat = self.flat(self.given_of(inputs), options)
        if not _transforms():
            with _below_autograd():
                return tuple(self.overload.redispatch(keyset & _after_autograd, *flat))
        # What lies below records as well: another transform of torch.func, or autograd itself.
        with torch.enable_grad(), _set_fwd_grad_enabled(True), _below_autograd():
            return tuple(self.overload.redispatch(keyset & _after_autograd, *flat))

    def setup_context(self, ctx: Any, arguments: tuple[Any, ...], results: tuple[Any, ...]) -> None:
        _, options, *inputs = arguments
        if self.gradients is not None:
            given = [(result.shape, result.dtype) for result in results]
            self.keep(ctx, options, inputs, results, given, self.ways_of(ctx, inputs, options))

    def forward_in_memory(self, ctx: Any, arrays: Viewed, options: Options, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """`forward` and `setup_context` of tensors in memory, whose problem remembers what the gradients ask for.

        An lse that nobody asked for is kept, but is no result, of which torch would make more.
        """
        if isinstance(arrays, tuple):
            repeated, addresses = arrays
            whole, given, ways = repeated.problem.memo["recorded"]
            results = repeated(addresses)
        else:
            if arrays is None:
                arrays = _viewed(self.operation, self.given_of(inputs))
            problem = _problem.checked(self.operation, arrays, options)
            known = problem.memo.get("recorded")
            if known is None:
                known = problem.memo["recorded"] = self._known(problem, arrays, options, inputs)
                known[0].memo["recorded"] = known
            whole, given, ways = known
            results = _call.computed(arrays, whole, options.late)
        if self.gradients is not None:
            self.keep(ctx, options, inputs, results, given, ways or self.ways_of(ctx, inputs, whole.options))
        return tuple(results if whole.options.return_lse is options.return_lse else results[:-1])

    def _known(self, problem: Problem, arrays: Arrays, options: Options, inputs: tuple[Any, ...]) -> Known:
        """What is known of a problem as soon as autograd has recorded it once."""
        if self.gradients is None:
            return problem, [], None
        asked = self.whole(options)
        whole = problem if asked is options else _problem.check(self.operation, arrays, asked)
        given = [(result.shape, getattr(torch, result.dtype)) for result in whole.results]
        return whole, given, None if self._of_terms else self.ways(self.gradients, inputs, asked)

    def keep(
        self,
        ctx: Any,
        options: Options,
        inputs: Sequence[Any],
        results: Sequence[Any],
        given: Given,
        ways: Ways,
    ) -> None:
        """Keep what the gradients read; refuse what has none. `given` are the shapes and dtypes of results."""
        for index in ways.without:
            if ctx.needs_input_grad[index - len(self.inputs)]:
                name = self.inputs[index]
                raise UnsupportedError(
                    f"{self.operation.name}: {name} requires grad, but has no gradient; pass {name}.detach()."
                )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*self._kept((*inputs, *results, *self._nones)))
        ctx.call = options, given, ways

    def ways_of(self, ctx: Any, inputs: Sequence[Any], options: Options) -> Ways:
        """`ways` of the gradients without those of score terms that no input needs."""
        assert self.gradients is not None
        gradients = self.gradients
        if self._of_terms:
            needed = compress(self.inputs, ctx.needs_input_grad[-len(self.inputs) :])
            gradients = wanting(gradients, [f"d{name}" for name in needed])
        return self.ways(gradients, inputs, options)

    def ways(self, gradients: Operation, inputs: Sequence[Any], options: Options) -> Ways:
        """Which of the results of the gradients belongs to each input, if any."""
        key = gradients, options.lasting, *map(_is_none, inputs)
        known = self._ways.get(key)
        if known is None:
            problem = sketch(self.operation, self.given_of(tuple(inputs)), options)
            results = gradients.results(replace(problem, operation=gradients, memo={}))
            names = tuple(result.name for result in results)
            wanted = tuple(f"d{name}" for name in self.inputs)
            pairs = enumerate(zip(wanted, inputs, strict=True))
            without = tuple(index for index, (name, x) in pairs if x is not None and name not in names)
            known = Ways(gradients, _picked(wanted, names), without)
            if len(self._ways) >= MAX_KNOWN:
                self._ways.clear()
            self._ways[key] = known
        return known

    def backward(self, ctx: Any, dresults: tuple[Any, ...]) -> tuple[Any, ...]:
        """The gradients by the inputs."""
        if self.gradients is None:
            raise UnsupportedError(
                f"{self.operation.name}: a result is differentiated, and there are no gradients of it: those of "
                "attention are not differentiated again. Pass tensor.detach()."
            )
        saved = ctx.saved_tensors
        options, results, ways = ctx.call
        for index, dresult in enumerate(dresults):
            if dresult is None and self.operation.gives[index] != "lse":
                shape, dtype = results[index]
                dresults = *dresults[:index], saved[0].new_zeros(shape, dtype=dtype), *dresults[index + 1 :]
        given = self._backward((*saved, *dresults, *self._nones))
        options = options.of_gradients(torch.are_deterministic_algorithms_enabled())
        if _arrays.compiling(given[0]):
            found = _call.call(ways.gradients, given, (*options[:6], *self.operation.owned.given(options)))
        else:
            found = _call.call_plain(ways.gradients, given, options)
        gradients: tuple[Any, ...] = ways.pick((*found, None) if isinstance(found, tuple) else (found, None))
        return gradients

    def vmap(self, info: Any, in_dims: tuple[Any, ...], *flat: Any) -> tuple[list[Any], list[int]]:
        """Of many calls at once: one call with a larger batch, or one after the other if that would not be the same."""
        operation = self.operation
        if operation.packed:
            raise UnsupportedError(
                f"{operation.name}: torch.func.vmap cannot put packed sequences side by side; pack those of all calls "
                "into one, and add their offsets up."
            )
        folded = self.folded(info.batch_size, in_dims, flat)
        if folded is not None:
            results = [each.unflatten(0, (info.batch_size, -1)) for each in self.overload(*folded)]
            return results, [0] * len(results)
        calls = [
            self.overload(*(_selected(each, dim, index) for each, dim in zip(flat, in_dims, strict=True)))
            for index in range(info.batch_size)
        ]
        results = [torch.stack(each) for each in zip(*calls, strict=True)]
        return results, [0] * len(results)

    def folded(self, size: int, in_dims: tuple[Any, ...], flat: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The arguments of one call for all; None if that would not be the same."""
        names = {*self.operation.tiles, "out", "lse", "dlse"}
        arrays: list[Any] = [*flat]
        one: list[Any] = [*flat]
        for index, (name, dim) in enumerate(zip(self.inputs, in_dims, strict=False)):
            array = flat[index]
            one[index] = _selected(array, dim, 0)
            if array is None or (dim is None and name not in names):
                continue
            if name not in names:
                return None
            whole = array.expand(size, *array.shape) if dim is None else array.movedim(dim, 0)
            arrays[index] = whole.flatten(0, 1) if whole.ndim > 1 else whole
        single = self.sketch(tuple(one))
        if not all(term.foldable for term in single.terms):
            return None
        try:
            every = self.sketch(tuple(arrays))
        except ValueError:  # an array has a batch axis that was not known of
            return None
        shapes = zip(single.results, every.results, strict=True)
        same = all(all.shape == (size * one.shape[0], *one.shape[1:]) for one, all in shapes)
        return tuple(arrays) if same and size > 1 else None


class Ways(NamedTuple):
    """Which gradients inputs have: what takes them from all and None behind them, and places of given ones without."""

    gradients: Operation
    pick: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    without: tuple[int, ...]


Given: TypeAlias = list[tuple[tuple[int, ...], torch.dtype]]
"""Shapes and dtypes of results."""

Viewed: TypeAlias = Arrays | tuple[Repeated, list[int]] | None
"""The tensors of a call if they are viewed, or that they are like those of an earlier one, and their addresses."""

Known: TypeAlias = tuple[Problem, Given, Ways | None]
"""Of a problem that autograd records: that of all results which its gradients read, those results, and the gradients;
None if there are none, or if they depend on which inputs need one."""


def _function_of(made: Operator) -> Any:
    """That of calls that torch sees through, which its transforms want in two parts."""

    class Differentiable(torch.autograd.Function):  # type: ignore[misc, unused-ignore]
        @staticmethod
        def forward(keyset: Any, options: Options, *inputs: Any) -> tuple[Any, ...]:
            return made.forward(keyset, options, *inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            made.setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *dresults: Any) -> tuple[Any, ...]:
            return None, None, *made.backward(ctx, dresults)

    Differentiable.__name__ = made.operation.name
    return Differentiable


def _function_in_memory_of(made: Operator) -> Any:
    """That of tensors in memory: the same in one part, which takes less time."""

    class Differentiable(torch.autograd.Function):  # type: ignore[misc, unused-ignore]
        @staticmethod
        def forward(ctx: Any, arrays: Viewed, options: Options, *inputs: Any) -> tuple[Any, ...]:
            return made.forward_in_memory(ctx, arrays, options, inputs)

        @staticmethod
        def backward(ctx: Any, *dresults: Any) -> tuple[Any, ...]:
            return None, None, *made.backward(ctx, dresults)

    Differentiable.__name__ = made.operation.name
    return Differentiable


_OPERATORS: dict[Operation, Operator] = {}
_NAMES: set[str] = set()
_LOCK = threading.RLock()


def _free_name(operation: Operation) -> str:
    """The name of an operator. Compiled programs are kept by it, so it says which score terms there are."""
    found = base = "_".join([operation.name, *(_told(term) for term in operation.terms if term not in TERMS)])
    count = 1
    while found in _NAMES:
        count += 1
        found = f"{base}_{count}"
    _NAMES.add(found)
    return found


def _told(term: Term) -> str:
    """A term's name, and which of those that have it the term is."""
    return f"{term.name}{'_constant' * isinstance(term, Constant)}{'_seeded' * isinstance(term, SeededDropout)}"


def operator_of(operation: Operation) -> Operator:
    """The operation as an operator, made on first use."""
    known = _OPERATORS.get(operation)
    if known is None:
        with _LOCK:
            known = _OPERATORS.get(operation)
            if known is None:
                known = _OPERATORS[operation] = Operator(operation)
                if known.gradients is not None:  # which a program that was compiled before asks for by name
                    operator_of(known.gradients)
    return known


def call(operation: Operation, given: tuple[Any, ...], options: Options) -> Any:
    """Call an operation with tensors of which torch has to be told."""
    if torch._C._get_tracing_state() is not None:
        raise UnsupportedError(
            f"{operation.name}: torch.jit.trace records torch's own operations and would see nothing of this one; use "
            "torch.compile or torch.export."
        )
    if torch.autograd.forward_ad._current_level >= 0:
        _refuse_tangents(operation.name, given)
    if operation.changed:
        return _in_place(operation, given, options)
    seen = not MEMORY.issuperset(map(type, given)) and _is_seen(operation, given)
    seen = seen or _transforms() or (_len_functions() > 0 and _key_included("PreDispatch"))
    seen = seen or (_len_modes() > 0 and _is_seen_by_modes(operation, given))
    if not _autocasts():
        try:
            results = _recorded(operation, given, options, seen)
        except _arrays.Recorded:  # a transform is over, and has left wrappers of tensors behind
            results = _recorded(operation, unwrap_dead_wrappers(given), options, seen)
    else:
        given = unwrap_dead_wrappers(given)
        device = given[0].device.type
        if torch.is_autocast_enabled(device):
            given = cast_to(operation, given, torch.get_autocast_dtype(device))
        with torch._C._DisableAutocast():
            results = _recorded(operation, given, options, seen)
    return results[0] if len(results) == 1 else tuple(results)


def differentiated(operation: Operation, arrays: Arrays, options: Options) -> Any:
    """`call` where autograd alone has to be told, and the arrays are viewed."""
    given = arrays.given
    written = [index for index in operation.written_indices if given[index] is not None]
    if written or operation.changed or _transforms():
        return call(operation, given, options)
    found = operator_of(operation)
    results = found.apply_in_memory(arrays, options, *found.inputs_of(given))
    known = None if options.late else _problem.check(operation, arrays, options).memo.get("recorded")
    if known is not None:  # as it is where many problems of other threads have come between
        _call.expect(operation, arrays, options, known[0])
    return results[0] if len(results) == 1 else results


def differentiated_again(
    operation: Operation, given: tuple[Any, ...], options: Options, repeated: Repeated, addresses: list[int]
) -> Any:
    """`differentiated` of a call like an earlier one."""
    found = operator_of(operation)
    results = found.apply_in_memory((repeated, addresses), options, *found.inputs_of(given))
    return results[0] if len(results) == 1 else results


def _in_place(operation: Operation, given: tuple[Any, ...], options: Options) -> Any:
    """`call` of what may change arrays in place: torch is told nothing of it, so that is refused which would need it.

    Autocast leaves such arrays as they are: what is written into a copy would be lost.
    """
    seen = not MEMORY.issuperset(map(type, given)) and _is_seen(operation, given)
    traced = _len_functions() > 0 and _key_included("PreDispatch")
    if seen or traced or _transforms() or (_len_modes() > 0 and _is_traced_by_modes()):
        raise UnsupportedError(
            f"{operation.name}: the call is traced or transformed by torch, which would not see that "
            f"{operation.changed[0]} changes in place; call it with tensors in memory, outside of transforms."
        )
    if torch.is_grad_enabled() and _requires_grad(*given):
        pairs = zip(operation.arrays, given, strict=True)
        name = next(name for name, array in pairs if array is not None and array.requires_grad)
        raise UnsupportedError(
            f"{operation.name}: {name} requires grad, but there are no gradients; pass {name}.detach(), or call under "
            "torch.no_grad()."
        )
    results = _computed(operation, _viewed(operation, unwrap_dead_wrappers(given)), options)
    return results[0] if len(results) == 1 else tuple(results)


def detached(operation: Operation, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same tensors without a history; they must lie in memory."""
    if (not MEMORY.issuperset(map(type, given)) and _is_seen(operation, given)) or _transforms():
        raise UnsupportedError(f"{operation.name}: a torch tensor stands for others; pass tensors that lie in memory.")
    return tuple(None if array is None else array.detach() for array in given)


def _recorded(operation: Operation, given: tuple[Any, ...], options: Options, seen: bool) -> list[Any]:
    """The results; `seen` is whether more than autograd sees the call."""
    recorded = torch.is_grad_enabled() and _requires_grad(*given)
    if not seen and not recorded:
        return _computed(operation, _viewed(operation, given), options)
    for index in operation.written_indices:
        if given[index] is not None:
            why = "a tensor requires grad" if recorded else "the call is traced"
            raise UnsupportedError(
                f"{operation.name}: {operation.arrays[index]} is given and {why}, but what is written there has no "
                "history; leave it out, or call under torch.no_grad()."
            )
    found_operator = operator_of(operation)
    if not seen:
        return found_operator.recorded(None, given, options)
    found: list[Any] = found_operator.overload(*found_operator.flat(given, options))
    return found


def _is_seen(operation: Operation, given: tuple[Any, ...]) -> bool:
    """Whether a tensor wraps others, and is told of what is done with it; refuse what is none."""
    seen = False
    for name, array in zip(operation.arrays, given, strict=True):
        if array is None:
            continue
        if not isinstance(array, torch.Tensor):
            raise TypeError(
                f"{operation.name}: {name} is a {type(array).__name__}, and others are torch tensors; pass arrays of "
                "one framework."
            )
        try:
            _arrays.check_subclass(type(array))
        except _arrays.Refused as refused:
            raise refused.of(operation.name, name) from None
        except _arrays.Recorded:
            seen = True
    return seen


def _is_seen_by_modes(operation: Operation, given: tuple[Any, ...]) -> bool:
    """Whether modes are to see the call: all but that of a given result, of which only some have to be told."""
    if all(given[index] is None for index in operation.written_indices):
        return True
    return _is_traced_by_modes()


def _is_traced_by_modes() -> bool:
    """Whether modes work with tensors that stand for others."""
    kinds = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(kind) is not None for kind in (kinds.FAKE, kinds.PROXY, kinds.FUNCTIONAL))


def _computed(operation: Operation, arrays: Arrays, options: Options) -> list[Any]:
    return _call.computed(arrays, _problem.checked(operation, arrays, options), options.late)


def _viewed(operation: Operation, given: tuple[Any, ...]) -> Arrays:
    return _arrays.view(operation.name, operation.arrays, given, operation.uncopied_indices)


def _name(key: str) -> str:
    """The name of an operation's operator; torch.compile takes it for a constant of the key, which is a text."""
    return operator_of(by_key(key)).name


def _featured_name(key: str, names: str) -> str:
    """The same with features of these names, which are made here, with all gradients that may be wanted."""
    operation = having(by_key(key), *(OF_TENSORS[name] for name in names.split()))
    gradients = operation if operation.gradient else gradients_of(operation)
    assert gradients is not None
    own = [name for term in gradients.terms for name in term.gradients]
    for wanted in chain.from_iterable(combinations(own, count) for count in range(len(own) + 1)):
        operator_of(wanting(gradients, wanted))  # which a program that was compiled before asks for by name
    return operator_of(operation).name


_told_by_texts: tuple[Any, ...] = (_name, _featured_name)
for _function in _told_by_texts:
    _function._dynamo_marked_constant = True  # what torch.compiler would say, which imports much


def compiled(operation: Operation, given: tuple[Any, ...], asked: tuple[Any, ...]) -> Any:
    """`call` where torch.compile traces it: a node of its graph, but for what only a break in it can serve."""
    why = _unfit(operation, given, asked)
    if why is not None:
        return outside(why, _call.call, operation, given, asked)
    return _node(_name(operation.key), operation, given, asked)


def compiled_with_features(
    function: Callable[..., Any], operation: Operation, given: tuple[Any, ...], asked: tuple[Any, ...], *features: Any
) -> Any:
    """The same of a call with features, `function` of the arguments behind it: with those that are tensors alone."""
    score, bias, rel_bias, mask, dropout_p, seed = features
    drops = isinstance(dropout_p, float) and 0.0 < dropout_p < 1.0
    tensors = [("bias", bias), ("rel_bias", rel_bias), ("mask", mask)]
    found = [(name, x) for name, x in tensors if x is not None] + ([("dropout", seed)] if drops else [])
    off = not drops and dropout_p == 0 and (seed is None or _is_seed(seed))  # as in models that do not train
    fit = score is None and (drops or off)
    if not fit or not all(isinstance(x, torch.Tensor) for _, x in found):
        # An operation with other features is made when they are first asked for, which cannot be traced.
        what = "score functions, masks that are no tensors, and dropout whose seed is no tensor,"
        return outside(what, function, operation, given, asked, *features)
    if not found:
        return compiled(operation, given, asked)
    why = _unfit(operation, given, asked)
    if why is not None:
        return outside(why, function, operation, given, asked, *features)
    name = _featured_name(operation.key, " ".join([name for name, _ in found]))
    return _node(name, operation, given, (*asked, dropout_p) if drops else asked, [x for _, x in found])


def _is_seed(seed: Any) -> bool:
    dtypes = torch.int32, torch.uint32, torch.int64
    return isinstance(seed, torch.Tensor) and seed.ndim == 0 and seed.dtype in dtypes


def _unfit(operation: Operation, given: tuple[Any, ...], asked: tuple[Any, ...]) -> str | None:
    """What of a call cannot be part of a graph, if anything."""
    arrays = list(zip(operation.arrays, given, strict=True))
    inputs = [x for name, x in arrays if name not in operation.written]
    if operation.changed:
        return "arrays that change in place"
    if not isinstance(inputs[0], torch.Tensor) or not all(x is None or isinstance(x, torch.Tensor) for x in inputs):
        return "arrays that are no torch tensors"
    if any(x is not None for name, x in arrays if name in operation.written):
        return "a given array that is written"
    numbers = _numbers(asked)
    flags = numbers[0], numbers[5], numbers[6]
    if not all(isinstance(x, bool) for x in flags) or not all(isinstance(x, PLAIN) for x in numbers):
        return "options that are no plain numbers"
    return None


def _numbers(asked: tuple[Any, ...]) -> tuple[Any, ...]:
    """Options, with the sides of the window one by one."""
    causal, window, *others = asked
    left, right = (None, None) if window is None else window
    return causal, left, right, *others


def _node(
    name: str, operation: Operation, given: tuple[Any, ...], asked: tuple[Any, ...], more: Sequence[Any] = ()
) -> Any:
    """The results of an operator; `more` are arrays of features."""
    inputs = [x for name, x in zip(operation.arrays, given, strict=True) if name not in operation.written]
    results = getattr(torch.ops.cufa, name).default(*inputs, *more, *_numbers(asked))
    return results[0] if len(results) == 1 else tuple(results)


def outside(what: str, function: Callable[..., Any], operation: Operation, *arguments: Any) -> Any:
    """Break the graph of torch.compile, and call `function` there."""
    torch._dynamo.graph_break(f"{operation.name}: {what} cannot be part of a graph")
    return _arrays.uncompiled(function, operation, *arguments)


def sketch(operation: Operation, given: tuple[Any, ...], options: Options) -> Problem:
    """The problem of tensors that may have no memory, as far as results and messages go: that of the CPU."""
    arrays = [(name, x) for name, x in zip(operation.arrays, given, strict=True) if x is not None]
    one = len({x.device for _, x in arrays}) == 1
    specs = {}
    for name, x in arrays:
        shape, device = tuple(x.shape), x.device
        ordinal = CPU if one or device.type == "cpu" else device.index or 0
        dtype = str(x.dtype).removeprefix("torch.")
        specs[name] = Spec("torch", shape, contiguous(shape), dtype, ordinal, 0, True)
    return operation.check(operation, specs, options)


def cast_to(operation: Operation, given: tuple[Any, ...], dtype: Any) -> tuple[Any, ...]:
    """What autocast makes of the arrays: q, k and v in its dtype, but not of float64, and nothing of gradients."""
    if operation.gradient:
        return given
    return tuple(
        x.to(dtype) if name in operation.tiles and _is_castable(x) else x
        for name, x in zip(operation.arrays, given, strict=True)
    )


def _is_castable(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype is not torch.float64


def _refuse_tangents(function: str, arrays: tuple[Any, ...]) -> None:
    for array in arrays:
        if isinstance(array, torch.Tensor) and torch.autograd.forward_ad.unpack_dual(array).tangent is not None:
            _refuse_tangent(function)


def _refuse_tangent(function: str) -> NoReturn:
    raise UnsupportedError(
        f"{function}: a torch tensor carries a tangent of forward-mode differentiation, which cufa does not propagate; "
        "pass the primal, as torch.autograd.forward_ad.unpack_dual gives it."
    )


def _picked(names: tuple[str, ...], known: tuple[str, ...]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """From what `known` stand for, and None behind it: what `names` stand for, which is None for all others."""
    places = [known.index(name) if name in known else len(known) for name in names]
    if len(places) < 2:  # of which an itemgetter makes no tuple
        return lambda given: tuple(given[place] for place in places)
    return operator.itemgetter(*places)


def _bounded(side: Any) -> Any:
    """A side of a window as an integer of 64 bits; all that are this wide are the same."""
    return None if side is None else min(side, MAX_SEQLEN)


def _selected(array: Any, dim: int | None, index: int) -> Any:
    return array if dim is None else array.select(dim, index)


for _each in (ATTENTION, ATTENTION_VARLEN, MERGE_STATES, ROTARY):  # which exported programs ask for by name
    operator_of(_each)
