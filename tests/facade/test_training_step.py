"""``step(loss_fn, ...)`` as a whole training step: auxiliary results, arguments by name, micro-batches."""

import functools

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimjax as optim

BATCH = 12


@pytest.fixture
def batch(x64):
    x, y = np.random.default_rng(0).normal(size=(2, BATCH, 3))
    return jnp.asarray(x), jnp.asarray(y)


def tree():
    return {"w": jnp.linspace(-1.0, 1.0, 9).reshape(3, 3), "b": jnp.array([0.1, -0.2, 0.3])}


def predicted(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None])


def loss_of(params, x, y, scale=1.0):
    return scale * jnp.mean((predicted(params, x) - y) ** 2)


def loss_and_aux(params, x, y, scale=1.0):
    error = predicted(params, x) - y
    return scale * jnp.mean(error**2), {"error": error, "largest": jnp.max(abs(error))}


def both_equal(a, b, rtol=1e-12):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol), a, b)


# --- The large batch, and PyTorch ------------------------------------------------------------------------------------


ALGORITHMS = {
    "SGD": functools.partial(optim.SGD, lr=0.1, momentum=0.9),
    "AdamW": functools.partial(optim.AdamW, lr=0.1),
    "LBFGS": functools.partial(optim.LBFGS, line_search_fn="strong_wolfe", max_iter=3),
    "Muon": functools.partial(optim.Muon, lr=0.1),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_micro_batches_are_the_large_batch(batch, name):
    params = {"w": tree()["w"]} if name == "Muon" else tree()
    params = params if "b" in params else params | {"b": None}
    loss_fn = loss_of if name != "Muon" else lambda p, x, y: jnp.mean((jnp.tanh(x @ p["w"]) - y) ** 2)
    whole, parts = ALGORITHMS[name](params), ALGORITHMS[name](params)
    for _ in range(5):
        both_equal(parts.step(loss_fn, *batch, micro_batches=4), whole.step(loss_fn, *batch))
    tolerance = 1e-5 if name == "Muon" else 1e-12  # whose iteration runs in bfloat16
    both_equal(parts.params, whole.params, tolerance)


def test_micro_batches_are_gradient_accumulation_in_pytorch(batch, torch):
    ours = optim.Adam(tree(), lr=0.1)
    w, b = (torch.tensor(np.asarray(tree()[name])).requires_grad_() for name in ("w", "b"))
    theirs = torch.optim.Adam([b, w], lr=0.1)
    x, y = (torch.tensor(np.asarray(array)) for array in batch)
    for _ in range(20):
        theirs.zero_grad()
        losses = []
        for part in range(3):
            rows = slice(4 * part, 4 * part + 4)
            loss = ((torch.tanh(x[rows] @ w + b) - y[rows]) ** 2).mean() / 3
            loss.backward()
            losses.append(3 * loss.item())
        theirs.step()
        np.testing.assert_allclose(ours.step(loss_of, *batch, micro_batches=3), np.mean(losses), rtol=1e-12)
    both_equal(ours.params, {"w": w.detach().numpy(), "b": b.detach().numpy()})


def test_sums_of_narrow_gradients_are_wide():
    parts = 64
    params = {"w": jnp.zeros((), jnp.bfloat16)}
    x = jnp.full((parts, 1), 1 + 2.0**-7, jnp.bfloat16)
    optimizer = optim.SGD(params, lr=1.0)
    optimizer.step(lambda p, x: jnp.sum(p["w"] * x), x, micro_batches=parts)
    assert optimizer.params["w"] == -(1 + 2.0**-7)  # a sum in bfloat16 would stand still at 256


def test_backward_in_micro_batches_accumulates(batch):
    one, other = optim.SGD(tree(), lr=0.1), optim.SGD(tree(), lr=0.1)
    for optimizer, count in ((one, 1), (other, 6)):
        for _ in range(2):
            optimizer.backward(loss_of, *batch, micro_batches=count)
        optimizer.step()
    both_equal(one.params, other.params)


# --- What each part is given ------------------------------------------------------------------------------------------


def test_each_part_is_given_its_rows_and_whole_numbers(batch):
    def loss_fn(params, x, *, y, scale, table, name):
        assert (x.shape, y["y"].shape, jnp.shape(scale), table.shape, name) == ((4, 3), (4, 3), (), (), "mean")
        return loss_of(params, x, y["y"], scale * table), (x, scale)

    x, y = batch
    optimizer = optim.SGD(tree(), lr=0.1)
    given = {"y": {"y": y}, "scale": 2.0, "table": jnp.float64(3.0), "name": "mean"}
    loss, (rows, scales) = optimizer.step(loss_fn, x, **given, has_aux=True, micro_batches=3)
    np.testing.assert_array_equal(rows, x.reshape(3, 4, 3))
    np.testing.assert_array_equal(scales, [2.0, 2.0, 2.0])
    both_equal(loss, loss_of(tree(), x, y, 6.0))


def test_each_part_has_a_random_key_of_its_own():
    def loss_fn(params, x, key):
        noise = jax.random.normal(key, ())
        return jnp.sum(params["w"] * x) * noise, noise

    key = jax.random.key(3)
    optimizer = optim.SGD({"w": jnp.array(1.0)}, lr=0.1)
    _, noise = optimizer.step(loss_fn, jnp.ones(4), key, has_aux=True, micro_batches=4)
    expected = [jax.random.normal(one, ()) for one in jax.random.split(key, 4)]
    np.testing.assert_allclose(noise, expected, rtol=1e-6)


def test_arrays_of_the_model_are_whole():
    """What is not a floating array, or is frozen, belongs to the model as well."""
    window = jnp.arange(5.0).astype(jnp.int8)

    def loss_fn(params, x):
        assert params["window"].shape == (5,)
        assert params["frozen"].shape == (7,)
        return jnp.sum(params["w"] * x) + jnp.sum(params["window"].astype(jnp.float32)) + jnp.sum(params["frozen"])

    optimizer = optim.SGD({"w": jnp.array(1.0), "window": window, "frozen": jnp.ones(7)}, lr=0.1)
    optimizer.param_groups[0]["params"][0].requires_grad = False
    assert str(optimizer.param_groups[0]["params"][0]) == "frozen"
    assert optimizer.step(loss_fn, jnp.ones(4), micro_batches=2) == 2 + 10 + 7


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.linear(x)))


