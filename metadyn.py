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
import contextlib
import csv
import ctypes
import itertools
import json
import math
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import learners
import meta
import plots
import tasks

# ---------------------------------------------------------------- settings
POSITIVE = 1e-9                                           # a lower bound for what must not be 0
SETTINGS = dict(         # type or choices, lower bound, defaults of linreg, nonlinreg, bandit, help
    seeds=(int, 1, 3 * (None,), "number of seeds; each is a separate run"),
    seed=(int, 0, (0, 0, 0), "seed of all random numbers, or the first of several"),
    device=(("auto", "cpu", "cuda", "mps"), None, 3 * ("auto",), "where the Meta-Learner runs"),
    skew=(float, 0, (0.0, 0.0, 0.0), "how strongly the task distribution prefers the first modes"),
    core=(("lstm", "attention"), None, 3 * ("lstm",), "core of the Meta-Learner"),
    hidden=(int, 1, (128, 128, 96), "units of the core"),
    layers=(int, 1, (2, 2, 1), "layers of the core"),
    encoder_width=(int, 0, (0, 64, 0), "ReLU units before the core, 0 for none"),
    outer_steps=(int, 1, (3600, 3000, 1000), "updates of the Meta-Learner's weights"),
    batch=(int, 1, (128, 128, 256), "episodes in an outer step"),
    outer_optimizer=(("muon", "adam"), None, 3 * ("muon",), "optimizer of the outer loop"),
    muon_lr=(float, POSITIVE, (0.045, 0.06, 0.05), "peak learning rate of Muon"),
    adam_lr=(float, POSITIVE, (0.006, 0.005, 0.02), "peak learning rate of Adam"),
    entropy=(float, 0, (None, None, 0.02), "initial weight of the entropy bonus; it falls to 0"),
    singular_values=(float, POSITIVE, ([1.6, 1.2, 0.9, 0.6, 0.3], None, None),
                     "singular values of the evaluation tasks"),
    frequencies=(int, 2, (None, 5, None), "the task distribution has frequencies 1 to this"),
    contexts=(int, 1, (None, None, 5), "contexts"),
    actions=(int, 2, (None, None, 5), "actions in each context"),
    trials=(int, 2, (20, 40, 60), "trials in an episode"),
    noise=(float, 0, (0.1, 0.1, None), "standard deviation of the noise on y"),
    eval_tasks=(int, 2, (16, 8, 64), "evaluation tasks, the same for every system"),
    eval_episodes=(int, 2, (256, 256, 256), "episodes of each evaluation task"),
    test_tasks=(int, 2, (4096, 4096, 4096), "held-out tasks on which κ is measured"),
    learner_inits=(int, 1, (8, 8, 32), "initializations of the Learner for each task"),
    learner_lr=(float, POSITIVE, (0.02, 3e-3, 0.5), "step size of the Learner (nonlinreg: Adam's)"),
    learner_steps=(int, 1, (1500, 800, 2000), "gradient steps of the Learner"),
    online_steps=(int, 1, (None, 8000, None), "trials of the online Learner"),
    learner_hidden=(int, 1, (5, 64, None), "hidden units of the Learner, in each layer"),
    init_scale=(float, POSITIVE, (1e-3, None, None), "each mode's strength at the start"),
    init_std=(float, 0, (None, None, 0.1), "standard deviation of the Learner's initial logits"),
    fitted_episodes=(int, 1, (16, 12, 16), "episodes of each task for the fitted Learner"))
QUICK = dict(                                             # where --quick differs
    linreg=dict(singular_values=[1.4, 0.5], trials=8, hidden=48, layers=1, batch=64,
                outer_steps=1000, muon_lr=0.06, adam_lr=0.03, learner_steps=800,
                learner_hidden=2),
    nonlinreg=dict(frequencies=3, trials=20, hidden=48, layers=1, batch=64, outer_steps=1200,
                   muon_lr=0.1, adam_lr=0.01, learner_steps=400, learner_inits=4,
                   online_steps=2000, fitted_episodes=4, eval_tasks=6),
    bandit=dict(contexts=4, actions=4, trials=24, hidden=64, batch=128, outer_steps=500,
                muon_lr=0.1, adam_lr=0.03, eval_episodes=128, learner_steps=800,
                learner_inits=16, eval_tasks=32))
