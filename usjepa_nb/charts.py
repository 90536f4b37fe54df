"""Curves, tables and agreement: figures of numbers (those of clips are in `figures`); nothing is shown."""

import numpy as np
from matplotlib.ticker import LogLocator

from .figures import PALETTE, TOKEN_COLOURS, panels, token_kinds

LINES = [PALETTE[c] for c in ("blue", "vermillion", "green", "purple", "orange", "sky", "black", "yellow")]
MARKERS = "osD^vPX*"  # colour is never the only difference
FROM_ZERO, SHARES = ("std", "rank"), ("position_share",)  # monitors whose zero means something; the latter end at 1
SPAN = 0.05  # least range of Table 1's colours and axis, in DSC: less must not look like much
PLOTLY = {"template": "plotly_white", "margin": {"t": 20, "b": 20}, "width": 680,  # as wide as a page of the book
          "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"}}


def _legend(ax, **how):
    ax.legend(fontsize=8, frameon=False, **how)


def _label(ax, x, y, title=None):
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)
    ax.set_title(title or "", fontsize=10)
    ax.grid(alpha=0.3)


def mask_bias(counts_by_time):
    """Targets in each time slice, one line for each rule: {rule: [t]} numbers of tokens (or shares)."""
    figure, axes = panels(1, 1, width=6, ratio=0.5)
    for (rule, counts), colour, marker in zip(counts_by_time.items(), LINES, MARKERS, strict=False):
        axes[0, 0].plot(np.arange(len(counts)), counts, color=colour, marker=marker, label=rule)
    _label(axes[0, 0], "time slice t of the token grid", "targets per clip")
    axes[0, 0].set_ylim(bottom=0)
    _legend(axes[0, 0])
    return figure


