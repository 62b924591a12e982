r"""Learners: systems that learn one task by gradient descent, their closed forms, and measures.

    import torch
    generator = torch.Generator().manual_seed(0)
    s = torch.tensor([1.6, 0.3])
    target = torch.diag(s)[None]                                    # one 2 x 2 target
    layers = init_layers([1], [2, 2, 2], generator, std=0.03)       # two small layers
    maps = linear_network(target, layers, lr=0.01, eval_steps=range(2001))
    strength = maps[:, 0].diagonal(dim1=-2, dim2=-1) / s            # (2001, 2)
    print(half_time(strength, torch.arange(2001)))                  # the strong mode comes first

Axis order: recorded times R first, then the batch, then a map's own axes (Dy, Dx). Strengths are
(R, N, E, K): times, tasks, repeats, modes.

References: Saxe, McClelland & Ganguli 2013, arXiv 1312.6120 (deep linear networks); Chizat et al.
2019, arXiv 1812.07956, and Domine et al. 2024, arXiv 2409.14623 (rich and lazy learning); Rahaman
et al. 2018, arXiv 1806.08734, and Xu et al. 2018, arXiv 1807.01251 (spectral bias); Schaul et al.
2019, arXiv 1904.11455 (ray interference). This file imports none of the others, so you can copy it
alone. It leaves out minibatches.
"""
import functools
import math

import torch

# ---------------------------------------------------------------- the loop of all Learners
@torch.enable_grad()
def gradient_descent(parameters, loss, measure, lr, eval_steps, optimizer=torch.optim.SGD):
    """Trains parameters and returns what measure() gives at increasing steps, (R, ...); training
    ends at the last. loss(step) is the sum of the losses of all systems, so none influences
    another. optimizer: made like torch.optim.SGD. Raises FloatingPointError if it diverges."""
    opt, place = optimizer(parameters, lr=lr), {step: i for i, step in enumerate(eval_steps)}
    measured = torch.stack([measure().detach()] * len(place))       # in one piece, to save memory
    for step in range(eval_steps[-1] + 1):
        if step in place:                           # before the update, so step 0 is the start
            measured[place[step]] = measure().detach()
        opt.zero_grad()
        loss(step).backward()
        opt.step()
    if not measured.isfinite().all():
        raise FloatingPointError("the Learner diverged; a smaller learning rate may help")
    return measured

# ---------------------------------------------------------------- linear networks
def init_weight(shape, fan_in, generator, dtype=None):
    """Weights by torch's default initialization, U(-1, 1) / sqrt(fan_in)."""
    return (2 * torch.rand(shape, generator=generator, dtype=dtype) - 1) / fan_in ** 0.5

def init_layers(batch, widths, generator, std=None, dtype=None):
    """Initial weights of linear networks, first layer first: a list of matrices (*batch, out, in)
    for the widths, inputs first. Entries are N(0, std^2), or torch's default without a std."""
    return [init_weight((*batch, m, n), n, generator, dtype) if std is None else
            std * torch.randn(*batch, m, n, generator=generator, dtype=dtype)
            for n, m in zip(widths, widths[1:])]

def linear_network(target, layers, lr, eval_steps, optimizer=torch.optim.SGD, online=False,
                   noise=0.0, generator=None):
    r"""Trains one linear network per target, with any number of layers.
    L = 1/2 ||W - W_2 W_1||_F^2, the expected loss on white inputs up to the noise. One layer has
    the time constant 1 / lr steps. Online, each step sees one new trial: x ~ N(0, I) and y = W x
    plus noise of this standard deviation. target: (..., Dy, Dx). layers: initial weights, as from
    `init_layers`. The rest: see `gradient_descent`. Returns the maps (R, ..., Dy, Dx)."""
    layers = [layer.detach().clone().requires_grad_() for layer in layers]

    def product():
        return functools.reduce(lambda W, layer: layer @ W, layers)

    def loss(step):
        error = target - product()
        if online:
            x, eps = (torch.randn(*shape[:-1], 1, generator=generator, dtype=target.dtype)
                      for shape in (target.mT.shape, target.shape))         # (..., Dx or Dy, 1)
            error = error @ x + noise * eps
        return 0.5 * error.square().sum()

    return gradient_descent(layers, loss, product, lr, eval_steps, optimizer)

