"""What scripts of PyTorch do that no page of an API lists: closures, foreign entries, edited state and groups."""

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optimjax as optim
from optimjax import functional as F
from optimjax.swa_utils import AveragedModel


def by_gradient(optimizer: Any, *grads: Any) -> None:
    for box, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        box.grad = grad
    optimizer.step()


# --- Closures --------------------------------------------------------------------------------------------------------


def square(params: Any) -> Any:
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("name", ["Adam", "SGD", "Rprop", "ASGD", "RMSprop"])
def test_a_closure_calls_backward_itself(name: str, keyword: bool, torch: Any) -> None:
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    theirs = getattr(torch.optim, name)([w], lr=0.1)
    ours = getattr(optim, name)([optim.Parameter(jnp.array([1.0, -2.0]))], lr=0.1)
    calls: list[Any] = []
    ours.register_step_pre_hook(lambda _, args, kwargs: calls.append((len(args), set(kwargs))))

    def torch_closure() -> Any:
        theirs.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss

    for _ in range(3):

        def closure() -> Any:
            ours.zero_grad()
            return ours.backward(square)

        loss = ours.step(closure=closure) if keyword else ours.step(closure)
        np.testing.assert_allclose(loss, theirs.step(torch_closure).item(), rtol=1e-6)
    np.testing.assert_allclose(ours.params[0], w.detach().numpy(), rtol=1e-6)
    assert calls == [(1, {"closure"}) if keyword else (2, set())] * 3


def test_closures_that_are_made_again_each_time_compile_once(compilations: Any) -> None:
    optimizer = optim.SGD([jnp.ones(2)], lr=0.1)
    for index in range(12):  # nobody warns of copies, because nothing is compiled for them

        def closure() -> Any:
            optimizer.zero_grad()
            return optimizer.backward(square)

        optimizer.step(closure)
        if index == 1:
            before = compilations()
    assert compilations() == before


def test_a_loss_function_by_the_name_closure() -> None:
    optimizer, twin = (optim.SGD({"w": jnp.ones(2)}, lr=0.1) for _ in range(2))
    assert optimizer.step(closure=square) == twin.step(square)
    np.testing.assert_array_equal(optimizer.params["w"], twin.params["w"])
    with pytest.raises(TypeError, match="by position or by name, not both"):
        optimizer.step(square, closure=square)


def test_a_closure_that_only_returns_the_loss_is_told_what_to_write() -> None:
    optimizer = optim.SGD({"w": jnp.ones(2)}, lr=0.1)

    def forgetful() -> Any:
        return square(optimizer.params)

    with pytest.raises(RuntimeError, match=r"forgetful\(\) has left no gradient.*backward.*step\(loss_fn"):
        optimizer.step(forgetful)
    np.testing.assert_array_equal(optimizer.params["w"], [1, 1])


def test_a_closure_of_an_optimizer_of_a_modules_parameters() -> None:
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = optim.SGD(optim.parameters(model), lr=0.1)

    def closure() -> Any:
        optimizer.zero_grad()
        return optimizer.backward(lambda model: jnp.sum(model(jnp.ones((1, 2))) ** 2), model)

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_the_model_is_asked_for_where_a_loss_takes_too_little() -> None:
    optimizer = optim.SGD({"w": jnp.ones(2)}, lr=0.1)

    def loss() -> Any:
        return 0.0

    with pytest.raises(TypeError, match=r"as in def loss\(model\)"):
        optimizer.backward(loss)
    with pytest.raises(TypeError, match="passed by position"):
        optimizer.step(lambda params, *, x: 0.0, jnp.ones(2))


# --- Entries of one's own --------------------------------------------------------------------------------------------


