"""A run goes from PyTorch to us and back by its optimizer's state dict, as if it had stayed in PyTorch."""

import inspect
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from saved_runs import VARIANTS

import optimjax as optim
from optimjax.interop import torch as interop
from optimjax.interop.torch import Layout

pytestmark = pytest.mark.usefixtures("folder")

# By PyTorch's name: the shape, the layout and the name here. A square matrix fits both ways, and must be turned.
PARAMETERS = {
    "fc.weight": ((4, 4), Layout("fc.kernel", axes=(1, 0)), "fc.kernel"),
    "fc.bias": ((4,), None, "fc.bias"),
    "conv.weight": ((2, 4, 3), Layout("conv.kernel", axes=(0, 2, 1), shape=(2, 4, 3)), "conv.kernel"),
    "table.weight": ((3, 3), None, "table.weight"),
}
LAYOUT = {name: layout for name, (_, layout, _) in PARAMETERS.items()}


def values(case: Case, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=case.shape(shape)) for name, (shape, _, _) in PARAMETERS.items()}


def layouts(case: Case) -> dict[str, Layout | None]:
    """Of a convolution whose array must be a matrix the layout is that of a matrix."""
    return LAYOUT | ({"conv.weight": Layout("conv.kernel", axes=(1, 0))} if case.matrices else {})


def ours(case: Case, name: str, array: Any) -> Any:
    layout = layouts(case)[name]
    return array if layout is None else array.transpose(layout.axes)


class Theirs:
    """The run in PyTorch, in two groups, with names or without."""

    def __init__(self, torch: Any, case: Case, options: Any, params: dict[str, Any], named: bool):
        self.torch, self.case = torch, case
        self.tensors = {name: torch.nn.Parameter(torch.tensor(np.asarray(value))) for name, value in params.items()}
        items = list(self.tensors.items()) if named else list(self.tensors.values())
        cls = case.reference(torch)
        plain = {"foreach": False} if "foreach" in inspect.signature(cls).parameters else {}
        groups = [{"params": items[:3]}, {"params": items[3:], "lr": 0.02}]
        self.optimizer = cls(groups, **plain, **case.theirs(options))

    def run(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            for name, grad in values(self.case, 100 + step).items():
                self.tensors[name].grad = self.case.torch_gradient(self.torch, self.torch.from_numpy(grad))
            self.optimizer.step()

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: tensor.detach().numpy() for name, tensor in self.tensors.items()}


def continued_here(case: Case, options: Any, saved: Any, params: dict[str, Any], start: int, stop: int) -> Any:
    """The steps in between: state dict and parameters, in our axes, come in and go out."""
    named = [
        (here, optim.Parameter(jnp.asarray(ours(case, name, params[name])), name=here))
        for name, (_, _, here) in PARAMETERS.items()
    ]
    matrices = {"matrix_axes": ((-1,), (-2,))} if case.matrices else {}
    # In another order than PyTorch's, and of other options, which the state dict replaces. Muon has a group for each
    # kind of matrices.
    first = [*reversed(named[:3])]
    parts = [[first[0], first[2]], [first[1]]] if case.matrices else [first]
    groups = [{"params": part, **(matrices if place == 0 else {})} for place, part in enumerate(parts)]
    optimizer = case.optimizer([*groups, {"params": named[3:]}], **{**case.ours(options), "lr": 0.7})
    optimizer.load_state_dict(saved)
    boxes = dict(named)
    for step in range(start, stop):
        for name, grad in values(case, 100 + step).items():
            boxes[PARAMETERS[name][2]].grad = jnp.asarray(ours(case, name, grad))
        optimizer.step()
    there = {}
    for name, (_, _, here) in PARAMETERS.items():
        array = np.asarray(boxes[here].value)
        axes = layouts(case)[name]
        there[name] = array if axes is None else axes.to_torch(array)
    return optimizer.state_dict(), there


def check_round_trip(torch: Any, case: Case, options: Any, named: bool, through_file: bool) -> None:
    stayed = Theirs(torch, case, options, values(case, 0), named)
    stayed.run(0, 12)

    before = Theirs(torch, case, options, values(case, 0), named)
    before.run(0, 4)
    saved = before.optimizer.state_dict()
    if through_file:
        torch.save(saved, "before.pt")
        saved = interop.load("before.pt")
    layout, names = layouts(case), None if named else list(PARAMETERS)
    converted = interop.from_torch(saved, layout=layout, names=names)
    state, params = continued_here(case, options, converted, before.arrays(), 4, 8)
    if through_file:
        interop.save("after.pt", interop.to_torch(state, layout=layout, tensors=False))
        state = torch.load("after.pt", weights_only=True)
    else:
        state = interop.to_torch(state, layout=layout)

    after = Theirs(torch, case, {**options, "lr": 0.3}, params, named)
    after.optimizer.load_state_dict(state)
    after.run(8, 12)
    for name, array in stayed.arrays().items():
        np.testing.assert_allclose(after.arrays()[name], array, rtol=1e-12, atol=1e-12, err_msg=name)
    for tensor, twin in zip(stayed.tensors.values(), after.tensors.values(), strict=True):
        one, other = stayed.optimizer.state[tensor], after.optimizer.state[twin]
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert type(value) is type(other[key])
            assert np.shape(value) == np.shape(other[key])
            np.testing.assert_allclose(other[key], value, rtol=1e-12, atol=1e-12, err_msg=key)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(("case", "index"), VARIANTS)
def test_a_run_comes_here_and_goes_back(case: Case, index: int, named: bool, torch: Any) -> None:
    check_round_trip(torch, case, case.variants()[index], named, through_file=named)


def combinations() -> Iterator[Any]:
    for case in CASES:
        for index, options in enumerate(case.combinations()):
            yield pytest.param(case, options, id=f"{case}-{index}")


@pytest.mark.thorough
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("case", "options"), list(combinations()))
def test_a_run_of_every_configuration_comes_here_and_goes_back(case: Case, options: Any, torch: Any) -> None:
    check_round_trip(torch, case, options, named=True, through_file=False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("through_file", [True, False])
def test_low_precision_keeps_its_dtypes(dtype: str, through_file: bool, torch: Any) -> None:
    weight = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4).to(getattr(torch, dtype)))
    theirs = torch.optim.Adam([("fc.weight", weight)], lr=0.1)
    weight.grad = torch.linspace(-1, 1, 12).reshape(3, 4).to(weight.dtype)
    theirs.step()
    saved = theirs.state_dict()
    if through_file:
        torch.save(saved, "before.pt")
        saved = interop.load("before.pt")
    layout = {"fc.weight": LAYOUT["fc.weight"]}
    box = optim.Parameter(jnp.asarray(weight.detach().float().numpy().T, dtype))
    ours = optim.Adam([("fc.kernel", box)])
    ours.load_state_dict(interop.from_torch(saved, layout=layout))
    state = ours.state_dict()
    assert str(state["state"][0]["exp_avg"].dtype) == dtype
    back = interop.to_torch(state, layout=layout, tensors=not through_file)
    if through_file:
        interop.save("after.pt", back)
        back = torch.load("after.pt", weights_only=True)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(back["state"][0][name], theirs.state[weight][name])
    theirs.load_state_dict(back)
    ours.step({"fc.kernel": jnp.ones_like(box.value)})
