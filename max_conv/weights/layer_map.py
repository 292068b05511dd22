"""The declaration of a checkpoint's tensors: which are filters, and what happens to the others."""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LayerMap:
    """Which tensors of a checkpoint are filters, and what happens to the others.

    Patterns are shell patterns of names, after renaming and after folding of weight norm: `[0]` is a class of characters,
    and a bracket in a name is written `[[]`.

    Attributes:
        conv: Filters of Conv1d layers, FCS in PyTorch, SCF native.
        conv_transpose: Filters of ConvTranspose1d layers, CFS in PyTorch, SFC native.
        copy: Every other tensor that the model uses; it stays as it is.
        ignore: Tensors that the model does not use; they are dropped, even if other patterns name them, too.
        rename: Pairs of a regular expression and its replacement for `re.sub`; applied in order, before anything else.
        optional: Patterns of `conv`, `conv_transpose` and `copy` that may name nothing.

    >>> LayerMap(conv=("conv_pre.weight",), copy=("*.bias",)).kind("conv_pre.weight")
    'conv'
    """

    conv: tuple[str, ...] = ()
    conv_transpose: tuple[str, ...] = ()
    copy: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    optional: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            fits = _is_rule if entry.name == "rename" else _is_text
            if not isinstance(value, tuple | list) or not all(fits(item) for item in value):
                what = "pairs of strings" if entry.name == "rename" else "strings"
                raise TypeError(f"convert: {entry.name} must be a list of {what}, but is {value!a:.80}.")
            object.__setattr__(self, entry.name, tuple(tuple(v) if isinstance(v, list) else v for v in value))
        if unknown := [p for p in self.optional if p not in (*self.conv, *self.conv_transpose, *self.copy)]:
            raise ValueError(f"convert: {unknown[0]!r} is optional, but no pattern of conv, conv_transpose or copy.")

    @classmethod
    def read(cls, path: str | Path) -> "LayerMap":
        """Reads a declaration from a TOML file, whose keys are the attributes' names.

        A rule of `rename` is a pair, `["old", "new"]`, or a table, `[[rename]]` with `old` and `new`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not TOML, or has a key or value that a declaration cannot have.

        >>> LayerMap.read("gone.toml")
        Traceback (most recent call last):
        FileNotFoundError: convert: there is no map gone.toml.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"convert: there is no map {path}.")
        try:
            found = tomllib.loads(Path(path).read_text())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"convert: the map {path} is not TOML: {str(error).splitlines()[0]}.") from None
        known = [entry.name for entry in fields(cls)]
        if unknown := [key for key in found if key not in known]:
            raise ValueError(
                f"convert: the map {path} has the key {unknown[0]!r}, but only {', '.join(known)} are known."
            )
        if wrong := [key for key in known if not isinstance(found.get(key, []), list)]:
            raise ValueError(f"convert: {wrong[0]} in the map {path} must be a list.")
        rules = found.get("rename", [])
        if any(isinstance(rule, dict) and rule.keys() != {"old", "new"} for rule in rules):
            raise ValueError(f"convert: a rename in the map {path} must have old and new, and nothing else.")
        found["rename"] = [[rule["old"], rule["new"]] if isinstance(rule, dict) else rule for rule in rules]
        return cls(**found)

    def kind(self, name: str) -> str | None:
        """Returns "ignore", "conv", "conv_transpose", "copy", or None if no pattern names the tensor.

        Raises:
            ValueError: If it is named as a filter of both kinds.
        """
        if matches(name, self.ignore):
            return "ignore"
        both = [kind for kind in ("conv", "conv_transpose") if matches(name, getattr(self, kind))]
        if len(both) == 2:
            raise ValueError(f"convert: {name} is named both as conv and as conv_transpose; name it once.")
        return both[0] if both else "copy" if matches(name, self.copy) else None

    def renamed(self, name: str) -> str:
        """Returns a name after the rules of `rename` have changed it.

        Raises:
            ValueError: If a rule is not a regular expression.

        >>> LayerMap(rename=(("^net[.]", ""), ("w$", "weight"))).renamed("net.conv.w")
        'conv.weight'
        """
        for old, new in self.rename:
            try:
                name = re.sub(old, new, name)
            except (re.error, IndexError) as error:
                raise ValueError(f"convert: the renaming rule {old!r} -> {new!r} is wrong: {error}.") from None
        return name


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Returns whether one of some shell patterns names a tensor.

    >>> matches("encoder.0.weight", ["*.bias", "encoder.*.weight"])
    True
    """
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_rule(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_text, value))
