r"""metadyn: how structure is learned, by Learners, Meta-Learners and Bayes-optimal inference.

    python metadyn.py linreg                 # the experiment; pictures and table in runs/linreg
    python metadyn.py linreg --quick         # a small task of the same kind, in half a minute
    python metadyn.py linreg --help          # every setting with its default and unit
    python metadyn.py all --seeds 5          # three families, each over five seeds; an overview

    results = metadyn.run("linreg", quick=True, out="runs/quick")             # from Python
    time, strength, stderr = results.curve("meta")       # (R,), (R, K), (R, K), ready to plot

In this file: settings; three experiments, each to be read straight down; the steps that they share;
from a command to results. Rabinowitz 2019, arXiv 1905.01320. Left out: sweeps, logging services.
"""
import argparse
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
    return field(default=default, metadata=dict(help=help, low=low, choices=choices))

TINY = 1e-9                                               # "more than 0"

@dataclass
class Config:
    """Settings that all families share."""
    seed: int = option(0, "seed of all random streams")
    device: str = option("auto", "of the Meta-Learner", choices=["auto", "cpu", "cuda", "mps"])
    core: str = option("lstm", "the Meta-Learner's core", choices=["lstm", "attention"])
    hidden: int = option(128, "units of the Meta-Learner's core", 1)
    layers: int = option(2, "layers of the core", 1)
    encoder: int = option(0, "ReLU units before the core, 0 for none")
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
    singular_values: tuple[float, ...] = option(
        (1.6, 1.2, 0.9, 0.6, 0.3), "of the maps that are the evaluation tasks", TINY)
    noise: float = option(0.1, "standard deviation of the noise on y")
    trials: int = option(20, "trials in an episode", 2)
    learner_lr: float = option(0.01, "the Learner's step size (1 / tau)", TINY)
    learner_steps: int = option(3000, "the Learner's gradient steps", 1)
    learner_scale: float = option(1e-3, "strength of each mode in the map at the start", TINY)
    learner_starts: int = option(8, "random starts of each task", 1)
    eval_episodes: int = option(512, "episodes of each evaluation task", 2)
    clock_tasks: int = option(4, "tasks of the Learner whose clock is trials", 1)
    clock_episodes: int = option(128, "episodes of each of them", 2)
    clock_steps: int = option(1000, "its gradient steps for each number of trials", 1)
    scales: tuple[float, ...] = option(
        (0.25, 0.5, 1, 2, 4, 8), "of spectra out of distribution", TINY)

@dataclass
class Nonlinreg(Config):
    """Nonlinear regression: the frequencies of a function on the circle."""
    frequencies: int = option(5, "how many frequencies: the prior has 1 ... K", 2)
    noise: float = option(0.1, "standard deviation of the noise on y")
    trials: int = option(40, "trials in an episode", 2)
    encoder: int = option(32, "ReLU units before the core, 0 for none")
    muon_lr: float = option(0.08, "peak learning rate of Muon, on the core's matrices", TINY)
    outer_steps: int = option(3100, "updates of the Meta-Learner's weights", 1)
    bandpass_steps: int = option(400, "further ones, of half the batch, on the upper band", 1)
    eval_tasks: int = option(8, "evaluation tasks, the same for every system", 2)
    learner_lr: float = option(3e-3, "the Learner's learning rate (Adam)", TINY)
    learner_steps: int = option(800, "the Learner's gradient steps", 1)
    learner_hidden: int = option(64, "units in each of the Learner's layers", 1)
    learner_layers: int = option(4, "the Learner's hidden layers", 1)
    learner_starts: int = option(8, "random starts of each task", 1)
    clock_episodes: int = option(4, "episodes of each task for a Learner with a clock of trials", 2)

@dataclass
class Bandit(Config):
    """Contextual bandits: the correct action in each context."""
    contexts: int = option(5, "contexts", 1)
    actions: int = option(5, "actions in each context", 2)
    trials: int = option(60, "trials in an episode", 2)
    hidden: int = option(96, "units of the Meta-Learner's core", 1)
    layers: int = option(1, "layers of the core", 1)
    batch: int = option(256, "episodes in an outer step", 1)
    outer_steps: int = option(1000, "updates of the Meta-Learner's weights", 1)
    entropy: float = option(0.02, "weight of the entropy bonus at first, falling to zero")
    learner_lr: float = option(0.5, "the Learner's step size", TINY)
    learner_steps: int = option(2000, "the Learner's gradient steps, and trials online", 2)
    learner_starts: int = option(64, "random starts of each task", 1)
    learner_sd: float = option(0.1, "standard deviation of the first logits (near-uniform)")

