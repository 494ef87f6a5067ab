"""Averages of models: PyTorch's numbers, every kind of model, and the pure functions."""

import copy
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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


class Net(nnx.Module):
    def __init__(self, rngs: Any):
        self.linear = nnx.Linear(2, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.dropout(self.norm(self.linear(x)))


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
    before = second.module
    for wrong in ({"n_averaged": 1}, saved | {"module.1": np.ones(5)}, saved | {"module.9": np.ones(5)}):
        with pytest.raises(ValueError, match=r"module\.\d"):
            second.load_state_dict(wrong)
    assert second.module is before


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


# --- Batch statistics -----------------------------------------------------------------------------------------------


def test_update_bn_is_the_mean_over_batches(torch: Any) -> None:
    model = Net(nnx.Rngs(0))
    model.norm.use_running_average = True
    batches = [np.random.default_rng(k).normal(size=(4, 2)).astype(np.float32) + k for k in range(3)]
    swa_utils.update_bn([(jnp.asarray(batch), None) for batch in batches], model)
    hidden = [np.asarray(model.linear(batch)) for batch in batches]
    np.testing.assert_allclose(model.norm.mean.get_value(), np.mean([h.mean(0) for h in hidden], 0), rtol=1e-5)
    np.testing.assert_allclose(model.norm.var.get_value(), np.mean([h.var(0) for h in hidden], 0), rtol=1e-4)
    assert model.norm.momentum == 0.99
    assert model.norm.use_running_average is True
    assert model.dropout.deterministic is False

    reference = torch.nn.BatchNorm1d(3)
    torch.optim.swa_utils.update_bn([torch.tensor(h) for h in hidden], reference)
    np.testing.assert_allclose(model.norm.mean.get_value(), reference.running_mean.numpy(), rtol=1e-5)
    # PyTorch keeps the unbiased variance of a batch, flax the biased one.
    np.testing.assert_allclose(model.norm.var.get_value() * 4 / 3, reference.running_var.numpy(), rtol=1e-4)


def test_update_bn_leaves_a_model_without_batch_norm_alone_and_restores_after_an_error() -> None:
    linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    swa_utils.update_bn(iter([None]), linear)  # not even called
    model = Net(nnx.Rngs(0))
    with pytest.raises(AttributeError, match="ndim"):
        swa_utils.update_bn([None], model)
    assert model.norm.momentum == 0.99
    averaged = swa_utils.AveragedModel(model)
    swa_utils.update_bn([jnp.ones((4, 2))], averaged)
    assert not np.allclose(averaged.module.norm.mean.get_value(), model.norm.mean.get_value())


# --- SWALR ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize("epochs", [0, 1, 5])
@pytest.mark.parametrize("swa_lr", [0.05, [0.02, 0.3]])
def test_swalr_is_pytorchs(strategy: str, epochs: int, swa_lr: Any, torch: Any) -> None:
    def trace(lib: Any, utils: Any, parameter: Any) -> Any:
        groups = [{"params": [parameter()], "lr": 0.1}, {"params": [parameter()], "lr": 0.4}]
        optimizer = lib.SGD(groups, lr=1.0)
        scheduler = utils.SWALR(optimizer, swa_lr, anneal_epochs=epochs, anneal_strategy=strategy)
        rates = []
        for _ in range(12):
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        return rates, set(scheduler.state_dict())

    ours = trace(optim, swa_utils, lambda: optim.Parameter(jnp.ones(())))
    assert ours == trace(torch.optim, torch.optim.swa_utils, lambda: torch.nn.Parameter(torch.ones(())))


def test_swalr_resumes_and_refuses() -> None:
    def make() -> Any:
        optimizer = optim.SGD([jnp.ones(2)], lr=0.4)
        return optimizer, swa_utils.SWALR(optimizer, 0.1, anneal_epochs=4)

    whole, scheduler = make()
    other, restored = make()
    for index in range(6):
        if index == 2:
            saved = copy.deepcopy((whole.state_dict(), scheduler.state_dict()))
            other.load_state_dict(saved[0])
            restored.load_state_dict(saved[1])
        for each in (scheduler, restored)[: 1 + (index >= 2)]:
            each.optimizer.step([jnp.ones(2)])
            each.step()
    assert scheduler.get_last_lr() == restored.get_last_lr() == [0.1]
    before = dict(whole.param_groups[0])
    for wrong in ({"anneal_strategy": "sin"}, {"anneal_epochs": -1}, {"swa_lr": [1.0, 2.0]}):
        with pytest.raises(ValueError, match=r"anneal_|swa_lr"):
            swa_utils.SWALR(whole, **{"swa_lr": 0.2, **wrong})
        assert whole.param_groups[0] == before


@pytest.mark.parametrize("name", ["avg_fn", "multi_avg_fn"])
def test_an_average_that_is_no_function_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be a function, .* got 0.99"):
        swa_utils.AveragedModel({"w": jnp.ones(2)}, **{name: 0.99})
