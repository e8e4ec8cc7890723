"""Reports of made-up runs, whose right answers are known, and the statistics against rliable's."""

import csv
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.stats import trim_mean

pytest.importorskip("matplotlib")

from benchmark import compose, figures, stats, tables
from benchmark.__main__ import main
from benchmark.compose import FILMS_LIMIT, normalised_scores
from benchmark.groups import along, gather, methods_of, number
from benchmark.jobs import ROOT, Job
from benchmark.report import best_films, find_baselines, with_baseline
from benchmark.suites import Suite, keep_selection
from benchmark.tables import mixed_versions


def make_run(folder: Path, env_id: str, seed: int, script: str = "ppo_x", evaluations: int = 10, **more) -> Path:
    """A finished run whose evaluations rise to `final` (by default the seed), a step and a second at a time."""
    settings = {"env_id": env_id, "seed": seed, "gamma": 0.99, "total_timesteps": 100} | more.pop("settings", {})
    final, name = more.get("final", float(seed)), "-".join(f"{k}={v}" for k, v in settings.items())
    run = folder / f"{name}__{script}"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "meta.json").write_text(
        json.dumps({"script": script, "git_commit": "abcdef0", "command": f"python {script}.py"})
    )
    steps = range(10, 10 * evaluations + 1, 10)
    rows = [f"{step},{k},{k},{final * step / steps[-1] + k - 0.5},7" for step in steps for k in (0, 1)]
    (run / "evaluations.csv").write_text("step,episode,seed,return,length\n" + "".join(f"{row}\n" for row in rows))
    (run / "progress.csv").write_text("step,wall_time,sps\n" + "".join(f"{s},{s * 6},100\n" for s in steps))
    (run / "episodes.csv").write_text("step,wall_time,return,length\n" + "".join(f"{s},{s},{s},7\n" for s in steps))
    last = {"step": steps[-1], "mean": final}
    result = {"evaluation": last, "best": {"mean": final + 1}, "training_return": final - 1}
    (run / "result.json").write_text(json.dumps(result | {"wall_time": 60.0, "steps": steps[-1]}))
    return run


def evaluated(run: Path, earned: list[tuple[int, float]]) -> None:
    """As if these had been its evaluations' steps and returns, an episode each or several."""
    lines = "".join(f"{step},{n},{n},{value},7\n" for n, (step, value) in enumerate(earned))
    (run / "evaluations.csv").write_text("step,episode,seed,return,length\n" + lines)
    result, last = json.loads((run / "result.json").read_text()), earned[-1][0]
    mean = np.mean([value for step, value in earned if step == last]).item()
    (run / "result.json").write_text(json.dumps(result | {"evaluation": {"step": last, "mean": mean}}))