class SAM(optim.Optimizer):
    """github.com/davda54/sam, its constructor to the letter; arithmetic without in-place methods."""

    def __init__(self, params: Any, base_optimizer: Any, rho: float = 0.05, adaptive: bool = False, **kwargs: Any):
        assert rho >= 0.0, f"Invalid rho, should be non-negative: {rho}"

        defaults = dict(rho=rho, adaptive=adaptive, **kwargs)
        super().__init__(params, defaults)

        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    def first_step(self, zero_grad: bool = False) -> None:
        norm = jnp.sqrt(sum(jnp.sum(p.grad**2) for g in self.param_groups for p in g["params"]))
        for group in self.param_groups:
            scale = group["rho"] / (norm + 1e-12)
            for p in group["params"]:
                self.state[p]["old_p"] = p.value
                p += p.grad * scale
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.value = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = closure()
        self.first_step(zero_grad=True)
        closure()
        self.second_step()
        return loss


def test_sam_as_it_is_copied_from_everywhere(torch: Any) -> None:
    class TorchSAM(torch.optim.Optimizer):
        def __init__(self, params: Any, rho: float, **kwargs: Any):
            super().__init__(params, dict(rho=rho, **kwargs))
            self.base_optimizer = torch.optim.SGD(self.param_groups, **kwargs)
            self.param_groups = self.base_optimizer.param_groups

        @torch.no_grad()
        def move(self) -> None:
            norm = torch.stack([p.grad.norm(2) for g in self.param_groups for p in g["params"]]).norm(2)
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["old_p"] = p.data.clone()
                    p.add_(p.grad * (group["rho"] / (norm + 1e-12)))

    start = np.array([1.0, -2.0, 0.5], np.float32)
    w = torch.nn.Parameter(torch.tensor(start))
    theirs = TorchSAM([w], 0.05, lr=0.1, momentum=0.9)
    box = optim.Parameter(jnp.asarray(start))
    ours = SAM([box], optim.SGD, lr=0.1, momentum=0.9)

    def quartic(params: Any) -> Any:
        return jnp.sum(params[0] ** 4)

    def closure() -> Any:
        return ours.backward(quartic)

    for _ in range(4):
        ours.zero_grad()
        ours.step(closure)
        theirs.zero_grad()
        (w**4).sum().backward()
        theirs.move()
        theirs.zero_grad()
        (w**4).sum().backward()
        w.data = theirs.state[w]["old_p"]
        theirs.base_optimizer.step()
    np.testing.assert_allclose(box.value, w.detach().numpy(), rtol=1e-6)


@pytest.mark.parametrize("first", ["Adam", "RMSprop", "Adafactor", "ASGD"])
def test_the_groups_of_one_optimizer_become_anothers(first: str) -> None:
    boxes = [optim.Parameter(jnp.ones((2, 2)), name="w"), optim.Parameter(jnp.ones((1, 2)), name="v")]
    before = getattr(optim, first)([(box.name, box) for box in boxes], lr=0.5)
    after = optim.SGD(before.param_groups, momentum=0.9)
    (group,) = after.param_groups
    assert group["lr"] == 0.5  # as in PyTorch, the group's own
    assert group["params"] == boxes
    assert group["param_names"] == ["w", "v"]
    assert set(before.param_groups[0]) <= set(group)
    after.step([{"w": jnp.ones((2, 2)), "v": jnp.ones((1, 2))}])
    np.testing.assert_array_equal(boxes[0].value, jnp.full((2, 2), 0.5))
    again = optim.SGD(boxes)
    again.load_state_dict(after.state_dict())
    assert again.param_groups[0].keys() - {"param_names"} >= group.keys() - {"param_names"}


