"""An optimizer with a step of its own gets back all the state that it has kept."""

import collections
import copy
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from saved_runs import boxes_of, momentum, plain, run_adam, stepped

import optimjax as optim


class Own(optim.Optimizer):
    """Keeps what it likes."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, dict(lr=lr))

    def step(self, *args: Any) -> None:
        """Nothing."""


Pair = collections.namedtuple("Pair", "a b")


def test_an_optimizer_with_a_step_of_its_own_gets_back_what_it_kept(torch: Any) -> None:
    kept = {
        "step": 0.5,
        "counts": np.array([2**40]),
        "wide": np.full(2, 1e-300),
        "texts": np.array(["a"]),
        "nothing": None,
        "name": "fast",
        "nested": [1, None, {"b": (jnp.ones(3), "x"), "a": Pair(1, {2})}],
        "recent": collections.deque([1.0, 2.0], maxlen=2),
        "function": len,
        "large": 2**70,
    }
    first, second = Own([optim.Parameter(1.0)]), Own([optim.Parameter(1.0)])
    first.state[boxes_of(first)[0]].update(kept)
    for _ in range(2):  # its own state dict, too
        second.load_state_dict(first.state_dict())
        (state,) = second.state.values()
        assert list(state) == list(kept)
        assert repr(dict(state)) == repr(kept)
        first.state[boxes_of(first)[0]] = state
    assert state["nested"][2]["b"][0] is kept["nested"][2]["b"][0]
    state["nested"][2]["b"] = state["nested"].append(3)
    state["counts"][0] = 0
    state["recent"].append(3.0)
    assert len(kept["nested"]) == 3
    assert kept["counts"][0] == 2**40
    assert list(kept["recent"]) == [1, 2]


def test_its_arrays_become_those_of_jax_where_these_can_hold_them(torch: Any) -> None:
    arrays = {"n32": np.ones(2, np.float32), "t32": torch.ones(2), "i": np.array(3, np.int32)}
    arrays |= {"n64": np.ones(2), "t64": torch.ones(2, dtype=torch.float64)}
    optimizer = Own([optim.Parameter(1.0)])
    optimizer.load_state_dict({"state": {0: arrays}, "param_groups": [{"params": [0]}]})
    (state,) = optimizer.state.values()
    for array in (arrays["n32"], arrays["t32"], arrays["n64"], arrays["t64"]):
        array *= 2
    assert {name: (type(x), str(x.dtype)) for name, x in state.items()} == {
        "n32": (type(jnp.ones(1)), "float32"),
        "t32": (type(jnp.ones(1)), "float32"),
        "i": (type(jnp.ones(1)), "int32"),
        "n64": (np.ndarray, "float64"),
        "t64": (np.ndarray, "float64"),
    }
    assert all(np.all(np.asarray(x) % 2 == 1) for x in state.values())


def beside(optimizer: Any) -> dict[Any, Any]:
    return {key: dict(value) for key, value in optimizer.state.items() if isinstance(key, str)}


def test_state_alongside_the_parameters_is_saved_and_loaded_as_in_pytorch(torch: Any) -> None:
    def script(optimizers: Any) -> Any:
        first, second = optimizers
        first.step()
        first.state["global"] = {"count": 3, "history": [1.0]}
        first.state["b"]["x"] = 1
        saved = first.state_dict()
        first.state["global"]["count"] = 4
        second.state["old"] = {"y": 2}
        second.load_state_dict(saved)
        loaded = beside(second)
        second.load_state_dict({**saved, "state": {key: value for key, value in saved["state"].items() if key == 0}})
        return list(saved["state"]), loaded, beside(second)

    def theirs() -> Any:
        tensor = torch.nn.Parameter(torch.ones(()))
        tensor.grad = torch.ones(())
        return torch.optim.SGD([tensor], lr=0.1, momentum=0.9)

    ours = [optim.SGD([optim.Parameter(1.0)], lr=0.1, momentum=0.9) for _ in range(2)]
    boxes_of(ours[0])[0].grad = jnp.ones(())
    keys, loaded, after = script(ours)
    assert keys == [0, "global", "b"]
    assert loaded == {"global": {"count": 3, "history": [1.0]}, "b": {"x": 1}}
    expected = script([theirs(), theirs()])
    expected[1]["global"]["count"] = 3  # PyTorch's state dict is not a snapshot
    assert (keys, loaded, after) == expected


def test_state_alongside_the_parameters_through_json_and_partly() -> None:
    first, second = run_adam(), run_adam()
    first.state["global"] = {"count": 3, "values": np.ones(1)}
    saved = first.state_dict()
    saved["state"] = {str(key): value for key, value in saved["state"].items()}
    second.state["mine"] = {"x": 1}
    before = [plain(dict(entries)) for entries in second.state.values()]
    with pytest.raises(ValueError, match="match the size of optimizer's group"):
        second.load_state_dict({**saved, "param_groups": saved["param_groups"][:1] * 2})
    assert [plain(dict(entries)) for entries in second.state.values()] == before
    second.load_state_dict(saved)
    assert beside(second) == {"global": {"count": 3, "values": np.ones(1)}}
    second.state["global"]["values"][0] = 7
    assert saved["state"]["global"]["values"] == first.state["global"]["values"] == 1

    changed = momentum({"a": (2,)})
    changed.state["mine"] = {"x": 1}
    changed.load_state_dict(momentum({"b": (2,)}).state_dict(), strict=False)
    assert beside(changed) == {"mine": {"x": 1}}


def test_a_subclass_completes_an_old_checkpoint_where_it_does_in_pytorch(torch: Any) -> None:
    def script(base: Any, parameter: Any) -> Any:
        log: list[Any] = []

        class Newer(base):
            def __setstate__(self, state: Any) -> None:
                super().__setstate__(state)
                log.append(sorted(state))
                for group in self.param_groups:
                    group.setdefault("newopt", 7)

        old, new = base([parameter], lr=0.1), Newer([parameter], lr=0.2)
        new.register_load_state_dict_post_hook(lambda o: log.append(o.param_groups[0]["newopt"]))
        new.load_state_dict(old.state_dict())
        return log, new.param_groups[0]["lr"], new.param_groups[0]["newopt"]

    theirs = script(torch.optim.SGD, torch.nn.Parameter(torch.ones(())))
    assert script(optim.SGD, optim.Parameter(1.0)) == theirs == ([["param_groups", "state"], 7], 0.1, 7)


def test_a_subclass_that_refuses_what_was_loaded_keeps_what_it_had() -> None:
    class Strict(optim.SGD):
        def __setstate__(self, state: Any) -> None:
            super().__setstate__(state)
            if self.param_groups[0]["lr"] > 0.5:
                raise ValueError("too fast")

    slow, fast = (Strict({"w": jnp.ones(2)}, lr=lr, momentum=0.9) for lr in (0.1, 0.7))
    fast.step({"w": jnp.ones(2)})
    for optimizer in (slow, stepped(copy.copy(slow), 2.0)):
        before = plain(optimizer.state_dict())
        with pytest.raises(ValueError, match="too fast"):
            optimizer.load_state_dict(fast.state_dict())
        assert plain(optimizer.state_dict()) == before
