r"""Meta-Learners: networks that learn a task in their activations, and the loop that trains them.

    import torch, tasks
    generator = torch.Generator().manual_seed(0)
    distribution = tasks.LinearRegression(dim=2, trials=8)
    model = MetaLearner(distribution, hidden=32, layers=1, generator=generator)
    train(model, distribution, steps=20, batch=64, generator=generator)         # 20: only a start
    x, y = distribution.episodes(distribution.sample(5, generator), generator)
    guesses = model.predict(x, y)                               # (B, T, Dy), as tasks.Bayes does

References: Rabinowitz 2019, arXiv 1905.01320; Hochreiter et al. 2001 (an LSTM trained across tasks
learns to learn); Finn et al. 2017, arXiv 1703.03400 (MAML). It leaves out discounted returns.
"""
import math

import torch
from torch import nn

import learners
import tasks

# ---------------------------------------------------------------- networks
class Network(nn.Module):
    """An encoder of `encoder_width` ReLU units, a core, a ReLU layer and a linear head. The core is
    "lstm" or "attention". Weights are drawn from `generator` by torch's default distributions.
    Raises ValueError for an unknown core."""

    def __init__(self, inputs, outputs, hidden, layers, generator, core="lstm", encoder_width=0):
        super().__init__()
        learners.check_name("core", core, ["lstm", "attention"])
        with torch.random.fork_rng(devices=()):           # torch's own draws are discarded
            first = [nn.Linear(inputs, encoder_width), nn.ReLU()] if encoder_width else []
            self.encoder = nn.Sequential(*first)
            width = encoder_width or inputs
            if core == "lstm":
                self.core = nn.LSTM(width, hidden, layers, batch_first=True)
            else:
                self.encoder.append(nn.Linear(width, hidden))
                self.core = Attention(hidden, layers)
            self.decoder = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU())
            self.head = nn.Linear(hidden, outputs)
        for module in self.modules():                     # U(-1, 1) / sqrt(fan-in, or LSTM units)
            if isinstance(module, (nn.Linear, nn.LSTM)):
                fan = module.in_features if isinstance(module, nn.Linear) else module.hidden_size
                for p in module.parameters(recurse=False):
                    nn.init.uniform_(p, -fan ** -0.5, fan ** -0.5, generator=generator)

    def forward(self, inputs, state=None):
        """Maps inputs (B, T, Din) on any device and a state to outputs (B, T, Dout) and the new
        state, both on the device of the weights; called like nn.LSTM."""
        h, state = self.core(self.encoder(inputs.to(self.head.weight.device)), state)
        return self.head(self.decoder(h)), state

class Attention(nn.Module):
    """Causal self-attention that is called like nn.LSTM: core(inputs (B, T, H), state) returns
    outputs (B, T, H) and the state, here the keys and values of each layer (2, B, t, H) and the
    last input (1, B, 1, H). Each input is shown together with the one before, so x_{t-1} meets its
    y_{t-1}. Without that, with learned positions or none, waves are hardly learned (ours)."""

    def __init__(self, hidden, layers):
        super().__init__()
        self.shift = nn.Linear(hidden, hidden)
        self.blocks = nn.ModuleList(Block(hidden, math.gcd(hidden, 4)) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, h, state=None):
        B, _, H = h.shape
        *pasts, last = state or [h.new_zeros(2, B, 0, H) for _ in self.blocks] + [
            h.new_zeros(1, B, 1, H)]
        state = [h[None, :, -1:]]
        h = h + self.shift(torch.cat([last[0], h[:, :-1]], 1))
        for block, past in zip(self.blocks, pasts):
            h, past = block(h, past)
            state.insert(-1, past)
        return self.norm(h), tuple(state)

class Block(nn.Module):
    """One layer of Attention: heads, then a ReLU layer, each added to its input."""

    def __init__(self, hidden, heads):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(hidden), nn.LayerNorm(hidden)])
        self.query, self.key, self.value, self.out = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, 2 * hidden), nn.Linear(2 * hidden, hidden)

    def forward(self, h, past):
        """h (B, T, H) of the present trials, and keys and values (2, B, t, H) of the earlier ones.
        Returns the new h, and all keys and values (2, B, t + T, H)."""
        x = self.norms[0](h)
        past = torch.cat([past, torch.stack([self.key(x), self.value(x)])], 2)
        T, seen = h.shape[1], past.shape[2]
        causal = torch.ones(T, seen, dtype=torch.bool, device=h.device).tril(seen - T)
        heads = [z.unflatten(-1, (self.heads, -1)).transpose(1, 2)        # (B, heads, T, H / heads)
                 for z in (self.query(x), *past)]
        attended = nn.functional.scaled_dot_product_attention(*heads, attn_mask=causal)
        h = h + self.out(attended.transpose(1, 2).flatten(2))
        return h + self.down(self.up(self.norms[1](h)).relu()), past