@pytest.mark.parametrize(
    "own", [{"lr_scale": 0.5}, {"rho": 0.05, "adaptive": True}, {"layer": "embed"}, {"wd_mult": 0.0}]
)
def test_a_group_keeps_entries_of_ones_own(own: Any) -> None:
    optimizer = optim.AdamW([{"params": {"w": jnp.ones(2)}, **own}])
    assert optimizer.param_groups[0].items() >= own.items()
    other = optim.AdamW([{"params": {"w": jnp.ones(2)}}])
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0].items() >= own.items()
    assert copy.deepcopy(optimizer).param_groups[0].items() >= own.items()
    repr(optimizer), optimizer._repr_html_()


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("weight_decy", "weight_decay"),
        ("weigth_decay", "weight_decay"),
        ("learning_rate", "lr"),
        ("beta", "betas"),
        ("beta1", "betas"),
        ("amsgrd", "amsgrad"),
        ("lrs", "lr"),
        ("maximise", "maximize"),
        ("epsilon", "eps"),
    ],
)
def test_a_misspelt_option_raises_with_the_one_that_is_meant(key: str, meant: str) -> None:
    optimizer = optim.AdamW({"w": jnp.ones(2)})
    with pytest.raises(TypeError, match=rf"unknown option '{key}' of param_groups\[1\]: did you mean '{meant}'\?"):
        optimizer.add_param_group({"params": {"v": jnp.ones(2)}, key: 0.1})
    assert len(optimizer.param_groups) == 1


class Lookahead(optim.Optimizer):
    """timm's, as far as it keeps its slow weights in the state of the optimizer that it wraps."""

    def __init__(self, base_optimizer: Any, alpha: float = 0.5, k: int = 2):
        self._base_optimizer = base_optimizer
        self.param_groups = base_optimizer.param_groups
        self.defaults = base_optimizer.defaults
        self.state = base_optimizer.state
        self.alpha, self.k, self.count = alpha, k, 0

    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = self._base_optimizer.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            for group in self.param_groups:
                for p in group["params"]:
                    state = self._base_optimizer.state[p]
                    state.setdefault("slow", p.value)
                    state["slow"] = state["slow"] + self.alpha * (p.value - state["slow"])
                    p.value = state["slow"]
        return loss

    def state_dict(self) -> Any:
        return self._base_optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._base_optimizer.load_state_dict(state_dict)


@pytest.mark.parametrize("base", ["Adam", "SGD"])
def test_slots_of_ones_own_are_saved_and_loaded(base: str) -> None:
    def make() -> Any:
        return Lookahead(getattr(optim, base)({"w": jnp.array([1.0, -2.0])}, lr=0.1))

    whole, begun = make(), make()
    for _ in range(6):
        whole.step(square)
    for _ in range(3):
        begun.step(square)
    resumed = make()
    resumed._base_optimizer.param_groups[0]["params"][0].value = begun._base_optimizer.params["w"]
    resumed.load_state_dict(begun.state_dict())
    resumed.count = 3
    for _ in range(3):
        resumed.step(square)
    np.testing.assert_array_equal(resumed._base_optimizer.params["w"], whole._base_optimizer.params["w"])


def test_state_of_another_algorithm_is_still_refused() -> None:
    adam, sgd = (cls({"w": jnp.ones(2)}) for cls in (optim.Adam, optim.SGD))
    adam.step(square)
    with pytest.raises(ValueError, match=r"has 'exp_avg', which SGD does not keep"):
        sgd.load_state_dict(adam.state_dict())
    assert not sgd.state


def test_own_slots_cross_and_come_back() -> None:
    optimizer = optim.Adam({"w": jnp.ones(2)}, lr=0.1)
    optimizer.step(square)
    (box,) = optimizer.param_groups[0]["params"]
    optimizer.state[box]["slow"] = box.value
    optimizer.load_functional_state(*optimizer.functional_state())
    assert set(optimizer.state[box]) == {"step", "exp_avg", "exp_avg_sq", "slow"}


# --- State that was edited -------------------------------------------------------------------------------------------

EDITS = [
    ("SGD", {"momentum": 0.9}, "momentum_buffer"),
    ("Adam", {}, "exp_avg"),
    ("RMSprop", {}, "square_avg"),
    ("Adagrad", {}, "sum"),
    ("Adadelta", {}, "acc_delta"),
    ("Rprop", {}, "step_size"),
    ("NAdam", {}, "exp_avg_sq"),
    ("Adamax", {}, "exp_inf"),
    ("ASGD", {}, "ax"),
]


