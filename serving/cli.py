"""The command line: ``onnxlate serve | translate | score | inspect | export``.

Knows options, their defaults and exit statuses: 0 done, 1 an error of ours (on stderr, without a traceback), 2 wrong usage. What
the commands need is imported when they run, because no install has all of it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from tqdm import tqdm

from serving.bundle import read_bundle
from serving.config import EngineConfig, RequestLimits, ServerConfig
from serving.errors import ExportError, OnnxlateError
from serving.inspection import describe
from serving.manifest import Int8Scales, LanguagePair, Precision
from serving.version import package_version

if TYPE_CHECKING:
    from serving.client import RemoteScore, RemoteTranslation
    from serving.preparation import Translation
    from serving.request_options import RequestOptions
    from serving.scoring import ScoredTarget


class _Seconds(click.FloatRange):
    """A range that "nan" is not in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{value} is not a number of seconds", param, ctx)
        return seconds


def _language_pairs(ctx: click.Context, param: click.Parameter, values: Iterable[str]) -> tuple[LanguagePair, ...]:
    """Of texts that are two codes with a colon between."""
    pairs = [value.split(":") for value in values]
    for pair in pairs:
        if len(pair) != 2 or not all(pair):
            raise click.BadParameter(f"{':'.join(pair)!r} is no pair of languages like en:de", ctx, param)
    return tuple(LanguagePair(source=source, target=target) for source, target in pairs)


# Their fields are the options' defaults.
_SERVER, _ENGINE, _LIMITS = ServerConfig(), EngineConfig(), RequestLimits()

