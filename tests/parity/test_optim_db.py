"""On PyTorch's own test inputs, and between them, both faces agree with PyTorch in float64.

The inputs are every configuration and every error of ``optim_db``, with which PyTorch tests its optimizers.
"""

import functools
import importlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, EVERY, Case
from jax.experimental.sparse import BCOO
from reference import (
    assert_same,
    facade,
    functional_steps,
    gradient_for_us,
    pytorch,
    random_entries,
    random_gradients,
    random_parameters,
)

import optimjax as optim

torch: Any = pytest.importorskip("torch")
optim_db = importlib.import_module("torch.testing._internal.common_optimizers").optim_db

CASE = {case.torch: case for case in EVERY if case.stand_in is None}
INFO = {info.name: info for info in optim_db}
SHAPES = [(), (5,), (3, 4), (2, 1, 2, 2), (0, 3)]

pytestmark = pytest.mark.usefixtures("torch", "x64")


# --- A run in PyTorch, and by both faces ----------------------------------------------------------------------------


def doubles(case: Case, *shapes: tuple[int, ...], dtype: Any = np.float64) -> list[np.ndarray]:
    """Parameters of these shapes, or of like ones that PyTorch takes."""
    return random_parameters(case.shapes([(shape, dtype) for shape in shapes]))


def gradients(case: Case, params: Sequence[np.ndarray], steps: int) -> Any:
    return (random_entries if case.sparse else random_gradients)(params, steps)


def compare(
    case: Case, options: dict[str, Any], params: list[np.ndarray], steps: int, theirs: dict[str, Any] | None = None
) -> None:
    """Both faces give PyTorch's numbers; ``theirs`` are PyTorch's options where they are not spelled as ours."""
    theirs = options if theirs is None else theirs
    if case.takes_loss:
        compare_with_loss(case, options, theirs, params[0].dtype)
        return
    grads = gradients(case, params, steps)
    reference = pytorch(torch, case, theirs, params, grads)
    assert_same(facade(case, options, params, grads), reference)
    assert_same(functional_steps(case, options, params, grads), reference, with_step=False)


def loss_of(params: Any, array: Callable[[Any], Any]) -> Any:
    """A convex function, written once for both libraries."""
    rng = np.random.default_rng(2)
    total = abs(sum(p.sum() for p in params)) ** 2 / 20
    for p in params:
        curvature = np.asarray(np.exp(rng.uniform(0, 4, p.shape)))
        distance = abs(p - array(np.asarray(rng.standard_normal(p.shape))))
        total = total + (array(curvature) * distance**2 / 2 + distance**4 / 10).sum()
    return total


def our_loss(params: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):  # of which it makes use
        return loss_of(params, jnp.asarray)


@functools.cache
def compiled(factory: Callable[..., Any], structure: tuple[tuple[str, Any], ...]) -> tuple[Any, Any]:
    """The functional core of an algorithm that evaluates the loss; other numbers do not compile it again."""
    init, update = factory(**dict(structure))
    return init, jax.jit(lambda params, state, numbers: update(params, None, state, loss_fn=our_loss, **numbers))


