"""Schedules have the values of the stepped schedulers, for numbers, arrays and tracers, in both faces."""

import functools
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_cases import CASES, EPOCHS, chain, make, sequence

import optimjax as optim
from optimjax import functional as F
from optimjax import schedules

NAMES = {
    "LambdaLR": "lambda_",
    "MultiplicativeLR": "multiplicative",
    "StepLR": "step",
    "MultiStepLR": "multi_step",
    "ConstantLR": "constant",
    "LinearLR": "linear",
    "ExponentialLR": "exponential",
    "PolynomialLR": "polynomial",
    "CosineAnnealingLR": "cosine_annealing",
    "CosineAnnealingWarmRestarts": "cosine_annealing_warm_restarts",
    "CyclicLR": "cyclic",
    "OneCycleLR": "one_cycle",
}
FACADE_ONLY = ("cycle_momentum", "base_momentum", "max_momentum")
BASE = 0.1
EXACT = dict(rtol=2e-13, atol=1e-16)  # PyTorch's schedulers go by recursion


def by_the_rules_of_users(function: Any) -> Any:
    """A user's function of a count, which is an integer, may promote it."""

    def wrapped(count: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(count)

    return wrapped


def schedule_of(case: Any, base: float = BASE) -> Any:
    """The schedule of the same arguments."""
    name, arguments = CASES[case] if isinstance(case, str) else case
    if name == "SequentialLR":
        return schedules.sequential(
            [schedule_of(each, base) for each in arguments["schedulers"]], arguments["milestones"]
        )
    if name == "ChainedScheduler":
        first, *others = arguments["schedulers"]
        return schedules.product(schedule_of(first, base), *(schedule_of(each, 1.0) for each in others))
    arguments = {name: value for name, value in arguments.items() if name not in FACADE_ONLY}
    if "lr_lambda" in arguments:
        arguments["lr_lambda"] = by_the_rules_of_users(arguments["lr_lambda"])
    if name in ("CyclicLR", "OneCycleLR"):
        base = arguments.pop("base_lr" if name == "CyclicLR" else "max_lr")
    return getattr(schedules, NAMES[name])(base, **arguments)


def optimizer_of(base: Any = BASE) -> Any:
    return optim.SGD([jnp.ones(())], lr=base, momentum=0.9)


# One group; no metric; no nest, for PyTorch's sequence of a chain takes a step too many.
SCHEDULED: dict[str, Any] = {
    case: case
    for case in CASES
    if not any(word in case for word in ("each group", "plateau", "sequence of", "chain of"))
}
SCHEDULED["sequence of two cycles"] = sequence(["cyclic", "cyclic exp_range", "one cycle"], 13, 100)
SCHEDULED["chain of five"] = chain(["multiplicative", "constant", "multi-step", "exponential", "polynomial power"])
SCHEDULED["chain with cosine"] = chain(["cosine once", "linear", "step"])
every_schedule = pytest.mark.parametrize("case", SCHEDULED.values(), ids=SCHEDULED)


def stepped(case: Any, epochs: int = EPOCHS) -> np.ndarray:
    optimizer = optimizer_of()
    return optim.lr_scheduler.preview(make(optim.lr_scheduler, case)(optimizer), epochs)[:, 0]


# --- The values of the schedulers -----------------------------------------------------------------------------------


@every_schedule
def test_numbers(case: Any) -> None:
    schedule = schedule_of(case)
    values = [schedule(count) for count in range(EPOCHS)]
    assert all(isinstance(value, float) for value in values)
    np.testing.assert_allclose(values, stepped(case), **EXACT)


traceable = pytest.mark.parametrize("case", [case for case in SCHEDULED.values() if case != "lambda"], ids=str)


@traceable
def test_arrays_of_counts(case: Any, x64: None) -> None:
    schedule, expected = schedule_of(case), stepped(case)
    counts = np.arange(EPOCHS)
    np.testing.assert_allclose(schedule(counts), expected, **EXACT)
    np.testing.assert_allclose(schedule(counts.reshape(2, -1)).ravel(), expected, **EXACT)
    values = {
        "jit": jax.jit(schedule)(jnp.arange(EPOCHS)),
        "vmap": jax.vmap(schedule)(jnp.arange(EPOCHS)),
        "scan": jax.lax.scan(lambda count, _: (count + 1, schedule(count)), jnp.int32(0), length=EPOCHS)[1],
        "eager": jnp.stack([schedule(jnp.int32(count)) for count in (0, 1, 7, 40, 199)]),
    }
    for how, value in values.items():
        wanted = expected[[0, 1, 7, 40, 199]] if how == "eager" else expected
        assert value.dtype == jnp.float64, how
        np.testing.assert_allclose(value, wanted, **EXACT, err_msg=how)


@traceable
def test_traced_counts_in_default_precision(case: Any) -> None:
    values, expected = jax.jit(schedule_of(case))(jnp.arange(EPOCHS)), stepped(case)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=2e-7)