@pytest.mark.parametrize(("name", "options", "slot"), EDITS)
@pytest.mark.parametrize(
    "value",
    [jnp.ones((4, 3)), jnp.ones(3), jnp.ones((1, 3), int), np.ones((1, 3), bool), "x", [[1.0, 2.0]], object()],
    ids=["rows", "axes", "integers", "booleans", "text", "list", "object"],
)
def test_edited_state_that_does_not_fit_is_refused(name: str, options: Any, slot: str, value: Any) -> None:
    optimizer = getattr(optim, name)([("layer.w", optim.Parameter(jnp.ones((1, 3))))], lr=0.1, **options)
    (box,) = optimizer.param_groups[0]["params"]
    by_gradient(optimizer, jnp.ones((1, 3)))
    good, before = optimizer.state[box][slot], box.value
    optimizer.state[box][slot] = value
    with pytest.raises(ValueError, match=rf"^state of parameter 'layer\.w': '{slot}'"):
        by_gradient(optimizer, jnp.ones((1, 3)))
    assert box.value is before
    optimizer.state[box][slot] = good
    by_gradient(optimizer, jnp.ones((1, 3)))
    assert box.shape == (1, 3)


def test_edited_state_that_fits_is_taken(torch: Any) -> None:
    values = [np.full(3, 0.5, np.float32), [0.5, 0.5, 0.5], torch.full((3,), 0.5), jnp.full(3, 0.5)]
    results = []
    for value in values:
        optimizer = optim.SGD([optim.Parameter(jnp.ones(3))], lr=1.0, momentum=0.5)
        (box,) = optimizer.param_groups[0]["params"]
        by_gradient(optimizer, jnp.ones(3))
        optimizer.state[box]["momentum_buffer"] = value
        by_gradient(optimizer, jnp.ones(3))
        results.append(np.asarray(box.value))
    np.testing.assert_array_equal(results, np.full((4, 3), -1.25))


def test_a_count_that_is_none_is_refused() -> None:
    optimizer = optim.Adam({"w": jnp.ones(2)})
    optimizer.step(square)
    (box,) = optimizer.param_groups[0]["params"]
    for count in (-1, 0.5, "many", None):
        optimizer.state[box]["step"] = count
        with pytest.raises(ValueError, match="state of parameter 'w': 'step'"):
            optimizer.step(square)


def test_a_parameter_of_another_shape_than_its_state_is_refused() -> None:
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    optimizer = optim.Adam(model, lr=0.1)

    def loss(model: Any) -> Any:
        return jnp.sum(model(jnp.ones((2, 4))) ** 2)

    optimizer.step(loss)
    model.kernel.set_value(jnp.ones((4, 10)))
    model.bias.set_value(jnp.zeros(10))
    with pytest.raises(ValueError, match=r"state of parameter 'bias': 'exp_avg' has shape \(1,\), expected \(10,\)"):
        optimizer.step(loss)
    for box in optimizer.param_groups[0]["params"]:
        del optimizer.state[box]
    optimizer.step(loss)
    assert optimizer.state[next(optim.parameters(model))]["exp_avg"].shape == (10,)


