#!/usr/bin/env bash
# An embedding that refuses ids below zero, by itself and by an assertion, answers them once exported to ONNX.
#
# torch 2.13.0 (CPU), onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0, Python 3.11.
#
# `nn.Embedding` raises for id -1, a usual mark for "missing". Its ONNX form is a Gather, which counts negative indices
# from the end, so that the last row is served for it. An assertion of the user's own does not help: `_assert_async`
# is kept by torch.export, whose program raises, and left out by the exporter without a word, as nothing uses what
# it returns.
#
# Seen:
#   module: raises RuntimeError
#   exported program: raises RuntimeError
#   embedding alone: raises IndexError
#   onnx of the module: [[6.0, 7.0]]
#   onnx of the embedding alone: [[6.0, 7.0]]
#
# Exits 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps torch==2.13.0
"$folder/venv/bin/pip" install --quiet filelock typing-extensions sympy networkx jinja2 fsspec 'setuptools<82' numpy \
  onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cat > "$folder/check.py" <<'PY'
import sys, warnings
warnings.filterwarnings("ignore")
import onnxruntime
import torch


class Checked(torch.nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, ids):
        torch._assert_async((ids >= 0).all(), "an id is below 0")
        return self.table(ids)


def outcome(call, ids):
    try:
        return call(ids).tolist()
    except Exception as error:
        return f"raises {type(error).__name__}"


def onnx(module):
    path = sys.argv[1] + "/model.onnx"
    torch.onnx.export(module, (torch.tensor([1]),), dynamo=True, opset_version=18, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path)
    return lambda ids: session.run(None, {session.get_inputs()[0].name: ids.numpy()})[0]


table = torch.nn.Embedding(4, 2)
table.weight.data = torch.arange(8.0).view(4, 2)
module, ids = Checked(table), torch.tensor([-1])
with torch.no_grad():
    seen = [
        f"module: {outcome(module, ids)}",
        f"exported program: {outcome(torch.export.export(module, (torch.tensor([1]),)).module(), ids)}",
        f"embedding alone: {outcome(table, ids)}",
        f"onnx of the module: {outcome(onnx(module), ids)}",
        f"onnx of the embedding alone: {outcome(onnx(table), ids)}",
    ]
print("\n".join(seen))
wanted = ["module: raises RuntimeError", "exported program: raises RuntimeError", "embedding alone: raises IndexError"]
wanted += ["onnx of the module: [[6.0, 7.0]]", "onnx of the embedding alone: [[6.0, 7.0]]"]
sys.exit(seen != wanted)
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder" 2>/dev/null
