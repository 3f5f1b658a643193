from __future__ import annotations



from dataclasses import dataclass, field
from pathlib import Path


from finetuning_kit.config import FineTuningConfig, LoRAConfig
from finetuning_kit.machine import precision_of
from finetuning_kit.models import ParameterCount, count_parameters, get_target_modules, load_model
from finetuning_kit.models import quiet_libraries, resolve_model_name
from finetuning_kit.settings import FinetuningError, markdown_table


import peft
import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from peft.utils import constants as peft_names
from peft.utils.other import TrainableTokensWrapper
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D


VIRTUAL = ("prefix", "prompt", "p_tuning")  # they train positions before the text, and no weight
METHOD_WORDS = {
    "full": "every weight, in fp32", "freeze": "the upper layers, in fp32; the lower ones stay",
    "lora": "two thin matrices beside each chosen layer", "qlora": "the same over a base in 4 bits",
    "rslora": "LoRA with a scale of alpha / √r, so that high ranks count", "dora": "LoRA, and the length of each row",
    "pissa": "LoRA that starts as the strongest directions of the weights",
    "olora": "LoRA that starts with orthonormal directions of the weights",
    "loftq": "LoRA over 4 bits that starts by making up for the rounding",
    "eva": "LoRA that starts along the directions of the training rows",
    "lora+": "LoRA whose B learns 16 times as fast as A", "adalora": "LoRA whose ranks move to where they are needed",
    "ia3": "one factor for each output of keys, values and feed-forward",
    "prefix": "keys and values before the text, in every layer", "prompt": "embeddings before the text",
    "p_tuning": "embeddings before the text, made by a small network", "ln_tuning": "the factors of the norm layers"}


def can_merge(
    config: FineTuningConfig,  # any
) -> bool:  # False for virtual tokens, and where there is no adapter
    "Say whether what is trained can be folded into the base's weights."
    return config.trains_adapter and config.method not in VIRTUAL


def base_precision(
    config: FineTuningConfig,  # resolved settings
) -> str:  # "fp32", "bf16" or "fp16"
    "Choose the numbers in which a method needs its base to be loaded."
    lora = config.lora
    whole = not config.trains_adapter or config.method == "ln_tuning" or lora is not None and (
        lora.init_lora_weights in ("pissa", "olora") or lora.modules_to_save or lora.trainable_token_indices)
    return "fp32" if whole and not config.load_in_4bit else precision_of(config)


def settle_for_method(
    config: FineTuningConfig,  # resolved settings
) -> tuple[FineTuningConfig, list[str]]:  # settings that the method can keep; one note for each change
    "Switch off what a method cannot live with, and tell it."
    changes, notes = {}, []
    if config.method in VIRTUAL and config.training.packing:
        changes["training.packing"] = False
        notes.append(f"packing: off (`method` {config.method} puts its positions before each row, and a pack of rows "
                     "has one beginning)")
    if config.method == "prefix" and config.training.gradient_checkpointing:
        changes["training.gradient_checkpointing"] = False
        notes.append("gradient_checkpointing: off (`method` prefix hands each layer keys and values, which a second "
                     "computation of the layer would miss)")
    return (config.replace(**changes) if changes else config), notes


def adaptable_layers(
    model,  # a torch module
) -> list[str]:  # full names
    "List the layers that can get an adapter: linear, convolution, embedding."
    kinds = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv2d, Conv1D)
    return [name for name, part in model.named_modules() if isinstance(part, kinds)]


def matches(
    layer: str,  # a layer's full name
    name: str,  # a full name, or how one ends: "q_proj", "layers.0.self_attn.q_proj"
) -> bool:  # as PEFT decides
    "Tell whether a name means a layer."
    return layer == name or layer.endswith("." + name)


def layer_counts(
    model,  # a torch module
    names: list[str],  # as in `target_modules`
) -> dict[str, int]:  # name -> how many layers it means; none raises
    "Count the layers that each name means."
    layers = adaptable_layers(model)
    counts = {name: sum(matches(layer, name) for layer in layers) for name in names}
    missing = [name for name, count in counts.items() if not count]
    if missing:
        known = ", ".join(sorted({layer.rpartition(".")[2] for layer in layers}))
        raise FinetuningError(f"`target_modules` names {missing[0]!r}, which no layer of this model is called; "
                              f"it has {known}; \"all-linear\" takes all linear layers but the head")
    return counts


