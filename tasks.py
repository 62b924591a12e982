r"""Task distributions, each with its exact Bayes-optimal predictor beside it, and the strength of a task's modes in what is learned.

    prior = LinearRegression(dim=5, noise=0.1, trials=20)
    W = prior.sample(64, generator)                      # 64 tasks
    x, y = prior.episodes(W, generator)                  # (64, 20, 5), (64, 20, 5)
    loss = (Bayes(prior).predict(x, y) - y).square().mean()

Axis order: (B, T, D), that is episodes, trials, dimensions; K counts modes, Q query points.

Every predictor of a regression answers the same two calls, in this file (`Bayes`, `Prior`) and in meta.py (`MetaLearner`):
    predict(x, y)     -> (B, T, Dy)           the guess at y_t from x_0 … x_t and y_0 … y_{t-1}
    query(x, y, xq)   -> (B, T + 1, Q, Dy)    the function held in mind before trial t, at query points xq (Q, Dx)
In a bandit it is an agent, with three calls (see `ContextualBandit`). Every prior answers sample, episodes, losses, inner_loop, references
and show, and has a sign.

Reference: Rabinowitz 2019, arXiv 1905.01320. Imports nothing of ours: copy it alone. Left out on purpose: data sets, loaders,
plots. Everything random takes an explicit CPU generator.
"""
import math

import torch


# ---------------------------------------------------------------- regression on fixed features, and exact inference in it

def in_chunks(function, *tensors, size=128):
    """function(*tensors), computed for `size` episodes at a time, to keep memory small. Tensors (B, ...), result (B, ...)."""
    return torch.cat([function(*chunk) for chunk in zip(*(z.split(size) for z in tensors))])


class FeatureRegression:
    r"""y_t = W phi(x_t) + eps_t,   W_ij ~ N(0, weight_var),   eps_t ~ N(0, noise^2 I).

    A family says what its features phi are (`features`, (..., Dx) -> (..., F)), how inputs are drawn (`inputs`), at which query
    points its modes are read (`queries`) and how (`read_modes`); and sets outputs (Dy), input_size (Dx), n_features (F), weight_var, noise
    and trials. A task is its weight matrix W (Dy, F).
    """

    sign = 1                                              # a loss times this is what a person reads: here the squared error

    def sample(self, n, generator):
        """Draws n tasks from the prior: (n, Dy, F)."""
        return self.weight_var ** 0.5 * torch.randn(n, self.outputs, self.n_features, generator=generator)

    def episodes(self, W, generator):
        """One episode of each task in W (B, Dy, F). Returns x (B, T, Dx) and noisy y (B, T, Dy)."""
        x = self.inputs(len(W), generator)
        y = self.features(x) @ W.mT
        return x, y + self.noise * torch.randn(y.shape, generator=generator)

    def show(self, x):
        """An input as a network is shown it."""
        return x

    def references(self):
        """The predictors that need no training: the one that never learns, and Bayes."""
        return dict(prior=Prior(self), bayes=Bayes(self))

    def losses(self, predictor, x, y):
        """Squared error averaged over outputs, per episode and trial (B, T), on the CPU. x (B, T, Dx), y (B, T, Dy)."""
        return in_chunks(lambda x, y: (predictor.predict(x, y).cpu() - y).square().mean(-1), x, y)

    def inner_loop(self, predictor, W, n, generator):
        """What a predictor learns within episodes of the tasks W (N, Dy, F), n of each: its modes before each trial and after the last.

        Returns strengths (T + 1, N, K), averaged over the episodes of each task, and a dict of the probe's other readings, (T + 1, N) each.
        """
        xq, read = self.queries(generator), []
        for w in W:                                   # task by task: the probe asks for n (T + 1) Q answers of each
            f = in_chunks(lambda x, y: predictor.query(x, y, xq).cpu(), *self.episodes(w.expand(n, -1, -1), generator))
            read.append(self.read_modes(f, xq, w))
        return torch.stack([s for s, _ in read], 1), {name: torch.stack([others[name] for _, others in read], 1) for name in read[0][1]}


class Prior:
    """The predictor that never learns: the prior mean of every family here, zero."""

    def __init__(self, prior):
        self.outputs = prior.outputs

    def predict(self, x, y):
        """Zeros like y."""
        return torch.zeros_like(y)

    def query(self, x, y, xq):
        """Zeros (B, T + 1, Q, Dy)."""
        return y.new_zeros(len(y), y.shape[1] + 1, len(xq), self.outputs)


