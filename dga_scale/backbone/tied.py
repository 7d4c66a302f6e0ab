"""Tied weights: one tensor of a model under several names."""

from torch import nn


def tied_names(model: nn.Module) -> list[list[str]]:
    """List all names of each tensor of the state dict, in the model's order; tied weights have several."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())
