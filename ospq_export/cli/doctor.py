"""`ospq-export doctor`."""

from __future__ import annotations

from ospq_export.cli.options import console


def doctor() -> None:
    """Try every backend and engine builder on this machine, and say what to install for the rest."""
    from rich.markup import escape
    from rich.table import Table

    from ospq_export.engines.doctor import examine

    table = Table("", "what", "seen", "fix")
    for result in examine():
        table.add_row(
            "works" if result.works else "no", result.name, escape(result.detail), escape(result.fix)
        )
    console().print(table)
