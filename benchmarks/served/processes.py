"""CPU time and memory of a process and all below it, from Linux's /proc."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Usage:
    """Of a tree of processes, now."""

    # User and system time since each process started; a tick is 10 ms.
    cpu_s: float
    # Resident memory; what several processes share counts once (proportional set size).
    memory_bytes: int


def process_tree(pid: int, proc: Path = _PROC) -> Iterator[int]:
    """A process and all its descendants that live."""
    yield pid
    try:
        tasks = list((proc / str(pid) / "task").iterdir())
    except FileNotFoundError:
        return
    for task in tasks:
        try:
            children = (task / "children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in children:
            yield from process_tree(int(child), proc)


def usage(pid: int, proc: Path = _PROC) -> Usage:
    """CPU time and memory of a process and its descendants; zero where it has ended."""
    cpu_s, memory_bytes = 0.0, 0
    for member in process_tree(pid, proc):
        try:
            cpu_s += cpu_seconds(proc / str(member))
            memory_bytes += _memory_bytes(proc / str(member))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return Usage(cpu_s, memory_bytes)


def cpu_seconds(directory: Path) -> float:
    """User and system time of the process or thread that a directory of /proc stands for."""
    # The name is in parentheses and may hold anything; the fields after it are counted from the third.
    fields = (directory / "stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _memory_bytes(directory: Path) -> int:
    for line in (directory / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
