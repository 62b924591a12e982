r"""Task distributions, each beside its exact Bayes-optimal predictor.

    import torch
    generator = torch.Generator().manual_seed(0)
    distribution = LinearRegression(noise=0.1, trials=20)
    W = distribution.sample(64, generator)                      # 64 tasks (64, 5, 5)
    x, y = distribution.episodes(W, generator)                  # (64, 20, 5), (64, 20, 5)
    loss = (Bayes(distribution).predict(x, y) - y).square().mean()

Axis order: (B, T, D) for episodes, trials and dimensions. To evaluate, we take E repeats of N
tasks, each with an episode: (N, E, T, D). Strengths of K modes are (T + 1, N, E, K).

Every predictor of a regression, like meta.MetaLearner, answers two calls with its guesses:
    predict(x, y)    -> (B, T, Dy)         at y_t, given x_0 … x_t and y_0 … y_{t-1}
    probe(x, y, xq)  -> (B, T + 1, Q, Dy)  at xq (Q, Dx), before each trial and after the last
A bandit has an agent instead, with the calls described at `ContextualBandit`.

Reference: Rabinowitz 2019, arXiv 1905.01320. This file imports none of the others, so you can copy
it alone. It leaves out data sets, loaders and plots.
"""
import torch
from torch.nn.functional import one_hot

# ---------------------------------------------------------------- regression on fixed features
@torch.no_grad()
def in_chunks(function, *tensors, size=256):
    """Applies a function to `size` episodes at a time, to save memory: (B, ...), on the CPU."""
    chunks = zip(*(tensor.split(size) for tensor in tensors))
    return torch.cat([function(*chunk).cpu() for chunk in chunks])

def power_law(n, exponent):
    """n shares proportional to k^-exponent for k = 1 … n, summing to 1: (n,), float64."""
    shares = torch.arange(1, n + 1, dtype=torch.float64) ** -exponent
    return shares / shares.sum()

class FeatureRegression:
    r"""y_t = W phi(x_t) + eps_t,   W_ij ~ N(0, weight_var_j),   eps_t ~ N(0, noise^2 I).

    A task is its weight matrix W (Dy, F). Feature j belongs to mode j modulo K. A subclass has
    `outputs` (Dy), `input_size` (Dx), `modes` (K), `weight_var` (F,), `noise`, `trials`, and
        queries(generator)                the query points of the probe (Q, Dx)
        evaluation_tasks(n, generator)    the tasks on which all systems are compared (n, Dy, F)
    and changes what follows as it needs."""
    def features(self, x):
        """phi: (..., Dx) to (..., F), here the input itself."""
        return x

    def encode(self, x):
        """An input as networks see it: (..., Dx) to (..., any), here the input itself."""
        return x

    def inputs(self, n, generator):
        """Draws inputs, here x ~ N(0, I): (n, T, Dx)."""
        return torch.randn(n, self.trials, self.input_size, generator=generator)

    def sample(self, n, generator):
        """Draws n tasks: (n, Dy, F)."""
        W = torch.randn(n, self.outputs, len(self.weight_var), generator=generator)
        return self.weight_var.sqrt().to(W) * W

    def episodes(self, W, generator):
        """Draws one episode for each task in W (B, Dy, F): x (B, T, Dx) and noisy y (B, T, Dy)."""
        x = self.inputs(len(W), generator)
        y = self.features(x) @ W.mT
        return x, y + self.noise * torch.randn(y.shape, generator=generator)

    def repeats(self, W, n, generator):
        """n repeats of each task (N, Dy, F), here all the same: (N, n, Dy, F)."""
        return W[:, None].expand(-1, n, -1, -1)

    def evaluation_episodes(self, W, n, generator):
        """Draws n repeats of each task (N, Dy, F) and an episode for each. Returns these repeats
        (N, n, Dy, F), xq (Q, Dx), x (N, n, T, Dx) and y (N, n, T, Dy)."""
        xq, W = self.queries(generator), self.repeats(W, n, generator)
        x, y = self.episodes(W.flatten(0, 1), generator)
        return W, xq, x.unflatten(0, (-1, n)), y.unflatten(0, (-1, n))

    def strength(self, W_hat, W):
        """How much of each mode of W is in W_hat: the projection w_k . w_hat_k / |w_k|^2, where w_k
        are all weights of mode k. W_hat and W are (..., Dy, F) and broadcast. Returns (..., K)."""
        projection, size = ((W * V).sum(-2).unflatten(-1, (-1, self.modes)).sum(-2)
                            for V in (W_hat, W))
        return projection / size

    def fit(self, f, xq):
        """Fits W_hat (..., Dy, F) to outputs f (..., Q, Dy) at query points xq (Q, Dx) by least
        squares. Returns W_hat, and the residual and the total sum of squares (...)."""
        phi = self.features(xq)
        W_hat = (torch.linalg.pinv(phi) @ f).mT
        residual = (f - phi @ W_hat.mT).square().sum((-2, -1))
        return W_hat, residual, f.square().sum((-2, -1))

    def excess(self, predictor, x, y):
        """Squared error of each episode and trial, averaged over outputs, less the variance of the
        noise: (B, T), on the CPU."""
        return (in_chunks(predictor.predict, x, y) - y).square().mean(-1) - self.noise ** 2

    def never_learns(self, x, y):
        """The excess of a system that always guesses the mean, zero: (B, T)."""
        return y.square().mean(-1) - self.noise ** 2

    def inner_loop(self, predictor, W, xq, x, y):
        """What a predictor learns in `evaluation_episodes`: strengths (T + 1, N, E, K), and the
        probe's R^2 (T + 1,), pooled over a task's episodes, then averaged; 1 if guesses are 0."""
        f = in_chunks(lambda x, y: predictor.probe(x, y, xq), x.flatten(0, 1), y.flatten(0, 1))
        W_hat, residual, total = (part.unflatten(0, x.shape[:2]) for part in self.fit(f, xq))
        r_squared = (1 - residual.sum(1) / total.sum(1).clamp_min(1e-12)).mean(0)
        strength = self.strength(W_hat, W[:, :, None])                      # (N, E, T + 1, K)
        return strength.movedim(2, 0).contiguous(), r_squared

