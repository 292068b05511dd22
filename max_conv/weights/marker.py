"""The marker of converted files: which layout their filters have, which tensors those are, and where they come from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

MARK = "max_conv.layout"
"""The metadata key of the marker of converted files."""
SOURCE = "max_conv.source"
"""The metadata key for the origin of a converted file."""

Side = Literal["native", "torch"]


@dataclass(frozen=True)
class Marker:
    """The marker in a converted file's metadata.

    Attributes:
        layout: "native": conv filters SCF, transposed ones SFC; "torch": FCS and CFS.
        conv, conv_transpose: The names of the filters.
        renamed: The original names of the tensors, by their present names.
    """

    layout: Side
    conv: tuple[str, ...] = ()
    conv_transpose: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, metadata: Mapping[str, str], source: str) -> "Marker | None":
        """Returns the marker in a file's metadata, or None if there is none.

        Raises:
            ValueError: If there is a marker that this version does not understand.

        >>> Marker.of({}, "model.safetensors") is None
        True
        """
        if MARK not in metadata:
            return None
        try:
            found = json.loads(metadata[MARK])
            marker = cls(found["layout"], tuple(found["conv"]), tuple(found["conv_transpose"]), found["renamed"])
        except (ValueError, KeyError, TypeError, RecursionError):
            marker = None
        if marker is None or not _sound(marker):
            raise ValueError(
                f"checkpoint: {source} has a layout marker that cannot be read; convert the original again."
            )
        return marker

    def text(self) -> str:
        """Returns the marker as text, for the metadata."""
        facts: dict[str, Any] = {"layout": self.layout, "conv": self.conv, "conv_transpose": self.conv_transpose}
        return json.dumps(facts | {"renamed": dict(self.renamed)}, ensure_ascii=False)

    def kind(self, name: str) -> str:
        """Returns "conv", "conv_transpose" or "copy".

        >>> Marker("native", conv=("a.weight",)).kind("a.weight")
        'conv'
        """
        return "conv" if name in self.conv else "conv_transpose" if name in self.conv_transpose else "copy"


def _sound(marker: Marker) -> bool:
    names = (*marker.conv, *marker.conv_transpose)
    return (
        marker.layout in ("native", "torch")
        and all(isinstance(name, str) for name in names)
        and len(set(names)) == len(names)
        and isinstance(marker.renamed, dict)
        and all(isinstance(name, str) and name and name.isprintable() for name in marker.renamed.values())
        and len(set(marker.renamed.values())) == len(marker.renamed)
    )
