"""python -m pytest: analytic truth first, then metamorphic relations, statistics, negative controls, and plumbing last."""
import copy
import csv
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
save = plots.save


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(prior, n=64, seed=0):
    """A prior, and n tasks of it with an episode each."""
    generator = seeded(seed)
    W = prior.sample(n, generator)
    return prior, W, *prior.episodes(W, generator)


def regression(dim=5, noise=0.1, trials=20, n=64, seed=0):
    return drawn(tasks.LinearRegression(dim, noise, trials), n, seed)


def small_meta(prior, hidden=16, seed=1, layers=2):
    return meta.MetaLearner(prior.input_size, prior.outputs, hidden, seeded(seed), layers)


# ---------------------------------------------------------------- analytic truth

S = torch.tensor([1.6, 1.2, 0.9, 0.6, 0.3], dtype=torch.float64)


def deep_linear_error(lr, tau=1.0):
    W = tasks.random_orthogonal(2, 5, seeded()).double()
    target = W[:1] * S @ W[1:].mT
    steps, maps = learners.linear_network(target, lr, round(20 / lr), "aligned", 1e-3)
    U, s, Vh = torch.linalg.svd(target)
    theory = learners.deep_linear_theory(S, 1e-3, steps * lr / tau) / S
    return (tasks.mode_strength(maps, U, Vh.mT, s)[:, 0] - theory).abs().max().item()


def test_deep_linear_modes_follow_the_logistic_solution_with_an_error_of_first_order():
    errors = [deep_linear_error(lr) for lr in (0.02, 0.01, 0.005)]
    assert errors[1] < 0.02
    for coarse, fine in zip(errors, errors[1:]):
        assert 1.9 < coarse / fine < 2.1


def test_deep_linear_time_inverts_the_logistic_solution():
    t = learners.deep_linear_time(S, 1e-3, S / 2)
    assert t.shape == (5,)
    assert_close(learners.deep_linear_theory(S, 1e-3, t).diagonal(), S / 2)


def test_shallow_network_follows_its_closed_form_on_one_clock():
    target = torch.diag(S)[None]
    steps, maps = learners.linear_network(target, 0.001, 5000, "shallow", 0.2, generator=seeded())
    w = maps[:, 0].diagonal(dim1=-2, dim2=-1)
    assert w[0].abs().min() > 0.01
    assert_close(w, learners.shallow_theory(S, w[0], steps * 0.001), atol=1e-3, rtol=0)
    strength = learners.linear_network(target, 0.001, 5000, "shallow", 0.0, generator=seeded())[1][:, 0].diagonal(dim1=-2, dim2=-1) / S
    assert_close(learners.staggering_index(learners.half_time(strength.T, steps.double())).item(), 1.0)


def test_muon_learns_every_mode_at_one_rate_and_so_the_weakest_first():
    steps, maps = learners.linear_network(torch.diag(S)[None], 0.01, 200, "aligned", 1e-6, optimizer="muon")
    u, theory = maps[:, 0].diagonal(dim1=-2, dim2=-1), learners.muon_theory(S, 1e-6, steps * 0.01)
    rising = theory < 0.9 * S                             # momentum overshoots afterwards
    assert rising.sum() > 300
    assert_close((u / S)[rising], (theory / S)[rising], atol=0.02, rtol=0)
    half = learners.half_time((u / S).T, steps.double())
    assert (half.diff() < 0).all()
    assert_close(learners.staggering_index(half).item(), (1.6 / 0.3) ** 0.5, rtol=0.02, atol=0)


@pytest.mark.parametrize("prior", [tasks.LinearRegression(), tasks.LinearRegression(3, 0.3, 12), tasks.LinearRegression(1, 1.0, 4),
                                   tasks.FourierRegression(), tasks.FourierRegression([1, 2, 3], 0.25, 17), tasks.FourierRegression([7, 9])])
def test_sequential_posterior_is_the_batch_posterior(prior):
    prior, _, x, y = drawn(prior)
    bayes = tasks.Bayes(prior)
    means, covariances = bayes.posterior(x, y)
    assert means.shape == (64, prior.trials + 1, prior.outputs, prior.n_features)
    M, P = bayes.batch_posterior(x, y)
    assert_close(means[:, -1], M, atol=1e-10, rtol=0)
    assert_close(covariances[:, -1], P, atol=1e-10, rtol=0)


def test_the_posterior_of_a_band_limited_function_is_that_of_a_gaussian_process():
    prior, _, x, y = drawn(tasks.FourierRegression([2, 3, 5]), n=3)
    xq = prior.queries().double()

    def kernel(a, b):                                     # k(x, x') = 1/K sum_k cos 2 pi k (x - x')
        return (2 * math.pi * (a[..., :, None, 0] - b[..., None, :, 0])[..., None] * prior.frequencies).cos().mean(-1)

    x, y = x.double(), y.double()
    expected = kernel(xq.expand(3, -1, -1), x) @ torch.linalg.solve(kernel(x, x) + 0.01 * torch.eye(40, dtype=torch.float64), y)
    assert_close(tasks.Bayes(prior).query(x, y, xq)[:, -1], expected, atol=1e-10, rtol=0)


def test_parseval_and_the_strength_of_a_function_in_itself():
    prior, W, *_ = drawn(tasks.FourierRegression([1, 4, 6]), n=5)
    f = (prior.features(prior.queries().double()) @ W.double().mT)[..., 0]
    assert_close(f.square().mean(-1), W.double().square().sum((-2, -1)) / 2)
    strength, outside = tasks.fourier_strength(f, f, prior.frequencies)
    assert_close(strength, torch.ones(5, 3, dtype=torch.float64))
    assert outside.max() < 1e-12
    _, outside = tasks.fourier_strength(f, f, prior.frequencies[:1])
    assert_close(outside, W.double().square().sum((-2, -1)) / W.double()[:, 0, [0, 3]].square().sum(-1) - 1, rtol=1e-4, atol=0)


def rates_of_change(logits, correct, dt=1e-6):
    """dJ/dt of the shared-bias Learner in each context, for J the sum over contexts, by one small step."""
    C = correct.shape[1]
    J = learners.policy_gradient(correct, logits, dt * C, [0, 1])
    return (J[1] - J[0]) / dt, J[0]


def test_two_contexts_and_two_actions_interfere_as_derived():
    logits = torch.randn(50, 2, 2, generator=seeded(), dtype=torch.float64)
    rate, J = rates_of_change(logits, torch.tensor([[0, 1]]).expand(50, 2))
    g = J * (1 - J)
    assert_close(rate, 2 * g * (2 * g - g.flip(1)), atol=1e-5, rtol=0)


