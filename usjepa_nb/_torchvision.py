"""Lets torchvision be imported beside a CPU build of torch.

timm imports torchvision. The torchvision that pip installs on Linux is built for CUDA: beside a torch without CUDA
its compiled extension cannot load, and because nobody has declared the operators of that extension, the import stops
with ``operator torchvision::nms does not exist``. We use none of these operators; to declare the two is enough.

Nothing happens until somebody imports torchvision, so ``import usjepa_nb`` stays cheap. Nothing is declared where the
extension loads (a GPU machine, macOS) or where torchvision is not installed.
"""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

_library = None  # torch forgets the declarations when this object dies


def declare_operators(folder: Path) -> bool:
    """Declare ``torchvision::nms`` and ``qnms`` where the extension in ``folder`` cannot load.

    Returns:
        True where the operators had to be declared.
    """
    global _library
    import torch

    for extension in folder.glob("_C*.so"):
        try:
            torch.ops.load_library(extension)
            return False
        except OSError:
            pass  # it wants CUDA libraries that are not here
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return True


class _BeforeTorchvision:
    """An import finder that finds nothing: it only notices the first import of torchvision."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(cls)
            spec = PathFinder.find_spec(name, path)
            if spec is not None and sys.platform != "win32":  # on Windows pip's torchvision is a CPU build
                declare_operators(Path(spec.origin).parent)
        return None  # the usual finders go on


def watch() -> None:
    """Make the first import of torchvision declare what is missing; does nothing once torchvision is imported."""
    if "torchvision" not in sys.modules and _BeforeTorchvision not in sys.meta_path:
        sys.meta_path.insert(0, _BeforeTorchvision)
