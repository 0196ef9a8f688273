"""What test_ranks runs on several ranks: python -m torch.distributed.run ... -m tests.flamingo.ranks <folder>."""

import json
import pathlib
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from flamingo import Batch, Prompt, PromptTokenizer, checkpoint, collate
from flamingo.train import Recipe, Trainer
from tests.flamingo.conftest import images, tiny_flamingo, word_tokenizer

STEPS, ROWS = 3, 4


def batches(step: int, rank: int, world: int) -> dict[str, list[Batch]]:
    """Two data sets of unequal target counts, one in two batches; text alone on the last of several ranks."""
    tokenizer = PromptTokenizer(word_tokenizer())
    words = [" two", " nine", " big one", " handwritten seven"]
    features = [image.double() for image in images(2 * ROWS, seed=step)]
    captions = [Prompt("<image>", [image], f"{word}\n") for image, word in zip(features, words, strict=False)]
    pages = [
        Prompt("<image> a", [image], f"{word}{word}\n") for image, word in zip(features[ROWS:], words, strict=False)
    ]
    pages[-2:] = [Prompt(" a", target=" big two\n")] * 2
    own = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    half = ROWS // world // 2
    return {
        "captions": [collate(captions[own][:half], tokenizer), collate(captions[own][half:], tokenizer)],
        "pages": [collate(pages[own], tokenizer)],
    }


def run(parallel: str, folder: pathlib.Path) -> list[dict[str, float]]:
    """Losses and gradient norms of each step, half of them before a checkpoint and half after it."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    losses = []
    for until in (2, STEPS):
        model = tiny_flamingo("gpt_neox", gates=0.5).double()
        recipe = Recipe(STEPS, lr=1e-2, warmup=1, recompute=True, parallel=parallel)
        trainer = Trainer(model, recipe, {"pages": 0.3})
        if until > 2:
            checkpoint.load(checkpoint.latest(folder), trainer, {})
        while trainer.done < until:
            losses.append(trainer.update(batches(trainer.done, rank, world)))
        checkpoint.save(folder, trainer, {}, None)
    if parallel == "fsdp" and world > 1:
        parts = [p for p in (*trainer.trained().values(), *model.lm.parameters()) if isinstance(p, DTensor)]
        assert len(parts) == len(trainer.trained()) + len(list(model.lm.parameters()))
        assert sum(p.to_local().numel() for p in parts) < 0.6 * sum(p.numel() for p in parts)
    assert trainer.gates().shape == (2, 2)
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for kind in ("ddp", "fsdp"):
        folder = pathlib.Path(sys.argv[1]) / kind
        losses = run(kind, folder)
        (folder / f"losses-{dist.get_rank()}.json").write_text(json.dumps(losses))
    dist.destroy_process_group()
