r"""Figures from arrays or lists. Every function returns a figure or draws into an `ax`.

    import numpy as np
    time = np.arange(101)
    strength = 1 / (1 + np.exp((np.array([20, 60]) - time[:, None]) / 5))           # (R, K)
    dynamics([dict(title="Learner", time=time, strength=strength, labels=["1.6", "0.3"])])

In a notebook the figure appears as the last line of a cell; figure.savefig("dynamics.png") saves
it. One panel makes a slide. Axis order: times R first, modes K last. Modes are coloured by viridis,
the strongest darkest, and their markers are staggered to tell overlapping curves apart. This file
imports none of the others, so you can copy it alone. It reads no files and has no styles.
"""
import io
import textwrap

import numpy as np
from matplotlib import colormaps, figure
from matplotlib.ticker import LogLocator

GREY, MARKERS = "0.45", "osD^v"

class Figure(figure.Figure):
    """A matplotlib figure that any notebook shows, without pyplot."""
    def _repr_png_(self):
        png = io.BytesIO()
        self.savefig(png)
        return png.getvalue()

def shade(x):
    """A colour of viridis, without its palest end, for x from 0 (darkest) to 1."""
    return colormaps["viridis"](0.82 * np.asarray(x))

def new_figure(columns, rows=1, height=3.3):
    """A figure and its axes (rows, columns). At a width of 830 pixels, text is 14 pixels high."""
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
    """Draws one curve per mode: time (R,), strength (R, K), labels (K,), and optionally half_times
    (K,) as dots, stderr (R, K) as bands of two, theory (R, K) as dashes, and theory_half_times (K,)
    as crosses. Returns the words that explain what was drawn, for a caption."""
    shown = np.linspace(0, len(time) - 1, min(len(time), 300)).round().astype(int)
    time, strength = np.asarray(time)[shown], np.asarray(strength)[shown]
    gap = max(1, len(shown) // (4 * len(labels)))           # between markers of neighbouring modes
    colours, words = shade(np.linspace(0, 1, len(labels))), set()
    for k, (curve, colour) in enumerate(zip(strength.T, colours)):
        ax.plot(time, curve, MARKERS[k % 5] + "-", color=colour, lw=2, ms=6, mec="black", mew=0.6,
                label=labels[k], markevery=(min(k * gap, len(time) - 1), len(labels) * gap))
        if stderr is not None and np.isfinite(stderr).all():
            words.add("bands: 2 standard errors")
            band = 2 * np.asarray(stderr)[shown, k]
            ax.fill_between(time, curve - band, curve + band, color=colour, alpha=0.25, lw=0)
        height = 0.5 + 0.04 * ((len(labels) - 1) / 2 - k)           # five are seen to be five
        if theory_half_times is not None and theory_half_times[k] <= time[-1]:
            words.add("crosses: theory")
            ax.plot(theory_half_times[k], height, "x", color="black", ms=9, mew=2, zorder=7)
        if half_times is not None and np.isfinite(half_times[k]):
            words.add("dots: half-times, one below the other")
            ax.plot(half_times[k], height, "o", color=colour, mec="black", ms=9, zorder=6)
    if theory is not None:
        words.add("dashes: theory")
        ax.plot(time, np.asarray(theory)[shown], color="black", lw=1.2, ls=(0, (4, 3)), zorder=4)
    return words

def dynamics(panels, caption=""):
    """Curves against time, one panel per system. In a concurrent one the dots lie below each other.
    panels: dicts with the arguments of `draw_modes`, title, and axes (a dict for Axes.set). The
    three of a row share one legend, so give them the same labels."""
    columns, words = min(3, len(panels)), set()
    drawn, grid = new_figure(columns, -(-len(panels) // columns))
    for ax in grid.flat[len(panels):]:
        ax.remove()
    for i, (ax, panel) in enumerate(zip(grid.flat, panels)):
        modes = {name: panel[name] for name in panel if name not in ("title", "axes")}
        words |= draw_modes(ax, **modes)
        low, high = ax.get_ylim()                         # room for what overshoots
        axes = dict(ylim=(min(-0.1, low), max(1.1, high)), yticks=[0, 0.5, 1], xmargin=0,
                    ylabel="" if i % columns else "mode strength", title=panel["title"])
        ax.set(**axes | panel.get("axes", {}))
        if (i + 1) % columns == 0:
            ax.legend(frameon=False, fontsize=12, loc="center left", bbox_to_anchor=(1, 0.5))
    add_caption(drawn, " · ".join([caption] * bool(caption) + sorted(words, reverse=True)))
    return drawn

def lines(panels, caption=""):
    """Panels with log y axes: dicts of curves, for Axes.errorbar, and axes, for Axes.set."""
    drawn, grid = new_figure(len(panels), height=5)
    for ax, panel in zip(grid.flat, panels):
        for curve in panel["curves"]:
            ax.errorbar(**dict(lw=2, mec="black", capsize=4) | curve)
        ax.set(yscale="log", **panel["axes"])
        low, high = ax.get_ylim()
        ticks = (1, 1.2, 1.5, 2, 3, 4, 5, 7) if high < 8 * low else (1, 2, 5)
        ax.yaxis.set_major_locator(LogLocator(subs=ticks))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
    drawn.legend(frameon=False, fontsize=11, loc="outside upper center", ncols=len(panels))
    add_caption(drawn, caption)
    return drawn

def add_caption(drawn, caption):
    """Writes a caption below a figure, in as many lines as it needs."""
    drawn.supxlabel(textwrap.fill(caption, int(11 * drawn.get_figwidth())), fontsize=12, color=GREY)