def test_gradients_of_two_contexts_have_cosine_minus_one_half():
    logits, correct = torch.randn(50, 2, 2, generator=seeded(), dtype=torch.float64), torch.tensor([[0, 1]]).expand(50, 2)
    gradients = []
    for only in torch.eye(2, dtype=torch.float64):                    # the gradient of one context's J, in W and in the shared b
        in_logits = learners.reward_gradient(logits, correct, only)
        gradients.append(torch.cat([in_logits.flatten(1), in_logits.sum(1)], 1))
    assert_close(torch.cosine_similarity(*gradients), torch.full((50,), -0.5, dtype=torch.float64))


def test_reward_gradient_is_that_of_autograd():
    logits, correct = torch.randn(7, 3, 4, generator=seeded(), requires_grad=True), torch.randint(4, (7, 3), generator=seeded())
    rates = torch.tensor([0.5, 0.3, 0.2])
    (rates * logits.softmax(-1).gather(-1, correct[..., None])[..., 0]).sum().backward()
    assert_close(learners.reward_gradient(logits.detach(), correct, rates), logits.grad)


@pytest.mark.parametrize("prior", [tasks.ContextualBandit(), tasks.ContextualBandit(3, 4, 25), tasks.ContextualBandit(1, 2, 5), tasks.ContextualBandit(2, 3, 20, [3.0, 1.0])])
def test_bayes_learning_curve_by_formula_and_by_simulation(prior):
    generator = seeded()
    _, J = prior.play(tasks.BayesAgent(), *prior.episodes(prior.sample(4000, generator), generator))
    curve = prior.bayes_curve()
    assert J.shape == (4000, prior.trials + 1, prior.contexts) and curve.shape == (prior.trials + 1, prior.contexts)
    assert_close(curve[0], torch.full((prior.contexts,), 1 / prior.actions, dtype=torch.float64))
    largest_sd = (curve * (1 - curve)).clamp_min(0).sqrt()                # of anything in [0, 1] with that mean
    assert ((J.mean(0) - curve).abs() <= 4 * largest_sd / 4000 ** 0.5 + 4 / 4000).all()


def test_bayes_without_noise_knows_the_task_after_dim_trials():
    prior, W, x, y = regression(noise=0.0)
    assert_close(tasks.Bayes(prior).predict(x, y)[:, 8:], y[:, 8:], atol=1e-3, rtol=0)


def test_gradient_of_the_outer_loop_is_that_of_finite_differences():
    prior, _, x, y = regression(dim=2, trials=3, n=2)
    model = small_meta(prior, hidden=3).double()
    assert torch.autograd.gradcheck(model.predict, (x.double(), y.double().requires_grad_()))


def test_half_time_interpolates_and_says_when_a_mode_is_not_reached():
    time = torch.tensor([0.0, 10.0, 20.0])
    strength = torch.tensor([[0.0, 0.25, 0.75], [0.6, 0.7, 0.8], [0.0, 0.1, 0.2], [0.0, 1.0, 0.0]])
    assert_close(learners.half_time(strength, time), torch.tensor([15.0, 0.0, math.inf, 5.0]))
    assert_close(learners.staggering_index(torch.tensor([[2.0, 3.0], [2.0, math.inf], [math.inf, math.inf]])), torch.tensor([1.5, math.inf, math.inf]))


def test_time_must_be_the_last_axis_of_strengths():
    with pytest.raises(ValueError, match="does not end in the 3 times"):
        learners.half_time(torch.zeros(3, 5), torch.arange(3.0))


def test_captured_fraction_and_its_interval():
    prior, meta_loss, bayes = torch.full((500,), 1.0), 0.3 + 0.1 * torch.randn(500, generator=seeded()), torch.full((500,), 0.2)
    assert_close(learners.captured_fraction(prior, bayes, bayes).item(), 1.0)
    low, high = learners.bootstrap_interval(learners.captured_fraction, prior, meta_loss, bayes, generator=seeded())
    assert low < learners.captured_fraction(prior, meta_loss, bayes) < high
    assert_close(high - low, 2 * 1.96 * 0.1 / 0.8 / 500 ** 0.5, rtol=0.15, atol=0)


def test_linear_probe_finds_a_map_and_says_what_is_not_linear():
    prior, W, *_ = regression(n=3)
    xq = prior.queries(seeded())
    found, residual, total = tasks.linear_probe(xq @ W.mT, xq)
    assert_close(found, W, atol=1e-5, rtol=1e-5)
    assert (residual / total).max() < 1e-8
    found, residual, total = tasks.linear_probe(torch.ones(3, len(xq), 5), xq)
    assert_close(found, torch.zeros(3, 5, 5), atol=1e-6, rtol=0)
    assert_close(residual, total)
    found, residual, total = tasks.linear_probe((20 * xq).sin(), xq)           # odd, and as good as random
    assert 1 - residual.sum() / total.sum() < 0.5


# ---------------------------------------------------------------- metamorphic

def test_rotating_inputs_rotates_the_weights_and_keeps_the_spectrum_and_the_predictions():
    prior, _, x, y = regression()
    R = tasks.random_orthogonal(1, 5, seeded(3))[0]
    bayes = tasks.Bayes(prior)
    M, turned = (bayes.posterior(z.double(), y)[0][:, -1] for z in (x, x @ R.mT))
    assert_close(turned, M @ R.double().mT, atol=1e-5, rtol=1e-5)
    assert_close(torch.linalg.svdvals(turned), torch.linalg.svdvals(M), atol=1e-5, rtol=1e-5)
    assert_close(bayes.predict(x @ R.mT, y), bayes.predict(x, y), atol=1e-4, rtol=1e-4)


def test_a_shifted_copy_of_a_target_is_not_the_target():
    x, k = torch.arange(64.0) / 64, torch.tensor([1, 2, 3])

    def f(x):
        return (2 * math.pi * k * x[:, None]).sin().sum(-1)

    strength, _ = tasks.fourier_strength(f(x - 0.1), f(x), k)
    assert_close(strength, (2 * math.pi * k * 0.1).cos(), atol=1e-5, rtol=0)


def test_turning_the_circle_turns_what_bayes_believes():
    prior, _, x, y = drawn(tasks.FourierRegression())
    bayes, xq = tasks.Bayes(prior), prior.queries()
    assert_close(bayes.predict((x + 0.3) % 1, y), bayes.predict(x, y), atol=1e-4, rtol=0)
    assert_close(bayes.query((x + 0.3) % 1, y, (xq + 0.3) % 1), bayes.query(x, y, xq), atol=1e-4, rtol=0)


def test_a_relu_network_does_not_know_of_its_ensemble():
    x, target = torch.arange(20.0) / 20, torch.randn(3, 20, generator=seeded())
    changed = torch.cat([target[:2], -target[2:]])
    (steps, f), (_, g) = (learners.relu_network(x, y, 1e-2, 30, 8, 2, 10, seeded(1)) for y in (target, changed))
    assert steps.tolist() == [0, 10, 20, 30] and f.shape == (4, 3, 20)
    assert_close(f[:, :2], g[:, :2], atol=0, rtol=0)
    assert_close(f[0], g[0], atol=0, rtol=0)
    assert (f[-1, 2] - g[-1, 2]).abs().max() > 0.1


