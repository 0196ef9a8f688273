"""Training data: which tokens count, which window is read, and that a stopped stream goes on with the next batch."""

import io
import itertools
import json
import pathlib
import random
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchdata.stateful_dataloader import StatefulDataLoader

from flamingo import Batch, PromptTokenizer, collate
from flamingo.data import Source, Stream, page_example, pair_example
from tests.flamingo.conftest import VOCABULARY


def ids(*words: str) -> list[int]:
    return [VOCABULARY.index(word) for word in words]


def picture(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((2, 2, 3), value, np.uint8)).save(file, "png")
    return file.getvalue()


def transform(image: Image.Image) -> torch.Tensor:
    """[1, 1, 1]: the grey level of the image's corner, as a number 0..255."""
    return torch.tensor(np.asarray(image)[:1, :1, :1].copy(), dtype=torch.float32)


def fill(folder: pathlib.Path, samples: dict[str, dict[str, bytes]]) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, files in samples.items():
        for ending, content in files.items():
            (folder / f"{name}.{ending}").write_bytes(content)
    return folder


def pack(shard: pathlib.Path, samples: dict[str, dict[str, bytes]]) -> None:
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, "w") as tar:
        for name, files in samples.items():
            for ending, content in files.items():
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def pairs(numbers: range) -> dict[str, dict[str, bytes]]:
    return {f"p{n:03d}": {"png": picture(n), "txt": b" a two"} for n in numbers}


def levels(batch: Batch) -> list[int]:
    return batch.media.flatten().int().tolist()


def page(tokenizer: PromptTokenizer, text: str, seed: int = 0, **options):
    source = Source("pages", "", **({"p_next": 0.0} | options))
    return page_example(text, lambda i: torch.full((1, 1, 1, 1), float(i)), tokenizer, source, random.Random(seed))


TEXT = " a<image> two big<image> one"
PAGE = ids(" a", "\n", "<image>", " two", " big", "\n", "<image>", " one", "\n")


@pytest.mark.parametrize(
    ("options", "targets"),
    [
        ({}, "000111011"),  # a target is text whose predecessor sees an image: not " a" and its end
        ({"blind_loss": True}, "010111011"),  # nothing predicts the first token, and images are no text
        ({"p_next": 1.0}, "010111010"),  # after the last image nothing is seen but by that image's own token
    ],
    ids=str,
)
def test_losses_are_on_text_that_sees_an_image(tokenizer, options, targets):
    example = page(tokenizer, TEXT, **options)
    assert example.input_ids == PAGE
    assert example.targets == [mark == "1" for mark in targets]
    assert example.attend_next == ("p_next" in options)
    assert torch.stack(example.media).flatten().tolist() == [0, 1]


def test_half_of_all_pages_attend_to_the_next_image(tokenizer):
    count = sum(page(tokenizer, TEXT, seed, p_next=0.5).attend_next for seed in range(1000))
    assert abs(count - 500) < 4 * 1000**0.5 / 2  # four standard deviations


def test_windows_are_random_and_take_their_own_images(tokenizer):
    numbers = VOCABULARY[-10:]
    text = "".join(f"<image>{number}" for number in numbers)  # 3 tokens each, with the end of the chunk
    starts = set()
    for seed in range(300):
        example = page(tokenizer, text, seed, tokens=12, images=2, blind_loss=True)
        words = [VOCABULARY[token] for token in example.input_ids]
        seen = [int(image) for image in torch.stack(example.media).flatten()]
        assert words.count("<image>") == len(seen) == 2
        # the images are those that stand before the window's first texts, in order
        after = [words[place + 1] for place, word in enumerate(words) if word == "<image>" and place + 1 < len(words)]
        assert after == [numbers[image] for image in seen[: len(after)]]
        # what is dropped of 12 tokens are further images only
        assert sum(word != "<image>" for word in words) == 8
        starts.add((seen[0], words[0]))
    assert len(starts) == 3 * 10 - 12 + 1


def test_what_stands_before_every_text_stands_before_every_window(tokenizer):
    tokenizer = PromptTokenizer(tokenizer.tokenizer)
    tokenizer.first = ids("<pad>")
    for seed in range(5):
        example = page(tokenizer, TEXT, seed, tokens=4, blind_loss=True)
        assert example.input_ids[0] == 0
        assert len(example.input_ids) == 4
        assert not example.targets[0]


def test_pairs_and_their_collation(tokenizer):
    source = Source("pairs", "")
    one = pair_example("a two", torch.ones(1, 3, 2, 2), tokenizer, source)
    two = pair_example(" big\n", torch.full((1, 3, 2, 2), 2.0), tokenizer, source)
    assert (
        pair_example("a<image>two", torch.ones(1, 3, 2, 2), tokenizer, source).input_ids.count(tokenizer.image_id) == 1
    )
    text = page(tokenizer, " a two", blind_loss=True)
    batch = collate([one, two, text], tokenizer)
    assert batch.input_ids.tolist() == [
        ids("<image>", " a", " two", "\n"),
        [0, *ids("<image>", " big", "\n")],
        [0, *ids(" a", " two", "\n")],
    ]
    assert batch.targets.int().tolist() == [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]
    assert batch.media_locations.int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert batch.media.shape == (3, 1, 1, 3, 2, 2)
    assert batch.media.flatten(1)[:, 0].tolist() == [1, 2, 0]


