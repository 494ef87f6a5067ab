"""A rule may be over lists of parameters, for sparse gradients, and with slots of every kind; others are refused."""

from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from small_rules import (
    Alike,
    Count,
    CountSlots,
    Factors,
    Norm,
    NormSlots,
    Scalars,
    Small,
    Together,
    count_init,
    count_update,
    norm_init,
    norm_update,
    scalars,
)

import optimjax as optim
from optimjax import functional as F
from optimjax._core.contract import Slot, kinds_of_slots
from optimjax.rule import Rule

# --- Lists ----------------------------------------------------------------------------------------------------------


def test_lists_of_several_dtypes_are_widened_each_by_its_own(x64: None) -> None:
    """float64 alongside bfloat16: the rule asserts what it gets."""
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
