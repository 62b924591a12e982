r"""Task distributions, each with its exact Bayes-optimal predictor beside it, and how a task's
modes are read out of what is learned.

    prior = LinearRegression(dim=5, noise=0.1, trials=20)
    W = prior.sample(64, generator)                      # 64 tasks
    x, y = prior.episodes(W, generator)                  # (64, 20, 5), (64, 20, 5)
    loss = (Bayes(prior).predict(x, y) - y).square().mean()

Axis order: (B, T, D), that is episodes, trials, dimensions. K counts modes, Q query points. For
evaluation N tasks lead, with E episodes of each: (N, E, T, D). Strengths S are (T + 1, N, E, K).

Every predictor of a regression answers the same two calls, here (`Bayes`, `Prior`) and in meta.py:
    predict(x, y)     -> (B, T, Dy)           the guess at y_t from x_0 … x_t and y_0 … y_{t-1}
    query(x, y, xq)   -> (B, T + 1, Q, Dy)    the function in mind before trial t, at xq (Q, Dx)
In a bandit it is an agent, with three calls: see `ContextualBandit`.

Reference: Rabinowitz 2019, arXiv 1905.01320. Imports nothing of ours: copy it alone. Left out on
purpose: data sets, loaders, plots. Everything random takes an explicit CPU generator.
"""
import math

import torch
from torch.nn.functional import one_hot

# ---------------------------------------------------------------- regression on fixed features
def in_chunks(function, *tensors, size=256):
    """function(*tensors) for `size` episodes at a time, to save memory. (B, ...) to (B, ...)."""
    chunks = zip(*(tensor.split(size) for tensor in tensors))
    return torch.cat([function(*chunk) for chunk in chunks])

class FeatureRegression:
    r"""y_t = W phi(x_t) + eps_t,   W_ij ~ N(0, weight_var),   eps_t ~ N(0, noise^2 I).

    A task is its weight matrix W (Dy, F). A family of tasks sets outputs (Dy), input_size (Dx),
    n_features (F), weight_var, noise and trials, and says
        features(x)             what phi is: (..., Dx) to (..., F)
        inputs(n, generator)    how x is drawn: (n, T, Dx)
        queries(generator)      at which points a function is read: (Q, Dx)
        read_modes(f, xq, W)    which modes of tasks W (N, Dy, F) functions f (N, E, T + 1, Q, Dy)
                                have: strengths (N, E, T + 1, K), other readings by name (T + 1,)
    """

    def sample(self, n, generator):
        """n tasks from the prior: (n, Dy, F)."""
        W = torch.randn(n, self.outputs, self.n_features, generator=generator)
        return self.weight_var ** 0.5 * W

    def episodes(self, W, generator):
        """One episode of each task in W (B, Dy, F): x (B, T, Dx) and noisy y (B, T, Dy)."""
        x = self.inputs(len(W), generator)
        y = self.features(x) @ W.mT
        return x, y + self.noise * torch.randn(y.shape, generator=generator)

    def evaluation_episodes(self, W, n, generator):
        """n episodes of each task in W (N, Dy, F): W itself, the query points xq (Q, Dx) of the
        probe, x (N, n, T, Dx) and y (N, n, T, Dy)."""
        xq = self.queries(generator)
        x, y = zip(*(self.episodes(w.expand(n, -1, -1), generator) for w in W))
        return W, xq, torch.stack(x), torch.stack(y)

    def show(self, x):
        """An input as a network is shown it."""
        return x

    @torch.no_grad()
    def score(self, predictor, x, y):
        """Squared error, averaged over outputs, of each episode and trial: (B, T), on the CPU."""
        guess = in_chunks(lambda x, y: predictor.predict(x, y).cpu(), x, y)
        return (guess - y).square().mean(-1)

    @torch.no_grad()
    def inner_loop(self, predictor, W, xq, x, y):
        """What a predictor has learned of each task before each trial and after the last, in
        episodes as from `evaluation_episodes`. Returns strengths (T + 1, N, E, K) and the probe's
        other readings by name, means over tasks, (T + 1,) each."""
        flat = x.flatten(0, 1), y.flatten(0, 1)
        f = in_chunks(lambda x, y: predictor.query(x, y, xq).cpu(), *flat)
        strength, readings = self.read_modes(f.unflatten(0, x.shape[:2]), xq, W)
        return strength.movedim(2, 0).contiguous(), readings

class Prior:
    """The predictor that never learns: the prior mean of every family here, zero."""

    def predict(self, x, y):
        """Zeros like y."""
        return torch.zeros_like(y)

    def query(self, x, y, xq):
        """Zeros (B, T + 1, Q, Dy)."""
        return y.new_zeros(len(y), y.shape[1] + 1, len(xq), y.shape[2])

