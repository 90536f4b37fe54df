"""A CAMUS data set made from moving scatterers, so that everything runs without the real one.

Anatomy (a tube with an inner and an outer half-width) -> motion (one map for tissue and masks) -> scatterers
(random reflectors that ride on that map) -> beamforming (coherent sum on a polar grid, blurred by the point
spread function) -> display (shadows, clutter, log compression, scan conversion). Speckle is therefore never
painted: it is interference, and it moves with the tissue. Distances are in mm, levels in dB.
Heart frame: y along the long axis, 0 at the apex, `length` at the mitral plane; x < 0 on the image's left.
Image frame: X to the right, Z down, the probe at (0, 0).
"""
import multiprocessing
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.fft import fft, fftfreq, ifft
from scipy.ndimage import gaussian_filter, gaussian_filter1d, map_coordinates, zoom
from tqdm.auto import tqdm

VERSION = 1  # raise it whenever the same arguments would give other bits
VIEWS = ("2CH", "4CH")
Y = np.arange(-60.0, 260.0)  # tables over the long axis have one entry per mm
DR, BEAMS, PAD = 0.35, 160, 16  # polar grid: mm per sample, beams, spare beams against wrap-around of the FFT
WAVENUMBER = 4 * np.pi / 0.7  # two-way phase per mm at 2.2 MHz
PER_MM2 = 3.0  # scatterers per mm2: some ten in a resolution cell make fully developed speckle
QUALITY = {  # share of patients; clutter, noise, loss of the free wall (dB); mean number of rib shadows
    "Good": (0.43, -50, -51, 7, 0.5), "Medium": (0.43, -44, -47, 10, 1.0), "Poor": (0.14, -36, -42, 14, 1.6)}


def smooth_noise(rng, shape, size):
    """Random field [shape] of unit SD with structures of about `size` (y, x) samples."""
    coarse = rng.standard_normal([int(n / s) + 4 for n, s in zip(shape, size, strict=True)])
    field = zoom(coarse, [n / c for n, c in zip(shape, coarse.shape, strict=True)], order=2)
    return (field / field.std()).astype(np.float32)


def side_of(x, table, y, at=Y):
    """Entry of a table [side, y] for points (x, y)."""
    return np.where(x < 0, np.interp(y, at, table[0]), np.interp(y, at, table[1]))


# --- anatomy and motion -------------------------------------------------------------------------------------
def draw_patient(rng):
    """What both views of one patient share: sizes at end diastole (mm), strains at end systole."""
    ef = np.clip(rng.normal(0.57, 0.17), 0.08, 0.85)  # aimed at; the cfg states what the geometry has
    axial = np.clip(0.28 * ef + rng.normal(0, 0.015), 0.02, 0.25)
    dilated = 1 + 0.3 * max(0.0, 0.45 - ef)
    return dict(length=rng.normal(87, 9) * dilated, diameter=rng.normal(47.5, 6) * dilated,
                wall=np.clip(rng.normal(11.8, 1.9), 7, 17), atrium=rng.normal((45, 44), (11, 9)).clip(22, 72),
                axial=axial, radial=1 - np.sqrt((1 - ef) / (1 - axial)), sex="FM"[int(rng.random() < 0.66)],
                age=int(np.clip(rng.normal(65, 15), 19, 93)), spacing=rng.uniform(0.97, 1.03))


