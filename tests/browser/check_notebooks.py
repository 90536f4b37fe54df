"""`make test-browser`: each notebook in JupyterLab in a headless Chromium, and every widget in it moved by hand.

    pytest tests/browser/check_notebooks.py [-k 03]

The parameters of the smoke profile are injected as for `make test-notebooks`, with longer probes. Screenshots from
before and after each move land in data_cache/browser/. (Not called test_*.py: `make test` needs no browser.)
"""

import io
import os
import re
import shutil
import subprocess
import sys
import time

import nbformat
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright
from scipy.ndimage import binary_dilation
from server import ROOT, chromium, jupyterlab

FOLDER = ROOT / "data_cache" / "browser"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
WIDTH = 1280  # px
MINUTES = 15  # for all cells of one notebook
ROUNDS = 4  # of moving what has not answered yet
CONTROLS = {  # what can be moved: its class in ipywidgets
    "slider": ".widget-slider", "dropdown": ".widget-dropdown", "checkbox": ".widget-checkbox",
    "radio": ".widget-radio", "select": ".widget-select", "togglebuttons": ".widget-toggle-buttons",
    "togglebutton": "button.widget-toggle-button:not(.widget-toggle-buttons *)",
    "play": ".widget-play", "button": "button.widget-button:not(.widget-play *):not(.widget-toggle-buttons *)",
}
FOCUS = ".noUi-handle, select, input, button, textarea"  # inside a control: what Tab has to reach
STUCK = ("e => e.disabled || e.querySelector(':disabled')"
         " || e.querySelector('select')?.options.length === 1")
ERRORS = "[data-mime-type='application/vnd.jupyter.error']"


@pytest.fixture(scope="session")
def lab():
    FOLDER.mkdir(parents=True, exist_ok=True)
    with jupyterlab(FOLDER) as server:
        yield server


@pytest.fixture(scope="session")
def browser():
    flags = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-background-networking"]
    flags += [] if os.geteuid() else ["--no-sandbox"]  # root has no other way
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": WIDTH, "height": 1400})
    page.set_default_timeout(60_000)
    yield page
    page.close()


def prepare(notebook):
    """A copy with parameters in and without any output: its place on the server, and how many cells it has to run."""
    copy, profile = FOLDER / "notebooks" / notebook.name, FOLDER / "browser.yaml"
    smoke = (ROOT / "profiles" / "smoke.yaml").read_text()
    few, enough = re.subn(r"(?m)^probe_min_steps: *\d+", "probe_min_steps: 60", smoke)
    assert enough == 1
    profile.write_text(few)  # after smoke's own 6 steps a probe finds nothing, and there is nothing to fade
    given = {"profile": profile, "cache": FOLDER / "cache", "seed": 0}
    options = [word for name, value in given.items() for word in ("-p", name, str(value))]
    subprocess.run([sys.executable, "-m", "usjepa_nb.execute", notebook, copy, "--prepare-only", *options],
                   check=True, cwd=ROOT)
    nb = nbformat.read(copy, as_version=4)
    for cell in code_cells(nb):
        cell.outputs, cell.execution_count = [], None  # what is seen later was made here
    nbformat.write(nb, copy)
    return copy.relative_to(ROOT).as_posix(), len(code_cells(nb))


def code_cells(nb):
    return [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]


def run_all(page, lab, place, cells):
    """Open a notebook, run its `cells` code cells and wait for the last; the errors that they show."""
    page.goto(f"{lab.url}/doc/tree/{place}?token={lab.token}")
    prompts = page.locator(".jp-Notebook .jp-CodeCell .jp-InputArea-prompt")
    prompts.first.wait_for()
    wait(page, "the kernel", lambda: lab.kernel_is_idle(place), 3)  # told to run before, JupyterLab asks for a kernel
    page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']").first.wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    errors, wanted = page.locator(ERRORS), [f"[{k + 1}]:" for k in range(cells)]
    wait(page, f"the last of {cells} cells", lambda: errors.count() or
         [prompt for prompt in prompts.all_inner_texts() if prompt in wanted] == wanted, MINUTES)
    return errors.all_inner_texts()


def wait(page, what, done, minutes):
    end = time.monotonic() + 60 * minutes
    while not done():
        assert time.monotonic() < end, f"waited {minutes} minutes for {what}"
        page.wait_for_timeout(500)