def test_the_base_value_may_be_an_array_or_a_tracer() -> None:
    def rates(base: Any) -> Any:
        return [
            schedule_of(case, base)(count)
            for case in ("cosine eta_min", "sequence", "multiplicative", "chain")
            for count in (jnp.int32(3), 5)
        ]

    each = np.array([rates(base) for base in (0.1, 0.2)])
    np.testing.assert_allclose(np.array(rates(jnp.array([0.1, 0.2]))).T, each, rtol=1e-6)
    np.testing.assert_allclose(np.array(jax.vmap(rates)(jnp.array([0.1, 0.2]))).T, each, rtol=1e-6)
    slope = jax.grad(lambda base: schedules.cosine_annealing(base, 10)(5))(0.1)
    assert slope == pytest.approx(0.5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(t_0=st.integers(1, 9), t_mult=st.integers(1, 5))
def test_warm_restarts_come_when_they_shall(t_0: int, t_mult: int) -> None:
    """A logarithm would miss some cycles by one."""
    schedule = schedules.cosine_annealing_warm_restarts(1.0, t_0, t_mult)
    expected = stepped(("CosineAnnealingWarmRestarts", dict(T_0=t_0, T_mult=t_mult)), 400) / BASE
    np.testing.assert_allclose([schedule(count) for count in range(400)], expected, **EXACT)
    np.testing.assert_allclose(schedule(np.arange(400)), expected, **EXACT)


def test_counts_of_a_long_run() -> None:
    """In single precision, too."""
    restarts = schedules.cosine_annealing_warm_restarts(1.0, 1000, 2)
    for schedule in (restarts, schedules.cosine_annealing(1.0, 10**6), schedules.cyclic(0.1, 1.0, 4000)):
        counts = np.arange(0, 10**6, 9973)
        np.testing.assert_allclose(jax.jit(schedule)(jnp.asarray(counts)), schedule(counts), rtol=1e-3, atol=1e-5)
    assert math.isfinite(restarts(2**31 - 1))


def test_one_cycle_of_the_momentum() -> None:
    """The recipe in the docstring."""
    for arguments in (dict(), dict(three_phase=True), dict(anneal_strategy="linear", pct_start=0.1)):
        optimizer = optimizer_of()
        scheduler = optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=50, **arguments)
        momenta = []
        for _ in range(50):
            momenta.append(optimizer.param_groups[0]["momentum"])
            optimizer.step()
            scheduler.step()
        schedule = schedules.one_cycle(0.85, 50, div_factor=0.85 / 0.95, final_div_factor=1, **arguments)
        np.testing.assert_allclose([schedule(count) for count in range(50)], momenta, rtol=1e-14)


def test_one_cycle_beyond_its_end() -> None:
    """PyTorch's scheduler can be stepped once beyond its end, to a rate that may be negative, and then raises."""
    for strategy in ("cos", "linear"):
        optimizer = optimizer_of()
        scheduler = optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10, anneal_strategy=strategy)
        rates = optim.lr_scheduler.preview(scheduler, 11)[:, 0]
        schedule = schedules.one_cycle(1.0, total_steps=10, anneal_strategy=strategy)
        for values in ([schedule(count) for count in range(40)], schedule(np.arange(40))):
            np.testing.assert_allclose(values[:11], rates, rtol=1e-14)
            assert set(values[11:]) == {values[9]}
        np.testing.assert_allclose(jax.jit(schedule)(jnp.arange(40)), values, rtol=1e-5, atol=1e-7)


