"""Measure where PyTorch and optax agree, where they differ, and that optimjax goes with PyTorch.

`python benchmarks/differences.py` prints a table in Markdown: one tiny case for each statement, in float64 unless it
says otherwise. "off" is the largest difference from PyTorch's result over all its numbers, relative to the largest of
them; the first number is shown. "holds" is whether optax did what the statement claims and optimjax what it is to do.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import optimjax as optim
from optimjax._core.numerics import bias_correction

LR = 0.1
EPOCHS = 20
START = np.array([0.5, -1.0, 2.0])
GRADS = np.random.default_rng(0).standard_normal((20, 3))


class Library(NamedTuple):
    """PyTorch or optimjax: the same script runs in both."""

    optim: Any
    array: Callable[[Any], Any]  # from NumPy
    parameter: Callable[[Any], Any]  # from an array of its own


TORCH = Library(torch.optim, lambda x: torch.from_numpy(np.array(x)), torch.nn.Parameter)
OURS = Library(optim, jnp.asarray, optim.Parameter)


@dataclass(frozen=True)
class Row:
    """One statement, and the results that decide it.

    Attributes:
      statement: what is claimed.
      measured: what the results are.
      torch, optax, ours: an array, a number or a word; None where there is nothing to compare.
      optax_agrees: whether optax is claimed to have PyTorch's result.
      ours_agrees: whether optimjax is to have it; not where a fault is not inherited.
      tolerance: how far off a result may be and still agree.
    """

    statement: str
    measured: str
    torch: Any
    optax: Any
    ours: Any
    optax_agrees: bool = False
    ours_agrees: bool = True
    tolerance: float = 1e-12

    def off(self, other: Any) -> float:
        """How far a result is from PyTorch's."""
        if isinstance(other, str) or isinstance(self.torch, str):
            return 0.0 if other == self.torch else np.inf
        reference = np.asarray(self.torch, float)
        return float(np.max(np.abs(np.asarray(other, float) - reference)) / (np.max(np.abs(reference)) or 1))

    def holds(self) -> bool:
        """Whether each has the result that it is claimed to have."""
        claims = ((self.optax, self.optax_agrees), (self.ours, self.ours_agrees))
        return all((self.off(result) <= self.tolerance) == agrees for result, agrees in claims if result is not None)

    def __str__(self) -> str:
        """The row of the table."""

        def show(result: Any) -> str:
            return "–" if result is None else result if isinstance(result, str) else f"{np.ravel(result)[0]:.7g}"

        def off(result: Any) -> str:
            return "" if result is None or np.isinf(self.off(result)) else f"{self.off(result):.0e}"

        cells = (
            *(self.statement, self.measured, show(self.torch), show(self.optax), off(self.optax)),
            *(show(self.ours), off(self.ours), "yes" if self.holds() else "**no**"),
        )
        return f"| {' | '.join(cells)} |"


# --- The same run in each library -----------------------------------------------------------------------------------


def steps(library: Library, name: str, options: dict[str, Any], start: Any, grads: Any) -> np.ndarray:
    """The parameter after a step with each gradient."""
    param = library.parameter(library.array(start))
    optimizer = getattr(library.optim, name)([param], **options)
    for grad in grads:
        param.grad = library.array(grad)
        optimizer.step()
    return np.asarray(param.detach() if library is TORCH else param)


def optax_steps(transform: Any, start: Any, grads: Any) -> np.ndarray:
    """The same with optax."""

    def step(carry: Any, grad: Any) -> Any:
        params, state = carry
        updates, state = transform.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jnp.asarray(start)
    return np.asarray(jax.lax.scan(step, (params, transform.init(params)), jnp.asarray(grads))[0][0])


