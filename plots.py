r"""Figures from arrays or lists. Every function returns a figure or draws into an `ax`.

    import numpy as np
    time = np.arange(101)
    strength = 1 / (1 + np.exp((np.array([20, 60]) - time[:, None]) / 5))           # (R, K)
    dynamics([dict(title="Learner", time=time, strength=strength, labels=["1.6", "0.3"])])

In a notebook the figure appears if it is the last line of a cell; figure.savefig("dynamics.png")
saves it. One panel makes a slide. Axis order: times R first, modes K last.

Modes are coloured by viridis, the strongest darkest, and carry markers at staggered places, so
overlapping curves stay distinguishable. Theory is dashed. This file imports none of the others, so
you can copy it alone. It reads no files and has no styles or interaction.
"""
import io
import textwrap

import numpy as np
from matplotlib import colormaps, figure

GREY, MARKERS = "0.45", "osD^v"

class Figure(figure.Figure):
    """A matplotlib figure that any notebook shows, without pyplot."""

    def _repr_png_(self):
        png = io.BytesIO()
        self.savefig(png, format="png")
        return png.getvalue()

def shade(x):
    """A colour of viridis, without its palest end, for x from 0 (darkest) to 1."""
    return colormaps["viridis"](0.82 * np.asarray(x))

def new_figure(columns, rows=1, height=3.3):
    """A white figure and its axes (rows, columns), 10 inches wide, or 6 for a single panel: shown
    at 830 pixels, 12-point text of the wide one is 14 pixels high."""
    drawn = Figure(figsize=(10 if columns > 1 else 6, height * rows), dpi=120, layout="constrained")
    panels = drawn.subplots(rows, columns, squeeze=False)
    for ax in panels.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=12)
        ax.locator_params("x", integer=True)
        for text in ax.xaxis.label, ax.yaxis.label, ax.title:
            text.set_size(13)
    return drawn, panels

def draw_modes(ax, time, strength, labels, half_times=None, stderr=None, theory=None,
               theory_half_times=None):
    """Draws one curve per mode: time (R,), strength (R, K), labels (K,). Optional: half_times (K,),
    drawn as dots, one below the other, where finite; stderr (R, K), drawn as bands of two; theory
    (R, K), drawn dashed; theory_half_times (K,), drawn as crosses. Returns the words that explain
    what was drawn, for a caption."""
    time, strength = np.asarray(time), np.asarray(strength)
    shown = np.linspace(0, len(time) - 1, min(len(time), 300)).round().astype(int)
    gap = max(1, len(shown) // (4 * len(labels)))           # between markers of neighbouring modes
    colours = shade(np.linspace(0, 1, len(labels)))
    words = set()
    for k, colour in enumerate(colours):
        ax.plot(time[shown], strength[shown, k], MARKERS[k % 5] + "-", color=colour, lw=2, ms=6,
                mec="black", mew=0.6, markevery=(min(k * gap, len(shown) - 1), len(labels) * gap),
                label=labels[k])
        if stderr is not None and np.isfinite(stderr).all():
            words.add("bands: 2 standard errors")
            low, high = (strength[shown, k] + sign * 2 * np.asarray(stderr)[shown, k]
                         for sign in (-1, 1))
            ax.fill_between(time[shown], low, high, color=colour, alpha=0.25, lw=0)
        height = 0.5 + 0.04 * ((len(labels) - 1) / 2 - k)           # five are seen to be five
        if theory_half_times is not None and theory_half_times[k] <= time[-1]:
            words.add("crosses: theory")
            ax.plot(theory_half_times[k], height, "x", color="black", ms=9, mew=2, zorder=7)
        if half_times is not None and np.isfinite(half_times[k]):
            words.add("dots: half-times")
            ax.plot(half_times[k], height, "o", color=colour, mec="black", ms=9, zorder=6)
    if theory is not None:
        words.add("dashes: theory")
        ax.plot(time[shown], np.asarray(theory)[shown], color="black", lw=1.2, ls=(0, (4, 3)),
                zorder=4)
    return words

def dynamics(panels, caption=""):
    """Curves against time, one panel per system. In a staggered system the dots lie far apart, in a
    concurrent one they lie below each other.

    panels: dicts with the arguments of `draw_modes`, title, and optionally log (a logarithmic time
    axis) and axes (a dict for Axes.set, for example with xlabel; default: an axis for strengths).
    """
    columns, words, explained = min(3, len(panels)), set(), [()]
    drawn, grid = new_figure(columns, -(-len(panels) // columns))
    for ax in grid.flat[len(panels):]:
        ax.remove()
    for i, (ax, panel) in enumerate(zip(grid.flat, panels)):
        panel = dict(panel)
        title, log, axes = panel.pop("title"), panel.pop("log", False), panel.pop("axes", {})
        words |= draw_modes(ax, **panel)
        if "yscale" not in axes:
            low, high = ax.get_ylim()                     # room for what overshoots
            axes = dict(ylim=(min(-0.1, low), max(1.1, high)), yticks=[0, 0.5, 1]) | axes
        ylabel = "" if i % columns else "mode strength"
        ax.set(title=title, **dict(ylabel=ylabel, xmargin=0) | axes)
        if log:
            ax.set_xscale("symlog", linthresh=panel["time"][1])         # step 0 is shown, too
            ax.xaxis.set_major_formatter("{x:g}")
        # a legend at the end of a row, or where the labels change, unless it stands above
        labels, following = list(panel["labels"]), panels[i + 1:i + 2]
        ends = (i + 1) % columns == 0 or not following or list(following[0]["labels"]) != labels
        if ends and len(labels) > 1 and labels != explained[-1]:
            explained.append(labels)
            ax.legend(frameon=False, fontsize=12, loc="center left", bbox_to_anchor=(1, 0.5))
    add_caption(drawn, " · ".join([caption] * bool(caption) + sorted(words, reverse=True)))
    return drawn

def add_caption(drawn, caption):
    """Writes a caption below a figure, in as many lines as it needs."""
    lines = textwrap.wrap(caption, int(11 * drawn.get_figwidth()))
    drawn.supxlabel("\n".join(lines), fontsize=12, color=GREY)

def lines(panels, caption=""):
    """Curves on logarithmic y axes, one panel each: panels are dicts of curves, a list of dicts for
    Axes.errorbar with x and y, and axes, a dict for Axes.set."""
    drawn, grid = new_figure(len(panels), height=5)
    for ax, panel in zip(grid.flat, panels):
        for curve in panel["curves"]:
            ax.errorbar(**dict(lw=2, mec="black", capsize=4) | curve)
        ax.set(yscale="log", yticks=[1, 2, 3, 5, 10], yticklabels=[1, 2, 3, 5, 10], **panel["axes"])
        ax.minorticks_off()
        ax.legend(frameon=False, fontsize=10, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    add_caption(drawn, caption)
    return drawn
