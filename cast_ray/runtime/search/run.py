"""Searches: Optuna proposes points through Ray Tune, every point is a recipe row through the same stages and store.

The trials are those of a table (`row_driver`); only their rows are not known beforehand. Tune's own restore is not
used: the study remembers the points (`study.py`) and the store their stages, so the same command continues the search.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import ray
from optuna.trial import TrialState
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from rich.console import Console
from rich.text import Text

from cast_ray.data.reading.data_report import print_warnings
from cast_ray.plan.graph import RowPlan, artifact_key, fingerprint_of, given, plan_sweep
from cast_ray.plan.metrics import is_latency
from cast_ray.plan.search import RUNG_METRIC, SearchSpec
from cast_ray.recipe import Recipe
from cast_ray.recipe.licence_chain import by_rows, licence_chain, warnings_of
from cast_ray.runtime.cluster import connect
from cast_ray.runtime.data.shared_images import forget_shared_images
from cast_ray.runtime.search.journal import claim_study
from cast_ray.runtime.search.study import (
    again,
    closing_storage,
    distribution,
    make_sampler,
    num_ended,
    objective_values,
    open_storage,
    open_study,
    reap,
)
from cast_ray.runtime.shared_paths import check_shared_paths
from cast_ray.runtime.store.artifacts import ArtifactStore, read_each
from cast_ray.runtime.store.claims import DEAD_AFTER_S, Presence, Watch
from cast_ray.runtime.store.past_stages import note_past
from cast_ray.runtime.sweep.broker import start_broker
from cast_ray.runtime.sweep.planner import RowPlanner, command_line
from cast_ray.runtime.sweep.preview import print_licences
from cast_ray.runtime.sweep.progress import ProgressDisplay
from cast_ray.runtime.sweep.row_driver import (
    DRIVER_CPUS,
    MAX_DRIVER_FAILURES,
    RUNG_STEP,
    Job,
    make_trainable,
    trial_dirname,
    tune_folder,
    write_lost,
)
from cast_ray.runtime.sweep.row_results import SweepContext, row_name
from cast_ray.runtime.sweep.run import check_still_stored, keys_read, say_pruning
from cast_ray.runtime.sweep.slots import slots_of
from cast_ray.runtime.sweep.trackers import Trackers

MAX_PROPOSALS = 20
"""Points asked for in a row that make no valid recipe, before a search gives up."""


@dataclass(frozen=True)
class SearchRequest:
    """What the user asked for, already validated."""

    spec: SearchSpec
    preset: str
    scale: str
    overrides: dict[str, Any]
    seed: int
    """Seed of the recipes: of the split, the initial weights and the order of images."""
    name: str
    """Name of the run; its studies are called `<name>-<sampler>`."""
    study: str
    """Database URL or path of a journal file."""
    storage: str
    address: str | None
    num_cpus: int | None
    budget_hours: float | None = None
    keep_going: bool = False
    trackers: Trackers = field(default_factory=Trackers)

    def recipe(self, point: Mapping[str, Any]) -> Recipe:
        return self.spec.recipe(point, self.preset, self.scale, self.seed, self.overrides)


@dataclass(frozen=True)
class SearchOutcome:
    """The studies of a search by sampler."""

    studies: dict[str, optuna.Study]
    stopped: str | None


def run_search(
    request: SearchRequest, console: Console, on_start: Callable[[SweepContext], None] = lambda context: None
) -> SearchOutcome:
    """Runs what is missing of every sampler's study.

    Args:
        on_start: called with what all trials share once the request has turned out to be sound, before anything runs.

    Raises:
        ValueError: the user's data, storage, study or resources do not fit, before any compute is spent.
    """
    spec, store = request.spec, ArtifactStore(request.storage)
    store.exists()  # whatever else lies at its path is refused
    store.check_writable()
    with Presence(store, command_line(), on_wait=lambda holder: say_pruning(holder, console)) as presence:
        base = request.recipe({})
        planner = RowPlanner({request.name: [base]}, store, console, lambda: connect(request.address, request.num_cpus))
        claim_study(request.study, store, presence, console)
        storage = open_storage(request.study)
        with closing_storage(storage):
            context, first = planner.plan(base, table=spec.name, run=request.name, row="base")
            chains = [(spec.name, licence_chain(base))]
            print_licences(by_rows(chains), console)
            print_warnings([*planner.warnings, *warnings_of(chains)], console)
            identity = {
                "preset": request.preset,
                "scale": request.scale,
                "overrides": request.overrides,
                "seed": request.seed,
                "data": context.content_hash,
            }
            studies: dict[str, optuna.Study] = {
                s: open_study(storage, f"{request.name}-{s}", spec, identity) for s in spec.samplers
            }
            read = keys_read(planner, [first])
            presence.need(map(fingerprint_of, read))
            check_still_stored(map(fingerprint_of, read), map(fingerprint_of, store.find_manifests(read)))
            _reap(studies, store, presence.holder.id, console)
            left: dict[str, int] = {sampler: spec.num_trials - num_ended(study) for sampler, study in studies.items()}
            for sampler, study in studies.items():
                console.print(
                    f"  {sampler:8} {num_ended(study)} of {spec.num_trials} trials in {request.study}",
                    highlight=False,
                    soft_wrap=True,
                )
            on_start(context)
            stopped = None
            if any(number > 0 for number in left.values()):
                search = _Search(request, planner, presence, storage, console)
                try:
                    stopped = search.run(studies, left)
                finally:
                    note_past(store, (stage.key for row in search.rows for stage in row.stages))
    return SearchOutcome(studies, stopped)


def _reap(studies: Mapping[str, optuna.Study], store: ArtifactStore, own: str, console: Console) -> None:
    """Ends the trials of commands that have died; waits to see whether one of another machine is alive."""
    watch = Watch(store)

    def running() -> set[str]:
        trials = [t for study in studies.values() for t in study.get_trials(states=(TrialState.RUNNING,))]
        return {t.user_attrs.get("holder", "") for t in trials} - {own}

    unsure = {holder for holder in running() if watch.is_alive(holder)}
    if unsure:
        console.print(f"trials of another command are running; {DEAD_AFTER_S:.0f} s to see whether it is alive")
        deadline = time.monotonic() + DEAD_AFTER_S + 1
        while time.monotonic() < deadline and any(watch.is_alive(holder) for holder in unsure):
            time.sleep(1.0)
    for study in studies.values():
        if number := reap(study, watch.is_alive):
            console.print(f"{number} trials of {study.study_name} were interrupted and are tried again")


class _Search:
    """One command's share of a search: a Ray, a broker, and Tune once for each sampler."""

    def __init__(
        self,
        request: SearchRequest,
        planner: RowPlanner,
        presence: Presence,
        storage: optuna.storages.BaseStorage,
        console: Console,
    ):
        self.request, self.planner, self.presence = request, planner, presence
        self.storage, self.store, self.console = storage, planner.store, console
        self.rows: list[RowPlan] = []
        self.names: list[str] = []
        self.looked_at: set[str] = set()
        self.stored: set[str] = set()
        """What was stored when a point first needed it. Looking earlier is no use: until this search has left word that
        it needs an artifact, `store gc` may remove it."""
        self.broker: Any = None
        self.display: ProgressDisplay | None = None
        self.follows = False
        """Whether the trials at a time follow a cluster's size, see `_is_waiting`."""

    def run(self, studies: Mapping[str, optuna.Study], left: Mapping[str, int]) -> str | None:
        """Runs all samplers, one after the other; returns why trials were left out, if they were."""
        request = self.request
        cluster = connect(request.address, request.num_cpus)
        self.console.print(cluster.description, highlight=False)
        try:
            recipe = request.recipe({})
            check_shared_paths(self.store.storage, [recipe.data.root])
            slots = slots_of([recipe], cluster, DRIVER_CPUS, max(left.values()))
            self.follows = not cluster.is_local and not recipe.runtime.max_concurrent_stages
            self.broker = start_broker(
                slots,
                set(),
                self.store.storage,
                self.presence.holder.id,
                request.budget_hours,
                request.keep_going,
                by_turns=not cluster.is_local,
                sweep=request.name,
                is_open=True,
            )
            self.display = ProgressDisplay(self.console, self.broker, plan_sweep([], []), self.names)
            with self.display:
                for sampler, study in studies.items():
                    if left[sampler] > 0:
                        self._run_sampler(sampler, study, left[sampler], slots)
            ray.get(self.broker.close_groups.remote())
            board = ray.get(self.broker.board.remote())
            if "failed" in board["ended"].values() and (words := cluster.where_logs_are()):
                self.console.print(words, soft_wrap=True, highlight=False)
            return board["stop"]
        finally:
            forget_shared_images()
            ray.shutdown()

    def _run_sampler(self, sampler: str, study: optuna.Study, num_trials: int, slots: int) -> None:
        spec = self.request.spec
        chosen = make_sampler(sampler, spec.seed, spec.num_trials, len(study.trials))
        search = StudySearch(
            spec,
            study,
            self.storage,
            chosen,
            self.presence.holder.id,
            self._proposer(sampler),
            self._spent,
            self._is_waiting,
        )
        callbacks = self.request.trackers.callbacks(
            search.jobs.__getitem__, lambda text: self.console.print(Text(text, "yellow"))
        )
        asha = spec.scheduler == "asha"
        steps = getattr(self.request.recipe({}).stages, spec.early_stopping.stage).steps
        experiment = f"{self.request.name}-{sampler}-{int(time.time())}-{self.store.attempt}"
        with tune_folder() as folder:
            tuner = tune.Tuner(
                make_trainable(self.broker, record=bool(callbacks) or asha),
                tune_config=tune.TuneConfig(
                    search_alg=search,
                    num_samples=num_trials,
                    # A waiting row would have been proposed without knowing the results it waits beside.
                    max_concurrent_trials=slots,
                    reuse_actors=True,
                    trial_dirname_creator=trial_dirname,
                    scheduler=ASHAScheduler(
                        time_attr=RUNG_STEP,
                        metric=RUNG_METRIC,
                        mode="max",
                        max_t=steps,
                        grace_period=spec.early_stopping.first_rung(steps),
                        reduction_factor=spec.early_stopping.reduction,
                    )
                    if asha
                    else None,
                ),
                run_config=tune.RunConfig(
                    name=experiment,
                    storage_path=folder,
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=MAX_DRIVER_FAILURES),
                    callbacks=callbacks,
                ),
            )
            grid = tuner.fit()
            for result in (grid[i] for i in range(len(grid))):
                if result.error is not None:
                    write_lost(search.jobs[(result.config or {})["row"]], result.error)

    def _is_waiting(self, names: Collection[str]) -> bool:
        """Whether one of these trials still waits for room on a cluster, so that another one would only wait with it.

        One that waits is what makes an autoscaler start nodes; and when it has room, the next is proposed with all that
        is known by then. A user who wants many nodes at once says how many trials run at a time.
        """
        return self.follows and not set(names) <= set(ray.get(self.broker.board.remote())["running"])

    def _spent(self, name: str) -> float:
        return ray.get(self.broker.spent.remote(name))

    def _proposer(self, sampler: str) -> Callable[[int, dict[str, Any]], Job]:
        spec, request = self.request.spec, self.request

        def propose(number: int, point: dict[str, Any]) -> Job:
            """Plans the row of a point and leaves it with the broker, where its driver will fetch it."""
            recipe = request.recipe(point)
            num_said = len(self.planner.warnings)
            names = {"table": f"{spec.name}-{sampler}", "run": request.name, "row": f"t{number:04d}"}
            context, row = self.planner.plan(recipe, **names)
            found = self._look_again(row)
            if not given(row) <= self.stored:
                # An imported teacher was removed before this search could say that it needs it.
                self.planner.forget_foundations()
                context, row = self.planner.plan(recipe, **names)
                found |= self._look_again(row)
            print_warnings(self.planner.warnings[num_said:], self.console)  # of a point that labels other images
            self.rows.append(row)
            measured = tuple(name for name in spec.objectives if is_latency(name))
            stage = spec.early_stopping.stage if spec.scheduler == "asha" else None
            job = Job(context, row, rungs_of=stage, measure=measured)
            self.names.append(row_name(context.table, row))
            if self.display is not None:
                self.display.plan = plan_sweep(self.rows, self.stored)
            ray.get(self.broker.load.remote({job.name: job.packed()}, sorted(found)))
            return job

        return propose

    def _look_again(self, row: RowPlan) -> set[str]:
        """Leaves word of what a row needs, then looks which of it is stored; returns what was found for the first time.

        Afterwards nothing that was found can be removed, and what is missing is made again.
        """
        rows = [*self.rows, row]
        needed = {stage.fingerprint for each in rows for stage in each.stages} | self.planner.fingerprints()
        self.presence.need(needed.union(*map(given, rows)))
        keys = [stage.key for stage in row.stages] + [artifact_key("train", fingerprint) for fingerprint in given(row)]
        new = [key for key in keys if fingerprint_of(key) not in self.looked_at]
        found = {fingerprint_of(key) for key, is_there in zip(new, read_each(self.store.has, new)) if is_there}
        self.looked_at |= {stage.fingerprint for stage in row.stages} | found
        self.stored |= found
        return found


