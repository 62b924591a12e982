r"""metadyn: how structure is learned, by a Learner, by a Meta-Learner and by Bayes-optimal inference.

    python metadyn.py linreg                 # the whole experiment, pictures and table in runs/linreg
    python metadyn.py linreg --quick         # the same in seconds, too short to learn much
    python metadyn.py linreg --help          # every setting with its default and unit

This file holds the settings, the experiments wired together from tasks.py, learners.py, meta.py and plots.py, and the files a
run writes. Reproduces Rabinowitz 2019, arXiv 1905.01320. Left out on purpose: sweeps, logging services, multi-GPU.
"""
import argparse
import csv
import io
import json
import math
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import matplotlib
import numpy as np
import torch

import learners
import meta
import plots
import tasks

try:
    import fcntl
except ImportError:                                       # Windows: two runs in one folder are not kept apart there
    fcntl = None


class Mistake(ValueError):
    """A mistake by the user: one line that names the option, what was given and what is allowed."""


# ---------------------------------------------------------------- settings

def option(default, help, low=-math.inf, above=-math.inf, choices=None):
    """A field of a config: its default, help with unit, and what is allowed: at least `low`, more than `above`, one of `choices`."""
    rules = dict(metadata=dict(help=help, low=low, above=above, choices=choices))
    return field(default_factory=lambda: list(default), **rules) if isinstance(default, list) else field(default=default, **rules)


@dataclass
class Config:
    """Settings that all families share."""
    seed: int = option(0, "seed of the streams for tasks, initialisation and evaluation", low=0)
    device: str = option("auto", "where the Meta-Learner runs", choices=("auto", "cpu", "cuda", "mps"))
    noise: float = option(0.1, "standard deviation of the noise on y", low=0)
    hidden: int = option(128, "LSTM units", low=1)
    layers: int = option(2, "LSTM layers", low=1)
    batch: int = option(128, "episodes in an outer step", low=1)
    outer_steps: int = option(4000, "updates of the Meta-Learner's weights", low=1)
    outer_optimizer: str = option("muon", "optimizer of the outer loop", choices=("muon", "adam"))
    muon_lr: float = option(0.03, "peak learning rate of Muon, on the LSTM's matrices", above=0)
    adam_lr: float = option(0.01, "peak learning rate of Adam, on all other weights (on all, with --outer-optimizer adam)", above=0)
    eval_tasks: int = option(16, "evaluation tasks, the same for every system", low=2)
    eval_episodes: int = option(512, "episodes of each evaluation task, for the inner loops' curves", low=1)
    fresh_tasks: int = option(4096, "tasks drawn from the prior to measure the captured fraction", low=2)

    def check(self):
        """Raises Mistake where a setting is not what its field allows."""
        for f in fields(self):
            given, rule = getattr(self, f.name), f.metadata
            name = "--" + f.name.replace("_", "-")
            if rule["choices"]:
                if given not in rule["choices"]:
                    raise Mistake(f"{name}: {given} given, allowed: {', '.join(rule['choices'])}")
                continue
            for value in given if isinstance(given, list) else [given]:
                if not (math.isfinite(value) and value >= rule["low"] and value > rule["above"]):
                    bound = f"at least {rule['low']}" if math.isfinite(rule["low"]) else f"more than {rule['above']}"
                    raise Mistake(f"{name}: {value} given, allowed: a finite number, {bound}")


