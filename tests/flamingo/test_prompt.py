"""Prompts to token ids, and batches of them."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from flamingo import Prompt, PromptTokenizer, collate
from tests.flamingo.conftest import VOCABULARY, images, word_tokenizer


def ids(*words: str) -> list[int]:
    return [VOCABULARY.index(word) for word in words]


def test_each_image_is_one_token(tokenizer):
    text = "<image> a two\n<image><image> big"
    expected = ids("<image>", " a", " two", "\n", "<image>", "<image>", " big")
    assert tokenizer.prompt_ids(text) == expected
    assert tokenizer.decode(tokenizer.text_ids(" a two\n")) == " a two\n"


def test_text_alone_is_what_the_tokenizer_makes_of_it(tokenizer):
    assert tokenizer.prompt_ids(" a big two\n") == tokenizer.tokenizer(" a big two\n")["input_ids"]


def test_what_the_tokenizer_puts_first_comes_once():
    words = word_tokenizer()
    words.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    assert PromptTokenizer(words).prompt_ids("<image> a<image>") == ids("<pad>", "<image>", " a", "<image>")


def test_rows_are_padded_on_the_left(tokenizer):
    one, two = images(2)
    batch = collate([Prompt("<image>", [one], " a two\n"), Prompt("<image> a<image>", [one, two], "\n")], tokenizer)
    assert batch.input_ids.tolist() == [
        ids("<image>", " a", " two", "\n"),
        ids("<image>", " a", "<image>", "\n"),
    ]
    longer = collate([Prompt(" a"), Prompt(" a big", target=" two\n")], tokenizer)
    assert longer.attention_mask.tolist() == [[0, 0, 0, 1], [1, 1, 1, 1]]
    assert longer.targets.tolist() == [[False] * 4, [False, False, True, True]]
    assert longer.media is None


def test_media_are_padded_with_zeros(tokenizer):
    one, two = images(2)
    batch = collate([Prompt(" a"), Prompt("<image>", [one]), Prompt("<image><image>", [one, two])], tokenizer)
    assert batch.media.shape == (3, 2, *one.shape)
    assert torch.equal(batch.media[2], torch.stack([one, two]))
    assert torch.equal(batch.media[1, 0], one)
    assert not batch.media[0].any()
    assert not batch.media[1, 1].any()
    assert batch.media_locations.sum(1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("text", ["", " a", "<image><image>"])
def test_counts_that_do_not_fit_are_refused(tokenizer, text):
    with pytest.raises(ValueError, match=r"collate: prompts must .* row 1"):
        collate([Prompt(" a"), Prompt(text, images(1))], tokenizer)


def test_an_image_token_outside_the_vocabulary_is_refused(tokenizer):
    with pytest.raises(ValueError, match="image_token must be in the vocabulary, got '<picture>'"):
        PromptTokenizer(tokenizer.tokenizer, "<picture>")