ATTENTION = dict(                                         # where --core attention differs
    linreg=dict(outer_steps=2200), nonlinreg=dict(outer_steps=2000), bandit=dict(outer_steps=260))
ATTENTION_RATES = dict(muon_lr=0.02, adam_lr=0.003)
ADAM = dict(adam_lr=0.003)                                # where --outer-optimizer adam differs

# ---------------------------------------------------------------- the three experiments
def linreg(config, checkpoint):
    """Linear regression: the singular modes of a linear map, after Saxe et al. 2013."""
    results = Results(config, modes=[f"s = {s:g}" for s in config.singular_values],
                      best=config.noise ** 2)
    spectrum = torch.tensor(config.singular_values)
    distribution = tasks.LinearRegression(len(spectrum), config.noise, config.trials, config.skew)
    W = distribution.evaluation_tasks(
        config.eval_tasks, spectrum, generator_for(config, "evaluation"))

    results.phase("Learners, from several initializations for each task")
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

    # the Meta-Learner; as a control in its outer loop, tasks with equal singular values
    equal = tasks.random_orthogonal(len(spectrum), len(spectrum), generator_for(config, "control"))
    targets = dict(strength=W, equal=spectrum[:, None, None] * equal)
    model = new_meta_learner(config, distribution, meta.MetaLearner)
    predictors = dict(none=tasks.NeverLearns(), meta=model, bayes=tasks.Bayes(distribution))
    _, _, x, y = measure_both_loops(config, distribution, targets, predictors, results, checkpoint)

    results.phase("Learners fitted to the first t trials, for each t, and Bayes on the same trials")
    trials, few = meta.spaced_steps(1, config.trials, 10), config.fitted_episodes
    maps = learners.fitted_linear_network(x[:, :few], y[:, :few], trials, init_scale=u0,
                                          hidden=width, generator=generator_for(config, "learners"))
    results.add("fitted", trials, distribution.strength(maps, W[:, None]))
    results.add("bayes_as_fitted", trials, results["bayes/strength"][trials][:, :, :few])

    results.phase("gradient-based Meta-Learner, and gradient descent from its learned start")
    maml = meta.MAML(distribution, width=20, inner_steps=3,
                     generator=generator_for(config, "initialization"))
    meta.train(maml, distribution, steps=config.outer_steps // 2 + 1, batch=128, optimizer="adam",
               adam_lr=0.01, generator=generator_for(config, "tasks"))
    maps = maml.inner_loop(x, y, torch.tensor(config.trials))
    results.add("maml", range(len(maps)), distribution.strength(maps, W[:, None]))
    start = [layer.expand(len(W), 1, -1, -1) for layer in (maml.W1, maml.W2)]
    maps = learners.linear_network(W[:, None], lr, short, start)
    results.add("maml_start", short, distribution.strength(maps, W[:, None]))

    results.phase("out of distribution: tasks with scaled singular values")
    scales, many = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0), W.repeat_interleave(64, 0)
    tests = [distribution.episodes(x * many, generator_for(config, "ood")) for x in scales]
    results["ood/scale"] = scales
    results["ood/captured"] = [captured_on(test, distribution, predictors) for test in tests]
    return results

