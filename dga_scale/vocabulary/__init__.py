"""Terms of a domain as tokens of their own, with rows in a model's embeddings."""
