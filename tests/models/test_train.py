import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kvote.models import train, world

TINY = train.Recipe(tokens=6 * 192, batch_tokens=192, lengths=((0.5, 96), (1.0, 192)), warmup=2)


def run(out, recipe=TINY, **options):
    return train.train(out, recipe=recipe, check_samples=0, log_every=1, progress=False, **options)


def test_stopped_and_resumed_equals_uninterrupted(tmp_path):
    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", stop_after=4)
    parts = run(tmp_path / "parts")
    for name in ("whole", "parts"):
        assert [p.name for p in (tmp_path / f"{name}.checkpoints").iterdir()] == ["step-00000006"]
    one, two = (load_file(tmp_path / f"{n}.checkpoints/step-00000006/state.safetensors") for n in ("whole", "parts"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-7)
    logs = [[json.loads(line) for line in (o / "training.jsonl").read_text().splitlines()] for o in (whole, parts)]
    assert [row["step"] for row in logs[1]] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]
    assert [row["length"] for row in logs[0]] == [96] * 3 + [192] * 3


def test_a_resumed_log_forgets_steps_taken_again(tmp_path):
    run(tmp_path / "out", stop_after=3)
    log = tmp_path / "out" / "training.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 4, "loss": 0.0}) + "\n")
    run(tmp_path / "out", stop_after=4)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[3]["loss"] > 0


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    run(tmp_path / "out", stop_after=1)
    with pytest.raises(ValueError, match="another recipe"):
        run(tmp_path / "out", train.Recipe(tokens=6 * 192, batch_tokens=192, lengths=TINY.lengths, warmup=3))
    run(tmp_path / "out", train.Recipe(tokens=192, batch_tokens=192, seed=1), resume=False)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.4, 0.6, 0.9])
def test_batches_depend_on_seed_and_step_alone(share):
    recipe = train.Recipe()
    step = int(share * recipe.steps)
    ids, weights = train.batch(recipe, step)
    length = recipe.length(step)
    assert ids.shape == weights.shape == (6144 // length, length)
    assert (ids[:, 0] == world.BOS).all()
    assert ids.max() < world.VOCABULARY_SIZE
    again, _ = train.batch(recipe, step)
    other, _ = train.batch(train.Recipe(seed=1), step)
    assert np.array_equal(ids, again)
    assert not np.array_equal(ids, other)


@pytest.mark.parametrize("task", world.TASKS)
def test_answers_weigh_one_and_filler_nothing(task):
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids, weights = train.question_row(task, 1024, *train._amounts(task, 1024, False, rng), rng)
        assert len(ids) == len(weights) == 1024
        ends = ids == world.EOT
        assert ends.any()
        assert (weights[ends] == train.ANSWER).all()
        assert set(np.unique(weights).astype(float).round(4).tolist()) <= {0.0, 0.01, 0.5, 1.0}
        assert weights[0] == 0


def test_weights_of_a_prompt():
    prompt = world.encode("for lakehill mentioned ? for lakehill is :")
    expected = [train.TEMPLATE, 0, train.TEMPLATE, train.TEMPLATE, train.TEMPLATE, train.REPEATED]
    np.testing.assert_allclose(train.token_weights(prompt), [*expected, train.TEMPLATE, train.TEMPLATE])


def test_the_rate_warms_up_and_ends_near_zero():
    recipe = train.Recipe()
    rates = [recipe.rate(step) for step in range(recipe.steps)]
    assert rates[0] < 2e-5
    assert max(rates) == recipe.learning_rate
    assert rates[-1] < 1e-8
