"""flamingo train | generate | evaluate | chat.

A run from nothing, on a folder of `name.jpg` and `name.txt` with a caption each:

    flamingo train run --lm smollm2 --image-token '<file_sep>' --vision openai/clip-vit-base-patch32 \\
        --every 3 --data pairs:photos --steps 2000 --warmup 100
    flamingo generate run --image cat.jpg
    flamingo evaluate run --support photos --queries held-out --metric cider
    flamingo chat run
"""

import argparse
import contextlib
import dataclasses
import inspect
import os
import pathlib
import re
import typing
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from flamingo import data as datasets
from flamingo import evaluate as evaluation
from flamingo.build import Built, Description, build, language_of, load, vision_of
from flamingo.config import CHOICES, PRESETS, FlamingoConfig
from flamingo.generate import generate_text, read
from flamingo.prompt import CHUNK_END, IMAGE, Prompt, collate
from flamingo.train import Recipe, Trainer, train


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError, ModuleNotFoundError) as error:  # whose message says what was expected
        parser.exit(2, f"flamingo: {error}\n")


def make_parser() -> argparse.ArgumentParser:
    """A command for each function `run_<command>`, whose docstring is its help, with the flags of `_add_<command>`."""
    parser = argparse.ArgumentParser("flamingo", description=__doc__, formatter_class=_Help)
    commands = parser.add_subparsers(required=True, metavar="train | generate | evaluate | chat")
    for run, add in (
        (run_train, _add_train),
        (run_generate, _add_generate),
        (run_evaluate, _add_evaluate),
        (run_chat, _add_chat),
    ):
        name, text = run.__name__.removeprefix("run_"), inspect.getdoc(run)
        about = {"help": text.partition("\n")[0], "description": text, "formatter_class": _Help}
        command = commands.add_parser(name, **about, allow_abbrev=False)
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the model")
        add(command)
        command.set_defaults(run=run)
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def _add_fields(
    parser: argparse._ActionsContainer, kind: type, skip: Sequence[str] = (), defaults: bool = True
) -> None:
    """A flag for each plain field of a dataclass, explained by the class's docstring."""
    for field in dataclasses.fields(kind):
        plain = next(iter(typing.get_args(field.type)), field.type)  # of int | None: int
        if plain not in (int, float, str, bool) or field.name in skip:
            continue
        about = re.search(rf"^    (?:\w+, )*{field.name}(?:, \w+)*: ((?:.|\n     )+)", kind.__doc__, re.MULTILINE)
        settings = {"help": " ".join(about[1].split()).replace("%", "%%"), "dest": field.name}
        settings["required"] = field.default is dataclasses.MISSING
        settings["default"] = field.default if defaults and not settings["required"] else argparse.SUPPRESS
        if plain is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings |= {"type": plain, "choices": CHOICES.get(field.name)}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **settings)


def _given(args: argparse.Namespace, kind: type) -> dict:
    return {field.name: vars(args)[field.name] for field in dataclasses.fields(kind) if field.name in vars(args)}


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=pathlib.Path, help="of checkpoints and logs")
    needed = {"required": True, "default": argparse.SUPPRESS}
    add("--data", action="append", type=_source, help="KIND:PATH[@WEIGHT], see above", **needed)
    add("--batch-size", type=int, default=8, help="rows of each data set, per process")
    add("--workers", type=int, default=0, help="processes that read, of each data set")
    add("--save-every", type=int, default=1000, help="updates between checkpoints")
    add("--tensorboard", action=argparse.BooleanOptionalAction, default=False, help="log there too")
    _add_fields(parser.add_argument_group("recipe"), Recipe)
    _add_fields(parser.add_argument_group("data"), datasets.Source, skip=("kind", "path", "weight"))
    model = parser.add_argument_group("model", "Sizes are those of the preset where they are not given.")
    add = model.add_argument
    add("--preset", choices=sorted(PRESETS), help="a published model, or tiny")
    add("--config", type=pathlib.Path, help="a FlamingoConfig in JSON, instead of a preset")
    add("--lm", help='a folder or a name on the Hugging Face hub, or "smollm2"; instead of the preset\'s')
    add("--vision", help="CLIP or SigLIP: a folder or a name on the hub; instead of the preset's")
    _add_fields(model, Description)
    _add_fields(model, FlamingoConfig, defaults=False)