def training_curves(history, columns):
    """A panel for each entry of `columns`: a column of `history`, or a list of columns drawn together.

    Args:
        history: DataFrame with a column "step"; a monitor that was not read at a step is nan there. Positive
            curves that span more than two decades get a logarithmic axis; spread and rank begin at 0, a share ends
            at 1.
    """
    across = min(3, len(columns))
    figure, axes = panels(-(-len(columns) // across), across, ratio=0.65)
    for ax in axes.flat[len(columns) :]:
        ax.set_axis_off()
    for ax, names in zip(axes.flat, columns, strict=False):
        names = [names] if isinstance(names, str) else names
        for name, colour in zip(names, LINES, strict=False):
            curve = history[["step", name]].dropna()
            ax.plot(curve["step"], curve[name], color=colour, label=name, linewidth=1.2)
        values = history[names].to_numpy(float)
        values = values[~np.isnan(values)]
        if values.size and values.min() > 0 and values.max() > 100 * values.min():
            ax.set_yscale("log")
        elif len(names) == 1 and names[0] in FROM_ZERO + SHARES:
            ax.set_ylim(0, 1 if names[0] in SHARES else 1.1 * max(values, default=1) or 1)
        _label(ax, "step", "", names[0] if len(names) == 1 else "")
        if len(names) > 1:
            _legend(ax)
    return figure


def dsc_vs_fraction(table, score="dsc"):
    """Score against the share of labelled patients, one line for each method, bars from `lo` to `hi`.

    Args:
        table: DataFrame with columns method, fraction (% of the training patients), `score`, lo, hi. A row
            that is missing is not drawn, never filled in.
    """
    figure, axes = panels(1, 1, width=8, ratio=0.55)
    for i, (method, rows) in enumerate(table.groupby("method", sort=False)):
        rows = rows.sort_values("fraction")
        bars = np.abs(rows[["lo", "hi"]].to_numpy().T - rows[score].to_numpy())
        style = {"color": LINES[i % 8], "marker": MARKERS[i % 8], "capsize": 3}
        axes[0, 0].errorbar(rows["fraction"] * 1.015 ** (i - 3), rows[score], bars, label=method, **style)
    ticks = sorted(table["fraction"].unique())
    axes[0, 0].set_xscale("log")
    axes[0, 0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0, 0].minorticks_off()
    _label(axes[0, 0], "labelled training patients (%)", f"{score.upper()} (mean of three classes)")
    _legend(axes[0, 0], loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def dsc_vs_fraction_interactive(table, score="dsc"):
    """`dsc_vs_fraction` to explore: a plotly figure; a click on a method hides it."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for i, (method, rows) in enumerate(table.groupby("method", sort=False)):
        rows = rows.sort_values("fraction")
        bars = {"array": rows["hi"] - rows[score], "arrayminus": rows[score] - rows["lo"]}
        line = {"x": rows["fraction"], "y": rows[score], "error_y": bars, "name": method}
        figure.add_scatter(mode="lines+markers", line_color=LINES[i % 8], marker_symbol=i % 8, **line)
    ticks = sorted(table["fraction"].unique())
    figure.update_xaxes(type="log", tickvals=ticks, title="labelled training patients (%)")
    figure.update_yaxes(title=f"{score.upper()} (mean of three classes)")
    return figure.update_layout(height=480, **PLOTLY)


def _span(values):
    """Range of the finite values, widened around its middle to `SPAN`."""
    known = values[~np.isnan(values)]
    low, high = (known.min(), known.max()) if known.size else (0, 1)
    more = max(0, SPAN - (high - low)) / 2
    return low - more, high + more


def lambda_freeze(table, score="dsc"):
    """Table 1 as a heat map: columns λ, rows frozen blocks; the best of a row is framed, colours span `SPAN` at least.

    Args:
        table: DataFrame with columns freeze (blocks), lam, `score`; rows of one cell (seeds) are averaged;
            a cell without any says "missing".
    """
    cells = table.pivot_table(index="freeze", columns="lam", values=score, dropna=False).sort_index(axis=1)
    cells = cells.iloc[:, ::-1]  # λ falls from left to right, as in the paper
    rows, columns = cells.shape
    figure, axes = panels(1, 1, width=1.5 + 1.1 * columns, ratio=0.2 + 0.5 * rows / columns)
    ax, values = axes[0, 0], cells.to_numpy()
    low, high = _span(values)
    image = ax.imshow(np.ma.masked_invalid(values), cmap="cividis", aspect="auto", vmin=low, vmax=high)
    for (row, column), value in np.ndenumerate(values):
        missing = np.isnan(value)
        best = not missing and value == np.nanmax(values[row])
        box = {"boxstyle": "round", "fc": "white", "ec": "black" if best else "none", "alpha": 0.85}
        text = "missing" if missing else f"{value:.3f}"
        ax.text(column, row, text, ha="center", va="center", bbox=box, fontsize=9)
    ax.set_xticks(range(columns), [f"{lam:g}" for lam in cells.columns])
    ax.set_yticks(range(rows), [f"{freeze}" for freeze in cells.index])
    _label(ax, "λ (share of the JEPA loss, Eq. 4)", "frozen blocks")
    ax.grid(False)
    figure.colorbar(image, ax=ax, label=score.upper())
    return figure


def lambda_freeze_interactive(table, score="dsc"):
    """Table 1 to explore: score against λ, a line for each number of frozen blocks, seeds averaged; a plotly figure."""
    import plotly.graph_objects as go

    figure = go.Figure()
    cells = table.groupby(["freeze", "lam"])[score].mean()
    for i, (freeze, rows) in enumerate(cells.groupby("freeze")):
        line = {"x": rows.index.get_level_values("lam"), "y": rows.to_numpy(), "name": f"{freeze} blocks frozen"}
        figure.add_scatter(mode="lines+markers", line_color=LINES[i % 8], marker_symbol=i % 8, **line)
    figure.update_xaxes(title="λ (share of the JEPA loss, Eq. 4)", autorange="reversed")
    low, high = _span(cells.to_numpy())
    figure.update_yaxes(title=score.upper(), range=(low - SPAN / 20, high + SPAN / 20))
    return figure.update_layout(height=420, **PLOTLY)


def scaling(measured):
    """How a step's time grows with one setting after another, with its floor; then patients and processes.

    Args:
        measured: what `benchmarks/scaling.py` wrote: rows (grows, value, s, "floor, s"), runs, processes.
    """
    rows, words = measured["rows"], {"size": "frame size, px", "depth": "blocks", "batch": "clips of a step"}
    figure, axes = panels(2, 3, ratio=0.75)
    axes, kinds = axes.ravel(), list(dict.fromkeys(r["grows"] for r in rows))
    for ax, kind in zip(axes, kinds, strict=False):
        some = [r for r in rows if r["grows"] == kind]
        at = [r["value"] for r in some]
        ax.loglog(at, [r["s"] for r in some], "o-", color=LINES[0], label="measured")
        ax.loglog(at, [r["floor, s"] for r in some], "--", color=LINES[1], label="floor: FLOPs / matrix rate")
        ax.set_xticks(at, [f"{v:g}" for v in at])
        ax.minorticks_off()
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        _label(ax, words.get(kind, kind), "s a step")
    _legend(axes[0])
    runs, several = measured["runs"], measured["processes"]
    axes[-2].loglog([r["patients"] for r in runs], [r["hours"] for r in runs], "o-", color=LINES[0])
    _label(axes[-2], "patients, two clips each", f"hours for {measured['epochs']} epochs")
    axes[-1].plot([r["processes"] for r in several], [r["s, on the wall"] for r in several], "o-", color=LINES[0])
    axes[-1].set_xticks([r["processes"] for r in several])
    axes[-1].set_ylim(bottom=0)
    _label(axes[-1], "processes of one run", "s a step, on the wall")
    return figure


def ef_agreement(reference, predicted, names=("reference", "predicted")):
    """Ejection fractions in %, [n] each, of what `names` says: predicted against reference, and Bland-Altman.

    Printed: n (pairs with a nan are left out), Pearson's r, mean absolute error, bias (predicted - reference)
    and the 95 % limits of agreement, bias ± 1.96 SD, in points of EF.
    """
    both = np.stack([reference, predicted]).astype(float)
    x, y = both[:, ~np.isnan(both).any(0)]
    difference = y - x
    bias, limit = (difference.mean(), 1.96 * difference.std(ddof=1)) if x.size > 1 else (np.nan, np.nan)
    r = np.corrcoef(x, y)[0, 1] if x.size > 1 and np.ptp(x) and np.ptp(y) else np.nan
    error = abs(difference).mean() if x.size else np.nan
    figure, axes = panels(1, 2, width=9, ratio=0.8)
    left, right = axes[0]
    left.scatter(x, y, s=14, color=PALETTE["blue"])
    ends = (both.min(initial=100, where=~np.isnan(both)) - 3, both.max(initial=0, where=~np.isnan(both)) + 3)
    left.plot(ends, ends, color="gray", linewidth=1)
    _label(left, *(f"EF, {name} (%)" for name in names), f"n = {x.size}, r = {r:.2f}, error {error:.1f} points")
    right.scatter((x + y) / 2, difference, s=14, color=PALETTE["blue"])
    for level, style in ((bias, "-"), (bias - limit, "--"), (bias + limit, "--")):
        right.axhline(level, color=PALETTE["vermillion"], linestyle=style, linewidth=1)
    title = f"bias {bias:+.1f}, limits {bias - limit:+.1f} to {bias + limit:+.1f} points"
    _label(right, "mean of both (%)", f"{names[1]} - {names[0]} (points)", title)
    return figure


def token_grid3d(context, target, outside=None):
    """The token grid in space and time, to turn round (plotly); arguments of `figures.token_masks`."""
    import plotly.graph_objects as go

    figure = go.Figure()
    sizes = {"visible": 4, "hidden": 6, "outside": 2, "unused": 3}
    for kind, where in token_kinds(context, target, outside).items():
        t, y, x = np.nonzero(where)
        marker = {"symbol": "square", "size": sizes[kind], "color": TOKEN_COLOURS[kind]}
        name = f"{kind} {t.size}"
        hover = "t %{x}, y %{z}, x %{y}"
        figure.add_scatter3d(x=t, y=x, z=y, mode="markers", marker=marker, name=name, hovertemplate=hover)
    axes = {"xaxis_title": "t", "yaxis_title": "x", "zaxis": {"title": "y", "autorange": "reversed"}}
    figure.update_scenes(aspectmode="manual", aspectratio={"x": 1.4, "y": 1, "z": 1}, **axes)
    return figure.update_layout(width=700, height=480, margin={"l": 0, "r": 0, "t": 0, "b": 0})
