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
import subprocess
import sys
from dataclasses import replace
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
from learners import standard_error

HERE = Path(__file__).parent
torch.set_num_threads(1)                                  # as fast as two here, and fair to others
S = torch.tensor([1.1, 0.8, 0.6, 0.4, 0.2], dtype=torch.float64)
LINEAR, WAVES = tasks.LinearRegression(), tasks.FourierRegression()
BANDIT = tasks.ContextualBandit()
README = (HERE / "README.md").read_text("utf-8")
CODE = re.findall(r"```python\n([^`]*)```(?:\n</details>\n<details><summary>Answer</summary>\s+"
                  r"The last number is (about )?`([\d.]+)`)?", README)
CORE = {}                                                 # the README's own core
exec(next(code for code, *_ in CODE if "class Attention" in code).split("\n# train")[0], CORE)
CORES = pytest.mark.parametrize("core", [torch.nn.LSTM, torch.nn.GRU, CORE["Attention"]])

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)

def drawn(distribution, n=64):
    """An episode of each of n tasks."""
    generator = seeded()
    return distribution.episodes(distribution.sample(n, generator), generator)

def inner_loop(distribution, predictor, repeats=256):
    """Repeats of 16 tasks, strengths in them (T + 1, 16, repeats, K), and the probe's R^2."""
    W, *episodes = distribution.evaluation_episodes(
        distribution.evaluation_tasks(16, seeded()), repeats, seeded(1))
    return W, *distribution.inner_loop(predictor, W, *episodes)

def by_column(W, strength):
    """Strengths by mode, ordered by the column of W in which each mode is."""
    return strength.gather(-1, LINEAR.columns(W).argsort(-1).expand_as(strength))

# ---------------------------------------------------------------- analytic truth: Learners
def test_gradient_descent_follows_the_gain_law_with_a_first_order_error():
    layers, errors = learners.gain_layers((1,), 5, 10, 0.3, S.dtype), []
    for lr in 0.02, 0.04:
        steps = range(round(2 * learners.gain_half_times(S, 0.3).max().item() / lr) + 1)
        maps = learners.linear_network(torch.diag(S)[None], layers, lr, steps)
        theory = learners.gain_law(S, 0.3, torch.tensor(steps) * lr)
        errors.append((maps[:, 0].diagonal(dim1=-2, dim2=-1) - theory).abs().max())
    assert errors[0] < 0.02 and 1.9 < errors[1] / errors[0] < 2.1

@pytest.mark.parametrize("gain", [1e-4, 0.3, 10.0])
def test_the_gain_law_solves_its_equation_and_is_half_way_at_its_half_times(gain):
    half_times = learners.gain_half_times(S, gain)
    t = torch.linspace(0, 4, 41).double() * half_times.max()
    a, slope = torch.autograd.functional.jvp(
        lambda t: learners.gain_law(S, gain, t), t, torch.ones_like(t))
    assert_close(slope, (S - a) * (gain ** 2 + 4 * a ** 2).sqrt(), rtol=0, atol=1e-8)
    assert_close(learners.gain_law(S, gain, half_times).diagonal(), S / 2)
    assert_close(learners.gain_law(S, gain, torch.tensor([0, 1e9])), torch.stack([0 * S, S]))

def test_a_small_gain_is_the_logistic_of_saxe_and_a_large_one_is_one_layer():
    t = torch.linspace(0, 60, 601, dtype=torch.float64)[:, None]
    logistic = S / (1 + (4 * S / 1e-3 - 1) * torch.exp(-2 * S * t))   # from a quarter of the gain
    assert (learners.gain_law(S, 1e-3, t[:, 0]) - logistic).abs().max() < 3e-4
    one_layer = S * (1 - torch.exp(-t))                               # time in units of 1 / gain
    assert (learners.gain_law(S, 100.0, t[:, 0] / 100) - one_layer).abs().max() < 1e-3

def test_wide_starts_follow_the_law_and_only_small_ones_the_strengths_and_none_the_columns():
    small = dict(learner_repeats=16, hidden=8, outer_steps=1, eval_episodes=2)
    results = metadyn.LinReg(device="cpu", **small).experiment()
    for system, index, most in (("learner", 3.9, 0.01), ("online", 3.9, 0.01),
                                ("default_start", 1, 0.1), ("one_layer", 1, 0.1)):
        row, (strength, time) = results.summary["systems"][system], results.tensors(system)
        assert row["staggering"] == pytest.approx(index, rel=0.07)
        assert row["rank_correlation"] == pytest.approx(float(index > 1), abs=0.1)
        assert row["by_column"]["staggering"] == pytest.approx(1, rel=0.2)
        law = torch.from_numpy(results[f"{system}/theory_half_times"])
        over_law = learners.half_time(strength.mean(2), time) / law
        error = standard_error(over_law)
        assert error.max() < most and ((over_law.mean(0) - 1).abs() < 0.05 + 4 * error).all()

def test_from_a_small_start_gradient_descent_converges_to_bayes_without_noise_and_skew():
    x, y = (z.double() for z in drawn(tasks.LinearRegression([1.0] * 3, 0.1, trials=2), 4))
    layers = [layer.requires_grad_() for layer in learners.init_layers(
        [4], [3, 16, 3], seeded(), 1e-4, torch.float64)]

    def loss(step):
        return 0.5 * (y - x @ (layers[1] @ layers[0]).mT).square().sum()

    found = learners.gradient_descent(layers, loss, lambda: layers[1] @ layers[0], 0.05, [3000])[0]
    blind = tasks.LinearRegression([1.0] * 3, noise=0.0, trials=2)              # 2 of 3 directions
    assert_close(found, tasks.Bayes(blind).maps(x, y)[:, -1], atol=1e-3, rtol=0)

