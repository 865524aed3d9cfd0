"""ComfyUI's own page in a headless Chromium, used as a person uses it: typing, clicking, dropping files.

What the page then holds is read from its own JavaScript API. Playwright is imported where a browser is opened, so that
this file also loads where there is none; Chromium is the system's own, never one that Playwright would download.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_host import ROOT

if TYPE_CHECKING:
    from comfy_host import Server
    from playwright.sync_api import Browser, ConsoleMessage, Locator, Response

JS = Path(__file__).with_suffix(".js")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",  # the page asks for much on the net: nothing goes out
]
# What a person who has used ComfyUI before has: no tour of the page at the start, and tooltips without a long wait.
SETTINGS = {"Comfy.TutorialCompleted": True, "LiteGraph.Node.TooltipDelay": 100}
# The page asks for a help page in the reader's language before the one that every language has.
EXPECTED = ("/docs/", "/en.md")
# The host's own fault, told in comfy_page.js: the mask that was taken away too early is missed when its turn comes.
LOST_MASK = ("NotFoundError", "removeChild")


def chromium() -> str | None:
    """Where the system's Chromium is."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield running
        running.close()


def prepare_user(base: Path, **settings: Any) -> None:
    """Give the server of folder `base` a user: the settings, and the files that the page asks for on every start."""
    user = base / "user" / "default"
    for folder in ("workflows", "subgraphs"):
        (user / folder).mkdir(parents=True, exist_ok=True)
    (user / "user.css").touch()
    (user / "comfy.templates.json").write_text("{}")
    (user / "comfy.settings.json").write_text(json.dumps({**SETTINGS, **settings}))


MODEL_FOLDERS = {
    "UNETLoader": "diffusion_models",
    "CLIPLoader": "text_encoders",
    "CLIPVisionLoader": "clip_vision",
    "VAELoader": "vae",
}


def give_files(base: Path, workflows: Iterable[Path]) -> None:
    """Give the server of folder `base` the files that these workflows load: stand-ins for a user's own clip, pictures
    and checkpoints, so that their graphs open as they do for a user who has them."""
    for workflow in workflows:
        for node in json.loads(workflow.read_text(encoding="utf-8"))["nodes"]:
            if node["type"] in ("LoadVideo", "LoadImage"):
                source = ROOT / "demo" / ("clip.mp4" if node["type"] == "LoadVideo" else "edited.png")
                (base / "input").mkdir(exist_ok=True)
                shutil.copy(source, base / "input" / node["widgets_values"][0])
            elif "CheckpointLoader" in node["type"] or node["type"] in MODEL_FOLDERS:
                folder = base / "models" / MODEL_FOLDERS.get(node["type"], "checkpoints")
                folder.mkdir(parents=True, exist_ok=True)
                (folder / node["widgets_values"][0]).touch()


