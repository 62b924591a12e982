r"""metadyn: how structure is learned, by a Learner, by a Meta-Learner and by Bayes-optimal inference.

    python metadyn.py linreg                 # the whole experiment, pictures and table in runs/linreg
    python metadyn.py linreg --quick         # the same in seconds, too short to learn much
    python metadyn.py linreg --help          # every setting with its default and unit
    python metadyn.py all --seeds 5          # the three families, each over five seeds, and one overview

and from Python, with the settings as arguments:

    result = metadyn.linreg(quick=True, out="runs/quick")
    time, strength, stderr = result.curve("meta")        # (R,), (R, K), (R, K), ready to plot

In this file: settings; the three families, each its settings and what it wires together of tasks.py, learners.py, meta.py and plots.py; the
experiment, the same for all; the files of a run; what a person gets; the command line. The path from a command to its figures is `main`,
`run`, `Experiment`, then the family's `draw`. Reproduces Rabinowitz 2019, arXiv 1905.01320. Left out on purpose: sweeps, logging services,
multi-GPU.
"""
import argparse
import csv
import ctypes
import io
import json
import math
import statistics
import sys
import textwrap
import time
import typing
from contextlib import contextmanager
from functools import partial
from dataclasses import asdict, dataclass, field, fields, replace
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
    """A mistake by the user, told in one line: the option, what was given and what is allowed."""

    def __init__(self, option, given, allowed):
        super().__init__(f"{option}: {given} given, allowed: {allowed}")


# ---------------------------------------------------------------- settings

def option(default, help, low=-math.inf, above=-math.inf, high=math.inf, choices=None):
    """A field of a config: its default, help with unit, and what is allowed: from `low` to `high`, more than `above`, one of `choices`."""
    rules = dict(metadata=dict(help=help, low=low, above=above, high=high, choices=choices))
    return field(default_factory=lambda: list(default), **rules) if isinstance(default, list) else field(default=default, **rules)


@dataclass
class Config:
    """Settings that all families share."""
    seed: int = option(0, "seed of the streams for tasks, initialisation and evaluation", low=0, high=10**9)
    device: str = option("auto", "where the Meta-Learner runs", choices=("auto", "cpu", "cuda", "mps"))
    hidden: int = option(128, "LSTM units", low=1)
    layers: int = option(2, "LSTM layers", low=1)
    encoder: int = option(0, "ReLU layers before the LSTM", low=0)
    decoder: int = option(0, "ReLU layers after the LSTM", low=0)
    batch: int = option(128, "episodes in an outer step", low=1)
    outer_steps: int = option(5000, "updates of the Meta-Learner's weights", low=1)
    outer_optimizer: str = option("muon", "optimizer of the outer loop", choices=("muon", "adam"))
    muon_lr: float = option(0.03, "peak learning rate of Muon, on the matrices of the LSTM and of ReLU layers but the first", above=0)
    adam_lr: float = option(0.0, "peak learning rate of Adam (0: 0.01 on the weights that Muon leaves, 0.003 on all without Muon)", low=0)
    eval_tasks: int = option(16, "evaluation tasks, the same for every system", low=2)
    eval_episodes: int = option(1024, "episodes of each evaluation task, for the inner loops' curves", low=1)
    fresh_tasks: int = option(4096, "tasks drawn from the prior to measure the captured fraction", low=2)
    QUICK = dict(hidden=48, outer_steps=300, batch=64, eval_tasks=4, eval_episodes=64, fresh_tasks=512)
    FULL = dict(hidden=256, outer_steps=30000, eval_tasks=64, fresh_tasks=16384)

    def check(self):
        """Raises Mistake where a setting is not what its field allows; fills in those that others, or the machine, decide."""
        for f in fields(self):
            name, rule, several = "--" + f.name.replace("_", "-"), f.metadata, typing.get_args(f.type)
            given = getattr(self, f.name)
            if rule["choices"]:
                if given not in rule["choices"]:
                    raise Mistake(name, given, ", ".join(rule["choices"]))
                continue
            try:
                values = list(map(several[0] if several else f.type, given if several else [given]))
                if values != list(given if several else [given]):
                    raise ValueError
            except (TypeError, ValueError, OverflowError):
                raise Mistake(name, given, "a whole number" if int in (f.type, *several) else "a number") from None
            if several and not values and f.default_factory():
                raise Mistake(name, "nothing", "at least one number")
            for value in values:
                if not (math.isfinite(value) and rule["low"] <= value <= rule["high"] and value > rule["above"]):
                    bound = f"at least {rule['low']}" if math.isfinite(rule["low"]) else f"more than {rule['above']}"
                    bound += f" and at most {rule['high']}" if math.isfinite(rule["high"]) else ""
                    raise Mistake(name, value, f"a finite number, {bound}")
            setattr(self, f.name, values if several else values[0])
        self.adam_lr = self.adam_lr or (0.01 if self.outer_optimizer == "muon" else 0.003)
        self.device = resolve_device(self.device)

    def settings(self):
        """What config.json says of them."""
        return dict(family=type(self).__name__.lower()) | asdict(self)

    # What `experiment` asks of a family. It must have four methods of its own:
    #     priors()                         task distributions by suffix: that of "" is the family's, others serve the test out of distribution
    #     targets(prior, generator)        the fixed evaluation tasks, as weights (N, Dy, F)
    #     learner_curves(targets)          yields (system, steps (R,), mode strengths (R, N, K), other readings by name); one system is "learner"
    #     mode_names(system="meta")        what the figures call the K modes
    # The rest are as in regression, and may be replaced.

    passes = 3                                            # of an outer step: forward, and backward, which is twice the work
    alike = False                                         # whether modes differ in name only

    def build(self, prior, generator):
        """A Meta-Learner for this prior, untrained."""
        return meta.MetaLearner(prior.input_size, prior.outputs, self.hidden, generator, self.layers, self.encoder, self.decoder, prior.show)

    def predictor(self, model):
        """The Meta-Learner as something that answers a predictor's calls."""
        return model

    def outer_loss(self, prior, model, generator, share):
        """The loss of an outer step, twice (to descend, to report). share: of the outer loop that is done."""
        return meta.squared_error_loss(model, prior, self.batch, generator)

    def for_prior(self, suffix):
        """The settings under which the Meta-Learner of one of the priors is trained."""
        return self

    def conditions(self, W, priors, generator):
        """Yields (condition, prior, targets) for the out-of-distribution test."""
        for scale in (1, 4):
            yield f"evaluation tasks, scaled by {scale}", priors[""], scale * W

    def more(self, experiment):
        """What this family alone measures: adds to the curves and the rows of an Experiment."""

    def draw(self, tables, indices, folder):
        """Writes the figures. tables: by name, dicts of columns; indices: staggering by system, as the figures say it."""
        plots.draw_family(tables, indices, self.mode_names(), folder)


