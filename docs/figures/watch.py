"""Draws watch-desktop.png and watch-phone.png: the live page of a run, in a browser.

Run while a run goes on, from the root of the repository: ``python docs/figures/watch.py runs/digits-dit``. Needs
Playwright and a chromium (``pip install playwright``; ``apt-get install chromium``).
"""

import io
import shutil
import sys
import threading
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from hf_diffusionblocks.report import RunServer

FOLDER = Path(__file__).parent
VIEWS = {"desktop": ("light", 1100, 1120), "phone": ("dark", 360, 760)}

if __name__ == "__main__":
    server = RunServer(Path(sys.argv[1]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, (scheme, width, height) in VIEWS.items():
            page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": height})
            page.goto(server.url, wait_until="networkidle")
            image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            image.quantize(128).save(FOLDER / f"watch-{name}.png", optimize=True)
        browser.close()
