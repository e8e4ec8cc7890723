"""Trains another library's algorithm as a job like our scripts, and leaves a run directory like theirs.

    python benchmark/speed/learner.py --library sb3 --algorithm PPO --env-id CartPole-v1 --total-timesteps 100_000

The directory is there once the run is finished: it cannot be resumed.
"""

import json
import platform
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # of a script, its own folder is there

import gymnasium as gym
import numpy as np
import torch
import tyro
import yaml
from stable_baselines3.common.callbacks import BaseCallback

from benchmark.evaluate import play
from benchmark.runs import file_name, write_atomically, write_table
from benchmark.speed.libraries import build, load, make_envs

SCRIPT = Path(__file__).stem


@dataclass
class Args:
    library: str  # "sb3" or "sbx"
    algorithm: str  # its name there
    env_id: str
    total_timesteps: int
    settings: str = "{}"  # as rl-zoo writes them, as JSON
    seed: int = 1
    threads: int = 1
    num_evals: int = 10  # evenly spaced, the last at the end
    eval_episodes: int = 10
    runs_dir: str = "runs"


class Examiner(BaseCallback):
    """Evaluates between updates, at the first after each step that it is due at, and once the last is made."""

    def __init__(self, args: Args, started: float):
        super().__init__()
        self.args, self.started, self.paused = args, started, 0.0
        self.due = [args.total_timesteps * k // args.num_evals for k in range(1, args.num_evals)]
        self.evaluations: list[dict] = []  # rows of the tables
        self.progress: list[dict] = []

    def _on_rollout_start(self) -> None:
        if self.due and self.num_timesteps >= self.due[0]:
            self.examine()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self.examine()

    def examine(self) -> None:
        """As our scripts do: deterministic, the same seeds each time, and nothing of it changes training."""
        before, step = time.perf_counter(), self.num_timesteps
        self.due = [later for later in self.due if later > step]
        normaliser, seeds = self.model.get_vec_normalize_env(), list(range(10_000, 10_000 + self.args.eval_episodes))

        def policy(observations: np.ndarray) -> np.ndarray:
            seen = normaliser.normalize_obs(observations) if normaliser else observations
            return self.model.predict(seen, deterministic=True)[0]

        envs = [gym.make(self.args.env_id, disable_env_checker=True) for _ in seeds]
        with torch.random.fork_rng(devices=[]):
            episodes = play(policy, envs, seeds, sample=False, values=False)
        for k, (env, episode) in enumerate(zip(envs, episodes, strict=True)):
            env.close()
            row = {"step": step, "episode": k, "seed": episode.seed}
            self.evaluations.append(row | {"return": episode.total, "length": len(episode.rewards)})
        seconds = before - self.started - self.paused
        self.progress.append({"step": step, "wall_time": round(seconds, 3), "sps": round(step / seconds)})
        self.paused += time.perf_counter() - before
        print(f"{step:>11,}  evaluation {self.means()[step]:.1f}  {step / seconds:,.0f} steps/s", flush=True)

    def means(self) -> dict[int, float]:
        """Mean return of each evaluation, by its step."""
        steps = dict.fromkeys(row["step"] for row in self.evaluations)
        return {s: float(np.mean([row["return"] for row in self.evaluations if row["step"] == s])) for s in steps}


def learn(args: Args) -> Path:
    """Returns the run directory. Imports take no time here, compiling does."""
    library, settings = load(args.library, args.threads), json.loads(args.settings)
    examiner = Examiner(args, time.perf_counter())
    env = make_envs(args.env_id, settings.get("n_envs", 1), "sync", args.seed)
    model = build(library, args.algorithm, env, settings, args.seed)
    model.learn(args.total_timesteps, callback=examiner)
    env.close()
    return keep(args, examiner, [episode["r"] for episode in model.ep_info_buffer])


def keep(args: Args, examiner: Examiner, recent: list[float]) -> Path:
    """Filled under another name and then renamed: a run directory is never half there."""
    means, last = examiner.means(), examiner.progress[-1]
    evaluations = [{"step": step, "mean": mean} for step, mean in means.items()]
    summary = {"script": SCRIPT, "env_id": args.env_id, "seed": args.seed, "steps": last["step"]}
    summary |= {"wall_time": last["wall_time"], "sps": last["sps"], "evaluation": evaluations[-1]}
    summary |= {"best": max(evaluations, key=lambda row: row["mean"])}
    summary |= {"training_return": float(np.mean(recent)) if recent else None}
    packages = ["torch", "gymnasium", "stable_baselines3", *(["sbx-rl", "jax"] if args.library == "sbx" else [])]
    meta = {"script": SCRIPT, "command": shlex.join([sys.executable, *sys.argv]), "device": "cpu"}
    meta |= {"host": platform.node(), "packages": {name: version(name) for name in packages}}
    meta |= {"started": datetime.now().astimezone().isoformat(timespec="seconds")}
    runs, name = Path(args.runs_dir), file_name(f"{args.env_id}__{SCRIPT}__{args.seed}")
    runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=runs, ignore_cleanup_errors=True) as folder:
        new = Path(folder)
        shutil.copy(__file__, new)
        for table, rows in (("evaluations", examiner.evaluations), ("progress", examiner.progress)):
            write_table(new / f"{table}.csv", [rows[0], *(row.values() for row in rows)])
        texts = {"config.yaml": yaml.safe_dump(asdict(args), sort_keys=False)}
        texts |= {"meta.json": json.dumps(meta, indent=2), "result.json": json.dumps(summary, indent=2)}
        for file, text in texts.items():
            write_atomically(new / file, text + "\n")
        new.chmod(0o755)
        return new.rename(runs / f"{name}__{datetime.now():%Y%m%d-%H%M%S}")


if __name__ == "__main__":
    learn(tyro.cli(Args))