class Heart:
    """One heart in one view: a tube, ventricle above the mitral plane and atrium below, that contracts."""

    def __init__(self, rng, patient, view):
        self.view, self.axial = view, patient["axial"]
        short = rng.uniform(0.86, 1.0)  # foreshortening: the image plane misses the true apex
        self.length = length = patient["length"] * short
        radius = patient["diameter"] / 2 * rng.normal(1, 0.06) * (1.3 - 0.3 * short)
        wall, (a_length, a_width) = patient["wall"], patient["atrium"] * rng.normal(1, 0.1, 2)
        self.roof = length + a_length
        centre, power = rng.uniform(0.53, 0.66) * length, rng.uniform(1.8, 2.6)
        cavity, shell = (b * np.clip(1 - np.abs((Y - centre) / a) ** power, 0, 1) ** (1 / power) for a, b in
                         ((centre, radius), (centre + 0.65 * wall, radius + wall)))  # the apex is thinner
        s = np.clip((Y - length) / a_length, 0, 1)  # 0 at the mitral plane, 1 at the atrial roof
        annulus, base = np.interp(length, Y, cavity), np.interp(length, Y, shell - cavity)
        atrium = (annulus + (a_width / 2 - annulus) * np.sin(np.pi * s) ** 0.8) * np.sqrt(1 - s ** 4)
        waves = np.sin(2 * np.pi * (Y / rng.uniform(45, 90, (3, 1, 1)) + rng.random((3, 2, 1))))
        lean = rng.normal(0, 0.08) * np.array([[-1], [1]])
        uneven = 1 + lean + (rng.normal(0, 0.04, (3, 2, 1)) * waves).sum(0)
        self.inner = np.where(Y <= length, cavity, atrium) * uneven  # half-widths [side, y] at ED
        taper = base + (2.5 - base) * np.clip((Y - length) / 6, 0, 1)  # thick wall to thin atrial wall
        self.outer = self.inner + np.where(Y <= length, (shell - cavity) * uneven, taper * (s < 1))
        self.radial = patient["radial"] * rng.normal(1, 0.08, 2)  # the two walls differ a little
        t = np.clip(Y / length, 0, 1)  # the axis is bent, the atrium leans, the mitral plane is oblique
        self.centreline = rng.normal(0, 16) * t * (1 - t) + rng.normal(0, 0.25) * np.clip(Y - length, 0, None)
        self.oblique = rng.normal(0, 0.10)
        beside = np.sin(np.pi * np.clip((Y - length - 2) / (a_length * 1.1), 0, 1)) ** 0.6
        right = rng.uniform(20, 38) * np.clip(np.sin(2.4 * np.clip(t * 1.14 - 0.14, 0, 1)), 0, 1) ** 0.8
        right = right * (Y < length - 3) + rng.uniform(30, 45) * beside
        self.right = right * (view == "4CH")  # width [y] of the right ventricle and atrium

    def strain(self, c):
        """At contraction c (0 ED, 1 ES): where each mm of the axis goes [y], its stretch [y], squeeze [2, y].

        The base moves to the still apex, the atrial roof stays: the atrium fills as the ventricle empties.
        """
        fixed, moved = ([Y[0], 0, self.length * k, self.roof, Y[-1]] for k in (1, 1 - self.axial * c))
        y1 = np.interp(Y, fixed, moved)
        at = [0, 0.7 * self.length, self.length, 0.6 * self.length + 0.4 * self.roof]
        squeeze = 1 - c * np.stack([np.interp(Y, at, [g, g, 0.45 * g, -0.1]) for g in self.radial])
        return y1, gaussian_filter1d(np.gradient(y1), 3), squeeze

    def boundaries(self, c):
        """Moved y [y], cavity and epicardial half-widths [2, y]. The wall keeps its volume: it thickens."""
        y1, stretch, squeeze = self.strain(c)
        inner = self.inner * squeeze
        return y1, inner, np.sqrt(inner ** 2 + (self.outer ** 2 - self.inner ** 2) / stretch)

    def place(self, x, y, pose):
        """Heart frame -> image frame: bend, lean, turn, shift; none of them changes a volume."""
        x = x + np.interp(y, Y, self.centreline)
        y = y + self.oblique * x
        apex_x, apex_z, cos, sin = pose[0], pose[1], np.cos(pose[2]), np.sin(pose[2])
        return cos * x + sin * y + apex_x, -sin * x + cos * y + apex_z

    def locate(self, x, z, pose):
        """Image frame -> heart frame, the inverse of `place`."""
        x, z, cos, sin = x - pose[0], z - pose[1], np.cos(pose[2]), np.sin(pose[2])
        x, y = cos * x - sin * z, sin * x + cos * z
        y = y - self.oblique * x
        return x - np.interp(y, Y, self.centreline), y

    def labels(self, x, y, c):
        """CAMUS labels (uint8) of points in the heart frame at contraction c."""
        y1, inner, outer = self.boundaries(c)
        ventricle = y <= self.length * (1 - self.axial * c)
        label = np.where((np.abs(x) < side_of(x, outer, y, y1)) & ventricle, 2, 0)
        label = np.where(np.abs(x) < side_of(x, inner, y, y1), np.where(ventricle, 1, 3), label)
        return label.astype(np.uint8)


