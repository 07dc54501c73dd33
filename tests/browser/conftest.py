"""A Chromium and a JupyterLab for the browser tests.

Without a Chromium the tests are skipped, unless CI or MEDSEG_REQUIRE_BROWSER is set: then a missing browser is a failure.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from medseg_lite.volume import Case

ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
).split()


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


def find_chromium() -> str | None:
    given = os.environ.get("MEDSEG_CHROMIUM")
    if given:
        return given if Path(given).is_file() else None
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return next(filter(None, found), None)


def _missing(reason: str):
    if os.environ.get("CI") or os.environ.get("MEDSEG_REQUIRE_BROWSER"):
        pytest.fail(f"{reason}, but CI or MEDSEG_REQUIRE_BROWSER asks for it")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser():
    path = find_chromium()
    if path is None:
        _missing("no Chromium found (apt-get install chromium, or set MEDSEG_CHROMIUM to its path)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("playwright is not installed (pip install playwright)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A fresh page; the test fails if a script on it fails."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(error.stack or str(error)))
    yield page
    context.close()
    assert not errors, "\n\n".join(errors)


@pytest.fixture
def on_a_phone(browser):
    """A function that opens an exported page as a phone does; the test fails if a script on the page fails."""
    contexts, errors = [], []

    def open_page(path: Path, *, width: int = 360, height: int = 800, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, has_touch=True, **options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(error.stack or str(error)))
        page.goto(path.as_uri())
        page.wait_for_selector("[data-ready]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors, "\n\n".join(errors)


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """Address, token and folder of a JupyterLab that knows nothing of the user's own settings."""
    if find_chromium() is None:
        _missing("no Chromium found (apt-get install chromium, or set MEDSEG_CHROMIUM to its path)")
    folder, home = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("jupyter")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    private = {
        name: str(home / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    }
    # No news pop-up over the notebook.
    settings = home / "JUPYTER_CONFIG_DIR/lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"fetchNews": "false"}')
    token = secrets.token_hex()
    log = (home / "log").open("w+")
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jupyterlab",
            "--allow-root",
            "--no-browser",
            "--ip=127.0.0.1",
            f"--port={port}",
            "--ServerApp.port_retries=0",
            f"--ServerApp.root_dir={folder}",
            "--LabApp.news_url=None",
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
            "--LabApp.extension_manager=readonly",
        ],
        env={**os.environ, **private, "JUPYTER_TOKEN": token, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=log,
        stderr=log,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(150):
            if server.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=1)
                yield address, token, folder
                return
            except OSError:
                time.sleep(0.2)
        log.seek(0)
        pytest.fail(f"JupyterLab did not start:\n{log.read()[-3000:]}")
    finally:
        server.terminate()
        server.wait(20)


def make_case(shape=(40, 48, 32)) -> Case:
    """A ball with a bright core: two sequences, two classes, voxels three times as high as wide."""
    d, h, w = np.indices(shape) - np.reshape([18, 30, 16], (3, 1, 1, 1))
    radius = np.sqrt(d**2 + h**2 + (2 * w) ** 2)
    label = (radius < 10).astype(np.uint8) + 3 * (radius < 5).astype(np.uint8)
    noise = np.random.default_rng(0).normal(0, 4, (2, *shape))
    image = np.stack([100 + 60 * (label > 0) - 0.8 * h, 80 + 90 * (label == 4) + 0.7 * d]) + noise
    return Case(
        image=image.astype(np.float32),
        channels=("flair", "t1c"),
        name="ball",
        label=label,
        affine=np.diag([1, 1, 3, 1]),
        info={"classes": {1: "shell", 4: "core"}},
    )


@pytest.fixture(scope="session")
def case() -> Case:
    return make_case()


@pytest.fixture
def exported(page, tmp_path):
    """`exported(widget)`: the widget's page of its own, opened. By the end of the test it has asked for no other address."""
    requests, path = [], tmp_path / "widget.html"
    page.on("request", lambda request: requests.append(request.url))

    def show(widget):
        widget.to_html(path)
        page.goto(path.as_uri())
        page.wait_for_selector("[data-ready]")
        return page

    yield show
    assert requests == [path.as_uri()]


@pytest.fixture(scope="session")
def axe() -> str:
    """The script of axe-core, which looks for what people with a screen reader or a keyboard cannot use."""
    if importlib.util.find_spec("axe_playwright_python") is None and not os.environ.get("MEDSEG_REQUIRE_BROWSER"):
        pytest.skip("axe-playwright-python is not installed (make installs it)")
    folder = Path(importlib.import_module("axe_playwright_python").__file__).parent
    return (folder / "axe.min.js").read_text(encoding="utf-8")


@pytest.fixture
def findings(axe):
    """`findings(page)`: what axe finds, one line each, by all rules or by those named."""

    def find(page, *rules: str) -> list[str]:
        page.evaluate(axe)
        found = page.evaluate("rules => axe.run(rules.length ? { runOnly: rules } : {})", rules)["violations"]
        return [f"{v['id']}, {len(v['nodes'])} times: {v['nodes'][0]['html'][:200]}" for v in found]

    return find


@pytest.fixture
def check_layout(findings):
    """`check_layout(page, scheme)`: in a theme, on wide and narrow pages, nothing is cut off and axe finds nothing."""

    def check(page, scheme: str) -> None:
        page.emulate_media(color_scheme=scheme)
        for width in (1280, 900, 390, 320):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(50)
            assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0, width
            assert not findings(page), width

    return check
