"""Where networks are cut: modules, cuts by name, lists, and chains that hooks see."""

import pytest
import torch
from networks import ZOO, N
from oracle import (
    dense_hessian_columns,
    dense_jacobian,
)
from split_cases import FIRST, SECOND, normal, size
from systems import system_of
from torch import nn

import llqr_mf as lq
from llqr_mf.network import linearize


def names(model, **options):
    return [layer.name for layer in lq.split(model, **options)]


def test_a_chain_of_modules_is_cut_at_every_module():
    assert names(ZOO["mlp"]()[0]) == ["0", "1", "2"]
    assert names(ZOO["nested"]()[0]) == ["0", "2.0", "2.1.0", "2.1.1", "3"]
    assert names(ZOO["same_module_twice"]()[0]) == ["0", "1", "0#2", "1#2", "4"]


def test_a_residual_block_carries_its_skip():
    model, inputs, _, _ = ZOO["resnet_eval"]()
    layers = lq.split(model)
    block = ["3.conv1", "3.norm1", "3.relu", "3.conv2", "3.norm2", "3"]
    assert [layer.name for layer in layers][3:9] == block
    system, _ = system_of(model, inputs, layers=layers)
    x = (len(inputs), 3, 4, 4)
    assert system.state_shapes(3) == (x,)
    for t in range(4, 9):
        assert system.state_shapes(t) == (x, x)
    assert system.state_shapes(9) == (x,)


def test_a_tied_weight_is_one_control_and_travels_in_the_state():
    model, inputs, _, _ = ZOO["tied_transpose"]()
    layers = lq.split(model)
    assert [list(layer.parameters) for layer in layers] == [
        ["encode.weight", "encode.bias"],
        [],
        ["middle.weight", "middle.bias"],
        [],
        ["bias"],
    ]
    system, _ = system_of(model, inputs, layers=layers)
    assert all((3, 4) in system.state_shapes(t) for t in range(1, 4))
    assert (4, 3) in system.state_shapes(4)  # transposed there


def test_integer_inputs_give_an_empty_first_state():
    model, inputs, targets, loss = ZOO["embedding"]()
    problem = lq.LQRProblem.from_network(lq.split(model), inputs, targets, loss=loss)
    assert problem.A[0].shape == (4 * 3 * 3, 0)
    assert problem.x0.shape == (0,)


def test_cuts():
    model = ZOO["resnet_eval"]()[0]
    layers = lq.split(model, cuts=["2", "3.norm1"])
    assert len(layers) == 3
    assert layers[1].calls == ("conv2d", "batch_norm")
    assert names(model, cuts=["6"]) == names(model, cuts=[])
    with pytest.raises(ValueError, match=r"cut 'nowhere' names no module.*'3.conv1'"):
        lq.split(model, cuts=["nowhere"])


@pytest.mark.parametrize("cuts", [[], ["0"], ["3"], ["1", "3.relu", "4"]])
def test_products_do_not_depend_on_the_cuts(cuts):
    model, inputs, _, _ = ZOO["resnet_train"]()
    dense = dense_jacobian(model, inputs)
    system, _ = system_of(model, inputs, layers=lq.split(model, cuts=cuts))
    u = normal(2, size(model))
    torch.testing.assert_close(system.output_product(u), u @ dense.mT, **FIRST)


def test_a_weight_used_twice_in_one_layer():
    """Its cotangents add up in one buffer, with and without curvature."""
    model, inputs, _, _ = ZOO["same_module_twice"]()
    layers = lq.split(model, cuts=[])
    assert len(layers) == 1
    dense, c = dense_jacobian(model, inputs), normal(2, N, 2)
    system, _ = system_of(model, inputs, layers=layers)
    product = system.output_product_t((c,), 2)
    torch.testing.assert_close(product, c.reshape(2, -1) @ dense, **FIRST)
    u = normal(2, size(model))
    system, _ = system_of(model, inputs, c[0], layers)
    expected = dense_hessian_columns(model, inputs, lambda y: (y * c[0]).sum(), u.mT)
    torch.testing.assert_close(system.condensed_product(u).mT, expected, **SECOND)


def test_a_layers_own_output_is_what_it_made_last():
    """Among the carried skip and tied weights; None where only a passed-on value is read later."""
    for name in ("resnet_eval", "tied_transpose", "language_model"):
        model, inputs, _, _ = ZOO[name]()
        system, _ = system_of(model, inputs)
        for stage in system.stages:
            place, made = stage.own_output(), stage.nodes[-1].outputs
            assert stage.next_ids[place] in made
    items = [torch.tanh, nn.Identity(), nn.Linear(3, 2).double()]
    system, _ = system_of(items, normal(4, 3))
    assert system.stages[1].own_output() is None


def test_calls_that_stay_whole():
    whole = {
        "item_assignment": [""],
        "control_flow": [""],
        "in_place_through_view": [""],
        "view_of_overwritten": [""],
        "mha_weights_used": [""],
        "energy": [""],
        "control_flow_inside": ["1"],
        "cross_attention": ["other"],
        "in_place": [],
        "language_model": [],
    }
    for name, paths in whole.items():
        layers = lq.split(ZOO[name]()[0])
        assert list(layers[0].program.whole) == paths, name


