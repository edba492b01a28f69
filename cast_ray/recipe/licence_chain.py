"""Under which licences a student may be used: those of its teacher, of the weights it starts from and of its data.

Whether the terms of a teacher or of a dataset bind a model that learnt from it is for lawyers. cast_ray refuses
nothing: it shows what is known of every source, and says where nothing is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cast_ray.common.text import first_line, first_of
from cast_ray.recipe.build import Recipe
from cast_ray.recipe.data import DataConfig
from cast_ray.recipe.licences import (
    CHECKPOINTS,
    COMMERCIAL_WORDS,
    DATASETS,
    OF_FORMAT,
    UNKNOWN,
    Licence,
    LicensedWork,
    find_licence,
)
from cast_ray.recipe.models import ModelConfig
from cast_ray.recipe.strict_yaml import read_yaml

README = "README.md"
TEACHER, ENCODER, TEACHERS_ENCODER, DATA, EXTRA = "teacher", "encoder", "teacher's encoder", "data", "extra images"
WHOLE, TEACHERS_WHOLE = "start weights", "teacher's start weights"
"""What a source is to the student."""
_STRICTEST_FIRST = ("no", "unknown", "conditions", "yes")
_MAX_ROWS = 6
MAX_CHAINS = 4
"""How many different chains plans and reports show."""
_PARTS = ("data", "teacher", "student", "stages", "loss")
"""Parts of a recipe that a chain is read from."""
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """One thing that a student is made of, with its licence.

    role: what it is to the student; name: a hub name, a folder or a dataset; stated_by: where the licence was read
    (a page, a README.md, `the recipe`); checked: when that was, YYYY-MM-DD, where it was looked up for the table of
    licences; note: a sentence more.
    """

    role: str
    name: str
    licence: Licence
    stated_by: str = ""
    checked: str = ""
    note: str = ""

    @property
    def text(self) -> str:
        """For example `teacher facebook/sam3: SAM License`."""
        return f"{self.role} {self.name}: {self.licence.label}"

    @property
    def terms(self) -> str:
        """The same with what it means for commercial use, where the licence stands, and the note."""
        where = f" ({self.licence.url})" if self.licence.url else ""
        note = f" {self.note}" if self.note else ""
        return f"{self.text}, {COMMERCIAL_WORDS[self.licence.commercial]}{where}.{note}"

    @property
    def is_restricted(self) -> bool:
        """Whether it is known that commercial use is forbidden, or allowed with conditions."""
        return self.licence.commercial in ("no", "conditions")


@dataclass(frozen=True)
class LicenceChain:
    """All sources of a student, its teacher first and its data last."""

    sources: tuple[Source, ...]

    @property
    def strictest(self) -> Licence:
        """The licence that allows least: what forbids commercial use, then what is unknown, then what has conditions.

        Of equal ones, that of the teacher comes before that of the encoder and that of the data; the public domain
        comes last.
        """
        licences = [source.licence for source in self.sources] or [UNKNOWN]
        return min(licences, key=lambda each: (_STRICTEST_FIRST.index(each.commercial), each.id == "CC0-1.0"))

    @property
    def text(self) -> str:
        """All sources in one line."""
        return "; ".join(source.text for source in self.sources)

    @property
    def verdict(self) -> str:
        """What the chain as a whole says about commercial use, in words."""
        return COMMERCIAL_WORDS[self.strictest.commercial]

    def published(self) -> LicenceChain:
        """The chain for everybody's eyes: of paths and URIs of this machine only the last part of the name."""
        is_private = re.compile(r"[/~.]|\w+://")
        names = [s.name.rstrip("/").rpartition("/")[2] if is_private.match(s.name) else s.name for s in self.sources]
        return LicenceChain(tuple(replace(source, name=name) for source, name in zip(self.sources, names)))

    def plain(self) -> list[dict[str, Any]]:
        """The chain as plain data, for a file."""
        return [asdict(source) for source in self.sources]

    @classmethod
    def of_plain(cls, plain: Iterable[Mapping[str, Any]]) -> LicenceChain:
        """Reads what `plain` wrote. Raises ValueError where something else stands there."""
        try:
            return cls(tuple(Source(**{**each, "licence": Licence(**each["licence"])}) for each in plain))
        except (TypeError, KeyError) as error:
            raise ValueError(f"licences: cannot be read: {first_line(error)}") from None