# ---------------------------------------------------------------- the gain law
def gain_layers(batch, dim, hidden, gain, dtype=None):
    r"""Two initial layers with a product of exactly zero, in which every mode has one gain c_0:
    W_2 W_1 = 0,   W_1^T W_1 = W_2 W_2^T = c_0 / 2 I. The input writes to the first units and the
    output reads from the last. Returns W_1 (*batch, hidden, dim) and W_2 (*batch, dim, hidden).
    Raises ValueError if hidden is below 2 dim."""
    if hidden < 2 * dim:
        raise ValueError(f"{hidden} hidden units are too few: there must be {2 * dim}")
    W1, W2 = torch.eye(hidden, dim, dtype=dtype), torch.eye(dim, hidden, dtype=dtype).flip(-1)
    return [(gain / 2) ** 0.5 * W.expand(*batch, -1, -1) for W in (W1, W2)]

def gain_law(s, gain, t):
    r"""Closed form of a mode a(t) of two layers that start as in `gain_layers` (derived here):
    da/dt = (s - a) sqrt(c_0^2 + 4 a^2),   a(0) = 0.

    The gain of a mode, c = |W_1 v|^2 + |W_2^T u|^2, obeys dc/dt = 4 a (s - a), and da/dt is
    (s - a) c, so c^2 - 4 a^2 stays at c_0^2. With r = sqrt(c_0^2 + 4 s^2) and E = exp(-r t),
    a = c_0 s (1 - E) (r + c_0 + (r - c_0) E) / (c_0^2 (1 + E^2) + c_0 r (1 - E^2) + 8 s^2 E).
    As c_0 -> 0 this is the logistic of Saxe et al. 2013 from a_0 = c_0 / 4, and as c_0 -> infinity
    it is one layer with the time constant 1 / c_0. s: (K,); t: (R,), lr times steps; a: (R, K)."""
    r = (gain ** 2 + 4 * s ** 2).sqrt()
    E = torch.exp(-r * t[:, None])                        # this sign does not overflow
    above = gain * s * (1 - E) * (r + gain + (r - gain) * E)
    return above / (gain ** 2 * (1 + E ** 2) + gain * r * (1 - E ** 2) + 8 * s ** 2 * E)

def gain_half_times(s, gain):
    r"""When `gain_law` reaches s / 2, in learning rate times steps: (K,) to (K,).
    t = (asinh((c_0^2 + 2 s^2) / (c_0 s)) - asinh(c_0 / (2 s))) / sqrt(c_0^2 + 4 s^2)."""
    r = (gain ** 2 + 4 * s ** 2).sqrt()
    return (torch.asinh((gain ** 2 + 2 * s ** 2) / (gain * s)) - torch.asinh(gain / (2 * s))) / r

def expected_gain(dim, hidden, std=None):
    """The gain c_0 that two layers from `init_layers` have on average (derived here): 2 h std^2 for
    h hidden units, or h / (3 dim) + 1 / 3 for torch's default, with variances 1 / (3 fan_in)."""
    return hidden / (3 * dim) + 1 / 3 if std is None else 2 * hidden * std ** 2

# ---------------------------------------------------------------- ReLU networks
ADAM = functools.partial(torch.optim.Adam, fused=True)

def relu_network(x, y, lr, eval_steps, hidden=64, layers=4, at=None, optimizer=ADAM, online=False,
                 generator=None):
    r"""Trains one ReLU network per data set: L = mean over points of (f(x) - y)^2, or online, step
    t on point t alone. Without points nothing changes. Weights start at torch's default.
    x: inputs (..., G, Dx); y: (..., G). layers: how many hidden layers of `hidden` units, 0 for a
    linear map. at: inputs at which to evaluate (Q, Dx) (default: x). The rest: see
    `gradient_descent`. Returns functions (R, ..., Q)."""
    points = x.flatten(0, -3)                                               # (S, G, Dx)
    at = points if at is None else at.expand(len(points), -1, -1)
    widths = [x.shape[-1]] + [hidden] * layers + [1]
    network = [[init_weight((len(points), rows, m), n, generator).requires_grad_()
                for rows in (n, 1)] for n, m in zip(widths, widths[1:])]    # weights, then biases

    def forward(h):                                       # (S, G, Dx) to (..., G)
        for i, (W, b) in enumerate(network):
            h = torch.baddbmm(b, h.relu() if i else h, W)
        return h[..., 0].unflatten(0, x.shape[:-2])

    def loss(step):
        now = slice(step, step + 1) if online else slice(None)
        error = forward(points[:, now]) - y[..., now]
        return error.square().sum() / max(1, error.shape[-1])

    return gradient_descent(sum(network, []), loss, lambda: forward(at), lr, eval_steps, optimizer)

