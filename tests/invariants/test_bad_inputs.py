"""What PyTorch refuses is refused with PyTorch's message, through both faces."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import CASES, Bad, Case

REFUSED = [
    pytest.param(case, bad, id=f"{case}-" + ",".join(f"{name}={value}" for name, value in bad.options.items()))
    for case in CASES
    for bad in case.bad
]
PAIRS = [
    pytest.param(case, name, id=f"{case}-{name}")
    for case in CASES
    for name, value in case.other.items()
    if name in case.numeric and isinstance(value, tuple) and len(value) == 2
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def add_group(case: Case, options: dict[str, Any]) -> None:
    optimizer = case.optimizer([jnp.ones((2, 2))])
    try:
        optimizer.add_param_group({"params": [jnp.ones((3, 2))], **options})
    finally:
        assert [box.shape for box in optimizer.param_groups[0]["params"]] == [(2, 2)]
        assert len(optimizer.param_groups) == 1
        optimizer.step([jnp.ones((2, 2))])  # still works


FACES: dict[str, Callable[[Case, dict[str, Any]], Any]] = {
    "class": lambda case, options: case.optimizer([jnp.ones((2, 2))], **options),
    "group": lambda case, options: case.optimizer([{"params": [jnp.ones((2, 2))], **options}]),
    "add_param_group": add_group,
    "factory": lambda case, options: case.factory(**options),
}
faces = pytest.mark.parametrize("make", FACES.values(), ids=FACES)


@faces
@pytest.mark.parametrize(("case", "bad"), REFUSED)
def test_value_out_of_range(case: Case, bad: Bad, make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=exactly(bad.message + bad.added)):
        make(case, dict(bad.options))


def version(torch: Any) -> tuple[int, ...]:
    return tuple(map(int, torch.__version__.split(".")[:2]))


@pytest.mark.parametrize(("case", "bad"), REFUSED)
def test_pytorch_says_the_same(torch: Any, case: Case, bad: Bad) -> None:
    if version(torch) < bad.since:
        pytest.skip(f"PyTorch does since {bad.since}")
    with pytest.raises(ValueError, match=exactly(bad.message)):
        case.reference(torch)([torch.ones(2, 2)], **bad.options)


@every_case
def test_of_two_illegal_values_pytorchs_first_is_named(torch: Any, case: Case) -> None:
    for one, other in itertools.combinations([bad for bad in case.bad if bad.since <= version(torch)], 2):
        options = {**one.options, **other.options}
        with pytest.raises(ValueError, match=r".+") as theirs:
            case.reference(torch)([torch.ones(2, 2)], **options)
        for make in FACES.values():
            with pytest.raises(ValueError, match=f"^{re.escape(str(theirs.value))}"):
                make(case, dict(options))


@faces
@every_case
def test_array_out_of_range(case: Case, make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=exactly(case.rate_message.format(-1.0))):
        make(case, {"lr": jnp.array(-1.0)})


@every_case
def test_override_out_of_range(case: Case) -> None:
    algorithm = case.factory()
    params = jnp.ones((2, 2))
    state = algorithm.init(params)
    with pytest.raises(ValueError, match=exactly(case.rate_message.format(-1.0))):
        algorithm.update(params, params, state, lr=-1.0)
    with pytest.raises(ValueError, match=r"^Tensor lr must be 1-element"):  # a tracer's shape is known
        jax.eval_shape(lambda lr: algorithm.update(params, params, state, lr=lr), jnp.ones(2))


@every_case
def test_one_bad_leaf_of_a_tree_of_values(case: Case) -> None:
    with pytest.raises(ValueError, match=exactly(case.rate_message.format(-2.0))):
        case.factory(lr={"base": 0.1, "head": -2.0})


@faces
@pytest.mark.parametrize("value", ["fast", None], ids=["string", "none"])
@every_case
def test_not_a_number(case: Case, make: Callable[..., Any], value: Any) -> None:
    with pytest.raises(TypeError, match=r"^lr"):
        make(case, {"lr": value})


@faces
@pytest.mark.parametrize("shape", [(0,), (2,), (1, 2)], ids=str)
@every_case
def test_array_of_several_numbers(case: Case, make: Callable[..., Any], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=exactly(f"Tensor lr must be 1-element, got shape {shape}")):
        make(case, {"lr": jnp.ones(shape)})


@faces
@every_case
def test_unknown_option(case: Case, make: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="learning_rate"):
        make(case, {"learning_rate": 0.1})


@faces
@every_case
def test_array_for_a_flag(case: Case, make: Callable[..., Any]) -> None:
    for name in case.structural:
        with pytest.raises(TypeError, match=f"^{name} decides what is compiled"):
            make(case, {name: jnp.array(True)})


@faces
@pytest.mark.parametrize("value", [0.9, (0.9,), (0.9, 1.2, 1.3), (0.9, "x"), (0.9, None)], ids=str)
@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_a_pair_that_is_none(case: Case, make: Callable[..., Any], name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{name} must be a tuple of 2 numbers"):
        make(case, {name: value})


@every_case
def test_schedules_belong_to_the_functional_core(case: Case) -> None:
    with pytest.raises(TypeError, match=r"^lr must be a number, .*schedules belong to optim.functional"):
        case.optimizer([jnp.ones((2, 2))], lr=lambda count: 0.1)


@pytest.mark.parametrize("case", [case for case in CASES if case.complex_message], ids=str)
def test_complex_parameters_are_refused_where_pytorch_refuses_them(torch: Any, case: Case) -> None:
    assert case.complex_message is not None
    params = {"real": jnp.ones((2, 2)), "imaginary": jnp.ones((2, 2), jnp.complex64)}
    for make in (case.optimizer, case.factory().init):
        with pytest.raises((RuntimeError, ValueError), match=exactly(f"{case.complex_message} ('imaginary')")):
            make(params)
    parameter = torch.nn.Parameter(torch.ones((2, 2), dtype=torch.complex64))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises((RuntimeError, ValueError), match=f"{re.escape(case.complex_message)}$"):
        case.reference(torch)([parameter]).step()
