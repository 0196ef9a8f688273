"""Evaluation: metrics of known values, which examples stand where in a prompt, and what is reported."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from flamingo import evaluate as evaluation
from flamingo.evaluate import Score, Task, cider, confidence, evaluate, exact_match, select, table, vqa_accuracy
from flamingo.prompt import Shot, collate, few_shot
from tests.flamingo.conftest import images, tiny_flamingo
from tests.flamingo.test_data import fill, picture, transform

TEMPLATE = "<image> {answer}\n"
ANSWERS = ["one", "two", "big nine"]


def shots(count: int, seed: int = 0) -> list[Shot]:
    return [Shot([image], ANSWERS[n % 3]) for n, image in enumerate(images(count, seed))]


def task(**changes) -> Task:
    """4 examples, 5 queries."""
    queries = shots(5, seed=1)
    made = Task(shots(4), queries, [[query.answer] for query in queries], TEMPLATE)
    return dataclasses.replace(made, **changes)


def test_exact_match_wants_the_whole_text():
    assert exact_match(" a two\n", ["one", "a two"]) == 1
    assert exact_match("a two three", ["a two"]) == exact_match("A two", ["a two"]) == 0


@pytest.mark.parametrize(
    ("agree", "expected"),
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],  # of ten people, as the challenge gives it
)
def test_vqa_accuracy_of_ten_people(agree, expected):
    assert vqa_accuracy("yes", ["yes"] * agree + ["no"] * (10 - agree)) == pytest.approx(expected)


def test_vqa_accuracy_reads_words_and_not_their_spelling():
    assert vqa_accuracy("The Two dogs.", ["2 dogs"]) == 1
    assert vqa_accuracy("don't know", ["dont know", "x"]) == 1
    assert vqa_accuracy("dogs", ["dog"]) == 0


def test_cider_of_known_captions():
    pytest.importorskip("pycocoevalcap")
    references = [["a cat on a mat"], ["two dogs run in the snow"]]
    same = cider(["A cat on a mat.", "two dogs run in the snow"], references)
    assert same == pytest.approx([10, 10])
    other = cider(["two dogs run in the snow", "two dogs run in the snow"], references)
    assert other == pytest.approx([0, 10])
    # n-grams of 1 to 4 words, each in one of two documents; "two dogs run in" has 4, 3, 2, 1 of the 6, 5, 4, 3;
    # 4 words instead of 6 with sigma 6
    part = cider(["a cat on a mat", "two dogs run in"], references)[1]
    cosines = [(n / m) ** 0.5 for n, m in ((4, 6), (3, 5), (2, 4), (1, 3))]
    assert part == pytest.approx(10 * np.mean(cosines) * np.exp(-(2**2) / (2 * 6**2)))


def test_confidence_intervals_of_known_values():
    assert confidence([1.0] * 8 + [0.0] * 2) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wilson's
    low, high = confidence([1.0] * 20)
    assert high == pytest.approx(1)
    assert low == pytest.approx(20 / (20 + 1.96**2))
    assert confidence([2.0, 4.0, 6.0, 8.0]) == pytest.approx((5 - 2.5303, 5 + 2.5303), abs=1e-3)


def test_rices_puts_the_most_similar_last():
    support = torch.eye(4)
    query = torch.tensor([[0.1, 5.0, 2.0, 1.0], [9.0, 0.2, 0.3, 0.1]])
    generator = torch.Generator()
    assert select(query, support, 3, "rices", generator).tolist() == [[3, 2, 1], [1, 2, 0]]
    longer = support * torch.tensor([[1.0], [1.0], [100.0], [1.0]])  # the angle counts and not the length
    assert select(query, longer, 3, "rices", generator).tolist() == [[3, 2, 1], [1, 2, 0]]


def test_random_examples_differ_by_query_and_do_not_repeat():
    generator = torch.Generator().manual_seed(0)
    chosen = select(torch.zeros(50, 2), torch.zeros(6, 2), 4, "random", generator)
    assert all(len(set(row)) == 4 for row in chosen.tolist())
    assert len({tuple(row) for row in chosen.tolist()}) > 30
    assert set(chosen.flatten().tolist()) == set(range(6))


def test_prompts_hold_the_examples_and_then_the_query(tokenizer, monkeypatch):
    model, seen = tiny_flamingo(gates=0.5), []

    def write(model, tokenizer, batch, **options):
        seen.append((batch, options))
        return [" one"] * len(batch.input_ids)

    monkeypatch.setattr(evaluation, "generate_text", write)
    asked = task()
    scores = evaluate(model, tokenizer, asked, shots=[0, 2, 4], selection="rices", batch_size=3)
    assert [score.shots for score in scores] == [0, 2, 4]
    assert [score.answers for score in scores] == [["one"] * 5] * 3
    assert [score.score for score in scores] == [0.4] * 3
    assert len(seen) == 3 * 2
    features = [shot.media[0].mean((0, 1)) for shot in asked.support]
    for row, query in enumerate(asked.queries[:3]):
        similarity = [torch.cosine_similarity(query.media[0].mean((0, 1)), feature, 0).item() for feature in features]
        order = sorted(range(4), key=lambda index: similarity[index])[2:]
        expected = collate([few_shot([asked.support[index] for index in order], query, TEMPLATE)], tokenizer)
        batch, options = seen[2]
        assert torch.equal(batch.input_ids[row, batch.attention_mask[row].bool()], expected.input_ids[0])
        assert torch.equal(batch.media[row], expected.media[0])
        assert options["stop"] == "\n"
    zero = seen[0][0]
    assert zero.media.shape[:2] == (3, 1)  # the query's own
    assert (zero.input_ids == tokenizer.text_ids("\n")[0]).sum(1).tolist() == [2, 2, 2]  # two examples in text


def test_closed_tasks_take_the_likeliest_over_several_orders(tokenizer, monkeypatch):
    model = tiny_flamingo(gates=0.5)
    given = itertools.cycle([torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-9.0, -2.0, -1.0]])])
    prompts, endings = [], []

    def likelihood(model, batch, answers):
        prompts.append(batch.input_ids)
        endings.append(answers)
        return next(given).expand(len(batch.input_ids), -1)

    monkeypatch.setattr(evaluation, "rank", likelihood)
    (score,) = evaluate(model, tokenizer, task(candidates=ANSWERS), shots=[4], orders=2, batch_size=8, seed=1)
    assert score.answers == ["two"] * 5  # -4 of two orders, the others -10
    assert score.score == pytest.approx(2 / 5)
    assert endings[0] == [tokenizer.text_ids(f" {answer}\n") for answer in ANSWERS]
    assert len(prompts) == 2
    assert not torch.equal(*prompts)
    assert torch.equal(prompts[0].sort(1).values, prompts[1].sort(1).values)  # the same examples


def test_both_kinds_run_on_a_model_and_depend_on_the_seed(tokenizer):
    model = tiny_flamingo(gates=0.5)
    for asked in (task(), task(candidates=ANSWERS)):
        scores = evaluate(model, tokenizer, asked, shots=[0, 1, 3], batch_size=2, max_new_tokens=4)
        assert scores == evaluate(model, tokenizer, asked, shots=[0, 1, 3], batch_size=5, max_new_tokens=4)
        assert all(0 <= score.low <= score.score <= score.high <= 1 for score in scores)


def test_examples_are_read_from_files(tmp_path):
    fill(tmp_path, {"a": {"png": picture(7), "txt": b"a cat\nthe cat\n", "question.txt": b"what?"}})
    fill(tmp_path, {"b": {"0.png": picture(8), "1.png": picture(9), "txt": b"dog"}})
    examples, references = evaluation.read_shots(str(tmp_path), transform)
    assert [(shot.answer, shot.question) for shot in examples] == [("a cat", "what?"), ("dog", "")]
    assert [shot.media[0].flatten().tolist() for shot in examples] == [[7], [8, 9]]
    assert references == [["a cat", "the cat"], ["dog"]]
    fill(tmp_path, {"c": {"png": picture(7)}})
    with pytest.raises(ValueError, match=r"c must have an image and a \.txt"):
        evaluation.read_shots(str(tmp_path), transform)


def test_reports(tmp_path):
    results = {
        "random": [Score(0, 0.25, 0.1, 0.4, ["x"]), Score(4, 0.5, 0.4, 0.6, ["y"])],
        "rices": [Score(0, 0.25, 0.1, 0.4, ["x"]), Score(4, 0.75, 0.6, 0.9, ["z"])],
    }
    lines = table(results).splitlines()
    assert lines[0].split() == ["shots", "random", "rices"]
    assert lines[2].split() == ["4", "0.500", "(0.400..0.600)", "0.750", "(0.600..0.900)"]
    evaluation.save(tmp_path / "out", results, chance=0.2)
    written = json.loads((tmp_path / "out/scores.json").read_text())
    assert written["rices"][1] == {"shots": 4, "score": 0.75, "low": 0.6, "high": 0.9, "answers": ["z"]}
    assert (tmp_path / "out/scores.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        ({}, {"shots": [5]}, "shots must be at most the 4 examples, got 5"),
        ({}, {"selection": "best"}, "selection must be one of random, rices, got 'best'"),
        ({}, {"orders": 2}, "orders must be 1 where answers are written, got 2"),
        ({"metric": "bleu"}, {}, "metric must be one of exact, vqa, cider, got 'bleu'"),
        ({"metric": "vqa", "candidates": ANSWERS}, {}, "metric must be exact where there are candidates, got 'vqa'"),
        ({"references": [["one"]]}, {}, "references must be 5 like queries, got 1"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(tokenizer, asked, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tiny_flamingo(), tokenizer, task(**asked), **({"shots": [1]} | options))
