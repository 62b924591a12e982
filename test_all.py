"""What metadyn promises, in this order: analytic truth, planted systems and metamorphic relations,
seeded statistics (to four standard errors), ablations, negative controls, README, plumbing.

    python -m pytest
"""
import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import learners
import meta
import metadyn
import plots
import tasks

HERE = Path(__file__).parent
torch.set_num_threads(1)                                  # as fast as two here, and fair to others
S = torch.tensor([1.1, 0.8, 0.6, 0.4, 0.2], dtype=torch.float64)
SKEWS = pytest.mark.parametrize("skew", [-0.5, 0.0, 0.5])
LINEAR, WAVES, BANDIT = (
    tasks.LinearRegression(), tasks.FourierRegression(), tasks.ContextualBandit())
README = (HERE / "README.md").read_text("utf-8")
CODE = re.findall(r"```python\n([^`]*)```", README)       # two snippets, the exercises, extensions

def attention():
    """The core of the README."""
    names = {}
    exec(next(code for code in CODE if "class Attention" in code), names)
    return names["Attention"]

CORES = pytest.mark.parametrize("core", [torch.nn.LSTM, torch.nn.GRU, attention()])

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)

def drawn(distribution, n=64, seed=0):
    """An episode of each of n tasks."""
    generator = seeded(seed)
    return distribution.episodes(distribution.sample(n, generator), generator)

def small_meta(distribution, hidden=16, layers=2, **more):
    return meta.MetaLearner(distribution, hidden, layers, seeded(1), **more)

def standard_error(samples):
    return samples.std(0) / len(samples) ** 0.5

def by_column(distribution, predictor, n):
    """Strengths by column in n repeats of 16 tasks (T + 1, 16, n, K), and the probe's R^2."""
    W, *episodes = distribution.evaluation_episodes(
        distribution.evaluation_tasks(16, seeded()), n, seeded(1))
    strength, r_squared = distribution.inner_loop(predictor, W, *episodes)
    return strength.gather(-1, distribution.columns(W).argsort(-1).expand_as(strength)), r_squared

# ---------------------------------------------------------------- analytic truth: Learners

def gain_law_error(lr, gain=0.3, tau=1.0):
    """The largest deviation of a deep linear network's modes from the closed form."""
    steps = range(round(2 * learners.gain_half_times(S, gain).max().item() / lr) + 1)
    maps = learners.linear_network(
        torch.diag(S)[None], learners.gain_layers((1,), 5, 10, gain, S.dtype), lr, steps)
    theory = learners.gain_law(S, gain, torch.tensor(steps) * lr / tau)
    return (maps[:, 0].diagonal(dim1=-2, dim2=-1) - theory).abs().max().item()

@pytest.mark.parametrize("gain", [0.01, 0.3, 10.0])
def test_gradient_descent_follows_the_gain_law_with_a_first_order_error(gain):
    coarse, fine = (gain_law_error(lr / max(1, gain), gain) for lr in (0.04, 0.02))
    assert fine < 0.02 and 1.9 < coarse / fine < 2.1

@pytest.mark.parametrize("gain", [1e-4, 0.3, 10.0])
def test_the_gain_law_solves_its_equation_and_is_half_way_at_its_half_times(gain):
    half_times = learners.gain_half_times(S, gain)
    t = (torch.linspace(0, 4, 41).double() * half_times.max()).requires_grad_()
    a = learners.gain_law(S, gain, t)
    slope = torch.stack([torch.autograd.grad(mode.sum(), t, retain_graph=True)[0]
                         for mode in a.T], 1)
    assert_close(slope, (S - a) * (gain ** 2 + 4 * a ** 2).sqrt(), rtol=0, atol=1e-8)
    assert_close(learners.gain_law(S, gain, half_times).diagonal(), S / 2)
    assert_close(learners.gain_law(S, gain, torch.tensor([0.0, 1e9]))[:, 0], torch.tensor(
        [0.0, S[0]]).double())

def test_a_small_gain_is_the_logistic_of_saxe_and_a_large_one_is_one_layer():
    t = torch.linspace(0, 60, 601, dtype=torch.float64)[:, None]
    logistic = S / (1 + (4 * S / 1e-3 - 1) * torch.exp(-2 * S * t))   # from a quarter of the gain
    assert (learners.gain_law(S, 1e-3, t[:, 0]) - logistic).abs().max() < 3e-4
    one_layer = S * (1 - torch.exp(-t))                               # time in units of 1 / gain
    assert (learners.gain_law(S, 100.0, t[:, 0] / 100) - one_layer).abs().max() < 1e-3

def half_times_over_the_law(width, std):
    """Half-times from a random start, averaged over 32 repeats of 16 tasks, over the law's."""
    gain = learners.expected_gain(5, width, std)
    law, step = learners.gain_half_times(S, gain), 0.02 / max(1, gain)
    steps = range(0, round(1.6 * law.max().item() / step), 5 if gain < 1 else 1)
    layers = learners.init_layers((16, 32), [5, width, 5], seeded(), std, S.dtype)
    maps = learners.linear_network(torch.diag(S).expand(16, 32, 5, 5), layers, step, steps)
    strength = maps.diagonal(dim1=-2, dim2=-1) / S
    half = learners.half_time(strength.mean(2), step * torch.tensor(steps)) / law
    return half.mean(0), standard_error(half)

def test_wide_random_starts_follow_the_law_at_their_gain_and_narrow_ones_do_not():
    small, _ = half_times_over_the_law(64, 0.01)
    assert ((small - 1).abs() < 0.04).all()
    default, error = half_times_over_the_law(64, None)
    assert ((default - 1).abs() < 0.04 + 4 * error).all() and error.max() < 0.1
    narrow, _ = half_times_over_the_law(5, 0.01 * (64 / 5) ** 0.5)    # the same gain
    assert (narrow.diff() > 0).all() and narrow[-1] > 1.3

def test_a_linear_network_on_given_inputs_ends_where_least_squares_does():
    x, y = (z.double().mT for z in drawn(tasks.LinearRegression([1.0] * 3, 0.3, trials=9), 100))
    layers = learners.init_layers((100,), [3, 16, 3], seeded(), 0.01, x.dtype)
    found = learners.linear_network(y, layers, 0.01, [600], torch.optim.Adam, x)[0]
    assert_close(found, y @ torch.linalg.pinv(x), atol=0.01, rtol=0)

def test_two_contexts_and_two_actions_interfere_as_derived():
    logits = torch.randn(50, 2, 2, generator=seeded(), dtype=torch.float64)
    correct, dt = torch.tensor([[0, 1]]).expand(50, 2), 1e-6
    J = learners.policy_gradient(correct, logits, 2 * dt, [0, 1])
    g = J[0] * (1 - J[0])
    assert_close((J[1] - J[0]) / dt, 2 * g * (2 * g - g.flip(1)), atol=1e-5, rtol=0)

# ---------------------------------------------------------------- analytic truth: Bayes and meta

@pytest.mark.parametrize("distribution", [
    LINEAR, tasks.FourierRegression([7, 9], 0.25, 17), tasks.LinearRegression(skew=1.0)])
def test_the_sequential_posterior_is_the_batch_posterior(distribution):
    x, y = drawn(distribution)
    means = tasks.Bayes(distribution).maps(x, y)
    phi, variance = distribution.features(x.double()), distribution.noise ** 2
    P = torch.linalg.inv(phi.mT @ phi / variance + torch.diag(1 / distribution.weight_var))
    M = y.double().mT @ phi @ P / variance
    assert_close(means[:, -1], M, atol=1e-10, rtol=0)

