"""The worker pool: results, errors, a worker's death, the parent's death."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest

from indexer.errors import CarError, WorkerDied
from indexer.pool import STOP_S, Pool


def _pid_plus(number: int) -> tuple[int, int]:
    return os.getpid(), number + 1


def _refuse() -> None:
    raise CarError("block 3 at byte 99 does not hash to its CID", reason="hash")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_once(marker: str) -> str:
    if not os.path.exists(marker):
        open(marker, "w").close()
        _die()
    return "survived"


@pytest.mark.parametrize("workers", [0, 2])
async def test_results_and_errors_come_back_whole(workers: int) -> None:
    pool = Pool(workers)
    pid, number = await pool.run(_pid_plus, 41)
    assert number == 42
    assert (pid == os.getpid()) == (workers == 0)
    with pytest.raises(CarError, match="block 3 at byte 99") as caught:
        await pool.run(_refuse)
    assert caught.value.reason == "hash"
    await pool.stop()


async def test_a_dead_worker_is_replaced_and_its_work_done_again(tmp_path: os.PathLike[str]) -> None:
    pool = Pool(1)
    assert await pool.run(_die_once, os.path.join(tmp_path, "died")) == "survived"
    assert pool.restarts == 1
    with pytest.raises(WorkerDied, match="_die"):
        await pool.run(_die)
    assert pool.problem == "its processes die under their work"
    assert (await pool.run(_pid_plus, 1))[1] == 2
    assert pool.problem == ""
    await pool.stop()
    assert pool.problem == "stopped"
    with pytest.raises(WorkerDied, match="stopped"):
        await pool.run(_pid_plus, 1)


def _sleep_and_return(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


async def test_a_death_beside_it_does_not_fail_innocent_work() -> None:
    pool = Pool(1)
    await pool.warm()
    results = await asyncio.gather(
        pool.run(_sleep_and_return, 0.3),
        pool.run(_die),
        *(pool.run(_pid_plus, number) for number in range(3)),
        return_exceptions=True,
    )
    assert results[0] == 0.3
    assert isinstance(results[1], WorkerDied)
    assert [result[1] for result in results[2:] if isinstance(result, tuple)] == [1, 2, 3]
    await pool.stop()


async def test_a_job_that_takes_too_long_ends_its_process() -> None:
    pool = Pool(1, 0.4)
    await pool.warm()
    late, prompt = await asyncio.gather(
        pool.run(_sleep_and_return, 60), pool.run(_pid_plus, 1), return_exceptions=True
    )
    assert isinstance(late, WorkerDied)
    assert str(late) == "a worker process took longer than 0.4 s for _sleep_and_return, twice"
    assert isinstance(prompt, tuple)
    assert prompt[1] == 2
    # A job's time begins with the job, and ends with it.
    assert await pool.run(_sleep_and_return, 0.25) == await pool.run(_sleep_and_return, 0.25)
    await pool.stop()


async def test_a_stop_does_not_wait_for_long_work() -> None:
    pool = Pool(1)
    await pool.warm()
    long_work = asyncio.create_task(pool.run(_sleep_and_return, 60))
    while not pool.pids():
        await asyncio.sleep(0)
    began = time.monotonic()
    await pool.stop()
    assert time.monotonic() - began < STOP_S + 3
    with pytest.raises(WorkerDied):
        await long_work


_PARENT = """
import asyncio
from indexer.pool import Pool

async def main():
    pool = Pool(1)
    await pool.warm()
    print(pool.pids()[0], flush=True)
    await asyncio.sleep(60)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_workers_end_when_their_parent_is_killed(tmp_path: os.PathLike[str]) -> None:
    script = os.path.join(tmp_path, "parent.py")
    with open(script, "w") as file:
        file.write(_PARENT)
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=env) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{worker}") and _running(worker):
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.02)


def _running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
