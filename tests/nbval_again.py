"""A plugin for nbval (`make test-notebooks`): a kernel that does not answer is started again, twice.

Two kernels that start at the same moment may have been given the same free port; one of them then never answers.
"""

import nbval.kernel

start = nbval.kernel.start_new_kernel


def start_again(startup_timeout=60, **options):
    """What nbval calls, with three tries."""
    for seconds in (20, 30):
        try:
            return start(startup_timeout=seconds, **options)
        except RuntimeError as error:
            print(f"{error}; starting it again")
    return start(startup_timeout=startup_timeout, **options)


nbval.kernel.start_new_kernel = start_again
