"""The client side: OpenAI API in, tokens out."""

from .config import GatewayConfig
from .server import serve

__all__ = ["GatewayConfig", "serve"]
