"""A parameter keeps its identity, lives as long as its module, computes like an array, and checks what it is given."""

import copy
import gc
import pickle
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optimjax as optim


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(2, 3, rngs=rngs)
        self.second = nnx.Linear(3, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.dropout(self.norm(self.second(self.first(x))))


class Model(nnx.Module):
    """Blocks in a list, an embedding tied to the first layer."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.tied = nnx.Linear(2, 3, rngs=rngs)
        self.tied.kernel = self.blocks[0].first.kernel
        self.scale = nnx.Param(jnp.ones(()))


@pytest.fixture
def model() -> Model:
    return Model()


# --- Parameters of a module -----------------------------------------------------------------------------------------


def test_names_are_dotted_paths_without_statistics_and_random_state(model: Model) -> None:
    names = [name for name, _ in optim.named_parameters(model)]
    block = ["first.bias", "first.kernel", "norm.bias", "norm.scale", "second.bias", "second.kernel"]
    assert names == [f"blocks.{i}.{name}" for i in (0, 1) for name in block] + ["scale", "tied.bias"]
    assert [box.name for box in optim.parameters(model)] == names


def test_the_same_object_each_time(model: Model) -> None:
    boxes = list(optim.parameters(model))
    assert all(a is b for a, b in zip(boxes, optim.parameters(model), strict=True))
    by_name = dict(optim.named_parameters(model))
    assert dict(optim.named_parameters(model.blocks[1].first))["kernel"] is by_name["blocks.1.first.kernel"]
    assert dict(optim.named_parameters(model.tied))["kernel"] is by_name["blocks.0.first.kernel"]
    assert len(set(map(id, boxes))) == len(boxes) == 14
    assert optim.SGD(model).param_groups[0]["params"] == boxes


def test_asked_first_through_a_submodule(model: Model) -> None:
    inner = dict(optim.named_parameters(model.blocks[1]))
    outer = dict(optim.named_parameters(model))
    for name, box in inner.items():
        assert outer[f"blocks.1.{name}"] is box


def test_messages_name_the_whole_path_even_then(model: Model) -> None:
    list(optim.parameters(model.tied))
    optimizer = optim.SGD(model)
    grads = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    grads["tied"]["bias"] = jnp.ones(7)
    with pytest.raises(ValueError, match=r"gradient of 'tied.bias' has shape \(7,\)"):
        optimizer.step(grads)


def test_sets_of_ids_select(model: Model) -> None:
    chosen = set(map(id, optim.parameters(model.blocks[0])))
    inside = [box for box in optim.parameters(model) if id(box) in chosen]
    outside = list(filter(lambda box: id(box) not in chosen, optim.parameters(model)))
    assert (len(inside), len(outside)) == (6, 8)
    optimizer = optim.SGD([{"params": inside, "lr": 0.1}, {"params": outside}], lr=1.0)
    assert [len(group["params"]) for group in optimizer.param_groups] == [6, 8]


def test_a_parameter_keeps_gradient_and_freezing_while_nobody_holds_it(model: Model) -> None:
    for box in optim.parameters(model.blocks[0]):
        box.requires_grad = False
        box.grad = jnp.ones(box.shape)
    del box
    gc.collect()
    frozen = [box for box in optim.parameters(model) if not box.requires_grad]
    assert len(frozen) == 6
    assert all(box.grad is not None for box in frozen)


def test_reading_and_writing_reach_into_the_module(model: Model) -> None:
    box = dict(optim.named_parameters(model))["scale"]
    box.value = jnp.asarray(3.0)
    assert float(model.scale[...]) == 3.0
    model.scale.set_value(jnp.asarray(4.0))
    assert float(box) == 4.0
    nnx.update(model, jax.tree.map(lambda x: x + 1, nnx.state(model, nnx.Param)))
    assert float(box) == 5.0


def test_parameters_die_with_their_module() -> None:
    model = Model()
    boxes = list(optim.parameters(model))
    optimizer = optim.Adam(boxes)
    alive = [weakref.ref(box) for box in boxes]
    del boxes, optimizer
    gc.collect()
    assert all(ref() is not None for ref in alive)
    del model
    gc.collect()
    assert not any(ref() is not None for ref in alive)


def test_parameters_of_many_modules_do_not_pile_up() -> None:
    alive = []
    for _ in range(20):
        model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        alive += [weakref.ref(box) for box in optim.parameters(model)]
    del model
    gc.collect()
    assert sum(ref() is not None for ref in alive) == 0


def test_a_new_variable_in_the_place_of_another_has_a_new_parameter(model: Model) -> None:
    old = dict(optim.named_parameters(model))["scale"]
    old.grad = jnp.asarray(1.0)
    model.scale = nnx.Param(jnp.zeros(()))
    new = dict(optim.named_parameters(model))["scale"]
    assert new is not old
    assert new.grad is None
    assert float(new) == 0.0


def test_integer_parameters_are_left_out() -> None:
    class Table(nnx.Module):
        def __init__(self) -> None:
            self.ids = nnx.Param(jnp.arange(3))
            self.w = nnx.Param(jnp.ones(3))

    assert [name for name, _ in optim.named_parameters(Table())] == ["w"]


def test_a_deep_copied_module_has_parameters_of_its_own(model: Model) -> None:
    first = next(iter(optim.parameters(model)))
    first.grad = jnp.ones(first.shape)
    twin = copy.deepcopy(model)
    other = next(iter(optim.parameters(twin)))
    assert other is not first
    other.value = other.value + 1
    assert not np.array_equal(first.value, other.value)


def test_a_pytree_gives_new_parameters() -> None:
    tree = {"layers": [{"kernel": jnp.ones((2, 2))}, {"kernel": jnp.zeros(2), "ids": jnp.arange(2)}], "act": jnp.tanh}
    named = dict(optim.named_parameters(tree))
    assert list(named) == ["layers.0.kernel", "layers.1.kernel"]
    assert [box.name for box in optim.parameters(tree)] == list(named)
    assert next(optim.parameters(tree)) is not named["layers.0.kernel"]


# --- A parameter is an array ----------------------------------------------------------------------------------------


def test_in_jnp_functions() -> None:
    w = optim.Parameter([[1.0, -2.0], [3.0, 4.0]])
    x = jnp.array([1.0, 2.0])
    assert float(jnp.sum(w)) == 6.0
    np.testing.assert_array_equal(jnp.abs(w), [[1, 2], [3, 4]])
    np.testing.assert_array_equal(jnp.dot(w, x), [-3, 11])
    np.testing.assert_array_equal(jnp.where(jnp.asarray(w) > 0, w, 0), [[1, 0], [3, 4]])
    np.testing.assert_array_equal(jnp.concatenate([jnp.asarray(w), jnp.zeros((1, 2))])[2], [0, 0])
    np.testing.assert_array_equal(jax.nn.relu(w), [[1, 0], [3, 4]])
    np.testing.assert_array_equal(np.asarray(w), [[1, -2], [3, 4]])
    np.testing.assert_array_equal(np.asarray(w, dtype=np.float64), [[1, -2], [3, 4]])
    assert (w.shape, w.ndim, w.size, w.dtype, len(w)) == ((2, 2), 2, 4, jnp.float32, 2)
    np.testing.assert_array_equal(w[0], [1, -2])


def test_operators_on_both_sides() -> None:
    w, x = optim.Parameter([1.0, -2.0]), jnp.array([3.0, 4.0])
    value = w.value
    for ours, plain in [
        (w + x, value + x),
        (x + w, x + value),
        (1 - w, 1 - value),
        (w - 1, value - 1),
        (2 * w, 2 * value),
        (w * w, value * value),
        (w / x, value / x),
        (x / w, x / value),
        (x // w, x // value),
        (w % x, value % x),
        (w**2, value**2),
        (2**w, 2**value),
        (w @ x, value @ x),
        (x @ w, x @ value),
        (np.ones((2, 2), np.float32) @ w, jnp.ones((2, 2)) @ value),
        (np.float32(2) * w, 2 * value),
        (-w, -value),
        (+w, +value),
        (abs(w), abs(value)),
        (w > 0, value > 0),
        (w <= x, value <= x),
    ]:
        assert isinstance(ours, jax.Array)
        np.testing.assert_array_equal(ours, plain)


def test_equality_is_identity() -> None:
    a, b = optim.Parameter(1.0), optim.Parameter(1.0)
    assert a != b
    assert len({a, b, a}) == 2
    assert a in [b, a]


def test_under_jit_grad_and_vmap() -> None:
    w = optim.Parameter([1.0, 2.0], name="w")
    assert float(jax.jit(lambda w, x: jnp.sum(w * x))(w, 3.0)) == 9.0
    assert float(jax.jit(lambda tree: tree["w"] @ tree["w"])({"w": w})) == 5.0
    np.testing.assert_array_equal(jax.grad(lambda w: jnp.sum(w**2))(w).value, [2, 4])
    np.testing.assert_array_equal(jax.vmap(lambda w: 2 * w)(w), [2, 4])
    np.testing.assert_array_equal(w.value, [1, 2])


def test_a_parameter_of_a_module_under_jit_leaves_the_module_alone(model: Model) -> None:
    box = dict(optim.named_parameters(model))["scale"]
    assert float(jax.jit(lambda w: w + 1)(box)) == 2.0
    assert isinstance(model.scale[...], jax.Array)
    assert not isinstance(model.scale[...], jax.core.Tracer)


# --- Checks ---------------------------------------------------------------------------------------------------------


def test_setting_the_value_checks_shape_and_dtype() -> None:
    w = optim.Parameter(jnp.ones(3), name="w")
    w.value = np.zeros(3, np.float32)
    assert isinstance(w.value, jax.Array)
    with pytest.raises(ValueError, match=r"'w' must keep shape \(3,\), got \(\)"):
        w.value = 1.0
    with pytest.raises(ValueError, match=r"got \(1, 3\)"):
        w.value = jnp.ones((1, 3))
    with pytest.raises(TypeError, match="'w' must keep dtype float32, got float16"):
        w.value = jnp.ones(3, jnp.float16)
    np.testing.assert_array_equal(w.value, [0, 0, 0])


def test_setting_the_value_of_a_parameter_of_a_module_checks_too(model: Model) -> None:
    box = dict(optim.named_parameters(model))["scale"]
    with pytest.raises(ValueError, match=r"'scale' must keep shape \(\), got \(2,\)"):
        box.value = jnp.ones(2)
    assert float(model.scale[...]) == 1.0


def test_setting_the_gradient_checks_shape_and_kind() -> None:
    w = optim.Parameter(jnp.ones(3), name="w")
    w.grad = np.ones(3, np.float16)  # another precision does no harm: the step computes in float32 at least
    assert isinstance(w.grad, jax.Array)
    for grad, error, message in [
        (jnp.ones(2), ValueError, r"'w' has shape \(2,\), the parameter has \(3,\)"),
        (1.0, ValueError, r"'w' has shape \(\)"),
        (jnp.ones(3, int), TypeError, "'w' is int32: it must be a floating array"),
        (jnp.ones(3, complex), TypeError, "the parameter is real"),
        ([1.0, 2.0, 3.0], TypeError, "must be an array or None, got list"),
    ]:
        with pytest.raises(error, match=message):
            w.grad = grad
        assert w.grad.shape == (3,)
    w.grad = None
    assert w.grad is None


@pytest.mark.parametrize("value", [3, jnp.arange(3), np.array([True]), "w"])
def test_only_floating_arrays(value: Any) -> None:
    with pytest.raises(TypeError):
        optim.Parameter(value, name="w")


def test_the_users_numpy_array_is_copied() -> None:
    array = np.ones(1024, np.float32)
    w = optim.Parameter(array)
    w.grad = array
    array[:] = 7
    assert float(w[0]) == float(w.grad[0]) == 1.0


def test_complex_gradients_of_complex_parameters() -> None:
    w = optim.Parameter(jnp.ones(2, complex))
    w.grad = jnp.ones(2)
    w.grad = jnp.full(2, 1j)
    optim.SGD([w], lr=1.0).step()
    np.testing.assert_array_equal(w.value, [1 + 1j, 1 + 1j])  # jax.grad's convention


# --- Copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda box: pickle.loads(pickle.dumps(box))])
def test_copies_of_a_parameter(duplicate: Any) -> None:
    w = optim.Parameter([1.0, 2.0], name="w", requires_grad=False)
    w.grad = jnp.ones(2)
    twin = duplicate(w)
    assert (twin.name, twin.requires_grad) == ("w", False)
    np.testing.assert_array_equal(twin.grad, [1, 1])
    twin.value = twin.value + 1
    np.testing.assert_array_equal(w.value, [1, 2])


def test_repr_and_str() -> None:
    assert repr(optim.Parameter(1.0, name="w", requires_grad=False)).startswith("Parameter('w', Array(1.")
    assert repr(optim.Parameter(1.0, name="w", requires_grad=False)).endswith("requires_grad=False)")
    assert str(optim.Parameter(1.0, name="w")) == "w"


def test_in_place_operators_change_the_parameter(model: Model) -> None:
    loose = optim.Parameter(jnp.array([1.0, 2.0]))
    for box in (loose, next(optim.parameters(model))):
        start, same = np.asarray(box), box
        box -= 0.5
        box *= 4.0
        box += box
        box /= np.float32(2)
        before = np.asarray(box)
        box **= 3.0
        box %= 7.0
        box //= 0.5
        assert box is same
        np.testing.assert_allclose(box.value, before**3 % 7 // 0.5)
        box.value = jnp.asarray(before)
        np.testing.assert_allclose(box.value, (start - 0.5) * 4)
        with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError, match="must keep shape"):
            box += np.ones((4, *box.shape))
    assert np.asarray(next(optim.parameters(model))).tolist() == np.asarray(box).tolist()


def test_a_python_number_is_an_array_like_others(compilations: Any) -> None:
    optimizer = optim.SGD({"w": jnp.array(1.0)}, lr=0.1)
    assert not optimizer.param_groups[0]["params"][0].value.weak_type
    loss = lambda params: params["w"] ** 2  # noqa: E731
    optimizer.step(loss)
    before = compilations()
    optimizer.step(loss)
    assert compilations() == before


def test_a_parameter_is_iterated_and_judged_as_its_value() -> None:
    box = optim.Parameter(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    assert [row.tolist() for row in box] == [[1, 2], [3, 4]]
    first, _ = optim.Parameter([5.0, 6.0])
    assert float(first) == 5
    assert 6.0 in optim.Parameter([5.0, 6.0])
    with pytest.raises(TypeError, match="0-d"):
        list(optim.Parameter(1.0))
    assert optim.Parameter(1.0)
    assert not optim.Parameter([0.0])
    with pytest.raises(ValueError, match="ambiguous"):
        bool(box)


@pytest.mark.parametrize("wanted", ["no", None, 1, [False]])
def test_requires_grad_is_true_or_false(wanted: Any) -> None:
    box = optim.Parameter(1.0)
    with pytest.raises(TypeError, match="requires_grad must be True or False"):
        box.requires_grad = wanted
    with pytest.raises(TypeError, match="requires_grad must be True or False"):
        optim.Parameter(1.0, requires_grad=wanted)
    with pytest.raises(TypeError, match=r"'requires_grad' of rules\[0\] must be True or False"):
        optim.group_parameters({"w": jnp.ones(2)}, [{"params": "w", "requires_grad": wanted}])
    assert box.requires_grad is True
