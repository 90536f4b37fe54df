"""One function for many jobs, in several processes, from any script or notebook."""

import os
import threading
import time

from joblib import Parallel, cpu_count, delayed, parallel_config
from tqdm import tqdm


def cores(most=16) -> int:
    """Processor cores that this process may use, at most `most`."""
    return min(cpu_count(), most)


def run(function, jobs, workers, **bar) -> list:
    """What `function(*job)` returns for each job, in their order; `bar` are options of the progress bar.

    One worker, or one job, runs in this process. Otherwise joblib starts processes that do not import the
    calling script again (so it needs no `__main__` guard) and that compute with one thread each.

    Raises:
        BrokenProcessPool: a worker died (the class of concurrent.futures.process).
    """
    jobs = list(jobs)
    with parallel_config(backend="loky", inner_max_num_threads=1):
        pool = Parallel(min(workers, len(jobs)) or 1, return_as="generator",
                        initializer=_end_with, initargs=(os.getpid(),))
    return list(tqdm(pool(delayed(function)(*job) for job in jobs), total=len(jobs), **bar))


def _end_with(parent):
    """Ends this worker soon after its parent, which may be killed: it would wait for minutes for work."""
    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
