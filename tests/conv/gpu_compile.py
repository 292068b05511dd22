"""Compiles every kind of layer for a GPU that the machine lacks: `python gpu_compile.py API ARCHITECTURE`.

A virtual device is set for a whole process, so tests/conv/test_gpu.py runs this file in separate processes.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

# With one thread MAX compiles in less time, max_conv/runtime/compiler.py says why. Its import makes the threads.
USABLE = os.sched_getaffinity(0)
os.sched_setaffinity(0, {min(USABLE)})

from max.driver import set_virtual_device_api, set_virtual_device_count, set_virtual_device_target_arch  # noqa: E402

set_virtual_device_api(sys.argv[1])
set_virtual_device_target_arch(sys.argv[2])
set_virtual_device_count(1)

from max.driver import CPU, Accelerator  # noqa: E402
from max.dtype import DType  # noqa: E402
from max.engine import InferenceSession  # noqa: E402
from max.graph import DeviceRef, Graph, TensorType, TensorValue, Weight  # noqa: E402

import max_conv  # noqa: E402
from max_conv import conv1d, conv_transpose1d  # noqa: E402
from max_conv.conv.accelerators import trying  # noqa: E402
from max_conv.conv.checks import DTYPES  # noqa: E402
from max_conv.conv.layouts import Layout  # noqa: E402
from max_conv.conv.recurrent import lstm  # noqa: E402

# Layout, filter layout, filter shape, options: every kernel, and every layout. The other dtypes use only the last three.
FLOAT32, *OTHERS = DTYPES
Row = tuple[Layout, Any, tuple[int, ...], dict[str, Any]]
LAYERS: list[Row] = [
    ("NLC", "SCF", (3, 8, 16), {"stride": 2, "padding": 1}),
    ("NLC", "FCS", (16, 4, 3), {"groups": 2, "padding": "same", "padding_mode": "reflect"}),
    ("NLC", "SCF", (4, 1, 8), {"groups": 8, "padding": "causal"}),
    ("NCL", "FCS", (16, 8, 5), {"dilation": 3, "padding_mode": "circular", "padding": 2}),
    ("NLC", "SCF", (4, 8, 3), {"padding_mode": "replicate", "padding": (1, 4)}),
    ("NLC", "FCS", (40, 8, 3), {"padding": 1}),
]
TRANSPOSED: list[Row] = [
    ("NLC", "FSC", (16, 5, 4), {"groups": 2, "stride": 3, "dilation": 2}),
    ("NLC", "SFC", (4, 16, 8), {"stride": 2, "padding": "causal"}),
    ("NCL", "CFS", (8, 1, 4), {"groups": 8, "stride": 6, "output_padding": 5}),
]


def live(x: TensorValue) -> TensorValue:
    """A network whose parts read later inputs, go down and up in rate, and meet."""
    down, up = (Weight(name, FLOAT32, (4, 8, 8), DeviceRef.GPU()) for name in ("down", "up"))
    y = conv1d(x, Weight("first", FLOAT32, (3, 8, 8), DeviceRef.GPU()), padding=1, padding_mode="reflect")
    return x + conv_transpose1d(conv1d(y, down, stride=2, padding=(2, 2)), up, stride=2, padding="causal")


def main() -> None:
    trying.set(True)  # also the kernels that have not run on this GPU
    gpu = DeviceRef.GPU()
    rows: list[tuple[DType, Callable[..., TensorValue], Row]] = [(FLOAT32, conv1d, layer) for layer in LAYERS]
    rows += [(FLOAT32, conv_transpose1d, layer) for layer in TRANSPOSED]
    for dtype in OTHERS:
        rows += [(dtype, conv1d, layer) for layer in LAYERS[-3:]]
        rows += [(dtype, conv_transpose1d, layer) for layer in TRANSPOSED[-1:]]
    types = []
    for dtype, _, (layout, _, shape, _) in rows:
        x: list[int | str] = ["n", "l", 8] if layout == "NLC" else ["n", 8, "l"]
        types += [TensorType(dtype, x, gpu), TensorType(dtype, shape, gpu)]
    recurrent: list[list[int | str]] = [["n", "t", 8], [8, 64], [16, 64], [64], ["n", 16], ["n", 16]]
    with Graph("gpu", input_types=[*types, *(TensorType(FLOAT32, shape, gpu) for shape in recurrent)]) as graph:
        values = [value.tensor for value in graph.inputs]
        outputs = [
            function(values[2 * i], values[2 * i + 1], layout=layout, filter_layout=filter_layout, **options)
            for i, (_, function, (layout, filter_layout, _, options)) in enumerate(rows)
        ]
        graph.output(*outputs, *lstm(*values[len(types) :]))
    session = InferenceSession(devices=[Accelerator(), CPU()])
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), USABLE)
    session.compile(graph)
    session.compile(max_conv.streaming(live, [TensorType(FLOAT32, ["n", "l", 8], gpu)]))
    print(f"compiled {len(outputs)} convolutions for {sys.argv[1]} {sys.argv[2]}", flush=True)
    # MAX's threads sometimes abort a process that ends while they wait for the virtual device.
    os._exit(0)


if __name__ == "__main__":
    main()
