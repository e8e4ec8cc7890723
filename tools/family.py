"""Copies what scripts share from the flagship into the others, so that a mend is one edit and one command.

    python tools/family.py            # copies
    python tools/family.py --check    # only says what differs; exit status 1 if anything does

Top-level functions, classes and constants of the same name are the same, byte for byte, in every script, except those
in `DIFFERENT`.
"""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Each source with those who take its blocks.
FAMILIES = {
    "ppo_continuous.py": ["ppo_beta.py"],
    "ppo_discrete.py": [],
    "ppo_atari_cnn.py": [],
    "grpo.py": [],
    "sac_continuous.py": [],
}
# What differs on purpose, and why.
DIFFERENT = {
    "Args": "each algorithm has its own",
    "RANGES": "each algorithm has its own arguments",
    "Agent": "each algorithm has its own networks",
    "log_prob": "each distribution has its own",
    "ppo_loss": "the entropy of a Beta policy depends on the state",
    "Rollout": "the Beta policy's keeps alpha and beta",
    "collect": "a Beta policy acts by two outputs; ppo_beta.py keeps images as bytes",
    "estimate": "ppo_beta.py sees images through an encoder, in parts",
    "batch_of": "the Beta policy's probabilities are those it acted with",
    "improve": "each policy has its own measures; the Gaussian's deviation has a floor",
    "train": "each algorithm shows what it measures",
    "Policy": "each distribution has its own",
    "compile_update": "ppo_beta.py keeps images as bytes",
    "Run": "ppo_beta.py has no log_std, whose device the Gaussian's announces",
    "make_env": "ppo_beta.py sees images too",
    "make_eval_env": "ppo_beta.py sees images too",
    "TrainEnv": "ppo_beta.py sees images too",
    "EnvPool": "ppo_beta.py sees images too",
    "prepare": "each algorithm has its own spaces",
}


def blocks(source: str) -> dict[str, tuple[int, int]]:
    """First and last line of each top-level function, class and constant, decorators included."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = first, node.end_lineno
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.lineno, node.end_lineno
    return found


def differences(source: str, other: str) -> dict[str, str]:
    """The source's text of each block that is another in the other script, by name."""
    ours, theirs = blocks(source), blocks(other)
    found = {}
    for name in ours.keys() & theirs.keys() - DIFFERENT.keys():
        text, there = (lines(*pair) for pair in ((source, ours[name]), (other, theirs[name])))
        if text != there:
            found[name] = text
    return found


def lines(source: str, span: tuple[int, int]) -> str:
    return "\n".join(source.split("\n")[span[0] - 1 : span[1]])


def updated(source: str, other: str) -> str:
    """The other script with the source's blocks."""
    for name, text in differences(source, other).items():
        first, last = blocks(other)[name]
        rows = other.split("\n")
        other = "\n".join([*rows[: first - 1], *text.split("\n"), *rows[last:]])
    return other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say what differs")
    check, differ = parser.parse_args().check, False
    for source, others in FAMILIES.items():
        text = (ROOT / source).read_text()
        for path in (ROOT / other for other in others):
            other = path.read_text()
            for name in sorted(differences(text, other)):
                differ = True
                print(f"{path.name}: {name} {'is not that of' if check else 'copied from'} {source}")
            if not check:
                path.write_text(updated(text, other))
    sys.exit(check and differ)


if __name__ == "__main__":
    main()
