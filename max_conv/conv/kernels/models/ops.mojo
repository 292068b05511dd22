"""Registers Silero's network as one operation. Run-time sizes are checked before any memory is touched."""

import extensibility
from extensibility import InputTensor, OutputTensor

from ..recurrent.lstm import Lstm
from ..tensors import memory
from .silero_vad import Network, silero_vad


@extensibility.register("max_conv.silero_vad")
struct SileroVad:
    """Silero's network over (N, T, hop) chunks, on a CPU. `graphs/silero_vad.py` makes its operands.

    `sizes` has taps, stride, padding and filters of each layer, `weights` its panels and its bias, `head` the last
    layer's filter and its bias. A row of `state` holds the samples before the first chunk, the hidden state and the
    cell state.
    """

    @staticmethod
    def execute(
        probability: OutputTensor[dtype=DType.float32, rank=2, ...],
        last_state: OutputTensor[dtype=DType.float32, rank=2, ...],
        chunks: InputTensor[dtype=DType.float32, rank=3, ...],
        state: InputTensor[dtype=DType.float32, rank=2, ...],
        sizes: InputTensor[dtype=DType.int64, rank=2, ...],
        weights: InputTensor[dtype=DType.float32, rank=1, ...],
        w_hh: InputTensor[dtype=DType.float32, rank=2, ...],
        head: InputTensor[dtype=DType.float32, rank=1, ...],
        reflected: Scalar[DType.int64],
    ) raises:
        var batch = chunks.dim_size(0)
        var steps = chunks.dim_size(1)
        var units = w_hh.dim_size(0)
        if steps == 0:
            raise Error("silero_vad: chunks must hold at least one chunk of each signal.")
        var net = Network(
            memory(chunks),
            memory(state),
            state.dim_size(1),
            steps,
            chunks.dim_size(2),
            state.dim_size(1) - 2 * units,
            Int(reflected),
            [],
        )
        var next = memory(weights)
        for i in range(sizes.dim_size(0)):
            next = net.add(Int(sizes[i, 0]), Int(sizes[i, 1]), Int(sizes[i, 2]), Int(sizes[i, 3]), next)
        if next != weights.unsafe_ptr().unsafe_offset(weights.dim_size(0)):
            raise Error("silero_vad: the weights do not fit their sizes.")
        var w = memory(w_hh)
        silero_vad(
            net,
            Lstm[DType.float32](w, w, w, w, w, w, w, batch=batch, steps=steps, rows=steps, units=units),
            memory(head),
            memory(probability),
            memory(last_state),
        )
