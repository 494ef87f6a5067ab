"""Clipping by the norm and skipped steps, within the step: the loop of a PyTorch user, number by number."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from reference import Result, _result, assert_same, random_gradients, random_parameters

import optimjax as optim

pytestmark = pytest.mark.usefixtures("x64")
DENSE = [case for case in CASES if not case.sparse and not case.takes_loss]
every_case = pytest.mark.parametrize("case", DENSE, ids=str)
LIMIT = 0.7
NOT_FINITE = {0: math.inf, 3: math.nan, 4: -math.inf}  # steps with such a gradient; the first one among them


def run(case: Case, seed: int = 0) -> tuple[Any, Any]:
    """Parameters and gradients of some steps; some norms are above the limit, and some gradients not finite."""
    shapes = case.shapes([((3, 2), np.float64), ((4,), np.float64), ((), np.float64)])
    params = random_parameters(shapes, seed)
    grads = [
        [np.asarray(grad * (0.05 if index % 3 == 1 else 1.0)) for grad in step]
        for index, step in enumerate(random_gradients(params, 8, seed + 1))
    ]
    for step, value in NOT_FINITE.items():
        grads[step][step % 2] = grads[step][step % 2].copy()
        grads[step][step % 2][(0,) * grads[step][step % 2].ndim] = value
    norms = [np.sqrt(sum(np.sum(g**2) for g in step)) for step in grads]
    assert any(norm < LIMIT for norm in norms), norms
    assert any(LIMIT < norm < math.inf for norm in norms), norms
    return params, grads


def pytorch(torch: Any, case: Case, options: Mapping[str, Any], params: Any, grads: Any) -> tuple[Result, list[float]]:
    tensors = [torch.nn.Parameter(torch.from_numpy(p.copy())) for p in params]
    optimizer, norms = case.reference(torch)(tensors, **case.theirs(options)), []
    for step in grads:
        for tensor, grad in zip(tensors, step, strict=True):
            tensor.grad = torch.from_numpy(grad.copy())
        norm = torch.nn.utils.clip_grad_norm_(tensors, LIMIT)
        norms.append(float(norm))
        if torch.isfinite(norm):
            optimizer.step()
    state = [{name: np.asarray(value) for name, value in optimizer.state[t].items()} for t in tensors]
    return Result([t.detach().numpy() for t in tensors], state), norms


def by_gradients(optimizer: Any, grads: Any) -> None:
    optimizer.step(grads)


def by_parameters(optimizer: Any, grads: Any) -> None:
    for parameter, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        parameter.grad = grad
    optimizer.step()


def product(params: Any, grads: Any) -> Any:
    return sum(jnp.sum(p * g) for p, g in zip(params, grads, strict=True))


def by_loss(optimizer: Any, grads: Any) -> None:
    optimizer.step(product, grads)


@every_case
@pytest.mark.parametrize("step", [by_gradients, by_parameters, by_loss])
@pytest.mark.parametrize("donate", [False, True], ids=["copying", "in place"])
def test_the_class_is_the_loop_of_pytorch(torch: Any, case: Case, step: Callable[..., None], donate: bool) -> None:
    params, grads = run(case)
    for options in case.variants():
        theirs, norms = pytorch(torch, case, options, params, grads)
        optimizer = case.optimizer(
            [jnp.asarray(p) for p in params], **case.ours(options), max_grad_norm=LIMIT, skip_nonfinite=True
        )
        optimizer.donate = donate
        for index, given in enumerate(grads):
            step(optimizer, [jnp.asarray(g) for g in given])
            np.testing.assert_allclose(optimizer.grad_norm, norms[index], rtol=1e-12)
            assert optimizer.skipped == sum(at <= index for at in NOT_FINITE)
        state = [dict(optimizer.state[p]) for p in optimizer.param_groups[0]["params"]]
        assert_same(Result(optimizer.params, state), theirs)


@every_case
def test_the_functional_form_is_the_loop_of_pytorch(torch: Any, case: Case) -> None:
    params, grads = run(case)
    columns = [np.stack([step[i] for step in grads]) for i in range(len(params))]
    for options in case.variants():
        theirs, _ = pytorch(torch, case, options, params, grads)
        algorithm = case.factory(**case.ours(options), max_grad_norm=LIMIT, skip_nonfinite=True)

        @jax.jit
        def train(params: Any, algorithm: Any = algorithm) -> Any:
            start = params, algorithm.init(params)
            return jax.lax.scan(lambda carry, g: (algorithm.update(carry[0], g, carry[1]), None), start, columns)[0]

        values, state = train([jnp.asarray(p) for p in params])
        assert state._fields[:2] == ("step", "skipped")
        assert (state.step, state.skipped) == (len(grads) - len(NOT_FINITE), len(NOT_FINITE))
        plain = state._asdict()
        plain.pop("skipped")
        ours = _result(values, type("Plain", (), {"_asdict": lambda self, plain=plain: dict(plain)})())
        assert_same(ours, theirs, with_step=algorithm.definition.arithmetic.counts_steps)


def test_sparse_gradients(torch: Any) -> None:
    from jax.experimental.sparse import BCOO

    def make(**options: Any) -> Any:
        return optim.SparseAdam([jnp.linspace(-1.0, 1.0, 12).reshape(6, 2)], lr=0.1, **options)

    ours, reference = make(max_grad_norm=LIMIT, skip_nonfinite=True), make()
    for step in range(6):
        values = np.random.default_rng(step).normal(size=(3, 2))
        indices = jnp.array([[0], [4], [4]])  # which counts as the sum
        total = np.sqrt(np.sum(values[0] ** 2) + np.sum((values[1] + values[2]) ** 2))
        if step == 2:
            values[1, 1] = np.nan
        else:
            scaled = values * min(1, LIMIT / (total + 1e-6))
            reference.step([BCOO((jnp.asarray(scaled), indices), shape=(6, 2))])
        ours.step([BCOO((jnp.asarray(values), indices), shape=(6, 2))])
    np.testing.assert_allclose(ours.params[0], reference.params[0], rtol=1e-12)
    assert ours.state_dict()["state"][0]["step"] == 5
