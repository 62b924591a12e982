r"""The Meta-Learner: an LSTM that learns within an episode in its activations, and the outer loop that trains its weights.

    model = MetaLearner(input_size=5, outputs=5, hidden=128, generator=generator)
    model.predict(x, y)              # (B, T, Dy), the same calls as tasks.Bayes
    model.query(x, y, xq)            # (B, T + 1, Q, Dy)

Axis order: (B, T, D), that is episodes, trials, dimensions; Q counts query points.

References: Rabinowitz 2019, arXiv 1905.01320; Hochreiter et al. 2001 (an LSTM trained across episodes learns to learn);
Jordan et al. 2024 (Muon). Left out on purpose: attention, second-order gradients, schedulers that need a state.
"""
import io
import os
import shutil
import sys
import time
import zipfile

import torch
from torch import nn

import tasks


class UnusableCheckpoint(ValueError):
    """A checkpoint that is damaged, or that was made with another config."""


# ---------------------------------------------------------------- the Meta-Learner

class MetaLearner(nn.Module):
    """LSTM on (x_t, y_{t-1}); a linear head on its output is the guess at y_t. Its weights stay fixed within an episode.

    encoder, decoder: how many ReLU layers, of `hidden` units, stand before and after the LSTM; show: what is done to x first.
    """

    def __init__(self, input_size, outputs, hidden, generator, layers=1, encoder=0, decoder=0, show=lambda x: x):
        super().__init__()
        self.outputs, self.show = outputs, show
        with torch.random.fork_rng(devices=()):           # torch's constructors draw from the global generator: put it back
            self.encoder = relu_layers(input_size + outputs, hidden, encoder)
            self.lstm = nn.LSTM(hidden if encoder else input_size + outputs, hidden, layers, batch_first=True)
            self.decoder = relu_layers(hidden, hidden, decoder)
            self.head = nn.Linear(hidden, outputs)
        for module in self.modules():                     # torch's own initial laws, drawn from our generator
            if isinstance(module, (nn.Linear, nn.LSTM)):
                bound = (hidden if isinstance(module, nn.LSTM) else module.in_features) ** -0.5
                for p in module.parameters():
                    nn.init.uniform_(p, -bound, bound, generator=generator)

    def forward(self, inputs, state=None):
        """inputs (B, T, Dx + Dy), state as in nn.LSTM. Returns outputs (B, T, Dy) and the state after the last trial."""
        h, state = self.lstm(self.encoder(inputs), state)
        return self.head(self.decoder(h)), state

    def predict(self, x, y):
        """The guess at y_t before it is seen: x (B, T, Dx), y (B, T, Dy) to (B, T, Dy), on the model's own device."""
        x, y = self.show(x.to(self.head.weight.device)), y.to(self.head.weight.device)
        return self(torch.cat([x, delayed(y)[:, :-1]], -1))[0]

    def query(self, x, y, xq):
        """What it would answer at xq (Q, Dx) in place of x_t, with its state frozen before trial t: (B, T + 1, Q, Dy)."""
        x, y, xq = (z.to(self.head.weight.device) for z in (x, y, xq))
        x, xq, before, state, answers = self.show(x), self.show(xq), delayed(y), None, []
        B, T, Q = len(x), x.shape[1], len(xq)
        for t in range(T + 1):
            frozen = state and tuple(s.repeat_interleave(Q, 1) for s in state)
            inputs = torch.cat([xq.expand(B, Q, -1), before[:, t, None].expand(B, Q, -1)], -1)
            answers.append(self(inputs.reshape(B * Q, 1, -1), frozen)[0].view(B, Q, self.outputs))
            if t < T:
                _, state = self(torch.cat([x[:, t, None], before[:, t, None]], -1), state)
        return torch.stack(answers, 1)


