from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from serving import server as server_module
from serving.bundle import Bundle
from serving.cli import main
from serving.config import EngineConfig, RequestLimits, ServerConfig
from serving.errors import EngineError, OverloadedError, ServerStartError
from serving.manifest import LanguagePair
from serving.model import ServedModel
from serving.observer import EngineObserver
from serving.request import Outcome, PrefixBias, Sequence
from tests.fakes import EOS_ID, PATIENCE_S, UNKNOWN_ID, ByteTokenizer, ScriptedEngine, fake_model, shouted
from tests.servers import running_server

ROOT = Path(__file__).parents[2]


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def loaded(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Makes any bundle load as a fake model around ``engine``; holds what it was loaded with."""
    seen: dict[str, Any] = {}

    def load_model(directory: Path, config: EngineConfig, limits: RequestLimits, observer: EngineObserver) -> ServedModel:
        seen.update(directory=directory, config=config, limits=limits)
        return fake_model(engine)

    monkeypatch.setattr("serving.model.load_model", load_model)
    return seen


def run(*arguments: str, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(main, list(arguments), input=stdin)


Translate = Callable[..., Result]


@pytest.fixture(params=["server", "bundle"])
def translate(request: pytest.FixtureRequest, engine: ScriptedEngine) -> Iterator[Translate]:
    """Runs ``onnxlate translate`` on ``engine``: behind a server, or as a bundle of its own."""
    if request.param == "bundle":
        request.getfixturevalue("loaded")
        yield lambda *options, stdin: run("translate", "--bundle", "some/bundle", *options, stdin=stdin)
    else:
        with running_server(engine) as server:
            yield lambda *options, stdin: run("translate", "--server", server.address, *options, stdin=stdin)


def test_line_in_line_out_in_order(translate: Translate) -> None:
    lines = [f"line {number}" for number in range(50)]
    result = translate("--batch-size", "3", stdin="\n".join(lines).encode())
    assert (result.exit_code, result.stdout) == (0, "".join(f"{line.upper()}\n" for line in lines))
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("stdin", "stdout"),
    [
        pytest.param(b"", b"", id="nothing"),
        pytest.param(b"\n", b"\n", id="one blank line"),
        pytest.param(b"a\n\n \nb\n", b"A\n\n\nB\n", id="blank lines between"),
        pytest.param(b"a\r\nb", b"A\nB\n", id="other line ends, and none at the end"),
        pytest.param("gr\u00fcn\n".encode(), "GR\u00dcN\n".encode(), id="not ASCII"),
        pytest.param("a\u2028b\x0bc\n".encode(), b"A B C\n", id="line ends of other kinds inside a line"),
    ],
)
def test_each_line_has_its_line(translate: Translate, stdin: bytes, stdout: bytes) -> None:
    result = translate(stdin=stdin)
    assert (result.exit_code, result.stdout_bytes) == (0, stdout)


def test_a_line_feed_in_a_translation_is_a_space(translate: Translate, engine: ScriptedEngine) -> None:
    def with_newline(sequence: Sequence) -> Outcome:
        (hypothesis,) = shouted(sequence).hypotheses
        ids = tuple(ByteTokenizer().encode("A\r\nB\tC"))
        return Outcome(hypotheses=(dataclasses.replace(hypothesis, target_ids=ids),))

    engine.script = with_newline
    assert translate(stdin=b"a\n").stdout_bytes == b"A B\tC\n"


def test_several_hypotheses_are_told_with_line_number_and_score(translate: Translate) -> None:
    result = translate("--beam-size", "3", "--num-hypotheses", "2", stdin=b"a\n\nb\n")
    assert result.stdout == "1\t-0.500000\tA\n1\t-1.500000\tA!\n2\t0.000000\t\n3\t-0.500000\tB\n3\t-1.500000\tB!\n"


def test_alignments_are_told_with_the_pieces(translate: Translate) -> None:
    result = translate("--alignments", stdin=b"abc\n\nd\n")
    assert result.stdout == "ABC\ta b c\tA B C\t0-0 1-1 2-2\n\t\t\t\nD\td\tD\t0-0\n"


def test_alignments_of_several_hypotheses(translate: Translate) -> None:
    several = translate("--alignments", "--beam-size", "2", "--num-hypotheses", "2", stdin=b"a\n")
    assert several.stdout == "1\t-0.500000\tA\ta\tA\t0-0\n1\t-1.500000\tA!\ta\tA !\t0-0 0-1\n"


@pytest.mark.parametrize(("options", "stdout"), [([], "A\n"), (["--replace-unknowns"], "Ab\n")], ids=["kept", "replaced"])
def test_unknown_tokens_are_replaced_where_it_is_asked_for(
    translate: Translate, engine: ScriptedEngine, options: list[str], stdout: str
) -> None:
    def unknown(sequence: Sequence) -> Outcome:
        (hypothesis,) = shouted(sequence).hypotheses
        return Outcome(hypotheses=(dataclasses.replace(hypothesis, target_ids=(hypothesis.target_ids[0], UNKNOWN_ID)),))

    engine.script = unknown
    assert translate(*options, stdin=b"ab\n").stdout == stdout


def test_options_reach_the_engine(translate: Translate, engine: ScriptedEngine) -> None:
    options = ["--beam-size", "4", "--num-hypotheses", "2", "--length-penalty", "0.5"]
    options += ["--min-target-tokens", "2", "--max-target-tokens", "9", "--source-language", "en", "--target-language", "de"]
    assert translate(*options, stdin=b"a\n").exit_code == 0
    seen = engine.submitted[0].options
    assert (seen.beam_size, seen.num_hypotheses, seen.length_penalty) == (4, 2, 0.5)
    assert (seen.min_target_tokens, seen.max_target_tokens) == (2, 9)


def test_a_line_is_cut_where_it_is_asked_for(translate: Translate, engine: ScriptedEngine) -> None:
    assert translate("--max-source-tokens", "3", stdin=b"abcd\nef\n").stdout == "AB\nEF\n"


def test_the_prefix_of_a_blank_line_is_its_translation(translate: Translate, tmp_path: Path) -> None:
    prefixes = tmp_path / "prefixes"
    prefixes.write_bytes(b"\nx\n\n")
    assert translate("--target-prefixes", str(prefixes), stdin=b"a\n\n\n").stdout == "A\nx\n\n"


def test_what_is_asked_of_targets_reaches_the_engine(translate: Translate, engine: ScriptedEngine) -> None:
    options = ["--min-target-ratio", "0.5", "--max-target-ratio", "3", "--end-token", ".", "--end-token", "!"]
    options += ["--suppress", "xy", "--suppress", "z", "--suppress-unknown"]
    assert translate(*options, stdin=b"abc\n").exit_code == 0
    seen, encode = engine.submitted[0].options, ByteTokenizer().encode
    assert (seen.min_target_tokens, seen.max_target_tokens, seen.end_ids) == (2, 12, tuple(encode(".!")))
    assert seen.suppressed == ((UNKNOWN_ID,), *(tuple(encode(text)) for text in ("xy", " xy", "z", " z")))


def test_each_line_has_its_prefix(translate: Translate, engine: ScriptedEngine, tmp_path: Path) -> None:
    prefixes = tmp_path / "prefixes"
    prefixes.write_bytes("x\n\n\u00fc".encode())
    assert translate("--target-prefixes", str(prefixes), "--batch-size", "2", stdin=b"a\nb\nc\n").stdout == "A\nB\nC\n"
    seen = {sequence.source_ids: sequence.options for sequence in engine.submitted}
    by_line = [seen[*ByteTokenizer().encode(line), EOS_ID] for line in "abc"]
    assert [ByteTokenizer().decode(options.target_prefix) for options in by_line] == ["x", "", "\u00fc"]


def test_a_prefix_of_a_line_may_pull(translate: Translate, engine: ScriptedEngine, tmp_path: Path) -> None:
    prefixes = tmp_path / "prefixes"
    prefixes.write_bytes(b"x\n")
    assert translate("--target-prefixes", str(prefixes), "--prefix-bias", "0.5", stdin=b"a\n").exit_code == 0
    assert engine.submitted[0].options.prefix_bias == PrefixBias(tokens=tuple(ByteTokenizer().encode("x")), strength=0.5)


@pytest.mark.parametrize(
    ("prefixes", "stdout", "message"),
    [
        (b"x\n", "A\n", "line 2: has no target prefix: there are 1"),
        (b"x\ny\nz\n", "A\nB\n", "target prefixes: must be as many as lines, 2, not more"),
        (b"x\n\0\n", "A\n", "target prefix of line 2: holds characters that the model's target vocabulary does not have"),
        (b"x\n\xff\n", "A\n", "target prefix of line 2: is not UTF-8 (its byte 1)"),
    ],
    ids=["few", "many", "unknown", "not UTF-8"],
)
def test_a_bad_prefix_is_named_after_the_lines_before_it(
    translate: Translate, tmp_path: Path, prefixes: bytes, stdout: str, message: str
) -> None:
    path = tmp_path / "prefixes"
    path.write_bytes(prefixes)
    result = translate("--target-prefixes", str(path), "--batch-size", "1", stdin=b"a\nb\n")
    assert (result.exit_code, result.stdout) == (1, stdout)
    assert result.stderr == f"Error: {message}\n"


def test_a_line_that_is_too_long_is_named_after_the_lines_before_it(translate: Translate) -> None:
    result = translate("--batch-size", "1", stdin=b"a\nb\n" + b"c" * 40 + b"\nd\n")
    assert (result.exit_code, result.stdout) == (1, "A\nB\n")
    assert result.stderr == (
        "Error: line 3: has 41 tokens with the end-of-sentence token; at most 32 can be translated at once\n"
    )


def test_a_line_is_named_wherever_it_is_in_its_request(translate: Translate) -> None:
    result = translate("--batch-size", "4", stdin=b"a\n" * 6 + b"c" * 40 + b"\n")
    assert result.exit_code == 1
    assert "line 7: has 41 tokens" in result.stderr


def test_a_line_that_is_not_utf8_is_named_after_the_lines_before_it(translate: Translate) -> None:
    result = translate(stdin=b"a\nb\nc\xffd\n")
    assert (result.exit_code, result.stdout) == (1, "A\nB\n")
    assert result.stderr == "Error: line 3: is not UTF-8 (its byte 2)\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--beam-size", "6"], "options.beam_size: must be from 1 to 5, not 6"),
        (["--num-hypotheses", "2"], r"options.num_hypotheses: must be from 1 to 1 (beam_size), not 2"),
        (["--length-penalty", "nan"], "options.length_penalty: "),
        (["--prefix-bias", "0.5"], "options.prefix_bias: has a meaning with a target prefix only"),
        (["--end-token", "xy"], "options.end_tokens: 'xy' is no token"),
        (["--target-language", "xx"], "target_language: the model translates into de, en, fr, not into 'xx'"),
    ],
)
def test_options_out_of_bounds_are_one_line(translate: Translate, options: list[str], message: str) -> None:
    result = translate(*options, stdin=b"a\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_engine_that_fails_is_an_error_and_leaves_nothing_behind(
    translate: Translate, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script = lambda sequence: Outcome(error=EngineError("a graph failed")) if sequence.source_ids[0] == 109 else None
    result = translate("--batch-size", "1", "--in-flight", "1", stdin=b"c\nd\n")
    assert (result.exit_code, result.stdout) == (1, "")
    engine.wait_for(lambda: not engine.running)


# translate, one way.


def test_the_engine_of_a_bundle_is_made_for_the_batch_and_closed(loaded: dict[str, Any], engine: ScriptedEngine) -> None:
    options = ["--bundle", "some/bundle", "--batch-size", "5", "--beam-size", "4", "--threads", "3"]
    assert run("translate", *options, stdin=b"a\n").exit_code == 0
    config = loaded["config"]
    assert (loaded["directory"], config.max_rows_per_worker, config.threads) == (Path("some/bundle"), 20, 3)
    assert engine.closed


def test_a_beam_of_any_width_that_the_model_allows_runs_offline(loaded: dict[str, Any]) -> None:
    run("translate", "--bundle", "some/bundle", "--beam-size", "20", stdin=b"")
    assert loaded["limits"].max_beam_size == 20


def test_a_refusal_of_the_server_is_waited_for(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = 0

    def submit(sequences: Any, *, continued: bool = False) -> None:
        nonlocal refused
        refused += 1
        if refused < 3:
            raise OverloadedError("queue_full", 0.0)
        ScriptedEngine.submit(engine, sequences, continued=continued)

    monkeypatch.setattr(engine, "submit", submit)
    with running_server(engine) as server:
        result = run("translate", "--server", server.address, stdin=b"a\n")
    assert (result.exit_code, result.stdout, refused) == (0, "A\n", 3)


@pytest.fixture(params=["server", "bundle"])
def score(request: pytest.FixtureRequest, engine: ScriptedEngine, tmp_path: Path) -> Iterator[Callable[..., Result]]:
    """Runs ``onnxlate score`` on ``engine``: behind a server, or as a bundle of its own."""

    def run_score(*where: str) -> Callable[..., Result]:
        def scored(*options: str, stdin: bytes, targets: bytes) -> Result:
            (tmp_path / "targets.txt").write_bytes(targets)
            return run("score", *where, *options, str(tmp_path / "targets.txt"), stdin=stdin)

        return scored

    if request.param == "bundle":
        request.getfixturevalue("loaded")
        yield run_score("--bundle", "some/bundle")
    else:
        with running_server(engine) as server:
            yield run_score("--server", server.address)


def test_each_line_has_the_score_of_its_target(score: Callable[..., Result], engine: ScriptedEngine) -> None:
    targets = b"".join(b"x" * (number % 5) + b"\n" for number in range(50))
    result = score("--target-language", "de", "--in-flight", "3", stdin=b"a\n" * 50, targets=targets)
    # A quarter for the first token, two for the second, and so on, the end counted.
    expected = [(-0.25 * n * (n + 1) / 2, n) for n in (number % 5 + 1 for number in range(50))]
    assert (result.exit_code, result.stdout) == (0, "".join(f"{total:.6f}\t{n}\n" for total, n in expected))
    assert result.stderr == ""
    assert len(engine.submitted) == 50


def test_a_blank_line_has_a_blank_target(score: Callable[..., Result]) -> None:
    result = score(stdin=b"\na\n", targets=b"\nb\n")
    assert (result.exit_code, result.stdout) == (0, "0.000000\t0\n-0.750000\t2\n")


@pytest.mark.parametrize(
    ("stdin", "targets", "message", "answered"),
    [
        pytest.param(b"a\nb\n", b"c\n", "line 2: has no target: there are 1", 1, id="few targets"),
        pytest.param(b"a\n", b"c\nd\n", "targets: must be as many as lines, 1, not more", 1, id="many targets"),
        pytest.param(b"a\n" * 6, b"c\n" * 5 + b"d" * 64, "target of line 6: has 65 tokens", 4, id="long target"),
        pytest.param(b"a\nb\n", b"c\n\xff\n", "target of line 2: is not UTF-8", 1, id="not UTF-8"),
        pytest.param(b"a" * 32, b"c\n", "line 1: has 33 tokens", 0, id="long line"),
    ],
)
def test_a_bad_target_is_named_after_the_lines_before_it(
    score: Callable[..., Result], stdin: bytes, targets: bytes, message: str, answered: int
) -> None:
    result = score(stdin=stdin, targets=targets)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stdout.count("\n") == answered


def test_an_engine_that_fails_scores_nothing(score: Callable[..., Result], engine: ScriptedEngine) -> None:
    engine.script = lambda _: Outcome(error=EngineError("a graph failed"))
    result = score(stdin=b"a\n", targets=b"b\n")
    assert (result.exit_code, result.stdout) == (1, "")


def test_the_engine_that_scores_has_room_for_all_requests_and_is_closed(
    loaded: dict[str, Any], engine: ScriptedEngine, tmp_path: Path
) -> None:
    (tmp_path / "targets.txt").write_bytes(b"b\n")
    options = ["--batch-size", "7", "--in-flight", "3", "--threads", "2"]
    assert run("score", "--bundle", "some/bundle", *options, str(tmp_path / "targets.txt"), stdin=b"a\n").exit_code == 0
    config = loaded["config"]
    assert (config.max_waiting_sequences, config.threads) == (21, 2)
    assert config.max_waiting_tokens >= 21 * loaded["limits"].max_source_tokens
    assert engine.closed


@pytest.mark.parametrize("where", [[], ["--server", "a:1", "--bundle", "b"]], ids=["neither", "both"])
def test_scores_come_from_one_place(where: list[str], tmp_path: Path) -> None:
    (tmp_path / "targets.txt").touch()
    result = run("score", *where, str(tmp_path / "targets.txt"))
    assert result.exit_code == 2
    assert "give either --server or --bundle" in result.stderr


def test_no_server_is_one_line() -> None:
    result = run("translate", "--server", "127.0.0.1:1", "--timeout", "0.3", stdin=b"a\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: UNAVAILABLE: ")


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["translate"], id="neither server nor bundle"),
        pytest.param(["translate", "--server", "a:1", "--bundle", "b"], id="server and bundle"),
        pytest.param(["translate", "--bundle", "b", "--beam-size", "0"], id="no beam"),
        pytest.param(["translate", "--bundle", "b", "--beam-size", "x"], id="no number"),
        pytest.param(["translate", "--bundle", "b", "--target-prefixes", "none"], id="no file of prefixes"),
        pytest.param(["serve"], id="no bundle"),
        pytest.param(["serve", "b", "--port", "65536"], id="no port"),
        pytest.param(["serve", "b", "--device", "tpu"], id="no device"),
        pytest.param(["export", "c"], id="nothing to write"),
        pytest.param(["export", "c", "b", "--precision", "fp8"], id="no precision"),
        *(
            pytest.param(["export", "c", "b", "--languages", pair], id=f"no pair: {pair}")
            for pair in ("en", "en:", ":de", "a:b:c")
        ),
        pytest.param(["fly"], id="no command"),
    ],
)
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr


def test_options_can_come_from_the_environment(
    loaded: dict[str, Any], engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXLATE_TRANSLATE_BUNDLE", "from/the/environment")
    monkeypatch.setenv("ONNXLATE_TRANSLATE_BEAM_SIZE", "3")
    assert run("translate", stdin=b"a\n").stdout == "A\n"
    assert loaded["directory"] == Path("from/the/environment")
    assert engine.submitted[0].options.beam_size == 3


def test_a_reader_that_leaves_ends_the_command_without_a_traceback(tmp_path: Path) -> None:
    code = """
import sys
from serving import model
from serving.cli import main
from tests.fakes import ScriptedEngine, fake_model
model.load_model = lambda *_: fake_model(ScriptedEngine())
main(["translate", "--bundle", "b"])
"""
    lines = tmp_path / "lines"
    lines.write_bytes(b"a line\n" * 20_000)
    with lines.open("rb") as stdin:
        command = [sys.executable, "-c", code]
        with subprocess.Popen(command, cwd=ROOT, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == b"A LINE\n"
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait(PATIENCE_S) == 1


# serve.


def test_serve_hands_its_options_on(loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[tuple[ServerConfig, RequestLimits]] = []

    def serve(config: ServerConfig, limits: RequestLimits, load: server_module.Load) -> int:
        served.append((config, limits))
        load(None)  # type: ignore[arg-type]  # the fake does not look at it
        return 0

    monkeypatch.setattr("serving.server.serve", serve)
    options = "--host ::1 --port 1 --metrics-port 2 --threads 3 --max-rows 4 --max-waiting 5 --max-beam-size 6 --max-texts 7"
    result = run("serve", "some/bundle", *options.split(), "--max-request", "8", "--drain-timeout", "9", "--reflection")
    assert result.exit_code == 0
    ((config, limits),) = served
    assert config == ServerConfig(host="::1", port=1, metrics_port=2, reflection=True, drain_timeout_s=9.0)
    assert limits == RequestLimits(max_beam_size=6, max_texts_per_request=7, max_request_s=8.0)
    assert (loaded["directory"], loaded["limits"]) == (Path("some/bundle"), limits)
    assert loaded["config"] == EngineConfig(threads=3, max_rows_per_worker=4, max_waiting_sequences=5)


def test_serve_has_the_defaults_of_the_configuration(loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []

    def serve(config: ServerConfig, limits: RequestLimits, load: server_module.Load) -> int:
        load(None)  # type: ignore[arg-type]  # the fake does not look at it
        served.extend([config, limits, loaded["config"]])
        return 0

    monkeypatch.setattr("serving.server.serve", serve)
    assert run("serve", "some/bundle").exit_code == 0
    assert served == [ServerConfig(), RequestLimits(), EngineConfig()]


def test_a_server_that_cannot_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(*_: Any) -> int:
        raise ServerStartError("cannot listen on 0.0.0.0:1: the port is taken; choose another with --port")

    monkeypatch.setattr("serving.server.serve", serve)
    result = run("serve", "some/bundle")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: cannot listen on 0.0.0.0:1: the port is taken; choose another with --port\n"


def test_a_bundle_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serving.cli", "serve", str(tmp_path / "none"), "--port", "0", "--metrics-port", "0"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert result.returncode == 1
    assert "none cannot be used:\n  there is no such directory" in result.stderr
    assert "Traceback" not in result.stderr


# inspect, export, --version.


def test_inspect_prints_the_manifest(tiny_bundle: Bundle) -> None:
    result = run("inspect", str(tiny_bundle.directory))
    assert result.exit_code == 0
    assert tiny_bundle.manifest.version() in result.stdout


def test_inspect_tells_every_fault(tmp_path: Path) -> None:
    result = run("inspect", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: bundle ")


def test_export_hands_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("export.pipeline.export_bundle", lambda *arguments, **options: seen.append((arguments, options)))
    pairs = (LanguagePair(source="en", target="de"), LanguagePair(source="en", target="zh-Hant"))
    stated = ("--languages", "en:de", "--languages", "en:zh-Hant", "--source-prefix", "translate: ")
    int8 = ("--precision", "int8", "--int8-scales", "row")
    assert run("export", "checkpoint", "bundle", *int8, *stated, "--overwrite").exit_code == 0
    scaled = {"precision": "int8", "int8_scales": "row"}
    options = {**scaled, "languages": pairs, "source_prefix": "translate: ", "overwrite": True}
    assert seen == [((Path("checkpoint"), Path("bundle")), options)]


def test_export_leaves_the_scales_to_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("export.pipeline.export_bundle", lambda *_, **options: seen.append(options["int8_scales"]))
    assert run("export", "checkpoint", "bundle", "--precision", "int8").exit_code == 0
    assert seen == [None]


def test_scales_of_no_known_kind_are_refused() -> None:
    result = run("export", "checkpoint", "bundle", "--int8-scales", "column")
    assert result.exit_code == 2
    assert "'column' is not one of 'constant', 'row'" in result.stderr


def test_export_without_torch_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "export"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torch", None)
    result = run("export", "checkpoint", "bundle")
    assert result.exit_code == 1
    assert result.stderr == "Error: torch is not installed: exporting needs the extra onnxlate[export]\n"


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("onnxlate ")


def test_what_nobody_foresaw_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(*_: Any) -> int:
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr("serving.server.serve", serve)
    result = run("serve", "some/bundle")
    assert isinstance(result.exception, ZeroDivisionError)
