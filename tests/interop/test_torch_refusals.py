"""What does not fit between PyTorch and a module is refused by name, and nothing has changed; what differs is said."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optimjax as optim
from optimjax.interop import torch as interop
from optimjax.interop.torch import Layout

RNGS = nnx.Rngs(0)
zeros = np.zeros


class Net(nnx.Module):
    def __init__(self) -> None:
        self.stem = nnx.Sequential(nnx.Linear(2, 3, rngs=RNGS), nnx.relu, nnx.Linear(3, 3, rngs=RNGS))
        self.norm = nnx.BatchNorm(3, rngs=RNGS)
        self.blocks = nnx.List([nnx.Linear(3, 3, rngs=RNGS)])
        self.token = nnx.Param(jnp.ones((1, 1, 3)))
        self.mixing = nnx.Param(jnp.ones((4, 4)))


def theirs() -> dict[str, np.ndarray]:
    """What PyTorch's twin would save, its blocks under another name."""
    rng = np.random.default_rng(0)
    shapes = {
        "stem.0.weight": (3, 2), "stem.0.bias": (3,), "stem.2.weight": (3, 3), "stem.2.bias": (3,),
        "norm.weight": (3,), "norm.bias": (3,), "norm.running_mean": (3,), "norm.running_var": (3,),
        "encoder.layers.0.weight": (3, 3), "encoder.layers.0.bias": (3,), "token": (1, 1, 3), "mixing": (4, 4),
    }  # fmt: skip
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return arrays | {"norm.num_batches_tracked": np.array(7)}


HOW: dict[str, Any] = dict(rename={"encoder.layers": "blocks", "encoder": "elsewhere"}, layout={"mixing": (1, 0)})


