"""Reads sound files into arrays, and writes arrays to sound files."""

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


def read_audio(path: str | Path, rate: int) -> np.ndarray:
    """Reads a WAV, FLAC, OGG or MP3 file of any rate and channel count, resampled to `rate`.

    Args:
        path: The file.
        rate: Samples per second of the result.

    Returns:
        float32, (channels, samples), full scale is 1. Channels are not mixed: use `.mean(axis=0)` for mono.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a sound file, holds no samples, or holds a sample that is not finite.
        ImportError: If soundfile or soxr is not installed.

    >>> import tempfile, soundfile
    >>> with tempfile.NamedTemporaryFile(suffix=".wav") as file:
    ...     soundfile.write(file.name, np.zeros((8000, 2)), 8000)
    ...     read_audio(file.name, 16000).shape
    (2, 16000)
    """
    soundfile, soxr = _libraries()
    if rate < 1:
        raise ValueError(f"audio: the rate must be at least 1 sample a second, but is {rate}.")
    if not Path(path).is_file():
        raise FileNotFoundError(f"audio: {path} is not a file.")
    try:
        samples, own_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise ValueError(f"audio: {path} cannot be read as a sound file ({str(error).rstrip('.')}).") from None
    if not len(samples):
        raise ValueError(f"audio: {path} holds no samples.")
    if not np.isfinite(samples).all():
        first = int(np.argmin(np.isfinite(samples).all(axis=1)))
        raise ValueError(
            f"audio: {path} holds a sample that is not a finite number, {first / own_rate:.3f} s from its start."
        )
    if own_rate != rate:
        samples = soxr.resample(samples, own_rate, rate)
        if not len(samples):
            raise ValueError(f"audio: {path} is shorter than one sample at {rate} Hz; pass a longer sound.")
    return np.ascontiguousarray(samples.T)


def write_audio(path: str | Path, sound: np.ndarray, rate: int) -> None:
    """Writes sound to a WAV, FLAC, OGG or MP3 file, which appears whole or not at all.

    Args:
        path: The file; its extension is the format.
        sound: (samples,) or (channels, samples), full scale is 1; larger values are clipped.
        rate: Samples per second.

    Raises:
        ValueError: If files with this extension cannot be written.
        ImportError: If soundfile or soxr is not installed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_audio(f"{folder}/a.wav", np.zeros((2, 8000), np.float32), 8000)
    ...     read_audio(f"{folder}/a.wav", 8000).shape
    (2, 8000)
    """
    soundfile, _ = _libraries()
    path = check_sound_file(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        whole = Path(folder) / path.name
        soundfile.write(whole, np.clip(sound, -1, 1).T, rate)
        whole.replace(path)


def check_sound_file(path: str | Path) -> Path:
    """Returns `path`, or raises a ValueError if files with its extension cannot be written."""
    path = Path(path)
    if path.suffix.lower() not in (".wav", ".flac", ".ogg", ".mp3"):
        raise ValueError(f"audio: {path} must end in .wav, .flac, .ogg or .mp3.")
    return path


def as_signals(model: str, audio: Any) -> np.ndarray:
    """Returns the sound that was passed to a model, one signal or several, as float32 (B, samples).

    Args:
        model: The model's name; error messages begin with it.
        audio: (samples,) or (B, samples), -1 to 1.

    Raises:
        TypeError: If the audio holds integers.
        ValueError: If the audio has more axes, no samples, or one that is not finite.

    >>> as_signals("net", np.zeros(8)).shape
    (1, 8)
    """
    signals = np.asarray(audio)
    if not np.issubdtype(signals.dtype, np.floating):
        raise TypeError(f"{model}: audio must be floating point, -1 to 1, but is {signals.dtype}.")
    if signals.ndim not in (1, 2) or not signals.size:
        raise ValueError(f"{model}: audio must have shape (samples,) or (batch, samples), but has {signals.shape}.")
    if not np.isfinite(signals).all():
        raise ValueError(f"{model}: audio must be finite, but holds an infinity or a NaN.")
    return np.atleast_2d(signals).astype(np.float32, copy=False)


def _libraries() -> tuple[ModuleType, ModuleType]:
    try:
        import soundfile
        import soxr
    except ImportError as error:
        raise ImportError(f"audio: reading sound needs {error.name}; run pip install 'max-conv[audio]'.") from None
    return soundfile, soxr
