"""What metadyn promises: analytic truth, metamorphic relations, seeded statistics (bounds are four
standard errors), negative controls, and plumbing last: python -m pytest"""
import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
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
S = torch.tensor([1.6, 1.2, 0.9, 0.6, 0.3], dtype=torch.float64)
PRIORS = [tasks.LinearRegression(), tasks.FourierRegression()]
CORES = pytest.mark.parametrize("core", ["lstm", "attention"])

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)

def drawn(prior, n=64, seed=0):
    """An episode of each of n tasks of a prior."""
    generator = seeded(seed)
    return prior.episodes(prior.sample(n, generator), generator)

def small_meta(prior, hidden=16, layers=2, **more):
    return meta.MetaLearner(prior, hidden, layers, seeded(1), **more)

def standard_error(samples):
    return samples.std(0) / len(samples) ** 0.5

# ---------------------------------------------------------------- analytic truth: Learners

def deep_linear_error(lr, tau=1.0):
    """How far the modes of a deep linear network are from the closed form, at most."""
    U, V = tasks.random_orthogonal(2, 5, seeded()).double()
    target = (U * S @ V.mT)[None]
    steps, maps = learners.linear_network(target, lr, round(20 / lr), "aligned", 1e-3)
    strength = tasks.mode_strength(maps, *tasks.singular_modes(target))
    theory = learners.deep_linear_theory(S, 1e-3, steps * lr / tau) / S
    return (strength[:, 0] - theory).abs().max().item()

def test_deep_linear_modes_follow_the_logistic_solution_with_an_error_of_first_order():
    coarse, medium, fine = (deep_linear_error(lr) for lr in (0.02, 0.01, 0.005))
    assert medium < 0.02
    assert 1.9 < coarse / medium < 2.1 and 1.9 < medium / fine < 2.1
    t = learners.deep_linear_time(S, 1e-3, S / 2)         # and its inverse
    assert_close(learners.deep_linear_theory(S, 1e-3, t).diagonal(), S / 2)

def test_one_layer_follows_its_closed_form_on_one_clock():
    steps, maps = learners.linear_network(torch.diag(S)[None], 0.001, 5000, "shallow", 0.2,
                                          generator=seeded())
    w = maps[:, 0].diagonal(dim1=-2, dim2=-1)
    assert_close(w, learners.shallow_theory(S, w[0], steps * 0.001), atol=1e-3, rtol=0)

def test_muon_moves_each_layer_at_one_speed_and_so_learns_the_weakest_mode_first():
    steps, maps = learners.linear_network(torch.diag(S)[None], 0.01, 200, "aligned", 1e-6, "muon")
    u = maps[:, 0].diagonal(dim1=-2, dim2=-1)
    theory = learners.muon_theory(S, 1e-6, steps * 0.01)
    rising = theory < 0.9 * S                             # momentum overshoots afterwards
    assert_close((u / S)[rising], (theory / S)[rising], atol=0.02, rtol=0)
    assert_close(learners.half_time(u / S, steps), (S / 2).sqrt() / 0.01, rtol=0.03, atol=0)

