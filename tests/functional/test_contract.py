"""The contract of a rule: small rules that ask for what the algorithms of the package do not, in both faces.

Each is checked against the same arithmetic in NumPy: eagerly, compiled, in a loop, and through the class, saved, loaded
and crossed.
"""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from jax import Array

import optimjax as optim
from optimjax import functional as F
from optimjax._core.contract import Slot, kinds_of_slots
from optimjax.rule import Flag, LearningRate, Rule

STEPS = 3


class Scalars(NamedTuple):
    lr: Any


def scalars(step: Any, hyper: Any) -> Scalars:
    return Scalars(hyper.lr)


class Small(optim.Optimizer):
    """What the rules below have in common."""

    def __init__(self, params: Any, lr: LearningRate = 0.5, maximize: Flag = False):
        super().__init__(params, dict(lr=lr, maximize=maximize))


# --- Rules ----------------------------------------------------------------------------------------------------------


class CountSlots(NamedTuple):
    count: Array  # int32 scalar: updates of this parameter
    codes: Array  # int8, of its shape: the sign of the gradient, times the count


def count_init(param: Array, hyper: Any, flags: Any) -> CountSlots:
    return CountSlots(jnp.zeros((), jnp.int32), jnp.zeros(param.shape, jnp.int8))


def count_update(param: Array, grad: Array, slots: CountSlots, scalars: Scalars, flags: Any) -> Any:
    assert (slots.count.dtype, slots.codes.dtype) == (jnp.int32, jnp.int8)
    count = slots.count + 1
    codes = jnp.sign(grad).astype(jnp.int8) * count.astype(jnp.int8)
    return param - scalars.lr * grad / count.astype(grad.dtype), CountSlots(count, codes)


class Count(Small):
    """Integer slots, which are counts and codes, not numbers to compute with in float32."""

    rule = Rule(CountSlots, count_init, scalars, count_update)


class FactorSlots(NamedTuple):
    factors: tuple[Array, ...]  # for each axis the sums of the squared gradients along all others


def factors_init(param: Array, hyper: Any, flags: Any) -> FactorSlots:
    return FactorSlots(tuple(jnp.zeros(size, param.dtype) for size in param.shape))


def factors_update(param: Array, grad: Array, slots: FactorSlots, scalars: Scalars, flags: Any) -> Any:
    axes = range(grad.ndim)
    sums = tuple(
        factor + jnp.sum(grad * grad, [other for other in axes if other != axis])
        for axis, factor in zip(axes, slots.factors, strict=True)
    )
    scale = sum((jnp.sum(factor) for factor in sums), jnp.ones((), grad.dtype))
    return param - scalars.lr * grad / scale, FactorSlots(sums)


class Factors(Small):
    """A slot that is a tuple of arrays, of a length that depends on the parameter, as SOAP and Shampoo have them."""

    rule = Rule(FactorSlots, factors_init, scalars, factors_update, takes="array")


class KernelSlots(NamedTuple):
    total: Array | None  # sum of the gradients; only kernels of convolutions, with four axes, have it
    vector: Array | None  # sum of the gradients of arrays of one axis


def kernel_init(param: Array, hyper: Any, flags: Any) -> KernelSlots:
    zeros = jnp.zeros_like(param)
    return KernelSlots(zeros if param.ndim == 4 else None, zeros if param.ndim == 1 else None)


def kernel_update(param: Array, grad: Array, slots: KernelSlots, scalars: Scalars, flags: Any) -> Any:
    new = KernelSlots(*(None if slot is None else slot + grad for slot in slots))
    direction = next((slot for slot in new if slot is not None), grad)
    return param - scalars.lr * direction, new


class Kernel(Small):
    """Slots that only parameters of some shapes have."""

    rule = Rule(KernelSlots, kernel_init, scalars, kernel_update)


class NormSlots(NamedTuple):
    norm: Array  # of the last gradient; scalar in the dtype of the parameter


def norm_init(param: Array, hyper: Any, flags: Any) -> NormSlots:
    return NormSlots(jnp.zeros((), param.dtype))


