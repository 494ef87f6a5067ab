"""An average of models has PyTorch's numbers and arrays of its own, and an error leaves it as it was."""

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from averaged_nets import Net
from flax import nnx
from interrupts import interrupted_everywhere

import optimjax as optim
from optimjax import functional as F
from optimjax import swa_utils

SHAPES = [(3, 2), (2,), ()]
RNG = np.random.default_rng(0)
WEIGHTS = [[RNG.normal(size=shape) for shape in SHAPES] for _ in range(6)]


def torch_model(torch: Any, values: Any, use_buffers: bool) -> Any:
    module = torch.nn.Module()
    for index, value in enumerate(values):
        setattr(module, f"w{index}", torch.nn.Parameter(torch.tensor(value)))
    if not use_buffers:  # PyTorch's mean of lists fails at integers
        module.register_buffer("count", torch.tensor([7, 8]))
    module.register_buffer("mean", torch.tensor(values[0]))
    return module


FUNCTIONS = {
    "mean": lambda m: {},
    "swa": lambda m: {"avg_fn": m.get_swa_avg_fn()},
    "ema": lambda m: {"avg_fn": m.get_ema_avg_fn(0.9)},
    "multi swa": lambda m: {"multi_avg_fn": m.get_swa_multi_avg_fn()},
    "multi ema": lambda m: {"multi_avg_fn": m.get_ema_multi_avg_fn(0.9)},
    "own": lambda m: {"avg_fn": lambda old, new, n: old + (new - old) * (0.5 if n < 3 else 0.1)},
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("use_buffers", [False, True])
def test_averages_are_pytorchs(name: str, use_buffers: bool, torch: Any, x64: None) -> None:
    def tree(values: Any) -> Any:
        return {f"w{index}": jnp.asarray(value) for index, value in enumerate(values)}

    # PyTorch's mean of lists rounds 1 / (n + 1) to float32.
    rtol = 1e-6 if name == "multi swa" else 1e-14

    reference = torch.optim.swa_utils.AveragedModel(
        torch_model(torch, WEIGHTS[0], use_buffers), use_buffers=use_buffers, **FUNCTIONS[name](torch.optim.swa_utils)
    )
    averaged = swa_utils.AveragedModel(tree(WEIGHTS[0]), use_buffers=use_buffers, **FUNCTIONS[name](swa_utils))
    for values in WEIGHTS:
        model = torch_model(torch, values, use_buffers)
        reference.update_parameters(model)
        averaged.update_parameters(tree(values))
        for key, value in averaged.module.items():
            np.testing.assert_allclose(value, getattr(reference.module, key).detach().numpy(), rtol=rtol, atol=rtol)
    assert averaged.n_averaged == int(reference.n_averaged)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_buffers_of_a_module(use_buffers: bool) -> None:
    model = Net(nnx.Rngs(0))
    averaged = swa_utils.AveragedModel(model, use_buffers=use_buffers)
    assert averaged.module is not model
    kernels, means = [], []
    for index in range(3):
        model.linear.kernel.set_value(model.linear.kernel.get_value() + index)
        model.norm.mean.set_value(jnp.full(3, float(index)))
        kernels.append(np.asarray(model.linear.kernel.get_value()))
        means.append(np.asarray(model.norm.mean.get_value()))
        key = jax.random.key_data(averaged.module.dropout.rngs.key.get_value())
        averaged.update_parameters(model)
        assert (jax.random.key_data(averaged.module.dropout.rngs.key.get_value()) == key).all()
    np.testing.assert_allclose(averaged.module.linear.kernel.get_value(), np.mean(kernels, 0), rtol=1e-6)
    expected = np.mean(means, 0) if use_buffers else means[-1]
    np.testing.assert_allclose(averaged.module.norm.mean.get_value(), expected, rtol=1e-6)
    np.testing.assert_array_equal(model.linear.kernel.get_value(), kernels[-1])  # the model itself is untouched
    averaged.module.eval()
    assert averaged(jnp.ones((4, 2))).shape == (4, 3)


def test_leaves_of_a_tree_that_are_no_parameters_are_copied() -> None:
    averaged = swa_utils.AveragedModel({"w": jnp.zeros(2), "count": jnp.array(0), "name": "net"})
    for index in (1, 2):
        averaged.update_parameters({"w": jnp.full(2, float(index)), "count": jnp.array(index), "name": "net"})
    assert averaged.module["name"] == "net"
    assert int(averaged.module["count"]) == 2
    np.testing.assert_array_equal(averaged.module["w"], [1.5, 1.5])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_is_kept(dtype: str) -> None:
    averaged = swa_utils.AveragedModel([jnp.ones(2, dtype)], avg_fn=swa_utils.get_ema_avg_fn(0.5))
    averaged.update_parameters([jnp.zeros(2, dtype)])
    averaged.update_parameters([jnp.ones(2, dtype)])
    assert averaged.module[0].dtype == dtype
    np.testing.assert_array_equal(averaged.module[0].astype(float), [0.5, 0.5])


def test_a_saved_average_goes_on() -> None:
    def run(averaged: Any, start: int, stop: int) -> None:
        for values in WEIGHTS[start:stop]:
            averaged.update_parameters([jnp.asarray(value) for value in values])

    def make() -> Any:
        return swa_utils.AveragedModel([jnp.asarray(value) for value in WEIGHTS[0]])

    whole, first, second = make(), make(), make()
    run(whole, 0, 6)
    run(first, 0, 3)
    saved = first.state_dict()
    assert saved.keys() == {"n_averaged", "module.0", "module.1", "module.2"}
    run(first, 3, 4)  # a snapshot: this must not change it
    second.load_state_dict(saved)
    run(second, 3, 6)
    jax.tree.map(np.testing.assert_array_equal, whole.module, second.module)


# --- Arrays of its own ----------------------------------------------------------------------------------------------


def memory(model: Any) -> set[int]:
    """Where the arrays of a model are."""
    leaves = jax.tree.leaves(nnx.state(model) if isinstance(model, nnx.Module) else model)
    leaves = [leaf for leaf in leaves if not isinstance(leaf, int)]
    arrays = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.extended) else x for x in leaves]
    return {jnp.asarray(x).unsafe_buffer_pointer() for x in arrays}


