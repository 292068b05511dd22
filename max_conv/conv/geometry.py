"""The arithmetic of 1-D convolutions: lengths, padding, phases and the halo. Nothing else computes these."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from operator import index
from typing import Any, Literal, get_args

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
PADDING_MODES: tuple[str, ...] = get_args(PaddingMode)
"""In the order of their numbers in the kernels."""

LIMIT = 2**31
"""The bound of every integer argument: products and sums of arguments stay far within 64 bits."""

Padding = int | Sequence[int] | Literal["same", "valid", "causal"]


def positive(name: str, value: Any, op: str = "conv1d") -> int:
    """Returns `value` as an int of at least 1, or raises an error that names the operation and the argument."""
    number = _integer(name, value, op)
    if number < 1:
        raise ValueError(f"{op}: {name} must be at least 1, but is {number}.")
    return number


def _integer(name: str, value: Any, op: str) -> int:
    if not isinstance(value, bool):
        try:
            number = index(value)
        except TypeError:
            pass
        else:
            if abs(number) < LIMIT:
                return number
            raise ValueError(f"{op}: {name} must be between -2**31 and 2**31, but is {number}.")
    raise TypeError(f"{op}: {name} must be an int, but is {value!r} ({type(value).__name__}).")


def counted(number: int, noun: str) -> str:
    """Returns a number and its noun.

    >>> counted(1, "position"), counted(2, "position")
    ('1 position', '2 positions')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _sides(padding: Any, op: str) -> tuple[int, int]:
    """Returns the padding on the left and on the right, given as one int or two."""
    sides = tuple(padding) if isinstance(padding, tuple | list) else (padding, padding)
    if len(sides) != 2:
        raise ValueError(f"{op}: padding must be one int or (left, right), but has {len(sides)} values: {padding!r}.")
    left, right = (_integer("padding", side, op) for side in sides)
    if left < 0 or right < 0:
        raise ValueError(f"{op}: padding must not be negative, but is {padding!r}; slice the input instead.")
    return left, right


@dataclass(frozen=True)
class Geometry:
    """A convolution along the length; its channels do not matter here.

    `output_length(L) = (L + left + right - dilation * (kernel_size - 1) - 1) // stride + 1`
    """

    kernel_size: int
    stride: int
    dilation: int
    left: int
    right: int
    padding_mode: PaddingMode

    @classmethod
    def of(
        cls,
        kernel_size: int,
        stride: int = 1,
        padding: Padding = 0,
        dilation: int = 1,
        padding_mode: str = "zeros",
    ) -> "Geometry":
        """Checks the arguments of a convolution and resolves its padding.

        "same" keeps the length (stride 1 only) and pads an odd total one more on the right, as PyTorch does;
        "causal" pads all of it on the left; "valid" pads nothing.

        Raises:
            TypeError, ValueError: One sentence that names the argument, its value and the rule.

        >>> Geometry.of(4, padding="same")
        Geometry(kernel_size=4, stride=1, dilation=1, left=1, right=2, padding_mode='zeros')
        """
        kernel_size = positive("kernel_size", kernel_size)
        stride = positive("stride", stride)
        dilation = positive("dilation", dilation)
        if padding_mode not in PADDING_MODES:
            raise ValueError(
                f"conv1d: padding_mode must be one of {', '.join(PADDING_MODES)}, but is {padding_mode!r}."
            )
        left, right = cls._padded(padding, dilation * (kernel_size - 1), stride)
        return cls(kernel_size, stride, dilation, left, right, padding_mode)  # type: ignore[arg-type]

    @staticmethod
    def _padded(padding: Padding, overhang: int, stride: int) -> tuple[int, int]:
        if isinstance(padding, str):
            if padding == "valid":
                return 0, 0
            if padding not in ("causal", "same"):
                raise ValueError(
                    f'conv1d: padding must be an int, (left, right), "same", "valid" or "causal", but is {padding!r}.'
                )
            if padding == "same" and stride != 1:
                raise ValueError(
                    f'conv1d: padding="same" needs stride 1, but stride is {stride}; pass the padding as numbers.'
                )
            if overhang >= LIMIT:
                raise ValueError(
                    f"conv1d: padding={padding!r} would add {overhang} positions, but must add fewer than 2**31; lower "
                    "dilation or kernel_size."
                )
            if padding == "causal":
                return overhang, 0
            return overhang // 2, overhang - overhang // 2
        return _sides(padding, "conv1d")

    @property
    def reach(self) -> int:
        """Input positions that one output depends on, first to last."""
        return self.dilation * (self.kernel_size - 1) + 1

    @property
    def is_pointwise(self) -> bool:
        """Whether each output depends on the input at its own position, and on no other."""
        return self.reach == self.stride == 1 and self.left == self.right == 0

    def output_length(self, length: Any) -> Any:
        """Returns the output's length for an input of `length` positions, an int or a symbolic dimension.

        >>> Geometry.of(3, stride=2, padding=1).output_length(3000)
        1500
        """
        grown = self.left + self.right - self.reach + 1
        if self.stride == 1:
            return length + grown if grown else length
        return (length + (grown - 1 + self.stride)) // self.stride

    def check_length(self, length: int) -> None:
        """Raises ValueError if an input of `length` positions is too short for the filter or its padding."""
        padded = length + self.left + self.right
        if padded < self.reach:
            raise ValueError(
                f"conv1d: the filter reaches over {counted(self.reach, 'position')} (kernel_size {self.kernel_size}, dilation "
                f"{self.dilation}), but the padded input has only {padded}; pad more or pass a longer input."
            )
        # "reflect" does not repeat the edge itself; "circular" may repeat the whole input.
        room = {"reflect": length - 1, "circular": length}.get(self.padding_mode, max(self.left, self.right))
        if (length == 0 and self.padding_mode != "zeros") or max(self.left, self.right) > room:
            raise ValueError(
                f"conv1d: padding_mode={self.padding_mode!r} cannot pad ({self.left}, {self.right}) from an input of "
                f"{counted(length, 'position')}; pad less or pass a longer input."
            )

    def source(self, position: int, length: int) -> int | None:
        """Returns the input position that is at `position` of the padded input, or None where the padding is zero.

        Position 0 is the first input value; positions of the left padding are negative.

        >>> [Geometry.of(3, padding=2, padding_mode="reflect").source(p, 4) for p in (-2, -1, 0, 3, 4, 5)]
        [2, 1, 0, 3, 2, 1]
        """
        if 0 <= position < length:
            return position
        match self.padding_mode:
            case "zeros":
                return None
            case "replicate":
                return 0 if position < 0 else length - 1
            case "circular":
                return position % length
            case "reflect":
                return -position if position < 0 else 2 * (length - 1) - position


