"""A user's subclass may bring a rule, override or extend `step`, and take arguments of its own."""

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import VALUES, batch, forward, mse

import optimjax as optim
from optimjax.rule import LearningRate, Rule


class SignSlots(NamedTuple):
    previous: Any


class SignScalars(NamedTuple):
    lr: Any


class SignSGD(optim.Optimizer):
    """A rule of a user: steps against the sign of the gradient, halved where the sign has changed."""

    rule = Rule(
        slots=SignSlots,
        init=lambda param, hyper, flags: SignSlots(jnp.zeros_like(param)),
        scalars=lambda step, hyper: SignScalars(hyper.lr),
        update=lambda param, grad, slots, scalars, flags: (
            param - scalars.lr * jnp.where(grad * slots.previous < 0, 0.5, 1.0) * jnp.sign(grad),
            SignSlots(grad),
        ),
    )

    def __init__(self, params: Any, lr: LearningRate = 0.1):
        super().__init__(params, dict(lr=lr))


def test_a_subclass_with_a_rule_gets_both_faces(compilations: Any) -> None:
    def loss(params: Any, target: Any) -> Any:
        return jnp.sum((params["w"] - target) ** 2)

    start, target = {"w": jnp.array([0.05, 1.0])}, jnp.zeros(2)
    expected = [[-0.05, 0.9], [0.0, 0.8]]
    optimizer = SignSGD(start)
    optimizer.step(loss, target)
    np.testing.assert_allclose(optimizer.params["w"], expected[0], atol=1e-6)
    optimizer.backward(loss, target)
    optimizer.step()
    np.testing.assert_allclose(optimizer.params["w"], expected[1], atol=1e-6)
    assert optimizer.state_dict()["state"][0].keys() == {"step", "previous"}
    assert repr(optimizer) == "SignSGD (\nParameter Group 0\n    lr: 0.1\n)"
    before = compilations()
    optimizer.param_groups[0]["lr"] = 0.05
    optimizer.step()
    assert compilations() == before

    sign_sgd = optim.functional.factory(SignSGD)(lr=0.1)
    params, state = start, sign_sgd.init(start)
    for row in expected:
        params, state = jax.jit(sign_sgd.update)(params, jax.grad(loss)(params, target), state)
        np.testing.assert_allclose(params["w"], row, atol=1e-6)
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        SignSGD(start, lr=-1)


class PlainSGD(optim.Optimizer):
    """SGD as old PyTorch tutorials write it: a loop over groups and parameters."""

    def __init__(self, params: Any, lr: Any, momentum: Any = 0, weight_decay: Any = 0, nesterov: bool = False):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov))

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            loss = closure()
        for group in self.param_groups:
            weight_decay = group["weight_decay"]
            momentum = group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                d_p = p.grad
                if weight_decay != 0:
                    d_p = d_p + weight_decay * p.value
                if momentum != 0:
                    param_state = self.state[p]
                    if "momentum_buffer" not in param_state:
                        buf = param_state["momentum_buffer"] = d_p
                    else:
                        buf = param_state["momentum_buffer"] = momentum * param_state["momentum_buffer"] + d_p
                    d_p = d_p + momentum * buf if group["nesterov"] else buf
                p.value = p.value - group["lr"] * d_p
        return loss


