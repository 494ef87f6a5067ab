"""The state before the first update: what the rule says, where its parameter is, made by few programs or none."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimjax as optim
from optimjax import functional as F
from optimjax._core import slots
from optimjax.rule import Fixed, LearningRate, Moment, Rule, Weights

every_case = pytest.mark.parametrize("case", [case for case in CASES if not case.matrices], ids=str)


class Kept(NamedTuple):
    first: Weights  # the parameter as it was
    count: Fixed
    mean: Moment


def init(param: Any, hyper: Any, flags: Any) -> Kept:
    return Kept(first=param, count=jnp.full((), 3, jnp.int32), mean=jnp.full_like(param, hyper.lr))


class Anchored(optim.Optimizer):
    """Keeps what no repeated number is: the parameter itself."""

    rule = Rule(Kept, init, lambda step, hyper: hyper, lambda param, grad, slots, scalars, flags: (param, slots))

    def __init__(self, params: Any, lr: LearningRate = 0.25):
        super().__init__(params, {"lr": lr})


anchored = F.factory(Anchored)


def of(dtypes: Any = (np.float32, np.float32, jnp.bfloat16)) -> dict[str, Any]:
    shapes = (), (37, 5), (129,)
    return {f"{n}": jnp.ones(shape, dtype) for n, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))}


def addresses(tree: Any) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


@every_case
def test_numbers_of_the_rule(case: Case) -> None:
    params = of() if case.complex_message else of((np.complex64, np.float32, jnp.bfloat16))
    for options in case.variants():
        algorithm = case.factory(**options)
        state = algorithm.init(params)
        hyper, flags = (
            algorithm.hyperparameters.hyper(algorithm.values),
            algorithm.hyperparameters.fixed_flags(algorithm.values),
        )
        for name, param in params.items():
            expected = case.optimizer.definition.arithmetic.init(param, hyper, flags)._asdict()
            made = {field: getattr(state, field)[name] for field in state._fields[1:]}
            chex.assert_trees_all_equal_shapes_and_dtypes(made, {field: expected[field] for field in made})
            chex.assert_trees_all_equal(made, {field: expected[field] for field in made})
            assert not any(leaf.weak_type for leaf in jax.tree.leaves(made))
        own = addresses((params, state))
        assert len(set(own)) == len(own)


@every_case
def test_no_program_on_a_host(compilations: Any, case: Case) -> None:
    params = of()
    algorithm = case.factory(**{**case.base, **case.full})
    before = compilations()
    algorithm.init(params)
    assert compilations() == before


def test_learning_rates_that_change() -> None:
    """A schedule's value is an array."""
    state = F.rprop(lr=lambda count: jnp.asarray(0.5)).init(of())
    for leaf in jax.tree.leaves(state.step_size):
        np.testing.assert_array_equal(np.asarray(leaf, np.float32), 0.5)


@pytest.mark.parametrize("on_host", [True, False])
def test_one_program_for_what_is_computed(monkeypatch: Any, compilations: Any, on_host: bool) -> None:
    monkeypatch.setattr(slots, "_is_on_host", lambda param: on_host)
    params = of()
    jax.block_until_ready(params)
    algorithm = anchored(lr=0.125 if on_host else 0.0625)  # a number that is compiled in
    before = compilations()
    state = algorithm.init(params)
    assert compilations() == before + 1
    chex.assert_trees_all_equal(state.first, params)
    assert [int(count) for count in state.count.values()] == [3, 3, 3]
    assert {float(leaf.reshape(-1)[0]) for leaf in state.mean.values()} == {algorithm.values["lr"]}
    own = addresses((params, state))
    assert len(set(own)) == len(own)


def test_a_schedule_where_a_program_makes_the_state(monkeypatch: Any) -> None:
    monkeypatch.setattr(slots, "_is_on_host", lambda param: False)
    state = anchored(lr=lambda count: jnp.asarray(0.5)).init(of())
    assert {float(leaf.reshape(-1)[0]) for leaf in state.mean.values()} == {0.5}


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("algorithm", [F.nadam(), anchored()], ids=str)
def test_where_parameters_are(monkeypatch: Any, algorithm: Any, on_host: bool) -> None:
    if not on_host:
        monkeypatch.setattr(slots, "_is_on_host", lambda param: False)
    devices = jax.devices()
    params = {
        "free": jnp.ones((4, 2)),
        "second": jax.device_put(jnp.ones((4, 2)), devices[1]),
        "third": jax.device_put(jnp.ones((2, 4)), devices[2]),
    }
    state = algorithm.init(params)
    for field in state._fields[1:]:
        for name, slot in getattr(state, field).items():
            assert (slot.devices(), slot.committed) == (params[name].devices(), params[name].committed)


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("algorithm", [F.nadam(), F.adafactor(), anchored()], ids=str)
def test_on_a_mesh(compilations: Any, algorithm: Any, axes: Any) -> None:
    mesh = jax.make_mesh((4,), ("d",), axis_types=(axes,), devices=jax.devices()[:4])
    params = {
        name: jax.device_put(np.ones(shape, np.float32), NamedSharding(mesh, P("d")))
        for name, shape in (("w", (8, 6)), ("v", (12, 10)))
    }
    before = compilations()
    state = algorithm.init(params)
    assert compilations() <= before + 1
    for field in state._fields[1:]:
        for name, slot in getattr(state, field).items():
            spec = P(*(("d",) if slot.shape and slot.shape[0] == params[name].shape[0] else ()))
            assert slot.sharding.is_equivalent_to(NamedSharding(mesh, spec), slot.ndim)


def test_while_a_function_is_traced() -> None:
    params = of()
    for algorithm in (F.adam(), anchored()):
        made = jax.jit(algorithm.init)(params)
        chex.assert_trees_all_equal(made, algorithm.init(params))
