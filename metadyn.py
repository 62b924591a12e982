r"""metadyn: how Learners, Meta-Learners and Bayes-optimal inference learn the structure of a task.

    python metadyn.py linreg                 # the experiment; figures and table in runs/linreg
    python metadyn.py linreg --help          # every setting with its default
    python metadyn.py all --seeds 5 --skew 0 1       # families, seeds and skews, and an overview

From Python or a notebook:

    results = metadyn.run("linreg", quick=True, out="runs/quick")

This file holds the settings, the three experiments, the steps that they share, and the command
line. Reference: Rabinowitz 2019, arXiv 1905.01320. It leaves out sweeps and logging services.
"""
import argparse
import csv
import ctypes
import json
import math
import operator
import re
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

import learners
import meta
import plots
import tasks

# ---------------------------------------------------------------- settings
SMALLEST = 1e-9                                           # a lower bound that means "more than 0"

def option(default, help, low=0, choices=None):
    """A setting: its default, its help text, and its valid range (at least `low`), or choices."""
    rules = dict(help=help, low=low, choices=choices)
    return field(default_factory=lambda: default, metadata=rules)

@dataclass
class Config:
    """Settings that all families share."""
    seed: int = option(0, "seed of all random numbers")
    device: str = option("auto", "for the Meta-Learner", choices=["auto", "cpu", "cuda", "mps"])
    core: str = option("lstm", "core of the Meta-Learner", choices=["lstm", "attention"])
    hidden: int = option(128, "units of the core", 1)
    layers: int = option(2, "layers of the core", 1)
    encoder_width: int = option(0, "ReLU units before the core, 0 for none")
    batch: int = option(128, "episodes in an outer step", 1)
    outer_steps: int = option(3600, "updates of the Meta-Learner's weights", 1)
    outer_optimizer: str = option("muon", "optimizer of the outer loop", choices=["muon", "adam"])
    muon_lr: float = option(0.045, "peak learning rate of Muon, for the core's matrices", SMALLEST)
    adam_lr: float = option(0.006, "peak learning rate of Adam, for the rest or for all", SMALLEST)
    skew: float = option(0, "how strongly the task distribution prefers the first modes")
    eval_tasks: int = option(16, "evaluation tasks, the same for every system", 2)
    eval_episodes: int = option(256, "episodes of each evaluation task", 2)
    test_tasks: int = option(4096, "held-out tasks on which κ is measured", 2)
    learner_inits: int = option(8, "initializations of the Learner for each task", 1)

    def __post_init__(self):
        if self.device == "auto":                         # mps has never been run: on request only
            self.device = "cuda" if torch.cuda.is_available() else "cpu"

@dataclass
class Linreg(Config):
    """Linear regression: the singular modes of a linear map."""
    singular_values: list = option([1.6, 1.2, 0.9, 0.6, 0.3], "of the evaluation tasks", SMALLEST)
    noise: float = option(0.1, "standard deviation of the noise on y")
    trials: int = option(20, "trials in an episode", 2)
    learner_lr: float = option(0.02, "step size of the Learner", SMALLEST)
    learner_steps: int = option(1500, "gradient steps of the Learner", 1)
    learner_hidden: int = option(5, "hidden units of the Learner", 1)
    init_scale: float = option(1e-3, "strength of each mode at the start of the Learner", SMALLEST)
    fitted_episodes: int = option(16, "episodes of each task for the fitted Learner", 1)

@dataclass
class Nonlinreg(Config):
    """Nonlinear regression: the frequencies of a function on the circle."""
    frequencies: int = option(5, "the task distribution has frequencies 1 to this", 2)
    noise: float = option(0.1, "standard deviation of the noise on y")
    trials: int = option(40, "trials in an episode", 2)
    encoder_width: int = option(64, "ReLU units before the core, 0 for none")
    muon_lr: float = option(0.06, "peak learning rate of Muon, for the core's matrices", SMALLEST)
    adam_lr: float = option(0.005, "peak learning rate of Adam, for the rest or for all", SMALLEST)
    outer_steps: int = option(3000, "updates of the Meta-Learner's weights", 1)
    eval_tasks: int = option(8, "evaluation tasks, the same for every system", 2)
    learner_lr: float = option(3e-3, "learning rate of the Learner (Adam)", SMALLEST)
    learner_steps: int = option(800, "gradient steps of the Learner", 1)
    learner_hidden: int = option(64, "units in each of the Learner's four hidden layers", 1)
    online_steps: int = option(8000, "trials of the online Learner, one a step", 1)
    fitted_episodes: int = option(12, "episodes of each task for the fitted Learner", 1)

@dataclass
class Bandit(Config):
    """Contextual bandits: the correct action in each context."""
    contexts: int = option(5, "contexts", 1)
    actions: int = option(5, "actions in each context", 2)
    trials: int = option(60, "trials in an episode", 2)
    hidden: int = option(96, "units of the core", 1)
    layers: int = option(1, "layers of the core", 1)
    batch: int = option(256, "episodes in an outer step", 1)
    outer_steps: int = option(1000, "updates of the Meta-Learner's weights", 1)
    muon_lr: float = option(0.05, "peak learning rate of Muon, for the core's matrices", SMALLEST)
    adam_lr: float = option(0.02, "peak learning rate of Adam, for the rest or for all", SMALLEST)
    eval_tasks: int = option(64, "evaluation tasks, the same for every system", 2)
    entropy: float = option(0.02, "initial weight of the entropy bonus, which falls to zero")
    learner_lr: float = option(0.5, "step size of the Learner", SMALLEST)
    learner_steps: int = option(2000, "gradient steps of the Learner, and trials online", 1)
    learner_inits: int = option(32, "initializations of the Learner for each task", 1)
    init_std: float = option(0.1, "standard deviation of the Learner's initial logits")
    fitted_episodes: int = option(16, "episodes of each task for the fitted Learner", 1)

