r"""metadyn: how Learners, Meta-Learners and Bayes-optimal inference learn the structure of a task.

    python metadyn.py linreg                 # the experiment; table and figures in runs/linreg
    python metadyn.py linreg --help          # every setting with its default
    python metadyn.py compare runs/linreg*   # finished runs, averaged over seeds

From Python or a notebook:

    results = metadyn.linreg(metadyn.LinReg(noise=0.2))               # arrays by name, no files
    results = metadyn.run(metadyn.LinReg.quick(noise=0.2))            # the same, saved and drawn
    print(metadyn.table(results))

This file holds the settings, the three experiments, the steps that they share, and the command
line. Reference: Rabinowitz 2019, arXiv 1905.01320. It leaves out sweeps and logging services.
"""
import signal

if __name__ == "__main__":               # Ctrl-C just ends: results and checkpoints appear whole
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import ast
import contextlib
import csv
import ctypes
import functools
import hashlib
import json
import math
import re
import sys
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch

import learners
import meta
import plots
import tasks

# ---------------------------------------------------------------- settings
POSITIVE = 1e-9                                           # a lower bound for what must not be 0

def setting(default, help, low=0, high=2 ** 31 - 1):
    """A field of settings: an int, float, str or tuple of floats, its help and its bounds, which
    allow 0 but nothing negative unless told."""
    return field(default=default, metadata=dict(help=help, low=low, high=high))

@dataclass
class Run:
    """The settings of all families. Raises ValueError for what is not allowed."""
    seed: int = setting(0, "seed of all random numbers")
    device: str = setting("auto", "auto, cpu, cuda or mps: where the Meta-Learner runs")
    hidden: int = setting(128, "units of the Meta-Learner's LSTM", low=1)
    layers: int = setting(1, "layers of the LSTM", low=1)
    outer_steps: int = setting(1000, "updates of the Meta-Learner's weights", low=1)
    batch: int = setting(128, "episodes in an outer step", low=1)
    input_gain: float = setting(1.0, "size of the LSTM's initial input weights")
    adam_lr: float = setting(0.01, "peak learning rate of AdamW", low=POSITIVE)
    muon_lr: float = setting(0.0, "peak learning rate of Muon for hidden matrices; 0: AdamW alone")
    trials: int = setting(20, "trials in an episode", low=2)
    eval_tasks: int = setting(16, "evaluation tasks, the same for every system", low=2)
    eval_episodes: int = setting(256, "episodes of each evaluation task", low=2)
    test_tasks: int = setting(4096, "held-out tasks on which the score is measured", low=2)

    QUICK = {}                                            # where --quick differs

    @classmethod
    def quick(cls, **changes):
        """The settings of a small version, with changes."""
        return cls(**cls.QUICK | changes)

    @classmethod
    def rules(cls):
        """Pairs of each field and what `setting` said of it, perhaps where it was defined first."""
        plain = setting(None, "", low=-math.inf)
        return [(each, each.metadata or Run.__dataclass_fields__.get(each.name, plain).metadata)
                for each in fields(cls)]

    def __post_init__(self):
        available_device(str(self.device))
        for each, said in self.rules():
            value, low, high = getattr(self, each.name), said["low"], said["high"]
            several = each.type is tuple
            numbers = np.array(value, ndmin=int(several))
            valid = numbers.ndim == several and numbers.size and (
                numbers.dtype.kind in ("iu" if each.type is int else "iuf"))    # whole, or any
            if each.type is not str and not (
                    valid and ((low <= numbers) & (numbers <= high)).all()):
                raise ValueError(f"{each.name} cannot be {value!r}; allowed is "
                                 f"{each.type.__name__} from {low} to {high}")
            setattr(self, each.name, tuple(map(float, numbers)) if several else each.type(value))

    def name(self):
        """The family and what differs from its defaults or from its quick version, whichever is
        nearer: "linreg-quick-noise0.2-seed1"."""
        def differs(base):
            return [f"-{name}{'_'.join(map(str, np.atleast_1d(value)))}" for name, value in
                    reversed(vars(self).items()) if value != base[name] and name != "device"]

        default = {each.name: each.default for each in fields(self)}
        words = [differs(default), ["-quick", *differs(default | self.QUICK)]]
        return self.experiment.__name__ + "".join(min(words, key=len))

def available_device(name):
    """The device of this name, or the one to use for "auto". Raises ValueError if it is absent."""
    there = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if name == "auto":                                    # mps has never been run: on request only
        return "cuda" if there["cuda"] else "cpu"
    if not there.get(name):
        raise ValueError(f"device: there is no {name} on this machine")
    return name

