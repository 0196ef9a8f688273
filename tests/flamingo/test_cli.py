"""The command line, from a folder of images to answers about them."""

import csv
import io
import json
import pathlib
import re
import shlex

import numpy as np
import pytest
from PIL import Image

from flamingo import checkpoint, cli
from flamingo.cli import main
from tests.flamingo.conftest import tiny_lm, word_tokenizer
from tests.flamingo.test_data import fill
from tests.support.process import normal_process

pytestmark = normal_process
CAPTIONS = {"dark": "a big two", "bright": "nine"}


def shade(kind: str, seed: int) -> bytes:
    """A noisy picture, 40 x 24, dark or bright."""
    pixels = np.random.default_rng(seed).integers(0, 90, (24, 40, 3)) + (0 if kind == "dark" else 165)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "png")
    return file.getvalue()


def photos(folder: pathlib.Path, count: int, seed: int) -> pathlib.Path:
    """Dark and bright ones in turn."""
    samples = {}
    for n in range(count):
        kind = list(CAPTIONS)[n % 2]
        samples[f"{n:02d}-{kind}"] = {"png": shade(kind, seed + n), "txt": CAPTIONS[kind].encode()}
    return fill(folder, samples)


def pages(folder: pathlib.Path, count: int) -> None:
    """Two photos and their captions on each, in all four combinations."""
    for n in range(count):
        kinds = [list(CAPTIONS)[n % 2], list(CAPTIONS)[n // 2 % 2]]
        shown = {f"{place}.png": shade(kind, 500 + 2 * n + place) for place, kind in enumerate(kinds)}
        text = "".join(f"<image> {CAPTIONS[kind]}" for kind in kinds)
        fill(folder, {f"page{n}": {**shown, "txt": text.encode()}})


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> pathlib.Path:
    """A language model, photos, and a training run on them."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_lm().save_pretrained(folder / "lm")
    word_tokenizer().save_pretrained(folder / "lm")
    photos(folder / "photos", 24, 0)
    photos(folder / "held-out", 12, 1000)
    pages(folder / "pages", 12)
    main(training(folder, 40))
    return folder


def training(folder: pathlib.Path, steps: int) -> list[str]:
    return [
        *("train", str(folder / "run"), "--preset", "tiny", "--lm", str(folder / "lm"), "--latents", "4"),
        *("--data", f"pairs:{folder / 'photos'}@0.5", "--data", f"pages:{folder / 'pages'}", "--p-next", "0"),
        *("--batch-size", "8", "--steps", str(steps)),
        *("--warmup", "5", "--lr", "3e-3", "--gate-lr", "3e-2", "--save-every", "20"),
    ]


def test_training_writes_what_it_did_and_how_its_model_is_built(workplace):
    rows = list(csv.DictReader((workplace / "run/log.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 41))
    assert float(rows[-1]["loss"]) < 0.1 < float(rows[0]["loss"])
    parts = 0.5 * float(rows[0]["loss/pairs-0"]) + float(rows[0]["loss/pages-1"])
    assert float(rows[0]["loss"]) == pytest.approx(parts)
    path = checkpoint.latest(workplace / "run")
    about = json.loads((path / checkpoint.ABOUT).read_text())
    assert about["config"]["latents"] == 4
    assert about["config"]["language"]["weights"] == str(workplace / "lm")


def test_a_run_goes_on_where_it_stopped(workplace, tmp_path):
    (tmp_path / "lm").symlink_to(workplace / "lm")
    (tmp_path / "photos").symlink_to(workplace / "photos")
    (tmp_path / "pages").symlink_to(workplace / "pages")
    for steps in (3, 5):
        main(training(tmp_path, steps))
    rows = list(csv.DictReader((tmp_path / "run/log.csv").open()))
    whole = list(csv.DictReader((workplace / "run/log.csv").open()))
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole[:5]]


@pytest.mark.parametrize("kind", CAPTIONS)
def test_generation_says_what_it_sees(workplace, tmp_path, capsys, kind):
    (tmp_path / "new.png").write_bytes(shade(kind, 77))
    main(["generate", str(workplace / "run"), "--image", str(tmp_path / "new.png")])
    assert capsys.readouterr().out.strip() == CAPTIONS[kind]
    few = ["--image", str(tmp_path / "new.png")] * 2
    prompt = f"<image> {CAPTIONS[kind]}<|endofchunk|><image>"
    main(["generate", str(workplace / "run"), *few, "--prompt", prompt, "--beams", "2", "--max-new-tokens", "5"])
    assert capsys.readouterr().out.strip() == CAPTIONS[kind]


def test_evaluation_prints_and_writes_scores(workplace, tmp_path, capsys):
    sets = ["--support", str(workplace / "photos"), "--queries", str(workplace / "held-out")]
    options = ["--shots", "0", "2", "--selection", "random", "rices", "--closed", "--orders", "2"]
    main(["evaluate", str(workplace / "run"), *sets, *options, "--output", str(tmp_path)])
    scores = json.loads((tmp_path / "scores.json").read_text())
    for zero, two in scores.values():  # text-only examples, as with zero shots, are nothing it was trained on
        assert zero["score"] > 0.75
        assert two["score"] == 1
    assert [len(score["answers"]) for score in scores["rices"]] == [12, 12]
    assert (tmp_path / "scores.png").exists()
    assert "1.000" in capsys.readouterr().out
    main(["evaluate", str(workplace / "run"), *sets, "--shots", "1", "--output", str(tmp_path), "--limit", "5"])
    (written,) = json.loads((tmp_path / "scores.json").read_text())["random"]
    assert written["score"] == 1
    assert len(written["answers"]) == 5


def test_chat_has_turns_and_new_images(workplace, tmp_path, monkeypatch, capsys):
    for kind in CAPTIONS:
        (tmp_path / f"{kind}.png").write_bytes(shade(kind, 78))
    lines = [
        f"<image:{tmp_path / 'dark.png'}>",
        f"<image:{tmp_path / 'bright.png'}>",
        "<image:nowhere.png>",
        "/reset",
        f"<image:{tmp_path / 'bright.png'}>",
        "/quit",
    ]
    entered = iter(lines)
    monkeypatch.setattr("builtins.input", lambda prompt: next(entered))
    main(["chat", str(workplace / "run"), "--template", "{images}{line}"])
    answers = capsys.readouterr().out.splitlines()[1:]
    assert answers[:2] == [CAPTIONS["dark"], CAPTIONS["bright"]]
    assert "cannot be read" in answers[2]
    assert answers[3:] == [CAPTIONS["bright"]]


@pytest.mark.parametrize("command", ["train", "generate", "evaluate", "chat"])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    expected = {
        "train": ["pairs cat.jpg + cat.txt", "--data pages:m3w@1", "learning rate, between warmup", "torchrun"],
        "generate": ["<image> a dog<|endofchunk|><image>", "--beams"],
        "evaluate": ["--metric vqa --selection random rices", "the likeliest of the answers"],
        "chat": ["<image:cat.jpg> What is this?", "/reset forgets all"],
    }
    assert all(phrase in text for phrase in expected[command])


def test_the_commands_of_readme_and_help_are_understood():
    text = (pathlib.Path(__file__).parents[2] / "README.md").read_text() + cli.__doc__
    text += cli.run_train.__doc__ + cli.run_generate.__doc__ + cli.run_evaluate.__doc__
    command = r"^ *(?:torchrun .*-m )?flamingo ((?:train|generate|evaluate|chat) [^|].*)$"
    lines = re.findall(command, text.replace("\\\n", " "), re.MULTILINE)
    assert len(lines) == 5 + 4 + 3
    for line in lines:
        assert cli.make_parser().parse_args(shlex.split(line)).run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "nowhere"], "must be of a checkpoint that describes its model, got nowhere"),
        (["train", "run", "--data", "audio:x", "--steps", "1"], "must be KIND:PATH[@WEIGHT] of pages, pairs, videos"),
        (["train", "run", "--data", "pairs:x", "--steps", "1"], "must describe a language model and a vision encoder"),
    ],
    ids=str,
)
def test_mistakes_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in " ".join(capsys.readouterr().err.split())
