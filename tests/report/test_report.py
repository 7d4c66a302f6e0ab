"""The report, opened as a browser would: well-formed, nothing from outside, every picture decodable."""

import base64
import dataclasses
import io
import json
import math
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dga_scale.errors import UserError
from dga_scale.logging.environment import describe_environment, write_environment
from dga_scale.logging.run_log import RunLog, open_log
from dga_scale.preservation.importance import Importance
from dga_scale.preservation.movement import compare
from dga_scale.report.groups import comparison, grouped
from dga_scale.report.report import write_report
from dga_scale.report.run_data import load_run, summarize_protection, summarize_run
from tests.helpers.evaluations import evaluation

VOID = {"meta", "source", "img", "br"}
HOSTILE = "<script>alert('x')</script> & \"quoted\""


class Page(HTMLParser):
    """Collects what matters and checks that every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.style = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "srcset", "href", "action", "data")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            self.style += data
        elif data.strip():
            self.texts.append(data.strip())
            if "td" in self.open or "th" in self.open:
                self.rows[-1][-1] = f"{self.rows[-1][-1]} {data}".strip()

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def pictures(self) -> list[Image.Image]:
        found = []
        for link in self.links:
            kind, data = link.split(",", 1)
            assert kind == "data:image/png;base64"
            picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            picture.load()
            found.append(picture)
        return found


def make_run(
    folder: Path,
    *,
    method: str = "dga",
    soft_mask: str = "gradient",
    losses: dict[str, tuple[float, float]] | None = None,
    moved: float = 0.95,
    tokens: int = 1000,
    steps: int = 4,
    rows: int = 10,
    base_rows: int | None = None,
    **settings: Any,
) -> Path:
    """A run's folder; ``rows`` of the held-out texts were scored, of the base model ``base_rows``."""
    base_rows = rows if base_rows is None else base_rows
    losses = {"domain": (4.0, 3.0), "general": (3.5, 3.6)} if losses is None else losses
    folder.mkdir(parents=True)
    settings = {
        "model": "base", "corpus": "text", "method": method, "soft_mask": soft_mask, "max_steps": 4,
        "importance_squash": "clip", **settings,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    environment = describe_environment(launcher="deepspeed", devices=["GPU X"], hosts=["a"])
    write_environment(folder / "environment.json", environment)
    with open_log(folder, 0, 4) as log:
        before = {name: value[0] for name, value in losses.items()}
        write_evaluation(log, 0, base_rows, **before)
        for step in range(1, steps + 1):
            values = {"step": step, "loss/total": 4.0 / step, "loss/mlm": 3.0 / step}
            log.step(values | {"tokens_per_second": 100.0, "step_seconds": 2.0, "data_wait_seconds": 0.1})
        write_evaluation(log, steps, rows, **{name: value[1] for name, value in losses.items()})
        if method == "dga":
            importance = Importance({"heads": torch.arange(1.0, 9.0).view(2, 4) ** 2}, {})
            importance.save(folder / "importance.safetensors")
            a = importance.protection()["heads"]
            movement = torch.where(a > 0.5, moved, 1.0)
            effective = compare(movement, a)
            log.protection("heads", step=steps, one_minus_a=1 - a, movement=movement, **effective.figures())
    if steps == 4:
        (folder / "summary.json").write_text(json.dumps({"tokens": tokens}))
    return folder


def write_evaluation(log: RunLog, step: int, rows: int, **losses: float) -> None:
    record = evaluation(step, rows, **losses)
    log.event(record.pop("event"), **record)


def page_of(tmp_path: Path, *runs: Path) -> Page:
    write_report(runs, tmp_path / "report.html")
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_page_is_self_contained_and_its_pictures_decode(tmp_path: Path) -> None:
    page = page_of(tmp_path, make_run(tmp_path / "run"))
    pictures = page.pictures()  # also: every link is an inlined picture
    assert len(pictures) == 2 * 6  # losses, held-out, importance, protection, movement, speed; light and dark
    assert all(picture.width > 600 and picture.mode == "RGBA" for picture in pictures)
    for outside in ("http:", "https:", "//", "url(", "@import"):
        assert outside not in page.style
    assert "prefers-color-scheme: dark" in page.style


def test_pictures_for_light_and_dark_pages_differ_in_their_text(tmp_path: Path) -> None:
    pictures = page_of(tmp_path, make_run(tmp_path / "run")).pictures()

    def brightness_of_text(picture: Image.Image) -> float:
        labels = np.asarray(picture)[:, :90]  # beside the axis
        return float(labels[labels[..., 3] > 200][:, :3].mean())

    dark, light = pictures[0], pictures[1]  # source comes before img
    assert brightness_of_text(dark) > 150
    assert brightness_of_text(light) < 110


def test_before_and_after(tmp_path: Path) -> None:
    page = page_of(tmp_path, make_run(tmp_path / "run"))
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["domain"] == [f"4.000 ppl {math.exp(4):.1f}", f"3.000 ppl {math.exp(3):.1f}", "-1.000 -25.0%"]
    assert rows["general"][2] == "+0.100 +2.9%"
    assert "Loss on held-out domain text fell by 1.000 (25.0%), from 4.000 to 3.000" in page.text
    assert "each nat gained in the domain cost 0.10 outside it" in page.text
    assert rows["tokens a second"] == ["100"]
    assert rows["of it waiting for data"] == ["5.0%"]


def test_text_from_the_run_is_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a<b>&c", model=HOSTILE, **{"<i>odd</i>": 1})
    page = page_of(tmp_path, run)
    assert "script" not in (tag for tag in page.open)
    for markup in ("<script", "<i>", "<b>"):
        assert markup not in (tmp_path / "report.html").read_text()
    assert HOSTILE in page.text
    assert "a<b>&c" in page.text


def test_runs_side_by_side(tmp_path: Path) -> None:
    mlm = make_run(
        tmp_path / "plain", method="mlm", soft_mask="none", losses={"domain": (4, 2.9), "general": (3.5, 3.9)}
    )
    dga = make_run(tmp_path / "mine", learning_rate=0.5)
    page = page_of(tmp_path, mlm, dga)
    assert ["setting", "plain", "mine"] in page.rows
    assert ["method", "mlm", "dga"] in page.rows
    assert ["learning_rate", "", "0.5"] in page.rows
    assert "dga, gradient is better than plain MLM on general text and not on the domain." in page.text
    page.pictures()


@pytest.mark.parametrize(
    ("dga", "said"),
    [
        ({"domain": (4.0, 3.0), "general": (3.5, 3.4)}, "dga, gradient beats plain MLM on both"),
        ({"domain": (4.0, 2.5), "general": (3.5, 3.9)}, "better than plain MLM on the domain and not"),
        ({"domain": (4.0, 3.2), "general": (3.5, 3.7)}, "does not beat plain MLM at equal tokens"),
    ],
)  # fmt: skip
def test_comparison_says_so_when_dga_does_not_pay(
    tmp_path: Path, dga: dict[str, tuple[float, float]], said: str
) -> None:
    plain = {"domain": (4.0, 3.1), "general": (3.5, 3.6)}
    runs = [
        load_run(make_run(tmp_path / "plain", method="mlm", losses=plain)),
        load_run(make_run(tmp_path / "mine", losses=dga)),
    ]
    assert said in (comparison(grouped(runs)) or "")


def test_comparison_at_unequal_tokens_is_called_unfair(tmp_path: Path) -> None:
    runs = [load_run(make_run(tmp_path / str(n), tokens=n, max_steps=n)) for n in (10, 20)]
    assert "no fair comparison" in (comparison(grouped(runs)) or "")


def test_seeds_of_a_method_are_taken_together(tmp_path: Path) -> None:
    runs = []
    for seed, after in enumerate((3.0, 3.2, 3.1)):
        losses = {"domain": (4.0, after), "general": (3.5, 3.6)}
        runs.append(make_run(tmp_path / f"mine-{seed}", losses=losses, seed=seed))
        plain = {"domain": (4.0, after - 0.05), "general": (3.5, 3.7)}
        runs.append(
            make_run(tmp_path / f"plain-{seed}", method="mlm", soft_mask="none", losses=plain, seed=seed)
        )
    runs.append(make_run(tmp_path / "mixed", method="mlm", soft_mask="none", mix=["text/general:0.05"]))
    groups = grouped([load_run(run) for run in runs])
    assert [group.label for group in groups] == ["dga, gradient", "mlm", "mlm, mix general:0.05"]
    assert [len(group.runs) for group in groups] == [3, 3, 1]
    assert str(groups[0].after("domain")) == "3.100 ± 0.100"  # sample standard deviation of 3.0, 3.2, 3.1
    page = page_of(tmp_path, *runs)
    assert ["dga, gradient", "3.100 ± 0.100", "-0.900", "3.600 ± 0.000", "+0.100", "3"] in page.rows
    assert "dga, gradient is better than plain MLM on general text and not on the domain" in page.text
    assert "mlm, mix general:0.05 does not beat" not in page.text  # it kept more
    page.pictures()


def test_figures_as_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_report([run], tmp_path / "report.html", tmp_path / "figures")
    files = sorted((tmp_path / "figures").iterdir())
    assert files[0].name == "01-training-loss.png"
    assert len(files) == (tmp_path / "report.html").read_text().count("<img ")
    for file in files:
        Image.open(file).load()


BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := which(name))), None
)


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "light"), (1200, "dark")])
def test_a_browser_shows_it(width: int, scheme: str, tmp_path: Path) -> None:
    """Opened without a network: nothing on the console, figures drawn, no wider than the window."""
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other", method="mlm", soft_mask="none")
    write_report([run, other], tmp_path / "report.html")
    assert BROWSER is not None
    # A page around it, which says what a reader can't: how wide it became, and how many pictures decoded.
    probe = tmp_path / "probe.html"
    script = (
        "<script>addEventListener('load', () => { const p = document.createElement('p'); p.id = 'probe';"
        "p.textContent = [document.documentElement.scrollWidth <= innerWidth,"
        "[...document.images].every(i => i.complete && i.naturalWidth > 0), document.images.length,"
        "getComputedStyle(document.body).backgroundColor].join('|'); document.body.append(p); });</script>"
    )
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    probe.write_text(page.replace("</body>", f"{script}</body>"), encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
        "--virtual-time-budget=5000", "--dump-dom",
        *(["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []), probe.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<p id="probe">(.*?)</p>', shown.stdout)
    assert found is not None, shown.stderr[-2000:]
    fits, drawn, images, background = found[1].split("|")
    assert (fits, drawn) == ("true", "true")
    assert int(images) == page.count("<img ")
    assert background == ("rgb(15, 20, 25)" if scheme == "dark" else "rgb(255, 255, 255)")
    assert "CONSOLE" not in shown.stderr


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({"domain": (4.0, 3.0)}, "General loss was not measured, so nothing can be said about forgetting"),
        ({"domain": (4.0, 3.0), "general": (3.5, 3.4)}, "nothing measured outside the domain was lost"),
        ({"domain": (4.0, 4.1), "general": (3.5, 3.6)}, "did not make the model better in the domain"),
        ({}, "Nothing can be said about the domain"),
    ],
)
def test_the_summary_is_honest(tmp_path: Path, losses: dict[str, tuple[float, float]], said: str) -> None:
    run = load_run(make_run(tmp_path / "run", losses=losses))
    assert said in summarize_run(run)


def test_effective_protection_in_words(tmp_path: Path) -> None:
    undone = load_run(make_run(tmp_path / "gradient", moved=0.95))
    kept = load_run(make_run(tmp_path / "update", soft_mask="update", moved=0.2))
    assert "moved 0.95 of what" in (summarize_protection(undone) or "")
    assert "--soft_mask update" in (summarize_protection(undone) or "")
    assert "moved 0.20 of what" in (summarize_protection(kept) or "")
    assert "Adam" not in (summarize_protection(kept) or "")
    assert "Adam divides" in (summarize_protection(undone) or "")
    other = dataclasses.replace(undone, settings=undone.settings | {"optimizer": "sgd"})
    assert "The mask did little. --soft_mask update" in (summarize_protection(other) or "")


def test_unfinished_run_and_one_without_figures(tmp_path: Path) -> None:
    page = page_of(tmp_path, make_run(tmp_path / "run", steps=2, method="mlm", losses={}))
    assert "step 2 of 4, not finished" in page.text
    assert "protection" not in page.text.lower()


def test_refused_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.yaml.*--output_dir"):
        load_run(tmp_path)
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match=rf"no run folder.* Give the runs in it: {run}\."):
        load_run(tmp_path)
    with pytest.raises(UserError, match=r"report\.html: No such file.* Give a path in a folder you own"):
        write_report([run], tmp_path / "missing" / "report.html")
    (run / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json: damaged"):
        load_run(run)


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    log = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text(log[0])
    assert "event" in json.loads(log[0])  # no step yet
    assert "step 0 of 4, not finished" in page_of(tmp_path, run).text
    (run / "log.jsonl").unlink()
    with pytest.raises(UserError, match=r"run: nothing to report yet: .* start its command again"):
        load_run(run)


# --- evaluations of different texts ----------------------------------------------------------------------


def test_a_base_that_was_measured_on_other_rows_is_not_compared(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=20, base_rows=10)
    page = page_of(tmp_path, run)
    assert "the base model was not measured on this text" in page.text
    assert ["domain", "not measured", "3.000 ppl 20.1", ""] in page.rows
    assert "fell by" not in page.text
    assert grouped([load_run(run)]) == []


def test_a_general_text_that_only_the_trained_model_was_scored_on(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "run", losses={"domain": (4.0, 3.0)}))
    last = run.named("evaluation")[-1]
    last |= {"general_loss": 3.3, "texts": evaluation(4, domain=3.0, general=3.3)["texts"]}
    assert "Nothing can be said about forgetting: the base model was not measured" in summarize_run(run)


def test_runs_that_were_evaluated_on_different_texts_are_not_compared(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "dga", rows=20),
        make_run(
            tmp_path / "mlm",
            method="mlm",
            soft_mask="none",
            losses={"domain": (4.0, 2.0), "general": (3.5, 3.9)},
        ),
    ]
    groups = grouped([load_run(run) for run in runs])
    said = comparison(groups)
    assert said == "The runs were evaluated on different text, so their losses can't be compared."
    alike = page_of(tmp_path, runs[0], make_run(tmp_path / "other", rows=20, learning_rate=1.0))
    apart = page_of(tmp_path, *runs)
    assert "what was learnt against what was kept" in str(alike.texts)
    assert "what was learnt against what was kept" not in str(apart.texts)


def test_seeds_that_were_evaluated_on_different_texts_are_no_group(tmp_path: Path) -> None:
    runs = [load_run(make_run(tmp_path / str(seed), rows=10 + seed, seed=seed)) for seed in (0, 1)]
    assert [len(group.runs) for group in grouped(runs)] == [1, 1]
    alike = [load_run(make_run(tmp_path / f"alike-{seed}", seed=seed)) for seed in (0, 1)]
    assert [len(group.runs) for group in grouped(alike)] == [2]
