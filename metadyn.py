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

if __name__ == "__main__":                                # Ctrl-C while torch is imported: just end
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import ast
import contextlib
import csv
import ctypes
import functools
import hashlib
import inspect
import json
import math
import operator
import re
import sys
import textwrap
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

def setting(default, help, low=None, high=2 ** 31 - 1):
    """A field of settings: an int, float, str or tuple of floats, its help and its bounds."""
    return field(default=default, metadata=dict(help=help, low=low, high=high))

@dataclass
class Run:
    """The settings of all families. Raises ValueError for what is not allowed."""
    seed: int = setting(0, "seed of all random numbers", low=0)
    device: str = setting("auto", "auto, cpu, cuda or mps: where the Meta-Learner runs")
    hidden: int = setting(128, "units of the Meta-Learner's LSTM", low=1)
    layers: int = setting(1, "layers of the LSTM", low=1)
    outer_steps: int = setting(1000, "updates of the Meta-Learner's weights", low=1)
    batch: int = setting(128, "episodes in an outer step", low=1)
    input_gain: float = setting(1.0, "size of the LSTM's initial input weights", low=0)
    adam_lr: float = setting(0.01, "peak learning rate of AdamW", low=POSITIVE)
    muon_lr: float = setting(0.0, "peak learning rate of Muon, which then updates the hidden "
                             "matrices; 0 for AdamW alone", low=0)
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
        """Pairs of each field and what `setting` said of it. A family may change only defaults."""
        shared = {each.name: each.metadata for each in fields(Run)}
        plain = setting(None, "").metadata
        return [(each, each.metadata or shared.get(each.name, plain)) for each in fields(cls)]

    def __post_init__(self):
        convert = {int: operator.index, float: float, str: str,
                   tuple: lambda values: tuple(float(x) for x in np.ravel(values))}
        for each, said in self.rules():
            value, low, high = getattr(self, each.name), said["low"], said["high"]
            try:
                value = convert[each.type](value)
                valid = value != () and (
                    low is None or all(low <= x <= high for x in np.ravel(value)))
            except (KeyError, TypeError, ValueError):
                valid = False
            if not valid:
                raise ValueError(f"{each.name} cannot be {value!r}; allowed is "
                                 f"{each.type.__name__} from {low} to {high}")
            setattr(self, each.name, value)
        available_device(self.device)

    def name(self):
        """The family and what differs from its defaults or from its quick version, whichever is
        nearer: "linreg-quick-noise0.2-seed1"."""
        def differs(base):
            return [f"-{name}{'_'.join(map(str, np.atleast_1d(value)))}" for name, value in
                    reversed(vars(self).items()) if value != vars(base)[name] and name != "device"]

        words = [differs(type(self)()), ["-quick"] + differs(self.quick())]
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
    singular_values: tuple = setting((1.1, 0.8, 0.6, 0.4, 0.2),
                                     "singular values of the evaluation tasks", low=POSITIVE)
    noise: float = setting(0.1, "standard deviation of the noise on y", low=0)
    learner_repeats: int = setting(32, "repeats of the Learner for each task", low=1)
    learner_lr: float = setting(0.02, "step size of the Learner; from an initial gain c above 1, "
                                "c steps of 1/c the size count as one", low=POSITIVE)
    learner_steps: int = setting(1000, "gradient steps of the Learner", low=1)
    learner_hidden: int = setting(64, "hidden units of the Learner", low=1)
    init_std: float = setting(0.01, "the Learner's weights start at N(0, this^2)", low=POSITIVE)
    converged_episodes: int = setting(64, "episodes of each task for the converged Learner", low=1)

    QUICK = dict(singular_values=(1.1, 0.4), trials=8, hidden=64, batch=32, outer_steps=2200,
                 adam_lr=0.02, learner_steps=600, learner_repeats=16, converged_episodes=16)