class Bayes:
    r"""The exact posterior mean of a FeatureRegression, the least squared error that any predictor can reach.

    Given the data, the rows of W are independent with a common covariance P (matrix-normal posterior), so one gain vector
    serves all outputs. Trial by trial, in Kalman form, from M_0 = 0 and P_0 = weight_var I:

        g = P phi / (phi^T P phi + noise^2),   M <- M + (y - M phi) g^T,   P <- P - g (P phi)^T

    Computed in float64 and returned in the precision of x.
    """

    def __init__(self, prior):
        self.prior = prior

    def posterior(self, x, y):
        """Means M (B, T + 1, Dy, F) and covariances P (B, T + 1, F, F) of the weights before each trial and after the last."""
        phi, y = self.prior.features(x.double()), y.double()
        P = self.prior.weight_var * torch.eye(phi.shape[-1], dtype=torch.float64, device=x.device).expand(len(x), -1, -1)
        M = phi.new_zeros(len(x), y.shape[-1], phi.shape[-1])
        means, covariances = [M], [P]
        for p, target in zip(phi.unbind(1), y.unbind(1)):
            p = p[..., None]                                          # (B, F, 1)
            Pp = P @ p
            # without noise the posterior may already be certain of W phi: keep 0 / 0 out
            g = Pp / (p.mT @ Pp + self.prior.noise ** 2).clamp_min(1e-9)
            M = M + (target[..., None] - M @ p) @ g.mT
            P = P - g @ Pp.mT
            means.append(M), covariances.append(P)
        return torch.stack(means, 1), torch.stack(covariances, 1)

    def batch_posterior(self, x, y):
        r"""The same after all trials, in one solve: P = (Phi^T Phi / noise^2 + I / weight_var)^-1, M = Y^T Phi P / noise^2. Needs noise > 0."""
        phi, y = self.prior.features(x.double()), y.double()
        precision = phi.mT @ phi / self.prior.noise ** 2 + torch.eye(phi.shape[-1], dtype=phi.dtype) / self.prior.weight_var
        P = torch.linalg.inv(precision)
        return y.mT @ phi @ P / self.prior.noise ** 2, P

    def predict(self, x, y):
        """Posterior mean of y_t before it is seen: (B, T, Dy)."""
        M, _ = self.posterior(x, y)
        return (M[:, :-1] @ self.prior.features(x.double())[..., None])[..., 0].to(x)

    def query(self, x, y, xq):
        """Posterior mean function before each trial, and after the last, at xq (Q, Dx): (B, T + 1, Q, Dy)."""
        M, _ = self.posterior(x, y)
        return (self.prior.features(xq.double()) @ M.mT).to(x)


# ---------------------------------------------------------------- linear regression

def mode_strength(W, U, V, s):
    r"""Strength of each mode of the target in a linear map.

    S_k = u_k^T W v_k / s_k                       (Saxe et al. 2013, projected on the target's own basis)

    W: (..., N_y, N_x) the map; U: (..., N_y, K), V: (..., N_x, K), s: (..., K) the target's singular triplets, s > 0.
    Returns (..., K): signed and never re-sorted, so that mode k stays mode k. 0 not learned, 1 learned.
    """
    return (U * (W @ V)).sum(-2) / s


def off_diagonal(W, U, V, s):
    r"""What the modes do not show: ||U^T W V - diag||_F / ||s||, shapes as in `mode_strength`. Returns (...), 0 in the target's basis."""
    A = U.mT @ W @ V
    return torch.linalg.matrix_norm(A - torch.diag_embed(A.diagonal(dim1=-2, dim2=-1))) / torch.linalg.vector_norm(s)


def linear_probe(f, xq):
    r"""The linear map nearest to a function seen at query points, by least squares.

    f: (..., Q, Dy) outputs at xq (Q, Dx). Returns W (..., Dy, Dx), and the residual and total sums of squares (...), so that
    R^2 = 1 - residual / total can be pooled over episodes. No intercept: one counts as residual.
    """
    W = (torch.linalg.pinv(xq) @ f).mT
    return W, (f - xq @ W.mT).square().sum((-2, -1)), f.square().sum((-2, -1))


