"""A real ComfyUI for the tests: booted in this process (`boot`), or as a server in its own process (`Server`).

Nothing of the host is imported at module scope, so that this file also loads where there is no ComfyUI.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PACK_NAME = "rewind_under_test"  # on purpose not the folder's own name: a user may call it anything


def project_files() -> list[Path]:
    """The project's files, relative to its root: what git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [Path(n) for n in sorted(set(names)) if n and (ROOT / n).is_file()]


def pack_files() -> list[Path]:
    """The files of the pack, relative to its root: all but the tests."""
    return [file for file in project_files() if file.parts[0] != "tests"]


def copy_files(files: list[Path], folder: Path) -> None:
    """Copy files of the project to the same places in a folder."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, folder / file)


def copy_pack(custom_nodes: Path, name: str = PACK_NAME) -> Path:
    """Copy the pack into a host's folder `custom_nodes` under another name."""
    folder = custom_nodes / name
    copy_files(pack_files(), folder)
    return folder


class Host:
    """ComfyUI in this process, as its own start-up leaves it, before and after it loads the pack."""

    def __init__(self, path: Path, base: Path):
        import comfyui_version

        import nodes

        self.path, self.base = path, base
        self.version: str = comfyui_version.__version__
        self.nodes = nodes
        self.pack: Path | None = None

    @property
    def release(self) -> tuple[int, ...]:
        """The version as numbers, to compare: host.release >= (0, 33)."""
        return tuple(int(part) for part in self.version.split(".")[:3])

    @property
    def mappings(self) -> dict[str, type]:
        """All node classes the host knows."""
        return self.nodes.NODE_CLASS_MAPPINGS

    def load_pack(self, name: str = PACK_NAME) -> bool:
        """Load a copy of the pack as the host loads a custom node; its own answer whether that went well."""
        self.pack = copy_pack(self.base / "custom_nodes", name)
        ignore = set(self.mappings)
        return asyncio.run(self.nodes.load_custom_node(str(self.pack), ignore, module_parent="custom_nodes"))

    def module(self, name: str = "") -> ModuleType:
        """A module of the loaded pack: host.module("pipelines.videoshop.inversion")."""
        package = str(self.pack).replace(".", "_x_")
        return importlib.import_module(f"{package}.{name}" if name else package)

    def own_nodes(self) -> dict[str, type]:
        """The node classes that came with the pack."""
        return {k: v for k, v in self.mappings.items() if getattr(v, "RELATIVE_PYTHON_MODULE", "").endswith(PACK_NAME)}

    def run_node(self, node_id: str, **inputs: Any) -> tuple:
        """Execute one node as the host does (class clone, inference mode, node context); its outputs.

        Widgets that are not given take their defaults, as on the host's page.
        """
        outputs, _ = self.run_node_ui(node_id, **inputs)
        return outputs

    def run_node_ui(self, node_id: str, **inputs: Any) -> tuple[tuple, dict]:
        """The same, with what the node shows on its face."""
        import execution
        import torch
        from comfy_execution.graph import DynamicPrompt
        from comfy_execution.progress import reset_progress_state

        cls = self.mappings[node_id]
        known = cls.INPUT_TYPES()
        values = {**widget_defaults(known), **inputs}
        unknown = (
            set(inputs) - {k.split(".")[0] for part in known.values() for k in part} - {k for k in inputs if "." in k}
        )
        if unknown:
            raise TypeError(f"{node_id} has no input {sorted(unknown)}")
        missing = set(known.get("required", {})) - set(values)
        if missing:
            raise TypeError(f"{node_id} needs {sorted(missing)}")
        prompt_id = uuid.uuid4().hex
        graph = DynamicPrompt({"1": {"class_type": node_id, "inputs": {}}})
        reset_progress_state(prompt_id, graph)
        data, _, v3_data = execution.get_input_data(values, cls, "1", dynprompt=graph)

        async def execute() -> tuple:
            with torch.inference_mode():
                return await execution.get_output_data(prompt_id, "1", cls(), data, v3_data=v3_data)

        outputs, ui, *_ = asyncio.run(execute())
        return tuple(o[0] for o in outputs), ui


def widget_defaults(input_types: dict) -> dict[str, Any]:
    """The values a fresh node shows: each widget's default, or a combo's first option."""
    values = {}
    for part in ("required", "optional"):
        for name, (kind, *rest) in input_types.get(part, {}).items():
            options = rest[0] if rest else {}
            choices = kind if isinstance(kind, list) else options.get("options")
            if "default" in options:
                values[name] = options["default"]
            elif part == "required" and isinstance(choices, list) and choices and not isinstance(choices[0], dict):
                values[name] = choices[0]
    return values


def boot(path: Path, base: Path) -> Host:
    """Start ComfyUI in this process up to where its main.py loads custom nodes: on the CPU, its files in `base`."""
    sys.path.insert(0, str(path))
    from comfy.cli_args import args

    args.cpu = True
    args.base_directory = str(base)
    args.database_url = "sqlite:///:memory:"
    args.disable_api_nodes = True
    (base / "custom_nodes").mkdir(parents=True, exist_ok=True)
    importlib.import_module("utils.extra_config")  # as main.py: nodes.py then hides this `utils` behind comfy's
    import folder_paths
    import server

    import nodes

    for folder in (
        folder_paths.get_input_directory(),
        folder_paths.get_output_directory(),
        folder_paths.get_temp_directory(),
    ):
        os.makedirs(folder, exist_ok=True)
    server.PromptServer(asyncio.new_event_loop())
    asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    return Host(path, base)


