"""The front ends against the libraries whose arguments they have."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from max.driver import Buffer
from max.dtype import DType
from max.graph import Graph, TensorValue
from max.nn import Module
from torch.nn.utils import prune

import max_conv
from max_conv.frontends import mlx as ours_mlx
from max_conv.frontends import torch as ours_torch

mx = pytest.importorskip("mlx.core", reason="mlx is not to be had here")
mlx_nn = pytest.importorskip("mlx.nn", reason="mlx is not to be had here")

RANDOM = np.random.default_rng(0)

# PyTorch's argument lists, by position and by name. Two of them run: each costs a compile.
TORCH: list[tuple[tuple, dict[str, Any]]] = [
    ((6, 9, 3), {"padding": "same", "dilation": 2, "padding_mode": "reflect"}),
    ((6, 9, (3,), (2,), (1,), (2,), 3, False, "circular"), {}),
    ((6, 12, 1), {"groups": 6, "padding": (2,), "padding_mode": "replicate"}),
    ((6, 9, 3), {"padding": "valid"}),
    ((6, 9, 4, 2, 1), {"bias": False}),
    ((6, 9, 3), {"dtype": torch.float64}),
]
MLX: list[tuple[tuple, dict[str, Any]]] = [
    ((6, 9, 3), {}),
    ((6, 9, 3, 2, 1, 2, 3), {}),
    ((6, 9, 3), {"bias": False, "padding": 2}),
]


# The same for transposed convolution.
TORCH_TRANSPOSED: list[tuple[tuple, dict[str, Any]]] = [
    ((6, 9, 4, 2, 1, 1), {}),
    ((6, 9, (3,), (2,), (1,), (1,), 3, False, (3,), "zeros"), {}),
    ((6, 9, 3), {"dilation": 2, "dtype": torch.float64}),
]
MLX_TRANSPOSED: list[tuple[tuple, dict[str, Any]]] = [
    ((6, 9, 4, 2, 1, 2, 1), {}),
    ((6, 9, 3), {"bias": False, "padding": 2}),
]


@pytest.mark.parametrize(
    ("kind", "args", "kwargs"),
    [("Conv1d", *row) for row in TORCH] + [("ConvTranspose1d", *row) for row in TORCH_TRANSPOSED],
)
def test_torch_arguments_repr_and_names(kind: str, args: tuple, kwargs: dict[str, Any]) -> None:
    theirs, ours = getattr(torch.nn, kind)(*args, **kwargs), getattr(ours_torch, kind)(*args, **kwargs)
    assert repr(ours) == repr(theirs)
    shapes = {name: tuple(value.shape) for name, value in ours.state_dict().items()}
    assert shapes == {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    assert ours.dtype.name == str(theirs.weight.dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    ("kind", "args", "kwargs"),
    [("Conv1d", *row) for row in TORCH[:2]] + [("ConvTranspose1d", *row) for row in TORCH_TRANSPOSED[:2]],
)
def test_from_torch_runs(kind: str, args: tuple, kwargs: dict[str, Any]) -> None:
    module = getattr(torch.nn, kind)(*args, **kwargs)
    conv = ours_torch.from_torch(module)
    x = torch.randn(2, 6, 21)
    with torch.no_grad():
        np.testing.assert_allclose(conv(x.numpy()), module(x).numpy(), atol=1e-5)
        np.testing.assert_allclose(conv(x[0].numpy()), module(x[0]).numpy(), atol=1e-5)
        y = conv(x)
        assert isinstance(y, Buffer)
        np.testing.assert_allclose(torch.from_dlpack(y).numpy(), module(x).numpy(), atol=1e-5)
        unbatched = torch.from_dlpack(conv(Buffer.from_numpy(x[0].numpy())))
        np.testing.assert_allclose(unbatched.numpy(), module(x[0]).numpy(), atol=1e-5)


def test_output_size_is_pytorchs() -> None:
    module = torch.nn.ConvTranspose1d(6, 9, 5, 3, 1)
    conv = ours_torch.from_torch(module)
    assert isinstance(conv, ours_torch.ConvTranspose1d)
    x = torch.randn(2, 6, 21)
    with torch.no_grad():
        for size in (63, [64], (65,)):
            want = module(x, output_size=[size] if isinstance(size, int) else size).numpy()
            np.testing.assert_allclose(conv(x.numpy(), output_size=size), want, atol=1e-5)
        whole = module(x, output_size=(2, 9, 65)).numpy()
        np.testing.assert_allclose(conv(x.numpy(), output_size=(2, 9, 65)), whole, atol=1e-5)
    for short in (62, 66):
        with pytest.raises(ValueError, match="output size"):
            module(x, output_size=[short])
        with pytest.raises(
            ValueError, match=r"conv_transpose1d: output_size must be between 63 and 65 for an input of 21"
        ):
            conv(x.numpy(), output_size=short)


# PyTorch accepts None as `dim`, but its annotation does not say so.
NORMS: dict[str, Callable[[torch.nn.Module, Any], Any]] = {
    "hook": lambda module, dim: torch.nn.utils.weight_norm(module, dim=dim),
    "parametrization": lambda module, dim: torch.nn.utils.parametrizations.weight_norm(module, dim=dim),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("dim", [0, 1, 2, None, -1, -2, -3])
@pytest.mark.parametrize("spelling", list(NORMS))
@pytest.mark.parametrize("kind", [torch.nn.Conv1d, torch.nn.ConvTranspose1d])
def test_weight_norm_is_folded(kind: Any, spelling: str, dim: int | None) -> None:
    module = NORMS[spelling](kind(4, 8, 3), dim)
    x = torch.randn(1, 4, 5)
    with torch.no_grad():
        for name, value in module.named_parameters():
            if name != "bias":
                value.mul_(torch.rand_like(value) + 0.5)  # from here on the hook's `weight` is out of date
    got = torch.from_dlpack(ours_torch.from_torch(module).state_dict()["weight"])
    module(x)  # refreshes it
    torch.testing.assert_close(got, module.weight.detach(), rtol=1e-6, atol=1e-7)


def test_from_torch_keeps_bfloat16_and_copies() -> None:
    for _ in range(50):  # MAX's own copy is made later, most often
        module = torch.nn.Conv1d(4, 8, 3).to(torch.bfloat16)
        before = module.weight.detach().clone()
        conv = ours_torch.from_torch(module)
        with torch.no_grad():
            module.weight.zero_()
        assert torch.equal(torch.from_dlpack(conv.state_dict()["weight"]), before)


utils = torch.nn.utils
spectral: Callable[..., Any] = utils.parametrizations.spectral_norm


def pruned(module: Any) -> Any:
    """Prunes twice, and the bias, too."""
    prune.l1_unstructured(module, "weight", 0.3)
    prune.random_unstructured(module, "weight", 0.3)
    return prune.random_unstructured(module, "bias", 0.5)


def masked(method: Any, module: Any, *amount: float) -> Any:
    """Prunes by a class's own mask."""
    method.apply(module, "weight", *amount)
    return module


