"""Training: a weighted sum over data sets of the per-token negative log-likelihood, minimised by AdamW.

One update takes batches of every data set and adds up their gradients (the paper's way), or of one data set in turn.
All means are over the tokens of the whole update: how they are cut into batches and ranks changes rounding alone.
"""

import csv
import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tqdm
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute

from flamingo import checkpoint
from flamingo.language import decoder_layers
from flamingo.model import Flamingo
from flamingo.prompt import Batch


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are the paper's.

    steps: updates in all.
    lr: learning rate, between warmup and cooldown.
    gate_lr: learning rate of the gates, which start at 0 and for which all else waits. None: the same.
    weight_decay: of matrices, but not of the resampler's.
    beta2: of AdamW; its beta1 is 0.9.
    warmup: updates over which the learning rate rises from 0.
    cooldown: updates over which it falls to 0 in the end.
    max_norm: of the gradient, which is clipped to it.
    accumulate: batches of a data set in an update.
    round_robin: an update takes one data set, in turn, instead of all.
    autocast: multiply in bf16 where weights are fp32. (New parameters do so in any case around a bf16 language model.)
    recompute: keep of each layer and block what enters it, and compute the rest again in backward.
    parallel: what several ranks do: "ddp" | "fsdp", which is FSDP2.
    """

    steps: int
    lr: float = 1e-4
    gate_lr: float | None = None
    weight_decay: float = 0.1
    beta2: float = 0.95
    warmup: int = 5000
    cooldown: int = 0
    max_norm: float = 1.0
    accumulate: int = 1
    round_robin: bool = False
    autocast: bool = False
    recompute: bool = False
    parallel: str = "ddp"

    def __post_init__(self) -> None:
        if self.parallel not in ("ddp", "fsdp"):
            raise ValueError(f"Recipe: parallel must be ddp or fsdp, got {self.parallel!r}")

    def rate(self, step: int) -> float:
        """Factor of the learning rates at an update, counted from 0."""
        return min(1.0, (step + 1) / max(1, self.warmup), max(0.0, self.steps - step) / max(1, self.cooldown))


def target_loss(model: Flamingo, batch: Batch) -> Tensor:
    """Sum of -log p(token | all before it) over the batch's target tokens, in fp32 or more; media are features.

    Logits are computed in those columns alone in which a row has a target.
    """
    columns = batch.targets[:, 1:].any(0).nonzero().squeeze(1)  # the last token predicts nothing, the first is given
    inputs = slice(0, -1)
    logits = model(
        batch.input_ids[:, inputs],
        model.condition(batch.media, len(batch.input_ids), frame_counts=batch.frame_counts),
        batch.media_locations[:, inputs],
        batch.attention_mask[:, inputs],
        attend_next=batch.attend_next,
        document_start=None if batch.document_start is None else batch.document_start[:, inputs],
        logits_to_keep=columns,
    )
    targets = batch.targets[:, 1:][:, columns]
    logits = logits[targets]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, batch.input_ids[:, 1:][:, columns][targets], reduction="sum")


class ImageLoss(nn.Module):
    """`target_loss` of a batch whose media are images still. One module, for DDP and FSDP to wrap."""

    def __init__(self, model: Flamingo) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        if batch.media is not None:
            num_media, frames = (torch.arange(size, device=batch.media.device) for size in batch.media.shape[1:3])
            counts = batch.frame_counts
            if counts is None:
                counts = len(frames) * (num_media < batch.media_locations.sum(1, keepdim=True))
            real = frames < counts.unsqueeze(-1)  # [B, M, frames]: padding is not encoded
            features = self.model.encode(batch.media[real])
            media = features.new_zeros(*real.shape, *features.shape[1:])
            batch = dataclasses.replace(batch, media=media.index_put((real,), features))
        return target_loss(self.model, batch)


class Trainer:
    """AdamW on all of a model that is not frozen. With torch.distributed initialised, one of its ranks.

    Args:
        weights: lambda of each data set; 1 where it is not named.
        device: where to train; None: where the model is. FSDP moves it there part by part, so that no rank holds all.
    """

    def __init__(
        self,
        model: Flamingo,
        recipe: Recipe,
        weights: Mapping[str, float] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self.model, self.recipe, self.weights = model.train(), recipe, dict(weights or {})
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.device = torch.device(device or next(model.parameters()).device)
        if recipe.recompute:
            for layer in (*decoder_layers(model.lm), *model.blocks):
                layer.forward = functools.partial(recompute, layer.forward, use_reentrant=False)
        self.loss = self._parallel(ImageLoss(model))
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, p in self.trained().items():
            lr = recipe.gate_lr if recipe.gate_lr is not None and name.endswith("_gate") else recipe.lr
            decay = 0.0 if p.ndim < 2 or name.startswith("resampler.") else recipe.weight_decay
            groups.setdefault((lr, decay), []).append(p)
        self.optimizer = torch.optim.AdamW(
            [{"params": p, "initial_lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()],
            betas=(0.9, recipe.beta2),
            fused=True,
        )
        self.done = 0  # updates made so far

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are not frozen, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def update(self, batches: Mapping[str, Sequence[Batch]]) -> dict[str, float]:
        """One update on this rank's batches of each data set; media are images.

        Returns:
            Of each data set, the mean loss in nats per token over all ranks, before the update; under "" their
            weighted sum, under "norm" the norm of its gradient.

        Raises:
            ValueError: on no rank has a data set a target.
        """
        counts = self._sum([float(sum(int(b.targets[:, 1:].sum()) for b in rows)) for rows in batches.values()])
        for name, count in zip(batches, counts, strict=True):
            if count == 0:
                raise ValueError(f"Trainer.update: batches must hold a target token or more, got none in {name!r}")
        weights = [self.weights.get(name, 1.0) for name in batches]
        rows = [(index, batch) for index, part in enumerate(batches.values()) for batch in part]
        sums = torch.zeros(len(counts), dtype=torch.float64, device=self.device)
        self.optimizer.zero_grad()
        for number, (index, batch) in enumerate(rows):
            self._exchange_gradients(number + 1 == len(rows))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.autocast):
                loss = self.loss(batch.to(self.device))
            # DDP and FSDP take the mean over ranks, and counts are sums over them
            (loss * (weights[index] * self.world / counts[index])).backward()
            sums[index] += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.trained().values(), self.recipe.max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.recipe.rate(self.done)
        self.optimizer.step()
        self.done += 1
        means = [total / count for total, count in zip(self._sum(sums.tolist()), counts, strict=True)]
        total = sum(weight * mean for weight, mean in zip(weights, means, strict=True))
        return {**dict(zip(batches, means, strict=True)), "": total, "norm": _full(norm).item()}

    def gates(self) -> Tensor:
        """tanh of the gates, as `Flamingo.gates`, on every rank."""
        return _full(self.model.gates())

    def _parallel(self, loss: ImageLoss) -> nn.Module:
        if not dist.is_initialized():
            return loss.to(self.device)
        if self.recipe.parallel == "ddp":
            loss.to(self.device)
            # a batch of text alone uses no resampler
            return DistributedDataParallel(loss, broadcast_buffers=False, find_unused_parameters=True)
        # Of the frozen language model one layer is whole at a time. The new parts are one piece, which is whole from
        # forward to backward, because the keys and values of all blocks come from one matmul outside of the blocks.
        mesh = init_device_mesh(self.device.type, (self.world,))
        for layer in decoder_layers(loss.model.lm):
            fully_shard(layer, mesh=mesh)
        for module in (loss.model.lm, loss):
            fully_shard(module, mesh=mesh)
        return loss

    def _exchange_gradients(self, last: bool) -> None:
        """Between ranks, in the backward pass to come: once per update, with its last batch."""
        if isinstance(self.loss, DistributedDataParallel):
            self.loss.require_backward_grad_sync = last
        elif dist.is_initialized():
            self.loss.set_requires_gradient_sync(last)

    def _sum(self, values: list[float]) -> list[float]:
        """Sums over all ranks."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()


