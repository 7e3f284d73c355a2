"""Explorers draw whenever they are opened: on a page that is six times slower, while their state changes."""

import json
import os
import time
from urllib.request import Request, urlopen

import pytest
from jupyter_page import CHROMIUM, answers, jupyterlab, write_notebook

from oprd_nb.runs import synthetic_run

THROTTLE = 6
OPENINGS = int(os.environ.get("OPRD_OPENINGS", "2"))
# The second and the last cell change what the first and the third show, while the page still loads.
CELLS = [
    """import numpy as np, pandas as pd
from oprd_nb.explore.layers import LayerExplorer
from oprd_nb.explore.dashboard import RunDashboard
rng = np.random.default_rng(0)
tokens = pd.concat([
    pd.DataFrame({{"response": r, "position": range(30), "length": 30, "text": "a"}}).assign(
        **{{"a": rng.random(30), "b": rng.random(30)}}).rename(columns={{"a": 1, "b": 2}})
    for r in range(3)])
explorer = LayerExplorer(tokens)
explorer""",
    "explorer.response.value = 2",
    """dashboard = RunDashboard({folder!r})
dashboard.start(every=0.3)
dashboard""",
    "dashboard.axis.value = 'seconds'",
]

# On this page each widget's script comes later than anywidget waits for it: it drops the changes that follow.
TOO_SLOW = "const timeout = AbortSignal.timeout; AbortSignal.timeout = () => timeout.call(AbortSignal, 0);"


def delete_sessions(address: str) -> None:
    """End every kernel of the server."""
    for session in json.load(urlopen(f"{address}/api/sessions")):
        urlopen(Request(f"{address}/api/sessions/{session['id']}", method="DELETE"))


def run_cells(page, number: int, all_at_once: bool) -> None:
    """Run so many cells, each when the one before is finished, or all at once."""
    first = page.locator(".jp-CodeCell .cm-content").first
    idle = page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']")
    idle.first.wait_for(state="attached", timeout=180_000)
    prompt = page.locator(".jp-CodeCell .jp-InputPrompt").first
    for _ in range(30):
        # A cell that is run before the kernel is connected is silently not run.
        dialog = page.locator("dialog.jp-Dialog .jp-mod-accept")
        if dialog.count():  # which kernel? the one that is offered
            dialog.first.click(timeout=60_000)
        first.click(timeout=180_000)
        page.keyboard.press("Shift+Enter")
        page.wait_for_timeout(1000)
        if prompt.text_content().strip() != "[ ]:":
            break
    for _ in range(number - 1):
        if not all_at_once:
            page.wait_for_timeout(300)
            idle.first.wait_for(state="attached", timeout=180_000)
        page.keyboard.press("Shift+Enter")


@pytest.mark.browser
@pytest.mark.timeout(3600)
def test_every_opening_draws_under_throttling(tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    folder = synthetic_run(tmp_path / "run", "oprd", steps=40, problems=5)
    sources = [cell.format(folder=str(folder)) for cell in CELLS]
    times = []
    with jupyterlab(tmp_path) as address, sync_api.sync_playwright() as playwright:
        assert answers(address, 120), (tmp_path / "lab.log").read_text()[-2000:]
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        for number in range(OPENINGS):
            write_notebook(tmp_path / f"open{number}.ipynb", sources)
            page = browser.new_page(viewport={"width": 1300, "height": 2400})
            if number % 2:
                page.add_init_script(TOO_SLOW)
            page.goto(f"{address}/lab/tree/open{number}.ipynb?reset")
            cdp = page.context.new_cdp_session(page)
            page.locator(".jp-CodeCell .cm-content").first.wait_for(timeout=180_000)
            cdp.send("Emulation.setCPUThrottlingRate", {"rate": THROTTLE})
            started = time.perf_counter()
            run_cells(page, len(sources), all_at_once=number % 2 == 0)
            expect = sync_api.expect
            titles = page.locator(".js-plotly-plot .gtitle")
            expect(titles.filter(has_text="response 2").first).to_be_visible(timeout=180_000)
            expect(titles.filter(has_text="Layer 2")).to_be_visible(timeout=180_000)
            axes = page.locator(".js-plotly-plot .xtitle").filter(has_text="Training time, seconds")
            expect(axes.first).to_be_visible(timeout=180_000)
            drawn = page.locator(".js-plotly-plot").count()
            assert drawn >= 6, f"opening {number}: {drawn} panels"
            assert page.get_by_text("loading the figure").count() == 0
            times.append(time.perf_counter() - started)
            print(f"opening {number}: {drawn} panels after {times[-1]:.1f} s")
            if number == 0:
                cdp.send("Emulation.setCPUThrottlingRate", {"rate": 1})
                menu = page.locator(".widget-dropdown select").first
                clicked = time.perf_counter()
                menu.select_option(index=1)
                expect(titles.filter(has_text="response 0").first).to_be_visible(timeout=30_000)
                print(f"a choice is shown after {time.perf_counter() - clicked:.2f} s")
            if shots := os.environ.get("OPRD_SHOTS"):
                page.screenshot(path=f"{shots}/opening{number}.png")
            page.close()
            delete_sessions(address)
        browser.close()
    assert len(times) == OPENINGS