class Bayes:
    """Exact posterior mean of a FeatureRegression, which minimizes the expected squared error, by
    recursive least squares. The rows of W have one posterior covariance P, so one Kalman gain g
    serves all outputs. The Joseph form of the update keeps P positive. A noise below 1e-6 is taken
    as 1e-6, because the data are float32 anyway."""
    def __init__(self, distribution):
        self.distribution = distribution

    def maps(self, x, y):
        """Posterior means of W before each trial and after the last: (B, T + 1, Dy, F)."""
        phi, y = self.distribution.features(x.double()), y.double()
        variance = max(self.distribution.noise, 1e-6) ** 2
        P = torch.diag(self.distribution.weight_var).to(phi)                # (F, F), then (B, F, F)
        identity = torch.eye(len(P)).to(phi)
        means = [phi.new_zeros(len(x), y.shape[-1], phi.shape[-1])]
        for t in range(x.shape[1]):
            p = phi[:, t, :, None]                                          # (B, F, 1)
            g = P @ p / (p.mT @ P @ p + variance)
            means.append(means[-1] + (y[:, t, :, None] - means[-1] @ p) @ g.mT)
            kept = identity - g @ p.mT
            P = kept @ P @ kept.mT + variance * g @ g.mT
        return torch.stack(means, 1)

    def predict(self, x, y):
        """Its guess at y_t before it is seen: (B, T, Dy)."""
        phi = self.distribution.features(x.double())
        return (self.maps(x, y)[:, :-1] @ phi[..., None])[..., 0].to(x)

    def probe(self, x, y, xq):
        """Its guesses at xq (Q, Dx), before each trial and after the last: (B, T + 1, Q, Dy)."""
        return (self.distribution.features(xq.double()) @ self.maps(x, y).mT).to(x)