class Bayes:
    r"""Exact posterior mean of a FeatureRegression: no predictor has a smaller squared error.

    Given the data the rows of W are independent with a common covariance P (matrix-normal
    posterior), so one gain serves all outputs. In Kalman form, from M_0 = 0, P_0 = weight_var I:

        g = P phi / (phi^T P phi + noise^2),   M <- M + (y - M phi) g^T,   P <- P - g (P phi)^T

    Computed in float64 and returned in the precision of x.
    """

    def __init__(self, prior):
        self.prior = prior

    def posterior(self, x, y):
        """Weights before each trial and after the last: means (B, T + 1, Dy, F), covariances
        (B, T + 1, F, F)."""
        phi = self.prior.features(x.double())
        y = y.double()
        P = self.prior.weight_var * torch.eye(self.prior.n_features).to(phi).expand(len(x), -1, -1)
        M = phi.new_zeros(len(x), y.shape[-1], self.prior.n_features)
        means, covariances = [M], [P]
        for t in range(x.shape[1]):
            p = phi[:, t, :, None]                                    # (B, F, 1)
            Pp = P @ p
            # without noise the posterior may already be certain of W phi: keep 0 / 0 out
            g = Pp / (p.mT @ Pp + self.prior.noise ** 2).clamp_min(1e-9)
            M = M + (y[:, t, :, None] - M @ p) @ g.mT
            P = P - g @ Pp.mT
            means.append(M)
            covariances.append(P)
        return torch.stack(means, 1), torch.stack(covariances, 1)

    def predict(self, x, y):
        """Posterior mean of y_t before it is seen: (B, T, Dy)."""
        M, _ = self.posterior(x, y)
        phi = self.prior.features(x.double())
        return (M[:, :-1] @ phi[..., None])[..., 0].to(x)

    def query(self, x, y, xq):
        """Posterior mean function before each trial and after the last: (B, T + 1, Q, Dy)."""
        M, _ = self.posterior(x, y)
        return (self.prior.features(xq.double()) @ M.mT).to(x)

# ---------------------------------------------------------------- linear regression
def singular_modes(W):
    """The modes of linear maps W (..., Dy, Dx): U (..., Dy, K), V (..., Dx, K), s (..., K).

    Largest singular value first. At repeated singular values the basis is not unique: any
    rotation within them would do, so that only the sum of their strengths means something.
    """
    U, s, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return U, Vh.mT, s

def mode_strength(W, U, V, s):
    r"""Strength of each mode of the target in a linear map.

    S_k = u_k^T W v_k / s_k            (Saxe et al. 2013, projected on the target's own basis)

    W: (..., Dy, Dx) the map; U (..., Dy, K), V (..., Dx, K), s (..., K): the target's singular
    triplets, s > 0. Returns (..., K): signed and never re-sorted, so that mode k stays mode k.
    0 not learned, 1 learned.
    """
    return (U * (W @ V)).sum(-2) / s

def off_diagonal(W, U, V, s):
    r"""What the modes do not show: ||U^T W V - diag||_F / ||s||. Shapes as above; returns (...)."""
    A = U.mT @ W @ V
    off = A - torch.diag_embed(A.diagonal(dim1=-2, dim2=-1))
    return torch.linalg.matrix_norm(off) / torch.linalg.vector_norm(s, dim=-1)

def linear_probe(f, xq):
    r"""The linear map nearest to a function seen at query points, by least squares.

    f: (..., Q, Dy) outputs at xq (Q, Dx). Returns W (..., Dy, Dx), and the residual and total
    sums of squares (...), so that R^2 = 1 - residual / total can be pooled over episodes. There
    is no intercept: one would count as residual.
    """
    W = (torch.linalg.pinv(xq) @ f).mT
    residual = (f - xq @ W.mT).square().sum((-2, -1))
    return W, residual, f.square().sum((-2, -1))

def random_orthogonal(n, dim, generator):
    """n orthogonal matrices (n, dim, dim), Haar-distributed: QR of a Gaussian, with the signs of
    R's diagonal made positive (Mezzadri 2007)."""
    Q, R = torch.linalg.qr(torch.randn(n, dim, dim, generator=generator))
    return Q * R.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]