def reordered(module: Any) -> Any:
    """Makes the first hook run last."""
    module._forward_pre_hooks.move_to_end(next(iter(module._forward_pre_hooks)))
    return module


class Odd(prune.BasePruningMethod):
    """A user's own choice of a mask: it is stored, so the hook is PyTorch's."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
        return (torch.arange(t.numel()) % 2).reshape(t.shape)


HOOKS: dict[str, Callable[[Any], Any]] = {
    "spectral norm": utils.spectral_norm,
    "spectral norm of the other axis": lambda m: utils.spectral_norm(m, dim=1),
    "spectral norm, parametrized": spectral,
    "spectral norm of the bias": lambda m: utils.spectral_norm(m, "bias", dim=0),
    "spectral norm of the bias, parametrized": lambda m: spectral(m, "bias", dim=0),
    "pruning": pruned,
    "pruning by a mask": lambda m: masked(Odd, m),
    "weight norm of the bias": lambda m: utils.weight_norm(m, "bias"),
    "weight norm of the bias, parametrized": lambda m: utils.parametrizations.weight_norm(m, "bias"),
    "weight norm and pruning": lambda m: prune.l1_unstructured(utils.weight_norm(m), "bias", 0.5),
    "pruning under weight norm": lambda m: prune.l1_unstructured(utils.weight_norm(m), "weight_v", 0.5),
    "pruning, then weight norm": lambda m: reordered(prune.l1_unstructured(utils.weight_norm(m), "weight_v", 0.5)),
    "spectral norm and weight norm": lambda m: utils.weight_norm(spectral(m), "bias"),
    "two parametrizations": lambda m: spectral(utils.parametrizations.weight_norm(m)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("hook", list(HOOKS))
@pytest.mark.parametrize("kind", [torch.nn.Conv1d, torch.nn.ConvTranspose1d])
def test_hooks_of_pytorch_are_computed(kind: Any, hook: str) -> None:
    """As a state dict loads them: the module's weight is out of date until the module is called."""
    torch.manual_seed(0)
    other, module = (HOOKS[hook](kind(4, 6, 3)) for _ in range(2))
    if hook != "pruning under weight norm":  # PyTorch itself uses an outdated direction in one call
        module.load_state_dict(other.state_dict())
    with torch.no_grad():
        for value in module.parameters():
            value.mul_(torch.rand_like(value) + 0.5)
    for train in (True, False):
        module.train(train)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        got = ours_torch.from_torch(module).state_dict()
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    module(torch.zeros(1, 4, 5))
    for name in ("weight", "bias"):
        want = getattr(module, name).detach()
        # PyTorch sums spectral norm's sigma in float32, of terms of both signs.
        torch.testing.assert_close(torch.from_dlpack(got[name]), want, rtol=1e-5, atol=1e-7)


