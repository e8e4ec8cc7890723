"""A stand-in for a training script: leaves what the contract says, in a tenth of a second, and misbehaves on demand."""

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass
class Args:
    env_id: str = "Nowhere-v0"
    seed: int = 1
    threads: int = 1
    runs_dir: str = "runs"
    total_timesteps: int = 100
    learning_rate: float = 0.1
    # or: crash, leave (with exit status 0, unfinished), hang, stubborn (hangs, ignores SIGTERM), killed (once), slow,
    # slow-if-bad, full-disk
    mood: str = "well"
    resume: str | None = None
    config: str | None = None  # is not read


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in vars(Args()).items():
        kind = str if default is None else type(default)
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=default)
    args = parser.parse_args()
    if args.resume:
        run = Path(args.resume)
        vars(args).update(yaml.safe_load((run / "config.yaml").read_text()))
    else:
        run = Path(args.runs_dir) / f"{args.env_id}__{Path(__file__).stem}__{args.seed}__20260101-000000"
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in vars(args).items() if k != "resume"}))
        (run / Path(__file__).name).write_text(Path(__file__).read_text())
        (run / "meta.json").write_text(json.dumps({"script": Path(__file__).stem, "folder": os.getcwd()}))
        (run / "progress.csv").write_text("step,wall_time,sps\n")
        (run / "episodes.csv").write_text("step,wall_time,return,length\n")
        (run / "evaluations.csv").write_text("step,episode,seed,return,length\n")
    if args.mood == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(f"began {os.getpid()}", flush=True)
    if args.mood == "crash":
        raise RuntimeError("the critic is a divergent one")
    if args.mood == "leave":
        sys.exit(0)
    if args.mood == "full-disk":
        Path("/dev/full").write_text("rows")
    if args.mood in ("hang", "stubborn"):
        time.sleep(60)
    if args.mood == "killed" and not args.resume:
        os.kill(os.getpid(), signal.SIGKILL)
    half = args.total_timesteps // 2
    for step in (half, args.total_timesteps):
        if step == half and args.resume:
            continue
        value = -((args.learning_rate - 0.3) ** 2) + args.seed / 1000 - (step == half)
        with (run / "progress.csv").open("a") as file:
            file.write(f"{step},0.1,1000\n")
        with (run / "evaluations.csv").open("a") as file:
            file.write(f"{step},0,10000,{value},10\n")
        with (run / "episodes.csv").open("a") as file:
            file.write(f"{step},0.1,{value},10\n")
        if step == half and args.mood.startswith("slow"):
            time.sleep(60 if args.mood == "slow" else 3 * (args.learning_rate > 0.5))
    evaluation = {"step": args.total_timesteps, "mean": value, "std": 0.0}
    result = {"evaluation": evaluation, "best": evaluation | {"mean": value + 1}, "training_return": value}
    result |= {"steps": args.total_timesteps, "wall_time": 0.1, "sps": 1000.0}
    (run / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
