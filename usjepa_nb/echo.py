"""Ultrasound of a moving heart, by interference: speckle is never painted, it moves with the tissue.

Scatterers (random reflectors that ride on the heart's motion) -> beamforming (coherent sum on a polar grid,
blurred by the point spread function) -> display (shadows, clutter, log compression, scan conversion).
Distances are in mm, levels in dB; frames of reference are those of `anatomy`.
"""
import numpy as np
from scipy.fft import fft, fftfreq, ifft
from scipy.ndimage import gaussian_filter, gaussian_filter1d, map_coordinates, zoom

from usjepa_nb.anatomy import VIEWS, Heart, Y, draw_patient, draw_pose, ejection_fraction, side_of

DR, BEAMS, PAD = 0.35, 160, 16  # polar grid: mm per sample, beams, spare beams against wrap-around of the FFT
WAVENUMBER = 4 * np.pi / 0.7  # two-way phase per mm at 2.2 MHz
PER_MM2 = 3.0  # scatterers per mm2: some ten in a resolution cell make fully developed speckle
QUALITY = {  # share of patients; clutter, noise, loss of the free wall (dB); mean number of rib shadows
    "Good": (0.43, -50, -51, 7, 0.5), "Medium": (0.43, -44, -47, 10, 1.0), "Poor": (0.14, -36, -42, 14, 1.6)}


# --- scatterers ---------------------------------------------------------------------------------------------
def smooth_noise(rng, shape, size):
    """Random field [shape] of unit SD with structures of about `size` (y, x) samples."""
    coarse = rng.standard_normal([int(n / s) + 4 for n, s in zip(shape, size, strict=True)])
    field = zoom(coarse, [n / c for n, c in zip(shape, coarse.shape, strict=True)], order=2)
    return (field / field.std()).astype(np.float32)


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
        order = np.argsort(y)  # table look-ups are several times faster in order
        x, y = x[order], y[order]
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
        haze = clutter + rng.normal(0, 2) - 0.03 * np.maximum(r - 30, 0)
        haze = haze + 3 * smooth_noise(rng, shape, (70, 30))
        # logaddexp is the soft maximum of two levels: here the near field, then echoes of the skin.
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
    """Quality, frames/s, number of frames (systole lasts about 0.36 s), whether stored ES to ED."""
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