def test_two_contexts_and_two_actions_interfere_as_derived():
    logits = torch.randn(50, 2, 2, generator=seeded(), dtype=torch.float64)
    correct, dt = torch.tensor([[0, 1]]).expand(50, 2), 1e-6
    J = learners.policy_gradient(correct, logits, 2 * dt, [0, 1])
    assert_close(J[0], logits.softmax(-1).diagonal(dim1=-2, dim2=-1))
    g = J[0] * (1 - J[0])
    assert_close((J[1] - J[0]) / dt, 2 * g * (2 * g - g.flip(1)), atol=1e-5, rtol=0)

# ---------------------------------------------------------------- analytic truth: Bayes and meta
@pytest.mark.parametrize("distribution", [
    tasks.LinearRegression(skew=1.0), tasks.FourierRegression([7, 9], 0.25, 17)])
def test_the_sequential_posterior_is_the_batch_posterior(distribution):
    x, y = drawn(distribution)
    means = tasks.Bayes(distribution).maps(x, y)
    phi, variance = distribution.features(x.double()), distribution.noise ** 2
    P = torch.linalg.inv(phi.mT @ phi / variance + torch.diag(1 / distribution.weight_var))
    M = y.double().mT @ phi @ P / variance
    assert_close(means[:, -1], M, atol=1e-10, rtol=0)

def test_bayes_without_noise_knows_t_of_five_directions_of_every_mode_whatever_its_size():
    distribution = tasks.LinearRegression(noise=0.0)
    _, strength, r_squared = inner_loop(distribution, tasks.Bayes(distribution))
    by_task = strength[:6].mean(2)                                    # (6, 16, 5)
    error = by_task.mean(1) - torch.arange(6.0)[:, None] / 5
    assert (error.abs() < 4 * by_task.std(1) / 4 + 1e-3).all()
    assert_close(r_squared[1:], torch.ones(20))           # it is linear, and a constant is not
    _, residual, total = LINEAR.fit(torch.ones(3, 14, 5), LINEAR.queries(seeded()))
    assert_close(residual, total)

def test_the_policy_of_bayes_is_the_posterior_by_enumeration_of_all_tasks():
    distribution, generator = tasks.ContextualBandit(3, 3, 12, tied=2), seeded()
    every, agent = distribution.sample(200, generator).unique(dim=0), tasks.BayesAgent(distribution)
    for correct in every:
        agent.reset(1)
        possible = torch.ones(len(every), dtype=torch.bool)
        for _ in range(12):
            context, action = torch.randint(3, (2,), generator=generator)
            paid = correct[context] == action
            possible &= (every[:, context] == action) == paid
            agent.update(context[None], action[None], paid[None].float())
            posterior = torch.nn.functional.one_hot(every[possible], 3).float().mean(0)
            assert_close(agent.probe(torch.arange(3)[None])[0], posterior)

@pytest.mark.parametrize("skew", [-0.5, 0.0, 0.5])
def test_one_step_solves_the_normal_equations_and_has_the_half_times_of_its_formula(skew):
    distribution = tasks.LinearRegression([1.0] * 3, 0.7, 4, skew)
    W = distribution.sample(30_000, seeded())
    maps = tasks.OneStep(distribution).maps(*distribution.episodes(W, seeded(1)))[:, -1]
    products = (maps * (W - maps)).mean(-2)               # of estimate and error
    assert (products.mean(0).abs() < 4 * standard_error(products)).all()
    distribution = tasks.LinearRegression(skew=skew)
    model = tasks.OneStep(distribution)
    W, strength, _ = inner_loop(distribution, model, 512)
    half = learners.half_time(by_column(W, strength).mean(2), torch.arange(21.0))
    assert ((half.mean(0) - model.half_times()).abs() < 4 * standard_error(half)).all()
    assert (4 * standard_error(half) < 0.1 * model.half_times()).all()

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
    model = meta.MetaLearner(distribution, 4, 2, seeded(), core=core).double()
    x, y = (z.double() for z in drawn(distribution, 2))
    inputs = torch.cat([x, meta.shift_right(torch.cat([x, y], -1))[:, :-1]], -1)
    name, weight = next(model.named_parameters())         # of the core: the longest way back
    assert torch.autograd.gradcheck(lambda weight: (torch.func.functional_call(
        model, {name: weight}, (inputs,))[0] - y).square().mean(), weight)

@CORES
def test_every_parameter_is_in_exactly_one_optimizer(core):
    model = meta.MetaLearner(LINEAR, 16, 2, seeded(), core=core)
    for muon_lr in 0, 0.1:
        optimizers = meta.default_optimizers(model, muon_lr=muon_lr)
        held = [p for each in optimizers for group in each.param_groups for p in group["params"]]
        assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
        assert len(optimizers) == 1 + (muon_lr > 0)

