"""Online labels: teachers on separate devices label images while a student trains on them.

A Data task of the student's stream reads its images, sends the unlabelled ones (weak, uncropped, fitted as in the
offline job) to a teacher actor, waits, and crops what comes back with the images. The teachers are plain actors that
all streams of a stage share. Every Train worker has its own stream, and an actor pool for each stream would need its
own teachers. So nothing is decoded twice, and pixels pass through Ray's object store only on their way to the teacher.
A task asks for one group of images at a time, so that there are never more requests than tasks
(`resources.tasks_per_stream` of each worker): teachers wait for a slow student.

A mean teacher (`labels.refresh_steps` = N, in self-training or of the student) needs a rule that does not depend on
which process is faster. Steps are cut into windows of N. A window is labelled by the weight average of the model as it
stood one window before the window's start: steps 0..2N-1 by the frozen teacher (theta_T' in 1c, theta_T'' in 2b), steps
2N..3N-1 by the average after step N, and so on. In 2b that average is a student: another model, which sees images at
its own size. Teachers may thus work a whole window ahead, and whenever a label is asked for, its teacher's weights
exist or will be made without it: nothing can wait for itself. Weights are published by rank 0 and kept in the store
until the stage ends, so that a resumed stage labels as if it had not stopped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cast_ray.contracts.instance import RecordLabel
from cast_ray.contracts.records import Category
from cast_ray.plan.graph import Stage, input_size_of
from cast_ray.plan.stage_parts import LabelPart, TrainPart
from cast_ray.recipe import InputSize, ModelConfig, Recipe, RuntimeConfig
from cast_ray.runtime.data.pictures import Pictures
from cast_ray.runtime.data.resources import labeller_bundle, num_teachers
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.worker.label_job import nothing_found

if TYPE_CHECKING:
    import torch

VERSIONS_HELD = 4
STORE_LOOK_S = 2.0
EMPTY_AFTER = 500
"""Images without a label after which a teacher is said to find nothing; its student has hardly begun by then."""


def version_of(step: int, refresh_steps: int) -> int:
    """Which teacher labels a step: 0 is the frozen one, v the weight average after step v * refresh_steps."""
    return max(0, step // refresh_steps - 1) if refresh_steps else 0


def versions_from(step: int, refresh_steps: int) -> list[int]:
    """Returns the published versions that a stage needs when it resumes at a step."""
    window = step // refresh_steps if refresh_steps else 0
    return [version for version in (window - 1, window) if version > 0]


@dataclass(frozen=True)
class Learner:
    """A student in training that labels: its architecture, and the size at which it sees whole images."""

    model: ModelConfig
    input_size: InputSize


@dataclass(frozen=True)
class OnlineLabels:
    """What the tasks of a training stream need to have their images labelled: a label stage and the teachers that run
    it.

    learner: the model in training, where it is not the teacher's own (2b): from version 1 on it labels. trained:
    fingerprint of the stage that trains, and publishes the versions.
    """

    stage: Stage
    teachers: tuple[Any, ...]
    versions: Any
    refresh_steps: int
    learner: Learner | None = None
    trained: str = ""

    @property
    def batch(self) -> int:
        """Images of a teacher's forward pass."""
        return LabelPart.of(self.stage).batch

    def input_size_of(self, version: int) -> InputSize:
        """The size at which a version of the teacher sees whole images."""
        return self.learner.input_size if self.learner is not None and version else input_size_of(self.stage)

    def version_of(self, step: int) -> int:
        return version_of(step, self.refresh_steps)

    def label(self, pictures: Pictures, version: int, turn: int) -> list[list[RecordLabel]]:
        """Returns the instances of each image, as in LABEL_SCHEMA; waits for the teacher's weights, then for it."""
        weights = ray.get(self.versions.get.remote(version, self.trained)) if version else None
        teacher = self.teachers[turn % len(self.teachers)]
        return ray.get(teacher.label.remote(self.stage, self.learner, version, weights, pictures))


