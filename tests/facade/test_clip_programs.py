"""Clipping of trees can be traced and differentiated, and few programs serve all selections of gradients."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipping_cases import INF, boxes
from flax import nnx
from interrupts import interrupted_everywhere
from jax.experimental.sparse import BCOO

import optimjax as optim
from optimjax._engine import selections as clipping
from optimjax._facade import clip as clip_module

# --- The pure twins -------------------------------------------------------------------------------------------------


def test_trees_of_every_kind_keep_their_structure() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    module = eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))
    x = jnp.ones((4, 2))
    trees = [
        {"a": (jnp.ones(2), [None, jnp.ones(())])},
        jnp.ones(3),
        nnx.grad(lambda model: jnp.sum(model(x) ** 2))(model),
        eqx.filter_grad(lambda module: jnp.sum(jax.vmap(module)(x) ** 2))(module),
    ]
    for grads in trees:
        clipped, norm = optim.clip_grad_norm(grads, 0.5)
        bounded = optim.clip_grad_value(grads, 0.1)
        assert jax.tree.structure(clipped) == jax.tree.structure(bounded) == jax.tree.structure(grads)
        leaves = jax.tree.leaves(grads)
        np.testing.assert_allclose(norm, np.sqrt(sum(np.sum(np.square(leaf)) for leaf in leaves)), rtol=1e-5)
        for one, other, leaf in zip(*map(jax.tree.leaves, (clipped, bounded, grads)), strict=True):
            np.testing.assert_allclose(one, np.asarray(leaf) * np.minimum(0.5 / norm, 1), rtol=1e-5)
            np.testing.assert_array_equal(other, np.clip(leaf, np.float32(-0.1), np.float32(0.1)))


@pytest.mark.parametrize("norm_type", [2, INF])
def test_inside_jit_vmap_and_scan(norm_type: Any) -> None:
    grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([[0.5]])}
    expected, norm = optim.clip_grad_norm(grads, 1.0, norm_type)
    jitted = jax.jit(lambda grads, limit: optim.clip_grad_norm(grads, limit, norm_type))(grads, 1.0)
    batched = jax.vmap(lambda limit: optim.clip_grad_norm(grads, limit, norm_type))(jnp.array([1.0, 100.0]))
    _, scanned = jax.lax.scan(lambda c, g: (c, optim.clip_grad_norm(g, 1.0, norm_type)), 0, _stacked(grads))
    for ours, its_norm in (jitted, jax.tree.map(lambda x: x[0], batched), jax.tree.map(lambda x: x[0], scanned)):
        np.testing.assert_allclose(its_norm, norm, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, expected)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b), batched[0], grads)
    clamped = jax.jit(optim.clip_grad_value)(grads, jnp.array(1.0))
    assert [clamped["w"].tolist(), clamped["b"].tolist()] == [[1, 1], [[0.5]]]


def _stacked(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), tree)


@pytest.mark.parametrize("norm_type", [0.5, 1, 2, 3.5, INF])
@pytest.mark.parametrize("max_norm", [0.0, 1.0, INF])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_derivatives_are_finite_even_at_zero(norm_type: Any, max_norm: float, scale: float, x64: None) -> None:
    grads = {"w": scale * jnp.array([3.0, 0.0, -4.0]), "c": scale * jnp.array([1 + 1j])}

    def clipped(w: Any) -> Any:
        clipped, norm = optim.clip_grad_norm(grads | {"w": w}, max_norm, norm_type)
        return jnp.sum(clipped["w"] * jnp.array([1.0, 2.0, 3.0])) + norm

    derivative = jax.grad(clipped)(grads["w"])
    assert np.all(np.isfinite(derivative))
    np.testing.assert_allclose(jax.jacfwd(clipped)(grads["w"]), derivative, rtol=1e-12)
    if scale:  # elsewhere there is a corner
        step = 1e-6 * np.array([1.0, 0.0, 1.0])
        slope = (clipped(grads["w"] + step) - clipped(grads["w"] - step)) / 2
        np.testing.assert_allclose(np.sum(derivative * step), slope, rtol=1e-6, atol=1e-12)
    elif max_norm:  # the identity, where nothing is clipped
        np.testing.assert_allclose(
            jax.grad(lambda w: clipped(w) - _norm_of(w, grads, norm_type))(grads["w"]), [1, 2, 3]
        )


@pytest.mark.parametrize("norm_type", [0.5, 1, 2, 3.5, INF])
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_the_norm_is_flat_at_zero(norm_type: Any, dtype: str) -> None:
    for grads, flat in ([0, 0], [True, True]), ([3, 0, -4], [False, True, False]):
        slopes = jax.grad(lambda grads: optim.clip_grad_norm(grads, 1.0, norm_type)[1])(jnp.array(grads, dtype))
        expected = np.array(flat) if norm_type != INF else np.abs(grads) < max(1, *np.abs(grads))
        np.testing.assert_array_equal(slopes == 0, expected)


def _norm_of(w: Any, grads: Any, norm_type: Any) -> Any:
    return optim.clip_grad_norm(grads | {"w": w}, 1.0, norm_type)[1]


# --- Programs -------------------------------------------------------------------------------------------------------


def test_all_gradients_go_through_one_program(compilations: Any) -> None:
    made = boxes([np.ones((1, n), np.float32) for n in range(1, 7)])
    for clip in (optim.clip_grad_norm_, optim.clip_grad_value_):
        before = compilations()
        clip(made, 1.0)
        assert compilations() == before + 1
    grads = {"w": jnp.ones((2, 1)), "b": [jnp.ones((3, 1))]}
    for pure in (optim.clip_grad_norm, optim.clip_grad_value):
        before = compilations()
        pure(grads, 1.0)
        assert compilations() == before + 1


LIMITS = [
    2.0, 3, True, np.float64(4), np.float32(5), np.int64(6), np.array(7.0), np.array(8), np.float16(9), float("inf")
]  # fmt: skip


@pytest.mark.parametrize("precision", [32, 64])
def test_no_kind_of_limit_compiles(compilations: Any, precision: int, request: Any) -> None:
    if precision == 64:
        request.getfixturevalue("x64")
    grads = [jnp.full((2, precision), 6, jnp.float32), jnp.full(3, 6, jnp.bfloat16)]
    limits = [*LIMITS, jnp.asarray(2.0), jnp.array(3), jnp.float32(4), jnp.array(5, jnp.bfloat16)]
    assert any(limit.weak_type for limit in limits if isinstance(limit, jax.Array))
    optim.clip_grad_norm(grads, 1.0)
    optim.clip_grad_value(grads, 1.0)
    before = compilations()
    results = [(optim.clip_grad_norm(grads, limit)[0], optim.clip_grad_value(grads, limit)) for limit in limits]
    assert compilations() == before
    for limit, (scaled, clamped) in zip(limits, results, strict=True):
        scale, bound = min(1, float(limit) / (6 * np.sqrt(2 * precision + 3))), min(6, float(limit))
        for each, expected in ((scaled, 6 * scale), (clamped, bound)):
            assert [grad.dtype for grad in each] == [jnp.float32, jnp.bfloat16]
            np.testing.assert_allclose(np.asarray(each[0]), expected, rtol=1e-5)


@pytest.fixture
def two_selections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two selections of gradients have programs of their own; none has one yet."""
    monkeypatch.setattr(clipping, "SELECTIONS", 2)
    monkeypatch.setattr(clipping, "_seen", set())