def run(
    statement: str,
    name: str,
    options: dict[str, Any],
    transform: Any,
    measured: str = "",
    measure: Callable[[np.ndarray], Any] = lambda param: param,
    start: Any = START,
    grads: Any = GRADS,
    **claims: Any,
) -> Row:
    """The parameter after the same steps in all three, or what `measure` makes of it."""
    results = (
        steps(TORCH, name, options, start, grads),
        optax_steps(transform, start, grads),
        steps(OURS, name, options, start, grads),
    )
    torchs, optaxs, ours = map(measure, results)
    measured = measured or f"θ after {len(grads)} step{'s' * (len(grads) > 1)}"
    return Row(statement, measured, torchs, optaxs, ours, **claims)


def default(statement: str, name: str, argument: str, transform: Any, theirs: str | None = None) -> Row:
    """The default of an argument; "none" where there is no such argument."""

    def of(function: Any, argument: str) -> Any:
        parameters = inspect.signature(function).parameters
        return parameters[argument].default if argument in parameters else "none"

    torchs, ours = (of(getattr(library.optim, name), argument) for library in (TORCH, OURS))
    return Row(statement, f"default of `{argument}`", torchs, of(transform, theirs or argument), ours)


def rates(library: Library, name: str, options: dict[str, Any], *metric: float) -> np.ndarray:
    """The learning rates of 20 epochs; `metric` is what the scheduler is told after each, if it asks."""
    optimizer = library.optim.SGD([library.parameter(library.array(START))], lr=LR)
    scheduler = getattr(library.optim.lr_scheduler, name)(optimizer, **options)
    values = [optimizer.param_groups[0]["lr"]]
    while len(values) < EPOCHS:
        optimizer.step()
        scheduler.step(*metric)
        values.append(optimizer.param_groups[0]["lr"])
    return np.array(values)


def schedule(
    statement: str,
    name: str,
    options: dict[str, Any],
    theirs: Callable[[Any], Any],
    measured: str = "20 rates",
    measure: Callable[[np.ndarray], Any] = lambda values: values,
    **claims: Any,
) -> Row:
    """The learning rates of 20 epochs in all three, or what `measure` makes of them."""
    torchs = measure(rates(TORCH, name, options))
    optaxs = measure(np.array([theirs(epoch) for epoch in range(EPOCHS)]))
    ours = measure(rates(OURS, name, options))
    return Row(statement, measured, torchs, optaxs, ours, **claims)


def outcome(script: Callable[[], Any]) -> str:
    """Whether a script runs, or what it raises."""
    try:
        script()
    except Exception as error:
        return type(error).__name__
    return "runs"


# --- Algorithms -----------------------------------------------------------------------------------------------------


def algorithms_that_agree() -> Iterator[Row]:
    same: Any = {"optax_agrees": True}
    yield run("SGD", "SGD", {"lr": LR}, optax.sgd(LR), **same)
    yield run("SGD with momentum", "SGD", {"lr": LR, "momentum": 0.9}, optax.sgd(LR, 0.9), **same)
    options = {"lr": LR, "momentum": 0.9, "nesterov": True}
    yield run("SGD with Nesterov momentum", "SGD", options, optax.sgd(LR, 0.9, nesterov=True), **same)
    yield run("Adam", "Adam", {"lr": LR}, optax.adam(LR), **same)
    l2 = optax.chain(optax.add_decayed_weights(0.1), optax.adam(LR))
    yield run("Adam: weight decay is added to the gradient", "Adam", {"lr": LR, "weight_decay": 0.1}, l2, **same)
    yield run("AdamW with equal decay", "AdamW", {"lr": LR}, optax.adamw(LR, weight_decay=1e-2), **same)
    yield run("Adamax", "Adamax", {"lr": LR}, optax.adamax(LR), **same)
    yield run("Adadelta", "Adadelta", {"lr": LR}, optax.adadelta(LR), **same)


