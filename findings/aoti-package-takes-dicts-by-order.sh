#!/usr/bin/env bash
# A compiled package given the same dict with its keys in another order takes each tensor for another input.
#
# torch 2.13.0 (CPU), Python 3.11; a C++ compiler is needed.
#
# A module that takes a dict of tensors is exported, compiled with AOTInductor and loaded with
# `torch._inductor.aoti_load_package`. Dicts have no order that means anything, and the exported program itself
# goes by the keys. The package flattens whatever dict it is handed and never compares it with the structure that it
# was compiled for, which it knows (`get_call_spec`): keys in another order are tensors in other places. Where types
# and shapes agree, as with ids and lengths, the answer is another one, and nothing is raised.
#
# Seen:
#   module, price first: [-9.0, -18.0]
#   module, count first: [-9.0, -18.0]
#   exported, price first: [-9.0, -18.0]
#   exported, count first: [-9.0, -18.0]
#   package, price first: [-9.0, -18.0]
#   package, count first: [9.0, 18.0]
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


class Difference(torch.nn.Module):
    def forward(self, inputs):
        return inputs["price"] - inputs["count"]


price, count = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
price_first = {"price": price, "count": count}
count_first = {"count": count, "price": price}
module = Difference()
exported = torch.export.export(module, (price_first,))
path = sys.argv[1] + "/model.pt2"
torch._inductor.aoti_compile_and_package(exported, package_path=path)
package = torch._inductor.aoti_load_package(path)
seen = []
for name, call in (("module", module), ("exported", exported.module()), ("package", package)):
    for order, inputs in (("price", price_first), ("count", count_first)):
        try:
            answer = call(inputs).tolist()
        except Exception as error:
            answer = f"raises {type(error).__name__}"
        seen.append(f"{name}, {order} first: {answer}")
print("\n".join(seen))
right, other = "[-9.0, -18.0]", "[9.0, 18.0]"
wanted = [f"{name}, {order} first: {right}" for name in ("module", "exported") for order in ("price", "count")]
wanted += [f"package, price first: {right}", f"package, count first: {other}"]
sys.exit(seen != wanted)
PY
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/check.py" "$folder" 2>/dev/null
