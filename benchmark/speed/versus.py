"""The command that compares a script with other libraries by what they learn, and how soon."""

import json
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import tyro

from benchmark.errors import refuse
from benchmark.jobs import ROOT, Job
from benchmark.options import at_least, make_folder, need
from benchmark.runs import file_name, import_script
from benchmark.speed.cases import CASES, LEARNER, PACKAGES
from benchmark.speed.rl_zoo import SETTINGS
from benchmark.suites import check, job_of
from benchmark.sweep import end_if_failed, previous_states, run_sweep

LIBRARIES = {"sb3": "Stable-Baselines3", "sbx": "SBX"}
EPISODES = 10  # of an evaluation
THRESHOLDS = {"HalfCheetah-v4": (3000, 5000, 7000), "CartPole-v1": (475,), "LunarLander-v3": (200,)}


@dataclass(frozen=True)
class Contestant:
    name: str  # of its folders
    label: str
    script: Path
    words: tuple[str, ...] = ()


def contestants(script: str, env_id: str) -> list[Contestant]:
    """Ours, others with rl-zoo's settings where it has some, and the usual PPO by ours; says what is left out."""
    case, ours = CASES[script], ROOT / f"{script}.py"
    found = [Contestant("ours", "SoloRL", ours, ("--device", "cpu"))]  # as the others
    tuned = SETTINGS.get((case.algorithm, env_id))
    if tuned is None:
        print(f"left out: rl-zoo's settings; of {case.algorithm} on {env_id} none are known here")
    for library, title in LIBRARIES.items():
        if not find_spec(PACKAGES[library]):
            print(f"left out: {title}, which is not installed; pip install -e '.[peers]'")
            continue
        chosen = {} if tuned is None else {"rl-zoo": ("rl-zoo's settings", tuned)}
        if tuned is None or (library == "sb3" and not case.learns_off_policy):  # where the two are further apart
            chosen["defaults"] = ("defaults", {})
        for name, (told, settings) in chosen.items():
            words = ("--library", library, "--algorithm", case.algorithm, "--settings", json.dumps(settings))
            found.append(Contestant(f"{library}-{name}", f"{title}, {told}", LEARNER, words))
    textbook = ROOT / "configs" / script / "textbook.yaml"
    if textbook.is_file():  # named as seen from here, as in a command that anybody may repeat
        words = ("--device", "cpu", "--config", os.path.relpath(textbook))
        found.append(Contestant("cleanrl", "CleanRL's settings in SoloRL", ours, words))
    return found


def jobs_of(
    contestant: Contestant, env_id: str, seeds: int, words: tuple[str, ...], threads: int, folder: Path
) -> list[Job]:
    own, all_words = (contestant.script, env_id), (*contestant.words, *words)
    return [
        job_of(*own, seed, all_words, contestant.label, folder / f"{contestant.name}__{seed}", threads)
        for seed in range(1, seeds + 1)
    ]


def versus(
    env_id: Annotated[str, tyro.conf.Positional],
    /,
    script: str = "ppo_continuous",
    total_timesteps: int = 1_000_000,
    seeds: int = 3,
    eval_every: int = 50_000,
    threads: int | None = None,
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
) -> None:
    r"""Compare a script with other libraries by what they learn, and in how many minutes.

    Ours with its defaults, Stable-Baselines3 and SBX with rl-zoo's tuned settings where there are some, and the usual
    PPO. They run one after the other, so leave the machine alone; all are evaluated alike, which their minutes leave
    out. Started again, it goes on: what is finished stays, another library's run that was interrupted begins anew. The
    figure and the tables, versus.png and .svg, .md and .csv, are of what is finished, also once it is stopped.

        python -m benchmark versus HalfCheetah-v4
        python -m benchmark versus HalfCheetah-v4 --script sac_continuous \
            --total-timesteps 300_000

    Args:
        env_id: a Gymnasium id
        script: one of ours
        total_timesteps: steps of each run
        seeds: seeds 1 to this
        eval_every: steps between evaluations
        threads: of each run; by default as many as the script has
        output: a folder; by default versus/ and a name that follows from environment and script
    """
    need("matplotlib", "scipy")
    compared = [name for name, case in CASES.items() if "CnnPolicy" not in case.theirs.values()]
    if script not in compared:
        refuse(f"--script {script}: has no comparison; there is one for {', '.join(compared)}")
    at_least(1, seeds=seeds, eval_every=eval_every, threads=1 if threads is None else threads)
    if total_timesteps < eval_every:
        refuse(f"--total-timesteps {total_timesteps}: must be at least --eval-every, {eval_every}")
    check(ROOT / f"{script}.py", [env_id], [])
    threads = threads or import_script(ROOT / f"{script}.py").Args.threads
    folder = (output or Path("versus") / file_name(f"{env_id}__{script}")).resolve()
    words = ("--total-timesteps", str(total_timesteps), "--num-evals", str(total_timesteps // eval_every))
    words += ("--eval-episodes", str(EPISODES))
    entered = contestants(script, env_id)
    jobs = {each: jobs_of(each, env_id, seeds, words, threads, folder) for each in entered}
    in_turn = [job for round in zip(*jobs.values(), strict=True) for job in round]  # one seed of all before the next
    settled = previous_states(in_turn, retry_failed=True, advice="choose another --output")
    for job in in_turn:
        if (run := job.run()) and run.config["threads"] != threads:
            refuse(f"--threads {threads}: {run.directory} has {run.config['threads']}; choose another --output")
    make_folder(folder)
    try:
        watch = run_sweep(in_turn, settled)
    finally:
        from benchmark.speed.race import tell

        found = {c.label: [job.run() for job in own if job.state() == "done"] for c, own in jobs.items()}
        tell(found, env_id, THRESHOLDS.get(env_id, ()), folder)
    end_if_failed(watch, "the same command tries again")
