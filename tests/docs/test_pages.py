"""The pages: short, in plain words, with links that lead somewhere, commands that exist, and figures of the benchmarks' rows."""

import re
import subprocess
import sys

import pytest
import typer
import yaml
from documents import DOCS, PAGES, ROOT, blocks, commands, headings
from lib.rows import RESULTS
from results import accuracy, points_lost

from ospq_export.cli.app import app
from ospq_export.recipes import Recipe
from ospq_export.recipes.keys import keys_of
from ospq_export.runs import files

MOST_WORDS = 1200
# Words by which a page tells what happened to the project instead of what is so.
HISTORY = (
    r"earlier (version|form|edition|run|row)s?|previously|formerly|no longer|used to be|at that time|at commit|so far"
    r"|was tried|were tried|we tried|what was tried|turned out|mended|before the fix|is fixed now|as it was|not looked at"
    r"|do not understand|nobody has tested|wip|the present (score|judge|form|recipe|defaults)|older than the others"
)
LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)")
NAMES = [str(page.relative_to(DOCS)) for page in PAGES]
LINKED = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "notes").rglob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def site():
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def nav_entries(nav):
    for entry in nav:
        (found,) = entry.values()
        yield from [found] if isinstance(found, str) else nav_entries(found)


@pytest.fixture(scope="module")
def generated():
    """The generated pages by their path in the site."""
    pages = pytest.importorskip("mkdocs") and __import__("site_pages").PAGES
    return {f"reference/{name}.md": make() for name, make in pages.items()}


@each_page
def test_a_page_is_short(page):
    assert len(page.read_text().split()) <= MOST_WORDS


@each_page
def test_a_page_tells_no_history(page):
    assert re.findall(rf"\b(?:{HISTORY})\b", page.read_text(), re.IGNORECASE) == []


def test_words_of_history_are_found():
    assert re.search(rf"\b(?:{HISTORY})\b", "Rows of the earlier form no longer count.")


@pytest.mark.parametrize("page", LINKED, ids=[str(p.relative_to(ROOT)) for p in LINKED])
def test_links_lead_somewhere(page, generated):
    for link in LINK.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        name = str(target.relative_to(DOCS)) if target.is_relative_to(DOCS) else ""
        assert target.exists() or name in generated, f"{link} leads nowhere"
        if page in PAGES:
            assert name, f"{link} leaves the site"
        if anchor:
            text = generated[name] if name in generated else target.read_text()
            assert anchor in headings(text), f"{link}: no such heading"


def test_every_page_is_in_the_navigation(generated):
    entries = list(nav_entries(site()["nav"]))
    assert sorted(entries) == sorted([*NAMES, *generated])


def test_commands_of_the_pages_exist():
    root = typer.main.get_command(app)
    seen = 0
    for page in [*PAGES, ROOT / "README.md", ROOT / "Dockerfile"]:
        lines = [line for b in blocks(page) if b.language in ("bash", "yaml") for line in b.lines()]
        for words in (words for line in lines for words in commands(line.removeprefix("run: "))):
            command = root
            while words and hasattr(command, "commands"):
                assert words[0] in command.commands, f"{page.name}: no command {words[0]}"
                command, words = command.commands[words[0]], words[1:]
            # Parses, and does not run: a wrong option or value ends here.
            command.make_context("ospq-export", list(words))
            seen += 1
    assert seen > 40


def test_pages_name_recipe_keys_that_exist():
    known = {key.name for key in keys_of(Recipe)} | {key.name.rsplit(".", 1)[0] for key in keys_of(Recipe)}
    # A sweep's plan has keys of its own, which `load_plan` holds to.
    for page in (page for page in PAGES if not page.name.startswith("sweep")):
        for name in re.findall(r"--set ([a-z_.]+)=", page.read_text()):
            assert name in known, f"{page.name}: {name}"


def test_reference_has_everything(generated):
    for name, command in typer.main.get_command(app).commands.items():
        assert f"## {name}" in generated["reference/command-line.md"]
        for option in (o for p in getattr(command, "params", []) for o in p.opts if o.startswith("--")):
            assert f"{option}" in generated["reference/command-line.md"]
    assert all(f"`{key.name}`" in generated["reference/recipe-keys.md"] for key in keys_of(Recipe))
    # Engines are named after their targets: the table has the pattern in words. A repository of Triton is no run directory.
    others = {files.ENGINES, files.UNNAMED_ENGINE, files.PLAN}
    named = {
        v for k, v in vars(files).items() if k.isupper() and not k.startswith("_") and isinstance(v, str)
    } - others
    engine = "model.PRODUCT.smNN.engine"
    assert named | {engine, f"{engine}.json"} == set(files.CONTENTS)
    assert all(f"`{name}`" in generated["reference/run-directory.md"] for name in named)
    assert "`exit_status`" in generated["reference/report.md"]


def test_figures_are_those_of_the_rows():
    for page, table in (
        ("docs/results.md", accuracy),
        ("docs/formats.md", points_lost),
        ("README.md", points_lost),
    ):
        assert table(RESULTS.rows()).strip() in (ROOT / page).read_text()


def test_workflow_is_the_one_on_its_page():
    (block,) = [b for b in blocks(DOCS / "guides" / "ci.md") if b.language == "yaml"]
    assert (ROOT / "examples" / block.title).read_text() == block.text


@pytest.mark.slow
def test_site_builds_strictly(tmp_path):
    pytest.importorskip("material")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    for name in [*NAMES, "reference/python.md"]:
        assert (tmp_path / "site" / name).with_suffix(".html").is_file()
    # The documents are read where nothing outside can be reached, too.
    page = (tmp_path / "site" / "index.html").read_text()
    assert re.findall(r"<(?:link|script|img)[^>]*(?:href|src)=\"https?://", page) == []
