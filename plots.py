r"""Figures: NumPy arrays in, files out. One function a figure, each writing PNG and PDF, or a GIF; below them, which figures a family shows
of the tables of a run.

    dynamics([dict(title="Learner", time=t, strength=S)], ["s = 1.6", "s = 0.3"], Path("dynamics"))

Axis order: time first, then modes K. Modes are coloured by viridis, the strongest darkest, and numbered on the curves;
theory is black and dashed, Bayes grey. Imports nothing of ours: copy it alone. Left out on purpose: interaction, styles, seaborn.
"""
import csv

import numpy as np
from matplotlib import colormaps
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure

GREY, FAINT = "0.45", "0.85"


def mode_colours(n):
    """n colours, equally spaced on viridis without its palest end, strongest mode darkest: (n, 4)."""
    return colormaps["viridis"](np.linspace(0, 0.85, n))


def new_figure(columns, width=4.2, height=3.8, rows=1, **axes):
    """A figure of rows of panels, laid out by matplotlib itself, free of global state. Returns it and its axes."""
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


def animate(figure, show, frames, path, rate=5):
    """Writes path.gif, in one move: frame i is what `show`, called with i, leaves on the figure. The last one stays for a while."""
    unfinished, writer = path.with_name("unfinished-" + path.name + ".gif"), PillowWriter(fps=rate)
    show(frames - 1)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")                      # laid out once, so that nothing jumps
    with writer.saving(figure, unfinished, dpi=80):
        for i in [*range(frames), *[frames - 1] * rate]:
            show(i)
            writer.grab_frame()
    unfinished.replace(path.with_name(path.name + ".gif"))


def label_ends(ax, x, heights, labels, colours, gap=0.08):
    """Writes labels right of x, each near its height; where they would touch they are spread, `gap` axis heights apart, the first on top."""
    low, high = ax.get_ylim()
    gap *= high - low
    order = np.lexsort((-np.arange(len(heights)), np.round(heights / gap)))       # bottom to top; mode order among near equals
    places = heights[order].astype(float)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    places += np.clip((heights[order] - places).mean(), low + gap / 2 - places[0], max(low + gap / 2 - places[0], high - places[-1]))
    for place, k in zip(places, order):
        ax.annotate(labels[k], (x, place), xytext=(6, 0), textcoords="offset points", color=colours[k], va="center", fontsize=12,
                    annotation_clip=False)


def crossings(time, strength):
    """First upward crossing of 1/2 of each curve, interpolated; nan where there is none, or where it starts above: there is no dot to draw.
    time (R,), strength (R, K) to (K,)."""
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
    (single ones, (R, K) each, drawn behind the mean), log (a logarithmic time axis), labels (in place of the others).
    labels: K names of the modes, written at the ends of the curves.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(columns, rows=rows, sharey=True)
    for ax, panel in zip(axes.flat, panels):
        names = panel.get("labels", labels)
        for run in panel.get("runs", ()):
            for k, c in enumerate(mode_colours(len(names))):
                ax.plot(panel["time"], run[:, k], color=c, lw=0.8, alpha=0.4)
        draw_modes(ax, panel["time"], panel["strength"], panel.get("stderr"), panel.get("theory"))
        ax.set(title=panel["title"], xlabel=panel.get("xlabel", "trials"), ylim=(-0.1, 1.15), xlim=(0, panel["time"][-1]))
        if panel.get("log"):
            ax.set(xscale="log", xlim=(1, panel["time"][-1]))
        if panel.get("note"):
            ax.text(0.97, 0.05, panel["note"], transform=ax.transAxes, ha="right", fontsize=13, fontweight="bold")
        label_ends(ax, panel["time"][-1], panel["strength"][-1], names, mode_colours(len(names)))
    for ax in axes.flat[len(panels):]:
        ax.remove()
    for row in axes:
        row[0].set_ylabel("mode strength")
    save(figure, path)