class LinearRegression(FeatureRegression):
    r"""y = W x + eps,   W_ij ~ N(0, 1 / dim),   x ~ N(0, I),   eps ~ N(0, noise^2 I).

    Mode k is the k-th singular triplet of W. 20 trials are, by second-hand notes, Rabinowitz's;
    dim, noise and the prior's scale are our choice. Of the prior's singular values at dim 5,
    95% lie in 0.026 … 1.945.
    """

    def __init__(self, dim=5, noise=0.1, trials=20):
        self.noise, self.trials = noise, trials
        self.outputs = self.n_features = self.input_size = dim
        self.weight_var = 1 / dim

    def features(self, x):
        """The input itself."""
        return x

    def inputs(self, n, generator):
        """x ~ N(0, I): (n, T, dim)."""
        return torch.randn(n, self.trials, self.input_size, generator=generator)

    def evaluation_tasks(self, n, s, generator):
        """n tasks W = U diag(s) V^T, random U and V, spectrum s (dim,): (n, dim, dim)."""
        U = random_orthogonal(n, self.input_size, generator)
        V = random_orthogonal(n, self.input_size, generator)
        return U * s @ V.mT

    def queries(self, generator):
        """2 (dim + 2) query points, half of them the others' negatives, so that an intercept cannot
        pass for a slope. A random odd function would still seem linear to dim / (dim + 2), a linear
        one wholly."""
        half = torch.randn(self.input_size + 2, self.input_size, generator=generator)
        return torch.cat([half, -half])

    def read_modes(self, f, xq, W):
        """Strengths (N, E, T + 1, K) of singular modes; the mean off-diagonal residual, and the R^2
        of the linear probe, pooled over episodes; 1 where there is nothing to explain (Bayes at
        first)."""
        U, V, s = (part.to(f)[:, None, None] for part in singular_modes(W))
        fitted, residual, total = linear_probe(f, xq)
        r_squared = (1 - residual.sum(1) / total.sum(1).clamp_min(1e-12)).mean(0)
        residue = off_diagonal(fitted, U, V, s).mean((0, 1))
        return mode_strength(fitted, U, V, s), dict(r_squared=r_squared, off_diagonal=residue)

# ---------------------------------------------------------------- nonlinear regression
def fourier_strength(f, target, frequencies):
    r"""Strength of each frequency of a target in a function, both on a uniform grid of the circle.

    S_k = Re <F_k, F^_k> / |F_k|^2,   F the target's Fourier coefficient at k and F^ the
    function's. Phase counts: in the measure of Rahaman et al. 2018, |F^_k| / |F_k|, a shifted
    copy would score 1.

    f, target: (..., G) real; frequencies: (K,) whole numbers below G / 2. Returns (..., K), and
    the function's energy at all other frequencies over the target's energy (...).
    """
    F, F_hat = torch.fft.rfft(target), torch.fft.rfft(f)
    inside, inside_hat = F[..., frequencies], F_hat[..., frequencies]
    strength = (inside.conj() * inside_hat).real / inside.abs().square()
    energy_outside = F_hat.abs().square().sum(-1) - inside_hat.abs().square().sum(-1)
    return strength, energy_outside / inside.abs().square().sum(-1)

class FourierRegression(FeatureRegression):
    r"""y = sum_k a_k cos 2 pi k x + b_k sin 2 pi k x + eps,   a, b ~ N(0, 1 / K),   x ~ U[0, 1).

    frequencies: K whole numbers, any set of them (low-pass, band-pass). Mode k is the k-th of
    them. The posterior is that of a Gaussian process with the band-limited kernel
    k(x, x') = 1/K sum_k cos 2 pi k (x - x'). All of it our choice.
    """

    def __init__(self, frequencies=(1, 2, 3, 4, 5), noise=0.1, trials=40, grid=None):
        self.frequencies = torch.as_tensor(frequencies)
        self.noise, self.trials = noise, trials
        self.grid = grid or 2 * max(frequencies) + 6      # enough to see a little beyond the band
        self.outputs = self.input_size = 1
        self.n_features = 2 * len(self.frequencies)
        self.weight_var = 1 / len(self.frequencies)

    def features(self, x):
        """cos 2 pi k x for every k, then sin 2 pi k x: (..., 1) to (..., 2 K)."""
        phase = 2 * math.pi * x * self.frequencies.to(x)
        return torch.cat([phase.cos(), phase.sin()], -1)

    def show(self, x):
        """x on [-1, 1), not as a point on the circle: that would be frequency 1 for nothing."""
        return 2 * x - 1

    def inputs(self, n, generator):
        """x ~ U[0, 1): (n, T, 1)."""
        return torch.rand(n, self.trials, 1, generator=generator)

    def evaluation_tasks(self, n, generator):
        """n tasks with every frequency at the amplitude that the prior expects, at random phases:
        weights (n, 1, 2 K)."""
        amplitude = (2 * self.weight_var) ** 0.5
        phase = 2 * math.pi * torch.rand(n, 1, len(self.frequencies), generator=generator)
        return amplitude * torch.cat([phase.cos(), phase.sin()], -1)

    def queries(self, generator=None):
        """A uniform grid on the circle, (grid, 1), so that the modes can be read by FFT."""
        return torch.arange(self.grid)[:, None] / self.grid

    def read_modes(self, f, xq, W):
        """Strengths (N, E, T + 1, K) of frequencies, and the mean energy outside the band."""
        target = (self.features(xq) @ W.mT)[:, None, None, :, 0]
        strength, outside = fourier_strength(f[..., 0], target, self.frequencies)
        return strength, dict(outside=outside.mean((0, 1)))

