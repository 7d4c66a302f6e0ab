"""CSE: the LM loss on a model whose last layers have sparse experts (Dong et al., NeurIPS 2024)."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dga_scale.backbone.extended import ExtendedPreTrainedModel, Settings, extend
from dga_scale.backbone.flops import ModelFlops
from dga_scale.config.methods.cse import CSESettings
from dga_scale.config.settings import TrainConfig
from dga_scale.corpus.loading.batches import StepShape
from dga_scale.errors import UserError
from dga_scale.experts.clustering import Clusters, NoClusters, find_clusters
from dga_scale.experts.extension import (
    EXPERTS,
    ExpertSettings,
    Sample,
    SublayerId,
    add_experts,
    collect_features,
    settings_of,
    sparse_sublayers,
    sublayer_ids,
    update_centres_every,
)
from dga_scale.experts.usage import ExpertUsage
from dga_scale.objectives.method import Method, MethodContext
from dga_scale.run_folder import RunFolder
from dga_scale.storage.atomic import replace_file
from dga_scale.storage.checked_json import checked, load_object, with_checksum
from dga_scale.storage.typed_json import build


class CSE(Method[CSESettings]):
    """The LM loss, on experts that are copies of the dense sublayers, one for each cluster of the text.

    A sample of the text is clustered when the run starts, masked as in training; a resumed run rebuilds the
    same experts from ``experts.json``, and its checkpoint has their weights and centres. A model that has
    experts already is trained on with those. The exported model loads through the Auto classes once
    ``dga_scale.backbone.extended`` is imported.
    """

    Settings = CSESettings
    needs_whole_model = True

    def check(self, config: TrainConfig, causal: bool) -> None:
        try:
            import sklearn  # noqa: F401
        except ImportError:
            raise UserError(
                "--method cse clusters text with scikit-learn, which is not installed: "
                'pip install "scikit-learn>=1.5,<2"'
            ) from None

    def prepare(self, context: MethodContext) -> PreTrainedModel:
        model = self._with_experts(context)
        # The accumulation steps of a step: the settings were completed before this.
        update_centres_every(model, context.config.optimization.gradient_accumulation_steps or 1)
        self.projections = [sparse.router.projection.numel() for sparse in sparse_sublayers(model).values()]
        self._usage = ExpertUsage(model, context.print)
        return model

    def term_flops(self, model: ModelFlops, step: StepShape) -> float:
        return 2.0 * step.rows * sum(self.projections)  # each sequence is projected, to choose its experts

    def idle_parameters(self) -> Collection[str]:
        return self._usage.idle_parameters()

    def figures(self) -> dict[str, dict[str, list[float]]]:
        return self._usage.figures()

    def _with_experts(self, context: MethodContext) -> ExtendedPreTrainedModel:
        if isinstance(context.lm, ExtendedPreTrainedModel) and context.lm.config.extension == EXPERTS:
            context.print("the model has experts already: they are trained on as they are")
            return context.lm
        path = RunFolder(context.folder).experts
        if context.resuming:
            structure, centres = context.run_on_first(lambda: _read(path))
            model = extend(context.lm, EXPERTS, structure)
            for sublayer, own in zip(sparse_sublayers(model).values(), centres, strict=True):
                sublayer.router.centres.copy_(torch.tensor(own))  # the checkpoint has where they are now
            return model
        samples = self._samples(context)
        clusters, left_dense = context.run_on_first(lambda: self._clusters(samples))
        for reason in left_dense:
            context.print(f"left without experts: {reason}")
        for sublayer, found in clusters.items():
            context.print(
                f"{sublayer}: {len(found.centres)} experts for clusters of {found.sizes} sequences, "
                f"{found.noise} of them noise (eps {found.eps:.4g}, min_samples {found.min_samples})"
            )
        structure = settings_of(clusters, alpha=self.settings.cse_alpha, width=self.settings.cse_projection)
        if not context.config.run.dry_run:
            context.run_on_first(lambda: _write(path, structure, clusters))
        return add_experts(context.lm, clusters, samples, alpha=self.settings.cse_alpha)

    def _samples(self, context: MethodContext) -> dict[SublayerId, Sample]:
        """Collect the sample's features on all ranks; every rank gets those of all."""
        settings = self.settings
        sublayers = sublayer_ids(context.anatomy, settings.cse_layers, settings.cse_experts)
        context.print(f"clustering {settings.cse_samples} rows of text for {len(sublayers)} sublayers")

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for inputs in context.sample(settings.cse_samples):
                yield inputs.masked_ids, inputs.attention_mask

        context.lm.to(context.device)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
        own = collect_features(
            context.lm,
            context.anatomy,
            sublayers,
            batches(),
            width=settings.cse_projection,
            seed=context.config.run.seed,
        )
        parts = context.all_gather_object(
            {sublayer: sample.features.numpy() for sublayer, sample in own.items()}
        )
        return {
            sublayer: Sample(
                torch.cat([torch.from_numpy(part[sublayer]) for part in parts]), sample.projection
            )
            for sublayer, sample in own.items()
        }

    def _clusters(self, samples: dict[SublayerId, Sample]) -> tuple[dict[SublayerId, Clusters], list[str]]:
        """Find each sublayer's clusters; a sublayer where the text is in one piece stays dense, and says why.

        Raises:
            NoClusters: The text is in one piece everywhere.

        """
        tried = {sublayer: self._clusters_at(sublayer, sample) for sublayer, sample in samples.items()}
        found = {sublayer: clusters for sublayer, clusters in tried.items() if isinstance(clusters, Clusters)}
        refused = [error for error in tried.values() if isinstance(error, NoClusters)]
        if not found:
            raise refused[0]
        return found, [str(error) for error in refused]

    def _clusters_at(self, sublayer: SublayerId, sample: Sample) -> Clusters | NoClusters:
        settings, points = self.settings, sample.features.numpy()
        what = f"the training text at {sublayer}"
        try:
            return find_clusters(points, settings.cse_eps, settings.cse_min_samples, what=what)
        except NoClusters as error:
            return error


def _read(path: Path) -> tuple[Settings, list[list[list[float]]]]:
    """Read the experts' structure, and each sublayer's centres (experts, d') as they were found."""
    try:
        content = checked(load_object(path))
        structure: Settings = content["settings"]
        build(ExpertSettings, structure, "settings")
        centres = [found["centres"] for found in content["clusters"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}, which says what experts the run has, can't be read ({error}): restore it, or start "
            "anew in another --output_dir"
        ) from error
    return structure, centres


def _write(path: Path, structure: Settings, clusters: dict[SublayerId, Clusters]) -> None:
    """Write the experts' structure, and the clusters they were made of, to a file that appears whole."""
    found: list[dict[str, Any]] = [
        {
            "sublayer": str(sublayer),
            "sizes": each.sizes,
            "radii": each.radii.tolist(),
            "centres": each.centres.tolist(),
            "noise": each.noise,
            "eps": each.eps,
            "min_samples": each.min_samples,
        }
        for sublayer, each in clusters.items()
    ]
    text = json.dumps(with_checksum({"settings": structure, "clusters": found}), indent=2) + "\n"
    replace_file(path, text.encode())