def test_shards_and_folders_hold_the_same(tokenizer, tmp_path):
    samples = pairs(range(7))
    pack(tmp_path / "shards/0.tar", samples)
    fill(tmp_path / "folder", samples)
    found = []
    for path in ("shards", "folder", "shards/{0..0}.tar"):
        stream = Stream(Source("pairs", str(tmp_path / path)), tokenizer, transform, 7)
        found.append(sorted(levels(next(iter(stream)))))
    assert found == [list(range(7))] * 3


def test_an_epoch_reads_all_samples_once_in_an_order_of_its_own(tokenizer, tmp_path):
    for shard in range(4):
        pack(tmp_path / f"{shard}.tar", pairs(range(5 * shard, 5 * shard + 5)))
    stream = iter(Stream(Source("pairs", str(tmp_path)), tokenizer, transform, 5, shuffle=8))
    epochs = [[level for batch in itertools.islice(stream, 4) for level in levels(batch)] for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(20))] * 2
    assert epochs[0] != epochs[1]
    assert list(range(20)) not in epochs


@pytest.mark.parametrize("shards", [1, 5])
def test_readers_share_the_samples(tokenizer, tmp_path, shards):
    for shard in range(shards):
        pack(tmp_path / f"{shard}.tar", pairs(range(shard * 30 // shards, (shard + 1) * 30 // shards)))
    source = Source("pairs", str(tmp_path))
    readers = [iter(Stream(source, tokenizer, transform, 1, rank=rank, world=3)) for rank in range(3)]
    counts = [30 // shards * len(range(rank, shards, 3)) if shards > 3 else 10 for rank in range(3)]
    read = [levels(next(reader))[0] for reader, count in zip(readers, counts, strict=True) for _ in range(count)]
    assert sorted(read) == list(range(30))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_stream_goes_on_with_the_next_batch(tokenizer, tmp_path, workers):
    for shard in range(3):
        pack(tmp_path / f"{shard}.tar", pairs(range(7 * shard, 7 * shard + 7)))

    def loader() -> StatefulDataLoader:
        stream = Stream(Source("pairs", str(tmp_path)), tokenizer, transform, 2, shuffle=5)
        return StatefulDataLoader(stream, batch_size=None, num_workers=workers)

    whole = [levels(batch) for batch in itertools.islice(loader(), 16)]
    first = loader()
    assert [levels(batch) for batch in itertools.islice(first, 9)] == whole[:9]
    position = json.loads(json.dumps(first.state_dict()))
    second = loader()
    second.load_state_dict(position)
    assert [levels(batch) for batch in itertools.islice(second, 7)] == whole[9:]


def test_videos_are_runs_of_frames(tokenizer, tmp_path):
    frames = {f"{n}.png": picture(n) for n in range(12)}  # of which 10 comes after 9
    fill(tmp_path, {"long": {**frames, "txt": b"big"}, "short": {"0.png": picture(50), "txt": b"one"}})
    stream = iter(Stream(Source("videos", str(tmp_path), frames=4), tokenizer, transform, 2))
    starts = set()
    for batch in itertools.islice(stream, 30):
        assert batch.media.shape == (2, 1, 4, 1, 1, 1)
        rows = zip(batch.media.flatten(1).int().tolist(), batch.frame_counts.tolist(), strict=True)
        (long, count), (short, alone) = sorted(rows)
        assert (count, alone) == ([4], [1])
        assert long == list(range(long[0], long[0] + 4))
        assert short == [50, 0, 0, 0]
        starts.add(long[0])
    assert starts == set(range(9))


def test_video_files_are_read_at_a_frame_a_second(tokenizer, tmp_path):
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 32
        for n in range(12):  # 3 seconds
            image = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * n, np.uint8), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    fill(tmp_path, {"run": {"mp4": file.getvalue(), "txt": b"big"}, "bad": {"mp4": b"no video", "txt": b"big"}})
    with pytest.warns(UserWarning, match="bad left out"):
        batch = next(iter(Stream(Source("videos", str(tmp_path), frames=3), tokenizer, transform, 2)))  # of two epochs
    torch.testing.assert_close(batch.media.flatten(), torch.tensor([0.0, 80.0, 160.0] * 2), atol=12, rtol=0)


def test_what_is_no_image_is_left_out_with_a_warning(tokenizer, tmp_path):
    fill(tmp_path, {**pairs(range(2)), "bad": {"png": b"no image", "txt": b"one"}})
    with pytest.warns(UserWarning, match=r"bad left out: cannot identify"):
        batch = next(iter(Stream(Source("pairs", str(tmp_path)), tokenizer, transform, 4)))
    assert sorted(levels(batch)) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("kind", "files", "message"),
    [
        ("pairs", {"png": picture(0)}, r"only must hold a .txt and all of its images, got png"),
        ("pairs", {"txt": b"a"}, r"only must hold a .txt and all of its images, got txt"),
        ("pages", {"txt": b"<image> a<image>", "0.png": picture(0)}, r"all of its images, got 0.png, txt"),
        ("pages", {"txt": b" a two"}, r"must hold pages with a loss, found none"),
    ],
)
def test_incomplete_samples_are_refused(tokenizer, tmp_path, kind, files, message):
    fill(tmp_path, {"only": files})
    with pytest.raises(ValueError, match=message):
        next(iter(Stream(Source(kind, str(tmp_path)), tokenizer, transform, 1)))


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be one of pages, pairs, videos, got 'audio'"):
        Source("audio", "")