def nonlinreg(config, checkpoint):
    """Nonlinear regression: the frequencies of a function, after Rahaman et al. 2018."""
    band = range(1, config.frequencies + 1)
    results = Results(config, modes=[f"k = {k}" for k in band], best=config.noise ** 2)
    distribution = tasks.FourierRegression(band, config.noise, config.trials, config.skew)
    W = distribution.evaluation_tasks(config.eval_tasks, generator_for(config, "evaluation"))
    points, lr, inits = max(64, 4 * len(band)), config.learner_lr, config.learner_inits
    circle = torch.arange(points) / points

    results.phase("Learner, a ReLU network")
    record = evenly_spaced(config.learner_steps, 200)
    y = (distribution.features(circle[:, None]) @ W.mT).mT.expand(-1, inits, -1)
    f = learners.relu_network(circle.expand(y.shape), y, lr, record, hidden=config.learner_hidden,
                              generator=generator_for(config, "learners"))
    results.add("learner", record, read_waves(distribution, f, circle, W))

    results.phase("knock-out: one linear layer on Fourier features, step size 0.01")
    targets, record = W[:, None].expand(-1, inits, -1, -1), range(301)
    maps = learners.linear_network(targets, 0.01, record, "one layer",
                                   generator=generator_for(config, "learners"))
    results.add("fourier", record, distribution.strength(maps, W[:, None]))
    results["fourier/theory"] = learners.one_layer_theory(
        torch.ones(len(band)), 0.0, 0.01 * torch.tensor(record))

    results.phase("online Learner: the ReLU network with one fresh noisy trial a step")
    record, generator = evenly_spaced(config.online_steps), generator_for(config, "online")
    stream = tasks.FourierRegression(band, config.noise, config.online_steps)
    x, y = stream.episodes(W.repeat_interleave(inits, 0), generator)
    f = learners.relu_network(x[..., 0], y[..., 0], lr / 3, record, hidden=config.learner_hidden,
                              at=circle, generator=generator, online=True)
    results.add("online", record, read_waves(distribution, f.unflatten(1, (-1, inits)), circle, W))

    # the Meta-Learner
    targets, model = dict(strength=W), new_meta_learner(config, distribution, meta.MetaLearner)
    predictors = dict(none=tasks.NeverLearns(), meta=model, bayes=tasks.Bayes(distribution))
    _, _, x, y = measure_both_loops(config, distribution, targets, predictors, results, checkpoint)

    results.phase("Learners fitted to the first t trials, for each t, and Bayes on the same trials")
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
    results = Results(config, modes=[f"context {c + 1}" for c in range(config.contexts)], best=1.0)
    size = config.contexts, config.actions
    distribution = tasks.ContextualBandit(*size, config.trials, config.skew)
    correct = distribution.evaluation_tasks(config.eval_tasks, generator_for(config, "evaluation"))
    results["shared_answers"] = tasks.shared_answers(correct)

    results.phase("Learners: shared bias, separate biases, and online (one trial per step)")
    record = meta.spaced_steps(1, config.learner_steps, 120)
    for system, shared in ("learner", True), ("own_biases", False), ("online", True):
        generator = generator_for(config, "online" if system == "online" else "learners")
        renamed = distribution.rename(correct, config.learner_inits, generator)
        logits = config.init_std * torch.randn(*renamed.shape, config.actions, generator=generator)
        J = learners.policy_gradient(
            renamed, logits, config.learner_lr, record, distribution.rates, shared,
            online=generator if system == "online" else None)
        results.add(system, record, distribution.strength(J))

    # the Meta-Learner
    model = new_meta_learner(config, distribution, meta.MetaAgent, entropy=config.entropy)
    predictors = dict(none=tasks.UniformAgent(), meta=model, bayes=tasks.BayesAgent())
    targets = dict(strength=correct)
    episodes = measure_both_loops(
        config, distribution, targets, predictors, results, checkpoint)
    results["bayes/theory"] = distribution.strength(distribution.bayes_curve())

    results.phase("policies fitted to the first t trials that Bayes played, for each t")
    trials, few = meta.spaced_steps(1, config.trials, 12), config.fitted_episodes
    renamed, contexts, uniforms = (part[:, :few].flatten(0, 1) for part in episodes)
    actions, rewards, _ = distribution.play(tasks.BayesAgent(), renamed, contexts, uniforms)
    logits = config.init_std * torch.randn(
        len(trials), len(renamed), *size, generator=generator_for(config, "learners"))
    policies = learners.fitted_policy(contexts, actions, rewards, trials, logits)
    chosen = renamed[..., None].expand(len(trials), -1, -1, 1)
    J = policies.gather(-1, chosen)[..., 0].unflatten(1, (len(correct), -1))
    results.add("fitted", trials, distribution.strength(J))
    results.add("bayes_as_fitted", trials, results["bayes/strength"][trials][:, :, :few])

    # ceilings: Bayes against Bayes with other random choices, and a fixed order up to ties
    other_uniforms = torch.rand(episodes[2].shape, generator=generator_for(config, "ood"))
    strength, _ = distribution.inner_loop(tasks.BayesAgent(), *episodes[:2], other_uniforms)
    results["ceiling/follows_bayes"] = learners.half_time_correlation(
        strength, *results.tensors("bayes"))
    if not config.skew:                                   # rates would break the ties
        results["ceiling/concordance"] = learners.concordance_ceiling(tasks.shared_answers(correct))
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
    SYSTEM/theory (R, K), theory_half_times (K,)       its closed forms, where there are any
    probe/SYSTEM (T + 1,)                              R^2 of the probe
    performance/SYSTEM (n, T), best ()                 loss or reward on new tasks, best possible
    outer_loop/step (P,), strength (P, N, E, K), captured (P,), equal (P, K, E, K)
    modes (K,)                                         their names
    ood/scale (S,), captured (S,)                      κ on larger and smaller tasks
    shared_answers (N, K), ceiling/… (K,) and ()       of bandits; see `bandit`
    Attributes: config; of a complete run also summary.
    """

    def __init__(self, config, **arrays):
        self.config, self.begun = config, time.perf_counter()
        for name, values in arrays.items():
            self[name] = values

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
        stderr = strength.std(1, ddof=1) / strength.shape[1] ** 0.5
        return self[f"{system}/time"], strength.mean(1), stderr

    def __repr__(self):
        modes = "".join(f"{k + 1:6}" for k in range(len(self["modes"])))
        lines = ["Half-time of each mode; index: latest over earliest, of averages over repeats",
                 "[± 2 standard errors], and within a repeat; concordance: 1 same order, 0 chance",
                 "", f"{'':32}{modes}  index               within  concordance"]
        for system, row in self.summary["systems"].items():
            name = "{} ({})".format(*SYSTEMS[system])
            half_times = "".join(f"{format_number(t):>6}" for t in row["half_times"])
            index, low, high = map(format_number, [row["staggering"], *row["staggering_ci"]])
            index = f"{'>' * row['lower_bound']}{index} [{low}, {high}]"
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
    generator = generator_for(config, "initialization")
    model = kind(distribution, config.hidden, config.layers, generator, core=config.core,
                 encoder_width=config.encoder_width, **more)
    return model.to(config.device)

def read_waves(distribution, f, at, W):
    """Strength of each wave of tasks W (N, 1, 2 K) in functions f (R, N, E, Q) seen at points
    (Q,): (R, N, E, K)."""
    fit, _, _ = distribution.fit(f[..., None], at[:, None])
    return distribution.strength(fit, W[:, None])

def captured_on(episodes, distribution, predictors):
    """κ on some episodes. predictors: none, meta and bayes, in this order."""
    return learners.captured_fraction(*(distribution.score(predictor, *episodes).mean(1)
                                        for predictor in predictors.values()))[0]

def measure_both_loops(config, distribution, targets, predictors, results, checkpoint):
    """Trains the Meta-Learner, measuring along the way κ on held-out tasks and its strengths at the
    last trial on `targets`, a dict of sets of tasks by name. Then measures what it and Bayes learn
    within the same episodes of targets["strength"], and returns those."""
    results.phase("outer loop")
    model, generator = predictors["meta"], generator_for(config, "test")
    test = distribution.episodes(distribution.sample(config.test_tasks, generator), generator)
    some, last = [part[:256] for part in test], {}
    few = {name: distribution.evaluation_episodes(those, 2, generator_for(config, "snapshots"))
           for name, those in targets.items()}

    def snapshot(step):
        """Measures the model at an outer step, and prints κ."""
        captured, now = captured_on(some, distribution, predictors), time.perf_counter()
        if last and 10 * step >= config.outer_steps:
            seconds = (now - last["time"]) / (step - last["step"]) * (config.outer_steps - step)
            results.phase(f"outer step {step} of {config.outer_steps}, κ {captured:.2f}; "
                          f"{seconds:.0f} s left for the outer loop")
        last.update(step=step, time=now)
        return dict(captured=torch.tensor(captured)) | {
            name: distribution.inner_loop(model, *those)[0][-1].clone()
            for name, those in few.items()}

    snapshots = meta.train(
        model, distribution, steps=config.outer_steps, batch=config.batch,
        generator=generator_for(config, "tasks"), optimizer=config.outer_optimizer,
        muon_lr=config.muon_lr, adam_lr=config.adam_lr, checkpoint=checkpoint,
        settings=vars(config) | dict(device=None), snapshot=snapshot)
    for name in snapshots[0]:
        results[f"outer_loop/{name}"] = torch.stack([torch.as_tensor(s[name]) for s in snapshots])

    results.phase("what the Meta-Learner and Bayes learn within the same episodes")
    episodes = distribution.evaluation_episodes(
        targets["strength"], config.eval_episodes, generator_for(config, "probe"))
    for system, predictor in predictors.items():
        results[f"performance/{system}"] = distribution.score(predictor, *test)
        if system != "none":
            strength, r_squared = distribution.inner_loop(predictor, *episodes)
            results.add(system, torch.arange(config.trials + 1.0), strength)
            results[f"probe/{system}"] = r_squared
    return episodes

# ---------------------------------------------------------------- numbers and figures of a run
SYSTEMS = dict(                                           # label, and unit of time
    learner=("Learner", "steps"), aligned=("Learner, aligned start", "steps"),
    one_layer=("One layer", "steps"), adam=("Adam", "steps"), rmsprop=("RMSprop", "steps"),
    muon=("Muon", "steps"), large_start=("Large start", "steps"),
    fourier=("Fourier features", "steps"), own_biases=("Own biases", "steps"),
    online=("Learner, online", "trials"), online_one_layer=("One layer, online", "trials"),
    fitted=("Learner, fitted", "trials"), bayes_as_fitted=("Bayes, same episodes", "trials"),
    maml=("MAML, inner loop", "steps"), maml_start=("Descent from MAML start", "steps"),
    meta=("Meta-Learner", "trials"), bayes=("Bayes-optimal", "trials"))

COMPARED, CAUSE_REMOVED = ("learner", "meta", "bayes"), ("one_layer", "fourier", "own_biases")

def summarize(results):
    """The numbers of a run as nested dicts, for summary.json; see `learners.describe`."""
    losses = [torch.from_numpy(results[f"performance/{system}"])
              for system in ("none", "meta", "bayes")]
    captured, *captured_ci = learners.captured_fraction(*(loss.mean(1) for loss in losses))
    excess = [loss[:, -1].mean() - results["best"].item() for loss in losses[1:]]
    if "shared_answers" in results:                       # rewards are too coarse so near to 1
        excess = [1 - results.tensors(system)[0][-1].mean() for system in ("meta", "bayes")]
    step = torch.from_numpy(results["outer_loop/step"])
    # one training: its tasks are the repeats
    strength = torch.from_numpy(results["outer_loop/strength"]).flatten(1, 2)[:, None]
    trained = learners.describe(strength, step)
    outer_loop = {name: trained[name] for name in ("half_times", "staggering", "lower_bound")}
    if "outer_loop/equal" in results:
        equal = torch.from_numpy(results["outer_loop/equal"]).mean((2, 3))
        outer_loop["equal_half_times"] = learners.half_time(equal, step).tolist()
    meta_learner, fitted = results.tensors("meta")[0], results.tensors("fitted")[0]
    bayes, same_episodes = results.tensors("bayes"), results.tensors("bayes_as_fitted")
    return dict(
        systems={system: learners.describe(*results.tensors(system))
                 for system in results.systems()},
        captured=captured, captured_ci=captured_ci, last_excess=(excess[0] / excess[1]).item(),
        follows_bayes=learners.half_time_correlation(meta_learner, *bayes).tolist(),
        fitted_follows_bayes=learners.half_time_correlation(fitted, *same_episodes).tolist(),
        against_bayes=learners.half_time_ratio(meta_learner, *bayes).tolist(),
        r_squared=results["probe/meta"].tolist(),
        outer_loop=outer_loop,
        **{name: array.tolist() for name, array in results.items()
           if name.startswith(("ceiling/", "ood/")) or name.endswith("theory_half_times")})

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
    row = results.summary["systems"][system]
    title = f"{label}\nindex {'> ' * row['lower_bound']}{format_number(row['staggering'])}"
    if math.isfinite(row["concordance"]):
        title += f" · concordance {format_number(row['concordance'])}"
    half_times = learners.half_time(torch.from_numpy(strength), torch.from_numpy(time)).numpy()
    return dict(title=title, time=time, strength=strength, stderr=stderr, half_times=half_times,
                labels=results["modes"], theory=results.get(f"{system}/theory"),
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
    drawn["episodes"] = plots.dynamics(
        episode_panels(results), f"{seed} · dots: half-times of these curves")
    if "shared_answers" in results and not config.skew:
        drawn["sharing"] = plots.dynamics(
            [sharing_panel(results, system) for system in ("learner", "own_biases", "meta")],
            f"{seed} · contexts by how many share their correct action")

    # the outer loop: strengths at the last trial, and κ; then learning curves on held-out tasks
    names = "none", "meta", "bayes"
    curves = np.stack([results[f"performance/{system}"].mean(0) for system in names], 1)
    axes = dict(xlabel="trial", ylabel="squared error", yscale="log")
    if "shared_answers" in results:
        axes = dict(xlabel="trial", ylabel="reward", ylim=(0, 1.05))
    steps = dict(time=results["outer_loop/step"], axes=dict(xlabel="outer steps"), log=True)
    drawn["outer_loop"] = plots.dynamics([
        dict(steps, title="Strength at the last trial", labels=results["modes"],
             strength=results["outer_loop/strength"].mean((1, 2))),
        dict(steps, title="Captured fraction κ", labels=["κ"],
             strength=results["outer_loop/captured"][:, None]),
        dict(time=np.arange(len(curves)), title="Held-out tasks", strength=curves, axes=axes,
             labels=["Never learns", "Meta-Learner", "Bayes-optimal"],
             theory=np.full((len(curves), 1), results["best"]))],
        f"{seed} · dashed: best possible")
    return drawn

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
FAMILIES = dict(linreg=linreg, nonlinreg=nonlinreg, bandit=bandit)
DEFAULTS = {family: {name: values[i] for name, (_, _, values, _) in SETTINGS.items()
                     if values[i] is not None} for i, family in enumerate(FAMILIES)}
SHARED = "seed", "device", "skew", "core", "outer_steps", "outer_optimizer"        # for `all`

def run(family, **options):
    """Does what `python metadyn.py FAMILY` does, with its options as arguments, for example
    run("linreg", quick=True, noise=0.2, out="runs/noisy"). Returns Results, or a list of them if
    there are several families, seeds or skews. Raises ValueError for a mistake, and
    FloatingPointError if learning diverges."""
    words = [family]
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        if name in ("quick", "fresh"):
            words += [option] * bool(value)
        elif np.ndim(value):
            words += [option, *map(str, value)]
        elif value is not None:
            words.append(f"{option}={value}")
    try:
        results = carry_out(words)
    except Mistake as mistake:                            # speak of arguments, not of options
        text = str(mistake).replace("--fresh", "fresh=True")
        text = re.sub(r"(?<!\S)--([a-z-]+)", lambda found: found[1].replace("-", "_"), text)
        raise Mistake(text) from None
    return results if len(results) > 1 else results[0]

def carry_out(words):
    """Carries out all runs of a command line. Several families, skews or seeds have folders of
    their own, and an overview. Returns a list of Results. Raises Mistake before the first run."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")          # a console may have no κ
    options = vars(make_parser().parse_args(words))
    family, out, quick, fresh = map(options.pop, ("family", "out", "quick", "fresh"))
    for name, value in options.items():
        kind, low, _, _ = SETTINGS[name]
        if kind in (int, float) and not all(low <= x < 2 ** 31 for x in np.atleast_1d(value)):
            least = "more than 0" if low == POSITIVE else f"at least {low}"
            raise Mistake(f"argument --{name.replace('_', '-')}: {value} given, must be {least} "
                          "and below 2^31")
    seed, seeds = options.pop("seed", 0), options.pop("seeds", 1)
    skews = sorted(set(options.pop("skew", [0.0])))
    out = Path(out or f"runs/{family}{'-quick' * quick}")
    jobs = []
    for name, skew, number in itertools.product(
            FAMILIES if family == "all" else [family], skews, range(seed, seed + seeds)):
        folders = ([name] * (family == "all") + [f"skew{skew:g}"] * (len(skews) > 1)
                   + [f"seed{number}"] * (seeds > 1))
        config = configure(name, quick, seed=number, skew=skew, **options)
        jobs.append((config, out.joinpath(*folders)))
    for job in jobs:                                      # all settings are valid: now the folders
        prepare(*job, fresh)
    several = [run_experiment(*job) for job in jobs]
    if len(several) > 1:
        print(f"\n{overview(several, out)}\nTable: {out}/overview.csv")
    return several

