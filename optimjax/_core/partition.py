"""Several algorithms as one: each updates the parameters that have its label."""

import keyword
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack, cast

import jax

from optimjax._core.algorithm import Algorithm, Params, State, check_order
from optimjax._core.definition import Definition
from optimjax._core.guard import Guard, Options
from optimjax._core.hyperparameters import Hyperparameters
from optimjax._core.states import COUNTS
from optimjax._core.tree import check_gradient, copied_array, flatten_params, match, names

__all__ = ["Partition", "partition"]


class Partition(Algorithm):
    """What :func:`optimjax.functional.partition` returns."""

    def __post_init__(self) -> None:
        if not self.algorithms:
            raise ValueError("partition needs at least one algorithm, got {}")
        for label, algorithm in self.algorithms.items():
            if not _is_legal(label):
                raise ValueError(f"a label names a field of the state: it must be an identifier, got {label!r}")
            if not isinstance(algorithm, Algorithm):
                raise TypeError(f"the algorithm of label {label!r} must be made by optim.functional, got {algorithm!r}")
            if isinstance(algorithm, Partition):
                raise ValueError(f"the algorithm of label {label!r} is a partition: give its algorithms labels here")
            if algorithm.guard.given:
                raise ValueError(
                    f"{', '.join(algorithm.guard.given)} of label {label!r} is an option of the whole step: give it to "
                    "the partition"
                )
            if type(algorithm) is not Algorithm:
                raise ValueError(f"{algorithm.name} cannot be a part of a partition: it has no rule for one parameter")

    @property
    def algorithms(self) -> Mapping[str, Algorithm]:
        """The algorithm of each label."""
        return self.values["algorithms"]

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.guard.given.items())
        return f"partition({dict(self.algorithms)!r}, {self.values['labels']!r}{options})"

    def init(self, params: Any) -> Any:
        """The state before the first update: counts, then for each label the state of its algorithm."""
        leaves, treedef = flatten_params(params)
        positions = self._positions(params)
        states = [
            algorithm.init(treedef.unflatten(_only(positions[label], leaves)))
            for label, algorithm in self.algorithms.items()
        ]
        # A step of its own, because a state may be donated.
        return self.state_class(*self.first_counts(copied_array(states[0].step)), *states)

    def update(self, params: Params, grads: Any, state: State, **overrides: Any) -> tuple[Params, State]:
        """One update of every parameter; an override is a dict for a label, ``muon={"lr": 0.1}``."""
        known = cast(Any, state)
        leaves, treedef = flatten_params(params)
        check_order(grads, self.state_class)
        if not isinstance(state, self.state_class):
            raise TypeError(
                f"state must be the {self.state_class.__name__}{self.state_class._fields} that this algorithm's init "
                f"returns, got {type(state).__name__}{getattr(state, '_fields', '')}"
            )
        self._check_overrides(overrides)
        gradients = match(treedef, grads, lambda: names(params))
        positions = self._positions(params)
        for index, grad in enumerate(gradients):  # before they are measured
            if grad is not None:
                check_gradient(lambda index=index: names(params)[index] or "params", leaves[index], grad)
        limits = self.guard.limits([grad for grad in gradients if grad is not None])
        updated: list[Any] = list(leaves)
        states = []
        for label, algorithm in self.algorithms.items():
            new, new_state = algorithm.advanced(
                treedef.unflatten(_only(positions[label], leaves)),
                treedef.unflatten(_only(positions[label], gradients)),
                getattr(known, label),
                overrides.get(label, {}),
                limits,
            )
            states.append(new_state)
            for position, leaf in zip(positions[label], jax.tree.leaves(new), strict=True):
                updated[position] = leaf
        return treedef.unflatten(updated), self.state_class(*self._counted(known, limits), *states)

    @property
    def state_class(self) -> Any:
        """The NamedTuple of the state."""
        return self._state_class(tuple(self.algorithms))

    def _positions(self, params: Any) -> dict[str, list[int]]:
        """Which leaves each label has.

        Raises:
          ValueError: there is no algorithm for a leaf, or no leaf for a label, or the labels have another structure.
        """
        positions: dict[str, list[int]] = {label: [] for label in self.algorithms}
        for position, label in enumerate(self._labels(params)):
            positions[label].append(position)
        if unused := [label for label, leaves in positions.items() if not leaves]:
            raise ValueError(f"no parameter has the label {unused[0]!r}")
        return positions

    def _labels(self, params: Any) -> list[str]:
        """The label of each leaf."""
        given = self.values["labels"]
        paths = names(params)
        if callable(given) and jax.tree_util.all_leaves([given]):
            labels: list[Any] = [given(name, leaf) for name, leaf in zip(paths, jax.tree.leaves(params), strict=True)]
        else:
            prefix, treedef = jax.tree.flatten(given)
            try:
                subtrees = treedef.flatten_up_to(params)
            except ValueError as error:
                raise ValueError(f"labels must be a tree that is a prefix of the parameters: {error}") from None
            labels = [
                label for label, tree in zip(prefix, subtrees, strict=True) for _ in range(len(jax.tree.leaves(tree)))
            ]
        for name, label in zip(paths, labels, strict=True):
            if not isinstance(label, str) or label not in self.algorithms:
                raise ValueError(
                    f"parameter {name or 'params'!r} has the label {label!r}; there are algorithms for "
                    f"{', '.join(map(repr, self.algorithms))}"
                )
        return labels

    def _check_overrides(self, overrides: Mapping[str, Any]) -> None:
        for label, values in overrides.items():
            if label not in self.algorithms or not isinstance(values, Mapping):
                raise TypeError(
                    f"update() got {label}={values!r}: a partition takes a dict of hyperparameters for a label, which "
                    f"are {', '.join(self.algorithms)}"
                )


