"""A Flamingo that reads handwriting, from nothing to captions in a few minutes on two CPU cores.

A small vision encoder learns scikit-learn's digits and is frozen. SmolLM2-135M is frozen from the start. Between them,
a resampler and gated cross-attention blocks learn to write "a handwritten seven" about images, and are then asked about
images that nothing was trained on.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Iterator

import torch
import transformers
from torch import nn

import flamingo_kernels as fk
from flamingo.config import FlamingoConfig
from flamingo.digits import CAPTIONS, Digits, load_digits
from flamingo.evaluate import Score, Task, evaluate
from flamingo.language import load_smollm2
from flamingo.model import Flamingo
from flamingo.prompt import Batch, PromptTokenizer, Shot, collate, few_shot
from flamingo.train import History, Recipe, Trainer, train
from flamingo.vision import shift, train_encoder

CONFIG = FlamingoConfig(every=3, resampler_depth=2, resampler_dim_head=32, latents=4, ff_mult=2)
BATCH, LR, GATE_LR = 32, 1e-3, 1e-2
TEMPLATE = "<image> {answer}\n"
SAMPLES = 12
SHADES = " ░▒▓█"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m flamingo.demo", description=__doc__)
    parser.add_argument("--steps", type=int, default=160, help="training steps on captions (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=600, help="stop training after (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of all weights (default: %(default)s)")
    parser.add_argument("--output", type=pathlib.Path, default="demo-output", help="folder (default: %(default)s)")
    args = parser.parse_args(arguments)
    lm, tokenizer = load_smollm2()
    print(f"SmolLM2-135M-Instruct, frozen, runs in {str(lm.dtype).removeprefix('torch.')} on this machine")
    run(lm, PromptTokenizer(tokenizer, image_token="<file_sep>"), CONFIG, args)


def run(lm: nn.Module, tokenizer: PromptTokenizer, config: FlamingoConfig, args: argparse.Namespace) -> dict:
    """The demonstration on a given language model; returns what it writes to results.json."""
    known, unseen = load_digits(args.seed)
    began = time.perf_counter()
    vision = train_encoder(known, seed=args.seed)
    vision_seconds = time.perf_counter() - began
    print(f"vision encoder: trained on {len(known.labels)} digits in {vision_seconds:.0f} s, now frozen")

    torch.manual_seed(args.seed)
    model = Flamingo(lm, vision, config)
    count = sum(p.numel() for p in model.new_parameters().values())
    print(f"{len(model.blocks)} gated blocks, before layers {model.block_layers}; {count / 1e6:.1f} M new parameters")

    batches = caption_batches(known, tokenizer)
    # the paper keeps the learning rate; a run of minutes at a high one would end wherever its last spike left it
    trainer = Trainer(model, Recipe(args.steps, LR, GATE_LR, warmup=10, cooldown=args.steps // 2))
    deadline = time.perf_counter() + args.seconds
    history = train(trainer, {"digits": itertools.takewhile(lambda _: time.perf_counter() < deadline, batches)})
    captions = [CAPTIONS[label] for label in unseen.labels]
    queries = [Shot([image[None]]) for image in unseen.images]  # one frame each
    task = Task([], queries, [[caption] for caption in captions], TEMPLATE)
    (written,) = evaluate(model, tokenizer, task, shots=[0], text_only=0)
    (ranked,) = evaluate(model, tokenizer, dataclasses.replace(task, candidates=CAPTIONS), shots=[0], text_only=0)
    results = {
        "held_out_images": len(queries),
        "greedy_accuracy": written.score,
        "ranking_accuracy": ranked.score,
        "encoder_accuracy": (vision.logits(unseen.images).argmax(1) == unseen.labels).float().mean().item(),
        "steps": len(history.loss),
        "training_seconds": sum(history.seconds),
        "vision_training_seconds": vision_seconds,
        "median_step_seconds": statistics.median(history.seconds),
        "step_seconds_by_backend": compare_backends(trainer, batches),
        "seed": args.seed,
        "loss": history.loss,
        "tanh_gates": {"layers": model.block_layers, "attention_and_feed_forward": history.gates},
        "config": dataclasses.asdict(config),
        "machine": {
            "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
            "threads": torch.get_num_threads(),
            "lm_dtype": str(lm.dtype),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "flamingo_kernels": fk.__version__,
        },
    }
    print_samples(unseen, written)
    print_summary(results)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps(results, indent=1))
    save_figure(args.output / "demo.png", unseen, written, model.block_layers, history)
    print(f"wrote {args.output / 'demo.png'} and {args.output / 'results.json'}")
    return results


def caption_batches(digits: Digits, tokenizer: PromptTokenizer) -> Iterator[Batch]:
    """Random images, shifted by up to a pixel, each with its caption, for ever."""
    while True:
        pick = torch.randint(len(digits.images), (BATCH,))
        images = shift(digits.images[pick])[:, None]  # [B, 1 frame, 1, 8, 8]
        shots = [Shot([x], CAPTIONS[label]) for x, label in zip(images, digits.labels[pick], strict=True)]
        yield collate([few_shot([], shot, TEMPLATE, target=True) for shot in shots], tokenizer)


def compare_backends(trainer: Trainer, batches: Iterator[Batch], pairs: int = 10) -> dict[str, float]:
    """Median seconds of a training step on each backend the CPU has, steps taken in turns."""
    names = [name for name in ("cpu", "reference") if fk.backends()[name] == "available"]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for pair in range(pairs + 1):
        for name in names:
            batch = next(batches)
            with fk.use_backend(name):
                began = time.perf_counter()
                trainer.update({"digits": [batch]})
                if pair > 0:  # the first of each is warmup
                    seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def print_samples(unseen: Digits, written: Score) -> None:
    """Held-out images as blocks, with what the model wrote about them."""
    print("\nheld-out images and what the model wrote:")
    for image, label, text in zip(unseen.images[:SAMPLES], unseen.labels, written.answers, strict=False):
        lines = ["".join(2 * SHADES[round(pixel * 4)] for pixel in row) for row in image[0].tolist()]
        lines[3] += f"   {text}"
        if text != CAPTIONS[label]:
            lines[4] += f"   (wrong: {CAPTIONS[label]})"
        print("\n".join(lines), end="\n\n")


def print_summary(results: dict) -> None:
    print(
        f"{results['held_out_images']} held-out digits: {results['greedy_accuracy']:.1%} named right by greedy text, "
        f"{results['ranking_accuracy']:.1%} by ranking (the vision encoder's own classifier: "
        f"{results['encoder_accuracy']:.1%})"
    )
    print(
        f"training: {results['steps']} steps in {results['training_seconds']:.0f} s, after "
        f"{results['vision_training_seconds']:.0f} s for the vision encoder"
    )
    times = results["step_seconds_by_backend"]
    print(f"training step, plain PyTorch: {times['reference']:.3f} s")
    if "cpu" in times:
        print(f"training step, fused ops: {times['cpu']:.3f} s, {times['reference'] / times['cpu']:.2f}x as fast")
    else:
        print(f"training step, fused ops: not measured, because {fk.backends()['cpu']}")


def save_figure(path: pathlib.Path, unseen: Digits, written: Score, block_layers: list[int], history: History) -> None:
    """Images with captions, and the gates by layer over the steps of training."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.1))
    left.suptitle(f"Unseen digits and the text written: {written.score:.1%} of {len(written.answers)} right")
    for axes, image, label, text in zip(left.subplots(3, 4).flat, *unseen, written.answers, strict=False):
        axes.imshow(image[0].numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(text, fontsize=9, color="black" if text == CAPTIONS[label] else "red")
        axes.set_axis_off()
    right.suptitle("Gates open during training: at step 0 all is the plain language model")
    steps = torch.tensor([[[0.0, 0.0]] * len(block_layers), *history.gates]).abs()  # [1 + steps, blocks, 2]
    colors = colormaps["viridis"].resampled(len(block_layers)).colors
    panels = right.subplots(2, 1, sharex=True)
    for axes, branch, name in zip(panels, steps.unbind(2), ("attention", "feed-forward"), strict=True):
        for block, layer in enumerate(block_layers):
            axes.plot(branch[:, block].numpy(), color=colors[block], label=f"layer {layer}")
        axes.set_ylabel(f"|tanh gate| of the {name}")
    panels[1].set_xlabel("step")
    right.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