def test_a_buffer_that_is_none_begins_again(torch: Any) -> None:
    w = torch.nn.Parameter(torch.ones(2))
    theirs = torch.optim.SGD([w], lr=1.0, momentum=0.9, dampening=0.5)
    ours = optim.SGD([optim.Parameter(jnp.ones(2))], lr=1.0, momentum=0.9, dampening=0.5)
    (box,) = ours.param_groups[0]["params"]
    for step in range(4):
        if step == 2:
            ours.state[box]["momentum_buffer"] = theirs.state[w]["momentum_buffer"] = None
        w.grad = torch.ones(2)
        theirs.step()
        by_gradient(ours, jnp.ones(2))
    np.testing.assert_allclose(box.value, w.detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(
        ours.state[box]["momentum_buffer"], theirs.state[w]["momentum_buffer"].numpy(), rtol=1e-6
    )


# --- Groups that were edited, or misspelt ----------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True])
def test_parameters_put_into_a_group_by_hand_are_trained_by_every_form(named: bool) -> None:
    """As 3D Gaussian splatting does: more of them, or others, and their state is moved."""

    def pairs(*boxes: Any) -> Any:
        return [(box.name, box) for box in boxes] if named else list(boxes)

    a, b = (optim.Parameter(jnp.ones(2), name=name) for name in "ab")
    optimizer = optim.SGD(pairs(a), lr=0.25)
    group = optimizer.param_groups[0]
    optimizer.step(square)
    group["params"].append(b)
    if named:
        with pytest.raises(
            ValueError, match=r"2 parameters have 1 names of param_groups\[0\]: edit 'param_names', too"
        ):
            optimizer.step(square)
        group["param_names"].append("b")
    optimizer.step(square)
    np.testing.assert_array_equal([a.value, b.value], [[0.25, 0.25], [0.5, 0.5]])
    assert len(optimizer.params) == 2
    optimizer.step({"a": jnp.ones(2), "b": jnp.ones(2)} if named else [jnp.ones(2), jnp.ones(2)])
    np.testing.assert_array_equal([a.value, b.value], [[0, 0], [0.25, 0.25]])
    optimizer.zero_grad()
    optimizer.backward(square)
    np.testing.assert_array_equal(b.grad, [0.5, 0.5])

    group["params"][:] = [c := optim.Parameter(jnp.ones(3), name="c")]
    if named:
        group["param_names"][:] = ["c"]
    optimizer.step(square)
    np.testing.assert_array_equal(c.value, [0.5, 0.5, 0.5])
    assert len(optimizer.params) == 1


def test_parameters_put_into_the_group_of_a_tree_by_hand_are_named() -> None:
    optimizer = optim.SGD({"w": jnp.ones(2)}, lr=0.1)
    optimizer.param_groups[0]["params"].append(optim.Parameter(jnp.ones(2), name="mine"))
    with pytest.raises(ValueError, match=r"mine: put into param_groups by hand.*add_param_group"):
        optimizer.step(square)


@pytest.mark.parametrize(
    "params",
    [
        [{"param": jnp.ones(2), "lr": 0.5}, {"param": jnp.ones(2), "lr": 0.9}],
        {"params": [jnp.ones(2)], "lr": 0.5},
        [[{"params": jnp.ones(2), "lr": 0.5}]],
        [{"weights": jnp.ones(2), "weight_decay": 0.1}],
        {"parameters": jnp.ones(2), "momentum": 0.9},
    ],
)
def test_misspelt_groups_are_no_tree(params: Any) -> None:
    with pytest.raises(ValueError, match=r"is an option, here .* groups are a list of dicts, each with 'params'"):
        optim.SGD(params, lr=0.1)


def test_a_tree_may_have_numbers_of_its_own() -> None:
    optimizer = optim.Adam({"norm": {"scale": jnp.ones(2), "eps": 1e-5}, "momentum": 0.9})
    assert optimizer.params["norm"]["eps"] == 1e-5
    assert optim.SGD({"lr": jnp.ones(2)}).params["lr"].shape == (2,)  # a parameter of this name


@pytest.mark.parametrize("x", [None, 3, 0.5, "w", len, object()])
def test_what_has_no_parameters_is_told_so(x: Any) -> None:
    with pytest.raises(TypeError, match="must hold parameters, got"):
        list(optim.parameters(x))


def test_a_module_of_pytorch_is_called_one(torch: Any) -> None:
    model = torch.nn.Linear(2, 1)
    for take in (optim.Adam, lambda x: list(optim.parameters(x)), lambda x: optim.Adam({"a": x, "b": jnp.ones(2)})):
        with pytest.raises(TypeError, match=r"must hold parameters, got Linear.*PyTorch module.*Coming from PyTorch"):
            take(model)


def test_the_parameters_of_an_optimizer_can_be_clipped() -> None:
    optimizer = optim.SGD({"a": jnp.zeros(2)}, lr=0.1)
    (box,) = optim.parameters(optimizer)
    assert box is optimizer.param_groups[0]["params"][0]
    assert [name for name, _ in optim.named_parameters(optimizer)] == ["a"]
    box.grad = jnp.array([3.0, 4.0])
    np.testing.assert_allclose(optim.clip_grad_norm_(optim.parameters(optimizer), 1.0), 5.0)
    np.testing.assert_allclose(box.grad, [0.6, 0.8], rtol=1e-5)


def test_a_rate_may_be_a_tensor(torch: Any) -> None:
    optimizer = optim.Adam({"w": jnp.ones(2)}, lr=torch.tensor(0.1), betas=(torch.tensor(0.9), torch.tensor(0.99)))
    optimizer.add_param_group({"params": {"v": jnp.ones(2)}, "lr": torch.tensor(0.2)})
    optimizer.step([{"w": jnp.ones(2)}, {"v": jnp.ones(2)}])
    np.testing.assert_allclose(
        [p for part in optimizer.params for p in part.values()], [[0.9] * 2, [0.8] * 2], rtol=1e-6
    )


def test_a_rate_that_is_none_is_not_offered_a_schedule() -> None:
    with pytest.raises(TypeError, match=r"^lr must be a number or an array of one element, got 'fast'$"):
        optim.Adam({"w": jnp.ones(2)}, lr="fast")


# --- Parameters as arrays --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [False, True])
def test_a_parameter_has_the_methods_of_its_array(bound: bool) -> None:
    value = jnp.arange(6.0).reshape(2, 3)
    p: Any = optim.Parameter(value)
    if bound:
        model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        model.kernel.set_value(value)
        p = dict(optim.named_parameters(model))["kernel"]
    np.testing.assert_array_equal(p.T, value.T)
    np.testing.assert_array_equal(p.at[0].set(1), value.at[0].set(1))
    np.testing.assert_array_equal(p.reshape(-1), value.reshape(-1))
    assert p.mean() == 2.5
    assert p.astype(jnp.bfloat16).dtype == jnp.bfloat16
    assert p.sum().item() == 15
    assert p[0, 1].item() == 1
    assert {"T", "mean", "at", "value", "grad"} <= set(dir(p))
    assert not hasattr(p, "detach")  # it is no tensor
    assert not hasattr(p, "anything")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("data", r"p\.value"),
        ("clone", "immutable"),
        ("backward", r"optimizer\.backward"),
        ("add_", r"p \+= x"),
        ("to", "device_put"),
    ],
)
def test_what_a_tensor_has_is_pointed_to(name: str, hint: str) -> None:
    with pytest.raises(AttributeError, match=f"a Parameter has no attribute '{name}': .*{hint}"):
        getattr(optim.Parameter(1.0), name)


