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
(R, N, E, K): times, tasks, repeats, modes. For targets that are not diagonal, see tasks.py.

References: Saxe, McClelland & Ganguli 2013, arXiv 1312.6120 (deep linear networks); Rahaman et al.
2018, arXiv 1806.08734, and Xu et al. 2018, arXiv 1807.01251 (spectral bias); Schaul et al. 2019,
arXiv 1904.11455 (ray interference). This file imports none of the others, so you can copy it
alone. It leaves out minibatches.
"""
import math

import torch
from torch.nn.functional import one_hot

def finite(values):
    """Returns the values. Raises FloatingPointError if one is not finite: the Learner diverged."""
    if not values.isfinite().all():
        raise FloatingPointError("the Learner diverged; a smaller learning rate may help")
    return values

# ---------------------------------------------------------------- linear networks
def init_weight(shape, fan_in, generator, dtype=None):
    """Weights by torch's default initialization, U(-1, 1) / sqrt(fan_in)."""
    return (2 * torch.rand(shape, generator=generator, dtype=dtype) - 1) / fan_in ** 0.5

def init_layers(batch, widths, generator, std=None, dtype=None):
    """Initial weights of linear networks, first layer first: a list of matrices (*batch, out, in)
    for the widths, inputs first. Entries are N(0, std^2), or torch's default without a std."""
    shapes = [(*batch, m, n) for n, m in zip(widths, widths[1:])]
    if std is None:
        return [init_weight(shape, shape[-1], generator, dtype) for shape in shapes]
    return [std * torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]

@torch.enable_grad()
def linear_network(target, layers, lr, eval_steps, optimizer=torch.optim.SGD, online=False,
                   noise=0.0, generator=None):
    r"""Trains one linear network per target, with any number of layers.

    L = 1/2 ||W - W_2 W_1||_F^2, the expected loss on white inputs up to the noise. The time
    constant is 1 / lr steps. Online, each step sees instead one new trial, x ~ N(0, I) and y = W x
    plus noise of this standard deviation.

    target: (..., Dy, Dx). layers: initial weights, as from `init_layers`. eval_steps: increasing
    steps; training ends at the last. optimizer: called with the layers and lr. Returns the maps at
    these steps (R, ..., Dy, Dx). Raises FloatingPointError if it diverges.
    """
    layers = [layer.detach().clone().requires_grad_() for layer in layers]
    opt, recorded, maps = optimizer(layers, lr=lr), set(eval_steps), []
    for step in range(eval_steps[-1] + 1):
        product = layers[0]
        for layer in layers[1:]:
            product = layer @ product
        if step in recorded:                        # before the update, so step 0 is the start
            maps.append(product.detach().clone())
        error = target - product
        if online:
            x, eps = (torch.randn(*shape[:-1], 1, generator=generator, dtype=target.dtype)
                      for shape in (target.mT.shape, target.shape))         # (..., Dx or Dy, 1)
            error = error @ x + noise * eps
        opt.zero_grad()
        (0.5 * error.square().sum()).backward()           # a sum keeps the networks independent
        opt.step()
    return finite(torch.stack(maps))

def converged_linear_network(x, y, trials, layers, steps=1000):
    """Trains a two-layer linear network to convergence on the first t trials of each episode, for
    each t in `trials` (Q,): L = 1/2 sum_{i < t} ||y_i - W_2 W_1 x_i||^2. Each step is as large as
    the local curvature allows: the Hessian's largest eigenvalue is at most
    ||X X^T|| (||W_1||^2 + ||W_2||^2) + ||dL/d(W_2 W_1)||, so no network diverges (ours). Nesterov
    momentum makes weak modes converge in `steps`, too.
    x: (..., T, Dx); y: (..., T, Dy); layers: two, (Q, ..., out, in). Returns (Q, ..., Dy, Dx)."""
    xx, yx = (torch.stack([z[..., :t, :].mT @ x[..., :t, :] for t in trials]) for z in (x, y))
    W1, W2 = layers
    largest = torch.linalg.matrix_norm(xx, 2, keepdim=True)
    before1, before2 = W1, W2
    for _ in range(steps):
        V1, V2 = W1 + 0.95 * (W1 - before1), W2 + 0.95 * (W2 - before2)
        error = V2 @ V1 @ xx - yx
        size = (V1.square().sum((-2, -1), True) + V2.square().sum((-2, -1), True)) * largest
        size = size + torch.linalg.matrix_norm(error, keepdim=True)
        error = error / size.clamp_min(1e-12)             # the clamp is for t = 0, without data
        before1, before2 = W1, W2
        W1, W2 = V1 - V2.mT @ error, V2 - error @ V1.mT
    return W2 @ W1

def deep_linear_theory(s, u0, t):
    r"""Closed form of a mode u(t) of two layers that start aligned with the task (Saxe et al. 2013,
    white inputs): du/dt = 2 u (s - u), u(0) = u0, in units of the time constant. s: (K,), t: (R,)
    to (R, K)."""
    decay = torch.exp(-2 * s * t[:, None])                # this sign does not overflow
    return s / (1 + (s / u0 - 1) * decay)