ADAM = dict(adam_lr=0.003)                                # where --outer-optimizer adam differs
ATTENTION_RATES = dict(muon_lr=0.02, adam_lr=0.003)       # where --core attention differs
ATTENTION = dict(                                         # and where it differs by family
    linreg=dict(outer_steps=2200), nonlinreg=dict(outer_steps=2000),
    bandit=dict(outer_steps=260))
QUICK = dict(                                             # where --quick differs
    linreg=dict(singular_values=[1.4, 0.5], trials=8, hidden=48, layers=1, batch=64,
                outer_steps=1000, muon_lr=0.06, adam_lr=0.03, learner_steps=800,
                learner_hidden=2),
    nonlinreg=dict(frequencies=3, trials=20, hidden=48, layers=1, batch=64, outer_steps=1800,
                   muon_lr=0.1, adam_lr=0.01, learner_steps=400, learner_inits=4,
                   online_steps=3000, fitted_episodes=6),
    bandit=dict(contexts=4, actions=4, trials=24, hidden=64, batch=128, outer_steps=800,
                muon_lr=0.1, adam_lr=0.03, eval_episodes=128, learner_steps=800))

# ---------------------------------------------------------------- the three experiments
def linreg(config, checkpoint):
    """Linear regression: the singular modes of a linear map, after Saxe et al. 2013."""
    results = Results(config, [f"s = {s:g}" for s in config.singular_values], config.noise ** 2)
    spectrum = torch.tensor(config.singular_values)
    distribution = tasks.LinearRegression(
        len(spectrum), config.noise, config.trials, config.skew)
    W = distribution.evaluation_tasks(
        config.eval_tasks, spectrum, generator_for(config, "evaluation"))

    # Learners: several initializations for each task
    results.phase("Learners")
    lr, width, u0 = config.learner_lr, config.learner_hidden, config.init_scale
    record = evenly_spaced(config.learner_steps)
    short = evenly_spaced(config.learner_steps // 10 + 1)
    targets = W.double()[:, None].expand(-1, config.learner_inits, -1, -1)
    common = dict(lr=lr, record=record, init_scale=u0, hidden=width)
    variants = dict(
        learner=dict(),
        one_layer=dict(start="one layer"),
        large_start=dict(start="large", hidden=max(width, 64), record=short),
        aligned=dict(start="aligned"),
        adam=dict(optimizer="adam", lr=lr / 10),
        rmsprop=dict(optimizer="rmsprop", lr=lr / 10),
        muon=dict(optimizer="muon", record=short),
        online=dict(online_noise=config.noise),
        online_one_layer=dict(start="one layer", online_noise=config.noise))
    for system, changes in variants.items():
        settings = common | changes
        maps = learners.linear_network(
            targets, generator=generator_for(config, "learners"), **settings)
        results.add(system, settings["record"], distribution.strength(maps, W[:, None]))

    # their closed forms
    s, t = spectrum.double(), lr * torch.tensor(record)
    results["aligned/theory"] = learners.deep_linear_theory(s, u0, t) / s
    results["one_layer/theory"] = learners.one_layer_theory(s, 0.0, t) / s
    if len(s) <= width:
        results["learner/theory_half_times"] = learners.random_start_half_times(s, u0, width) / lr

    # the Meta-Learner's outer loop; as a control, tasks whose singular values are all equal
    results.phase("outer loop")
    equal = tasks.random_orthogonal(len(spectrum), len(spectrum), generator_for(config, "control"))
    targets = dict(strength=W, equal=spectrum[:, None, None] * equal)
    model = new_meta_learner(config, distribution, meta.MetaLearner)
    predictors = dict(none=tasks.NeverLearns(), meta=model, bayes=tasks.Bayes(distribution))
    measure_outer_loop(config, distribution, targets, predictors, results, checkpoint)

    # what the Meta-Learner and Bayes learn within the same episodes
    results.phase("probes")
    _, _, x, y = measure_inner_loops(config, distribution, W, predictors, results)

    # Learners trained to convergence on the first t trials of an episode, and Bayes on the same
    results.phase("fitted Learners")
    trials, few = meta.spaced_steps(1, config.trials, 10), config.fitted_episodes
    maps = learners.fitted_linear_network(x[:, :few], y[:, :few], trials, init_scale=u0,
                                          hidden=width, generator=generator_for(config, "learners"))
    results.add("fitted", trials, distribution.strength(maps, W[:, None]))
    results.add("bayes_as_fitted", trials, results["bayes/strength"][trials][:, :, :few])

    # a gradient-based Meta-Learner, and plain gradient descent from the start that it learned
    results.phase("gradient-based Meta-Learner")
    maml = meta.MAML(distribution, width=20, inner_steps=3,
                     generator=generator_for(config, "initialization"))
    meta.train(maml, distribution, steps=config.outer_steps // 2 + 1, batch=128, optimizer="adam",
               adam_lr=0.01, generator=generator_for(config, "tasks"))
    seen = torch.full((x.shape[0] * x.shape[1],), config.trials)
    maps = maml.inner_loop(x.flatten(0, 1), y.flatten(0, 1), seen).unflatten(1, x.shape[:2])
    results.add("maml", range(len(maps)), distribution.strength(maps, W[:, None]))
    start = [layer.expand(len(W), 1, -1, -1) for layer in (maml.W1, maml.W2)]
    maps = learners.linear_network(W[:, None], lr, short, start)
    results.add("maml_start", short, distribution.strength(maps, W[:, None]))

    # out of distribution: tasks with a larger or smaller spectrum
    results.phase("out of distribution")
    results["ood/scale"], captured = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0), []
    for scale in results["ood/scale"].tolist():
        test = distribution.episodes((scale * W).repeat_interleave(64, 0),
                                     generator_for(config, "ood"))
        captured.append(learners.captured_fraction(
            *(distribution.score(each, *test).mean().item() for each in predictors.values())))
    results["ood/captured"] = captured
    return results

