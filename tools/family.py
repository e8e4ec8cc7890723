"""Copies what scripts share from the flagship into the others, so that a mend is one edit and one command.

    python tools/family.py            # copies
    python tools/family.py --check    # only says what differs; exit status 1 if anything does

Top-level functions, classes and constants of the same name are the same, byte for byte, in every script, except those
in `DIFFERENT`; of a class whose methods stand there, or what is above them as `__doc__`, all else is the same.
"""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGSHIP = "ppo_continuous.py"
# What differs on purpose, and why.
OWN = {
    "Args": "its own settings",
    "RANGES": "their ranges",
    "Agent": "its own networks",
    "collect": "its own policy acts",
    "improve": "its own steps and measures",
    "compile_update": "its own batch",
    "train": "its own parts",
    "prepare": "its own spaces and sizes",
}
PPO = OWN | {
    "log_prob": "its own distribution",
    "ppo_loss": "its entropy depends on the state",
    "batch_of": "its own distribution",
}
DIFFERENT = {
    "ppo_discrete.py": PPO
    | {
        "Run.announce": "its own spaces",
        "TrainEnv.reset": "masks",
        "TrainEnv.step": "masks",
        "Batch": "masks",
        "Rollout": "masks",
        "Policy": "masks",
        "play": "masks",
    },
    "ppo_atari_cnn.py": PPO
    | {
        "Run.announce": "games",
        "Environments": "ale-py steps the games together; a lost life is an end",
        "EnvPool": "games have lives",
        "make_eval_env": "games",
        "Rollout": "it keeps what the network said in the rollout; to ask again would be dear",
        "Batch": "frames",
        "estimate": "by the values of the rollout",
        "Policy": "a network of torch",
        "load_policy": "no bounds, nothing normalised",
    },
    "ppo_beta.py": PPO
    | {
        "make_env": "images too",
        "make_eval_env": "images too",
        "TrainEnv.__init__": "images too",
        "EnvPool._make": "images too",
        "Policy._choose": "two outputs",
        "Policy.value": "an encoder",
        "Rollout": "it keeps alpha and beta",
        "estimate": "an encoder",
    },
    "grpo.py": OWN
    | {
        "Run.announce": "groups",
        "Environments": "the members of a group begin alike",
        "EnvPool": "the members of a group begin alike",
        "TrainEnv.__doc__": "the members of a group begin alike",
        "TrainEnv.reset": "the members of a group begin alike",
        "TrainEnv.step": "infos",
        "MEASURES": "no critic",
        "Batch": "no critic",
        "Rollout": "episodes of groups",
        "Policy.__init__": "discrete actions too",
        "Policy._choose": "discrete actions too",
        "make_eval_env": "infos",
        "estimate": "advantages without a critic",
        "batch_of": "no critic",
        "update": "a reference policy",
    },
    "sac_continuous.py": OWN
    | {
        "Run.announce": "updates per step",
        "MEASURES": "its own losses",
        "update": "three learners",
        "in_numpy": "its networks lie side by side",
        "Policy.__init__": "its networks learn between one step and the next",
        "Policy._choose": "squashed",
        "Policy.value": "the lower of two critics",
        "load_policy": "no returns normalised",
        "Run.__init__": "a replay buffer",
        "Run.state": "a replay buffer",
        "Run.begin": "a replay buffer",
        "Run.show": "its pace is another once it learns",
    },
    "td3_continuous.py": OWN
    | {
        "Run.announce": "updates per step",
        "MEASURES": "its own losses",
        "update": "two learners and their targets",
        "in_numpy": "its networks lie side by side",
        "Policy.__init__": "its networks learn between one step and the next",
        "Policy._choose": "deterministic, but for noise",
        "Policy.value": "the lower of two critics",
        "load_policy": "no returns normalised",
        "Run.__init__": "a replay buffer",
        "Run.state": "a replay buffer",
        "Run.begin": "a replay buffer",
        "Run.show": "its pace is another once it learns",
    },
    "dqn.py": OWN
    | {
        "Run.announce": "updates per step; masks",
        "TrainEnv.__init__": "masks",
        "TrainEnv.reset": "masks",
        "TrainEnv.step": "masks",
        "MEASURES": "its own losses",
        "update": "a target network",
        "in_numpy": "it learns between one step and the next",
        "Policy": "greedy; masks",
        "play": "masks",
        "load_policy": "a target network",
        "Run.__init__": "a replay buffer",
        "Run.state": "a replay buffer",
        "Run.begin": "a replay buffer",
        "Run.show": "its pace is another once it learns",
    },
}


def blocks(source: str, different: set[str]) -> dict[str, tuple[int, int]]:
    """First and last line of each top-level function, class and constant that is shared.

    A class of which something is different counts by its methods.
    """
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = span(node)
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = span(node)
        elif isinstance(node, ast.ClassDef) and any(name.startswith(f"{node.name}.") for name in different):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            found |= {f"{node.name}.{method.name}": span(method) for method in methods}
            found[f"{node.name}.__doc__"] = span(node)[0], span(methods[0])[0] - 1
        elif isinstance(node, ast.ClassDef):
            found[node.name] = span(node)
    return {name: where for name, where in found.items() if not {name, name.split(".")[0]} & different}


def span(node: ast.stmt) -> tuple[int, int]:
    return min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))]), node.end_lineno


def lines(source: str, span: tuple[int, int]) -> str:
    return "\n".join(source.split("\n")[span[0] - 1 : span[1]])


def differences(source: str, other: str, different: set[str]) -> dict[str, str]:
    """The source's text of each block that is another in the other script, by name."""
    ours, theirs = blocks(source, different), blocks(other, different)
    texts = {name: (lines(source, ours[name]), lines(other, theirs[name])) for name in ours.keys() & theirs.keys()}
    return {name: text for name, (text, there) in sorted(texts.items()) if text != there}


def updated(source: str, other: str, different: set[str]) -> str:
    """The other script with the source's blocks."""
    for name, text in differences(source, other, different).items():
        first, last = blocks(other, different)[name]
        rows = other.split("\n")
        other = "\n".join([*rows[: first - 1], *text.split("\n"), *rows[last:]])
    return other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say what differs")
    check, differ, source = parser.parse_args().check, False, (ROOT / FLAGSHIP).read_text()
    for script, reasons in DIFFERENT.items():
        path, other = ROOT / script, (ROOT / script).read_text()
        for name in differences(source, other, set(reasons)):
            differ = True
            print(f"{script}: {name} {'is not that of' if check else 'copied from'} {FLAGSHIP}")
        if not check:
            path.write_text(updated(source, other, set(reasons)))
    sys.exit(check and differ)


if __name__ == "__main__":
    main()
