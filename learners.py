r"""Learners: systems that learn one task by gradient descent, run as an ensemble in one batched computation, and their closed forms.

    W = torch.diag(torch.tensor([1.6, 0.3]))[None]                     # one 2 x 2 target
    steps, maps = linear_network(W, lr=0.01, steps=1000, start="random")
    maps[:, 0].diagonal(dim1=-2, dim2=-1)                              # two sigmoids, the strong mode first

Axis order: recorded times lead, then S (ensemble members: tasks, or seeds), then the map's own axes.

References: Saxe, McClelland & Ganguli 2013, arXiv 1312.6120 (deep linear networks).
Imports nothing of ours: copy it alone. Left out on purpose: minibatches and input noise. Inputs are white and gradients exact, so
that the closed forms hold; what is random is the initialisation alone, drawn from an explicit generator.
"""
import torch

OPTIMIZERS = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
    "rmsprop": lambda parameters, lr: torch.optim.RMSprop(parameters, lr=lr),
    # Newton-Schulz run until it converges (the cubic iteration, 20 steps): Muon's usual five steps are only roughly orthogonal
    "muon": lambda parameters, lr: torch.optim.Muon(parameters, lr=lr, weight_decay=0.0, ns_coefficients=(1.5, -0.5, 0.0), ns_steps=20),
}


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


def linear_network(target, lr, steps, start="aligned", scale=1e-3, optimizer="sgd", every=1, generator=None):
    r"""Gradient descent of a deep (or, for start "shallow", a one-layer) linear network on white inputs, one network per target.

    L = 1/2 ||W_target - W_2 W_1||_F^2, the expected loss for x ~ N(0, I) up to the noise; time constant tau = 1 / lr steps.
    (With torch's MSELoss, which averages over the outputs, tau would be N_y / (2 lr).)

    target: (S, N_y, N_x); start and scale as in `initial_layers`; optimizer one of OPTIMIZERS.
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
    return torch.tensor(recorded), torch.stack(maps)


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