def is_tied(
    model,  # a language model
) -> bool:  # True when input embeddings and output head are one matrix
    "Tell whether a model reads and writes with the same matrix."
    head = model.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is model.get_input_embeddings().weight


def check_ends(
    model,  # a language model
    names: list[str],  # as in `target_modules`
) -> None:  # raises where LoRA would go wrong
    "Refuse LoRA on the output head, and on embeddings that are the head as well."
    ends = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    layers = {name: end for name, part in model.named_modules() for end, layer in ends.items() if part is layer}
    for name in names:
        end = next((end for layer, end in layers.items() if matches(layer, name)), None)
        why = ("is the output head, whose matrix the loss reads directly, so LoRA there would learn nothing"
               if end == "output" else "is the matrix of the output head as well, and a merge would change both ends"
               if end and is_tied(model) else "")
        if why:
            raise FinetuningError(f"`target_modules` names {name!r}, which {why}; train it whole instead: "
                                  f"`modules_to_save` [\"{name.rpartition('.')[2]}\"]"
                                  + (", or some of its tokens: `trainable_token_indices`" if end == "input" else ""))


def target_layers(
    lora: LoRAConfig,  # whose `target_modules` may be a default
    model,  # a language model
) -> list[str] | str:  # names that this model has, or "all-linear"
    "Resolve the layers that get an adapter; a default that does not fit gives way to the model's own names."
    wanted = lora.target_modules
    if isinstance(wanted, str):
        return wanted
    if not lora.is_given("target_modules") and not any(
            matches(layer, name) for layer in adaptable_layers(model) for name in wanted):
        return get_target_modules(model)
    layer_counts(model, wanted)
    check_ends(model, wanted)
    return wanted


def check_whole(
    lora: LoRAConfig,  # with `modules_to_save` and `trainable_token_indices`
    model,  # a language model
) -> None:  # a name or an id that the model lacks raises
    "Check the layers that train whole and the tokens that train alone."
    parts, n_ids = [name for name, _ in model.named_modules()], model.get_input_embeddings().weight.shape[0]
    unknown = [name for name in lora.modules_to_save or [] if not any(matches(part, name) for part in parts)]
    if unknown:
        known = sorted({name.rpartition(".")[2] for name in adaptable_layers(model)})
        raise FinetuningError(f"`modules_to_save` names {unknown[0]!r}, which no layer of this model is called; "
                              f"it has {', '.join(known)}")
    beyond = [index for index in lora.trainable_token_indices or [] if not 0 <= index < n_ids]
    if beyond:
        raise FinetuningError(f"`trainable_token_indices` holds {beyond[0]}, and the model's tokens are 0 to {n_ids - 1}")


STARTS = {"default": True, "loftq": True, "gaussian": "gaussian", "pissa": "pissa", "olora": "olora", "eva": "eva"}


def lora_options(
    lora: LoRAConfig,  # rank, strength, layers, variants
    model,  # a language model
) -> dict:  # arguments of PEFT's LoraConfig
    "Say our settings of LoRA in PEFT's words."
    check_whole(lora, model)
    ends = bool(lora.modules_to_save or lora.trainable_token_indices)
    same = ("r", "lora_alpha", "lora_dropout", "bias", "modules_to_save", "trainable_token_indices", "use_rslora",
            "use_dora")
    options = {name: getattr(lora, name) for name in same}
    options |= {"target_modules": target_layers(lora, model), "task_type": "CAUSAL_LM",
                "init_lora_weights": STARTS[lora.init_lora_weights], "ensure_weight_tying": ends and is_tied(model)}
    if lora.init_lora_weights == "eva":
        options["eva_config"] = peft.EvaConfig(use_label_mask=False)
    return options