def test_a_subclass_may_take_arguments_of_its_own() -> None:
    """They are not hyperparameters of the rule, which does not know them."""

    class Clipped(optim.Adam):
        def __init__(self, params: Any, lr: LearningRate = 0.1, clip: float = 0.5, *, log: Any = print):
            super().__init__(params, lr=lr)
            self.clip, self.log = clip, log

        def step(self, *args: Any) -> Any:
            optim.clip_grad_value_(self, self.clip)
            return super().step(*args)

    class Plain(optim.Optimizer):
        def __init__(self, params: Any, transform: Any = jnp.sign):
            super().__init__(params, dict(transform=transform))

    box = optim.Parameter(jnp.ones(2))
    optimizer = Clipped([box], clip=0.25)
    box.grad = jnp.array([1.0, 0.1])
    optimizer.step()
    np.testing.assert_allclose(optimizer.state[box]["exp_avg"], [0.025, 0.01], rtol=1e-6)
    assert "clip" not in optimizer.param_groups[0]
    optim.functional.factory(Clipped)(lr=0.2).init([jnp.ones(2)])
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        Clipped([box], lr=-1)
    assert Plain([box]).param_groups[0]["transform"] is jnp.sign
    with pytest.raises(NotImplementedError, match="only a rule has a functional form"):
        _ = Plain([box]).algorithm


def test_an_optimizer_around_another_need_not_call_init() -> None:
    """As wrappers written for PyTorch do, such as Lookahead."""

    class Around(optim.Optimizer):
        def __init__(self, inner: Any):
            self.inner = inner
            self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, inner.defaults

        def step(self) -> None:
            self.inner.step()

    box = optim.Parameter(jnp.ones(2))
    optimizer = Around(optim.SGD([box], lr=0.5, momentum=0.9))
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(2):
        box.grad = jnp.ones(2)
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(box.value, 1 - 0.5 - 0.25 * 1.9, rtol=1e-6)
    assert len(calls) == 2
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.125
    copy.deepcopy(optimizer).step()


@pytest.mark.usefixtures("x64")
def test_a_subclass_that_overrides_step_in_python() -> None:
    """It moves as `optim.SGD` does, with hooks, closure, state dict and scheduler."""
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
    arrays = [jnp.asarray(v) for v in VALUES]
    plain, ours = PlainSGD(list(map(optim.Parameter, arrays)), **options), optim.SGD(arrays, **options)
    calls: list[str] = []
    plain.register_step_pre_hook(lambda o, args, kwargs: calls.append("pre"))
    plain.register_step_post_hook(lambda o, args, kwargs: calls.append("post"))
    scheduler = optim.lr_scheduler.StepLR(plain, 2)

    def loss(params: Any, x: Any, y: Any) -> Any:
        return mse(forward(*params, x), y)

    for step in range(4):

        def closure(step: int = step) -> Any:
            plain.zero_grad()
            return plain.backward(loss, *batch(step))

        ours.param_groups[0]["lr"] = plain.param_groups[0]["lr"]
        np.testing.assert_allclose(plain.step(closure), ours.step(loss, *batch(step)), rtol=1e-12)
        scheduler.step()
    for a, b in zip(plain.params, ours.params, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert calls == ["pre", "post"] * 4

    resumed = PlainSGD([optim.Parameter(value) for value in plain.params], **options)
    resumed.load_state_dict(plain.state_dict())
    for optimizer in (plain, resumed):
        optimizer.zero_grad()
        optimizer.backward(loss, *batch(9))
        optimizer.step()
    for a, b in zip(plain.params, resumed.params, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_subclass_that_extends_step_runs_hooks_once() -> None:
    class Logged(optim.SGD):
        def step(self, *args: Any) -> Any:
            log.append("step")
            return super().step(*args)

    log: list[str] = []
    optimizer = Logged([jnp.ones(2)], lr=0.1)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: log.append("pre"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: log.append("post"))
    optimizer.step([jnp.ones(2)])
    assert log == ["pre", "step", "post"]
    np.testing.assert_allclose(optimizer.params[0], 0.9, rtol=1e-6)


def test_a_subclass_without_rule_and_step_says_what_it_lacks() -> None:
    class Nothing(optim.Optimizer):
        def __init__(self, params: Iterable[Any]):
            super().__init__(params, {})

    with pytest.raises(NotImplementedError, match="Nothing has no `rule`: it must set one or override step"):
        Nothing([jnp.ones(2)]).step([jnp.ones(2)])
