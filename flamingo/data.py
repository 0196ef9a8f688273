"""Training data, streamed from WebDataset shards or folders: interleaved pages, image-text and video-text pairs.

A sample is the files that share a name up to the first dot, in a `.tar` shard or in a folder, which is read like one:

- pairs:  `cat.jpg` and `cat.txt`, the caption.
- videos: `run.mp4`, or its frames at one a second as `run.0.jpg`, `run.1.jpg`, …, and `run.txt`.
- pages:  `page.txt` with `<image>` where its images `page.0.jpg`, `page.1.jpg`, … stand.

Which random window of a page is read, and the order of samples, follow from seed, epoch and place alone, so a stream
that is stopped and told its position goes on with the very next batch.
"""

import dataclasses
import io
import itertools
import pathlib
import random
import re
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from flamingo.prompt import CHUNK_END, IMAGE, Batch, Example, PromptTokenizer, collate

KINDS = ("pages", "pairs", "videos")
IMAGE_FILES = ("jpg", "jpeg", "png", "webp")


@dataclasses.dataclass(frozen=True)
class Source:
    """One data set.

    path: a folder of samples, a folder of `.tar` shards, or what `webdataset` reads ("shards/{000..099}.tar", URLs).
    weight: lambda of this data set's loss.
    tokens: longest row, and length of a page's window.
    images: most images of a page's window; the text of further ones is kept without them (as in the paper).
    frames: most frames of a video, of which a random run is taken.
    p_next: share of pages whose text sees the image after it and not the one before it.
    blind_loss: whether text that sees no image counts, for instance that before the first one.
    """

    kind: str
    path: str
    weight: float = 1.0
    tokens: int = 256
    images: int = 5
    frames: int = 8
    p_next: float = 0.5
    blind_loss: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Source: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")


def page_example(
    text: str, media: Callable[[int], Tensor], tokenizer: PromptTokenizer, source: Source, rng: random.Random
) -> Example:
    """A random window of a page. A chunk ends where the next image stands, and at the end of the page.

    media: the i-th image of the page; called only for those in the window.
    """
    body = tokenizer.inner_ids(IMAGE.join(piece + CHUNK_END if piece.strip() else piece for piece in text.split(IMAGE)))
    size = source.tokens - len(tokenizer.first)
    start = rng.randrange(max(1, len(body) - size + 1))
    before = body[:start].count(tokenizer.image_id)
    ids, count = list(tokenizer.first), 0
    for token in body[start : start + size]:
        count += token == tokenizer.image_id
        if token != tokenizer.image_id or count <= source.images:
            ids.append(token)
    attend_next = rng.random() < source.p_next
    seen = [media(before + i) for i in range(min(count, source.images))]
    return _with_targets(ids, seen, tokenizer, source, attend_next)


def pair_example(text: str, media: Tensor, tokenizer: PromptTokenizer, source: Source) -> Example:
    """One image or video and its caption, in which `<image>` is but a word."""
    ids = tokenizer.prompt_ids(f"{IMAGE} {text.replace(IMAGE, 'image').strip()}{CHUNK_END}")[: source.tokens]
    return _with_targets(ids, [media], tokenizer, source)


def _with_targets(
    ids: list[int], media: list[Tensor], tokenizer: PromptTokenizer, source: Source, attend_next: bool = False
) -> Example:
    """Its targets are text; unless `blind_loss`, text only whose predecessor, which predicts it, sees an image."""
    places = [place for place, token in enumerate(ids) if token == tokenizer.image_id]
    # text at first..last is predicted by what sees an image: that after the first one, or before the last one
    first, last = (0, max(places, default=-1) + 1) if attend_next else (min(places, default=len(ids)) + 1, len(ids))
    if source.blind_loss:
        first, last = 0, len(ids)
    first = max(first, len(tokenizer.first), 1)  # nothing predicts the first token
    targets = [first <= place <= last and token != tokenizer.image_id for place, token in enumerate(ids)]
    return Example(ids, targets, media, attend_next)


def expand(path: str) -> list[str]:
    """The shards of a path: a folder's `.tar` files, or the folder itself; else what the braces of the path say."""
    if pathlib.Path(path).is_dir():
        return sorted(map(str, pathlib.Path(path).glob("*.tar"))) or [path]
    from webdataset.shardlists import expand_urls

    return expand_urls(path)


def read_shard(shard: str) -> Iterator[dict]:
    """Samples of a shard or folder: file contents by extension ("jpg", "0.jpg", "txt"), and "__key__"."""
    from webdataset.tariterators import group_by_keys, tarfile_samples

    folder = pathlib.Path(shard)
    if not folder.is_dir():
        yield from tarfile_samples([{"url": shard}])
        return
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    yield from group_by_keys(
        {"fname": str(path.relative_to(folder)), "data": path.read_bytes(), "__url__": shard} for path in files
    )


def frames_of(sample: dict) -> list[Callable[[], object]]:
    """What gives each of a sample's images (PIL, RGB): frames of its "mp4", or by the order of the numbers in names."""
    from PIL import Image

    if "mp4" in sample:
        return _video_frames(sample["mp4"])
    names = [name for name in sample if name.rpartition(".")[2] in IMAGE_FILES]
    names.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    return [lambda name=name: Image.open(io.BytesIO(sample[name])).convert("RGB") for name in names]