def nonlinreg(config, checkpoint):
    """Nonlinear regression: the frequencies of a function, after Rahaman et al. 2018."""
    band = range(1, config.frequencies + 1)
    results = Results(config, [f"k = {k}" for k in band], config.noise ** 2)
    distribution = tasks.FourierRegression(band, config.noise, config.trials, config.skew)
    W = distribution.evaluation_tasks(config.eval_tasks, generator_for(config, "evaluation"))
    points, lr, inits = max(64, 4 * len(band)), config.learner_lr, config.learner_inits
    circle = torch.arange(points) / points

    # Learners: ReLU networks, on tasks of equal amplitudes and of amplitudes that rise with k
    results.phase("Learners")
    record = evenly_spaced(config.learner_steps, 200)
    rising = torch.tensor(band) / torch.tensor(band).double().square().mean().sqrt()
    for system, targets in ("learner", W), ("rising", W * rising.float().repeat(2)):
        y = (distribution.features(circle[:, None]) @ targets.mT).mT.expand(-1, inits, -1)
        f = learners.relu_network(circle.expand(y.shape), y, lr, record,
                                  hidden=config.learner_hidden,
                                  generator=generator_for(config, "learners"))
        results.add(system, record, read_waves(distribution, f, circle, targets))

    # their cause removed: one linear layer on the Fourier features, step size 0.01
    targets, record = W[:, None].expand(-1, inits, -1, -1), range(301)
    maps = learners.linear_network(targets, 0.01, record, "one layer",
                                   generator=generator_for(config, "learners"))
    results.add("fourier", record, distribution.strength(maps, W[:, None]))
    results["fourier/theory"] = learners.one_layer_theory(
        torch.ones(len(band)), 0.0, 0.01 * torch.tensor(record))

    # online: the ReLU network with one fresh noisy trial a step
    results.phase("online Learner")
    record, generator = evenly_spaced(config.online_steps), generator_for(config, "online")
    stream = tasks.FourierRegression(band, config.noise, config.online_steps)
    x, y = stream.episodes(W.repeat_interleave(inits, 0), generator)
    f = learners.relu_network(x[..., 0], y[..., 0], lr / 3, record, hidden=config.learner_hidden,
                              at=circle, generator=generator, online=True)
    results.add("online", record,
                read_waves(distribution, f.unflatten(1, (-1, inits)), circle, W))

    # the Meta-Learner's outer loop
    results.phase("outer loop")
    model = new_meta_learner(config, distribution, meta.MetaLearner)
    predictors = dict(none=tasks.NeverLearns(), meta=model, bayes=tasks.Bayes(distribution))
    measure_outer_loop(config, distribution, dict(strength=W), predictors, results, checkpoint)

    # what the Meta-Learner and Bayes learn within the same episodes
    results.phase("probes")
    _, _, x, y = measure_inner_loops(config, distribution, W, predictors, results)

    # Learners trained on the first t trials of an episode, for each t, and Bayes on the same
    results.phase("fitted Learners")
    trials, few = meta.spaced_steps(1, config.trials, 8), config.fitted_episodes
    x, y, generator = x[:, :few, :, 0], y[:, :few, :, 0], generator_for(config, "learners")
    f = [learners.relu_network(x[..., :t], y[..., :t], lr, [config.learner_steps],
                               hidden=config.learner_hidden, at=circle, generator=generator)
         for t in trials]
    results.add("fitted", trials, read_waves(distribution, torch.cat(f), circle, W))
    results.add("bayes_as_fitted", trials, results["bayes/strength"][trials][:, :, :few])
    return results

def bandit(config, checkpoint):
    """Contextual bandits: the correct action in each context, after Schaul et al. 2019."""
    results = Results(config, [f"context {c + 1}" for c in range(config.contexts)], best=1.0)
    size = config.contexts, config.actions
    distribution = tasks.ContextualBandit(*size, config.trials, config.skew)
    correct = distribution.evaluation_tasks(
        config.eval_tasks, generator_for(config, "evaluation"))
    results["shared_answers"] = tasks.shared_answers(correct)

    # Learners: exact policy gradient with one bias for all contexts, or with one for each
    results.phase("Learners")
    record = meta.spaced_steps(1, config.learner_steps, 120)
    for system, shared in ("learner", True), ("own_biases", False):
        generator = generator_for(config, "learners")
        renamed = distribution.rename(correct, config.learner_inits, generator)
        logits = config.init_std * torch.randn(
            *renamed.shape, config.actions, generator=generator)
        J = learners.policy_gradient(renamed, logits, config.learner_lr, record, shared,
                                     distribution.rates)
        results.add(system, record, distribution.strength(J))

    # online: REINFORCE with one trial a step
    results.phase("online Learner")
    online = learners.OnlineLearner(
        config.learner_lr, config.init_std, generator_for(config, "online"))
    stream = tasks.ContextualBandit(*size, config.learner_steps, config.skew)
    episodes = stream.evaluation_episodes(
        correct, config.learner_inits, generator_for(config, "probe"))
    strength, _ = stream.inner_loop(online, *episodes)
    results.add("online", record, strength[record])

    # the Meta-Learner's outer loop
    results.phase("outer loop")
    model = new_meta_learner(config, distribution, meta.MetaAgent, entropy=config.entropy)
    predictors = dict(none=tasks.UniformAgent(), meta=model, bayes=tasks.BayesAgent())
    targets = dict(strength=correct)
    measure_outer_loop(config, distribution, targets, predictors, results, checkpoint)

    # what the Meta-Learner and Bayes learn within the same episodes
    results.phase("probes")
    episodes = measure_inner_loops(config, distribution, correct, predictors, results)
    results["bayes/theory"] = distribution.strength(distribution.bayes_curve())

    # the policy fitted to the first t trials that Bayes played, for each t, and Bayes on the same
    results.phase("fitted Learners")
    trials, few = meta.spaced_steps(1, config.trials, 12), config.fitted_episodes
    renamed, contexts, uniforms = (part[:, :few].flatten(0, 1) for part in episodes)
    actions, rewards, J = distribution.play(tasks.BayesAgent(), renamed, contexts, uniforms,
                                            probe=True)
    logits = config.init_std * torch.randn(
        len(trials), len(renamed), *size, generator=generator_for(config, "learners"))
    policies = learners.fitted_policy(contexts, actions, rewards, trials, logits)
    chosen = renamed[..., None].expand(len(trials), -1, -1, 1)
    for system, J in (("fitted", policies.gather(-1, chosen)[..., 0]),
                      ("bayes_as_fitted", J[:, trials].movedim(1, 0))):
        results.add(system, trials, distribution.strength(J).unflatten(1, (len(correct), -1)))

    # ceilings: Bayes against Bayes with other random choices, and a fixed order up to ties
    other_uniforms = torch.rand(episodes[2].shape, generator=generator_for(config, "ood"))
    strength, _ = distribution.inner_loop(tasks.BayesAgent(), *episodes[:2], other_uniforms)
    results["ceiling/follows_bayes"] = learners.half_time_correlation(
        strength, *results.tensors("bayes"))
    if not config.skew:                                   # rates would break the ties
        results["ceiling/concordance"] = learners.concordance_ceiling(
            tasks.shared_answers(correct))
    return results

