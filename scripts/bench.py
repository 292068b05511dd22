#!/usr/bin/env python3
"""Races max_conv against PyTorch and ONNX Runtime on layers of real networks.

    python scripts/bench.py [--layers NAME ...] [--rounds 7] [--threads 2] [--json FILE]

Each contender runs in a process of its own, in turns, so that what the machine does besides hits all alike. Every answer
is compared with float64 before anything is timed. A round is the median of calls that fill 50 ms; the figure of a
contender is the median of its rounds. Absolute times drift from run to run, ratios in one run hold. Large blocks of
memory are kept by the allocator in all processes, or page faults would be timed.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np


class Layer(NamedTuple):
    """A Conv1d layer; L is the input's length."""

    channels: int
    filters: int
    kernel_size: int
    length: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1

    @property
    def out_length(self) -> int:
        return (self.length + 2 * self.padding - self.dilation * (self.kernel_size - 1) - 1) // self.stride + 1

    @property
    def flop(self) -> float:
        """Floating point operations, taps in the padding included."""
        return 2.0 * self.out_length * self.filters * self.kernel_size * self.channels / self.groups

    def __str__(self) -> str:
        text = f"{self.channels}→{self.filters} k{self.kernel_size}"
        for letter, value, usual in (("s", self.stride, 1), ("p", self.padding, 0), ("d", self.dilation, 1)):
            text += f" {letter}{value}" if value != usual else ""
        return text + (f" g{self.groups}" if self.groups > 1 else "") + f" L{self.length}"

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns x (1, C, L), filter (F, C / groups, K) and bias (F,), PyTorch's layouts."""
        random = np.random.default_rng(0)
        shape = (self.filters, self.channels // self.groups, self.kernel_size)
        x = random.standard_normal((1, self.channels, self.length), np.float32)
        w = random.standard_normal(shape, np.float32) / np.sqrt(shape[1] * shape[2])
        return x, w.astype(np.float32), random.standard_normal(self.filters, np.float32)


LAYERS = {
    "whisper conv1": Layer(80, 384, 3, 3000, padding=1),
    "whisper conv2": Layer(384, 384, 3, 3000, stride=2, padding=1),
    "wav2vec2 conv0": Layer(1, 512, 10, 64000, stride=5),
    "wav2vec2 conv1": Layer(512, 512, 3, 12799, stride=2),
    "wav2vec2 pos": Layer(768, 768, 128, 200, padding=64, groups=16),
    "HiFi-GAN res": Layer(128, 128, 11, 6400, padding=25, dilation=5),
    "HiFi-GAN thin": Layer(32, 32, 3, 25600, padding=1),
    "HiFi-GAN pre": Layer(80, 512, 7, 100, padding=3),
    "HiFi-GAN post": Layer(32, 1, 7, 25600, padding=3),
    "DAC": Layer(192, 192, 7, 22067, padding=9, dilation=3),
    "EnCodec in": Layer(1, 32, 7, 24000, padding=3),
    "Mamba": Layer(1536, 1536, 4, 1024, padding=3, groups=1536),
    "Conformer": Layer(512, 512, 31, 500, padding=15, groups=512),
    "Vocos": Layer(512, 512, 7, 938, padding=3, groups=512),
    "pointwise": Layer(512, 1024, 1, 500),
    "WaveNet": Layer(64, 128, 2, 16000, dilation=64),
}


def ours(layer: Layer, permute: bool) -> Callable[[], np.ndarray]:
    from max.driver import Buffer
    from max.dtype import DType

    import max_conv
    from max_conv.layouts import permute as permuted

    conv = max_conv.Conv1D(
        layer.kernel_size,
        layer.channels,
        layer.filters,
        DType.float32,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        has_bias=True,
        permute=permute,
    )
    x, w, bias = layer.arrays()
    model = max_conv.compile(conv, weights={"weight": permuted(w, "FCS", conv.filter_layout), "bias": bias})
    given = Buffer.from_numpy(permuted(x, "NCL", conv.layout))
    return lambda: permuted(model(given).to_numpy(), conv.layout, "NCL") if verifying else model(given)


def torch(layer: Layer, threads: int) -> Callable[[], np.ndarray]:
    import torch

    torch.set_num_threads(threads)
    x, w, bias = (torch.from_numpy(a) for a in layer.arrays())

    @torch.inference_mode()
    def call() -> Any:
        return torch.nn.functional.conv1d(x, w, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    return call


def onnxruntime(layer: Layer, threads: int) -> Callable[[], np.ndarray]:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    x, w, bias = layer.arrays()
    node = helper.make_node(
        "Conv",
        ["x", "w", "b"],
        ["y"],
        strides=[layer.stride],
        pads=[layer.padding] * 2,
        dilations=[layer.dilation],
        group=layer.groups,
    )
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", x.shape), ("y", None))
    ]
    weights = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(bias, "b")]
    graph = helper.make_graph([node], "layer", values[:1], values[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})[0]