class MetaAgent:
    """A Meta-Learner that plays contextual bandits, as an agent (see tasks.ContextualBandit): an LSTM on (context, previous context,
    previous action, previous reward), all one-hot but the last; its outputs are the logits of the actions and a baseline for the reward.
    """

    def __init__(self, model):
        self.model = model

    def inputs(self, context, before, action, reward):
        """What the LSTM is shown: (..., 2 C + A + 1) from context (...), and the trial before: context, action (-1 if none), reward (...)."""
        C, A = self.prior.contexts, self.prior.actions
        one_hot = [nn.functional.one_hot(z + 1, n + 1)[..., 1:] for z, n in ((context, C), (before, C), (action, A))]
        return torch.cat([*one_hot, reward[..., None]], -1).float().to(self.model.head.weight.device)

    def begin(self, n, prior):
        """Starts n episodes."""
        self.prior, self.state = prior, None
        self.previous = torch.full((n,), -1), torch.full((n,), -1), torch.zeros(n)

    def policy(self):
        """Action probabilities in every context, (B, C, A), from the state before this trial."""
        C, B = self.prior.contexts, len(self.previous[0])
        state = self.state and tuple(s.repeat_interleave(C, 1) for s in self.state)
        inputs = self.inputs(torch.arange(C).repeat(B), *(z.repeat_interleave(C) for z in self.previous))
        outputs, self.branches = self.model(inputs[:, None], state)
        return outputs[:, 0, :-1].softmax(-1).view(B, C, -1).cpu()

    def observe(self, context, action, reward):
        """Goes on from the state in which the context that came, (B,), was shown."""
        branch = (torch.arange(len(context)) * self.prior.contexts + context).to(self.model.head.weight.device)
        self.state, self.previous = tuple(s[:, branch] for s in self.branches), (context, action, reward)

    def roll_out(self, correct, contexts, luck, prior):
        """Plays without looking at the contexts that do not come: inputs (B, T, Din), actions and rewards (B, T)."""
        self.begin(len(correct), prior)
        each, record = torch.arange(len(correct)), []
        for t in range(prior.trials):
            inputs = self.inputs(contexts[:, t], *self.previous)
            outputs, self.state = self.model(inputs[:, None], self.state)
            action = tasks.draw(outputs[:, 0, :-1].softmax(-1).cpu(), luck[:, t])
            self.previous = contexts[:, t], action, (action == correct[each, contexts[:, t]]).float()
            record.append((inputs, *self.previous[1:]))
        return tuple(torch.stack(z, 1) for z in zip(*record))


def squared_error_loss(model, prior, batch, generator):
    """The loss of an outer step in regression, twice (to descend, to report): squared error over all trials of a batch of fresh episodes."""
    x, y = prior.episodes(prior.sample(batch, generator), generator)
    guess = model.predict(x, y)
    loss = (guess - y.to(guess.device)).square().mean()
    return loss, loss


def policy_gradient_loss(agent, prior, batch, entropy, generator):
    r"""A loss whose gradient is the policy gradient of the expected reward, with a learned baseline and an entropy bonus.

    sum over trials of  -log pi(a_t) (r_t - b_t) + 1/2 (r_t - b_t)^2 - entropy H(pi), averaged. No return is discounted because none is
    summed: in these bandits what is best now is best for later (myopia is optimal), so discount 0 is exact.
    Returns that loss, and minus the mean reward, to report.
    """
    with torch.no_grad():                                 # play trial by trial without a graph; then all trials at once, with one
        inputs, action, reward = agent.roll_out(*prior.episodes(prior.sample(batch, generator), generator), prior)
    outputs, _ = agent.model(inputs)
    log_policy, baseline = outputs[..., :-1].log_softmax(-1), outputs[..., -1]
    advantage = reward.to(baseline.device) - baseline
    chosen = log_policy.gather(-1, action.to(baseline.device)[..., None])[..., 0]
    bonus = entropy * -(log_policy.exp() * log_policy).sum(-1)
    return (-chosen * advantage.detach() + 0.5 * advantage.square() - bonus).mean(), -reward.mean()


