"""What scripts share is the same in all of them, to the byte."""

import ast
from pathlib import Path

SCRIPTS = sorted(path for path in Path(__file__).parent.parent.glob("*.py"))

# Top-level functions and classes that differ on purpose, and why.
DIFFERENT = {
    "Args": "each algorithm has its own",
    "train": "each algorithm has its own",
    "check": "each algorithm has its own arguments to refuse",
    "check_spaces": "each algorithm has its own spaces",
    "Agent": "SAC has two critics, GRPO none, ppo_discrete.py a categorical policy, ppo_beta.py an encoder",
    "log_prob": "each distribution has its own",
    "ppo_loss": "the entropy of a categorical or a Beta policy depends on the state",
    "Policy": "SAC's is squashed, and its value is the lower of two; that of ppo_discrete.py chooses",
    "load_policy": "GRPO and SAC do not scale rewards; a Box has bounds, discrete actions have first choices and sizes",
    "Batch": "GRPO has no critic; the Beta policy keeps what its rollout's policy expected",
    "make_eval_env": "ppo_beta.py sees images too, ppo_atari_cnn.py games",
    "make_train_env": "ppo_beta.py sees images too",
    "make_envpool": "ppo_beta.py sees images too",
    "Frames": "ppo_beta.py's are an environment's images, ppo_atari_cnn.py's as the emulator makes them",
    "Environments": "ppo_atari_cnn.py plays the emulator's own vector environment",
    "check_environments": "ppo_atari_cnn.py plays the emulator's own vector environment",
    "update": "each algorithm has its own",
    "compile_update": "the updates take different arguments",
}


def blocks(source: str) -> dict[str, str]:
    """The source of each top-level function and class, decorators included."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(source.split("\n")[first - 1 : node.end_lineno])
    return found


def differences(sources: dict[str, str]) -> list[str]:
    """Names that stand for different blocks in different scripts, without being on the list."""
    versions: dict[str, dict[str, str]] = {}
    for script, source in sources.items():
        for name, block in blocks(source).items():
            versions.setdefault(name, {})[script] = block
    return [name for name, found in versions.items() if name not in DIFFERENT and len(set(found.values())) > 1]


def test_shared_blocks_are_identical():
    assert differences({path.name: path.read_text() for path in SCRIPTS}) == []


def test_what_follows_the_algorithm_is_one_text():
    tails = [path.read_text().partition("# From here on every script is the same.")[2] for path in SCRIPTS]
    assert tails[0].rstrip().endswith("train(interrupts=catch_interrupts(), args=parse())")
    assert len(set(tails)) == 1


def test_a_changed_block_is_noticed():
    source = (SCRIPTS[0]).read_text()
    assert differences({"a.py": source, "b.py": source}) == []
    changed = source.replace("beta1: float = 0.9", "beta1: float = 0.8").replace(
        "    clip_coef: float", "    clip: float"
    )
    assert differences({"a.py": source, "b.py": changed}) == ["Learner"]


def test_every_exception_is_about_a_block():
    names = {name for path in SCRIPTS for name in blocks(path.read_text())}
    assert set(DIFFERENT) <= names


def test_scripts_import_nothing_of_ours():
    for path in SCRIPTS:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            ours = {"benchmark", "tests", *(other.stem for other in SCRIPTS)}
            assert not ours & {module.split(".")[0] for module in modules}, path.name
