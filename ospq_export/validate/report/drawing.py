"""From a figure to an <svg> of a page: colours are CSS variables of the page, so one drawing serves light and dark."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that no drawing would use by itself: each stands for a variable of the page until the SVG is written.
INK, FAINT, FILL = "#000001", "#000002", "#000003"
SERIES = tuple(f"#0000{n}" for n in range(11, 17))
_VARIABLES = {INK: "ink", FAINT: "line", FILL: "fill", **{c: f"s{i}" for i, c in enumerate(SERIES, 1)}}
STYLE: Any = {
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


def drawing(figure: Figure, name: str) -> str:
    """The figure as an <svg> element without a background; `name` makes its ids differ from other drawings' on the page."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Ids of groups ("axes_1") repeat from drawing to drawing; nothing refers to them.
    text = re.sub(r'<g id="[^"]*_\d+">', "<g>", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