def test_muon_with_convergent_coefficients_gives_the_orthogonal_factor_of_each_matrix():
    G = torch.randn(3, 4, 6, generator=seeded(), dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    muon = learners.Muon([torch.zeros(1)], 1, coefficients=(1.5, -0.5, 0.0), iterations=40)
    assert_close(muon.orthogonal(G), U @ Vh)
    assert_close(muon.orthogonal(G.mT), (U @ Vh).mT)

@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")
def test_muon_moves_the_four_gates_of_an_lstm_as_torch_moves_four_matrices():
    start = torch.randn(32, 5, generator=seeded())
    gates = start.clone()
    alone = [torch.nn.Parameter(gate.clone()) for gate in start.chunk(4)]
    ours = learners.Muon([gates], 0.1, stacked=4)
    theirs = torch.optim.Muon(alone, 0.1, weight_decay=0.0, momentum=0.95)
    for step in range(3):
        gates.grad = torch.randn(32, 5, generator=seeded(step))
        for gate, gradient in zip(alone, gates.grad.chunk(4)):
            gate.grad = gradient
        ours.step()
        theirs.step()
    moved = torch.cat(alone).detach() - start
    assert (gates - start - moved).norm() < 0.05 * moved.norm()       # theirs is in bfloat16

def test_white_inputs_are_the_identity_and_few_inputs_are_fitted_by_the_map_of_least_norm():
    X, small = torch.eye(5, dtype=torch.float64)[None], dict(start="random", scale=1e-8)
    _, white = learners.linear_network(S * X, 0.05, 300, generator=seeded(), **small)
    _, given = learners.linear_network(S * X, 0.05, 300, generator=seeded(), inputs=X, **small)
    assert_close(white, given)
    X = torch.randn(1, 5, 3, generator=seeded(), dtype=torch.float64)
    Y = torch.diag(S) @ X
    _, maps = learners.linear_network(Y, 0.04, 3000, generator=seeded(), inputs=X, **small)
    assert_close(maps[-1], Y @ torch.linalg.pinv(X), atol=1e-3, rtol=0)

def test_a_learner_on_t_trials_ends_where_least_squares_on_these_trials_does():
    prior, trials = tasks.LinearRegression(3, trials=9), torch.tensor([0, 2, 9])
    x, y = drawn(prior, 6)
    x, y = x[:, None].double(), y[:, None].double()       # (N, E, T, D)
    _, maps = learners.linear_network_by_trial(x, y, trials, 4000, 1e-6, seeded())
    for found, t in zip(maps[-1], trials):
        expected = (torch.linalg.pinv(x[:, :, :t]) @ y[:, :, :t]).mT
        assert_close(found, expected, atol=0.02, rtol=0)

def test_two_contexts_and_two_actions_interfere_as_derived_with_a_cosine_of_minus_one_half():
    logits = torch.randn(50, 2, 2, generator=seeded(), dtype=torch.float64)
    correct, dt = torch.tensor([[0, 1]]).expand(50, 2), 1e-6
    J = learners.policy_gradient(correct, logits, 2 * dt, [0, 1])
    g = J[0] * (1 - J[0])
    assert_close((J[1] - J[0]) / dt, 2 * g * (2 * g - g.flip(1)), atol=1e-5, rtol=0)
    gradients = []
    for only in torch.eye(2, dtype=torch.float64):        # of one context's J, in W and in b
        in_logits = learners.reward_gradient(logits, correct, only)
        gradients.append(torch.cat([in_logits.flatten(1), in_logits.sum(1)], 1))
    assert_close(torch.cosine_similarity(*gradients), torch.full((50,), -0.5).double())

# ---------------------------------------------------------------- analytic truth: Bayes and meta

@pytest.mark.parametrize("prior", [*PRIORS, tasks.FourierRegression([7, 9], 0.25, 17)])
def test_the_sequential_posterior_is_the_batch_posterior(prior):
    x, y = drawn(prior)
    means, covariances = tasks.Bayes(prior).posterior(x, y)
    assert means.shape == (64, prior.trials + 1, prior.outputs, prior.n_features)
    phi, identity = prior.features(x.double()), torch.eye(prior.n_features).double()
    P = torch.linalg.inv(phi.mT @ phi / prior.noise ** 2 + identity / prior.weight_var)
    M = y.double().mT @ phi @ P / prior.noise ** 2
    assert_close((means[:, -1], covariances[:, -1]), (M, P), atol=1e-10, rtol=0)

def test_the_posterior_of_a_band_limited_function_is_that_of_a_gaussian_process():
    prior = tasks.FourierRegression([2, 3, 5])
    x, y, xq = (z.double() for z in (*drawn(prior, 3), prior.queries()))

    def kernel(a, b):                                     # k(x, x') = 1/K sum_k cos 2 pi k (x - x')
        return (2 * math.pi * (a - b.mT)[..., None] * prior.frequencies).cos().mean(-1)

    noisy = kernel(x, x) + 0.01 * torch.eye(40, dtype=torch.float64)
    expected = kernel(xq.expand(3, -1, -1), x) @ torch.linalg.solve(noisy, y)
    assert_close(tasks.Bayes(prior).query(x, y, xq)[:, -1], expected, atol=1e-10, rtol=0)

def test_bayes_without_noise_knows_the_task_after_dim_trials():
    prior = tasks.LinearRegression(noise=0.0)
    x, y = drawn(prior)
    error = (tasks.Bayes(prior).predict(x, y) - y).abs()
    assert error[:, 8:].max() < 1e-3 < error[:, :5].mean()

@pytest.mark.parametrize("prior", [
    tasks.ContextualBandit(), tasks.ContextualBandit(2, 3, 20, [3.0, 1.0])])
def test_the_learning_curve_of_bayes_by_formula_and_by_simulation(prior):
    _, J = prior.play(tasks.BayesAgent(), *drawn(prior, 4000))
    curve = prior.bayes_curve()
    assert J.shape[1:] == curve.shape == (prior.trials + 1, prior.contexts)
    largest_sd = (curve * (1 - curve)).clamp_min(0).sqrt()            # in [0, 1] with that mean
    assert ((J.mean(0) - curve).abs() <= 4 * largest_sd / 4000 ** 0.5 + 4 / 4000).all()

def test_repeated_modes_have_one_strength_together_whatever_their_basis():
    U, V, s = tasks.singular_modes(torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.5])))
    R = tasks.random_orthogonal(1, 3, seeded())[0].double()
    turn = torch.block_diag(R, torch.ones(1, 1).double())
    f = torch.randn(4, 4, generator=seeded(), dtype=torch.float64)
    one = tasks.mode_strength(f, U, V, s)
    other = tasks.mode_strength(f, U @ turn, V @ turn, s)
    assert (one - other)[:3].abs().max() > 0.1
    assert_close(one[:3].sum(), other[:3].sum())

def test_the_linear_probe_finds_a_map_and_says_what_is_not_linear():
    W, xq = PRIORS[0].sample(3, seeded()), PRIORS[0].queries(seeded())
    found, residual, _ = tasks.linear_probe(xq @ W.mT, xq)
    assert_close(found, W, atol=1e-5, rtol=1e-5)
    assert residual.max() < 1e-6
    _, residual, total = tasks.linear_probe(torch.ones(3, len(xq), 5), xq)
    assert_close(residual, total)

def test_parseval_and_the_strength_of_a_function_in_itself_and_in_a_shifted_copy():
    prior = tasks.FourierRegression([1, 4, 6], grid=32)
    W, x = prior.sample(5, seeded()).double(), prior.queries().double()
    f, shifted = ((prior.features(z) @ W.mT)[..., 0] for z in (x, x - 0.1))
    assert_close(f.square().mean(-1), W.square().sum((-2, -1)) / 2)
    strength, outside = tasks.fourier_strength(f, f, prior.frequencies)
    assert_close(strength, torch.ones(5, 3, dtype=torch.float64))
    assert outside.max() < 1e-12
    strength, _ = tasks.fourier_strength(shifted, f, prior.frequencies)
    assert_close(strength, (0.2 * math.pi * prior.frequencies.double()).cos().expand(5, 3),
                 atol=1e-4, rtol=0)

@CORES
def test_the_gradient_of_the_outer_loop_is_that_of_finite_differences(core):
    prior = tasks.LinearRegression(2, trials=3)
    x, y = (z.double() for z in drawn(prior, 2))
    model = small_meta(prior, 4, core=core).double()
    assert torch.autograd.gradcheck(model.predict, (x, y.requires_grad_()))

@CORES
@pytest.mark.parametrize("name", ["muon", "adam"])
def test_every_parameter_is_in_exactly_one_optimizer(core, name):
    model = small_meta(PRIORS[0], core=core, encoder=2)
    optimizers = meta.make_optimizers(model, name, 0.1, 0.1)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())

def test_the_outer_loop_warms_up_over_two_percent_and_ends_at_zero(tmp_path):
    factors = [meta.learning_rate_factor(step, 100) for step in range(101)]
    assert factors[:3] + factors[98:] == pytest.approx([1 / 3, 2 / 3, 0.98, 0.02, 0.01, 0])
    model, applied = torch.nn.Linear(1, 1), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer.register_step_pre_hook(lambda opt, *_: applied.append(opt.param_groups[0]["lr"]))
    meta.outer_loop(model, lambda *_: [model.weight.sum()] * 2, 100, [optimizer], seeded(),
                    tmp_path / "checkpoint.pt", {})
    assert applied == pytest.approx([0.5 * factor for factor in factors[:100]])