# ---------------------------------------------------------------- steps that experiments share
PURPOSES = ("tasks", "initialization", "evaluation", "probe", "learners", "online", "test", "ood",
            "control", "snapshots")

def generator_for(config, purpose):
    """A random generator for each purpose, so what one part draws never shifts another."""
    return torch.Generator().manual_seed(len(PURPOSES) * config.seed + PURPOSES.index(purpose))

def evenly_spaced(last, count=400):
    """About `count` evenly spaced steps from 0 to `last`, both included."""
    return [*range(0, last, max(1, last // count)), last]

class Results(dict):
    """What a run measured: NumPy arrays by name. Print it to see the table.

    SYSTEM/time (R,), SYSTEM/strength (R, N, E, K)     times, tasks, repeats of a task, modes
    SYSTEM/theory (R, K)                               its closed form, where there is one
    probe/SYSTEM (T + 1,)                              R^2 of the probe
    performance/SYSTEM (n, T), best ()                 loss or reward on new tasks, best possible
    outer_loop/step (P,), strength (P, N, E, K), captured (P,), equal (P, K, E, K)
    ood/scale (S,), captured (S,)                      κ on larger and smaller tasks
    Attributes: config, modes; of a complete run also summary and folder.
    """

    def __init__(self, config, modes=(), best=0.0):
        self.config, self.modes, self.begun = config, modes, time.perf_counter()
        self["best"] = best

    def __setitem__(self, name, values):
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu().numpy()
        super().__setitem__(name, np.array(values, order="C"))

    def add(self, system, time, strength):
        """Adds a system's strengths (R, N, E, K) at times (R,)."""
        self[f"{system}/time"] = time
        self[f"{system}/strength"] = strength

    def phase(self, name):
        """Prints what happens now, and how many seconds the run has taken so far."""
        print(f"{time.perf_counter() - self.begun:6.0f} s  {name}", file=sys.stderr, flush=True)

    def systems(self):
        """The names of all systems, in the order in which they were measured."""
        return [name.removesuffix("/time") for name in self if name.endswith("/time")]

    def tensors(self, system):
        """A system's strengths (R, N, E, K) and times (R,), for the measures of learners.py."""
        return [torch.from_numpy(self[f"{system}/{name}"]) for name in ("strength", "time")]

    def curve(self, system):
        """A system's times (R,), and the mean strengths and standard errors over tasks, (R, K).
        Raises ValueError for an unknown system."""
        learners.check_name("system", system, self.systems())
        strength = self[f"{system}/strength"].mean(2)
        n = strength.shape[1]
        stderr = strength.std(1, ddof=min(1, n - 1)) / n ** 0.5
        return self[f"{system}/time"], strength.mean(1), stderr

    def __repr__(self):
        modes = "".join(f"{k + 1:6}" for k in range(len(self.modes)))
        lines = ["Half-time of each mode; index: latest over earliest, of averages over repeats",
                 "[± 2 standard errors], and within a repeat; concordance: 1 same order, 0 chance",
                 "", f"{'':32}{modes}  index               within  concordance"]
        for system, row in self.summary["systems"].items():
            name = "{} ({})".format(*SYSTEMS[system])
            half_times = "".join(f"{format_number(t):>6}" for t in row["half_times"])
            low, high = map(format_number, row["staggering_ci"])
            bound = ">" if row["lower_bound"] else ""
            index = f"{bound}{format_number(row['staggering'])} [{low}, {high}]"
            lines.append(f"{name:32}{half_times}  {index:20}{format_number(row['within']):>6}"
                         f"{format_number(row['concordance']):>13}")
        captured, (low, high) = self.summary["captured"], self.summary["captured_ci"]
        excess = format_number(self.summary["last_excess"])
        lines += ["", f"Captured fraction κ = {captured:.3f} [{low:.3f}, {high:.3f}]; at the last "
                  f"trial it is {excess} times as far from the best possible as Bayes"]
        if not captured > 0.8:
            lines.append("Warning: κ is below 0.8. An unfinished Meta-Learner can look staggered; "
                         "try more outer steps.")
        return "\n".join(lines)

def new_meta_learner(config, distribution, kind, **more):
    """An untrained Meta-Learner; kind is meta.MetaLearner or meta.MetaAgent."""
    model = kind(distribution, config.hidden, config.layers,
                 generator_for(config, "initialization"), config.core,
                 config.encoder_width, **more)
    return model.to(config.device)

def read_waves(distribution, f, at, W):
    """Strength of each wave of tasks W (N, 1, 2 K) in functions f (R, N, E, Q) seen at points
    (Q,): (R, N, E, K)."""
    fit, _, _ = distribution.fit(f[..., None], at[:, None])
    return distribution.strength(fit, W[:, None])

def measure_outer_loop(config, distribution, targets, predictors, results, checkpoint):
    """Trains the Meta-Learner, periodically measuring κ on held-out tasks, and its strengths at the
    last trial of `targets`, a dict of sets of tasks by name."""
    model, generator = predictors["meta"], generator_for(config, "test")
    test = distribution.episodes(distribution.sample(config.test_tasks, generator), generator)
    for system in "none", "bayes":
        results[f"performance/{system}"] = distribution.score(predictors[system], *test)
    some, last = [part[:256] for part in test], dict(step=0, time=time.perf_counter())
    none, bayes = (distribution.score(predictors[system], *some).mean().item()
                   for system in ("none", "bayes"))
    episodes = {name: distribution.evaluation_episodes(those, 2, generator_for(config, "snapshots"))
                for name, those in targets.items()}

    def snapshot(step):
        """Measures the model at an outer step, and prints κ."""
        captured = learners.captured_fraction(
            none, distribution.score(model, *some).mean().item(), bayes)
        seconds = (time.perf_counter() - last["time"]) / max(1, step - last["step"])       # a step
        last.update(step=step, time=time.perf_counter())
        if 10 * step >= config.outer_steps:
            results.phase(f"outer step {step} of {config.outer_steps}, κ {captured:.2f}; "
                          f"{seconds * (config.outer_steps - step):.0f} s left for the outer loop")
        return dict(captured=torch.tensor(captured)) | {
            name: distribution.inner_loop(model, *those)[0][-1].clone()
            for name, those in episodes.items()}

    snapshots = meta.train(
        model, distribution, steps=config.outer_steps, batch=config.batch,
        generator=generator_for(config, "tasks"), optimizer=config.outer_optimizer,
        muon_lr=config.muon_lr, adam_lr=config.adam_lr, checkpoint=checkpoint,
        settings=asdict(config) | dict(device=None), snapshot=snapshot)
    for name in snapshots[0]:
        results[f"outer_loop/{name}"] = torch.stack([torch.as_tensor(s[name]) for s in snapshots])
    results["performance/meta"] = distribution.score(model, *test)

def measure_inner_loops(config, distribution, targets, predictors, results):
    """Measures what the Meta-Learner and Bayes learn within the same episodes. Returns those."""
    episodes = distribution.evaluation_episodes(
        targets, config.eval_episodes, generator_for(config, "probe"))
    for system in "meta", "bayes":
        strength, r_squared = distribution.inner_loop(predictors[system], *episodes)
        results.add(system, torch.arange(config.trials + 1.0), strength)
        results[f"probe/{system}"] = r_squared
    return episodes

# ---------------------------------------------------------------- numbers and figures of a run
SYSTEMS = dict(                                           # label, and unit of time
    learner=("Learner", "steps"), aligned=("Learner, aligned start", "steps"),
    one_layer=("One layer", "steps"), adam=("Adam", "steps"), rmsprop=("RMSprop", "steps"),
    muon=("Muon", "steps"), rising=("Rising amplitudes", "steps"),
    large_start=("Large start", "steps"), fourier=("Fourier features", "steps"),
    own_biases=("Own biases", "steps"), online=("Learner, online", "trials"),
    online_one_layer=("One layer, online", "trials"), fitted=("Learner, fitted", "trials"),
    bayes_as_fitted=("Bayes, same episodes", "trials"), maml=("MAML, inner loop", "steps"),
    maml_start=("Descent from MAML start", "steps"), meta=("Meta-Learner", "trials"),
    bayes=("Bayes-optimal", "trials"), none=("Never learns", "trials"))

COMPARED, CAUSE_REMOVED = ("learner", "meta", "bayes"), ("one_layer", "fourier", "own_biases")

def summarize(results):
    """The numbers of a run as nested dicts, for summary.json; see `learners.describe`."""
    arrays = {name: torch.from_numpy(array) for name, array in results.items()}

    losses = [arrays[f"performance/{system}"] for system in ("none", "meta", "bayes")]
    captured, *captured_ci = learners.captured_interval(*(loss.mean(1) for loss in losses))
    meta_excess, bayes_excess = (loss[:, -1].mean() - arrays["best"] for loss in losses[1:])
    if "shared_answers" in arrays:                        # rewards are too coarse so near to 1
        meta_excess, bayes_excess = (
            1 - arrays[f"{system}/strength"][-1].mean() for system in ("meta", "bayes"))
    step = arrays["outer_loop/step"]
    # one training: its tasks are the repeats
    trained = learners.describe(arrays["outer_loop/strength"].flatten(1, 2)[:, None], step)
    outer_loop = {name: trained[name] for name in ("half_times", "staggering", "lower_bound")}
    if "outer_loop/equal" in arrays:
        equal = arrays["outer_loop/equal"].mean((2, 3))
        outer_loop["equal_half_times"] = learners.half_time(equal, step).tolist()
    pair = arrays["meta/strength"], *results.tensors("bayes")
    return dict(
        systems={system: learners.describe(*results.tensors(system))
                 for system in results.systems()},
        captured=captured,
        captured_ci=captured_ci,
        last_excess=(meta_excess / bayes_excess).item(),
        follows_bayes=learners.half_time_correlation(*pair).tolist(),
        fitted_follows_bayes=learners.half_time_correlation(
            arrays["fitted/strength"], *results.tensors("bayes_as_fitted")).tolist(),
        against_bayes=learners.half_time_ratio(*pair).tolist(),
        r_squared=arrays["probe/meta"].tolist(),
        outer_loop=outer_loop,
        **{name: arrays[name].tolist() for name in arrays
           if name.startswith(("ceiling/", "ood/")) or name.endswith("theory_half_times")},
    )

def format_number(value):
    """A number with three digits; "-" if it is undefined or a mode is not reached."""
    if not math.isfinite(value):
        return "-"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{round(value, digits) + 0:.{digits}f}"       # + 0 turns -0.00 into 0.00

def panel(results, system):
    """A panel for plots.dynamics."""
    time, strength, stderr = results.curve(system)
    label, unit = SYSTEMS[system]
    summary = results.summary["systems"][system]
    bound = "> " if summary["lower_bound"] else ""
    title = f"{label}\nindex {bound}{format_number(summary['staggering'])}"
    if math.isfinite(summary["concordance"]):
        title += f" · concordance {format_number(summary['concordance'])}"
    half_times = learners.half_time(torch.from_numpy(strength), torch.from_numpy(time)).numpy()
    return dict(title=title, time=time, strength=strength, stderr=stderr, half_times=half_times,
                labels=results.modes, theory=results.get(f"{system}/theory"),
                theory_half_times=results.get(f"{system}/theory_half_times"),
                axes=dict(xlabel=unit), log=len(time) > 20 and np.ptp(np.diff(time)[:-1]) > 0)

def figures(results):
    """All figures of a run by name."""
    config = results.config
    seed = f"seed {config.seed}" + f", skew {config.skew:g}" * (config.skew > 0)
    clocks = "online", "fitted", "meta"
    controls = [system for system in results.systems()
                if system not in (*COMPARED, *clocks, "bayes_as_fitted")]
    caption = f"{seed} · dots: half-times · crosses, dashes: theory · bands: 2 standard errors"
    drawn = {name: plots.dynamics([panel(results, system) for system in those], caption)
             for name, those in dict(dynamics=COMPARED, controls=controls, by_trial=clocks).items()}
    drawn["concordance"] = plots.rank_shares([dict(
        title=panel(results, system)["title"],
        shares=learners.rank_shares(learners.half_time(*results.tensors(system))).numpy())
        for system in COMPARED], results.modes, f"{seed} · share of repeats")
    drawn["episodes"] = plots.dynamics(episode_panels(results),
                                       caption=f"{seed} · dots: half-times in a single episode")
    if "shared_answers" in results and not config.skew:
        drawn["sharing"] = plots.dynamics(
            [sharing_panel(results, system) for system in ("learner", "own_biases", "meta")],
            caption=f"{seed} · contexts by how many share their correct action")

    # the outer loop: strengths at the last trial, and κ
    common = dict(time=results["outer_loop/step"], axes=dict(xlabel="outer steps"), log=True)
    drawn["outer_loop"] = plots.dynamics([
        dict(common, title="Strength at the last trial", labels=results.modes,
             strength=results["outer_loop/strength"].mean((1, 2))),
        dict(common, title="Captured fraction κ", labels=["κ"],
             strength=results["outer_loop/captured"][:, None])], caption=seed)
    drawn["performance"] = plots.dynamics([performance_panel(results)], height=3.8,
        caption=f"{seed} · dashed: best possible · bands: 2 standard errors")
    return drawn

def performance_panel(results):
    """Learning curves on held-out tasks."""
    names = "none", "meta", "bayes"
    values = np.stack([results[f"performance/{name}"] for name in names], 2)       # (n, T, 3)
    reward = dict(xlabel="trial", ylabel="reward", ylim=(0, 1.05))
    error = dict(xlabel="trial", ylabel="squared error", yscale="log")
    summary = results.summary
    return dict(
        title=f"κ = {summary['captured']:.3f}; distance from the dashed line at the last trial: "
              f"{format_number(summary['last_excess'])} times Bayes'",
        time=np.arange(values.shape[1]), strength=values.mean(0),
        stderr=values.std(0) / len(values) ** 0.5, labels=[SYSTEMS[name][0] for name in names],
        theory=np.full((values.shape[1], 1), results["best"]),
        axes=reward if "shared_answers" in results else error)

def episode_panels(results):
    """The first two episodes of the Meta-Learner in the first evaluation task, and their average
    with all others of that task."""
    strength, time = results.tensors("meta")
    curves = {"Episode 1": strength[:, 0, 0], "Episode 2": strength[:, 0, 1],
              f"Average of {strength.shape[2]} episodes": strength[:, 0].mean(1)}
    return [dict(panel(results, "meta"), title=f"Meta-Learner\n{title}", stderr=None,
                 strength=curve.numpy(), half_times=learners.half_time(curve, time).numpy())
            for title, curve in curves.items()]

def sharing_panel(results, system):
    """Learning curves of contexts by how many contexts share their correct action."""
    groups, strength = results["shared_answers"], results[f"{system}/strength"].mean(2)
    counts = np.unique(groups)[::-1]
    members = [strength[:, groups == count] for count in counts]            # (R, number of them)
    stderr = [m.std(1) / m.shape[1] ** 0.5 for m in members]
    return dict(panel(results, system), title=SYSTEMS[system][0], half_times=None, log=True,
                strength=np.stack([m.mean(1) for m in members], 1), stderr=np.stack(stderr, 1),
                labels=[f"shared by {n}" if n > 1 else "not shared" for n in counts])

# ---------------------------------------------------------------- from a command to its results
FAMILIES = dict(linreg=(Linreg, linreg), nonlinreg=(Nonlinreg, nonlinreg), bandit=(Bandit, bandit))
SHARED = "seed", "device", "core", "outer_steps", "outer_optimizer", "skew"        # for `all`

class Mistake(ValueError):
    """A mistake by the user, "argument: problem"."""

def run(family, out=None, quick=False, fresh=False, **settings):
    """Does what `python metadyn.py FAMILY` does, in the folder `out` (default: runs/FAMILY, or
    runs/FAMILY-quick), with settings named as on the command line, with underscores. Returns
    Results. Raises ValueError for a mistake and FloatingPointError if learning diverges."""
    config = configure(family, quick, settings)
    folder = prepare(family, config, out or f"runs/{family}{'-quick' * quick}", fresh)
    return run_experiment(family, config, folder)

def prepare(family, config, out, fresh):
    """Opens the folder of a run, clears it if `fresh`, and checks that it holds no other run.
    Returns it. Raises Mistake."""
    folder, path = Path(out), Path(out) / "config.json"
    wanted = dict(asdict(config), family=family, device=None)     # another device may resume a run
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if fresh or not path.exists():                    # what lies there has other settings
            for name in "results.npz", "checkpoint.pt":
                (folder / name).unlink(missing_ok=True)
            write_json(path, dict(wanted, torch=torch.__version__))
        there = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Mistake(f"out: {out} cannot be used: {error}") from None
    differs = meta.difference(there, wanted)
    if differs:
        raise Mistake(f"out: {folder} holds another run ({differs}); choose another folder, or "
                      "replace that run with fresh=True")
    return folder

def configure(family, quick, settings):
    """The config of a family: defaults, then what --quick and others change, then the settings
    given. Raises Mistake."""
    if family not in FAMILIES:
        raise Mistake(f"family: {family!r} is not one of {', '.join(FAMILIES)}")
    kind = FAMILIES[family][0]
    known = {setting.name: setting for setting in fields(kind)}
    for name in settings:
        if name not in known:
            raise Mistake(f"{name}: {family} has no such setting; it has {', '.join(known)}")
    defaults = QUICK[family] if quick else {}
    if settings.get("core") == "attention":
        defaults = ATTENTION[family] | defaults | ATTENTION_RATES
    if settings.get("outer_optimizer") == "adam":
        defaults = defaults | ADAM
    given = {name: checked(known[name], value) for name, value in settings.items()}
    config = kind(**defaults | given)
    there = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if not there[config.device]:
        raise Mistake(f"device: there is no {config.device} on this machine")
    if family == "linreg":
        config.singular_values = sorted(config.singular_values, reverse=True)
    return config

def checked(setting, value):
    """The value of a setting, as its type. Raises Mistake if it is not valid."""
    low, choices = setting.metadata["low"], setting.metadata["choices"]
    convert = {int: operator.index, float: float, str: str,
               list: lambda values: [float(one) for one in np.atleast_1d(values)]}
    try:
        converted = convert[setting.type](value)
        numbers = np.atleast_1d([] if choices else converted)
        valid = converted in choices if choices else len(numbers) and all(
            (low <= numbers) & (numbers < 2 ** 31))
    except (TypeError, ValueError):
        valid = False
    if not valid:
        least = "more than 0" if low == SMALLEST else f"at least {low}"
        kind = "a whole number, " if setting.type is int else ""
        wanted = f"one of {', '.join(choices)}" if choices else f"{kind}{least} and below 2^31"
        raise Mistake(f"{setting.name}: {value} given, must be {wanted}")
    return converted

def keep_freed_memory():
    """Asks glibc to keep freed memory. By default it returns large blocks to the system and fetches
    them again at every outer step, which took 15% of its time in linreg."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)                               # M_MMAP_MAX
        libc.mallopt(-1, -1)                              # M_TRIM_THRESHOLD
    except (AttributeError, OSError, TypeError):
        pass                                              # another C library: only slower

def run_experiment(family, config, folder):
    """Runs, resumes or, if it is complete, only redraws an experiment. Returns its results."""
    torch.backends.cudnn.allow_tf32 = False               # float32 in an LSTM, as everywhere else
    path = folder / "results.npz"
    print(f"{family}, seed {config.seed}, on {config.device}, in {folder}", file=sys.stderr)
    if path.exists():
        results = Results(config)
        with np.load(path) as arrays:
            results.update(arrays)
        results.modes = results.pop("modes").tolist()
        results.phase("already complete: redrawing the figures")
    else:
        keep_freed_memory()
        results = FAMILIES[family][1](config, folder / "checkpoint.pt")
        with open(folder / "unfinished.npz", "wb") as file:
            np.savez(file, modes=results.modes, **results)
        (folder / "unfinished.npz").replace(path)
    results.folder, results.summary = folder, summarize(results)
    write_json(folder / "summary.json", results.summary)
    write_tables(results, folder)
    results.phase("figures")
    for name, figure in figures(results).items():
        save(figure, folder / name)
    results.phase("done")
    return results

def save(figure, path):
    """Saves a figure as PNG and PDF."""
    figure.savefig(f"{path}.png")
    figure.set_layout_engine("none")                      # laid out once is enough
    figure.savefig(f"{path}.pdf", metadata={"CreationDate": None})

def flatten(values, path=""):
    """Nested dicts and lists as one dict: {"systems/meta/half_times/1": 3.2, ...}."""
    if isinstance(values, list):
        values = dict(enumerate(values, 1))
    if not isinstance(values, dict):
        return {path.removeprefix("/"): values}
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{path}/{name}")
    return flat

def write_json(path, values):
    """Writes JSON, with null for inf and nan."""
    text = re.sub(r"\b(NaN|Infinity)\b", "null", json.dumps(values, indent=1))
    path.write_text(text.replace("-null", "null"), encoding="utf-8")

def write_csv(path, columns, rows):
    """Writes rows under the names of their columns."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)

def write_tables(results, folder):
    """Writes dynamics.csv and performance.csv; modes count from 1."""
    rows = []
    for system in results.systems():
        time, strength, stderr = results.curve(system)
        for k in range(len(results.modes)):
            rows += [(system, k + 1, *row) for row in zip(time, strength[:, k], stderr[:, k])]
    write_csv(folder / "dynamics.csv", ["system", "mode", "time", "strength", "stderr"], rows)
    rows = []
    for system in "none", "meta", "bayes":
        values = results[f"performance/{system}"]                           # (n, T)
        stderr = values.std(0) / len(values) ** 0.5
        rows += [(system, t, *row) for t, row in enumerate(zip(values.mean(0), stderr))]
    write_csv(folder / "performance.csv", ["system", "trial", "value", "stderr"], rows)

def overview(runs, folder):
    """Writes overview.csv: every number of the summaries with its mean and standard deviation over
    seeds; and the figure levers, if there are several skews. Returns the most important numbers as
    text. runs: {(family, skew): [results, ...]}."""
    rows, lines, levers = [], [f"{'':42}mean ± standard deviation over seeds"], {}
    for (family, skew), several in runs.items():
        by_seed = [flatten(results.summary) for results in several]
        for name in by_seed[0]:
            values = np.array([numbers.get(name, math.nan) for numbers in by_seed])
            finite = len(values) > 1 and np.isfinite(values).all()
            mean, sd = values.mean(), values.std(ddof=1) if finite else math.nan
            rows.append((family, skew, name, mean, sd, *values))
            _, system, measure, *_ = *name.split("/"), "", ""
            if name == "captured" or (
                    system in COMPARED and measure in ("staggering", "concordance")):
                lines.append(f"{family:10}{skew:<4g}{name.removeprefix('systems/'):30}"
                             f"{format_number(mean):>6} ± {format_number(sd)}")
            if measure == "staggering":
                levers.setdefault((family, system), []).append((skew, mean, sd))
    seeds = [f"seed{results.config.seed}" for results in several]
    write_csv(folder / "overview.csv", ["family", "skew", "number", "mean", "sd", *seeds], rows)
    if len({skew for _, skew in runs}) > 1:
        panels = [dict(title=FAMILIES[family][0].__doc__.split(":")[0], curves=[
            (SYSTEMS[system][0], *zip(*levers[family, system]))
            for system in COMPARED + CAUSE_REMOVED if (family, system) in levers])
            for family in {family: None for family, _ in runs}]
        numbers = ", ".join(str(results.config.seed) for results in several)
        save(plots.levers(panels, f"seed {numbers} · bars: standard deviation over seeds"),
             folder / "levers")
    return "\n".join(lines)

# ---------------------------------------------------------------- the command line
def make_parser():
    """The command line: a subcommand for each family, with an option for each of its settings."""
    parser = argparse.ArgumentParser(prog="metadyn.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    families = parser.add_subparsers(dest="family", required=True, metavar="FAMILY")
    for family in *FAMILIES, "all":
        kind = Config if family == "all" else FAMILIES[family][0]
        about = "all families, and an overview" if family == "all" else kind.__doc__
        sub = families.add_parser(family, help=about, description=about,
                                  usage=f"metadyn.py {family} [options]; --help lists them")
        sub.add_argument("--quick", action="store_true", help="a small version, in half a minute")
        sub.add_argument("--fresh", action="store_true", help="replace an earlier run")
        sub.add_argument("--out", type=Path,
                         help=f"results folder (default: runs/{family}, or runs/{family}-quick)")
        sub.add_argument("--seeds", type=int, default=1, help="how many seeds (default: 1)")
        for setting in fields(kind):
            if family != "all" or setting.name in SHARED:
                several = setting.type is list or setting.name == "skew"
                sub.add_argument(
                    "--" + setting.name.replace("_", "-"), default=argparse.SUPPRESS,
                    type=float if several else setting.type, nargs="+" if several else None,
                    metavar="|".join(setting.metadata["choices"] or ["X"]),
                    help=f"{setting.metadata['help']} (default: "
                         f"{'by family' if family == 'all' else setting.default_factory()})")
    return parser

def plan(family, out, quick, fresh, seeds, seed=0, skew=(0.0,), **settings):
    """The runs of a command, checked before the first begins: (family, config, folder) each. Of
    several skews or seeds, each has a folder of its own."""
    if seeds < 1:
        raise Mistake(f"seeds: {seeds} given, must be at least 1")
    jobs, skews = [], sorted(set(skew))
    for name in FAMILIES if family == "all" else [family]:
        for x in skews:
            for number in range(seed, seed + seeds):
                folder = out / name if family == "all" else out
                folder = folder / f"skew{x:g}" if len(skews) > 1 else folder
                folder = folder / f"seed{number}" if seeds > 1 else folder
                config = configure(name, quick, dict(settings, seed=number, skew=x))
                jobs.append((name, config, folder))
    for name, config, folder in jobs:                     # all settings are valid: now the folders
        prepare(name, config, folder, fresh)
    return jobs

def main(arguments=None):
    """Runs a command line. Returns 0, or 1 for a failure and 130 for Ctrl-C; a mistake by the user
    exits with argparse's error and status 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")          # a console may have no κ
    parser = make_parser()
    command = vars(parser.parse_args(arguments))
    if not command["out"]:                                # a quick run does not collide with a full
        command["out"] = Path(f"runs/{command['family']}{'-quick' * command['quick']}")
    try:
        runs = {}
        for family, config, folder in plan(**command):
            results = run_experiment(family, config, folder)
            runs.setdefault((family, config.skew), []).append(results)
            print(f"\n{results}\nFigures and tables: {folder}", flush=True)
        if len(runs) > 1 or len(runs[family, config.skew]) > 1:
            print(f"\n{overview(runs, command['out'])}\nTable: {command['out']}/overview.csv")
        return 0
    except Mistake as mistake:
        argument, problem = str(mistake).replace("fresh=True", "--fresh").split(": ", 1)
        parser.error(f"argument --{argument.replace('_', '-')}: {problem}")
    except (FloatingPointError, OSError, meta.WrongCheckpoint,
            torch.cuda.OutOfMemoryError) as error:
        print(f"\nmetadyn.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nmetadyn.py: stopped; the same command, without --fresh, resumes from the last "
              "checkpoint", file=sys.stderr)
        return 130

if __name__ == "__main__":
    sys.exit(main())
