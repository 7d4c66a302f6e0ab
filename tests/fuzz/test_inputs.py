"""Every field of the files that people and other programs write: suites, GPUs, end tasks, text, models."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dga_scale.backbone.loading import load_model
from dga_scale.corpus.reading.finding import find_sources
from dga_scale.corpus.reading.overlap import Overlap
from dga_scale.corpus.reading.sources import ReadOptions, Records, read_segment, segments
from dga_scale.endtasks.suite import load_suite
from dga_scale.endtasks.tasks import load_task
from dga_scale.planning.gpus import find_gpu
from dga_scale.planning.models import find_config
from dga_scale.run_folder import read_settings
from tests.helpers.nonsense import DEEP, DIGITS, HUGE, JSON, changed_at, fuzz, places, refusal
from tests.helpers.small import SmallWorld

GPU = {
    "memory_gib": 80.0, "bf16_tflops": 300.0, "fp32_tflops": 20.0, "memory_gbs": 2000.0, "overlap": 0.5,
    "inter_node_gbs": 25.0, "mfu": 0.4, "intra_node_gbs": 300.0, "host_memory_gib": 10.0,
}  # fmt: skip
NO_NUMBER: tuple[Any, ...] = (
    "x",
    "",
    -1.0,
    True,
    [],
    {},
    [1.0],
    float("nan"),
    float("inf"),
    10**400,
    None,
    "3",
)
NO_COUNT: tuple[Any, ...] = ("x", "", -1, 0, 1.5, True, [], {}, [1], float("nan"), float("inf"), HUGE)
NO_PATHS: tuple[Any, ...] = (3, 1.5, True, {}, [3], [[]], [None], {"a": 1}, "no such folder", "")
RECIPE: dict[str, tuple[Any, ...]] = {
    "epochs": NO_COUNT, "batch_size": NO_COUNT, "patience": NO_COUNT, "max_length": NO_COUNT,
    "learning_rate": ("x", "", -1.0, 0.0, True, [], {}, float("nan"), float("inf"), 10**400),
    "weight_decay": ("x", "", -1.0, True, [], {}, float("nan"), float("inf"), 10**400),
    "metric": ("x", "", 3, True, [], {}, "pearson"),
    "precision": ("x", "", 3, True, [], {}),
    **dict.fromkeys(("max_train_examples", "max_dev_examples", "max_test_examples"), NO_COUNT[:-1]),
}  # fmt: skip
SUITE: dict[str, tuple[Any, ...]] = {
    "seeds": NO_COUNT, "jobs": NO_COUNT, "max_eval_rows": NO_COUNT, "batch_size": NO_COUNT,
    "text_field": (3, 1.5, True, [], {}, ["x"], ""),
    "domain_corpora": NO_PATHS, "general_corpora": NO_PATHS, "general_tasks": NO_PATHS,
    "unlabelled_text": NO_PATHS[:-2],
    "recipe": (3, "x", [], True), "task_recipes": (3, "x", [], True, {"task": 3}, {"none": {}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module")
def task(folder: Path) -> Path:
    path = folder / "task"
    path.mkdir()
    for split in ("train", "dev", "test"):
        lines = [json.dumps({"text": f"word {n}", "label": "ab"[n % 2]}) for n in range(6)]
        (path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return path


def written(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_gpus(folder: Path) -> None:
    path = folder / "gpu.yaml"
    assert refusal(find_gpu, str(written(path, GPU))) is None
    for name in GPU:
        for wrong in NO_NUMBER:
            assert refusal(find_gpu, str(written(path, GPU | {name: wrong}))), (name, wrong)
    assert refusal(find_gpu, str(written(path, GPU | {"x": 1})))


def test_suites(folder: Path, task: Path) -> None:
    path, right = folder / "suite.yaml", {"domain_tasks": [str(task)], "seeds": 2}

    def read(content: Any) -> str | None:
        return refusal(lambda: load_suite(written(path, content)).load_tasks())

    assert read(right) is None
    for name, values in SUITE.items():
        for wrong in values:
            assert read(right | {name: wrong}), (name, wrong)
    for name, values in RECIPE.items():
        for wrong in values:
            for where in ({"recipe": {name: wrong}}, {"task_recipes": {"task": {name: wrong}}}):
                assert read(right | where), (name, wrong)


def test_end_tasks(task: Path) -> None:
    path = task / "train.jsonl"
    kept = path.read_text()
    for name in ("text", "label", "text_pair"):
        for wrong in (
            [],
            {},
            ["x"],
            float("nan"),
            float("inf"),
            True,
            *([3, 1.5] if name != "label" else []),
        ):
            line = json.dumps({"text": "t", "label": "a", name: wrong})
            path.write_text(f"{kept}{line}\n")
            assert refusal(load_task, task), line
    for line in ("3", "[]", "null", "{", DEEP, DIGITS, '{"text": "\\ud800", "label": "a"}'):
        path.write_text(f"{kept}{line}\n")
        assert refusal(load_task, task), line[:40]
    path.write_text(kept)


def read_all(path: Path) -> None:
    options = ReadOptions("text", whole_files=False)
    for number, source in enumerate(find_sources([str(path)])):
        for segment in segments(number, source, options, 1 << 20):
            list(read_segment(source, segment, options, Records()))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_text(name: str, folder: Path) -> None:
    path = folder / name
    for value in ("3", "[]", "{}", "null", "NaN", "true", "1e400", DIGITS, DEEP, '{"text": "a"'):
        for record in (value, f'{{"text": {value}}}'):
            path.write_text(record if name == "a.jsonl" else f"[{record}]")
            right = (name, record) == ("a.jsonl", "[]") or record == '{"text": null}'
            assert refusal(read_all, path) or right, record[:40]


def test_examples_that_are_excluded(folder: Path) -> None:
    path = folder / "examples.jsonl"
    for value in ("3", "[]", "{}", "null", "NaN", "true", DIGITS, DEEP, '"\\ud800"'):
        for line in (value, f'{{"text": {value}}}', f'{{"text": "a", "text_pair": {value}}}'):
            path.write_text(line + "\n")
            refused = refusal(Overlap, [str(path)])
            right = line.startswith("{") and ('"text_pair": null' in line or "ud800" in line)
            assert refused or right, line[:40]


def test_saved_datasets(folder: Path) -> None:
    saved = folder / "saved"
    saved.mkdir()
    for content in (
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"splits": 3}',
        '{"splits": [3]}',
        '{"splits": {}}',
        DEEP,
        DIGITS,
    ):
        (saved / "dataset_dict.json").write_text(content)
        assert refusal(find_sources, [str(saved)]), content[:40]


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
         "max_position_embeddings")  # fmt: skip
NO_SIZE: tuple[Any, ...] = ("x", "", -1, 0, 1.5, True, [], {}, None, float("nan"), float("inf"), HUGE, 10**9)


@pytest.fixture(scope="module")
def model(world: SmallWorld, folder: Path) -> Path:
    return Path(shutil.copytree(world.model, folder / "model"))


def test_configs_of_models(model: Path, folder: Path) -> None:
    path = model / "config.json"
    kept = path.read_text()
    config = json.loads(kept)
    readers: tuple[Callable[[], Any], ...] = (lambda: load_model(str(model)), lambda: find_config(str(path)))
    for name in SIZES:
        for wrong in NO_SIZE:
            path.write_text(json.dumps(config | {name: wrong}))
            assert refusal(readers[0]), (name, wrong)
            assert refusal(readers[1]) or wrong == 10**9, (name, wrong)
    for content in (
        "",
        "{",
        "[]",
        "3",
        "null",
        "{}",
        DEEP,
        DIGITS,
        f'{{"model_type": {DIGITS}}}',
        '{"model_type": 3}',
    ):
        path.write_text(content)
        for read in readers:
            assert refusal(read), content[:40]
    path.write_text(kept)


@fuzz(40)
@given(data=st.data())
def test_any_json_in_any_place_of_a_config(data: st.DataObject, model: Path) -> None:
    path = model / "config.json"
    kept = path.read_text()
    config = json.loads(kept)
    at = data.draw(st.sampled_from([at for at, _ in places(config)]))
    try:
        path.write_text(json.dumps(changed_at(config, at, data.draw(JSON))))
        refusal(load_model, str(model))
    finally:
        path.write_text(kept)


def test_other_files_of_a_model(model: Path) -> None:
    for name, contents in {
        "model.safetensors.index.json": (
            "", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../x"}}',
            '{"weight_map": {"a": "/etc/passwd"}}', '{"weight_map": {"a": "a\\u0000b"}}', DEEP, DIGITS,
        ),
        "adapter_config.json": ("", "[]", "{}", '{"base_model_name_or_path": 3}', DEEP, DIGITS),
    }.items():  # fmt: skip
        for content in contents:
            (model / name).write_text(content)
            assert refusal(load_model, str(model)), (name, content[:40])
        (model / name).unlink()


@fuzz(100)
@given(data=st.data())
def test_settings_of_a_run(data: st.DataObject, folder: Path) -> None:
    path = folder / "config.yaml"
    right = {
        "method": "dga",
        "corpus": ["c"],
        "max_steps": 3,
        "bf16": True,
        "learning_rate": 1e-4,
        "mix": None,
    }
    name = data.draw(st.sampled_from(sorted(right)))
    wrong = data.draw(st.sampled_from(({}, {"a": 1}, [[1]], [{}], float("nan"), float("inf"), 10**400)))
    path.write_text(yaml.safe_dump(right | {name: wrong}))
    assert refusal(read_settings, path), (name, wrong)