# ---------------------------------------------------------------- the measures, on planted systems

TIME = torch.arange(0.0, 201)

def planted(half_times):
    """Strengths (201, N, E, K) that rise in a straight line, from 0 to 1 in twice the half-time."""
    return (TIME[:, None, None, None] / (2 * torch.as_tensor(half_times))).clamp(0, 1)

def shuffled(half_times):
    """These half-times (K,) in an order by chance, in 500 repeats of 4 tasks: (4, 500, K)."""
    orders = torch.rand(4, 500, len(half_times), generator=seeded()).argsort(-1)
    return torch.tensor(half_times)[orders]

LATE = torch.cat([shuffled([20.0, 22.0, 24.0]), torch.full((4, 500, 1), 88.0)], -1)

@pytest.mark.parametrize("half_times, index, within, order", [
    pytest.param([[[20.0, 40.0, 80.0]] * 6], 4, 4, 1, id="one order, in every repeat"),
    pytest.param(shuffled([20.0, 40.0, 80.0]), 1, 4, 0, id="an order by chance"),
    # mean ranks 1, 1, 1, 3, less 3/2 and squared: 3/4 + 9/4, of 5
    pytest.param(LATE, 4, 4.4, 3 / 5, id="one mode late, the others by chance"),
    pytest.param([[[30.0, 30.0, 30.0]] * 5], 1, 1, math.nan, id="all at once"),
    # ranks less their mean: -1/2, -1/2, 1 and -1, 0, 1: 2 * 3/2 / (3/2 + 2)
    pytest.param([[[10.0, 10.0, 20.0], [10.0, 20.0, 30.0]]], 2.4, 6 ** 0.5, 6 / 7, id="a tie"),
    pytest.param([[[10.0, 20.0, 900.0], [10.0, 20.0, 40.0]]], 7.66, 80 ** 0.5, 1,
                 id="a mode that one repeat never reaches, which ranks last")])
def test_the_measures_say_what_is_true_of_a_planted_system(half_times, index, within, order):
    strength = planted(half_times)
    for measure, value, atol in ((learners.staggering, index, 0.15),
                                 (learners.within, within, 1e-3), (learners.order, order, 0.02)):
        found = measure(strength, TIME)
        expected = torch.full(strength.shape[1:2], value, dtype=found.dtype)
        assert_close(found, expected, atol=atol, rtol=0, equal_nan=True)

def test_order_is_the_mean_of_spearmans_coefficients_over_all_pairs_of_repeats():
    half = 5 + 90 * torch.rand(1, 6, 5, generator=seeded())
    half[..., 0] = 1.0                                    # some order, not only chance
    ranks = half[0].argsort(-1).argsort(-1).numpy()
    pairs = np.corrcoef(ranks)[np.triu_indices(6, 1)]     # each repeat with each other
    assert learners.order(planted(half), TIME).item() == pytest.approx(pairs.mean())

def test_half_times_index_and_geometric_mean_tell_undefined_from_infinite():
    time, nan, inf = torch.tensor([0.0, 10.0, 20.0]), math.nan, math.inf
    strength = torch.tensor([[0.0, 0.6, 0.0, 0.0], [0.25, 0.7, 0.1, 1.0], [0.75, 0.8, 0.2, 0.0]])
    half = torch.tensor([[2, 3, 8], [2, inf, 3], [nan, 2, 3], [nan, nan, nan], [nan, inf, inf]])
    for found, expected in (
            (learners.half_time(strength, time), [15, nan, inf, 5]),
            (learners.half_time(strength, time, level=0.1), [4, nan, 10, 1]),
            (learners.staggering_index(half), [4, inf, 1.5, nan, inf]),
            (learners.geometric_mean(half[:2]), [2, inf, 24 ** 0.5]),
            (learners.geometric_mean(half[2:4]), [nan, 2, 3])):
        assert_close(found, torch.tensor(expected, dtype=torch.float32), equal_nan=True)

def test_follows_is_one_for_what_follows_minus_one_for_the_reverse_and_none_by_chance():
    half, other = (10 * 8 ** torch.rand(4, 500, 2, generator=seeded(seed)) for seed in (0, 1))
    for system, expected, atol in (1.5 * half, 1, 1e-3), (800 / half, -1, 1e-3), (other, 0, 0.09):
        found = learners.follows(planted(half), planted(system), TIME)
        assert_close(found, torch.full((2,), float(expected)), atol=atol, rtol=0)

def test_intervals_have_the_quantiles_of_students_t_and_hold_the_mean_19_times_in_20():
    for n, quantile in {2: 12.7062, 3: 4.3027, 10: 2.2622, 16: 2.1314}.items():
        values = torch.arange(n, dtype=torch.float64)
        mean, low, high = learners.t_interval(torch.cat([values, torch.tensor([math.nan])]))
        assert mean == (n - 1) / 2 == pytest.approx((low + high) / 2)
        assert (high - mean) / standard_error(values) == pytest.approx(quantile, rel=1e-3)
    intervals = map(learners.t_interval, torch.randn(2000, 4, generator=seeded()))
    held = torch.tensor([low < 0 < high for _, low, high in intervals]).double()
    assert abs(held.mean() - 0.95) < 4 * standard_error(held)

def test_the_captured_fraction_and_its_interval():
    gain, noise = 0.8 + torch.tensor([[0.3], [0.1]]) * torch.randn(2, 500, generator=seeded())
    prior, bayes = 1 + gain, torch.ones(500)
    between = prior - 0.75 * gain + (noise - 0.8)         # noise alone makes kappa uncertain
    assert learners.captured_fraction(prior, bayes, bayes)[0] == 1
    kappa, low, high = learners.captured_fraction(prior, between, bayes)
    assert low < 0.75 < high
    assert high - low == pytest.approx(2 * 1.96 * 0.1 / 0.8 / 500 ** 0.5, rel=0.1)
    assert learners.captured_fraction(-prior, -between, -bayes)[0] == pytest.approx(kappa)

