"""Jobs in several processes: all results, in order, one thread each, and one clear end when a worker dies."""
import os
from concurrent.futures.process import BrokenProcessPool

import pytest

from usjepa_nb import parallel


def job(number, power):
    return number ** power, os.getpid()


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_jobs(workers):
    results = parallel.run(job, ((n, 2) for n in range(20)), workers, disable=True)
    assert [value for value, _ in results] == [n ** 2 for n in range(20)]


def test_one_worker_and_one_job_stay_in_this_process():
    assert parallel.run(job, [(2, 3), (3, 3)], 1, disable=True) == [(8, os.getpid()), (27, os.getpid())]
    assert parallel.run(job, [(2, 3)], 2, disable=True) == [(8, os.getpid())]
    assert parallel.run(job, [], 2, disable=True) == []


def test_workers_compute_with_one_thread_each(monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")

    def threads(_):
        return os.getpid(), os.environ["OPENBLAS_NUM_THREADS"]

    for pid, number in parallel.run(threads, [(0,), (1,)], 2, disable=True):
        assert pid != os.getpid() and number == "1"


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_job_is_raised(workers):
    with pytest.raises(ZeroDivisionError):
        parallel.run(job, [(1, 1), (0, -1)], workers, disable=True)


def test_a_dead_worker_is_an_error_and_the_next_run_works():
    with pytest.raises(BrokenProcessPool):
        parallel.run(lambda n: os._exit(n), [(9,), (9,)], 2, disable=True)
    assert [value for value, _ in parallel.run(job, [(2, 2), (3, 2)], 2, disable=True)] == [4, 9]