def bandit_agent(prior, seed=1):
    return meta.MetaAgent(meta.MetaLearner(2 * prior.contexts, prior.actions + 1, 16, seeded(seed)))


@pytest.mark.parametrize("make", [lambda prior: tasks.BayesAgent(), bandit_agent])
def test_an_agent_learns_from_its_past_alone(make):
    prior = tasks.ContextualBandit()
    correct, contexts, luck = prior.episodes(prior.sample(64, seeded()), seeded())
    changed = contexts.clone()
    changed[:, 9:] = changed[:, 9:].flip(1)
    (_, J), (_, K) = (prior.play(make(prior), correct, c, luck) for c in (contexts, changed))
    assert_close(J[:, :10], K[:, :10], atol=0, rtol=0)
    assert (J[:, 10:] - K[:, 10:]).abs().max() > 0


def test_permuting_actions_permutes_the_policy():
    prior, permutation = tasks.ContextualBandit(3, 4), torch.tensor([2, 0, 3, 1])
    correct, logits = prior.sample(20, seeded()), torch.randn(20, 3, 4, generator=seeded())
    J, K = (learners.policy_gradient(c, z, 0.5, [0, 10, 50]) for c, z in ((correct, logits), (permutation[correct], logits[..., permutation.argsort()])))
    assert_close(J, K)
    agent, other = tasks.BayesAgent(), tasks.BayesAgent()
    for each, rename in (agent, torch.arange(4)), (other, permutation):
        each.begin(20, prior)
        for action, reward in ((0, 0.0), (3, 0.0), (1, 1.0)):
            each.observe(torch.arange(20) % 3, rename[torch.full((20,), action)], torch.full((20,), reward))
    assert_close(other.policy()[..., permutation], agent.policy())


def test_a_rollout_is_what_the_agent_plays():
    prior = tasks.ContextualBandit(3, 4, 25)
    episodes = prior.episodes(prior.sample(32, seeded()), seeded())
    agent = bandit_agent(prior)
    with torch.no_grad():
        inputs, action, reward = agent.roll_out(*episodes, prior)
    assert inputs.shape == (32, 25, 11) and action.shape == (32, 25)
    assert_close(reward, prior.play(agent, *episodes)[0])


