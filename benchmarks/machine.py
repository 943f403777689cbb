"""The machine and the packages, as a report describes them: what decides the figures, and nothing that names the machine."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from benchmarks.results import Machine

# Instruction sets that int8 and fp32 kernels are written for, by their names in /proc/cpuinfo.
_ISA = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)
_PACKAGES = (
    "onnxlate",
    "onnxruntime",
    "onnxruntime-gpu",
    "ctranslate2",
    "transformers",
    "torch",
    "numpy",
    "grpcio",
    "mosec",
    "sacrebleu",
)


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """What has become, since the machine started, of the time in which its CPUs had something to do; in the system's ticks."""

    worked: int
    # Given to other machines of the same host.
    stolen: int

    def stolen_since(self, before: CpuTimes) -> float:
        """The share that the host took since ``before``."""
        stolen = self.stolen - before.stolen
        wanted = self.worked - before.worked + stolen
        return stolen / wanted if wanted else 0.0


def read_cpu_times(stat: Path = Path("/proc/stat")) -> CpuTimes | None:
    """Of all CPUs together; None where the system does not tell."""
    try:
        first = stat.read_text().partition("\n")[0].split()
        user, nice, system, _idle, _waiting, interrupts, soft_interrupts, stolen = map(int, first[1:9])
    except (OSError, ValueError):
        return None
    return CpuTimes(user + nice + system + interrupts + soft_interrupts, stolen)


def describe_machine(cores: int, *, gpu: str | None = None, cpuinfo: Path = Path("/proc/cpuinfo")) -> Machine:
    """This machine, of which ``cores`` CPUs are used."""
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    have = set(flags[1].split()) if flags else set()
    return Machine(
        cpu=model[1].strip() if model else platform.machine(),
        cores=cores,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        isa=tuple(name for name in _ISA if name in have),
        system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        gpu=gpu,
    )


def describe_packages(names: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Package -> version, of those that are installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def describe_gpu() -> str | None:
    """The first CUDA device's name; None without one, or without torch."""
    try:
        import torch
    except ImportError:
        return None
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
