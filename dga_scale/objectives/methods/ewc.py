"""EWC: the LM loss, with each weight regularised by its Fisher on general text (Kirkpatrick et al., 2017)."""

from dga_scale.config.methods.ewc import EWCSettings
from dga_scale.config.settings import TrainConfig
from dga_scale.errors import UserError
from dga_scale.objectives.method import Method
from dga_scale.preservation.weight_regularisation import WeightRegularisation


class EWC(Method[EWCSettings]):
    """``L_MLM + (lambda / 2) sum_i F_i (theta_i - theta0_i)^2``, theta0 the starting weights.

    F is the diagonal empirical Fisher of the MLM loss on general text: the mean of squared gradients of
    single examples, without dropout. It is measured once, before training, and kept in the run's folder.
    """

    Settings = EWCSettings

    def check(self, config: TrainConfig, causal: bool) -> None:
        if self.settings.general_corpus is None:
            raise UserError(
                "--method ewc measures on general text which weights to keep: give --general_corpus FOLDER, "
                "a corpus that tools/shard_corpus.py wrote"
            )

    def weight_regularisation(self) -> WeightRegularisation:
        settings = self.settings
        return WeightRegularisation(settings.ewc_weight, settings.fisher_samples, settings.fisher_normalize)
