"""A sparse gradient can be held, added, clipped and grouped, and one that does not fit is refused by name."""

import copy
import pickle
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.sparse import BCOO, BCSR
from sparse_gradients import row_sparse

import optimjax as optim
from optimjax import functional as F
from optimjax._core.tree import check_gradient

# --- errors ---------------------------------------------------------------------------------------------------------


def test_a_dense_gradient(torch: Any) -> None:
    message = "SparseAdam does not support dense gradients, please consider Adam instead"
    tensor = torch.nn.Parameter(torch.ones(3, 2))
    tensor.grad = torch.ones(3, 2)
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        torch.optim.SparseAdam([tensor]).step()

    params = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 2))}
    sparse = row_sparse([1], jnp.ones((1, 2)), (3, 2))
    optimizer = optim.SparseAdam(params)
    for grads in ({"a": sparse, "b": jnp.ones((3, 2))}, lambda params: jnp.sum(params["a"] + params["b"])):
        for _ in range(2):  # before the first step, and when a step has left its buckets
            before = jax.tree.map(np.asarray, (optimizer.params, optimizer.state_dict()))
            with pytest.raises(RuntimeError, match=rf"^{message} \('[ab]'\)$"):
                optimizer.step(grads)
            chex.assert_trees_all_equal((optimizer.params, optimizer.state_dict()), before)
            optimizer.step({"a": sparse, "b": sparse})
    algorithm = F.sparse_adam()
    with pytest.raises(RuntimeError, match=rf"^{message} \('b'\)$"):
        algorithm.update(params, {"a": sparse, "b": jnp.ones((3, 2))}, algorithm.init(params))


def test_a_sparse_gradient_of_the_same_shape_after_a_dense_one() -> None:
    optimizer = optim.Adam(jnp.ones((3, 2)))
    optimizer.step(jnp.ones((3, 2)))
    with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
        optimizer.step(row_sparse([1], jnp.ones((1, 2)), (3, 2)))


def test_a_class_of_its_own_is_named() -> None:
    class Mine(optim.SparseAdam):
        pass

    with pytest.raises(RuntimeError, match=r"^Mine does not support dense gradients"):
        Mine(jnp.ones(2)).step(jnp.ones(2))


@pytest.mark.parametrize(
    ("grad", "error", "message"),
    [
        (row_sparse([1], jnp.ones((1, 2)), (4, 2)), ValueError, r"shape \(4, 2\), the parameter has \(3, 2\)"),
        (row_sparse([1], jnp.ones((1, 2), jnp.int32), (3, 2)), TypeError, "is int32: it must be a floating array"),
        (row_sparse([1], jnp.ones((1, 2), jnp.complex64), (3, 2)), TypeError, "is complex64, the parameter is real"),
        (BCOO.fromdense(jnp.ones((3, 2)), n_batch=1), ValueError, r"BCOO.*n_batch=1.*: it must have n_batch=0"),
        (BCSR.fromdense(jnp.ones((3, 2))), TypeError, "must be an array or None, got BCSR"),
    ],
    ids=["shape", "integer", "complex", "batch", "BCSR"],
)
def test_gradients_that_do_not_fit(grad: Any, error: type[Exception], message: str) -> None:
    box = optim.Parameter(jnp.ones((3, 2)), name="w")
    algorithm = F.sparse_adam()
    params = {"w": box.value}
    for use in (
        lambda: setattr(box, "grad", grad),
        lambda: optim.SparseAdam(params).step({"w": grad}),
        lambda: algorithm.update(params, {"w": grad}, algorithm.init(params)),
    ):
        with pytest.raises(error, match=f"^gradient of 'w' .*{message}"):
            use()
    assert box.grad is None


def test_more_entries_than_integers_can_count() -> None:
    class Huge:  # stands for a table that no test can hold
        shape, dtype = (2**16, 2**15), jnp.dtype("float32")

    elements = BCOO((jnp.ones(1), jnp.zeros((1, 2), jnp.int32)), shape=Huge.shape)
    with pytest.raises(ValueError, match="give it fewer sparse axes, or enable jax_enable_x64"):
        check_gradient(lambda: "w", Huge, elements)
    rows = BCOO((jnp.ones((1, 2**15)), jnp.zeros((1, 1), jnp.int32)), shape=Huge.shape)
    check_gradient(lambda: "w", Huge, rows)


def test_complex_parameters(torch: Any) -> None:
    message = "SparseAdam does not support complex parameters"
    with pytest.raises(ValueError, match=f"{message}$"):
        torch.optim.SparseAdam([torch.ones(2, dtype=torch.complex64)])
    params = {"real": jnp.ones(2), "imaginary": jnp.ones(2, jnp.complex64)}
    optimizer = optim.SparseAdam(jnp.ones(3))
    for use in (
        lambda: optim.SparseAdam(params),
        lambda: F.sparse_adam().init(params),
        lambda: optimizer.add_param_group({"params": params}),
    ):
        with pytest.raises(ValueError, match=rf"^{message} \('imaginary'\)$"):
            use()
    assert len(optimizer.param_groups) == 1


# --- parameters, modules, clipping ----------------------------------------------------------------------------------


