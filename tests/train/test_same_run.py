"""A rank that means another run than rank 0 is named, with what differs, before any work."""

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import dga_scale
from dga_scale.config.parsing import read_config
from dga_scale.errors import UserError
from dga_scale.launch.world import join_cluster
from dga_scale.train.cli import _outcome
from dga_scale.train.inputs import check_inputs
from dga_scale.train.same_run import check_same_data, check_same_program, own_folder
from tests.helpers.ranks import run_ranks
from tests.helpers.small import SmallWorld, make_world

HERE = socket.gethostname()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def hosts(world: SmallWorld, tmp_path: Path) -> Path:
    """What two hosts have under the same relative paths: ``0/`` and ``1/``."""
    for host in ("0", "1"):
        for path in (world.model, world.corpus):
            shutil.copytree(path, tmp_path / host / path.name)
        config = {"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}
        (tmp_path / host / "ds.json").write_text(json.dumps(config))
        (tmp_path / host / "run.yaml").write_text("learning_rate: 0.001\n")
    return tmp_path


def flags(**settings: object) -> list[str]:
    values = {
        "config": "run.yaml",
        "ds_config": "ds.json",
        "model": "./model",
        "corpus": "corpus",
        "output_dir": "run",
        "global_batch_size": 16,
        **settings,
    }
    return [f"--{name}={value}" for name, value in values.items()]


@contextlib.contextmanager
def within(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def outcome(hosts: Path, check: str, second: list[str]) -> str:
    """What comes of a check where rank 1 has ``second`` for its flags, each rank in its host's folder."""
    cluster = join_cluster()
    version = dga_scale.__version__
    with within(hosts / str(cluster.rank)):
        try:
            if check == "old code" and cluster.rank == 1:
                dga_scale.__version__ = "0.0.1"
            given = second if cluster.rank == 1 else flags()
            config = cluster.run_on_all(_outcome(lambda: read_config(given)))
            check_same_program(config, cluster)
            if check == "data":
                check_same_data(cluster.run_on_all(lambda: check_inputs(config, cluster)), cluster)
            if check == "folder":
                with own_folder(Path("run"), cluster, patience=0.3):
                    pass
        except UserError as error:
            return str(error)
        finally:
            dga_scale.__version__ = version
    return "the same"


def both(hosts: Path, check: str = "program", **settings: object) -> str:
    first, second = run_ranks(2, outcome, hosts, check, flags(**settings))
    assert first == second
    return first


def test_ranks_that_agree(hosts: Path) -> None:
    assert both(hosts, "data") == "the same"
    shutil.rmtree(hosts / "1")
    (hosts / "1").symlink_to(hosts / "0")
    assert both(hosts, "folder") == "the same"
    assert not (hosts / "0" / "run").exists()


def test_another_flag(hosts: Path) -> None:
    text = both(hosts, max_steps=7, seed=3)
    assert text.startswith(f"rank 1 on {HERE}: not the run of rank 0 on {HERE}: ")
    assert "--max_steps is 7, there 2500; --seed is 3, there 42: start all ranks with the same" in text


def test_another_yaml_file_and_a_missing_one(hosts: Path) -> None:
    (hosts / "1" / "run.yaml").write_text("learning_rate: 0.002\n")
    assert "--learning_rate is 0.002, there 0.001" in both(hosts)
    (hosts / "1" / "run.yaml").unlink()
    text = both(hosts)
    assert text.startswith(f"rank 1 on {HERE}: ")
    assert "run.yaml" in text


def test_another_deepspeed_json(hosts: Path) -> None:
    (hosts / "1" / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    text = both(hosts)
    assert (
        "ds.json: zero_optimization.stage is 2, there 1; ds.json: gradient_clipping is null, there 1.0"
        in text
    )


def test_other_code(hosts: Path) -> None:
    assert 'dga_scale is "0.0.1, code ' in both(hosts, "old code")


def test_a_corpus_and_a_model_of_the_same_name(hosts: Path, world: SmallWorld) -> None:
    shutil.rmtree(hosts / "1" / "corpus")
    shutil.copytree(world.general_corpus, hosts / "1" / "corpus")
    text = both(hosts, "data")
    assert "corpus corpus is " in text
    assert "corpus corpus/validation is " in text
    shutil.rmtree(hosts / "1" / "corpus")
    shutil.copytree(world.corpus, hosts / "1" / "corpus")
    config = hosts / "1" / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_dropout_prob": 0.3}))
    assert "--model ./model's config.json is " in both(hosts, "data")


def test_a_folder_of_each_host_for_itself(hosts: Path) -> None:
    text = both(hosts, "folder")
    assert text.startswith(
        f"rank 1 on {HERE}: --output_dir run is not the folder that rank 0 on {HERE} writes"
    )
    assert not (hosts / "0" / "run").exists()


def test_libraries_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    from dga_scale.train.same_run import _code

    found = _code()
    assert found["torch"] == metadata.version("torch")
    monkeypatch.setattr(metadata, "version", lambda package: "0.1")
    assert _code()["torch"] == "0.1"
    assert _code()["dga_scale"] == found["dga_scale"]