# ---------------------------------------------------------------- linear regression
GAINS = 0.01, 0.1, 0.3, 1.0, 3.0, 10.0                    # the Learner's dial, from rich to lazy

@dataclass
class LinReg(Run):
    """Linear regression: the singular modes of a linear map, after Saxe et al. 2013."""
    hidden: int = 256
    outer_steps: int = 6000
    batch: int = 64
    adam_lr: float = 0.008
    skew: float = setting(0.0, "how the variance of column k falls: as k^(-2 skew)", low=-1, high=1)
    singular_values: tuple = setting((1.1, 0.8, 0.6, 0.4, 0.2), "lengths of test modes", POSITIVE)
    noise: float = setting(0.1, "standard deviation of the noise on y")
    learner_repeats: int = setting(32, "repeats of the Learner for each task", low=1)
    learner_lr: float = setting(0.02, "step size of the Learner", low=POSITIVE)
    learner_steps: int = setting(1000, "gradient steps of the Learner", low=1)
    learner_hidden: int = setting(64, "hidden units of the Learner", low=1)
    init_std: float = setting(0.01, "the Learner's weights start at N(0, this^2)", low=POSITIVE)

    QUICK = dict(singular_values=(1.1, 0.4), trials=8, hidden=64, batch=32, outer_steps=2200,
                 adam_lr=0.02, learner_steps=600, learner_repeats=16)

def linreg(config, checkpoint=None):
    """The experiment on linear regression. Returns Results."""
    s = torch.tensor(sorted(config.singular_values, reverse=True), dtype=torch.float64)
    results = Results(config, modes=[f"s = {x:g}" for x in s.tolist()])
    distribution = tasks.LinearRegression(s.tolist(), config.noise, config.trials, config.skew)
    W = distribution.evaluation_tasks(config.eval_tasks, generator_for(config, "evaluation"))
    repeats = distribution.repeats(W, config.learner_repeats, generator_for(config, "repeats"))
    dim, width, lr, std = len(s), config.learner_hidden, config.learner_lr, config.init_std

    def add_learner(system, label, layers, gain=None, unit="steps", **online):
        """Trains a linear network and adds its law. With a gain c above 1, steps are c times
        smaller, and c of them count as one."""
        target, slower = repeats[:, :layers[0].shape[1]], max(1, gain or 0)
        steps = evenly_spaced(config.learner_steps)
        maps = learners.linear_network(target, layers, lr / slower, steps, **online)
        # one layer has no gain; its time constant is 1 / lr steps for every mode
        law = learners.gain_half_times(s, gain) if gain else torch.full_like(s, math.log(2))
        results.add(system, label, unit, np.divide(steps, slower),
                    distribution.strength(maps, target), theory_half_times=law / lr,
                    gain=gain if gain and not online else math.nan)

    results.log("Learners: a small start, torch's default start, one layer, online")
    for system, label, widths, start in (
            ("learner", "Learner", [dim, width, dim], std),
            ("default_start", "torch's default start", [dim, width, dim], None),
            ("one_layer", "One layer", [dim, dim], std),
            ("online", "Learner, online", [dim, width, dim], std)):
        generator = generator_for(config, "learners")
        layers = learners.init_layers(repeats.shape[:2], widths, generator, start)
        gain = learners.expected_gain(dim, width, start) if len(layers) == 2 else None
        online = dict(unit="trials", online=True, noise=config.noise, generator=generator)
        add_learner(system, label, layers, gain, **online if system == "online" else {})
        results[f"{system}/column"] = distribution.columns(repeats).numpy()

    results.log("the Learner's dial: layers with a product of zero and a given gain")
    for gain in GAINS:                                    # all repeats are alike, so one is enough
        layers = learners.gain_layers((len(W), 1), dim, max(width, 2 * dim), gain)
        add_learner(f"gain_{gain:g}", f"Gain {gain:g}", layers, gain)

    episodes = measure_both_loops(
        results, distribution, W, meta.MetaLearner, tasks.Bayes, checkpoint)
    # gradient descent on t trials, from a small start, converges to the least-squares map of least
    # norm: that of a Bayes who believes that there is neither noise nor skew
    converged = tasks.Bayes(tasks.LinearRegression(s.tolist(), 0.0, config.trials))
    one_step = tasks.OneStep(distribution)
    for system, label, predictor in (("one_step", "One gradient step", one_step),
                                     ("converged", "Learner, converged", converged)):
        strength, _ = distribution.inner_loop(predictor, *episodes)
        results.add(system, label, "trials", results["bayes/time"], strength)
    results["one_step/theory_by_column"] = one_step.half_times().numpy()
    for system in "meta", "bayes", "one_step", "converged":
        results[f"{system}/column"] = distribution.columns(episodes[0]).numpy()
    return results

