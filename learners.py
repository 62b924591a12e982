r"""Learners: systems that learn one task by gradient descent, their closed forms, and measures.

    import torch
    generator = torch.Generator().manual_seed(0)
    target = torch.diag(torch.tensor([1.6, 0.3]))[None]             # one 2 x 2 target
    maps = linear_network(target, lr=0.01, record=range(2001), generator=generator)
    strength = maps[:, 0].diagonal(dim1=-2, dim2=-1) / torch.tensor([1.6, 0.3])     # (2001, 2)
    print(half_time(strength, torch.arange(2001)))                  # the strong mode comes first

Axis order: recorded times R first, then the batch, then a map's own axes (Dy, Dx). Strengths are
(R, N, E, K): times, tasks, repeats, modes. For targets that are not diagonal, see tasks.py.

References: Saxe, McClelland & Ganguli 2013, arXiv 1312.6120 (deep linear networks); Rahaman et al.
2018, arXiv 1806.08734, and Xu et al. 2018, arXiv 1807.01251 (spectral bias); Schaul et al. 2019,
arXiv 1904.11455 (ray interference); Chizat et al. 2019, arXiv 1812.07956 (lazy training). This file
imports none of the others, so you can copy it alone. It leaves out minibatches.
"""
import math

import torch
from torch.nn.functional import one_hot

def check_name(what, name, names):
    """Raises ValueError unless the name is one of those that exist."""
    if name not in names:
        raise ValueError(f"{what}: {name!r} is not one of {', '.join(map(repr, names))}")

def finite(values):
    """Returns the values. Raises FloatingPointError if one is not finite: the Learner diverged."""
    if not values.isfinite().all():
        raise FloatingPointError("the Learner diverged; a smaller learning rate may help")
    return values

