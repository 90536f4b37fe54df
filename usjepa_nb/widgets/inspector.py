"""A click sets the first token of a pair, the next one the second: how far apart are they, and how far does a head say?

The numbers come from `pairs`; this module finds checkpoints and shows.
"""

import html
import json
import os

import ipywidgets
import numpy as np
import torch
from ipywidgets import HTML, Dropdown, Image, IntSlider
from PIL.Image import fromarray
from plotly.graph_objects import FigureWidget
from plotly.subplots import make_subplots

from usjepa_nb import figures, lens, losses, pairs, pretrain
from usjepa_nb.objectives import VJEPA, make_encoder
from usjepa_nb.widgets import exercise

COLOURS = {"first": figures.PALETTE["sky"], "second": figures.PALETTE["yellow"],
           "true": figures.PALETTE["green"], "predicted": figures.PALETTE["orange"]}


def checkpoints(lab) -> dict:
    """{label: folder} of the profile's finished V-JEPA runs whose tokens lie as this lab's do; λ falls."""
    found = {}
    for file in (lab.cache / "runs" / lab.profile.name).glob("vjepa*/run.json"):
        spec = json.loads(file.read_text(encoding="utf-8"))
        s = {**spec["settings"], "frames": spec["frames"]}
        here = {k: getattr(lab.profile, k) for k in ("size", "tubelet", "patch")} | {"frames": lab.frames}
        if here.items() <= s.items() and (file.parent / "checkpoint.pt").exists():
            name = f"λ = {spec['lam']:g}, {spec['freeze']} frozen, {s['steps']} steps, seed {spec['seed']}"
            found[-spec["lam"], spec["freeze"], f"{name} [{file.parent.name.rsplit('-')[-1]}]"] = file.parent
    return {key[-1]: found[key] for key in sorted(found)}


def load(lab, folder) -> VJEPA:
    """The objective of a finished run, with its own settings in place of the lab's."""
    spec = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    known = {k: v for k, v in spec["settings"].items() if hasattr(lab.profile, k)}
    p = lab.profile.replace(**known)
    objective = VJEPA(p, lab.frames, make_encoder(p, lab.frames), spec["lam"], spec["freeze"])
    pretrain.resume(folder / "checkpoint.pt", objective)
    return objective.eval()


def sources(objective: VJEPA) -> tuple[str, str]:
    """What the loss was asked of, with the image and without (names of `lens.SOURCES`)."""
    first = {"predicted": 0, "context": 2, "unplaced": 4}[objective.p.ll_on]
    return lens.SOURCES[first:first + 2]


def head_of(lab, objective: VJEPA, source: str):
    """The run's own head; for λ = 1, which has none, a fresh one trained on the frozen tokens of 32 training clips."""
    if objective.head is not None:
        return objective.head
    grey = lab.batches(lab.store.rows("train"))(pretrain.step_generator(lab.seed, 1), 32)
    generator = torch.Generator().manual_seed(lab.seed)
    return lens.fresh_head(lens.tokens(objective, grey, source, generator), objective, lab.seed, generator, steps=120)


