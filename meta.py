r"""Meta-Learners: networks that learn a task in their activations, and the loop that trains them.

    import torch, tasks
    generator = torch.Generator().manual_seed(0)
    distribution = tasks.LinearRegression([1.4, 0.5], trials=8)
    model = MetaLearner(distribution, hidden=32, layers=1, generator=generator)
    train(model, distribution, steps=20, batch=64, generator=generator)         # 20: only a start
    x, y = distribution.episodes(distribution.sample(5, generator), generator)
    guesses = model.predict(x, y)                               # (B, T, Dy), as tasks.Bayes does

References: Rabinowitz 2019, arXiv 1905.01320; Hochreiter et al. 2001 (an LSTM trained across tasks
learns to learn); Duan et al. 2016, arXiv 1611.02779, and Wang et al. 2016, arXiv 1611.05763 (RL^2);
Jordan et al. 2024 (Muon). This file imports none of the others, so you can copy it alone. A task
distribution needs encode, input_size, outputs, sample and episodes, as in tasks.py. It leaves out
discounted returns.
"""
import contextlib
import time

import torch
from torch import nn

# ---------------------------------------------------------------- networks
class Network(nn.Module):
    """A core, a ReLU layer and a linear head. The core is made and called like nn.LSTM:
    core(inputs, hidden, layers, batch_first=True), and then core(h (B, T, Din), state) returns
    outputs (B, T, hidden) and the new state, a tensor (any, B, …) or a tuple of those.
    Weights start at torch's default, drawn from `generator`, but the input weights of nn.LSTM and
    nn.GRU at U(-1, 1) * input_gain / sqrt(inputs). torch divides by sqrt(hidden) however few inputs
    there are, which is so little that contexts and waves long look alike (ours)."""
    def __init__(self, inputs, outputs, hidden, layers, generator, core=nn.LSTM, input_gain=1.0):
        super().__init__()
        with torch.random.fork_rng(devices=()):           # torch draws where our generator stands
            torch.set_rng_state(generator.get_state())
            self.core = core(inputs, hidden, layers, batch_first=True)
            self.decoder = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU())
            self.head = nn.Linear(hidden, outputs)
            if hasattr(self.core, "weight_ih_l0"):
                bound = input_gain / inputs ** 0.5
                nn.init.uniform_(self.core.weight_ih_l0, -bound, bound)
            generator.set_state(torch.get_rng_state())

    def forward(self, inputs, state=None):
        """Inputs (B, T, Din) on any device and a state to outputs (B, T, Dout) and a new state."""
        h, state = self.core(inputs.to(self.head.weight.device), state)
        return self.head(self.decoder(h)), state

def copies(state, n):
    """n copies of each episode's state: None, a tensor (any, B, …) or a tuple of those."""
    if isinstance(state, torch.Tensor):
        return state.repeat_interleave(n, 1)
    return state and tuple(copies(part, n) for part in state)

# ---------------------------------------------------------------- Meta-Learners
def shift_right(y):
    """y_{t-1} for t = 0 … T, with y_{-1} = 0: (B, T, D) to (B, T + 1, D)."""
    return nn.functional.pad(y, (0, 0, 1, 0))