def run_experiment(config, folder):
    """Runs, resumes or, if it is complete, only redraws an experiment. Returns its results."""
    torch.backends.cudnn.allow_tf32 = False               # float32 in an LSTM, as everywhere else
    path = folder / "results.npz"
    print(f"{config.family}, seed {config.seed}, on {config.device}, in {folder}", file=sys.stderr)
    if path.exists():
        with np.load(path) as arrays:
            results = Results(config, **arrays)
        results.phase("already complete: redrawing the figures")
    else:
        # glibc returns large blocks to the system and fetches them again at every outer step,
        # which takes 6% to 25% of its time: ask it to keep them, where this C library is glibc
        with contextlib.suppress(AttributeError, OSError, TypeError):
            ctypes.CDLL(None).mallopt(-4, 0)              # M_MMAP_MAX
            ctypes.CDLL(None).mallopt(-1, -1)             # M_TRIM_THRESHOLD
        results = FAMILIES[config.family](config, folder / "checkpoint.pt")
        np.savez(folder / "unfinished.npz", **results)
        (folder / "unfinished.npz").replace(path)
    results.summary = summarize(results)
    write_json(folder / "summary.json", results.summary)
    write_tables(results, folder)
    results.phase("figures")
    for name, figure in figures(results).items():
        save(figure, folder / name)
    results.phase("done")
    print(f"\n{results}\nFigures and tables: {folder}", flush=True)
    return results

