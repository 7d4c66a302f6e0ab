"""Nonsense in every setting, every key and every field of a file: one line and exit code 2, never more."""
