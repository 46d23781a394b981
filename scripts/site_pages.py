"""The site's reference, made from the code when `mkdocs build` runs; `mkdocs.yml` names this file as a hook.

Command line, recipe keys, run directory, report and Python API are written nowhere by hand: each page asks what the program asks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_ATTRIBUTES = "Attributes:"
_API = {
    "Three stages": ["ospq_export.Run", "ospq_export.Session"],
    "What goes in": ["ospq_export.DataConfig", "ospq_export.Recipe", "ospq_export.load_recipe"],
    "What comes out": ["ospq_export.Report", "ospq_export.validate.verdict.Thresholds"],
    "Further files of an export": ["ospq_export.export.jobs.Extras"],
    "Lint": ["ospq_export.onnx.lint.predict"],
    "Errors": ["ospq_export.InputError"],
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages; mkdocs calls this."""
    for name, page in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=page()))
    return files


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; what would end a cell is escaped."""
    lines = [header, ["---"] * len(header), *([_cell(text) for text in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _code(text: str) -> str:
    """Text as it is typed, so that Markdown reads nothing into it."""
    return f"`{text}`" if text else ""


def command_line() -> str:
    """Every command with its arguments and options, from the application itself."""
    import typer

    from ospq_export.cli.app import app

    root: Any = typer.main.get_command(app)
    parts = [f"# Command line\n\n{root.help}\n"]
    for name, command in _commands(root, "ospq-export"):
        context = command.context_class(command, info_name=name)
        usage = " ".join(command.collect_usage_pieces(context))
        parts.append(
            f"## {name.removeprefix('ospq-export ')}\n\n```text\n{name} {usage}\n```\n\n{command.help}\n"
        )
        records = [record for p in command.get_params(context) if (record := p.get_help_record(context))]
        parts.append(
            table(["option", "what it does"], [[_code(names), _plain(said)] for names, said in records])
        )
    return "\n".join(parts)


def _plain(text: str) -> str:
    """Help with the values in angle and square brackets kept as they are."""
    return text.replace("<", "&lt;").replace("[", "\\[")


def _commands(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    for key, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{name} {key}")
        else:
            yield f"{name} {key}", command


def recipe_keys() -> str:
    """All keys of a recipe, and the packaged recipes."""
    from ospq_export.recipes import Recipe, load_recipe, packaged_recipes
    from ospq_export.recipes.keys import keys_of

    recipes = [load_recipe(name) for name in packaged_recipes()]
    rows = [[_code(k.name), k.takes, _code(k.default), _plain(k.description)] for k in keys_of(Recipe)]
    return (
        "# Recipe keys\n\nA recipe is a TOML file. `ospq-export recipe show w8a8` prints one in full, and "
        "`--set reconstruction.iterations=2000` overrides one value.\n\n## Packaged recipes\n\n"
        + table(
            ["recipe", "formats", "what it is"],
            [[_code(r.name), r.summary(), r.description] for r in recipes],
        )
        + "\n## Keys\n\n"
        + table(["key", "takes", "default", "what it does"], rows)
    )


def run_directory() -> str:
    """What lies in a run directory."""
    from ospq_export.cli.options import with_options
    from ospq_export.engines.record import EngineRecord
    from ospq_export.runs.files import CONTENTS
    from ospq_export.runs.manifest import Manifest

    return (
        "# Run directory\n\nThe three stages meet in this folder and nowhere else. `calibrate` writes the first files, `export` "
        "and `validate` add theirs. The manifest has a SHA-256 of every file beside it; a stage refuses a folder whose files do "
        "not match. No file is a pickle.\n\n"
        + table(
            ["file", "what it is"], [[_code(name), with_options(said)] for name, said in CONTENTS.items()]
        )
        + "\nAn ONNX file above 2 GB has its weights in a second file, `model.onnx.data`.\n\n"
        + _records("manifest.json", Manifest.model_json_schema())
        + _records("The engine's sidecar", EngineRecord.model_json_schema())
    )


def report() -> str:
    """The fields of report.json, from its published schema."""
    schema = json.loads((ROOT / "docs" / "report.schema.json").read_text(encoding="utf-8"))
    return (
        "# report.json\n\n`report.json` follows [a JSON Schema](../report.schema.json) (2020-12). Programs should check "
        "`schema_version` and read `verdict.exit_status` first.\n\n" + _records("Report", schema)
    )


def _records(title: str, schema: dict[str, Any]) -> str:
    """A record and those that it is made of."""
    parts = [
        _record(title, schema),
        *(_record(name, found) for name, found in schema.get("$defs", {}).items()),
    ]
    return "\n".join(parts) + "\n"


def _record(name: str, schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return f"## {name}\n\nOne of {', '.join(_code(value) for value in schema['enum'])}.\n"
    text, _, attributes = schema.get("description", "").partition(_ATTRIBUTES)
    said = _described(attributes)
    rows = [
        [_code(key), _type(value), said.get(key, "")] for key, value in schema.get("properties", {}).items()
    ]
    return f"## {name}\n\n{_plain(text).strip()}\n\n{table(['field', 'type', 'what it is'], rows)}"


def _described(attributes: str) -> dict[str, str]:
    """Descriptions by field, of a Google docstring's list; one line may describe several."""
    found: dict[str, str] = {}
    for entry in re.split(r"\n {4}(?=\S)", "\n" + attributes.strip("\n")):
        names, _, text = entry.strip().partition(": ")
        found |= dict.fromkeys((name.strip() for name in names.split(",")), _plain(text))
    return found


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return ", ".join(_code(str(value)) for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "anything")
    if kind == "array" and "items" in schema:
        return f"list of {_type(schema['items'])}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"{_type(schema['additionalProperties'])} by name"
    return str(kind)


def python_api() -> str:
    """The public names, whose docstrings mkdocstrings reads."""
    parts = ["# Python\n\nThe guide with examples is [Your own model](../guides/own-model.md).\n"]
    for heading, names in _API.items():
        parts.append(f"## {heading}\n")
        parts += [f"::: {name}\n" for name in names]
    return "\n".join(parts)


PAGES: dict[str, Callable[[], str]] = {
    "command-line": command_line,
    "recipe-keys": recipe_keys,
    "python": python_api,
    "run-directory": run_directory,
    "report": report,
}