def test_bayes_without_noise_knows_t_of_five_directions_of_every_mode_whatever_its_size():
    distribution = tasks.LinearRegression(noise=0.0)
    W = distribution.evaluation_tasks(16, seeded())
    episodes = distribution.evaluation_episodes(W, 200, seeded())
    strength, r_squared = distribution.inner_loop(tasks.Bayes(distribution), *episodes)
    by_task = strength[:6].mean(2)                                    # (6, 16, 5)
    expected = (torch.arange(6.0) / 5)[:, None]
    assert ((by_task.mean(1) - expected).abs() < 4 * by_task.std(1) / 4 + 1e-3).all()
    assert_close(r_squared[1:], torch.ones(20))           # it is linear, and a constant is not
    _, residual, total = LINEAR.fit(torch.ones(3, 14, 5), LINEAR.queries(seeded()))
    assert_close(residual, total)

@pytest.mark.parametrize("distribution", [BANDIT, tasks.ContextualBandit(3, 3, 20, tied=2)])
def test_the_learning_curve_of_bayes_by_formula_and_by_simulation(distribution):
    agent = tasks.BayesAgent(distribution)
    _, _, J = distribution.play(agent, *drawn(distribution, 4000), probe=True)
    curve = distribution.bayes_curve()
    assert J.shape[1:] == curve.shape == (distribution.trials + 1, distribution.contexts)
    largest_sd = (curve * (1 - curve)).clamp_min(0).sqrt()            # in [0, 1] with that mean
    assert ((J.mean(0) - curve).abs() <= 4 * largest_sd / 4000 ** 0.5 + 4 / 4000).all()

@pytest.mark.parametrize("tied", [1, 2])
def test_the_policy_of_bayes_is_the_posterior_by_enumeration_of_all_tasks(tied):
    distribution, generator = tasks.ContextualBandit(3, 3, 12, tied), seeded()
    every = torch.cartesian_prod(*[torch.arange(3)] * 3)
    every = every[(every[:, 0] == every[:, 1]) | (tied == 1)]
    agent, contexts = tasks.BayesAgent(distribution), torch.arange(3)
    for correct in every:
        agent.reset(1)
        possible = torch.ones(len(every), dtype=torch.bool)
        for _ in range(12):
            context, action = torch.randint(3, (2,), generator=generator)
            paid = correct[context] == action
            possible &= (every[:, context] == action) == paid
            agent.update(context[None], action[None], paid[None].float())
            posterior = torch.nn.functional.one_hot(every[possible], 3).float().mean(0)
            assert_close(agent.probe(contexts[None])[0], posterior)
            assert_close(agent.act(contexts[:1])[0], posterior[0])

@SKEWS
def test_the_rates_of_one_step_solve_the_normal_equations_and_others_do_not(skew):
    distribution = tasks.LinearRegression([1.0] * 3, 0.7, 4, skew)
    W = distribution.sample(60_000, seeded())
    maps = tasks.OneStep(distribution).maps(*distribution.episodes(W, seeded(1)))[:, -1]
    for factor in 1, 0.9, 1.1:
        products = (maps * (W - factor * maps)).mean(-2)              # of estimate and error
        z = (products.mean(0) / standard_error(products)).abs()
        assert (z < 4).all() if factor == 1 else (z > 4).all()

@SKEWS
def test_the_half_times_of_one_step_are_those_of_its_formula(skew):
    distribution = tasks.LinearRegression(skew=skew)
    model = tasks.OneStep(distribution)
    strength, r_squared = by_column(distribution, model, 1024)
    half = learners.half_time(strength.mean(2), torch.arange(21.0))
    assert ((half.mean(0) - model.half_times()).abs() < 4 * standard_error(half)).all()
    assert (4 * standard_error(half) < 0.1 * model.half_times()).all()
    assert_close(r_squared[1:], torch.ones(20))           # it is linear

def test_the_strength_of_a_wave_is_that_of_its_fourier_coefficients():
    distribution = tasks.FourierRegression([1, 4, 6])
    W, x = distribution.sample(5, seeded()).double(), distribution.queries(seeded()).double()
    f = (distribution.features(x - 0.1) @ W.mT) + x ** 2
    strength = distribution.strength(distribution.fit(f, x)[0], W)
    F, F_hat = (torch.fft.rfft(z[..., 0])[:, distribution.frequencies]
                for z in (distribution.features(x) @ W.mT, f))
    assert_close(strength, (F.conj() * F_hat).real / F.abs().square(), atol=1e-5, rtol=0)

@CORES
def test_the_gradient_of_a_meta_learner_is_that_of_finite_differences_in_its_weights(core):
    distribution = tasks.LinearRegression([1.0, 1.0], trials=3)
    model = small_meta(distribution, 4, core=core).double()
    x, y = (z.double() for z in drawn(distribution, 2))
    inputs = torch.cat([x, meta.shift_right(torch.cat([x, y], -1))[:, :-1]], -1)
    first = next(name for name, _ in model.core.named_parameters())
    for name in "head.weight", "decoder.0.weight", f"core.{first}":
        weight = model.get_parameter(name).detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda weight: (torch.func.functional_call(
            model, {name: weight}, (inputs,))[0] - y).square().mean(), weight)

@CORES
def test_every_parameter_is_in_exactly_one_optimizer(core):
    model = small_meta(LINEAR, core=core)
    for muon_lr in 0, 0.1:
        optimizers = meta.default_optimizers(model, muon_lr=muon_lr)
        held = [id(p) for each in optimizers for group in each.param_groups
                for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters())
        assert len(optimizers) == 1 + (muon_lr > 0)

class Scalar(torch.nn.Module):
    """A model of one weight, for tests of the outer loop."""

    def __init__(self, loss):
        super().__init__()
        self.weight, self.of, self.seen = torch.nn.Parameter(torch.ones(1)), loss, []

    def loss(self, distribution, batch, generator, progress):
        self.seen.append(self.weight.item())
        return self.of(self.weight, progress)

def test_the_outer_loop_warms_up_over_two_percent_and_ends_at_zero():
    factors = [meta.learning_rate_factor(step, 100) for step in range(101)]
    assert factors[:3] + factors[20::40] == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.5, 0])
    model = Scalar(lambda weight, progress: weight.sum())     # Adam moves it by its rate a step
    group = dict(params=[model.weight], lr=0.5)
    meta.train(model, LINEAR, 100, 1, seeded(), [torch.optim.Adam([group], lr=9.0)])
    assert -np.diff(model.seen) == pytest.approx(0.5 * np.array(factors[:99]), rel=1e-3)

# ---------------------------------------------------------------- the measures, on planted systems

TIME = torch.arange(0.0, 201)

def planted(half_times):
    """Strengths (201, N, E, K) that rise in a straight line, from 0 to 1 in twice the half-time."""
    return (TIME[:, None, None, None] / (2 * torch.as_tensor(half_times))).clamp(0, 1)

def shuffled(half_times, repeats=500, seed=0):
    """These half-times (K,) in random order in each repeat of 16 tasks: (16, repeats, K)."""
    orders = torch.rand(16, repeats, len(half_times), generator=seeded(seed)).argsort(-1)
    return torch.tensor(half_times)[orders]

LATE = torch.cat([shuffled([20.0, 22.0, 24.0]), torch.full((16, 500, 1), 88.0)], -1)

@pytest.mark.parametrize("half_times, index, within, correlation", [
    pytest.param([[[20.0, 40.0, 80.0]] * 6], 4, 4, 1, id="one order in every repeat"),
    # mean ranks 1, 1, 1, 3, less 3/2 and squared: 3/4 + 9/4, of 5
    pytest.param(LATE, 4, 4.4, 3 / 5, id="one mode late, the others by chance"),
    pytest.param([[[30.0, 30.0, 30.0]] * 5], 1, 1, math.nan, id="all at once"),
    # ranks less their mean: -1/2, -1/2, 1 and -1, 0, 1: 2 * 3/2 / (3/2 + 2)
    pytest.param([[[10.0, 10.0, 20.0], [10.0, 20.0, 30.0]]], 6 ** 0.5, 6 ** 0.5, 6 / 7, id="a tie"),
    pytest.param([[[10.0, 20.0, 900.0], [10.0, 20.0, 40.0]]], 80 ** 0.5, 80 ** 0.5, 1,
                 id="a mode that one repeat never reaches, which ranks last")])
