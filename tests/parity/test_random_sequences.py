"""Random sequences of what scripts do to an optimizer agree at every point with the same sequences in PyTorch.

Illegal calls are strewn in: each raises, and as the two go on agreeing, none has changed anything. CI runs a few
sequences for each algorithm; ``pytest tests/parity/test_random_sequences.py --hypothesis-profile thorough`` runs 2,100,
new ones each time.
"""

import contextlib
import copy
import os
import pickle
import re
import tempfile
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from flax import nnx
from hypothesis import seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import optimjax as optim

SHAPES = [(3, 2), (3,), (3, 2), (), (2, 2)]  # of the parameters there can be; a sequence starts with a few of them
SOURCES = ("boxes", "named boxes", "tree", "groups", "boxes of a module", "module")
SCHEDULERS = {"ExponentialLR": {"gamma": 0.8}, "StepLR": {"step_size": 2, "gamma": 0.5}}
# Counts that differ, flags that do, and a combination that may only be edited into a group.
NO_FUNCTIONAL_FORM = "parameters have done different numbers|the functional form has one 'maximize'|Nesterov momentum"
factors = st.sampled_from([1.0, 0.7, 0.4])
some = st.integers(0, 2**16)  # chooses by remainder, or seeds


class Net(nnx.Module):
    def __init__(self, values: list[np.ndarray]):
        for index, value in enumerate(values):
            setattr(self, f"p{index}", nnx.Param(jnp.asarray(value)))


def values_of(params: Any) -> list[Any]:
    """The arrays of anything that a loss function may be given here, in order."""
    if isinstance(params, Net):
        params = [getattr(params, name)[...] for name in sorted(vars(params)) if name.startswith("p")]
    return [jnp.asarray(leaf) for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optim.Parameter))]


def loss_fn(params: Any, weights: list[Any]) -> Any:
    """Depends on as many parameters as there are weights."""
    terms = zip(values_of(params), weights, strict=False)
    return sum(jnp.sum(weight * value**2 / 2 + jnp.sin(value)) for value, weight in terms)


def no_scalar(params: Any, *args: Any) -> Any:
    return jnp.stack([jnp.sum(value) for value in values_of(params)])


def plain(x: Any) -> Any:
    return np.asarray(x).tolist() if hasattr(x, "shape") else x


