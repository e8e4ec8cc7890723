"""The zoo: trained policies, each as a run directory of what playing it takes, small enough for a repository."""

import json
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
import yaml

from benchmark.errors import refuse
from benchmark.evaluate import load
from benchmark.groups import Group, gather_finished
from benchmark.options import make_folder
from benchmark.runs import WHERE, Run, file_name, is_run
from benchmark.suites import as_words


def anywhere(settings: dict, defaults: dict) -> dict:
    """Arguments as if the run had been made wherever."""
    return settings | {name: defaults[name] for name in WHERE & settings.keys()}


def command_of(script: str, settings: dict, defaults: dict) -> str:
    """By which anybody trains the same: the environment, and what differs from the defaults."""
    told = {name: value for name, value in settings.items() if name == "env_id" or value != defaults.get(name)}
    words = [as_words(name, value) for name, value in told.items()]
    return shlex.join(["python", f"{script}.py", *(word for each in words for word in each)])


def final_policy(run: Run) -> Path:
    return run.policies()[run.result["evaluation"]["step"]]


def fill(entry: Path, run: Run, group: Group) -> None:
    """The files of an entry, from the run that is kept of a group."""
    import torch

    settings, meta = anywhere(run.config, run.defaults), dict(run.meta)
    meta.pop("host", None)
    meta["command"] = command_of(run.script, settings, run.defaults)
    meta["final_returns"] = {
        other.config["seed"]: mean for other, mean in zip(group.runs, group.final.tolist(), strict=True)
    }
    policy = torch.load(final_policy(run), map_location="cpu", weights_only=True)
    policy["args"] = anywhere(policy["args"], run.defaults)
    kept = entry / final_policy(run).relative_to(run.directory)
    kept.parent.mkdir()
    torch.save(policy, kept)
    (entry / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    (entry / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    shutil.copy(run.source, entry)
    shutil.copy(run.directory / "evaluations.csv", entry)


def median_run(group: Group) -> Run:
    """The lower one, of an even number."""
    return group.runs[int(np.argsort(group.final, kind="stable")[(len(group.runs) - 1) // 2])]


def put(group: Group, output: Path) -> Path:
    """The median seed of a group becomes its entry, in the place of an earlier one; both are whole at any time."""
    run = median_run(group)
    entry = output / file_name(f"{group.env_id}__{run.script}")
    if entry.exists() and not (is_run(entry) and not (entry / "checkpoint.pt").exists()):
        refuse(f"--output {output}: {entry} is no entry of a zoo, and in its place")
    with tempfile.TemporaryDirectory(prefix=".new-", dir=output) as folder:
        new = Path(folder) / "new"
        new.mkdir()
        fill(new, run, group)
        if entry.exists():
            entry.rename(Path(folder) / "old")
        new.rename(entry)
    return entry


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_groups(groups: list[Group]) -> None:
    """One method for a script and environment, and of each the policies."""
    methods: dict[tuple[str, str], list[str]] = {}
    for group in groups:
        methods.setdefault((group.runs[0].script, group.env_id), []).append(group.method)
        run = median_run(group)
        if run.result["evaluation"]["step"] not in run.policies():
            refuse(f"{run.directory}: lacks the policy of its last evaluation")
        load(run)
    for (script, env_id), names in methods.items():
        if len(names) > 1:
            refuse(f"{script} on {env_id}: there are runs of {' and of '.join(names)}; name those of one")


def zoo(
    runs: Annotated[list[Path], tyro.conf.Positional],
    /,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("zoo"),
) -> None:
    """Keep the policies of finished runs, each as a run directory of 1 MB at most, of games 7, to be evaluated.

    Of the seeds of a script on an environment the median one is kept, with its policy after the last step, which is
    the one whose return a report states. An earlier entry of the same name is replaced.

        python -m benchmark zoo sweeps/mujoco-1m

    Args:
        runs: run directories, or folders of them
        output: a folder, in which an entry is named by its environment and script
    """
    found = gather_finished(runs)
    check_groups(found.groups)
    make_folder(output)
    for group in found.groups:
        entry, run = put(group, output), median_run(group)
        told = f"seed {run.config['seed']}, the median of {len(group.runs)}"
        earned = run.result["evaluation"]["mean"]
        print(f"{entry}  {told}, final evaluation return {earned:,.1f}, {size(entry) / 1000:,.0f} kB")
