"""CTR models on injected embedding tables, each by the name that a recipe gives it."""

from __future__ import annotations

from embcomp.models.autoint import AutoInt, AutoIntConfig, AutoIntPlusConfig
from embcomp.models.base import ModelConfig, ModelInputs
from embcomp.models.dcnv2 import DCNv2, DCNv2Config
from embcomp.models.deepfm import DeepFM, DeepFMConfig
from embcomp.models.dlrm import DLRM, DLRMConfig
from embcomp.models.fm import FM, FMConfig
from embcomp.models.lr import LR, LRConfig
from embcomp.models.widedeep import WideDeep, WideDeepConfig

MODELS: dict[str, type[ModelConfig]] = {
    "autoint": AutoIntConfig,
    "autoint_plus": AutoIntPlusConfig,
    "dcnv2": DCNv2Config,
    "deepfm": DeepFMConfig,
    "dlrm": DLRMConfig,
    "fm": FMConfig,
    "lr": LRConfig,
    "widedeep": WideDeepConfig,
}

__all__ = [
    "DLRM",
    "FM",
    "LR",
    "MODELS",
    "AutoInt",
    "AutoIntConfig",
    "AutoIntPlusConfig",
    "DCNv2",
    "DCNv2Config",
    "DLRMConfig",
    "DeepFM",
    "DeepFMConfig",
    "FMConfig",
    "LRConfig",
    "ModelConfig",
    "ModelInputs",
    "WideDeep",
    "WideDeepConfig",
]
