"""Sparse gradients: SparseAdam's numbers are PyTorch's, and what a gradient does not name is not touched."""

import copy
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from flax import nnx
from jax.experimental.sparse import BCOO, BCSR

import optimjax as optim
from optimjax import functional as F
from optimjax._core.tree import check_gradient

STEPS = 100
OPTIONS: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-3, "maximize": True}  # others: test_parity.py
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


def row_sparse(ids: Any, values: Any, shape: Any, **flags: Any) -> BCOO:
    return BCOO((jnp.asarray(values), jnp.asarray(ids)[:, None]), shape=shape, **flags)


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
                getattr(torch.optim, case.torch)([tensor]).step()
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


# --- cost -----------------------------------------------------------------------------------------------------------


def arrays_made(text: str, shape: str) -> list[str]:
    """The operations of a compiled program whose result has this shape; what is only handed on is left out."""
    made = re.findall(rf"= {re.escape(shape)}\S* ([a-z-]+)\(", text)
    return [operation for operation in made if operation not in ("parameter", "get-tuple-element", "bitcast")]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("sparse_axes", [1, 2])
def test_a_donated_update_copies_no_table(usual: Any, sparse_axes: int, dtype: str) -> None:
    rows, width, nse = 5000, 8, 16
    algorithm = F.sparse_adam()
    table = jnp.ones((rows, width), dtype)
    shape = (nse, width) if sparse_axes == 1 else (nse,)

    def update(table: Any, state: Any, ids: Any, values: Any) -> Any:
        return algorithm.update(table, BCOO((values, ids), shape=table.shape), state)

    arguments = table, algorithm.init(table), jnp.zeros((nse, sparse_axes), jnp.int32), jnp.ones(shape, dtype)
    compiled: Any = jax.jit(update, donate_argnums=(0, 1)).lower(*arguments).compile(usual)
    analysis = compiled.memory_analysis()
    assert analysis.alias_size_in_bytes >= 3 * table.nbytes
    assert analysis.temp_size_in_bytes < 16 * 4 * nse * width * 2
    assert analysis.temp_size_in_bytes < table.nbytes / 2
    letter = {"float32": "f32", "float16": "f16"}[dtype]
    for shape in (f"{letter}[{rows},{width}]", f"{letter}[{rows * width}]", f"f32[{rows},{width}]"):
        assert set(arrays_made(compiled.as_text(), shape)) <= {"fusion", "scatter", "while"}
    assert "copy" not in arrays_made(compiled.as_text(), f"{letter}[{rows},{width}]")


@pytest.mark.parametrize("donate", [False, True])
def test_the_class_updates_its_state_in_place_and_the_table_when_told(donate: bool) -> None:
    optimizer = optim.SparseAdam(jnp.ones((1000, 8)))
    optimizer.donate = donate
    grad = row_sparse([3, 1, 3], jnp.ones((3, 8)), (1000, 8))
    optimizer.step(grad)

    def places() -> list[int]:
        (bucket,) = optimizer._stepper.planner.plan.buckets  # reading the state would protect it
        return [array.unsafe_buffer_pointer() for array in (optimizer.params, *bucket.store.slots[0])]

    before = places()
    optimizer.step(grad)
    after = places()
    assert after[1:] == before[1:]
    assert (after[0] == before[0]) == donate


def test_as_many_ids_compile_once(compilations: Callable[[], int]) -> None:
    optimizer = optim.SparseAdam([jnp.ones((9, 2)), jnp.ones((9, 2))], lr=0.1)
    rng = np.random.default_rng(0)
    grads = [[row_sparse(rng.integers(0, 12, 4), jnp.ones((4, 2)), (9, 2)) for _ in range(2)] for _ in range(4)]
    optimizer.step(grads[0])
    before = compilations()
    for grad in grads[1:]:
        optimizer.step(grad)
        optimizer.param_groups[0]["lr"] *= 0.5
    assert compilations() == before


def test_nobody_pays_for_sparse_arrays_who_has_none() -> None:
    code = "import sys, optimjax; sys.exit('jax.experimental.sparse' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- JAX's transformations ------------------------------------------------------------------------------------------


def test_scan_and_vmap() -> None:
    algorithm = F.sparse_adam(lr=0.1)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 8, (2, 5, 3)))  # runs, steps, ids
    values = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 3, 2)), jnp.float32)

    def train(ids: Any, values: Any) -> Any:
        def step(carry: Any, batch: Any) -> Any:
            return algorithm.update(carry[0], row_sparse(*batch, (7, 2)), carry[1]), None

        table = jnp.ones((7, 2))
        return jax.lax.scan(step, (table, algorithm.init(table)), (ids, values))[0]

    together = jax.vmap(train)(ids, values)
    for run in range(2):
        params, state = jnp.ones((7, 2)), algorithm.init(jnp.ones((7, 2)))
        for step in range(5):
            params, state = algorithm.update(params, row_sparse(ids[run, step], values[run, step], (7, 2)), state)
        chex.assert_trees_all_close(jax.tree.map(lambda x, run=run: x[run], together), (params, state), rtol=1e-6)


def test_derivatives(x64: None) -> None:
    table = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
    values = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2)))

    def final(lr: Any, table: Any, values: Any) -> Any:
        algorithm = F.sparse_adam(lr=lr)
        state = algorithm.init(table)
        for ids in ([3, 1, 3, 5], [1, 0, 5, 0]):
            table, state = algorithm.update(table, row_sparse(ids, values, (5, 2)), state)
        return jnp.sum(table**3)

    jax.test_util.check_grads(final, (0.1, table, values), order=1, modes=["rev", "fwd"])


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


# --- boxes, modules, clipping ---------------------------------------------------------------------------------------


def test_a_box_holds_a_sparse_gradient() -> None:
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
