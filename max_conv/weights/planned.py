"""The plan for the tensors of a checkpoint, and the axis orders of their filters."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .marker import Marker, Side

Kind = Literal["conv", "conv_transpose", "copy"]
Source = Literal["native", "torch", "mlx", "keras"]

ORDERS: dict[str, dict[str, str]] = {
    "conv": {"torch": "FCS", "native": "SCF", "mlx": "FSC", "keras": "SCF"},
    "conv_transpose": {"torch": "CFS", "native": "SFC", "mlx": "FSC", "keras": "SFC"},
}
"""The axis order of filters in native files and in each library; MLX's transposed filters have one group."""


@dataclass(frozen=True)
class Planned:
    """One tensor of the output.

    Attributes:
        name: Its name in the output.
        sources: The names of the tensors it is made from, by their part: "w" alone is the tensor itself.
        kind: "conv", "conv_transpose" or "copy".
        shape: Its shape in the source's layout.
        dtype: safetensors' name of its dtype, before a cast.
        norm: The norm that is folded, "weight norm", "spectral norm", "pruning" or "".
        batch_norm: The names of the batch norm's tensors, by their last part, or None.
        declared: Whether a pattern names it.
    """

    name: str
    sources: Mapping[str, str]
    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    norm: str = ""
    batch_norm: Mapping[str, str] | None = None
    declared: bool = True

    @property
    def plain(self) -> bool:
        """Whether its values are the same as in one tensor of the source."""
        return not self.norm and self.batch_norm is None


@dataclass
class Plan:
    """Every tensor of the output, in order; the source's and the target's layout; the names that were dropped."""

    tensors: list[Planned]
    source: Source
    target: Side
    dropped: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)

    def order(self, item: Planned) -> tuple[str, str] | None:
        """Returns a filter's axis orders in the source and in the output, or None if the tensor is not a filter."""
        if item.kind == "copy":
            return None
        return ORDERS[item.kind][self.source], ORDERS[item.kind][self.target]

    def filters(self, item: Planned) -> int:
        """Returns the size of a filter's axis F; in PyTorch's and native transposed filters it is one group's size."""
        return item.shape[ORDERS[item.kind][self.source].index("F")]

    def groups(self, item: Planned, count: int) -> int:
        """Returns the groups of a layer with `count` filters, or 0 if its filter does not fit that number.

        >>> plan = Plan([], "torch", "native")
        >>> plan.groups(Planned("up.weight", {}, "conv_transpose", (6, 4, 5), "F32"), 8)
        2
        """
        filters = self.filters(item)
        if count == filters:
            return 1
        # A transposed filter has one group's filters: the number of groups follows from the bias or the batch norm.
        grouped = item.kind == "conv_transpose" and self.source in ("torch", "native")
        channels = item.shape[ORDERS[item.kind][self.source].index("C")]
        groups = count // filters if grouped and filters and count and not count % filters else 0
        return groups if groups and not channels % groups else 0

    def shape(self, item: Planned) -> tuple[int, ...]:
        """Returns a tensor's shape in the output."""
        orders = self.order(item)
        return item.shape if orders is None else tuple(item.shape[orders[0].index(axis)] for axis in orders[1])

    def marker(self) -> Marker:
        """Returns the marker of the output."""
        conv, transposed = (
            tuple(sorted(item.name for item in self.tensors if item.kind == kind))
            for kind in ("conv", "conv_transpose")
        )
        return Marker(self.target, conv, transposed, self.renamed)
