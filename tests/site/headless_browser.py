"""Headless Chromium, driven by the WebDriver protocol of its chromedriver."""

import base64
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.request import Request, urlopen

_ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync"),
    *("--disable-quic", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
    # No name is resolved, so that a request to another host fails even where there is a network.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--window-size=1280,900",
)
_SECONDS = 60


class HeadlessBrowser:
    """A Chromium with an empty profile, which ends with the ``with`` block."""

    def __enter__(self) -> "HeadlessBrowser":
        programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
        missing = [name for name, path in programs.items() if path is None]
        if missing:
            raise FileNotFoundError(f"{missing} not on PATH (Debian: apt-get install chromium chromium-driver)")
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._driver = subprocess.Popen(
            [str(programs["chromedriver"]), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._address = f"http://127.0.0.1:{self._port()}/session"
        options = {
            "binary": programs["chromium"],
            "args": [*_ARGUMENTS, f"--user-data-dir={self._profile.name}"],
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        session = self._post("", {"capabilities": {"alwaysMatch": wanted}})
        self._address += f"/{session['sessionId']}"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._send(Request(self._address, method="DELETE"))
        finally:
            self._driver.kill()
            self._driver.wait()
            self._profile.cleanup()

    def open(self, url: str) -> None:
        """Loads a page, and returns when its load event has ended."""
        self._post("/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """Returns what a function body of JavaScript returns."""
        return self._post("/execute/sync", {"script": script, "args": list(arguments)})

    def set_scheme(self, scheme: str) -> None:
        """Makes pages see ``prefers-color-scheme: light`` or ``dark``."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._command("Emulation.setEmulatedMedia", features=features)

    def set_width(self, width: int) -> None:
        """Makes the window so many CSS pixels wide; 0 restores the first size."""
        if width:
            self._command(
                "Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=2, mobile=True
            )
        else:
            self._command("Emulation.clearDeviceMetricsOverride")

    def screenshot(self, path: Path) -> None:
        """Writes what the window shows, as PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self._send(Request(f"{self._address}/screenshot"))))

    def console(self) -> list[str]:
        """Returns the messages of the console since the last call: errors, warnings, and others."""
        return [f"{entry['level']}: {entry['message']}" for entry in self._post("/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Returns the addresses that pages have asked for since the last call."""
        entries = self._post("/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def _command(self, name: str, **parameters: Any) -> None:
        self._post("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def _port(self) -> str:
        assert self._driver.stdout is not None
        output = ""
        for line in self._driver.stdout:
            output += line
            if started := re.search(r"started successfully on port (\d+)", line):
                return started[1]
        raise RuntimeError(f"chromedriver has ended:\n{output}")

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._send(
            Request(self._address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        )

    def _send(self, request: Request) -> Any:
        with urlopen(request, timeout=_SECONDS) as answer:
            return json.load(answer)["value"]
