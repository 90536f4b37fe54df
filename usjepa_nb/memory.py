"""Out of memory: one sentence that says which settings need less, instead of the allocator's page of numbers."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch

TRAINING = "lower batch, freeze more encoder blocks (freeze), or set precision to bf16-mixed in the profile"
FEATURES = "end what else is running on the GPU, or set accelerator to cpu in the profile"


class OutOfMemory(RuntimeError):
    """The device has too little memory; the message names the step and the remedy."""


@contextlib.contextmanager
def remedy(what: str, words: str) -> Iterator[None]:
    """While `what` is computed: turns the allocator's error, of GPU or CPU, into a sentence that ends in `words`.

    Raises:
        OutOfMemory: in place of `torch.OutOfMemoryError`, and of the RuntimeError of torch's CPU allocator.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        own = isinstance(e, torch.OutOfMemoryError | MemoryError)
        if not own and "can't allocate memory" not in str(e):
            raise
        wanted = re.search(r"allocate [\d.]+ \w+", str(e))
        raise OutOfMemory(f"{what}: not enough memory ({wanted[0] if wanted else type(e).__name__}): {words}") from e


def during(rows: Iterator, what: str, words: str) -> Iterator:
    """The same rows, such as the steps of `pretrain.train`, made under `remedy`."""
    with remedy(what, words):
        yield from rows
