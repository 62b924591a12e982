r"""The Meta-Learner: a network that learns within an episode in its activations, and the outer loop
that trains its weights.

    model = MetaLearner(prior, hidden=128, layers=2, generator=generator)
    model.predict(x, y)              # (B, T, Dy), the same calls as tasks.Bayes
    model.query(x, y, xq)            # (B, T + 1, Q, Dy)

Axis order: (B, T, D), that is episodes, trials, dimensions; Q counts query points.

References: Rabinowitz 2019, arXiv 1905.01320; Hochreiter et al. 2001 (an LSTM trained across
episodes learns to learn). Left out on purpose: second-order gradients, returns with a discount.
"""
import ctypes
import math
import sys
import time

import torch
from torch import nn
from torch.nn.functional import one_hot

import learners
import tasks

# ---------------------------------------------------------------- the Meta-Learner
class Network(nn.Module):
    """ReLU layers, a core, a ReLU layer, and a linear head.

    core: "lstm", or "attention" for episodes of so many trials, behind one more linear layer;
    encoder: units of the ReLU layer before the core, 0 for none; one of `hidden` stands after it.
    """

    def __init__(self, inputs, outputs, trials, hidden, layers, generator, core="lstm", encoder=0):
        super().__init__()
        with torch.random.fork_rng(devices=()):           # torch draws from its global generator
            torch.manual_seed(generator.initial_seed())
            self.encoder = relu_layer(inputs, encoder) if encoder else nn.Sequential()
            width = encoder or inputs
            if core == "lstm":
                self.core = nn.LSTM(width, hidden, layers, batch_first=True)
            else:
                self.encoder.append(nn.Linear(width, hidden))
                self.core = Attention(hidden, layers, trials)
            self.decoder = relu_layer(hidden, hidden)
            self.head = nn.Linear(hidden, outputs)

    def forward(self, inputs, state=None):
        """inputs (B, T, Din), state as in nn.LSTM. Returns outputs (B, T, Dout) and the state after
        the last trial."""
        h, state = self.core(self.encoder(inputs), state)
        return self.head(self.decoder(h)), state

    def device(self):
        """Where the weights are."""
        return self.head.weight.device

class MetaLearner(Network):
    """Learns a regression (a tasks.FeatureRegression) within an episode: from (x_t, y_{t-1}) to the
    guess at y_t. Its weights stay fixed there."""

    def __init__(self, prior, *size, **more):
        inputs = prior.input_size + prior.outputs
        super().__init__(inputs, prior.outputs, prior.trials, *size, **more)
        self.outputs, self.show = prior.outputs, prior.show

    def predict(self, x, y):
        """The guess at y_t before it is seen: x (B, T, Dx), y (B, T, Dy) to (B, T, Dy)."""
        x, y = self.show(x.to(self.device())), y.to(self.device())
        outputs, _ = self(torch.cat([x, delayed(y)[:, :-1]], -1))
        return outputs

    def query(self, x, y, xq):
        """What it would answer at xq (Q, Dx) in place of x_t, its state frozen before trial t:
        (B, T + 1, Q, Dy)."""
        x, y, xq = (z.to(self.device()) for z in (x, y, xq))
        x, xq, before = self.show(x), self.show(xq), delayed(y)
        B, T, Q = len(x), x.shape[1], len(xq)
        answers, state = [], None
        for t in range(T + 1):
            asked = torch.cat([xq.expand(B, Q, -1), before[:, t, None].expand(B, Q, -1)], -1)
            frozen = branched(state, torch.arange(B).repeat_interleave(Q))
            answer, _ = self(asked.reshape(B * Q, 1, -1), frozen)
            answers.append(answer.view(B, Q, self.outputs))
            if t < T:
                _, state = self(torch.cat([x[:, t, None], before[:, t, None]], -1), state)
        return torch.stack(answers, 1)

