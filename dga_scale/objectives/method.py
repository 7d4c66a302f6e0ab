"""The interface of a method; the training model and the trainer do the rest.

A method is two files of one name: its settings in ``config.methods`` (a subclass of ``MethodSettings`` that
says what it is called) and a subclass of ``Method`` in ``objectives.methods``. The registries find them.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dga_scale.backbone.anatomy import Anatomy
from dga_scale.backbone.flops import ModelFlops
from dga_scale.config.settings import MethodSettings, TrainConfig
from dga_scale.corpus.loading.batches import Batch, Counts, StepShape
from dga_scale.objectives.contrast import Contrast
from dga_scale.objectives.views import View
from dga_scale.preservation.weight_regularisation import WeightRegularisation

S = TypeVar("S", bound=MethodSettings)
"""The type of a method's own settings."""

LM_VIEW = View("mlm", masked=True)
"""The view whose masked positions the LM loss is taken on; every method has it."""


class Term(NamedTuple):
    """A term added to the LM loss: a scalar that is a mean over this rank's examples, and its weight."""

    value: Tensor
    weight: float


@dataclass(frozen=True)
class ForwardOutput:
    """The forward output of one micro-batch of B examples with T tokens.

    Attributes:
        inputs: The micro-batch.
        counts: The counts of the global batch that it is a part of. A sum over the micro-batch's labels,
            times ``num_micro_batches / num_labels``, has the mean over the global batch's labels as its mean
            over the global batch's micro-batches.
        hidden: The last hidden states (B, T, H), by name of view.
        embeddings: The trunk's embedding output (B, T, H), by name of the views that asked for it.
        trunk: The trained model without its LM head, for a forward pass of the method's own.
        lm_logits: The logits that the LM loss is taken on, (N, V) at the batch's positions (N,).
        teacher: A function that returns the last hidden states (B, T, H) of the frozen starting model in eval
            mode, on the masked (True) or the clean text (False); on some rows only where a second argument
            gives their indices. No gradient. Under ZeRO-3 every rank has to call it, on a row at least.
        teacher_logits: A function that returns the frozen model's logits, (N, V) at positions (N,) in the
            flattened hidden states (B, T, H).

    """

    inputs: Batch
    counts: Counts
    hidden: Mapping[str, Tensor]
    embeddings: Mapping[str, Tensor]
    trunk: Any
    lm_logits: Tensor
    teacher: Callable[..., Tensor]
    teacher_logits: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MethodContext:
    """The context that a method's ``prepare`` gets before training starts, on every rank alike.

    Attributes:
        lm, anatomy: The model and its anatomy, with fp32 weights on the CPU, and whole if the method
            ``needs_whole_model``.
        config: All settings.
        folder: The run's folder; files written there by ``run_on_first`` are there when the run is resumed.
        resuming: Whether the run resumes from a checkpoint, which is loaded after this.
        device: The device that the model will be trained on.
        sample: A function that returns this rank's batches of a fixed sample of so many rows of the training
            text; with a mix, of all its corpora in their shares.
        sum: A function that sums a tensor over ranks.
        all_gather_object: A function that returns one entry a rank, in their order; for small objects.
        run_on_first: A function that runs another on rank 0 and gives its result, or its error, to all.
        print: A function that prints one line, on rank 0.

    """

    lm: PreTrainedModel
    anatomy: Anatomy
    config: TrainConfig
    folder: Path
    resuming: bool
    device: torch.device
    sample: Callable[[int], Iterator[Batch]]
    sum: Callable[[Tensor], Tensor]
    all_gather_object: Callable[[Any], list[Any]]
    run_on_first: Callable[[Callable[[], Any]], Any]
    print: Callable[[str], None]


def teacher_flops(model: ModelFlops, step: StepShape) -> float:
    """Count the FLOPs of the teacher's forward pass of the trunk on all rows of a step."""
    return sum(model.forward.trunk(rows.taken, length) for length, rows in step.rows_by_length.items())


