"""A real ComfyUI for the tests in this folder.

`tests/run.py` starts this session once a host, in that host's own virtual environment, with its folder in REWIND_HOST.
Without that variable every test here is skipped, and counted. So test modules import nothing of the host at module
scope: they take the fixture `host` or `server`, or import inside the test.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import comfy_host
import fine_tuning
import host_state
import pytest
import tiny_models

HOST = os.environ.get("REWIND_HOST")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if not HOST and here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a ComfyUI: run `make test`"))


def pytest_report_header() -> str:
    return f"host: {HOST or 'none'}"


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> comfy_host.Host:
    """ComfyUI in this process, the pack loaded as the host loads it. See comfy_host.Host."""
    booted = comfy_host.boot(Path(HOST), tmp_path_factory.mktemp("host"))
    booted.state_before = host_state.snapshot(booted.path)
    booted.nodes_before = set(booted.mappings)
    booted.loaded = booted.load_pack()
    booted.state_after = host_state.snapshot(booted.path)
    return booted


@pytest.fixture(scope="module", autouse=True)
def inversions_taken_away() -> Iterator[None]:
    """What a module saved in models/inversions: other modules read the list of files there as a node's choices."""
    yield
    if "folder_paths" in sys.modules:
        import folder_paths

        if "inversions" in folder_paths.folder_names_and_paths:
            for file in Path(folder_paths.get_folder_paths("inversions")[0]).rglob("*.safetensors"):
                file.unlink()
            folder_paths.filename_list_cache.clear()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[comfy_host.Server]:
    """A ComfyUI server with the pack, for tests through its HTTP API and websocket. See comfy_host.Server."""
    running = comfy_host.Server(Path(HOST), tmp_path_factory.mktemp("server"))
    yield running
    running.stop()


@pytest.fixture(scope="session")
def trained(host: comfy_host.Host, server: comfy_host.Server) -> bool:
    """Whether the embedded model's trained weights are there; random ones are put in their place otherwise."""
    tiny_models.ensure_weights(host, host.pack)
    return tiny_models.ensure_weights(host, server.base / "custom_nodes" / comfy_host.PACK_NAME)


# --- what is fine-tuned -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def svd(host: comfy_host.Host, tmp_path_factory: pytest.TempPathFactory) -> fine_tuning.Setting:
    return fine_tuning.svd(host, tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def wan(host: comfy_host.Host) -> fine_tuning.Setting:
    return fine_tuning.wan(host)


@pytest.fixture(params=["svd", "wan"])
def setting(request: pytest.FixtureRequest) -> fine_tuning.Setting:
    """Each family that can be fine-tuned."""
    return request.getfixturevalue(request.param)
