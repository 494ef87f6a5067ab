"""Muon's blocks are matrices of their own, as if each were a parameter; and the third factor of its learning rate."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MUON
from muon_runs import direction, lowered, normal, one_step, products
from reference import facade, functional, pytorch, random_gradients, random_parameters

import optimjax as optim
from optimjax import functional as F

# A fused kernel, its options, and the same as a list of matrices, as PyTorch would keep weights that are not fused.
FUSED: dict[str, tuple[tuple[int, ...], dict[str, Any], Callable[[Any], list[Any]]]] = {
    "query, key, value": ((6, 5), {"blocks": 3}, lambda k: np.split(k, 3)),
    "fewer keys": ((8, 3), {"blocks": (4, 2, 2)}, lambda k: np.split(k, [4, 6])),
    "sizes that come back": ((9, 4), {"blocks": (2, 5, 2)}, lambda k: np.split(k, [2, 7])),
    "of one row": ((3, 4), {"blocks": (1, 2)}, lambda k: np.split(k, [1])),
    "all": ((3, 4), {"blocks": (3,)}, lambda k: [k]),
    "one": ((3, 4), {"blocks": 1}, lambda k: [k]),
    "Dense": ((5, 6), {"blocks": 2, "matrix_axes": ((1,), (0,))}, lambda k: np.split(k.T, 2)),
    "Dense, unequal": ((5, 6), {"blocks": (4, 2), "matrix_axes": ((-1,), (-2,))}, lambda k: np.split(k.T, [4])),
    "stacked layers": (
        (2, 3, 8),
        {"blocks": (4, 2, 2), "matrix_axes": ((-1,), (-2,))},
        lambda k: [block for layer in k for block in np.split(layer.T, [4, 6])],
    ),
    "stacked layers, equal": (
        (2, 3, 8),
        {"blocks": 4, "matrix_axes": ((-1,), (-2,))},
        lambda k: [block for layer in k for block in np.split(layer.T, 4)],
    ),
    "merged rows": (
        (3, 4, 2),
        {"blocks": (6, 2), "matrix_axes": ((1, 2), (0,))},
        lambda k: np.split(k.reshape(3, 8).T, [6]),
    ),
    "merged rows, backwards": (
        (3, 4, 2),
        {"blocks": (6, 2), "matrix_axes": ((2, 1), (0,))},
        lambda k: np.split(k.transpose(2, 1, 0).reshape(8, 3), [6]),
    ),
    "merged columns": (
        (2, 6, 3),
        {"blocks": (5, 1), "matrix_axes": ((1,), (2, 0))},
        lambda k: np.split(k.transpose(1, 2, 0).reshape(6, 6), [5]),
    ),
}


@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
@pytest.mark.parametrize(("shape", "split", "matrices"), FUSED.values(), ids=FUSED)
def test_fused_kernels_are_updated_as_separate_weights(
    torch: Any,
    x64: None,
    shape: tuple[int, ...],
    split: dict[str, Any],
    matrices: Callable[[Any], list[Any]],
    adjust_lr_fn: str,
) -> None:
    params = random_parameters([(shape, np.float64)] * 2)
    grads = random_gradients(params, 10)
    options = {"lr": 0.1, "adjust_lr_fn": adjust_lr_fn}
    cut = lambda arrays: [np.ascontiguousarray(m) for array in arrays for m in matrices(np.asarray(array))]  # noqa: E731
    theirs = pytorch(torch, MUON, options, cut(params), [cut(step) for step in grads])
    for run in (facade, functional):
        ours = run(MUON, {**options, **split}, params, grads)
        assert [p.shape for p in ours.params] == [shape] * 2
        slots = [state["momentum_buffer"] for state in ours.state]
        for mine, reference in zip(cut(ours.params), theirs.params, strict=True):
            np.testing.assert_allclose(mine, reference, rtol=1e-12, atol=1e-12)
        for mine, state in zip(cut(slots), theirs.state, strict=True):
            np.testing.assert_allclose(mine, state["momentum_buffer"], rtol=1e-12, atol=1e-12)


def test_the_factor_is_that_of_each_block() -> None:
    grad = normal(10, 2, dtype=np.float32)
    fused = direction(grad, blocks=(8, 2))
    np.testing.assert_allclose(fused[:8], direction(grad[:8]), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(fused[8:], direction(grad[8:]), rtol=1e-4, atol=1e-6)
    assert np.linalg.norm(fused[:8]) > 1.5 * np.linalg.norm(fused[8:])  # sqrt(8 / 2) and 1


@pytest.mark.parametrize(
    ("blocks", "count"), [(None, 3), (1, 3), (4, 3), ((4, 4, 4, 4), 3), ((8, 4, 4), 6), ((4, 8, 4), 6), ((2, 4, 10), 9)]
)
def test_blocks_of_one_size_share_products(usual: Any, blocks: Any, count: int) -> None:
    program = lowered([jnp.ones((16, 3))] * 5, blocks=blocks)
    assert products(program.as_text()) == products(program.compile(usual).as_text()) == count


def test_blocks_go_with_everything_else(x64: None) -> None:
    grad = normal(2, 3, 24)
    options = {"ns_coefficients": "quintic", "gram": True, "adjust_lr_fn": "spectral_unclamped"}
    fused = direction(grad, blocks=(16, 4, 4), matrix_axes=((-1,), (-2,)), **options)
    for layer in range(2):
        for rows in (slice(0, 16), slice(16, 20), slice(20, 24)):
            alone = direction(grad[layer, :, rows], matrix_axes=((-1,), (-2,)), **options)
            np.testing.assert_allclose(fused[layer, :, rows], alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("blocks", [2, (3, 1)], ids=str)
def test_blocks_in_half_precision(blocks: Any, dtype: str) -> None:
    grad = jnp.asarray(normal(4, 5), dtype)
    ours = direction(grad, blocks=blocks)
    assert ours.dtype == dtype
    exact = direction(jnp.asarray(grad, "float32"), blocks=blocks)
    np.testing.assert_allclose(np.asarray(ours, float), exact, atol=0.02)


@pytest.mark.parametrize("blocks", [3, (2, 1), (0, 1)], ids=str)
def test_empty_kernels(blocks: Any) -> None:
    params = jnp.zeros((3, 0))
    if blocks != (0, 1):
        assert one_step(params, params, blocks=blocks).shape == (3, 0)
    else:
        with pytest.raises(ValueError, match=r"^blocks must be None"):
            one_step(params, params, blocks=blocks)


def test_axes_and_blocks_on_a_mesh_with_explicit_axes() -> None:
    mesh = jax.make_mesh((1, 1), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    grad = normal(4, 6, dtype=np.float32)
    sharded = jax.device_put(grad, jax.NamedSharding(mesh, jax.P("a", "b")))
    for blocks in (2, (3, 1)):
        ours = one_step(sharded, sharded, blocks=blocks)
        np.testing.assert_allclose(ours, one_step(grad, grad, blocks=blocks), atol=1e-5)
        assert jax.typeof(ours) == jax.typeof(sharded)


# --- The factor of the learning rate --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 8), (8, 2), (3, 3), (1, 7), (0, 3), (3, 0)], ids=str)
def test_spectral_unclamped_is_the_root_of_rows_by_columns(torch: Any, x64: None, shape: tuple[int, int]) -> None:
    """Against PyTorch from 2.15 on; and against the factor before it, which is 1 for a wide matrix."""
    params = random_parameters([(shape, np.float64)])
    grads = random_gradients(params, 5)
    rows, columns = shape
    scale = np.sqrt(rows / columns) if 0 < rows < columns else 1.0
    options = {"lr": 0.1, "weight_decay": 0.0, "adjust_lr_fn": "spectral_unclamped"}
    reference = {**options, "adjust_lr_fn": "original", "lr": 0.1 * scale}
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15):
        reference = options
    theirs = pytorch(torch, MUON, reference, params, grads).params if columns else params  # without, it divides by zero
    for run in (facade, functional):
        np.testing.assert_allclose(run(MUON, options, params, grads).params[0], theirs[0], rtol=1e-12, atol=1e-12)


# --- Errors ---------------------------------------------------------------------------------------------------------

KERNEL = {"layers": [{"qkv": jnp.ones((6, 4))}]}
FACES: dict[str, Callable[..., Any]] = {
    "class": lambda **options: optim.Muon(KERNEL, **options),
    "group": lambda **options: optim.Muon([{"params": KERNEL, **options}]),
    "factory": lambda **options: F.muon(**options).init(KERNEL),
}
faces = pytest.mark.parametrize("make", FACES.values(), ids=FACES)


@faces
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 4}, "blocks=4 must divide the rows, which are 6 for shape (6, 4) ('layers.0.qkv')"),
        ({"blocks": (3, 2)}, "blocks=(3, 2) must be all rows: 3 + 2 is 5, not 6, for shape (6, 4) ('layers.0.qkv')"),
        ({"blocks": [4, 4]}, "blocks=(4, 4) must be all rows: 4 + 4 is 8, not 6, for shape (6, 4) ('layers.0.qkv')"),
        (
            {"blocks": (3, 3), "matrix_axes": ((1,), (0,))},
            "blocks=(3, 3) must be all rows: 3 + 3 is 6, not 4, for shape (6, 4) ('layers.0.qkv')",
        ),
        *(
            (
                {"blocks": value},
                f"blocks must be None, a number of blocks or a tuple of their rows, all above 0, got {value}",
            )
            for value in (0, -1, (), (6, 0), (3.0, 3.0), 2.0, True)
        ),
        (
            {"ns_coefficients": "fast"},
            "ns_coefficients must be three numbers, a sequence of triples or one of 'standard', 'quintic', "
            "'polar_express', 'deepseek_v4', got 'fast'",
        ),
        *(
            ({"ns_coefficients": value}, f"Coefficients must be a tuple of exactly 3 values, got {wrong!r}")
            for value, wrong in ([((1.0, 2.0, 3.0), (1.0, 2.0)), (1.0, 2.0)], [[[1.0] * 4], [1.0] * 4], [((),), ()])
        ),
        (
            {"ns_coefficients": "deepseek_v4"},
            "ns_coefficients='deepseek_v4' needs ns_steps=10 or more, got 5",
        ),
    ],
    ids=str,
)
def test_what_is_refused(make: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make(**options)


def test_a_tree_must_not_have_a_table_in_it() -> None:
    values = {"layers": [{"qkv": "quintic"}]}
    message = f"ns_coefficients='quintic' is compiled in: it must be one for all parameters, got {values}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        F.muon(ns_coefficients=values)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"blocks": (5, 2)}, "5 \\+ 2 is 7, not 6"),
        ({"ns_coefficients": "deepseek_v4"}, "needs ns_steps=10 or more, got 5"),
        ({"ns_coefficients": "fast"}, "got 'fast'"),
    ],
    ids=str,
)
def test_a_group_edited_to_what_does_not_fit(edit: dict[str, Any], message: str) -> None:
    optimizer = optim.Muon(KERNEL)
    optimizer.step(KERNEL)
    before = np.asarray(optimizer.params["layers"][0]["qkv"])
    kept = dict(optimizer.param_groups[0])
    optimizer.param_groups[0].update(edit)
    with pytest.raises(ValueError, match=message):
        optimizer.step(KERNEL)
    np.testing.assert_array_equal(optimizer.params["layers"][0]["qkv"], before)
    optimizer.param_groups[0].update(kept)
    optimizer.step(KERNEL)
    assert not np.array_equal(optimizer.params["layers"][0]["qkv"], before)
