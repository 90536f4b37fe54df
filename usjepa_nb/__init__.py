"""What the notebooks import: CAMUS in, V-JEPA with a localisation loss, segmentation probes, figures.

Import this package before timm, MONAI or anything else that imports torchvision: :mod:`._torchvision` says why.
"""

from . import _torchvision

__version__ = "0.1.0"

_torchvision.watch()