class Causal(torch.nn.Conv1d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.nn.functional.pad(x, (2, 0)))


class Standardised(torch.nn.Conv1d):
    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Called(torch.nn.Conv1d):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().__call__(x)


class Masked(torch.nn.Conv1d):
    kept: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        return self.kept.tril()

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        self.register_buffer("kept", value.detach())


class Named(torch.nn.ConvTranspose1d):
    """Computes the same as PyTorch's layer."""

    def extra_repr(self) -> str:
        return "named"


class Doubled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class Louder(prune.L1Unstructured):
    def apply_mask(self, module: torch.nn.Module) -> torch.Tensor:
        inherited: Any = super()
        return 2 * inherited.apply_mask(module)


def changed(change: Callable[[Any], Any], module: Any = None) -> Any:
    module = module or torch.nn.Conv1d(4, 4, 3)
    change(module)
    return module


def hooked_and_parametrized() -> Any:
    (hook,) = utils.spectral_norm(torch.nn.Conv1d(4, 4, 3))._forward_pre_hooks.values()
    return changed(lambda m: m.register_forward_pre_hook(hook), spectral(torch.nn.Conv1d(4, 4, 3)))


def _plus_one(*values: Any) -> Any:
    return values[-1] + 1


REFUSED_MODULES: dict[str, tuple[Callable[[], Any], str]] = {
    "forward": (lambda: Causal(4, 4, 3), r"the Causal has its own forward"),
    "_conv_forward": (lambda: Standardised(4, 4, 3), r"the Standardised has its own _conv_forward"),
    "__call__": (lambda: Called(4, 4, 3), r"the Called has its own __call__"),
    "property": (lambda: Masked(4, 4, 3), r"the Masked has its own weight"),
    "forward of the object": (
        lambda: changed(lambda m: setattr(m, "forward", abs)),
        r"the Conv1d has its own forward, which may compute something else; pass a torch\.nn\.Conv1d\.",
    ),
    "hook": (
        lambda: changed(lambda m: m.register_forward_hook(_plus_one)),
        r"the module has the forward hook _plus_one, which may compute something else; remove it\.",
    ),
    "pre-hook": (lambda: changed(lambda m: m.register_forward_pre_hook(_plus_one)), r"the forward hook _plus_one"),
    "hook of a parametrization": (
        lambda: changed(lambda m: spectral(m).parametrizations.weight[0].register_forward_hook(_plus_one)),
        r"the forward hook _plus_one",
    ),
    "parametrization": (
        lambda: changed(lambda m: utils.parametrize.register_parametrization(m, "weight", Doubled())),
        r"the module's weight has the parametrization Doubled, but only weight norm and spectral norm are known; remove",
    ),
    "orthogonal": (lambda: utils.parametrizations.orthogonal(torch.nn.Conv1d(4, 4, 3)), r"parametrization _Orthogonal"),
    "own pruning": (lambda: changed(lambda m: masked(Louder, m, 0.3)), r"the forward hook Louder"),
    "both": (hooked_and_parametrized, r"the module's weight has both a hook and a parametrization; remove one"),
    "lazy": (lambda: torch.nn.LazyConv1d(4, 3), r"the module is lazy and has no weights yet; call it once first\."),
    "quantised": (
        lambda: torch.ao.nn.quantized.Conv1d(4, 4, 3),
        r"takes a torch\.nn\.Conv1d or ConvTranspose1d, but got a torch\.ao\.nn\.quantized\.modules\.conv\.Conv1d\.",
    ),
    "quantised later": (
        lambda: torch.ao.nn.qat.Conv1d(4, 4, 3, qconfig=torch.ao.quantization.default_qconfig),
        r"the Conv1d has its own forward",
    ),
    "subclass of tensors": (
        lambda: changed(lambda m: setattr(m, "weight", torch.nn.Parameter(m.weight.detach().as_subclass(Strange)))),
        r"weight 'weight' must be a torch\.Tensor, but is a Strange\.",
    ),
    "meta": (
        lambda: torch.nn.Conv1d(4, 4, 3, device="meta"),
        r"weight 'weight' cannot be read: it is a meta tensor; pass a dense array",
    ),
    "another module": (
        lambda: torch.nn.Conv2d(1, 1, 1),
        r"takes a torch\.nn\.Conv1d or ConvTranspose1d, but got a torch\.nn\.modules\.conv\.Conv2d\.",
    ),
}


