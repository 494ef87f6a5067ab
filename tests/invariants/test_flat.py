"""On one CPU device, long arrays are updated over flat views: the same numbers, in place, by functions."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case

import optimjax as optim
from optimjax import functional as F
from optimjax._core import flat

SHAPES = {"kernel": (16, 8, 3, 3), "matrix": (24, 48), "vector": (1152,), "column": (1152, 1), "short": (5, 3)}
FUNCTION = 'inlineable = "false"'
variants = pytest.mark.parametrize(
    ("case", "options"),
    [
        pytest.param(case, options, id=f"{case}-{label}")
        for case in CASES
        for label, options in zip(("base", "full"), case.variants(), strict=True)
        if case.optimizer.definition.arithmetic.takes == "element" and not case.sparse
    ],
)


@pytest.fixture
def on_one_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Switches flat views on and off, for arrays that are short enough for a test."""

    def switch(on: bool) -> None:
        jax.clear_caches()
        monkeypatch.setattr(flat, "_is_one_cpu", lambda: on)

    monkeypatch.setattr(flat, "LONG", 1000)
    yield switch
    jax.clear_caches()


def values(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape).astype(np.float32)) for name, shape in SHAPES.items()}


def lowered(algorithm: Any, **options: Any) -> Any:
    params = values(0)
    update = jax.jit(algorithm.update, donate_argnums=(0, 2))
    return update.trace(params, values(1), algorithm.init(params)).lower(**options)


@variants
def test_the_same_numbers(on_one_cpu: Any, case: Case, options: dict[str, Any]) -> None:
    algorithm = case.factory(**options)
    results = []
    for on in (False, True):
        on_one_cpu(on)
        params, state = values(0), algorithm.init(values(0))
        optimizer = case.optimizer(values(0), **case.ours(options))
        for step in range(1, 4):
            params, state = jax.jit(algorithm.update)(params, values(step), state)
            optimizer.step(values(step))
        results.append((params, state, optimizer.params, optimizer.state_dict()["state"]))
    chex.assert_trees_all_close(*results, rtol=1e-6, atol=1e-7)


@variants
def test_no_memory_of_its_own(usual: Any, on_one_cpu: Any, case: Case, options: dict[str, Any]) -> None:
    on_one_cpu(True)
    memory = lowered(case.factory(**options)).compile(usual).memory_analysis()
    size = 4 * sum(int(np.prod(shape)) for shape in SHAPES.values())
    # What XLA needs to call a function, some hundred bytes, is little only where arrays are long.
    assert memory.temp_size_in_bytes < (1000 if case.temporary < 1 else case.temporary * size)


def test_only_long_arrays_with_several_axes_have_a_function(on_one_cpu: Any) -> None:
    on_one_cpu(True)
    assert lowered(F.adam()).as_text().count(FUNCTION) == 2
    on_one_cpu(False)
    assert FUNCTION not in lowered(F.adam()).as_text()


def test_arrays_of_equal_size_share_their_function(on_one_cpu: Any) -> None:
    on_one_cpu(True)
    assert lowered(F.adam()).as_text().count("func.func private @_function") == 1


def test_programs_for_other_devices_have_none(on_one_cpu: Any) -> None:
    on_one_cpu(True)
    for platform in ("cuda", "tpu"):
        assert FUNCTION not in lowered(F.adam(), lowering_platforms=(platform,)).as_text()


def test_several_devices_have_none() -> None:
    assert jax.device_count() > 1
    assert not flat._is_one_cpu()


def test_transformations(on_one_cpu: Any) -> None:
    algorithm = F.adam(lr=0.1, weight_decay=0.1)

    def after_two(params: Any) -> Any:
        def one(carry: Any, grads: Any) -> Any:
            return algorithm.update(carry[0], grads, carry[1]), None

        both = jax.tree.map(lambda *leaves: jnp.stack(leaves), values(1), values(2))
        return jax.lax.scan(one, (params, algorithm.init(params)), both)[0][0]

    def total(params: Any) -> Any:
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(after_two(params)))

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), values(3), values(4))
    results = []
    for on in (False, True):
        on_one_cpu(on)
        results.append((jax.jit(jax.vmap(after_two))(stacked), jax.jit(jax.grad(total))(values(3))))
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-7)
    assert FUNCTION not in jax.jit(jax.grad(total)).lower(values(3)).as_text()


def test_an_update_that_calls_back_is_not_hidden(on_one_cpu: Any) -> None:
    class Watched(optim.SGD):
        seen: ClassVar[list[int]] = []
        plain = optim.SGD.rule
        rule = dataclasses.replace(plain, update=lambda *args: (watch(args[0]), Watched.plain.update(*args))[1])

    def watch(param: Any) -> None:
        jax.debug.callback(lambda size: Watched.seen.append(int(size)), param.size)

    on_one_cpu(True)
    optimizer = Watched(values(0), lr=0.1)
    optimizer.step(values(1))
    jax.effects_barrier()
    assert sorted(Watched.seen) == sorted(int(np.prod(shape)) for shape in SHAPES.values())
    chex.assert_trees_all_close(
        optimizer.params, jax.tree.map(lambda p, g: p - 0.1 * g, values(0), values(1)), rtol=1e-5
    )


def test_without_jit(on_one_cpu: Any) -> None:
    on_one_cpu(True)
    algorithm = F.sgd(lr=0.1, momentum=0.9)
    with jax.disable_jit():
        params, _ = algorithm.update(values(0), values(1), algorithm.init(values(0)))
    chex.assert_trees_all_close(params, jax.tree.map(lambda p, g: p - 0.1 * g, values(0), values(1)), rtol=1e-5)