def outer_loop(step, strength, half_time, captured, labels, path):
    """How the Meta-Learner came to learn, by outer step (R,): strengths at the last trial (R, K), half-times in trials (R, K), kappa (R,)."""
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
    """Out of distribution, by scale of the spectrum (R,): final strengths (R, K) of meta and bayes, kappa (R,) under the same prior."""
    figure, axes = new_figure(3, sharex=True)
    for ax, strength, title in zip(axes[0], (meta, bayes), ("Meta-Learner", "Bayes, same prior")):
        for k, c in enumerate(mode_colours(len(labels))):
            ax.plot(scale, strength[:, k], color=c, lw=2.5, marker="o", ms=4)
        ax.set(title=title, ylim=(-0.1, 1.3))
        label_ends(ax, scale[-1], strength[-1], labels, mode_colours(len(labels)))
    axes[0, 0].set_ylabel("strength at the last trial")
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
    figure, axes = new_figure(len(panels), height=3.2)
    for ax, panel in zip(axes[0], panels):
        names = panel.get("labels", labels)
        image = ax.pcolormesh(panel["time"], np.arange(1, len(names) + 1), panel["strength"].T, vmin=0, vmax=1, cmap="viridis",
                              shading="nearest", rasterized=True)
        ax.set(title=panel["title"], xlabel=panel["xlabel"], yticks=np.arange(1, len(names) + 1), yticklabels=names)
    figure.colorbar(image, ax=axes[0, -1], label="mode strength")
    save(figure, path)


def draw_fit(ax, x, target, f, deviation, data):
    """One function f (G,) that was learned, over the true one, (G,), and the points seen (t, 2); a band of two deviations (G,), if any."""
    ax.plot(x, target, color="0.6", lw=3)
    if deviation is not None:
        ax.fill_between(x, f - 2 * deviation, f + 2 * deviation, color=GREY, alpha=0.25, lw=0)
    ax.plot(x, f, color=mode_colours(5)[1], lw=2)
    ax.plot(*data.T, "o", color="black", ms=4)
    ax.set(xticks=[0, 0.5, 1], ylim=(1.6 * target.min(), 1.6 * target.max()))


def fits(x, target, rows, path):
    """Functions learned from one task, a row a system and a column a time.

    x, target: (G,) the true function; rows: a list of (name, panels), panels a list of (title, *rest of what `draw_fit` takes).
    """
    figure, axes = new_figure(len(rows[0][1]), width=2.7, height=2.2, rows=len(rows), sharex=True, sharey=True)
    for line, (name, panels) in zip(axes, rows):
        for ax, (title, *fit) in zip(line, panels):
            draw_fit(ax, x, target, *fit)
            ax.set_title(title, fontsize=12)
        line[0].set_ylabel(name)
    for ax in axes[-1]:
        ax.set_xlabel("x")
    save(figure, path)


def watch_fits(x, target, rows, path):
    """The same as an animation: a panel a system, a frame a time."""
    figure, axes = new_figure(len(rows), width=3.3, height=2.8, sharey=True)

    def show(i):
        """Frame i."""
        for ax, (name, panels) in zip(axes[0], rows):
            title, *fit = panels[i]
            ax.clear()
            draw_fit(ax, x, target, *fit)
            ax.set_title(f"{name}\n{title}", fontsize=12)
            ax.set_xlabel("x")

    animate(figure, show, len(rows[0][1]), path)


def watch_spectra(panels, s, path, frames=25):
    """An animation of effective spectra: of each mode what is learned, as a bar in the outline of the target's singular value s (K,).

    panels: as in `dynamics`; those in trials share a clock. Clocks run until the last mode has 95% of what it comes to.
    """
    figure, axes = new_figure(len(panels), width=3.3, height=2.8, sharey=True)
    modes, bars = np.arange(1, len(s) + 1), []
    for ax in axes[0]:
        bars.append(ax.bar(modes, s, width=0.7, color=mode_colours(len(s))))
        ax.bar(modes, s, width=0.7, fill=False, edgecolor="black", lw=1.5)
        ax.set(xlabel="mode", xticks=modes)
    axes[0, 0].set_ylabel("singular value")
    last = {}
    for panel in panels:
        learned = panel["time"][np.argmax((panel["strength"] >= 0.95 * panel["strength"][-1]).all(1))]
        last[panel["xlabel"]] = max(learned, last.get(panel["xlabel"], 0))

    def show(i):
        """Frame i."""
        for ax, rectangles, panel in zip(axes[0], bars, panels):
            now = last[panel["xlabel"]] * i / (frames - 1)
            ax.set_title(f"{panel['title']}\n{now:.0f} {panel['xlabel']}", fontsize=12)
            for rectangle, height, curve in zip(rectangles, s, panel["strength"].T):
                rectangle.set_height(height * np.interp(now, panel["time"], curve))

    animate(figure, show, frames, path)


