"""The same script in PyTorch and here calls hooks in the same order with the same things."""

import copy
import functools
import importlib
import itertools
import pickle
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optimjax as optim

KINDS = ("step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")
STATE_KINDS = KINDS[2:]


class Ours:
    """What a script needs, from this library."""

    module = optim.optimizer

    @staticmethod
    def optimizer() -> Any:
        box = optim.Parameter(1.0)
        box.grad = jnp.ones(())
        return optim.SGD([box], lr=0.5, momentum=0.9)

    @staticmethod
    def value(optimizer: Any) -> float:
        return float(optimizer.param_groups[0]["params"][0])


@pytest.fixture
def theirs(torch: Any) -> Any:
    """The same from PyTorch."""

    class Theirs:
        module = importlib.import_module("torch.optim.optimizer")

        @staticmethod
        def optimizer() -> Any:
            tensor = torch.nn.Parameter(torch.ones(()))
            tensor.grad = torch.ones(())
            return torch.optim.SGD([tensor], lr=0.5, momentum=0.9)

        @staticmethod
        def value(optimizer: Any) -> float:
            return optimizer.param_groups[0]["params"][0].item()

    return Theirs


def register(optimizer: Any, kind: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(optimizer, f"register_{kind}_hook")(*args, **kwargs)


def describe(kind: str, args: tuple[Any, ...], optimizer: Any) -> tuple[Any, ...]:
    """A call in terms that both libraries share."""
    assert args[0] is optimizer
    if kind.startswith("step"):
        _, given, kwargs = args
        assert given[0] is optimizer
        return kind, len(given), kwargs
    return (kind, *(sorted(state_dict) for state_dict in args[1:]))


def same_in_both(script: Any, theirs: Any) -> Any:
    ours = script(Ours)
    assert ours == script(theirs)
    return ours


def test_every_kind_in_order(theirs: Any) -> None:
    def script(lib: Any) -> Any:
        log: list[Any] = []
        optimizer = lib.optimizer()
        for kind, label in itertools.product(KINDS, "ab"):
            register(optimizer, kind, lambda *args, k=kind, n=label: log.append((n, *describe(k, args, optimizer))))
        optimizer.step()
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        optimizer.step()
        return log

    assert len(same_in_both(script, theirs)) == 16


def test_prepend(theirs: Any) -> None:
    def script(lib: Any) -> Any:
        log: list[Any] = []
        optimizer = lib.optimizer()
        for kind in STATE_KINDS:
            for label, prepend in [("a", False), ("b", True), ("c", False), ("d", True)]:
                register(optimizer, kind, lambda *_, k=kind, n=label: log.append((k, n)), prepend=prepend)
        optimizer.load_state_dict(optimizer.state_dict())
        return log

    assert [label for _, label in same_in_both(script, theirs)] == list("dbac") * 4


def test_a_handle_has_the_id_of_its_hook(theirs: Any) -> None:
    def script(lib: Any) -> Any:
        first, second = (register(lib.optimizer(), "step_pre", lambda *_: None) for _ in range(2))
        return type(first.id), second.id - first.id

    assert same_in_both(script, theirs) == (int, 1)


def test_a_loading_hook_that_returns_no_dict() -> None:
    optimizer = Ours.optimizer()
    optimizer.step()
    saved = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(lambda *_: [saved])
    with pytest.raises(ValueError, match="a state dict is a dict, got list"):
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict() == saved


def test_remove_and_context_manager(theirs: Any) -> None:
    def script(lib: Any) -> Any:
        log: list[Any] = []
        optimizer = lib.optimizer()
        handles = [register(optimizer, kind, lambda *_, k=kind: log.append(k)) for kind in KINDS]
        with register(optimizer, "step_pre", lambda *_: log.append("with")):
            optimizer.step()
        optimizer.step()
        for handle in handles:
            handle.remove()
            handle.remove()  # twice is once
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        return log

    assert same_in_both(script, theirs) == ["step_pre", "with", "step_post", "step_pre", "step_post"]


def test_a_hook_may_replace_the_state_dict(theirs: Any) -> None:
    def script(lib: Any) -> Any:
        optimizer = lib.optimizer()
        optimizer.step()
        saved = optimizer.state_dict()

        register(optimizer, "state_dict_post", lambda o, s: {**s, "extra": 1})
        register(optimizer, "state_dict_post", lambda o, s: s.update(seen=sorted(s)))  # in place
        out = optimizer.state_dict()

        def halve(optimizer: Any, state_dict: Any) -> Any:
            groups = [{**group, "lr": group["lr"] / 2} for group in state_dict["param_groups"]]
            return {**state_dict, "param_groups": groups}

        register(optimizer, "load_state_dict_pre", halve)
        register(optimizer, "load_state_dict_pre", lambda o, s: s.update(param_groups=list(s["param_groups"])))
        optimizer.load_state_dict(saved)
        return sorted(out), out["seen"], optimizer.param_groups[0]["lr"], saved["param_groups"][0]["lr"], sorted(saved)

    assert same_in_both(script, theirs)[2:4] == (0.25, 0.5)


def test_the_loading_hook_gets_a_shallow_copy(theirs: Any) -> None:
    def script(lib: Any) -> Any:
        optimizer = lib.optimizer()
        saved = optimizer.state_dict()
        given: list[Any] = []
        register(optimizer, "load_state_dict_pre", lambda o, s: given.append(s))
        optimizer.load_state_dict(saved)
        return given[0] is saved, given[0]["param_groups"] is saved["param_groups"]

    assert same_in_both(script, theirs) == (False, True)


def test_a_pre_hook_may_change_gradients_and_groups(theirs: Any) -> None:
    """Gradient clipping as a hook."""

    def script(lib: Any) -> Any:
        optimizer = lib.optimizer()

        def scale(optimizer: Any, args: Any, kwargs: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 0.25
                for p in group["params"]:
                    p.grad = p.grad * 0.5

        optimizer.register_step_pre_hook(scale)
        optimizer.step()
        return lib.value(optimizer)

    assert same_in_both(script, theirs) == 1 - 0.25 * 0.5


def test_a_pre_hook_may_replace_the_arguments(theirs: Any) -> None:
    """The closure form: each hook sees what the one before it returned, post hooks what the step got."""

    def script(lib: Any) -> Any:
        log: list[Any] = []
        optimizer = lib.optimizer()
        handle = optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o,), kwargs))
        optimizer.register_step_pre_hook(lambda o, args, kwargs: log.append(len(args)))
        optimizer.register_step_post_hook(lambda o, args, kwargs: log.append(len(args)))
        loss = optimizer.step(lambda *_: 1 / 0)  # the hook takes the closure away
        handle.remove()
        return loss, log, lib.value(optimizer)

    assert same_in_both(script, theirs) == (None, [1, 1], 0.5)