# ---------------------------------------------------------------- Meta-Learners
def shift_right(y):
    """y_{t-1} for t = 0 … T, with y_{-1} = 0: (B, T, Dy) to (B, T + 1, Dy)."""
    return torch.cat([torch.zeros_like(y[:, :1]), y], 1)

class MetaLearner(Network):
    """Learns a tasks.FeatureRegression within an episode: it sees (x_t, y_{t-1}) and guesses y_t.
    Its weights stay fixed meanwhile. For its calls see tasks.py; for size and more, `Network`."""

    def __init__(self, distribution, *size, **more):
        inputs = distribution.input_size + distribution.outputs
        super().__init__(inputs, distribution.outputs, *size, **more)
        self.encode = distribution.encode

    def predict(self, x, y):
        """Its guess at y_t before it is seen: x (B, T, Dx), y (B, T, Dy) to (B, T, Dy)."""
        return self(torch.cat([self.encode(x), shift_right(y)[:, :-1]], -1))[0]

    def probe(self, x, y, xq):
        """Its guesses at xq (Q, Dx), before each trial and after the last: (B, T + 1, Q, Dy)."""
        x, xq, before = self.encode(x), self.encode(xq), shift_right(y)
        B, T, Q = len(x), x.shape[1], len(xq)
        answers, state = [], None
        for t in range(T + 1):
            # ask at every query point, each from a copy of the frozen state
            asked = torch.cat([xq.repeat(B, 1), before[:, t].repeat_interleave(Q, 0)], -1)[:, None]
            copies = state and tuple(part.repeat_interleave(Q, 1) for part in state)
            answers.append(self(asked, copies)[0].view(B, Q, -1))
            # then let the real trial change the state
            if t < T:
                _, state = self(torch.cat([x[:, t, None], before[:, t, None]], -1), state)
        return torch.stack(answers, 1)

    def loss(self, distribution, batch, generator, progress):
        """Logarithm of the mean squared error on new episodes, averaged over trials. Bayes' guess
        minimizes it, as it minimizes the plain mean. But in the plain mean, the large errors of the
        first trials drown the small ones of the last (ours)."""
        x, y = distribution.episodes(distribution.sample(batch, generator), generator)
        guess = self.predict(x, y)
        return (guess - y.to(guess.device)).square().mean((0, 2)).log().mean()