def norm_update(param: Array, grad: Array, slots: NormSlots, scalars: Scalars, flags: Any) -> Any:
    norm = jnp.sqrt(jnp.sum(grad * grad))
    return param - scalars.lr * grad / (1 + norm), NormSlots(norm)


class Norm(Small):
    """A norm of the whole array, as LAMB and LARS have it."""

    rule = Rule(NormSlots, norm_init, scalars, norm_update, takes="array")


def alike_update(params: Any, grads: Any, slots: Any, scalars: Any, flags: Any) -> Any:
    assert len({(param.shape, param.dtype) for param in params}) == 1
    assert params[0].dtype == jnp.float32
    mean = jnp.mean(jnp.stack(grads), axis=0)
    new = [param - scalar.lr * mean for param, scalar in zip(params, scalars, strict=True)]
    return new, [NormSlots(jnp.sqrt(jnp.sum(grad * grad))) for grad in grads]


class Alike(Small):
    """Lists of parameters of one shape and dtype; here each moves by the mean of their gradients."""

    rule = Rule(NormSlots, norm_init, scalars, alike_update, takes="alike")


def together_update(params: Any, grads: Any, slots: Any, scalars: Any, flags: Any) -> Any:
    for param, grad, slot, flag in zip(params, grads, slots, flags, strict=True):
        wide = jnp.float64 if flag.param_dtype == jnp.float64 else jnp.float32
        assert {param.dtype, grad.dtype, slot.norm.dtype} == {jnp.dtype(wide)}
    norm = jnp.sqrt(sum(jnp.sum(grad * grad).astype(jnp.float32) for grad in grads))
    new = [
        param - scalar.lr * grad / (1 + norm).astype(grad.dtype)
        for param, grad, scalar in zip(params, grads, scalars, strict=True)
    ]
    return new, [NormSlots(norm.astype(param.dtype)) for param in params]


class Together(Small):
    """The norm of all gradients together, as Prodigy and D-Adaptation have it; parameters of several dtypes."""

    rule = Rule(NormSlots, norm_init, scalars, together_update, takes="all")


# --- The same arithmetic in NumPy -----------------------------------------------------------------------------------


def by_numpy(optimizer: type[optim.Optimizer], params: list[Any], grads: list[list[Any]], lr: float) -> Any:
    """Parameters, and for each the slots by name, after a step with each list of gradients."""
    params, states = list(params), [{} for _ in params]
    for number, step in enumerate(grads, start=1):
        whole = np.sqrt(sum(np.sum(np.square(g, dtype=float)) for g in step))
        alike = [np.mean([h for h in step if (h.shape, h.dtype) == (g.shape, g.dtype)], axis=0) for g in step]
        for index, grad in enumerate(step):
            direction, state = grad, states[index]
            if optimizer is Count:
                direction = grad / number
                state |= {"count": number, "codes": np.sign(grad) * number}
            elif optimizer is Factors:
                for axis in range(grad.ndim):
                    others = tuple(other for other in range(grad.ndim) if other != axis)
                    state[axis] = state.get(axis, 0) + np.sum(grad * grad, others)
                direction = grad / (1 + sum(np.sum(state[axis]) for axis in range(grad.ndim)))
            elif optimizer is Kernel and grad.ndim in (1, 4):
                name = "total" if grad.ndim == 4 else "vector"
                direction = state[name] = state.get(name, 0) + grad
            elif optimizer is Norm:
                state["norm"] = np.linalg.norm(grad)
                direction = grad / (1 + state["norm"])
            elif optimizer is Alike:
                direction, state["norm"] = alike[index], np.linalg.norm(grad)
            elif optimizer is Together:
                direction, state["norm"] = grad / (1 + whole), whole
            params[index] = params[index] - lr * np.asarray(direction)
    if optimizer is Factors:
        states = [{"factors": tuple(s[axis] for axis in range(p.ndim))} for s, p in zip(states, params, strict=True)]
    return params, states