def ejection_fraction(hearts):
    """EF (%) of the geometry, not of pixels: biplane disks, V = pi/4 * integral of d_2CH * d_4CH dy."""
    volume = []
    for c in (0, 1):
        lengths = [h.length * (1 - h.axial * c) for h in hearts]
        tables = [h.boundaries(c) for h in hearts]
        d = [np.interp(np.linspace(0, lengths[i], 400), tables[i][0], tables[i][1].sum(0)) for i in (0, 1)]
        volume.append(np.mean(d[0] * d[1]) * max(lengths))
    return 100 * (1 - volume[1] / volume[0])


def draw_pose(rng, heart):
    """Sector (depth, half opening angle) and pose (apex X, apex Z, tilt): most of the ventricle in view."""
    for _ in range(200):
        half = np.radians(rng.normal(37.3, 0.8) if rng.random() < 0.7 else rng.uniform(33, 45))
        pose = np.array([rng.normal(0, 9), rng.uniform(10, 44), np.radians(rng.normal(14, 12))])
        rim, side = (t.ravel() for t in np.meshgrid(np.arange(0, heart.length, 4.0), (-1, 1)))
        x, z = heart.place(side * side_of(side, heart.outer, rim), rim, pose)
        depth = np.clip(z.max() + rng.uniform(0.3, 1.9) * (heart.roof - heart.length), 105, 200)
        if np.mean(np.abs(np.arctan2(x, z)) > half) < rng.uniform(0, 0.25):
            break
    return (depth, half), pose


# --- scatterers ---------------------------------------------------------------------------------------------
def echo_levels(rng, heart, x, y, dropout):
    """Echo level (dB) of every point at ED, and whether it is flowing blood."""
    coarse, fine = (map_coordinates(smooth_noise(rng, (330, 300), (s, s)), [(y + 60) % 329, (x + 150) % 299],
                                    order=1) for s in (14, 5))
    texture = 3.5 * coarse + 2.5 * fine
    length, n, inner, outer = heart.length, np.abs(x), side_of(x, heart.inner, y), side_of(x, heart.outer, y)
    d, ventricle, right = n - outer, y <= length, np.interp(y, Y, heart.right) * (x < 0)
    level = -31 + 1.9 * texture - np.clip((d - 5) * 0.15, 0, 8)  # whatever lies around the heart
    # The far pericardium mirrors; the near one only where no right ventricle lies in between.
    level[(y > heart.roof + 1) & (y < heart.roof + 10 + 4 * coarse)] += 22
    near = (d < 3 + 1.5 * coarse) & ventricle & (right == 0)
    level[near] += 14
    # The septum is bright; the free wall runs along the beam and drops out, most of all half-way down.
    free = np.where(x < 0, rng.normal(-5, 3), rng.uniform(0.3, 1.2) * dropout)
    patch = np.interp(y, Y[::20], rng.normal(0, 2.5, len(Y[::20])))
    wall = -27 - np.where(ventricle, free * np.sin(np.pi * np.clip(y / length, 0, 1)) + patch, -3) + texture
    level = np.where(d < 0, wall, level)
    level[(np.abs(y - length) < 3.5) & (np.abs(n - (inner + outer) / 2) < 4)] += 12  # fibrous annulus
    level[(d > right) & (d < right + 4) & (right > 4)] += 5
    along, across = 8 * (y / length - rng.uniform(0.4, 0.6)), (n - 0.72 * inner) / rng.uniform(3, 5)
    papillary = (x > 0) & (along ** 2 + across ** 2 < 1 + 0.4 * fine)
    trabeculae = (n > inner - 2 - 1.5 * fine) & (y < 0.6 * length)
    rough = (papillary | trabeculae) & ventricle
    blood = (n < inner) & ~rough | (d > 0) & (d < right)
    tent = length - 7 * (1 - n / np.maximum(inner, 1))  # mitral valve: shut all systole, domed
    valve = (n < inner) & (np.abs(y - tent) < 1.2)
    level = np.where((n < inner) & rough, -37 + texture, level)
    return np.where(valve, -27 + texture, np.where(blood, -58, level)), blood & ~valve


