r"""Learners: systems that learn one task by gradient descent, run as an ensemble in one batched computation, and their closed forms; and the
measures of how any system learns.

    W = torch.diag(torch.tensor([1.6, 0.3]))[None]                     # one 2 x 2 target
    steps, maps = linear_network(W, lr=0.01, steps=1000, start="random")
    maps[:, 0].diagonal(dim1=-2, dim2=-1)                              # two sigmoids, the strong mode first

Axis order: recorded times lead, then S (ensemble members: tasks, or seeds), then the map's own axes.

References: Saxe, McClelland & Ganguli 2013, arXiv 1312.6120 (deep linear networks); Rahaman et al. 2018, arXiv 1806.08734, and
Xu et al. 2018, arXiv 1807.01251 (spectral bias);
Schaul et al. 2019, arXiv 1904.11455 (ray interference in policy gradients).
Imports nothing of ours: copy it alone. Left out on purpose: minibatches and input noise in supervised learning, where inputs are white and
gradients exact, so that the closed forms hold. What is random is drawn from an explicit generator.
"""
import math

import torch

OPTIMIZERS = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
    "rmsprop": lambda parameters, lr: torch.optim.RMSprop(parameters, lr=lr),
    # the cubic Newton-Schulz iteration, 20 steps: orthogonal but for directions below about 1/3000 of the norm, and for bfloat16, in which
    # torch iterates; Muon's usual five quintic steps are only roughly orthogonal, and the modes' order then shows the roughness
    "muon": lambda parameters, lr: torch.optim.Muon(parameters, lr=lr, weight_decay=0.0, ns_coefficients=(1.5, -0.5, 0.0), ns_steps=20),
}


def finite(values):
    """The values, if all are finite. Raises FloatingPointError if learning diverged."""
    if not values.isfinite().all():
        raise FloatingPointError("the Learner diverged: give it a smaller learning rate")
    return values


# ---------------------------------------------------------------- linear networks

def initial_layers(target, start, scale, generator):
    r"""Weights of the network before learning, for targets (S, N_y, N_x).

    "aligned": W2 = U sqrt(u0), W1 = sqrt(u0) V^T in the target's own singular basis, balanced, so that every mode starts at scale = u0.
    "random":  two layers with entries N(0, scale), so that entries of the map are of order scale.
    "shallow": one layer with entries N(0, scale^2).
    Returns a list over layers, first layer first, of (S, out, in).
    """
    S, n_out, n_in = target.shape
    if start == "aligned":
        U, _, Vh = torch.linalg.svd(target, full_matrices=False)
        return [scale ** 0.5 * Vh, scale ** 0.5 * U]
    shapes, sd = {"random": ([(S, n_in, n_in), (S, n_out, n_in)], scale ** 0.5), "shallow": ([(S, n_out, n_in)], scale)}[start]
    return [sd * torch.randn(shape, generator=generator, dtype=target.dtype) for shape in shapes]


def matrices(stack):
    """The matrices of a parameter (S, out, in) as S parameters, for Muon, which takes one matrix at a time.

    They are views, and so are their gradients, which must therefore be zeroed in place.
    """
    stack.grad, views = torch.zeros_like(stack), stack.detach().unbind()
    for view, gradient in zip(views, stack.grad.unbind()):
        view.grad = gradient
    return views


@torch.enable_grad()
def linear_network(target, lr, steps, start="aligned", scale=1e-3, optimizer="sgd", every=1, generator=None):
    r"""Gradient descent of a deep (or, for start "shallow", a one-layer) linear network on white inputs, one network per target.

    L = 1/2 ||W_target - W_2 W_1||_F^2, the expected loss for x ~ N(0, I) up to the noise; time constant tau = 1 / lr steps.
    (With torch's MSELoss, which averages over the outputs, tau would be N_y / (2 lr).)

    target: (S, N_y, N_x); start and scale as in `initial_layers`; optimizer one of OPTIMIZERS. Raises FloatingPointError if it diverges.
    Returns steps (R,), the number of updates made, 0 first; maps (R, S, N_y, N_x), the product of the layers at those steps.
    """
    layers = [w.clone().requires_grad_() for w in initial_layers(target, start, scale, generator)]
    opt = OPTIMIZERS[optimizer]([m for w in layers for m in matrices(w)] if optimizer == "muon" else layers, lr)
    recorded, maps = [], []
    for step in range(steps + 1):
        product = layers[0]
        for layer in layers[1:]:
            product = layer @ product
        if step % every == 0:
            recorded.append(step), maps.append(product.detach().clone())      # before the update: step 0 is the start
        opt.zero_grad(set_to_none=False)
        (0.5 * (target - product).square().sum()).backward()          # a sum over networks keeps their gradients apart
        opt.step()
    return torch.tensor(recorded), finite(torch.stack(maps))


