"""A study of one script and environment from end to end: a sweep of one job, then what the report makes of it."""

import shutil
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from benchmark.errors import refuse
from benchmark.evaluate import draw_without_display, film, load_player, to_gif
from benchmark.groups import gather
from benchmark.jobs import Job
from benchmark.options import at_least, check_seed, make_folder, need
from benchmark.report import film_of, find_baselines
from benchmark.runs import Run, file_name, replacing, write_atomically
from benchmark.suites import Suite, check, jobs_of
from benchmark.sweep import end_if_failed, previous_states, run_sweep


def keep_checkpoint(run: Run, step: int, folder: Path, filmed: bool) -> np.ndarray:
    """The policy of an evaluation, a film of its best episode, and its rows; what it earned."""
    at = run.evaluations["step"] == step
    here = {name: column[at] for name, column in run.evaluations.items()}
    folder.mkdir(parents=True, exist_ok=True)
    if step not in run.policies():
        refuse(f"{run.directory}: lacks the policy of its evaluation at step {step:,}")
    policy, kept = run.policies()[step], folder / "policy.pt"
    seen = kept.exists() and kept.read_bytes() == policy.read_bytes() and (folder / "episode.gif").exists()
    if not seen:
        (folder / "episode.gif").unlink(missing_ok=True)
    with replacing(kept) as unfinished:
        shutil.copy(policy, unfinished)
    rows = (run.directory / "evaluations.csv").read_text().splitlines(keepends=True)
    write_atomically(folder / "evaluations.csv", "".join(r for r in rows if r.startswith(("step,", f"{step},"))))
    if filmed and not seen:
        player = load_player(run, kept, {}, "rgb_array")
        film(player, int(here["seed"][here["return"].argmax()]), False, folder / "episode.mp4")
        to_gif(folder / "episode.mp4")
    return here["return"]


def train_one(job: Job, output: Path, filmed: bool = False) -> Run:
    """Trains, or goes on with, a job below `output`; the finished run, with which nothing is done again."""
    settled = previous_states([job], retry_failed=True, advice="choose another --output")
    if not settled:
        check(Path(job.script), [job.env_id], job.words, filmed)
    make_folder(output)
    end_if_failed(run_sweep([job], settled), "the same command tries again")
    return job.run()


def study(
    script: Annotated[str, tyro.conf.Positional],
    env_id: Annotated[str, tyro.conf.Positional],
    /,
    seed: int = 1,
    threads: int = 1,
    no_video: bool = False,
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    words: Annotated[tuple[str, ...], tyro.conf.Suppress] = (),
) -> None:
    """Train one script on one environment, and show how it went from a random policy to the last one.

    Afterwards the output folder holds the run; checkpoints/025, 050 and 100 with the policy, its returns, a film and an
    animation; and the report. Arguments after -- go to the script. Started again, it goes on where it was stopped.

    Args:
        script: name of one of ours, or path of another
        env_id: a Gymnasium id
        seed: the seed
        threads: torch threads of the run
        no_video: film no checkpoints
        output: the folder; by default studies/ and a name that follows from the others
    """
    need("matplotlib", "scipy")
    at_least(1, threads=threads)
    check_seed(seed)
    draw_without_display()
    filmed = not no_video
    suite = Suite([script], [env_id], [seed], words=("--num-evals", "20", *words))
    directory = (output or Path("studies") / file_name(f"{env_id}__{Path(script).stem}__{seed}")).resolve()
    (job,) = jobs_of(suite, directory / "run", threads)
    trained = train_one(job, directory, filmed)
    from benchmark.compose import make_report

    material = gather([trained.directory])
    if not material.groups:
        refuse(f"{trained.directory}: {material.left_out[trained.directory]}")
    baselines, films = find_baselines(material.groups), {}
    for share in (0.25, 0.5, 1.0):
        folder = directory / "checkpoints" / f"{round(100 * share):03d}"
        step = int(material.groups[0].step_at(share))
        returns = keep_checkpoint(trained, step, folder, filmed)
        earned = f"evaluation return {returns.mean():,.1f} ± {returns.std():,.1f}"
        print(f"{share:>4.0%}  step {step:>10,}  {earned}  {folder}")
        films |= {f"{share:.0%} of the run: {film_of(trained, step)}": folder / "episode.mp4"} if filmed else {}
    title = f"{Path(script).stem} on {env_id}"
    print(make_report(material, title, baselines, films, directory / "report"))
    print(directory / "report" / "index.html")
