"""Figures and tables: NumPy arrays in, files out. One function a figure; then which figures a
family shows; last the tables.

    time = np.arange(101)
    strength = 1 / (1 + np.exp((np.array([20, 60]) - time[:, None]) / 5))              # (R, K)
    panels = [dict(title="Learner", time=time, strength=strength, xlabel="gradient steps")]
    dynamics(panels, ["s = 1.6", "s = 0.3"], pathlib.Path("dynamics"))  # dynamics.png and .pdf

Axis order: time first, then tasks N, repeats E, modes K. `results` is a run's flat dict of arrays.
Modes are coloured by viridis, the strongest darkest, with markers staggered along the curves: five
curves in one place are seen to be five. Theory is dashed, references are grey. Claims in titles are
made from the numbers. Left out on purpose: interaction, styles, reading files, imports of ours.
"""
import csv
import math
from contextlib import contextmanager

import numpy as np
from matplotlib import colormaps
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure

INK, GREY, MARKERS = "0.15", "0.45", "osD^v"
THREE = "learner", "meta", "bayes"
CHIEF = [f"{system}/{measure}" for system in THREE
         for measure in ("staggering", "within", "order")]
COUNT_TRIALS = ("learner_by_trial", "online", "meta", "bayes", "bayes_ordered",
                "bayes_theory")                              # others: gradient steps
CAPTION = "dots: half-times · bands: two standard errors over tasks · dashed, where there: theory"
NAMES = dict(
    learner="Learner", shallow="One layer only", sgd="Learner, random start", adam="Learner, Adam",
    rmsprop="Learner, RMSprop", muon="Learner, Muon", learner_rising="Learner, rising targets",
    learner_by_trial="Learner, on t trials", online="Learner, online",
    decoupled="Learner, own biases", spread="Learner, spread-out start",
    decoupled_spread="Own biases, spread out", bayes_ordered="Bayes, ties by name",
    bayes="Bayes-optimal", meta="Meta-Learner", prior="No learning",
    learner_theory="Learner, closed form", shallow_theory="One layer, closed form",
    muon_theory="Muon, closed form", bayes_theory="Bayes, closed form",
    linreg="linear regression", nonlinreg="nonlinear regression", bandit="contextual bandit")

def mode_colours(n):
    """n colours, evenly spaced on viridis without its palest end, strongest darkest: (n, 4)."""
    return colormaps["viridis"](np.linspace(0, 0.82, n))

def new_figure(columns, rows=1, height=3.1, caption="", **axes):
    """A figure and its axes (rows, columns): 10 inches, so that 12 points are 14 of 830 pixels."""
    figure = Figure(figsize=(10, height * rows), dpi=120, layout="constrained")
    figure.supxlabel(caption, fontsize=12, color=GREY)
    panels = figure.subplots(rows, columns, squeeze=False, **axes)
    for ax in panels.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=12)
        ax.locator_params("x", integer=True)
        for text in ax.xaxis.label, ax.yaxis.label, ax.title:
            text.set_size(14 if text is ax.title else 13)
    return figure, panels

@contextmanager
def whole(path):
    """A path to write to; what is written then takes the place of `path`, a Path, in one move, and
    no reader finds half a file."""
    unfinished = path.with_name("unfinished-" + path.name)
    yield unfinished
    unfinished.replace(path)

def save(figure, path):
    """Writes path.png and path.pdf. path: a Path."""
    for suffix, metadata in (".png", None), (".pdf", {"CreationDate": None}):
        with whole(path.with_name(path.name + suffix)) as file:
            figure.savefig(file, metadata=metadata)
        figure.set_layout_engine("none")                    # laid out once is enough

def animate(draw, panels, path, frames=11, rate=3):
    """Writes path.gif: in each panel draw(ax, share, *panel), share from 0 to 1."""
    figure, axes = new_figure(len(panels), sharey=True)
    writer = PillowWriter(fps=rate)
    with whole(path.with_name(path.name + ".gif")) as file, writer.saving(figure, file, dpi=80):
        for share in [*np.linspace(0, 1, frames), *np.ones(rate)]:              # ends with a rest
            for ax, panel in zip(axes[0], panels):
                for artist in [*ax.lines, *ax.patches, *ax.collections]:
                    artist.remove()
                draw(ax, share, *panel)
            writer.grab_frame()
            figure.set_layout_engine("none")                # laid out once: nothing jumps

