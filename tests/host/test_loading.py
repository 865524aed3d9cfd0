"""The pack loads the way the host loads it, says what it is, and leaves the host alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import comfy_host
import host_state
import pytest

GOLDEN = Path(__file__).parent / "golden" / "schemas.json"
# What a saved workflow depends on. Words (tooltips, descriptions) may change freely.
KEPT_OPTIONS = ("default", "min", "max", "step", "options", "multiline", "image_upload", "video_upload")


def plain(value: object) -> object:
    """The value as JSON gives it back."""
    return json.loads(json.dumps(value))


def schema_of(cls: type) -> dict:
    """What a saved workflow depends on, of one node."""
    info = cls.GET_NODE_INFO_V1()
    inputs = []
    for part in ("required", "optional"):
        for name, (kind, *rest) in info["input"].get(part, {}).items():
            options = rest[0] if rest else {}
            inputs.append(
                {"name": name, "type": kind, "part": part} | {k: options[k] for k in KEPT_OPTIONS if k in options}
            )
    outputs = [list(pair) for pair in zip(info["output"], info["output_name"], strict=True)]
    kept = {k: info[k] for k in ("display_name", "category", "output_node")}
    return plain(kept | {"inputs": inputs, "outputs": outputs})


def in_fresh_process(base: Path, script: str) -> str:
    """Run Python in a process where the host is booted as `host` but the pack not loaded; all that it printed."""
    start = (
        "import logging, sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(comfy_host.__file__).parent)!r})\n"
        "import comfy_host\n"
        f"host = comfy_host.boot(Path({os.environ['REWIND_HOST']!r}), Path({str(base)!r}))\n"
        "logging.getLogger().addHandler(logging.StreamHandler(sys.stdout))\n"
        "print('BOOTED', flush=True)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", start + script], cwd=base, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.split("BOOTED", 1)[1]


def test_the_pack_loads_under_another_name(host):
    assert host.loaded is True
    assert host.pack.name != comfy_host.ROOT.name
    assert len(host.own_nodes()) > 0
    assert set(host.mappings) - host.nodes_before == set(host.own_nodes())


def test_nothing_of_the_host_changes(host):
    assert host_state.changes(host.state_before, host.state_after) == []


def test_the_snapshot_sees_a_change(host, monkeypatch):
    """The test above can fail: a patched method, a longer list and a replaced function are all seen."""
    import comfy.samplers
    import comfy.sd
    import comfy.supported_models

    before = host_state.snapshot(host.path)
    monkeypatch.setattr(comfy.samplers.KSAMPLER, "sample", lambda *a: None)
    monkeypatch.setattr(comfy.sd, "load_lora_for_models", lambda *a: None)
    monkeypatch.setattr(comfy.samplers, "KSAMPLER_NAMES", [*comfy.samplers.KSAMPLER_NAMES, "mine"])
    comfy.supported_models.models.append(object)
    try:
        seen = " ".join(host_state.changes(before, host_state.snapshot(host.path)))
    finally:
        comfy.supported_models.models.pop()
    for name in ("comfy.samplers.KSAMPLER.sample", "comfy.sd.load_lora_for_models", "KSAMPLER_NAMES", "models.models"):
        assert name in seen


def test_ids_are_literals_in_the_source(host):
    """ComfyUI Manager finds nodes by reading the source."""
    found = set()
    for file in (comfy_host.ROOT / "nodes").rglob("*.py"):
        found |= set(re.findall(r"\bnode_id\s*=\s*[\"'](\w+)[\"']", file.read_text(encoding="utf-8")))
    assert found
    assert found == set(host.own_nodes())
    assert all(name.startswith("Rewind") for name in found)


def test_schemas_are_the_golden_ones(host):
    schemas = {name: schema_of(cls) for name, cls in sorted(host.own_nodes().items())}
    if os.environ.get("REWIND_UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(schemas, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert sorted(schemas) == sorted(golden)
    for name, schema in schemas.items():
        assert schema == golden[name], f"{name} changed; if that is meant: REWIND_UPDATE_GOLDEN=1 make test"


def test_every_input_has_a_tooltip_and_every_node_a_description(host):
    for name, cls in host.own_nodes().items():
        info = cls.GET_NODE_INFO_V1()
        assert info["description"], name
        assert info["category"].startswith("Rewind"), name
        for part in ("required", "optional"):
            for key, (_, *rest) in info["input"].get(part, {}).items():
                assert rest and rest[0].get("tooltip"), f"{name}.{key} has no tooltip"


def test_all_nodes_load_without_diffusers(host, tmp_path):
    script = "sys.modules['diffusers'] = None\nassert host.load_pack()\nprint(sorted(host.own_nodes()))\n"
    printed = in_fresh_process(tmp_path, script)
    assert printed.strip().splitlines()[-1] == str(sorted(host.own_nodes()))


def test_an_older_host_gets_one_clear_message(host, tmp_path):
    """The message once, naming both versions, and no traceback from the pack's inside."""
    script = (
        "import comfyui_version\ncomfyui_version.__version__ = '0.6.0'\nhost.load_pack()\nprint(host.own_nodes())\n"
    )
    printed = in_fresh_process(tmp_path, script)
    assert printed.strip().splitlines()[-1] == "{}"
    lines = [line for line in printed.splitlines() if "0.7.0" in line]
    assert len(lines) == 1, printed
    assert "0.6.0" in lines[0]
    assert "Traceback" not in printed


@pytest.mark.parametrize("route", ["/object_info", "/extensions"])
def test_the_server_knows_the_pack(host, server, route):
    assert host.own_nodes()
    answer = server.get(route)
    if route == "/object_info":
        assert set(host.own_nodes()) <= set(answer)
    else:
        assert not any("rewind/" in path for path in answer), "registered a second time under the project's name"


def test_the_server_started_cleanly(server):
    log, ready, _ = server.log.read_text().partition("To see the GUI go to")  # later lines are of other tests' refusals
    assert ready
    assert "IMPORT FAILED" not in "\n".join(line for line in log.splitlines() if comfy_host.PACK_NAME in line)
    assert "Traceback" not in log