def deep_linear_theory(s, u0, t):
    r"""Closed form for the aligned start: each mode is a logistic curve on a clock of its own.

    u(t) = s e^{2 s t / tau} / (e^{2 s t / tau} - 1 + s / u0)          (Saxe et al. 2013; for C11 = I and L = 1/2 ||.||^2)

    s: (K,) singular values; u0: initial mode; t: (R,) in units of tau. Returns (R, K). Written with e^{-2 s t / tau}: no overflow.
    """
    decay = torch.exp(-2 * s * t[:, None])
    return s / (1 + (s / u0 - 1) * decay)


def deep_linear_time(s, u0, u):
    r"""Time for a mode to grow from u0 to u, in units of tau: t = 1/(2s) ln[u (s - u0) / (u0 (s - u))]   (Saxe et al. 2013)."""
    return torch.log(u * (s - u0) / (u0 * (s - u))) / (2 * s)


def muon_theory(s, u0, t):
    r"""Muon from the aligned start: every singular value of every layer grows by lr a step, whatever the mode, until u = w^2 reaches s.

    u(t) = min((sqrt(u0) + t)^2, s), so that the half-time is sqrt(s / 2) - sqrt(u0): the weakest mode first.   (ours)

    s: (K,); t: (R,) = lr times steps. Returns (R, K). Exact on the way up; then momentum overshoots, and the mode rings into place.
    """
    return torch.minimum((u0 ** 0.5 + t[:, None]) ** 2, s)


def shallow_theory(s, w0, t):
    r"""Closed form for one layer: w(t) = w0 e^{-t / tau} + s (1 - e^{-t / tau}), all modes on one clock. Shapes as in `deep_linear_theory`."""
    decay = torch.exp(-t[:, None])
    return w0 * decay + s * (1 - decay)


# ---------------------------------------------------------------- ReLU networks

@torch.enable_grad()
def relu_network(x, target, lr, steps, hidden=128, layers=4, every=10, generator=None):
    r"""Full-batch Adam of one ReLU network per target on the same inputs: L = 1/G sum_g (f(x_g) - y_g)^2.

    Frequencies of the target are learned from low to high (spectral bias; Rahaman et al. 2018, arXiv 1806.08734, and Xu et al. 2018,
    arXiv 1807.01251). No closed form. Initial weights and biases are U(-1, 1) / sqrt(fan-in), torch's own law for nn.Linear.

    x: (G,), given to the network as it is; target: (S, G); layers: how many hidden ones, of `hidden` units.
    Returns steps (R,), 0 first, and the functions f (R, S, G) at those steps.
    """
    S, G = target.shape
    widths = [1] + [hidden] * layers + [1]
    shapes = [shape for n, m in zip(widths, widths[1:]) for shape in (((S, n, m), n), ((S, 1, m), n))]
    parameters = [((2 * torch.rand(shape, generator=generator) - 1) / n ** 0.5).requires_grad_() for shape, n in shapes]
    opt = torch.optim.Adam(parameters, lr=lr)
    recorded, functions = [], []
    for step in range(steps + 1):
        h = x[:, None].expand(S, G, 1)
        for i in range(0, len(parameters), 2):
            h = torch.baddbmm(parameters[i + 1], h.relu() if i else h, parameters[i])
        f = h[..., 0]
        if step % every == 0:
            recorded.append(step), functions.append(f.detach())       # before the update: step 0 is the start
        opt.zero_grad()
        (f - target).square().mean(1).sum().backward()
        opt.step()
    return torch.tensor(recorded), finite(torch.stack(functions))


# ---------------------------------------------------------------- policy gradient in contextual bandits

def reward_gradient(logits, correct, rates):
    r"""Gradient of the expected reward J = sum_c p_c J_c, J_c = pi(correct_c | c), in the logits of each context: p_c J_c (e_correct - pi).

    logits: (S, C, A); correct: (S, C); rates: (C,) the p_c. Returns (S, C, A).
    """
    policy = logits.softmax(-1)
    J = policy.gather(-1, correct[..., None])
    return rates[:, None] * J * (torch.zeros_like(policy).scatter(-1, correct[..., None], 1.0) - policy)


def sampled_gradient(logits, correct, rates, trials, generator):
    r"""REINFORCE's unbiased estimate of `reward_gradient` from that many trials of each ensemble member: the mean of r (e_action - pi)."""
    S, C, A = logits.shape
    policy = logits.softmax(-1)
    context = torch.multinomial(rates.expand(S, C), trials, replacement=True, generator=generator)                    # (S, trials)
    seen = policy.gather(1, context[..., None].expand(-1, -1, A))                                                     # (S, trials, A)
    action = torch.multinomial(seen.flatten(0, 1), 1, generator=generator).view(S, trials)
    reward = (action == correct.gather(1, context)).to(logits)
    score = reward[..., None] * (torch.zeros_like(seen).scatter(-1, action[..., None], 1.0) - seen)
    return torch.zeros_like(logits).scatter_add(1, context[..., None].expand(-1, -1, A), score) / trials