# Its hyperparameters are those of its parts.
Partition.definition = Definition(Partition, None, Hyperparameters(object, object), ())


def partition(
    algorithms: Mapping[str, Algorithm], labels: Callable[[str, Any], str] | Any, **options: Unpack[Options]
) -> Algorithm:
    """Several algorithms as one :class:`optimjax.functional.Algorithm`, each for the parameters of one label.

    The state has ``step`` and a field for each label: the state of that algorithm, with ``None`` in place of the other
    parameters. ``update`` takes overrides by label: ``update(params, grads, state, muon={"lr": 0.01})``.

    Args:
      algorithms: by label; a label is an identifier.
      labels: a tree of labels that is a prefix of the parameters, or a function ``(dotted name, value) -> label``.
      options: ``max_grad_norm`` and ``skip_nonfinite``, for all parameters together; see :class:`optimjax.Optimizer`.

    A tree of values of a hyperparameter, such as ``lr={"hidden": 0.1, "bias": None}``, is one for all parameters, too.

    Raises:
      ValueError: no algorithm, or one without a rule for one parameter (LBFGS), or with options of the whole step; at
        ``init``, a label without parameters, a parameter without a label, or labels of another structure.
      TypeError: what is not an algorithm.

    >>> import jax.numpy as jnp
    >>> from optimjax import functional as F
    >>> params = {"hidden": jnp.eye(2), "bias": jnp.zeros(2)}
    >>> both = F.partition(
    ...     {"muon": F.muon(lr=0.02), "adamw": F.adamw(lr=3e-4)},
    ...     lambda name, value: "muon" if value.ndim == 2 else "adamw",
    ... )
    >>> state = both.init(params)
    >>> params, state = both.update(params, params, state)
    >>> print(state.step, state.muon.momentum_buffer["bias"], state.adamw.exp_avg["bias"])
    1 None [0. 0.]
    """
    return Partition(Partition.definition, {"algorithms": dict(algorithms), "labels": labels}, Guard(**options))


def _is_legal(label: Any) -> bool:
    """Whether a field of the state, and an argument of ``update``, can have this name."""
    is_name = isinstance(label, str) and label.isidentifier() and not keyword.iskeyword(label)
    return is_name and not label.startswith("_") and label not in COUNTS


def _only(positions: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """The values at these positions, with ``None`` in place of the others."""
    only: list[Any] = [None] * len(values)
    for position in positions:
        only[position] = values[position]
    return only