def linreg(config, checkpoint=None):
    """The experiment on linear regression. Returns Results."""
    s = torch.tensor(sorted(config.singular_values, reverse=True), dtype=torch.float64)
    results = Results(config, modes=[f"s = {x:g}" for x in s.tolist()])
    distribution = tasks.LinearRegression(s.tolist(), config.noise, config.trials, config.skew)
    W = distribution.evaluation_tasks(config.eval_tasks, generator_for(config, "evaluation"))
    dim, width, lr, std = len(s), config.learner_hidden, config.learner_lr, config.init_std
    steps = torch.tensor(evenly_spaced(config.learner_steps))
    repeats = distribution.repeats(W, config.learner_repeats, generator_for(config, "repeats"))

    def add_learner(system, label, layers, gain=None, **online):
        """Trains a linear network, with smaller steps if its gain is above 1, and adds its law."""
        target, slower = repeats[:, :layers[0].shape[1]], max(1.0, gain or 0.0)
        maps = learners.linear_network(target, layers, lr / slower, steps.tolist(), **online)
        law = {} if gain is None else dict(
            gain=gain, theory_half_times=learners.gain_half_times(s, gain) / lr)
        results.add(system, label, "trials" if online else "steps", steps / slower,
                    distribution.strength(maps, target), **law)

    results.log("Learners: a small start, torch's default start, one layer, online")
    for system, label, widths, start, more in (
            ("learner", "Learner", [dim, width, dim], std, {}),
            ("default_start", "torch's default start", [dim, width, dim], None, {}),
            ("one_layer", "One layer", [dim, dim], std, {}),
            ("online", "Learner, online", [dim, width, dim], std, dict(online=True))):
        generator = generator_for(config, "learners")
        layers = learners.init_layers(repeats.shape[:2], widths, generator, start)
        if more:
            more |= dict(noise=config.noise, generator=generator)
        elif len(layers) == 2:
            more = dict(gain=learners.expected_gain(dim, width, start))
        add_learner(system, label, layers, **more)
        results[f"{system}/column"] = distribution.columns(repeats)
    results["one_layer/theory"] = -torch.expm1(-lr * steps[:, None]).expand(-1, dim)

    results.log("the Learner's dial: layers with a product of zero and a given gain")
    for gain in GAINS:                                    # all repeats are alike, so one is enough
        layers = learners.gain_layers((len(W), 1), dim, max(width, 2 * dim), gain)
        add_learner(f"gain_{gain:g}", f"Gain {gain:g}", layers, gain)
        law = learners.gain_law(s, gain, lr * steps / max(1, gain))
        results[f"gain_{gain:g}/theory"] = law / s

    episodes = measure_both_loops(
        results, distribution, W, meta.MetaLearner, tasks.Bayes, checkpoint)
    repeats, _, x, y = episodes
    one_step, column = tasks.OneStep(distribution), distribution.columns(repeats)
    results["meta/column"] = results["bayes/column"] = column
    results.add("one_step", "One gradient step", "trials", results["bayes/time"],
                distribution.inner_loop(one_step, *episodes)[0], column=column,
                theory_by_column=one_step.half_times())

    results.log("Learner trained to convergence on the first t trials, for each t")
    trials, few = log_spaced(config.trials, 10), config.converged_episodes
    seen = (torch.arange(config.trials) < torch.tensor(trials)[:, None])[:, None, None, :, None]
    x, y = ((seen * z[:, :few]).mT for z in (x, y))       # (Q, N, E, D, T), 0 after t trials
    layers = learners.init_layers(x.shape[:3], [dim, width, dim],
                                  generator_for(config, "learners"), std)
    # 200 steps of Adam fit every noisy answer that a linear map can fit
    maps = [learners.linear_network(Y, start, 0.01, [200], learners.ADAM, inputs=X)[0]
            for X, Y, *start in zip(x, y, *layers)]       # one t at a time, to save memory
    results.add("converged", "Learner, converged", "trials", trials,
                distribution.strength(torch.stack(maps), repeats[:, :few]))
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
    skew: float = setting(0.0, "how the variance of frequency k falls: as k^(-2 skew)",
                          low=-1, high=1)
    n_frequencies: int = setting(5, "the task distribution has frequencies 1 to this", low=2)
    noise: float = setting(0.1, "standard deviation of the noise on y", low=0)
    learner_repeats: int = setting(16, "initializations of the Learner for each task", low=1)
    learner_lr: float = setting(3e-3, "Adam's learning rate in the Learner", low=POSITIVE)
    learner_steps: int = setting(300, "gradient steps of the Learner", low=1)
    learner_hidden: int = setting(64, "units of each of the Learner's layers", low=1)
    online_steps: int = setting(4000, "trials of the online Learner", low=1)
    converged_episodes: int = setting(16, "episodes of each task for the converged Learner", low=1)

    QUICK = dict(n_frequencies=2, trials=15, hidden=64, layers=1, batch=32, outer_steps=2500,
                 muon_lr=0.0, adam_lr=0.02, learner_steps=200, learner_repeats=4, eval_tasks=6,
                 online_steps=1000, converged_episodes=4)

