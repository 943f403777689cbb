"""The models that are compared, and where each peer finds them; whatever has to be made is made once, in the build directory.

Knows directories; what is in them is written by ``benchmarks.conversion`` and by onnxlate's own export, both in a process of
their own, so that torch and its threads stay out of this one.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ParamSpec, TypeVar

from benchmarks import peers
from benchmarks.process import Failed, PeerUnavailableError, one_line
from benchmarks.results import Precision
from serving.bundle import Bundle, read_bundle
from serving.manifest import Int8Scales

ROOT = Path(__file__).parents[1]
BUNDLED_CHECKPOINT = ROOT / "examples" / "multi30k" / "checkpoint"
BASE_RANDOM, TRAINED, BUNDLED = "base-random", "multi30k-base", "bundled"

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchModel:
    """One model in the forms that the peers load."""

    name: str
    # One line for the report.
    description: str
    # Where its forms are written.
    build: Path
    # A Marian directory or a native checkpoint; None: random weights, to be written as the former.
    checkpoint: Path | None = None
    is_native: bool = False
    # Its outputs mean something, so that it gets real text; the others get ids and a forced length.
    is_trained: bool = False

    def bundle(self, precision: Precision) -> Path:
        """Its onnxlate bundle, exported by the exporter as it is now.

        Raises:
            PeerUnavailableError: it cannot be exported.
        """

        def write(directory: Path) -> None:
            aside(_export, self._source(), directory, precision)

        return self._once(f"onnxlate-{precision}-{self._weights()}-{exporter_digest()}", write)

    def open_bundle(self, precision: Precision = "int8") -> Bundle:
        """``bundle``, read and checked: for its tokenizer and ids."""
        return read_bundle(self.bundle(precision))

    def ctranslate2(self, precision: Precision) -> Path:
        """Its CTranslate2 directory, weights stored in ``precision``.

        Raises:
            PeerUnavailableError: it cannot be converted.
        """

        def write(directory: Path) -> None:
            from benchmarks import conversion

            convert = conversion.write_native_as_ctranslate2 if self.is_native else conversion.write_ctranslate2
            aside(convert, self._source(), directory, precision)

        return self._once(f"ctranslate2-{precision}-{self._weights()}-{converter_digest()}-{_version('ctranslate2')}", write)

    def marian(self) -> Path:
        """Its Hugging Face Marian directory.

        Raises:
            PeerUnavailableError: it cannot be written.
        """
        if not self.is_native:
            return self._source()

        def write(directory: Path) -> None:
            from benchmarks import conversion

            aside(conversion.write_native_as_marian, self._source(), directory)

        return self._once(f"marian-{self._weights()}-{converter_digest()}", write)

    def directory_for(self, peer: str, precision: Precision) -> Path:
        """Where one of ``benchmarks.peers.PEERS`` finds it.

        Raises:
            PeerUnavailableError: that form cannot be made.
        """
        match peer:
            case peers.ONNXLATE:
                return self.bundle(precision)
            case peers.CTRANSLATE2:
                return self.ctranslate2(precision)
            case peers.HUGGING_FACE:
                if precision == "int8":
                    raise PeerUnavailableError("has no int8 for this model on this device")
                return self.marian()
        raise AssertionError(f"no peer is called {peer}")

    def _source(self) -> Path:
        if self.checkpoint is not None:
            return self.checkpoint

        def write(directory: Path) -> None:
            from benchmarks import conversion

            aside(conversion.write_random_marian, directory)

        return self._once(f"marian-{converter_digest()}", write)

    def _weights(self) -> str:
        """A digest of the weights, so that a form of other weights is not taken for one of these."""
        return weights_digest(self._source())

    def _once(self, name: str, write: Callable[[Path], None]) -> Path:
        """The directory of that name; written whole, or not at all, where it is not there yet."""
        directory = self.build / self.name / name
        if directory.is_dir():
            return directory
        unfinished = directory.with_name(f"{name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(unfinished)
        except (ImportError, PeerUnavailableError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise error if isinstance(error, PeerUnavailableError) else PeerUnavailableError(one_line(error)) from error
        unfinished.rename(directory)
        return directory


def all_models(build: Path, trained: Path) -> dict[str, BenchModel]:
    """The models that are there, by name.

    Args:
        build: where forms of them are written.
        trained: the Marian directory of the trained base model, if it exists.
    """
    size = "6+6 layers, 512, 8 heads, 2048"
    found = [
        BenchModel(name=BASE_RANDOM, description=f"{size}, 32,001 tokens, random weights; lengths are forced", build=build),
    ]
    if trained.is_dir():
        described = f"{size}, trained on Multi30k en-de ({trained.name}); real captions, natural lengths"
        found.append(BenchModel(name=TRAINED, description=described, build=build, checkpoint=trained, is_trained=True))
    if BUNDLED_CHECKPOINT.is_dir():
        described = "the small model of examples/multi30k, trained on Multi30k en-de; real captions, natural lengths"
        found.append(
            BenchModel(
                name=BUNDLED, description=described, build=build, checkpoint=BUNDLED_CHECKPOINT, is_native=True, is_trained=True
            )
        )
    return {model.name: model for model in found}


def aside(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call a function of a module in a process of its own, and return what it returns.

    Raises:
        PeerUnavailableError: it raised, and what; or its process was ended.
    """
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            done = pool.submit(_reported, functools.partial(function, *args, **kwargs)).result()
        except BrokenProcessPool as error:
            raise PeerUnavailableError(one_line(error)) from error
    if isinstance(done, Failed):
        raise PeerUnavailableError(done.reason)
    return done


def _reported(call: Callable[[], _T]) -> _T | Failed:
    """What a function returns, or what it raised in words: not every library's exception can be sent to another process."""
    try:
        return call()
    except Exception as error:  # any: it is told in words, see above
        return Failed(one_line(error))


@functools.cache
def exporter_digest() -> str:
    """Of the code that writes bundles, so that a bundle of another exporter is not taken for this one's."""
    paths = sorted(path for folder in ("export", "serving") for path in (ROOT / folder).rglob("*.py"))
    involved = (ROOT / "export", ROOT / "serving" / "tokenizers", ROOT / "serving" / "bundle.py")
    written = [path for path in paths if any(map(path.is_relative_to, involved))]
    return _digest(written)


@functools.cache
def converter_digest() -> str:
    """Of the code that writes the other forms."""
    return _digest([ROOT / "benchmarks" / name for name in ("conversion.py", "marian.py")])


@functools.cache
def weights_digest(checkpoint: Path) -> str:
    """Of a checkpoint's files of weights, of whatever format; the file is taken not to change while this program runs."""
    return _digest(sorted(path for pattern in ("*.safetensors", "*.bin") for path in checkpoint.glob(pattern)))


def _digest(paths: Sequence[Path]) -> str:
    found = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:8]


def _export(checkpoint: Path, directory: Path, precision: Precision) -> None:
    from export.pipeline import export_bundle

    # The faster ones also where there are no sentences to measure them on.
    scales: Int8Scales | None = "constant" if precision == "int8" else None
    export_bundle(checkpoint, directory, precision=precision, int8_scales=scales, show_progress=False)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise PeerUnavailableError(f"{package} is not installed") from error
