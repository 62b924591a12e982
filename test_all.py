"""python -m pytest: analytic truth, metamorphic relations, statistics, negative controls, and
plumbing last."""
import csv
import itertools
import json
import math
import os
import re
import shutil
import signal
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


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(prior, n=64, seed=0):
    """A prior, n of its tasks, and an episode of each."""
    generator = seeded(seed)
    targets = prior.sample(n, generator)
    return prior, targets, *prior.episodes(targets, generator)


def small_meta(prior, hidden=16, seed=1, **more):
    return meta.MetaLearner(prior, hidden, 2, seeded(seed), **more)


def small_agent(prior, seed=1, **more):
    return meta.MetaAgent(prior, 16, 1, seeded(seed), **more)


# ---------------------------------------------------------------- analytic truth: Learners

def deep_linear_error(lr, tau=1.0):
    U, V = tasks.random_orthogonal(2, 5, seeded()).double()
    target = (U * S @ V.mT)[None]
    steps, maps = learners.linear_network(target, lr, round(20 / lr), "aligned", 1e-3)
    strength = tasks.mode_strength(maps, *tasks.singular_modes(target))
    theory = learners.deep_linear_theory(S, 1e-3, steps * lr / tau) / S
    return (strength[:, 0] - theory).abs().max().item()


def test_deep_linear_modes_follow_the_logistic_solution_with_an_error_of_first_order():
    errors = [deep_linear_error(lr) for lr in (0.02, 0.01, 0.005)]
    assert errors[1] < 0.02
    assert 1.9 < errors[0] / errors[1] < 2.1 and 1.9 < errors[1] / errors[2] < 2.1


def test_deep_linear_time_inverts_the_logistic_solution():
    t = learners.deep_linear_time(S, 1e-3, S / 2)
    assert_close(learners.deep_linear_theory(S, 1e-3, t).diagonal(), S / 2)


def test_one_layer_follows_its_closed_form_on_one_clock():
    steps, maps = learners.linear_network(torch.diag(S)[None], 0.001, 5000, "shallow", 0.2,
                                          generator=seeded())
    w = maps[:, 0].diagonal(dim1=-2, dim2=-1)
    assert w[0].abs().min() > 0.01
    assert_close(w, learners.shallow_theory(S, w[0], steps * 0.001), atol=1e-3, rtol=0)


def test_muon_moves_each_layer_at_one_speed_and_so_learns_the_weakest_mode_first():
    steps, maps = learners.linear_network(torch.diag(S)[None], 0.01, 200, "aligned", 1e-6, "muon")
    u = maps[:, 0].diagonal(dim1=-2, dim2=-1)
    theory = learners.muon_theory(S, 1e-6, steps * 0.01)
    rising = theory < 0.9 * S                             # momentum overshoots afterwards
    assert_close((u / S)[rising], (theory / S)[rising], atol=0.02, rtol=0)
    half = learners.half_time(u / S, steps)
    assert (half.diff() < 0).all()
    assert_close(learners.staggering_index(half).item(), (1.6 / 0.3) ** 0.5, rtol=0.02, atol=0)