class MetaAgent(Network):
    """Learns a tasks.ContextualBandit as an agent. From the context and the previous trial it
    computes logits of the actions, and a baseline that predicts the reward. entropy: initial weight
    of the entropy bonus. size, more: see `Network`."""

    def __init__(self, distribution, *size, entropy=0.02, **more):
        C, A = distribution.contexts, distribution.actions
        super().__init__(2 * C + A + 1, A + 1, *size, **more)
        self.contexts, self.actions, self.entropy = C, A, entropy

    def begin(self, n, distribution):
        """Starts n episodes."""
        self.state, self.previous = None, torch.zeros(n, self.contexts + self.actions + 1)

    def policy(self, contexts):
        """Action probabilities in some contexts (B, Q), each from a copy of the state before this
        trial: (B, Q, A)."""
        B, Q = contexts.shape
        previous = self.previous[:, None].expand(-1, Q, -1)
        inputs = torch.cat([torch.eye(self.contexts)[contexts], previous], -1).flatten(0, 1)
        copies = self.state and tuple(part.repeat_interleave(Q, 1) for part in self.state)
        outputs, self.next_state = self(inputs[:, None], copies)
        return outputs[:, 0, :-1].softmax(-1).view(B, Q, -1).cpu()

    def observe(self, context, action, reward):
        """Ends a trial in the one context that was asked last, (B,) each."""
        self.state, self.previous = self.next_state, self.encode_trial(context, action, reward)

    def encode_trial(self, context, action, reward):
        """Encodes finished trials, (B,) or (B, T) each: (..., C + A + 1)."""
        one_hots = torch.eye(self.contexts)[context], torch.eye(self.actions)[action]
        return torch.cat([*one_hots, reward[..., None]], -1)

    def loss(self, distribution, batch, generator, progress):
        """A loss whose gradient is a policy gradient, with a learned baseline b and an entropy
        bonus that falls to zero: the mean over trials of
        -log pi(a_t) (r_t - b_t) + 1/2 (r_t - b_t)^2 - entropy H(pi_t).
        Each action is credited with its own reward alone (discount 0). This is *not* the gradient
        of the whole return, which includes what an action reveals for later trials. The optimum is
        the same, because in these bandits what is best now is best for later."""
        correct, context, uniforms = distribution.episodes(
            distribution.sample(batch, generator), generator)
        # play trial by trial without a graph, then compute all trials at once with one
        action, reward, _ = distribution.play(self, correct, context, uniforms)
        previous = shift_right(self.encode_trial(context, action, reward))[:, :-1]
        inputs = torch.cat([torch.eye(self.contexts)[context], previous], -1)
        outputs, _ = self(inputs)
        action, reward = action.to(outputs.device), reward.to(outputs.device)
        log_policy, baseline = outputs[..., :-1].log_softmax(-1), outputs[..., -1]
        advantage = reward - baseline
        chosen = log_policy.gather(-1, action[..., None])[..., 0]
        entropy = -(log_policy.exp() * log_policy).sum(-1)
        loss = -chosen * advantage.detach() + 0.5 * advantage.square()
        return (loss - self.entropy * (1 - progress) * entropy).mean()

class MAML(nn.Module):
    """Learns linear regression in full-batch gradient steps within an episode (Finn et al. 2017).
    The outer loop learns the initial weights W_2, W_1 of a linear network and a step size for each
    step. Dividing by t + 5 keeps step sizes comparable for any number of trials t (ours)."""

    def __init__(self, distribution, width, inner_steps, generator):
        super().__init__()
        W1 = torch.randn(width, distribution.input_size, generator=generator)
        W2 = torch.randn(distribution.outputs, width, generator=generator)
        self.W1, self.W2 = nn.Parameter(W1 / width ** 0.5), nn.Parameter(W2 / width ** 0.5)
        self.lr = nn.Parameter(torch.full((inner_steps,), 0.1))

    def inner_loop(self, x, y, t):
        """Its map after each step on x (..., T, Dx) and y (..., T, Dy), zero except in the t (...)
        trials that were seen: (steps + 1, ..., Dy, Dx)."""
        xx, yx = (z.mT @ x / (t + 5)[..., None, None] for z in (x, y))
        W1, W2 = (W.expand(*x.shape[:-2], -1, -1) for W in (self.W1, self.W2))
        maps = [W2 @ W1]
        for lr in self.lr:
            error = W2 @ (W1 @ xx) - yx                   # the gradient in W_2 W_1
            W1, W2 = W1 - lr * W2.mT @ error, W2 - lr * error @ W1.mT
            maps.append(W2 @ W1)
        return torch.stack(maps)

    def loss(self, distribution, batch, generator, progress):
        """Mean of log(1 + squared error) on the trials from a random t on. The logarithm dampens
        the rare episodes in which the inner loop diverges."""
        x, y = distribution.episodes(distribution.sample(batch, generator), generator)
        t = torch.randint(x.shape[1], (batch,), generator=generator)
        unseen = torch.arange(x.shape[1]) >= t[:, None]
        seen = ~unseen[..., None]
        guess = x @ self.inner_loop(seen * x, seen * y, t)[-1].mT
        return (guess - y).square().mean(-1).log1p()[unseen].mean()

# ---------------------------------------------------------------- the outer loop
def make_optimizers(model, name, muon_lr, adam_lr):
    """Returns optimizers: Adam alone, or Muon for hidden matrices and Adam for the rest."""
    learners.check_name("optimizer", name, ["muon", "adam"])
    if name == "adam":
        return [torch.optim.Adam(model.parameters(), lr=adam_lr)]
    core = [p for p in model.core.parameters() if p.ndim == 2]
    decoder = [p for p in model.decoder.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in core + decoder)]
    gates = 4 if isinstance(model.core, nn.LSTM) else 1
    matrices = [dict(params=core, stacked=gates), dict(params=decoder)]
    muon = learners.Muon(matrices, muon_lr, iterations=3)         # as good as five here
    return [torch.optim.Adam(rest, lr=adam_lr), muon]

