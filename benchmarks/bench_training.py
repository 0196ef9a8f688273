"""Training of whole models: the added layers alone, and the step that they are a part of.

The models are those of the package `flamingo`, with our resampler and gated blocks or with OpenFlamingo's, of the same
weights and around the same frozen language model. So all of them do without gradients below the first block and of
frozen weights, without logits where there is no loss, and images are encoded once, here before the timing.

A step is a forward pass, the loss, and the gradients of all that is trained. The optimizer is the same for all and not
in it. For the added layers alone, the language model's own layers change nothing. bf16 is what a Flamingo trains in
around a language model in bf16: that, and fp32 parameters under autocast.
"""

import copy
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

import flamingo_kernels as fk
from benchmarks import packages
from benchmarks.harness import TRAINING, Case, Prepared, Provider, Row, Unavailable, Work
from flamingo import PRESETS, Batch, Flamingo, FlamingoConfig, few_shot_demo
from flamingo.config import LanguageConfig
from flamingo.language import build_lm, decoder_layers
from flamingo.model import Conditioning
from flamingo.train import target_loss
from flamingo_kernels import _backends

OP = "training"
_GATES = (0.5, -0.3)  # open, so that every gradient says something
_SMOLLM2 = LanguageConfig(
    *("llama", 30, 576, 9, 49152, 1536),
    more={
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "rope_theta": 100000.0,
        "attn_implementation": "eager",  # as `flamingo.language.load_smollm2`
    },
)


class TrainingShape(NamedTuple):
    """A model and a batch: B rows of T tokens and M media of S tokens of width V. `whole`: a step, else added layers.

    `episodes`: a loss on the token behind each image but the first, as in the few-shot demonstration; else on all text.
    """

    name: str
    config: FlamingoConfig
    rows: int
    tokens: int
    media: int
    media_tokens: int
    visual_width: int
    episodes: bool
    whole: bool

    def __str__(self) -> str:
        c, lm = self.config, self.config.language
        blocks = len(c.block_layers(lm.layers))
        return (
            f"{self.name}: B={self.rows} T={self.tokens} M={self.media} S={self.media_tokens} C={lm.dim} "
            f"V={self.visual_width} R={c.latents} blocks={blocks} layers={lm.layers} resampler={c.resampler_depth}"
        )


def _models() -> dict[str, TrainingShape]:
    """Both parts of each model; activations are OpenFlamingo's."""
    tiny = dataclasses.replace(PRESETS["tiny"], activation="gelu")
    smollm2 = dataclasses.replace(few_shot_demo.CONFIG, activation="gelu", language=_SMOLLM2)
    models = {
        "tiny": (tiny, 8, 256, 5, 16, tiny.vision.dim, False),
        "smollm2": (smollm2, few_shot_demo.BATCH, 3 * few_shot_demo.IMAGES - 1, few_shot_demo.IMAGES, 16, 128, True),
    }
    parts = ((f"{name}-{part}", sizes, part == "step") for name, sizes in models.items() for part in ("layers", "step"))
    return {name: TrainingShape(name, *sizes, whole) for name, sizes, whole in parts}


MEASURED = _models()
QUICK = ("tiny-layers", "tiny-step")


@dataclasses.dataclass
class Setting:
    """Everything but what is trained: the batch, whose media are features, and the frozen language model."""

    shape: TrainingShape
    batch: Batch
    original: nn.Module
    copies: dict[torch.dtype, nn.Module] = dataclasses.field(default_factory=dict)

    def lm(self, dtype: torch.dtype) -> nn.Module:
        """One for all providers: between its layers, blocks wait until their own model is called."""
        if dtype not in self.copies:
            self.copies[dtype] = copy.deepcopy(self.original).to(dtype)
        return self.copies[dtype]


