"""Sources of checkpoints: other tools' files, files of training scripts, and files that are not checkpoints."""

import argparse
import collections
import datetime
import io
import json
import os
import pathlib
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from test_checkpoint import written

from max_conv.weights.checkpoint import open_checkpoint, read_layer
from max_conv.weights.convert import LayerMap, read_native
from max_conv.weights.tensors import as_array

W = {"a.weight": torch.arange(6.0).reshape(1, 2, 3), "a.bias": torch.ones(1)}


def saved(folder: Path, value: Any, name: str = "m.pt", **options: Any) -> Path:
    torch.save(value, folder / name, **options)
    return folder / name


def names(path: Path, key: str | None = None) -> list[str]:
    with open_checkpoint(path, key) as checkpoint:
        return checkpoint.names


# Files that other tools write.


def test_mlx_writes_no_metadata(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "m.safetensors"), {"a": mx.arange(3)})
    assert b'"__metadata__":null' in (tmp_path / "m.safetensors").read_bytes()
    assert names(tmp_path / "m.safetensors") == ["a"]


@pytest.mark.parametrize("suffix", [".pth.tar", ".tar", ".pt.tar", ".ckpt"])
def test_endings_of_torch_files(suffix: str, tmp_path: Path) -> None:
    assert names(saved(tmp_path, {"state_dict": W}, f"m{suffix}")) == list(W)


@pytest.mark.parametrize(("count", "size"), [(9, 64), (100, 512), (2000, 8)])
def test_a_tensor_of_many_names(count: int, size: int, tmp_path: Path) -> None:
    value = torch.randn(size, size, 5)
    with open_checkpoint(saved(tmp_path, {f"step.{i}.weight": value for i in range(count)})) as checkpoint:
        assert len(checkpoint.names) == count
        np.testing.assert_array_equal(as_array(checkpoint.read(f"step.{count - 1}.weight")), value.numpy())


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "module.module.module."]
)
def test_prefixes_go_to_the_end(prefix: str, tmp_path: Path) -> None:
    assert names(saved(tmp_path, {f"{prefix}{name}": value for name, value in W.items()})) == list(W)
    shared = {f"{prefix}{name}": value for name, value in W.items()} | {"module.x": torch.zeros(1)}
    if prefix.startswith("module."):
        assert [name for name in names(saved(tmp_path, shared)) if name.startswith("module.")] == [
            name for name in [f"{prefix.removeprefix('module.')}{n}" for n in W] if name.startswith("module.")
        ]
    assert names(saved(tmp_path, {"module.": torch.zeros(1)})) == ["module."]


def test_entries_that_are_no_weights_are_left_out(tmp_path: Path) -> None:
    extra = {"_extra_state": {"version": 1}, "a._extra_state": torch.zeros(2), "a.running": None}
    with open_checkpoint(saved(tmp_path, {**W, **extra})) as checkpoint:
        assert checkpoint.names == list(W) and checkpoint.left_out == list(extra)
    moved = {f"module.{name}": value for name, value in W.items()} | {"module._extra_state": None}
    assert names(saved(tmp_path, moved)) == list(W)


# .npz


def npz(folder: Path, save: Callable = np.savez, **arrays: Any) -> Path:
    save(folder / "m.npz", **arrays)
    return folder / "m.npz"


