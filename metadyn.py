r"""metadyn: how structure is learned, by Learners, Meta-Learners and Bayes-optimal inference.

    python metadyn.py linreg                 # the experiment; pictures and table in runs/linreg
    python metadyn.py linreg --quick         # a small task of the same kind, in half a minute
    python metadyn.py linreg --help          # every setting with its default and unit
    python metadyn.py all --seeds 5          # three families, each over five seeds; an overview

and from Python, with the settings as arguments:

    results = metadyn.run("linreg", quick=True, out="runs/quick")
    time, strength, stderr = results.curve("meta")       # (R,), (R, K), (R, K), ready to plot

In this file: settings; `linreg`, `nonlinreg`, `bandit`, the three experiments, each to be read
straight down; the steps they share; the numbers made of their arrays; files; the command line.
Reproduces Rabinowitz 2019, arXiv 1905.01320. Left out on purpose: sweeps, logging services.
"""
import argparse
import csv
import io
import json
import math
import sys
import time
import typing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch

import learners
import meta
import plots
import tasks


# ---------------------------------------------------------------- settings

def option(default, help, low=0, choices=None):
    """A setting: its default, help with unit, and what is allowed: numbers from low, or choices."""
    rules = dict(help=help, low=low, choices=choices)
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=rules)
    return field(default=default, metadata=rules)


TINY = 1e-9                                               # "more than 0"


@dataclass
class Config:
    """Settings that all families share."""
    seed: int = option(0, "seed of all random streams")
    device: str = option("auto", "of the Meta-Learner", choices=["auto", "cpu", "cuda", "mps"])
    core: str = option("lstm", "the Meta-Learner's core", choices=["lstm", "attention"])
    hidden: int = option(128, "units of the Meta-Learner's core", 1)
    layers: int = option(2, "layers of the core", 1)
    encoder: int = option(0, "ReLU layers before the core")
    decoder: int = option(1, "ReLU layers after the core")
    batch: int = option(128, "episodes in an outer step", 1)
    outer_steps: int = option(4200, "updates of the Meta-Learner's weights", 1)
    outer_optimizer: str = option("muon", "optimizer of the outer loop", choices=["muon", "adam"])
    muon_lr: float = option(0.05, "peak learning rate of Muon, on the core's matrices", TINY)
    adam_lr: float = option(0.0, "peak rate of Adam (0: 0.02 beside Muon in an LSTM, else 0.003)")
    eval_tasks: int = option(16, "evaluation tasks, the same for every system", 2)
    eval_episodes: int = option(1024, "episodes of each evaluation task", 2)
    fresh_tasks: int = option(4096, "tasks drawn from the prior to measure κ", 2)


@dataclass
class Linreg(Config):
    """Linear regression: the singular modes of a linear map."""
    dim: int = option(5, "dimension of x and of y", 1)
    singular_values: list[float] = option([1.6, 1.2, 0.9, 0.6, 0.3], "of evaluation tasks", TINY)
    noise: float = option(0.1, "standard deviation of the noise on y")
    trials: int = option(20, "trials in an episode", 2)
    learner_lr: float = option(0.01, "the Learner's step size (1 / tau)", TINY)
    learner_steps: int = option(3000, "the Learner's gradient steps", 1)
    learner_scale: float = option(1e-3, "strength of each mode in the map at the start", TINY)
    learner_starts: int = option(8, "random starts of each task", 1)
    clock_tasks: int = option(4, "tasks of the Learner whose clock is trials", 1)
    clock_episodes: int = option(256, "episodes of each of them", 2)
    clock_steps: int = option(400, "its gradient steps for each number of trials", 1)
    scales: list[float] = option([0.25, 0.5, 1, 2, 4, 8], "of spectra out of distribution", TINY)


@dataclass
class Nonlinreg(Config):
    """Nonlinear regression: the frequencies of a function on the circle."""
    frequencies: int = option(5, "how many frequencies: the prior has 1 ... K", 2)
    noise: float = option(0.1, "standard deviation of the noise on y")
    trials: int = option(40, "trials in an episode", 2)
    encoder: int = option(1, "ReLU layers before the core")
    muon_lr: float = option(0.08, "peak learning rate of Muon, on the core's matrices", TINY)
    outer_steps: int = option(3000, "updates of the Meta-Learner's weights", 1)
    bandpass_steps: int = option(900, "updates of the second one's, of the upper half band", 1)
    eval_tasks: int = option(8, "evaluation tasks, the same for every system", 2)
    learner_lr: float = option(1e-3, "the Learner's learning rate (Adam)", TINY)
    learner_steps: int = option(1000, "the Learner's gradient steps", 1)
    learner_hidden: int = option(128, "units in each of the Learner's layers", 1)
    learner_layers: int = option(4, "the Learner's hidden layers", 1)
    learner_grid: int = option(64, "points on the circle that the Learner sees at every step", 3)
    learner_starts: int = option(4, "random starts of each task", 1)
    clock_tasks: int = option(4, "tasks of the Learner whose clock is trials", 1)
    clock_episodes: int = option(4, "episodes of each of them", 2)
    clock_steps: int = option(600, "its gradient steps for each number of trials", 1)


@dataclass
class Bandit(Config):
    """Contextual bandits: the correct action in each context."""
    contexts: int = option(5, "contexts", 1)
    actions: int = option(5, "actions in each context", 2)
    trials: int = option(60, "trials in an episode", 2)
    context_rates: list[float] = option([], "of contexts out of distribution (default: halving)")
    hidden: int = option(96, "units of the Meta-Learner's core", 1)
    layers: int = option(1, "layers of the core", 1)
    muon_lr: float = option(0.1, "peak learning rate of Muon, on the core's matrices", TINY)
    adam_lr: float = option(0.03, "peak learning rate of Adam", TINY)
    outer_steps: int = option(900, "updates of the Meta-Learner's weights", 1)
    entropy: float = option(0.02, "weight of the entropy bonus at first, falling to zero")
    learner_lr: float = option(0.5, "the Learner's step size", TINY)
    learner_steps: int = option(2000, "the Learner's gradient steps, and trials online", 2)
    learner_starts: int = option(64, "random starts of each task", 1)
    learner_sd: float = option(0.1, "standard deviation of the first logits (near-uniform)")
    learner_spread: float = option(1.0, "the same of the spread-out start")
    scaling: list[int] = option([2, 3, 5, 8], "numbers of contexts, for the time to learn", 1)


