"""What scripts share is the same in all of them, to the byte."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tools import family

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))

SOURCE = '''import math

LIMIT = 3


class Args:
    clip_coef: float = 0.2


@cached
def shared(x: int) -> int:
    """Long."""
    return x + LIMIT


def own(x):
    return math.pi


if __name__ == "__main__":
    shared(1)
'''
OWN = {"Args"}


def test_shared_blocks_are_identical():
    result = subprocess.run([sys.executable, ROOT / "tools" / "family.py", "--check"], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_every_script_belongs_to_the_family():
    assert {path.name for path in SCRIPTS} == {family.FLAGSHIP, *family.DIFFERENT}


def test_every_script_hears_of_interrupts():
    """What it is run by is no block, and only of some scripts is a process interrupted in the tests."""
    for path in SCRIPTS:
        *_, last = ast.parse(path.read_text()).body
        assert ast.unparse(last).startswith("if __name__ == '__main__':"), path.name
        if path.name != "ppo_atari_cnn.py":  # whose environments are ale-py's alone
            assert ast.unparse(last.body[0]) == "sys.path.append(os.getcwd())", path.name
        assert ast.unparse(last.body[-1]) == "train(interrupts=catch_interrupts(), args=parse(sys.argv[1:]))", path.name


def test_every_exception_is_one():
    """What stands in DIFFERENT is in both scripts, and differs."""
    ours = (ROOT / family.FLAGSHIP).read_text()
    for script, reasons in family.DIFFERENT.items():
        theirs = (ROOT / script).read_text()
        split = {f"{name.split('.')[0]}." for name in reasons if "." in name}
        found = family.differences(ours, theirs, split)
        assert reasons.keys() <= found.keys(), script


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("x + LIMIT", "x - LIMIT", "shared"),
        ("x: int", "x: float", "shared"),
        ("@cached", "@lru_cache", "shared"),
        ("LIMIT = 3", "LIMIT = 4", "LIMIT"),
    ],
)
def test_a_changed_block_is_noticed_and_copied(old, new, name):
    changed = SOURCE.replace(old, new)
    assert changed != SOURCE and family.differences(SOURCE, SOURCE, OWN) == {}
    assert family.differences(SOURCE, changed, OWN).keys() == {name}
    assert family.updated(SOURCE, changed, OWN) == SOURCE


CLASS = """class Run:
    \"\"\"Long.\"\"\"

    columns = 3

    @property
    def own(self):
        return 1

    def shared(self):
        return 2
"""


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [("return 1", "return 9", None), ("return 2", "return 9", "Run.shared"), ("= 3", "= 9", "Run.__doc__")],
)
def test_of_a_class_one_method_may_differ(old, new, name):
    changed = CLASS.replace(old, new)
    assert changed != CLASS and set(family.differences(CLASS, changed, {"Run.own"})) == ({name} if name else set())
    assert family.updated(CLASS, changed, {"Run.own"}) == (CLASS if name else changed)


def test_what_is_not_shared_is_left_alone():
    other = SOURCE.replace("0.2", "0.3").replace("def own(x):\n    return math.pi", "def mine(x):\n    return 7")
    assert family.differences(SOURCE, other, OWN) == {} and family.updated(SOURCE, other, OWN) == other
    longer = other.replace("    return x + LIMIT", "    y = x\n\n    return y")
    assert family.updated(SOURCE, longer, OWN) == other


def test_it_says_what_differs_and_copies_only_without_check(tmp_path, monkeypatch, capsys):
    changed = SOURCE.replace("x + LIMIT", "x - LIMIT")
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "b.py").write_text(changed)
    monkeypatch.setattr(family, "ROOT", tmp_path)
    monkeypatch.setattr(family, "FLAGSHIP", "a.py")
    monkeypatch.setattr(family, "DIFFERENT", {"b.py": {}})

    def status(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["family.py", *words])
        with pytest.raises(SystemExit) as stop:
            family.main()
        return int(stop.value.code)

    assert status("--check") == 1 and (tmp_path / "b.py").read_text() == changed
    assert capsys.readouterr().out == "b.py: shared is not that of a.py\n"
    assert status() == 0 and (tmp_path / "b.py").read_text() == SOURCE
    assert capsys.readouterr().out == "b.py: shared copied from a.py\n"
    assert status("--check") == 0 and capsys.readouterr().out == ""


def test_scripts_import_nothing_of_ours():
    ours = {"benchmark", "tests", "tools", "examples", *(path.stem for path in SCRIPTS)}
    for path in SCRIPTS:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not ours & {module.split(".")[0] for module in modules}, path.name