def _source(text: str) -> dict:
    match = re.fullmatch(r"(\w+):(.+?)(?:@([\d.]+))?", text)
    if match is None or match[1] not in datasets.KINDS:
        raise argparse.ArgumentTypeError(f"must be KIND:PATH[@WEIGHT] of {', '.join(datasets.KINDS)}, got {text!r}")
    return {"kind": match[1], "path": match[2], "weight": float(match[3] or 1)}


def _described(args: argparse.Namespace) -> Description:
    config = PRESETS[args.preset] if args.preset else FlamingoConfig()
    if args.config:
        config = FlamingoConfig.from_json(args.config.read_text())
    changes = _given(args, FlamingoConfig)
    changes["language"] = language_of(args.lm) if args.lm else config.language
    changes["vision"] = vision_of(args.vision) if args.vision else config.vision
    return Description(**_given(args, Description) | {"config": dataclasses.replace(config, **changes)})


def run_train(args: argparse.Namespace) -> None:
    """Train the resampler and the gated blocks of a Flamingo, and what else is not frozen.

    DATA is KIND:PATH, or KIND:PATH@WEIGHT with the weight (lambda) of its loss. Each data set gives --batch-size rows
    to every update. A path is a folder, a folder of .tar shards, or a pattern such as 'shards/{000..099}.tar'. Kinds:

      pairs   cat.jpg + cat.txt: an image and its caption
      videos  run.mp4 (or run.0.jpg, run.1.jpg, ...: a frame a second) + run.txt
      pages   page.txt with <image> where page.0.jpg, page.1.jpg, ... stand: text with images in it

    The paper's mixture:  --data pages:m3w@1 --data pairs:align@0.2 --data pairs:ltip@0.2 --data videos:vtp@0.03

    A run that was stopped goes on when the same command is given again. On several GPUs, or processes:

      torchrun --nproc-per-node 8 -m flamingo train run --preset openflamingo-9b --image-token '<|padding|>' \\
          --data pages:m3w --steps 100000 --parallel fsdp
    """
    from torchdata.stateful_dataloader import StatefulDataLoader

    ranks = "RANK" in os.environ  # torchrun says so
    if ranks:
        if args.device.startswith("cuda"):
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    description = _described(args)
    built = build(description)
    options = _given(args, datasets.Source)
    sources = {}
    for number, given in enumerate(args.data):
        name = f"{given['kind']}-{number}" if len(args.data) > 1 else given["kind"]
        sources[name] = datasets.Source(**options | given)
    weights = {name: source.weight for name, source in sources.items()}
    trainer = Trainer(built.model, Recipe(**_given(args, Recipe)), weights, args.device)
    place = {"seed": args.seed, "rank": trainer.rank, "world": trainer.world}
    loaders = {}
    for name, source in sources.items():
        stream = datasets.Stream(source, built.tokenizer, built.transform, args.batch_size, **place)
        loaders[name] = StatefulDataLoader(stream, batch_size=None, num_workers=args.workers)
    about = description.to_dict()
    train(trainer, loaders, args.folder, save_every=args.save_every, tensorboard=args.tensorboard, about=about)
    if ranks:
        dist.destroy_process_group()


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", help="a run's folder, or one of its checkpoints")
    add("--prompt", default=IMAGE, help="text with <image>")
    add("--image", action="append", default=[], help="an image, a video file, or a folder of frames")
    _add_decoding(parser)


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--stop", default=CHUNK_END, help="a text of one token that ends the answer")
    add("--max-new-tokens", type=int, default=30, help="longest answer")
    add("--beams", type=int, default=1, help="of beam search")
    add("--temperature", type=float, default=0.0, help="of sampling; 0 takes the likeliest token")
    add("--top-p", type=float, default=1.0, help="of sampling: from the likeliest so much")