def look(area):
    """The output as it is on screen, controls painted over: uint8 [H, W, 3]."""
    masks = [area.locator(selector) for selector in CONTROLS.values()]
    png = area.screenshot(mask=masks, mask_color="#ff00ff", animations="disabled", caret="hide")
    return np.array(Image.open(io.BytesIO(png)).convert("RGB"))


def differ(before, after):
    """Do two looks differ beside the controls? The ring around a control in focus (5 px) is not counted."""
    if before.shape != after.shape:
        return True
    controls = (before == (255, 0, 255)).all(-1) | (after == (255, 0, 255)).all(-1)
    return ((before != after).any(-1) & ~binary_dilation(controls, iterations=5)).sum() > 20


def steady(page, area):
    """The output once two looks in a row are equal."""
    before = look(area)
    for _ in range(40):
        page.wait_for_timeout(250)
        if not differ(before, after := look(area)):
            return after
        before = after
    raise AssertionError("the output never stands still")


def changes(page, area, before, seconds):
    """Does the output come to look different?"""
    end = time.monotonic() + seconds
    while not differ(before, look(area)):
        if time.monotonic() > end:
            return False
        page.wait_for_timeout(250)
    return True


def moves(area, kind, control):
    """Ways to move a control, most natural first; each is tried until the output looks different."""
    if kind == "slider":
        handle = control.locator(".noUi-handle").first
        for key in ("ArrowRight", "ArrowLeft", "ArrowLeft", "End", "Home"):
            yield lambda key=key: handle.press(key)
    elif kind in ("dropdown", "select"):
        box = control.locator("select")
        now = box.evaluate("box => box.selectedIndex")
        for index in range(box.locator("option").count()):
            if index != now:
                yield lambda index=index: box.select_option(index=index)
    elif kind == "radio":
        for choice in control.locator("input").all():
            yield lambda choice=choice: (choice.check(), press_all(area))
    elif kind == "togglebuttons":
        for button in control.locator("button:not(.mod-active)").all():
            yield button.click
    elif kind == "play":
        yield control.locator("button").first.click
    else:
        target = control.locator("input").first if kind == "checkbox" else control
        for _ in range(2):
            yield target.click


def press_all(area):
    """Radio buttons that wait for a button get it pressed."""
    for button in area.locator(CONTROLS["button"]).all():
        if button.is_enabled():
            button.click()


def name_of(control, kind):
    label = control.locator(".widget-label, .widget-label-basic").first
    text = label.inner_text() if label.count() else control.inner_text()
    return f"{kind} {text.strip()[:40]}".strip()


def save(area, folder, name):
    area.screenshot(path=folder / f"{re.sub(r'[^A-Za-z0-9]+', '_', name).strip('_')}.png")


def move_everything(page, area, folder, where):
    """Move each control of one output; sentences about those that do nothing.

    One that does nothing (opacity where nothing was found, "to ED" at ED) gets another chance under other settings.
    """
    todo = [(f"{where} {name_of(control, kind)} {k}", kind, control)
            for kind, selector in CONTROLS.items() for k, control in enumerate(area.locator(selector).all())
            if control.is_visible() and not control.evaluate(STUCK)
            and not (kind == "button" and area.locator(CONTROLS["radio"]).count())]  # pressed after each choice
    for _ in range(ROUNDS):
        todo = [(name, kind, control) for name, kind, control in todo
                if not answers(page, area, folder, name, kind, control)]
        if not todo:
            break
        for menu in area.locator(f"{CONTROLS['dropdown']} select").all():
            menu.evaluate("e => { e.selectedIndex = (e.selectedIndex + 1) % e.options.length; "
                          "e.dispatchEvent(new Event('change', {bubbles: true})); }")
    yield from (f"{name}: moved, and nothing next to it changed" for name, *_ in todo)
    if (wrong := area.get_by_text("cannot be drawn")).count():
        yield f"{where}: {wrong.first.inner_text()}"


def answers(page, area, folder, name, kind, control):
    """Move one control; did the output change?"""
    control.scroll_into_view_if_needed()
    before = steady(page, area)
    save(area, folder, f"{name} before")
    moved = False
    for move in moves(area, kind, control):
        move()
        if moved := changes(page, area, before, 20 if kind == "play" else 8):
            break
    if kind == "play":
        control.locator("button").first.click()  # pause
    save(area, folder, f"{name} after")
    return moved


