from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from export.writer import Owned, check_destination, working_directory, write_bundle
from serving.bundle import Bundle, read_bundle
from serving.errors import ExportError
from serving.manifest import DefaultOptions, ManifestDraft
from tests.serving.test_bundle import manifest_fields

FILES = {"encoder.onnx": b"the encoder", "decoder.onnx": b"the decoder step", "sentencepiece.model": b"pieces"}
NEW_FILES = {**FILES, "encoder.onnx": b"another encoder"}


def draft(name: str = "tiny") -> ManifestDraft:
    fields = {**manifest_fields(), "name": name}
    del fields["files"]
    return ManifestDraft.model_validate(fields)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A bundle's destination, alone in its parent."""
    parent = tmp_path / "bundles"
    parent.mkdir()
    return parent / "tiny"


def test_what_is_written_can_be_read(place: Path) -> None:
    bundle = write_bundle(place, FILES, draft())
    assert read_bundle(place) == bundle == Bundle(place, bundle.manifest)
    assert {path.name: path.read_bytes() for path in place.iterdir() if path.name != "manifest.json"} == FILES
    assert os.listdir(place.parent) == ["tiny"]


def test_a_bundle_has_the_version_that_it_is_read_with(place: Path) -> None:
    """Of records too whose fields were left to their defaults."""
    bundle = write_bundle(place, FILES, draft().model_copy(update={"defaults": DefaultOptions()}))
    assert read_bundle(place).manifest.version() == bundle.manifest.version()


def test_files_are_copied_and_parents_made(tmp_path: Path) -> None:
    large = tmp_path / "model"
    large.write_bytes(b"0123456789abcdef" * 200_000)  # several chunks
    bundle = write_bundle(tmp_path / "a" / "b" / "tiny", {**FILES, "encoder.onnx": large}, draft())
    assert read_bundle(tmp_path / "a" / "b" / "tiny").manifest == bundle.manifest
    assert bundle.encoder_path.read_bytes() == large.read_bytes()


def test_a_file_that_is_owned_is_taken_and_not_copied(place: Path) -> None:
    with working_directory(place) as work:
        (work / "large").write_bytes(b"another encoder")
        inode = (work / "large").stat().st_ino
        bundle = write_bundle(place, {**FILES, "encoder.onnx": Owned(work / "large")}, draft())
        assert os.listdir(work) == []
    assert read_bundle(place) == bundle
    assert bundle.encoder_path.read_bytes() == b"another encoder"
    assert bundle.encoder_path.stat().st_ino == inode
    assert os.listdir(place.parent) == ["tiny"]


def test_an_export_at_work_keeps_its_working_directory_until_it_ends(place: Path) -> None:
    with working_directory(place) as work:
        (work / "large").write_bytes(b"half of an encoder")
        write_bundle(place, FILES, draft("another's"))
        assert (work / "large").is_file()
    assert os.listdir(place.parent) == ["tiny"]


def test_a_working_directory_that_cannot_be_made(place: Path) -> None:
    place.write_text("a file")
    with pytest.raises(ExportError, match="could not be written"), working_directory(place / "tiny"):
        pytest.fail("there is no such directory")


@pytest.mark.parametrize("others", [(), ("a/other",)], ids=["alone", "beside another"])
def test_parents_that_were_made_go_with_an_export_that_fails(tmp_path: Path, others: tuple[str, ...]) -> None:
    place = tmp_path / "a" / "b" / "tiny"

    def fail() -> None:
        assert place.parent.is_dir()
        for other in others:
            (tmp_path / other).mkdir()
        raise RuntimeError("no export")

    with pytest.raises(RuntimeError, match="no export"), working_directory(place):
        fail()
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == ({"a", *others} if others else set())


def test_parents_that_were_there_stay(place: Path) -> None:
    with pytest.raises(RuntimeError, match="no export"), working_directory(place):
        raise RuntimeError("no export")
    assert os.listdir(place.parent) == []


def test_others_may_read_it(place: Path) -> None:
    write_bundle(place, FILES, draft())
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(place.stat().st_mode) == 0o777 & ~umask
    assert stat.S_IMODE((place / "manifest.json").stat().st_mode) == 0o666 & ~umask


def test_everything_is_synced_before_the_rename(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.partition(".partial-")[0])
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        events.append("rename")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    write_bundle(place, FILES, draft())
    assert events == [*FILES, "manifest.json", ".tiny", "rename", "bundles"]


