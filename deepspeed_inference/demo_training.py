"""How the demo model is trained: a byte-level Mamba on the source of Python's standard library.

The model is transformers' own, its blocks injected as for inference, so that training runs our kernels forward and
backward. A tenth of the files, chosen by the seed, is held out. Matrices are stored in bfloat16.
"""

from __future__ import annotations

import math
import random
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from deepspeed_inference import policy
from megatron_ssm.checkpoint import ModuleSource, save_safetensors
from megatron_ssm.collectives import make_reduction
from megatron_ssm.families import family_of

END = 256  # ids below are bytes; this one ends a file
EOS_TOKEN = "<|end|>"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the result, beside the time it is given."""

    hidden_size: int = 256
    num_layers: int = 6
    length: int = 512
    batch: int = 16
    learning_rate: float = 4e-3
    weight_decay: float = 0.1
    warmup_steps: int = 100
    seed: int = 0


def corpus_files(seed: int) -> tuple[list[Path], list[Path]]:
    """The standard library's own files without its tests: (training, held out)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "test", "tests", "idle_test", "lib2to3"}
    files = sorted(file for file in root.rglob("*.py") if not left_out & set(file.relative_to(root).parts))
    random.Random(seed).shuffle(files)
    held_out = len(files) // 10
    return files[held_out:], files[:held_out]


def stream(files: list[Path]) -> torch.Tensor:
    """All files behind one another, each ended by END: [total] int64."""
    parts = [torch.tensor([*file.read_bytes(), END], dtype=torch.int64) for file in files]
    return torch.cat(parts)


def new_model(recipe: Recipe) -> MambaForCausalLM:
    """transformers' model with its own initialisation, and our blocks in it, to be trained in fp32."""
    torch.manual_seed(recipe.seed)
    config = MambaConfig(
        vocab_size=END + 1,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        initializer_range=0.02,
        rescale_prenorm_residual=True,
    )
    model = MambaForCausalLM(config)
    family = family_of(config)
    reduction = make_reduction(None, "cpu")
    source = ModuleSource(model)
    policy.inject(model, family, source, reduction=reduction, dtype=torch.float32, device=torch.device("cpu"))
    return model.requires_grad_(True).train()


