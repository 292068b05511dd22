"""The layers that bench.py races: layers of real networks, and sizes that are difficult for kernels."""

import math
from typing import NamedTuple

import numpy as np


class Data(NamedTuple):
    """x (N, C, L), filter (F, C / groups, K), transposed (C, F / groups, K), bias (F,): PyTorch's layouts, float32."""

    x: np.ndarray
    w: np.ndarray
    bias: np.ndarray


class Layer(NamedTuple):
    """A Conv1d layer, or a ConvTranspose1d layer; L is the input's length."""

    channels: int
    filters: int
    kernel_size: int
    length: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    batch: int = 1
    transposed: bool = False

    @property
    def out_length(self) -> int:
        if self.transposed:
            return (self.length - 1) * self.stride - 2 * self.padding + self.dilation * (self.kernel_size - 1) + 1
        return (self.length + 2 * self.padding - self.dilation * (self.kernel_size - 1) - 1) // self.stride + 1

    @property
    def flop(self) -> float:
        """Floating point operations, taps in the padding included."""
        positions = self.length if self.transposed else self.out_length
        return 2.0 * self.batch * positions * self.filters * self.kernel_size * self.channels / self.groups

    @property
    def values(self) -> int:
        """Numbers in x, filter, bias and output, which have to be moved through memory once."""
        data = self.batch * (self.length * self.channels + self.out_length * self.filters)
        return data + self.filters * (self.kernel_size * self.channels // self.groups + 1)

    @property
    def options(self) -> tuple[int, int, int, int]:
        """Stride, padding, dilation and groups, in the order of PyTorch and MAX."""
        return self.stride, self.padding, self.dilation, self.groups

    def __str__(self) -> str:
        text = f"{self.channels}{'⇒' if self.transposed else '→'}{self.filters} k{self.kernel_size}"
        for letter, value, usual in (("s", self.stride, 1), ("p", self.padding, 0), ("d", self.dilation, 1)):
            text += f" {letter}{value}" if value != usual else ""
        text += f" g{self.groups}" if self.groups > 1 else ""
        return text + (f" N{self.batch}" if self.batch > 1 else "") + f" L{self.length}"

    def data(self, dtype: str) -> Data:
        """Returns the same random values each time; for bfloat16, values that bfloat16 can represent."""
        random = np.random.default_rng(0)
        sizes = (self.channels, self.filters) if self.transposed else (self.filters, self.channels)
        shape = (sizes[0], sizes[1] // self.groups, self.kernel_size)
        x = random.standard_normal((self.batch, self.channels, self.length), np.float32)
        terms = self.channels // self.groups * self.kernel_size // (self.stride if self.transposed else 1)
        w = random.standard_normal(shape, np.float32) / np.float32(math.sqrt(terms))
        data = Data(x, w, random.standard_normal(self.filters, np.float32))
        return data if dtype == "float32" else Data(*(from_bits(to_bits(a)) for a in data))


def to_bits(values: np.ndarray) -> np.ndarray:
    """Returns bfloat16 as uint16, rounded by truncation: NumPy has no bfloat16."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


LAYERS = {
    "whisper conv1": Layer(80, 384, 3, 3000, padding=1),
    "whisper conv2": Layer(384, 384, 3, 3000, stride=2, padding=1),
    "wav2vec2 conv0": Layer(1, 512, 10, 64000, stride=5),
    "wav2vec2 conv1": Layer(512, 512, 3, 12799, stride=2),
    "wav2vec2 pos": Layer(768, 768, 128, 200, padding=64, groups=16),
    "HiFi-GAN res": Layer(128, 128, 11, 6400, padding=25, dilation=5),
    "HiFi-GAN res k3": Layer(64, 64, 3, 12800, padding=1),
    "HiFi-GAN res k7": Layer(256, 256, 7, 800, padding=3),
    "HiFi-GAN res k11": Layer(256, 256, 11, 800, padding=5),
    "HiFi-GAN thin": Layer(32, 32, 3, 25600, padding=1),
    "HiFi-GAN pre": Layer(80, 512, 7, 100, padding=3),
    "HiFi-GAN post": Layer(32, 1, 7, 25600, padding=3),
    "DAC": Layer(192, 192, 7, 22067, padding=9, dilation=3),
    "EnCodec in": Layer(1, 32, 7, 24000, padding=3),
    "Mamba": Layer(1536, 1536, 4, 1024, padding=3, groups=1536),
    "Conformer": Layer(512, 512, 31, 500, padding=15, groups=512),
    "QuartzNet": Layer(512, 512, 87, 500, padding=86, dilation=2, groups=512),
    "Vocos": Layer(512, 512, 7, 938, padding=3, groups=512),
    "pointwise": Layer(512, 1024, 1, 500),
    "WaveNet": Layer(64, 128, 2, 16000, dilation=64),
    "ECG": Layer(64, 128, 16, 4096, stride=4, padding=6, batch=8),
    "Enformer stem": Layer(4, 768, 15, 16384, padding=7),
    "AtacWorks": Layer(15, 15, 51, 15100, dilation=8, batch=4),  # the layer of arXiv 2104.08002
    "HiFi-GAN up 8": Layer(512, 256, 16, 100, 8, 4, transposed=True),
    "HiFi-GAN up 2": Layer(128, 64, 4, 6400, 2, 1, transposed=True),
    "DAC up": Layer(1536, 768, 16, 87, 8, 4, transposed=True),
    "EnCodec up": Layer(64, 32, 4, 12000, 2, transposed=True),
    "Demucs up": Layer(96, 48, 8, 6890, 4, transposed=True),
    "BigVGAN up": Layer(384, 192, 11, 400, 5, 3, transposed=True),
    "Mimi up": Layer(512, 512, 4, 125, 2, groups=512, transposed=True),
    "odd k5": Layer(33, 65, 5, 997, padding=2),
    "odd k3": Layer(17, 17, 3, 10007, padding=1),
    "batch 8": Layer(128, 128, 3, 400, padding=1, batch=8),
    "batch 32": Layer(64, 64, 5, 128, padding=2, batch=32),
    "length 1": Layer(64, 64, 3, 1, padding=1),
    "length 10": Layer(64, 64, 3, 10, padding=1),
    "length 1000": Layer(64, 64, 3, 1000, padding=1),
    "length 1000000": Layer(64, 64, 3, 1_000_000, padding=1),
}
