"""The scores of an evaluation on the page: the numbers as they are, colour only where the interval allows."""

import json
from pathlib import Path
from typing import Any

import pytest

from dga_scale.errors import UserError
from dga_scale.report.report import write_report
from dga_scale.report.scores import load_scores, score_sections
from tests.report.test_report import HOSTILE, Page, make_run


def compared(mean: float, low: float | None, high: float | None, p: float | None = 0.04) -> dict[str, Any]:
    return {"mean": mean, "low": low, "high": high, "p_t": p, "p_sign_flip": p}


def entry(kind: str, mean: float, difference: dict[str, Any] | None) -> dict[str, Any]:
    found = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "count": 3}
    if kind == "loss":
        return {"kind": "domain", "loss": found, "perplexity": 20.0, "over": "batches of text",
                "difference": difference}  # fmt: skip
    return {
        "kind": "general",
        "metric": "accuracy",
        "score": found,
        "over": "seeds",
        "difference": difference,
    }


def write_results(folder: Path, loss: dict[str, Any], score: dict[str, Any], label: str = "dga") -> Path:
    models = {
        "base": {"corpora": {"acl": entry("loss", 3.0, None)}, "tasks": {"sst2": entry("score", 0.8, None)}},
        label: {"corpora": {"acl": entry("loss", 2.5, loss)}, "tasks": {"sst2": entry("score", 0.7, score)}},
    }
    for model, losses in zip(models.values(), ((3.0, 3.5), (2.5, 3.6)), strict=True):
        model |= {f"{k}_loss": {"values": [v]} for k, v in zip(("domain", "general"), losses, strict=True)}
    overlap = {"sst2": {"examples": 200, "found": 10, "excluded_from": []}}
    folder.mkdir()
    content = {"format": 1, "base": "roberta", "models": models, "overlap": overlap, "notes": [HOSTILE]}
    (folder / "results.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("loss", "score", "better"),
    [
        (compared(-0.5, -0.6, -0.4), compared(-0.1, -0.2, -0.05), (True, False)),
        (compared(0.5, 0.4, 0.6), compared(0.1, 0.05, 0.2), (False, True)),
        (compared(-0.5, -1.1, 0.1), compared(-0.1, None, None, None), (None, None)),  # noise; one seed
    ],
)
def test_what_is_called_better(
    tmp_path: Path, loss: dict[str, Any], score: dict[str, Any], better: tuple[bool | None, ...]
) -> None:
    result = load_scores(write_results(tmp_path / "out", loss, score))
    sections = list(score_sections(result["models"]))
    assert [title for title, _ in sections] == ["domain: acl, loss", "general: sst2, accuracy"]
    assert tuple(rows[1].better for _, rows in sections) == better
    assert all(rows[0].better is None for _, rows in sections)  # the base


def test_scores_on_the_page(tmp_path: Path) -> None:
    results = write_results(
        tmp_path / "out", compared(-0.5, -0.6, -0.4, 0.0002), compared(-0.1, -0.2, 0.0), "<b>dga</b>"
    )
    plain, scored = tmp_path / "plain.html", tmp_path / "scored.html"
    run = make_run(tmp_path / "run")
    write_report([run], plain)
    write_report([run], scored, evaluation=results)
    page, text = Page(scored.read_text()), scored.read_text()
    assert ["base", "3.0000 (perplexity 20)", "2.9000 to 3.1000", "3 batches of text", *[""] * 4] in page.rows
    assert ["<b>dga</b>", "2.5000 (perplexity 20)", "2.4000 to 2.6000", "3 batches of text", "-0.5000",
            "-0.6000 to -0.4000", "< 0.001", "< 0.001"] in page.rows  # fmt: skip
    assert '<td class="better">-0.5000</td>' in text
    assert "<td>-0.1000</td>" in text  # its interval touches 0
    assert "overlap: sst2: 10 of 200 scored examples (5.0%)" in page.text
    assert HOSTILE in page.text
    assert "<script" not in text
    assert "<b>" not in text
    assert len(page.pictures()) == len(Page(plain.read_text()).pictures()) + 2  # light and dark
    assert "Against roberta" not in plain.read_text()


def test_an_evaluation_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"results.json: No such file.* Give a folder that tools/evaluate.py wrote"
    ):
        load_scores(tmp_path)
    folder = write_results(tmp_path / "out", compared(0, 0, 0), compared(0, 0, 0))
    file = folder / "results.json"
    whole = file.read_text()
    for damaged in (whole[: len(whole) // 2], "[]", '{"format": 1}', whole.replace('"mean"', '"men"')):
        file.write_text(damaged)
        with pytest.raises(UserError, match=r"results.json: damaged .*Run tools/evaluate.py again"):
            load_scores(folder)
    file.write_text(whole.replace('"format": 1', '"format": 9'))
    with pytest.raises(UserError, match="format 9, this version reads 1"):
        load_scores(folder)