def test_a_bundle_is_not_replaced_unasked(place: Path) -> None:
    before = write_bundle(place, FILES, draft())
    with pytest.raises(ExportError, match="tiny exists; --overwrite replaces it"):
        write_bundle(place, NEW_FILES, draft())
    assert read_bundle(place) == before
    assert os.listdir(place.parent) == ["tiny"]


def test_a_bundle_is_replaced_whole(place: Path) -> None:
    write_bundle(place, {**FILES, "extra.bin": b"gone afterwards"}, draft())
    after = write_bundle(place, NEW_FILES, draft("newer"), overwrite=True)
    assert read_bundle(place) == after
    assert after.manifest.name == "newer"
    assert not (place / "extra.bin").exists()
    assert os.listdir(place.parent) == ["tiny"]


def test_overwrite_may_find_nothing_there(place: Path) -> None:
    write_bundle(place, FILES, draft(), overwrite=True)
    assert read_bundle(place).manifest.name == "tiny"


def test_what_a_link_leads_to_is_replaced(place: Path, tmp_path: Path) -> None:
    write_bundle(place, FILES, draft())
    link = tmp_path / "current"
    link.symlink_to(place)
    write_bundle(link, NEW_FILES, draft(), overwrite=True)
    assert link.is_symlink()
    assert read_bundle(place).encoder_path.read_bytes() == b"another encoder"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_that_is_no_bundle_is_left_alone(place: Path, overwrite: bool) -> None:
    place.mkdir()
    (place / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match="exists and is not a bundle; it is left alone"):
        write_bundle(place, FILES, draft(), overwrite=overwrite)
    assert (place / "thesis.txt").read_text() == "years of work"
    assert os.listdir(place.parent) == ["tiny"]


def test_a_file_is_left_alone(place: Path) -> None:
    place.write_text("a file")
    with pytest.raises(ExportError, match="exists and is not a bundle"):
        write_bundle(place, FILES, draft(), overwrite=True)
    assert place.read_text() == "a file"


def test_the_destination_is_checked_ahead_of_the_work(place: Path) -> None:
    check_destination(place)
    write_bundle(place, FILES, draft())
    check_destination(place, overwrite=True)
    with pytest.raises(ExportError, match="exists; --overwrite"):
        check_destination(place)


def test_a_destination_that_no_file_system_takes(place: Path) -> None:
    with pytest.raises(ExportError, match=r"could not be written: .*File name too long"):
        check_destination(place.parent / ("x" * 300))
    with pytest.raises(ExportError, match=r"could not be written: .*File name too long"):
        write_bundle(place.parent / ("x" * 250), FILES, draft())
    assert os.listdir(place.parent) == []


def test_a_parent_that_is_a_file(place: Path) -> None:
    place.write_text("a file")
    with pytest.raises(ExportError, match="could not be written"):
        write_bundle(place / "tiny", FILES, draft())


def test_a_bundle_that_could_not_be_read_again_is_not_written(place: Path) -> None:
    with pytest.raises(ExportError) as caught:
        write_bundle(place, {"encoder.onnx": b"", "../outside": b"", "manifest.json": b""}, draft())
    assert str(caught.value).splitlines() == [
        "the bundle would be unusable:",
        "  '../outside': is not a plain file name; nothing outside the directory is read",
        "  manifest.json: cannot list itself",
        "  decoder.onnx: needed, and not among the bundle's files",
        "  sentencepiece.model: needed, and not among the bundle's files",
    ]
    assert os.listdir(place.parent) == []


def test_a_source_that_is_missing_is_named(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"tiny could not be written: .*No such file.*/none'"):
        write_bundle(place, {**FILES, "decoder.onnx": tmp_path / "none"}, draft())
    assert os.listdir(place.parent) == []


def failing_fsync(call: int, error: BaseException) -> Callable[[int], None]:
    """An ``fsync`` that raises at its ``call``-th call; nothing else of the file system is faked."""
    calls: Iterator[int] = iter(range(1, 100))

    def fsync(descriptor: int) -> None:
        if next(calls) == call:
            raise error

    return fsync


# Three files, the manifest, the hidden directory.
@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_nothing_behind(place: Path, monkeypatch: pytest.MonkeyPatch, call: int, overwrite: bool) -> None:
    before = write_bundle(place, FILES, draft()) if overwrite else None
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", failing_fsync(call, full))
    with pytest.raises(ExportError, match=r"tiny could not be written: .*No space left on device"):
        write_bundle(place, NEW_FILES, draft(), overwrite=overwrite)
    assert os.listdir(place.parent) == (["tiny"] if overwrite else [])
    assert before is None or read_bundle(place) == before


