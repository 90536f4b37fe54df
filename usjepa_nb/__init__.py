"""What the notebooks import: CAMUS in, V-JEPA with a localisation loss, segmentation probes, figures.

Import this package before timm, MONAI or anything else that imports torchvision: :mod:`._torchvision` says why.
"""

import gc
import sys

from . import _torchvision

__version__ = "0.1.0"

_torchvision.watch()

# plotly loads nbformat, that jsonschema, and that builds a grammar of international web addresses (up to 5 s of a
# notebook's start) which nothing here is ever checked against. None: as if that package were not installed.
sys.modules.setdefault("rfc3987_syntax", None)

# Imports make half a million objects that stay. Python's default, a search for garbage after every 700 new objects,
# goes through them so often that it takes a sixth of the time of all imports. (It stays so; 0 means no search at all.)
if 0 < gc.get_threshold()[0] < 10_000:
    gc.set_threshold(10_000, *gc.get_threshold()[1:])
