"""Muon rounds as PyTorch does, shares products among matrices of a shape, and knows which axes are rows and columns."""

import importlib
import json
import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MUON
from flax import nnx
from muon_runs import direction, lowered, normal, one_step, products
from reference import Result, facade, functional, pytorch, random_gradients, random_parameters

import optimjax as optim
from optimjax import functional as F
from optimjax._core.guard import FREE
from optimjax._engine.bucket import update_bucket
from optimjax._engine.watch import Tally
from optimjax.algorithms.parts import matrices

SHAPES = [(3, 4), (4, 3), (16, 16), (1, 5), (5, 1), (0, 3)]


# --- Numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"ns_steps": 0},
        {"ns_steps": 1},
        {"ns_steps": 12},
        {"ns_coefficients": (2.0, -1.5, 0.5)},
        {"eps": 10.0},
        {"eps": 0.0},
        {"momentum": 1.5, "lr": 1e-3},
    ],
    ids=str,
)
def test_options_in_float64(torch: Any, x64: None, options: dict[str, Any]) -> None:
    params = random_parameters([(shape, np.float64) for shape in SHAPES])
    grads = random_gradients(params, 20)
    theirs = pytorch(torch, MUON, options, params, grads)
    for run in (facade, functional):
        for mine, reference in zip(run(MUON, options, params, grads).params, theirs.params, strict=True):
            np.testing.assert_allclose(mine, reference, rtol=1e-12, atol=1e-12)


@pytest.fixture
def rounding(torch: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Whether PyTorch orthogonalises in bfloat16, as it is written, or in the precision of its parameters."""
    muon = importlib.import_module("torch.optim._muon")
    exact = muon._zeropower_via_newtonschulz

    def switch(on: bool) -> None:
        monkeypatch.setattr(muon, "_zeropower_via_newtonschulz", exact.__wrapped__ if on else exact)

    return switch


BFLOAT16 = {"ns_dtype": "bfloat16"}  # the default, but not of the tests


def test_the_default_rounds_as_pytorch_does(torch: Any, rounding: Callable[[bool], None]) -> None:
    """Bit for bit, but where sums in another order fall on two sides of a boundary.

    On both sides sums are in float32, and rounded once. An entry, or the norm, that is rounded the other way is off by
    2^-8 of itself, and each iteration enlarges that up to 3.4 times, where the singular value is small.
    """
    rounding(True)
    shapes = [(3, 4), (4, 3), (8, 8), (1, 300), (16, 16)] * 5 + [(64, 64), (256, 128), (128, 256)]
    params = [np.zeros(shape, np.float32) for shape in shapes]
    grads = random_gradients(params, 1)
    options = {"lr": 1.0, "weight_decay": 0, **BFLOAT16}
    theirs = pytorch(torch, MUON, options, params, grads).params
    for run in (facade, functional):
        pairs = list(zip(map(np.asarray, run(MUON, options, params, grads).params), theirs, strict=True))
        errors = [np.abs(ours - reference).max() / np.abs(reference).max() for ours, reference in pairs]
        assert max(errors) <= 0.04
        assert np.mean(np.array(errors) <= 1e-6) > 0.8  # which a rounding more or less would all change


def test_the_default_is_as_near_the_truth_as_pytorch(torch: Any, rounding: Callable[[bool], None]) -> None:
    params = random_parameters([((24, 16), np.float32)] * 8)
    grads = random_gradients(params, 50)
    double = [[g.astype(np.float64) for g in step] for step in grads]
    rounding(False)
    truth = pytorch(torch, MUON, {}, [p.astype(np.float64) for p in params], double).params

    def error(result: Result) -> float:
        return sum(np.abs(np.asarray(p, np.float64) - t).max() for p, t in zip(result.params, truth, strict=True))

    rounding(True)
    allowed = 1.5 * error(pytorch(torch, MUON, {}, params, grads))
    assert 1e-4 < error(facade(MUON, BFLOAT16, params, grads)) <= allowed
    assert error(functional(MUON, BFLOAT16, params, grads)) <= allowed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(24, 24), (8, 32), (32, 8)], ids=str)
def test_singular_values_are_near_one(shape: tuple[int, int], dtype: str) -> None:
    for ns_dtype in ("bfloat16", "float32", None):
        grad = jnp.asarray(normal(*shape), dtype)
        found = np.asarray(-direction(grad, ns_dtype=ns_dtype), np.float64) / np.sqrt(max(1, shape[0] / shape[1]))
        u, _, vt = np.linalg.svd(np.asarray(grad, np.float64), full_matrices=False)
        singular = u.T @ found @ vt.T  # diagonal, because the singular vectors are the gradient's
        values = np.diag(singular)
        assert values[:-1].min() > 0.5
        assert values.max() < 1.25
        rounding = 0.05 if "bfloat16" in (ns_dtype, dtype) else 1e-3
        np.testing.assert_allclose(singular, np.diag(values), atol=rounding)


@pytest.mark.parametrize(
    ("ns_dtype", "dtype", "multiplied"),
    [
        ("bfloat16", "float32", "bf16"),
        ("bfloat16", "float64", "bf16"),
        ("bfloat16", "bfloat16", "bf16"),
        ("float32", "float64", "f32"),
        ("float32", "float16", "f32"),
        ("float64", "float32", "f64"),
        (None, "bfloat16", "f32"),
        (None, "float32", "f32"),
        (None, "float64", "f64"),
    ],
)
def test_what_is_multiplied_is_of_the_precision(x64: None, ns_dtype: Any, dtype: str, multiplied: str) -> None:
    algorithm = F.muon(ns_dtype=ns_dtype)
    params = jnp.ones((2, 3), dtype)
    text = jax.jit(algorithm.update).lower(params, params, algorithm.init(params)).as_text()
    operands = re.findall(r"dot_general.*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)", text)
    assert operands == [(multiplied, multiplied)] * 3


def test_the_buffer_of_a_bfloat16_parameter_is_the_momentum_alone(torch: Any, rounding: Callable[[bool], None]) -> None:
    """PyTorch normalises it in place, without Nesterov, until pytorch#194664."""
    rounding(True)
    grad = np.full((2, 2), 8.0)
    optimizer = optim.Muon([jnp.zeros((2, 2), jnp.bfloat16)], nesterov=False, momentum=0.5)
    theirs = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    reference = torch.optim.Muon([theirs], nesterov=False, momentum=0.5)
    theirs.grad = torch.tensor(grad, dtype=torch.bfloat16)
    optimizer.step([jnp.asarray(grad, jnp.bfloat16)])
    reference.step()
    np.testing.assert_array_equal(optimizer.state_dict()["state"][0]["momentum_buffer"], grad / 2)
    mended = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15)
    buffer = reference.state[theirs]["momentum_buffer"].float().numpy()
    np.testing.assert_allclose(buffer, grad / 2 if mended else np.full((2, 2), 0.5), rtol=1e-2)