def loss_of_net(net, x, y):
    return jnp.mean((net(x) - y) ** 2)


def arrays(net):
    leaves = jax.tree.leaves(nnx.state(net))
    return [jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf for leaf in leaves]


@pytest.mark.parametrize("bound", [False, True], ids=["module", "parameters"])
def test_module_state_runs_through_the_parts_in_order(batch, bound):
    x, y = (array.astype(jnp.float32) for array in batch)
    one, parts = Net(), Net()
    reference = optim.SGD(one, lr=0.1)
    for part in range(3):  # parameters stay meanwhile
        rows = slice(4 * part, 4 * part + 4)
        reference.backward(loss_of_net, x[rows], y[rows])
    for parameter in reference.param_groups[0]["params"]:
        parameter.grad = parameter.grad / 3
    reference.step()
    optimizer = optim.SGD(optim.parameters(parts) if bound else parts, lr=0.1)
    optimizer.step(loss_of_net, *((parts,) if bound else ()), x, y, micro_batches=3)
    both_equal(arrays(parts), arrays(one), 1e-5)
    assert parts.dropout.rngs.count[...] == 3


class Normalized(nnx.Module):
    """A loss that writes into a parameter, as ``nnx.SpectralNorm`` does."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.array([3.0, 4.0]))

    def __call__(self, x):
        self.kernel[...] = self.kernel / 2
        return jnp.sum(self.kernel * x)


def test_what_a_part_writes_into_a_parameter_the_next_one_reads():
    model = Normalized()
    optimizer = optim.SGD(model, lr=0.5)
    loss = optimizer.step(lambda model, x: model(x[0]), jnp.ones(2), micro_batches=2)
    assert loss == (3.5 + 1.75) / 2
    np.testing.assert_array_equal(model.kernel[...], np.array([3.0, 4.0]) / 4 - 0.5 * 0.5)


# --- Forms -----------------------------------------------------------------------------------------------------------


def test_auxiliary_results_of_any_kind(batch):
    class Pair:
        def __init__(self, left, right):
            self.left, self.right = left, right

    jax.tree_util.register_pytree_node(Pair, lambda p: ((p.left, p.right), None), lambda _, leaves: Pair(*leaves))
    optimizer = optim.Adam(tree(), lr=0.1)
    optimizer.donate = True
    start = tree()
    for _ in range(2):
        before = jax.tree.map(jnp.copy, optimizer.params)
        _, aux = optimizer.step(lambda p, x, y: (loss_of(p, x, y), (Pair(p["w"], None), 1.5, p)), *batch, has_aux=True)
        assert isinstance(aux[0], Pair)
        np.testing.assert_array_equal(aux[0].left, before["w"])  # a copy, although the parameter is donated
        both_equal(aux[2], before)
    assert not np.array_equal(optimizer.params["w"], start["w"])


@pytest.mark.parametrize("make", [optim.AdamW, optim.LBFGS, optim.Adafactor], ids=lambda make: make.__name__)
def test_all_that_a_loss_may_be_given_in_one_call(batch, make):
    x, y = batch
    one, other = make(tree(), lr=0.1), make(tree(), lr=0.1)
    for _ in range(3):
        loss, aux = one.step(loss_and_aux, x, y=y, scale=2.0, has_aux=True)
        both_equal(loss, other.step(lambda p, x, y: 2.0 * loss_of(p, x, y), x, y))
        assert jax.tree.map(jnp.shape, aux) == {"error": (BATCH, 3), "largest": ()}
    both_equal(one.params, other.params)
    with pytest.raises(TypeError, match=r"step\(grads\) takes no further arguments, got has_aux, which belong"):
        one.step(tree(), has_aux=True) if make is not optim.LBFGS else optim.SGD(tree(), lr=1).step(
            tree(), has_aux=True
        )


def test_mixed_algorithms_in_micro_batches(batch):
    def make():
        params = tree()
        return optim.AdamW(
            [{"params": {"b": params["b"]}}, {"params": {"w": params["w"]}, "algorithm": optim.SGD, "lr": 0.1}], lr=0.01
        )

    def loss_fn(groups, x, y):
        return loss_of(groups[0] | groups[1], x, y)

    one, parts = make(), make()
    for _ in range(4):
        both_equal(parts.step(loss_fn, *batch, micro_batches=2), one.step(loss_fn, *batch))
    both_equal(parts.params, one.params)


def test_hooks_see_what_was_given(batch):
    optimizer = optim.SGD(tree(), lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: seen.append((len(args), dict(kwargs))))
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: (args, kwargs | {"scale": 2.0}))
    x, y = batch
    loss = optimizer.step(loss_of, x, y=y, micro_batches=2)
    assert [(count, set(kwargs)) for count, kwargs in seen] == [(3, {"y", "micro_batches"})]
    both_equal(loss, loss_of(tree(), x, y, 2.0))


def test_no_recompilation_from_step_to_step(batch, compilations):
    optimizer = optim.Adam(tree(), lr=0.1)
    x, y = batch
    step = lambda: optimizer.step(loss_and_aux, x, y=y, scale=2.0, has_aux=True, micro_batches=3)  # noqa: E731
    step()
    before = compilations()
    step()
    optimizer.param_groups[0]["lr"] = 0.01
    step()
    assert compilations() == before


# --- Bad input changes nothing ----------------------------------------------------------------------------------------


BAD = {
    "does not divide": (
        ValueError,
        r"args\[0\] of the loss function has the shape \(12, 3\).*5 micro",
        {"micro_batches": 5},
    ),
    "by name": (ValueError, r"y\.0 of the loss function .*\(7,\)", {"y": [jnp.ones(7)], "micro_batches": 2}),
    "none": (ValueError, "micro_batches must be at least 1, got 0", {"micro_batches": 0}),
    "half": (TypeError, r"micro_batches must be an integer, got 1\.5", {"micro_batches": 1.5}),
    "true": (TypeError, "micro_batches must be an integer, got True", {"micro_batches": True}),
    "unknown name": (
        TypeError,
        r"loss_of\(optimizer.params, \*args, y=\.\.\., z=\.\.\.\).*unexpected keyword argument 'z'",
        {"z": 1.0},
    ),
    "no aux": (TypeError, r"must return \(loss, aux\), two results, got 1", {"has_aux": True}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_change_nothing(batch, case):
    error, message, arguments = BAD[case]
    optimizer = optim.Adam(tree(), lr=0.1)
    x, y = batch
    for call in (optimizer.step, optimizer.backward):
        with pytest.raises(error, match=message):
            call(loss_of, x, **{"y": y, **arguments})
    both_equal(optimizer.params, tree())
    assert not optimizer.state_dict()["state"]


def test_a_variable_that_changes_its_kind_between_parts():
    class Odd(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(()))
            self.seen = nnx.Variable(jnp.zeros(2))

        def __call__(self, x):
            self.seen.set_value(x)
            return self.w * jnp.sum(x)

    model = Odd()
    with pytest.raises(TypeError, match=r"puts float32\[3\] into a variable of a module that has float32\[2\]"):
        optim.SGD(model, lr=0.1).step(lambda model, x: model(x), jnp.ones(6), micro_batches=2)
    assert model.seen[...].shape == (2,)