def test_cyclic_is_the_momentum_too_with_its_ends_exchanged() -> None:
    optimizer = optimizer_of()
    scheduler = optim.lr_scheduler.CyclicLR(optimizer, 0.1, 0.5, 4, 7, mode="triangular2")
    schedule = schedules.cyclic(0.9, 0.8, 4, 7, mode="triangular2")
    for count in range(60):
        assert optimizer.param_groups[0]["momentum"] == pytest.approx(schedule(count), rel=1e-14)
        optimizer.step()
        scheduler.step()


def test_a_sequence_asks_of_a_number_only_the_schedule_whose_turn_it_is() -> None:
    table = [0.1, 0.2, 0.3]
    schedule = schedules.sequential([table.__getitem__, schedules.exponential(1.0, 0.5)], [3])
    assert [schedule(count) for count in range(5)] == [0.1, 0.2, 0.3, 1.0, 0.5]


def test_multiplicative_calls_each_factor_once() -> None:
    calls = []
    schedule = schedules.multiplicative(1.0, lambda count: calls.append(count) or 0.5)
    assert schedule(np.array([3, 0, 1])).tolist() == [0.125, 1.0, 0.5]
    assert calls == [1, 2, 3]


# --- In the functional core -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    ["cosine eta_min", "sequence", "chain", "warm restarts ever longer", "cyclic", "one cycle", "multiplicative"],
)
def test_the_functional_core_goes_where_the_facade_goes(case: str, x64: None) -> None:
    target = jnp.array([1.0, -2.0, 0.5])
    options = dict(weight_decay=0.1)
    optimizer = optim.AdamW({"w": jnp.zeros(3)}, lr=BASE, **options)
    name, arguments = CASES[case]
    alone = {"cycle_momentum": False} if "cycl" in case else {}  # or betas are cycled too
    scheduler = make(optim.lr_scheduler, (name, arguments | alone))(optimizer)
    adamw = F.adamw(lr=schedule_of(case), **options)

    def loss_fn(params: Any) -> Any:
        return jnp.sum((params["w"] - target) ** 4)

    @jax.jit
    def train(params: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            return adamw.update(params, jax.grad(loss_fn)(params), state), params["w"]

        return jax.lax.scan(step, (params, adamw.init(params)), length=40)[1]

    trace = []
    for _ in range(40):
        trace.append(optimizer.params["w"])
        optimizer.step(loss_fn)
        scheduler.step()
    np.testing.assert_allclose(train({"w": jnp.zeros(3)}), trace, rtol=1e-11, atol=1e-12)


def test_other_numbers_of_the_functional_core() -> None:
    """One cycle of both, as `OneCycleLR` does it; and of a part of the tree."""
    params, grads = {"a": jnp.ones(2), "b": jnp.ones(3)}, {"a": jnp.full(2, 0.5), "b": jnp.full(3, -1.0)}
    optimizer = optim.SGD([{"params": params["a"]}, {"params": params["b"]}], lr=0.1, momentum=0.9)
    scheduler = optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[1.0, 0.3], total_steps=8)
    cycle = functools.partial(schedules.one_cycle, total_steps=8)
    momentum = cycle(0.85, div_factor=0.85 / 0.95, final_div_factor=1)
    sgd = F.sgd(lr={"a": cycle(1.0), "b": cycle(0.3)}, momentum=momentum)
    state = sgd.init(params)
    for _ in range(8):
        optimizer.step(list(grads.values()))
        scheduler.step()
        params, state = jax.jit(sgd.update)(params, grads, state)
    for ours, theirs in zip(optimizer.params, params.values(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


# --- Warm-up --------------------------------------------------------------------------------------------------------


def test_warm_ups_written_by_hand(x64: None) -> None:
    """What tutorials write with `LambdaLR`, and by hand into the groups."""
    warm, total, rate = 5, 100, 0.1
    step_by_hand = lambda epoch: (epoch + 1) / warm if epoch < warm else 0.1 ** (epoch // 30)  # noqa: E731
    cosine_by_hand = lambda epoch: (  # noqa: E731
        (epoch + 1) / warm if epoch < warm else 0.5 * (np.cos((epoch - warm) / (total - warm) * np.pi) + 1)
    )
    steps = schedules.warmup(schedules.step(1.0, 30), warm, delay=False)
    cosine = schedules.warmup(schedules.cosine_annealing(1.0, T_max=total - warm), warm)
    for by_hand, schedule in ((step_by_hand, steps), (cosine_by_hand, cosine)):
        factors = [by_hand(epoch) for epoch in range(total)]
        np.testing.assert_allclose([schedule(count) for count in range(total)], factors, rtol=1e-13)
        np.testing.assert_allclose(
            jax.jit(schedule)(jnp.arange(total, dtype=jnp.int32)), factors, rtol=1e-13, atol=1e-16
        )
        optimizer = optimizer_of(rate)
        scheduler = optim.lr_scheduler.LambdaLR(optimizer, schedule)
        rates = optim.lr_scheduler.preview(scheduler, total)[:, 0]
        np.testing.assert_allclose(rates, np.multiply(rate, factors), rtol=1e-13)
        assert scheduler.state_dict()["lr_lambdas"] == [None]


def test_a_warm_up_of_one_step_is_none() -> None:
    schedule = schedules.exponential(1.0, 0.5)
    assert [schedules.warmup(schedule, 1, delay=False)(count) for count in range(4)] == [1.0, 0.5, 0.25, 0.125]


# --- Plateau --------------------------------------------------------------------------------------------------------


plateaus = st.fixed_dictionaries(
    {},
    optional=dict(
        mode=st.sampled_from(["min", "max"]),
        factor=st.sampled_from([0.1, 0.5, 0.9]),
        patience=st.integers(0, 4),
        threshold=st.sampled_from([1e-4, 0.0, 0.1, 1.0]),
        threshold_mode=st.sampled_from(["rel", "abs"]),
        cooldown=st.integers(0, 4),
        min_lr=st.sampled_from([0.0, 1e-3, 0.05]),
        eps=st.sampled_from([1e-8, 1e-2]),
    ),
)
numbers = st.sampled_from([0.0, 0.5, 1.0, 1.0625, 2.0, -1.0, 3.0, math.nan, math.inf])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(arguments=plateaus, metrics=st.lists(numbers, min_size=30, max_size=30))
def test_plateau_is_the_class(arguments: Any, metrics: list[float]) -> None:
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        optimizer = optimizer_of()
        scheduler = optim.lr_scheduler.ReduceLROnPlateau(optimizer, **arguments)
        plateau = schedules.reduce_on_plateau(BASE, **arguments)
        rates = []
        for metric in metrics:
            scheduler.step(metric)
            rates.append(optimizer.param_groups[0]["lr"])
        update = lambda state, metric: tuple(reversed(plateau.update(metric, state)))  # noqa: E731
        state, values = jax.lax.scan(update, plateau.init(), jnp.array(metrics, float))
    np.testing.assert_array_equal(values, rates)
    counted = scheduler.best, scheduler.num_bad_epochs, scheduler.cooldown_counter
    assert tuple(map(float, state[1:])) == counted


def test_plateau_under_jit_in_a_training_loop() -> None:
    """The state has one structure, one dtype and no shared buffers, so it can be carried and donated."""
    plateau = schedules.reduce_on_plateau(1.0, factor=0.5, patience=1, cooldown=1)
    sgd = F.sgd(lr=plateau.init().value)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params: Any, states: Any) -> Any:
        state, plateau_state = states
        loss, grads = jax.value_and_grad(lambda x: jnp.abs(x))(params)
        lr, plateau_state = plateau.update(loss, plateau_state)
        params, state = sgd.update(params, grads, state, lr=lr)
        return params, (state, plateau_state), lr

    params, states = jnp.float32(0.3), (sgd.init(jnp.float32(0.3)), plateau.init())
    before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), states)
    rates = []
    for _ in range(20):
        params, states, lr = step(params, states)
        rates.append(float(lr))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), states) == before
    assert step._cache_size() == 1
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.1


