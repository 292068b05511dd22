"""Checkpoints of every kind: read lazily and without losing a bit, or rejected with one sentence."""

import io
import json
import os
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from max_conv.weights.checkpoint import MARK, Checkpoint, open_checkpoint, read_layer
from max_conv.weights.marker import Marker
from max_conv.weights.safetensors_file import Spec, write_safetensors
from max_conv.weights.tensors import CODES, DTYPES, Tensor, as_array, of_array, rounded, values, width

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
FILTERS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, *FLOAT8]


def state() -> dict[str, torch.Tensor]:
    """A checkpoint with a filter of every floating dtype, NaN payloads included, and tensors of all other dtypes."""
    torch.manual_seed(0)
    tensors = {f"conv{i}.weight": torch.randn(8, 4, 3).to(dtype) for i, dtype in enumerate(FILTERS)}
    tensors["conv1.weight"].view(torch.int32)[0, 0, 0] = 0x7FC12345
    tensors["linear.weight"] = torch.randn(4, 4, 4)
    tensors["steps"] = torch.tensor(7)
    tensors["mask"] = torch.tensor([True, False])
    tensors["empty"] = torch.zeros(0, 3)
    for name in ("int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "complex64"):
        tensors[name] = torch.arange(3).to(getattr(torch, name))
    return tensors


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def as_torch(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    tensor = checkpoint.read(name)
    dtype = getattr(torch, DTYPES[tensor.dtype][0])
    return torch.from_numpy(tensor.bits.reshape(-1).view(np.uint8)).view(dtype).reshape(tensor.bits.shape)


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], suffix: str = "safetensors") -> Path:
    shards = {name: f"m-{i % 2}.{suffix}" for i, name in enumerate(tensors)}
    for shard in set(shards.values()):
        part = {n: t for n, t in tensors.items() if shards[n] == shard}
        save_file(part, folder / shard) if suffix == "safetensors" else torch.save(part, folder / shard)
    (folder / f"m.{suffix}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": shards}))
    return folder / f"m.{suffix}.index.json"


def saved(folder: Path, name: str, value: Any, **options: Any) -> Path:
    torch.save(value, folder / name, **options)
    return folder / name


def safe(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name, {"format": "pt"})
    return folder / name


KINDS: dict[str, Callable[[Path, dict[str, torch.Tensor]], Path]] = {
    "safetensors": lambda f, t: safe(f, "m.safetensors", t),
    "pt": lambda f, t: saved(f, "m.pt", t),
    "pth": lambda f, t: saved(f, "m.pth", t),
    "bin": lambda f, t: saved(f, "m.bin", t),
    "old": lambda f, t: saved(f, "m.pt", t, _use_new_zipfile_serialization=False),
    "state_dict": lambda f, t: saved(f, "m.pt", {"state_dict": t, "epoch": 3}),
    "model": lambda f, t: saved(f, "m.pt", {"optimizer": {"a": [1]}, "model": t}),
    "generator": lambda f, t: saved(f, "m.pt", {"generator": t}),
    "module.": lambda f, t: saved(f, "m.pt", {"model": {f"module.{n}": v for n, v in t.items()}}),
    "lightning": lambda f, t: saved(
        f, "m.ckpt", {"state_dict": t, "hyper_parameters": {"lr": 1e-3, "layers": [1, 2]}, "callbacks": {}}
    ),
    "sharded": write_shards,
    "sharded bin": lambda f, t: write_shards(f, t, "bin"),
    "directory": lambda f, t: safe(f, "some.safetensors", t).parent,
    "hugging face": lambda f, t: [safe(f, "model.safetensors", t), saved(f, "pytorch_model.bin", {})][0].parent,
    "sharded directory": lambda f, t: write_shards(f, t).parent,
    "strided": lambda f, t: saved(f, "m.pt", {n: v.mT.contiguous().mT if v.ndim > 1 else v for n, v in t.items()}),
    "parameters": lambda f, t: saved(f, "m.pt", {n: torch.nn.Parameter(v, False) for n, v in t.items()}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_reads_every_bit(kind: str, tmp_path: Path) -> None:
    want = state()
    if kind == "old":  # The format is older than some dtypes.
        late = {*FLOAT8, torch.uint16, torch.uint32, torch.uint64}
        want = {name: tensor for name, tensor in want.items() if tensor.dtype not in late}
    with open_checkpoint(KINDS[kind](tmp_path, want)) as checkpoint:
        assert set(checkpoint.names) == want.keys()
        for name, tensor in want.items():
            assert checkpoint.shape(name) == tuple(tensor.shape)
            assert same_bits(as_torch(checkpoint, name), tensor), name
            # Twice: pages that were given back to the file are read again.
            assert same_bits(as_torch(checkpoint, name), tensor), name


def test_every_dtype_has_a_name_in_torch() -> None:
    assert all(getattr(torch, name).itemsize == width(code) for name, code in CODES.items())


def test_large_tensors_come_in_pieces(tmp_path: Path) -> None:
    tensors = {"big": torch.randn(5_000_000), "turned": torch.randn(3000, 1000).T}
    for path in (saved(tmp_path, "a.pt", tensors), safe(tmp_path, "a.safetensors", {"big": tensors["big"]})):
        with open_checkpoint(path) as checkpoint:
            sizes = [piece.nbytes for piece in checkpoint.pieces("big")]
            assert len(sizes) > 2 and max(sizes) <= 4 << 20
            for name in checkpoint.names:
                assert same_bits(as_torch(checkpoint, name), tensors[name])


class Bomb:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("pwned",))


class Module(torch.nn.Conv1d):
    pass


def header(text: str, data: bytes = b"") -> bytes:
    return len(text.encode()).to_bytes(8, "little") + text.encode() + data


def entry(shape: Any = (2,), offsets: Any = (0, 2), dtype: Any = "U8", name: str = "a", **more: Any) -> str:
    return json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}})


