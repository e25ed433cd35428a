#!/usr/bin/env bash
# A right shift of bytes is exported to ONNX with a signed type: bytes from 128 up come out negative.
#
# torch 2.13.0 (CPU), onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0, Python 3.11.
#
# Code that unpacks bits shifts uint8 tensors. The dynamo exporter writes such a shift with a cast to int8 at its end,
# whatever type came in, and says so in the type of the output. What torch shifts out of a byte of 255 by a number of
# places that is 0 (a column of a table of shifts, say) is 255 there and -1 in ONNX, in silence. Where the shift meets
# a uint8 tensor again, as in unpacking two 4-bit numbers by `& 15` and `>> 4`, the exported file does not load.
#
# Seen:
#   255 >> 0: torch 255.0, onnx -1.0
#   255 >> 4: torch 15.0, onnx 15.0
#   & 15 beside >> 4: torch [15, 15], onnx does not load: bound to different types (tensor(uint8) and tensor(int8)
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


class Shift(torch.nn.Module):
    def __init__(self, places):
        super().__init__()
        self.places = places

    def forward(self, x):
        return (x >> self.places).float()


class Unpack(torch.nn.Module):
    def forward(self, x):
        return torch.cat((x & 15, x >> 4))


def exported(module, x):
    path = sys.argv[1] + "/model.onnx"
    torch.onnx.export(module, (x,), dynamo=True, opset_version=18, verbose=False).save(path)
    try:
        session = onnxruntime.InferenceSession(path)
    except Exception as error:
        text = str(error)
        return "does not load: " + text[text.find("bound to different") :].partition(" in node")[0]
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0].tolist()


x = torch.tensor([255], dtype=torch.uint8)
seen = [
    f"255 >> {places}: torch {Shift(places)(x).item()}, onnx {exported(Shift(places), x)[0]}" for places in (0, 4)
]
seen.append(f"& 15 beside >> 4: torch {Unpack()(x).tolist()}, onnx {exported(Unpack(), x)}")
print("\n".join(seen))
wanted = [
    "255 >> 0: torch 255.0, onnx -1.0",
    "255 >> 4: torch 15.0, onnx 15.0",
    "& 15 beside >> 4: torch [15, 15], onnx does not load: bound to different types (tensor(uint8) and tensor(int8)",
]
sys.exit(seen != wanted)
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder" 2>/dev/null