CONTENDERS: dict[str, Callable[[Layer, int], Callable[[], Any]]] = {
    "max_conv NLC": lambda layer, _: ours(layer, permute=False),
    "max_conv NCL": lambda layer, _: ours(layer, permute=True),
    "PyTorch": torch,
    "ONNX Runtime": onnxruntime,
}
verifying = False


def work(contender: str, threads: int) -> None:
    """Answers each layer's name on stdin with the seconds of a call, on stdout."""
    global verifying
    calls: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in calls:
            calls[name] = CONTENDERS[contender](LAYERS[name], threads)
            verifying = True
            check(LAYERS[name], np.asarray(calls[name]()))
            verifying = False
        print(burst(calls[name]), flush=True)


def check(layer: Layer, got: np.ndarray) -> None:
    from max_conv.reference import conv1d_ref

    x, w, bias = layer.arrays()
    options: dict[str, Any] = {"groups": layer.groups, "layout": "NCL", "filter_layout": "FCS"}
    want = conv1d_ref(x, w, bias, stride=layer.stride, padding=layer.padding, dilation=layer.dilation, **options)
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def burst(call: Callable[[], Any]) -> float:
    times: list[float] = []
    call()
    while sum(times) < 0.05 or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Racer:
    """A contender's process. It is stopped while others run: idle threads of some libraries spin for a while."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.process.send_signal(signal.SIGSTOP)

    def ask(self, layer: str) -> float | None:
        """Returns the seconds of a call, or None where the process died."""
        assert self.process.stdin and self.process.stdout
        self.process.send_signal(signal.SIGCONT)
        print(layer, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            return None
        self.process.send_signal(signal.SIGSTOP)
        return float(answer)


@click.command()
@click.option("--layers", multiple=True, type=click.Choice(list(LAYERS)), help="Race these layers only.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--threads", default=os.cpu_count(), show_default=True, help="Of the peers; MAX takes all cores.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the milliseconds there, too.")
@click.option("--worker", type=click.Choice(list(CONTENDERS)), hidden=True)
def main(layers: tuple[str, ...], rounds: int, threads: int, file: Path | None, worker: str | None) -> None:
    """Races max_conv against PyTorch and ONNX Runtime on layers of real networks."""
    if worker:
        work(worker, threads)
        return
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
    environment |= {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
    command = [sys.executable, __file__, "--threads", str(threads), "--worker"]
    racers = {name: Racer([*command, name], environment) for name in CONTENDERS}
    best_peers = [name for name in CONTENDERS if not name.startswith("max_conv")]
    print("| layer | shape | " + " | ".join(CONTENDERS) + " | PyTorch / NLC | best peer / NLC | best peer / NCL |")
    print("|---|---|" + "---:|" * (len(CONTENDERS) + 3))
    found: dict[str, dict[str, float]] = {}
    for layer in layers or LAYERS:
        seconds: dict[str, list[float]] = {name: [] for name in racers}
        for turn in range(rounds + 1):
            for name, racer in racers.items():
                answer = racer.ask(layer)
                if answer is None:
                    raise SystemExit(f"bench: {name} failed on {layer}; its words are above.")
                if turn:  # the first one warms up
                    seconds[name].append(answer)
        found[layer] = {name: statistics.median(times) * 1e3 for name, times in seconds.items()}
        peer = min(found[layer][name] for name in best_peers)
        nlc, ncl = found[layer]["max_conv NLC"], found[layer]["max_conv NCL"]
        ratios = [found[layer]["PyTorch"] / nlc, peer / nlc, peer / ncl]
        cells = [f"{milliseconds:.3f}" for milliseconds in found[layer].values()] + [f"{ratio:.2f}" for ratio in ratios]
        print(f"| {layer} | {LAYERS[layer]} | " + " | ".join(cells) + " |", flush=True)
    for racer in racers.values():
        racer.process.kill()
    if file:
        file.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