_DIRECTORY = click.Path(path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_COUNT = click.IntRange(min=1)
_SECONDS = _Seconds(min=0, min_open=True, max=86_400)
_PRECISION = click.Choice(get_args(Precision))
_PORT = click.IntRange(0, 65535)

# Lines that are read ahead of the oldest unanswered one, so that short lines need not wait for long ones.
_LINES_AHEAD = 1024


class _Commands(click.Group):
    """Prints our errors as one message; a traceback is for what nobody foresaw."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OnnxlateError as error:
            raise click.ClickException(str(error)) from error


@click.group(
    cls=_Commands,
    context_settings={"auto_envvar_prefix": "ONNXLATE", "help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(package_version(), prog_name="onnxlate", message="%(prog)s %(version)s")
def main() -> None:
    """Serve encoder-decoder Transformer translation models.

    Every option can be given as an environment variable too: --port of serve as ONNXLATE_SERVE_PORT.
    """


@main.command()
@click.argument("bundle", type=_DIRECTORY)
@click.option("--host", default=_SERVER.host, help="Address to listen on.")
@click.option("--port", type=_PORT, default=_SERVER.port, help="gRPC port; 0 lets the system choose.")
@click.option("--metrics-port", type=_PORT, default=_SERVER.metrics_port, help="Prometheus port; 0 lets the system choose.")
@click.option("--threads", type=_COUNT, help="CPU threads for the model.  [default: the CPUs this process may use]")
@click.option(
    "--threads-when-alone",
    type=_COUNT,
    help="CPU threads for a request while there is no other; 1 saves a second copy of the model.  [default: --threads]",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default=_ENGINE.device, help="Where the model runs.")
@click.option("--max-rows", type=_COUNT, default=_ENGINE.max_rows_per_worker, help="Hypotheses that one worker decodes together.")
@click.option("--max-waiting", type=_COUNT, default=_ENGINE.max_waiting_sequences, help="Texts that may wait; more are refused.")
@click.option("--max-beam-size", type=_COUNT, default=_LIMITS.max_beam_size, help="Widest beam of a request.")
@click.option("--max-texts", type=_COUNT, default=_LIMITS.max_texts_per_request, help="Texts of one request.")
@click.option("--max-request", type=_SECONDS, default=_LIMITS.max_request_s, help="Longest request, in seconds.")
@click.option(
    "--drain-timeout", type=_SECONDS, default=_SERVER.drain_timeout_s, help="Seconds that requests get to finish at SIGTERM."
)
@click.option("--reflection", is_flag=True, help="Answer gRPC reflection.")
def serve(
    bundle: Path,
    host: str,
    port: int,
    metrics_port: int,
    threads: int | None,
    threads_when_alone: int | None,
    device: str,
    max_rows: int,
    max_waiting: int,
    max_beam_size: int,
    max_texts: int,
    max_request: float,
    drain_timeout: float,
    reflection: bool,
) -> None:
    """Serve BUNDLE over gRPC until SIGTERM, then finish what was admitted."""
    from serving import server
    from serving.model import load_model

    engine = _engine_config(
        device=device,
        threads=threads,
        threads_when_alone=threads_when_alone,
        max_rows_per_worker=max_rows,
        max_waiting_sequences=max_waiting,
    )
    limits = RequestLimits(max_texts_per_request=max_texts, max_beam_size=max_beam_size, max_request_s=max_request)
    config = ServerConfig(host=host, port=port, metrics_port=metrics_port, reflection=reflection, drain_timeout_s=drain_timeout)
    sys.exit(server.serve(config, limits, lambda metrics: load_model(bundle, engine, limits, metrics)))


@main.command()
@click.option("--server", metavar="HOST:PORT", help="Translate by this server.")
@click.option("--bundle", type=_DIRECTORY, help="Translate with this bundle, in this process.")
@click.option("--beam-size", type=_COUNT, help="Hypotheses kept alive at each step; 1, the default, decodes greedily.")
@click.option("--num-hypotheses", type=_COUNT, help="Print so many for each line, best first; 1 by default.")
@click.option("--length-penalty", type=float, help="Score = log-probability / length^X; 1 by default.")
@click.option("--min-target-tokens", type=click.IntRange(min=0), help="A translation does not end before; 0 by default.")
@click.option("--max-target-tokens", type=_COUNT, help="A translation is cut there; by default far above a line's length.")
@click.option("--min-target-ratio", type=float, help="A translation does not end before so many times its line's tokens.")
@click.option("--max-target-ratio", type=float, help="A translation is cut at so many times its line's tokens.")
@click.option("--max-source-tokens", type=_COUNT, help="Cut a line of more tokens to so many; by default it is refused.")
@click.option("--target-prefixes", type=_FILE, help="A file of as many lines: what each translation starts with.")
@click.option("--prefix-bias", type=float, help="Pull towards prefixes this much, above 0 and below 1, instead of forcing them.")
@click.option("--suppress", metavar="TEXT", multiple=True, help="A text that no translation has; may be repeated.")
@click.option("--suppress-unknown", is_flag=True, default=None, help="Never take the token for unknown text.")
@click.option(
    "--end-token",
    metavar="TOKEN",
    multiple=True,
    help="A token that ends translations, in the place of the model's own; may be repeated.",
)
@click.option("--replace-unknowns", is_flag=True, default=None, help="Put in what unknown tokens attended to most.")
@click.option("--alignments", is_flag=True, help="Print pieces too, and which of the line's each one attended to most.")
@click.option("--source-language", default="", show_default=False, help="Code of the language of the lines; may be left out.")
@click.option("--target-language", default="", show_default=False, help="Code of the language wanted; may be left out.")
@click.option("--batch-size", type=_COUNT, default=32, help="Lines of one request (--server) or decoded together (--bundle).")
@click.option("--in-flight", type=_COUNT, default=8, help="Requests sent at a time (--server).")
@click.option("--timeout", type=_SECONDS, default=60.0, help="Seconds for one request, retries included (--server).")
@click.option("--threads", type=_COUNT, help="CPU threads (--bundle).  [default: the CPUs this process may use]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default=_ENGINE.device, help="Where it runs (--bundle).")
def translate(
    server: str | None,
    bundle: Path | None,
    beam_size: int | None,
    num_hypotheses: int | None,
    length_penalty: float | None,
    min_target_tokens: int | None,
    max_target_tokens: int | None,
    min_target_ratio: float | None,
    max_target_ratio: float | None,
    max_source_tokens: int | None,
    target_prefixes: Path | None,
    prefix_bias: float | None,
    suppress: tuple[str, ...],
    suppress_unknown: bool | None,
    end_token: tuple[str, ...],
    replace_unknowns: bool | None,
    alignments: bool,
    source_language: str,
    target_language: str,
    batch_size: int,
    in_flight: int,
    timeout: float,
    threads: int | None,
    device: str,
) -> None:
    """Translate standard input to standard output, line by line, in order.

    With --num-hypotheses above 1, each line gives up to so many, as LINE NUMBER<TAB>SCORE<TAB>TEXT. With
    --alignments, <TAB>PIECES OF THE LINE<TAB>PIECES OF THE TRANSLATION<TAB>ALIGNMENT follow, with spaces between pieces and an
    alignment of places from 0 on, like "0-0 2-1": source-target.
    """
    from serving.request_options import RequestOptions

    options = RequestOptions(
        beam_size=beam_size,
        num_hypotheses=num_hypotheses,
        length_penalty=length_penalty,
        min_target_tokens=min_target_tokens,
        max_target_tokens=max_target_tokens,
        min_target_ratio=min_target_ratio,
        max_target_ratio=max_target_ratio,
        max_source_tokens=max_source_tokens,
        prefix_bias=prefix_bias,
        suppressed_texts=suppress,
        suppress_unknown=suppress_unknown,
        end_tokens=end_token,
        return_attention=alignments or None,
        replace_unknowns=replace_unknowns,
        return_scores=(num_hypotheses or 1) > 1,
    )
    languages = (source_language, target_language)
    if (server is None) == (bundle is None):
        raise click.UsageError("give either --server or --bundle")
    if server is not None:
        translations: Iterator[Any] = _by_server(server, options, target_prefixes, languages, batch_size, in_flight, timeout)
    else:
        assert bundle is not None
        engine = _engine_config(device=device, threads=threads, max_rows_per_worker=batch_size * (beam_size or 1))
        translations = _by_bundle(bundle, options, target_prefixes, languages, engine)
    _print_translations(translations, n_best=(num_hypotheses or 1) > 1, alignments=alignments)


def _by_server(
    address: str,
    options: RequestOptions,
    prefixes: Path | None,
    languages: tuple[str, str],
    batch_size: int,
    in_flight: int,
    timeout_s: float,
) -> Iterator[RemoteTranslation]:
    from serving.bulk import read_lines, through_server, with_prefixes
    from serving.client import RetryPolicy, TranslationClient

    # Tells at once that there is no server, or none of this kind; then a refusal is worth waiting for, within the timeout.
    with TranslationClient(address, timeout_s=timeout_s) as client:
        batch_size = min(batch_size, client.model_info().max_texts_per_request)
    decoding = {option.name: getattr(options, option.name) for option in fields(options)}
    with TranslationClient(address, timeout_s=timeout_s, retry=RetryPolicy(max_attempts=1000)) as client:

        def request(lines: list[tuple[str, str]]) -> list[RemoteTranslation]:
            return client.translate(
                [text for text, _ in lines],
                target_prefixes=[] if prefixes is None else [prefix for _, prefix in lines],
                source_language=languages[0],
                target_language=languages[1],
                **decoding,
            )

        lines = with_prefixes(read_lines(sys.stdin.buffer), _read_prefixes(prefixes))
        yield from through_server(lines, request, lines_per_request=batch_size, requests_in_flight=in_flight)


def _by_bundle(
    bundle: Path, options: RequestOptions, prefixes: Path | None, languages: tuple[str, str], config: EngineConfig
) -> Iterator[Translation]:
    from serving.bulk import Window, read_lines, through_engine
    from serving.model import load_model
    from serving.observer import NullObserver

    limits = RequestLimits(max_beam_size=max(options.beam_size or 1, _LIMITS.max_beam_size))
    model = load_model(bundle, config, limits, NullObserver())
    try:
        direction = model.preparer.direction(*languages)
        ahead = max(_LINES_AHEAD, 4 * sum(model.worker_rows))
        window = Window(max_sequences=min(ahead, config.max_waiting_sequences), max_source_tokens=config.max_waiting_tokens)
        yield from through_engine(
            read_lines(sys.stdin.buffer),
            preparer=model.preparer,
            engine=model.engine,
            options=options,
            window=window,
            direction=direction,
            target_prefixes=_read_prefixes(prefixes),
        )
    finally:
        model.engine.close()


def _read_prefixes(path: Path | None) -> Iterator[str] | None:
    from serving.bulk import read_lines

    def read(path: Path) -> Iterator[str]:
        with path.open("rb") as stream:
            yield from read_lines(stream, "target prefix of line")

    return None if path is None else read(path)


def _print_translations(translations: Iterable[Translation | RemoteTranslation], *, n_best: bool, alignments: bool) -> None:
    out = sys.stdout.buffer
    # A bar and translations on one terminal would write over each other.
    hidden = not sys.stderr.isatty() or sys.stdout.isatty()
    for number, translation in enumerate(tqdm(translations, unit=" lines", file=sys.stderr, disable=hidden), start=1):
        for hypothesis in translation.hypotheses if n_best else translation.hypotheses[:1]:
            text = " ".join(hypothesis.text.splitlines())
            if n_best:
                assert hypothesis.score is not None, "scores were asked for"
                text = f"{number}\t{hypothesis.score:.6f}\t{text}"
            if alignments:
                places = " ".join(f"{source}-{target}" for source, target in hypothesis.alignment)
                text = "\t".join((text, " ".join(translation.source_pieces), " ".join(hypothesis.target_pieces), places))
            out.write(f"{text}\n".encode())
        out.flush()


@main.command()
@click.option("--server", metavar="HOST:PORT", help="Score by this server.")
@click.option("--bundle", type=_DIRECTORY, help="Score with this bundle, in this process.")
@click.option("--source-language", default="", show_default=False, help="Code of the language of the lines; may be left out.")
@click.option("--target-language", default="", show_default=False, help="Code of the language of TARGETS; may be left out.")
@click.option("--batch-size", type=_COUNT, default=32, help="Lines of one request.")
@click.option("--in-flight", type=_COUNT, default=8, help="Requests at a time.")
@click.option("--timeout", type=_SECONDS, default=60.0, help="Seconds for one request, retries included (--server).")
@click.option("--threads", type=_COUNT, help="CPU threads (--bundle).  [default: the CPUs this process may use]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default=_ENGINE.device, help="Where it runs (--bundle).")
@click.argument("targets", type=_FILE)
def score(
    server: str | None,
    bundle: Path | None,
    source_language: str,
    target_language: str,
    batch_size: int,
    in_flight: int,
    timeout: float,
    threads: int | None,
    device: str,
    targets: Path,
) -> None:
    """Tell how probable the lines of TARGETS are as translations of those of standard input, line by line, in order.

    Each gives LOG-PROBABILITY<TAB>TOKENS: natural, of the whole target, and how many tokens that is, the end of the sentence
    counted.
    """
    from serving.bulk import read_lines
    from serving.bulk_scoring import Requests, scored_by_model, scored_by_server, with_targets
    from serving.client import RetryPolicy, TranslationClient
    from serving.model import load_model
    from serving.observer import NullObserver

    if (server is None) == (bundle is None):
        raise click.UsageError("give either --server or --bundle")
    requests = Requests(
        source_language=source_language, target_language=target_language, lines_per_request=batch_size, in_flight=in_flight
    )
    with targets.open("rb") as stream:
        pairs = with_targets(read_lines(sys.stdin.buffer), read_lines(stream, "target of line"))
        if server is not None:
            # As for translate.
            with TranslationClient(server, timeout_s=timeout) as client:
                requests = requests.of_at_most(client.model_info().max_texts_per_request)
            with TranslationClient(server, timeout_s=timeout, retry=RetryPolicy(max_attempts=1000)) as client:
                _print_scores(scored_by_server(pairs, client, requests))
            return
        assert bundle is not None
        waiting = batch_size * in_flight
        engine = _engine_config(
            device=device,
            threads=threads,
            max_waiting_sequences=waiting,
            max_waiting_tokens=waiting * _LIMITS.max_source_tokens,
        )
        model = load_model(bundle, engine, _LIMITS, NullObserver())
        try:
            requests = requests.of_at_most(model.preparer.limits.max_texts_per_request)
            _print_scores(scored_by_model(pairs, model, requests))
        finally:
            model.engine.close()


def _print_scores(scores: Iterable[ScoredTarget | RemoteScore]) -> None:
    for scored in scores:
        sys.stdout.buffer.write(f"{scored.log_prob:.6f}\t{len(scored.tokens)}\n".encode())
        sys.stdout.buffer.flush()


@main.command()
@click.argument("bundle", type=_DIRECTORY)
def inspect(bundle: Path) -> None:
    """Check BUNDLE and print what it is."""
    click.echo(describe(read_bundle(bundle).manifest))


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("bundle", type=_DIRECTORY)
@click.option(
    "--precision", type=click.Choice(get_args(Precision)), default="fp32", help="Of the weights; int8 for CPU, fp16 for CUDA."
)
@click.option(
    "--int8-scales",
    type=click.Choice(get_args(Int8Scales)),
    help="Of int8's activations: constant, measured on sentences, the fastest; or one a row, found at run time, as in "
    "CTranslate2. By default constant where there are sentences.",
)
@click.option(
    "--languages",
    metavar="SOURCE:TARGET",
    multiple=True,
    callback=_language_pairs,
    help="What it translates, for a CHECKPOINT that does not say so, as en:de; may be given several times.",
)
@click.option("--source-prefix", default="", help="Text that every source starts with: a task, for models that are told theirs.")
@click.option("--overwrite", is_flag=True, help="Replace BUNDLE where it is there already.")
def export(
    checkpoint: Path,
    bundle: Path,
    precision: Precision,
    int8_scales: Int8Scales | None,
    languages: tuple[LanguagePair, ...],
    source_prefix: str,
    overwrite: bool,
) -> None:
    """Export the trained CHECKPOINT, a directory or a file, to the new directory BUNDLE.

    The certificate, and constant scales of int8, are measured on the sentences in CHECKPOINT/samples.txt, one a line.
    """
    try:
        from export.pipeline import export_bundle
    except ModuleNotFoundError as error:
        raise ExportError(f"{error.name} is not installed: exporting needs the extra onnxlate[export]") from error
    export_bundle(
        checkpoint,
        bundle,
        precision=precision,
        int8_scales=int8_scales,
        languages=languages,
        source_prefix=source_prefix,
        overwrite=overwrite,
    )
    click.echo(f"wrote {bundle}", err=True)


def _engine_config(*, threads: int | None, **options: Any) -> EngineConfig:
    return EngineConfig(**options) if threads is None else EngineConfig(threads=threads, **options)


if __name__ == "__main__":
    main()
