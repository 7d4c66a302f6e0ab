"""The divergence of two distributions."""

from torch import Tensor


def kl_divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL(softmax(first) || softmax(second)) of logits (..., classes), along the last axis, in fp32: (...).

    Gradient flows through both.
    """
    first, second = first.float().log_softmax(dim=-1), second.float().log_softmax(dim=-1)
    return (first.exp() * (first - second)).sum(dim=-1)