LinReg.experiment = linreg

# ---------------------------------------------------------------- nonlinear regression
CONVERGED = 300              # gradient steps: twice as many move no half-time by more than 3%

@dataclass
class NonlinReg(Run):
    """Nonlinear regression: the frequencies of a function, after Rahaman et al. 2018."""
    layers: int = 2
    outer_steps: int = 2800
    input_gain: float = 3.0
    adam_lr: float = 0.005
    muon_lr: float = 0.08
    trials: int = 40
    eval_tasks: int = 8
    skew: float = setting(0.0, "how the variance of wave k falls: as k^(-2 skew)", -1, 1)
    n_frequencies: int = setting(5, "the task distribution has frequencies 1 to this", low=2)
    noise: float = setting(0.1, "standard deviation of the noise on y")
    learner_repeats: int = setting(16, "initializations of the Learner for each task", low=1)
    learner_lr: float = setting(3e-3, "Adam's learning rate in the Learner", low=POSITIVE)
    learner_steps: int = setting(300, "gradient steps of the Learner", low=1)
    online_steps: int = setting(4000, "trials of the online Learner", low=1)
    converged_episodes: int = setting(16, "episodes of each task for the converged Learner", low=1)

    QUICK = dict(n_frequencies=2, trials=15, hidden=64, layers=1, batch=32, outer_steps=2500,
                 muon_lr=0.0, adam_lr=0.02, learner_steps=200, learner_repeats=4, eval_tasks=6,
                 online_steps=1000, converged_episodes=4)

def nonlinreg(config, checkpoint=None):
    """The experiment on nonlinear regression. Returns Results."""
    band = torch.arange(1, config.n_frequencies + 1)
    results = Results(config, modes=[f"k = {k}" for k in band.tolist()])
    distribution = tasks.FourierRegression(band, config.noise, config.trials, config.skew)
    W = distribution.evaluation_tasks(config.eval_tasks, generator_for(config, "evaluation"))
    points, lr, repeats = max(64, 4 * len(band)), config.learner_lr, config.learner_repeats
    x = torch.arange(points)[:, None] / points
    circle, features = distribution.encode(x), distribution.features(x)
    y = (features @ W.mT).mT.expand(-1, repeats, -1)                        # (N, E, G)

    results.log("Learners: a ReLU network on the circle and on all features, a layer on features/k")
    steps = evenly_spaced(config.learner_steps, 200)
    # without layers, at step size 0.1, frequency k has the time constant 10 k^2
    linear = dict(lr=0.1, eval_steps=evenly_spaced(32 * len(band) ** 2, 200), layers=0,
                  optimizer=torch.optim.SGD)
    for system, label, inputs, how in (
            ("learner", "Learner", circle, {}), ("fourier_inputs", "Fourier inputs", features, {}),
            ("scaled_features", "One layer, features/k", features / band.repeat(2), linear)):
        how = dict(lr=lr, eval_steps=steps) | how
        f = learners.relu_network(inputs.expand(*y.shape, -1), y, **how,
                                  generator=generator_for(config, "learners"))
        results.add(system, label, "steps", how["eval_steps"], distribution.waves(f, x, W))
    results["scaled_features/theory_half_times"] = 10 * math.log(2) * band.numpy() ** 2

    results.log("online Learner: the ReLU network with one fresh noisy trial a step")
    steps, generator = evenly_spaced(config.online_steps), generator_for(config, "online")
    stream = tasks.FourierRegression(band, config.noise, config.online_steps)
    _, _, seen, answers = stream.evaluation_episodes(W, repeats, generator)
    # steps on single noisy trials need a smaller rate than steps on all points
    f = learners.relu_network(distribution.encode(seen), answers[..., 0], lr / 3, steps, at=circle,
                              online=True, generator=generator)
    results.add("online", "Learner, online", "trials", steps, distribution.waves(f, x, W))

    _, _, seen, answers = measure_both_loops(
        results, distribution, W, meta.MetaLearner, tasks.Bayes, checkpoint)

    results.log("Learner trained to convergence on the first t trials, for each t")
    trials, few = log_spaced(config.trials, 8), config.converged_episodes
    seen, answers = distribution.encode(seen[:, :few]), answers[:, :few, :, 0]
    generator = generator_for(config, "learners")
    f = [learners.relu_network(seen[..., :t, :], answers[..., :t], lr, [CONVERGED], at=circle,
                               generator=generator) for t in trials]
    results.add("converged", "Learner, converged", "trials", trials,
                distribution.waves(torch.cat(f), x, W))
    return results

NonlinReg.experiment = nonlinreg

