"""Ultrasound of a moving heart, by interference: speckle is never painted, it moves with the tissue.

Scatterers (random reflectors that ride on the heart's motion) -> beamforming (coherent sum on a polar grid,
blurred by the point spread function) -> display (shadows, clutter, log compression, scan conversion).
Distances are in mm, levels in dB; frames of reference are those of `anatomy`.
"""
import numpy as np
from scipy.fft import fft, fftfreq, ifft
from scipy.ndimage import gaussian_filter, gaussian_filter1d, map_coordinates, zoom

from usjepa_nb.anatomy import VIEWS, Heart, Leaflets, Y, draw_patient, draw_pose, ejection_fraction, side_of

DR, BEAMS, PAD = 0.35, 160, 16  # polar grid: mm per sample, beams, spare beams against wrap-around of the FFT
WAVENUMBER = 4 * np.pi / 0.7  # two-way phase per mm at 2.2 MHz
PER_MM2 = 3.0  # scatterers per mm2: some ten in a resolution cell make fully developed speckle
QUALITY = {  # share of patients; clutter, noise, loss of the free wall (dB); mean number of rib shadows
    "Good": (0.43, -48, -50, 7, 0.5), "Medium": (0.43, -43, -47, 10, 1.0), "Poor": (0.14, -36, -43, 15, 1.6)}


# --- scatterers ---------------------------------------------------------------------------------------------
def smooth_noise(rng, shape, size):
    """Random field [shape] of unit SD with structures of about `size` (y, x) samples."""
    coarse = rng.standard_normal([int(n / s) + 4 for n, s in zip(shape, size, strict=True)])
    field = zoom(coarse, [n / c for n, c in zip(shape, coarse.shape, strict=True)], order=2)
    return (field / field.std()).astype(np.float32)


