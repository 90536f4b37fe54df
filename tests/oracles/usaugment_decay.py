"""Writes usaugment_decay.npz beside this file: usaugment 1.0.1's depth attenuation of a small picture of amplitudes.

The package is needed here only: `python3.11 -m venv ENV`, `ENV/bin/pip install usaugment==1.0.1`, then
`NO_ALBUMENTATIONS_UPDATE=1 ENV/bin/python tests/oracles/usaugment_decay.py`.
"""

from pathlib import Path

import numpy as np
from usaugment.albumentations import DepthAttenuation

LOSS = 16  # dB at the deepest point: the lower corners, which lie sqrt(1.25) from the probe in usaugment's lengths

grey = np.random.default_rng(0).integers(120, 256, (17, 17)).astype(np.uint8)
rate = LOSS / 20 * np.log(10) / np.sqrt(1.25)
amplitude = 10 ** ((grey / 255 - 1) * 60 / 20)  # 60 dB between black and white
decayed = DepthAttenuation(rate, p=1).apply(amplitude, scan_mask=np.ones_like(grey))
np.savez_compressed(Path(__file__).with_suffix(".npz"), grey=grey, amplitude=decayed)