def licence_chain(recipe: Recipe) -> LicenceChain:
    """Returns the sources of the student that a recipe trains.

    A teacher counts where its labels do: the student of a row without L_semi owes it nothing. README files of folders
    on this machine are read; nothing is fetched.
    """
    stated = dict(_stated(each) for each in recipe.checkpoint_licences)
    sources: list[Source] = []
    if recipe.learns_from_teacher:
        sources += teacher_sources(recipe, stated)
    sources += start_sources(ENCODER, recipe.student, stated)
    sources += _data_sources(recipe)
    return LicenceChain(tuple(sources))


def chain_of_plain_recipe(plain: Mapping[str, Any]) -> LicenceChain | None:
    """Returns the chain of a recipe as a result file holds it; None where another version has written one that this
    version cannot read, or where a part is missing that the chain depends on."""
    if not all(isinstance(plain.get(part), Mapping) and plain[part] for part in _PARTS):
        return None  # the defaults of a missing part would say something that nobody has said
    # Seeds change nothing: the results of a table have few different chains.
    relevant = {key: value for key, value in plain.items() if not key.endswith("seed")}
    return _read_chain(json.dumps(relevant, sort_keys=True, default=list))


@lru_cache(maxsize=256)
def _read_chain(recipe: str) -> LicenceChain | None:
    try:
        return licence_chain(Recipe.model_validate_json(recipe))
    except ValidationError:
        return None


def checkpoint_source(role: str, name: str, stated: Mapping[str, str] | None = None) -> Source:
    """Returns a checkpoint with its licence: as the recipe states it, the README.md of its folder, or the table.

    Args:
        role: what the checkpoint is to the student.
        name: folder, URI or hub name.
        stated: name -> licence, by the recipe.
    """
    if licence := (stated or {}).get(name):
        return Source(role, name, find_licence(licence), "the recipe")
    if found := readme_licence(name):
        return Source(role, name, found, f"{README} of the folder")
    return _of_work(role, name, CHECKPOINTS.get(name))


def readme_licence(folder: str) -> Licence | None:
    """Returns the licence in the YAML header of a folder's README.md, as model hubs have it; None where there is none.

    A header that cannot be read says nothing.
    """
    path = Path(folder).expanduser() / README
    if "://" in folder or not folder or not path.is_file():
        return None
    try:
        header = _FRONT_MATTER.match(path.read_text(encoding="utf-8", errors="replace").lstrip("\ufeff"))
        fields = read_yaml(header.group(1)) if header else None
    except (OSError, ValueError):
        return None
    if not isinstance(fields, dict) or not (named := fields.get("license")):
        return None
    if named == "other":
        name, link = (str(fields.get(key) or "") for key in ("license_name", "license_link"))
        return Licence(name=name or "other", url=link)
    if isinstance(named, list):
        each = [find_licence(str(name)) for name in named]
        worst = min(each, key=lambda licence: _STRICTEST_FIRST.index(licence.commercial))
        return (
            each[0]
            if len(each) == 1
            else Licence(name=" and ".join(x.label for x in each), commercial=worst.commercial)
        )
    return find_licence(str(named))


