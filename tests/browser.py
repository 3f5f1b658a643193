"""JupyterLab in a headless Chromium, for the tests that need eyes.

What keeps these tests from flaking: wait for states that stay (a counter that grows, an end that is named), let a run
go on until it is stopped, find widgets by classes of their own, drive JupyterLab by its commands and not by its menus.
"""
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from tests.notebooks import environment

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]
SETTINGS = {  # no news, and cells below the fold are rendered too
    "@jupyterlab/apputils-extension/notification": {
        "fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
}
KERNEL = "window.jupyterapp.shell.currentWidget.sessionContext.session.kernel"
PATIENCE_MS = 240_000  # for a busy machine; an idle one needs a tenth


def chromium() -> str:
    "The browser's path; the test fails with what to do where there is none."
    from playwright.sync_api import sync_playwright

    names = [os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome"]
    found = next(filter(None, map(shutil.which, filter(None, names))), None)
    if found is None:
        with sync_playwright() as playwright:
            found = playwright.chromium.executable_path
    if not Path(found).exists():
        pytest.fail("this test looks at a panel in a browser, and there is none: run `apt-get install chromium`, or "
                    "`python -m playwright install chromium`, or set CHROMIUM to the path of one", pytrace=False)
    return found


def free_port() -> int:
    "A port that nobody listens on."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def lab(root):
    "JupyterLab on loopback, its settings, log and home in a folder of its own; yields its address."
    port, own = free_port(), Path(tempfile.mkdtemp(prefix="lab_"))
    for name, value in SETTINGS.items():
        file = own / "settings" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))
    places = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
              "JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython"}
    env = {**environment(own / "home"), "OMP_NUM_THREADS": "1", **{key: str(own / at) for key, at in places.items()}}
    (own / "home").mkdir()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
               f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=",
               f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True"]
    with open(own / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        yield wait_for_server(f"http://127.0.0.1:{port}", server, own / "lab.log")
    finally:
        server.terminate()
        server.wait(30)
        shutil.rmtree(own, ignore_errors=True)


def wait_for_server(url, server, log, timeout_s=180) -> str:
    "The address, once it answers."
    end = time.monotonic() + timeout_s
    while True:
        try:
            urllib.request.urlopen(f"{url}/api/status", timeout=5)
            return url
        except OSError:
            if time.monotonic() > end or server.poll() is not None:
                pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-3000:]}", pytrace=False)
            time.sleep(0.3)


def open_notebook(context, url, root, name, cells):
    "Write a notebook of code cells, open it alone in a page, run all cells."
    import nbformat

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in cells])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, Path(root) / name)
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto(f"{url}/doc/tree/{name}")
    page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status "
                           "=== 'idle'")
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    return page


def in_kernel(page, code) -> None:
    "Run code in the notebook's kernel; an exception there fails the test."
    reply = page.evaluate(f"""async code => {{
        const reply = await {KERNEL}.requestExecute({{code}}).done
        return reply.content.status === 'ok' ? '' : `${{reply.content.ename}}: ${{reply.content.evalue}}`
    }}""", code)
    assert not reply, reply


@contextlib.contextmanager
def notebook_page(cells, width=1200, height=1000):
    "A page with a notebook of these cells, running; what the page's scripts complained about fails the test."
    from playwright.sync_api import sync_playwright

    path, complaints = chromium(), []
    with tempfile.TemporaryDirectory(prefix="browser_") as root, lab(root) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS, timeout=PATIENCE_MS)
        context = browser.new_context(viewport={"width": width, "height": height}, device_scale_factor=1.5)
        page = open_notebook(context, url, root, "page.ipynb", cells)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        try:
            yield page
        finally:
            with contextlib.suppress(Exception):
                page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
            browser.close()
    assert not complaints, complaints
