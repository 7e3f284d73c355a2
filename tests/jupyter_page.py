"""A notebook in a real JupyterLab and a real browser, for the tests of widgets."""

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def jupyterlab(folder: Path):
    """A JupyterLab with its settings in `folder`; yields its address."""
    port = free_port()
    settings = {
        name: str(folder / name.lower())
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        "--ServerApp.disable_check_xsrf=True",
        f"--ServerApp.root_dir={folder}",
        "--LabApp.news_url=",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def answers(address: str, seconds: float) -> bool:
    """Whether the server at the address answers within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            return urlopen(address + "/api", timeout=5).status == 200
        except (URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    return False


def write_notebook(path: Path, sources: list[str]) -> None:
    """A notebook of these cells, not run."""
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, path)


@contextmanager
def opened(folder: Path, sources: list[str], width: int, height: int):
    """A notebook of these cells, run from top to bottom in a browser: yields the page and playwright."""
    playwright = pytest.importorskip("playwright.sync_api")
    write_notebook(folder / "small.ipynb", sources)
    with jupyterlab(folder) as address, playwright.sync_playwright() as p:
        assert answers(address, 90), (folder / "lab.log").read_text()[-2000:]
        browser = p.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page(viewport={"width": width, "height": height})
        page.goto(f"{address}/lab/tree/small.ipynb")
        page.locator(".jp-CodeCell .cm-content").first.click(timeout=120_000)
        # Cells that are run before the kernel is there are silently not run.
        idle = page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']")
        idle.first.wait_for(state="attached", timeout=120_000)
        for _ in sources:
            page.keyboard.press("Shift+Enter")
        yield page, playwright
        browser.close()


def drag(page, handle, pixels: int) -> None:
    """Pull a handle to the right with the mouse, in steps as a hand does."""
    box = handle.bounding_box()
    x = box["x"] + box["width"] / 2
    y = box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + pixels, y, steps=8)
    page.mouse.up()
