"""The papers' comparisons of methods, on several domains and in a sequence of them, at any scale."""
