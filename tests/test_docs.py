"""The documentation is complete and true: flags, columns, commands, links, and the README's numbers."""

import ast
import csv
import importlib
import json
import re
import shlex
import statistics
from dataclasses import fields
from pathlib import Path

import gymnasium as gym
import pytest
import tyro
import yaml

from benchmark.__main__ import COMMANDS, WITH_WORDS, later

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
START = (ROOT / "docs" / "start.md").read_text()
NAMES = sorted(path.stem for path in ROOT.glob("*.py"))
FORM = [  # of a script's page
    "The equations, as the code has them",
    "What it supports",
    "Where it departs",
    "Action masks",
    "Flags",
    "Environments",
    "How long, and where",
    "What is collected",
    "Learning",
    "The objective",
    "Networks",
    "Evaluation and what is kept",
    "What is logged",
    "progress.csv",
    "Make it yours",
]
OPTIONAL = {"What it supports", "Action masks", "Networks"}


def page_of(script: str) -> str:
    path = ROOT / "docs" / f"{script}.md"
    return path.read_text() if path.is_file() else ""


def table_rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:1] == "|"]


def as_written(value: object) -> str:
    words = {None: "none", True: "on", False: "off"}
    if value is None or isinstance(value, bool):
        return words[value]
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def undescribed_flags(script: str, page: str) -> list[str]:
    described = {cells[0].split(",")[0].strip("`"): cells[1].strip("`") for cells in table_rows(page) if len(cells) > 2}
    flags = {f"--{f.name.replace('_', '-')}": f.default for f in fields(importlib.import_module(script).Args)}
    return [flag for flag, default in flags.items() if described.get(flag) != as_written(default)]


def anchor(title: str) -> str:
    return re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")


def sections(page: str) -> dict[str, str]:
    return {part.split("\n")[0]: part for part in re.split(r"\n##+ ", page)[1:]}


def undescribed_columns(page: str, columns: dict[str, list[str]], start: str = START) -> list[str]:
    """Tables that are the same for every script are described in start.md, to which the page links."""
    linked = {title: part for title, part in sections(start).items() if f"](start.md#{anchor(title)})" in page}
    described_in = sections(page) | linked
    missing = []
    for table, names in columns.items():
        rows = table_rows(described_in.get(f"{table}.csv", ""))
        described = {cells[0].strip("`") for cells in rows if len(cells) == 4}
        missing += [f"{table}.csv: {name}" for name in names if name not in described]
    return missing


@pytest.mark.parametrize("script", NAMES)
def test_every_flag_has_an_entry_with_its_default(script):
    assert undescribed_flags(script, page_of(script)) == []


@pytest.mark.parametrize("script", NAMES)
def test_every_column_has_an_entry(script, finished_run):
    run, tables = finished_run(script), ("progress", "episodes", "evaluations")
    columns = {table: (run / f"{table}.csv").read_text().splitlines()[0].split(",") for table in tables}
    assert undescribed_columns(page_of(script), columns) == []


def test_a_missing_entry_is_noticed():
    page = page_of("ppo_continuous")
    assert undescribed_flags("ppo_continuous", page.replace("`--gamma`", "`--gama`")) == ["--gamma"]
    assert undescribed_flags("ppo_continuous", page.replace("| `0.992` |", "| `0.99` |")) == ["--gamma"]
    columns = {"progress": ["step", "std"], "episodes": ["return"]}
    assert undescribed_columns(page, columns) == []
    assert undescribed_columns(page.replace("| `std` |", "| `sd` |"), columns) == ["progress.csv: std"]
    assert undescribed_columns(page.replace("start.md#", "start.md"), columns) == ["episodes.csv: return"]
    assert undescribed_columns(page, columns, START.replace("| `return` |", "| `sum` |")) == ["episodes.csv: return"]


def headings(page: str) -> list[str]:
    return [re.sub("(?<=^Where it departs).*", "", title) for title in sections(page)]


@pytest.mark.parametrize("script", NAMES)
def test_every_scripts_page_has_the_same_headings_in_the_same_order(script):
    found = headings(page_of(script))
    assert [title for title in found if title in FORM] == [t for t in FORM if t in found or t not in OPTIONAL]