def one_layer_theory(s, w0, t):
    r"""Closed form for one layer: dw/dt = s - w, w(0) = w0. One time constant serves all modes.
    Shapes as in `deep_linear_theory`."""
    decay = torch.exp(-t[:, None])
    return w0 * decay + s * (1 - decay)

# ---------------------------------------------------------------- ReLU networks
@torch.enable_grad()
def relu_network(x, y, lr, eval_steps, hidden=64, layers=4, at=None, online=False, generator=None):
    r"""Trains one ReLU network per data set with Adam: L = mean over points of (f(x) - y)^2, or
    online, step t on point t alone. Without points nothing changes.

    Weights and biases start at torch's default. x, y: (..., G). layers: how many hidden layers of
    `hidden` units. eval_steps: as in `linear_network`. at: evaluation points (Q,) (default: x).
    Returns functions (R, ..., Q). Raises FloatingPointError if it diverges.
    """
    points = x.flatten(0, -2)[..., None]                                    # (S, G, 1)
    places = points if at is None else at[:, None].expand(len(points), -1, -1)
    widths = [1] + [hidden] * layers + [1]
    network = [[init_weight((len(points), rows, m), n, generator).requires_grad_()
                for rows in (n, 1)] for n, m in zip(widths, widths[1:])]    # weights, then biases

    def forward(h):                                       # (S, G, 1) to (..., G)
        for i, (W, b) in enumerate(network):
            h = torch.baddbmm(b, h.relu() if i else h, W)
        return h[..., 0].unflatten(0, x.shape[:-1])

    opt = torch.optim.Adam([p for layer in network for p in layer], lr=lr, fused=True)
    functions, recorded = [], set(eval_steps)
    for step in range(eval_steps[-1] + 1):
        if step in recorded:                        # before the update, so step 0 is the start
            functions.append(forward(places).detach())
        now = slice(step, step + 1) if online else slice(None)
        error = forward(points[:, now]) - y[..., now]
        opt.zero_grad()
        (error.square().sum() / max(1, error.shape[-1])).backward()   # keeps networks independent
        opt.step()
    return finite(torch.stack(functions))

# ---------------------------------------------------------------- policy gradient
def reward_gradient(logits, correct, rates):
    """Gradient of the expected reward J = sum_c p_c J_c, J_c = pi(correct_c | c), in the logits of
    each context (..., C, A). correct: (..., C); rates: (C,), the p_c. Returns (..., C, A)."""
    policy = logits.softmax(-1)
    J = policy.gather(-1, correct[..., None])
    target = torch.zeros_like(policy).scatter(-1, correct[..., None], 1.0)
    return rates[:, None] * J * (target - policy)

def reinforce_gradient(logits, correct, rates, generator):
    """Estimates `reward_gradient` from one trial, without bias (REINFORCE; Williams 1992): the
    reward times e_a - pi, the gradient of log pi(a), in the trial's context. Shapes as there."""
    bandit = torch.arange(correct[..., 0].numel())
    context = torch.multinomial(rates, len(bandit), replacement=True, generator=generator)
    policy = logits.reshape(-1, *logits.shape[-2:])[bandit, context].softmax(-1)
    action = torch.multinomial(policy, 1, generator=generator)[:, 0]
    reward = (action == correct.reshape(-1, len(rates))[bandit, context]).to(logits)
    gradient = torch.zeros(len(bandit), *logits.shape[-2:], dtype=logits.dtype)
    gradient[bandit, context] = reward[:, None] * (one_hot(action, policy.shape[-1]) - policy)
    return gradient.view_as(logits)

def policy_gradient(correct, logits, lr, eval_steps, rates, shared=True, online=False,
                    generator=None):
    """Gradient ascent on the expected reward of contextual bandits with the policy softmax(W e_c +
    b). W starts at `logits` and b at zero. The gradient is exact or, online, estimated from one
    trial per step.

    One bias b serves all contexts, so what one context learns is imposed on the others: it helps
    those with the same correct action (transfer) and hinders the rest (interference; Schaul et al.
    2019). With shared=False each context has its own bias. For two contexts of equal rates and two
    actions with different correct ones, in time lr / C (derived here),
    dJ_1/dt = 2 g_1 (2 g_1 - g_2) with g_c = J_c (1 - J_c), and the same with 1 and 2 exchanged.

    correct: (..., C); logits: (..., C, A); rates: (C,), of the contexts; eval_steps: as in
    `linear_network`. Returns J (R, ..., C), the probability of the correct action.
    """
    W = logits
    b = torch.zeros_like(logits[..., :1, :] if shared else logits)
    probabilities, recorded = [], set(eval_steps)
    for step in range(eval_steps[-1] + 1):
        if step in recorded:                        # before the update, so step 0 is the start
            J = (W + b).softmax(-1).gather(-1, correct[..., None])
            probabilities.append(J[..., 0])
        gradient = (reinforce_gradient(W + b, correct, rates, generator) if online
                    else reward_gradient(W + b, correct, rates))
        W = W + lr * gradient
        b = b + lr * (gradient.sum(-2, keepdim=True) if shared else gradient)
    return torch.stack(probabilities)