def _video_frames(data: bytes) -> list[Callable[[], object]]:
    """A video file's frames at one a second, from its start; needs the package `av`."""
    import av

    frames, due = [], 0.0
    try:
        with av.open(io.BytesIO(data)) as container:
            for frame in container.decode(video=0):
                if frame.time >= due:
                    frames.append(frame.to_image)
                    due += 1.0
    except av.FFmpegError as error:
        raise OSError(str(error)) from error
    return frames


def read_media(path: str, transform: Callable[[object], Tensor]) -> Tensor:
    """An image, a video file or a folder of frames: [frames, channels, height, width].

    Raises:
        ValueError: it is none of these.
    """
    file = pathlib.Path(path)
    if file.is_dir():
        frames = frames_of({frame.name.lower(): frame.read_bytes() for frame in file.iterdir()})
    else:
        frames = frames_of({file.suffix[1:].lower(): file.read_bytes()})
    if not frames:
        raise ValueError(f"read_media: path must be of an image, an .mp4 file or a folder of images, got {path}")
    return torch.stack([transform(frame()) for frame in frames])


class Stream(IterableDataset):
    """Batches of one data set for ever.

    Shards are shuffled for each epoch, and samples within runs of `shuffle` of them. Every reader (each worker of each
    of `world` ranks) takes its own shards, or its own samples of every shard where there are fewer shards than readers.

    Args:
        transform: PIL image to what the vision encoder takes, [channels, height, width].

    Raises (when read):
        ValueError: a sample lacks its text or images, or a whole epoch gave no example.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: PromptTokenizer,
        transform: Callable[[object], Tensor],
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: int = 1000,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.source, self.tokenizer, self.transform = source, tokenizer, transform
        self.batch_size, self.seed, self.shuffle, self.rank, self.world = batch_size, seed, shuffle, rank, world
        self.shards = expand(source.path)
        self.load_state_dict({"epoch": 0, "shard": 0, "sample": 0, "offset": 0})

    def state_dict(self) -> dict[str, int]:
        """Where the next batch begins: epoch, the shard and sample at which its run begins, samples done of the run."""
        return dict(self.position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = dict(state)

    def __iter__(self) -> Iterator[Batch]:
        examples = self._examples()
        while True:
            yield collate(list(itertools.islice(examples, self.batch_size)), self.tokenizer)

    def _examples(self) -> Iterator[Example]:
        while True:
            found = self.position["shard"] + self.position["offset"] > 0
            for sample in self._epoch():
                example = self._example(sample)
                if example is not None:
                    found = True
                    yield example
            if not found:
                raise ValueError(f"Stream: {self.source.path} must hold {self.source.kind} with a loss, found none")
            self.position = {"epoch": self.position["epoch"] + 1, "shard": 0, "sample": 0, "offset": 0}

    def _epoch(self) -> Iterator[dict]:
        """The samples that are left of the epoch."""
        stream = self._read()
        while run := list(itertools.islice(stream, self.shuffle)):
            self.position["shard"], self.position["sample"], _ = run[0]
            self._rng(run[0][:2]).shuffle(run)
            for _, _, sample in run[self.position["offset"] :]:
                self.position["offset"] += 1
                yield sample
            self.position["offset"] = 0

    def _read(self) -> Iterator[tuple[int, int, dict]]:
        """(shard, sample, files) of this reader, from its position on."""
        worker = get_worker_info()
        workers, index = (worker.num_workers, worker.id) if worker else (1, 0)
        readers, reader = self.world * workers, self.rank * workers + index
        shards = list(self.shards)
        self._rng("shards").shuffle(shards)
        own_shards = len(shards) >= readers
        shards = shards[reader::readers] if own_shards else shards
        first, skip = self.position["shard"], self.position["sample"]
        for shard in range(first, len(shards)):
            for number, sample in enumerate(read_shard(shards[shard])):
                if (own_shards or number % readers == reader) and (shard > first or number >= skip):
                    yield shard, number, sample

    def _rng(self, what: object) -> random.Random:
        return random.Random(f"{self.seed} {self.position['epoch']} {what}")

    def _example(self, sample: dict) -> Example | None:
        """None where a file cannot be read, which is warned of, or where nothing in it has a loss."""
        rng, source, name = self._rng(sample["__key__"]), self.source, f"{sample['__url__']}: {sample['__key__']}"
        try:
            frames = frames_of(sample)
            text = sample["txt"].decode() if "txt" in sample else None
            if text is None or len(frames) < (text.count(IMAGE) if source.kind == "pages" else 1):
                files = [file for file in sample if not file.startswith("__")]
                raise ValueError(f"Stream: {name} must hold a .txt and all of its images, got {', '.join(files)}")
            if source.kind == "pages":
                example = page_example(text, lambda i: self.transform(frames[i]())[None], self.tokenizer, source, rng)
            else:
                wanted = source.frames if source.kind == "videos" else 1
                start = rng.randrange(max(1, len(frames) - wanted + 1))
                media = torch.stack([self.transform(frame()) for frame in frames[start : start + wanted]])
                example = pair_example(text, media, self.tokenizer, source)
        except OSError as error:  # a file is no image or no video
            warnings.warn(f"{name} left out: {error}", stacklevel=2)
            return None
        return example if any(example.targets) else None
