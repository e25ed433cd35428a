#!/usr/bin/env bash
# Evaluating a model changes what FBGEMM's row-wise RMSprop with adaptive decay learns afterwards.
#
# fbgemm-gpu-cpu 1.9.0, torch 2.14.1, Python 3.11, on the CPU.
#
# ROWWISE_RMSPROP_AR, new in 1.9, shrinks a row by the steps that passed since the row's last update. The kernel
# takes for the number of the step how often it was called: a call in eval mode under no_grad, for other rows, is a
# step like any other. So two runs over the same batches that are evaluated more or less often end with other
# weights, and one that evaluates a whole test split between two steps shrinks every row to `min_shrinkage` at its
# next update.
#
# Seen: a row of ones, two steps of gradient 0 (learning rate .1, ar_alpha 1), with look-ups of another row in eval
# mode between the two; the row's value, and the kernel's step:
#   0 evaluations: 0.81 2
#   1 evaluations: 0.72 3
#   5 evaluations: 0.36 7
#
# Exits 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy 'setuptools<82'
"$folder/venv/bin/pip" install --quiet --no-deps fbgemm-gpu-cpu==1.9.0
cat > "$folder/check.py" <<'PY'
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)


def trained(evaluations):
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [(4, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.ROWWISE_RMSPROP_AR,
        learning_rate=0.1,
        ar_alpha=1.0,
        min_shrinkage=0.1,
    )
    rows = kernel.split_embedding_weights()[0]
    rows.fill_(1.0)
    one, ends = torch.tensor([0]), torch.tensor([0, 1])
    for step in range(2):
        if step:
            kernel.eval()
            with torch.no_grad():
                for _ in range(evaluations):
                    kernel(torch.tensor([3]), ends)  # another row, and nothing is learnt
            kernel.train()
        kernel(one, ends).backward(torch.zeros(1, 4))
    return round(float(rows[0, 0]), 4), int(kernel.iter)


for evaluations in (0, 1, 5):
    print(f"{evaluations} evaluations:", *trained(evaluations))
PY
seen=$("$folder/venv/bin/python" -W ignore "$folder/check.py" 2> "$folder/said") || { cat "$folder/said"; exit 1; }
echo "$seen"
expected="0 evaluations: 0.81 2
1 evaluations: 0.72 3
5 evaluations: 0.36 7"
[ "$seen" = "$expected" ]
