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
    batch: int = option(128, "episodes in an outer step", 1)
    outer_steps: int = option(4000, "updates of the Meta-Learner's weights", 1)
    outer_optimizer: str = option("muon", "optimizer of the outer loop", choices=["muon", "adam"])
    muon_lr: float = option(0.05, "peak learning rate of Muon, on the core's matrices", TINY)
    adam_lr: float = option(0.02, "peak learning rate of Adam, on the rest or on all", TINY)
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
    bandpass_steps: int = option(300, "further ones with the upper half of the band alone", 1)
    eval_tasks: int = option(8, "evaluation tasks, the same for every system", 2)
    learner_lr: float = option(3e-3, "the Learner's learning rate (Adam)", TINY)
    learner_steps: int = option(800, "the Learner's gradient steps", 1)
    learner_hidden: int = option(64, "units in each of the Learner's layers", 1)
    learner_layers: int = option(4, "the Learner's hidden layers", 1)
    learner_starts: int = option(8, "random starts of each task", 1)
    clock_tasks: int = option(8, "tasks of the Learner whose clock is trials", 1)
    clock_episodes: int = option(4, "episodes of each of them", 2)
    clock_steps: int = option(800, "its gradient steps for each number of trials", 1)

@dataclass
class Bandit(Config):
    """Contextual bandits: the correct action in each context."""
    contexts: int = option(5, "contexts", 1)
    actions: int = option(5, "actions in each context", 2)
    trials: int = option(60, "trials in an episode", 2)
    hidden: int = option(96, "units of the Meta-Learner's core", 1)
    layers: int = option(1, "layers of the core", 1)
    batch: int = option(256, "episodes in an outer step", 1)
    outer_steps: int = option(700, "updates of the Meta-Learner's weights", 1)
    entropy: float = option(0.02, "weight of the entropy bonus at first, falling to zero")
    learner_lr: float = option(0.5, "the Learner's step size", TINY)
    learner_steps: int = option(2000, "the Learner's gradient steps, and trials online", 2)
    learner_starts: int = option(64, "random starts of each task", 1)
    learner_sd: float = option(0.1, "standard deviation of the first logits (near-uniform)")

ATTENTION = dict(muon_lr=0.02, adam_lr=0.003)             # where --core attention differs
ADAM = dict(adam_lr=0.003)                                # where --outer-optimizer adam differs
QUICK = dict(                                             # where --quick differs
    linreg=dict(dim=2, singular_values=[1.4, 0.5], trials=8, hidden=48, layers=1, batch=64,
                outer_steps=1000, adam_lr=0.03, learner_steps=1500, clock_episodes=64),
    nonlinreg=dict(frequencies=2, trials=15, hidden=48, layers=1, batch=64, outer_steps=900,
                   bandpass_steps=100, muon_lr=0.1, adam_lr=0.03, eval_episodes=256,
                   learner_steps=400, learner_starts=2, clock_steps=300),
    bandit=dict(contexts=4, actions=4, trials=32, hidden=64, batch=128, outer_steps=600,
                muon_lr=0.1, adam_lr=0.03, learner_steps=800, learner_starts=32),
)