# ---------------------------------------------------------------- contextual bandits
class ContextualBandit:
    r"""In each of C contexts one of A actions, drawn uniformly, is rewarded with 1, the others
    with 0. A task is the vector of correct actions (C,), mode k is context k.

    5 contexts and 5 actions are, by second-hand notes, Rabinowitz's; 60 trials are our choice.
    rates: (C,) how often each context comes, scaled to sum to 1; by default all alike.

    Here every predictor is an agent: begin(B, prior) an episode; policy() -> (B, C, A), before
    each trial, for every context; observe(context, action, reward), each (B,), after it.
    """

    def __init__(self, contexts=5, actions=5, trials=60, rates=None):
        self.contexts, self.actions, self.trials = contexts, actions, trials
        rates = torch.ones(contexts) if rates is None else torch.as_tensor(rates)
        self.rates = rates / rates.sum()

    def sample(self, n, generator):
        """n tasks from the prior: correct actions (n, C)."""
        return torch.randint(self.actions, (n, self.contexts), generator=generator)

    def episodes(self, correct, generator):
        """One episode of each task in correct (B, C): the tasks themselves, the contexts that come
        (B, T), and the luck that will decide the actions, uniform on [0, 1) (B, T)."""
        B, T = len(correct), self.trials
        contexts = torch.multinomial(self.rates, B * T, replacement=True, generator=generator)
        return correct, contexts.view(B, T), torch.rand(B, T, generator=generator)

    def evaluation_tasks(self, n, generator):
        """n tasks (n, C) from the prior. Contexts have no order: they are numbered so that those
        whose answer most others share come first, and mode k is alike from task to task."""
        correct = self.sample(n, generator)
        order = shared_answers(correct).argsort(dim=-1, descending=True, stable=True)
        return correct.gather(-1, order)

    def rename(self, correct, n, generator):
        """n repeats of each task (N, C), each with its actions renamed: (N, n, C).

        A repeat has *one* permutation of the actions for all of its contexts. That takes out the
        order in which an agent tries equally good actions, which is no learning, and keeps what a
        task has of structure: which contexts share a correct action.
        """
        order = torch.rand(len(correct), n, self.actions, generator=generator).argsort(-1)
        return order.gather(-1, correct[:, None].expand(-1, n, -1))

    @torch.no_grad()
    def play(self, agent, correct, contexts, luck):
        """An agent plays the episodes, shapes as from `episodes`. Returns rewards (B, T), and the
        probability J of the correct action in every context before each trial and after the last
        (B, T + 1, C)."""
        episode = torch.arange(len(correct))
        rewards, probabilities = [], []
        agent.begin(len(correct), self)
        for t in range(self.trials + 1):
            policy = agent.policy()
            probabilities.append(policy.gather(-1, correct[..., None])[..., 0])
            if t == self.trials:
                break
            context = contexts[:, t]
            action = draw(policy[episode, context], luck[:, t])
            rewards.append((action == correct[episode, context]).float())
            agent.observe(context, action, rewards[-1])
        return torch.stack(rewards, 1), torch.stack(probabilities, 1)

    def evaluation_episodes(self, correct, n, generator):
        """n episodes of each task (N, C), renamed: tasks (N, n, C), contexts and luck (N, n, T)."""
        renamed = self.rename(correct, n, generator)
        _, contexts, luck = self.episodes(renamed.flatten(0, 1), generator)
        return renamed, contexts.unflatten(0, (-1, n)), luck.unflatten(0, (-1, n))

    def score(self, agent, correct, contexts, luck):
        """The reward of each episode and trial: (B, T)."""
        return in_chunks(lambda *episodes: self.play(agent, *episodes)[0], correct, contexts, luck,
                         size=2048)

    def inner_loop(self, agent, renamed, contexts, luck):
        """What an agent has learned of each task before each trial and after the last, in episodes
        as from `evaluation_episodes`. Returns strengths (T + 1, N, E, C), and no other readings."""
        flat = [part.flatten(0, 1) for part in (renamed, contexts, luck)]
        J = in_chunks(lambda *episodes: self.play(agent, *episodes)[1], *flat, size=2048)
        return self.strength(J).unflatten(0, renamed.shape[:2]).movedim(2, 0), {}

    def strength(self, J):
        """S = (J - 1/A) / (1 - 1/A): 0 at chance, 1 when the correct action is certain."""
        return (J - 1 / self.actions) / (1 - 1 / self.actions)

    def bayes_curve(self):
        r"""J of the Bayes-optimal policy in each context before trial t = 0 … T, in expectation
        over episodes: (T + 1, C).

        At the (n + 1)-th visit of a context it is min(n + 1, A) / A, for each failure rules an
        action out. Hence E[min(n_t + 1, A)] / A with n_t ~ Binomial(t, rate of the context).
        (Derived here; always taking the action most likely to be right is optimal in this bandit.)
        """
        n = torch.arange(self.trials + 1.0, dtype=torch.float64)
        t, rates = n[:, None, None], self.rates.double()[:, None]        # (T + 1, 1, 1), (C, 1)
        binomial = torch.distributions.Binomial(t, rates, validate_args=False)
        chance = torch.where(n <= t, binomial.log_prob(n).exp(), 0)      # (T + 1, C, T + 1)
        return (chance * (n + 1).clamp_max(self.actions)).sum(-1) / self.actions