ARRAYS: dict[str, np.ndarray | np.generic] = {
    "conv.weight": np.arange(24.0, dtype=np.float32).reshape(4, 3, 2),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "big": np.arange(5, dtype=">f8"),
    "half": np.array([1.5, np.nan], np.float16),
    "empty": np.zeros((0, 3)),
    "scalar": np.int32(7),
    "flags": np.array([True, False]),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(save: Callable, tmp_path: Path) -> None:
    path = npz(tmp_path, save, **ARRAYS)
    for source in (path, tmp_path):
        with open_checkpoint(source) as checkpoint:
            assert checkpoint.names == list(ARRAYS)
            for name, array in ARRAYS.items():
                got = as_array(checkpoint.read(name))
                np.testing.assert_array_equal(got, array)
                assert got.dtype == (np.float32 if name == "half" else array.dtype.newbyteorder("=")), name


@pytest.mark.parametrize("save", [mx.savez, mx.savez_compressed])
def test_npz_of_mlx(save: Callable, tmp_path: Path) -> None:
    save(str(tmp_path / "m.npz"), **{"conv.weight": mx.arange(6.0).reshape(1, 2, 3)})
    with open_checkpoint(tmp_path / "m.npz") as checkpoint:
        np.testing.assert_array_equal(as_array(checkpoint.read("conv.weight")), np.arange(6.0).reshape(1, 2, 3))


def packed(folder: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(folder / "m.npz", "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return folder / "m.npz"


def npy(array: Any, cut: int = 0) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()[: -cut or None]


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def lying(folder: Path) -> Path:
    """An archive whose data has a wrong checksum."""
    content = bytearray(packed(folder, {"a.npy": npy(np.zeros(40_000))}, zipfile.ZIP_STORED).read_bytes())
    content[200_000] ^= 1
    (folder / "m.npz").write_bytes(content)
    return folder / "m.npz"


NPZ: dict[str, tuple[Callable[[Path], Path], str]] = {
    "rubbish": (lambda f: written(f / "m.npz", b"rubbish"), r"is damaged \(File is not a zip"),
    "pickle": (lambda f: npz(f, a=np.array([None, {}])), r"a in .*m\.npz is object of 1 axes, which is not supported"),
    "structured": (lambda f: npz(f, a=np.zeros(2, [("x", "f4")])), "a in .* is void32 of 1 axes, which is not supp"),
    "text": (lambda f: npz(f, a=np.array(["x"])), "a in .* is str32 of 1 axes, which is not supported"),
    "bomb": (
        lambda f: packed(f, {"a.npy": npy(np.zeros(80 << 20, np.uint8))}),
        r"its arrays claim 8388\d+ bytes, but the file has \d+\)",
    ),
    "no array": (lambda f: packed(f, {"a.txt": b"text"}), r"'a\.txt' is no array, or is there twice"),
    "no header": (lambda f: packed(f, {"a.npy": b"text"}), r"is damaged \("),
    "short": (lambda f: packed(f, {"a.npy": npy(np.zeros(9), 8)}), "a should have 72 bytes, but its place has 64"),
    "negative": (
        lambda f: packed(f, {"a.npy": header("{'descr':'<f8','fortran_order':False,'shape':(-1,-1)}") + bytes(8)}),
        "a should have 8 bytes, but its place has 8",
    ),
    "code": (lambda f: packed(f, {"a.npy": header("{'descr':print(1)}")}), r"is damaged \("),
    "bzip2": (
        lambda f: packed(f, {"a.npy": npy(np.zeros(4))}, zipfile.ZIP_BZIP2),
        r"'a\.npy' is compressed in a way that numpy\.savez never uses",
    ),
    "odd name": (lambda f: packed(f, {"a\nb.npy": npy(np.zeros(4))}), r"names a tensor 'a\\nb', which is no name"),
    "many axes": (
        lambda f: packed(
            f, {"a.npy": header(f"{{'descr':'<f8','fortran_order':False,'shape':{(1,) * 40}}}") + bytes(8)}
        ),
        "a in .* is float64 of 40 axes, which is not supported",
    ),
}


@pytest.mark.parametrize("kind", NPZ)
def test_refuses_npz(kind: str, tmp_path: Path) -> None:
    make, sentence = NPZ[kind]
    with pytest.raises(ValueError, match=rf"^checkpoint: .*{sentence}.*\.$") as caught:
        open_checkpoint(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_npz_that_is_damaged_inside(tmp_path: Path) -> None:
    with open_checkpoint(lying(tmp_path)) as checkpoint:
        with pytest.raises(ValueError, match=r"^checkpoint: .* is damaged \(Bad CRC-32 for file 'a\.npy'\)\.$"):
            checkpoint.read("a")


# Objects around the state dict.


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ({"net": {"decoder": W, "other": {"x": torch.zeros(1)}}}, "net.decoder"),
        ({"model": {"b": torch.zeros(1)}, "model_ema": W}, "model_ema"),
        ({"weight": W, "sr": "40k"}, "weight"),
        ({"net.decoder": W}, "net.decoder"),
        ({"net.decoder": {"x.y": W}}, "net.decoder.x.y"),
        ({"a.b": W, "a": {"b": {"c": torch.zeros(1)}}}, r"a\.b"),
        ({"a.b": {"c": torch.zeros(1)}, "a": {"b": W}}, "a.b"),
        ({"models": [{"x": torch.zeros(1)}, W]}, "models.1"),
        ({0: W}, "0"),
    ],
)
def test_a_key_names_the_state_dict(value: Any, key: str, tmp_path: Path) -> None:
    assert names(saved(tmp_path, value), key) == list(W)


KEYS: dict[str, tuple[Any, str | None, str]] = {
    "nested": ({"net": {"decoder": W}}, None, r"'net' is a dict; --key takes net\.decoder\.$"),
    "several": ({"params": W, "x": {"y": W, "z": {}}}, None, r"'params' is a dict; --key takes params, x\.y\.$"),
    "typo": ({"net": {"decoder": W}}, "net.decodr", r"nothing at the key 'net\.decodr'; --key takes net\.decoder\.$"),
    "too far": (W, "a.weight.b", r"has nothing at the key 'a\.weight\.b'; it has the keys 'a\.weight', 'a\.bias'\.$"),
    "no weights": ({"lr": 1}, "lrs", r"has nothing at the key 'lrs'; it has the keys 'lr'\.$"),
    "a list": ([W], "x", r"has nothing at the key 'x'; it has no keys\.$"),
    "a tensor": (W, "a.bias", r"more than a state dict: a Tensor at the key 'a\.bias'; save module\.state_dict"),
    "above": ({"net": {"decoder": W}}, "net", r"'decoder' at the key 'net' is a dict; --key takes net\.decoder\.$"),
    "scalar": (
        {**W, "best": np.float64(1)},
        None,
        r"'best' is a pickled object; save module\.state_dict\(\) alone, be",
    ),
    "array": ({**W, "best": np.zeros(3)}, None, r"'best' is a pickled object; save module"),
    "settings": ({"model": {"layers": 3}, "params": W}, None, r"'layers' is a int; --key takes params\.$"),
    "odd keys": ({"x\ny": {"a\tb": W}}, None, r"'x\\ny' is a dict; --key takes x\\ny\.a\\tb\.$"),
}


@pytest.mark.parametrize("case", KEYS)
def test_lists_the_keys_there_are(case: str, tmp_path: Path) -> None:
    value, key, sentence = KEYS[case]
    with pytest.raises(ValueError, match=rf"^checkpoint: [^\n]*{sentence}"):
        open_checkpoint(saved(tmp_path, value), key)


def test_files_of_tensors_alone_have_no_keys(tmp_path: Path) -> None:
    save_file({"a": np.zeros(3)}, tmp_path / "m.safetensors")
    with pytest.raises(
        ValueError, match=r"^checkpoint: .* has tensors alone, and nothing at the key 'net'; leave --key"
    ):
        open_checkpoint(tmp_path / "m.safetensors", "net")


def test_says_what_was_taken(tmp_path: Path) -> None:
    others = {"ema": W, "optimizer": {"state": {0: {"m": torch.zeros(1)}}}}
    with open_checkpoint(saved(tmp_path, {"model": W, **others})) as checkpoint:
        assert checkpoint.notes == [f"took model of {tmp_path / 'm.pt'}, which also has ema: --key takes another."]
    with open_checkpoint(tmp_path / "m.pt", "model") as checkpoint:
        assert checkpoint.notes == []
    with open_checkpoint(saved(tmp_path, {"state_dict": W, "args": {"lr": 0.1}})) as checkpoint:
        assert checkpoint.notes == []


def test_readers_say_what_was_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(tmp_path, {"model": W, "ema": W})
    for call in (
        lambda: read_layer(path, "a"),
        lambda: read_native(path, LayerMap(conv=("a.weight",), copy=("*",)), "net"),
    ):
        caplog.clear()
        call()
        assert caplog.messages == [f"took model of {path}, which also has ema: --key takes another."]


def test_a_dict_within_itself(tmp_path: Path) -> None:
    value: dict[str, Any] = {"w": {"a": torch.zeros(1)}}
    for _ in range(60):  # there are 2 ** 60 paths through it
        value = {"a": value, "b": value}
    with pytest.raises(ValueError, match="'a' is a dict"):
        open_checkpoint(saved(tmp_path, value))


# Pickles.

HARMLESS: dict[str, Any] = {
    "numpy scalars": [np.float64(1), np.float32(2), np.int64(3), np.bool_(True), np.str_("x")],
    "numpy arrays": [np.zeros((2, 3)), np.asfortranarray(np.ones((2, 3))), np.array([None, 1], object)],
    "numpy types": [np.dtype("f4"), np.float32, np.random.get_state()],
    "paths": [pathlib.PosixPath("/a"), pathlib.PureWindowsPath("c:/a"), pathlib.PurePosixPath("b")],
    "namespace": argparse.Namespace(path=pathlib.Path("a"), lr=0.1),
    "ordered": collections.OrderedDict(a=1),
    "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "counter": collections.Counter("aab"),
    "deque": collections.deque([1, 2], 5),
    "time": [datetime.datetime(2020, 1, 1), datetime.timedelta(1)],
    "types": [int, list, frozenset([1]), slice(1, 2), range(3)],
    "version": torch.__version__,
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", HARMLESS)
def test_harmless_pickles_are_passed_over(kind: str, zipped: bool, tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": W, "more": HARMLESS[kind]}, _use_new_zipfile_serialization=zipped)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.names == list(W)
        assert all(np.array_equal(as_array(checkpoint.read(name)), value.numpy()) for name, value in W.items())


class AttributeDict(dict):
    """The class that Lightning pickles for its hyper-parameters."""


def test_lightning_s_dicts_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ["lightning", "fabric", "utilities", "data"]
    for i in range(len(parts)):
        module = types.ModuleType(".".join(parts[: i + 1]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    module.AttributeDict = AttributeDict  # type: ignore[attr-defined]
    monkeypatch.setattr(AttributeDict, "__module__", module.__name__)
    path = saved(tmp_path, {"state_dict": W, "hyper_parameters": AttributeDict(lr=0.1, path=pathlib.Path("a"))})
    assert names(path) == list(W)


def test_nothing_harmless_is_made(tmp_path: Path) -> None:
    """The real classes are never called, with any arguments in the pickle."""

    class Call:
        def __init__(self, function: Any, *arguments: Any) -> None:
            self.call = function, arguments

        def __reduce__(self) -> Any:
            return self.call

    huge = [Call(np.ndarray, (1 << 45,)), Call(range, 1 << 60), Call(collections.deque, [1] * 9, -3)]
    huge += [Call(datetime.datetime, "x"), Call(pathlib.PosixPath, 3), Call(int, "9" * 5000)]
    assert names(saved(tmp_path, {"model": W, "more": huge})) == list(W)


class Spy:
    ran = False

    def __reduce__(self) -> Any:
        return spring, ()


def spring() -> int:
    Spy.ran = True
    return 1


def test_what_somebody_else_allows_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = saved(tmp_path, {"model": W, "more": Spy()})
    before = {*torch.serialization.get_safe_globals()}
    with torch.serialization.safe_globals([spring]):
        with pytest.raises(ValueError, match=r"it would run \w*test_checkpoint_sources\.spring; save module"):
            open_checkpoint(path)
        assert {*torch.serialization.get_safe_globals()} == {*before, spring}
    assert not Spy.ran


# Files that are not checkpoints.

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = b"\n <!DOCTYPE html>\n<html><body>Sign in</body></html>"
ENDINGS = ["m.safetensors", "m.pt", "m.npz", "m.bin", "m.safetensors.index.json"]
BEGINNINGS = {
    "pointer": (POINTER, r"is a Git LFS pointer instead of the file; fetch the file itself with git lfs pull\."),
    "page": (PAGE, r"is an HTML page instead of the file; download the file itself\."),
    "html": (b"\xef\xbb\xbf<HTML>", r"is an HTML page instead of the file; download the file itself\."),
    "xml": (b'<?xml version="1.0"?><Error>', r"is an XML page instead of the file; download the file itself\."),
    "gzip": (b"\x1f\x8b\x08\0", r"is compressed with gzip; unpack it first\."),
    "hdf5": (b"\x89HDF\r\n\x1a\n", r"is an HDF5 file, as Keras writes; save its arrays with numpy\.savez\."),
    "gguf": (b"GGUF\3\0\0\0", r"is a GGUF file; convert the checkpoint that it was made from\."),
    "tar": (b"a".ljust(257, b"\0") + b"ustar", r"is a tar archive; unpack it first\."),
}


@pytest.mark.parametrize("kind", BEGINNINGS)
@pytest.mark.parametrize("name", ENDINGS)
def test_files_that_are_taken_for_checkpoints(name: str, kind: str, tmp_path: Path) -> None:
    content, sentence = BEGINNINGS[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^checkpoint: .*{sentence}$"):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("name", ["m.pt", "m.bin", "m.npz"])
def test_files_of_another_name(name: str, tmp_path: Path) -> None:
    save_file({"a": np.zeros(3)}, tmp_path / name)
    with pytest.raises(ValueError, match=r"^checkpoint: .* is a safetensors file; end its name in \.safetensors\.$"):
        open_checkpoint(tmp_path / name)
    with pytest.raises(
        ValueError, match=r"^checkpoint: .* is a zip archive, as PyTorch writes; end its name in \.pt\.$"
    ):
        open_checkpoint(saved(tmp_path, W, "m.safetensors"))


def test_a_pointer_among_shards(tmp_path: Path) -> None:
    (tmp_path / "m.index.json").write_text(json.dumps({"weight_map": {"a": "s.safetensors"}}))
    (tmp_path / "s.safetensors").write_bytes(POINTER)
    with pytest.raises(ValueError, match=r"s\.safetensors is a Git LFS pointer"):
        open_checkpoint(tmp_path / "m.index.json")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_archive(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Conv1d(1, 1, 1)).save(os.fspath(tmp_path / "m.pt"))
    with pytest.raises(
        ValueError, match=r"\(it is a TorchScript archive, which holds code; save the state_dict\(\) of"
    ):
        open_checkpoint(tmp_path / "m.pt")


def test_another_pickle_protocol(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(it is not pickled as torch\.save does by default, with p"):
        open_checkpoint(saved(tmp_path, {"model": W}, pickle_protocol=4))


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_a_nested_tensor(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)])})
    with pytest.raises(
        ValueError, match=r"^checkpoint: [^\n]* is not a PyTorch file of weights alone, or is damaged \("
    ):
        open_checkpoint(path)


def test_an_index_as_large_as_weights(tmp_path: Path) -> None:
    with (tmp_path / "m.index.json").open("wb") as file:
        file.truncate(40 << 20)
    with pytest.raises(ValueError, match=r"^checkpoint: .* is not an index of shards: it has no weight_map\.$"):
        open_checkpoint(tmp_path / "m.index.json")
