"""`make test`: style, the tests without a host, the host tests and the browser tests once for each ComfyUI.

Each ComfyUI gets an environment of its own. The browser tests also need a Chromium of the system's; they wait for each
other's page, so they run last and alone. The sessions before them take one core each, and run side by side.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import venv
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
# torchaudio, which a host cannot start without, ended at 2.11 and refuses a torch built for another CUDA.
HOST_TORCH = ("torch>=2.11,<2.12", "torchvision>=0.26,<0.27", "torchaudio>=2.11,<2.12")
TOOLS = ("pytest>=8.3", "playwright>=1.49")  # Playwright drives the system's Chromium and downloads none


@dataclass
class Count:
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.skipped} skipped, {self.failed} failed"


def hosts() -> list[Path]:
    """The ComfyUI folders to test against: COMFYUI_PATH, a list with the system's path separator."""
    default = os.pathsep.join(("~/comfy/ComfyUI", "~/comfy/ComfyUI-0.7.0"))
    return [Path(p).expanduser() for p in os.environ.get("COMFYUI_PATH", default).split(os.pathsep) if p]


def host_version(host: Path) -> str:
    return re.search(r'__version__ = "([^"]+)"', (host / "comfyui_version.py").read_text())[1]


def host_venv(host: Path) -> Path:
    """The virtual environment of one host, made on first use: front ends are pinned, so hosts cannot share one."""
    pins = (host / "requirements.txt").read_bytes()
    folder = ROOT / ".venvs" / f"{host.resolve().name}-{hashlib.sha256(pins).hexdigest()[:8]}"
    ours = (ROOT / "requirements.txt").read_bytes()
    wanted = hashlib.sha256(pins + ours + " ".join(HOST_TORCH + TOOLS).encode()).hexdigest()
    stamp = folder / ".installed"
    if stamp.is_file() and stamp.read_text() == wanted:
        return folder
    print(f"setting up {folder.relative_to(ROOT)} for {host}", flush=True)
    venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--upgrade", "pip"], check=True)
    subprocess.run([*pip, *HOST_TORCH], check=True)
    requirements = ["-r", host / "requirements.txt", "-r", ROOT / "requirements.txt", *TOOLS]
    subprocess.run([*pip, *HOST_TORCH, *requirements], check=True)
    stamp.write_text(wanted)
    return folder


def in_a_host(script: str, *words: str) -> int:
    """Run a script again in the environment of the first ComfyUI that is there, told to it as REWIND_HOST."""
    host = next((path for path in hosts() if (path / "main.py").is_file()), None)
    if host is None:
        print(f"needs a ComfyUI at one of {', '.join(map(str, hosts()))}; COMFYUI_PATH names others")
        return 1
    environment = {**os.environ, "REWIND_HOST": str(host.resolve())}
    return subprocess.run([host_venv(host) / "bin" / "python", script, *words], env=environment).returncode


def pytest(executable: Path, *arguments: str, host: Path | None = None, whole: bool = False) -> Count:
    """Run one pytest session and count its results; a session that ends without a report counts as one failure.

    whole: print what it says at its end alone, since another session runs beside it.
    """
    # One thread: where cores are shared, threads that wait for each other cost tiny models ten times what they save.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "REWIND_HOST": str(host.resolve()) if host else ""}
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        command = [executable, "-q", "-rfEs", f"--junitxml={report}", *arguments]
        said = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} if whole else {}
        done = subprocess.run(command, cwd=ROOT, env=environment, **said)
        if whole:
            print(done.stdout, end="", flush=True)
        if not report.is_file():
            return Count(failed=1)
        suites = ElementTree.parse(report).getroot().iter("testsuite")
        total = Count()
        for suite in suites:
            n, skipped = int(suite.get("tests")), int(suite.get("skipped"))
            failed = int(suite.get("failures")) + int(suite.get("errors"))
            total += Count(n - failed - skipped, failed, skipped)
    if done.returncode and not total.failed:
        total.failed = 1  # interrupted, or nothing was collected
    return total


def beside_the_page(selection: list[str]) -> tuple[Count, Count, list[str]]:
    """All but the browser tests, side by side: counts without a host and on hosts, and lines of the summary."""
    elsewhere = ("tests", "--ignore=tests/host", "--ignore=tests/browser")
    without = partial(pytest, BIN / "pytest", *elsewhere, *selection)
    on_hosts = []
    for host in hosts():
        if (host / "main.py").is_file():
            on_hosts.append(partial(pytest, host_venv(host) / "bin" / "pytest", "tests/host", *selection, host=host))
        else:
            on_hosts.append(partial(pytest, BIN / "pytest", "tests/host", "-rN", *selection))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # The longest first: that of the main host, which hosts() begins with.
        order = [*on_hosts[:1], without, *on_hosts[1:]]
        counts = {session: pool.submit(session, whole=True) for session in order}
    lines = [f"without a host: {counts[without].result()}"]
    for host, session in zip(hosts(), on_hosts, strict=True):
        count = counts[session].result()
        if (host / "main.py").is_file():
            lines.append(f"host ComfyUI {host_version(host)} at {host}: {count}")
        else:
            lines.append(f"HOST TESTS SKIPPED: no ComfyUI at {host} ({count.skipped} tests)")
    return counts[without].result(), sum((counts[session].result() for session in on_hosts), Count()), lines


def in_the_page(selection: list[str]) -> tuple[Count, list[str]]:
    """The browser tests, once for each ComfyUI that is there: their count and their lines of the summary."""
    sys.path.append(str(ROOT / "tests" / "support"))
    from comfy_page import chromium

    present = [host for host in hosts() if (host / "main.py").is_file()]
    if not present or not chromium():
        count = pytest(BIN / "pytest", "tests/browser", "-rN", *selection)
        reason = "no Chromium" if present else "no ComfyUI"
        return count, [f"BROWSER TESTS SKIPPED: {reason} ({count.skipped} tests)"]
    total, lines = Count(), []
    for host in present:
        count = pytest(host_venv(host) / "bin" / "pytest", "tests/browser", *selection, host=host)
        lines.append(f"page of ComfyUI {host_version(host)} at {host}: {count}")
        total += count
    return total, lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slow", action="store_true", help="also the tests marked slow")
    parser.add_argument("--setup-only", action="store_true", help="make the hosts' virtual environments and stop")
    options, passed_on = parser.parse_known_args()
    if options.setup_only:
        for host in hosts():
            if (host / "main.py").is_file():
                host_venv(host)
        return 0

    selection = ["-m", "slow or not slow", *passed_on] if options.slow else passed_on
    style = [
        subprocess.run([BIN / "ruff", *words, "."], cwd=ROOT).returncode for words in (["check"], ["format", "--check"])
    ]
    total, on_hosts, more = beside_the_page(selection)
    lines = ["style: " + ("FAILED" if any(style) else "ok"), *more]
    browser, browser_lines = in_the_page(selection)
    lines += browser_lines
    lines.append(f"host tests: {on_hosts.passed + on_hosts.failed} ran, {on_hosts.skipped} skipped")
    total += on_hosts + browser

    print("\n" + "\n".join(lines))
    print(f"{total.passed} passed, {total.failed} failed, {total.skipped} skipped")
    return int(any(style) or total.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