@dataclass(frozen=True)
class Example:
    """A rule with parameters that it takes: shapes and dtypes by name."""

    optimizer: type[optim.Optimizer]
    shapes: dict[str, tuple[tuple[int, ...], str]]

    def __str__(self) -> str:
        return self.optimizer.__name__

    def arrays(self, seed: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        return {
            name: jnp.asarray(rng.standard_normal(shape)).astype(dtype) for name, (shape, dtype) in self.shapes.items()
        }

    def expected(self, steps: int, maximize: bool = False) -> Any:
        wide = lambda tree: [np.asarray(leaf, np.float32) for leaf in tree.values()]  # noqa: E731
        grads = [[-g if maximize else g for g in wide(self.arrays(step + 1))] for step in range(steps)]
        params, states = by_numpy(self.optimizer, wide(self.arrays(0)), grads, 0.5)
        names = list(self.shapes)
        return dict(zip(names, params, strict=True)), dict(zip(names, states, strict=True))


SHAPES = {"a": ((2, 3), "float32"), "b": ((4,), "float32"), "c": ((2, 3), "float32"), "d": ((), "float32")}
EXAMPLES = [
    Example(Count, SHAPES),
    Example(Factors, {"a": ((2, 3), "float32"), "b": ((2, 1, 3, 2), "float32"), "c": ((2,), "float32")}),
    Example(Kernel, {"conv": ((1, 2, 3, 2), "float32"), "dense": ((2, 3), "float32"), "bias": ((3,), "float32")}),
    Example(Kernel, {"conv": ((1, 2, 3, 2), "float32"), "dense": ((2, 3), "float32")}),
    Example(Norm, SHAPES),
    Example(Alike, SHAPES),
    Example(Together, {"a": ((2, 3), "bfloat16"), "b": ((4,), "float32"), "c": ((2, 3), "float16")}),
]
examples = pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: f"{e}-{'-'.join(e.shapes)}")


def assert_is(example: Example, params: Any, state: Any, steps: int = STEPS, maximize: bool = False) -> None:
    """``state``: for each parameter its slots by name."""
    expected, expected_state = example.expected(steps, maximize)
    for name, (_, dtype) in example.shapes.items():
        close = dict(rtol=1e-5, atol=1e-6) if dtype == "float32" else dict(rtol=2e-2, atol=2e-2)
        assert params[name].dtype == dtype
        np.testing.assert_allclose(np.asarray(params[name], float), expected[name], **close)
        present = {key: slot for key, slot in state[name].items() if slot is not None and key != "step"}
        assert present.keys() == expected_state[name].keys()
        for key, slot in present.items():
            assert jax.tree.structure(slot) == jax.tree.structure(expected_state[name][key])
            for ours, theirs in zip(jax.tree.leaves(slot), jax.tree.leaves(expected_state[name][key]), strict=True):
                np.testing.assert_allclose(np.asarray(ours, float), theirs, **close, err_msg=key)


def by_parameter(example: Example, state: Any) -> Any:
    """The slots of a functional state, by parameter."""
    assert int(state.step) == STEPS
    return {name: {field: getattr(state, field)[name] for field in state._fields[1:]} for name in example.shapes}


# --- The functional face --------------------------------------------------------------------------------------------


def eagerly(example: Example, algorithm: F.Algorithm) -> Any:
    params = example.arrays(0)
    state = algorithm.init(params)
    for step in range(STEPS):
        params, state = algorithm.update(params, example.arrays(step + 1), state)
    return params, state


def compiled(example: Example, algorithm: F.Algorithm) -> Any:
    params = example.arrays(0)
    state, update = jax.jit(algorithm.init)(params), jax.jit(algorithm.update, donate_argnums=(0, 2))
    for step in range(STEPS):
        params, state = update(params, example.arrays(step + 1), state)
    return params, state


def in_a_loop(example: Example, algorithm: F.Algorithm) -> Any:
    params = example.arrays(0)
    grads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(example.arrays(step + 1) for step in range(STEPS)))
    step = lambda carry, g: (algorithm.update(carry[0], g, carry[1]), None)  # noqa: E731
    return jax.lax.scan(step, (params, algorithm.init(params)), grads)[0]


