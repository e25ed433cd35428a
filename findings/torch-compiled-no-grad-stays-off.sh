#!/usr/bin/env bash
# A compiled function that raises inside no_grad leaves gradients switched off behind it.
#
# torch 2.13.0 (CPU), Python 3.11, backend "eager"; with "aot_eager" the mode comes back.
#
# `with torch.no_grad():` restores the gradient mode however its block ends. Under torch.compile the mode is
# switched by calls within the graph: where something between the two raises (here an _assert_async that fails,
# as a range check would), the call that switches it back is never made. The caller catches the error, as a
# server or a training loop that skips a bad batch does, and from then on nothing in the thread has a gradient:
# the next backward() fails far from the cause, or, where parts are frozen anyway, training goes on and learns
# nothing.
#
# Seen:
#   plain function: raises RuntimeError, gradients afterwards: True
#   compiled, eager: raises RuntimeError, gradients afterwards: False
#   compiled, aot_eager: raises RuntimeError, gradients afterwards: True
#
# Exits 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps torch==2.13.0
"$folder/venv/bin/pip" install --quiet filelock typing-extensions sympy networkx jinja2 fsspec 'setuptools<82' numpy
cat > "$folder/check.py" <<'PY'
import sys, warnings
warnings.filterwarnings("ignore")
import torch


def checked(values):
    with torch.no_grad():
        torch._assert_async((values > 0).all(), "a value is not above 0")
        total = values + 1
    return total * 2


def outcome(function):
    torch.set_grad_enabled(True)
    try:
        function(torch.tensor([-1.0]))
        raised = "raises nothing"
    except RuntimeError as error:
        raised = f"raises {type(error).__name__}"
    return f"{raised}, gradients afterwards: {torch.is_grad_enabled()}"


seen = [f"plain function: {outcome(checked)}"]
for backend in ("eager", "aot_eager"):
    compiled = torch.compile(checked, fullgraph=True, backend=backend)
    seen.append(f"compiled, {backend}: {outcome(compiled)}")
print("\n".join(seen))
wanted = ["plain function: raises RuntimeError, gradients afterwards: True"]
wanted.append("compiled, eager: raises RuntimeError, gradients afterwards: False")
wanted.append("compiled, aot_eager: raises RuntimeError, gradients afterwards: True")
sys.exit(seen != wanted)
PY
"$folder/venv/bin/python" "$folder/check.py"
