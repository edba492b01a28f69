"""Class names as prompts of a text-prompted detector: words, token ids, and which tokens stand for which class."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cast_ray.contracts.records import Category, class_names
from cast_ray.recipe import PromptConfig


@dataclass(frozen=True)
class Phrase:
    """Token ids of some words that stand for class `label`."""

    label: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """One prompt: `[CLS] person . traffic light . [SEP]`.

    input_ids: int64 [T]; phrases: float [P, T], 1 where a token belongs to a phrase; labels: int64 [P], their classes.
    """

    input_ids: torch.Tensor
    phrases: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> Prompt:
        return Prompt(self.input_ids.to(device), self.phrases.to(device), self.labels.to(device))

    def token_map(self, num_classes: int, num_tokens: int) -> torch.Tensor:
        """float [C, num_tokens]: 1 where a token stands for a class; a class that was not asked for has none."""
        tokens = self.phrases.new_zeros(num_classes, num_tokens)
        tokens[:, : self.phrases.shape[1]].index_add_(0, self.labels, self.phrases)
        return tokens

    def class_scores(self, token_probabilities: torch.Tensor, num_classes: int) -> torch.Tensor:
        """Score of each class: the mean over a phrase's tokens, the best of a class's phrases.

        Args:
            token_probabilities: float [..., T' >= T].

        Returns:
            float [..., C]; 0 for a class that was not asked for.
        """
        share = self.phrases / self.phrases.sum(1, keepdim=True)
        scores = token_probabilities[..., : share.shape[1]] @ share.T.to(token_probabilities.dtype)
        out = scores.new_zeros(*scores.shape[:-1], num_classes)
        return out.scatter_reduce(-1, self.labels.expand(scores.shape), scores, "amax")


def texts_of(categories: Sequence[Category], config: PromptConfig) -> dict[str, tuple[str, ...]]:
    """Name of each class, as in `class_names`, to the texts that mean it: its synonyms where it has any, else its name.

    Classes of one name are told apart in `synonyms` only: `{"fish (id 9)": [tuna]}`.
    """
    return {name: config.synonyms.get(name, (c.name,)) for name, c in zip(class_names(categories), categories)}


def class_words(
    categories: Sequence[Category], config: PromptConfig, field: str = "teacher.prompt.synonyms"
) -> list[list[str]]:
    """The words for each class: see `texts_of`, in lower case and without punctuation.

    Raises:
        ValueError: no class, a synonym for a class that there is not, no word left, or one word for two classes.
    """
    if not categories:
        raise ValueError("no class to look for: expected at least one class name")
    texts = texts_of(categories, config)
    for name in config.synonyms:
        if name not in texts:
            close = difflib.get_close_matches(name, list(texts), n=1, cutoff=0.4)
            hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(list(texts)[:12])}"
            raise ValueError(f"{field}: the dataset has no class {name!r}: {hint}")
    taken: dict[str, str] = {}
    words: list[list[str]] = []
    for name, given in texts.items():
        mine = list(dict.fromkeys(_plain(text) for text in given))
        if not mine or not all(mine):
            raise ValueError(f"{field}: class {name!r} has no words to ask for: name some there")
        for word in mine:
            if taken.setdefault(word, name) != name:
                raise ValueError(
                    f"{field}: {word!r} stands for both {taken[word]!r} and {name!r}: expected one class, name other "
                    "words there"
                )
        words.append(mine)
    return words


def _plain(text: str) -> str:
    """Lower case, with `_`, slashes and the delimiters of prompts as spaces."""
    return " ".join(re.sub(r"[_/\\.?!;:,()\[\]]+", " ", text.lower()).split())


class Prompter:
    """Builds prompts for a list of classes.

    Args:
        tokenizer: BERT's, of the detector.
        categories: C classes.
        config: synonyms and the length of a prompt.
        max_tokens: what the detector takes.

    Raises:
        ValueError: a class that the tokenizer does not know, or whose words alone are longer than a prompt.
    """

    def __init__(self, tokenizer: Any, categories: Sequence[Category], config: PromptConfig, max_tokens: int):
        self.num_classes = len(categories)
        names = class_names(categories)
        self.max_tokens = min(max_tokens, config.max_tokens or max_tokens)
        self.start, self.stop = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.full_stop = tokenizer.convert_tokens_to_ids(".")
        self.phrases: list[list[Phrase]] = []
        for label, words in enumerate(class_words(categories, config)):
            mine = [Phrase(label, tuple(tokenizer(w, add_special_tokens=False)["input_ids"])) for w in words]
            for word, phrase in zip(words, mine):
                if not phrase.ids or tokenizer.unk_token_id in phrase.ids:
                    raise ValueError(
                        f"teacher.prompt: the detector's text encoder has no tokens for {word!r} of class "
                        f"{names[label]!r}: name other words in teacher.prompt.synonyms"
                    )
            if self._length(mine) > self.max_tokens:
                raise ValueError(
                    f"teacher.prompt: class {names[label]!r} takes {self._length(mine)} tokens, a prompt holds "
                    f"{self.max_tokens}: shorten its teacher.prompt.synonyms or raise teacher.prompt.max_tokens"
                )
            self.phrases.append(mine)

    def _length(self, phrases: Sequence[Phrase]) -> int:
        return 2 + sum(len(p.ids) + 1 for p in phrases)

    def all_prompts(self) -> list[Prompt]:
        """Makes as few prompts as hold all classes, in their order; a class is never divided between two prompts."""
        groups: list[list[Phrase]] = [[]]
        for phrases in self.phrases:
            if self._length([*groups[-1], *phrases]) > self.max_tokens:
                groups.append([])
            groups[-1] += phrases
        return [self._join(group) for group in groups]

    def prompt_for(self, wanted: Sequence[int]) -> Prompt:
        """One prompt of the classes `wanted`, the first ones before the others where not all fit."""
        chosen: list[Phrase] = []
        for label in wanted:
            if self._length([*chosen, *self.phrases[label]]) <= self.max_tokens:
                chosen += self.phrases[label]
        return self._join(sorted(chosen, key=lambda phrase: phrase.label))

    def _join(self, phrases: Sequence[Phrase]) -> Prompt:
        ids = [self.start]
        places = []
        for phrase in phrases:
            places.append((len(ids), len(ids) + len(phrase.ids)))
            ids += [*phrase.ids, self.full_stop]
        ids.append(self.stop)
        tokens = torch.zeros(len(phrases), len(ids))
        for row, (start, stop) in enumerate(places):
            tokens[row, start:stop] = 1
        return Prompt(torch.tensor(ids), tokens, torch.tensor([p.label for p in phrases], dtype=torch.int64))