def save(figure, path):
    """Saves a figure as PNG and PDF."""
    figure.savefig(f"{path}.png")
    figure.set_layout_engine("none")                      # laid out once is enough
    figure.savefig(f"{path}.pdf", metadata={"CreationDate": None})

def write_json(path, values):
    """Writes JSON, with null for inf and nan."""
    text = re.sub(r"-?\b(NaN|Infinity)\b", "null", json.dumps(values, indent=1))
    path.write_text(text, encoding="utf-8")

def write_csv(path, columns, rows):
    """Writes rows under the names of their columns."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])

def write_tables(results, folder):
    """Writes dynamics.csv and performance.csv; modes count from 1."""
    rows = []
    for system in results.systems():
        time, strength, stderr = results.curve(system)
        for k in range(strength.shape[1]):
            rows += [(system, k + 1, *row) for row in zip(time, strength[:, k], stderr[:, k])]
    write_csv(folder / "dynamics.csv", ["system", "mode", "time", "strength", "stderr"], rows)
    rows = []
    for system in "none", "meta", "bayes":
        values = results[f"performance/{system}"]                           # (n, T)
        stderr = values.std(0, ddof=1) / len(values) ** 0.5
        rows += [(system, t, *row) for t, row in enumerate(zip(values.mean(0), stderr))]
    write_csv(folder / "performance.csv", ["system", "trial", "value", "stderr"], rows)

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

def overview(several, folder):
    """Writes overview.csv: every number of the summaries of several Results, with its mean and
    standard deviation over seeds; and, of several skews, the figure levers. Returns the most
    important numbers as text."""
    runs, rows, levers = {}, [], {}
    lines = [f"{'':42}mean ± standard deviation over seeds"]
    for results in several:
        runs.setdefault((results.config.family, results.config.skew), []).append(results)
    for (family, skew), by_seed in runs.items():
        numbers = [flatten(results.summary) for results in by_seed]
        for name in numbers[0]:
            values = np.array([one.get(name, math.nan) for one in numbers])
            finite = len(values) > 1 and np.isfinite(values).all()
            mean, sd = values.mean(), values.std(ddof=1) if finite else math.nan
            rows.append((family, skew, name, mean, sd, *values))
            if re.fullmatch("captured|systems/(learner|meta|bayes)/(staggering|concordance)", name):
                lines.append(f"{family:10}{skew:<4g}{name.removeprefix('systems/'):30}"
                             f"{format_number(mean):>6} ± {format_number(sd)}")
            if name.endswith("/staggering"):
                levers.setdefault((family, name.split("/")[-2]), []).append((skew, mean, sd))
    seeds = [results.config.seed for results in by_seed]
    columns = ["family", "skew", "number", "mean", "sd", *(f"seed{seed}" for seed in seeds)]
    write_csv(folder / "overview.csv", columns, rows)
    if len({skew for _, skew in runs}) > 1:
        panels = [dict(title=FAMILIES[family].__doc__.split(":")[0], curves=[
            (SYSTEMS[system][0], *zip(*levers[family, system]))
            for system in COMPARED + CAUSE_REMOVED if (family, system) in levers])
            for family in {family: None for family, _ in runs}]
        caption = f"seed {', '.join(map(str, seeds))} · bars: standard deviation over seeds"
        save(plots.levers(panels, caption), folder / "levers")
    return "\n".join(lines)

# ---------------------------------------------------------------- the command line
class Mistake(ValueError):
    """A mistake by the user."""

class Parser(argparse.ArgumentParser):
    """Raises Mistake where argparse would exit."""

    def error(self, message):
        """Raises Mistake with argparse's message."""
        raise Mistake(message)