def mapped(example: Example, algorithm: F.Algorithm) -> Any:
    """Two runs side by side, of which the second is returned."""
    twice = lambda tree: jax.tree.map(lambda x: jnp.stack([jnp.zeros_like(x), x]), tree)  # noqa: E731
    params = twice(example.arrays(0))
    state = jax.vmap(algorithm.init)(params)
    for step in range(STEPS):
        params, state = jax.vmap(algorithm.update)(params, twice(example.arrays(step + 1)), state)
    return jax.tree.map(lambda x: x[1], (params, state))


@pytest.mark.parametrize("run", [eagerly, compiled, in_a_loop, mapped], ids=lambda run: run.__name__)
@examples
def test_functional(example: Example, run: Callable[..., Any]) -> None:
    params, state = run(example, F.factory(example.optimizer)())
    assert_is(example, params, by_parameter(example, state))


@examples
def test_maximize(example: Example) -> None:
    params, state = eagerly(example, F.factory(example.optimizer)(maximize=True))
    assert_is(example, params, by_parameter(example, state), maximize=True)


@examples
def test_dtypes_of_slots_are_kept(example: Example) -> None:
    algorithm = F.factory(example.optimizer)()
    params = example.arrays(0)
    state = algorithm.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(algorithm.update(params, params, state), (params, state))


def test_the_fields_are_those_that_some_parameter_has() -> None:
    algorithm = F.factory(Kernel)()
    conv, dense, bias = jnp.ones((1, 1, 2, 2)), jnp.ones((2, 2)), jnp.ones(2)
    for params, fields in (
        ([conv, dense, bias], ("total", "vector")),
        ([dense, conv], ("total",)),
        ([bias], ("vector",)),
        ([dense], ()),
        ([], ()),
    ):
        state = algorithm.init(params)
        assert state._fields == ("step", *fields)
        new, after = algorithm.update(params, params, state)
        assert type(after) is type(state)
        chex.assert_trees_all_equal_shapes_and_dtypes((new, after), (params, state))
    state = algorithm.init([conv, bias])
    assert state.total[1] is None
    assert state.vector[0] is None


def test_a_state_of_parameters_of_other_shapes_is_refused() -> None:
    algorithm = F.factory(Kernel)()
    with pytest.raises(TypeError, match=r"state must be the KernelState\('step', 'vector'\).*KernelState\('step', 'to"):
        algorithm.update([jnp.ones(2)], [jnp.ones(2)], algorithm.init([jnp.ones((1, 1, 2, 2))]))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copy", "pickle"])
@examples
def test_state_is_data(example: Example, duplicate: Callable[[Any], Any]) -> None:
    algorithm = F.factory(example.optimizer)()
    params, state = eagerly(example, algorithm)
    again = duplicate(state)
    assert type(again) is type(state)
    chex.assert_trees_all_equal(algorithm.update(params, params, again), algorithm.update(params, params, state))


def test_a_missing_gradient_leaves_every_kind_of_slot_alone() -> None:
    for example in EXAMPLES:
        algorithm = F.factory(example.optimizer)()
        params, state = eagerly(example, algorithm)
        first, *others = example.shapes
        grads = {**example.arrays(9), first: None}
        new, after = algorithm.update(params, grads, state)
        for field in state._fields[1:]:
            chex.assert_trees_all_equal(getattr(after, field)[first], getattr(state, field)[first])
        np.testing.assert_array_equal(new[first], params[first])
        assert not np.array_equal(new[others[0]], params[others[0]])


# --- Lists ----------------------------------------------------------------------------------------------------------