def test_the_measures_say_what_is_true_of_a_planted_system(half_times, index, within, correlation):
    strength = planted(half_times)
    for measure, value, atol in ((learners.staggering, index, 0.2),
                                 (learners.staggering_within, within, 1e-3),
                                 (learners.rank_correlation, correlation, 0.03)):
        found = measure(strength, TIME)
        expected = torch.full(strength.shape[1:2], value, dtype=found.dtype)
        assert_close(found, expected, atol=atol, rtol=0, equal_nan=True)

@pytest.mark.parametrize("repeats", [4, 64, 512])
def test_the_index_of_exactly_concurrent_systems_is_one_with_any_number_of_repeats(repeats):
    seen, plain = [], []
    for seed in range(20):
        strength = planted(shuffled([10.0, 20.0, 30.0, 45.0, 80.0], repeats, seed))
        seen.append(learners.staggering(strength, TIME).log().mean())
        half = learners.half_time(strength.mean(2), TIME)
        plain.append((half.amax(-1) / half.amin(-1)).log().mean())
    seen, plain = torch.stack(seen), torch.stack(plain)
    assert seen.mean().abs() < 4 * standard_error(seen)
    assert plain.mean() > 4 * standard_error(plain)       # the uncorrected index is biased upwards

def test_half_times_are_interpolated_and_tell_undefined_from_infinite():
    time, nan, inf = torch.tensor([0.0, 10.0, 20.0]), math.nan, math.inf
    strength = torch.tensor([[0.0, 0.6, 0.0, 0.0], [0.25, 0.7, 0.1, 1.0], [0.75, 0.8, 0.2, 0.0]])
    for recorded, half in (3, [15.0, nan, inf, 5.0]), (1, [inf, nan, inf, inf]):
        found = learners.half_time(strength[:recorded], time[:recorded])
        assert_close(found, torch.tensor(half), equal_nan=True)
    seen = learners.describe(strength, time)              # (R, K): one task, one repeat
    assert seen["half_times"] == pytest.approx([15, nan, inf, 5], nan_ok=True)
    assert seen["staggering"] == pytest.approx(4) and seen["lower_bound"]      # 20, over 5
    with pytest.raises(ValueError, match=r"\(R, N, E, K\) or \(R, K\)"):
        learners.describe(strength[0], time)
    for undefined in 0 * strength, strength[:, :1]:       # nothing is learned; a single mode
        assert math.isnan(learners.describe(undefined, time)["staggering"])

def test_one_array_of_strengths_gives_both_orders_of_a_planted_system():
    tasks_ = LINEAR.evaluation_tasks(4, seeded())
    assert_close(tasks_.mT @ tasks_, torch.diag(S.float() ** 2).expand(4, 5, 5))
    W, number = LINEAR.repeats(tasks_, 500, seeded(1)), torch.arange(5.0)
    column = LINEAR.columns(W)
    share = torch.nn.functional.one_hot(column, 5).double().mean((0, 1))        # (5, 5)
    assert ((share - 0.2).abs() < 4 * (0.2 * 0.8 / 2000) ** 0.5).all()
    assert_close(LINEAR.strength(W * number, W), column.float())      # column k is learned k times
    results = metadyn.Results(metadyn.LinReg())
    results.add("a", "a", "steps", torch.arange(3), column.float().expand(3, -1, -1, -1), column)
    assert_close(results.tensors("a", by_column=True)[0], number.expand(3, 4, 500, 5))

def test_two_systems_are_compared_on_their_shared_episodes():
    half, other = (10 * 8 ** torch.rand(4, 500, 2, generator=seeded(seed)) for seed in (0, 1))
    for system, expected, atol in (1.5 * half, 1, 1e-3), (800 / half, -1, 1e-3), (other, 0, 0.09):
        found = learners.half_time_correlation(planted(half), planted(system), TIME)
        assert_close(found, torch.full((2,), float(expected)), atol=atol, rtol=0)
    half = torch.tensor([[[10.0, 20.0]] * 3] * 4)
    ratio = learners.half_time_ratio(planted(half * torch.tensor([1.0, 2.0])), planted(half), TIME)
    assert_close(ratio, torch.tensor([[1.0] * 3, [2.0] * 3]), atol=1e-3, rtol=0)

def planted_results(config, strength=None):
    """Results of one planted system in the place of all."""
    results = metadyn.Results(config, modes=["a", "b"])
    for system in "learner", "meta", "bayes":
        results.add(system, system, "steps", TIME, planted([[[20.0, 60.0]] * 4] * 3))
    for system, last in ("none", 1.0), ("meta", 0.05), ("bayes", 0.02):
        results[f"performance/{system}"] = torch.tensor([[1.0, last]]).repeat(50, 1)
        results[f"excess/{system}"] = last - 0.01
    results["outer_loop/step"], results["outer_loop/score"] = TIME, TIME / 200
    results["outer_loop/strength"], results["probe/meta"] = results["learner/strength"], np.ones(2)
    return results

def test_the_summary_of_a_run_says_what_is_true_of_planted_arrays():
    results = planted_results(metadyn.LinReg())
    summary = results.summary
    assert summary["systems"]["learner"]["staggering"] == pytest.approx(3)
    assert summary["last_excess"] == pytest.approx(4)     # 0.05 and 0.02, both less 0.01
    assert summary["score"] == pytest.approx(0.95 / 0.98)
    assert summary["outer_loop"]["half_times"] == pytest.approx([20, 60])
    assert summary["systems"]["meta"]["against_bayes"] == pytest.approx(np.ones((2, 3)))
    assert "Warning" not in metadyn.table(results)

def test_table_dots_and_title_agree_and_words_say_what_is_undefined():
    results = planted_results(metadyn.LinReg())
    late = planted([[[20.0, 60.0]] * 4, [[20.0, 900.0]] * 4])         # unreached in one task
    results.add("learner", "Learner", "steps", TIME, late)
    results["excess/bayes"], results["performance/meta"] = 1e-16, torch.full((50, 2), 30.0)
    text, drawn = metadyn.table(results), metadyn.panel(results, "learner")
    assert re.search(r"Learner \(steps\) +20.0 +- +>5.48", text)      # sqrt(3 * 10)
    assert drawn["half_times"] == [pytest.approx(20), math.inf] and "index >5.48" in drawn["title"]
    assert "not measurably above 0" in text and "Warning" in text and text.isascii()
    results["modes"] = ["a"]
    assert "a single one it is undefined" in metadyn.table(results)

def test_intervals_are_two_standard_errors_and_leave_nan_out():
    values = torch.tensor([1.0, 2.0, 3.0, math.nan])
    assert learners.interval(values) == pytest.approx([2, 2 - 2 / 3 ** 0.5, 2 + 2 / 3 ** 0.5])

def test_the_score_and_its_interval():
    gain, noise = 0.8 + torch.tensor([[0.3], [0.1]]) * torch.randn(2, 500, generator=seeded())
    none, bayes = 1 + gain, torch.ones(500)
    between = none - 0.75 * gain + (noise - 0.8)          # noise alone makes the score uncertain
    assert learners.normalized_score(none, bayes, bayes)[0] == 1
    kappa, low, high = learners.normalized_score(none, between, bayes)
    assert low < 0.75 < high
    assert high - low == pytest.approx(4 * 0.1 / 0.8 / 500 ** 0.5, rel=0.1)
    assert learners.normalized_score(-none, -between, -bayes)[0] == pytest.approx(kappa)
    assert math.isnan(learners.normalized_score(bayes, bayes, bayes)[0])      # Bayes gains nothing