class Tissue:
    """Scatterers sown evenly over the sector at ED and carried by the heart's motion ever after."""

    def __init__(self, rng, heart, sector, pose, dropout):
        count = int(PER_MM2 * sector[1] * sector[0] ** 2 * 1.2)
        r, th = 1.06 * sector[0] * np.sqrt(rng.random(count)), 1.06 * sector[1] * rng.uniform(-1, 1, count)
        x, y = heart.locate(r * np.sin(th), r * np.cos(th), pose)
        level, self.blood = echo_levels(rng, heart, x, y, dropout)
        self.rng, self.heart, self.y, self.sign = rng, heart, y, np.sign(x)
        inner, outer = (side_of(x, t, y) ** 2 for t in (heart.inner, heart.outer))
        self.cavity, self.wall = np.minimum(x * x, inner), np.clip(x * x - inner, 0, outer - inner)
        self.outside = np.maximum(x * x - outer, 0)  # x^2 split in three: each part has its own stretch
        self.amplitude = (10 ** (level / 20)).astype(np.float32)
        self.weight = self.amplitude * rng.standard_normal(count, np.float32)

    def move(self, c):
        """Positions in the heart frame at contraction c: y along the axis, x^2 as the volume of a disk."""
        y1, stretch, squeeze = self.heart.strain(c)
        s = side_of(self.sign, squeeze, self.y) ** 2
        x2 = self.cavity * s + self.wall / np.interp(self.y, Y, stretch) + self.outside
        return self.sign * np.sqrt(x2), np.interp(self.y, Y, y1)

    def renew(self):
        """Blood flows on, and some tissue leaves the image plane: both get new reflectors."""
        new = self.blood | (self.rng.random(len(self.blood), np.float32) < 0.04)
        self.weight[new] = self.amplitude[new] * self.rng.standard_normal(int(new.sum()), np.float32)


# --- image formation ----------------------------------------------------------------------------------------
def beamform(x, z, weight, half, samples):
    """Coherent sum of scatterers [n] on the polar grid -> complex [samples, beams and spare beams].

    Position is rounded to a cell but phase is exact: a fraction of a wavelength changes the speckle.
    """
    r, beam = np.hypot(x, z), (np.arctan2(x, z) + half) * (BEAMS / (2 * half))
    i, j = np.rint(r / DR).astype(int), np.floor(beam).astype(int) + PAD
    ok = (i < samples) & (j >= 0) & (j < BEAMS + 2 * PAD)
    cell, phase, w = i[ok] * (BEAMS + 2 * PAD) + j[ok], WAVENUMBER * r[ok], weight[ok]
    real, imag = (np.bincount(cell, w * f(phase), samples * (BEAMS + 2 * PAD)) for f in (np.cos, np.sin))
    return (real + 1j * imag).astype(np.complex64).reshape(samples, -1)


