"""A real ComfyUI's real page for the tests in this folder, in a headless Chromium.

`tests/run.py` starts this session once a host, in that host's own virtual environment, with its folder in REWIND_HOST.
Without that variable or without a Chromium every test here is skipped, and counted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import comfy_host
import comfy_page
import pytest

HOST = os.environ.get("REWIND_HOST")
FAILURES = comfy_host.ROOT / "output" / "browser"  # what the page looked like when a test failed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    missing = "a ComfyUI: run `make test`" if not HOST else "" if comfy_page.chromium() else "Chromium"
    for item in items:
        if missing and here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"needs {missing}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    page = getattr(item, "funcargs", {}).get("page")
    if report.failed and page is not None:
        FAILURES.mkdir(parents=True, exist_ok=True)
        page.page.screenshot(path=FAILURES / f"{item.name}.png")
    return report


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[comfy_host.Server]:
    """A ComfyUI server with the pack, and a user who has been there before."""
    base = tmp_path_factory.mktemp("server")
    comfy_page.prepare_user(base)
    comfy_page.give_files(base, (comfy_host.ROOT / "workflows").glob("*.json"))
    running = comfy_host.Server(Path(HOST), base)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def window(server: comfy_host.Server) -> Iterator[comfy_page.ComfyPage]:
    """The page, opened once: it takes seconds to start."""
    with comfy_page.browser() as browser:
        yield comfy_page.ComfyPage(browser, server)


@pytest.fixture
def page(window: comfy_page.ComfyPage) -> Iterator[comfy_page.ComfyPage]:
    """The page with an empty graph; the test fails if the page or its server complained while it ran."""
    window.reset()
    yield window
    assert window.problems == []


@pytest.fixture(scope="session")
def info(server: comfy_host.Server) -> dict[str, dict]:
    """Rewind's nodes as the server describes them to the page."""
    return {name: node for name, node in server.object_info().items() if name.startswith("Rewind")}
