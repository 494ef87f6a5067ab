"""Small rules that ask for what the algorithms of the package do not, and the same arithmetic in NumPy."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

import optimjax as optim
from optimjax.rule import Flag, LearningRate, Rule

__all__ = [
    "EXAMPLES",
    "STEPS",
    "Alike",
    "Count",
    "CountSlots",
    "Example",
    "Factors",
    "Kernel",
    "Norm",
    "NormSlots",
    "Scalars",
    "Small",
    "Together",
    "assert_is",
    "by_parameter",
    "count_init",
    "count_update",
    "examples",
    "norm_init",
    "norm_update",
    "scalars",
]

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