# ---------------------------------------------------------------- policy gradient
def policy_gradient(correct, logits, lr, eval_steps, shared=True, online=False, generator=None):
    """Gradient ascent on the expected reward J, the mean over contexts of J_c = pi(correct_c | c),
    with the policy softmax(W e_c + b). W starts at `logits` and b at zero. The gradient is exact
    or, online, estimated from one trial a step (REINFORCE; Williams 1992).

    One bias b serves all contexts, so what one context learns is imposed on the others: it helps
    those with the same correct action (transfer) and can hinder the rest (interference; Schaul et
    al. 2019). With shared=False each context has its own bias, which doubles its rate. For two
    contexts and two actions with different correct ones, in time lr / C (derived here),
    dJ_1/dt = 2 g_1 (2 g_1 - g_2) with g_c = J_c (1 - J_c), and the same with 1 and 2 exchanged.
    correct: (..., C); logits: (..., C, A). Returns all J_c, (R, ..., C)."""
    W = logits.clone().requires_grad_()
    b = torch.zeros_like(logits[..., :1, :] if shared else logits).requires_grad_()

    def J():
        return (W + b).softmax(-1).gather(-1, correct[..., None])[..., 0]

    def loss(step):
        if not online:
            return -J().mean(-1).sum()
        context = torch.randint(correct.shape[-1], correct[..., :1].shape, generator=generator)
        policy = J().gather(-1, context)
        # reward times log pi(action): the reward is 1 if the action drawn is the correct one
        reward = torch.rand(policy.shape, generator=generator) < policy.detach()
        return -(reward * policy.log()).sum()

    return gradient_descent([W, b], loss, J, lr, eval_steps)

# ------------------------------------------------------------ measures, the same for all systems
def half_time(strength, time, level=0.5):
    """When each mode is half learned: the first upward crossing of the level, linearly
    interpolated. strength: (R, ...) at increasing times (R,). Returns (...), in units of time: inf
    for a mode that never reaches the level, nan for one that starts there."""
    above = strength >= level
    after = above.int().argmax(0, keepdim=True)           # argmax finds the first True
    before = (after - 1).clamp_min(0)
    s0, s1 = strength.gather(0, before), strength.gather(0, after)
    t0, t1 = time[before], time[after]
    crossing = (t0 + (t1 - t0) * (level - s0) / (s1 - s0))[0]
    return crossing.masked_fill(~above.any(0), torch.inf).masked_fill(above[0], torch.nan)

def half_times_of_halves(strength, time, level=0.5):
    """Half-times of strengths averaged over every other repeat, or over the only one: (2, N, K)."""
    halves = [strength[:, :, min(i, strength.shape[2] - 1)::2] for i in (0, 1)]
    return torch.stack([half_time(half.mean(2), time, level) for half in halves])

def staggering(strength, time, level=0.5):
    """Staggering index of each task, (N,): latest half-time over earliest, of strengths
    (R, N, E, K) averaged over repeats. 1 is concurrent. level: see `half_time`.

    The largest of several noisy ratios is biased upwards, so we cross-fit: one half of the repeats
    chooses the latest and the earliest mode, the other half measures their ratio. Then the halves
    change places, and the two ratios are averaged geometrically. It can come out below 1 by chance.
    In a staggered system with few repeats it is too low, because noise chooses wrong modes.

    A mode that is not reached counts as reached at the last time, so the index is a lower bound; a
    mode that starts learned is left out. nan if no mode is reached, or only one takes part."""
    half_times = half_times_of_halves(strength, time, level)
    skipped = half_times.isnan().any(0)
    undefined = (~half_times.isfinite()).all(-1).any(0) | ((~skipped).sum(-1) < 2)
    half_times = half_times.clamp_max(time[-1].item())
    latest = half_times.masked_fill(skipped, -torch.inf).argmax(-1, keepdim=True)
    earliest = half_times.masked_fill(skipped, torch.inf).argmin(-1, keepdim=True)
    measured = half_times.flip(0)                         # each half by the other's choice
    ratio = (measured.gather(-1, latest) / measured.gather(-1, earliest))[..., 0]
    return (ratio[0] * ratio[1]).sqrt().masked_fill(undefined, torch.nan)