def test_a_description_says_which_modes_are_not_reached_and_leaves_out_those_known_at_first():
    seen = learners.describe(planted([[[20.0, 40.0, 900.0]] * 3] * 2), TIME)
    assert seen["half_times"] == pytest.approx([20, 40, math.inf])
    assert seen["staggering"] == math.inf and np.isnan(seen["staggering_ci"]).all()
    assert seen["within"] == pytest.approx(200 / 20)      # as if reached at the last time
    assert seen["order_ci"] == pytest.approx([1, 1]) and seen["not_reached"] == pytest.approx(1 / 3)
    strength = planted([[[1.0, 20.0, 80.0]], [[1.0, 20.0, 40.0]]])    # one repeat: no order
    strength[..., 0] = 0.7
    seen = learners.describe(strength, TIME)
    assert seen["half_times"] == pytest.approx([math.nan, 20, 3200 ** 0.5], nan_ok=True)
    assert seen["staggering"] == pytest.approx(8 ** 0.5) and math.isnan(seen["order"])
    ratio = seen["staggering_ci"][1] / seen["staggering_ci"][0]       # standard error: log 2 / 2
    assert math.log(ratio) == pytest.approx(12.7062 * math.log(2), rel=1e-3)

# ---------------------------------------------------------------- metamorphic

