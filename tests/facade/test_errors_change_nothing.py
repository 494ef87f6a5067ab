"""An error names what is wrong, and leaves parameters, gradients, state and groups as they were."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import VALUES, Net, groups, module_leaves

import optimjax as optim


def contents(optimizer: Any) -> Any:
    """Everything that an error must not change, as plain comparable values."""
    plain = lambda x: np.asarray(x).tolist() if hasattr(x, "shape") else x  # noqa: E731
    groups = [{**group, "params": [id(box) for box in group["params"]]} for group in optimizer.param_groups]
    state = {id(box): {k: plain(v) for k, v in entries.items()} for box, entries in optimizer.state.items()}
    boxes = [box for group in optimizer.param_groups for box in group["params"]]
    return copy.deepcopy((groups, state, [(plain(box.value), plain(box.grad)) for box in boxes]))


def two_groups() -> Any:
    optimizer = optim.Adam(
        [{"params": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}}, {"params": {"h": jnp.ones(2)}, "lr": 0.5}], lr=0.1
    )
    optimizer.step([{"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, {"h": jnp.ones(2)}])
    for box in optimizer.param_groups[0]["params"]:
        box.grad = jnp.ones(box.shape)
    return optimizer


GOOD = {"w": np.ones((2, 3), np.float32), "b": np.ones(3, np.float32)}
H = {"h": np.ones(2, np.float32)}


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        ([GOOD], ValueError, "2 groups"),
        (GOOD, ValueError, "2 groups"),
        ([GOOD, {"k": H["h"]}], ValueError, r"missing \['h'\], unexpected \['k'\]"),
        ([{"w": GOOD["w"]}, H], ValueError, r"missing \['b'\]"),
        ([{**GOOD, "c": 1.0}, H], ValueError, r"unexpected \['c'\]"),
        ([list(GOOD.values()), H], ValueError, "structure"),
        ([GOOD, {"h": np.ones(3, np.float32)}], ValueError, r"'h' has shape \(3,\), the parameter has \(2,\)"),
        ([GOOD, {"h": np.ones((1, 2), np.float32)}], ValueError, r"'h' has shape \(1, 2\)"),
        ([GOOD, {"h": np.float32(1)}], ValueError, r"'h' has shape \(\)"),
        ([GOOD, {"h": np.ones(2, int)}], TypeError, "'h' is int64: it must be a floating array"),
        ([GOOD, {"h": np.ones(2, bool)}], TypeError, "'h' is bool"),
        ([GOOD, {"h": np.ones(2, complex)}], TypeError, "'h' is complex128, the parameter is real"),
        ([GOOD, {"h": "grad"}], TypeError, "'h' must be an array or None, got str"),
    ],
)
def test_gradients_that_do_not_fit(grads: Any, error: Any, message: str) -> None:
    optimizer = two_groups()
    before = contents(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step(grads)
    assert contents(optimizer) == before


def test_gradients_of_a_module_that_do_not_fit() -> None:
    net = Net([np.float32(v) for v in VALUES])
    optimizer = optim.SGD(net, lr=0.1)
    grads = jax.tree.map(jnp.ones_like, nnx.state(net, nnx.Param))
    before = contents(optimizer)
    with pytest.raises(ValueError, match=r"missing \['head.kernel'\]"):
        optimizer.step({"base": grads["base"]})
    grads["head"]["kernel"] = jnp.ones(2)
    with pytest.raises(ValueError, match=r"'head.kernel' has shape \(2,\), the parameter has \(4, 2\)"):
        optimizer.step(grads)
    assert contents(optimizer) == before


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda o: o.step(lambda params: params[0]["w"]), TypeError, "scalar"),
        (lambda o: o.step(lambda params: jnp.sum(params[0]["missing"])), KeyError, "missing"),
        (lambda o: o.step([GOOD, H], 3), TypeError, "no further arguments"),
        (lambda o: o.backward(lambda params: params[0]["w"]), TypeError, "scalar"),
        (lambda o: o.backward(3), TypeError, "callable, got int: 3"),
        (lambda o: o.add_param_group([jnp.ones(2)]), TypeError, "must be a dict, but got"),
        (lambda o: o.add_param_group({"lr": 1.0}), ValueError, "no 'params'"),
        (lambda o: o.add_param_group({"params": {"z": jnp.ones(2)}, "lr": -1}), ValueError, "rate: -1"),
        (lambda o: o.add_param_group({"params": {"z": jnp.ones(2)}, "lr": "fast"}), TypeError, "'fast'"),
        (
            lambda o: o.add_param_group({"params": {"z": jnp.ones(2)}, "weight_decy": 1}),
            TypeError,
            "option 'weight_decy'.*'weight_decay'",
        ),
        (lambda o: o.add_param_group({"params": o.param_groups[0]["params"][:1]}), ValueError, "more than one|names"),
        (
            lambda o: o.add_param_group({"params": [("b", o.param_groups[0]["params"][0])]}),
            ValueError,
            "some parameters appear in more than one parameter group: b",
        ),
        (lambda o: o.add_param_group({"params": [optim.Parameter(1.0)]}), ValueError, "with/without names"),
        (lambda o: o.add_param_group({"params": {optim.Parameter(1.0)}}), TypeError, "sets"),
        (lambda o: o.add_param_group({"params": {"z": jnp.ones(2)}, "amsgrad": jnp.ones(())}), TypeError, "plain"),
    ],
)
def test_an_error_changes_nothing(call: Any, error: Any, message: str) -> None:
    optimizer = two_groups()
    before = contents(optimizer)
    with pytest.raises(error, match=message):
        call(optimizer)
    assert contents(optimizer) == before
    optimizer.step([GOOD, H])  # and it still works


def test_a_group_that_was_appended_by_hand_is_told_how() -> None:
    optimizer = two_groups()
    optimizer.param_groups.append({"params": [optim.Parameter(1.0)]})
    with pytest.raises(KeyError, match=r"'lr' of param_groups\[2\] is missing: groups are added with add_param_group"):
        optimizer.step()


def test_a_number_in_text_is_no_number() -> None:
    optimizer = two_groups()
    optimizer.param_groups[1]["lr"] = "0.1"
    with pytest.raises(ValueError, match="which is not a number: it is a string"):
        optimizer.step([GOOD, H])


def test_a_group_value_that_is_no_number_is_named() -> None:
    optimizer = two_groups()
    optimizer.param_groups[1]["lr"] = "fast"
    before = contents(optimizer)
    with pytest.raises(ValueError, match=r"lr of param_groups\[1\] is 'fast'"):
        optimizer.step([GOOD, H])
    assert contents(optimizer) == before


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (lambda: [], ValueError, "empty parameter list"),
        (lambda: (), ValueError, "empty parameter list"),
        (lambda: {}, ValueError, "empty parameter list"),
        (lambda: iter(()), ValueError, "empty parameter list: nothing was in it; a generator can be used once only"),
        (lambda: {"n": 3}, ValueError, "empty parameter list"),
        (lambda: nnx.Dropout(0.5, rngs=nnx.Rngs(0)), ValueError, "empty parameter list"),
        (lambda: optim.parameters(nnx.Dropout(0.5)), ValueError, "empty parameter list"),
        (lambda: optim.Parameter(1.0), TypeError, "single"),
        (lambda: {optim.Parameter(1.0)}, TypeError, "ordering in sets"),
        (lambda: {"w": optim.Parameter(1.0)}, TypeError, r"\.items\(\)"),
        (lambda: [optim.Parameter(1.0), jnp.ones(2)], TypeError, "can only optimize Parameters"),
        (lambda: [optim.Parameter(1.0), ("b", optim.Parameter(1.0))], ValueError, "with/without names"),
        (lambda: [("b", optim.Parameter(1.0)), ("b", optim.Parameter(1.0))], ValueError, "differ"),
        (lambda: [optim.Parameter(1.0)] * 2, ValueError, "more than once"),
        (lambda: groups([box := optim.Parameter(1.0)], [box]), ValueError, "more than one parameter group"),
        (
            lambda: [{"params": [optim.Parameter(1.0)], "lrs": 1}],
            TypeError,
            r"unknown option 'lrs' of param_groups\[0\].*mean 'lr'",
        ),
        (lambda: 3, TypeError, "must hold parameters, got int: 3"),
        (lambda: None, TypeError, "must hold parameters, got NoneType"),
        (lambda: "w", TypeError, "must hold parameters, got str: 'w'"),
        (lambda: jnp.arange(3), TypeError, "must hold parameters, got ArrayImpl"),
        (lambda: groups([optim.Parameter(1.0)], None), TypeError, r"params of param_groups\[1\] must hold parameters"),
        (lambda: [{"params": [optim.Parameter(1.0)], "lr": -1}], ValueError, "Invalid learning rate: -1"),
    ],
)
def test_parameters_that_cannot_be_optimized(params: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        optim.SGD(params(), lr=0.1)


@pytest.mark.parametrize("kwargs", [{"lr": -1}, {"momentum": -1}, {"learning_rate": 0.1}])
def test_a_failed_constructor_leaves_a_module_alone(kwargs: Any) -> None:
    net = Net([np.float32(v) for v in VALUES])
    before = [np.asarray(v) for v in module_leaves(net)]
    with pytest.raises((ValueError, TypeError)):
        optim.SGD(net, **kwargs)
    for old, variable in zip(before, module_leaves(net), strict=True):
        np.testing.assert_array_equal(old, variable[...])
    assert all(box.grad is None for box in optim.parameters(net))


@pytest.mark.parametrize("call", [lambda o: o.step(None, 1), lambda o: o.step([jnp.ones(2)], 1)])
def test_arguments_without_a_loss_function_are_refused(call: Any) -> None:
    box = optim.Parameter(jnp.ones(2))
    box.grad = jnp.ones(2)
    with pytest.raises(TypeError, match="takes no further arguments, got args"):
        call(optim.SGD([box]))
    np.testing.assert_array_equal(box.value, [1, 1])


def test_messages_name_parameters_by_the_names_of_their_pairs_or_by_their_place() -> None:
    def boxes() -> list[Any]:
        return [optim.Parameter(jnp.ones(2)) for _ in range(2)]

    bad = [jnp.ones(2), jnp.ones(3)]
    with pytest.raises(ValueError, match=r"gradient of 'enc\.b' has shape \(3,\)"):
        optim.Adam(zip(["enc.a", "enc.b"], boxes(), strict=True)).step({"enc.a": bad[0], "enc.b": bad[1]})
    with pytest.raises(ValueError, match=r"gradient of 'params\[1\] of param_groups\[1\]' has shape \(3,\)"):
        optim.Adam(groups(boxes(), boxes())).step([bad[:1] * 2, bad])


def test_a_failing_write_into_the_module_loses_no_state() -> None:
    """The program has donated the slots by then."""

    class Guarded(nnx.BatchStat[Any]):
        armed = False

        def set_value(self, value: Any, **kwargs: Any) -> None:
            if self.armed:
                raise KeyboardInterrupt
            super().set_value(value, **kwargs)

    class Counting(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.ones(3))
            self.calls = Guarded(jnp.zeros(()))

    def loss(model: Any) -> Any:
        return jnp.sum(model.w[...] ** 2)

    model = Counting()
    optimizer = optim.Adam(model)
    optimizer.step(loss)
    optimizer.step(loss)
    Guarded.armed = True
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(loss)
    Guarded.armed = False
    optimizer.step(loss)
    assert optimizer.state_dict()["state"][0]["step"] == 4
    assert np.isfinite(optimizer.state_dict()["state"][0]["exp_avg"]).all()