@pytest.mark.usefixtures("two_selections")
def test_ever_new_selections_of_gradients_compile_only_so_many_programs(compilations: Any) -> None:
    shapes = [(5, 1 + i % 3) for i in range(9)]
    made = boxes([np.ones(shape, np.float32) for shape in shapes])
    rng, counts = np.random.default_rng(0), []
    for _ in range(40):
        present = rng.integers(0, 2, 9)
        for box, shape, chosen in zip(made, shapes, present, strict=True):
            box.grad = np.full(shape, 2.0, np.float32) if chosen else None
        norm = np.sqrt(sum(4 * np.prod(shape) for shape, chosen in zip(shapes, present, strict=True) if chosen))
        np.testing.assert_allclose(optim.clip_grad_norm_(made, 1.0), norm, rtol=1e-5)
        for box in made:
            assert box.grad is None or np.allclose(box.grad, 2 / norm)
        optim.clip_grad_value_(made, 1.0)
        counts.append(compilations())
    assert counts[-1] == counts[25], counts


@pytest.mark.usefixtures("x64", "two_selections")
@pytest.mark.parametrize("norm_type", [0.5, 2, INF])
def test_programs_of_a_few_gradients_give_the_same(norm_type: float, monkeypatch: pytest.MonkeyPatch) -> None:
    table = BCOO((jnp.array([[3.0, 1.0], [4.0, 0.0]]), jnp.array([[1], [1]])), shape=(5, 2))
    grads = [jnp.full(2, float(i)) for i in range(7)] + [jnp.ones(3, jnp.bfloat16), jnp.array([1 + 2j]), table, table]
    whole, norm = optim.clip_grad_norm(grads, 1.0, norm_type)
    clamped = optim.clip_grad_value(grads, 1.0)
    monkeypatch.setattr(clipping, "SELECTIONS", 0)
    clipping._seen.clear()
    parts, again = optim.clip_grad_norm(grads, 1.0, norm_type)
    np.testing.assert_allclose(again, norm, rtol=1e-12)
    for ours, expected in ((parts, whole), (optim.clip_grad_value(grads, 1.0), clamped)):
        assert jax.tree.structure(ours) == jax.tree.structure(expected)
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_allclose(np.asarray(one, complex), np.asarray(other, complex), rtol=1e-12)


