import inspect
import json
import os
import signal
import subprocess
import sys
import time

import pytest

import kvote
from kvote.cli import main
from kvote.method import METHODS
from kvote.models.presets import PRESETS, fitted, preset, with_presets
from kvote.spec import parse

COMMANDS = ("ask", "chat", "read", "info", "methods", "env", "bench", "will-it-help", "calibrate", "train-embedded")


@pytest.mark.parametrize("argv", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS), ["--no"]])
def test_help_does_not_wait_for_torch(argv):
    code = (
        "import sys\nfrom kvote.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code, *argv], check=True, capture_output=True, timeout=60)


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"kvote {kvote.__version__}\n"


def test_methods_lists_all_with_source_and_needs(capsys):
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["methods"]
    assert [row["name"] for row in rows] == sorted(METHODS)
    told = {"name", "rooms", "summary", "source", "needs"}
    assert all(row.keys() == told | {"package", "accuracy", "steps"} for row in rows)
    assert all(all(row[key] for key in told) for row in rows)
    assert all(row["package"] is None for row in rows)


def test_methods_is_one_line_a_method(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split()[0] for line in lines if line.split() and line.split()[0] in METHODS]
    assert rows == sorted(METHODS)
    # Beside them: the head, its rule, where to read more, and blank lines.
    assert len([line for line in lines if line.strip()]) == len(METHODS) + 4


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_page_of_a_method_tells_every_parameter_with_default_and_meaning(capsys, name):
    assert main(["methods", name]) == 0
    page = capsys.readouterr().out
    assert max(map(len, page.splitlines())) <= 80
    words = " ".join(page.split())
    made = METHODS[name]
    assert words.startswith(f"{name}: {made.summary}")
    assert f"Decides {made.rooms} Source {made.source} Needs {made.needs}" in words
    assert main(["methods", name, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    signature = inspect.signature(made.build).parameters
    assert [(each["name"], each["default"]) for each in told["parameters"]] == [
        (parameter.name, repr(parameter.default)) for parameter in signature.values()
    ]
    for parameter in told["parameters"]:
        assert parameter["meaning"], f"the docstring does not say what {parameter['name']} means"
        assert f"{parameter['name']} {parameter['default']}"[:20] in words
    assert sorted(each["method"] for each in told["composes"]) == sorted(METHODS.keys() - {name})


def test_the_page_of_a_method_in_full(capsys):
    assert main(["methods", "tokenselect"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "chunk 512 queries of a prompt that share one selection, made with their average." in words
    assert "sinks 128 see top_k." in words
    assert "- with the defaults: compresskv, critic, dense, " in words
    assert "- with per_head=False: cake, " in words
    assert "- not, since both decide what to read: " in words


def test_an_interrupted_command_ends_without_a_traceback():
    started = subprocess.Popen(
        [sys.executable, "-m", "kvote.cli", "ask", "--document", "-", "--question", "Why?"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Whoever started the tests may have told their children to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert started.stdin is not None
    # Larger than a pipe holds: when it is written, the command is reading, and soon waiting for more.
    started.stdin.write(b"word " * 40_000)
    time.sleep(0.5)
    started.send_signal(signal.SIGINT)
    assert started.wait(timeout=60) == 130
    assert started.stderr is not None
    assert started.stderr.read() == b"kvote: interrupted.\n"
    started.stdin.close()
    started.stderr.close()


def test_env_names_versions_and_says_why_a_backend_is_missing(capsys, monkeypatch):
    monkeypatch.setenv("KVOTE_BACKEND", "reference")
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"].keys() == {"kvote", "python", "torch", "transformers"}
    assert found["threads"] >= 1
    backends = {backend["name"]: backend for backend in found["backends"]}
    assert backends.keys() == {"reference", "fused", "cpu", "triton"}
    assert [name for name, backend in backends.items() if backend["in_use"]] == ["reference"]
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert all(backend["missing"] in " ".join(out.split()) for backend in backends.values() if backend["missing"])


def test_env_without_what_linux_tells(monkeypatch):
    from kvote import env

    monkeypatch.setattr(env, "_fields", lambda path: {})
    assert env.environment().simd == []
    assert env.memory()[1] == 0


def test_train_embedded_trains_and_resumes(capsys, tmp_path):
    argv = ["train-embedded", "--out-dir", str(tmp_path / "m"), "--tokens", "12288", "--no-progress"]
    argv += ["--check-samples", "0", "--log-every", "1"]
    assert main([*argv, "--stop-after", "1"]) == 0
    assert main(argv) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'm'}\n" * 2
    log = (tmp_path / "m" / "training.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in log] == [1, 2]
    assert (tmp_path / "m" / "model.safetensors").is_file()


@pytest.mark.parametrize("option", ["", "--json", "--table", "kivi"])
def test_a_reader_that_leaves_is_no_error(option):
    command = f"{sys.executable} -m kvote.cli methods {option} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_methods_that_fit_the_trained_length(name):
    assert parse(preset(name)).spec.startswith(name)
    read = PRESETS[name]
    assert sum(read.get(part, 0) for part in ("top_k", "sinks", "window", "chunk")) <= 1024


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("tokenselect", preset("tokenselect")),
        ("tokenselect()", "tokenselect()"),
        ("tokenselect(top_k=8)", "tokenselect(top_k=8)"),
        ("dense | streamingllm", "dense|streamingllm(sinks=16, window=1008)"),
        ("nothing", "nothing"),
    ],
)
def test_only_bare_names_mean_presets(spec, meant):
    assert with_presets(spec) == meant


@pytest.mark.parametrize(
    ("spec", "trained", "meant"),
    [
        ("tokenselect", 1024, "tokenselect(top_k=512, sinks=16, window=256, chunk=128)"),
        ("random", 2048, "random(top_k=1024, sinks=32, window=512, chunk=256)"),
        ("kivi | tokenselect", 512, "kivi | tokenselect(top_k=256, sinks=8, window=128, chunk=64)"),
        ("streamingllm", 512, "streamingllm(sinks=8, window=504)"),
        ("streamingllm", 2048, "streamingllm"),
        ("tokenselect", 4096, "tokenselect"),
        ("tokenselect", None, "tokenselect"),
        ("tokenselect(top_k=2048)", 1024, "tokenselect(top_k=2048)"),
        ("snapkv", 1024, "snapkv"),
    ],
)
def test_bare_names_that_read_more_than_a_model_was_trained_on_read_less(spec, trained, meant):
    assert fitted(spec, trained) == meant
    assert parse(meant)


@pytest.mark.parametrize(
    ("redirected", "sentence"),
    [
        (">/dev/full", "Standard output leads to a full device, so that the result could not be written."),
        (">&-", "Standard output is closed, so that the result could not be printed."),
    ],
)
def test_output_that_cannot_be_written_is_found_out_before_anything_is_done(redirected, sentence):
    command = f"{sys.executable} -m kvote.cli ask --model ./gone {redirected}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=120, text=True)
    assert (done.returncode, done.stderr) == (2, f"kvote: {sentence}\n")


def test_what_the_output_cannot_encode_is_written_out():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "KVOTE_BACKEND": "reference"}
    command = [sys.executable, "-m", "kvote.cli", "methods"]
    done = subprocess.run(command, capture_output=True, timeout=120, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"tokenselect" in done.stdout
