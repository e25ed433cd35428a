"""CTR models on injected embedding tables, each by the name that a recipe gives it."""

from __future__ import annotations

from embcomp.models.autoint import AutoInt, AutoIntConfig, AutoIntPlusConfig
from embcomp.models.base import ModelConfig, ModelInputs
from embcomp.models.dcnv2 import DCNv2, DCNv2Config
from embcomp.models.deepfm import DeepFM, DeepFMConfig
from embcomp.models.dlrm import DLRM, DLRMConfig
from embcomp.models.fibinet import FiBiNET, FiBiNETConfig
from embcomp.models.finalmlp import FinalMLP, FinalMLPConfig
from embcomp.models.fm import FM, FMConfig
from embcomp.models.gdcn import GDCN, GDCNConfig
from embcomp.models.lr import LR, LRConfig
from embcomp.models.masknet import MaskNet, MaskNetConfig
from embcomp.models.mmoe import MMoE
from embcomp.models.pnn import PNN, PNNConfig
from embcomp.models.task_losses import MultiTaskLoss
from embcomp.models.widedeep import WideDeep, WideDeepConfig
from embcomp.models.xdeepfm import XDeepFM, XDeepFMConfig

MODELS: dict[str, type[ModelConfig]] = {
    "autoint": AutoIntConfig,
    "autoint_plus": AutoIntPlusConfig,
    "dcnv2": DCNv2Config,
    "deepfm": DeepFMConfig,
    "dlrm": DLRMConfig,
    "fibinet": FiBiNETConfig,
    "finalmlp": FinalMLPConfig,
    "fm": FMConfig,
    "gdcn": GDCNConfig,
    "lr": LRConfig,
    "masknet": MaskNetConfig,
    "pnn": PNNConfig,
    "widedeep": WideDeepConfig,
    "xdeepfm": XDeepFMConfig,
}

__all__ = [
    "DLRM",
    "FM",
    "GDCN",
    "LR",
    "MODELS",
    "PNN",
    "AutoInt",
    "AutoIntConfig",
    "AutoIntPlusConfig",
    "DCNv2",
    "DCNv2Config",
    "DLRMConfig",
    "DeepFM",
    "DeepFMConfig",
    "FMConfig",
    "FiBiNET",
    "FiBiNETConfig",
    "FinalMLP",
    "FinalMLPConfig",
    "GDCNConfig",
    "LRConfig",
    "MMoE",
    "MaskNet",
    "MaskNetConfig",
    "ModelConfig",
    "ModelInputs",
    "MultiTaskLoss",
    "PNNConfig",
    "WideDeep",
    "WideDeepConfig",
    "XDeepFM",
    "XDeepFMConfig",
]