def test_rotating_inputs_rotates_the_weights_and_keeps_the_predictions():
    x, y = drawn(PRIORS[0])
    R, bayes = tasks.random_orthogonal(1, 5, seeded(3))[0], tasks.Bayes(PRIORS[0])
    M, turned = (bayes.posterior(z, y)[0][:, -1] for z in (x, x @ R.mT))
    assert_close(turned, M @ R.double().mT, atol=1e-5, rtol=1e-5)
    assert_close(bayes.predict(x @ R.mT, y), bayes.predict(x, y), atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize("optimizer", learners.OPTIMIZERS)
def test_a_linear_learner_does_not_know_of_its_ensemble(optimizer):
    target = PRIORS[0].sample(3, seeded())
    _, together = learners.linear_network(target, 0.01, 20, "aligned", 0.1, optimizer)
    _, alone = learners.linear_network(target[1:2], 0.01, 20, "aligned", 0.1, optimizer)
    assert_close(together[:, 1:2], alone, atol=1e-5, rtol=1e-5)

def test_a_relu_network_does_not_know_of_its_ensemble_nor_of_trials_to_come():
    x, y = torch.rand(2, 3, 20, 1, generator=seeded())
    changed = y.clone()
    changed[:, 10:] += 1                                  # trials to come
    changed[2] *= -1                                      # and one member's whole target
    trials, at = torch.tensor([0, 10, 20]), torch.arange(8.0) / 8
    f, g = (learners.relu_network_by_trial(x, z, trials, at, 1e-2, 30, 8, 2, seeded(1))
            for z in (y, changed))                                              # (3, 3, 8)
    assert_close(f[:2, :2], g[:2, :2], atol=0, rtol=0)
    assert (f[1, 2] - g[1, 2]).abs().max() > 0.1
    assert (f[2, :2] - g[2, :2]).abs().max() > 0.1

@CORES
def test_predictions_use_the_past_alone_and_are_what_was_in_mind_before(core):
    prior = tasks.LinearRegression(trials=9)
    x, y = drawn(prior, 4)
    changed = y.clone()
    changed[:, 5] += 1
    for predictor in small_meta(prior, core=core), tasks.Bayes(prior):
        before, after = predictor.predict(x, y), predictor.predict(x, changed)
        assert_close(before[:, :6], after[:, :6], atol=1e-6, rtol=0)
        assert ((before - after)[:, 6:].abs().amax(-1) > 0).all()
        in_mind = predictor.query(x, y, x[0])             # of every x, before every trial
        assert in_mind.shape == (4, 10, 9, 5)
        assert_close(in_mind[0, range(9), range(9)], before[0], atol=1e-5, rtol=1e-4)

@CORES
def test_agents_use_the_past_alone_and_a_rollout_is_what_is_played(core):
    prior = tasks.ContextualBandit(3, 4, 25)
    correct, contexts, luck = drawn(prior, 32)
    changed = contexts.clone()
    changed[:, 9:] = changed[:, 9:].flip(1)
    for agent in tasks.BayesAgent(), meta.MetaAgent(prior, 16, 1, seeded(), core=core):
        reward, J = prior.play(agent, correct, contexts, luck)
        _, K = prior.play(agent, correct, changed, luck)
        assert_close(J[:, :10], K[:, :10], atol=1e-6, rtol=0)
        assert (J[:, 10:] - K[:, 10:]).abs().max() > 0
    assert_close(agent.roll_out(correct, contexts, luck)[2], reward)

def test_permuting_actions_permutes_the_policy_and_keeps_which_contexts_share_an_answer():
    prior, permutation = tasks.ContextualBandit(3, 4), torch.tensor([2, 0, 3, 1])
    correct, logits = prior.sample(20, seeded()), torch.randn(20, 3, 4, generator=seeded())
    J = learners.policy_gradient(correct, logits, 0.5, [0, 10, 50])
    correct, logits = permutation[correct], logits[..., permutation.argsort()]
    assert_close(learners.policy_gradient(correct, logits, 0.5, [0, 10, 50]), J)
    renamed = prior.rename(torch.tensor([[0, 1, 0], [2, 2, 2]]), 50, seeded())
    assert renamed[0, :, 0].unique().tolist() == [0, 1, 2, 3]
    shared = torch.tensor([[2, 1, 2], [3, 3, 3]])[:, None].expand(2, 50, 3)
    assert_close(tasks.shared_answers(renamed), shared)

# ---------------------------------------------------------------- statistics, seeded

def test_moments_of_the_samplers():
    W, V = (prior.sample(4000, seeded()) for prior in PRIORS)
    Q = tasks.random_orthogonal(4000, 5, seeded())
    (x, y), (u, v) = (prior.episodes(w, seeded(1)) for prior, w in zip(PRIORS, (W, V)))
    for samples, expected in (
            (W[:, 0, 1] ** 2, 1 / 5), (x[:, 3, 2] ** 2, 1), (x[:, 0, 0] * x[:, 1, 0], 0),
            ((y - x @ W.mT)[:, 5, 1] ** 2, 0.01), (y[:, 4, 0] ** 2, 1.01), (Q[:, 0, 0] ** 2, 1 / 5),
            (V[:, 0, 3] ** 2, 1 / 5), (u[:, 7, 0], 0.5), (v[:, 3, 0] ** 2, 1.01)):
        assert abs(samples.mean() - expected) < 4 * standard_error(samples)

def against_bayes(prior, predictor):
    """On fresh episodes, the captured fraction, and by how many standard errors Bayes is beaten."""
    is_bandit = isinstance(prior, tasks.ContextualBandit)
    never = tasks.UniformAgent() if is_bandit else tasks.Prior()
    bayes = tasks.BayesAgent() if is_bandit else tasks.Bayes(prior)
    episodes = drawn(prior, 2000, seed=9)
    values = [prior.score(each, *episodes).mean(1) for each in (never, predictor, bayes)]
    beaten = values[1] - values[2] if is_bandit else values[2] - values[1]
    return learners.captured_fraction(*values)[0], beaten.mean() / standard_error(beaten)

@pytest.mark.parametrize("prior", PRIORS)
def test_nothing_beats_bayes(prior):
    noisier = tasks.Bayes(type(prior)(noise=0.5))
    for predictor in tasks.Prior(), noisier, small_meta(prior):
        assert against_bayes(prior, predictor)[1] < -4

def test_a_relu_network_learns_low_frequencies_first():
    prior = tasks.FourierRegression([1, 2, 4], grid=64)
    W, x = prior.evaluation_tasks(4, seeded()), prior.queries()
    target = (prior.features(x) @ W.mT)[..., 0]
    steps, f = learners.relu_network(x.T.expand(4, -1), target, 3e-3, 600, 64, 3, 10, seeded(1))
    strength, _ = tasks.fourier_strength(f, target, prior.frequencies)
    half = learners.geometric_mean(learners.half_time(strength, steps))
    assert (half.diff() > 0).all() and half[-1] > 2 * half[0]

def test_bayes_that_breaks_ties_by_name_is_staggered_only_where_names_are_kept():
    prior, correct = tasks.ContextualBandit(), torch.tensor([[0, 1, 2, 3, 4]])
    renamed, contexts, luck = prior.evaluation_episodes(correct, 2000, seeded())
    seen = []
    for names in renamed, correct[:, None].expand_as(renamed):
        strength, _ = prior.inner_loop(tasks.OrderedBayesAgent(), names, contexts, luck)
        seen.append(learners.describe(strength, torch.arange(61.0)))
    assert seen[0]["staggering"] < 1.2 and abs(seen[0]["order"]) < 0.02
    assert seen[1]["staggering"] > 3 and seen[1]["order"] > 0.4

def test_a_shared_bias_staggers_in_the_order_of_the_task_and_own_biases_do_not():
    prior, config = tasks.ContextualBandit(), metadyn.Bandit(learner_starts=16)
    correct = prior.evaluation_tasks(8, seeded())
    shared, own = (metadyn.bandit_learner(config, prior, correct, 0.1, 1000, shared)
                   for shared in (True, False))
    shared, own = (learners.describe(strength, steps) for steps, strength in (shared, own))
    assert shared["staggering"] > 1.7 and shared["order"] > 0.4
    assert own["staggering"] < 1.2 and abs(own["order"]) < 0.1

def test_by_the_visit_clock_bayes_meets_no_interference_and_an_online_learner_does():
    prior = tasks.ContextualBandit(3, 4, 25)
    bayes, online = (torch.stack([tasks.visit_clock(prior, agent, drawn(prior, 500, seed))
                                  for seed in range(20)])
                     for agent in (tasks.BayesAgent(), learners.OnlineLearner(5, 0.1, seeded())))
    assert bayes.shape == (20, 3, 3) and standard_error(bayes).max() < 0.03
    exact = (1 / (4 - torch.arange(3.0)))[:, None]        # 1 / (A - n + 1), n from 1
    assert ((bayes.mean(0) - exact).abs() < 4 * standard_error(bayes)).all()
    held_up = online[:, 1, 0] - online[:, 1, 2]           # at the second visit: by both others
    assert held_up.mean() > 4 * standard_error(held_up)

def test_the_online_learner_steps_on_average_along_the_exact_gradient_which_is_autograds():
    prior, n = tasks.ContextualBandit(3, 4, 1, [5.0, 3.0, 2.0]), 40_000
    correct = torch.tensor([[0, 2, 1]])
    logits = torch.randn(1, 3, 4, generator=seeded(), requires_grad=True)
    J = logits.softmax(-1).gather(-1, correct[..., None])[..., 0]
    (prior.rates * J).sum().backward()
    assert_close(learners.reward_gradient(logits, correct, prior.rates), logits.grad)
    agent = learners.OnlineLearner(0.5, 0.1, seeded())
    agent.begin(n, prior)
    agent.W = logits.detach().repeat(n, 1, 1)
    _, (context,), (luck,) = (z.T for z in prior.episodes(correct.expand(n, -1), seeded(1)))
    action = tasks.draw(agent.policy()[torch.arange(n), context], luck)
    agent.observe(context, action, (action == correct[0, context]).float())
    step = 0.5 * logits.grad[0]
    for moved, expected in (agent.W - logits.detach(), step), (agent.b[:, 0], step.sum(0)):
        assert ((moved.mean(0) - expected).abs() < 4 * standard_error(moved)).all()

def test_the_policy_gradient_is_that_of_the_rewards_with_the_states_as_they_come():
    prior = tasks.ContextualBandit(2, 2, 2)
    prior.sample = lambda n, generator: torch.tensor([[0, 1]]).expand(n, 2)         # one task
    agent = meta.MetaAgent(prior, 16, 1, seeded(1))
    agent.load_state_dict({name: 2 * p for name, p in agent.state_dict().items()})
    agent.head.bias.data[-1] = 0.5                        # a baseline, which must not bias
    # all that can have happened: contexts of trials 0 and 1, which name their answers, an action
    first, second, action = torch.cartesian_prod(*[torch.arange(2)] * 3).T
    agent.begin(8)
    then = first, action, (action == first).float()
    inputs = [agent.inputs(first, agent.previous), agent.inputs(second, then)]
    policy = agent(torch.stack(inputs, 1))[0][..., :2].softmax(-1)                  # (8, 2, 2)
    J = policy.gather(-1, torch.stack([first, second], 1)[..., None])[..., 0]
    chance = policy[torch.arange(8), 0, action].detach() / 4          # held fixed: discount 0
    expected = -(chance[:, None] * J).sum(0).mean()
    exact = torch.autograd.grad(expected, agent.head.weight)[0][:2]
    losses = (meta.policy_gradient_loss(agent, prior, 64, 0.0, seeded(i))[0] for i in range(300))
    found = torch.stack([torch.autograd.grad(loss, agent.head.weight)[0][:2] for loss in losses])
    assert exact.abs().max() > 20 * standard_error(found).max()
    assert ((found.mean(0) - exact).abs() <= 4 * standard_error(found)).all()

def short_outer_loop(prior, model, steps, folder):
    """A Meta-Learner, trained for a few seconds."""
    config = metadyn.Bandit(outer_steps=steps, batch=64, muon_lr=0.03, adam_lr=0.01, device="cpu")
    metadyn.train(config, prior, model, folder / "checkpoint.pt")
    return model

def test_the_papers_claim_a_meta_learner_is_less_staggered_and_ordered_than_a_learner(tmp_path):
    prior = tasks.LinearRegression(2, trials=8)
    W = prior.evaluation_tasks(6, torch.tensor([1.4, 0.5]), seeded())
    steps, strength = metadyn.linear_learner(metadyn.Linreg(), W, "random", "sgd", 0.01, 2000, 4)
    learner = learners.describe(strength, steps)
    assert learner["staggering"] > 2 and learner["order"] > 0.9
    model = short_outer_loop(prior, small_meta(prior, 32, 1), 500, tmp_path)
    episodes = prior.evaluation_episodes(W, 300, seeded(1))
    for predictor, largest, most in (model, 1.5, 0.2), (tasks.Bayes(prior), 1.15, 0.05):
        strength, _ = prior.inner_loop(predictor, *episodes)
        learned = learners.describe(strength, torch.arange(9.0))
        assert learned["staggering"] < largest and abs(learned["order"]) < most
    kappa, beaten = against_bayes(prior, model)
    assert kappa > 0.5 and beaten < 4

def test_an_agent_captures_half_after_a_short_outer_loop_and_does_not_beat_bayes(tmp_path):
    prior = tasks.ContextualBandit(2, 3, 12)
    agent = meta.MetaAgent(prior, 32, 1, seeded(1))
    kappa, beaten = against_bayes(prior, short_outer_loop(prior, agent, 250, tmp_path))
    assert kappa > 0.5 and beaten < 4

# ---------------------------------------------------------------- negative controls

def test_a_wrong_time_constant_is_seen():
    assert deep_linear_error(0.01, tau=1.1) > 0.1

def test_a_meta_learner_whose_state_is_never_passed_on_captures_nothing(tmp_path):
    class Forgetful(meta.MetaLearner):
        def predict(self, x, y):
            inputs = torch.cat([x, meta.delayed(y)[:, :-1]], -1)
            return self(inputs.flatten(0, 1)[:, None])[0].view(y.shape)

    prior = tasks.LinearRegression(2, trials=8)
    model = short_outer_loop(prior, Forgetful(prior, 32, 1, seeded(1)), 200, tmp_path)
    assert against_bayes(prior, model)[0] < 0.02

# ---------------------------------------------------------------- plumbing

SMALL = dict(hidden=8, layers=1, batch=8, outer_steps=12, eval_tasks=2, eval_episodes=8,
             fresh_tasks=64, device="cpu", learner_steps=40, learner_starts=2)
TINY = dict(
    linreg=SMALL | dict(dim=2, singular_values=[1.4, 0.5], trials=6, scales=[1.0, 4.0],
                        clock_tasks=2, clock_episodes=2, clock_steps=10),
    nonlinreg=SMALL | dict(frequencies=2, trials=6, bandpass_steps=60, learner_hidden=8,
                           learner_layers=2, clock_episodes=2),
    bandit=SMALL | dict(contexts=3, actions=3, trials=8))

def command(family, **changed):
    """The words of a tiny run, with some settings changed; a flag is an empty list."""
    words = [family]
    for name, value in (TINY[family] | changed).items():
        words.append("--" + name.replace("_", "-"))
        words += [str(one) for one in (value if isinstance(value, list) else [value])]
    return words

def run(family, **changed):
    return metadyn.main(command(family, **changed))

def measured(folder):
    """All that a run leaves in numbers but its seconds: CSV files and arrays."""
    files = {file.name: file.read_text() for file in folder.glob("*.csv")}
    arrays = np.load(folder / "results.npz")
    return files | {name: arrays[name] for name in arrays if not name.startswith("seconds/")}

@pytest.fixture(autouse=True)
def figures(monkeypatch):
    """Figures by name, in place of files: writing them is most of a tiny run's time."""
    kept = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: kept.update({path.name: figure}))
    monkeypatch.setattr(plots, "animate", lambda *arguments, **more: None)
    return kept

