"""Click a token of a clip and see what it has with all others: `features.Tokens` made to be touched."""

import os

import ipywidgets
import numpy as np
import plotly.graph_objects as go
from plotly.callbacks import Points
from plotly.subplots import make_subplots

from .. import figures
from ..vit import Grid
from . import exercise
from .features import SCALES, Tokens, describe


class TokenInspector(ipywidgets.VBox):
    """Click a token, or choose it with the sliders, and see what it has with all others.

    Attributes:
        controls: {"method", "clip", "show", "t", "y", "x"}; `figure`: a plotly FigureWidget, frames above heat maps;
        message: the heat map in words.
    """

    def __init__(self, tokens: Tokens, token: Grid, method: str | None = None):
        self.tokens, n = tokens, tokens.grid[0]
        style = {"description_width": "initial"}
        self.controls = {
            "method": ipywidgets.Dropdown(options=list(tokens.views), value=method or next(iter(tokens.views))),
            "clip": ipywidgets.Dropdown(options=[(name, k) for k, name in enumerate(tokens.names)]),
            "show": ipywidgets.Dropdown(options=tokens.kinds),
            **{axis: ipywidgets.IntSlider(at, 0, size - 1)
               for axis, at, size in zip("tyx", token, tokens.grid, strict=True)}}
        for name, widget in self.controls.items():
            widget.description, widget.style = name, style
            widget.observe(self.draw, names="value")
        self.message, self.figure = ipywidgets.HTML(), go.FigureWidget(self._empty())
        for at, trace in enumerate(self.figure.data):
            trace.on_click(lambda _, points, state, t=at % n: self.click(t, points))
        self.draw()
        row = ipywidgets.Box([*self.controls.values()], layout={"flex_flow": "row wrap"})
        super().__init__([row, self.message, self.figure])
        if os.environ.get("USJEPA_EXERCISE") == "1":
            exercise(self)
            self.click(n - 1, Points(xs=[0], ys=[0]))  # plotly's own call would swallow an exception
            self.token = token

    @property
    def token(self) -> Grid:
        """The token that asks, (t, y, x)."""
        return tuple(self.controls[axis].value for axis in "tyx")

    @token.setter
    def token(self, token: Grid):
        for axis, value in zip("tyx", token, strict=True):
            self.controls[axis].value = value

    def click(self, t: int, points: Points):
        """A click on a picture of slice `t`; its axes count tokens."""
        if points.xs:
            self.token = (t, round(points.ys[0]), round(points.xs[0]))

    def _empty(self) -> go.Figure:
        """Frames above heat maps, one column for each slice; axes count tokens, pixels are as long as in the body."""
        n, high, wide = self.tokens.grid
        figure = make_subplots(2, n, column_titles=[f"t = {t}" for t in range(n)], horizontal_spacing=0.01,
                               vertical_spacing=0.02)
        blank = np.zeros((high, wide))
        for t in range(n):
            figure.add_heatmap(row=1, col=t + 1, z=blank, zmin=0, zmax=255, colorscale="gray", showscale=False,
                               hoverinfo="none", **_pixels(self.tokens.tubelet))
        for t in range(n):
            figure.add_heatmap(row=2, col=t + 1, z=blank, coloraxis="coloraxis",
                               hovertemplate="y %{y}, x %{x}: %{z:.3f}<extra></extra>")
        figure.update_xaxes(range=[-0.5, wide - 0.5], showticklabels=False, showgrid=False, zeroline=False,
                            constrain="domain")
        figure.update_yaxes(range=[high - 0.5, -0.5], showticklabels=False, showgrid=False, zeroline=False,
                            constrain="domain")
        (_, dy, dx), (y, x) = self.tokens.tubelet, self.tokens.spacings[0]
        wide_px = 740 / n  # fits a window of 1280 px beside JupyterLab's own panels, with the colour bar
        figure.update_layout(width=840, height=60 + 2 * wide_px * high * dy * y / (wide * dx * x), plot_bgcolor="black",
                             margin={"l": 5, "r": 5, "t": 30, "b": 5}, dragmode=False)
        return figure

    def draw(self, change=None):
        """Show what the controls say."""
        method, clip, kind = (self.controls[name].value for name in ("method", "clip", "show"))
        values, n = self.tokens.values(method, clip, kind, self.token), self.tokens.grid[0]
        (scale, low, high, unit), (_, dy, dx) = SCALES[kind.split()[0]], self.tokens.tubelet
        high = float(np.nanmax(values, initial=1e-9)) if high is None else high
        t, y, x = self.token
        frame = {"type": "rect", "x0": x - 0.5, "x1": x + 0.5, "y0": y - 0.5, "y1": y + 0.5,
                 "line": {"color": figures.PALETTE["yellow"], "width": 3}}
        spacing = self.tokens.spacings[clip]
        with self.figure.batch_update():
            for k in range(n):
                self.figure.data[k].z = self.tokens.slices(clip)[k]
                self.figure.data[n + k].z = np.where(np.isnan(values[k]), None, values[k])  # JSON knows no nan
            for k, axis in enumerate(self.figure.select_yaxes(), 1):
                axis.update(scaleanchor=f"x{k}", scaleratio=float(dy * spacing[0] / (dx * spacing[1])))
            self.figure.layout.coloraxis = {"colorscale": scale, "cmin": low, "cmax": high,
                                            "colorbar": {"title": {"text": unit, "side": "right"}}}
            self.figure.layout.shapes = [frame | {"xref": f"x{k + 1}", "yref": f"y{k + 1}"} for k in (t, n + t)]
        self.message.value = f'<div role="status">{describe(values, self.token, kind)}</div>'


def _pixels(tubelet):
    """Where the pixels of a frame lie on axes that count tokens."""
    _, y, x = tubelet
    return {"x0": 0.5 / x - 0.5, "dx": 1 / x, "y0": 0.5 / y - 0.5, "dy": 1 / y}
