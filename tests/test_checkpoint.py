"""The converter: lossless, declared by name, and never half a file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from max_conv.checkpoint import MARK, convert, fold_weight_norm, read_checkpoint, read_layer

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def state() -> dict[str, torch.Tensor]:
    """A checkpoint with a filter of every dtype, NaN payloads among them, and tensors that must not be touched."""
    torch.manual_seed(0)
    tensors = {f"conv{i}.weight": torch.randn(8, 4, 3).to(dtype) for i, dtype in enumerate(DTYPES)}
    tensors["conv1.weight"].view(torch.int32)[0, 0, 0] = 0x7FC12345
    tensors["linear.weight"] = torch.randn(4, 4, 4)
    tensors["steps"] = torch.tensor(7)
    tensors["mask"] = torch.tensor([True, False])
    tensors["empty"] = torch.zeros(0, 3)
    return tensors


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


@pytest.fixture(params=["safetensors", "pt", "pth", "bin", "wrapped", "sharded"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tensors = state()
    match request.param:
        case "safetensors":
            save_file(tensors, tmp_path / "m.safetensors", {"format": "pt"})
            return tmp_path / "m.safetensors"
        case "wrapped":
            torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "m.pt")
            return tmp_path / "m.pt"
        case "sharded":
            shards = {name: f"m-{i % 2}.safetensors" for i, name in enumerate(tensors)}
            for shard in set(shards.values()):
                save_file({n: t for n, t in tensors.items() if shards[n] == shard}, tmp_path / shard)
            (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
            return tmp_path / "m.safetensors.index.json"
        case suffix:
            torch.save(tensors, tmp_path / f"m.{suffix}")
            return tmp_path / f"m.{suffix}"


def test_converts_without_losing_a_bit(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "native.safetensors"
    done = convert(source, target, ["conv?.weight"])
    assert done == {f"conv{i}.weight": ((8, 4, 3), (3, 4, 8)) for i in range(len(DTYPES))}
    got, want = load_file(target), state()
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert same_bits(got[name].permute(2, 1, 0) if name in done else got[name], tensor), name
    assert json.loads(read_checkpoint(target)[1][MARK])["layout"] == "SCF"


def test_metadata_is_kept(tmp_path: Path) -> None:
    save_file({"c.weight": torch.zeros(2, 1, 3)}, tmp_path / "a.safetensors", {"author": "someone"})
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", ["c.weight"], layout="FSC", to="CFS")
    tensors, metadata = read_checkpoint(tmp_path / "b.safetensors")
    assert metadata["author"] == "someone" and tensors["c.weight"].bits.shape == (3, 2, 1)


class Bomb:
    def __reduce__(self) -> tuple:
        return (Path("/nowhere/pwned").write_text, ("x",))


def hostile(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / ("m.pt" if kind in ("pickle", "rubbish pt", "list") else "m.safetensors")
    good = tmp_path / "good.safetensors"
    save_file(state(), good)
    match kind:
        case "truncated":
            path.write_bytes(good.read_bytes()[:-5])
        case "rubbish":
            path.write_bytes(b"not a checkpoint at all")
        case "empty":
            path.write_bytes(b"")
        case "huge claim":
            path.write_bytes((100 << 30).to_bytes(8, "little") + b"{}")
        case "bad header":
            path.write_bytes((2).to_bytes(8, "little") + b"[]")
        case "pickle":
            torch.save({"a": Bomb()}, path)
        case "rubbish pt":
            path.write_bytes(b"PK nothing")
        case "list":
            torch.save([torch.zeros(1)], path)
    good.unlink()
    return path


@pytest.mark.parametrize(
    "kind", ["truncated", "rubbish", "empty", "huge claim", "bad header", "pickle", "rubbish pt", "list"]
)
def test_refuses_damaged_and_hostile_files(tmp_path: Path, kind: str) -> None:
    path = hostile(tmp_path, kind)
    with pytest.raises(ValueError, match=r"^checkpoint: .*(is not a|holds more than a state dict)") as caught:
        convert(path, tmp_path / "out.safetensors", ["*"])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no pattern": ({"filters": []}, r"convert: name the Conv1d filters with --conv PATTERN; nothing is guessed"),
    "no match": ({"filters": ["nope*"]}, r"convert: no tensor is named like 'nope\*'; the file has .* and \d+ more\."),
    "no filter": ({"filters": ["steps"]}, r"convert: steps has shape \(\), but a Conv1d filter has 3 axes"),
    "layout": ({"layout": "XYZ"}, r"conv1d: filter_layout must be one of SCF, .*, but is 'XYZ'\."),
    "suffix": ({"source": "m.onnx"}, r"checkpoint: .*m\.onnx must end in \.safetensors, "),
    "missing": ({"source": "gone.pt"}, r"checkpoint: there is no file .*gone\.pt\."),
    "suffix of the output": (
        {"target": "x.onnx"},
        r"convert: the output must end in \.safetensors, but is .*x\.onnx\.",
    ),
    "exists": (
        {"target": "m.safetensors"},
        r"convert: .*m\.safetensors exists already; pass --force to overwrite it\.",
    ),
    "index": ({"source": "bad.index.json"}, r"checkpoint: .* is not an index of shards: it has no weight_map\."),
    "no names": ({"source": "list.index.json"}, r"checkpoint: .* is not an index of shards: it has no weight_map\."),
    "itself": ({"source": "self.index.json"}, r"checkpoint: .* names the shard 'self\.index\.json', but shards must"),
    "outside": ({"source": "up.index.json"}, r"checkpoint: .* names the shard '\.\./x\.safetensors', but shards must"),
    "short": ({"source": "short.index.json"}, r"checkpoint: m\.safetensors lacks gone, which short\.index\.json says"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refuses(case: str, tmp_path: Path) -> None:
    save_file(state(), tmp_path / "m.safetensors")
    (tmp_path / "m.onnx").write_text("")
    (tmp_path / "bad.index.json").write_text("{}")
    (tmp_path / "list.index.json").write_text('{"weight_map": []}')
    (tmp_path / "self.index.json").write_text('{"weight_map": {"a": "self.index.json"}}')
    (tmp_path / "up.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    (tmp_path / "short.index.json").write_text('{"weight_map": {"gone": "m.safetensors"}}')
    before = sorted(tmp_path.iterdir())
    changes, sentence = REFUSED[case]
    options = {"source": "m.safetensors", "target": "out.safetensors", "filters": ["conv1.weight"], **changes}
    with pytest.raises((ValueError, OSError), match=sentence):
        convert(tmp_path / options.pop("source"), tmp_path / options.pop("target"), options.pop("filters"), **options)
    assert sorted(tmp_path.iterdir()) == before


def test_a_converted_file_is_not_converted_again(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "m.safetensors")
    convert(tmp_path / "m.safetensors", tmp_path / "a.safetensors", ["conv1.weight"])
    with pytest.raises(ValueError, match=r"was converted already"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", ["conv1.weight"])
    convert(tmp_path / "m.safetensors", tmp_path / "a.safetensors", ["conv1.weight"], force=True)


def test_read_layer(tmp_path: Path) -> None:
    conv = torch.nn.Conv1d(4, 8, 3).to(torch.bfloat16)
    torch.save({f"enc.{name}": value for name, value in conv.state_dict().items()}, tmp_path / "m.pt")
    weights, dtype = read_layer(tmp_path / "m.pt", "enc")
    assert dtype.name == "bfloat16" and torch.equal(torch.from_dlpack(weights["weight"]), conv.weight.detach())
    torch.save({"a.weight": torch.zeros(1, 1, 1).half(), "a.bias": torch.zeros(1)}, tmp_path / "mixed.pt")
    with pytest.raises(ValueError, match=r"checkpoint: a in .* mixes F16 and F32; cast one to the other\."):
        read_layer(tmp_path / "mixed.pt", "a")
    with pytest.raises(ValueError, match=r"checkpoint: .* has no tensor dec\.weight; it has enc\.weight, enc\.bias\."):
        read_layer(tmp_path / "m.pt", "dec")


@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_fold_weight_norm(dim: int | None) -> None:
    v = torch.randn(4, 3, 5, dtype=torch.float64)
    shape = [n if axis == dim else 1 for axis, n in enumerate(v.shape)]
    g = torch.rand(shape, dtype=torch.float64)
    want = torch._weight_norm(v, g, -1 if dim is None else dim)
    np.testing.assert_allclose(fold_weight_norm(g.numpy(), v.numpy(), dim), want.numpy(), rtol=1e-12)
