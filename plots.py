r"""Figures: NumPy arrays in, files out. One function a figure, each writing PNG and PDF; below them, which figures a family shows of its tables.

    dynamics([dict(title="Learner", time=t, strength=S)], ["s = 1.6", "s = 0.3"], Path("dynamics"))

Axis order: time first, then modes K. Modes are coloured by viridis, the strongest darkest, and numbered on the curves;
theory is black and dashed, Bayes grey. Imports nothing of ours: copy it alone. Left out on purpose: interaction, styles, seaborn.
"""
from functools import partial

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

GREY, FAINT = "0.45", "0.85"


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
    places += np.clip((heights[order] - places).mean(), low + gap / 2 - places[0], max(low + gap / 2 - places[0], high - places[-1]))
    for place, k in zip(places, order):
        ax.annotate(labels[k], (x, place), xytext=(6, 0), textcoords="offset points", color=colours[k], va="center", fontsize=12,
                    annotation_clip=False)


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
    (single ones, (R, K) each, drawn behind the mean), log (a logarithmic time axis), labels (in place of the others).
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
        names = panel.get("labels", labels)
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
    """Out of distribution: final strength by frequency (K,), pass band shaded. panels: a list of (title, passband, meta (K,), bayes (K,))."""
    figure, axes = new_figure(len(panels), width=5.5, sharey=True)
    for ax, (title, (low, high), strength, bayes) in zip(axes[0], panels):
        ax.axvspan(low - 0.5, high + 0.5, color="0.93", zorder=0)
        ax.text((low + high) / 2, 1.17, "pass band", ha="center", color=GREY, fontsize=12)
        ax.bar(frequencies, strength, width=0.6, color=mode_colours(5)[1], label="Meta-Learner")
        ax.plot(frequencies, bayes, "D", color="white", mec="black", ms=7, label="Bayes, same prior")
        ax.set(title=title, xlabel="frequency of the signal", xticks=frequencies, ylim=(-0.15, 1.3))
        ax.axhline(0, color="black", lw=0.8)
    axes[0, 0].set_ylabel("strength at the last trial")
    axes[0, 0].legend(frameon=False, fontsize=12, loc="center right")
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
    axes[0, 0].set(title="Learner: chance that J rises", xlabel="other contexts already solved", ylim=(0, 1.05))
    axes[0, 1].set(title="in an episode: rise of J at first visits", xlabel="other contexts already solved", ylim=(0, 0.5))
    axes[0, 2].set(title="time to a mean J of 0.9", xlabel="contexts", ylabel="steps (Learner), trials (Bayes)", yscale="log")
    save(figure, path)


def ood_rates(rates, panels, path):
    """Out of distribution: final strength by context, which come at the given rates (C labels). panels: (title, meta (C,), bayes (C,))."""
    figure, axes = new_figure(len(panels), width=4.6, sharey=True)
    for ax, (title, strength, bayes) in zip(axes[0], panels):
        ax.bar(range(len(strength)), strength, width=0.6, color=mode_colours(5)[1], label="Meta-Learner")
        ax.plot(bayes, "D", color="white", mec="black", ms=7, label="Bayes")
        ax.set(title=title, xlabel="context", ylim=(0, 1.3), xticks=range(len(strength)), xticklabels=[f"{c + 1}" for c in range(len(strength))])
    axes[0, -1].set(xlabel="how often the context comes", xticklabels=rates)
    axes[0, 0].set_ylabel("strength at the last trial")
    axes[0, 0].legend(frameon=False, fontsize=12, loc="upper right", ncols=2)
    save(figure, path)


# ---------------------------------------------------------------- a family's figures, from the tables of a run

def by_mode(table, column, **where):
    """One column of a table as an array (R, K), of the rows that match: time, outer step or condition down, modes across."""
    keep = np.all([table[name] == value for name, value in where.items()], axis=0) if where else slice(None)
    modes, values = table["mode"][keep], table[column][keep]
    return np.stack([values[modes == k] for k in np.unique(modes)], 1)


def panel(tables, indices, system, title, theory=None):
    """One system's curves, as `dynamics` takes them, with its staggering index from a dict of strings."""
    table = tables["dynamics"]
    time = table["time"][(table["system"] == system) & (table["mode"] == 1)]
    return dict(title=title, xlabel="trials" if system.startswith(("meta", "bayes")) else "gradient steps", time=time,
                strength=by_mode(table, "strength", system=system), stderr=by_mode(table, "stderr", system=system),
                theory=theory and by_mode(table, "strength", system=theory), note="not all reach 1/2" if indices[system] == "not reached" else "staggering " + indices[system])


def draw_outer_loop(tables, labels, folder):
    """outer_loop, from the tables outer_loop and performance."""
    performance, table = tables["performance"], tables["outer_loop"]
    prior, bayes = (performance["value"][performance["system"] == system].mean() for system in ("prior", "bayes"))
    first = table["mode"] == 1
    outer_loop(table["outer_step"][first], by_mode(table, "strength"), by_mode(table, "half_time"),
               (table["value"][first] - prior) / (bayes - prior), labels, folder / "outer_loop")