def adalora_options(
    lora: LoRAConfig,  # its rank is what a layer has in the end, on average
    model,  # a language model
    total_steps: int | None,  # optimizer steps of the run
) -> dict:  # arguments of PEFT's AdaLoraConfig
    "Say them for AdaLoRA: half as many ranks again to start with, a tenth of the run to warm up, a quarter to settle."
    given = [name for name in ("use_dora", "use_rslora", "init_lora_weights", "loraplus_ratio") if lora.is_given(name)]
    if given:
        raise FinetuningError(f"`lora.{given[0]}` is a variant of LoRA, which `method` adalora does not have; "
                              "leave it out, or set `method` to lora")
    if not total_steps:
        raise FinetuningError("AdaLoRA shares out its ranks over the whole run: `total_steps` must be given")
    options = {name: value for name, value in lora_options(lora, model).items() if name not in ("r", "use_dora",
               "use_rslora", "init_lora_weights")}
    return {**options, "init_r": lora.r + max(1, lora.r // 2), "target_r": lora.r, "total_step": total_steps,
            "tinit": total_steps // 10, "tfinal": total_steps // 4, "deltaT": max(1, total_steps // 50)}


def norm_names(
    model,  # a torch module
) -> list[str]:  # such as "input_layernorm"
    "Name a model's norm layers."
    return sorted({name.rpartition(".")[2] for name, part in model.named_modules()
                   if "norm" in type(part).__name__.lower()})


def ia3_options(
    model,  # a language model
) -> dict:  # arguments of PEFT's IA3Config
    "Choose IA3's layers: PEFT's choice for architectures that it knows, all linear layers of any other."
    known = model.config.model_type in peft_names.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    return {} if known else {"target_modules": "all-linear", "feedforward_modules": []}


def prompt_options(
    config: FineTuningConfig,  # with `prompt_tuning_init_text`
) -> dict:  # arguments of PEFT's PromptTuningConfig
    "Choose where prompt tuning starts: your words, or words drawn from the vocabulary."
    if config.prompt_tuning_init_text is None:
        return {"prompt_tuning_init": "SAMPLE_VOCAB"}
    return {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": config.prompt_tuning_init_text,
            "tokenizer_name_or_path": resolve_model_name(config.model_name)}


def adapter_config(
    config: FineTuningConfig,  # with `method` and what belongs to it
    model,  # a language model
    total_steps: int | None = None,  # optimizer steps of the run; only AdaLoRA needs them
) -> peft.PeftConfig:  # what PEFT attaches
    "Say a method in PEFT's words."
    n, kind = {"num_virtual_tokens": config.num_virtual_tokens}, {"task_type": "CAUSAL_LM"}
    width = model.get_input_embeddings().weight.shape[1]
    makers = {
        "lora": lambda: peft.LoraConfig(**lora_options(config.lora, model)),
        "adalora": lambda: peft.AdaLoraConfig(**adalora_options(config.lora, model, total_steps)),
        "ia3": lambda: peft.IA3Config(**kind, **ia3_options(model)),
        "ln_tuning": lambda: peft.LNTuningConfig(**kind, target_modules=norm_names(model)),
        "prefix": lambda: peft.PrefixTuningConfig(**kind, **n),
        "prompt": lambda: peft.PromptTuningConfig(**kind, **n, **prompt_options(config)),
        "p_tuning": lambda: peft.PromptEncoderConfig(**kind, **n, encoder_hidden_size=width)}
    if config.method not in makers:
        raise FinetuningError(f"`method` {config.method} trains the model itself, so there is no adapter to describe")
    return makers[config.method]()


def layer_stack(
    model,  # a language model
) -> torch.nn.ModuleList:  # its layers, the lowest first
    "Find the stack of layers in a model."
    n_layers = model.config.get_text_config().num_hidden_layers
    stacks = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == n_layers]
    if not stacks:
        raise FinetuningError(f"`method` freeze needs a stack of {n_layers} layers, and this model shows none; "
                              "set `method` to full or lora")
    return stacks[0]


def freeze_bottom(
    model,  # a language model; changed in place
    ratio: float,  # share of the layers that stay, from the bottom; one layer always trains
) -> int:  # layers that stay as they are
    "Train the upper layers, the last norm and a head of its own; freeze the rest."
    layers = layer_stack(model)
    n_frozen = min(round(ratio * len(layers)), len(layers) - 1)
    model.requires_grad_(True)
    model.get_input_embeddings().requires_grad_(False)  # and with it a tied head
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Embedding):  # learned positions lie below all layers too
            part.requires_grad_(False)
    for layer in layers[:n_frozen]:
        layer.requires_grad_(False)
    return n_frozen