@dataclass(frozen=True)
class TransposedGeometry:
    """A transposed convolution along the length.

    `output_length(L) = (L - 1) * stride - left - right + dilation * (kernel_size - 1) + output_padding + 1`

    Output `m * stride + phase * dilation - left` is the sum over taps `phase + j * step` of rows `m - j * dilation / g`
    of the input, with `g = gcd(stride, dilation)` and `step = stride / g`. So the outputs of one phase are a convolution
    of stride 1. All phases together are one such convolution with `phases` times as many filters: `convolution`.
    """

    kernel_size: int
    stride: int
    dilation: int
    left: int
    right: int
    output_padding: int

    @classmethod
    def of(
        cls,
        kernel_size: int,
        stride: int = 1,
        padding: int | Sequence[int] | Literal["causal"] = 0,
        output_padding: int = 0,
        dilation: int = 1,
    ) -> "TransposedGeometry":
        """Checks the arguments of a transposed convolution and resolves its padding.

        "causal" removes `reach - stride` positions on the right, so that the output is `stride` times as long as the
        input and no output depends on future inputs.

        Raises:
            TypeError, ValueError: One sentence that names the argument, its value and the rule.

        >>> TransposedGeometry.of(4, stride=2, padding="causal")
        TransposedGeometry(kernel_size=4, stride=2, dilation=1, left=0, right=2, output_padding=0)
        """
        op = "conv_transpose1d"
        kernel_size = positive("kernel_size", kernel_size, op)
        stride = positive("stride", stride, op)
        dilation = positive("dilation", dilation, op)
        output_padding = _integer("output_padding", output_padding, op)
        if not 0 <= output_padding < max(stride, dilation):
            raise ValueError(
                f"{op}: output_padding must be at least 0 and less than stride or dilation, but is {output_padding} "
                f"with stride {stride} and dilation {dilation}."
            )
        if isinstance(padding, str):
            if padding != "causal":
                raise ValueError(f'{op}: padding must be an int, (left, right) or "causal", but is {padding!r}.')
            left, right = _sides((0, max(0, dilation * (kernel_size - 1) + 1 - stride)), op)
        else:
            left, right = _sides(padding, op)
        return cls(kernel_size, stride, dilation, left, right, output_padding)

    @property
    def reach(self) -> int:
        """Output positions that one input value contributes to, first to last."""
        return self.dilation * (self.kernel_size - 1) + 1

    @property
    def step(self) -> int:
        """Distance, in taps, from one tap to the next tap of the same phase."""
        return self.stride // gcd(self.stride, self.dilation)

    @property
    def phases(self) -> int:
        """The number of phases that have a tap. If the stride exceeds the kernel, or shares a factor with the dilation,
        there are other outputs, whose value is only the bias.
        """
        return min(self.step, self.kernel_size)

    @property
    def convolution(self) -> Geometry:
        """The convolution of stride 1 that all phases share. Its tap t is tap `phase + step * (kernel_size - 1 - t)`.

        The padding is the most that any output needs; the kernels compute a smaller one.
        """
        taps = -(-self.kernel_size // self.step)
        dilation = self.dilation // gcd(self.stride, self.dilation)
        return Geometry(taps, 1, dilation, (taps - 1) * dilation, (taps - 1) * dilation, "zeros")

    def output_length(self, length: Any) -> Any:
        """Returns the output's length for an input of `length` positions, an int or a symbolic dimension.

        >>> TransposedGeometry.of(16, stride=8, padding=4).output_length(100)
        800
        """
        grown = self.reach + self.output_padding - self.left - self.right - self.stride
        scaled = length * self.stride if self.stride > 1 else length
        return scaled + grown if grown else scaled

    def with_output(self, length: int, output_size: int) -> "TransposedGeometry":
        """Returns the geometry with the output padding that gives an output of `output_size` positions."""
        shortest = self.output_length(length) - self.output_padding
        if not shortest <= output_size < shortest + self.stride:
            raise ValueError(
                f"conv_transpose1d: output_size must be between {shortest} and {shortest + self.stride - 1} for an input of "
                f"{counted(length, 'position')}, but is {output_size}."
            )
        return replace(self, output_padding=output_size - shortest)

    def check_length(self, length: int) -> None:
        """Raises ValueError if an input of `length` positions has no output."""
        if length < 1:
            raise ValueError(f"conv_transpose1d: x must have at least 1 position, but has {length}.")
        if self.output_length(length) < 1:
            raise ValueError(
                f"conv_transpose1d: padding ({self.left}, {self.right}) takes off all of the "
                f"{counted(self.output_length(length) + self.left + self.right, 'output')} of "
                f"{counted(length, 'position')}; pad less."
            )
