"""Writes docs/report.schema.json, the published schema of report.json, from the model that writes the reports.

python scripts/report_schema.py
"""

import json
from pathlib import Path

from ospq_export.validate import Report

TARGET = Path(__file__).parents[1] / "docs" / "report.schema.json"


def schema_text() -> str:
    """The schema as the file holds it: JSON Schema 2020-12, of what is written rather than of what would be accepted."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Report.model_json_schema(mode="serialization"),
    }
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    TARGET.write_text(schema_text())
    print(f"wrote {TARGET}")
