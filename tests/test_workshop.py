from __future__ import annotations

import ast
import filecmp
import graphlib
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import serving
from tests import command_line

ROOT = Path(__file__).parents[1]
SERVING_MODULES = ["serving", *sorted(found.name for found in pkgutil.walk_packages(serving.__path__, "serving."))]
PURE = ("serving.tokenizers", "serving.kv_cache", "serving.device_cache", "serving.search", "serving.scheduler")
LOCKS = ("build", "dev", "export", "serve-cpu", "serve-gpu")
MAKE_TARGETS = (
    "help",
    "install",
    "protos",
    "format",
    "lint",
    "types",
    "test",
    "test-peers",
    "test-all",
    "test-gpu",
    "bench",
    "bench-gpu",
    "demo",
    "serve",
    "lock",
    "clean",
)


# Layers. What a module imports is read from its source, so that an import hidden in a function or behind a test is seen too.


def source_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(node: ast.AST, *, inside_functions: bool) -> Iterator[str]:
    """Absolute names of the modules, or of the things in modules, that the code below ``node`` imports."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (f"{'.' * child.level}{child.module or ''}.{alias.name}" for alias in child.names)
        elif inside_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(child, inside_functions=inside_functions)


def imported_by(module: str, *, inside_functions: bool = True) -> set[str]:
    return set(imports(ast.parse(source_of(module).read_text()), inside_functions=inside_functions))


def is_below(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def neighbours(module: str, modules: list[str]) -> set[str]:
    """Those of ``modules`` that a module needs when it is imported."""
    needed = set()
    for name in imported_by(module, inside_functions=False):
        owner = name if name in modules else name.rpartition(".")[0]
        if owner in modules and owner != module:
            needed.add(owner)
    return needed


def test_serving_loads_neither_torch_nor_export() -> None:
    code = """
import importlib, sys
seen = set()
for module in sys.argv[1:]:
    importlib.import_module(module)
    new = {"torch", "export"} & set(sys.modules) - seen
    seen |= new
    for name in sorted(new):
        print(module, "loads", name)
