"""Clipping gradients, on boxes and on trees, beside ``torch.nn.utils``."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from interrupts import interrupted_everywhere
from jax.experimental.sparse import BCOO

import optimjax as optim
from optimjax._facade import clip as clipping

INF = float("inf")
GRADS = [np.array([3.0, -4.0]), np.array([[0.5, 0.0], [1.0, 2.0]]), np.array(-0.25)]


def boxes(grads: Any) -> list[optim.Parameter]:
    made = [optim.Parameter(jnp.zeros_like(grad)) for grad in grads]
    for box, grad in zip(made, grads, strict=True):
        box.grad = grad
    return made


def tensors(torch: Any, grads: Any) -> list[Any]:
    made = [torch.nn.Parameter(torch.zeros_like(torch.as_tensor(grad))) for grad in grads]
    for tensor, grad in zip(made, grads, strict=True):
        tensor.grad = torch.tensor(grad)
    return made


def assert_same(ours: Any, theirs: Any) -> None:
    for box, tensor in zip(ours, theirs, strict=True):
        assert box.grad.dtype == tensor.grad.numpy().dtype
        np.testing.assert_allclose(box.grad, tensor.grad.numpy(), rtol=1e-12, atol=1e-12)


# --- The norm, beside PyTorch ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("norm_type", [1, 2, 2.0, 3, 3.5, 0.5, INF, "inf", "2"])
@pytest.mark.parametrize("max_norm", [1.0, 2, 1000.0, 0, INF, -1.0])
def test_every_norm_is_pytorchs(norm_type: Any, max_norm: Any, torch: Any) -> None:
    ours, theirs = boxes(GRADS), tensors(torch, GRADS)
    norm = optim.clip_grad_norm_(ours, max_norm, norm_type)
    np.testing.assert_allclose(
        norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type), rtol=1e-12, atol=1e-12
    )
    assert_same(ours, theirs)
    if max_norm in (1000.0, INF) and norm_type != 0.5:
        for box, grad in zip(ours, GRADS, strict=True):
            np.testing.assert_array_equal(box.grad, grad)  # within bounds they stay as they are, to the last bit


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("norm_type", [1, 2, 3.5, INF])
def test_complex_gradients_are_pytorchs(norm_type: Any, torch: Any) -> None:
    grads = [np.array([3 + 4j, 1j, -2]), np.array([1.0, -6.0])]
    ours, theirs = boxes(grads), tensors(torch, grads)
    norm = optim.clip_grad_norm_(ours, 1.0, norm_type)
    assert norm.dtype == np.float64
    np.testing.assert_allclose(norm, torch.nn.utils.clip_grad_norm_(theirs, 1.0, norm_type), rtol=1e-12)
    assert_same(ours, theirs)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("norm_type", [1, 2, INF])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spreads_as_in_pytorch(value: float, norm_type: Any, torch: Any) -> None:
    grads = [np.array([value, 1.0]), np.array([2.0])]
    ours, theirs = boxes(grads), tensors(torch, grads)
    norm = optim.clip_grad_norm_(ours, 1.0, norm_type)
    np.testing.assert_array_equal(norm, torch.nn.utils.clip_grad_norm_(theirs, 1.0, norm_type))
    assert_same(ours, theirs)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_error_on_request_before_anything_changes(value: float, torch: Any) -> None:
    grads = [np.array([value, 1.0], np.float32), np.array([2.0], np.float32)]
    ours, theirs = boxes(grads), tensors(torch, grads)
    with pytest.raises(RuntimeError, match=r"order 2\.0 .* is non-finite"):
        torch.nn.utils.clip_grad_norm_(theirs, 1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match=r"order 2\.0 .* is non-finite"):
        optim.clip_grad_norm_(ours, 1.0, error_if_nonfinite=True)
    for box, grad in zip(ours, grads, strict=True):
        np.testing.assert_array_equal(box.grad, grad)
    assert optim.clip_grad_norm_(ours[1:], 1.0, error_if_nonfinite=True) == 2  # the others are finite


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("value", "max_norm"), [(3e4, 1e3), (1e-5, 1e-3)])
def test_half_precision_is_summed_in_single(dtype: str, value: float, max_norm: float, torch: Any) -> None:
    """A norm of 3e6 is more than float16 can hold, and the square of 1e-5 less."""
    grad = np.asarray(jnp.full(10_000, value, dtype))
    (box,) = boxes([grad])
    (tensor,) = tensors(torch, [grad.astype(np.float32)])
    norm = optim.clip_grad_norm_(box, max_norm)
    assert (norm.dtype, box.grad.dtype) == (np.float32, grad.dtype)
    np.testing.assert_allclose(norm, torch.nn.utils.clip_grad_norm_(tensor, max_norm), rtol=1e-5)
    np.testing.assert_array_equal(box.grad, tensor.grad.numpy().astype(grad.dtype))


@pytest.mark.usefixtures("x64")
def test_each_gradient_keeps_its_dtype(torch: Any) -> None:
    grads = [np.array([3.0], np.float32), np.array([4.0])]
    ours, theirs = boxes(grads), tensors(torch, grads)
    assert optim.clip_grad_norm_(ours, 1.0).dtype == np.float64
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    assert [box.grad.dtype for box in ours] == [np.float32, np.float64]
    np.testing.assert_allclose(ours[0].grad, theirs[0].grad, rtol=1e-7)
    np.testing.assert_allclose(ours[1].grad, theirs[1].grad, rtol=1e-12)


@pytest.mark.parametrize("norm_type", [1, 2, 3.5, INF])
def test_zero_gradients_stay_zero(norm_type: Any) -> None:
    ours = boxes([np.zeros(3, np.float32), np.zeros(0, np.float32)])
    assert optim.clip_grad_norm_(ours, 1.0, norm_type) == 0
    assert ours[0].grad.tolist() == [0, 0, 0]
    assert ours[1].grad.shape == (0,)


def test_no_gradients_at_all() -> None:
    w = optim.Parameter(jnp.ones(2))
    for none in ([], [w], w, iter([w])):
        assert optim.clip_grad_norm_(none, 1.0, error_if_nonfinite=True) == 0
        optim.clip_grad_value_(none, 1.0)
    assert w.grad is None
    grads, norm = optim.clip_grad_norm({"w": None}, 1.0)
    assert (grads, float(norm)) == ({"w": None}, 0)
    assert optim.clip_grad_value({"w": None}, 1.0) == {"w": None}


# --- What is handed in ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hand_in",
    [
        list,
        tuple,
        iter,
        lambda made: (box for box in made),
        lambda made: filter(lambda box: box.requires_grad, made),
        lambda made: optim.SGD(made, lr=0.1),
        lambda made: optim.SGD([{"params": made[:1]}, {"params": made[1:]}], lr=0.1),
        lambda made: optim.parameters(optim.SGD(made, lr=0.1)),
    ],
    ids=["list", "tuple", "iterator", "generator", "filter", "optimizer", "groups", "parameters of an optimizer"],
)
def test_parameters_may_come_in_every_form(hand_in: Any) -> None:
    made = [*boxes([np.array([3.0], np.float32), np.array([4.0], np.float32)]), optim.Parameter(jnp.ones(2))]
    assert optim.clip_grad_norm_(hand_in(made), 1.0, foreach=True) == 5
    np.testing.assert_allclose([made[0].grad[0], made[1].grad[0]], [0.6, 0.8], rtol=1e-5)
    optim.clip_grad_value_(hand_in(made), 0.7, foreach=False)
    np.testing.assert_allclose([made[0].grad[0], made[1].grad[0]], [0.6, 0.7], rtol=1e-5)
    assert made[2].grad is None


def test_a_single_parameter_and_the_parameters_of_a_module() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = optim.SGD(model, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(lambda model: 100 * jnp.sum(model(jnp.ones((4, 2)))))
        norm = optim.clip_grad_norm_(optim.parameters(model), max_norm=1.0)
        np.testing.assert_allclose(norm, 1200, rtol=1e-5)
        np.testing.assert_allclose(sum(jnp.sum(box.grad**2) for box in optim.parameters(model)), 1, rtol=1e-5)
        optim.clip_grad_value_(dict(optim.named_parameters(model))["bias"], 0.25)
        assert dict(optim.named_parameters(model))["bias"].grad.tolist() == [0.25, 0.25, 0.25]


def test_an_exhausted_generator_warns_as_in_pytorch(torch: Any) -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    parameters = optim.parameters(model)
    optim.SGD(parameters, lr=0.1)
    with pytest.warns(UserWarning, match="is an empty generator, no gradient clipping will occur") as ours:
        optim.clip_grad_norm_(parameters, 1.0)
    assert ours[0].filename == __file__
    with pytest.warns(UserWarning, match="is an empty generator, no gradient clipping will occur"):
        torch.nn.utils.clip_grad_norm_((p for p in []), 1.0)


@pytest.mark.parametrize("clip", [optim.clip_grad_norm_, optim.clip_grad_value_])
@pytest.mark.parametrize(
    ("parameters", "found"),
    [
        (nnx.Linear(2, 3, rngs=nnx.Rngs(0)), "Linear"),
        ({"w": optim.Parameter(1.0)}, "dict"),
        ([optim.Parameter(1.0), jnp.ones(2)], "float32 array"),
        ([("w", optim.Parameter(1.0))], "tuple"),
        (None, "NoneType"),
        (3.0, "float"),
    ],
    ids=["module", "dict", "arrays", "named", "None", "number"],
)
def test_what_are_no_parameters(clip: Any, parameters: Any, found: str) -> None:
    with pytest.raises(TypeError, match=f"must be Parameters or an optimizer, but this is a {found}: give"):
        clip(parameters, 1.0)


@pytest.mark.parametrize(
    ("norm_type", "error"),
    [(value, ValueError) for value in (0, -1, -INF, float("nan"), "foo")] + [(None, TypeError), ([2], TypeError)],
)
def test_a_norm_that_is_none(norm_type: Any, error: Any) -> None:
    """PyTorch takes 0 and less, and returns what is no norm of all gradients: 0 counts arrays, not elements."""
    (box,) = boxes([np.ones(2, np.float32)])
    for call in (lambda: optim.clip_grad_norm_(box, 0.1, norm_type), lambda: optim.clip_grad_norm([], 0.1, norm_type)):
        with pytest.raises(error, match=rf"norm_type.*{re.escape(repr(norm_type))}"):
            call()
    assert box.grad.tolist() == [1, 1]


@pytest.mark.parametrize(
    "limit", [None, "1", [1.0], np.ones(2), {"w": 1.0}, 1j, np.complex64(1), np.str_("1"), np.array(None)], ids=str
)
def test_a_limit_that_is_no_number(limit: Any) -> None:
    (box,) = boxes([np.ones(2, np.float32)])
    for clip, name in ((optim.clip_grad_norm_, "max_norm"), (optim.clip_grad_value_, "clip_value")):
        with pytest.raises(TypeError, match=f"{name} must be a number"):
            clip(box, limit)
    for pure, name in ((optim.clip_grad_norm, "max_norm"), (optim.clip_grad_value, "clip_value")):
        with pytest.raises(TypeError, match=f"{name} must be a number"):
            pure({"w": jnp.ones(2)}, limit)
    assert box.grad.tolist() == [1, 1]


def test_a_limit_that_is_too_large() -> None:
    (box,) = boxes([np.ones(2, np.float32)])
    for clip, name in ((optim.clip_grad_norm_, "max_norm"), (optim.clip_grad_value_, "clip_value")):
        with pytest.raises(ValueError, match=f"{name} must be a number that fits into a float, got 10000"):
            clip(box, 10**400)


@pytest.mark.parametrize("clip", [optim.clip_grad_norm, optim.clip_grad_value])
@pytest.mark.parametrize(("grad", "kind"), [(jnp.arange(2), "int32 array"), (1.0, "float"), ("x", "str")])
def test_a_gradient_that_is_no_floating_array_is_named(clip: Any, grad: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=rf"gradient 'head\.0' must be a floating array, got {kind}"):
        clip({"base": jnp.ones(2), "head": [grad]}, 1.0)


def test_the_pure_twins_refuse_boxes() -> None:
    """An underscore was forgotten: their values are no gradients."""
    made = boxes([np.ones(2, np.float32)])
    for pure, name in ((optim.clip_grad_norm, "clip_grad_norm"), (optim.clip_grad_value, "clip_grad_value")):
        for given, found in ((made, "'0' is a Parameter"), (made[0], "'grads' is a Parameter")):
            with pytest.raises(TypeError, match=f"{found}: {name} takes .* gradients; {name}_ is for parameters"):
                pure(given, 1.0)
        with pytest.raises(TypeError, match=f"'grads' is a SGD: .* {name}_ is for parameters and optimizers"):
            pure(optim.SGD(made, lr=0.1), 1.0)


@pytest.mark.parametrize("clip", [optim.clip_grad_norm, optim.clip_grad_value])
def test_a_tensor_is_no_gradient(clip: Any, torch: Any) -> None:
    with pytest.raises(TypeError, match="gradient 'w' must be a floating array, got Tensor"):
        clip({"w": torch.ones(2)}, 1.0)


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
    for _ in interrupted_everywhere(clipping, lambda: clip(made, 1.0)):
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


# --- Values ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("clip_value", [1.0, 1, 0.3, 0, INF, -1.0])
def test_values_are_pytorchs(clip_value: float, torch: Any) -> None:
    grads = [*GRADS, np.array([np.nan, np.inf, -np.inf, 0.0])]
    ours, theirs = boxes(grads), tensors(torch, grads)
    optim.clip_grad_value_(ours, clip_value)
    torch.nn.utils.clip_grad_value_(theirs, clip_value)
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_clamping_keeps_the_dtype(dtype: str) -> None:
    grad = jnp.array([3, -0.25, -4], dtype) * (1 + 1j if dtype == "complex64" else 1)
    clamped = optim.clip_grad_value(grad, 1e6)
    assert clamped.dtype == grad.dtype
    np.testing.assert_array_equal(clamped, grad)
    clamped = optim.clip_grad_value(grad, np.float64(0.5))
    assert clamped.dtype == grad.dtype
    for part in (jnp.real, jnp.imag):
        np.testing.assert_array_equal(part(clamped), np.clip(part(grad), -0.5, 0.5))


def test_sparse_gradients_on_boxes() -> None:
    """Their norms and values are in the tests of SparseAdam; here with an error on request."""
    table = optim.Parameter(jnp.ones((5, 2)))
    table.grad = BCOO((jnp.array([[3.0, np.nan], [4.0, 0.0]]), jnp.array([[1], [1]])), shape=(5, 2))
    before = table.grad
    with pytest.raises(RuntimeError, match="non-finite"):
        optim.clip_grad_norm_([table], 1.0, error_if_nonfinite=True)
    assert table.grad is before
    table.grad = BCOO((jnp.array([[3.0, 0.0], [4.0, 0.0]]), jnp.array([[1], [1]])), shape=(5, 2))
    assert optim.clip_grad_norm_(optim.SparseAdam([table]), 3.5) == 7
    np.testing.assert_allclose(table.grad.todense()[1], [3.5, 0], rtol=1e-6)
