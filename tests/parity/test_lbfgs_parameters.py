"""LBFGS takes parameters of every kind, and schedulers, hooks and subclasses work as with any optimizer."""

import itertools
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lbfgs_problems import WOLFE, problem, rosenbrock, rosenbrock_of_x, state_of

import optimjax as optim
from optimjax import functional as F

# --- Kinds of parameters --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("single", [False, pytest.param(True, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("options", [{"lr": 0.1}, WOLFE], ids=["fixed", "wolfe"])
def test_complex_mixed_and_empty_parameters_are_pytorchs(torch: Any, options: dict[str, Any], single: bool) -> None:
    rng = np.random.default_rng(0)
    values = [
        rng.standard_normal((2, 3)),
        rng.standard_normal((2, 2)) + 1j * rng.standard_normal((2, 2)),
        np.zeros((0, 4)),
        rng.standard_normal(()).astype(np.float32 if single else np.float64),
        rng.standard_normal(3),
        (rng.standard_normal(2) + 1j * rng.standard_normal(2)).astype(np.complex64 if single else np.complex128),
    ]

    def loss(params: Sequence[Any]) -> Any:
        a, c, _, s, _, z = params
        mixed = (c @ c * (2 - 1j)).real.sum() + (z * z.conj()).real.sum() + ((z - 1j) ** 2).real.sum() ** 2
        return (a**2).sum() + (c.imag**4).sum() + (c.real**2).sum() * 3 + mixed + (s - 2) ** 2 * a.sum() ** 2

    ours = optim.LBFGS([jnp.asarray(v) for v in values], max_iter=5, **options)
    tensors = [torch.nn.Parameter(torch.from_numpy(np.array(v))) for v in values]
    theirs = torch.optim.LBFGS(tensors, max_iter=5, **options)

    def closure() -> Any:
        theirs.zero_grad()
        value = loss(tensors)
        value.backward()
        return value

    for _ in range(3):
        with jax.numpy_dtype_promotion("standard"):  # of which the loss makes use
            ours.step(loss)
        theirs.step(closure)
    for mine, tensor in zip(ours.params, tensors, strict=True):
        assert mine.dtype == tensor.detach().numpy().dtype
        np.testing.assert_allclose(mine, tensor.detach().numpy(), rtol=1e-6 if single else 1e-10)
    np.testing.assert_array_equal(ours.params[4], values[4])
    state = theirs.state[tensors[0]]
    assert state_of(ours)["func_evals"] == state["func_evals"]
    np.testing.assert_allclose(state_of(ours)["d"], state["d"].numpy(), rtol=1e-4, atol=1e-6)
    assert list(ours.state) == [ours.param_groups[0]["params"][0]]


def test_frozen_and_absent_parameters_have_a_zero_gradient() -> None:
    a, frozen, absent, b = (optim.Parameter(jnp.array([2.0, 3.0]), name=name) for name in "afcb")
    frozen.requires_grad = False
    optimizer = optim.LBFGS([frozen, a, absent, b], **WOLFE)
    held = frozen.value
    optimizer.step(lambda params: (params[1] ** 2).sum() + ((params[3] * params[0] - 6) ** 2).sum())
    np.testing.assert_allclose(a, 0, atol=1e-3)
    np.testing.assert_allclose(b, 6 / held, rtol=1e-3)
    assert frozen.value is held
    assert absent.value.tolist() == [2, 3]
    d = state_of(optimizer)["d"]
    assert d.shape == (8,)
    assert [bool(d[i : i + 2].any()) for i in (0, 2, 4, 6)] == [False, True, False, True]


def test_half_precision_computes_in_float32() -> None:
    optimizer = optim.LBFGS({"x": jnp.array([1.0, -2.0], jnp.bfloat16)}, **WOLFE)
    optimizer.step(lambda params: ((params["x"] - 0.5) ** 2).sum())
    assert optimizer.params["x"].dtype == jnp.bfloat16
    assert state_of(optimizer)["d"].dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(optimizer.params["x"], np.float32), 0.5, atol=2e-3)


