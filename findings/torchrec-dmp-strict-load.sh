#!/usr/bin/env bash
# DistributedModelParallel.load_state_dict(state, strict=True) never raises.
#
# torchrec 1.8.0, torch 2.13.0 (CPU), fbgemm-gpu-cpu 1.8.0, Python 3.11.
#
# nn.Module.load_state_dict with strict=True, the default, raises for a missing key, an unexpected key and a
# tensor of another shape. The same call on a DistributedModelParallel, on one gloo rank, over an
# EmbeddingBagCollection and a Linear(3, 2), returns instead: a missing and an unexpected key are only named in
# what it returns (without their prefix), and a weight of another shape is left as it was, with no word anywhere.
# So a checkpoint of another model "loads", and the model goes on with its initial weights.
#
# Seen:
#   plain module, missing key: raises RuntimeError
#   plain module, another shape: raises RuntimeError
#   sharded module, missing and unexpected: returns missing=['bias'] unexpected=['nobody']
#   sharded module, another shape: returns missing=[] unexpected=[], weight changed: False
#
# Exits 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps torch==2.13.0 torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0
"$folder/venv/bin/pip" install --quiet filelock typing-extensions sympy networkx jinja2 fsspec 'setuptools<82' numpy \
    torchmetrics==1.0.3 tensordict==0.13.0 pyre-extensions tqdm iopath lightning-utilities packaging psutil
cat > "$folder/check.py" <<'PY'
import os, warnings
warnings.filterwarnings("ignore")
import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.model_parallel import DistributedModelParallel

os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
dist.init_process_group("gloo", init_method=f"file://{os.environ['STORE']}", rank=0, world_size=1)


class Model(nn.Module):
    def __init__(self, device):
        super().__init__()
        table = EmbeddingBagConfig(name="t", num_embeddings=10, embedding_dim=4, feature_names=["f"])
        self.tables = EmbeddingBagCollection([table], device=device)
        self.dense = nn.Linear(3, 2)


def outcome(module, state):
    try:
        found = module.load_state_dict(state, strict=True)
    except RuntimeError:
        return "raises RuntimeError"
    return f"returns missing={list(found.missing_keys)} unexpected={list(found.unexpected_keys)}"


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


plain = Model(torch.device("cpu"))
state = {key: value.clone() for key, value in plain.state_dict().items()}
seen = {"plain module, missing key": outcome(plain, without(state, "dense.bias"))}
seen["plain module, another shape"] = outcome(plain, {**state, "dense.weight": torch.zeros(5, 7)})
sharded = DistributedModelParallel(Model(torch.device("meta")), device=torch.device("cpu"))
state = dict(sharded.state_dict())
odd = {**without(state, "dense.bias"), "nobody": torch.zeros(1)}
seen["sharded module, missing and unexpected"] = outcome(sharded, odd)
before = sharded.state_dict()["dense.weight"].clone()
said = outcome(sharded, {**state, "dense.weight": torch.zeros(5, 7)})
changed = not torch.equal(before, sharded.state_dict()["dense.weight"])
seen["sharded module, another shape"] = f"{said}, weight changed: {changed}"
for what, result in seen.items():
    print(f"{what}: {result}")
expected = {
    "plain module, missing key": "raises RuntimeError",
    "plain module, another shape": "raises RuntimeError",
    "sharded module, missing and unexpected": "returns missing=['bias'] unexpected=['nobody']",
    "sharded module, another shape": "returns missing=[] unexpected=[], weight changed: False",
}
os._exit(0 if seen == expected else 1)
PY
STORE="$folder/store" "$folder/venv/bin/python" "$folder/check.py" 2>/dev/null