def nonlinreg(config, checkpoint=None):
    """The experiment on nonlinear regression. Returns Results."""
    band = torch.arange(1, config.n_frequencies + 1)
    results = Results(config, modes=[f"k = {k}" for k in band.tolist()])
    distribution = tasks.FourierRegression(
        band.tolist(), config.noise, config.trials, config.skew)
    W = distribution.evaluation_tasks(config.eval_tasks, generator_for(config, "evaluation"))
    points, lr, repeats = max(64, 4 * len(band)), config.learner_lr, config.learner_repeats
    x = torch.arange(points)[:, None] / points
    y = (distribution.features(x) @ W.mT).mT.expand(-1, repeats, -1)        # (N, E, G)
    encode = distribution.encode
    sizes = dict(hidden=config.learner_hidden, at=encode(x))

    results.log("Learners: a ReLU network on the circle and on all features, a layer on features/k")
    steps = evenly_spaced(config.learner_steps, 200)
    # without layers, at step size 0.1: frequency k has the time constant 10 k^2
    linear = dict(lr=0.1, eval_steps=evenly_spaced(32 * len(band) ** 2, 200), layers=0,
                  optimizer=torch.optim.SGD)
    for system, label, inputs, how in (
            ("learner", "Learner", encode(x), {}),
            ("fourier_inputs", "Fourier inputs", distribution.features(x), {}),
            ("scaled_features", "One layer, features/k",
             distribution.features(x) / band.repeat(2), linear)):
        how = dict(lr=lr, eval_steps=steps, hidden=config.learner_hidden) | how
        f = learners.relu_network(inputs.expand(*y.shape, -1), y, **how,
                                  generator=generator_for(config, "learners"))
        results.add(system, label, "steps", how["eval_steps"], distribution.waves(f, x, W))
    time = torch.tensor(linear["eval_steps"])[:, None]
    results["scaled_features/theory"] = -torch.expm1(-0.1 * time / band ** 2)

    results.log("online Learner: the ReLU network with one fresh noisy trial a step")
    steps, generator = evenly_spaced(config.online_steps), generator_for(config, "online")
    stream = tasks.FourierRegression(band.tolist(), config.noise, config.online_steps)
    seen, answers = stream.episodes(W.repeat_interleave(repeats, 0), generator)
    # steps on single noisy trials need a smaller rate than steps on all points
    f = learners.relu_network(encode(seen), answers[..., 0], lr / 3, steps, **sizes, online=True,
                              generator=generator)
    results.add("online", "Learner, online", "trials", steps,
                distribution.waves(f.unflatten(1, (-1, repeats)), x, W))

    _, _, seen, answers = measure_both_loops(
        results, distribution, W, meta.MetaLearner, tasks.Bayes, checkpoint)

    results.log("Learner trained to convergence on the first t trials, for each t")
    trials, few = log_spaced(config.trials, 8), config.converged_episodes
    seen, answers = encode(seen[:, :few]), answers[:, :few, :, 0]
    generator = generator_for(config, "learners")
    f = [learners.relu_network(seen[..., :t, :], answers[..., :t], lr, [CONVERGED], **sizes,
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
    entropy: float = setting(0.02, "initial weight of the entropy bonus; it falls to 0", low=0)
    learner_repeats: int = setting(32, "repeats of the Learner for each task", low=1)
    learner_lr: float = setting(0.5, "step size of the Learner", low=POSITIVE)
    learner_steps: int = setting(1000, "gradient steps of the Learner", low=1)
    init_std: float = setting(0.1, "standard deviation of the Learner's initial logits", low=0)

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
        generator, online = generator_for(config, "learners"), system == "online"
        permuted = distribution.repeats(correct, config.learner_repeats, generator)
        logits = config.init_std * torch.randn(
            *permuted.shape, config.actions, generator=generator)
        J = learners.policy_gradient(permuted, logits, config.learner_lr, steps, shared, online,
                                     generator)
        results.add(system, label, unit, steps, distribution.strength(J))

    agent = functools.partial(meta.MetaAgent, entropy=config.entropy)
    measure_both_loops(results, distribution, correct, agent, tasks.BayesAgent, checkpoint)
    results["bayes/theory"] = distribution.strength(distribution.bayes_curve())
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
    SYSTEM/theory (R, K), theory_half_times (K,)       its closed form
    performance/SYSTEM (n, T), excess/SYSTEM ()        loss or reward on new tasks; its last excess
    probe/SYSTEM (T + 1,)                              R^2 of the probe
    modes (K,)                                         their names
    """

    def __init__(self, config, **arrays):
        self.config, self.begun = config, time.perf_counter()
        for name, values in arrays.items():
            self[name] = values

    def __setitem__(self, name, values):
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu().numpy()
        super().__setitem__(name, np.array(values, order="C"))

    def __repr__(self):
        return f"Results of {self.config.name()}: {', '.join(self)}"

    def log(self, words):
        """Prints what happens now, and how many seconds the run has taken so far."""
        print(f"{time.perf_counter() - self.begun:6.0f} s  {words}", file=sys.stderr, flush=True)

    def add(self, system, label, unit, time, strength, **more):
        """Adds a system's strengths (R, N, E, K) at times (R,), its label and unit of time, and
        more arrays, such as the column in which each mode stood."""
        arrays = dict(label=(label, unit), time=time, strength=strength, **more)
        for name, values in arrays.items():
            self[f"{system}/{name}"] = values

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

    def curve(self, system, by_column=False):
        """A system's times (R,), and its mean strengths and their standard errors over tasks,
        (R, K)."""
        strength, time = self.tensors(system, by_column)
        by_task = strength.mean(2).movedim(1, 0)                            # (N, R, K)
        return [part.numpy() for part in
                (time, by_task.mean(0), learners.standard_error(by_task))]

    @property
    def summary(self):
        """The numbers of a run as nested dicts, for summary.json; see `learners.describe`."""
        score, *score_ci = learners.normalized_score(*(
            torch.from_numpy(self[f"performance/{system}"]).mean(1)
            for system in ("none", "meta", "bayes")))
        systems = {}
        for system in self.systems():
            systems[system] = learners.describe(*self.tensors(system))
            if f"{system}/column" in self:
                systems[system]["by_column"] = learners.describe(*self.tensors(system, True))
        both = self.tensors("meta")[0], *self.tensors("bayes")
        systems["meta"]["follows_bayes"] = learners.half_time_correlation(*both).tolist()
        excess, least = self["excess/meta"].item(), self["excess/bayes"].item()
        return dict(
            systems=systems, score=score, score_ci=score_ci, r_squared=self["probe/meta"].tolist(),
            last_excess=excess / least if least > 1e-6 else math.nan)   # else Bayes is perfect

def measure_both_loops(results, distribution, W, network, optimum, checkpoint=None):
    """Trains a Meta-Learner and prints its score on held-out tasks along the way. Then measures
    what it and Bayes learn within the same episodes of the tasks W, and returns those. network
    is a class like meta.MetaLearner, and optimum one like tasks.Bayes."""
    config, device, last = results.config, available_device(results.config.device), {}
    results.log(f"outer loop, on {device}")
    bayes, model = optimum(distribution), network(
        distribution, config.hidden, config.layers, generator_for(config, "initialization"),
        input_gain=config.input_gain)
    generator = generator_for(config, "test")
    test = distribution.episodes(distribution.sample(config.test_tasks, generator), generator)
    some = [part[:256] for part in test]
    never, best = distribution.never_learns(*some).mean(1), distribution.score(bayes, *some).mean(1)

    def report(step):
        """Prints the model's score ten times, and how long the rest of the steps will take."""
        if step % max(1, config.outer_steps // 10):
            return
        now, score = time.perf_counter(), distribution.score(model, *some).mean(1)
        if last:
            seconds = (now - last["time"]) / (step - last["step"]) * (config.outer_steps - step)
            results.log(f"outer step {step} of {config.outer_steps}, score "
                        f"{learners.normalized_score(never, score, best)[0]:.2f}; {seconds:.0f} s "
                        "left for the outer loop")
        last.update(step=step, time=now)

    optimizers = meta.default_optimizers(model.to(device), config.adam_lr, config.muon_lr)
    meta.train(model, distribution, steps=config.outer_steps, batch=config.batch,
               optimizers=optimizers, generator=generator_for(config, "tasks"),
               checkpoint=checkpoint, report=report)

    results.log("what the Meta-Learner and Bayes learn within the same episodes")
    episodes = distribution.evaluation_episodes(
        W, config.eval_episodes, generator_for(config, "probe"))
    results["performance/none"] = distribution.never_learns(*test)
    for system, label, predictor in ("meta", "Meta-Learner", model), ("bayes", "Bayes", bayes):
        strength, results[f"probe/{system}"] = distribution.inner_loop(predictor, *episodes)
        results.add(system, label, "trials", torch.arange(config.trials + 1.0), strength)
        results[f"performance/{system}"] = performance = distribution.score(predictor, *test)
        results[f"excess/{system}"] = distribution.excess(performance, strength)
    return episodes

# ---------------------------------------------------------------- numbers and figures of a run
def format_number(value, lower_bound=False):
    """A number with three digits; "-" if it is undefined or a mode is not reached."""
    if not math.isfinite(value):
        return "-"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{'>' * lower_bound}{round(value, digits) + 0:.{digits}f}"      # + 0: -0.00 is 0.00

def table(results):
    """The most important numbers of a run as text."""
    summary, K = results.summary, len(results["modes"])
    lines = ["Half-time of each mode (-: undefined); index: latest over earliest (>: at least),",
             "of averages over repeats [+- 2 standard errors], the same at strength 0.9, by column",
             f"and within a repeat; rank correlation between repeats\n\n{'':30}"
             f"{''.join(f'{k + 1:6}' for k in range(K))}  {'index':20}at 0.9 column within rank c."]
    for system, row in summary["systems"].items():
        label, half_times = results[f"{system}/label"], map(format_number, row["half_times"])
        index = format_number(row["staggering"], row["lower_bound"])
        low, high = map(format_number, row["staggering_ci"])
        column = row.get("by_column", dict(staggering=math.nan, lower_bound=False))
        cells = [(row["late_staggering"], row["late_lower_bound"]),
                 (column["staggering"], column["lower_bound"]),
                 (row["within"], row["within_lower_bound"]), (row["rank_correlation"],)]
        lines.append(f"{f'{label[0]} ({label[1]})':30}{''.join(f'{t:>6}' for t in half_times)}  "
                     f"{f'{index} [{low}, {high}]':19}"
                     + "".join(f"{format_number(*cell):>7}" for cell in cells))
    lines.append("\nScore {:.3f} [{:.3f}, {:.3f}]: 0 never learns, 1 is Bayes; excess at the last "
                 "trial over Bayes': {}\nR^2 of its probe at the last trial: {}".format(
                     summary["score"], *summary["score_ci"],
                     *map(format_number, (summary["last_excess"], summary["r_squared"][-1]))))
    notes = {
        "At the last trial the excess of Bayes is not measurably above 0: no ratio.":
            math.isnan(summary["last_excess"]),
        "At this skew the evaluation tasks are far out of the task distribution.":
            abs(getattr(results.config, "skew", 0)) > 0.5,
        "An index compares modes: with a single one it is undefined.": K == 1,
        "Warning: the score is below 0.8. An unfinished Meta-Learner has an order of its own;\n"
        "try more outer steps, or smaller learning rates.": not summary["score"] > 0.8}
    return "\n".join(lines + [words for words, holds in notes.items() if holds])

def panel(results, system, by_column=False):
    """A panel for plots.dynamics; plots.dynamics([panel]) is a slide."""
    time, strength, stderr = results.curve(system, by_column)
    label, unit = results[f"{system}/label"]
    row = learners.describe(*results.tensors(system, by_column))
    theory = "theory_by_column" if by_column else "theory_half_times"
    return dict(title=f"{label}{', by column' * by_column}\n"
                f"index {format_number(row['staggering'], row['lower_bound'])}",
                time=time, strength=strength, stderr=stderr, half_times=row["half_times"],
                labels=[f"column {k + 1}" for k in range(strength.shape[1])] if by_column
                else results["modes"],
                theory=None if by_column else results.get(f"{system}/theory"),
                theory_half_times=results.get(f"{system}/{theory}"), axes=dict(xlabel=unit),
                log=len(time) > 20 and np.ptp(np.diff(time)[:-1]) > 0.01 * time[-1])

def figures(results):
    """All figures of a run by name."""
    systems, caption = results.systems(), results.config.name()
    compared = [system for system in ("learner", "meta", "bayes") if system in systems]
    controls = [system for system in systems if system not in [*compared, "one_step"]]
    panels = dict(dynamics=[panel(results, system) for system in compared],
                  controls=[panel(results, system) for system in controls])
    if "learner/column" in results:                       # the thesis: whose order is it?
        panels["order"] = [panel(results, system, by_column) for by_column in (False, True)
                           for system in compared]
        panels["one_step"] = [panel(results, system, by_column=True)
                              for system in ("one_step", "meta", "bayes")]
    captions = dict(order=f"upper row by length, lower row by column; {caption}")
    drawn = {name: plots.dynamics(those, captions.get(name, caption))
             for name, those in panels.items() if those}
    drawn["repeats"] = plots.lines([repeats_panel(results, system) for system in compared],
                                   f"{caption} · half-times where reached")
    if "gain_1/time" in results:
        drawn["gain"] = plots.lines([gain_panel(results)], caption)
    return drawn

def repeats_panel(results, system):
    """Half-times in ten repeats of the first task, and of the average over all its repeats."""
    strength, time = results.tensors(system)
    label, unit = results[f"{system}/label"]
    modes, repeats = results["modes"], min(10, strength.shape[2])
    average = strength[:, 0].mean(1, keepdim=True)
    half_times = learners.half_time(torch.cat([strength[:, 0, :repeats], average], 1), time)
    place = [*range(repeats), repeats + 1.5]
    reached = half_times.masked_fill(~half_times.isfinite(), torch.nan).numpy()
    curves = [dict(x=[x] * len(y), y=y, color="0.7", label="_", zorder=1)
              for x, y in zip(place, reached)]
    for k, mode in enumerate(modes):                      # beside each other where all agree
        aside = [0] * repeats + [0.3 * (k - (len(modes) - 1) / 2)]
        curves.append(dict(x=np.add(place, aside), y=reached[:, k], label=mode, ls="",
                           marker=plots.MARKERS[k % 5], color=plots.shade(k / len(modes))))
    return dict(curves=curves, axes=dict(
        title=label, ylabel=f"half-time ({unit})", xticks=[(repeats - 1) / 2, place[-1]],
        xticklabels=[f"{repeats} repeats", "average"]))

def gain_panel(results):
    """The Learner's dial: its index against its gain, in theory and measured; no lower bounds."""
    s = torch.tensor(sorted(results.config.singular_values, reverse=True))
    gains = torch.logspace(-3, 2, 100)
    half_times = learners.gain_half_times(s, gains[:, None])                # (100, K)
    curves = [dict(x=gains, y=half_times[:, -1] / half_times[:, 0], label="theory", color="black",
                   ls="--")]
    looks = dict(learner=("D", 0, "Learner's start"), default_start=("^", 1, "torch's default"),
                 gain_1=("o", 0.5, "layers with a product of zero"))
    for system, row in results.summary["systems"].items():
        if f"{system}/gain" in results and not row["lower_bound"]:
            index, (low, high) = row["staggering"], row["staggering_ci"]
            marker, place, label = looks.get(system, ("o", 0.5, "_"))       # _: not in the legend
            curves.append(dict(
                x=[results[f"{system}/gain"]], y=[index], yerr=[[index - low], [high - index]],
                label=label, ls="", ms=10, marker=marker, color=plots.shade(place), zorder=3))
    return dict(curves=curves, axes=dict(title="The larger the initial gain, the smaller the index",
                xlabel="initial gain $c_0$", ylabel="staggering index", xscale="log"))

# ---------------------------------------------------------------- the folder of a run
def run(config, folder=None, fresh=False):
    """Runs or resumes an experiment in a folder (default: runs/ and the name of the config); if it
    is complete, only draws it again. Prints the table and returns Results. Raises ValueError or
    OSError if the folder cannot hold this run, and FloatingPointError if learning diverges."""
    folder = open_folder(config, folder, fresh)
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

def open_folder(config, folder=None, fresh=False):
    """Makes a folder that of a run: one that is empty or new, or that run's already. With `fresh`,
    it may hold another run of metadyn, which is removed. What metadyn did not write is never
    touched. Returns its Path. Raises ValueError and OSError."""
    folder = Path(folder or f"runs/{config.name()}")
    folder.mkdir(parents=True, exist_ok=True)
    here = dict(vars(config), family=config.experiment.__name__, device="auto",
                code=code_version(config))
    here = json.loads(json.dumps(here))                   # lists for tuples, as in the file
    empty = all(file.name == "unfinished-config.json" for file in folder.iterdir())
    there = here if empty else read_config(folder)
    if fresh:
        for name in "results.npz", "checkpoint.pt", "summary.json":
            (folder / name).unlink(missing_ok=True)
    if fresh or empty:
        write_json(folder / "config.json", here)
        return folder
    differs = [f"{name} {there.get(name)} there, {value} here"
               for name, value in here.items() if name != "code" and there.get(name) != value]
    if not (folder / "results.npz").exists():             # a finished run may be of other code
        differs += [f"{name} changed since" for name in changed_parts(there, here)]
    if differs:
        raise ValueError(f"{folder} holds another run ({', '.join(differs)}); choose another "
                         "folder, or replace that run with --fresh (fresh=True)")
    return folder

def changed_parts(there, here):
    """Which parts of the code differ between two contents of config.json."""
    return [name for name, digest in here["code"].items() if there["code"].get(name) != digest]

def read_config(folder):
    """What config.json of a run says. Raises ValueError if there is none of ours."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        if {"family", "seed", "code"} <= set(config):
            return config
    raise ValueError(f"{folder} holds no run of this metadyn; a new one needs an empty or new "
                     "folder")

def code_version(config):
    """A digest of each part of the code that makes the numbers, comments and docstrings aside."""
    digests, own = {}, sys.modules.get(type(config).__module__)
    for part in tasks, learners, meta, sys.modules[__name__], own, config.experiment:
        with contextlib.suppress(OSError, TypeError):     # what was typed in may have no source
            tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
            for node in ast.walk(tree):
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                    node.value = ast.Constant(None)       # a docstring
            name = Path(getattr(part, "__file__", part.__name__)).name
            digests[name] = hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]
    return digests

def load(folder):
    """The Results of a finished run, with a warning if the code has changed since. Raises
    ValueError if there is none."""
    there, path = read_config(folder), Path(folder, "results.npz")
    settings = {name: there[name] for name in there if name not in ("family", "code")}
    try:
        families = {cls.experiment.__name__: cls for cls in Run.__subclasses__()}
        if there["family"] not in families:
            raise ValueError(f"nothing here defines {there['family']}")
        config = families[there["family"]](**settings)
        with np.load(path) as arrays:
            results = Results(config, **arrays)
    except Exception as error:                            # zipfile and numpy raise many kinds
        raise ValueError(f"{path} is missing, damaged or of another file: {error}") from error
    if changed := changed_parts(there, dict(code=code_version(config))):
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
    """Mean and standard deviation over seeds of every number of finished runs, in out/overview.csv;
    half-times at each skew or tie in out/dials.png. Returns the most important numbers as text.
    Raises ValueError for a folder without a finished run, and if a file of another kind would be
    overwritten."""
    runs, configs, columns, rows, lines = {}, {}, ["run", "number", "mean", "sd"], [], []
    for folder in folders:
        results = load(folder)
        name = replace(results.config, seed=0).name()
        configs[name] = results.config
        runs.setdefault(name, {})[f"seed{results.config.seed}"] = flatten(results.summary)
    seeds = sorted({seed for by_seed in runs.values() for seed in by_seed})
    for run, by_seed in runs.items():
        for number in next(iter(by_seed.values())):
            values = [numbers.get(number, math.nan) for numbers in by_seed.values()]
            several = len(values) > 1 and np.isfinite(values).all()
            row = [run, number, np.mean(values), np.std(values, ddof=1) if several else math.nan]
            rows.append(row + [by_seed.get(seed, {}).get(number, "") for seed in seeds])
            if number == "score" or re.fullmatch(
                    "systems/(learner|meta|bayes)/(staggering|rank_correlation)", number):
                bound = number.endswith("staggering") and any(
                    numbers[number.replace("staggering", "lower_bound")]
                    for numbers in by_seed.values())
                mean, sd = format_number(row[2], bound), format_number(row[3])
                if number == "score":
                    mean, sd = f"{row[2]:.3f}", f"{row[3]:.3f}"
                lines.append(f"{run:30} {number.removeprefix('systems/'):26} {mean:>6} +- {sd}")
    if out:
        path, dials = Path(out, "overview.csv"), Path(out, "dials.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        ours = path.exists() and path.read_text("utf-8").startswith(",".join(columns))
        if not ours and (path.exists() or dials.exists()):
            raise ValueError(f"{out} holds an overview.csv or dials.png that is not of metadyn")
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([columns + seeds, *rows])
        means = {run: {row[1]: row[2] for row in rows if row[0] == run} for run in runs}
        caption = "mean over seeds" if len(seeds) > 1 else ""
        plots.lines(dial_panels(configs, means), caption).savefig(dials)
    return "\n".join(lines)

def dial_panels(configs, means):
    """Half-times of Bayes and the Meta-Learner by mode, or by column where modes have one: a curve
    for each system and setting of the dial, a panel for each family."""
    panels = {}
    for name, config in configs.items():
        family = config.experiment.__name__
        curves = panels.setdefault(family, dict(curves=[], axes=dict(
            title=family, xlabel="column" if family == "linreg" else "mode",
            ylabel="half-time (trials)")))["curves"]
        dial = next((name for name in ("skew", "tied") if hasattr(config, name)), None)
        setting = getattr(config, dial) if dial else 0.0
        for system, label, line in ("bayes", "Bayes", "--"), ("meta", "Meta-Learner", "-"):
            half_times = [[mean for number, mean in means[name].items() if number.startswith(
                f"systems/{system}/{path}half_times/")] for path in ("by_column/", "")]
            y = half_times[0] or half_times[1]
            curves.append(dict(x=range(1, len(y) + 1), y=y, ls=line, marker="o", ms=5,
                               label=f"{label}, {dial} {setting:g}" if dial else label,
                               color=plots.shade((setting + 1) / 3)))
    return list(panels.values())

def make_parser():
    """The command line: a command for each family, with an option for each of its settings."""
    parser = argparse.ArgumentParser(prog="metadyn.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for cls in Run.__subclasses__():
        sub = commands.add_parser(cls.experiment.__name__, help=cls.__doc__,
                                  description=cls.__doc__, allow_abbrev=False)
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
    """Runs a command line. Returns 0, or 1 for a failure and 130 for Ctrl-C; a mistake by the user
    exits with argparse's error and status 2."""
    parser = make_parser()
    options = vars(parser.parse_args(words))
    command, folder = options.pop("command"), options.pop("out")
    try:
        if command == "compare":
            print(compare(options["folders"], folder))
            return 0
        settings, quick, fresh = map(options.pop, ("settings", "quick", "fresh"))
        config = settings.quick(**options) if quick else settings(**options)
        folder = open_folder(config, folder, fresh)
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
        run(config, folder)
        return 0
    except (FloatingPointError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise                                         # a mistake of ours
        print(f"\nmetadyn.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nmetadyn.py: stopped; the same command, without --fresh, resumes from the last "
              "checkpoint", file=sys.stderr)
        return 130

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