class Network(nnx.Module):
    """With batch statistics, random state and a count of its calls."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x: Any) -> Any:
        self.calls.set_value(self.calls.get_value() + 1)
        return self.dropout(self.norm(self.linear(x))).sum(-1)


def network_loss(model: Network, x: Any, y: Any) -> Any:
    return ((model(x) - y) ** 2).mean()


@pytest.mark.parametrize("options", [{"lr": 0.01}, WOLFE], ids=["fixed", "wolfe"])
@pytest.mark.parametrize("boxes", [False, True], ids=["module", "boxes"])
def test_every_evaluation_changes_a_module(options: dict[str, Any], boxes: bool) -> None:
    x, y = jnp.arange(24.0).reshape(8, 3) % 5, jnp.arange(8.0)
    model = Network(nnx.Rngs(0))
    optimizer = optim.LBFGS(optim.named_parameters(model) if boxes else model, max_iter=4, **options)
    first = optimizer.step(network_loss, *([model] if boxes else []), x, y)
    evaluations = state_of(optimizer)["func_evals"]
    assert evaluations > 2
    assert model.calls.get_value() == evaluations
    assert model.dropout.rngs.count.get_value() == evaluations

    twin = Network(nnx.Rngs(0))
    np.testing.assert_allclose(network_loss(twin, x, y), first, rtol=1e-5)
    mean = twin.norm.mean.get_value()
    assert not np.allclose(model.norm.mean.get_value(), mean)  # later evaluations have moved it on
    assert [name for name, _ in optim.named_parameters(model)] == optimizer.param_groups[0]["param_names"]


def test_trees_with_other_leaves() -> None:
    params = {"x": jnp.array([-1.2, 1.0]), "n": 3, "i": jnp.arange(2)}
    optimizer = optim.LBFGS(params, **WOLFE, max_iter=100)
    optimizer.step(rosenbrock_of_x)
    np.testing.assert_allclose(optimizer.params["x"], 1, rtol=1e-2)
    assert optimizer.params["n"] == 3


def test_arguments_are_traced(compilations: Any) -> None:
    optimizer = optim.LBFGS(jnp.zeros(2), **WOLFE)
    loss_fn = lambda x, target: ((x - target) ** 2).sum()  # noqa: E731
    optimizer.step(loss_fn, jnp.array([1.0, 2.0]))
    before = compilations()
    optimizer.step(loss_fn, jnp.array([3.0, 4.0]))
    assert compilations() == before
    np.testing.assert_allclose(optimizer.params, [3, 4], rtol=1e-4)


def test_parameters_can_be_donated() -> None:
    optimizer = optim.LBFGS([jnp.array([-1.2, 1.0])], **WOLFE)
    kept, twin = optimizer.params[0], optim.LBFGS([jnp.array([-1.2, 1.0])], **WOLFE)
    optimizer.step(problem("rosenbrock2").ours)
    assert not kept.is_deleted()
    optimizer.donate = True
    given = optimizer.params[0]
    optimizer.step(problem("rosenbrock2").ours)
    assert given.is_deleted()
    for _ in range(2):
        twin.step(problem("rosenbrock2").ours)
    np.testing.assert_array_equal(optimizer.params[0], twin.params[0])


def test_parameters_stay_on_their_mesh() -> None:
    """Each spread as it was, though all are one vector in between; in another process, which has more devices."""
    program = """
        import jax, jax.numpy as jnp, numpy as np
        import optimjax as optim

        jax.config.update("jax_num_cpu_devices", 4)

        def loss_fn(params):
            return jnp.sum(jnp.abs(jnp.ones((5, 8)) @ params["w"] + params["b"]) ** 2)

        def by_class(params):
            optimizer = optim.LBFGS(params, lr=0.1)
            for _ in range(2):
                optimizer.step(loss_fn)
            return optimizer.params

        def by_function(params):
            algorithm = optim.functional.lbfgs(lr=0.1)
            return algorithm.update(params, None, algorithm.init(params), loss_fn=loss_fn)[0]

        whole = {"w": jnp.ones((8, 4)), "b": jnp.full(4, 1 + 1j)}
        for kind in jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit:
            mesh = jax.make_mesh((4,), ("i",), axis_types=(kind,))
            specs = {"w": jax.P("i", None), "b": jax.P()}
            spread = {k: jax.device_put(v, jax.NamedSharding(mesh, specs[k])) for k, v in whole.items()}
            for face in by_class, by_function:
                with jax.set_mesh(mesh):
                    ours = face(spread)
                for name, expected in face(whole).items():
                    np.testing.assert_allclose(ours[name], expected, atol=1e-6)
                    assert ours[name].sharding.is_equivalent_to(spread[name].sharding, expected.ndim), (kind, name)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=300)