def test_the_outer_loop_warms_up_over_two_percent_and_ends_at_zero():
    model, seen = torch.nn.Linear(1, 1, bias=False), []

    def loss(*call):                                      # Adam moves the weight by its rate a step
        seen.append(model.weight.item())
        return model.weight.sum()

    model.loss, group = loss, dict(params=[model.weight], lr=0.5)
    optimizers = [torch.optim.Adam([group], lr=9.0)]
    for _ in range(2):                                    # the same optimizers again: the same peak
        meta.train(model, LINEAR, 100, 1, seeded(), optimizers)
    factors = -np.diff(seen) / 0.5
    assert factors[[0, 1, 20, 60, 99]] == pytest.approx([1 / 3, 2 / 3, 1, 0.5, 1 / 80], abs=1e-4)
    assert factors[100:] == pytest.approx(factors[:99], abs=1e-4)

# ---------------------------------------------------------------- the measures, on planted systems
TIME = torch.arange(0.0, 201)

def planted(half_times):
    """Strengths (201, N, E, K) that rise in a straight line, from 0 to 1 in twice the half-time."""
    return (TIME[:, None, None, None] / (2 * torch.as_tensor(half_times))).clamp(0, 1)

def shuffled(half_times, repeats=500, seed=0):
    """These half-times (K,) in random order in each repeat of 16 tasks: (16, repeats, K)."""
    orders = torch.rand(16, repeats, len(half_times), generator=seeded(seed)).argsort(-1)
    return torch.tensor(half_times)[orders]

@pytest.mark.parametrize("half_times, index, within, correlation", [
    ([[[20.0, 40.0, 80.0]] * 6], 4, 4, 1),                            # one order in every repeat
    # one mode late, the others by chance: mean ranks 1, 1, 1, 3, less 3/2, squared: 3/4 + 9/4 of 5
    (torch.cat([shuffled([20.0, 22.0, 24.0]), torch.full((16, 500, 1), 88.0)], -1), 4, 4.4, 0.6),
    ([[[30.0, 30.0, 30.0]] * 5], 1, 1, math.nan),                     # all at once
    # a tie: ranks less their mean are -1/2, -1/2, 1 and -1, 0, 1: 2 * 3/2 / (3/2 + 2)
    ([[[10.0, 10.0, 20.0], [10.0, 20.0, 30.0]]], 6 ** 0.5, 6 ** 0.5, 6 / 7),
    ([[[10.0, 20.0, 900.0], [10.0, 20.0, 40.0]]], 80 ** 0.5, 80 ** 0.5, 1)])  # 900: never, last
def test_the_measures_say_what_is_true_of_a_planted_system(half_times, index, within, correlation):
    strength = planted(half_times)
    for measure, value, atol in ((learners.staggering, index, 0.2),
                                 (learners.staggering_within, within, 1e-3),
                                 (learners.rank_correlation, correlation, 0.03)):
        found = measure(strength, TIME)
        expected = torch.full(strength.shape[1:2], value, dtype=found.dtype)
        assert_close(found, expected, atol=atol, rtol=0, equal_nan=True)

def test_the_index_of_exactly_concurrent_systems_is_one_with_as_few_as_four_repeats():
    strengths = (planted(shuffled([10.0, 20.0, 40.0, 80.0], 4, seed)) for seed in range(20))
    seen = torch.stack([learners.staggering(each, TIME).log().mean() for each in strengths])
    assert seen.mean().abs() < 4 * standard_error(seen)

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
    W = LINEAR.repeats(LINEAR.evaluation_tasks(4, seeded()), 500, seeded(1))
    column, number = LINEAR.columns(W), torch.arange(5.0)
    assert_close(LINEAR.strength(W * number, W), column.float())      # column k is learned k times
    results = metadyn.Results(metadyn.LinReg())
    results.add("a", "a", "steps", range(3), column.float().expand(3, -1, -1, -1), column=column)
    assert_close(results.tensors("a", by_column=True)[0], number.expand(3, 4, 500, 5))

def test_two_systems_are_compared_on_their_shared_episodes():
    half, other = (10 * 8 ** torch.rand(4, 500, 2, generator=seeded(seed)) for seed in (0, 1))
    for system, expected, atol in (1.5 * half, 1, 1e-3), (800 / half, -1, 1e-3), (other, 0, 0.09):
        found = learners.half_time_correlation(planted(half), planted(system), TIME)
        assert_close(found, torch.full((2,), float(expected)), atol=atol, rtol=0)

def test_summary_table_and_panel_say_what_is_true_of_planted_arrays():
    results = metadyn.Results(metadyn.LinReg(), modes=["a", "b"])
    results["meta/r_squared"] = np.ones(2)
    strength = planted([[[20.0, 60.0]] * 4, [[20.0, 900.0]] * 4])              # 900: never
    for system, last in ("none", 1.0), ("meta", 0.04), ("bayes", 0.01):
        results.add(system, system, "steps", TIME, strength)
        results[f"{system}/excess"] = np.array([[1.0, last]] * 50)
    text, drawn = metadyn.table(results), metadyn.panel(results, "meta")
    assert re.search(r"meta \(steps\) +20.0 +- +>5.48", text)         # sqrt(3 * 10)
    assert drawn["half_times"] == [pytest.approx(20), math.inf] and "index >5.48" in drawn["title"]
    assert results.summary["last_excess"] == pytest.approx(4)         # 0.04 over 0.01
    assert results.summary["score"] == pytest.approx(0.96 / 0.99) and "Warning" not in text
    del results.summary                                   # else it is kept
    results |= {"bayes/excess": np.zeros((50, 2)), "meta/excess": np.full((50, 2), 31.0)}
    text = metadyn.table(results)
    assert "an excess - times that of Bayes" in text and "Warning" in text and text.isascii()

