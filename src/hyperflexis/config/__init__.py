"""The fleet file, read by the command line only; everything else is given values."""

from .fleet import (
    ENGINE_ARGS,
    EmulatedArgs,
    Engine,
    Fleet,
    Model,
    OpenAIArgs,
    Section,
    TorchArgs,
    VllmArgs,
    read_api_keys,
    read_fleet,
)

__all__ = [
    "ENGINE_ARGS",
    "EmulatedArgs",
    "Engine",
    "Fleet",
    "Model",
    "OpenAIArgs",
    "Section",
    "TorchArgs",
    "VllmArgs",
    "read_api_keys",
    "read_fleet",
]
