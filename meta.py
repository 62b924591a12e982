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

import torch
from torch import nn


class UnusableCheckpoint(ValueError):
    """A checkpoint that is damaged, or that was made with another config."""


# ---------------------------------------------------------------- the Meta-Learner

class MetaLearner(nn.Module):
    """LSTM on (x_t, y_{t-1}); a linear head on its output is the guess at y_t. Its weights stay fixed within an episode."""

    def __init__(self, input_size, outputs, hidden, generator, layers=1):
        super().__init__()
        self.outputs = outputs
        with torch.random.fork_rng(devices=()):           # torch's constructors draw from the global generator: put it back
            self.lstm = nn.LSTM(input_size + outputs, hidden, layers, batch_first=True)
            self.head = nn.Linear(hidden, outputs)
        for p in self.parameters():                       # torch's own initial law for an LSTM, drawn from our generator
            nn.init.uniform_(p, -hidden ** -0.5, hidden ** -0.5, generator=generator)

    def forward(self, inputs, state=None):
        """inputs (B, T, Dx + Dy), state as in nn.LSTM. Returns outputs (B, T, Dy) and the state after the last trial."""
        h, state = self.lstm(inputs, state)
        return self.head(h), state

    def predict(self, x, y):
        """The guess at y_t before it is seen: x (B, T, Dx), y (B, T, Dy) to (B, T, Dy), on the model's own device."""
        x, y = x.to(self.head.weight.device), y.to(self.head.weight.device)
        return self(torch.cat([x, delayed(y)[:, :-1]], -1))[0]

    def query(self, x, y, xq):
        """What it would answer at xq (Q, Dx) in place of x_t, with its state frozen before trial t: (B, T + 1, Q, Dy)."""
        x, y, xq = (z.to(self.head.weight.device) for z in (x, y, xq))
        before, state, answers = delayed(y), None, []
        B, T, Q = len(x), x.shape[1], len(xq)
        for t in range(T + 1):
            frozen = state and tuple(s.repeat_interleave(Q, 1) for s in state)
            inputs = torch.cat([xq.expand(B, Q, -1), before[:, t, None].expand(B, Q, -1)], -1)
            answers.append(self(inputs.reshape(B * Q, 1, -1), frozen)[0].view(B, Q, self.outputs))
            if t < T:
                _, state = self(torch.cat([x[:, t, None], before[:, t, None]], -1), state)
        return torch.stack(answers, 1)


def delayed(y):
    """y_{t-1} for t = 0 … T, with y_{-1} = 0: (B, T, Dy) to (B, T + 1, Dy)."""
    return torch.cat([torch.zeros_like(y[:, :1]), y], 1)


# ---------------------------------------------------------------- probes of the inner loop, for any predictor

def losses(predictor, x, y):
    """Squared error averaged over outputs, per episode and trial (B, T), on the CPU. x (B, T, Dx), y (B, T, Dy)."""
    return (predictor.predict(x, y).cpu() - y).square().mean(-1)


def episodes_of(prior, W, n, generator):
    """n episodes of each task in W (N, Dy, F): x (N, n, T, Dx) and y (N, n, T, Dy)."""
    return tuple(z.unflatten(0, (len(W), n)) for z in prior.episodes(W.repeat_interleave(n, 0), generator))


def inner_loop(predictor, prior, W, episodes, xq):
    """Mode strengths before each trial and after the last, averaged over the episodes of each task.

    W: (N, Dy, F) tasks; episodes: x and y as from `episodes_of`; xq: (Q, Dx).
    Returns strengths (T + 1, N, K) and a dict of the probe's other readings, (T + 1, N) each.
    """
    # task by task, because the probe asks for E (T + 1) Q answers of each
    read = [prior.read_modes(predictor.query(x, y, xq).cpu(), xq, w) for w, x, y in zip(W, *episodes)]
    return torch.stack([s for s, _ in read], 1), {name: torch.stack([others[name] for _, others in read], 1) for name in read[0][1]}


# ---------------------------------------------------------------- the outer loop

def make_optimizers(model, name, muon_lr, adam_lr):
    """ "adam" on all weights; or "muon" on the LSTM's matrices and Adam on the rest. Returns a list of optimizers.

    Muon gets the matrices of the four gates one by one, as views into nn.LSTM's stacked ones (and into their gradients, which must
    therefore be zeroed in place): orthogonalised together they would share one update's norm.
    """
    matrices, gates = [p for p in model.lstm.parameters() if p.ndim == 2] if name == "muon" else [], []
    for matrix in matrices:
        matrix.grad = torch.zeros_like(matrix)
        for gate, gradient in zip(matrix.detach().chunk(4), matrix.grad.chunk(4)):
            gate.grad = gradient
            gates.append(gate)
    adam = torch.optim.Adam([p for p in model.parameters() if not any(p is m for m in matrices)], lr=adam_lr)
    return [adam, torch.optim.Muon(gates, lr=muon_lr, weight_decay=0.0)] if gates else [adam]