def _full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


@dataclasses.dataclass
class History:
    """Per update: loss (the weighted sum), seconds, and tanh of the gates [blocks, 2], unless a folder logs them."""

    loss: list[float] = dataclasses.field(default_factory=list)
    gates: list[list[list[float]]] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)


def train(
    trainer: Trainer,
    data: Mapping[str, Iterable[Batch]],
    folder: pathlib.Path | None = None,
    *,
    save_every: int = 1000,
    tensorboard: bool = False,
    about: dict | None = None,
) -> History:
    """Train until the recipe's steps are done or a data set ends.

    Args:
        data: this rank's batches of each data set; for resuming, loaders with `state_dict` (`StatefulDataLoader`).
        folder: of `log.csv`, of TensorBoard's logs and of a checkpoint every `save_every` updates and in the end. Where
            it holds a checkpoint already, training goes on from there, to the same bits. None: nothing is written.
        about: what a checkpoint is to say of the model.
    """
    if folder is not None and (path := checkpoint.latest(folder)):
        checkpoint.load(path, trainer, data)
    log = _Log(folder, trainer.done, tensorboard) if folder is not None and trainer.rank == 0 else None
    recipe, history, names = trainer.recipe, History(), list(data)
    iterators = {name: iter(batches) for name, batches in data.items()}
    shown = {"desc": "training", "unit": "step", "disable": trainer.rank > 0}
    with tqdm.tqdm(total=recipe.steps, initial=trainer.done, **shown) as bar:
        while trainer.done < recipe.steps:
            began = time.perf_counter()
            chosen = [names[trainer.done % len(names)]] if recipe.round_robin else names
            try:
                batches = {name: [next(iterators[name]) for _ in range(recipe.accumulate)] for name in chosen}
            except StopIteration:
                break
            losses = trainer.update(batches)
            gates = trainer.gates()
            history.loss.append(losses[""])
            if folder is None:
                history.gates.append(gates.tolist())
            history.seconds.append(time.perf_counter() - began)
            bar.set_postfix(loss=f"{losses['']:.3f}", refresh=False)
            bar.update()
            if log:
                row = {"step": trainer.done, "loss": losses[""]}
                row |= {f"loss/{name}": losses.get(name) for name in names}
                row |= {"gradient_norm": losses["norm"], "lr": recipe.lr * recipe.rate(trainer.done - 1)}
                row |= dict(zip(("gates/attention", "gates/feed_forward"), gates.abs().mean(0).tolist(), strict=True))
                log.write(row | {"seconds": history.seconds[-1]})
            if folder is not None and (trainer.done % save_every == 0 or trainer.done == recipe.steps):
                checkpoint.save(folder, trainer, data, about)
    return history


class _Log:
    """Rows of `log.csv` and scalars of TensorBoard. What was logged beyond the update resumed from is dropped."""

    def __init__(self, folder: pathlib.Path, done: int, tensorboard: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.tensorboard = folder / "log.csv", None
        lines = self.path.read_bytes().splitlines(keepends=True) if done and self.path.exists() else []
        kept = [line for line in lines if line.startswith(b"step") or int(line.partition(b",")[0]) <= done]
        self.path.write_bytes(b"".join(kept))
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(folder, purge_step=done + 1)

    def write(self, row: dict[str, float | None]) -> None:
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
        if self.tensorboard:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self.tensorboard.add_scalar(name, value, row["step"])
            self.tensorboard.flush()