def draw_linreg(tables, indices, labels, folder):
    """dynamics, controls, outer_loop and ood. tables: a dict of CSV name to a dict of columns; indices: staggering by system, as strings."""
    draw_panel, table = partial(panel, tables, indices), tables["ood"]
    dynamics([draw_panel("learner", "Learner (gradient descent)", "learner_theory"), draw_panel("meta", "Meta-Learner (LSTM)"),
              draw_panel("bayes", "Bayes-optimal")], labels, folder / "dynamics")
    dynamics([draw_panel("learner", "aligned start", "learner_theory"), draw_panel("shallow", "one layer only", "shallow_theory")]
                   + [draw_panel(name, f"random start, {name}") for name in ("sgd", "adam", "rmsprop")]
                   + [draw_panel("muon", "random start, muon", "muon_theory")], labels, folder / "controls")
    draw_outer_loop(tables, labels, folder)
    prior, meta, bayes = (table["value"][(table["system"] == system) & (table["mode"] == 1)] for system in ("prior", "meta", "bayes"))
    scales = table["condition"][(table["system"] == "meta") & (table["mode"] == 1)].astype(float)
    ood_scales(scales, *(by_mode(table, "strength", system=system) for system in ("meta", "bayes")), (prior - meta) / (prior - bayes), labels,
               folder / "ood")


def draw_nonlinreg(tables, indices, labels, learner_labels, bands, folder):
    """dynamics, heat_maps, fits, outer_loop and ood. bands: of frequencies, the lower and upper half of the pass band, and those above."""
    draw_panel, table = partial(panel, tables, indices), tables["fits"]
    systems = [draw_panel("learner", "Learner (ReLU network)") | dict(labels=learner_labels),
               draw_panel("learner_rising", "Learner, rising amplitude") | dict(labels=learner_labels),
               draw_panel("meta", "Meta-Learner (LSTM)"), draw_panel("bayes", "Bayes-optimal")]
    dynamics(systems, labels, folder / "dynamics", columns=4)
    heat_maps(systems, labels, folder / "heat_maps")
    draw_outer_loop(tables, labels, folder)

    def curve(system, column="value", time=None):
        """One function of fits.csv."""
        return table[column][(table["system"] == system) & ((table["time"] == time) if time is not None else True)].astype(float)
    data = np.stack([curve("data", "x"), curve("data")], 1)
    steps, trials = np.unique(curve("learner", "time")), np.unique(curve("bayes", "time"))
    steps = [steps[round(share * (len(steps) - 1))] for share in (0.1, 0.25, 0.4, 0.6, 1)]
    trials = [trials[round(share * (len(trials) - 1))] for share in (0.05, 0.1, 0.2, 0.4, 1)]
    rows = [("Learner", [(f"{t:g} steps", curve("learner", time=t), None, 0) for t in steps])]
    rows.append(("Meta-Learner", [(f"{t:g} trials", curve("meta", time=t), None, int(t)) for t in trials]))
    rows.append(("Bayes", [(f"{t:g} trials", curve("bayes", time=t), curve("bayes", "deviation", t), int(t)) for t in trials]))
    fits(curve("target", "x"), curve("target"), data, rows, folder / "fits")

    table, (lower, upper, above), panels = tables["ood"], bands, []
    for suffix, band in ("", [*lower, *upper]), ("_bandpass", upper):
        strength = [table["strength"][table["system"] == system + suffix] for system in ("meta", "bayes")]
        panels.append((f"trained on frequencies {band[0]} to {band[-1]}", (band[0], band[-1]), *strength))
    ood_bands(np.array([*lower, *upper, *above]), panels, folder / "ood")


def draw_bandit(tables, indices, labels, rates, folder):
    """dynamics, controls, runs, interference, outer_loop and ood. rates: how often each context comes, out of distribution."""
    draw_panel, table = partial(panel, tables, indices), tables["runs"]

    def with_runs(system, title):
        """A Learner's panel on a logarithmic time axis, with some of its runs."""
        runs = [by_mode(table, "strength", system=system, run=r) for r in np.unique(table["run"])]
        return draw_panel(system, title) | dict(log=True, runs=runs)

    dynamics([with_runs("learner", "Learner (shared bias)"), with_runs("decoupled", "decoupled control"),
              draw_panel("meta", "Meta-Learner (LSTM)"), draw_panel("bayes", "Bayes-optimal", "bayes_theory")],
             labels, folder / "dynamics", columns=4)
    dynamics([with_runs("spread", "shared, spread-out start"), with_runs("decoupled_spread", "decoupled, same start"),
                    draw_panel("sampled", "shared, REINFORCE by samples") | dict(log=True), draw_panel("meta_fixed", "Meta-Learner, names kept"),
                    draw_panel("bayes_fixed", "Bayes, actions in fixed order")], labels, folder / "controls")
    spread = with_runs("spread", "")
    dynamics([dict(title=f"run {i}", xlabel="gradient steps", time=spread["time"], strength=run, log=True)
              for i, run in enumerate(spread["runs"], 1)], labels, folder / "runs")
    draw_outer_loop(tables, [f"context {c}" for c in range(1, len(labels) + 1)], folder)       # not in order of learning
    chance, scaling, names = tables["interference"], tables["scaling"], dict(
        learner="Learner, shared bias", spread="same, spread-out start", decoupled="decoupled control", meta="Meta-Learner", bayes="Bayes")
    def of(table, system, *columns):
        """Some columns of a system's rows."""
        return [table[column][table["system"] == system] for column in columns]
    interference({names[system]: of(chance, system, "solved", "chance") for system in ("learner", "spread", "decoupled")},
                 {names[system]: of(chance, system, "solved", "gain") for system in ("meta", "bayes")},
                 {name: of(scaling, system, "contexts", "time", "low", "high") for system, name in names.items()
                  if system in scaling["system"]}, folder / "interference")
    table = tables["ood"]
    panels = [(condition, *(by_mode(table, "strength", system=system, condition=condition)[0] for system in ("meta", "bayes")))
              for condition in ("equal rates", "unequal rates")]
    ood_rates([f"{rate / sum(rates):.0%}" for rate in rates], panels, folder / "ood")