def algorithms_that_differ() -> Iterator[Row]:
    yield default("AdamW: weight decay", "AdamW", "weight_decay", optax.adamw)

    yield default("RMSprop: share of the mean that is kept", "RMSprop", "alpha", optax.rmsprop, "decay")
    options = {"lr": LR, "alpha": 0.9, "eps": 1e-2}
    yield run("RMSprop: epsilon outside the root", "RMSprop", options, optax.rmsprop(LR, eps=1e-2))
    outside = optax.rmsprop(LR, eps=1e-2, eps_in_sqrt=False)
    yield run("RMSprop: the same from optax, `eps_in_sqrt=False`", "RMSprop", options, outside, optax_agrees=True)

    yield rmsprop_momentum()

    yield default("Adagrad: the sum starts at 0", "Adagrad", "initial_accumulator_value", optax.adagrad)
    yield default("Adagrad: epsilon", "Adagrad", "eps", optax.adagrad)
    yield run("Adagrad: epsilon outside the root", "Adagrad", {"lr": LR, "eps": 1e-2}, optax.adagrad(LR, 0, eps=1e-2))
    yield default("Adagrad: the learning rate decays", "Adagrad", "lr_decay", optax.adagrad)

    options = {"lr": LR, "betas": (0.9, 0.5), "amsgrad": True}
    for flag in (True, False):
        amsgrad = optax.amsgrad(LR, b2=0.5, bias_correction_nu=flag)
        statement = "AMSGrad: maximum of the raw moment, corrected"
        yield run(f"{statement}; optax, `bias_correction_nu={flag}`", "Adam", options, amsgrad)

    yield run("Rprop: optax gives the step before", "Rprop", {"lr": LR}, optax.rprop(LR), grads=GRADS[:1])
    yield run("NAdam: the momentum has a schedule", "NAdam", {"lr": LR}, optax.nadam(LR), grads=GRADS[:1])
    yield run("RAdam: epsilon before bias correction", "RAdam", {"lr": LR, "eps": 1e-2}, optax.radam(LR, eps=1e-2))
    yield radam_threshold()
    yield from adafactor()
    yield from muon()

    yield default("SGD: no dampening in optax", "SGD", "dampening", optax.sgd)
    for name in ("ASGD", "SparseAdam"):

        def has(package: Any, name: str = name) -> str:
            names = (*dir(package), *dir(getattr(package, "contrib", None)))
            return "yes" if name.lower() in (n.replace("_", "").lower() for n in names) else "no"

        yield Row(f"{name}: not in optax", "has it", has(torch.optim), has(optax), has(optim))


def rmsprop_momentum() -> Row:
    """Two steps with momentum; the second with a tenth of the learning rate."""

    def run(library: Library) -> np.ndarray:
        param = library.parameter(library.array(START))
        optimizer = library.optim.RMSprop([param], lr=LR, alpha=0.9, momentum=0.9)
        for lr, grad in zip((LR, LR / 10), GRADS, strict=False):
            optimizer.param_groups[0]["lr"] = lr
            param.grad = library.array(grad)
            optimizer.step()
        return np.asarray(param.detach() if library is TORCH else param)

    decaying = optax.exponential_decay(LR, 1, 0.1)
    theirs = optax_steps(optax.rmsprop(decaying, momentum=0.9, eps_in_sqrt=False), START, GRADS[:2])
    return Row(
        "RMSprop: the rate multiplies the buffer", "θ after 2 steps, rate falling", run(TORCH), theirs, run(OURS)
    )


def radam_threshold() -> Row:
    """Under a constant gradient, without epsilon, each step is as long as the learning rate until it is rectified."""

    def first_rectified(run: Callable[[Any], np.ndarray]) -> int:
        path = np.array([run(np.ones((count, 1))) for count in range(9)]).ravel()
        return int(np.argmax(np.abs(np.diff(path)) < 0.99 * LR)) + 1

    options = {"lr": LR, "eps": 0.0}
    return Row(
        "RAdam: rectified above 5, not from 5 on",
        "first rectified step",
        first_rectified(lambda grads: steps(TORCH, "RAdam", options, [1.0], grads)),
        first_rectified(lambda grads: optax_steps(optax.radam(LR, eps=0.0), [1.0], grads)),
        first_rectified(lambda grads: steps(OURS, "RAdam", options, [1.0], grads)),
    )


