"""Proves that a change of the kernels' sources changes no bit of their results.

    python scripts/replay.py record FILE      before the change: writes a digest of every output
    python scripts/replay.py compare FILE     after it: computes them again, and names the ones that differ

The cases are random layers (replay_layers.py) and small networks of graphs/ (replay_networks.py), on seeded random data and
weights; nothing is downloaded. Compiling takes minutes: `--layers`, `--networks` and `--no-networks` leave cases out.
If FILE exists already, `record` keeps the cases that it does not compute. Bits are the same only on the same machine,
with the same MAX and the same number of threads: otherwise `compare` is an error. All NaNs are equal, with any
sign and payload.
"""

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import replay_networks

if TYPE_CHECKING:
    from max.driver import Buffer

Digests = dict[str, dict[str, str]]
"""By a case's name: the output's digest, and the kernel that computed it."""


def machine() -> dict[str, Any]:
    """Returns the facts, other than the sources, that the bits of an output may depend on."""
    text = Path("/proc/cpuinfo").read_text()
    told = {
        name: re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE) for name in ("model name", "flags", "Features")
    }
    cpu = {name: " ".join(sorted(found[1].split())) for name, found in told.items() if found}
    return {"cpu": cpu, "threads": len(os.sched_getaffinity(0)), "max": version("max")}


def digest(output: "Buffer") -> str:
    """Returns the SHA-256 of an output's dtype, shape and bits."""
    import numpy as np
    from max.dtype import DType

    sixteen = output.dtype == DType.bfloat16
    values = (output.view(DType.uint16, output.shape) if sixteen else output).to_numpy()
    if sixteen:
        values = np.where((values & 0x7FFF) > 0x7F80, np.uint16(0x7FC0), values)
    elif values.dtype.kind == "f":
        values = np.where(np.isnan(values), values.dtype.type(np.nan), values)
    head = f"{output.dtype.name} {tuple(output.shape)} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(values).tobytes()).hexdigest()


def compute(layers: int, networks: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields the name of every case, the kernel that computed it, and its digest."""
    import replay_layers

    for name, kernel, output in replay_layers.outputs(layers) if layers else ():
        yield name, {"kernel": kernel, "digest": digest(output)}
    for network in networks:
        start = time.perf_counter()
        for i, output in enumerate(replay_networks.outputs(network)):
            yield f"network {network} output {i}", {"kernel": "", "digest": digest(output)}
        click.echo(f"replay: {network} took {time.perf_counter() - start:.0f} s", err=True)


def read(file: Path) -> Digests:
    """Returns the cases of a recording.

    Raises:
        click.ClickException: If the file is not a recording, or is from another machine.
    """
    try:
        recorded = json.loads(file.read_text())
        cases, there = recorded["cases"], recorded["machine"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise click.ClickException(f"{file} is no recording of replay.py ({error}); record one.") from None
    if there != (here := machine()):
        differing = ", ".join(sorted(key for key in here if there.get(key) != here[key]))
        raise click.ClickException(f"{file} was recorded on another machine ({differing}); record it on this one.")
    return cases


def write(file: Path, cases: Mapping[str, Mapping[str, str]]) -> None:
    """Writes a recording, whole or not at all."""
    part = file.with_name(f"{file.name}.{os.getpid()}")
    part.write_text(json.dumps({"machine": machine(), "cases": cases}, indent=0))
    part.replace(file)


def report(recorded: Digests, now: Digests, shown: int = 10) -> tuple[list[str], bool]:
    """Returns lines that say how many of the cases computed now are as recorded, and whether all are."""
    faults = []
    for name, case in now.items():
        before = recorded.get(name)
        if before is None:
            faults.append(f"not in the file: {name}")
        elif before["digest"] != case["digest"]:
            kernels = " -> ".join(dict.fromkeys((before["kernel"], case["kernel"])))
            faults.append(f"differs: {name}{kernels and f' ({kernels})'}")
    lines = [f"{len(now) - len(faults)} of {len(now)} cases are equal, bit for bit"]
    if left := len(recorded.keys() - now.keys()):
        lines[0] += f"; {left} of the file were not computed"
    more = [f"and {len(faults) - shown} more"] if len(faults) > shown else []
    return [*lines, *faults[:shown], *more], bool(now) and not faults


@click.command()
@click.argument("action", type=click.Choice(["record", "compare"]))
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--layers", default=2000, show_default=True, type=click.IntRange(0), help="Random layers.")
@click.option("--networks", default=",".join(replay_networks.NETWORKS), show_default=True, help="Their names.")
@click.option("--no-networks", is_flag=True, help="Only layers.")
def main(action: str, file: Path, layers: int, networks: str, no_networks: bool) -> None:
    """Records what layers and networks compute, or compares it with the recording in FILE."""
    names = [] if no_networks else [name for name in networks.split(",") if name]
    for name in names:
        if name not in replay_networks.NETWORKS:
            raise click.ClickException(
                f"there is no network {name!r}; the networks are {', '.join(replay_networks.NETWORKS)}."
            )
    if not file.resolve().parent.is_dir():
        raise click.ClickException(f"{file} cannot be written: there is no folder {file.resolve().parent}.")
    recorded = read(file) if action == "compare" or file.exists() else {}
    start = time.perf_counter()
    now = dict(compute(layers, names))
    click.echo(f"replay: {len(now)} cases took {time.perf_counter() - start:.0f} s", err=True)
    if action == "record":
        write(file, recorded | now)
        return
    lines, equal = report(recorded, now)
    click.echo("\n".join(lines))
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