def half_times(time, strength):
    """First upward crossing of 1/2, interpolated; nan where there is none. (R,), (R, K) to (K,)."""
    times = np.full(strength.shape[1], np.nan)
    for k, curve in enumerate(strength.T):
        i = np.argmax(curve >= 0.5)                         # 0: never, or above from the start
        if i > 0:
            times[k] = np.interp(0.5, curve[i - 1:i + 1], time[i - 1:i + 1])
    return times

def label_ends(ax, curves, labels, gap=0.095):
    """Writes labels (K,) with their markers where curves (R, K) end, `gap` axis heights apart."""
    places = {}
    for k, curve in enumerate(curves.T):
        for height in curve[np.isfinite(curve)][-1:]:
            places[k] = (ax.transData - ax.transAxes).transform((ax.get_xlim()[1], height))[1]
    upwards = sorted(places, key=places.get)
    if places and places[upwards[-1]] - places[upwards[0]] < gap:
        upwards = sorted(places, reverse=True)              # all in one place: the first on top
    for _ in range(100):
        for below, above in zip(upwards, upwards[1:]):
            push = max(0, gap - (places[above] - places[below])) / 2
            places[below] = max(places[below] - push, 0)
            places[above] += push
    for k, place in places.items():
        ax.plot(1.04, place, MARKERS[k % 5], color=mode_colours(len(labels))[k], mec=INK, ms=6,
                transform=ax.transAxes, clip_on=False)
        ax.annotate(labels[k], (1.04, place), xycoords="axes fraction", xytext=(7, 0), color=INK,
                    textcoords="offset points", va="center", fontsize=12)

