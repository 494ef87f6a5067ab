"""Scripts of PyTorch tutorials, line by line in this library's terms, train as the same scripts in PyTorch."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tutorials import assert_same_layer, dataset, linear, mse_loss

import optimjax as optim

# --- How to use an optimizer: per-layer options, the training loop, the layout of a state dict ----------------------


class Model(nnx.Module):
    def __init__(self, theirs: Any):
        self.base = linear(theirs.base)
        self.classifier = linear(theirs.classifier)

    def __call__(self, x: Any) -> Any:
        return self.classifier(jnp.tanh(self.base(x)))


def torch_model(torch: Any) -> Any:
    class TorchModel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = torch.nn.Linear(3, 5)
            self.classifier = torch.nn.Linear(5, 2)

        def forward(self, x: Any) -> Any:
            return self.classifier(torch.tanh(self.base(x)))

    return TorchModel()


def test_per_layer_options_and_the_training_loop(double: Any) -> None:
    torch = double
    theirs = torch_model(torch)
    model = Model(theirs)

    optimizer = optim.SGD(model, lr=0.01, momentum=0.9)
    var1, var2 = optim.Parameter(1.0), optim.Parameter(2.0)
    optimizer = optim.Adam([var1, var2], lr=0.0001)

    optimizer = optim.SGD([
                    {'params': optim.parameters(model.base)},
                    {'params': optim.parameters(model.classifier), 'lr': 1e-3}
                ], lr=1e-2, momentum=0.9)  # fmt: skip

    for input, target in dataset(3, 2):
        optimizer.zero_grad()
        optimizer.backward(mse_loss, model, input, target)
        optimizer.step()

    reference = torch.optim.SGD(
        [{"params": theirs.base.parameters()}, {"params": theirs.classifier.parameters(), "lr": 1e-3}],
        lr=1e-2,
        momentum=0.9,
    )
    for input, target in dataset(3, 2):
        reference.zero_grad()
        output = theirs(torch.from_numpy(input))
        torch.nn.functional.mse_loss(output, torch.from_numpy(target)).backward()
        reference.step()
    assert_same_layer(model.base, theirs.base)
    assert_same_layer(model.classifier, theirs.classifier)


def test_the_closure_form_of_the_same_loop(double: Any) -> None:
    torch = double
    theirs = torch_model(torch)
    model = Model(theirs)
    optimizer = optim.SGD(model, lr=0.01, momentum=0.9)
    losses = [float(optimizer.step(mse_loss, input, target)) for input, target in dataset(3, 2)]

    reference = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.9)
    for loss, (input, target) in zip(losses, dataset(3, 2), strict=True):

        def closure(input: Any = input, target: Any = target) -> Any:
            reference.zero_grad()
            loss = torch.nn.functional.mse_loss(theirs(torch.from_numpy(input)), torch.from_numpy(target))
            loss.backward()
            return loss

        assert abs(reference.step(closure).item() - loss) < 1e-12
    assert_same_layer(model.base, theirs.base)


def test_the_state_dict_of_the_documentation_page() -> None:
    first, *others = (optim.Parameter(jnp.ones(size)) for size in (2, 3, 4, 5))
    optimizer = optim.SGD(
        [{"params": [first]}, {"params": others, "lr": 0.001, "weight_decay": 0.5}], lr=0.01, momentum=0.9
    )
    for box in (first, *others):
        box.grad = jnp.ones(box.shape)
    optimizer.step()
    state_dict = optimizer.state_dict()
    assert state_dict.keys() == {"state", "param_groups"}
    assert list(state_dict["state"]) == [0, 1, 2, 3]
    assert [list(entries) for entries in state_dict["state"].values()] == [["momentum_buffer"]] * 4
    shown = [{key: group[key] for key in ("lr", "weight_decay", "params")} for group in state_dict["param_groups"]]
    assert shown == [
        {"lr": 0.01, "weight_decay": 0, "params": [0]},
        {"lr": 0.001, "weight_decay": 0.5, "params": [1, 2, 3]},
    ]


def test_adam_has_no_momentum(torch: Any) -> None:
    """One of the scripts says that it has."""
    for lib, parameter in ((optim, optim.Parameter(1.0)), (torch.optim, torch.nn.Parameter(torch.ones(())))):
        with pytest.raises(TypeError, match="unexpected keyword argument 'momentum'"):
            lib.Adam([parameter], lr=0.01, momentum=0.9)


# --- The documentation page of an optimizer: groups, loading, hooks -------------------------------------------------


def test_the_methods_of_the_documentation_page() -> None:
    """The page is that of ASGD."""
    param0, weight, bias = (optim.Parameter(jnp.ones(size)) for size in (2, 3, 4))
    optimizer = optim.ASGD([("param0", param0)], lr=0.01, lambd=0.0001, alpha=0.75, t0=1000000.0, weight_decay=0,
        foreach=None, maximize=False, differentiable=False, capturable=False)  # fmt: skip
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: calls.append("step pre")),
        optimizer.register_step_post_hook(lambda optimizer, args, kwargs: calls.append("step post")),
        optimizer.register_state_dict_pre_hook(lambda optimizer: calls.append("state_dict pre")),
        optimizer.register_state_dict_post_hook(lambda optimizer, state_dict: calls.append("state_dict post")),
        optimizer.register_load_state_dict_pre_hook(lambda optimizer, state_dict: calls.append("load pre")),
        optimizer.register_load_state_dict_post_hook(lambda optimizer: calls.append("load post")),
        optimizer.register_load_state_dict_post_hook(lambda optimizer: calls.append("load post first"), prepend=True),
    ]

    # Fine-tuning: frozen layers become trainable and are added while training.
    optimizer.add_param_group({"params": [("layer.weight", weight), ("layer.bias", bias)], "lr": 0.001})
    optimizer.backward(lambda groups: sum(jnp.sum(value**2) for group in groups for value in group.values()))
    optimizer.step()
    state_dict = optimizer.state_dict()
    assert [(group["lr"], group["params"], group["param_names"]) for group in state_dict["param_groups"]] == [
        (0.01, [0], ["param0"]),
        (0.001, [1, 2], ["layer.weight", "layer.bias"]),
    ]
    assert [list(entries) for entries in state_dict["state"].values()] == [["step", "eta", "mu", "ax"]] * 3
    optimizer.load_state_dict(state_dict)
    assert calls == [
        "step pre",
        "step post",
        "state_dict pre",
        "state_dict post",
        "load pre",
        "load post first",
        "load post",
    ]
    for handle in handles:
        handle.remove()

    optimizer.zero_grad(set_to_none=False)
    assert all(not np.any(p.grad) for p in (param0, weight, bias))
    before = np.asarray(param0)
    optimizer.step()  # a gradient that is zero is one: `lambd` decays the parameter
    np.testing.assert_allclose(param0.value, before * (1 - 0.0001 * 0.01), rtol=1e-7)
    assert optimizer.state[param0]["step"] == 2
    optimizer.zero_grad()
    assert all(p.grad is None for p in (param0, weight, bias))
    before = np.asarray(param0)
    optimizer.step()
    assert optimizer.state[param0]["step"] == 2  # without gradients nothing is counted
    np.testing.assert_array_equal(param0.value, before)
    assert len(calls) == 7


# --- Adjusting the learning rate ------------------------------------------------------------------------------------


init_lr = 0.1
total_epoch = 100
warm_up_step = 10


def learning_rates(lib: Any, parameter: Any) -> dict[str, list[float]]:
    """The script, in either library: one list of rates for each of its pictures."""

    def new_optimizer() -> Any:
        optimizer = lib.SGD([parameter], init_lr)
        assert [param_group["lr"] for param_group in optimizer.param_groups] == [0.1]
        return optimizer

    def adjust_learning_rate(optimizer: Any, epoch: int, init_lr: float) -> None:
        lr = init_lr * (0.1 ** (epoch // 30))
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr

    def adjust_with_warm_up(optimizer: Any, warm_up_step: int, epoch: int, init_lr: float) -> None:
        if epoch < warm_up_step:  # noqa: SIM108
            lr = (epoch + 1) / warm_up_step * init_lr
        else:
            lr = init_lr * (0.1 ** (epoch // 30))
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr

    def by_hand(adjust: Any) -> list[float]:
        optimizer = new_optimizer()
        lrs = []
        for epoch in range(total_epoch):
            adjust(optimizer, epoch)
            lrs.append(optimizer.param_groups[0]["lr"])
        return lrs

    def by_scheduler(make_scheduler: Any) -> list[float]:
        optimizer = new_optimizer()
        scheduler = make_scheduler(optimizer)
        lrs = []
        for _ in range(total_epoch):
            lrs.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return lrs

    warm_up = lambda epoch: (  # noqa: E731
        (epoch + 1) / warm_up_step if epoch < warm_up_step else 0.1 ** (epoch // 30)
    )
    cosine = lambda epoch: (  # noqa: E731
        (epoch + 1) / warm_up_step
        if epoch < warm_up_step
        else 0.5 * (np.cos((epoch - warm_up_step) / (total_epoch - warm_up_step) * np.pi) + 1)
    )
    return {
        "adjustLR": by_hand(lambda optimizer, epoch: adjust_learning_rate(optimizer, epoch, init_lr)),
        "StepLR": by_scheduler(lambda o: lib.lr_scheduler.StepLR(o, step_size=30, gamma=0.1)),
        "adjust warm-up": by_hand(
            lambda optimizer, epoch: adjust_with_warm_up(optimizer, warm_up_step, epoch, init_lr)
        ),
        "LambdaLR warm-up": by_scheduler(lambda o: lib.lr_scheduler.LambdaLR(o, warm_up)),
        "LambdaLR cosine": by_scheduler(lambda o: lib.lr_scheduler.LambdaLR(o, cosine)),
    }


def test_adjusting_the_learning_rate(torch: Any) -> None:
    ours = learning_rates(optim, optim.Parameter(1.0))
    assert ours == learning_rates(torch.optim, torch.nn.Parameter(torch.ones(())))
    np.testing.assert_allclose(ours["adjustLR"], ours["StepLR"], rtol=1e-14)
    np.testing.assert_allclose(ours["adjust warm-up"], ours["LambdaLR warm-up"], rtol=1e-14)
    assert ours["LambdaLR cosine"][0] == pytest.approx(0.01)
    assert max(ours["LambdaLR cosine"]) == pytest.approx(0.1)
    assert len(ours["LambdaLR cosine"]) == 100


# --- Four optimizers on a noisy parabola ----------------------------------------------------------------------------


LR = 0.01
BATCH_SIZE = 32
EPOCH = 3


class Net(nnx.Module):
    def __init__(self, theirs: Any):
        self.hidden = linear(theirs.hidden)
        self.predict = linear(theirs.predict)

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self.hidden(x))
        x = self.predict(x)
        return x


def test_four_optimizers_on_a_noisy_parabola(double: Any) -> None:
    torch = double

    class TorchNet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = torch.nn.Linear(1, 20)
            self.predict = torch.nn.Linear(20, 1)

        def forward(self, x: Any) -> Any:
            return self.predict(torch.nn.functional.relu(self.hidden(x)))

    x = torch.unsqueeze(torch.linspace(-1, 1, 1000), dim=1)
    y = x.pow(2) + 0.1 * torch.normal(torch.zeros(*x.size()))
    order = [torch.randperm(1000) for _ in range(EPOCH)]
    loader = [(x[rows], y[rows]) for epoch in order for rows in epoch.split(BATCH_SIZE)]

    torch_nets = [TorchNet() for _ in range(4)]
    nets = [Net(theirs) for theirs in torch_nets]
    net_sgd, net_momentum, net_rmsprop, net_adam = nets

    opt_sgd = optim.SGD(net_sgd, lr=LR)
    opt_momentum = optim.SGD(net_momentum, lr=LR, momentum=0.8)
    opt_rmsprop = optim.RMSprop(net_rmsprop, lr=LR, alpha=0.9)
    opt_adam = optim.Adam(net_adam, lr=LR, betas=(0.9, 0.99))
    optimizers = [opt_sgd, opt_momentum, opt_rmsprop, opt_adam]

    def loss_func(net: Any, b_x: Any, b_y: Any) -> Any:
        output = net(b_x)
        return jnp.mean((output - b_y) ** 2)

    losses_his: list[list[float]] = [[], [], [], []]
    for batch_x, batch_y in loader:
        b_x, b_y = batch_x.numpy(), batch_y.numpy()
        for opt, l_his in zip(optimizers, losses_his, strict=True):
            opt.zero_grad()
            loss = opt.backward(loss_func, b_x, b_y)
            opt.step()
            l_his.append(loss.item())

    references = [
        torch.optim.SGD(torch_nets[0].parameters(), lr=LR),
        torch.optim.SGD(torch_nets[1].parameters(), lr=LR, momentum=0.8),
        torch.optim.RMSprop(torch_nets[2].parameters(), lr=LR, alpha=0.9),
        torch.optim.Adam(torch_nets[3].parameters(), lr=LR, betas=(0.9, 0.99)),
    ]
    for net, opt, l_his in zip(torch_nets, references, losses_his, strict=True):
        for (b_x, b_y), ours in zip(loader, l_his, strict=True):
            loss = torch.nn.functional.mse_loss(net(b_x), b_y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            assert abs(loss.item() - ours) < 1e-10
    first, last = (np.mean([his[part] for his in losses_his], axis=1) for part in (slice(0, 10), slice(-10, None)))
    assert np.all(last < first)
