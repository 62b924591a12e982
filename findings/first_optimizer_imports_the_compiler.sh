#!/usr/bin/env bash
# torch 2.13.0 (CPU): the first optimizer of a process imports torch's compiler.
# Behaviour: torch.optim.SGD on one tensor of three numbers, nothing compiled, imports hundreds of
#   modules, torch._dynamo and sympy among them: a second or two and some 70 MB. The second
#   optimizer imports nothing.
# Naive guess: an optimizer stores its parameters, so the first costs what the second costs.
# Why it matters here: a quick run of 15 seconds pays it at its first Learner, and whoever times an
#   optimizer, or the memory of a Learner, measures these imports.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/v"
"$folder/v/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
"$folder/v/bin/python" - <<'P'
import resource, sys, time
import torch

def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def cost():
    weight = torch.zeros(3, requires_grad=True)
    modules, megabytes, begun = len(sys.modules), memory(), time.perf_counter()
    torch.optim.SGD([weight], lr=0.1)
    seconds = time.perf_counter() - begun
    return len(sys.modules) - modules, memory() - megabytes, seconds

first, second = cost(), cost()
for name, (modules, megabytes, seconds) in ("first", first), ("second", second):
    print(f"{name} optimizer: {modules} modules, {megabytes:.0f} MB, {seconds:.4f} s")
assert first[0] > 300 and "torch._dynamo" in sys.modules and "sympy" in sys.modules
assert second[0] == 0 and second[2] < first[2] / 20
P
