"""`kvote eval --ray`: the same folder, measured by workers of a Ray cluster."""

import gc
import json
import os
import socket
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest

from kvote import InputError
from kvote.cli import main
from kvote.cli.eval import open_subject
from kvote.eval.folder import read_records
from kvote.eval.machines import cluster, identity_of
from kvote.eval.plan import Plan
from kvote.eval.run import run

SPEC = "streamingllm(window=64)"
PLAN = Plan(("world",), (200, 300), 1, ("dense", SPEC))
COST = {"seconds", "prefill_seconds", "ms_per_token"}


def test_without_ray_one_sentence_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["eval", "--out", str(tmp_path / "new"), "--ray", "auto"]) == 2
    assert "pip install 'kvote[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def ray():
    found = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_raylet_start_wait_time_s", "240")
        # Workers import what this process imports.
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        found.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield found
        found.shutdown()
        with warnings.catch_warnings():
            # Ray forgets the processes that it has just ended.
            warnings.simplefilter("ignore")
            gc.collect()


def measured(folder, dtype, load):
    """Records that come from workers which ``load`` the model; here its weights are of ``dtype``."""
    subject = open_subject(None, raw=False, dtype=dtype)
    with cluster("auto") as machines:
        elsewhere = partial(machines.records, identity=identity_of(PLAN, subject))
        return run(PLAN, folder, load, workers=2, elsewhere=elsewhere)


pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.slow
def test_two_workers_measure_what_one_process_does(ray, tmp_path):
    given = ["eval", "--lengths", "200", "300", "--samples", "1", "--no-baselines", "--methods", SPEC, "--out"]
    assert main([*given, str(tmp_path / "here")]) == 0
    assert main([*given, str(tmp_path / "there"), "--ray", "auto", "--workers", "2"]) == 0
    here, there = (read_records(tmp_path / name) for name in ("here", "there"))
    assert here.keys() == there.keys()
    for key, record in here.items():
        other = there[key]
        assert {name: record[name] for name in record.keys() - COST} == {
            name: other[name] for name in other.keys() - COST
        }
    assert json.loads((tmp_path / "there" / "manifest.json").read_text())["runs"][0]["workers"] == 2
    assert (tmp_path / "there" / "report.html").exists()


@pytest.mark.slow
def test_the_sample_of_a_worker_that_died_is_measured_again(ray, tmp_path):
    died = str(tmp_path / "died")

    def load():
        try:
            os.close(os.open(died, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return open_subject(None, raw=False, dtype="bfloat16")
        os._exit(1)

    assert measured(tmp_path, "bfloat16", load) == 4
    assert os.path.exists(died)
    assert {record["name"] for record in read_records(tmp_path).values()} == {"dense", SPEC}


@pytest.mark.slow
def test_a_worker_with_another_model_is_refused_by_name(ray, tmp_path):
    load = partial(open_subject, None, raw=False, dtype="bfloat16")
    with pytest.raises(InputError, match="as model and dtype is not what kvote eval was started with"):
        measured(tmp_path, "float16", load)
    assert read_records(tmp_path) == {}


def test_an_address_where_nobody_listens_is_refused_at_once(tmp_path, capsys, monkeypatch):
    found = pytest.importorskip("ray")
    # The other tests may have joined a cluster, which would be taken.
    monkeypatch.setattr(found, "is_initialized", lambda: False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    assert main(["eval", "--out", str(tmp_path / "new"), "--ray", address]) == 2
    assert f"No Ray cluster answers at '{address}'" in capsys.readouterr().err