def leaves(model: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


# --- Weights ----------------------------------------------------------------------------------------------------------


def test_structures_that_differ_are_renamed() -> None:
    model, saved = Net(), theirs()
    layout = interop.load_weights(model, saved, **HOW)
    np.testing.assert_array_equal(model.stem.layers[2].kernel[...], saved["stem.2.weight"].T)
    np.testing.assert_array_equal(model.blocks[0].kernel[...], saved["encoder.layers.0.weight"].T)
    np.testing.assert_array_equal(model.norm.var[...], saved["norm.running_var"])
    np.testing.assert_array_equal(model.mixing[...], saved["mixing"].T)
    np.testing.assert_array_equal(model.token[...], saved["token"])
    back = interop.weights(model, layout)
    assert list(back) == [name for name in saved if name != "norm.num_batches_tracked"]
    for name, array in back.items():
        np.testing.assert_array_equal(array, saved[name])
    other = Net()
    interop.load_weights(other, saved, **HOW | {"rename": lambda name: name.replace("encoder.layers", "blocks")})
    for one, two in zip(leaves(model), leaves(other), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("prefix", ["module", "_orig_mod"])
def test_the_names_of_a_wrapped_model(prefix: str) -> None:
    model = nnx.Linear(2, 2, rngs=RNGS)
    saved = {f"{prefix}.weight": np.eye(2, 2, 1, np.float32), f"{prefix}.bias": zeros(2)}
    layout = interop.load_weights(model, saved, rename={prefix: ""})
    np.testing.assert_array_equal(model.kernel[...], np.eye(2, 2, -1))
    assert interop.weights(model, layout).keys() == saved.keys()


def test_weights_take_the_dtype_and_place_of_the_module(torch: Any) -> None:
    model = nnx.Linear(8, 2, param_dtype=jnp.bfloat16, rngs=RNGS)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    model.kernel.set_value(jax.device_put(model.kernel[...], sharding))
    weight = torch.arange(16, dtype=torch.bfloat16).reshape(2, 8)
    interop.load_weights(model, {"weight": weight, "bias": torch.ones(2, dtype=torch.float64)})
    kernel = model.kernel[...]
    assert (kernel.dtype, model.bias[...].dtype, kernel.sharding) == (jnp.bfloat16, jnp.bfloat16, sharding)
    np.testing.assert_array_equal(np.asarray(kernel, np.float32), weight.float().numpy().T)
    back = interop.weights(model, interop.flax_layout(model, ["weight"]), tensors=True)["weight"]
    assert back.dtype == torch.bfloat16
    assert torch.equal(back, weight)


def change(**entries: Any) -> Any:
    """PyTorch's weights with other entries; ``None`` leaves one out. Of names the dots are written as two lines."""
    changed = theirs() | {name.replace("__", "."): value for name, value in entries.items()}
    return {name: value for name, value in changed.items() if value is not None}


@pytest.mark.parametrize(
    ("saved", "how", "error", "message"),
    [
        (change(stem__2__bias=None), {}, ValueError, r"lack \['stem\.layers\.2\.bias'\]"),
        (change(norm__running_var=None), {}, ValueError, r"lack \['norm\.var'\]"),
        (change(extra__weight=zeros(3)), {}, ValueError, r"'extra\.weight' of PyTorch has no counterpart"),
        (change(), {"rename": None}, ValueError, r"'encoder\.layers\.0\.weight' .* which has blocks\.0\.weight"),
        (
            change(stem__0__weight=zeros((2, 3))), {}, ValueError,
            r"'stem\.0\.weight' has shape \(2, 3\), but 'stem\.layers\.0\.kernel' .* asks for \(3, 2\)",
        ),
        (change(), {"layout": {}}, ValueError, r"'mixing' of shape \(4, 4\) .* \{'mixing': \(0, 1\)\}"),
        (change(token=zeros((1, 3, 1))), {}, ValueError, r"'token' has shape \(1, 3, 1\), ours \(1, 1, 3\)"),
        (change(), {"layout": {"mixing": (0, 0)}}, ValueError, "the layout of 'mixing': axes .* permutation"),
        (change(), {"layout": {"mixing": (0, 1, 2)}}, ValueError, r"'mixing' has shape \(4, 4\), its layout the axes"),
        (change(), {"layout": {"mixing": "T"}}, TypeError, "the layout of 'mixing' must be None, a tuple of axes"),
        (change(), {"layout": {"mixing": (1, 0), "nix": None}}, ValueError, r"layout has \['nix'\]"),
        (change(), {"layout": {"mixing": Layout("nowhere")}}, ValueError, "names 'nowhere', which the module does not"),
        (change(), {"layout": {"mixing": Layout("token")}}, ValueError, "'token' and 'mixing' of PyTorch are both"),
        (change(stem__0__bias="text"), {}, TypeError, r"'stem\.0\.bias' of the weights is not an array, but 'text'"),
        (change(stem__0__bias=zeros(3, complex)), {}, TypeError, r"'stem\.0\.bias' is complex"),
        ([], {}, TypeError, "the weights of a model are a dict by name, got list"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_change_nothing(saved: Any, how: Any, error: Any, message: str) -> None:
    model = Net()
    before = leaves(model)
    with pytest.raises(error, match=message):
        interop.load_weights(model, saved, **HOW | how)
    for one, two in zip(before, leaves(model), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_cell_with_one_bias_is_refused() -> None:
    """Two biases whose sum counts move twice as far as one."""
    for cell, missing in (
        (nnx.OptimizedLSTMCell(2, 3, rngs=RNGS), "dense_i"),
        (nnx.GRUCell(2, 3, rngs=RNGS), "dense_h"),
        (nnx.LSTMCell(2, 3, rngs=RNGS), "ii and if_ and ig and io"),
    ):
        with pytest.raises(ValueError, match=rf"'bias_.h' has no counterpart: .* cell\.{missing} = nnx\.Linear"):
            interop.flax_layout(cell, ["weight_ih", "bias_ih", "bias_hh"])


def test_layers_that_are_stacked_are_refused() -> None:
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key: Any) -> Any:
        return nnx.Linear(2, 3, rngs=nnx.Rngs(key))

    with pytest.raises(ValueError, match=r"'fc\.weight' of PyTorch has no counterpart"):
        interop.flax_layout(nnx.Dict(fc=make(jax.random.split(jax.random.key(0), 4))), ["fc.weight"])


def test_a_layout_is_of_a_module() -> None:
    with pytest.raises(TypeError, match=r"derived from a flax\.nnx module, got dict"):
        interop.flax_layout({"w": zeros(2)}, ["w"])


# --- The state of optimizers ------------------------------------------------------------------------------------------


def saved(shape: tuple[int, ...] = (4, 4), slot: str = "exp_avg", **group: Any) -> dict[str, Any]:
    """A state dict of one parameter."""
    group = {"lr": 0.1, "params": [0], "param_names": ["fc.weight"], **group}
    return {"state": {0: {"step": 1, slot: zeros(shape)}}, "param_groups": [group]}


FC = {"fc.weight": Layout("fc.kernel", axes=(1, 0))}
FUSED = {"qkv": tuple(Layout(name, (1, 0), (4, 4)) for name in "qkv")}
HEADS = {"fc.weight": Layout("fc.kernel", axes=(2, 0, 1), shape=((2, 2), 4))}
FACTORS = {"step": 1, "row_var": zeros((4, 1)), "col_var": zeros((1, 4))}
MUON: dict[str, Any] = dict(slot="momentum_buffer", adjust_lr_fn=None)
LBFGS = {"func_evals": 1, "n_iter": 1, "d": zeros(6), "prev_flat_grad": zeros(6), "old_dirs": [], "old_stps": []}


def with_state(entries: Any, **group: Any) -> dict[str, Any]:
    return saved(**group) | {"state": {0: entries}}


@pytest.mark.parametrize(
    ("state_dict", "how", "message"),
    [
        (saved(), {}, r"the state of 'fc\.weight' has shape \(4, 4\), which would fit with its axes exchanged"),
        (with_state(FACTORS), {}, r"the state of 'fc\.weight' has shape \(4, 4\)"),
        (saved(param_names=None), {"layout": FC}, "has no names for its parameters 0"),
        (saved(), {"names": ["a", "b"]}, "names has 2 names for 1 parameters"),
        (saved(param_names=["a", "b"]), {}, "2 names for 1 parameters"),
        (saved(), {"layout": {"fc.weight": ()}}, r"'fc\.weight' has no counterpart here"),
        (saved((4, 2)), {"layout": {"fc.weight": (0, 2, 1)}}, r"'exp_avg' of 'fc\.weight' has shape \(4, 2\)"),
        (saved((4, 2)), {"layout": HEADS}, r"'exp_avg' of 'fc\.weight' has shape \(4, 2\), its layout \(4, 4\)"),
        (saved((4, 4), param_names=["qkv"]), {"layout": FUSED}, r"shape \(4, 4\), which does not fall into 3 parts"),
        (with_state({"mine": zeros((4, 4))}), {"layout": FC}, "'mine' of 'fc.weight' is a slot of one's own"),
        (with_state(FACTORS), {"layout": HEADS}, r"Adafactor keeps means along the last two axes of 'fc\.weight'"),
        (
            with_state({"step": 1, "variance": zeros(12)}, param_names=["qkv"]),
            {"layout": {"qkv": tuple(Layout(name) for name in "qkv")}}, "so the run would be another one",
        ),
        (saved((12, 4), **MUON, param_names=["qkv"]), {"layout": FUSED}, "Muon works on 'qkv' as one matrix"),
        (saved((4, 2, 3), **MUON), {"layout": {"fc.weight": (2, 1, 0)}}, r"Muon: 'fc\.weight' is not a matrix"),
        (with_state(LBFGS), {}, r"the layout must name each of them, and does not name 'fc\.weight'"),
        (with_state(LBFGS), {"layout": FC}, r"the layout does not say the shape of 'fc\.weight'"),
        (with_state(LBFGS), {"layout": HEADS}, r"a vector of LBFGS has shape \(6,\), its parameters have 16"),
        ({"Adam": saved((4, 2))}, {"names": ["w"]}, "of several state dicts, names is a dict with the same keys"),
        ({"optimizer": saved((4, 2))}, {}, r"names of their optimizers' classes as keys, got \['optimizer'\]"),
        (saved(), {"names": {"Adam": ["w"]}}, "names is a dict only for a dict of state dicts"),
        ({"state": {}}, {}, r"has the keys 'state' and 'param_groups', got \['state'\]"),
        ({"state": [], "param_groups": []}, {}, "'state' of a state dict is a dict"),
        ({"state": {}, "param_groups": [{}]}, {}, r"param_groups\[0\] is not a dict with a list of 'params'"),
        (None, {}, "a state dict is a dict"),
    ],
)  # fmt: skip
def test_state_that_does_not_fit_is_refused(state_dict: Any, how: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interop.from_torch(state_dict, **how)


def parts_of_one(steps: tuple[int, ...] = (1, 1, 1), names: str = "qkv", **group: Any) -> dict[str, Any]:
    group = {"lr": 0.1, "params": [0, 1, 2][: len(names)], "param_names": list(names), **group}
    state = {place: {"step": step, "exp_avg": zeros((4, 4))} for place, step in enumerate(steps[: len(names)])}
    return {"state": state, "param_groups": [group]}


SPLIT = {"momentum": 0.9, "adjust_lr_fn": None}


@pytest.mark.parametrize(
    ("state_dict", "how", "message"),
    [
        (saved(), {}, "which would fit with its axes exchanged"),
        (parts_of_one(names="qk"), {"layout": FUSED}, r"'qkv' of PyTorch is one array, but \['v'\] are not in the"),
        (parts_of_one((1, 1, 2)), {"layout": FUSED}, "the parts of 'qkv' differ in 'step'"),
        (
            parts_of_one() | {"state": {0: {"step": 1}, 1: {}, 2: {}}}, {"layout": FUSED},
            "the parts of 'qkv' have different state",
        ),
        (saved((4, 2), param_names=["other"]), {"layout": FC}, r"where in PyTorch's order \['other'\] are"),
        (saved(blocks=3), {"layout": FC}, "has blocks=3, which PyTorch's Muon lacks"),
        (
            saved(**MUON, param_names=["fc.kernel"]), {"layout": FC},
            r"'fc\.kernel' has matrix_axes=None, PyTorch's matrix is \(\(-1,\), \(-2,\)\) of it",
        ),
        (
            {"state": {}, "param_groups": [
                {"params": [0], "param_names": ["a"], "lr": 0.1, "torch_group": 0},
                {"params": [1], "param_names": ["b"], "lr": 0.2, "torch_group": 0},
            ]}, {}, r"param_groups\[1\] was one with another group in PyTorch, and differs in \['lr'\] now",
        ),
    ],
)  # fmt: skip
def test_our_state_that_does_not_fit_is_refused(state_dict: Any, how: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interop.to_torch(state_dict, tensors=False, **how)


def test_what_is_named_as_it_is_stays() -> None:
    for layout in (None, (0, 1), Layout()):
        converted = interop.from_torch(saved(), layout={"fc.weight": layout})
        np.testing.assert_array_equal(converted["state"][0]["exp_avg"], saved()["state"][0]["exp_avg"])
        assert converted["param_groups"] == saved()["param_groups"]
    assert interop.from_torch(saved((4, 2)))["state"][0]["exp_avg"].shape == (4, 2)


def test_a_layout_may_be_of_json() -> None:
    layout = {"fc.weight": {"name": "fc.kernel", "axes": [2, 0, 1], "shape": [[2, 2], 4]}}
    ours, same = (interop.from_torch(saved(), layout=given) for given in (layout, HEADS))
    assert ours["param_groups"] == same["param_groups"]
    assert ours["state"][0]["exp_avg"].shape == (4, 2, 2)
    fused = {"qkv": [{"name": name, "axes": [1, 0]} for name in "qkv"]}
    split = interop.from_torch(saved((12, 4), param_names=["qkv"]), layout=fused)
    assert split["param_groups"][0]["param_names"] == ["q", "k", "v"]
    assert interop.to_torch(split, layout=fused, tensors=False)["state"][0]["exp_avg"].shape == (12, 4)


def test_several_optimizers_become_one_and_come_apart() -> None:
    """Also with names from outside, and ``None`` for what the optimizer's own class updates."""
    muon = with_state({"momentum_buffer": zeros((2, 3))}, param_names=None, adjust_lr_fn=None)
    adamw = with_state({"step": 1, "exp_avg": zeros(3)}, param_names=None)
    names = {"Muon": ["fc.weight"], None: ["fc.bias"]}
    for each in (muon, adamw):
        del each["param_groups"][0]["param_names"]
    one = interop.from_torch({"Muon": muon, None: adamw}, layout={**FC, "fc.bias": None}, names=names)
    assert [(g.get("algorithm"), g["param_names"], g["params"]) for g in one["param_groups"]] == [
        ("Muon", ["fc.kernel"], [0]),
        (None, ["fc.bias"], [1]),
    ]
    back = interop.to_torch(one, layout={**FC, "fc.bias": None}, tensors=False)
    assert back.keys() == {"Muon", None}
    for name, each in (("Muon", muon), (None, adamw)):
        assert back[name]["param_groups"] == [{**each["param_groups"][0], "param_names": names[name]}]
        assert jax.tree.map(np.shape, back[name]["state"]) == jax.tree.map(np.shape, each["state"])


def test_what_is_kept_under_other_keys_stays() -> None:
    state_dict = saved((4, 2))
    state_dict["state"]["count"] = {"n": 3}
    state_dict["param_groups"][0]["mine"] = [1, 2]
    converted = interop.from_torch(state_dict, layout=FC)
    assert converted["state"]["count"] == {"n": 3}
    assert interop.to_torch(converted, layout=FC, tensors=False)["param_groups"][0]["mine"] == [1, 2]


def test_groups_need_names_that_the_model_has() -> None:
    model = nnx.Dict(fc=nnx.Linear(4, 4, rngs=RNGS))
    with pytest.raises(ValueError, match=r"param_groups\[0\] has no names"):
        interop.groups(model, saved(param_names=None))
    with pytest.raises(ValueError, match=r"param_groups\[0\] names \['fc\.weight'\], which the model does not have"):
        interop.groups(model, saved())
    state = interop.from_torch(saved(), layout=FC)
    optimizer = optim.Adam(interop.groups(model, state))
    assert optimizer.param_groups[0]["params"][0] is dict(optim.named_parameters(model))["fc.kernel"]


def test_a_snapshot_shares_nothing_with_pytorch(torch: Any) -> None:
    tensor = torch.nn.Parameter(torch.ones(3))
    theirs = torch.optim.SGD([("w", tensor)], lr=0.1, momentum=0.9)
    tensor.grad = torch.ones(3)
    theirs.step()
    ours = optim.SGD([("w", optim.Parameter(jnp.ones(3)))], momentum=0.9)
    ours.load_state_dict(interop.from_torch(theirs.state_dict()))
    theirs.step()
    (state,) = ours.state.values()
    np.testing.assert_array_equal(state["momentum_buffer"], np.ones(3))
    back = interop.to_torch(ours.state_dict())["state"][0]["momentum_buffer"]
    back += 1
    np.testing.assert_array_equal(state["momentum_buffer"], np.ones(3))