def commands(text: str) -> list[str]:
    """What stands in blocks of code and begins as a command does, without comments."""
    blocks = "\n".join(re.findall(r"```(?:bash|sh)?\n(.*?)```", text, re.DOTALL))
    blocks += "\n" + "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    blocks += "\n" + "\n".join(re.findall(r"`((?:python|make|uv run) [^`\n]+)`", text))
    found = re.sub(r"\\\n\s*", " ", blocks).splitlines()
    return [line.strip() for line in found if re.match(r"(\S*python3?|make|uv run) ", line.strip())]


def parse(command: str) -> None:
    """Raises where a command's arguments or files are none."""
    words = shlex.split(re.sub(r"\$\(.*?\)", "20000", command), comments=True)
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        variables = dict(word.split("=", 1) for word in words[1:] if "=" in word)
        assert all(word in targets for word in words[1:] if "=" not in word)
        if "ARGS" in variables:
            parse(f"python {variables.get('SCRIPT', 'ppo_continuous.py')} {variables['ARGS']}")
        return
    words = words[2:] if words[:2] == ["uv", "run"] else words[1:]
    if words[0] == "-m" and words[1] != "benchmark":
        return
    if words[0] == "-m":
        at = words.index("--") if "--" in words else len(words)
        named = {name: later(function) for name, function in COMMANDS.items()}
        chosen = tyro.extras.subcommand_cli_from_dict(named, args=words[2:at])
        assert at == len(words) or chosen.func in WITH_WORDS
        script = next((w for w in words[:at] if w in NAMES), "ppo_continuous")
        parse(shlex.join(["python", f"{script}.py", *words[at + 1 :]]))
    else:
        script = words[0].removesuffix(".py").removeprefix("my_")  # a fork has the flags of what it is of
        module = importlib.import_module(script if script in NAMES else "ppo_continuous")
        if "--resume" in words:  # of a run that is not there
            del words[words.index("--resume") : words.index("--resume") + 2]
        module.parse([word for word in words[1:] if word != "--help"])
    for word in words:
        assert not word.startswith(("configs/", "suites/")) or (ROOT / word).is_file(), word


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_command_parses(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in commands(page.read_text()):
        try:
            parse(command)
        except SystemExit:
            pytest.fail(f"{page.name}: {command}")


@pytest.mark.parametrize(
    "command",
    [
        "python ppo_continuous.py --gama 0.9",
        "python -m benchmark sweep suites/none.yaml",
        "python -m benchmark evaluate runs/a --episode 3",
        "python -m benchmark evaluate runs/a -- --seed 1",
        "make trian",
        "python ppo_discrete.py --config configs/none.yaml",
    ],
)
def test_a_wrong_command_is_noticed(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((SystemExit, AssertionError)):
        parse(command)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        assert (page.parent / path).exists(), target
        titles = re.findall(r"^#+ (.*)$", (page.parent / path).read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in map(anchor, titles)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_is_named_of_the_zoo_is_there(page):
    for path in re.findall(r"(zoo/[\w.-]+__\w+(?:/[\w./-]+\w)?)", page.read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_context_of_a_diff_is_in_its_script(page):
    for name, diff in re.findall(r"```diff\n--- (\S+)\n(.*?)```", page.read_text(), re.DOTALL):
        source = (ROOT / name).read_text().splitlines()
        for line in diff.splitlines():
            assert line[0] in "+@" or line[1:] in source, line


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_python_in_the_pages_is_python(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        ast.parse(block)


def test_what_the_readme_shows_of_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, second = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(first.replace("total_timesteps=50_000", "total_timesteps=1536, compile=False") + second, {})
    gym.registry.pop("Room-v0")
    assert float(capsys.readouterr().out.splitlines()[-1]) < 0


def readme_rows(heading: str) -> list[list[str]]:
    section = (ROOT / "README.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [cells for cells in table_rows(section) if cells[0].startswith(("`", "[")) or heading == "Scripts"]


def finals(path: Path, script: str, environment: str) -> set[str]:
    """The final returns, with their intervals, of a report's table; of evaluations, the mean of the last."""
    if path.suffix == ".csv":
        rows = list(csv.DictReader(path.read_text().splitlines()))
        return {f"{statistics.fmean(float(row['return']) for row in rows if row['step'] == rows[-1]['step']):.0f}"}
    return {row[4] for row in table_rows(path.read_text()) if row[0] == environment and row[1].startswith(script)}


def unfounded(row: list[str]) -> str | None:
    """What of a row of the README's results is not in the file that it links to."""
    script, case, *numbers, source = row
    path = ROOT / re.search(r"\((.*)\)", source)[1]
    if path.suffix == ".json":
        measured = json.loads(path.read_text())[case]["steps_per_second"]
        medians = {f"{statistics.median(rates):,.0f}" for rates in measured.values()}
        return next((number for number in numbers if number and number not in medians), None)
    return None if numbers[0] in finals(path, script.strip("`").removesuffix(".py"), case) else numbers[0]


def test_the_readmes_results_are_in_results():
    rows = readme_rows("Results")
    assert len(rows) >= 11
    for row in rows:
        assert unfounded(row) is None, row
        assert unfounded([*row[:2], "7,612", *row[3:]]) == "7,612"


def test_the_readmes_expected_returns_are_in_results():
    for _, script, _, expected, _ in readme_rows("Scripts")[2:]:
        name = re.match(r"\[(\w+)\.py\]", script)[1]
        known = {row[2].split(" [")[0] for row in readme_rows("Results") if name in row[0]}
        for table in (ROOT / "results" / name).glob("*/results.md"):
            known |= {row[4].split(" [")[0].removesuffix(".0") for row in table_rows(table.read_text())}
        assert expected.split()[0] in known, script


INTERVAL = r"(-?[\d,.]+) \[(-?[\d,.]+), (-?[\d,.]+)\]"


def measured() -> dict[str, list[tuple[str, ...]]]:
    """The means with intervals in the tables of results/, by environment."""
    found = {}
    for path in (ROOT / "results").rglob("*.md"):
        for row in table_rows(path.read_text()):
            found.setdefault(row[0], []).extend(re.findall(INTERVAL, " ".join(row)))
    return found


def unmeasured(row: list[str], known: dict[str, list[tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """The means with intervals in a row of the page of results that, so rounded, are in no table of its environment."""

    def is_rounded(written: str, exact: str) -> bool:
        unit = 10.0 ** -len(written.partition(".")[2])
        return abs(float(written.replace(",", "")) - float(exact.replace(",", ""))) <= 0.501 * unit

    environment = re.match(r"[\w-]+-v\d", row[0])
    candidates = known[environment[0]] if environment else [each for every in known.values() for each in every]
    return [
        triple
        for triple in re.findall(INTERVAL, " ".join(row))
        if not any(all(map(is_rounded, triple, other)) for other in candidates)
    ]


def test_the_intervals_of_the_page_of_results_are_in_results():
    known, rows = measured(), table_rows((ROOT / "docs" / "results.md").read_text())
    with_intervals = [row for row in rows if re.search(INTERVAL, " ".join(row))]
    assert len(with_intervals) > 40
    for row in with_intervals:
        assert unmeasured(row, known) == [], row
    assert unmeasured(["Hopper-v4", "5", "7,739 [7,296, 8,237]"], known)  # HalfCheetah's
    assert unmeasured(["HalfCheetah-v4", "5", "7,738 [7,296, 8,237]"], known)


@pytest.mark.parametrize("script", NAMES)
def test_every_script_is_named_where_scripts_are_listed(script):
    for path in ("README.md", "docs/index.md", "pyproject.toml", "tests/gpu/test_cuda.py"):
        assert re.search(rf"\b{script}\b", (ROOT / path).read_text()), path


def test_the_readme_fits_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


def test_every_page_is_in_the_sites_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = {value for section in yaml.safe_load(text)["nav"] for value in leaves(section)}
    assert {path.name for path in PAGES[1:]} == listed


def leaves(node: object) -> list[str]:
    if isinstance(node, str):
        return [node]
    return [leaf for child in (node.values() if isinstance(node, dict) else node) for leaf in leaves(child)]