class Server:
    """A ComfyUI server in its own process, with a copy of the pack; every message of its websocket is kept.

    `python` is the host's, by default this one; `install` puts the pack into the folder of custom nodes.
    """

    def __init__(
        self,
        path: Path,
        base: Path,
        *arguments: str,
        python: Path | str = sys.executable,
        install: Callable[[Path], object] = copy_pack,
    ):
        self.path, self.base = path, base
        self.client = uuid.uuid4().hex
        self.messages: list[tuple[str, Any]] = []  # (type, data); binary ones are ("binary", bytes)
        self._news = threading.Condition()
        install(base / "custom_nodes")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        flags = [
            "--cpu",
            "--base-directory",
            base,
            "--database-url",
            f"sqlite:///{base}/host.db",
            "--disable-api-nodes",
        ]
        flags += ["--disable-auto-launch", "--preview-method", "latent2rgb", "--port", self.address.split(":")[1]]
        self.log = base / "server.log"
        with self.log.open("w") as log:
            command = [python, path / "main.py", *flags, *arguments]
            self.process = subprocess.Popen(command, cwd=base, stdout=log, stderr=subprocess.STDOUT)
        self._wait_until_up(timeout=180)
        self._listener = threading.Thread(target=lambda: asyncio.run(self._listen()), daemon=True)
        self._listener.start()
        self.wait_message(lambda kind, _: kind == "status", timeout=30)

    def _wait_until_up(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.3)
        self.stop()
        raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-3000:]}")

    async def _listen(self) -> None:
        import aiohttp

        url = f"ws://{self.address}/ws?clientId={self.client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket_:
            async for message in socket_:
                if message.type == aiohttp.WSMsgType.BINARY:
                    self._keep("binary", message.data)
                elif message.type == aiohttp.WSMsgType.TEXT:
                    content = json.loads(message.data)
                    self._keep(content["type"], content.get("data"))

    def _keep(self, kind: str, data: Any) -> None:
        with self._news:
            self.messages.append((kind, data))
            self._news.notify_all()

    def wait_message(self, wanted: Callable[[str, Any], bool], timeout: float = 300, since: int = 0) -> tuple[str, Any]:
        """The first message from number `since` on that is wanted; waits for it."""
        deadline = time.monotonic() + timeout
        with self._news:
            while True:
                for kind, data in self.messages[since:]:
                    if wanted(kind, data):
                        return kind, data
                left = deadline - time.monotonic()
                if left <= 0 or self.process.poll() is not None:
                    raise TimeoutError(f"no such message; the server's log ends:\n{self.log.read_text()[-3000:]}")
                self._news.wait(min(left, 1.0))

    def previews(self, since: int = 0) -> list[bytes]:
        """The preview pictures that arrived (JPEG or PNG files), from message number `since` on."""
        pictures = []
        for kind, data in self.messages[since:]:
            if kind == "binary" and int.from_bytes(data[:4], "big") == 1:
                pictures.append(data[8:])
            elif kind == "binary" and int.from_bytes(data[:4], "big") == 4:
                pictures.append(data[8 + int.from_bytes(data[4:8], "big") :])
        return pictures

    def get(self, route: str) -> Any:
        """A JSON answer of the server."""
        with urllib.request.urlopen(f"http://{self.address}{route}", timeout=60) as answer:
            return json.loads(answer.read())

    def get_bytes(self, route: str) -> bytes:
        """A file the server gives out."""
        with urllib.request.urlopen(f"http://{self.address}{route}", timeout=60) as answer:
            return answer.read()

    def post(self, route: str, content: dict) -> Any:
        """Post JSON; what the server refuses is an error that holds its reasons."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://{self.address}{route}", json.dumps(content).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise ValueError(f"{route}: {error.code} {error.read().decode()}") from None
        return json.loads(text) if text.strip() else None

    def object_info(self, node_id: str = "") -> dict:
        """The node descriptions as the page gets them."""
        return self.get(f"/object_info/{node_id}" if node_id else "/object_info")

    def interrupt(self) -> None:
        """Press Cancel."""
        self.post("/interrupt", {})

    def forget(self) -> None:
        """Let the next run compute every node anew, so that each says and shows what it does."""
        self.post("/free", {"free_memory": True})
        time.sleep(2)  # the queue's own thread does it

    def submit(self, workflow: dict) -> str:
        """Queue a workflow in API form; its prompt id."""
        return self.post("/prompt", {"prompt": workflow, "client_id": self.client})["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 300) -> dict:
        """The history entry of a prompt once it has ended, well or not (see its status)."""
        ends = {"execution_success", "execution_error", "execution_interrupted"}
        self.wait_message(lambda kind, data: kind in ends and data["prompt_id"] == prompt_id, timeout)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if entry := self.get(f"/history/{prompt_id}").get(prompt_id):
                return entry
            time.sleep(0.05)
        raise TimeoutError(f"prompt {prompt_id} ended and left no history")

    def prompt(self, workflow: dict, timeout: float = 300) -> dict:
        """Run a workflow in API form to its end; its history entry. Fails with the host's own message."""
        entry = self.wait(self.submit(workflow), timeout)
        if entry["status"]["status_str"] != "success":
            raise RuntimeError(json.dumps(entry["status"]["messages"][-1], indent=1))
        return entry

    def stop(self) -> None:
        """End the process."""
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
