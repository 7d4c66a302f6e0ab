"""MLM + InfoWord: a sentence with gaps is contrasted with the words that fill them, its own and others'."""

import torch
from torch import Tensor

from dga_scale.config.methods.infoword import InfoWordSettings
from dga_scale.config.settings import TrainConfig
from dga_scale.corpus.loading.batches import Batch
from dga_scale.corpus.loading.masking import IGNORED
from dga_scale.errors import UserError
from dga_scale.objectives.contrast import Contrast, Side
from dga_scale.objectives.method import LM_VIEW, Method
from dga_scale.objectives.views import View, mean_pool


class InfoWord(Method[InfoWordSettings]):
    """The LM loss, and InfoNCE between the masked sentence and the words masked in it.

    The anchor is the pooled state of the masked text, its positive the mean state that the masked words have
    in the clean text; negatives are the words of all other sentences, of all ranks (arXiv 1910.08350).
    """

    Settings = InfoWordSettings

    def check(self, config: TrainConfig, causal: bool) -> None:
        if causal:
            raise UserError(
                "--method infoword contrasts a masked sentence with its masked words, and a causal LM masks "
                "nothing: choose another method (simcse contrasts whole sentences)"
            )

    def contrast(self) -> Contrast:
        return Contrast(
            name="infoword",
            weight=self.settings.infoword_weight,
            temperature=self.settings.infoword_temperature,
            scope=self.settings.contrast_scope,
            sides=[Side(LM_VIEW), Side(View("clean"), pool_masked_words)],
        )


def pool_masked_words(hidden: Tensor, inputs: Batch) -> Tensor:
    """Return the mean of hidden states (B, T, H) over each example's masked positions: (B, H) in fp32.

    An example in which nothing is masked (text of unknown tokens only) is pooled whole.
    """
    mask = inputs.attention_mask
    masked = (
        torch.zeros_like(mask)
        .flatten()
        .scatter_add(0, inputs.positions, (inputs.labels != IGNORED).long())
        .view_as(mask)
    )  # (B, T)
    whole = masked.sum(dim=1, keepdim=True) == 0
    return mean_pool(hidden, torch.where(whole, inputs.attention_mask, masked))