def click_plots(page, area, folder, where):
    """Click points of each FigureWidget; where clicks are all there is to an output, one must have an answer."""
    alone = not any(area.locator(selector).count() for selector in CONTROLS.values())
    for k, plot in enumerate(area.locator(".jupyter-widgets .js-plotly-plot, .jupyter-widgets.js-plotly-plot").all()):
        plot.scroll_into_view_if_needed()
        before, answered = steady(page, area), False
        save(area, folder, f"{where} plot {k} before")
        flat = plot.locator(".nsewdrag")  # a 3-D scene has none
        box = (flat.first if flat.count() else plot).bounding_box()
        for x, y in ((0.5, 0.5), (0.3, 0.4), (0.7, 0.6), (0.4, 0.75), (0.6, 0.25)):
            page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])
            page.mouse.move(2, 2)  # no hover label in the picture
            if answered := changes(page, area, before, 3):
                break
        save(area, folder, f"{where} plot {k} after")
        if alone and not answered:
            yield f"{where} plot {k}: five clicks, and nothing changed"


def not_by_tab(page, area):
    """Controls that Tab does not come to, from the first one of the output on."""
    inside = ", ".join(f"{control} {part.strip()}" for control in CONTROLS.values() for part in FOCUS.split(","))
    targets = [target for target in area.locator(f"{inside}, {CONTROLS['button']}").all() if target.is_visible()]
    wanted = {}
    for k, target in enumerate(targets):
        skip = "e => e.disabled || (e.type === 'radio' && !e.checked) || e.closest('.widget-play, .widget-readout')"
        if not target.evaluate(f"e => Boolean(({skip})(e))"):
            wanted[str(k)] = target
            target.evaluate("(e, k) => { e.dataset.reach = k; }", str(k))
    if not wanted:
        return []
    next(iter(wanted.values())).focus()
    reached = set()
    for _ in range(4 * len(targets) + 10):
        reached.add(page.evaluate("document.activeElement.dataset.reach"))
        page.keyboard.press("Tab")
    return [wanted[k].evaluate("e => e.outerHTML.slice(0, 120)") for k in wanted if k not in reached]


def too_wide(page):
    """Outputs, and the page itself, that leave the window."""
    wide = page.evaluate("""width => [...document.querySelectorAll('.jp-Notebook .jp-OutputArea-output')]
        .filter(e => e.scrollWidth > e.clientWidth + 2 || e.getBoundingClientRect().right > width)
        .map(e => `${e.closest('.jp-Cell').querySelector('.jp-InputPrompt').textContent} ${e.scrollWidth} px wide in `
                  + `${e.clientWidth}: ${e.textContent.trim().slice(0, 60)}`)""", WIDTH)
    whole = page.evaluate("document.documentElement.scrollWidth")
    return wide + ([f"the page is {whole} px wide"] if whole > WIDTH else [])


def test_without_the_token_there_is_no_answer(lab):
    assert lab.get("/api/contents", lab.token)[0] == 200
    for token in (None, "0" * len(lab.token)):
        assert lab.get("/api/contents", token)[0] == 403
        assert lab.get("/api/kernels", token)[0] == 403
        status, place, _ = lab.get("/lab", token)
        assert status == 302 and place.startswith("/login")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_in_a_browser(notebook, lab, page):
    folder = FOLDER / notebook.stem
    shutil.rmtree(folder, ignore_errors=True)
    assert run_all(page, lab, *prepare(notebook)) == []
    page.wait_for_timeout(1000)
    found = [f"too wide: {line}" for line in too_wide(page)]
    areas = page.locator(".jp-CodeCell .jp-OutputArea-child:has(.jupyter-widgets)")
    for area in areas.all():
        prompt = area.locator("xpath=ancestor::*[contains(@class, 'jp-CodeCell')]").locator(".jp-InputPrompt").first
        where = f"cell {prompt.inner_text().strip('[]: ')}"
        print(f"{notebook.stem}, {where}", flush=True)
        area.scroll_into_view_if_needed()
        found += [f"{where}: Tab does not reach {line}" for line in not_by_tab(page, area)]
        found += [*move_everything(page, area, folder, where), *click_plots(page, area, folder, where)]
    found += [f"after moving: {text}" for text in [*page.locator(ERRORS).all_inner_texts(), *too_wide(page)]]
    assert not found, "\n".join([f"{notebook.name} (screenshots in {folder.relative_to(ROOT)}):", *found])
    assert not notebook.stem.startswith("00") or areas.count(), "notebook 00 shows no widget at all"