def start_from_rows(
    model: PeftModel,  # with a fresh LoRA adapter whose start is "eva"
    rows: list,  # what is learned from; each has `input_ids`
    most: int = 64,  # rows looked at
    n_tokens: int = 8192,  # tokens in one forward pass
) -> None:  # A is set; B stays at zero
    "Turn the adapter's A towards the directions in which the training rows move each layer's input."
    if not rows:
        raise FinetuningError("a start by eva looks at the training rows, and there are none")
    rows, batches, settings = rows[:most], [], model.active_peft_config
    needed = int(settings.r * settings.eva_config.rho)  # PEFT waits for ever where a batch has fewer
    size = max(1, n_tokens // max(len(row.input_ids) for row in rows))
    for start in range(0, len(rows), size):
        ids = [torch.tensor(row.input_ids) for row in rows[start:start + size]]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(model.device)
        lengths = torch.tensor([len(row) for row in ids], device=model.device)
        mask = torch.arange(padded.shape[1], device=model.device)[None] < lengths[:, None]
        if mask.sum() >= needed:
            batches.append({"input_ids": padded, "attention_mask": mask.long()})
    if not batches:
        raise FinetuningError(f"a start by eva needs {needed} tokens for this rank, and the rows have fewer; lower `r`, "
                              "or choose another start")
    peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    model.eval()


@torch.no_grad()
def start_from_rounding(
    model: PeftModel,  # a 4-bit base with a fresh LoRA adapter
    original,  # the same base unrounded
) -> None:  # A and B are set
    "Let the adapter start as the best low-rank account of what the rounding to 4 bits took away (LoftQ)."
    from bitsandbytes.functional import dequantize_4bit
    from peft.utils.loftq_utils import _low_rank_decomposition

    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, peft.tuners.lora.Linear4bit):
            rounded = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
            lost = original.get_submodule(name).weight.to(rounded.device).float() - rounded
            parts = _low_rank_decomposition(lost, reduced_rank=layer.r["default"])
            layer.lora_A["default"].weight.copy_(parts["R"])
            layer.lora_B["default"].weight.copy_(parts["L"] / layer.scaling["default"])


def attach(
    model,  # a base
    settings: peft.PeftConfig,  # what to attach
    base_name: str | None = None,  # what the adapter's files call the base; None: where it was loaded from
) -> PeftModel:  # the base, frozen, with what trains beside it in fp32
    "Put an adapter on a model, and keep this machine's paths out of its files."
    with quiet_libraries():
        adapted = peft.get_peft_model(model, settings)
    settings.base_model_name_or_path = base_name or settings.base_model_name_or_path
    if getattr(settings, "tokenizer_name_or_path", None):  # the words have done their work
        settings.prompt_tuning_init, settings.tokenizer_name_or_path = peft.PromptTuningInit.RANDOM, None
        settings.prompt_tuning_init_text = None
    head = adapted.get_base_model().get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper) and not hasattr(head, "bias"):
        head.bias = None  # TRL asks for it
    for parameter in filter(lambda p: p.requires_grad, adapted.parameters()):
        parameter.data = parameter.data.float()
    return adapted


def add_lora(
    model,  # a base model
    lora: LoRAConfig,  # rank, strength, layers
    base_name: str | None = None,  # what the adapter's files call the base; None: where it was loaded from
) -> PeftModel:  # the base, frozen, with a fresh adapter on every chosen layer
    "Put a LoRA adapter on a model."
    return attach(model, peft.LoraConfig(**lora_options(lora, model)), base_name)


