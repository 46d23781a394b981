"""Takes the pictures of the README: a report's first screen, wide and as on a telephone, with a headless Chromium.

python scripts/report_pictures.py RUN/report.html [--browser chromium]
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

TARGET = Path(__file__).parents[1] / "docs" / "images"
SIZES = {"report-wide": (1240, 700), "report-narrow": (420, 900)}
# Chromium's own windows are 500 px wide at least; a frame may be narrower.
LEAST, COLOURS = 500, 128


def photograph(page: Path, browser: str, width: int, height: int, out: Path) -> None:
    """One picture of a page at a size, with few colours so that it stays small."""
    with tempfile.TemporaryDirectory() as folder:
        frame, taken = Path(folder) / "frame.html", Path(folder) / "taken.png"
        source = f'<iframe src="{page.resolve().as_uri()}" width="{width}" height="{height}" style="border:0"></iframe>'
        frame.write_text(f'<!doctype html><body style="margin:0">{source}')
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--allow-file-access-from-files",
        ]
        size = f"--window-size={max(width, LEAST)},{height}"
        subprocess.run(
            [browser, *options, size, f"--screenshot={taken}", frame.as_uri()],
            check=True,
            capture_output=True,
        )
        with Image.open(taken) as picture:
            picture.convert("RGB").crop((0, 0, width, height)).quantize(COLOURS).save(out, optimize=True)


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--browser", default="chromium")
    given = parser.parse_args()
    TARGET.mkdir(exist_ok=True)
    for name, (width, height) in SIZES.items():
        out = TARGET / f"{name}.png"
        photograph(given.page, given.browser, width, height, out)
        print(f"wrote {out}, {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
