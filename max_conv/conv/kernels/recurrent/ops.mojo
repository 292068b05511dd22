"""Registers the recurrent operation. Run-time sizes are checked before any memory is touched."""

import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu.host import DeviceContext
from max.gpu.host.info import is_cpu

from ..tensors import memory
from .lstm import GATES, Lstm, lstm_cpu, lstm_gpu


@extensibility.register("max_conv.lstm")
struct LongShortTermMemory:
    """The recurrent part of an LSTM. `x` is the input's share of the gates, (N, T or more, 4H)."""

    @staticmethod
    def execute[
        target: StaticString
    ](
        output: OutputTensor[rank=3, ...],
        last_hidden: OutputTensor[dtype=output.dtype, rank=2, ...],
        last_cell: OutputTensor[dtype=output.dtype, rank=2, ...],
        x: InputTensor[dtype=output.dtype, rank=3, ...],
        w: InputTensor[dtype=output.dtype, rank=2, ...],
        hidden: InputTensor[dtype=output.dtype, rank=2, ...],
        cell: InputTensor[dtype=output.dtype, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        comptime assert output.dtype == DType.float32 or output.dtype == DType.float64
        var batch = output.dim_size(0)
        var units = output.dim_size(2)
        if (
            x.dim_size(0) != batch
            or x.dim_size(1) < output.dim_size(1)
            or x.dim_size(2) != GATES * units
            or w.dim_size(0) != units
            or w.dim_size(1) != GATES * units
        ):
            raise Error(
                "lstm: the gates and the weights do not fit an output of ",
                units,
                " units; pass what the graph was built for.",
            )
        if (
            hidden.dim_size(0) != batch
            or cell.dim_size(0) != batch
            or hidden.dim_size(1) != units
            or cell.dim_size(1) != units
        ):
            raise Error(
                "lstm: hidden and cell must both have shape (",
                batch,
                ", ",
                units,
                "); pass states of the gates' batch and units.",
            )
        if batch == 0:
            return
        var s = Lstm[output.dtype](
            memory(x),
            memory(w),
            memory(hidden),
            memory(cell),
            memory(output),
            memory(last_hidden),
            memory(last_cell),
            batch=batch,
            steps=output.dim_size(1),
            rows=x.dim_size(1),
            units=units,
        )
        comptime if is_cpu[target]():
            lstm_cpu(s)
        else:
            lstm_gpu(s, ctx)
