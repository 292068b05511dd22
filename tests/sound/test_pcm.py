"""Sound through a pipe: raw PCM and WAV."""

import io
import struct
import wave
from typing import Any

import numpy as np
import pytest

from max_conv.sound import read_pcm, to_pcm

RATE = 16000


class Pipe(io.RawIOBase):
    """A pipe that gives at most three bytes at a time."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, size: int = -1) -> bytes:
        piece, self._data = self._data[: min(size, 3)], self._data[min(size, 3) :]
        return piece


def sound(channels: int, samples: int) -> np.ndarray:
    values = np.random.default_rng(0).integers(-32768, 32768, (channels, samples)).astype(np.float32)
    return values / np.float32(32768)


def wav(values: np.ndarray, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((len(values), 2, rate, 0, "NONE", ""))
        writer.writeframes(to_pcm(values, "s16"))
    return file.getvalue()


def float_wav(values: np.ndarray, code: int = 3, extra: bytes = b"") -> bytes:
    body = struct.pack("<HHIIHH", code, len(values), RATE, 0, 0, 32) + extra
    data = to_pcm(values, "f32")
    parts = b"LIST" + struct.pack("<I", 3) + b"abc\0" + b"fmt " + struct.pack("<I", len(body)) + body
    return b"RIFF\xff\xff\xff\xffWAVE" + parts + b"data\xff\xff\xff\xff" + data


@pytest.mark.parametrize("pcm", ["s16", "f32"])
@pytest.mark.parametrize("channels", [1, 2])
def test_raw_samples_come_back(pcm: str, channels: int) -> None:
    values = sound(channels, 1001)
    pieces = list(read_pcm(Pipe(to_pcm(values, pcm)), RATE, pcm, channels, samples=100))  # type: ignore[arg-type]
    assert [piece.shape[1] for piece in pieces] == [100] * 10 + [1]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), values)
    assert all(piece.dtype == np.float32 for piece in pieces)


@pytest.mark.parametrize("channels", [1, 2])
def test_wav_tells_its_own_format(channels: int) -> None:
    values = sound(channels, 777)
    extensible = struct.pack("<HHIHH12s", 22, 32, 0, 3, 0, b"")
    for file in (wav(values), float_wav(values), float_wav(values, 0xFFFE, extensible)):
        got = np.concatenate(list(read_pcm(Pipe(file), RATE, "s16", 5)), axis=1)  # type: ignore[arg-type]
        np.testing.assert_array_equal(got, values)


def test_half_a_sample_at_the_end_is_left() -> None:
    pieces = list(read_pcm(io.BytesIO(b"\0\x40\1"), RATE, samples=10))
    assert [piece.tolist() for piece in pieces] == [[[0.5]]]
    assert list(read_pcm(io.BytesIO(b""), RATE)) == []


def test_what_exceeds_full_scale_is_clipped() -> None:
    assert np.frombuffer(to_pcm(np.array([[-2, 2, 1]], np.float32), "s16"), np.int16).tolist() == [-32768, 32767, 32767]


HEADER = b"RIFF\0\0\0\0WAVE"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            wav(sound(1, 9), 44100),
            "the sound has 44100 samples a second, but the network takes 16000; resample it first",
        ),
        (b"RIFF\0\0\0\0AVI ", "the input begins as a RIFF file, but is not WAV."),
        (HEADER, "the WAV header ends before its samples begin."),
        (HEADER + b"data\0\0\0\0", "the WAV header does not tell the format of its samples."),
        (HEADER + b"fmt \x10\0\0\0abc", "the WAV header ends before its samples begin."),
        (HEADER + b"junk\xff\xff\xff\x7f", "the WAV header has a part of 2147483647 bytes; is it damaged?"),
        (
            HEADER + b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, RATE, 0, 0, 24),
            "WAV must hold 16-bit integers or 32-bit floats, but has format 1 of 24 bits.",
        ),
    ],
)
def test_damaged_headers(file: bytes, message: str) -> None:
    pieces: Any = read_pcm(io.BytesIO(file), RATE)
    with pytest.raises(ValueError) as error:
        list(pieces)
    assert str(error.value).startswith(f"pcm: {message}")