class Scanner:
    """One acquisition: point spread function, gain, clutter, and the way from polar grid to screen."""

    def __init__(self, rng, sector, spacing, quality):
        _, clutter, noise, _, shadows = QUALITY[quality]
        self.rng, (depth, half) = rng, sector
        r = (np.arange(int(depth / DR) + 1) * DR)[:, None]
        shape, across = (len(r), BEAMS), np.linspace(-1, 1, BEAMS)[None]
        step = 2 * half / BEAMS
        focus = rng.uniform(55, 95)
        width = np.radians(0.62 + 0.5 * np.abs(r / focus - 1)) / step  # lateral SD in beams
        self.half, self.along = half, 0.42 / DR  # axial SD in samples
        per_cell = PER_MM2 * np.maximum(r, 3) * step * DR
        unit = np.sqrt(4 * np.pi * self.along * width / per_cell)  # one scatterer level = one echo level
        omega = 2 * np.pi * fftfreq(BEAMS + 2 * PAD)
        self.blur = (unit * np.exp(-0.5 * (width * omega) ** 2)).astype(np.float32)
        gain = rng.normal(0, 4.5) - rng.uniform(-4, 8) * (r / depth - 0.4)
        gain = gain + 2.5 * smooth_noise(rng, shape, (120, 40))
        for _ in range(rng.poisson(shadows)):
            where = rng.choice([-1, 1]) * rng.uniform(0.5, 1.0)
            gain = gain - rng.uniform(5, 20) * np.exp(-((across - where) / rng.uniform(0.06, 0.2)) ** 2)
        self.gain = (10 ** (gain / 20)).astype(np.float32)
        haze = clutter + rng.normal(0, 2) - 0.03 * np.maximum(r - 30, 0) + 3 * smooth_noise(rng, shape, (70, 30))
        # logaddexp is the soft maximum of two levels. First the probe's own near field, then echoes of the skin.
        haze = np.logaddexp(haze / 4, (rng.normal(-33, 6) - r * rng.uniform(0.5, 1.0)) / 4) * 4
        for k in range(1, 4):
            haze = np.logaddexp(haze / 4, (-31 - 4 * k - ((r - k * rng.uniform(5, 9)) / 0.7) ** 2) / 4) * 4
        self.haze = np.pad(10 ** (haze / 20), ((0, 0), (PAD, PAD)), "edge") * np.sqrt(per_cell / 2)
        self.haze = self.haze.astype(np.float32)
        self.noise = (10 ** ((noise + 8 * (r / depth) ** 2) / 20)).astype(np.float32)
        self.range, self.old, self.clutter = rng.uniform(50, 58), None, self.white(self.haze.shape)
        w, h = round(2 * depth * np.sin(half) / spacing), round(depth / spacing)
        self.x, self.z = np.meshgrid((np.arange(w) - (w - 1) / 2) * spacing, (np.arange(h) + 0.5) * spacing)
        radius, angle = np.hypot(self.x, self.z), np.arctan2(self.x, self.z)
        self.seen = (radius <= depth) & (np.abs(angle) <= half)
        self.polar = np.stack([radius / DR, (angle + half) / step - 0.5])[:, self.seen]

    def white(self, shape):
        """Complex white noise of power 2."""
        return self.rng.standard_normal((*shape, 2), np.float32).view(np.complex64)[..., 0]

    def image(self, x, z, weight):
        """One B-mode frame, uint8 [H, W], of scatterers at (x, z)."""
        self.clutter = 0.95 * self.clutter + 0.31 * self.white(self.clutter.shape)  # clutter hardly moves
        iq = beamform(x, z, weight, self.half, len(self.blur)) + self.clutter * self.haze
        iq = ifft(fft(iq, axis=1) * self.blur, axis=1)[:, PAD:-PAD]
        iq = gaussian_filter1d(iq, self.along, axis=0, truncate=3)
        envelope = np.abs(iq * self.gain + self.noise * self.white(iq.shape))
        self.old = envelope if self.old is None else 0.75 * envelope + 0.25 * self.old  # persistence
        level = gaussian_filter(20 * np.log10(self.old + 1e-6), (0.5, 0.5), truncate=2)
        grey = np.clip(255 * (1 + level / self.range), 0, 255)
        frame = np.zeros(self.seen.shape, np.uint8)
        frame[self.seen] = map_coordinates(grey, self.polar, order=1, mode="nearest") + 0.5
        return frame


def draw_acquisition(rng):
    """Quality, frames/s, number of frames (systole lasts about 0.36 s), stored ES to ED (a few are) or not."""
    quality = str(rng.choice(list(QUALITY), p=[q[0] for q in QUALITY.values()]))
    rate = round(float(np.clip(rng.normal(52, 9), 33, 86)), 1)
    frames = int(np.clip(np.rint(rate * rng.normal(0.36, 0.07)), 10, 42))
    return dict(quality=quality, frame_rate=rate, frames=frames, reverse=bool(rng.random() < 0.04))