class Attention(nn.Module):
    """Causal self-attention with the call of nn.LSTM: core(inputs (B, T, H), state) to outputs
    (B, T, H) and the state. The state is all keys and values so far, (layers, B, t, H) each."""

    def __init__(self, hidden, layers, trials):
        super().__init__()
        heads = math.gcd(hidden, 4)
        self.position = nn.Parameter(torch.zeros(1, trials + 1, hidden))
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, h, state=None):
        """h (B, T, H), state as above or None. Returns outputs (B, T, H) and the new state."""
        past = [(None, None)] * len(self.blocks) if state is None else zip(*state)
        t = 0 if state is None else state[0].shape[2]
        h = h + self.position[:, t:t + h.shape[1]]
        keys, values = [], []
        for block, (key, value) in zip(self.blocks, past):
            h, key, value = block(h, key, value)
            keys.append(key)
            values.append(value)
        return self.norm(h), (torch.stack(keys), torch.stack(values))

class Block(nn.Module):
    """One layer of Attention: heads that look back, then a ReLU layer; each added to its input."""

    def __init__(self, hidden, heads):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(hidden), nn.LayerNorm(hidden)])
        self.query, self.key, self.value, self.out = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, 2 * hidden), nn.Linear(2 * hidden, hidden)

    def forward(self, h, key, value):
        """h (B, T, H) of the trials at hand; key, value (B, t, H) of those before, or None.
        Returns the new h, and keys and values (B, t + T, H)."""
        x = self.norms[0](h)
        key = self.key(x) if key is None else torch.cat([key, self.key(x)], 1)
        value = self.value(x) if value is None else torch.cat([value, self.value(x)], 1)

        def split(z):
            """(B, t, H) to (B, heads, t, H / heads)."""
            return z.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        T, seen = h.shape[1], key.shape[1]
        causal = torch.ones(T, seen, dtype=torch.bool, device=h.device).tril(seen - T)
        looked_up = nn.functional.scaled_dot_product_attention(
            split(self.query(x)), split(key), split(value), attn_mask=causal)
        h = h + self.out(looked_up.transpose(1, 2).flatten(2))
        return h + self.down(self.up(self.norms[1](h)).relu()), key, value

def relu_layer(inputs, units):
    """A layer of ReLU units."""
    return nn.Sequential(nn.Linear(inputs, units), nn.ReLU())

def delayed(y):
    """y_{t-1} for t = 0 … T, with y_{-1} = 0: (B, T, Dy) to (B, T + 1, Dy)."""
    return torch.cat([torch.zeros_like(y[:, :1]), y], 1)

def branched(state, episodes):
    """The states of these episodes (n,), which may repeat, out of a batch's; None stays None."""
    if state is None:
        return None
    return tuple(part[:, episodes.to(part.device)] for part in state)

class MetaAgent(Network):
    """Learns a tasks.ContextualBandit within an episode, as an agent: from context and the trial
    before (context, action, reward; all one-hot but the last) to the logits of the actions, and a
    baseline for the reward."""

    def __init__(self, prior, *size, **more):
        C, A = prior.contexts, prior.actions
        super().__init__(2 * C + A + 1, A + 1, prior.trials, *size, **more)
        self.contexts, self.actions = C, A

    def inputs(self, context, previous):
        """What the network is shown: (B, 2 C + A + 1) from the context (B,), and the trial before:
        context, action (-1 if there was none) and reward, each (B,)."""
        last_context, last_action, last_reward = previous
        C, A = self.contexts, self.actions
        shown = [
            one_hot(context, C),
            one_hot(last_context + 1, C + 1)[..., 1:],            # all zeros before the first trial
            one_hot(last_action + 1, A + 1)[..., 1:],
            last_reward[..., None],
        ]
        return torch.cat(shown, -1).float().to(self.device())

    def begin(self, n, prior=None):
        """Starts n episodes."""
        self.state = None
        self.previous = torch.full((n,), -1), torch.full((n,), -1), torch.zeros(n)

    def policy(self):
        """Action probabilities in every context, (B, C, A), from the state before this trial."""
        C, B = self.contexts, len(self.previous[0])
        episode = torch.arange(B).repeat_interleave(C)
        inputs = self.inputs(torch.arange(C).repeat(B), [z[episode] for z in self.previous])
        outputs, self.branches = self(inputs[:, None], branched(self.state, episode))
        return outputs[:, 0, :-1].softmax(-1).view(B, C, -1).cpu()

    def observe(self, context, action, reward):
        """Goes on from the branch in which the context that came, (B,), was shown."""
        came = torch.arange(len(context)) * self.contexts + context
        self.state = branched(self.branches, came)
        self.previous = context, action, reward

    @torch.no_grad()
    def roll_out(self, correct, contexts, luck):
        """Plays without a look at contexts that do not come: inputs (B, T, Din), actions (B, T) and
        rewards (B, T)."""
        self.begin(len(correct))
        record = []
        for t in range(contexts.shape[1]):
            context = contexts[:, t]
            inputs = self.inputs(context, self.previous)
            outputs, self.state = self(inputs[:, None], self.state)
            policy = outputs[:, 0, :-1].softmax(-1).cpu()
            action = tasks.draw(policy, luck[:, t])
            answer = correct.gather(1, context[:, None])[:, 0]
            self.previous = context, action, (action == answer).float()
            record.append((inputs, action, self.previous[2]))
        return [torch.stack(z, 1) for z in zip(*record)]