# ------------------------------------------------------------ measures, the same for all systems
def half_time(strength, time):
    """When each mode is half learned: the first upward crossing of 1/2, linearly interpolated.
    strength: (R, ...) at increasing times (R,). Returns (...), in units of time: inf for a mode
    that never reaches 1/2, nan for one that starts there."""
    above = strength >= 0.5
    after = above.int().argmax(0, keepdim=True)           # argmax finds the first True
    before = (after - 1).clamp_min(0)
    s0, s1 = strength.gather(0, before), strength.gather(0, after)
    t0, t1 = time[before], time[after]
    crossing = (t0 + (t1 - t0) * (0.5 - s0) / (s1 - s0))[0]
    crossing = torch.where(above.any(0), crossing, torch.inf)
    return torch.where(above[0], torch.nan, crossing)

def half_times_of_halves(strength, time):
    """Half-times of strengths averaged over every other repeat: (2, N, K). With one repeat both
    halves are that repeat."""
    halves = [strength[:, :, min(i, strength.shape[2] - 1)::2] for i in (0, 1)]
    return torch.stack([half_time(half.mean(2), time) for half in halves])

def staggering(strength, time):
    """Staggering index of each task, (N,): latest half-time over earliest, of strengths
    (R, N, E, K) averaged over repeats. 1 is concurrent.

    The largest of several noisy ratios is biased upwards, so we cross-fit: one half of the repeats
    chooses the latest and the earliest mode, the other half measures their ratio. Then the halves
    change places, and the two ratios are averaged geometrically. It can come out below 1 by chance,
    and in a staggered system with few repeats it is too low, because noise chooses wrong modes.

    A mode that is not reached counts as reached at the last time, so the index is then a lower
    bound; a mode that starts learned is left out; a task in which no mode is reached, or only one
    takes part, gives nan.
    """
    half_times = half_times_of_halves(strength, time)
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

def ranks(values):
    """Ranks along the last axis less their mean, (..., K) to (..., K); ties share their mean rank.
    nan, a mode that starts learned, ranks first."""
    values = values.nan_to_num(nan=-torch.inf, posinf=torch.inf)
    before = (values[..., None, :] < values[..., :, None]).double()
    return (before.sum(-1) - before.sum(-2)) / 2          # (number before - number after) / 2

def rank_correlation(strength, time):
    """How much of the order of learning all repeats of a task share: the rank correlation of their
    half-times over all pairs, (N,). 1 is the same order every time, 0 is chance. It is (E W - 1) /
    (E - 1) with Kendall's W corrected for ties (Kendall & Babington Smith 1939); without ties it is
    the mean Spearman correlation. nan for one repeat, or if all half-times tie."""
    r = ranks(half_time(strength, time))                  # (N, E, K)
    own = r.square().sum((1, 2))
    pairs = r.sum(1).square().sum(-1) - own
    return pairs / ((r.shape[1] - 1) * own)

def half_time_ratio(strength, other, time):
    """Half-time of one system over that of another on the same episodes, for each mode: the
    geometric mean over tasks, and that ± 2 standard errors, (K, 3). Both are (R, N, E, K)."""
    a, b = (half_time(each.mean(2), time) for each in (strength, other))
    return torch.tensor([interval(ratio) for ratio in (a / b).log().T]).exp()

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
    standard errors by the delta method. From the losses or rewards of the three systems on the same
    episodes, (n,) each. nan where Bayes gains nothing."""
    gain = (none - bayes).mean()
    score = (none - meta).mean() / gain if gain else gain * math.nan
    return interval(score + ((none - meta) - score * (none - bayes)) / gain)

def describe(strength, time):
    """Summarizes a system's strengths, (R, N, E, K) or (R, K), in a dict. half_times (K,),
    staggering and within are geometric means over tasks; lower_bound says whether a mode is not
    reached in some task. Intervals are ± 2 standard errors over tasks. Raises ValueError for other
    shapes."""
    if strength.ndim == 2:
        strength = strength[:, None, None]
    if strength.ndim != 4:
        raise ValueError(f"strengths must be (R, N, E, K) or (R, K), not {tuple(strength.shape)}")
    half_times = half_time(strength.mean(2), time)
    halves = half_times_of_halves(strength, time)
    index, low, high = (math.exp(value) for value in interval(staggering(strength, time).log()))
    correlation, *correlation_ci = interval(rank_correlation(strength, time))
    return dict(
        half_times=half_times.log().nanmean(0).exp().tolist(),
        staggering=index, staggering_ci=[low, high], lower_bound=halves.isinf().any().item(),
        within=staggering_within(strength, time).log().nanmean().exp().item(),
        rank_correlation=correlation, rank_correlation_ci=correlation_ci)