def ood_bars(panels, path):
    """Out of distribution: the Meta-Learner's final strengths as bars, Bayes' as diamonds, a panel a condition.

    panels: a list of dicts with title, labels (K of them), xlabel, meta (K,), bayes (K,) and, where wanted, passband: the first and the
    last mode that the prior has, counted from 0.
    """
    figure, axes = new_figure(len(panels), width=5, sharey=True)
    for ax, panel in zip(axes[0], panels):
        if "passband" in panel:
            low, high = panel["passband"]
            ax.axvspan(low - 0.5, high + 0.5, color="0.93", zorder=0)
            ax.text((low + high) / 2, -0.1, "pass band", ha="center", color=GREY, fontsize=12)
        ax.bar(range(len(panel["labels"])), panel["meta"], width=0.6, color=mode_colours(5)[1], label="Meta-Learner")
        ax.plot(panel["bayes"], "D", color="white", mec="black", ms=7, label="Bayes, same prior")
        ax.set(title=panel["title"], xlabel=panel["xlabel"], xticks=range(len(panel["labels"])), xticklabels=panel["labels"], ylim=(-0.15, 1.4))
        ax.axhline(0, color="black", lw=0.8)
    axes[0, 0].set_ylabel("strength at the last trial")
    axes[0, 0].legend(frameon=False, fontsize=12, loc="upper right", ncols=2)
    save(figure, path)


def interference(chance, gain, scaling, path):
    """Three panels, a line a system, each a dict of name to (x, y): the chance that J rises in an unsolved context at a Learner's step, and
    the rise at the first visit to a context within an episode, both against how many others are solved; the time to a mean J of 0.9, with
    95% intervals (x, y, low, high)."""
    figure, axes = new_figure(3, width=4.8)
    names = list(dict.fromkeys([*chance, *gain]))
    style = dict(zip(names, zip(mode_colours(len(names)), "osD^v")))
    for ax, lines in zip(axes[0], (chance, gain, scaling)):
        for name, (x, y, *interval) in lines.items():
            colour, marker = style[name]
            ax.plot(x, y, color=GREY if name == "Bayes" else colour, marker=marker, lw=2.5, ms=8, label=name, mec="black")
            if interval:
                ax.fill_between(x, *interval, color=colour, alpha=0.4, lw=0)
        ax.legend(frameon=False, fontsize=12)
    axes[0, 0].set(title="Learner: chance that J rises", xlabel="other contexts already solved", ylabel="share of gradient steps", ylim=(0, 1.05))
    axes[0, 1].set(title="in an episode: J at first visits", xlabel="other contexts already solved", ylabel="mean rise of J", ylim=(0, 0.5))
    axes[0, 2].set(title="time to a mean J of 0.9", xlabel="contexts", ylabel="steps (Learner), trials (Bayes)", yscale="log")
    save(figure, path)


# ---------------------------------------------------------------- a family's figures, from the tables of a run

def number(cell):
    """A cell of a table, or a value of a summary, as a number. Raises ValueError."""
    return float({"not reached": "inf", "undefined": "nan"}.get(cell, cell))


def read_table(path):
    """A CSV file of a run as a dict of columns: NumPy arrays, of numbers where all are ("not reached" is inf), else of strings."""
    with open(path, newline="") as file:
        header, *lines = csv.reader(file)
    columns = {}
    for title, column in zip(header, zip(*lines)):
        try:
            columns[title] = np.array([number(cell) for cell in column])
        except ValueError:
            columns[title] = np.array(column)
    return columns


def where(table, column, **values):
    """One column of a table, in the rows in which other columns have these values."""
    return table[column][np.all([table[name] == value for name, value in values.items()], axis=0)] if values else table[column]


def by_mode(table, column, **values):
    """The same as an array (R, K): time, outer step or condition down, modes across."""
    return np.stack([where(table, column, mode=k, **values) for k in np.unique(table["mode"])
                     if len(where(table, column, mode=k, **values))], 1)


