"""`max-conv convert` and its layers: biases, other libraries' layouts, pruning, batch norms by number, and how it ends."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_convert import call, good
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from max_conv.cli.main import main
from max_conv.conv.reference import conv1d_ref, conv_transpose1d_ref
from max_conv.weights.convert import LayerMap, Options, convert
from max_conv.weights.marker import MARK, Marker
from max_conv.weights.staging import LOCK


def refused(sentence: str, *arguments: Any) -> None:
    result = call(*arguments)
    last = result.stderr.strip().splitlines()[-1]
    assert result.exit_code == 2 and re.fullmatch(rf"max-conv: {sentence}", last), result.stderr


# A bias that does not fit.

BIAS = (
    r"convert: c\.bias of shape \(8,\) does not fit the {} filters of c\.weight, of shape \({}\), in .*; declare .*\."
)
SPOILT: dict[str, tuple[dict[str, torch.Tensor], list[str], str]] = {
    "conv as transposed": (
        {"c.weight": torch.ones(8, 5, 3), "c.bias": torch.ones(8)},
        ["--conv-transpose", "c.weight"],
        BIAS.format(5, "8, 5, 3"),
    ),
    "native without its marker": (
        {"c.weight": torch.ones(3, 5, 8), "c.bias": torch.ones(8)},
        ["--conv", "c.weight"],
        BIAS.format(3, "3, 5, 8"),
    ),
    "transposed as conv": (
        {"c.weight": torch.ones(5, 8, 3), "c.bias": torch.ones(8)},
        ["--conv", "c.weight"],
        BIAS.format(5, "5, 8, 3"),
    ),
    "groups that do not divide the channels": (
        {"c.weight": torch.ones(5, 4, 3), "c.bias": torch.ones(8)},
        ["--conv-transpose", "c.weight"],
        BIAS.format(4, "5, 4, 3"),
    ),
    "two axes": (
        {"c.weight": torch.ones(8, 5, 3), "c.bias": torch.ones(8, 1)},
        ["--conv", "c.weight"],
        r"convert: c\.bias of shape \(8, 1\) does not fit the 8 filters .*\.",
    ),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("verify", [[], ["--verify"], ["--dry-run"]], ids=["", "verify", "dry run"])
@pytest.mark.parametrize("case", SPOILT)
def test_a_bias_that_does_not_fit(case: str, verify: list[str], strict: bool, tmp_path: Path) -> None:
    tensors, declared, sentence = SPOILT[case]
    save_file(tensors, tmp_path / "m.safetensors")
    if strict:
        kind = declared[0].removeprefix("--").replace("-", "_")
        (tmp_path / "layers.toml").write_text(f'{kind} = ["c.weight"]\ncopy = ["*"]')
        declared = ["--map", str(tmp_path / "layers.toml")]
    before = sorted(tmp_path.iterdir())
    refused(sentence, tmp_path / "m.safetensors", tmp_path / "n.safetensors", *declared, *verify)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("to", ["native", "torch"])
def test_a_marked_file_whose_bias_does_not_fit(to: str, tmp_path: Path) -> None:
    tensors = {"c.weight": torch.ones(3, 5, 8), "c.bias": torch.ones(5)}
    save_file(tensors, tmp_path / "m.safetensors", {MARK: Marker("native", ("c.weight",)).text()})
    sentence = r"convert: c\.bias of shape \(5,\) does not fit the 8 filters of c\.weight, .*\."
    refused(sentence, tmp_path / "m.safetensors", tmp_path / "n.safetensors", "--to", to)


def test_a_bias_of_several_groups_fits_and_is_verified(tmp_path: Path) -> None:
    save_file(nn.ConvTranspose1d(6, 8, 5, groups=2).state_dict(), tmp_path / "m.safetensors")
    assert good(tmp_path / "m.safetensors", tmp_path / "n.safetensors", "--conv-transpose", "weight", "--verify")[
        "verified"
    ]


def test_verify_sees_a_bias_of_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["max_conv.weights.convert"]

    real = module.pieces

    def spoilt(checkpoint: Any, plan: Any, item: Any, dtype: str, eps: float) -> Any:
        if item.name == "bias":
            item = replace(item, sources={"w": "other"})
        return real(checkpoint, plan, item, dtype, eps)

    state = nn.ConvTranspose1d(6, 8, 5, groups=2).state_dict() | {"other": torch.ones(8)}
    save_file(state, tmp_path / "m.safetensors")
    monkeypatch.setattr(module, "pieces", spoilt)
    refused(
        r"verify: the layer weight gives another output than in PyTorch, off by .*",
        tmp_path / "m.safetensors",
        tmp_path / "n.safetensors",
        *("--conv-transpose", "weight", "--verify", "--dtype", "bf16"),
    )


def test_torch_cannot_compute_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nException raised from\nframe #1")

    save_file({"c.weight": torch.zeros(4, 1, 3)}, tmp_path / "m.safetensors")
    monkeypatch.setattr(nn.functional, "conv1d", fails)
    refused(
        r"verify: PyTorch cannot compute the layer of c\.weight, of shape \(4, 1, 3\) \(DefaultCPUAllocator: can't allocate "
        r"memory\); nothing was written\.",
        *(tmp_path / "m.safetensors", tmp_path / "n.safetensors", "--conv", "c.weight", "--verify"),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_verify_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"c.weight": torch.zeros(4, 1, 3)}, tmp_path / "m.safetensors")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(
        r"verify: comparing with PyTorch needs PyTorch; install torch\.",
        *(tmp_path / "m.safetensors", tmp_path / "n.safetensors", "--conv", "c.weight", "--verify"),
    )


@pytest.mark.parametrize("shape", [(4, 0, 3), (4, 1, 0), (0, 1, 3)])
def test_an_empty_filter_is_not_verified(shape: tuple[int, ...], tmp_path: Path) -> None:
    save_file({"c.weight": torch.zeros(shape)}, tmp_path / "m.safetensors")
    refused(
        r"verify: c\.weight of shape \(.*\) is empty, which is no layer's filter; declare it .*; nothing was written\.",
        *(tmp_path / "m.safetensors", tmp_path / "n.safetensors", "--conv", "c.weight", "--verify"),
    )


# Other libraries' layouts.


def test_filters_of_mlx(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 9, 4)).astype(np.float32)
    weights = {
        "c.weight": rng.standard_normal((6, 3, 2)).astype(np.float32),  # two groups
        "c.bias": rng.standard_normal(6).astype(np.float32),
        "up.weight": rng.standard_normal((5, 3, 4)).astype(np.float32),
        "up.bias": rng.standard_normal(5).astype(np.float32),
    }
    mx.save_safetensors(str(tmp_path / "m.safetensors"), {name: mx.array(value) for name, value in weights.items()})
    mx.savez(str(tmp_path / "m.npz"), **{name: mx.array(value) for name, value in weights.items()})
    declared = ["--source-layout", "mlx", "--conv", "c.*t", "--conv-transpose", "up.*t", "--verify"]
    for source in ("m.safetensors", "m.npz"):
        assert good(tmp_path / source, tmp_path / "n.safetensors", *declared, "--force")["verified"] == 2
        got = {name: value.numpy() for name, value in load_file(tmp_path / "n.safetensors").items()}
        want = mx.conv1d(mx.array(x), mx.array(weights["c.weight"]), groups=2) + mx.array(weights["c.bias"])
        y = conv1d_ref(x, got["c.weight"], got["c.bias"], groups=2, layout="NLC", filter_layout="SCF")
        np.testing.assert_allclose(y, np.array(want), atol=1e-5)
        want = mx.conv_transpose1d(mx.array(x), mx.array(weights["up.weight"]), 2) + mx.array(weights["up.bias"])
        y = conv_transpose1d_ref(x, got["up.weight"], got["up.bias"], stride=2, layout="NLC", filter_layout="SFC")
        np.testing.assert_allclose(y, np.array(want), atol=1e-5)
    # The inverse gives PyTorch's layout, for any source.
    good(tmp_path / "n.safetensors", tmp_path / "t.safetensors", "--to", "torch", "--verify")
    back = load_file(tmp_path / "t.safetensors")
    np.testing.assert_array_equal(back["c.weight"], weights["c.weight"].transpose(0, 2, 1))
    np.testing.assert_array_equal(back["up.weight"], weights["up.weight"].transpose(2, 0, 1))


def test_kernels_of_keras(tmp_path: Path) -> None:
    """Keras keeps (K, C, F), and (K, F, C) of transposed layers: the native orders."""
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = {
        "conv/kernel:0": rng.standard_normal((3, 4, 6)),
        "conv/bias:0": rng.standard_normal(6),
        "up/kernel:0": rng.standard_normal((5, 2, 4)),
        "up/bias:0": rng.standard_normal(2),
    }
    np.savez(tmp_path / "m.npz", **weights)
    declared = ["--source-layout", "keras", "--conv", "conv/kernel:0", "--conv-transpose", "up/kernel:0", "--verify"]
    facts = good(tmp_path / "m.npz", tmp_path / "n.safetensors", *declared)
    assert facts["verified"] == 2 and {row["layout"] for row in facts["tensors"]} == {"SCF", "SFC", ""}
    got = load_file(tmp_path / "n.safetensors")
    assert all(np.array_equal(got[name], value) for name, value in weights.items())
    good(tmp_path / "n.safetensors", tmp_path / "t.safetensors", "--to", "torch")
    assert load_file(tmp_path / "t.safetensors")["up/kernel:0"].shape == (4, 2, 5)
    wrong: dict[str, Any] = {"c/kernel:0": np.zeros((3, 4, 6)), "c/bias:0": np.zeros(3)}
    np.savez(tmp_path / "wrong.npz", **wrong)
    refused(
        r"convert: c/bias:0 of shape \(3,\) does not fit the 6 filters of c/kernel:0, of shape \(3, 4, 6\), in .*",
        *(tmp_path / "wrong.npz", tmp_path / "w.safetensors", "--source-layout", "keras", "--conv", "*kernel:0"),
    )


def test_a_batch_norm_of_mlx_is_folded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(4, 6, 3), busy(nn.BatchNorm1d(6))).eval()
    up = nn.Sequential(nn.ConvTranspose1d(4, 6, 3), busy(nn.BatchNorm1d(6))).eval()
    state = {f"a.{name}": value for name, value in net.state_dict().items()}
    state |= {f"b.{name}": value for name, value in up.state_dict().items()}
    state["a.0.weight"] = state["a.0.weight"].permute(0, 2, 1).contiguous()
    state["b.0.weight"] = state["b.0.weight"].permute(1, 2, 0).contiguous()
    save_file(state, tmp_path / "m.safetensors")
    declared = ["--source-layout", "mlx", "--conv", "a.0.weight", "--conv-transpose", "b.0.weight", "--verify"]
    good(tmp_path / "m.safetensors", tmp_path / "n.safetensors", *declared, "--fold-batchnorm", "*.{i}=*.{i+1}")
    good(tmp_path / "n.safetensors", tmp_path / "t.safetensors", "--to", "torch")
    folded = load_file(tmp_path / "t.safetensors")
    x = torch.randn(2, 4, 9)
    y = nn.functional.conv1d(x, folded["a.0.weight"], folded["a.0.bias"])
    torch.testing.assert_close(y, net(x), rtol=1e-4, atol=1e-4)
    y = nn.functional.conv_transpose1d(x, folded["b.0.weight"], folded["b.0.bias"])
    torch.testing.assert_close(y, up(x), rtol=1e-4, atol=1e-4)


def test_a_layout_that_nobody_has(tmp_path: Path) -> None:
    save_file({"c.weight": torch.ones(1, 1, 1)}, tmp_path / "m.safetensors")
    options = Options(source_layout="caffe")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"^convert: source_layout must be one of torch, native, mlx, .* is 'caffe'\.$"
    ):
        convert(tmp_path / "m.safetensors", tmp_path / "n.safetensors", LayerMap(conv=("*",)), options=options)


def test_a_marker_is_not_overruled(tmp_path: Path) -> None:
    save_file({"c.weight": torch.ones(1, 1, 1)}, tmp_path / "m.safetensors", {MARK: Marker("torch").text()})
    refused(
        r"convert: .*m\.safetensors is marked as of torch layout, not mlx; leave --source-layout out\.",
        *(tmp_path / "m.safetensors", tmp_path / "n.safetensors", "--source-layout", "mlx", "--conv", "c.weight"),
    )


# Pruning.


def pruned() -> nn.ModuleDict:
    torch.manual_seed(0)
    net = nn.ModuleDict({"a": nn.Conv1d(4, 6, 3), "up": nn.ConvTranspose1d(4, 6, 3), "line": nn.Linear(3, 3)})
    for layer in net.values():
        prune.random_unstructured(layer, "weight", 0.4)
    prune.random_unstructured(net["a"], "bias", 0.5)
    return net


@pytest.mark.parametrize("strict", [False, True])
def test_pruned_filters_are_folded(strict: bool, tmp_path: Path) -> None:
    net: Any = pruned()
    save_file(net.state_dict(), tmp_path / "m.safetensors")
    layers = LayerMap(
        conv=("a.weight",), conv_transpose=("up.weight",), copy=("line.weight", "*.bias") if strict else ()
    )
    report = convert(
        tmp_path / "m.safetensors",
        tmp_path / "n.safetensors",
        layers,
        options=Options(strict=strict, verify=True),
    )
    good(tmp_path / "n.safetensors", tmp_path / "t.safetensors", "--to", "torch")
    got = load_file(tmp_path / "t.safetensors")
    assert torch.equal(got["a.weight"], net["a"].weight) and torch.equal(got["up.weight"], net["up"].weight)
    assert torch.equal(got["a.bias"], net["a"].bias) and report.verified == 2
    assert (got["a.weight"] == 0).sum() == 29
    assert not strict or torch.equal(got["line.weight"], net["line"].weight)


def test_a_bias_with_weight_norm_is_folded(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning):
        layer = weight_norm(nn.Conv1d(4, 6, 3), "bias")
    save_file(layer.state_dict(), tmp_path / "m.safetensors")
    good(tmp_path / "m.safetensors", tmp_path / "n.safetensors", "--conv", "weight", "--verify")
    torch.testing.assert_close(load_file(tmp_path / "n.safetensors")["bias"], layer.bias)


class Half(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def state_with(name: str) -> dict[str, torch.Tensor]:
    state = pruned().state_dict()
    match name:
        case "orig alone":
            return {n: v for n, v in state.items() if "mask" not in n and "bias" not in n}
        case "vectors":
            layer = nn.utils.spectral_norm(nn.Conv1d(4, 6, 3))
            return {f"a.{n}": v for n, v in layer.state_dict().items() if n != "weight_u"}
        case "shape":
            return state | {"a.weight_mask": torch.ones(1)}
        case _:
            layer = nn.Conv1d(4, 6, 3)
            nn.utils.parametrize.register_parametrization(layer, "weight", Half())
            return {f"a.{n}": v for n, v in layer.state_dict().items()}


PARTS = {
    "orig alone": r"convert: a\.weight_orig is what spectral norm or pruning makes a\.weight of, but there is no "
    r"weight_u or weight_mask; remove them from the module and save it again\.",
    "vectors": r"convert: a\.weight_orig belongs to spectral norm of a\.weight, but a\.weight_u is missing\.",
    "shape": r"convert: pruning of a\.weight cannot be folded: a mask of shape \(1,\) does not belong to one of shape "
    r"\(6, 4, 3\)\.",
    "parametrization": r"convert: a\.parametrizations\.weight\.original is what a parametrization makes a\.weight of, and "
    r"only .* known; call .*remove_parametrizations and save again\.",
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", PARTS)
def test_parts_of_norms_are_called_what_they_are(case: str, tmp_path: Path) -> None:
    save_file(state_with(case), tmp_path / "m.safetensors")
    refused(PARTS[case], tmp_path / "m.safetensors", tmp_path / "n.safetensors", "--conv", "a.weight")


# Batch norms by number.


def busy(norm: nn.BatchNorm1d) -> nn.BatchNorm1d:
    for name, value in [*norm.named_parameters(), *norm.named_buffers()]:
        if name != "num_batches_tracked":
            nn.init.uniform_(value.data, 0.5, 2.0)
    return norm


def sequence(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[busy(layer) if isinstance(layer, nn.BatchNorm1d) else layer for layer in layers]).eval()


def test_a_sequential_is_folded_by_number(tmp_path: Path) -> None:
    layers = [
        nn.Conv1d(4, 6, 3),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        parametrizations.weight_norm(nn.Conv1d(6, 6, 3, bias=False)),
    ]
    layers += [
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Conv1d(6, 6, 1),
        nn.Conv1d(6, 5, 1),
        nn.BatchNorm1d(5),
        nn.Conv1d(5, 2, 1),
    ]
    net = nn.ModuleDict({"net": sequence(*layers)}).eval()
    torch.save(net.state_dict(), tmp_path / "m.pt")
    declared = [
        "--conv",
        "net.[0367].weight",
        "--conv",
        "net.9.weight",
        "--fold-batchnorm",
        "net.{i}=net.{i+1}",
        "--verify",
    ]
    facts = good(tmp_path / "m.pt", tmp_path / "n.safetensors", *declared)
    assert facts["verified"] == 5
    good(tmp_path / "n.safetensors", tmp_path / "t.safetensors", "--to", "torch")
    got = load_file(tmp_path / "t.safetensors")
    assert sorted(got) == sorted(f"net.{i}.{part}" for i in (0, 3, 6, 7, 9) for part in ("bias", "weight"))
    y = x = torch.randn(2, 4, 20)
    for i in (0, 3, 6, 7, 9):
        y = nn.functional.conv1d(y, got[f"net.{i}.weight"], got[f"net.{i}.bias"])
        y = y.relu() if i in (0, 3) else y
    torch.testing.assert_close(y, net["net"](x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("folding", ["net.{i}=net.{i+2}", "{i}.up={i}.norm"])
def test_a_transposed_layer_is_folded_by_number(folding: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    up, norm = nn.ConvTranspose1d(4, 6, 3, stride=2), busy(nn.BatchNorm1d(6)).eval()
    names = folding.replace("{i+2}", "5").replace("{i}", "3").split("=")
    modules = dict(zip(names, (up, norm)))
    state = {f"{name}.{n}": value for name, module in modules.items() for n, value in module.state_dict().items()}
    save_file(state, tmp_path / "m.safetensors")
    declared = ["--conv-transpose", f"{names[0]}.weight", "--fold-batchnorm", folding, "--verify"]
    good(tmp_path / "m.safetensors", tmp_path / "n.safetensors", *declared)
    good(tmp_path / "n.safetensors", tmp_path / "t.safetensors", "--to", "torch")
    got = load_file(tmp_path / "t.safetensors")
    assert got.keys() == {f"{names[0]}.weight", f"{names[0]}.bias"}
    x = torch.randn(2, 4, 9)
    y = nn.functional.conv_transpose1d(x, got[f"{names[0]}.weight"], got[f"{names[0]}.bias"], stride=2)
    torch.testing.assert_close(y, norm(up(x)), rtol=1e-4, atol=1e-4)


NORMS: dict[str, tuple[nn.Module, str, str]] = {
    "before, by number": (
        sequence(nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1)),
        "1=0",
        r"convert: 0 comes before 1, and a norm before a layer is not folded: it shifts .* the padding; keep it as it is\.",
    ),
    "before, by sign": (
        sequence(nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1)),
        "{i}={i-1}",
        r"convert: \{i-1\} must come after \{i\}, as \{i\+1\} comes after \{i\}; a norm before a layer is not folded: .*\.",
    ),
    "before, by size": (
        nn.ModuleDict({"conv": nn.Conv1d(4, 8, 1), "norm": nn.BatchNorm1d(4)}),
        "conv=norm",
        r"convert: norm of shape \(4,\) does not fit conv\.weight of shape \(8, 4, 1\), but its 4 channels, and a norm bef.*",
    ),
    "turned around": (
        nn.ModuleDict({"conv": nn.Conv1d(4, 4, 1), "norm": nn.BatchNorm1d(4)}),
        "norm=conv",
        r"convert: 'norm' names a batch norm, but the layer comes first, as in CONV=BN; a norm before a layer is not .*",
    ),
    "none there": (
        sequence(nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1)),
        "{i}={i+1}",
        r"convert: no filter belongs to a layer named like '\{i\}' and has a batch norm after it, whose .*",
    ),
    "number on one side": (
        sequence(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)),
        "{i}=1",
        r"convert: \{i\}=1 must have \{i\} once in the layer and \{i\+1\} in the norm, or neither\.",
    ),
    "bias": (
        nn.ModuleDict({"up": nn.ConvTranspose1d(4, 4, 1), "norm": nn.BatchNorm1d(8)}),
        "up=norm",
        r"convert: up\.bias of shape \(4,\) does not fit norm of shape \(8,\)\.",
    ),
}


@pytest.mark.parametrize("case", NORMS)
def test_norms_that_are_not_folded(case: str, tmp_path: Path) -> None:
    module, folding, sentence = NORMS[case]
    torch.save(module.state_dict(), tmp_path / "m.pt")
    kinds = {nn.Conv1d: "--conv", nn.ConvTranspose1d: "--conv-transpose"}
    declared = [
        word
        for name, layer in module.named_children()
        if type(layer) in kinds
        for word in (kinds[type(layer)], f"{name}.weight")
    ]
    refused(sentence, tmp_path / "m.pt", tmp_path / "n.safetensors", *declared, "--fold-batchnorm", folding)
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


# Keys, and messages.


def test_convert_with_a_key(tmp_path: Path) -> None:
    state = {"c.weight": torch.ones(2, 1, 3), "c._extra_state": {"a": 1}}
    torch.save({"model": state, "ema": {"c.weight": torch.zeros(2, 1, 3)}}, tmp_path / "m.pt")
    facts = good(tmp_path / "m.pt", tmp_path / "n.safetensors", "--conv", "c.weight")
    assert facts["dropped"] == ["c._extra_state"]
    assert facts["notes"] == [f"took model of {tmp_path / 'm.pt'}, which also has ema: --key takes another."]
    said = call(tmp_path / "m.pt", tmp_path / "n.safetensors", "--conv", "c.weight", "--force").stdout
    assert "which also has ema" in said.replace("\n", " ") and "left out: c._extra_state\n" in said
    good(tmp_path / "m.pt", tmp_path / "e.safetensors", "--conv", "c.weight", "--key", "ema")
    assert not load_file(tmp_path / "e.safetensors")["c.weight"].any()


def test_help_says_what_brackets_are() -> None:
    text = " ".join(call("--help").stdout.split())
    assert "[0] a class of characters, not a bracket" in text and "'conv[[]0].weight'" in text


def test_a_link_to_nowhere_is_in_the_way(tmp_path: Path) -> None:
    save_file({"c.weight": torch.ones(1, 1, 1)}, tmp_path / "m.safetensors")
    (tmp_path / "n.safetensors").symlink_to(tmp_path / "gone")
    arguments = [tmp_path / "m.safetensors", tmp_path / "n.safetensors", "--conv", "c.weight"]
    refused(r"convert: .*n\.safetensors exists already; pass --force to overwrite it\.", *arguments)
    assert (tmp_path / "n.safetensors").is_symlink()
    good(*arguments, "--force")
    assert (tmp_path / "n.safetensors").is_file() and not (tmp_path / "gone").exists()
    (tmp_path / "x").symlink_to(tmp_path / "gone")
    result = CliRunner().invoke(main, ["compile", "silero-vad", str(tmp_path / "x")])
    assert result.exit_code == 2 and "exists already; pass --force" in result.stderr


# Signals.

SLOW = """
import sys, time
import importlib

