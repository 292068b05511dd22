"""Sound as it comes through a pipe: raw PCM, or WAV whose length nobody knows yet."""

import struct
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

PCM: dict[str, np.dtype[Any]] = {"s16": np.dtype("<i2"), "f32": np.dtype("<f4")}
"""The formats of a sample: 16-bit integers and 32-bit floating point, little endian."""
_WAV = {(1, 16): "s16", (3, 32): "f32"}
"""The formats of WAV files, by their code and bits."""
_EXTENSIBLE = 0xFFFE


def read_pcm(
    file: IO[bytes], rate: int, pcm: str = "s16", channels: int = 1, samples: int = 480
) -> Iterator[np.ndarray]:
    """Yields sound from a pipe as it comes: raw PCM, or WAV, whose header describes its content.

    Args:
        file: Read until it ends.
        rate: Samples per second that the sound must have. Raw PCM has no rate in it.
        pcm: The format of raw PCM: "s16" or "f32".
        channels: The channels of raw PCM, whose samples alternate.
        samples: How many samples of each channel are waited for; the last piece may be shorter.

    Yields:
        float32, (channels, samples), full scale is 1.

    Raises:
        ValueError: If a WAV header is damaged, or has another rate or another format.

    >>> import io
    >>> [piece.tolist() for piece in read_pcm(io.BytesIO(b"\\x00\\x40\\x00\\xc0"), 16000)]
    [[[0.5, -0.5]]]
    """
    begin = _exactly(file, 4)
    if begin == b"RIFF":
        pcm, channels = _header(file, rate)
        begin = b""
    dtype = PCM[pcm]
    frame = channels * dtype.itemsize
    while True:
        data = begin + _exactly(file, samples * frame - len(begin))
        begin = b""
        whole = data[: len(data) // frame * frame]
        if whole:
            values = np.frombuffer(whole, dtype).reshape(-1, channels).T
            scale = 1 / 32768 if dtype.kind == "i" else 1
            yield np.ascontiguousarray(values * np.float32(scale), np.float32)
        if len(data) < samples * frame:
            return


def to_pcm(sound: np.ndarray, pcm: str) -> bytes:
    """Returns sound, (channels, samples), as raw PCM; values beyond full scale are clipped.

    >>> to_pcm(np.array([[0.5, -2.0]], np.float32), "s16")
    b'\\x00@\\x00\\x80'
    """
    values = sound.T
    if PCM[pcm].kind == "i":
        values = np.clip(np.rint(values * 32768), -32768, 32767)
    return np.ascontiguousarray(values, PCM[pcm]).tobytes()


def _exactly(file: IO[bytes], count: int) -> bytes:
    """Reads bytes until there are `count`, or the file ends."""
    pieces, left = [], count
    while left > 0 and (piece := file.read(left)):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def _header(file: IO[bytes], rate: int) -> tuple[str, int]:
    """Reads a WAV header after its first word, up to the samples; returns their format and the channels."""
    found: tuple[str, int] | None = None
    if _exactly(file, 8)[4:] != b"WAVE":
        raise ValueError("pcm: the input begins as a RIFF file, but is not WAV.")
    while True:
        head = _exactly(file, 8)
        if len(head) < 8:
            raise ValueError("pcm: the WAV header ends before its samples begin.")
        name, size = head[:4], struct.unpack("<I", head[4:])[0]
        if name == b"data":
            if found is None:
                raise ValueError("pcm: the WAV header does not tell the format of its samples.")
            return found
        if name != b"fmt " or size > 64:
            if size > 1 << 20:
                raise ValueError(f"pcm: the WAV header has a part of {size} bytes; is it damaged?")
            _exactly(file, size + size % 2)
            continue
        body = _exactly(file, size + size % 2)
        if len(body) < 16:
            raise ValueError("pcm: the WAV header ends before its samples begin.")
        code, channels, own_rate, _, _, bits = struct.unpack("<HHIIHH", body[:16])
        if code == _EXTENSIBLE and len(body) >= 26:
            code = struct.unpack("<H", body[24:26])[0]
        if (code, bits) not in _WAV or not channels:
            raise ValueError(
                f"pcm: WAV must hold 16-bit integers or 32-bit floats, but has format {code} of {bits} bits."
            )
        if own_rate != rate:
            raise ValueError(
                f"pcm: the sound has {own_rate} samples a second, but the network takes {rate}; resample it first, as with "
                f"sox -r {rate}."
            )
        found = _WAV[code, bits], channels