def draw_modes(ax, x, y, labels, stderr=None, theory=None, halves=False, staggered=True, grey=(),
               note="", **axes):
    """One panel, a curve a mode: x (R,), y, stderr (bands of two), theory (R, K), labels (K,).
    halves: draw half-times; staggered: few markers, each curve's elsewhere, or one at each point;
    grey: heights of reference lines; axes: for Axes.set."""
    shown = np.linspace(0, len(x) - 1, min(len(x), 300)).round().astype(int)    # thin: a small PDF
    gap = max(1, len(shown) // (4 * len(labels)))           # between markers of neighbouring modes
    half = half_times(x, y)
    if halves and np.isfinite(half).any():
        ax.plot([np.nanmin(half), np.nanmax(half)], [0.5, 0.5], color="black", lw=2, zorder=5)
    for level in grey:
        ax.axhline(level, color="0.75", lw=2, zorder=0)
    for k, colour in enumerate(mode_colours(len(labels))):
        curve = y[shown, k]
        ax.plot(x[shown], curve, color=colour, lw=2)
        ax.plot(x[shown], curve, MARKERS[k % 5], color=colour, mec=INK, mew=0.7, ms=6,
                markevery=(k * gap, len(labels) * gap) if staggered else 1, zorder=3)
        if stderr is not None:
            band = 2 * stderr[shown, k]
            ax.fill_between(x[shown], curve - band, curve + band, color=colour, alpha=0.25, lw=0)
        if halves:
            ax.plot(half[k], 0.5, "o", color=colour, mec=INK, ms=10, zorder=6)
    if theory is not None:
        ax.plot(x[shown], theory[shown], color="black", lw=1.2, ls=(0, (4, 3)), zorder=4)
    if note:
        ax.text(0.5, 0.93, note, transform=ax.transAxes, ha="center", va="center", fontsize=12,
                bbox=dict(facecolor="white", edgecolor="none", alpha=0.8, pad=1), zorder=7)
    ax.set(**axes)
    if axes.get("xscale") == "log":
        ax.xaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()

def draw_panels(panels, path, columns=3, caption="", height=3.1, **axes):
    """Panels, dicts of what draw_modes takes, labelled at the end of a row or where they differ."""
    columns = min(columns, len(panels))
    figure, grid = new_figure(columns, -(-len(panels) // columns), height, caption, **axes)
    for ax in grid.flat[len(panels):]:
        ax.remove()
    for i, (ax, panel) in enumerate(zip(grid.flat, panels)):
        draw_modes(ax, **panel)
        if i % columns > 0 and panel.get("ylabel") == panels[i - 1].get("ylabel"):
            ax.set_ylabel("")
        last = (i + 1) % columns == 0 or i + 1 == len(panels)
        if last or list(panel["labels"]) != list(panels[i + 1]["labels"]):
            label_ends(ax, panel["y"], panel["labels"])
    save(figure, path)

def dynamics(panels, labels, path, columns=3, caption=CAPTION):
    """Mode strength against time: spread dots are staggered modes, dots on one spot concurrent.
    panels: dicts with title, time (R,), strength (R, K), and where wanted stderr, theory (R, K),
    xlabel, ylabel, note, log (a logarithmic time axis), labels (in place of `labels`: K names)."""
    drawn = []
    for panel in panels:
        panel = {"labels": labels, "xlabel": "trials", "ylabel": "mode strength", **panel}
        panel["x"], panel["y"] = panel.pop("time"), panel.pop("strength")
        log = panel.pop("log", False)
        left = panel["x"][panel["x"] > 0][0] if log else panel["x"][0]
        drawn.append(dict(panel, halves=True, grey=[1], ylim=(-0.1, 1.35), yticks=[0, 0.5, 1],
                          xscale="log" if log else "linear", xlim=(left, panel["x"][-1])))
    draw_panels(drawn, path, columns, caption, sharey=True)

def outer_loop(results, path):
    """Strengths at the last trial, a control, kappa: outer_loop/step (P,), strength (P, N, E, K),
    half_time (P, K), value (P,), and where it is there, equal (P, Q) of Q singular_values."""
    step, half = results["outer_loop/step"], results["outer_loop/half_time"]
    x = np.where(step > 0, step, step[1] / 2)               # step 0 has a place on a log axis
    prior, bayes = results["performance/prior"].mean(), results["performance/bayes"].mean()
    kappa = (prior - results["outer_loop/value"]) / (prior - bayes)
    axes = dict(x=x, xscale="log", xlim=(x[0], x[-1]), xlabel="outer step", labels=results["modes"])
    unit = dict(axes, ylim=(-0.1, 1.15), yticks=[0, 0.5, 1], halves=True, grey=[1])
    strength = results["outer_loop/strength"].mean((1, 2))
    left = dict(unit, title="Mode strengths\nat the last trial", y=strength, ylabel="strength")
    middle = dict(axes, title="Half-times\nin trials", y=np.where(np.isfinite(half), half, np.nan))
    if "outer_loop/equal" in results:
        middle = dict(unit, title="Control: tasks with\nmodes of one strength",
                      y=results["outer_loop/equal"],
                      labels=[f"all {scale:g}" for scale in results["singular_values"]])
    title = f"Captured fraction κ\n{kappa[-1]:.2f} at the end"
    right = dict(unit, title=title, y=kappa[:, None], labels=["κ"], halves=False)
    draw_panels([left, middle, right], path, caption="dots: half-times · grey: as Bayes")

def performance(results, path):
    """Squared error (log) or reward of fresh episodes by trial: performance/* (n, T), limit ()."""
    systems = "prior", "meta", "bayes"
    values = np.stack([results[f"performance/{system}"] for system in systems], 2)     # (n, T, 3)
    prior, meta, bayes = values.mean((0, 1))
    kappa = (prior - meta) / (prior - bayes)
    reward = bayes > prior
    panel = dict(x=np.arange(values.shape[1]), y=values.mean(0), xlabel="trial",
                 stderr=values.std(0, ddof=1) / np.sqrt(len(values)),
                 title=f"The Meta-Learner captures {kappa:.1%} of what Bayes gains by learning",
                 labels=[NAMES[system] for system in systems], grey=[results["limit"]],
                 ylabel="reward" if reward else "error²", yscale="linear" if reward else "log")
    draw_panels([panel], path, 1, "bands: two standard errors · grey: limit", height=3.8)

def sharing(results, path):
    """Half-time by how many contexts share the answer, relative to an answer of its own:
    sharing/SYSTEM (C,)."""
    systems = "learner", "decoupled", "online", "meta", "bayes"
    half = np.stack([results[f"sharing/{system}"] for system in systems], 1)
    size = np.arange(len(half)) + 1
    with np.errstate(invalid="ignore"):                     # of a mode that is not reached: no line
        relative = half / half[0]
    panel = dict(x=size, xticks=size, y=relative, title="Is a shared answer learned sooner?",
                 xlabel="contexts that share an answer", staggered=False, grey=[1],
                 labels=[NAMES[system] for system in systems], ylabel="half-time (alone: 1)")
    caption = "own biases: a b for each context · online: one trial a step"
    draw_panels([panel], path, caption=caption, height=3.8)

def visits(results, path):
    """Chance of success while unsolved, a line a visit: visits/SYSTEM (A - 1, C)."""
    panels = []
    for system in "meta", "online":
        chance = results[f"visits/{system}"].T
        solved, visit = np.arange(len(chance)), np.arange(chance.shape[1]) + 1
        panels.append(dict(x=solved, y=chance, grey=1 / (visit[-1] + 2 - visit),
                           labels=[f"visit {n}" for n in visit], ylim=(0, 0.75),
                           title=NAMES[system], xlabel="other contexts solved", xticks=solved,
                           ylabel="chance of success", staggered=False))
    draw_panels(panels, path, caption="flat: no interference · grey: exact Bayes", height=3.6)

def order_of_modes(systems, results, summary, path):
    """Half-times in a task's first 8 repeats: SYSTEM/time (R,), SYSTEM/strength (R, N, E, K)."""
    panels = []
    for system in systems:
        strength = results[f"{system}/strength"][:, 0, :8]
        half = [half_times(results[f"{system}/time"], one) for one in strength.swapaxes(0, 1)]
        number = np.arange(len(half)) + 1
        unit = "trials" if system in COUNT_TRIALS else "steps"
        panels.append(dict(x=number, y=np.array(half), xlabel="repeat", xticks=number,
                           title=f"{NAMES[system]}\norder {shown(summary[system]['order'])}",
                           ylabel=f"half-time ({unit})", labels=results["modes"], staggered=False))
    draw_panels(panels, path, caption="crossing lines: learned in another order", height=3.6)

def ood_scales(results, path):
    """Out of distribution by scale: modes (K,), and the table ood."""
    K, ood = len(results["modes"]), results["ood"]
    strength, value = {}, {}                                # by system: (scales, K), (scales,)
    for system in "prior", "meta", "bayes":
        rows = ood[ood["system"] == system]
        strength[system] = rows["strength"].reshape(-1, K)
        value[system] = rows["value"][::K]
    scale = rows["condition"][::K].astype(float)
    kappa = (value["prior"] - value["meta"]) / (value["prior"] - value["bayes"])
    axes = dict(x=scale, xscale="log", xlabel="scale (1: as trained)", xticks=scale, grey=[1],
                ylim=(min(-0.1, kappa.min()), 1.2), ylabel="strength at the last trial")
    panels = []
    for system in "meta", "bayes":
        title = f"{NAMES[system]}\n{strength[system][-1].mean():.2f} at scale {scale[-1]:g}"
        panels.append(dict(axes, y=strength[system], labels=results["modes"], title=title))
    title = f"Captured fraction κ\n{kappa[-1]:.2f} at scale {scale[-1]:g}"
    panels.append(dict(axes, y=kappa[:, None], labels=["κ"], title=title))
    draw_panels(panels, path)

def ood_bars(panels, path):
    """Final strengths out of distribution: title, xlabel, names, meta, bayes (K,) for a panel."""
    figure, axes = new_figure(len(panels), height=3.4, sharey=True)
    for ax, (title, xlabel, names, meta, bayes) in zip(axes[0], panels):
        x = np.arange(len(names))
        ax.bar(x, meta, 0.6, color=mode_colours(5)[2], label="Meta-Learner")
        ax.plot(x, bayes, "D", color="white", mec="black", ms=8, label="Bayes, same prior")
        ax.axhline(0, color="black", lw=0.8)
        ax.set(title=title, xlabel=xlabel, xticks=x, xticklabels=names, ylim=(-0.15, 1.5))
    axes[0, 0].set_ylabel("strength at the last trial")
    axes[0, 0].legend(frameon=False, fontsize=12, loc="upper left", ncols=2)
    save(figure, path)

def clocks(results, path):
    """Where each mode passes 1/2 in the plane of a Learner's two clocks, trials seen and gradient
    steps: learner_by_trial/time (Q,), map/steps (R,), map/strength (R, Q, K), modes (K,)."""
    figure, axes = new_figure(1, height=4)
    ax = axes[0, 0]
    for k, colour in enumerate(mode_colours(len(results["modes"]))):
        ax.contour(results["learner_by_trial/time"], results["map/steps"],
                   results["map/strength"][:, :, k], levels=[0.5], colors=[colour], linewidths=2.5)
        ax.plot([], [], color=colour, lw=2.5, label=results["modes"][k])
    ax.set(title="One Learner, two clocks: where each mode is half learned", xlabel="trials seen",
           ylabel="gradient steps", yscale="log", ylim=results["map/steps"][[1, -1]])
    ax.legend(frameon=False, fontsize=12, title="half learned above and right of")
    save(figure, path)

def draw_fit(ax, share, results, system):
    """What a system has learned when this share of its time is over: of results, under fits/, x,
    target (G,), data (T, 2), learner (R, G), meta, bayes, deviation (T + 1, G)."""
    x, target, learned = results["fits/x"], results["fits/target"], results[f"fits/{system}"]
    i = round(share * (len(learned) - 1))
    ax.plot(x, target, color="0.65", lw=4)
    ax.plot(x, learned[i], color=mode_colours(5)[1], lw=2)
    if system == "bayes":
        band = 2 * results["fits/deviation"][i]
        ax.fill_between(x, learned[i] - band, learned[i] + band, color=GREY, alpha=0.25, lw=0)
    now = f"{results['learner/time'][i]:g} steps" if system == "learner" else f"{i} trials"
    ax.set_title(f"{NAMES[system]}, {now}", fontsize=13)
    if system != "learner":
        ax.plot(*results["fits/data"][:i].T, "o", color="black", ms=4)
    ax.set(xticks=[0, 0.5, 1], ylim=(1.6 * target.min(), 1.6 * target.max()))

def fits(results, path):
    """Functions learned from one task: a row a system, a column a moment; results: see draw_fit."""
    caption = "grey: the task · dots: trials seen · band: two deviations of the posterior"
    figure, axes = new_figure(3, 3, 2.2, caption, sharex=True, sharey=True)
    for row, system in zip(axes, THREE):
        for ax, share in zip(row, (0.12, 0.35, 1)):
            draw_fit(ax, share, results, system)
    save(figure, path)

def draw_spectrum(ax, share, panel, spectrum):
    """What is learned of each singular value (K,) when this share of a panel's time is over."""
    modes = np.arange(1, len(spectrum) + 1)
    i = round(share * (len(panel["time"]) - 1))
    ax.bar(modes, spectrum * panel["strength"][i], color=mode_colours(len(modes)))
    ax.bar(modes, spectrum, fill=False, lw=1.5)
    ax.set(xlabel="mode", xticks=modes, ylim=(0, 1.1 * max(spectrum)))
    ax.set_title(f"{panel['title']}\n{panel['time'][i]:.0f} {panel['xlabel']}", fontsize=13)

# ------------------------------------------------------------ which figures a family shows
def all_systems(results):
    """The names of all systems that the results have, in the order in which they were measured."""
    return [name.removesuffix("/time") for name in results if name.endswith("/time")]

def curve(results, system):
    """A system's time (R,), its strengths averaged over repeats, then over tasks (R, K), and their
    standard errors over tasks (R, K), 0 for a single task; from strengths (R, N, E, K)."""
    strength = results[f"{system}/strength"].mean(2)
    n = strength.shape[1]
    stderr = strength.std(1, ddof=min(1, n - 1)) / n ** 0.5
    return results[f"{system}/time"], strength.mean(1), stderr

def panels_of(systems, results, summary):
    """Panels for `dynamics`, with a closed form where there is one."""
    panels = []
    for system in systems:
        time, strength, stderr = curve(results, system)
        index, order = (summary["systems"][system][name] for name in ("staggering", "order"))
        note = f"index {index:.2f}" if index < 10 else f"index {index:.0f}"
        seen = "all at once" if index < 1.5 else "one after another"        # 1.5 is our choice
        half = half_times(time, strength)
        if index >= 1.5 and half[0] > half[-1]:
            seen += ", last first"
        if not np.isfinite(index):
            note = "not all reach 1/2" if index == np.inf else "index undefined"
            seen = "not all are learned" if index == np.inf else ""
        if np.isfinite(order):
            note += f", order {round(order, 2) + 0:.2f}"    # + 0: never -0.00
        panel = dict(title=f"{NAMES[system]}\n{seen}", note=note, time=time, strength=strength,
                     stderr=stderr, log=time[-1] > 100 and np.ptp(np.diff(time)) > 0,
                     xlabel="trials" if system in COUNT_TRIALS else "gradient steps")
        if f"{system}_theory/time" in results:
            _, panel["theory"], _ = curve(results, f"{system}_theory")
        panels.append(panel)
    return panels

def of_all_families(results, summary, learner, controls, clock, folder):
    """What every family shows; learner: from random starts; clock: a Learner by trials."""
    figures = dict(dynamics=THREE, controls=controls, clock=("learner", clock, "meta"))
    for name, systems in figures.items():
        dynamics(panels_of(systems, results, summary), results["modes"], folder / name)
    outer_loop(results, folder / "outer_loop")
    performance(results, folder / "performance")
    systems = learner, "meta", "bayes"
    order_of_modes(systems, results, summary["systems"], folder / "order")

def linreg(results, summary, folder):
    """The figures of linear regression, into a folder, a Path that exists."""
    controls = "learner", "shallow", "sgd", "adam", "rmsprop", "muon"
    of_all_families(results, summary, "sgd", controls, "learner_by_trial", folder)
    ood_scales(results, folder / "ood")
    films = [(panel, results["singular_values"]) for panel in panels_of(THREE, results, summary)]
    animate(draw_spectrum, films, folder / "spectra")
    clocks(results, folder / "clocks")

def nonlinreg(results, summary, folder):
    """The figures of nonlinear regression, into a folder, a Path that exists."""
    controls = "learner", "learner_rising"
    of_all_families(results, summary, "learner", controls, "learner_by_trial", folder)
    fits(results, folder / "fits")
    animate(draw_fit, [(results, system) for system in THREE], folder / "fits")
    ood, panels = results["ood"], []
    for ending, (first, last) in zip(("", "_bandpass"), results["passband"]):
        meta, bayes = (ood[ood["system"] == system + ending] for system in ("meta", "bayes"))
        panels.append((f"Trained on frequencies {first} to {last}", "frequency", meta["mode"],
                       meta["strength"], bayes["strength"]))
    ood_bars(panels, folder / "ood")

def bandit(results, summary, folder):
    """The figures of the bandit, into a folder, a Path that exists."""
    controls = "learner", "decoupled", "spread", "decoupled_spread", "online", "bayes_ordered"
    of_all_families(results, summary, "learner", controls, "online", folder)
    sharing(results, folder / "sharing")
    visits(results, folder / "visits")
    contexts = [name.removeprefix("context ") for name in results["modes"]]
    rates = [f"{rate:.0%}" for rate in results["rates"]]
    ood, panels = results["ood"], []
    for condition, xlabel, names in (("equal rates", "context", contexts),
                                     ("unequal rates", "how often the context comes", rates)):
        here = ood[ood["condition"] == condition]
        meta, bayes = (here["strength"][here["system"] == system] for system in ("meta", "bayes"))
        panels.append((f"Contexts at {condition}", xlabel, names, meta, bayes))
    ood_bars(panels, folder / "ood")

# ------------------------------------------------------------ tables, for people
def shown(value):
    """A number as a person reads it; "-" where it is undefined or a mode is not reached."""
    if not math.isfinite(value):
        return "-"
    digits = 2 if abs(value) < 9.995 else 1 if value < 99.95 else 0
    return f"{round(value, digits) + 0:.{digits}f}"         # + 0: never -0.00

def printed(summary):
    """A summary as a table to print."""
    lines = ["Half-time of each mode; index: latest over earliest, of averages over repeats, and",
             "within a repeat; order: how alike repeats are, 1 the same order, 0 one by chance", ""]
    head = "".join(f"{k + 1:6}" for k in range(len(summary["follows_bayes"])))
    lines.append(f"{'':32}{head}  index [95% CI]      within  order")
    for system, row in summary["systems"].items():
        name = f"{NAMES[system]} ({'trials' if system in COUNT_TRIALS else 'steps'})"
        half = "".join(f"{shown(t):>6}" for t in row["half_times"])
        low, high = map(shown, row["staggering_ci"])
        index = f"{shown(row['staggering']):>5} [{low}, {high}]"
        lines.append(f"{name:32}{half}  {index:19}{shown(row['within']):>7}"
                     f"{shown(row['order']):>7}")
    low, high = summary["captured_ci"]
    follows = " ".join(map(shown, summary["follows_bayes"]))
    return "\n".join([*lines, "", f"Captured fraction κ = {summary['captured']:.3f} "
                      f"[{low:.3f}, {high:.3f}]; half-times follow those of Bayes: {follows}"])

def write_csv(path, columns, rows):
    """Writes rows of numbers and words under the names of their columns. path: a Path."""
    with whole(path) as unfinished, open(unfinished, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)

def tables(results, folder):
    """The CSV files of a run, into a folder, a Path that exists; modes count from 1."""
    rows = []
    for system in all_systems(results):
        time, strength, stderr = curve(results, system)
        for k, mode in enumerate(zip(strength.T, stderr.T), 1):
            rows += [(system, k, *row) for row in zip(time, *mode)]
    write_csv(folder / "dynamics.csv", "system mode time strength stderr".split(), rows)
    rows = []
    for system in "prior", "meta", "bayes":
        values = results[f"performance/{system}"]                                   # (n, T)
        stderr = values.std(0, ddof=1) / len(values) ** 0.5
        rows += [(system, t, *row) for t, row in enumerate(zip(values.mean(0), stderr))]
    write_csv(folder / "performance.csv", "system trial value stderr".split(), rows)
    strength, half = results["outer_loop/strength"].mean((1, 2)), results["outer_loop/half_time"]
    step, value = results["outer_loop/step"], results["outer_loop/value"]
    rows = [(step[i], k + 1, strength[i, k], half[i, k], value[i])
            for k, i in np.ndindex(half.shape[::-1])]
    write_csv(folder / "outer_loop.csv", "outer_step mode strength half_time value".split(), rows)
    write_csv(folder / "ood.csv", results["ood"].dtype.names, results["ood"].tolist())

def numbers(values, path=""):
    """Every number of a summary by its path there: {"systems/meta/half_times/1": 3.2, ...}."""
    if isinstance(values, list):
        values = dict(enumerate(values, 1))
    if not isinstance(values, dict):
        return {path.removeprefix("/"): values}
    found = {}
    for name, value in values.items():
        found |= numbers(value, f"{path}/{name}")
    return found

def overview(runs, folder):
    """What several runs say together: overview.csv, every number of each seed's summary.json with
    its median, range and standard error over seeds; and a figure of the first seed, a row a family.
    Returns the chief numbers as text. runs: by family a list of results, one a seed."""
    rows, panels, lines = [], [], [f"{'':38}median over seeds [lowest, highest]"]
    for family, several in runs.items():
        for panel in panels_of(THREE, several[0], several[0].summary):
            panels.append(dict(panel, labels=several[0]["modes"], ylabel=NAMES[family]))
        by_seed = [numbers(results.summary) for results in several]
        for name in by_seed[0]:
            values = [found[name] for found in by_seed]
            median, low, high = np.median(values), min(values), max(values)
            finite = len(values) > 1 and np.isfinite(values).all()
            stderr = np.std(values, ddof=1) / len(values) ** 0.5 if finite else math.nan
            rows.append((family, name, median, low, high, stderr, *values))
            if name == "captured" or name.removeprefix("systems/") in CHIEF:
                lines.append(f"{family:12}{name.removeprefix('systems/'):24}{shown(median):>5} "
                             f"[{shown(low)}, {shown(high)}]")
    seeds = [f"seed{results.config.seed}" for results in several]
    columns = "family", "number", "median", "low", "high", "stderr", *seeds
    write_csv(folder / "overview.csv", columns, rows)
    dynamics(panels, [], folder / "overview")
    return "\n".join(lines)