def start_sources(role: str, model: ModelConfig, stated: Mapping[str, str] | None = None) -> list[Source]:
    """Returns the weights that a segmenter starts from: of the whole model or of its encoder; none: random ones.

    Args:
        role: what the encoder is to the student, ENCODER or TEACHERS_ENCODER.
    """
    if model.source:
        return [checkpoint_source(WHOLE if role == ENCODER else TEACHERS_WHOLE, model.source, stated)]
    encoder = model.encoder
    if encoder.source:
        return [checkpoint_source(role, encoder.source, stated)]
    return [Source(role, encoder.name, UNKNOWN, note="Code of your own.")] if ":" in encoder.name else []


def _stated(text: str) -> tuple[str, str]:
    name, _, licence = text.rpartition("=")
    return name.strip(), licence.strip()


def teacher_sources(recipe: Recipe, stated: Mapping[str, str] | None = None) -> list[Source]:
    """Returns what the teacher of a recipe is made of, whether or not its labels are used.

    Args:
        stated: name of a checkpoint -> its licence, by the recipe.
    """
    teacher = recipe.teacher
    if recipe.stages.foundation:
        return [checkpoint_source(TEACHER, recipe.stages.foundation, stated)]
    if teacher.kind == "expert":
        return start_sources(TEACHERS_ENCODER, teacher, stated)
    return [checkpoint_source(TEACHER, name, stated) for name in dict.fromkeys(teacher.checkpoint_fields().values())]


def _data_sources(recipe: Recipe) -> list[Source]:
    data = recipe.data
    name = data.format if data.format in OF_FORMAT else data.root or data.format
    found = [_data_source(DATA, name, data, data.root, DATASETS.get(data.format) if data.format in OF_FORMAT else None)]
    if data.unlabelled_pool != "rest" and data.extra_image_dir:
        found.append(_data_source(EXTRA, data.extra_image_dir, data, data.extra_image_dir, None))
    if data.licence or found[0].licence is not UNKNOWN or recipe.preset not in DATASETS:
        return found
    work = DATASETS[recipe.preset]
    hint = f"If it is {work.title} ({work.licence.label}), say so: data.licence={recipe.preset}."
    return [Source(DATA, name, UNKNOWN, note=hint), *found[1:]]


def _data_source(role: str, name: str, data: DataConfig, folder: str, known: LicensedWork | None) -> Source:
    if data.licence:
        work = DATASETS.get(data.licence)
        return _of_work(role, name, work) if work else Source(role, name, find_licence(data.licence), "the recipe")
    if found := readme_licence(folder):
        return Source(role, name, found, f"{README} of the folder")
    return _of_work(role, name, known)


def _of_work(role: str, name: str, work: LicensedWork | None) -> Source:
    if work is None:
        return Source(role, name, UNKNOWN)
    return Source(role, name, work.licence, work.source, work.checked, work.note)


def by_rows(chains: Sequence[tuple[str, LicenceChain]]) -> list[str]:
    """Returns one line for each different chain, with the rows that have it where they have several.

    Args:
        chains: (name of a row, its chain), in the order of the rows.
    """
    rows: dict[LicenceChain, dict[str, None]] = {}
    for row, chain in chains:
        rows.setdefault(chain, {})[row] = None
    if len(rows) == 1:
        return [chain.text for chain in rows]
    return [f"{first_of(list(names), _MAX_ROWS)}: {chain.text}" for chain, names in rows.items()]


def warnings_of(chains: Sequence[tuple[str, LicenceChain]]) -> list[str]:
    """Returns a sentence for each source whose licence forbids commercial use or has conditions for it.

    Args:
        chains: (name of a row, its chain).
    """
    rows: dict[Source, dict[str, None]] = {}
    for row, chain in chains:
        for source in chain.sources:
            if source.is_restricted:
                rows.setdefault(source, {})[row] = None
    everyone = len({row for row, _ in chains})
    found = []
    for source, names in rows.items():
        are_some = len(names) < everyone
        who = f"the students of {first_of(list(names), _MAX_ROWS)} inherit" if are_some else "the student inherits"
        found.append(f"{who} the terms of {source.terms}")
    return found