def test_the_score_and_its_interval():
    assert learners.interval(torch.tensor([1.0, 2.0, 3.0, math.nan])) == pytest.approx(
        [2, 2 - 2 / 3 ** 0.5, 2 + 2 / 3 ** 0.5])
    gain, noise = torch.randn(2, 500, 1, generator=seeded())
    gain, bayes = 0.8 + 0.3 * gain, torch.ones(500, 1)
    none = bayes + gain
    between = none - 0.75 * gain + 0.1 * noise            # noise alone makes the score uncertain
    _, low, high = learners.normalized_score(none, between, bayes)
    assert low < 0.75 < high
    assert high - low == pytest.approx(4 * 0.1 / 0.8 / 500 ** 0.5, rel=0.1)
    assert math.isnan(learners.normalized_score(bayes, bayes, bayes)[0])      # Bayes gains nothing

# ---------------------------------------------------------------- metamorphic
def test_relu_networks_learn_from_their_own_points_alone_online_one_at_a_time():
    x, y = torch.rand(2, 3, 20, generator=seeded())

    def train(y, **more):
        return learners.relu_network(x[..., None], y, 1e-2, [0, 10, 11], 8, 2,
                                     torch.arange(8)[:, None] / 8, generator=seeded(1), **more)

    other, later = y.clone(), y.clone()
    other[2] *= -1
    later[:, 10] += 1
    assert_close(train(y)[:, :2], train(other)[:, :2], atol=0, rtol=0)
    f, g = train(y, online=True), train(later, online=True)
    assert_close(f[:2], g[:2], atol=0, rtol=0)            # step 10 comes after the record of 10
    assert (f[2] - g[2]).abs().amax(-1).min() > 1e-3

@CORES
def test_predictions_use_the_past_alone_and_the_probe_asks_before_each_trial(core):
    distribution = tasks.LinearRegression(trials=9)
    x, y = drawn(distribution, 4)
    changed = y.clone()
    changed[:, 5] += 1
    for predictor in (meta.MetaLearner(distribution, 16, 2, seeded(), core=core),
                      tasks.Bayes(distribution)):
        before, after = predictor.predict(x, y), predictor.predict(x, changed)
        assert_close(before[:, :6], after[:, :6], atol=1e-6, rtol=0)
        assert ((before - after)[:, 6:].abs().amax(-1) > 0).all()
        answers = predictor.probe(x, y, x[0])             # at every x, before every trial
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

def test_two_models_from_one_generator_differ_and_no_global_generator_is_touched():
    state, generator = torch.get_rng_state(), seeded()
    first, second = (meta.MetaLearner(LINEAR, 16, 1, generator) for _ in range(2))
    assert (first.core.weight_hh_l0 - second.core.weight_hh_l0).abs().max() > 0.01
    assert first.core.weight_hh_l0.abs().max() <= 16 ** -0.5
    assert 0.9 < first.core.weight_ih_l0.abs().max() * 15 ** 0.5 <= 1        # 15 inputs
    assert_close(torch.get_rng_state(), state)

@pytest.mark.parametrize("changed, same", [
    (dict(test_tasks=80), ["meta/strength", "bayes/strength"]),
    (dict(eval_episodes=20), ["meta/excess", "learner/strength"])])
def test_what_one_part_draws_never_shifts_another(changed, same, runs):
    before, after = metadyn.load(runs["linreg"]), replace(LINREG, **changed).experiment()
    for name in same:
        np.testing.assert_array_equal(after[name], before[name], name)
    seeds = {metadyn.generator_for(replace(LINREG, seed=seed), purpose).initial_seed() % 2 ** 32
             for seed in range(50) for purpose in ("tasks", "probe", "a new one")}
    assert len(seeds) == 150

