"""Reference convolutions to compare with: NumPy, float64, not fast."""

from typing import Any

import numpy as np

from .geometry import Geometry, Padding, TransposedGeometry
from .layouts import FilterLayout, Layout, by_group, permute


def conv1d_ref(
    x: Any,
    filter: Any,
    bias: Any = None,
    *,
    stride: int = 1,
    padding: Padding = 0,
    dilation: int = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    layout: Layout = "NLC",
    filter_layout: FilterLayout = "SCF",
) -> np.ndarray:
    """Convolves a sequence with a filter in float64, with the arguments of `max_conv.conv1d`.

    `out[n, l, f] = bias[f] + sum over k, c of x[n, l * stride + k * dilation - left, c] * filter[k, c, f]`

    Args:
        x: (N, L, C) or, with layout "NCL", (N, C, L); the batch axis may be missing.
        filter: (K, C / groups, F) or another order named by `filter_layout`.
        bias: (F,) or None.
        stride, padding, dilation, groups, padding_mode: As in `max_conv.conv1d`.

    Returns:
        (N, L_out, F) or (N, F, L_out), float64.

    >>> conv1d_ref([[[1.0], [2.0], [4.0]]], [[[1.0]], [[10.0]]]).ravel().tolist()
    [21.0, 42.0]
    """
    x = np.asarray(x, np.float64)
    if x.ndim == 2:
        options: dict[str, Any] = {"padding_mode": padding_mode, "layout": layout, "filter_layout": filter_layout}
        return conv1d_ref(
            x[None], filter, bias, stride=stride, padding=padding, dilation=dilation, groups=groups, **options
        )[0]
    x = permute(x, layout, "NLC")
    w = permute(np.asarray(filter, np.float64), filter_layout, "SCF")
    taps, group_channels, filters = w.shape
    batch, length, _ = x.shape
    geometry = Geometry.of(taps, stride, padding, dilation, padding_mode)
    geometry.check_length(length)

    # The padded input. Positions of zero padding index an extra row of zeros at the end.
    rows = [geometry.source(p, length) for p in range(-geometry.left, length + geometry.right)]
    line = np.concatenate([x, np.zeros((batch, 1, x.shape[2]))], axis=1)[:, [length if r is None else r for r in rows]]

    starts = np.arange(geometry.output_length(length)) * stride
    parts = line.reshape(batch, line.shape[1], groups, group_channels).swapaxes(1, 2)
    w = w.reshape(taps, group_channels, groups, filters // groups).swapaxes(1, 2)
    out = np.zeros((batch, groups, len(starts), filters // groups))
    for k in range(taps):
        out += parts[:, :, starts + k * dilation] @ w[k]
    out = out.swapaxes(1, 2).reshape(batch, len(starts), filters)
    if bias is not None:
        out += np.asarray(bias, np.float64)
    return permute(out, "NLC", layout)


def conv_transpose1d_ref(
    x: Any,
    filter: Any,
    bias: Any = None,
    *,
    stride: int = 1,
    padding: Any = 0,
    output_padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    output_size: int | None = None,
    layout: Layout = "NLC",
    filter_layout: str = "SFC",
) -> np.ndarray:
    """Convolves a sequence transposed in float64, with the arguments of `max_conv.conv_transpose1d`.

    Each input value adds its filter to the outputs: `out[n, i * stride + k * dilation - left, f] += x[n, i, c] * filter[k,
    f, c]`. Positions outside the output are dropped.

    >>> conv_transpose1d_ref([[[1.0], [2.0]]], [[[1.0]], [[10.0]]], stride=2).ravel().tolist()
    [1.0, 10.0, 2.0, 20.0]
    """
    x = np.asarray(x, np.float64)
    if x.ndim == 2:
        options: dict[str, Any] = {"output_size": output_size, "layout": layout, "filter_layout": filter_layout}
        sizes = {"stride": stride, "padding": padding, "output_padding": output_padding, "dilation": dilation}
        return conv_transpose1d_ref(x[None], filter, bias, groups=groups, **sizes, **options)[0]
    x = permute(x, layout, "NLC")
    w = by_group(np.asarray(filter, np.float64), filter_layout, groups)
    batch, length, _ = x.shape
    geometry = TransposedGeometry.of(len(w), stride, padding, output_padding, dilation)
    if output_size is not None:
        geometry = geometry.with_output(length, output_size)
    geometry.check_length(length)

    # All outputs that the input reaches, and the outputs that output_padding adds; the padding is cut off below.
    reached = np.zeros((batch, (length - 1) * stride + geometry.reach + geometry.output_padding, groups, w.shape[3]))
    parts = x.reshape(batch, length, groups, x.shape[2] // groups).swapaxes(1, 2)
    for k in range(len(w)):
        start = k * dilation
        reached[:, start : start + (length - 1) * stride + 1 : stride] += (parts @ w[k]).swapaxes(1, 2)
    kept = reached[:, geometry.left : reached.shape[1] - geometry.right]
    out = kept.reshape(*kept.shape[:2], groups * w.shape[3])
    if bias is not None:
        out += np.asarray(bias, np.float64)
    return permute(out, "NLC", layout)