def random_orthogonal(n, dim, generator):
    """n orthogonal matrices (n, dim, dim), Haar-distributed: QR of a Gaussian, signs fixed by R's diagonal (Mezzadri 2007)."""
    Q, R = torch.linalg.qr(torch.randn(n, dim, dim, generator=generator))
    return Q * R.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]


class LinearRegression(FeatureRegression):
    r"""y = W x + eps,   W_ij ~ N(0, 1 / dim),   x ~ N(0, I),   eps ~ N(0, noise^2 I).  Mode k is the k-th singular triplet of W.

    20 trials are, by second-hand notes, Rabinowitz's; dim, noise and the prior's scale are our choice. The prior's spectrum at dim 5: 95% within 0.026 … 1.945.
    """

    def __init__(self, dim=5, noise=0.1, trials=20):
        self.dim, self.noise, self.trials = dim, noise, trials
        self.outputs = self.n_features = self.input_size = dim
        self.weight_var = 1 / dim

    def features(self, x):
        """The input itself."""
        return x

    def inputs(self, n, generator):
        """x ~ N(0, I): (n, T, dim)."""
        return torch.randn(n, self.trials, self.dim, generator=generator)

    def evaluation_tasks(self, n, s, generator):
        """n tasks W = U diag(s) V^T with random U and V and the given spectrum s (dim,): (n, dim, dim)."""
        U, V = random_orthogonal(n, self.dim, generator), random_orthogonal(n, self.dim, generator)
        return U * s @ V.mT

    def queries(self, generator):
        """6 dim query points, half of them the others' negatives, so that an intercept cannot pass for a slope.

        A random odd function would still seem linear to a third (R^2, dim parameters for 3 dim points), a linear one wholly.
        """
        half = torch.randn(3 * self.dim, self.dim, generator=generator)
        return torch.cat([half, -half])

    def read_modes(self, f, xq, W):
        """What a function f (E, T + 1, Q, dim), seen at xq in E episodes of task W (dim, dim), has of that task's modes.

        Returns (T + 1, K) mean strengths, modes from the largest singular value down, and a dict of (T + 1,): the R^2 of the linear
        probe, 1 where there is nothing to explain (Bayes before any data), and the mean off-diagonal residual.
        """
        U, s, Vh = torch.linalg.svd(W)
        fitted, residual, total = linear_probe(f, xq)
        r_squared = 1 - residual.sum(0) / total.sum(0).clamp_min(1e-12)
        return (mode_strength(fitted, U, Vh.mT, s).mean(0),
                dict(r_squared=r_squared, off_diagonal=off_diagonal(fitted, U, Vh.mT, s).mean(0)))


# ---------------------------------------------------------------- nonlinear regression

class FourierRegression(FeatureRegression):
    r"""y = sum_k a_k cos 2 pi k x + b_k sin 2 pi k x + eps,   a_k, b_k ~ N(0, 1 / K),   x ~ U[0, 1),   eps ~ N(0, noise^2).

    frequencies: K whole numbers, any set of them (low-pass, band-pass). Mode k is the k-th frequency. The posterior is that of a
    Gaussian process with the band-limited kernel k(x, x') = 1/K sum_k cos 2 pi k (x - x'). All of it our choice.
    """
    outputs = input_size = 1

    def __init__(self, frequencies=(1, 2, 3, 4, 5), noise=0.1, trials=40, grid=24):
        self.frequencies, self.noise, self.trials, self.grid = torch.as_tensor(frequencies), noise, trials, grid
        self.n_features, self.weight_var = 2 * len(self.frequencies), 1 / len(self.frequencies)

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

    def evaluation_tasks(self, n, amplitudes, generator):
        """n tasks with the given amplitudes (K,) and random phases, as weights (n, 1, 2 K)."""
        phase = 2 * math.pi * torch.rand(n, 1, len(self.frequencies), generator=generator)
        return torch.cat([amplitudes * phase.cos(), amplitudes * phase.sin()], -1)

    def queries(self, generator=None):
        """A uniform grid on the circle, (grid, 1), so that the modes can be read by FFT."""
        return torch.arange(self.grid)[:, None] / self.grid

    def read_modes(self, f, xq, W):
        """What functions f (E, T + 1, grid, 1) in E episodes of task W (1, 2 K) have of that task's frequencies.

        Returns (T + 1, K) mean strengths, and a dict of (T + 1,): the mean energy outside the target's band.
        """
        target = (self.features(xq) @ W.mT)[..., 0]
        strength, outside = fourier_strength(f[..., 0], target, self.frequencies)
        return strength.mean(0), dict(outside=outside.mean(0))


