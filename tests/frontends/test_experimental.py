"""The modules of `max.experimental.nn`: in MAX's own vocoder, alone, and with packed filters."""

import functools
import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import max
import numpy as np
import pytest
import torch
from max.driver import CPU
from max.dtype import DType
from max.experimental import functional as F
from max.experimental.nn import Conv2d, Module
from max.experimental.tensor import Tensor
from max.graph import DeviceRef, Graph, TensorType
from torch.nn import functional

import max_conv
from max_conv.frontends import experimental

MUSIC = Path(max.__path__[0], "pipelines", "architectures", "minimax_music3")
RATIOS, HIDDEN, LATENT, FRAMES = (4, 2), 32, 8, 12


@functools.cache
def music_module() -> Module[..., Any]:
    """Returns a small vocoder of the wheel's components/vocoder.py, whose `from ..layers.conv` finds this package's layers."""
    package = ModuleType("music_with_max_conv")
    package.__path__ = [str(MUSIC)]  # without its __init__.py, which needs max[serve]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, package.__name__, package)
        patch.setitem(sys.modules, f"{package.__name__}.layers.conv", experimental)
        vocoder = importlib.import_module(f"{package.__name__}.components.vocoder")
    config = sys.modules[f"{package.__name__}.model_config"]
    for name in [name for name in sys.modules if name.startswith(package.__name__)]:
        del sys.modules[name]
    sizes = config.VocoderConfig(
        latent_channels=LATENT, decoder_input_dim=16, decoder_hidden_dim=HIDDEN, upsampling_ratios=RATIOS
    )
    with F.lazy():  # as MAX's vocode.py does
        module: Module[..., Any] = vocoder.Vocoder(sizes).to(CPU())
    return module


def music_weights(module: Module[..., Any]) -> dict[str, np.ndarray]:
    """Returns random weights by the names that MAX's weight adapter gives them."""
    random = np.random.default_rng(0)
    values = {}
    for name, tensor in module.parameters:
        shape = [int(size) for size in tensor.shape]
        scale = 0.1 if name.endswith("bias") else 0.5 / np.sqrt(np.prod(shape[:-1]))
        value = random.uniform(0.5, 2, shape) if name.endswith("alpha") else random.normal(0, scale, shape)
        values[name] = value.astype(np.float32)
    return values


