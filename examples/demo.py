"""``make demo``: start a server on the bundled model, translate a few sentences over gRPC, show what came back, stop.

Everything is done as a user would: the server is the command, the client is the package's.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import click

from serving.client import RemoteTranslation, TranslationClient

SENTENCES = (
    "A man in an orange hat is looking at something.",
    "Two dogs are running through the snow.",
    "A little girl in a pink dress is climbing the stairs.",
    "Five people in winter jackets and helmets are standing in the snow.",
    "A woman is playing the guitar on the street.",
    "People are repairing the roof of a house.",
)
_READY = re.compile(r"^serving (?P<model>.+) on \S+?:(?P<port>\d+), metrics on \S+?:(?P<metrics>\d+)$")
_LONGEST_STOP_S = 90.0


def start_server(bundle: Path) -> tuple[subprocess.Popen[str], int]:
    """Start ``onnxlate serve`` on ports that the system chooses; returns it and its gRPC port once it is ready."""
    where = ["--host", "127.0.0.1", "--port", "0", "--metrics-port", "0"]
    command = [sys.executable, "-m", "serving.cli", "serve", str(bundle), *where]
    click.echo(f"$ onnxlate serve {bundle} {' '.join(where)}")
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        click.echo(f"  {line}", nl=False)
        if ready := _READY.match(line.strip()):
            return server, int(ready["port"])
    raise click.ClickException(f"the server ended with status {server.wait()}")


def show(title: str, translations: list[RemoteTranslation]) -> None:
    """Print each translation and where its time went."""
    click.echo(f"\n{title}\n")
    for source, translation in zip(SENTENCES, translations, strict=True):
        best, timings = translation.hypotheses[0], translation.timings
        click.echo(f"  {source}\n  {best.text}")
        click.echo(
            f"    {translation.source_tokens} -> {best.target_tokens} tokens"
            f" · queue {1e3 * timings.queue_s:.1f} ms, encode {1e3 * timings.encode_s:.1f} ms,"
            f" decode {1e3 * timings.decode_s:.1f} ms in {timings.steps} steps of {timings.mean_rows_per_step:.1f} rows\n"
        )


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
def main(bundle: Path) -> None:
    """Serve BUNDLE, translate a few sentences through gRPC, stop."""
    server, port = start_server(bundle)
    try:
        with TranslationClient(f"127.0.0.1:{port}") as client:
            client.translate(SENTENCES[:1])  # the first answer also pays for the connection and cold memory
            show("Greedy, all sentences in one request:", client.translate(SENTENCES))
            show("Beam 4:", client.translate(SENTENCES, beam_size=4))
            click.echo("Streamed:\n\n  ", nl=False)
            for piece in client.translate_stream(SENTENCES[0]):
                click.echo(piece.text_delta + "|", nl=False)
            click.echo("\n")
    finally:
        server.send_signal(signal.SIGTERM)
        _, stderr = server.communicate(timeout=_LONGEST_STOP_S)
    click.echo(f"  {stderr.strip()}\nThe server ended with status {server.returncode}.")
    sys.exit(server.returncode)


if __name__ == "__main__":
    main()