def curve(table, system):
    """Of one system in dynamics.csv: time (R,), mode strengths (R, K), and their standard errors (R, K)."""
    return where(table, "time", system=system, mode=1), *(by_mode(table, column, system=system) for column in ("strength", "stderr"))


def panel(tables, indices, system, title, **more):
    """One system's curves as `dynamics` takes them, with its closed form, if there is one, and its staggering index, from a dict of strings."""
    time, strength, stderr = curve(tables["dynamics"], system)
    theory = system + "_theory" if system + "_theory" in tables["dynamics"]["system"] else None
    return dict(title=title, time=time, strength=strength, stderr=stderr, theory=theory and by_mode(tables["dynamics"], "strength", system=theory),
                xlabel="trials" if system.startswith(("meta", "bayes")) else "gradient steps", log=np.ptp(np.diff(time)) > 0,
                note="not all reach 1/2" if indices[system] == "not reached" else "staggering " + indices[system], **more)


def draw_outer_loop(tables, labels, folder):
    """outer_loop, from the tables outer_loop and performance."""
    table, (prior, bayes) = tables["outer_loop"], (where(tables["performance"], "value", system=system).mean() for system in ("prior", "bayes"))
    captured = (where(table, "value", mode=1) - prior) / (bayes - prior)
    outer_loop(where(table, "outer_step", mode=1), by_mode(table, "strength"), by_mode(table, "half_time"), captured, labels, folder / "outer_loop")


SYSTEMS = dict(learner="Learner", meta="Meta-Learner (LSTM)", bayes="Bayes-optimal")


def draw_family(tables, indices, labels, folder):
    """dynamics, outer_loop and ood of any family, and controls if it has systems beyond the three.

    tables: a dict of CSV name to a dict of columns; indices: staggering by system, as strings; labels: K names of modes.
    """
    others = [system for system in indices if system not in SYSTEMS and not system.endswith("_theory")]
    dynamics([panel(tables, indices, *each) for each in SYSTEMS.items()], labels, folder / "dynamics")
    if others:
        dynamics([panel(tables, indices, system, system) for system in others], labels, folder / "controls")
    draw_outer_loop(tables, labels, folder)
    table = tables["ood"]
    ood_bars([dict(title=condition, labels=labels, xlabel="mode", **{system: where(table, "strength", system=system, condition=condition)
                                                                     for system in ("meta", "bayes")})
              for condition in dict.fromkeys(table["condition"])], folder / "ood")


def draw_linreg(tables, indices, labels, s, folder):
    """dynamics, controls, outer_loop, ood and the animation spectra. s: (K,) the singular values."""
    def of(system, title):
        """A system's panel."""
        return panel(tables, indices, system, title)

    table, systems = tables["ood"], [of("learner", "Learner (gradient descent)"), of("meta", "Meta-Learner (LSTM)"), of("bayes", "Bayes-optimal")]
    dynamics(systems, labels, folder / "dynamics")
    dynamics([of("learner", "aligned start"), of("shallow", "one layer only"),
              *(of(name, f"random start, {name}") for name in ("sgd", "adam", "rmsprop", "muon"))], labels, folder / "controls")
    draw_outer_loop(tables, labels, folder)
    prior, meta, bayes = (where(table, "value", system=system, mode=1) for system in ("prior", "meta", "bayes"))
    ood_scales(where(table, "condition", system="meta", mode=1).astype(float), *(by_mode(table, "strength", system=system) for system in ("meta", "bayes")),
               (prior - meta) / (prior - bayes), labels, folder / "ood")
    watch_spectra(systems, np.array(s), folder / "spectra")


def draw_nonlinreg(tables, indices, labels, learner_labels, bands, folder):
    """dynamics, heat_maps, outer_loop, ood and the fits. bands: of frequencies, the lower and upper half of the pass band, and those above."""
    systems = [panel(tables, indices, "learner", "Learner (ReLU network)", labels=learner_labels),
               panel(tables, indices, "learner_rising", "Learner, rising amplitude", labels=learner_labels),
               panel(tables, indices, "meta", "Meta-Learner (LSTM)"), panel(tables, indices, "bayes", "Bayes-optimal")]
    dynamics(systems, labels, folder / "dynamics", columns=4)
    heat_maps(systems, labels, folder / "heat_maps")
    draw_outer_loop(tables, labels, folder)
    draw_fits(tables["fits"], folder)
    table, (lower, upper, above), panels = tables["ood"], bands, []
    for suffix, band in ("", [*lower, *upper]), ("_bandpass", upper):
        first = band[0] - [*lower, *upper][0]
        panels.append(dict(title=f"trained on frequencies {band[0]} to {band[-1]}", labels=[*lower, *upper, *above], passband=(first, first + len(band) - 1),
                           xlabel="frequency of the signal", **{system: where(table, "strength", system=system + suffix) for system in ("meta", "bayes")}))
    ood_bars(panels, folder / "ood")


