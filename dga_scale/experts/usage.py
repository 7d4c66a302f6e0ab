"""The usage of experts in training: which are idle, their shares of the text, how far centres went."""

from collections.abc import Callable

from torch import Tensor

from dga_scale.backbone.extended import ExtendedPreTrainedModel
from dga_scale.experts.extension import SublayerId, expert_parameters, sparse_sublayers


class ExpertUsage:
    """The usage of a model's experts in training, counted over all ranks: the same on each.

    Args:
        model: The model, with its centres where the run found them: how far they go is counted from here.
        say: A function that prints a line.

    """

    def __init__(self, model: ExtendedPreTrainedModel, say: Callable[[str], None]) -> None:
        self._say = say
        self._sublayers = sparse_sublayers(model)
        self._parameters = expert_parameters(model)
        self._starts = {place: each.router.centres.cpu().clone() for place, each in self._sublayers.items()}
        self._logged = {place: list(each.in_all) for place, each in self._sublayers.items()}
        self._known_empty: set[tuple[SublayerId, int]] = set()

    def idle_parameters(self) -> set[str]:
        """Return the names of the parameters of experts that got no sequence in the last optimizer step."""
        return {
            name
            for place, sublayer in self._sublayers.items()
            for own, sequences in zip(self._parameters[place], sublayer.in_step, strict=True)
            if not sequences
            for name in own
        }

    def figures(self) -> dict[str, dict[str, list[float]]]:
        """Return by sublayer each expert's figures since the last call, and warn of those that ran empty.

        ``share`` is an expert's share of the sequences; ``centre_moved`` is the distance of its centre from
        where the run found it, in radii of its cluster, which is how routing measures distances. An expert
        without a sequence is named in a line once.
        """
        figures, empty = {}, []
        for place, sublayer in self._sublayers.items():
            counts = [now - then for now, then in zip(sublayer.in_all, self._logged[place], strict=True)]
            self._logged[place] = list(sublayer.in_all)
            moved: Tensor = (sublayer.router.centres.cpu() - self._starts[place]).norm(dim=1)
            figures[str(place)] = {
                "share": [count / max(1, sum(counts)) for count in counts],
                "centre_moved": (moved / sublayer.router.radii.cpu()).tolist(),
            }
            empty += [(place, index) for index, count in enumerate(counts) if not count]
        if found := [each for each in empty if each not in self._known_empty]:
            self._known_empty.update(found)
            names = ", ".join(f"{place} expert {index}" for place, index in found)
            self._say(
                f"experts without a sequence since the last record: {names}. They stand still; where "
                "they stay empty, cluster anew with larger --cse_min_samples or --cse_eps"
            )
        return figures