def fourier_strength(f, target, frequencies):
    r"""Strength of each frequency of a target in a function, both on a uniform grid of the circle.

    S_k = Re <F_k, F^_k> / |F_k|^2,   F the target's Fourier coefficient at k and F^ the function's. Phase counts: in the measure of
    Rahaman et al. 2018, |F^_k| / |F_k|, a shifted copy would score 1.

    f, target: (..., G) real; frequencies: (K,) whole numbers below G / 2. Returns (..., K), and (...) the function's energy at all
    other frequencies over the target's energy.
    """
    F, F_hat = torch.fft.rfft(target), torch.fft.rfft(f)
    at, at_hat = F[..., frequencies], F_hat[..., frequencies]
    strength = (at.conj() * at_hat).real / at.abs().square()
    outside = F_hat.abs().square().sum(-1) - at_hat.abs().square().sum(-1)
    return strength, outside / at.abs().square().sum(-1)


# ---------------------------------------------------------------- contextual bandits

class ContextualBandit:
    r"""In each of C contexts one of A actions, drawn uniformly, is rewarded with 1, the others with 0. Mode k is context k.

    5 contexts and 5 actions are, by second-hand notes, Rabinowitz's; 60 trials and contexts uniform at random are our choice. rates: (C,) how often each
    context comes, scaled to sum to 1. A task is the vector of correct actions (C,).

    Here every predictor is an agent: begin(B, prior) an episode; policy() -> (B, C, A), before each trial, for every context;
    observe(context, action, reward), each (B,), after it.
    """

    sign = -1                                             # a loss times this is what a person reads: here the reward

    def __init__(self, contexts=5, actions=5, trials=60, rates=None):
        self.contexts, self.actions, self.trials = contexts, actions, trials
        self.input_size, self.outputs = 2 * contexts, actions + 1              # of a Meta-Learner: see meta.MetaAgent
        self.rates = torch.ones(contexts) / contexts if rates is None else torch.as_tensor(rates) / sum(rates)

    def show(self, x):
        """An input as a network is shown it."""
        return x

    def references(self):
        """The agents that need no training: the one that never learns, and Bayes."""
        return dict(prior=UniformAgent(), bayes=BayesAgent())

    def sample(self, n, generator):
        """Draws n tasks: correct actions (n, C)."""
        return torch.randint(self.actions, (n, self.contexts), generator=generator)

    def episodes(self, correct, generator):
        """One episode of each task in correct (B, C): the tasks, the contexts (B, T), and numbers in [0, 1) that decide the actions (B, T)."""
        contexts = torch.multinomial(self.rates, len(correct) * self.trials, replacement=True, generator=generator)
        return correct, contexts.view(len(correct), self.trials), torch.rand(len(correct), self.trials, generator=generator)

    @torch.no_grad()
    def play(self, agent, correct, contexts, luck):
        """Lets an agent play the episodes, shapes as from `episodes`.

        Returns rewards (B, T), and the probability of the correct action in every context before each trial and after the last (B, T + 1, C).
        """
        agent.begin(len(correct), self)
        rewards, probabilities, each = [], [], torch.arange(len(correct))
        for t in range(self.trials + 1):
            policy = agent.policy()
            probabilities.append(policy.gather(-1, correct[..., None])[..., 0])
            if t < self.trials:
                context = contexts[:, t]
                action = draw(policy[each, context], luck[:, t])
                rewards.append((action == correct[each, context]).float())
                agent.observe(context, action, rewards[-1])
        return torch.stack(rewards, 1), torch.stack(probabilities, 1)

    def losses(self, agent, *episodes):
        """Minus the reward, per episode and trial (B, T), so that a captured fraction of losses is one of returns."""
        return in_chunks(lambda *chunk: -self.play(agent, *chunk)[0], *episodes)

    def inner_loop(self, agent, correct, n, generator, relabel=True):
        """What an agent learns within n episodes of each task (N, C): strengths (T + 1, N, C), averaged over them, and no other readings.

        relabel: the correct actions are drawn anew for every episode, that is, an agent meets a task up to the names of its actions.
        Otherwise the order in which it tries equally promising actions, which is no matter of learning, would pass for staggering
        (`OrderedBayesAgent` is as optimal as `BayesAgent` and shows it).
        """
        tasks = correct.repeat_interleave(n, 0)
        episodes = self.episodes(self.sample(len(tasks), generator) if relabel else tasks, generator)
        probability = in_chunks(lambda *chunk: self.play(agent, *chunk)[1], *episodes, size=2048)
        return self.strength(probability).unflatten(0, (-1, n)).mean(1).movedim(1, 0), {}

    def strength(self, probability):
        """S = (J - 1/A) / (1 - 1/A): 0 at chance, 1 when the correct action is certain."""
        return (probability - 1 / self.actions) / (1 - 1 / self.actions)

    def probability(self, strength):
        """J from S."""
        return strength * (1 - 1 / self.actions) + 1 / self.actions

    def first_visits(self, contexts):
        """Which context, if any, is visited for the first time at each trial: contexts (B, T) to (B, T, C). First visits are alike in what
        they can teach; later ones are not."""
        visited = torch.nn.functional.one_hot(contexts, self.contexts)
        return (visited > 0) & (visited.cumsum(1) == 1)

    def bayes_curve(self):
        r"""P(correct) of the Bayes-optimal policy in each context before trial t = 0 ... T, in expectation over episodes: (T + 1, C).

        At the (n + 1)-th visit of a context it is min(n + 1, A) / A, for each failure rules an action out. Hence
        E[min(n_t + 1, A)] / A with n_t ~ Binomial(t, rate of the context).          (derived; myopia is optimal here)
        """
        t = torch.arange(self.trials + 1.0, dtype=torch.float64)[:, None, None]
        n, p = torch.arange(self.trials + 1.0, dtype=torch.float64), self.rates.double()[:, None]
        log_choose = torch.lgamma(t + 1) - torch.lgamma(n + 1) - torch.lgamma((t - n).clamp_min(0) + 1)
        binomial = torch.where(n <= t, (log_choose + torch.xlogy(n, p) + torch.xlogy((t - n).clamp_min(0), 1 - p)).exp(), 0)
        return (binomial * (n + 1).clamp_max(self.actions)).sum(-1) / self.actions