def relu_layers(inputs, hidden, n):
    """n layers of `hidden` ReLU units, the first on `inputs` numbers; with n = 0 the identity."""
    return nn.Sequential(*(part for i in range(n) for part in (nn.Linear(hidden if i else inputs, hidden), nn.ReLU())))


def delayed(y):
    """y_{t-1} for t = 0 … T, with y_{-1} = 0: (B, T, Dy) to (B, T + 1, Dy)."""
    return torch.cat([torch.zeros_like(y[:, :1]), y], 1)


# ---------------------------------------------------------------- the outer loop

def make_optimizers(model, name, muon_lr, adam_lr):
    """A list of optimizers: "adam" on all weights; or "muon" on the matrices of the LSTM and of ReLU layers but the first, Adam on the rest.

    Muon gets the matrices of an LSTM's four gates one by one, as views into nn.LSTM's stacked ones (and into their gradients, which
    must therefore be zeroed in place): orthogonalised together they would share one update's norm.
    """
    matrices, parts = [], []
    for module in (model.encoder[1:], model.lstm, model.decoder) if name == "muon" else ():
        for matrix in (p for p in module.parameters() if p.ndim == 2):
            matrix.grad = torch.zeros_like(matrix)
            gates = 4 if module is model.lstm else 1
            for part, gradient in zip(matrix.detach().chunk(gates), matrix.grad.chunk(gates)):
                part.grad = gradient
                parts.append(part)
            matrices.append(matrix)
    adam = torch.optim.Adam([p for p in model.parameters() if not any(p is m for m in matrices)], lr=adam_lr)
    return [adam, torch.optim.Muon(parts, lr=muon_lr, weight_decay=0.0)] if parts else [adam]


def learning_rate_factor(step, steps, warmup=0.05, decay=0.4):
    """Linear warm-up over the first 5% of the steps, then constant, then linearly to zero over the last 40%."""
    return min(1.0, (step + 1) / (warmup * steps + 1), (steps - step) / (decay * steps))


def snapshot_steps(steps, count=16):
    """0, and `count` outer steps from steps / 200 to `steps`, evenly spaced in their logarithm: a sorted list."""
    return sorted({0, *(round(steps * 200 ** (i / (count - 1) - 1)) for i in range(count))})


def outer_loop(model, loss, steps, optimizers, generator, path, config, snapshot=None, clip=1.0, report=lambda step, loss: None):
    """Trains a Meta-Learner, resuming from the checkpoint at `path` if there is one.

    loss(model, generator, share) -> what to descend and what to report of it, drawing its episodes from generator, a share of the outer
    loop being done; snapshot(model) -> a dict of lists and numbers, taken at log-spaced outer steps, if given; report(step, loss) is told of
    every step. The model must be freshly initialised. Returns the snapshots, each with its "outer_step". Stopped at any moment and called
    again, it ends bit for bit the same. Raises UnusableCheckpoint; FloatingPointError if a loss or gradient is not finite (the last checkpoint
    stays); OSError if a checkpoint cannot be written (the one before it stays).
    """
    base = [[group["lr"] for group in o.param_groups] for o in optimizers]
    first, snapshots = 0, []
    if path.exists():
        saved = load_checkpoint(path, config)
        try:
            model.load_state_dict(saved["model"])
            for o, state in zip(optimizers, saved["optimizers"]):
                o.load_state_dict(state)
            generator.set_state(saved["generator"])
            first, snapshots = saved["step"], saved["snapshots"]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UnusableCheckpoint(f"{path.name} does not fit this Meta-Learner") from error

    wanted, save_every = snapshot_steps(steps), max(1, steps // 50)
    for step in range(first, steps + 1):
        if snapshot and step in wanted:
            with torch.no_grad():
                snapshots.append({"outer_step": step, **snapshot(model)})
        if step == steps:
            break
        value, shown = loss(model, generator, step / steps)
        if not value.isfinite():
            raise FloatingPointError(f"the loss is {value.item()} at outer step {step}; the last checkpoint is kept")
        report(step, shown.item())
        for o, rates in zip(optimizers, base):
            o.zero_grad(set_to_none=False)
            for group, rate in zip(o.param_groups, rates):
                group["lr"] = rate * learning_rate_factor(step, steps)
        value.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        if not norm.isfinite():
            raise FloatingPointError(f"the gradient is {norm.item()} at outer step {step}; the last checkpoint is kept")
        for o in optimizers:
            o.step()
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save_checkpoint(path, dict(step=step + 1, model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers],
                                       generator=generator.get_state(), snapshots=snapshots, config=config))
    return snapshots


