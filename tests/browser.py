"""A real browser without a window, for the pages that the project writes."""

import re
import subprocess
from html import unescape
from pathlib import Path
from typing import NamedTuple

# What the page shows, written into its own text by the browser.
PROBE = """<script>addEventListener("load", () => {
  const sizes = [...document.images].map(image => `${image.naturalWidth}x${image.naturalHeight}`).join(" ");
  const overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const shown = document.body.innerText;
  document.body.innerHTML = "<pre id=probe></pre>";
  document.getElementById("probe").textContent = [sizes, overflow, shown].join("\\f");
});</script>"""


class Shown(NamedTuple):
    pictures: list[tuple[int, int]]  # width and height of each picture as decoded; 0 of one that cannot be shown
    overflow: int  # pixels that the page is too wide
    text: str


class Browser:
    def __init__(self, program: str, folder: Path) -> None:
        self.program, self.folder = program, folder

    def run(self, *options: str) -> str:
        profile = f"--user-data-dir={self.folder / 'profile'}"
        offline = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        command = [self.program, "--headless", "--no-sandbox", "--disable-gpu", profile, offline, *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=50, check=True).stdout

    def open(self, page: Path) -> Shown:
        """Show a page and return what can be seen of it."""
        probed = self.folder / page.name
        probed.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
        document = self.run("--window-size=1200,900", "--virtual-time-budget=10000", "--dump-dom", probed.as_uri())
        found = re.search('<pre id="probe">(.*?)</pre>', document, re.DOTALL)
        assert found, document[:2000]
        sizes, overflow, text = unescape(found[1]).split("\f")
        return Shown([(int(w), int(h)) for w, h in re.findall(r"(\d+)x(\d+)", sizes)], int(overflow), text)