def draw_fits(table, folder):
    """fits, five moments of each system, and the animation of the same name, all of them."""
    data = np.stack([where(table, column, system="data") for column in ("x", "value")], 1).astype(float)
    x, target = (where(table, column, system="target").astype(float) for column in ("x", "value"))
    rows = []
    for system, name, unit in ("learner", "Learner", "steps"), ("meta", "Meta-Learner", "trials"), ("bayes", "Bayes", "trials"):
        times = np.unique(where(table, "time", system=system).astype(float))
        rows.append((name, [(f"{t:g} {unit}", where(table, "value", system=system, time=t).astype(float),
                             where(table, "deviation", system=system, time=t).astype(float) if system == "bayes" else None,
                             data[:int(t) if unit == "trials" else 0]) for t in times]))

    def some(panels, shares):
        """The panels at these shares of the way."""
        return [panels[round(share * (len(panels) - 1))] for share in shares]
    fits(x, target, [(name, some(panels, (0.15, 0.25, 0.4, 0.6, 1) if name == "Learner" else (0.05, 0.1, 0.2, 0.4, 1))) for name, panels in rows],
         folder / "fits")
    watch_fits(x, target, [(name, some(panels, np.linspace(0, 1, 21))) for name, panels in rows], folder / "fits")


def draw_bandit(tables, indices, labels, rates, folder):
    """dynamics, controls, runs, interference, outer_loop and ood. rates: how often each context comes, out of distribution."""
    def of(system, title):
        """A system's panel, with some of its runs if they are in runs.csv."""
        runs = np.unique(where(tables["runs"], "run", system=system))
        return panel(tables, indices, system, title, runs=[by_mode(tables["runs"], "strength", system=system, run=r) for r in runs])

    dynamics([of("learner", "Learner (shared bias)"), of("decoupled", "decoupled control"), of("meta", "Meta-Learner (LSTM)"),
              of("bayes", "Bayes-optimal")], labels, folder / "dynamics", columns=4)
    spread = of("spread", "shared, spread-out start")
    dynamics([spread, of("decoupled_spread", "decoupled, same start"), of("sampled", "shared, REINFORCE by samples"),
              of("meta_fixed", "Meta-Learner, names kept"), of("bayes_fixed", "Bayes, actions in fixed order")], labels, folder / "controls")
    dynamics([dict(title=f"run {i}", xlabel="gradient steps", time=spread["time"], strength=run, log=True)
              for i, run in enumerate(spread["runs"], 1)], labels, folder / "runs")
    draw_outer_loop(tables, [f"context {c}" for c in range(1, len(labels) + 1)], folder)       # not in order of learning
    names = dict(learner="Learner, shared bias", spread="same, spread-out start", decoupled="decoupled control", meta="Meta-Learner", bayes="Bayes")

    def lines(table, systems, *columns):
        """Some columns of a table by system, under the names of the figure."""
        return {names[system]: [where(tables[table], column, system=system) for column in columns] for system in systems}
    interference(lines("interference", ("learner", "spread", "decoupled"), "solved", "chance"), lines("interference", ("meta", "bayes"), "solved", "gain"),
                 lines("scaling", (system for system in names if system in tables["scaling"]["system"]), "contexts", "time", "low", "high"),
                 folder / "interference")
    frequent = [f"{rate / sum(rates):.0%}" for rate in rates]
    ood_bars([dict(title=condition, labels=shown, xlabel=xlabel, **{system: where(tables["ood"], "strength", system=system, condition=condition)
                                                                     for system in ("meta", "bayes")})
              for condition, shown, xlabel in (("equal rates", range(1, len(rates) + 1), "context"),
                                               ("unequal rates", frequent, "how often the context comes"))], folder / "ood")
