"""Commands as documents write them, and whether the real command line understands them. Runs none of them."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator, Sequence

import click
import pytest


def commands_of(script: str) -> Iterator[list[str]]:
    """The words of each simple command of a shell script: without comments, redirections and assignments in front."""
    for line in script.replace("\\\n", " ").splitlines():
        # A number that touches a redirection is a file descriptor: 2>log, but not --beam-size 4 < in.txt.
        lexer = shlex.shlex(re.sub(r"(?<=\s)\d+(?=[<>])", "", line), posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        lexer.commenters = "#"
        words: list[str] = []
        tokens = iter(lexer)
        for token in tokens:
            if set(token) <= set("<>&") and set(token) & set("<>"):
                next(tokens)
            elif set(token) <= set("|&;"):
                yield from _command(words)
                words = []
            else:
                words.append(token)
        yield from _command(words)


def _command(words: Sequence[str]) -> Iterator[list[str]]:
    rest = list(words)
    while rest and re.match(r"[A-Za-z_]\w*=", rest[0]):
        del rest[0]
    if rest:
        yield rest


def parse(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> click.Context:
    """Parses what follows ``onnxlate``; the paths in it need not exist.

    Args:
        arguments: subcommand, options and values.
        monkeypatch: of the calling test.

    Returns:
        The context of the subcommand, with its parameters.

    Raises:
        click.UsageError: a subcommand, option or value that onnxlate does not know.
        click.exceptions.Exit: an option that answers by itself, as ``--help`` does.
    """
    from serving.cli import main

    assert isinstance(main, click.Group)

    def convert(self: click.Path, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return value

    monkeypatch.setattr(click.Path, "convert", convert)
    if arguments and arguments[0].startswith("-"):
        return main.make_context("onnxlate", list(arguments))
    context = click.Context(main, info_name="onnxlate")
    name = arguments[0] if arguments else ""
    command = main.get_command(context, name)
    if command is None:
        raise click.UsageError(f"no such command: {name!r}")
    return command.make_context(name, list(arguments[1:]), parent=context)


def understand(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``parse``, options that answer by themselves included.

    Raises:
        click.UsageError: a subcommand, option or value that onnxlate does not know.
    """
    with contextlib.suppress(click.exceptions.Exit):
        parse(arguments, monkeypatch)