def check_method(
    config: FineTuningConfig,  # resolved settings
    model,  # loaded
) -> None:  # raises when the two do not go together
    "Refuse a model that a method cannot train."
    in_4bit, has_adapter = getattr(model, "is_loaded_in_4bit", False), isinstance(model, PeftModel)
    if not config.trains_adapter and in_4bit:
        raise FinetuningError(f"`method` {config.method} trains the model itself, which is in 4 bits, whose weights "
                              "cannot be trained; give `lora`, or load it with `load_in_4bit: false`")
    if not config.trains_adapter and has_adapter:
        raise FinetuningError(f"`method` {config.method} trains the model itself, and this one carries an adapter; "
                              "merge the adapter first, or pass the base")
    if has_adapter and model.active_peft_config.peft_type.value.lower() != config.method:
        raise FinetuningError(f"`method` is {config.method}, and the model carries an adapter of kind "
                              f"{model.active_peft_config.peft_type.value}; pass the base, or set `method` to match")
    if config.lora is not None and config.lora.init_lora_weights == "loftq" and not in_4bit:
        raise FinetuningError("a start by loftq makes up for the rounding to 4 bits, and the model is not rounded; "
                              "set `load_in_4bit` to true")


def prepare_method(
    config: FineTuningConfig,  # resolved settings
    model,  # a loaded base, or one with an adapter of the same method to train on
    rows: list = (),  # training rows, each with `input_ids`; for a start by eva, and to know AdaLoRA's steps
    base_name: str | None = None,  # what the adapter's files call the base; None: where it was loaded from
) -> tuple:  # the model, its trainable parameters chosen; what to tell
    "Make a model trainable as a method says."
    check_method(config, model)
    if config.trains_adapter and not isinstance(model, PeftModel):
        if getattr(model, "is_loaded_in_4bit", False):
            model = peft.prepare_model_for_kbit_training(model, config.training.gradient_checkpointing)
        settings = adapter_config(config, model, config.training.total_steps(max(len(rows), 1)))
        model, start = attach(model, settings, base_name), config.lora and config.lora.init_lora_weights
        if start == "eva":
            start_from_rows(model, rows)
        if start == "loftq":
            start_from_rounding(model, load_model(config.model_name, precision=precision_of(config)))
    elif not config.trains_adapter:
        model = model.float().requires_grad_(True)
        if config.method == "freeze":
            freeze_bottom(model, config.freeze_ratio)
    return model, method_notes(config, model)


MARKS = ("lora_", "ia3_", "modules_to_save", "ln_tuning_layers", "token_adapter", "trainable_tokens_")


@dataclass
class TrainedParts:
    "What of a model trains, by the names of its layers"
    parts: dict[str, tuple]  # name -> layers, numbers
    count: ParameterCount  # of the whole model

    def __str__(self):
        return ", ".join(name if "virtual" in name else f"{name}: {n} layer{'s' * (n > 1)}"
                         for name, (n, _) in self.parts.items())

    def _repr_markdown_(self):
        rows = [(f"`{name}`", n, f"{size:,}") for name, (n, size) in self.parts.items()]
        return markdown_table(["what trains", "layers", "numbers"], rows) + f"\n\n{self.count}"


def trained_parts(
    model,  # ready to train
) -> TrainedParts:  # layers and numbers for each name
    "Group what trains by the layers it belongs to."
    found = {}
    for name, parameter in model.named_parameters():
        words = name.split(".")
        at = next((i for i, word in enumerate(words) if word.startswith(MARKS)), len(words) - 1)
        layer = ".".join(words[:at])
        if parameter.requires_grad:
            label = layer.rpartition(".")[2]
            if "prompt_encoder" in words:
                label = f"{model.active_peft_config.num_virtual_tokens} virtual tokens"
            layers, size = found.get(label, (set(), 0))
            found[label] = (layers | {layer}, size + parameter.numel())
    return TrainedParts({name: (len(layers), size) for name, (layers, size) in found.items()}, count_parameters(model))


def method_notes(
    config: FineTuningConfig,  # resolved settings
    model,  # as `prepare_method` left it
) -> list[str]:  # sentences
    "Tell what a method trains, where it is not what the settings say word for word."
    notes, lora = [], config.lora
    if config.trains_adapter:
        notes.append(f"{config.method} on {trained_parts(model)}")
    if lora is not None and not lora.is_given("target_modules") and isinstance(lora.target_modules, list):
        taken = getattr(model.active_peft_config, "target_modules", None) or []
        if not set(lora.target_modules) & set(taken):
            notes.append("target_modules: this model has no q_proj and v_proj, so its own attention layers were taken")
    if config.method == "freeze":
        layers = layer_stack(model)
        n_frozen = sum(not any(p.requires_grad for p in layer.parameters()) for layer in layers)
        head = "; so does the output head, which is the same matrix" if is_tied(model) else ""
        notes.append(f"freeze: the lower {n_frozen} of {len(layers)} layers and the embeddings stay{head}")
    ends = model.get_input_embeddings().parameters() if lora is not None else ()
    if getattr(lora and model.active_peft_config, "ensure_weight_tying", False) and any(p.requires_grad for p in ends):
        notes.append("input embeddings and output head are one matrix in this model, and are trained as one")
    if base_precision(config) != precision_of(config):
        notes.append(f"the base is held in fp32, for `method` {config.method} needs its weights exact")
    return notes