# ---------------------------------------------------------------- metamorphic

@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.RMSprop, learners.ADAM])
def test_linear_networks_do_not_influence_each_other(optimizer):
    target = LINEAR.sample(3, seeded())
    layers = learners.init_layers([3], [5, 5, 5], seeded(), 0.3)
    together, alone = (learners.linear_network(
        target[those], [layer[those] for layer in layers], 0.01, [20], optimizer)
        for those in (slice(3), slice(1, 2)))
    assert_close(together[:, 1:2], alone, atol=1e-5, rtol=1e-5)

def test_relu_networks_learn_from_their_own_points_alone_online_one_at_a_time():
    x, y = torch.rand(2, 3, 20, generator=seeded())

    def train(y, x=x, **more):
        return learners.relu_network(x[..., None], y, 1e-2, [0, 10, 11], 8, 2,
                                     torch.arange(8)[:, None] / 8, generator=seeded(1), **more)

    other, later = y.clone(), y.clone()
    other[2] *= -1
    later[:, 10] += 1
    f, g = train(y), train(other)
    assert_close(f[:, :2], g[:, :2], atol=0, rtol=0)
    assert (f[2, 2] - g[2, 2]).abs().max() > 0.01
    assert_close(train(y[:, :0], x[:, :0])[2], f[0], atol=0, rtol=0)   # nothing to fit at t = 0
    f, g = train(y, online=True), train(later, online=True)
    assert_close(f[:2], g[:2], atol=0, rtol=0)            # step 10 comes after the record of 10
    assert (f[2] - g[2]).abs().amax(-1).min() > 1e-3

@CORES
def test_predictions_use_the_past_alone_and_the_probe_asks_before_each_trial(core):
    distribution = tasks.LinearRegression(trials=9)
    x, y = drawn(distribution, 4)
    changed = y.clone()
    changed[:, 5] += 1
    for predictor in small_meta(distribution, core=core), tasks.Bayes(distribution):
        before, after = predictor.predict(x, y), predictor.predict(x, changed)
        assert_close(before[:, :6], after[:, :6], atol=1e-6, rtol=0)
        assert ((before - after)[:, 6:].abs().amax(-1) > 0).all()
        answers = predictor.probe(x, y, x[0])             # at every x, before every trial
        assert answers.shape == (4, 10, 9, 5)
        assert_close(answers[0, range(9), range(9)], before[0], atol=1e-5, rtol=1e-4)

@CORES
def test_agents_use_the_past_alone_and_are_not_changed_by_the_probe(core):
    distribution = tasks.ContextualBandit(3, 4, 25)
    correct, contexts, noise = drawn(distribution, 32)
    changed = contexts.clone()
    changed[:, 9:] = changed[:, 9:].flip(1)
    for agent in (tasks.BayesAgent(distribution),
                  meta.MetaAgent(distribution, 16, 1, seeded(), core=core)):
        *played, J = distribution.play(agent, correct, contexts, noise, probe=True)
        other = distribution.play(agent, correct, changed, noise, probe=True)[2]
        assert_close(J[:, :10], other[:, :10], atol=1e-6, rtol=0)
        assert (J[:, 10:] - other[:, 10:]).abs().max() > 0
        assert_close(distribution.play(agent, correct, contexts, noise)[:2], (*played,))

def test_permuting_actions_permutes_the_policy_and_keeps_which_contexts_share_an_answer():
    distribution, permutation = tasks.ContextualBandit(3, 4), torch.tensor([2, 0, 3, 1])
    correct = distribution.sample(20, seeded())
    logits = torch.randn(20, 3, 4, generator=seeded())
    how = 0.5, [0, 10, 50]
    J = learners.policy_gradient(correct, logits, *how)
    correct, logits = permutation[correct], logits[..., permutation.argsort()]
    assert_close(learners.policy_gradient(correct, logits, *how), J)
    permuted = distribution.repeats(torch.tensor([[0, 1, 0]]), 50, seeded())[0]
    assert permuted[:, 0].unique().tolist() == [0, 1, 2, 3]
    assert (permuted[:, 0] == permuted[:, 2]).all() and (permuted[:, 0] != permuted[:, 1]).all()

def test_two_models_from_one_generator_differ_and_no_global_generator_is_touched():
    state, generator = torch.get_rng_state(), seeded()
    first, second = (meta.MetaLearner(LINEAR, 16, 1, generator) for _ in range(2))
    assert (first.core.weight_hh_l0 - second.core.weight_hh_l0).abs().max() > 0.01
    assert first.core.weight_hh_l0.abs().max() <= 16 ** -0.5
    assert 0.9 < first.core.weight_ih_l0.abs().max() * 15 ** 0.5 <= 1        # 15 inputs
    assert_close(torch.get_rng_state(), state)

# ---------------------------------------------------------------- statistics, seeded

def test_moments_of_the_samplers():
    W, V = (distribution.sample(4000, seeded()) for distribution in (LINEAR, WAVES))
    skewed = tasks.LinearRegression(skew=1.0).sample(4000, seeded())
    Q = LINEAR.evaluation_tasks(4000, seeded())
    (x, y), (u, v) = (d.episodes(w, seeded(1)) for d, w in ((LINEAR, W), (WAVES, V)))
    total = sum(k ** -2.0 for k in range(1, 6))
    for samples, expected in (
            (W[:, 0, 1] ** 2, 1 / 5), (x[:, 3, 2] ** 2, 1), (x[:, 0, 0] * x[:, 1, 0], 0),
            ((y - x @ W.mT)[:, 5, 1] ** 2, 0.01), (y[:, 4, 0] ** 2, 1.01), (Q[:, 0, 0] ** 2, 0.242),
            (V[:, 0, 3] ** 2, 1 / 5), (u[:, 7, 0], 0.5), (v[:, 3, 0] ** 2, 1.01),
            (skewed[:, 0, 2] ** 2, 1 / 9 / total), (skewed.square().sum((-2, -1)) / 5, 1)):
        assert abs(samples.mean() - expected) < 4 * standard_error(samples)

def against_bayes(distribution, predictor):
    """The score on new episodes, and by how many standard errors Bayes is beaten."""
    is_bandit = isinstance(distribution, tasks.ContextualBandit)
    bayes = (tasks.BayesAgent if is_bandit else tasks.Bayes)(distribution)
    episodes = drawn(distribution, 2000, seed=9)
    values = [distribution.score(each, *episodes).mean(1) for each in (predictor, bayes)]
    beaten = values[0] - values[1] if is_bandit else values[1] - values[0]
    never = distribution.never_learns(*episodes).mean(1)
    return learners.normalized_score(never, *values)[0], beaten.mean() / standard_error(beaten)

def trained(distribution, model, steps):
    """The model after a short outer loop."""
    meta.train(model, distribution, steps, 64, seeded())
    return model

@pytest.mark.parametrize("distribution, kind, steps", [
    (tasks.LinearRegression([1.0, 1.0], trials=8), meta.MetaLearner, 400),
    (tasks.LinearRegression([1.0, 1.0], trials=8, skew=1.0), meta.MetaLearner, 400),
    (tasks.ContextualBandit(2, 3, 12), meta.MetaAgent, 400)])
def test_a_trained_system_scores_at_least_half_and_does_not_beat_bayes(
        distribution, kind, steps):
    score, beaten = against_bayes(
        distribution, trained(distribution, kind(distribution, 32, 1, seeded(1)), steps))
    assert score > 0.5 and beaten < 4

