"""Fine-tune a classifier (or regressor) on a pretrained trunk: one task, one seed, one process."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from dga_scale.backbone.anatomy import NO_LIMIT
from dga_scale.backbone.checks import check_finite, unloadable
from dga_scale.backbone.extended import ExtendedPreTrainedModel
from dga_scale.backbone.loading import check_vocabulary, load_model_config
from dga_scale.corpus.tokenizer import check_unknown, load_tokenizer, unknown_id
from dga_scale.endtasks.metrics import classification_scores, regression_scores
from dga_scale.endtasks.recipes import Recipe
from dga_scale.endtasks.tasks import Example, Task
from dga_scale.errors import UserError, note
from dga_scale.storage.hub import local_only

MAX_GRAD_NORM = 1.0

LENGTH_STEP = 32
"""The multiple of tokens to which a batch is padded: there are few shapes, and little padding is computed."""


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples as tensors on the device, all padded to one length."""

    input_ids: Tensor  # (N, T)
    attention_mask: Tensor  # (N, T)
    token_type_ids: Tensor | None  # (N, T), for models that distinguish first and second text
    labels: Tensor  # (N,) class numbers, or fp32 values of a regression
    lengths: Tensor  # (N,) real tokens; on the CPU

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """Return the model's inputs for the examples (B,) of a CPU index, cut after the longest of them."""
        width = -(-int(self.lengths[index].max()) // LENGTH_STEP) * LENGTH_STEP
        index = index.to(self.labels.device)
        named = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "token_type_ids": self.token_type_ids,
        }
        return {name: tensor[index, :width] for name, tensor in named.items() if tensor is not None}


def finetune(
    model: str,
    task: Task,
    recipe: Recipe,
    seed: int,
    *,
    device: torch.device | None = None,
    on_epoch: Callable[[int, float, float | None], None] = lambda epoch, loss, score: None,
) -> dict[str, Any]:
    """Fine-tune a model on a task and score it once.

    The seed determines the head's initial weights, the order of examples and dropout (the model's own). With
    a dev split the epoch with the best dev score is chosen, and training stops ``recipe.patience`` epochs
    after it; without one the last epoch is chosen. The test split is predicted once, with these weights.

    Args:
        model: The folder of a masked or causal LM or of a trunk, or its name on the hub.
        task: The end task.
        recipe: The settings of the fine-tuning.
        seed: Any whole number.
        device: The device to train on; None: the GPU where there is one.
        on_epoch: Called after each epoch with its number (from 1), mean training loss and score on dev.

    Returns:
        ``scores`` on the test split by name, its ``predictions`` in order, ``dev_scores`` of each epoch, the
        chosen ``epoch``, ``sequence_length`` in tokens, and ``seconds``.

    Raises:
        UserError: There is no model, or its weights lack the trunk or are not finite; the tokenizer can't
            write the task's text; the loss of an epoch is not finite.
    """
    started = time.perf_counter()
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # causal LMs; a classifier reads the last token before it
    classifier = load_classifier(model, task, tokenizer)
    torch.nn.Module.to(classifier, device)
    length = _length(tokenizer, task, recipe, classifier)
    train, dev, test = (
        encode(tokenizer, examples, task, recipe, length, device) if examples else None
        for examples in (task.train, task.dev, task.test)
    )
    assert train is not None
    assert test is not None
    real, unknown = train.attention_mask.bool(), train.input_ids == unknown_id(tokenizer)
    check_unknown(int((real & unknown).sum()), int(real.sum()), model, f"{task.path}/train.jsonl")
    steps = recipe.epochs * -(-len(train) // recipe.batch_size)
    matrices = [parameter for parameter in classifier.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in classifier.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW(
        # As in training, biases and norms do not decay.
        cast(Any, [{"params": matrices}, {"params": others, "weight_decay": 0.0}]),
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        fused=True,  # a quarter less of a small model's step on a CPU
    )
    warmup = recipe.warmup_ratio * steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (warmup + 1), (steps - step) / max(1.0, steps - warmup))
    )
    order = torch.Generator().manual_seed(seed)
    dev_scores: list[float] = []
    best: dict[str, Tensor] | None = None
    epoch, chosen = 0, recipe.epochs
    while epoch < recipe.epochs:
        epoch += 1
        loss = _train_epoch(classifier, train, recipe, optimizer, schedule, order)
        if not math.isfinite(loss):
            raise UserError(
                f"the loss of epoch {epoch} is {loss}: its fine-tuning has no score. Lower learning_rate in "
                f"the recipe ({recipe.learning_rate:g} here), or take precision fp32.",
                model,
            )
        if dev is not None:
            dev_scores.append(score(classifier, dev, task, recipe)[recipe.metric])
            if dev_scores[-1] > max(dev_scores[:-1], default=float("-inf")):
                chosen, best = epoch, _weights(classifier)
        on_epoch(epoch, loss, dev_scores[-1] if dev_scores else None)
        if dev is not None and epoch - chosen >= recipe.patience:
            break
    if best is not None:
        classifier.load_state_dict(best)
    predictions = predict(classifier, test, task, recipe)
    return {
        "scores": scores_of(predictions, test, task),
        "predictions": predictions,
        "dev_scores": dev_scores,
        "epoch": chosen,
        "sequence_length": length,
        "seconds": round(time.perf_counter() - started, 2),
    }


