r"""Learners: systems that learn one task by gradient descent, as ensembles in one batched
computation, with their closed forms; and the measures of how any system learns.

    W = torch.diag(torch.tensor([1.6, 0.3]))[None]                     # one 2 x 2 target
    steps, maps = linear_network(W, lr=0.01, steps=1000, start="random", generator=g)
    maps[:, 0].diagonal(dim1=-2, dim2=-1)               # (1001, 2): two sigmoids, strong mode first

Axis order: recorded times R lead, then S (members of the ensemble), then the map's own axes.
For the measures: strengths (R, N, E, K), that is times, tasks, repeats of a task, modes.

References: Saxe, McClelland & Ganguli 2013, arXiv 1312.6120 (deep linear networks); Rahaman et al.
2018, arXiv 1806.08734, and Xu et al. 2018, arXiv 1807.01251 (spectral bias); Schaul et al. 2019,
arXiv 1904.11455 (ray interference). Imports nothing of ours: copy it alone. Left out on purpose:
minibatches. Inputs of linear networks are white where a closed form is to hold.
"""
import math

import torch

def finite(values):
    """The values, if all are finite. Raises FloatingPointError if learning diverged."""
    if not values.isfinite().all():
        raise FloatingPointError("the Learner diverged: give it a smaller learning rate")
    return values

