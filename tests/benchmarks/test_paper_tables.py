"""The papers' comparisons: a tiny one, stopped and resumed; the YAML, its cost, the papers' numbers."""

import json
import os
import signal
import statistics
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy import stats

from benchmarks.experiments.paper_tables.__main__ import main
from benchmarks.experiments.paper_tables.cost import trainings
from benchmarks.experiments.paper_tables.jobs import Job, Work
from benchmarks.experiments.paper_tables.runner import Runner
from benchmarks.experiments.paper_tables.settings import load_settings
from benchmarks.experiments.paper_tables.tables import load_published, write_tables
from dga_scale.errors import UserError
from dga_scale.launch.preemption import EXIT_STOPPED
from tests.helpers.ranks import REPOSITORY
from tests.helpers.small import DOMAIN, GENERAL, write_text
from tests.helpers.tiny_tasks import tiny_model, write_task

pytestmark = pytest.mark.slow

FOLDER = REPOSITORY / "benchmarks" / "experiments" / "paper_tables"

SMALL: dict[str, Any] = {
    "model": "{data}/model",
    "launcher": ["python"],
    "ds_config": "ds_configs/zero0.json",
    "sharding": {"sequence_length": 32, "validation_share": 0.2, "num_workers": 1},
    "domains": {"acl": {"text": "{data}/domain.jsonl", "task": "{data}/intent"}},
    "general": {"text": "{data}/general.jsonl", "tasks": ["{data}/words"]},
    "training": {"max_steps": 3, "global_batch_size": 8, "max_eval_samples": 8, "bf16": False},
    "compare_with": "mlm",
    "methods": {"mlm": {"method": "mlm"}, "half of mlm": {"merge": "mlm", "weight": 0.5}},
    "evaluation": {"seeds": 2, "max_eval_rows": 64, "recipe": {"epochs": 1, "learning_rate": 3e-3}},
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    tiny_model(tmp_path)
    write_text(tmp_path / "domain.jsonl", DOMAIN, 200, seed=0)
    write_text(tmp_path / "general.jsonl", GENERAL, 200, seed=1)
    for name in ("intent", "words"):
        write_task(tmp_path / name)
    return tmp_path


def write(folder: Path, changes: dict[str, Any] | None = None) -> str:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **(changes or {})}, sort_keys=False))
    return str(path)


def test_a_comparison_is_stopped_and_resumed(data: Path, capsys: pytest.CaptureFixture[str]):
    changes: dict[str, Any] = {"general": {"text": "{data}/general.jsonl"}}
    words = [write(data, changes), "--data", str(data)]
    words += ["--output_dir", str(data / "out")]
    stopping = threading.Thread(target=stop_when, args=(data / "out" / "logs" / "train-acl-mlm-42.log",))
    stopping.start()
    assert main(words) == EXIT_STOPPED
    stopping.join()
    assert "stopped in train acl mlm 42; the same command resumes" in capsys.readouterr().out
    before = json.loads((data / "out" / "jobs.json").read_text())
    assert list(before) == ["shard acl", "shard general"]
    assert "| mlm | missing | missing |" in (data / "out" / "tables.md").read_text()

    assert main(words) == 0
    after = json.loads((data / "out" / "jobs.json").read_text())
    assert list(after) == [*before, "train acl mlm 42", "merge acl half of mlm 42", "evaluate acl 42"]
    assert {name: after[name] for name in before} == before
    assert capsys.readouterr().out.startswith("3 of 5: train acl mlm 42\n")
    results = json.loads((data / "out" / "evaluation" / "acl" / "results.json").read_text())["models"]
    text = (data / "out" / "tables.md").read_text()
    for label, name in (("base", "none"), ("mlm", "mlm"), ("half-of-mlm", "half of mlm")):
        assert f"| {name} | {points(results, label, 'intent')} | " in text
        assert f"| {name} | {results[label]['corpora']['acl']['loss']['mean']:.3f}" in text
    merged, plain = (results[label]["tasks"]["intent"]["values"] for label in ("half-of-mlm", "mlm"))
    gap = 100 * statistics.mean(a - b for a, b in zip(merged, plain, strict=True))
    assert f" {gap:+.1f} [" in text
    assert "| MLM, one model a domain; mlm | 68.8 (+2.6) | " in text
    assert "- acl: 0 of 24 of intent" in text

    # All is finished; another setting would be another comparison.
    assert main(words) == 0
    assert " of 5: " not in capsys.readouterr().out
    words[0] = write(data, {**changes, "training": {**SMALL["training"], "max_steps": 4}})
    with pytest.raises(UserError, match="train acl mlm 42 was finished by another command: 3 then, 4 now"):
        main(words)


