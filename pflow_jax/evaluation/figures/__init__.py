"""Figures: functions that take data and return a matplotlib Figure; `save` makes a file of one."""

from pflow_jax.evaluation.figures.curves import curve_panels as curve_panels
from pflow_jax.evaluation.figures.curves import curves as curves
from pflow_jax.evaluation.figures.images import captioned_images as captioned_images
from pflow_jax.evaluation.figures.images import image_grid as image_grid
from pflow_jax.evaluation.figures.images import to_bytes as to_bytes
from pflow_jax.evaluation.figures.images import visible as visible
from pflow_jax.evaluation.figures.motion import Animation as Animation
from pflow_jax.evaluation.figures.motion import image_animation as image_animation
from pflow_jax.evaluation.figures.points import scatter_panels as scatter_panels
from pflow_jax.evaluation.figures.points import trajectory_plot as trajectory_plot
from pflow_jax.evaluation.figures.style import save as save
from pflow_jax.evaluation.figures.style import to_png as to_png