def test_an_interrupt_leaves_nothing_behind(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing_fsync(2, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_bundle(place, FILES, draft())
    assert os.listdir(place.parent) == []


def test_a_directory_that_cannot_be_synced_is_no_fault(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing_fsync(5, OSError(errno.EINVAL, os.strerror(errno.EINVAL))))
    write_bundle(place, FILES, draft())
    assert read_bundle(place).manifest.name == "tiny"


def test_the_old_bundle_comes_back_when_the_new_one_cannot_be_moved(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_bundle(place, FILES, draft())
    real_rename = os.rename

    def rename(source: Path, target: Path) -> None:
        if ".partial-" in source.name:
            assert os.listdir(target.parent) != []
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real_rename(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(ExportError, match=r"could not be written: .*Input/output error"):
        write_bundle(place, NEW_FILES, draft(), overwrite=True)
    assert read_bundle(place) == before
    assert os.listdir(place.parent) == ["tiny"]


def test_a_bundle_that_came_in_the_meantime_is_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", real_fsync)
        write_bundle(place, FILES, draft("first"))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ExportError, match=r"could not be written: .*Directory not empty"):
        write_bundle(place, NEW_FILES, draft("second"))
    assert read_bundle(place).manifest.name == "first"
    assert os.listdir(place.parent) == ["tiny"]


EXPORT_THAT_STOPS_HALFWAY = """
import sys
from pathlib import Path
from export.writer import write_bundle
from tests.export.test_writer import FILES, draft

class Files(dict):
    def items(self):
        items = list(super().items())
        yield from items[:2]
        print("halfway", flush=True)
        sys.stdin.read()
        yield from items[2:]

write_bundle(Path(sys.argv[1]), Files(FILES), draft("halfway"), overwrite=True)
"""


@pytest.fixture
def halfway(place: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, in the middle of writing a bundle to ``place``."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", EXPORT_THAT_STOPS_HALFWAY, str(place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "halfway\n"
        yield process
        process.kill()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    assert process.wait() == -signal.SIGKILL


def test_a_killed_export_leaves_no_bundle_and_is_cleared_up_by_the_next(place: Path, halfway: subprocess.Popen[str]) -> None:
    kill(halfway)
    (leftover,) = os.listdir(place.parent)
    assert leftover.startswith(".tiny.partial-")
    assert sorted(os.listdir(place.parent / leftover)) == ["decoder.onnx", "encoder.onnx"]
    write_bundle(place, FILES, draft())
    assert os.listdir(place.parent) == ["tiny"]


def test_an_export_that_is_alive_is_not_taken_for_a_leftover(place: Path, halfway: subprocess.Popen[str]) -> None:
    write_bundle(place, FILES, draft("quicker"))
    assert read_bundle(place).manifest.name == "quicker"
    halfway.communicate()  # its standard input ends, and it goes on
    assert halfway.returncode == 0
    assert read_bundle(place).manifest.name == "halfway"
    assert os.listdir(place.parent) == ["tiny"]


def test_leftovers_of_other_bundles_are_not_touched(place: Path) -> None:
    other = place.parent / ".tiny-int8.partial-00000000"
    other.mkdir()
    write_bundle(place, FILES, draft())
    assert other.is_dir()


def test_a_bundle_that_a_killed_export_moved_aside_is_put_back(place: Path) -> None:
    before = write_bundle(place, FILES, draft())
    os.rename(place, place.parent / ".tiny.replaced-00000000")
    with pytest.raises(ExportError, match="exists; --overwrite replaces it"):
        write_bundle(place, NEW_FILES, draft())
    assert read_bundle(place) == before
    assert os.listdir(place.parent) == ["tiny"]


def test_an_old_bundle_that_a_killed_export_did_not_remove_is_removed(place: Path) -> None:
    write_bundle(place, FILES, draft("new"))
    write_bundle(place.parent / ".tiny.replaced-00000000", FILES, draft("old"))
    after = write_bundle(place, NEW_FILES, draft("newer"), overwrite=True)
    assert read_bundle(place) == after
    assert os.listdir(place.parent) == ["tiny"]


def test_half_of_an_old_bundle_is_not_put_back(place: Path) -> None:
    aside = place.parent / ".tiny.replaced-00000000"
    write_bundle(aside, FILES, draft("old"))
    (aside / "encoder.onnx").unlink()
    after = write_bundle(place, FILES, draft("new"))
    assert read_bundle(place) == after
    assert os.listdir(place.parent) == ["tiny"]
