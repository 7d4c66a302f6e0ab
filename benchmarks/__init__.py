"""Measurements of what is claimed: speed, memory, faults, plans; RESULTS.md keeps what they gave.

``python -m benchmarks.NAME --help``; each prints a section with its command and machine and keeps it in
runs/benchmarks/sections.md. ``benchmarks.experiments`` ask what methods do to a model, not what the code
costs.
"""