def test_bayes_with_another_noise_is_worse_than_bayes():
    wrong = tasks.Bayes(tasks.LinearRegression([1.0, 1.0], 0.5, 8))
    assert against_bayes(tasks.LinearRegression([1.0, 1.0], 0.1, 8), wrong)[1] < -4

@pytest.mark.parametrize("frequencies, early", [
    ((6, 7, 8, 9, 10), True), ((3, 7, 12, 20, 33), False)])
def test_bayes_learns_waves_slightly_earlier_at_the_edges_of_a_band_whatever_their_speed(
        frequencies, early):
    distribution = tasks.FourierRegression(frequencies)
    episodes = distribution.evaluation_episodes(
        distribution.evaluation_tasks(16, seeded()), 200, seeded())
    strength, _ = distribution.inner_loop(tasks.Bayes(distribution), *episodes)
    half = learners.half_time(strength.mean(2), torch.arange(41.0))            # (16, 5)
    edge = half[:, 2] - (half[:, 0] + half[:, 4]) / 2
    error = edge.mean() / standard_error(edge)
    assert error > 4 if early else abs(error) < 4

def test_reinforce_is_on_average_the_exact_gradient_and_sees_one_context_at_a_time():
    correct = torch.tensor([[0, 2, 1]]).expand(40_000, -1)
    logits = torch.randn(3, 4, generator=seeded(), dtype=torch.float64).expand(40_000, -1, -1)
    found, exact = (learners.policy_gradient(
        correct, logits, 1e-4, [0, 1], False, online, seeded()).diff(dim=0)[0]
        for online in (True, False))
    assert ((found.mean(0) - exact[0]).abs() < 4 * standard_error(found)).all()
    assert 0.1 < (found != 0).any(-1).float().mean() < 0.9 and ((found != 0).sum(-1) <= 1).all()

def test_the_policy_gradient_is_that_of_the_rewards_with_the_states_as_they_come():
    distribution = tasks.ContextualBandit(2, 2, 2)
    distribution.sample = lambda n, generator: torch.tensor([[0, 1]]).expand(n, 2)     # one task
    agent = meta.MetaAgent(distribution, 16, 1, seeded(1), entropy=0.0)
    agent.load_state_dict({name: 2 * p for name, p in agent.state_dict().items()})
    agent.head.bias.data[-1] = 0.5                        # a baseline, which must not bias
    # all that can have happened: contexts of trials 0 and 1, which name their answers, an action
    first, second, action = torch.cartesian_prod(*[torch.arange(2)] * 3).T
    past = agent.encode_trial(first, action, (action == first).float())
    shown = [torch.cat([torch.eye(2)[context], before], -1)
             for context, before in ((first, 0 * past), (second, past))]
    policy = agent(torch.stack(shown, 1))[0][..., :2].softmax(-1)              # (8, 2, 2)
    J = policy.gather(-1, torch.stack([first, second], 1)[..., None])[..., 0]
    chance = policy[torch.arange(8), 0, action].detach() / 4          # held fixed: discount 0
    expected = -(chance[:, None] * J).sum(0).mean()
    exact = torch.autograd.grad(expected, agent.head.weight)[0][:2]
    losses = (agent.loss(distribution, 400, seeded(i), 0.0) for i in range(300))
    found = torch.stack([torch.autograd.grad(loss, agent.head.weight)[0][:2] for loss in losses])
    assert exact.abs().max() > 20 * standard_error(found).max()
    assert ((found.mean(0) - exact).abs() <= 4 * standard_error(found)).all()

# ---------------------------------------------------------------- ablations: no cause, no effect

def learner_indices(online=False, std=0.01, widths=(5, 64, 5)):
    """Index of a linear Learner by strength and by column, and its rank correlation."""
    W = LINEAR.repeats(LINEAR.evaluation_tasks(16, seeded()), 16, seeded(1))
    layers = learners.init_layers(W.shape[:2], widths, seeded(2), std)
    lr, steps = (0.02, metadyn.evenly_spaced(1000)) if std else (0.004, metadyn.evenly_spaced(200))
    maps = learners.linear_network(
        W, layers, lr, steps, online=online, noise=0.1, generator=seeded(3))
    results = metadyn.Results(metadyn.LinReg())
    results.add("a", "a", "steps", steps, LINEAR.strength(maps, W), LINEAR.columns(W))
    by_strength, by_column = (learners.describe(*results.tensors("a", by)) for by in (False, True))
    return by_strength["staggering"], by_column["staggering"], by_strength["rank_correlation"]

@pytest.mark.parametrize("online", [False, True])
def test_a_learner_follows_the_strengths_from_a_small_start_only_and_never_the_columns(online):
    by_strength, by_column, correlation = learner_indices(online)
    assert 3.7 < by_strength < 4.2 and 0.8 < by_column < 1.25 and correlation > 0.8
    for start in dict(std=None), dict(std=0.01, widths=(5, 5)):
        by_strength, by_column, correlation = learner_indices(online, **start)
        assert 0.8 < by_strength < 1.25 and abs(correlation) < 0.1

@pytest.mark.parametrize("system, index", [(tasks.Bayes, 2.0), (tasks.OneStep, 3.8)])
def test_the_skew_alone_moves_the_order_of_columns_and_turns_it_round(system, index):
    for skew, direction in (-0.5, -1), (0.0, 0), (0.5, 1):
        distribution = tasks.LinearRegression(skew=skew)
        strength, _ = by_column(distribution, system(distribution), 256)
        found = learners.staggering(strength, torch.arange(21.0)).log()
        if direction:
            half = learners.half_time(strength.mean((1, 2)), torch.arange(21.0))
            assert found.mean().exp().item() == pytest.approx(index, rel=0.1)
            assert (direction * half.diff() > 0).all()
        else:
            assert abs(found.mean()) < 4 * standard_error(found)

def test_the_tie_alone_moves_bayes_and_only_in_the_tied_contexts():
    strengths = []
    for tied in 1, 2:
        distribution = tasks.ContextualBandit(tied=tied)
        episodes = distribution.evaluation_episodes(
            distribution.evaluation_tasks(64, None), 128, seeded())
        strength, _ = distribution.inner_loop(tasks.BayesAgent(distribution), *episodes)
        half, theory = (learners.half_time(each, torch.arange(61.0)) for each in (
            strength.mean(2), distribution.strength(distribution.bayes_curve())))
        assert ((half.mean(0) - theory).abs() < 4 * standard_error(half)).all()
        assert (theory.max() / theory.min()).item() == pytest.approx([0, 1, 2.034][tied], abs=0.01)
        strengths.append(strength)
    assert_close(strengths[0][..., 2:], strengths[1][..., 2:])        # the same actions were tried

def policy_half_times(pattern, shared, lr=0.5):
    """Half-times (C,) of policy gradient, averaged over 8 blocks of 64 repeats of one pattern."""
    correct = BANDIT.repeats(torch.tensor(pattern).expand(8, -1), 64, seeded())
    logits = 0.1 * torch.randn(*correct.shape, 5, generator=seeded(1))
    J = learners.policy_gradient(correct, logits, lr, range(101), shared)
    return learners.half_time(BANDIT.strength(J).mean(2), torch.arange(101.0)).mean(0)

def test_a_shared_bias_helps_contexts_that_share_and_hardly_hinders_the_others():
    shared, own = (policy_half_times([0, 0, 1, 2, 3], shared) for shared in (True, False))
    assert (shared.max() / shared.min()).item() == pytest.approx(2.26, rel=0.03)
    assert (own.max() / own.min()).item() == pytest.approx(1, abs=0.02)
    # own biases double the rate: without any bias, a context takes as long as at half the rate
    none = policy_half_times([0, 0, 1, 2, 3], False, lr=0.25)
    assert (shared[:2] < 0.55 * none[:2]).all() and (shared[2:] < 1.12 * none[2:]).all()
    distinct = policy_half_times([0, 1, 2, 3, 4], True)
    assert (distinct.max() / distinct.min()).item() == pytest.approx(1, abs=0.03)
    assert_close(distinct, none, rtol=0.03, atol=0)

