"""The original implementations of models: from wheels that pip downloads, with weights that keep signals alive."""

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from max_conv.weights import resolve


def from_wheel(
    reference: str, package: str, modules: Iterable[str], absent: Iterable[str] = ()
) -> list[types.ModuleType]:
    """Imports modules of a package from a wheel without installing it: only these files are extracted.

    Args:
        reference: As for `resolve`, with {} for the file.
        package: Its name; its own `__init__` is not run.
        modules: Their names inside the package; a module comes after the modules that it imports.
        absent: Modules that they import but that the tests do not need: any name can be imported from these.
    """
    for name in absent:
        stub = types.ModuleType(name)
        stub.__getattr__ = lambda _: None  # type: ignore[method-assign]
        sys.modules.setdefault(name, stub)
    root = sys.modules.setdefault(package, types.ModuleType(package))
    root.__path__ = []
    loaded = []
    for name in modules:
        path = resolve(reference.format(f"{package}/{name.replace('.', '/')}.py"))
        spec = importlib.util.spec_from_file_location(f"{package}.{name}", path)
        assert spec and spec.loader
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        setattr(root, name, module)
        loaded.append(module)
    return loaded


def enliven(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives a network weights with which signals neither vanish nor explode, and biases that are not zero."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            for name, value in module.named_parameters(recurse=False):
                noise = torch.randn(value.shape, generator=random)
                if value.ndim >= 2 and not name.endswith(("_g", "original0")):
                    # The terms of a sum: in a transposed convolution, an output uses only 1 / stride of the taps.
                    terms = value[0].numel()
                    if isinstance(module, torch.nn.ConvTranspose1d):
                        terms = value.shape[0] * value.shape[2] // module.stride[0]
                    value.copy_(noise / terms**0.5)
                elif name.endswith("bias"):
                    value.copy_(0.1 * noise)
    return network.eval()


def arrays(network: torch.nn.Module) -> dict[str, np.ndarray]:
    """Returns a network's state dict."""
    return {name: value.numpy() for name, value in network.state_dict().items()}


def compare(got: np.ndarray, want: torch.Tensor, bound: float = 1e-4) -> None:
    """Asserts that two outputs agree, and that the output is not silence."""
    expected = want.detach().numpy()
    assert got.shape == expected.shape and got.dtype == np.float32
    assert np.isfinite(got).all() and expected.std() > 0.05
    assert np.abs(got - expected).max() <= bound, np.abs(got - expected).max()


def dac(config: Any) -> Any:
    """Returns transformers' DAC, with a last layer that does not saturate the hyperbolic tangent."""
    from transformers import DacModel

    torch.manual_seed(0)
    model = enliven(DacModel(config))
    random = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if name.endswith("alpha"):
            value.data = 0.5 + torch.rand(value.shape, generator=random)
        if ("res_unit" in name and name.endswith("conv2.weight")) or name == "decoder.conv2.weight":
            value.data *= 0.3
    return model


def encodec(config: Any) -> Any:
    """Returns transformers' EnCodec, with codebooks that are not all zero."""
    from transformers import EncodecModel

    torch.manual_seed(0)
    model: Any = enliven(EncodecModel(config))
    for name, value in model.named_parameters():
        if name.endswith("original0"):
            value.data *= 2
    for layer in model.quantizer.layers:
        layer.codebook.embed.normal_()
    return model
