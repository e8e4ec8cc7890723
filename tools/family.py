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
# Each source with those who take its blocks. The four below still have the form before the flagship was redrawn.
FAMILIES = {
    "ppo_continuous.py": ["ppo_atari_cnn.py"],
    "ppo_discrete.py": ["ppo_beta.py", "grpo.py", "sac_continuous.py"],
}
# What differs on purpose, and why.
DIFFERENT = {
    "Args": "each algorithm has its own",
    "train": "each algorithm has its own",
    "check": "each algorithm has its own arguments to refuse",
    "check_spaces": "each algorithm has its own spaces",
    "Agent": "SAC has two critics, GRPO none; policies are of several distributions, and images take convolutions",
    "log_prob": "each distribution has its own",
    "ppo_loss": "the entropy of a categorical or a Beta policy depends on the state",
    "Policy": "SAC's is squashed, and its value is the lower of two; that of discrete actions chooses",
    "load_policy": "GRPO and SAC do not scale rewards; a Box has bounds, discrete actions have first choices and sizes",
    "Batch": "GRPO has no critic; the Beta policy keeps what its rollout's policy expected, frames are bytes",
    "make_eval_env": "ppo_beta.py sees images too, ppo_atari_cnn.py games",
    "make_train_env": "ppo_beta.py sees images too",
    "make_envpool": "ppo_beta.py sees images too",
    "Environments": "ppo_atari_cnn.py plays the emulator's own vector environment, and a lost life is an end",
    "EnvPool": "ppo_atari_cnn.py plays games, which have lives",
    "prepare": "ppo_atari_cnn.py plays games, which have one kind of frames, and resolves a precision",
    "Rollout": "ppo_atari_cnn.py keeps what its network said while it played; to ask again would be dear",
    "collect": "ppo_atari_cnn.py chooses among actions, by the whole network, on its device",
    "estimate": "ppo_atari_cnn.py clips rewards and estimates once, by the values of the rollout",
    "batch_of": "ppo_atari_cnn.py has the log-probabilities from the rollout",
    "improve": "ppo_atari_cnn.py estimates once; its policy has no deviation",
    "Run": "`announce` says the sizes of another network",
    "RANGES": "each algorithm has its own arguments",
    "update": "each algorithm has its own",
    "compile_update": "the updates take different batches",
    "MEASURES": "each algorithm measures its own",
    "STATE": "each algorithm has its own",
    "SECONDS": "SAC learns while it collects",
    "TABLES": "each algorithm has its own columns",
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
