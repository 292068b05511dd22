"""The command `max-conv serve`: saved models over HTTP and WebSockets."""

import os
from typing import Any

import click

from .terminal import step

# Importing MAX and the server is slow: the command imports what it uses, so that --help is fast.


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="NAME=FILE...")
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 lets other machines in.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 chooses a free one.")
@click.option("--token", envvar="MAX_CONV_TOKEN", help="What clients must send. Default: MAX_CONV_TOKEN, or none.")
@click.option("--max-batch", default=32, show_default=True, type=click.IntRange(1), help="Rows of a call.")
@click.option("--max-queue", default=256, show_default=True, type=click.IntRange(1), help="Requests that wait.")
@click.option("--deadline", default=30.0, show_default=True, type=click.FloatRange(0.001), help="Seconds to an answer.")
@click.option("--max-streams", default=1000, show_default=True, type=click.IntRange(1), help="Live signals of a model.")
@click.option(
    "--idle", default=60.0, show_default=True, help="Seconds after which a signal that receives nothing is ended."
)
@click.option("--tick", default=5.0, show_default=True, help="Milliseconds between calls of a live model, at least.")
@click.option("--max-body", default=64.0, show_default=True, help="MiB of a request.")
@click.option("--max-memory", default=512.0, show_default=True, help="MiB of all requests that are being read.")
@click.option("--body-timeout", default=20.0, show_default=True, help="Seconds in which a request must come.")
@click.option("--max-connections", default=2000, show_default=True, type=click.IntRange(1))
@click.option("--log", "logs", type=click.Choice(["text", "json", "off"]), default="text", show_default=True)
def serve(models: tuple[str, ...], host: str, port: int, logs: str, **limits: Any) -> None:
    """Serves saved models by the Open Inference Protocol, version 2, until it is stopped.

    A model is a file that `max-conv compile` or `Model.save` wrote. Nothing is compiled here.

    \b
    max-conv compile silero-vad vad.maxconv
    max-conv serve vad=vad.maxconv
    """
    environment = dict(os.environ)  # importing MAX changes it
    try:
        from ..serving import app
        from ..serving.server import listen, run
    except ImportError as error:
        raise ImportError(f'serve: needs more packages ({error}); run pip install "max-conv[serve]".') from None
    finally:
        os.environ.update(environment)
    limits |= {"tick": limits["tick"] / 1e3}
    limits |= {name: int(limits[name] * 2**20) for name in ("max_body", "max_memory")}
    if host not in ("127.0.0.1", "::1", "localhost") and limits["token"] is None:
        click.echo(f"serve: {host} lets other machines in, and nothing asks for a token; pass --token.", err=True)
    with listen(host, port) as listener:
        with step("loading"):
            application = app(models, **limits)
        port = listener.getsockname()[1]
        click.echo(f"serving {', '.join(name.partition('=')[0] for name in models)} on http://{host}:{port}", err=True)
        run(application, listener, limits["max_connections"], logs)