def new_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; what is not a matrix of a linear map does not decay (Gu & Dao 2023, appendix E)."""
    decayed = [p for n, p in model.named_parameters() if p.dim() == 2 and "A_log" not in n and "embeddings" not in n]
    chosen = {id(parameter) for parameter in decayed}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood in nats of each next byte of ids [B, L + 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, data: torch.Tensor, recipe: Recipe, windows: int = 64) -> float:
    """On evenly spread windows of `data`, each read without what came before it."""
    starts = torch.linspace(0, data.numel() - recipe.length - 2, windows).long()
    losses = [loss_of(model, _windows(data, chunk, recipe.length)) for chunk in starts.split(recipe.batch)]
    return float(torch.stack(losses).mean() / math.log(2))


def train(recipe: Recipe, minutes: float, work_dir: Path) -> tuple[MambaForCausalLM, dict]:
    """Train until the time is over, counting that of earlier calls; returns the model and its record."""
    training, held_out = (stream(files) for files in corpus_files(recipe.seed))
    model = new_model(recipe)
    optimizer = new_optimizer(model, recipe)
    state_file = work_dir / "state.pt"
    record = {"seconds": 0.0, "step": 0, "curve": [], "recipe": asdict(recipe)}
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        if state["record"]["recipe"] != asdict(recipe):
            raise SystemExit(f"{state_file} was trained with another recipe: {state['record']['recipe']}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        record = state["record"]
    budget, tokens = 60 * minutes, recipe.batch * recipe.length
    bar = tqdm(total=round(budget), initial=round(record["seconds"]), unit="s", desc="training")
    last_saved = record["seconds"]
    while record["seconds"] < budget:
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + record["step"])
        starts = torch.randint(0, training.numel() - recipe.length - 1, (recipe.batch,), generator=generator)
        rate = recipe.learning_rate * _schedule(record["seconds"] / budget, record["step"], recipe.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(model, _windows(training, starts, recipe.length))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bits = loss.item() / math.log(2)
        elapsed = time.perf_counter() - began
        record["seconds"] += elapsed
        record["step"] += 1
        bar.update(round(record["seconds"]) - bar.n)
        bar.set_postfix_str(f"{bits:.3f} bits a byte, {tokens / elapsed:,.0f} bytes/s")
        if record["step"] % 100 == 0:
            record["curve"].append((record["step"], bits))
        if record["seconds"] - last_saved > 120:
            last_saved = record["seconds"]
            _save_state(state_file, model, optimizer, record)
    bar.close()
    _save_state(state_file, model, optimizer, record)
    record["held_out_bits_per_byte"] = bits_per_byte(model, held_out, recipe)
    return model, record


def write_checkpoint(model: MambaForCausalLM, record: dict, directory: Path) -> None:
    """A Hugging Face checkpoint: bf16 matrices, fp32 where the layout table says so, tokenizer, config, model card."""
    directory.mkdir(parents=True, exist_ok=True)
    table = family_of(model.config).parameters(model.config)
    parameters = dict(model.named_parameters())
    tensors = {
        name: parameters[name].detach().to(torch.float32 if layout.keep_fp32 else torch.bfloat16)
        for name, layout in table.items()
    }
    save_safetensors(tensors, directory / "model.safetensors")
    model.config.architectures = ["MambaForCausalLM"]
    model.config.dtype = torch.bfloat16
    model.config.use_cache = True
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    (directory / "README.md").write_text(_model_card(model, record))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0..255 are the bytes of the UTF-8 text; 256 ends a file."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    # The byte-level alphabet: printable bytes stand for themselves, the others for the characters from U+0100 on.
    others = (byte for byte in range(256) if byte not in printable)
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    vocabulary = {letters[byte]: byte for byte in range(256)} | {EOS_TOKEN: END}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS_TOKEN, pad_token=EOS_TOKEN, clean_up_tokenization_spaces=False
    )


def _windows(data: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    return data[starts.unsqueeze(1) + torch.arange(length + 1)]


def _schedule(progress: float, step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / warmup_steps) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def _save_state(file: Path, model, optimizer, record: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".part")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "record": record}, partial)
    partial.replace(file)


def _model_card(model: MambaForCausalLM, record: dict) -> str:
    recipe = record["recipe"]
    count = sum({id(p): p.numel() for p in model.parameters()}.values())
    seen = record["step"] * recipe["batch"] * recipe["length"]
    return f"""# A byte-level Mamba that writes Python

A small model to show tensor-parallel inference on something that is not noise. It is not good at Python.

| | |
|---|---|
| architecture | Mamba, {count:,} parameters: width {recipe["hidden_size"]}, {recipe["num_layers"]} layers |
| tokens | the 256 bytes, and one that ends a file |
| data | Python's standard library without its tests; a tenth of the files held out, chosen by seed {recipe["seed"]} |
| licence of the data | Python Software Foundation License, version 2 |
| training | {record["step"]:,} steps of {recipe["batch"]} × {recipe["length"]} bytes ({seen / 1e6:.1f} MB) |
| hardware and time | CPU, {torch.get_num_threads()} threads, {record["seconds"] / 60:.0f} minutes |
| held out | {record["held_out_bits_per_byte"]:.3f} bits a byte, windows of {recipe["length"]} bytes without context |
| | `python tools/evaluate.py checkpoints/demo --held-out` reads each file with all of its context |
| command | `python tools/train_demo.py --minutes {record["seconds"] / 60:.0f}` |

Matrices are stored in bfloat16; `A_log`, `D` and the bias of dt in float32.
"""