def learning_rate_factor(step, steps):
    """Rises to 1 over the first 2% of the steps and falls linearly to 0 over the last 80%."""
    return min(1, (step + 1) / (0.02 * steps + 1), (steps - step) / (0.8 * steps))

def spaced_steps(first, last, count):
    """0, and `count` steps evenly spaced in their logarithm; some may coincide."""
    spaced = torch.logspace(math.log10(first), math.log10(last), count, dtype=torch.float64)
    return sorted({0, *spaced.round().int().tolist()})

def train(model, distribution, steps, batch, generator, optimizer="muon", muon_lr=0.05,
          adam_lr=0.02, checkpoint=None, settings=None, snapshot=None):
    """The outer loop: trains a model on new tasks. Returns the snapshots, each with its "step".

    model: anything with loss(distribution, batch, generator, progress), progress from 0 to 1.
    optimizer: see `make_optimizers`; the rates are peaks. checkpoint: a Path from which an
    interrupted call resumes exactly, if it agrees with settings, a dict. snapshot(step): a dict of
    tensors, taken at some 40 steps. Raises WrongCheckpoint if that is another run's, and
    FloatingPointError if a loss or its gradient is not finite.
    """
    optimizers = make_optimizers(model, optimizer, muon_lr, adam_lr)
    fixed = torch.Generator().manual_seed(0)              # episodes tell distributions apart
    episodes = distribution.episodes(distribution.sample(8, fixed), fixed)
    belongs_to = dict(settings=settings or {}, episodes=episodes)
    first, snapshots = 0, []
    if checkpoint and checkpoint.exists():
        first, snapshots = load(checkpoint, belongs_to, model, optimizers, generator)
    snapshot_steps = spaced_steps(max(1, steps / 200), steps, 40) if snapshot else []
    for step in range(first, steps + 1):
        # measure before the update, so step 0 is the untrained model
        if step in snapshot_steps:
            with torch.no_grad():
                snapshots.append(dict(step=step) | snapshot(step))
        if step == steps:
            return snapshots
        # new episodes, loss and gradient
        loss = model.loss(distribution, batch, generator, step / steps)
        model.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not (loss.isfinite() and norm.isfinite()):
            raise FloatingPointError(f"the loss is {loss.item()} and its gradient {norm.item()} at "
                                     f"outer step {step}; smaller learning rates may help")
        # update with the present learning rates
        for each in optimizers:
            for group in each.param_groups:
                group["lr"] = each.defaults["lr"] * learning_rate_factor(step, steps)
            each.step()
        if checkpoint and ((step + 1) % max(1, steps // 25) == 0 or step + 1 == steps):
            save(checkpoint, belongs_to, step + 1, model, optimizers, generator, snapshots)

# ---------------------------------------------------------------- the checkpoint
class WrongCheckpoint(ValueError):
    """A checkpoint that belongs to another run."""

def difference(there, here):
    """Says in words in which settings two dicts differ; empty if they agree."""
    return ", ".join(f"{name} {there.get(name)} there, {value} here"
                     for name, value in here.items() if there.get(name) != value)

def save(path, belongs_to, step, model, optimizers, generator, snapshots):
    """Saves atomically all that `train` needs to continue from `step`."""
    state = dict(belongs_to, step=step, model=model.state_dict(), generator=generator.get_state(),
                 optimizers=[each.state_dict() for each in optimizers], snapshots=snapshots)
    unfinished = path.with_name("unfinished-" + path.name)
    torch.save(state, unfinished)
    unfinished.replace(path)

def load(path, belongs_to, model, optimizers, generator):
    """Restores what `save` saved. Returns the next step and the snapshots so far."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    differs = difference(state["settings"], belongs_to["settings"])
    pairs = zip(state["episodes"], belongs_to["episodes"])
    if not all(a.shape == b.shape and torch.allclose(a, b, atol=1e-4) for a, b in pairs):
        differs = differs or "the task distribution has changed"
    if differs:
        raise WrongCheckpoint(f"{path} belongs to another run: {differs}")
    model.load_state_dict(state["model"])
    for each, saved in zip(optimizers, state["optimizers"], strict=True):
        each.load_state_dict(saved)
    generator.set_state(state["generator"])
    return state["step"], state["snapshots"]