# ---------------------------------------------------------------- losses of an outer step
def squared_error_loss(model, prior, batch, generator):
    """Squared error over all trials of a batch of fresh episodes, twice: to descend, to report."""
    x, y = prior.episodes(prior.sample(batch, generator), generator)
    guess = model.predict(x, y)
    loss = (guess - y.to(guess.device)).square().mean()
    return loss, loss

def policy_gradient_loss(agent, prior, batch, entropy, generator):
    r"""A loss whose gradient is a policy gradient, with a learned baseline and an entropy bonus.

    mean over trials of  -log pi(a_t) (r_t - b_t) + 1/2 (r_t - b_t)^2 - entropy H(pi_t).

    Each action answers for its own reward alone: discount 0. This is *not* the gradient of the
    whole return, to which what an action reveals for later trials would belong. It has the same
    optimum, since in these bandits what is best now is best for later, and less variance; on the
    way there it is another gradient. Returns that loss, and the mean reward, to report.
    """
    episodes = prior.episodes(prior.sample(batch, generator), generator)
    inputs, action, reward = agent.roll_out(*episodes)    # trial by trial, without a graph
    outputs, _ = agent(inputs)                      # all trials at once, with one
    log_policy, baseline = outputs[..., :-1].log_softmax(-1), outputs[..., -1]
    advantage = reward.to(baseline.device) - baseline
    chosen = log_policy.gather(-1, action.to(baseline.device)[..., None])[..., 0]
    bonus = -entropy * (log_policy.exp() * log_policy).sum(-1)
    loss = -chosen * advantage.detach() + 0.5 * advantage.square() - bonus
    return loss.mean(), reward.mean()

# ---------------------------------------------------------------- the outer loop
def make_optimizers(model, name, muon_lr, adam_lr):
    """A list of optimizers: "adam" on all weights; or "muon" on the matrices of the core, those of
    an LSTM's four gates each by itself, and of the decoder, and Adam on the rest."""
    if name == "adam":
        return [torch.optim.Adam(model.parameters(), lr=adam_lr)]
    core = [p for p in model.core.parameters() if p.ndim == 2]
    decoder = [p for p in model.decoder.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in core + decoder)]
    gates = 4 if isinstance(model.core, nn.LSTM) else 1
    matrices = [dict(params=core, stacked=gates), dict(params=decoder)]
    muon = learners.Muon(matrices, muon_lr, iterations=3)         # as good as five, and cheaper
    return [torch.optim.Adam(rest, lr=adam_lr), muon]

def learning_rate_factor(step, steps, warmup=0.02):
    """Linear warm-up over the first 2% of the steps, then linearly to zero at the last."""
    return min((step + 1) / (warmup * steps + 1), (steps - step) / steps)

def spaced_steps(first, last, count):
    """0, and `count` steps (some of which may coincide) evenly spaced in their logarithm."""
    spaced = torch.logspace(math.log10(first), math.log10(last), count, dtype=torch.float64)
    return sorted({0, *spaced.round().int().tolist()})

