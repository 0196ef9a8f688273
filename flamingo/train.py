"""Training of the new parameters: the negative log-likelihood of the targets, the language model frozen."""

import dataclasses
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import tqdm
from torch import Tensor

from flamingo.model import Flamingo
from flamingo.prompt import Batch


@dataclasses.dataclass
class History:
    """What training did, per step: loss (nats per token), tanh of the gates [blocks, 2], seconds."""

    loss: list[float] = dataclasses.field(default_factory=list)
    gates: list[list[list[float]]] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)


def target_loss(model: Flamingo, batch: Batch) -> Tensor:
    """Mean of -log p(token | all before it) over the batch's target tokens.

    Raises:
        ValueError: no row has a target.
    """
    if not batch.targets.any():
        raise ValueError("target_loss: batch must hold a target token or more, got none")
    first = int(batch.targets.any(0).nonzero()[0])
    inputs = slice(0, -1)  # the last token predicts nothing
    logits = model(
        batch.input_ids[:, inputs],
        model.condition(batch.media, len(batch.input_ids)),
        batch.media_locations[:, inputs],
        batch.attention_mask[:, inputs],
        logits_to_keep=batch.input_ids.shape[1] - first,
    )
    targets = batch.targets[:, first:]
    logits = logits[targets]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, batch.input_ids[:, first:][targets])


class Trainer:
    """AdamW on the new parameters, for a known number of steps.

    Gates start at 0 and everything behind them waits for them, so they get a learning rate of their own. Weight decay
    is on the matrices of the gated blocks, none on the resampler (as in the paper), on norms and on gates. The learning
    rate warms up over `warmup` steps and falls linearly to 0 over the second half: the paper keeps it constant, but a
    run of minutes at a high rate would end wherever its last spike left it.
    """

    def __init__(
        self, model: Flamingo, steps: int, lr: float, gate_lr: float, weight_decay: float = 0.1, warmup: int = 10
    ) -> None:
        self.model, self.steps = model.train(), steps
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, p in model.new_parameters().items():
            rate = gate_lr if name.endswith("_gate") else lr
            decay = weight_decay if name.startswith("blocks.") and p.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(p)
        self.optimizer = torch.optim.AdamW(
            [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()],
            betas=(0.9, 0.95),
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / warmup, max(0.0, 2 - 2 * step / steps))
        )

    def step(self, batch: Batch) -> float:
        """One update; returns the loss before it."""
        loss = target_loss(self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.new_parameters().values(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


def train(trainer: Trainer, batches: Iterator[Batch], seconds: float = float("inf")) -> History:
    """Train for the trainer's steps, or until `seconds` have gone by; shows a progress bar."""
    history = History()
    with tqdm.tqdm(total=trainer.steps, desc="training", unit="step") as bar:
        while len(history.loss) < trainer.steps and sum(history.seconds) < seconds:
            began = time.perf_counter()
            history.loss.append(trainer.step(next(batches)))
            history.seconds.append(time.perf_counter() - began)
            history.gates.append(trainer.model.gates().tolist())
            bar.set_postfix(loss=f"{history.loss[-1]:.3f}", refresh=False)
            bar.update()
    return history
