from __future__ import annotations
from compare_world import *
import time, pytest

def test_all(cli, world, tmp_path):
    plan = write_plan(tmp_path / "plan.yaml", tiny_settings(world))
    t = time.time()
    done = cli("compare", plan, "-o", tmp_path / "out", "--workers", 1)
    print(done.out); print(done.err[-3000:]); print(time.time() - t)
    assert done.code == 0
    done = cli("report", tmp_path / "out", "-o", tmp_path / "r.html")
    print(done.out, done.err)
    t = time.time()
    done = cli("compare", plan, "-o", tmp_path / "out", "--workers", 1, "--json")
    print(len(done.out)); print(done.err[-3000:]); print(time.time() - t)
    import os
    os.system(f"find {tmp_path}/out -type f | sort | sed 's#.*/out/##' | head -150")
