"""fk.convert_state_dict."""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from flamingo_kernels._checks import expect, expect_type, got
from flamingo_kernels.patch.names import BLOCKS, RESAMPLERS, Layout

_NAME = "convert_state_dict"
_LAYER = re.compile(r"^(layers|blocks)\.(\d+)\.")
# where a whole model has the resampler, and its blocks one after the other
_PLACES = {
    "flamingo_kernels": ("resampler.", "blocks.{}."),  # the package `flamingo`
    "idefics": ("model.perceiver_resampler.", "model.gated_cross_attn_layers.{}."),
}
_SAME_PLACES = ({"open_flamingo", "otter"},)
# the number of a block in its prefix: ...3., ...3.gated_cross_attn_layer., ...3.xattn_block., layers.3.1.
_NUMBER = re.compile(r"(\d+)\.(?:1\.|gated_cross_attn_layer\.|xattn_block\.)?$")


class _Part(NamedTuple):
    """A block or a resampler inside a state: its keys without the prefix."""

    prefix: str
    kind: str
    state: dict[str, Tensor]


_KINDS = {"block": (BLOCKS, "attn_gate"), "resampler": (RESAMPLERS, "latents")}


def convert_state_dict(state: Mapping[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """The state of one block, one resampler or a whole model, under the names of another package.

        block.load_state_dict(fk.convert_state_dict(their_block.state_dict(), "open_flamingo", "flamingo_kernels"))

    Parameters are renamed, reshaped, split and joined; nothing is computed, so every conversion that is possible is
    also possible back, and gives the same tensors. Tensors are views of those of `state` where nothing is joined.

    A state holds neither heads nor activations nor the eps of norms. A module of `fk.nn` gives the foreign module's
    outputs with these arguments, besides the sizes:

    - open_flamingo, otter, flamingo_pytorch: activation="gelu". flamingo_mini: activation as its `act`.
    - idefics: norm="rms", activation="swiglu"; gate="vector" and qk_norm=True as its config says; the eps of its norms
      is 1e-6 by default, `block.attn_norm.eps = ...` sets it. Its resampler: activation="relu".
    - mllama: norm="rms", activation="swiglu", qk_norm=True, kv_heads, skip_mlp_without_media=True. Tokens that see no
      image differ: there they attend to all of them.

    Of a whole model, the blocks and the resampler are converted, and all other keys stay as they are: into
    "flamingo_kernels" as "resampler." and "blocks.{}." in the order of their layers, which is how the package
    `flamingo` has them (its `load_new_state_dict` takes these alone); from there into "idefics", which also numbers its
    blocks one by one; between "open_flamingo" and "otter" in their places. Other models number blocks by the layers of
    a language model, which no state tells.

    Args:
        state: names to tensors. A whole model has a prefix before each of its parts.
        source, target: "flamingo_kernels" (`fk.nn`) | "open_flamingo" | "otter" | "flamingo_pytorch" |
            "flamingo_mini" | "idefics" | "mllama".

    Raises:
        TypeError: state is no mapping.
        ValueError: an unknown package, a state in which nothing of `source` is found or that lacks a part of it, or
            parameters that have no counterpart in `target`, which are named.
    """
    expect_type(isinstance(state, Mapping), _NAME, "state", "a mapping of names to tensors", got(state))
    for argument, name in (("source", source), ("target", target)):
        expect(name in BLOCKS, _NAME, argument, f"one of {', '.join(BLOCKS)}", repr(name))
    parts = list(_parts(state, source))
    found = f"with a block or a resampler of {source}, whose names end with {' or '.join(_markers(source).values())}"
    expect(bool(parts), _NAME, "state", found, f"the names {', '.join(list(state)[:8])}, ...")
    inside = {part.prefix + name for part in parts for name in part.state}
    converted = {name: x for name, x in state.items() if name not in inside}
    for part, prefix in _placed(parts, source, target):
        converted |= {prefix + name: x for name, x in _converted(part, source, target).items()}
    return converted


def _markers(package: str) -> dict[str, str]:
    """For each kind of part, the parameter that tells it."""
    return {kind: layouts[package].names[ours] for kind, (layouts, ours) in _KINDS.items() if package in layouts}


def _parts(state: Mapping[str, Tensor], source: str) -> Iterator[_Part]:
    for kind, marker in _markers(source).items():
        for name in state:
            if name == marker or name.endswith(f".{marker}"):
                prefix = name[: -len(marker)]
                yield _Part(prefix, kind, {n[len(prefix) :]: x for n, x in state.items() if n.startswith(prefix)})


def _placed(parts: list[_Part], source: str, target: str) -> list[tuple[_Part, str]]:
    """Each part with its prefix in the target."""
    same = source == target or any({source, target} <= places for places in _SAME_PLACES)
    if same or (len(parts) == 1 and not parts[0].prefix):
        return [(part, part.prefix) for part in parts]
    if target not in _PLACES:
        raise ValueError(
            f"{_NAME}: a whole model of {source} has no counterpart in {target}, whose blocks are numbered by the "
            f"layers of its language model; convert its parts one by one: {', '.join(part.prefix for part in parts)}"
        )
    resampler, block = _PLACES[target]
    resamplers = [part for part in parts if part.kind == "resampler"]
    expect(len(resamplers) <= 1, _NAME, "state", "of a model with one resampler", [part.prefix for part in resamplers])
    # OpenFlamingo's state has its blocks under two names each
    blocks = {_number(part.prefix): part for part in parts if part.kind == "block"}
    return [
        *((part, resampler) for part in resamplers),
        *((blocks[number], block.format(i)) for i, number in enumerate(sorted(blocks))),
    ]


def _number(prefix: str) -> int:
    found = _NUMBER.search(prefix)
    expect(found is not None, _NAME, "state", "with a number before each block of a whole model", repr(prefix))
    return int(found.group(1))


def _converted(part: _Part, source: str, target: str) -> dict[str, Tensor]:
    layouts, _ = _KINDS[part.kind]
    if target not in layouts:
        _refuse(part, source, f"has no counterpart in {target}")
    layers = sorted({int(found.group(2)) for found in map(_LAYER.match, part.state) if found})
    ours = _read(part, layouts[source], source, layers)
    _check(ours, part, layouts[target], source, target)
    return _write(ours, part, layouts[target], layers, source, target)


def _each(layout: Layout, layers: list[int]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """The name in `fk.nn`, the same with "{}" for a layer's number, and the names in the package."""
    for general, theirs in layout.names.items():
        theirs = theirs if isinstance(theirs, tuple) else (theirs,)
        for layer in layers if "{}" in general else [0]:
            yield general.format(layer), general, tuple(name.format(layer) for name in theirs)


def _read(part: _Part, layout: Layout, source: str, layers: list[int]) -> dict[str, Tensor]:
    """The part under the names of `fk.nn`, and in its shapes."""
    ours, missing = {}, []
    left = {name: x for name, x in part.state.items() if name not in layout.ignored}
    for our, general, theirs in _each(layout, layers):
        found = [left.pop(name) for name in theirs if name in left]
        if len(found) == len(theirs):
            x = found[0] if len(found) == 1 else torch.cat(found)
            ours[our] = x.flatten(0, 1) if general in layout.rows else x
        elif found or general not in layout.optional:
            missing += theirs
    if left:
        _refuse(part, source, f"has {', '.join(left)}, which have no counterpart in fk.nn")
    if missing:
        _refuse(part, source, f"lacks {', '.join(missing)}")
    for gate in ("attn_gate", "ff_gate"):
        if gate in ours:
            ours[gate] = ours[gate].flatten()  # IDEFICS: [1, 1, C]
    return ours


def _check(ours: dict[str, Tensor], part: _Part, layout: Layout, source: str, target: str) -> None:
    """Raise ValueError where shapes say what the names do not."""
    for name in ours:
        if name.endswith("w_in.weight"):
            gated = ours[name].shape[0] == 2 * ours[name.replace("w_in", "w_out")].shape[1]
            if layout.gated not in (None, gated):
                has, wants = ("one with", "without") if gated else ("one without", "with")
                _refuse(
                    part, source, f"has a feed-forward, {has} a gated activation, and those of {target} are {wants}"
                )
        gate = name in ("attn_gate", "ff_gate")
        if gate and layout.scalar_gates and ours[name].numel() != 1:
            _refuse(part, source, f"has a gate per channel, which has no counterpart in {target}")
    if part.kind == "block":
        queries, keys = ours["to_q.weight"], ours["to_kv.weight"]
        if not layout.grouped and keys.shape[0] != 2 * queries.shape[0]:
            _refuse(part, source, f"has fewer key heads than query heads, which has no counterpart in {target}")
        if layout.one_width and keys.shape[1] != queries.shape[1]:
            _refuse(part, source, f"has media of another width than text, which has no counterpart in {target}")


def _write(
    ours: dict[str, Tensor], part: _Part, layout: Layout, layers: list[int], source: str, target: str
) -> dict[str, Tensor]:
    """From the names and shapes of `fk.nn` to those of the target."""
    theirs, missing, left = {}, [], dict(ours)
    for our, general, names in _each(layout, layers):
        if our not in left:
            missing += () if general in layout.optional else names
            continue
        x = left.pop(our)
        if general in layout.rows:
            x = x.unsqueeze(1)
        elif target == "idefics" and our in ("attn_gate", "ff_gate") and x.numel() > 1:
            x = x.reshape(1, 1, -1)
        theirs |= zip(names, x.chunk(len(names)), strict=True)
    if left:
        _refuse(part, source, f"has {', '.join(left)} (named as in fk.nn), which have no counterpart in {target}")
    if missing:
        _refuse(part, source, f"has no counterpart of {', '.join(missing)}, which {target} has")
    return theirs


def _refuse(part: _Part, source: str, what: str) -> None:
    where = f" {part.prefix!r}" if part.prefix else ""
    raise ValueError(f"{_NAME}: the {part.kind}{where} of {source} {what}")