class Sequence(RuleBasedStateMachine):
    """One run in both libraries."""

    case: Case
    torch: Any

    def __init__(self) -> None:
        super().__init__()
        self.exits = contextlib.ExitStack()
        self.exits.enter_context(double_precision())
        self.torch.set_default_dtype(self.torch.float64)
        self.exits.callback(self.torch.set_default_dtype, self.torch.float32)
        self.exits.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # PyTorch's, of copied schedulers
        self.saved: Any = None
        self.schedulers: Any = None

    def teardown(self) -> None:
        with self.exits:  # left also where they differ
            self.compare_state()

    # --- the two runs ---

    @initialize(source=st.sampled_from(SOURCES), full=st.booleans(), count=st.integers(1, 3), seed=some)
    def begin(self, source: str, full: bool, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.values = [self.case.fit(rng.normal(size=shape)) for shape in SHAPES]
        self.source, self.options = source, self.case.variants()[full]
        self.model = Net(self.values[:count] if source == "module" else self.values)
        self.tensors = [self.torch.nn.Parameter(self.torch.from_numpy(v.copy())) for v in self.values[:count]]
        self.added: list[tuple[int, dict[str, Any]]] = [(count, {})]  # of each group the number and the options
        self.ours, self.theirs = self.build_ours(), self.build_theirs()

    def build_ours(self, boxes: Any = None) -> Any:
        """An optimizer of the same groups, of fresh parameters or of those that there are."""
        groups, start = [], 0
        for count, options in self.added:
            groups.append({"params": self.ours_of(range(start, start + count), boxes)} | options)
            start += count
        if self.source == "module":
            params = self.model
        elif self.source in ("groups", "boxes of a module") or len(groups) > 1:
            params = groups
        else:
            params = groups[0]["params"]
        return self.case.optimizer(params, **self.options)

    def ours_of(self, indices: Any, boxes: Any = None) -> Any:
        """These parameters as they are handed to an optimizer."""
        if self.source == "boxes of a module":
            found = dict(optim.named_parameters(self.model))
            return [(f"p{i}", found[f"p{i}"]) for i in indices]
        if self.source == "tree":
            return {f"p{i}": boxes[i].value if boxes else jnp.asarray(self.values[i]) for i in indices}
        made = [(f"p{i}", boxes[i] if boxes else optim.Parameter(self.values[i])) for i in indices]
        return made if self.source == "named boxes" else [box for _, box in made]

    def build_theirs(self) -> Any:
        groups, rest = [], iter(self.tensors)
        for count, options in self.added:
            groups.append({"params": [next(rest) for _ in range(count)]} | options)
        cls = self.case.reference(self.torch)
        plain_loop = {"foreach": False} if "foreach" in self.case.ignored else {}
        return cls(groups, **plain_loop, **self.case.theirs(self.options))

    @property
    def boxes(self) -> list[Any]:
        return [box for group in self.ours.param_groups for box in group["params"]]

    @property
    def modules(self) -> list[Any]:
        """The module, where the loss function is given it by the caller."""
        return [self.model] if self.source == "boxes of a module" else []

    def weights(self, seed: int) -> list[float]:
        return list(np.random.default_rng(seed).uniform(0.5, 2, len(self.tensors)))

    def gradients(self, seed: int) -> list[Any]:
        """Random ones; about a third is missing."""
        rng = np.random.default_rng(seed)
        grads = [rng.normal(size=tuple(tensor.shape)) for tensor in self.tensors]
        return [grad if rng.uniform() < 0.7 else None for grad in grads]

    def structured(self, grads: list[Any]) -> Any:
        whole = nnx.state(self.model, nnx.Param) if self.source == "module" else self.ours.params
        return jax.tree.structure(whole).unflatten(grads)

    def step_theirs(self, grads: list[Any] | None = None) -> None:
        """With these gradients, or with those that the tensors hold."""
        held = [tensor.grad for tensor in self.tensors]
        for tensor, grad in zip(self.tensors, held if grads is None else grads, strict=True):
            grad = self.torch.from_numpy(grad) if isinstance(grad, np.ndarray) else grad
            tensor.grad = None if grad is None else self.case.torch_gradient(self.torch, grad)
        self.theirs.step()
        for tensor, grad in zip(self.tensors, held, strict=True):
            tensor.grad = grad

    def their_loss(self, weights: list[float]) -> Any:
        terms = zip(self.tensors, weights, strict=True)
        return sum((weight * tensor**2 / 2 + self.torch.sin(tensor)).sum() for tensor, weight in terms)

    @property
    def trainable(self) -> list[Any]:
        return [tensor for tensor in self.tensors if tensor.requires_grad]

    # --- legal operations ---

    @rule(seed=some)
    def set_gradients(self, seed: int) -> None:
        for box, tensor, grad in zip(self.boxes, self.tensors, self.gradients(seed), strict=True):
            box.grad = grad
            tensor.grad = None if grad is None else self.torch.from_numpy(grad.copy())

    @rule()
    def step(self) -> None:
        self.ours.step()
        self.step_theirs()

    @rule(seed=some)
    def step_from_gradients(self, seed: int) -> None:
        grads = self.gradients(seed)
        self.ours.step(self.structured(grads))  # which leaves frozen parameters alone
        self.step_theirs([grad if box.requires_grad else None for box, grad in zip(self.boxes, grads, strict=True)])

    @precondition(lambda self: self.trainable)
    @rule(seed=some)
    def step_from_loss(self, seed: int) -> None:
        weights = self.weights(seed)
        ours = self.ours.step(loss_fn, *self.modules, weights)
        loss = self.their_loss(weights)
        grads = dict(zip(self.trainable, self.torch.autograd.grad(loss, self.trainable), strict=True))
        self.step_theirs([grads.get(tensor) for tensor in self.tensors])
        np.testing.assert_allclose(ours, loss.item(), rtol=1e-9)

    @precondition(lambda self: self.trainable)
    @rule(seed=some)
    def backward(self, seed: int) -> None:
        weights = self.weights(seed)
        ours = self.ours.backward(loss_fn, *self.modules, weights)
        loss = self.their_loss(weights)
        loss.backward()
        np.testing.assert_allclose(ours, loss.item(), rtol=1e-9)

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        self.ours.zero_grad(set_to_none)
        self.theirs.zero_grad(set_to_none)

    @rule(max_norm=st.sampled_from([0.1, 1.0, 100.0]))
    def clip(self, max_norm: float) -> None:
        ours = optim.clip_grad_norm_(self.ours, max_norm)
        theirs = self.torch.nn.utils.clip_grad_norm_(self.tensors, max_norm)
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)

    @precondition(lambda self: self.source != "module" and len(self.tensors) < len(SHAPES))
    @rule(lr=st.sampled_from([None, 0.02, 0.3]))
    def add_group(self, lr: float | None) -> None:
        index = len(self.tensors)
        options = {} if lr is None else {"lr": lr}
        self.tensors.append(self.torch.nn.Parameter(self.torch.from_numpy(self.values[index].copy())))
        self.added.append((1, options))
        self.ours.add_param_group({"params": self.ours_of([index])} | options)
        self.theirs.add_param_group({"params": [self.tensors[index]]} | options)
        if self.case.state_at_construction:  # which PyTorch forgets, so that its next step fails
            self.theirs.state.update(type(self.theirs)(self.tensors[index:], **self.options).state)

    @rule(group=some, name=some, factor=factors)
    def edit_group(self, group: int, name: int, factor: float) -> None:
        ours, theirs = (x.param_groups[group % len(x.param_groups)] for x in (self.ours, self.theirs))
        # Not what decides which arrays the state has: PyTorch's next step would fail.
        names = [n for n in self.case.numeric if n in theirs and (theirs[n] or n != "momentum")]
        names += ["maximize"] if "maximize" in theirs else []
        name = names[name % len(names)]
        if name == "maximize":
            ours[name] = theirs[name] = not ours[name]
        else:
            ours[name] = theirs[name] = self.case.scaled(name, self.case.other[name], factor)

    @rule(index=some, seed=some)
    def assign(self, index: int, seed: int) -> None:
        """As weights are loaded, tied or initialised again in the middle of a run."""
        index %= len(self.tensors)
        value = np.random.default_rng(seed).normal(size=self.boxes[index].shape)
        self.boxes[index].value = value
        with self.torch.no_grad():
            self.tensors[index].copy_(self.torch.from_numpy(value))

    @rule(index=some)
    def freeze_or_unfreeze(self, index: int) -> None:
        index %= len(self.tensors)
        self.boxes[index].requires_grad = not self.boxes[index].requires_grad
        self.tensors[index].requires_grad_(not self.tensors[index].requires_grad)

    @rule(name=st.sampled_from(sorted(SCHEDULERS)))
    def schedule(self, name: str) -> None:
        if self.schedulers is None:
            libraries = (optim, self.ours), (self.torch.optim, self.theirs)
            self.schedulers = [getattr(lib.lr_scheduler, name)(x, **SCHEDULERS[name]) for lib, x in libraries]
        for scheduler in self.schedulers:
            scheduler.step()

    @rule(through=st.sampled_from(["memory", "pickle", "file"]))
    def save(self, through: str) -> None:
        ours, theirs = self.ours.state_dict(), self.theirs.state_dict()
        if through == "pickle":
            ours = pickle.loads(pickle.dumps(ours))
        elif through == "file":
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "state.safetensors")
                optim.save(path, ours)
                ours = optim.load(path)
        self.saved = ours, copy.deepcopy(theirs), len(self.added)

    @precondition(lambda self: self.saved)
    @rule()
    def load(self) -> None:
        ours, theirs, groups = self.saved
        if groups == len(self.added):
            self.ours.load_state_dict(ours)
            self.theirs.load_state_dict(copy.deepcopy(theirs))
        else:
            for optimizer, saved in ((self.ours, ours), (self.theirs, theirs)):
                with pytest.raises(ValueError, match="different number of parameter groups"):
                    optimizer.load_state_dict(saved)

    @rule()
    def restart(self) -> None:
        """As a new process does: new optimizers of the same parameters, and the state of the old ones."""
        saved = self.ours.state_dict(), self.theirs.state_dict()
        frozen, grads = [box.requires_grad for box in self.boxes], [box.grad for box in self.boxes]
        self.ours, self.theirs = self.build_ours(self.boxes), self.build_theirs()
        self.ours.load_state_dict(saved[0])
        self.theirs.load_state_dict(saved[1])
        for box, requires_grad, grad in zip(self.boxes, frozen, grads, strict=True):  # of a tree the boxes are new
            box.requires_grad, box.grad = requires_grad, grad
        self.schedulers = None

    @rule(by_pickle=st.booleans())
    def go_on_with_a_copy(self, by_pickle: bool) -> None:
        ours = self.ours, self.model, self.schedulers and self.schedulers[0]
        if by_pickle and self.source in ("boxes", "groups", "named boxes", "tree"):
            self.ours, self.model, scheduler = pickle.loads(pickle.dumps(ours))
        else:
            self.ours, self.model, scheduler = copy.deepcopy(ours)
        self.theirs, theirs = copy.deepcopy((self.theirs, self.schedulers and self.schedulers[1]))
        grads = [tensor.grad for tensor in self.tensors]
        self.tensors = [tensor for group in self.theirs.param_groups for tensor in group["params"]]
        for tensor, grad in zip(self.tensors, grads, strict=True):  # a copied torch.nn.Parameter has lost it
            tensor.grad = None if grad is None else grad.clone()
        self.schedulers = self.schedulers and [scheduler, theirs]

    @rule(seed=some)
    def leave_the_facade_and_come_back(self, seed: int) -> None:
        if self.case.sparse:  # the stand-in of the facade has no functional form
            return
        grads = [np.random.default_rng(seed + i).normal(size=tuple(t.shape)) for i, t in enumerate(self.tensors)]
        grads = [grad if box.requires_grad else None for box, grad in zip(self.boxes, grads, strict=True)]
        try:
            params, state = self.ours.functional_state()
        except ValueError as error:
            assert re.match(NO_FUNCTIONAL_FORM, str(error))  # noqa: PT017
            return
        params, state = self.ours.algorithm.update(params, self.structured(grads), state)
        self.ours.load_functional_state(params, state)
        self.step_theirs(grads)

    # --- illegal ones ---

    @rule(choice=some, index=some, look=st.booleans())
    def something_illegal(self, choice: int, index: int, look: bool) -> None:
        ours, box = self.ours, self.boxes[index % len(self.boxes)]
        group = ours.param_groups[index % len(ours.param_groups)]
        good = [np.ones(b.shape) for b in self.boxes]

        def step_with(grad: Any) -> None:
            grads = list(good)
            grads[index % len(grads)] = grad
            ours.step(self.structured(grads))

        def step_with_group(name: str, value: Any) -> None:
            before = group[name]
            group[name] = value
            for each in self.boxes:
                each.grad = np.ones(each.shape)
            try:
                ours.step()
            finally:
                group[name] = before

        def load_with(change: Callable[[Any], Any]) -> None:
            saved = copy.deepcopy(ours.state_dict())
            change(saved)
            ours.load_state_dict(saved)

        def spoil(saved: Any) -> None:
            saved["state"][len(self.boxes)] = {"step": 1}

        def set_to(name: str, value: Any) -> None:
            setattr(box, name, value)

        calls: list[Callable[[], Any]] = [
            lambda: step_with(np.ones((*box.shape, 2))),
            lambda: step_with(np.ones(box.shape, int)),
            lambda: step_with(np.ones(box.shape, complex)),
            lambda: step_with("gradient"),
            lambda: ours.step([*good, good[0]]),
            lambda: ours.step({"not": "there"}),
            lambda: ours.step(no_scalar, *self.modules),
            lambda: ours.backward(no_scalar, *self.modules),
            lambda: ours.backward("loss", *self.modules),
            lambda: ours.step(loss_fn, *self.modules),
            lambda: step_with_group("lr", "fast"),
            lambda: step_with_group("lr", None),
            lambda: step_with_group("lr", np.ones(3)),
            lambda: ours.add_param_group({"params": [box]}),
            lambda: ours.add_param_group({"params": [optim.Parameter(np.ones((2, 2)))], "lr": -1.0}),
            lambda: ours.add_param_group({"params": [("new", optim.Parameter(np.ones((2, 2))))], "lrs": 1.0}),
            lambda: ours.add_param_group({"params": {"new": np.ones((2, 2))}, "lr": "fast"}),
            lambda: ours.add_param_group({"params": [box, 3]}),
            lambda: ours.add_param_group([box]),
            lambda: ours.add_param_group({"lr": 1.0}),
            lambda: load_with(lambda saved: saved.pop("state")),
            lambda: load_with(lambda saved: saved["param_groups"].pop()),
            lambda: load_with(lambda saved: saved["param_groups"][-1]["params"].append(99)),
            lambda: load_with(lambda saved: saved["param_groups"][-1].pop("params")),
            lambda: load_with(spoil),
            lambda: load_with(lambda saved: saved["state"].update({0: {"prev_flat_grad": np.ones(2)}})),
            lambda: ours.load_state_dict(3),
            lambda: set_to("grad", np.ones((*box.shape, 2))),
            lambda: set_to("grad", np.ones(box.shape, int)),
            lambda: set_to("value", np.ones((*box.shape, 2))),
            lambda: set_to("value", np.ones(box.shape, np.float32)),
            lambda: optim.clip_grad_norm_(ours, 1.0, norm_type="two"),
            lambda: ours.register_step_pre_hook("hook"),
            lambda: optim.lr_scheduler.LambdaLR(ours, 0.5),
            lambda: optim.lr_scheduler.ExponentialLR(ours, 0.5, key="speed"),
        ]
        before = self.contents() if look else None
        grads = [each.grad for each in self.boxes]
        with pytest.raises((ValueError, TypeError)):
            calls[choice % len(calls)]()
        for each, grad in zip(self.boxes, grads, strict=True):
            each.grad = grad
        assert not look or self.contents() == before

    def contents(self) -> Any:
        groups = [{**group, "params": [id(box) for box in group["params"]]} for group in self.ours.param_groups]
        state = {id(box): {k: plain(v) for k, v in entry.items()} for box, entry in self.ours.state.items()}
        return copy.deepcopy((groups, state, [(plain(b.value), plain(b.grad), b.requires_grad) for b in self.boxes]))

    # --- agreement ---

    @invariant()
    def compare(self) -> None:
        if not hasattr(self, "ours"):
            return
        assert len(self.boxes) == len(self.tensors)
        for box, tensor in zip(self.boxes, self.tensors, strict=True):
            close(box.value, tensor.detach())
            assert box.requires_grad == tensor.requires_grad
            assert (box.grad is None) == (tensor.grad is None)
            if box.grad is not None:
                close(box.grad, tensor.grad)
        shown = self.model if self.source in ("module", "boxes of a module") else self.ours.params
        for value, tensor in zip(values_of(shown), self.tensors, strict=self.source != "boxes of a module"):
            close(value, tensor.detach())
        for ours, theirs in zip(self.ours.param_groups, self.theirs.param_groups, strict=True):
            for name in theirs.keys() & self.case.other.keys():
                assert jax.tree.all(jax.tree.map(lambda a, b: a == pytest.approx(b), ours[name], theirs[name])), name

    @rule()
    def compare_state(self) -> None:
        """Not at every point: what has been read is copied before the next step."""
        ours, theirs = self.ours.state_dict()["state"], self.theirs.state_dict()["state"]
        theirs = {index: entry for index, entry in theirs.items() if entry}
        assert ours.keys() == theirs.keys()
        for index, entry in theirs.items():
            assert ours[index].keys() == {name for name, value in entry.items() if value is not None}
            for name, value in ours[index].items():
                close(value, entry[name])


def close(ours: Any, theirs: Any) -> None:
    theirs = np.asarray(theirs)
    assert np.shape(ours) == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9 * max(1.0, np.abs(theirs).max(initial=0)))


def double_precision() -> Any:
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64(True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_random_sequences_agree_with_pytorch(case: Case, torch: Any) -> None:
    machine = type(f"{case}Sequence", (Sequence,), {"case": case, "torch": torch})
    if settings().derandomize:  # else every algorithm would see the same sequences
        machine = seed(zlib.crc32(str(case).encode()))(machine)
    run_state_machine_as_test(machine, settings=settings(stateful_step_count=25))