def adafactor() -> Iterator[Row]:
    decay = optax.adafactor(LR, weight_decay_rate=0.5)
    still: Any = {"start": np.ones((4, 4)), "grads": np.zeros((1, 4, 4))}
    options = {"lr": LR, "weight_decay": 0.5}
    yield run("Adafactor: decay is scaled by the learning rate", "Adafactor", options, decay, **still)

    def size(library: Library) -> int:
        param = library.parameter(library.array(np.ones((3, 4))))
        optimizer = library.optim.Adafactor([param])
        param.grad = library.array(np.ones((3, 4)))
        optimizer.step()
        return sum(math.prod(value.shape) for name, value in optimizer.state[param].items() if name != "step")

    theirs = optax.adafactor(LR).init(jnp.ones((3, 4)))
    optaxs = sum(leaf.size for leaf in jax.tree.leaves(theirs) if leaf.size > 1)  # of size 1: placeholders, the count
    yield Row("Adafactor: every matrix is factored", "numbers kept for 3×4", size(TORCH), optaxs, size(OURS))

    long: Any = {"start": np.ones(1), "grads": np.ones((2, 1))}
    yield run("Adafactor: steps of at most min(lr, 1/√t)", "Adafactor", {"lr": 1.0}, optax.adafactor(1.0), **long)


def muon() -> Iterator[Row]:
    rng = np.random.default_rng(1)
    options = {"lr": 1.0, "weight_decay": 0.0}
    yield run(
        "Muon: Newton–Schulz in bfloat16", "Muon", options, optax.contrib.muon(1.0),
        "share of a step's numbers that are bfloat16",
        lambda step: np.mean(step == np.asarray(step, jnp.bfloat16).astype(float)),
        start=np.zeros((8, 8)), grads=rng.standard_normal((1, 8, 8)),
    )  # fmt: skip
    yield run(
        "Muon: steps scaled by √(rows/columns)", "Muon", options, optax.contrib.muon(1.0),
        "root mean square of a step's singular values, 32×8",
        lambda step: np.linalg.norm(step) / 8**0.5,
        start=np.zeros((32, 8)), grads=rng.standard_normal((1, 32, 8)), tolerance=1e-2,
    )  # fmt: skip
    yield default("Muon: weight decay", "Muon", "weight_decay", optax.contrib.muon)


# --- Schedules and clipping -----------------------------------------------------------------------------------------


def schedules_that_agree() -> Iterator[Row]:
    same: Any = {"optax_agrees": True}
    linear = optax.linear_schedule(LR / 4, LR, 10)
    yield schedule("LinearLR", "LinearLR", {"start_factor": 0.25, "total_iters": 10}, linear, **same)
    staircase = optax.exponential_decay(LR, 5, 0.5, staircase=True)
    yield schedule("StepLR", "StepLR", {"step_size": 5, "gamma": 0.5}, staircase, **same)
    piecewise = optax.piecewise_constant_schedule(LR, {4: 0.1, 9: 0.1})
    yield schedule("MultiStepLR", "MultiStepLR", {"milestones": [4, 9]}, piecewise, **same)
    yield schedule("ExponentialLR", "ExponentialLR", {"gamma": 0.9}, optax.exponential_decay(LR, 1, 0.9), **same)
    polynomial = optax.polynomial_schedule(LR, 0, 2, 10)
    yield schedule("PolynomialLR", "PolynomialLR", {"total_iters": 10, "power": 2.0}, polynomial, **same)