class MetaLearner(Network):
    """Learns a tasks.FeatureRegression within an episode, with fixed weights: it sees (x_t,
    x_{t-1}, y_{t-1}) and guesses y_t. Second-hand notes say that Rabinowitz shows (x_t, y_{t-1});
    with x_{t-1}, one layer can bind an input to its answer (ours). size, more: see `Network`."""
    def __init__(self, distribution, *size, **more):
        seen = distribution.encode(torch.zeros(1, distribution.input_size)).shape[-1]
        super().__init__(2 * seen + distribution.outputs, distribution.outputs, *size, **more)
        self.encode = distribution.encode

    def predict(self, x, y):
        """Its guess at y_t before it is seen: x (B, T, Dx), y (B, T, Dy) to (B, T, Dy)."""
        x = self.encode(x)
        previous = shift_right(torch.cat([x, y], -1))[:, :-1]
        return self(torch.cat([x, previous], -1))[0]

    def probe(self, x, y, xq):
        """Its guesses at xq (Q, Dx), before each trial and after the last: (B, T + 1, Q, Dy)."""
        x, xq = self.encode(x), self.encode(xq)
        previous = shift_right(torch.cat([x, y], -1))
        B, T, Q = len(x), x.shape[1], len(xq)
        answers, state = [], None
        for t in range(T + 1):
            # ask at every query point, each from a copy of the frozen state
            asked = torch.cat([xq.repeat(B, 1), previous[:, t].repeat_interleave(Q, 0)], -1)
            answers.append(self(asked[:, None], copies(state, Q))[0].view(B, Q, -1))
            # then let the real trial change the state
            if t < T:
                _, state = self(torch.cat([x[:, t], previous[:, t]], -1)[:, None], state)
        return torch.stack(answers, 1)

    def loss(self, distribution, batch, generator, progress):
        """Log of each trial's mean squared error on new episodes, averaged over trials, so large
        errors of the first do not drown small ones of the last (ours). Bayes minimizes it, too."""
        x, y = distribution.episodes(distribution.sample(batch, generator), generator)
        guess = self.predict(x, y)
        return (guess - y.to(guess.device)).square().mean((0, 2)).log().mean()

class MetaAgent(Network):
    """Learns a tasks.ContextualBandit as an agent (RL^2: Duan et al. 2016, Wang et al. 2016). From
    the context and the previous trial it computes logits of the actions, and a baseline that
    predicts the reward. entropy: initial weight of the entropy bonus. size, more: see `Network`."""
    def __init__(self, distribution, *size, entropy=0.02, **more):
        C, A = distribution.contexts, distribution.actions
        super().__init__(2 * C + A + 1, A + 1, *size, **more)
        self.contexts, self.actions, self.entropy = C, A, entropy

    def reset(self, n):
        """Starts n episodes."""
        self.state, self.previous = None, torch.zeros(n, self.contexts + self.actions + 1)

    def inputs(self, contexts, previous):
        """Contexts (...) beside the trials before them (..., C + A + 1): (..., 2 C + A + 1)."""
        return torch.cat([torch.eye(self.contexts)[contexts], previous], -1)

    def act(self, contexts):
        """Action probabilities in the contexts (B,) of the trial that is played: (B, A)."""
        outputs, self.state = self(self.inputs(contexts, self.previous)[:, None], self.state)
        return outputs[:, 0, :-1].softmax(-1).cpu()

    def probe(self, contexts):
        """Action probabilities in any contexts (B, Q), each from a copy of the state: (B, Q, A)."""
        B, Q = contexts.shape
        inputs = self.inputs(contexts, self.previous[:, None].expand(-1, Q, -1)).flatten(0, 1)
        outputs, _ = self(inputs[:, None], copies(self.state, Q))
        return outputs[:, 0, :-1].softmax(-1).view(B, Q, -1).cpu()

    def update(self, context, action, reward):
        """Ends a trial, (B,) each; the agent sees it in the next one."""
        self.previous = self.encode_trial(context, action, reward)

    def encode_trial(self, context, action, reward):
        """Encodes finished trials, (B,) or (B, T) each: (..., C + A + 1)."""
        one_hots = torch.eye(self.contexts)[context], torch.eye(self.actions)[action]
        return torch.cat([*one_hots, reward[..., None]], -1)

    def loss(self, distribution, batch, generator, progress):
        """Policy gradient with a learned baseline b and an entropy bonus that falls to zero: the
        mean over trials of -log pi(a_t) (r_t - b_t) + 1/2 (r_t - b_t)^2 - entropy H(pi_t).
        Each action is credited with its own reward alone (discount 0), *not* with what it reveals
        for later trials. Here the optimum is the same: what is best now is best for later, too."""
        correct, context, action_noise = distribution.episodes(
            distribution.sample(batch, generator), generator)
        # play trial by trial without a graph, then compute all trials at once with one
        action, reward, _ = distribution.play(self, correct, context, action_noise)
        previous = shift_right(self.encode_trial(context, action, reward))[:, :-1]
        outputs = self(self.inputs(context, previous))[0].cpu()
        log_policy, baseline = outputs[..., :-1].log_softmax(-1), outputs[..., -1]
        advantage = reward - baseline
        chosen = log_policy.gather(-1, action[..., None])[..., 0]
        entropy = -(log_policy.exp() * log_policy).sum(-1)
        loss = -chosen * advantage.detach() + 0.5 * advantage.square()
        return (loss - self.entropy * (1 - progress) * entropy).mean()