def compare_with_loss(case: Case, options: dict[str, Any], theirs: dict[str, Any], dtype: Any) -> None:
    """The same for an algorithm that evaluates the loss: three calls of a few iterations.

    PyTorch has the state with the first parameter.
    """
    params = doubles(case, *SHAPES, dtype=dtype)  # always these, for compiling the loop takes long
    options, theirs = {"max_iter": 5, **options}, {"max_iter": 5, **theirs}
    tensors = [torch.nn.Parameter(torch.from_numpy(p.copy())) for p in params]
    reference = case.reference(torch)(tensors, **theirs)
    optimizer = case.optimizer([jnp.asarray(p) for p in params], **options)
    init, update = compiled(case.factory, tuple((name, optimizer.defaults[name]) for name in case.structural))
    numbers = {name: jnp.asarray(optimizer.defaults[name], float).reshape(()) for name in case.numeric}
    values = list(optimizer.params)
    state = init(values)

    def closure() -> Any:
        reference.zero_grad()
        loss = loss_of(tensors, torch.from_numpy)
        loss.backward()
        return loss

    for _ in range(3):
        loss = reference.step(closure).item()
        np.testing.assert_allclose(optimizer.step(our_loss), loss, rtol=1e-12)
        values, state = update(values, state, numbers)

    for mine, pure, tensor in zip(optimizer.params, values, tensors, strict=True):
        np.testing.assert_allclose(mine, tensor.detach().numpy(), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(pure, tensor.detach().numpy(), rtol=1e-12, atol=1e-12)
    expected = reference.state[tensors[0]]
    expected.pop("al", None)  # scratch
    kept = dict(optimizer.state[optimizer.param_groups[0]["params"][0]])
    assert kept.keys() == expected.keys()
    for name, value in expected.items():
        value, pure = np.asarray(value), np.asarray(getattr(state, name))
        if isinstance(expected[name], list):
            pure = pure[: len(value)]  # as many rows as are filled
        tolerance = 1e-10 if name in ("ro", "H_diag") else 1e-12  # of products in which digits cancel
        for mine in (np.asarray(kept[name]), pure):
            np.testing.assert_allclose(mine, value, rtol=tolerance, atol=1e-12, err_msg=name)


# --- Valid inputs ---------------------------------------------------------------------------------------------------


def configurations() -> Iterator[Any]:
    """Those that PyTorch runs on a CPU, then those that it adds elsewhere."""
    for name, info in INFO.items():
        seen: list[str] = []
        for device in ("cpu", "cuda", "mps"):
            for given in info.optim_inputs_func(device=device):
                if repr(given.kwargs) not in seen:
                    seen.append(repr(given.kwargs))
                    yield pytest.param(CASE[name], given.kwargs, id=f"{name}-{device}-{given.desc}")


CONFIGURATIONS = list(configurations())


def spelled(value: Any, array: Callable[[Any], Any]) -> Any:
    """An option whose tensors are turned into arrays, in double precision as all the rest."""
    if isinstance(value, tuple):
        return tuple(spelled(item, array) for item in value)
    return array(value.double()) if isinstance(value, torch.Tensor) else value


def for_us(options: dict[str, Any]) -> dict[str, Any]:
    return {name: spelled(value, lambda tensor: jnp.asarray(tensor.numpy())) for name, value in options.items()}


def test_the_records_are_of_the_same_optimizers() -> None:
    assert INFO.keys() == CASE.keys()
    for name, info in INFO.items():
        assert info.step_requires_closure == CASE[name].takes_loss
        assert info.only_supports_sparse_grads == CASE[name].sparse
        assert info.supports_complex == (CASE[name].complex_message is None)


def test_no_configuration_is_missing() -> None:
    # Of Adadelta 6, Adafactor 5, Adagrad 7, Adam 5, Adamax 5, AdamW 5, ASGD 7, LBFGS 5, Muon 7, NAdam 7, RAdam 6,
    # RMSprop 8, Rprop 5, SGD 9, SparseAdam 4.
    assert sum("-cpu-" in (configuration.id or "") for configuration in CONFIGURATIONS) == 91


@pytest.mark.parametrize(("case", "options"), CONFIGURATIONS)
def test_configuration(case: Case, options: dict[str, Any]) -> None:
    theirs = {name: spelled(value, lambda tensor: tensor) for name, value in options.items()}
    theirs.pop("capturable", None)  # PyTorch has it on accelerators only
    compare(case, for_us(options), doubles(case, *SHAPES), 20, theirs)


# --- Error inputs ---------------------------------------------------------------------------------------------------

# Where the text differs by design, ours.
OURS: dict[str, tuple[type[Exception], str]] = {
    "invalid param type": (TypeError, "params argument given to the optimizer should be an iterable of Parameters or"),
    "a param group cannot have duplicate parameters": (ValueError, "a parameter appears more than once"),
}
# Limits of PyTorch's kernels, where one compiled step takes the place of all of them.
ACCEPTED = [
    "lr as Tensor doesn't work with foreach & not capturable",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True",
]
# The facade alone refuses them: the functional core also takes arrays, tracers and schedules.
MIXED = "betas must be either both floats or both Tensors"


def errors(wanted: Callable[[Any], bool]) -> Any:
    """The error inputs of each optimizer that are wanted."""
    found = [
        pytest.param(CASE[name], error, id=f"{name}-{error.optimizer_error_input.desc}")
        for name, info in INFO.items()
        for error in info.optim_error_inputs_func("cpu", torch.float64)
        if wanted(error.optimizer_error_input)
    ]
    return pytest.mark.parametrize(("case", "error"), found)


def boxed(params: Any, boxes: dict[int, Any]) -> Any:
    """Parameters of an error input for us: tensors are boxes, the same tensor is the same box."""
    if isinstance(params, (list, tuple)):
        return type(params)(boxed(item, boxes) for item in params)
    if isinstance(params, dict):
        return {name: boxed(value, boxes) if name == "params" else value for name, value in params.items()}
    if not isinstance(params, torch.Tensor):
        return params
    if params.is_sparse:
        entries = params.coalesce()
        return BCOO((jnp.asarray(entries.values()), jnp.asarray(entries.indices().T)), shape=tuple(params.shape))
    if id(params) not in boxes:
        boxes[id(params)] = box = optim.Parameter(jnp.asarray(params.detach().numpy()))
        box.grad = None if params.grad is None else jnp.asarray(params.grad.numpy())
    return boxes[id(params)]


@errors(lambda given: given.desc not in ACCEPTED)
def test_error(case: Case, error: Any) -> None:
    given = error.optimizer_error_input
    default = [torch.nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(error.error_type, match=error.error_regex):
        case.reference(torch)(default if given.params is None else given.params, **given.kwargs).step()
    expected, message = OURS.get(given.desc, (error.error_type, error.error_regex))
    params = boxed(default if given.params is None else given.params, {})
    if not INFO[case.torch].supports_param_groups and given.params and isinstance(params[-1], dict):
        message = "doesn't support per-parameter options"
    with pytest.raises(expected, match=message):
        case.optimizer(params, **for_us(given.kwargs)).step()


@errors(lambda given: given.params is None and given.desc not in (*ACCEPTED, MIXED))
def test_error_of_a_factory(case: Case, error: Any) -> None:
    with pytest.raises(error.error_type, match=error.error_regex):
        case.factory(**for_us(error.optimizer_error_input.kwargs))


@errors(lambda given: given.desc in ACCEPTED)
def test_what_only_pytorch_refuses(case: Case, error: Any) -> None:
    options = for_us(error.optimizer_error_input.kwargs)
    theirs = {name: jax.tree.map(float, value) for name, value in options.items() if name != "foreach"}
    compare(case, options, doubles(case, (3,)), 5, theirs)


@errors(lambda given: given.desc == MIXED)
def test_the_functional_core_takes_betas_of_two_kinds(case: Case, error: Any) -> None:
    params = doubles(case, (3,))
    grads = random_gradients(params, 5)
    options = for_us(error.optimizer_error_input.kwargs)
    expected = functional_steps(case, jax.tree.map(float, options), params, grads)
    assert_same(functional_steps(case, options, params, grads), expected)


# --- Every pair of options ------------------------------------------------------------------------------------------


def pairs() -> Iterator[Any]:
    """Every case with every two of the options that PyTorch has."""
    for case in EVERY:
        for names in itertools.combinations(case.theirs(case.other), 2):
            yield pytest.param(case, names, id=f"{case}-{'-'.join(names)}")


@pytest.mark.thorough
@pytest.mark.parametrize(("case", "names"), list(pairs()))
def test_pair_of_options(case: Case, names: tuple[str, str]) -> None:
    options = dict(case.base)
    for name in names:
        options |= case.needs.get(name, {})
    options |= {name: case.other[name] for name in names}
    try:
        case.reference(torch)([torch.ones(2, 2)], **case.theirs(options))
    except ValueError as error:
        for make in (lambda: case.optimizer([jnp.ones((2, 2))], **options), lambda: case.factory(**options)):
            with pytest.raises(ValueError, match=re.escape(str(error))):
                make()
    else:
        compare(case, options, doubles(case, (5,), (3, 4)), 10)


# --- Numbers as arrays ----------------------------------------------------------------------------------------------


def numbers() -> Any:
    """Every case with each of its numeric options, in each shape that holds one number."""
    return pytest.mark.parametrize(
        ("case", "name", "shape"),
        [
            pytest.param(case, name, shape, id=f"{case}-{name}-{shape}")
            for case in EVERY
            for name in case.numeric
            for shape in [(), (1,)]
        ],
    )


def as_arrays(value: Any, shape: tuple[int, ...]) -> Any:
    return jax.tree.map(lambda number: jnp.full(shape, number), value)


@numbers()
def test_number_as_array(case: Case, name: str, shape: tuple[int, ...]) -> None:
    value = case.other[name]
    theirs = {**case.base, **case.needs.get(name, {}), name: value}
    compare(case, {**theirs, name: as_arrays(value, shape)}, doubles(case, (), (3,)), 5, theirs)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_an_array_is_checked_while_a_program_is_traced(case: Case) -> None:
    params = doubles(case, (3,))
    good, bad = jnp.asarray(0.1), jnp.asarray(-0.1)
    assert jax.eval_shape(lambda: case.factory(**{**case.base, "lr": good}).init(params))
    with pytest.raises(ValueError, match=re.escape(case.rate_message.format(-0.1))):
        jax.eval_shape(lambda: case.factory(**{**case.base, "lr": bad}).init(params))


@numbers()
def test_group_edited_to_an_array(case: Case, name: str, shape: tuple[int, ...]) -> None:
    options = {**case.base, **case.needs.get(name, {}), name: case.other[name]}
    params = doubles(case, (3,))
    grads = [[gradient_for_us(grad) for grad in step] for step in gradients(case, params, 4)]
    changed = case.scaled(name, case.other[name], 0.9)
    results = []
    for value in (changed, as_arrays(changed, shape)):
        optimizer = case.optimizer([jnp.asarray(p) for p in params], **case.ours(options))
        for count, step in enumerate(grads):
            if count == 2:
                optimizer.param_groups[0][name] = value
            optimizer.step(our_loss if case.takes_loss else step)
        results.append(optimizer.params)
    jax.tree.map(np.testing.assert_array_equal, *results)


# --- Missing gradients, complex parameters --------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_missing_gradients_at_random(case: Case) -> None:
    _, options = case.variants()
    params = doubles(case, *[(3,)] * 3)  # of one shape: the patterns share programs
    rng = np.random.default_rng(2)
    grads = [[grad if rng.random() < 0.6 else None for grad in step] for step in gradients(case, params, 20)]
    assert_same(facade(case, options, params, grads), pytorch(torch, case, options, params, grads))


@pytest.mark.parametrize(
    ("case", "options"),
    [
        pytest.param(case, options, id=f"{case}-{label}")
        for case in EVERY
        if case.complex_message is None
        for label, options in zip(["base", "full"] if case.full else ["base"], case.variants(), strict=False)
    ],
)
def test_complex(case: Case, options: dict[str, Any]) -> None:
    compare(case, options, doubles(case, (2, 3), dtype=np.complex128), 20)