def make_tree() -> Any:
    return {"w": jnp.arange(3.0), "n": jnp.array([1, 2]), "k": jax.random.key(0)}


@pytest.mark.parametrize("make", [make_tree, lambda: Net(nnx.Rngs(0))], ids=["tree", "module"])
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"avg_fn": lambda old, new, n: new}, {"multi_avg_fn": lambda old, new, n: new}]
)
def test_it_shares_no_array_with_the_model(make: Any, use_buffers: bool, options: Any) -> None:
    model = make()
    averaged = swa_utils.AveragedModel(model, use_buffers=use_buffers, **options)
    for _ in range(3):
        assert not memory(model) & memory(averaged.module)
        averaged.update_parameters(model)
    assert not memory(model) & memory(averaged.module)
    saved = {f"module.{name}": x for name, x in model.items()} if isinstance(model, dict) else averaged.state_dict()
    averaged.load_state_dict(saved | {"n_averaged": 2})
    assert not memory(saved) & memory(averaged.module)


def test_arrays_of_numpy_are_copied() -> None:
    model = {"w": np.ones(1000, np.float32)}
    averaged = swa_utils.AveragedModel(model)
    model["w"][:] = 5
    np.testing.assert_array_equal(averaged.module["w"], np.ones(1000))
    averaged.update_parameters(model)
    model["w"][:] = 7
    np.testing.assert_array_equal(averaged.module["w"], np.full(1000, 5))


@pytest.mark.parametrize("make", [lambda: {"w": jnp.ones(3)}, lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0))])
def test_it_stays_valid_under_donate(make: Any) -> None:
    model = make()
    optimizer = optim.Adam(model, lr=0.1)
    optimizer.donate = True
    averaged = swa_utils.AveragedModel(optimizer.params)
    snapshots = [averaged.state_dict()]
    for _ in range(3):
        optimizer.step(lambda params: sum(jnp.sum(x**2) for x in jax.tree.leaves(params)))
        averaged.update_parameters(optimizer.params)
        snapshots.append(averaged.state_dict())
    assert len({float(max(jax.tree.leaves(saved), key=jnp.size).sum()) for saved in snapshots}) == 4