QUICK = dict(
    linreg=dict(dim=2, singular_values=[1.4, 0.5], trials=8, hidden=48, layers=1, batch=64,
                outer_steps=1000, adam_lr=0.03, learner_steps=1500, clock_episodes=64),
    nonlinreg=dict(frequencies=2, trials=15, hidden=48, layers=1, batch=64, outer_steps=900,
                   bandpass_steps=300, muon_lr=0.1, adam_lr=0.03,
                   eval_episodes=256, learner_steps=400, learner_lr=0.002, learner_starts=2,
                   learner_hidden=64,
                   clock_steps=300),
    bandit=dict(contexts=4, actions=4, trials=32, hidden=64, outer_steps=600, learner_starts=32,
                learner_steps=800, scaling=[2, 4]),
)


# ---------------------------------------------------------------- the three experiments

def linreg(config, folder):
    """Linear regression: the singular modes of a linear map, against Saxe et al. 2013."""
    results = Results(modes=[f"s = {s:g}" for s in config.singular_values],
                      singular_values=config.singular_values, limit=config.noise ** 2)
    prior = tasks.LinearRegression(config.dim, config.noise, config.trials)
    spectrum = torch.tensor(config.singular_values)
    W = prior.evaluation_tasks(config.eval_tasks, spectrum, stream(config, "evaluation"))

    # Learners: from the aligned start, with one layer, and from random starts by four optimizers
    lr, steps, starts = config.learner_lr, config.learner_steps, config.learner_starts
    results.add("learner", *linear_learner(config, W, "aligned", "sgd", lr, steps, 1))
    results.add("shallow", *linear_learner(config, W, "shallow", "sgd", lr, steps, starts))
    results.add("sgd", *linear_learner(config, W, "random", "sgd", lr, steps, starts))
    results.add("adam", *linear_learner(config, W, "random", "adam", lr / 10, steps, starts))
    results.add("rmsprop", *linear_learner(config, W, "random", "rmsprop", lr / 10, steps, starts))
    results.add("muon", *linear_learner(config, W, "random", "muon", lr, steps // 10 + 1, starts))

    # and their closed forms
    s, u0 = tasks.singular_modes(W)[2][0], config.learner_scale
    results.add_theory("learner", lambda t: learners.deep_linear_theory(s, u0, t * lr) / s)
    results.add_theory("shallow", lambda t: learners.shallow_theory(s, 0.0, t * lr) / s)
    results.add_theory("muon", lambda t: learners.muon_theory(s, u0, t * lr) / s)
    results.lap("learners")

    # the Meta-Learner's outer loop, and inner loops beside those of Bayes
    model = new_meta_learner(config, prior)
    predictors = dict(prior=tasks.Prior(), meta=model, bayes=tasks.Bayes(prior))
    results["equal_scale"] = spectrum
    equal = tasks.random_orthogonal(config.dim, config.dim, stream(config, "control"))
    equal = spectrum[:, None, None] * equal               # a control: each task's modes are alike
    outer_loop(config, prior, W, predictors, results, folder / "checkpoint.pt", equal)
    results.lap("outer_loop")
    inner_loops(config, prior, W, predictors, results)

    # one clock: Learners on the first t trials of an episode, for each t
    trials = some_trials(config, (1, 2, 3, 4, 5, 6, 8, 12, 16))
    steps, strength = linear_learner_by_trial(config, prior, W[:config.clock_tasks], trials)
    results.add("learner_by_trial", trials, strength[-1])
    results["map/trials"], results["map/steps"] = trials, steps
    results["map/strength"] = strength.mean((2, 3))                                 # (R, Q, K)
    results["map/index"] = [learners.describe(s, trials)["staggering"] for s in strength]

    # out of distribution: smaller and larger maps than the prior's
    for scale in config.scales:
        out_of_distribution(config, f"{scale:g}", prior, scale * W, predictors, results)
    results.lap("probes")
    return results


def nonlinreg(config, folder):
    """Nonlinear regression: the frequencies of a function, against Rahaman et al. 2018."""
    low_pass = range(1, config.frequencies + 1)
    lower, upper = low_pass[:config.frequencies // 2], low_pass[config.frequencies // 2:]
    above = range(config.frequencies + 1, 2 * config.frequencies + 1)
    grid = 2 * above[-1] + 4                              # fine enough for all that is tested
    results = Results(modes=[f"k = {k}" for k in low_pass], limit=config.noise ** 2)

    def task_distribution(band):
        """The prior on a band of frequencies."""
        return tasks.FourierRegression(band, config.noise, config.trials, grid)

    def evaluation_tasks(prior):
        """Tasks with every frequency at the amplitude that the prior expects, and random phases."""
        flat = torch.full((len(prior.frequencies),), (2 * prior.weight_var) ** 0.5)
        return prior.evaluation_tasks(config.eval_tasks, flat, stream(config, "evaluation"))

    prior, bandpass = task_distribution(low_pass), task_distribution(upper)
    W = evaluation_tasks(prior)

    # Learners: on targets of flat amplitude and of rising amplitude, of the same power
    rising = torch.arange(1.0, config.frequencies + 1)
    rising = rising / rising.square().mean().sqrt()
    results.add("learner", *relu_learner(config, prior, W, results))
    results.add("learner_rising", *relu_learner(config, prior, W * rising.repeat(2)))
    results.lap("learners")

    # the outer loop of a Meta-Learner, and of a second one for the upper half of the band alone
    model, bandpass_model = new_meta_learner(config, prior), new_meta_learner(config, bandpass)
    predictors = dict(prior=tasks.Prior(), meta=model, bayes=tasks.Bayes(prior))
    outer_loop(config, prior, W, predictors, results, folder / "checkpoint.pt")
    slower = replace(config, outer_steps=config.bandpass_steps, muon_lr=0.03, adam_lr=0.01)
    train(slower, bandpass, bandpass_model, folder / "checkpoint_bandpass.pt")
    results.lap("outer_loop")
    inner_loops(config, prior, W, predictors, results)

    # one clock: Learners on the first t trials of an episode, for each t
    trials = some_trials(config, (2, 4, 6, 8, 10, 14, 20, 30))
    strength = relu_learner_by_trial(config, prior, W[:config.clock_tasks], trials)
    results.add("learner_by_trial", trials, strength)

    # out of distribution: signals of each half of the band, and of as much above it
    predictors["meta_bandpass"] = bandpass_model
    predictors["bayes_bandpass"] = tasks.Bayes(bandpass)
    results["passband"] = [[1, config.frequencies], [upper[0], config.frequencies]]
    for band in lower, upper, above:
        source = task_distribution(band)
        out_of_distribution(config, f"{band[0]} to {band[-1]}", source, evaluation_tasks(source),
                            predictors, results, first_mode=band[0])

    # the first task: what its first Learner and the first of its episodes make of it
    fine = tasks.FourierRegression(low_pass, grid=config.learner_grid).queries()
    _, _, x, y = prior.evaluation_episodes(W[:1], config.eval_episodes, stream(config, "probe"))
    x, y = x[0, :1], y[0, :1]
    _, P = predictors["bayes"].posterior(x, y)
    features = prior.features(fine.double())
    results["fits/x"] = fine[:, 0]
    results["fits/target"] = (prior.features(fine) @ W[0].mT)[:, 0]
    results["fits/data"] = torch.cat([x[0], y[0]], 1)
    results["fits/meta"] = model.query(x, y, fine)[0, ..., 0]
    results["fits/bayes"] = predictors["bayes"].query(x, y, fine)[0, ..., 0]
    results["fits/deviation"] = ((features @ P[0]) * features).sum(-1).clamp_min(0).sqrt()
    results.lap("probes")
    return results


def bandit(config, folder):
    """Contextual bandits: the correct action in each context, against Schaul et al. 2019."""
    results = Results(modes=[f"context {c + 1}" for c in range(config.contexts)],
                      actions=config.actions, limit=1.0)
    prior = tasks.ContextualBandit(config.contexts, config.actions, config.trials)
    correct = prior.evaluation_tasks(config.eval_tasks, stream(config, "evaluation"))

    # Learners: one bias for all contexts or one for each; near-uniform and spread-out starts
    near, spread, steps = config.learner_sd, config.learner_spread, config.learner_steps
    results.add("learner", *bandit_learner(config, correct, near, steps, shared=True))
    results.add("decoupled", *bandit_learner(config, correct, near, steps, shared=False))
    results.add("spread", *bandit_learner(config, correct, spread, 4 * steps, shared=True))
    results.add("decoupled_spread",
                *bandit_learner(config, correct, spread, 4 * steps, shared=False))

    # a Learner on the Meta-Learner's clock: one trial a step, in an episode as long as its steps
    online = learners.OnlineLearner(config.learner_lr, near, stream(config, "online"))
    longer = tasks.ContextualBandit(config.contexts, config.actions, steps)
    episodes = longer.evaluation_episodes(correct, config.learner_starts, stream(config, "probe"))
    strength, _ = longer.inner_loop(online, *episodes)
    seen = meta.spaced_steps(1, steps, 120)
    results.add("online", torch.tensor(seen), strength[seen])
    results.lap("learners")

    # the Meta-Learner's outer loop, and inner loops beside those of Bayes
    model = new_meta_learner(config, prior, meta.MetaAgent)
    agents = dict(prior=tasks.UniformAgent(), meta=model, bayes=tasks.BayesAgent())
    outer_loop(config, prior, correct, agents, results, folder / "checkpoint.pt")
    results.lap("outer_loop")
    ordered = dict(bayes_ordered=tasks.OrderedBayesAgent())
    inner_loops(config, prior, correct, agents | ordered, results)
    results.add_theory("bayes", lambda t: prior.strength(prior.bayes_curve()))

    # interference: is a context held up by others that are solved?
    for system, agent in dict(online=online, meta=model, bayes=agents["bayes"]).items():
        chance = tasks.visit_clock(prior, agent, fresh_episodes(config, prior))
        visit, solved = torch.meshgrid(torch.arange(config.actions - 1) + 1,
                                       torch.arange(config.contexts), indexing="ij")
        results.add_rows("visits", system=system, visit=visit, solved=solved, chance=chance)

    # what sharing an answer does, and the number of contexts
    for system in "learner", "decoupled", "online", "meta", "bayes":
        half, size = half_times(results, system), tasks.shared_answers(correct)
        for n in range(1, config.contexts + 1):
            results.add_rows("sharing", system=system, contexts_sharing=n,
                             half_time=learners.geometric_mean(half[size == n]))
    for n in config.scaling:
        for system, shared in dict(learner=True, decoupled=False).items():
            half_time = time_to_learn(config, n, shared)
            results.add_rows("scaling", system=system, contexts=n, half_time=half_time)
        half_time = bayes_time_to_learn(config, n)
        results.add_rows("scaling", system="bayes", contexts=n, half_time=half_time)

    # out of distribution: contexts at unequal rates
    rates = config.context_rates or [2.0 ** -c for c in range(config.contexts)]
    unequal = tasks.ContextualBandit(config.contexts, config.actions, config.trials, rates)
    results["rates"] = unequal.rates
    out_of_distribution(config, "equal rates", prior, correct, agents, results)
    out_of_distribution(config, "unequal rates", unequal, correct, agents, results)
    results.lap("probes")
    return results


# ---------------------------------------------------------------- steps that experiments share

PURPOSES = ("tasks", "initialisation", "evaluation", "probe", "learners", "online", "fresh", "ood",
            "control", "snapshots")


def stream(config, purpose):
    """A random stream of its own for each purpose: what one draws never shifts another."""
    return torch.Generator().manual_seed(len(PURPOSES) * config.seed + PURPOSES.index(purpose))


class Results(dict):
    """What a run measured: NumPy arrays by name, all that its tables and figures are made of.

    SYSTEM/time (R,), SYSTEM/strength (R, N, E, K)     times, tasks, repeats of a task, modes
    performance/SYSTEM (n, T), limit ()                loss, or reward, of fresh tasks by trial
    outer_loop/step (P,), strength (P, N, E, K), half_time (P, K), value (P,)
    ood/system, condition, mode, strength, value       rows of ood.csv; so probe, visits, sharing,
                                                       scaling
    seconds/PHASE ()
    Of a complete run also, as attributes: config, folder and summary, the numbers of summary.json
    with inf and nan where the file has null. Prints as a table.
    """

    def __init__(self, **arrays):
        super().__init__()
        self.begun = time.perf_counter()
        for name, values in arrays.items():
            self[name] = values

    def __setitem__(self, name, values):
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu().numpy()
        super().__setitem__(name, np.array(values, order="C"))

    def add(self, system, time, strength):
        """Takes a system's strengths (R, N, E, K) at times (R,)."""
        self[f"{system}/time"] = time
        self[f"{system}/strength"] = strength

    def add_theory(self, system, closed_form):
        """Takes a system's closed form, a function of its times (R,) with values (R, K)."""
        time = torch.from_numpy(self[f"{system}/time"])
        self.add(f"{system}_theory", time, closed_form(time)[:, None, None])

    def add_rows(self, table, **columns):
        """Adds rows to a table: columns that broadcast against each other, last axis fastest."""
        for name, column in zip(columns, np.broadcast_arrays(*columns.values())):
            name = f"{table}/{name}"
            self[name] = np.append(self[name], column) if name in self else column.ravel()

    def lap(self, phase):
        """Notes the seconds since the last lap as those of a phase."""
        now = time.perf_counter()
        self[f"seconds/{phase}"] = now - self.begun
        self.begun = now

    def under(self, prefix):
        """Arrays whose name begins with prefix/, by the rest of it."""
        start = f"{prefix}/"
        return {name.removeprefix(start): self[name] for name in self if name.startswith(start)}

    def systems(self):
        """The names of all systems, in the order in which they were measured."""
        return [name.removesuffix("/time") for name in self if name.endswith("/time")]

    def curve(self, system):
        """A system's time (R,), its strengths averaged over repeats, then over tasks (R, K), and
        their standard errors over tasks (R, K); 0 for a single task."""
        strength = torch.from_numpy(self[f"{system}/strength"]).mean(2)
        n = strength.shape[1]
        stderr = strength.std(1, correction=min(1, n - 1)) / n ** 0.5
        return self[f"{system}/time"], strength.mean(1).numpy(), stderr.numpy()

    def __repr__(self):
        return table(self.summary)


def linear_learner(config, W, start, optimizer, lr, steps, repeats):
    """Linear networks, `repeats` of each task W (N, d, d): steps (R,), strengths (R, N, E, K)."""
    target = W.double().repeat_interleave(repeats, 0)
    recorded, maps = learners.linear_network(
        target, lr, steps, start, config.learner_scale, optimizer, every=max(1, steps // 400),
        generator=stream(config, "learners"))
    strength = tasks.mode_strength(maps, *tasks.singular_modes(target))
    return recorded, strength.unflatten(1, (len(W), repeats))


def some_trials(config, wanted):
    """The numbers of trials at which to look at a Learner whose clock is trials: 0, those wanted
    that an episode has, and its last."""
    within = [t for t in wanted if t < config.trials]
    return torch.tensor([0, *within, config.trials])


def linear_learner_by_trial(config, prior, W, trials):
    """A Learner whose clock is data: for each t in `trials` (Q,) a linear network, from a small
    random start, on the first t trials of the episodes that the Meta-Learner sees of W (N, d, d).
    Its steps are as large as the data allow. Returns steps (R,), strengths (R, Q, N, E, K)."""
    probe = stream(config, "probe")
    _, _, x, y = prior.evaluation_episodes(W, config.eval_episodes, probe)
    x, y = x[:, :config.clock_episodes], y[:, :config.clock_episodes]
    seen = torch.arange(prior.trials) < trials[:, None]                             # (Q, T)
    X = (seen[..., None] * x[:, :, None]).flatten(0, 2).mT                       # (N E Q, dim, T)
    Y = (seen[..., None] * y[:, :, None]).flatten(0, 2).mT
    Q, R = torch.linalg.qr(X.mT)            # |Y - W X|^2 = |Y Q - W R^T|^2 + const: T becomes dim
    X, Y = R.mT, Y @ Q
    curvature = torch.maximum(torch.linalg.matrix_norm(X, 2) ** 2,
                              torch.linalg.matrix_norm(Y @ X.mT, 2))
    scale = curvature.clamp_min(TINY).sqrt()[:, None, None]
    steps, maps = learners.linear_network(
        Y / scale, 0.5, config.clock_steps, "random", config.learner_scale,
        every=max(1, config.clock_steps // 50), inputs=X / scale,
        generator=stream(config, "learners"))
    U, V, s = (part.float()[:, None, None] for part in tasks.singular_modes(W))
    maps = maps.unflatten(1, (len(W), -1, len(trials)))                     # (R, N, E, Q, dim, dim)
    return steps, tasks.mode_strength(maps, U, V, s).movedim(3, 1)


def relu_learner(config, prior, W, results=None):
    """ReLU networks, several of each task W (N, 1, 2 K): steps (R,), strengths (R, N, E, K). What
    the first of them has learned goes into the results."""
    circle = tasks.FourierRegression(prior.frequencies, grid=config.learner_grid).queries()
    target = (prior.features(circle) @ W.mT)[..., 0]
    target = target.repeat_interleave(config.learner_starts, 0)                     # (N E, G)
    steps, f = learners.relu_network(
        circle[:, 0].expand(target.shape), target, config.learner_lr, config.learner_steps,
        config.learner_hidden, config.learner_layers, every=max(1, config.learner_steps // 200),
        generator=stream(config, "learners"))
    if results is not None:
        results["fits/steps"] = steps
        results["fits/learner"] = f[:, 0]
    strength, _ = tasks.fourier_strength(f, target, prior.frequencies)
    return steps, strength.unflatten(1, (len(W), config.learner_starts))


def relu_learner_by_trial(config, prior, W, trials):
    """The same with ReLU networks, for W (N, 1, 2 K): strengths at the last step (Q, N, E, K)."""
    probe = stream(config, "probe")
    _, grid, x, y = prior.evaluation_episodes(W, config.eval_episodes, probe)
    x, y = x[:, :config.clock_episodes], y[:, :config.clock_episodes]
    size = *x.shape[:2], len(trials), config.trials                                 # (N, E, Q, T)
    x, y = (z[:, :, None, :, 0].expand(size).flatten(0, 2) for z in (x, y))
    seen = (torch.arange(config.trials) < trials[:, None]) / trials.clamp_min(1)[:, None]
    _, f = learners.relu_network(
        x, y, config.learner_lr, config.clock_steps, config.learner_hidden, config.learner_layers,
        every=config.clock_steps, generator=stream(config, "learners"),
        weight=seen.expand(size).flatten(0, 2), at=grid[:, 0].expand(len(x), -1))
    target = (prior.features(grid) @ W.mT)[..., 0]                                  # (N, G)
    f = f[-1].unflatten(0, size[:3])
    strength, _ = tasks.fourier_strength(f, target[:, None, None], prior.frequencies)
    return strength.movedim(2, 0)


def bandit_learner(config, correct, sd, steps, shared):
    """Policy-gradient Learners, several of each task (N, C), each with names of actions and a start
    of its own: steps (R,), strengths (R, N, E, C)."""
    prior = tasks.ContextualBandit(correct.shape[1], config.actions)
    generator = stream(config, "learners")
    renamed = prior.rename(correct, config.learner_starts, generator).flatten(0, 1)
    logits = sd * torch.randn(*renamed.shape, config.actions, generator=generator)
    record = meta.spaced_steps(1, steps, 120)
    J = learners.policy_gradient(renamed, logits, config.learner_lr, record, shared)
    return torch.tensor(record), prior.strength(J).unflatten(1, (len(correct), -1))


def time_to_learn(config, contexts, shared):
    """Steps until the mean J over the contexts is 0.9 in a Learner: geometric mean over tasks."""
    prior = tasks.ContextualBandit(contexts, config.actions)
    correct = prior.sample(config.eval_tasks, stream(config, "evaluation"))
    steps, strength = bandit_learner(config, correct, config.learner_sd, config.learner_steps,
                                     shared)
    half = learners.half_time(strength.mean((2, 3)), steps, level=prior.strength(0.9))
    return learners.geometric_mean(half)


def bayes_time_to_learn(config, contexts):
    """Trials until the mean J over the contexts is 0.9 in Bayes, in expectation over episodes."""
    prior = tasks.ContextualBandit(contexts, config.actions, 3 * config.actions * contexts)
    J = prior.bayes_curve().mean(-1)
    return learners.half_time(J, torch.arange(len(J)), level=0.9)


def new_meta_learner(config, prior, kind=meta.MetaLearner):
    """An untrained Meta-Learner. kind: meta.MetaAgent for a bandit."""
    return kind(prior, config.hidden, config.layers, stream(config, "initialisation"),
                config.core, config.encoder, config.decoder)


def fresh_episodes(config, prior):
    """One episode of each of the fresh tasks."""
    generator = stream(config, "fresh")
    return prior.episodes(prior.sample(config.fresh_tasks, generator), generator)


def train(config, prior, model, path, snapshot=None, report=None):
    """Trains a Meta-Learner, or goes on from its checkpoint. Returns its snapshots."""
    def loss(generator, share):
        """What to descend, and what to report of it, on a batch of fresh episodes."""
        if isinstance(prior, tasks.ContextualBandit):
            entropy = config.entropy * (1 - share)
            return meta.policy_gradient_loss(model, prior, config.batch, entropy, generator)
        return meta.squared_error_loss(model, prior, config.batch, generator)

    model.to(config.device)
    beside_muon = config.outer_optimizer == "muon" and config.core == "lstm"
    adam_lr = config.adam_lr or (0.02 if beside_muon else 0.003)
    optimizers = meta.make_optimizers(model, config.outer_optimizer, config.muon_lr, adam_lr)
    return meta.outer_loop(model, loss, config.outer_steps, optimizers, stream(config, "tasks"),
                           path, asdict(config), snapshot, report)


def outer_loop(config, prior, targets, predictors, results, path, controls=None):
    """Trains the Meta-Learner of a family, looking from time to time at what its inner loop has
    learned of the evaluation tasks, and of control tasks, at the last trial."""
    fresh = fresh_episodes(config, prior)
    bounds = [prior.score(predictors[system], *fresh).mean() for system in ("prior", "bayes")]
    some = [part[:256] for part in fresh]
    few = max(1, config.eval_episodes // 128)
    episodes = prior.evaluation_episodes(targets, few, stream(config, "snapshots"))
    trials = torch.arange(config.trials + 1.0)

    def snapshot(model):
        """What the outer loop notes at one of its steps."""
        strength, _ = prior.inner_loop(model, *episodes)
        seen = dict(strength=strength[-1].clone(), value=prior.score(model, *some).mean(),
                    half_time=learners.half_time(strength.mean((1, 2)), trials))
        if controls is not None:
            alike = prior.evaluation_episodes(controls, few, stream(config, "snapshots"))
            seen["equal"] = prior.inner_loop(model, *alike)[0][-1].mean((1, 2))
        return seen

    progress = meta.Progress(config.outer_steps, *bounds)
    snapshots = train(config, prior, predictors["meta"], path, snapshot, progress)
    for name in snapshots[0]:
        values = [torch.as_tensor(one[name]) for one in snapshots]
        results[f"outer_loop/{name}"] = torch.stack(values)


def inner_loops(config, prior, targets, predictors, results):
    """What each predictor learns within episodes, the same for all: its strengths in those of the
    evaluation tasks, and its losses, or rewards, in those of fresh tasks."""
    episodes = prior.evaluation_episodes(targets, config.eval_episodes, stream(config, "probe"))
    for system, predictor in predictors.items():
        results[f"performance/{system}"] = prior.score(predictor, *fresh_episodes(config, prior))
        if system == "prior":
            continue
        strength, readings = prior.inner_loop(predictor, *episodes)
        results.add(system, torch.arange(config.trials + 1.0), strength)
        for name, reading in readings.items():
            results.add_rows("probe", system=system, trial=torch.arange(config.trials + 1),
                             reading=name, value=reading.mean(1))


def out_of_distribution(config, condition, prior, targets, predictors, results, first_mode=1):
    """What each predictor has learned of targets that come from another prior at the last trial,
    and its mean loss, or reward, on them: rows of ood.csv."""
    few = max(1, config.eval_episodes // 64)
    episodes = prior.evaluation_episodes(targets, few, stream(config, "ood"))
    many = targets.repeat_interleave(few, 0)
    fresh = prior.episodes(many, stream(config, "ood"))
    for system, predictor in predictors.items():
        strength, _ = prior.inner_loop(predictor, *episodes)
        last = strength[-1].mean((0, 1))
        results.add_rows("ood", system=system, condition=condition,
                         mode=np.arange(first_mode, first_mode + len(last)), strength=last,
                         value=prior.score(predictor, *fresh).mean())


# ---------------------------------------------------------------- numbers, from the arrays alone

def tensors(results, *names):
    """Arrays of the results as tensors."""
    return [torch.from_numpy(results[name]) for name in names]


def half_times(results, system):
    """Half-times of a system's strengths averaged over repeats: (N, K)."""
    time, strength = tensors(results, f"{system}/time", f"{system}/strength")
    return learners.half_time(strength.mean(2), time)


def summarise(results):
    """The numbers of summary.json. inf is a mode that is not reached, nan what is undefined."""
    systems = {}
    for system in results.systems():
        time, strength = tensors(results, f"{system}/time", f"{system}/strength")
        systems[system] = learners.describe(strength, time)
    losses = tensors(results, "performance/prior", "performance/meta", "performance/bayes")
    captured, *captured_ci = learners.captured_fraction(*(each.mean(1) for each in losses))
    follows = learners.follows(*tensors(results, "meta/strength", "bayes/strength", "meta/time"))
    outer = learners.describe(*tensors(results, "outer_loop/strength", "outer_loop/step"))
    seconds = {phase: round(float(value), 2) for phase, value in results.under("seconds").items()}
    return dict(systems=systems, captured=captured, captured_ci=captured_ci,
                follows_bayes=follows.tolist(), outer_loop=outer, seconds=seconds)


NAMES = dict(
    learner="Learner (steps)", learner_theory="  closed form", learner_rising="  rising amplitude",
    learner_by_trial="  on t trials",
    shallow="  one layer", shallow_theory="  + closed form", sgd="  random start", adam="  + Adam",
    rmsprop="  + RMSprop", muon="  + Muon", muon_theory="  + closed form", decoupled="  decoupled",
    spread="  spread-out start", decoupled_spread="  + decoupled", online="  online (trials)",
    meta="Meta-L. (trials)", bayes="Bayes (trials)", bayes_theory="  closed form",
    bayes_ordered="  ties by name",
)


def shown(value):
    """A number as a person reads it; "-" where it is undefined or a mode is not reached."""
    if not math.isfinite(value):
        return "-"
    digits = 2 if abs(value) < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}" if value < 9999.5 else f"{value / 1000:.0f}k"


def table(summary):
    """A summary as a table to print."""
    systems = summary["systems"]
    modes = range(1, len(systems["meta"]["half_times"]) + 1)
    lines = ["Half-time of each mode; index: latest over earliest, of averages over repeats, and",
             "within a repeat; order: how alike repeats are, 1 the same order, 0 one by chance", "",
             " " * 18 + "".join(f"{k:6}" for k in modes) + "  index [95% CI]      within  order"]
    for system in sorted(systems, key=list(NAMES).index):
        row = systems[system]
        half = "".join(f"{shown(t):>6}" for t in row["half_times"])
        low, high = map(shown, row["staggering_ci"])
        index = f"{shown(row['staggering']):>5} [{low}, {high}]"
        order = shown(row["order"])
        lines.append(f"{NAMES[system]:18}{half}  {index:19}{shown(row['within']):>7}{order:>7}")
    low, high = summary["captured_ci"]
    follows = " ".join(shown(value) for value in summary["follows_bayes"])
    return "\n".join([*lines, "", f"Captured fraction κ = {summary['captured']:.3f} "
                      f"[{low:.3f}, {high:.3f}]; half-times follow those of Bayes: {follows}"])


def numbers(summary):
    """The numbers by which runs are compared, by (system, measure)."""
    found = {("meta", "captured"): summary["captured"]}
    for system, row in dict(summary["systems"], outer_loop=summary["outer_loop"]).items():
        for measure in "staggering", "within", "order":
            found[system, measure] = row[measure]
    for k, value in enumerate(summary["follows_bayes"], 1):
        found["meta", f"follows_bayes_{k}"] = value
    for k, value in enumerate(summary["outer_loop"]["half_times"], 1):
        found["outer_loop", f"half_time_{k}"] = value
    return found


def compare(runs, folder):
    """Writes what several runs say together: seeds.csv, every number of every run; overview.csv,
    medians and ranges over seeds; of several families the figure overview, of the first seed.

    runs: lists of results, one a seed, by family. Returns the overview as text.
    """
    every, overview = Results(), Results()
    lines = [f"{'':38}median over seeds [lowest, highest]"]
    for family, several in runs.items():
        by_seed = [numbers(results.summary) for results in several]
        for system, measure in by_seed[0]:
            values = [found[system, measure] for found in by_seed]
            seeds = [results.config.seed for results in several]
            every.add_rows("seeds", family=family, seed=seeds, system=system, measure=measure,
                           value=values)
            median, low, high = np.median(values), min(values), max(values)
            overview.add_rows("overview", family=family, system=system, measure=measure,
                              median=median, low=low, high=high)
            if system in ("learner", "meta", "bayes"):
                lines.append(f"{family:10} {system:16} {measure:16} {shown(median):>5} "
                             f"[{shown(low)}, {shown(high)}]")
    write_csv(folder / "seeds.csv", every.under("seeds"))
    write_csv(folder / "overview.csv", overview.under("overview"))
    if len(runs) > 1:
        firsts = {family: several[0] for family, several in runs.items()}
        plots.overview(firsts, folder / "overview")
    return "\n".join(lines)


# ---------------------------------------------------------------- files of a run

class Mistake(ValueError):
    """A mistake by the user, told in one line: the option, what was given and what is allowed."""

    def __init__(self, option, given, allowed):
        super().__init__(f"{option}: {given} given, allowed: {allowed}")


ANOTHER = "another folder, or --fresh to replace the run that is there"


def prepare(folder, config, fresh):
    """Makes the folder of a run and writes config.json, or compares the one that is there with this
    run's settings. `fresh` clears it first. Raises Mistake."""
    path = folder / "config.json"
    settings = dict(family=type(config).__name__.lower()) | asdict(config)
    versions = {module.__name__: module.__version__ for module in (torch, np, matplotlib)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            for file in path, folder / "results.npz", *folder.glob("checkpoint*.pt"):
                file.unlink(missing_ok=True)
        if not path.exists():
            text = json.dumps(settings | dict(versions=versions), indent=1)
            meta.replace_file(path, text.encode())
    except OSError as error:
        raise Mistake("--out", folder, f"a folder that can be written ({error.strerror})") from None
    there = read(path, lambda path: dict(json.loads(path.read_text())))
    for name, value in settings.items():
        if there.get(name) != value:
            raise Mistake("--out", f"{folder}, which holds a run with other settings ({name} "
                          f"{there.get(name)} there, {value} here),", ANOTHER)


def read(path, reader):
    """What the reader makes of a file. Raises Mistake where it cannot."""
    try:
        return reader(path)
    except Exception:                                     # damaged archives raise many kinds
        raise Mistake("--out", f"{path}, which cannot be read,", ANOTHER) from None


def load(path):
    """The results in results.npz."""
    with np.load(path) as arrays:
        results = Results()
        for name in arrays:
            results[name] = arrays[name]
        return results


def save(path, results):
    """Writes results.npz, atomically."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **results)
    meta.replace_file(path, buffer.getvalue())


def write_csv(path, columns):
    """Writes columns of one length as a CSV file, atomically."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values()))
    meta.replace_file(path, text.getvalue().encode())


def write_tables(results, folder):
    """Writes summary.json and the CSV files, for people: nothing reads them back."""
    tables = Results()
    for system in results.systems():
        time, strength, stderr = results.curve(system)
        modes = np.arange(1, strength.shape[1] + 1)[:, None]
        tables.add_rows("dynamics", system=system, mode=modes, time=time, strength=strength.T,
                        stderr=stderr.T)
    for system in "prior", "meta", "bayes":
        values = results[f"performance/{system}"]
        tables.add_rows("performance", system=system, trial=np.arange(values.shape[1]),
                        value=values.mean(0), stderr=values.std(0, ddof=1) / len(values) ** 0.5)
    outer = results.under("outer_loop")
    strength = outer["strength"].mean((1, 2)).T                                     # (K, P)
    modes = np.arange(1, len(strength) + 1)[:, None]
    tables.add_rows("outer_loop", outer_step=outer["step"], mode=modes, strength=strength,
                    half_time=outer["half_time"].T, value=outer["value"])
    for name in "dynamics", "performance", "outer_loop":
        write_csv(folder / f"{name}.csv", tables.under(name))
    for name in "ood", "probe", "visits", "sharing", "scaling":
        if results.under(name):
            write_csv(folder / f"{name}.csv", results.under(name))
    text = json.dumps(plain(results.summary), indent=1)
    meta.replace_file(folder / "summary.json", text.encode())


def plain(value):
    """The same for JSON, which has no inf and no nan: null. Walks lists and dicts."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return value if math.isfinite(value) else None


# ---------------------------------------------------------------- from a command to its results

FAMILIES = dict(                                          # settings, experiment, figures
    linreg=(Linreg, linreg, plots.linreg),
    nonlinreg=(Nonlinreg, nonlinreg, plots.nonlinreg),
    bandit=(Bandit, bandit, plots.bandit),
)
SHARED = "seed", "device", "core", "outer_steps", "outer_optimizer"        # what `all` passes on


def run(family, out=None, quick=False, fresh=False, **settings):
    """What `python metadyn.py FAMILY` does: runs, resumes or redraws an experiment in `out`, by
    default runs/FAMILY. settings: as on the command line, with underscores. Returns `Results`.
    Raises Mistake (a ValueError), and FloatingPointError if learning diverged."""
    config = configure(family, quick, settings)
    folder = Path(out or Path("runs") / family)
    prepare(folder, config, fresh)
    return carry_out(family, config, folder)


def carry_out(family, config, folder):
    """Runs, resumes or, where it is complete, redraws an experiment. Returns its results."""
    _, experiment, draw = FAMILIES[family]
    path = folder / "results.npz"
    if path.exists():
        results = read(path, load)
        print(f"{folder} is complete: drawn again; --fresh measures again", file=sys.stderr)
    else:
        meta.keep_freed_memory()
        try:
            results = experiment(config, folder)
        except meta.Unreadable as error:
            raise Mistake("--out", f"{error}, which cannot be read,", ANOTHER) from None
        save(path, results)
    results.config, results.folder, results.summary = config, folder, summarise(results)
    write_tables(results, folder)
    draw(results, results.summary, folder)
    return results


def configure(family, quick, settings):
    """A family's config: its defaults, those of --quick, the settings given. Raises Mistake."""
    if family not in FAMILIES:
        raise Mistake("FAMILY", family, ", ".join(FAMILIES))
    config = FAMILIES[family][0](**(QUICK[family] if quick else {}) | settings)
    for setting in fields(config):
        setattr(config, setting.name, checked(setting, getattr(config, setting.name)))
    if config.core == "attention" and config.hidden % 4:
        raise Mistake("--hidden", config.hidden, "a multiple of 4, for attention has 4 heads")
    config.device = resolve_device(config.device)
    if family == "linreg":
        config.singular_values = sorted(config.singular_values, reverse=True)
        if len(config.singular_values) != config.dim:
            raise Mistake("--singular-values", len(config.singular_values), "as many as --dim, "
                          f"{config.dim}")
    if family == "nonlinreg" and config.learner_grid <= 2 * config.frequencies:
        raise Mistake("--learner-grid", config.learner_grid, "more than twice --frequencies, "
                      f"{config.frequencies}")
    if family == "bandit" and len(config.context_rates) not in (0, config.contexts):
        raise Mistake("--context-rates", len(config.context_rates), "as many as --contexts, "
                      f"{config.contexts}")
    if family == "bandit" and config.context_rates and not any(config.context_rates):
        raise Mistake("--context-rates", 0, "not all 0")
    return config


def checked(setting, given):
    """A field's value, in the type of the field. Raises Mistake if its rules do not allow it."""
    option, rules = "--" + setting.name.replace("_", "-"), setting.metadata
    if rules["choices"]:
        if given not in rules["choices"]:
            raise Mistake(option, given, ", ".join(rules["choices"]))
        return given
    several = typing.get_args(setting.type)
    kind = several[0] if several else setting.type
    try:
        values = [kind(value) for value in (given if several else [given])]
        if values != list(given if several else [given]):
            raise ValueError                              # 2.5 is no whole number
    except (TypeError, ValueError):
        raise Mistake(option, given, "whole numbers" if kind is int else "numbers") from None
    if several and not values and setting.default_factory():
        raise Mistake(option, "nothing", "at least one number")
    for value in values:
        if not rules["low"] <= value <= 1e9:
            bound = "more than 0" if rules["low"] == TINY else f"at least {rules['low']}"
            raise Mistake(option, value, f"{bound} and at most 1e9")
    return values if several else values[0]


def resolve_device(name):
    """The one place where the device is chosen: "auto" is the first of cuda, mps, cpu that is
    there. Raises Mistake."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    available = [device for device in there if there[device]]
    if name not in ["auto", *available]:
        raise Mistake("--device", name, "on this machine " + ", ".join(available))
    return available[0] if name == "auto" else name


class OneLineParser(argparse.ArgumentParser):
    """argparse, with its errors in one line."""

    def error(self, message):
        """Raises what `main` prints."""
        raise argparse.ArgumentError(None, message.removeprefix("argument "))


def make_parser():
    """The command line: a subcommand for each family, with an option for each of its settings."""
    parser = OneLineParser(prog="metadyn.py", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    families = parser.add_subparsers(dest="family", required=True, metavar="FAMILY")
    configs = {family: config for family, (config, *_) in FAMILIES.items()}
    for family, config in (configs | dict(all=Config)).items():
        about = "all of them in turn, and an overview" if family == "all" else config.__doc__
        out = Path("runs") / family.removeprefix("all")
        sub = families.add_parser(family, help=about, description=about)
        sub.add_argument("--quick", action="store_true", help="a small task, in half a minute")
        sub.add_argument("--fresh", action="store_true", help="ignore an earlier run there")
        sub.add_argument("--out", type=Path, default=out, help=f"results folder (default: {out})")
        sub.add_argument("--seeds", type=int, default=1, help="how many seeds, from --seed on; all "
                         "but the first in folders seed1 ... within (default: 1)")
        for setting in fields(config):
            if family != "all" or setting.name in SHARED:
                add_setting(sub, setting, getattr(config(), setting.name))
    return parser


def add_setting(parser, setting, default):
    """An option for a field of a config; not given, it is absent."""
    several = typing.get_args(setting.type)
    shown = " ".join(f"{value:g}" for value in default) if several else default
    parser.add_argument(
        "--" + setting.name.replace("_", "-"), default=argparse.SUPPRESS,
        type=several[0] if several else setting.type, nargs="+" if several else None,
        metavar="|".join(setting.metadata["choices"] or ["X"]),
        help=f"{setting.metadata['help']} (default: {shown})")


def plan(family, out, quick, fresh, seeds, settings):
    """The runs that a command asks for, checked and with folders made before the first begins: by
    family a list of (config, folder), one a seed. Raises Mistake."""
    if not 1 <= seeds <= 1000:
        raise Mistake("--seeds", seeds, "at least 1 and at most 1000")
    jobs = {}
    for name in FAMILIES if family == "all" else [family]:
        config = configure(name, quick, settings)
        folder = out / name if family == "all" else out
        jobs[name] = [(config, folder)]
        for seed in range(config.seed + 1, config.seed + seeds):
            jobs[name].append((replace(config, seed=seed), folder / f"seed{seed}"))
        for job in jobs[name]:
            prepare(job[1], job[0], fresh)
    return jobs


def main(arguments=None):
    """Runs the command line. Returns the exit status: 0, 1 for a failure, 2 for a user's mistake,
    130 for Ctrl-C."""
    for channel in sys.stdout, sys.stderr:
        if hasattr(channel, "reconfigure"):
            channel.reconfigure(errors="replace")         # a terminal without κ shows ?
    try:
        settings = vars(make_parser().parse_args(arguments))
        command = [settings.pop(name) for name in ("family", "out", "quick", "fresh", "seeds")]
        runs = {}
        for family, jobs in plan(*command, settings).items():
            runs[family] = [carry_out(family, *job) for job in jobs]
            print(f"\n{runs[family][0]}\nFigures and tables: {runs[family][0].folder}")
        out = command[1]
        if len(runs) > 1 or command[-1] > 1:
            print(f"\n{compare(runs, out)}\nFigures and tables: {out}")
        return 0
    except (Mistake, argparse.ArgumentError) as mistake:
        print("metadyn.py:", " ".join(str(mistake).split()), file=sys.stderr)
        return 2
    except (FloatingPointError, OSError) as error:
        print(f"\nmetadyn.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nmetadyn.py: stopped; the same command, without --fresh, goes on from the last "
              "checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