def test_lists_of_several_dtypes_are_widened_each_by_its_own(x64: None) -> None:
    """float64 beside bfloat16: the rule asserts what it gets."""
    params = {"half": jnp.ones(2, jnp.bfloat16), "double": jnp.full(2, 1 + 1e-12, jnp.float64)}
    algorithm = F.factory(Together)(lr=0.0)
    for order in (("half", "double"), ("double", "half")):
        given = [params[name] for name in order]
        new, state = algorithm.update(given, given, algorithm.init(given))
        chex.assert_trees_all_equal(new, given)
        assert [norm.dtype for norm in state.norm] == [param.dtype for param in given]


def test_flags_of_a_rule_over_all_are_those_of_each() -> None:
    """`maximize` in one group only."""
    from optimjax._core.apply import apply_each

    params = [jnp.ones(2), jnp.ones(2)]
    flags = [Together.definition.hyperparameters.flags({"lr": 1.0, "maximize": maximize}) for maximize in (False, True)]
    slots = [NormSlots(jnp.zeros(())) for _ in params]
    (one, _), (other, _) = apply_each(Together.rule, flags, params, params, slots, [Scalars(1.0)] * 2)
    np.testing.assert_allclose(np.stack([one, other]), [[1 - 1 / 3] * 2, [1 + 1 / 3] * 2], rtol=1e-6)


def test_each_set_of_alike_parameters_is_one_call() -> None:
    calls = []

    def update(params: Any, grads: Any, slots: Any, scalars: Any, flags: Any) -> Any:
        calls.append([param.shape for param in params])
        return params, slots

    class Watched(Small):
        rule = Rule(NormSlots, norm_init, scalars, update, takes="alike")

    algorithm = F.factory(Watched)()
    params = [jnp.ones(2), jnp.ones(3), jnp.ones(2)]
    algorithm.update(params, params, algorithm.init(params))
    assert calls == [[(2,), (2,)], [(3,)]]


# --- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [Factors, Norm, Alike, Together])
def test_complex_parameters_need_an_elementwise_rule(optimizer: type[optim.Optimizer]) -> None:
    params = {"real": jnp.ones(2), "layer": {"w": jnp.ones(2, jnp.complex64)}}
    with pytest.raises(RuntimeError, match=rf"^{optimizer.__name__} does not support complex parameters.*'layer\.w'"):
        F.factory(optimizer)().init(params)
    with pytest.raises(RuntimeError, match=r"does not support complex parameters \('layer\.w'\)$"):
        optimizer(params)


def test_a_complex_parameter_of_an_elementwise_rule_is_two_halves() -> None:
    params = {"w": jnp.array([1 + 2j, -3j])}
    algorithm = F.factory(Count)(lr=1.0)
    new, state = algorithm.update(params, params, algorithm.init(params))
    np.testing.assert_allclose(new["w"], params["w"] - np.conj(params["w"]))
    assert state.count["w"].dtype == jnp.int32
    assert int(state.count["w"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"takes": "matrix"}, r"takes must be one of 'element', 'array', 'alike', 'all', got 'matrix'"),
        ({"takes": "array", "sparse": True}, r"sparse gradients.*takes='element'.*got 'array'"),
        ({"takes": "all", "sparse": True}, r"sparse gradients.*takes='element'.*got 'all'"),
    ],
    ids=str,
)
def test_rules_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule(NormSlots, norm_init, scalars, norm_update, **options)


def test_a_rule_that_changes_a_shape() -> None:
    class Broadcasting(Small):
        rule = Rule(
            NormSlots,
            norm_init,
            scalars,
            lambda param, grad, slots, scalars, flags: (param - scalars.lr * grad, NormSlots(grad)),
        )

    algorithm = F.factory(Broadcasting)()
    with pytest.raises(ValueError, match=r"update.*shape \(2,\).*shape \(\)"):
        algorithm.update(jnp.ones(2), jnp.ones(2), algorithm.init(jnp.ones(2)))


# --- Sparse gradients -----------------------------------------------------------------------------------------------