def soft(distance, width):
    """0 well inside a boundary, 1 well outside: a transition `width` mm wide, for no border is a step."""
    t = np.clip(distance / width + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def bump(*scaled):
    """Gaussian hump: 1 where every scaled distance is 0."""
    return np.exp(-sum(s ** 2 for s in scaled))


def echo_levels(rng, heart, x, y, pose, dropout):
    """Echo level (dB) of every point at ED, whether it is flowing blood, and how much it fades by ES (dB)."""
    wide, coarse, fine, grain, drift = (map_coordinates(
        smooth_noise(rng, (330, 300), (s, s)), [(y + 60) % 329, (x + 150) % 299], order=1)
        for s in (40, 15, 6, 3, 16))
    length, n, inner, outer = heart.length, np.abs(x), side_of(x, heart.inner, y), side_of(x, heart.outer, y)
    d, ventricle, right = n - outer, y <= length, np.interp(y, Y, heart.right) * (x < 0)
    jagged = 0.9 * fine + 0.7 * grain  # mm by which borders wander
    # Whatever lies around the heart; behind the atrium the pericardium mirrors, here and there.
    around = -29 + 5 * wide + 4.5 * coarse + 3 * fine + 1.5 * grain - np.clip((d - 5) * 0.12, 0, 8)
    patchy = np.clip(0.5 + 0.8 * wide + 0.4 * coarse, 0, 1.7)
    around += rng.uniform(2, 16) * patchy * bump((y - heart.roof - 8 - 5 * coarse) / rng.uniform(5, 10))
    spots = np.clip(0.5 + coarse, 0, 1.5)
    around += rng.uniform(4, 14) * spots * bump((d - 2) / 3) * (ventricle & (right == 0))
    around += rng.uniform(0, 12) * patchy * bump((y - length - 6) / 10, (d - 6) / 9) * (x > 0)
    around += rng.uniform(2, 9) * spots * bump((d - right - 2) / 2.5) * (right > 4)
    # Walls along the beam reflect less than walls across it; whole segments drop out, most on the free side.
    probe_x, probe_y = heart.locate(0.0, 0.0, pose)
    slope = np.clip(side_of(x, np.gradient(heart.inner, axis=1), y), -3, 3)
    facing = np.abs((x - probe_x) * np.sign(x) - (y - probe_y) * slope)
    reach = np.hypot(x - probe_x, y - probe_y)
    facing = facing / (np.sqrt(1 + slope ** 2) * reach + 0.01)
    loss = rng.normal([[1], [0.5 * dropout]], [[4.5], [5]], (2, len(Y[::22])))
    gone = bump((Y[::22] / length - rng.uniform(0, 1, (2, 1))) / rng.uniform(0.15, 0.35, (2, 1)))
    loss = side_of(x, np.clip(loss + rng.exponential([[6], [8]]) * gone, -5, 26), y, Y[::22])
    across = (n - inner) / np.maximum(outer - inner, 1) - np.where(x < 0, 0.5, 0.7)
    basal = soft(y - 0.35 * length, 0.5 * length)
    wall = np.where(x < 0, -23 + 3 * basal, -25.5 + 4 * basal)  # septum and base are brighter
    wall += 6 * (facing - 0.4) - loss + 2.5 * coarse + 2.5 * fine + 2 * grain
    wall = np.where(ventricle, wall - np.clip(26 * across ** 2, 0, 9), wall - 4)
    # The small atrium at ED is half filled by walls before and behind the image plane.
    behind = rng.uniform(6, 30) * (1 - soft(length + 4 - y, 8)) * (n < inner)
    blood = -54 + 3 * wide + behind * (1 + 0.4 * coarse) + 22 * (1 - soft(reach - 10, 12))  # chest wall
    out = soft(d + jagged, rng.uniform(4, 8))
    beside = blood + rng.uniform(0, 13) * (1 + 0.5 * coarse)
    beside = beside + (around - beside) * soft(d - right + 1.5 * jagged, 4) ** (right > 0)
    level = wall + (beside - wall) * out
    # Trabeculae and a papillary muscle blur the border between wall and blood.
    along, aside = 8 * (y / length - rng.uniform(0.4, 0.6)), (n - 0.72 * inner) / rng.uniform(3, 5)
    papillary = np.clip(1.4 - along ** 2 - aside ** 2 + 0.5 * fine, 0, 1) * (x > 0) * rng.uniform(0, 0.55)
    ragged = rng.uniform(0.5, 3) * (1 - soft(y - 0.55 * length, 0.3 * length))
    filled = soft(n - inner + jagged * (1 + 0.5 * ragged) + 0.4 * ragged + 1.2, rng.uniform(4, 7) + ragged)
    filled = np.maximum(filled, papillary * ventricle)
    level = blood + (level - blood) * filled
    ring = rng.uniform(0, 8, 2)[(x > 0).astype(int)] * (1 + 0.4 * coarse)  # the fibrous annulus is bright
    level += ring * bump((y - length - 2) / 6, (n - (inner + outer) / 2) / 5)
    fluid = (filled < 0.5) & (n < inner) | (d > 0) & (d < right) & (beside < -38)
    return level, fluid, drift * np.where(fluid, 1, 1 + 4 * soft(d, 6)) - behind


class Tissue:
    """Scatterers sown evenly over the sector at ED and carried by the heart's motion ever after."""

    def __init__(self, rng, heart, sector, pose, dropout):
        count = int(PER_MM2 * sector[1] * sector[0] ** 2 * 1.2)
        r, th = 1.06 * sector[0] * np.sqrt(rng.random(count)), 1.06 * sector[1] * rng.uniform(-1, 1, count)
        x, y = heart.locate(r * np.sin(th), r * np.cos(th), pose)
        order = np.argsort(y)  # table look-ups are several times faster in order
        x, y = x[order], y[order]
        level, fluid, drift = echo_levels(rng, heart, x, y, pose, dropout)
        self.rng, self.heart, self.y, self.sign = rng, heart, y, np.sign(x)
        inner, outer = (side_of(x, t, y) ** 2 for t in (heart.inner, heart.outer))
        self.cavity, self.wall = np.minimum(x * x, inner), np.clip(x * x - inner, 0, outer - inner)
        self.outside = np.maximum(x * x - outer, 0)  # x^2 split in three: each part has its own stretch
        self.valve = Leaflets(rng, heart, 2.2 * PER_MM2)
        still = np.zeros(len(self.valve.level), np.float32)
        self.blood, self.drift = np.append(fluid, still > 0), np.append(drift, still).astype(np.float32)
        self.amplitude = (10 ** (np.append(level, self.valve.level) / 20)).astype(np.float32)
        self.weight = self.amplitude * rng.standard_normal(len(self.amplitude), np.float32)

    def move(self, c):
        """Positions in the heart frame at contraction c: y along the axis, x^2 as the volume of a disk."""
        y1, stretch, squeeze = self.heart.strain(c)
        s = side_of(self.sign, squeeze, self.y) ** 2
        x2 = self.cavity * s + self.wall / np.interp(self.y, Y, stretch) + self.outside
        x, y = self.valve.move(c)
        return np.append(self.sign * np.sqrt(x2), x), np.append(np.interp(self.y, Y, y1), y)

    def echoes(self, c):
        """Weights at contraction c: what crosses the image plane is another cut of the same tissue."""
        return self.weight * np.exp(np.float32(c * np.log(10) / 20) * self.drift)

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
        width = np.radians(0.43 + r / 250 + 0.2 * np.abs(r / focus - 1)) / step  # lateral SD in beams
        self.half, self.along = half, 0.43 / DR  # axial SD in samples
        per_cell = PER_MM2 * np.maximum(r, 3) * step * DR
        unit = np.sqrt(4 * np.pi * self.along * width / per_cell)  # one scatterer level = one echo level
        omega = 2 * np.pi * fftfreq(BEAMS + 2 * PAD)
        self.blur = (unit * np.exp(-0.5 * (width * omega) ** 2)).astype(np.float32)
        gain = rng.normal(2.3, 4) - rng.uniform(-4, 8) * (r / depth - 0.4)
        gain = gain - 6 * bump(r / 45) - 7 * bump(r / 14)  # the near field is turned down
        gain = gain + 2.5 * smooth_noise(rng, shape, (120, 40)) + rng.normal(0, 2.5) * across
        for _ in range(rng.poisson(shadows)):
            where = rng.choice([-1, 1]) * rng.uniform(0.4, 1.0)
            gain = gain - rng.uniform(5, 20) * bump((across - where) / rng.uniform(0.06, 0.25))
        self.gain = (10 ** (gain / 20)).astype(np.float32)
        haze = clutter + rng.normal(0, 2) + rng.uniform(-0.04, 0.06) * (r - 60)
        haze = haze + 3 * smooth_noise(rng, shape, (110, 45)) + 1.5 * smooth_noise(rng, shape, (35, 16))
        # logaddexp is the soft maximum of two levels: here the near field, then echoes of the skin.
        haze = np.logaddexp(haze / 4, (rng.normal(-31, 5) - r * rng.uniform(0.6, 1.4)) / 4) * 4
        arcs, gap, broken = np.zeros(shape), rng.uniform(4, 9), 7 * smooth_noise(rng, shape, (12, 40))
        for k in range(1, rng.integers(1, 7)):  # reverberation between skin and probe: coherent across beams
            echo = broken - ((r - gap * (k + rng.normal(0, 0.12))) / rng.uniform(0.3, 0.8)) ** 2
            echo = np.maximum(echo + rng.normal(-30, 6) - 2 * k, -90)
            arcs = arcs + 10 ** (echo / 20) * np.exp(2j * np.pi * rng.random())
        self.arcs = np.pad(arcs * np.sqrt(per_cell), ((0, 0), (PAD, PAD)), "edge").astype(np.complex64)
        self.haze = np.pad(10 ** (haze / 20), ((0, 0), (PAD, PAD)), "edge") * np.sqrt(per_cell / 2)
        self.haze = self.haze.astype(np.float32)
        self.noise = (10 ** ((noise + 6 * (r / depth) ** 2) / 20)).astype(np.float32)
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
        iq = beamform(x, z, weight, self.half, len(self.blur)) + self.clutter * self.haze + self.arcs
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
    sway = rng.normal(0, (1.8, 1.5, 0.03))  # breathing and hand
    scanner = Scanner(rng, sector, spacing, facts["quality"])
    tissue = Tissue(rng, heart, sector, pose, QUALITY[facts["quality"]][3])
    video, masks = [], []
    for u in np.linspace(0, 1, facts["frames"]):
        c, now = np.sin(np.pi / 2 * u) ** 1.6, pose + sway * np.sin(np.pi / 2 * u)
        video.append(scanner.image(*heart.place(*tissue.move(c), now), tissue.echoes(c)))
        masks.append(heart.labels(*heart.locate(scanner.x, scanner.z, now), c))
        tissue.renew()
    return facts | dict(frames=np.stack(video), masks=np.stack(masks), spacing=spacing, sex=patient["sex"],
                        age=patient["age"], ef=ejection_fraction([hearts[v] for v in VIEWS]))