def test_plateau_of_several_values() -> None:
    plateau = schedules.reduce_on_plateau(jnp.array([1.0, 0.01]), factor=0.5, patience=0, min_lr=0.008)
    value, state = plateau.update(1.0, plateau.init())
    value, state = plateau.update(jnp.bfloat16(2.0), state)
    np.testing.assert_allclose(value, [0.5, 0.008])
    assert state.best.dtype == jnp.float32


# --- Errors ---------------------------------------------------------------------------------------------------------


ERRORS = {
    "constant": (lambda: schedules.constant(1.0, factor=1.5), "between 0 and 1, got 1.5"),
    "linear start": (lambda: schedules.linear(1.0, start_factor=0), "got start_factor=0"),
    "linear end": (lambda: schedules.linear(1.0, end_factor=-1), "got end_factor=-1"),
    "step": (lambda: schedules.step(1.0, 0), "step_size must be positive, got 0"),
    "cosine": (lambda: schedules.cosine_annealing(1.0, 0), "T_max must be positive, got 0"),
    "restarts": (lambda: schedules.cosine_annealing_warm_restarts(1.0, 2.5), "positive integer T_0, but got 2.5"),
    "restarts, mult": (lambda: schedules.cosine_annealing_warm_restarts(1.0, 2, 0), "T_mult >= 1, but got 0"),
    "cyclic": (lambda: schedules.cyclic(0.1, 1.0, 0), "step_size_up must be positive, got 0"),
    "cyclic mode": (
        lambda: schedules.cyclic(0.1, 1.0, mode="square"),
        "mode must be one of triangular, .* got 'square'",
    ),
    "one cycle": (lambda: schedules.one_cycle(1.0), "total_steps OR"),
    "one cycle share": (lambda: schedules.one_cycle(1.0, 10, pct_start=1.5), "pct_start, but got 1.5"),
    "one cycle strategy": (
        lambda: schedules.one_cycle(1.0, 10, anneal_strategy="no"),
        "'cos' or 'linear', instead got no",
    ),
    "sequential": (lambda: schedules.sequential([math.cos], [3]), "got 1 schedules and 1 milestones"),
    "sequential of none": (lambda: schedules.sequential([], []), "got 0 schedules"),
    "sequential order": (lambda: schedules.sequential([math.cos] * 3, [5, 3]), r"must ascend, got \[5, 3\]"),
    "warmup": (lambda: schedules.warmup(math.cos, 0), "total_iters must be positive, got 0"),
    "plateau": (lambda: schedules.reduce_on_plateau(1.0, factor=1.0), "Factor should be < 1.0, got 1.0"),
    "plateau mode": (lambda: schedules.reduce_on_plateau(1.0, mode="less"), "mode less is unknown"),
    "plateau threshold": (
        lambda: schedules.reduce_on_plateau(1.0, threshold_mode="no"),
        "threshold mode no is unknown",
    ),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_every_scheduler_has_its_schedule() -> None:
    others = {"product", "reduce_on_plateau", "sequential", "warmup", "Plateau", "PlateauState", "Schedule"}
    assert set(NAMES.values()) | others == set(schedules.__all__)
    classes = {name for name, _ in CASES.values()} - {"SequentialLR", "ChainedScheduler", "ReduceLROnPlateau"}
    assert set(NAMES) == classes


@pytest.mark.parametrize(("scheduler", "schedule"), [*NAMES.items(), ("ReduceLROnPlateau", "reduce_on_plateau")])
def test_arguments_have_the_defaults_of_the_class(scheduler: str, schedule: str) -> None:
    """Those that are not the class's own: the value takes the place of the optimizer and its rates."""
    ours = inspect.signature(getattr(schedules, schedule)).parameters
    theirs = inspect.signature(getattr(optim.lr_scheduler, scheduler)).parameters
    shared = [name for name in ours if name != "value"]
    assert {name: ours[name].default for name in shared} == {name: theirs[name].default for name in shared}
