"""muon_groups gives Muon the weight matrices of a model, along the axes that its layers compute with, and no more."""

import copy
import itertools
import math
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import optimjax as optim
from optimjax.algorithms.parts.matrices import Layout

LINEAR = ((-1,), (-2,))
INTO_HEADS = ((-2, -1), (-3,))
OUT_OF_HEADS = ((-1,), (-3, -2))
IMAGES = ((-1,), (-4, -3, -2))


class Block(nnx.Module):
    def __init__(self, rngs: Any):
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.down = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


def stacked(make: Any, layers: int = 3, axis: int = 0) -> Any:
    keys = jax.random.split(jax.random.key(0), layers)
    return nnx.vmap(lambda key: make(nnx.Rngs(key)), out_axes=axis)(keys)


class Transformer(nnx.Module):
    """A bit of everything."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.stem = nnx.Conv(1, 4, (2, 2), strides=2, rngs=rngs)
        self.embed = nnx.Embed(16, 4, rngs=rngs)
        self.position = nnx.Param(jnp.zeros((5, 4)))
        self.first = Block(rngs)
        self.stack = stacked(Block)
        self.adapter = nnx.LoRALinear(4, 4, lora_rank=2, rngs=rngs)
        self.experts = nnx.Einsum("bed,edf->bef", (2, 4, 4), (2, 4), rngs=rngs)
        self.mixer = nnx.LinearGeneral((5, 4), (5, 4), axis=(-2, -1), rngs=rngs)
        self.norm = nnx.RMSNorm(4, rngs=rngs)
        self.router = nnx.Linear(4, 2, rngs=rngs)
        self.head = nnx.Linear(4, 16, rngs=rngs)


EXPECTED = {
    IMAGES: ["stem.kernel"],
    LINEAR: [
        "adapter.kernel",
        "adapter.lora.lora_a",
        "adapter.lora.lora_b",
        "experts.kernel",
        *(f"{block}.{layer}.kernel" for block in ("first", "stack") for layer in ("up", "down")),
    ],
    INTO_HEADS: [
        f"{block}.attention.{layer}.kernel" for block in ("first", "stack") for layer in ("query", "key", "value")
    ],
    OUT_OF_HEADS: [f"{block}.attention.out.kernel" for block in ("first", "stack")],
    ((-2, -1), (-4, -3)): ["mixer.kernel"],
}


def names(params: Any) -> list[str]:
    return [name for name, _ in params]


def shown(groups: Any) -> dict[Any, list[str]]:
    """The names in each group by its axes, ``None`` for the last."""
    return {group.get("matrix_axes"): sorted(names(group["params"])) for group in groups}


def for_muon(groups: Any) -> list[dict[str, Any]]:
    """The groups of matrices, as Muon alone takes them."""
    return [
        {key: value for key, value in group.items() if key != "algorithm"} for group in groups if "algorithm" in group
    ]


def check_a_step_of_muon(groups: Any) -> None:
    """Muon takes the groups, and moves each matrix to one with singular values near the learning rate."""
    optimizer = optim.Muon(for_muon(groups), lr=0.1, weight_decay=0.0)
    before = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = jnp.asarray(np.random.default_rng(0).normal(size=parameter.shape), parameter.dtype)
            before[parameter] = np.array(parameter)
    optimizer.step()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            layout = Layout(parameter.shape, group["matrix_axes"], group["blocks"])
            for matrices in layout.matrices(jnp.asarray(before[parameter] - np.array(parameter))):
                rate = group["lr"] * math.sqrt(max(1, matrices.shape[-2] / matrices.shape[-1]))
                moved = np.linalg.svd(matrices)[1]
                assert np.all(moved < 1.3 * rate), parameter.name
                assert np.all(moved.max(-1) > 0.6 * rate), parameter.name


# --- the axes are those that the layers compute with ------------------------------------------------------------------


def group_of(layer: Any, name: str = "kernel") -> dict[str, Any]:
    """The group that a parameter is in."""
    found = [
        group
        for group in optim.muon_groups([layer, nnx.Linear(1, 1, rngs=nnx.Rngs(0))])
        if f"0.{name}" in names(group["params"])
    ]
    assert len(found) == 1
    return found[0]


def axes_in(layer: Any, name: str = "kernel") -> Any:
    """The axes of a parameter, ``None`` if it is not among the matrices."""
    return group_of(layer, name).get("matrix_axes")


def matrices_in(layer: Any, name: str = "kernel") -> Any:
    kernel = layer
    for key in name.split("."):
        kernel = getattr(kernel, key)
    group = group_of(layer, name)
    layout = Layout(kernel.get_value().shape, group["matrix_axes"], group.get("blocks"))
    (matrices,) = layout.matrices(kernel.get_value())
    return matrices


def linear_map(layer: Any, x_shape: tuple[int, ...], batch: int = 0) -> np.ndarray:
    """What a layer without a bias does to one position, by differentiating it: shape (batch, out, in).

    The first ``batch`` axes of input and output belong together: what is between different elements must be zero.
    """
    x = jnp.zeros(x_shape)
    y_shape = jax.eval_shape(layer, x).shape
    assert y_shape[:batch] == x_shape[:batch]
    count = math.prod(x_shape[:batch])
    jacobian = np.array(jax.jacobian(layer)(x)).reshape(count, math.prod(y_shape[batch:]), count, -1)
    blocks = np.stack([jacobian[index, :, index] for index in range(count)])
    for index in range(count):
        jacobian[index, :, index] = 0
    assert not jacobian.any()
    return blocks if batch else blocks[0]


RNGS = nnx.Rngs(0)
PLAIN: dict[str, Any] = {"use_bias": False, "rngs": RNGS}

# A layer, the shape of one position of its input, and the number of axes along which it has a matrix for each element.
LAYERS: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "Linear": (nnx.Linear(3, 5, **PLAIN), (3,), 0),
    "LinearGeneral": (nnx.LinearGeneral(3, 5, **PLAIN), (3,), 0),
    "LinearGeneral of two axes": (nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), **PLAIN), (2, 3), 0),
    "LinearGeneral of other axes": (nnx.LinearGeneral((2, 3), 4, axis=(0, 2), **PLAIN), (2, 1, 3), 0),
    "LinearGeneral with a batch": (nnx.LinearGeneral(3, (4, 5), batch_axis={0: 2}, **PLAIN), (2, 3), 1),
    "query": (nnx.MultiHeadAttention(2, 6, **PLAIN).query, (6,), 0),
    "out": (nnx.MultiHeadAttention(2, 6, **PLAIN).out, (2, 3), 0),
    "Einsum": (nnx.Einsum("td,dnh->tnh", (3, 2, 4), rngs=RNGS), (1, 3), 0),
    "Einsum out of heads": (nnx.Einsum("...nh,nhd->...d", (2, 4, 3), rngs=RNGS), (2, 4), 0),
    "Einsum, output first": (nnx.Einsum("t i, o i -> t o", (5, 3), rngs=RNGS), (1, 3), 0),
    "Einsum, scattered": (nnx.Einsum("ac,xaycz->xyz", (2, 3, 4, 5, 6), rngs=RNGS), (3, 5), 0),
    "Einsum of experts": (nnx.Einsum("ed,edf->ef", (2, 3, 4), rngs=RNGS), (2, 3), 1),
    "Einsum of experts, in the middle": (nnx.Einsum("ed,dfe->ef", (3, 4, 2), rngs=RNGS), (2, 3), 1),
    "Conv": (nnx.Conv(3, 5, 4, padding="VALID", **PLAIN), (1, 4, 3), 0),
    "Conv of images": (nnx.Conv(3, 5, (2, 4), padding="VALID", **PLAIN), (1, 2, 4, 3), 0),
    "ConvTranspose, its kernel transposed": (
        nnx.ConvTranspose(3, 5, (2, 4), padding="VALID", transpose_kernel=True, **PLAIN),
        (1, 1, 1, 3),
        0,
    ),
}


@pytest.mark.parametrize(("layer", "x_shape", "batch"), LAYERS.values(), ids=LAYERS)
def test_the_matrices_are_what_the_layer_multiplies_by(layer: Any, x_shape: Any, batch: int) -> None:
    np.testing.assert_allclose(matrices_in(layer), linear_map(layer, x_shape, batch), rtol=1e-6)


def test_the_matrix_of_a_transposed_convolution() -> None:
    """Its kernel is turned round: the rows are those of the linear map in another order."""
    layer = nnx.ConvTranspose(3, 5, (2, 4), padding="VALID", **PLAIN)
    wanted = linear_map(layer, (1, 1, 1, 3)).reshape(2, 4, 5, 3)[::-1, ::-1].reshape(40, 3)
    np.testing.assert_allclose(matrices_in(layer), wanted, rtol=1e-6)


def test_each_factor_of_lora_is_a_matrix() -> None:
    lora = nnx.LoRA(3, 2, 5, b_initializer=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    product = matrices_in(lora, "lora_b") @ matrices_in(lora, "lora_a")
    np.testing.assert_allclose(product, linear_map(lora, (3,)), rtol=1e-5)
    assert matrices_in(lora, "lora_a").shape == (2, 3)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize(("layer", "x_shape"), [("Linear", (4,)), ("heads", (2, 3)), ("Conv", (1, 2, 5))])
def test_stacked_layers_have_a_matrix_each_wherever_they_are_stacked(layer: str, x_shape: Any, axis: int) -> None:
    makers: dict[str, Any] = {
        "Linear": lambda rngs: nnx.Linear(4, 5, use_bias=False, rngs=rngs),
        "heads": lambda rngs: nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), use_bias=False, rngs=rngs),
        "Conv": lambda rngs: nnx.Conv(5, 4, 2, padding="VALID", use_bias=False, rngs=rngs),
    }
    layers = stacked(makers[layer], 7, axis)
    graphdef, state = nnx.split(layers)

    def each(x: Any) -> Any:
        return jax.vmap(lambda state, x: nnx.merge(graphdef, state)(x), in_axes=(axis, 0))(state, x)

    np.testing.assert_allclose(matrices_in(layers), linear_map(each, (7, *x_shape), 1), rtol=1e-6)


def test_layers_stacked_twice() -> None:
    keys = jax.random.split(jax.random.key(0), (2, 3))
    layers = nnx.vmap(nnx.vmap(lambda key: nnx.Linear(4, 5, rngs=nnx.Rngs(key))))(keys)
    assert matrices_in(layers).shape == (2, 3, 5, 4)
    assert axes_in(layers) == LINEAR
    assert layers.bias.get_value().shape == (2, 3, 5)
    assert axes_in(layers, "bias") is None


# --- what is a matrix and what is not ---------------------------------------------------------------------------------


def test_a_transformer() -> None:
    model = Transformer()
    groups = optim.muon_groups(model, exclude=["head.*", "router.*"], lr=0.02, momentum=0.9)
    found = shown(groups)
    rest = found.pop(None)
    assert found == {axes: sorted(members) for axes, members in EXPECTED.items()}
    assert {"position", "embed.embedding", "head.kernel", "router.kernel", "norm.scale"} < set(rest)
    assert {"stack.norm.scale", "stack.up.bias", "stack.attention.query.bias", "experts.bias"} < set(rest)
    assert sorted([*itertools.chain(*found.values()), *rest]) == sorted(names(optim.named_parameters(model)))
    for group in groups[:-1]:
        assert (group["algorithm"], group["lr"], group["momentum"]) == ("Muon", 0.02, 0.9)
    assert groups[-1].keys() == {"params"}
    assert groups[-1]["params"][0] in list(optim.named_parameters(model))  # the same objects
    check_a_step_of_muon(groups)


def test_the_optimizer_has_the_whole_module() -> None:
    model = nnx.Sequential(nnx.Linear(3, 4, use_bias=False, rngs=RNGS), nnx.Linear(4, 3, use_bias=False, rngs=RNGS))
    groups = optim.muon_groups(model)
    assert len(groups) == 1  # there is no rest
    del groups[0]["algorithm"]
    optimizer = optim.Muon(groups, lr=0.1)
    assert optimizer.params is model
    before = np.array(model.layers[0].kernel)
    optimizer.step(lambda model, x: jnp.mean((model(x) - 1) ** 2), jnp.ones((2, 3)))
    assert not np.allclose(before, model.layers[0].kernel)


def test_modules_in_lists_and_dicts() -> None:
    parts = {"embed": nnx.Embed(3, 4, rngs=RNGS), "layers": [nnx.Linear(4, 4, rngs=RNGS) for _ in range(2)]}
    groups = optim.muon_groups(parts, exclude=["layers.1.*"])
    assert shown(groups) == {
        LINEAR: ["layers.0.kernel"],
        None: ["embed.embedding", "layers.0.bias", "layers.1.bias", "layers.1.kernel"],
    }
    assert groups.source.view() is parts


class Own(nnx.Module):
    def __init__(self, **variables: Any):
        for key, value in variables.items():
            setattr(self, key, nnx.data(value))


class Wider(nnx.Linear):
    def __init__(self, rngs: Any):
        super().__init__(3, 4, rngs=rngs)
        self.scale = nnx.Param(jnp.ones((3, 4)))


def cell(kind: Any) -> Any:
    return nnx.RNN(kind(3, 4, rngs=nnx.Rngs(0)))


def test_subclasses_count_as_their_base_by_its_kernel_alone() -> None:
    layer = Wider(RNGS)
    assert axes_in(layer) == LINEAR
    assert axes_in(layer, "scale") is None


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nnx.Embed(3, 4, rngs=RNGS), "embedding"),
        (nnx.LayerNorm(4, rngs=RNGS), "scale"),
        (stacked(lambda rngs: nnx.BatchNorm(4, rngs=rngs)), "bias"),
        (stacked(lambda rngs: nnx.Linear(3, 4, rngs=rngs)), "bias"),
        (nnx.LinearGeneral(3, (4, 5), rngs=RNGS), "bias"),
        (nnx.Einsum("td,d->td", (3,), kernel_init=nnx.initializers.ones, rngs=RNGS), "kernel"),
        (nnx.Einsum("td,ed->ted", (2, 3), rngs=RNGS), "kernel"),
        (nnx.Einsum("td,td->t", (2, 3), rngs=RNGS), "kernel"),
        (nnx.Einsum("td,ddf->tf", (3, 3, 4), rngs=RNGS), "kernel"),
        (nnx.Einsum("...d,...df->...f", (2, 3, 4), rngs=RNGS), "kernel"),
        (nnx.Conv(4, 4, 3, feature_group_count=4, rngs=RNGS), "kernel"),  # depthwise
        (nnx.Linear(0, 4, rngs=RNGS, kernel_init=lambda key, shape, dtype: jnp.zeros(shape, dtype)), "kernel"),
        (Own(kernel=nnx.Param(jnp.ones((3, 4)))), "kernel"),
        (nnx.PReLU(), "negative_slope"),
    ],
)
def test_what_is_not_a_matrix(layer: Any, name: str) -> None:
    assert axes_in(layer, name) is None


def test_an_einsum_whose_letters_come_with_each_call_is_not_a_matrix() -> None:
    layer = nnx.Einsum("td,df->tf", (3, 4), rngs=nnx.Rngs(0))
    assert axes_in(layer) == LINEAR
    layer.einsum_str = None
    assert axes_in(layer) is None


@pytest.mark.parametrize("kind", [nnx.LSTMCell, nnx.SimpleCell])
def test_cells_with_a_layer_for_each_matrix(kind: Any) -> None:
    groups = optim.muon_groups(cell(kind))
    matrices = [name for name, _ in optim.named_parameters(cell(kind)) if name.endswith("kernel")]
    assert shown(groups)[LINEAR] == sorted(matrices)


@pytest.mark.parametrize("layer", ["dense_i", "dense_h"])
@pytest.mark.parametrize(("kind", "gates"), [(nnx.OptimizedLSTMCell, 4), (nnx.GRUCell, 3)])
def test_cells_with_the_matrices_of_all_gates_in_one(kind: Any, gates: int, layer: str) -> None:
    model = cell(kind)
    name = f"cell.{layer}.kernel"
    group = group_of(model, name)
    assert (group["matrix_axes"], group["blocks"]) == (LINEAR, gates)
    kernel = getattr(model.cell, layer).kernel.get_value()
    np.testing.assert_array_equal(
        matrices_in(model, name), [gate.T for gate in jnp.split(kernel, gates, axis=-1)]
    )  # as the cell splits them
    check_a_step_of_muon(optim.muon_groups(model))


def test_grouped_convolutions_have_a_matrix_for_each_group() -> None:
    layer = nnx.Conv(6, 9, 2, feature_group_count=3, padding="VALID", **PLAIN)
    whole = linear_map(layer, (1, 2, 6)).reshape(3, 3, 2, 3, 2)  # group, out, window, group, in
    wanted = np.stack([whole[group, :, :, group].reshape(3, 4) for group in range(3)])
    np.testing.assert_allclose(matrices_in(layer), wanted, rtol=1e-6)


def test_blocks_for_fused_kernels_of_ones_own() -> None:
    model = {"qkv": nnx.Linear(4, 12, rngs=RNGS), "out": nnx.Linear(4, 4, rngs=RNGS), "cell": cell(nnx.GRUCell)}
    groups = optim.muon_groups(model, blocks={"qkv.*": [4, 6, 2], "*.dense_h.*": None})
    found = {name: group.get("blocks") for group in groups for name, _ in group["params"] if name.endswith("kernel")}
    assert found == {
        "qkv.kernel": (4, 6, 2),
        "out.kernel": None,
        "cell.cell.dense_i.kernel": 3,
        "cell.cell.dense_h.kernel": None,
    }
    check_a_step_of_muon(groups)
    assert {group.get("blocks") for group in optim.muon_groups(model, blocks=2) if "algorithm" in group} == {2}


def test_a_function_may_add_matrices_to_those_of_the_layers() -> None:
    model = Own(own=nnx.Param(jnp.ones((4, 3))), linear=nnx.Linear(4, 4, rngs=RNGS), other=nnx.Linear(4, 4, rngs=RNGS))
    turned = ((0,), (1,))
    axes = {"own": turned, "other.kernel": turned}
    groups = optim.muon_groups(model, matrices=lambda name, value: axes.get(name))
    assert shown(groups) == {
        LINEAR: ["linear.kernel"],
        turned: ["other.kernel", "own"],
        None: ["linear.bias", "other.bias"],
    }


def test_groups_that_are_added_or_sliced_are_still_of_the_whole() -> None:
    model = {"hidden": nnx.Linear(4, 4, rngs=nnx.Rngs(0)), "norm": nnx.LayerNorm(4, rngs=nnx.Rngs(0))}
    groups = optim.muon_groups(model, lr=0.02)
    rest = groups[-1]["params"]
    norms = [pair for pair in rest if pair[0].startswith("norm")]
    others = [pair for pair in rest if not pair[0].startswith("norm")]
    more = [{"params": norms, "weight_decay": 0.0}, {"params": others}]
    optimizer = optim.AdamW(groups[:-1] + more, lr=1e-3)
    assert optimizer.params is model
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2, 1]
    optimizer.step(lambda model, x: jnp.sum(model["norm"](model["hidden"](x)) ** 2), jnp.ones((2, 4)))
    assert [group["lr"] for group in groups[:1]] == [0.02]


def test_wrapped_layers() -> None:
    linear = nnx.Linear(3, 4, use_bias=False, rngs=RNGS)
    assert axes_in(nnx.SpectralNorm(linear, rngs=RNGS), "layer_instance.kernel") == LINEAR
    assert axes_in(nnx.LoRA(3, 2, 4, base_module=linear, rngs=RNGS), "base_module.kernel") == LINEAR


@pytest.mark.parametrize("order", [("embed", "head"), ("head", "input")])
def test_a_kernel_that_is_tied_to_an_embedding_is_not_a_matrix(order: tuple[str, str]) -> None:
    embed = nnx.Embed(4, 4, rngs=nnx.Rngs(0))
    linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    linear.kernel = embed.embedding
    hidden = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    model = Own(**dict(zip(order, (embed, linear) if order[0] == "embed" else (linear, embed), strict=True)), x=hidden)
    assert shown(optim.muon_groups(model))[LINEAR] == ["x.kernel"]
    in_a_dict = {"a": embed, "b": linear, "c": hidden}
    assert shown(optim.muon_groups(in_a_dict))[LINEAR] == ["c.kernel"]


def test_a_kernel_in_two_layers_of_one_kind_is_a_matrix_once() -> None:
    first, second, other = (nnx.Linear(4, 4, rngs=nnx.Rngs(seed)) for seed in range(3))
    second.kernel = first.kernel
    assert shown(optim.muon_groups([first, second, first]))[LINEAR] == ["0.kernel"]
    turned = nnx.Einsum("td,fd->tf", (4, 4), rngs=RNGS)
    turned.kernel = first.kernel
    assert shown(optim.muon_groups([first, turned, other])).keys() == {LINEAR, None}
    assert shown(optim.muon_groups([first, turned, other]))[LINEAR] == ["2.kernel"]


@pytest.mark.parametrize("hold", [lambda kernel: kernel, lambda kernel: [kernel], lambda kernel: {"k": kernel}])
def test_a_kernel_that_a_module_holds_for_a_use_of_its_own_is_not_a_matrix(hold: Any) -> None:
    first, second = (nnx.Linear(4, 4, rngs=nnx.Rngs(seed)) for seed in range(2))
    assert shown(optim.muon_groups(Own(a=first, b=second, own=hold(first.kernel))))[LINEAR] == ["b.kernel"]


def test_a_replaced_kernel_of_other_sizes_keeps_its_axes() -> None:
    layer = nnx.Linear(3, 4, rngs=RNGS)
    layer.kernel = nnx.Param(jnp.ones((2, 4)))  # pruned
    assert axes_in(layer) == LINEAR
    layer.kernel = nnx.Param(jnp.ones(4))
    assert axes_in(layer) is None


def test_frozen_parameters_are_in_groups_and_stay_frozen() -> None:
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    for parameter in optim.parameters(model):
        parameter.requires_grad = False
    groups = optim.muon_groups(model)
    assert shown(groups) == {LINEAR: ["kernel"], None: ["bias"]}
    assert groups.frozen == []
    assert not any(parameter.requires_grad for parameter in optim.parameters(model))
    twin = copy.deepcopy(groups)
    assert shown(twin) == shown(groups)
    assert not any(parameter.requires_grad for _, parameter in twin[0]["params"])


def test_exclude_takes_what_rules_take() -> None:
    layers = {key: nnx.Linear(2, 2, rngs=RNGS) for key in "abcd"}
    exclude = ["a.*", re.compile("^b"), lambda name, value: name[0] == "c" and value.ndim == 2, "*.kernel"][:3]
    assert shown(optim.muon_groups(layers, exclude=exclude))[LINEAR] == ["d.kernel"]
    assert shown(optim.muon_groups(layers, exclude=["a.*", "a.kernel"]))[LINEAR] == ["b.kernel", "c.kernel", "d.kernel"]


# --- trees ------------------------------------------------------------------------------------------------------------


def test_linen() -> None:
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            x = linen.Embed(8, 4, name="embed")(x)
            x = linen.MultiHeadDotProductAttention(2, name="attention")(linen.LayerNorm(name="norm")(x))
            return linen.Dense(8, name="head")(linen.Dense(4, name="hidden")(x))

    params = Net().init(jax.random.key(0), jnp.zeros((1, 3), int))["params"]
    heads = {"query": INTO_HEADS, "key": INTO_HEADS, "value": INTO_HEADS, "out": OUT_OF_HEADS}
    asked = []

    def matrices(name: str, value: Any) -> Any:
        asked.append(name)
        layer, kind = name.split(".")[-2:]
        return heads.get(layer, LINEAR) if kind == "kernel" else None

    groups = optim.muon_groups(params, exclude=["head.*"], matrices=matrices, lr=0.02)
    found = shown(groups)
    assert found[LINEAR] == ["hidden.kernel"]
    assert found[INTO_HEADS] == [f"attention.{layer}.kernel" for layer in ("key", "query", "value")]
    assert found[OUT_OF_HEADS] == ["attention.out.kernel"]
    assert {"embed.embedding", "norm.scale", "head.kernel", "hidden.bias"} < set(found[None])
    assert "head.kernel" not in asked
    assert jax.tree.structure(groups.source.view()) == jax.tree.structure(params)
    check_a_step_of_muon(groups)


def test_equinox() -> None:
    model = eqx.nn.MLP(2, 3, 4, 2, key=jax.random.key(0))
    groups = optim.muon_groups(
        model,
        exclude=["layers.0.*"],
        matrices=lambda name, value: ([-2], [-1]) if name.endswith("weight") else None,
    )
    weights = ["layers.1.weight", "layers.2.weight"]
    assert shown(groups)[((-2,), (-1,))] == weights
    assert jax.tree.structure(groups.source.view()) == jax.tree.structure(model)
    check_a_step_of_muon(groups)


def test_parameters_that_maxtext_scans_over() -> None:
    """The layers are the second axis of each parameter, so a norm's scale has two axes and is not a matrix."""
    layers, embed, heads, head, mlp = 3, 8, 2, 4, 16
    shapes = {
        "decoder": {
            "layers": {
                "norm": {"scale": (embed, layers)},
                "attention": {
                    "query": {"kernel": (embed, layers, heads, head)},
                    "key": {"kernel": (embed, layers, heads, head)},
                    "out": {"kernel": (heads, layers, head, embed)},
                },
                "mlp": {"wi": {"kernel": (embed, layers, mlp)}, "wo": {"kernel": (mlp, layers, embed)}},
            },
            "logits": {"kernel": (embed, 32)},
        },
        "token_embedder": {"embedding": (32, embed)},
    }
    params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))
    into_heads, out_of_heads, dense = ((2, 3), (0,)), ((3,), (0, 2)), ((2,), (0,))
    table = {"query.kernel": into_heads, "key.kernel": into_heads, "out.kernel": out_of_heads}

    def matrices(name: str, value: Any) -> Any:
        return table.get(".".join(name.split(".")[-2:]), dense) if name.endswith("kernel") else None

    groups = optim.muon_groups(params, exclude=["decoder.logits.*"], matrices=matrices, algorithm=optim.Muon)
    assert {axes: len(members) for axes, members in shown(groups).items()} == {
        into_heads: 2,
        out_of_heads: 1,
        dense: 2,
        None: 3,
    }
    assert groups[0]["algorithm"] is optim.Muon
    for group in for_muon(groups):
        for name, parameter in group["params"]:
            (batch,) = Layout(parameter.shape, group["matrix_axes"]).matrices(parameter.value)
            assert batch.shape[0] == layers, name
    check_a_step_of_muon(groups)