# ---------------------------------------------------------------- linear networks
class Muon(torch.optim.Optimizer):
    r"""Gradient descent whose every update of a matrix is made orthogonal (Jordan et al. 2024).

    M <- momentum M + G,   U S V^T = G + momentum M,
    W <- W - lr max(1, rows / columns)^(1/2) U V^T.

    U V^T by an iteration of Newton and Schulz, X <- a X + b (X X^T) X + c (X X^T)^2 X, which needs
    matrix products alone. Parameters are stacks of matrices, (..., out, in), each made orthogonal
    by itself; `stacked`: how many matrices stand one below the other in a 2-dimensional parameter
    (4 for the gates of an LSTM). coefficients (a, b, c): the usual ones make singular values only
    roughly equal; (1.5, -0.5, 0) converge, in more iterations. torch.optim.Muon does the same to
    one matrix at a time, and in bfloat16: slow on many CPUs, and coarser.
    """

    USUAL = (3.4445, -4.7750, 2.0315)

    def __init__(self, parameters, lr, momentum=0.95, coefficients=USUAL, iterations=5, stacked=1):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, stacked=stacked))
        self.coefficients, self.iterations = coefficients, iterations

    def orthogonal(self, X):
        """The orthogonal matrix nearest to each matrix of X (..., n, m), nearly."""
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
        """One update of every parameter."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                momentum = state.setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(group["momentum"]).add_(p.grad)
                direction = p.grad + group["momentum"] * momentum
                matrices = direction.unflatten(-2, (group["stacked"], -1))
                update = self.orthogonal(matrices)
                rate = group["lr"] * max(1, update.shape[-2] / update.shape[-1]) ** 0.5
                p.sub_(rate * update.flatten(-3, -2))

OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "rmsprop": torch.optim.RMSprop,
    # iterated until it converges: the usual five iterations are so rough that the order shows it
    "muon": lambda layers, lr: Muon(layers, lr, coefficients=(1.5, -0.5, 0.0), iterations=20),
}

def initial_layers(target, inputs, start, scale, generator):
    r"""Weights of the network before learning: a list, first layer first, of (..., out, in).

    "aligned": W2 = U sqrt(u0), W1 = sqrt(u0) V^T in the target's own singular basis, balanced, so
               that every mode starts at u0 = scale.
    "random":  two layers with entries N(0, scale), so that entries of the map are of order scale.
    "shallow": one layer with entries N(0, scale^2).
    """
    n_out, n_in = target.shape[-2], inputs.shape[-2]
    if start == "aligned":
        U, _, Vh = torch.linalg.svd(target, full_matrices=False)
        return [scale ** 0.5 * Vh, scale ** 0.5 * U]
    rows, sd = ([n_in, n_out], scale ** 0.5) if start == "random" else ([n_out], scale)
    return [sd * torch.randn(*target.shape[:-2], n, n_in, generator=generator, dtype=target.dtype)
            for n in rows]

@torch.enable_grad()
def linear_network(target, lr, steps, start="aligned", scale=1e-3, optimizer="sgd", every=1,
                   inputs=None, generator=None):
    r"""Gradient descent of a deep (for start "shallow", a one-layer) linear network, one a target.

    L = 1/2 ||Y - W_2 W_1 X||_F^2. With X = I and Y = W, the default, this is the expected loss on
    white inputs, up to the noise; the time constant is tau = 1 / lr steps. (With torch's MSELoss,
    which averages over the outputs, tau would be N_y / (2 lr).)

    target: (..., N_y, P) the Y; inputs: (..., N_x, P) the X, not for the aligned start, which is
    that of white inputs; start and scale as in `initial_layers`; optimizer one of OPTIMIZERS.
    Returns steps (R,), the number of updates made, 0 first; maps (R, ..., N_y, N_x), the product
    of the layers at those steps. Raises FloatingPointError if it diverges.
    """
    white = inputs is None
    X = torch.eye(target.shape[-1]).to(target) if white else inputs
    layers = initial_layers(target, X, start, scale, generator)
    layers = [layer.requires_grad_() for layer in layers]
    opt = OPTIMIZERS[optimizer](layers, lr)
    recorded, maps = [], []
    for step in range(steps + 1):
        product = layers[0]
        for layer in layers[1:]:
            product = layer @ product
        if step % every == 0:                             # before the update: step 0 is the start
            recorded.append(step)
            maps.append(product.detach().clone())
        guess = product if white else product @ X
        opt.zero_grad()
        (0.5 * (target - guess).square().sum()).backward()    # a sum keeps the networks apart
        opt.step()
    return torch.tensor(recorded), finite(torch.stack(maps))

def linear_network_by_trial(x, y, trials, steps, scale, generator):
    r"""A Learner whose clock is data: for each t in `trials` (Q,) a linear network of its own, from
    a small random start, on the first t trials of each episode.

    x (..., T, Dx), y (..., T, Dy). Each has a step size of its own, as large as its data allow.
    Returns steps (R,), maps (R, Q, ..., Dy, Dx).
    """
    seen = torch.arange(x.shape[-2]) < trials[:, None]                              # (Q, T)
    seen = seen.view(len(trials), *[1] * (x.ndim - 2), -1, 1)
    Q, R = torch.linalg.qr(seen * x)        # |Y - W X|^2 = |Y Q - W R^T|^2 + const: T becomes Dx
    X, Y = R.mT, (seen * y).mT @ Q
    curvature = torch.maximum(torch.linalg.matrix_norm(X, 2) ** 2,
                              torch.linalg.matrix_norm(Y @ X.mT, 2))
    size = curvature.clamp_min(1e-9).sqrt()[..., None, None]
    return linear_network(Y / size, 0.5, steps, "random", scale, every=max(1, steps // 100),
                          inputs=X / size, generator=generator)

def deep_linear_theory(s, u0, t):
    r"""Closed form for the aligned start: each mode is a logistic curve on a clock of its own.

    u(t) = s e^{2 s t / tau} / (e^{2 s t / tau} - 1 + s / u0)         (Saxe et al. 2013; white x)

    s: (K,) singular values; u0: initial mode; t: (R,) in units of tau. Returns (R, K). Written
    with e^{-2 s t / tau}, which does not overflow.
    """
    decay = torch.exp(-2 * s * t[:, None])
    return s / (1 + (s / u0 - 1) * decay)

def deep_linear_time(s, u0, u):
    r"""Time, in units of tau, for a mode to grow from u0 to u         (Saxe et al. 2013).

    t = 1/(2s) ln[u (s - u0) / (u0 (s - u))].
    """
    return torch.log(u * (s - u0) / (u0 * (s - u))) / (2 * s)

def muon_theory(s, u0, t):
    r"""Muon from the aligned start: each layer's singular value w grows by lr a step at every mode.

    So w = sqrt(u0) + t and the mode is their product u = w^2, which does not grow at one speed:
    u(t) = min((sqrt(u0) + t)^2, s). Half-time sqrt(s / 2) - sqrt(u0): the weakest first.   (ours)

    s: (K,); t: (R,) = lr times steps. Returns (R, K). Exact on the way up; then momentum
    overshoots, and the mode rings into place.
    """
    return torch.minimum((u0 ** 0.5 + t[:, None]) ** 2, s)

def shallow_theory(s, w0, t):
    r"""Closed form for one layer: w(t) = w0 e^{-t / tau} + s (1 - e^{-t / tau}), one clock for all
    modes. Shapes as in `deep_linear_theory`."""
    decay = torch.exp(-t[:, None])
    return w0 * decay + s * (1 - decay)

# ---------------------------------------------------------------- ReLU networks
@torch.enable_grad()
def relu_network(x, target, lr, steps, hidden=128, layers=4, every=10, generator=None, at=None):
    r"""Full-batch Adam of one ReLU network a target: L = mean over the points of (f(x) - y)^2.

    Low frequencies of the target are learned first (spectral bias; Rahaman et al. 2018, Xu et al.
    2018). First weights and biases are U(-1, 1) / sqrt(fan-in), torch's own law for nn.Linear.

    x, target: (..., G) the points; layers: how many hidden ones, of `hidden` units; at: (Q,), where
    to look at the functions, if not at x.
    Returns steps (R,), 0 first, functions f (R, ..., Q). Raises FloatingPointError if it diverges.
    """
    ensemble = x.shape[:-1]
    points = x.flatten(0, -2)[..., None]                                            # (S, G, 1)
    looked_at = points if at is None else at[:, None].expand(len(points), -1, -1)
    widths = [1] + [hidden] * layers + [1]
    network = []
    for n, m in zip(widths, widths[1:]):
        W = 2 * torch.rand(len(points), n, m, generator=generator) - 1
        b = 2 * torch.rand(len(points), 1, m, generator=generator) - 1
        network.append(((W / n ** 0.5).requires_grad_(), (b / n ** 0.5).requires_grad_()))

    def forward(h):
        """The functions at points (S, G, 1): (..., G)."""
        for i, (W, b) in enumerate(network):
            h = torch.baddbmm(b, h.relu() if i else h, W)
        return h[..., 0].unflatten(0, ensemble)

    opt = torch.optim.Adam([p for layer in network for p in layer], lr=lr, fused=True)
    recorded, functions = [], []
    for step in range(steps + 1):
        f = forward(points)
        if step % every == 0:                             # before the update: step 0 is the start
            recorded.append(step)
            functions.append((f if at is None else forward(looked_at)).detach())
        opt.zero_grad()
        (f - target).square().mean(-1).sum().backward()       # a sum keeps the networks apart
        opt.step()
    return torch.tensor(recorded), finite(torch.stack(functions))

def relu_network_by_trial(x, y, trials, at, lr, steps, hidden, layers, generator):
    """A Learner whose clock is data: for each t in `trials` (Q,) a ReLU network of its own on the
    first t trials of each episode, x and y (..., T, 1). Returns the functions that it has after
    all steps, at the points `at` (G,): (Q, ..., G)."""
    functions = []
    for t in trials:
        _, f = relu_network(x[..., :t, 0], y[..., :t, 0], lr, steps, hidden, layers, steps,
                            generator, at)
        functions.append(f[-1])
    return torch.stack(functions)

# ---------------------------------------------------------------- policy gradient
def reward_gradient(logits, correct, rates):
    r"""Gradient of the expected reward J = sum_c p_c J_c, J_c = pi(correct_c | c), in the logits of
    each context: p_c J_c (e_correct - pi).

    logits: (..., C, A); correct: (..., C); rates: (C,) the p_c. Returns (..., C, A).
    """
    policy = logits.softmax(-1)
    J = policy.gather(-1, correct[..., None])
    answer = torch.zeros_like(policy).scatter(-1, correct[..., None], 1.0)
    return rates[:, None] * J * (answer - policy)

def policy_gradient(correct, logits, lr, record, shared=True):
    r"""Exact gradient ascent on the expected reward of contextual bandits: softmax(W e_c + b).

    W starts at `logits`, b at zero, and both are trained. The bias is one vector for all contexts,
    so that what one context learns is imposed on the others: it helps those that share its answer
    (transfer) and is in the way of those that do not (ray interference; Schaul et al. 2019). With
    shared=False each context has a bias of its own. Contexts come at equal rates. In time
    dt = lr / C, for two contexts and two actions with different correct ones, g = J (1 - J):
        dJ_1/dt = 2 g_1 (2 g_1 - g_2),  the other likewise; gradients of cosine -1/2. (derived)

    correct: (..., C) the correct actions; logits: (..., C, A); record: steps at which to look, from
    0 up. Returns J (R, ..., C), the probability of the correct action in each context at those.
    """
    rates = torch.ones(correct.shape[-1]) / correct.shape[-1]
    W = logits
    b = torch.zeros_like(logits[..., :1, :] if shared else logits)
    probabilities = []
    for step in range(record[-1] + 1):
        now = W + b
        if step == record[len(probabilities)]:
            J = now.softmax(-1).gather(-1, correct[..., None])
            probabilities.append(J[..., 0])
        gradient = reward_gradient(now, correct, rates)
        W = W + lr * gradient
        b = b + lr * (gradient.sum(-2, keepdim=True) if shared else gradient)
    return torch.stack(probabilities)

class OnlineLearner:
    r"""REINFORCE on the same policy, softmax(W e_c + b), one trial a step: an agent on the clock of
    the Meta-Learner (see tasks.ContextualBandit). Its expected step is that of `policy_gradient`.

    W_c <- W_c + lr r (e_a - pi),   b <- b + lr r (e_a - pi);   W starts at N(0, sd^2), b at 0.
    """

    def __init__(self, lr, sd, generator):
        self.lr, self.sd, self.generator = lr, sd, generator

    def begin(self, n, prior):
        """Starts n episodes of a ContextualBandit."""
        shape = n, prior.contexts, prior.actions
        self.W = self.sd * torch.randn(shape, generator=self.generator)
        self.b = torch.zeros(n, 1, prior.actions)

    def policy(self):
        """Action probabilities in every context, (B, C, A)."""
        return (self.W + self.b).softmax(-1)

    def observe(self, context, action, reward):
        """One step. context, action, reward: (B,)."""
        episode = torch.arange(len(context))
        score = -self.policy()[episode, context]
        score[episode, action] += 1
        step = self.lr * reward[:, None] * score
        self.W[episode, context] += step
        self.b[:, 0] += step

# ---------------------------------------------------------------- measures, alike for all systems
def half_time(strength, time, level=0.5):
    r"""When each mode is half learned: first upward crossing of `level`, linearly interpolated.

    strength: (R, ...) at times `time` (R,), increasing. Returns (...), in units of time; nan for a
    mode at the level from the start, which shows no crossing; inf for one that never reaches it.
    """
    above = strength >= level
    after = above.int().argmax(0, keepdim=True).clamp_min(1)          # argmax finds the first True
    s0, s1 = strength.gather(0, after - 1), strength.gather(0, after)
    t0, t1 = time[after - 1], time[after]
    crossing = (t0 + (t1 - t0) * (level - s0) / (s1 - s0))[0]
    crossing = torch.where(above.any(0), crossing, torch.inf)
    return torch.where(above[0], torch.nan, crossing)

def staggering_index(half_times):
    """Latest half-time over earliest, (..., K) to (...): 1 is concurrent, inf if a mode is not
    reached. Modes without a half-time (nan) are left out; with none left the index is nan."""
    none = half_times.isnan()
    latest = half_times.masked_fill(none, -torch.inf).amax(-1)
    earliest = half_times.masked_fill(none, torch.inf).amin(-1)
    index = torch.where(latest.isinf(), torch.inf, latest / earliest)
    return torch.where(none.all(-1), torch.nan, index)

def staggering(strength, time):
    """Staggering index of each task (N,), of strengths (R, N, E, K) averaged over repeats: what is
    left of the stagger when chance is averaged out."""
    return staggering_index(half_time(strength.mean(2), time))

def within(strength, time):
    """Staggering index within a repeat, geometric mean over the repeats of each task (N,): what one
    learning looks like, whoever decides its order. A mode that is not reached counts as reached at
    the last time, so that this is a lower bound where there are such modes; a repeat that reaches
    none is left out."""
    half_times = half_time(strength, time)
    reached = half_times.isfinite().any(-1, keepdim=True)
    half_times = torch.where(reached, half_times.clamp_max(time[-1]), torch.nan)
    return geometric_mean(staggering_index(half_times), 1)

def ranks(values):
    """Ranks along the last axis, (..., K) to (..., K), 0 the smallest; ties share their mean rank.
    nan, a mode that was there from the start, counts as first."""
    values = values.nan_to_num(nan=-torch.inf, posinf=torch.inf)
    before = values[..., None, :] < values[..., :, None]
    tied = values[..., None, :] == values[..., :, None]
    return before.double().sum(-1) + (tied.double().sum(-1) - 1) / 2

def order(strength, time):
    r"""How much of the order of learning the task imposes: the rank correlation of the half-times
    of two repeats, over all pairs of repeats of each task. (R, N, E, K) to (N,).

    1: the same order every time; 0: an order that chance decides. With ranks r of repeat e, less
    their mean, it is sum_{e != e'} r_e . r_e' / ((E - 1) sum_e r_e . r_e) = (E W - 1) / (E - 1), W
    Kendall's coefficient of concordance with its correction for ties (Kendall & Babington Smith
    1939): without ties, the mean of Spearman's coefficients. nan for one repeat, or if all tie.
    """
    half_times = half_time(strength, time)
    r = ranks(half_times) - (half_times.shape[-1] - 1) / 2
    repeats = r.shape[1]
    own = r.square().sum((1, 2))
    pairs = r.sum(1).square().sum(-1) - own
    return pairs / ((repeats - 1) * own)

def follows(strength, other, time):
    """Correlation of the log half-times of two systems on the same episodes, by mode: (K,).
    Both (R, N, E, K); over all tasks and repeats in which both have the mode's half-time."""
    correlations = []
    logs = [half_time(s, time).flatten(0, 1).log() for s in (strength, other)]
    for a, b in zip(logs[0].T, logs[1].T):
        both = a.isfinite() & b.isfinite()
        a, b = a[both] - a[both].mean(), b[both] - b[both].mean()
        correlations.append((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())
    return torch.stack(correlations)

def geometric_mean(values, dim=0):
    """Geometric mean over one axis, without nan; inf if any value is."""
    return values.log().nanmean(dim).exp()

def t_interval(values):
    r"""Mean of the values (N,) that are not nan, and its 95% interval by Student's t.

    The quantile is sqrt(df) tan(theta), theta of a density that goes as cos(theta)^(df - 1).
    Returns (mean, low, high); with less than two values, or infinite ones, no interval: nan.
    """
    values = values[~values.isnan()].double()
    mean, df = values.mean(), len(values) - 1
    if df < 1 or values.isinf().any():
        return mean.item(), math.nan, math.nan
    theta = torch.linspace(-math.pi / 2, math.pi / 2, 100_001, dtype=torch.float64)
    mass = theta.cos().pow(df - 1).cumsum(0)
    quantile = df ** 0.5 * theta[torch.searchsorted(mass, 0.975 * mass[-1])].tan()
    half = quantile * values.std() / len(values) ** 0.5
    return mean.item(), (mean - half).item(), (mean + half).item()

def captured_fraction(prior, meta, bayes):
    r"""kappa = (L_prior - L_meta) / (L_prior - L_bayes), of losses, or of rewards, (N,) by episode.

    1 is Bayes-optimal, 0 never learns. Returns (kappa, low, high): a 95% interval by the delta
    method, the episodes being shared by all three.
    """
    gain = (prior - bayes).mean()
    kappa = (prior - meta).mean() / gain
    error = (prior - meta) - kappa * (prior - bayes)
    half = 1.96 * error.std() / (len(error) ** 0.5 * gain.abs())
    return kappa.item(), (kappa - half).item(), (kappa + half).item()

def describe(strength, time):
    """What one system shows, of strengths (R, N, E, K): a dict of half_times (K,), geometric means
    over tasks; staggering, a geometric mean over tasks, and staggering_ci, by t on its logarithm;
    within, a geometric mean; order, a mean, and order_ci; not_reached, a share of all repeats'
    modes."""
    index, low, high = t_interval(staggering(strength, time).log())
    concordance, *order_ci = t_interval(order(strength, time))
    return dict(
        half_times=geometric_mean(half_time(strength.mean(2), time)).tolist(),
        staggering=math.exp(index),
        staggering_ci=[math.exp(low), math.exp(high)],
        within=geometric_mean(within(strength, time)).item(),
        order=concordance,
        order_ci=order_ci,
        not_reached=half_time(strength, time).isinf().double().mean().item(),
    )

def summarise(results):
    """The numbers of a run, for summary.json, from its arrays (see metadyn.Results). inf is a mode
    that is not reached, nan what is undefined."""
    arrays = {name: torch.from_numpy(array) for name, array in results.items()
              if array.dtype.kind in "if"}
    systems, groups = {}, dict(probe={}, sharing={}, visits={}, seconds={})
    for name, array in arrays.items():
        group, _, rest = name.partition("/")
        if rest == "time":
            systems[group] = describe(arrays[f"{group}/strength"], array)
        elif group in groups:
            groups[group][rest] = array.tolist()
    losses = [arrays[f"performance/{system}"] for system in ("prior", "meta", "bayes")]
    captured, *captured_ci = captured_fraction(*(each.mean(1) for each in losses))
    _, meta_above, bayes_above = (each[:, -1].mean() - arrays["limit"] for each in losses)
    step = arrays["outer_loop/step"]
    outer_loop = describe(arrays["outer_loop/strength"], step)
    if "outer_loop/equal" in arrays:
        outer_loop["equal_half_times"] = half_time(arrays["outer_loop/equal"], step).tolist()
    return dict(
        systems=systems,
        captured=captured,
        captured_ci=captured_ci,
        last_excess=(meta_above / bayes_above).item(),
        follows_bayes=follows(arrays["meta/strength"], arrays["bayes/strength"],
                              arrays["meta/time"]).tolist(),
        outer_loop=outer_loop,
        ood_captured=captured_by_condition(results["ood"]),
        **groups,
    )

def captured_by_condition(ood):
    """kappa by condition, of the rows of ood.csv; it says little where Bayes gains little."""
    value = {(system, condition): x for system, condition, _, _, x in ood.tolist()}
    captured = {}
    for _, condition in value:
        never, learned, bayes = (value[system, condition] for system in ("prior", "meta", "bayes"))
        gain = never - bayes
        captured[condition] = (never - learned) / gain if gain else math.nan
    return captured