def make_parser():
    """The command line: a subcommand for each family, with an option for each of its settings."""
    parser = Parser(usage="metadyn.py FAMILY [options]; metadyn.py FAMILY --help lists them",
                    prog="metadyn.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    families = parser.add_subparsers(dest="family", required=True, metavar="FAMILY", prog="")
    for family in *FAMILIES, "all":
        about = "all families, and an overview" if family == "all" else FAMILIES[family].__doc__
        defaults = dict(seeds=1) | DEFAULTS.get(family, dict.fromkeys(SHARED, "by family"))
        sub = families.add_parser(family, help=about, description=about, allow_abbrev=False,
                                  usage=f"metadyn.py {family} [options]; --help lists them")
        sub.add_argument("--quick", action="store_true", help="a small version, in 20 seconds")
        sub.add_argument("--fresh", action="store_true", help="replace an earlier run")
        sub.add_argument("--out", help=f"results folder (default: runs/{family}[-quick])")
        for name, default in defaults.items():
            kind, _, _, about = SETTINGS[name]
            rules = dict(type=kind, metavar="X")
            if isinstance(kind, tuple):
                rules = dict(choices=kind, metavar="|".join(kind))
            if name in ("skew", "singular_values"):
                rules["nargs"] = "+"
            sub.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, **rules,
                             help=f"{about} (default: {default})")
    return parser

