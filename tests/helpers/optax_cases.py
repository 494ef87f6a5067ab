"""Every function of optax that returns a transformation, and what the tests call it with."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

__all__ = ["EXCEPTIONS", "EXTRA", "PARAMS", "X", "is_alias", "loss", "made", "transformations"]

X = jnp.array([[0.5, -1.0, 2.0], [1.5, 0.3, -0.7]])
PARAMS = {"base": {"w": jnp.array([[0.4, -0.2], [1.1, 0.5], [-0.9, 0.3]])}, "b": jnp.array([0.1, -0.3])}
MASK = {"base": {"w": True}, "b": False}
LABELS = {"base": {"w": "fast"}, "b": "slow"}


def loss(params: Any, x: Any = X) -> Any:
    return jnp.mean((jnp.tanh(x @ params["base"]["w"] + params["b"]) - 0.7) ** 2)


def norm(tree: Any) -> Any:
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))


# Of those whose arguments are not just a learning rate: how the tests call them.
_MADE: dict[str, Callable[[Any], Any]] = {
    "adaptive_grad_clip": lambda make: make(0.01),
    "add_noise": lambda make: make(0.1, 0.5, jax.random.key(3)),
    "apply_if_finite": lambda make: make(optax.adam(0.05), 3),
    "chain": lambda make: make(optax.clip(0.1), optax.add_decayed_weights(0.1), optax.adam(0.05)),
    "clip": lambda make: make(0.01),
    "clip_by_block_rms": lambda make: make(0.01),
    "clip_by_global_norm": lambda make: make(0.01),
    "conditionally_mask": lambda make: make(optax.adam(0.05), lambda step: step % 2 == 0),
    "conditionally_transform": lambda make: make(optax.adam(0.05), lambda step: step % 2 == 0),
    "ema": lambda make: make(0.9),
    "flatten": lambda make: make(optax.adam(0.05)),
    "freeze": lambda make: make(MASK),
    "inject_hyperparams": lambda make: make(optax.adamw)(optax.linear_schedule(0.1, 0.01, 2), weight_decay=0.1),
    "inject_stateful_hyperparams": lambda make: make(optax.adamw)(0.05, weight_decay=0.1),
    "masked": lambda make: make(optax.adam(0.05), MASK),
    "multi_transform": lambda make: make({"fast": optax.adam(0.1), "slow": optax.sgd(0.01)}, LABELS),
    "named_chain": lambda make: make(("first", optax.clip(0.1)), ("second", optax.adam(0.05))),
    "noisy_sgd": lambda make: make(0.05, key=jax.random.key(3)) if "key" in _arguments(make) else make(0.05),
    "partition": lambda make: make({"fast": optax.adam(0.1), "slow": optax.sgd(0.01)}, LABELS),
    "scale": lambda make: make(-0.05),
    "scale_by_backtracking_linesearch": lambda make: optax.chain(optax.sgd(0.5), make(10)),
    "scale_by_schedule": lambda make: make(optax.linear_schedule(-0.1, -0.01, 2)),
    "scale_by_zoom_linesearch": lambda make: optax.chain(optax.sgd(0.5), make(10)),
    "selective_transform": lambda make: make(optax.adam(0.05), freeze_mask=MASK),
    "snapshot": lambda make: make("norm", norm),
    "stateless": lambda make: make(lambda updates, params: jax.tree.map(lambda u: -0.05 * u, updates)),
    "stateless_with_tree_map": lambda make: make(lambda u, p: -0.05 * u),
    "trace": lambda make: make(0.9),
    "with_extra_args_support": lambda make: make(optax.adam(0.05)),
    "mechanize": lambda make: make(optax.adam(0.05)),
    "sam": lambda make: make(
        optax.sgd(0.05), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)), opaque_mode=True
    ),
    "scale_by_trust_ratio": lambda make: optax.chain(make(), optax.scale(-0.05)),  # uphill, rounding grows
    "schedule_free": lambda make: make(optax.sgd(0.05), 0.05),
    "sophia": lambda make: make(0.05),
    "split_real_and_imaginary": lambda make: make(optax.adam(0.05)),
}
# Why a test of all is not one of these.
EXCEPTIONS = {
    "lookahead": "its parameters are a pair of trees, and it updates both; see test_lookahead_is_refused",
    "differentially_private_aggregate": "its gradients have one more axis than the parameters, for examples",
    "dpsgd": "likewise",
    "scale_by_muon": "muon gives it matrices only",
    "measure_with_ema": "what it returns is a measurement, not an update",
}
# Extra arguments that a loss function alone does not give.
EXTRA: Mapping[str, Mapping[str, Any]] = {
    "sam": {"grad_fn": lambda params, _: jax.grad(loss)(params)},
    "sophia": {"obj_fn": loss},
}


def _arguments(function: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def transformations() -> dict[str, Any]:
    """By name, the functions of this version of optax that return a transformation."""
    return {
        name: value
        for module in (optax, optax.contrib)
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and not name.startswith("_")
        and "GradientTransformation" in str(inspect.signature(value).return_annotation)
    }


def is_alias(name: str) -> bool:
    """Whether it is an optimizer that users name, not a part of one."""
    return not name.startswith("scale_by_")


@functools.cache
def made(name: str) -> Any:
    """The transformation that the tests make of a function."""
    make = transformations()[name]
    if name in _MADE:
        return _MADE[name](make)
    required = [key for key, value in _arguments(make).items() if value.default is inspect.Parameter.empty]
    assert required in ([], ["learning_rate"]), f"optax has a new function {name} with {required}: say how to call it"
    return make(*[0.05] * len(required))