def wave_strength(inputs, lr, steps, **how):
    """Strengths (R, 4, 4, 5) of a network that sees 64 points of the circle as `inputs` says."""
    W, x = WAVES.evaluation_tasks(4, seeded()), torch.arange(64)[:, None] / 64
    y = (WAVES.features(x) @ W.mT).mT.expand(-1, 4, -1)
    inputs = inputs(x).expand(*y.shape, -1)
    f = learners.relu_network(inputs, y, lr, steps, generator=seeded(), **how)
    return WAVES.waves(f, x, W)

def test_the_input_coding_alone_decides_the_order_of_a_relu_network():
    index = [learners.describe(wave_strength(inputs, 3e-3, range(100)), torch.arange(100))
             for inputs in (WAVES.encode, WAVES.features)]
    assert index[0]["staggering"] > 4 and index[1]["staggering"] < 1.3

@pytest.mark.parametrize("exponent", [1, 0])
def test_a_linear_layer_learns_a_feature_at_the_rate_of_its_square(exponent):
    k = WAVES.frequencies
    gap = 1 - wave_strength(lambda x: WAVES.features(x) / k.repeat(2) ** exponent, 0.05, [0, 100],
                            layers=0, optimizer=torch.optim.SGD)
    kept = (1 - 0.05 * k.float() ** (-2 * exponent)) ** 100
    assert_close(gap[1] / gap[0], kept.expand(4, 4, 5), atol=1e-4, rtol=0)

FAMILIES = dict(linreg=metadyn.LinReg, nonlinreg=metadyn.NonlinReg, bandit=metadyn.Bandit)
REMOVED = dict(linreg="one_layer", nonlinreg="fourier_inputs", bandit="own_biases")

@pytest.mark.parametrize("family", REMOVED)
def test_a_quick_run_shows_the_claim_and_its_ablation(family):
    summary = FAMILIES[family].quick(device="cpu").experiment().summary
    learner, removed, learned = (summary["systems"][system] for system in (
        "learner", REMOVED[family], "meta"))
    assert learner["staggering"] > 1.6 and learner["rank_correlation"] > 0.4
    assert 0.9 < removed["staggering"] < 1.25
    assert summary["score"] > 0.9
    assert learned["staggering"] < min(1.2, 0.7 * learner["staggering"])
    if family == "bandit":                                # rewards of one trial a step are noisy
        assert summary["systems"]["online"]["within"] > 2 * learner["within"]

def test_bayes_learns_frequencies_in_the_order_of_the_skew():
    for skew, direction in (-0.5, -1), (0.5, 1):
        distribution = tasks.FourierRegression(skew=skew)
        episodes = distribution.evaluation_episodes(
            distribution.evaluation_tasks(8, seeded()), 100, seeded())
        strength, _ = distribution.inner_loop(tasks.Bayes(distribution), *episodes)
        half = learners.half_time(strength.mean((1, 2)), torch.arange(41.0))
        assert direction * (half[-1] - half[0]) > 0 and 2 < half.max() / half.min() < 3

# ---------------------------------------------------------------- negative controls

def test_a_wrong_time_constant_is_seen():
    assert gain_law_error(0.01, tau=1.1) > 0.05

def test_a_meta_learner_that_sees_no_answers_learns_nothing():
    class Unanswered(meta.MetaLearner):
        def predict(self, x, y):
            return super().predict(x, 0 * y)

    distribution = tasks.LinearRegression([1.0, 1.0], trials=8)
    unanswered = trained(distribution, Unanswered(distribution, 32, 1, seeded(1)), 200)
    assert against_bayes(distribution, unanswered)[0] < 0.02

# ---------------------------------------------------------------- the README

ANSWERS = re.findall(r"The last number is (about )?`([\d.]+)`", README)

@pytest.mark.parametrize("number", range(8))
def test_an_exercise_prints_what_its_answer_promises(number, capsys):
    about, promised = ANSWERS[number]
    exec(CODE[number + 2], {"__name__": "example"})
    printed = re.findall(r"\d+\.\d+", capsys.readouterr().out)[-1]
    assert float(printed) == pytest.approx(float(promised), rel=0.2 if about else 0.02)

def test_the_other_code_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code in CODE[:2] + CODE[10:]:
        exec(code, {"__name__": "example"})
    assert len(ANSWERS) == 8 and len(CODE) == 11
    assert len(next(code for code in CODE if "Run)" in code).split("# the experiment")[1]
               .splitlines()) <= 41                       # a new family, its distribution apart

CLAIMS = ["learner/staggering", "meta/staggering", "bayes/staggering", "meta/within",
          "{}/staggering", "online/staggering", "converged/staggering", "score", "last_excess"]

TOLD = """takes <linreg learner/staggering> times as long
The Learner's index is <linreg learner/staggering> and its rank correlation
The Meta-Learner's index is <linreg meta/staggering> and Bayes' is <linreg bayes/staggering>
is <linreg learner/within> for the Learner, at least <linreg meta/within> for the Meta-Learner
its index is <nonlinreg learner/staggering>. The cause
the index is <nonlinreg fourier_inputs/staggering>. Conversely
The Meta-Learner's index is <nonlinreg meta/staggering> and Bayes' is <nonlinreg bayes/staggering>
the index is <bandit learner/staggering>
Bayes from <bandit bayes/staggering> to <bandit-tied2 bayes/staggering>
Meta-Learner from <bandit meta/staggering> to <bandit-tied2 meta/staggering>"""

def test_the_numbers_of_the_readme_are_those_of_the_runs():
    runs = {}
    for row in csv.DictReader((HERE / "figures/overview.csv").read_text("utf-8").splitlines()):
        form = "{:.3f}".format if row["number"] == "score" else metadyn.format_number
        number = row["number"].removeprefix("systems/")
        runs[row["run"], number] = [form(float(row[name])) for name in ("mean", "sd")]
    for line in TOLD.splitlines():                        # the headlines, word by word
        words = re.sub(r"<(\S+) (\S+)>", lambda found: runs[found.groups()][0], line)
        assert words in " ".join(README.split()), words
    table = re.findall(r"^\|.*±.*±.*\|$", README, re.MULTILINE)        # the claims, cell by cell
    for line, claim in zip(table, CLAIMS, strict=True):
        for family, cell in zip(REMOVED, line.strip(" |").split(" | ")[2:], strict=True):
            name = claim.format(REMOVED[family])
            bound = name.replace("staggering", "lower_bound")
            bound = bound.replace("within", "within_lower_bound")
            unsure = bound != name and runs.get((family, bound), ["0.00"])[0] != "0.00"
            words = "at least " * unsure
            words += " ± ".join(runs.get((family, name), "–"))
            if (family, claim) == ("bandit", "last_excess"):
                words = "both near 0"
            assert cell == words
    for line in re.findall(r"^\| ([^|]+ \| [\d.]+ \([\d.]+\) .*)\|$", README, re.MULTILINE):
        label, *cells = line.strip(" |").split(" | ")
        system = dict(Learner="learner", Bayes="bayes").get(
            label, "meta" if label.startswith("Meta") else "one_step")
        for run, cell in zip(("linreg-skew-0.5", "linreg", "linreg-skew0.5"), cells, strict=True):
            by_column, by_strength = (runs[run, f"{system}/{path}staggering"][0]
                                      for path in ("by_column/", ""))
            assert cell == f"{by_column} ({by_strength})"

# ---------------------------------------------------------------- figures

