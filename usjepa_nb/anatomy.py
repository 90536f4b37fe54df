"""Hearts in motion: a tube with an inner and an outer half-width that contracts, and its labels.

One map moves tissue and masks alike. Distances are in mm.
Heart frame: y along the long axis, 0 at the apex, `length` at the mitral plane; x < 0 on the image's left.
Image frame: X to the right, Z down, the probe at (0, 0).
"""
import numpy as np
from scipy.ndimage import gaussian_filter1d

VIEWS = ("2CH", "4CH")
Y = np.arange(-60.0, 260.0)  # tables over the long axis have one entry per mm


def side_of(x, table, y, at=Y):
    """Entry of a table [side, y] for points (x, y)."""
    return np.where(x < 0, np.interp(y, at, table[0]), np.interp(y, at, table[1]))


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


class Leaflets:
    """The mitral valve: two hinged, uneven lines of points, ajar at ED (in most) and shut soon after."""

    def __init__(self, rng, heart, per_mm):
        self.heart, share = heart, rng.uniform(0.5, 0.68)  # the anterior leaflet, on the left, is the longer
        rim = sum(np.interp(heart.length, Y, t) for t in heart.inner)
        reach = rim * np.array([share, 1 - share]) * rng.uniform(1.0, 1.15)
        count = (per_mm * reach).astype(int)
        self.side = side = np.repeat([0, 1], count)
        self.reach, self.bulge = reach[side], rng.uniform(-0.05, 0.22, 2)[side]
        self.along, self.off = rng.random(len(side)), rng.normal(0, rng.uniform(0.5, 0.9), len(side))
        ajar = rng.choice([0, 1.2], p=[0.25, 0.75]) * rng.uniform(0.6, 1.25, 2)  # radians from the plane
        self.shut, self.ajar = rng.uniform(0.05, 0.4, 2)[side], ajar[side]
        knots = rng.normal(-27, 6, (2, 9)) - rng.exponential(4, (2, 1))  # echo level, dB
        self.level = side_of(side - 0.5, knots, self.along, np.linspace(0, 1, 9))

    def move(self, c):
        """Positions in the heart frame at contraction c."""
        y1, inner, _ = self.heart.boundaries(c)
        base = self.heart.length * (1 - self.heart.axial * c)
        rim = np.array([np.interp(base, y1, t) for t in inner])[self.side]
        angle = self.shut + np.maximum(self.ajar - self.shut, 0) * np.exp(-c / 0.05)
        u, v = self.reach * self.along, self.off + self.bulge * self.reach * np.sin(np.pi * self.along)
        x = rim - u * np.cos(angle) - v * np.sin(angle)
        return (2 * self.side - 1) * x, base - 1 - np.abs(u * np.sin(angle) + v * np.cos(angle))


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
    """Sector (depth, half opening angle) and pose (apex X, apex Z, tilt): most of the ventricle in view.

    The cavity's middle lies a little right of the sector's axis, as in CAMUS, however the heart is tilted.
    """
    shown = 1 - rng.choice([0.05, 0.15, 0.3], p=[0.5, 0.3, 0.2])  # share of the ventricle's rim in view
    for _ in range(200):
        half = np.radians(rng.normal(37.3, 0.8) if rng.random() < 0.72 else rng.uniform(28, 45))
        pose = np.array([0, rng.uniform(2, 40), np.radians(rng.normal(10, 12))])
        pose[0] = rng.normal(8.5, 5.5) - heart.place(0.0, 0.55 * heart.length, pose)[0]
        rim, side = (t.ravel() for t in np.meshgrid(np.arange(0, heart.length, 4.0), (-1, 1)))
        x, z = heart.place(side * side_of(side, heart.outer, rim), rim, pose)
        depth = np.clip(z.max() + rng.uniform(0.1, 1.6) * (heart.roof - heart.length), 105, 200)
        if np.mean(np.abs(np.arctan2(x, z)) <= half) >= shown:
            break
    return (depth, half), pose