@pytest.mark.parametrize("family, step", [("linreg", 3), ("nonlinreg", 12), ("bandit", 7)])
def test_a_run_resumed_leaves_the_arrays_of_one_uninterrupted(
        family, step, runs, unsaved, tmp_path, monkeypatch):
    def save_and_stop(path, call, at, *more):
        save(path, call, at, *more)
        if at == step:
            raise KeyboardInterrupt

    save = meta.save
    monkeypatch.setattr(meta, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        metadyn.run(TINY[family], tmp_path)
    monkeypatch.setattr(meta, "save", save)
    metadyn.run(TINY[family], tmp_path)
    np.testing.assert_equal(metadyn.load(tmp_path), metadyn.load(runs[family]))

# ---------------------------------------------------------------- statistics, seeded
def test_moments_of_the_samplers():
    W, V = (distribution.sample(4000, seeded()) for distribution in (LINEAR, WAVES))
    skewed = tasks.LinearRegression(skew=1.0).sample(4000, seeded())
    Q = LINEAR.evaluation_tasks(4000, seeded())
    first, second = learners.init_layers([4000], [5, 64, 5], seeded())
    gain = first[..., 0].square().sum(1) + second[:, 0].square().sum(1)
    (x, y), (u, v) = (d.episodes(w, seeded(1)) for d, w in ((LINEAR, W), (WAVES, V)))
    for samples, expected in (
            (W[:, 0, 1] ** 2, 1 / 5), (x[:, 3, 2] ** 2, 1), (x[:, 0, 0] * x[:, 1, 0], 0),
            ((y - x @ W.mT)[:, 5, 1] ** 2, 0.01), (Q[:, 0, 0] ** 2, 0.242), (v[:, 3] ** 2, 1.01),
            (V[:, 0, 3] ** 2, 1 / 5), ((u.mean((1, 2)) - 0.5) ** 2, 1 / 480),
            (skewed[:, 0, 2] ** 2, 400 / 5269), (gain, learners.expected_gain(5, 64))):
        assert abs(samples.mean() - expected) < 4 * standard_error(samples)
    assert (BANDIT.never_learns(*drawn(BANDIT)) == 1 - 1 / 5).all()
    correct = tasks.ContextualBandit(3, 4).repeats(torch.tensor([[0, 1, 0]]), 50, seeded())[0]
    assert correct[:, 0].unique().tolist() == [0, 1, 2, 3]

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
@pytest.mark.parametrize("plain, index", [(LINEAR, 2.0), (WAVES, 2.3)])
def test_the_skew_alone_moves_the_order_of_bayes_and_turns_it_round(plain, index):
    for skew, direction in (-0.5, -1), (0.0, 0), (0.5, 1):
        distribution = type(plain)(skew=skew)
        W, strength, _ = inner_loop(distribution, tasks.Bayes(distribution))
        if plain is LINEAR:
            strength = by_column(W, strength)
        time = torch.arange(distribution.trials + 1.0)
        found = learners.staggering(strength, time).log().mean().exp().item()
        half = learners.half_time(strength.mean((1, 2)), time)
        assert found == pytest.approx(index if direction else 1, rel=0.1)
        assert (direction * half.diff() > 0).all() or not direction

def test_the_tie_alone_moves_bayes_as_derived_and_only_in_the_tied_contexts():
    strengths = []
    for tied, index in (1, 1.0), (2, 2.034):
        distribution = tasks.ContextualBandit(tied=tied)
        _, strength, _ = inner_loop(distribution, tasks.BayesAgent(distribution))
        J, theory = strength.mean((1, 2)) * 0.8 + 0.2, distribution.bayes_curve()        # (61, 5)
        largest_sd = (theory * (1 - theory)).clamp_min(0).sqrt()      # in [0, 1] with that mean
        assert ((J - theory).abs() <= 4 * largest_sd / 4096 ** 0.5 + 4 / 4096).all()
        half = learners.half_time(distribution.strength(theory), torch.arange(61.0))
        assert (half.max() / half.min()).item() == pytest.approx(index, abs=0.01)
        strengths.append(strength)
    assert_close(strengths[0][..., 2:], strengths[1][..., 2:])        # the same actions were tried

def policy_half_times(pattern, shared, lr=0.5):
    """Half-times (C,) of policy gradient, averaged over 8 blocks of 64 repeats of one pattern."""
    correct = BANDIT.repeats(torch.tensor(pattern).expand(8, -1), 64, seeded())
    logits = 0.1 * torch.randn(*correct.shape, 5, generator=seeded(1))
    J = learners.policy_gradient(correct, logits, lr, range(101), shared)
    return learners.half_time(BANDIT.strength(J).mean(2), torch.arange(101.0)).mean(0)

def test_a_shared_bias_helps_contexts_that_share_and_hardly_hinders_the_others():
    shared = policy_half_times([0, 0, 1, 2, 3], True)
    assert (shared.max() / shared.min()).item() == pytest.approx(2.26, rel=0.03)
    # own biases double the rate: without any bias, a context takes as long as at half the rate
    none = policy_half_times([0, 0, 1, 2, 3], False, lr=0.25)
    assert (shared[:2] < 0.55 * none[:2]).all() and (shared[2:] < 1.12 * none[2:]).all()
    assert_close(none.max(), none.min(), rtol=0.02, atol=0)
    assert_close(policy_half_times([0, 1, 2, 3, 4], True), none, rtol=0.03, atol=0)

REMOVED = dict(linreg="one_layer", nonlinreg="fourier_inputs", bandit="own_biases")

@pytest.mark.parametrize("family", REMOVED)
def test_a_quick_run_shows_the_claim_and_its_ablation(family):
    smaller = dict(linreg=dict(outer_steps=1000, eval_tasks=6),
                   nonlinreg=dict(outer_steps=1000, online_steps=200, converged_episodes=1),
                   bandit=dict(contexts=3, actions=4, trials=20, outer_steps=300, eval_tasks=6))
    results = type(TINY[family]).quick(device="cpu", **smaller[family]).experiment()
    summary = results.summary
    learner, removed, learned = (summary["systems"][system] for system in (
        "learner", REMOVED[family], "meta"))
    assert learner["staggering"] > 1.6 and learner["rank_correlation"] > 0.4
    assert 0.9 < removed["staggering"] < 1.25 and not learner["lower_bound"]
    assert summary["score"] > 0.85 and summary["score_ci"][0] < 1      # nothing beats Bayes
    assert learned["staggering"] < 0.7 * learner["staggering"]
    if family == "linreg":                                # t trials fix t of its two directions
        strength = metadyn.panel(results, "converged")["strength"]
        assert_close(strength[[0, 1, 8]].T, np.float32([[0, 0.5, 1]] * 2), atol=0.1, rtol=0)
    if family == "bandit":                                # rewards of one trial a step are noisy
        assert summary["systems"]["online"]["within"] > 2 * learner["within"]
        theory, strength = results["bayes/theory"], metadyn.panel(results, "bayes")["strength"]
        np.testing.assert_allclose(strength, theory, atol=0.04, rtol=0)

# ---------------------------------------------------------------- negative controls
def test_a_meta_learner_that_sees_no_answers_learns_nothing():
    class Unanswered(meta.MetaLearner):
        def predict(self, x, y):
            return super().predict(x, 0 * y)

    distribution = tasks.LinearRegression([1.0, 1.0], trials=8)
    model, (x, y) = Unanswered(distribution, 32, 1, seeded(1)), drawn(distribution, 2000)
    meta.train(model, distribution, 200, 64, seeded())
    never = distribution.never_learns(x, y).mean()
    assert never - distribution.excess(model, x, y).mean() < 0.02 * never

@pytest.mark.parametrize("broken", [lambda w: w.sum() * math.nan, lambda w: (0 * w).sqrt().sum()])
def test_a_loss_or_gradient_that_is_not_finite_names_the_outer_step(broken):
    model = torch.nn.Linear(1, 1, bias=False)
    model.loss = lambda *call: broken(model.weight) if call[-1] == 7 / 20 else model.weight.sum()
    with pytest.raises(FloatingPointError, match="outer step 7"):
        meta.train(model, LINEAR, 20, 1, seeded(), [torch.optim.Adam(model.parameters())])

# ---------------------------------------------------------------- the README
@pytest.mark.parametrize("code, about, promised", CODE, ids=range(10))
def test_code_of_the_readme_runs_and_prints_what_its_answer_promises(
        code, about, promised, capsys, unsaved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "example"})
    printed = re.findall(r"\d+\.\d+", capsys.readouterr().out)
    if "metadyn" not in code:                             # an exercise
        assert float(printed[-1]) == pytest.approx(float(promised), rel=0.2 if about else 0.02)
    if "Run)" in code:                                    # a family, its distribution apart
        assert len(code.split("# the experiment")[1].splitlines()) <= 41

