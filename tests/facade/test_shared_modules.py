"""In a module of nnx only parameters change, whether they are tied or two optimizers share them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from networks import VALUES, Net, batch, module_loss

import optimjax as optim


class Tied(nnx.Module):
    def __init__(self) -> None:
        self.rngs = nnx.Rngs(dropout=1)
        self.embed = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        self.out = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.out.kernel = self.embed.kernel
        self.dropout = nnx.Dropout(0.5, rngs=self.rngs)

    def __call__(self, x: Any) -> Any:
        return self.out(self.dropout(self.norm(self.embed(x))))


def test_tied_variables_count_once_and_other_variables_not_at_all() -> None:
    model = Tied()
    optimizer = optim.SGD(model, lr=0.1, momentum=0.9)
    names = optimizer.param_groups[0]["param_names"]
    assert sorted(names) == ["embed.bias", "embed.kernel", "norm.bias", "norm.scale", "out.bias"]

    others = nnx.state(model, nnx.Not(nnx.Param))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.filter_state(others, nnx.BatchStat)))
    counts = [np.asarray(count) for count in jax.tree.leaves(nnx.state(model, nnx.RngCount))]
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    old = np.asarray(model.embed.kernel)
    optimizer.step(grads)
    np.testing.assert_allclose(np.asarray(model.embed.kernel), old - 0.1, rtol=1e-6)  # once, not twice
    assert model.out.kernel is model.embed.kernel
    after = nnx.to_pure_dict(nnx.filter_state(nnx.state(model, nnx.Not(nnx.Param)), nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    for count, now in zip(counts, jax.tree.leaves(nnx.state(model, nnx.RngCount)), strict=True):
        np.testing.assert_array_equal(count, now)


def test_two_optimizers_on_one_module() -> None:
    """As in a GAN: each has its state and its parameters, and leaves the other's alone."""

    def train(interleaved: bool) -> list[Any]:
        net = Net([np.float32(v) for v in VALUES])
        x, y = (np.float32(a) for a in batch(0))
        first = optim.Adam(optim.parameters(net.base), lr=0.1)
        second = optim.SGD(optim.parameters(net.head), lr=0.1, momentum=0.9)
        trace = []
        for _ in range(3):
            head = np.asarray(net.head.kernel)
            first.zero_grad()
            first.backward(module_loss, net, x, y)
            assert all(box.grad is None for box in optim.parameters(net.head)) or interleaved
            first.step()
            np.testing.assert_array_equal(head, net.head.kernel)
            base = np.asarray(net.base.kernel)
            if interleaved:
                second.zero_grad()
                second.backward(module_loss, net, x, y)
                second.step()
                np.testing.assert_array_equal(base, net.base.kernel)
                assert not np.array_equal(head, net.head.kernel)
            trace.append(base)
        assert len(first.state) == 2
        assert len(second.state) == (1 if interleaved else 0)
        return trace

    apart, together = train(False), train(True)
    np.testing.assert_array_equal(apart[0], together[0])
    assert not np.array_equal(apart[1], together[1])  # through the loss, not through the optimizer


def test_two_optimizers_on_the_same_parameters_share_gradients_not_state() -> None:
    net = Net([np.float32(v) for v in VALUES])
    first, second = optim.Adam(net, lr=0.1), optim.Adam(net, lr=0.1)
    first.backward(module_loss, *(np.float32(a) for a in batch(0)))
    first.step()
    assert not second.state
    second.step()  # the gradient is the parameter's, as in PyTorch
    assert [state["step"] for state in second.state.values()] == [1, 1, 1]
    second.zero_grad()
    assert all(box.grad is None for box in optim.parameters(net))