class OneStep(Bayes):
    r"""One gradient step from zero on all trials so far, with the best rate for each column:
    W_hat_t = sum_{i < t} y_i x_i^T diag(g_t),   g_{t,k} = v_k / ((t + 1) v_k + sum v + noise^2),
    where v_k is the variance of column k in a LinearRegression. These rates minimize the expected
    squared error: with z = sum_i y_i x_{ik}, E[z w_k] = t v_k and E[z^2] = t ((t + 1) v_k + sum v +
    noise^2), because E[x^4] = 3 (derived here). Linear attention computes the same (von Oswald et
    al. 2023). The mean strength of a column is t g_{t,k}, however strong it is."""
    def maps(self, x, y):
        """W_hat before each trial and after the last: (B, T + 1, Dy, Dx)."""
        v, t = self.distribution.weight_var, torch.arange(x.shape[1] + 1)[:, None]
        g = v / ((t + 1) * v + v.sum() + self.distribution.noise ** 2)      # (T + 1, Dx)
        products = (y[..., None] * x[..., None, :]).double().cumsum(1)      # (B, T, Dy, Dx)
        return torch.nn.functional.pad(products, (0, 0, 0, 0, 1, 0)) * g[:, None]

    def half_times(self):
        """When the mean strength of each column reaches 1/2, in trials: (K,)."""
        v = self.distribution.weight_var
        return 1 + (v.sum() + self.distribution.noise ** 2) / v

# ---------------------------------------------------------------- linear regression
class LinearRegression(FeatureRegression):
    r"""y = W x + eps,   x ~ N(0, I),   eps ~ N(0, noise^2 I).

    Column k of W has variance proportional to k^(-2 skew), and the variances of a row sum to 1.
    Evaluation tasks are U diag(s) Pi, with singular_values s (K,), largest first. The columns are
    orthogonal, so they are the singular modes: mode k has length s_k. Repeats differ in Pi, so s_k
    says nothing of the prior. Second-hand notes on Rabinowitz give 20 trials; the rest is ours."""
    def __init__(self, singular_values=(1.1, 0.8, 0.6, 0.4, 0.2), noise=0.1, trials=20, skew=0.0):
        self.singular_values = torch.tensor(singular_values, dtype=torch.float32)
        self.noise, self.trials = noise, trials
        self.outputs = self.input_size = self.modes = len(singular_values)
        self.weight_var = power_law(self.modes, 2 * skew)

    def evaluation_tasks(self, n, generator):
        """n tasks U diag(s): (n, dim, dim). U is Haar: QR, with R_ii > 0 (Mezzadri 2007)."""
        Q, R = torch.linalg.qr(torch.randn(n, self.modes, self.modes, generator=generator))
        return Q * R.diagonal(dim1=-2, dim2=-1).sign()[:, None, :] * self.singular_values

    def repeats(self, W, n, generator):
        """n repeats of each task (N, dim, dim), columns in random order: (N, n, dim, dim)."""
        order = torch.rand(len(W), n, 1, self.modes, generator=generator).argsort(-1)
        return super().repeats(W, n, generator).gather(-1, order.expand(-1, -1, self.modes, -1))

    def columns(self, W):
        """In which column each mode is, the longest first: W (..., dim, dim) to (..., K)."""
        return W.square().sum(-2).argsort(dim=-1, descending=True, stable=True)

    def queries(self, generator):
        """2 (dim + 2) random points in opposite pairs, so an intercept cannot pass for a slope."""
        half = torch.randn(self.input_size + 2, self.input_size, generator=generator)
        return torch.cat([half, -half])

    def strength(self, W_hat, W):
        """Projects each learned column on the task's, the longest column first: (..., K)."""
        by_column = super().strength(W_hat, W)
        return by_column.gather(-1, self.columns(W).expand_as(by_column))