CLAIMS = ["learner/staggering", "meta/staggering", "bayes/staggering", "meta/within",
          "{}/staggering", "online/staggering", "converged/staggering", "score", "last_excess"]
TOLD = """takes <linreg learner/staggering> times as long
The Learner's index is <linreg learner/staggering> and its rank correlation
The Meta-Learner's index is <linreg meta/staggering> and Bayes' is <linreg bayes/staggering>
is <linreg learner/within> for the Learner, and at least <linreg meta/within> for the Meta-Learner
its index is <nonlinreg learner/staggering>. The cause
the index is <nonlinreg fourier_inputs/staggering>. Conversely
The Meta-Learner's index is <nonlinreg meta/staggering> and Bayes' is <nonlinreg bayes/staggering>
the index is <bandit learner/staggering>
Bayes from <bandit bayes/staggering> to <bandit-tied2 bayes/staggering>
Meta-Learner from <bandit meta/staggering> to <bandit-tied2 meta/staggering>"""

def test_the_numbers_of_the_readme_are_those_of_the_runs():
    told = {}
    for row in csv.DictReader((HERE / "figures/overview.csv").read_text("utf-8").splitlines()):
        form = "{:.3f}".format if row["number"] == "score" else metadyn.format_number
        mean, sd = (form(float(row[column])) for column in ("mean", "sd"))
        name = f"{row['run']} {row['number'].removeprefix('systems/')}"
        told |= {name: mean, f"{name} ±": f"{mean} ± {sd}"}
    told["bandit last_excess ±"] = "both near 0"

    def fill(words):
        return re.sub("<(.+?)>", lambda found: told[found[1]], words)

    def cell(family, claim):
        name = f"{family} {claim}".format(REMOVED[family])
        bound = name.replace("staggering", "lower_bound").replace("within", "within_lower_bound")
        unsure = bound != name and told.get(bound, "0.00") != "0.00"
        return "at least " * unsure + told.get(f"{name} ±", "–")

    claims = [[cell(family, claim) for family in REMOVED] for claim in CLAIMS]
    orders = [[fill(f"<{run} {system}/by_column/staggering> (<{run} {system}/staggering>)")
               for run in ("linreg-skew-0.5", "linreg", "linreg-skew0.5")]
              for system in ("learner", "bayes", "meta", "one_step")]
    for cells, rows in (r".*±.*±.*\|.*", claims), (r"[\d.]+ \([\d.]+\) \|.*", orders):
        found = re.findall(rf"^\|.*?\| ({cells}) \|$", README, re.MULTILINE)
        assert [row.split(" | ")[-3:] for row in found] == rows
    for line in TOLD.splitlines():                        # the headlines, word by word
        assert fill(line) in " ".join(README.split()), fill(line)

# ---------------------------------------------------------------- plumbing
SMALL = dict(hidden=8, layers=1, batch=8, outer_steps=12, eval_tasks=3, eval_episodes=8, trials=4,
             test_tasks=64, device="cpu", learner_steps=41, learner_repeats=2)
TINY = dict(
    linreg=metadyn.LinReg(**SMALL, singular_values=[1.1, 0.4], learner_lr=0.15),
    nonlinreg=metadyn.NonlinReg(**SMALL, n_frequencies=2, online_steps=20, converged_episodes=2),
    bandit=metadyn.Bandit(**SMALL, contexts=3, actions=3))