def test_leaves_whose_dotted_names_coincide_are_averaged_apart() -> None:
    def tree(x: float) -> Any:
        return {"a.b": jnp.array(x), "a": {"b": jnp.array(-x)}}

    averaged = swa_utils.AveragedModel(tree(0.0))
    for x in (1.0, 3.0):
        averaged.update_parameters(tree(x))
    assert jax.tree.map(float, averaged.module) == jax.tree.map(float, tree(2.0))


class Odd(nnx.Module):
    """A variable that holds a tree, one that holds nothing, and one that holds a number."""

    def __init__(self) -> None:
        self.tree = nnx.Param({"a": jnp.ones(2), "b": [jnp.zeros(1)]})
        self.nothing = nnx.BatchStat(None)
        self.number = nnx.Variable(3)
        self.count = nnx.BatchStat(jnp.array(1))


def test_a_variable_may_hold_a_tree() -> None:
    model = Odd()
    averaged = swa_utils.AveragedModel(model)
    for x in (1.0, 3.0):
        model.tree.set_value({"a": jnp.full(2, x), "b": [jnp.full(1, -x)]})
        model.count.set_value(jnp.array(int(x)))
        averaged.update_parameters(model)
    assert averaged.state_dict().keys() == {"n_averaged", "module.tree.a", "module.tree.b.0", "module.count"}
    np.testing.assert_array_equal(averaged.module.tree.get_value()["a"], [2, 2])
    np.testing.assert_array_equal(averaged.module.tree.get_value()["b"][0], [-2])
    assert (averaged.module.count.get_value(), averaged.module.number.get_value()) == (3, 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "complex64", "int32", "bool"])
@pytest.mark.parametrize("options", [{}, {"avg_fn": swa_utils.get_ema_avg_fn(0.5)}], ids=["mean", "ema"])
def test_strict_promotion(dtype: str, options: Any) -> None:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        averaged = swa_utils.AveragedModel([jnp.zeros(2, dtype)], use_buffers=True, **options)
        for x in (1, 3):
            averaged.update_parameters([jnp.full(2, x, dtype)])
    assert averaged.module[0].dtype == dtype
    np.testing.assert_array_equal(np.asarray(averaged.module[0], complex), [1 if dtype == "bool" else 2] * 2)


def test_modes_and_parameters_are_the_modules() -> None:
    averaged = swa_utils.AveragedModel(Net(nnx.Rngs(0)))
    assert averaged.eval() is averaged
    assert averaged.module.dropout.deterministic
    assert averaged.module.norm.use_running_average
    assert averaged.train() is averaged
    assert not averaged.module.dropout.deterministic
    assert list(averaged.parameters()) == list(optim.parameters(averaged.module))
    tree = swa_utils.AveragedModel({"w": jnp.ones(2)})
    assert [box.value.tolist() for box in tree.parameters()] == [[1, 1]]
    for switch in (tree.train, tree.eval):
        with pytest.raises(TypeError, match=r"needs an average of a flax\.nnx module, not of a dict"):
            switch()


# --- Nothing half-changed -------------------------------------------------------------------------------------------


