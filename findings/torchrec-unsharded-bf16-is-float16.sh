#!/usr/bin/env bash
# An unsharded TorchRec collection holds a table of any type but FP32 as float16.
#
# torchrec 1.8.0, torch 2.13.0 (CPU), fbgemm-gpu-cpu 1.8.0, Python 3.11.
#
# EmbeddingBagConfig and EmbeddingConfig have a data_type: FP32, FP16, BF16, INT8 and more. FP32 gives float32
# weights; each of the others gives float16, in EmbeddingBagCollection and in EmbeddingCollection alike, without
# a word. So a table declared BF16 for its range has the range of float16: a row of 1e5, which bfloat16 holds
# (as 99840), is infinite. State dicts carry float16 as well.
#
# Seen:
#   FP32 torch.float32 torch.float32
#   FP16 torch.float16 torch.float16
#   BF16 torch.float16 torch.float16
#   INT8 torch.float16 torch.float16
#   a row of 1e5 in a BF16 table: inf
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
import sys, warnings
warnings.filterwarnings("ignore")
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.modules.embedding_configs import DataType

shape = {"name": "t", "num_embeddings": 4, "embedding_dim": 4, "feature_names": ["f"]}
seen = []
for kind in (DataType.FP32, DataType.FP16, DataType.BF16, DataType.INT8):
    bags = EmbeddingBagCollection([EmbeddingBagConfig(**shape, data_type=kind)])
    single = EmbeddingCollection([EmbeddingConfig(**shape, data_type=kind)])
    seen.append(f"{kind.name} {bags.embedding_bags['t'].weight.dtype} {single.embeddings['t'].weight.dtype}")
bags = EmbeddingBagCollection([EmbeddingBagConfig(**shape, data_type=DataType.BF16)])
with torch.no_grad():
    bags.embedding_bags["t"].weight.copy_(torch.full((4, 4), 1e5))
seen.append(f"a row of 1e5 in a BF16 table: {bags.embedding_bags['t'].weight[0, 0].item()}")
print("\n".join(seen))
wanted = [f"{kind} torch.float16 torch.float16" for kind in ("FP16", "BF16", "INT8")]
sys.exit(seen != ["FP32 torch.float32 torch.float32", *wanted, "a row of 1e5 in a BF16 table: inf"])
PY
"$folder/venv/bin/python" "$folder/check.py"
