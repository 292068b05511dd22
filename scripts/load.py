#!/usr/bin/env python3
"""Loads `max-conv serve`: measures how many requests per second it answers, and checks every answer.

    python scripts/load.py chunk | file [--clients 1,8,32] [--seconds 5] [--rounds 3]
    python scripts/load.py streams [--count 200] [--seconds 20]
    python scripts/load.py callers [--clients 1,4,16] [--chunk 8] [--seconds 10]
    python scripts/load.py connections [--count 1000]
    python scripts/load.py faults [--seconds 120] [--restart 40]

`chunk` and `file` race Silero (32 ms with its state, and 30 s) against ONNX Runtime in the same server code, each in a separate
process, alternately. `streams` sends live sound at the speed of speech through WebSockets. `callers` streams HiFi-GAN
V1 by live signals, and by windows with the frames around them. `faults` mixes good
requests with bad ones, clients that disconnect, and restarts. Everything is on the loopback interface, and limited in time and count.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np

ENVIRONMENT = dict(os.environ)
CONTENDERS = ("max_conv", "ONNX Runtime")
CHUNKS = {"chunk": 1, "file": 938}


def model_of(contender: str, folder: Path) -> Any:
    """Returns the model that the server serves."""
    if contender == "max_conv":
        import max_conv

        return max_conv.load(folder / "silero.maxconv")
    import onnxruntime

    from max_conv.runtime import Port

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count() or 1
    session = onnxruntime.InferenceSession(str(folder / "silero.onnx"), options, ["CPUExecutionProvider"])
    sound, state = Port("chunks", "float32", ("batch", "time", 512)), Port("state", "float32", ("batch", 320))
    outputs = (Port("probability", "float32", ("batch", "time")), state)

    class Onnx(SimpleNamespace):
        def __call__(self, chunks: np.ndarray, memory: np.ndarray) -> tuple[np.ndarray, ...]:
            return tuple(session.run(None, {"chunks": chunks, "state": memory}))

    return Onnx(inputs=(sound, state), outputs=outputs, timing=None, facts={})


def prepare(folder: Path) -> None:
    """Writes Silero for each contender, with the same weights, and a live one."""
    import torch
    from max_conv.graphs import silero_vad

    import max_conv
    import networks

    module, inputs = networks.silero(1, 3)
    sizes = {"chunks": {0: "batch", 1: "time"}, "state": {0: "batch"}}
    with torch.no_grad():
        torch.onnx.export(
            module,
            tuple(torch.from_numpy(array) for array in inputs),
            folder / "silero.onnx",
            input_names=[*sizes],
            output_names=["probability", "new_state"],
            dynamic_axes=sizes | {"probability": {0: "batch", 1: "time"}, "new_state": {0: "batch"}},
            dynamo=False,
            opset_version=17,
        )
    weights = silero_vad.load_weights(silero_vad.SAFETENSORS)
    max_conv.compile(silero_vad.build(silero_vad.Config(), weights), weights=weights).save(folder / "silero.maxconv")
    live = max_conv.streaming(silero_vad.build, silero_vad.Config(), weights)
    max_conv.compile(live, weights=weights).save(folder / "live.maxconv")


def prepare_callers(folder: Path) -> None:
    """Writes HiFi-GAN V1, whole and live, a spectrogram of 2 s, and its sound."""
    from math import ceil

    from max_conv.graphs import hifigan

    import live_networks
    import max_conv
    from max_conv.streaming import describe

    name, config = "HiFi-GAN V1", hifigan.Config()
    weights = live_networks.weights_of(name)
    graph = hifigan.build(config, weights)
    span = describe(graph).span
    model = max_conv.compile(graph, weights=weights)
    model.save(folder / "whole.maxconv")
    max_conv.compile(max_conv.streaming(hifigan.build, config, weights), weights=weights).save(folder / "live.maxconv")
    mels = live_networks.signal_of(name)[:, :176]
    sound = model(mels)
    np.save(folder / "mels.npy", mels)
    np.save(folder / "sound.npy", sound)
    facts = {"left": ceil(span.left or 0), "right": ceil(span.right or 0), "hop": sound.shape[1] // mels.shape[1]}
    (folder / "facts.json").write_text(json.dumps(facts))


class Server:
    """A server in a separate process."""

    def __init__(self, contender: str, folder: Path, port: int = 0) -> None:
        words = [sys.executable, __file__, "serve-here", contender, str(folder), str(port)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise click.ClickException(f"the server of {contender} did not start.")
        self.port = int(line)

    def seconds(self) -> float:
        """Returns the seconds of processor time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """Returns the bytes in memory."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * resource.getpagesize()

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            assert self.process.stdout
            self.process.stdout.close()

    def rests(self, rest: bool) -> None:
        """Stops the process while another one is measured, or lets it go on."""
        self.process.send_signal(signal.SIGSTOP if rest else signal.SIGCONT)


@contextlib.contextmanager
def prepared(callers: bool = False) -> Iterator[Path]:
    """Yields a folder with the models."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(
            [sys.executable, __file__, "prepare-here", name, *["--callers"] * callers],
            check=True,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
        )
        yield folder