# ---------------------------------------------------------------- nonlinear regression
class FourierRegression(FeatureRegression):
    r"""y = sum_k a_k cos 2 pi k x + b_k sin 2 pi k x + eps,   x ~ U[0, 1).

    `frequencies` are K whole numbers; mode k is the k-th of them. The variance of a_k and b_k is
    proportional to k^(-2 skew), k counting from 1, and sums to 1 over the modes. The posterior is
    that of a Gaussian process with a band-limited kernel. Phase counts in a strength; in Rahaman et
    al. 2018, who measure |w_hat_k| / |w_k|, a shifted copy would score 1. All of this is ours."""
    def __init__(self, frequencies=(1, 2, 3, 4, 5), noise=0.1, trials=40, skew=0.0):
        self.frequencies = torch.as_tensor(frequencies)
        self.noise, self.trials = noise, trials
        self.outputs = self.input_size = 1
        self.modes = len(self.frequencies)
        self.weight_var = power_law(self.modes, 2 * skew).repeat(2)

    def features(self, x):
        """cos 2 pi k x for every k, then sin 2 pi k x: (..., 1) to (..., 2 K)."""
        phase = 2 * torch.pi * x * self.frequencies.to(x)
        return torch.cat([phase.cos(), phase.sin()], -1)

    def encode(self, x):
        """The point (cos 2 pi x, sin 2 pi x) on the circle, for networks: (..., 1) to (..., 2). As
        numbers, 0 and 1 would look far apart (Basri et al. 2019)."""
        return FourierRegression([1]).features(x)

    def waves(self, f, x, W):
        """Strengths (R, N, E, K) of tasks W (N, 1, 2 K) in functions f (R, N, E, Q) at x (Q, 1)."""
        return self.strength(self.fit(f[..., None], x)[0], W[:, None])

    def inputs(self, n, generator):
        """x ~ U[0, 1): (n, T, 1)."""
        return torch.rand(n, self.trials, 1, generator=generator)

    def evaluation_tasks(self, n, generator):
        """n tasks in which all frequencies have one amplitude and random phases: (n, 1, 2 K)."""
        phase = 2 * torch.pi * torch.rand(n, 1, self.modes, generator=generator)
        return (2 / self.modes) ** 0.5 * torch.cat([phase.cos(), phase.sin()], -1)

    def queries(self, generator):
        """A uniform grid on the circle, finer than the band needs: (Q, 1)."""
        points = 2 * int(self.frequencies.max()) + 6
        return torch.arange(points)[:, None] / points