def test_masks_and_positions_are_not_layers():
    assert names(ZOO["language_model"]()[0])[:3] == ["embed", "position", "add"]
    assert names(ZOO["encoder_masked"]()[0])[0] == "encoder.layers.0.self_attn"


def test_list_of_modules_functions_and_pairs():
    w = normal(4, 3)
    linear = nn.Linear(4, 2).double()
    items = [(lambda p, x: torch.tanh(x @ p["w"].mT), {"w": w}), torch.square, nn.Identity()]
    layers = lq.split([*items, linear])
    assert [layer.name for layer in layers] == ["0", "1", "2", "3"]
    assert [list(layer.parameters) for layer in layers] == [
        *[["0.w"], [], [], ["3.weight", "3.bias"]]
    ]
    assert layers[3].parameters["3.weight"] is linear.weight
    x = normal(5, 3)
    system, linearization = system_of(items, x, layers=layers)
    model = nn.Sequential(_Product(w), linear).double()
    u = normal(2, size(model))
    torch.testing.assert_close(system.output_product(u), u @ dense_jacobian(model, x).mT, **FIRST)
    torch.testing.assert_close(linearization.outputs, model(x).detach())


class _Product(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w.clone())

    def forward(self, x):
        return torch.tanh(x @ self.w.mT).square()


def test_list_that_repeats_a_module():
    layer, act = nn.Linear(3, 3).double(), nn.Tanh()
    items = [layer, act, layer, act]
    layers = lq.split(items)
    assert [layer.name for layer in layers] == ["0", "1", "2", "3"]
    x, model = normal(4, 3), nn.Sequential(*items)
    u = normal(2, size(model))
    system, _ = system_of(items, x, layers=layers)
    torch.testing.assert_close(system.output_product(u), u @ dense_jacobian(model, x).mT, **FIRST)


def test_list_whose_first_item_takes_two_inputs():
    items = [nn.Bilinear(2, 3, 4).double(), torch.tanh, nn.Linear(4, 2).double()]
    inputs, targets = (normal(5, 2), normal(5, 3)), normal(5, 2)
    problem = lq.LQRProblem.from_network(lq.split(items), inputs, targets, loss="mse")
    assert problem.horizon == 3


def test_module_list_is_a_list():
    items = nn.ModuleList([nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Tanh())])
    assert names(items) == ["0", "1", "2"]
    assert list(lq.split(items)[2].parameters) == ["2.0.weight", "2.0.bias"]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "the list of layers is empty"),
        ([nn.Tanh(), 3], "layer 1 is a int"),
        ([(torch.tanh, 3)], "layer 0 is a tuple"),
        ([(lambda p, x: x, {"a.b": torch.ones(1)})], r"layer 0 has parameters.*without dots"),
        ([(lambda p, x: x, {"i": torch.arange(2)})], r"layer 0 has parameters.*floating-point"),
    ],
)
def test_lists_that_are_refused(items, message):
    with pytest.raises(ValueError, match=message):
        lq.split(items)


def test_cuts_do_not_go_with_a_list():
    with pytest.raises(ValueError, match="cuts go with a module"):
        lq.split([nn.Tanh()], cuts=["0"])


# ---- hooks and example inputs


class _Chain(nn.Module):
    """Untraceable, but a chain of modules for whoever watches it run."""

    def __init__(self, scale=1):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
        self.drop, self.scale = nn.Dropout(0.5), scale

    def forward(self, x):
        if x.norm() > 0:
            for layer in self.layers:
                x = self.drop(layer(x if self.scale == 1 else x * self.scale))
        return x


def test_example_inputs_show_a_chain():
    model, x = _Chain().double(), normal(4, 3)
    assert names(model) == ["_Chain"]
    state = torch.get_rng_state()
    layers = lq.split(model, example_inputs=x)
    assert torch.equal(torch.get_rng_state(), state)
    expected = ["layers.0", "drop", "layers.1", "drop#2", "layers.2", "drop#3"]
    assert [layer.name for layer in layers] == expected
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    system, _ = system_of(model, x, layers=layers)
    u = normal(2, size(model))
    torch.testing.assert_close(system.output_product(u), u @ dense_jacobian(model, x).mT, **FIRST)


def test_what_is_no_chain_stays_one_layer():
    model, x = _Chain(scale=2).double(), normal(4, 3)
    assert len(lq.split(model, example_inputs=x)) == 1


def test_example_inputs_count_optional_arguments():
    model, x, _, _ = ZOO["optional_argument"]()
    mask = normal(4, 2)
    layers = lq.split(model, example_inputs=(x, mask))
    linearization = linearize(layers, (x, mask))
    torch.testing.assert_close(linearization.outputs, model(x, mask).detach())
    with pytest.raises(ValueError, match=r"inputs holds 2 tensors and the layers.*for 1"):
        linearize(lq.split(model), (x, mask))
    with pytest.raises(ValueError, match=r"inputs holds 1 tensors and the layers.*for 2"):
        linearize(layers, (x,))


def test_user_hooks_act_and_stay():
    model, x, _, _ = ZOO["hooked"]()
    seen = []
    handle = model[1].register_forward_hook(lambda m, args, output: seen.append(output))
    system_of(model, x)
    assert len(seen) == 1
    assert len(model[1]._forward_hooks) == 1
    handle.remove()
