"""Which inputs an output depends on, computed layer by layer."""

from dataclasses import dataclass
from fractions import Fraction
from math import floor

from ..conv.dispatch import Layer


@dataclass(frozen=True)
class Span:
    """Which inputs an output depends on, in positions of the graph's first input.

    Attributes:
        step: Inputs from one output to the next; 1/256 for a vocoder that makes 256 samples from a frame.
        left: How many positions back an output depends on inputs; None means without limit.
        right: How many positions ahead an output depends on inputs; None means without limit.
    """

    step: Fraction = Fraction(1)
    left: Fraction | None = Fraction(0)
    right: Fraction | None = Fraction(0)

    @property
    def field(self) -> int | None:
        """The receptive field: the most inputs that an output depends on; None means without limit."""
        return None if self.left is None or self.right is None else floor(self.left + self.right) + 1

    def through(self, layer: Layer) -> "Span":
        """Returns the span of a convolution's outputs; its inputs have this span."""
        geometry = layer.transposed or layer.geometry
        before = geometry.left * self.step
        after = (geometry.reach - 1 - geometry.left) * self.step
        if layer.transposed is None:
            return Span(self.step * geometry.stride, _add(self.left, before), _add(self.right, after))
        # Output o uses input i if o + left = i * stride + k * dilation: taps reach back, the padding ahead.
        step = self.step / geometry.stride
        return Span(step, _add(self.left, after / geometry.stride), _add(self.right, before / geometry.stride))

    def beside(self, other: "Span") -> "Span":
        """Returns the span of an output that is computed from two values."""
        return Span(min(self.step, other.step), _most(self.left, other.left), _most(self.right, other.right))


def _add(a: Fraction | None, b: Fraction) -> Fraction | None:
    return None if a is None else a + b


def _most(a: Fraction | None, b: Fraction | None) -> Fraction | None:
    return None if a is None or b is None else max(a, b)