def stop_when(file: Path) -> None:
    """End this process politely as soon as the file is there."""
    for _ in range(3000):
        if file.exists():
            break
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)


def points(results: dict[str, Any], label: str, task: str) -> str:
    """A table's cell for a model's scores."""
    values = results[label]["tasks"][task]["values"]
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def test_general_tasks_are_over_all_domains(data: Path):
    """As tools/evaluate.py would write them: the base's are the same in both domains and count once."""
    domains = {name: {"text": "x", "task": f"{data}/intent"} for name in ("acl", "ai")}
    work = Work(load_settings(Path(write(data, {"domains": domains})), str(data)), data / "out")
    for number, domain in enumerate(domains):
        models = {}
        for label, values in (("base", [0.5, 0.7]), ("mlm", [0.8 + number / 10, 0.6])):
            score = {"metric": "accuracy", "values": values}
            models[label] = {"corpora": {}, "tasks": {"intent": score, "words": score}}
        work.evaluation(domain).mkdir(parents=True)
        (work.evaluation(domain) / "results.json").write_text(json.dumps({"models": models}))
    text = write_tables(work).read_text()
    assert "| none | 60.0 ± 14.1 | 60.0 ± 14.1 | 60.0 | 60.0 ± 14.1 |" in text
    assert "| mlm | 70.0 ± 14.1 | 75.0 ± 21.2 | 72.5 | 72.5 ± 15.0 |" in text
    # By seed and domain: 30, -10, 40, -10.
    found = stats.ttest_rel([0.8, 0.6, 0.9, 0.6], [0.5, 0.7, 0.5, 0.7])
    low, high = (100 * bound for bound in found.confidence_interval())
    assert text.count(f"+12.5 [{low:+.1f}, {high:+.1f}], p {found.pvalue:.3f}, n 4") == 2


