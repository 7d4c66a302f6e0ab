"""The inputs of a run, checked before any long work: text, tokenizer, DeepSpeed's JSON, run folder."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dga_scale.backbone.loading import load_model_config
from dga_scale.config.methods.shared import GeneralTextSettings, prior_importance_of
from dga_scale.config.settings import TrainConfig
from dga_scale.corpus.loading.masking import MaskingPolicy
from dga_scale.corpus.loading.mixture import Mixture, parse_mix
from dga_scale.corpus.shards import VALIDATION, Corpus, open_corpus
from dga_scale.corpus.tokenizer import load_tokenizer
from dga_scale.errors import UserError
from dga_scale.launch.determinism import check_attention
from dga_scale.launch.world import Cluster
from dga_scale.logging.evaluations import Texts
from dga_scale.logging.loggers import check_loggers
from dga_scale.objectives.methods import build_method
from dga_scale.preservation.importance import Importance
from dga_scale.run_folder import RunFolder
from dga_scale.train.schedule import may_extend
from dga_scale.zero.ds_config import ResolvedConfig, resolve_ds_config
from dga_scale.zero.ds_keys import load_ds_config
from dga_scale.zero.optimizers import optimizer_kind


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run besides the model's weights."""

    config: TrainConfig
    folder: RunFolder
    resolved: ResolvedConfig
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    mixture: Mixture
    """What is trained on: ``corpus``, and what is mixed into it."""
    general: Corpus | None
    """General text that the method reads besides, where it asks for some (``--general_corpus``)."""
    evaluations: dict[str, Corpus]
    """"domain", "general", and those of ``--also_evaluate``: held-out corpora, where there are such."""
    masking: MaskingPolicy | None
    """None for a causal model, which predicts every next token."""

    @property
    def source_names(self) -> tuple[str, ...]:
        """The names that the mixture's losses are logged under: "domain", then those of the folders."""
        names = ["domain"]
        for number, corpus in enumerate(self.mixture.corpora[1:], 1):
            name = corpus.path.name
            names.append(f"{name}-{number}" if name in names else name)
        return tuple(names)

    def corpora(self) -> list[Corpus]:
        """The corpora that are used, for training or for evaluation."""
        general = [self.general] if self.general else []
        return [*self.mixture.corpora, *general, *self.evaluations.values()]

    @property
    def evaluated_texts(self) -> Texts:
        """The text that an evaluation scores, of each held-out corpus."""
        most = self.config.data.max_eval_samples
        return {
            name: {"content_hash": corpus.content_hash, "rows": min(most, len(corpus))}
            for name, corpus in self.evaluations.items()
        }

    @property
    def content_hash(self) -> str:
        """The hash of all training text; a run does not resume from a checkpoint of other text."""
        hashes = [self.mixture.content_hash, *([self.general.content_hash] if self.general else [])]
        return hashes[0] if len(hashes) == 1 else sha256("".join(hashes).encode()).hexdigest()


def check_inputs(config: TrainConfig, cluster: Cluster) -> Inputs:
    """Open and check everything a user gave; every rank comes to the same answer or the same error.

    Raises:
        UserError: Whatever can't be used, before any weights are read.
    """
    assert config.model.model is not None, "the entry point fills the demo's in"
    assert config.data.corpus is not None
    optimizer_kind(config.optimization.optimizer)
    check_loggers(config.run.loggers or ())
    if config.run.deterministic:
        check_attention(config.model.attn_implementation)
    (path,) = config.data.corpus  # of several, train_sequence makes a run each
    model_config = load_model_config(config.model.model)
    tokenizer = load_tokenizer(config.model.model)
    method = build_method(config)
    if method.needs_mix and not config.data.mix:
        raise UserError(
            f"--method {config.method_name} reads general text beside the domain's: give it as "
            "--mix FOLDER:SHARE, for example --mix corpora/general:0.05"
        )
    method.check(config, model_config.causal)
    for prior in prior_importance_of(config.method):
        Importance.load(prior, method.kinds)
    corpus = open_corpus(path, tokenizer)
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
    folder.check(config, allowed=may_extend)
    mixture = _mixture(config, corpus, tokenizer)
    mixture.check_one_batch(resolved.global_batch_size)
    general = config.method.general_corpus if isinstance(config.method, GeneralTextSettings) else None
    return Inputs(
        config=config,
        folder=folder,
        resolved=resolved,
        tokenizer=tokenizer,
        corpus=corpus,
        mixture=mixture,
        general=open_corpus(general, tokenizer) if general else None,
        evaluations=_evaluations(config, corpus, tokenizer),
        masking=None if model_config.causal else _masking(config, corpus),
    )


def verify_corpora(inputs: Inputs, cluster: Cluster) -> None:
    """Compare the hashes of all shards, each rank those of its share.

    Raises:
        UserError: A shard that was changed.
    """
    for corpus in inputs.corpora():
        corpus.verify(cluster.rank, cluster.world_size)


def default_output_dir(config: TrainConfig) -> str:
    """Return ``runs/METHOD-CORPUS``, with the names of all corpora of a sequence."""
    names = [Path(path).resolve().name for path in config.data.corpus or ()]
    return f"runs/{config.method_name}-{'-'.join(names)}"


def makes_several_runs(config: TrainConfig) -> bool:
    """Return whether the output folder holds several runs: a sequence of domains, or a dense warm-up."""
    return len(config.data.corpus or []) > 1 or config.method.dense_warmup_steps > 0


def _mixture(config: TrainConfig, corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> Mixture:
    specs = [parse_mix(spec) for spec in config.data.mix or ()]
    others = [open_corpus(path, tokenizer) for path, _ in specs]
    return Mixture([corpus, *others], [share for _, share in specs], config.run.seed)


def _evaluations(
    config: TrainConfig, corpus: Corpus, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Corpus]:
    found = {}
    held_out = config.data.eval_corpus or held_out_part(corpus.path)
    if (
        not held_out
        and corpus.manifest.settings.get("validation_share")
        and corpus.manifest.split != VALIDATION
    ):
        raise UserError(
            f"its held-out part is gone: {VALIDATION}/. Copy it again, shard the text again, or give "
            "--eval_corpus",
            corpus.path,
        )
    if held_out:
        found["domain"] = open_corpus(held_out, tokenizer)
    if config.data.general_eval_corpus:
        found["general"] = open_corpus(config.data.general_eval_corpus, tokenizer)
    for spec in config.data.also_evaluate or ():
        name, equals, path = spec.partition("=")
        if not (name and equals and path) or name in found:
            raise UserError(
                f"--also_evaluate {spec}: write NAME=FOLDER, each name once (not {', '.join(found)})."
            )
        found[name] = open_corpus(path, tokenizer)
    return found


def held_out_part(corpus: Path) -> str | None:
    """Return the validation part that sharding left beside a corpus, if any."""
    path = corpus / VALIDATION
    return str(path) if path.is_dir() else None


def _masking(config: TrainConfig, corpus: Corpus) -> MaskingPolicy:
    return MaskingPolicy.for_corpus(
        corpus,
        probability=config.data.mlm_probability,
        mask_replace_prob=config.data.mask_replace_prob,
        random_replace_prob=config.data.random_replace_prob,
    )
