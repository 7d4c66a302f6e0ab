"""What a run starts from, checked before any long work: text, tokenizer, DeepSpeed's JSON, run folder."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dga_scale.backbone.loading import load_model_config
from dga_scale.config import TrainConfig
from dga_scale.corpus.batches import MaskingPolicy
from dga_scale.corpus.mixture import Mixture
from dga_scale.corpus.shards import VALIDATION, Corpus, check_matches
from dga_scale.corpus.tokenizer import load_tokenizer
from dga_scale.engine.cluster import Cluster
from dga_scale.engine.ds_config import ResolvedConfig, resolve_ds_config
from dga_scale.engine.ds_keys import load_ds_config
from dga_scale.engine.run_folder import RunFolder
from dga_scale.errors import UserError


@dataclass(frozen=True)
class Inputs:
    """All that a run needs besides the model's weights."""

    config: TrainConfig
    folder: RunFolder
    resolved: ResolvedConfig
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    mixture: Mixture
    """What is trained on: ``corpus``, and what is mixed into it."""
    evaluations: dict[str, Corpus]
    """"domain" and "general": held-out corpora, where there are such."""
    masking: MaskingPolicy | None
    """None for a causal model, which predicts every next token."""


def check_inputs(config: TrainConfig, cluster: Cluster) -> Inputs:
    """Open and check everything a user gave; every rank comes to the same answer or the same error.

    Raises:
        UserError: whatever can't be used, before any weights are read.
    """
    assert config.model.model is not None, "the entry point fills the demo's in"
    assert config.data.corpus is not None
    model_config = load_model_config(config.model.model)
    tokenizer = load_tokenizer(config.model.model)
    corpus = _open(config.data.corpus, "--corpus", tokenizer)
    raw = load_ds_config(config.run.ds_config or "")
    resolved = resolve_ds_config(
        raw,
        config,
        world_size=cluster.world_size,
        hidden_size=model_config.hidden_size,
        device=cluster.device,
    )
    config = resolved.config
    folder = RunFolder(Path(config.run.output_dir or default_output_dir(config)))
    folder.check(config)
    mixture = Mixture([corpus], [], config.run.seed)
    mixture.check_one_batch(resolved.global_batch_size)
    evaluations = {}
    held_out = config.data.eval_corpus or _held_out_part(corpus.path)
    if held_out:
        evaluations["domain"] = _open(held_out, "--eval_corpus", tokenizer)
    if config.data.general_eval_corpus:
        path = config.data.general_eval_corpus
        evaluations["general"] = _open(path, "--general_eval_corpus", tokenizer)
    return Inputs(
        config=config,
        folder=folder,
        resolved=resolved,
        tokenizer=tokenizer,
        corpus=corpus,
        mixture=mixture,
        evaluations=evaluations,
        masking=None if model_config.causal else _masking(config, corpus),
    )


def verify_corpora(inputs: Inputs, cluster: Cluster) -> None:
    """Compare the hashes of all shards, each rank those of its share.

    Raises:
        UserError: a shard that was changed.
    """
    for corpus in (inputs.corpus, *inputs.evaluations.values()):
        corpus.verify(cluster.rank, cluster.world_size)


def default_output_dir(config: TrainConfig) -> str:
    """``runs/METHOD-CORPUS``."""
    return f"runs/{config.method.method}-{Path(config.data.corpus or '').resolve().name}"


def _open(path: str, setting: str, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    try:
        corpus = Corpus.open(path)
        check_matches(corpus.manifest, tokenizer)
    except UserError as error:
        raise UserError(f"{setting} {error}") from None
    return corpus


def _held_out_part(corpus: Path) -> str | None:
    path = corpus / VALIDATION
    return str(path) if path.is_dir() else None


def _masking(config: TrainConfig, corpus: Corpus) -> MaskingPolicy:
    return MaskingPolicy.for_corpus(
        corpus,
        probability=config.data.mlm_probability,
        mask_replace_prob=config.data.mask_replace_prob,
        random_replace_prob=config.data.random_replace_prob,
    )
