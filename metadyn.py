r"""metadyn: how structure is learned, by a Learner, by a Meta-Learner and by Bayes-optimal inference.

    python metadyn.py linreg                 # the whole experiment, pictures and table in runs/linreg
    python metadyn.py linreg --quick         # the same in seconds, too short to learn much
    python metadyn.py linreg --help          # every setting with its default and unit

This file holds the settings, the experiments wired together from tasks.py, learners.py, meta.py and plots.py, and the files a
run writes. Reproduces Rabinowitz 2019, arXiv 1905.01320. Left out on purpose: sweeps, logging services, multi-GPU.
"""
import argparse
import csv
import ctypes
import io
import json
import math
import sys
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

    def check(self):
        """Raises Mistake where a setting is not what its field allows; fills in the settings that others decide."""
        for f in fields(self):
            given, rule = getattr(self, f.name), f.metadata
            name = "--" + f.name.replace("_", "-")
            if rule["choices"]:
                if given not in rule["choices"]:
                    raise Mistake(name, given, ", ".join(rule["choices"]))
                continue
            for value in given if isinstance(given, list) else [given]:
                if not (math.isfinite(value) and rule["low"] <= value <= rule["high"] and value > rule["above"]):
                    bound = f"at least {rule['low']}" if math.isfinite(rule["low"]) else f"more than {rule['above']}"
                    bound += f" and at most {rule['high']}" if math.isfinite(rule["high"]) else ""
                    raise Mistake(name, value, f"a finite number, {bound}")
        self.adam_lr = self.adam_lr or (0.01 if self.outer_optimizer == "muon" else 0.003)

    alike = False                                         # whether modes differ in name only

    # what `experiment` asks of a family: these, as they are in regression; and priors, targets, learner_curves, conditions and draw

    def build(self, prior, generator):
        """A Meta-Learner for this prior, untrained."""
        return meta.MetaLearner(prior.input_size, prior.outputs, self.hidden, generator, self.layers, self.encoder, self.decoder, prior.show)

    def predictor(self, model):
        """The Meta-Learner as something that answers a predictor's calls."""
        return model

    def outer_loss(self, prior, model, generator, share):
        """The outer loop's loss on a batch of fresh episodes, twice (to descend, to report): squared error over all trials."""
        x, y = prior.episodes(prior.sample(self.batch, generator), generator)
        guess = model.predict(x, y)
        loss = (guess - y.to(guess.device)).square().mean()
        return loss, loss

    def more_curves(self, predictors, prior, targets, trials):
        """Further curves, of controls and closed forms, as (trials, strengths (T + 1, N, K)) by system."""
        return {}

    def more_rows(self, predictors, prior, targets, curves, generator, folder):
        """Rows of CSV files that this family alone writes, by name."""
        return {}


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

    def check(self):
        """The same, and one singular value for each dimension, in descending order."""
        super().check()
        if len(self.singular_values) != self.dim:
            raise Mistake("--singular-values", len(self.singular_values), f"as many as --dim, {self.dim}")
        self.singular_values = sorted(self.singular_values, reverse=True)      # mode 1 is the strongest

    # what the frame asks of a family: its priors, its evaluation tasks, its Learners, its out-of-distribution test, its figures

    def priors(self):
        """The task distributions that a Meta-Learner is trained on, by the suffix of the systems that go with each."""
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

    def mode_names(self):
        """What the figures call the modes."""
        return [f"s = {s:g}" for s in self.singular_values]

    def draw(self, tables, indices, folder):
        """Writes the figures."""
        plots.draw_linreg(tables, indices, self.mode_names(), folder)

    QUICK = dict(hidden=48, outer_steps=400, batch=64, eval_tasks=8, eval_episodes=128, fresh_tasks=1024)
    FULL = dict(hidden=256, outer_steps=30000, eval_tasks=64, fresh_tasks=16384)


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

    def targets(self, prior, generator):
        """Fixed evaluation tasks of one amplitude at every frequency, that of the prior, and random phases: weights (N, 1, 2 K)."""
        return prior.evaluation_tasks(self.eval_tasks, torch.full((len(prior.frequencies),), (2 * prior.weight_var) ** 0.5), generator)

    def relu_learner(self, target, every):
        """Trains ReLU networks on targets (S, learner_grid): steps (R,), and the functions f (R, S, learner_grid)."""
        x = torch.arange(self.learner_grid) / self.learner_grid
        return learners.relu_network(x, target, self.learner_lr, self.learner_steps, self.learner_hidden, self.learner_layers, every,
                                     stream(self.seed, "learners"))

    def learner_curves(self, W):
        """Yields (system, steps (R,), strengths (R, N, K), other readings): the Learner on targets of flat and of rising amplitude.

        They have the phases of the evaluation tasks, and their power. With learner_frequencies, Rahaman's: amplitude 1, or rising from 1/K to 1.
        """
        lower, upper, _ = self.bands()
        prior = tasks.FourierRegression(self.learner_frequencies or [*lower, *upper], grid=self.learner_grid)
        ramp = torch.arange(1.0, len(prior.frequencies) + 1)
        if self.learner_frequencies:
            W, rising = prior.evaluation_tasks(len(W), torch.ones(len(ramp)), stream(self.seed, "learners")), ramp / len(ramp)
        else:
            rising = ramp / ramp.square().mean().sqrt()
        for system, weights in ("learner", W), ("learner_rising", W * rising.repeat(2)):
            target = (prior.features(prior.queries()) @ weights.mT)[..., 0]
            t, f = self.relu_learner(target, max(1, self.learner_steps // 200))
            strength, outside = tasks.fourier_strength(f, target, prior.frequencies)
            yield system, t, strength, dict(outside=outside)

    def conditions(self, W, priors, generator):
        """Yields (condition, prior, targets) for the out-of-distribution test: signals of each band, for predictors of both priors."""
        for band in filter(len, self.bands()):
            source = tasks.FourierRegression(band, self.noise, self.trials, self.grid)
            yield f"{band[0]} to {band[-1]}", source, self.targets(source, generator)

    def more_rows(self, predictors, prior, W, curves, generator, folder):
        """fits.csv: one task, one episode, and what each system makes of it before each trial; Bayes with its posterior deviation.

        Of the Learner as many moments, or fewer; first evenly spaced, then at the squares, since it learns its first modes so early.
        """
        x, y = prior.episodes(W[:1], generator)
        xq = tasks.FourierRegression(prior.frequencies, grid=self.learner_grid).queries()
        target, phi = (prior.features(xq) @ W[0].mT)[:, 0], prior.features(xq.double())
        deviation = torch.einsum("qf, tfg, qg -> tq", phi, predictors["bayes"].posterior(x, y)[1][0], phi).clamp_min(0).sqrt()
        steps, learner = self.relu_learner(target[None], max(1, self.learner_steps // 200))
        last, T = len(steps) - 1, prior.trials
        curves = [("target", 0, target, None)]
        curves += [("learner", steps[i].item(), learner[i, 0], None) for i in sorted({min(last, max(t, round(last * (t / T) ** 2))) for t in range(T + 1)})]
        for system in ("meta", "bayes"):
            answers = predictors[system].query(x, y, xq)[0, ..., 0].cpu()
            curves += [(system, t, answers[t], deviation[t] if system == "bayes" else None) for t in range(T + 1)]
        rows = [("data", t, *point, "") for t, point in enumerate(zip(x.flatten().tolist(), y.flatten().tolist()))]
        for system, t, f, spread in curves:
            rows += [(system, t, xq[i, 0].item(), f[i].item(), "" if spread is None else spread[i].item()) for i in range(len(xq))]
        return dict(fits=rows)

    def mode_names(self):
        """What the figures call the modes."""
        low, high = self.passband()
        return [f"k = {k}" for k in range(low, high + 1)]

    def draw(self, tables, indices, folder):
        """Writes the figures."""
        learner_names = [f"k = {k}" for k in self.learner_frequencies] or self.mode_names()
        plots.draw_nonlinreg(tables, indices, self.mode_names(), learner_names, self.bands(), folder)

    QUICK = dict(hidden=48, outer_steps=300, bandpass_steps=100, batch=64, eval_episodes=64, eval_tasks=4, fresh_tasks=512,
                 learner_hidden=64, learner_layers=3, learner_steps=500)
    FULL = dict(hidden=256, outer_steps=30000, bandpass_steps=30000, eval_episodes=4096, fresh_tasks=16384, eval_tasks=20,
                learner_lr=3e-4, learner_steps=60000, learner_hidden=256, learner_layers=6, learner_frequencies=list(range(5, 51, 5)))


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
    scaling_meta: int = option(0, "1 to train a Meta-Learner for each of them too", low=0)

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
        """Yields (system, steps (R,), strengths (R, S, C), no other readings): those of STARTS, and REINFORCE by samples."""
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

    def more_curves(self, agents, prior, correct, trials):
        """The Bayes-optimal curve in closed form; and, with the actions' names kept, the Meta-Learner and a Bayes that tries them in order."""
        curves = dict(bayes_theory=prior.strength(prior.bayes_curve()).float()[:, None].expand(-1, self.eval_tasks, -1))
        for system, agent in ("meta_fixed", agents["meta"]), ("bayes_fixed", tasks.OrderedBayesAgent()):
            curves[system], _ = prior.inner_loop(agent, correct, max(1, self.eval_episodes // 4), stream(self.seed, "probe"), relabel=False)
        return {system: (trials, strength) for system, strength in curves.items()}

    def more_rows(self, agents, prior, correct, curves, generator, folder):
        """runs.csv: some Learners one by one. interference.csv. scaling.csv: time to a mean J of 0.9 against the number of contexts."""
        rows = dict(runs=[], interference=[], scaling=[])
        for system in self.STARTS:
            t, strength = curves[system]
            J = strength * (1 - 1 / self.actions) + 1 / self.actions
            strength = tasks.in_order_learned(strength[:, :6], t)
            rows["runs"] += [(system, run, k + 1, t[r].item(), strength[r, run, k].item())
                             for run in range(strength.shape[1]) for k in range(self.contexts) for r in range(len(t))]
            before, after = (J[i][t.diff() == 1] for i in (slice(None, -1), slice(1, None)))      # looks one gradient step apart
            rows["interference"] += [(system, n, *each) for n, each in enumerate(tasks.interference(before, after, after >= 0))]
        episodes = prior.episodes(prior.sample(2048, generator), generator)
        visited = torch.nn.functional.one_hot(episodes[1], self.contexts)
        first = (visited > 0) & (visited.cumsum(1) == 1)                       # only first visits are alike in what they can teach
        for system in ("meta", "bayes"):
            J = prior.play(agents[system], *episodes)[1]
            rows["interference"] += [(system, n, *each) for n, each in enumerate(tasks.interference(J[:, :-1], J[:, 1:], first))]
        rows["interference"] = [row for row in rows["interference"] if row[-1]]
        for contexts in self.scaling:
            for system in ("learner", "decoupled"):
                t, J = self.learn(system, contexts)
                times = tasks.half_time((J.mean(-1) - 0.4).T, t)               # where J - 0.4 is 0.5, J is 0.9
                rows["scaling"].append((system, contexts, tasks.geometric_mean(times).item(),
                                        *tasks.bootstrap_interval(tasks.geometric_mean, times, generator=generator)))
            longer = tasks.ContextualBandit(contexts, self.actions, 3 * self.actions * contexts)
            curves = dict(bayes=longer.bayes_curve().mean(-1))
            if self.scaling_meta:
                with torch.enable_grad():
                    model, _ = train(self, longer, folder / f"checkpoint_contexts{contexts}.pt")
                curves["meta"] = longer.play(meta.MetaAgent(model), *longer.episodes(longer.sample(2048, generator), generator))[1].mean((0, 2))
            for system, curve in curves.items():
                moment = tasks.half_time(curve - 0.4, torch.arange(longer.trials + 1.0)).item()
                rows["scaling"].append((system, contexts, moment, moment, moment))
        return rows

    def mode_names(self):
        """What the figures call the modes: contexts in the order in which they were learned."""
        return ["first"] + [str(k) for k in range(2, self.contexts)] + ["last"] * (self.contexts > 1)

    def draw(self, tables, indices, folder):
        """Writes the figures."""
        plots.draw_bandit(tables, indices, self.mode_names(), self.rates(), folder)

    QUICK = dict(hidden=48, outer_steps=100, batch=32, eval_tasks=4, eval_episodes=64, fresh_tasks=512, learner_seeds=50, learner_steps=500, scaling=[2, 5])
    FULL = dict(hidden=256, outer_steps=10000, eval_tasks=64, fresh_tasks=16384, learner_seeds=1000, scaling_meta=1)


FAMILIES = {"linreg": Linreg, "nonlinreg": Nonlinreg, "bandit": Bandit}


# ---------------------------------------------------------------- the experiment, the same for every family

PURPOSES = ("tasks", "initialisation", "evaluation", "probe", "learners")


def stream(seed, purpose):
    """A generator of its own for each purpose, so that what one draws never shifts another."""
    return torch.Generator().manual_seed(len(PURPOSES) * seed + PURPOSES.index(purpose))


def train(config, prior, checkpoint, snapshot=lambda model: {}):
    """Trains a Meta-Learner for this prior, or goes on from its checkpoint. Returns it and its snapshots."""
    model = config.build(prior, stream(config.seed, "initialisation")).to(config.device)
    optimizers, generator = meta.make_optimizers(model, config.outer_optimizer, config.muon_lr, config.adam_lr), stream(config.seed, "probe")
    some = prior.episodes(prior.sample(1024, generator), generator)
    bounds = [prior.losses(predictor, *some).mean().item() for predictor in prior.references().values()]
    return model, meta.outer_loop(model, partial(config.outer_loss, prior), config.outer_steps, optimizers, stream(config.seed, "tasks"),
                                  snapshot, checkpoint, asdict(config), report=meta.Progress(config.outer_steps, *bounds))


def experiment(config, folder):
    """The whole experiment of a family. Returns the rows of each CSV file, by its name, and the summary."""
    clock, evaluation, priors = [time.perf_counter()], stream(config.seed, "evaluation"), config.priors()
    prior = priors[""]
    few, trials = max(1, config.eval_episodes // 64), torch.arange(prior.trials + 1.0)      # few: episodes a task, where that will do
    targets = config.targets(prior, evaluation)
    fresh = prior.episodes(prior.sample(config.fresh_tasks, evaluation), evaluation)
    curves, rows = {}, dict(probe=[], ood=[])
    for system, t, strength, others in config.learner_curves(targets):
        curves[system] = t, strength
        rows["probe"] += probe_rows(system, t, others)
    predictors = {name + suffix: predictor for suffix, p in priors.items() for name, predictor in p.references().items()}
    losses = {system: prior.losses(predictors[system], *fresh) for system in ("prior", "bayes")}
    clock.append(time.perf_counter())

    def inner_loop(predictor, n, prior=prior, targets=targets):
        """Strengths within episodes, and other readings, on the same episodes for every predictor."""
        return prior.inner_loop(predictor, targets, n, stream(config.seed, "probe"))

    def snapshot(model):
        """What outer_loop.csv tells of the Meta-Learner at one outer step."""
        strength = inner_loop(config.predictor(model), few)[0].mean(1)
        return dict(strength=strength[-1].tolist(), half_time=tasks.half_time(strength.T, trials).tolist(),
                    value=prior.sign * prior.losses(config.predictor(model), *fresh).mean().item())

    model, snapshots = train(config, prior, folder / "checkpoint.pt", snapshot)
    predictors["meta"] = config.predictor(model)
    for suffix in list(priors)[1:]:
        model, _ = train(replace(config, outer_steps=config.bandpass_steps), priors[suffix], folder / f"checkpoint{suffix}.pt")
        predictors["meta" + suffix] = config.predictor(model)
    clock.append(time.perf_counter())

    with torch.no_grad():
        losses["meta"] = prior.losses(predictors["meta"], *fresh)
        rows["outer_loop"] = outer_loop_rows(snapshots)
        rows["performance"] = performance_rows({system: prior.sign * each for system, each in losses.items()})
        for system in ("meta", "bayes"):
            strength, others = inner_loop(predictors[system], config.eval_episodes)
            curves[system] = trials, strength
            rows["probe"] += probe_rows(system, trials, others)
        for condition, source, shifted in config.conditions(targets, priors, evaluation):
            data = source.episodes(shifted.repeat_interleave(few, 0), evaluation)
            for system, predictor in predictors.items():
                strength = inner_loop(predictor, few, source, shifted)[0][-1].mean(0)
                value = source.sign * source.losses(predictor, *data).mean().item()
                rows["ood"] += [(system, condition, k, s, value) for k, s in enumerate(strength.tolist(), 1)]
        curves |= config.more_curves(predictors, prior, targets, trials)
        rows |= config.more_rows(predictors, prior, targets, curves, stream(config.seed, "probe"), folder)
    if config.alike:
        curves = {system: (t, tasks.in_order_learned(strength, t)) for system, (t, strength) in curves.items()}
    rows["dynamics"] = dynamics_rows(curves)

    summary = {system: tasks.describe(strength, t, evaluation) for system, (t, strength) in curves.items()}
    means = [losses[system].mean(1) for system in ("prior", "meta", "bayes")]
    summary["captured"] = tasks.captured_fraction(*means).item()
    summary["captured_ci"] = list(tasks.bootstrap_interval(tasks.captured_fraction, *means, generator=evaluation))
    clock.append(time.perf_counter())
    phases = zip(("learners", "outer_loop", "probes"), clock, clock[1:])       # of this process: what an earlier one did is not counted
    return rows, summary | dict(seconds={phase: round(end - begin, 2) for phase, begin, end in phases})


def dynamics_rows(curves):
    """Rows of dynamics.csv from strengths (R, N, K) at times (R,) by system: the mean over tasks or seeds, and its standard error."""
    rows = []
    for system, (t, strength) in curves.items():
        mean, stderr = strength.mean(1), strength.std(1) / strength.shape[1] ** 0.5
        rows += [(system, k + 1, t[r].item(), mean[r, k].item(), stderr[r, k].item()) for k in range(mean.shape[1]) for r in range(len(t))]
    return rows


def probe_rows(system, time, others):
    """Rows of probe.csv from a dict of readings (R, N) at times (R,): means over tasks."""
    return [(system, time[r].item(), name, mean) for name, reading in others.items() for r, mean in enumerate(reading.mean(1).tolist())]


def performance_rows(values):
    """Rows of performance.csv from errors or rewards (B, T) by system."""
    return [(system, t, mean, stderr) for system, each in values.items()
            for t, (mean, stderr) in enumerate(zip(each.mean(0).tolist(), (each.std(0) / len(each) ** 0.5).tolist()))]


def outer_loop_rows(snapshots):
    """Rows of outer_loop.csv from the snapshots of the outer loop."""
    return [(s["outer_step"], k, strength, half_time, s["value"]) for s in snapshots
            for k, (strength, half_time) in enumerate(zip(s["strength"], s["half_time"]), 1)]


# ---------------------------------------------------------------- files of a run

COLUMNS = dict(dynamics="system,mode,time,strength,stderr", performance="system,trial,value,stderr",
               outer_loop="outer_step,mode,strength,half_time,value", ood="system,condition,mode,strength,value",
               probe="system,time,reading,value", fits="system,time,x,value,deviation",
               runs="system,run,mode,time,strength", interference="system,solved,chance,gain,visits", scaling="system,contexts,time,low,high")


def finite(value):
    """What a file says of a number: itself, "not reached" for an infinite half-time or index, "undefined" for nan. Walks lists and dicts."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return "not reached" if value == math.inf else "undefined" if value != value else value


def write_run(folder, rows, summary):
    """Writes the CSV files, and summary.json last: once it is there, the run is complete."""
    for name, table in ((name, table) for name, table in rows.items() if table):
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


@contextmanager
def held(folder):
    """Makes the folder and keeps other runs out of it. Raises Mistake where it cannot be written or another run is at work there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        raise Mistake("--out", folder, f"a folder that can be written ({error.strerror})") from None
    with lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Mistake("--out", folder, "a folder where no other run is at work") from None
        yield


WAY_OUT = "another folder, or --fresh to replace the run that is there"


def agree(folder, settings, fresh):
    """Writes config.json, or compares the one that is there with this run's settings. Raises Mistake where they differ."""
    path = folder / "config.json"
    if fresh or not path.exists():                        # config.json goes last, so that what it does not describe is gone before it
        ours = ("summary.json", *(f"{name}.csv" for name in COLUMNS))
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


# ---------------------------------------------------------------- what a person sees: figures and the table, from the files alone

def note(summary, system):
    """The staggering index as a figure and the table say it."""
    index, interval = summary[system]["staggering"], summary[system]["staggering_ci"]
    return str(index) if isinstance(index, str) else f"{index:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


NAMES = dict(learner="Learner (steps)", learner_theory="  closed form", learner_rising="  rising ampl.", shallow="  one layer",
             sgd="  random start", adam="  + adam", rmsprop="  + rmsprop", muon="  + muon", muon_theory="  + muon theory",
             decoupled="  decoupled", spread="  spread start", decoupled_spread="  + decoupled", sampled="  REINFORCE",
             meta="Meta-L. (trials)", meta_fixed="  names kept", bayes="Bayes (trials)", bayes_theory="  closed form",
             bayes_fixed="  fixed order")


def print_table(summary, folder):
    """The table at the end of a run, in 60 columns for five modes, and what it says in words."""
    print("\nHalf-time of each mode, and staggering index (last / first)\n")
    most = max(len(summary[system]["half_times"]) for system in NAMES if system in summary)
    print(" " * 16 + "".join(f"{k:5d}" for k in range(1, most + 1)) + "  index [95% interv.]")
    for system in (system for system in NAMES if system in summary):
        half = "".join(f"{'-':>5}" if isinstance(t, str) else f"{t:5.{0 if t >= 100 else 1}f}" for t in summary[system]["half_times"])
        print(f"{NAMES[system]:16}{half}  {note(summary, system)}")
    print()
    for system, name in dict(learner="The Learner", meta="The Meta-Learner", bayes="Bayes").items():
        index = summary[system]["staggering"]
        says = "no index, see the modes not reached" if isinstance(index, str) else f"last mode {index:.2f} times as late as the first"
        print(f"{name}: {says}.")
    entries = {system: entry for system, entry in summary.items() if isinstance(entry, dict) and "left_out" in entry}
    for what, key in ("above 1/2 from the start, left out", "left_out"), ("not reached", "not_reached"):
        counts = [f"{system} {entry[key]}/{entry['of']}" for system, entry in entries.items() if entry[key]]
        if counts:
            print(f"Modes {what}: " + ", ".join(counts))
    captured = [value if isinstance(value, str) else f"{value:.3f}" for value in (summary["captured"], *summary["captured_ci"])]
    print("Captured fraction κ = {} [{}, {}] of Bayes' gain.".format(*captured))
    print(f"Figures and tables: {folder} ({sum(summary['seconds'].values()):.0f} s)")


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
                raise Mistake("--out", f"{folder} (its {error})", WAY_OUT) from None
        try:
            summary = json.loads((folder / "summary.json").read_text())
            tables = {name: read_table(folder, name) for name in COLUMNS if (folder / f"{name}.csv").exists()}
            indices = {system: note(summary, system).split(" [")[0] for system in NAMES if system in summary}
            config.draw(tables, indices, folder)
        except (ValueError, KeyError, IndexError) as error:
            raise Mistake("--out", f"{folder} (its tables are damaged: {error})", WAY_OUT) from None
    print_table(summary, folder)
    return summary


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
    """The command line: a list of (config, folder, fresh), one for each family to run. Raises argparse.ArgumentError."""
    parser = OneLineParser(prog="metadyn.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    families = parser.add_subparsers(dest="family", required=True, metavar="FAMILY", parser_class=OneLineParser)
    for name, cls in (FAMILIES | dict(all=Config)).items():
        text = "all of them in turn, in DIR/linreg and so on" if name == "all" else cls.__doc__
        sub = families.add_parser(name, help=text, description=text, argument_default=argparse.SUPPRESS)
        size, out = sub.add_mutually_exclusive_group(), Path("runs") / (name if name != "all" else "")
        size.add_argument("--quick", action="store_true", help="a smoke run, in seconds")
        size.add_argument("--full", action="store_true", help="larger, for hours; nonlinreg with the Learner of Rahaman et al.")
        sub.add_argument("--out", type=Path, default=out, metavar="DIR", help=f"folder for the results (default: {out})")
        sub.add_argument("--fresh", action="store_true", default=False, help="ignore an earlier run there")
        for f in fields(cls):
            if name == "all" and f.name not in SHARED:
                continue
            default, several = getattr(cls(), f.name), typing.get_args(f.type)
            shown = " ".join(f"{v:g}" for v in default) if several else default
            if name == "all" and f.name == "outer_steps":
                shown = "each family's own"
            text = f.metadata["help"] + (f" (default: {shown})" if shown != "" else "")
            sub.add_argument("--" + f.name.replace("_", "-"), type=several[0] if several else f.type, nargs="+" if several else None,
                             metavar="|".join(f.metadata["choices"] or ["X"]), help=text)
    given = vars(parser.parse_args(arguments))
    family, out, fresh, quick, full = (given.pop(name, None) for name in ("family", "out", "fresh", "quick", "full"))
    runs = []
    for name in FAMILIES if family == "all" else [family]:
        cls = FAMILIES[name]
        runs.append((cls(**(cls.QUICK if quick else cls.FULL if full else {}) | given), out / name if family == "all" else out, fresh))
    return runs


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
    keep_freed_memory()
    for channel in (sys.stdout, sys.stderr):
        if hasattr(channel, "reconfigure"):
            channel.reconfigure(errors="replace")         # a terminal without κ shows ? in its place
    try:
        for config, folder, fresh in parse(arguments):
            run(config, folder, fresh)
        return 0
    except (Mistake, argparse.ArgumentError) as mistake:
        print(f"metadyn.py: {mistake}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError) as error:
        print(f"metadyn.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nmetadyn.py: stopped; the same command, without --fresh, goes on from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