def weights(model):
    """How many entries the matrices of a model have: each takes a multiplication and an addition a trial, forward."""
    return sum(p.numel() for p in model.parameters() if p.ndim == 2)


@torch.no_grad()
def matrix_product_rate(device, n=512, seconds=0.2):
    """What this machine can do at best: floating-point operations a second in products of n x n matrices in float32."""
    a, count, start = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).to(device), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        (a @ a).trace().item()                            # waits for a GPU
        count += 1
    return 2 * n**3 * count / (time.perf_counter() - start)


class Progress:
    """One line while the outer loop works: in place on a terminal, ten plain lines in a log. The loss shown is a running mean. At the
    end another, with its speed beside that of this machine's matrix product.

    loss_prior, loss_bayes: those of the predictor that never learns and of Bayes; negative where they are rewards.
    operations: floating-point operations in an outer step.
    """

    def __init__(self, steps, loss_prior, loss_bayes, operations, device):
        self.steps, self.prior, self.bayes, self.operations, self.device = steps, loss_prior, loss_bayes, operations, device
        self.loss, self.shown = None, 0.0

    def __call__(self, step, loss):
        now, terminal = time.perf_counter(), sys.stderr.isatty()
        if self.loss is None:
            self.loss, self.first, self.start = loss, step, now
        self.loss += 0.02 * (loss - self.loss)
        last = step + 1 == self.steps
        if last or (now - self.shown > 0.2 if terminal else (step + 1) % max(1, self.steps // 10) == 0):
            self.shown, ms = now, 1e3 * (now - self.start) / max(1, step - self.first)
            what, captured = "loss" if self.bayes > 0 else "reward", (self.prior - self.loss) / ((self.prior - self.bayes) or 1)
            line = (f"step {step + 1}/{self.steps}  {what} {abs(self.loss):.3f}, Bayes {abs(self.bayes):.3f}  κ {captured:.2f}  "
                    f"{ms:.0f} ms  {(self.steps - step - 1) * ms / 1e3:.0f} s left")
            if terminal:
                width = shutil.get_terminal_size().columns - 1
                line = "\r" + line[:width].ljust(width)
            print(line, end="" if terminal and not last else "\n", file=sys.stderr, flush=True)
            if last and step > self.first:
                rate, best = self.operations / ms * 1e3, matrix_product_rate(self.device)
                print(f"{rate / 1e9:.3g} GFLOP/s, {rate / best:.0%} of the matrix product's {best / 1e9:.3g} here", file=sys.stderr)


# ---------------------------------------------------------------- checkpoints

def replace_file(path, data):
    """Writes bytes to `path` so that at any moment the old file or the new one is there, whole. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_checkpoint(path, state):
    """Writes a dict of tensors, numbers, strings and lists of them, atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    replace_file(path, buffer.getvalue())


def load_checkpoint(path, config):
    """Reads a checkpoint onto the CPU. Raises UnusableCheckpoint."""
    try:
        if zipfile.ZipFile(path).testzip():               # torch.load does not look at the checksums
            raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        made_with = state["config"]
    except Exception as error:                            # torch.load raises many kinds on damaged bytes
        raise UnusableCheckpoint(f"{path.name} is damaged") from error
    if made_with != config:
        raise UnusableCheckpoint(f"{path.name} belongs to another config")
    return state
