"""ipywidgets over figures: controls above, the picture below. No result depends on a widget's state.

A notebook shows the plain figure first and the widget over the same function after it. An exception in a
callback is lost when a notebook runs headless. With the environment variable ``USJEPA_EXERCISE=1`` each
control is therefore moved once to both its ends while the widget is built: there an exception stops the cell.
"""

import html
import inspect
import json
import os
import sys

import ipywidgets
import matplotlib.figure

from .. import figures


def explore(figure_function, **controls):
    """Controls over `figure_function(**values)`, drawn again whenever one moves.

    Args:
        figure_function: returns a matplotlib or plotly figure.
        controls: one per argument, as in `ipywidgets.interact`: (low, high[, step]) or a number for a slider,
            a list for a menu, a bool for a tick box, or any widget with a value. Arrow keys move sliders.

    Returns:
        A box; `box.controls[name]` is the widget of a control, `box.picture` shows the figure (an Image of
        PNG bytes, or an Output for plotly), `box.message` the line about what went wrong.

    Raises:
        ValueError: a control that is no widget and no abbreviation of one. Whatever `figure_function` raises
            goes on to who moved the control, after one line about it has been shown.
    """
    signature = inspect.signature(figure_function).parameters.values()
    defaults = {p.name: p.default for p in signature}  # the widget starts where the plain figure was
    widgets = {name: _control(name, control, defaults.get(name, inspect.Parameter.empty))
               for name, control in controls.items()}
    message = ipywidgets.HTML()

    def figure():
        return figure_function(**{name: widget.value for name, widget in widgets.items()})

    def draw(change):
        try:
            _put(picture, figure())
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            message.value = f"<b>This setting cannot be drawn.</b> {html.escape(text)}"
            raise
        message.value = ""

    first = figure()
    image = isinstance(first, matplotlib.figure.Figure)
    natural = {"align_self": "flex-start", "max_width": "100%"}  # not stretched to the width of the notebook
    picture = ipywidgets.Image(layout=natural) if image else ipywidgets.Output()
    _put(picture, first)
    for widget in widgets.values():
        widget.observe(draw, names="value")
    row = ipywidgets.Box([*widgets.values()], layout={"flex_flow": "row wrap"})
    box = ipywidgets.VBox([row, message, picture])
    box.controls, box.picture, box.message = widgets, picture, message
    if os.environ.get("USJEPA_EXERCISE") == "1":
        exercise(box)
    return box


def exercise(box):
    """Move every control of an `explore` box to its first and its last value, and back."""
    for widget in box.controls.values():
        before = widget.value
        for value in _ends(widget):
            widget.value = value
        widget.value = before


def scrub(frames, masks, reference=None, spacing=(1, 1), titles=None):
    """The beat under a slider: frames uint8 [F, H, W] with masks and reference; Play lets it beat."""
    last = len(frames) - 1

    def draw(frame, opacity):
        title = f"frame {frame} of {last}" if titles is None else titles[frame]
        outline = None if reference is None else reference[frame]
        return figures.overlay(frames[frame], masks[frame], outline, spacing, opacity, title)

    box = explore(draw, frame=(0, last), opacity=(0.0, 1.0, 0.05))
    play = ipywidgets.Play(min=0, max=last, interval=150, repeat=True)
    ipywidgets.jslink((play, "value"), (box.controls["frame"], "value"))
    box.children = (play, *box.children)
    return box


def _control(name, control, default):
    widget = ipywidgets.interactive.widget_from_abbrev(control, default)
    if not isinstance(widget, ipywidgets.ValueWidget):
        raise ValueError(f"{name}={control!r} is no control: give (low, high), a list, a bool or a widget.")
    widget.description = widget.description or name.replace("_", " ")
    widget.style.description_width = "initial"
    return widget


def _ends(widget):
    """First and last value of a control; none for one that has no ends, such as a text."""
    if isinstance(widget.value, bool):
        return [False, True]
    if hasattr(widget, "options"):
        values = [option[1] if isinstance(option, tuple) else option for option in widget.options]
        return [(value,) if isinstance(widget.value, tuple) else value for value in (values[0], values[-1])]
    if hasattr(widget, "min"):
        low, high = widget.min, widget.max
        return [(low, low), (high, high)] if isinstance(widget.value, tuple) else [low, high]
    return []


def _put(picture, figure):
    """Show a figure; one that pyplot holds is closed."""
    if isinstance(picture, ipywidgets.Image):
        picture.value = figures.png(figure)
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close(figure)
    else:
        data = {"application/vnd.plotly.v1+json": json.loads(figure.to_json())}
        picture.outputs = ({"output_type": "display_data", "data": data, "metadata": {}},)