def report(*arguments: object) -> int:
    try:
        main(["report", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code
    return 0


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_tables_of_two_scripts_on_two_environments(tmp_path, capsys):
    for seed in (1, 2, 3, 4):
        for env_id in ("A-v0", "B-v0"):
            make_run(tmp_path / "runs", env_id, seed)
            make_run(tmp_path / "runs", env_id, seed, script="sac_x", final=seed + 10.0)
    assert report(tmp_path / "runs", "-o", tmp_path / "out", "--no-random", "--threshold", "A-v0=12") == 0
    results = rows(tmp_path / "out" / "results.csv")
    assert [(row["environment"], row["method"]) for row in results] == [
        (env_id, script) for env_id in ("A-v0", "B-v0") for script in ("ppo_x", "sac_x")
    ]
    first = results[0]
    assert [
        float(first[name])
        for name in ("final evaluation", "final evaluation IQM", "best evaluation (optimistic)", "training return")
    ] == [2.5, 2.5, 3.5, 1.5]
    assert 1 <= float(first["final evaluation low"]) < 2.5 < float(first["final evaluation high"]) <= 4
    (improved,) = rows(tmp_path / "out" / "improvements.csv")
    assert (improved["method"], improved["is better than"]) == ("sac_x", "ppo_x")
    assert float(improved["with probability"]) == 1.0

    # 12 is reached by seeds 2, 3 and 4, at the first step with (10 + seed) * step / 100 of at least 12.
    asked = {row["method"]: row for row in rows(tmp_path / "out" / "thresholds.csv")}
    assert asked["ppo_x"]["reached by"] == "0 of 4" and asked["ppo_x"]["median steps"] == "inf"
    assert asked["sac_x"]["reached by"] == "3 of 4"
    assert float(asked["sac_x"]["median steps"]) == np.median([100, 100, 90, np.inf])
    assert float(asked["sac_x"]["median seconds"]) == np.median([600, 600, 540, np.inf])
    assert "| not reached |" in (tmp_path / "out" / "thresholds.md").read_text()

    html = (tmp_path / "out" / "index.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", html)  # works without anything else
    assert "sac_x" in (told := (tmp_path / "out" / "improvements.svg").read_text()) and ">over ppo_x<" in told
    assert html.count("data:image/png") == 6 and "2.50" in html and "abcdef0" in html
    told = capsys.readouterr().out  # a table, not Markdown
    assert re.search(
        r"^A-v0\n +method +seeds +steps +final evaluation +training return\n +ppo_x +4 +100 +2.50 \[", told
    )
    assert "|" not in told
    for name in ("curves-steps", "training", "curves-time", "checkpoints", "boxes", "improvements"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5000 and (tmp_path / "out" / f"{name}.svg").exists()


def test_settings_that_differ_set_methods_apart_and_incidental_ones_do_not(tmp_path):
    for seed, rate, threads in ((1, 0.1, 1), (2, 0.1, 2), (1, 0.2, 1), (2, 0.2, 2)):
        make_run(tmp_path / "runs", "A-v0", seed, settings={"learning_rate": rate, "threads": threads})
    make_run(tmp_path / "runs", "B-v0", 1, settings={"learning_rate": 0.1, "gamma": 0.9})
    assert report(tmp_path / "runs", "-o", tmp_path / "out", "--no-random") == 0
    assert [(row["environment"], row["method"], row["seeds"]) for row in rows(tmp_path / "out" / "results.csv")] == [
        ("A-v0", "lr 0.1", "2"),
        ("A-v0", "lr 0.2", "2"),
        ("B-v0", "lr 0.1", "1"),
    ]


@pytest.mark.parametrize(
    ("default", "told"),
    [
        ("None", ["num envs 64", "num envs 128"]),  # the script decides it
        ("32", ["num envs 64, num steps 40", "num envs 64, num steps 64", "num envs 128, num steps 20"]),
    ],
)
def test_what_a_script_decides_by_a_swept_setting_sets_nothing_apart(tmp_path, default, told):
    steps = {("A-v0", 64): 40, ("A-v0", 128): 20, ("B-v0", 64): 64, ("B-v0", 128): 32}
    source = f"class Args:\n    num_envs: int = 64\n    num_steps: int | None = {default}\n"
    for (env_id, num_envs), num_steps in steps.items():
        for seed in (1, 2):
            run = make_run(tmp_path / "grid", env_id, seed, settings={"num_envs": num_envs, "num_steps": num_steps})
            (run / "ppo_x.py").write_text(source)
    assert labels(tmp_path / "grid")[:3] == told
    (tmp_path / "grid" / "mended").mkdir()
    run = make_run(tmp_path / "grid" / "mended", "A-v0", 1, settings={"num_envs": 64, "num_steps": 40})
    (run / "ppo_x.py").write_text(f"{source}    seed: int = 1\n")
    assert all("source" in label for label in labels(tmp_path / "grid"))


def test_what_a_grid_varies_sets_methods_apart_whatever_it_is(tmp_path):
    folder = tmp_path / "sweep"
    for seed, device in itertools.product((1, 2), ("cpu", "cuda")):
        make_run(folder / f"A-v0__ppo_x__device={device}__{seed}", "A-v0", seed, settings={"device": device})
    assert labels(folder) == ["ppo_x"]
    keep_selection(Suite(["ppo_x.py"], ["A-v0"], [1, 2], grid={"device": ["cpu", "cuda"]}), [], folder)
    assert labels(folder) == ["device cpu", "device cuda"]
    assert [len(group.runs) for group in gather([folder]).groups] == [2, 2]
    keep_selection(Suite(["a_x.py"], ["A-v0"], [1]), [], folder)  # another selection, later
    assert labels(folder) == ["device cpu", "device cuda"]


def test_a_threshold_is_reached_by_a_seeds_own_evaluations(tmp_path):
    for seed, steps in ((1, range(10, 101, 10)), (2, range(10, 101, 10)), (3, (25, 50, 75, 100))):
        run = make_run(tmp_path, "A-v0", seed)
        evaluated(run, [(step, min(100, step * 10 / 3)) for step in steps])
    (group,) = gather([tmp_path]).groups
    steps, seconds = group.reached(99)
    assert steps.tolist() == [30, 30, 50] and seconds.tolist() == [180, 180, 300]
    assert group.reached(101)[1].tolist() == [np.inf] * 3


def test_quantities_are_averaged_over_spans_of_the_run(tmp_path):
    table = {"step": np.array([1.0, 2.0, 7.0]), "return": np.array([2.0, 4.0, 9.0])}
    assert along(table, "return", 120)[:4].tolist() == [3, 5, 7, 9]  # a span is 2 steps; lines over those without
    make_run(tmp_path, "A-v0", 1)
    (group,) = gather([tmp_path]).groups
    np.testing.assert_allclose(group.spans[[0, -1]], [100 / 120, 100 - 100 / 120])


def test_curves_are_drawn_over_minutes_and_over_the_middles_of_spans(tmp_path):
    make_run(tmp_path, "A-v0", 1, final=5.0)
    drawn = compose.draw_runs(gather([tmp_path]).groups, {}, figures.colours(["ppo_x"]))
    (line,) = drawn["curves-time"].axes[0].lines
    np.testing.assert_allclose(line.get_xydata(), [[k, k / 2] for k in range(1, 11)])
    (line,) = drawn["training"].axes[0].lines
    assert 98 < line.get_xdata()[-1] < 100 == line.get_ydata()[-1]


def test_a_band_is_around_the_mean_and_the_random_policys_of_its_middle_half():
    axis, curves = figures.Figure().subplots(), np.array([[0.0, 1.0], [0.0, 2.0], [9.0, 6.0]])
    figures.draw_band(axis, np.array([10, 20]), curves, "red", "x")
    assert axis.lines[0].get_xydata().tolist() == [[10, 3], [20, 3]]
    middle, low, high = stats.mean_band(curves)
    assert middle.tolist() == [3, 3] and low[0] == 0 and 6 <= high[0] <= 9
    assert {*axis.collections[0].get_paths()[0].vertices[:, 1]} == {*low, *high}
    axis = figures.Figure().subplots()
    figures.draw_random(axis, {"A": np.array([0.0, 0.1, 0.2, 0.3, 1.4])}, "A")
    assert axis.lines[0].get_ydata()[0] == 0.4 and axis.patches[0].get_bbox().intervaly.tolist() == [0.1, 0.3]


@pytest.mark.parametrize(
    ("middle", "told"), [(-41.0, "random -41.0"), (-8.0, None), (-5.0, None), (30.0, "random 30.0")]
)
def test_the_random_policy_takes_no_room_from_the_curves(middle, told):
    axis = figures.Figure().subplots()
    figures.draw_band(axis, np.array([10, 20]), np.array([[-7.0, -4.0]]), "red", "x")
    figures.draw_random(axis, {"A": middle + np.array([-100.0, 0.0, 100.0])}, "A")
    low, high = axis.get_ylim()
    assert -9 < low < -7 and -4 < high < -3 and (told or low < middle < high)
    assert [text.get_text() for text in axis.texts] == ([told] if told else [])
    assert len(axis.lines) == (1 if told else 2)


@pytest.mark.parametrize(
    ("last", "told"),
    [
        (999_424, ["0", "500k", "1M"]),
        (98_304, ["0", "50k", "100k"]),
        (147_456, ["0", "75k", "150k"]),
        (2_998_272, ["0", "1.5M", "3M"]),
        (105_000, ["0", "52.5k", "105k"]),
        (7, ["0", "3.5", "7"]),
    ],
)
def test_the_end_of_a_run_is_a_tick(last, told):
    axes = figures.Figure().subplots(1, 2, sharex=True)
    for axis, end in zip(axes, (last, last / 3), strict=True):  # whichever is last
        axis.plot([1, end], [0, 1])
        figures.over_steps(axis)
    assert [figures.thousands(tick, None) for tick in axes[0].get_xticks()] == told
    assert axes[0].get_xlim()[0] == 0 and axes[0].get_xlim()[1] >= last


def test_only_what_all_seeds_logged_of_their_learning_is_drawn(tmp_path):
    for seed, more in ((1, ",loss,seconds_updating"), (2, ",seconds_updating")):
        run = make_run(tmp_path, "A-v0", seed)
        (run / "progress.csv").write_text(f"step,wall_time,sps{more}\n100,6,1{',1' * more.count(',')}\n")
    (group,) = gather([tmp_path]).groups
    assert group.quantities() == []


def test_a_run_whose_training_ended_no_episode_is_there(tmp_path):
    run = make_run(tmp_path, "A-v0", 1)
    result = json.loads((run / "result.json").read_text()) | {"training_return": None}
    (run / "result.json").write_text(json.dumps(result))
    (run / "episodes.csv").write_text("step,wall_time,return,length\n")
    material = gather([tmp_path])
    assert not material.left_out and np.isnan(material.groups[0].training).all()


def test_shares_of_the_run_are_those_of_the_evaluations_shown(tmp_path):
    for seed in (1, 2, 3):
        make_run(tmp_path, "A-v0", seed)
    groups = gather([tmp_path]).groups
    for draw in (figures.checkpoints, figures.boxes):
        (axis,) = draw(groups, {}, figures.colours(methods_of(groups))).axes
        assert [label.get_text() for label in axis.get_xticklabels()] == ["20%", "50%", "100%"]
    make_run(tmp_path, "A-v0", 1, script="sac_x", evaluations=2)
    groups = gather([tmp_path]).groups
    for draw in (figures.checkpoints, figures.boxes):
        (axis,) = draw(groups, {}, figures.colours(methods_of(groups))).axes
        assert [label.get_text() for label in axis.get_xticklabels()] == ["20% / 50%", "50%", "100%"]


def test_a_bar_in_a_name_parts_no_cells():
    assert tables.Table(["method"], [["a|b"]]).markdown().splitlines()[-1] == r"| a\|b |"


def test_labels_say_what_differs_in_words(tmp_path):
    settings = [{"learning_rate": 3e-4, "norm_obs": True}, {"learning_rate": 1e-3, "norm_obs": False}]
    for own in settings:
        make_run(tmp_path / "rates", "A-v0", 1, settings=own | {"gamma": 0.9})
        make_run(tmp_path / "both", "A-v0", 1, settings=own)
    make_run(tmp_path / "both", "A-v0", 1, script="sac_x")
    assert labels(tmp_path / "rates") == ["lr 3e-4, norm obs", "lr 1e-3, no norm obs"]
    assert labels(tmp_path / "both") == ["ppo_x, lr 3e-4, norm obs", "ppo_x, lr 1e-3, no norm obs", "sac_x"]
    for total in (60_000, 100_000):
        make_run(tmp_path / "lengths", "A-v0", 1, settings={"total_timesteps": total})
    assert labels(tmp_path / "lengths") == ["60k steps", "100k steps"]
    assert [number(steps) for steps in (0, 1_000_000, 2_500, 10_000)] == ["0", "1M", "2,500", "10k"]
    for rate, gamma in ((1.2345678e-4, 0.9999996), (1.2345679e-4, 0.9999999)):
        make_run(tmp_path / "near", "A-v0", 1, settings={"learning_rate": rate, "gamma": gamma})
    assert labels(tmp_path / "near") == ["gamma 0.9999996, lr 1.2345678e-4", "gamma 0.9999999, lr 1.2345679e-4"]


def labels(*paths: Path, baseline: str | None = None) -> list[str]:
    groups = gather([*paths]).groups
    return methods_of(with_baseline(groups, baseline)[0] if baseline else groups)


def test_methods_stand_in_the_order_of_their_sweep_or_behind_the_baseline(tmp_path, capsys):
    folder = tmp_path / "sweeps" / "rates"
    for script in ("a_x", "b_x"):
        for rate, final in ((1e-3, 1.0), (3e-4, 2.0)):
            job = folder / f"A-v0__{script}__learning-rate={rate:.0e}__1"
            make_run(job, "A-v0", 1, script=script, final=final, settings={"learning_rate": rate})
    assert labels(folder) == ["a_x, lr 3e-4", "a_x, lr 1e-3", "b_x, lr 3e-4", "b_x, lr 1e-3"]
    jobs = [
        Job(f"forks/{script}.py", "A-v0", seed, (), setting, f"{folder}/A-v0__{script}__{setting}__{seed}", "0")
        for seed in (2, 1)
        for script in ("b_x", "a_x")
        for setting in ("learning-rate=1e-03", "learning-rate=3e-04")
    ]
    keep_selection(Suite([], [], []), jobs, folder)
    # Of the first seed one alone is finished, which does not put its method before all others.
    first = folder / "A-v0__a_x__learning-rate=3e-04__2"
    make_run(first, "A-v0", 2, script="a_x", final=2.0, settings={"learning_rate": 3e-4})
    ordered = ["b_x, lr 1e-3", "b_x, lr 3e-4", "a_x, lr 1e-3", "a_x, lr 3e-4"]
    assert labels(folder) == ordered
    assert labels(folder, baseline="a_x, lr 1e-3") == [ordered[2], *ordered[:2], ordered[3]]

    assert report(folder, "-o", tmp_path / "out", "--no-random", "--baseline", "a_x, lr 1e-3") == 0
    compared = [(row["method"], row["is better than"]) for row in rows(tmp_path / "out" / "improvements.csv")]
    assert compared == [(method, ordered[2]) for method in [*ordered[:2], ordered[3]]]
    shown = (tmp_path / "out" / "curves-steps.svg").read_text()
    assert re.findall(r">([ab]_x, lr [^<]*)<", shown) == [ordered[2], *ordered[:2], ordered[3]]
    assert "<h1>rates</h1>" in (tmp_path / "out" / "index.html").read_text()
    capsys.readouterr()
    assert report(folder, "--baseline", "a_x") == 2
    assert "--baseline a_x: 2 methods have this name" in capsys.readouterr().err


def test_the_title_is_the_name_of_the_sweep_and_its_date(tmp_path):
    for seed, day in ((1, 3), (2, 4)):
        run = make_run(tmp_path / "cartpole-100k", "A-v0", seed)
        meta = json.loads((run / "meta.json").read_text()) | {"started": f"2026-11-0{day}T12:00:00+00:00"}
        (run / "meta.json").write_text(json.dumps(meta))
    assert report(tmp_path / "cartpole-100k", "-o", tmp_path / "out", "--no-random") == 0
    assert "<h1>cartpole-100k, 2026-11-04</h1>" in (tmp_path / "out" / "index.html").read_text()


def test_two_sources_of_a_script_are_not_one_method(tmp_path):
    for seed, text in ((1, "first"), (2, "first"), (3, "second")):
        (make_run(tmp_path / "runs", "A-v0", seed) / "ppo_x.py").write_text(text)
    groups = gather([tmp_path / "runs"]).groups
    assert sorted(len(group.runs) for group in groups) == [1, 2] and not mixed_versions(groups)
    assert all(re.fullmatch(r"source [0-9a-f]{8}", group.method) for group in groups)


def test_it_is_told_where_environments_were_trained_on_by_different_sources(tmp_path, capsys):
    for env_id, text in (("A-v0", "first"), ("B-v0", "second")):
        (make_run(tmp_path / "runs", env_id, 1) / "ppo_x.py").write_text(text)
    assert report(tmp_path / "runs", "-o", tmp_path / "out", "--no-random") == 0
    assert {row["method"] for row in rows(tmp_path / "out" / "results.csv")} == {"ppo_x"}
    told = r"ppo_x is not the same script everywhere: A-v0 (\w{8}), B-v0 (\w{8})"
    first, second = re.search(f"note: {told}", capsys.readouterr().out).groups()
    assert first != second and re.search(told, (tmp_path / "out" / "index.html").read_text())


def test_a_name_with_dollars_is_no_mathematics(tmp_path):
    for seed, rate in ((1, "$x^$"), (2, "$y^$")):
        make_run(tmp_path / "runs", "A$x^$-v0", seed, settings={"schedule": rate})
    groups = gather([tmp_path / "runs"]).groups
    colour = figures.colours(methods_of(groups))
    drawn = figures.curves(groups, {}, colour, lambda group: group.curves, figures.STEPS, "return")
    figures.save(drawn, tmp_path / "curves-v0.1")
    shown = (tmp_path / "curves-v0.1.svg").read_text()
    assert all(f">{name}<" in shown for name in ("A$x^$-v0", "schedule $x^$", "schedule $y^$"))


def test_a_seed_that_was_run_twice_is_one_seed(tmp_path):
    runs = [make_run(tmp_path / "runs", "A-v0", seed) for seed in (1, 2, 3)]
    again = make_run(tmp_path / "again", "A-v0", 3, final=5.0, settings={"num_evals": 3})  # which sets none apart
    for run, started in zip([*runs, again], ("2026-01-01", "2026-01-01", "2026-01-02", "2026-01-03"), strict=True):
        meta = json.loads((run / "meta.json").read_text())
        (run / "meta.json").write_text(json.dumps(meta | {"started": started}))
    material = gather([tmp_path / "again", tmp_path / "runs"])
    (group,) = material.groups
    assert group.final.tolist() == [1.0, 2.0, 5.0] and [run.config["seed"] for run in group.runs] == [1, 2, 3]
    assert material.left_out == {runs[2]: f"its seed was run again: {again}"}


def test_nothing_of_an_earlier_report_stays_in_its_folder(tmp_path):
    for script in ("ppo_x", "sac_x"):
        make_run(tmp_path / "two", "A-v0", 1, script=script)
    make_run(tmp_path / "one", "B-v0", 1)
    own = tmp_path / "out" / "notes.csv"
    mine = tmp_path / "mine" / "profiles.svg"
    mine.parent.mkdir()
    mine.touch()
    assert report(tmp_path / "one", "-o", tmp_path / "mine", "--no-random") == 0
    assert mine.exists()  # no report was there before
    for runs in ("two", "one"):
        assert report(tmp_path / runs, "-o", tmp_path / "out", "--no-random") == 0
        assert (tmp_path / "out" / "improvements.csv").exists() == (runs == "two")
        assert (tmp_path / "out" / "improvements.png").exists() == (runs == "two")
        own.touch()
    assert own.exists() and (tmp_path / "out" / "curves-steps.svg").exists()


def test_what_is_left_out_is_named(tmp_path, capsys):
    make_run(tmp_path / "runs", "A-v0", 1)
    (make_run(tmp_path / "runs", "A-v0", 2) / "result.json").unlink()
    (make_run(tmp_path / "runs", "A-v0", 3) / "result.json").write_text('{"evaluation": {"me')
    (make_run(tmp_path / "runs", "A-v0", 4) / "evaluations.csv").unlink()
    (make_run(tmp_path / "runs", "A-v0", 5) / "meta.json").write_text("[]")
    (make_run(tmp_path / "runs", "A-v0", 6) / "result.json").write_text('{"evaluation": {}}')
    (make_run(tmp_path / "runs", "A-v0", 7) / "config.yaml").write_text("env_id: [A")
    (make_run(tmp_path / "runs", "A-v0", 8) / "progress.csv").write_text("step,wall_time,sps\n")
    broken = {"evaluation": {"mean": float("nan")}, "best": {"mean": 1}, "training_return": None, "wall_time": 1}
    (make_run(tmp_path / "runs", "A-v0", 9) / "result.json").write_text(json.dumps(broken))
    (make_run(tmp_path / "runs", "A-v0", 10) / "config.yaml").unlink()
    (make_run(tmp_path / "runs" / "job-seed=11", "A-v0", 11) / "result.json").unlink()
    for seed in (11, 12):  # the one failed on the way, the other before there was a run
        job = tmp_path / "runs" / f"job-seed={seed}"
        job.mkdir(exist_ok=True)
        said = [
            "╭─ Value error ──╮",
            "│ --gamma 2: must be at most 1 │",
            "│ For full helptext, see x --help │",
            "╰──╯",
            "",
        ]
        (job / "failed.json").write_text(json.dumps({"reason": "exit status 1", "log": said}))
    assert report(tmp_path / "runs", "-o", tmp_path / "out", "--no-random") == 0
    assert [row["seeds"] for row in rows(tmp_path / "out" / "results.csv")] == ["1"]
    told, html = capsys.readouterr().out, (tmp_path / "out" / "index.html").read_text()
    for seed, why in (
        (2, "unfinished"),
        (3, "unfinished"),
        (4, "FileNotFoundError"),
        (5, "TypeError"),
        (6, "not evaluated"),
        (7, "ParserError"),
        (8, "progress.csv has no rows"),
        (9, "not numbers"),
        (10, "no config.yaml"),
        (11, "failed: exit status 1"),
        (12, "failed: exit status 1: --gamma 2: must be at most 1"),
    ):
        assert re.search(rf"left out: .*seed={seed}\b.*{why}", told) and why in html


def test_a_random_policy_and_films_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmark.report.baseline_of", lambda run: np.array([-5.0, -4.0, -3.0]))
    for env_id in ("A-v0", "B-v0"):
        run = make_run(tmp_path / "runs", env_id, 1)
        make_run(tmp_path / "runs", env_id, 1, script="sac_x", final=8.0)
        (run / "videos").mkdir()  # the script films the best episode
        for step, content in ((50, b"old"), (100, b"new" if env_id == "A-v0" else bytes(int(FILMS_LIMIT)))):
            (run / "videos" / f"step-{step:09d}.mp4").write_bytes(content)
    assert report(tmp_path / "runs", "-o", tmp_path / "out") == 0
    assert [row["random policy"] for row in rows(tmp_path / "out" / "results.csv")] == ["-4.0"] * 4
    reached = [float(row["return"]) for row in rows(tmp_path / "out" / "thresholds.csv")][::2]
    assert reached == pytest.approx([2.0, 6.8] * 2)  # of the way from -4 to 8
    html = (tmp_path / "out" / "index.html").read_text()
    assert "A-v0, ppo_x, seed 1, step 100: an episode of return 1.5, the best of 2<" in html  # of 0.5 and 1.5
    assert "data:video/mp4;base64,bmV3" in html and "1 more would make this page larger than 40 MB" in html
    assert (tmp_path / "out" / "profiles.png").exists() and (tmp_path / "out" / "aggregates.svg").exists()


def test_scores_have_no_scale_where_nothing_is_better_than_random(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmark.report.baseline_of", lambda run: np.array([run.config["floor"]]))
    for seed in (1, 2, 3):
        for env_id, floor in (("A-v0", 100.0), ("B-v0", 0.0), ("C-v0", 0.0)):
            make_run(tmp_path / "runs", env_id, seed, settings={"floor": floor})
    assert report(tmp_path / "runs", "-o", tmp_path / "out") == 0
    assert {row["environment"] for row in rows(tmp_path / "out" / "thresholds.csv")} == {"B-v0", "C-v0"}
    told = "normalised scores leave out A-v0: no mean there is better than a random policy's"
    assert told in capsys.readouterr().out and told.split(":")[0] in (tmp_path / "out" / "index.html").read_text()
    assert (tmp_path / "out" / "profiles.png").exists()  # one method, two environments


def test_one_seed_has_no_interval(tmp_path, capsys):
    make_run(tmp_path / "runs", "A-v0", 1)
    assert report(tmp_path / "runs", "-o", tmp_path / "out", "--no-random") == 0
    assert [row["final evaluation low"] for row in rows(tmp_path / "out" / "results.csv")] == ["nan"]
    assert re.search(r"ppo_x +1 +100 +1.00 +0.00\n", capsys.readouterr().out)


def test_two_seeds_have_no_interval():
    two, three = np.array([[1.0, 2.0], [3.0, 5.0]]), np.array([[1.0, 2.0], [3.0, 5.0], [4.0, 4.0]])
    levels = np.array([2.5])
    improved = [stats.probability_of_improvement([(a[:, 0], b[:, 0])]) for a, b in ((two, three), (three, three))]
    profiles = [stats.performance_profile(scores, levels) for scores in (two, three)]
    bands = [stats.mean_band(scores) for scores in (two, three)]
    means = [stats.with_interval(scores, stats.mean) for scores in (two, three)]
    for few, enough in (improved, profiles, bands, means):
        assert np.isfinite(few[0]).all() and np.isnan(few[1:]).all() and np.isfinite(enough[1:]).all()
    np.testing.assert_array_equal(bands[0][0], [2.0, 3.5])


def test_estimates_are_of_what_they_are_called():
    mean, middle = tables.estimates(np.array([0.0, 1.0, 2.0, 9.0]))
    assert (mean.middle, middle.middle) == (3.0, 1.5)
    made = compose.draw_scores({"x": np.array([[0.0], [1.0], [2.0], [9.0]])}, {"x": "red"})
    axes = {
        axis.get_title(): [line for line in axis.lines if line.get_marker() == "o"] for axis in made["aggregates"].axes
    }
    assert {title: dots[0].get_xdata()[0] for title, dots in axes.items()} == {"interquartile mean": 1.5, "mean": 3.0}


def test_seeds_are_drawn_anew_for_every_environment_and_every_method():
    _, low, high = stats.with_interval(np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), stats.mean)
    assert low < 0.5 < high
    same = np.arange(5.0)
    assert np.ptp(stats.probability_of_improvement([(same, same)])[1:]) > 0.1
    assert stats.performance_profile(np.array([[1.0], [2.0], [3.0]]), np.array([2.0]))[0] == [1 / 3]


def test_a_certain_improvement_is_a_dot_within_the_figure():
    figure = figures.intervals({"": [("a", 1.0, 1.0, 1.0), ("b", 0.5, np.nan, np.nan)]}, {}, "", within=(0, 1))
    (axis,) = figure.axes
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    assert [dot.get_xdata()[0] for dot in dots] == [0.5, 1.0] and axis.get_xlim()[1] > 1.0
    assert [label.get_text() for label in axis.get_yticklabels()] == ["b", "a"]


def test_seeds_stand_beside_their_mean_and_nothing_hangs_from_zero(tmp_path):
    for seed in (1, 2, 3):
        make_run(tmp_path, "A-v0", seed, final=-1000.0 - seed)
    (axis,) = figures.checkpoints(gather([tmp_path]).groups, {}, {"ppo_x": "red"}).axes
    means = [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "o"]
    seeds = [line.get_xdata() for line in axis.lines if line.get_marker() == "."]
    heights = [line.get_ydata()[0] for line in axis.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(heights, [-1002 * share for share in (0.2, 0.5, 1)])
    assert len(means) == 3 and all((beside > x + 0.05).all() for x, beside in zip(means, seeds, strict=True))
    assert not axis.patches and axis.get_ylim()[1] < -100


@pytest.mark.parametrize(("number", "inches"), [(1, 3.4), (4, 3.4), (5, 5.5)])
def test_figures_are_a_column_or_a_page_wide(tmp_path, number, inches):
    for env_id in range(number):
        make_run(tmp_path, f"E{env_id}-v0", 1)
    groups = gather([tmp_path]).groups
    drawn = figures.curves(groups, {}, {"ppo_x": "red"}, lambda group: group.curves, figures.STEPS, "return")
    figures.save(drawn, tmp_path / "curves")
    width = int.from_bytes((tmp_path / "curves.png").read_bytes()[16:20])
    assert width == 200 * inches and f'width="{72 * inches:g}pt"' in (tmp_path / "curves.svg").read_text()


@pytest.mark.parametrize("number", range(1, 10))
def test_panels_are_labelled_at_their_edges_and_overlap_nothing(number):
    with figures.plt.rc_context(figures.STYLE):
        figure, axes = figures.grid(number)
        for axis in axes:
            for name in ("a method, lr 3e-4", "another with a longer name"):
                axis.plot([0, 999_424], [0, -1234], label=name)
            figures.over_steps(axis)
            axis.set(ylabel="return", title="InvertedDoublePendulum-v4")
        figures.label_once(figure, axes)
        figures.legend_below(figure, axes)
        figure.draw_without_rendering()
    columns = axes[0].get_gridspec().ncols
    assert [k for k, axis in enumerate(axes) if axis.get_xlabel()] == [*range(max(0, number - columns), number)]
    assert [k for k, axis in enumerate(axes) if axis.get_ylabel()] == [*range(0, number, columns)]
    (legend,) = [axis.get_legend() for axis in figure.axes if axis.get_legend()] + figure.legends
    parts = [[axis.title, axis.xaxis, axis.yaxis] for axis in axes] + [[legend]]
    boxes = [[part.get_tightbbox() for part in here] for here in parts]
    for here, other in itertools.combinations(boxes, 2):
        assert not any(a.overlaps(b) for a, b in itertools.product(here, other))
    for box in itertools.chain(*boxes):
        assert (box.min >= 0).all() and (box.max <= figure.bbox.max).all()


def test_the_tables_that_are_kept_have_the_columns_of_a_report(tmp_path):
    make_run(tmp_path, "A-v0", 1)
    tables.results(gather([tmp_path]).groups, {}).write(tmp_path / "results")
    kept = [*(ROOT / "results").glob("**/results.csv")]
    for ending in ("csv", "md"):
        (header, *_) = (tmp_path / f"results.{ending}").read_text().splitlines()
        others = [path for path in kept if path.with_suffix(f".{ending}").read_text().splitlines()[0] != header]
        assert kept and not others


def test_training_and_losses_are_drawn_over_steps(tmp_path):
    run = make_run(tmp_path / "runs", "A-v0", 1, evaluations=6)
    lines = [f"{step},{step},100,{step / 10},{'nan' if step < 30 else 5}" for step in range(10, 70, 10)]
    (run / "progress.csv").write_text("\n".join(["step,wall_time,sps,policy_loss,q_loss", *lines]) + "\n")
    (group,) = gather([tmp_path / "runs"]).groups
    assert group.quantities() == ["policy_loss", "q_loss"]
    assert group.quantity("policy_loss")[0, 9::10].tolist() == [1, 2, 3, 4, 5, 6]  # a point a step
    q_loss = group.quantity("q_loss")[0]
    assert np.isnan(q_loss[:29]).all() and (q_loss[29:] == 5).all()
    assert group.returns_in_training[0, 9::10].tolist() == [10, 20, 30, 40, 50, 60]
    assert report(tmp_path / "runs", "-o", tmp_path / "out", "--no-random") == 0
    shown = (tmp_path / "out" / "losses-A-v0.svg").read_text()
    assert "policy loss" in shown and "q loss" in shown
    assert "training return" in (tmp_path / "out" / "training.svg").read_text()


def test_figures_show_the_first_methods_and_say_so(tmp_path):
    for place in range(10):
        make_run(tmp_path / "runs", "A-v0", 1, script=f"script_{place}")
    assert report(tmp_path / "runs", "-o", tmp_path / "out", "--no-random", "--baseline", "script_9") == 0
    shown = (tmp_path / "out" / "curves-steps.svg").read_text()
    assert {*re.findall(r"script_\d", shown)} == {f"script_{place}" for place in (9, 0, 1, 2, 3, 4, 5, 6)}
    assert "the first 8 of 10 methods" in (tmp_path / "out" / "index.html").read_text()


def test_training_time_is_without_evaluation(tmp_path):
    run = make_run(tmp_path / "runs", "A-v0", 1, evaluations=4)
    lines = [f"{step},{6 * step},100,10" for step in range(10, 50, 10)]  # a row tells of what was since the last
    (run / "progress.csv").write_text("\n".join(["step,wall_time,sps,seconds_evaluating", *lines]) + "\n")
    (group,) = gather([tmp_path / "runs"]).groups
    assert group.seconds.tolist() == [[50, 100, 150, 200]]


def test_scores_go_from_the_random_policys_mean_to_the_best_methods(tmp_path):
    for env_id, factor in (("A-v0", 1.0), ("B-v0", 10.0)):
        make_run(tmp_path / "runs", env_id, 1, final=1 * factor)
        make_run(tmp_path / "runs", env_id, 1, final=8 * factor, script="sac_x")
    baselines = {"A-v0": np.array([-6.0, -2.0]), "B-v0": np.array([-2.0])}
    scores, notes = normalised_scores(gather([tmp_path / "runs"]).groups, baselines)
    assert not notes and scores["sac_x"].tolist() == [[1.0, 1.0]]
    np.testing.assert_allclose(scores["ppo_x"], [[5 / 12, 12 / 82]])


def test_scores_leave_out_what_was_not_run_everywhere_and_seeds_that_others_lack(tmp_path):
    for env_id, seeds in (("A-v0", (1, 2, 3)), ("B-v0", (1, 2))):
        for seed in seeds:
            make_run(tmp_path, env_id, seed)
    make_run(tmp_path, "A-v0", 1, script="sac_x")
    scores, notes = normalised_scores(gather([tmp_path]).groups, dict.fromkeys(("A-v0", "B-v0"), np.zeros(1)))
    assert scores.keys() == {"ppo_x"} and scores["ppo_x"].tolist() == [[0.5, 1 / 1.5], [1.0, 2 / 1.5]]
    assert notes == [
        "normalised scores of ppo_x: the first 2 seeds on each environment, of 3",
        "normalised scores leave out sac_x: it was not run on B-v0",
    ]


def test_thresholds_that_are_asked_for_stand_alone(tmp_path):
    make_run(tmp_path, "A-v0", 1, final=8.0)
    found = tables.thresholds(gather([tmp_path]).groups, {"A-v0": np.array([-4.0])}, {"A-v0": [3.0]})
    assert [row[1:3] for row in found.rows] == [["asked for", 3.0]]


def test_there_is_no_random_policy_where_evaluations_differ(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmark.report.baseline_of", lambda run: np.zeros(1))
    for script, kwargs in (("ppo_x", "{}"), ("sac_x", '{"g": 1}')):
        make_run(tmp_path, "A-v0", 1, script=script, settings={"eval_env_kwargs": kwargs})
    assert find_baselines(gather([tmp_path]).groups) == {}


def test_a_film_that_is_too_large_takes_no_room_from_others(tmp_path, monkeypatch):
    monkeypatch.setattr(compose, "FILMS_LIMIT", 10)
    for name, size in (("a", 11), ("b", 3), ("c", 8), ("d", 7)):
        (tmp_path / name).write_bytes(b"x" * size)
    shown = compose.section_of_films({name: tmp_path / name for name in "abcd"})
    assert [f">{name}<" in shown for name in "abcd"] == [False, True, False, True] and "2 more" in shown


@pytest.mark.parametrize("best", [9, 10])
def test_seeds_stand_in_order_and_the_film_is_of_the_best(tmp_path, best):
    for seed in (9, 10):
        run = make_run(tmp_path / "runs", "A-v0", seed, final=1.0 + (seed == best))
        (run / "videos").mkdir()
        (run / "videos" / "step-000000100.mp4").touch()
        (run / "meta.json").write_text(json.dumps({"script": "ppo_x", "git_commit": "abc", "git_dirty": best == 9}))
    groups = gather([tmp_path / "runs"]).groups
    finals = {seed: 1.0 + (seed == best) for seed in (9, 10)}
    expected = [[seed, final, final + 1, final - 1, 1.0] for seed, final in finals.items()]
    assert [row[2:7] for row in tables.per_seed(groups).rows] == expected
    assert tables.results(groups, {}).rows[0][-1] == 1.0  # minutes
    assert [title.split(":")[0] for title in best_films(groups)] == [f"A-v0, ppo_x, seed {best}, step 100"]
    assert tables.provenance(groups).rows[0][2:4] == ["9 10", "abc (dirty)" if best == 9 else "abc"]


@pytest.mark.parametrize(
    ("table", "rows", "told"),
    [
        ("evaluations", 12, "evaluations.csv does not end with the evaluation of result.json"),
        ("evaluations", 19, "evaluations.csv does not end with"),  # within the last evaluation
        ("progress", 5, "progress.csv ends at step 50 of 100"),
    ],
)
def test_a_table_that_was_cut_is_not_reported(tmp_path, table, rows, told):
    for seed in (1, 2):
        run = make_run(tmp_path, "A-v0", seed)
    path = run / f"{table}.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[: 1 + rows]))
    material = gather([tmp_path])
    assert [len(group.runs) for group in material.groups] == [1] and told in material.left_out[run]


def test_the_later_of_two_runs_of_a_seed_is_told_by_the_time_and_not_by_the_clock(tmp_path):
    for final, started in ((20.0, "2026-11-29T12:00:00+02:00"), (30.0, "2026-11-29T11:00:00+00:00")):
        run = make_run(tmp_path / str(final), "A-v0", 1, final=final)
        meta = json.loads((run / "meta.json").read_text())
        (run / "meta.json").write_text(json.dumps(meta | {"started": started}))
    assert [group.final.tolist() for group in gather([tmp_path]).groups] == [[30.0]]


def test_a_setting_left_open_is_not_one_that_is_off(tmp_path):
    for seed in (1, 2):
        for value in (None, False):
            make_run(tmp_path, "A-v0", seed, settings={"shaped": value})
    assert sorted(labels(tmp_path)) == ["no shaped", "shaped none"]


def test_methods_stand_in_the_order_of_the_folders_named(tmp_path):
    for script in ("ppo_x", "a_fork"):
        make_run(tmp_path / script, "A-v0", 1, script=script)
    assert methods_of(gather([tmp_path / "ppo_x", tmp_path / "a_fork"]).groups) == ["ppo_x", "a_fork"]
    assert methods_of(gather([tmp_path / "a_fork", tmp_path / "ppo_x"]).groups) == ["a_fork", "ppo_x"]


def test_seeds_evaluated_at_other_steps(tmp_path):
    """A group's curve is at the steps that its seeds share; runs of other lengths are other groups."""
    for seed in (1, 2):
        make_run(tmp_path / "runs", "A-v0", seed)
    run = make_run(tmp_path / "runs", "A-v0", 4)
    evaluated(run, [(40, 1), (70, 1), (100, 2)])
    make_run(tmp_path / "runs", "A-v0", 3, evaluations=5, settings={"total_timesteps": 50})
    short, long = gather([tmp_path / "runs"]).groups
    assert (short.method, len(short.runs)) == ("50 steps", 1)
    assert (long.method, len(long.runs)) == ("100 steps", 3)
    assert long.curves[0].tolist() == [40, 70, 100]
    np.testing.assert_allclose(long.curves[1], [[0.4, 0.7, 1], [0.8, 1.4, 2], [1, 1, 2]])


def test_seeds_that_share_no_evaluation_are_compared_at_their_last(tmp_path):
    for seed, steps in ((1, (40, 100)), (2, (33, 66, 99))):
        run = make_run(tmp_path, "A-v0", seed)
        evaluated(run, [(step, step + seed) for step in steps])
    (group,) = gather([tmp_path]).groups
    assert group.curves[0].tolist() == [99.5] and group.curves[1].tolist() == [[101], [101]]


def test_seeds_that_end_with_their_last_episodes_are_compared(tmp_path):
    """As grpo.py's do: at evaluations that lie beside each other, and at the mean of their steps."""
    for seed, late in ((1, 0), (2, 2), (3, 4)):
        run = make_run(tmp_path / "runs", "A-v0", seed)
        evaluated(run, [(step + late, value + seed) for step, value in ((50, 1.0), (100, 2.0)) for _ in range(3)])
    assert report(tmp_path / "runs", "-o", tmp_path / "out", "--no-random") == 0
    assert [(row["method"], row["seeds"], row["steps"]) for row in rows(tmp_path / "out" / "results.csv")] == [
        ("ppo_x", "3", "102")
    ]
    other = make_run(tmp_path / "others", "A-v0", 1, script="sac_x")  # another script's end does not part these
    evaluated(other, [(93, 1)])
    (group, _) = gather([tmp_path / "runs", tmp_path / "others"]).groups
    steps, curves = group.curves
    assert steps.tolist() == [52, 102] and curves.tolist() == [[2, 3], [3, 4], [4, 5]]
    assert sorted(group.at_share(0.5)) == [2, 2, 2, 3, 3, 3, 4, 4, 4]


def test_a_thousand_runs(tmp_path):
    for seed in range(1000):
        make_run(tmp_path / "runs", f"E{seed % 5}-v0", seed, evaluations=500)
    assert report(tmp_path / "runs", "-o", tmp_path / "out", "--no-random") == 0
    results = rows(tmp_path / "out" / "results.csv")
    assert [row["seeds"] for row in results] == ["200"] * 5
    for k, row in enumerate(results):
        assert float(row["final evaluation IQM"]) == pytest.approx(trim_mean(np.arange(k, 1000, 5), 0.25))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["RUNS", "nowhere"], "nowhere: no such folder"),
        (["RUNS", "--threshold", "A-v0=nan"], "--threshold A-v0=nan: must be ENVIRONMENT=RETURN"),
        (["RUNS", "-o", "RUNS/file/below"], "below: Not a directory"),
        (["RUNS", "--threshold", "A-v0"], "--threshold A-v0: must be ENVIRONMENT=RETURN"),
        (["RUNS", "--threshold", "Q-v0=3"], "--threshold Q-v0=3: no run on Q-v0; there are A-v0"),
        (["RUNS", "-o", "/dev/null"], "--output /dev/null: is a file"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, told):
    make_run(tmp_path / "runs", "A-v0", 1)
    (tmp_path / "runs" / "file").touch()
    assert report(*(word.replace("RUNS", str(tmp_path / "runs")) for word in arguments)) == 2
    printed = capsys.readouterr()
    assert told in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_statistics_agree_with_rliable():
    library = pytest.importorskip("rliable.library")
    metrics = pytest.importorskip("rliable.metrics")
    np.random.seed(0)  # rliable draws from numpy's own generator
    generator = np.random.default_rng(0)
    one, other = generator.normal(0.3, size=(7, 4)), generator.normal(size=(7, 4))
    improvement = stats.probability_of_improvement(list(zip(one.T, other.T, strict=True)))
    assert stats.interquartile_mean(one) == pytest.approx(metrics.aggregate_iqm(one))
    assert improvement[0] == pytest.approx(metrics.probability_of_improvement(one, other))
    assert stats.probability_of_improvement([(one[:, 0], one[:, 0])])[0] == pytest.approx(0.5)

    for ours, theirs in ((stats.mean, metrics.aggregate_mean), (stats.interquartile_mean, metrics.aggregate_iqm)):
        points, intervals = library.get_interval_estimates({"": one}, lambda x, f=theirs: np.array([f(x)]), reps=1000)
        expected = [*points[""], *intervals[""].ravel()]
        np.testing.assert_allclose(stats.with_interval(one, ours), expected, atol=0.04)
    _, intervals = library.get_interval_estimates({"": (one, other)}, metrics.probability_of_improvement, reps=1000)
    np.testing.assert_allclose(improvement[1:], intervals[""].ravel(), atol=0.03)
    levels = np.linspace(-2, 2, 9)
    shares, bands = library.create_performance_profile({"": one}, levels, reps=1000)
    found = stats.performance_profile(one, levels)
    np.testing.assert_allclose(found[0], shares[""])
    np.testing.assert_allclose(found[1:], bands[""], atol=0.04)


def test_improvement_counts_every_seed_where_environments_have_different_numbers():
    pairs = [
        (np.array([1.0, 2.0, 3.0]), np.array([2.0, 0.0, 4.0])),
        (np.array([5.0] * 3), np.array([4.0, 6.0, 5.0, 5.0])),
    ]
    middle, low, high = stats.probability_of_improvement(pairs)
    assert middle == pytest.approx(np.mean([4.5 / 9, 0.5])) and 0 <= low < middle < high <= 1


def test_a_command_is_told_without_where_things_lay():
    command = "/home/me/.venv/bin/python /home/me/solorl/ppo_x.py --env-id Hopper-v4 --runs-dir '/home/me/a b' --seed 2"
    assert tables.repeatable(command) == "python ppo_x.py --env-id Hopper-v4 --seed 2"
    assert tables.repeatable("") == "python"