module = importlib.import_module("max_conv.weights.convert")
from max_conv.cli.main import main
real = module.write_safetensors
def slow(*arguments):
    real(*arguments)
    print("writing", flush=True)
    time.sleep(60)
module.write_safetensors = slow
main(["convert", *sys.argv[1:]])
"""


def started(folder: Path, target: str = "n.safetensors") -> subprocess.Popen:
    """Starts a conversion that has written its files, but has not yet moved them into place."""
    save_file({"c.weight": torch.ones(1, 1, 1)}, folder / "m.safetensors")
    arguments = [folder / "m.safetensors", folder / target, "--conv", "c.weight"]
    command = [sys.executable, "-c", SLOW, *map(str, arguments)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    assert run.stdout is not None and run.stdout.readline() == "writing\n"
    return run


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_signals_clean_up(name: str, status: int, tmp_path: Path) -> None:
    run = started(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    run.send_signal(getattr(signal, name))
    _, said = run.communicate(timeout=30)
    assert run.returncode == status
    assert said.splitlines()[-1] == f"max-conv: stopped by {name}; what was half done is removed."
    assert "Traceback" not in said and [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    killed, alive = started(tmp_path), started(tmp_path, "other.safetensors")
    killed.kill()
    killed.communicate(timeout=30)
    foreign = tmp_path / ".n.safetensors.backup12"  # a name like ours, but without our lock
    foreign.mkdir()
    (foreign / "precious").touch()
    (left,) = {*tmp_path.glob(".n.safetensors.*")} - {foreign}
    (working,) = tmp_path.glob(".other.safetensors.*")
    good(tmp_path / "m.safetensors", tmp_path / "new.safetensors", "--conv", "c.weight")
    assert not left.exists() and (working / LOCK).exists() and (foreign / "precious").exists()
    alive.terminate()
    alive.communicate(timeout=30)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"m.safetensors", "new.safetensors", foreign.name}


def test_a_link_to_a_folder_is_no_leftover(tmp_path: Path) -> None:
    save_file({"c.weight": torch.ones(1, 1, 1)}, tmp_path / "m.safetensors")
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / LOCK).touch()
    (tmp_path / ".n.safetensors.abcdefgh").symlink_to(tmp_path / "real")
    good(tmp_path / "m.safetensors", tmp_path / "n.safetensors", "--conv", "c.weight")
    assert (tmp_path / "real" / LOCK).exists()


def test_signals_are_left_to_who_handles_them(tmp_path: Path) -> None:
    """In a thread, and in a program that has its own handlers or ignores a signal."""
    save_file({"c.weight": torch.ones(1, 1, 1)}, tmp_path / "m.safetensors")
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        good(tmp_path / "m.safetensors", tmp_path / "n.safetensors", "--conv", "c.weight")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    work: Callable = lambda: good(tmp_path / "m.safetensors", tmp_path / "t.safetensors", "--conv", "c.weight")  # noqa: E731
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert (tmp_path / "t.safetensors").is_file() and signal.getsignal(signal.SIGTERM) == before