# ---------------------------------------------------------------- linear networks
class Muon(torch.optim.Optimizer):
    r"""Gradient descent that makes every update of a matrix orthogonal (Jordan et al. 2024).

    The gradient with Nesterov momentum is U S V^T, and the update is U V^T, which Newton-Schulz
    iterations find. The usual coefficients make its singular values only roughly equal;
    (1.5, -0.5, 0) converge in more iterations. Parameters are stacks of matrices (..., out, in),
    each updated separately; `stacked` is how many matrices a parameter stacks along its rows (4 for
    the gates of an LSTM). torch.optim.Muon works in bfloat16, which is coarser and often slower.
    """

    def __init__(self, parameters, lr, coefficients=(3.4445, -4.7750, 2.0315), iterations=5,
                 stacked=1):
        super().__init__(parameters, dict(lr=lr, stacked=stacked))
        self.coefficients, self.iterations = coefficients, iterations

    def orthogonal(self, X):
        """The orthogonal matrix nearest to each matrix of X (..., n, m), approximately."""
        a, b, c = self.coefficients
        tall = X.shape[-2] > X.shape[-1]
        X = X.mT if tall else X
        X = X / torch.linalg.matrix_norm(X, keepdim=True).clamp_min(1e-7)
        for _ in range(self.iterations):
            A = X @ X.mT
            X = a * X + (b * A + c * A @ A) @ X
        return X.mT if tall else X

    @torch.no_grad()
    def step(self):
        """Updates every parameter once."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].mul_(0.95).add_(p.grad)
                direction = p.grad + 0.95 * momentum                        # Nesterov
                update = self.orthogonal(direction.unflatten(-2, (group["stacked"], -1)))
                rate = group["lr"] * max(1, update.shape[-2] / update.shape[-1]) ** 0.5
                p.sub_(rate * update.flatten(-3, -2))

OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "rmsprop": torch.optim.RMSprop,
    # run to convergence: the usual five iterations are so rough that they disturb the order
    "muon": lambda layers, lr: Muon(layers, lr, coefficients=(1.5, -0.5, 0.0), iterations=20),
}
STARTS = "random", "large", "aligned", "one layer"

def initial_layers(target, start, init_scale, hidden, generator):
    r"""Initial weights, first layer first: a list of matrices (..., out, in).

    "random":    two layers with entries N(0, init_scale), so a map's entries are about init_scale.
    "large":     two layers with torch's default initialization, U(-1, 1) / sqrt(fan-in).
    "aligned":   W_2 = U sqrt(u_0), W_1 = sqrt(u_0) V^T in the target's own singular basis, so every
                 mode starts at u_0 = init_scale (Saxe et al. 2013).
    "one layer": entries N(0, init_scale^2).
    """
    check_name("start", start, STARTS)
    n_out, n_in = target.shape[-2:]
    if start == "aligned":
        U, _, Vh = torch.linalg.svd(target, full_matrices=False)
        return [init_scale ** 0.5 * Vh, init_scale ** 0.5 * U]
    shapes = [(n_out, n_in)] if start == "one layer" else [(hidden, n_in), (n_out, hidden)]
    scale = init_scale if start == "one layer" else init_scale ** 0.5
    shapes = [(*target.shape[:-2], *shape) for shape in shapes]
    if start == "large":
        return [(2 * torch.rand(shape, generator=generator, dtype=target.dtype) - 1)
                / shape[-1] ** 0.5 for shape in shapes]
    return [scale * torch.randn(shape, generator=generator, dtype=target.dtype)
            for shape in shapes]

@torch.enable_grad()
def linear_network(target, lr, record, start="random", init_scale=1e-3, hidden=5, optimizer="sgd",
                   generator=None, online_noise=None):
    r"""Trains one linear network per target: two layers, or one if start="one layer".

    L = 1/2 ||W - W_2 W_1||_F^2, the expected loss on white inputs up to the noise. The time
    constant is 1 / lr steps. With online_noise each step sees instead one new trial, x ~ N(0, I)
    and y = W x plus noise of this standard deviation.

    target: (..., Dy, Dx). start: see `initial_layers`, or a list of layers. optimizer: one of
    OPTIMIZERS. record: increasing steps; training ends at the last. Returns the maps at these steps
    (R, ..., Dy, Dx). Raises ValueError for an unknown name, FloatingPointError if it diverges.
    """
    check_name("optimizer", optimizer, OPTIMIZERS)
    if isinstance(start, str):
        start = initial_layers(target, start, init_scale, hidden, generator)
    layers = [layer.detach().clone().requires_grad_() for layer in start]
    opt = OPTIMIZERS[optimizer](layers, lr)
    maps, recorded = [], set(record)
    for step in range(record[-1] + 1):
        product = layers[0]
        for layer in layers[1:]:
            product = layer @ product
        if step in recorded:                        # before the update, so step 0 is the start
            maps.append(product.detach().clone())
        error = target - product
        if online_noise is not None:
            x, noise = (torch.randn(*shape[:-1], 1, generator=generator, dtype=target.dtype)
                        for shape in (target.mT.shape, target.shape))       # (..., Dx or Dy, 1)
            error = error @ x + online_noise * noise
        opt.zero_grad()
        (0.5 * error.square().sum()).backward()           # a sum keeps the networks independent
        opt.step()
    return finite(torch.stack(maps))

def fitted_linear_network(x, y, trials, steps=1000, init_scale=1e-3, hidden=5, generator=None):
    """Trains a two-layer linear network to convergence on the first t trials of each episode, for
    each t in `trials` (Q,), from a small random start: L = 1/2 sum_{i < t} ||y_i - W_2 W_1 x_i||^2.
    Each step is as large as the local curvature allows: the Hessian's largest eigenvalue is at most
    ||X X^T|| (||W_1||^2 + ||W_2||^2) + ||dL/d(W_2 W_1)||, so no network diverges (ours). Nesterov
    momentum makes weak modes converge in `steps`, too.
    x: (..., T, Dx); y: (..., T, Dy). Returns the maps (Q, ..., Dy, Dx)."""
    x, y = x.double(), y.double()
    xx, yx = (torch.stack([z[..., :t, :].mT @ x[..., :t, :] for t in trials]) for z in (x, y))
    W1, W2 = initial_layers(yx, "random", init_scale, hidden, generator)
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
    r"""Closed form of a mode u(t) from the aligned start (Saxe et al. 2013, white inputs):
    du/dt = 2 u (s - u), u(0) = u0, in units of the time constant. s: (K,), t: (R,) to (R, K)."""
    decay = torch.exp(-2 * s * t[:, None])                # this sign does not overflow
    return s / (1 + (s / u0 - 1) * decay)

def random_start_half_times(s, u0, hidden):
    r"""Typical half-time of each mode from the random start, in units of the time constant (ours).
    Mode k grows from (u0 / 2) chi^2 with hidden - k + 1 degrees of freedom, because the stronger
    modes, once learned, hold the other directions of the hidden layer. The digamma function gives
    the mean logarithm of chi^2. s: (K,), strongest first, K <= hidden. Returns (K,)."""
    freedom = hidden - torch.arange(len(s), dtype=s.dtype)
    return (torch.log(2 * s / u0) - torch.digamma(freedom / 2) - math.log(2)) / (2 * s)

def one_layer_theory(s, w0, t):
    r"""Closed form for one layer: dw/dt = s - w, w(0) = w0. One time constant serves all modes.
    Shapes as in `deep_linear_theory`."""
    decay = torch.exp(-t[:, None])
    return w0 * decay + s * (1 - decay)

# ---------------------------------------------------------------- ReLU networks
@torch.enable_grad()
def relu_network(x, y, lr, record, hidden=64, layers=4, at=None, generator=None, online=False):
    r"""Trains one ReLU network per data set with Adam: L = mean over points of (f(x) - y)^2, or
    online, step t on point t alone. Without points nothing changes.

    Initial weights and biases are U(-1, 1) / sqrt(fan-in), torch's default. x, y: (..., G). layers:
    how many hidden layers of `hidden` units. record: as in `linear_network`. at: evaluation points
    (Q,) (default: x). Returns functions (R, ..., Q). Raises FloatingPointError if it diverges.
    """
    points = x.flatten(0, -2)[..., None]                                    # (S, G, 1)
    places = points if at is None else at[:, None].expand(len(points), -1, -1)
    widths = [1] + [hidden] * layers + [1]
    network = []
    for n, m in zip(widths, widths[1:]):
        W = 2 * torch.rand(len(points), n, m, generator=generator) - 1
        b = 2 * torch.rand(len(points), 1, m, generator=generator) - 1
        network.append(((W / n ** 0.5).requires_grad_(), (b / n ** 0.5).requires_grad_()))

    def forward(h):                                       # (S, G, 1) to (..., G)
        for i, (W, b) in enumerate(network):
            h = torch.baddbmm(b, h.relu() if i else h, W)
        return h[..., 0].unflatten(0, x.shape[:-1])

    opt = torch.optim.Adam([p for layer in network for p in layer], lr=lr, fused=True)
    functions, recorded = [], set(record)
    for step in range(record[-1] + 1):
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

def policy_gradient(correct, logits, lr, record, rates, shared=True, online=None):
    """Gradient ascent on the expected reward of contextual bandits with the policy softmax(W e_c +
    b). W starts at `logits` and b at zero. The gradient is exact or, if `online` is a generator,
    estimated from one trial per step.

    One bias b serves all contexts, so what one context learns is imposed on the others: it helps
    those with the same correct action (transfer) and hinders the rest (interference; Schaul et al.
    2019). With shared=False each context has a bias of its own. For two contexts of equal rates and
    two actions with different correct ones, in time lr / C (derived here),
    dJ_1/dt = 2 g_1 (2 g_1 - g_2) with g_c = J_c (1 - J_c), and the same with 1 and 2 exchanged.

    correct: (..., C); logits: (..., C, A); rates: (C,), of the contexts; record: as in
    `linear_network`. Returns J (R, ..., C), the probability of the correct action.
    """
    W = logits
    b = torch.zeros_like(logits[..., :1, :] if shared else logits)
    probabilities, recorded = [], set(record)
    for step in range(record[-1] + 1):
        if step in recorded:                        # before the update, so step 0 is the start
            J = (W + b).softmax(-1).gather(-1, correct[..., None])
            probabilities.append(J[..., 0])
        gradient = (reinforce_gradient(W + b, correct, rates, online) if online
                    else reward_gradient(W + b, correct, rates))
        W = W + lr * gradient
        b = b + lr * (gradient.sum(-2, keepdim=True) if shared else gradient)
    return torch.stack(probabilities)

@torch.enable_grad()
def fitted_policy(contexts, actions, rewards, trials, logits):
    """Fits the policy softmax(W e_c + b) by maximum likelihood, in 200 steps of Adam, to whether
    the chosen action paid in the first t trials of each episode, for each t in `trials` (Q,).
    contexts, actions, rewards: (B, T); logits: where W starts, (Q, B, C, A). Returns the policies
    (Q, B, C, A)."""
    C, A = logits.shape[-2:]
    played = one_hot(contexts * A + actions, C * A).unflatten(-1, (C, A)).float()
    seen = (torch.arange(contexts.shape[1]) < torch.tensor(trials)[:, None]).float()        # (Q, T)
    successes, failures = (torch.einsum("qt,bt,btca->qbca", seen, counted, played)
                           for counted in (rewards, 1 - rewards))
    W, b = logits.clone().requires_grad_(), torch.zeros_like(logits[..., :1, :]).requires_grad_()
    opt = torch.optim.Adam([W, b], lr=0.1)
    for _ in range(200):
        log_policy = (W + b).log_softmax(-1)
        log_other = torch.log1p(-log_policy.exp().clamp_max(1 - 1e-6))
        opt.zero_grad()
        (-(successes * log_policy + failures * log_other).sum()).backward()
        opt.step()
    return (W + b).softmax(-1).detach()

# ------------------------------------------------------------ measures, the same for all systems
def half_time(strength, time):
    """When each mode is half learned: the first upward crossing of 1/2, linearly interpolated.
    strength: (R, ...) at increasing times (R,). Returns (...), in units of time: inf for a mode
    that never reaches 1/2, nan for one that starts there."""
    above = strength >= 0.5
    after = above.int().argmax(0, keepdim=True).clamp_min(1)      # argmax finds the first True
    s0, s1 = strength.gather(0, after - 1), strength.gather(0, after)
    t0, t1 = time[after - 1], time[after]
    crossing = (t0 + (t1 - t0) * (0.5 - s0) / (s1 - s0))[0]
    crossing = torch.where(above.any(0), crossing, torch.inf)
    return torch.where(above[0], torch.nan, crossing)

def four_axes(strength):
    """Strengths as (R, N, E, K), given those or (R, K). Raises ValueError for anything else."""
    if strength.ndim == 2:
        return strength[:, None, None]
    if strength.ndim != 4:
        raise ValueError(f"strengths must be (R, N, E, K) or (R, K), not {tuple(strength.shape)}")
    return strength

def half_times_of_halves(strength, time):
    """Half-times of strengths averaged over every other repeat: (2, N, K). With one repeat both
    halves are that repeat."""
    repeats = four_axes(strength).shape[2]
    halves = [four_axes(strength)[:, :, min(i, repeats - 1)::2] for i in (0, 1)]
    return torch.stack([half_time(half.mean(2), time) for half in halves])

def staggering(strength, time):
    """Staggering index of each task, (N,): latest half-time over earliest, of strengths averaged
    over repeats. 1 is concurrent.

    The largest of several noisy ratios is biased upwards, so we cross-fit: one half of the repeats
    chooses the latest and the earliest mode, the other half measures their ratio. Then the halves
    change places, and the two ratios are averaged geometrically. It can come out below 1 by chance,
    and in a staggered system with few repeats it is too low, because noise chooses wrong modes.

    A mode that is not reached counts as reached at the last time, so the index is then a lower
    bound; a mode that starts learned is left out; a task in which no mode is reached gives nan.
    """
    half_times = half_times_of_halves(strength, time)
    unreached = (~half_times.isfinite()).all(-1).any(0)
    skipped = half_times.isnan().any(0)
    half_times = half_times.clamp_max(time[-1].item())
    latest = half_times.masked_fill(skipped, -torch.inf).argmax(-1, keepdim=True)
    earliest = half_times.masked_fill(skipped, torch.inf).argmin(-1, keepdim=True)
    measured = half_times.flip(0)                         # each half by the other's choice
    ratio = (measured.gather(-1, latest) / measured.gather(-1, earliest))[..., 0]
    return (ratio[0] * ratio[1]).sqrt().masked_fill(unreached, torch.nan)

def staggering_within(strength, time):
    """Geometric mean of the staggering indices of single repeats of a task, whatever their order:
    (N,). A repeat in which no mode is reached is left out."""
    repeats = four_axes(strength)
    index = staggering(repeats.flatten(1, 2)[:, :, None], time)             # each as a task
    return index.unflatten(0, repeats.shape[1:3]).log().nanmean(1).exp()

def ranks(values):
    """Ranks along the last axis less their mean, (..., K) to (..., K); ties share their mean rank.
    nan, a mode that starts learned, ranks first."""
    values = values.nan_to_num(nan=-torch.inf, posinf=torch.inf)
    before = (values[..., None, :] < values[..., :, None]).double()
    return (before.sum(-1) - before.sum(-2)) / 2          # (number before - number after) / 2

def concordance(strength, time):
    """How much of the order of learning all repeats of a task share: the rank correlation of their
    half-times over all pairs, (N,). 1 is the same order every time, 0 is chance. It is (E W - 1) /
    (E - 1) with Kendall's W corrected for ties (Kendall & Babington Smith 1939); without ties it is
    the mean Spearman correlation. nan for one repeat, or if all half-times tie."""
    r = ranks(half_time(four_axes(strength), time))                 # (N, E, K)
    own = r.square().sum((1, 2))
    pairs = r.sum(1).square().sum(-1) - own
    return pairs / ((r.shape[1] - 1) * own)

def concordance_ceiling(groups):
    """The mean concordance of a fixed order of the groups (N, K), random within each group."""
    untied = (groups.shape[-1] ** 3 - groups.shape[-1]) / 12
    return (ranks(groups).square().sum(-1) / untied).mean().item()

def half_time_ratio(strength, other, time):
    """Half-time of one system over that of another on the same episodes, for each mode: the
    geometric mean over tasks, and that ± 2 standard errors, (K, 3). Both are (R, N, E, K)."""
    a, b = (half_time(four_axes(each).mean(2), time) for each in (strength, other))
    return torch.tensor([interval(ratio) for ratio in (a / b).log().T]).exp()

def half_time_correlation(strength, other, time):
    """Correlation of the log half-times of two systems on the same episodes, for each mode: (K,).
    It takes all episodes in which both systems have a half-time. Both are (R, N, E, K)."""
    a, b = (half_time(s, time).flatten(0, 1).log() for s in (strength, other))
    both = a.isfinite() & b.isfinite()
    a, b = a.where(both, torch.nan), b.where(both, torch.nan)
    a, b = a - a.nanmean(0), b - b.nanmean(0)
    return (a * b).nansum(0) / (a.square().nansum(0) * b.square().nansum(0)).sqrt()

def interval(values):
    """Mean of those values (N,) that are not nan, and mean ± 2 standard errors: three floats. The
    bounds are nan for a single value and for infinite ones."""
    values = values[~values.isnan()].double()
    half = 2 * values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(math.nan)
    return values.mean().item(), (values.mean() - half).item(), (values.mean() + half).item()

def captured_fraction(none, meta, bayes):
    """kappa, the share of what Bayes gains over never learning that the Meta-Learner gains, and
    kappa ± 2 standard errors by the delta method. From the losses or rewards of the three systems
    on the same episodes, (n,) each. nan where Bayes gains nothing."""
    gain = (none - bayes).mean()
    kappa = (none - meta).mean() / gain if gain else gain * math.nan
    return interval(kappa + ((none - meta) - kappa * (none - bayes)) / gain)

def describe(strength, time):
    """Summarizes a system's strengths, (R, N, E, K) or (R, K), in a dict. half_times (K,),
    staggering and within are geometric means over tasks; lower_bound says whether a mode is not
    reached in some task. Intervals are ± 2 standard errors over tasks."""
    strength = four_axes(strength)
    half_times = half_time(strength.mean(2), time)
    halves = half_times_of_halves(strength, time)
    index, low, high = (math.exp(value) for value in interval(staggering(strength, time).log()))
    agreement, *agreement_ci = interval(concordance(strength, time))
    return dict(
        half_times=half_times.log().nanmean(0).exp().tolist(),
        staggering=index, staggering_ci=[low, high], lower_bound=halves.isinf().any().item(),
        within=staggering_within(strength, time).log().nanmean().exp().item(),
        concordance=agreement, concordance_ci=agreement_ci)