def test_a_figure_shows_itself_takes_lists_clips_nothing_and_explains_what_is_drawn():
    panel = dict(title="A", time=[0, 1, 2], strength=[[0.0, 0.1], [0.4, 0.2], [2.5, -0.6]],
                 labels=["a", "b"])
    figure = plots.dynamics([panel], "seed 0")
    assert figure._repr_png_().startswith(b"\x89PNG")
    low, high = figure.axes[0].get_ylim()
    assert low < -0.6 and high > 2.5
    assert figure.get_supxlabel() == "seed 0"
    more = dict(half_times=[1.1, math.inf], stderr=[[0.1] * 2] * 3, theory=[[0.5]] * 3,
                theory_half_times=[1.0, 9.0])
    words = plots.dynamics([panel, panel | more]).get_supxlabel()
    equal = plots.dynamics([panel | dict(half_times=[1.0, 1.0])]).axes[0]
    dots = [tuple(line.get_xydata()[0]) for line in equal.lines if len(line.get_xydata()) == 1]
    assert len(set(dots)) == 2                            # equal half-times are seen to be two
    assert words.split(" · ") == ["dots: half-times", "dashes: theory", "crosses: theory",
                                  "bands: 2 standard errors"]

# ---------------------------------------------------------------- plumbing

SMALL = dict(hidden=8, layers=1, batch=8, outer_steps=12, eval_tasks=3, eval_episodes=8,
             test_tasks=64, device="cpu", learner_steps=41, learner_repeats=2)
TINY = dict(
    linreg=SMALL | dict(singular_values=[1.1, 0.4], trials=6, converged_episodes=2),
    nonlinreg=SMALL | dict(n_frequencies=2, trials=6, learner_hidden=8, online_steps=20,
                           converged_episodes=2),
    bandit=SMALL | dict(contexts=3, actions=3, trials=8))

def tiny(family, **changes):
    return FAMILIES[family](**TINY[family] | changes)

def words(family, *more):
    """The command of a tiny run."""
    options = [[f"--{name.replace('_', '-')}", *map(str, np.atleast_1d(value))]
               for name, value in TINY[family].items()]
    return [family, *sum(options, []), *map(str, more)]

def arrays(folder):
    with np.load(folder / "results.npz") as file:
        return dict(file)

@pytest.fixture(autouse=True)
def unsaved_figures(monkeypatch):
    """Figures of a run are drawn, but not saved: that takes most of a tiny run's time."""
    def savefig(figure, where, **more):
        return None if isinstance(where, Path) else original(figure, where, **more)

    original = plots.Figure.savefig
    monkeypatch.setattr(plots.Figure, "savefig", savefig)