def music(weights: dict[str, np.ndarray], latents: np.ndarray) -> np.ndarray:
    """The vocoder in PyTorch and float64."""
    w = {name: torch.from_numpy(value).double() for name, value in weights.items()}

    def conv(x: torch.Tensor, name: str, dilation: int = 1) -> torch.Tensor:
        filter = w[f"{name}.weight"].permute(2, 1, 0)
        return functional.conv1d(x, filter, w[f"{name}.bias"], padding="same", dilation=dilation)

    def snake(x: torch.Tensor, name: str) -> torch.Tensor:
        alpha = w[f"{name}.alpha"].reshape(1, -1, 1)
        return x + torch.sin(alpha * x) ** 2 / (alpha + 1e-9)

    def upsample(x: torch.Tensor, name: str, stride: int) -> torch.Tensor:
        halves = [w[f"{name}.weight_{half}"].reshape(x.shape[1], stride, -1) for half in ("lo", "hi")]
        filter = torch.cat(halves, 1).permute(0, 2, 1)
        return functional.conv_transpose1d(x, filter, w[f"{name}.bias"], stride, stride // 2)

    x = torch.from_numpy(latents).double().reshape(2 * len(latents), LATENT // 2, -1)
    x = conv(conv(x, "dec_in_proj"), "conv_in")
    for block, stride in enumerate(RATIOS):
        x = upsample(snake(x, f"blocks.{block}.snake1"), f"blocks.{block}.conv_t1", stride)
        for unit, dilation in ((1, 1), (2, 3), (3, 9)):
            name = f"blocks.{block}.res_unit{unit}"
            y = conv(snake(x, f"{name}.snake1"), f"{name}.conv1", dilation)
            x = x + conv(snake(y, f"{name}.snake2"), f"{name}.conv2")
    return torch.tanh(conv(snake(x, "snake_out"), "conv_out")).reshape(len(latents), 2, -1).numpy()


class Layers(Module[[Tensor, Tensor], tuple[Tensor, Tensor]]):
    """Both layers with arguments that the vocoder does not use."""

    def __init__(self) -> None:
        strided: dict[str, Any] = {"stride": 2, "padding": 3, "dilation": 2, "num_groups": 3}
        self.down = experimental.Conv1D(4, 6, 9, **strided, has_bias=True, permute=True, padding_mode="reflect")
        self.up = experimental.ConvTranspose1D(4, 8, 6, stride=3, padding=1, output_padding=1, num_groups=2)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.down(x), self.up(y)


LAYERS = Layers()
SHAPES: list[list[Any]] = [["batch", 6, "length"], ["batch", "frames", 8]]
TYPES = [TensorType(DType.float32, shape, DeviceRef.CPU()) for shape in SHAPES]
LAYER_WEIGHTS = {
    name: np.random.default_rng(2).normal(size=[int(size) for size in tensor.shape]).astype(np.float32)
    for name, tensor in LAYERS.parameters
}


def graphs() -> dict[str, tuple[Graph, dict[str, np.ndarray]]]:
    """The vocoder as MAX traces it, the vocoder with packed filters, and `Layers`."""
    module: Any = music_module()
    types, weights = module.input_types(FRAMES), music_weights(module)
    return {
        "plain vocoder": (module.trace(*types).graph, weights),
        "packed vocoder": (experimental.trace(module, *types), weights),
        "layers": (experimental.trace(LAYERS, *TYPES), LAYER_WEIGHTS),
    }


def test_the_vocoder_of_minimax_music_3_with_one_import_changed(models: dict[str, max_conv.Model]) -> None:
    latents = np.random.default_rng(1).normal(size=(1, LATENT, FRAMES)).astype(np.float32)
    want = music(music_weights(music_module()), latents)
    assert want.shape == (1, 2, FRAMES * np.prod(RATIOS)) and 0.05 < np.abs(want).mean() < 0.5
    for name in ("plain vocoder", "packed vocoder"):
        assert np.abs(models[name](latents) - want).max() < 1e-5 * np.abs(want).max()


def test_filters_of_a_module_are_packed_once() -> None:
    module: Any = music_module()
    weights, types = music_weights(module), module.input_types(FRAMES)
    graph = experimental.trace(module, *types)
    layers = [layer for (layer,) in graph.emitted]
    assert len(layers) == 17 and all(layer.form and layer.form.filter_layout != "SFC" for layer in layers)
    packed = [layer for layer in layers if layer.kernel != "lengthwise"]  # which reads any filter as it is
    assert len(packed) == 16 and {layer.form.filter_layout for layer in packed if layer.form} == {"packed"}
    passed = max_conv.registry(graph, weights).keys()
    assert not {name for name in weights if name.endswith(("weight_lo", "weight_hi", "conv1.weight"))} & passed
    assert "packed" not in str(module.trace(*types)), "MAX's own graph has filters as they are"


def test_layers_in_a_module(models: dict[str, max_conv.Model]) -> None:
    random = np.random.default_rng(3)
    x, y = (random.normal(size=size).astype(np.float32) for size in ((2, 6, 21), (2, 10, 8)))
    w = {name: torch.from_numpy(value).double() for name, value in LAYER_WEIGHTS.items()}
    padded = functional.pad(torch.from_numpy(x).double(), (3, 3), "reflect")
    down = functional.conv1d(padded, w["down.weight"], w["down.bias"], stride=2, dilation=2, groups=3)
    channels = torch.from_numpy(y).double().permute(0, 2, 1)
    up = functional.conv_transpose1d(channels, w["up.weight"].permute(2, 1, 0), None, 3, 1, 1, groups=2)
    for got, want in zip(models["layers"](x, y), (down.numpy(), up.permute(0, 2, 1).numpy())):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_checkpoint_of_max_loads() -> None:
    """The names are parameters of the layers, so they load as part of any model."""
    vocoder: Any = music_module()
    weights = music_weights(vocoder)
    with F.lazy():
        module = type(vocoder)(vocoder.config)
    assert {"blocks.0.conv_t1.weight_lo", "blocks.0.conv_t1.weight_hi", "conv_in.weight"} <= weights.keys()
    module.load_state_dict(weights)
    for name, tensor in module.parameters:
        np.testing.assert_array_equal(np.from_dlpack(tensor), weights[name])
    with pytest.raises(ValueError, match="not assignable"):
        module.load_state_dict(weights | {"conv_in.weight": np.zeros((7, 1, 1), np.float32)})


def test_arguments_are_those_of_conv2d() -> None:
    theirs = list(inspect.signature(Conv2d).parameters.values())
    ours = list(inspect.signature(experimental.Conv1D).parameters.values())[: len(theirs)]
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]
    layer, like = experimental.Conv1D(3, 4, 8, num_groups=2), Conv2d.__new__(Conv2d)
    with F.lazy():
        like.__init__(3, 4, 8, num_groups=2)  # type: ignore[misc]
    assert vars(like).keys() <= vars(layer).keys() | {"_module_target_device"}
    assert [*dict(layer.parameters)] == [*dict(like.parameters)] == ["weight"]


def test_weights_are_used_once_where_a_module_ties_them() -> None:
    class Tied(Module[[Tensor], Tensor]):
        def __init__(self) -> None:
            self.first, self.second = (experimental.Conv1D(3, 8, 8, padding=1) for _ in range(2))
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    module = Tied()
    weight = module.first.weight
    graph = experimental.trace(module, TensorType(DType.float32, [1, "length", 8], DeviceRef.CPU()))
    assert [layer.name for (layer,) in graph.emitted] == ["first.weight"] * 2 and len(graph.derived) == 1
    assert module.first.weight is module.second.weight is weight and weight.real


def test_drop_ins_cast_their_weights_and_the_layers_do_not() -> None:
    x = TensorType(DType.bfloat16, [1, "length", 8], DeviceRef.CPU())
    for layer in (experimental.ShiftedConv1d(3, 8, 8), experimental.SubPixelConvTranspose1d(8, 8, 2)):
        (y,) = experimental.trace(layer, x).output_types
        assert isinstance(y, TensorType) and y.dtype == DType.bfloat16
    with pytest.raises(TypeError, match=r"conv1d: x is bfloat16 but the filter is float32; cast one to the other\."):
        experimental.trace(experimental.Conv1D(3, 8, 8), x)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: experimental.ShiftedConv1d(4, 8, 8), "kernel_size must be odd to keep the length, but is 4"),
        (lambda: experimental.SubPixelConvTranspose1d(8, 8, 3), "stride must be even, but is 3"),
        (lambda: experimental.Conv1D(3, 8, 8, num_groups=3), "3 groups must divide in_channels=8"),
        (lambda: experimental.Conv1D(3, 8, 8, DType.int32), "dtype must be one of float32"),
    ],
)
def test_errors_are_sentences(make: Any, sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^conv1d: .*|^conv_transpose1d: .*{sentence}") as error:
        make()
    assert sentence in str(error.value) and str(error.value).endswith(".")


def test_a_missing_weight_is_named() -> None:
    x = TensorType(DType.float32, ["batch", "length", 8], DeviceRef.CPU())
    with pytest.raises(ValueError, match=r"compile: the weight 'weight' has no value; pass it in weights=\."):
        experimental.compile(experimental.Conv1D(3, 8, 8), x, weights={})
