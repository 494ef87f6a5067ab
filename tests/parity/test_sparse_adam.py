"""SparseAdam's numbers are PyTorch's, and what a gradient does not name is not touched."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from jax.experimental.sparse import BCOO
from sparse_gradients import row_sparse

import optimjax as optim
from optimjax import functional as F

STEPS = 100
# Others have their turn in test_trajectories.py.
OPTIONS: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-3, "maximize": True}
LAYOUTS = [  # shape, sparse axes, entries in the gradient
    ((20, 3), 1, 12),
    ((20, 3), 2, 12),
    ((7,), 1, 9),
    ((4, 5, 2), 1, 3),
    ((4, 5, 2), 2, 30),
    ((4, 5, 2), 3, 50),
    ((), 0, 2),
    ((3, 2), 0, 2),
    ((0, 3), 1, 0),
    ((20, 3), 1, 0),
]
layouts = pytest.mark.parametrize(("shape", "sparse_axes", "nse"), LAYOUTS)


def random_entries(shape: Any, sparse_axes: int, nse: int, steps: int = STEPS) -> list[tuple[Any, Any]]:
    """Indices of shape (nse, sparse_axes), some of them twice, and values, for each step."""
    rng = np.random.default_rng(0)
    result = []
    for _ in range(steps):
        columns = [rng.integers(0, size, nse) for size in shape[:sparse_axes]]
        indices = np.stack(columns, -1) if columns else np.zeros((nse, 0), int)
        result.append((indices, rng.normal(size=(nse, *shape[sparse_axes:]))))
    return result


def run_both(gradients: list[Any], params: Any, **options: Any) -> tuple[Any, Any]:
    """Parameters and state, of the class and of the compiled function."""
    optimizer = optim.SparseAdam(params, **options)
    for grad in gradients:
        optimizer.step(grad)
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    algorithm = F.sparse_adam(**options)
    update = jax.jit(algorithm.update)
    pure = params, algorithm.init(params)
    for grad in gradients:
        pure = update(pure[0], grad, pure[1])
    return (optimizer.params, dict(state)), (pure[0], pure[1]._asdict())


# --- PyTorch --------------------------------------------------------------------------------------------------------


@layouts
def test_float64(torch: Any, x64: None, shape: Any, sparse_axes: int, nse: int) -> None:
    start = np.random.default_rng(1).normal(size=shape)
    entries = random_entries(shape, sparse_axes, nse)
    tensor = torch.nn.Parameter(torch.tensor(start))
    reference = torch.optim.SparseAdam([tensor], **OPTIONS)
    for indices, values in entries:
        tensor.grad = torch.sparse_coo_tensor(indices.T, values, shape, check_invariants=True)
        reference.step()
    gradients = []
    for indices, values in entries:  # with padding in front and behind
        padding = np.full((2, sparse_axes), max(shape, default=0)) if sparse_axes else indices[:0]
        indices = np.concatenate([padding[:1], indices, padding[1:]])
        extra = np.full((len(padding), *shape[sparse_axes:]), 7.0)
        gradients.append(BCOO((jnp.asarray(np.concatenate([extra[:1], values, extra[1:]])), indices), shape=shape))
    for params, state in run_both(gradients, jnp.asarray(start), **OPTIONS):
        np.testing.assert_allclose(params, tensor.detach().numpy(), rtol=1e-12, atol=1e-12)
        assert state.keys() == reference.state[tensor].keys()
        for name, value in reference.state[tensor].items():
            np.testing.assert_allclose(state[name], value, rtol=1e-12, atol=1e-12, err_msg=name)


def test_an_embedding_and_a_layer_train_as_in_pytorch(torch: Any, x64: None) -> None:
    rng = np.random.default_rng(0)
    table, kernel = rng.normal(size=(30, 4)), rng.normal(size=(4, 2))
    batches = [(rng.integers(0, 30, (5, 2)), rng.normal(size=(5, 2))) for _ in range(STEPS)]

    embedding = torch.nn.Embedding.from_pretrained(torch.tensor(table), freeze=False, sparse=True)
    weight = torch.nn.Parameter(torch.tensor(kernel))
    optimizers = torch.optim.SparseAdam([embedding.weight], lr=0.05), torch.optim.SGD([weight], lr=0.05)
    for ids, target in batches:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = ((embedding(torch.tensor(ids)).mean(1) @ weight - torch.tensor(target)) ** 2).sum()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    adam, sgd = F.sparse_adam(lr=0.05), F.sgd(lr=0.05)

    @jax.jit
    def step(params: Any, states: Any, ids: Any, target: Any) -> Any:
        def loss_of(rows: Any, kernel: Any) -> Any:
            return jnp.sum((rows.mean(1) @ kernel - target) ** 2)

        table, kernel = params
        loss, (rows, dense) = jax.value_and_grad(loss_of, argnums=(0, 1))(table[ids], kernel)
        grad = BCOO((rows.reshape(-1, 4), ids.reshape(-1, 1)), shape=table.shape)
        table, first = adam.update(table, grad, states[0])
        kernel, second = sgd.update(kernel, dense, states[1])
        return (table, kernel), (first, second), loss

    params = jnp.asarray(table), jnp.asarray(kernel)
    states = adam.init(params[0]), sgd.init(params[1])
    for ids, target in batches:
        params, states, ours = step(params, states, jnp.asarray(ids), target)
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-10)
    np.testing.assert_allclose(params[0], embedding.weight.detach().numpy(), rtol=1e-11)
    np.testing.assert_allclose(params[1], weight.detach().numpy(), rtol=1e-11)


def test_a_sparse_gradient_where_a_dense_one_is_wanted(torch: Any) -> None:
    """Our message is PyTorch's, with the advice that only its Adam gives. Some of PyTorch's take sparse ones."""
    ids, values = np.array([1]), np.ones((1, 2))
    for case in CASES:
        if case.optimizer.rule is None or case.optimizer.rule.sparse:
            continue
        tensor = torch.nn.Parameter(torch.ones(3, 2))
        tensor.grad = torch.sparse_coo_tensor(ids[None], values, (3, 2), dtype=torch.float32, check_invariants=True)
        theirs = ""
        try:
            with torch.sparse.check_sparse_tensor_invariants():
                case.reference(torch)([tensor]).step()
        except RuntimeError as error:
            theirs = str(error).replace("Adam does", f"{case} does") if case.torch == "AdamW" else str(error)
        wanted = f"{case} does not support sparse gradients, please consider SparseAdam instead"
        assert wanted.startswith(theirs)
        optimizer, algorithm = case.optimizer({"w": jnp.ones((3, 2))}), case.factory()
        grad = {"w": row_sparse(ids, jnp.ones((1, 2)), (3, 2))}
        for step in (
            optimizer.step,
            lambda grad, run=algorithm: run.update({"w": jnp.ones((3, 2))}, grad, run.init({"w": jnp.ones((3, 2))})),
        ):
            with pytest.raises(RuntimeError, match=f"^{wanted} \\('w'\\)$"):
                step(grad)
        np.testing.assert_array_equal(optimizer.params["w"], 1)


# --- what is touched ------------------------------------------------------------------------------------------------


def test_only_what_is_named_changes() -> None:
    params = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)), jnp.float32)
    first = row_sparse([0, 1, 2, 3, 4, 5], np.ones((6, 2), np.float32), (6, 2))
    then = row_sparse([4, 1], np.array([[1, 1], [0, 0]], np.float32), (6, 2))
    before, after = run_both([first], params), run_both([first, then], params)
    for (old, old_state), (new, new_state) in zip(before, after, strict=True):
        for one, other in ((old, new), *((old_state[name], new_state[name]) for name in ("exp_avg", "exp_avg_sq"))):
            changed = np.any(np.asarray(one) != np.asarray(other), axis=1)
            # Row 1, too, although its gradient is zero: PyTorch takes what is named for a value.
            np.testing.assert_array_equal(changed, [False, True, False, False, True, False])


def test_duplicates_are_one_gradient() -> None:
    params = jnp.ones((4, 2))
    values = jnp.array([[1.0, 2.0], [10.0, 20.0], [-4.0, 3.0]])
    separate = row_sparse([2, 0, 2], values, (4, 2))
    summed = row_sparse([0, 2], jnp.array([[10.0, 20.0], [-3.0, 5.0]]), (4, 2))
    chex.assert_trees_all_close(run_both([separate] * 3, params), run_both([summed] * 3, params), rtol=1e-6)


def test_duplicates_of_half_precision_are_summed_in_single() -> None:
    params = jnp.zeros((2, 1), jnp.bfloat16)
    values = jnp.asarray([[256.0], [1.0], [1.0], [-256.0]], jnp.bfloat16)  # 256 + 1 is 256 in bfloat16
    for result, state in run_both([row_sparse([1, 1, 1, 1], values, (2, 1))], params, betas=(0.5, 0.5), lr=1.0):
        assert result.dtype == state["exp_avg"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(state["exp_avg"], [[0], [1]])
        np.testing.assert_array_equal(result, [[0], [-1]])


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int8, np.uint32, np.int16], ids=lambda dtype: dtype.__name__)
def test_indices_of_every_type_from_either_end(dtype: Any) -> None:
    """256 rows are more than uint8 and int8 can count, but not more than they can name."""
    signed = np.issubdtype(dtype, np.signedinteger)
    largest = np.iinfo(dtype).max
    grad = row_sparse(np.array([3, 100, -1 if signed else 255, 3, largest], dtype), jnp.ones((5, 2)), (256, 2))
    expected = row_sparse(np.array([3, 100, 255, 3, min(largest, 256)]), jnp.ones((5, 2)), (256, 2))
    chex.assert_trees_all_equal(run_both([grad], jnp.ones((256, 2))), run_both([expected], jnp.ones((256, 2))))


def test_what_is_behind_either_end_is_padding() -> None:
    params = jnp.ones((4, 3))
    values = jnp.full((5, 3), 2.0)
    padded = row_sparse([4, 1, 1000, -5, 2**31 - 1], values, (4, 3))
    alone = row_sparse([1], values[:1], (4, 3))
    chex.assert_trees_all_equal(run_both([padded] * 2, params), run_both([alone] * 2, params))
    elements = BCOO((jnp.ones(3), jnp.array([[0, 3], [3, 2], [-1, -4]])), shape=(4, 3))  # only the second is inside
    for result, _ in run_both([elements], params, lr=0.5):
        assert np.argwhere(np.asarray(result) != 1).tolist() == [[3, 2]]


def test_flags_of_a_gradient_change_nothing() -> None:
    params, values = jnp.ones((4, 2)), jnp.ones((3, 2))
    flagged = row_sparse([0, 2, 4], values, (4, 2), indices_sorted=True, unique_indices=True)
    chex.assert_trees_all_equal(run_both([flagged], params), run_both([row_sparse([0, 2, 4], values, (4, 2))], params))


def test_a_gradient_that_names_nothing_counts() -> None:
    empty = row_sparse(np.zeros(0, int), np.zeros((0, 2), np.float32), (4, 2))
    for params, state in run_both([empty] * 3, jnp.ones((4, 2))):
        assert int(state["step"]) == 3
        np.testing.assert_array_equal(params, 1)
        np.testing.assert_array_equal(state["exp_avg_sq"], 0)


# --- saving ---------------------------------------------------------------------------------------------------------


def test_state_of_pytorch_is_taken_over(torch: Any) -> None:
    entries = [(indices[:, 0], values.astype(np.float32)) for indices, values in random_entries((9, 2), 1, 4, 6)]
    tensor = torch.nn.Parameter(torch.ones(9, 2))
    reference = torch.optim.SparseAdam([tensor], lr=0.1)

    def run(some: Any) -> None:
        for ids, values in some:
            tensor.grad = torch.sparse_coo_tensor(ids[None], values, (9, 2), check_invariants=True)
            reference.step()

    run(entries[:3])
    optimizer = optim.SparseAdam(jnp.asarray(tensor.detach().numpy().copy()))
    optimizer.load_state_dict(reference.state_dict())
    run(entries[3:])
    for ids, values in entries[3:]:
        optimizer.step(row_sparse(ids, values, (9, 2)))
    np.testing.assert_allclose(optimizer.params, tensor.detach().numpy(), rtol=1e-6)
    (ours,), (theirs,) = optimizer.state_dict()["param_groups"], reference.state_dict()["param_groups"]
    assert theirs.items() <= ours.items()
