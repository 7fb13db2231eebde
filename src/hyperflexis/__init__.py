"""HyperFlexis: many LLM tasks, each request with its own latency promise, on the fewest accelerators."""

__version__ = "0.1.0"
