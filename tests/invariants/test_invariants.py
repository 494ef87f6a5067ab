"""Some rules hold for every algorithm, whatever its arithmetic."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case

VARIANTS = [
    pytest.param(case, options, id=f"{case}-{label}")
    for case in CASES
    for label, options in zip(("base", "full"), case.variants(), strict=True)
]
variants = pytest.mark.parametrize(("case", "options"), VARIANTS)
SLOTS = {  # slots of an optimizer as the user can come to hold them
    "item": lambda optimizer, box: [optimizer.state[box][name] for name in optimizer.state[box]],
    "values": lambda optimizer, box: list(optimizer.state[box].values()),
    "copy": lambda optimizer, box: list(copy.copy(optimizer.state[box]).values()),
    "deepcopy": lambda optimizer, box: list(copy.deepcopy(optimizer.state[box]).values()),
    "state_dict": lambda optimizer, box: optimizer.state_dict(),
    "deepcopy of the optimizer": lambda optimizer, box: copy.deepcopy(optimizer).state_dict(),
}


every_slot = pytest.mark.parametrize(
    ("case", "options"), [pytest.param(case, case.variants()[1], id=str(case)) for case in CASES]
)


def each(field: str) -> Any:
    """Every case with every name in one of its fields."""
    pairs = [pytest.param(case, name, id=f"{case}-{name}") for case in CASES for name in getattr(case, field)]
    return pytest.mark.parametrize(("case", "name"), pairs)


def every_dtype(*dtypes: str) -> Any:
    """Every case under the options that keep all slots, with each of the dtypes that it takes."""
    params = [
        pytest.param(case, case.variants()[1], dtype, id=f"{case}-{dtype}")
        for case in CASES
        for dtype in dtypes
        if not (case.complex_message and dtype.startswith("complex"))
    ]
    return pytest.mark.parametrize(("case", "options", "dtype"), params)


class Pair(NamedTuple):
    left: Any
    right: Any


# Both are made by NumPy: op by op, JAX would compile each operation for each shape and dtype.
def params_of(case: Case, dtype: Any) -> dict[str, Any]:
    """A tree of every kind of node, with a scalar and an empty array among its leaves."""
    vector = np.array([0.5, -1.0, 2.0])
    tree = {"b": [vector, (np.array(1.5), np.zeros((0, 2)))], "a": Pair(vector - 1, {"w": vector * 2})}
    return jax.tree.map(lambda p: jnp.asarray(p.astype(dtype)), case.fit(tree))


def grads_of(params: Any, step: int = 0) -> Any:
    """Gradients that shrink for three steps, so that amsgrad matters, and then grow again; some elements are zero."""
    return jax.tree.map(
        lambda p: jnp.asarray(((1 - np.arange(p.size).reshape(p.shape)) / (1 + step % 3) ** 2).astype(p.dtype)),
        params,
    )


def run_functional(case: Case, options: dict[str, Any], params: Any, steps: int | None = None) -> tuple[Any, Any]:
    algorithm = case.factory(**options)
    state = algorithm.init(params)
    for step in range(case.steps if steps is None else steps):
        params, state = algorithm.update(params, grads_of(params, step), state)
    return params, state


def run_facade(case: Case, options: dict[str, Any], params: Any, steps: int | None = None) -> Any:
    optimizer = case.optimizer(params, **options)
    for step in range(case.steps if steps is None else steps):
        optimizer.step(grads_of(params, step))
    return optimizer


def boxes(optimizer: Any) -> list[Any]:
    return optimizer.param_groups[0]["params"]


def frozen(tree: Any) -> Any:
    """A copy on the host, which nothing that happens on the device can change."""
    return jax.tree.map(lambda x: np.array(x) if isinstance(x, jax.Array) else x, tree)


# --- dtype, structure, shapes ---------------------------------------------------------------------------------------


@every_dtype("float32", "bfloat16", "float16", "float64", "complex64")
def test_dtype_and_structure_are_kept(
    request: pytest.FixtureRequest, case: Case, options: dict[str, Any], dtype: str
) -> None:
    if dtype == "float64":
        request.getfixturevalue("x64")
    params = params_of(case, dtype)
    final, state = run_functional(case, options, params)
    assert state.step.dtype == jnp.int32
    optimizer = run_facade(case, options, params)
    pairs = [(final, params), (optimizer.params, params)]
    for name in state._fields[1:]:
        slots = [optimizer.state[box].get(name) for box in boxes(optimizer)]
        like = params
        if name in case.scalar_slots:
            like = jax.tree.map(lambda p: jnp.zeros((), "float64" if dtype == "float64" else "float32"), params)
        elif name in case.reduced_slots:
            before = getattr(case.factory(**options).init(params), name)
            like = jax.tree.map(lambda slot: np.zeros(slot.shape, dtype), before)
        pairs += [(getattr(state, name), like), (jax.tree.unflatten(jax.tree.structure(params), slots), like)]
    for tree, like in pairs:
        chex.assert_trees_all_equal_shapes_and_dtypes(tree, like)
        chex.assert_tree_all_finite(tree)
    chex.assert_trees_all_close(optimizer.params, final, rtol=1e-2 if dtype in ("bfloat16", "float16") else 1e-5)


@variants
def test_state_is_named_as_in_pytorch(torch: Any, case: Case, options: dict[str, Any]) -> None:
    shapes = [case.shape(shape) for shape in [(2,), (2, 2)]]
    tensors = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    for tensor in tensors:
        tensor.grad = case.torch_gradient(torch, torch.ones_like(tensor))
    reference = case.reference(torch)(tensors, **case.theirs(options))
    reference.step()
    _, state = run_functional(case, options, [jnp.ones(shape) for shape in shapes], steps=1)
    optimizer = run_facade(case, options, [jnp.ones(shape) for shape in shapes], steps=1)
    for index, tensor in enumerate(tensors):
        names = {name for name in state._fields[1:] if getattr(state, name)[index] is not None}
        assert {"step", *names} == {"step", *reference.state[tensor]}
        assert optimizer.state_dict()["state"].get(index, {}).keys() == reference.state[tensor].keys()


@variants
def test_state_before_the_first_gradient(case: Case, options: dict[str, Any]) -> None:
    optimizer = case.optimizer(case.fit([jnp.ones(2)]), **options)
    assert bool(optimizer.state_dict()["state"]) == case.state_at_construction


@every_dtype("bfloat16", "float16", "complex64")
def test_zero_gradients_stay_finite(case: Case, options: dict[str, Any], dtype: str) -> None:
    params = case.fit({"w": jnp.array([0.0, 1.0], dtype)})
    zeros = jax.tree.map(jnp.zeros_like, params)
    algorithm = case.factory(**options)
    optimizer = case.optimizer(params, **options)
    final, state = params, algorithm.init(params)
    for _ in range(case.steps):
        final, state = algorithm.update(final, zeros, state)
        optimizer.step(zeros)
    chex.assert_tree_all_finite([final, state, optimizer.params, optimizer.state_dict()["state"]])


# --- compilation ----------------------------------------------------------------------------------------------------


@variants
def test_functional_compiles_once(compilations: Callable[[], int], case: Case, options: dict[str, Any]) -> None:
    algorithm = case.factory(**options)
    params = params_of(case, "float32")
    state, grads = algorithm.init(params), grads_of(params)
    update = jax.jit(algorithm.update)
    params, state = update(params, grads, state)
    before = compilations()
    for _ in range(2):
        params, state = update(params, grads, state)
    assert compilations() == before


@each("numeric")
def test_values_given_as_arrays_share_one_program(compilations: Callable[[], int], case: Case, name: str) -> None:
    value = case.other[name]
    algorithm = case.factory(**{**case.base, **case.needs.get(name, {}), name: value})
    params = case.fit(jnp.ones(3))
    state = algorithm.init(params)
    update = jax.jit(lambda value: algorithm.update(params, params, state, **{name: value}))
    values = [jax.tree.map(jnp.asarray, case.scaled(name, value, factor)) for factor in (1, 0.5)]
    update(values[0])
    before = compilations()
    update(values[1])
    assert compilations() == before


@variants
def test_facade_compiles_once(compilations: Callable[[], int], case: Case, options: dict[str, Any]) -> None:
    params = params_of(case, "float32")
    optimizer, grads = case.optimizer(params, **options), grads_of(params)
    optimizer.step(grads)
    before = compilations()
    optimizer.step(grads)
    assert compilations() == before
    optimizer.state_dict()
    optimizer.step(grads)  # works on copies of what the user has seen; the copying is compiled here
    before = compilations()
    optimizer.state_dict()
    optimizer.step(grads)
    group = optimizer.param_groups[0]
    for name in case.numeric:
        value = group[name]
        # Zero switches slots off and on, which is another program; any other value is the same one.
        group[name] = case.scaled(name, value, 0.9)
        optimizer.step(grads)
    assert compilations() == before


# --- what the user holds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", SLOTS.values(), ids=SLOTS)
@variants
def test_arrays_that_the_user_holds_stay_valid(case: Case, options: dict[str, Any], read: Any) -> None:
    params = case.fit({"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])})
    grads = jax.tree.map(jnp.ones_like, params)
    optimizer = case.optimizer(params, **options)
    held = [params, grads]
    for _ in range(3):
        optimizer.step(grads)
        held += [optimizer.params, *(read(optimizer, box) for box in boxes(optimizer))]
    before = frozen(held)
    optimizer.step(grads)
    optimizer.step(lambda params: jnp.sum(params["a"] * params["b"]))
    optimizer.step(grads)
    chex.assert_trees_all_equal(frozen(held), before)


@variants
def test_arrays_handed_in_as_state_stay_valid(case: Case, options: dict[str, Any]) -> None:
    params = case.fit([jnp.array([1.0, 2.0])])
    source = run_facade(case, options, params)
    optimizer = case.optimizer(params, **options)
    saved = source.state_dict()
    optimizer.load_state_dict(saved)
    before = frozen(saved)
    optimizer.step(params)
    for name, value in saved["state"].get(0, {}).items():
        optimizer.state[boxes(optimizer)[0]][name] = value
    optimizer.step(params)
    chex.assert_trees_all_equal(frozen(saved), before)


@variants
def test_state_dict_is_a_snapshot(case: Case, options: dict[str, Any]) -> None:
    params = case.fit([jnp.ones(2), jnp.ones(3)])
    optimizer = run_facade(case, options, params)
    snapshot = optimizer.state_dict()
    before = frozen(copy.deepcopy(snapshot))
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step(params)
    optimizer.add_param_group({"params": case.fit([jnp.ones(1)])})
    chex.assert_trees_all_equal(frozen(snapshot), before)
    # Nor does editing the snapshot reach into the optimizer.
    snapshot["param_groups"][0]["lr"] = 7.0
    snapshot["state"].clear()
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert bool(optimizer.state_dict()["state"]) == bool(before["state"])


@variants
def test_donated_state_gives_the_same_numbers(case: Case, options: dict[str, Any]) -> None:
    algorithm = case.factory(**options)
    params = params_of(case, "float32")
    plain, donated = jax.jit(algorithm.update), jax.jit(algorithm.update, donate_argnums=(0, 2))
    expected, ours = (params, algorithm.init(params)), (jax.tree.map(jnp.copy, params), algorithm.init(params))
    for step in range(3):
        expected = plain(expected[0], grads_of(params, step), expected[1])
        ours = donated(ours[0], grads_of(params, step), ours[1])
    chex.assert_trees_all_equal(ours, expected)


# --- missing gradients and errors -----------------------------------------------------------------------------------


@variants
def test_none_leaves_parameter_and_slots_alone(case: Case, options: dict[str, Any]) -> None:
    params = case.fit({"a": jnp.array([1.0, 2.0]), "b": [jnp.array(3.0), jnp.ones((2, 2))]})
    grads = case.fit({"a": jnp.array([1.0, -2.0]), "b": [None, jnp.ones((2, 2))]})
    algorithm = case.factory(**options)
    before = run_functional(case, options, params, steps=2)
    after = algorithm.update(before[0], grads, before[1])
    for name, old, new in zip(
        ("params", *before[1]._fields), (before[0], *before[1]), (after[0], *after[1]), strict=True
    ):
        if name == "step":
            assert (int(old), int(new)) == (2, 3)
        else:
            chex.assert_trees_all_equal(new["b"][0], old["b"][0])
            for before_step, after_step in ((old["a"], new["a"]), (old["b"][1], new["b"][1])):
                assert before_step is None or not np.array_equal(after_step, before_step), name

    optimizer = run_facade(case, options, params, steps=2)
    untouched = boxes(optimizer)[1]
    assert untouched.shape == case.shape(())
    before = frozen((untouched.value, optimizer.state_dict()["state"].get(1, {})))
    optimizer.step(grads)
    chex.assert_trees_all_equal(frozen((untouched.value, optimizer.state_dict()["state"].get(1, {}))), before)


@variants
def test_missing_from_the_start_leaves_no_state(case: Case, options: dict[str, Any]) -> None:
    params = case.fit([jnp.ones(2), jnp.ones(3)])
    optimizer = case.optimizer(params, **options)
    optimizer.step([None, params[1]])
    np.testing.assert_array_equal(optimizer.params[0], params[0])
    assert (0 in optimizer.state_dict()["state"]) == case.state_at_construction


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (jnp.ones((2, 1)), ValueError),
        (jnp.ones((2, 2), jnp.int32), TypeError),
        (jnp.ones((2, 2), jnp.complex64), TypeError),
        ("gradient", TypeError),
    ],
    ids=["shape", "integer", "complex", "string"],
)
@variants
def test_an_error_changes_nothing(
    case: Case, options: dict[str, Any], wrong: Any, error: type[Exception], steps: int
) -> None:
    params = {"a": jnp.ones((2, 2)), "b": {"c": jnp.arange(4.0).reshape(2, 2)}}
    optimizer = run_facade(case, options, params, steps)
    before = frozen((optimizer.params, optimizer.state_dict()))
    with pytest.raises(error, match=r"b\.c"):
        optimizer.step({"a": params["a"], "b": {"c": wrong}})
    chex.assert_trees_all_equal(frozen((optimizer.params, optimizer.state_dict())), before)


# --- hyperparameters ------------------------------------------------------------------------------------------------


@each("other")
def test_each_hyperparameter_changes_the_result(case: Case, name: str) -> None:
    params = case.fit({"w": jnp.array([0.5, -1.0, 2.0])})
    options = {**case.base, **case.needs.get(name, {})}
    changed = {**options, name: case.other[name]}
    slot = case.seen_in.get(name)

    def functional(options: dict[str, Any]) -> Any:
        final, state = run_functional(case, options, params)
        return (getattr(state, slot) if slot else final)["w"]

    def facade(options: dict[str, Any]) -> Any:
        optimizer = run_facade(case, options, params)
        return optimizer.state[boxes(optimizer)[0]][slot] if slot else optimizer.params["w"]

    for run in (functional, facade):
        difference = np.abs(run(changed) - run(options)).max()
        assert 0 < difference < 1e-4 if name in case.by_rounding else difference > 1e-4


@each("ignored")
def test_ignored_options_change_nothing(case: Case, name: str) -> None:
    params = case.fit({"w": jnp.array([0.5, -1.0, 2.0])})
    options = case.variants()[1]
    changed = {**options, name: case.ignored[name]}
    assert run_facade(case, changed, params).param_groups[0][name] == case.ignored[name]
    chex.assert_trees_all_equal(run_functional(case, changed, params), run_functional(case, options, params))
    chex.assert_trees_all_equal(run_facade(case, changed, params).params, run_facade(case, options, params).params)
