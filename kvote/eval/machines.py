"""Runs a plan over the machines of a Ray cluster: their workers measure, this process writes."""

import os
import platform
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from kvote import __version__
from kvote.errors import InputError, KvoteError
from kvote.eval import prose
from kvote.eval.folder import Record
from kvote.eval.plan import Plan, Unit
from kvote.eval.run import Load, Todo, records_of
from kvote.eval.subject import Subject, model_digest, tokenizer_digest
from kvote.eval.template import Template

# How often a sample is measured again after the worker or the machine that measured it died.
RETRIES = 3
_SECONDS = 10
_SILENT = "No Ray cluster answers at '{}'; start one with `ray start --head`, or give the address of one."


@dataclass(frozen=True)
class Identity:
    """What must be equal on all machines."""

    kvote: str
    model: str
    dtype: str
    tokenizer: str
    template: Template
    stop_ids: tuple[int, ...]
    text: str
    files: tuple[tuple[str, str], ...]


def identity_of(plan: Plan, subject: Subject) -> Identity:
    """That of this machine. Raises InputError for a file that is not there."""
    return Identity(
        __version__,
        model_digest(subject.model),
        str(subject.model.dtype),
        tokenizer_digest(subject.tokenizer),
        subject.template,
        tuple(sorted(subject.stops)),
        prose.digest(),
        tuple(sorted((name, task.sha256) for name, task in plan.file_tasks().items())),
    )


@dataclass(frozen=True)
class Machines:
    """A cluster of ``count`` machines, each with at least ``cpus`` processors, and ``whole`` of them together."""

    ray: Any
    count: int
    cpus: int
    whole: int

    def records(self, plan: Plan, todo: Todo, load: Load, workers: int, identity: Identity) -> Iterator[Record]:
        """A record for everything in ``todo``, the costliest first, ``workers`` samples at a time; those of one sample
        come together. Raises KvoteError where one cannot be measured, or not as it would be here."""
        plan = replace(plan, files=tuple(map(_absolute, plan.files)))
        cpus = max(1, min(self.cpus, self.whole // workers))
        task = self.ray.remote(num_cpus=cpus, max_retries=RETRIES)(measured)
        waiting = sorted(todo, key=lambda item: item[0].length)
        running: dict[Any, Unit] = {}
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    unit, names = waiting.pop()
                    running[task.remote(plan, unit, names, load, identity, cpus)] = unit
                done, _ = self.ray.wait(list(running))
                for reference in done:
                    yield from self._come(reference, running.pop(reference))
        finally:
            for reference in running:
                self.ray.cancel(reference, force=True)

    def _come(self, reference: Any, unit: Unit) -> list[Record]:
        try:
            found: list[Record] | str = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            said = " ".join(str(getattr(error, "cause", None) or error).split())
            raise KvoteError(
                f"Sample {unit.index} of {unit.task} at {unit.length:,} tokens could not be measured on the cluster "
                f"({type(error).__name__}: {said}); what was measured is kept, and the same command goes on from there."
            ) from error
        if isinstance(found, str):
            raise InputError(found)
        return found


@contextmanager
def cluster(address: str) -> Iterator[Machines]:
    """The Ray cluster at ``address``; 'auto' is the one that runs on this machine, 'local' a new one of this machine
    alone. A process that is part of one uses that. Raises InputError where there is none, or no Ray."""
    try:
        import ray
    except ImportError:
        raise InputError("Ray is not installed, which --ray needs: pip install 'kvote[ray]'.") from None
    mine = not ray.is_initialized()
    if mine:
        _knock(address)
        # A cluster that is started here would report to its makers.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        more = {"include_dashboard": False} if address == "local" else {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ray.init(address=address, log_to_driver=False, logging_level="ERROR", **more)
        except Exception as error:
            # Ray raises what has no kind of its own.
            said = str(error).strip().split("\n")[0]
            raise InputError(f"{_SILENT.format(address)} Ray says: {said}") from error
    try:
        held = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        cpus = [count for count in held if count > 0]
        if not cpus:
            raise InputError(f"The Ray cluster at {address!r} has no processors.")
        yield Machines(ray, len(cpus), min(cpus), sum(cpus))
    finally:
        if mine:
            ray.shutdown()


def _knock(address: str) -> None:
    """Where nobody listens, Ray would wait for minutes, and then end the process. Raises InputError."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise InputError(_SILENT.format(address)) from error


# The model of this worker, by what it was found to be.
_held: dict[Identity, Subject] = {}


def measured(
    plan: Plan, unit: Unit, names: Sequence[str], load: Callable[[], Subject], identity: Identity, threads: int
) -> list[Record] | str:
    """Runs on a worker: the records of a sample, or why there are none."""
    torch.set_num_threads(threads)
    try:
        if identity not in _held:
            subject = load()
            here = identity_of(plan, subject)
            other = [part.name for part in fields(Identity) if getattr(here, part.name) != getattr(identity, part.name)]
            if other:
                what = " and ".join(other).replace("_", " ")
                raise InputError(f"what it has as {what} is not what kvote eval was started with")
            _held.clear()
            _held[identity] = subject
        return list(records_of(plan, unit, names, _held[identity]))
    except KvoteError as error:
        return f"The machine {platform.node()} cannot measure this: {str(error).rstrip('.')}."


def _absolute(given: str) -> str:
    """FORMAT=PATH with a path that means the same wherever a worker runs."""
    form, equals, path = given.partition("=")
    return f"{form}{equals}{Path(path).expanduser().absolute()}"