class Strange(torch.Tensor):
    """Like torchao's quantised weights: its stored values are not the values that it shows."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("case", list(REFUSED_MODULES))
def test_from_torch_refuses_what_may_compute_something_else(case: str) -> None:
    make, sentence = REFUSED_MODULES[case]
    module = make()
    with pytest.raises(TypeError, match=rf"^from_torch: .*{sentence}") as caught:
        ours_torch.from_torch(module)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_from_torch_refuses_hooks_of_all_modules() -> None:
    handle = torch.nn.modules.module.register_module_forward_hook(_plus_one)
    try:
        with pytest.raises(TypeError, match=r"from_torch: the module has the forward hook _plus_one"):
            ours_torch.from_torch(torch.nn.Conv1d(4, 4, 3))
    finally:
        handle.remove()


def test_from_torch_takes_what_computes_the_same() -> None:
    lazy = torch.nn.LazyConv1d(4, 3)
    lazy(torch.zeros(1, 4, 5))
    for module in (lazy, Named(4, 4, 3), torch.nn.Conv1d(4, 4, 3).requires_grad_(False).eval()):
        got = ours_torch.from_torch(module).state_dict()
        assert torch.equal(torch.from_dlpack(got["weight"]), module.weight.detach())


def test_padding_that_was_changed_later() -> None:
    """PyTorch uses a copy of the padding from its constructor, unless it pads with zeros."""
    for mode in ("zeros", "reflect"):
        module = torch.nn.Conv1d(4, 4, 3, padding=1, padding_mode=mode)
        module.padding = (2,)
        length = module(torch.zeros(1, 4, 9)).shape[-1]
        assert 9 + sum(ours_torch.from_torch(module).padding) - 2 == length


def test_from_torch_names_a_layer() -> None:
    for kind in (torch.nn.Conv1d, torch.nn.ConvTranspose1d):
        module = kind(4, 6, 3)
        conv = ours_torch.from_torch(module, name="up.0")
        assert list(conv.state_dict()) == [f"up.0.{name}" for name in module.state_dict()]
        assert torch.equal(torch.from_dlpack(conv.state_dict()["up.0.weight"]), module.weight.detach())
    assert list(ours_torch.Conv1d(4, 6, 3, name="up").raw_state_dict()) == ["up.weight", "up.bias"]
    x = torch.randn(2, 4, 9)
    np.testing.assert_allclose(conv(x.numpy()), module(x).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "args", "kwargs"),
    [("Conv1d", *row) for row in MLX] + [("ConvTranspose1d", *row) for row in MLX_TRANSPOSED],
)
def test_mlx_arguments_repr_and_names(kind: str, args: tuple, kwargs: dict[str, Any]) -> None:
    theirs, ours = getattr(mlx_nn, kind)(*args, **kwargs), getattr(ours_mlx, kind)(*args, **kwargs)
    assert repr(ours) == repr(theirs)
    shapes = {name: tuple(value.shape) for name, value in ours.state_dict().items()}
    assert shapes == {name: tuple(value.shape) for name, value in theirs.parameters().items()}


@pytest.mark.parametrize("kind", ["Conv1d", "ConvTranspose1d"])
def test_mlx_runs(kind: str) -> None:
    sizes = (6, 9, 3, 2, 1, 2, 3) if kind == "Conv1d" else (6, 9, 3, 2, 1, 2, 1)
    theirs, ours = getattr(mlx_nn, kind)(*sizes), getattr(ours_mlx, kind)(*sizes)
    ours.load_state_dict({name: np.array(value) for name, value in theirs.parameters().items()})
    x = RANDOM.standard_normal((2, 20, 6)).astype(np.float32)
    np.testing.assert_allclose(ours(x), np.array(theirs(mx.array(x))), atol=1e-5)
    np.testing.assert_allclose(ours(x[0]), np.array(theirs(mx.array(x)))[0], atol=1e-5)


@pytest.mark.parametrize("frontend", [ours_torch, ours_mlx], ids=["torch", "mlx"])
def test_start_values(frontend: Any) -> None:
    """Uniform within sqrt(groups / (C K)), as both libraries document; MLX's bias starts at zero."""
    conv = frontend.Conv1d(64, 256, 5, groups=4, generator=1)
    values = {name: value.to_numpy() for name, value in conv.state_dict().items()}
    bound = (4 / (64 * 5)) ** 0.5
    weight = values["weight"].ravel()
    assert 0.99 * bound < weight.max() <= bound and -bound <= weight.min() < -0.99 * bound
    assert abs(weight.mean()) < 0.02 * bound and abs(weight.std() - bound / 3**0.5) < 0.02 * bound
    if frontend is ours_mlx:
        assert not values["bias"].any()
    else:
        assert 0.9 * bound < abs(values["bias"]).max() <= bound
    again = frontend.Conv1d(64, 256, 5, groups=4, generator=1).state_dict()["weight"].to_numpy()
    other = frontend.Conv1d(64, 256, 5, groups=4, generator=2).state_dict()["weight"].to_numpy()
    assert np.array_equal(values["weight"], again) and not np.array_equal(again, other)


