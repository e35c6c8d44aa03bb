"""The recipe of the embedded model: a small Llama trained from nothing on the world's questions, on the CPU.

Batches depend on the seed and the step alone, so a run that was stopped goes on as if it never had been.
"""

from __future__ import annotations

import json
import math
import os
import queue
import shutil
import threading
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from kvote.models import tokenizer, world

Value = TypeVar("Value", int, float)
Row = tuple[np.ndarray, np.ndarray]  # ids and loss weights of the same shape

ANSWER, REPEATED, TEMPLATE = 1.0, 0.5, 0.01  # loss weights; filler and first mentions weigh nothing
MIX = {  # share of each task once copies have done their work
    "needle": 0.55,
    "passkey": 0.12,
    "kv": 0.08,
    "multi_key": 0.07,
    "multi_value": 0.07,
    "variables": 0.06,
    "turns": 0.05,
}
EARLY_MIX = {"needle": 0.7, "passkey": 0.15, "kv": 0.15}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, apart from the machine's arithmetic."""

    tokens: int = 28_000_000
    seed: int = 0
    batch_tokens: int = 6144
    lengths: tuple[tuple[float, int], ...] = ((0.30, 96), (0.45, 192), (0.65, 384), (1.0, 1024))  # until share, length
    copies: tuple[tuple[float, float], ...] = ((0.20, 0.7), (0.30, 0.3), (1.0, 0.1))  # until share, odds of a copy row
    few_facts: float = 0.20  # until this share of the run a sample has at most two facts
    learning_rate: float = 2e-3
    warmup: int = 150
    weight_decay: float = 0.01
    clip: float = 1.0

    @property
    def steps(self) -> int:
        return max(self.tokens // self.batch_tokens, 1)

    def length(self, step: int) -> int:
        return _until(self.lengths, step / self.steps)

    def rate(self, step: int) -> float:
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        share = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def _until(table: tuple[tuple[float, Value], ...], share: float) -> Value:
    return next((value for until, value in table if share < until), table[-1][1])


def config() -> LlamaConfig:
    """3.9 million parameters: 4 layers, hidden 256, 8 query and 2 KV heads of size 32, 1,024 positions."""
    return LlamaConfig(
        vocab_size=world.VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        pad_token_id=world.PAD,
        bos_token_id=world.BOS,
        eos_token_id=world.EOT,
    )


def token_weights(ids: np.ndarray) -> np.ndarray:
    """Loss weight of each token of a fact or a prompt: its template, and keys or values it says a second time."""
    content = ids < world.FIRST_WORD
    weights = np.where(content, 0.0, TEMPLATE).astype(np.float32)
    seen = set()
    for i in np.flatnonzero(content).tolist():
        token = int(ids[i])
        weights[i] = REPEATED if token in seen else 0.0
        seen.add(token)
    return weights


def question_row(task: str, length: int, facts: int, asked: int, rng: np.random.Generator) -> Row:
    """A document and its questions with answers, ids [length] and loss weights [length]."""
    what = world.plan(task, rng, facts, asked)
    ids: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    for ask in what.asks:
        ids += [ask.prompt, ask.answer, np.array([world.EOT])]
        weights += [token_weights(ask.prompt), np.full(len(ask.answer) + 1, ANSWER, np.float32)]
    turns = np.concatenate(ids)
    document, starts = world.lay_out(what.facts, length - len(turns), rng)
    spoken = np.zeros(len(document), np.float32)
    for start, fact in zip(starts, what.facts, strict=True):
        spoken[start : start + len(fact)] = token_weights(fact)
    return np.concatenate([document, turns]), np.concatenate([spoken, *weights])


def copy_row(length: int, rng: np.random.Generator) -> Row:
    """Random segments, each said twice with filler between: ids [length] and weights on the second saying."""
    ids = [np.array([world.BOS])]
    weights = [np.zeros(1, np.float32)]
    left = length - 1
    while left > 0:
        size = int(rng.integers(4, 25))
        segment = rng.integers(world.FIRST_NUMBER, world.VOCABULARY_SIZE, size=size)
        gap = world.haystack(int(rng.integers(2, max(left // 4, 3))), rng)
        again = np.full(size, ANSWER, np.float32)
        again[0] = 0.0  # nothing says that the segment starts here
        ids += [segment, gap, segment]
        weights += [np.zeros(size + len(gap), np.float32), again]
        left -= 2 * size + len(gap)
    return np.concatenate(ids)[:length], np.concatenate(weights)[:length]


def batch(recipe: Recipe, step: int) -> Row:
    """Ids and loss weights [rows, length] of a step, of batch_tokens tokens or as near as whole rows come."""
    share, length = step / recipe.steps, recipe.length(step)
    rng = np.random.default_rng([recipe.seed, step])
    mix = EARLY_MIX if share < recipe.few_facts else MIX
    rows = []
    for _ in range(max(recipe.batch_tokens // length, 1)):
        if rng.random() < _until(recipe.copies, share):
            rows.append(copy_row(length, rng))
            continue
        task = rng.choice(list(mix), p=np.array(list(mix.values())) / sum(mix.values()))
        facts, asked = _amounts(str(task), length, share < recipe.few_facts, rng)
        rows.append(question_row(str(task), length, facts, asked, rng))
    ids, weights = zip(*rows, strict=True)
    return np.stack(ids), np.stack(weights)


def _amounts(task: str, length: int, few: bool, rng: np.random.Generator) -> tuple[int, int]:
    """How many facts and questions: at most what fits in length, most of them asked, often as few as in real use."""
    room = length - 2
    if task == "kv":  # 5 tokens a pair, at most 18 a question
        asked = int(rng.integers(1, 3 if length < 128 else 9))
        most = min((room - 18 * asked - 3) // 5, 100)
        return int(rng.integers(1, most + 1)) if not few else 2, asked
    if task == "passkey":
        return 1, 1
    if task == "variables":  # 6 tokens a fact, 14 a question
        most = max(room // 20, 2)
        return int(rng.integers(2, most + 1)), most
    if task in ("multi_key", "multi_value"):  # 13 tokens a fact, at most 39 a question about two of them
        most = max(room // 34, 2)
        return int(rng.integers(2, most + 1)), most
    most = min(room // 38, 2 if few else 64)  # 13 tokens a fact, 25 a question
    facts = int(rng.integers(1, most + 1)) if few or rng.random() < 0.7 else int(rng.integers(1, min(most, 8) + 1))
    return facts, max(facts - int(rng.integers(0, facts // 3 + 1)), 1)


def _batches(recipe: Recipe, first: int) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
    """Batches from a step on, made ahead by a thread: the arithmetic of a step leaves the interpreter idle."""
    ready: queue.Queue[tuple[torch.Tensor, torch.Tensor]] = queue.Queue(maxsize=4)
    stop = threading.Event()

    def work() -> None:
        for step in range(first, recipe.steps):
            ids, weights = batch(recipe, step)
            item = torch.from_numpy(ids), torch.from_numpy(weights)
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if stop.is_set():
                return

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        for _ in range(first, recipe.steps):
            yield ready.get()
    finally:
        stop.set()
        thread.join()


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Weighted cross entropy of ids [rows, length], and the share of answer tokens guessed right.

    The head runs only where a token weighs something: a tenth of the positions in a long row.
    """
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    target, weight = ids[:, 1:], weights[:, 1:]
    counts = weight > 0
    logits = F.linear(hidden[counts], model.lm_head.weight).float()
    target, weight = target[counts], weight[counts]
    loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
    answers = weight == ANSWER
    right = (logits.detach().argmax(-1) == target)[answers].float().mean().item()
    return loss, right


@torch.no_grad()
def exact(model: LlamaForCausalLM, task: str, length: int, samples: int, facts: int = 4, seed: int = 1) -> float:
    """Share of answers right to the last token, one question a document of at most 8 facts.

    Teacher-forced: an answer is right when each token is the likeliest one after the true tokens before it, which is
    when greedy generation gives it.
    """
    rng = np.random.default_rng([seed, length, world.TASKS.index(task), 1])
    ids, weights = map(np.stack, zip(*(question_row(task, length, facts, 1, rng) for _ in range(samples)), strict=True))
    hidden = model.model(input_ids=torch.from_numpy(ids), use_cache=False).last_hidden_state[:, :-1]
    answers = torch.from_numpy(weights)[:, 1:] == ANSWER
    guesses = F.linear(hidden[answers], model.lm_head.weight).argmax(-1)
    wrong = torch.zeros(answers.shape, dtype=torch.bool)
    wrong[answers] = guesses != torch.from_numpy(ids)[:, 1:][answers]
    return 1 - wrong.any(-1).float().mean().item()


def train(
    out_dir: str | Path,
    tokens: int = Recipe.tokens,
    seed: int = Recipe.seed,
    resume: bool = True,
    *,
    checkpoints: str | Path | None = None,
    checkpoint_seconds: float = 240.0,
    log_every: int = 25,
    check_every: int = 200,
    check_samples: int = 48,
    stop_after: int | None = None,
    progress: bool = True,
    recipe: Recipe | None = None,
) -> Path:
    """Train the embedded model and write it, in Hugging Face format, to out_dir.

    tokens is the length of the whole run, and the schedule scales with it; recipe overrides tokens and seed. The
    state for resuming goes to checkpoints (default: out_dir with ".checkpoints" appended) every checkpoint_seconds;
    the model so far goes to out_dir at the same times. out_dir/training.jsonl logs loss, the share of answer tokens
    right and exact accuracy on needles. stop_after ends this call after so many steps of the whole, as an
    interruption would. Returns out_dir. Raises ValueError when a checkpoint is of another recipe.
    """
    recipe = recipe or Recipe(tokens=tokens, seed=seed)
    out = Path(out_dir)
    store = Path(checkpoints) if checkpoints is not None else out.with_name(out.name + ".checkpoints")
    out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM._from_config(config(), attn_implementation="sdpa", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    first, seconds = _load(store, recipe, model, optimizer) if resume else (0, 0.0)
    log = _open_log(out / "training.jsonl", first)
    end = min(recipe.steps, stop_after or recipe.steps)
    started = saved = time.monotonic()
    model.train()
    bar = tqdm(total=recipe.steps, initial=first, unit="step", disable=not progress, mininterval=2.0)
    feed = _batches(recipe, first)
    try:
        for step in range(first, end):
            ids, weights = next(feed)
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
            with torch.autocast("cpu", torch.bfloat16):
                loss, right = loss_of(model, ids, weights)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            done, now = step + 1, time.monotonic()
            last = done == end
            bar.update()
            if done % log_every == 0 or done % check_every == 0 or last:
                row = {"step": done, "tokens": done * recipe.batch_tokens, "seconds": round(seconds + now - started, 1)}
                row |= {"length": ids.shape[1], "loss": round(loss.item(), 4), "lr": round(recipe.rate(step), 7)}
                row["answer_tokens"] = round(right, 4)
                if check_samples and (done % check_every == 0 or last):
                    row |= _check(model, ids.shape[1], check_samples)
                log.write(json.dumps(row) + "\n")
                log.flush()
                bar.set_postfix(length=row["length"], loss=row["loss"], answers=row["answer_tokens"])
            if last or now - saved > checkpoint_seconds:
                saved = now
                _save(store, recipe, model, optimizer, done, seconds + now - started)
                export(model, out)
    finally:
        feed.close()
        log.close()
        bar.close()
    return out


def _check(model: LlamaForCausalLM, length: int, samples: int) -> dict[str, float]:
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        few = 2 if length < 128 else 4
        row = {task: round(exact(model, task, length, samples, few), 4) for task in ("needle", "passkey")}
        if length == 1024:
            row |= {task: round(exact(model, task, length, samples), 4) for task in MIX if task not in row}
    model.train()
    return row


def export(model: LlamaForCausalLM, out: Path) -> None:
    """Write config, weights in bfloat16 (all that the forward pass read in training) and tokenizer."""
    half = LlamaForCausalLM(config())
    half.load_state_dict(model.state_dict())
    half.bfloat16()
    half.config.dtype = torch.bfloat16
    ids = {"pad_token_id": world.PAD, "bos_token_id": world.BOS, "eos_token_id": world.EOT}
    half.generation_config = GenerationConfig(do_sample=False, **ids)
    half.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    tokenizer.save(out)


def _save(
    store: Path, recipe: Recipe, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, step: int, seconds: float
) -> None:
    """Write step-N in one rename and drop the older ones, so that a kill at any time leaves one whole checkpoint."""
    final, draft = store / f"step-{step:08d}", store / f"draft-{step:08d}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    tensors = {}
    for name, p in model.named_parameters():
        tensors[f"weight.{name}"] = p.detach()
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state[p].items()}
    save_file(tensors, draft / "state.safetensors")
    state = {"step": step, "seconds": round(seconds, 1), "recipe": asdict(recipe)}
    (draft / "state.json").write_text(json.dumps(state, indent=1) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(draft, final)
    for other in (*store.glob("step-*"), *store.glob("draft-*")):
        if other != final:
            shutil.rmtree(other)


def _load(store: Path, recipe: Recipe, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Restore the newest checkpoint, if there is one: steps done and seconds spent."""
    found = sorted(store.glob("step-*"))
    if not found:
        return 0, 0.0
    state = json.loads((found[-1] / "state.json").read_text())
    if state["recipe"] != json.loads(json.dumps(asdict(recipe))):
        raise ValueError(f"{found[-1]} is a checkpoint of another recipe; delete it or choose another directory")
    with safe_open(found[-1] / "state.safetensors", "pt") as tensors, torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors.get_tensor(f"weight.{name}"))
            moments = ("step", "exp_avg", "exp_avg_sq")
            optimizer.state[p] = {key: tensors.get_tensor(f"{key}.{name}") for key in moments}
    return state["step"], state["seconds"]


def _open_log(path: Path, first: int) -> TextIO:
    """The log, without rows of steps that a resumed run will take again."""
    rows = path.read_text().splitlines() if first and path.exists() else []
    path.write_text("".join(row + "\n" for row in rows if json.loads(row)["step"] <= first))
    return path.open("a")


if __name__ == "__main__":
    import sys

    train(sys.argv[1], tokens=int(sys.argv[2]) if len(sys.argv) > 2 else Recipe.tokens)