def render(seed, number, view, quality=None, spacing=0.6, frames=None):
    """One half beat, ED to ES, of patient `number` -> dict: frames and masks uint8 [T, H, W], and facts."""
    patient = draw_patient(np.random.default_rng([seed, number]))
    hearts = {v: Heart(np.random.default_rng([seed, number, i]), patient, v) for i, v in enumerate(VIEWS)}
    rng, heart = np.random.default_rng([seed, number, 2 + VIEWS.index(view)]), hearts[view]
    facts, spacing = draw_acquisition(rng), round(spacing * patient["spacing"], 3)
    facts |= {k: v for k, v in (("quality", quality), ("frames", frames)) if v is not None}
    sector, pose = draw_pose(rng, heart)
    sway = rng.normal(0, (1, 0.8, 0.02))  # breathing and hand
    scanner = Scanner(rng, sector, spacing, facts["quality"])
    tissue = Tissue(rng, heart, sector, pose, QUALITY[facts["quality"]][3])
    video, masks = [], []
    for u in np.linspace(0, 1, facts["frames"]):
        c, now = np.sin(np.pi / 2 * u) ** 1.6, pose + sway * np.sin(np.pi / 2 * u)
        video.append(scanner.image(*heart.place(*tissue.move(c), now), tissue.weight))
        masks.append(heart.labels(*heart.locate(scanner.x, scanner.z, now), c))
        tissue.renew()
    return facts | dict(frames=np.stack(video), masks=np.stack(masks), spacing=spacing, sex=patient["sex"],
                        age=patient["age"], ef=ejection_fraction([hearts[v] for v in VIEWS]))


# --- files --------------------------------------------------------------------------------------------------
def save_nifti(path, volume, spacing):
    """uint8 [T, H, W] or [H, W] -> NIfTI as CAMUS has it: float32, (W, H[, T]), affine diag(-s, -s, 1)."""
    image = nib.Nifti1Image(np.asfortranarray(volume.T, np.float32), None)
    image.header.set_zooms((spacing, spacing, 1.0)[:volume.ndim])
    image.header.set_xyzt_units("mm")
    image.set_sform(np.diag([-spacing, -spacing, 1, 1]), code=1)
    image.set_qform(np.diag([-spacing, -spacing, 1, 1]), code=1)
    nib.save(image, path)


def write_patient(number, root, seed, spacing):
    """Write both views of one patient; the folder gets its name only when it is whole."""
    name = f"patient{number:04d}"
    final = root / "database_nifti" / name
    try:
        with tempfile.TemporaryDirectory(dir=root / ".partial") as scratch:
            folder = Path(scratch) / name
            folder.mkdir()
            for view in VIEWS:
                write_view(folder, f"{name}_{view}", view, render(seed, number, view, spacing=spacing))
            os.rename(folder, final)
    except OSError:
        if not final.is_dir():  # else another process was faster; its bits are the same
            raise


def write_view(folder, stem, view, d):
    """The six images and the cfg of one view, as CAMUS names and orders them."""
    for suffix, images in (("", d["frames"]), ("_gt", d["masks"])):
        stored = images[::-1] if d["reverse"] else images
        for part, volume in (("half_sequence", stored), ("ED", images[0]), ("ES", images[-1])):
            save_nifti(folder / f"{stem}_{part}{suffix}.nii.gz", volume, d["spacing"])
    total = len(d["frames"])
    ed, es = (total, 1) if d["reverse"] else (1, total)
    facts = {"ED": ed, "ES": es, "NbFrame": total, "Sex": d["sex"], "Age": d["age"],
             "ImageQuality": d["quality"], "EF": round(d["ef"]), "FrameRate": d["frame_rate"]}
    (folder / f"Info_{view}.cfg").write_text("\n".join(f"{key}: {value}" for key, value in facts.items()))