def test_transposed_start_values() -> None:
    """PyTorch's depend on the filters of a group times the taps, MLX's on the channels."""
    sizes = dict(groups=4, generator=1)
    for frontend, fan in ((ours_torch, 256 // 4 * 5), (ours_mlx, 64 // 4 * 5)):
        values = frontend.ConvTranspose1d(64, 256, 5, **sizes).state_dict()
        bound = fan**-0.5
        weight = values["weight"].to_numpy().ravel()
        assert 0.99 * bound < weight.max() <= bound and -bound <= weight.min() < -0.99 * bound
        assert abs(weight.std() - bound / 3**0.5) < 0.02 * bound
        assert (frontend is ours_mlx) == (not values["bias"].to_numpy().any())
    theirs = torch.nn.ConvTranspose1d(64, 256, 5, groups=4)
    assert 0.99 * (256 // 4 * 5) ** -0.5 < theirs.weight.max() <= (256 // 4 * 5) ** -0.5


def test_bfloat16_start_values_are_rounded_to_even() -> None:
    values = ours_torch.Conv1d(64, 64, 3, dtype="bfloat16", generator=0).state_dict()["weight"]
    start = ours_torch.Conv1d(64, 64, 3, generator=0).state_dict()["weight"]
    want = torch.from_dlpack(start)
    assert torch.equal(torch.from_dlpack(values), want.to(torch.bfloat16))


def test_graph_values_are_emitted() -> None:
    conv = ours_torch.Conv1d(4, 8, 3, generator=0)
    graph = Graph("emitted", conv, conv.input_types())
    assert "max_conv.conv1d" in str(graph)
    model = max_conv.compile(graph, weights=conv.state_dict())
    x = RANDOM.standard_normal((2, 4, 9)).astype(np.float32)
    np.testing.assert_array_equal(model(x), conv(x))


def test_in_a_tree_of_layers() -> None:
    class Net(Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = ours_torch.Conv1d(4, 8, 3, generator=0)

        def __call__(self, x: TensorValue) -> TensorValue:
            return self.conv(x)

    net, alone = Net(), ours_torch.Conv1d(4, 8, 3, generator=0)
    x = RANDOM.standard_normal((2, 4, 9)).astype(np.float32)
    np.testing.assert_array_equal(max_conv.compile(net, alone.input_types())(x), alone(x))
    with pytest.raises(ValueError, match=r"conv1d: this layer's weights belong to a model, as 'conv\.weight'"):
        net.conv(x)


def test_new_weights_are_used() -> None:
    conv = ours_mlx.Conv1d(1, 1, 1, bias=False)
    x = np.ones((1, 3, 1), np.float32)
    for value in (2.0, 3.0):
        conv.load_state_dict({"weight": np.full((1, 1, 1), value, np.float32)})
        assert (conv(x) == value).all()


@pytest.mark.parametrize("dtype", [None, "float16", np.float64, np.dtype("float32"), torch.bfloat16, DType.float16])
def test_dtypes_by_any_name(dtype: Any) -> None:
    want = "float32" if dtype is None else str(getattr(dtype, "name", None) or getattr(dtype, "__name__", dtype))
    assert ours_torch.Conv1d(1, 1, 1, dtype=dtype).dtype.name == want.removeprefix("torch.")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: ours_torch.Conv1d(1, 1, (1, 2)),
            r"conv1d: kernel_size must be one int or a 1-tuple, but is \(1, 2\)\.",
        ),
        (lambda: ours_torch.Conv1d(1, 1, 1, dtype="int8x"), r"conv1d: dtype must be float32, .*, but is 'int8x'\."),
        (
            lambda: ours_torch.ConvTranspose1d(4, 6, 1, padding_mode="reflect"),
            r"conv_transpose1d: padding_mode must be zeros, but is 'reflect'\.",
        ),
        (
            lambda: ours_torch.ConvTranspose1d(4, 6, 1, dtype="int8"),
            r"conv_transpose1d: dtype must be one of float32, .*, but is int8\.",
        ),
        (lambda: ours_torch.Conv1d(4, 6, 1, groups=3), r"conv1d: 3 groups must divide in_channels=4"),
    ],
)
def test_refuses(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=sentence):
        make()
