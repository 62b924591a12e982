r"""Task distributions, each with its exact Bayes-optimal predictor beside it, and the measures that all families share.

    prior = LinearRegression(dim=5, noise=0.1, trials=20)
    W = prior.sample(64, generator)                      # 64 tasks
    x, y = prior.episodes(W, generator)                  # (64, 20, 5), (64, 20, 5)
    loss = (Bayes(prior).predict(x, y) - y).square().mean()

Axis order: (B, T, D), that is episodes, trials, dimensions; K counts modes, Q query points.

Every predictor answers the same two calls, in this file (`Bayes`, `Prior`) and in meta.py (`MetaLearner`):
    predict(x, y)     -> (B, T, Dy)           the guess at y_t from x_0 … x_t and y_0 … y_{t-1}
    query(x, y, xq)   -> (B, T + 1, Q, Dy)    the function held in mind before trial t, at query points xq (Q, Dx)

Reference: Rabinowitz 2019, arXiv 1905.01320. Imports nothing of ours: copy it alone. Left out on purpose: data sets, loaders,
plots. Everything random takes an explicit CPU generator.
"""
import math

import torch


# ---------------------------------------------------------------- measures, the same for every family and system

def half_time(strength, time):
    r"""When each mode is half learned: the first upward crossing of 1/2, linearly interpolated.

    strength: (..., N) mode strength at times `time` (N,), increasing. Returns (...): in the units of `time`; `time[0]`
    where a mode starts at 1/2 or above, inf where it is never reached.
    """
    above = strength >= 0.5
    after = above.int().argmax(-1).clamp_min(1)                       # argmax finds the first True
    s0, s1 = (strength.gather(-1, i[..., None])[..., 0] for i in (after - 1, after))
    t0, t1 = time[after - 1], time[after]
    crossing = t0 + (t1 - t0) * (0.5 - s0) / (s1 - s0)
    crossing = torch.where(above[..., 0], time[0], crossing)
    return torch.where(above.any(-1), crossing, torch.inf)


def staggering_index(half_times):
    """Latest half-time over earliest. half_times: (..., K), positive. Returns (...): 1 is concurrent, inf if a mode is not reached."""
    last = half_times.amax(-1)
    return torch.where(last.isinf(), torch.inf, last / half_times.amin(-1))


def geometric_mean(values):
    """Geometric mean over the last axis; inf if any value is."""
    return values.log().mean(-1).exp()


def captured_fraction(prior, meta, bayes):
    r"""kappa = (L_prior - L_meta) / (L_prior - L_bayes), each loss a mean over the last axis (tasks). 1 is Bayes-optimal, 0 never learns."""
    return (prior - meta).mean(-1) / (prior - bayes).mean(-1)


def bootstrap_interval(statistic, *samples, generator, resamples=2000):
    """Percentile bootstrap 95% interval of `statistic`, resampling tasks; paired samples are resampled together.

    samples: (N,) each; statistic maps tensors (..., N) to (...). Returns (low, high).
    """
    n = len(samples[0])
    pick = torch.randint(n, (resamples, n), generator=generator)
    values = statistic(*(s[pick] for s in samples)).sort().values
    return values[int(0.025 * resamples)].item(), values[int(0.975 * resamples) - 1].item()


def describe(strength, time, generator):
    """What one system shows: a dict of half_times (K,), geometric means over tasks; the staggering index, likewise, and its 95% interval.

    strength: (R, N, K) at times (R,), of N tasks or seeds. The index is taken per task, before any averaging over tasks.
    """
    half = half_time(strength.movedim(0, -1), time)
    index = staggering_index(half)
    return dict(half_times=geometric_mean(half.T).tolist(), staggering=geometric_mean(index).item(),
                staggering_ci=list(bootstrap_interval(geometric_mean, index, generator=generator)))


# ---------------------------------------------------------------- regression on fixed features, and exact inference in it

class FeatureRegression:
    r"""y_t = W phi(x_t) + eps_t,   W_ij ~ N(0, weight_var),   eps_t ~ N(0, noise^2 I).

    A family says what its features phi are (`features`, (..., Dx) -> (..., F)), how inputs are drawn (`inputs`), at which query
    points its modes are read (`queries`) and how (`mode_strength`). A task is its weight matrix W (Dy, F).
    """

    def sample(self, n, generator):
        """Draws n tasks from the prior: (n, Dy, F)."""
        return self.weight_var ** 0.5 * torch.randn(n, self.outputs, self.n_features, generator=generator)

    def episodes(self, W, generator):
        """One episode of each task in W (B, Dy, F). Returns x (B, T, Dx) and noisy y (B, T, Dy)."""
        x = self.inputs(len(W), generator)
        y = self.features(x) @ W.mT
        return x, y + self.noise * torch.randn(y.shape, generator=generator)


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
    r"""What the modes do not show: ||U^T W V - diag||_F / ||s||, shapes as in `mode_strength`. Returns (...), 0 when W lies in the target's basis."""
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

    20 trials are Rabinowitz's; dim, noise and the prior's scale are our choice. The prior's spectrum at dim 5: 95% within 0.026 … 1.945.
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
        """2 dim + 6 query points, half of them the others' negatives, so that an intercept cannot pass for a slope."""
        half = torch.randn(self.dim + 3, self.dim, generator=generator)
        return torch.cat([half, -half])

    def read_modes(self, f, xq, W):
        """What a function f (E, T + 1, Q, dim), seen at xq in E episodes of task W (dim, dim), has of that task's modes.

        Returns (T + 1, K) mean strengths, modes from the largest singular value down, and a dict of (T + 1,): the R^2 of the linear
        probe, and the mean off-diagonal residual.
        """
        U, s, Vh = torch.linalg.svd(W)
        fitted, residual, total = linear_probe(f, xq)
        r_squared = 1 - residual.sum(0) / total.sum(0).clamp_min(1e-12)
        return (mode_strength(fitted, U, Vh.mT, s).mean(0),
                dict(r_squared=r_squared, off_diagonal=off_diagonal(fitted, U, Vh.mT, s).mean(0)))