def schedules_that_differ() -> Iterator[Row]:
    onecycle = optax.cosine_onecycle_schedule(EPOCHS, LR)
    peak: Any = ("epoch of the peak", lambda rates: int(np.argmax(rates)))
    options = {"max_lr": LR, "total_steps": EPOCHS}
    yield schedule("OneCycleLR: peaks one epoch earlier", "OneCycleLR", options, onecycle, *peak)
    cosine = optax.cosine_decay_schedule(LR, 9)
    last: Any = ("rate of epoch 18", lambda rates: rates[18])
    yield schedule("CosineAnnealingLR: rises again past `T_max` = 9", "CosineAnnealingLR", {"T_max": 9}, cosine, *last)
    cosine = optax.cosine_decay_schedule(LR, 18, alpha=0.01)
    options = {"T_max": 18, "eta_min": 0.01}
    yield schedule("CosineAnnealingLR: `eta_min` is absolute", "CosineAnnealingLR", options, cosine, *last)

    def bad_epochs(rates: np.ndarray) -> int:
        return int(np.argmax(rates < LR)) - 1  # the first epoch is the best

    transform = optax.contrib.reduce_on_plateau(patience=2)
    state: Any = transform.init(START)
    optaxs = [LR]
    for _ in range(EPOCHS - 1):
        state = transform.update(START, state, value=1.0)[1]
        optaxs.append(LR * float(state.scale))
    name, options = "ReduceLROnPlateau", {"patience": 2}
    theirs = bad_epochs(rates(TORCH, name, options, 1.0))
    ours = bad_epochs(rates(OURS, name, options, 1.0))
    statement = "ReduceLROnPlateau: cuts after `patience` + 1 bad epochs"
    yield Row(statement, "bad epochs, `patience` = 2", theirs, bad_epochs(np.array(optaxs)), ours)


def clipping() -> Iterator[Row]:
    tensor = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    tensor.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    torch.nn.utils.clip_grad_norm_([tensor], 1.0)
    grads = jnp.array([3.0, 4.0])
    theirs = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())[0]
    ours = optim.clip_grad_norm(grads, 1.0)[0]
    yield Row("Clipping: divides by the norm + 1e-6", "3 of [3, 4] clipped to 1", tensor.grad.numpy(), theirs, ours)


# --- float32 --------------------------------------------------------------------------------------------------------


def float32() -> Iterator[Row]:
    rng = np.random.default_rng(2)
    shape = (1000, 64)
    grads = rng.standard_normal(shape) * np.exp(2 * rng.standard_normal(shape))
    start = rng.standard_normal(64)
    exact = steps(TORCH, "Adam", {}, start, grads)
    start32, grads32 = start.astype(np.float32), grads.astype(np.float32)
    with jax.enable_x64(False):
        yield run(
            "Adam in float32: errors within 1.5 times PyTorch's", "Adam", {}, optax.adam(1e-3),
            "largest error after 1000 steps", lambda param: np.max(np.abs(param - exact)),
            start=start32, grads=grads32, optax_agrees=True, tolerance=0.5,
        )  # fmt: skip
        step = jnp.int32(1)
        optaxs = 1 / optax.tree.bias_correction(jnp.ones(()), 0.999, step)
        factors = (1 - 0.999**1, optaxs, bias_correction(0.999, step))
        yield Row("1 - β^t in float32 keeps its digits", "β = 0.999, t = 1", *factors, tolerance=1e-6)


# --- PyTorch's faults -----------------------------------------------------------------------------------------------


def faults() -> Iterator[Row]:
    apart: Any = {"ours_agrees": False}
    half = np.float16
    yield run(
        "Adam, float16, gradient 0", "Adam", {}, optax.adam(1e-3), "θ, from 1",
        lambda param: str(param[0]), start=np.ones(1, half), grads=np.zeros((1, 1), half), optax_agrees=True, **apart,
    )  # fmt: skip

    def both(statement: str, measured: str, script: Callable[[Library], Any]) -> Row:
        return Row(statement, measured, script(TORCH), None, script(OURS), **apart)

    yield both("Names in a state dict are ignored", "buffer of `a`, saved as 1, loaded in the other order", by_name)
    yield both("State is cast to the parameter's dtype", "float32 loaded for bfloat16", loaded_dtype)
    yield both("A scheduler built after loading resets the rate", "rate, saved as 0.001", resumed_rate)
    yield both("A group added mid-run: LambdaLR", "its next step", lambda library: group_added(library, "LambdaLR"))
    name = "CosineAnnealingWarmRestarts"
    yield both(f"A group added mid-run: {name}", "its next step", lambda library: group_added(library, name))
    yield both("ReduceLROnPlateau in SequentialLR", "making it", plateau_in_sequence)


