"""The command ``dga-consistency``: gradient consistency of corpora, as a figure and a JSON file."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dga_scale.config.arguments import Parser
from dga_scale.errors import UserError, run_main
from dga_scale.logging.quiet import quiet_libraries

if TYPE_CHECKING:
    from torch import Tensor

    from dga_scale.backbone.loading import LoadedModel
    from dga_scale.corpus.loading.batches import Batch
    from dga_scale.corpus.shards import Corpus


def consistency_command() -> NoReturn:
    """Run ``dga-consistency``."""
    run_main(main)


def build_parser() -> Parser:
    """Build the parser of all options."""
    parser = Parser(
        prog="dga-consistency",
        description="How consistent the gradients of each corpus are with those of all together, for one "
        "block: text near 0 or below is a long tail that the block does not learn along with the rest.",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="folder or hub name of the model")
    add("--corpus", required=True, nargs="+", metavar="DIR", help="sharded corpora, one or several")
    add("--layer", type=int, default=-1, help="block whose gradients are compared; default: -1, the last")
    add("--rows", type=int, default=64, help="sequences of each corpus; default: 64")
    add("--mlm_probability", type=float, default=0.15, help="share of masked tokens; default: 0.15")
    add("--output", type=Path, default=Path("gradient_consistency"), metavar="DIR",
        help="where consistency.json and consistency.png go; default: gradient_consistency")  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print, by ``arguments`` (None: the command line)."""
    quiet_libraries()
    options = build_parser().parse_args(arguments)
    if options.rows < 2:
        raise UserError(f"--rows {options.rows}: must be at least 2.")
    import torch

    # transformers' import takes seconds.
    from dga_scale.backbone.loading import load_model
    from dga_scale.corpus.shards import Corpus, check_matches, check_sequence_length
    from dga_scale.experts.consistency import consistency
    from dga_scale.logging.plots import consistency_figure, save_png

    loaded = load_model(options.model)
    torch.nn.Module.to(loaded.model, "cuda" if torch.cuda.is_available() else "cpu")
    layer = options.layer if options.layer >= 0 else loaded.anatomy.num_layers + options.layer
    gradients = {}
    for path, name in zip(options.corpus, _names(options.corpus), strict=True):
        corpus = Corpus.open(path)
        check_matches(corpus.manifest, loaded.tokenizer)
        check_sequence_length(corpus.manifest, loaded.anatomy.max_positions)
        gradients[name] = _gradients(loaded, corpus, layer, options.rows, options.mlm_probability)
    found = consistency(gradients)
    options.output.mkdir(parents=True, exist_ok=True)
    content = {
        "model": options.model,
        "corpora": dict(zip(found, options.corpus, strict=True)),
        "layer": layer,
        "consistency": {name: each.as_dict() for name, each in found.items()},
    }
    (options.output / "consistency.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    figure = consistency_figure({name: (each.rows, each.group) for name, each in found.items()})
    save_png(figure, options.output / "consistency.png")
    for name, each in found.items():
        print(f"{name}: consistency {each.group:.3f}, of a sequence {each.rows.mean():.3f} on average")
    print(f"results: {options.output / 'consistency.json'}, {options.output / 'consistency.png'}")
    return 0


def _names(paths: Sequence[str]) -> list[str]:
    """Return the last parts of the paths; the whole ones where two would be the same."""
    short = [Path(path).resolve().name for path in paths]
    return short if len(set(short)) == len(short) else list(paths)


def _gradients(
    loaded: "LoadedModel", corpus: "Corpus", layer: int, rows: int, probability: float
) -> "Tensor":
    """Compute the gradients (rows, parameters of the block) of the LM loss of a fixed sample of a corpus."""
    import torch.nn.functional as F

    from dga_scale.corpus.loading.masking import IGNORED, MaskingPolicy
    from dga_scale.corpus.loading.streams import EvalBatches
    from dga_scale.experts.consistency import block_parameters, sequence_gradients

    lm, anatomy, device = loaded.model, loaded.anatomy, loaded.model.device
    masking = None if anatomy.causal else MaskingPolicy.for_corpus(corpus, probability=probability)
    batches = EvalBatches(corpus, masking, batch_size=1, rank=0, world_size=1, max_rows=rows)

    def losses() -> "Iterator[Callable[[], Tensor]]":
        for batch in batches:

            def loss(batch: "Batch" = batch) -> "Tensor":
                ids, mask = batch.masked_ids.to(device), batch.attention_mask.to(device)
                hidden = anatomy.trunk(lm)(input_ids=ids, attention_mask=mask).last_hidden_state
                logits = anatomy.lm_logits(lm, hidden[0, batch.positions.to(device)])
                return F.cross_entropy(logits.float(), batch.labels.to(device), ignore_index=IGNORED)

            yield loss

    return sequence_gradients(lm, block_parameters(lm, anatomy, layer), losses(), len(batches))
