from __future__ import annotations

import struct
from pathlib import Path

import pytest

from export.checkpoint import read_checkpoint
from serving.errors import CheckpointError


def write(path: Path) -> Path:
    """The beginning of a binary model: version, number of tensors, and of the first its lengths and type."""
    path.write_bytes(struct.pack("<6Q", 1, 200, 5, 0x0404, 2, 1024) + b"Wemb\0")
    return path


@pytest.mark.parametrize("name", ["model.enzh.intgemm.alphas.bin", "model.bin"])
@pytest.mark.parametrize("as_directory", [True, False])
def test_is_refused_with_advice(tmp_path: Path, name: str, as_directory: bool) -> None:
    path = write(tmp_path / name)
    (tmp_path / "vocab.enzh.spm").write_bytes(b"")
    (tmp_path / "lex.50.50.enzh.s2t.bin").write_bytes(b"\xbf\x0b\x5b\xc0" * 8)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path if as_directory else path)
    (fault,) = caught.value.faults
    assert fault.startswith(f"{name}: is a model in Marian's binary form, as Bergamot's and Firefox's are")
    assert fault.endswith(f"marian-conv -f {name} -t model.npz writes one")


def test_beside_an_npz_it_is_that_which_is_read(tmp_path: Path) -> None:
    write(tmp_path / "model.bin")
    (tmp_path / "model.npz").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.npz: cannot be read"):
        read_checkpoint(tmp_path)
