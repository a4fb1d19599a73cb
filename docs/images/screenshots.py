"""Screenshots of a page such as a run's report, by a real browser: wide and narrow, light and dark.

    python docs/images/screenshots.py runs/quickstart/report.html --to shots [--element '#main'] [--height 1400]

Needs Chromium on PATH (Debian: apt-get install chromium). The browser is driven through its debugging protocol, so that a page
has exactly the asked width and colours; nothing is loaded from a network.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

WIDTHS = {"wide": 1200, "narrow": 400}
COLOURS = ("light", "dark")
_PATIENCE_S = 60.0
_SETTLE_S = 1.5
"""Time for figures to take their place after the page is loaded."""
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars")


class Tab:
    """A tab of the browser."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._last = 0

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the debugging protocol. Raises: RuntimeError if the browser refuses it."""
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(timeout=_PATIENCE_S))
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def value(self, script: str) -> Any:
        """Value of a JavaScript expression in the page."""
        return (self.call("Runtime.evaluate", expression=script, returnByValue=True))["result"].get("value")


def shoot(tab: Tab, url: str, to: Path, width: int, colours: str, top: str | None, height: int | None) -> dict[str, Any]:
    """Write a screenshot; returns what the page says of itself: its width, and elements that are wider than it."""
    tab.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": colours}])
    tab.call("Page.navigate", url=url)
    while tab.value("document.readyState") != "complete":
        time.sleep(0.1)
    time.sleep(_SETTLE_S)
    page_height = int(tab.value("document.documentElement.scrollHeight"))
    begin = 0
    if top is not None:
        begin = int(tab.value(f"document.querySelector({top!r}).getBoundingClientRect().top + scrollY - 12"))
    clip = {"x": 0, "y": begin, "width": width, "height": min(height or page_height, page_height - begin), "scale": 1}
    shot = tab.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
    to.write_bytes(base64.b64decode(shot["data"]))
    return {"scroll_width": tab.value("document.documentElement.scrollWidth"), "height": page_height}


def _port(file: Path) -> int:
    """Port of a browser that starts, from the file that it writes."""
    deadline = time.monotonic() + _PATIENCE_S
    while not file.exists() or not file.read_text().strip():
        if time.monotonic() > deadline:
            raise SystemExit(f"{file}: the browser did not start within {_PATIENCE_S:.0f} s")
        time.sleep(0.1)
    return int(file.read_text().split()[0])


def main(arguments: argparse.Namespace) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("no chromium on PATH; on Debian: apt-get install chromium")
    arguments.to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *_FLAGS, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = _port(Path(profile) / "DevToolsActivePort")
            request = urllib.request.Request(f"http://127.0.0.1:{port}/json/new", method="PUT")
            with urllib.request.urlopen(request) as answer:
                address = json.load(answer)["webSocketDebuggerUrl"]
            with connect(address, max_size=None) as socket:
                tab = Tab(socket)
                tab.call("Page.enable")
                url = arguments.page.resolve().as_uri()
                for size, colours in itertools.product(arguments.widths, arguments.colours):
                    to = arguments.to / f"{arguments.page.stem}-{size}-{colours}.png"
                    print(to, shoot(tab, url, to, WIDTHS[size], colours, arguments.element, arguments.height))
        finally:
            process.terminate()
            process.wait(timeout=30)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--to", type=Path, default=Path("shots"))
    parser.add_argument("--element", help="selector of the element at the top; the page's top otherwise")
    parser.add_argument("--height", type=int, help="pixels; the whole page otherwise")
    parser.add_argument("--widths", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--colours", nargs="+", choices=COLOURS, default=list(COLOURS))
    main(parser.parse_args())
