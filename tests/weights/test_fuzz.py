"""Readers of damaged checkpoints: valid tensors or one sentence, nothing else, and never much memory."""

import io
import json
import os
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from max_conv.weights.checkpoint import open_checkpoint
from max_conv.weights.convert import LayerMap, Options, convert
from max_conv.weights.marker import MARK, Marker
from max_conv.weights.safetensors_file import SafetensorsFile

TENSORS = {"a.weight": torch.arange(24.0).reshape(4, 2, 3), "a.bias": torch.ones(4).bfloat16(), "n": torch.tensor(3)}
# Damaged files may make NumPy and PyTorch warn; only raised errors count.
pytestmark = pytest.mark.filterwarnings("ignore")

FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def as_pt(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def as_npz(save: Any) -> bytes:
    file = io.BytesIO()
    save(file, **{"a.weight": np.arange(24.0).reshape(4, 2, 3), "n": np.int32(3), "f": np.ones((3, 2), "f2", "F")})
    return file.getvalue()


FILES = {
    "m.npz": as_npz(np.savez),
    "small.npz": as_npz(np.savez_compressed),
    "m.safetensors": save(TENSORS, {MARK: Marker("native", ("a.weight",), renamed={"n": "steps"}).text()}),
    "m.pt": as_pt({"state_dict": TENSORS, "lr": 0.1}),
    "old.pt": as_pt(TENSORS, _use_new_zipfile_serialization=False),
    "m.index.json": json.dumps(
        {"metadata": {"total_size": 9}, "weight_map": {n: "s.safetensors" for n in TENSORS}}
    ).encode(),
}


@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with some bytes flipped, cut, doubled, moved, or replaced by others."""
    data = bytearray(content)
    # Headers come first in most files: damage there gets furthest.
    place = st.one_of(st.integers(0, min(len(data) - 1, 300)), st.integers(0, len(data) - 1))
    for _ in range(draw(st.integers(1, 4))):
        start = min(draw(place), len(data))
        stop = min(start + draw(st.integers(0, 40)), len(data))
        match draw(st.sampled_from(["flip", "cut", "truncate", "double", "splice", "number"])):
            case "flip" if start < len(data):
                data[start] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[start:stop]
            case "truncate":
                del data[start:]
            case "double":
                data[start:start] = data[start:stop]
            case "splice":
                data[start:stop] = draw(st.binary(max_size=20))
            case "number":
                data[start : start + 1] = draw(
                    st.sampled_from([b"-", b"9" * 30, b"1e9", b"\xff" * 8, b"[", b'"', b"\0"])
                )
    return bytes(data)


def check(path: Path) -> None:
    """Opens and reads a file; raises an error if the result is neither valid nor a sentence."""
    try:
        with open_checkpoint(path) as checkpoint:
            for name in checkpoint.names:
                tensor = checkpoint.read(name)
                assert tensor.bits.shape == checkpoint.shape(name) and name.isprintable()
                assert tensor.bits.nbytes <= 10 * path.stat().st_size + 10_000
    except (ValueError, FileNotFoundError, OSError) as error:
        said = str(error)
        assert "\n" not in said and said.startswith("checkpoint: ") and said.endswith("."), said
        assert len(said) < 700, said


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
@FUZZ
def test_damaged_files(name: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "s.safetensors").write_bytes(FILES["m.safetensors"])
    (folder / name).write_bytes(data.draw(damage(FILES[name])))
    check(folder / name)


@given(data=st.data())
@FUZZ
def test_damaged_pickles(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """In an intact archive: damage that reaches PyTorch's own unpickler."""
    path = tmp_path_factory.getbasetemp() / "pickle.pt"
    with zipfile.ZipFile(io.BytesIO(FILES["m.pt"])) as before, zipfile.ZipFile(path, "w") as after:
        for entry in before.infolist():
            content = before.read(entry)
            after.writestr(
                entry.filename, data.draw(damage(content)) if entry.filename.endswith("data.pkl") else content
            )
    check(path)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "npz", "index.json"])
@given(content=st.binary(max_size=400))
@FUZZ
def test_random_bytes(suffix: str, tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / f"random.{suffix}"
    path.write_bytes(content)
    check(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(0, 30) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "F4"]) | JSON,
        "shape": st.lists(st.integers(0, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(0, 32), min_size=2, max_size=2) | JSON,
    }
)


@given(header=st.dictionaries(st.text(max_size=9), ENTRY | JSON, max_size=3) | JSON, data=st.binary(max_size=40))
@FUZZ
def test_headers_of_any_json(tmp_path_factory: pytest.TempPathFactory, header: Any, data: bytes) -> None:
    """Files that this reader accepts, the safetensors library accepts, too, with the same contents."""
    text = json.dumps(header).encode()
    path = tmp_path_factory.getbasetemp() / "json.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    check(path)
    try:
        file = SafetensorsFile(path)
    except ValueError:
        return
    from safetensors import deserialize

    theirs = dict(deserialize(path.read_bytes()))
    assert theirs.keys() == file.specs.keys()
    for name, spec in file.specs.items():
        assert (theirs[name]["dtype"], tuple(theirs[name]["shape"])) == (spec.dtype, spec.shape)
        assert bytes(theirs[name]["data"]) == file.load(name, 0, spec.size).tobytes()
    file.close()


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt", "m.npz"])
@given(data=st.data())
@settings(FUZZ, max_examples=60)
def test_damaged_files_convert_or_leave_nothing(
    name: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "convert"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    (folder / name).write_bytes(data.draw(damage(FILES[name])))
    layers = LayerMap(conv=("a.weight",))
    try:
        convert(folder / name, folder / "out.safetensors", layers, options=Options(strict=False))
    except (ValueError, FileNotFoundError, OSError) as error:
        assert "\n" not in str(error)
        assert os.listdir(folder) == [name]
    else:
        assert sorted(os.listdir(folder)) == sorted([name, "out.safetensors"])
        check(folder / "out.safetensors")


CLAIMS = [(1 << 40).to_bytes(8, "little"), (90 << 20).to_bytes(8, "little"), (0xFFFFFFFFFFFFFFFF).to_bytes(8, "little")]


@pytest.mark.parametrize("start", CLAIMS)
def test_claims_cost_no_memory(start: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write(start)
        file.truncate(100 << 30)  # a sparse file of 100 GB
    tracemalloc.start()
    with pytest.raises(ValueError, match="is not a safetensors file"):
        open_checkpoint(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_tensor_of_100_gb_opens_at_once(tmp_path: Path) -> None:
    """Data that a valid header declares is read only on request, and then in pieces."""
    path = tmp_path / "m.safetensors"
    size = 100 << 30
    text = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.shape("a") == (size,)
        assert next(checkpoint.pieces("a")).dtype == np.uint8
