"""Checkpoints: what was trained as safetensors, and beside it all that training needs to go on to the same bits."""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

if TYPE_CHECKING:
    from flamingo.train import Trainer

WEIGHTS, ABOUT, OPTIMIZER = "weights.safetensors", "about.json", "optimizer.pt"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
_PREFIX = "model."  # of a Flamingo inside of its loss


def latest(folder: pathlib.Path) -> pathlib.Path | None:
    """The newest checkpoint of a folder, `step-<updates>`; None where there is none."""
    return max(pathlib.Path(folder).glob("step-*[0-9]"), key=lambda path: int(path.name[5:]), default=None)


def save(
    folder: pathlib.Path, trainer: "Trainer", data: Mapping[str, object], about: dict | None, keep: int = 3
) -> None:
    """Write a checkpoint, and delete all but the newest `keep`. All ranks call it; it appears when it is complete.

    weights.safetensors: the parameters that are not frozen, whole. about.json: what was said of the model.
    optimizer.pt: AdamW's state, whole, and counts. rank-<r>.pt: random numbers and data positions.
    """
    path = pathlib.Path(folder) / f"step-{trainer.done:07d}"
    unfinished = path.with_suffix(".unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    model, optimizer = get_state_dict(trainer.loss, trainer.optimizer, options=_WHOLE)
    if trainer.rank == 0:
        weights = {name: model[_PREFIX + name].contiguous() for name in trainer.trained()}  # tied ones once
        save_file(weights, unfinished / WEIGHTS)
        (unfinished / ABOUT).write_text(json.dumps(about or {}, indent=1))
        state = {"optimizer": optimizer, "done": trainer.done, "ranks": trainer.world}
        torch.save(state, unfinished / OPTIMIZER)
    positions = {name: batches.state_dict() for name, batches in data.items() if hasattr(batches, "state_dict")}
    random = {"cpu": torch.get_rng_state()}
    if trainer.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(trainer.device)
    torch.save({"data": positions, "random": random}, unfinished / f"rank-{trainer.rank}.pt")
    if trainer.world > 1:
        dist.barrier()
    if trainer.rank == 0:
        os.replace(unfinished, path)
        for old in sorted(path.parent.glob("step-*[0-9]"), key=lambda path: int(path.name[5:]))[:-keep]:
            shutil.rmtree(old)


def load(path: pathlib.Path, trainer: "Trainer", data: Mapping[str, object]) -> None:
    """Take up training where `save` left it, with as many ranks and workers as then.

    Raises:
        ValueError: the checkpoint has other parameters than the model trains, other data sets, or other ranks.
    """
    weights = {f"{_PREFIX}{name}": value for name, value in load_file(path / WEIGHTS).items()}
    wrong = sorted(weights.keys() ^ {f"{_PREFIX}{name}" for name in trainer.trained()})
    if wrong:
        raise ValueError(f"checkpoint.load: {path} must hold what the model trains, wrong or missing: {wrong}")
    state = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
    if state["ranks"] != trainer.world:
        raise ValueError(f"checkpoint.load: {path} must come from {trainer.world} ranks, got {state['ranks']}")
    own = torch.load(path / f"rank-{trainer.rank}.pt", map_location="cpu", weights_only=True)
    if missing := sorted(own["data"].keys() - data.keys()):
        raise ValueError(f"checkpoint.load: data must hold the data sets that {path} was at, missing: {missing}")
    settings = [{**group, "params": None} for group in trainer.optimizer.param_groups]
    found = {"model_state_dict": weights, "optim_state_dict": state["optimizer"]}
    set_state_dict(trainer.loss, trainer.optimizer, **found, options=_WHOLE)
    for group, setting in zip(trainer.optimizer.param_groups, settings, strict=True):
        group.update({**setting, "params": group["params"]})  # rates and decay are the recipe's of now
    trainer.done = state["done"]
    for name, position in own["data"].items():
        data[name].load_state_dict(position)
    torch.set_rng_state(own["random"]["cpu"])
    if "cuda" in own["random"]:
        torch.cuda.set_rng_state(own["random"]["cuda"], trainer.device)
