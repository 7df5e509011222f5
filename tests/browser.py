"""A real Chromium for tests of pages, spoken to over a pipe: what is drawn, clicked, typed, copied and seen.

Chromium is found by name, among Playwright's downloads, or by CHROMIUM=PATH; its DevTools protocol needs nothing else.
"""

from __future__ import annotations

import base64
import json
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE = 60.0  # seconds for one answer, on a machine that does other things too
KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), " ": (32, " "), "ArrowRight": (39, ""), "ArrowLeft": (37, "")}


def find() -> str:
    """The path of a Chromium, "" where there is none."""
    named = os.environ.get("CHROMIUM", "")
    names = ("chromium", "chromium-browser", "google-chrome")
    downloads = sorted(Path.home().glob(".cache/ms-playwright/chromium-*/chrome-linux*/chrome"))
    found = [named, *(path for name in names if (path := shutil.which(name))), *map(str, downloads[-1:])]
    return next(filter(None, found), "")


class Page:
    """One tab. Errors of the page's scripts are raised where they are seen."""

    def __init__(self, profile: Path) -> None:
        to_browser, ours_out = os.pipe()
        ours_in, from_browser = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        command = [find(), *flags, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "bash", *command],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._out, self._in, self._read, self._count = ours_out, ours_in, b"", 0
        self._session: str | None = None
        self._events: list[dict[str, Any]] = []
        targets = self.tell("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        self._session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime"):
            self.tell(f"{domain}.enable")
        self.tell("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])

    def close(self) -> None:
        """Ends the browser."""
        self._session = None
        try:
            self.tell("Browser.close")
        finally:
            self._process.wait(PATIENCE)
            os.close(self._out)
            os.close(self._in)

    # ------------------------------------------------------------------------------------------ the protocol

    def tell(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        self._count += 1
        session = {"sessionId": self._session} if self._session else {}
        message = json.dumps({"id": self._count, "method": method, "params": params, **session}).encode() + b"\0"
        while message:
            message = message[os.write(self._out, message) :]
        while True:
            said = self._next()
            if said.get("id") == self._count:
                if "error" in said:
                    raise RuntimeError(f"{method}: {said['error']}")
                return dict(said["result"])
            self._events.append(said)

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._in], [], [], max(0, until - time.monotonic()))
            chunk = os.read(self._in, 1 << 20) if ready else b""
            if not chunk:
                raise TimeoutError(f"no answer from {find()}")
            self._read += chunk
        message, _, self._read = self._read.partition(b"\0")
        return dict(json.loads(message))

    def _wait_for_load(self) -> None:
        while not any(said.get("method") == "Page.loadEventFired" for said in self._events):
            self._events.append(self._next())
        self._events = [said for said in self._events if said.get("method") != "Page.loadEventFired"]

    # ------------------------------------------------------------------------------------------ what a person does

    def load(self, page: Path, fragment: str = "") -> None:
        """Loads a page, anew where it is open already."""
        self.tell("Page.navigate", url="about:blank")
        self._wait_for_load()
        self.tell("Page.navigate", url=page.as_uri() + fragment)
        self._wait_for_load()

    def open(self, page: Path, fragment: str = "") -> None:
        """Loads it and waits until it is drawn."""
        self._events.clear()
        self.load(page, fragment)
        self.settle()

    def settle(self) -> None:
        """Until two frames are drawn; an error of the page's scripts is raised."""
        self.js("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")
        thrown = [e["params"]["exceptionDetails"] for e in self._events if e.get("method") == "Runtime.exceptionThrown"]
        assert not thrown, thrown

    def js(self, expression: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        words = {"expression": expression, "awaitPromise": True, "returnByValue": True, "userGesture": True}
        found = self.tell("Runtime.evaluate", **words)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']['exception'].get('description')}")
        return found["result"].get("value")

    def texts(self, selector: str) -> list[str]:
        """The visible text of every element that is shown."""
        shown = f"[...document.querySelectorAll({json.dumps(selector)})].filter((e) => e.getClientRects().length)"
        return list(self.js(f"{shown}.map((e) => e.innerText.trim())"))

    def place(self, selector: str) -> tuple[float, float]:
        """The middle of an element, scrolled to."""
        found = f"document.querySelector({json.dumps(selector)})"
        box = self.js(
            f"{found}.scrollIntoView({{block: 'center', behavior: 'instant'}}), "
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({found}.getClientRects()[0])"
        )
        return box[0], box[1]

    def point(self, selector: str) -> None:
        """Moves the mouse there."""
        x, y = self.place(selector)
        self.tell("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.settle()

    def click(self, selector: str) -> None:
        """Presses the mouse there."""
        x, y = self.place(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.tell("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def key(self, name: str) -> None:
        """Presses a key."""
        code, text = KEYS[name]
        words = {"key": name, "windowsVirtualKeyCode": code, **({"text": text} if text else {})}
        self.tell("Input.dispatchKeyEvent", type="keyDown", **words)
        self.tell("Input.dispatchKeyEvent", type="keyUp", key=name, windowsVirtualKeyCode=code)
        self.settle()

    def write(self, selector: str, text: str) -> None:
        """Types into a field, in place of what stands there."""
        self.js(f"document.querySelector({json.dumps(selector)}).select()")
        self.tell("Input.insertText", text=text) if text else self.key_delete()
        self.settle()

    def key_delete(self) -> None:
        """Deletes what is chosen."""
        self.tell("Input.dispatchKeyEvent", type="keyDown", key="Delete", windowsVirtualKeyCode=46)
        self.tell("Input.dispatchKeyEvent", type="keyUp", key="Delete", windowsVirtualKeyCode=46)

    def copied(self) -> str:
        """What the clipboard holds."""
        return str(self.js("navigator.clipboard.readText()"))

    # ------------------------------------------------------------------------------------------ how it is looked at

    @contextmanager
    def seen(
        self, width: int = 1280, dark: bool = False, media: str = "", script: bool = True, height: int = 900
    ) -> Iterator[None]:
        """A window so wide, in light or dark, on paper (media="print"), without scripts."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.tell(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.tell("Emulation.setEmulatedMedia", media=media, features=features)
        self.tell("Emulation.setScriptExecutionDisabled", value=not script)
        try:
            yield
        finally:
            self.tell("Emulation.setScriptExecutionDisabled", value=False)
            self.tell("Emulation.setEmulatedMedia", media="", features=[])
            self.tell("Emulation.clearDeviceMetricsOverride")

    def picture(self, whole: bool = False) -> bytes:
        """PNG of the window, or of the whole page."""
        more: dict[str, Any] = {}
        if whole:
            size = self.tell("Page.getLayoutMetrics")["cssContentSize"]
            more = {"captureBeyondViewport": True, "clip": {"x": 0, "y": 0, "scale": 1, **_size(size)}}
        return base64.b64decode(self.tell("Page.captureScreenshot", format="png", **more)["data"])

    def colour(self, selector: str, name: str) -> tuple[int, int, int]:
        """A computed colour as red, green, blue."""
        text = self.js(f"getComputedStyle(document.querySelector({json.dumps(selector)})).{name}")
        found = re.match(r"rgba?\((\d+), (\d+), (\d+)", text)
        assert found, text
        return int(found[1]), int(found[2]), int(found[3])


def _size(size: dict[str, Any]) -> dict[str, Any]:
    return {"width": size["width"], "height": size["height"]}


def contrast(a: Sequence[float], b: Sequence[float]) -> float:
    """WCAG's, of two colours as red, green, blue up to 255."""

    def luminance(colour: Sequence[float]) -> float:
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (c / 255 for c in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)
