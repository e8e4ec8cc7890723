"""The figures of a search, which Optuna draws: what each trial reached, and which arguments decided it."""

import warnings
from pathlib import Path

import numpy as np
from matplotlib.ticker import NullFormatter

from benchmark.figures import STYLE, plt, save


def plot_search(study, folder: Path) -> None:
    """Writes history and slices; of several arguments parallel coordinates; importances where trials differ."""
    from optuna.trial import TrialState
    from optuna.visualization import matplotlib as optuna

    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if len(complete) < 2:
        return
    plots = {"history": optuna.plot_optimization_history, "slices": optuna.plot_slice}
    if len(complete[0].params) > 1:
        plots["parallel"] = optuna.plot_parallel_coordinate
    if len(complete) > 3 and np.ptp([trial.value for trial in complete]) > 0:
        plots["importances"] = optuna.plot_param_importances
    for name, plot in plots.items():
        with plt.rc_context(STYLE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that they are experimental
            figure = np.ravel(plot(study, target_name="mean return"))[0].figure
            for axes in figure.axes:
                for axis in (axes.xaxis, axes.yaxis):
                    if axis.get_scale() == "log":  # no powers, which are mathematics, as choices with dollars are not
                        axis.set_major_formatter("{x:g}")
                        axis.set_minor_formatter(NullFormatter())
            save(figure, folder / name)
            plt.close(figure)