class Method(Generic[S], nn.Module):
    """An objective: the LM loss, and the terms that it adds on the views it asks for.

    A method is a module of the training model: parameters of its own are trained, saved and resumed with the
    model's, and left out of the exported model.
    """

    Settings: ClassVar[type[MethodSettings]]
    """The class S, which names the method."""

    needs_teacher: ClassVar[bool] = False
    """Whether the method uses ``ForwardOutput.teacher``: a frozen copy of the starting model is kept."""
    needs_whole_model: ClassVar[bool] = False
    """Whether ``prepare`` runs the model: ZeRO-3 then partitions it over the ranks only afterwards."""
    measures_after: ClassVar[bool] = False
    """Whether the units' importance for the domain (by its LM loss) is measured and saved after training."""
    needs_mix: ClassVar[bool] = False
    """Whether ``--mix`` has to be given."""
    compares_vocabulary: ClassVar[bool] = False
    """Whether the distribution over the vocabulary is compared with the teacher's; for planning."""

    def __init__(self, settings: S) -> None:
        super().__init__()
        self.settings = settings

    @property
    def name(self) -> str:
        """The name that ``--method`` takes."""
        return self.settings.name

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of unit whose importance is measured and protected; none: no gates and no masks.

        A method with kinds has settings that derive from ``ProtectionSettings``; from
        ``PriorImportanceSettings``, where importances of earlier domains protect it.
        """
        return ()

    def check(self, config: TrainConfig, causal: bool) -> None:
        """Refuse settings that don't go together, before any long work.

        Raises:
            UserError: Settings don't go together; the message says which, why, and what to do.

        """

    def prepare(self, context: MethodContext) -> PreTrainedModel | None:
        """Change the model before the engine is built: add modules, freeze parameters (``requires_grad_``).

        Torch's generator is at the same state on all ranks, and depends on the run's seed alone.

        Returns:
            Another model to train in its place, or None.

        """
        return None

    def views(self) -> tuple[View, ...]:
        """Return the views of each batch; ``LM_VIEW`` is one of them. By default, it and the contrast's.

        The training model asks once, when it is built: after ``prepare``.
        """
        contrast = self.contrast()
        contrasted = contrast.views if contrast else ()
        return LM_VIEW, *(view for view in contrasted if view != LM_VIEW)

    def contrast(self) -> Contrast | None:
        """Return the contrast of examples that is added to the LM loss; None: there is none.

        The training model asks once, when it is built: after ``prepare``.
        """
        return None

    def token_weights(self, labels_per_source: Sequence[int]) -> tuple[float, ...]:
        """Return the weight in the LM loss of one label of each source; by default all labels count alike.

        Args:
            labels_per_source: The number of labels of the global batch, by source.

        """
        return tuple(1 / sum(labels_per_source) for _ in labels_per_source)

    def weight_regularisation(self) -> WeightRegularisation | None:
        """Return the weight regularisation towards the starting weights; None: there is none."""
        return None

    def idle_parameters(self) -> Collection[str]:
        """Return the names of parameters that the coming optimizer step leaves as they are, moments too.

        It is asked right before each step, and has to answer alike on all ranks. By default there are none.
        """
        return ()

    def figures(self) -> dict[str, dict[str, list[float]]]:
        """Return figures of the steps since the last call, by what they are about and by name.

        It is asked every ``--protection_steps``, on every rank; each entry is logged as an event of the
        method's name. By default there are none.
        """
        return {}

    def terms(self, output: ForwardOutput) -> dict[str, Term]:
        """Return the terms added to the LM loss beside the contrast, by the names they are logged under."""
        return {}

    def term_flops(self, model: ModelFlops, step: StepShape) -> float:
        """Count the model FLOPs, over all ranks, of what the method computes beside views and contrast.

        These are the matrix products of ``terms``, a teacher's forward passes among them, and of modules that
        ``backbone.flops`` does not know; asked for after ``prepare``. See ``objectives.flops``.
        """
        return 0.0
