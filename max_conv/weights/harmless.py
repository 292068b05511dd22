"""Objects that training scripts pickle next to the weights. They are allowed by name; an empty object replaces each.

The real classes are never instantiated or called, so none of their code runs and no memory is allocated.
"""

from typing import Any


class Nothing:
    """Replaces an object, which is not made."""

    def __new__(cls, *args: Any) -> "Nothing":
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        """Ignores the arguments of the object's constructor."""

    def __setstate__(self, state: Any) -> None:
        """Ignores the object's state."""


class EmptyDict:
    """Makes a plain dict, which PyTorch's unpickler may fill."""

    def __new__(cls, *args: Any) -> Any:
        return {}


class EmptyList:
    """Makes a plain list, which PyTorch's unpickler may fill."""

    def __new__(cls, *args: Any) -> Any:
        return []


_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_NUMPY = [
    "dtype",
    "ndarray",
    "generic",
    "number",
    "bool",
    "bool_",
    "str_",
    "bytes_",
    "datetime64",
    "timedelta64",
    "complex64",
    "complex128",
]
_NUMPY += [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
_NUMPY += [f"float{bits}" for bits in (16, 32, 64)]
_RANDOM = "_pickle.__randomstate_ctor _pickle.__generator_ctor _pickle.__bit_generator_ctor _mt19937.MT19937"
_OMEGACONF = "dictconfig.DictConfig listconfig.ListConfig base.ContainerMetadata base.Metadata base.SCMode base.Node"
_OMEGACONF += " nodes.AnyNode nodes.StringNode nodes.IntegerNode nodes.FloatNode nodes.BooleanNode nodes.PathNode"

HARMLESS: dict[str, type] = {
    **{f"{module}.{name}": Nothing for module in ("pathlib", "pathlib._local") for name in _PATHS},
    **{f"numpy.{name}": Nothing for name in _NUMPY},
    **{
        f"numpy.{core}.{name}": Nothing
        for core in ("core", "_core")
        for name in ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")
    },
    **{f"numpy.random.{name}": Nothing for name in [*_RANDOM.split(), "_pcg64.PCG64"]},
    **{
        f"builtins.{name}": Nothing
        for name in ["int", "float", "str", "bool", "bytes", "tuple", "frozenset", "range", "slice", "object"]
    },
    **{f"datetime.{name}": Nothing for name in ["datetime", "date", "time", "timedelta", "timezone"]},
    **{f"omegaconf.{name}": Nothing for name in _OMEGACONF.split()},
    "argparse.Namespace": Nothing,
    "types.SimpleNamespace": Nothing,
    "decimal.Decimal": Nothing,
    "fractions.Fraction": Nothing,
    "uuid.UUID": Nothing,
    "typing.Any": Nothing,
    "torch.torch_version.TorchVersion": Nothing,
    "builtins.dict": EmptyDict,
    "collections.defaultdict": EmptyDict,
    "pytorch_lightning.utilities.parsing.AttributeDict": EmptyDict,
    "lightning.pytorch.utilities.parsing.AttributeDict": EmptyDict,
    "lightning.fabric.utilities.data.AttributeDict": EmptyDict,
    "lightning_fabric.utilities.data.AttributeDict": EmptyDict,
    "builtins.list": EmptyList,
    "collections.deque": EmptyList,
}
"""The replacement of each class and function, by its name in pickles."""