ADAM = dict(adam_lr=0.003)                                # where --outer-optimizer adam differs
ATTENTION_RATES = dict(muon_lr=0.02, adam_lr=0.003)       # where --core attention differs, and by
ATTENTION = dict(                                         # family (steps: 1.2 to 1.3 LSTM's time)
    linreg=dict(outer_steps=2600), nonlinreg=dict(outer_steps=2000, encoder=128),
    bandit=dict(outer_steps=260))
QUICK = dict(                                             # where --quick differs
    linreg=dict(dim=2, singular_values=(1.4, 0.5), trials=8, hidden=48, layers=1, batch=64,
                outer_steps=1000, adam_lr=0.03, learner_steps=1500, clock_episodes=64),
    nonlinreg=dict(frequencies=2, trials=15, hidden=48, layers=1, batch=64, outer_steps=900,
                   bandpass_steps=100, muon_lr=0.1, adam_lr=0.03, eval_episodes=256,
                   learner_steps=400, learner_starts=2),
    bandit=dict(contexts=4, actions=4, trials=24, hidden=64, batch=128, outer_steps=500,
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
    trials, x, y = clock(config, prior, few)
    steps, maps = learners.linear_network_by_trial(
        x, y, trials, config.clock_steps, config.learner_scale, stream(config, "learners"))
    U, V, s = (part.float()[:, None] for part in tasks.singular_modes(few))
    strength = tasks.mode_strength(maps, U, V, s)                                # (R, Q, N, E, K)
    results.add("learner_by_trial", trials, strength[-1])
    results["map/steps"] = steps
    results["map/strength"] = strength.mean((2, 3))                                 # (R, Q, K)
    results["map/index"] = [learners.describe(s, trials)["staggering"] for s in strength]

    # out of distribution: smaller and larger maps than the prior's
    for scale in config.scales:
        out_of_distribution(config, f"{scale:g}", prior, scale * W, predictors, results)
    results.lap("probes")
    return results

def nonlinreg(config, folder):
    """Nonlinear regression: the frequencies of a function, against Rahaman et al. 2018."""
    results = Results(modes=[f"k = {k + 1}" for k in range(config.frequencies)],
                      limit=config.noise ** 2)
    low_pass = range(1, config.frequencies + 1)
    lower, upper = low_pass[:config.frequencies // 2], low_pass[config.frequencies // 2:]
    above = range(config.frequencies + 1, 2 * config.frequencies + 1)

    prior = tasks.FourierRegression(low_pass, config.noise, config.trials)
    bandpass = tasks.FourierRegression(upper, config.noise, config.trials)
    W = prior.evaluation_tasks(config.eval_tasks, stream(config, "evaluation"))

    # Learners: on targets of flat amplitude and of rising amplitude, of the same power
    circle = torch.arange(64)[:, None] / 64
    rising = torch.arange(1.0, config.frequencies + 1)
    rising = rising / rising.square().mean().sqrt()
    steps, strength, functions = relu_learner(config, prior, W, circle)
    results.add("learner", steps, strength)
    results.add("learner_rising", *relu_learner(config, prior, W * rising.repeat(2), circle)[:2])
    results.lap("learners")

    # the Meta-Learner's outer loop; a second one goes on from its weights with the upper band alone
    model, bandpass_model = new_meta_learner(config, prior), new_meta_learner(config, bandpass)
    predictors = dict(prior=tasks.Prior(), meta=model, bayes=tasks.Bayes(prior))
    outer_loop(config, prior, W, predictors, results, folder / "checkpoint.pt")
    bandpass_model.load_state_dict(model.state_dict())
    shorter = replace(config, outer_steps=config.bandpass_steps, batch=config.batch // 2)
    train(shorter, bandpass, bandpass_model, folder / "checkpoint_bandpass.pt")
    results.lap("outer_loop")

    # what Meta-Learner and Bayes learn within the same episodes
    inner_loops(config, prior, W, predictors, results)

    # one clock: Learners on the first t trials of an episode, for each t
    trials, x, y = clock(config, prior, W)
    grid = prior.queries()
    f = learners.relu_network_by_trial(
        x, y, trials, grid[:, 0], config.learner_lr, config.learner_steps, config.learner_hidden,
        config.learner_layers, stream(config, "learners"))                       # (Q, N, E, G)
    target = (prior.features(grid) @ W.mT).mT                                       # (N, 1, G)
    strength, _ = tasks.fourier_strength(f, target, prior.frequencies)
    results.add("learner_by_trial", trials, strength)

    # out of distribution: signals of each half of the band, and of as much above it
    predictors["meta_bandpass"] = bandpass_model
    predictors["bayes_bandpass"] = tasks.Bayes(bandpass)
    results["passband"] = [[1, config.frequencies], [upper[0], config.frequencies]]
    for band in lower, upper, above:
        other = tasks.FourierRegression(band, config.noise, config.trials)
        signals = other.evaluation_tasks(config.eval_tasks, stream(config, "evaluation"))
        out_of_distribution(config, f"{band[0]} to {band[-1]}", other, signals, predictors, results,
                            first_mode=band[0])

    # the first task: what its first Learner and the first of its episodes make of it
    _, _, x, y = prior.evaluation_episodes(W[:1], config.eval_episodes, stream(config, "probe"))
    x, y = x[0, :1], y[0, :1]
    _, P = predictors["bayes"].posterior(x, y)
    features = prior.features(circle.double())
    results["fits/x"] = circle[:, 0]
    results["fits/target"] = (prior.features(circle) @ W[0].mT)[:, 0]
    results["fits/data"] = torch.cat([x[0], y[0]], 1)
    results["fits/learner"] = functions[:, 0, 0]
    results["fits/meta"] = model.query(x, y, circle)[0, ..., 0]
    results["fits/bayes"] = predictors["bayes"].query(x, y, circle)[0, ..., 0]
    results["fits/deviation"] = ((features @ P[0]) * features).sum(-1).clamp_min(0).sqrt()
    results.lap("probes")
    return results

def bandit(config, folder):
    """Contextual bandits: the correct action in each context, against Schaul et al. 2019."""
    results = Results(modes=[f"context {c + 1}" for c in range(config.contexts)], limit=1.0)
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
        strength, time = (torch.from_numpy(results[f"{system}/{name}"])
                          for name in ("strength", "time"))
        half = learners.half_time(strength.mean(2), time)                           # (N, C)
        results[f"sharing/{system}"] = [learners.geometric_mean(half[sharing == n])
                                        for n in range(1, config.contexts + 1)]     # (C,)

    # out of distribution: contexts at unequal rates
    halving = [2.0 ** -c for c in range(config.contexts)]
    unequal = tasks.ContextualBandit(config.contexts, config.actions, config.trials, halving)
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
    ood                                                a table with the columns of ood.csv
    probe/*, sharing/*, visits/*, map/*, fits/*        what one family alone measures
    Of a complete run also, as attributes: config, folder, and summary, which the table printed and
    summary.json show; it has inf and nan where the file has null.
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
        time = torch.from_numpy(self[f"{system}/time"])
        self.add(f"{system}_theory", time, closed_form(time)[:, None, None])

    def lap(self, phase):
        """Notes the seconds since the last lap as those of a phase."""
        self[f"seconds/{phase}"] = round(time.perf_counter() - self.begun, 2)
        self.begun = time.perf_counter()

    def curve(self, system):
        """A system's time (R,), and its mean strengths with their standard errors, (R, K) each."""
        return plots.curve(self, system)

    def __repr__(self):
        return plots.printed(self.summary)

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

def clock(config, prior, W):
    """For Learners whose clock is trials: the numbers of trials at which to look (Q,), and the
    first of the episodes that the Meta-Learner sees of each task W (N, ...): x, y (N, E, T, D)."""
    trials = torch.tensor(meta.spaced_steps(1, config.trials, 12))
    probe = stream(config, "probe")
    _, _, x, y = prior.evaluation_episodes(W, config.eval_episodes, probe)
    return trials, x[:, :config.clock_episodes], y[:, :config.clock_episodes]

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
    few = min(2, config.eval_episodes)
    episodes = prior.evaluation_episodes(targets, few, stream(config, "snapshots"))
    trials = torch.arange(config.trials + 1.0)

    def snapshot(model):
        """What the outer loop notes at one of its steps."""
        strength, _ = prior.inner_loop(model, *episodes)
        seen = dict(strength=strength[-1].clone(),
                    half_time=learners.half_time(strength.mean((1, 2)), trials),
                    value=prior.score(model, *(part[:256] for part in fresh)).mean())
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
            results[f"probe/{system}_{name}"] = reading                             # (T + 1,)

def out_of_distribution(config, condition, prior, targets, predictors, results, first_mode=1):
    """What each predictor has learned of targets that come from another prior at the last trial,
    and its mean loss, or reward, on them: more rows of results["ood"]."""
    few = min(16, config.eval_episodes)
    episodes = prior.evaluation_episodes(targets, few, stream(config, "ood"))
    fresh = prior.episodes(targets.repeat_interleave(few, 0), stream(config, "ood"))
    rows = results["ood"].tolist() if "ood" in results else []
    for system, predictor in predictors.items():
        strength, _ = prior.inner_loop(predictor, *episodes)
        value = prior.score(predictor, *fresh).mean().item()
        for k, last in enumerate(strength[-1].mean((0, 1)).tolist(), first_mode):
            rows.append((system, condition, k, last, value))
    results["ood"] = np.rec.fromrecords(rows, names="system,condition,mode,strength,value")

# ---------------------------------------------------------------- from a command to its results
FAMILIES = dict(                                          # settings, experiment, figures
    linreg=(Linreg, linreg, plots.linreg),
    nonlinreg=(Nonlinreg, nonlinreg, plots.nonlinreg),
    bandit=(Bandit, bandit, plots.bandit),
)
SHARED = "seed", "device", "core", "outer_steps", "outer_optimizer"        # what `all` passes on

def run(family, out=None, quick=False, fresh=False, **settings):
    """What `python metadyn.py FAMILY` does, in `out`, by default runs/FAMILY. settings: as on the
    command line, with underscores. Returns Results. Raises Mistake (a ValueError), and
    FloatingPointError if learning diverged."""
    return carry_out(family, *prepare(family, out or f"runs/{family}", quick, fresh, settings))

def carry_out(family, config, folder):
    """Runs, resumes or, where it is complete, redraws an experiment. Returns its results."""
    _, experiment, draw = FAMILIES[family]
    path = folder / "results.npz"
    if path.exists():
        results = meta.read(path, lambda path: Results(**np.load(path)))
        print(f"{folder} is complete: drawn again; --fresh measures again", file=sys.stderr)
    else:
        meta.keep_freed_memory()
        results = experiment(config, folder)
        with plots.whole(path) as file:
            np.savez(file, **results)
    results.config, results.folder, results.summary = config, folder, learners.summarise(results)
    write_json(folder / "summary.json", results.summary)
    plots.tables(results, folder)
    draw(results, results.summary, folder)
    return results

def write_json(path, values):
    """Writes numbers and words as JSON, which has no inf and no nan: null."""
    values = json.loads(json.dumps(values), parse_constant=lambda name: None)
    with plots.whole(path) as file:
        file.write_text(json.dumps(values, indent=1))

class Mistake(ValueError):
    """A mistake by the user, told in one line: the option, what was given and what is allowed."""
    def __init__(self, option, given, allowed):
        super().__init__(f"{option}: {given} given, allowed: {allowed}")

def prepare(family, out, quick, fresh, settings):
    """The config of a run and its folder, where config.json holds the same. Raises Mistake,
    meta.Unreadable."""
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
            write_json(path, dict(wanted, versions=versions))
    except OSError as error:
        raise Mistake("--out", folder, f"a folder that can be written ({error.strerror})") from None
    there = meta.read(path, lambda path: dict(json.loads(path.read_text())))
    for name, value in wanted.items():
        if there.get(name) != value:
            found = f"{folder}, a run with {name} {there.get(name)} there, {value} here,"
            raise Mistake("--out", found, "another folder, or --fresh to replace that run")
    return config, folder

def configure(family, quick, settings):
    """A family's config: its defaults, those of a choice like --quick, the settings given. Raises
    Mistake."""
    defaults = QUICK[family] if quick else {}
    if settings.get("core") == "attention":
        defaults = ATTENTION[family] | defaults | ATTENTION_RATES
    if settings.get("outer_optimizer") == "adam":
        defaults = defaults | ADAM
    config = FAMILIES[family][0](**defaults | settings)
    for setting in fields(config):
        name, given = "--" + setting.name.replace("_", "-"), getattr(config, setting.name)
        low, choices = setting.metadata["low"], setting.metadata["choices"]
        if choices and given not in choices:
            raise Mistake(name, given, ", ".join(choices))
        for value in np.atleast_1d([] if choices else given):
            if not low <= value < math.inf:
                least = "more than 0" if low == TINY else f"at least {low}"
                raise Mistake(name, value, f"{least} and finite")
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    devices = [device for device in there if there[device]]
    if config.device == "auto":
        config.device = devices[0]
    if config.device not in devices:
        raise Mistake("--device", config.device, "on this machine " + ", ".join(devices))
    if family == "linreg":
        config.singular_values = sorted(map(float, config.singular_values), reverse=True)
        if len(config.singular_values) != config.dim:
            raise Mistake("--singular-values", len(config.singular_values),
                          f"as many as --dim, {config.dim}")
    return config

# ---------------------------------------------------------------- the command line
class OneLineParser(argparse.ArgumentParser):
    """argparse, with its errors in one line."""
    def error(self, message):
        """Raises argparse.ArgumentError, where argparse prints its usage and exits."""
        raise argparse.ArgumentError(None, message.removeprefix("argument "))

def make_parser():
    """The command line: a subcommand for each family, with an option for each of its settings."""
    parser = OneLineParser(prog="metadyn.py", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    families = parser.add_subparsers(dest="family", required=True, metavar="FAMILY")
    for family in *FAMILIES, "all":
        config = Config() if family == "all" else FAMILIES[family][0]()
        about = "all of them in turn, and an overview" if family == "all" else config.__doc__
        out = Path("runs") / family.removeprefix("all")
        sub = families.add_parser(family, help=about, description=about)
        sub.add_argument("--quick", action="store_true", help="a small task, in half a minute")
        sub.add_argument("--fresh", action="store_true", help="ignore an earlier run there")
        sub.add_argument("--out", type=Path, default=out, help=f"results folder (default: {out})")
        sub.add_argument("--seeds", type=int, default=1, help="how many, from --seed (default: 1)")
        for setting in fields(config):
            if family == "all" and setting.name not in SHARED:
                continue
            rules = setting.metadata
            several = typing.get_args(setting.type)       # of tuple[float, ...]: (float, ...)
            sub.add_argument(
                "--" + setting.name.replace("_", "-"), default=argparse.SUPPRESS,
                type=several[0] if several else setting.type, nargs="+" if several else None,
                metavar="|".join(rules["choices"] or ["X"]),
                help=f"{rules['help']} (default: {getattr(config, setting.name)})")
    return parser

def plan(family, out, quick, fresh, seeds, **settings):
    """The runs of a command, (family, config, folder) each, checked before the first begins."""
    if seeds < 1:
        raise Mistake("--seeds", seeds, "at least 1")
    first, jobs = settings.get("seed", 0), []
    for name in FAMILIES if family == "all" else [family]:
        top = out / name if family == "all" else out
        for seed in range(first, first + seeds):
            folder = top if seed == first else top / f"seed{seed}"
            jobs.append((name, *prepare(name, folder, quick, fresh, dict(settings, seed=seed))))
    return jobs

def main(arguments=None):
    """Runs a command line. Returns 0, 1 for a failure, 2 for a user's mistake, 130 for Ctrl-C."""
    try:
        command = vars(make_parser().parse_args(arguments))
        jobs, runs = plan(**command), {}
        for family, config, folder in jobs:
            results = carry_out(family, config, folder)
            runs.setdefault(family, []).append(results)
            print(f"\n{results}\nFigures and tables: {folder}")
        if len(jobs) > 1:
            print(f"\n{plots.overview(runs, command['out'])}\nFigure and table: {command['out']}")
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

if __name__ == "__main__":
    sys.exit(main())
