r"""Figures from NumPy arrays. Every function returns a matplotlib Figure or draws into an `ax`.

    import numpy as np
    time = np.arange(101)
    strength = 1 / (1 + np.exp((np.array([20, 60]) - time[:, None]) / 5))           # (R, K)
    figure = dynamics([dict(title="Learner", time=time, strength=strength, labels=["1.6", "0.3"])])

In a notebook the figure appears if it is the last line of a cell; figure.savefig("dynamics.png")
saves it. Axis order: times R first, modes K last.

Modes are coloured by viridis, the strongest darkest, and carry markers at staggered places, so
overlapping curves stay distinguishable. Theory is dashed. This file imports none of the others, so
you can copy it alone. It reads no files and has no styles or interaction.
"""
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

GREY, MARKERS = "0.45", "osD^v"

def new_figure(columns, rows=1, height=3.1, caption="", **axes):
    """A white figure and its axes (rows, columns), 10 inches wide: shown at 830 pixels, 12-point
    text is 14 pixels high."""
    figure = Figure(figsize=(10, height * rows), dpi=120, layout="constrained")
    figure.supxlabel(caption, fontsize=12, color=GREY)
    panels = figure.subplots(rows, columns, squeeze=False, **axes)
    for ax in panels.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=12)
        ax.locator_params("x", integer=True)
        for text in ax.xaxis.label, ax.yaxis.label, ax.title:
            text.set_size(13)
    return figure, panels

def draw_modes(ax, time, strength, labels, half_times=None, stderr=None, theory=None,
               theory_half_times=None):
    """Draws one curve per mode: time (R,), strength (R, K), labels (K,). Optional: half_times (K,),
    drawn as dots; stderr (R, K), drawn as bands of two; theory (R, K), drawn dashed;
    theory_half_times (K,), drawn as crosses."""
    shown = np.linspace(0, len(time) - 1, min(len(time), 300)).round().astype(int)      # small PDFs
    gap = max(1, len(shown) // (4 * len(labels)))           # between markers of neighbouring modes
    colours = colormaps["viridis"](np.linspace(0, 0.82, len(labels)))      # without its palest end
    for k, colour in enumerate(colours):
        ax.plot(time[shown], strength[shown, k], MARKERS[k % 5] + "-", color=colour, lw=2, ms=6,
                mec="black", mew=0.6, markevery=(min(k * gap, len(shown) - 1), len(labels) * gap),
                label=labels[k])
        if stderr is not None:
            low, high = (strength[shown, k] + sign * 2 * stderr[shown, k] for sign in (-1, 1))
            ax.fill_between(time[shown], low, high, color=colour, alpha=0.25, lw=0)
        if half_times is not None and np.isfinite(half_times[k]):
            ax.plot(half_times[k], 0.5, "o", color=colour, mec="black", ms=10, zorder=6)
    if half_times is not None and np.isfinite(half_times).any():
        reached = half_times[np.isfinite(half_times)]
        ax.plot([reached.min(), reached.max()], [0.5, 0.5], color="black", lw=2, zorder=5)
    if theory_half_times is not None:
        ax.plot(theory_half_times, [0.5] * len(labels), "x", color="black", ms=9, mew=2, zorder=7)
    if theory is not None:
        ax.plot(time[shown], theory[shown], color="black", lw=1.2, ls=(0, (4, 3)), zorder=4)

def dynamics(panels, caption=""):
    """Curves against time, one panel per system. In a staggered system the dots lie far apart, in a
    concurrent one they coincide.

    panels: dicts with the arguments of `draw_modes`, title, and optionally log (a logarithmic time
    axis) and axes (a dict for Axes.set, for example with xlabel; default: an axis for strengths).
    """
    columns = min(3, len(panels))
    figure, grid = new_figure(columns, -(-len(panels) // columns), caption=caption)
    for ax in grid.flat[len(panels):]:
        ax.remove()
    for i, (ax, panel) in enumerate(zip(grid.flat, panels)):
        panel = dict(panel)
        title, log, axes = panel.pop("title"), panel.pop("log", False), panel.pop("axes", {})
        draw_modes(ax, **panel)
        if "yscale" not in axes:
            axes = dict(ylim=(-0.1, 1.35), yticks=[0, 0.5, 1]) | axes
        ylabel = "" if i % columns else "mode strength"
        ax.set(title=title, **dict(ylabel=ylabel, xmargin=0) | axes)
        if log:
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter("{x:g}")
        # a legend at the end of the first row, and wherever the labels change
        changed = i + 1 == columns or list(panel["labels"]) != list(panels[i - 1]["labels"])
        if changed and len(panel["labels"]) > 1:
            ax.legend(frameon=False, fontsize=12, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure

def levers(panels, caption=""):
    """Staggering index against the skew of the task distribution, one panel per family.

    panels: dicts with title and curves, a list of (label, skews, indices, errors).
    """
    figure, axes = new_figure(len(panels), height=4.4, caption=caption, sharey=True)
    for ax, panel in zip(axes[0], panels):
        colours = [*colormaps["viridis"]([0.0, 0.82]), GREY, "0.75"]
        for (label, x, y, error), colour, marker in zip(panel["curves"], colours, MARKERS):
            ax.errorbar(x, y, error, marker=marker, color=colour, lw=2, ms=8, mec="black",
                        capsize=3, label=label)
        ax.axhline(1, color="0.75", lw=1, zorder=0)
        ticks = [1, 2, 5, 10, 20]
        ax.set(title=panel["title"], xlabel="skew of the task distribution", yscale="log",
               xticks=panel["curves"][0][1], yticks=ticks, yticklabels=ticks)
        ax.minorticks_off()
        ax.legend(frameon=False, fontsize=11, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    axes[0, 0].set_ylabel("staggering index")
    return figure