def policy_gradient(correct, logits, lr, record, shared=True, trials=0, generator=None):
    r"""Gradient ascent on the expected reward of contextual bandits, one per ensemble member, with policy softmax(W e_c + b).

    W starts at `logits`, b at zero, and both are trained. The bias is one vector for all contexts, so that what one context learns is
    imposed on the others (ray interference; Schaul et al. 2019, arXiv 1904.11455); with shared=False each context has a bias of its
    own. Contexts come at equal rates. In time dt = lr / C, for two contexts and two actions with different correct ones, g = J (1 - J):
        dJ_1/dt = 2 g_1 (2 g_1 - g_2),  the other likewise; the two contexts' gradients have cosine -1/2.          (derived)

    correct: (S, C) correct actions; logits: (S, C, A); record: the steps at which to look, increasing, from 0; trials: how many a
    step samples (REINFORCE), 0 for the exact gradient.
    Returns J (R, S, C), the probability of the correct action in each context at those steps.
    """
    rates = torch.ones(correct.shape[1]) / correct.shape[1]
    W, b, probabilities, wanted = logits.clone(), torch.zeros_like(logits[:, :1] if shared else logits), [], set(record)
    for step in range(max(record) + 1):
        now = W + b
        if step in wanted:
            probabilities.append(now.softmax(-1).gather(-1, correct[..., None])[..., 0])
        gradient = sampled_gradient(now, correct, rates, trials, generator) if trials else reward_gradient(now, correct, rates)
        W = W + lr * gradient
        b = b + lr * (gradient.sum(1, keepdim=True) if shared else gradient)
    return torch.stack(probabilities)


# ---------------------------------------------------------------- measures, the same for every family and system

def half_time(strength, time):
    r"""When each mode is half learned: the first upward crossing of 1/2, linearly interpolated.

    strength: (..., N) mode strength at times `time` (N,), increasing. Returns (...): in the units of `time`; `time[0]`
    where a mode starts at 1/2 or above, inf where it is never reached. Raises ValueError where time is not the last axis.
    """
    if strength.shape[-1] != len(time):
        raise ValueError(f"strength {tuple(strength.shape)} does not end in the {len(time)} times")
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
    r"""kappa = (L_prior - L_meta) / (L_prior - L_bayes), each loss a mean over the last axis (tasks).

    1 is Bayes-optimal, 0 never learns; nan where Bayes has gained nothing to capture.
    """
    gain = (prior - bayes).mean(-1)
    return torch.where(gain > 0, (prior - meta).mean(-1) / gain, torch.nan)


def bootstrap_interval(statistic, *samples, generator, resamples=2000):
    """Percentile bootstrap 95% interval of `statistic`, resampling tasks; paired samples are resampled together.

    samples: (N,) each; statistic maps tensors (..., N) to (...). Returns (low, high).
    """
    n = len(samples[0])
    pick = torch.randint(n, (resamples, n), generator=generator)
    values = statistic(*(s[pick] for s in samples)).sort().values
    return values[int(0.025 * resamples)].item(), values[int(0.975 * resamples) - 1].item()


def describe(strength, time, generator):
    """What one system shows, from strengths (R, N, K) at times (R,), of N tasks or seeds.

    Returns a dict: half_times (K,), geometric means over tasks; the staggering index, taken per task before any averaging, its geometric
    mean, and its 95% interval; and of how many modes in all tasks, how many are left_out and not_reached. A mode above 1/2 from the start
    has no half-time and is left out of the index, and its task with it where fewer than two modes remain, unless there was but one. With
    no task left the index is inf.
    """
    half = half_time(strength.movedim(0, -1), time)
    rises, reached = half > time[0], half.isfinite()
    index = staggering_index(torch.where(rises, half, half.amax(-1, keepdim=True)))
    index = index[rises.sum(-1) >= min(2, half.shape[-1])]
    index = index if len(index) else torch.tensor([math.inf])
    times = [geometric_mean(h[s]).item() if s.any() else math.inf for h, s in zip(half.T, rises.T)]
    return dict(half_times=times, staggering=geometric_mean(index).item(),
                staggering_ci=list(bootstrap_interval(geometric_mean, index, generator=generator)),
                left_out=(~rises).sum().item(), not_reached=(~reached).sum().item(), of=half.numel())


def in_order_learned(strength, time):
    """Strengths (R, N, K) with the modes of each task or seed in the order in which it learned them, for modes that are alike but in name."""
    order = half_time(strength.movedim(0, -1), time).argsort(dim=-1, stable=True)
    return strength.gather(-1, order.expand(strength.shape))