def by_name(library: Library) -> float:
    def make(names: str) -> tuple[dict[str, Any], Any]:
        params = {name: library.parameter(library.array(np.ones(1))) for name in names}
        return params, library.optim.SGD(list(params.items()), momentum=0.9)

    params, optimizer = make("ab")
    params["a"].grad, params["b"].grad = library.array(np.array([1.0])), library.array(np.array([2.0]))
    optimizer.step()
    others, other = make("ba")
    other.load_state_dict(optimizer.state_dict())
    return float(other.state[others["a"]]["momentum_buffer"][0])


def loaded_dtype(library: Library) -> str:
    param = library.parameter(library.array(np.ones(1, np.float32)))
    optimizer = library.optim.SGD([param], momentum=0.9)
    param.grad = library.array(np.ones(1, np.float32))
    optimizer.step()
    narrow = torch.ones(1, dtype=torch.bfloat16) if library is TORCH else jnp.ones(1, jnp.bfloat16)
    param = library.parameter(narrow)
    other = library.optim.SGD([param], momentum=0.9)
    other.load_state_dict(optimizer.state_dict())
    return str(other.state[param]["momentum_buffer"].dtype).removeprefix("torch.")


def resumed_rate(library: Library) -> float:
    def make() -> Any:
        return library.optim.SGD([library.parameter(library.array(np.ones(1)))], lr=0.1)

    def tenth(epoch: int) -> float:
        return 0.1**epoch

    optimizer = make()
    scheduler = library.optim.lr_scheduler.LambdaLR(optimizer, tenth)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    other = make()
    other.load_state_dict(optimizer.state_dict())
    library.optim.lr_scheduler.LambdaLR(other, tenth).load_state_dict(scheduler.state_dict())
    return other.param_groups[0]["lr"]


def group_added(library: Library, name: str) -> str:
    argument = {"LambdaLR": lambda epoch: 1.0, "CosineAnnealingWarmRestarts": 5}[name]
    optimizer = library.optim.SGD([library.parameter(library.array(np.ones(1)))], lr=0.1)
    scheduler = getattr(library.optim.lr_scheduler, name)(optimizer, argument)
    optimizer.step()
    optimizer.add_param_group({"params": [library.parameter(library.array(np.ones(1)))]})
    return outcome(scheduler.step)


def plateau_in_sequence(library: Library) -> str:
    optimizer = library.optim.SGD([library.parameter(library.array(np.ones(1)))], lr=0.1)
    schedulers = library.optim.lr_scheduler
    parts = [schedulers.ConstantLR(optimizer), schedulers.ReduceLROnPlateau(optimizer)]
    return outcome(lambda: schedulers.SequentialLR(optimizer, parts, milestones=[2]))


SECTIONS = {
    "Algorithms that agree": algorithms_that_agree,
    "Algorithms that differ": algorithms_that_differ,
    "Schedules that agree": schedules_that_agree,
    "Schedules that differ": schedules_that_differ,
    "Clipping": clipping,
    "float32": float32,
    "PyTorch's faults, not inherited": faults,
}
HEADER = ("", "measured", "PyTorch", "optax", "off", "optimjax", "off", "holds")


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    versions = (f"{package.__name__} {package.__version__}" for package in (torch, optax, jax, optim))
    print(", ".join(versions))
    failed = []
    for title, section in SECTIONS.items():
        print(f"\n## {title}\n\n| {' | '.join(HEADER)} |\n{'| --- ' * len(HEADER)}|")
        for row in section():
            print(row, flush=True)
            if not row.holds():
                failed.append(row.statement)
    print(f"\nDoes not hold: {'; '.join(failed) or 'nothing'}.")


if __name__ == "__main__":
    main()
