"""Child process of `doctor`: import the set step by step, one JSON line after each step.

It is run as a plain file and imports nothing of embcomp, so it works in any broken installation,
and the last line printed tells where a crash happened.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path


def main() -> None:
    """Print what works; stops at the first step that raises, with the error in the last line."""
    warnings.simplefilter("ignore")
    driver = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists()
    _say(cuda_driver=driver, cores=os.cpu_count())
    try:
        _torch()
        _fbgemm()
        _torchrec()
    except BaseException as error:  # noqa: BLE001 - a broken set may raise anything at import
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        _say(error=f"{type(error).__name__}: {error}{cause}")


def _say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def _torch() -> None:
    import torch
    import torch.distributed as dist

    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gib = properties.total_memory / 2**30
            devices.append(f"cuda:{index} {properties.name} ({gib:.0f} GiB)")
    _say(
        cuda_devices=devices,
        torch_build=f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU",
        threads=torch.get_num_threads(),
        gloo=dist.is_available() and dist.is_gloo_available(),
        nccl=dist.is_available() and dist.is_nccl_available(),
    )
    _say(**{"import torch": torch.__version__})


def _fbgemm() -> None:
    import fbgemm_gpu

    _say(**{"import fbgemm_gpu": getattr(fbgemm_gpu, "__version__", "ok")})


def _torchrec() -> None:
    import torch
    import torchrec

    _say(**{"import torchrec": torchrec.__version__})
    table = torchrec.EmbeddingBagConfig(
        name="t", num_embeddings=4, embedding_dim=4, feature_names=["f"]
    )
    rows = torchrec.EmbeddingBagCollection(tables=[table], device=torch.device("cpu"))
    features = torchrec.KeyedJaggedTensor(
        keys=["f"], values=torch.tensor([1, 3]), lengths=torch.tensor([1, 1])
    )
    expected = rows.embedding_bags["t"].weight[torch.tensor([1, 3])]
    if not torch.equal(rows(features).values(), expected):
        raise RuntimeError("torchrec reads other rows than were asked for")
    # A jagged operator of fbgemm: absent when its library did not load.
    total = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2]))
    if total.tolist() != [0, 1, 3]:
        raise RuntimeError(f"fbgemm sums [1, 2] to {total.tolist()}")
    _say(**{"look-up": "right rows"})


if __name__ == "__main__":
    main()