# ---------------------------------------------------------------- the three experiments
def linreg(config, folder):
    """Linear regression: the singular modes of a linear map, against Saxe et al. 2013."""
    results = Results(modes=[f"s = {s:g}" for s in config.singular_values], limit=config.noise ** 2,
                      singular_values=config.singular_values)
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

    # the Meta-Learner's outer loop, with tasks as a control whose modes are all of one strength
    equal = tasks.random_orthogonal(config.dim, config.dim, stream(config, "control"))
    model = new_meta_learner(config, prior)
    predictors = dict(prior=tasks.Prior(), meta=model, bayes=tasks.Bayes(prior))
    outer_loop(config, prior, W, predictors, results, folder / "checkpoint.pt",
               controls=spectrum[:, None, None] * equal)
    results.lap("outer_loop")

    # what Meta-Learner and Bayes learn within the same episodes
    inner_loops(config, prior, W, predictors, results)

    # one clock: Learners on the first t trials of an episode, for each t
    few = W[:config.clock_tasks]
    trials, x, y = clock(config, prior, few, (1, 2, 3, 4, 5, 6, 8, 12, 16))
    steps, maps = learners.linear_network_by_trial(
        x, y, trials, config.clock_steps, config.learner_scale, stream(config, "learners"))
    U, V, s = (part.float()[:, None] for part in tasks.singular_modes(few))
    strength = tasks.mode_strength(maps, U, V, s)                                # (R, Q, N, E, K)
    results.add("learner_by_trial", trials, strength[-1])
    results["map/trials"] = trials
    results["map/steps"] = steps
    results["map/strength"] = strength.mean((2, 3))                                 # (R, Q, K)
    results["map/index"] = [learners.describe(s, trials)["staggering"] for s in strength]

    # out of distribution: smaller and larger maps than the prior's
    rows = []
    for scale in config.scales:
        rows += out_of_distribution(config, f"{scale:g}", prior, scale * W, predictors)
    results["ood"] = np.rec.fromrecords(rows, names=OOD)
    results.lap("probes")
    return results