@pytest.mark.parametrize("form", ["pairs", "state"])
def test_layers_of_ones_own_by_pairs_or_as_a_state(form: str) -> None:
    model = Own(w=nnx.Param(jnp.ones((3, 4))), b=nnx.Param(jnp.ones(4)))
    given = optim.named_parameters(model) if form == "pairs" else nnx.state(model, nnx.Param)
    groups = optim.muon_groups(given, matrices=lambda name, value: LINEAR if name == "w" else None)
    assert shown(groups) == {LINEAR: ["w"], None: ["b"]}
    check_a_step_of_muon(groups)


# --- errors -----------------------------------------------------------------------------------------------------------


def dense() -> Any:
    return {"base": nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "head": nnx.Linear(2, 2, rngs=nnx.Rngs(0))}


def tree() -> Any:
    return {"w": jnp.ones((2, 3)), "b": jnp.ones(2)}


@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        (dense, {"exclude": ["haed.*"]}, ValueError, r"exclude\[0\] \('haed\.\*'\) matches no parameter.* head\.bias"),
        (dense, {"exclude": ["head.*", "had"]}, ValueError, r"exclude\[1\] \('had'\) matches no parameter"),
        (dense, {"exclude": "head.*"}, TypeError, r"exclude must be a list, got 'head\.\*': write \['head\.\*'\]"),
        (dense, {"blocks": {"haed.*": 2}}, ValueError, r"blocks \('haed\.\*'\) matches no parameter"),
        (dense, {"exclude": [3]}, TypeError, r"exclude\[0\] must be a glob.*got 3"),
        (dense, {"exclude": ["*"]}, ValueError, "exclude names all parameters, so there are no matrices"),
        (
            dense,
            {"exclude": ["*kernel"]},
            ValueError,
            r"no matrices: none of the parameters, for example base\.bias, he",
        ),
        (dense, {"matrices": "kernel"}, TypeError, "matrices must be a function .* got 'kernel'"),
        (dense, {"exclude": None}, TypeError, "exclude must be a list of globs, .* got None"),
        (dense, {"blocks": {"*.bias": 2}}, ValueError, r"blocks \('\*\.bias'\) matches no parameter.* base\.kernel"),
        (dense, {"exclude": ["base.*"], "blocks": {"base.*": 2}}, ValueError, r"blocks .* no parameter.* head\.kernel"),
        (
            dense,
            {"matrix_axes": LINEAR},
            TypeError,
            r"no option 'matrix_axes', got \(\(-1,\), \(-2,\)\): the layers say",
        ),
        (
            dense,
            {"requires_grad": False},
            TypeError,
            "no option 'requires_grad', got False: set that of the parameters",
        ),
        (dense, {"params": ["a"]}, TypeError, r"no option 'params', got \['a'\]: exclude says"),
        (tree, {}, TypeError, r"matrices must be a function .* got None: there are no layers"),
        (tree, {"matrices": {"w": LINEAR}}, TypeError, r"matrices must be a function .* got \{'w': "),
        (tree, {"matrices": lambda name, value: None}, ValueError, "matrices.* is None for all parameters, .* b, w"),
        (lambda: [optim.Parameter(1.0)], {"matrices": lambda *_: None}, ValueError, "without names"),
        (lambda: 3, {"matrices": lambda *_: None}, TypeError, "model must hold parameters, got int: 3"),
        (lambda: optim.named_parameters(dense()), {}, TypeError, "matrices must be a function"),
    ],
)
def test_errors(model: Any, arguments: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        optim.muon_groups(model(), **arguments)


@pytest.mark.parametrize(
    "axes", [True, (0, 1), ((0,),), ((0,), (1,), (2,)), ((0,), (0,)), ((0,), (-2,)), ((0,), (3,)), ((0,), ("1",)), "ab"]
)
def test_matrices_returns_pairs_of_axes(axes: Any) -> None:
    with pytest.raises(ValueError, match=rf"pair of tuples .* got {re.escape(repr(axes))} for 'w' of shape \(2, 3\)"):
        optim.muon_groups(tree(), matrices=lambda name, value: axes if name == "w" else None)


def test_a_stacked_kernel_whose_axes_are_unclear() -> None:
    layers = stacked(lambda rngs: nnx.LoRA(4, 2, 5, rngs=rngs), axis=1)
    with pytest.raises(ValueError, match=r"'lora_a' has shape \(4, 3, 2\), .* axes, \(4, None\), cannot be told"):
        optim.muon_groups(layers)
    layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    layer.kernel = nnx.Param(jnp.ones((2, 5, 6)))
    model = Own(a=layer, b=nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"'a\.kernel' has shape \(2, 5, 6\).*name it in exclude"):
        optim.muon_groups(model)
    assert shown(optim.muon_groups(model, exclude=["a.*"]))[LINEAR] == ["b.kernel"]


def test_options_are_the_constructors() -> None:
    groups = optim.muon_groups(dense(), momentun=0.9)
    with pytest.raises(TypeError, match="unknown option 'momentun'"):
        optim.Muon(for_muon(groups))