"""
    command = [sys.executable, "-c", code, *SERVING_MODULES]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


def test_only_the_runtime_imports_onnxruntime() -> None:
    users = [module for module in SERVING_MODULES if any(is_below(name, "onnxruntime") for name in imported_by(module))]
    assert {user.rpartition(".")[0] for user in users} == {"serving.runtime"}


def test_only_the_command_line_reaches_for_export() -> None:
    users = [module for module in SERVING_MODULES if any(is_below(name, "export") for name in imported_by(module))]
    assert users == ["serving.cli"]
    assert not [name for name in imported_by("serving.cli", inside_functions=False) if is_below(name, "export")]


@pytest.mark.parametrize("module", [module for module in SERVING_MODULES if is_below(module, *PURE)])
def test_pure_modules_know_no_runtime_no_rpc_and_no_clock(module: str) -> None:
    waiting, reached = [module], {module}
    while waiting:
        current = waiting.pop()
        impure = [name for name in imported_by(current) if is_below(name, "onnxruntime", "grpc", "asyncio", "time", "threading")]
        assert not impure, f"{module} reaches {current}, which imports {impure}"
        new = neighbours(current, SERVING_MODULES) - reached
        reached |= new
        waiting += new


def test_every_pure_module_is_there() -> None:
    assert set(PURE) <= set(SERVING_MODULES)


def test_no_module_imports_relatively() -> None:
    users = [module for module in SERVING_MODULES if any(name.startswith(".") for name in imported_by(module))]
    assert users == []


@pytest.mark.parametrize("package", ["serving", "export"])
def test_no_import_circles(package: str) -> None:
    paths = sorted(path.relative_to(ROOT).with_suffix("") for path in (ROOT / package).rglob("*.py"))
    modules = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    graph = {module: neighbours(module, modules) for module in modules}
    assert list(graphlib.TopologicalSorter(graph).static_order())


# Generated and locked files.


def test_generated_stubs_are_what_the_protos_say(tmp_path: Path) -> None:
    protos = [f"serving/pb/{path.name}" for path in sorted((ROOT / "protos").glob("*.proto"))]
    assert protos
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "pyi")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Iserving/pb=protos", *outputs, *protos]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    made = tmp_path / "serving" / "pb"
    names = sorted(path.name for path in made.iterdir())
    assert len(names) == 3 * len(protos)
    assert names == sorted(path.name for path in (ROOT / "serving" / "pb").glob("*_pb2*.py*"))
    same, _, _ = filecmp.cmpfiles(made, ROOT / "serving" / "pb", names, shallow=False)
    assert sorted(same) == names, "run make protos"


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def locked(lock: str) -> dict[str, str]:
    """Name -> version."""
    text = (ROOT / "requirements" / f"{lock}.txt").read_text()
    return dict(re.findall(r"^([a-z0-9.-]+)==([^ ;\\]+)", text, re.MULTILINE))


@pytest.mark.parametrize(
    ("lock", "extras"),
    [
        ("serve-cpu", ["cpu", "tokenizers"]),
        ("serve-gpu", ["gpu", "tokenizers"]),
        ("export", ["cpu", "tokenizers", "export"]),
        ("dev", ["cpu", "tokenizers", "export", "train", "dev"]),
    ],
)
def test_locks_hold_what_pyproject_asks_for(pyproject: dict[str, Any], lock: str, extras: list[str]) -> None:
    project = pyproject["project"]
    wanted = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    versions = locked(lock)
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        if name not in ("torch", project["name"]):
            assert name in versions, f"{name}: run make lock"
            assert requirement.specifier.contains(versions[name]), f"{requirement}: run make lock"


def test_the_build_lock_holds_what_the_build_asks_for(pyproject: dict[str, Any]) -> None:
    assert pyproject["dependency-groups"]["build"] == pyproject["build-system"]["requires"]
    assert list(locked("build")) == [Requirement(line).name for line in pyproject["build-system"]["requires"]]


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_hash_everything_and_name_no_place(lock: str) -> None:
    text = (ROOT / "requirements" / f"{lock}.txt").read_text()
    assert not re.search(r"://|index-url|find-links|\.\./|^/", text, re.MULTILINE)
    entries = re.split(r"^(?=[a-z])", text, flags=re.MULTILINE)[1:]
    assert len(entries) == len(locked(lock))
    assert not [entry.splitlines()[0] for entry in entries if "--hash=sha256:" not in entry]


@pytest.mark.parametrize("lock", [lock for lock in LOCKS if lock != "serve-gpu"])
def test_no_lock_brings_torch_or_what_its_cuda_build_asks_for(lock: str) -> None:
    assert not [name for name in locked(lock) if re.match(r"torch$|triton|nvidia|cuda", name)]


def test_locks_agree_with_one_another() -> None:
    dev = locked("dev")
    for lock in LOCKS:
        assert not {name: version for name, version in locked(lock).items() if dev.get(name, version) != version}


def test_the_changelogs_latest_release_is_this_version(pyproject: dict[str, Any]) -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(heading for heading in headings if heading != "Unreleased") == pyproject["project"]["version"]


# The chores and what documents say of them.


@pytest.mark.parametrize("target", [*MAKE_TARGETS, "clean"])
def test_make_knows_the_target_and_lists_it(target: str) -> None:
    subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, check=True)
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert target in [line.split()[0] for line in listed.splitlines()]


@pytest.mark.parametrize("target", ["demo", "bench", "bench-gpu"])
def test_make_runs_modules_that_exist(target: str) -> None:
    command = ["make", "--dry-run", "--always-make", target]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (module,) = re.findall(r"python -m (examples\S*|benchmarks\S*)", made)
    path = ROOT.joinpath(*module.split("."))
    assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def run_ci(tmp_path: Path, *, make_fails_at: str = "", **environment: str) -> tuple[int, list[str], str]:
    """Runs .ci/run with a make that only writes down what it was asked; returns the exit status, what it wrote, and stderr."""
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "$* CI=$CI" >> {tmp_path}/asked\n[ "$*" != "{make_fails_at}" ]\n')
    make.chmod(0o755)
    variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **environment}
    result = subprocess.run([ROOT / ".ci" / "run"], cwd="/", env=variables, capture_output=True, text=True)
    asked = tmp_path / "asked"
    return result.returncode, asked.read_text().splitlines() if asked.exists() else [], result.stderr


def test_ci_calls_make_and_nothing_else(tmp_path: Path) -> None:
    status, asked, _ = run_ci(tmp_path, PYTHON=sys.executable)
    assert (status, asked) == (0, ["lint CI=true", "types CI=true", "test CI=true"])


def test_ci_stops_at_the_first_failure(tmp_path: Path) -> None:
    status, asked, _ = run_ci(tmp_path, make_fails_at="types", PYTHON=sys.executable)
    assert (status, asked) == (1, ["lint CI=true", "types CI=true"])


def test_ci_passes_by_a_python_that_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "python3.13").symlink_to(sys.executable)
    status, asked, _ = run_ci(tmp_path, PYTHON="no-such-python")
    assert (status, len(asked)) == (0, 3)


def test_ci_says_that_no_python_will_do(tmp_path: Path) -> None:
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    status, asked, errors = run_ci(tmp_path, PYTHON="no-such-python", PATH=str(tmp_path))
    assert (status, asked) == (1, [])
    assert "no Python from 3.11 on" in errors


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_readmes_commands_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [command for block in code_blocks("sh") for command in command_line.commands_of(block)]
    assert ["make", "demo"] in commands
    for program, *arguments in commands:
        if Path(program).name == "onnxlate":
            command_line.understand(arguments, monkeypatch)
        elif program == "make":
            subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, check=True)


def test_the_readmes_python_imports_what_exists() -> None:
    for block in code_blocks("python"):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.module is not None
                module = importlib.import_module(node.module)
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)


@pytest.mark.parametrize(
    ("script", "commands"),
    [
        ("make demo  # first", [["make", "demo"]]),
        ("onnxlate translate --server a:1 < in.txt > out.txt", [["onnxlate", "translate", "--server", "a:1"]]),
        ('TORCH="torch==2.13.0 --index-url URL" make demo', [["make", "demo"]]),
        ("make install \\\n  TORCH=torch", [["make", "install", "TORCH=torch"]]),
        ("echo 'A & B' | onnxlate translate && make test", [["echo", "A & B"], ["onnxlate", "translate"], ["make", "test"]]),
        ("onnxlate serve b 2>&1 &", [["onnxlate", "serve", "b"]]),
    ],
)
def test_commands_are_read_out_of_a_script(script: str, commands: list[list[str]]) -> None:
    assert list(command_line.commands_of(script)) == commands