class StudySearch(OptunaSearch):
    """Tune's Optuna search on a study of ours, which ends every trial in a state that says what became of it.

    Ray's own class tells Optuna the last reported value of whatever ended: a trial that ASHA stopped counts as one that
    reached its value, and one without a (finite) value stays RUNNING. Here a stopped trial is PRUNED at its last rung,
    a failed or undefined one is FAIL with its reason, an interrupted one is tried again.

    Args:
        propose: (number, point) -> job of the point's row; ValueError where it makes no valid recipe.
        spent: name of a row -> device-seconds.
        is_waiting: (rows of the trials that have not ended) -> whether none is to be proposed for now.
    """

    def __init__(
        self,
        spec: SearchSpec,
        study: optuna.Study,
        storage: optuna.storages.BaseStorage,
        sampler: optuna.samplers.BaseSampler,
        holder: str,
        propose: Callable[[int, dict[str, Any]], Job],
        spent: Callable[[str], float],
        is_waiting: Callable[[Collection[str]], bool] = lambda names: False,
    ):
        space = {key: distribution(domain) for key, domain in spec.domains().items()}
        super().__init__(
            space=space,
            metric=list(spec.objectives),
            mode=list(spec.objectives.values()),
            sampler=sampler,
            study_name=study.study_name,
            storage=storage,
        )
        made: Any = self._ot_study
        self.study: optuna.Study = made
        self.spec, self.holder = spec, holder
        self.propose, self.spent, self.is_waiting = propose, spent, is_waiting
        self.jobs: dict[str, Job] = {}
        self.of_trial: dict[str, str] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if self.of_trial and self.is_waiting(list(self.of_trial.values())):
            return None
        for _ in range(MAX_PROPOSALS):
            super().suggest(trial_id)
            trial = self._ot_trials[trial_id]
            trial.set_user_attr("holder", self.holder)
            try:
                job = self.propose(trial.number, dict(trial.params))
            except ValueError as error:
                self._end(trial, TrialState.FAIL, None, "failed", str(error))
                del self._ot_trials[trial_id]
                continue
            trial.set_user_attr("row", job.name)
            self.jobs[job.name], self.of_trial[trial_id] = job, job.name
            return {"row": job.name}
        raise RuntimeError(f"{MAX_PROPOSALS} points in a row made no valid recipe")

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if RUNG_METRIC in result and RUNG_STEP in result:
            trial = self._ot_trials[trial_id]
            known = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
            if result[RUNG_STEP] not in known:
                trial.report(result[RUNG_METRIC], result[RUNG_STEP])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self._ot_trials[trial_id]
        trial.set_user_attr("device_s", self.spent(self.of_trial.pop(trial_id)))
        for fact in ("computed_on", "measured_on"):
            trial.set_user_attr(fact, (result or {}).get(fact))
        status = (result or {}).get("status")
        if error or result is None or status == "failed":
            reason = (result or {}).get("error") or "its driver was lost"
            self._end(trial, TrialState.FAIL, None, "failed", reason)
        elif status == "done":
            try:
                values = objective_values(self.spec.objectives, result)
            except ValueError as problem:
                self._end(trial, TrialState.FAIL, None, "failed", str(problem))
            else:
                self._end(trial, TrialState.COMPLETE, values, "done", None)
        elif status == "stopped":
            self._end(trial, TrialState.FAIL, None, "stopped", result.get("error"))
            again(self.study, self.study.trials[trial.number])
        else:  # stopped by the scheduler, at a rung
            self._end(trial, TrialState.PRUNED, None, "pruned", None)

    def _end(
        self, trial: optuna.Trial, state: TrialState, values: list[float] | None, status: str, reason: str | None
    ) -> None:
        trial.set_user_attr("status", status)
        if reason:
            trial.set_user_attr("error", reason)
        self.study.tell(trial, values, state=state)

    def __reduce__(self) -> Any:
        return str, (self._study_name,)  # Tune pickles its settings for a restore that is not used here

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is the state, and it is on disk already."""
        Path(checkpoint_path).write_text(json.dumps({"study": self._study_name}))

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search continues from its study, not from Tune's files")
