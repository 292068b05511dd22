"""Devices by the names that ports have, and the MAX session that runs on them."""

import functools
from typing import Any

from max.driver import (
    CPU,
    Accelerator,
    Device,
    accelerator_count,
    get_virtual_cpu_target,
    set_virtual_cpu_target,
)
from max.engine import InferenceSession
from max.graph import DeviceRef, Dim, StaticDim, SymbolicDim

from ..conv.processor import cpu_target
from .ports import Port


def port_of(name: str, type_: Any) -> Port:
    """Returns the port of an input or output of a graph."""
    return Port(name, type_.dtype.name, tuple(map(size_in, type_.shape)), name_of(type_.device))


def size_in(dim: Dim) -> int | str:
    """Returns a dimension of a graph as it is in a port's shape: a number, a name, or an expression of names."""
    return int(dim) if isinstance(dim, StaticDim) else dim.name if isinstance(dim, SymbolicDim) else str(dim)


def name_of(device: DeviceRef) -> str:
    return "cpu" if device.is_cpu() else f"gpu:{device.id}"


def accelerators(*ports: Port) -> tuple[str, ...]:
    """Returns the names of the devices of ports, without the CPU."""
    return tuple(sorted({port.device for port in ports} - {"cpu"}))


def device_of(name: str) -> Device:
    """Returns the accelerator that a port names."""
    number = int(name.removeprefix("gpu:"))
    if number >= accelerator_count():
        raise ValueError(f"model: needs {name}, but this machine has {accelerator_count()} accelerators; use the CPU.")
    return Accelerator(number)


@functools.cache
def session_of(devices: tuple[str, ...] = ()) -> InferenceSession:
    """Returns this process's session on the CPU and on accelerators."""
    if (target := cpu_target()) and not get_virtual_cpu_target():
        set_virtual_cpu_target(target)
    return InferenceSession(devices=[*(device_of(name) for name in devices), CPU()])
