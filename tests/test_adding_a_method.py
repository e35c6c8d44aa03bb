"""CONTRIBUTING's section on adding a method, followed as it stands: four methods, in a copy of the package."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kvote

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^```python\n# (kvote/\S+\.py)\n(.*?)^```", re.S | re.M)
FILES = dict(_BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text()))
ADDED = [Path(name).stem for name in FILES if name.startswith("kvote/methods/")]

# Run in the copy: what a user of the new methods would do.
TRIED = """
import json, sys
sys.path.insert(0, sys.argv[1])
import tiny, torch, kvote
net, tokens, told = tiny.model(), tiny.ids(2, 200), {}
native = tiny.generate(net, tokens).sequences.tolist()
dense = tiny.cache(net)
tiny.generate(net, tokens, dense)
for spec in json.loads(sys.argv[2]):
    cache = tiny.cache(net, spec)
    said = tiny.generate(net, tokens, cache)
    layer = cache.report().layers[0]
    told[spec] = {
        "same": said.sequences.tolist() == native,
        "held": layer.tokens_held,
        "read": layer.tokens_read,
        "smaller": cache.nbytes() < dense.nbytes(),
        "finite": all(logits.isfinite().all().item() for logits in said.logits),
    }
beams = tiny.generate(net, tokens, tiny.cache(net, "eightbits | strided"), num_beams=2).sequences
told["beams"] = list(beams.shape)
try:
    kvote.Cache(net, "eightbits | tokenselect")
except kvote.MethodError as error:
    told["refused"] = str(error)
print(json.dumps(told))
"""


SPECS = (
    "lastfew",
    "newest",
    "strided(step=1)",
    "lastfew(sinks=2, recent=9)",
    "newest(count=9)",
    "strided(step=3)",
    "eightbits",
    "newest(count=9) | strided",
    "snapkv(budget=20, window=6) | eightbits",
    "eightbits | strided",
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("copy")
    weights = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(Path(kvote.__file__).parent, root / "kvote", ignore=weights)
    for name, text in FILES.items():
        path = root / name
        assert not path.exists(), f"{name} would replace a file of kvote's"
        path.write_text(text)
    # An editable installation of kvote would come before the copy.
    (root / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith('_editable')]\n"
    )
    front = root / "kvote" / "methods" / "__init__.py"
    text = front.read_text()
    for name in ADDED:
        imported = f"from kvote.methods.{name} import {name}\n"
        text = text.replace("\n__all__ = [", f"{imported}\n__all__ = [\n    {name!r},", 1)
    front.write_text(text)
    return root


def run(copy: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_keeper_a_reader_and_a_store_are_added_by_the_text_alone(copy):
    assert ADDED == ["lastfew", "newest", "strided", "eightbits"]
    told = json.loads(run(copy, "-c", TRIED, str(ROOT / "tests"), json.dumps(SPECS)).splitlines()[-1])
    # Of 208 tokens in each of two sequences, the last is not in the cache.
    for spec in ("lastfew", "newest", "strided(step=1)"):
        assert told[spec]["same"], spec
        assert told[spec]["held"] == 2 * 207
    assert told["lastfew(sinks=2, recent=9)"]["held"] == 2 * 11
    assert told["newest(count=9)"]["held"] == 2 * 9
    assert told["strided(step=3)"]["read"] == 69
    assert (told["newest(count=9) | strided"]["held"], told["newest(count=9) | strided"]["read"]) == (18, 5)
    assert told["eightbits"]["smaller"]
    assert all(each["finite"] for each in told.values() if isinstance(each, dict))
    assert told["beams"] == [2, 208]
    assert "keys as the model rotated them, but the reader needs them without rotation" in told["refused"]


def test_the_command_line_lists_what_was_added(copy):
    listed = run(copy, "-m", "kvote.cli", "methods")
    for name in ADDED:
        assert re.search(rf"\b{name}\b", listed), name