def staggering_within(strength, time):
    """Geometric mean of the staggering indices of single repeats of a task, whatever their order:
    (N,). A repeat in which no mode is reached is left out."""
    index = staggering(strength.flatten(1, 2)[:, :, None], time)            # each as a task
    return index.unflatten(0, strength.shape[1:3]).log().nanmean(1).exp()

def rank_correlation(strength, time):
    """How much of the order of learning all repeats of a task share: the rank correlation of their
    half-times over all pairs, (N,). 1 is the same order every time, 0 is chance. It is (E W - 1) /
    (E - 1) with Kendall's W corrected for ties (Kendall & Babington Smith 1939); without ties it is
    the mean Spearman correlation. nan for one repeat, or if all half-times tie."""
    half_times = half_time(strength, time).nan_to_num(nan=-torch.inf, posinf=torch.inf)
    before = (half_times[..., None, :] < half_times[..., :, None]).double()
    ranks = (before.sum(-1) - before.sum(-2)) / 2         # less their mean: (N, E, K)
    own = ranks.square().sum((1, 2))
    return (ranks.sum(1).square().sum(-1) - own) / ((ranks.shape[1] - 1) * own)

def half_time_correlation(strength, other, time):
    """Correlation of the log half-times of two systems on the same episodes, for each mode: (K,).
    It takes all episodes in which both systems have a half-time. Both are (R, N, E, K)."""
    a, b = (half_time(s, time).flatten(0, 1).log() for s in (strength, other))
    both = a.isfinite() & b.isfinite()
    a, b = a.where(both, torch.nan), b.where(both, torch.nan)
    a, b = a - a.nanmean(0), b - b.nanmean(0)
    return (a * b).nansum(0) / (a.square().nansum(0) * b.square().nansum(0)).sqrt()

def standard_error(values):
    """Standard error of the mean over the first axis, (n, ...) to (...); nan for a single value."""
    if len(values) < 2:
        return torch.full_like(values[0], math.nan)
    return values.std(0) / len(values) ** 0.5

def interval(values):
    """Mean of those values (N,) that are not nan, and mean ± 2 standard errors: three floats. The
    bounds are nan for a single value and for infinite ones."""
    values = values[~values.isnan()].double()
    half = 2 * standard_error(values).item() if len(values) else math.nan
    return values.mean().item(), values.mean().item() - half, values.mean().item() + half

def normalized_score(none, meta, bayes):
    """The share of what Bayes gains over never learning that the Meta-Learner gains, and that ± 2
    standard errors by the delta method. From the losses of the three systems on the same
    episodes and trials, (n, T) each. nan where Bayes gains nothing."""
    none, meta, bayes = (losses.mean(1) for losses in (none, meta, bayes))
    gain = (none - bayes).mean()
    score = (none - meta).mean() / gain if gain else gain * math.nan
    return interval(score + ((none - meta) - score * (none - bayes)) / gain)

def describe(strength, time):
    """Summarizes strengths, (R, N, E, K) or (R, K), in a dict. half_times (K,), staggering,
    late_staggering (at 0.9) and within are geometric means over tasks, intervals ± 2 standard
    errors; bounds say if a mode is not reached in some task, or for within, in some repeat. Other
    shapes raise ValueError."""
    if strength.ndim == 2:
        strength = strength[:, None, None]
    if strength.ndim != 4:
        raise ValueError(f"strengths must be (R, N, E, K) or (R, K), not {tuple(strength.shape)}")
    index, low, high = (math.exp(value) for value in interval(staggering(strength, time).log()))
    correlation, *correlation_ci = interval(rank_correlation(strength, time))
    late, within = staggering(strength, time, 0.9), staggering_within(strength, time)
    unreached, unreached_late = (half_times_of_halves(strength, time, level).isinf().any().item()
                                 for level in (0.5, 0.9))
    return dict(
        half_times=half_time(strength.mean(2), time).log().nanmean(0).exp().tolist(),
        staggering=index, staggering_ci=[low, high], lower_bound=unreached,
        late_staggering=late.log().nanmean().exp().item(), late_lower_bound=unreached_late,
        within=within.log().nanmean().exp().item(),
        within_lower_bound=half_time(strength, time).isinf().any().item(),
        rank_correlation=correlation, rank_correlation_ci=correlation_ci)
