"""Optuna studies on disk: what a search has tried, which survives every end of the command and can be extended.

A study lives in a journal file or any database URL that Optuna knows, so `optuna-dashboard` opens it as it is. Three
traps of running one through Ray Tune are handled here and in `search.py`: a trial that was running when the command
died stays RUNNING for ever; start points are enqueued again by every restart; a sampler made again from the same seed
suggests again what it suggested before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from cast_ray.plan.search import Domain, SearchSpec
from cast_ray.plan.settings import changes_nothing
from cast_ray.runtime.search.journal import StoredJournal, is_stored

IDENTITY = "cast_ray"
"""Attribute of a study that says which search it belongs to."""
ENDED = ("done", "pruned", "failed")
"""What a trial's `status` says when it counts towards a search's length; one that was interrupted is tried again."""
MAX_STARTUP = 8


def open_storage(study: str) -> BaseStorage:
    """A storage by database URL (`sqlite:///study.db`), or a journal file by path or by URI of an object store.

    Raises:
        ValueError: it cannot be opened.
    """
    try:
        if is_stored(study):
            return JournalStorage(StoredJournal(study))
        if "://" in study:
            return RDBStorage(study)
        Path(study).parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(study))
    except Exception as error:  # whatever the database's driver raises
        raise ValueError(f"--study {study!r} cannot be opened: {error}") from None


@contextmanager
def closing_storage(storage: BaseStorage) -> Iterator[None]:
    """After the block, all that was written to a storage is where it belongs; it can only be read further on."""
    try:
        yield
    finally:
        if isinstance(storage, JournalStorage) and isinstance(storage._backend, StoredJournal):
            storage._backend.close()


def distribution(domain: Domain) -> BaseDistribution:
    if domain.choices:
        return CategoricalDistribution(domain.choices)
    assert domain.low is not None and domain.high is not None
    if domain.is_integer:
        return IntDistribution(int(domain.low), int(domain.high), log=domain.log)
    return FloatDistribution(float(domain.low), float(domain.high), log=domain.log)


def make_sampler(kind: str, seed: int, num_trials: int, num_known: int) -> optuna.samplers.BaseSampler:
    """A sampler; `num_known` trials are in the study already, and the seed moves on with them."""
    entropy = int(np.random.SeedSequence([seed, num_known]).generate_state(1)[0])
    if kind == "random":
        return optuna.samplers.RandomSampler(seed=entropy)
    startup = max(1, min(MAX_STARTUP, num_trials // 3))
    return optuna.samplers.TPESampler(seed=entropy, n_startup_trials=startup, multivariate=True)


def open_study(storage: BaseStorage, name: str, spec: SearchSpec, identity: Mapping[str, Any]) -> Study:
    """The study of that name, made if there is none; its start points are enqueued once.

    Args:
        identity: what all of its trials share (recipe, data): trials that differ in it cannot be compared.

    Raises:
        ValueError: a study of that name belongs to another search.
    """
    directions = [StudyDirection.MAXIMIZE if o == "max" else StudyDirection.MINIMIZE for o in spec.objectives.values()]
    wanted = {"space": spec.space, "objectives": spec.objectives, "base": spec.base, **identity}
    wanted = _without_effects(json.loads(json.dumps(wanted, default=list)))
    study = optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
    found = _without_effects(study.user_attrs.get(IDENTITY))
    if found is None and not study.trials:
        study.set_user_attr(IDENTITY, wanted)
        for point in spec.start:
            study.enqueue_trial(dict(point))
    elif found != wanted:
        changed = sorted(k for k in wanted if not isinstance(found, dict) or found.get(k) != wanted[k])
        raise ValueError(
            f"study {name!r} was made with another {', '.join(changed)}: expected the same, or another --name"
        )
    return study


def _without_effects(identity: Any) -> Any:
    """The identity of a study without overrides that change no result, such as `runtime.num_workers`."""
    if not isinstance(identity, dict):
        return identity
    parts = {name: identity[name] for name in ("base", "overrides") if isinstance(identity.get(name), dict)}
    kept = {name: {k: v for k, v in part.items() if not changes_nothing(k)} for name, part in parts.items()}
    return identity | kept


def reap(study: Study, is_alive: Callable[[str], bool]) -> int:
    """Ends trials whose command has died and enqueues their points again: what they ran is in the store.

    Args:
        is_alive: whether the holder (see `claims.py`) that a trial names still runs.

    Returns:
        How many there were.
    """
    lost = [t for t in study.get_trials(states=(TrialState.RUNNING,)) if not is_alive(t.user_attrs.get("holder", ""))]
    for trial in lost:
        study.tell(trial.number, state=TrialState.FAIL)
        again(study, trial)
    return len(lost)


def again(study: Study, trial: FrozenTrial) -> None:
    """Enqueues a trial's point once more."""
    if trial.params:
        study.enqueue_trial(dict(trial.params), user_attrs={"again": trial.number})


def num_ended(study: Study) -> int:
    """Trials that count towards the length of a search."""
    return sum(trial.user_attrs.get("status") in ENDED for trial in study.trials)


def objective_values(objectives: Iterable[str], metrics: Mapping[str, Any]) -> list[float]:
    """The objectives' values in a row's metrics.

    Raises:
        ValueError: one is missing or not finite. Optuna would leave its trial running for ever.
    """
    values = []
    for name in objectives:
        value = metrics.get(name)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"objective {name} is {value!r}: expected a finite number")
        values.append(float(value))
    return values


def best_trials(study: Study) -> list[FrozenTrial]:
    """The best trial, or with several objectives the Pareto front; only trials that ran to their end count."""
    finished = study.get_trials(states=(TrialState.COMPLETE,))
    if not finished:
        return []
    if len(study.directions) > 1:
        return study.best_trials
    sign = 1.0 if study.direction == StudyDirection.MAXIMIZE else -1.0
    return [max(finished, key=lambda trial: sign * trial.values[0])]
