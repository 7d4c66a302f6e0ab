"""A run planned before it is paid for: memory, traffic and time on paper; no weights, no process group."""
