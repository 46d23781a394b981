"""What a validation of each size can show about a lost point of accuracy; writes the table of docs/statistics.md.

    python benchmarks/sample_sizes.py           prints it
    python benchmarks/sample_sizes.py --write   puts it into docs/statistics.md

Exact: nothing here is measured, so it does not depend on the machine.
"""

from __future__ import annotations

from lib.rows import DOCS, make_parser, write_between

from ospq_export.tasks.paired import below

SIZES = (100, 300, 500, 1000, 2000, 5000, 10_000)
MARGIN, CONFIDENCE = 0.01, 0.95
DOCUMENT = DOCS / "statistics.md"


def most_lost(images: int, gained: int) -> int | None:
    """The most lost images, beside some that are gained, that still show accuracy as kept."""
    lost = -1
    while below(lost + 1, gained, images, MARGIN, CONFIDENCE):
        lost += 1
    return None if lost < 0 else lost


def fewest_lost(images: int, gained: int) -> int:
    """The fewest lost images that show accuracy as not kept."""
    lost = round(images * MARGIN)
    while not below(gained, lost, images, -MARGIN, CONFIDENCE):
        lost += 1
    return lost


def points(lost: int | None, gained: int, images: int) -> str:
    """The drop in points, or that no drop will do."""
    return "none" if lost is None else f"{100 * (lost - gained) / images:.2f}"


def table() -> str:
    """A row for each size; every second column with 2 % of the images gained."""
    lines = [
        "| images | kept up to, nothing gained | kept up to, 2 % gained "
        "| not kept from, nothing gained | not kept from, 2 % gained |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for images in SIZES:
        gained = round(0.02 * images)
        cells = [points(most_lost(images, g), g, images) for g in (0, gained)]
        cells += [points(fewest_lost(images, g), g, images) for g in (0, gained)]
        lines.append(f"| {images:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--write", action="store_true")
    text = table()
    if parser.parse_args().write:
        write_between(DOCUMENT, "sizes", text)
    print(text)


if __name__ == "__main__":
    main()
