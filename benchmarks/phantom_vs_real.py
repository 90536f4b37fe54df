"""How far is the phantom from the real thing? `python benchmarks/phantom_vs_real.py CAMUS_FOLDER OUT.png`

Measures ED and ES frames of both with the same code: grey levels inside the sector, speckle correlation
length by depth, sector and mask geometry. The figure and the table hold statistics only, no frame of either.
"""
import argparse
import tempfile

import matplotlib
import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from usjepa_nb import camus, phantom

DEPTHS = np.arange(20, 160, 20.0)  # mm
RADIAL, ANGULAR = 0.3, np.radians(0.1)


def half_width(rows):
    """Full width at half maximum, in samples, of the mean autocorrelation along the last axis."""
    power = np.abs(np.fft.rfft(rows - rows.mean(-1, keepdims=True), 2 * rows.shape[-1])) ** 2
    curve = np.fft.irfft(power.mean(0))[:rows.shape[-1]] / np.arange(rows.shape[-1], 0, -1)
    curve = curve / curve[0]
    k = int(np.argmax(curve < 0.5))
    return 2 * (k - 1 + (curve[k - 1] - 0.5) / (curve[k - 1] - curve[k]))


def measure(frame, mask, spacing):
    """One frame -> dict of numbers; the probe is taken to sit at the middle of the top row."""
    sy, sx = spacing
    z, x = np.indices(frame.shape)
    z, x = (z + 0.5) * sy, (x - (frame.shape[1] - 1) / 2) * sx
    seen, r, angle = frame > 0, np.hypot(x, z), np.arctan2(x, z)
    depth, half = r[seen].max(), np.percentile(np.abs(angle[seen & (r > 30)]), 99)
    out = {"depth (mm)": depth, "opening angle (deg)": 2 * np.degrees(half), "sector / image": seen.mean(),
           "grey, sector median": np.median(frame[seen]),
           "grey, 5th percentile": np.percentile(frame[seen], 5),
           "grey, 99th percentile": np.percentile(frame[seen], 99),
           "histogram": np.histogram(frame[seen], 64, (0, 256))[0] / seen.sum()}
    for label in (1, 2, 3):
        if (mask == label).any():
            out[f"area (cm2), {camus.LABELS[label]}"] = (mask == label).sum() * sy * sx / 100
            out[f"grey, {camus.LABELS[label]}"] = np.median(frame[mask == label])
    axial, lateral = [], []
    for near in DEPTHS:  # polar patches of 20 mm depth, the central half of the sector
        if near + 20 > depth:
            axial.append(np.nan)
            lateral.append(np.nan)
            continue
        rr, tt = np.ix_(np.arange(near, near + 20, RADIAL), np.arange(-half / 2, half / 2, ANGULAR))
        at = [rr * np.cos(tt) / sy - 0.5, rr * np.sin(tt) / sx + (frame.shape[1] - 1) / 2]
        patch = map_coordinates(frame.astype(np.float32), at, order=1)
        patch -= gaussian_filter(patch, (4 / RADIAL, 4 / (near + 10) / ANGULAR))  # anatomy out, speckle stays
        axial.append(half_width(patch.T) * RADIAL)
        lateral.append(half_width(patch) * ANGULAR * (near + 10))
    return out | {"axial": axial, "lateral": lateral}


def collect(root, limit):
    rows = []
    for entry in camus.scan(root)[:limit]:
        s = camus.read(entry)
        rows += [measure(s.frames[k], s.masks[k], s.spacing) for k in (s.ed, s.es)]
    return rows


def main(real_root, picture, patients, limit):
    real = collect(real_root, limit)
    with tempfile.TemporaryDirectory() as folder:
        made = collect(phantom.make(f"{folder}/phantom", patients, seed=0, spacing=0.308), None)
    sets = {"real": real, "phantom": made}
    scalars = [k for k in real[0] if k not in ("histogram", "axial", "lateral")]
    heads = "".join(f"{name:>13s} ({len(rows):3d})" for name, rows in sets.items())
    print(f"{'mean +- SD over ED and ES frames':34s}{heads}")
    for key in scalars:
        values = [[row[key] for row in rows if key in row] for rows in sets.values()]
        print(f"{key:34s}" + "".join(f"{np.mean(v):12.2f} +- {np.std(v):5.2f}" for v in values))
    for key in ("axial", "lateral"):
        for i, near in enumerate(DEPTHS):
            values = [[row[key][i] for row in rows] for rows in sets.values()]
            print(f"{f'speckle {key} (mm), {near:.0f}-{near + 20:.0f} mm':34s}"
                  + "".join(f"{np.nanmean(v):12.2f} +- {np.nanstd(v):5.2f}" for v in values))
    draw(sets).savefig(picture, dpi=110)


def draw(sets):
    """The figure: histograms, correlation lengths by depth, sector geometry."""
    from matplotlib import pyplot as plt
    fig, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for (name, rows), colour in zip(sets.items(), ("#0072B2", "#D55E00"), strict=True):
        curve = np.array([row["histogram"] for row in rows])
        grey = np.arange(64) * 4 + 2
        axes[0, 0].plot(grey, curve.mean(0), color=colour, label=f"{name} ({len(rows)} frames)")
        axes[0, 0].fill_between(grey, *np.percentile(curve, (10, 90), axis=0), color=colour, alpha=0.2)
        for ax, key in zip(axes[0, 1:], ("axial", "lateral"), strict=True):
            v = np.array([row[key] for row in rows])
            ax.errorbar(DEPTHS + 10, np.nanmean(v, 0), np.nanstd(v, 0), color=colour, capsize=3)
            ax.set(title=f"speckle correlation, {key}", xlabel="depth (mm)", ylabel="FWHM (mm)")
            ax.set_ylim(bottom=0)
        for ax, key in zip(axes[1], ("opening angle (deg)", "depth (mm)", "sector / image"), strict=True):
            ax.hist([row[key] for row in rows], 20, density=True, alpha=0.5, color=colour)
            ax.set(title=key)
    axes[0, 0].set(title="grey levels in the sector (10-90 %)", xlabel="grey level", ylabel="share of pixels")
    axes[0, 0].legend()
    return fig


if __name__ == "__main__":
    matplotlib.use("Agg")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("camus_folder")
    parser.add_argument("picture")
    parser.add_argument("--patients", type=int, default=12, help="phantom patients to make")
    parser.add_argument("--limit", type=int, default=50, help="real sequences to read")
    args = parser.parse_args()
    main(args.camus_folder, args.picture, args.patients, args.limit)