# --- As any optimizer -----------------------------------------------------------------------------------------------


def test_schedulers_and_hooks() -> None:
    optimizer = optim.LBFGS([jnp.array([100.0])], lr=0.1, max_iter=1)
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    calls = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: calls.append(len(args)))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: calls.append(-len(args)))
    loss_fn = lambda params: (params[0] ** 2).sum() / 2  # noqa: E731
    optimizer.step(loss_fn)
    scheduler.step()
    np.testing.assert_allclose(optimizer.params[0], 99.9, rtol=1e-6)
    optimizer.step(loss_fn)
    np.testing.assert_allclose(optimizer.params[0], 99.9 * 0.95, rtol=1e-6)
    assert calls == [2, -2, 2, -2]


def test_a_subclass_has_both_faces() -> None:
    class Twice(optim.LBFGS):
        def __init__(self, params: Any, lr: float = 0.5):
            super().__init__(params, lr, max_iter=1)

        def step(self, loss_fn: Any = None, *args: Any) -> Any:
            super().step(loss_fn, *args)
            return super().step(loss_fn, *args)

    calls = []
    optimizer = Twice([jnp.array([1.0])])
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    optimizer.step(lambda params: (params[0] ** 2).sum())
    assert state_of(optimizer)["n_iter"] == 2
    assert len(calls) == 1
    algorithm = F.factory(Twice)()
    params = jnp.array([1.0])
    _, state = algorithm.update(params, None, algorithm.init(params), loss_fn=lambda p: (p**2).sum())
    assert state.n_iter == 1


def test_inside_jit() -> None:
    @jax.jit
    def run(x: Any, lr: Any) -> Any:
        optimizer = optim.LBFGS({"x": x}, lr=lr, **WOLFE)
        loss = optimizer.step(rosenbrock_of_x)
        return loss, optimizer.params["x"]

    optimizer = optim.LBFGS({"x": jnp.array([-1.2, 1.0])}, **WOLFE)
    loss = optimizer.step(rosenbrock_of_x)
    for ours, theirs in zip(run(jnp.array([-1.2, 1.0]), 1.0), (loss, optimizer.params["x"]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)


@pytest.mark.parametrize(("history", "line_search_fn"), list(itertools.product([2, 20], [None, "strong_wolfe"])))
def test_the_history_is_updated_in_place(usual: Any, history: int, line_search_fn: str | None) -> None:
    n = 10_000
    algorithm = F.lbfgs(history_size=history, line_search_fn=line_search_fn)
    x = jnp.ones(n)
    update = jax.jit(
        lambda x, state: algorithm.update(x, None, state, loss_fn=lambda x: rosenbrock(jnp, x))[::-1],
        donate_argnums=(0, 1),
    )
    memory = update.lower(x, algorithm.init(x)).compile(usual).memory_analysis()
    assert memory.temp_size_in_bytes < 10 * x.nbytes  # whatever the history