class NoLanguageModel(nn.Module):
    """Takes hidden states [B, T, C] through layers that change nothing, so that what hangs between them is left."""

    def __init__(self, hidden: Tensor, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(layers))
        self.register_buffer("hidden", hidden)
        self.config = SimpleNamespace(hidden_size=hidden.shape[2])

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past_key_values: None, use_cache: bool) -> object:
        hidden = self.hidden
        for layer in self.layers:
            hidden = layer(hidden)
        return SimpleNamespace(logits=hidden)


class Features(nn.Module):
    """In the place of a vision encoder."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim


def case(shape: TrainingShape, dtype: torch.dtype, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(0)
    language = shape.config.language

    def normal(*size: int) -> Tensor:
        return torch.empty(size).normal_(generator=generator).to(device)

    def no_lm(shape: TrainingShape) -> nn.Module:
        return NoLanguageModel(normal(shape.rows, shape.tokens, language.dim).to(dtype), language.layers)

    torch.manual_seed(0)
    lm = build_lm(language).to(device, dtype) if shape.whole else None
    drawn = Flamingo(no_lm(shape), Features(shape.visual_width), shape.config).to(device)
    for block in drawn.blocks:
        nn.init.constant_(block.attn_gate, _GATES[0])
        nn.init.constant_(block.ff_gate, _GATES[1])
    weights = {name: x.to(torch.promote_types(dtype, torch.float32)) for name, x in drawn.new_state_dict().items()}

    def of(shape: TrainingShape) -> Case:
        media = normal(shape.rows, shape.media, 1, shape.media_tokens, shape.visual_width)
        setting = Setting(shape, _batch(shape, media, generator), lm or no_lm(shape))
        grad_out = torch.ones((), dtype=dtype, device=device)
        made = Case(OP, shape.name, str(shape), weights, grad_out, work(weights, setting), setting, kind=_kind)
        return made if shape.whole else _with_loss(made, normal(shape.rows, shape.tokens, language.dim))

    return dataclasses.replace(of(shape), small=of(shape._replace(rows=1)))


def _batch(shape: TrainingShape, media: Tensor, generator: torch.Generator) -> Batch:
    """Images at even distances, each with its text behind it; the token behind the last one is a target alone."""
    size = (shape.rows, shape.tokens + 1)
    place = torch.arange(shape.tokens + 1)
    in_chunk = place % -(-len(place) // shape.media)  # 0 at each image
    targets = (in_chunk == 1) & (place > 1) if shape.episodes else in_chunk != 0
    return Batch(
        input_ids=torch.randint(shape.config.language.vocabulary, size, generator=generator),
        attention_mask=torch.ones(size, dtype=torch.int64),
        media_locations=(in_chunk == 0).expand(size),
        targets=targets.expand(size),
        media=media,
    ).to(media.device)


def _kind(name: str) -> str:
    """One weight in all layers, and all gates, which are a single number each."""
    return "gate" if name.endswith("_gate") else re.sub(r"\d+", "", name)


def _with_loss(case: Case, noise: Tensor) -> Case:
    """With the gradient of ½·|y|² + ⟨y, noise⟩: under noise alone the terms of a scalar gate's gradient cancel."""
    with torch.no_grad():
        return dataclasses.replace(case, grad_out=ours(case).run() + noise.to(case.dtype))


