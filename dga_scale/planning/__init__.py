"""Plan a run before it is paid for: memory, traffic and time on paper, without weights or process group."""
