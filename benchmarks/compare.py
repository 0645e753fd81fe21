"""Time and memory of a whole `expunge compare`, and its result, as one record.

    python benchmarks/compare.py --out results/compare.json
    python benchmarks/compare.py --quick --out results/compare_quick.json
    python benchmarks/compare.py --plan PLAN.yaml --out results/compare_lab7m.json
    python benchmarks/compare.py --set seeds=3 --work runs/three --out runs/three.json

`--set` is passed on.

Times are those of an idle machine only if nothing else runs. Memory is what all processes of the
command hold at once, looked at every second, shared pages counted once (PSS; where the system does
not tell it, USS, without them). A comparison that was interrupted goes on; its record then says so,
since the time is that of the rest alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil

from expunge.files import write_json
from expunge.provenance import environment

MIB = 2**20


def held(process: psutil.Process) -> tuple[float, float]:
    """MiB that a process and all below it hold: together, and the largest of them (RSS)."""
    together, largest = 0.0, 0.0
    for one in [process, *process.children(recursive=True)]:
        try:
            found = one.memory_full_info()
        except psutil.Error:
            continue
        together += getattr(found, "pss", found.uss) / MIB
        largest = max(largest, found.rss / MIB)
    return together, largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/compare"))
    given = parser.parse_args()
    command = [sys.executable, "-m", "expunge", "compare", "-o", str(given.work), "--json"]
    command += ["--quick"] if given.quick else []
    command += [str(given.plan)] if given.plan else []
    command += [part for one in given.set for part in ("--set", one)]
    begun = (given.work / "comparison.json").exists() or any(given.work.glob("*/*/choice"))
    start = time.perf_counter()
    together, largest = 0.0, 0.0
    answer = given.out.with_suffix(".tmp")
    with answer.open("wb") as handle, subprocess.Popen(command, stdout=handle) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            now = held(watched)
            together, largest = max(together, now[0]), max(largest, now[1])
            time.sleep(1)
    seconds = time.perf_counter() - start
    raw = answer.read_text(encoding="utf-8")
    answer.unlink()
    if process.returncode:
        sys.exit(process.returncode)
    write_json(
        given.out,
        {
            "seconds": seconds,
            "went_on": begun,
            "memory_mib": {
                "together": together,
                "measure": "PSS" if sys.platform == "linux" else "USS",
                "largest_process": largest,
            },
            "comparison": json.loads(raw),
            "environment": environment(),
        },
    )
    print(f"{seconds:.0f} s, {together:.0f} MiB together, {largest:.0f} MiB the largest process")


if __name__ == "__main__":
    main()