def test_without_tasks_losses_and_costs_are_compared(data: Path):
    """Two trainings: the first three steps of each do not count."""
    changes = {
        "domains": {"acl": {"text": "x"}},
        "general": {"text": "x"},
        "methods": {"mlm": {"method": "mlm"}, "kd": {"method": "kd"}},
    }
    work = Work(load_settings(Path(write(data, changes)), str(data)), data / "out")
    for method, seconds in (("mlm", 2.0), ("kd", 3.0)):
        run = work.run("acl", method, 42)
        run.mkdir(parents=True)
        steps = [{"step": 1, "step_seconds": 9.0, "memory_gib": [1.0]}] * 3 + [
            {"step": 2, "step_seconds": seconds, "memory_gib": [1.0, seconds]}
        ]
        (run / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    losses = {
        "base": {"loss": {"mean": 4.0}, "values": [4.0], "difference": None},
        "mlm": {"loss": {"mean": 3.5}, "values": [3.4, 3.6], "difference": {"mean": -0.5, "high": 0.8}},
        "kd": {"loss": {"mean": 3.0}, "values": [3.0], "difference": {"mean": -1.0, "high": -0.75}},
    }
    models = {n: {"corpora": {"acl": {"kind": "domain", **e}}, "tasks": {}} for n, e in losses.items()}
    work.evaluation("acl").mkdir(parents=True)
    (work.evaluation("acl") / "results.json").write_text(json.dumps({"models": models}))
    text = write_tables(work).read_text()
    assert "| none | 4.000 | missing |\n| mlm | 3.500 ± 0.100 (-0.500) | missing |\n" in text
    assert "| kd | 3.000 (-1.000 ± 0.250) | missing |" in text
    assert "| mlm | 2.00 | 1.00 | 2.00 | 1.00 |\n| kd | 3.00 | 1.50 | 3.00 | 1.50 |" in text
    assert "## End tasks" not in text


def test_a_failing_piece_shows_the_end_of_its_log(data: Path):
    (data / "domain.jsonl").write_text("{\n")
    with pytest.raises(
        UserError, match=r"(?s)shard acl ended with code 2; .*shard-acl\.log ends on:.*domain\.jsonl:1"
    ):
        main([write(data), "--data", str(data), "--output_dir", str(data / "out")])


def test_seeds_and_sequences_become_pieces(data: Path):
    domains = {"acl": SMALL["domains"]["acl"], "ai": {"text": "{data}/b", "task": "{data}/words"}}
    sequence = {"domains": ["ai", "acl"], "methods": {"das": {"method": "das", "mix": "{general}:0.1"}}}
    path = write(
        data, {"domains": domains, "general": {"text": "{data}/g"}, "seeds": [1, 2], "sequence": sequence}
    )
    work = Work(load_settings(Path(path), str(data)), data / "out")
    jobs = {job.name: job.command for job in work.jobs()}
    assert [name for name in jobs if "evaluate" in name] == [
        f"evaluate {d} {s}" for s in (1, 2) for d in domains
    ]
    labelled = [word for word in jobs["evaluate acl 2"] if word.startswith("mlm=")]
    assert labelled == [f"mlm={data}/out/runs/acl/mlm-{seed}/model" for seed in (1, 2)]
    command = list(jobs["train sequence das 2"])
    assert command[command.index("--corpus") + 1 :][:2] == [
        str(data / "out" / "corpora" / d) for d in ("ai", "acl")
    ]
    assert f"{data}/out/corpora/general:0.1" in command
    assert f"ai={data}/words" in jobs["forgetting das 2"]


def test_two_at_work_in_one_folder_are_refused(tmp_path: Path):
    with Runner(tmp_path), pytest.raises(UserError, match="uses this folder"):
        Runner(tmp_path).__enter__()
    with Runner(tmp_path) as runner:
        assert runner.run(Job("sleep", ("true",)))


def test_a_signal_while_a_piece_starts_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Interrupted(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            super().__init__(*arguments, **settings)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with Runner(tmp_path) as runner:
        job = Job("sleep", ("sh", "-c", f"sleep 5; touch {tmp_path / 'slept'}"))
        assert not runner.run(job)
    assert not (tmp_path / "slept").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sed": [1]}, r"small\.yaml:\d+: sed: unknown key\. Did you mean seeds"),
        ({"domains": {"acl": {"text": "x", "tasks": "y"}}},
         r":\d+: domains\.acl\.tasks: unknown key\. Did you mean task"),
        ({"domains": {"acl": {"task": "x"}}}, r"domains\.acl lacks 'text'"),
        ({"domains": {"acl": {"text": "x"}}, "sequence": {"domains": ["acl"], "methods": {}}},
         r":\d+: domains\.acl is in the sequence and lacks 'task'"),
        ({"training": {"max_step": 3}}, r"mlm: .*unknown setting --max_step\b.*max_steps"),
        ({"methods": {"kd": {"method": "kd", "l2_weight": 1}}}, r":\d+: methods\.kd: .*l2_weight"),
        ({"methods": {"m": {"merge": "x"}}, "compare_with": "m"}, r"methods\.m\.merge: 'x' is none of "),
        ({"compare_with": "ml"}, r"compare_with: 'ml' is none of mlm, half of mlm\. Did you mean mlm"),
        ({"seeds": ["a"]}, r"seeds must be a whole number above 0, not \"a\""),
        ({"evaluation": {"seeds": 0}}, r"seeds must be a whole number above 0, not 0"),
        ({"evaluation": {"general_tasks": "x"}}, r":\d+: evaluation\.general_tasks: `domains` and `general`"),
        ({"evaluation": {"recipe": {"epoch": 1}}}, r"recipe has an unknown setting 'epoch'"),
        ({"evaluation": {"task_recipes": {"inten": {}}}},
         r":\d+: evaluation\.task_recipes\.inten: 'inten' is none of intent, words\. Did you mean intent"),
        ({"sequence": {"domains": ["acl"], "methods": {}}, "evaluation": {"task_recipes": {"intent": {}}}},
         r":\d+: evaluation\.task_recipes\.intent is a task of the sequence"),
        ({"sequence": {"domains": ["ai"], "methods": {}}}, r"sequence\.domains: 'ai' is none of acl\."),
        ({"methods": {"a b": {}, "a/b": {}}}, r":\d+: methods\.a b: give it a name that is told apart"),
        ({"model": 3}, r"small\.yaml:\d+: model must be a text, not 3"),
        ({"general": []}, r"general must hold `name: value` lines, not \[\]"),
    ],
)  # fmt: skip
def test_mistakes_in_the_yaml_name_the_line(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        load_settings(Path(write(tmp_path, changes)), "data")


@pytest.mark.parametrize(
    ("name", "domains"),
    [
        ("minilm.yaml", {"acl", "restaurant", "pubmed"}),
        ("roberta_base.yaml", {"acl", "restaurant", "pubmed"}),
        ("methods.yaml", {"acl"}),
    ],
)
def test_the_comparisons_that_come_along_are_read(name: str, domains: set[str]):
    settings = load_settings(FOLDER / name, os.devnull)
    assert {"mlm", "rehearsal 5%", "mlm merged with base", "l2", "ewc", "kd", "simcse", "lora"} < set(
        settings.methods
    )
    assert {"dga gradient", "dga update"} < set(settings.methods)
    assert domains <= set(settings.domains)


def test_the_papers_size_and_its_cost(capsys: pytest.CaptureFixture[str]):
    settings = load_settings(FOLDER / "roberta_base.yaml", ".")
    assert settings.training["max_steps"] * settings.training["global_batch_size"] == 640_000
    assert settings.sharding["sequence_length"] == 164
    found = {each.name: each for each in trainings(settings)}
    mlm = found["mlm"]
    assert (mlm.runs, mlm.steps) == (5 * 6, 2500)
    assert mlm.gpu_hours(8) == pytest.approx(30 * 2500 * mlm.plan.time.step * 8 / 3600)
    # 6 FLOPs a parameter and token, the embeddings' lookup left out, at 40% of 989 TFLOP/s is a lower bound.
    assert 640_000 * 164 * 6 * 85e6 / (0.4 * 989e12) / 3600 < mlm.gpu_hours(8) / 30 < 0.2
    assert found["dga update"].gpu_hours(8) > 2 * mlm.gpu_hours(8)
    assert main([str(FOLDER / "roberta_base.yaml"), "--plan"]) == 0
    total = sum(each.gpu_hours(8) for each in found.values())
    assert f"| {total:.0f} |" in capsys.readouterr().out


def test_the_published_averages_are_those_of_their_rows():
    """Of DAS's table: 8 rows of 6 domains, each pair of averages within the rounding."""
    das = load_published()["das"]
    for name, row in das["rows"].items():
        pairs = [[float(number) for number in text.split("/")] for text in row["values"]]
        for which in (0, 1):
            mean = statistics.mean(pair[min(which, len(pair) - 1)] for pair in pairs[:6])
            assert pairs[6][which] == pytest.approx(mean, abs=0.011), name
    for content in load_published().values():
        assert all(len(row["values"]) <= len(content["columns"]) for row in content["rows"].values())
        assert content["source"]
        assert content["size"]
