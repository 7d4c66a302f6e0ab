"""Score predictions with scikit-learn and scipy."""

import warnings
from collections.abc import Sequence

CLASSIFICATION = ("macro_f1", "micro_f1", "accuracy", "matthews")
REGRESSION = ("pearson", "spearman")


def classification_scores(truth: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
    """Compute macro- and micro-F1, accuracy and Matthews correlation; a class never predicted has F1 0."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef  # its import takes a second

    return {
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0)),
        "micro_f1": float(f1_score(truth, predicted, average="micro", zero_division=0)),
        "accuracy": float(accuracy_score(truth, predicted)),
        "matthews": float(matthews_corrcoef(truth, predicted)),
    }


def regression_scores(truth: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """Compute Pearson and Spearman correlation; 0 where all predictions are the same."""
    from scipy.stats import ConstantInputWarning, pearsonr, spearmanr  # its import takes most of a second

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        pearson, spearman = pearsonr(truth, predicted).statistic, spearmanr(truth, predicted).statistic
    return {
        name: 0.0 if value != value else float(value)
        for name, value in (("pearson", pearson), ("spearman", spearman))
    }
