"""What tests with models of PyTorch and of Flax share."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

__all__ = ["Twin", "attention", "twin_of_pytorch"]


def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    """Attention in the precision of its arguments: that of ``jax.nn`` is in float32 at most."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.sqrt(jnp.asarray(query.shape[-1], query.dtype))
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)


class Twin(nnx.Module):
    """A convolution, a norm, attention over what it sees, another norm, and two matrices; square wherever it can be.

    The gradients of the biases of keys, and before a norm, are nothing but rounding: ``bias=False`` leaves those out.
    """

    def __init__(self, bias: bool = True) -> None:
        double: Any = dict(param_dtype=float, rngs=nnx.Rngs(0))
        self.conv = nnx.Conv(2, 4, (3, 3), padding="VALID", use_bias=bias, **double)
        self.norm = nnx.BatchNorm(4, epsilon=1e-5, momentum=0.9, use_running_average=False, **double)
        for statistic in (self.norm.mean, self.norm.var):  # which Flax makes in float32
            statistic.set_value(statistic.get_value().astype(float))
        self.attention = nnx.MultiHeadAttention(2, 4, use_bias=bias, decode=False, attention_fn=attention, **double)
        self.norm2 = nnx.LayerNorm(4, epsilon=1e-5, **double)
        self.hidden = nnx.Linear(4, 4, **double)
        self.head = nnx.Linear(4, 1, **double)

    def __call__(self, x: Any) -> Any:
        x = jnp.tanh(self.norm(self.conv(x)))
        x = x.reshape(len(x), -1, 4)
        x = self.norm2(x + self.attention(x)).mean(axis=1)
        return self.head(jnp.tanh(self.hidden(x)))


def twin_of_pytorch(torch: Any, bias: bool = True) -> Any:
    """The same in PyTorch."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = torch.nn.Conv2d(2, 4, 3, bias=bias)
            self.norm = torch.nn.BatchNorm2d(4)
            self.attention = torch.nn.MultiheadAttention(4, 2, bias=bias, batch_first=True)
            self.norm2 = torch.nn.LayerNorm(4)
            self.hidden = torch.nn.Linear(4, 4)
            self.head = torch.nn.Linear(4, 1)

        def forward(self, x: Any) -> Any:
            x = torch.tanh(self.norm(self.conv(x)))
            x = x.permute(0, 2, 3, 1).reshape(len(x), -1, 4)
            x = self.norm2(x + self.attention(x, x, x, need_weights=False)[0]).mean(dim=1)
            return self.head(torch.tanh(self.hidden(x)))

    return Net()