LINREG = TINY["linreg"]                                   # its second mode is never half learned

@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Folders of tiny runs by family, one made by a command on a console of ASCII alone."""
    folder = tmp_path_factory.mktemp("tiny")
    words = ["bandit", "--out", folder / "bandit"]
    for name, value in vars(TINY["bandit"]).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run([sys.executable, HERE / "metadyn.py", *words], capture_output=True,
                          check=True, env=os.environ | dict(PYTHONIOENCODING="ascii"))
    assert b"Warning" in done.stdout and b"outer loop" in done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots.Figure, "savefig", lambda figure, where: None)
        for family in "linreg", "nonlinreg":
            metadyn.run(TINY[family], folder / family)
    return {family: folder / family for family in TINY}

@pytest.fixture
def unsaved(monkeypatch):                                 # figures are drawn, but saving is slow
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, where: None)

def test_a_figure_shows_itself_takes_lists_clips_nothing_and_explains_what_is_drawn():
    panel = dict(title="A", time=[0, 1, 2], labels="ab",
                 strength=[[0.0, 0.1], [0.4, 0.2], [2.5, -0.6]])
    more = dict(half_times=[1.0, 1.0], stderr=[[0.1] * 2] * 3, theory=[[0.5]] * 3,
                theory_half_times=[1.0, 9.0])
    figure = plots.dynamics([panel, panel | more], "seed")
    assert figure._repr_png_().startswith(b"\x89PNG")
    low, high = figure.axes[0].get_ylim()
    assert low < -0.6 and high > 2.5
    assert figure.get_supxlabel() == (
        "seed · dots: half-times, one below the other · dashes: theory · crosses: theory · "
        "bands: 2 standard errors")
    points = {tuple(line.get_xydata()[0]) for line in figure.axes[1].lines
              if len(line.get_xydata()) == 1}             # two dots, and a cross on one of them
    assert len(points) == 2                               # equal half-times are seen to be two

def test_a_complete_run_leaves_its_files_and_is_drawn_again_from_its_arrays(
        runs, unsaved, monkeypatch):
    assert (runs["bandit"] / "dynamics.png").read_bytes().startswith(b"\x89PNG")
    for folder in runs.values():
        told = json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)
        assert told["score"] == metadyn.load(folder).summary["score"]
        assert metadyn.load(folder)["learner/time"][-1] == 41         # the last step is recorded
    monkeypatch.setattr(learners, "linear_network", None)
    results = metadyn.run(replace(LINREG, device="auto"), runs["linreg"])
    panel = metadyn.panel(results, "learner")
    curve = metadyn.figures(results)["dynamics"].axes[0].lines[0]     # what is measured is drawn
    np.testing.assert_array_equal(curve.get_xydata().T, [panel["time"], panel["strength"][:, 0]])
    with pytest.raises(ValueError, match="'Bayes' is not one of .*bayes"):
        metadyn.panel(results, "Bayes")

@pytest.mark.parametrize("words, message", [
    ("linreg --trial 5", "unrecognized arguments: --trial 5"), ("compare no", "no holds no run"),
    ("linreg --trials 2.5", "invalid int value"), ("nonlinreg --trials 1", "trials cannot be 1"),
    ("linreg --noise -1", "noise cannot be -1.0; allowed is float from 0 to 2147483647"),
    ("linreg --noise nan", "noise cannot be nan"), ("bandit --tied 3", "tied cannot be 3"),
    ("linreg --singular-values 1 0", "singular_values cannot be [1.0, 0.0]"),
    ("bandit --actions 3", "5 contexts, 3 act"), ("bandit --device tpu", "no tpu on this machine"),
    ("linreg --out /dev", "/dev holds no run"), ("linreg --out /dev/null/run", "Not a directory")])
def test_a_mistake_in_a_command_is_one_sentence(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="1" if "--out" in words else "2"):
        metadyn.main(words.split())
    out, err = capsys.readouterr()
    assert out == "" and message in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("name, value", [("noise", [1]), ("trials", 2.5), ("singular_values", [])])
def test_the_same_mistakes_from_python_are_a_value_error(name, value):
    with pytest.raises(ValueError, match="cannot be"):
        metadyn.LinReg(**{name: value})

def test_a_folder_is_named_after_what_differs():
    names = [config.name() for config in (
        metadyn.Bandit(), metadyn.LinReg.quick(noise=np.float64(0.2), seed=np.int64(1)),
        metadyn.LinReg(singular_values=[1, 2], device="cpu"))]
    assert names == ["bandit", "linreg-quick-noise0.2-seed1", "linreg-singular_values1.0_2.0"]

def test_ctrl_c_while_libraries_are_imported_is_no_traceback(tmp_path):
    (tmp_path / "numpy.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    done = subprocess.run([sys.executable, HERE / "metadyn.py"], capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == -2 and not done.stderr      # killed by SIGINT

def test_a_quick_run_takes_one_thread(monkeypatch):
    monkeypatch.setattr(metadyn, "run", lambda *arguments: None)
    for words, threads in (["linreg"], 2), (["linreg", "--quick"], 1):
        torch.set_num_threads(2)
        metadyn.main(words)
        assert torch.get_num_threads() == threads

@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("files", [["results.npz", "checkpoint.pt"], ["config.json"], ["a.txt"]])
def test_what_a_user_made_is_never_touched(files, fresh, tmp_path):
    for name in files:
        (tmp_path / name).write_text("[1]")
    with pytest.raises(ValueError, match="needs an empty or new folder"):
        metadyn.run(LINREG, tmp_path, fresh)
    there = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert there == dict.fromkeys(files, "[1]")

def test_a_folder_belongs_to_its_settings_and_numpy_numbers_are_numbers(runs, unsaved, tmp_path):
    folder = shutil.copytree(runs["linreg"], tmp_path / "run")
    (folder / "notes.txt").write_text("mine")
    other = replace(LINREG, hidden=np.int64(9))
    with pytest.raises(ValueError, match="hidden changed since.*--fresh"):
        metadyn.run(other, folder)
    (folder / "gain.png").write_text("of the other run")
    again = metadyn.run(other, folder, fresh=True)
    assert (again["meta/excess"] != metadyn.load(runs["linreg"])["meta/excess"]).any()
    assert (folder / "notes.txt").exists() and not (folder / "gain.png").exists()

def test_a_run_belongs_to_the_code_that_made_it(runs, unsaved, tmp_path, monkeypatch, capsys):
    folder, copy = shutil.copytree(runs["linreg"], tmp_path / "run"), tmp_path / "learners.py"
    text = Path(learners.__file__).read_text("utf-8")
    monkeypatch.setattr(learners, "__file__", str(copy))
    for code, warnings in ("# more\n" + text.replace("Learners", "L"), 0), (text + "a = 1", 1):
        copy.write_text(code, "utf-8")
        metadyn.run(LINREG, folder)                       # complete: drawn again
        assert capsys.readouterr().err.count("learners.py changed since") == warnings
    (folder / "results.npz").unlink()
    with pytest.raises(ValueError, match="learners.py changed since.*--fresh"):
        metadyn.run(LINREG, folder)

@pytest.mark.parametrize("file", ["results.npz", "checkpoint.pt"])
def test_a_damaged_file_is_one_sentence(file, runs, tmp_path):
    shutil.copy(runs["linreg"] / "config.json", tmp_path)
    (tmp_path / file).write_bytes((runs["linreg"] / file).read_bytes()[:700])
    with pytest.raises(ValueError, match="damaged"):
        metadyn.run(LINREG, tmp_path)

@pytest.mark.parametrize("changed", [
    dict(outer_steps=13), dict(batch=9), dict(adam_lr=0.1), dict(hidden=9), dict(skew=0.5)])
def test_a_checkpoint_belongs_to_its_call_and_its_task_distribution(changed, runs):
    with pytest.raises(ValueError, match="belongs to another call"):
        replace(LINREG, **changed).experiment(runs["linreg"] / "checkpoint.pt")

def test_runs_are_compared_over_seeds_and_bounds_stay_bounds(
        runs, unsaved, tmp_path, monkeypatch):
    metadyn.run(replace(LINREG, seed=1), tmp_path / "1")
    folders, out = [runs["linreg"], tmp_path / "1", runs["bandit"]], tmp_path / "both"
    assert re.search(r"learner/staggering +>\d", metadyn.compare(folders, out))
    scores = [metadyn.load(folder).summary["score"] for folder in folders[:2]]
    row = "score,{},{},0 1,{} {}".format(np.mean(scores), np.std(scores, ddof=1), *scores)
    assert f",{row}\n" in (out / "overview.csv").read_text("utf-8")
    for other in tmp_path / "overview.csv", tmp_path / "1" / "dials.png":
        other.write_text("mine")
        with pytest.raises(ValueError, match="not of metadyn"):
            metadyn.compare(folders, other.parent)
    with pytest.raises(SystemExit, match="2"):            # its folder is a file
        metadyn.main(["compare", str(folders[0]), "--out", str(other)])
    monkeypatch.setattr(metadyn.Bandit, "experiment", metadyn.linreg)
    with pytest.raises(ValueError, match="unknown family"):
        metadyn.load(runs["bandit"])
    assert metadyn.families()["linreg"] is metadyn.Bandit # the later one of the same name

@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("family, settings", [
    ("linreg", dict(singular_values=2.0, trials=2, noise=0.0)),
    ("linreg", dict(singular_values=[1.0] * 6, skew=-1.0, learner_repeats=1)),
    ("nonlinreg", dict(n_frequencies=3, trials=2, skew=0.5, noise=0.0, converged_episodes=99,
                       batch=1, outer_steps=1, learner_steps=1, online_steps=1)),
    ("bandit", dict(actions=2, tied=2, muon_lr=0.05, learner_steps=1, outer_steps=1))])
def test_other_settings_are_carried_out_without_a_warning(family, settings, unsaved, tmp_path):
    results = metadyn.run(replace(TINY[family], **settings), tmp_path)
    for system in "learner", "meta", "bayes":
        assert np.isfinite(results[f"{system}/strength"]).all()

@pytest.mark.parametrize("module", ["tasks", "learners", "plots", "meta"])
def test_a_module_imports_none_of_the_others_and_its_example_runs(module):
    _, head, body = (HERE / f"{module}.py").read_text("utf-8").split('"""', 2)
    assert not re.search(r"(?m)^ *(import|from) (\w+, )*(tasks|learners|meta(dyn)?|plots)\b", body)
    example = next(part for part in head.split("\n\n") if part.startswith("    "))
    exec(f"from {module} import *\nif True:\n{example}", {})