@pytest.mark.parametrize("make", [tasks.Bayes, small_meta])
def test_predictions_use_the_past_alone_and_all_of_it(make):
    prior, _, x, y = regression(n=4)
    predictor, changed = make(prior), y.clone()
    changed[:, 7] += 1
    before, after = predictor.predict(x, y), predictor.predict(x, changed)
    assert before.shape == y.shape
    assert_close(before[:, :8], after[:, :8], atol=0, rtol=0)
    assert ((before - after)[:, 8:].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("make", [tasks.Prior, tasks.Bayes, small_meta])
def test_what_is_held_in_mind_before_a_trial_is_what_is_answered_in_it(make):
    prior, _, x, y = regression(n=1, trials=6)
    predictor = make(prior)
    answers = predictor.query(x, y, x[0])
    assert answers.shape == (1, 7, 6, 5)
    assert_close(answers[0, :-1].diagonal(dim1=0, dim2=1).T, predictor.predict(x, y)[0])


@pytest.mark.parametrize("optimizer", learners.OPTIMIZERS)
def test_a_learner_does_not_know_of_its_ensemble(optimizer):
    target = regression(n=3)[1]
    _, together = learners.linear_network(target, 0.01, 20, "aligned", 0.1, optimizer)
    _, alone = learners.linear_network(target[1:2], 0.01, 20, "aligned", 0.1, optimizer)
    assert together.shape == (21, 3, 5, 5)
    assert_close(together[:, 1:2], alone, atol=1e-5, rtol=1e-5)


def test_modes_are_signed_and_never_sorted_anew():
    U, V = tasks.random_orthogonal(2, 5, seeded()).double()
    W = U * S @ V.mT
    assert_close(tasks.mode_strength(W, U, V, S), torch.ones(5, dtype=torch.float64))
    wrong = U * torch.tensor([0.0, 0, 0, 0, -3.0]) @ V.mT
    assert_close(tasks.mode_strength(wrong, U, V, S), torch.tensor([0, 0, 0, 0, -10.0], dtype=torch.float64), atol=1e-5, rtol=0)
    assert tasks.off_diagonal(W, U, V, S) < 1e-6 < 0.5 < tasks.off_diagonal(W, V, U, S)


# ---------------------------------------------------------------- statistics, seeded

def within_4_standard_errors(samples, expected):
    return abs(samples.mean() - expected) < 4 * samples.std() / len(samples) ** 0.5


def test_moments_of_the_sampler():
    prior, W, x, y = regression(n=4000)
    for samples, expected in ((W[:, 0, 1] ** 2, 0.2), (x[:, 3, 2] ** 2, 1), (x[:, 0, 0] * x[:, 1, 0], 0), (W[:, 2, 2], 0),
                              ((y - x @ W.mT)[:, 5, 1] ** 2, 0.01), (y[:, 4, 0] ** 2, 1.01), (tasks.random_orthogonal(4000, 5, seeded())[:, 0, 0] ** 2, 0.2)):
        assert within_4_standard_errors(samples, expected)
    prior, W, x, y = drawn(tasks.FourierRegression([2, 3]), n=4000)
    for samples, expected in ((W[:, 0, 3] ** 2, 0.5), (x[:, 7, 0], 0.5), (y[:, 3, 0] ** 2, 1.01), ((2 * math.pi * x[:, 0, 0]).cos(), 0)):
        assert within_4_standard_errors(samples, expected)


class Ridge(tasks.Bayes):
    """Bayes with a wrong idea of the noise: the best of the naive baselines."""

    def __init__(self, prior):
        super().__init__(prior)
        self.prior = copy.copy(prior)
        self.prior.noise = 0.5


@pytest.mark.parametrize("make", [tasks.Prior, Ridge, small_meta])
@pytest.mark.parametrize("prior", [tasks.LinearRegression(), tasks.FourierRegression()])
def test_nothing_beats_bayes(prior, make):
    prior, _, x, y = drawn(prior, n=2000)
    excess = (prior.losses(make(prior), x, y) - prior.losses(tasks.Bayes(prior), x, y)).mean(1)
    assert excess.mean() > 4 * excess.std() / 2000 ** 0.5


def test_a_relu_network_learns_low_frequencies_first():
    x, k = torch.arange(100.0) / 100, torch.tensor([1, 2, 4])
    target = (2 * math.pi * (k * x[:, None] + torch.rand(4, 1, 3, generator=seeded()))).sin().sum(-1)
    steps, f = learners.relu_network(x, target, 3e-3, 600, 64, 3, 10, seeded(1))
    half = learners.geometric_mean(learners.half_time(tasks.fourier_strength(f, target, k)[0].movedim(0, -1), steps.double()).T)
    assert (half.diff() > 0).all() and half[-1] > 2 * half[0]


def test_the_sampled_policy_gradient_is_unbiased():
    logits, correct = torch.randn(1, 3, 4, generator=seeded()), torch.tensor([[0, 2, 1]])
    rates = torch.tensor([0.5, 0.3, 0.2])
    samples = learners.sampled_gradient(logits.expand(20000, -1, -1), correct.expand(20000, -1), rates, 2, seeded(1))
    exact = learners.reward_gradient(logits, correct, rates)[0]
    assert ((samples.mean(0) - exact).abs() < 4 * samples.std(0) / 20000 ** 0.5).all()


def test_no_agent_beats_bayes():
    prior = tasks.ContextualBandit(3, 4, 25)
    episodes = prior.episodes(prior.sample(4000, seeded()), seeded())
    best = prior.losses(tasks.BayesAgent(), *episodes)
    for agent in (tasks.UniformAgent(), bandit_agent(prior)):
        excess = (prior.losses(agent, *episodes) - best).mean(1)
        assert excess.mean() > 4 * excess.std() / 4000 ** 0.5


def test_a_shared_bias_staggers_and_own_biases_do_not():
    prior, generator = tasks.ContextualBandit(), seeded()
    correct, logits, steps = prior.sample(200, generator), 0.1 * torch.randn(200, 5, 5, generator=generator), range(0, 2000, 5)
    shared, own = (learners.describe(prior.strength(learners.policy_gradient(correct, logits, 0.2, steps, each)), torch.tensor(steps), generator) for each in (True, False))
    assert shared["staggering"] > 2 and shared["staggering"] > 2 * own["staggering"]


def test_a_short_outer_loop_by_policy_gradient_captures_half(tmp_path):
    prior, generator = tasks.ContextualBandit(2, 3, 12), seeded(1)
    model = meta.MetaLearner(4, 4, 32, seeded(2))

    def loss(model, generator, share):
        return meta.policy_gradient_loss(meta.MetaAgent(model), prior, 64, 0.05 * (1 - share), generator)

    meta.outer_loop(model, loss, 250, meta.make_optimizers(model, "muon", 0.03, 0.01), generator, tmp_path / "checkpoint.pt", {})
    episodes = prior.episodes(prior.sample(2000, generator), generator)
    assert 0.5 < learners.captured_fraction(*(prior.losses(a, *episodes).mean(1) for a in (tasks.UniformAgent(), meta.MetaAgent(model), tasks.BayesAgent()))) < 1.02


def test_bayes_meets_no_interference_and_a_shared_bias_does():
    prior = tasks.ContextualBandit()
    episodes = prior.episodes(prior.sample(500, seeded()), seeded())
    _, J = prior.play(tasks.BayesAgent(), *episodes)
    for chance, gain, visits in tasks.interference(J[:, :-1], J[:, 1:], prior.first_visits(episodes[1])):
        assert chance == 1 and visits > 50 and abs(gain - 0.2) < 4 * 0.4 / visits ** 0.5
    J = learners.policy_gradient(prior.sample(50, seeded()), torch.randn(50, 5, 5, generator=seeded()), 0.5, range(300))
    assert min(chance for chance, _, _ in tasks.interference(J[:-1], J[1:], J[1:] >= 0)) < 0.9


def test_the_order_of_equally_good_actions_is_no_staggering_once_names_are_shuffled():
    prior, steps = tasks.ContextualBandit(), torch.arange(61.0)
    index = [learners.describe(prior.inner_loop(tasks.OrderedBayesAgent(), prior.sample(4, seeded()), 1000, seeded(), relabel)[0], steps, seeded())["staggering"]
             for relabel in (True, False)]
    assert index[0] < 1.15 and index[1] > 1.5


def test_bayes_suppresses_what_its_prior_excludes():
    low, high = tasks.FourierRegression([1, 2, 3]), tasks.FourierRegression([5, 6])
    W = high.evaluation_tasks(2, torch.ones(2), seeded())
    strength, _ = high.inner_loop(tasks.Bayes(low), W, 10, seeded())
    assert_close(strength, torch.zeros(41, 2, 2), atol=1e-5, rtol=0)


def test_bayes_learns_all_modes_together():
    prior, generator = tasks.LinearRegression(), seeded()
    W = prior.evaluation_tasks(2, S.float(), generator)
    strength, others = prior.inner_loop(tasks.Bayes(prior), W, 1000, generator)
    assert strength.shape == (21, 2, 5)
    assert learners.describe(strength, torch.arange(21.0), generator)["staggering"] < 1.1
    assert others["r_squared"].min() > 0.999


def short_outer_loop(folder, steps=300, blind=False):
    """A Meta-Learner after a short outer loop on 2-dimensional regression, and kappa on fresh tasks. Blind: it never sees y."""
    prior, generator = tasks.LinearRegression(2, 0.1, 10), seeded(5)
    model = meta.MetaLearner(2, 2, 32, seeded(6))

    def see(y):
        return torch.zeros_like(y) if blind else y

    def loss(model, generator, share):
        x, y = prior.episodes(prior.sample(64, generator), generator)
        value = (model.predict(x, see(y)) - y).square().mean()
        return value, value

    meta.outer_loop(model, loss, steps, meta.make_optimizers(model, "muon", 0.03, 0.01), generator, folder / "checkpoint.pt", {})
    x, y = prior.episodes(prior.sample(1000, generator), generator)
    with torch.no_grad():
        never, bayes = (prior.losses(p, x, y).mean(1) for p in (tasks.Prior(prior), tasks.Bayes(prior)))
        return learners.captured_fraction(never, (model.predict(x, see(y)) - y).square().mean((1, 2)), bayes).item()


def test_a_short_outer_loop_captures_half_of_what_bayes_gains(tmp_path):
    assert 0.5 < short_outer_loop(tmp_path) < 1.01


# ---------------------------------------------------------------- negative controls: broken, the check must fail

def test_a_wrong_time_constant_is_seen():
    assert deep_linear_error(0.01, tau=1.1) > 0.1


def test_a_meta_learner_that_never_sees_y_captures_nothing(tmp_path):
    assert short_outer_loop(tmp_path, blind=True) < 0.02


def test_a_meta_learner_whose_state_is_never_passed_on_is_seen():
    class Forgetful(meta.MetaLearner):
        def predict(self, x, y):
            inputs = torch.cat([x, meta.delayed(y)[:, :-1]], -1)
            return self(inputs.flatten(0, 1)[:, None])[0].view(y.shape)

    with pytest.raises(AssertionError):
        test_predictions_use_the_past_alone_and_all_of_it(lambda prior: Forgetful(prior.input_size, prior.outputs, 16, seeded()))


def test_staggered_strengths_have_a_large_index():
    time = torch.arange(0.0, 100)
    strength = torch.sigmoid((time[:, None, None] - torch.tensor([20.0, 80.0])) / 3).expand(-1, 4, -1)
    summary = learners.describe(strength, time, seeded())
    assert_close(summary["staggering"], 4.0, atol=0.05, rtol=0)
    assert_close(summary["half_times"], [20.0, 80.0], atol=0.1, rtol=0)


# ---------------------------------------------------------------- plumbing

TINY = "--hidden 8 --outer-steps 40 --batch 8 --eval-tasks 2 --eval-episodes 16 --fresh-tasks 64 --learner-steps 60 --device cpu".split()
TINY_BANDIT = [*TINY, *"--trials 12 --learner-seeds 6 --scaling 2 3".split()]
TINY_NONLINREG = [*TINY, *"--trials 10 --learner-hidden 8 --learner-layers 2 --learner-grid 32 --bandpass-steps 40".split()]


def run(*arguments):
    return metadyn.main([str(a) for a in arguments])


def tables(folder):
    """The bytes of a run's CSV files by name, and its summary without the seconds."""
    summary = json.loads((folder / "summary.json").read_text())
    summary.pop("seconds")
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.csv"))} | dict(summary=summary)


@pytest.fixture
def figures():
    """Asked for by tests that look at figures."""


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Rendering is most of a tiny run's time: leave it out where no figure is looked at."""
    if "figures" not in request.fixturenames:
        monkeypatch.setattr(plots, "save", lambda figure, path: None)
    monkeypatch.setattr(plots, "animate", lambda figure, show, frames, path: show(0))          # the quick runs make true ones


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "run"
    assert run("linreg", *TINY, "--out", folder) == 0
    return folder


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A folder in which to run things."""
    return tmp_path_factory.mktemp("quick")


@pytest.mark.parametrize("family", metadyn.FAMILIES)
def test_a_quick_run_from_the_command_line(family, quick):
    done = subprocess.run([sys.executable, HERE / "metadyn.py", family, "--quick"], cwd=quick, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "staggering index" in done.stdout and "κ" in done.stdout and "of the matrix product's" in done.stderr
    folder = quick / "runs" / family
    for name, header in metadyn.COLUMNS.items():
        if not (folder / f"{name}.csv").exists():
            assert name in dict(linreg=["fits", "runs", "interference", "scaling"], nonlinreg=["runs", "interference", "scaling"], bandit=["fits", "probe"])[family]
            continue
        with open(folder / f"{name}.csv") as file:
            lines = list(csv.DictReader(file))
        assert lines and list(lines[0]) == header.split(",")
        for line in lines:
            for column, cell in line.items():
                assert column in ("system", "condition", "reading", "deviation") or cell == "not reached" or math.isfinite(float(cell)), (name, line)
    for figure in ("dynamics", "outer_loop", "ood"):
        assert (folder / f"{figure}.png").read_bytes().startswith(b"\x89PNG") and (folder / f"{figure}.pdf").read_bytes().startswith(b"%PDF")
    for animation in dict(linreg=["spectra"], nonlinreg=["fits"], bandit=[])[family]:
        assert (folder / f"{animation}.gif").read_bytes().startswith(b"GIF8") and (folder / f"{animation}.gif").stat().st_size < 2e6
    summary = json.loads((folder / "summary.json").read_text())
    assert {"learner", "meta", "bayes", "captured", "captured_ci", "seconds"} <= set(summary)
    assert {"half_times", "staggering", "staggering_ci"} <= set(summary["learner"])


def test_a_second_run_redraws_from_the_files_alone(tiny, figures):
    before = tables(tiny)
    (tiny / "dynamics.png").unlink()
    (tiny / "checkpoint.pt").rename(tiny / "away")
    assert run("linreg", *TINY, "--out", tiny) == 0
    (tiny / "away").rename(tiny / "checkpoint.pt")
    assert (tiny / "dynamics.png").exists() and tables(tiny) == before


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tiny, tmp_path):
    assert run("linreg", *TINY, "--out", tmp_path / "same") == 0
    assert tables(tmp_path / "same") == tables(tiny)
    assert run("linreg", *TINY, "--seed", 1, "--out", tmp_path / "other") == 0
    assert tables(tmp_path / "other")["performance.csv"] != tables(tiny)["performance.csv"]


def test_no_run_touches_the_global_generator(tmp_path):
    state = torch.get_rng_state()
    assert run("linreg", *TINY, "--out", tmp_path) == 0
    assert_close(torch.get_rng_state(), state)


@pytest.mark.parametrize("family, options, wait_for", [("linreg", TINY, "checkpoint.pt"), ("nonlinreg", TINY_NONLINREG, "checkpoint_bandpass.pt"), ("bandit", TINY_BANDIT, "checkpoint.pt")])
def test_killed_and_started_again_it_ends_the_same(family, options, wait_for, tmp_path):
    command = [sys.executable, HERE / "metadyn.py", family, *options, "--out", tmp_path / "killed"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not (tmp_path / "killed" / wait_for).exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "summary.json").exists()
    assert torch.load(tmp_path / "killed" / wait_for)["step"] < 40
    for folder in ("killed", "whole"):
        assert run(family, *options, "--out", tmp_path / folder) == 0
    assert tables(tmp_path / "killed") == tables(tmp_path / "whole")


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_n_and_n_outer_steps_are_2n_outer_steps(tmp_path, optimizer):
    prior = tasks.LinearRegression(2, 0.1, 5)

    class Killed(Exception):
        pass

    def train(path, kill_at=None):
        model = meta.MetaLearner(2, 2, 8, seeded(1))

        def loss(model, generator, share):
            return meta.squared_error_loss(model, prior, 8, generator)

        def report(step, value):
            if step == kill_at:
                raise Killed

        snapshots = meta.outer_loop(model, loss, 20, meta.make_optimizers(model, optimizer, 0.05, 0.01), seeded(2), path, {},
                                    lambda model: dict(value=model.head.weight.sum().item()), report=report)
        return model.state_dict(), snapshots

    whole = train(tmp_path / "whole.pt")
    with pytest.raises(Killed):
        train(tmp_path / "halves.pt", kill_at=10)
    assert meta.load_checkpoint(tmp_path / "halves.pt", {})["step"] == 10
    assert_close(train(tmp_path / "halves.pt"), whole, atol=0, rtol=0)


def test_another_dimension(tmp_path):
    assert run("linreg", *TINY, "--out", tmp_path, *"--dim 3 --singular-values 1.5 0.8 0.4 --noise 0.3 --trials 12 --learner-steps 2000".split()) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    half = learners.deep_linear_time(torch.tensor([1.5, 0.8, 0.4]), 1e-3, torch.tensor([0.75, 0.4, 0.2])) / 0.01
    assert_close(torch.tensor(summary["learner"]["half_times"]), half, rtol=0.01, atol=0)
    assert len(summary["meta"]["half_times"]) == 3


@pytest.mark.parametrize("options", ["--contexts 3 --actions 4 --trials 25", "--contexts 1", "--scaling-meta 1 --outer-steps 3", "--context-rates 1 0 2 0 0.5"])
def test_other_bandits(options, tmp_path):
    assert run("bandit", *TINY_BANDIT, "--out", tmp_path, *options.split()) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    contexts = int(options.split()[1]) if "--contexts" in options else 5
    assert all(len(summary[system]["half_times"]) == contexts for system in ("learner", "decoupled", "meta", "bayes"))


def test_a_bandit_reports_rewards(tmp_path):
    assert run("bandit", *TINY_BANDIT, "--out", tmp_path) == 0
    with open(tmp_path / "performance.csv") as file:
        means = {(line["system"], int(line["trial"])): float(line["value"]) for line in csv.DictReader(file)}
    assert means["bayes", 11] > means["prior", 11] > 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    total = {system: sum(v for (s, _), v in means.items() if s == system) for system in ("prior", "meta", "bayes")}
    assert_close(summary["captured"], (total["meta"] - total["prior"]) / (total["bayes"] - total["prior"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family, options", [
    ("linreg", "--trials 2 --learner-steps 3"), ("linreg", "--dim 1 --singular-values 2"), ("nonlinreg", "--trials 2 --learner-steps 7"),
    ("nonlinreg", "--band 3 5 --learner-frequencies 1 2 3 4 5 6 7"), ("nonlinreg", "--frequencies 1 --noise 0"), ("nonlinreg", "--frequencies 8"), ("bandit", "--trials 2")])
def test_unusual_settings(family, options, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "save", lambda figure, path: figure.draw_without_rendering())
    assert run(family, *dict(linreg=TINY, nonlinreg=TINY_NONLINREG, bandit=TINY_BANDIT)[family], "--out", tmp_path, *options.split()) == 0
    assert "NaN" not in (tmp_path / "summary.json").read_text()


@pytest.mark.parametrize("family", metadyn.FAMILIES)
def test_the_full_setting_is_a_valid_one(family):
    config = metadyn.parse([family, "--full"])[0][family]
    config.check()
    assert config != metadyn.FAMILIES[family]()


def test_all_families_make_one_overview_and_are_run_but_once(tmp_path, monkeypatch, capsys):
    for cls, options in (metadyn.Linreg, TINY), (metadyn.Nonlinreg, TINY_NONLINREG), (metadyn.Bandit, TINY_BANDIT[:-3]):       # --quick is tiny
        settings = {name.lstrip("-").replace("-", "_"): int(value) for name, value in zip(options[::2], options[1::2]) if value.isdigit()}
        monkeypatch.setattr(cls, "QUICK", settings | (dict(scaling=[2]) if cls is metadyn.Bandit else {}))
    monkeypatch.setattr(plots, "save", lambda figure, path: save(figure, path) if path.name == "overview" else None)
    command = ["all", "--quick", "--seed", 3, "--device", "cpu", "--out", tmp_path]
    assert run(*command) == 0
    said = capsys.readouterr().out
    assert all(f"{family:11}{name}" in said for family in metadyn.FAMILIES for name in ("Learner", "Meta-L.", "Bayes", "κ"))
    assert (tmp_path / "overview.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "overview.pdf").read_bytes().startswith(b"%PDF")
    table = plots.read_table(tmp_path / "overview.csv")
    for family in metadyn.FAMILIES:
        summary = json.loads((tmp_path / family / "summary.json").read_text())
        assert summary["captured"] in plots.where(table, "value", family=family, system="captured").astype(float)
    monkeypatch.setattr(metadyn, "measure", None)
    assert run(*command) == 0 and capsys.readouterr().out == said


def test_seeds_repeat_the_whole_experiment_and_resume_between(tiny, tmp_path, monkeypatch, capsys):
    command, whole, seen = ["linreg", *TINY, "--seeds", 3, "--out", tmp_path], metadyn.measure, []

    def stopped_in_the_second(config, folder):
        seen.append(config.seed)
        if seen == [0, 1]:
            raise KeyboardInterrupt
        return whole(config, folder)

    monkeypatch.setattr(metadyn, "measure", stopped_in_the_second)
    assert run(*command) == 130
    assert run(*command) == 0
    assert seen == [0, 1, 1, 2]
    assert tables(tmp_path) == tables(tiny) | {name: (tmp_path / name).read_bytes() for name in ("overview.csv", "seeds.csv")}
    assert run("linreg", *TINY, "--seed", 2, "--out", tmp_path / "alone") == 0
    assert tables(tmp_path / "seed2") == tables(tmp_path / "alone")
    kappas = sorted(json.loads((folder / "summary.json").read_text())["captured"] for folder in (tmp_path, tmp_path / "seed1", tmp_path / "seed2"))
    table = plots.read_table(tmp_path / "overview.csv")
    low, median, high = (plots.where(table, column, system="captured").astype(float)[0] for column in ("low", "value", "high"))
    assert [low, median, high] == kappas
    assert "range of 3 seeds" in capsys.readouterr().out


def test_all_jobs_of_a_command_are_checked_and_cleared_before_the_first_is_run(tiny, tmp_path, monkeypatch, capsys):
    def stopped(config, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(metadyn, "measure", stopped)
    for folder in (tmp_path, tmp_path / "seed1"):
        shutil.copytree(tiny, folder, dirs_exist_ok=True)
    assert run("linreg", *TINY, "--seeds", 2, "--out", tmp_path) == 2         # seed1 holds a run of seed 0
    assert "seed 0 there, 1 here" in capsys.readouterr().err
    assert run("linreg", *TINY, "--seeds", 2, "--out", tmp_path, "--fresh") == 130
    assert not list(tmp_path.rglob("summary.json")) and not list(tmp_path.rglob("checkpoint.pt"))
    assert run("linreg", "--seed", 10**9, "--seeds", 2, "--out", tmp_path / "new") == 2 and not (tmp_path / "new").exists()
    assert run("linreg", "--out", tmp_path / "a\0b") == 2 and run("linreg", "--encoder", "1\n2") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("metadyn.py: --encoder")


def test_tables_read_what_has_no_number(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\nnot reached,x\nundefined,y\n1.5,z\n")
    table = plots.read_table(tmp_path / "t.csv")
    assert table["a"][0] == math.inf and np.isnan(table["a"][1]) and table["a"][2] == 1.5 and table["b"].tolist() == ["x", "y", "z"]


def test_mistakes_from_python(tiny, monkeypatch):
    for call, words in ((lambda: metadyn.start("cubreg"), "FAMILY: cubreg given"), (lambda: metadyn.linreg(quick=True, full=True), "--full"),
                        (lambda: metadyn.linreg(scales=[]), "--scales: nothing given")):
        with pytest.raises(metadyn.Mistake, match=words):
            call()
    config = metadyn.parse(["linreg", *TINY])[0]["linreg"]
    with pytest.raises(KeyError, match="metta: not one of learner"):
        metadyn.run(config, tiny).curve("metta")


def test_from_python_as_from_the_shell(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = metadyn.linreg(hidden=8, outer_steps=40, batch=8, eval_tasks=2, eval_episodes=16, fresh_tasks=64, learner_steps=60, device="cpu",
                            singular_values=(1.6, 1.2, 0.9, 0.6, np.float64(0.3)))
    assert tables(tmp_path / "runs" / "linreg") == tables(tiny)
    time, strength, stderr = result.curve("meta")
    assert time.shape == (21,) and strength.shape == stderr.shape == (21, 5) and np.isfinite(strength).all()
    assert result.summary["captured"] == json.loads((tiny / "summary.json").read_text())["captured"]
    assert "Half-time" in repr(result) and max(map(len, repr(result).splitlines()[:-1])) <= 62
    for wrong in dict(noise=-1), dict(noise="much"), dict(trials=2.5), dict(singular_values=3), dict(device="tpu"):
        with pytest.raises(metadyn.Mistake, match="--" + next(iter(wrong)).replace("_", "-")):
            metadyn.linreg(**wrong)


def test_other_frequencies(tmp_path):
    assert run("nonlinreg", *TINY_NONLINREG, "--out", tmp_path, *"--frequencies 3 --noise 0.25 --trials 17".split()) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert all(len(summary[system]["half_times"]) == 3 for system in ("learner", "learner_rising", "meta", "bayes"))
    with open(tmp_path / "performance.csv") as file:
        assert [line["trial"] for line in csv.DictReader(file) if line["system"] == "meta"] == [str(t) for t in range(17)]


@pytest.mark.parametrize("module", ["tasks", "learners", "plots"])
def test_a_leaf_module_imports_alone(module, tmp_path):
    shutil.copy(HERE / f"{module}.py", tmp_path)
    subprocess.run([sys.executable, "-c", f"import {module}"], cwd=tmp_path, check=True, env={"PATH": os.environ["PATH"]})


EXAMPLES = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("example", [example for example in EXAMPLES if "FAMILIES" not in example])
def test_the_examples_of_the_readme_run_as_printed(example, quick, tmp_path):
    if (quick / "runs" / "linreg").exists():              # there already: what an example then does is read it
        shutil.copytree(quick / "runs" / "linreg", tmp_path / "runs" / "quick")
    for module in ("tasks", "learners", "plots", *(("meta", "metadyn") if "import metadyn" in example else ())):
        shutil.copy(HERE / f"{module}.py", tmp_path)
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed, promised = float(done.stdout.strip().removeprefix("tensor(").split(",")[0].rstrip(")")), float(re.search(r"# ([\d.]+)", example)[1])
    assert abs(printed - promised) < 0.15 * promised


def test_the_fourth_family_of_the_readme_works_with_every_part_of_the_frame(tmp_path):
    for module in ("tasks", "learners", "plots", "meta", "metadyn"):
        shutil.copy(HERE / f"{module}.py", tmp_path)
    example, = [example for example in EXAMPLES if "FAMILIES" in example]
    (tmp_path / "polynomials.py").write_text(example)

    def polynomials(*options):
        return subprocess.run([sys.executable, "polynomials.py", "polynomials", *options], cwd=tmp_path, capture_output=True, text=True)

    tiny = "--degrees 3 --trials 8".split() + TINY[:-4]
    done = polynomials(*tiny)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "polynomials"
    whole = tables(folder)
    assert {"dynamics.csv", "performance.csv", "outer_loop.csv", "ood.csv"} <= set(whole)
    assert all(len(whole["summary"][system]["half_times"]) == 3 for system in ("learner", "meta", "bayes"))
    assert all((folder / f"{figure}.png").exists() for figure in ("dynamics", "outer_loop", "ood"))
    for file in ("summary.json", "dynamics.csv"):
        (folder / file).unlink()
    assert polynomials(*tiny).returncode == 0 and tables(folder) == whole          # from its checkpoint
    assert "--degrees: 0 given, allowed: a finite number, at least 1" in polynomials("--degrees", "0").stderr


@pytest.mark.parametrize("arguments, words", [
    ("", "FAMILY"),
    ("cubreg", "FAMILY: invalid choice: 'cubreg'"),
    ("linreg --noise -1", "--noise: -1.0 given, allowed: a finite number, at least 0"),
    ("linreg --noise nan", "--noise: nan given"),
    ("linreg --seed 99999999999999999999", "--seed: 99999999999999999999 given, allowed: a finite number, at least 0 and at most 1000000000"),
    ("linreg --muon-lr inf", "--muon-lr: inf given"),
    ("linreg --trials 0", "--trials: 0 given, allowed: a finite number, at least 2"),
    ("linreg --trials 2.5", "--trials"),
    ("linreg --singular-values 1 2 3 4 0", "--singular-values: 0.0 given, allowed: a finite number, more than 0"),
    ("linreg --singular-values 1 2", "--singular-values: 2 given, allowed: as many as --dim, 5"),
    ("linreg --dim 3", "--singular-values: 5 given, allowed: as many as --dim, 3"),
    ("linreg --outer-optimizer sgd", "--outer-optimizer: sgd given, allowed: muon, adam"),
    ("nonlinreg --frequencies 0", "--frequencies: 0 given, allowed: a finite number, at least 1"),
    ("nonlinreg --band 6 3", "--band: 6 3 given, allowed: the lowest frequency, then the highest, as in --band 3 5"),
    ("nonlinreg --band 6", "--band: 6 given"),
    ("nonlinreg --band 0 3", "--band: 0 given"),
    ("nonlinreg --band", "--band"),
    ("nonlinreg --frequencies 20 --grid 24", "--grid: 24 given, allowed: at least 81, for frequencies up to 40"),
    ("nonlinreg --learner-grid 10", "--learner-grid: 10 given, allowed: at least 11, for frequencies up to 5"),
    ("bandit --actions 1", "--actions: 1 given, allowed: a finite number, at least 2"),
    ("bandit --contexts 0", "--contexts: 0 given"),
    ("bandit --context-rates 1 1 1 1 -1", "--context-rates: -1.0 given, allowed: a finite number, at least 0"),
    ("bandit --context-rates 0 0 0 0 0", "--context-rates: 0 0 0 0 0 given, allowed: as many as --contexts, 5, not all zero"),
    ("all --trials 0", "--trials"),
    ("linreg --quick --full", "--full"),
    ("linreg --colour red", "--colour"),
    ("linreg --out /dev/null/run", "--out: /dev/null/run given"),
    pytest.param("linreg --device cuda", "--device: cuda given, allowed: on this machine ", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")),
])
def test_a_mistake_ends_in_one_line_and_exit_status_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err, err
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_config_is_left_alone_unless_fresh(tiny, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path / "run")
    before = tables(tmp_path / "run")
    assert run("linreg", *TINY, "--noise", 0.2, "--out", tmp_path / "run") == 2
    assert "noise 0.1 there, 0.2 here" in capsys.readouterr().err
    assert tables(tmp_path / "run") == before
    assert run("linreg", *TINY, "--noise", 0.2, "--out", tmp_path / "run", "--fresh") == 0
    assert tables(tmp_path / "run") != before


def test_a_fresh_run_forgets_every_checkpoint(tmp_path):
    for checkpoint in ("checkpoint.pt", "checkpoint_bandpass.pt"):
        (tmp_path / checkpoint).write_bytes(b"of another run")
    assert run("nonlinreg", *TINY_NONLINREG, "--out", tmp_path, "--fresh") == 0


@pytest.mark.parametrize("file", ["checkpoint.pt", "config.json"])
def test_a_damaged_file_is_named(tiny, tmp_path, capsys, file):
    shutil.copytree(tiny, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    damaged = (tmp_path / "run" / file).read_bytes()[:-20]
    (tmp_path / "run" / file).write_bytes(damaged)
    assert run("linreg", *TINY, "--out", tmp_path / "run") == 2
    assert file in capsys.readouterr().err
    assert (tmp_path / "run" / file).read_bytes() == damaged


def test_a_flipped_byte_anywhere_in_a_checkpoint_is_seen(tiny, tmp_path):
    path, whole = tmp_path / "checkpoint.pt", (tiny / "checkpoint.pt").read_bytes()
    config = torch.load(tiny / "checkpoint.pt")["config"]
    for position in torch.randint(len(whole), (200,), generator=seeded()).tolist():
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1:])
        try:
            assert_close(meta.load_checkpoint(path, config)["model"], torch.load(tiny / "checkpoint.pt")["model"], atol=0, rtol=0)     # padding
        except meta.UnusableCheckpoint:
            pass


def test_a_checkpoint_of_another_config_is_named(tiny, tmp_path, capsys):
    assert run("linreg", *TINY, "--seed", 3, "--out", tmp_path / "run") == 0
    (tmp_path / "run" / "summary.json").unlink()
    shutil.copy(tiny / "checkpoint.pt", tmp_path / "run")
    assert run("linreg", *TINY, "--seed", 3, "--out", tmp_path / "run") == 2
    assert "another config" in capsys.readouterr().err


def test_a_partly_written_run_is_completed(tiny, tmp_path):
    for name in ("config.json", "checkpoint.pt", "dynamics.csv"):
        shutil.copy(tiny / name, tmp_path)
    assert run("linreg", *TINY, "--out", tmp_path) == 0
    assert tables(tmp_path) == tables(tiny)


def test_a_second_run_at_the_same_time_says_why_it_stops(tmp_path, capsys):
    pytest.importorskip("fcntl")
    with metadyn.held(tmp_path):
        assert run("linreg", *TINY, "--out", tmp_path) == 2
    assert "no other run" in capsys.readouterr().err


def test_a_full_disk_leaves_the_last_checkpoint(tiny, tmp_path, capsys, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    meta.save_checkpoint(path, dict(step=1, config={}))
    before = path.read_bytes()

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError):
        meta.save_checkpoint(path, dict(step=2, config={}))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert run("linreg", *TINY, "--out", tmp_path / "run") != 0
    assert "No space left on device" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    model = meta.MetaLearner(1, 1, 4, seeded())
    steps = iter(range(100))

    def loss(model, generator, share):
        value = model.head.weight.sum() * (math.nan if next(steps) == 7 else 1)
        return value, value

    with pytest.raises(FloatingPointError, match="outer step 7"):
        meta.outer_loop(model, loss, 20, meta.make_optimizers(model, "adam", 0, 0.01), seeded(), tmp_path / "checkpoint.pt", {})
    assert meta.load_checkpoint(tmp_path / "checkpoint.pt", {})["step"] == 7


def test_a_learner_that_diverges_says_so(tmp_path, capsys):
    assert run("linreg", *TINY, "--learner-lr", 100, "--out", tmp_path) == 1
    assert "smaller learning rate" in capsys.readouterr().err


def test_singular_values_may_come_in_any_order(tiny, tmp_path):
    assert run("linreg", *TINY, "--out", tmp_path, "--singular-values", *"0.6 1.6 0.3 1.2 0.9".split()) == 0
    assert tables(tmp_path) == tables(tiny)


@pytest.mark.parametrize("file, damage", [("summary.json", b"{"), ("dynamics.csv", None), ("dynamics.csv", b""), ("ood.csv", b"a,b\n1,2\n")])
def test_damaged_results_are_a_mistake_that_fresh_mends(tiny, tmp_path, capsys, file, damage):
    shutil.copytree(tiny, tmp_path / "run")
    (tmp_path / "run" / file).unlink() if damage is None else (tmp_path / "run" / file).write_bytes(damage)
    assert run("linreg", *TINY, "--out", tmp_path / "run") == 2
    assert "tables are damaged" in capsys.readouterr().err


def test_results_without_their_config_are_not_taken_for_this_run(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "run")
    for name in ("config.json", "checkpoint.pt"):
        (tmp_path / "run" / name).unlink()
    assert run("linreg", *TINY, "--seed", 5, "--out", tmp_path / "run") == 0
    assert tables(tmp_path / "run") != tables(tiny)


def test_a_gradient_that_is_not_finite_never_reaches_a_checkpoint(tmp_path):
    model = meta.MetaLearner(1, 1, 4, seeded())

    def loss(model, generator, share):
        value = (0 * model.head.weight).sqrt().sum()                           # finite, with an infinite slope
        return value, value

    with pytest.raises(FloatingPointError, match="gradient"):
        meta.outer_loop(model, loss, 20, meta.make_optimizers(model, "adam", 0, 0.01), seeded(), tmp_path / "checkpoint.pt", {})
    assert not (tmp_path / "checkpoint.pt").exists()


def test_control_c_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(metadyn, "measure", interrupt)
    assert run("linreg", *TINY, "--out", tmp_path) == 130
    assert "without --fresh, goes on" in capsys.readouterr().err