ILL_FORMED = [
    (None, r"a state dict is a dict, got NoneType"),
    ([1], r"a state dict is a dict, got list"),
    ({"n_averaged": 1}, r"only one of them has \['module\.0', 'module\.1'"),
    ({"n_averaged": "many"}, r"'n_averaged' .* is 'many', which is no"),
    ({"n_averaged": -3}, r"'n_averaged' .* is -3, which is no"),
    ({"n_averaged": 2.7}, r"'n_averaged' .* is 2\.7, which is no"),
    ({"n_averaged": None}, r"'n_averaged' .* is None, which is no"),
    ({"module.1": np.ones(5)}, r"'module\.1' .* has shape \(5,\), expected \(2,\)"),
    ({"module.9": np.ones(5)}, r"only one of them has \['module\.9'\]"),
    ({"module.1": np.ones(2, int)}, r"'module\.1' .* int64 is of another kind"),
    ({"module.1": np.ones(2, complex)}, r"'module\.1' .* complex128 is of another kind"),
    ({"module.1": "x"}, r"'module\.1' .* is 'x', which cannot be loaded"),
    ({"module.n": np.ones(2)}, r"'module\.n' .* float64 is of another kind"),
    ({"module.k": np.ones(2)}, r"'module\.k' .* expected an array of key"),
]


def rich() -> Any:
    return {"0": jnp.ones((3, 2)), "1": jnp.ones(2), "2": jnp.ones(()), "n": jnp.array([1, 2]), "k": jax.random.key(0)}


@pytest.mark.parametrize(("wrong", "message"), ILL_FORMED)
def test_a_state_dict_that_does_not_fit_changes_nothing(wrong: Any, message: str) -> None:
    averaged = swa_utils.AveragedModel(rich())
    averaged.update_parameters(rich())
    if isinstance(wrong, dict) and wrong != {"n_averaged": 1}:
        wrong = averaged.state_dict() | wrong
    before = averaged.module
    with pytest.raises(ValueError, match=message):
        averaged.load_state_dict(wrong)
    assert averaged.module is before
    assert averaged.n_averaged == 1


def test_loading_keeps_the_dtypes_of_the_average(torch: Any) -> None:
    averaged = swa_utils.AveragedModel([jnp.ones(2, jnp.bfloat16), jnp.ones(2), jnp.ones(2, jnp.complex64)])
    saved = {"n_averaged": torch.tensor(3), "module.0": torch.full((2,), 2.0), "module.1": [3, 3.5]}
    averaged.load_state_dict(saved | {"module.2": np.full(2, 4.0)})
    assert [x.dtype for x in averaged.module] == [jnp.bfloat16, jnp.float32, jnp.complex64]
    assert [x.tolist() for x in averaged.module] == [[2, 2], [3, 3.5], [4, 4]]
    assert averaged.n_averaged == 3


@pytest.mark.parametrize("make", [lambda x: {"a": jnp.full(2, x), "b": jnp.full(1, x)}, lambda x: filled(x)])
@pytest.mark.parametrize("method", ["update_parameters", "load_state_dict"])
def test_an_interrupt_leaves_all_old_or_all_new(make: Any, method: str) -> None:
    averaged = swa_utils.AveragedModel(make(0.0))
    averaged.update_parameters(make(1.0))
    saved = averaged.state_dict()
    argument = make(3.0) if method == "update_parameters" else {name: x * 0 + 2 for name, x in saved.items()}
    calls = 0
    for interrupted in interrupted_everywhere(swa_utils, lambda: getattr(averaged, method)(argument)):
        calls += 1
        contents = {name: np.unique(x).tolist() for name, x in averaged.state_dict().items()}
        assert list(contents.values()) == ([[1]] * 3 if interrupted else [[2]] * 3)
    assert calls > 20


def filled(x: float) -> Any:
    model = nnx.Linear(1, 2, rngs=nnx.Rngs(0))
    model.kernel.set_value(jnp.full((1, 2), x))
    model.bias.set_value(jnp.full(2, x))
    return model


@pytest.mark.parametrize("ndim", [1, 2])
def test_an_error_of_a_variable_leaves_all_old(ndim: int) -> None:
    averaged, model = swa_utils.AveragedModel(filled(1.0)), filled(7.0)
    written = nnx.Param.set_value

    def set_value(self: Any, value: Any) -> None:
        if float(value.ravel()[0]) == 7 and value.ndim == ndim:
            raise RuntimeError("read only")
        written(self, value)

    with mock.patch.object(nnx.Param, "set_value", set_value), pytest.raises(RuntimeError, match="read only"):
        averaged.update_parameters(model)
    assert averaged.module.bias.get_value().tolist() == [1, 1]
    assert averaged.module.kernel.get_value().tolist() == [[1, 1]]
    assert averaged.n_averaged == 0


