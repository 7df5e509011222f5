"""The pictures of both pages in docs/img, light and dark, by the browser of the tests. From a checkout:

    kv-lm-eval sweep scripts/screenshots.yaml --output_path out --one-by-one && kv-lm-eval report out
    kv-lm-eval inspect --prompt-file scripts/configs/tiny/inspect.txt --output_path out \\
        --model_args pretrained=kv-tiny,dtype=float32,method=snapkv,max_capacity_prompt=96,window_size=16
    PYTHONPATH=. python scripts/screenshots.py out/report/report.html out/inspect.html
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import browser  # noqa: E402

# Name, which page, the address in it, what stands at the top, width and height, dark or not.
PICTURES = (
    ("report_kv_tiny", 0, "#row-snapkv-max_capacity_prompt-64", "body", 1100, 1500, False),
    ("report_kv_tiny_dark", 0, "", "#score_against_kept", 1100, 1500, True),
    ("inspect_kv_tiny", 1, "#token=86", "body", 1000, 1640, False),
    ("inspect_kv_tiny_dark", 1, "#token=86", "body", 1000, 900, True),
)


def main() -> None:
    """Writes them."""
    pages = [Path(name).absolute() for name in sys.argv[1:3]]
    with tempfile.TemporaryDirectory() as profile:
        tab = browser.Page(Path(profile))
        for name, which, fragment, top, width, height, dark in PICTURES:
            with tab.seen(width=width, height=height, dark=dark):
                tab.open(pages[which], fragment)
                tab.js(f"document.querySelector('{top}').scrollIntoView({{behavior: 'instant'}})")
                tab.settle()
                near = "[...document.images].filter((image) => image.getBoundingClientRect().top < innerHeight)"
                tab.js(f"Promise.all({near}.map((image) => image.decode()))")
                tab.settle()
                (ROOT / "docs" / "img" / f"{name}.png").write_bytes(tab.picture())
        tab.close()


if __name__ == "__main__":
    main()
