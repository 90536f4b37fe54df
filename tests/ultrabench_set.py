"""A tiny synthetic data set as `ultrabench fatty_liver` 1.0.1 writes one: images, scan masks, three lists, version."""

import json

import numpy as np
from PIL import Image


def ultrabench_set(root, patients=20, images=3, size=(40, 60), seed=0):
    """Speckle in a fan; the label (fatty liver) makes it brighter. Patients are split 12 : 4 : 4."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size[0], :size[1]]
    fan = np.abs(x - size[1] / 2) < 6 + 0.6 * y
    (root / "images").mkdir(parents=True)
    (root / "masks" / "scan").mkdir(parents=True)
    rows = []
    for patient in range(1, patients + 1):
        label = patient % 2
        for i in range(images):
            name = f"{patient}_{i}.png"
            speckle = rng.rayleigh(40 + 40 * label, size).clip(5, 255) * fan
            Image.fromarray(speckle.astype(np.uint8)).save(root / "images" / name)
            Image.fromarray(fan.astype(np.uint8)).save(root / "masks" / "scan" / name)
            rows.append({"patient": patient, "image": f"images/{name}", "scan_mask": f"masks/scan/{name}",
                         "steatosis": 5 + 3 * patient if label else 2, "label": label,
                         "pathology": ("Normal", "NFLD")[label]})
    for part, first, last in (("train", 1, 12), ("validation", 13, 16), ("test", 17, 20)):
        own = [row for row in rows if first <= row["patient"] <= last]
        (root / f"{part}.json").write_text(json.dumps(own, indent=4))
    (root / "version.txt").write_text("UltraBench Version: 1.0.1\nCreated: Mon Jan  6 10:00:00 UTC 2025\n")
    return root