@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Folders of tiny runs by family, one made by a command on a console of ASCII alone."""
    folder = tmp_path_factory.mktemp("tiny")
    command = [sys.executable, HERE / "metadyn.py", *words("bandit", "--out", folder / "bandit")]
    done = subprocess.run(command, check=True, capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert b"Warning" in done.stdout and b"outer loop" in done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadyn, "figures", lambda results: {})
        for family in "linreg", "nonlinreg":
            metadyn.run(tiny(family), folder / family)
    return {family: folder / family for family in TINY}

def test_a_run_leaves_a_table_its_files_and_its_figures(runs):
    for name, header in (("dynamics", "system,mode,time,strength,stderr"),
                         ("performance", "system,trial,value,stderr")):
        first, *rows = (runs["bandit"] / f"{name}.csv").read_text().splitlines()
        assert first == header and rows
    assert (runs["bandit"] / "dynamics.png").read_bytes().startswith(b"\x89PNG")
    for folder in runs.values():
        text = (folder / "summary.json").read_text()
        assert set(json.loads(text)["systems"]["learner"]) >= {
            "half_times", "staggering", "staggering_ci", "within", "rank_correlation"}
        assert "NaN" not in text and "Infinity" not in text
        assert arrays(folder)["learner/time"][-1] == 41   # the last step is recorded

def test_a_complete_run_is_drawn_again_from_its_arrays_alone(runs, monkeypatch):
    monkeypatch.setattr(learners, "linear_network", None)
    results = metadyn.run(tiny("linreg", device="auto"), runs["linreg"])
    time, strength, _ = results.curve("learner")
    lines = metadyn.figures(results)["dynamics"].axes[0].lines        # what is measured is drawn
    for curve in strength.T:
        assert any(np.array_equal(line.get_xydata(), np.stack([time, curve], 1)) for line in lines)
    with pytest.raises(ValueError, match="'Bayes' is not one of .*bayes"):
        results.curve("Bayes")

@pytest.mark.parametrize("changed, same", [
    (dict(test_tasks=80), ["meta/strength", "bayes/strength"]),
    (dict(eval_episodes=20), ["performance/meta", "learner/strength"])])
def test_what_one_part_draws_never_shifts_another(changed, same, runs):
    after = metadyn.linreg(tiny("linreg", **changed))
    for name in same:
        np.testing.assert_array_equal(after[name], arrays(runs["linreg"])[name], name)

def test_the_generators_of_seeds_and_purposes_are_all_different():
    drawn = {metadyn.generator_for(metadyn.LinReg(seed=seed), purpose).initial_seed() % 2 ** 32
             for seed in range(50) for purpose in ("tasks", "probe", "a new one")}
    assert len(drawn) == 150

@pytest.mark.parametrize("family, step", [("linreg", 3), ("nonlinreg", 12), ("bandit", 7)])
def test_stopped_at_a_checkpoint_and_started_again_it_leaves_the_same_arrays(
        family, step, runs, tmp_path, monkeypatch):
    def save_and_stop(path, call, at, *more):
        save(path, call, at, *more)
        if at == step:
            raise KeyboardInterrupt

    save = meta.save
    monkeypatch.setattr(meta, "save", save_and_stop)
    assert metadyn.main(words(family, "--out", tmp_path)) == 130
    monkeypatch.setattr(meta, "save", save)
    assert metadyn.main(words(family, "--out", tmp_path)) == 0
    np.testing.assert_equal(arrays(tmp_path), arrays(runs[family]))

@pytest.mark.parametrize("arguments, message", [
    ("cubreg", "invalid choice: 'cubreg'"),
    ("linreg --lr 1", "unrecognized arguments: --lr 1"),
    ("linreg --noise -1", "noise cannot be -1.0; allowed is float from 0 to 2147483647"),
    ("linreg --trials 0", "trials cannot be 0"), ("linreg --trials 2.5", "invalid int value"),
    ("linreg --singular-values 1 0", "singular_values cannot be (1.0, 0.0)"),
    ("nonlinreg --noise nan", "noise cannot be nan"),
    ("bandit --seed 99999999999999999999", "seed cannot be 99999999999999999999"),
    ("bandit --device tpu", "there is no tpu on this machine"),
    ("bandit --actions 3", "5 contexts, 3 actions"), ("linreg --skew 2", "skew cannot be 2.0"),
    ("linreg --out /dev/null/run", "Not a directory"), ("linreg --out a\0b", "null"),
    ("compare nowhere", "nowhere holds no run"),
    pytest.param("linreg --device cuda", "there is no cuda on this machine",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here"))])
def test_a_mistake_on_the_command_line_is_argparses_error(
        arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        metadyn.main(arguments.split(" "))
    out, err = capsys.readouterr()
    assert out == "" and message in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("settings", [
    dict(noise=-1e-5), dict(outer_steps=50.5), dict(singular_values=[]), dict(noise="a"),
    dict(seed=2 ** 31)])
def test_the_same_mistakes_from_python_are_a_value_error(settings):
    with pytest.raises(ValueError, match="cannot be"):
        metadyn.LinReg(**settings)

def test_a_folder_is_named_after_what_differs():
    names = [config.name() for config in (
        metadyn.Bandit(), metadyn.LinReg.quick(noise=np.float64(0.2), seed=np.int64(1)),
        metadyn.LinReg(singular_values=[1, 2], device="cpu"))]
    assert names == ["bandit", "linreg-quick-noise0.2-seed1", "linreg-singular_values1.0_2.0"]

def test_ctrl_c_while_libraries_are_imported_is_no_traceback(tmp_path):
    (tmp_path / "numpy.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    done = subprocess.run([sys.executable, HERE / "metadyn.py"], capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == -signal.SIGINT and not done.stderr

@pytest.mark.parametrize("quick, threads", [(["--quick"], 1), ([], 2)])
def test_a_quick_run_takes_one_thread(quick, threads, monkeypatch, tmp_path):
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    monkeypatch.setattr(metadyn, "run", lambda *arguments: seen.append(torch.get_num_threads()))
    metadyn.main(["linreg", "--out", str(tmp_path), *quick])
    torch.set_num_threads(before)
    assert seen == [threads]

@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("files", [["results.npz", "checkpoint.pt"], ["config.json"], ["a.txt"]])
def test_what_a_user_made_is_never_touched(files, fresh, tmp_path):
    for name in files:
        (tmp_path / name).write_text("[1]")
    with pytest.raises(ValueError, match="needs an empty or new folder"):
        metadyn.run(tiny("linreg"), tmp_path, fresh)
    there = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert there == dict.fromkeys(files, "[1]")

def test_a_folder_belongs_to_its_settings_and_numpy_numbers_are_numbers(runs, tmp_path):
    folder = shutil.copytree(runs["linreg"], tmp_path / "run")
    (folder / "notes.txt").write_text("mine")
    metadyn.run(tiny("linreg", noise=np.float64(0.1), seed=np.int64(0)), folder)       # the same
    with pytest.raises(ValueError, match=r"hidden 8 there, 9 here.*--fresh"):
        metadyn.run(tiny("linreg", hidden=9), folder)
    again = metadyn.run(tiny("linreg", hidden=9), folder, fresh=True)
    assert (again["performance/meta"] != arrays(runs["linreg"])["performance/meta"]).any()
    assert (folder / "notes.txt").read_text() == "mine"
    assert json.dumps(metadyn.load(folder).summary) == json.dumps(again.summary)

@pytest.mark.parametrize("word, other, changed", [
    ("Learners: systems", "Learners: things", False), ("0.5 * error", "0.6 * error", True)])
def test_a_run_belongs_to_the_code_that_made_it(
        word, other, changed, runs, tmp_path, monkeypatch, capsys):
    folder, copy = shutil.copytree(runs["linreg"], tmp_path / "run"), tmp_path / "learners.py"
    text = Path(learners.__file__).read_text("utf-8")
    assert word in text
    copy.write_text(text.replace(word, other), "utf-8")
    monkeypatch.setattr(learners, "__file__", str(copy))
    metadyn.run(tiny("linreg"), folder)                   # complete: drawn again
    assert capsys.readouterr().err.count("learners.py changed since") == changed
    (folder / "results.npz").unlink()
    if changed:
        with pytest.raises(ValueError, match="learners.py changed since.*--fresh"):
            metadyn.run(tiny("linreg"), folder)

@pytest.mark.parametrize("file", ["results.npz", "checkpoint.pt"])
def test_a_damaged_file_is_one_sentence(file, runs, tmp_path, capsys):
    folder = shutil.copytree(runs["linreg"], tmp_path / "run")
    damaged = (folder / file).read_bytes()[:700]
    (folder / "results.npz").unlink()                     # else the checkpoint is not read
    (folder / file).write_bytes(damaged)
    assert metadyn.main(words("linreg", "--out", folder)) == 1
    assert "damaged" in capsys.readouterr().err.splitlines()[-1]

def test_a_checkpoint_belongs_to_its_call_and_its_task_distribution(tmp_path):
    path, distribution = tmp_path / "checkpoint.pt", tasks.LinearRegression([1.0, 1.0], trials=8)

    def train(steps=4, lr=0.1, batch=8):
        model = small_meta(distribution, 8, 1)
        meta.train(model, distribution, steps, batch, seeded(), meta.default_optimizers(model, lr),
                   checkpoint=path)
        return model.head.weight

    assert_close(train(), train(), atol=0, rtol=0)
    for changed in dict(steps=3), dict(lr=0.2), dict(batch=9), {}:
        if not changed:
            distribution.features = lambda x: x ** 2
        with pytest.raises(ValueError, match="belongs to another call"):
            train(**changed)

@pytest.mark.parametrize("broken", [lambda w: w.sum() * math.nan, lambda w: (0 * w).sqrt().sum()])
def test_a_loss_or_gradient_that_is_not_finite_names_the_outer_step(broken):
    model = Scalar(lambda w, progress: broken(w) if progress == 7 / 20 else w.square().sum())
    with pytest.raises(FloatingPointError, match="outer step 7"):
        meta.train(model, LINEAR, 20, 1, seeded(), [torch.optim.Adam(model.parameters())])

def test_runs_are_compared_over_seeds_and_bounds_stay_bounds(tmp_path):
    results = [metadyn.run(tiny("linreg", seed=seed, learner_lr=0.15), tmp_path / str(seed))
               for seed in (0, 1)]                        # 41 steps are enough for one mode only
    text = metadyn.compare([tmp_path / "0", tmp_path / "1"], tmp_path / "both")
    rows = csv.DictReader((tmp_path / "both/overview.csv").read_text("utf-8").splitlines())
    row, = (row for row in rows if row["number"] == "score")
    first, second = (each.summary["score"] for each in results)
    assert [float(row["mean"]), float(row["sd"])] == pytest.approx(
        [(first + second) / 2, abs(first - second) / 2 ** 0.5])
    assert [float(row["seed0"]), float(row["seed1"])] == pytest.approx([first, second])
    assert re.search(r"learner +staggering +>\d", text)
    for name in "overview.csv", "dials.png":
        (tmp_path / name).write_text("mine")
        with pytest.raises(ValueError, match="not of metadyn"):
            metadyn.compare([tmp_path / "0"], tmp_path)
        (tmp_path / name).unlink()

@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("family, settings", [
    ("linreg", dict(singular_values=2.0, trials=2, noise=0.0)),
    ("linreg", dict(singular_values=[1.0] * 6, skew=-1.0, converged_episodes=1, learner_repeats=1)),
    ("nonlinreg", dict(n_frequencies=3, trials=2, skew=0.5, noise=0.0, converged_episodes=99)),
    ("nonlinreg", dict(batch=1, outer_steps=1, learner_steps=1, online_steps=1)),
    ("bandit", dict(actions=2, muon_lr=0.05)),
    ("bandit", dict(contexts=2, tied=2, learner_steps=1, outer_steps=1))])
def test_other_settings_are_carried_out_without_a_warning(family, settings, tmp_path):
    results = metadyn.run(tiny(family, **settings), tmp_path)
    for system in "learner", "meta", "bayes":
        assert np.isfinite(results[f"{system}/strength"]).all()

@pytest.mark.parametrize("module", ["tasks", "learners", "plots", "meta"])
def test_a_module_imports_none_of_the_others_and_its_example_runs(module, monkeypatch):
    text = (HERE / f"{module}.py").read_text(encoding="utf-8")
    for name in "tasks", "learners", "plots", "meta", "metadyn":
        monkeypatch.delitem(sys.modules, name)
        if name not in (module, "tasks"):
            monkeypatch.setitem(sys.modules, name, None)              # importing it fails
    assert not re.search(r"(?m)^(import|from) (tasks|learners|meta|metadyn|plots)\b", text)
    example = next(part for part in text.split('"""')[1].split("\n\n") if part.startswith("    "))
    exec(f"from {module} import *\n{textwrap.dedent(example)}", {})
