"""Layers with weight norm: folded once, in float64, however the weights are loaded."""

from typing import Any

import max.nn
import numpy as np
import pytest
import torch
from max.dtype import DType
from max.graph import Graph, TensorType, TensorValue

import max_conv
from harness import HOST
from max_conv.weights.checkpoint import weight_norm_names

F32 = DType.float32
KINDS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "conv": (max_conv.WeightNormConv1D, torch.nn.Conv1d, (6, 8, 5, 2, 1)),
    "transposed": (max_conv.WeightNormConvTranspose1D, torch.nn.ConvTranspose1d, (6, 8, 5, 2, 1)),
}


def theirs(kind: str, dim: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Returns PyTorch's layer, whose magnitude is not the norm of its direction; PyTorch's `dim` may be None."""
    torch.manual_seed(0)
    module = torch.nn.utils.parametrizations.weight_norm(KINDS[kind][1](*KINDS[kind][2]).to(dtype), dim=dim)
    with torch.no_grad():
        module.parametrizations.weight.original0.mul_(1.5).add_(0.25)
    return module


def ours(kind: str, dim: int | None, permute: bool = True, name: str | None = None) -> Any:
    channels, filters, taps, stride, padding = KINDS[kind][2]
    options = dict(has_bias=True, permute=permute, dim=dim, name=name)
    return KINDS[kind][0](taps, channels, filters, F32, stride, padding, **options)


def state_of(module: torch.nn.Module, prefix: str = "") -> dict[str, np.ndarray]:
    return {prefix + name: value.detach().numpy() for name, value in module.state_dict().items()}


class Net(max.nn.Module):
    """A layer inside another module, which loads its weights."""

    def __init__(self, kind: str, dim: int | None) -> None:
        super().__init__()
        self.layer = ours(kind, dim)

    def __call__(self, x: TensorValue) -> TensorValue:
        return self.layer(x)


X = torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(0))
TYPE = TensorType(F32, ["n", 6, "l"], HOST)


def answer(module: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return module(X).numpy()


@pytest.mark.parametrize("dim", [0, 1, 2, None, -1, -2, -3])
@pytest.mark.parametrize("kind", list(KINDS))
def test_loading_folds_in_float64(kind: str, dim: int | None) -> None:
    module = theirs(kind, dim)
    state = state_of(module)
    exact = theirs(kind, dim, torch.float64)
    with torch.no_grad():
        for name in ("original0", "original1"):
            getattr(exact.parametrizations.weight, name).copy_(getattr(module.parametrizations.weight, name))
    want = exact.weight.detach().numpy()
    for spelling in (state, weight_norm_names(state)):
        layer = ours(kind, dim, name="up")
        layer.load_state_dict({f"up.{name}": value for name, value in spelling.items()})
        assert sorted(layer.raw_state_dict()) == ["up.bias", "up.weight"]
        got = layer.state_dict()["up.weight"].to_numpy()
        np.testing.assert_array_equal(got, want.astype(np.float32))
    native = ours(kind, dim, permute=False)
    turned = weight_norm_names(state)
    turned["weight_v"] = np.ascontiguousarray(turned["weight_v"].transpose(2, 1, 0))
    native.load_state_dict(turned)
    np.testing.assert_array_equal(native.state_dict()["weight"].to_numpy(), got.transpose(2, 1, 0))


@pytest.mark.parametrize(("kind", "dim"), [("conv", 0), ("conv", 2), ("transposed", 0), ("transposed", None)])
def test_compile_folds_the_layers_of_a_tree(kind: str, dim: int | None) -> None:
    module = theirs(kind, dim)
    state = weight_norm_names(state_of(module, "layer."))
    loaded = Net(kind, dim)
    loaded.load_state_dict(state)
    for model in (
        max_conv.compile(loaded, {"x": TYPE}, weights=loaded.state_dict()),
        max_conv.compile(Net(kind, dim), {"x": TYPE}, weights=state_of(module, "layer.")),
    ):
        assert not [name for name in model._weights if name.endswith(("weight_g", "weight_v"))]
        np.testing.assert_allclose(model(X.numpy()), answer(module), atol=1e-5)
    assert sorted(loaded.raw_state_dict()) == ["layer.bias", "layer.weight_g", "layer.weight_v"]


def graphs() -> dict[str, tuple[Any, Any]]:
    """Plain graphs whose weights an outer module has loaded, before and after `remove_weight_norm`."""
    made = {}
    for kind in KINDS:
        net = Net(kind, 2)
        net.load_state_dict(weight_norm_names(state_of(theirs(kind, 2), "layer.")))
        for folded in (False, True):
            if folded:
                max_conv.remove_weight_norm(net)
            graph = Graph("net", net, [TYPE])
            assert ("rmo.mo.sqrt" in str(graph) or "sqrt" in str(graph)) == (not folded)
            made[f"{kind}, {folded=}"] = graph, net.state_dict()
    return made


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_plain_graph(kind: str, folded: bool, models: dict[str, max_conv.Model]) -> None:
    """The graph folds weights that an outer module has loaded, unless `remove_weight_norm` has been called."""
    np.testing.assert_allclose(models[f"{kind}, {folded=}"](X.numpy()), answer(theirs(kind, 2)), atol=1e-5)


@pytest.mark.parametrize("permute", [False, True])
def test_the_drop_in_has_the_weights_of_max(permute: bool) -> None:
    sizes = (5, 6, 8, F32, (1, 2), (0, 0, 1, 1), 1, (0, 1), None, True, permute)
    layers = [nn.WeightNormConvTranspose1d(*sizes) for nn in (max.nn, max_conv)]
    named = [{name: (w.dtype, list(w.shape)) for name, w in layer.raw_state_dict().items()} for layer in layers]
    assert named[0] == named[1]
