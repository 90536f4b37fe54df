"""A lab at profile smoke for the tests: its phantom is made once and shared by all modules and xdist workers."""

import os
from pathlib import Path

from usjepa_nb.runs import Lab


def shared_cache(tmp_path_factory) -> Path:
    """The folder that all tests of one pytest run share."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "data_cache"


def smoke_lab(tmp_path_factory, **changes) -> Lab:
    """The shared lab; whoever comes first makes phantom and HDF5 file (both under a lock)."""
    lab = Lab("smoke", cache=shared_cache(tmp_path_factory), **changes)
    assert len(lab.store) == 20
    return lab


def beside(lab: Lab, folder: Path, **options) -> Lab:
    """A lab on the same data with a cache of its own, empty but for a link to the HDF5 file."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / lab.hdf5.name).exists():
        (folder / lab.hdf5.name).symlink_to(lab.hdf5)
    return Lab("smoke", cache=folder, **options)