def interference(before, after, visited):
    """Interference, measured: what a visit does for a context not yet solved (J < 1/2), by how many other contexts are solved (ours).

    before, after: (..., C) probabilities of the correct action, around a visit (or one gradient step); visited: (..., C), which contexts it
    was a visit to. Returns a list over 0 ... C - 1 others solved of (the share of visits at which J rose, its mean rise, visits counted).
    """
    solved = before >= 0.5
    others = solved.sum(-1, keepdim=True).expand_as(before)               # the context itself is not solved, where it counts
    groups = [(after - before)[visited & ~solved & (others == n)] for n in range(before.shape[-1])]
    return [((rise > 0).double().mean().item(), rise.mean().item(), len(rise)) for rise in groups]


def draw(policy, luck):
    """Actions (B,) drawn from policies (B, A) by inverting their distribution functions at luck (B,), uniform on [0, 1)."""
    return (policy.cumsum(-1)[:, :-1] <= luck[:, None] * policy.sum(-1, keepdim=True)).sum(-1)


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
    """The Bayes-optimal policy: uniform over the actions that can still be the correct one, in each context."""

    def observe(self, context, action, reward):
        """A failure rules its action out; a success rules out all others. context, action, reward: (B,)."""
        each = torch.arange(len(context))
        only = torch.zeros_like(self.possible[:, 0]).scatter(1, action[:, None], 1.0)
        self.possible[each, context] = torch.where(reward[:, None] > 0, only, self.possible[each, context] * (1 - only))


class OrderedBayesAgent(BayesAgent):
    """As optimal as BayesAgent, but it tries the possible actions in the order of their names, not at random."""

    def policy(self):
        """All probability on the first possible action of each context, (B, C, A)."""
        return torch.nn.functional.one_hot(self.possible.argmax(-1), self.possible.shape[-1]).float()