# ---------------------------------------------------------------- optimizers
def default_optimizers(model, adam_lr=0.01, muon_lr=0.0):
    """AdamW. With a muon_lr, the hidden matrices of a Network have Muon in its place."""
    parts = (model.core, model.decoder) if muon_lr else ()
    hidden = [p for part in parts for p in part.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in hidden)]
    optimizers = [torch.optim.AdamW(rest, lr=adam_lr, fused=True)]
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, lr=muon_lr, weight_decay=0.05))
    return optimizers

# ---------------------------------------------------------------- the outer loop
def learning_rate_factor(step, steps):
    """Rises to 1 over the first 2% of the steps and falls linearly to 0 over the last 80%."""
    return min(1, (step + 1) / (0.02 * steps + 1), (steps - step) / (0.8 * steps))

def train(model, distribution, steps, batch, generator, optimizers=None, checkpoint=None,
          report=None):
    """The outer loop: trains a model on new tasks.
    model: anything with loss(distribution, batch, generator, progress), progress from 0 to 1.
    optimizers: a list (default: `default_optimizers`); each group's own rate is its peak.
    checkpoint: a Path from which the same call resumes exactly. report(words) is called about ten
    times with a line on progress. Raises ValueError if the checkpoint is damaged or another call's,
    and FloatingPointError if a loss or its gradient is not finite."""
    optimizers = default_optimizers(model) if optimizers is None else optimizers
    fixed = torch.Generator().manual_seed(0)              # episodes tell distributions apart
    episodes = distribution.episodes(distribution.sample(8, fixed), fixed)
    groups = [group for each in optimizers for group in each.param_groups]
    peaks = [group.setdefault("initial_lr", group["lr"]) for group in groups]
    call = [steps, batch, sum(p.numel() for p in model.parameters()), *peaks,
            *(part.flatten().tolist() for part in episodes)]
    parts = [model, *optimizers]
    first = load(checkpoint, call, parts, generator) if checkpoint and checkpoint.exists() else 0
    begun = time.perf_counter()
    for step in range(first, steps):
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
                group["lr"] = group["initial_lr"] * learning_rate_factor(step, steps)
            each.step()
        if report and (step + 1) % max(1, steps // 10) == 0:
            left = (time.perf_counter() - begun) / (step + 1 - first) * (steps - step - 1)
            report(f"outer step {step + 1} of {steps}, loss {loss.item():.3f}; {left:.0f} s left")
        if checkpoint and ((step + 1) % max(1, steps // 25) == 0 or step + 1 == steps):
            save(checkpoint, call, step + 1, parts, generator)

# ---------------------------------------------------------------- the checkpoint
def save(path, call, step, parts, generator):
    """Saves atomically all that `train` needs to continue from `step`."""
    unfinished = path.with_name("unfinished-" + path.name)
    torch.save(dict(call=call, step=step, generator=generator.get_state(),
                    parts=[part.state_dict() for part in parts]), unfinished)
    unfinished.replace(path)

def load(path, call, parts, generator):
    """Restores what `save` saved of the same call. Returns the next step."""
    state = {}
    with contextlib.suppress(Exception):                  # torch raises a dozen different ones
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
    if state.get("call") != call:
        raise ValueError(f"{path} is damaged or belongs to another call: steps, batch, rates, the "
                         "size of the model or the task distribution differ")
    for part, saved in zip(parts, state["parts"], strict=True):
        part.load_state_dict(saved)
    generator.set_state(state["generator"])
    return state["step"]
