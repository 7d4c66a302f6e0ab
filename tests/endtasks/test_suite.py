"""Suites read from YAML; mistakes name the line."""

from pathlib import Path

import pytest
import yaml

from dga_scale.endtasks.suite import Suite, load_suite
from dga_scale.errors import UserError
from tests.helpers.ranks import REPOSITORY
from tests.helpers.tiny_tasks import write_task

TASK = "domain_tasks: tasks/aclarc_citation_intent\n"


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("corpora/acl/validation", "corpora/wiki", "other/wiki"):
        (tmp_path / name).mkdir(parents=True)
    write_task(tmp_path / "tasks" / "aclarc_citation_intent")
    monkeypatch.chdir(tmp_path)


def read(text: str) -> Suite:
    Path("suite.yaml").write_text(text)
    return load_suite(Path("suite.yaml"))


def test_values_and_defaults():
    suite = read(
        "domain_corpora: corpora/acl/validation\ngeneral_corpora:\n  - corpora/wiki\nseeds: 4\njobs:\n"
        "domain_tasks: [tasks/aclarc_citation_intent]\n"
        "recipe: {learning_rate: 3e-5, max_train_examples: 10}\n"
    )
    assert list(suite.corpora()) == [
        ("domain", "acl", "corpora/acl/validation"),
        ("general", "wiki", "corpora/wiki"),
    ]
    assert (suite.seeds, suite.jobs, suite.max_eval_rows) == (4, 1, 2000)
    ((kind, task, recipe),) = suite.load_tasks()
    assert (kind, task.name, len(task.train)) == ("domain", "aclarc_citation_intent", 10)
    assert (recipe.learning_rate, recipe.epochs) == (3e-5, 10)


def test_recipes_of_single_tasks_go_before_the_shared_one():
    write_task(Path("tasks/trec"), dev=10)
    suite = read(
        "domain_tasks: tasks/aclarc_citation_intent\ngeneral_tasks: [tasks/trec]\n"
        "recipe: {epochs: 7, batch_size: 4, max_test_examples: 6}\n"
        "task_recipes:\n  trec: {epochs: 2, max_dev_examples: 3}\n"
    )
    (_, intent, one), (_, trec, two) = suite.load_tasks()
    assert [(one.epochs, one.batch_size), (two.epochs, two.batch_size)] == [(7, 4), (2, 4)]
    assert [(len(t.train), len(t.dev), len(t.test)) for t in (intent, trec)] == [(48, 0, 6), (48, 3, 6)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", r"suite\.yaml: not YAML"),
        ("- a\n", r"names nothing to evaluate\. Write"),
        ("seeds: 3\n", r"names nothing to evaluate: none of domain_corpora"),
        ("seeds: 3\n\ndomain_corpus: x\n", r"suite\.yaml:3: unknown key 'domain_corpus'. Did you mean"),
        ("general_corpora:\n- corpora/wiki\n- wik\n", r"suite\.yaml:3: general_corpora: wik: no such"),
        ("domain_tasks: 3\n", r"suite\.yaml:1: domain_tasks must be a list of paths, not 3"),
        ("seeds: 0\n", r":1: seeds 0: must be at least 1"),
        ("seeds: true\n", r":1: seeds must be a whole number, not true"),
        ("text_field: 3\n", r":1: text_field must be text, not 3"),
        ("recipe: 3\n", r":1: recipe must hold settings"),
        ("seeds: 1\nrecipe: {epoch: 3}\n", r":2: recipe has an unknown setting 'epoch'. Did you mean epochs"),
        ("recipe: {epochs: 2.5}\n", r":1: recipe: epochs must be a whole number, not 2.5"),
        ("recipe: {learning_rate: fast}\n", r":1: recipe: learning_rate must be a number, not \"fast\""),
        ("task_recipes: 3\n", r":1: task_recipes must hold a recipe by task, such as"),
        (f"{TASK}task_recipes:\n  aclarc_intent: {{}}\n", r":3: .* task 'aclarc_intent'\. Did you mean acl"),
        (f"{TASK}task_recipes:\n  any: {{epoch: 3}}\n", r":3: recipe has an unknown setting 'epoch'"),
        ("general_corpora: [corpora/wiki, other/wiki]\n", r"two folders are called wiki"),
    ],
)  # fmt: skip
def test_mistakes_name_the_line(text: str, message: str):
    with pytest.raises(UserError, match=message):
        read(text)


def test_no_such_file():
    with pytest.raises(UserError, match=r"none\.yaml: No such file"):
        load_suite(Path("none.yaml"))


def test_a_recipe_that_can_not_be_meant():
    suite = read("domain_tasks: tasks/aclarc_citation_intent\nrecipe: {precision: fp8}\n")
    with pytest.raises(UserError, match="--precision fp8: must be bf16 or fp32"):
        suite.load_tasks()


def test_the_suites_that_come_along_are_read(tmp_path: Path):
    files = list((REPOSITORY / "launchers" / "suites").glob("*.yaml"))
    assert files
    for file in files:
        for key, value in yaml.safe_load(file.read_text()).items():
            for folder in value if key.endswith(("corpora", "tasks")) else ():
                (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        assert load_suite(file).seeds >= 3