def test_arguments_of_the_two_other_forms_reach_the_hooks() -> None:
    optimizer = optim.SGD([jnp.ones(2)], lr=0.5)
    seen: list[Any] = []
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(args[1:]))
    grads = [jnp.ones(2)]
    optimizer.step(grads)
    loss = lambda params, x: x * jnp.sum(params[0])  # noqa: E731
    optimizer.step(loss, 2.0)
    assert seen[0][0] is grads
    assert seen[1] == (loss, 2.0)

    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((args[0], [2 * g for g in args[1]]), kwargs))
    before = np.asarray(optimizer.params[0])
    optimizer.step(grads)
    np.testing.assert_allclose(optimizer.params[0], before - 1.0)


@pytest.mark.parametrize("result", [3, (1, 2, 3), [1, 2]])
def test_a_pre_hook_that_returns_something_else(result: Any, theirs: Any) -> None:
    def script(lib: Any) -> Any:
        optimizer = lib.optimizer()
        optimizer.register_step_pre_hook(lambda *_: result)
        with pytest.raises(RuntimeError, match=r"must return None or a tuple of \(new_args, new_kwargs\)"):
            optimizer.step()
        return lib.value(optimizer)

    assert same_in_both(script, theirs) == 1.0


def test_the_hook_is_named_in_one_line() -> None:
    optimizer = Ours.optimizer()
    optimizer.register_step_pre_hook(lambda optimizer, *_: optimizer)
    with pytest.raises(RuntimeError, match=r"step pre-hook .*<lambda> of SGD must .* got SGD") as raised:
        optimizer.step()
    assert "\n" not in str(raised.value)


def test_global_hooks_surround_those_of_the_optimizer(theirs: Any) -> None:
    def script(lib: Any) -> Any:
        log: list[Any] = []
        first, second = lib.optimizer(), lib.optimizer()
        module = lib.module
        names = {id(first): "first", id(second): "second"}
        handles = [
            module.register_optimizer_step_pre_hook(lambda o, a, k: log.append(("global pre", names[id(o)], len(a)))),
            module.register_optimizer_step_post_hook(lambda o, a, k: log.append(("global post", names[id(o)], len(a)))),
        ]
        try:
            first.register_step_pre_hook(lambda o, a, k: log.append("pre"))
            first.register_step_post_hook(lambda o, a, k: log.append("post"))
            first.step()
            second.step()
            handles[0].remove()
            first.step()
        finally:
            for handle in handles:
                handle.remove()
        first.step()
        return log

    assert same_in_both(script, theirs) == [
        ("global pre", "first", 1),
        "pre",
        "post",
        ("global post", "first", 1),
        ("global pre", "second", 1),
        ("global post", "second", 1),
        "pre",
        "post",
        ("global post", "first", 1),
        "pre",
        "post",
    ]


