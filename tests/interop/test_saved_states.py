"""States of pure functions come back from a file as what they were; other classes come back by ``like``."""

import os
from collections import namedtuple
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, Case
from flax import nnx, struct
from flax.core import FrozenDict
from jax.experimental.sparse import BCOO
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optimjax as optim
from optimjax import functional as F
from optimjax import schedules
from optimjax._core.states import named_state, state_class

pytestmark = pytest.mark.usefixtures("folder")

PARAMS = {
    "base": {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([[0.1, 0.2]], "bfloat16")},
    "head": jnp.array([[1.0]]),
}
LABELS = {"base": {"kernel": "muon", "bias": "adamw"}, "head": "adamw"}
Pair = namedtuple("Pair", "first second")


def grads_of(params: Any) -> Any:
    return jax.tree.map(jnp.cos, params)


def saved_and_loaded(tree: Any, **options: Any) -> Any:
    optim.save("a.safetensors", tree)
    return optim.load("a.safetensors", **options)


def identical(a: Any, b: Any) -> None:
    """The same classes all the way down, and the same bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), (_, y) in zip(*map(jax.tree_util.tree_leaves_with_path, (a, b)), strict=True):
        assert (np.shape(x), np.asarray(x).dtype) == (np.shape(y), np.asarray(y).dtype), path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("like", [False, True], ids=["as_saved", "like"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_algorithm_continues_as_if_it_had_never_stopped(case: Case, like: bool, compiled: bool) -> None:
    algorithm = case.factory(**case.variants()[1])
    params = dict(zip("abc", case.fit(jax.tree.leaves(PARAMS)), strict=True))
    update = jax.jit(algorithm.update) if compiled else algorithm.update
    start = {"params": params, "state": algorithm.init(params)}
    state = start["state"]
    for _ in range(2):
        params, state = update(params, grads_of(params), state)
    saved = {"params": params, "state": state}
    loaded = saved_and_loaded(saved, like=start if like else None)
    identical(loaded, saved)
    assert all(isinstance(leaf, jax.Array if like else np.ndarray) for leaf in jax.tree.leaves(loaded))
    for _ in range(2):
        params, state = update(params, grads_of(params), state)
        loaded["params"], loaded["state"] = update(loaded["params"], grads_of(loaded["params"]), loaded["state"])
    identical(loaded, {"params": params, "state": state})


def test_states_of_all_other_pure_functions() -> None:
    both = F.partition({"muon": F.muon(lr=0.02), "adamw": F.adamw()}, LABELS)
    lbfgs = F.lbfgs(lr=0.1, max_iter=2, history_size=3, line_search_fn="strong_wolfe")
    ema, plateau = F.ema(0.9), schedules.reduce_on_plateau(0.1, patience=0)
    loss = lambda params: sum(jnp.sum((x.astype(float) - 1) ** 4) for x in jax.tree.leaves(params))  # noqa: E731

    def go_on(run: Any) -> Any:
        params, mixed = both.update(run["params"], grads_of(run["params"]), run["both"])
        params, searched = lbfgs.update(params, None, run["nested"][0]["lbfgs"], loss_fn=loss)
        value, metric = plateau.update(loss(params), run["plateau"])
        nested = ({"lbfgs": searched, "ema": ema.update(params, run["nested"][0]["ema"])}, [metric])
        return {"params": params, "both": mixed, "nested": nested, "plateau": metric, "value": value}

    nested = ({"lbfgs": lbfgs.init(PARAMS), "ema": ema.init(PARAMS)}, [plateau.init()])
    run = {"params": PARAMS, "both": both.init(PARAMS), "nested": nested, "plateau": plateau.init()}
    for _ in range(2):
        run = go_on(run)
    loaded = saved_and_loaded(run)
    identical(loaded, run)
    identical(go_on(loaded), go_on(run))


def test_the_state_of_an_algorithm_that_is_not_imported_yet() -> None:
    """Its class is made from the file; the algorithm then has the same one."""
    named = named_state("ReadFirstState", ("step", "exp_avg"))
    assert named is state_class("ReadFirst", ("exp_avg",))
    identical(saved_and_loaded(named(1, PARAMS)), named(1, PARAMS))
    with pytest.raises(ValueError, match=r"no state ReadFirst\('step',\)"):
        named_state("ReadFirst", ("step",))


TRANSFORMATIONS = {
    "adamw": lambda: optax.adamw(optax.cosine_decay_schedule(0.1, 10)),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9, nesterov=True), optax.scale(-0.1)),
    "every": lambda: optax.MultiSteps(optax.adam(0.1), 2),
    "masked": lambda: optax.masked(optax.adam(0.1), {"base": {"kernel": True, "bias": False}, "head": True}),
    "partition": lambda: optax.partition({"muon": optax.sgd(0.1, 0.9), "adamw": optax.adam(0.1)}, LABELS),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=0.1),
    "skipping": lambda: optax.apply_if_finite(optax.adam(0.1), 3),
    "lbfgs": lambda: optax.scale_by_lbfgs(3),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_the_states_of_optax_by_a_template(name: str) -> None:
    with jax.numpy_dtype_promotion("standard"):
        check_the_state_of(TRANSFORMATIONS[name]())


def check_the_state_of(tx: Any) -> None:
    @jax.jit
    def update(params: Any, state: Any) -> Any:
        updates, state = tx.update(grads_of(params), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(lambda x: x.astype("float32"), PARAMS)  # in bfloat16, its states change their dtypes
    run = start = params, tx.init(params)
    for _ in range(3):
        run = update(*run)
    loaded = saved_and_loaded(run, like=start)
    identical(loaded, run)
    assert jax.tree.map(jax.typeof, loaded) == jax.tree.map(jax.typeof, run)  # weak types, too
    identical(update(*loaded), update(*run))


def test_without_a_template_other_classes_become_plain() -> None:
    model = eqx.nn.Linear(1, 1, use_bias=False, key=jax.random.key(0))
    loaded = saved_and_loaded({"pair": Pair(1, (np.ones(2),)), "model": model})
    assert type(loaded["pair"]) is tuple
    np.testing.assert_array_equal(loaded["pair"][1][0], [1, 1])
    assert loaded["model"].keys() == {"weight", "bias"}
    assert loaded["model"]["bias"] is None


class Run(struct.PyTreeNode):
    """A training state as scripts of Linen have it."""

    step: int
    params: Any
    opt_state: Any
    apply_fn: Any = struct.field(pytree_node=False)


def test_trees_of_all_kinds_come_back_by_a_template() -> None:
    adam, net = F.adam(), nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    mlp = eqx.nn.MLP(1, 1, 4, 1, key=jax.random.key(0))
    arrays = eqx.filter(mlp, eqx.is_array)
    keys = jax.random.split(jax.random.key(1, impl="rbg"))
    tree = {
        "run": Run(3, FrozenDict(PARAMS), adam.init(FrozenDict(PARAMS)), len),
        "nnx": nnx.state(net),
        "equinox": arrays,
        "sparse": BCOO.fromdense(jnp.eye(2)),
        "parameter": optim.Parameter([1.0, 2.0], name="w"),
        "pair": Pair(None, [np.ones(2), np.float32(3)]),
        "key": keys,
        "keys": {("t", 1): {0: jnp.ones(1), 1: "text"}, ("a.b", 0): {"a.b": {}}},
    }
    like = jax.tree.map(lambda x: x, tree)
    loaded = saved_and_loaded(tree, like=like)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(tree), strict=True):
        assert type(ours) is type(theirs)
        if isinstance(ours, jax.Array) and jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)
        np.testing.assert_array_equal(ours, theirs)
    assert loaded["run"].apply_fn is len
    np.testing.assert_array_equal(loaded["parameter"].value, [1, 2])
    nnx.update(net, loaded["nnx"])
    mlp_again = eqx.combine(loaded["equinox"], mlp)
    np.testing.assert_array_equal(mlp_again(jnp.ones(1)), mlp(jnp.ones(1)))


def test_what_is_not_an_array_in_a_class_is_named() -> None:
    mlp, net = eqx.nn.MLP(1, 1, 4, 1, key=jax.random.key(0)), nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"cannot save 'mlp\.activation.*', a "):
        optim.save("a.safetensors", {"mlp": mlp})
    with pytest.raises(TypeError, match=r"cannot save 'net\.0', a Linear: save nnx\.state\(\.\.\.\) of it"):
        optim.save("a.safetensors", {"net": [net]})
    assert not os.listdir()


def test_a_weak_number_stays_weak() -> None:
    """Otherwise it would make the next update of bfloat16 parameters one of float32."""
    state = {"rate": jnp.asarray(0.1), "count": jnp.asarray(3, "int32")}
    loaded = saved_and_loaded(state, like=state)
    assert {name: jax.typeof(x) for name, x in loaded.items()} == {name: jax.typeof(x) for name, x in state.items()}
    assert loaded["rate"].weak_type
    assert (loaded["rate"] * jnp.ones(2, "bfloat16")).dtype == "bfloat16"


def test_a_part_as_it_was_saved() -> None:
    adam = F.adam()
    state = adam.init(PARAMS)
    saved = {"state": state, "history": [0.1, 0.2], "none": {}, "tuple": (1,)}
    loaded = saved_and_loaded(saved, like={"state": state, "history": ..., "none": ..., "tuple": ...})
    identical(loaded, saved)
    with pytest.raises(ValueError, match=r"missing \['more'\], unexpected \['history.0', 'history.1'\]"):
        optim.load("a.safetensors", like={"state": state, "more": ..., "none": {}, "tuple": (0,)})


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"x": jnp.ones(3), "n": 0}, r"'x' was saved as float32\[2\], and like has float32\[3\]"),
        ({"x": jnp.ones(2, "bfloat16"), "n": 0}, r"'x' was saved as float32\[2\], and like has bfloat16\[2\]"),
        ({"x": np.ones(2), "n": 0}, r"'x' was saved as float32\[2\], and like has float64\[2\]"),
        ({"x": jnp.ones(2), "n": jnp.ones(2)}, r"'n' was saved as 3, and like has float32\[2\]"),
        ({"x": {"y": 0}, "n": 0}, r"missing \['x.y'\], unexpected \['x'\]"),
        ({"n": 0}, r"does not have the structure of like: missing \[\], unexpected \['x'\]"),
    ],
    ids=["shape", "narrower", "wider", "number", "deeper", "less"],
)
def test_a_template_that_does_not_fit(like: Any, message: str) -> None:
    optim.save("a.safetensors", {"x": jnp.ones(2), "n": 3})
    with pytest.raises(ValueError, match=message):
        optim.load("a.safetensors", like=like)


def test_arrays_that_jax_would_narrow_are_refused() -> None:
    optim.save("a.safetensors", {"x": np.ones(2)})
    with pytest.raises(ValueError, match=r"'x' was saved as float64\[2\], which JAX has with jax_enable_x64 only"):
        optim.load("a.safetensors", like={"x": jax.ShapeDtypeStruct((2,), np.dtype("float64"))})


def test_another_sharding_and_memory() -> None:
    devices = np.array(jax.devices())
    rows, columns = (NamedSharding(Mesh(devices.reshape(shape), ("a", "b")), P("a", "b")) for shape in [(8, 1), (2, 4)])
    params = {"w": jax.device_put(jnp.arange(128.0).reshape(16, 8), rows)}
    adam = F.adam()
    params, state = adam.update(params, params, adam.init(params))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=columns if x.ndim else None), state)
    loaded = saved_and_loaded(state, like=like)
    identical(loaded, state)
    assert loaded.exp_avg["w"].sharding == columns
    host = columns.with_memory_kind("pinned_host")
    assert (
        optim.load("a.safetensors", like=state._replace(exp_avg={"w": jax.device_put(params["w"], host)}))
        .exp_avg["w"]
        .sharding
        == host
    )
    # Where nobody has placed an array, it is not placed either; one that was given away still says where it was.
    second = jax.device_put(jnp.ones(2), jax.devices()[1])
    like = {"free": jnp.ones(2), "second": second}
    optim.save("b.safetensors", like)
    second.delete()
    loaded = optim.load("b.safetensors", like=like)
    assert not loaded["free"].committed
    assert loaded["second"].devices() == {jax.devices()[1]}
