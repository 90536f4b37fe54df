"""Training to watch: losses, monitors and time left while it runs, and a button that stops it.

A cell that trains keeps the kernel's main thread, and what widgets say waits in a queue. So training is awaited
(`await watch(...)`): whenever `Lab.training` yields, which is after each checkpoint, the kernel's event loop gets a
moment, and ipykernel 7.4 then delivers the messages of widgets in spite of the running cell. (In 7.0 to 7.3 JupyterLab
has another thread handle them, a subshell, JEP 91.) The button sets a flag; to stop is not to ask for more. An older
kernel reads the flag too late; interrupting it also leaves the last checkpoint.
"""

import asyncio
import copy
import os
import threading
import time

import ipywidgets
from IPython.display import display
from plotly.graph_objects import FigureWidget
from plotly.subplots import make_subplots

from usjepa_nb import charts, pretrain

PANELS = {"losses": ("loss", "jepa", "zero", "ll"), "gradient norm": ("grad_norm",), "learning rate": ("lr",),
          "spread of features (std)": ("std",), "rank": ("rank",), "share of position": ("position_share",)}
MOMENT = 0.1  # s, for the messages of widgets
DASHES = ("solid", "dash", "dot", "dashdot")  # colour is never the only difference


def seconds_left(begun: float, now: float, first: int, step: int, steps: int) -> float:
    """Time left (s) when steps `first` to `step` of `steps` took from `begun` to `now`; nan before any was made."""
    return (now - begun) / (step - first) * (steps - step) if step > first else float("nan")


class Dashboard(ipywidgets.VBox):
    """One run of `runs.Lab.training`, drawn at every checkpoint.

    Args:
        lab, method, options: the run, as for `Lab.encoder`.
        every: steps between checkpoints, and so between pictures and after Stop at most; default: the profile's.

    Attributes:
        button: Stop. `status`: one line. `progress`: the bar. `figure`: plotly, None until there is something to draw.
        run: the `runs.Run` as last drawn; `finished`: whether it is complete.
    """

    def __init__(self, lab, method: str, *, every: int | None = None, **options):
        self.lab = copy.copy(lab)
        self.lab.profile = lab.profile.replace(log_every=every or lab.profile.log_every)
        self.method, self.options, self.spec = method, options, lab.spec(method, **options)
        self.steps, self.stopping = self.spec["settings"]["steps"], threading.Event()
        self.run = self.figure = None
        self.finished = False
        self.button = ipywidgets.Button(description="Stop", icon="stop", disabled=True,
                                        tooltip="end at the next checkpoint; ask again to go on from there")
        self.progress = ipywidgets.IntProgress(0, 0, self.steps, layout={"width": "300px"})
        self.status = ipywidgets.HTML()
        self.button.on_click(self._press)
        super().__init__([ipywidgets.HBox([self.button, self.progress, self.status])])

    def _press(self, _):
        self.stopping.set()
        self.button.disabled = True
        self.status.value = f"stopping at the next checkpoint, {self.lab.profile.log_every} steps away at most"

    async def train(self) -> bool:
        """Train until the run is complete or Stop is pressed; whether it is complete.

        Raises:
            what training raises, once the dashboard says that it ended.
        """
        self.button.disabled = self.stopping.is_set()
        first = pretrain.steps_done(self.lab.folder(self.spec) / "checkpoint.pt")
        training, begun = self.lab.training(self.method, **self.options), time.monotonic()
        try:
            for self.run in training:
                step = len(self.run.history)
                if step < first:  # rows of an earlier session
                    continue
                self._draw(seconds_left(begun, time.monotonic(), first, step, self.steps))
                await asyncio.sleep(MOMENT)
                if self.stopping.is_set() and step < self.steps:
                    self.status.value = f"stopped at step {step} of {self.steps}; ask again and the run goes on"
                    return False
            self.finished = True
            self.status.value = f"complete: {self.steps} steps"
            return True
        except BaseException as error:
            step = pretrain.steps_done(self.lab.folder(self.spec) / "checkpoint.pt")
            self.status.value = f"ended by {type(error).__name__}; step {step} of {self.steps} is on disk"
            raise
        finally:
            training.close()  # gives the run's lock back
            self.button.disabled = True
            self.stopping.clear()

    def _draw(self, left):
        history = self.run.history
        if history.empty:  # a method that is not trained
            return
        new, last = curves(history), self.stopping.is_set() or len(history) == self.steps
        if self.figure is None or last:  # a new widget brings its data along; messages to one still loading get lost
            self.figure = FigureWidget(new)
            self.children = (self.children[0], self.figure)
        else:
            with self.figure.batch_update():
                for trace, source in zip(self.figure.data, new.data, strict=True):
                    trace.x, trace.y = source.x, source.y
        self.progress.value = len(history)
        about = "" if left != left else f", about {left / 60:.1f} minutes to go"
        if not self.stopping.is_set():
            self.status.value = f"step {len(history)} of {self.steps}{about}"


def curves(history):
    """A panel for each entry of `PANELS` that the history has columns of: a plotly figure."""
    shown = {title: [name for name in names if name in history] for title, names in PANELS.items()}
    shown = {title: names for title, names in shown.items() if names}
    rows = -(-len(shown) // 3)
    figure = make_subplots(rows, 3, subplot_titles=list(shown), vertical_spacing=0.3 / rows)
    for k, names in enumerate(shown.values()):
        for name, colour, dash in zip(names, charts.LINES, DASHES, strict=False):
            seen = history[["step", name]].dropna()
            figure.add_scatter(x=seen["step"], y=seen[name], name=name, mode="lines+markers" if k > 2 else "lines",
                               row=k // 3 + 1, col=k % 3 + 1, line={"color": colour, "dash": dash},
                               showlegend=len(names) > 1)
    figure.update_xaxes(title_text="step", title_standoff=2)
    return figure.update_layout(width=1080, height=90 + 230 * rows, template="plotly_white",
                                legend={"orientation": "h", "x": 0, "y": -0.12},
                                margin={"l": 40, "r": 10, "t": 40, "b": 40})


async def watch(lab, method: str, *, every: int | None = None, **options) -> Dashboard:
    """Show a `Dashboard` and train; with ``USJEPA_EXERCISE=1`` Stop is pressed once and the run asked for again."""
    board = Dashboard(lab, method, every=every, **options)
    display(board)
    if os.environ.get("USJEPA_EXERCISE") == "1":
        board.button.click()
        await board.train()
    await board.train()
    return board