def test_hooks_see_the_value_before_and_after(theirs: Any) -> None:
    def script(lib: Any) -> Any:
        log: list[float] = []
        optimizer = lib.optimizer()
        optimizer.register_step_pre_hook(lambda o, a, k: log.append(lib.value(o)))
        optimizer.register_step_post_hook(lambda o, a, k: log.append(lib.value(o)))
        for _ in range(3):
            optimizer.step()
        return [round(value, 5) for value in log]

    same_in_both(script, theirs)


def test_a_failing_step_runs_no_post_hook_and_the_next_step_runs_all(theirs: Any) -> None:
    def script(lib: Any) -> Any:
        log: list[str] = []
        optimizer = lib.optimizer()
        optimizer.register_step_pre_hook(lambda *_: log.append("pre"))
        optimizer.register_step_post_hook(lambda *_: log.append("post"))
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda *_: 1 / 0)
        optimizer.step()
        return log

    assert same_in_both(script, theirs) == ["pre", "pre", "post"]


def test_a_hook_may_remove_itself() -> None:
    optimizer = Ours.optimizer()
    log: list[str] = []

    def once(*_: Any) -> None:
        log.append("once")
        handle.remove()

    handle = optimizer.register_step_pre_hook(once)
    optimizer.register_step_pre_hook(lambda *_: log.append("always"))
    optimizer.step()
    optimizer.step()
    assert log == ["once", "always", "always"]


def test_hooks_on_a_module_see_the_module() -> None:
    model = nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))
    optimizer = optim.SGD(model, lr=0.1)
    seen: list[float] = []
    optimizer.register_step_post_hook(lambda o, a, k: seen.append(float(o.params.kernel[0, 0])))
    optimizer.step(lambda model, x: jnp.sum(model(x)), jnp.ones((1, 1)))
    assert seen == [float(model.kernel[0, 0])]


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_must_be_callable(kind: str) -> None:
    with pytest.raises(TypeError, match="callable, got int: 3"):
        register(Ours.optimizer(), kind, 3)


def survivors(lib: Any, duplicate: Any) -> Any:
    """Which hooks a copy has; whether a handle takes a hook off the copy, and off the original."""
    log = LOG  # a global is the same for hooks that were copied
    optimizer = lib.optimizer()
    handles = [register(optimizer, kind, functools.partial(record, kind)) for kind in KINDS]
    twin = duplicate(optimizer)

    def calls(of: Any) -> list[Any]:
        log.clear()
        of.step()
        of.load_state_dict(of.state_dict())
        return list(log)

    seen = [calls(twin)]
    register(twin, "step_pre", lambda *_: log.append("new"))
    seen += [calls(optimizer), calls(twin)]
    for handle in handles:
        handle.remove()
    return [*seen, calls(optimizer), calls(twin)]


LOG: list[Any] = []


def record(kind: str, *_: Any) -> None:
    LOG.append(kind)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_copies_of_an_optimizer_have_no_hooks(duplicate: Any, theirs: Any) -> None:
    """So that one with hooks that do not pickle, such as lambdas, does."""
    assert same_in_both(lambda lib: survivors(lib, duplicate), theirs) == [[], list(KINDS), ["new"], [], ["new"]]


def test_global_hooks_run_for_copies(theirs: Any) -> None:
    def script(lib: Any) -> Any:
        log: list[Any] = []
        optimizer = lib.optimizer()
        with lib.module.register_optimizer_step_post_hook(lambda o, *_: log.append(o is optimizer)):
            for each in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
                each.step()
        return log

    assert same_in_both(script, theirs) == [True, False, False]


def test_a_copy_made_inside_a_step_has_working_hooks() -> None:
    """A hook that keeps copies of the whole optimizer, one with a step of its own."""

    class Own(optim.SGD):
        def step(self, *args: Any) -> Any:
            return super().step(*args)

    optimizer, twins, log = Own([optim.Parameter(1.0)], lr=0.5), [], []
    optimizer.register_step_post_hook(lambda o, *_: twins.append(copy.deepcopy(o)))
    optimizer.step([1.0])
    twins[0].register_step_pre_hook(lambda *_: log.append("pre"))
    twins[0].step([1.0])
    assert log == ["pre"]