def work(weights: dict[str, Tensor], setting: Setting) -> dict[str, Work]:
    """Matmuls with new weights, twice that in backward, and with frozen ones, once that; attention over what is seen.

    New weights are moved three times, frozen ones twice. Of the language model's attention nothing is counted: texts
    are short. Of its embeddings the head's product with the positions that have a loss is.
    """
    shape, c = setting.shape, setting.shape.config
    text, latents = shape.rows * shape.tokens, shape.rows * shape.media * c.latents
    blocks = len(c.block_layers(c.language.layers))

    def rows_of(name: str) -> int:
        if name.startswith("blocks."):
            return latents if name.endswith("to_kv.weight") else text
        return latents + shape.rows * shape.media * shape.media_tokens * name.endswith("to_kv.weight")

    flops = sum(6 * rows_of(name) * x.numel() for name, x in weights.items() if x.ndim == 2 and name.endswith("weight"))
    flops += 3.5 * 4 * blocks * c.heads * c.dim_head * text * c.latents
    keys = shape.media_tokens + c.latents
    flops += 3.5 * 4 * c.resampler_depth * c.resampler_heads * c.resampler_dim_head * latents * keys
    moved = 3 * sum(x.nbytes for x in weights.values())
    if shape.whole:
        head = setting.original.get_output_embeddings().weight
        of_layers = [p for p in decoder_layers(setting.original).parameters() if p.ndim == 2]
        flops += 4 * text * sum(p.numel() for p in of_layers)
        flops += 4 * shape.rows * int(setting.batch.targets.any(0).sum()) * head.numel()
        moved += 2 * sum(p.nbytes for p in (*of_layers, head))
    return {TRAINING: Work(flops, moved)}


# --- the same model of ours and of theirs


def ours(case: Case) -> Prepared:
    prepared = _prepared(case, Flamingo, "flamingo_kernels")
    prepared.note = f"backend {_backends.select(case.device.type, 'masked_cross_attention')}"
    return prepared


def open_flamingo(case: Case) -> Prepared:
    return _prepared(case, _open_flamingo_model(), "open_flamingo")


def open_flamingo_all_logits(case: Case) -> Prepared:
    if not case.setting.shape.whole:
        raise Unavailable("the added layers have no logits")

    class AllLogits(_open_flamingo_model()):
        """As the loss of Hugging Face's models, which OpenFlamingo trains with, has them."""

        def forward(self, *args, logits_to_keep: Tensor, **kwargs) -> Tensor:
            return super().forward(*args, **kwargs)[:, logits_to_keep]

    return _prepared(case, AllLogits, "open_flamingo")


def compiled_open_flamingo(case: Case) -> Prepared:
    def compile_each(model: Flamingo) -> None:
        for module in (model.resampler, *model.blocks):
            module.compile(dynamic=False)

    return _prepared(case, _open_flamingo_model(), "open_flamingo", compile_each)


def _open_flamingo_model() -> type[Flamingo]:
    """Flamingo with the resampler and the gated blocks of OpenFlamingo, called as OpenFlamingo calls them."""
    helpers = packages.open_flamingo()

    class OpenFlamingo(Flamingo):
        def __init__(self, lm: nn.Module, vision: nn.Module, config: FlamingoConfig) -> None:
            super().__init__(lm, vision, config)
            self.resampler = helpers.PerceiverResampler(
                dim=vision.dim,
                depth=config.resampler_depth,
                dim_head=config.resampler_dim_head,
                heads=config.resampler_heads,
                num_latents=config.latents,
                max_num_frames=config.max_frames,
                ff_mult=config.resampler_ff_mult,
            )
            self.blocks = nn.ModuleList(
                helpers.GatedCrossAttentionBlock(
                    dim=lm.config.hidden_size,
                    dim_visual=vision.dim,
                    dim_head=config.dim_head,
                    heads=config.heads,
                    ff_mult=config.ff_mult,
                )
                for _ in self.blocks
            )

        def condition(self, media: Tensor, rows: int, *, frame_counts: None = None) -> Conditioning:
            """Its kv is the latents, the same for all blocks, which project them themselves."""
            with self._precision():
                latents = self.resampler(media.to(self.resampler.latents.dtype))
            return Conditioning([latents] * len(self.blocks), torch.zeros(rows, dtype=torch.int64, device=media.device))

        def _intervals(self, conditioning: Conditioning, media_locations: Tensor, *_: None) -> Tensor:
            """Each block makes a mask of these."""
            return media_locations

        def _run_block(self, index: int, hidden: Tensor) -> Tensor:
            if self._reading is None:
                return hidden
            latents, media_locations = self._reading
            block = self.blocks[index]
            with self._precision():
                x = hidden.to(block.attn_gate.dtype)
                return block(x, latents[index], media_locations=media_locations).to(hidden.dtype)

    return OpenFlamingo