# --- Doors found by a second attack -----------------------------------------------------------------------------------


def _by_gradient(optimizer: Any, parameter: Any, buffer: np.ndarray) -> None:
    parameter.grad = buffer
    optimizer.step()


def _by_operator(optimizer: Any, parameter: Any, buffer: np.ndarray) -> None:
    parameter -= buffer


@pytest.mark.parametrize("how", [_by_gradient, _by_operator], ids=["grad", "operator"])
def test_a_buffer_of_numpy_can_be_filled_again(how: Callable[..., None]) -> None:
    """JAX reads the memory of NumPy's arrays after it has returned."""
    size = 10**6
    for _ in range(3):
        optimizer = optim.SGD({"w": jnp.zeros(size)}, lr=1.0)
        (parameter,) = optimizer.param_groups[0]["params"]
        buffer = np.empty(size, np.float32)
        for _ in range(4):
            buffer[:] = 1
            how(optimizer, parameter, buffer)
            buffer[:] = -1e6
        np.testing.assert_allclose(parameter.value, -4, rtol=1e-5)


def test_what_is_made_of_a_buffer_has_memory_of_its_own() -> None:
    buffer = np.ones(10**6, np.float32)
    parameter, averaged = optim.Parameter(buffer), AveragedModel({"w": jnp.ones(10**6)})
    optimizer = optim.SGD({"w": buffer})
    for _ in range(2):
        averaged.update_parameters({"w": buffer})
    buffer[:] = 5
    for array in (parameter.value, optimizer.params["w"], averaged.module["w"]):
        np.testing.assert_array_equal(array, 1)