class VersionedTeacher:
    """A teacher that loads whichever stage's weights, in whichever version, are asked for."""

    def __init__(self, store: ArtifactStore, recipe: Recipe, categories: tuple[Category, ...], device: torch.device):
        self.store, self.recipe, self.categories, self.device = store, recipe, categories, device
        self.loaded: tuple[str, int] = ("", 0)
        self.labeller: Any = None
        self.num_images = self.num_labels = 0

    def label_version(
        self,
        stage: Stage,
        learner: Learner | None,
        version: int,
        weights: Callable[[], bytes] | None,
        pictures: Pictures,
    ) -> list[list[RecordLabel]]:
        """Returns the instances of each image, as in LABEL_SCHEMA.

        Args:
            stage: the label stage.
            learner: see `OnlineLabels`.
            version: version of the teacher.
            weights: gets the weights of a version that is not loaded; None: they are the stage's own.
            pictures: the images.

        Raises:
            ValueError: the first EMPTY_AFTER images got no label, and `pseudo.on_empty` is stop.
        """
        if self.loaded != (stage.fingerprint, version):
            self._load(stage, learner, version, weights)
        labels = self.labeller.label(pictures)
        self.num_images += len(labels)
        self.num_labels += sum(map(len, labels))
        if (
            version == 0
            and self.num_labels == 0
            and self.num_images >= EMPTY_AFTER
            and self.recipe.pseudo.on_empty == "stop"
        ):
            raise ValueError(nothing_found(stage, self.recipe, self.categories, f"the first {self.num_images}"))
        return labels

    def _load(self, stage: Stage, learner: Learner | None, version: int, weights: Callable[[], bytes] | None) -> None:
        from cast_ray.runtime.worker.labeller import PseudoLabeller

        if self.loaded[0] != stage.fingerprint or version == 0:
            self.num_images = self.num_labels = 0
            self.labeller = PseudoLabeller(self.store, stage, self.device)
        if learner is not None and version:
            self.labeller.become(learner.model, learner.input_size)
        if weights is not None:
            self.labeller.load(weights())
        self.loaded = (stage.fingerprint, version)


# It holds no state but what it loaded last, so that a lost one is replaced without anybody noticing.
@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class OnlineTeacher(VersionedTeacher):
    """A teacher actor on its device, which loads the teacher of any stage, in any version, when it is asked for.

    Args:
        broker, owner: who is told what it labels and on which machine, and whose segment it works for; None: nobody.
    """

    def __init__(self, store: ArtifactStore, recipe: Recipe, categories: tuple[Category, ...], broker: Any, owner: str):
        from cast_ray.engine.world import pick_device
        from cast_ray.runtime.process_settings import prepare_process
        from cast_ray.runtime.this_node import this_node

        prepare_process()
        super().__init__(store, recipe, categories, pick_device("auto"))
        self.broker, self.owner = broker, owner
        if broker is not None:
            process = ray.get_runtime_context().get_actor_id()
            broker.computes_on.remote(owner, process, this_node(self.device))

    def label(
        self,
        stage: Stage,
        learner: Learner | None,
        version: int,
        weights: list[ray.ObjectRef] | None,
        pictures: Pictures,
    ) -> list[list[RecordLabel]]:
        """Does what `label_version` does; the weights come as a reference in a list, so that Ray does not send them."""
        fetch: Callable[[], bytes] | None = None if weights is None else partial(cast(Any, ray.get), weights[0])
        labels = self.label_version(stage, learner, version, fetch, pictures)
        if self.broker is not None:
            self.broker.labelled.remote(self.owner, stage.name, len(labels), sum(map(len, labels)))
        return labels


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class TeacherVersions:
    """The published weights of the stage that refreshes its teacher; a process that asks too early waits.

    The store holds them too (`Publisher`). That is where an actor finds them that Ray has started in place of a lost
    one: nobody tells it what was published before.
    """

    def __init__(self, store: ArtifactStore) -> None:
        self.store = store
        self.weights: dict[int, ray.ObjectRef] = {}
        self.is_told = False
        """Whether a stage has begun since this process was started, so that it knows all that is published."""
        self.changed = asyncio.Condition()

    async def start(self, weights: dict[int, list[ray.ObjectRef]]) -> None:
        """Tells the teachers that a stage begins or resumes, with these versions published."""
        async with self.changed:
            self.is_told = True
            self.weights = {version: refs[0] for version, refs in weights.items()}
            self.changed.notify_all()

    async def publish(self, version: int, weights: list[ray.ObjectRef]) -> None:
        async with self.changed:
            self.weights[version] = weights[0]
            for old in sorted(self.weights)[:-VERSIONS_HELD]:
                del self.weights[old]
            self.changed.notify_all()

    async def get(self, version: int, trained: str = "") -> list[ray.ObjectRef]:
        """Returns the weights in a list, or Ray would send them.

        Args:
            trained: fingerprint of the stage that publishes them.
        """
        while not self.is_told and version not in self.weights:
            path = f"{versions_folder(trained)}/{_file_name(version)}"
            if (written := await asyncio.to_thread(self.store.find_bytes, path)) is not None:
                self.weights.setdefault(version, ray.put(written))
            else:
                await asyncio.sleep(STORE_LOOK_S)
        async with self.changed:
            await self.changed.wait_for(lambda: version in self.weights)
            return [self.weights[version]]