# ---------------------------------------------------------------- contextual bandits
class ContextualBandit:
    r"""In each of C contexts, one of A actions is correct and pays 1; the others pay 0.

    A task is the vector of correct actions (C,); mode k is context k. Correct actions are drawn
    uniformly and independently, but the first `tied` contexts always share theirs. Second-hand
    notes give Rabinowitz's bandit as 5 contexts and 5 actions; 60 trials and the tie are ours.
    Raises ValueError unless tied is 1 or 2 and A >= C - 1 >= 1, which `evaluation_tasks` needs.

    An agent answers four calls: reset(B) starts B episodes; act(contexts) gives the probabilities
    of the actions (B, A) in the contexts (B,) of the trial that is played; probe(contexts) gives
    them (B, Q, A) in any contexts (B, Q) before this trial, without effect; and
    update(context, action, reward), (B,) each, ends the trial."""
    def __init__(self, contexts=5, actions=5, trials=60, tied=1):
        if tied not in (1, 2) or not 1 <= contexts - 1 <= actions:
            raise ValueError(f"{contexts} contexts, {actions} actions, tied {tied}: a bandit needs "
                             "2 or more contexts, at most one more than actions, and tied 1 or 2")
        self.contexts, self.actions, self.trials = contexts, actions, trials
        # contexts of one group share their correct action: 0, 1, 2, … or, tied, 0, 0, 1, …
        self.group = (torch.arange(contexts) - tied + 1).clamp_min(0)

    def sample(self, n, generator):
        """Draws n tasks: correct actions (n, C)."""
        size = n, int(self.group[-1]) + 1
        return torch.randint(self.actions, size, generator=generator)[:, self.group]

    def episodes(self, correct, generator):
        """Draws one episode for each task in correct (B, C). Returns the tasks, contexts (B, T),
        and action noise (B, T): uniform numbers that turn probabilities into actions."""
        shape = len(correct), self.trials
        contexts = torch.randint(self.contexts, shape, generator=generator)
        return correct, contexts, torch.rand(shape, generator=generator)

    def evaluation_tasks(self, n, generator):
        """n times one task (n, C), tied or not: contexts 1 and 2 share an answer, no others do."""
        return (torch.arange(self.contexts) - 1).clamp_min(0).expand(n, -1)

    def repeats(self, correct, n, generator):
        """n repeats of each task (N, C), with actions permuted alike in all contexts: (N, n, C).
        The order in which an agent happens to try actions then averages out; a tie remains."""
        order = torch.rand(len(correct), n, self.actions, generator=generator).argsort(-1)
        return order.gather(-1, correct[:, None].expand(-1, n, -1))

    @torch.no_grad()
    def play(self, agent, correct, contexts, action_noise, probe=False):
        """Lets an agent play. Returns its actions and rewards (B, T) and, if `probe`, else None, J
        (B, T + 1, C): the probability of the correct action in each context before trial 0 … T."""
        answers, actions, rewards, J = correct.gather(1, contexts), [], [], []
        agent.reset(len(correct))
        for t in range(self.trials + 1):
            if probe:
                policies = agent.probe(torch.arange(self.contexts).expand_as(correct))
                J.append(policies.gather(-1, correct[..., None])[..., 0])
            if t < self.trials:
                policy = agent.act(contexts[:, t]).cumsum(-1)           # inverse transform sampling
                level = action_noise[:, t, None] * policy[:, -1:]
                actions.append((policy[:, :-1] <= level).sum(-1))
                rewards.append((actions[-1] == answers[:, t]).float())
                agent.update(contexts[:, t], actions[-1], rewards[-1])
        return torch.stack(actions, 1), torch.stack(rewards, 1), torch.stack(J, 1) if J else None

    def evaluation_episodes(self, correct, n, generator):
        """Draws n repeats of each task (N, n, C), each with contexts and action noise (N, n, T)."""
        episodes = self.episodes(self.repeats(correct, n, generator).flatten(0, 1), generator)
        return tuple(part.unflatten(0, (-1, n)) for part in episodes)

    def excess(self, agent, correct, contexts, action_noise):
        """Regret of each episode and trial, 1 less the reward: (B, T)."""
        return 1 - in_chunks(lambda *episodes: self.play(agent, *episodes)[1],
                             correct, contexts, action_noise, size=2048)

    def never_learns(self, correct, contexts, action_noise):
        """The expected regret of a system that acts at random: (B, T)."""
        return torch.full(contexts.shape, 1 - 1 / self.actions)

    def inner_loop(self, agent, permuted, contexts, action_noise):
        """Strengths (T + 1, N, E, C) in `evaluation_episodes`; R^2 = 1 (T + 1,): nothing is fit."""
        flat = [part.flatten(0, 1) for part in (permuted, contexts, action_noise)]
        J = in_chunks(lambda *parts: self.play(agent, *parts, probe=True)[2], *flat, size=2048)
        strength = self.strength(J).unflatten(0, permuted.shape[:2]).movedim(2, 0)
        return strength, torch.ones(len(strength))

    def strength(self, J):
        """S = (J - 1/A) / (1 - 1/A): 0 at chance, 1 when the correct action is certain."""
        return (J - 1 / self.actions) / (1 - 1 / self.actions)

    def bayes_curve(self):
        """Expected J of the Bayes-optimal policy in each context before trial 0 … T: (T + 1, C).
        J = E[min(n_t + 1, A)] / A,   n_t ~ Binomial(t, size of the context's group / C),
        since each failure in a group rules one action out (derived here). It holds for tasks in
        which the contexts of a group do share their correct action."""
        n = torch.arange(self.trials + 1.0, dtype=torch.float64)
        rate = self.group.bincount()[self.group, None].double() / self.contexts         # (C, 1)
        n_t = torch.distributions.Binomial(n[:, None, None], rate, validate_args=False)
        chance = n_t.log_prob(n).exp()                    # (T + 1, C, T + 1), 0 where n is above t
        return (chance * (n + 1).clamp_max(self.actions)).sum(-1) / self.actions

class BayesAgent:
    """The Bayes-optimal policy: uniform over the actions that can still be correct. All of them are
    equally likely, and each rules out one action if it fails, so the choice that is best now is
    best for later, too. Its calls are those of `ContextualBandit`."""
    def __init__(self, distribution):
        self.group, self.actions = distribution.group, distribution.actions

    def reset(self, n):
        """Starts n episodes."""
        self.possible = torch.ones(n, int(self.group[-1]) + 1, self.actions)        # (B, groups, A)

    def act(self, contexts):
        """Action probabilities in the contexts (B,) of the trial that is played: (B, A)."""
        return self.probe(contexts[:, None])[:, 0]

    def probe(self, contexts):
        """Action probabilities in any contexts (B, Q), without effect: (B, Q, A)."""
        possible = self.possible[torch.arange(len(contexts))[:, None], self.group[contexts]]
        return possible / possible.sum(-1, keepdim=True)

    def update(self, context, action, reward):
        """Keeps what explains the reward: all but a failed action, a successful one alone."""
        episode, group = torch.arange(len(context)), self.group[context]
        self.possible[episode, group] *= one_hot(action, self.actions) == reward[:, None]