@dataclass
class Linreg(Config):
    """Linear regression: the singular modes of a linear map, against Saxe, McClelland & Ganguli 2013."""
    dim: int = option(5, "dimension of x and of y", low=1)
    singular_values: list[float] = option([1.6, 1.2, 0.9, 0.6, 0.3], "singular values of the evaluation tasks, mode 1 first", above=0)
    trials: int = option(20, "trials in an episode", low=1)
    learner_lr: float = option(0.01, "the Learner's step size (1 / tau)", above=0)
    learner_steps: int = option(2000, "the Learner's gradient steps", low=1)
    learner_scale: float = option(1e-3, "strength u0 of each mode of the Learner's map at the start", above=0)
    scales: list[float] = option([0.25, 0.5, 1.0, 2.0, 4.0, 8.0], "factors on the spectrum, out of distribution", above=0)

    def check(self):
        super().check()
        if len(self.singular_values) != self.dim:
            raise Mistake(f"--singular-values: {len(self.singular_values)} given, allowed: as many as --dim, {self.dim}")

    # the four things that the frame asks of a family: its prior, its evaluation tasks, its Learners, its out-of-distribution test

    def prior(self):
        """The task distribution."""
        return tasks.LinearRegression(self.dim, self.noise, self.trials)

    def targets(self, generator):
        """The fixed evaluation tasks (N, dim, dim)."""
        return self.prior().evaluation_tasks(self.eval_tasks, torch.tensor(self.singular_values), generator)

    def learner_curves(self, W, generator):
        """Yields (system, steps (R,), strengths (R, N, K)): the Learner, its closed form, the controls, the four optimizers."""
        W, lr, u0, steps = W.double(), self.learner_lr, self.learner_scale, self.learner_steps
        U, s, Vh = torch.linalg.svd(W)
        for system, start, optimizer, rate, n in (
                ("learner", "aligned", "sgd", lr, steps), ("shallow", "shallow", "sgd", lr, steps), ("sgd", "random", "sgd", lr, steps),
                ("adam", "random", "adam", lr / 10, steps), ("rmsprop", "random", "rmsprop", lr / 10, steps), ("muon", "random", "muon", lr, steps // 10)):
            t, maps = learners.linear_network(W, rate, n, start, u0, optimizer, every=max(1, n // 400), generator=generator)
            yield system, t, tasks.mode_strength(maps, U, Vh.mT, s)
            theory = dict(learner=learners.deep_linear_theory, shallow=learners.shallow_theory, muon=learners.muon_theory).get(system)
            if theory:
                closed_form = theory(s[0], u0 if system != "shallow" else 0.0, t * rate) / s[0]
                yield system + "_theory", t, closed_form[:, None].expand(-1, len(W), -1)

    def conditions(self, W):
        """Yields (condition, targets) for the out-of-distribution test: the evaluation tasks with their spectrum scaled."""
        for scale in self.scales:
            yield f"{scale:g}", scale * W

    def draw(self, folder, summary):
        """Writes the figures."""
        draw_linreg(self, folder, summary)

    QUICK = dict(hidden=32, outer_steps=150, batch=64, eval_tasks=4, eval_episodes=64, fresh_tasks=512)
    FULL = dict(hidden=512, outer_steps=30000, eval_tasks=64, eval_episodes=1024, fresh_tasks=16384)


FAMILIES = {"linreg": Linreg}


# ---------------------------------------------------------------- the experiment, the same for every family

def stream(seed, purpose):
    """A generator of its own for each purpose, so that what one draws never shifts another."""
    return torch.Generator().manual_seed(3 * seed + ("tasks", "initialisation", "evaluation").index(purpose))


def meta_train(config, prior, snapshot, checkpoint, loss_prior, loss_bayes):
    """A Meta-Learner for this prior, trained or resumed. Returns it and its snapshots."""
    model = meta.MetaLearner(prior.input_size, prior.outputs, config.hidden, stream(config.seed, "initialisation"), config.layers)
    model.to(config.device)

    def loss(model, generator):
        x, y = prior.episodes(prior.sample(config.batch, generator), generator)
        guess = model.predict(x, y)
        return (guess - y.to(guess.device)).square().mean()

    optimizers = meta.make_optimizers(model, config.outer_optimizer, config.muon_lr, config.adam_lr)
    snapshots = meta.outer_loop(model, loss, config.outer_steps, optimizers, stream(config.seed, "tasks"), snapshot, checkpoint,
                                asdict(config), report=meta.Progress(config.outer_steps, loss_prior, loss_bayes))
    return model, snapshots


def experiment(config, folder):
    """The whole experiment of a family. Returns the rows of each CSV file, by its name, and the summary."""
    clock, seconds = [time.perf_counter()], {}

    def lap(phase):
        clock.append(time.perf_counter())
        seconds[phase] = round(clock[-1] - clock[-2], 2)

    prior, evaluation = config.prior(), stream(config.seed, "evaluation")
    W, xq = config.targets(evaluation), prior.queries(evaluation)
    few = max(1, config.eval_episodes // 16)                  # episodes a task for snapshots and out of distribution
    fresh = prior.episodes(prior.sample(config.fresh_tasks, evaluation), evaluation)
    episodes, some = (meta.episodes_of(prior, W, n, evaluation) for n in (config.eval_episodes, few))
    curves = {system: (t, strength) for system, t, strength in config.learner_curves(W, evaluation)}
    predictors = dict(prior=tasks.Prior(prior), bayes=tasks.Bayes(prior))
    loss = {system: meta.losses(predictor, *fresh) for system, predictor in predictors.items()}
    trials = torch.arange(prior.trials + 1.0)
    lap("learners_and_bayes")

    def snapshot(model):
        strength = meta.inner_loop(model, prior, W, some, xq)[0].mean(1)
        return dict(strength=strength[-1].tolist(), half_time=tasks.half_time(strength.T, trials).tolist(),
                    value=meta.losses(model, *fresh).mean().item())

    predictors["meta"], snapshots = meta_train(config, prior, snapshot, folder / "checkpoint.pt", *(loss[p].mean().item() for p in ("prior", "bayes")))
    lap("outer_loop")

    with torch.no_grad():
        loss["meta"] = meta.losses(predictors["meta"], *fresh)
        rows = dict(dynamics=[], probe=[], ood=[], performance=[])
        for system in ("meta", "bayes"):
            strength, others = meta.inner_loop(predictors[system], prior, W, episodes, xq)
            curves[system] = trials, strength
            rows["probe"] += [(system, t, *(r[t].mean().item() for r in others.values())) for t in range(prior.trials + 1)]
        for condition, targets in config.conditions(W):
            data = meta.episodes_of(prior, targets, few, evaluation)
            for system, predictor in predictors.items():
                strength = meta.inner_loop(predictor, prior, targets, data, xq)[0][-1].mean(0)
                value = meta.losses(predictor, *(z.flatten(0, 1) for z in data)).mean().item()
                rows["ood"] += [(system, condition, k, s, value) for k, s in enumerate(strength.tolist(), 1)]
    for system, (t, strength) in curves.items():
        mean, stderr = strength.mean(1).tolist(), (strength.std(1) / strength.shape[1] ** 0.5).tolist()
        rows["dynamics"] += [(system, k + 1, t[r].item(), mean[r][k], stderr[r][k]) for k in range(len(mean[0])) for r in range(len(t))]
    for system, per_trial in loss.items():
        mean, stderr = per_trial.mean(0).tolist(), (per_trial.std(0) / len(per_trial) ** 0.5).tolist()
        rows["performance"] += [(system, t, *values) for t, values in enumerate(zip(mean, stderr))]
    rows["outer_loop"] = [(s["outer_step"], k, *values, s["value"]) for s in snapshots for k, values in enumerate(zip(s["strength"], s["half_time"]), 1)]

    summary = {system: tasks.describe(strength, t, evaluation) for system, (t, strength) in curves.items()}
    mean_losses = [loss[system].mean(1) for system in ("prior", "meta", "bayes")]
    summary["captured"] = tasks.captured_fraction(*mean_losses).item()
    summary["captured_ci"] = list(tasks.bootstrap_interval(tasks.captured_fraction, *mean_losses, generator=evaluation))
    lap("probes")
    return rows, summary | dict(seconds=seconds)


# ---------------------------------------------------------------- files of a run

COLUMNS = dict(dynamics="system,mode,time,strength,stderr", performance="system,trial,value,stderr", probe="system,time,r_squared,off_diagonal",
               outer_loop="outer_step,mode,strength,half_time,value", ood="system,condition,mode,strength,value")


def finite(value):
    """What a file says of a number: itself, or "not reached" for a half-time or an index that is infinite. Walks lists and dicts."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return "not reached" if value == math.inf else value


def write_run(folder, rows, summary):
    """Writes the CSV files, and summary.json last: once it is there, the run is complete."""
    for name, table in rows.items():
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([COLUMNS[name].split(","), *finite(table)])
        meta.replace_file(folder / f"{name}.csv", text.getvalue().encode())
    meta.replace_file(folder / "summary.json", json.dumps(finite(summary), indent=1).encode())


def read_table(folder, name):
    """A CSV file of a run as a dict of columns: NumPy arrays, of numbers where all are ("not reached" is inf), else of strings."""
    with open(folder / f"{name}.csv", newline="") as file:
        header, *lines = csv.reader(file)
    columns = {}
    for title, column in zip(header, zip(*lines)):
        try:
            columns[title] = np.array([math.inf if cell == "not reached" else float(cell) for cell in column])
        except ValueError:
            columns[title] = np.array(column)
    return columns


def by_mode(table, column, **where):
    """One column of a table as an array (R, K), of the rows that match: time, outer step or condition down, modes across."""
    keep = np.all([table[name] == value for name, value in where.items()], axis=0) if where else slice(None)
    modes, values = table["mode"][keep], table[column][keep]
    return np.stack([values[modes == k] for k in np.unique(modes)], 1)


@contextmanager
def held(folder):
    """Makes the folder and keeps other runs out of it. Raises Mistake where it cannot be written or another run is at work there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        raise Mistake(f"--out: {folder} given, which cannot be written ({error.strerror}), allowed: a folder that can") from None
    with lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Mistake(f"--out: {folder} given, where another run is at work, allowed: a folder of its own") from None
        yield


def agree(folder, settings, fresh):
    """Writes config.json, or compares the one that is there with this run's settings. Raises Mistake where they differ."""
    if fresh:
        for name in ("config.json", "summary.json", "checkpoint.pt"):
            (folder / name).unlink(missing_ok=True)
    path, way_out = folder / "config.json", "allowed: another folder, or --fresh to replace that run"
    if not path.exists():
        versions = {module.__name__: module.__version__ for module in (torch, np, matplotlib)} | dict(python=sys.version.split()[0])
        meta.replace_file(path, json.dumps(settings | dict(command=sys.argv, versions=versions), indent=1).encode())
        return
    try:
        there = json.loads(path.read_text())
    except ValueError:
        raise Mistake(f"--out: {folder} given, whose config.json is damaged, {way_out}") from None
    for name, value in settings.items():
        if there.get(name) != value:
            raise Mistake(f"--out: {folder} given, which holds a run of another config ({name} {there.get(name)} there, {value} here), {way_out}")


# ---------------------------------------------------------------- what a person sees: figures and the table, from the files alone

def note(summary, system):
    """The staggering index as a figure and the table say it."""
    index, interval = summary[system]["staggering"], summary[system]["staggering_ci"]
    return str(index) if isinstance(index, str) else f"{index:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def panel(table, summary, system, title, xlabel, theory=None):
    """One system's curves, as plots.dynamics takes them."""
    time = table["time"][(table["system"] == system) & (table["mode"] == 1)]
    return dict(title=title, xlabel=xlabel, time=time, strength=by_mode(table, "strength", system=system), note="index " + note(summary, system).split()[0],
                stderr=by_mode(table, "stderr", system=system), theory=theory and by_mode(table, "strength", system=theory))


def draw_linreg(config, folder, summary):
    """dynamics, controls, outer_loop and ood, from the CSV files in `folder`."""
    labels = [f"s = {s:g}" for s in config.singular_values]
    table = read_table(folder, "dynamics")
    plots.dynamics([panel(table, summary, "learner", "Learner (gradient descent)", "gradient steps", "learner_theory"),
                    panel(table, summary, "meta", "Meta-Learner (LSTM)", "trials"), panel(table, summary, "bayes", "Bayes-optimal", "trials")],
                   labels, folder / "dynamics")
    plots.dynamics([panel(table, summary, "learner", "aligned start", "gradient steps", "learner_theory"),
                    panel(table, summary, "shallow", "one layer only", "gradient steps", "shallow_theory")]
                   + [panel(table, summary, name, f"random start, {name}", "gradient steps") for name in ("sgd", "adam", "rmsprop")]
                   + [panel(table, summary, "muon", "random start, muon", "gradient steps", "muon_theory")],
                   labels, folder / "controls")
    performance = read_table(folder, "performance")
    prior, bayes = (performance["value"][performance["system"] == system].mean() for system in ("prior", "bayes"))
    table = read_table(folder, "outer_loop")
    captured = (prior - table["value"][table["mode"] == 1]) / (prior - bayes)
    plots.outer_loop(table["outer_step"][table["mode"] == 1], by_mode(table, "strength"), by_mode(table, "half_time"), captured, labels, folder / "outer_loop")
    table = read_table(folder, "ood")
    value = {system: table["value"][(table["system"] == system) & (table["mode"] == 1)] for system in ("prior", "meta", "bayes")}
    plots.ood_scales(np.array(config.scales), *(by_mode(table, "strength", system=system) for system in ("meta", "bayes")),
                     (value["prior"] - value["meta"]) / (value["prior"] - value["bayes"]), labels, folder / "ood")


def print_table(config, summary):
    """The table at the end of a run, in 60 columns for five modes, with what it says in words."""
    names = dict(learner="Learner (steps)", learner_theory="  closed form", shallow="  one layer", sgd="  random start", adam="  + adam",
                 rmsprop="  + rmsprop", muon="  + muon", meta="Meta-L. (trials)", bayes="Bayes (trials)")
    K = len(summary["bayes"]["half_times"])
    print("\nHalf-time of each mode, and staggering index (last / first)\n")
    print(" " * 17 + "".join(f"{k:5d}" for k in range(1, K + 1)) + "  index [95% interval]")
    for system, name in names.items():
        half = "".join(f"{'-':>5}" if isinstance(t, str) else f"{t:5.{0 if t >= 100 else 1}f}" for t in summary[system]["half_times"])
        print(f"{name:17.17}{half}  {note(summary, system)}")
    low, high = summary["captured_ci"]
    print(f"\nThe Learner's last mode takes {note(summary, 'learner').split()[0]} times as long as its first;"
          f"\nthe Meta-Learner's {note(summary, 'meta').split()[0]}, Bayes' {note(summary, 'bayes').split()[0]} times."
          f"\nThe Meta-Learner captures κ = {summary['captured']:.3f} [{low:.3f}, {high:.3f}] of what Bayes gains.")


# ---------------------------------------------------------------- command line

def run(config, folder, fresh=False):
    """Runs, resumes or, where it is complete, redraws one family's experiment in `folder`. Returns the summary."""
    config.check()
    config.device = resolve_device(config.device)
    settings = dict(family=type(config).__name__.lower()) | asdict(config)
    with held(folder):
        agree(folder, settings, fresh)
        if not (folder / "summary.json").exists():
            try:
                write_run(folder, *experiment(config, folder))
            except meta.UnusableCheckpoint as error:
                raise Mistake(f"--out: {folder} given, whose {error}, allowed: another folder, or --fresh to replace that run") from None
        summary = json.loads((folder / "summary.json").read_text())
        config.draw(folder, summary)
    print_table(config, summary)
    return summary


def resolve_device(name):
    """The one place where the device is chosen: "auto" is the first of cuda, mps, cpu that is there. Raises Mistake."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        return next(device for device, available in there.items() if available)
    if not there[name]:
        raise Mistake(f"--device: {name} given, allowed here: {', '.join(device for device, available in there.items() if available)}")
    return name


class OneLineParser(argparse.ArgumentParser):
    """argparse, with its errors in one line."""

    def error(self, message):
        raise Mistake(message.removeprefix("argument "))


def parse(arguments):
    """The command line: a config and the options that are not part of it."""
    parser = OneLineParser(prog="metadyn.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    families = parser.add_subparsers(dest="family", required=True, metavar="FAMILY", parser_class=OneLineParser)
    for name, cls in FAMILIES.items():
        sub = families.add_parser(name, help=cls.__doc__, description=cls.__doc__, argument_default=argparse.SUPPRESS)
        size = sub.add_mutually_exclusive_group()
        size.add_argument("--quick", action="store_true", help="a smoke run, in seconds")
        size.add_argument("--full", action="store_true", help="as near the originals as is known, in hours")
        sub.add_argument("--out", type=Path, default=Path("runs") / name, metavar="DIR", help=f"folder for the results (default: runs/{name})")
        sub.add_argument("--fresh", action="store_true", default=False, help="ignore an earlier run there")
        for f in fields(cls):
            default = getattr(cls(), f.name)
            several = isinstance(default, list)
            shown = " ".join(f"{v:g}" for v in default) if several else default
            sub.add_argument("--" + f.name.replace("_", "-"), type=type(default[0] if several else default), nargs="+" if several else None,
                             metavar="|".join(f.metadata["choices"] or ["X"]), help=f"{f.metadata['help']} (default: {shown})")
    given = vars(parser.parse_args(arguments))
    cls = FAMILIES[given.pop("family")]
    preset = cls.QUICK if given.pop("quick", False) else cls.FULL if given.pop("full", False) else {}
    out, fresh = given.pop("out"), given.pop("fresh")
    return cls(**preset | given), out, fresh


def main(arguments=None):
    """Runs the command line. Returns the exit status: 0, 1 for a failure, 2 for a user's mistake, 130 for Ctrl-C."""
    try:
        run(*parse(arguments))
        return 0
    except Mistake as mistake:
        print(f"metadyn.py: {mistake}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError) as error:
        print(f"metadyn.py: {error}; the last checkpoint is kept", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nmetadyn.py: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