def load(kind: str, port: int, **options: Any) -> dict[str, Any]:
    """Runs clients in a separate process; returns their results."""
    words = [sys.executable, str(Path(__file__).with_name("load_clients.py")), kind, str(port), json.dumps(options)]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, timeout=options["seconds"] + 300)
    if done.returncode:
        raise click.ClickException(f"the clients failed: {(done.stderr.strip().splitlines() or ['no words'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


@click.group()
def main() -> None:
    """Loads the server."""


@main.command("serve-here", hidden=True)
@click.argument("contender")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("port", type=int)
def serve_here(contender: str, folder: Path, port: int) -> None:
    import max_conv
    from max_conv.serving import app, listen, run

    whole = folder / "whole.maxconv"
    models = {"m": max_conv.load(whole) if whole.exists() else model_of(contender, folder)}
    if contender != "ONNX Runtime":
        models["live"] = max_conv.load(folder / "live.maxconv")
    with listen("127.0.0.1", port) as listener:
        print(listener.getsockname()[1], flush=True)
        run(app(models), listener, 2000, logs="off")


@main.command("prepare-here", hidden=True)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--callers", is_flag=True)
def prepare_here(folder: Path, callers: bool) -> None:
    prepare_callers(folder) if callers else prepare(folder)


def race(case: str, clients: str, seconds: float, rounds: int) -> None:
    with prepared() as folder:
        servers = {name: Server(name, folder) for name in CONTENDERS}
        try:
            for server in servers.values():
                server.rests(True)
            for count in map(int, clients.split(",")):
                found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
                for _ in range(rounds):
                    for name, server in servers.items():
                        server.rests(False)
                        before = server.seconds()
                        options = {"clients": count, "seconds": seconds, "chunks": CHUNKS[case], "folder": str(folder)}
                        told = load("requests", server.port, exact=name == "max_conv", **options)
                        told["cpu"] = 1e3 * (server.seconds() - before) / told["answers"]
                        found[name].append(told)
                        server.rests(True)
                report(case, count, found)
        finally:
            for server in servers.values():
                server.end()


def report(case: str, clients: int, found: dict[str, list[dict[str, float]]]) -> None:
    """Prints a row for each contender: the median of its rounds."""
    rates = {}
    for name, rounds in found.items():
        middle = {key: float(np.median([told[key] for told in rounds])) for key in rounds[0]}
        rates[name] = middle["rate"]
        click.echo(
            f"{case:6} {clients:3} clients {name:13} {middle['rate']:8.0f} requests/s   p50 {middle['p50']:8.2f} ms   "
            f"p99 {middle['p99']:8.2f} ms   server {middle['cpu']:6.2f} ms of CPU a request"
        )
    ours, peer = (rates[name] for name in CONTENDERS)
    click.echo(f"{case:6} {clients:3} clients ours / ONNX Runtime's: {ours / peer:.2f}")


SECONDS = click.option("--seconds", default=5.0, show_default=True)
ROUNDS = click.option("--rounds", default=3, show_default=True)


@main.command()
@click.option("--clients", default="1,8,32", show_default=True)
@SECONDS
@ROUNDS
def chunk(clients: str, seconds: float, rounds: int) -> None:
    """Races chunks of 32 ms."""
    race("chunk", clients, seconds, rounds)


@main.command()
@click.option("--clients", default="1,8", show_default=True)
@SECONDS
@ROUNDS
def file(clients: str, seconds: float, rounds: int) -> None:
    """Races files of 30 s."""
    race("file", clients, seconds, rounds)


@main.command()
@click.option("--count", default=200, show_default=True)
@click.option("--seconds", default=20.0, show_default=True)
def streams(count: int, seconds: float) -> None:
    """Sends live sound through WebSockets, 32 ms every 32 ms."""
    with prepared() as folder:
        server = Server("max_conv", folder)
        try:
            told = load("streams", server.port, count=count, seconds=seconds, folder=str(folder))
        finally:
            server.end()
    click.echo(
        f"{count} live signals for {seconds:g} s: {told['answers']:.0f} answers, all right; p50 {told['p50']:.1f} ms, "
        f"p99 {told['p99']:.1f} ms, most {told['most']:.1f} ms"
    )


@main.command()
@click.option("--clients", default="1,4,16", show_default=True)
@click.option("--chunk", default=8, show_default=True, help="Frames of a request, of 11.6 ms each.")
@SECONDS
def callers(clients: str, chunk: int, seconds: float) -> None:
    """Streams HiFi-GAN V1 to many callers, live and by windows that overlap."""
    with prepared(callers=True) as folder:
        server = Server("HiFi-GAN", folder)
        try:
            for count in map(int, clients.split(",")):
                rates = []
                for live in (True, False):
                    options = {"clients": count, "seconds": seconds, "chunk": chunk, "folder": str(folder)}
                    told = load("callers", server.port, live=live, **options)
                    rates.append(told["frames"] * 256 / 22050)
                    click.echo(
                        f"{count:3} callers, {'live' if live else 'windows':8} {rates[-1]:6.2f} times real time, "
                        f"p50 {told['p50']:7.1f} ms, p99 {told['p99']:7.1f} ms"
                    )
                click.echo(f"{count:3} callers, live / windows: {rates[0] / rates[1]:.2f}")
        finally:
            server.end()


@main.command()
@click.option("--count", default=1000, show_default=True)
def connections(count: int) -> None:
    """Opens many connections, and sends on all of them at once."""
    with prepared() as folder:
        server = Server("max_conv", folder)
        try:
            told = load("connections", server.port, count=count, seconds=60, folder=str(folder))
            memory = server.memory()
        finally:
            status = server.end()
    click.echo(f"{count} connections: {told}; {memory / 1e6:.0f} MB; exit status {status}")
    if told["wrong"] or told["lost"] or status:
        raise click.ClickException("an answer was wrong, or a request got none.")


@main.command()
@click.option("--seconds", default=120.0, show_default=True)
@click.option("--restart", default=40.0, show_default=True, help="Seconds between restarts of the server.")
@click.option("--clients", default=12, show_default=True)
def faults(seconds: float, restart: float, clients: int) -> None:
    """Mixes good and bad requests, clients that go, and restarts; every answer is checked."""
    end, port, number = time.monotonic() + seconds, 0, 0
    totals: dict[str, int] = {}
    with prepared() as folder:
        while (left := end - time.monotonic()) > 1:
            server = Server("max_conv", folder, port)
            port, number = server.port, number + 1
            # The clients go on for a second after the server was asked to end: newcomers are refused, nothing is lost.
            words = json.dumps(
                {"clients": clients, "seconds": min(left, restart), "folder": str(folder), "seed": number}
            )
            script = str(Path(__file__).with_name("load_clients.py"))
            users = subprocess.Popen(
                [sys.executable, script, "faults", str(port), words], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
            )
            assert users.stdout
            try:
                users.stdout.readline()  # they begin
                time.sleep(min(left, restart) / 3)
                early = server.memory()
                time.sleep(min(left, restart) * 2 / 3)
                late = server.memory()
                status = server.end()
                told = json.loads((users.communicate(timeout=60)[0] or "{}").strip().splitlines()[-1])
            finally:
                users.kill()
                server.end(signal.SIGKILL)
            for key, count in (told | {"bad exits": int(status != 0)}).items():
                totals[key] = totals.get(key, 0) + count
            click.echo(f"run {number}: {told}; memory {early / 1e6:.0f} to {late / 1e6:.0f} MB; exit status {status}")
    click.echo(f"in all: {totals}")
    if totals.get("wrong") or totals.get("lost") or totals.get("bad exits") or not totals.get("right"):
        raise click.ClickException("an answer was wrong, a request got none, or the server did not end well.")


if __name__ == "__main__":
    main()