def test_bad_inputs(torch: Any) -> None:
    for lib in (swa_utils, torch.optim.swa_utils):
        for make in (lib.get_ema_avg_fn, lib.get_ema_multi_avg_fn):
            with pytest.raises(ValueError, match=r"Invalid decay value 1\.5 provided"):
                make(1.5)
    with pytest.raises(ValueError, match=r"Invalid decay value -0\.1 provided"):
        F.ema(-0.1)
    with pytest.raises(AssertionError, match="Only one of avg_fn and multi_avg_fn"):
        swa_utils.AveragedModel([jnp.ones(1)], avg_fn=max, multi_avg_fn=max)
    averaged = swa_utils.AveragedModel({"a": jnp.ones(2), "b": jnp.ones(3)})
    for wrong in ({"a": jnp.ones(2)}, {"a": jnp.ones(2), "b": jnp.ones(4)}):
        with pytest.raises(ValueError, match=r"differ in \['b'\]"):
            averaged.update_parameters(wrong)
    returns_nothing = swa_utils.AveragedModel([jnp.ones(1)], multi_avg_fn=lambda old, new, n: None)  # pyright: ignore
    returns_nothing.update_parameters([jnp.ones(1)])
    with pytest.raises(TypeError, match="must return a list of 1 arrays"):
        returns_nothing.update_parameters([jnp.ones(1)])
    with pytest.raises(TypeError, match=r"takes a flax\.nnx module, got list"):
        swa_utils.update_bn([], [jnp.ones(1)])


# --- The pure functions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ema", "swa"])
def test_the_pure_functions_agree(name: str, x64: None) -> None:
    pure, function = {
        "ema": (F.ema(0.9), swa_utils.get_ema_avg_fn(0.9)),
        "swa": (F.swa(), swa_utils.get_swa_avg_fn()),
    }[name]
    averaged = swa_utils.AveragedModel([jnp.asarray(value) for value in WEIGHTS[0]], avg_fn=function)
    state = pure.init([jnp.asarray(value) for value in WEIGHTS[0]])
    for values in WEIGHTS:
        averaged.update_parameters([jnp.asarray(value) for value in values])
        state = jax.jit(pure.update)([jnp.asarray(value) for value in values], state)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-14), averaged.module, pure.params(state))
    stacked = [jnp.stack([jnp.asarray(values[index]) for values in WEIGHTS]) for index in range(3)]
    start = pure.init([jnp.asarray(value) for value in WEIGHTS[0]])
    scanned, _ = jax.lax.scan(lambda carry, params: (pure.update(params, carry), None), start, stacked)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-14), scanned.average, state.average)
    assert int(scanned.n_averaged) == 6


def test_a_decay_may_be_a_schedule_or_vary_under_vmap() -> None:
    warm = F.ema(lambda count: jnp.minimum(0.9, (1 + count) / (10 + count)))
    state = warm.init(jnp.zeros(()))
    expected = 0.0
    for index in range(5):
        state = jax.jit(warm.update)(jnp.asarray(float(index)), state)
        decay = min(0.9, (1 + index) / (10 + index))
        expected = float(index) if index == 0 else decay * expected + (1 - decay) * index
    assert float(warm.params(state)) == pytest.approx(expected, rel=1e-6)

    def last(decay: Any) -> Any:
        mean = F.ema(decay)
        state = mean.update(jnp.asarray(0.0), mean.init(jnp.asarray(0.0)))
        return mean.params(mean.update(jnp.asarray(1.0), state))

    np.testing.assert_allclose(jax.vmap(last)(jnp.array([0.1, 0.9])), [0.9, 0.1], rtol=1e-6)


@pytest.mark.parametrize("name", ["avg_fn", "multi_avg_fn"])
def test_an_average_that_is_no_function_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be a function, .* got 0.99"):
        swa_utils.AveragedModel({"w": jnp.ones(2)}, **{name: 0.99})
