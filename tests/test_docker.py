from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pathspec
import pytest
import yaml

from serving import health_probe
from serving.config import ServerConfig
from tests import command_line

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
SERVING = [DOCKER / "serve.Dockerfile", DOCKER / "serve-cuda.Dockerfile"]
MOUNTED_BUNDLE = "/bundle"

every_dockerfile = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
every_serving_dockerfile = pytest.mark.parametrize("dockerfile", SERVING, ids=lambda path: path.name)


@dataclass(frozen=True)
class Instruction:
    name: str
    arguments: str

    def exec_form(self) -> list[str]:
        words = json.loads(self.arguments)
        assert isinstance(words, list)
        return words


def instructions(dockerfile: Path) -> list[Instruction]:
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [Instruction(*line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def stages(dockerfile: Path) -> list[list[Instruction]]:
    found: list[list[Instruction]] = []
    for instruction in instructions(dockerfile):
        if instruction.name == "FROM":
            found.append([])
        found[-1].append(instruction)
    return found


def last(dockerfile: Path, name: str) -> Instruction:
    """The one that holds in the image: the last of its kind in the last stage."""
    return [instruction for instruction in stages(dockerfile)[-1] if instruction.name == name][-1]


def copies(stage: list[Instruction]) -> Iterator[tuple[list[str], str]]:
    """Sources and destination of what a stage copies from the repository."""
    for instruction in stage:
        if instruction.name in ("COPY", "ADD") and not instruction.arguments.startswith("--from="):
            *sources, destination = shlex.split(instruction.arguments)
            yield sources, destination


def sent_to_the_build() -> pathspec.PathSpec[Any]:
    """.dockerignore, whose patterns start at the root and whose last match decides."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    return pathspec.PathSpec.from_lines("gitignore", [re.sub(r"^(!?)/?", r"\1/", pattern) for pattern in patterns])


def command_of(dockerfile: Path) -> list[str]:
    """What the container runs, after the init."""
    words = last(dockerfile, "ENTRYPOINT").exec_form() + last(dockerfile, "CMD").exec_form()
    assert words[:2] == ["/usr/bin/tini", "--"]
    return words[2:]


def test_there_are_three_images() -> None:
    assert [path.name for path in DOCKERFILES] == ["export.Dockerfile", "serve-cuda.Dockerfile", "serve.Dockerfile"]


@every_dockerfile
def test_what_is_copied_exists_and_reaches_the_build(dockerfile: Path) -> None:
    ignored = sent_to_the_build()
    sources = [source for stage in stages(dockerfile) for paths, _ in copies(stage) for source in paths]
    assert sources
    for source in sources:
        path = ROOT / source
        assert path.exists(), source
        files = [path] if path.is_file() else [file for file in path.rglob("*.py")]
        assert files, source
        assert not [file for file in files if ignored.match_file(file.relative_to(ROOT))]


@pytest.mark.parametrize("path", [".git/config", ".venv/bin/python", "bundles/a/manifest.json", "serving/__pycache__/cli.pyc"])
def test_what_is_large_or_local_does_not_reach_the_build(path: str) -> None:
    assert sent_to_the_build().match_file(path)


@every_dockerfile
def test_it_runs_as_a_numbered_user_without_rights(dockerfile: Path) -> None:
    user, group = last(dockerfile, "USER").arguments.split(":")
    assert int(user) > 0
    assert int(group) > 0


@every_dockerfile
def test_base_images_have_a_tag(dockerfile: Path) -> None:
    for stage in stages(dockerfile):
        assert re.match(r"python:3\.\d+-slim-\w+( AS builder)?$", stage[0].arguments)


@every_dockerfile
def test_the_command_line_parses(dockerfile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = command_of(dockerfile)
    assert program == "onnxlate"
    command_line.understand(arguments, monkeypatch)


@every_serving_dockerfile
def test_it_serves_the_mounted_bundle_on_the_device_it_is_built_for(dockerfile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = command_line.parse(command_of(dockerfile)[1:], monkeypatch)
    assert MOUNTED_BUNDLE in [str(value) for value in context.params.values()]
    assert context.params["device"] == ("cuda" if "cuda" in dockerfile.name else "cpu")


@every_serving_dockerfile
def test_exposed_ports_are_the_default_ones(dockerfile: Path) -> None:
    config = ServerConfig()
    assert last(dockerfile, "EXPOSE").arguments.split() == [str(config.port), str(config.metrics_port)]


@every_serving_dockerfile
def test_the_healthcheck_is_the_probe(dockerfile: Path) -> None:
    options, command = last(dockerfile, "HEALTHCHECK").arguments.split("CMD ")
    program, *arguments = json.loads(command)
    assert (program, arguments[:2]) == ("python", ["-m", health_probe.__name__])
    context = health_probe.main.make_context("health_probe", arguments[2:])
    # The probe gives up before it is given up, so that its reason is in the log.
    timeout = re.search(r"--timeout=(\d+)s", options)
    assert timeout is not None
    assert context.params["timeout_s"] < int(timeout[1])


@every_serving_dockerfile
def test_serving_images_install_no_torch(dockerfile: Path) -> None:
    lock = "serve-gpu.txt" if "cuda" in dockerfile.name else "serve-cpu.txt"
    assert re.findall(r"requirements/([\w-]+\.txt)", dockerfile.read_text()) == ["build.txt", lock, "build.txt", lock]
    assert not re.search(r"^torch==", (ROOT / "requirements" / lock).read_text(), re.MULTILINE)


def test_the_export_image_has_the_makefiles_torch() -> None:
    pinned = re.search(r"^TORCH_PIN := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert pinned is not None
    (argument,) = [found for found in instructions(DOCKER / "export.Dockerfile") if found.name == "ARG"]
    assert argument.arguments == f'TORCH="{pinned[1]}"'


@every_dockerfile
def test_hadolint_finds_nothing(dockerfile: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    result = subprocess.run([hadolint, dockerfile], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.fixture
def compose() -> dict[str, Any]:
    parsed = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    assert isinstance(parsed, dict)
    return parsed


def test_compose_builds_the_serving_image(compose: dict[str, Any]) -> None:
    build = compose["services"]["server"]["build"]
    assert (DOCKER / build["context"]).resolve() == ROOT
    assert ROOT / build["dockerfile"] == DOCKER / "serve.Dockerfile"


def test_compose_publishes_the_default_ports(compose: dict[str, Any]) -> None:
    config = ServerConfig()
    assert [entry.split(":")[-1] for entry in compose["services"]["server"]["ports"]] == [
        str(config.port),
        str(config.metrics_port),
    ]


def test_compose_mounts_the_demos_bundle_where_the_image_looks_for_it(compose: dict[str, Any]) -> None:
    (volume,) = compose["services"]["server"]["volumes"]
    assert (volume["type"], volume["target"], volume["read_only"]) == ("bind", MOUNTED_BUNDLE, True)
    source = re.fullmatch(r"\$\{BUNDLE:-(.+)\}", volume["source"])
    assert source is not None
    made = subprocess.run(["make", "--dry-run", "--always-make", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f" {(DOCKER / source[1]).resolve().relative_to(ROOT)} --precision int8" in made.stdout


@pytest.mark.parametrize("service", ["server", "prometheus"])
def test_compose_gives_no_more_rights_than_needed(compose: dict[str, Any], service: str) -> None:
    settings = compose["services"][service]
    assert settings["read_only"] is True
    assert settings["cap_drop"] == ["ALL"]
    assert settings["security_opt"] == ["no-new-privileges:true"]


def test_compose_lets_the_server_drain(compose: dict[str, Any]) -> None:
    grace = re.fullmatch(r"(\d+)s", compose["services"]["server"]["stop_grace_period"])
    assert grace is not None
    assert int(grace[1]) > ServerConfig().drain_timeout_s


def test_prometheus_scrapes_the_servers_metrics_port(compose: dict[str, Any]) -> None:
    assert "./prometheus.yml:/etc/prometheus/prometheus.yml:ro" in compose["services"]["prometheus"]["volumes"]
    (job,) = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"server:{ServerConfig().metrics_port}"]}]
    assert "server" in compose["services"]


def package_index_is_out_of_reach(directory: Path) -> str | None:
    command = [sys.executable, "-m", "pip", "--retries=0", "--timeout=15", "download", "--no-deps", "--dest", directory, "click"]
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    return result.stderr.strip().splitlines()[-1] if result.returncode else None


@pytest.mark.slow
def test_the_install_steps_work_in_a_clean_place(tmp_path: Path) -> None:
    reason = package_index_is_out_of_reach(tmp_path / "reached")
    if reason is not None:
        pytest.skip(f"the package index cannot be reached: {reason}")
    build, opt, programs = tmp_path / "build", tmp_path / "opt", tmp_path / "programs"
    for directory in (build, opt, programs):
        directory.mkdir()
    (programs / "python").symlink_to(Path(sys.base_prefix) / "bin" / "python3")
    builder, image = stages(DOCKER / "serve.Dockerfile")
    for sources, destination in copies(builder):
        for source in sources:
            target = build / destination / (Path(source).name if (ROOT / source).is_file() else "")
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_file():
                shutil.copy(ROOT / source, target)
            else:
                shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**_pip_settings(), "PATH": f"{programs}:/usr/bin:/bin"}
    for run in (instruction.arguments for instruction in builder if instruction.name == "RUN"):
        step = run.replace("/opt/", f"{opt}/")
        result = subprocess.run(["sh", "-ec", step], cwd=build, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, f"{step}\n{result.stdout}{result.stderr}"

    # What the image gets of it.
    assert [found.arguments for found in image if found.name == "COPY"] == ["--from=builder /opt/onnxlate /opt/onnxlate"]
    python = opt / "onnxlate" / "bin" / "python"
    version = subprocess.run([python.with_name("onnxlate"), "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert version.returncode == 0, version.stderr
    assert re.search(r"\b\d+\.\d+\.\d+", version.stdout)
    code = "import importlib.util, sys; print([name for name in sys.argv[1:] if importlib.util.find_spec(name)])"
    names = ["torch", "onnx", "pytest", "onnxruntime", "serving"]
    found = subprocess.run([python, "-c", code, *names], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout == "['onnxruntime', 'serving']\n"
    probe = subprocess.run([python, "-m", "serving.health_probe", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert probe.returncode == 0, probe.stderr


def _pip_settings() -> dict[str, str]:
    """Where this machine's pip looks and keeps its cache; nothing else of the environment."""
    return {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name in ("HOME", "SSL_CERT_FILE")}
