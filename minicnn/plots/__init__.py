"""Pictures of a training run, of what is inside a network, and of how its training is going.

Every function returns a ``matplotlib.figure.Figure`` made without pyplot, so that no window
opens, no backend is chosen and nothing global changes: ``figure.savefig("curves.png")`` writes
it, and a notebook shows it after ``%matplotlib inline``. Blue stands for what is right and orange
for what is wrong, a pair that can be told apart with any colour vision; ``theme="dark"`` gives
the same pictures on a dark ground.

References
----------
M. Okabe, K. Ito, "Color universal design", 2002 (the colours).
"""

from minicnn.plots.arrays import plot_arrays
from minicnn.plots.attribution import grad_cam, layer_outputs, occlusion, saliency
from minicnn.plots.health import (
    UpdateRatio,
    dead_relus,
    gradient_flow,
    loss_landscape,
    plot_dead_relus,
    plot_gradient_flow,
    plot_loss_landscape,
    plot_steps,
    plot_update_ratio,
)
from minicnn.plots.inside import plot_feature_maps, plot_grad_cam, plot_occlusion, plot_saliency
from minicnn.plots.live import LivePlot
from minicnn.plots.results import (
    confusion_matrix,
    plot_confusion,
    plot_filters,
    plot_history,
    plot_mistakes,
)
from minicnn.plots.theme import THEMES

__all__ = [
    "THEMES",
    "LivePlot",
    "UpdateRatio",
    "confusion_matrix",
    "dead_relus",
    "grad_cam",
    "gradient_flow",
    "layer_outputs",
    "loss_landscape",
    "occlusion",
    "plot_arrays",
    "plot_confusion",
    "plot_dead_relus",
    "plot_feature_maps",
    "plot_filters",
    "plot_grad_cam",
    "plot_gradient_flow",
    "plot_history",
    "plot_loss_landscape",
    "plot_mistakes",
    "plot_occlusion",
    "plot_saliency",
    "plot_steps",
    "plot_update_ratio",
    "saliency",
]