def _prepared(
    case: Case, kind: type[Flamingo], package: str, change: Callable[[Flamingo], None] = lambda model: None
) -> Prepared:
    shape, batch = case.setting.shape, case.setting.batch
    lm = case.setting.lm(case.dtype)
    with torch.device("meta"):
        model = kind(lm, Features(shape.visual_width), shape.config)
    parts = {"resampler.": model.resampler} | {f"blocks.{i}.": block for i, block in enumerate(model.blocks)}
    trained = {}  # by the memory of the case's weights, which the model is given themselves
    for prefix, module in parts.items():
        weights = {name.removeprefix(prefix): x for name, x in case.inputs.items() if name.startswith(prefix)}
        module.load_state_dict(fk.convert_state_dict(weights, "flamingo_kernels", package), assign=True)
        trained |= {p.data_ptr(): p for p in module.parameters()}
    change(model)

    if shape.whole:
        count = int(batch.targets.sum())

        def run(*_: Tensor) -> Tensor:
            return target_loss(model, batch) / count

    else:
        rows, ids, locations = shape.rows, batch.input_ids[:, :-1], batch.media_locations[:, :-1]
        mask = batch.attention_mask[:, :-1]

        def run(*_: Tensor) -> Tensor:
            return model(ids, model.condition(batch.media, rows), locations, mask)

    return Prepared(
        run,
        [trained[x.data_ptr()] for x in case.inputs.values()],
        case.grad_out.to(torch.promote_types(case.dtype, torch.float32)) if shape.whole else case.grad_out,
        constants=[*lm.parameters(), *lm.buffers(), batch.media],
    )


PROVIDERS = (
    Provider("open-flamingo", open_flamingo),
    Provider("flamingo_kernels", ours, ours=True),
    Provider("torch.compile(open-flamingo)", compiled_open_flamingo, compiles=True),
    Provider("open-flamingo, all logits", open_flamingo_all_logits),
)


# --- what a step can gain


def remarks(rows: Sequence[Row]) -> list[str]:
    """How much faster a step could be at most, by the share of it that the added layers take, and how much it is."""
    by_name = {(row.shape, row.dtype, row.provider): row for row in rows if row.op == OP and row.status == "ok"}
    lines = []
    models = dict.fromkeys(name.rpartition("-")[0] for name in MEASURED)
    for model, dtype in itertools.product(models, dict.fromkeys(row.dtype for row in rows)):
        parts = [
            by_name.get((f"{model}-{part}", dtype, provider))
            for part in ("layers", "step")
            for provider in ("open-flamingo", "flamingo_kernels")
        ]
        if all(parts):
            lines.append(f"{OP} {model} {dtype}: {_remark(*parts)}")
    return lines


def _remark(their_layers: Row, our_layers: Row, their_step: Row, our_step: Row) -> str:
    share = their_layers.p50_ms / their_step.p50_ms
    bound = 1 / (1 - share) if share < 1 else math.inf  # the two are measured one after the other
    shape = MEASURED[our_step.shape]
    theirs, ours = (1e3 * shape.rows * shape.tokens / row.p50_ms for row in (their_step, our_step))
    return (
        f"the added layers take {share:.0%} of open-flamingo's step, which could be {bound:.2f}x as fast if "
        f"they took no time; ours is {ours / theirs:.2f}x, {ours:,.0f} tokens/s and not {theirs:,.0f}. It keeps "
        f"{our_layers.saved_bytes / their_layers.saved_bytes:.2f}x the bytes for backward in the added layers and "
        f"{our_step.saved_bytes / their_step.saved_bytes:.2f}x in the step, whose peak is "
        f"{our_step.peak_bytes / their_step.peak_bytes:.2f}x"
    )
