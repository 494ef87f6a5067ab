"""Scripts that choose groups by name endings and by ids, or freeze parameters, train as the same scripts in PyTorch."""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tutorials import assert_same_layer, dataset, linear, mse_loss

import optimjax as optim


class Args:
    learning_rate = 0.1
    momentum = 0.9
    weight_decay = 0.05


args = Args()


class Quantized(nnx.Module):
    """A convolution-like layer, a head, and quantization parameters whose names end as the script expects."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.conv = nnx.Linear(3, 3, use_bias=False, rngs=rngs)
        self.fc = nnx.Linear(3, 2, rngs=rngs)
        self.scale_cw = nnx.Param(jnp.ones(3))
        self.scale_dx = nnx.Param(jnp.ones(3))

    def __call__(self, x: Any) -> Any:
        return self.fc(self.conv(x * self.scale_cw[None]) * self.scale_dx[None])


def test_groups_by_name_endings() -> None:
    model = Quantized()
    all_params = optim.parameters(model)
    weight_params = []
    quant_params = []
    for pname, p in optim.named_parameters(model):
        if any([pname.endswith(k) for k in ['cw', 'dw', 'cx', 'dx', 'lamb']]):  # fmt: skip  # noqa: C419
            quant_params += [p]
        elif ("conv" in pname or "fc" in pname) and "kernel" in pname:
            weight_params += [p]
    params_id = list(map(id, weight_params)) + list(map(id, quant_params))
    other_params = list(filter(lambda p: id(p) not in params_id, all_params))
    optimizer = optim.SGD([
        {'params': other_params},
        {'params': quant_params, 'lr': 0.1*args.learning_rate},
        {'params': weight_params, 'weight_decay': args.weight_decay}],
        lr=args.learning_rate,
        momentum=args.momentum,
    )  # fmt: skip

    assert [[str(p) for p in group["params"]] for group in optimizer.param_groups] == [
        ["fc.bias"],
        ["scale_cw", "scale_dx"],
        ["conv.kernel", "fc.kernel"],
    ]
    before = {str(p): np.asarray(p) for p in optim.parameters(model)}
    optimizer.backward(mse_loss, model, *(np.float32(a) for a in dataset(3, 2)[0]))
    optimizer.step()
    for group, rate, decay in zip(optimizer.param_groups, (0.1, 0.01, 0.1), (0, 0, 0.05), strict=True):
        for p in group["params"]:
            expected = before[str(p)] - rate * (np.asarray(p.grad) + decay * before[str(p)])
            np.testing.assert_allclose(p.value, expected, rtol=1e-5, atol=1e-6)


class Classifier(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.features = nnx.Linear(3, 4, rngs=rngs)
        self.classifiter = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(4)])

    def __call__(self, x: Any) -> Any:
        x = self.features(x)
        for layer in self.classifiter:
            x = jnp.tanh(layer(x))
        return x


def test_special_layers_by_id() -> None:
    net = Classifier()
    special_layers = nnx.List([net.classifiter[0], net.classifiter[3]])
    special_layers_params = list(map(id, optim.parameters(special_layers)))
    base_params = filter(lambda p: id(p) not in special_layers_params, optim.parameters(net))
    optimizer = optim.SGD([{'params': base_params},
        {'params': optim.parameters(special_layers), 'lr': 0.01}], lr=0.001)  # fmt: skip

    named = {id(p): name for name, p in optim.named_parameters(net)}
    base, special = ([named[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert special == [f"classifiter.{i}.{name}" for i in (0, 3) for name in ("bias", "kernel")]
    assert len(base) == 6
    before = {name: np.asarray(p) for name, p in optim.named_parameters(net)}
    loss = optimizer.backward(mse_loss, net, *(np.float32(a) for a in dataset(3, 4)[0]))
    assert np.isfinite(loss)
    optimizer.step()
    for name, p in optim.named_parameters(net):
        rate = 0.01 if name in special else 0.001
        np.testing.assert_allclose(p.value, before[name] - rate * np.asarray(p.grad), rtol=1e-5, atol=1e-7)


class Segmenter(nnx.Module):
    def __init__(self, theirs: Any):
        self.encoder = linear(theirs.encoder)
        self.seg = linear(theirs.seg)
        self.decoder = linear(theirs.decoder)

    def __call__(self, x: Any) -> Any:
        return self.decoder(jnp.tanh(self.seg(jnp.tanh(self.encoder(x)))))


def test_freezing_together_with_groups(double: Any) -> None:
    torch = double

    class TorchSegmenter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = torch.nn.Linear(3, 4)
            self.seg = torch.nn.Linear(4, 4)
            self.decoder = torch.nn.Linear(4, 2)

        def forward(self, x: Any) -> Any:
            return self.decoder(torch.tanh(self.seg(torch.tanh(self.encoder(x)))))

    theirs = TorchSegmenter()
    net = Segmenter(theirs)

    def groups(parameters: Any, named_parameters: Any, net: Any) -> Any:
        word1 = "seg"
        for name, p in named_parameters(net):
            str = name
            a = [m.start() for m in re.finditer(word1, str)]
            if a:
                p.requires_grad = False
            else:
                p.requires_grad = True
        base_params_id = list(map(id, parameters(net.encoder)))
        new_params = filter(lambda p: id(p) not in base_params_id and p.requires_grad,
            parameters(net))  # fmt: skip
        base_params = filter(lambda p: id(p) in base_params_id,
            parameters(net))  # fmt: skip
        return [{"params": base_params, "lr": 1e-4}, {"params": new_params}]

    optimizer_g = optim.SGD(
        groups(optim.parameters, optim.named_parameters, net), lr=0.1, momentum=0.9, weight_decay=0.0005
    )
    reference = torch.optim.SGD(
        groups(lambda m: m.parameters(), lambda m: m.named_parameters(), theirs),
        lr=0.1,
        momentum=0.9,
        weight_decay=0.0005,
    )
    assert [len(group["params"]) for group in optimizer_g.param_groups] == [2, 2]
    for input, target in dataset(3, 2):
        optimizer_g.zero_grad()
        optimizer_g.backward(mse_loss, net, input, target)
        optimizer_g.step()
        reference.zero_grad()
        torch.nn.functional.mse_loss(theirs(torch.from_numpy(input)), torch.from_numpy(target)).backward()
        reference.step()
    for name in ("encoder", "seg", "decoder"):
        assert_same_layer(getattr(net, name), getattr(theirs, name))
    assert all(p.grad is None for p in optim.parameters(net.seg))
    assert len(optimizer_g.state) == 4

    # The mistake that the script warns of: groups where the learning rate belongs.
    with pytest.raises(TypeError, match="multiple values for argument 'lr'"):
        optim.SGD(filter(lambda p: p.requires_grad, optim.parameters(net)), [{"params": []}], lr=0.1)


class Residual(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.conv1 = nnx.Conv(1, 2, (3, 3), rngs=rngs)
        self.bn1 = nnx.BatchNorm(2, rngs=rngs)
        self.layer1, self.layer2 = (nnx.Sequential(nnx.Linear(2, 2, rngs=rngs), nnx.relu) for _ in range(2))
        self.fc = nnx.Linear(2, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self.bn1(self.conv1(x))).mean((1, 2))
        return self.fc(self.layer2(self.layer1(x)))


def test_base_parameters_by_the_ids_of_several_layers() -> None:
    net = Residual()
    for p in optim.parameters(net.layer1):
        p.requires_grad = False
    base_params_id = list(map(id, optim.parameters(net.conv1))) + list(map(id, optim.parameters(net.bn1))) + \
        list(map(id, optim.parameters(net.layer1))) + list(map(id, optim.parameters(net.layer2)))  # fmt: skip
    new_params = filter(lambda p: id(p) not in base_params_id and p.requires_grad,
        optim.parameters(net))  # fmt: skip
    base_params = filter(lambda p: id(p) in base_params_id,
        optim.parameters(net))  # fmt: skip
    optimizer = optim.SGD([{'params': base_params, 'lr': 1e-4},
        {'params': new_params}], lr=0.1, momentum=0.9, weight_decay=0.0005)  # fmt: skip
    assert [sorted(map(str, group["params"])) for group in optimizer.param_groups] == [
        ["bn1.bias", "bn1.scale", "conv1.bias", "conv1.kernel"]
        + [f"layer{i}.layers.0.{name}" for i in (1, 2) for name in ("bias", "kernel")],
        ["fc.bias", "fc.kernel"],
    ]
    before = {name: np.array(p) for name, p in optim.named_parameters(net)}
    statistics = np.array(net.bn1.mean)
    optimizer.backward(mse_loss, net, np.random.default_rng(0).normal(size=(3, 5, 5, 1)).astype(np.float32), 1.0)
    optimizer.step()
    moved = {name for name, p in optim.named_parameters(net) if not np.array_equal(p, before[name])}
    assert {name for name in before if not name.startswith("layer1")} - moved <= {"conv1.bias"}  # before a norm: 0
    assert not any(name.startswith("layer1") for name in moved)
    assert not np.array_equal(statistics, net.bn1.mean[...])


def test_the_optional_filter_of_frozen_parameters() -> None:
    net = Classifier()
    for p in optim.parameters(net.features):
        p.requires_grad = False
    optimizer = optim.SGD(
        filter(lambda p: p.requires_grad, optim.parameters(net)),
        lr=0.01, weight_decay=1e-5, momentum=0.9)  # fmt: skip
    assert len(optimizer.param_groups[0]["params"]) == 8