# ---------------------------------------------------------------- the families

@dataclass
class Linreg(Config):
    """Linear regression: the singular modes of a linear map, against Saxe, McClelland & Ganguli 2013."""
    noise: float = option(0.1, "standard deviation of the noise on y", low=0)
    dim: int = option(5, "dimension of x and of y", low=1)
    singular_values: list[float] = option([1.6, 1.2, 0.9, 0.6, 0.3], "singular values of the evaluation tasks; mode 1 is the largest", above=0)
    trials: int = option(20, "trials in an episode", low=2)
    learner_lr: float = option(0.01, "the Learner's step size (1 / tau)", above=0)
    learner_steps: int = option(3000, "the Learner's gradient steps", low=1)
    learner_scale: float = option(1e-3, "strength u0 of each mode of the Learner's map at the start", above=0)
    scales: list[float] = option([0.25, 0.5, 1.0, 2.0, 4.0, 8.0], "factors on the spectrum, out of distribution", above=0)
    QUICK = Config.QUICK | dict(outer_steps=400, eval_tasks=8, eval_episodes=128, fresh_tasks=1024)

    def check(self):
        """The same, and one singular value for each dimension, in descending order."""
        super().check()
        if len(self.singular_values) != self.dim:
            raise Mistake("--singular-values", len(self.singular_values), f"as many as --dim, {self.dim}")
        self.singular_values = sorted(self.singular_values, reverse=True)      # mode 1 is the strongest

    def priors(self):
        """The task distribution."""
        return {"": tasks.LinearRegression(self.dim, self.noise, self.trials)}

    def targets(self, prior, generator):
        """The fixed evaluation tasks, as weights (N, dim, dim)."""
        return prior.evaluation_tasks(self.eval_tasks, torch.tensor(self.singular_values), generator)

    def learner_curves(self, W):
        """Yields (system, steps (R,), strengths (R, N, K), other readings): the Learner, its closed form, the controls, the four optimizers."""
        W, lr, u0, steps = W.double(), self.learner_lr, self.learner_scale, self.learner_steps
        U, s, Vh = torch.linalg.svd(W)
        for system, start, optimizer, rate, n in (
                ("learner", "aligned", "sgd", lr, steps), ("shallow", "shallow", "sgd", lr, steps),
                ("sgd", "random", "sgd", lr, steps), ("adam", "random", "adam", lr / 10, steps),
                ("rmsprop", "random", "rmsprop", lr / 10, steps), ("muon", "random", "muon", lr, max(1, steps // 10))):
            t, maps = learners.linear_network(W, rate, n, start, u0, optimizer, every=max(1, n // 400),
                                              generator=stream(self.seed, "learners"))            # the same random starts for all
            yield system, t, tasks.mode_strength(maps, U, Vh.mT, s), dict(off_diagonal=tasks.off_diagonal(maps, U, Vh.mT, s))
            theory = dict(learner=learners.deep_linear_theory, shallow=learners.shallow_theory, muon=learners.muon_theory).get(system)
            if theory:
                closed_form = theory(s[0], u0 if system != "shallow" else 0.0, t * rate) / s[0]
                yield system + "_theory", t, closed_form[:, None].expand(-1, len(W), -1), {}

    def conditions(self, W, priors, generator):
        """Yields (condition, prior, targets) for the out-of-distribution test: the evaluation tasks with their spectrum scaled."""
        for scale in self.scales:
            yield f"{scale:g}", priors[""], scale * W

    def mode_names(self, system="meta"):
        """What the figures call the modes."""
        return [f"s = {s:g}" for s in self.singular_values]

    def draw(self, tables, indices, folder):
        """Writes the figures."""
        plots.draw_linreg(tables, indices, self.mode_names(), self.singular_values, folder)


@dataclass
class Nonlinreg(Config):
    """Nonlinear regression on the circle: the frequencies of a function, against Rahaman et al. 2018 and Xu et al. 2018."""
    noise: float = option(0.1, "standard deviation of the noise on y", low=0)
    frequencies: int = option(5, "how many frequencies: the low-pass prior 1 ... K", low=1)
    band: list[int] = option([], "lowest and highest frequency of another prior, in place of --frequencies", low=1)
    grid: int = option(0, "points on the circle at which the modes are read (0: 4 more than twice the highest frequency)", low=0)
    trials: int = option(40, "trials in an episode", low=2)
    encoder: int = option(1, "ReLU layers before the LSTM", low=0)
    outer_steps: int = option(3000, "updates of the Meta-Learner's weights", low=1)
    bandpass_steps: int = option(1500, "updates of the second Meta-Learner, that of the band-pass prior", low=1)
    learner_lr: float = option(1e-3, "the Learner's learning rate (Adam)", above=0)
    learner_steps: int = option(1000, "the Learner's gradient steps", low=1)
    learner_hidden: int = option(128, "units in each of the Learner's layers", low=1)
    learner_layers: int = option(4, "the Learner's hidden layers", low=1)
    learner_grid: int = option(200, "points on the circle that the Learner is trained on, all at every step", low=1)
    learner_frequencies: list[int] = option([], "frequencies of the Learner's targets (default: those of the prior)", low=1)
    eval_tasks: int = option(8, "evaluation tasks, the same for every system", low=2)
    QUICK = Config.QUICK | dict(bandpass_steps=100, learner_hidden=64, learner_layers=3, learner_steps=500)
    FULL = Config.FULL | dict(bandpass_steps=30000, eval_episodes=4096, eval_tasks=20, learner_lr=3e-4,
                              learner_steps=60000, learner_hidden=256, learner_layers=6, learner_frequencies=list(range(5, 51, 5)))

    def check(self):
        """The same, and grids fine enough for every frequency."""
        super().check()
        if self.band and (len(self.band) != 2 or self.band[0] > self.band[1]):
            raise Mistake("--band", " ".join(map(str, self.band)), "the lowest frequency, then the highest, as in --band 3 5")
        low, high = self.passband()
        highest = 2 * high - low + 1                      # of the test out of distribution
        self.grid = self.grid or 2 * highest + 4
        for name, grid, highest in ("grid", self.grid, highest), ("learner-grid", self.learner_grid, max(self.learner_frequencies or [high])):
            if grid <= 2 * highest:
                raise Mistake(f"--{name}", grid, f"at least {2 * highest + 1}, for frequencies up to {highest}")

    def passband(self):
        """The lowest and the highest frequency of the prior."""
        return tuple(self.band) or (1, self.frequencies)

    def bands(self):
        """Three bands of frequencies: the lower and the upper half of the pass band, and as many again above it."""
        low, high = self.passband()
        middle = (low + high + 1) // 2
        return range(low, middle), range(middle, high + 1), range(high + 1, 2 * high - low + 2)

    def priors(self):
        """The prior, and for the out-of-distribution test one on the upper half of its band alone: low-pass and band-pass."""
        lower, upper, _ = self.bands()
        return {"": tasks.FourierRegression([*lower, *upper], self.noise, self.trials, self.grid),
                "_bandpass": tasks.FourierRegression(upper, self.noise, self.trials, self.grid)}

    def for_prior(self, suffix):
        """The same, with the outer steps of the second prior."""
        return replace(self, outer_steps=self.bandpass_steps) if suffix else self

    def targets(self, prior, generator):
        """Fixed evaluation tasks of one amplitude at every frequency, that of the prior, and random phases: weights (N, 1, 2 K)."""
        return prior.evaluation_tasks(self.eval_tasks, torch.full((len(prior.frequencies),), (2 * prior.weight_var) ** 0.5), generator)

    def relu_learner(self, target):
        """Trains ReLU networks on targets (S, learner_grid): some 200 steps (R,), and the functions f (R, S, learner_grid) at them."""
        x = torch.arange(self.learner_grid) / self.learner_grid
        return learners.relu_network(x, target, self.learner_lr, self.learner_steps, self.learner_hidden, self.learner_layers,
                                     max(1, self.learner_steps // 200), stream(self.seed, "learners"))

    def learner_curves(self, W):
        """Yields (system, steps (R,), strengths (R, N, K), other readings): the Learner on targets of flat and of rising amplitude.

        They have the phases of the evaluation tasks, and their power. With learner_frequencies, Rahaman's: amplitude 1, or rising from 1/K to 1.
        """
        lower, upper, _ = self.bands()
        prior = tasks.FourierRegression(self.learner_frequencies or [*lower, *upper], grid=self.learner_grid)
        ramp = torch.arange(1.0, len(prior.frequencies) + 1)
        if self.learner_frequencies:
            W, rising = prior.evaluation_tasks(len(W), torch.ones(len(ramp)), stream(self.seed, "evaluation")), ramp / len(ramp)
        else:
            rising = ramp / ramp.square().mean().sqrt()
        for system, weights in ("learner", W), ("learner_rising", W * rising.repeat(2)):
            target = (prior.features(prior.queries()) @ weights.mT)[..., 0]
            t, f = self.relu_learner(target)
            strength, outside = tasks.fourier_strength(f, target, prior.frequencies)
            yield system, t, strength, dict(outside=outside)

    def conditions(self, W, priors, generator):
        """Yields (condition, prior, targets) for the out-of-distribution test: signals of each band, for predictors of both priors."""
        for band in filter(len, self.bands()):
            source = tasks.FourierRegression(band, self.noise, self.trials, self.grid)
            yield f"{band[0]} to {band[-1]}", source, self.targets(source, generator)

    def more(self, experiment):
        """fits.csv: one task, one episode, and what each system makes of it before each trial; Bayes with its posterior deviation.

        Of the Learner as many moments, or fewer; first evenly spaced, then at the squares, since it learns its first modes so early.
        """
        prior, W, predictors = experiment.prior, experiment.targets, experiment.predictors
        x, y = prior.episodes(W[:1], stream(self.seed, "probe"))
        xq = tasks.FourierRegression(prior.frequencies, grid=self.learner_grid).queries()
        target, phi = (prior.features(xq) @ W[0].mT)[:, 0], prior.features(xq.double())
        deviation = torch.einsum("qf, tfg, qg -> tq", phi, predictors["bayes"].posterior(x, y)[1][0], phi).clamp_min(0).sqrt()
        steps, learner = self.relu_learner(target[None])
        last, T = len(steps) - 1, prior.trials
        seen = sorted({min(last, max(t, round(last * (t / T) ** 2))) for t in range(T + 1)})
        meta_f, bayes_f = (predictors[system].query(x, y, xq)[0, ..., 0].cpu() for system in ("meta", "bayes"))
        trials = torch.arange(T + 1)[:, None]
        rows = experiment.rows["fits"]
        rows += long("data", trials[:-1, 0], x[0, :, 0], y[0, :, 0], "") + long("target", 0, xq[:, 0], target, "")
        rows += long("learner", steps[seen, None], xq[:, 0], learner[seen, 0], "")
        rows += long("meta", trials, xq[:, 0], meta_f, "") + long("bayes", trials, xq[:, 0], bayes_f, deviation)

    def mode_names(self, system="meta"):
        """What the figures call the modes."""
        low, high = self.passband()
        return [f"k = {k}" for k in (self.learner_frequencies if system == "learner" and self.learner_frequencies else range(low, high + 1))]

    def draw(self, tables, indices, folder):
        """Writes the figures."""
        plots.draw_nonlinreg(tables, indices, self.mode_names(), self.mode_names("learner"), self.bands(), folder)


@dataclass
class Bandit(Config):
    """Contextual bandits: the correct action in each context, against Schaul et al. 2019 (ray interference)."""
    contexts: int = option(5, "contexts", low=1)
    actions: int = option(5, "actions in each context", low=2)
    trials: int = option(60, "trials in an episode", low=2)
    context_rates: list[float] = option([], "how often each context comes, out of distribution (default: halving)", low=0)
    eval_tasks: int = option(16, "evaluation tasks; their actions are renamed in every episode", low=2)
    layers: int = option(1, "LSTM layers", low=1)
    outer_steps: int = option(1500, "updates of the Meta-Learner's weights", low=1)
    entropy: float = option(0.05, "weight of the entropy bonus at the start of the outer loop, falling to zero", low=0)
    learner_lr: float = option(0.5, "the Learner's step size", above=0)
    learner_steps: int = option(2000, "the Learner's gradient steps; 40 times as many from the spread-out start", low=1)
    learner_seeds: int = option(200, "Learners, each with a task and a start of its own", low=2)
    learner_sd: float = option(0.1, "standard deviation of the Learner's first logits (near-uniform policies)", low=0)
    learner_spread: float = option(1.0, "standard deviation of the first logits of the spread-out start", low=0)
    learner_trials: int = option(32, "trials that a step of the sampled Learner (REINFORCE) sees", low=1)
    scaling: list[int] = option([2, 3, 4, 5, 6, 7, 8], "numbers of contexts, for the time to a mean J of 0.9", low=1)
    scaling_meta: int = option(0, "1 to train a Meta-Learner for each of them too", low=0, high=1)
    QUICK = Config.QUICK | dict(outer_steps=100, batch=32, learner_seeds=50, learner_steps=500, scaling=[2, 5])
    FULL = Config.FULL | dict(outer_steps=10000, learner_seeds=1000, scaling_meta=1)

    passes = 4                                            # as in regression, and the rollouts, forward
    alike = True                                          # contexts differ in name only: order them as each run learned them

    def check(self):
        """The same, and a rate for each context."""
        super().check()
        if self.context_rates and (len(self.context_rates) != self.contexts or not any(self.context_rates)):
            given = " ".join(f"{rate:g}" for rate in self.context_rates)
            raise Mistake("--context-rates", given, f"as many as --contexts, {self.contexts}, not all zero")

    def rates(self):
        """How often each context comes, out of distribution."""
        return self.context_rates or [2.0 ** -c for c in range(self.contexts)]

    def priors(self):
        """The task distribution."""
        return {"": tasks.ContextualBandit(self.contexts, self.actions, self.trials)}

    def targets(self, prior, generator):
        """The fixed evaluation tasks, as correct actions (N, C)."""
        return prior.sample(self.eval_tasks, generator)

    def predictor(self, model):
        """The Meta-Learner as an agent."""
        return meta.MetaAgent(model)

    def outer_loss(self, prior, model, generator, share):
        """The outer loop's loss on a batch of fresh episodes, whose gradient is the policy gradient."""
        return meta.policy_gradient_loss(meta.MetaAgent(model), prior, self.batch, self.entropy * (1 - share), generator)

    # is the bias shared, is the start spread out
    STARTS = dict(learner=(True, False), decoupled=(False, False), spread=(True, True), decoupled_spread=(False, True))

    def learn(self, system, contexts, trials=0):
        """One of STARTS' Learners: steps (R,), spaced in their logarithm, and J (R, S, C). All have one start, but for its scale."""
        generator, (shared, spread) = stream(self.seed, "learners"), self.STARTS[system]
        correct = torch.randint(self.actions, (self.learner_seeds, contexts), generator=generator)
        logits = torch.randn(*correct.shape, self.actions, generator=generator, dtype=torch.float64)
        logits *= self.learner_spread if spread else self.learner_sd
        last = self.learner_steps * (40 if spread else 1)                      # a spread-out start takes that much longer
        steps = sorted({0, *(round(last ** (i / 200)) + j for i in range(201) for j in (0, 1))})      # in pairs, to see what one step does
        return torch.tensor(steps), learners.policy_gradient(correct, logits, self.learner_lr, steps, shared, trials, generator)

    def learner_curves(self, correct):
        """Yields (system, steps (R,), strengths (R, S, C), no other readings): those of STARTS, and REINFORCE by samples, each on tasks of its
        own, far more than the evaluation tasks: a Learner's chance lies in its start.
        """
        prior = self.priors()[""]
        for system in self.STARTS:
            t, J = self.learn(system, self.contexts)
            yield system, t, prior.strength(J), {}
        t, J = self.learn("learner", self.contexts, self.learner_trials)
        yield "sampled", t, prior.strength(J), {}

    def conditions(self, correct, priors, generator):
        """Yields (condition, prior, targets) for the out-of-distribution test: contexts that come at unequal rates."""
        yield "equal rates", priors[""], correct
        yield "unequal rates", tasks.ContextualBandit(self.contexts, self.actions, self.trials, self.rates()), correct

    def more(self, experiment):
        """The Bayes-optimal curve in closed form; with the actions' names kept, the Meta-Learner and a Bayes that tries them in order.
        runs.csv: some Learners one by one. interference.csv. scaling.csv.
        """
        prior, correct, agents, curves = experiment.prior, experiment.targets, experiment.predictors, experiment.curves
        for system in self.STARTS:
            t, strength = curves[system]
            ordered = learners.in_order_learned(strength[:, :6], t)
            for run in range(ordered.shape[1]):
                experiment.rows["runs"] += long(system, run, torch.arange(1, self.contexts + 1)[:, None], t, ordered[:, run].T)
        curves["bayes_theory"] = experiment.trials, prior.strength(prior.bayes_curve()).float()[:, None].expand(-1, self.eval_tasks, -1)
        for system, agent in ("meta_fixed", agents["meta"]), ("bayes_fixed", tasks.OrderedBayesAgent()):
            strength, _ = prior.inner_loop(agent, correct, max(1, self.eval_episodes // 4), stream(self.seed, "probe"), relabel=False)
            curves[system] = experiment.trials, strength
        generator = stream(self.seed, "probe")
        experiment.rows["interference"] = self.interference_rows(agents, prior, curves, generator)
        experiment.rows["scaling"] = self.scaling_rows(generator, experiment.folder)

    def interference_rows(self, agents, prior, curves, generator):
        """What a step or a visit does for an unsolved context, by how many others are solved: rows of interference.csv."""
        rows = []
        for system in self.STARTS:
            t, strength = curves[system]
            J = prior.probability(strength)
            before, after = (J[i][t.diff() == 1] for i in (slice(None, -1), slice(1, None)))      # looks one gradient step apart
            rows += [(system, n, *each) for n, each in enumerate(tasks.interference(before, after, torch.ones_like(after, dtype=torch.bool)))]
        episodes = prior.episodes(prior.sample(2048, generator), generator)
        for system in ("meta", "bayes"):
            J = prior.play(agents[system], *episodes)[1]
            rows += [(system, n, *each) for n, each in enumerate(tasks.interference(J[:, :-1], J[:, 1:], prior.first_visits(episodes[1])))]
        return [row for row in rows if row[-1]]

    def scaling_rows(self, generator, folder):
        """The time to a mean J of 0.9 against the number of contexts: rows of scaling.csv."""
        rows = []
        for contexts in self.scaling:
            for system in ("learner", "decoupled"):
                t, J = self.learn(system, contexts)
                times = learners.half_time((J.mean(-1) - 0.4).T, t)            # where J - 0.4 is 0.5, J is 0.9
                rows.append((system, contexts, learners.geometric_mean(times).item(),
                             *learners.bootstrap_interval(learners.geometric_mean, times, generator=generator)))
            longer = tasks.ContextualBandit(contexts, self.actions, 3 * self.actions * contexts)
            curves = dict(bayes=longer.bayes_curve().mean(-1))
            if self.scaling_meta:
                with torch.enable_grad():
                    model, _ = train(self, longer, folder / f"checkpoint_contexts{contexts}.pt")
                curves["meta"] = longer.play(meta.MetaAgent(model), *longer.episodes(longer.sample(2048, generator), generator))[1].mean((0, 2))
            for system, curve in curves.items():
                moment = learners.half_time(curve - 0.4, torch.arange(longer.trials + 1.0)).item()
                rows.append((system, contexts, moment, moment, moment))
        return rows

    def mode_names(self, system="meta"):
        """What the figures call the modes: contexts in the order in which they were learned."""
        return ["first"] + [str(k) for k in range(2, self.contexts)] + ["last"] * (self.contexts > 1)

    def draw(self, tables, indices, folder):
        """Writes the figures."""
        plots.draw_bandit(tables, indices, self.mode_names(), self.rates(), folder)


FAMILIES = {"linreg": Linreg, "nonlinreg": Nonlinreg, "bandit": Bandit}


# ---------------------------------------------------------------- the experiment, the same for every family

PURPOSES = ("tasks", "initialisation", "evaluation", "probe", "learners")


def stream(seed, purpose):
    """A generator of its own for each purpose, so that what one draws never shifts another."""
    return torch.Generator().manual_seed(len(PURPOSES) * seed + PURPOSES.index(purpose))


def long(*columns):
    """Rows of a table from columns, strings, numbers and arrays, that broadcast against each other; the last axis runs fastest."""
    return list(zip(*(column.ravel().tolist() for column in np.broadcast_arrays(*columns))))


def train(config, prior, checkpoint, snapshot=None):
    """Trains a Meta-Learner for this prior, or goes on from its checkpoint. Returns it and its snapshots, if `snapshot` takes any."""
    model = config.build(prior, stream(config.seed, "initialisation")).to(config.device)
    optimizers, generator = meta.make_optimizers(model, config.outer_optimizer, config.muon_lr, config.adam_lr), stream(config.seed, "probe")
    some = prior.episodes(prior.sample(1024, generator), generator)
    bounds = [prior.losses(predictor, *some).mean().item() for predictor in prior.references().values()]
    progress = meta.Progress(config.outer_steps, *bounds, 2 * config.passes * meta.weights(model) * config.batch * prior.trials, config.device)
    return model, meta.outer_loop(model, partial(config.outer_loss, prior), config.outer_steps, optimizers, stream(config.seed, "tasks"),
                                  checkpoint, asdict(config), snapshot, report=progress)


class Experiment:
    """One family's experiment, in four phases: learn, meta_learn, probe, summarise. They fill `curves`, (times (R,), strengths (R, N, K)) by
    system, `rows`, by CSV file, and `summary`.
    """

    def __init__(self, config, folder):
        self.config, self.folder, self.random = config, folder, stream(config.seed, "evaluation")
        self.priors = config.priors()
        self.prior = self.priors[""]
        self.targets = config.targets(self.prior, self.random)                 # the same for every system
        self.fresh = self.prior.episodes(self.prior.sample(config.fresh_tasks, self.random), self.random)
        self.predictors = {name + suffix: predictor for suffix, prior in self.priors.items() for name, predictor in prior.references().items()}
        self.trials = torch.arange(self.prior.trials + 1.0)
        self.few = max(1, config.eval_episodes // 64)                          # episodes of each task, where that will do
        self.curves, self.rows = {}, {name: [] for name in COLUMNS}

    def keep(self, system, time, strength, readings):
        """Takes a system's strengths, (R, N, K) at times (R,), and the other readings of its modes, (R, N) each."""
        self.curves[system] = time, strength
        for name, reading in readings.items():
            self.rows["probe"] += long(system, time, name, reading.mean(1))

    def inner_loop(self, predictor, n, prior, targets):
        """Strengths within n episodes of each target, and other readings, on the same episodes for every predictor."""
        return prior.inner_loop(predictor, targets, n, stream(self.config.seed, "probe"))

    def learn(self):
        """The Learners, and what goes with them."""
        for curve in self.config.learner_curves(self.targets):
            self.keep(*curve)

    def meta_learn(self):
        """The outer loop: a Meta-Learner for each prior."""
        for suffix, prior in self.priors.items():
            model, snapshots = train(self.config.for_prior(suffix), prior, self.folder / f"checkpoint{suffix}.pt", None if suffix else self.snapshot)
            self.predictors["meta" + suffix] = self.config.predictor(model)
            for s in snapshots:
                self.rows["outer_loop"] += long(s["outer_step"], range(1, len(s["strength"]) + 1), s["strength"], s["half_time"], s["value"])

    def snapshot(self, model):
        """What outer_loop.csv tells of the Meta-Learner at one outer step."""
        predictor = self.config.predictor(model)
        strength = self.inner_loop(predictor, self.few, self.prior, self.targets)[0].mean(1)
        return dict(strength=strength[-1].tolist(), half_time=learners.half_time(strength.T, self.trials).tolist(),
                    value=self.prior.sign * self.prior.losses(predictor, *self.fresh).mean().item())

    @torch.no_grad()
    def probe(self):
        """The inner loops: on the evaluation tasks, out of distribution, and what the family adds."""
        for system in ("meta", "bayes"):
            self.keep(system, self.trials, *self.inner_loop(self.predictors[system], self.config.eval_episodes, self.prior, self.targets))
        for condition, prior, targets in self.config.conditions(self.targets, self.priors, self.random):
            data = prior.episodes(targets.repeat_interleave(self.few, 0), self.random)
            for system, predictor in self.predictors.items():
                strength = self.inner_loop(predictor, self.few, prior, targets)[0][-1].mean(0)
                value = prior.sign * prior.losses(predictor, *data).mean().item()
                self.rows["ood"] += long(system, condition, range(1, len(strength) + 1), strength, value)
        self.config.more(self)

    @torch.no_grad()
    def summarise(self):
        """dynamics.csv, performance.csv and summary.json, from what was measured."""
        for system, (t, strength) in self.curves.items():
            strength = learners.in_order_learned(strength, t) if self.config.alike else strength
            self.curves[system] = t, strength
            mean, stderr = strength.mean(1), strength.std(1) / strength.shape[1] ** 0.5
            self.rows["dynamics"] += long(system, torch.arange(1, mean.shape[1] + 1)[:, None], t, mean.T, stderr.T)
        losses = {system: self.prior.losses(self.predictors[system], *self.fresh) for system in ("prior", "bayes", "meta")}
        for system, each in losses.items():
            self.rows["performance"] += long(system, range(self.prior.trials), self.prior.sign * each.mean(0), each.std(0) / len(each) ** 0.5)
        means = [losses[system].mean(1) for system in ("prior", "meta", "bayes")]
        self.summary = {system: learners.describe(strength, t, self.random) for system, (t, strength) in self.curves.items()}
        self.summary["captured"] = learners.captured_fraction(*means).item()
        self.summary["captured_ci"] = list(learners.bootstrap_interval(learners.captured_fraction, *means, generator=self.random))


def measure(config, folder):
    """The whole experiment of a family. Returns the rows of each CSV file, by its name, and the summary."""
    it, seconds = Experiment(config, folder), {}          # the seconds of this process: what an earlier one did is not counted
    for phase, work in dict(learners=it.learn, outer_loop=it.meta_learn, probes=it.probe, summary=it.summarise).items():
        begin = time.perf_counter()
        work()
        seconds[phase] = round(time.perf_counter() - begin, 2)
    return it.rows, it.summary | dict(seconds=seconds)


# ---------------------------------------------------------------- files of a run

COLUMNS = dict(dynamics="system,mode,time,strength,stderr", performance="system,trial,value,stderr",
               outer_loop="outer_step,mode,strength,half_time,value", ood="system,condition,mode,strength,value",
               probe="system,time,reading,value", fits="system,time,x,value,deviation",
               runs="system,run,mode,time,strength", interference="system,solved,chance,gain,visits", scaling="system,contexts,time,low,high")


def written(value):
    """What a file says of a number: itself, "not reached" for an infinite half-time or index, "undefined" for nan. Walks lists and dicts."""
    if isinstance(value, dict):
        return {k: written(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [written(v) for v in value]
    return "not reached" if value == math.inf else "undefined" if value != value else value


def write_table(path, columns, rows):
    """Writes a CSV file, atomically."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([columns, *written(rows)])
    meta.replace_file(path, text.getvalue().encode())


def write_run(folder, rows, summary):
    """Writes the CSV files, and summary.json last: once it is there, the run is complete."""
    for name, table in ((name, table) for name, table in rows.items() if table):
        write_table(folder / f"{name}.csv", COLUMNS[name].split(","), table)
    meta.replace_file(folder / "summary.json", json.dumps(written(summary), indent=1).encode())


@contextmanager
def held(folder):
    """Makes the folder and keeps other runs out of it. Raises Mistake where it cannot be written or another run is at work there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except (OSError, ValueError) as error:                # ValueError: a name with a null character
        raise Mistake("--out", folder, f"a folder that can be written ({getattr(error, 'strerror', error)})") from None
    with lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Mistake("--out", folder, "a folder where no other run is at work") from None
        yield


WAY_OUT = "another folder, or --fresh to replace the run that is there"


def agree(folder, settings, fresh=False):
    """Writes config.json, clearing the folder of what it does not describe; or compares the one that is there with this run's settings.
    Raises Mistake where they differ.
    """
    path = folder / "config.json"
    if fresh or not path.exists():                        # config.json goes last, so that what it does not describe is gone before it
        ours = ("summary.json", *(f"{name}.csv" for name in (*COLUMNS, "overview", "seeds")))
        for file in (*(folder / name for name in ours), *(folder.glob("checkpoint*.pt") if fresh else ()), path):
            file.unlink(missing_ok=True)
        versions = {module.__name__: module.__version__ for module in (torch, np, matplotlib)} | dict(python=sys.version.split()[0])
        meta.replace_file(path, json.dumps(settings | dict(command=sys.argv, versions=versions), indent=1).encode())
        return
    try:
        there = json.loads(path.read_text())
        differing = next((name for name in settings if there.get(name) != settings[name]), None)
    except (ValueError, AttributeError):
        raise Mistake("--out", f"{folder} (its config.json is damaged)", WAY_OUT) from None
    if differing:
        values = f"{differing} {there.get(differing)} there, {settings[differing]} here"
        raise Mistake("--out", f"{folder} (it holds a run with other settings: {values})", WAY_OUT)


# ---------------------------------------------------------------- what a person gets: arrays and tables, from the files alone

NAMES = dict(learner="Learner (steps)", learner_theory="  closed form", learner_rising="  rising ampl.", shallow="  one layer",
             shallow_theory="  + closed form", sgd="  random start", adam="  + adam", rmsprop="  + rmsprop", muon="  + muon",
             muon_theory="  + muon theory", decoupled="  decoupled", spread="  spread start", decoupled_spread="  + decoupled", sampled="  REINFORCE",
             meta="Meta-L. (trials)", meta_fixed="  names kept", bayes="Bayes (trials)", bayes_theory="  closed form",
             bayes_fixed="  fixed order")


def shown(value):
    """A number as a person reads it, to three figures or so; "not reached" and "undefined" stay."""
    return value if isinstance(value, str) else f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def brief(time):
    """A half-time in at most four characters."""
    if isinstance(time, str):
        return "-"
    return f"{time:.1f}" if time < 99.95 else f"{time:.0f}" if time < 9999.5 else f"{time / 1000:.0f}k"


@dataclass(repr=False)
class Result:
    """What a run wrote. summary: as in summary.json; tables: by name of the CSV file, dicts of columns, NumPy arrays. Prints as a table."""
    config: Config
    folder: Path
    summary: dict
    tables: dict

    def curve(self, system):
        """Of one system, "learner", "meta", "bayes" or a control: time (R,), mode strengths (R, K), and their standard errors (R, K).
        Raises KeyError."""
        if system not in self.summary:
            raise KeyError(f"{system}: not one of {', '.join(self.indices())}")
        return plots.curve(self.tables["dynamics"], system)

    def numbers(self):
        """In the order of the table: the staggering index of each system and its interval, and "captured", κ: name to (value, low, high)."""
        entries = {system: entry for system, entry in self.summary.items() if isinstance(entry, dict) and "staggering" in entry}
        order = sorted(entries, key=lambda system: list(NAMES).index(system) if system in NAMES else len(NAMES))
        return {system: (entries[system]["staggering"], *entries[system]["staggering_ci"]) for system in order} | dict(
            captured=(self.summary["captured"], *self.summary["captured_ci"]))

    def indices(self):
        """The staggering index of each system, as figures say it."""
        return {system: shown(value) for system, (value, *_) in self.numbers().items() if system != "captured"}

    def draw(self):
        """Writes the figures of the family."""
        self.config.draw(self.tables, self.indices(), self.folder)

    def __repr__(self):
        summary, numbers = self.summary, self.numbers()
        captured = numbers.pop("captured")
        most = max(len(summary[system]["half_times"]) for system in numbers)
        lines = ["Half-time of each mode; staggering index (latest / earliest)", "",
                 " " * 16 + "".join(f"{k:5d}" for k in range(1, most + 1)) + "  index [95% CI]"]
        for system, (index, low, high) in numbers.items():
            half = "".join(f"{brief(t):>5}" for t in summary[system]["half_times"])
            interval = "" if isinstance(index, str) else f" [{shown(low)}, {shown(high)}]"
            lines.append(f"{NAMES.get(system, '  ' + system)[:16]:16}{half:{5 * most}}  {shown(index)}{interval}")
        lines.append("")
        for system, name in dict(learner="The Learner", meta="The Meta-Learner", bayes="Bayes").items():
            index = numbers[system][0]
            says = "no index, see the modes not reached" if isinstance(index, str) else f"last mode {shown(index)} times as late as the first"
            lines.append(f"{name}: {says}.")
        for what, key in ("above 1/2 from the start, left out", "left_out"), ("not reached", "not_reached"):
            counts = [f"{system} {summary[system][key]}/{summary[system]['of']}" for system in numbers if summary[system][key]]
            lines += textwrap.wrap(f"Modes {what}: " + ", ".join(counts), 60, subsequent_indent="  ") if counts else []
        lines.append("Captured fraction κ = {} [{}, {}] of Bayes' gain.".format(*(v if isinstance(v, str) else f"{v:.3f}" for v in captured)))
        return "\n".join([*lines, f"Figures and tables: {self.folder} ({sum(summary['seconds'].values()):.0f} s)"])


def over_seeds(results):
    """What the results of one family, one a seed, say together: the median of each of their `numbers`, and its range.

    The range holds the true median with a chance of 1 - 2^(1 - N) for N seeds, 94% for 5, whatever the distribution. Of a single result, its own.
    """
    if len(results) == 1:
        return results[0].numbers()
    each = [result.numbers() for result in results]
    values = {name: sorted(plots.number(numbers[name][0]) for numbers in each) for name in each[0]}
    return {name: tuple(written([statistics.median(v), v[0], v[-1]])) for name, v in values.items()}


def compare(families, folder):
    """Writes what several runs say together: overview.csv; of several seeds seeds.csv; of several families the figure overview.

    families: lists of results, one a seed, by name. Returns the table as text.
    """
    seeds = max(map(len, families.values()))
    rows = [(family, system, *values) for family, results in families.items() for system, values in over_seeds(results).items()]
    write_table(folder / "overview.csv", ("family", "system", "value", "low", "high"), rows)
    if seeds > 1:
        write_table(folder / "seeds.csv", ("family", "seed", "system", "value"), [
            (family, result.config.seed, system, value) for family, results in families.items() for result in results
            for system, (value, *_) in result.numbers().items()])
    if len(families) > 1:
        firsts = {family: results[0] for family, results in families.items()}
        plots.dynamics([plots.panel(first.tables, first.indices(), system, f"{family}: {title}", labels=first.config.mode_names(system))
                        for family, first in firsts.items() for system, title in plots.SYSTEMS.items()], None, folder / "overview")
        rows = [row for row in rows if row[1] in (*plots.SYSTEMS, "captured")]
    lines = [f"{'':28}staggering index [" + ("95% interval]" if seeds == 1 else f"range of {seeds} seeds]")]
    for family, system, *values in rows:
        values = [v if isinstance(v, str) else f"{v:.3f}" for v in values] if system == "captured" else map(shown, values)
        lines.append(f"{family:11}{'κ' if system == 'captured' else NAMES.get(system, '  ' + system):17}" + "{} [{}, {}]".format(*values))
    return "\n".join([*lines, f"Figures and tables: {folder}"])


# ---------------------------------------------------------------- from a command, or a call, to its results

def run(config, folder):
    """Runs, resumes or, where it is complete, redraws one family's experiment in `folder`. Returns its Result. Raises Mistake."""
    config.check()
    keep_freed_memory()
    with held(folder):
        agree(folder, config.settings())
        complete = (folder / "summary.json").exists()
        if complete:
            print(f"{folder} is complete: drawn again. After a change to the code, --fresh measures again.", file=sys.stderr)
        else:
            try:
                write_run(folder, *measure(config, folder))
            except meta.UnusableCheckpoint as error:
                raise Mistake("--out", f"{folder} (its {error})", WAY_OUT) from None
        try:
            summary = json.loads((folder / "summary.json").read_text())
            tables = {name: plots.read_table(folder / f"{name}.csv") for name in COLUMNS if (folder / f"{name}.csv").exists()}
            result = Result(config, folder, summary, tables)
            result.draw()
        except (ValueError, TypeError, LookupError, AttributeError, csv.Error) as error:
            if not complete:                              # it is not the files of an earlier run that are to blame
                raise
            raise Mistake("--out", f"{folder} (its tables are damaged: {error})", WAY_OUT) from None
    return result


def plan(configs, out, seeds, fresh):
    """The experiments that a command asks for: by family a list of (config, folder), one a seed, the first in its folder and the others in
    seed1, seed2 and so on within. All are checked, and their folders made, or with `fresh` cleared, before the first is run. Raises Mistake.
    """
    jobs = {}
    for family, config in configs.items():
        folder = out / family if len(configs) > 1 else out
        jobs[family] = [(replace(config, seed=config.seed + i), folder / f"seed{config.seed + i}" if i else folder) for i in range(seeds)]
    every = [job for several in jobs.values() for job in several]
    for config, _ in every:
        config.check()
    for config, folder in every:
        with held(folder):
            agree(folder, config.settings(), fresh)
    return jobs


def configure(family, quick=False, full=False, **settings):
    """A family's config: its defaults, those of --quick or --full, and the settings given. Raises Mistake."""
    if family not in FAMILIES:
        raise Mistake("FAMILY", family, ", ".join(FAMILIES))
    if quick and full:
        raise Mistake("--full", "also --quick", "one of them")
    cls = FAMILIES[family]
    return cls(**(cls.QUICK if quick else cls.FULL if full else {}) | settings)


def start(family, *, out=None, fresh=False, **options):
    """What `python metadyn.py FAMILY` does, from Python: runs, resumes or redraws the experiment in `out`, by default runs/FAMILY.

    options: quick, full, and the settings as on the command line, with underscores. Returns a Result. Raises Mistake (a ValueError), and
    FloatingPointError if learning diverged. Has the process keep freed memory (see `keep_freed_memory`).
    """
    (job,), = plan({family: configure(family, **options)}, Path(out or Path("runs") / family), 1, fresh).values()
    return run(*job)


def linreg(**options):
    """Linear regression; options as for `start`."""
    return start("linreg", **options)


def nonlinreg(**options):
    """Nonlinear regression; options as for `start`."""
    return start("nonlinreg", **options)


def bandit(**options):
    """Contextual bandits; options as for `start`."""
    return start("bandit", **options)


def resolve_device(name):
    """The one place where the device is chosen: "auto" is the first of cuda, mps, cpu that is there. Raises Mistake."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        name = next(device for device, available in there.items() if available)
    if not there[name]:
        raise Mistake("--device", name, "on this machine " + ", ".join(device for device, available in there.items() if available))
    torch.backends.cudnn.allow_tf32 = False               # full float32 in the LSTM, as on the CPU
    return name


class OneLineParser(argparse.ArgumentParser):
    """argparse, with its errors in one line."""

    def error(self, message):
        """Raises what `main` prints."""
        raise argparse.ArgumentError(None, message.removeprefix("argument "))


SHARED = ("seed", "device", "outer_steps", "outer_optimizer")          # the settings that `all` passes on


def parse(arguments):
    """The command line: configs by family, --out, --seeds and --fresh. Raises argparse.ArgumentError, Mistake."""
    parser = OneLineParser(prog="metadyn.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    families = parser.add_subparsers(dest="family", required=True, metavar="FAMILY", parser_class=OneLineParser)
    for name, cls in (FAMILIES | dict(all=Config)).items():
        text = "all of them in turn, in DIR/linreg and so on, and an overview" if name == "all" else cls.__doc__
        sub = families.add_parser(name, help=text, description=text, argument_default=argparse.SUPPRESS)
        size, out = sub.add_mutually_exclusive_group(), Path("runs") / (name if name != "all" else "")
        size.add_argument("--quick", action="store_true", help="a smoke run, in seconds")
        size.add_argument("--full", action="store_true", help="larger, for hours; nonlinreg with the Learner of Rahaman et al.")
        sub.add_argument("--out", type=Path, default=out, metavar="DIR", help=f"folder for the results (default: {out})")
        sub.add_argument("--fresh", action="store_true", default=False, help="ignore an earlier run there")
        sub.add_argument("--seeds", type=int, default=1, metavar="N", help="repeat it all over N seeds from --seed on, in DIR/seed1 and so on (default: 1)")
        for f in fields(cls):
            if name == "all" and f.name not in SHARED:
                continue
            default, several = getattr(cls(), f.name), typing.get_args(f.type)
            default = " ".join(f"{v:g}" for v in default) if several else default
            if name == "all" and f.name == "outer_steps":
                default = "each family's own"
            text = f.metadata["help"] + (f" (default: {default})" if default != "" else "")
            sub.add_argument("--" + f.name.replace("_", "-"), type=several[0] if several else f.type, nargs="+" if several else None,
                             metavar="|".join(f.metadata["choices"] or ["X"]), help=text)
    given = vars(parser.parse_args(arguments))
    family, out, fresh, seeds = (given.pop(name) for name in ("family", "out", "fresh", "seeds"))
    if not 1 <= seeds <= 1000:
        raise Mistake("--seeds", seeds, "at least 1 and at most 1000")
    return {name: configure(name, **given) for name in (FAMILIES if family == "all" else [family])}, out, seeds, fresh


def keep_freed_memory():
    """Has glibc keep freed memory: by default it hands large blocks back to the system and fetches them anew, page by page, at
    every step (nonlinreg: 35 ms a step with, 59 without, on 2 cores)."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0), libc.mallopt(-1, -1)         # M_MMAP_MAX, M_TRIM_THRESHOLD
    except (AttributeError, OSError, TypeError):          # another libc: no harm, some speed
        pass


def main(arguments=None):
    """Runs the command line. Returns the exit status: 0, 1 for a failure, 2 for a user's mistake, 130 for Ctrl-C."""
    for channel in (sys.stdout, sys.stderr):
        if hasattr(channel, "reconfigure"):
            channel.reconfigure(errors="replace")         # a terminal without κ shows ? in its place
    try:
        configs, out, seeds, fresh = parse(arguments)
        families = {}
        for family, jobs in plan(configs, out, seeds, fresh).items():
            families[family] = []
            for config, folder in jobs:
                if seeds > 1:
                    print(f"{family}, seed {config.seed}", file=sys.stderr)
                families[family].append(run(config, folder))
            print(f"\n{families[family][0]}")
        if len(configs) > 1 or seeds > 1:
            print(f"\n{compare(families, out)}")
        return 0
    except (Mistake, argparse.ArgumentError) as mistake:
        print("metadyn.py:", textwrap.shorten(str(mistake), 400), file=sys.stderr)         # one line, whatever was given
        return 2
    except (FloatingPointError, OSError) as error:
        print(f"\nmetadyn.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nmetadyn.py: stopped; the same command, without --fresh, goes on from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
