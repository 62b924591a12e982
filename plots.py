r"""Figures: NumPy arrays in, files out. One function a figure; each writes PNG and PDF, and knows nothing of models or CSV files.

    dynamics([dict(title="Learner", time=t, strength=S)], ["s = 1.6", "s = 0.3"], Path("dynamics"))

Axis order: time first, then modes K. Modes are coloured by viridis, the strongest darkest, and numbered on the curves;
theory is black and dashed, Bayes grey. Imports nothing of ours: copy it alone. Left out on purpose: interaction, styles, seaborn.
"""
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

GREY, FAINT = "0.45", "0.85"
STYLE = {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False}


def mode_colours(n):
    """n colours, equally spaced on viridis without its palest end, strongest mode darkest: (n, 4)."""
    return colormaps["viridis"](np.linspace(0, 0.85, n))


def new_figure(columns, width=4.2, height=3.8, rows=1, **axes):
    """A figure with one row of panels, laid out by matplotlib itself, free of global state. Returns it and its axes."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, **axes)
    for ax in panels.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=12)
        ax.xaxis.label.set_size(13), ax.yaxis.label.set_size(13), ax.title.set_size(14)
    return figure, panels


def save(figure, path):
    """Writes path.png and path.pdf, each in one move, so that no reader ever finds half a file. path: a Path without suffix."""
    for suffix in (".png", ".pdf"):
        unfinished = path.with_name("unfinished-" + path.name + suffix)
        figure.savefig(unfinished, dpi=150, metadata={"CreationDate": None} if suffix == ".pdf" else None)
        unfinished.replace(path.with_name(path.name + suffix))


def label_ends(ax, x, heights, labels, colours, gap=0.08):
    """Writes labels right of x, each near its height; where they would touch they are spread, `gap` axis heights apart, the first on top."""
    low, high = ax.get_ylim()
    gap *= high - low
    order = np.lexsort((-np.arange(len(heights)), np.round(heights / gap)))       # bottom to top; mode order among near equals
    places = heights[order].astype(float)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    places += np.clip((heights[order] - places).mean(), low - places[0], max(low - places[0], high - places[-1]))
    for place, k in zip(places, order):
        ax.annotate(labels[k], (x, place), xytext=(6, 0), textcoords="offset points", color=colours[k], va="center", fontsize=12, annotation_clip=False)


def crossings(time, strength):
    """First upward crossing of 1/2 of each curve, interpolated; nan where there is none. time (R,), strength (R, K) to (K,)."""
    times = []
    for s in strength.T:
        after = np.argmax(s >= 0.5)
        times.append(np.interp(0.5, s[after - 1:after + 1], time[after - 1:after + 1]) if after else np.nan)
    return np.array(times)


def draw_modes(ax, time, strength, stderr=None, theory=None):
    """Mode strengths against time, (R,) and (R, K), on one axis; bands of two standard errors; theory dashed; half-times dotted and joined."""
    colours = mode_colours(strength.shape[1])
    ax.axhline(1, color=FAINT, lw=1, zorder=0)
    for k, c in enumerate(colours):
        ax.plot(time, strength[:, k], color=c, lw=2.5)
        if stderr is not None:
            ax.fill_between(time, strength[:, k] - 2 * stderr[:, k], strength[:, k] + 2 * stderr[:, k], color=c, alpha=0.25, lw=0)
    if theory is not None:
        ax.plot(time, theory, color="black", lw=1.2, ls=(0, (4, 3)))
    half = crossings(time, strength)
    if np.isfinite(half).any():
        ax.plot([np.nanmin(half), np.nanmax(half)], [0.5, 0.5], color="black", lw=1.2, zorder=3)
        ax.scatter(half, np.full(len(half), 0.5), color=colours, edgecolor="black", s=55, zorder=4)


def dynamics(panels, labels, path, columns=3):
    """Mode strength against time, one panel a system, side by side: spread dots are staggered modes, dots on one spot are concurrent.

    panels: a list of dicts with title, time (R,), strength (R, K), and, where wanted, stderr (R, K), theory (R, K), xlabel, note, runs
    (single ones, (R, K) each, drawn behind the mean), log (a logarithmic time axis).
    labels: K names of the modes, written at the ends of the curves.
    """
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(columns, rows=rows, sharey=True)
    for ax, panel in zip(axes.flat, panels):
        for run in panel.get("runs", ()):
            for k, c in enumerate(mode_colours(len(labels))):
                ax.plot(panel["time"], run[:, k], color=c, lw=0.8, alpha=0.4)
        draw_modes(ax, panel["time"], panel["strength"], panel.get("stderr"), panel.get("theory"))
        ax.set(title=panel["title"], xlabel=panel.get("xlabel", "trials"), ylim=(-0.1, 1.15), xlim=(0, panel["time"][-1]))
        if panel.get("log"):
            ax.set(xscale="log", xlim=(1, panel["time"][-1]))
        if panel.get("note"):
            ax.text(0.97, 0.05, panel["note"], transform=ax.transAxes, ha="right", fontsize=13, fontweight="bold")
        label_ends(ax, panel["time"][-1], panel["strength"][-1], labels, mode_colours(len(labels)))
    for ax in axes.flat[len(panels):]:
        ax.remove()
    for row in axes:
        row[0].set_ylabel("mode strength")
    save(figure, path)


def outer_loop(step, strength, half_time, captured, labels, path):
    """How the Meta-Learner came to learn: per outer step (R,), the strengths at the last trial (R, K), half-times in trials (R, K), kappa (R,)."""
    figure, axes = new_figure(3)
    colours, x = mode_colours(len(labels)), np.where(step > 0, step, step[1] / 2)     # step 0 has a place on the logarithmic axis
    reached = np.where(np.isfinite(half_time), half_time, np.nan)
    for ax, values, title in zip(axes[0], (strength, reached), ("strength at the last trial", "half-time (trials)")):
        for k, c in enumerate(colours):
            ax.plot(x, values[:, k], color=c, lw=2.5, marker="o", ms=4)
        ax.set(title=title)
    axes[0, 0].set_ylim(-0.1, 1.15)
    axes[0, 1].set_ylim(bottom=0)
    axes[0, 2].plot(x, captured, color="black", lw=2.5, marker="o", ms=4)
    axes[0, 2].axhline(1, color=GREY, lw=1.5)
    axes[0, 2].text(x[0], 1.01, "Bayes", color=GREY, va="bottom")
    axes[0, 2].set(title=r"captured fraction $\kappa$", ylim=(-0.1, 1.15))
    for ax, ends in zip(axes[0, :2], (strength[-1], reached[-1])):
        if np.isfinite(ends).all():
            label_ends(ax, x[-1], ends, labels, colours)
    for ax in axes[0]:
        ax.set(xscale="log", xlim=(x[0], x[-1]), xlabel="outer step")
    save(figure, path)


def ood_scales(scale, meta, bayes, captured, labels, path):
    """Out of distribution, against the scale of the spectrum (R,): final strengths (R, K) of meta and bayes, and kappa (R,) under the same prior."""
    figure, axes = new_figure(3, sharex=True)
    for ax, strength, title in zip(axes[0], (meta, bayes), ("Meta-Learner", "Bayes, same prior")):
        for k, c in enumerate(mode_colours(len(labels))):
            ax.plot(scale, strength[:, k], color=c, lw=2.5, marker="o", ms=4)
        ax.set(title=title, ylim=(-0.1, 1.3), ylabel="strength at the last trial")
        label_ends(ax, scale[-1], strength[-1], labels, mode_colours(len(labels)))
    axes[0, 2].plot(scale, captured, color="black", lw=2.5, marker="o")
    axes[0, 2].axhline(1, color=GREY, lw=1.5)
    axes[0, 2].set(title=r"captured fraction $\kappa$", ylim=(min(-0.1, np.nanmin(captured) - 0.1), 1.15))
    for ax in axes[0]:
        ax.axvline(1, color=FAINT, lw=6, zorder=0)
        ax.set(xscale="log", xlabel="scale of the spectrum (1: as trained)", xticks=scale, xticklabels=[f"{s:g}" for s in scale])
        ax.minorticks_off()
    save(figure, path)


def heat_maps(panels, labels, path):
    """Mode strength as colour, modes up, time to the right: the picture of the spectral-bias papers. panels as in `dynamics`."""
    figure, axes = new_figure(len(panels), height=3.2, sharey=True)
    for ax, panel in zip(axes[0], panels):
        image = ax.pcolormesh(panel["time"], np.arange(1, len(labels) + 1), panel["strength"].T, cmap="viridis", vmin=0, vmax=1, shading="nearest", rasterized=True)
        ax.set(title=panel["title"], xlabel=panel["xlabel"], yticks=np.arange(1, len(labels) + 1), yticklabels=labels)
    figure.colorbar(image, ax=axes[0, -1], label="mode strength")
    save(figure, path)


def fits(x, target, data, rows, path):
    """Functions learned from one task, a row a system and a column a time.

    x, target: (G,) the true function; data: (T, 2) points (x_t, y_t) in order; rows: a list of (name, panels), panels a list of
    (title, f (G,), deviation (G,) or None, how many data to show).
    """
    figure, axes = new_figure(len(rows[0][1]), width=2.7, height=2.2, rows=len(rows), sharex=True, sharey=True)
    for line, (name, panels) in zip(axes, rows):
        for ax, (title, f, deviation, shown) in zip(line, panels):
            ax.plot(x, target, color="0.6", lw=3)
            if deviation is not None:
                ax.fill_between(x, f - 2 * deviation, f + 2 * deviation, color=GREY, alpha=0.25, lw=0)
            ax.plot(x, f, color=mode_colours(5)[1], lw=2)
            ax.plot(*data[:shown].T, "o", color="black", ms=4)
            ax.set_title(title, fontsize=12)
        line[0].set_ylabel(name)
    for ax in axes[-1]:
        ax.set(xlabel="x", xticks=[0, 0.5, 1], ylim=(1.6 * target.min(), 1.6 * target.max()))
    save(figure, path)


def ood_bands(frequencies, panels, path):
    """Out of distribution: final strength at each frequency (K,), pass band shaded. panels: a list of (title, passband, meta (K,), bayes (K,))."""
    figure, axes = new_figure(len(panels), width=5.5, sharey=True)
    for ax, (title, (low, high), strength, bayes) in zip(axes[0], panels):
        ax.axvspan(low - 0.5, high + 0.5, color="0.93", zorder=0)
        ax.text((low + high) / 2, 1.17, "pass band", ha="center", color=GREY, fontsize=12)
        ax.bar(frequencies, strength, width=0.6, color=mode_colours(5)[1], label="Meta-Learner")
        ax.plot(frequencies, bayes, "D", color="white", mec="black", ms=7, label="Bayes, same prior")
        ax.set(title=title, xlabel="frequency of the signal", xticks=frequencies, ylim=(-0.15, 1.3))
        ax.axhline(0, color="black", lw=0.8)
    axes[0, 0].set_ylabel("strength at the last trial")
    axes[0, -1].legend(frameon=False, fontsize=12, loc="center left")
    save(figure, path)


def interference(chance, scaling, path):
    """Two panels, a line a system: the chance that J rises at a visit to an unsolved context, against how many others are solved; and the
    time to a mean J of 0.9 against the number of contexts. chance, scaling: dicts of name to (x, y); steps for Learners, else trials."""
    figure, axes = new_figure(2, width=5.6)
    style = dict(zip(chance, zip(mode_colours(len(chance)), "osD^v")))
    for ax, lines in zip(axes[0], (chance, scaling)):
        for name, (x, y) in lines.items():
            colour, marker = style[name]
            ax.plot(x, y, color=GREY if name == "Bayes" else colour, marker=marker, lw=2.5, ms=8, label=name, mec="black")
    axes[0, 0].set(xlabel="other contexts already solved", ylabel="chance that J rises\nat the next visit", ylim=(0, 1.05), xticks=np.unique(np.concatenate([x for x, _ in chance.values()])))
    axes[0, 0].legend(frameon=False, fontsize=12, loc="lower left")
    axes[0, 1].set(xlabel="contexts", ylabel="time to a mean J of 0.9\n(Learner: steps, else trials)", yscale="log")
    save(figure, path)


def ood_rates(rates, panels, path):
    """Out of distribution: final strength by context (C,), where contexts come at the given rates (C labels). panels: (title, meta (C,), bayes (C,))."""
    figure, axes = new_figure(len(panels), width=4.6, sharey=True)
    for ax, (title, strength, bayes) in zip(axes[0], panels):
        ax.bar(range(len(strength)), strength, width=0.6, color=mode_colours(5)[1], label="Meta-Learner")
        ax.plot(bayes, "D", color="white", mec="black", ms=7, label="Bayes")
        ax.set(title=title, xlabel="context", ylim=(0, 1.3), xticks=range(len(strength)), xticklabels=[f"{c + 1}" for c in range(len(strength))])
    axes[0, -1].set(xlabel="how often the context comes", xticklabels=rates)
    axes[0, 0].set_ylabel("strength at the last trial")
    axes[0, 0].legend(frameon=False, fontsize=12, loc="upper right", ncols=2)
    save(figure, path)
