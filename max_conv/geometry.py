"""The arithmetic of a 1-D convolution: lengths, padding and the halo. Nothing else computes these."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, Literal, get_args

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
PADDING_MODES: tuple[str, ...] = get_args(PaddingMode)
"""In the order of their numbers in the kernels."""

LIMIT = 2**31
"""Of every argument: products and sums of them stay far within 64 bits."""

Padding = int | Sequence[int] | Literal["same", "valid", "causal"]


def positive(name: str, value: Any) -> int:
    """Returns `value` as an int of at least 1, or raises an error that names the argument."""
    number = _integer(name, value)
    if number < 1:
        raise ValueError(f"conv1d: {name} must be at least 1, but is {number}.")
    return number


def _integer(name: str, value: Any) -> int:
    if not isinstance(value, bool):
        try:
            number = index(value)
        except TypeError:
            pass
        else:
            if abs(number) < LIMIT:
                return number
            raise ValueError(f"conv1d: {name} must be less than 2**31, but is {number}.")
    raise TypeError(f"conv1d: {name} must be an int, but is {value!r} ({type(value).__name__}).")


@dataclass(frozen=True)
class Geometry:
    """What a convolution does along the length, whatever its channels.

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
        left, right = cls._sides(padding, dilation * (kernel_size - 1), stride)
        return cls(kernel_size, stride, dilation, left, right, padding_mode)  # type: ignore[arg-type]

    @staticmethod
    def _sides(padding: Padding, overhang: int, stride: int) -> tuple[int, int]:
        if isinstance(padding, str):
            if padding == "valid":
                return 0, 0
            if padding == "causal":
                return overhang, 0
            if padding != "same":
                raise ValueError(
                    f'conv1d: padding must be an int, (left, right), "same", "valid" or "causal", but is {padding!r}.'
                )
            if stride != 1:
                raise ValueError(
                    f'conv1d: padding="same" needs stride 1, but stride is {stride}; pass the padding as numbers.'
                )
            return overhang // 2, overhang - overhang // 2
        sides = tuple(padding) if isinstance(padding, tuple | list) else (padding, padding)
        if len(sides) != 2:
            raise ValueError(
                f"conv1d: padding must be one int or (left, right), but has {len(sides)} values: {padding!r}."
            )
        left, right = (_integer("padding", side) for side in sides)
        if left < 0 or right < 0:
            raise ValueError(f"conv1d: padding must not be negative, but is {padding!r}; slice the input instead.")
        return left, right

    @property
    def reach(self) -> int:
        """Input positions that one output sees, first to last."""
        return self.dilation * (self.kernel_size - 1) + 1

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
        """Raises ValueError where an input of `length` positions is too short for the filter or its padding."""
        padded = length + self.left + self.right
        if padded < self.reach:
            raise ValueError(
                f"conv1d: the filter reaches over {self.reach} positions (kernel_size {self.kernel_size}, dilation "
                f"{self.dilation}), but the padded input has only {padded}; pad more or pass a longer input."
            )
        # A reflection leaves out the edge itself, a circle does not.
        room = {"reflect": length - 1, "circular": length}.get(self.padding_mode, max(self.left, self.right))
        if (length == 0 and self.padding_mode != "zeros") or max(self.left, self.right) > room:
            raise ValueError(
                f"conv1d: padding_mode={self.padding_mode!r} cannot pad ({self.left}, {self.right}) from an input of "
                f"{length} positions; pad less or pass a longer input."
            )

    def source(self, position: int, length: int) -> int | None:
        """Returns the input position that stands at `position` of the padded line, or None where it is zero.

        Position 0 is the first input value, the left padding is negative.

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