@dataclass(frozen=True)
class Teachers:
    """The actors that label online for one segment."""

    actors: tuple[Any, ...]
    versions: Any

    def labels(self, stage: Stage) -> OnlineLabels:
        """For the stream of a stage that labels online."""
        assert stage.online is not None
        return OnlineLabels(
            stage.online,
            self.actors,
            self.versions,
            TrainPart.of(stage).refresh_steps,
            learner_of(stage),
            stage.fingerprint,
        )


def learner_of(stage: Stage) -> Learner | None:
    """Returns the student that a stage trains, which labels from version 1 on; None: the stage trains a teacher."""
    if stage.name != "distill":
        return None
    segmenter = TrainPart.of(stage).segmenter
    assert segmenter is not None
    return Learner(segmenter, input_size_of(stage))


def teacher_bundles(runtime: RuntimeConfig) -> list[dict[str, float]]:
    """What the teachers of a segment reserve."""
    return [labeller_bundle(runtime)] * num_teachers(runtime)


def start_teachers(
    store: ArtifactStore,
    recipe: Recipe,
    categories: tuple[Category, ...],
    group: PlacementGroup,
    first_bundle: int,
    broker: Any = None,
    owner: str = "",
) -> Teachers:
    """Teachers in a group's last bundles. They end with the group, so that no stage is left without.

    Args:
        broker, owner: see `OnlineTeacher`.
    """
    runtime = recipe.runtime
    actors = tuple(
        OnlineTeacher.options(  # type: ignore[attr-defined]
            num_cpus=runtime.cpus_per_labeller,
            num_gpus=1 if runtime.use_gpu else 0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=first_bundle + i),
        ).remote(store, recipe, categories, broker, owner)
        for i in range(num_teachers(runtime))
    )
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return Teachers(actors, TeacherVersions.options(scheduling_strategy=here).remote(store))  # type: ignore[attr-defined]


class Publisher:
    """Rank 0's side of a refreshed teacher: publishes weights, keeps them for a resume, forgets what none can need."""

    def __init__(self, store: ArtifactStore, fingerprint: str, labels: OnlineLabels):
        self.store, self.folder = store, versions_folder(fingerprint)
        self.versions, self.refresh_steps = labels.versions, labels.refresh_steps
        self.checkpoint = 0

    def _path(self, version: int) -> str:
        return f"{self.folder}/{_file_name(version)}"

    def can_resume(self, step: int) -> bool:
        """Whether the weights that a resume at a step needs are all kept."""
        kept = set(self.store.list_names(self.folder))
        return all(_file_name(version) in kept for version in versions_from(step, self.refresh_steps))

    def start(self, step: int) -> None:
        """Publishes the versions that a stage needs when it resumes at `step`."""
        self.checkpoint = step
        needed = versions_from(step, self.refresh_steps)
        newest = _file_name(max(needed, default=0))
        for name in self.store.list_names(self.folder):
            if name > newest:  # of an attempt that came further: this one makes them again
                self.store.delete_file(f"{self.folder}/{name}")
        kept = {v: self.store.find_bytes(self._path(v)) for v in needed}
        ray.get(self.versions.start.remote({version: [ray.put(weights)] for version, weights in kept.items()}))

    def publish(self, step: int, weights: bytes) -> None:
        """The weight average after `step` steps, a multiple of `refresh_steps`."""
        version = step // self.refresh_steps
        self.store.write_bytes(self._path(version), weights)
        self.versions.publish.remote(version, [ray.put(weights)])

    def noted_checkpoint(self, step: int) -> None:
        """Notes that a resume now starts at `step`, or at the checkpoint before it if that one is damaged."""
        needed = versions_from(self.checkpoint, self.refresh_steps)
        oldest = needed[0] if needed else 1
        for name in self.store.list_names(self.folder):
            if name < _file_name(oldest):
                self.store.delete(f"{self.folder}/{name}")
        self.checkpoint = step


def versions_folder(fingerprint: str) -> str:
    """Folder of the weights that a stage publishes, below the storage path."""
    return f"refresh/{fingerprint}"


def _file_name(version: int) -> str:
    return f"{version:08d}.safetensors"