def test_a_sparse_rule_with_a_count() -> None:
    """Of slots with the shape of the parameter `update` gets the named entries, others as they are."""
    from jax.experimental.sparse import BCOO

    class Rows(Small):
        rule = Rule(CountSlots, count_init, scalars, count_update, sparse=True)

    algorithm = F.factory(Rows)(lr=1.0)
    params = jnp.zeros((3, 2))
    grad = BCOO((jnp.full((1, 2), 4.0), jnp.array([[1]])), shape=(3, 2))
    state = algorithm.init(params)
    for _ in range(2):
        params, state = algorithm.update(params, grad, state)
    np.testing.assert_allclose(params, [[0, 0], [-6, -6], [0, 0]])
    np.testing.assert_array_equal(state.codes, [[0, 0], [2, 2], [0, 0]])
    assert (int(state.count), state.codes.dtype) == (2, jnp.int8)


# --- The class ------------------------------------------------------------------------------------------------------


def of(example: Example, optimizer: optim.Optimizer) -> Any:
    """Parameters and slots of an optimizer, by name."""
    boxes = dict(zip(sorted(example.shapes), optimizer.param_groups[0]["params"], strict=True))
    return (
        {name: box.value for name, box in boxes.items()},
        {name: dict(optimizer.state[box]) for name, box in boxes.items()},
    )


def stepped(example: Example, optimizer: optim.Optimizer, first: int = 0, last: int = STEPS) -> optim.Optimizer:
    for step in range(first, last):
        optimizer.step(example.arrays(step + 1))
    return optimizer


@examples
def test_class(example: Example) -> None:
    optimizer = stepped(example, example.optimizer(example.arrays(0)))
    assert_is(example, *of(example, optimizer))


def test_all_parameters_of_the_class_are_together() -> None:
    """However many there are."""
    params = {str(index): jnp.ones((1 + index % 2,)) for index in range(130)}
    optimizer = Together(params, lr=1.0)
    optimizer.step(params)
    norm = np.sqrt(sum(p.size for p in params.values()))
    for value in optimizer.params.values():
        np.testing.assert_allclose(value, 1 - 1 / (1 + norm), rtol=1e-5)


@examples
def test_saved_and_loaded(example: Example) -> None:
    saved = stepped(example, example.optimizer(example.arrays(0)), last=1)
    other = example.optimizer(saved.params)
    other.load_state_dict(pickle.loads(pickle.dumps(saved.state_dict())))
    loaded, kept = (jax.tree.map(jnp.asarray, of(example, each)[1]) for each in (other, saved))
    chex.assert_trees_all_equal(loaded, kept)
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded, kept)
    assert_is(example, *of(example, stepped(example, other, first=1)))


@examples
def test_crossed(example: Example) -> None:
    """Into the functional form after one step, and back after the next."""
    optimizer = stepped(example, example.optimizer(example.arrays(0)), last=1)
    params, state = optimizer.functional_state()
    params, state = optimizer.algorithm.update(params, example.arrays(2), state)
    optimizer.load_functional_state(params, state)
    assert_is(example, *of(example, stepped(example, optimizer, first=2)))


# --- Kinds of slots -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if not case.sparse], ids=str)
def test_the_kinds_of_slots_are_true(case: Case) -> None:
    """Of the parameter's shape and dtype, unless fixed; never negative where the kind says so."""
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.bfloat16)}
    for options in case.variants():
        algorithm = case.factory(**options)
        kinds = kinds_of_slots(algorithm.definition.arithmetic.slots)
        state, new = algorithm.init(params), params
        for seed in range(3):
            grads = {"w": jnp.asarray(np.random.default_rng(seed).normal(size=(3, 4)), jnp.bfloat16)}
            new, state = algorithm.update(new, grads, state)
        for name in state._fields[1:]:
            slot = getattr(state, name)["w"]
            own = (slot.shape, slot.dtype) != (params["w"].shape, params["w"].dtype)
            assert kinds[name].fixed == own, name
            assert kinds[name].signed or np.all(np.asarray(slot, float) >= 0), name


def test_a_slot_without_a_kind_is_fixed() -> None:
    assert set(kinds_of_slots(NormSlots).values()) == {Slot(fixed=True)}
    assert kinds_of_slots(dict) == {}
