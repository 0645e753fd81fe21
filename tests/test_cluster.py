"""Jobs on Ray: what comes back, what dies, what is missing. The cluster itself is a stand-in.

The last test starts a real one; it is skipped where Ray is not installed.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expunge import cluster
from expunge.cluster import RayPool
from expunge.errors import ResourceError
from expunge.jobs import Job, Workers
from expunge.progress import Silent
from expunge.recipe import Recipe
from expunge.records import RunRecord

RECIPE = Recipe.build({"model": "m", "forget": "f", "retain": "r"})


class RayError(Exception):
    """As Ray's."""


class RayTaskError(RayError):
    """As Ray's: what a task raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("a long tale")
        self.cause = cause


class FakeRay:
    """Does a task at once when it is asked for, unless it is to fail."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, error: Exception | None = None, *, hangs: bool = False) -> None:
        self.error, self.hangs = error, hangs
        self.calls: list[Any] = []

    def is_initialized(self) -> bool:
        return False

    def init(self, **settings: Any) -> None:
        self.calls.append(("init", settings))

    def remote(self, **settings: Any) -> Any:
        self.calls.append(("remote", settings))

        def decorate(task: Any) -> Any:
            def submit(folder: str, do: Any, job: Any) -> Any:
                future: Future[Any] = Future()
                if self.error is not None:
                    future.set_exception(self.error)
                elif not self.hangs:
                    future.set_result(task(folder, do, job))
                return SimpleNamespace(future=lambda: future)

            return SimpleNamespace(remote=submit)

        return decorate

    def cancel(self, reference: Any) -> None:
        self.calls.append(("cancel", reference))

    def wait(self, references: list[Any], **settings: Any) -> None:
        self.calls.append(("wait", len(references)))

    def shutdown(self) -> None:
        self.calls.append(("shutdown", None))


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(fake: FakeRay) -> FakeRay:
        monkeypatch.setitem(sys.modules, "ray", fake)
        return fake

    return install


def job(out: Path) -> Job:
    return Job(RECIPE, out)


def record(one: Job) -> RunRecord:
    return RunRecord("knowledge", one.out.name, 0, {}, 0, {})


def test_records_come_back_in_the_order_of_the_jobs(ray, monkeypatch, tmp_path) -> None:
    fake = ray(FakeRay())
    monkeypatch.setattr("expunge.jobs.try_job", record)
    with Workers(3, progress=Silent(), ray=True) as hands:
        found = hands.do([job(tmp_path / name) for name in "abc"])
    assert [one.objective for one in found] == ["a", "b", "c"]
    # One core each; a process that dies is told, not tried again.
    assert ("remote", {"num_cpus": 1, "max_retries": 0}) in fake.calls
    assert fake.calls[-1] == ("shutdown", None)


def test_a_job_is_done_where_the_paths_of_its_recipe_begin(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir("/")
    assert cluster._in_folder(str(tmp_path), lambda _job: Path.cwd(), None) == tmp_path


def test_a_worker_that_died(ray, tmp_path) -> None:
    ray(FakeRay(RayError("the worker  died\nunexpectedly")))
    with (
        pytest.raises(ResourceError, match="was killed") as caught,
        Workers(2, progress=Silent(), ray=True) as hands,
    ):
        hands.do([job(tmp_path / "a")])
    assert caught.value.got == "the worker died unexpectedly"
    assert "same command goes on" in caught.value.fix


def test_an_error_in_a_task_is_that_error(ray, tmp_path) -> None:
    ray(FakeRay(RayTaskError(FileNotFoundError("no such folder"))))
    with (
        pytest.raises(FileNotFoundError, match="no such folder"),
        Workers(2, progress=Silent(), ray=True) as hands,
    ):
        hands.do([job(tmp_path / "a")])


def test_what_is_under_way_is_stopped_and_waited_for(ray) -> None:
    fake = ray(FakeRay(hangs=True))
    pool = RayPool()
    pool.submit(print, 1)
    pool.submit(print, 2)
    pool.shutdown()
    assert [name for name, _ in fake.calls[-4:]] == ["cancel", "cancel", "wait", "shutdown"]


def test_without_ray(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ResourceError, match="Ray is not installed") as caught:
        Workers(2, progress=Silent(), ray=True).__enter__()
    assert "expunge[ray]" in caught.value.fix


@pytest.mark.parametrize(
    "error", [ConnectionError("no one there"), RuntimeError("Version mismatch")]
)
def test_a_cluster_that_cannot_be_reached(ray, monkeypatch, error) -> None:
    fake = ray(FakeRay())

    def refuse(**_settings: Any) -> None:
        raise error

    monkeypatch.setattr(fake, "init", refuse)
    with pytest.raises(ResourceError, match="cannot be reached") as caught:
        RayPool()
    assert caught.value.got == str(error)
    assert "RAY_ADDRESS" in caught.value.allowed


def _die(_job: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _double(number: int) -> int:
    return 2 * number


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None or "EXPUNGE_TEST_RAY" not in os.environ,
    reason="starts a cluster: needs the extra ray, and EXPUNGE_TEST_RAY=1",
)
def test_a_real_cluster(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    pool = RayPool()
    try:
        futures = [pool.submit(_double, number) for number in range(3)]
        assert [future.result(timeout=60) for future in futures] == [0, 2, 4]
        with pytest.raises(Exception, match="worker"):
            pool.submit(_die, None).result(timeout=60)
    finally:
        pool.shutdown()