def test_selections_that_jax_traces_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipping, "_seen", seen := set())
    jax.jit(lambda grads: optim.clip_grad_norm(grads, 1.0))([jnp.ones(2)])
    jax.grad(lambda limit: optim.clip_grad_norm([jnp.ones(2)], limit)[0][0].sum())(1.0)
    assert not seen
    optim.clip_grad_norm([jnp.ones(2)], 1.0)
    assert len(seen) == 1


@pytest.mark.parametrize("clip", [optim.clip_grad_norm_, optim.clip_grad_value_])
def test_an_interrupt_leaves_gradients_all_old_or_all_new(clip: Any) -> None:
    grads = [np.full(2, 3.0, np.float32), np.full(2, 4.0, np.float32), np.full(2, 5.0, np.float32)]
    made, outcomes = boxes(grads), []
    for _ in interrupted_everywhere(clip_module, lambda: clip(made, 1.0)):
        changed = {not np.array_equal(box.grad, grad) for box, grad in zip(made, grads, strict=True)}
        assert len(changed) == 1
        outcomes += changed
        for box, grad in zip(made, grads, strict=True):
            box.grad = grad
    assert set(outcomes) == {False, True}
    assert len(outcomes) > 20


DTYPES = ["float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64"]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("norm_type", [0.5, 1, 2, 3.5, INF])
def test_strict_promotion_and_every_dtype(norm_type: float) -> None:
    """Also of several dtypes together, with every kind of limit, and derivatives."""
    grads = [jnp.array([0.5, 0, -1], dtype) for dtype in DTYPES]
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for limit in (0.25, 1, np.float64(0.5), jnp.asarray(0.5), jnp.bfloat16(0.5)):
            clipped, norm = optim.clip_grad_norm(grads, limit, norm_type)
            clamped = optim.clip_grad_value(grads, limit)
            for each, scale in ((clipped, min(1.0, float(limit) / float(norm))), (clamped, None)):
                assert [grad.dtype for grad in each] == list(map(jnp.dtype, DTYPES))
                for grad, old in zip(each, grads, strict=False):
                    wide = np.asarray(old, np.complex64)
                    expected = wide * scale if scale else np.clip(wide.real, -float(limit), float(limit))
                    np.testing.assert_allclose(np.asarray(grad, np.complex64), expected, rtol=0.13, atol=0.01)
        jax.jit(lambda grads, limit: optim.clip_grad_norm(grads, limit, norm_type))(grads, 1)
        jax.grad(lambda x: optim.clip_grad_norm([x, grads[0]], 1.0, norm_type)[0][1].sum())(grads[2])
