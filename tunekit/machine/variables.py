"""The environment variables that every command sets if the user has not. This module imports no torch, because they
must be set before."""

import os

from tunekit.machine.malloc import CACHED_KERNELS

ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic matrix products; read when CUDA starts
    "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),  # the older name
    **dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), str(CACHED_KERNELS)),
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYDANTIC_DISABLE_PLUGINS": "1",  # the search for plugins takes longer than reading a recipe
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # its warnings about a lost rank have twenty lines of C++ frames each
}