def test_deleted_arrays_are_not_taken_over() -> None:
    grads = {"w": jnp.ones(3)}
    optimizer = optim.Adam({"w": jnp.ones(3)}, lr=0.1)
    optimizer.donate = True
    optimizer.step(grads)
    snapshot = optimizer.functional_state()
    optimizer.step(grads)
    before = np.asarray(optimizer.params["w"])
    with pytest.raises(ValueError, match=r"'params\.w' cannot be taken over: an array .* deleted"):
        optimizer.load_functional_state(*snapshot)
    np.testing.assert_array_equal(optimizer.params["w"], before)
    optimizer.step(grads)
    (parameter,) = optimizer.param_groups[0]["params"]
    with pytest.raises(ValueError, match="has been deleted"):
        parameter.value = snapshot[0]["w"]


@pytest.mark.parametrize("wrong", [jnp.zeros(3, int), jnp.zeros(4), jnp.zeros(3, complex), "text"], ids=str)
def test_edited_state_is_checked_on_its_way_to_the_functional_form(wrong: Any) -> None:
    parameter = optim.Parameter(jnp.ones(3), name="w")
    optimizer = optim.Adam([parameter], lr=0.1)
    optimizer.step([jnp.ones(3)])
    optimizer.state[parameter]["exp_avg"] = wrong
    with pytest.raises(ValueError, match="state of parameter 'w': 'exp_avg'"):
        optimizer.functional_state()


def test_lbfgs_notices_edited_parameters() -> None:
    edits = (lambda params: params.pop(), lambda params: params.append(optim.Parameter(jnp.ones((2, 2)))))
    for edit in edits:
        a, b = (optim.Parameter(jnp.ones((2, 2)), name=name) for name in "ab")
        optimizer = optim.LBFGS([a, b])
        loss = lambda params: sum(jnp.sum(jnp.asarray(p) ** 2) for p in params)  # noqa: E731
        optimizer.step(loss)
        edit(optimizer.param_groups[0]["params"])
        with pytest.raises(ValueError, match=r"state of parameter 'a': 'd' has shape \(8,\), expected"):
            optimizer.step(loss)


@pytest.mark.parametrize(
    "groups",
    [
        {"a": {"params": [jnp.ones(1)], "lr": 0.5}, "b": {"params": [jnp.ones(1)], "lr": 0.9}},
        {"params": [jnp.ones(1)], "lr": np.float32(0.5)},
        {"params": [jnp.ones(1)], "lr": [0.5]},
    ],
    ids=["dict of groups", "numpy scalar", "list"],
)
def test_more_of_what_looks_like_groups(groups: Any) -> None:
    with pytest.raises(ValueError, match=r"'lr' is an option, .* because it is not a group"):
        optim.SGD(groups, lr=0.1)


def test_options_in_capitals() -> None:
    with pytest.raises(TypeError, match=r"unknown option 'LR'.*did you mean 'lr'"):
        optim.AdamW([{"params": [jnp.ones(1)], "LR": 0.5}])


def test_one_parameter_twice_by_hand() -> None:
    parameter = optim.Parameter(jnp.ones(2), name="w")
    optimizer = optim.SGD([parameter], lr=0.1, momentum=0.9)
    optimizer.param_groups[0]["params"].append(parameter)
    with pytest.raises(ValueError, match="appears more than once in the groups, which were edited: w"):
        optimizer.step([jnp.ones(2)] * 2)


@pytest.mark.parametrize(
    "use",
    [
        AveragedModel,
        lambda module: optim.group_parameters(module, []),
        F.adam().init,
        lambda module: optim.clip_grad_norm_(module, 1.0),
    ],
    ids=["average", "groups", "functional", "clip"],
)
def test_modules_of_pytorch_are_called_by_their_name(use: Callable[..., Any], torch: Any) -> None:
    with pytest.raises(TypeError, match="PyTorch module"):
        use(torch.nn.Linear(2, 2))