def configure(family, quick=False, **given):
    """The settings of a run: the defaults of its family, then what --quick and others change, then
    the settings given. Raises Mistake if there is no such device."""
    changes = QUICK[family] if quick else {}
    if given.get("core") == "attention":
        changes = ATTENTION[family] | changes | ATTENTION_RATES
    if given.get("outer_optimizer") == "adam":
        changes = changes | ADAM
    config = SimpleNamespace(family=family, **DEFAULTS[family] | changes | given)
    there = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if config.device == "auto":                           # mps has never been run: on request only
        config.device = "cuda" if there["cuda"] else "cpu"
    if not there[config.device]:
        raise Mistake(f"argument --device: there is no {config.device} on this machine")
    if family == "linreg":
        config.singular_values = sorted(config.singular_values, reverse=True)
    return config

def prepare(config, folder, fresh):
    """Opens the folder of a run, clears it if `fresh`, and checks that it holds no other run.
    Raises Mistake."""
    path = folder / "config.json"
    # another device may resume a run; a new edition may not draw what an older one measured
    wanted = dict(vars(config), edition=4, device=None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if fresh or not path.exists():                    # what lies there has other settings
            for name in "results.npz", "checkpoint.pt":
                (folder / name).unlink(missing_ok=True)
            write_json(path, dict(wanted, torch=torch.__version__))
        there = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Mistake(f"argument --out: {folder} cannot be used: {error}") from None
    if differs := meta.difference(there, wanted):
        raise Mistake(f"argument --out: {folder} holds another run ({differs}); choose another "
                      "folder, or replace that run with --fresh")

def main(words=None):
    """Runs a command line. Returns 0, or 1 for a failure and 130 for Ctrl-C; a mistake by the user
    exits with argparse's error and status 2."""
    try:
        carry_out(words)
        return 0
    except Mistake as mistake:
        argparse.ArgumentParser.error(make_parser(), str(mistake))
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