def method_optimizer(
    config: FineTuningConfig,  # resolved settings
    model,  # ready to train
    kind: type,  # the optimizer's class
    options: dict,  # its arguments, such as `lr`
) -> torch.optim.Optimizer | None:  # None: the method has no optimizer of its own
    "Make LoRA+'s optimizer, in which B learns faster than A."
    if config.method != "lora" or config.lora.loraplus_ratio == 1:
        return None
    options = {**options, "lr": config.training.learning_rate, "loraplus_weight_decay": config.training.weight_decay}
    return create_loraplus_optimizer(model, kind, loraplus_lr_ratio=config.lora.loraplus_ratio, **options)


def orthogonality(
    model: PeftModel,  # with an AdaLoRA adapter
) -> torch.Tensor:  # a number with a gradient
    "How far AdaLoRA's directions are from standing at right angles, times its weight in the loss."
    errors = []
    for name, matrix in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            product = matrix @ matrix.T if "lora_A" in name else matrix.T @ matrix
            errors.append(torch.linalg.matrix_norm(product - torch.eye(len(product), device=product.device)))
    return model.active_peft_config.orth_reg_weight * sum(errors) / len(errors)


class RankBudget(TrainerCallback):
    "Does AdaLoRA's part of each step: keep the directions apart, then move ranks to the layers that use them."

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        "Add the pull towards right angles, which the trainer's own loss leaves out."
        orthogonality(model).backward()

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        "Share out the ranks, while the step's gradients are still there."
        model.base_model.update_and_allocate(state.global_step + 1)


STATE_FILE = "method_state.safetensors"  # beside a checkpoint's weights
MEMORIES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # what AdaLoRA's allocator remembers of each matrix


def save_method_state(
    model,  # in training
    path: str | Path,  # a checkpoint's folder
) -> None:  # writes a file only where the saved adapter is less than what trains
    "Save what an adapter's files leave out: AdaLoRA's ranks and their history, P-tuning's network."
    from safetensors.torch import save_file

    kind = model.active_peft_config.peft_type.value if isinstance(model, PeftModel) else ""
    if kind not in ("ADALORA", "P_TUNING"):
        return
    tensors = {f"weight.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if kind == "ADALORA":
        ranks, allocator = model.active_peft_config.rank_pattern or {}, model.base_model.rankallocator
        tensors |= {f"ranks.{name}": torch.tensor(kept) for name, kept in ranks.items()}
        tensors |= {f"{memory}.{name}": tensor for memory in MEMORIES
                    for name, tensor in getattr(allocator, memory).items()}
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, Path(path) / STATE_FILE)


@torch.no_grad()
def load_method_state(
    model,  # prepared as at the start of the run
    path: str | Path,  # a checkpoint's folder
) -> bool:  # False: there is no such file, and the adapter's own files say everything
    "Put back what `save_method_state` saved."
    from safetensors.torch import load_file

    if not (Path(path) / STATE_FILE).is_file():
        return False
    weights, found = dict(model.named_parameters()), {}
    for key, tensor in load_file(Path(path) / STATE_FILE).items():
        kind, _, name = key.partition(".")
        if kind == "weight":
            weights[name].copy_(tensor)
        else:
            found.setdefault(kind, {})[name] = tensor.to(model.device)
    if "ranks" in found:
        model.active_peft_config.rank_pattern = {name: kept.tolist() for name, kept in found["ranks"].items()}
    for memory in set(MEMORIES) & set(found):
        setattr(model.base_model.rankallocator, memory, found[memory])
    return True
