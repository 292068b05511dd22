"""The weights that a `torch.nn.Conv1d` computes with, after PyTorch's own hooks; any other hook is an error."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from max.driver import Buffer

from ..conv.arrays import as_buffer, as_float64, buffer_of, copy_of
from ..conv.folding import fold_spectral_norm, fold_weight_norm
from .eager import as_dtype

USED = [
    "forward",
    "_conv_forward",
    "_output_padding",
    "__call__",
    "_call_impl",
    "_wrapped_call_impl",
    "__getattr__",
    "__getattribute__",
    "weight",
    "bias",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
    "output_padding",
    "kernel_size",
]
"""The attributes that a call of PyTorch's module uses: a subclass that defines one may compute something else."""


def check_plain(module: Any, kind: type) -> None:
    """Raises TypeError unless a call of the module runs only PyTorch's code, and hooks whose formula is known."""
    from torch.nn import parameter
    from torch.nn.modules import module as modules

    tensors = [module._parameters.get(name) for name in ("weight", "bias")]
    if any(tensor is not None and parameter.is_lazy(tensor) for tensor in tensors):
        raise TypeError("from_torch: the module is lazy and has no weights yet; call it once first.")
    parametrized = _parametrized(module)
    for name in USED:
        inherited = getattr(type(module), name, None) is getattr(kind, name, None)
        own = name in module.__dict__ and callable(getattr(kind, name, None))
        if own or not (inherited or name in parametrized):
            raise TypeError(
                f"from_torch: the {type(module).__name__} has its own {name}, which may compute something else; "
                f"pass a torch.nn.{kind.__name__}."
            )
    everywhere = (modules._global_forward_pre_hooks, modules._global_forward_hooks)
    hooks = [hook for table in everywhere for hook in table.values()]
    for part in (module, *parametrized.values(), *(step for steps in parametrized.values() for step in steps)):
        hooks += part._forward_hooks.values()
        hooks += [] if part is module else part._forward_pre_hooks.values()
    hooks += [hook for hook in module._forward_pre_hooks.values() if _target(hook) is None]
    if hooks:
        raise TypeError(
            f"from_torch: the module has the forward hook {_name_of(hooks[0])}, which may compute something else; remove it."
        )
    for name, steps in parametrized.items():
        for step in steps:
            if not _known_step(step) or "forward" in step.__dict__ or "forward" in steps.__dict__:
                raise TypeError(
                    f"from_torch: the module's {name} has the parametrization {_name_of(step)}, but only weight norm and "
                    "spectral norm are known; remove it with torch.nn.utils.parametrize.remove_parametrizations."
                )


def padding_of(module: Any) -> Any:
    """Returns the padding that a call uses: for modes other than zeros, PyTorch keeps a copy from the constructor."""
    kept = getattr(module, "_reversed_padding_repeated_twice", None)
    given = module.padding
    if module.padding_mode == "zeros" or isinstance(given, str) or kept is None or tuple(kept) == 2 * tuple(given):
        return given
    return tuple(kept)


def values_of(module: Any) -> dict[str, Buffer]:
    """Returns copies of the weight and the bias that a call of `module.eval()` would compute with.

    Formulas are computed in float64, and rounded once. The module's own tensors may be out of date, because PyTorch's
    hooks run only at the start of a call.
    """
    parametrized = _parametrized(module)
    made: dict[str, np.ndarray] = {}
    for hook in module._forward_pre_hooks.values():
        name = _target(hook)
        assert name is not None, "checked by check_plain"
        if name in parametrized:
            raise TypeError(
                f"from_torch: the module's {name} has both a hook and a parametrization; remove one of them."
            )
        made[name] = _hooked(hook, module, name, made)
    for name, steps in parametrized.items():
        made[name] = _parametrization(steps, name)
    values = {}
    for name in ("weight", "bias"):
        if name in made:
            values[name] = as_buffer(made[name], as_dtype(_origin(module, name).dtype))
        elif (tensor := getattr(module, name)) is not None:
            values[name] = copy_of(buffer_of(_plain(tensor, name), "from_torch: weight", name))
    return values


def dtype_of(module: Any) -> Any:
    """Returns PyTorch's dtype of the weight, without computing it."""
    return _origin(module, "weight").dtype


def _parametrized(module: Any) -> dict[str, Any]:
    return dict(module.parametrizations.items()) if "parametrizations" in module._modules else {}


def _origin(module: Any, name: str) -> Any:
    """Returns a tensor that has the dtype of a weight: the weight, or the tensor that it is made from."""
    if steps := _parametrized(module).get(name):
        return getattr(steps, "original", None) if hasattr(steps, "original") else steps.original0
    for suffix in ("_orig", "_v"):
        if (tensor := module._parameters.get(name + suffix)) is not None:
            return tensor
    return getattr(module, name)


def _target(hook: Any) -> str | None:
    """Returns the name of the tensor that one of PyTorch's own hooks makes before a call; None for any other hook."""
    from torch.nn.utils import prune
    from torch.nn.utils.spectral_norm import SpectralNorm
    from torch.nn.utils.weight_norm import WeightNorm

    if type(hook) in (SpectralNorm, WeightNorm):
        return hook.name
    pruning = prune.BasePruningMethod
    # Subclasses only choose the mask, which is stored: their code does not run during a call.
    if isinstance(hook, pruning) and all(
        getattr(type(hook), name) is getattr(pruning, name) for name in ("__call__", "apply_mask")
    ):
        return hook._tensor_name
    return None


def _known_step(step: Any) -> bool:
    from torch.nn.utils import parametrizations

    return type(step) in (parametrizations._WeightNorm, parametrizations._SpectralNorm)


def _hooked(hook: Any, module: Any, name: str, made: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the tensor that a hook of `_target` makes; `made` has the tensors that earlier hooks made."""

    def part(suffix: str) -> np.ndarray:
        full = name + suffix
        return made[full] if full in made else _float64(getattr(module, full), full)

    match type(hook).__name__:
        case "WeightNorm":
            return fold_weight_norm(part("_g"), part("_v"), hook.dim)
        case "SpectralNorm":
            return fold_spectral_norm(part("_orig"), part("_u"), part("_v"), hook.dim)
        case _:
            return part("_mask") * part("_orig")


def _parametrization(steps: Iterable[Any], name: str) -> np.ndarray:
    """Returns the tensor that PyTorch's parametrizations make from their stored tensors."""
    kept: Any = steps
    first = "original" if hasattr(steps, "original") else "original0"
    value = _float64(getattr(kept, first), name)
    for step in steps:
        if type(step).__name__ == "_WeightNorm":
            value = fold_weight_norm(value, _float64(kept.original1, name), step.dim)
        elif value.ndim == 1:  # PyTorch's spectral norm of a vector is its length
            value = value / max(float(np.linalg.norm(value)), step.eps)
        else:
            value = fold_spectral_norm(value, _float64(step._u, name), _float64(step._v, name), step.dim)
    return value


def _float64(tensor: Any, name: str) -> np.ndarray:
    return as_float64(_plain(tensor, name), "from_torch: weight", name)


def _plain(tensor: Any, name: str) -> Any:
    """Returns a tensor, or raises TypeError for subclasses: torchao's, for example, hold quantised values."""
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise TypeError(f"from_torch: weight {name!r} must be a torch.Tensor, but is a {type(tensor).__name__}.")
    return tensor


def _name_of(hook: Any) -> str:
    return getattr(hook, "__qualname__", None) or type(hook).__name__