GOOD = save({"a": torch.zeros(4, 2, 3), "b": torch.ones(5)})
HEADERS = {
    "truncated": (GOOD[:-5], r"its tensors have \d+ bytes, but the file has \d+ for them"),
    "cut in the header": (GOOD[:30], r"its header should have \d+ bytes, but the file has 30"),
    "longer": (GOOD + b"x", r"its tensors have \d+ bytes"),
    "rubbish": (b"not a checkpoint at all", "its header should have"),
    "empty": (b"", r"its header should have 0 bytes, but the file has 0"),
    "short": (b"\x02\0\0", "its header should have"),
    "huge claim": ((100 << 30).to_bytes(8, "little") + b"{}", "its header should have 107374182400 bytes"),
    "no object": (header("[]"), "its header is no JSON object"),
    "no JSON": (header("{nope"), "its header is not JSON"),
    "no text": ((2).to_bytes(8, "little") + b"\xff\xfe", "its header is not JSON"),
    "deep": (header("[" * 200_000), "its header is not JSON: too deeply nested"),
    "deep object": (header('{"a":' * 200_000), "its header is not JSON: too deeply nested"),
    "twice": (header(entry()[:-1] + "," + entry()[1:], b"12"), "a name occurs twice"),
    "overlap": (
        header(entry()[:-1] + "," + entry((2,), (1, 3), name="b")[1:], b"123"),
        "b begins at byte 1 of the data, where 2 was expected",
    ),
    "hole": (header(entry((2,), (1, 3)), b"123"), "a begins at byte 1 of the data, where 0 was expected"),
    "beyond": (header(entry((9,), (0, 9)), b"123"), r"its tensors have 9 bytes, but the file has 3"),
    "negative": (header(entry((-2,), (0, 2)), b"12"), r"a has the shape \[-2\]"),
    "backwards": (header(entry((2,), (2, 0)), b"12"), "a should have 2 bytes, but its place has -2"),
    "huge": (header(entry((1 << 40, 1 << 40), (0, 2)), b"12"), r"a has the shape \[1099511627776, "),
    "huge nothing": (header(entry((0, 1 << 62), (0, 0))), r"a has the shape \[0, "),
    "endless number": (header('{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,1]}}' % ("9" * 5000)), "not JSON"),
    "100 GB": (header(entry((100 << 30,), (0, 100 << 30)), b"12"), r"its tensors have \d+ bytes"),
    "many axes": (header(entry([1] * 65, (0, 1)), b"1"), "a has the shape"),
    "fraction": (header(entry((2.0,), (0, 2)), b"12"), r"a has the shape \[2\.0\]"),
    "truth": (header(entry((True,), (0, 1)), b"1"), "a has the shape"),
    "wrong size": (header(entry((3,), (0, 2)), b"12"), "a should have 3 bytes, but its place has 2"),
    "no offsets": (header('{"a":{"dtype":"U8","shape":[1]}}'), "a lacks dtype, shape and data_offsets alone"),
    "more": (header(entry(evil=1), b"12"), "a lacks dtype, shape and data_offsets alone"),
    "one offset": (header(entry(offsets=(2,)), b"12"), r"a has the data_offsets \[2\]"),
    "dtype": (header(entry(dtype="F4"), b"12"), "'F4', which is not supported"),
    "dtype list": (header(entry(dtype=["U8"]), b"12"), "which is not supported"),
    "metadata": (header('{"__metadata__":{"a":1}}'), "its metadata are not strings by name"),
    "metadata list": (header('{"__metadata__":[]}'), "its metadata are not strings by name"),
    "metadata false": (header('{"__metadata__":false}'), "its metadata are not strings by name"),
    "odd name": (header(entry(name="a\nb"), b"12"), r"names a tensor 'a\\nb', which is no name of a weight"),
    "surrogate": (header(entry(name="\ud800"), b"12"), r"names a tensor '\\ud800'"),
    "escape": (header(entry(name="\x1b[31m"), b"12"), r"names a tensor '\\x1b\[31m'"),
    "no name": (header(entry(name=""), b"12"), "names a tensor ''"),
    "mark": (header('{"__metadata__":{"max_conv.layout":"{"}}'), "layout marker that cannot be read"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_refuses_headers(kind: str, tmp_path: Path) -> None:
    content, sentence = HEADERS[kind]
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^checkpoint: .*{sentence}") as caught:
        with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
            Marker.of(checkpoint.metadata, checkpoint.source)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(tmp_path))


def repacked(path: Path, **options: Any) -> Path:
    """Rewrites an archive, compressed or with other claims."""
    with zipfile.ZipFile(path) as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def edited(path: Path, old: bytes, new: bytes) -> Path:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    return path


def claim(folder: Path) -> Path:
    """A file whose pickle claims that a storage has 100 GB."""
    path = saved(folder, "m.pt", {"a": torch.zeros(0x1234)})
    return edited(path, b"M\x34\x12", b"\x8a\x05\x00\x00\x00\x00\x19")


def unpickling(folder: Path, call: bytes) -> Path:
    """A file whose pickle calls something with 5 << 32, which PyTorch allows pickles to do."""
    path = saved(folder, "m.pt", {"a": torch.zeros(1)})
    with zipfile.ZipFile(path) as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            small = b"\x80\x02}q\x00X\x01\x00\x00\x00ac" + call + b"\n\x8a\x05\x00\x00\x00\x00\x05\x85Rs."
            archive.writestr(name, small if name.endswith("data.pkl") else content)
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def cut(path: Path) -> Path:
    """A file without its last 50 bytes."""
    return written(path, path.read_bytes()[:-50])


TORCH: dict[str, tuple[Callable[[Path], Path], str]] = {
    "pickle": (lambda f: saved(f, "m.pt", {"a": Bomb()}), r"it would run posix\.mkdir"),
    "old pickle": (
        lambda f: saved(f, "m.pt", {"a": Bomb()}, _use_new_zipfile_serialization=False),
        r"it would run posix\.mkdir",
    ),
    "module": (lambda f: saved(f, "m.pt", Module(1, 1, 1)), r"it would run \w*test_checkpoint\.Module"),
    "rubbish": (lambda f: written(f / "m.pt", b"PK nothing"), r"is damaged \("),
    "zip rubbish": (lambda f: written(f / "m.pt", b"PK\3\4 nothing"), r"is damaged \("),
    "empty": (lambda f: written(f / "m.pt", b""), r"is damaged \("),
    "truncated": (
        lambda f: cut(saved(f, "m.pt", state())),
        r"is damaged \(",
    ),
    "old truncated": (
        lambda f: cut(saved(f, "m.pt", {"a": torch.zeros(99)}, _use_new_zipfile_serialization=False)),
        r"is damaged \(",
    ),
    "compressed": (
        lambda f: repacked(saved(f, "m.pt", {"a": torch.zeros(1_000_000)}), compression=zipfile.ZIP_DEFLATED),
        r"is compressed, which torch\.save never does",
    ),
    "expanded": (
        lambda f: saved(f, "m.pt", {"a": torch.zeros(1).expand(100_000, 1_000_000)}),
        r"a in .* claims 400000000000 bytes, but the file has 4 for it; save a contiguous copy\.",
    ),
    "claim": (claim, r"is damaged \("),
    "bytearray": (lambda f: unpickling(f, b"builtins\nbytearray"), "it would make a bytearray"),
    "old bytearray": (
        lambda f: saved(f, "m.pt", {"a": bytearray(9)}, _use_new_zipfile_serialization=False),
        "it would make a bytearray",
    ),
    "nothing in a tensor": (lambda f: unpickling(f, b"torch\nByteTensor"), r"(claim|is damaged \()"),
    "tied": (
        lambda f: saved(f, "m.pt", {f"w{i}": value for value in [torch.zeros(9_000)] for i in range(1_000)}),
        r"its tensors claim 36000000 bytes, but the file has \d+\)\.$",
    ),
    "meta": (lambda f: saved(f, "m.pt", {"a": torch.zeros(3, device="meta")}), "a in .* is sparse, quantized or em"),
    "list": (lambda f: saved(f, "m.pt", [torch.zeros(1)]), "holds more than a state dict: a list; save module"),
    "number": (lambda f: saved(f, "m.pt", {"a": 1}), "holds more than a state dict: 'a' is a int; save module"),
    "inner number": (lambda f: saved(f, "m.pt", {"model": {"a": 1.5}}), "more than a state dict: 'a' is a float"),
    "sparse": (lambda f: saved(f, "m.pt", {"a": torch.eye(3).to_sparse()}), "a in .* is sparse, quantized or empty"),
    "complex": (
        lambda f: saved(f, "m.pt", {"a": torch.zeros(1, dtype=torch.complex128)}),
        "a in .* is complex128 of 1 axes",
    ),
    "odd name": (lambda f: saved(f, "m.pt", {"a\nb": torch.zeros(1)}), r"names a tensor 'a\\nb'"),
    "number as a name": (lambda f: saved(f, "m.pt", {3: torch.zeros(1)}), "names a tensor 3, which is no name"),
}


@pytest.mark.parametrize("kind", TORCH)
def test_refuses_torch_files(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, sentence = TORCH[kind]
    path = make(tmp_path)
    with pytest.raises(ValueError, match=rf"^checkpoint: .*{sentence}") as caught:
        open_checkpoint(path)
    said = str(caught.value)
    assert "\n" not in said and "\x1b" not in said and "weights_only" not in said
    assert list(tmp_path.iterdir()) == [path]


PLACES: dict[str, tuple[str, type[Exception], str]] = {
    "suffix": ("m.onnx", ValueError, r"checkpoint: .*m\.onnx must end in \.safetensors, \.index\.json, .* or \.ckpt\."),
    "missing": ("gone.pt", FileNotFoundError, r"checkpoint: there is no file .*gone\.pt\."),
    "index": ("bad.index.json", ValueError, r"checkpoint: .* is not an index of shards: it has no weight_map\."),
    "no names": ("list.index.json", ValueError, r"checkpoint: .* is not an index of shards: it has no weight_map\."),
    "deep": ("deep.index.json", ValueError, r"checkpoint: .* is not an index of shards: it has no weight_map\."),
    "itself": ("self.index.json", ValueError, r"checkpoint: .* the shard 'self\.index\.json', but shards must be"),
    "outside": ("up.index.json", ValueError, r"checkpoint: .* the shard '\.\./x\.safetensors', but shards must be"),
    "absolute": ("abs.index.json", ValueError, r"checkpoint: .* the shard '/etc/x\.safetensors', but shards must be"),
    "number": ("num.index.json", ValueError, r"checkpoint: .* names the shard 3, but shards must be in its folder\."),
    "short": ("short.index.json", ValueError, r"checkpoint: m\.safetensors lacks 'gone', which short\.index\.json"),
    "no shard": ("no.index.json", FileNotFoundError, r"checkpoint: there is no file .*x\.safetensors, a shard of no\."),
    "marks": ("marks.index.json", ValueError, r"checkpoint: the shards of .* differ in their layout marker; convert"),
    "empty folder": (
        "none",
        FileNotFoundError,
        r"checkpoint: the folder .*none has no file that ends in \.safetensors, \.index",
    ),
    "two": ("two", ValueError, r"checkpoint: the folder .*two has 2 checkpoints, a\.pt, b\.pt; name one of them\."),
    "scheme": (
        "ftp://x/m.pt",
        ValueError,
        r"assets: .* starts with ftp://, but only paths and pypi://, hf:// are known",
    ),
}


@pytest.mark.parametrize("kind", PLACES)
def test_refuses_places(kind: str, tmp_path: Path) -> None:
    save_file(state(), tmp_path / "m.safetensors")
    save_file(state(), tmp_path / "n.safetensors", {MARK: Marker("native").text()})
    (tmp_path / "m.onnx").write_text("")
    (tmp_path / "bad.index.json").write_text("{}")
    (tmp_path / "list.index.json").write_text('{"weight_map": []}')
    (tmp_path / "deep.index.json").write_text("[" * 100_000)
    maps = {"self": "self.index.json", "up": "../x.safetensors", "abs": "/etc/x.safetensors", "num": 3}
    maps |= {"no": "x.safetensors"}
    for name, shard in maps.items():
        (tmp_path / f"{name}.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    (tmp_path / "short.index.json").write_text('{"weight_map": {"gone": "m.safetensors"}}')
    both = {"weight_map": {"steps": "m.safetensors", "mask": "n.safetensors"}}
    (tmp_path / "marks.index.json").write_text(json.dumps(both))
    (tmp_path / "none").mkdir()
    (tmp_path / "two").mkdir()
    for name in "ab":
        (tmp_path / "two" / f"{name}.pt").touch()
    name, error, sentence = PLACES[kind]
    with pytest.raises(error, match=rf"^{sentence}"):
        open_checkpoint(name if "://" in name else tmp_path / name)


def test_a_sharded_checkpoint_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shard is fetched, too: the hub's files need not be in one folder."""
    index = write_shards(tmp_path, state())

    def resolve(reference: str) -> Path:
        name = reference.removeprefix("hf://org/repo@main/sub/")
        (tmp_path / name.replace(".", "_")).mkdir(exist_ok=True)
        return (tmp_path / name).rename(tmp_path / name.replace(".", "_") / name)

    monkeypatch.setattr("max_conv.weights.checkpoint.resolve", resolve)
    with open_checkpoint(f"hf://org/repo@main/sub/{index.name}") as checkpoint:
        assert set(checkpoint.names) == state().keys()
        assert all(same_bits(as_torch(checkpoint, name), tensor) for name, tensor in state().items())


def test_read_layer(tmp_path: Path) -> None:
    conv = torch.nn.Conv1d(4, 8, 3).to(torch.bfloat16)
    torch.save({f"enc.{name}": value for name, value in conv.state_dict().items()}, tmp_path / "m.pt")
    weights, dtype = read_layer(tmp_path / "m.pt", "enc")
    assert dtype.name == "bfloat16" and torch.equal(torch.from_dlpack(weights["weight"]), conv.weight.detach())
    torch.save({"net": {f"dec.{name}": value for name, value in conv.state_dict().items()}}, tmp_path / "key.pt")
    assert read_layer(tmp_path / "key.pt", "dec", key="net")[0].keys() == {"weight", "bias"}
    torch.save({"a.weight": torch.zeros(1, 1, 1).half(), "a.bias": torch.zeros(1)}, tmp_path / "mixed.pt")
    with pytest.raises(ValueError, match=r"checkpoint: a in .* mixes F16 and F32; cast one to the other\."):
        read_layer(tmp_path / "mixed.pt", "a")
    with pytest.raises(ValueError, match=r"checkpoint: .* has no tensor dec\.weight; it has enc\.weight, enc\.bias\."):
        read_layer(tmp_path / "m.pt", "dec")


@pytest.mark.parametrize("layout", ["native", "torch"])
def test_a_layer_of_the_other_layout(layout: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"c.weight": torch.zeros(3, 3, 3)}, path, {MARK: Marker(layout, ("c.weight",)).text()})
    read_layer(path, "c", native=layout == "native")
    with pytest.raises(ValueError, match=rf"^checkpoint: .* is marked as of {layout} layout; (pass|leave) --native"):
        read_layer(path, "c", native=layout != "native")


def test_a_file_that_shrinks(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(99_999)}, tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        os.truncate(tmp_path / "m.safetensors", 300)
        with pytest.raises(ValueError, match=r"^checkpoint: .* became shorter while it was read; a is incomplete\.$"):
            checkpoint.read("a")


def test_headers_have_a_limit(tmp_path: Path) -> None:
    with (tmp_path / "m.safetensors").open("wb") as file:
        file.write((40 << 20).to_bytes(8, "little"))
        file.truncate(50 << 20)
    with pytest.raises(ValueError, match=r"its header of 41943040 bytes is longer than 33554432\)\.$"):
        open_checkpoint(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"^checkpoint: a header of 3400\d{4} bytes would be longer than 33554432\.$"):
        write_safetensors(io.BytesIO(), {}, {"long": "x" * 34_000_000}, lambda name: [])


def test_a_writer_is_given_what_it_was_told() -> None:
    with pytest.raises(RuntimeError, match=r"^checkpoint: a has 3 bytes, but 4 were announced\.$"):
        write_safetensors(io.BytesIO(), {"a": Spec("U8", (4,))}, {}, lambda name: [np.zeros(3, np.uint8)])


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "m.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"^checkpoint: reading .*m\.pt needs PyTorch; install torch\.$"):
        open_checkpoint(tmp_path / "m.pt")


# Values and rounding.


@pytest.mark.parametrize("dtype", FILTERS)
def test_values_are_torch_s(dtype: torch.dtype) -> None:
    bits = np.arange(256 ** min(dtype.itemsize, 2), dtype=f"u{min(dtype.itemsize, 2)}")
    if dtype.itemsize > 2:
        bits = np.random.default_rng(0).integers(0, 256, 8 << 16, np.uint8).view(f"u{dtype.itemsize}")
    tensor = torch.from_numpy(bits.view(np.uint8)).view(dtype)
    code = CODES[str(dtype).removeprefix("torch.")]
    np.testing.assert_array_equal(values(Tensor(code, bits)), tensor.double().numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounds_once_and_to_even(dtype: torch.dtype) -> None:
    """Between every two neighbours: the middle, and values that differ from it by less than float32 can represent."""
    code = CODES[str(dtype).removeprefix("torch.")]
    if dtype == torch.float32:
        low = np.random.default_rng(0).integers(0, 0x7F7FFFFF, 60_000).astype(np.uint32)
    else:
        low = np.arange(0x7BFF if dtype == torch.float16 else 0x7F7F, dtype=np.uint16)
    below, above = (values(Tensor(code, low + low.dtype.type(i))) for i in (0, 1))
    middle = (below + above) / 2
    for sign in (1, -1):
        for array, want in (
            (middle, np.where(low & 1, above, below)),
            (np.nextafter(middle, 0), below),
            (np.nextafter(middle, np.inf), above),
            (below, below),
        ):
            np.testing.assert_array_equal(values(rounded(sign * array, code)), sign * want)
    odd = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0])
    np.testing.assert_array_equal(values(rounded(odd, code)), odd)
    with pytest.raises(OverflowError, match=re.escape("1e+300 is too large for")):
        rounded(np.array([1.0, 1e300, np.inf]), code)


def test_narrow_nans_stay_nans() -> None:
    low_payload = np.array([0x7FF0000000000001], np.uint64).view(np.float64)
    for code in ("F32", "F16", "BF16"):
        assert np.isnan(values(rounded(low_payload, code))).all()


def test_arrays_in_memory() -> None:
    arrays = {"a": np.arange(6, dtype=">f4").reshape(2, 3), "b": np.float16(2), "c": np.ones((4, 6))[:, ::2]}
    checkpoint = Checkpoint.of_arrays(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(values(checkpoint.read(name)), np.asarray(array, np.float64))
    with pytest.raises(TypeError, match=r"^tensors: checkpoints hold no arrays of object; cast it to float32\."):
        of_array(np.array([None]))


def test_dtypes_without_values() -> None:
    bits = np.zeros(3, np.uint8)
    with pytest.raises(ValueError, match=r"^tensors: NumPy has no float8_e8m0fnu; leave such tensors out\.$"):
        as_array(Tensor("F8_E8M0", bits))
    with pytest.raises(
        ValueError, match=r"^tensors: nothing is rounded to int8; choose float64, 32, 16 or bfloat16\.$"
    ):
        rounded(np.zeros(3), "I8")