def write_text(path, text):
    """Write all of a file or nothing of it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text)
    os.replace(scratch, path)


def claim(root, **facts):
    """Mark `root` as this phantom, or refuse it: one folder never holds two data sets."""
    marker, text = root / "phantom.cfg", "".join(f"{key}: {value}\n" for key, value in facts.items())
    if marker.exists():
        there = dict(line.split(": ", 1) for line in marker.read_text().splitlines() if ": " in line)
        changed = [f"{k} {there.get(k)}, not {v}" for k, v in facts.items() if there.get(k) != str(v)]
        if changed:
            raise ValueError(f"{root} holds another phantom ({'; '.join(changed)}): choose a new folder.")
    elif any((root / name).exists() for name in ("database_nifti", "database_split")):
        raise ValueError(f"{root} holds data that are not a phantom's (no phantom.cfg): choose a new folder.")
    (root / ".partial").mkdir(parents=True, exist_ok=True)
    write_text(marker, text)
    for name in ("database_nifti", "database_split"):
        (root / name).mkdir(exist_ok=True)


def split(patients, seed):
    """About 60 / 20 / 20 % of the patients, drawn at random -> dict of lists of names."""
    order = np.random.default_rng([seed, patients]).permutation(patients) + 1
    cuts = [round(0.2 * patients), 2 * round(0.2 * patients)]
    return {part: [f"patient{n:04d}" for n in sorted(numbers)] for part, numbers in
            zip(("testing", "validation", "training"), np.split(order, cuts), strict=True)}


def make(root, patients=60, seed=0, *, spacing=0.6, workers=2, progress=True):
    """Write a synthetic data set in the layout of the CAMUS NIfTI release; patients already there are kept.

    Args:
        root: Folder to hold database_nifti/ and database_split/; new, or made by the same call before.
        patients: How many; the same patient number looks the same in a larger set.
        seed: Chooses the whole data set, bit for bit, whatever `workers` is.
        spacing: Pixel size, mm (each patient differs from it by up to 3 %); CAMUS has 0.308.
        workers: Processes. Scripts that use more than one need the `if __name__ == "__main__"` guard.
        progress: Show a bar.

    Returns:
        root as a Path.

    Raises:
        ValueError: patients, spacing or workers out of range, or root holds something else.
    """
    root = Path(root)
    if patients < 1 or workers < 1 or not 0.1 <= spacing <= 2:
        raise ValueError(f"patients={patients} and workers={workers} start at 1, spacing={spacing} lies in 0.1-2.")
    claim(root, what="synthetic echocardiography in the layout of CAMUS, no patient data", version=VERSION,
          seed=seed, patients=patients, spacing=float(spacing))
    todo = [n for n in range(1, patients + 1) if not (root / f"database_nifti/patient{n:04d}").is_dir()]
    job = partial(write_patient, root=root, seed=seed, spacing=spacing)
    bar = partial(tqdm, total=len(todo), desc="phantom", unit="patient", disable=not progress)
    if min(workers, len(todo)) > 1:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            list(bar(pool.map(job, todo)))
    else:
        list(bar(map(job, todo)))
    for part, names in split(patients, seed).items():
        write_text(root / f"database_split/subgroup_{part}.txt", "\n".join(names))
    shutil.rmtree(root / ".partial", ignore_errors=True)  # what killed runs left behind
    return root


def sequence(seed, view, quality=None, *, spacing=0.6, frames=None):
    """The view "2CH" or "4CH" of data set `seed`'s first patient, in memory -> camus.Sequence, ED first."""
    from usjepa_nb.camus import Sequence
    if view not in VIEWS or quality not in (None, *QUALITY):
        raise ValueError(f"view={view!r} must be in {VIEWS}, quality={quality!r} in {tuple(QUALITY)} or None.")
    d = render(seed, 1, view, quality, spacing, frames)
    spacing, reverse = (d.pop("spacing"),) * 2, d.pop("reverse")
    return Sequence(**d | {"ef": float(round(d["ef"]))}, patient="patient0001", view=view, spacing=spacing, ed=0,
                    es=len(d["frames"]) - 1, ed_es_only=False, was_reversed=reverse, sha256="")