def learning_rate_factor(step, steps, warmup=0.05, decay=0.4):
    """Linear warm-up over the first 5% of the steps, then constant, then linearly to zero over the last 40%."""
    return min(1.0, (step + 1) / (warmup * steps + 1), (steps - step) / (decay * steps))


def snapshot_steps(steps, count=16):
    """0, `steps`, and about `count` outer steps between them, evenly spaced in their logarithm: a sorted list."""
    return sorted({0, steps, *(round(steps ** (i / count)) for i in range(count))})


def outer_loop(model, loss, steps, optimizers, generator, snapshot, path, config, clip=1.0, report=lambda step, loss: None):
    """Trains a Meta-Learner, resuming from the checkpoint at `path` if there is one.

    loss(model, generator) -> scalar, drawing its episodes from generator; snapshot(model) -> a dict of lists and numbers, taken at
    log-spaced outer steps; report(step, loss) is told of every step. The model must be freshly initialised.
    Returns the snapshots, each with its "outer_step". Stopped at any moment and called again, it ends bit for bit the same.
    Raises UnusableCheckpoint; FloatingPointError if the loss is not finite
    (the last checkpoint stays); OSError if a checkpoint cannot be written (the one before it stays).
    """
    base = [[group["lr"] for group in o.param_groups] for o in optimizers]
    first, snapshots = 0, []
    if path.exists():
        saved = load_checkpoint(path, config)
        model.load_state_dict(saved["model"])
        for o, state in zip(optimizers, saved["optimizers"]):
            o.load_state_dict(state)
        generator.set_state(saved["generator"])
        first, snapshots = saved["step"], saved["snapshots"]

    wanted, save_every = snapshot_steps(steps), max(1, steps // 50)
    for step in range(first, steps + 1):
        if step in wanted:
            with torch.no_grad():
                snapshots.append({"outer_step": step, **snapshot(model)})
        if step == steps:
            break
        value = loss(model, generator)
        if not value.isfinite():
            raise FloatingPointError(f"the loss is {value.item()} at outer step {step}")
        report(step, value.item())
        for o, rates in zip(optimizers, base):
            o.zero_grad(set_to_none=False)
            for group, rate in zip(o.param_groups, rates):
                group["lr"] = rate * learning_rate_factor(step, steps)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        for o in optimizers:
            o.step()
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save_checkpoint(path, dict(step=step + 1, model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers],
                                       generator=generator.get_state(), snapshots=snapshots, config=config))
    return snapshots


class Progress:
    """One line while the outer loop works: in place on a terminal, ten plain lines in a log. The loss shown is a running mean."""

    def __init__(self, steps, loss_prior, loss_bayes):
        self.steps, self.prior, self.bayes, self.loss, self.shown = steps, loss_prior, loss_bayes, None, 0.0

    def __call__(self, step, loss):
        now, terminal = time.perf_counter(), sys.stderr.isatty()
        if self.loss is None:
            self.loss, self.first, self.start = loss, step, now
        self.loss += 0.02 * (loss - self.loss)
        last = step + 1 == self.steps
        if last or (now - self.shown > 0.2 if terminal else (step + 1) % max(1, self.steps // 10) == 0):
            self.shown, ms = now, 1e3 * (now - self.start) / (step + 1 - self.first)
            line = (f"step {step + 1}/{self.steps}  loss {self.loss:.3f}, Bayes {self.bayes:.3f}  "
                    f"κ {(self.prior - self.loss) / (self.prior - self.bayes):.2f}  {ms:.0f} ms  {(self.steps - step - 1) * ms / 1e3:.0f} s left")
            if terminal:
                width = shutil.get_terminal_size().columns - 1
                line = "\r" + line[:width].ljust(width)
            print(line, end="" if terminal and not last else "\n", file=sys.stderr, flush=True)


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
        state = torch.load(path, map_location="cpu", weights_only=True)
        made_with = state["config"]
    except Exception as error:                            # torch.load raises many kinds on damaged bytes
        raise UnusableCheckpoint(f"{path.name} is damaged") from error
    if made_with != config:
        raise UnusableCheckpoint(f"{path.name} belongs to another config")
    return state