# ---------------------------------------------------------------- bandits
@dataclass
class Bandit(Run):
    """Contextual bandits: the correct action in each context, after Schaul et al. 2019."""
    hidden: int = 96
    outer_steps: int = 1200
    input_gain: float = 5.0
    adam_lr: float = 0.02
    trials: int = 60
    eval_tasks: int = 64
    contexts: int = setting(5, "contexts", low=2)
    actions: int = setting(5, "actions in each context, at least contexts - 1", low=2)
    tied: int = setting(1, "2: contexts 1 and 2 share their answer in all tasks", low=1, high=2)
    learner_repeats: int = setting(32, "repeats of the Learner for each task", low=1)
    learner_lr: float = setting(0.5, "step size of the Learner", low=POSITIVE)
    learner_steps: int = setting(1000, "gradient steps of the Learner", low=1)

    QUICK = dict(contexts=4, actions=4, trials=24, hidden=64, outer_steps=500, adam_lr=0.03,
                 learner_steps=500, learner_repeats=16, eval_tasks=32, eval_episodes=128)

    def __post_init__(self):
        super().__post_init__()
        tasks.ContextualBandit(self.contexts, self.actions, self.trials, self.tied)     # checks

def bandit(config, checkpoint=None):
    """The experiment on contextual bandits. Returns Results."""
    results = Results(config, modes=[f"context {c + 1}" for c in range(config.contexts)])
    distribution = tasks.ContextualBandit(
        config.contexts, config.actions, config.trials, config.tied)
    correct = distribution.evaluation_tasks(config.eval_tasks, generator_for(config, "evaluation"))

    results.log("Learners: shared bias, a bias for each context, and online (one trial a step)")
    steps = log_spaced(config.learner_steps, 120)
    for system, label, unit, shared in (("learner", "Learner", "steps", True),
                                        ("own_biases", "Own biases", "steps", False),
                                        ("online", "Learner, online", "trials", True)):
        generator = generator_for(config, "learners")
        permuted = distribution.repeats(correct, config.learner_repeats, generator)
        logits = 0.1 * torch.randn(*permuted.shape, config.actions, generator=generator)
        J = learners.policy_gradient(permuted, logits, config.learner_lr, steps, shared,
                                     online=system == "online", generator=generator)
        results.add(system, label, unit, steps, distribution.strength(J))

    measure_both_loops(
        results, distribution, correct, meta.MetaAgent, tasks.BayesAgent, checkpoint)
    results["bayes/theory"] = distribution.strength(distribution.bayes_curve()).numpy()
    return results

Bandit.experiment = bandit