def outer_loop(model, loss, steps, optimizers, generator, path, settings, snapshot=None,
               report=None, clip=1.0):
    """Trains a freshly initialised Meta-Learner, resuming from the checkpoint at `path` if there is
    one. Stopped at any moment and called again, it ends bit for bit the same.

    loss(generator, share) -> what to descend and what to report, drawing its episodes from the
    generator, a share of the outer loop being done; settings: a dict, kept in the checkpoint;
    snapshot(model) -> a dict of tensors, taken at some 40 steps; report(step, value) is told of
    every step. Returns the snapshots, each with its "step". Raises Unreadable; FloatingPointError
    if a loss or gradient is not finite (the last checkpoint stays).
    """
    rates = [optimizer.defaults["lr"] for optimizer in optimizers]
    first, snapshots = 0, []
    if path.exists():
        first, snapshots = restore(path, settings, model, optimizers, generator)
    wanted = spaced_steps(steps / 200, steps, 40) if snapshot else []
    save_every = max(1, steps // 25)
    for step in range(first, steps + 1):
        if step in wanted:
            with torch.no_grad():
                snapshots.append(dict(step=step) | snapshot(model))
        if step == steps:
            return snapshots
        value, shown = loss(generator, step / steps)
        for optimizer, rate in zip(optimizers, rates):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate_factor(step, steps)
        value.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        if not (value.isfinite() and norm.isfinite()):
            raise FloatingPointError(f"the loss is {value.item()} and its gradient {norm.item()} "
                                     f"at outer step {step}; the last checkpoint is kept")
        for optimizer in optimizers:
            optimizer.step()
        if report:
            report(step, shown.item())
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save_checkpoint(path, settings, step + 1, model, optimizers, generator, snapshots)

class Progress:
    """Says how the outer loop does: in place on a terminal, in ten lines in a log. Its loss, or
    reward, is a running mean; prior, bayes: that of No learning and of Bayes."""

    def __init__(self, steps, prior, bayes):
        self.steps, self.prior, self.bayes = steps, prior, bayes
        self.name = "reward" if bayes > prior else "loss"
        self.terminal = sys.stderr.isatty()
        self.value, self.done, self.begun = None, 0, time.perf_counter()

    def __call__(self, step, value):
        self.value = value if self.value is None else 0.98 * self.value + 0.02 * value
        self.done, left = self.done + 1, self.steps - step - 1
        if left % max(1, self.steps // (100 if self.terminal else 10)) == 0:
            pace = (time.perf_counter() - self.begun) / self.done
            captured = (self.prior - self.value) / (self.prior - self.bayes)
            line = (f"step {step + 1}/{self.steps}  {self.name} {self.value:.3f}, Bayes "
                    f"{self.bayes:.3f}  κ {captured:.2f}  {1e3 * pace:.0f} ms  "
                    f"{left * pace:.0f} s left")
            print(f"{line:79}", end="\r" if self.terminal and left else "\n", file=sys.stderr)

def keep_freed_memory():
    """Has glibc keep freed memory: by default it hands large blocks back to the system and fetches
    them anew, page by page, at every step (first edition, nonlinreg: 35 ms a step, not 59)."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)                               # M_MMAP_MAX
        libc.mallopt(-1, -1)                              # M_TRIM_THRESHOLD
    except (AttributeError, OSError, TypeError):          # another libc: no harm, some speed
        pass

# ---------------------------------------------------------------- checkpoints
class Unreadable(ValueError):
    """A file of a run that cannot be read."""

    def __init__(self, path):
        super().__init__(f"--out: {path} cannot be read, allowed: another folder, or --fresh to "
                         "replace the run that is there")

def read(path, reader):
    """What the reader makes of a file. Raises Unreadable where it cannot."""
    try:
        return reader(path)
    except Exception as error:                            # damaged archives raise many kinds
        raise Unreadable(path) from error

def save_checkpoint(path, settings, step, model, optimizers, generator, snapshots):
    """Writes all that the outer loop needs to go on from `step`; at any moment the old checkpoint
    or the new one is there, whole."""
    state = dict(
        settings=settings,
        step=step,
        model=model.state_dict(),
        optimizers=[optimizer.state_dict() for optimizer in optimizers],
        generator=generator.get_state(),
        snapshots=snapshots,
    )
    unfinished = path.with_name("unfinished-" + path.name)
    torch.save(state, unfinished)
    unfinished.replace(path)

def restore(path, settings, model, optimizers, generator):
    """Sets model, optimizers and generator as a checkpoint has them. Returns the next step and the
    snapshots so far. Raises Unreadable."""
    state = read(path, lambda path: torch.load(path, map_location="cpu", weights_only=True))
    if state["settings"] != settings:
        raise Unreadable(path)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    generator.set_state(state["generator"])
    return state["step"], state["snapshots"]