class ComfyPage:
    """The page of a running server, in a browser window of its own. What goes wrong in it is kept in `problems`."""

    def __init__(self, browser: Browser, server: Server, width: int = 1400, height: int = 900):
        self.server, self.url = server, f"http://{server.address}"
        self.pack = next(path.name for path in (server.base / "custom_nodes").iterdir() if path.is_dir())
        self.problems: list[str] = []
        context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        context.set_default_timeout(60_000)
        context.add_init_script(path=JS)
        self.page = context.new_page()
        self.page.on("pageerror", lambda error: self.problems.append(f"uncaught: {error}"))
        self.page.on("console", self._console)
        self.page.on("response", self._response)
        self.page.goto(self.url, wait_until="domcontentloaded")
        self.until("window.app?.vueAppReady && app.extensionManager?.command", timeout=180)
        self.until("app.graph._nodes.length > 0", timeout=60)  # the host's own first workflow
        # The host's own first workflow lacks its models; so of the start, only what names Rewind counts.
        self.startup_problems = [text for text in self.problems if "rewind" in text.lower()]

    def _console(self, message: ConsoleMessage) -> None:
        url = message.location.get("url", "")
        own = url.startswith(self.url) and "Failed to load resource" not in message.text
        lost_mask = all(part in message.text for part in LOST_MASK) and "/vendor-" in url
        if message.type == "error" and own and not lost_mask:
            self.problems.append(f"console: {message.text} ({url})")

    def _response(self, answer: Response) -> None:
        if (
            answer.status >= 400
            and answer.url.startswith(self.url)
            and not all(part in answer.url for part in EXPECTED)
        ):
            self.problems.append(f"{answer.status}: {answer.url}")

    # --- reading the page -------------------------------------------------------------------------------------------

    def js(self, expression: str, argument: Any = None) -> Any:
        """The value of a JavaScript expression, or of a function of one argument."""
        return self.page.evaluate(expression, argument)

    def until(self, expression: str, argument: Any = None, timeout: float = 30) -> None:
        """Wait until a JavaScript expression, or function of one argument, is true; timeout in seconds."""
        self.page.wait_for_function(expression, arg=argument, polling=100, timeout=timeout * 1000)

    def comes_true(self, expression: str, argument: Any = None, timeout: float = 5) -> bool:
        """The same, without an error where it does not come true."""
        from playwright.sync_api import TimeoutError

        try:
            self.until(expression, argument, timeout)
        except TimeoutError:
            return False
        return True

    def nodes(self) -> list[dict]:
        """The nodes of the open graph and of its subgraphs: id, type, title, whether the page knows them, results."""
        return self.js("rewindTest.nodes()")

    def overlaps(self) -> list[tuple[str, str]]:
        """The pairs of nodes of the open graph that lie over one another."""
        return [tuple(pair) for pair in self.js("rewindTest.overlaps()")]

    def saved(self) -> dict:
        """The graph as the page saves it, through its Export and the download that follows."""
        self.until("rewindTest.settled()")
        self.js("() => { app.extensionManager.command.execute('Comfy.ExportWorkflow') }")
        with self.page.expect_download() as download:
            self.dialog.get_by_role("button", name="Confirm").click()
        return json.loads(download.value.path().read_text(encoding="utf-8"))

    # --- using the page ---------------------------------------------------------------------------------------------

    @property
    def dialog(self) -> Locator:
        """The dialog that is open on top."""
        return self.page.get_by_role("dialog").last

    @property
    def dialogs(self) -> list[str]:
        """The words of every open dialog."""
        return self.js("rewindTest.dialogs()")  # at one moment: one that closes meanwhile would be waited for

    def reset(self) -> None:
        """An empty graph at scale 1, no dialog open, nothing running, no problem on record."""
        for _ in range(5):
            if self.dialogs:
                self.page.keyboard.press("Escape")
                self.page.wait_for_timeout(300)
        if self.page.get_by_role("button", name="Cancel current run").is_enabled():
            self.server.interrupt()
        self.until("!document.querySelector('[aria-label=\"Cancel current run\"]:enabled')")
        self.js("rewindTest.clear()")
        self.problems.clear()

    def search(self, words: str) -> None:
        """Type into the node search, which a double click on the empty canvas opens."""
        from playwright.sync_api import TimeoutError

        entry = self.page.locator("input:focus")
        for _ in range(6):  # on a busy machine the second click may come too late, or the last search still be closing
            if not entry.count():
                self.page.wait_for_timeout(400)  # so that a click just before is not taken for the first of the two
                self.page.mouse.dblclick(640, 700)
                self.comes_true("document.querySelector('input:focus') !== null", timeout=1.5)
            try:
                entry.fill(words, timeout=2000)
            except TimeoutError:
                continue
            self.page.wait_for_timeout(300)
            if self.js("words => document.querySelector('input:focus')?.value === words", words):
                return
        raise TimeoutError(f"the node search did not take the words {words!r}")

    def found(self, name: str, timeout: float = 5) -> bool:
        """Whether the search's results come to hold a node of that display name."""
        return self.comes_true("name => rewindTest.results().includes(name)", name, timeout)

    def add(self, name: str) -> None:
        """Search for a node by its display name, press Enter, put it down."""
        before = len(self.nodes())
        self.search(name)
        self.until("name => rewindTest.results()[0] === name", name)
        self.page.keyboard.press("Enter")
        self.until("n => app.graph._nodes.length > n", before)
        self.comes_true("document.querySelector('input:focus') === null")
        self.page.mouse.move(400, 300)
        self.page.mouse.click(410, 310)  # newer pages let a new node hang on the mouse until a click

    def tooltip(self) -> str:
        """The tooltip that is open; empty if there is none."""
        return self.js("rewindTest.tooltip()")

    def shows_tooltip(self, place: list[float], words: str) -> bool:
        """Bring the mouse to a place of the canvas; whether the page comes to show these words there."""
        x, y = place
        self.page.mouse.move(x - 4, y)
        self.page.mouse.move(x, y)
        return self.comes_true("words => rewindTest.tooltip() === rewindTest.plain(words)", words)

    def open_help(self, number: str, heading: str) -> None:
        """Select a node with a click on its title and open its help; wait for the page's heading and pictures."""
        x, y = self.js("id => rewindTest.places(id)", number)["title"]
        for _ in range(5):
            self.page.wait_for_timeout(500)  # so that it is not taken for the second of a double click, which renames
            self.page.mouse.click(x, y)
            if self.comes_true("id => Object.keys(app.canvas.selected_nodes).includes(id)", number, timeout=1.5):
                break
            self.page.keyboard.press("Escape")
        for _ in range(2):  # the button also closes the panel, if it is open from before
            self.page.get_by_test_id("info-button").click()
            if self.comes_true("heading => rewindTest.help().headings[0] === heading", heading, timeout=5):
                break
        self.until("rewindTest.help().pictures.every(picture => picture.done)")

    def open_template(self, name: str) -> bytes:
        """Open a workflow of the pack from Templates; its thumbnail as the page shows it, a PNG file."""
        self.page.get_by_role("button", name="Templates", exact=True).first.click()
        self.dialog.get_by_text(self.pack, exact=True).first.click()
        card = self.page.get_by_test_id(f"template-workflow-{name}")
        card.scroll_into_view_if_needed()
        self.until("id => rewindTest.thumbnail(id)", f"template-workflow-{name}")
        thumbnail = self.js("id => rewindTest.thumbnailPixels(id)", f"template-workflow-{name}")
        tabs = self.js("app.extensionManager.workflow.openWorkflows.length")
        card.click()
        self.until("n => app.extensionManager.workflow.openWorkflows.length > n", tabs)
        self.until("name => document.title.includes(name) && app.graph._nodes.length > 0", name)
        self.page.get_by_test_id("template-workflows-content").wait_for(state="hidden")
        return base64.b64decode(thumbnail)

    def open_file(self, workflow: Path) -> None:
        """Drop a workflow's file on the canvas."""
        self.drop(workflow.name, workflow.read_bytes(), "application/json")

    def drop(self, name: str, data: bytes, kind: str) -> None:
        """Drop a file on an emptied canvas, and wait for the graph that it holds."""
        self.js("rewindTest.clear()")
        arguments = [name, base64.b64encode(data).decode(), kind]
        transfer = self.page.evaluate_handle("arguments => rewindTest.transfer(arguments)", arguments)
        place = {"clientX": 700, "clientY": 500, "dataTransfer": transfer}
        self.page.locator("#graph-canvas").dispatch_event("drop", place)
        self.until("app.graph._nodes.length > 0")

    def press_run(self) -> None:
        """Press Run, and start to keep what the page shows of the run."""
        self.js("rewindTest.watch()")
        self.page.get_by_test_id("queue-button").click()

    def press_cancel(self) -> None:
        """Press Cancel."""
        self.page.get_by_role("button", name="Cancel current run").click()

    def run(self, timeout: float = 900) -> dict:
        """Press Run and wait for the end: the server's history entry, and what the page showed on the way."""
        before = set(self.server.get("/history"))
        self.press_run()
        return self.finish(before, timeout)

    def finish(self, before: set[str], timeout: float = 900) -> dict:
        """Wait until a prompt has ended that was not in the history before."""
        for _ in range(int(timeout * 2)):
            if ended := {k: v for k, v in self.server.get("/history").items() if k not in before}:
                break
            self.page.wait_for_timeout(500)
        else:
            raise TimeoutError(f"nothing ended; the server's log ends:\n{self.server.log.read_text()[-2000:]}")
        self.until("!document.querySelector('[aria-label=\"Cancel current run\"]:enabled')")
        return {**ended.popitem()[1], "shown": self.js("rewindTest.shown")}
