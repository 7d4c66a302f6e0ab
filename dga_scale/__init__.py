"""Domain-adaptive pre-training of language models that keeps their general knowledge, at cluster scale."""

__version__ = "0.1.0"