def nonlinreg(config, folder):
    """Nonlinear regression: the frequencies of a function, against Rahaman et al. 2018."""
    results = Results(modes=[f"k = {k + 1}" for k in range(config.frequencies)],
                      limit=config.noise ** 2)
    low_pass = range(1, config.frequencies + 1)
    lower, upper = low_pass[:config.frequencies // 2], low_pass[config.frequencies // 2:]
    above = range(config.frequencies + 1, 2 * config.frequencies + 1)

    def task_distribution(band):
        """The prior on a band of frequencies."""
        return tasks.FourierRegression(band, config.noise, config.trials)

    def evaluation_tasks(prior):
        """Tasks with every frequency at the amplitude that the prior expects, and random phases."""
        flat = torch.full((len(prior.frequencies),), (2 * prior.weight_var) ** 0.5)
        return prior.evaluation_tasks(config.eval_tasks, flat, stream(config, "evaluation"))

    prior, bandpass = task_distribution(low_pass), task_distribution(upper)
    W = evaluation_tasks(prior)

    # Learners: on targets of flat amplitude and of rising amplitude, of the same power
    circle = torch.arange(64)[:, None] / 64
    rising = torch.arange(1.0, config.frequencies + 1)
    rising = rising / rising.square().mean().sqrt()
    steps, strength, functions = relu_learner(config, prior, W, circle)
    results.add("learner", steps, strength)
    results.add("learner_rising", *relu_learner(config, prior, W * rising.repeat(2), circle)[:2])
    results.lap("learners")

    # the Meta-Learner's outer loop; then a second one goes on from its weights with the upper half
    # of the band alone (from new weights it would take as long again)
    model, bandpass_model = new_meta_learner(config, prior), new_meta_learner(config, bandpass)
    predictors = dict(prior=tasks.Prior(), meta=model, bayes=tasks.Bayes(prior))
    outer_loop(config, prior, W, predictors, results, folder / "checkpoint.pt")
    bandpass_model.load_state_dict(model.state_dict())
    shorter = replace(config, outer_steps=config.bandpass_steps)
    train(shorter, bandpass, bandpass_model, folder / "checkpoint_bandpass.pt")
    results.lap("outer_loop")

    # what Meta-Learner and Bayes learn within the same episodes
    inner_loops(config, prior, W, predictors, results)

    # one clock: Learners on the first t trials of an episode, for each t
    few, grid = W[:config.clock_tasks], prior.queries()
    trials, x, y = clock(config, prior, few, (2, 4, 6, 8, 10, 14, 20, 30))
    f = learners.relu_network_by_trial(
        x, y, trials, grid[:, 0], config.learner_lr, config.clock_steps, config.learner_hidden,
        config.learner_layers, stream(config, "learners"))                       # (Q, N, E, G)
    target = (prior.features(grid) @ few.mT).mT                                     # (N, 1, G)
    strength, _ = tasks.fourier_strength(f, target, prior.frequencies)
    results.add("learner_by_trial", trials, strength)

    # out of distribution: signals of each half of the band, and of as much above it
    predictors["meta_bandpass"] = bandpass_model
    predictors["bayes_bandpass"] = tasks.Bayes(bandpass)
    results["passband"] = [[1, config.frequencies], [upper[0], config.frequencies]]
    rows = []
    for band in lower, upper, above:
        source = task_distribution(band)
        rows += out_of_distribution(config, f"{band[0]} to {band[-1]}", source,
                                    evaluation_tasks(source), predictors, first_mode=band[0])
    results["ood"] = np.rec.fromrecords(rows, names=OOD)

    # the first task: what its first Learner and the first of its episodes make of it
    _, _, x, y = prior.evaluation_episodes(W[:1], config.eval_episodes, stream(config, "probe"))
    x, y = x[0, :1], y[0, :1]
    _, P = predictors["bayes"].posterior(x, y)
    features = prior.features(circle.double())
    results["fits/x"] = circle[:, 0]
    results["fits/target"] = (prior.features(circle) @ W[0].mT)[:, 0]
    results["fits/data"] = torch.cat([x[0], y[0]], 1)
    results["fits/steps"] = steps
    results["fits/learner"] = functions[:, 0, 0]
    results["fits/meta"] = model.query(x, y, circle)[0, ..., 0]
    results["fits/bayes"] = predictors["bayes"].query(x, y, circle)[0, ..., 0]
    results["fits/deviation"] = ((features @ P[0]) * features).sum(-1).clamp_min(0).sqrt()
    results.lap("probes")
    return results

def bandit(config, folder):
    """Contextual bandits: the correct action in each context, against Schaul et al. 2019."""
    results = Results(modes=[f"context {c + 1}" for c in range(config.contexts)], limit=1.0,
                      actions=config.actions)
    prior = tasks.ContextualBandit(config.contexts, config.actions, config.trials)
    correct = prior.evaluation_tasks(config.eval_tasks, stream(config, "evaluation"))

    # Learners: one bias for all contexts or one for each; near-uniform and spread-out starts
    near, spread, steps = config.learner_sd, 1.0, config.learner_steps
    results.add("learner", *bandit_learner(config, prior, correct, near, steps, shared=True))
    results.add("decoupled", *bandit_learner(config, prior, correct, near, steps, shared=False))
    results.add("spread", *bandit_learner(config, prior, correct, spread, 4 * steps, shared=True))
    results.add("decoupled_spread",
                *bandit_learner(config, prior, correct, spread, 4 * steps, shared=False))

    # one clock: a Learner with one trial a step, in an episode as long as its steps
    online = learners.OnlineLearner(config.learner_lr, near, stream(config, "online"))
    longer = tasks.ContextualBandit(config.contexts, config.actions, steps)
    episodes = longer.evaluation_episodes(correct, config.learner_starts, stream(config, "probe"))
    strength, _ = longer.inner_loop(online, *episodes)
    seen = meta.spaced_steps(1, steps, 120)
    results.add("online", torch.tensor(seen), strength[seen])
    results.lap("learners")

    # the Meta-Learner's outer loop
    model = new_meta_learner(config, prior, meta.MetaAgent)
    agents = dict(prior=tasks.UniformAgent(), meta=model, bayes=tasks.BayesAgent())
    outer_loop(config, prior, correct, agents, results, folder / "checkpoint.pt")
    results.lap("outer_loop")

    # what Meta-Learner and Bayes learn within the same episodes
    ordered = dict(bayes_ordered=tasks.OrderedBayesAgent())
    inner_loops(config, prior, correct, agents | ordered, results)
    results.add_theory("bayes", lambda t: prior.strength(prior.bayes_curve()))

    # interference: is a context held up by others that are solved, or helped by a shared answer?
    for system, agent in dict(online=online, meta=model, bayes=agents["bayes"]).items():
        episodes = fresh_episodes(config, prior)
        results[f"visits/{system}"] = tasks.visit_clock(prior, agent, episodes)     # (A - 1, C)
    sharing = tasks.shared_answers(correct)
    for system in "learner", "decoupled", "online", "meta", "bayes":
        strength, time = results.tensors(f"{system}/strength", f"{system}/time")
        half = learners.half_time(strength.mean(2), time)                           # (N, C)
        results[f"sharing/{system}"] = [learners.geometric_mean(half[sharing == n])
                                        for n in range(1, config.contexts + 1)]     # (C,)

    # out of distribution: contexts at unequal rates
    halving = [2.0 ** -c for c in range(config.contexts)]
    unequal = tasks.ContextualBandit(config.contexts, config.actions, config.trials, halving)
    results["rates"] = unequal.rates
    rows = out_of_distribution(config, "equal rates", prior, correct, agents)
    rows += out_of_distribution(config, "unequal rates", unequal, correct, agents)
    results["ood"] = np.rec.fromrecords(rows, names=OOD)
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
    ood                                                a table with the columns of ood.csv
    probe/*, sharing/*, visits/*, map/*, fits/*        what one family alone measures
    Of a complete run also, as attributes: config, folder, and summary, the numbers of summary.json
    with inf and nan where the file has null. Prints as a table.
    """

    def __init__(self, **arrays):
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
        time, = self.tensors(f"{system}/time")
        self.add(f"{system}_theory", time, closed_form(time)[:, None, None])

    def lap(self, phase):
        """Notes the seconds since the last lap as those of a phase."""
        self[f"seconds/{phase}"] = round(time.perf_counter() - self.begun, 2)
        self.begun = time.perf_counter()

    def tensors(self, *names):
        """Arrays as tensors."""
        return [torch.from_numpy(self[name]) for name in names]

    def under(self, prefix):
        """Arrays whose name begins with prefix/, as lists or numbers, by the rest of the name."""
        start = prefix + "/"
        return {name[len(start):]: self[name].tolist() for name in self if name.startswith(start)}

    def systems(self):
        """The names of all systems, in the order in which they were measured."""
        return [name.removesuffix("/time") for name in self if name.endswith("/time")]

    def curve(self, system):
        """A system's time (R,), its strengths averaged over repeats, then over tasks (R, K), and
        their standard errors over tasks (R, K); 0 for a single task."""
        strength = self[f"{system}/strength"].mean(2)
        n = strength.shape[1]
        stderr = strength.std(1, ddof=min(1, n - 1)) / n ** 0.5
        return self[f"{system}/time"], strength.mean(1), stderr

    def __repr__(self):
        return printed(self.summary)

def linear_learner(config, W, start, optimizer, lr, steps, starts):
    """Linear networks, several of each task W (N, d, d): steps (R,), strengths (R, N, E, K)."""
    target = W.double()[:, None].expand(-1, starts, -1, -1)
    steps, maps = learners.linear_network(
        target, lr, steps, start, config.learner_scale, optimizer, every=max(1, steps // 400),
        generator=stream(config, "learners"))
    return steps, tasks.mode_strength(maps, *tasks.singular_modes(target))

def relu_learner(config, prior, W, circle):
    """ReLU networks, several of each task W (N, 1, 2 K), on points of the circle (G, 1): steps
    (R,), strengths (R, N, E, K), the functions learned (R, N, E, G)."""
    target = (prior.features(circle) @ W.mT).mT.expand(-1, config.learner_starts, -1)
    steps, f = learners.relu_network(
        circle[:, 0].expand(target.shape), target, config.learner_lr, config.learner_steps,
        config.learner_hidden, config.learner_layers, every=max(1, config.learner_steps // 200),
        generator=stream(config, "learners"))
    strength, _ = tasks.fourier_strength(f, target, prior.frequencies)
    return steps, strength, f

def bandit_learner(config, prior, correct, sd, steps, shared):
    """Policy-gradient Learners, several of each task (N, C), each with names of actions and a start
    of its own: steps (R,), strengths (R, N, E, C)."""
    generator = stream(config, "learners")
    renamed = prior.rename(correct, config.learner_starts, generator)
    logits = sd * torch.randn(*renamed.shape, config.actions, generator=generator)
    record = meta.spaced_steps(1, steps, 120)
    J = learners.policy_gradient(renamed, logits, config.learner_lr, record, shared)
    return torch.tensor(record), prior.strength(J)

def clock(config, prior, W, wanted):
    """For Learners whose clock is trials: the numbers of trials at which to look (Q,), 0, those
    wanted that an episode has, and its last; and the first of the episodes that the Meta-Learner
    sees of each task W (N, ...): x, y (N, E, T, D)."""
    trials = [0, *(t for t in wanted if t < config.trials), config.trials]
    probe = stream(config, "probe")
    _, _, x, y = prior.evaluation_episodes(W, config.eval_episodes, probe)
    return torch.tensor(trials), x[:, :config.clock_episodes], y[:, :config.clock_episodes]

def new_meta_learner(config, prior, kind=meta.MetaLearner):
    """An untrained Meta-Learner. kind: meta.MetaAgent for a bandit."""
    return kind(prior, config.hidden, config.layers, stream(config, "initialisation"),
                config.core, config.encoder).to(config.device)

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

    optimizers = meta.make_optimizers(model, config.outer_optimizer, config.muon_lr, config.adam_lr)
    return meta.outer_loop(model, loss, config.outer_steps, optimizers, stream(config, "tasks"),
                           path, asdict(config), snapshot, report)

def outer_loop(config, prior, targets, predictors, results, path, controls=None):
    """Trains the Meta-Learner of a family, looking from time to time at what its inner loop has
    learned of the evaluation tasks, and of control tasks, at the last trial."""
    fresh = fresh_episodes(config, prior)
    bounds = [prior.score(predictors[system], *fresh).mean() for system in ("prior", "bayes")]
    some = [part[:256] for part in fresh]
    few = min(4, config.eval_episodes)
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
            results[f"probe/{system}_{name}"] = reading.mean(1)                     # (T + 1,)

OOD = "system,condition,mode,strength,value"              # columns of ood.csv

def out_of_distribution(config, condition, prior, targets, predictors, first_mode=1):
    """What each predictor has learned of targets that come from another prior at the last trial,
    and its mean loss, or reward, on them: rows of ood.csv."""
    few = min(16, config.eval_episodes)
    episodes = prior.evaluation_episodes(targets, few, stream(config, "ood"))
    fresh = prior.episodes(targets.repeat_interleave(few, 0), stream(config, "ood"))
    rows = []
    for system, predictor in predictors.items():
        strength, _ = prior.inner_loop(predictor, *episodes)
        value = prior.score(predictor, *fresh).mean().item()
        for k, last in enumerate(strength[-1].mean((0, 1)).tolist(), first_mode):
            rows.append((system, condition, k, last, value))
    return rows

# ---------------------------------------------------------------- numbers, from the arrays alone
def summarise(results):
    """The numbers of summary.json. inf is a mode that is not reached, nan what is undefined."""
    systems = {}
    for system in results.systems():
        strength, time = results.tensors(f"{system}/strength", f"{system}/time")
        systems[system] = learners.describe(strength, time)
    losses = results.tensors("performance/prior", "performance/meta", "performance/bayes")
    captured, *captured_ci = learners.captured_fraction(*(each.mean(1) for each in losses))
    limit = float(results["limit"])
    _, meta_above, bayes_above = (each[:, -1].mean() - limit for each in losses)
    both = results.tensors("meta/strength", "bayes/strength", "meta/time")
    strength, step = results.tensors("outer_loop/strength", "outer_loop/step")
    outer_loop = learners.describe(strength, step)
    if "outer_loop/equal" in results:
        equal, = results.tensors("outer_loop/equal")
        outer_loop["equal_half_times"] = learners.half_time(equal, step).tolist()
    value = {(row["system"], row["condition"]): float(row["value"]) for row in results["ood"]}
    ood_captured = {}                                     # says little where Bayes gains nothing
    for condition in dict.fromkeys(results["ood"]["condition"].tolist()):
        never, learned, bayes = (value[system, condition] for system in ("prior", "meta", "bayes"))
        gain = never - bayes
        ood_captured[condition] = (never - learned) / gain if gain else math.nan
    more = {name: results.under(name) for name in ("probe", "sharing", "visits", "seconds")}
    return dict(systems=systems, captured=captured, captured_ci=captured_ci,
                last_excess=(meta_above / bayes_above).item(), ood_captured=ood_captured,
                follows_bayes=learners.follows(*both).tolist(), outer_loop=outer_loop, **more)

def shown(value):
    """A number as a person reads it; "-" where it is undefined or a mode is not reached."""
    if not math.isfinite(value):
        return "-"
    digits = 2 if abs(value) < 9.995 else 1 if value < 99.95 else 0
    return f"{round(value, digits) + 0:.{digits}f}"       # + 0: never -0.00

def printed(summary):
    """A summary as a table to print."""
    lines = ["Half-time of each mode; index: latest over earliest, of averages over repeats, and",
             "within a repeat; order: how alike repeats are, 1 the same order, 0 one by chance", ""]
    modes = range(1, len(summary["follows_bayes"]) + 1)
    head = "".join(f"{k:6}" for k in modes)
    lines.append(f"{'':32}{head}  index [95% CI]      within  order")
    for system, row in summary["systems"].items():
        unit = "trials" if system in plots.COUNT_TRIALS else "steps"
        half = "".join(f"{shown(t):>6}" for t in row["half_times"])
        low, high = map(shown, row["staggering_ci"])
        index = f"{shown(row['staggering']):>5} [{low}, {high}]"
        lines.append(f"{f'{plots.NAMES[system]} ({unit})':32}{half}  {index:19}"
                     f"{shown(row['within']):>7}{shown(row['order']):>7}")
    low, high = summary["captured_ci"]
    follows = " ".join(map(shown, summary["follows_bayes"]))
    return "\n".join([*lines, "", f"Captured fraction κ = {summary['captured']:.3f} "
                      f"[{low:.3f}, {high:.3f}]; half-times follow those of Bayes: {follows}"])

def numbers(summary):
    """The numbers by which runs are compared, by (system, measure)."""
    found = {}
    systems = dict(summary["systems"], outer_loop=summary["outer_loop"])
    for system, row in systems.items():
        for measure in "staggering", "within", "order":
            found[system, measure] = row[measure]
    found["meta", "captured"] = summary["captured"]
    found["meta", "last_excess"] = summary["last_excess"]
    for condition, captured in summary["ood_captured"].items():
        found["meta", f"captured of {condition}"] = captured
    lists = {("meta", "follows_bayes"): summary["follows_bayes"]}
    for system, row in systems.items():
        lists[system, "half_time"] = row["half_times"]
    lists["control", "half_time"] = summary["outer_loop"].get("equal_half_times", [])
    for system, half_times in summary["sharing"].items():
        lists[system, "half_time_if_shared_by"] = half_times
    for system, chances in summary["visits"].items():
        for visit, by_solved in enumerate(chances, 1):
            lists[system, f"success_at_visit_{visit}_with_others_solved"] = by_solved
    for (system, measure), values in lists.items():
        for k, value in enumerate(values, 1):
            found[system, f"{measure}_{k}"] = value
    return found

def compare(runs, folder):
    """Writes what several runs say together: overview.csv, every number of each seed, with median,
    range and standard error; and the figure overview, of the first seed. Returns the same as text,
    for the three systems.

    runs: lists of results, one a seed, by family.
    """
    rows, lines = [], [f"{'':38}median over seeds [lowest, highest]"]
    for family, several in runs.items():
        by_seed = [numbers(results.summary) for results in several]
        for system, measure in by_seed[0]:
            values = [found[system, measure] for found in by_seed]
            median, low, high = np.median(values), min(values), max(values)
            several_finite = len(values) > 1 and np.isfinite(values).all()
            stderr = np.std(values, ddof=1) / len(values) ** 0.5 if several_finite else math.nan
            rows.append((family, system, measure, median, low, high, stderr, *values))
            if system in plots.THREE and measure in ("captured", "staggering", "within", "order"):
                lines.append(f"{family:10} {system:16} {measure:10} {shown(median):>5} "
                             f"[{shown(low)}, {shown(high)}]")
    seeds = [f"seed{results.config.seed}" for results in several]
    columns = "family", "system", "measure", "median", "low", "high", "stderr", *seeds
    write_csv(folder / "overview.csv", columns, rows)
    plots.overview({family: several[0] for family, several in runs.items()}, folder / "overview")
    return "\n".join(lines)

# ---------------------------------------------------------------- files of a run
class Mistake(ValueError):
    """A mistake by the user, told in one line: the option, what was given and what is allowed."""

    def __init__(self, option, given, allowed):
        super().__init__(f"{option}: {given} given, allowed: {allowed}")

def prepare(family, out, quick, fresh, settings):
    """The config of a run and its folder, with config.json in it: written now, or compared with
    this run's settings. `fresh` forgets the run that is there. Raises Mistake, meta.Unreadable."""
    config, folder = configure(family, quick, settings), Path(out)
    path = folder / "config.json"
    wanted = json.loads(json.dumps(dict(family=family, **asdict(config))))
    versions = {module.__name__: module.__version__ for module in (torch, np, matplotlib)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            for file in path, folder / "results.npz", *folder.glob("checkpoint*.pt"):
                file.unlink(missing_ok=True)
        if not path.exists():
            text = json.dumps(dict(wanted, versions=versions), indent=1)
            meta.replace_file(path, text.encode())
    except OSError as error:
        raise Mistake("--out", folder, f"a folder that can be written ({error.strerror})") from None
    there = meta.read(path, lambda path: dict(json.loads(path.read_text())))
    for name, value in wanted.items():
        if there.get(name) != value:
            raise Mistake("--out", f"{folder}, which holds a run with other settings ({name} "
                          f"{there.get(name)} there, {value} here),",
                          "another folder, or --fresh to replace the run that is there")
    return config, folder

def load(path):
    """The results in results.npz."""
    with np.load(path) as arrays:
        return Results(**arrays)

def save(path, results):
    """Writes results.npz, atomically."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **results)
    meta.replace_file(path, buffer.getvalue())

def write_csv(path, columns, rows):
    """Writes rows of numbers and words under the names of their columns, atomically."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    meta.replace_file(path, text.getvalue().encode())

def mode_by_mode(time, *curves):
    """Rows (mode, time, value of each curve) of curves (R, K) at times (R,); modes count from 1."""
    return [(k + 1, t, *values) for k, of_mode in enumerate(zip(*(curve.T for curve in curves)))
            for t, *values in zip(time, *of_mode)]

def write_tables(results, folder):
    """Writes summary.json and the CSV files, for people: nothing reads them back."""
    dynamics, performance = [], []
    for system in results.systems():
        dynamics += [(system, *row) for row in mode_by_mode(*results.curve(system))]
    for system in "prior", "meta", "bayes":
        values = results[f"performance/{system}"]
        stderr = values.std(0, ddof=1) / len(values) ** 0.5
        rows = zip(range(len(stderr)), values.mean(0), stderr)
        performance += [(system, *row) for row in rows]
    strength = results["outer_loop/strength"].mean((1, 2))                          # (P, K)
    value = np.repeat(results["outer_loop/value"][:, None], strength.shape[1], 1)
    outer_loop = mode_by_mode(results["outer_loop/step"], strength, results["outer_loop/half_time"],
                              value)
    outer_loop = [(step, mode, *row) for mode, step, *row in outer_loop]
    write_csv(folder / "dynamics.csv", ("system", "mode", "time", "strength", "stderr"), dynamics)
    write_csv(folder / "performance.csv", ("system", "trial", "value", "stderr"), performance)
    write_csv(folder / "outer_loop.csv",
              ("outer_step", "mode", "strength", "half_time", "value"), outer_loop)
    write_csv(folder / "ood.csv", results["ood"].dtype.names, results["ood"].tolist())
    # JSON has no inf and no nan: null
    numbers = json.loads(json.dumps(results.summary), parse_constant=lambda name: None)
    meta.replace_file(folder / "summary.json", json.dumps(numbers, indent=1).encode())

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
    out = out or Path("runs") / family
    return carry_out(family, *prepare(family, out, quick, fresh, settings))

def carry_out(family, config, folder):
    """Runs, resumes or, where it is complete, redraws an experiment. Returns its results."""
    _, experiment, draw = FAMILIES[family]
    path = folder / "results.npz"
    if path.exists():
        results = meta.read(path, load)
        print(f"{folder} is complete: drawn again; --fresh measures again", file=sys.stderr)
    else:
        meta.keep_freed_memory()
        results = experiment(config, folder)
        save(path, results)
    results.config, results.folder, results.summary = config, folder, summarise(results)
    write_tables(results, folder)
    draw(results, results.summary, folder)
    return results

def configure(family, quick, settings):
    """A family's config: its defaults, those of a choice like --quick, the settings given. Raises
    Mistake."""
    if family not in FAMILIES:
        raise Mistake("FAMILY", family, ", ".join(FAMILIES))
    defaults = dict(QUICK[family] if quick else {})
    if settings.get("core") == "attention":
        defaults.update(ATTENTION)
    if settings.get("outer_optimizer") == "adam":
        defaults.update(ADAM)
    config = FAMILIES[family][0](**defaults | settings)
    for setting in fields(config):
        check(setting, getattr(config, setting.name))
    config.device = resolve_device(config.device)
    if config.core == "attention" and config.hidden % 4:
        raise Mistake("--hidden", config.hidden, "a multiple of 4, for attention has 4 heads")
    if family == "linreg":
        config.singular_values = sorted(config.singular_values, reverse=True)
        if len(config.singular_values) != config.dim:
            raise Mistake("--singular-values", len(config.singular_values),
                          f"as many as --dim, {config.dim}")
    return config

def check(setting, given):
    """Raises Mistake if a field of a config was given what its rules do not allow."""
    name, rules = "--" + setting.name.replace("_", "-"), setting.metadata
    if rules["choices"]:
        if given not in rules["choices"]:
            raise Mistake(name, given, ", ".join(rules["choices"]))
        return
    for value in given if typing.get_args(setting.type) else [given]:
        if not rules["low"] <= value < math.inf:
            least = "more than 0" if rules["low"] == TINY else f"at least {rules['low']}"
            raise Mistake(name, value, f"{least} and finite")

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
    for family in *FAMILIES, "all":
        config = Config if family == "all" else FAMILIES[family][0]
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

def main(arguments=None):
    """Runs the command line. Returns the exit status: 0, 1 for a failure, 2 for a user's mistake,
    130 for Ctrl-C."""
    try:
        command = vars(make_parser().parse_args(arguments))
        runs, out = {}, command["out"]
        for family, jobs in plan(**command).items():
            runs[family] = [carry_out(family, *job) for job in jobs]
            print(f"\n{runs[family][0]}\nFigures and tables: {runs[family][0].folder}")
        if command["family"] == "all" or command["seeds"] > 1:
            print(f"\n{compare(runs, out)}\nFigures and tables: {out}")
        return 0
    except (Mistake, meta.Unreadable, argparse.ArgumentError) as mistake:
        print("metadyn.py:", mistake, file=sys.stderr)
        return 2
    except (FloatingPointError, OSError) as error:
        print(f"\nmetadyn.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nmetadyn.py: stopped; the same command, without --fresh, goes on from the last "
              "checkpoint", file=sys.stderr)
        return 130

def plan(family, out, quick, fresh, seeds, **settings):
    """The runs that a command asks for, all checked before the first begins: by family a list of
    (config, folder), one a seed. Raises Mistake."""
    if seeds < 1:
        raise Mistake("--seeds", seeds, "at least 1")
    first, jobs = settings.get("seed", 0), {}
    for name in FAMILIES if family == "all" else [family]:
        folder = out / name if family == "all" else out
        jobs[name] = [prepare(name, folder, quick, fresh, settings)]
        for seed in range(first + 1, first + seeds):
            other = dict(settings, seed=seed)
            jobs[name].append(prepare(name, folder / f"seed{seed}", quick, fresh, other))
    return jobs

if __name__ == "__main__":
    sys.exit(main())