# --- Edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ns_dtype", ["bfloat16", None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_zero_gradient_is_decay_alone(dtype: str, ns_dtype: Any) -> None:
    params = jnp.asarray(normal(3, 4), dtype)
    after = one_step(params, jnp.zeros_like(params), lr=0.1, weight_decay=0.5, ns_dtype=ns_dtype)
    np.testing.assert_allclose(np.asarray(after, float), 0.95 * np.asarray(params, float), rtol=1e-2)


@pytest.mark.parametrize("ns_dtype", ["bfloat16", None])
def test_derivatives_at_a_zero_gradient_are_finite(ns_dtype: Any) -> None:
    zeros = jnp.zeros((3, 4))
    chex.assert_tree_all_finite(jax.jacobian(lambda grad: one_step(zeros, grad, ns_dtype=ns_dtype))(zeros))
    chex.assert_tree_all_finite(jax.jacfwd(lambda grad: one_step(zeros, grad, ns_dtype=ns_dtype))(zeros))


def test_small_and_large_gradients_have_the_same_direction() -> None:
    grad = normal(4, 6, dtype=np.float32)
    for scale in (1e-5, 1e15):
        np.testing.assert_allclose(direction(scale * grad), direction(grad), atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("adjust_lr_fn", [None, "match_rms_adamw"])
def test_empty_matrices(shape: tuple[int, int], adjust_lr_fn: Any) -> None:
    params = {"empty": jnp.zeros(shape), "other": jnp.ones((3, 3))}
    optimizer = optim.Muon(params, adjust_lr_fn=adjust_lr_fn)
    optimizer.step(params)
    assert optimizer.params["empty"].shape == shape
    assert not np.array_equal(optimizer.params["other"], params["other"])
    chex.assert_trees_all_equal_shapes(one_step(params, params, adjust_lr_fn=adjust_lr_fn), params)


# --- One product for matrices of one shape --------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 24])
@pytest.mark.parametrize("steps", [1, 5, 50])
def test_matrices_of_one_shape_share_each_product(usual: Any, count: int, steps: int) -> None:
    program = lowered([jnp.ones((8, 16))] * count, ns_steps=steps)
    assert products(program.as_text()) == products(program.compile(usual).as_text()) == 3
    batch = f"{count}x" if count > 1 else ""
    assert re.search(rf"\(tensor<{batch}8x16xbf16>, tensor<{batch}(8x16|16x8)xbf16>\)", program.as_text())


def test_each_shape_has_its_products(usual: Any) -> None:
    shapes = [(8, 16), (16, 8), (8, 16), (8, 8), (16, 8)]
    assert products(lowered([jnp.ones(shape) for shape in shapes]).compile(usual).as_text()) == 9


def test_groups_share_products_where_only_numbers_differ() -> None:
    params = [[jnp.ones((8, 16))] * 3, [jnp.ones((8, 16))] * 2, [jnp.ones((8, 16))]]
    optimizer = optim.Muon(
        [
            {"params": params[0], "lr": 0.1},
            {"params": params[1], "ns_coefficients": (2.0, -1.5, 0.5), "weight_decay": 0},
            {"params": params[2], "nesterov": False},
        ]
    )
    grads = {box: jnp.ones((8, 16)) for group in optimizer.param_groups for box in group["params"]}
    plan, rows = optimizer._stepper.planner.planned(optimizer.param_groups, optimizer.state, grads, Tally(), False)
    (call,) = plan.calls(grads, rows, False, FREE)
    text = update_bucket.donating((1,)).lower(*call.args).as_text()
    assert products(text) == 6  # five matrices, and one


@pytest.mark.parametrize("elements", [1, 40, 10**6])
def test_together_or_alone_they_are_the_same(
    usual: Any, torch: Any, x64: None, monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    jax.clear_caches()
    monkeypatch.setattr(matrices, "ELEMENTS", elements)
    params = random_parameters([((3, 4), np.float64)] * 7)
    grads = random_gradients(params, 5)
    text = lowered([jnp.asarray(p) for p in params]).compile(usual).as_text()
    assert products(text) == 3 * {1: 7, 40: 3, 10**6: 1}[elements]
    expected = pytorch(torch, MUON, {}, params, grads).params
    for run in (facade, functional):
        chex.assert_trees_all_close(run(MUON, {}, params, grads).params, expected, rtol=1e-12)
    jax.clear_caches()  # or what was traced with another number of elements would stay


@pytest.mark.parametrize(("ns_dtype", "share"), [("bfloat16", 3.6), ("float32", 3.1)])
@pytest.mark.parametrize(("count", "size"), [(1, 1024), (8, 512), (64, 64)])
def test_temporary_memory_is_that_of_the_products(
    usual: Any, ns_dtype: str, share: float, count: int, size: int
) -> None:
    """X, the product with itself, the polynomial, and a product before it is rounded; no other copies."""
    params = [jax.ShapeDtypeStruct((size, size), jnp.float32)] * count
    algorithm = F.muon(ns_dtype=ns_dtype)
    state = jax.eval_shape(algorithm.init, params)
    update = jax.jit(algorithm.update, donate_argnums=(0, 2))
    memory: Any = update.lower(params, params, state).compile(usual).memory_analysis()
    assert memory.temp_size_in_bytes <= share * count * size**2 * 4


@pytest.mark.parametrize("axes", [None, ((1, 2), (0,))], ids=str)
def test_matrices_on_a_mesh_with_explicit_axes(axes: Any) -> None:
    """Their products contract a sharded axis, and those of one shape may be sharded in different ways."""
    mesh = jax.make_mesh((1, 1), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    specs = [jax.P("a", "b"), jax.P("b", None), jax.P(None, "a"), jax.P("a", "b")]
    arrays = [normal(4, *([2, 3] if axes else [6]), seed=seed, dtype=np.float32) for seed in range(4)]
    sharded = [jax.device_put(a, jax.NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)]
    expected = one_step(arrays, arrays, matrix_axes=axes)
    for update in (one_step, jax.jit(one_step, static_argnames="matrix_axes")):
        ours = update(sharded, sharded, matrix_axes=axes)
        chex.assert_trees_all_close(ours, expected, atol=1e-5)
        assert [jax.typeof(a) for a in ours] == [jax.typeof(a) for a in sharded]
    optimizer = optim.Muon(sharded, matrix_axes=axes, ns_dtype=None, lr=1.0, weight_decay=0)
    optimizer.step(sharded)
    chex.assert_trees_all_close(optimizer.params, expected, atol=1e-5)


# --- Rows and columns -----------------------------------------------------------------------------------------------


# A kernel as Flax keeps it, the axes, and the same as a list of matrices (out, in), as PyTorch keeps weights.
KERNELS: dict[str, tuple[tuple[int, ...], Any, Callable[[Any], list[Any]]]] = {
    "Dense": ((3, 5), ((1,), (0,)), lambda k: [k.T]),
    "Dense, from the end": ((3, 5), ((-1,), (-2,)), lambda k: [k.T]),
    "as PyTorch": ((3, 5), ((0,), (1,)), lambda k: [k]),
    "stacked layers": ((4, 3, 5), ((-1,), (-2,)), lambda k: [layer.T for layer in k]),
    "query": ((3, 2, 4), ((1, 2), (0,)), lambda k: [k.reshape(3, 8).T]),
    "query, by head": ((3, 2, 4), ((2,), (0,)), lambda k: [k[:, 0].T, k[:, 1].T]),
    "out": ((2, 4, 3), ((2,), (0, 1)), lambda k: [k.reshape(8, 3).T]),
    "Conv": ((3, 2, 4, 5), ((3,), (0, 1, 2)), lambda k: [k.reshape(24, 5).T]),
    "Conv, by position": ((3, 2, 4, 5), ((3,), (2,)), lambda k: [k[i, j].T for i in range(3) for j in range(2)]),
    "merged backwards": ((3, 2, 4), ((2, 1), (0,)), lambda k: [k.transpose(2, 1, 0).reshape(8, 3)]),
}
every_kernel = pytest.mark.parametrize(("shape", "axes", "matrices"), KERNELS.values(), ids=KERNELS)


@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
@every_kernel
def test_kernels_are_updated_as_pytorchs_weights(
    torch: Any, x64: None, shape: tuple[int, ...], axes: Any, matrices: Callable[[Any], list[Any]], adjust_lr_fn: str
) -> None:
    params = random_parameters([(shape, np.float64)] * 2)
    grads = random_gradients(params, 10)
    options = {"lr": 0.1, "adjust_lr_fn": adjust_lr_fn}
    cut = lambda arrays: [np.ascontiguousarray(m) for array in arrays for m in matrices(array)]  # noqa: E731
    theirs = pytorch(torch, MUON, options, cut(params), [cut(step) for step in grads])
    for run in (facade, functional):
        ours = run(MUON, {**options, "matrix_axes": axes}, params, grads)
        assert [p.shape for p in ours.params] == [shape] * 2
        slots = [np.asarray(state["momentum_buffer"]) for state in ours.state]
        chex.assert_trees_all_close(cut(map(np.asarray, ours.params)), theirs.params, rtol=1e-12, atol=1e-12)
        chex.assert_trees_all_close(cut(slots), [s["momentum_buffer"] for s in theirs.state], rtol=1e-12, atol=1e-12)


def test_which_axis_is_the_rows_decides_the_rate() -> None:
    grad = normal(2, 8, dtype=np.float32)
    tall, wide = direction(grad, matrix_axes=((1,), (0,))), direction(grad)
    np.testing.assert_allclose(tall, 2 * wide, rtol=1e-4, atol=1e-6)


class Block(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(1, 4, (3,), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=4, decode=False, rngs=rngs)
        self.linear = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = jnp.tanh(self.conv(x))
        return self.linear(x + self.attention(x))


def test_axes_of_each_group_of_a_module() -> None:
    model = Block()
    boxes = dict(optim.named_parameters(model))
    axes = {
        "conv.kernel": ((2,), (0, 1)),
        **{f"attention.{name}.kernel": ((1, 2), (0,)) for name in ("query", "key", "value")},
        "attention.out.kernel": ((2,), (0, 1)),
        "linear.kernel": ((-1,), (-2,)),
    }
    groups = [{"params": [(name, boxes.pop(name))], "matrix_axes": value} for name, value in axes.items()]
    muon, adamw = optim.Muon(groups, lr=0.02), optim.AdamW(boxes.items(), lr=0.01)
    x = jnp.asarray(normal(8, 6, 1, dtype=np.float32))

    def loss_fn(model: Block, x: Any) -> Any:
        return jnp.mean((model(x) - jnp.cumsum(x, axis=1)) ** 2)

    losses = []
    for _ in range(60):
        losses.append(float(muon.backward(loss_fn, model, x)))
        adamw.backward(loss_fn, model, x)
        muon.step()
        adamw.step()
        muon.zero_grad()
        adamw.zero_grad()
    assert losses[-1] < 0.3 * losses[0]


def test_axes_survive_json() -> None:
    grad = jnp.asarray(normal(3, 5, dtype=np.float32))
    optimizer = optim.Muon([{"params": [grad], "matrix_axes": ((1,), (0,))}])
    saved = optimizer.state_dict()
    saved["param_groups"] = json.loads(json.dumps(saved["param_groups"]))  # lists in place of tuples
    other = optim.Muon([grad])
    other.load_state_dict(saved)
    optimizer.step([[grad]])
    other.step([grad])
    np.testing.assert_array_equal(other.params[0], optimizer.params[0][0])
