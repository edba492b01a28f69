"""Class names as prompts: which tokens stand for which class, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tiny_checkpoints import write_bert_tokenizer
from transformers import AutoTokenizer

from cast_ray.contracts.records import Category
from cast_ray.recipe import PromptConfig
from cast_ray.teachers.prompts import Prompter, class_words

NAMES = ["person", "traffic_light", "Dog/Cat", "tv."]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("bert")
    write_bert_tokenizer(folder, ("person", "traffic", "light"))
    return AutoTokenizer.from_pretrained(folder)


def prompter(tokenizer, names=NAMES, max_tokens=64, **config) -> Prompter:
    return Prompter(tokenizer, classes(names), PromptConfig(**config), max_tokens)


def classes(names: Sequence[str]) -> list[Category]:
    return [Category(number, name) for number, name in enumerate(names)]


def test_the_ids_are_what_the_tokenizer_makes_of_the_text(tokenizer) -> None:
    (prompt,) = prompter(tokenizer).all_prompts()
    text = "person. traffic light. dog cat. tv."
    assert prompt.input_ids.tolist() == tokenizer(text)["input_ids"]


def test_every_token_stands_for_its_class_alone(tokenizer) -> None:
    (prompt,) = prompter(tokenizer).all_prompts()
    tokens = prompt.token_map(len(NAMES), 64)
    assert tokens.shape == (4, 64) and (tokens.sum(0) <= 1).all()
    spelt = [
        tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word))
        for word in ("person", "traffic light", "dog cat", "tv")
    ]
    for row, ids in zip(tokens, spelt):
        assert prompt.input_ids[row[: len(prompt.input_ids)].bool()].tolist() == ids
    assert tokens[:, 0].sum() == 0 and tokens[:, len(prompt.input_ids) - 1].sum() == 0


def test_a_class_scores_the_mean_of_its_tokens_and_the_best_of_its_synonyms(tokenizer) -> None:
    mine = prompter(tokenizer, ["light", "person"], synonyms={"light": ["traffic light", "traffic"]})
    (prompt,) = mine.all_prompts()
    # [CLS] traffic light . traffic . person . [SEP]
    probabilities = torch.tensor([[0.9, 0.2, 0.4, 0.9, 0.5, 0.9, 0.1, 0.9, 0.9], [0.0, 0.8, 0.6, 0, 0.5, 0, 0.7, 0, 0]])
    torch.testing.assert_close(prompt.class_scores(probabilities, 2), torch.tensor([[0.5, 0.1], [0.7, 0.7]]))


def test_classes_that_do_not_fit_go_into_further_prompts(tokenizer) -> None:
    names = [f"person {letter}" for letter in "abcdefgh"]  # three tokens each with its full stop
    mine = prompter(tokenizer, names, max_tokens=12)
    prompts = mine.all_prompts()
    assert [p.labels.tolist() for p in prompts] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert all(len(p.input_ids) <= 12 for p in prompts)
    # a class outside a prompt has no token there, and scores 0
    assert prompts[1].token_map(8, 12)[[0, 1, 2, 6, 7]].sum() == 0
    assert prompts[1].class_scores(torch.ones(12), 8).tolist() == [0, 0, 0, 1, 1, 1, 0, 0]


def test_a_prompt_for_some_classes_asks_for_the_first_that_fit(tokenizer) -> None:
    names = [f"person {letter}" for letter in "abcdefgh"]
    mine = prompter(tokenizer, names, max_tokens=12)
    assert mine.prompt_for([7, 2, 5, 0, 1]).labels.tolist() == [2, 5, 7]


@pytest.mark.parametrize(
    ("names", "config", "message"),
    [
        ([], {}, "expected at least one class"),
        (["person"], {"synonyms": {"persom": ["human"]}}, "no class 'persom': did you mean 'person'"),
        (["person"], {"synonyms": {"person": []}}, "'person' has no words"),
        (["person", "..."], {}, "'...' has no words"),
        (["dog", "Dog."], {}, "'dog' stands for both 'dog' and 'Dog.'"),
        (["dog", "犬"], {}, "no tokens for '犬' of class '犬'"),
        (["dog", "a very long name"], {"max_tokens": 8}, "takes 16 tokens, a prompt holds 8"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(tokenizer, names, config, message) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        prompter(tokenizer, names, **config)


def test_classes_of_one_name_need_words_of_their_own(tokenizer) -> None:
    """Both would be found wherever one of them is."""
    fish = [Category(0, "fish"), Category(1, "crab"), Category(9, "fish")]
    with pytest.raises(
        ValueError, match=r"'fish' stands for both 'fish \(id 0\)' and 'fish \(id 9\)'.* name other words"
    ):
        Prompter(tokenizer, fish, PromptConfig(), 64)
    config = PromptConfig(synonyms={"fish (id 9)": ("tuna",)})
    assert class_words(fish, config) == [["fish"], ["crab"], ["tuna"]]
    with pytest.raises(ValueError, match=r"no class 'fish': did you mean 'fish \(id"):
        class_words(fish, PromptConfig(synonyms={"fish": ("tuna",)}))


def test_names_become_plain_words() -> None:
    assert class_words(classes(["Traffic_light", "aerosol-can/spray", "cup (paper)"]), PromptConfig()) == [
        ["traffic light"],
        ["aerosol-can spray"],
        ["cup paper"],
    ]