class Inspector(ipywidgets.VBox):
    """Click two hidden tubelets of a clip, or choose them with the controls.

    Args:
        lab: where runs and clips come from.
        folder: of the run shown first.
        rows: store rows of the clips to choose from.

    Attributes:
        controls: {name: widget}; `strip` is the clip, `maps` a picture, `numbers` and `listing` are tables.
        tokens, pairs, pair: what is shown: `lens.Tokens`, all `pairs.Pairs` and the chosen one.

    Raises:
        ValueError: `folder` is not among `checkpoints`.
    """

    def __init__(self, lab, folder, rows):
        self.lab, self.rows, self.frames, self.loaded, self.heads = lab, rows, lab.clips(rows)[0], {}, {}
        self.grid = t, y, x = lab.profile.grid(lab.frames)
        self.chosen, found = {"first": (t - 1) * y * x, "second": y * x - 1}, checkpoints(lab)
        if folder not in found.values():
            raise ValueError(f"{folder.name} is no finished V-JEPA run of this profile; there are: {', '.join(found)}")
        slow = {"continuous_update": False}  # computed when the slider is let go
        self.controls = {
            "checkpoint": Dropdown(options=[*found.items()], value=folder, description="run", layout={"width": "34em"}),
            "source": Dropdown(options=[("with the image", 0), ("without the image", 1)], description="tokens"),
            "clip": IntSlider(0, 0, len(rows) - 1, description="clip", **slow),
            "mask": IntSlider(0, 0, 20, description="mask", **slow)}
        for member in self.chosen:
            self.controls[f"{member} slice"] = IntSlider(0, 0, t - 1, description=f"{member}: t", **slow)
            self.controls[f"{member} place"] = Dropdown(description="place")
        self.controls["click"] = ipywidgets.ToggleButtons(options=[*self.chosen], description="click sets")
        self.strip, self.maps = self._strip(), Image(layout={"align_self": "flex-start", "max_width": "100%"})
        self.message, self.numbers, self.listing = HTML(), HTML(), HTML()
        self.setting = False
        self._new_clip()
        self.strip = FigureWidget(self.strip)  # now that it is filled: messages to a widget still loading get lost
        for k, trace in enumerate(self.strip.data):
            trace.on_click(lambda _, at, __, k=k: at.xs and self.click(k, at.ys[0], at.xs[0]))
        row = ipywidgets.Box([*self.controls.values()], layout={"flex_flow": "row wrap"})
        super().__init__([row, self.message, self.strip, self.numbers, self.maps, self.listing])
        for name, control in self.controls.items():
            control.observe(lambda change, name=name: self._moved(name), names="value")
        if os.environ.get("USJEPA_EXERCISE") == "1":
            before = dict(self.chosen)
            exercise(self)
            self.click(0, 0, 0)
            self.click(t - 1, y - 1, x - 1)
            self.choose(**before)

    def click(self, t, y, x):
        """What a click on a tubelet does: it, or the located one nearest to it, becomes the first or second token."""
        member, wanted = self.controls["click"].value, int((t * self.grid[1] + y) * self.grid[2] + x)
        self.choose(**{member: wanted})
        self.controls["click"].value = "second" if member == "first" else "first"
        if self.chosen[member] != wanted:
            self.message.value = "No token is located there: the nearest one that is has been taken."

    def choose(self, **members):
        """Take the located tokens nearest to flat indices: first=…, second=…."""
        self.chosen = {member: pairs.nearest(self.places, index, self.grid)
                       for member, index in (self.chosen | members).items()}
        self.setting = True
        area = self.grid[1] * self.grid[2]
        for member, index in self.chosen.items():
            menu, here = self.controls[f"{member} place"], self.places[self.places // area == index // area] % area
            self.controls[f"{member} slice"].value = index // area
            menu.options = [("y {}, x {}".format(*divmod(int(i), self.grid[2])), int(i)) for i in here.sort().values]
            menu.value = index % area
        self.setting = False
        self._show()

    def _moved(self, name):
        member, _, what = name.partition(" ")
        if self.setting or name == "click":
            return
        try:
            if what:
                area = self.grid[1] * self.grid[2]
                index = self.controls[f"{member} slice"].value * area + self.controls[f"{member} place"].value
                self.choose(**{member: index})
            else:
                self._new_clip()
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            self.message.value = f"<b>This setting cannot be shown.</b> {html.escape(text)}"
            raise

    def _new_clip(self):
        """Another run, clip or mask: locate all its tokens anew."""
        now = {name: self.controls[name].value for name in ("checkpoint", "source", "clip", "mask")}
        folder, k = now["checkpoint"], now["clip"]
        if folder not in self.loaded:
            self.loaded[folder] = load(self.lab, folder)
        objective = self.loaded[folder]
        source = sources(objective)[now["source"]]
        grey = torch.from_numpy(self.frames[k:k + 1]).float()
        self.tokens = lens.tokens(objective, grey, source, torch.Generator().manual_seed(now["mask"]))
        if (folder, source) not in self.heads:
            self.heads[folder, source] = head_of(self.lab, objective, source)
        self.head, self.places = self.heads[folder, source], pairs.places(self.tokens)
        self.pairs = pairs.answer(self.head, self.tokens, self.grid, *pairs.every_pair(self.places))
        self.unit = pairs.one_token(self.lab, self.rows[k])
        self.note = "" if objective.head else "λ = 1 trains no head: a fresh one was trained on these frozen tokens. "
        self.maps.value = figures.png(pairs.error_maps(self.pairs, self.grid, self.unit))
        self.listing.value = pairs.extremes(self.pairs, self.grid, self.unit).to_html(border=0, col_space=105)
        self._show_clip(self.frames[k])
        self.choose()

    def _strip(self):
        """The clip's slices side by side, over each a heat map of its tokens: that is what a click falls on."""
        t, y, x = self.grid
        columns = min(t, 4)
        rows, titles = -(-t // columns), [f"t = {k}" for k in range(t)]
        figure = make_subplots(rows, columns, subplot_titles=titles, horizontal_spacing=0.01,
                               vertical_spacing=0.08 / rows)
        for k in range(t):
            figure.add_heatmap(z=np.zeros((y, x)), zmin=0, zmax=1, showscale=False, row=k // columns + 1,
                               col=k % columns + 1, colorscale=[[0, "rgba(0,0,0,0)"], [1, "rgba(0,0,0,0.6)"]],
                               hovertemplate=f"t {k}, y %{{y}}, x %{{x}}<extra></extra>")
        figure.update_xaxes(range=[-0.5, x - 0.5], visible=False, fixedrange=True)
        figure.update_yaxes(range=[y - 0.5, -0.5], visible=False, fixedrange=True)
        self.titles, margin = list(figure.layout.annotations), {"l": 5, "r": 5, "t": 30, "b": 5}
        return figure.update_layout(width=1080, dragmode=False, margin=margin)

    def _show_clip(self, frames):
        """Frames under the heat maps, and what is not located darkened."""
        t, y, x = self.grid
        dark = np.ones(t * y * x)
        dark[self.places.numpy()] = 0
        first, images = frames[::len(frames) // t], []
        for k in range(t):
            axes = {"xref": self.strip.data[k].xaxis, "yref": self.strip.data[k].yaxis}
            images.append({"source": fromarray(first[k]), "x": -0.5, "y": -0.5, "sizex": x, "sizey": y,
                           "sizing": "stretch", "layer": "below", **axes})
        with self.strip.batch_update():
            for trace, z in zip(self.strip.data, dark.reshape(t, y, x), strict=True):
                trace.z = z
            self.strip.layout.images = images
            ratio = self.unit["y"] * y / (self.unit["x"] * x)  # true proportions
            self.strip.layout.height = 40 + round(265 * ratio) * -(-t // 4)

    def _show(self):
        """The chosen pair: boxes, arrows from the second token to where the first lies, and numbers."""
        one = {member: torch.tensor([index]) for member, index in self.chosen.items()}
        self.pair = pairs.answer(self.head, self.tokens, self.grid, one["first"], one["second"])
        shapes, notes = [], []
        for member, dash in (("first", "solid"), ("second", "dot")):
            t, y, x = losses.position(one[member][0], self.grid).tolist()
            axes = {"xref": self.strip.data[t].xaxis, "yref": self.strip.data[t].yaxis}
            shapes.append({"type": "rect", "x0": x - 0.5, "x1": x + 0.5, "y0": y - 0.5, "y1": y + 0.5, **axes,
                           "line": {"color": COLOURS[member], "width": 3, "dash": dash}})
            notes.append({"text": member, "x": x, "y": y - 0.5, "yanchor": "bottom", "showarrow": False, **axes,
                          "font": {"color": COLOURS[member], "size": 11}, "bgcolor": "rgba(0,0,0,0.6)"})
        for what, wide in (("true", 5), ("predicted", 2)):  # both start at the second token, in its slice
            _, down, right = getattr(self.pair, what)[0].tolist()
            notes.append({"x": x + right, "y": y + down, "ax": x, "ay": y, **axes, "axref": axes["xref"], "text": "",
                          "ayref": axes["yref"], "arrowhead": 2, "arrowwidth": wide, "arrowcolor": COLOURS[what]})
        with self.strip.batch_update():
            self.strip.layout.shapes, self.strip.layout.annotations = shapes, [*self.titles, *notes]
        self.message.value = html.escape(self.note)
        legend = "".join(f' <b style="color:{COLOURS[what]}">━</b> {what} offset' for what in ("true", "predicted"))
        self.numbers.value = f"Arrows lead from the second token to the first:{legend}." + pairs.numbers(
            self.pair, self.unit).to_html(border=0, col_space=105)