def _decoding(args: argparse.Namespace) -> dict:
    options = {"stop": args.stop, "max_new_tokens": args.max_new_tokens, "num_beams": args.beams}
    if args.temperature > 0:
        options |= {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
    return options


def run_generate(args: argparse.Namespace) -> None:
    """Write what comes after a prompt.

    In the text, <image> stands where the images go, one --image each, in order. Few-shot prompts are such texts, too:

      flamingo generate run --image dog.jpg --image cat.jpg --prompt '<image> a dog<|endofchunk|><image>'
    """
    built = load(args.checkpoint, args.device)
    batch = collate([Prompt(args.prompt, _show(built, args.image))], built.tokenizer)
    print(generate_text(built.model, built.tokenizer, batch.to(args.device), **_decoding(args))[0].strip())


@torch.no_grad()
def _show(built: Built, paths: Sequence[str]) -> list[Tensor]:
    """Features of each image or video."""
    device = built.model.resampler.latents.device
    return [built.model.encode(datasets.read_media(path, built.transform).to(device)).cpu() for path in paths]


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    add, needed = parser.add_argument, {"required": True, "default": argparse.SUPPRESS}
    add("checkpoint", help="a run's folder, or one of its checkpoints")
    add("--support", help="solved examples", **needed)
    add("--queries", help="what is asked", **needed)
    add("--metric", choices=sorted(evaluation.METRICS), default="exact", help="of written answers")
    add("--closed", action="store_true", help="take the likeliest of the answers in the support")
    add("--shots", type=int, nargs="+", default=evaluation.SHOTS, help="solved examples in a prompt")
    add("--selection", nargs="+", choices=evaluation.SELECTIONS, default=["random"], help="how they are chosen")
    add("--orders", type=int, default=1, help="of examples to average over, where --closed")
    template = f"{IMAGE} {{answer}}{CHUNK_END}"  # what pairs are trained as
    add("--template", default=template, help="of a shot, with {answer} and maybe {question}")
    add("--limit", type=int, help="only so many queries")
    add("--batch-size", type=int, default=16, help="prompts read at once")
    add("--max-new-tokens", type=int, default=20, help="longest answer")
    add("--seed", type=int, default=0, help="of the choice of examples")
    add("--output", type=pathlib.Path, default="evaluation", help="folder")


def run_evaluate(args: argparse.Namespace) -> None:
    """Measure how answers get better with the number of solved examples in the prompt.

    SUPPORT and QUERIES are folders or shards of cat.jpg + cat.txt, where each line of the text is a right answer, and
    maybe cat.question.txt. Prints a table, and writes scores.json and scores.png.

      flamingo evaluate run --support vqa/train --queries vqa/val --metric vqa --selection random rices \\
          --template '<image>Question: {question} Answer: {answer}<|endofchunk|>'
    """
    built = load(args.checkpoint, args.device)
    support, _ = evaluation.read_shots(args.support, built.transform)
    queries, references = evaluation.read_shots(args.queries, built.transform)
    candidates = sorted({shot.answer for shot in support}) if args.closed else []
    asked = (queries[: args.limit], references[: args.limit])
    task = evaluation.Task(support, *asked, args.template, args.metric, candidates)
    options = {name: vars(args)[name] for name in ("shots", "orders", "batch_size", "max_new_tokens", "seed")}
    results = {
        selection: evaluation.evaluate(built.model, built.tokenizer, task, selection=selection, **options)
        for selection in args.selection
    }
    print(evaluation.table(results))
    evaluation.save(args.output, results, 1 / len(candidates) if candidates else None)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", help="a run's folder, or one of its checkpoints")
    template = "{images}Question: {line} Answer:"
    add("--template", default=template, help="what the model reads of a line; {images} are its images")
    _add_decoding(parser)


def run_chat(args: argparse.Namespace) -> None:
    """Talk about images in the terminal. <image:PATH> in a line shows one; /reset forgets all; /quit ends.

    For instance:

      > <image:cat.jpg> What is this?
      > And what colour is it?
    """
    built = load(args.checkpoint, args.device)
    print("<image:PATH> shows an image, /reset forgets, /quit ends")
    reading, before = None, ""
    with contextlib.suppress(EOFError):  # the end of the input is another /quit
        for line in iter(lambda: input("> ").strip(), "/quit"):
            if line == "/reset":
                reading, before = None, ""
                continue
            try:
                media = _show(built, re.findall(r"<image:([^>]+)>", line))
            except OSError as error:
                print(f"cannot be read: {error}")
                continue
            asked = re.sub(r"<image:[^>]+>", "", line).strip()
            text = before + args.template.format(images=IMAGE * len(media), line=asked)
            batch = collate([Prompt(text, media)], built.tokenizer, begins=reading is None)
            reading = read(built.model, batch.to(args.device), after=reading)
            (answer,) = generate_text(built.model, built.tokenizer, reading, **_decoding(args))
            print(answer.strip())
            before = answer + args.stop