@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Folders of tiny runs by family, made from the command line, all at once."""
    top = tmp_path_factory.mktemp("tiny")
    processes = [subprocess.Popen([sys.executable, HERE / "metadyn.py", *command(family)], cwd=top,
                                  stdout=(top / f"{family}.txt").open("w")) for family in TINY]
    assert [process.wait() for process in processes] == [0, 0, 0]
    return {family: top / "runs" / family for family in TINY}

@pytest.mark.parametrize("family, films", [("linreg", 1), ("nonlinreg", 1), ("bandit", 0)])
def test_a_run_leaves_a_table_its_files_and_its_figures(family, films, runs):
    assert "κ" in runs[family].parent.with_name(f"{family}.txt").read_text(encoding="utf-8")
    for name, header in dict(
            dynamics="system,mode,time,strength,stderr", performance="system,trial,value,stderr",
            outer_loop="outer_step,mode,strength,half_time,value",
            ood="system,condition,mode,strength,value").items():
        first, *rows = (runs[family] / f"{name}.csv").read_text().splitlines()
        assert first == header
        number = header.split(",").index("value" if name == "performance" else "strength")
        assert np.isfinite([float(row.split(",")[number]) for row in rows]).all()
        assert (runs[family] / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (runs[family] / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert [gif.read_bytes()[:4] for gif in runs[family].glob("*.gif")] == [b"GIF8"] * films

def test_infinite_and_undefined_are_themselves_in_csv_and_null_in_json(runs):
    text = (runs["linreg"] / "summary.json").read_text()
    learner = json.loads(text)["systems"]["learner"]      # 40 steps: nothing is half learned
    assert learner["half_times"] == [None, None] and learner["order"] is None
    assert "NaN" not in text and "Infinity" not in text
    half_time = np.loadtxt(runs["linreg"] / "outer_loop.csv", delimiter=",", skiprows=1)[:, 3]
    expected = np.load(runs["linreg"] / "results.npz")["outer_loop/half_time"].T.ravel()
    assert np.isinf(expected).any()
    np.testing.assert_allclose(half_time, expected)

def test_a_complete_run_is_drawn_again_from_its_arrays_alone(runs, tmp_path, figures, monkeypatch):
    for file in "config.json", "results.npz":
        shutil.copy(runs["linreg"] / file, tmp_path)
    monkeypatch.setattr(learners, "linear_network", None)
    results = metadyn.run("linreg", out=tmp_path, **TINY["linreg"])
    np.testing.assert_equal(measured(tmp_path), measured(runs["linreg"]))
    time, strength, _ = results.curve("learner")
    lines = figures["dynamics"].axes[0].lines             # what is measured is what is drawn
    for curve in strength.T:
        assert any(np.array_equal(line.get_xydata(), np.stack([time, curve], 1)) for line in lines)

def test_fits_and_films_show_a_member_of_the_ensemble_that_is_measured(runs):
    results = np.load(runs["nonlinreg"] / "results.npz")
    target = torch.from_numpy(results["fits/target"])
    for system in "learner", "meta", "bayes":
        f = torch.from_numpy(results[f"fits/{system}"])
        strength, _ = tasks.fourier_strength(f, target, torch.tensor([1, 2]))
        np.testing.assert_allclose(strength, results[f"{system}/strength"][:, 0, 0], atol=1e-3)

def test_no_run_touches_the_global_generator_and_no_stream_shifts_another(runs, tmp_path):
    state, before = torch.get_rng_state(), np.load(runs["linreg"] / "results.npz")
    for name, value, same in (("eval_episodes", 20, ["performance/bayes", "performance/meta"]),
                              ("fresh_tasks", 80, ["meta/strength", "bayes/strength"]),
                              ("scales", [2.0], ["performance/meta", "learner_by_trial/strength"])):
        settings = TINY["linreg"] | {name: value}
        after = metadyn.run("linreg", out=tmp_path / name, **settings)
        for array in *same, "sgd/strength":
            np.testing.assert_array_equal(after[array], before[array], f"{name}: {array}")
    assert_close(torch.get_rng_state(), state)

@pytest.mark.parametrize("family, file", [("linreg", "checkpoint.pt"), ("bandit", "checkpoint.pt"),
                                          ("nonlinreg", "checkpoint_bandpass.pt")])
def test_killed_and_started_again_it_leaves_the_same_files(family, file, runs, tmp_path):
    words = [sys.executable, HERE / "metadyn.py", *command(family, out=tmp_path)]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    while not (tmp_path / file).exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (tmp_path / "results.npz").exists()
    assert run(family, out=tmp_path) == 0
    np.testing.assert_equal(measured(tmp_path), measured(runs[family]))

@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_control_c_says_how_to_go_on_and_n_and_n_outer_steps_are_2n(
        optimizer, tmp_path, capsys, monkeypatch):
    def stop(progress, step, value):
        if step == 6:
            raise KeyboardInterrupt

    halves, whole = tmp_path / "halves", tmp_path / "whole"
    with monkeypatch.context() as patch:
        patch.setattr(meta.Progress, "__call__", stop)
        assert run("linreg", out=halves, outer_optimizer=optimizer) == 130
    assert "without --fresh, goes on" in capsys.readouterr().err
    assert torch.load(halves / "checkpoint.pt", weights_only=True)["step"] == 6
    for folder in halves, whole:
        assert run("linreg", out=folder, outer_optimizer=optimizer) == 0
    np.testing.assert_equal(measured(halves), measured(whole))

@pytest.mark.parametrize("arguments, words", [
    ("cubreg", "FAMILY: invalid choice: 'cubreg'"),
    ("linreg --noise -1", "--noise: -1.0 given, allowed: at least 0"),
    ("linreg --trials 0", "--trials: 0 given, allowed: at least 2"),
    ("linreg --singular-values 1 2 3 4 0", "--singular-values: 0.0 given, allowed: more than 0"),
    ("linreg --singular-values 1 2", "--singular-values: 2 given, allowed: as many as --dim, 5"),
    ("linreg --outer-optimizer sgd", "--outer-optimizer: sgd given, allowed: muon, adam"),
    ("nonlinreg --noise nan", "--noise: nan given, allowed: at least 0 and finite"),
    ("bandit --actions many", "--actions: invalid int value: 'many'"),
    ("all --seeds 0", "--seeds: 0 given"),
    ("linreg --out /dev/null/run", "--out: /dev/null/run given"),
    pytest.param("linreg --device cuda", "--device: cuda given, allowed: on this machine ",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here"))])
def test_a_mistake_ends_in_one_line_and_status_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert metadyn.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err, err
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("file", ["checkpoint.pt", "config.json", "results.npz", None])
def test_files_damaged_or_of_another_run_stay_unless_fresh(file, runs, tmp_path, capsys):
    folder = shutil.copytree(runs["linreg"], tmp_path / "run")
    noise, words = 0.2, "noise 0.1 there, 0.2 here"
    if file:
        noise, words = 0.1, f"{file} cannot be read"
        (folder / file).write_bytes((folder / file).read_bytes()[:-20])
    if file == "checkpoint.pt":
        (folder / "results.npz").unlink()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert run("linreg", out=folder, noise=noise) == 2
    line = capsys.readouterr().err.strip()
    assert words in line and "--fresh" in line and "\n" not in line
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert run("linreg", out=folder, noise=noise, fresh=[]) == 0

@pytest.mark.parametrize("broken", [lambda w: w.sum() * math.nan, lambda w: (0 * w).sqrt().sum()])
def test_a_loss_or_gradient_that_is_not_finite_names_the_outer_step(broken, tmp_path):
    model, path = small_meta(PRIORS[0]), tmp_path / "checkpoint.pt"

    def loss(generator, share):
        weight = model.head.weight
        return [broken(weight) if share == 7 / 20 else weight.square().sum()] * 2

    with pytest.raises(FloatingPointError, match="outer step 7"):
        optimizers = meta.make_optimizers(model, "adam", 0, 0.01)
        meta.outer_loop(model, loss, 20, optimizers, seeded(), path, {})
    assert torch.load(path, weights_only=True)["step"] == 7

def test_all_families_and_seeds_make_one_overview_and_are_run_but_once(
        runs, tmp_path, figures, monkeypatch):
    for family in TINY:
        shutil.copytree(runs[family], tmp_path / family)
    monkeypatch.setattr(metadyn, "QUICK", TINY)
    words = ["all", "--quick", "--seeds", "2", "--out", str(tmp_path)]
    assert metadyn.main(words) == 0 and "overview" in figures
    overview = (tmp_path / "overview.csv").read_text()
    for family in TINY:
        folders = tmp_path / family, tmp_path / family / "seed1"
        low, high = sorted(json.loads((folder / "summary.json").read_text())["captured"]
                           for folder in folders)
        assert low < high                                 # another seed, another number
        assert f"{family},captured,{(low + high) / 2},{low},{high}," in overview
    monkeypatch.setattr(metadyn, "outer_loop", None)      # nothing is trained again
    assert metadyn.main(words) == 0 and (tmp_path / "overview.csv").read_text() == overview

def test_settings_from_python_are_those_of_the_command_line(tmp_path):
    settings = dict(dim=2, singular_values=(np.float64(0.5), 1.4), noise=np.float64(0.2))
    config, _ = metadyn.prepare("linreg", tmp_path, False, False, settings)
    assert config.singular_values == [1.4, 0.5]
    words = "--dim 2 --singular-values 1.4 0.5 --noise 0.2".split()
    given = vars(metadyn.make_parser().parse_args(["linreg", *words, "--out", str(tmp_path)]))
    assert len(metadyn.plan(**given)) == 1                # the same folder, the same settings
    with pytest.raises(metadyn.Mistake, match="--noise"):
        metadyn.run("linreg", noise=-1.0)

@pytest.mark.parametrize("family, settings", [
    ("linreg", dict(dim=1, singular_values=[2.0], trials=2, core="attention", noise=0.0)),
    ("nonlinreg", dict(frequencies=3, trials=2, clock_episodes=9)),
    ("bandit", dict(contexts=1, core="attention", outer_optimizer="adam")),
    ("bandit", dict(actions=2))])
def test_other_settings_are_carried_out(family, settings, tmp_path):
    results = metadyn.run(family, out=tmp_path, **TINY[family] | settings)
    modes = settings.get("dim") or settings.get("frequencies") or settings.get("contexts", 3)
    for system in "learner", "meta", "bayes":
        assert results[f"{system}/strength"].shape[3] == modes
        assert np.isfinite(results[f"{system}/strength"]).all()

@pytest.mark.parametrize("family", TINY)
def test_a_quick_run_shows_the_claim(family, tmp_path, figures):
    summary = metadyn.run(family, quick=True, out=tmp_path).summary
    learner, learned = (summary["systems"][system]["staggering"] for system in ("learner", "meta"))
    assert summary["captured"] > 0.8
    assert learned < 1.35 and learned < 0.6 * learner
    titles = [[ax.get_title() for ax in figures[name].axes] for name in ("dynamics", "controls")]
    seen = [title.split("\n")[1] for title in titles[0]]
    assert seen == ["one after another", "all at once", "all at once"]
    if family == "linreg":
        assert titles[1][-1] == "Learner, Muon\none after another, last first"

@pytest.mark.parametrize("module", ["tasks", "learners", "plots"])
def test_a_leaf_module_is_imported_alone_from_an_empty_folder(module, tmp_path):
    shutil.copy(HERE / f"{module}.py", tmp_path)
    environment = os.environ | {"PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", f"import {module}"], cwd=tmp_path, env=environment,
                   check=True)

README = (HERE / "README.md").read_text("utf-8")
EXERCISES = re.findall(r"```python\n([^`]*)```\n\n<details><summary>Answer</summary>\n\n"
                       r"The last number is `([\d.]+)`", README)
EXAMPLES = re.findall(r"```python\n([^`]*print\([^`]*# ([\d.]+)\n)```", README)

@pytest.mark.parametrize("code, promised", EXERCISES + EXAMPLES)
def test_code_of_the_readme_runs_as_printed(code, promised, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "example"})
    printed = re.findall(r"\d+\.\d+", capsys.readouterr().out)[-1]
    assert float(printed) == pytest.approx(float(promised), rel=0.1)

def numbers_of(file):
    """The rows of an overview: family, number, and the rest by column, as the README shows them."""
    for row in csv.DictReader((HERE / "figures" / file).open(encoding="utf-8")):
        family, number = row.pop("family"), row.pop("number")
        kappa = number == "captured"                      # has three digits
        yield family, number, {name: f"{float(value):.3f}" if kappa else plots.shown(float(value))
                               for name, value in row.items()}

@pytest.mark.parametrize("core, file", [("LSTM", "overview.csv"), ("attention", "attention.csv")])
def test_the_table_of_attention_in_the_readme_is_that_of_the_runs_of_seed_1(core, file):
    of = {(family, number): row["seed1"] for family, number, row in numbers_of(file)}
    for family in TINY:
        follows = sorted(of[family, f"follows_bayes/{k}"] for k in range(1, 6))
        cells = [of[family, "captured"], of[family, "systems/meta/staggering"],
                 of[family, "systems/meta/order"], f"{follows[0]} to {follows[-1]}",
                 ", ".join(of[family, f"outer_loop/half_times/{k}"] for k in range(1, 6))]
        assert f"{core} | {' | '.join(cells)} |" in README

def test_the_readme_has_eight_exercises_and_its_intervals_are_those_of_the_overview():
    assert len(EXERCISES) == 8 and len(EXAMPLES) >= 3
    known = {row["median"] + spread for _, _, row in numbers_of("overview.csv")
             for spread in (f" [{row['low']}, {row['high']}]", f" ± {row['stderr']}")}
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    intervals = re.findall(r"[-\d.]+ (?:\[[-\d.]+, [-\d.]+\]|± [\d.]+)", prose)
    assert len(intervals) > 50 and set(intervals) <= known