# ---------------------------------------------------------------- steps that experiments share
def generator_for(config, purpose):
    """A random generator for each purpose, so what one part draws never shifts another. Its seed is
    a digest of the run's seed and the purpose: the 32 bits that torch's generator takes."""
    digest = hashlib.sha256(f"{config.seed} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))

def evenly_spaced(last, count=400):
    """About `count` evenly spaced steps from 0 to `last`, both included."""
    return [*range(0, last, max(1, last // count)), last]

def log_spaced(last, count):
    """0, and `count` whole numbers up to `last`, evenly spaced in their logarithm; none twice."""
    return sorted({0, *np.geomspace(1, last, count).round().astype(int).tolist()})

class Results(dict):
    """What a run measured: NumPy arrays by name.

    SYSTEM/time (R,), SYSTEM/strength (R, N, E, K)     times, tasks, repeats of a task, modes
    SYSTEM/label (2,), SYSTEM/column (N, E, K)         its name and unit of time; where each mode is
    SYSTEM/theory (R, K), theory_half_times (K,)       its closed form; theory_by_column; gain ()
    SYSTEM/excess (n, T), SYSTEM/r_squared (T + 1,)    loss on new tasks; R^2 of the probe
    modes (K,)                                         their names
    """
    def __init__(self, config, **arrays):
        super().__init__({name: np.asarray(values) for name, values in arrays.items()})
        self.config, self.begun = config, time.perf_counter()

    def __repr__(self):
        return f"Results of {self.config.name()}: {', '.join(self)}"

    def log(self, words):
        """Prints what happens now, and how many seconds the run has taken so far."""
        print(f"{time.perf_counter() - self.begun:6.0f} s  {words}", file=sys.stderr, flush=True)

    def add(self, system, label, unit, time, strength, **more):
        """Adds a system's strengths (R, N, E, K) at times (R,), its label and unit of time, and
        more arrays, such as the column in which each mode stood."""
        arrays = dict(label=(label, unit), time=time, strength=strength, **more)
        self.update({f"{system}/{name}": np.asarray(values) for name, values in arrays.items()})

    def systems(self):
        """The names of all systems, in the order in which they were measured."""
        return [name.removesuffix("/time") for name in self if name.endswith("/time")]

    def tensors(self, system, by_column=False):
        """A system's strengths (R, N, E, K) and times (R,), for the measures of learners.py, by
        mode or by column. Raises ValueError for an unknown system."""
        if system not in self.systems():
            raise ValueError(f"{system!r} is not one of {', '.join(self.systems())}")
        strength, time = (torch.from_numpy(self[f"{system}/{name}"])
                          for name in ("strength", "time"))
        if by_column:
            column = torch.from_numpy(self[f"{system}/column"])
            strength = strength.gather(-1, column.argsort(-1).expand_as(strength))
        return strength, time

    @functools.cached_property
    def summary(self):
        """The numbers of a run as nested dicts, for summary.json; see `learners.describe`."""
        systems = {system: learners.describe(*self.tensors(system)) for system in self.systems()}
        for system, row in systems.items():
            if f"{system}/column" in self:
                row["by_column"] = learners.describe(*self.tensors(system, True))
        both = self.tensors("meta")[0], *self.tensors("bayes")
        systems["meta"]["follows_bayes"] = learners.half_time_correlation(*both).tolist()
        excess = [torch.from_numpy(self[f"{name}/excess"]) for name in ("none", "meta", "bayes")]
        score, *score_ci = learners.normalized_score(*excess)
        last, (least, low, _) = excess[1][:, -1].mean().item(), learners.interval(excess[2][:, -1])
        return dict(systems=systems, score=score, score_ci=score_ci,
                    r_squared=self["meta/r_squared"].tolist(),
                    last_excess=last / least if low > 1e-6 else math.nan)       # Bayes errs at all

def measure_both_loops(results, distribution, W, network, optimum, checkpoint=None):
    """Trains a Meta-Learner, a network like meta.MetaLearner. Then measures what it and an optimum
    like tasks.Bayes learn within the same episodes of the tasks W, and returns these episodes."""
    config, device = results.config, available_device(results.config.device)
    model = network(distribution, config.hidden, config.layers,
                    generator_for(config, "initialization"), input_gain=config.input_gain)
    optimizers = meta.default_optimizers(model.to(device), config.adam_lr, config.muon_lr)
    results.log(f"outer loop, on {device}")
    meta.train(model, distribution, config.outer_steps, config.batch, optimizers=optimizers,
               generator=generator_for(config, "tasks"), checkpoint=checkpoint, report=results.log)

    results.log("what the Meta-Learner and Bayes learn within the same episodes")
    episodes = distribution.evaluation_episodes(
        W, config.eval_episodes, generator_for(config, "probe"))
    generator = generator_for(config, "test")
    test = distribution.episodes(distribution.sample(config.test_tasks, generator), generator)
    results["none/excess"] = distribution.never_learns(*test).numpy()
    for system, label, predictor in (("meta", "Meta-Learner", model),
                                     ("bayes", "Bayes", optimum(distribution))):
        strength, r_squared = distribution.inner_loop(predictor, *episodes)
        results.add(system, label, "trials", range(config.trials + 1), strength,
                    r_squared=r_squared, excess=distribution.excess(predictor, *test))
    return episodes

# ---------------------------------------------------------------- numbers and figures of a run
def format_number(value, lower_bound=False):
    """A number with three digits; "-" if it is undefined or a mode is not reached."""
    if not math.isfinite(value):
        return "-"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{'>' * lower_bound}{round(value, digits) + 0:.{digits}f}"      # + 0: -0.00 is 0.00

def cell(row, measure):
    """One measure of `learners.describe` as text, with ">" before a lower bound."""
    bound = measure.replace("staggering", "lower_bound").replace("within", "within_lower_bound")
    return format_number(row.get(measure, math.nan), bound != measure and row.get(bound, False))

def table(results):
    """The most important numbers of a run as text."""
    summary, K = results.summary, len(results["modes"])
    lines = [f"""Half-time of each mode; index: latest over earliest, of averages over repeats
[+- 2 standard errors], the same at strength 0.9, by column and within a repeat; rank correlation
between repeats. ">" marks a lower bound, "-" what is not reached or undefined: an index of a single
mode, or a multiple of an excess of Bayes that is not measurably above 0.\n
{'':30}{''.join(f'{k + 1:6}' for k in range(K))}  {'index':20}at 0.9 column within rank c."""]
    for system, row in summary["systems"].items():
        label, half_times = results[f"{system}/label"], map(format_number, row["half_times"])
        low, high = map(format_number, row["staggering_ci"])
        index, *cells = (cell(row, measure) for measure in (
            "staggering", "late_staggering", "within", "rank_correlation"))
        cells.insert(1, cell(row.get("by_column", {}), "staggering"))
        lines.append(f"{f'{label[0]} ({label[1]})':30}{''.join(f'{t:>6}' for t in half_times)}  "
                     f"{f'{index} [{low}, {high}]':19}{''.join(f'{text:>7}' for text in cells)}")
    score, low, high = summary["score"], *summary["score_ci"]
    excess, r_squared = map(format_number, (summary["last_excess"], summary["r_squared"][-1]))
    lines.append(f"\nScore {score:.3f} [{low:.3f}, {high:.3f}]: 0 never learns, 1 is Bayes. At the "
                 f"last trial,\nthe Meta-Learner has an excess {excess} times that of Bayes, and "
                 f"its probe an R^2 of {r_squared}.")
    if not score > 0.8:
        lines.append("Warning: the score is below 0.8. An unfinished Meta-Learner has an order of "
                     "its own;\ntry more outer steps, or smaller learning rates.")
    return "\n".join(lines)

def panel(results, system, by_column=False, repeat=None):
    """A panel for plots.dynamics: of all tasks and repeats, or of one repeat of the first task.
    plots.dynamics([panel]) is a slide."""
    strength, time = results.tensors(system, by_column)
    if repeat is not None:
        strength = strength[:, :1, [repeat]]
    label, unit = results[f"{system}/label"]
    row, by_task = learners.describe(strength, time), strength.mean(2).movedim(1, 0)
    told = ", by column" * by_column + ("" if repeat is None else f", repeat {repeat + 1}")
    theory = "theory_by_column" if by_column else "theory_half_times"
    scale = "log" if 2 * time[1] < time[-1] - time[-2] else "linear"
    return dict(title=f"{label}{told}\nindex {cell(row, 'staggering')}", time=time.numpy(),
                strength=by_task.mean(0).numpy(), stderr=learners.standard_error(by_task).numpy(),
                half_times=row["half_times"],
                labels=[f"column {k + 1}" for k in range(strength.shape[-1])] if by_column
                else results["modes"],
                theory=None if by_column else results.get(f"{system}/theory"),
                theory_half_times=results.get(f"{system}/{theory}"),
                axes=dict(xlabel=unit, xscale=scale))

def figures(results):
    """All figures of a run by name."""
    systems, caption = results.systems(), results.config.name()
    compared = [system for system in ("learner", "meta", "bayes") if system in systems]
    panels = dict(dynamics=[panel(results, system) for system in compared],
                  controls=[panel(results, system) for system in systems if system not in compared],
                  repeats=[panel(results, system, repeat=repeat)
                           for system in compared
                           for repeat in [0, 1][:results[f"{system}/strength"].shape[2]] + [None]])
    if "learner/column" in results:                       # the thesis: whose order is it?
        panels["order"] = [panel(results, system, by_column) for by_column in (False, True)
                           for system in compared] + [panel(results, "one_step", True)]
    drawn = {name: plots.dynamics(those, caption) for name, those in panels.items() if those}
    if "learner/gain" in results:
        drawn["gain"] = plots.lines([gain_panel(results)], caption)
    return drawn

def gain_panel(results):
    """The Learner's dial: its index against its gain, in theory and measured; no lower bounds."""
    s, gains = torch.tensor(results.config.singular_values), torch.logspace(-3, 2, 100)
    law = learners.gain_half_times(s, gains[:, None])                       # (100, K)
    curves = [dict(x=gains, y=law.amax(-1) / law.amin(-1), label="theory", color="black", ls="--")]
    for label, marker, designed in (("layers with a product of zero", "o", True),
                                    ("random starts, small and torch's default", "D", False)):
        rows = {f"{system}/gain": row for system, row in results.summary["systems"].items()
                if f"{system}/gain" in results and not row["lower_bound"]
                and system.startswith("gain_") == designed}
        index = np.array([row["staggering"] for row in rows.values()])
        interval = np.reshape([row["staggering_ci"] for row in rows.values()], (-1, 2)).T
        curves.append(dict(x=[results[gain] for gain in rows], y=index, yerr=abs(interval - index),
                           label=label, ls="", ms=10, marker=marker, color=plots.shade(designed)))
    return dict(curves=curves, axes=dict(title="The larger the initial gain, the smaller the index",
                xlabel="initial gain $c_0$", ylabel="staggering index", xscale="log"))

# ---------------------------------------------------------------- the folder of a run
FILES = ("results.npz", "checkpoint.pt", "summary.json", "dynamics.png", "controls.png",
         "repeats.png", "order.png", "gain.png")          # beside config.json

def run(config, folder=None, fresh=False):
    """Runs or resumes an experiment in a folder (default: runs/ and the name of the config); if it
    is complete, only draws it again. Prints the table and returns Results. Raises ValueError or
    OSError if the folder cannot hold this run, and FloatingPointError if learning diverges."""
    folder = Path(folder or f"runs/{config.name()}")
    open_folder(config, folder, fresh)
    if (folder / "results.npz").exists():
        results = load(folder)
        results.log(f"{folder} is complete: drawing the figures again")
    else:
        results = config.experiment(folder / "checkpoint.pt")
        np.savez(folder / "unfinished-results.npz", **results)
        (folder / "unfinished-results.npz").replace(folder / "results.npz")
    write_json(folder / "summary.json", results.summary)
    for name, figure in figures(results).items():
        figure.savefig(folder / f"{name}.png")
    results.log("done")
    print(f"\n{table(results)}\nFigures and tables: {folder}", flush=True)
    return results

def open_folder(config, folder, fresh):
    """Makes a folder that of a run: one that is empty or new, or that run's already. With `fresh`,
    it may hold another run of metadyn, which is removed. What metadyn did not write is never
    touched."""
    folder.mkdir(parents=True, exist_ok=True)
    empty = all(file.name == "unfinished-config.json" for file in folder.iterdir())
    if empty or fresh and read_config(folder):
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        write_json(folder / "config.json", identity(config))
    differs = differences(config, read_config(folder))
    if (folder / "results.npz").exists():                 # a finished run may be of other code
        differs = [name for name in differs if not name.endswith(".py")]
    if differs:
        raise ValueError(f"{folder} holds another run: {', '.join(differs)} changed since; choose "
                         "another folder, or replace that run with --fresh (fresh=True)")

def identity(config):
    """What makes the numbers of a run: its family, its settings but the device, and a digest of
    each file of code, comments and docstrings aside."""
    digests = {}
    for name in "tasks", "learners", "meta", __name__, type(config).__module__:
        path = getattr(sys.modules.get(name), "__file__", None)             # a notebook has none
        if path:
            tree = ast.parse(Path(path).read_text("utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                    node.value = ast.Constant(None)       # a docstring
            digests[Path(path).name] = hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]
    return dict(vars(config), family=config.experiment.__name__, device="auto", **digests)

def differences(config, there):
    """What differs between the identity of a config and a config.json: names of settings, files."""
    here = json.loads(json.dumps(identity(config)))       # lists for tuples, as in the file
    return [name for name, value in here.items() if there.get(name) != value]

def read_config(folder):
    """What config.json of a run says. Raises ValueError if there is none of ours."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        there = json.loads(Path(folder, "config.json").read_text("utf-8"))
        if {"family", "seed", "learners.py"} <= set(there):
            return there
    raise ValueError(f"{folder} holds no run of this metadyn; a new one needs an empty or new "
                     "folder")

def families():
    """The families by name; of those defined twice, as in a notebook, the later one."""
    return {cls.experiment.__name__: cls for cls in Run.__subclasses__()
            if hasattr(cls, "experiment")}

def load(folder):
    """The Results of a finished run, with a warning if the code has changed since. Raises
    ValueError if there is none."""
    there, path = read_config(folder), Path(folder, "results.npz")
    try:
        family = families()[there["family"]]
        config = family(**{each.name: there[each.name] for each in fields(family)})
        with np.load(path) as arrays:
            results = Results(config, **arrays)
        assert results.summary                            # that of an older version may lack arrays
    except Exception as error:                            # zipfile and numpy raise many kinds
        raise ValueError(f"{path} is missing, damaged or of an unknown family: {error}") from error
    if changed := differences(config, there):
        print(f"Warning: {', '.join(changed)} changed since {folder} was run; --fresh runs it "
              "again", file=sys.stderr)
    return results

def write_json(path, values):
    """Writes JSON atomically, with null for inf and nan."""
    values = json.loads(json.dumps(values), parse_constant=lambda constant: None)
    unfinished = path.with_name(f"unfinished-{path.name}")
    unfinished.write_text(json.dumps(values, indent=1), encoding="utf-8")
    unfinished.replace(path)

# ---------------------------------------------------------------- the command line
def flatten(values, path=""):
    """Nested dicts and lists as one dict: {"systems/meta/half_times/1": 3.2, ...}."""
    if isinstance(values, list):
        values = dict(enumerate(values, 1))
    if not isinstance(values, dict):
        return {path.removeprefix("/"): float(values)}
    return {name: value for key, part in values.items()
            for name, value in flatten(part, f"{path}/{key}").items()}

def compare(folders, out=None):
    """Mean and standard deviation over seeds of every number of finished runs, in out/overview.csv,
    and half-times in out/dials.png. Returns the most important numbers as text. Raises ValueError
    for a folder without a finished run, and if a file of another kind would be overwritten."""
    runs, rows, lines = {}, [["run", "number", "mean", "sd", "seeds", "of each seed"]], []
    for results in map(load, folders):
        name = replace(results.config, seed=0).name()
        runs.setdefault(name, {})[results.config.seed] = results.summary
    for name, summaries in runs.items():
        numbers, seeds = [flatten(summary) for summary in summaries.values()], [*summaries]
        for number in numbers[0]:
            values = [each.get(number, math.nan) for each in numbers]
            defined = len(values) > 1 and np.isfinite(values).all()
            mean, sd = np.mean(values).item(), np.std(values, ddof=1) if defined else math.nan
            rows.append([name, number, mean, sd, *(" ".join(map(str, x)) for x in (seeds, values))])
            if re.fullmatch("score|systems/(learner|meta|bayes)/(staggering|rank_corr.*n)", number):
                bound = number.replace("staggering", "lower_bound")
                unsure = bound != number and any(each[bound] for each in numbers) and mean > 0
                lines.append(f"{name:30} {number:34} {'>' * unsure}{mean:.3f} +- {sd:.3f}")
    if out:
        path, dials = Path(out, "overview.csv"), Path(out, "dials.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        ours = path.exists() and path.read_text("utf-8").startswith("run,number,mean,sd")
        if not ours and (path.exists() or dials.exists()):
            raise ValueError(f"{out} holds an overview.csv or dials.png that is not of metadyn")
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        plots.lines(dial_panels(runs)).savefig(dials)
    return "\n".join(lines)

def dial_panels(runs):
    """Mean half-times of Meta-Learner and Bayes, by column where there are columns: a panel for
    each family."""
    panels = {}
    for i, (name, summaries) in enumerate(runs.items()):
        family = panels.setdefault(name.split("-")[0], dict(curves=[], axes=dict(
            title=name.split("-")[0], xlabel="column or mode", ylabel="half-time (trials)")))
        for system, label, style in ("bayes", "Bayes", "--"), ("meta", "Meta-Learner", "-"):
            rows = [summary["systems"][system] for summary in summaries.values()]
            y = np.mean([row.get("by_column", row)["half_times"] for row in rows], 0)
            family["curves"].append(dict(
                x=range(1, len(y) + 1), y=y, label=f"{label}, {name}", ls=style, marker="o", ms=5,
                color=plots.shade(i / len(runs))))
    return list(panels.values())

def make_parser():
    """The command line: a command for each family, with an option for each of its settings."""
    parser = argparse.ArgumentParser(prog="metadyn.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, cls in families().items():
        sub = commands.add_parser(name, help=cls.__doc__, description=cls.__doc__,
                                  allow_abbrev=False)
        sub.set_defaults(settings=cls)
        sub.add_argument("--quick", action="store_true", help="a small version, in 20 seconds")
        sub.add_argument("--fresh", action="store_true", help="replace an earlier run")
        sub.add_argument("--out", help="folder of the run (default: runs/ and what is not default)")
        for each, said in cls.rules():
            about = f"{said['help']} (default: {each.default}"
            about += f"; quick: {cls.QUICK[each.name]})" if each.name in cls.QUICK else ")"
            several = dict(nargs="+", type=float) if each.type is tuple else dict(type=each.type)
            sub.add_argument("--" + each.name.replace("_", "-"), default=argparse.SUPPRESS,
                             metavar="X", help=about, **several)
    sub = commands.add_parser("compare", help="average finished runs over seeds")
    sub.add_argument("folders", nargs="+", metavar="FOLDER", help="folders of finished runs")
    sub.add_argument("--out", help="folder of overview.csv, which holds every number")
    return parser

def main(words=None):
    """Runs a command line. A mistake by the user exits with argparse's error and status 2, and a
    failure with one sentence and status 1."""
    parser = make_parser()
    options = vars(parser.parse_args(words))
    command, folder = options.pop("command"), options.pop("out")
    try:
        if command == "compare":
            return print(compare(options["folders"], folder))
        settings, quick, fresh = map(options.pop, ("settings", "quick", "fresh"))
        config = (settings.quick if quick else settings)(**options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if quick:
        torch.set_num_threads(1)                          # as fast as two, and fair to neighbours
    torch.backends.cudnn.allow_tf32 = False               # float32 in an LSTM, as everywhere else
    # glibc returns large blocks to the system and fetches them again at every outer step, which
    # can take half of its time: ask it to keep them, where this C library is glibc
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(-4, 0)                  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, -1)                 # M_TRIM_THRESHOLD
    try:
        run(config, folder, fresh)
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise                                         # a mistake of ours
        parser.exit(1, f"\nmetadyn.py: {error}\n")

if __name__ == "__main__":
    main()
