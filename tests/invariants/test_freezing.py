"""Parameters that are frozen, for a while or until they are added, behave as in PyTorch, also when saved and loaded."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from flax import nnx

import optimjax as optim

# --- A parameter that is frozen for a while -------------------------------------------------------------------------

VALUES = [np.random.default_rng(0).normal(size=shape) for shape in [(3, 2), (2, 4)]]


def loss_of(params: Any, weight: Any) -> Any:
    first, second = params
    return weight * jnp.sum(jnp.cosh(jnp.asarray(first) @ jnp.asarray(second)))


def by_backward(optimizer: Any, weight: float) -> None:
    optimizer.zero_grad()
    optimizer.backward(loss_of, weight)
    optimizer.step()


def by_gradients(optimizer: Any, weight: float) -> None:
    optimizer.step(jax.grad(loss_of)(optimizer.params, weight))  # also of the frozen one


def by_loss(optimizer: Any, weight: float) -> None:
    optimizer.step(loss_of, weight)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", [by_backward, by_gradients, by_loss])
@pytest.mark.parametrize("case", [case for case in CASES if not case.sparse], ids=lambda case: case.torch)
def test_state_survives_a_freeze_as_in_pytorch(case: Case, form: Callable[..., None], torch: Any) -> None:
    options = {**case.base, **case.full}
    boxes = [optim.Parameter(value) for value in VALUES]
    tensors = [torch.nn.Parameter(torch.tensor(value)) for value in VALUES]
    ours = case.optimizer(boxes, **case.ours(options))
    theirs = case.reference(torch)(tensors, **case.theirs(options))
    for step in range(9):
        frozen = step in (0, 1, 4, 5)  # from the start, and in the middle
        boxes[1].requires_grad = not frozen
        tensors[1].requires_grad_(not frozen)
        before = np.array(boxes[1]), dict(ours.state.get(boxes[1], {}))
        form(ours, 1 + step / 4)
        theirs.zero_grad()
        ((1 + step / 4) * torch.cosh(tensors[0] @ tensors[1]).sum()).backward()
        theirs.step()
        for box, tensor in zip(boxes, tensors, strict=True):
            np.testing.assert_allclose(box.value, tensor.detach().numpy(), rtol=1e-12, atol=1e-12)
        if frozen:
            np.testing.assert_array_equal(before[0], boxes[1])
            after = dict(ours.state.get(boxes[1], {}))
            assert after.keys() == before[1].keys()
            assert bool(after) == (step > 1 or case.state_at_construction)
            assert all(np.array_equal(after[name], before[1][name]) for name in after)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
def test_lbfgs_leaves_a_frozen_parameter_where_it_is(line_search_fn: Any, torch: Any) -> None:
    """In PyTorch the steps remembered from before the freeze still move it."""
    options: dict[str, Any] = dict(lr=0.5, max_iter=4, line_search_fn=line_search_fn)
    boxes = [optim.Parameter(value) for value in VALUES]
    tensors = [torch.nn.Parameter(torch.tensor(value)) for value in VALUES]
    ours, theirs = optim.LBFGS(boxes, **options), torch.optim.LBFGS(tensors, **options)

    def closure() -> Any:
        theirs.zero_grad()
        loss = torch.cosh(tensors[0] @ tensors[1]).sum()
        loss.backward()
        return loss

    def steps(frozen: bool, agree: bool) -> float:
        boxes[1].requires_grad = not frozen
        tensors[1].requires_grad_(not frozen)
        loss = math.inf
        for _ in range(2):
            loss = ours.step(loss_of, 1.0)
            theirs.step(closure)
            for box, tensor in zip(boxes, tensors, strict=True):
                assert not agree or np.allclose(box.value, tensor.detach().numpy(), rtol=1e-9, atol=1e-9)
        return float(loss)

    steps(frozen=True, agree=True)
    np.testing.assert_array_equal(boxes[1].value, VALUES[1])
    before = steps(frozen=False, agree=True), np.array(boxes[1])
    after = steps(frozen=True, agree=False)
    np.testing.assert_array_equal(boxes[1].value, before[1])
    assert after < before[0]
    assert not np.allclose(boxes[1].value, tensors[1].detach().numpy())


def test_gradients_of_frozen_parameters_must_fit_too() -> None:
    frozen = optim.Parameter(jnp.ones(2), name="frozen", requires_grad=False)
    optimizer = optim.SGD([optim.Parameter(jnp.ones(2)), frozen], lr=0.1)
    with pytest.raises(ValueError, match=r"gradient of 'frozen' has shape \(3,\)"):
        optimizer.step([jnp.ones(2), jnp.ones(3)])
    np.testing.assert_array_equal(optimizer.params[0], [1, 1])


def test_a_parameter_of_a_frozen_module_is_left_alone_by_gradients_of_the_whole() -> None:
    """`nnx.grad` knows nothing of boxes: it differentiates all of the module."""
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    dict(optim.named_parameters(model))["kernel"].requires_grad = False
    before = {name: np.array(box) for name, box in optim.named_parameters(model)}
    optimizer = optim.Adam(model, lr=0.1)
    optimizer.step(nnx.grad(lambda model: jnp.sum(model(jnp.ones((1, 2)))))(model))
    after = dict(optim.named_parameters(model))
    np.testing.assert_array_equal(after["kernel"], before["kernel"])
    assert not np.any(np.asarray(after["bias"]) == before["bias"])
    assert [str(box) for box in optimizer.state] == ["bias"]


# --- Fine-tuning: the head first, then a layer every few epochs, with warm-up and cosine ----------------------------

EPOCHS, WARM_UP, UNFREEZE = 12, 3, {3: "second", 6: "first", 9: "embed"}
RATES = {"head": 0.03, "second": 0.02, "first": 0.01, "embed": 0.005}
SIZES = {"embed": (3, 4), "first": (4, 4), "second": (4, 4), "head": (4, 2)}
WEIGHTS = {name: np.random.default_rng(i).normal(size=size) / 2 for i, (name, size) in enumerate(SIZES.items())}
OPTIONS = {"betas": (0.8, 0.95), "weight_decay": 0.1}


def batches(epoch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(1000 + epoch)
    return [(rng.normal(size=(5, 3)), rng.normal(size=(5, 2))) for _ in range(2)]


class Net(nnx.Module):
    def __init__(self) -> None:
        for name, (inputs, outputs) in SIZES.items():
            layer = nnx.Linear(inputs, outputs, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
            layer.kernel.set_value(jnp.asarray(WEIGHTS[name]))
            setattr(self, name, layer)

    def __call__(self, x: Any) -> Any:
        for name in ("embed", "first", "second"):
            x = jnp.tanh(getattr(self, name)(x))
        return self.head(x)  # pyright: ignore[reportAttributeAccessIssue]


def mse(model: Any, x: Any, y: Any) -> Any:
    return jnp.mean((model(x) - y) ** 2)


def factor(epoch: int) -> float:
    """Of the rate: up for three epochs, then down along a cosine."""
    if epoch < WARM_UP:
        return (epoch + 1) / (WARM_UP + 1)
    return 0.5 * (1 + math.cos(math.pi * (epoch - WARM_UP) / (EPOCHS - WARM_UP)))


def layer_parameters(net: Net, name: str) -> Any:
    return optim.named_parameters(getattr(net, name))


class ByFlags:
    """All layers are in groups from the start; a frozen one has `requires_grad=False`."""

    def __init__(self, epoch: int = 0) -> None:
        self.net = Net()
        for layer, name in ((getattr(self.net, name), name) for name in RATES):
            for box in optim.parameters(layer):
                box.requires_grad = name == "head"
        self.optimizer = optim.AdamW(
            [{"params": layer_parameters(self.net, n), "lr": lr, "name": n} for n, lr in RATES.items()],
            **OPTIONS,
        )
        for start in range(1, epoch + 1):
            self.unfreeze(UNFREEZE.get(start))
        lib = optim.lr_scheduler
        warm_up = lib.LinearLR(self.optimizer, start_factor=1 / (WARM_UP + 1), total_iters=WARM_UP)
        cosine = lib.CosineAnnealingLR(self.optimizer, T_max=EPOCHS - WARM_UP)
        self.scheduler = lib.SequentialLR(self.optimizer, [warm_up, cosine], milestones=[WARM_UP])

    def unfreeze(self, name: str | None) -> None:
        for box in optim.parameters(getattr(self.net, name)) if name else ():
            box.requires_grad = True


class ByGroups:
    """Only the head has a group at first; the others are added, and scheduled from then on."""

    def __init__(self, epoch: int = 0) -> None:
        self.net = Net()
        self.optimizer = optim.AdamW(
            [{"params": layer_parameters(self.net, "head"), "lr": RATES["head"], "name": "head"}],
            **OPTIONS,
        )
        for start in range(1, epoch + 1):
            self.unfreeze(UNFREEZE.get(start))
        self.scheduler = optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def unfreeze(self, name: str | None) -> None:
        if name:
            layer = layer_parameters(self.net, name)
            self.optimizer.add_param_group({"params": layer, "lr": RATES[name], "name": name})


def save(run: Any, path: Path) -> None:
    model = {name: box.value for name, box in optim.named_parameters(run.net)}
    optim.save(path, {"model": model, "optimizer": run.optimizer.state_dict(), "lr": run.scheduler.state_dict()})


def load(make: Any, epoch: int, path: Path) -> Any:
    """Another run, as in another process, that has the layers of this epoch unfrozen."""
    run, saved = make(epoch), optim.load(path)
    for name, box in optim.named_parameters(run.net):
        box.value = saved["model"][name]
    run.optimizer.load_state_dict(saved["optimizer"])
    run.scheduler.load_state_dict(saved["lr"])
    return run


def train(make: Any, stop: int | None = None, path: Any = None) -> list[Any]:
    """Rates, losses and weights of each epoch; saved and loaded after the epoch ``stop``."""
    run, trace = make(), []
    for epoch in range(EPOCHS):
        rates = {group["name"]: group["lr"] for group in run.optimizer.param_groups}
        losses = []
        for x, y in batches(epoch):
            run.optimizer.zero_grad()
            losses.append(float(run.optimizer.backward(mse, run.net, x, y)))
            run.optimizer.step()
        trace.append((rates, losses, {name: np.array(box) for name, box in optim.named_parameters(run.net)}))
        run.unfreeze(UNFREEZE.get(epoch + 1))
        run.scheduler.step()
        if epoch == stop:
            save(run, path)
            run = load(make, epoch + 1, path)
    return trace


@pytest.fixture
def reference(torch: Any, x64: None) -> Any:
    """The same in PyTorch, whose schedulers do not take groups that are added: there the rates are set by hand."""

    def run(by_groups: bool) -> list[Any]:
        layers = torch.nn.ModuleDict({name: torch.nn.Linear(*size).double() for name, size in SIZES.items()})
        for name, layer in layers.items():
            layer.weight.data = torch.tensor(WEIGHTS[name].T)
            layer.bias.data.zero_()
            layer.requires_grad_(name == "head")

        def group(name: str) -> dict[str, Any]:
            return {"params": layers[name].parameters(), "lr": RATES[name], "name": name}

        optimizer = torch.optim.AdamW([group("head")] if by_groups else list(map(group, RATES)), **OPTIONS)
        lib = torch.optim.lr_scheduler
        if by_groups:
            scheduler: Any = None
            optimizer.param_groups[0]["lr"] *= factor(0)
        else:
            warm_up = lib.LinearLR(optimizer, start_factor=1 / (WARM_UP + 1), total_iters=WARM_UP)
            cosine = lib.CosineAnnealingLR(optimizer, T_max=EPOCHS - WARM_UP)
            scheduler = lib.SequentialLR(optimizer, [warm_up, cosine], milestones=[WARM_UP])
        trace = []
        for epoch in range(EPOCHS):
            rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
            losses = []
            for x, y in batches(epoch):
                h = torch.tensor(x)
                for name in ("embed", "first", "second"):
                    h = torch.tanh(layers[name](h))
                loss = ((layers["head"](h) - torch.tensor(y)) ** 2).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            weights = {f"{n}.kernel": p.weight.detach().numpy().T.copy() for n, p in layers.items()}
            weights |= {f"{n}.bias": p.bias.detach().numpy().copy() for n, p in layers.items()}
            trace.append((rates, losses, weights))
            if name := UNFREEZE.get(epoch + 1):
                layers[name].requires_grad_(True)
                if by_groups:
                    optimizer.add_param_group(group(name))
            if scheduler:
                scheduler.step()
            else:
                for each in optimizer.param_groups:
                    each["lr"] = RATES[each["name"]] * factor(epoch + 1)
        return trace

    return run


@pytest.mark.parametrize("make", [ByFlags, ByGroups])
def test_fine_tuning_is_pytorchs(make: Any, reference: Any) -> None:
    for ours, theirs in zip(train(make), reference(make is ByGroups), strict=True):
        assert ours[0].keys() == theirs[0].keys()
        np.testing.assert_allclose(list(ours[0].values()), list(theirs[0].values()), rtol=1e-14)
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-12)
        assert ours[2].keys() == theirs[2].keys()
        for name, array in ours[2].items():
            np.testing.assert_allclose(array, theirs[2][name], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make", [ByFlags, ByGroups])
def test_fine_tuning_resumes_bit_for_bit(make: Any, tmp_path: Path) -> None:
    whole = train(make)
    for stop in (1, 2, 4, 8):  # before, at and after an unfreezing
        for ours, expected in zip(train(make, stop, tmp_path / "run.safetensors"), whole, strict=True):
            assert ours[:2] == expected[:2]
            assert all(np.array_equal(ours[2][name], array) for name, array in expected[2].items())


@pytest.mark.usefixtures("x64")
def test_layers_move_from_the_epoch_on_that_unfreezes_them() -> None:
    starts = {"head": 0} | {name: epoch for epoch, name in UNFREEZE.items()}
    for make in (ByFlags, ByGroups):
        weights = [WEIGHTS, *({name: w[f"{name}.kernel"] for name in SIZES} for *_, w in train(make))]
        for name, start in starts.items():
            moved = [not np.array_equal(a[name], b[name]) for a, b in itertools.pairwise(weights)]
            assert moved == [epoch >= start for epoch in range(EPOCHS)]