def test_muon_makes_each_matrix_of_a_stack_orthogonal_by_itself():
    G = torch.randn(3, 4, 6, generator=seeded(), dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    exact = learners.Muon([torch.zeros(1)], 1, coefficients=(1.5, -0.5, 0.0), iterations=40)
    assert_close(exact.orthogonal(G), U @ Vh, atol=1e-6, rtol=0)
    stacked = torch.zeros(12, 6, dtype=torch.float64)
    stacked.grad = G.flatten(0, 1)
    optimizer = learners.Muon([stacked], 0.1, stacked=3)
    optimizer.step()
    assert_close(stacked, -0.1 * optimizer.orthogonal(G).flatten(0, 1))
    s = torch.linalg.svdvals(optimizer.orthogonal(G))
    assert 0.6 < s.min() and s.max() < 1.3                # the usual coefficients are rough


def test_white_inputs_are_the_identity_and_few_inputs_are_fitted():
    target = torch.diag(S)[None]
    _, white = learners.linear_network(target, 0.05, 50, "random", generator=seeded())
    X = torch.eye(5, dtype=torch.float64)[None]
    _, given = learners.linear_network(target, 0.05, 50, "random", inputs=X, generator=seeded())
    assert_close(white, given)
    _, few = learners.linear_network(target[..., :2], 0.05, 2000, "random", inputs=X[..., :2],
                                     generator=seeded())
    assert_close(few[-1] @ X[..., :2], target[..., :2], atol=1e-3, rtol=0)
    assert few[-1][0, :, 2:].abs().max() < 0.1            # nothing is made up where nothing is seen


def test_a_relu_network_does_not_see_points_without_weight():
    x = torch.linspace(0, 1, 20).expand(2, -1)
    y = torch.randn(2, 20, generator=seeded())
    changed = y.clone()
    changed[:, 10:] += 1
    weight = (torch.arange(20) < 10).float().expand(2, -1) / 10
    _, f = learners.relu_network(x, y, 1e-2, 20, 8, 2, 10, seeded(1), weight)
    _, g = learners.relu_network(x, changed, 1e-2, 20, 8, 2, 10, seeded(1), weight)
    assert_close(f, g, atol=0, rtol=0)
    _, h = learners.relu_network(x, changed, 1e-2, 20, 8, 2, 10, seeded(1))
    assert (f - h).abs().max() > 0.01


def test_two_contexts_and_two_actions_interfere_as_derived():
    logits = torch.randn(50, 2, 2, generator=seeded(), dtype=torch.float64)
    correct = torch.tensor([[0, 1]]).expand(50, 2)
    dt = 1e-6
    J = learners.policy_gradient(correct, logits, 2 * dt, [0, 1])
    g = J[0] * (1 - J[0])
    assert_close((J[1] - J[0]) / dt, 2 * g * (2 * g - g.flip(1)), atol=1e-5, rtol=0)
    gradients = []
    for only in torch.eye(2, dtype=torch.float64):        # of one context's J, in W and in b
        in_logits = learners.reward_gradient(logits, correct, only)
        gradients.append(torch.cat([in_logits.flatten(1), in_logits.sum(1)], 1))
    cosine = torch.cosine_similarity(*gradients)
    assert_close(cosine, torch.full((50,), -0.5, dtype=torch.float64))


def test_reward_gradient_is_that_of_autograd():
    logits = torch.randn(7, 3, 4, generator=seeded(), requires_grad=True)
    correct = torch.randint(4, (7, 3), generator=seeded())
    rates = torch.tensor([0.5, 0.3, 0.2])
    J = logits.softmax(-1).gather(-1, correct[..., None])[..., 0]
    (rates * J).sum().backward()
    assert_close(learners.reward_gradient(logits.detach(), correct, rates), logits.grad)


def test_the_online_learner_steps_on_average_as_the_exact_gradient():
    prior, n = tasks.ContextualBandit(3, 4, 1), 40_000
    logits, correct = torch.randn(1, 3, 4, generator=seeded()), torch.tensor([[0, 2, 1]])
    agent = learners.OnlineLearner(0.5, 0.1, seeded())
    agent.begin(n, prior)
    agent.W = logits.repeat(n, 1, 1)
    prior_episodes = prior.episodes(correct.expand(n, -1), seeded(1))
    policy = agent.policy()
    context, luck = prior_episodes[1][:, 0], prior_episodes[2][:, 0]
    action = tasks.draw(policy[torch.arange(n), context], luck)
    reward = (action == correct[0, context]).float()
    agent.observe(context, action, reward)
    exact = 0.5 * learners.reward_gradient(logits, correct, prior.rates)[0]
    moved = agent.W - logits
    assert ((moved.mean(0) - exact).abs() < 4 * moved.std(0) / n ** 0.5 + 1e-7).all()
    b = agent.b[:, 0]
    assert ((b.mean(0) - exact.sum(0)).abs() < 4 * b.std(0) / n ** 0.5).all()


# ---------------------------------------------------------------- analytic truth: Bayes

@pytest.mark.parametrize("prior", [
    tasks.LinearRegression(), tasks.LinearRegression(3, 0.3, 12), tasks.FourierRegression(),
    tasks.FourierRegression([7, 9], 0.25, 17)])
def test_sequential_posterior_is_the_batch_posterior(prior):
    prior, _, x, y = drawn(prior)
    means, covariances = tasks.Bayes(prior).posterior(x, y)
    assert means.shape == (64, prior.trials + 1, prior.outputs, prior.n_features)
    M, P = tasks.Bayes(prior).batch_posterior(x, y)
    assert_close(means[:, -1], M, atol=1e-10, rtol=0)
    assert_close(covariances[:, -1], P, atol=1e-10, rtol=0)


def test_the_posterior_of_a_band_limited_function_is_that_of_a_gaussian_process():
    prior, _, x, y = drawn(tasks.FourierRegression([2, 3, 5]), n=3)
    x, y, xq = x.double(), y.double(), prior.queries().double()

    def kernel(a, b):                                     # k(x, x') = 1/K sum_k cos 2 pi k (x - x')
        distance = a[..., :, None, 0] - b[..., None, :, 0]
        return (2 * math.pi * distance[..., None] * prior.frequencies).cos().mean(-1)

    noisy = kernel(x, x) + 0.01 * torch.eye(40, dtype=torch.float64)
    expected = kernel(xq.expand(3, -1, -1), x) @ torch.linalg.solve(noisy, y)
    assert_close(tasks.Bayes(prior).query(x, y, xq)[:, -1], expected, atol=1e-10, rtol=0)


def test_parseval_and_the_strength_of_a_function_in_itself():
    prior, W, *_ = drawn(tasks.FourierRegression([1, 4, 6]), n=5)
    f = (prior.features(prior.queries().double()) @ W.double().mT)[..., 0]
    assert_close(f.square().mean(-1), W.double().square().sum((-2, -1)) / 2)
    strength, outside = tasks.fourier_strength(f, f, prior.frequencies)
    assert_close(strength, torch.ones(5, 3, dtype=torch.float64))
    assert outside.max() < 1e-12


@pytest.mark.parametrize("prior", [
    tasks.ContextualBandit(), tasks.ContextualBandit(1, 2, 5),
    tasks.ContextualBandit(2, 3, 20, [3.0, 1.0])])
def test_bayes_learning_curve_by_formula_and_by_simulation(prior):
    _, *episodes = drawn(prior, 4000)
    _, J = prior.play(tasks.BayesAgent(), *episodes[1:])
    curve = prior.bayes_curve()
    assert J.shape[1:] == curve.shape == (prior.trials + 1, prior.contexts)
    largest_sd = (curve * (1 - curve)).clamp_min(0).sqrt()
    assert ((J.mean(0) - curve).abs() <= 4 * largest_sd / 4000 ** 0.5 + 4 / 4000).all()


def test_bayes_without_noise_knows_the_task_after_dim_trials():
    prior, _, x, y = drawn(tasks.LinearRegression(noise=0.0))
    assert_close(tasks.Bayes(prior).predict(x, y)[:, 8:], y[:, 8:], atol=1e-3, rtol=0)


def test_linear_probe_finds_a_map_and_says_what_is_not_linear():
    prior, W, *_ = drawn(tasks.LinearRegression(), n=3)
    xq = prior.queries(seeded())
    found, residual, total = tasks.linear_probe(xq @ W.mT, xq)
    assert_close(found, W, atol=1e-5, rtol=1e-5)
    assert (residual / total).max() < 1e-8
    found, residual, total = tasks.linear_probe(torch.ones(3, len(xq), 5), xq)
    assert_close(residual, total)
    _, residual, total = tasks.linear_probe((20 * xq).sin(), xq)      # odd, as good as random
    assert 1 - residual.sum() / total.sum() < 0.75


# ---------------------------------------------------------------- the measures, on planted systems

TIME = torch.arange(0.0, 100)


def planted(half_times):
    """Sigmoids with these half-times (N, E, K): strengths (100, N, E, K)."""
    return torch.sigmoid(TIME[:, None, None, None] - torch.as_tensor(half_times))


def shuffled(half_times, repeats):
    """The half-times (K,) in a new order in each of so many repeats: (1, E, K)."""
    orders = torch.rand(1, repeats, len(half_times), generator=seeded()).argsort(-1)
    return torch.tensor(half_times)[orders]


def test_a_fixed_order_in_every_repeat_is_staggered_with_order_one():
    strength = planted([[[20.0, 40.0, 80.0]] * 6] * 2)
    assert_close(learners.staggering(strength, TIME), torch.full((2,), 4.0), atol=0.01, rtol=0)
    assert_close(learners.within(strength, TIME), torch.full((2,), 4.0), atol=0.01, rtol=0)
    assert_close(learners.order(strength, TIME), torch.ones(2).double())


def test_a_random_order_in_every_repeat_is_staggered_within_but_has_no_order():
    strength = planted(shuffled([20.0, 40.0, 80.0], 3000))
    assert learners.staggering(strength, TIME) < 1.1
    assert_close(learners.within(strength, TIME).item(), 4.0, atol=0.01, rtol=0)
    assert learners.order(strength, TIME).abs() < 0.01


def test_one_mode_late_has_half_an_order_and_all_at_once_has_none():
    late = torch.cat([shuffled([20.0, 21.0, 22.0], 2000), torch.full((1, 2000, 1), 80.0)], -1)
    assert_close(learners.staggering(planted(late), TIME).item(), 80 / 21, rtol=0.02, atol=0)
    # ranks 0, 0, 0, 3 less their mean, squared and summed, over those of 0, 1, 2, 3: 3 / 5
    assert_close(learners.order(planted(late), TIME).item(), 0.6, atol=0.02, rtol=0)
    together = planted([[[30.0, 30.0, 30.0]] * 5])
    assert learners.staggering(together, TIME) == 1
    assert learners.order(together, TIME).isnan()


def test_order_is_the_mean_rank_correlation_of_all_pairs_of_repeats():
    half = 5 + 90 * torch.rand(1, 6, 5, generator=seeded())
    ranks = half[0].argsort(-1).argsort(-1).numpy()
    pairs = [np.corrcoef(a, b)[0, 1] for a, b in itertools.combinations(ranks, 2)]
    assert_close(learners.order(planted(half), TIME).item(), np.mean(pairs), atol=1e-9, rtol=0)


def test_bayes_that_breaks_ties_by_name_has_an_order_only_where_names_are_kept():
    prior = tasks.ContextualBandit()
    correct, trials = torch.tensor([[0, 1, 2, 3, 4]]), torch.arange(61.0)
    renamed, contexts, luck = prior.evaluation_episodes(correct, 1000, seeded())
    kept = correct[:, None].expand_as(renamed)
    agent = tasks.OrderedBayesAgent()
    new, _ = prior.inner_loop(agent, renamed, contexts, luck)
    old, _ = prior.inner_loop(agent, kept, contexts, luck)
    assert learners.staggering(new, trials) < 1.3 and learners.order(new, trials) < 0.02
    assert learners.staggering(old, trials) > 3 and learners.order(old, trials) > 0.4


def test_follows_is_one_for_a_copy_and_none_for_another_chance():
    half = 5 + 90 * torch.rand(4, 500, 2, generator=seeded())
    other = 5 + 90 * torch.rand(4, 500, 2, generator=seeded(1))
    assert_close(learners.follows(planted(half), planted(half), TIME), torch.ones(2))
    assert learners.follows(planted(half), planted(other), TIME).abs().max() < 0.1


def test_half_time_interpolates_and_knows_modes_without_one():
    strength = torch.tensor([[0.0, 0.6, 0.0, 0.0], [0.25, 0.7, 0.1, 1.0], [0.75, 0.8, 0.2, 0.0]])
    half = learners.half_time(strength, torch.tensor([0.0, 10.0, 20.0]))
    expected = torch.tensor([15.0, math.nan, math.inf, 5.0])
    assert_close(half, expected, equal_nan=True)
    assert learners.half_time(strength, torch.tensor([0.0, 10, 20]), level=0.1)[0] == 4
    index = learners.staggering_index(torch.tensor([[2.0, 3.0], [2.0, math.inf], [math.nan, 2.0]]))
    assert_close(index, torch.tensor([1.5, math.inf, 1.0]))


def test_describe_tells_modes_that_are_not_reached_there_from_the_start_or_seen_once():
    seen = learners.describe(planted([[[20.0, 80.0, 500.0]] * 3] * 2), TIME)
    assert seen["half_times"][2] == math.inf and seen["staggering"] == math.inf
    assert math.isnan(seen["staggering_ci"][0]) and seen["order"] == pytest.approx(1)
    assert seen["not_reached"] == pytest.approx(1 / 3)
    assert_close(seen["within"], 99 / 20, rtol=0.01, atol=0)          # a lower bound
    known = learners.describe(planted([[[-9.0, 20.0, 80.0]]] * 2), TIME)
    assert math.isnan(known["half_times"][0]) and math.isnan(known["order"])
    assert_close(known["staggering"], 4.0, atol=0.01, rtol=0)
    assert_close(known["staggering_ci"], [4.0, 4.0], atol=0.01, rtol=0)


def test_t_intervals_have_the_quantiles_of_student_and_hold_the_mean():
    for n, quantile in ((2, 12.706), (10, 2.2622), (16, 2.1314)):
        values = torch.arange(n, dtype=torch.float64)
        mean, low, high = learners.t_interval(values)
        stderr = values.std().item() / n ** 0.5
        assert_close((high - mean) / stderr, quantile, rtol=1e-3, atol=0)
        assert_close(mean - low, high - mean)
    samples = torch.randn(400, 8, generator=seeded())
    held = [low < 0 < high for _, low, high in map(learners.t_interval, samples)]
    assert 0.91 < np.mean(held) < 0.985


def test_captured_fraction_and_its_interval():
    prior, bayes = torch.full((500,), 1.0), torch.full((500,), 0.2)
    between = 0.3 + 0.1 * torch.randn(500, generator=seeded())
    assert learners.captured_fraction(prior, bayes, bayes)[0] == 1
    kappa, low, high = learners.captured_fraction(prior, between, bayes)
    assert low < kappa < high
    assert_close(high - low, 2 * 1.96 * 0.1 / 0.8 / 500 ** 0.5, rtol=0.1, atol=0)
    assert learners.captured_fraction(-prior, -between, -bayes)[0] == pytest.approx(kappa)


def test_the_strength_of_repeated_modes_together_does_not_depend_on_their_basis():
    W = torch.eye(4).double()
    W[3, 3] = 0.5
    R = tasks.random_orthogonal(1, 3, seeded())[0].double()
    turn = torch.block_diag(R, torch.ones(1, 1).double())
    U, V, s = tasks.singular_modes(W)
    f = torch.randn(4, 4, generator=seeded(), dtype=torch.float64)
    one = tasks.mode_strength(f, U, V, s)
    other = tasks.mode_strength(f, U @ turn, V @ turn, s)
    assert (one - other).abs().max() > 0.1
    assert_close(one[:3].sum(), other[:3].sum())


# ---------------------------------------------------------------- metamorphic

def test_rotating_inputs_rotates_the_weights_and_keeps_spectrum_and_predictions():
    prior, _, x, y = drawn(tasks.LinearRegression())
    R, bayes = tasks.random_orthogonal(1, 5, seeded(3))[0], tasks.Bayes(prior)
    M, turned = (bayes.posterior(z.double(), y)[0][:, -1] for z in (x, x @ R.mT))
    assert_close(turned, M @ R.double().mT, atol=1e-5, rtol=1e-5)
    assert_close(bayes.predict(x @ R.mT, y), bayes.predict(x, y), atol=1e-4, rtol=1e-4)


def test_a_shifted_copy_of_a_target_is_not_the_target():
    x, k = torch.arange(64.0) / 64, torch.tensor([1, 2, 3])
    f, shifted = ((2 * math.pi * k * z[:, None]).sin().sum(-1) for z in (x, x - 0.1))
    strength, _ = tasks.fourier_strength(shifted, f, k)
    assert_close(strength, (2 * math.pi * k * 0.1).cos(), atol=1e-5, rtol=0)


def test_modes_are_signed_and_never_sorted_anew():
    U, V = tasks.random_orthogonal(2, 5, seeded()).double()
    wrong = U * torch.tensor([0.0, 0, 0, 0, -3.0]) @ V.mT
    expected = torch.tensor([0, 0, 0, 0, -10.0], dtype=torch.float64)
    assert_close(tasks.mode_strength(wrong, U, V, S), expected, atol=1e-5, rtol=0)
    assert tasks.off_diagonal(U * S @ V.mT, U, V, S) < 1e-6 < tasks.off_diagonal(wrong, V, U, S)


@pytest.mark.parametrize("optimizer", learners.OPTIMIZERS)
def test_a_learner_does_not_know_of_its_ensemble(optimizer):
    target = drawn(tasks.LinearRegression(), n=3)[1]
    _, together = learners.linear_network(target, 0.01, 20, "aligned", 0.1, optimizer)
    _, alone = learners.linear_network(target[1:2], 0.01, 20, "aligned", 0.1, optimizer)
    assert together.shape == (21, 3, 5, 5)
    assert_close(together[:, 1:2], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("core", ["lstm", "attention"])
def test_a_meta_learner_uses_the_past_alone_and_all_of_it(core):
    prior, _, x, y = drawn(tasks.LinearRegression(), n=4)
    for predictor in small_meta(prior, core=core), tasks.Bayes(prior):
        changed = y.clone()
        changed[:, 7] += 1
        before, after = predictor.predict(x, y), predictor.predict(x, changed)
        assert_close(before[:, :8], after[:, :8], atol=1e-6, rtol=0)
        assert ((before - after)[:, 8:].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("core", ["lstm", "attention"])
def test_what_is_in_mind_before_a_trial_is_what_is_answered_in_it(core):
    prior, _, x, y = drawn(tasks.LinearRegression(trials=6), n=1)
    for predictor in small_meta(prior, core=core), tasks.Bayes(prior), tasks.Prior():
        answers = predictor.query(x, y, x[0])
        assert answers.shape == (1, 7, 6, 5)
        answered = answers[0, :-1].diagonal(dim1=0, dim2=1).T
        assert_close(answered, predictor.predict(x, y)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("core", ["lstm", "attention"])
def test_an_agent_learns_from_its_past_alone_and_a_rollout_is_what_it_plays(core):
    prior = tasks.ContextualBandit(3, 4, 25)
    agent = small_agent(prior, core=core)
    correct, contexts, luck = prior.episodes(prior.sample(32, seeded()), seeded())
    changed = contexts.clone()
    changed[:, 9:] = changed[:, 9:].flip(1)
    reward, J = prior.play(agent, correct, contexts, luck)
    _, K = prior.play(agent, correct, changed, luck)
    assert_close(J[:, :10], K[:, :10], atol=1e-6, rtol=0)
    assert (J[:, 10:] - K[:, 10:]).abs().max() > 0
    _, action, played = agent.roll_out(correct, contexts, luck)
    assert action.shape == (32, 25)
    assert_close(played, reward)


def test_permuting_actions_permutes_the_policy_and_keeps_which_contexts_share():
    prior, permutation = tasks.ContextualBandit(3, 4), torch.tensor([2, 0, 3, 1])
    correct = prior.sample(20, seeded())
    logits = torch.randn(20, 3, 4, generator=seeded())
    J = learners.policy_gradient(correct, logits, 0.5, [0, 10, 50])
    moved = logits[..., permutation.argsort()]
    assert_close(J, learners.policy_gradient(permutation[correct], moved, 0.5, [0, 10, 50]))
    renamed = prior.rename(correct, 50, seeded())
    shared = tasks.shared_answers(correct)[:, None].expand_as(renamed)
    assert_close(tasks.shared_answers(renamed), shared)
    assert renamed[0, :, 0].unique().numel() == 4
    assert tasks.shared_answers(torch.tensor([1, 1, 0, 1])).tolist() == [3, 3, 1, 3]


# ---------------------------------------------------------------- statistics, seeded

def test_moments_of_the_samplers():
    _, W, x, y = drawn(tasks.LinearRegression(), n=4000)
    _, W2, x2, y2 = drawn(tasks.FourierRegression([2, 3]), n=4000)
    for samples, expected in (
            (W[:, 0, 1] ** 2, 0.2), (x[:, 3, 2] ** 2, 1), (x[:, 0, 0] * x[:, 1, 0], 0),
            ((y - x @ W.mT)[:, 5, 1] ** 2, 0.01), (y[:, 4, 0] ** 2, 1.01),
            (W2[:, 0, 3] ** 2, 0.5), (x2[:, 7, 0], 0.5), (y2[:, 3, 0] ** 2, 1.01),
            (tasks.random_orthogonal(4000, 5, seeded())[:, 0, 0] ** 2, 0.2)):
        assert abs(samples.mean() - expected) < 4 * samples.std() / 4000 ** 0.5


def test_a_relu_network_learns_low_frequencies_first():
    x, k = torch.arange(100.0) / 100, torch.tensor([1, 2, 4])
    phase = torch.rand(4, 1, 3, generator=seeded())
    target = (2 * math.pi * (k * x[:, None] + phase)).sin().sum(-1)
    steps, f = learners.relu_network(x.expand(4, -1), target, 3e-3, 600, 64, 3, 10, seeded(1))
    strength, _ = tasks.fourier_strength(f, target, k)
    half = learners.geometric_mean(learners.half_time(strength, steps))
    assert (half.diff() > 0).all() and half[-1] > 2 * half[0]


def test_a_shared_bias_staggers_in_the_tasks_order_and_own_biases_do_not():
    config = metadyn.Bandit(learner_starts=16)
    correct = tasks.ContextualBandit().evaluation_tasks(8, seeded())
    steps, shared = metadyn.bandit_learner(config, correct, 0.1, 1000, shared=True)
    _, own = metadyn.bandit_learner(config, correct, 0.1, 1000, shared=False)
    shared, own = learners.describe(shared, steps), learners.describe(own, steps)
    assert shared["staggering"] > 1.7 and shared["order"] > 0.4
    assert own["staggering"] < 1.2 and abs(own["order"]) < 0.1


def test_bayes_meets_no_interference_by_the_visit_clock():
    prior = tasks.ContextualBandit(4, 4, 40)
    _, *episodes = drawn(prior, 4000)
    chance = tasks.visit_clock(prior, tasks.BayesAgent(), episodes[1:])
    assert chance.shape == (3, 4)
    exact = 1 / (4 - torch.arange(3.0))[:, None]
    assert ((chance - exact).abs() < 0.05).all()


def test_random_starts_keep_the_order_of_the_modes_and_bayes_has_none():
    config = metadyn.Linreg(learner_starts=4)
    prior = tasks.LinearRegression()
    W = prior.evaluation_tasks(4, S.float(), seeded())
    steps, strength = metadyn.linear_learner(config, W, "random", "sgd", 0.01, 3000, 4)
    assert learners.describe(strength, steps)["order"] > 0.9
    episodes = prior.evaluation_episodes(W, 500, seeded())
    strength, readings = prior.inner_loop(tasks.Bayes(prior), *episodes)
    bayes = learners.describe(strength, torch.arange(21.0))
    assert abs(bayes["order"]) < 0.02 and bayes["staggering"] < 1.2 and bayes["within"] > 3
    assert readings["r_squared"].min() > 0.999


def test_bayes_suppresses_what_its_prior_excludes():
    low, high = tasks.FourierRegression([1, 2, 3]), tasks.FourierRegression([5, 6])
    W = high.evaluation_tasks(2, torch.ones(2), seeded())
    strength, _ = high.inner_loop(tasks.Bayes(low), *high.evaluation_episodes(W, 10, seeded()))
    assert_close(strength, torch.zeros(41, 2, 10, 2), atol=1e-5, rtol=0)


def trained(prior, model, steps, folder, batch=64):
    """A Meta-Learner after a short outer loop."""
    def loss(generator, share):
        if isinstance(prior, tasks.ContextualBandit):
            return meta.policy_gradient_loss(model, prior, batch, 0.02 * (1 - share), generator)
        return meta.squared_error_loss(model, prior, batch, generator)

    optimizers = meta.make_optimizers(model, "muon", 0.05, 0.02)
    meta.outer_loop(model, loss, steps, optimizers, seeded(5), folder / "checkpoint.pt", {})
    return model


def test_the_papers_claim_a_meta_learner_is_less_staggered_and_less_ordered(tmp_path):
    prior = tasks.LinearRegression(2, 0.1, 8)
    model = trained(prior, meta.MetaLearner(prior, 32, 1, seeded(6), decoder=1), 500, tmp_path)
    W = prior.evaluation_tasks(6, torch.tensor([1.4, 0.5]), seeded())
    inner, _ = prior.inner_loop(model, *prior.evaluation_episodes(W, 300, seeded(1)))
    steps, outer = metadyn.linear_learner(metadyn.Linreg(), W, "random", "sgd", 0.01, 2000, 4)
    learner = learners.describe(outer, steps)
    learned = learners.describe(inner, torch.arange(9.0))
    assert learner["staggering"] > 2 > 1.5 > learned["staggering"]
    assert learner["order"] > 0.9 and abs(learned["order"]) < 0.2
    episodes = drawn(prior, 3000, 9)[2:]
    never, meta_loss, bayes = (prior.score(predictor, *episodes).mean(1)
                               for predictor in (tasks.Prior(), model, tasks.Bayes(prior)))
    assert learners.captured_fraction(never, meta_loss, bayes)[0] > 0.6
    excess = meta_loss - bayes
    assert excess.mean() > 4 * excess.std() / 3000 ** 0.5             # and does not beat Bayes


def test_a_trained_agent_captures_most_and_does_not_beat_bayes(tmp_path):
    prior = tasks.ContextualBandit(2, 3, 12)
    agent = trained(prior, meta.MetaAgent(prior, 32, 1, seeded(2), decoder=1), 250, tmp_path)
    episodes = drawn(prior, 4000, 9)[1:]
    episodes = prior.episodes(episodes[0], seeded(3))
    never, reward, bayes = (prior.score(player, *episodes).mean(1)
                            for player in (tasks.UniformAgent(), agent, tasks.BayesAgent()))
    assert learners.captured_fraction(never, reward, bayes)[0] > 0.5
    excess = reward - bayes
    assert excess.mean() < 4 * excess.std() / 4000 ** 0.5


def test_the_policy_gradient_is_that_of_each_reward_by_itself():
    prior, n = tasks.ContextualBandit(1, 2, 1), 20_000         # one trial: nothing else counts
    agent = small_agent(prior)
    loss, _ = meta.policy_gradient_loss(agent, prior, n, 0.0, seeded())
    loss.backward()
    inputs = agent.inputs(torch.zeros(1, dtype=torch.long),
                          (torch.full((1,), -1), torch.full((1,), -1), torch.zeros(1)))
    outputs, _ = agent(inputs[None])
    agent_gradient = agent.head.bias.grad[:2].clone()
    # correct is either action with chance 1/2, so that J = 1/2 whatever the policy: gradient 0
    assert agent_gradient.abs().max() < 4 * 0.5 / n ** 0.5
    agent.zero_grad()
    biased = tasks.ContextualBandit(1, 2, 1)
    biased.sample = lambda n, generator: torch.zeros(n, 1, dtype=torch.long)    # action 0, always
    meta.policy_gradient_loss(agent, biased, n, 0.0, seeded())[0].backward()
    p = outputs[0, 0, :2].softmax(-1)[0].item()
    slope = torch.tensor([-p * (1 - p), p * (1 - p)])                 # of -J in the two logits
    assert_close(agent.head.bias.grad[:2], slope, atol=4 * 0.5 / n ** 0.5, rtol=0)


@pytest.mark.parametrize("core, name", [
    ("lstm", "muon"), ("lstm", "adam"), ("attention", "muon"), ("attention", "adam")])
def test_every_parameter_is_in_exactly_one_optimizer(core, name):
    model = small_meta(tasks.LinearRegression(), core=core, encoder=2, decoder=2)
    held = []
    for optimizer in meta.make_optimizers(model, name, 0.1, 0.1):
        for group in optimizer.param_groups:
            held += [id(p) for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_the_learning_rate_rises_over_two_percent_and_falls_to_zero():
    factors = [meta.learning_rate_factor(step, 1000) for step in range(1001)]
    assert factors[0] == pytest.approx(1 / 21) and max(factors) == pytest.approx(0.98, abs=0.002)
    assert factors[500] == 0.5 and factors[1000] == 0


# ---------------------------------------------------------------- negative controls

def test_a_wrong_time_constant_is_seen():
    assert deep_linear_error(0.01, tau=1.1) > 0.1


def test_a_meta_learner_whose_state_is_never_passed_on_is_seen():
    prior, _, x, y = drawn(tasks.LinearRegression(), n=4)
    model = small_meta(prior)
    changed = y.clone()
    changed[:, 7] += 1
    inputs = [torch.cat([x, meta.delayed(z)[:, :-1]], -1).flatten(0, 1)[:, None]
              for z in (y, changed)]
    before, after = (model(z)[0].view(4, 20, 5) for z in inputs)
    assert ((before - after)[:, 9:] == 0).all()           # what the test of the past must reject


# ---------------------------------------------------------------- plumbing

TINY = ("--hidden 8 --outer-steps 16 --batch 8 --eval-tasks 2 --eval-episodes 8 --fresh-tasks 64 "
        "--learner-steps 60 --device cpu").split()
FEW = dict(
    linreg=[*TINY, *("--clock-tasks 2 --clock-episodes 4 --clock-steps 20 "
                     "--learner-starts 2 --scales 1 4").split()],
    nonlinreg=[*TINY, *("--trials 10 --learner-hidden 8 --learner-layers 2 --bandpass-steps 8 "
                        "--clock-episodes 2 --clock-steps 20").split()],
    bandit=[*TINY, *"--trials 12 --learner-starts 6 --scaling 2 3".split()],
)


def run(*arguments):
    return metadyn.main([str(a) for a in arguments])


def tables(folder):
    """The bytes of a run's CSV files by name, and its summary without the seconds."""
    summary = json.loads((folder / "summary.json").read_text())
    summary.pop("seconds")
    files = {file.name: file.read_bytes() for file in sorted(folder.glob("*.csv"))}
    return files | dict(summary=summary)


@pytest.fixture
def undrawn(monkeypatch):
    """Rendering is most of a tiny run's time."""
    monkeypatch.setattr(plots, "save", lambda figure, path: None)
    monkeypatch.setattr(plots, "animate", lambda *arguments, **more: None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "run"
    assert run("linreg", *FEW["linreg"], "--out", folder) == 0
    return folder


@pytest.mark.parametrize("family", metadyn.FAMILIES)
def test_a_quick_run_shows_the_claim(family, tmp_path):
    command = [sys.executable, HERE / "metadyn.py", family, "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Learner (steps)" in done.stdout and "κ" in done.stdout
    folder = tmp_path / "runs" / family
    summary = json.loads((folder / "summary.json").read_text())
    index = {system: row["staggering"] for system, row in summary["systems"].items()}
    assert summary["captured"] > 0.8
    assert index["meta"] < 1.35 and index["meta"] < 0.6 * index["learner"]
    for figure in "dynamics", "performance", "outer_loop", "ood":
        assert (folder / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"{figure}.pdf").read_bytes().startswith(b"%PDF")
    headers = dict(dynamics="system,mode,time,strength,stderr",
                   ood="system,condition,mode,strength,value",
                   performance="system,trial,value,stderr",
                   outer_loop="outer_step,mode,strength,half_time,value")
    for name, header in headers.items():
        with open(folder / f"{name}.csv") as file:
            rows = list(csv.DictReader(file))
        assert rows and ",".join(rows[0]) == header
        words = "system", "condition"
        assert all(float(row[c]) is not None for row in rows for c in row if c not in words)


def test_a_second_run_redraws_from_the_arrays_alone(tiny):
    before = tables(tiny)
    (tiny / "dynamics.png").unlink()
    (tiny / "dynamics.csv").unlink()
    (tiny / "checkpoint.pt").rename(tiny / "away")
    assert run("linreg", *FEW["linreg"], "--out", tiny) == 0
    (tiny / "away").rename(tiny / "checkpoint.pt")
    assert (tiny / "dynamics.png").exists() and tables(tiny) == before


def test_infinite_and_undefined_are_themselves_in_csv_and_null_in_json(tiny):
    summary = json.loads((tiny / "summary.json").read_text())
    learner = summary["systems"]["learner"]               # 60 steps: nothing is half learned
    assert learner["half_times"] == [None] * 5 and learner["order"] is None
    assert ",inf," in (tiny / "outer_loop.csv").read_text()


def test_the_same_seed_gives_the_same_files_and_no_stream_shifts_another(tiny, tmp_path, undrawn):
    state = torch.get_rng_state()
    assert run("linreg", *FEW["linreg"], "--out", tmp_path / "same") == 0
    assert_close(torch.get_rng_state(), state)
    assert tables(tmp_path / "same") == tables(tiny)
    more = ["--fresh-tasks", 80, "--eval-episodes", 12, "--scales", 1, "--out", tmp_path / "more"]
    assert run("linreg", *FEW["linreg"], *more) == 0
    one, other = (metadyn.load(folder / "results.npz") for folder in (tiny, tmp_path / "more"))
    for name in "learner/strength", "sgd/strength":
        assert (one[name] == other[name]).all()
    saved = [torch.load(folder / "checkpoint.pt")["model"] for folder in (tiny, tmp_path / "more")]
    assert_close(*saved, atol=0, rtol=0)
    assert run("linreg", *FEW["linreg"], "--seed", 1, "--out", tmp_path / "other") == 0
    assert tables(tmp_path / "other") != tables(tiny)


@pytest.mark.parametrize("family", metadyn.FAMILIES)
def test_killed_and_started_again_it_ends_the_same(family, tmp_path, undrawn):
    killed, checkpoint = tmp_path / "killed", tmp_path / "killed" / "checkpoint.pt"
    command = [sys.executable, HERE / "metadyn.py", family, *FEW[family], "--out", killed]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "results.npz").exists()
    for folder in "killed", "whole":
        assert run(family, *FEW[family], "--out", tmp_path / folder) == 0
    assert tables(killed) == tables(tmp_path / "whole")


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_n_and_n_outer_steps_are_2n_outer_steps(tmp_path, optimizer):
    prior = tasks.LinearRegression(2, 0.1, 5)

    def train(path, kill_at=None):
        model = small_meta(prior, 8)

        def loss(generator, share):
            return meta.squared_error_loss(model, prior, 8, generator)

        def report(step, value):
            if step == kill_at:
                raise KeyboardInterrupt

        optimizers = meta.make_optimizers(model, optimizer, 0.05, 0.01)
        snapshots = meta.outer_loop(model, loss, 20, optimizers, seeded(2), path, {},
                                    lambda model: dict(sum=model.head.weight.sum()), report)
        return model.state_dict(), snapshots

    whole = train(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "halves.pt", kill_at=10)
    assert torch.load(tmp_path / "halves.pt")["step"] == 10
    assert_close(train(tmp_path / "halves.pt"), whole, atol=0, rtol=0)


def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    for broken in (lambda w: w.sum() * math.nan), (lambda w: (0 * w).sqrt().sum()):
        model = small_meta(tasks.LinearRegression())
        steps = iter(range(100))

        def loss(generator, share):
            weight = model.head.weight
            value = broken(weight) if next(steps) == 7 else weight.square().sum()
            return value, value

        path = tmp_path / f"{id(broken)}.pt"
        with pytest.raises(FloatingPointError, match="outer step 7"):
            optimizers = meta.make_optimizers(model, "adam", 0, 0.01)
            meta.outer_loop(model, loss, 20, optimizers, seeded(), path, {})
        assert torch.load(path)["step"] == 7


def test_fits_and_films_show_a_member_of_the_ensemble_that_is_measured(tmp_path, undrawn):
    assert run("nonlinreg", *FEW["nonlinreg"], "--out", tmp_path) == 0
    results = metadyn.load(tmp_path / "results.npz")
    f, target = (torch.from_numpy(results[f"fits/{name}"]) for name in ("learner", "target"))
    strength, _ = tasks.fourier_strength(f, target, torch.arange(1, 6))
    assert_close(strength.numpy(), results["learner/strength"][:, 0, 0], atol=1e-4, rtol=1e-4)


def test_a_curve_in_the_figure_is_the_mean_of_what_was_measured(tiny, tmp_path, monkeypatch):
    figures = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.update({path.name: figure}))
    monkeypatch.setattr(plots, "animate", lambda *arguments, **more: None)
    results = metadyn.load(tiny / "results.npz")
    plots.linreg(results, metadyn.summarise(results), tmp_path)
    learner, learned, bayes = figures["dynamics"].axes
    drawn_lines = [line.get_ydata() for line in bayes.lines]
    mean = results["bayes/strength"].mean((1, 2))[:, 0]
    assert any(len(line) == len(mean) and np.allclose(line, mean) for line in drawn_lines)
    assert "index" in " ".join(text.get_text() for text in bayes.texts)


@pytest.mark.parametrize("family, options", [
    ("linreg", "--dim 3 --singular-values 1.5 0.8 0.4 --noise 0.3 --trials 12"),
    ("linreg", "--dim 1 --singular-values 2 --trials 2"),
    ("nonlinreg", "--frequencies 3 --noise 0"),
    ("bandit", "--contexts 3 --actions 4 --context-rates 1 0 2"), ("bandit", "--contexts 1"),
    ("linreg", "--core attention --outer-optimizer adam"), ("bandit", "--core attention")])
def test_other_settings(family, options, tmp_path, undrawn):
    assert run(family, *FEW[family], *options.split(), "--out", tmp_path) == 0
    results = metadyn.load(tmp_path / "results.npz")
    assert np.isfinite(results["meta/strength"]).all()


def test_all_families_and_seeds_make_one_overview_and_are_run_but_once(
        tmp_path, monkeypatch, capsys, undrawn):
    few = dict(hidden=8, outer_steps=10, batch=8, eval_tasks=2, eval_episodes=8, fresh_tasks=64,
               learner_steps=20)
    monkeypatch.setattr(metadyn, "QUICK", dict(
        linreg=few | dict(clock_episodes=2, clock_steps=20),
        nonlinreg=few | dict(learner_hidden=8, clock_episodes=2, clock_steps=5, bandpass_steps=5),
        bandit=few | dict(learner_starts=4, scaling=[2])))
    command = ["all", "--quick", "--seeds", 2, "--device", "cpu", "--out", tmp_path]
    assert run(*command) == 0
    with open(tmp_path / "seeds.csv") as file:
        rows = list(csv.DictReader(file))
    for family in metadyn.FAMILIES:
        kappas = [float(row["value"]) for row in rows
                  if row["family"] == family and row["measure"] == "captured"]
        folders = tmp_path / family, tmp_path / family / "seed1"
        assert kappas == [json.loads((f / "summary.json").read_text())["captured"] for f in folders]
    before = (tmp_path / "overview.csv").read_bytes()
    monkeypatch.setattr(metadyn, "outer_loop", None)      # nothing is trained again
    assert run(*command) == 0 and (tmp_path / "overview.csv").read_bytes() == before


@pytest.mark.parametrize("arguments, words", [
    ("", "FAMILY"),
    ("cubreg", "FAMILY: invalid choice: 'cubreg'"),
    ("linreg --noise -1", "--noise: -1.0 given, allowed: at least 0"),
    ("linreg --noise nan", "--noise: nan given"),
    ("linreg --trials 0", "--trials: 0 given, allowed: at least 2"),
    ("linreg --trials 2.5", "--trials"),
    ("linreg --singular-values 1 2 3 4 0", "--singular-values: 0.0 given, allowed: more than 0"),
    ("linreg --singular-values 1 2", "--singular-values: 2 given, allowed: as many as --dim, 5"),
    ("linreg --outer-optimizer sgd", "--outer-optimizer: sgd given, allowed: muon, adam"),
    ("linreg --core attention --hidden 6", "--hidden: 6 given, allowed: a multiple of 4"),
    ("linreg --core gru", "--core: gru given, allowed: lstm, attention"),
    ("nonlinreg --learner-grid 10", "--learner-grid: 10 given, allowed: more than twice"),
    ("bandit --actions 1", "--actions: 1 given, allowed: at least 2"),
    ("bandit --context-rates 1 1", "--context-rates: 2 given, allowed: as many as --contexts, 5"),
    ("bandit --context-rates 0 0 0 0 0", "--context-rates: 0 given, allowed: not all"),
    ("linreg --seeds 0", "--seeds: 0 given"),
    ("linreg --colour red", "--colour"),
    ("linreg --out /dev/null/run", "--out: /dev/null/run given"),
    pytest.param("linreg --device cuda", "--device: cuda given, allowed: on this machine ",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")),
])
def test_a_mistake_ends_in_one_line_and_status_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err, err
    assert not list(tmp_path.iterdir())


def test_mistakes_from_python_and_settings_of_other_types(tmp_path):
    for wrong in dict(noise="much"), dict(trials=2.5), dict(singular_values=3), dict(scales=[0]):
        with pytest.raises(metadyn.Mistake, match="--" + next(iter(wrong)).replace("_", "-")):
            metadyn.run("linreg", out=tmp_path / "none", **wrong)
    config = metadyn.configure("linreg", True, dict(singular_values=(0.5, np.float64(1.4))))
    assert config.singular_values == [1.4, 0.5] and type(config.singular_values[0]) is float


def test_a_folder_of_other_settings_is_left_alone_unless_fresh(tiny, tmp_path, capsys, undrawn):
    shutil.copytree(tiny, tmp_path / "run")
    other = ["linreg", *FEW["linreg"], "--noise", 0.2, "--out", tmp_path / "run"]
    assert run(*other) == 2
    assert "noise 0.1 there, 0.2 here" in capsys.readouterr().err
    assert tables(tmp_path / "run") == tables(tiny)
    assert run(*other, "--fresh") == 0
    assert tables(tmp_path / "run") != tables(tiny)


@pytest.mark.parametrize("file", ["checkpoint.pt", "config.json", "results.npz"])
def test_a_file_that_cannot_be_read_is_named(tiny, tmp_path, capsys, file):
    shutil.copytree(tiny, tmp_path / "run")
    if file == "checkpoint.pt":
        (tmp_path / "run" / "results.npz").unlink()
    damaged = (tmp_path / "run" / file).read_bytes()[:-20]
    (tmp_path / "run" / file).write_bytes(damaged)
    assert run("linreg", *FEW["linreg"], "--out", tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert file in err and "--fresh" in err and err.strip().count("\n") == 0
    assert (tmp_path / "run" / file).read_bytes() == damaged


def test_a_full_disk_leaves_the_last_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    meta.replace_file(path, b"before")

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError):
        meta.replace_file(path, b"after")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_control_c_says_how_to_go_on_and_a_learner_that_diverges_how_not_to(
        tmp_path, capsys, monkeypatch):
    options = *FEW["linreg"], "--out", tmp_path
    assert run("linreg", *options, "--learner-lr", 100) == 1
    assert "smaller learning rate" in capsys.readouterr().err

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(learners, "linear_network", interrupt)
    assert run("linreg", *options, "--fresh") == 130
    assert "without --fresh, goes on" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["tasks", "learners", "plots"])
def test_a_leaf_module_imports_alone(module, tmp_path):
    shutil.copy(HERE / f"{module}.py", tmp_path)
    environment = {"PATH": os.environ["PATH"]}
    subprocess.run([sys.executable, "-c", f"import {module}"], cwd=tmp_path, check=True,
                   env=environment)


README = (HERE / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_of_the_readme_run_as_printed(example, tmp_path):
    for module in "tasks", "learners", "plots", "meta", "metadyn":
        if module in ("tasks", "learners", "plots") or "metadyn" in example:
            shutil.copy(HERE / f"{module}.py", tmp_path)
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    promised = re.search(r"print\(.*# ([\d.]+)", example)
    if promised:
        printed = float(re.findall(r"\d+\.?\d*", done.stdout)[-1])
        assert abs(printed - float(promised[1])) < 0.15 * float(promised[1])
