"""`max-conv convert`: the output, the inverse conversion, the errors, and the memory that it needs."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import FILTERS, KINDS, same_bits, state, write_shards
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import max_conv
from max_conv.cli.main import main
from max_conv.weights.convert import LayerMap, Options, convert, read_native, to_native
from max_conv.weights.marker import MARK, SOURCE
from max_conv.weights.verify import verify

ROOT = Path(__file__).parents[2]


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


def good(*arguments: Any) -> dict[str, Any]:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return {name: json.loads(value) for name, value in file.metadata().items() if name.startswith("max_conv")}


class Net(torch.nn.Module):
    """Every naming of every norm, on both kinds of layers, and other tensors."""

    def __init__(self) -> None:
        super().__init__()
        conv, transposed = torch.nn.Conv1d, torch.nn.ConvTranspose1d
        torch.manual_seed(1)
        self.plain = conv(4, 8, 3)
        self.grouped = transposed(6, 8, 5, groups=2, bias=False)
        dims: tuple[Any, ...] = (0, 1, 2, None)  # PyTorch's annotations lack None
        for dim in dims:
            setattr(self, f"old{dim}", weight_norm(conv(4, 8, 3), dim=dim))
            setattr(self, f"new{dim}", parametrizations.weight_norm(transposed(4, 8, 3), dim=dim))
        self.one = weight_norm(conv(4, 1, 3))
        self.spectral = spectral_norm(conv(4, 8, 3))
        self.spectral_t = spectral_norm(transposed(4, 8, 3))
        self.spectral_new = parametrizations.spectral_norm(conv(4, 8, 3))
        self.spectral_new_t = parametrizations.spectral_norm(transposed(4, 8, 3))
        self.linear = torch.nn.Linear(3, 3)
        self.eval()
        for layer in (self.spectral, self.spectral_t):  # computes its weight when it is called
            layer(torch.zeros(1, 4, 9))

    def kind(self, name: str) -> str:
        kinds = {torch.nn.Conv1d: "conv", torch.nn.ConvTranspose1d: "conv_transpose", torch.nn.Linear: "copy"}
        return next(kind for cls, kind in kinds.items() if isinstance(getattr(self, name), cls))

    def layers(self) -> LayerMap:
        names: dict[str, list[str]] = {"conv": [], "conv_transpose": [], "copy": ["*.bias"]}
        for name, _ in self.named_children():
            names[self.kind(name)].append(f"{name}.weight")
        patterns: dict[str, Any] = {kind: tuple(found) for kind, found in names.items()}
        return LayerMap(**patterns)


@pytest.fixture(scope="module")
def net() -> Net:
    with pytest.warns(FutureWarning):
        return Net()


@pytest.fixture(scope="module")
def net_file(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    save_file(net.state_dict(), path)
    return path


def check_net(net: Net, weights: dict[str, np.ndarray]) -> None:
    for name, layer in net.named_children():
        assert isinstance(layer.weight, torch.Tensor)
        want = layer.weight.detach().double().numpy()
        got = weights[f"{name}.weight"]
        np.testing.assert_allclose(got if name == "linear" else got.transpose(2, 1, 0), want, rtol=1e-6, atol=1e-8)
    expected = {f"{name}.weight" for name, _ in net.named_children()}
    assert weights.keys() == expected | {name for name in net.state_dict() if name.endswith(".bias")}


def test_read_native_folds_every_norm(net: Net, net_file: Path) -> None:
    check_net(net, read_native(net_file, net.layers(), "net"))


def test_to_native_is_the_same(net: Net, net_file: Path) -> None:
    arrays = {name: value.numpy() for name, value in net.state_dict().items()}
    want = read_native(net_file, net.layers(), "net")
    assert all(np.array_equal(value, want[name]) for name, value in to_native(arrays, net.layers(), "net").items())


def test_a_native_file_reads_the_same(net: Net, net_file: Path, tmp_path: Path) -> None:
    convert(net_file, tmp_path / "n.safetensors", net.layers(), options=Options(verify=True))
    want = read_native(net_file, net.layers(), "net")
    got = read_native(tmp_path / "n.safetensors", net.layers(), "net")
    assert all(np.array_equal(value, want[name]) for name, value in got.items()) and got.keys() == want.keys()
    wrong = LayerMap(conv=("*.weight",), copy=("*.bias",))
    with pytest.raises(ValueError, match=r"^net: \w+\.weight is declared as conv, but .* marks it as \w+; convert the"):
        read_native(tmp_path / "n.safetensors", wrong, "net")


def test_weights_in_16_bits_are_read_as_float32(tmp_path: Path) -> None:
    save_file({"a.weight": torch.randn(2, 3, 4).bfloat16(), "n": torch.tensor(3)}, tmp_path / "m.safetensors")
    weights = read_native(tmp_path / "m.safetensors", LayerMap(conv=("a.*",), copy=("n",)), "net")
    assert weights["a.weight"].dtype == np.float32 and weights["n"].dtype == np.int64


# Lossless conversion, and the inverse.


@pytest.mark.parametrize("kind", ["safetensors", "pt", "lightning", "sharded", "directory"])
def test_there_and_back(kind: str, tmp_path: Path) -> None:
    want = state()
    (tmp_path / "source").mkdir()
    source = KINDS[kind](tmp_path / "source", want)
    native, back = tmp_path / "native.safetensors", tmp_path / "back.safetensors"
    rename = [r"^conv(\d)=encoder.\1.conv", "^steps$=count"]
    options = ["--conv", "encoder.?.conv.weight", "--rename", rename[0], "--rename", rename[1]]
    facts = good(source, native, *options, "--verify")
    assert facts["verified"] == len(FILTERS) and not facts["already"] and facts["dropped"] == []
    got = load_file(native)
    assert got.keys() == {name.replace("conv", "encoder.")[:9] + ".conv.weight" for name in want if "conv" in name} | {
        "count" if name == "steps" else name for name in want if "conv" not in name
    }
    for i in range(len(FILTERS)):
        assert same_bits(got[f"encoder.{i}.conv.weight"].permute(2, 1, 0), want[f"conv{i}.weight"])
    marker = metadata(native)[MARK]
    assert marker["layout"] == "native" and marker["conv"] == [f"encoder.{i}.conv.weight" for i in range(len(FILTERS))]
    good(native, back, "--to", "torch", "--verify")
    found = load_file(back)
    assert found.keys() == want.keys() and all(same_bits(found[name], tensor) for name, tensor in want.items())


def test_transposed_filters_come_back(tmp_path: Path) -> None:
    want = {f"up{i}.weight": torch.randn(6, 4, 3).to(dtype) for i, dtype in enumerate(FILTERS)}
    save_file(want, tmp_path / "m.safetensors")
    good(tmp_path / "m.safetensors", tmp_path / "n.safetensors", "--conv-transpose", "up*", "--verify")
    good(tmp_path / "n.safetensors", tmp_path / "t.safetensors", "--to", "torch")
    native, back = load_file(tmp_path / "n.safetensors"), load_file(tmp_path / "t.safetensors")
    for name, tensor in want.items():
        assert native[name].shape == (3, 4, 6) and same_bits(back[name], tensor)


@pytest.mark.parametrize("shards", [[], ["--max-shard-size", "300"]], ids=["one file", "shards"])
@pytest.mark.parametrize("to", ["native", "torch"])
def test_converting_again_changes_nothing(to: str, shards: list[str], tmp_path: Path) -> None:
    save_file(state(), tmp_path / "m.safetensors", {"author": "someone"})
    options = ["--conv", "conv?.weight", "--rename", "steps=count", "--dtype", "bf16", "--keep", "conv0.*", *shards]
    good(tmp_path / "m.safetensors", tmp_path / "a.safetensors", *options)
    first = "a.safetensors.index.json" if shards else "a.safetensors"
    if to == "torch":
        facts = good(tmp_path / first, tmp_path / "t.safetensors", "--to", "torch", *shards)
        first = Path(facts["files"][0]).name
    (tmp_path / "again").mkdir()
    facts = good(tmp_path / first, tmp_path / "again" / f"{first[0]}.safetensors", *options, "--to", to)
    assert facts["already"]
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name
    assert len(list((tmp_path / "again").iterdir())) == len(facts["files"]) == (9 if shards else 1)
    said = call(tmp_path / first, tmp_path / "words.safetensors", "--to", to)
    assert f"is {'native' if to == 'native' else 'PyTorch' + chr(39) + 's'} already" in said.stdout.replace("\n", " ")


def test_provenance_and_metadata(tmp_path: Path) -> None:
    save_file({"c.weight": torch.zeros(2, 1, 3)}, tmp_path / "a.safetensors", {"author": "someone"})
    good(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--conv", "c.*")
    digest = hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    assert metadata(tmp_path / "b.safetensors")[SOURCE] == {
        "tool": f"max_conv {max_conv.__version__}",
        "sha256": {"a.safetensors": digest},
    }
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata()["author"] == "someone"


# Norms from file to file.


def test_every_layer_of_the_net_is_verified(net: Net, net_file: Path, tmp_path: Path) -> None:
    filters = net.layers()
    lines = [f"{kind} = {json.dumps(list(getattr(filters, kind)))}" for kind in ("conv", "conv_transpose", "copy")]
    (tmp_path / "layers.toml").write_text("\n".join(lines))
    facts = good(net_file, tmp_path / "n.safetensors", "--map", tmp_path / "layers.toml", "--verify")
    assert facts["verified"] == len(filters.conv) + len(filters.conv_transpose)
    check_net(net, {name: value.numpy() for name, value in load_file(tmp_path / "n.safetensors").items()})


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norms_are_folded(affine: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    convs = [torch.nn.Conv1d(4, 6, 3), torch.nn.Conv1d(6, 6, 3, groups=3, bias=False)]
    convs += [parametrizations.weight_norm(torch.nn.Conv1d(6, 4, 1))]
    up = torch.nn.ConvTranspose1d(4, 6, 4, 2, groups=2)
    blocks = [torch.nn.Sequential(conv, torch.nn.BatchNorm1d(conv.out_channels, affine=affine)) for conv in convs]
    module = torch.nn.ModuleDict({"blocks": torch.nn.Sequential(*blocks), "up": up, "norm": torch.nn.BatchNorm1d(6)})
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm1d):
            layer.eps = 1e-3
            for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
                if name != "num_batches_tracked":
                    torch.nn.init.uniform_(value.data, 0.5, 2.0)
    module.eval()
    torch.save(module.state_dict(), tmp_path / "m.pt")
    folding = ["--fold-batchnorm", "blocks.*.0=blocks.*.1", "--fold-batchnorm", "up=norm", "--batchnorm-eps", "1e-3"]
    names = ["--conv", "blocks.*.0.weight", "--conv-transpose", "up.weight"]
    facts = good(tmp_path / "m.pt", tmp_path / "n.safetensors", *names, *folding, "--verify")
    assert facts["verified"] == 4
    good(tmp_path / "n.safetensors", tmp_path / "t.safetensors", "--to", "torch")
    folded = load_file(tmp_path / "t.safetensors")
    assert sorted(folded) == sorted(
        f"{n}.{part}" for n in ("up", *(f"blocks.{i}.0" for i in range(3))) for part in ("bias", "weight")
    )
    x = torch.randn(2, 4, 20)
    y = x
    for i, groups in enumerate((1, 3, 1)):
        y = torch.nn.functional.conv1d(y, folded[f"blocks.{i}.0.weight"], folded[f"blocks.{i}.0.bias"], groups=groups)
    torch.testing.assert_close(y, module["blocks"](x), rtol=1e-4, atol=1e-4)
    z = torch.nn.functional.conv_transpose1d(x, folded["up.weight"], folded["up.bias"], 2, groups=2)
    torch.testing.assert_close(z, module["norm"](up(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16), ("f32", torch.float32)])
def test_casts(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"c.weight": torch.randn(8, 4, 3), "wide": torch.randn(9).double(), "n": torch.arange(3)}
    tensors |= {"stays": torch.randn(9).double(), "small": torch.randn(9).to(torch.float8_e5m2)}
    save_file(tensors, tmp_path / "m.safetensors")
    options = ["--conv", "c.*", "--dtype", name, "--keep", "stays"]
    good(tmp_path / "m.safetensors", tmp_path / "n.safetensors", *options, "--verify")
    got = load_file(tmp_path / "n.safetensors")
    assert torch.equal(got["c.weight"].permute(2, 1, 0), tensors["c.weight"].to(dtype))
    assert got["wide"].dtype == dtype and torch.equal(got["small"].float(), tensors["small"].float())
    assert same_bits(got["stays"], tensors["stays"]) and same_bits(got["n"], tensors["n"])


def test_weight_norm_is_rounded_once(tmp_path: Path) -> None:
    layer = parametrizations.weight_norm(torch.nn.Conv1d(16, 16, 5))
    save_file(layer.state_dict(), tmp_path / "m.safetensors")
    good(tmp_path / "m.safetensors", tmp_path / "n.safetensors", "--conv", "weight", "--dtype", "bf16", "--verify")
    exact = layer.double().weight.detach()
    got = load_file(tmp_path / "n.safetensors")["weight"].permute(2, 1, 0)
    ulp = 2.0 ** (torch.floor(torch.log2(exact.abs())) - 7)
    assert ((got.double() - exact).abs() <= ulp / 2 * (1 + 1e-6)).all()


# Shards.


def test_shards_in_and_out(tmp_path: Path) -> None:
    tensors = {f"conv{i}.weight": torch.randn(4, 5, 5) for i in range(7)}
    source = write_shards(tmp_path, tensors)
    facts = good(source, tmp_path / "native.safetensors", "--conv", "*", "--max-shard-size", "0.85KB", "--verify")
    names = [Path(path).name for path in facts["files"]]
    assert names == ["native.safetensors.index.json", *(f"native-{i:05}-of-00004.safetensors" for i in range(1, 5))]
    index = json.loads((tmp_path / names[0]).read_text())
    assert index["metadata"]["total_size"] == 7 * 400 and index["weight_map"].keys() == tensors.keys()
    for name, shard in index["weight_map"].items():
        assert same_bits(load_file(tmp_path / shard)[name].permute(2, 1, 0), tensors[name])
    good(tmp_path / names[0], tmp_path / "back.safetensors", "--to", "torch")
    back = load_file(tmp_path / "back.safetensors")
    assert all(same_bits(back[name], tensor) for name, tensor in tensors.items())
    # Old shards are removed if there are fewer new ones.
    facts = good(source, tmp_path / "native.safetensors", "--conv", "*", "--max-shard-size", "2KB", "--force")
    assert sorted(path.name for path in tmp_path.glob("native*")) == sorted(Path(path).name for path in facts["files"])
    good(source, tmp_path / "native.safetensors", "--conv", "*", "--force")
    assert [path.name for path in tmp_path.glob("native*")] == ["native.safetensors"]


def test_a_checkpoint_is_converted_in_its_place(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "m.safetensors")
    good(tmp_path / "m.safetensors", tmp_path / "m.safetensors", "--conv", "conv1.weight", "--force")
    assert load_file(tmp_path / "m.safetensors")["conv1.weight"].shape == (3, 4, 8)


# Output.


def test_dry_run_shows_and_writes_nothing(net_file: Path, tmp_path: Path) -> None:
    result = call(
        net_file, "--dry-run", "--conv", "enc.plain.weight", "--conv", "*old*.weight", "--rename", "^plain=enc.plain"
    )
    assert result.exit_code == 0, result.stderr
    for cells in (
        ("plain.weight", "enc.plain.weight", "(3, 4, 8)", "float32", "FCS -> SCF"),
        ("oldNone.weight_g,", "oldNone.weight", "(3, 4, 8)", "float32", "FCS -> SCF"),
        ("grouped.weight", "grouped.weight", "(6, 4, 5)", "float32", "copied"),
    ):
        pattern = ".*".join(re.escape(cell) for cell in cells)
        assert re.search(pattern, result.stdout, re.DOTALL), result.stdout
    assert call(net_file, tmp_path / "n.safetensors", "--dry-run", "--conv", "plain.weight").exit_code == 0
    assert list(tmp_path.iterdir()) == [] and list(net_file.parent.iterdir()) == [net_file]


def test_what_is_copied_or_left_out_is_listed(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(1, 1, 1), "b": torch.zeros(1), "c": torch.zeros(1)}, tmp_path / "m.safetensors")
    said = call(tmp_path / "m.safetensors", tmp_path / "n.safetensors", "--conv", "a.*", "--ignore", "c").stdout
    assert "copied unchanged, because no pattern names them: b\n" in said and "left out: c\n" in said
    assert load_file(tmp_path / "n.safetensors").keys() == {"a.weight", "b"}


def test_odd_names_are_shown_as_they_are(tmp_path: Path) -> None:
    save_file({"[bold]x.weight": torch.zeros(1, 1, 1), "größe/✓ 1": torch.zeros(1)}, tmp_path / "m.safetensors")
    result = call(tmp_path / "m.safetensors", tmp_path / "n.safetensors", "--conv", "[[]bold]x.*")
    assert result.exit_code == 0 and "[bold]x.weight" in result.stdout and "größe/✓ 1" in result.stdout


def test_the_script_is_the_command(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts/convert_checkpoint.py")]
    run = subprocess.run([*script, "gone.pt", "x.safetensors"], capture_output=True, text=True, env=dict(os.environ))
    assert (run.returncode, run.stderr) == (2, "max-conv: checkpoint: there is no file gone.pt.\n")


def test_a_model_of_the_gallery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import max_conv.graphs.tcn as module

    monkeypatch.setattr(module, "LAYERS", LayerMap(conv=("weight",), copy=("bias",)))
    torch.save(torch.nn.Conv1d(2, 3, 4).state_dict(), tmp_path / "m.pt")
    good(tmp_path / "m.pt", tmp_path / "n.safetensors", "--model", "tcn", "--verify")
    assert load_file(tmp_path / "n.safetensors")["weight"].shape == (4, 2, 3)


def test_a_model_and_a_tensor_to_leave_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import max_conv.graphs.tcn as module

    monkeypatch.setattr(module, "LAYERS", LayerMap(conv=("weight",)))
    torch.save({"weight": torch.zeros(3, 2, 4), "training": torch.zeros(1)}, tmp_path / "m.pt")
    result = call(tmp_path / "m.pt", tmp_path / "n.safetensors", "--model", "tcn", "--verify", "--ignore", "training")
    assert result.exit_code == 0 and "layers that give PyTorch's output: 1" in result.stdout
    assert "writing" in result.stderr and "hashing" in result.stderr  # the bars
    assert call(tmp_path / "m.pt", "--conv", "weight").stderr.endswith("Error: Missing argument 'TARGET'.\n")


# The check finds errors.


@pytest.mark.parametrize("name", ["plain", "grouped", "new0", "spectral_t"])
def test_verify_names_a_wrong_layer(name: str, net: Net, net_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from max_conv.weights import build

    real = build.permute

    def broken(bits: np.ndarray, source: str, target: str) -> np.ndarray:
        turned = real(bits, source, target)
        return turned[::-1] if bits.shape == tuple(getattr(net, name).weight.shape) else turned

    monkeypatch.setattr(build, "permute", broken)
    patterns: dict[str, Any] = {net.kind(name): (f"{name}.weight",)}
    layers = LayerMap(**patterns)
    options = Options(verify=True, strict=False)
    with pytest.raises(ValueError, match=rf"^verify: the layer {name} gives another output than in PyTorch, off by "):
        convert(net_file, tmp_path / "n.safetensors", layers, options=options)
    assert list(tmp_path.iterdir()) == []


def test_verify_finds_one_wrong_value_and_one_wrong_bit(tmp_path: Path) -> None:
    from max_conv.weights.checkpoint import open_checkpoint
    from max_conv.weights.plan import plan_native

    tensors = {"a.weight": torch.randn(64, 32, 7), "a.bias": torch.randn(64), "b": torch.randn(9)}
    save_file(tensors, tmp_path / "m.safetensors")
    good(tmp_path / "m.safetensors", tmp_path / "n.safetensors", "--conv", "a.weight")
    for name, sentence in (
        ("a.weight", "the layer a gives"),
        ("a.bias", "(the layer a gives|a.bias should be)"),
        ("b", "b should be a copy"),
    ):
        native = load_file(tmp_path / "n.safetensors")
        native[name].view(-1)[5] *= 1.001
        save_file(native, tmp_path / "wrong.safetensors")
        with (
            open_checkpoint(tmp_path / "m.safetensors") as source,
            open_checkpoint(tmp_path / "wrong.safetensors") as target,
        ):
            plan = plan_native(source, LayerMap(conv=("a.weight",)), strict=False)
            with pytest.raises(ValueError, match=rf"^verify: {sentence}"):
                verify(source, plan, target)


# Errors: one sentence, exit code 2, no files left.

SPOILT = '"half*", "odd*", "intnorm*", "twins*", "spec.*"'
MAPS = {
    "good": 'conv = ["plain.weight"]\ncopy = ["*"]\nignore = ["spectral*"]',
    "unknown": 'convs = ["a"]',
    "text": 'conv = "a"',
    "numbers": "conv = [1]",
    "rule": 'rename = [["a"]]',
    "table": '[[rename]]\nold = "a"\n',
    "toml": "conv = [",
    "optional": 'optional = ["a"]',
    "incomplete": 'conv = ["plain.weight"]\ncopy = ["plain.bias"]',
    "missing": f'conv = ["plain.weight", "gone.*"]\ncopy = ["*"]\nignore = ["spectral*", {SPOILT}]',
    "spectral": f'conv = ["plain.weight"]\ncopy = ["*"]\nignore = [{SPOILT}]',
}
PLAIN = ["--conv", "plain.weight"]
REFUSED: dict[str, tuple[list[str], str]] = {
    "no pattern": ([], r"convert: name the filters with --conv PATTERN and .* nothing is guessed from shapes\."),
    "no match": (["--conv", "nope*"], r"convert: no tensor is named like 'nope\*'; net\.safetensors has .* \d+ more\."),
    "no filter": (
        ["--conv", "linear.weight"],
        r"convert: linear\.weight has shape \(3, 3\), but a filter has 3 axes; n",
    ),
    "both": (
        ["--conv", "plain.*t", "--conv-transpose", "plain.*t"],
        r"convert: plain\.weight is named both as conv and as conv_transpose; name it once\.",
    ),
    "two ways": (
        [*PLAIN, "--map", "good.toml"],
        r"convert: pass --model, --map, or --conv and --conv-transpose, but not",
    ),
    "no model": (["--model", "nope"], r"there is no model 'nope'; the gallery has crepe, "),
    "no map": (["--map", "gone.toml"], r"convert: there is no map gone\.toml\."),
    "map: key": (
        ["--map", "unknown.toml"],
        r"convert: the map unknown\.toml has the key 'convs', but only conv, conv_tr",
    ),
    "map: text": (["--map", "text.toml"], r"convert: conv in the map text\.toml must be a list\."),
    "map: numbers": (["--map", "numbers.toml"], r"convert: conv must be a list of strings, but is \[1\]\."),
    "map: rule": (["--map", "rule.toml"], r"convert: rename must be a list of pairs of strings, but is \[\['a'\]\]\."),
    "map: table": (
        ["--map", "table.toml"],
        r"convert: a rename in the map table\.toml must have old and new, and noth",
    ),
    "map: toml": (["--map", "toml.toml"], r"convert: the map toml\.toml is not TOML: "),
    "map: optional": (
        ["--map", "optional.toml"],
        r"convert: 'a' is optional, but no pattern of conv, conv_transpose or",
    ),
    "map: incomplete": (
        ["--map", "incomplete.toml"],
        r"convert: no pattern names .* and \d+ more; declare each as conv, conv_transpose or copy, or ignore it\.",
    ),
    "map: missing": (["--map", "missing.toml"], r"convert: no tensor is named like 'gone\.\*'; "),
    "map: spectral": (
        ["--map", "spectral.toml"],
        r"convert: spectral\w*\.weight has spectral norm, which is folded into f",
    ),
    "rename: rule": ([*PLAIN, "--rename", "(=x"], r"convert: the renaming rule '\(' -> 'x' is wrong: "),
    "rename: group": ([*PLAIN, "--rename", r"a=\9"], r"convert: the renaming rule 'a' -> '\\\\9' is wrong: "),
    "rename: spelling": ([*PLAIN, "--rename", "ab"], r"'ab' does not read OLD=NEW"),
    "rename: clash": (
        [*PLAIN, "--rename", r"^.*bias$=b"],
        r"convert: the renaming rules call both \w+\.bias and \w+\.bias b; ",
    ),
    "rename: nothing": (
        [*PLAIN, "--rename", r"^linear\.bias$="],
        r"convert: the renaming rules turn linear\.bias into '', w",
    ),
    "keep": (
        [*PLAIN, "--dtype", "f16", "--keep", "nope"],
        r"convert: no tensor is named like 'nope', which is to keep",
    ),
    "overflow": (
        ["--conv", "big.weight", "--dtype", "f16"],
        r"convert: big\.weight cannot be cast: 100000 is too large fo",
    ),
    "overflow of a copy": (
        [*PLAIN, "--dtype", "f16"],
        r"convert: big\.weight cannot be cast: .*; keep it as it is with --ke",
    ),
    "batch norm: none": (
        [*PLAIN, "--fold-batchnorm", "plain=bn"],
        r"convert: bn is to be folded into plain, but has no run",
    ),
    "batch norm: layer": (
        [*PLAIN, "--fold-batchnorm", "linear=bn"],
        r"convert: no filter belongs to a layer named like 'linear', whose batch norm is to be folded\.",
    ),
    "batch norm: stars": ([*PLAIN, "--fold-batchnorm", "a.*=b"], r"convert: a\.\*=b must have as many \* on one side"),
    "batch norm: size": (
        [*PLAIN, "--fold-batchnorm", "plain=norm"],
        r"convert: norm of shape \(5,\) does not fit plain\.we",
    ),
    "batch norm: twice": (
        ["--conv", "five.weight", "--fold-batchnorm", "five=norm", "--fold-batchnorm", "five=norm2"],
        r"convert: two batch norms are to be folded into five; name one\.",
    ),
    "batch norm: dtype": (
        ["--conv", "ints.weight", "--fold-batchnorm", "ints=norm"],
        r"convert: norm cannot be folded into ints\.weight, because one of them is not floating\.",
    ),
    "no partner": (
        ["--conv", "half.weight"],
        r"convert: half\.weight_g belongs to weight norm of half\.weight, but half\.w",
    ),
    "odd magnitude": (
        ["--conv", "odd.weight"],
        r"convert: weight norm of odd\.weight cannot be folded: a magnitude of sh",
    ),
    "odd vectors": (
        ["--conv", "spec.weight"],
        r"convert: spectral norm of spec\.weight cannot be folded: u \(2,\) and v",
    ),
    "int parts": (
        ["--conv", "intnorm.weight"],
        r"convert: intnorm\.weight_g of weight norm is I64, which cannot be folde",
    ),
    "twice there": (
        ["--conv", "twins.weight"],
        r"convert: net\.safetensors has both twins\.weight and its parts twins",
    ),
    "not marked": (
        [*PLAIN, "--to", "torch"],
        r"convert: net\.safetensors has no layout marker, which max-conv convert wr",
    ),
    "size": ([*PLAIN, "--max-shard-size", "2 cats"], r"'2 cats' is no size such as 2GB or 500MiB"),
    "dtype": ([*PLAIN, "--dtype", "f8"], r"'f8' is not one of"),
}


@pytest.fixture(scope="module")
def folder(net_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("refused")
    tensors = load_file(net_file) | {"big.weight": torch.full((1, 1, 1), 1e5), "five.weight": torch.ones(5, 2, 3)}
    tensors |= {"ints.weight": torch.ones(5, 2, 3, dtype=torch.int32), "half.weight_g": torch.ones(5, 1, 1)}
    for norm in ("norm", "norm2"):
        tensors |= {f"{norm}.running_mean": torch.zeros(5), f"{norm}.running_var": torch.ones(5)}
    tensors |= {"odd.weight_g": torch.ones(7, 1, 1), "odd.weight_v": torch.ones(5, 2, 3)}
    tensors |= {"intnorm.weight_g": torch.ones(5, 1, 1).long(), "intnorm.weight_v": torch.ones(5, 2, 3)}
    tensors |= {f"twins.{name}": torch.ones(5, 1, 1) for name in ("weight", "weight_g", "weight_v")}
    tensors |= {"spec.weight_orig": torch.ones(5, 2, 3), "spec.weight_u": torch.ones(2), "spec.weight_v": torch.ones(6)}
    save_file(tensors, path / "net.safetensors")
    for name, text in MAPS.items():
        (path / f"{name}.toml").write_text(text)
    return path


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_one_sentence(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    arguments, sentence = REFUSED[case]
    result = call("net.safetensors", "out.safetensors", *arguments)
    said = result.stderr.strip().splitlines()
    assert result.exit_code == 2 and re.search(sentence, said[-1]), result.stderr
    assert not [line for line in said if "Traceback" in line] and sorted(folder.iterdir()) == before
    if "no size" not in sentence and "not one of" not in sentence and "read OLD" not in sentence:
        assert [line for line in said if line.startswith("max-conv: ")] == said[-1:]


TARGETS: dict[str, tuple[str, str]] = {
    "suffix": ("x.bin", r"convert: the output must end in \.safetensors, but is x\.bin\."),
    "exists": ("m.safetensors", r"convert: m\.safetensors exists already; pass --force to overwrite it\."),
    "index exists": ("s.safetensors", r"convert: s\.safetensors\.index\.json exists already; pass --force to overw"),
    "no folder": ("no/x.safetensors", r"convert: there is no folder no; make it first\."),
    "folder": ("d.safetensors", r"convert: d\.safetensors is a folder; name a file\."),
}


@pytest.mark.parametrize("case", TARGETS)
def test_refuses_targets(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(state(), "m.safetensors")
    Path("s.safetensors.index.json").touch()
    Path("d.safetensors").mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    target, sentence = TARGETS[case]
    result = call("m.safetensors", target, "--conv", "conv1.weight")
    assert result.exit_code == 2 and re.search(sentence, result.stderr), result.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


MARKS: dict[str, tuple[str, str]] = {
    "not JSON": (
        "{",
        r"checkpoint: m\.safetensors has a layout marker that cannot be read; convert the original again",
    ),
    "deep": ("[" * 100_000, r"has a layout marker that cannot be read"),
    "another layout": ('{"layout":"MLX","conv":[],"conv_transpose":[],"renamed":{}}', r"marker that cannot be read"),
    "names": ('{"layout":"native","conv":[1],"conv_transpose":[],"renamed":{}}', r"marker that cannot be read"),
    "both": ('{"layout":"native","conv":["a"],"conv_transpose":["a"],"renamed":{}}', r"marker that cannot be read"),
    "no filter": (
        '{"layout":"native","conv":["a"],"conv_transpose":[],"renamed":{}}',
        r"convert: a is marked as a filter, but has shape \(1,\); convert the original again\.",
    ),
    "clash": (
        '{"layout":"native","conv":[],"conv_transpose":[],"renamed":{"a":"b"}}',
        r"convert: m\.safetensors gives two tensors one name; convert the original again\.",
    ),
    "odd name": (
        '{"layout":"native","conv":[],"conv_transpose":[],"renamed":{"a":"x\\ny"}}',
        r"marker that cannot be read",
    ),
}


@pytest.mark.parametrize("case", MARKS)
def test_refuses_markers(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, sentence = MARKS[case]
    save_file({"a": torch.zeros(1), "b": torch.ones(1)}, "m.safetensors", {MARK: text})
    result = call("m.safetensors", "x.safetensors", "--to", "torch")
    assert result.exit_code == 2 and re.search(sentence, result.stderr), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["max_conv.weights.convert"]  # the package's attribute of this name is the function

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "x")

    save_file(state(), tmp_path / "m.safetensors")
    monkeypatch.setattr(module, "write_safetensors", full)
    result = call(tmp_path / "m.safetensors", tmp_path / "x.safetensors", "--conv", "conv1.weight")
    assert result.exit_code == 2 and result.stderr.endswith("max-conv: x: No space left on device.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


# Memory.

MEASURE = """
import gc, sys, torch
import max_conv.weights.convert, max_conv.weights.verify
from max_conv.weights.convert import LayerMap, Options, convert
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
if sys.argv[1].endswith("t"):
    torch.load(sys.argv[3], weights_only=True, mmap=True)