def shared_answers(correct):
    """In how many contexts of its task a context's correct action is correct: (..., C) to
    (..., C), from 1 (its own alone) to C."""
    return (correct[..., :, None] == correct[..., None, :]).sum(-1)

def visit_clock(prior, agent, episodes):
    """Interference, measured directly: the chance of success at a context's own n-th visit while it
    is unsolved (has had no success), by how many other contexts are solved. Names of actions, luck
    and averages over contexts do not enter.

    episodes: as from `ContextualBandit.episodes`. Returns (A - 1, C): n = 1 first, none of the
    others solved first; nan where it never came to that.
    """
    _, contexts, _ = episodes
    rewards = prior.score(agent, *episodes)                               # (B, T)
    visited = one_hot(contexts, prior.contexts)                           # (B, T, C)
    n = visited.cumsum(1).gather(-1, contexts[..., None])[..., 0] - 1     # (B, T): earlier visits
    success = visited * rewards[..., None]
    solved = (success.cumsum(1) - success) > 0                            # before the trial
    unsolved = ~solved.gather(-1, contexts[..., None])[..., 0]
    counted = unsolved & (n < prior.actions - 1)
    cell = (n * prior.contexts + solved.sum(-1))[counted]
    cells = (prior.actions - 1) * prior.contexts
    successes = torch.bincount(cell, rewards[counted], cells)
    chance = successes / torch.bincount(cell, minlength=cells)
    return chance.view(prior.actions - 1, prior.contexts)

def draw(policy, luck):
    """Actions (B,) from policies (B, A), by inverting their distribution functions at luck (B,)."""
    total = policy.sum(-1, keepdim=True)
    return (policy.cumsum(-1)[:, :-1] <= luck[:, None] * total).sum(-1)

class UniformAgent:
    """The agent that never learns: every action alike."""

    def begin(self, n, prior):
        """Starts n episodes of a ContextualBandit."""
        self.possible = torch.ones(n, prior.contexts, prior.actions)

    def policy(self):
        """Action probabilities in every context, (B, C, A)."""
        return self.possible / self.possible.sum(-1, keepdim=True)

    def observe(self, context, action, reward):
        """Learns nothing."""

class BayesAgent(UniformAgent):
    """The Bayes-optimal policy: in each context uniform over the actions that can be correct."""

    def observe(self, context, action, reward):
        """A failure rules its action out; a success rules out all others."""
        episode = torch.arange(len(context))
        tried = one_hot(action, self.possible.shape[-1]).float()
        left = self.possible[episode, context] * (1 - tried)
        self.possible[episode, context] = torch.where(reward[:, None] > 0, tried, left)

class OrderedBayesAgent(BayesAgent):
    """As optimal as BayesAgent, but it tries possible actions in the order of their names."""

    def policy(self):
        """All probability on the first possible action of each context, (B, C, A)."""
        return one_hot(self.possible.argmax(-1), self.possible.shape[-1]).float()