def test_a_parameter_holds_a_sparse_gradient() -> None:
    box = optim.Parameter(jnp.ones((4, 2)), name="table")
    grad = row_sparse([1, 2, 1], jnp.ones((3, 2)), (4, 2))
    box.grad = grad
    for twin in (copy.deepcopy(box), pickle.loads(pickle.dumps(box))):
        np.testing.assert_array_equal(twin.grad.todense(), grad.todense())
    optimizer = optim.SparseAdam([box], lr=0.5)
    optimizer.step()
    np.testing.assert_allclose(box.value[:, 0], [1, 0.5, 0.5, 1], rtol=1e-6)

    optimizer.zero_grad(set_to_none=False)
    assert box.grad.nse == 0
    before = box.value
    optimizer.step()
    np.testing.assert_array_equal(box.value, before)
    assert optimizer.state[box]["step"] == 2
    optimizer.zero_grad()
    assert box.grad is None


def test_backward_adds_to_a_sparse_gradient_densely_as_in_pytorch(torch: Any) -> None:
    embedding = torch.nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    assert embedding.weight.grad.is_sparse
    embedding.weight.sum().backward()
    assert not embedding.weight.grad.is_sparse

    box = optim.Parameter(jnp.ones((3, 2)))
    box.grad = row_sparse([1], jnp.ones((1, 2)), (3, 2))
    optim.SGD([box]).backward(lambda params: jnp.sum(params[0]))
    np.testing.assert_array_equal(box.grad, embedding.weight.grad.numpy())


def test_gradients_of_a_module() -> None:
    class Two(nnx.Module):
        def __init__(self) -> None:
            self.first = nnx.Embed(4, 2, rngs=nnx.Rngs(0))
            self.second = nnx.Embed(5, 2, rngs=nnx.Rngs(1))

    sparse = {"first": row_sparse([1], jnp.ones((1, 2)), (4, 2)), "second": row_sparse([2], jnp.ones((1, 2)), (5, 2))}
    wanted = []
    for wrap in (lambda grad: grad, nnx.Param):
        model = Two()
        optimizer = optim.SparseAdam(model, lr=0.5)
        for _ in range(3):
            optimizer.step({name: {"embedding": wrap(grad)} for name, grad in sparse.items()})
        optimizer.step({"first": {"embedding": wrap(sparse["first"])}, "second": {"embedding": None}})
        start = Two()
        for name, row in (("first", 1), ("second", 2)):
            before, after = (np.asarray(getattr(m, name).embedding[...]) for m in (start, model))
            assert np.flatnonzero(np.any(before != after, axis=1)).tolist() == [row]
        wanted.append(nnx.to_pure_dict(nnx.state(model)))
    chex.assert_trees_all_equal(*wanted)
    with pytest.raises(ValueError, match=r"missing \['second.embedding'\], unexpected \['third.embedding'\]"):
        optimizer.step({"first": {"embedding": sparse["first"]}, "third": {"embedding": sparse["second"]}})


def test_a_table_among_groups() -> None:
    tables = {"words": jnp.ones((4, 2)), "places": jnp.ones((3, 2))}
    optimizer = optim.SparseAdam(
        [{"params": {name: table}, "lr": lr} for (name, table), lr in zip(tables.items(), (0.5, 0.25), strict=True)]
    )
    optimizer.step([{"words": row_sparse([1], jnp.ones((1, 2)), (4, 2))}, {"places": None}])
    optimizer.step([{"words": None}, {"places": row_sparse([2], jnp.ones((1, 2)), (3, 2))}])
    np.testing.assert_allclose(optimizer.params[0]["words"][:, 0], [1, 0.5, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(optimizer.params[1]["places"][:, 0], [1, 1, 0.75], rtol=1e-6)


def test_clipping_counts_duplicates_as_their_sum() -> None:
    values = jnp.array([[3.0, 1.0], [8.0, 2.0], [1.0, -3.0], [9.0, 9.0]])
    sparse = row_sparse([3, 1, 3, 7], values, (5, 2))
    dense = sparse.todense()
    bias = jnp.array([4.0])
    for norm_type in (2.0, 1.0, float("inf")):
        ours, norm = optim.clip_grad_norm({"table": sparse, "bias": bias}, 1.0, norm_type)
        wanted, wanted_norm = optim.clip_grad_norm({"table": dense, "bias": bias}, 1.0, norm_type)
        np.testing.assert_allclose(norm, wanted_norm, rtol=1e-6)
        np.testing.assert_allclose(ours["table"].todense(), wanted["table"], rtol=1e-6)
        np.testing.assert_allclose(ours["bias"], wanted["bias"], rtol=1e-6)
    elements = BCOO((jnp.array([3.0, 8.0, 1.0, 5.0]), jnp.array([[3, 1], [1, 0], [3, 1], [1, 2]])), shape=(5, 2))
    for grad in (sparse, elements):
        clipped = jax.jit(optim.clip_grad_value)(grad, 3.5)
        np.testing.assert_array_equal(clipped.todense(), optim.clip_grad_value(grad.todense(), 3.5))

    box = optim.Parameter(jnp.ones((5, 2)))
    box.grad = sparse
    np.testing.assert_allclose(optim.clip_grad_norm_([box], 1.0), jnp.linalg.norm(dense))
    optim.clip_grad_value_([box], 0.1)
    np.testing.assert_allclose(box.grad.todense(), jnp.clip(dense / jnp.linalg.norm(dense), -0.1, 0.1), rtol=1e-5)
