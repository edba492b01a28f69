"""Images that a dataset holds more than once: in two splits, in the pool of unlabelled images, under two names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from cast_ray.common.paths import real

IDENTITY_BYTES = 16
_HOW = {True: "the same bytes", False: "the same file"}


class Copies:
    """Finds copies while a dataset is read, from one identity for each image.

    Two images are the same where their identities are: a digest of the file's bytes where these are read
    (`data.verify=full`), else one of the path without links. The extra pool is given last: its copies of training and
    validation images are left out, because D_u must hold neither. Copies among the training images, and of validation
    images, stay where they are; `same_as` and `in_val` say which they are to the choice of D_u.

    Args:
        by_content: whether identities are of bytes; for the sentences.
    """

    def __init__(self, *, by_content: bool):
        self.how = _HOW[by_content]
        self.num_pool = self.num_pool_left_out = 0
        self._identities: dict[str, list[bytes]] = {"train": [], "val": []}
        self._first: dict[str, dict[bytes, str]] = {"train": {}, "val": {}}
        self._example = ""

    def add(self, split: str, identities: Sequence[bytes], uris: Sequence[str]) -> np.ndarray:
        """Takes the next images of a split, in order.

        Returns:
            bool [n]: which of them stay; the others are images of the pool that are left out.
        """
        if split in self._identities:
            self._identities[split] += identities
            for identity, uri in zip(identities, uris):
                self._first[split].setdefault(identity, uri)
        if split != "extra":
            return np.ones(len(identities), dtype=bool)
        stays = np.ones(len(identities), dtype=bool)
        for row, (identity, uri) in enumerate(zip(identities, uris)):
            known = self._first["train"].get(identity) or self._first["val"].get(identity)
            if known is not None:
                stays[row] = False
                self._example = self._example or f"{uri} = {known}"
        self.num_pool += len(stays)
        self.num_pool_left_out += int((~stays).sum())
        return stays

    @property
    def same_as(self) -> np.ndarray:
        """int64 [N]: row of the first training image that is the same as each training image."""
        first: dict[bytes, int] = {}
        return np.array([first.setdefault(i, row) for row, i in enumerate(self._identities["train"])], dtype=np.int64)

    @property
    def in_val(self) -> np.ndarray:
        """bool [N]: which training images are validation images too."""
        val = self._first["val"]
        return np.array([identity in val for identity in self._identities["train"]], dtype=bool)

    def digest(self) -> str:
        """Identity of `same_as` and `in_val`, which decide D_u; empty where no training image has a copy."""
        same_as, in_val = self.same_as, self.in_val
        if not in_val.any() and (same_as == np.arange(len(same_as))).all():
            return ""
        return hashlib.sha256(same_as.tobytes() + in_val.tobytes()).hexdigest()

    def counts(self) -> dict[str, int]:
        """How many images of the pool were left out, of the validation images are training images, of those repeat."""
        train, val = self._first["train"], self._identities["val"]
        return {
            "pool_left_out": self.num_pool_left_out,
            "val_in_train": sum(identity in train for identity in val),
            "train_repeated": len(self._identities["train"]) - len(train),
        }

    def warnings(self) -> list[str]:
        """A sentence for the validation images that are training images: no number from them can be trusted."""
        train, val = self._first["train"], self._first["val"]
        if not (number := self.counts()["val_in_train"]):
            return []
        first = next(identity for identity in val if identity in train)
        return [
            f"{number:,} of {len(self._identities['val']):,} validation images are training images too ({self.how}; "
            f"the first: {val[first]} = {train[first]}): their AP shows what was memorised. D_u leaves "
            "them out, D_l may hold them: take them out of one of the splits."
        ]

    def notes(self) -> list[str]:
        """A sentence for each kind of copies that are left out of D_u."""
        counts, notes = self.counts(), []
        if number := counts["pool_left_out"]:
            notes.append(
                f"{number:,} of {self.num_pool:,} images of the extra pool are training or validation images "
                f"({self.how}; the first: {self._example}) and are left out."
            )
        if number := counts["train_repeated"]:
            notes.append(
                f"{number:,} of {len(self._identities['train']):,} training images repeat another one ({self.how}): "
                "copies of labelled images are left out of D_u."
            )
        return notes


def identity_of(content_sha256: bytes, uri: str) -> bytes:
    """What `Copies` knows an image by: its content where that was read, else its path without links."""
    return (content_sha256 or hashlib.sha256(real(uri).encode()).digest())[:IDENTITY_BYTES]


def blind_spot(verify: str) -> str:
    """What a dataset's hash cannot see with less than `data.verify=full`; empty for `full`."""
    if verify == "full":
        return ""
    return (
        f"data.verify={verify}: sizes stand for the content of images, so that a file rewritten with as many bytes "
        "does not change the dataset's hash, and copies under other names are not found (links are)."
    )
