"""Each layer of ``flax.nnx`` with the weights of PyTorch's twin computes the same, and gives the weights back."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from torch_twins import attention

from optimjax.interop import torch as interop

RNGS = nnx.Rngs(0)
DOUBLE: Any = dict(param_dtype=float, rngs=RNGS)


class Twins(NamedTuple):
    """A layer of both libraries.

    Attributes:
      ours, theirs: make it; ``theirs`` is given ``torch.nn``.
      shape: of an input as we take it, with the channels last.
      channels_first: whether PyTorch takes them behind the batch.
      call: how ours is called, if otherwise than with the input.
    """

    ours: Callable[[], Any]
    theirs: Callable[[Any], Any]
    shape: tuple[int, ...]
    channels_first: bool = False
    call: Callable[[Any, Any], Any] = lambda layer, x: layer(x)


def with_second_bias(cell: Any, name: str, inputs: int, outputs: int) -> Any:
    setattr(cell, name, nnx.Linear(inputs, outputs, **DOUBLE))
    return cell


def lstm_cell_with_biases() -> Any:
    cell = nnx.LSTMCell(3, 4, **DOUBLE)
    for name in ("ii", "if_", "ig", "io"):
        with_second_bias(cell, name, 3, 4)
    return cell


def lstm() -> Any:
    return with_second_bias(nnx.OptimizedLSTMCell(3, 4, **DOUBLE), "dense_i", 3, 16)


def gru() -> Any:
    return with_second_bias(nnx.GRUCell(3, 4, **DOUBLE), "dense_h", 4, 12)


def one_step_of_lstm(cell: Any, x: Any) -> Any:
    (c, h), _ = cell((jnp.zeros((len(x), 4)), jnp.zeros((len(x), 4))), x)
    return h, c


def one_step(cell: Any, x: Any) -> Any:
    return cell(jnp.zeros((len(x), 4)), x)[1]


def batch_norm() -> Any:
    norm = nnx.BatchNorm(4, epsilon=1e-5, use_running_average=True, **DOUBLE)
    for statistic in (norm.mean, norm.var):  # which Flax makes in float32
        statistic.set_value(statistic.get_value().astype(float))
    return norm


TWINS = {
    "Linear": Twins(lambda: nnx.Linear(4, 4, **DOUBLE), lambda nn: nn.Linear(4, 4), (2, 4)),
    "LinearGeneral": Twins(
        lambda: nnx.LinearGeneral((4, 3), (2, 6), axis=(-2, -1), **DOUBLE),
        lambda nn: nn.Sequential(nn.Flatten(), nn.Linear(12, 12), nn.Unflatten(1, (2, 6))),
        (5, 4, 3),
    ),
    "Conv1d": Twins(
        lambda: nnx.Conv(2, 3, (3,), padding="VALID", **DOUBLE), lambda nn: nn.Conv1d(2, 3, 3), (2, 7, 2), True
    ),
    "Conv2d": Twins(
        lambda: nnx.Conv(3, 3, (3, 3), padding="VALID", **DOUBLE), lambda nn: nn.Conv2d(3, 3, 3), (2, 6, 5, 3), True
    ),
    "Conv2d in groups": Twins(
        lambda: nnx.Conv(4, 4, (2, 3), padding="VALID", feature_group_count=2, use_bias=False, **DOUBLE),
        lambda nn: nn.Conv2d(4, 4, (2, 3), groups=2, bias=False),
        (2, 6, 5, 4),
        True,
    ),
    "Conv3d": Twins(
        lambda: nnx.Conv(2, 2, (2, 2, 2), padding="VALID", **DOUBLE),
        lambda nn: nn.Conv3d(2, 2, 2),
        (1, 4, 3, 5, 2),
        True,
    ),
    "ConvTranspose1d": Twins(
        lambda: nnx.ConvTranspose(3, 3, (3,), strides=2, padding="VALID", **DOUBLE),
        lambda nn: nn.ConvTranspose1d(3, 3, 3, stride=2),
        (2, 4, 3),
        True,
    ),
    "ConvTranspose2d": Twins(
        lambda: nnx.ConvTranspose(3, 2, (3, 2), padding="VALID", **DOUBLE),
        lambda nn: nn.ConvTranspose2d(3, 2, (3, 2)),
        (2, 4, 5, 3),
        True,
    ),
    "ConvTranspose2d with transpose_kernel": Twins(
        lambda: nnx.ConvTranspose(2, 2, (3, 3), padding="VALID", transpose_kernel=True, **DOUBLE),
        lambda nn: nn.ConvTranspose2d(2, 2, 3),
        (2, 4, 5, 2),
        True,
    ),
    "ConvTranspose3d": Twins(
        lambda: nnx.ConvTranspose(2, 2, (2, 2, 2), padding="VALID", **DOUBLE),
        lambda nn: nn.ConvTranspose3d(2, 2, 2),
        (1, 3, 3, 3, 2),
        True,
    ),
    "LayerNorm": Twins(lambda: nnx.LayerNorm(4, epsilon=1e-5, **DOUBLE), lambda nn: nn.LayerNorm(4), (2, 4)),
    "RMSNorm": Twins(lambda: nnx.RMSNorm(4, epsilon=1e-5, **DOUBLE), lambda nn: nn.RMSNorm(4, eps=1e-5), (2, 4)),
    "GroupNorm": Twins(
        lambda: nnx.GroupNorm(4, num_groups=2, epsilon=1e-5, **DOUBLE), lambda nn: nn.GroupNorm(2, 4), (2, 3, 4), True
    ),
    "BatchNorm": Twins(
        batch_norm,
        lambda nn: nn.BatchNorm2d(4).eval(),
        (2, 3, 3, 4),
        True,
    ),
    "PReLU": Twins(lambda: nnx.PReLU(param_dtype=float), lambda nn: nn.PReLU(), (2, 4)),
    "MultiHeadAttention": Twins(
        lambda: nnx.MultiHeadAttention(2, 4, decode=False, attention_fn=attention, **DOUBLE),
        lambda nn: nn.MultiheadAttention(4, 2, batch_first=True),
        (2, 3, 4),
    ),
    "LSTMCell": Twins(lstm_cell_with_biases, lambda nn: nn.LSTMCell(3, 4), (2, 3), call=one_step_of_lstm),
    "OptimizedLSTMCell": Twins(lstm, lambda nn: nn.LSTMCell(3, 4), (2, 3), call=one_step_of_lstm),
    "GRUCell": Twins(gru, lambda nn: nn.GRUCell(3, 4), (2, 3), call=one_step),
    "SimpleCell": Twins(
        lambda: with_second_bias(nnx.SimpleCell(3, 4, dtype=float, **DOUBLE), "dense_h", 4, 4),
        lambda nn: nn.RNNCell(3, 4),
        (2, 3),
        call=one_step,
    ),
    "LSTM": Twins(lambda: nnx.RNN(lstm(), rngs=RNGS), lambda nn: nn.LSTM(3, 4, batch_first=True), (2, 5, 3)),
    "GRU in both directions": Twins(
        lambda: nnx.Bidirectional(nnx.RNN(gru(), rngs=RNGS), nnx.RNN(gru(), rngs=RNGS), rngs=RNGS),
        lambda nn: nn.GRU(3, 4, batch_first=True, bidirectional=True),
        (2, 5, 3),
    ),
}


def randomised(torch: Any, module: Any) -> Any:
    """The module with weights that no symmetry hides, statistics included."""
    generator = torch.Generator().manual_seed(0)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + 0.1)
    return module


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("twins", TWINS.values(), ids=TWINS)
def test_a_layer_computes_the_same_with_the_weights_of_its_twin(twins: Twins, torch: Any) -> None:
    theirs, ours = randomised(torch, twins.theirs(torch.nn)), twins.ours()
    saved = theirs.state_dict()
    rename = {"1": ""} if isinstance(theirs, torch.nn.Sequential) else None
    layout = interop.load_weights(ours, saved, rename=rename and (lambda name: name.removeprefix("1.")))
    x = np.random.default_rng(0).normal(size=twins.shape)
    given = torch.from_numpy(np.moveaxis(x, -1, 1) if twins.channels_first else x)
    expected = theirs(given, given, given) if isinstance(theirs, torch.nn.MultiheadAttention) else theirs(given)
    expected = expected[0] if isinstance(expected, tuple) and not isinstance(theirs, torch.nn.LSTMCell) else expected
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # Flax relies on both
        output = twins.call(ours, jnp.asarray(x))
    for one, other in zip(*map(as_tuple, (output, expected)), strict=True):
        other = other.detach().numpy()
        other = np.moveaxis(other, 1, -1) if twins.channels_first else other
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)
    back = interop.weights(ours, layout)
    assert back.keys() == {name for name in saved if "num_batches" not in name}
    for name, array in back.items():
        np.testing.assert_array_equal(array, saved[name].numpy())
    twins.theirs(torch.nn).load_state_dict(interop.weights(ours, layout, tensors=True))


def as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
