"""Finds the state dict in the file that a training script saved."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .safetensors_file import some

WRAPPERS = ("state_dict", "model_state_dict", "model", "generator", "model_g", "module")
"""Names under which training scripts keep the state dict, next to optimizers, steps and hyper-parameters."""

DEPTH = 6
"""How deep the search for state dicts goes."""


def find_state_dict(found: Any, path: Path, key: str | None, tensor: type) -> tuple[dict[Any, Any], list[str]]:
    """Returns a state dict from a file's contents, and sentences about other state dicts that could have been used.

    Args:
        found: The file's contents.
        path: The file, for messages.
        key: The keys that lead to the state dict, with dots between them; dots in a key may be written `\\\\.`. None
            uses the state dict under one of `WRAPPERS`.
        tensor: The class of tensors.

    Raises:
        ValueError: If there is none; the message lists the keys that exist.

    >>> find_state_dict({"net": {"a": 1.5}}, Path("m.pt"), "net", float)
    ({'a': 1.5}, [])
    """
    there = _state_dicts(found, tensor, set())
    taken = ""
    if key is not None:
        ways = list(_ways(found, key))
        if not ways:
            raise ValueError(f"checkpoint: {path} has nothing at the key {key!a:.80}; {_keys(found, there)}.")
        found = ways[0]
    else:
        for _ in WRAPPERS:
            inside = [name for name in WRAPPERS if isinstance(found, dict) and isinstance(found.get(name), dict)]
            # A dict of settings may also have such a name.
            full = [name for name in inside if any(_below(f"{taken}{name}", place) for place in there)]
            if not (full or inside):
                break
            found = found[(full or inside)[0]]
            taken += f"{(full or inside)[0]}."
    said = f" at the key {key!a:.80}" if key is not None else ""
    if not isinstance(found, dict):
        raise ValueError(
            f"checkpoint: {path} holds more than a state dict: a {_type(found)}{said}; {_advice(found, there)}."
        )
    for name, value in found.items():
        if not isinstance(value, tensor) and not is_extra(name, value):
            raise ValueError(
                f"checkpoint: {path} holds more than a state dict: {name!a:.60}{said} is a {_type(value)}; "
                f"{_advice(found, there)}."
            )
    others = [place for place in there if key is None and not _below(taken.rstrip("."), place)]
    if not (taken and others):
        return found, []
    return found, [f"took {taken.rstrip('.')} of {path}, which also has {some(others)}: --key takes another."]


def is_extra(name: Any, value: Any) -> bool:
    """Returns whether an entry of a state dict is not a weight, but extra data that modules save.

    >>> is_extra("layer._extra_state", {"version": 1}), is_extra("layer.bias", None)
    (True, True)
    """
    return value is None or (isinstance(name, str) and name.rpartition(".")[2] == "_extra_state")


def _state_dicts(found: Any, tensor: type, seen: set[int], depth: int = DEPTH) -> list[str]:
    """Returns the keys, with dots between them, of all state dicts; each dict is visited once."""
    if not isinstance(found, dict) or not depth or id(found) in seen:
        return []
    seen.add(id(found))
    places = []
    for key, inner in found.items():
        if not isinstance(key, str) or not isinstance(inner, dict):
            continue
        values = [value for name, value in inner.items() if not is_extra(name, value)]
        shown = f"{key!a:.60}"[1:-1]
        if values and all(isinstance(value, tensor) for value in values) and all(isinstance(n, str) for n in inner):
            places.append(shown)
        places += [f"{shown}.{place}" for place in _state_dicts(inner, tensor, seen, depth - 1)]
    return places


def _ways(found: Any, key: str) -> Iterator[Any]:
    """Yields the values at a key. Its dots can be read in several ways; the ways with the shortest names come first."""
    if isinstance(found, Mapping):
        entries = {str(name): value for name, value in found.items()}
    else:
        entries = {str(i): value for i, value in enumerate(found)} if isinstance(found, list | tuple) else {}
    for name in sorted(entries, key=len):
        escaped = name.replace("\\", "\\\\").replace(".", "\\.")
        for spelling in dict.fromkeys((escaped, name)):
            if key == spelling:
                yield entries[name]
            elif spelling and key.startswith(f"{spelling}."):
                yield from _ways(entries[name], key.removeprefix(f"{spelling}."))


def _type(value: Any) -> str:
    """Returns the name of a value's type; objects of other types in a pickle were not made."""
    return type(value).__name__ if type(value).__module__ in ("builtins", "collections", "torch") else "pickled object"


def _below(place: str, other: str) -> bool:
    return other == place or other.startswith(f"{place}.")


def _keys(found: Any, there: list[str]) -> str:
    """Returns a sentence part with the possible keys: of state dicts, or otherwise of the file."""
    if there:
        return f"--key takes {some(there)}"
    names = [f"{name!a:.60}" for name in found] if isinstance(found, dict) else []
    return f"it has the keys {some(names)}" if names else "it has no keys"


def _advice(found: Any, there: list[str]) -> str:
    return _keys(found, there) if there else f"save module.state_dict() alone, because {_keys(found, there)}"