def load_classifier(model: str, task: Task, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load a trunk under a new head for the task.

    Raises:
        UserError: There is no model, transformers has no classifier of its kind, or its weights are
            pickled, damaged or lack the trunk.
    """
    found = load_model_config(model, any_architecture=True)  # refuses a folder without a model, too
    check_vocabulary(found, tokenizer)
    kind = found.config.model_type
    if type(found.config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(f"transformers has no sequence classifier of {kind} models. Give another.", model)
    end = getattr(found.config, "eos_token_id", None)
    if found.config.is_encoder_decoder and tokenizer("a").input_ids[-1:] != [end]:
        raise UserError(
            f"a classifier of {kind} models reads the state of the token that ends a text, {end}, and the "
            "tokenizer puts none there. Give the model with its own tokenizer.",
            model,
        )
    labels = {"num_labels": 1} if task.regression else {"id2label": dict(enumerate(task.labels))}
    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # transformers would warn that the head is new, as it has to be
    logging.disable_progress_bar()
    try:
        loaded = AutoModelForSequenceClassification.from_pretrained(
            model,
            **labels,
            dtype=torch.float32,
            trust_remote_code=False,
            local_files_only=local_only(model),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # a head of other classes; the trunk's are refused below
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"the weights can't be read: {reason}. The folder needs safetensors files, as a run's model/ "
            "has them.",
            model,
        ) from None
    except Exception as error:  # whatever a class of transformers says to a config that it can't be built of
        raise unloadable(model, error) from error
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()
    classifier, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    trunk = {id(parameter) for parameter in classifier.base_model.parameters()}
    other = {name: shape for name, *shape in info["mismatched_keys"]}
    missing = set(info["missing_keys"]) | other.keys()
    absent = [
        name
        for name, parameter in classifier.named_parameters()
        if id(parameter) in trunk and name in missing and "pooler" not in name  # an LM has no pooler
    ]
    if absent:
        raise UserError(
            f"the weights lack {len(absent)} parameters of the trunk, {absent[0]} first. Give a whole "
            "pretrained model, such as a run's model/.",
            model,
        )
    if other:
        name, (stored, expected) = min(other.items())
        note(
            f"{model} has a head of its own, {name} of {tuple(stored)} where the task needs "
            f"{tuple(expected)}: a new head is trained in its place"
        )
    check_finite(classifier, model)
    classifier.config.pad_token_id = tokenizer.pad_token_id
    return classifier


def encode(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    task: Task,
    recipe: Recipe,
    length: int,
    device: torch.device,
) -> Encoded:
    """Tokenise examples, cut (the longer text first) and padded on the right to ``length`` tokens."""
    tokenizer.padding_side = "right"
    found = tokenizer(
        *_texts(examples, recipe),
        truncation="longest_first",
        max_length=length,
        padding="max_length",
        return_tensors="pt",
    )
    if task.regression:
        labels = torch.tensor([float(example.label) for example in examples])
    else:
        number = {label: n for n, label in enumerate(task.labels)}
        labels = torch.tensor([number[str(example.label)] for example in examples])
    types = found.get("token_type_ids")
    return Encoded(
        input_ids=found["input_ids"].to(device),
        attention_mask=found["attention_mask"].to(device),
        token_type_ids=None if types is None else types.to(device),
        labels=labels.to(device),
        lengths=found["attention_mask"].sum(dim=1),
    )


def score(classifier: PreTrainedModel, data: Encoded, task: Task, recipe: Recipe) -> dict[str, float]:
    """Predict all examples, and return the scores by name."""
    return scores_of(predict(classifier, data, task, recipe), data, task)


def scores_of(predictions: Sequence[Any], data: Encoded, task: Task) -> dict[str, float]:
    """Compare predictions with the labels, and return the scores by name."""
    if task.regression:
        return regression_scores(data.labels.tolist(), predictions)
    return classification_scores([task.labels[number] for number in data.labels.tolist()], predictions)


@torch.no_grad()
def predict(classifier: PreTrainedModel, data: Encoded, task: Task, recipe: Recipe) -> list[Any]:
    """Predict all examples in eval mode: the class of each, or the number of a regression."""
    classifier.eval()
    by_length = data.lengths.argsort(stable=True)
    sorted_logits = []
    for index, weights in _batches(by_length, 4 * recipe.batch_size):
        sorted_logits.append(_logits(classifier, data, index, recipe)[: int(weights.sum())])  # (B, labels)
    logits = torch.cat(sorted_logits).cpu()[by_length.argsort()]  # (N, labels)
    if task.regression:
        numbers: list[float] = logits.squeeze(-1).tolist()
        return numbers
    return [task.labels[number] for number in logits.argmax(dim=-1).tolist()]


def _train_epoch(
    classifier: PreTrainedModel,
    data: Encoded,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    order: torch.Generator,
) -> float:
    classifier.train()
    total = torch.zeros((), device=data.labels.device)
    for index, weights in _batches(torch.randperm(len(data), generator=order), recipe.batch_size):
        logits = _logits(classifier, data, index, recipe)  # (B, labels)
        labels, weights = data.labels[index.to(logits.device)], weights.to(logits.device)
        if labels.is_floating_point():
            losses = F.mse_loss(logits.squeeze(-1), labels, reduction="none")
        else:
            losses = F.cross_entropy(logits, labels, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(classifier.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        total += (losses.detach() * weights).sum()
    return float(total) / len(data)


def _logits(classifier: PreTrainedModel, data: Encoded, index: Tensor, recipe: Recipe) -> Tensor:
    """Compute the logits (B, labels) in fp32 of the examples of an index (B,)."""
    with torch.autocast(data.labels.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        logits: Tensor = classifier(**data.rows(index)).logits
    return logits.float()


def _batches(order: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield index (size,) and weights (size,) of each batch; the last one has padding rows of weight 0."""
    for index in order.split(size):
        padding = size - len(index)
        weights = (torch.arange(size) < len(index)).float()
        yield torch.cat([index, index.new_zeros(padding)]), weights


def _texts(examples: Sequence[Example], recipe: Recipe) -> tuple[list[str], ...]:
    texts = [example.text for example in examples]
    pairs = [example.text_pair for example in examples if example.text_pair is not None]
    if not pairs:
        return (texts,)
    return (pairs, texts) if recipe.pair_first else (texts, pairs)


def _length(
    tokenizer: PreTrainedTokenizerBase, task: Task, recipe: Recipe, classifier: PreTrainedModel
) -> int:
    """Return the length in tokens to pad to: the longest example's, limited by the recipe and the model."""
    examples = (*task.train, *task.dev, *task.test)
    longest = max(map(len, tokenizer(*_texts(examples, recipe), verbose=False)["input_ids"]))
    return min(-(-longest // 8) * 8, recipe.max_length, _positions(classifier))


def _positions(classifier: PreTrainedModel) -> int:
    if isinstance(classifier, ExtendedPreTrainedModel):
        return classifier.anatomy.max_positions
    positions = getattr(classifier.config, "max_position_embeddings", None) or 0
    if positions < 1:  # relative positions alone: BLOOM, T5, XLNet
        return NO_LIMIT
    # RoBERTa and its like count positions from behind that of padding.
    tables = (part for name, part in classifier.named_modules() if name.endswith("position_embeddings"))
    unused = [part.padding_idx for part in tables if isinstance(part, torch.nn.Embedding)]
    return positions - max((index + 1 for index in unused if index is not None), default=0)


def _weights(classifier: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in classifier.state_dict().items()}
