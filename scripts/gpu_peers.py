"""Times PyTorch with cuDNN on the layers of gpu_layers.mojo, and the card's ceilings. Needs only PyTorch.

    python scripts/gpu_peers.py

Each layer runs channels last, which is our NLC, and channels first, NCL; in float32 without and with TF32, and in
bfloat16. cuDNN chooses its fastest algorithm for each.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional

LAYERS = {
    "Whisper conv1": (384, 384, 3, 3000, 1, 1, 1, 1),
    "HiFi-GAN 128": (128, 128, 11, 20000, 1, 5, 1, 25),
    "HiFi-GAN 64": (64, 64, 7, 40000, 1, 3, 1, 9),
    "HiFi-GAN 32": (32, 32, 7, 80000, 1, 3, 1, 9),
    "1,024 channels": (1024, 1024, 3, 8192, 1, 1, 1, 1),
    "wav2vec2 positional": (768, 768, 128, 1500, 1, 1, 16, 64),
    "wav2vec2 conv0": (1, 512, 10, 160000, 5, 1, 1, 0),
    "wav2vec2 conv1": (512, 512, 3, 6400, 2, 1, 1, 1),
    "depthwise 7": (512, 512, 7, 20000, 1, 1, 512, 3),
    "depthwise 31": (512, 512, 31, 20000, 1, 1, 512, 15),
}
"""Channels, filters, kernel, length, stride, dilation, groups and padding, in batches of eight."""
REPEATS = 20
TRIES = 3


def milliseconds(call: Callable[[], Any]) -> float:
    """Returns the least mean time of some runs, by the device's events."""
    for _ in range(3):
        call()
    times = []
    for _ in range(TRIES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPEATS):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / REPEATS)
    return min(times)


def ceilings() -> None:
    room = torch.randn(1 << 29, device="cuda")
    print(f"copy {2 * room.numel() * 4 / milliseconds(room.clone) / 1e9:.2f} TB/s")
    size = 8192
    for dtype, tf32 in ((torch.bfloat16, True), (torch.float32, True), (torch.float32, False)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
        rate = 2 * size**3 / milliseconds(functools.partial(torch.matmul, a, b)) / 1e9
        print(f"product {str(dtype).removeprefix('torch.')}{' TF32' if tf32 else ''} {rate:.1f} TFLOP/s", flush=True)


def layer(name: str, dtype: torch.dtype, tf32: bool, last: bool) -> None:
    channels, filters, kernel, length, stride, dilation, groups, padding = LAYERS[name]
    torch.backends.cudnn.allow_tf32 = tf32
    x = torch.randn(8, channels, 1, length, device="cuda", dtype=dtype)
    w = torch.randn(filters, channels // groups, 1, kernel, device="cuda", dtype=dtype)
    if last:
        x, w = x.to(memory_format=torch.channels_last), w.to(memory_format=torch.channels_last)
    options: dict[str, Any] = {"stride": (1, stride), "padding": (0, padding), "dilation": (1, dilation)}

    def call() -> torch.Tensor:
        return functional.conv2d(x, w, groups=groups, **options)

    operations = 2 * call().numel() * kernel * channels // groups
    ms = milliseconds(call)
    kind = str(dtype).removeprefix("torch.") + (" TF32" if tf32 and dtype == torch.float32 else "")
    print(f"{name} {kind} {'NLC' if last else 'NCL'} ms {ms:.4f} TFLOP/s {operations / ms / 1e9:.1f}", flush=True)


def main() -> None:
    print(torch.cuda.get_device_name(), "PyTorch", torch.__version__, "cuDNN", torch.backends.cudnn.version())
    torch.backends.cudnn.benchmark = True
    ceilings()
    for name in LAYERS:
        for dtype, tf32 in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, True)):
            for last in (True, False):
                layer(name, dtype, tf32, last)


if __name__ == "__main__":
    main()
