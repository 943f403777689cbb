from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.served.processes import cpu_seconds, process_tree, usage

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def put(
    proc: Path, pid: int, children: str, *, name: str = "python", user_ticks: int = 0, system_ticks: int = 0, pss_kb: int = 0
) -> None:
    directory = proc / str(pid)
    (directory / "task" / str(pid)).mkdir(parents=True)
    (directory / "task" / str(pid) / "children").write_text(children)
    numbers = " ".join(["1"] * 10)
    (directory / "stat").write_text(f"{pid} ({name}) S {numbers} {user_ticks} {system_ticks} 7 8 9\n")
    (directory / "smaps_rollup").write_text(f"00400000-7fff ---p [rollup]\nRss: 99999 kB\nPss:  {pss_kb} kB\nPss_Anon: 5 kB\n")


def test_a_tree_is_counted_as_one(tmp_path: Path) -> None:
    put(tmp_path, 10, "11 12 ", user_ticks=TICKS_PER_S, system_ticks=TICKS_PER_S, pss_kb=100)
    put(tmp_path, 11, "13", user_ticks=2 * TICKS_PER_S, pss_kb=20, name="a) S (b")
    put(tmp_path, 12, "", pss_kb=3)
    # 13 ended before it could be looked at.
    assert list(process_tree(10, tmp_path)) == [10, 11, 13, 12]
    used = usage(10, tmp_path)
    assert used.cpu_s == pytest.approx(4.0)
    assert used.memory_bytes == 123 * 1024


def test_a_process_that_is_gone_uses_nothing(tmp_path: Path) -> None:
    used = usage(10, tmp_path)
    assert (used.cpu_s, used.memory_bytes) == (0.0, 0)


def test_this_process() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert {os.getpid(), child.pid} <= set(process_tree(os.getpid()))
        assert usage(os.getpid()).memory_bytes > 2**20
        assert cpu_seconds(Path("/proc/self")) == pytest.approx(sum(os.times()[:2]), abs=0.1)
    finally:
        child.communicate(b"\n")
