"""``F.partition``: several algorithms as one, each for the parameters of its label."""

import pickle
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case

from optimjax import functional as F

PARAMS = {"layers": [{"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.1, 0.2])}], "head": jnp.ones((2, 2))}
LABELS = {"layers": [{"w": "muon", "b": "adamw"}], "head": "adamw"}


def both(labels: Any = LABELS, **options: Any) -> Any:
    return F.partition({"muon": F.muon(lr=0.02, **options), "adamw": F.adamw(lr=3e-3)}, labels)


def by_name(name: str, value: Any) -> str:
    return "muon" if name.endswith("w") else "adamw"


def loss(params: Any) -> Any:
    return sum(jnp.sum((leaf - 0.3) ** 4) for leaf in jax.tree.leaves(params))


def only(tree: Any, *names: str) -> Any:
    """The leaves with these names; None in place of the others."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if jax.tree_util.keystr(path, simple=True, separator=".") in names else None, tree
    )


@pytest.mark.parametrize("labels", [LABELS, by_name], ids=["tree", "function"])
def test_the_same_as_apart(labels: Any) -> None:
    parts = {"muon": (F.muon(lr=0.02), ["layers.0.w"]), "adamw": (F.adamw(lr=3e-3), ["layers.0.b", "head"])}
    apart = {label: only(PARAMS, *names) for label, (_, names) in parts.items()}
    states = {label: parts[label][0].init(params) for label, params in apart.items()}
    params, state = PARAMS, both(labels).init(PARAMS)
    for _ in range(3):
        grads = jax.grad(loss)(params)
        params, state = both(labels).update(params, grads, state)
        for label, (algorithm, names) in parts.items():
            apart[label], states[label] = algorithm.update(apart[label], only(grads, *names), states[label])
    merged = jax.tree.map(
        lambda a, b: b if a is None else a, apart["muon"], apart["adamw"], is_leaf=lambda leaf: leaf is None
    )
    chex.assert_trees_all_equal(params, merged)
    chex.assert_trees_all_equal((state.muon, state.adamw), (states["muon"], states["adamw"]))
    assert state.step == 3


@pytest.mark.parametrize("case", [case for case in CASES if not case.sparse], ids=str)
def test_every_algorithm_can_be_a_part(case: Case) -> None:
    params = {"mine": case.fit(jnp.array([1.0, -2.0, 0.5])), "other": jnp.ones(3)}
    algorithm = case.factory(**case.variants()[1])
    two = F.partition({"a": algorithm, "b": F.sgd(lr=0.1)}, {"mine": "a", "other": "b"})
    new, state = two.update(params, params, two.init(params))
    alone, own = algorithm.update(
        {"mine": params["mine"]}, {"mine": params["mine"]}, algorithm.init({"mine": params["mine"]})
    )
    chex.assert_trees_all_equal(new["mine"], alone["mine"])
    chex.assert_trees_all_equal(jax.tree.leaves(state.a), jax.tree.leaves(own))


def test_a_prefix_labels_whole_subtrees() -> None:
    matrices = {"a": {"x": jnp.eye(2), "y": jnp.eye(2)}, "b": jnp.ones(2)}
    state = both({"a": "muon", "b": "adamw"}).init(matrices)
    assert len(jax.tree.leaves(state.muon.momentum_buffer)) == 2


def test_in_jit_scan_and_vmap() -> None:
    algorithm = both()

    def train(params: Any) -> Any:
        def one(carry: Any, _: Any) -> Any:
            params, state = carry
            return algorithm.update(params, jax.grad(loss)(params), state), None

        return jax.lax.scan(one, (params, algorithm.init(params)), length=3)[0]

    expected = train(PARAMS)
    chex.assert_trees_all_close(jax.jit(train)(PARAMS), expected, rtol=1e-5)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), PARAMS)
    first = jax.tree.map(lambda leaf: leaf[0], jax.vmap(train)(stacked))
    chex.assert_trees_all_close(first, expected, rtol=1e-2)  # products in bfloat16


def test_a_state_may_be_donated() -> None:
    algorithm = both()
    update = jax.jit(algorithm.update, donate_argnums=(0, 2))
    params, state = jax.tree.map(jnp.copy, PARAMS), algorithm.init(PARAMS)
    for _ in range(2):
        params, state = update(params, PARAMS, state)


def test_missing_gradients() -> None:
    grads = {"layers": [{"w": None, "b": jnp.ones(2)}], "head": None}
    params, _ = both().update(PARAMS, grads, both().init(PARAMS))
    chex.assert_trees_all_equal((params["layers"][0]["w"], params["head"]), (PARAMS["layers"][0]["w"], PARAMS["head"]))
    assert jnp.all(params["layers"][0]["b"] != PARAMS["layers"][0]["b"])


def test_derivatives_by_a_hyperparameter() -> None:
    def after(lr: Any) -> Any:
        algorithm = F.partition({"sgd": F.sgd(lr=lr), "adamw": F.adamw(lr=0.1)}, {"layers": "sgd", "head": "adamw"})
        params, _ = algorithm.update(PARAMS, PARAMS, algorithm.init(PARAMS))
        return params["layers"][0]["b"].sum()

    np.testing.assert_allclose(jax.grad(after)(0.1), -0.3, rtol=1e-5)


def test_overrides_by_label() -> None:
    algorithm = F.partition({"a": F.sgd(lr=0.1), "b": F.sgd(lr=0.1)}, {"layers": "a", "head": "b"})
    params, _ = algorithm.update(PARAMS, PARAMS, algorithm.init(PARAMS), b={"lr": 0.5})
    chex.assert_trees_all_close(params["head"], 0.5 * PARAMS["head"])
    chex.assert_trees_all_close(params["layers"], jax.tree.map(lambda leaf: 0.9 * leaf, PARAMS["layers"]))
    for bad in ({"lr": 0.5}, {"c": {"lr": 0.5}}, {"b": {"rate": 0.5}}):
        with pytest.raises(TypeError, match=r"update\(\) got"):
            algorithm.update(PARAMS, PARAMS, algorithm.init(PARAMS), **bad)


def test_as_a_value() -> None:
    assert both() == both()
    assert hash(both()) == hash(both())
    assert both() != both(nesterov=False)
    assert both(by_name) == both(by_name)
    assert repr(both("muon")) == "partition({'muon': muon(lr=0.02), 'adamw': adamw(lr=0.003)}, 'muon')"
    twin, state = pickle.loads(pickle.dumps((both(), both().init(PARAMS))))
    assert twin.definition is both().definition
    chex.assert_trees_all_equal(twin.update(PARAMS, PARAMS, state), both().update(PARAMS, PARAMS, state))


@pytest.mark.parametrize(
    ("algorithms", "labels", "error", "message"),
    [
        ({}, "a", ValueError, "at least one algorithm"),
        ({"a b": F.sgd()}, "a b", ValueError, "identifier, got 'a b'"),
        ({"step": F.sgd()}, "step", ValueError, "identifier, got 'step'"),
        ({"a": F.sgd}, "a", TypeError, "algorithm of label 'a' must be made by optim.functional"),
        ({"a": F.lbfgs()}, "a", ValueError, "LBFGS cannot be a part"),
        ({"a": F.sgd()}, "b", ValueError, r"parameter 'head' has the label 'b'; there are algorithms for 'a'"),
        ({"a": F.sgd()}, lambda name, value: None, ValueError, "parameter 'head' has the label None"),
        ({"a": F.sgd()}, {"head": "a"}, ValueError, "labels must be a tree that is a prefix"),
        ({"a": F.sgd(), "b": F.sgd()}, "a", ValueError, "no parameter has the label 'b'"),
    ],
)
def test_what_makes_no_sense(algorithms: Any, labels: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        F.partition(algorithms, labels).init(PARAMS)


def test_states_and_arguments_in_the_wrong_place() -> None:
    state = both().init(PARAMS)
    with pytest.raises(TypeError, match=r"order is update\(params, grads, state\)"):
        both().update(PARAMS, state, PARAMS)
    with pytest.raises(TypeError, match="state must be the PartitionState"):
        both().update(PARAMS, PARAMS, state.adamw)
    with pytest.raises(ValueError, match=r"Muon only supports 2D parameters.*'layers\.0\.b'"):
        both({"layers": "muon", "head": "adamw"}).init(PARAMS)