before = peak()
convert(sys.argv[1], sys.argv[2], LayerMap(conv=("conv*",), copy=("embedding*",)), options=Options(dtype=sys.argv[4] or None))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("suffix", "dtype"), [("safetensors", "BF16"), ("pt", "")])
def test_memory_stays_near_one_tensor(suffix: str, dtype: str, tmp_path: Path) -> None:
    """240 MB in tensors of 10 MB and one of 80 MB, which is only copied: all resident memory counts."""
    tensors = {f"conv{i}.weight": torch.randn(512, 512, 10) for i in range(16)} | {"embedding": torch.randn(20_000_000)}
    path = tmp_path / f"big.{suffix}"
    torch.save(tensors, path) if suffix == "pt" else save_file(tensors, path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "small.pt")
    del tensors
    arguments = [path, tmp_path / "out.safetensors", tmp_path / "small.pt", dtype]
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)], capture_output=True, text=True, env=dict(os.environ)
    )
    assert run.returncode == 0, run.stderr
    grown = int(run.stdout)
    print(f"{suffix} {dtype or 'as it is'}: {grown / 1e6:.0f} MB for {path.stat().st_size / 1e6:.0f} MB")
    assert grown < 60e6
    path.unlink()


def test_help_needs_no_numpy() -> None:
    code = "import sys; import max_conv.cli.main; print({'numpy', 'rich', 'torch', 'max'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert run.stdout == "set()\n", run.stderr
