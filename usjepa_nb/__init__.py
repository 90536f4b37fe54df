"""What the notebooks import: CAMUS in, V-JEPA with a localisation loss, segmentation probes, figures.

Import this package before timm, MONAI or anything else that imports torchvision: :mod:`._torchvision` says why.
"""

import sys

from . import _torchvision

__version__ = "0.1.0"

_torchvision.watch()

# plotly loads nbformat, that jsonschema, and that builds a grammar of international web addresses (up to 5 s of a
# notebook's start) which nothing here is ever checked against. None: as if that package were not installed.
sys.modules.setdefault("rfc3987_syntax", None)
